"""TriKD: Triplet Knowledge Distillation (a reconstruction).

X. Wang, D. Liu, M. Kan, C. Han, Z. Wu, S. Shan. arXiv:2305.15975, 25 May 2023; venue beyond
arXiv: UNKNOWN. No code of the authors is known.
PAPER, its abstract: a teacher, a student and an anchor take part; the anchor is trained before and
delimits a subspace whose members are easy for the student to mimic; distillation runs online, the
teacher may only express solutions in that subspace; the trained student can become the next anchor;
experiments on image classification and face recognition, also against overfitting, and a theory are
said to support it. PAPER, its Figure 1: networks live in function space, inputs to outputs.
READING: all else, the form of every equation below and every constant. The paper's equations, pairs
and numbers are UNKNOWN to this project. This is a defensible reconstruction of the idea, not a
reproduction.

    symbol             in code                                        shape
    x, y; e_y          images, labels                                 (N,3,H,W), (N,); (N,C)
    T, S, A            teacher, student, anchor                       networks: large, small, frozen
    z^T, z^S, z^A      teacher_logits, student_logits, anchor_logits  (N,C), on one augmented batch
    p^M_tau, p^M                                                      (N,C), softmax(z^M / tau)
    tau                temperature                                    scalar, of the KL terms only
    lambda, pi, zeta   Weights(label, peer, anchor)                   scalars, one triple each
    A_g, T_g, S_g      generation g                                   A_0 pre-trained, A_g = S_g

Equations, all READING; sg detaches; sums over classes, means over the batch; CE at temperature 1.

    (1)  kl_to(t, z, tau) = tau^2 mean_n KL(sg[softmax(t / tau)] || softmax(z / tau))
    (2)  L_T = lambda_T CE(z^T, y) + pi_T kl_to(z^S, z^T, tau) + zeta_T kl_to(z^A, z^T, tau)
    (3)  L_S = lambda_S CE(z^S, y) + pi_S kl_to(z^T, z^S, tau) + zeta_S kl_to(z^A, z^S, tau)
    (4)  a step minimises L_T over T's parameters and L_S over S's; A never moves
    (5)  dL_T/dz^T = lambda_T (p^T - e_y) + tau [pi_T (p^T_tau - p^S_tau) + zeta_T (p^T_tau -
         p^A_tau)], for each sample; S alike
    (6)  tau = 1: the three terms are W times the cross-entropy to one mixture, W: sum of weights
    (7)  fixed point, tau = 1, one sample, unlimited capacity: p^M = l_M e_y + (1 - l_M) p^A, with
         l_T = [lambda_T (lambda_S + pi_S + zeta_S) + pi_T lambda_S] / D, l_S with T and S swapped,
         D = (lambda_T + pi_T + zeta_T) (lambda_S + pi_S + zeta_S) - pi_T pi_S
    (8)  equal triples: l = lambda / (lambda + zeta), whatever pi; after g generations the share of
         the labels against A_0 is 1 - (zeta / (lambda + zeta))^g
    (9) to (11) open-set recognition: see `open_set_report` in common.py
    (lr) lr(e) = lr0 * 0.1 ** (how many of 5/8, 3/4, 7/8 of the run lie behind epoch e)

Ours, not the paper's theory: (7) says what the fence does. At tau = 1 and with unlimited capacity
both networks end on the straight line from the anchor's output to the label, at a place set by the
weights; with equal triples, (8), by zeta against lambda alone. In this limit the teacher adds
nothing: a real gain has to come from outside it, our guess from what a teacher generalises better.

READING, the most doubtful first: the restriction as a soft KL penalty on outputs; the anchor term
on the student too; the term from student to teacher; all weights 1 and tau = 1; a teacher from
scratch in every generation; an anchor of the student's architecture, trained by cross-entropy and
frozen; G = 2; --stop-on-validation; the KD control: (3) with a finished teacher, weights of label
and peer, the run's tau. UNKNOWN: every equation of the paper, direction and place of its
divergence, penalty or constraint, whether the anchor guides the student and the teacher learns from
it, weights, temperature, optimiser, schedule, data, pairs, generations, stopping rule, simultaneous
or alternating steps, the face protocol, the overfitting study, the theorem, all numbers: published
numbers are not available to this project. The open-set and fraction studies only echo claims of the
abstract at toy size.

    python trikd.py                       embedded shapes; 2 CPU cores: about a minute
    python trikd.py --compare             with its controls
    python trikd.py --dataset cifar100    paper-scale setting (READING), 240 epochs: not yet run
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from common import (
    F, Record, autocast, base_parser, build_model, check_batch_size, check_plot,
    compile_network, describe, each_seed, embeddings, evaluate, evaluating, frozen, introduce,
    load_data, load_file, load_weights, number, open_set_report, parse, print_table,
    random_states, restore_random_states, run_script, save_weights, sgd, torch, train_network,
    training_seconds)

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
SMALL = {"teacher": "resnet20", "student": "resnet8x0.5", "epochs": 24, **RECIPE}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {**SMALL, "teacher": "resnet14", "epochs": 8, "learning_rate": 0.1},
    "fashionmnist": SMALL, "cifar10": SMALL, "folder": SMALL, "tinyimagenet": SMALL,
    "cifar100": {**SMALL, "teacher": "resnet32x4", "student": "resnet8x4", "epochs": 240},
    "imagenet": {**SMALL, "teacher": "resnet50", "student": "resnet18", "epochs": 90,
                 "learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 256},
}
SEEDS = 10_000  # apart: generation g starts from seed + g * SEEDS, its teacher 1000 further


class Weights(NamedTuple):
    """lambda, pi, zeta of one network, eqs. (2) and (3)."""
    label: float
    peer: float
    anchor: float


# -------------------------------------------------------------------------- 1. losses and equations
def kl_to(target_logits, logits, temperature=1.0):
    """Eq. (1), a scalar in nats; logits (N,C), ValueError if the shapes differ.

    Only `logits`, the learner's, get a gradient.
    """
    if target_logits.shape != logits.shape:  # broadcasting would hide it
        raise ValueError(f"logits of {tuple(target_logits.shape)} and {tuple(logits.shape)} must "
                         "have one shape")
    # kl_div takes the learner first and as LOG-probabilities. "batchmean" divides by N.
    log_target = F.log_softmax(target_logits.detach() / temperature, dim=1)  # (N,C)
    log_p = F.log_softmax(logits / temperature, dim=1)  # (N,C)
    # Eq. (1): tau^2 mean_n KL( sg[softmax(t / tau)] || softmax(z / tau) )
    return temperature**2 * F.kl_div(log_p, log_target, reduction="batchmean", log_target=True)


def teacher_loss(teacher_logits, student_logits, anchor_logits, labels, weights, temperature=1.0):
    """Eq. (2), a scalar. Logits (N,C), labels (N,); only `teacher_logits` get a gradient."""
    # Eq. (2): L_T = lambda_T CE(z^T, y) + pi_T kl_to(z^S, z^T, tau) + zeta_T kl_to(z^A, z^T, tau)
    return (weights.label * F.cross_entropy(teacher_logits, labels)
            + weights.peer * kl_to(student_logits, teacher_logits, temperature)
            + weights.anchor * kl_to(anchor_logits, teacher_logits, temperature))


def student_loss(student_logits, teacher_logits, anchor_logits, labels, weights, temperature=1.0):
    """Eq. (3), a scalar. Logits (N,C), labels (N,); only `student_logits` get a gradient."""
    # Eq. (3): L_S = lambda_S CE(z^S, y) + pi_S kl_to(z^T, z^S, tau) + zeta_S kl_to(z^A, z^S, tau)
    return (weights.label * F.cross_entropy(student_logits, labels)
            + weights.peer * kl_to(teacher_logits, student_logits, temperature)
            + weights.anchor * kl_to(anchor_logits, student_logits, temperature))


def label_shares(teacher_weights, student_weights):
    """Eq. (7): (l_T, l_S), the place of the fixed point between anchor (0) and label (1).

    (None, None) where the weights leave it open (D = 0).
    """
    T, S = teacher_weights, student_weights
    # Eq. (7): D = (lambda_T + pi_T + zeta_T) (lambda_S + pi_S + zeta_S) - pi_T pi_S
    D = sum(T) * sum(S) - T.peer * S.peer
    if D == 0:
        return None, None
    # Eq. (7): l_T = [ lambda_T (lambda_S + pi_S + zeta_S) + pi_T lambda_S ] / D
    return ((T.label * sum(S) + T.peer * S.label) / D, (S.label * sum(T) + S.peer * T.label) / D)


def learning_rates(initial, epochs):
    """(lr): the rate of each epoch, ten times smaller after 5/8, 3/4 and 7/8 of the run."""
    return [initial * 0.1 ** sum(8 * e >= part * epochs for part in (5, 6, 7))
            for e in range(epochs)]


def classical_scaling(squared_distances):
    """(n,2) coordinates by classical scaling (Torgerson 1952) of `squared_distances` (n,n)."""
    D = torch.as_tensor(squared_distances, dtype=torch.float64)
    J = torch.eye(len(D), dtype=D.dtype) - 1 / len(D)
    values, vectors = torch.linalg.eigh(-0.5 * J @ D @ J)  # ascending
    return (vectors * values.clamp_min(0).sqrt())[:, -2:].flip(1)  # (n,2)


# --------------------------------------------------------------------------------------- 2. modules
def build_network(name, data, arguments, generation, offset=0):
    """A network from scratch, with a seed of its own for each generation and role."""
    seed = arguments.seed + offset + SEEDS * generation
    return build_model(name, data.classes, data.image_size, seed).to(arguments.device)


# -------------------------------------------------------------------------------------- 3. training
def train_step(student, teacher, anchor, student_optimizer, teacher_optimizer, images, labels,
               arguments):
    """One step of the triplet, eq. (4). Returns the loss terms, and the student's logits."""
    tau = arguments.temperature
    with autocast(arguments):
        with torch.no_grad():
            z_A = anchor(images).float()  # (N,C), of this step's augmented images
        z_S, z_T = student(images).float(), teacher(images).float()  # (N,C), (N,C)
    L_T = teacher_loss(z_T, z_S, z_A, labels, arguments.teacher_triple, tau)  # Eq. (2)
    L_S = student_loss(z_S, z_T, z_A, labels, arguments.student_triple, tau)  # Eq. (3)
    teacher_optimizer.zero_grad()
    student_optimizer.zero_grad()
    (L_T + L_S).backward()  # Eq. (4): detached targets keep the two gradients apart
    teacher_optimizer.step()
    student_optimizer.step()
    with torch.no_grad():  # the terms apart, without their weights, for the log
        terms = {"T_ce": F.cross_entropy(z_T, labels), "T_peer": kl_to(z_S, z_T, tau),
                 "T_anchor": kl_to(z_A, z_T, tau), "S_ce": F.cross_entropy(z_S, labels),
                 "S_peer": kl_to(z_T, z_S, tau), "S_anchor": kl_to(z_A, z_S, tau)}
    return terms, z_S


def control_step(student, fixed, student_optimizer, images, labels, arguments):
    """A control without an online teacher: eq. (3) with ONE fixed network as peer or as anchor."""
    with autocast(arguments):
        with torch.no_grad():
            z = fixed(images).float()  # (N,C)
        z_S = student(images).float()  # (N,C)
    L_S = student_loss(z_S, z, z, labels, arguments.student_triple, arguments.temperature)
    student_optimizer.zero_grad()
    L_S.backward()
    student_optimizer.step()
    with torch.no_grad():
        terms = {"S_ce": F.cross_entropy(z_S, labels),
                 "S_kl": kl_to(z, z_S, arguments.temperature)}
    return terms, z_S


def distill(anchor, data, run, record, finished=None):
    """Section 5: the generations of one run; returns the measures of each, A_0 not among them.

    `run.kind`: "triplet"; the controls "kd" (`finished`, a frozen teacher, in the peer's place) and
    "born-again" (the anchor alone teaches) have no online teacher.
    """
    E, rates = run.length, learning_rates(run.learning_rate, run.length)
    generator = torch.Generator().manual_seed(run.seed)  # one stream for all generations
    generation, start, found, state = 1, 0, [], record.state
    if state:
        generation, start, found = state["generation"], state["epoch"], state["found"]
        restore_random_states(state["random"], generator)
        if generation > 1:
            twin = build_network(run.student, data, run, generation - 1)
            load_weights(twin, record.folder / f"student-{generation - 1}.pt")
            anchor = frozen(twin)
    record.begin(E * run.generations)
    while generation <= run.generations:
        names, offsets = [run.student], [0]
        if run.kind == "triplet":
            names, offsets = [run.student, run.teacher], [0, 1000]
        networks = [build_network(name, data, run, generation, offset)
                    for name, offset in zip(names, offsets)]
        optimizers = [sgd(network.parameters(), run) for network in networks]
        parts = [*networks, *optimizers]
        for part, kept in zip(parts, state["parts"] if state else ()):
            part.load_state_dict(kept)
        state = None
        for network in networks:
            compile_network(network, run)
        student, teacher = networks[0], networks[-1] if run.kind == "triplet" else finished
        for epoch in range(start, E):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rates[epoch]
            for network in networks:
                network.train()
            for images, labels in data.train.augmented(run.batch_size, generator):
                if run.kind == "triplet":
                    terms, logits = train_step(student, teacher, anchor, *optimizers, images,
                                               labels, run)
                else:
                    terms, logits = control_step(student, finished or anchor, *optimizers, images,
                                                 labels, run)
                record.step(terms, logits, labels, len(data.train) // run.batch_size)
            record.trained()
            tests = {"teacher": None} if run.kind == "triplet" else {}
            tests["test"] = None  # a small fraction has many short epochs: tested every 1 / F
            if epoch + 1 == E or (epoch + 1) % round(1 / run.train_fraction) == 0:
                tests |= {name: evaluate(network, data.test, run)
                          for name, network in zip(("test", "teacher"), networks)}
            record.epoch(
                {"gen": generation, "epoch": epoch + 1, "lr": rates[epoch]}, tests,
                {"parts": [part.state_dict() for part in parts], "generation": generation,
                 "epoch": epoch + 1, "found": found, "random": random_states(generator)})
        for role, network in zip(("student", "teacher"), networks):
            save_weights(network.state_dict(), record.folder / f"{role}-{generation}.pt")
        found = [*found, {"generation": generation, **measures(
            student, teacher, anchor, data, run)}]
        anchor, generation, start = frozen(student), generation + 1, 0  # A_g = S_g
        if run.stop_on_validation and len(found) > 1:
            before, now = (one["validation"] for one in found[-2:])
            if now <= before:
                print(f"  generation {generation - 1} is no better on the held-out images "
                      f"({now:.2f} after {before:.2f} %): stop")
                break
    return found


# --------------------------------------------------------------------------------------- 4. results
def all_logits(network, split, arguments):
    """(N,C) float32 logits of the images in their order, eval mode."""
    with evaluating(network), autocast(arguments):
        return torch.cat([network(images).float() for images, _ in split.batches()])


def measures(student, teacher, anchor, data, arguments):
    """Accuracies of a generation in %, and how its networks agree on the test images."""
    found = {"test": evaluate(student, data.test, arguments),
             "student_train": evaluate(student, data.train, arguments)}
    if len(data.validation):
        found["validation"] = evaluate(student, data.validation, arguments)
    if data.unseen:
        found |= open_set_report(*embeddings(student, data.unseen, arguments))
    if teacher:
        found |= {"teacher": evaluate(teacher, data.test, arguments),
                  "teacher_train": evaluate(teacher, data.train, arguments)}
        z_S, z_T, z_A = (all_logits(network, data.test, arguments)
                         for network in (student, teacher, anchor))
        found |= {"kl_ts": kl_to(z_T, z_S).item(), "kl_at": kl_to(z_A, z_T).item(),
                  "agree": 100 * (z_T.argmax(1) == z_S.argmax(1)).double().mean().item()}
        if data.unseen:
            report = open_set_report(*embeddings(teacher, data.unseen, arguments))
            found |= {f"t_{name}": value for name, value in report.items()}
    return found


def run_chain(name, anchor, data, run, record, before, finished=None):
    """One chain of generations, unless its record is finished: its table rows, one a generation.

    `before`: {"epochs": student-sized networks', "t_epochs": teachers', "seconds"} spent before it.
    """
    G, images, triplet = run.generations, len(data.train), run.kind == "triplet"
    if not record.result:
        names = f"{run.student} and {run.teacher}" if triplet else run.student
        print(f"\n{name}: {names}, {G} generation(s) of {run.length} epochs; records in "
              f"{record.folder}")
        found = distill(anchor, data, run, record, finished)
        best = len(found)
        if run.stop_on_validation:
            best = max(found, key=lambda one: one["validation"])["generation"]
            print(f"  delivered: generation {best}, {found[best - 1]['test']:.2f} % on test")
        seen = images * len(record.rows)
        passes = {"student forward and backward": seen, "fixed network forward": seen}
        if triplet:
            passes["teacher forward and backward"] = seen
        record.finish(
            load_file(record.folder / f"student-{best}.pt"), generations=found, delivered=best,
            last_test=found[best - 1]["test"], images=passes,
            label_shares=label_shares(run.teacher_triple, run.student_triple) if triplet else None)
    rows, result = [], record.result
    for one in result["generations"]:
        g = one["generation"]
        done = [row for row in result["rows"] if row["gen"] <= g]
        label = f"{name}, generation {g}" if G > 1 else name
        rows.append({**one, "epochs": before["epochs"] + len(done),
                     "run": label + (" (delivered)" if run.stop_on_validation
                                     and g == result["delivered"] else ""),
                     "t_epochs": before["t_epochs"] + (len(done) if triplet else 0),
                     "seconds": before["seconds"] + training_seconds(done, images)})
        rows[-1]["s_gap"] = one["student_train"] - one["test"]
        if "teacher" in one:
            rows[-1]["t_gap"] = one["teacher_train"] - one["teacher"]
    return rows


def alone_row(name, result, network, data, arguments):
    """The row of a network trained by cross-entropy alone, as the student's."""
    row = {"run": name, "epochs": len(result["rows"]), "t_epochs": 0,
           "seconds": training_seconds(result["rows"], len(data.train)),
           **measures(network, None, None, data, arguments)}
    return {**row, "s_gap": row["student_train"] - row["test"]}


def function_map(records, anchor, data, arguments):
    """{name: (x, y)}: the networks of some chains, A_0 among them, by classical scaling of the
    mean symmetric KL of their outputs on the test images."""
    outputs = {"A0": all_logits(anchor, data.test, arguments)}
    for name, record in records.items():
        for path in sorted(record.folder.glob("*-[0-9]*.pt")):
            role, generation = path.stem.split("-")
            network = build_network(getattr(arguments, role), data, arguments, 0)
            load_weights(network, path)
            outputs[f"{name} {role[0].upper()}{generation}"] = all_logits(
                network, data.test, arguments)
    D = torch.tensor([[kl_to(a, b).item() for b in outputs.values()] for a in outputs.values()])
    return dict(zip(outputs, classical_scaling((D + D.T) / 2).tolist()))


def plot(folder, tables, points):
    """generations.png, tradeoff.png (with --sweep) and functions.png.

    `tables`: {chain: its rows}; `points`: of `function_map`.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = [folder / "generations.png"]
    figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for name in ("TriKD", "born-again"):
        if name in tables:
            rows = [tables["student alone"][0], *tables[name]]
            axis.plot(range(len(rows)), [row["test"] for row in rows], marker="o",
                      label=f"{name}: student, the next anchor")
    axis.plot(range(1, len(tables["TriKD"]) + 1), [row["teacher"] for row in tables["TriKD"]],
              marker="s", linestyle=":", label="TriKD: teacher")
    axis.set(xlabel="generation", ylabel="test accuracy (%)", title="Curriculum",
             xticks=range(len(tables["TriKD"]) + 1))
    axis.legend(fontsize=8)
    figure.savefig(files[-1], dpi=110)
    pyplot.close(figure)
    if "sweep" in tables:
        files.append(folder / "tradeoff.png")
        rows = sorted(tables["sweep"], key=lambda row: row["anchor_weight"])
        figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        axis.plot([row["kl_at"] for row in rows], [row["test"] for row in rows], marker="o")
        for row in rows:
            axis.annotate(f"{row['anchor_weight']:g} (label share {row['label_share']:.2f})",
                          (row["kl_at"], row["test"]), fontsize=8)
        axis.set(xlabel="KL(anchor || teacher), nats", ylabel="student test accuracy (%)",
                 title="Trade-off over the anchor weight")
        figure.savefig(files[-1], dpi=110)
        pyplot.close(figure)
    files.append(folder / "functions.png")
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for name, (x, y) in points.items():
        axis.scatter([x], [y], s=14)
        axis.annotate(name, (x, y), fontsize=8)
    axis.set(title="Networks in function space", xlabel="root of the mean symmetric KL (nats)")
    axis.set_aspect("equal", "datalim")
    figure.savefig(files[-1], dpi=110)
    pyplot.close(figure)
    print("pictures:", *files)


# ----------------------------------------------------------------------------------------- 5. flags
def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], DEFAULTS, online=True, fractions="+")
    positive, weight = number(float, 0, low_allowed=False), number(float, 0)
    add = parser.add_argument_group("TriKD").add_argument
    add("--generations", type=number(int, 1), default=2, metavar="G",
        help="rounds, each with the last student as anchor (default: 2)")
    add("--stop-on-validation", action="store_true",
        help="stop when a generation is no better on held-out training images, deliver the best")
    for name, symbol in (("label", "lambda"), ("peer", "pi"), ("anchor", "zeta")):
        add(f"--{name}-weight", type=weight, nargs="+", default=[1.0], metavar="W",
            help=f"{symbol} of eqs. (2), (3): one value, or the teacher's and the student's "
                 "(default: 1)")
    add("--anchor-on", default="both", choices=("both", "teacher", "student"),
        help="whom the anchor guides; the other zeta is 0 (default: both)")
    add("--temperature", type=positive, default=1.0, metavar="TAU",
        help="of the KL terms, eq. (1) (default: 1)")
    add("--compare", action="store_true",
        help="run the controls as well: student alone, KD, mutual learning, born-again; one table")
    add("--sweep", type=weight, nargs="+", metavar="Z",
        help="one generation for each of these anchor weights, for the trade-off curve")
    add("--plot", action="store_true",
        help="write generations.png, tradeoff.png, functions.png (needs matplotlib)")
    arguments = parse(parser, argv)
    for name in ("label", "peer", "anchor"):
        if len(getattr(arguments, f"{name}_weight")) > 2:
            parser.error(f"--{name}-weight: one value, or two: the teacher's, the student's")
    if arguments.plot and len(arguments.train_fraction) > 1:
        parser.error("--plot draws one chain: give one --train-fraction")
    if arguments.compare and arguments.stop_on_validation:
        parser.error("--stop-on-validation does not go with --compare: its controls have as many "
                     "epochs as --generations")
    triples = variant(arguments)
    if not sum(triples.teacher_triple) or not sum(triples.student_triple):
        parser.error("all weights of a network are 0: it has nothing to learn")
    if not min(arguments.label_weight) and (arguments.compare or arguments.sweep):
        parser.error("--label-weight 0: the controls of --compare and --sweep would learn nothing")
    check_plot(parser, arguments)
    return arguments


def variant(arguments, anchor=None, peer=None, **flags):
    """The arguments of one chain; `anchor` and `peer` replace the weights of both networks."""
    run = argparse.Namespace(**{**vars(arguments), "kind": "triplet", **flags})
    triples = []
    for index, role in enumerate(("teacher", "student")):
        label_weight, peer_weight, anchor_weight = (
            getattr(run, f"{name}_weight")[-1 if index else 0]
            for name in ("label", "peer", "anchor"))
        peer_weight = peer_weight if peer is None else peer
        anchor_weight = anchor_weight if anchor is None else anchor
        if run.anchor_on not in ("both", role):
            anchor_weight = 0.0
        triples.append(Weights(label_weight, peer_weight, anchor_weight))
    run.teacher_triple, run.student_triple = triples
    return run


# ------------------------------------------------------------------------------------------ 6. main
def load(arguments):
    """The data of one seed and fraction; a tenth is held out where it decides when to stop."""
    data = load_data(
        arguments.dataset, arguments.data, arguments.image_size, arguments.train_fraction,
        0.1 if arguments.stop_on_validation else 0, arguments.open_set, arguments.seed,
        arguments.device)
    check_batch_size(data, arguments)
    return data


def run_seed(arguments):
    """All of one seed and fraction: A_0, the chain, with --compare its controls; the rows."""
    data, G = load(arguments), arguments.generations
    # as many updates for every fraction
    arguments.length = E = max(1, round(arguments.epochs / arguments.train_fraction))
    introduce(data, arguments)
    fingerprint = {"data_fingerprint": data.train.fingerprint()}

    def record_of(run, folder):
        settings = {**describe(run, skip=("sweep",)), **fingerprint}
        return Record(arguments.out / folder, settings, arguments.resume, arguments.device)

    def alone(network, epochs, seed, title):
        result, kept = train_network(network, data, learning_rates(
            arguments.learning_rate, epochs), arguments, seed=seed, title=f"\n{title}")
        return result, kept[epochs]

    chosen = variant(arguments)
    records, tables = {"TriKD": record_of(chosen, "")}, {}
    result, anchor = alone(arguments.student, E, arguments.seed, "generation 0, the first anchor")
    row = alone_row("student alone", result, anchor, data, arguments)
    tables["student alone"] = [row]

    def chain(name, run, folder, finished=None, seconds=0.0):
        """A chain and what came before it: A_0 where an anchor is used, a finished teacher."""
        used = run.kind != "kd" and (run.teacher_triple.anchor or run.student_triple.anchor)
        before = {"epochs": E if used else 0, "t_epochs": E if finished else 0,
                  "seconds": row["seconds"] if used else seconds}
        records[name] = records.get(name) or record_of(run, folder)
        tables[name] = run_chain(name, anchor, data, run, records[name], before, finished)

    short = {"generations": 1, "stop_on_validation": False}
    mutual = variant(arguments, anchor=0.0, **short)
    if arguments.compare:
        long = (G + 1) * E
        result, network = alone(arguments.student, long, arguments.seed, "student alone")
        name = f"student alone, {long} epochs"
        tables[name] = [alone_row(name, result, network, data, arguments)]
        kd = variant(arguments, anchor=0.0, kind="kd", **short)
        if kd.student_triple.peer:
            result, teacher = alone(arguments.teacher, E, arguments.seed + 1000, "teacher alone")
            chain("KD, finished teacher", kd, "kd", teacher,
                  training_seconds(result["rows"], len(data.train)))
        chain(f"mutual learning, {long} epochs", variant(arguments, anchor=0.0, **short,
                                                         length=long), "mutual-long")
        born = variant(arguments, peer=0.0, kind="born-again", anchor_on="both")
        if born.student_triple.anchor:
            chain("born-again", born, "born-again")
    if arguments.compare or arguments.study:
        chain("mutual learning", mutual, "mutual")
    for value in dict.fromkeys(arguments.sweep or ()):
        name, run = f"anchor weight {value:g}", variant(arguments, anchor=value, **short)
        chain(name, run, f"anchor-{value:g}")
        tables["sweep"] = [*tables.get("sweep", ()), {
            **tables.pop(name)[0], "anchor_weight": value,
            "label_share": label_shares(run.teacher_triple, run.student_triple)[1]}]
    chain("TriKD", chosen, "")
    if arguments.plot:
        shown = {name: record for name, record in records.items()
                 if name in ("TriKD", "born-again", "mutual learning")}
        plot(arguments.out, tables, function_map(shown, anchor, data, arguments))
    rows = [one for table in tables.values() for one in table]
    if arguments.study:
        rows = [{**one, "run": f"{arguments.train_fraction:g}: {one['run']}"} for one in rows]
    return rows


def main():
    arguments = parse_args()
    fractions, tables, runs = list(dict.fromkeys(arguments.train_fraction)), [], []
    study = len(fractions) > 1
    for run in each_seed(arguments):
        runs.append([argparse.Namespace(**{
            **vars(run), "train_fraction": fraction, "study": study,
            "out": run.out / f"fraction-{fraction:g}" if study else run.out})
            for fraction in fractions])
    for run in runs[0] if study else ():
        load(run)  # what is wrong with any fraction shows before the first training
    for of_one_seed in runs:
        tables.append([row for run in of_one_seed for row in run_seed(run)])
    formats = {"test": ".2f", "teacher": ".2f", "kl_ts": ".4f", "agree": ".1f", "kl_at": ".4f",
               "s_gap": ".2f", "t_gap": ".2f", "rank1": ".1f", "verification": ".1f",
               "t_rank1": ".1f", "t_verification": ".1f", "epochs": ".0f", "t_epochs": ".0f",
               "seconds": ".0f"}
    print_table(tables, formats, f"TriKD on {arguments.dataset}: last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
