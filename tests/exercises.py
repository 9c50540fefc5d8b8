"""What tests/grading.py calls the functions of a script with, and the mistakes that it knows.

CASES: method -> function -> its calls, each a tuple of arguments (of a method of a class the object
first), drawn anew from the script's module. A call that raises here must raise in an answer too.
CANONICAL: function -> what of its result is compared, where not all of it is determined.
MISTAKES: "method.function" -> {mistake: (a place in the script's text, what stands there then)}.
"""

from argparse import Namespace
from math import nan
from pathlib import Path

import torch
from torch import nn

import common

MAPS, WIDE = (2, 5, 3, 4), torch.float64


def z(*seeds, shape=(6, 5), dtype=torch.float32, grad=True):
    """Logits, or maps, or whatever has this shape: for each seed another tensor."""
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            .requires_grad_(grad) for seed in seeds]


def pairs(*rest, **how):
    """Calls of a loss of two equal shapes: usual ones, float64, large ones; and unlike shapes."""
    large = [one.detach().mul(100).requires_grad_() for one in z(4, 5)]
    return [(*z(0, 1), *rest), (*z(2, 3, dtype=WIDE), *rest), (*large, *rest),
            *[(*z(0), *z(1, shape=other), *rest) for other in ((6, 1), (1, 5))]]


def y():
    return torch.tensor([0, 4, 1, 1, 3, 2])


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def images(seed=7):
    return z(seed, shape=(6, 3, 8, 8), grad=False)[0]


def network(seed):
    """Any small network of images (B,3,8,8) to logits (B,5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))


def learner(module):
    """It, as it is amid its training, with the gradients of the last step; and its optimizer."""
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module, torch.optim.SGD(module.parameters(), 1.0, 0.9, weight_decay=0.1)


def settings(**flags):
    return Namespace(**{"precision": "fp32", "device": torch.device("cpu"), "temperature": 2.0,
                        "weight": 0.7, "hint_weight": 0.3, "seed": 0, "fixed": None,
                        "student": "resnet8x0.5", "student_term": "non_saturating", **flags})


def rco_step(m, transfer, precision="fp32", seed=1):
    how = settings(transfer=transfer, precision=precision)
    data = Namespace(build=lambda name, seed: common.build_model(name, 5, 8, seed))
    student, optimizer = learner(m.build_student(data, 64, how))
    return (student, common.folded(data.build("resnet8", seed)), optimizer, images(), y(), how)


def switokd_step(students, teachers, finished=False, **flags):
    """Networks of these seeds, which decide who is ahead: 2, then 1, then 0, the last."""
    made = {f"{role}-{i}": network(seed) for role, seeds in (
        ("student", students), ("teacher", teachers)) for i, seed in enumerate(seeds)}
    learners = {name: learner(own)[1] for name, own in made.items()
                if not (finished and name.startswith("teacher"))}
    of = [{name: own for name, own in made.items() if name.startswith(role)}
          for role in ("student", "teacher")]
    return (*of, learners, images(), y(), settings(**flags))


def trikd_step(m, peer, anchor, finished=None):
    both = nn.ModuleDict({"student": network(0), **({"teacher": network(1)} if peer else {})})
    both, optimizer = learner(both)
    weights = {"student": m.Weights(0.9, 0.5, 2.0), "teacher": m.Weights(0.8, 0.3, 1.5)}
    anchor = common.frozen(network(2)) if anchor else None
    return (both["student"], both["teacher"] if peer else finished, anchor,
            optimizer, images(), y(), {role: weights[role] for role in both}, settings())


def letkd_step(m, supervision, inter, penult):
    student, optimizer = learner(m.build_student("resnet8x0.5", 5, 8, inter, penult, 0.5))
    targets = (*z(4, shape=(penult or 1, 64), grad=False), *decisions(64))
    return (student, common.folded(common.build_model("resnet8", 5, 8, 1)), targets, optimizer,
            images(), y(), settings(supervision=supervision))


def decisions(width, classes=5, k=4, L=3):
    """W, b, c_n, s_T of eqs. (8) to (11), as if fitted."""
    W, b = *z(11, shape=(L, width), grad=False), *z(12, shape=(L,), grad=False)
    c_n, s_T = (z(seed, shape=shape, grad=False)[0] for seed, shape in (
        (13, (classes, k, L)), (14, (classes * k, classes * k))))
    return W, b, c_n, s_T.softmax(1)


def of_classes(dtype=torch.float32, width=6):
    """Features (60,D) in four classes, and the labels."""
    y = torch.arange(60).sqrt().long() % 4  # 9, 14, 19 and 18 of a class
    features = z(5, shape=(60, width), dtype=dtype, grad=False)[0] + 0.5 * y[:, None]
    features[:, 1] = 0  # a dead channel
    features[(y == 2).nonzero()[2:, 0]] = features[(y == 2).nonzero()[0, 0]].clone()
    return features, y  # of class 2 two points alone: with three centres one stays empty


def encoder(m, kind, seed=0):
    """An encoder away from its start, and magnitudes (B,1)."""
    made = getattr(m, kind)()
    for i, own in enumerate(made.parameters()):
        own.data = own.data + z(seed + i, shape=own.shape)[0].data / 5
    return made, z(9, shape=(6, 1))[0]


def augmenter(m, operations=4, **how):
    kinds = ["ColorEncoder"] * m.COLOR + ["GeometricEncoder"] * (m.MOVABLE - m.COLOR)
    encoders = [encoder(m, kind, seed)[0] for seed, kind in enumerate(kinds)]
    made = m.Augmenter(encoders, *statistics(), operations, **how)
    made.theta_m.data, made.theta_p.data = z(1, shape=(11,))[0].data, z(2, shape=(14,))[0].data
    return made


def tst_search(m, student_term):
    made = augmenter(m)
    optimizer = torch.optim.SGD([made.theta_m, made.theta_p], 1.0)
    for own in (made.theta_m, made.theta_p):
        own.grad = torch.ones_like(own)
    teacher, student = common.frozen(network(1)), common.frozen(network(2))
    return (made, teacher, student, optimizer, images(), y(), seeded(),
            settings(student_term=student_term))


def tst_step(first):
    student, optimizer = learner(network(0))
    return student, common.frozen(network(1)), optimizer, images(), y(), first, settings()


def to_fit(m, operation, steps=3):
    made, _ = encoder(m, "GeometricEncoder" if operation == "Rotate" else "ColorEncoder")
    return made, operation, images(), *statistics(), steps, 4, 1e-2, 0.998, seeded()


def statistics():
    """mean, std (3,1,1) of images in [0,1]."""
    return [torch.tensor(three).view(3, 1, 1) for three in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]


def routes():
    """H_1 .. H_N, the current anchor, delta."""
    return [(kl, current, 0.8) for kl, current in (
        ([1.0, 1.2, 2.5, 3.0, 1.0], 1), ([1.0, 3.0, 3.1, 3.2, 1.0], 1),
        ([1.0, 2.0, 2.1, 4.0, 9.0], 2), ([4.0, 5.0, 6.0, 9.0, 1.0], 1),
        ([1.0, 1.1, 1.2, 1.3, 9.0], 1), ([4.0, 0.1, 0.2, 9.0], 1))] + [
            ([1.0, 1.5, 1.5, 1.5, 1.5], 1, 0.5), ([1.0, 1.2, 1.5, 1.79, 1.81, 2.5], 1, 0.4)]


CASES = {
    "rco": lambda m: {
        "softened_kl": lambda: pairs(3.0),
        "kd_loss": lambda: [(*z(0, 1), y()), *pairs(y(), 0.7, 3.0)],
        "hint_loss": lambda: pairs(), "mimic_loss": lambda: pairs(),
        "equal_epoch_anchors": lambda: [(25, 4), (24, 7), (240, 4), (3, 5)],
        "one_stage_anchors": lambda: [(23, 5), (10, 4), (24, 6), (3, 24)],
        "route_kl": lambda: [
            (network(0).train(train), [network(1), network(2).train()],
             iter([(images(), y()), (images(8)[:2], y()[:2])]), T)
            for T, train in ((1.0, True), (3.0, False))],
        "next_anchor": routes,
        "learning_rates": lambda: [(0.1, 240), (0.3, 10), (0.1, 16, "steps")],
        "train_step": lambda: [
            *[rco_step(m, transfer) for transfer in ("kd", "hint", "mimic")],
            rco_step(m, "kd", "bf16")]},
    "switokd": lambda m: {
        "label_distance": lambda: [(*z(0), y()), (*z(0), y(), 2.0), (*z(0, dtype=WIDE), y(), 2.0),
                           (*z(0), 0 * y()),
            (*z(0), y()[:1]), (*z(0), y()[:, None])],
        "distillation_gap": lambda: [(*z(0, 1),), *pairs(2.0)],
        "switching_threshold": lambda: [
            tuple(torch.tensor(one, requires_grad=True) for one in (s, t))
            for s, t in ((1.5, 0.4), (0.4, 1.5), (0.0, 0.0))],
        "choose_mode": lambda: [(1.0, 0.5, 1.0, 0.5), (1.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 0.5),
                        (0.1, 0.5, 1.0, 0.5), (1.0, 0.5, 1.0, 1.0), (1.0, nan, 1.0, 0.5),
                                (nan, 0.5, 1.0, 0.5), tuple(torch.tensor([1.0, 0.5, 1.0, 0.5]))],
        "kl_to": lambda: [(*z(0, 1),), *pairs(2.0)],
        "online_loss": lambda: [
            (*z(0), z(1, 2), y()), *[(*z(0), z(*peers), y(), 2.0) for peers in ((1,), (1, 2), ())],
            (*z(0), z(1, dtype=WIDE, shape=(6, 1)), y(), 2.0)],
        "pair_of": lambda: [
            (*z(0, grad=False), nn.functional.one_hot(y()) + 0.1 * z(1)[0].data, y(), 2.0, 0.0),
            *[(near * z(0)[0].data, 3 * z(1)[0].data, y(), 2.0, fixed)
              for near in (0.1, 4) for fixed in (None, 0.1, 9.0)]],
        "train_step": lambda: [
            switokd_step([0], [1]), switokd_step([0], [1], fixed=-1.0),
            switokd_step([1], [0], fixed=-1.0), switokd_step([0], [1], finished=True),
            switokd_step([1], [0, 2], fixed=-1.0), switokd_step([0, 2], [1], fixed=-1.0),
            switokd_step([2, 0], [1], fixed=-1.0)]},
    "trikd": lambda m: {
        "scaled_kl": lambda: [(*z(0, 1),), *pairs(2.0)],
        "triplet_loss": lambda: [(*z(0, 1, 2), y(), m.Weights(0.9, 0.5, 2.0), 2.0),
                         (*z(0), None, *z(2), y(), m.Weights(0.9, 0.5, 2.0)),
                         (*z(0, 1), None, y(), m.Weights(0.9, 0.5, 2.0)),
                         (*z(0, 1, 2), y(), m.Weights(0.9, 0.0, 0.0)),
                         (*z(0), *z(1, shape=(1, 5)), None, y(), m.Weights(1, 1, 1))],
        "label_shares": lambda: [(m.Weights(0.9, 0.5, 2.0), m.Weights(0.3, 0.5, 2.0)),
                         (m.Weights(1, 2, 3), m.Weights(4, 5, 6)),
                         (m.Weights(0.1, 0.1, 0.1), m.Weights(0.2, 0.1, 0.1)),
                         (m.Weights(0, 1, 0), m.Weights(0, 1, 0))],
        "train_step": lambda: [
            *[trikd_step(m, peer, anchor) for peer in (1, 0) for anchor in (1, 0)],
            trikd_step(m, 0, 0, common.frozen(network(3)))]},
    "letkd": lambda m: {
        "word_targets": lambda: [(*z(0, shape=MAPS, dtype=dtype, grad=False),
                          *z(1, shape=(7, 5), dtype=dtype, grad=False), *tau)
                         for dtype in (torch.float32, WIDE) for tau in ((), (0.6,))],
        "discriminant": lambda: [(*of_classes(), 4, L) for L in (2, 60)]
        + [(*of_classes(WIDE, 2), 4, 60)],
        "fit_decisions": lambda: [(*of_classes(), 4, 3, L, seeded()) for L in (2, 60)],
        "decision_targets": lambda: [(*z(0, shape=MAPS, grad=False), y()[:2], *decisions(5)),
                             (*z(0, shape=MAPS, grad=False), y()[2:4], *decisions(5, k=2)),
                             (*z(0, shape=MAPS, grad=False), y()[:1], *decisions(5))],
        "template_loss": lambda: [
            (*z(0, shape=shape, dtype=dtype), z(1, shape=MAPS, dtype=dtype)[0].mul(sharp)
             .softmax(1).detach().requires_grad_())  # 300: one-hot, 0 log 0 = 0
            for shape, dtype, sharp in ((MAPS, torch.float32, 1), (MAPS, torch.float32, 300),
                                        (MAPS, WIDE, 1), ((2, 1, 3, 4), torch.float32, 1),
                                        ((2, 5, 4, 3), torch.float32, 1))],
        "train_step": lambda: [letkd_step(m, *how) for how in (
            ("teacher", 0, 12), ("teacher", 20, 12), ("none", 20, 12), ("logits", 0, 0))],
        "CosineConv1x1.forward": lambda: [
            (m.build_student("resnet8x0.5", 5, 8, 0, 7).penult.match,
             (x * (torch.arange(4) > 0)).detach().requires_grad_())  # a location of zeros
            for x in z(0, shape=(2, 32, 3, 4))],
        "KDLayer.forward": lambda: [
            (m.build_student("resnet8x0.5", 5, 8, 0, 7, alpha).penult.train(train),
             *z(0, shape=(2, 32, 3, 4))) for alpha in (1.0, 0.3) for train in (True, False)]},
    "tst": lambda m: {
        "relaxed_bernoulli": lambda: [
            (*z(0, shape=(14,)), 0.5, seeded()), (*z(0), 2.0, seeded()),
            (torch.zeros(20_000), 20.0, seeded(146))],  # of which one u is below 1e-6
        "augmentation_loss": lambda: [
            (*z(0), 60 * nn.functional.one_hot(y()).float(), y()), (*z(0, 1), y()),
            *pairs(y(), "non_saturating"), (*z(0, 1), y(), "negative_ce"),
            (*z(0, 1), y(), "no such term")],
        "distillation_loss": lambda: [(*z(0, 1), y()), *pairs(y(), 0.7, 3.0)],
        "to_bytes": lambda: [
            (torch.full((1, 3, 2, 2), 2.5), torch.zeros(1), torch.full((1,), 1 / 255)),
            (images(), *statistics()), (torch.zeros(1, 3, 2, 2), *statistics())],
        "from_bytes": lambda: [
            (torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2) * 20, *statistics())],
        "fit_encoder": lambda: [
            to_fit(m, "Solarize"), to_fit(m, "Rotate", 103), to_fit(m, "Posterize", 9)],
        "search_step": lambda: [tst_search(m, term) for term in ("non_saturating", "negative_ce")],
        "train_step": lambda: [tst_step(first) for first in (
            (images(8), y()), (images(8), y().flip(0)), None)],
        "GeometricEncoder.affine": lambda: [(*encoder(m, "GeometricEncoder"), noise, seeded())
                                    for noise in (0.0, 0.01, 0.5)],
        "GeometricEncoder.forward": lambda: [
            (one, images(), m_i, noise, seeded()) for one, m_i in [encoder(m, "GeometricEncoder")]
            for noise in (0.0, 0.1)],
        "ColorEncoder.scale_shift": lambda: [(*encoder(m, "ColorEncoder"), noise, seeded())
                                     for noise in (0.0, 0.01, 0.5)],
        "ColorEncoder.forward": lambda: [
            (one, images(), m_i, noise, seeded()) for one, m_i in [encoder(m, "ColorEncoder")]
            for noise in (0.0, 0.1)],
        "Augmenter.magnitudes": lambda: [(augmenter(m),)],
        "Augmenter.probabilities": lambda: [(augmenter(m),)],
        "Augmenter.transform": lambda: [
            (augmenter(m, erased=0.5), i, images(), *z(4, shape=(11,)), seeded())
            for i in (0, 10, 11, 12, 13)],
        "Augmenter.forward": lambda: [
            (augmenter(m, operations, temperature=0.3), images(), seeded(seed))
            for operations in (1, 4, 14) for seed in (3, 4)]},
}


def without_signs(found):
    """W and b of eq. (8), whose rows have any sign: the largest entry of each row made positive."""
    if not isinstance(found, tuple) or [getattr(one, "ndim", 0) for one in found] != [2, 1]:
        return found
    W, b = found
    sign = W.take_along_dim(W.abs().argmax(1, keepdim=True), 1).sign()  # (L,1)
    return sign * W, sign[:, 0] * b if len(b) == len(W) else b


CANONICAL = {"discriminant": without_signs}  # function -> what of its result is compared


def mistakes():
    """MISTAKES, from mistakes.txt."""
    found = {}
    for line in (Path(__file__).parent / "mistakes.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            group = found.setdefault(line[1:-1], {})
        elif line.startswith("@"):
            group |= found[line[1:]]
        elif line and not line.startswith("#"):
            label, change = line.replace("\\n", "\n").split(" :: ")
            old, new = f"{change} ".split(" => ")
            group[label] = old, new[:-1]
    return found


MISTAKES = mistakes()
