"""RCO: Knowledge Distillation via Route Constrained Optimization.

X. Jin, B. Peng, Y. Wu, Y. Liu, J. Liu, D. Liang, J. Yan, X. Hu. ICCV 2019, pp. 1345-1354.
DOI 10.1109/ICCV.2019.00143, arXiv:1904.09149. No code of the authors is known.

A converged teacher can be too hard a target for a small student. RCO keeps states of ONE training
run of the teacher, its route, and lets the student imitate some of them in order, the anchors,
from easy to hard; each stage goes on from the student of the last.

    symbol     in code                            shape             meaning
    x, y       images, labels                     (B,3,H,W), (B,)   B images of C classes
    z_s, z_t   student_logits, teacher_logits     (B,C)             the teacher's are constants
    f_s, f_t   student_feature, teacher_feature   (B,D)             enters the classifier
    E          epochs                             int               of the teacher, and of a stage
    C_e        route[e]                           network           teacher after epoch e = 1..E
    N          anchors                            int               states used, offered; kd: stages
    H_j        kl[j-1]                            float             KL of candidate j and student
    delta      threshold                          float             limit on the growth r_ij of H
    X'         data.validation                    (M,3,H,W)         held-out training images
    lambda, T  weight, temperature                float             of the KL term

Equations, numbered by this project. PAPER: in the paper. PAPER*: ascribed to it second-hand.
READING: our choice. UNKNOWN: not settled by what we know of the paper.

    (1)  p^T(z) = softmax(z / T)
    (2)  L_KD = CE(z_s, y) + lambda T^2 KL(p_t^T || p_s^T)    PAPER*; direction and T^2: READING
    (3)  hint: L_KD + mu * 1/2 mean_b ||r(f_s) - f_t||^2      PAPER Fig. 1(b); 1/2, mu, r: READING
    (4)  mimic: mean_b ||f_s - f_t||^2 alone                  READING
    (5)  route C_1 .. C_E of one run; C_E is the last anchor  PAPER Fig. 2, Table 7
    (6)  stage i minimises the loss on anchor i, from W_i-1   PAPER Algorithm 1
    (7)  eei: anchors floor(k E / N), k = 1..N                PAPER Table 7
    (8)  one-stage: the end of the segment of E / N epochs    PAPER Table 7; its END: READING
    (9)  H_j = mean over X' of KL(p_t_j^T || p_s^T)           PAPER; direction: READING
    (10) r_ij = (H_j - H_i) / H_i                             PAPER
    (11) greedy: just before the first j < N with r_ij > delta    PAPER Algorithm 2, with a guard
    (12) lr(e) = lr0 * 0.1 ** (4 e // E)                      READING of PAPER Fig. 3

UNKNOWN in the paper, chosen here: T = 4, lambda = 1, T^2; optimiser, learning rate, batch, decay,
augmentation; a fresh optimiser and schedule in each stage; the last, not the best, weights of a
stage; the first greedy anchor (candidate 1); the candidate grid (every E/24 epochs); T inside H
(as in the loss); mu = 1 and the adapter r (linear where the widths differ, else the identity); the
mimic formula, its accuracy by class means, its smaller learning rate; MobileNetV2's width; seeds.
Second-hand (PAPER*): the form CE + lambda KL, delta = 0.8, ResNet-50 -> MobileNetV2.
Inferred: 240 epochs a stage (totals of Table 7), drops at 25, 50, 75 % (Fig. 3), C_E last.
Departures: the printed greedy loop can stall, so (11) moves on by at least one candidate; X' is cut
from the training set. Not reproduced: ImageNet, MegaFace, Tables 1-6. The paper's percentages are
not claimed for this code.

    python rco.py                       embedded shapes; 2 CPU cores: about a minute
    python rco.py --compare             with its controls; 2 CPU cores: 2 to 4 minutes
    python rco.py --dataset cifar100    ResNet-50 -> MobileNetV2, 240 epochs a stage: not yet run
"""

from __future__ import annotations

import argparse
import math

from common import (
    F, Record, autocast, base_parser, build_model, check_batch_size, check_plot,
    compile_network, describe, each_seed, embeddings, evaluate, evaluating, introduce,
    load_data, load_frozen, nn, number, open_set_report, parse, print_table, random_states,
    restore_random_states, run_script, sgd, torch, train_network)

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
SMALL = {"teacher": "resnet20", "student": "resnet8x0.5", "epochs": 24, **RECIPE}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {**SMALL, "teacher": "resnet14", "epochs": 8, "learning_rate": 0.1},
    "fashionmnist": SMALL, "cifar10": SMALL, "folder": SMALL, "tinyimagenet": SMALL,
    "cifar100": {**SMALL, "teacher": "resnet50", "student": "mobilenetv2", "epochs": 240},
    "imagenet": {"teacher": "resnet50", "student": "mobilenet_v2", "epochs": 90, "momentum": 0.9,
                 "learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 256},
}
ANCHORS = {"eei": 4, "one-stage": 24, "greedy": 24, "kd": 1}  # N; at most E


# -------------------------------------------------------------------------- 1. losses and equations
def softened_kl(student_logits, teacher_logits, temperature):
    """KL(p_t^T || p_s^T) in nats, mean over the batch; logits (B,C). Gradients reach both."""
    # Eq. (1): p^T = softmax(z / T). kl_div takes the learner first and as LOG-probabilities: it
    # computes p_t (log p_t - log p_s). "batchmean" divides by B; "mean" would divide by B C.
    log_p_s = F.log_softmax(student_logits / temperature, dim=1)  # (B,C)
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=1)  # (B,C)
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def kd_loss(student_logits, teacher_logits, labels, weight=1.0, temperature=4.0):
    """Eq. (2), a scalar. Logits (B,C), labels (B,) int. Only the student gets gradients."""
    # Eq. (2): L_KD = CE(z_s, y) + lambda T^2 KL(p_t^T || p_s^T)
    ce = F.cross_entropy(student_logits, labels)
    kl = softened_kl(student_logits, teacher_logits.detach(), temperature)
    return ce + weight * temperature**2 * kl


def hint_loss(student_feature, teacher_feature):
    """The last factor of eq. (3), a scalar; features (B,D), ValueError if their shapes differ.

    Only the student gets gradients.
    """
    # Eq. (3): 1/2 mean_b ||f_s - f_t||^2, a SUM over D (F.mse_loss would divide by D as well)
    return 0.5 * mimic_loss(student_feature, teacher_feature)


def mimic_loss(student_embedding, teacher_embedding):
    """Eq. (4), a scalar; embeddings (B,D), ValueError if their shapes differ.

    Only the student gets gradients.
    """
    if student_embedding.shape != teacher_embedding.shape:
        raise ValueError(f"student {tuple(student_embedding.shape)} and teacher "
                         f"{tuple(teacher_embedding.shape)} must have one shape")
    # Eq. (4): mean_b ||f_s - f_t||^2
    return (student_embedding - teacher_embedding.detach()).square().sum(1).mean()


def equal_epoch_anchors(epochs, count):
    """Eq. (7): anchor epochs, from 1, ending at `epochs`; ValueError if they cannot rise."""
    if not 1 <= count <= epochs:
        raise ValueError(f"{count} anchors in {epochs} epochs: at least 1, at most the epochs")
    # Eq. (7): floor(k E / N), k = 1..N
    return [k * epochs // count for k in range(1, count + 1)]


def one_stage_anchor(epoch, gap, epochs):
    """Eq. (8): the anchor epoch (from 1) for the student's epoch (from 0); gap in epochs."""
    # Eq. (8): min(E, (e // gap + 1) gap), the end of the segment that e lies in
    return min(epochs, (epoch // gap + 1) * gap)


def route_kl(student, route, images, temperature):
    """Eq. (9): [H_1 .. H_N] in nats, without T^2, of ONE student to every teacher in `route`.

    `images`: normalised (M,3,H,W), or (images, labels) batches. Eval mode, no gradients; every
    network gets its own mode back.
    """
    if isinstance(images, torch.Tensor):
        images = ((chunk, None) for chunk in images.split(500))
    total, count = 0, 0
    with evaluating(student, *route):
        for chunk, _ in images:
            z_s = student(chunk).float()  # (B,C)
            # Eq. (9): H_j = mean over X' of KL(p_t_j^T || p_s^T); a chunk counts by its size
            kl = [softened_kl(z_s, teacher(chunk).float(), temperature) for teacher in route]
            total = total + len(chunk) * torch.stack(kl)  # (N,)
            count += len(chunk)
    return (total / count).tolist()


def next_anchor(kl, current, threshold):
    """Eq. (11): the candidate (from 1) after `current`; kl[j-1] is H_j of the CURRENT student."""
    i, N = current, len(kl)
    for j in range(i + 1, N):  # H_N is never tested
        # Eq. (10): r_ij = (H_j - H_i) / H_i
        r_ij = (kl[j - 1] - kl[i - 1]) / kl[i - 1]
        # Eq. (11): the first crossing wins; the printed j - 1 can be i itself, an endless loop
        if r_ij > threshold:
            return max(j - 1, i + 1)
    return N


def learning_rates(initial, epochs):
    """Eq. (12): the rate of each epoch of a stage, ten times smaller after 25, 50 and 75 %."""
    # Eq. (12): lr(e) = lr0 * 0.1 ** (4 e // E)
    return [initial * 0.1 ** (4 * e // epochs) for e in range(epochs)]


# --------------------------------------------------------------------------------------- 2. modules
def build_student(data, teacher_features, arguments):
    """The student with r of eq. (3), its `adapter`: Linear(D_s, D_t) or, if equal, the identity.

    Under kd nothing is compared before the classifier, and the adapter is the identity.
    """
    student = build_model(arguments.student, data.classes, data.image_size, arguments.seed)
    student.adapter = nn.Identity()
    if arguments.transfer != "kd" and student.features != teacher_features:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            student.adapter = nn.Linear(student.features, teacher_features)
    return student.to(arguments.device)


def embedder(network):
    """images -> (B,D): the embedding; a mimicking student's is the output of its adapter."""
    adapter = getattr(network, "adapter", nn.Identity())
    return lambda images: adapter(network.embed(images))


def class_mean_scores(network, data, arguments):
    """READING, for mimic, which trains no classifier: images -> cosine to class means, (B,C)."""
    vectors, labels = embeddings(network, data.train, arguments, embedder(network))  # (N,D), (N,)
    means = torch.stack([vectors[labels == c].mean(0) for c in range(data.classes)])  # (C,D)
    means = F.normalize(means, dim=1)

    def scores(images):
        unit = F.normalize(embedder(network)(images).float(), dim=1)  # (B,D)
        with torch.autocast(arguments.device.type, enabled=False):  # cosines lie close together
            return unit @ means.T  # (B,C)
    return scores


def test_accuracy(network, data, arguments):
    """Top-1 in % on the test images; by class means if the run compares mimicking students."""
    forward = class_mean_scores(network, data, arguments) if arguments.class_means else None
    return evaluate(network, data.test, arguments, forward)


# -------------------------------------------------------------------------------------- 3. training
def teacher_route(data, arguments):
    """Eq. (5): states of one run of the teacher, {epoch: frozen network}, C_E always among them.

    Returns them, their test accuracies {epoch: %} and the seconds of the training. The files of
    --teacher-weights, if any, are the route: states of ONE run at equal intervals, C_E last.
    """
    E, seconds = arguments.epochs, None
    if arguments.teacher_weights:
        epochs, route = equal_epoch_anchors(E, len(arguments.teacher_weights)), {}
        for epoch, path in zip(epochs, arguments.teacher_weights):
            route[epoch] = load_frozen(arguments.teacher, path, data, arguments)
    else:  # the anchors, and the 24 candidates that the pictures show
        result, route = train_network(
            arguments.teacher, data, learning_rates(arguments.learning_rate, E), arguments,
            keep={*equal_epoch_anchors(E, min(24, E)), *arguments.needed},
            seed=arguments.seed + 1000)
        seconds = result["seconds"]
        if not arguments.class_means:
            return route, {epoch: result["rows"][epoch - 1]["test"] for epoch in route}, seconds
    return route, {e: test_accuracy(route[e], data, arguments) for e in route}, seconds


def train_step(student, teacher, optimizer, images, labels, arguments):
    """One step on one anchor, the frozen `teacher`. Returns the loss terms, and the logits."""
    with autocast(arguments):
        with torch.no_grad():
            teacher_feature = teacher.embed(images)  # (B,D_t)
            teacher_logits = teacher.head(teacher_feature).float()  # (B,C)
        student_feature = student.embed(images)  # (B,D_s)
        student_logits = student.head(student_feature).float()  # (B,C)
        adapted = student.adapter(student_feature).float()  # (B,D_t)
    if arguments.transfer == "mimic":
        loss = mimic_loss(adapted, teacher_feature.float())  # Eq. (4)
        terms = {"mimic": loss}
    else:
        loss = kd_loss(student_logits, teacher_logits, labels, arguments.weight,
                       arguments.temperature)  # Eq. (2)
        with torch.no_grad():  # the two terms of eq. (2) apart, without weights, for the log
            terms = {"ce": F.cross_entropy(student_logits, labels),
                     "kl": softened_kl(student_logits, teacher_logits, arguments.temperature)}
        if arguments.transfer == "hint":
            terms["hint"] = hint_loss(adapted, teacher_feature.float())
            loss = loss + arguments.hint_weight * terms["hint"]  # Eq. (3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return terms, None if arguments.transfer == "mimic" else student_logits


def distill(student, route, data, arguments, record):
    """Algorithms 1 and 2: train the student stage by stage, in place.

    Returns the anchor epoch of each stage (None for one-stage), and the hardness curves: after
    each stage, the KL of the student to every kept state of the route.
    """
    E, N, length, T = (arguments.epochs, arguments.anchors, arguments.stage_epochs,
                       arguments.temperature)
    candidates = (sorted(route) if arguments.teacher_weights
                  else equal_epoch_anchors(E, min(N, E)))  # under kd, N counts stages
    plan = {"eei": candidates, "greedy": candidates[:1], "one-stage": [None],
            "kd": [E] * N}[arguments.strategy]
    rates = learning_rates(arguments.student_learning_rate, length)
    generator = torch.Generator().manual_seed(arguments.seed)  # one stream for all the stages
    optimizer, stage, epoch, curves = sgd(student.parameters(), arguments), 0, 0, []
    if record.state:
        state = record.state
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"], generator)
        stage, epoch, plan, curves = (state[k] for k in ("stage", "epoch", "plan", "curves"))
    compile_network(student, arguments)
    record.begin(len(plan) * length)
    while stage < len(plan):
        record.epochs = len(plan) * length
        for epoch in range(epoch, length):  # noqa: B020  (a resumed stage starts in its middle)
            # Eq. (8) inside one stage, otherwise the stage's own anchor
            anchor = plan[stage] or one_stage_anchor(epoch, math.ceil(E / N), E)
            optimizer.param_groups[0]["lr"] = rates[epoch]
            student.train()
            for images, labels in data.train.augmented(arguments.batch_size, generator):
                terms, logits = train_step(student, route[anchor], optimizer, images, labels,
                                           arguments)
                record.step(terms, logits, labels, len(data.train) // arguments.batch_size)
            record.trained()
            after = {"test": test_accuracy(student, data, arguments)}
            if arguments.transfer != "mimic":
                after["kl_anchor"], after["kl_final"] = route_kl(
                    student, [route[anchor], route[E]], data.validation.batches(), T)
                if epoch + 1 == length:
                    curves.append(route_kl(student, [route[e] for e in sorted(route)],
                                           data.validation.batches(), T))
            record.epoch(
                {"stage": stage + 1, "epoch": epoch + 1, "anchor": anchor, "lr": rates[epoch]},
                after, {"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                        "stage": stage, "epoch": epoch + 1, "plan": plan, "curves": curves,
                        "random": random_states(generator)})
        if arguments.strategy == "greedy" and plan[-1] != E:  # Algorithm 2
            kl = route_kl(student, [route[e] for e in candidates], data.validation.batches(), T)
            i = candidates.index(plan[-1]) + 1
            plan = [*plan, candidates[next_anchor(kl, i, arguments.threshold) - 1]]
            print(f"  greedy: after anchor {plan[-2]} comes anchor {plan[-1]}")
        # Eq. (6): W_i starts at W_i-1; momentum is empty and the schedule starts again
        optimizer, stage, epoch = sgd(student.parameters(), arguments), stage + 1, 0
    return plan, {"epochs": sorted(route), "kl": curves}


# --------------------------------------------------------------------------------------- 4. results
def measures(network, route, data, arguments):
    """KL to C_E on X' (the congruence floor), and the recognition of unseen classes, if any."""
    found = {}
    if arguments.transfer != "mimic":
        found["kl_final"] = route_kl(network, [route[max(route)]], data.validation.batches(),
                                     arguments.temperature)[0]
    if data.unseen:
        forward = embedder(network) if arguments.transfer == "mimic" else None
        found |= open_set_report(*embeddings(network, data.unseen, arguments, forward))
    return found


def name_of(run):
    """The name of a student run in the table."""
    name = run.strategy if run.transfer == "kd" else f"{run.strategy} {run.transfer}"
    if run.strategy == "kd" and run.weight == 0 and run.transfer == "kd":
        name = "student alone"
    if run.stage_epochs != run.epochs:
        name += f", stages of {run.stage_epochs} epochs"
    several = run.strategy in ("kd", "eei") and run.anchors > 1
    return f"{name}, {run.anchors} stages" if several else name


def run_strategy(route, teacher_test, data, run, record):
    """Train one student by one strategy, unless its record is finished; returns its table row."""
    if not record.result:
        print(f"\n{name_of(run)}: {run.student} learns from {run.teacher}; records in "
              f"{record.folder}")
        student = build_student(data, route[max(route)].features, run)
        plan, curves = distill(student, route, data, run, record)
        weights = student.state_dict()
        if run.transfer == "hint":  # its adapter has done its work; mimic's is part of the student
            weights = {name: w for name, w in weights.items() if not name.startswith("adapter.")}
        if run.strategy == "greedy":
            print(f"  greedy took {len(plan)} stages, anchors {plan}; its control at equal cost: "
                  f"--strategy kd --anchors {len(plan)}")
        images = len(data.train) * len(record.rows)
        record.finish(
            weights, anchors=[anchor or "one-stage" for anchor in plan], curves=curves,
            teacher_test=list(teacher_test.items()),
            images={"student forward and backward": images, "teacher forward": images},
            measures=measures(student, route, data, run))
    result = record.result
    return {"run": name_of(run), "test": result["last_test"], "best": result["best_test"],
            "epochs": len(result["rows"]), "cost": len(result["rows"]) / run.epochs,
            "seconds": result["seconds"], **result["measures"]}


def plot(record):
    """The paper's two pictures from the run's own record: hardness.png (Fig. 3), gap.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    result, rows = record.result, record.result["rows"]
    files = [record.folder / "hardness.png", record.folder / "gap.png"]
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    ends = {row["stage"]: row for row in rows}.values()  # the last epoch of each stage
    for row, kl in zip(ends, result["curves"]["kl"]):
        label = f"after stage {row['stage']}, anchor {row['anchor']}"
        axes.plot(result["curves"]["epochs"], kl, marker=".", label=label)
    axes.set(xlabel="teacher epoch", ylabel="KL to the student (nats)",
             title="Hardness of the route")
    if result["curves"]["kl"]:  # mimic trains no logits and has no such curves
        axes.legend(fontsize=8)
        figure.savefig(files[0], dpi=110)
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    last, teacher = {row["anchor"]: row["test"] for row in rows}, dict(result["teacher_test"])
    axes.plot(list(last), [teacher[anchor] for anchor in last], marker="o", label="teacher")
    axes.plot(list(last), list(last.values()), marker="o", label="student")
    axes.set(xlabel="anchor (teacher epoch)", ylabel="test accuracy (%)",
             title="Student and teacher by anchor")
    axes.legend(fontsize=8)
    figure.savefig(files[1], dpi=110)
    print("pictures:", *[file for file in files if file.exists()])


# ----------------------------------------------------------------------------------------- 5. flags
def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], DEFAULTS)
    positive, weight = number(float, 0, low_allowed=False), number(float, 0)
    add = parser.add_argument_group("RCO").add_argument
    add("--strategy", default="eei", choices=list(ANCHORS),
        help="eq. (7), (8), (11), or kd: every stage on the final teacher (default: eei)")
    add("--anchors", type=number(int, 1), metavar="N",
        help="states of the route (default: eei 4, one-stage and greedy 24, kd 1)")
    add("--transfer", default="kd", choices=("kd", "hint", "mimic"),
        help="eq. (2), (3) or (4) (default: kd)")
    add("--threshold", type=weight, default=0.8, metavar="DELTA",
        help="greedy: limit on r_ij, eq. (11) (default: 0.8)")
    add("--temperature", type=positive, default=4.0, metavar="T", help="eq. (1) (default: 4)")
    add("--weight", type=weight, default=1.0, metavar="LAMBDA",
        help="of the KL term, eq. (2) (default: 1)")
    add("--hint-weight", type=weight, default=1.0, metavar="MU", help="eq. (3) (default: 1)")
    add("--student-learning-rate", type=positive, metavar="LR",
        help="the students' (default: --learning-rate; for mimic, a steep sum over D, a tenth)")
    add("--stage-epochs", type=number(int, 1), metavar="E",
        help="epochs of a stage (default: --epochs)")
    add("--compare", nargs="*", choices=list(ANCHORS), metavar="STRATEGY",
        help="run the controls as well, and the strategies named here; one table")
    add("--plot", action="store_true", help="write hardness.png and gap.png (needs matplotlib)")
    arguments = parse(parser, argv)
    strategies = (arguments.strategy, *(arguments.compare or ()))
    if "one-stage" in strategies and arguments.stage_epochs not in (None, arguments.epochs):
        parser.error("one-stage has one stage of --epochs; --stage-epochs does not go with it")
    if arguments.transfer == "mimic" and "greedy" in strategies:
        parser.error("greedy needs trained logits for eq. (9), and mimic trains none")
    if arguments.strategy != "kd" and (arguments.anchors or 1) > arguments.epochs:
        parser.error(f"--anchors {arguments.anchors}: the route has {arguments.epochs} states")
    files = len(arguments.teacher_weights or ())
    if files and "one-stage" in strategies and arguments.epochs % files:
        parser.error("one-stage: the number of --teacher-weights must divide --epochs")
    if files > arguments.epochs:
        parser.error(f"--teacher-weights: {files} states of a route of {arguments.epochs} epochs")
    if files and arguments.strategy != "kd" and (arguments.anchors or files) != files:
        parser.error(f"--anchors {arguments.anchors}, but --teacher-weights names {files} states")
    check_plot(parser, arguments)
    return arguments


def variant(arguments, **flags):
    """The arguments of one student run: `flags` replace those given, the rest is filled in."""
    run = argparse.Namespace(**{**vars(arguments), **flags})
    run.anchors = run.anchors or min(ANCHORS[run.strategy], run.epochs)
    if run.teacher_weights and run.strategy != "kd":
        run.anchors = len(run.teacher_weights)
    run.stage_epochs = run.stage_epochs or run.epochs
    if run.student_learning_rate is None:
        run.student_learning_rate = run.learning_rate * (0.1 if run.transfer == "mimic" else 1)
    return run


def anchor_epochs(run):
    """The teacher epochs that a run may use as anchors."""
    E, gap = run.epochs, math.ceil(run.epochs / run.anchors)
    if run.strategy == "one-stage":
        return {one_stage_anchor(epoch, gap, E) for epoch in range(E)}
    return {E} if run.strategy == "kd" else set(equal_epoch_anchors(E, run.anchors))


# ------------------------------------------------------------------------------------------ 6. main
def run_seed(arguments):
    """All of one seed: the teacher, the chosen strategy, with --compare its controls; the rows."""
    data = load_data(
        arguments.dataset, arguments.data, arguments.image_size, arguments.train_fraction,
        0.1, arguments.open_set, arguments.seed, arguments.device)  # X': a tenth, at most 10,000
    check_batch_size(data, arguments)
    introduce(data, arguments)
    arguments.class_means = arguments.transfer == "mimic"
    chosen, fingerprint = variant(arguments), {"data_fingerprint": data.train.fingerprint()}
    further = [variant(arguments, strategy=strategy, anchors=None)
               for strategy in arguments.compare or () if strategy != arguments.strategy]
    arguments.needed = set().union(*(anchor_epochs(run) for run in (chosen, *further)))

    def record_of(run, folder):
        settings = {**describe(run, skip=("needed",)), **fingerprint}
        return Record(folder, settings, arguments.resume, arguments.device)

    record = record_of(chosen, arguments.out)  # first: refuse a folder that holds another run
    route, teacher_test, seconds = teacher_route(data, arguments)
    E = arguments.epochs
    rows = {"teacher": {"run": "teacher", "test": teacher_test[E], "epochs": E, "seconds": seconds,
                        **measures(route[E], route, data, arguments)}}

    def add(run, folder):
        if name_of(run) not in rows:
            own = record if folder == "" else record_of(run, arguments.out / folder)
            rows[name_of(run)] = run_strategy(route, teacher_test, data, run, own)

    add(chosen, "")
    if arguments.compare is not None:
        for run in further:
            add(run, f"compare-{run.strategy}")
        totals = sorted({row["epochs"] for row in rows.values()})
        once = {"strategy": "kd", "anchors": 1, "stage_epochs": None}
        plain = variant(arguments, **once, transfer="kd")
        result, alone = train_network(
            plain.student, data, learning_rates(plain.student_learning_rate, E), arguments,
            seed=arguments.seed, title="\nstudent alone")
        rows["student alone"] = {
            "run": "student alone", "test": test_accuracy(alone[E], data, arguments), "epochs": E,
            "cost": 1.0, "seconds": result["seconds"], **measures(alone[E], route, data, arguments)}
        add(plain, "kd")
        add(variant(arguments, **once), f"kd-{arguments.transfer}")
        for total in totals:
            add(variant(arguments, **{**once, "stage_epochs": total}), f"kd-long-{total}")
            stages, rest = divmod(total, chosen.stage_epochs)
            if rest == 0:
                add(variant(arguments, strategy="kd", anchors=stages), f"kd-restarts-{total}")
    if arguments.plot:
        plot(record)
    strategies = [name_of(run) for run in (chosen, *further)]  # after their controls
    return sorted(rows.values(), key=lambda row: row["run"] in strategies)


def main():
    arguments = parse_args()
    tables = [run_seed(run) for run in each_seed(arguments)]
    formats = {"test": ".2f", "best": ".2f", "kl_final": ".4f", "rank1": ".1f",
               "verification": ".1f", "epochs": ".0f", "cost": ".1f", "seconds": ".0f"}
    print_table(tables, formats, f"RCO on {arguments.dataset}: last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
