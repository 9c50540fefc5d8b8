"""SwitOKD against its specification: every line of its section 11, oracles, gradients, tiny runs.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give. Networks
that return a logit parameter put any case into a step. The runs call `switokd.main` in process.
"""

import contextlib
import copy
import csv
import io
import itertools
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import common
import switokd

ROOT = Path(__file__).resolve().parents[1]
DIGITS = 1e-6  # the goldens have six decimals
Y, LABELS = np.eye(3)[:2], torch.tensor([0, 1])

CASES = {  # z_s, z_t, tau
    "A": ([[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [2, 5, 0]], 1),
    "B": ([[1, 0, 0], [0, 1, 1]], [[2, 1, 0], [0, 2, 1]], 1),
    "C": ([[2, 0, 0], [0, 2, 0]], [[0, 3, 0], [1, 0, 0]], 1),
    "D": ([[0, 0, 0], [0, 0, 0]], [[3, 0, 0], [0, 3, 0]], 1),
    "E": ([[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [2, 5, 0]], 2),
    "F": ([[1, 0, 0], [2, 0, 1]], [[0, 0, 0], [0, 1, 0]], 1)}
GOLDEN = {  # s, t, G, eps, delta, mode, KL(t to s), KL(s to t), L_s, L_t
    "A": (0.847766, 0.720168, 0.613166, 0.631719, 0.392822, "expert", 0.248101, 0.449237, 0.799546,
          None),
    "B": (1.001564, 0.669518, 0.364833, 0.669885, 0.553064, "learning", 0.086719, 0.095698,
          0.793439, 0.503304),
    "C": (0.426028, 1.742780, 1.377981, 0.447730, -0.354266, "learning", 1.311364, 1.444597,
          1.550909, 3.767781),
    "D": (1.333333, 0.181114, 1.152219, 0.887283, 1.172634, "learning", 0.732018, 0.996311,
          1.830631, 1.091234),
    "E": (1.096274, 0.900509, 0.432824, 0.637004, 0.522647, "learning", 0.130187, 0.162182,
          0.681632, 0.738981),
    "F": (1.333853, 1.090550, 0.728870, 0.637742, 0.638364, "expert", 0.457976, 0.376152, 1.937502,
          None)}
TWO_TEACHERS = [[1, 1, 1], [0, 1, 3]], [[2, 0, 0], [1, 2, 0]], [[1, 0, 1], [1, 1, 1]]  # s, t1, t2
ONE_VOTE = [[0, 0, 0], [0, 3, 0]], [[1, 3, 1], [0, 2, 0]], [[0, 3, 0], [0, 0, 0]]  # t, s1, s2
FULL_PAUSE = [[0, 1, 1], [0, 3, 0]], [[0, 0, 2], [0, 0, 0]], [[3, 1, 1], [2, 1, 1]]


# ------------------------------------------------------------------------------------ the oracles
def log_p(z, tau=1):
    z = np.asarray(z, float) / tau
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def l1(a, b):
    return np.abs(a - b).sum(1).mean()


def kl(peer, own, tau=1):
    a, b = log_p(peer, tau), log_p(own, tau)
    return (np.exp(a) * (a - b)).sum(1).mean()


def ce(z, y=(0, 1)):
    return -log_p(z)[np.arange(len(y)), y].mean()


def numbers(z_s, z_t, hot=Y, tau=1):
    """s, t, G, eps, delta by equations (1) to (4)."""
    p_s, p_t = np.exp(log_p(z_s, tau)), np.exp(log_p(z_t, tau))
    s, t = l1(p_s, hot), l1(p_t, hot)
    eps = np.exp(-t / (s + t))
    return s, t, l1(p_s, p_t), eps, s - eps * t


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


class Logits(nn.Module):
    """A network that answers with a parameter, whatever it is shown; batch norm beside it."""

    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(tensor(z))
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.mode = self.training, torch.is_grad_enabled()
        return self.z + 0 * self.norm(x).sum()


X = torch.tensor([[1.0, 2], [3, 5]], dtype=torch.float64)


def optimizers(networks, rate=0.1, warm=True):
    """SGD with momentum and weight decay, its momentum buffers full."""
    made = [torch.optim.SGD(network.parameters(), rate, 0.9, weight_decay=0.1)
            for network in networks]
    for network, optimizer in zip(networks, made if warm else ()):
        z, rates = network.z.detach().clone(), optimizer.param_groups[0]
        network.z.grad, rates["lr"] = torch.ones_like(network.z), 0.0
        optimizer.step()
        rates["lr"], network.z.grad = rate, None
        assert torch.equal(network.z, z) and optimizer.state[network.z]["momentum_buffer"].any()
    return made


def step(case, topology="pair", rate=0.1, tau=1.0, switch="adaptive"):
    """Any of the three steps on logits: (result, networks before, networks, optimizers)."""
    networks = [Logits(z) for z in case]
    before = copy.deepcopy(networks)
    sgd = optimizers(networks, rate)
    for optimizer, old in zip(sgd, before):
        old.momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    function, args = {
        "pair": (switokd.train_step, [*networks, *sgd]),
        "2t1s": (switokd.train_step_2t1s, [networks[0], networks[1:], sgd[0], sgd[1:]]),
        "1t2s": (switokd.train_step_1t2s, [networks[1:], networks[0], sgd[1:], sgd[0]]),
    }[topology]
    return function(*args, X, LABELS, tau, switch), before, networks, sgd


def same(a, b):
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untouched(before, network, optimizer):
    """Parameters, gradients and momentum bit-identical to before the step."""
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    return (same(before.named_parameters(), network.named_parameters())
            and all(p.grad is None for p in network.parameters())
            and all(map(torch.equal, before.momentum, momentum)))


# ----------------------------------------------------------------------- equations (1) to (6), (10)
@pytest.mark.parametrize("name", CASES)
def test_goldens_of_a_pair(name):
    z_s, z_t, tau = CASES[name]
    s, t, G, eps, delta, mode, to_s, to_t, L_s, L_t = GOLDEN[name]
    close = {"abs": DIGITS}
    assert numbers(z_s, z_t, tau=tau) == pytest.approx((s, t, G, eps, delta), **close)  # the oracle
    a, b = tensor(z_s), tensor(z_t)
    assert switokd.label_distance(a, LABELS, tau).item() == pytest.approx(s, **close)
    assert switokd.label_distance(b, LABELS, tau).item() == pytest.approx(t, **close)
    assert switokd.distillation_gap(a, b, tau).item() == pytest.approx(G, **close)
    threshold, epsilon = switokd.switching_threshold(tensor(s), tensor(t))
    assert (threshold.item(), epsilon.item()) == pytest.approx((delta, eps), abs=3e-6)
    assert switokd.choose_mode(G, delta, s, t) == mode
    assert switokd.kl_to(b, a, tau).item() == pytest.approx(to_s, **close)
    assert switokd.kl_to(a, b, tau).item() == pytest.approx(to_t, **close)
    found = step((z_s, z_t), tau=tau)[0]
    assert list(found) == ["mode", "gap", "threshold", "epsilon", "student_distance",
                           "teacher_distance", "student_loss", "teacher_loss"]
    wanted = dict(zip(found, (mode, G, delta, eps, s, t, L_s, L_t)))
    assert found.pop("mode") == wanted.pop("mode")
    if L_t is None:
        assert found.pop("teacher_loss") is wanted.pop("teacher_loss") is None
    assert found == pytest.approx(wanted, **close)
    assert all(type(value) is float for value in found.values())


def test_the_value_betrays_the_mistake():
    """The wrong numbers listed by the specification; none is that of the right formula."""
    z_s, z_t, _ = CASES["A"]
    right = ce(z_s) + kl(z_t, z_s)
    for listed, wrong in (
            (1.000682, ce(z_s) + kl(z_s, z_t)), (0.634145, ce(z_s) + kl(z_t, z_s) / 3)):
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - right) > 1e-2
    s, t, G, eps, delta = numbers(z_s, z_t, tau=2)
    sharp_s, sharp_t, *_, sharp = numbers(z_s, z_t)
    assert sharp == pytest.approx(0.392822, abs=DIGITS) and G > sharp and sharp_t < sharp_s
    assert ce(z_s) + 4 * kl(z_t, z_s, 2) == pytest.approx(1.072192, abs=DIGITS)
    s, t, G, _, delta = numbers(*CASES["F"][:2])
    assert s - np.exp(-t / s) * t == pytest.approx(0.852383, abs=DIGITS) and delta < G < 0.852383
    s, t, G, _, delta = numbers(*CASES["C"][:2])
    assert G > delta and t > s  # without the guard: expert
    for name in "BD":
        s, t, G, *_ = numbers(*CASES[name][:2])
        assert G > s - np.exp(t / (s + t)) * t and t < s  # with the plus sign: expert


@pytest.mark.parametrize("s, t, delta, eps", [
    (1.2, 0.8, 0.663744, 0.670320), (1, 1, 0.393469, 0.606531), (1, 0, 1, 1),
    (0, 1, -0.367879, 0.367879)])
@pytest.mark.parametrize("kind", [lambda v: v, float, lambda v: torch.tensor(float(v))])
def test_switching_threshold(s, t, delta, eps, kind):
    found = switokd.switching_threshold(kind(s), kind(t))
    assert [value.item() for value in found] == pytest.approx([delta, eps], abs=DIGITS)
    assert all(value.shape == () for value in found)


@pytest.mark.parametrize("zero", [0, 0.0, torch.zeros(())])
def test_perfect_networks_learn(zero):
    threshold, epsilon = switokd.switching_threshold(zero, zero)
    assert threshold.isnan() and epsilon.isnan()
    assert switokd.choose_mode(zero, threshold, zero, zero) == "learning"


@pytest.mark.parametrize("G, delta, s, t, mode", [
    (1, 1, 1.2, 0.8, "learning"), (1, 0.9, 1.2, 0.8, "expert"), (1, 0.9, 0.8, 0.8, "learning"),
    (0, float("nan"), 0, 0, "learning"), (1, 0.9, 0.7, 0.8, "learning"),
    (0.8, 0.9, 1.2, 0.8, "learning")])
def test_choose_mode(G, delta, s, t, mode):
    """Both comparisons are strict; numbers and tensors."""
    assert switokd.choose_mode(G, delta, s, t) == mode
    assert switokd.choose_mode(*map(torch.tensor, (G, delta, s, t))) == mode


@pytest.mark.parametrize("ratio, eps", [
    (0.05, 0.9535), (0.10, 0.9131), (0.25, 0.8187), (0.50, 0.7165), (0.75, 0.6514), (1, 0.6065)])
def test_the_table_of_epsilon(ratio, eps):
    assert switokd.switching_threshold(1.0, ratio)[1].item() == pytest.approx(eps, abs=5e-5)


@pytest.mark.parametrize("batch, classes, scale", [(1, 2, 1), (5, 7, 2), (64, 10, 5), (33, 100, 9)])
def test_random_logits_bounds_and_the_rule_in_one_line(batch, classes, scale):
    """Section 4: bounds of G, eps, delta; slack of (10); the plus sign never learns."""
    random = np.random.default_rng(batch)
    for _ in range(30):
        z_s, z_t = random.normal(0, scale, (2, batch, classes)) * random.uniform(0, 2, (2, 1, 1))
        y, tau = random.integers(0, classes, batch), random.choice([0.5, 1, 3])
        hot = np.eye(classes)[y]
        labels, a, b = torch.tensor(y), tensor(z_s, True), tensor(z_t, True)
        G, delta, eps, s, t = switokd.pair_numbers(a, b, labels, tau, "adaptive").tolist()
        assert (s, t, G, eps, delta) == pytest.approx(numbers(z_s, z_t, hot, tau), rel=1e-9)
        p_s, p_t = np.exp(log_p(z_s, tau)), np.exp(log_p(z_t, tau))
        assert s == pytest.approx(2 * (1 - (p_s * hot).sum(1).mean()), rel=1e-9)
        assert abs(s - t) - 1e-12 <= G <= s + t + 1e-12
        assert np.exp(-1) <= eps <= 1 and s - t - 1e-12 <= delta <= s
        slack = 2 * (np.maximum(p_t - p_s, 0) * (1 - hot) + np.maximum(p_s - p_t, 0) * hot).sum(1)
        assert G - (s - t) == pytest.approx(slack.mean(), abs=1e-12)
        mode = switokd.choose_mode(G, delta, s, t)
        assert mode == ("expert" if slack.mean() > (1 - eps) * t and t < s else "learning")
        assert s - np.exp(t / (s + t)) * t < G or t == 0
        for function in (switokd.label_distance(a, labels, tau),
                         switokd.distillation_gap(a, b, tau)):
            assert not function.requires_grad and function.shape == ()


@pytest.mark.parametrize("batch, classes, tau", [(1, 3, 1), (5, 7, 1), (8, 20, 3), (4, 5, 0.5)])
def test_kl_and_gradients_on_random_logits(batch, classes, tau):
    """Eqs. (6) to (9): values, closed-form gradients of the learner, none for the peer."""
    random = np.random.default_rng(batch)
    z_own, z_peer = random.normal(0, 2, (2, batch, classes))
    y = random.integers(0, classes, batch)
    own, peer = tensor(z_own, True), tensor(z_peer, True)
    value = switokd.kl_to(peer, own, tau)
    assert value.shape == () and value.item() == pytest.approx(kl(z_peer, z_own, tau), rel=1e-12)
    loss = nn.functional.cross_entropy(own, torch.tensor(y)) + value
    loss.backward()
    assert peer.grad is None
    soft = (np.exp(log_p(z_own, tau)) - np.exp(log_p(z_peer, tau))) / tau
    hard = np.exp(log_p(z_own)) - np.eye(classes)[y]
    assert own.grad.numpy() == pytest.approx((hard + soft) / batch, rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: switokd.kl_to(peer.detach(), z, tau), own)
    if tau == 1:  # eq. (9): the two parts differ by p_t - Y, of mean L1 norm t
        t = switokd.label_distance(peer, torch.tensor(y)).item()
        assert np.abs(hard - soft).sum(1).mean() == pytest.approx(t, rel=1e-12)
        # eq. (2): G is tau times the L1 norm of the gradient of the KL term in z_s
    gap = switokd.distillation_gap(own, peer, tau).item()
    assert tau * np.abs(soft).sum(1).mean() == pytest.approx(gap, rel=1e-12)


def test_gradient_golden():
    z_s, z_t = (tensor(z, True) for z in CASES["A"][:2])
    (nn.functional.cross_entropy(z_s, LABELS) + switokd.kl_to(z_t, z_s)).backward()
    golden = [[-0.090550, 0.045275, 0.045275], [0.188380, -0.397133, 0.208753]]
    assert z_s.grad.numpy() == pytest.approx(np.array(golden), abs=DIGITS) and z_t.grad is None


@pytest.mark.parametrize("other", [(2, 4), (1, 3), (2, 1), (3,)])
def test_unequal_shapes_are_refused(other):
    for function in (switokd.kl_to, switokd.distillation_gap):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            function(torch.zeros(2, 3), torch.zeros(other))
    for labels in (torch.zeros(1), torch.zeros(2, 1), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            switokd.label_distance(torch.zeros(2, 3), labels.long())


# ------------------------------------------------------------------------------- one step of a pair
@pytest.mark.parametrize("case, switch, mode", [
    ("A", "fixed:0.7", "learning"), ("A", "fixed:0.6", "expert"), ("C", "fixed:0.2", "learning"),
    *[(name, "never", "learning") for name in CASES]])
def test_switches(case, switch, mode):
    z_s, z_t, tau = CASES[case]
    found, adaptive = (step((z_s, z_t), tau=tau, switch=kind)[0] for kind in (switch, "adaptive"))
    assert found["mode"] == mode and (found["teacher_loss"] is None) == (mode == "expert")
    if switch == "never":  # the adaptive numbers are logged all the same
        same_keys = ("gap", "threshold", "epsilon", "student_distance", "teacher_distance")
        assert {key: found[key] for key in same_keys} == {key: adaptive[key] for key in same_keys}
    else:
        assert found["threshold"] == float(switch[6:]) and np.isnan(found["epsilon"])


@pytest.mark.parametrize("switch", ["always", "fixed", "fixed:", "fixed:x", "fixed:nan", ""])
def test_an_unknown_switch_is_refused(switch):
    with pytest.raises(ValueError, match=f"{switch!r}: a switch is"):
        step(CASES["A"][:2], switch=switch)


@pytest.mark.parametrize("tau", [1, 2])
@pytest.mark.parametrize("name", "ABCDF")
def test_each_network_gets_the_gradient_of_its_own_loss_alone(name, tau):
    """Eqs. (7), (8) at a rate of 0: gradients in closed form, in the learning network only."""
    z_s, z_t, _ = CASES[name]
    found, _, (student, teacher), _ = step((z_s, z_t), rate=0.0, tau=tau)
    for network, own, peer in ((student, z_s, z_t), (teacher, z_t, z_s)):
        soft = (np.exp(log_p(own, tau)) - np.exp(log_p(peer, tau))) / tau
        wanted = (np.exp(log_p(own)) - Y + soft) / 2
        if network is teacher and found["mode"] == "expert":
            assert network.z.grad is None
        else:
            assert network.z.grad.numpy() == pytest.approx(wanted, abs=1e-12)


def test_updates_are_simultaneous():
    """Case B: SGD from the SAME old logits for both; a second forward would show."""
    z_s, z_t, _ = CASES["B"]
    networks = [Logits(z) for z in (z_s, z_t)]
    sgd = [torch.optim.SGD(network.parameters(), 0.5) for network in networks]
    switokd.train_step(*networks, *sgd, X, LABELS)
    for network, own, peer in zip(networks, (z_s, z_t), (z_t, z_s)):
        p_own, p_peer = np.exp(log_p(own)), np.exp(log_p(peer))
        wanted = own - 0.5 * (2 * p_own - Y - p_peer) / 2
        assert network.z.detach().numpy() == pytest.approx(wanted, abs=1e-12)
        assert network.calls == 1 and network.mode == (True, True)  # train mode, one forward


def test_expert_mode_pauses_the_teacher_truly():
    """Weights, momentum, gradients bit-identical; its batch norm moves on; the student learns."""
    found, before, (student, teacher), sgd = step(CASES["A"][:2])
    assert found["mode"] == "expert"
    assert untouched(before[1], teacher, sgd[1])
    assert not torch.equal(teacher.norm.running_mean, before[1].norm.running_mean)
    assert teacher.norm.num_batches_tracked == 1 and teacher.calls == 1
    assert not untouched(before[0], student, sgd[0])
    found, before, (student, teacher), sgd = step(CASES["B"][:2])  # the control: learning mode
    assert found["mode"] == "learning" and not untouched(before[1], teacher, sgd[1])


@pytest.mark.parametrize("case, passes", [("A", 0), ("B", 1)])
def test_a_paused_teacher_runs_no_backward(case, passes):
    z_s, z_t, _ = CASES[case]
    student, teacher, calls = Logits(z_s), Logits(z_t), {"s": 0, "t": 0}
    for key, network in (("s", student), ("t", teacher)):
        network.z.register_hook(
            lambda grad, key=key: calls.__setitem__(key, calls[key] + 1))
    switokd.train_step(student, teacher, *optimizers([student, teacher], warm=False), X, LABELS)
    assert calls == {"s": 1, "t": passes}


def networks_of_shapes(seed=0):
    student = common.build_model("resnet8x0.5", 20, 16, seed)
    teacher = common.build_model("resnet8", 20, 16, seed + 1000)
    sgd = [torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)
           for network in (student, teacher)]
    images, labels, _ = common.make_shapes(64, 16, 0)
    return student, teacher, *sgd, images.float() / 255 - 0.4, labels


def plain_mutual_step(student, teacher, student_sgd, teacher_sgd, images, labels):
    """Deep mutual learning, written here: both networks, both losses."""
    z_s, z_t = student(images), teacher(images)
    F = nn.functional
    for own, peer, optimizer in ((z_s, z_t, student_sgd), (z_t, z_s, teacher_sgd)):
        target = F.log_softmax(peer.detach(), 1)
        loss = F.cross_entropy(own, labels) + F.kl_div(
            F.log_softmax(own, 1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_learning_step_is_a_step_of_deep_mutual_learning_bit_for_bit():
    """Untrained networks are near-uniform: learning mode; also equal to the `never` step."""
    runs = {}
    for name in ("adaptive", "never", "by hand"):
        setting = networks_of_shapes()
        for _ in range(2):
            if name == "by hand":
                plain_mutual_step(*setting)
            else:
                assert switokd.train_step(*setting, switch=name)["mode"] == "learning"
        runs[name] = [network.state_dict() for network in setting[:2]]
    for role in (0, 1):
        assert same(runs["adaptive"][role], runs["never"][role])
        assert same(runs["adaptive"][role], runs["by hand"][role])


def test_an_expert_step_of_real_networks():
    """A teacher trained on clean labels, one step on noisy labels: t < s, G > delta."""
    student, teacher, student_sgd, teacher_sgd, images, labels = networks_of_shapes()
    for _ in range(60):
        teacher_sgd.zero_grad()
        nn.functional.cross_entropy(teacher(images), labels).backward()
        teacher_sgd.step()
    noisy = labels.clone()
    noisy[:24] = (noisy[:24] + 7) % 20
    student_before, before = (copy.deepcopy(network) for network in (student, teacher))
    momentum = copy.deepcopy(teacher_sgd.state_dict())
    grads = [parameter.grad.clone() for parameter in teacher.parameters()]
    found = switokd.train_step(student, teacher, student_sgd, teacher_sgd, images, noisy)
    assert found["mode"] == "expert" and found["gap"] > found["threshold"]
    assert same(before.named_parameters(), teacher.named_parameters())
    assert all(map(torch.equal, grads, (p.grad for p in teacher.parameters())))
    after = teacher_sgd.state_dict()
    assert momentum["param_groups"] == after["param_groups"]
    for key, state in momentum["state"].items():
        assert torch.equal(state["momentum_buffer"], after["state"][key]["momentum_buffer"])
    assert not same(before.named_buffers(), teacher.named_buffers())
    moved = [not torch.equal(a, b) for a, b in zip(student_before.parameters(),
                                                   student.parameters())]
    assert all(moved)


# ------------------------------------------------------------------------------- three networks
def test_two_teachers_golden():
    """Each pair has its own eps; a paused teacher still serves as a peer."""
    found, before, (student, *teachers), sgd = step(TWO_TEACHERS, "2t1s")
    assert list(found) == ["modes", "gaps", "thresholds", "epsilons", "student_distance",
                           "teacher_distances", "student_loss", "teacher_losses"]
    close = {"abs": DIGITS}
    assert found["modes"] == ["expert", "learning"]
    assert found["student_distance"] == pytest.approx(1.552471, **close)
    assert found["teacher_distances"] == pytest.approx([0.547773, 1.244348], **close)
    assert found["gaps"] == pytest.approx([1.207417, 0.688432], **close)
    assert found["thresholds"] == pytest.approx([1.130454, 0.754996], **close)
    assert found["teacher_losses"] == [None, pytest.approx(1.600407, **close)]
    assert found["student_loss"] == pytest.approx(2.961386, **close)
    s, t1, *_ = numbers(TWO_TEACHERS[0], TWO_TEACHERS[1])
    t2 = numbers(TWO_TEACHERS[0], TWO_TEACHERS[2])[1]
    slip = s - np.exp(-t1 / (s + t1)) * t2  # eps of the other pair
    assert slip == pytest.approx(0.593796, **close) and found["gaps"][1] > slip
    assert untouched(before[1], teachers[0], sgd[1]) and teachers[0].norm.num_batches_tracked == 1
    assert not untouched(before[2], teachers[1], sgd[2])
    assert [network.calls for network in (student, *teachers)] == [1, 1, 1]


def test_one_teacher_one_vote_golden():
    found, before, (teacher, *students), sgd = step(ONE_VOTE, "1t2s")
    assert list(found) == ["modes", "gaps", "thresholds", "epsilons", "student_distances",
                           "teacher_distance", "student_losses", "teacher_loss"]
    close = {"abs": DIGITS}
    assert found["modes"] == ["learning", "expert"]
    assert found["teacher_distance"] == pytest.approx(0.757224, **close)
    assert found["student_distances"] == pytest.approx([1.106507, 1.621388], **close)
    assert found["gaps"] == pytest.approx([0.576110, 1.152219], **close)
    assert found["thresholds"] == pytest.approx([0.602110, 1.070621], **close)
    assert found["teacher_loss"] == pytest.approx(0.847483, **close)
    assert found["student_losses"] == pytest.approx([1.767875, 3.211648], **close)
    s1, t, *_ = numbers(ONE_VOTE[1], ONE_VOTE[0])
    s2 = numbers(ONE_VOTE[2], ONE_VOTE[0])[0]
    slip = s1 - np.exp(-t / (s2 + t)) * t
    assert slip == pytest.approx(0.555740, **close) and found["gaps"][0] > slip
    assert not untouched(before[0], teacher, sgd[0])


def test_a_full_pause_leaves_the_teacher_bit_identical():
    """Warm momentum and weight decay: a step on a loss of 0, as released, would move it."""
    found, before, (teacher, *students), sgd = step(FULL_PAUSE, "1t2s")
    assert found["modes"] == ["expert", "expert"] and found["teacher_loss"] is None
    assert found["teacher_distance"] == pytest.approx(0.935195, abs=DIGITS)
    assert found["gaps"] == pytest.approx([0.940777, 1.329125], abs=DIGITS)
    assert found["thresholds"] == pytest.approx([0.917265, 0.424116], abs=DIGITS)
    assert found["student_losses"] == pytest.approx([2.965984, 2.661241], abs=DIGITS)
    assert untouched(before[0], teacher, sgd[0]) and teacher.norm.num_batches_tracked == 1
    for old, student, optimizer in zip(before[1:], students, sgd[1:]):
        assert not untouched(old, student, optimizer)
    still = Logits(FULL_PAUSE[0])  # the control: what the released code does
    released, = optimizers([still])
    switokd.update(released, 0 * still(X).sum())
    assert not torch.equal(still.z, teacher.z)


@pytest.mark.parametrize("topology", ["2t1s", "1t2s"])
@pytest.mark.parametrize("switch", ["adaptive", "never"])
@pytest.mark.parametrize("tau", [1, 2])
def test_gradients_of_three_networks(topology, switch, tau):
    """Eqs. (11), (12) on random logits: each network by its own loss, peers as constants."""
    random, seen = np.random.default_rng(4), set()
    for _ in range(25):
        case = random.normal(0, 2, (3, 2, 3))
        found, _, networks, _ = step(case, topology, 0.0, tau, switch)
        seen.add(tuple(found["modes"]))
        p, expert = [np.exp(log_p(z, tau)) for z in case], [m == "expert" for m in found["modes"]]
        pairs = [(0, 1), (0, 2)] if topology == "2t1s" else [(1, 0), (2, 0)]  # student, teacher
        for (a, b), mode in zip(pairs, found["modes"]):
            s, t, G, eps, delta = numbers(case[a], case[b], tau=tau)
            assert mode == ("expert" if G > delta and t < s and switch != "never" else "learning")
        peers = {0: [1, 2], 1: [0, 2], 2: [0, 1]}
        if topology == "2t1s":
            peers.update({i: None for i in (1, 2) if expert[i - 1]})
        else:
            peers[0] = None if all(expert) else [i for i in (1, 2) if not expert[i - 1]]
        for own, others in peers.items():
            if others is None:
                assert networks[own].z.grad is None
                continue
            soft = sum((p[own] - p[other]) / tau for other in others)
            wanted = (np.exp(log_p(case[own])) - Y + soft) / 2
            assert networks[own].z.grad.numpy() == pytest.approx(wanted, abs=1e-12)
            loss = ce(case[own]) + sum(kl(case[other], case[own], tau) for other in others)
            key = ("student" if (own == 0) == (topology == "2t1s") else "teacher") + "_loss"
            value = found[key] if own == 0 else found[key + "es"][own - 1]
            assert value == pytest.approx(loss, rel=1e-9)
    assert len(seen) > 1 or switch == "never"


def test_kd_from_finished_teachers():
    """The control: the students' losses, nothing of the teachers moves."""
    random = np.random.default_rng(0)
    z_t, z_1, z_2 = random.normal(0, 2, (3, 2, 3))
    teacher, *students = networks = [Logits(z) for z in (z_t, z_1, z_2)]
    teacher.eval()
    before, sgd = copy.deepcopy(teacher.state_dict()), optimizers(networks, 0.0)
    found = switokd.train_step_kd(students, [teacher], sgd[1:], X, LABELS, 2.0)
    wanted = [ce(own) + kl(z_t, own, 2) + kl(other, own, 2)
              for own, other in ((z_1, z_2), (z_2, z_1))]
    assert found["student_losses"] == pytest.approx(wanted, rel=1e-9)
    assert same(before, teacher.state_dict()) and teacher.mode == (False, False)
    soft = (2 * np.exp(log_p(z_1, 2)) - np.exp(log_p(z_t, 2)) - np.exp(log_p(z_2, 2))) / 2
    wanted = (np.exp(log_p(z_1)) - Y + soft) / 2
    assert students[0].z.grad.numpy() == pytest.approx(wanted, abs=1e-12)


# ----------------------------------------------------------------------------- schedule and flags
def exponents(rates, initial):
    return [round(float(np.log10(initial / rate)), 6) for rate in rates]


def test_learning_rates():
    found = exponents(switokd.learning_rates(0.1, 300), 0.1)
    wanted = {0: 0, 149: 0, 150: 1, 199: 1, 200: 2, 249: 2, 250: 3, 299: 3}
    assert {e: found[e] for e in wanted} == wanted
    assert exponents(switokd.learning_rates(0.1, 24), 0.1) == [0] * 12 + [1] * 4 + [2] * 4 + [3] * 4
    assert switokd.learning_rates(0.1, 1) == [0.1]


@pytest.mark.parametrize("flags, networks, epochs, batch, decay, initial, drops", [
    ("--dataset cifar10", ["wrn_16_1", "wrn_16_8"], 299, 128, 5e-4, [0.1, 0.1], (100, 150, 200)),
    ("--dataset cifar100", ["mobilenetv2", "wrn_16_2"], 299, 128, 5e-4, [0.01, 0.1],
     (140, 200, 250)),
    ("--dataset cifar100 --topology 2t1s", ["mobilenetv2", "wrn_16_2", "wrn_16_10"], 269, 128, 5e-4,
     [0.01, 0.1, 0.1], (140, 200, 250)),
    ("--dataset cifar100 --topology 1t2s", ["wrn_16_2", "mobilenetv2", "wrn_16_10"], 269, 128, 5e-4,
     [0.1, 0.01, 0.1], (140, 200, 250)),
    ("--dataset imagenet", ["resnet18", "resnet34"], 120, 512, 1e-4, [0.1, 0.1], (31, 61, 91)),
    ("--dataset fashionmnist", ["resnet8x0.5", "resnet20"], 30, 128, 5e-4, [0.1, 0.1],
     (16, 21, 26)),
    ("--epochs 30", ["resnet8x0.5", "resnet14"], 30, 128, 5e-4, [0.1, 0.1], (16, 21, 26))])
def test_recipes(flags, networks, epochs, batch, decay, initial, drops):
    """Section 6: networks (students, then teachers), epochs, rates and where they drop (from 1)."""
    arguments = switokd.parse_args(["--device", "cpu", *flags.split()])
    assert [*arguments.student, *arguments.teacher] == networks
    assert (arguments.epochs, arguments.batch_size, arguments.weight_decay) == (
        epochs, batch, decay)
    assert (arguments.momentum, arguments.temperature, arguments.switch) == (0.9, 1, "adaptive")
    rates = switokd.network_rates(arguments)
    assert [rate[0] for rate in rates] == initial
    for rate, first in zip(rates, initial):
        steps = [e + 1 for e in range(1, epochs) if rate[e] != rate[e - 1]]
        assert tuple(steps) == drops
        assert exponents(rate, first)[-1] == 3


@pytest.mark.parametrize("flags, words", [
    ("--topology 2t1s --teacher resnet8", ["2 teacher(s)", "--teacher names 1"]),
    ("--topology 2t1s --student resnet8 resnet14", ["1 student(s)", "--student names 2"]),
    ("--topology 1t2s --teacher resnet8 resnet14", ["1 teacher(s)", "--teacher names 2"]),
    ("--topology 1t2s --student resnet8", ["2 student(s)", "--student names 1"]),
    ("--teacher resnet8 resnet14", ["1 teacher(s)", "--teacher names 2"]),
    ("--topology 3t", ["--topology"]), ("--switch sometimes", ["sometimes", "fixed:V"]),
    ("--switch fixed:3", ["fixed:3", "0 to 2"]), ("--switch fixed:-1", ["0 to 2"]),
    ("--switch fixed:nan", ["fixed:nan"]), ("--switch fixed", ["fixed"]),
    ("--compare fixed:x", ["fixed:x"]), ("--temperature 0", ["--temperature"]),
    ("--teacher-weights x.pt", ["--teacher-weights"]), ("--student nonsense", ["nonsense"]),
    ("--topology 1t2s --student-learning-rate 0.1 0.2 0.3", ["--student-learning-rate", "2"]),
    ("--student-learning-rate 0.1 0.2", ["--student-learning-rate", "1"]),
    ("--student-learning-rate 0", ["--student-learning-rate"])])
def test_argument_errors_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        switokd.parse_args(flags.split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and all(word in err for word in words), err
    assert err.count("\n") == 1 and err.endswith("\n")


# ------------------------------------------------------------------------------------------ runs
TINY = "--device cpu --epochs 3 --batch-size 50"
TRIO = {"pair": "--teacher resnet8 --student resnet8x0.5",
        "2t1s": "--topology 2t1s --teacher resnet8x0.5 resnet8 --student resnet8x0.5",
        "1t2s": "--topology 1t2s --teacher resnet8 --student resnet8 resnet8x0.5"}
FILES = {"pair": ["student", "teacher"], "2t1s": ["student", "teacher-1", "teacher-2"],
         "1t2s": ["student", "student-1", "student-2", "teacher"]}


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHAPES_TRAIN", 240)
        patch.setattr(common, "SHAPES_TEST", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(out, flags): `python switokd.py` in this process; returns what it printed."""
    cache = tmp_path_factory.mktemp("cache")

    def call(out, flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["switokd.py", *TINY.split(), "--out", str(out), "--cache",
                                        str(cache), *flags.split()])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                switokd.main()
        return printed.getvalue()
    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """topology -> a finished run, with a threshold low enough to switch."""
    memory = {}

    def once(topology):
        if topology not in memory:
            folder = tmp_path_factory.mktemp(topology)
            printed = run(folder, f"{TRIO[topology]} --switch fixed:0.2")
            memory[topology] = SimpleNamespace(folder=folder, printed=printed)
        return memory[topology]
    return once


def log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("topology", TRIO)
def test_what_a_run_leaves(finished, topology):
    """A row a step in log.csv, its means in result.json, weights that give the last accuracy."""
    folder, result = finished(topology).folder, None
    result = json.loads((folder / "result.json").read_text())
    rows, steps = result["rows"], log(folder)
    assert len(rows) == 3 and len(steps) == result["steps"] == 3 * 5  # 240 images, 50 a step
    assert [(row["epoch"], row["step"]) for row in steps] == [
        (str(e), str(k)) for e in (1, 2, 3) for k in range(1, 6)]
    pairs = [""] if topology == "pair" else ["_1", "_2"]
    expert = []
    for pair in pairs:
        assert {row[f"mode{pair}"] for row in steps} == {"expert", "learning"}, "must switch"
        for row in steps:
            s = float(row.get(f"student_distance{pair}") or row["student_distance"])
            t = float(row.get(f"teacher_distance{pair}") or row["teacher_distance"])
            G, delta = float(row[f"gap{pair}"]), float(row[f"threshold{pair}"])
            assert delta == pytest.approx(0.2) and row[f"epsilon{pair}"] == "nan"
            assert (row[f"mode{pair}"] == "expert") == (G > delta and t < s)
        expert.append([row[f"mode{pair}"] == "expert" for row in steps])
        for row in rows:
            own = [step for step in steps if int(step["epoch"]) == row["epoch"]]
            assert row[f"gap{pair}"] == pytest.approx(
                np.mean([float(step[f"gap{pair}"]) for step in own]))
    found = result["measures"]
    stopped = [list(np.all(expert, axis=0))] if topology == "1t2s" else expert
    assert found["paused"] == pytest.approx(100 * np.mean(stopped))
    assert found["paused_updates"] == [sum(teacher) for teacher in stopped]
    assert found["switches"] == sum(a != b for one in stopped for a, b in zip(one, one[1:]))
    runs = [len(list(group)) for one in stopped for key, group in itertools.groupby(one) if key]
    assert found["expert_run"] == pytest.approx(np.mean(runs or [0]))
    shares = [value for key, value in result["images"].items() if key.endswith("share")]
    assert shares == pytest.approx([1 - np.mean(one) for one in stopped])
    assert result["images"]["each student backward"] == 3 * 240
    for name in ("student_loss", "teacher_loss"):
        for row, missing in zip(steps, stopped[0]):
            key = name if name in row else f"{name}_1"
            assert (row[key] == "") == (missing and name == "teacher_loss")
    data = common.load_data("shapes", None, None, 1.0, 0, 0, 0, torch.device("cpu"))
    device = Namespace(device=torch.device("cpu"), precision="fp32")
    last, settings = rows[-1], switokd.parse_args(f"--device cpu {TRIO[topology]}".split())
    assert sorted(path.stem for path in folder.glob("*.pt")) == sorted(FILES[topology])
    for name in FILES[topology]:
        role, _, index = name.partition("-")
        network = common.build_model(getattr(settings, role)[int(index or 0) - 1], 20, 16, seed=9)
        network.load_state_dict(weights(folder / f"{name}.pt"))
        key = {"student": "test", "student-1": "student_1", "student-2": "test"}.get(
            name, name.replace("-", "_"))
        assert common.evaluate(network, data.test, device) == pytest.approx(last[key], abs=1e-9)
        assert steps[-1][key] == str(last[key]) and steps[-2][key] == ""
    assert result["last_test"] == last["test"] and f"{last['test']:.2f}" in finished(
        topology).printed.splitlines()[-1]


@pytest.mark.parametrize("topology", TRIO)
@pytest.mark.parametrize("where", ["in a step", "after the log"])
def test_a_stopped_run_goes_on_bit_for_bit(finished, run, topology, where, tmp_path, monkeypatch):
    """Ctrl-C in epoch 2; or a kill between its log and its checkpoint: no row counts twice."""
    flags = f"{TRIO[topology]} --switch fixed:0.2"
    with monkeypatch.context() as patch:
        calls, name = itertools.count(1), "log_columns" if where == "in a step" else "save_file"
        owner, stop = (switokd, 5 + 3) if where == "in a step" else (common, 1 + 2)
        original = getattr(owner, name)

        def stopping(*args):  # save_file: .writable, then the checkpoint of each epoch
            if next(calls) == stop:
                raise KeyboardInterrupt
            return original(*args)
        patch.setattr(owner, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, flags)
    assert len(weights(tmp_path / "checkpoint.pt")["rows"]) == 1
    assert len(log(tmp_path)) == (5 if where == "in a step" else 10)
    run(tmp_path, flags + " --resume")
    whole = finished(topology).folder
    assert (tmp_path / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    for name in FILES[topology]:
        assert same(weights(tmp_path / f"{name}.pt"), weights(whole / f"{name}.pt"))
    with pytest.raises(common.InputError, match="finished"):
        run(tmp_path, flags)


def test_resume_without_its_log_is_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls, original = itertools.count(1), switokd.log_columns

        def stopping(found):
            if next(calls) == 8:
                raise KeyboardInterrupt
            return original(found)
        patch.setattr(switokd, "log_columns", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, TRIO["pair"])
    (tmp_path / "log.csv").unlink()
    with pytest.raises(common.InputError, match=r"log\.csv is missing"):
        run(tmp_path, TRIO["pair"] + " --resume")


def table(printed):
    """The last table of a run: {row name: cells}."""
    lines = printed.split("\nSwitOKD on ")[-1].splitlines()[1:]
    header, *rows = [re.split(r" {2,}", line.strip()) for line in lines if line.strip()]
    return {row[0]: dict(zip(header[1:], row[1:])) for row in rows}


def test_compare_prints_every_control(run, tmp_path):
    """Each control is the run that its own flags give, and the never-run is never paused."""
    flags = f"{TRIO['pair']} --compare --cache {tmp_path / 'cache'}"
    found = table(run(tmp_path / "all", flags))
    assert list(found) == ["each network alone", "KD, finished teacher", "never paused (DML)",
                           "fixed:0.2", "fixed:0.6", "fixed:0.8", "SwitOKD"]
    assert list(found["SwitOKD"]) == ["teacher", "test", "best", "gap", "paused", "switches",
                                      "expert_run", "seconds", "saved", "bound"]
    assert found["never paused (DML)"]["paused"] == found["never paused (DML)"]["saved"] == "0.0"
    assert found["KD, finished teacher"]["teacher"] == found["each network alone"]["teacher"]
    assert float(found["fixed:0.2"]["paused"]) > 0 and found["KD, finished teacher"]["gap"] == "-"
    own = table(run(tmp_path / "own", TRIO["pair"] + " --switch fixed:0.2"))["fixed:0.2"]
    for column in ("teacher", "test", "gap", "paused", "switches"):
        assert own[column] == found["fixed:0.2"][column]
    again = run(tmp_path / "all", flags + " --resume")
    assert table(again).keys() == found.keys() and "img/s" not in again
    data = common.load_data("shapes", None, None, 1.0, 0, 0, 0, torch.device("cpu"))
    alone = common.build_model("resnet8", 20, 16)  # the KD control learned from this teacher
    file, = (tmp_path / "cache").glob("shapes-resnet8-3-*/epoch-0003.pt")
    alone.load_state_dict(weights(file))
    arguments = Namespace(device=torch.device("cpu"), precision="fp32")
    assert f"{common.evaluate(alone, data.test, arguments):.2f}" == found["each network alone"][
        "teacher"]


def test_compare_of_named_rules_and_several_seeds(run, tmp_path):
    printed = run(tmp_path, TRIO["1t2s"] + " --switch never --compare fixed:0.5 --seed 0 1")
    found = table(printed)
    assert list(found) == ["each network alone", "KD, finished teacher", "fixed:0.5, 1T2S",
                           "SwitOKD, 1T2S", "never paused (DML), 1T2S"]
    assert all("±" in row["test"] and "student_1" in row for row in found.values())
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        assert {path.parent.name for path in folder.rglob("student-1.pt")} == {
            f"seed-{seed}", "compare-adaptive", "compare-fixed-0.5", "kd"}


def test_the_student_alone_starts_as_the_student_of_the_pair():
    data = SimpleNamespace(classes=20, image_size=16)
    arguments = switokd.parse_args(f"{TINY} {TRIO['1t2s']}".split())
    arguments.seed = 3
    students, teachers = switokd.build_networks(data, arguments)
    for network, name, seed in ((students[0], "resnet8", 3), (students[1], "resnet8x0.5", 4),
                                (teachers[0], "resnet8", 1003)):
        alone = common.build_model(name, 20, 16, seed)
        assert same(network.state_dict(), alone.state_dict())


def test_time_saved_and_its_bound():
    """Hand-made costs: forward 1, update 2 for the student; 10 and 20 for the teacher."""
    steps = [{"mode": mode} for mode in ("expert", "learning", "expert", "learning")]
    arguments = SimpleNamespace(topology="pair", student=["a"], teacher=["b"])
    found = switokd.time_saved(steps, 92.0, [[1, 2], [10, 20]], arguments)
    assert found["saved"] == 2 * 20  # two pauses of one update each
    assert found["bound"] == pytest.approx(2 / 3 * 0.5 * (30 / 33) * (92 + 40))
    assert found["saved"] == pytest.approx(found["bound"])  # 4 x 33 s, an update twice a forward


def test_a_loss_that_is_not_finite_stops(run, tmp_path):
    with pytest.raises(common.InputError, match="'L_[st]' is not finite"):
        run(tmp_path, TRIO["pair"] + " --learning-rate 1e30 --switch never")


def test_bf16_runs_and_keeps_float32_logits(run, tmp_path, monkeypatch):
    """The forward is autocast, decision and losses are not."""
    seen, original = [], switokd.kl_to

    def spy(peer, own, temperature):
        seen.append((peer.dtype, own.dtype))
        return original(peer, own, temperature)
    monkeypatch.setattr(switokd, "kl_to", spy)
    run(tmp_path, TRIO["pair"] + " --precision bf16 --epochs 1 --train-fraction 0.5")
    assert set(seen) == {(torch.float32, torch.float32)}
    arguments = switokd.parse_args(f"{TINY} {TRIO['pair']} --precision bf16".split())
    arguments.seed = 0
    student = switokd.build_networks(SimpleNamespace(classes=20, image_size=16), arguments)[0][0]
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = common.build_model("resnet8x0.5", 20, 16, 0)(x)
    assert student(x).dtype == torch.float32
    assert 0 < (student(x) - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_batch_larger_than_the_training_set_is_refused(run, tmp_path):
    with pytest.raises(common.InputError, match="--batch-size 500"):
        run(tmp_path, TRIO["pair"] + " --batch-size 500")
    assert not list(tmp_path.iterdir())


def test_both_networks_learn_the_shapes(tmp_path, run, monkeypatch):
    """20 classes, chance 5 %: teacher and student must pass 30 %, and the gap must shrink."""
    monkeypatch.setattr(common, "SHAPES_TRAIN", 1500)
    run(tmp_path, "--teacher resnet8 --student resnet8x0.5 --epochs 8 --batch-size 32 "
                  "--learning-rate 0.05")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert min(rows[-1]["teacher"], rows[-1]["test"]) > 30
    assert rows[-1]["gap"] < max(row["gap"] for row in rows) and rows[-1]["L_s"] < rows[0]["L_s"]


def test_the_summary_counts_the_teacher_not_the_votes():
    """1T2S: alternating split votes never pause the teacher; 2T1S: two teachers, 3 + 1 pauses."""
    e, w = "expert", "learning"
    votes = [[e, w], [w, e], [e, e], [e, e], [w, w], [e, e]]
    steps = [{"mode_1": a, "mode_2": b, "gap_1": 1.0, "gap_2": 2.0} for a, b in votes]
    found = switokd.switching_summary(steps, "1t2s")
    assert found == {"gap": 1.5, "paused": 50.0, "switches": 3, "expert_run": 1.5,
                     "paused_updates": [3]}
    found = switokd.switching_summary(steps[:4], "2t1s")
    assert (found["paused_updates"], found["switches"], found["expert_run"]) == ([3, 3], 3, 2.0)
    assert switokd.switching_summary(steps[:2], "1t2s")["paused"] == 0


@pytest.mark.parametrize("flags, names", [
    ("--switch never --compare adaptive", ["SwitOKD", "never paused (DML)"]),
    ("--compare never adaptive never", ["never paused (DML)", "SwitOKD"]),
    ("", ["SwitOKD"]), ("--switch fixed:0.2 --compare fixed:0.2", ["SwitOKD", "fixed:0.2"])])
def test_no_rule_runs_twice(flags, names, tmp_path, run):
    found = table(run(tmp_path, f"{TRIO['pair']} --epochs 1 {flags}"))
    assert [name for name in found if name not in ("each network alone", "KD, finished teacher")
            ] == names


@pytest.mark.parametrize("flags, rates", [
    ("", [0.01, 0.1]), ("--learning-rate 0.05", [0.05, 0.05]), ("--student resnet8", [0.1, 0.1]),
    ("--student-learning-rate 0.2", [0.2, 0.1]),
    ("--topology 1t2s --learning-rate 0.3 --student-learning-rate 0.1 0.2", [0.1, 0.2, 0.3])])
def test_rates_that_were_typed_count(flags, rates):
    arguments = switokd.parse_args(f"--device cpu --dataset cifar100 {flags}".split())
    assert [rate[0] for rate in switokd.network_rates(arguments)] == rates


def test_open_set(run, tmp_path):
    found = table(run(tmp_path, TRIO["pair"] + " --open-set 4 --epochs 1"))["SwitOKD"]
    assert 0 <= float(found["rank1"]) <= 100 and 0 <= float(found["verification"]) <= 100


def test_pictures(run, finished, tmp_path):
    pytest.importorskip("matplotlib")
    printed = run(tmp_path, TRIO["2t1s"] + " --compare never --plot")
    names = ["degeneration.png", "gap.png", "rule.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all(name in printed for name in names)
    run(finished("pair").folder, f"{TRIO['pair']} --switch fixed:0.2 --plot --resume")
    assert len(list(finished("pair").folder.glob("*.png"))) == 3


def test_cifar100_from_its_own_archive(tmp_path):
    """The released pair on a small archive in the format of CIFAR-100, as a process."""
    inner, random = tmp_path / "cifar-100-python", np.random.default_rng(0)
    inner.mkdir()
    for part, count in (("train", 200), ("test", 100)):
        labels = np.arange(count) % 100
        with open(inner / part, "wb") as file:
            pickle.dump({b"data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
                         b"fine_labels": labels.tolist()}, file)
    done = subprocess.run(
        [sys.executable, ROOT / "switokd.py", "--dataset", "cifar100", "--data", tmp_path,
         "--epochs", "1", "--device", "cpu", "--out", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "teacher wrn_16_2, student mobilenetv2" in done.stdout
    student = common.build_model("mobilenetv2", 100, 32)
    student.load_state_dict(weights(tmp_path / "out" / "student.pt"))


def readme_commands():
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"python switokd\.py[^`\n|]*", text)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme(command, tmp_path, run, monkeypatch):
    """Every command is parsed as typed; those on the embedded set are run, made tiny."""
    flags = shlex.split(command)[2:]
    if "--plot" in flags:
        pytest.importorskip("matplotlib")
    switokd.parse_args(flags)
    if "--dataset" not in flags and "--help" not in flags:
        monkeypatch.chdir(tmp_path)
        run(tmp_path / "out", " ".join([*flags, "--epochs 1 --train-fraction 0.5"]))


def test_help_names_every_flag_quickly():
    done = subprocess.run([sys.executable, ROOT / "switokd.py", "--help"], capture_output=True,
                          text=True, check=True, timeout=60)
    for flag in ("--topology", "--switch", "--temperature", "--compare", "--plot", "--resume"):
        assert flag in done.stdout
    assert "--teacher-weights" not in done.stdout
