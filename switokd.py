"""SwitOKD: Switchable Online Knowledge Distillation.

B. Qian, Y. Wang, H. Yin, R. Hong, M. Wang. ECCV 2022, pp. 449-466.
DOI 10.1007/978-3-031-20083-0_27, arXiv:2209.04996. The authors' code: github.com/hfutqian/SwitOKD.

Teacher and student learn together from scratch, and a large gap between them harms the student.
SwitOKD measures the gap on every mini-batch: in learning mode both networks learn from the labels
and from each other; in expert mode the teacher is paused, so that the student can catch up.

    symbol     in code                               shape             meaning
    x, y       images, labels                        (B,3,H,W), (B,)   B images of C classes
    Y                                                (B,C)             one-hot labels
    z_s, z_t   student_logits, teacher_logits        (B,C)             train mode, one forward each
    tau        temperature                           scalar            of p, s, t, G and every KL
    p_s, p_t                                         (B,C)             softmax(z / tau)
    s, t       student_distance, teacher_distance    scalar, [0,2]     L1 distance to the labels
    G          gap                                   scalar, [0,2]     distillation gap
    eps        epsilon                               scalar, [1/e,1]   adaptive factor
    delta      threshold                             scalar            switching threshold

Equations, numbered by this project. CODE: in the authors' repository. READING: our choice. UNKNOWN:
not settled by what we know of the paper. (Nothing here but the idea and the name is quoted from its
text; its tables stand in the README.)

    (1)  s = mean_b sum_k |p_s,k - Y_k|, and t from p_t    CODE
    (2)  G = mean_b sum_k |p_s,k - p_t,k|                  CODE
    (3)  eps = exp(-t / (s + t))                           CODE; its figure prints exp(-t / s)
    (4)  delta = s - eps t                                 CODE
    (5)  expert iff G > delta and t < s, else learning     CODE; t < s in the paper: UNKNOWN
    (6)  KL(peer || own) = mean_b sum_k p_peer,k (log p_peer,k - log p_own,k)    CODE; no tau^2
    (7)  L_s = CE(z_s, y) + KL(p_t || p_s), in both modes  CODE
    (8)  L_t = CE(z_t, y) + KL(p_s || p_t), in learning mode alone               CODE
    (9)  tau = 1: dL_s/dz_s = [(p_s - Y) + (p_s - p_t)] / B: for p_t -> Y both parts are one, and
         distillation has ended; the mean L1 norm of their difference, times B, is t
    (10) (5) in one line: slack = G - (s - t); expert iff slack > (1 - eps) t and t < s: pause the
         teacher if too large a share of its wrong-class mass lies above the student's
    (11) 2T1S: L_ti = CE + KL(p_s || p_ti) + KL(p_tj || p_ti) if pair i is in learning mode;
         L_s = CE + KL(p_t1 || p_s) + KL(p_t2 || p_s)      CODE; own eps for each pair: READING
    (12) 1T2S: L_t = CE + v_1 KL(p_s1 || p_t) + v_2 KL(p_s2 || p_t), v_i = 1 if pair i is in
         learning mode, else 0; a full pause if both are 0; L_si = CE + KL(p_sj || p_si) +
         KL(p_t || p_si)                                   CODE; own eps, true pause: READING
    (lr) lr(e) = lr0 * 0.1 ** max(0, 6 e // E - 2)         READING; CIFAR, ImageNet: CODE

From CODE, its wording in the paper UNKNOWN: the guard, weights 1 and 1, tau = 1 without tau^2,
both KLs as KL(peer || own), simultaneous updates, batch-norm statistics that move on during a
pause, the pause of (12), optimiser and schedule. UNKNOWN too: tau behind each table, best or last
epoch, the variant of deep mutual learning (DML) among the baselines, timing tables.
Departures from CODE: own eps for each pair in (11) and (12), where it has copy slips; in a full
pause of (12) no optimiser step at all; one tau for s, t, G and KL; the last epoch, not the best on
test; SGD and one weight decay for every network; WRNs without convolution biases, with the usual
batch-norm momentum and initialisation; the 0.5 MobileNetV2 for the MobileNet of (11) and (12).
READING: networks, rates and epochs outside CIFAR and ImageNet (shapes: E = 24, not 30, to end in a
minute); `fixed:V` keeps the guard; the KD control is the loss (7), in (11) and (12) likewise, with
finished teachers: weight 1, the run's tau and no tau^2, not the usual T = 4.
Not reproduced: KDCL, offline baselines, ImageNet, timing. The paper's percentages are not claimed
for this code.

    python switokd.py                       embedded shapes; 2 CPU cores: about 50 seconds
    python switokd.py --compare             with its controls; 2 CPU cores: 4 to 5 minutes
    python switokd.py --topology 2t1s       two teachers, one student; or 1t2s
    python switokd.py --dataset cifar100    WRN-16-2, 0.5 MobileNetV2, 299 epochs: not yet run
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time

from common import (
    F, InputError, Record, base_parser, build_model, check_batch_size, check_plot,
    compile_network, describe, each_seed, embeddings, evaluate, introduce, load_data, number,
    open_set_report, parse, print_table, random_states, restore_random_states, run_script,
    save_weights, sgd, torch, train_network, training_seconds)

RECIPE = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {"epochs": 24, **RECIPE}, "fashionmnist": {"epochs": 30, **RECIPE},
    "folder": {"epochs": 30, **RECIPE}, "tinyimagenet": {"epochs": 30, **RECIPE},
    "cifar10": {"epochs": 299, **RECIPE}, "cifar100": RECIPE,
    "imagenet": {"epochs": 120, **RECIPE, "batch_size": 512, "weight_decay": 1e-4},
}
NETWORKS = {  # pair: teacher, student; three: large, middle, small
    "shapes": (("resnet14", "resnet8x0.5"), ("resnet14", "resnet8", "resnet8x0.5")),
    "cifar10": (("wrn_16_8", "wrn_16_1"), ("wrn_16_8", "wrn_16_2", "wrn_16_1")),
    "cifar100": (("wrn_16_2", "mobilenetv2"), ("wrn_16_10", "wrn_16_2", "mobilenetv2")),
    "imagenet": (("resnet34", "resnet18"), ("resnet50", "resnet34", "resnet18")),
}
SMALL = (("resnet20", "resnet8x0.5"), ("resnet20", "resnet8", "resnet8x0.5"))
DROPS = {  # CODE: ten times smaller from these epochs (from 1) on, at the released length
    ("cifar10", 299): (100, 150, 200), ("imagenet", 120): (31, 61, 91),
    ("cifar100", 299): (140, 200, 250), ("cifar100", 269): (140, 200, 250),
}
COUNTS = {"pair": (1, 1), "2t1s": (2, 1), "1t2s": (1, 2)}  # teachers, students


# -------------------------------------------------------------------------- 1. losses and equations
def label_distance(logits, labels, temperature=1.0):
    """Eq. (1): s or t, 0-dim, in [0,2], without gradient. Logits (B,C), labels (B,) int.

    ValueError if the labels do not have one entry for each row of logits.
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels of {tuple(labels.shape)} for logits of {tuple(logits.shape)}")
    p = torch.softmax(logits.detach() / temperature, dim=1)  # (B,C)
    Y = F.one_hot(labels, p.shape[1])  # (B,C)
    # Eq. (1): mean_b sum_k |p_k - Y_k|, the same as 2 (1 - mean_b p_y)
    return (p - Y).abs().sum(1).mean()


def distillation_gap(student_logits, teacher_logits, temperature=1.0):
    """Eq. (2): G, 0-dim, in [0,2], without gradient. Logits (B,C), ValueError if shapes differ."""
    same_shape(student_logits, teacher_logits)
    p_s = torch.softmax(student_logits.detach() / temperature, dim=1)  # (B,C)
    p_t = torch.softmax(teacher_logits.detach() / temperature, dim=1)  # (B,C)
    # Eq. (2): mean_b sum_k |p_s,k - p_t,k|; L1 SUMMED over classes, then the mean over the batch
    return (p_s - p_t).abs().sum(1).mean()


def switching_threshold(student_distance, teacher_distance):
    """Eqs. (3), (4): (delta, eps), 0-dim, without gradient; from numbers or 0-dim tensors.

    NaN, NaN for s = t = 0.
    """
    s = torch.as_tensor(student_distance).detach()
    t = torch.as_tensor(teacher_distance).detach()
    # Eq. (3): eps = exp(-t / (s + t)), a ratio of batch means; with a plus sign none would learn
    epsilon = torch.exp(-t / (s + t))
    # Eq. (4): delta = s - eps t
    return s - epsilon * t, epsilon


def choose_mode(gap, threshold, student_distance, teacher_distance):
    """Eq. (5): "expert" or "learning"; numbers or 0-dim tensors. Equality or NaN: learning."""
    # Eq. (5): expert iff G > delta and t < s
    expert = gap > threshold and teacher_distance < student_distance
    return "expert" if expert else "learning"


def kl_to(peer_logits, own_logits, temperature=1.0):
    """Eq. (6): KL(peer || own) in nats, 0-dim; logits (B,C), ValueError if their shapes differ.

    Only `own_logits` gets a gradient.
    """
    same_shape(peer_logits, own_logits)
    # kl_div takes the learner first and as LOG-probabilities, then the constant peer. "batchmean"
    # divides by B; "mean" would divide by B C.
    log_p_own = F.log_softmax(own_logits / temperature, dim=1)  # (B,C)
    log_p_peer = F.log_softmax(peer_logits.detach() / temperature, dim=1)  # (B,C)
    # Eq. (6): mean_b sum_k p_peer,k (log p_peer,k - log p_own,k), without tau^2
    return F.kl_div(log_p_own, log_p_peer, reduction="batchmean", log_target=True)


def same_shape(a, b):
    if a.shape != b.shape:  # broadcasting would hide it
        raise ValueError(f"logits of {tuple(a.shape)} and {tuple(b.shape)} must have one shape")


def fixed_threshold(switch):
    """V of "fixed:V", None for "adaptive" and "never"; ValueError for anything else."""
    if switch in ("adaptive", "never"):
        return None
    try:
        kind, value = switch.split(":")
        if kind == "fixed" and math.isfinite(float(value)):
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"{switch!r}: a switch is 'adaptive', 'never' or 'fixed:V'")


def pair_numbers(student_logits, teacher_logits, labels, temperature, switch):
    """(5,): G, delta, eps, s, t of one pair of networks, eqs. (1) to (4); "fixed:V": delta = V."""
    s = label_distance(student_logits, labels, temperature)  # Eq. (1)
    t = label_distance(teacher_logits, labels, temperature)
    gap = distillation_gap(student_logits, teacher_logits, temperature)  # Eq. (2)
    threshold, epsilon = switching_threshold(s, t)  # Eqs. (3), (4)
    if fixed_threshold(switch) is not None:
        threshold = torch.full_like(s, fixed_threshold(switch))
        epsilon = torch.full_like(s, math.nan)
    return torch.stack([gap, threshold, epsilon, s, t])


def pair_mode(switch, gap, threshold, epsilon, s, t):
    """Eq. (5) for the numbers of `pair_numbers`; "never" always learns."""
    return "learning" if switch == "never" else choose_mode(gap, threshold, s, t)


def learning_rates(initial, epochs, drops=()):
    """The rate of each epoch: (lr), or ten times smaller from each epoch in `drops` (from 1) on."""
    if drops:
        return [initial * 0.1 ** sum(e + 1 >= drop for drop in drops) for e in range(epochs)]
    # (lr): lr0 * 0.1 ** max(0, 6 e // E - 2), drops after 1/2, 2/3 and 5/6 of the run
    return [initial * 0.1 ** max(0, 6 * e // epochs - 2) for e in range(epochs)]


# --------------------------------------------------------------------------------------- 2. modules
def build_networks(data, arguments):
    """(students, teachers), lists: networks from scratch, each with a seed of its own."""
    def build(names, seed):
        networks = [build_model(name, data.classes, data.image_size, seed + index)
                    for index, name in enumerate(names)]
        return [in_precision(network.to(arguments.device), arguments) for network in networks]
    return build(arguments.student, arguments.seed), build(arguments.teacher, arguments.seed + 1000)


def in_precision(network, arguments):
    """With --precision bf16 let the forward run under autocast; the logits stay float32."""
    if arguments.precision == "bf16":
        forward = torch.autocast(arguments.device.type, torch.bfloat16)(network.forward)
        network.forward = lambda images: forward(images).float()
    return network


# -------------------------------------------------------------------------------------- 3. training
def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_step(student, teacher, student_optimizer, teacher_optimizer, images, labels,
               temperature=1.0, switch="adaptive"):
    """One step of a pair. Returns mode, gap, threshold, epsilon, distances and losses as floats.

    The teacher's loss is None where it is paused: no backward, no step, no weight decay.
    """
    # One train-mode forward each, for the decision and the losses, before any update
    z_s, z_t = student(images), teacher(images)  # (B,C), (B,C)
    # Eq. (7): L_s = CE(z_s, y) + KL(p_t || p_s)
    L_s = F.cross_entropy(z_s, labels) + kl_to(z_t, z_s, temperature)
    # Eq. (8): L_t = CE(z_t, y) + KL(p_s || p_t)
    L_t = F.cross_entropy(z_t, labels) + kl_to(z_s, z_t, temperature)
    # Eqs. (1) to (4); the only transfer of the step brings them and the losses to the host
    numbers = pair_numbers(z_s, z_t, labels, temperature, switch)  # (5,)
    *pair, student_loss, teacher_loss = torch.stack([*numbers, L_s, L_t]).tolist()
    mode = pair_mode(switch, *pair)  # Eq. (5)
    update(student_optimizer, L_s)
    if mode == "learning":
        update(teacher_optimizer, L_t)
    gap, threshold, epsilon, s, t = pair
    return {"mode": mode, "gap": gap, "threshold": threshold, "epsilon": epsilon,
            "student_distance": s, "teacher_distance": t, "student_loss": student_loss,
            "teacher_loss": teacher_loss if mode == "learning" else None}


def train_step_2t1s(student, teachers, student_optimizer, teacher_optimizers, images, labels,
                    temperature=1.0, switch="adaptive"):
    """One step of two teachers and a student, eq. (11); each pair has its own mode.

    Returns as `train_step`, with lists of 2 for the pairs and the teachers.
    """
    z_s, z_t = student(images), [teacher(images) for teacher in teachers]  # (B,C), 2 of (B,C)
    # Eq. (11): L_s = CE(z_s, y) + KL(p_t1 || p_s) + KL(p_t2 || p_s)
    L_s = (F.cross_entropy(z_s, labels) + kl_to(z_t[0], z_s, temperature)
           + kl_to(z_t[1], z_s, temperature))
    # Eq. (11): L_ti = CE(z_ti, y) + KL(p_s || p_ti) + KL(p_tj || p_ti); a paused peer still teaches
    L_t = [F.cross_entropy(z_t[i], labels) + kl_to(z_s, z_t[i], temperature)
           + kl_to(z_t[j], z_t[i], temperature) for i, j in ((0, 1), (1, 0))]
    # Eqs. (1) to (4) for the pairs (student, teacher i), each with its own eps
    numbers = [pair_numbers(z_s, z, labels, temperature, switch) for z in z_t]  # 2 of (5,)
    found = torch.stack([*numbers[0], *numbers[1], L_s, *L_t]).tolist()
    pairs, (student_loss, *teacher_losses) = (found[:5], found[5:10]), found[10:]
    modes = [pair_mode(switch, *pair) for pair in pairs]  # Eq. (5)
    update(student_optimizer, L_s)
    for mode, optimizer, loss in zip(modes, teacher_optimizers, L_t):
        if mode == "learning":
            update(optimizer, loss)
    gaps, thresholds, epsilons, s, t = map(list, zip(*pairs))
    return {"modes": modes, "gaps": gaps, "thresholds": thresholds, "epsilons": epsilons,
            "student_distance": s[0], "teacher_distances": t, "student_loss": student_loss,
            "teacher_losses": [loss if mode == "learning" else None
                               for mode, loss in zip(modes, teacher_losses)]}


def train_step_1t2s(students, teacher, student_optimizers, teacher_optimizer, images, labels,
                    temperature=1.0, switch="adaptive"):
    """One step of a teacher and two students, eq. (12); each pair has a vote, its mode.

    Returns as `train_step`, with lists of 2 for the pairs and the students.
    """
    z_t, z_s = teacher(images), [student(images) for student in students]  # (B,C), 2 of (B,C)
    # Eq. (12): L_si = CE(z_si, y) + KL(p_sj || p_si) + KL(p_t || p_si)
    L_s = [F.cross_entropy(z_s[i], labels) + kl_to(z_s[j], z_s[i], temperature)
           + kl_to(z_t, z_s[i], temperature) for i, j in ((0, 1), (1, 0))]
    L_t = [F.cross_entropy(z_t, labels), *(kl_to(z, z_t, temperature) for z in z_s)]
    # Eqs. (1) to (4) for the pairs (student i, teacher), each with its own eps
    numbers = [pair_numbers(z, z_t, labels, temperature, switch) for z in z_s]  # 2 of (5,)
    found = torch.stack([*numbers[0], *numbers[1], *L_s, *L_t]).tolist()
    pairs, student_losses, parts = (found[:5], found[5:10]), found[10:12], found[12:]
    votes = [pair_mode(switch, *pair) for pair in pairs]  # Eq. (5)
    learning = [True, *(vote == "learning" for vote in votes)]  # CE, v_1, v_2
    for optimizer, loss in zip(student_optimizers, L_s):
        update(optimizer, loss)
    teacher_loss = None
    if "learning" in votes:  # else a full pause: no step at all
        # Eq. (12): L_t = CE(z_t, y) + v_1 KL(p_s1 || p_t) + v_2 KL(p_s2 || p_t)
        update(teacher_optimizer, sum(term for term, taken in zip(L_t, learning) if taken))
        teacher_loss = sum(part for part, taken in zip(parts, learning) if taken)
    gaps, thresholds, epsilons, s, t = map(list, zip(*pairs))
    return {"modes": votes, "gaps": gaps, "thresholds": thresholds, "epsilons": epsilons,
            "student_distances": s, "teacher_distance": t[0], "student_losses": student_losses,
            "teacher_loss": teacher_loss}


def train_step_kd(students, teachers, student_optimizers, images, labels, temperature=1.0):
    """The control: the students' losses of (7), (11), (12) with finished teachers, in eval mode."""
    with torch.no_grad():
        z_t = [teacher(images) for teacher in teachers]  # (B,C) each
    z_s = [student(images) for student in students]  # (B,C) each
    losses = []
    for own in z_s:
        peers = [*z_t, *(z for z in z_s if z is not own)]
        losses.append(F.cross_entropy(own, labels)
                      + sum(kl_to(peer, own, temperature) for peer in peers))
    for optimizer, loss in zip(student_optimizers, losses):
        update(optimizer, loss)
    return {"student_losses": torch.stack(losses).tolist()}


def distill(students, teachers, data, arguments, record):
    """Train all networks together, in place; for the KD control the teachers are finished."""
    E, tau, switch = arguments.epochs, arguments.temperature, arguments.switch
    rates = network_rates(arguments)
    student_sgd = [sgd(network.parameters(), arguments) for network in students]
    teacher_sgd = [sgd(network.parameters(), arguments) for network in teachers]
    generator, start = torch.Generator().manual_seed(arguments.seed), 0
    parts = [*students, *student_sgd]
    if not arguments.kd:
        parts += [*teachers, *teacher_sgd]
    if record.state:
        for part, state in zip(parts, record.state["parts"]):
            part.load_state_dict(state)
        restore_random_states(record.state["random"], generator)
        start = record.state["epoch"]
    for network in students if arguments.kd else (*students, *teachers):
        compile_network(network, arguments)
    record.begin(E)
    for epoch in range(start, E):
        for optimizer, rate in zip([*student_sgd, *teacher_sgd], rates):
            optimizer.param_groups[0]["lr"] = rate[epoch]  # the schedule goes on during pauses
        for student in students:
            student.train()
        for teacher in teachers:
            teacher.train(not arguments.kd)
        steps = []
        for images, labels in data.train.augmented(arguments.batch_size, generator):
            if arguments.kd:
                found = train_step_kd(students, teachers, student_sgd, images, labels, tau)
            elif arguments.topology == "pair":
                found = train_step(*students, *teachers, *student_sgd, *teacher_sgd,
                                   images, labels, tau, switch)
            elif arguments.topology == "2t1s":
                found = train_step_2t1s(*students, teachers, *student_sgd, teacher_sgd,
                                        images, labels, tau, switch)
            else:
                found = train_step_1t2s(students, *teachers, student_sgd, *teacher_sgd,
                                        images, labels, tau, switch)
            steps.append({"epoch": epoch + 1, "step": len(steps) + 1, **log_columns(found)})
            record.step({name.replace("student_loss", "L_s").replace("teacher_loss", "L_t"): value
                         for name, value in steps[-1].items() if "loss" in name}, None, labels,
                        math.ceil(len(data.train) / arguments.batch_size))
        record.trained()
        tests = accuracies(students, teachers, data, arguments)
        for row in steps:
            row |= dict.fromkeys(tests)
        steps[-1] |= tests  # the test accuracies stand in the last row of their epoch
        means = {} if arguments.kd else epoch_means(steps, arguments.topology)
        record.epoch({"epoch": epoch + 1, "lr": rates[0][epoch]}, {**means, **tests},
                     {"parts": [part.state_dict() for part in parts], "epoch": epoch + 1,
                      "random": random_states(generator)}, steps)


def network_rates(arguments):
    """The learning rates of each student, then of each teacher."""
    drops = DROPS.get((arguments.dataset, arguments.epochs), ())
    own = arguments.student_learning_rate or [arguments.learning_rate]
    own = own * len(arguments.student) if len(own) == 1 else own
    return [learning_rates(initial, arguments.epochs, drops)
            for initial in (*own, *[arguments.learning_rate] * len(arguments.teacher))]


# --------------------------------------------------------------------------------------- 4. results
PAIR = ("mode", "gap", "threshold", "epsilon", "student_distance", "teacher_distance")


def log_columns(found):
    """The dict of a step as columns of log.csv: lists of 2 become NAME_1 and NAME_2."""
    columns = {}
    for key, value in found.items():
        if isinstance(value, list):
            name = key[:-2] if key.endswith("losses") else key[:-1]
            ends = ["_1", "_2"] if len(value) > 1 else [""]
            columns |= {name + end: one for end, one in zip(ends, value)}
        else:
            columns[key] = value
    return columns


def pair_columns(topology):
    """For each pair of networks {quantity: its column in log.csv}."""
    if topology == "pair":
        return [{name: name for name in PAIR}]
    shared = "student_distance" if topology == "2t1s" else "teacher_distance"
    return [{name: name if name == shared else name + end for name in PAIR} for end in ("_1", "_2")]


def column(steps, name, pair):
    """A quantity of one pair over all steps."""
    return [row[pair[name]] for row in steps]


def paused(steps, topology):
    """For each teacher, whether it was paused, step by step."""
    expert = [[mode == "expert" for mode in column(steps, "mode", pair)]
              for pair in pair_columns(topology)]
    return [list(map(all, zip(*expert)))] if topology == "1t2s" else expert


def epoch_means(steps, topology):
    """Mean gap and threshold of each pair, and the share of teacher updates paused (%)."""
    means = {}
    for pair in pair_columns(topology):
        means[pair["gap"]] = statistics.fmean(column(steps, "gap", pair))
        delta = pair["threshold"].replace("threshold", "delta")
        means[delta] = statistics.fmean(column(steps, "threshold", pair))
    flags = [flag for teacher in paused(steps, topology) for flag in teacher]
    return {**means, "paused": 100 * statistics.fmean(flags)}


def accuracies(students, teachers, data, arguments):
    """Test accuracies in %; `test` is that of the only, or of the second and smaller, student."""
    one, two = len(students) == 1, len(teachers) == 2
    names = [*(["teacher_1", "teacher_2"] if two else ["teacher"]),
             *(["test"] if one else ["student_1", "test"])]
    return {name: evaluate(network, data.test, arguments)
            for name, network in zip(names, [*teachers, *students])}


def read_steps(record):
    """The rows of log.csv, numbers as floats."""
    try:
        with open(record.folder / "log.csv", newline="") as file:
            return [{name: value if name.startswith("mode") else float(value or math.nan)
                     for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{record.folder / 'log.csv'} is missing or damaged ({error}); choose "
                         "another --out") from None


def switching_summary(steps, topology):
    """Over the run: mean gap, share of paused teacher updates (%), switches between learning and
    paused, mean length of an uninterrupted pause (steps), paused updates of each teacher."""
    flags = paused(steps, topology)
    starts = sum(now and not before for teacher in flags
                 for before, now in zip([False, *teacher], teacher))
    return {"gap": statistics.fmean(row[pair["gap"]] for pair in pair_columns(topology)
                                    for row in steps),
            "paused": 100 * statistics.fmean(flag for teacher in flags for flag in teacher),
            "switches": sum(a != b for teacher in flags for a, b in zip(teacher, teacher[1:])),
            "expert_run": sum(map(sum, flags)) / starts if starts else 0.0,
            "paused_updates": [sum(teacher) for teacher in flags]}


def network_seconds(data, arguments, rounds=5):
    """[forward, backward and step] of the students, then the teachers: median seconds of a batch.

    Fresh networks are timed one by one, after the training, which they leave alone.
    """
    images, labels = next(data.train.augmented(arguments.batch_size, torch.Generator()))
    students, teachers = build_networks(data, arguments)
    found = []
    for network in (*students, *teachers):
        compile_network(network, arguments)
        optimizer, ticks = sgd(network.parameters(), arguments), []
        for _ in range(rounds):
            tick = [clock(arguments)]
            loss = F.cross_entropy(network(images), labels)
            tick.append(clock(arguments))
            update(optimizer, loss)
            ticks.append([tick[1] - tick[0], clock(arguments) - tick[1]])
        found.append([statistics.median(times) for times in zip(*ticks)])
    return found


def clock(arguments):
    if arguments.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_saved(steps, seconds, costs, arguments):
    """Estimates: seconds of teacher updates that pauses saved, and about the most they can save.

    `costs`: `network_seconds`; `seconds`: of the run's training. saved: pauses times the measured
    backward and step. bound: 2/3 x paused share x the teacher's part of the compute, of the time
    without pauses; the 2/3 takes a backward and step for twice a forward.
    """
    teachers = costs[len(arguments.student):]
    flags = paused(steps, arguments.topology)
    saved = sum(sum(flag) * cost[1] for flag, cost in zip(flags, teachers))
    whole = sum(map(sum, costs))
    part = sum(2 / 3 * statistics.fmean(flag) * sum(cost) / whole
               for flag, cost in zip(flags, teachers))
    return {"saved": saved, "bound": part * (seconds + saved)}


def name_of(run):
    """The name of a run in the table."""
    if run.kd:
        return "KD, finished teacher"
    name = {"adaptive": "SwitOKD", "never": "never paused (DML)"}.get(run.switch, run.switch)
    return name if run.topology == "pair" else f"{name}, {run.topology.upper()}"


def measures(student, data, arguments):
    """Recognition of unseen classes, if any were kept out."""
    if not data.unseen:
        return {}
    return open_set_report(*embeddings(student, data.unseen, arguments))


def run_online(data, run, record, teachers=None):
    """One run, unless its record is finished: `teachers` are None, or finished; its table row."""
    if not record.result:
        students, fresh = build_networks(data, run)
        teachers = teachers or fresh
        print(f"\n{name_of(run)}: " + ", ".join(network_names(run)) + f"; records in "
              f"{record.folder}")
        distill(students, teachers, data, run, record)
        steps, images = read_steps(record), len(data.train)
        seconds = training_seconds(record.rows, images)
        found = {"training_seconds": seconds, **measures(students[-1], data, run)}
        seen = images * len(record.rows)
        passes = {"each network forward": seen, "each student backward": seen}
        learners = {"student": students}
        if not run.kd:
            learners["teacher"] = teachers
            costs = network_seconds(data, run)
            found |= {**switching_summary(steps, run.topology), "network_seconds": costs,
                      **time_saved(steps, seconds, costs, run)}
            passes |= {f"teacher {i} backward, share": 1 - pauses / len(steps)
                       for i, pauses in enumerate(found["paused_updates"], 1)}
        for role, networks in learners.items():
            for index, network in enumerate(networks, 1):
                name = role if len(networks) == 1 else f"{role}-{index}"
                save_weights(network.state_dict(), record.folder / f"{name}.pt")
        record.finish(students[-1].state_dict(), steps=len(steps), images=passes,
                      measures=found)
    result = record.result
    return {"run": name_of(run), **result["rows"][-1], "best": result["best_test"],
            **result["measures"], "seconds": result["measures"]["training_seconds"]}


def network_names(run):
    """["teacher 1 wrn_16_2", ...]."""
    return [f"{role}{f' {i}' if len(names) > 1 else ''} {name}"
            for role, names in (("teacher", run.teacher), ("student", run.student))
            for i, name in enumerate(names, 1)]


def plot(records, topology, temperature):
    """gap.png, rule.png and degeneration.png; `records`: {name: record}, the chosen run first."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder, logs = None, {}
    for name, record in records.items():
        folder, logs[name] = folder or record.folder, read_steps(record)
    steps, pairs = next(iter(logs.values())), pair_columns(topology)
    batches = sum(row["epoch"] == 1 for row in steps)
    when = [row["epoch"] - 1 + row["step"] / batches for row in steps]  # in epochs
    files = [folder / name for name in ("gap.png", "rule.png", "degeneration.png")]

    # (a) gap and threshold, expert mode shaded
    figure, axes = pyplot.subplots(len(pairs), figsize=(7, 3 * len(pairs)), squeeze=False,
                                   layout="constrained")
    for axis, pair in zip(axes[:, 0], pairs):
        gap, delta, s, t, mode = (column(steps, name, pair) for name in (
            "gap", "threshold", "student_distance", "teacher_distance", "mode"))
        axis.fill_between(when, 0, [value == "expert" for value in mode], step="pre", linewidth=0,
                          transform=axis.get_xaxis_transform(), color="0.85", label="expert mode")
        axis.plot(when, gap, linewidth=0.8, label="gap G")
        axis.plot(when, delta, linewidth=0.8, label="threshold")
        axis.plot(when, [a - b for a, b in zip(s, t)], linewidth=0.8, label="s - t")
        end = pair["gap"].removeprefix("gap").replace("_", ", pair ")
        axis.set(xlabel="epoch", title="Gap and threshold" + end)
        axis.legend(fontsize=8)
    figure.savefig(files[0], dpi=110)
    pyplot.close(figure)

    # (b) eq. (10): slack / t against r = t / (s + t); the curve is 1 - exp(-r), the guard r < 1/2
    figure, axis = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    for mode, color in (("learning", "tab:blue"), ("expert", "tab:orange")):
        points = [(t / (s + t), (gap - s + t) / t) for pair in pairs for gap, s, t, m in zip(
            *(column(steps, name, pair) for name in (
                "gap", "student_distance", "teacher_distance", "mode"))) if m == mode and t > 0]
        axis.scatter(*(zip(*points) if points else ((), ())), s=5, color=color, label=mode)
    curve = [k / 100 for k in range(101)]
    axis.plot(curve, [1 - math.exp(-r) for r in curve], color="black", label="1 - exp(-r)")
    axis.axvline(0.5, color="0.6", linestyle=":", label="guard t < s")
    axis.set(xlabel="r = t / (s + t)", ylabel="slack / t",
             title=f"The adaptive rule; points: {next(iter(logs))}")
    axis.legend(fontsize=8)
    figure.savefig(files[1], dpi=110)
    pyplot.close(figure)

    # (c) eq. (9): mean L1 distance, times B, of the KL and the cross-entropy gradient is t
    if temperature == 1:
        figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for name, rows in logs.items():
            for t in sorted({pair["teacher_distance"] for pair in pairs}):  # one of each teacher
                end = t.removeprefix("teacher_distance").replace("_", ", teacher ")
                axis.plot([row["epoch"] - 1 + row["step"] / batches for row in rows],
                          [row[t] for row in rows], linewidth=0.8, label=name + end)
        axis.set(xlabel="epoch", ylabel="L1 distance of the two gradients",
                 title="Degeneration: 0 is the end of distillation")
        axis.legend(fontsize=8)
        figure.savefig(files[2], dpi=110)
        pyplot.close(figure)
    print("pictures:", *(files if temperature == 1 else files[:2]))


# ----------------------------------------------------------------------------------------- 5. flags
def defaults(arguments):
    """The flags of a data set and a topology."""
    flags = dict(DEFAULTS[arguments.dataset])
    (teacher, student), (large, middle, small) = NETWORKS.get(arguments.dataset, SMALL)
    flags |= {"pair": {"teacher": [teacher], "student": [student]},
              "2t1s": {"teacher": [middle, large], "student": [small]},
              "1t2s": {"teacher": [large], "student": [middle, small]}}[arguments.topology]
    if arguments.dataset == "cifar100":
        flags["epochs"] = 299 if arguments.topology == "pair" else 269
        if arguments.learning_rate is None and arguments.student is None:  # CODE: MobileNets 0.01
            flags["student_learning_rate"] = [0.01] if arguments.topology != "1t2s" else [0.1, 0.01]
    return flags


def switch_value(text):
    """An argparse type: adaptive, never or fixed:V."""
    try:
        value = fixed_threshold(text)
    except ValueError:
        value = -1
    if value is not None and not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not adaptive, never or fixed:V with V a "
                                         "number from 0 to 2, such as fixed:0.6")
    return text


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], defaults, online=True, networks="+")
    positive = number(float, 0, low_allowed=False)
    add = parser.add_argument_group("SwitOKD").add_argument
    add("--topology", default="pair", choices=list(COUNTS),
        help="two networks, eq. (7) and (8); 2t1s: two teachers, eq. (11); 1t2s: two students, eq. "
             "(12) (default: pair)")
    add("--switch", type=switch_value, default="adaptive", metavar="RULE",
        help="adaptive: eq. (5); never: deep mutual learning; fixed:V: threshold V from 0 to 2 "
             "(default: adaptive)")
    add("--temperature", type=positive, default=1.0, metavar="TAU",
        help="of distances, gap and KL, not of cross-entropy (default: 1)")
    add("--student-learning-rate", type=positive, nargs="+", metavar="LR",
        help="the students', one for all or one for each (default: --learning-rate; 0.01 for the "
             "MobileNetV2 of cifar100, if neither it nor a rate is typed)")
    add("--compare", type=switch_value, nargs="*", metavar="RULE",
        help="run the controls as well: each network alone, KD from the finished teacher, and "
             "these switches (default: never fixed:0.2 fixed:0.6 fixed:0.8); one table")
    add("--plot", action="store_true",
        help="write gap.png, rule.png, degeneration.png (needs matplotlib)")
    arguments = parse(parser, argv)
    counts = len(arguments.teacher), len(arguments.student)
    if counts != COUNTS[arguments.topology]:
        teachers, students = COUNTS[arguments.topology]
        parser.error(f"--topology {arguments.topology} trains {teachers} teacher(s) and {students} "
                     f"student(s), but --teacher names {counts[0]} and --student names "
                     f"{counts[1]}")
    if len(arguments.student_learning_rate or [0]) not in (1, counts[1]):
        parser.error(f"--student-learning-rate: give one, or one for each of {counts[1]} students")
    check_plot(parser, arguments)
    return arguments


def variant(arguments, **flags):
    """The arguments of one run: `flags` replace those given."""
    return argparse.Namespace(**{**vars(arguments), "kd": False, **flags})


# ------------------------------------------------------------------------------------------ 6. main
def run_seed(arguments):
    """All of one seed: the chosen run, with --compare its controls; the rows of the table."""
    data = load_data(arguments.dataset, arguments.data, arguments.image_size,
                     arguments.train_fraction, 0, arguments.open_set, arguments.seed,
                     arguments.device)
    check_batch_size(data, arguments)
    introduce(data, arguments)
    fingerprint = {"data_fingerprint": data.train.fingerprint()}

    def record_of(run, folder):
        return Record(folder, {**describe(run), **fingerprint}, arguments.resume, arguments.device)

    chosen = variant(arguments)
    switches = []
    if arguments.compare is not None:
        switches = [*(arguments.compare or ("never", "fixed:0.2", "fixed:0.6", "fixed:0.8")),
                    "adaptive"]
    further = [variant(arguments, switch=switch) for switch in dict.fromkeys(switches)
               if switch != chosen.switch]
    record = record_of(chosen, arguments.out)
    records, rows = {name_of(chosen): record}, []
    rows.append(run_online(data, chosen, record))
    for run in further:
        name = f"compare-{run.switch.replace(':', '-')}"
        records[name_of(run)] = record_of(run, arguments.out / name)
        rows.append(run_online(data, run, records[name_of(run)]))
    if arguments.compare is not None:
        rows = controls(data, arguments, record_of) + rows[1:] + rows[:1]
    if arguments.plot:
        wanted = {name: kept for name, kept in records.items()
                  if name == name_of(chosen) or kept.settings["switch"] in ("never", "adaptive")}
        plot(wanted, arguments.topology, arguments.temperature)
    return rows


def controls(data, arguments, record_of):
    """Rows of the controls that do not learn online: each network alone, KD from the finished."""
    names = [*arguments.student, *arguments.teacher]
    seeds = [arguments.seed + i for i in range(len(arguments.student))]
    seeds += [arguments.seed + 1000 + i for i in range(len(arguments.teacher))]
    alone, seconds = [], []
    for name, seed, rates in zip(names, seeds, network_rates(arguments)):
        result, networks = train_network(name, data, rates, arguments, seed=seed,
                                         title="\nalone")
        alone.append(in_precision(networks[arguments.epochs], arguments))
        seconds.append(training_seconds(result["rows"], len(data.train)))
    students, teachers = (alone[:len(arguments.student)], alone[len(arguments.student):])
    rows = [{"run": "each network alone", "seconds": sum(seconds),
             **accuracies(students, teachers, data, arguments),
             **measures(students[-1], data, arguments)}]
    run = variant(arguments, kd=True, switch="never")
    row = run_online(data, run, record_of(run, arguments.out / "kd"), teachers)
    row["seconds"] += sum(seconds[len(students):])  # the teachers had to be trained first
    return [*rows, row]


def main():
    arguments = parse_args()
    tables = [run_seed(run) for run in each_seed(arguments)]
    formats = {"teacher": ".2f", "teacher_1": ".2f", "teacher_2": ".2f", "student_1": ".2f",
               "test": ".2f", "best": ".2f", "rank1": ".1f", "verification": ".1f", "gap": ".3f",
               "paused": ".1f", "switches": ".0f", "expert_run": ".1f", "seconds": ".1f",
               "saved": ".1f", "bound": ".1f"}
    print_table(tables, formats, f"SwitOKD on {arguments.dataset}: last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
