"""RCO: Knowledge Distillation via Route Constrained Optimization.

X. Jin, B. Peng, Y. Wu, Y. Liu, J. Liu, D. Liang, J. Yan, X. Hu. ICCV 2019, pp. 1345-1354. arXiv:1904.09149.

A converged teacher can be too hard a target for a small student. RCO keeps states of ONE training run of the teacher, its
route, and lets the student imitate some of them in order, the anchors, from easy to hard, each stage going on from the last.

    symbol    in code                  shape     meaning
    x, y      images, labels           (B,3,H,W), (B,)   mini-batch; B images, C classes
    z_s, z_t  student_logits, teacher_logits    (B,C)    the teacher's are constants
    f_s, f_t  student_feature, teacher_feature  (B,D)    pooled vector that enters the classifier
    E         epochs                   int       epochs of the teacher; also of one stage of the student
    C_e       route[e]                 network   the teacher after epoch e = 1..E, batch-norm statistics included
    N         anchors                  int       states used (eei, one-stage) or offered as candidates (greedy)
    H_j       kl[j-1]                  float     KL of the current student to candidate j on the held-out images X'
    delta     threshold                float     limit on the relative growth r_ij of that KL
    lambda, T weight, temperature      float     weight of the KL term, softmax temperature

Equations (numbers are this project's; the source is named):
    (1)  p^T(z) = softmax(z / T)
    (2)  L_KD = CE(z_s, y) + lambda T^2 KL(p_t^T || p_s^T)            the form second-hand; direction and T^2: READING
    (3)  hint: L_KD + mu/2 mean_b ||r(f_s) - f_t||^2                  L2 before the classifier: PAPER Fig. 1(b); 1/2, mu, r: READING
    (4)  mimic: mean_b ||f_s - f_t||^2 alone                          READING
    (5)  route C_1 .. C_E of one run, C_E the last anchor             PAPER Fig. 2, Table 7
    (6)  stage i minimises the loss against anchor i from W_{i-1}     PAPER Algorithm 1
    (7)  equal intervals: anchors floor(k E / N), k = 1..N            PAPER Table 7
    (8)  one stage: the end of the segment the epoch lies in          PAPER Table 7; the END: READING
    (9)  H_j = mean over X' of KL(p_t_j^T || p_s^T)                   PAPER; direction: READING
    (10) r_ij = (H_j - H_i) / H_i                                     PAPER
    (11) next anchor: just before the first j < N with r_ij > delta   PAPER Algorithm 2; max(j - 1, i + 1): ours
    (12) lr(e) = lr0 * 0.1 ** (4 e // E)                              READING of Fig. 3

UNKNOWN in the paper, chosen here: T = 4, lambda = 1, T^2; optimiser, learning rate, batch, decay, augmentation; fresh optimiser
and schedule in each stage; last (not best) weights of a stage; first greedy anchor (candidate 1) and candidate grid (every
E/24 epochs); T inside H (as in the loss); mu = 1 and the adapter r (a linear layer where the widths differ, else nothing);
the mimic formula; seeds. Second-hand: the form CE + lambda KL, delta = 0.8, ResNet-50 -> MobileNetV2. Inferred: 240 epochs a
stage (totals of Table 7), drops at 25, 50, 75 % (Fig. 3), C_E as last anchor. Departures: the printed greedy loop can stall on
one candidate, so (11) moves on by at least one; X' is cut from the training set, never the test set.
Not reproduced: ImageNet, MegaFace, Tables 1-6. The paper's percentages are not claimed for this code.

    python rco.py                               embedded shapes, 2 CPU cores, under a minute
    python rco.py --compare                     the controls as well: teacher, student alone, KD at 1x and at equal epochs
    python rco.py --dataset cifar100            the paper's setting, 240 epochs a stage; not yet run here
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from common import (F, InputError, Record, autocast, base_parser, build_model, compile_network, describe, embeddings, evaluate, evaluating,
                    frozen, load_data, load_weights, nn, number, open_set_report, parse, print_table, random_states,
                    restore_random_states, run_script, save_file, sgd, torch, train_network)

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
SMALL = {"teacher": "resnet20", "student": "resnet8x0.5", "epochs": 24, **RECIPE}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {**SMALL, "teacher": "resnet14", "epochs": 8, "learning_rate": 0.1},
    "fashionmnist": SMALL, "cifar10": SMALL, "folder": SMALL, "tinyimagenet": SMALL,
    "cifar100": {**SMALL, "teacher": "resnet50", "student": "mobilenetv2", "epochs": 240},
    "imagenet": {"teacher": "resnet50", "student": "mobilenet_v2", "epochs": 90, "learning_rate": 0.1,
                 "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256},
}
ANCHORS = {"eei": 4, "one-stage": 24, "greedy": 24, "kd": 1}


# ------------------------------------------------------------------------------------------------- 1. losses, equations
def softened_kl(student_logits, teacher_logits, temperature):
    """KL(p_t^T || p_s^T) in nats, mean over the batch; (B,C) logits. The caller detaches what must stay fixed."""
    # Eq. (1): p^T = softmax(z / T). F.kl_div wants log-probabilities of the learner first, because it computes
    # p_t (log p_t - log p_s) and only the log of p_s is ever needed; "batchmean" divides by B, "mean" by B C.
    log_p_s = F.log_softmax(student_logits / temperature, dim=1)  # (B,C)
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=1)  # (B,C)
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def kd_loss(student_logits, teacher_logits, labels, weight=1.0, temperature=4.0):
    """Eq. (2), a scalar. Logits (B,C), labels (B,) int; `weight` is lambda. Only the student gets gradients."""
    # Eq. (2): L_KD = CE(z_s, y) + lambda T^2 KL(p_t^T || p_s^T)
    ce = F.cross_entropy(student_logits, labels)
    return ce + weight * temperature**2 * softened_kl(student_logits, teacher_logits.detach(), temperature)


def hint_loss(student_feature, teacher_feature):
    """Eq. (3), a scalar: 1/2 mean_b ||f_s - f_t||^2, features (B,D). The teacher's get no gradient; ValueError on shapes."""
    # Eq. (3): the squared norm sums over D; F.mse_loss would divide by D as well
    return 0.5 * mimic_loss(student_feature, teacher_feature)


def mimic_loss(student_embedding, teacher_embedding):
    """Eq. (4), a scalar: mean_b ||f_s - f_t||^2, embeddings (B,D). The teacher's get no gradient; ValueError on shapes."""
    if student_embedding.shape != teacher_embedding.shape:
        raise ValueError(f"student {tuple(student_embedding.shape)} and teacher {tuple(teacher_embedding.shape)} differ")
    # Eq. (4): mean_b ||f_s - f_t||^2
    return (student_embedding - teacher_embedding.detach()).square().sum(1).mean()


def equal_epoch_anchors(epochs, count):
    """Eq. (7): `count` anchor epochs (counted from 1) at equal intervals, ending at `epochs`. ValueError unless 1 <= count <= epochs."""
    if not 1 <= count <= epochs:
        raise ValueError(f"{count} anchors in {epochs} epochs: the count must be at least 1 and at most the epochs")
    # Eq. (7): k E / N, rounded down
    return [k * epochs // count for k in range(1, count + 1)]


def one_stage_anchor(epoch, gap, epochs):
    """Eq. (8): anchor epoch (from 1) for student epoch `epoch` (from 0): the end of the segment of `gap` epochs it lies in."""
    # Eq. (8): min(E, (e // gap + 1) gap)
    return min(epochs, (epoch // gap + 1) * gap)


def route_kl(student, route, images, temperature):
    """Eq. (9): [H_1 .. H_N] in nats (no T^2), for ONE student and all teachers of `route`.

    `images`: normalised (M,3,H,W), or an iterable of (images, labels) batches. Everything runs in eval mode without gradients;
    each network gets its mode back.
    """
    batches = ((chunk, None) for chunk in images.split(500)) if isinstance(images, torch.Tensor) else images
    total, count = 0, 0
    with evaluating(student, *route):
        for chunk, _ in batches:
            student_logits = student(chunk).float()  # (B,C)
            # Eq. (9): H_j = KL(p_t_j^T || p_s^T), each chunk weighted by its size
            total = total + len(chunk) * torch.stack(
                [softened_kl(student_logits, teacher(chunk).float(), temperature) for teacher in route])  # (N,)
            count += len(chunk)
    return (total / count).tolist()


def next_anchor(kl, current, threshold):
    """Eq. (11): the next candidate (counted from 1) after `current`; kl[j-1] is H_j, all from the CURRENT student."""
    i, last = current, len(kl)
    for j in range(i + 1, last):  # H_N is never tested
        # Eq. (10): r_ij = (H_j - H_i) / H_i
        r_ij = (kl[j - 1] - kl[i - 1]) / kl[i - 1]
        # Eq. (11): the first crossing wins; the printed j - 1 may be i itself and would stall
        if r_ij > threshold:
            return max(j - 1, i + 1)
    return last


def learning_rates(initial, epochs):
    """Eq. (12): the learning rate of each epoch of a stage; ten times smaller after 25, 50 and 75 %."""
    # Eq. (12): lr(e) = lr0 * 0.1 ** (4 e // E)
    return [initial * 0.1 ** (4 * epoch // epochs) for epoch in range(epochs)]


# ------------------------------------------------------------------------------------------------------ 2. the networks
def build_student(data, teacher_features, arguments):
    """The student, with `adapter`: Linear(D_s, D_t) where hint or mimic must compare different widths, else the identity."""
    student = build_model(arguments.student, data.classes, data.image_size, arguments.seed)
    student.adapter = nn.Identity()
    if arguments.transfer != "kd" and student.features != teacher_features:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            student.adapter = nn.Linear(student.features, teacher_features)
    return student.to(arguments.device)


def embedder(network):
    """images -> (B,D): the embedding; a mimicking student's includes its adapter."""
    return lambda images: getattr(network, "adapter", nn.Identity())(network.embed(images))


def class_mean_scores(network, data, arguments):
    """READING for mimic, whose classifier is never trained: cosine to the mean training embedding of each class, (B,C)."""
    vectors, labels = embeddings(network, data.train, arguments, embedder(network))
    means = torch.stack([vectors[labels == label].mean(0) for label in range(data.classes)])  # (C,D)
    return lambda images: F.normalize(embedder(network)(images).float(), dim=1) @ F.normalize(means, dim=1).T


def test_accuracy(network, data, arguments):
    forward = class_mean_scores(network, data, arguments) if arguments.class_means else None
    return evaluate(network, data.test, arguments, forward)


# ------------------------------------------------------------------------------------------------------- 3. the training
def teacher_route(data, arguments):
    """Eq. (5): train the teacher once and keep its states. Returns {epoch: frozen network}, and test accuracies by epoch.

    --teacher-weights gives the states instead: files of ONE run, in order, at equal intervals, the last one C_E.
    """
    E = arguments.epochs
    if arguments.teacher_weights:
        epochs, route = equal_epoch_anchors(E, len(arguments.teacher_weights)), {}
        for epoch, path in zip(epochs, arguments.teacher_weights):
            teacher = build_model(arguments.teacher, data.classes, data.image_size)
            route[epoch] = frozen(load_weights(teacher, path)).to(arguments.device)
        return route, {epoch: test_accuracy(route[epoch], data, arguments) for epoch in epochs}, None
    keep = {*equal_epoch_anchors(E, min(24, E)), *arguments.needed}  # 24 candidates for the curves, and every anchor
    result, route = train_network(arguments.teacher, data, learning_rates(arguments.learning_rate, E), arguments,
                                  keep=keep, seed=arguments.seed + 1000)
    if arguments.class_means:
        return route, {epoch: test_accuracy(route[epoch], data, arguments) for epoch in route}, result["seconds"]
    return route, {epoch: result["rows"][epoch - 1]["test"] for epoch in route}, result["seconds"]


def train_step(student, teacher, optimizer, images, labels, arguments):
    """One step of a stage: the student learns from `teacher`, frozen. Returns the loss terms by name, and the logits."""
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
        loss = kd_loss(student_logits, teacher_logits, labels, arguments.weight, arguments.temperature)  # Eq. (2)
        with torch.no_grad():  # for the log, apart
            terms = {"ce": F.cross_entropy(student_logits, labels),
                     "kl": softened_kl(student_logits, teacher_logits, arguments.temperature)}
        if arguments.transfer == "hint":
            terms["hint"] = hint_loss(adapted, teacher_feature.float())  # Eq. (3)
            loss = loss + arguments.hint_weight * terms["hint"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return terms, None if arguments.transfer == "mimic" else student_logits


def distill(student, route, data, arguments, record):
    """Algorithms 1 and 2: train the student stage by stage. Returns the anchors used, one list a stage, and the hardness curves."""
    E, length, N = arguments.epochs, arguments.stage_epochs, arguments.anchors
    candidates = sorted(route) if arguments.teacher_weights else equal_epoch_anchors(E, N)
    plan = {"eei": candidates, "greedy": candidates[:1], "one-stage": [None], "kd": [E] * N}[arguments.strategy]
    rates, curve_epochs = learning_rates(arguments.student_learning_rate, length), sorted(route)
    generator = torch.Generator().manual_seed(arguments.seed)  # one stream of batches for all stages
    optimizer, stage, epoch, curves = sgd(student.parameters(), arguments), 0, 0, []
    if record.state:
        state = record.state
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"], generator)
        stage, epoch, plan, curves = state["stage"], state["epoch"], state["plan"], state["curves"]
    compile_network(student, arguments)
    while stage < len(plan):
        record.epochs = len(plan) * length
        for epoch in range(epoch, length):  # noqa: B020  (a resumed stage starts in its middle)
            # Eq. (8) within one stage, else the stage's own anchor
            anchor = plan[stage] or one_stage_anchor(epoch, math.ceil(E / N), E)
            optimizer.param_groups[0]["lr"] = rates[epoch]
            student.train()
            for images, labels in data.train.augmented(arguments.batch_size, generator):
                terms, logits = train_step(student, route[anchor], optimizer, images, labels, arguments)
                record.step(terms, logits, labels, math.ceil(len(data.train) / arguments.batch_size))
            record.trained()
            after = {"test": test_accuracy(student, data, arguments)}
            if arguments.transfer != "mimic":
                after["kl_anchor"], after["kl_final"] = route_kl(student, [route[anchor], route[E]], data.validation.batches(),
                                                                 arguments.temperature)
                if epoch + 1 == length:
                    curves.append(route_kl(student, [route[e] for e in curve_epochs], data.validation.batches(),
                                           arguments.temperature))
            record.epoch({"stage": stage + 1, "epoch": epoch + 1, "anchor": anchor, "lr": rates[epoch]}, after,
                         {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "stage": stage,
                          "epoch": epoch + 1, "plan": plan, "curves": curves, "random": random_states(generator)})
        if arguments.strategy == "greedy" and plan[-1] != E:  # Algorithm 2
            i = candidates.index(plan[-1]) + 1
            kl = route_kl(student, [route[e] for e in candidates], data.validation.batches(), arguments.temperature)
            plan = [*plan, candidates[next_anchor(kl, i, arguments.threshold) - 1]]
            print(f"  greedy: after epoch {candidates[i - 1]} the next anchor is epoch {plan[-1]}")
        # Eq. (6): W_i starts at W_{i-1}, with empty momentum and the schedule from its start
        optimizer, stage, epoch = sgd(student.parameters(), arguments), stage + 1, 0
    return plan, {"epochs": curve_epochs, "kl": curves}


def run_strategy(route, data, arguments, record):
    """One student by one strategy. Returns its row of the comparison; trains nothing if the record is finished."""
    if not record.result:
        N = f", {arguments.anchors} anchors" if arguments.strategy != "kd" else ""
        print(f"\n{name_of(arguments)}: {arguments.student} learns from {arguments.teacher}{N}; records in {record.folder}")
        teacher = route[max(route)]
        student = build_student(data, teacher.features, arguments)
        record.begin()
        plan, curves = distill(student, route, data, arguments, record)
        kept = "adapter." if arguments.transfer != "mimic" else None  # a hint adapter has done its work
        state = {name: value for name, value in student.state_dict().items() if not (kept and name.startswith(kept))}
        steps = math.ceil(len(data.train) / arguments.batch_size) * len(record.rows)
        record.finish(state, anchors=[anchor or "one-stage" for anchor in plan], curves=curves,
                      passes={"student forward and backward": steps, "teacher forward": steps},
                      measures=measures(student, route, data, arguments))
        if arguments.strategy == "greedy":
            print(f"  greedy chose {plan}: {len(plan)} stages; its control is --strategy kd --anchors {len(plan)}")
    result = record.result
    return {"run": name_of(arguments), "test": result["last_test"], "best": result["best_test"], "epochs": len(result["rows"]),
            "cost": len(result["rows"]) / arguments.epochs, "seconds": result["seconds"], **result["measures"]}


def measures(network, route, data, arguments):
    """KL to C_E on the held-out images (the congruence floor), and recognition of unseen classes where there are any."""
    found = {}
    if arguments.transfer != "mimic":
        found["kl_final"] = route_kl(network, [route[max(route)]], data.validation.batches(), arguments.temperature)[0]
    if data.unseen:
        found |= open_set_report(*embeddings(network, data.unseen, arguments, embedder(network)), seed=0)
    return found


def name_of(arguments):
    stages = arguments.anchors if arguments.strategy in ("kd", "eei") else 1
    name = f"{arguments.strategy} {arguments.transfer}" if arguments.transfer != "kd" else arguments.strategy
    if arguments.strategy == "kd" and arguments.weight == 0 and arguments.transfer != "mimic":
        name = "student alone"
    if arguments.stage_epochs != arguments.epochs:
        return f"{name}, one run of {arguments.stage_epochs} epochs"
    return f"{name}, {stages} stages" if stages > 1 else name


# ---------------------------------------------------------------------------------------------------------- 4. pictures
def plot(record):
    """The paper's two pictures from the run's own record: hardness.png (Fig. 3) and gap.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    curves, rows = record.result["curves"], record.result["rows"]
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    ends = [row for row, following in zip(rows, rows[1:] + [None]) if not following or following["stage"] != row["stage"]]
    for row, kl in zip(ends, curves["kl"]):
        axes.plot(curves["epochs"], kl, marker=".", label=f"after stage {row['stage']} (anchor {row['anchor']})")
    axes.set(xlabel="teacher epoch", ylabel="KL to the student, nats", title="hardness of the route")
    axes.legend(fontsize=8)
    figure.savefig(record.folder / "hardness.png", dpi=110)
    last = {row["anchor"]: row["test"] for row in rows}  # the last epoch spent on each anchor
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    teacher = record.result["teacher_test"]
    axes.plot(list(last), [teacher[str(anchor)] for anchor in last], marker="o", label="teacher")
    axes.plot(list(last), list(last.values()), marker="o", label="student")
    axes.set(xlabel="anchor (teacher epoch)", ylabel="test accuracy, %", title="student and teacher by anchor")
    axes.legend(fontsize=8)
    figure.savefig(record.folder / "gap.png", dpi=110)
    print(f"pictures: {record.folder / 'hardness.png'}, {record.folder / 'gap.png'}")


# ------------------------------------------------------------------------------------------------------------- 5. flags
def parse_args(argv=None):
    parser = base_parser("RCO (ICCV 2019): the student follows the teacher's training route.", DEFAULTS)
    add = parser.add_argument_group("RCO").add_argument
    add("--strategy", default="eei", choices=list(ANCHORS), help="equal-epoch anchors, one stage, greedy search, or plain KD "
        "(kd: every stage on the final teacher); default: eei")
    add("--anchors", type=number(int, 1), metavar="N", help="N of eq. (7): 4 for eei, 24 for one-stage and greedy, 1 for kd")
    add("--transfer", default="kd", choices=("kd", "hint", "mimic"), help="eq. (2), (3) or (4); default: kd")
    add("--threshold", type=number(float, 0), default=0.8, metavar="DELTA", help="greedy: limit on r_ij, eq. (11); default: 0.8")
    add("--temperature", type=number(float, 0, low_allowed=False), default=4.0, metavar="T", help="eq. (1); default: 4")
    add("--weight", type=number(float, 0), default=1.0, metavar="LAMBDA", help="weight of the KL term, eq. (2); default: 1")
    add("--hint-weight", type=number(float, 0), default=1.0, metavar="MU", help="weight of the hint, eq. (3); default: 1")
    add("--student-learning-rate", type=number(float, 0, low_allowed=False), metavar="LR",
        help="initial rate of every student; default: --learning-rate, a tenth of it for mimic, whose sum over D is steep")
    add("--stage-epochs", type=number(int, 1), metavar="E", help="epochs of one stage; default: --epochs")
    add("--compare", nargs="*", choices=list(ANCHORS), metavar="STRATEGY",
        help="run the controls too, and any further strategies named here; prints one table")
    add("--plot", action="store_true", help="write hardness.png and gap.png (needs matplotlib)")
    arguments = parse(parser, argv)
    if arguments.strategy == "one-stage" and arguments.stage_epochs not in (None, arguments.epochs):
        parser.error("--strategy one-stage has one stage of --epochs; --stage-epochs does not go with it")
    if arguments.transfer == "mimic" and "greedy" in (arguments.strategy, *(arguments.compare or ())):
        parser.error("greedy needs trained logits for eq. (9), which mimic does not have; choose another strategy")
    if arguments.anchors and arguments.strategy != "kd" and arguments.anchors > arguments.epochs:
        parser.error(f"--anchors {arguments.anchors} do not fit into {arguments.epochs} teacher epochs")
    if arguments.teacher_weights:
        files = len(arguments.teacher_weights)
        if arguments.strategy != "kd" and (arguments.anchors or files) != files or files > arguments.epochs:
            parser.error(f"--teacher-weights names {files} states of the route, --anchors {arguments.anchors}; these must agree")
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install matplotlib")
    return arguments


def variant(arguments, **flags):
    """The arguments of one student run: `flags` replace those given, and the anchors are filled in."""
    run = argparse.Namespace(**{**vars(arguments), **flags})
    run.anchors = run.anchors or min(ANCHORS[run.strategy], run.epochs)
    if run.teacher_weights and run.strategy != "kd":
        run.anchors = len(run.teacher_weights)
    run.stage_epochs = run.stage_epochs or run.epochs
    run.student_learning_rate = run.student_learning_rate or run.learning_rate * (0.1 if run.transfer == "mimic" else 1)
    return run


def anchor_epochs(run):
    E = run.epochs
    if run.strategy == "one-stage":
        return {one_stage_anchor(epoch, math.ceil(E / run.anchors), E) for epoch in range(E)}
    return {E} if run.strategy == "kd" else set(equal_epoch_anchors(E, run.anchors))


# -------------------------------------------------------------------------------------------------------------- 6. main
def run_seed(arguments):
    """Everything of one seed: teacher, the chosen strategy, with --compare the controls. Returns the rows of the table."""
    data = load_data(arguments.dataset, arguments.data, arguments.image_size, arguments.train_fraction, 0.1,
                     arguments.open_set, arguments.seed, arguments.device)
    if arguments.batch_size > len(data.train):
        raise InputError(f"--batch-size {arguments.batch_size} is more than the {len(data.train)} training images")
    print(f"{data.name}: {len(data.train)} training, {len(data.validation)} held-out, {len(data.test)} test images of "
          f"{data.image_size}x{data.image_size}, {data.classes} classes; seed {arguments.seed}, {arguments.device}")
    arguments.class_means = arguments.transfer == "mimic"
    chosen = variant(arguments)
    others = [variant(arguments, strategy=name, anchors=None) for name in arguments.compare or () if name != chosen.strategy]
    arguments.needed = set().union(*(anchor_epochs(run) for run in (chosen, *others)))
    fingerprint = {"data": data.train.fingerprint()}

    def record_of(run, folder):
        return Record(folder, {**describe(run, skip=("needed",)), **fingerprint}, arguments.resume, arguments.device, 0)

    record = record_of(chosen, arguments.out)  # before any work: a folder that holds another run is refused here
    route, teacher_test, teacher_seconds = teacher_route(data, arguments)
    E = max(route)
    rows = [{"run": "teacher", "test": teacher_test[E], "epochs": E, "seconds": teacher_seconds,
             **measures(route[E], route, data, arguments)}]

    def run_one(run, record):
        row = run_strategy(route, data, run, record)
        if "teacher_test" not in record.result:
            record.result |= {"teacher_test": {str(epoch): value for epoch, value in teacher_test.items()}, "row": row}
            save_file(json.dumps(record.result, indent=1), record.folder / "result.json")
        return row

    chosen_rows = [run_one(chosen, record)]
    if arguments.compare is not None:
        def control(folder, **flags):
            run = variant(arguments, **flags)
            return run_one(run, record_of(run, arguments.out / folder))

        chosen_rows += [control(run.strategy, strategy=run.strategy, anchors=None) for run in others]
        rates = learning_rates(variant(arguments, transfer="kd").student_learning_rate, E)
        result, alone = train_network(arguments.student, data, rates, arguments, seed=arguments.seed, title="student alone")
        controls = [{"run": "student alone", "best": None if arguments.class_means else result["best_test"], "epochs": E, "cost": 1.0,
                     "seconds": result["seconds"], "test": test_accuracy(alone[E], data, arguments),
                     **measures(alone[E], route, data, arguments)}]
        transfers = dict.fromkeys(("kd", arguments.transfer))
        controls += [control(f"{name}-1", strategy="kd", anchors=1, transfer=name, stage_epochs=None) for name in transfers]
        lengths = sorted({row["epochs"] for row in chosen_rows} - {arguments.epochs})
        controls += [control(f"kd-long-{total}", strategy="kd", anchors=1, stage_epochs=total) for total in lengths]
        controls += [control(f"kd-restarts-{total}", strategy="kd", anchors=total // chosen.stage_epochs)
                     for total in lengths if total % chosen.stage_epochs == 0]
        rows += controls
    rows += chosen_rows
    if arguments.plot:
        plot(record)
    return rows


def main():
    arguments = parse_args()
    arguments.out = arguments.out or f"runs/rco-{arguments.dataset}-{arguments.strategy}"
    tables = []
    for seed in arguments.seed:
        several = len(arguments.seed) > 1
        out = f"{arguments.out}/seed-{seed}" if several else arguments.out
        tables.append(run_seed(argparse.Namespace(**{**vars(arguments), "seed": seed, "out": Path(out)})))
    columns = {"test": ".2f", "best": ".2f", "kl_final": ".4f", "rank1": ".1f", "verification": ".1f", "epochs": ".0f",
               "cost": ".1f", "seconds": ".0f"}
    columns = {name: style for name, style in columns.items() if any(name in row for table in tables for row in table)}
    print_table(tables, columns, f"RCO on {arguments.dataset}, last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
