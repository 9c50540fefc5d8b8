"""RCO against its specification: oracles, goldens, gradients, and tiny runs under spies.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give.
"""

import importlib
import math
from argparse import Namespace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, result_of, same, table, tiny_cifar, weights
from torch import nn

import common
import rco

DIGITS = 1e-6  # the goldens have six decimals
Z_S, Z_T, Y = [[1, 2, 3], [0, 0, 0]], [[3, 2, 1], [1, -1, 0]], [2, 0]
F_S, F_T = [[1, 2, 0], [0, -1, 3]], [[0, 2, 0], [2, 1, 3]]


def log_p(z, T=1.0):
    """Eq. (1), its logarithm, (B,C)."""
    z = np.asarray(z, float) / T
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(teacher, student, T=1.0):
    """Mean over the batch of sum_c p_t (log p_t - log p_s), from logits."""
    a, b = log_p(teacher, T), log_p(student, T)
    return (np.exp(a) * (a - b)).sum(1).mean()


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y].mean()


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


def clone(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


# --------------------------------------------------------------------- losses, eqs. (1) to (4)
@pytest.mark.parametrize("T, value, scaled, reversed_kl", [
    (1, 0.708319, 0.708319, 0.729707), (2, 0.199289, 0.797155, 0.200907),
    (4, 0.051495, 0.823916, 0.051601)])
def test_kl_golden(T, value, scaled, reversed_kl):
    found = rco.softened_kl(tensor(Z_S), tensor(Z_T), T).item()
    assert (found, T**2 * found) == pytest.approx((value, scaled), abs=DIGITS)
    assert kl(Z_S, Z_T, T) == pytest.approx(reversed_kl, abs=DIGITS)


@pytest.mark.parametrize("settings, value", [
    ((1, 4), 1.577025), ((1, 1), 1.461428), ((0.5, 4), 1.165067), ((0, 4), 0.753109),
    ((), 1.577025)])  # the last: the defaults
def test_kd_golden(settings, value):
    found = rco.kd_loss(tensor(Z_S), tensor(Z_T), torch.tensor(Y), *settings)
    assert found.item() == pytest.approx(value, abs=DIGITS)


@pytest.mark.parametrize("listed, computed", [
    pytest.param(0.804604, ce(Z_S, Y) + kl(Z_T, Z_S, 4), id="no T^2"),
    pytest.param(1.027748, ce(Z_S, Y) + 16 * kl(Z_T, Z_S, 4) / 3, id="mean"),
    pytest.param(1.578730, ce(Z_S, Y) + 16 * kl(Z_S, Z_T, 4), id="reversed KL"),
    pytest.param(1.771817, ce(np.exp(log_p(Z_S)), Y) + 16 * kl(Z_T, Z_S, 4), id="softmax twice"),
    pytest.param(0.788513, 0.5 * ce(Z_S, Y) + 0.5 * 16 * kl(Z_T, Z_S, 4), id="a = 0.5 mix"),
    pytest.param(2.400941, ce(Z_S, Y) + 16 * 2 * kl(Z_T, Z_S, 4), id="sum over the batch")])
def test_the_value_betrays_the_mistake(listed, computed):
    assert computed == pytest.approx(listed, abs=DIGITS)
    assert abs(rco.kd_loss(tensor(Z_S), tensor(Z_T), torch.tensor(Y), 1, 4).item() - listed) > 1e-5


def test_gradient_and_feature_goldens():
    z_s = tensor(Z_S, grad=True)
    rco.kd_loss(z_s, tensor(Z_T), torch.tensor(Y), 1, 4).backward()
    golden = [[-0.284892, 0.122364, 0.162528], [-0.505125, 0.324783, 0.180342]]
    assert z_s.grad.numpy() == pytest.approx(np.array(golden), abs=DIGITS)
    assert rco.hint_loss(tensor(F_S), tensor(F_T)).item() == 2.25
    assert rco.mimic_loss(tensor(F_S), tensor(F_T)).item() == 4.5
    assert np.square(np.subtract(F_S, F_T)).mean() == 1.5  # F.mse_loss, which divides by D too
    for loss in (rco.hint_loss, rco.mimic_loss):
        for other in ((2, 5), (1, 3), (2, 1), (3,)):
            with pytest.raises(ValueError, match="2, 3"):
                loss(tensor(F_S), torch.zeros(other))


@pytest.mark.parametrize("batch, width, weight, T", [(5, 7, 1, 4), (1, 3, 0.3, 1), (8, 20, 2.5, 2)])
def test_losses_and_gradients_on_random_input(batch, width, weight, T):
    """Eqs. (2) to (4) and closed-form gradients: the student's; the teacher gets none."""
    random = np.random.default_rng(batch)
    a, b, y = *random.normal(0, 2, (2, batch, width)), random.integers(0, width, batch)
    hot, squared = np.eye(width)[y], np.square(a - b).sum(1).mean()
    labels, soft = torch.tensor(y), np.exp(log_p(a, T)) - np.exp(log_p(b, T))
    for loss, value, gradient in (
            (lambda s, t: rco.kd_loss(s, t, labels, weight, T),
             ce(a, y) + weight * T**2 * kl(b, a, T), np.exp(log_p(a)) - hot + weight * T * soft),
            (rco.hint_loss, squared / 2, a - b), (rco.mimic_loss, squared, 2 * (a - b))):
        student, teacher = tensor(a, grad=True), tensor(b, grad=True)
        found = loss(student, teacher)
        found.backward()
        assert found.shape == () and found.item() == pytest.approx(value, rel=1e-12)
        assert student.grad.numpy() == pytest.approx(gradient / batch, rel=1e-9, abs=1e-12)
        assert teacher.grad is None


class Toy(nn.Module):
    def __init__(self, seed, width):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 4)
        self.adapter = nn.Linear(width, 5)


@pytest.mark.parametrize("transfer, factors", [
    ("kd", {"ce": 1, "kl": 0.7 * 3**2}), ("hint", {"ce": 1, "kl": 0.7 * 3**2, "hint": 0.3}),
    ("mimic", {"mimic": 1})])
def test_one_step_follows_the_total_loss(transfer, factors):
    """Terms and gradients of (2), of (2) + mu (3), of (4) alone; none for the teacher."""
    student, teacher, T = Toy(0, 3), Toy(1, 5), 3.0
    arguments = Namespace(transfer=transfer, weight=0.7, temperature=T, hint_weight=0.3,
                          precision="fp32", device=torch.device("cpu"))
    x, y, still = torch.randn(9, 6), torch.arange(9) % 4, torch.optim.SGD(student.parameters(), 0.0)
    terms, logits = rco.train_step(student, teacher, still, x, y, arguments)
    f_s, f_t = student.embed(x), teacher.embed(x).detach()
    z_s, log_t = student.head(f_s), (teacher.head(f_t) / T).log_softmax(1).detach()
    squared = (student.adapter(f_s) - f_t).pow(2).sum(1).mean()
    part = {"ce": -z_s.log_softmax(1)[torch.arange(9), y].mean(), "mimic": squared,
            "kl": (log_t.exp() * (log_t - (z_s / T).log_softmax(1))).sum(1).mean(),
            "hint": squared / 2}
    wanted = torch.autograd.grad(sum(factor * part[name] for name, factor in factors.items()),
                                 student.parameters(), materialize_grads=True, allow_unused=True)
    for parameter, gradient in zip(student.parameters(), wanted):
        found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: part[name].item() for name in factors}, rel=1e-5)
    assert logits is None if transfer == "mimic" else torch.equal(logits, z_s)


# ------------------------------------------------- anchors and rates, eqs. (7), (8), (10) to (12)
@pytest.mark.parametrize("epochs, count, anchors", [
    (240, 1, [240]), (240, 3, [80, 160, 240]), (240, 4, [60, 120, 180, 240]), (10, 3, [3, 6, 10]),
    (25, 4, [6, 12, 18, 25]), (7, 7, [1, 2, 3, 4, 5, 6, 7])])
def test_equal_epoch_anchors(epochs, count, anchors):
    assert rco.equal_epoch_anchors(epochs, count) == anchors
    for none in (0, epochs + 1):
        with pytest.raises(ValueError, match=str(none)):
            rco.equal_epoch_anchors(epochs, none)


@pytest.mark.parametrize("epoch, gap, epochs, anchor", [
    (0, 10, 240, 10), (9, 10, 240, 10), (10, 10, 240, 20), (239, 10, 240, 240), (24, 10, 25, 25),
    (0, 240, 240, 240), (3, 1, 10, 4)])
def test_one_stage_anchor(epoch, gap, epochs, anchor):
    assert rco.one_stage_anchor(epoch, gap, epochs) == anchor


A = [1, 1.2, 1.5, 1.79, 1.81, 2.5]


@pytest.mark.parametrize("kl, current, threshold, chosen", [
    (A, 1, 0.8, 4), ([100 * value for value in A], 1, 0.8, 4), (A, 1, 0.4, 2), (A, 1, 1.6, 6),
    ([1, 2, 3, 4], 1, 0.8, 2),  # the guard: j - 1 would be 1 again
    ([1, 1.1, 9], 1, 0.8, 3),  # H_N is not tested; if it were: 2
    ([1, 1.2, 2.5, 1.1, 1, 1], 1, 0.8, 2),  # the first crossing wins
    ([5, 1, 1.5, 2, 9, 9], 2, 0.8, 3), ([1, 1.5, 1.5], 3, 0.8, 3),  # current > 1
    ([1, 0.5, 0.4, 0.3], 1, 0.8, 4), ([4, 9], 1, 0.8, 2),  # falling KL; N = 2
    ([1, 1.25, 1.5, 1.5, 1.5], 1, 0.5, 5)])  # r = 0.5 exactly: no crossing
def test_next_anchor(kl, current, threshold, chosen):
    assert rco.next_anchor(kl, current, threshold) == chosen


@pytest.mark.parametrize("flags, stage", [
    ("", 3), ("--epochs 2", 1), ("--strategy greedy", 3), ("--strategy kd", 12), ("--anchors 2", 6),
    ("--strategy one-stage", 12), ("--stage-epochs 12", 12), ("--dataset folder", 15)])
def test_stages_of_shapes_cost_what_kd_costs(flags, stage):
    arguments = rco.parse_args(f"--device cpu {flags}".split())
    assert arguments.stage_epochs == stage
    steps = rco.learning_rates(1, 16, arguments.schedule)
    assert steps == pytest.approx([1] * 10 + [.1] * 2 + [.01] * 2 + [.001] * 2)


def test_learning_rates():
    """Eq. (12): the listed exponents, the whole of E = 240, E = 1, E not a multiple of 4."""
    rates = rco.learning_rates(0.05, 240)
    exponents = {0: 0, 59: 0, 60: 1, 119: 1, 120: 2, 179: 2, 180: 3, 239: 3}
    assert {e: round(math.log10(0.05 / rates[e]), 9) for e in exponents} == exponents
    assert rates == pytest.approx([0.05] * 60 + [5e-3] * 60 + [5e-4] * 60 + [5e-5] * 60, rel=1e-12)
    assert rco.learning_rates(0.05, 1) == [0.05]
    assert rco.learning_rates(1, 10) == pytest.approx([1] * 3 + [.1] * 2 + [.01] * 3 + [.001] * 2)


# ----------------------------------------------------------------------------- route_kl, eq. (9)
def scaled(factor):
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = factor * torch.eye(3)
    return linear


FACTORS, X = (0.5, 1.5, 3), np.array([[1.0, 2, 3], [0, 0, 0], [2, -1, 0]])
ROUTE = [scaled(factor) for factor in FACTORS]


@pytest.mark.parametrize("T, golden, wrong", [
    (1, [0.071442, 0.029211, 0.136410], [0.059194, 0.037526, 0.344838]),  # reversed
    (4, [0.005933, 0.005724, 0.077090], None)])
def test_route_kl_golden(T, golden, wrong):
    found = rco.route_kl(scaled(1), ROUTE, tensor(X).float(), T)
    assert found == pytest.approx(golden, abs=DIGITS) and all(type(h) is float for h in found)
    assert T != 1 or [kl(X, k * X, T) for k in FACTORS] == pytest.approx(wrong, abs=DIGITS)


def test_route_kl_weights_chunks_by_their_size():
    """One tensor (two chunks inside), unequal batches and the oracle agree."""
    x = np.random.default_rng(3).normal(size=(620, 3)) * np.linspace(0.5, 4, 620)[:, None]
    images = tensor(x).float()
    parts = [(images[:7], None), (images[7:300], None), (images[300:], None)]
    wanted = pytest.approx([kl(k * x, x, 2) for k in FACTORS], rel=1e-5)
    assert rco.route_kl(scaled(1), ROUTE, images, 2) == wanted
    assert rco.route_kl(scaled(1), ROUTE, iter(parts), 2) == wanted


@pytest.mark.parametrize("training", [True, False])
def test_route_kl_evaluates_and_leaves_no_trace(training):
    """Batch norm by its own statistics; modes and buffers as before."""
    networks, logits = [], []
    for k in (1, 0.5, 3):
        networks.append(nn.Sequential(scaled(k), nn.BatchNorm1d(3)).train(training))
        networks[-1][1].running_mean += k
        networks[-1][1].running_var *= 2 + k
        logits.append((k * X - k) / np.sqrt(2 + k + 1e-5))
    before = [clone(network) for network in networks]
    found = rco.route_kl(networks[0], networks[1:], tensor(X).float(), 2)
    assert found == pytest.approx([kl(z, logits[0], 2) for z in logits[1:]], rel=1e-5)
    for network, state in zip(networks, before):
        assert same(clone(network), state) and network[1].training == training


# ------------------------------------------------------------------------------------------ runs
RATES = [0.1 * 0.1**k for k in (0, 1, 2)]  # eq. (12) for E = 3


def play(run, out, flags):
    """rco.py under spies: its steps, data, route and result."""
    trace = Namespace(steps=[], out=out)
    step, route = rco.train_step, rco.teacher_route

    def spy_step(student, teacher, optimizer, images, labels, arguments):
        entry = Namespace(
            images=images, labels=labels, teacher=teacher, before=clone(student),
            lr=optimizer.param_groups[0]["lr"], momentum=len(optimizer.state),
            modes=[{part.training for part in network.modules()} for network in (student, teacher)])
        trace.steps.append(entry)
        result = step(student, teacher, optimizer, images, labels, arguments)
        entry.after = clone(student)
        return result

    def spy_route(data, arguments):
        found = route(data, arguments)
        trace.data, trace.route = data, found[0]
        trace.stored = {epoch: clone(network) for epoch, network in trace.route.items()}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rco, "train_step", spy_step)
        patch.setattr(rco, "teacher_route", spy_route)
        trace.printed = run("rco", out, "--epochs 3 --stage-epochs 3 --schedule paper " + flags)
    trace.result, trace.student = result_of(out), weights(out / "student.pt")
    trace.epochs = [trace.steps[k:k + 6] for k in range(0, len(trace.steps), 6)]  # 260 images
    L = trace.result["arguments"]["stage_epochs"]
    trace.stages = [sum(trace.epochs[k:k + L], []) for k in range(0, len(trace.epochs), L)]
    return trace


@pytest.fixture(scope="module")
def once(run, tmp_path_factory):
    """flags -> trace; each run once, all with the same teacher."""
    return cache(lambda flags: play(run, tmp_path_factory.mktemp("rco"), flags))


def test_route_holds_the_states_of_one_run(once):
    """Eq. (5): C_e is, to the bit, the state after epoch e of the plain loop written here."""
    trace = once("--anchors 3")
    network = common.build_model("resnet8", 20, 16, seed=1000)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True,
                                fused=True)
    generator = torch.Generator().manual_seed(1000)
    assert sorted(trace.route) == [1, 2, 3]
    for epoch, optimizer.param_groups[0]["lr"] in enumerate(RATES, 1):
        for images, labels in trace.data.train.augmented(50, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        assert same(trace.stored[epoch], clone(common.folded(network)))


@pytest.mark.parametrize("flags, own", [
    ("--epochs 50 --anchors 7", {7, 14, 50}), ("--epochs 7 --strategy kd", {7}),
    ("--epochs 30 --compare one-stage", {30})])
def test_route_keeps_what_every_strategy_needs(flags, own, monkeypatch):
    """All strategies with their usual N share one route, also for odd E."""
    monkeypatch.setattr(rco, "train_network", lambda *_, keep, **__: (
        {"seconds": 5}, dict.fromkeys(keep, nn.Identity())))
    arguments = rco.parse_args(f"--device cpu {flags}".split())
    arguments.seed, E = 0, arguments.epochs
    kept, _ = rco.teacher_route(None, arguments)
    for N in (min(4, E), min(24, E)):
        own |= {rco.one_stage_anchor(e, math.ceil(E / N), E) for e in range(E)}
        own |= {k * E // N for k in range(1, N + 1)}
    assert own <= set(kept) and max(kept) == E


def test_teacher_weights_are_the_route(once, run, tmp_path):
    trace = once("--anchors 3")
    files = sorted(str(file) for file in run.cache.glob("shapes-resnet8-3-*/epoch-000?.pt")
                   if same(clone(common.folded(common.load_weights(
                       common.build_model("resnet8", 20, 16), file))), trace.stored[
                           int(file.stem[6:])]))
    found = play(run, tmp_path / "run", f"--teacher-weights {' '.join(files)}")
    assert same(found.student, trace.student) and found.result["plan"] == trace.result["plan"]


def test_eei_with_one_anchor_is_plain_kd_and_weight_zero_the_student_alone(once):
    plain, trace = once("--strategy kd").student, once("--strategy kd --weight 0")
    assert same(once("--anchors 1").student, plain)
    arguments = rco.parse_args(f"--device cpu --batch-size 50 --cache {trace.out}/c".split())
    alone, states = common.train_network("resnet8x0.5", trace.data, RATES, arguments, seed=0)
    assert same(trace.student, clone(states[3])) and not same(trace.student, plain)
    assert trace.result["last_test"] == alone["last_test"]


RUNS = {  # flags: the teacher of every epoch
    "--anchors 3": [1] * 3 + [2] * 3 + [3] * 3, "--anchors 1": [3] * 3,
    "--anchors 2 --transfer hint": [1] * 3 + [3] * 3,
    "--anchors 2 --transfer mimic": [1] * 3 + [3] * 3,
    "--strategy one-stage --anchors 2": [2, 2, 3],
    "--strategy kd --stages 4 --stage-epochs 1": [3] * 4,  # more stages than states
    "--strategy greedy --threshold 1e6": [1] * 3 + [3] * 3}


@pytest.mark.parametrize("flags, used", RUNS.items())
def test_stages_anchors_and_what_goes_on(once, flags, used):
    """Eqs. (6) to (8), section 5: the teacher of every step, left as it was; weights and buffers
    go on, momentum and rate start anew, batches do not repeat; the record agrees."""
    trace = once(flags)
    for epoch, network in trace.route.items():
        assert same(clone(network), trace.stored[epoch])
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    epoch_of = {id(network): epoch for epoch, network in trace.route.items()}
    found = [{epoch_of[id(step.teacher)] for step in epoch} for epoch in trace.epochs]
    assert found == [{epoch} for epoch in used]
    assert [row["anchor"] for row in trace.result["rows"]] == used == sum(trace.result["plan"], [])
    assert [epoch for epoch, _ in trace.result["teacher_test"]] == sorted(set(used))
    assert trace.result["images"] == dict.fromkeys(
        ("student forward and backward", "teacher forward"), 260 * len(used))
    for before, after in zip(trace.steps, trace.steps[1:]):
        assert same(after.before, before.after)
    for stage in trace.stages:
        assert [step.momentum > 0 for step in stage] == [False] + [True] * (len(stage) - 1)
    rates = RATES if len(trace.stages[0]) == 18 else [0.1]
    rates = [rate / (10 if "mimic" in flags else 1) for rate in rates]
    for epoch, rate in zip(trace.epochs, rates * len(trace.stages), strict=True):
        assert [step.lr for step in epoch] == pytest.approx([rate] * 6)
    assert all(step.modes == [{True}, {False}] for step in trace.steps)  # student, teacher
    final = trace.steps[-1].after  # the last weights, not the best
    assert ("adapter.weight" in final) == ("--transfer" in flags)  # from 32 to 64 features
    assert same(trace.student, {name: value for name, value in final.items()
                                if "mimic" in flags or not name.startswith("adapter.")})
    assert final["stem.1.num_batches_tracked"] == len(trace.steps)  # evaluation adds nothing
    generator = torch.Generator().manual_seed(0)  # training images alone, one draw through all
    for epoch in trace.epochs:
        for step, (images, labels) in zip(epoch, trace.data.train.augmented(50, generator)):
            assert torch.equal(step.images, images) and torch.equal(step.labels, labels)


def test_greedy_measures_the_current_student(run, tmp_path, monkeypatch):
    """Eq. (9) on X' for the student as its stage left it; the longest way: N stages."""
    choices = []

    def next_anchor(kl, current, threshold):
        choices.append((kl, threshold))
        assert current == len(choices)
        return current + 1
    monkeypatch.setattr(rco, "next_anchor", next_anchor)
    trace = play(run, tmp_path / "out", "--strategy greedy --threshold 0.7")
    held, student, truth = trace.data.validation, common.build_model("resnet8x0.5", 20, 16), []
    assert [stage[0] for stage in trace.result["plan"]] == [1, 2, 3]
    for stage in trace.stages:
        student.load_state_dict(stage[-1].after)
        with torch.no_grad():
            z_s, *z_t = (network.eval()(held.normalise(held.images)).double().numpy()
                         for network in (student, *(trace.route[e] for e in (1, 2, 3))))
        truth.append([kl(z, z_s, 4) for z in z_t])
    assert not np.allclose(truth[0], truth[1], rtol=0.02)  # an earlier student's would not do
    for found, wanted in zip(trace.result["route_kls"], truth, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert choices == [(measured, 0.7) for measured in trace.result["route_kls"][:2]]
    assert trace.result["measures"]["kl_final"] == pytest.approx(truth[-1][-1], rel=1e-3, abs=1e-6)


def test_equal_widths_need_no_adapter():
    data = Namespace(classes=20, image_size=16)
    assert isinstance(rco.build_student("resnet8x0.5", data, 32, "hint", 0).adapter, nn.Identity)


def test_controls_of_mimic_and_their_rates(run, once, tmp_path):
    """Each has as many epochs as KD; a tenth of the rate is mimic's alone, not the student's."""
    rows = table(run("rco", tmp_path, "--transfer mimic --strategy kd --compare eei "
                     f"--cache {tmp_path}/cache"))
    assert list(rows) == ["teacher", "student alone", "kd mimic", "eei mimic", "kd",
                          "kd restarts, as eei mimic"]
    assert {row["epochs"] for row in rows.values()} == {"2"}
    rates = {name: result_of(tmp_path / name)["rows"][0]["lr"] for name in ("", "eei-mimic", "kd")}
    assert rates == pytest.approx({"": 0.01, "eei-mimic": 0.01, "kd": 0.1})
    (alone,) = (tmp_path / "cache").glob("shapes-resnet8x0.5-*")
    assert result_of(alone)["rows"][0]["lr"] == 0.1
    printed = once("--strategy kd --stages 4 --stage-epochs 1").printed
    assert "kd, 4 x 1 epochs" in table(printed)  # not "kd", which is a control


def test_a_student_learns_the_shapes(run, tmp_path, monkeypatch):
    """20 classes, chance 5 %: the student must pass 25 %, and near C_E on X' as it trains."""
    monkeypatch.setattr(common, "SHAPES_TRAIN", 2000)
    run("rco", tmp_path, "--strategy one-stage --anchors 2 --teacher resnet8x0.5 --epochs 5 "
        "--schedule paper --learning-rate 0.2 --batch-size 32 --image-size 10")
    rows = result_of(tmp_path)["rows"]
    assert rows[-1]["test"] > 25
    assert rows[-1]["kl_final"] < rows[0]["kl_final"] and rows[-1]["ce"] < rows[0]["ce"]


def test_figures_of_a_finished_run(once, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs")
    figures, trace = importlib.import_module("figures"), once("--anchors 3")
    figures.main(trace.out)
    for name in ("hardness.png", "gap.png"):
        assert (trace.out / name).read_bytes().startswith(b"\x89PNG")
    (hardness,) = figures.rco(trace.out, trace.result)["hardness.png"].axes
    drawn = [list(line.get_ydata()) for line in hardness.lines]
    assert drawn == trace.result["route_kls"] and len(drawn) == 3
    figures.main(trace.out, tmp_path / "gap.png")
    assert [path.name for path in tmp_path.iterdir()] == ["gap.png"]
    with pytest.raises(SystemExit, match="no other.png in this run"):
        figures.main(trace.out, "other.png")


def test_cifar10_from_its_own_archive(run, tmp_path, monkeypatch):
    tiny_cifar(tmp_path, monkeypatch, "cifar10")
    printed = run("rco", tmp_path / "run", f"--dataset cifar10 --data {tmp_path} --batch-size 20")
    assert "40 training, 10 held-out, 10 test images of 32x32, 10 classes (class 0 to" in printed
    assert weights(tmp_path / "run" / "student.pt")["head.weight"].shape == (10, 32)


@pytest.mark.parametrize("flags, word", [
    ("--epochs 3 --anchors 4", "the route has 3 states"), ("--anchors 0", "--anchors"),
    ("--strategy greedy --transfer mimic", "mimic trains none"),
    ("--compare greedy --transfer mimic", "mimic trains none"),
    ("--strategy one-stage --epochs 3 --teacher-weights a b", "must divide"),
    ("--teacher-weights a b --epochs 1", "1 states"), ("--strategy kd --anchors 2", "--stages"),
    ("--threshold -1", "--threshold"),
    ("--temperature 0", "--temperature"), ("--teacher-weights a b --anchors 3", "names 2")])
def test_argument_errors_are_one_line(flags, word, capsys):
    assert word in refused("rco", flags, capsys)
