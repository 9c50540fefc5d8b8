"""TriKD against its specification: section 11, oracles, gradients, the fixed point, tiny runs.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give.
"""

import contextlib
import copy
import io
import itertools
import json
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import common
import trikd
from trikd import Weights

ROOT = Path(__file__).resolve().parents[1]
DIGITS = 1e-6
Z_T, Z_S = [[2, 0.5, -1], [0, 1, 0.5]], [[1, 0, 0], [0.5, 0.5, -1]]
Z_A, Y = [[0, 1, 0], [1, -1, 0]], [0, 2]
ONES, FIRST, SECOND = Weights(1, 1, 1), Weights(1, 0.5, 2), Weights(1, 1.5, 0.25)


def log_p(z, tau=1.0):
    z = np.asarray(z, float) / tau
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(target, own, tau=1.0):
    """Eq. (1), tau^2 included."""
    a, b = log_p(target, tau), log_p(own, tau)
    return tau**2 * (np.exp(a) * (a - b)).sum(1).mean()


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y].mean()


def loss(own, peer, anchor, y, w, tau):
    return w[0] * ce(own, y) + w[1] * kl(peer, own, tau) + w[2] * kl(anchor, own, tau)


def gradient(own, peer, anchor, y, w, tau):
    """Eq. (5), divided by N."""
    hot = np.eye(np.shape(own)[1])[y]
    p, q, a = (np.exp(log_p(z, tau)) for z in (own, peer, anchor))
    return (w[0] * (np.exp(log_p(own)) - hot)
            + tau * (w[1] * (p - q) + w[2] * (p - a))) / len(y)


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


# -------------------------------------------------------------------------- equations (1) to (6)
@pytest.mark.parametrize("tau, values", [
    (1, (0.225261, 0.700731, 0.191891, 0.348894)), (2, (0.294106, 0.777433, 0.274194, 0.408557))])
def test_kl_goldens(tau, values):
    pairs = [(Z_S, Z_T), (Z_A, Z_T), (Z_T, Z_S), (Z_A, Z_S)]  # target, learner
    found = [trikd.kl_to(tensor(a), tensor(b), tau).item() for a, b in pairs]
    assert found == pytest.approx(values, abs=DIGITS)
    assert [kl(a, b, tau) for a, b in pairs] == pytest.approx(values, abs=DIGITS)  # the oracle


@pytest.mark.parametrize("w_T, w_S, tau, values, g_T, g_S", [
    (ONES, ONES, 1, (1.636783, 1.965966),
     [[0.284366, -0.131094, -0.153273], [-0.278043, 0.489797, -0.211754]],
     [[-0.134594, -0.057791, 0.192385], [0.248942, 0.376469, -0.625411]]),
    (FIRST, SECOND, 2, (2.412709, 1.938611),
     [[0.593224, -0.256613, -0.336611], [-0.486346, 0.726430, -0.240083]],
     [[-0.374395, 0.054724, 0.319671], [0.424699, 0.257308, -0.682007]])])
def test_loss_and_gradient_goldens(w_T, w_S, tau, values, g_T, g_S):
    """Separate backwards, and one backward on the sum: detached targets keep them apart."""
    labels = torch.tensor(Y)
    for together in (False, True):
        z_T, z_S, z_A = (tensor(z, True) for z in (Z_T, Z_S, Z_A))
        L_T = trikd.teacher_loss(z_T, z_S, z_A, labels, w_T, tau)
        L_S = trikd.student_loss(z_S, z_T, z_A, labels, w_S, tau)
        assert L_T.shape == L_S.shape == ()
        assert (L_T.item(), L_S.item()) == pytest.approx(values, abs=DIGITS)
        if together:
            (L_T + L_S).backward()
        else:
            L_T.backward()
            assert z_S.grad is None and z_A.grad is None
            L_S.backward()
        assert z_A.grad is None
        assert z_T.grad.numpy() == pytest.approx(np.array(g_T), abs=DIGITS)
        assert z_S.grad.numpy() == pytest.approx(np.array(g_S), abs=DIGITS)


def test_the_value_betrays_the_mistake():
    """The listed wrong values of the second case, recomputed: none is 2.412709."""
    right = loss(Z_T, Z_S, Z_A, Y, FIRST, 2)
    without = ce(Z_T, Y) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 4
    backwards = ce(Z_T, Y) + 0.5 * kl(Z_T, Z_S, 2) + 2 * kl(Z_T, Z_A, 2)
    mean = ce(Z_T, Y) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 3
    for listed, wrong in ((1.136270, without), (2.469466, backwards), (1.278097, mean)):
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - right) > 1e-2


@pytest.mark.parametrize("batch, classes, tau", [(1, 3, 1), (6, 5, 1), (8, 20, 4), (3, 2, 0.5)])
def test_losses_on_random_logits(batch, classes, tau):
    """Eqs. (2), (3), (5), and their symmetry: roles and weights swapped, one becomes the other."""
    random = np.random.default_rng(batch)
    z = random.normal(0, 2, (3, batch, classes))
    y, w = random.integers(0, classes, batch), Weights(*random.uniform(0, 3, 3))
    labels = torch.tensor(y)
    for function in (trikd.teacher_loss, trikd.student_loss):
        own, peer, anchor = (tensor(part, True) for part in z)
        value = function(own, peer, anchor, labels, w, tau)
        assert value.item() == pytest.approx(loss(*z, y, w, tau), rel=1e-10)
        value.backward()
        assert own.grad.numpy() == pytest.approx(gradient(*z, y, w, tau), rel=1e-8, abs=1e-12)
        assert peer.grad is None and anchor.grad is None
    assert torch.autograd.gradcheck(lambda own: trikd.teacher_loss(
        own, peer.detach(), anchor.detach(), labels, w, tau), tensor(z[0], True))
    if tau == 1:  # eq. (6): W (p - mixture)
        mixture = (w.label * np.eye(classes)[y] + w.peer * np.exp(log_p(z[1]))
                   + w.anchor * np.exp(log_p(z[2]))) / sum(w)
        wanted = sum(w) * (np.exp(log_p(z[0])) - mixture) / batch
        assert own.grad.numpy() == pytest.approx(wanted, rel=1e-8, abs=1e-12)


def test_equal_logits_leave_the_label_term():
    z = tensor(Z_T, True)
    trikd.teacher_loss(z, z, z, torch.tensor(Y), Weights(0.7, 5, 9), 3).backward()
    wanted = 0.7 * (np.exp(log_p(Z_T)) - np.eye(3)[Y]) / 2
    assert z.grad.numpy() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("other", [(2, 4), (1, 3), (2, 1), (3,)])
def test_unequal_shapes_are_refused(other):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        trikd.kl_to(torch.zeros(2, 3), torch.zeros(other))


# ----------------------------------------------------------------------------- the fixed point, (7)
@pytest.mark.parametrize("T, S, shares", [
    ((1, 1, 1), (1, 1, 1), (0.5, 0.5)), ((1, 1, 1), (1, 1, 0), (0.6, 0.8)),
    ((1, 1, 0), (1, 1, 1), (0.8, 0.6)), ((1, 1, 3), (1, 1, 3), (0.25, 0.25)),
    ((1, 1, 10), (1, 1, 10), (1 / 11, 1 / 11)), ((1, 100, 100), (1, 100, 100), (1 / 101,) * 2),
    ((1, 1, 0), (1, 1, 0), (1, 1)), (FIRST, SECOND, (0.366197, 0.563380))])
def test_label_shares(T, S, shares):
    assert trikd.label_shares(Weights(*T), Weights(*S)) == pytest.approx(shares, abs=DIGITS)


def test_label_shares_solve_the_two_fixed_point_equations():
    """Unequal label weights: W_T l_T - pi_T l_S = lambda_T, W_S l_S - pi_S l_T = lambda_S."""
    for T, S in (((2, 1, 1), (1, 3, 0.5)), ((0.3, 2, 1), (4, 0.2, 3)), ((1, 2, 0), (0, 1, 1))):
        wanted = np.linalg.solve([[sum(T), -T[1]], [-S[1], sum(S)]], [T[0], S[0]])
        assert trikd.label_shares(Weights(*T), Weights(*S)) == pytest.approx(tuple(wanted))


FIXED = [
    (ONES, ONES, [[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]],
     [[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]]),
    (FIRST, SECOND, [[0.500526, 0.365145, 0.134329], [0.421632, 0.057062, 0.521307]],
     [[0.655918, 0.251544, 0.092538], [0.290457, 0.039309, 0.670234]])]


@pytest.mark.parametrize("w_T, w_S, p_T, p_S", FIXED)
def test_free_logits_reach_the_fixed_point(w_T, w_S, p_T, p_S):
    """Zero gradient at the listed outputs; and gradient descent from anywhere ends there."""
    labels, z_A = torch.tensor(Y), tensor(Z_A)
    z_T, z_S = tensor(np.log(p_T), True), tensor(np.log(p_S), True)
    (trikd.teacher_loss(z_T, z_S, z_A, labels, w_T)
     + trikd.student_loss(z_S, z_T, z_A, labels, w_S)).backward()
    assert max(z_T.grad.abs().max(), z_S.grad.abs().max()) < 2e-6
    z_T, z_S = tensor(Z_T, True), tensor(Z_S, True)
    optimizer = torch.optim.SGD([z_T, z_S], 0.5)
    for _ in range(800):
        optimizer.zero_grad()
        (trikd.teacher_loss(z_T, z_S, z_A, labels, w_T)
         + trikd.student_loss(z_S, z_T, z_A, labels, w_S)).backward()
        optimizer.step()
    for z, p, share in zip((z_T, z_S), (p_T, p_S), trikd.label_shares(w_T, w_S)):
        ends = z.detach().softmax(1).numpy()
        assert ends == pytest.approx(np.array(p), abs=2e-6)
        assert ends == pytest.approx(share * np.eye(3)[Y] + (1 - share) * np.exp(log_p(Z_A)),
                                     abs=2e-6)


# ---------------------------------------------------------------------------------- small functions
def test_learning_rates():
    rates = trikd.learning_rates(0.05, 240)
    exponents = [round(float(np.log10(0.05 / rate))) for rate in rates]
    assert exponents == [0] * 150 + [1] * 30 + [2] * 30 + [3] * 30
    assert trikd.learning_rates(1, 8) == pytest.approx([1] * 5 + [0.1, 0.01, 0.001])
    assert trikd.learning_rates(1, 1) == [1]


def test_classical_scaling_finds_a_known_plane():
    """Points in the plane, up to rotation, reflection and shift."""
    points = np.random.default_rng(0).normal(size=(7, 2))
    D = np.square(points[:, None] - points[None]).sum(2)
    found = trikd.classical_scaling(torch.tensor(D)).numpy()
    assert np.square(found[:, None] - found[None]).sum(2) == pytest.approx(D, abs=1e-9)
    assert np.ptp(found[:, 0]) * np.std(found[:, 0]) >= np.std(found[:, 1]) * 0.5


# ------------------------------------------------------------------------------------------ steps
def networks_of_shapes(count=3):
    names = ["resnet8x0.5", "resnet8", "resnet8x0.5"][:count]
    networks = [common.build_model(name, 20, 16, seed) for seed, name in enumerate(names)]
    images, labels, _ = common.make_shapes(32, 16, 0)
    return networks, images.float() / 255 - 0.4, labels


def sgd(network):
    return torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)


def clone(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def arguments_of(T=ONES, S=ONES, tau=1.0):
    return Namespace(teacher_triple=T, student_triple=S, temperature=tau, precision="fp32",
                     device=torch.device("cpu"))


def test_the_terms_are_those_of_the_logits_before_the_step():
    (student, teacher, anchor), images, labels = networks_of_shapes()
    anchor = common.frozen(anchor)
    with torch.no_grad():
        z_A = anchor(images).double().numpy()
        z_S, z_T = (copy.deepcopy(network)(images).double().numpy() for network in (
            student, teacher))
    y = labels.numpy()
    for first in (True, False):
        terms, logits = trikd.train_step(student, teacher, anchor, sgd(student), sgd(teacher),
                                         images, labels, arguments_of(FIRST, SECOND, 2.0))
        if first:
            wanted = {"T_ce": ce(z_T, y), "T_peer": kl(z_S, z_T, 2), "T_anchor": kl(z_A, z_T, 2),
                      "S_ce": ce(z_S, y), "S_peer": kl(z_T, z_S, 2), "S_anchor": kl(z_A, z_S, 2)}
            assert {k: v.item() for k, v in terms.items()} == pytest.approx(wanted, rel=1e-3)
            assert logits.detach().numpy() == pytest.approx(z_S, rel=1e-4, abs=1e-4)


def test_each_parameter_gets_the_gradient_of_its_own_loss():
    """Eq. (4) at a rate of 0: .grad after the step against autograd on each loss alone."""
    (student, teacher, anchor), images, labels = networks_of_shapes()
    anchor, F = common.frozen(anchor), nn.functional
    wanted = {}
    twins = copy.deepcopy(student), copy.deepcopy(teacher)
    z_S, z_T, z_A = twins[0](images), twins[1](images), anchor(images)
    for name, own, peer, w, twin in (("S", z_S, z_T, SECOND, twins[0]),
                                     ("T", z_T, z_S, FIRST, twins[1])):
        terms = [4 * F.kl_div(F.log_softmax(own / 2, 1), F.softmax(other.detach() / 2, 1),
                              reduction="batchmean") for other in (peer, z_A)]
        total = w.label * F.cross_entropy(own, labels) + w.peer * terms[0] + w.anchor * terms[1]
        wanted[name] = torch.autograd.grad(total, list(twin.parameters()), retain_graph=True)
    still = [torch.optim.SGD(network.parameters(), 0.0) for network in (student, teacher)]
    trikd.train_step(student, teacher, anchor, *still, images, labels,
                     arguments_of(FIRST, SECOND, 2.0))
    for name, network in (("S", student), ("T", teacher)):
        for parameter, gradient in zip(network.parameters(), wanted[name]):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_anchor_never_moves():
    """Parameters AND buffers, bit-identical; teacher and student do move."""
    (student, teacher, anchor), images, labels = networks_of_shapes()
    anchor = common.frozen(anchor)
    before = [clone(network) for network in (student, teacher, anchor)]
    for _ in range(2):
        trikd.train_step(student, teacher, anchor, sgd(student), sgd(teacher), images, labels,
                         arguments_of())
    assert same(clone(anchor), before[2]) and not anchor.training
    assert all(parameter.grad is None for parameter in anchor.parameters())
    assert not same(clone(student), before[0]) and not same(clone(teacher), before[1])


def test_anchor_weight_zero_is_deep_mutual_learning_step_for_step():
    """Two steps against a loop written here that knows no anchor."""
    F, found = nn.functional, {}
    for kind in ("triplet", "by hand"):
        (student, teacher, anchor), images, labels = networks_of_shapes()
        optimizers, w = (sgd(student), sgd(teacher)), Weights(1, 1, 0)
        for _ in range(2):
            if kind == "triplet":
                trikd.train_step(student, teacher, common.frozen(anchor), *optimizers, images,
                                 labels, arguments_of(w, w))
                continue
            z_S, z_T = student(images), teacher(images)
            losses = [F.cross_entropy(own, labels) + F.kl_div(
                F.log_softmax(own, 1), F.log_softmax(peer.detach(), 1), reduction="batchmean",
                log_target=True) for own, peer in ((z_T, z_S), (z_S, z_T))]
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(losses).backward()
            for optimizer in optimizers:
                optimizer.step()
        found[kind] = clone(student), clone(teacher)
    for ours, theirs in zip(*found.values()):
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7) for name in ours)


def test_peer_weight_zero_leaves_the_student_independent_of_the_teacher():
    """Two different teachers, the same student bit for bit; with a peer weight they differ."""
    for peer, equal in ((0, True), (1, False)):
        ends = []
        for teacher_seed in (5, 6):
            (student, _, anchor), images, labels = networks_of_shapes()
            teacher = common.build_model("resnet8", 20, 16, teacher_seed)
            optimizers, w = (sgd(student), sgd(teacher)), Weights(1, peer, 1)
            for _ in range(2):
                trikd.train_step(student, teacher, common.frozen(anchor), *optimizers, images,
                                 labels, arguments_of(w, w))
            ends.append(clone(student))
        assert same(*ends) == equal


def test_control_step_is_eq_3_with_a_fixed_network():
    (student, fixed, _), images, labels = networks_of_shapes()
    fixed = common.frozen(fixed)
    before = clone(fixed)
    with torch.no_grad():
        z, z_S = fixed(images).double().numpy(), copy.deepcopy(student)(images).double().numpy()
    for w in (Weights(1, 0.5, 0), Weights(1, 0, 0.5)):
        twin = copy.deepcopy(student)
        still = torch.optim.SGD(twin.parameters(), 0.0)
        terms, _ = trikd.control_step(twin, fixed, still, images, labels, arguments_of(S=w, tau=2))
        wanted = {"S_ce": ce(z_S, labels.numpy()), "S_kl": kl(z, z_S, 2)}
        assert {k: v.item() for k, v in terms.items()} == pytest.approx(wanted, rel=1e-4)
        bias = gradient(z_S, z, z, labels.numpy(), (1, 0.5, 0), 2).sum(0)
        assert twin.head.bias.grad.numpy() == pytest.approx(bias, rel=1e-3, abs=1e-6)
    assert same(before, clone(fixed))


# ------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("flags, T, S", [
    ("", ONES, ONES), ("--anchor-weight 3", Weights(1, 1, 3), Weights(1, 1, 3)),
    ("--label-weight 1 2 --peer-weight 0.5 1.5 --anchor-weight 2 0.25", FIRST,
     Weights(2, 1.5, 0.25)),
    ("--anchor-on teacher", ONES, Weights(1, 1, 0)),
    ("--anchor-on student --anchor-weight 3", Weights(1, 1, 0), Weights(1, 1, 3)),
    ("--peer-weight 0", Weights(1, 0, 1), Weights(1, 0, 1))])
def test_the_six_weights(flags, T, S):
    run = trikd.variant(trikd.parse_args(f"--device cpu {flags}".split()))
    assert (run.teacher_triple, run.student_triple) == (T, S)


@pytest.mark.parametrize("flags, word", [
    ("--generations 0", "--generations"), ("--label-weight 1 2 3", "--label-weight"),
    ("--anchor-weight -1", "--anchor-weight"), ("--temperature 0", "--temperature"),
    ("--label-weight 0 --peer-weight 0 --anchor-weight 0", "nothing to learn"),
    ("--label-weight 1 0 --peer-weight 1 0 --anchor-on teacher", "nothing to learn"),
    ("--train-fraction 0.5 2", "--train-fraction"), ("--anchor-on all", "--anchor-on"),
    ("--train-fraction 0.5 1 --plot", "one --train-fraction"), ("--sweep -1", "--sweep"),
    ("--stop-on-validation --compare", "--stop-on-validation"),
    ("--label-weight 0 --compare", "--label-weight 0"), ("--label-weight 0 --sweep 1", "--label"),
    ("--teacher-weights x", "--teacher-weights"), ("--student nonsense", "nonsense")])
def test_argument_errors_are_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        trikd.parse_args(flags.split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and word in err, err
    assert err.count("\n") == 1 and err.endswith("\n")


# ------------------------------------------------------------------------------------------ runs
TINY = "--device cpu --teacher resnet8 --student resnet8x0.5 --epochs 2 --batch-size 50"


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHAPES_TRAIN", 260)
        patch.setattr(common, "SHAPES_TEST", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(out, flags): `python trikd.py` in this process; returns what it printed."""
    cache = tmp_path_factory.mktemp("cache")

    def call(out, flags=""):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["trikd.py", *TINY.split(), "--out", str(out), "--cache",
                                        str(cache), *flags.split()])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                trikd.main()
        return printed.getvalue()
    call.cache = cache
    return call


@pytest.fixture(scope="module")
def three(run, tmp_path_factory):
    """Three generations, watched: the networks of every step."""
    folder, steps = tmp_path_factory.mktemp("three"), []
    with pytest.MonkeyPatch.context() as patch:
        original = trikd.train_step

        def spy(student, teacher, anchor, *rest):
            entry = Namespace(student=clone(student), teacher=clone(teacher), anchor=clone(anchor),
                              training=[network.training for network in (student, teacher, anchor)],
                              labels=rest[3])
            steps.append(entry)
            found = original(student, teacher, anchor, *rest)
            entry.after = clone(student)
            entry.anchor_after = clone(anchor)
            return found
        patch.setattr(trikd, "train_step", spy)
        printed = run(folder, "--generations 3")
    return Namespace(folder=folder, steps=steps, printed=printed)


def weights(path):
    return torch.load(path, weights_only=True)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_generations_hand_over(three):
    """A_g is S_g to the bit, A_0 the plain student; S_g+1 and T_g+1 start elsewhere, fresh."""
    size = len(three.steps) // 3
    generations = [three.steps[k:k + size] for k in range(0, len(three.steps), size)]
    assert len(generations) == 3
    for generation in generations:
        first = generation[0].anchor
        assert all(same(step.anchor, first) and same(step.anchor_after, first)
                   for step in generation)
        assert all(step.training == [True, True, False] for step in generation)
    for before, after in zip(generations, generations[1:]):
        assert same(after[0].anchor, before[-1].after)
        assert not same(after[0].student, before[-1].after)
        assert not torch.equal(before[0].labels, after[0].labels)
    fresh = [common.build_model("resnet8x0.5", 20, 16, 10_000 * g).state_dict() for g in (1, 2, 3)]
    for generation, start in zip(generations, fresh):
        assert same(generation[0].student, start)
    starts = [generation[0].teacher["stem.0.weight"] for generation in generations]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(starts, 2))
    for g, generation in enumerate(generations, 1):
        assert same(weights(three.folder / f"student-{g}.pt"), generation[-1].after)
    assert same(weights(three.folder / "student.pt"), generations[-1][-1].after)


def test_measures_by_hand(three):
    """Accuracies, KL, agreement of the last generation from the saved weights, in numpy."""
    data = common.load_data("shapes", None, None, 1.0, 0, 0, 0, torch.device("cpu"))
    nets = {}
    for role, name, g in (("student", "resnet8x0.5", 3), ("teacher", "resnet8", 3),
                          ("student", "resnet8x0.5", 2)):
        network = common.build_model(name, 20, 16)
        network.load_state_dict(weights(three.folder / f"{role}-{g}.pt"))
        nets[role, g] = network.eval()

    def logits(key, split):
        with torch.no_grad():
            return nets[key](split.normalise(split.images)).double().numpy()
    last = result_of(three.folder)["generations"][-1]
    test, train = data.test, data.train
    S, T, A = (logits(key, test) for key in (("student", 3), ("teacher", 3), ("student", 2)))
    assert last["kl_ts"] == pytest.approx(kl(T, S), rel=1e-3)
    assert last["kl_at"] == pytest.approx(kl(A, T), rel=1e-3)
    assert last["agree"] == pytest.approx(100 * (S.argmax(1) == T.argmax(1)).mean())
    for key, split, role in (("test", test, "student"), ("student_train", train, "student"),
                             ("teacher", test, "teacher"), ("teacher_train", train, "teacher")):
        right = (logits((role, 3), split).argmax(1) == split.labels.numpy()).mean()
        assert last[key] == pytest.approx(100 * right, abs=1e-6)
    assert result_of(three.folder)["last_test"] == last["test"]
    assert result_of(three.folder)["label_shares"] == [0.5, 0.5]


@pytest.mark.parametrize("epoch, calls", [("the middle of generation 2", 2 * 5 + 5 + 3),
                                          ("the first steps of generation 3", 4 * 5 + 2)])
def test_a_stopped_run_goes_on_bit_for_bit(three, run, tmp_path, monkeypatch, epoch, calls):
    with monkeypatch.context() as patch:
        count, original = itertools.count(1), trikd.train_step

        def stopping(*args):
            if next(count) == calls:
                raise KeyboardInterrupt
            return original(*args)
        patch.setattr(trikd, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "--generations 3")
    run(tmp_path, "--generations 3 --resume")
    for g in (1, 2, 3):
        for role in ("student", "teacher"):
            assert same(weights(tmp_path / f"{role}-{g}.pt"),
                        weights(three.folder / f"{role}-{g}.pt"))
    ours, theirs = result_of(tmp_path), result_of(three.folder)
    timed = ("s", "img/s", "seconds")
    for a, b in zip(ours["rows"] + ours["generations"], theirs["rows"] + theirs["generations"]):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed}
    with pytest.raises(common.InputError, match="finished"):
        run(tmp_path, "--generations 3")


def table(printed):
    lines = printed.split("\nTriKD on ")[-1].splitlines()[1:]
    header, *rows = [re.split(r" {2,}", line.strip()) for line in lines if line.strip()]
    return {row[0]: dict(zip(header[1:], row[1:])) for row in rows}


def test_compare_prints_every_control_with_its_epochs(run, three, tmp_path):
    found = table(run(tmp_path, "--generations 3 --compare"))
    epochs = {name: (int(row["epochs"]), int(row["t_epochs"])) for name, row in found.items()}
    assert epochs == {
        "student alone": (2, 0), "student alone, 8 epochs": (8, 0), "KD, finished teacher": (2, 2),
        "mutual learning, 8 epochs": (8, 8), "born-again, generation 1": (4, 0),
        "born-again, generation 2": (6, 0), "born-again, generation 3": (8, 0),
        "mutual learning": (2, 2),
        "TriKD, generation 1": (4, 2), "TriKD, generation 2": (6, 4),
        "TriKD, generation 3": (8, 6)}
    own = table(three.printed)
    for name in ("student alone", "TriKD, generation 1", "TriKD, generation 3"):
        for key in ("test", "teacher", "kl_ts", "agree", "kl_at"):
            assert own[name][key] == found[name][key]
    plain = table(run(tmp_path / "zero", "--anchor-weight 0 --generations 1"))["TriKD"]
    assert {k: plain[k] for k in ("test", "teacher", "kl_ts")} == {
        k: found["mutual learning"][k] for k in ("test", "teacher", "kl_ts")}
    born = table(run(tmp_path / "born", "--peer-weight 0 --generations 3"))["TriKD, generation 3"]
    assert born["test"] == found["born-again, generation 3"]["test"]  # a teacher changes nothing


def test_the_overfitting_study(run, tmp_path):
    """Every fraction with and without the anchor; as many updates in each."""
    found = table(run(tmp_path, "--train-fraction 0.5 1 --generations 1 --seed 0 1"))
    names = ["student alone", "mutual learning", "TriKD"]
    assert list(found) == [f"{f}: {name}" for f in ("0.5", "1") for name in names]
    assert [row["epochs"].split()[0] for row in found.values()] == ["4", "4", "8", "2", "2", "4"]
    for row in found.values():
        assert "±" in row["s_gap"]
    ones = [result_of(tmp_path / f"seed-{s}" / "fraction-0.5")["generations"][0] for s in (0, 1)]
    mean = np.mean([one["student_train"] - one["test"] for one in ones])
    assert found["0.5: TriKD"]["s_gap"].startswith(f"{mean:.2f}")
    rows = result_of(tmp_path / "seed-0" / "fraction-0.5")["rows"]
    assert [row["test"] is None for row in rows] == [True, False, True, False]  # every 1 / F
    assert {path.name for path in (tmp_path / "seed-0").iterdir()} == {"fraction-0.5", "fraction-1"}


def test_stop_on_validation_delivers_the_best(run, tmp_path, monkeypatch):
    """Held-out accuracies 50, 60, 55: it stops after the third, and delivers the second."""
    values, original = iter([50.0, 60.0, 55.0]), trikd.measures  # of the three generations

    def scripted(student, teacher, *rest):
        found = original(student, teacher, *rest)
        return {**found, "validation": next(values)} if teacher else found
    monkeypatch.setattr(trikd, "measures", scripted)
    printed = run(tmp_path, "--generations 5 --stop-on-validation")
    result = result_of(tmp_path)
    assert "no better on the held-out images" in printed and len(result["generations"]) == 3
    assert result["delivered"] == 2 and "delivered: generation 2" in printed
    assert result["last_test"] == result["generations"][1]["test"]
    assert "TriKD, generation 2 (delivered)" in printed
    assert same(weights(tmp_path / "student.pt"), weights(tmp_path / "student-2.pt"))


def test_controls_keep_their_meaning_under_other_weights(run, tmp_path):
    """Born-again learns from the anchor whatever --anchor-on says; a sweep respects it."""
    def variant(flags, **changes):
        return trikd.variant(trikd.parse_args(f"--device cpu {flags}".split()), **changes)
    run_ = variant("--anchor-on teacher", peer=0.0, kind="born-again", anchor_on="both")
    assert run_.student_triple == (1, 0, 1)
    run_ = variant("--anchor-on teacher", anchor=3.0)
    assert (run_.teacher_triple.anchor, run_.student_triple.anchor) == (3, 0)
    found = table(run(tmp_path, "--anchor-weight 0 --peer-weight 0 --compare --generations 1"))
    assert "born-again" not in found and "KD, finished teacher" not in found
    assert trikd.label_shares(Weights(0, 1, 0), Weights(0, 1, 0)) == (None, None)


def test_a_bad_fraction_is_refused_before_any_training(run, tmp_path):
    with pytest.raises(common.InputError, match="--batch-size 50"):
        run(tmp_path, "--train-fraction 1 0.1")
    assert not list(tmp_path.iterdir())


def test_open_set_and_sweep(run, tmp_path):
    """The unseen classes never reach a batch; a row for each anchor weight, 0 being mutual."""
    found = table(run(tmp_path, "--open-set 4 --generations 1 --sweep 0 3"))
    assert list(found) == ["student alone", "anchor weight 0", "anchor weight 3", "TriKD"]
    for row in found.values():
        assert 0 <= float(row["rank1"]) <= 100 and 0 <= float(row["verification"]) <= 100
    assert weights(tmp_path / "student.pt")["head.weight"].shape[0] == 16


def test_pictures(run, tmp_path):
    pytest.importorskip("matplotlib")
    printed = run(tmp_path, "--generations 2 --compare --sweep 0 3 --plot --train-fraction 0.5")
    names = ["functions.png", "generations.png", "tradeoff.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all(name in printed for name in names)


def test_student_and_teacher_learn_the_shapes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 1500)
    run(tmp_path, "--epochs 8 --batch-size 32 --generations 1")
    last = result_of(tmp_path)["generations"][-1]
    assert min(last["test"], last["teacher"]) > 25


def test_a_loss_that_is_not_finite_stops(run, tmp_path):
    with pytest.raises(common.InputError, match="not finite"):
        run(tmp_path, "--anchor-weight 1e38 --generations 1")


def readme_commands():
    found = re.findall(r"python trikd\.py[^`\n|]*", (ROOT / "README.md").read_text())
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme(command, tmp_path, run, monkeypatch):
    """Every command is parsed as typed; those on the embedded set are run, made tiny."""
    flags = shlex.split(command)[2:]
    if "--plot" in flags:
        pytest.importorskip("matplotlib")
    trikd.parse_args(flags)
    if "--dataset" not in flags:
        monkeypatch.chdir(tmp_path)
        tiny = ["--epochs", "1", "--image-size", "8", "--batch-size", "5"]
        run(tmp_path / "out", " ".join([*flags, *tiny]))
