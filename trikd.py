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
    x, y; e_y          images, labels                                 (B,3,H,W), (B,); one-hot (B,C)
    T, S, A            teacher, student, anchor                       networks: large, small, small
    z^T, z^S, z^A      teacher_logits, student_logits, anchor_logits  (B,C), on one augmented batch
    p^M_tau, p^M                                                      (B,C), softmax(z^M / tau)
    tau                temperature                                    scalar, of the KL terms only
    lambda, pi, zeta   Weights(label, peer, anchor)                   scalars, one triple each
    G; A_g, T_g, S_g   generations; networks of generation g          A_0 trained alone, A_g = S_g
    E                  epochs                                         int, of a generation

    network      where it comes from                                  in a training step
    student S    each generation: weights drawn from --seed and g     train mode, learns by (3)
    teacher T    the same, with a seed of its own                     train mode, learns by (2)
    anchor A     A_0: a student trained alone before; then S_g-1      eval mode, frozen
    --peer finished, a control: T was trained alone before and is in eval mode, frozen; none: no T.
Order, crops and flips of the batches: one generator, `shuffle`, seeded by --seed, through all
generations; A_0 had one of the same seed. A killed run goes on by --resume.

Equations, all READING; sg detaches; sums over classes, means over the batch; CE at temperature 1.

    (1)  kl_to(t, z, tau) = tau^2 mean_b KL(sg[softmax(t / tau)] || softmax(z / tau))
    (2)  L_T = lambda_T CE(z^T, y) + pi_T kl_to(z^S, z^T, tau) + zeta_T kl_to(z^A, z^T, tau)
    (3)  L_S = lambda_S CE(z^S, y) + pi_S kl_to(z^T, z^S, tau) + zeta_S kl_to(z^A, z^S, tau)
    (4)  a step minimises L_T over T's parameters and L_S over S's; A never moves
    (5)  dL_T/dz^T = lambda_T (p^T - e_y) + tau [pi_T (p^T_tau - p^S_tau) + zeta_T (p^T_tau -
         p^A_tau)], for each sample; S alike
    (6)  tau = 1: L_S is, up to a constant, W times the cross-entropy to the mixture (lambda e_y +
         pi p^T + zeta p^A) / W, W = lambda + pi + zeta; L_T alike
    (7)  fixed point, tau = 1, one sample, unlimited capacity: p^M = l_M e_y + (1 - l_M) p^A, with
         l_T = [lambda_T (lambda_S + pi_S + zeta_S) + pi_T lambda_S] / D, l_S with T and S swapped,
         D = (lambda_T + pi_T + zeta_T) (lambda_S + pi_S + zeta_S) - pi_T pi_S
    (8)  equal triples: l = lambda / (lambda + zeta), whatever pi; after g generations the share of
         the labels against A_0 is 1 - (zeta / (lambda + zeta))^g
    (9) to (11) open-set recognition: see `open_set_report` in common.py
    (lr) ten times smaller after 5/8, 3/4 and 7/8 of the E epochs: see `step_rates` in common.py

Ours, not the paper's theory: by (7) both networks end on the straight line from the anchor's output
to the label, at a place set by the weights; by (8) of zeta against lambda alone. In this limit the
teacher adds nothing: a gain has to come from outside, our guess from its better generalisation.

READING, the most doubtful first: the restriction as a soft KL penalty on outputs; the anchor term
on the student too; the term from student to teacher; weights 1, of the anchor 0.1 (the best of 0.1,
0.2, 0.5 and 1 on drawn images held out, within the spread of 2 seeds); tau = 1; a teacher from
scratch in every generation; an anchor of the student's architecture, trained by cross-entropy and
frozen; G = 2; the KD control: (3) with a finished teacher, weights of label and peer, the run's
tau; born-again: anchor weight 1. UNKNOWN: every equation of the paper, direction and place of its
divergence, penalty or constraint, whether the anchor guides the student, whether the teacher
learns from the student, weights, temperature, optimiser, schedule, data, pairs, generations,
stopping rule, simultaneous or alternating steps, the face protocol, the overfitting study, the
theorem, all numbers: published numbers are not available to this project. Open-set recognition and
--train-fraction only echo claims of the abstract at toy size.

    python trikd.py                       embedded shapes; 2 CPU cores: about a minute
    python trikd.py --compare             with its controls; 2 CPU cores: 3 to 4 minutes
    python trikd.py --peer none --anchor-weight 1    equal student epochs: a born-again chain
    python trikd.py --anchor-weight 0 --generations 1 --epochs 36    equal student epochs (shapes):
                                          mutual learning, and the student alone, as long
    python trikd.py --open-set 5          recognition of classes never trained on
    python trikd.py --dataset cifar100    paper-scale setting (READING), 240 epochs: not yet run
"""

from __future__ import annotations

from typing import NamedTuple

from common import (
    SHAPES, SMALL, Mean, autocast, base_parser, build_model, compile_network, each_seed, embeddings,
    evaluate, folded, frozen, load_data, number, open_set_rows, parse, planned_runs, print_table,
    recognition, refuse_useless, run_script, save_file, sgd, step_rates, train_network)

import torch
import torch.nn.functional as F

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
NO_ANCHOR = {"anchor_weight": [0.0], "generations": 1, "peer": "online"}
CONTROLS = {  # --compare: name -> (the flags it changes, perhaps by the runs before it; why)
    "kd": ({**NO_ANCHOR, "peer": "finished"}, "eq. (3) with a finished teacher, no anchor"),
    "mutual learning": (NO_ANCHOR, "one generation without the anchor"),
    "born-again": ({"peer": "none", "anchor_on": "both", "anchor_weight": [1.0]},
                   "equal student epochs: as many generations, the anchor alone teaches"),
    "mutual learning, long": (lambda runs: {**NO_ANCHOR, "epochs": chain_epochs(runs)},
                              "equal student epochs: all of them in one generation"),
}


def chain_epochs(runs):
    """(G + 1) E of the chosen run: of A_0 (not needed at an anchor weight of 0) and of all S."""
    chosen = next(iter(runs.values())).settings
    return (chosen["generations"] + 1) * chosen["epochs"]


class Weights(NamedTuple):
    """lambda, pi, zeta of one network, eqs. (2) and (3)."""
    label: float
    peer: float
    anchor: float


# -------------------------------------------------------------------------- 1. losses and equations
def kl_to(target_logits, logits, temperature=1.0):
    """Eq. (1), a scalar in nats; logits (B,C), ValueError if they are not of one shape.

    Only `logits`, the learner's, get a gradient.
    """
    if target_logits.shape != logits.shape:  # broadcasting would hide it
        raise ValueError(f"logits of {tuple(target_logits.shape)} and {tuple(logits.shape)} must "
                         "have one shape")
    # kl_div takes the learner first and as LOG-probabilities. "batchmean" divides by B.
    log_target = F.log_softmax(target_logits.detach() / temperature, dim=1)  # (B,C)
    log_p = F.log_softmax(logits / temperature, dim=1)  # (B,C)
    # Eq. (1): tau^2 mean_b KL( sg[softmax(t / tau)] || softmax(z / tau) )
    return temperature**2 * F.kl_div(log_p, log_target, reduction="batchmean", log_target=True)


def teacher_loss(teacher_logits, student_logits, anchor_logits, labels, weights, temperature=1.0):
    """Eq. (2), a scalar. Logits (B,C), labels (B,); only `teacher_logits` get a gradient."""
    # Eq. (2): L_T = lambda_T CE(z^T, y) + pi_T kl_to(z^S, z^T, tau) + zeta_T kl_to(z^A, z^T, tau)
    return (weights.label * F.cross_entropy(teacher_logits, labels)
            + weights.peer * kl_to(student_logits, teacher_logits, temperature)
            + weights.anchor * kl_to(anchor_logits, teacher_logits, temperature))


def student_loss(student_logits, teacher_logits, anchor_logits, labels, weights, temperature=1.0):
    """Eq. (3), a scalar. Logits (B,C), labels (B,); only `student_logits` get a gradient."""
    # Eq. (3): L_S = lambda_S CE(z^S, y) + pi_S kl_to(z^T, z^S, tau) + zeta_S kl_to(z^A, z^S, tau)
    return (weights.label * F.cross_entropy(student_logits, labels)
            + weights.peer * kl_to(teacher_logits, student_logits, temperature)
            + weights.anchor * kl_to(anchor_logits, student_logits, temperature))


def label_shares(teacher_weights, student_weights):
    """Eq. (7): (l_T, l_S), from 0, the anchor, to 1, the label; (None, None) where D = 0."""
    T, S = teacher_weights, student_weights
    # Eq. (7): D = (lambda_T + pi_T + zeta_T) (lambda_S + pi_S + zeta_S) - pi_T pi_S
    D = sum(T) * sum(S) - T.peer * S.peer
    if D == 0:
        return None, None
    # Eq. (7): l_T = [ lambda_T (lambda_S + pi_S + zeta_S) + pi_T lambda_S ] / D
    return (T.label * sum(S) + T.peer * S.label) / D, (S.label * sum(T) + S.peer * T.label) / D


# --------------------------------------------------------------------------------------- 2. modules
def seed_of(role, generation, seed):
    """A seed of its own for the "student" and the "teacher" of each generation, far apart."""
    return seed + 10_000 * generation + {"student": 0, "teacher": 1000}[role]


def build_network(role, generation, data, arguments):
    """The network of a role from scratch, on the device."""
    seed = seed_of(role, generation, arguments.seed)
    network = build_model(getattr(arguments, role), data.classes, data.image_size, seed)
    return network.to(arguments.device)


# -------------------------------------------------------------------------------------- 3. training
def networks_alone(data, arguments):
    """{name: (network, result)}, trained by cross-entropy alone, frozen, in eval mode.

    "student alone" is A_0; for the controls "student alone, long", for kd "teacher alone".
    """
    wanted = {"student alone": ("student", arguments.epochs)}
    if arguments.compare:
        wanted["student alone, long"] = "student", (arguments.generations + 1) * arguments.epochs
    if arguments.peer == "finished" or arguments.compare and arguments.peer_weight[-1]:
        wanted["teacher alone"] = "teacher", arguments.epochs
    alone = {}
    for name, (role, epochs) in wanted.items():
        rates = step_rates(arguments.learning_rate, epochs)
        result, states = train_network(getattr(arguments, role), data, rates, arguments,
                                       seed=seed_of(role, 0, arguments.seed), title=f"\n{name}")
        alone[name] = states[epochs], result
    return alone


def reference_rows(alone, data, arguments):
    """The table's rows of the students trained alone; the first is A_0."""
    return [{"run": name, "best": result["best_test"], "epochs": len(result["rows"]),
             "t_epochs": 0, "seconds": result["seconds"],
             **measures(network, None, None, data, arguments)}
            for name, (network, result) in alone.items() if name != "teacher alone"]


def train_step(student, teacher, anchor, optimizers, images, labels, weights, arguments):
    """One step of the triplet, eq. (4): one forward of each, both losses, then both updates.

    Returns the loss terms without weights, T_ce, T_peer, T_anchor, S_ce and so on; z_S.
    `optimizers` and `weights`: {"student": ..., "teacher": ...}.
    """
    tau = arguments.temperature
    with autocast(arguments):
        with torch.no_grad():  # eval mode, see `frozen`; this step's augmented images
            z_A = anchor(images).float()  # (B,C)
        z_S, z_T = student(images).float(), teacher(images).float()  # (B,C), (B,C)
    L_T = teacher_loss(z_T, z_S, z_A, labels, weights["teacher"], tau)  # Eq. (2)
    L_S = student_loss(z_S, z_T, z_A, labels, weights["student"], tau)  # Eq. (3)
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    (L_T + L_S).backward()  # Eq. (4): detached targets keep the two gradients apart
    for optimizer in optimizers.values():
        optimizer.step()
    with torch.no_grad():  # the terms apart, without their weights, for the log
        terms = {"T_ce": F.cross_entropy(z_T, labels), "T_peer": kl_to(z_S, z_T, tau),
                 "T_anchor": kl_to(z_A, z_T, tau), "S_ce": F.cross_entropy(z_S, labels),
                 "S_peer": kl_to(z_T, z_S, tau), "S_anchor": kl_to(z_A, z_S, tau)}
    return terms, z_S


def control_step(student, fixed, optimizer, images, labels, weights, arguments):
    """A control, in which the student alone learns. Returns the loss terms, and its logits.

    `fixed`: {"peer": a finished teacher, "anchor": the anchor}, frozen; none, one or both.
    """
    with autocast(arguments):
        with torch.no_grad():  # eval mode, see `frozen`
            targets = {role: network(images).float() for role, network in fixed.items()}  # (B,C)
        z_S = student(images).float()  # (B,C)
    ce = F.cross_entropy(z_S, labels)
    kl = {role: kl_to(z, z_S, arguments.temperature) for role, z in targets.items()}
    # Eq. (3) without the term of who is absent
    L_S = weights.label * ce + sum(getattr(weights, role) * kl[role] for role in fixed)
    optimizer.zero_grad()
    L_S.backward()
    optimizer.step()
    return {"S_ce": ce, **{f"S_{role}": value for role, value in kl.items()}}, z_S


def train(record, data, alone, arguments):
    """Train the generations one after another and finish `record`; A_0 is the student alone.

    The record is the loop's memory. `rows`: one for each closed epoch, so their number says where
    the loop stands; `state`: plain values that grow. `restore` names what a checkpoint holds and,
    by --resume, gives each part its state of the last closed epoch; `close_epoch` prints, logs
    and saves; `finish` writes student.pt and result.json. A `Mean` averages an epoch's batches.
    """
    E, G, online = arguments.epochs, arguments.generations, arguments.peer == "online"
    roles = ("student", "teacher") if online else ("student",)
    weights = {role: weights_of(role, arguments) for role in roles}
    networks = {role: build_network(role, 1, data, arguments) for role in roles}
    optimizers = {role: sgd(networks[role].parameters(), arguments) for role in roles}
    anchor = frozen(alone["student alone"][0])  # A_0, a copy: the next anchor takes its place
    shuffle = torch.Generator().manual_seed(arguments.seed)  # order, crops and flips
    record.restore(anchor=anchor, shuffle=shuffle, **networks,
                   **{f"{role}_sgd": optimizers[role] for role in roles})
    for network in networks.values():
        compile_network(network, arguments)
    fixed = {"peer": folded(alone["teacher alone"][0])} if arguments.peer == "finished" else {}
    student, teacher = networks["student"], networks.get("teacher", fixed.get("peer"))
    if not online and weights["student"].anchor:
        fixed["anchor"] = anchor
    generations = record.state.setdefault("generations", [])  # the measures of each
    rates = step_rates(arguments.learning_rate, E)
    while (epoch := len(record.rows)) < G * E:
        g, e = divmod(epoch, E)
        if e == 0 and g > 0:  # g generations are over: A_g = S_g; then new T and S
            anchor.load_state_dict(student.state_dict())
            for role in roles:
                fresh = build_network(role, g + 1, data, arguments)
                networks[role].load_state_dict(fresh.state_dict())
                optimizers[role].state.clear()
        for role in roles:
            networks[role].train()
            optimizers[role].param_groups[0]["lr"] = rates[e]
        mean = Mean()
        for images, labels in data.train.augmented(arguments.batch_size, shuffle):
            if online:
                terms, logits = train_step(student, teacher, anchor, optimizers, images, labels,
                                           weights, arguments)
            else:
                terms, logits = control_step(student, fixed, optimizers["student"], images, labels,
                                             weights["student"], arguments)
            mean.add(terms, logits, labels)
        # a small fraction has many short epochs: tested every 1 / F
        tested = e + 1 == E or (e + 1) % round(1 / arguments.train_fraction) == 0
        row = {"generation": g + 1, "lr": rates[e], **mean.row()}
        for role in roles:
            column = {"student": "test", "teacher": "teacher"}[role]
            row[column] = evaluate(networks[role], data.test, arguments) if tested else None
        if e + 1 == E:
            generations.append({"generation": g + 1,
                                **measures(student, teacher, anchor, data, arguments)})
            for role in roles:
                save_file(frozen(networks[role]).cpu().state_dict(),
                          record.folder / f"{role}-{g + 1}.pt")
        record.close_epoch(row, G * E)
    seen = len(data.train) * len(record.rows)
    shares = None
    if online and arguments.temperature == 1:  # where eq. (7) holds
        l_T, l_S = label_shares(weights["teacher"], weights["student"])
        shares = {"teacher": l_T, "student": l_S}
    record.finish(
        {"student": student.state_dict()}, generations=generations, label_shares=shares,
        before=trained_before(alone, weights.values(), arguments.peer),
        anchor_test=alone["student alone"][1]["last_test"],
        paths={"data": arguments.data and str(arguments.data), "cache": str(arguments.cache)},
        images={**{f"{role} forward and backward": seen for role in roles},
                **{f"{role} forward": seen for role in (["anchor"] if online else fixed)}})


def trained_before(alone, triples, peer):
    """What a chain needs before it starts, A_0 or a finished teacher: epochs and seconds."""
    students = [alone["student alone"][1]] if any(triple.anchor for triple in triples) else []
    teachers = [alone["teacher alone"][1]] if peer == "finished" else []
    return {"epochs": sum(len(result["rows"]) for result in students),
            "t_epochs": sum(len(result["rows"]) for result in teachers),
            "seconds": sum(result["seconds"] for result in (*students, *teachers))}


def generation_rows(name, result):
    """The table's rows of a finished chain, one a generation; epochs and seconds so far."""
    before, generations, table = result["before"], result["generations"], []
    online = result["arguments"]["peer"] == "online"
    for one in generations:
        g = one["generation"]
        done = [row for row in result["rows"] if row["generation"] <= g]
        tests = [row["test"] for row in done if row["generation"] == g and row["test"] is not None]
        table.append({
            **one, "run": f"{name}, generation {g}" if len(generations) > 1 else name,
            "best": max(tests), "epochs": before["epochs"] + len(done),
            "t_epochs": before["t_epochs"] + online * len(done),
            "seconds": before["seconds"] + sum(row["s"] for row in done)})
    return table


def measures(student, teacher, anchor, data, arguments):
    """Accuracies of a generation in %, how its networks agree on the test images, recognition.

    Without a teacher (None): the student's alone. s_gap, t_gap: train, not augmented, minus test.
    """
    found = {"test": evaluate(student, data.test, arguments),
             "student_train": evaluate(student, data.train, arguments)}
    found |= {"s_gap": found["student_train"] - found["test"],
              **recognition(student, data, arguments)}
    if teacher is None:
        return found
    found |= {"teacher": evaluate(teacher, data.test, arguments),
              "teacher_train": evaluate(teacher, data.train, arguments)}
    z_S, z_T, z_A = (embeddings(network, data.test, arguments, network)[0]  # logits, (N,C)
                     for network in (student, teacher, anchor))
    return {**found, "t_gap": found["teacher_train"] - found["teacher"],
            "kl_ts": kl_to(z_T, z_S).item(), "kl_at": kl_to(z_A, z_T).item(),
            "agree": 100 * (z_T.argmax(1) == z_S.argmax(1)).double().mean().item(),
            **{f"t_{key}": value for key, value in recognition(teacher, data, arguments).items()}}


# ----------------------------------------------------------------------------------------- 4. flags
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": SHAPES,
    "fashionmnist": SMALL, "cifar10": SMALL, "folder": SMALL, "tinyimagenet": SMALL,
    "cifar100": {**RECIPE, "teacher": "resnet32x4", "student": "resnet8x4", "epochs": 240},
    "imagenet": {**RECIPE, "teacher": "resnet50", "student": "resnet18", "epochs": 90,
                 "learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 256},
}
COLUMNS = {"test": ".2f", "best": ".2f", "teacher": ".2f", "kl_ts": ".4f", "agree": ".1f",
           "kl_at": ".4f", "s_gap": ".2f", "t_gap": ".2f", "rank1": ".1f", "verification": ".1f",
           "t_rank1": ".1f", "t_verification": ".1f", "epochs": ".0f", "t_epochs": ".0f",
           "seconds": ".0f"}


def weights_of(role, arguments):
    """lambda, pi, zeta of the "student" or the "teacher": one value is for both."""
    place = {"teacher": 0, "student": -1}[role]
    label, peer, anchor = (getattr(arguments, f"{name}_weight")[place] for name in Weights._fields)
    return Weights(label, peer if arguments.peer != "none" else 0.0,
                   anchor if arguments.anchor_on in ("both", role) else 0.0)


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], DEFAULTS, online=True)
    positive, weight = number(float, 0, low_allowed=False), number(float, 0)
    add = parser.add_argument_group("TriKD").add_argument
    add("--generations", type=number(int, 1), default=2, metavar="G",
        help="rounds of --epochs (over --train-fraction), each with the last student as anchor "
             "(default: 2)")
    for name, symbol, value in (("label", "lambda", 1), ("peer", "pi", 1), ("anchor", "zeta", 0.1)):
        add(f"--{name}-weight", type=weight, nargs="+", default=[float(value)], metavar="W",
            help=f"{symbol} of eqs. (2), (3): one value, or the teacher's and the student's "
                 f"(default: {value})")
    add("--anchor-on", default="both", choices=("both", "teacher", "student"),
        help="whom the anchor guides; the other zeta is 0 (default: both)")
    add("--peer", default="online", choices=("online", "finished", "none"),
        help="the student's peer: a teacher that learns beside it, one trained before, or nobody "
             "(default: online)")
    add("--temperature", type=positive, default=1.0, metavar="TAU",
        help="of the KL terms, eq. (1) (default: 1)")
    add("--compare", action="store_true", default=None,
        help=f"run the controls as well: student alone, {', '.join(CONTROLS)}; one table")
    arguments = parse(parser, argv)
    # with --train-fraction a generation has more epochs, so that it has as many updates
    arguments.epochs = max(1, round(arguments.epochs / arguments.train_fraction))
    online = arguments.peer == "online"
    refuse_useless(parser, {
        "peer_weight": (arguments.compare or arguments.peer != "none", "--peer online, finished"),
        "anchor_on": (online and any(arguments.anchor_weight), "an anchor with an online peer")})
    for name in Weights._fields:
        if len(getattr(arguments, f"{name}_weight")) > (2 if online or arguments.compare else 1):
            parser.error(f"--{name}-weight: one value, or two: the online teacher's, the student's")
    for role in ("student", "teacher") if online else ("student",):
        if not sum(weights_of(role, arguments)):
            parser.error(f"all weights of the {role} are 0: it has nothing to learn")
    if arguments.compare and not min(arguments.label_weight):
        parser.error("--label-weight 0: the controls of --compare would learn nothing")
    return arguments


def main():
    arguments, tables = parse_args(), []
    controls = dict(CONTROLS)
    if not arguments.peer_weight[-1]:
        del controls["kd"]  # its student would learn from nobody
    for of_seed in each_seed(arguments):
        data = load_data(of_seed)
        runs = planned_runs(of_seed, data, "TriKD", controls)
        alone = networks_alone(data, of_seed)
        rows = open_set_rows(data, of_seed) + reference_rows(alone, data, of_seed)
        for name, flags, record in runs:
            if not record.result:
                train(record, data, alone, flags)
            rows += generation_rows(name, record.result)
        tables.append(rows)
    print_table(tables, COLUMNS, f"TriKD on {arguments.dataset}: last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
