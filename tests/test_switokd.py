"""SwitOKD against its specification: every line of its section 11, oracles, gradients, tiny runs.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give. Networks
that return a logit parameter put any case into a step, whose logits are float32.
"""

import copy
import importlib.util
import itertools
import shlex
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT, log, readme_commands, refused, result_of, same, same_run, shapes_data, stopped, table,
    weights)
from torch import nn

import common
import switokd

DIGITS = 1e-6  # the goldens have six decimals
FLOAT32 = 2e-6  # the same, computed in float32
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
THREE = {  # topology; logits of students, then teachers; mode, G, delta, t of each pair; losses
    "two teachers": ("2t1s", [
        [[1, 1, 1], [0, 1, 3]], [[2, 0, 0], [1, 2, 0]], [[1, 0, 1], [1, 1, 1]]],
        [("expert", 1.207417, 1.130454, 0.547773), ("learning", 0.688432, 0.754996, 1.244348)],
        [2.961386, None, 1.600407]),
    "one vote": ("1t2s", [
        [[1, 3, 1], [0, 2, 0]], [[0, 3, 0], [0, 0, 0]], [[0, 0, 0], [0, 3, 0]]],
        [("learning", 0.576110, 0.602110, 0.757224), ("expert", 1.152219, 1.070621, 0.757224)],
        [1.767875, 3.211648, 0.847483]),
    "full pause": ("1t2s", [
        [[0, 0, 2], [0, 0, 0]], [[3, 1, 1], [2, 1, 1]], [[0, 1, 1], [0, 3, 0]]],
        [("expert", 0.940777, 0.917265, 0.935195), ("expert", 1.329125, 0.424116, 0.935195)],
        [2.965984, 2.661241, None])}


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
    """SGD with momentum and weight decay for each name, its momentum buffers full."""
    made = {name: torch.optim.SGD(network.parameters(), rate, 0.9, weight_decay=0.1)
            for name, network in networks.items()}
    for name, network in networks.items() if warm else ():
        z, rates = network.z.detach().clone(), made[name].param_groups[0]
        network.z.grad, rates["lr"] = torch.ones_like(network.z), 0.0
        made[name].step()
        rates["lr"], network.z.grad = rate, None
        momentum = made[name].state[network.z]["momentum_buffer"]
        assert torch.equal(network.z, z) and momentum.any()
    return made


NAMES = {  # (students, teachers)
    "pair": (["student"], ["teacher"]), "2t1s": (["student"], ["teacher-1", "teacher-2"]),
    "1t2s": (["student-1", "student-2"], ["teacher"])}


def step(*case, rate=0.1, tau=1.0, switch="adaptive", topology="pair"):
    """A step on logits, of the students, then of the teachers. Its losses as floats, its pairs,
    and the networks: as they were before, now, and their optimizers."""
    students, teachers = NAMES[topology]
    networks = {name: Logits(z) for name, z in zip([*students, *teachers], case, strict=True)}
    before = copy.deepcopy(networks)
    sgd = optimizers(networks, rate)
    for name, network in before.items():
        network.momentum = [state["momentum_buffer"].clone() for state in sgd[name].state.values()]
    losses, logits, pairs = switokd.train_step(
        {name: networks[name] for name in students}, {name: networks[name] for name in teachers},
        sgd, X, LABELS, tau, switch)
    assert list(losses) == list(logits) == list(networks)
    for name, z in zip(networks, case):
        assert logits[name].dtype == torch.float32 and not logits[name].requires_grad
        assert logits[name].numpy() == pytest.approx(np.asarray(z, float), rel=1e-6)
    losses = {name: loss if loss is None else loss.item() for name, loss in losses.items()}
    return SimpleNamespace(losses=losses, pairs=pairs, before=before, now=networks, sgd=sgd,
                           modes=[pair.mode for pair in pairs.values()])


def paused_truly(found, paused):
    """Of these alone are parameters, gradients and momentum bit-identical to before the step; the
    batch norm of every network moves on, in ONE forward."""
    for name, now in found.now.items():
        before, state = found.before[name], found.sgd[name].state.values()
        kept = (same(dict(before.named_parameters()), dict(now.named_parameters()))
                and all(p.grad is None for p in now.parameters())
                and all(map(torch.equal, before.momentum, (s["momentum_buffer"] for s in state))))
        assert kept == (name in paused)
        assert now.norm.num_batches_tracked == now.calls == 1
        assert not torch.equal(now.norm.running_mean, before.norm.running_mean)


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
    found = step(z_s, z_t, tau=tau)
    (names, pair), = found.pairs.items()
    assert names == ("student", "teacher") and pair.mode == mode
    assert pair[1:] == pytest.approx((G, delta, eps, s, t), abs=FLOAT32)
    assert pair._fields == ("mode", "gap", "threshold", "epsilon", "student_distance",
                            "teacher_distance")
    assert all(type(value) is float for value in pair[1:])
    assert found.losses["student"] == pytest.approx(L_s, abs=FLOAT32)
    assert found.losses["teacher"] == (L_t and pytest.approx(L_t, abs=FLOAT32))
    paused_truly(found, {"teacher"} if mode == "expert" else set())


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
    *[(name, "never", "learning") for name in CASES], *[(name, "kd", "expert") for name in CASES]])
def test_switches(case, switch, mode):
    z_s, z_t, tau = CASES[case]
    found, adaptive = (step(z_s, z_t, tau=tau, switch=kind) for kind in (switch, "adaptive"))
    assert found.modes == [mode] and (found.losses["teacher"] is None) == (mode == "expert")
    (pair,), (other,) = found.pairs.values(), adaptive.pairs.values()
    if switch in ("never", "kd"):  # the adaptive numbers are logged all the same
        assert pair[1:] == other[1:]
    else:
        assert pair.threshold == pytest.approx(float(switch[6:])) and np.isnan(pair.epsilon)


@pytest.mark.parametrize("switch", ["always", "fixed", "fixed:", "fixed:x", ""])
def test_an_unknown_switch_is_refused(switch):
    with pytest.raises(ValueError, match=f"'{switch.removeprefix('fixed:')}'"):
        step(*CASES["A"][:2], switch=switch)


def test_updates_are_simultaneous():
    """Case B: SGD from the SAME old logits for both; a second forward would show."""
    z_s, z_t, _ = CASES["B"]
    student, teacher = Logits(z_s), Logits(z_t)
    sgd = {name: torch.optim.SGD(network.parameters(), 0.5)
           for name, network in (("student", student), ("teacher", teacher))}
    switokd.train_step({"student": student}, {"teacher": teacher}, sgd, X, LABELS)
    for network, own, peer in ((student, z_s, z_t), (teacher, z_t, z_s)):
        p_own, p_peer = np.exp(log_p(own)), np.exp(log_p(peer))
        wanted = own - 0.5 * (2 * p_own - Y - p_peer) / 2
        assert network.z.detach().numpy() == pytest.approx(wanted, abs=1e-6)
        assert network.calls == 1 and network.mode == (True, True)  # train mode, one forward


def networks_of_shapes():
    """(students, teachers, optimizers, images, labels), real networks."""
    networks = {"student": common.build_model("resnet8x0.5", 20, 16, 0),
                "teacher": common.build_model("resnet8", 20, 16, 1000)}
    sgd = {name: torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)
           for name, network in networks.items()}
    images, labels, _ = common.make_shapes(64, 16, 0)
    return ({"student": networks["student"]}, {"teacher": networks["teacher"]}, sgd,
            images.float() / 255 - 0.4, labels)


def plain_mutual_step(students, teachers, sgd, images, labels):
    """Deep mutual learning, written here: both networks, both losses."""
    student, teacher, F = students["student"], teachers["teacher"], nn.functional
    z_s, z_t = student(images), teacher(images)
    for own, peer, optimizer in ((z_s, z_t, sgd["student"]), (z_t, z_s, sgd["teacher"])):
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
                switokd.train_step(*setting, switch=name)
        runs[name] = [network.state_dict() for part in setting[:2] for network in part.values()]
    for role in (0, 1):
        assert same(runs["adaptive"][role], runs["never"][role])
        assert same(runs["adaptive"][role], runs["by hand"][role])


# ------------------------------------------------------------------------------- three networks
@pytest.mark.parametrize("name", THREE)
def test_goldens_of_three_networks(name):
    """A paused teacher stays bit-identical but for its batch norm, and still serves as a peer."""
    topology, case, pairs, losses = THREE[name]
    found, (students, teachers) = step(*case, topology=topology), NAMES[topology]
    assert list(found.pairs) == [(student, teacher) for teacher in teachers for student in students]
    for pair, (mode, *values) in zip(found.pairs.values(), pairs, strict=True):
        assert pair.mode == mode
        assert (pair.gap, pair.threshold, pair.teacher_distance) == pytest.approx(values,
                                                                                  abs=FLOAT32)
    for loss, wanted in zip(found.losses.values(), losses, strict=True):
        assert loss == (wanted and pytest.approx(wanted, abs=FLOAT32))
    paused_truly(found, {own for own, loss in found.losses.items() if loss is None})


def test_each_pair_has_its_own_epsilon():
    """With the eps of the other pair, as released, both pairs below would be in expert mode."""
    s, t1, t2 = THREE["two teachers"][1]
    (s, own, G, *_), other = numbers(s, t2), numbers(s, t1)
    slip = s - other[3] * own
    assert slip == pytest.approx(0.593796, abs=DIGITS) and G > slip and own < s
    s1, s2, t = THREE["one vote"][1]
    (s, own, G, *_), other = numbers(s1, t), numbers(s2, t)
    slip = s - other[3] * own
    assert slip == pytest.approx(0.555740, abs=DIGITS) and G > slip and own < s


def test_a_step_on_a_loss_of_zero_would_move_the_teacher():
    """The released full pause, with warm momentum and decay; ours: `paused_truly` above."""
    still = Logits(THREE["full pause"][1][2])
    before, sgd = still.z.detach().clone(), optimizers({"teacher": still})["teacher"]
    (0 * still(X).sum()).backward()
    sgd.step()
    assert not torch.equal(still.z, before)


@pytest.mark.parametrize("topology", NAMES)
@pytest.mark.parametrize("switch", ["adaptive", "never", "kd"])
@pytest.mark.parametrize("tau", [1, 2])
def test_gradients_and_losses_on_random_logits(topology, switch, tau):
    """Eqs. (5), (7), (8), (11), (12): each network by its own loss, peers as constants."""
    random, seen, (students, teachers) = np.random.default_rng(4), set(), NAMES[topology]
    for _ in range(25):
        case = random.normal(0, 2, (len(students + teachers), 2, 3))
        found = step(*case, rate=0.0, tau=tau, switch=switch, topology=topology)
        seen.add(tuple(found.modes))
        z = dict(zip([*students, *teachers], case))
        p = {name: np.exp(log_p(one, tau)) for name, one in z.items()}
        expert = {}
        for (student, teacher), pair in found.pairs.items():
            s, t, G, eps, delta = numbers(z[student], z[teacher], tau=tau)
            expert[student, teacher] = switch == "kd" or G > delta and t < s and switch != "never"
            assert pair.mode == ("expert" if expert[student, teacher] else "learning")
            assert pair[1:] == pytest.approx((G, delta, eps, s, t), abs=1e-5)
        for own in z:
            if own in teachers and all(expert[student, own] for student in students):
                assert found.now[own].z.grad is None and found.losses[own] is None
                continue
            others = [name for name in z if name != own and not expert.get((name, own))]
            soft = sum((p[own] - p[other]) / tau for other in others)
            wanted = (np.exp(log_p(z[own])) - Y + soft) / 2
            assert found.now[own].z.grad.numpy() == pytest.approx(wanted, abs=1e-6)
            loss = ce(z[own]) + sum(kl(z[other], z[own], tau) for other in others)
            assert found.losses[own] == pytest.approx(loss, rel=1e-5)
    assert len(seen) > 1 or switch != "adaptive"


def test_kd_leaves_a_finished_teacher_as_it_is():
    """Frozen, in eval mode, without an optimizer; even the batch norm does not move."""
    teacher, student = common.frozen(Logits(CASES["B"][1])), {"student": Logits(CASES["B"][0])}
    before = copy.deepcopy(teacher.state_dict())
    switokd.train_step(student, {"teacher": teacher}, optimizers(student), X, LABELS, 1.0, "kd")
    assert same(before, teacher.state_dict()) and not teacher.mode[0] and teacher.calls == 1


def test_bf16_is_the_forward_alone():
    """Under autocast the logits differ a little; all that follows is float32."""
    exact, rough = (switokd.train_step(*networks_of_shapes(), precision=precision)
                    for precision in ("fp32", "bf16"))
    for name, logits in rough[1].items():
        gap = (logits - exact[1][name]).abs().max()
        assert logits.dtype == torch.float32 and 0 < gap < 0.1 * exact[1][name].abs().max()
        assert rough[0][name].dtype == torch.float32
        assert rough[0][name].item() == pytest.approx(exact[0][name].item(), rel=0.05)


# ----------------------------------------------------------------------------- schedule and flags
def exponents(rates, initial):
    return [round(float(np.log10(initial / rate)), 6) for rate in rates]


def rates_of(arguments):
    """The rates of each student, then of each teacher."""
    students, teachers = switokd.roles(Namespace(**{**vars(arguments), "seed": 0}))
    return [role.rates for role in (students | teachers).values()]


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
     (20, 24, 28)),
    ("--dataset fashionmnist --schedule paper", ["resnet8x0.5", "resnet20"], 30, 128, 5e-4,
     [0.1, 0.1], (16, 21, 26)),
    ("--dataset cifar10 --epochs 30", ["wrn_16_1", "wrn_16_8"], 30, 128, 5e-4, [0.1, 0.1],
     (16, 21, 26)),
    ("", ["resnet8x0.5", "resnet14"], 12, 64, 5e-4, [0.1, 0.1], (9, 10, 12))])
def test_recipes(flags, networks, epochs, batch, decay, initial, drops):
    """Section 6: networks (students, then teachers), epochs, rates and where they drop (from 1)."""
    arguments = switokd.parse_args(["--device", "cpu", *flags.split()])
    assert [*arguments.student, *arguments.teacher] == networks
    assert (arguments.epochs, arguments.batch_size, arguments.weight_decay) == (
        epochs, batch, decay)
    assert (arguments.momentum, arguments.temperature, arguments.switch) == (0.9, 1, "adaptive")
    assert getattr(arguments, "nesterov", False) == (arguments.dataset == "shapes")
    rates = rates_of(arguments)
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
    line = refused("switokd", flags, capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("flags, rates", [
    ("", [0.01, 0.1]), ("--learning-rate 0.05", [0.05, 0.05]), ("--student resnet8", [0.1, 0.1]),
    ("--student-learning-rate 0.2", [0.2, 0.1]),
    ("--topology 1t2s --student-learning-rate 0.2", [0.2, 0.2, 0.1]),
    ("--topology 1t2s --learning-rate 0.3 --student-learning-rate 0.1 0.2", [0.1, 0.2, 0.3])])
def test_rates_that_were_typed_count(flags, rates):
    arguments = switokd.parse_args(f"--device cpu --dataset cifar100 {flags}".split())
    assert [rate[0] for rate in rates_of(arguments)] == rates


@pytest.mark.parametrize("command", readme_commands("switokd"))
def test_documented_commands_are_parsed_as_typed(command):
    switokd.parse_args(shlex.split(command))


# ------------------------------------------------------------------------------------------ runs
TRIO = {"pair": "", "2t1s": "--topology 2t1s --teacher resnet8x0.5 resnet8",
        "1t2s": "--topology 1t2s --student resnet8 resnet8x0.5"}
SMALLER = {"pair": "student", "2t1s": "teacher-1", "1t2s": "student-2"}  # resnet8x0.5 as well
STEPS = 6  # of an epoch: 260 images, 50 a step
CPU = Namespace(device=torch.device("cpu"), precision="fp32")


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """topology -> a finished run, with a threshold low enough to switch."""
    memory = {}

    def once(topology):
        if topology not in memory:
            folder = tmp_path_factory.mktemp(topology)
            printed = run("switokd", folder, f"--switch fixed:0.2 {TRIO[topology]}")
            memory[topology] = SimpleNamespace(folder=folder, printed=printed)
        return memory[topology]
    return once


@pytest.mark.parametrize("topology", TRIO)
def test_what_a_run_leaves(finished, topology):
    """A row a pair a step in steps.csv, its means in log.csv, the summary in result.json, and
    weights that give the last accuracy."""
    folder, (students, teachers) = finished(topology).folder, NAMES[topology]
    result, lines = result_of(folder), log(folder, "steps.csv")
    pairs = [(student, teacher) for teacher in teachers for student in students]
    assert [(line["epoch"], line["step"], line["student"], line["teacher"]) for line in lines] == [
        (str(epoch), str(k), *pair) for epoch in (1, 2) for k in range(1, STEPS + 1)
        for pair in pairs]
    for line in lines:
        s, t, G, delta = (float(line[name]) for name in (
            "student_distance", "teacher_distance", "gap", "threshold"))
        assert delta == pytest.approx(0.2) and line["epsilon"] == "nan"
        assert (line["mode"] == "expert") == (G > delta and t < s)
    assert {line["mode"] for line in lines} == {"expert", "learning"}, "must switch"
    modes = {pair: [line["mode"] for line in lines if (line["student"], line["teacher"]) == pair]
             for pair in pairs}
    paused = [[set(at) == {"expert"} for at in zip(*(modes[student, own] for student in students))]
              for own in teachers]
    for row in result["rows"]:
        mine = [line for line in lines if int(line["epoch"]) == row["epoch"]]
        for column, name in (("gap", "gap"), ("delta", "threshold")):
            assert row[column] == pytest.approx(np.mean([float(line[name]) for line in mine]))
        now = slice(STEPS * (row["epoch"] - 1), STEPS * row["epoch"])
        assert row["paused"] == pytest.approx(100 * np.mean([flags[now] for flags in paused]))
        for own, flags in zip(teachers, paused):
            assert (row[f"L_{own}"] is None) == all(flags[now])
    found = result["measures"]
    assert found["gap"] == pytest.approx(np.mean([float(line["gap"]) for line in lines]))
    assert found["paused"] == pytest.approx(100 * np.mean(paused))
    assert found["paused_updates"] == [sum(flags) for flags in paused]
    assert found["switches"] == sum(a != b for flags in paused for a, b in zip(flags, flags[1:]))
    pauses = [len([*group]) for flags in paused for key, group in itertools.groupby(flags) if key]
    assert found["expert_run"] == pytest.approx(np.mean(pauses or [0]))
    assert result["images"] == {
        "each network forward": 2 * 260, "each student backward": 2 * 260,
        **{f"{own} backward, share": pytest.approx(1 - np.mean(flags))
           for own, flags in zip(teachers, paused)}}
    data, models = shapes_data(), {**dict.fromkeys([*students, *teachers], "resnet8"),
                                   "student": "resnet8x0.5", SMALLER[topology]: "resnet8x0.5"}
    assert {path.stem for path in folder.glob("*.pt")} == {*models}
    for own, model in models.items():
        network = common.build_model(model, 20, 16, seed=9)
        network.load_state_dict(weights(folder / f"{own}.pt"))
        column = "test" if own in ("student", "student-2") else own
        assert common.evaluate(network, data.test, CPU) == pytest.approx(result["rows"][-1][column])
    row = table(finished(topology).printed)["fixed:0.2"]
    assert row["test"] == f"{result['rows'][-1]['test']:.2f}"
    assert row["switches"] == str(found["switches"]) and row["paused"] == f"{found['paused']:.1f}"


@pytest.mark.parametrize("where", ["in a step", "after the steps"])
def test_a_stopped_run_goes_on_bit_for_bit(finished, run, where, tmp_path, monkeypatch):
    """Ctrl-C in epoch 2; or between its steps.csv and its checkpoint: no step counts twice."""
    flags = f"--switch fixed:0.2 {TRIO['2t1s']}"
    with monkeypatch.context() as patch:
        if where == "in a step":
            stopped(patch, switokd, "train_step", STEPS + 3)
        else:
            stopped(patch, common, "save_file", 2)
        with pytest.raises(KeyboardInterrupt):
            run("switokd", tmp_path, flags)
    assert len(log(tmp_path, "steps.csv")) == 2 * STEPS * (1 if where == "in a step" else 2)
    run("switokd", tmp_path, flags + " --resume")
    whole = finished("2t1s").folder
    assert same_run(tmp_path, whole)
    assert (tmp_path / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()


def test_compare_prints_every_control(run, tmp_path):
    """Each control is the run that its own flags give; kd learned from the teacher alone."""
    flags = "--open-set 4 --train-fraction 0.7"
    found = table(run("switokd", tmp_path / "all", f"--compare {flags}"))
    assert list(found) == ["each network alone", "adaptive", "kd", "never", "fixed:0.2",
                           "fixed:0.6", "fixed:0.8"]
    assert list(found["adaptive"]) == ["test", "best", "teacher", "gap", "paused", "switches",
                                       "expert_run", "rank1", "verification", "epochs", "seconds"]
    assert found["never"]["paused"] == found["never"]["switches"] + ".0" == "0.0"
    assert [found["kd"][name] for name in ("paused", "switches", "expert_run")] == ["-"] * 3
    assert found["kd"]["teacher"] == found["each network alone"]["teacher"]
    assert float(found["fixed:0.2"]["paused"]) > 0
    run("switokd", tmp_path / "own", f"--switch fixed:0.2 {flags}")
    assert same_run(tmp_path / "own", tmp_path / "all" / "fixed-0.2")


def test_kd_alone_of_three_networks(run, tmp_path):
    """Frozen teachers leave no loss, no pause and no weights; their training is in the seconds."""
    flags, data = f"{TRIO['1t2s']} --switch kd --open-set 4", shapes_data(open_set=4)
    found, rows = table(run("switokd", tmp_path, flags)), result_of(tmp_path)["rows"]
    assert list(found) == ["each network alone", "kd"]
    assert all(row["L_teacher"] is row["paused"] is None for row in rows)
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"student", "student-1", "student-2"}
    seen = 2 * len(data.train)
    assert result_of(tmp_path)["images"] == {"each network forward": seen,
                                             "each student backward": seen}

    def network(model, file):
        return common.load_weights(common.build_model(model, 16, 16), file)

    def alone(model, seed):
        wanted = {"seed": seed, "classes": 16, "train": data.train.fingerprint()}
        (folder,) = [place for place in run.cache.glob(f"shapes-{model}-2-*")
                     if wanted.items() <= result_of(place)["arguments"].items()]
        return folder
    teacher, student = alone("resnet8", 1000), alone("resnet8x0.5", 1)
    accuracy = common.evaluate(network("resnet8", teacher / "epoch-0002.pt"), data.test, CPU)
    assert [row["teacher"] for row in rows] == pytest.approx([accuracy] * 2)
    assert found["each network alone"]["teacher"] == f"{accuracy:.2f}"
    own, before = (sum(row["s"] for row in each) for each in (rows, result_of(teacher)["rows"]))
    assert float(found["kd"]["seconds"]) == pytest.approx(own + before, abs=0.51)
    ranks = {}  # recognition is that of the second, smaller student
    for run_name, file in (("kd", tmp_path / "student-2.pt"),
                           ("each network alone", student / "epoch-0002.pt")):
        ranks[run_name] = common.recognition(network("resnet8x0.5", file), data, CPU)["rank1"]
        assert found[run_name]["rank1"] == f"{ranks[run_name]:.1f}"
        assert found[run_name]["epochs"] == "2"
    other = common.recognition(network("resnet8", tmp_path / "student-1.pt"), data, CPU)["rank1"]
    assert ranks["kd"] != other  # else nothing was told apart


def test_the_loop_takes_what_the_flags_say(run, tmp_path, monkeypatch):
    """Temperature, rule and precision of every step; a schedule and train mode for each network."""
    calls, original = [], switokd.train_step

    def spy(students, teachers, optimizers, images, labels, *settings):
        rates = [optimizers[name].param_groups[0]["lr"] for name in students | teachers]
        modes = {network.training for network in (students | teachers).values()}
        calls.append((*settings, modes, rates))
        return original(students, teachers, optimizers, images, labels, *settings)
    monkeypatch.setattr(switokd, "train_step", spy)
    run("switokd", tmp_path, f"{TRIO['1t2s']} --switch fixed:0.4 --temperature 2 --precision bf16 "
        "--learning-rate 0.3 --student-learning-rate 0.1 0.2 --train-fraction 0.5 --schedule paper")
    half = len(calls) // 2
    for k, (*settings, modes, rates) in enumerate(calls):
        assert settings == [2.0, "fixed:0.4", "bf16"] and modes == {True}
        first = [0.1, 0.2, 0.3]  # both epochs of (lr): 1, then 1/10
        assert rates == pytest.approx(first if k < half else [rate / 10 for rate in first])


def test_compare_of_named_rules_and_several_seeds(run, tmp_path):
    """kd and the named rules, none of them twice."""
    flags = "--epochs 1 --train-fraction 0.5 --switch never --compare fixed:0.5 never --seed 0 1"
    found = table(run("switokd", tmp_path, flags))
    assert list(found) == ["each network alone", "never", "kd", "fixed:0.5", "adaptive"]
    assert all("±" in row["test"] and "±" in row["teacher"] for row in found.values())
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        assert {path.parent.name for path in folder.rglob("student.pt")} == {
            f"seed-{seed}", "adaptive", "fixed-0.5", "kd"}


def test_every_network_starts_from_a_seed_of_its_own():
    arguments = switokd.parse_args(["--topology", "1t2s"])
    arguments.seed = 3
    for of, seeds in zip(switokd.roles(arguments), ([3, 4], [1003])):
        built = switokd.build_networks(of, SimpleNamespace(classes=20, image_size=16), "cpu")
        for (name, role), seed in zip(of.items(), seeds, strict=True):
            alone = common.build_model(role.model, 20, 16, seed)
            assert same(built[name].state_dict(), alone.state_dict()) and role.seed == seed


def test_the_summary_counts_each_teacher():
    yes, no = True, False
    found = switokd.switching({"a": [no, yes, yes, no, yes, no], "b": [yes, yes, no, no, no, no]})
    assert found == {"paused": pytest.approx(100 * 5 / 12), "switches": 5,
                     "expert_run": pytest.approx(5 / 3), "paused_updates": [3, 2]}
    assert switokd.switching({"a": [no, no]}) == {
        "paused": 0, "switches": 0, "expert_run": 0, "paused_updates": [0]}


def test_a_loss_that_is_not_finite_stops(run, tmp_path):
    with pytest.raises(common.InputError, match="'L_(student|teacher)' is not finite"):
        run("switokd", tmp_path, "--learning-rate 1e30 --switch never")


def test_both_networks_learn_the_shapes(run, tmp_path, monkeypatch):
    """20 classes, chance 5 %: teacher and student must pass 20 %."""
    monkeypatch.setattr(common, "SHAPES_TRAIN", 1200)
    run("switokd", tmp_path, "--epochs 5 --batch-size 32 --learning-rate 0.05")
    rows = result_of(tmp_path)["rows"]
    assert min(rows[-1]["teacher"], rows[-1]["test"]) > 20
    assert rows[-1]["L_student"] < rows[0]["L_student"] and rows[-1]["train"] > rows[0]["train"]


def test_pictures(run, finished, tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    run("switokd", tmp_path, "--epochs 1 --train-fraction 0.5 --compare never")
    for folder in (tmp_path, finished("1t2s").folder):
        figures.main(folder)
        assert sorted(path.name for path in folder.glob("*.png")) == [
            "degeneration.png", "gap.png", "rule.png"]
