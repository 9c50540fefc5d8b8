"""SwitOKD against its specification: its section 11, numpy oracles, gradients, tiny runs.

Goldens are typed from the specification; networks that return a parameter put them into a step.
"""

import importlib
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, log, refused, result_of, same, same_run, shapes_data, stopped, table
from torch import nn

import common
import switokd

Y, LABELS = np.eye(3)[:2], torch.tensor([0, 1])
LATE = (140, 200, 250)  # the drops on CIFAR-100
CASES = {  # z_s, z_t, tau
    "A": ([[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [2, 5, 0]], 1),
    "B": ([[1, 0, 0], [0, 1, 1]], [[2, 1, 0], [0, 2, 1]], 1),
    "C": ([[2, 0, 0], [0, 2, 0]], [[0, 3, 0], [1, 0, 0]], 1),
    "D": ([[0, 0, 0], [0, 0, 0]], [[3, 0, 0], [0, 3, 0]], 1),
    "E": ([[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [2, 5, 0]], 2),
    "F": ([[1, 0, 0], [2, 0, 1]], [[0, 0, 0], [0, 1, 0]], 1)}
GOLDEN = dict(zip("ABCDEF", [  # s, t, G, eps, delta, KL(t to s), KL(s to t), L_s, L_t; None: expert
    (0.847766, 0.720168, 0.613166, 0.631719, 0.392822, 0.248101, 0.449237, 0.799546, None),
    (1.001564, 0.669518, 0.364833, 0.669885, 0.553064, 0.086719, 0.095698, 0.793439, 0.503304),
    (0.426028, 1.742780, 1.377981, 0.447730, -0.354266, 1.311364, 1.444597, 1.550909, 3.767781),
    (1.333333, 0.181114, 1.152219, 0.887283, 1.172634, 0.732018, 0.996311, 1.830631, 1.091234),
    (1.096274, 0.900509, 0.432824, 0.637004, 0.522647, 0.130187, 0.162182, 0.681632, 0.738981),
    (1.333853, 1.090550, 0.728870, 0.637742, 0.638364, 0.457976, 0.376152, 1.937502, None)]))
GRADIENT = [[-0.090550, 0.045275, 0.045275], [0.188380, -0.397133, 0.208753]]  # of L_s in case A
THREE = {  # topology; logits of students, then teachers; mode, G, delta, t of each pair; losses
    "teachers": ("2t1s", [[[1, 1, 1], [0, 1, 3]], [[2, 0, 0], [1, 2, 0]], [[1, 0, 1], [1, 1, 1]]],
        [("expert", 1.207417, 1.130454, 0.547773), ("learning", 0.688432, 0.754996, 1.244348)],
        [2.961386, None, 1.600407]),
    "one vote": ("1t2s", [[[1, 3, 1], [0, 2, 0]], [[0, 3, 0], [0, 0, 0]], [[0, 0, 0], [0, 3, 0]]],
        [("learning", 0.576110, 0.602110, 0.757224), ("expert", 1.152219, 1.070621, 0.757224)],
        [1.767875, 3.211648, 0.847483]),
    "pause": ("1t2s", [[[0, 0, 2], [0, 0, 0]], [[3, 1, 1], [2, 1, 1]], [[0, 1, 1], [0, 3, 0]]],
        [("expert", 0.940777, 0.917265, 0.935195), ("expert", 1.329125, 0.424116, 0.935195)],
        [2.965984, 2.661241, None])}


# ------------------------------------------------------------------------------------ the oracles
def log_p(z, tau=1):
    z = np.asarray(z, float) / tau
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(peer, own, tau=1):
    a, b = log_p(peer, tau), log_p(own, tau)
    return (np.exp(a) * (a - b)).sum(1).mean()


def ce(z, hot=Y):
    return -(log_p(z) * hot).sum(1).mean()


def numbers(z_s, z_t, hot=Y, tau=1):
    """G, delta, eps, s, t by equations (1) to (4)."""
    p_s, p_t = np.exp(log_p(z_s, tau)), np.exp(log_p(z_t, tau))
    s, t, G = (np.abs(a - b).sum(1).mean() for a, b in ((p_s, hot), (p_t, hot), (p_s, p_t)))
    eps = np.exp(-t / (s + t))
    return G, s - eps * t, eps, s, t


def close(values):
    """Goldens have six decimals, and a step computes in float32."""
    return pytest.approx(values, abs=2e-6)


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


# ------------------------------------------------------------------------------ a step on logits
class Logits(nn.Module):
    """A network that answers with a parameter, whatever it is shown; batch norm beside it."""

    def __init__(self, z):
        super().__init__()
        self.z, self.norm, self.calls = nn.Parameter(tensor(z)), nn.BatchNorm1d(2).double(), 0

    def forward(self, x):
        self.calls += 1
        return self.z + 0 * self.norm(x).sum()


X = torch.tensor([[1.0, 2], [3, 5]], dtype=torch.float64)
NAMES = {  # (students, teachers)
    "pair": (["student"], ["teacher"]), "2t1s": (["student"], ["teacher-1", "teacher-2"]),
    "1t2s": (["student-1", "student-2"], ["teacher"])}


def step(*case, labels=LABELS, tau=1.0, switch="adaptive", topology="pair"):
    """A step on the logits of the students, then of the teachers: losses, pairs, networks. Those
    without a loss, and no others, stay as they were but for batch norm; ONE forward each."""
    students, teachers = NAMES[topology]
    networks = {name: Logits(z) for name, z in zip([*students, *teachers], case, strict=True)}
    sgd = {}
    for name, network in networks.items():  # an old gradient, momentum and decay would move z
        sgd[name] = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.1)
        network.z.grad = torch.ones_like(network.z)
        sgd[name].state[network.z]["momentum_buffer"] = torch.ones_like(network.z)
    losses, logits, pairs = switokd.train_step(
        {name: networks[name] for name in students}, {name: networks[name] for name in teachers},
        sgd, X, labels, tau, switch)
    assert list(losses) == list(logits) == list(networks)
    assert list(pairs) == [(student, teacher) for teacher in teachers for student in students]
    for (name, network), z in zip(networks.items(), case):
        assert logits[name].dtype == torch.float32 and not logits[name].requires_grad
        assert logits[name].numpy() == pytest.approx(np.asarray(z, float), rel=1e-6)
        momentum = sgd[name].state[network.z]["momentum_buffer"]
        kept = torch.equal(network.z, tensor(z)), (momentum == 1).all(), (network.z.grad == 1).all()
        assert kept == (losses[name] is None,) * 3
        assert network.calls == 1 and network.norm.running_mean.all()
    losses = {name: loss if loss is None else loss.item() for name, loss in losses.items()}
    return losses, pairs, networks


# ------------------------------------------------------------------------- equations (1) to (12)
@pytest.mark.parametrize("name", CASES)
def test_goldens_of_a_pair(name):
    (z_s, z_t, tau), (s, t, G, eps, delta, to_s, to_t, L_s, L_t) = CASES[name], GOLDEN[name]
    assert numbers(z_s, z_t, tau=tau) == close((G, delta, eps, s, t))
    a, b = tensor(z_s, True), tensor(z_t, True)
    distances = [switokd.label_distance(a, LABELS, tau), switokd.label_distance(b, LABELS, tau),
                 switokd.distillation_gap(a, b, tau)]
    assert not any(value.requires_grad for value in distances)
    found = [*distances, switokd.kl_to(b, a, tau), switokd.kl_to(a, b, tau)]
    assert [value.item() for value in found] == close([s, t, G, to_s, to_t])
    losses, pairs, networks = step(z_s, z_t, tau=tau)
    (pair,) = pairs.values()
    assert pair.mode == ("learning" if L_t else "expert")
    assert pair[1:] == close((G, delta, eps, s, t))
    assert losses == {"student": close(L_s), "teacher": L_t and close(L_t)}
    if name == "A":
        assert networks["student"].z.grad.numpy() == close(np.array(GRADIENT))


@pytest.mark.parametrize("name", THREE)
def test_goldens_of_three_networks(name):
    """A paused teacher still serves as a peer."""
    topology, case, wanted, wanted_losses = THREE[name]
    losses, pairs, _ = step(*case, topology=topology)
    for pair, (mode, *values) in zip(pairs.values(), wanted, strict=True):
        found = pair.gap, pair.threshold, pair.teacher_distance
        assert pair.mode == mode and found == close(values)
    assert list(losses.values()) == [value and close(value) for value in wanted_losses]


def test_what_the_usual_mistakes_would_give():
    """The wrong numbers listed by the specification: the goldens tell them all apart."""
    z_s, z_t, _ = CASES["A"]
    assert ce(z_s) + kl(z_s, z_t) == close(1.000682)  # A with the KL reversed
    assert ce(z_s) + kl(z_t, z_s) / 3 == close(0.634145)  # A with "mean"
    assert ce(z_s) + 4 * kl(z_t, z_s, 2) == close(1.072192)  # E with tau^2
    assert GOLDEN["E"][2] > numbers(z_s, z_t)[1]  # E with label distances at tau = 1: expert
    s, t, G, _, delta, *_ = GOLDEN["F"]
    assert delta < G < s - np.exp(-t / s) * t == close(0.852383)  # F with exp(-t/s): learning
    assert GOLDEN["C"][2] > GOLDEN["C"][4]  # C without the guard: expert
    for s, t, G, *_ in (GOLDEN["B"], GOLDEN["D"]):  # with the plus sign: expert
        assert G > s - np.exp(t / (s + t)) * t and t < s
    s, t_1, t_2 = THREE["teachers"][1]
    s_1, s_2, t = THREE["one vote"][1]
    for right, other, listed in (((s, t_2), (s, t_1), 0.593796), ((s_1, t), (s_2, t), 0.555740)):
        G, _, _, own_s, own_t = numbers(*right)  # eps of the other pair, as released: expert
        assert G > own_s - numbers(*other)[2] * own_t == close(listed) and own_t < own_s


def test_threshold_and_mode_by_hand():
    """From numbers and tensors; NaN for two perfect networks; both comparisons are strict."""
    for s, t, delta, eps in (
            (1.2, 0.8, 0.663744, 0.670320), (1, 1, 0.393469, 0.606531), (1, 0, 1, 1),
            (0, 1, -0.367879, 0.367879), (0, 0, np.nan, np.nan)):
        for given in ((s, t), torch.tensor([float(s), float(t)])):
            found = [value.item() for value in switokd.switching_threshold(*given)]
            assert found == pytest.approx([delta, eps], abs=1e-6, nan_ok=True)
    for G, delta, s, t, mode in (
            (1, 1, 1.2, 0.8, "learning"), (1, 0.9, 1.2, 0.8, "expert"),
            (1, 0.9, 0.8, 0.8, "learning"), (0, np.nan, 0, 0, "learning")):
        assert switokd.choose_mode(G, delta, s, t) == mode
        assert switokd.choose_mode(*map(torch.tensor, (G, delta, s, t))) == mode


@pytest.mark.parametrize("topology", NAMES)
@pytest.mark.parametrize("switch", ["adaptive", "never", "kd"])
@pytest.mark.parametrize("tau", [0.5, 1, 3])
def test_a_step_on_random_logits(topology, switch, tau):
    """Each pair by the oracle, its bounds and the rule in one line, (10); each network by its own
    loss and gradient, (7) to (9), (11), (12), peers as constants."""
    random, modes, (students, teachers) = np.random.default_rng(4), set(), NAMES[topology]
    for batch, classes in [(2, 3), (3, 3), (5, 7), (33, 20)] * 3:
        case = random.normal(0, 2 * tau, (len(students + teachers), batch, classes))
        y, expert = random.integers(0, classes, batch), {}
        losses, pairs, networks = step(*case, labels=torch.tensor(y), tau=tau, switch=switch,
                                       topology=topology)
        z, hot = dict(zip(networks, case)), np.eye(classes)[y]
        p = {name: np.exp(log_p(one, tau)) for name, one in z.items()}
        for (student, teacher), pair in pairs.items():
            G, delta, eps, s, t = numbers(z[student], z[teacher], hot, tau)
            assert pair[1:] == pytest.approx((G, delta, eps, s, t), abs=1e-5)
            above = np.where(hot, p[student] - p[teacher], p[teacher] - p[student])
            slack = 2 * np.maximum(above, 0).sum(1).mean()
            assert slack == pytest.approx(G - (s - t)) and G <= s + t and s - t <= delta <= s
            assert s - np.exp(t / (s + t)) * t < G  # with a plus sign no teacher would learn
            paused = slack > (1 - eps) * t and t < s and switch != "never" or switch == "kd"
            assert pair.mode == ("expert" if paused else "learning")
            expert[student, teacher] = paused
            modes.add(pair.mode)
        for own in z:
            if own in teachers and all(expert[student, own] for student in students):
                assert losses[own] is None
                continue
            others = [name for name in z if name != own and not expert.get((name, own))]
            loss = ce(z[own], hot) + sum(kl(z[other], z[own], tau) for other in others)
            assert losses[own] == pytest.approx(loss, rel=1e-5)
            hard = np.exp(log_p(z[own])) - hot
            soft = sum((p[own] - p[other]) / tau for other in others)
            assert networks[own].z.grad.numpy() == close((hard + soft) / batch)
    assert len(modes) == (2 if switch == "adaptive" else 1)


@pytest.mark.parametrize("case, switch, mode", [
    ("A", "fixed:0.7", "learning"), ("A", "fixed:0.6", "expert"), ("C", "fixed:0.2", "learning"),
    *[(name, "never", "learning") for name in CASES], *[(name, "kd", "expert") for name in CASES]])
def test_switches(case, switch, mode):
    z_s, z_t, tau = CASES[case]
    losses, pairs, networks = step(z_s, z_t, tau=tau, switch=switch)
    _, adaptive, twins = step(z_s, z_t, tau=tau)
    (pair,), (other,) = pairs.values(), adaptive.values()
    assert pair.mode == mode and (losses["teacher"] is None) == (mode == "expert")
    if switch in ("never", "kd"):  # the adaptive numbers are logged all the same
        assert pair[1:] == other[1:]
    else:
        assert pair.threshold == pytest.approx(float(switch[6:])) and np.isnan(pair.epsilon)
    if pair.mode == other.mode:  # then it is the adaptive step, bit for bit
        assert all(same(networks[name].state_dict(), twins[name].state_dict()) for name in twins)
    with pytest.raises(ValueError, match="'always'"):
        step(z_s, z_t, switch="always")


def test_unequal_shapes_are_refused():  # broadcasting would hide them
    for function in (switokd.kl_to, switokd.distillation_gap, switokd.label_distance):
        for other in ((2, 4), (1, 3), (2, 1), (3,)):
            with pytest.raises(ValueError, match=r"\(2, 3\)"):
                function(torch.zeros(2, 3), torch.zeros(other, dtype=torch.long))


# ----------------------------------------------------------------------------- schedule and flags
@pytest.mark.parametrize("flags, networks, epochs, initial, drops", [
    ("cifar10", "wrn_16_1 wrn_16_8", 299, [0.1, 0.1], (100, 150, 200)),
    ("cifar10 --epochs 300", "wrn_16_1 wrn_16_8", 300, [0.1, 0.1], (151, 201, 251)),
    ("cifar100", "mobilenetv2 wrn_16_2", 299, [0.01, 0.1], LATE),
    ("cifar100 --learning-rate 0.05", "mobilenetv2 wrn_16_2", 299, [0.05, 0.05], LATE),
    ("cifar100 --student resnet8", "resnet8 wrn_16_2", 299, [0.1, 0.1], LATE),
    ("cifar100 --topology 2t1s", "mobilenetv2 wrn_16_2 wrn_16_10", 269, [0.01, 0.1, 0.1], LATE),
    ("cifar100 --topology 1t2s", "wrn_16_2 mobilenetv2 wrn_16_10", 269, [0.1, 0.01, 0.1], LATE),
    ("cifar100 --topology 1t2s --student-learning-rate 0.2", "wrn_16_2 mobilenetv2 wrn_16_10", 269,
     [0.2, 0.2, 0.1], LATE),
    ("imagenet", "resnet18 resnet34", 120, [0.1, 0.1], (31, 61, 91)),
    ("fashionmnist", "resnet8x0.5 resnet20", 15, [0.05, 0.05], (11, 13, 15)),
    ("shapes", "resnet8x0.5 resnet14", 12, [0.1, 0.1], (9, 10, 12))])
def test_recipes(flags, networks, epochs, initial, drops):
    """Section 6: networks (students, then teachers), epochs, rates and where they drop (from 1)."""
    arguments = switokd.parse_args(f"--device cpu --dataset {flags}".split())
    special = {"imagenet": (512, 1e-4), "cifar10": (128, 5e-4), "cifar100": (128, 5e-4)}.get(
        arguments.dataset, (64, 5e-4))
    assert (arguments.batch_size, arguments.weight_decay) == special
    assert " ".join([*arguments.student, *arguments.teacher]) == networks
    assert (arguments.momentum, arguments.temperature, arguments.switch) == (0.9, 1, "adaptive")
    assert getattr(arguments, "nesterov", False) == (
        arguments.dataset in ("shapes", "fashionmnist"))
    students, teachers = switokd.roles(Namespace(**{**vars(arguments), "seed": 0}))
    for (*_, rate), first in zip((students | teachers).values(), initial, strict=True):
        last = pytest.approx(first / 1000)
        assert (len(rate), rate[0], rate[-1]) == (epochs, first, last)
        assert tuple(e + 1 for e in range(1, epochs) if rate[e] != rate[e - 1]) == drops


@pytest.mark.parametrize("flags, word", [
    ("--topology 2t1s --teacher resnet8", "--teacher names 1"),
    ("--topology 1t2s --student resnet8", "2 student(s)"), ("--switch sometimes", "fixed:V"),
    ("--switch fixed:3", "0 to 2"), ("--switch fixed:nan", "fixed:nan"),
    ("--compare fixed:x", "fixed:x"),
    ("--topology 1t2s --student-learning-rate 0.1 0.2 0.3", "one for each of 2 students")])
def test_argument_errors_are_one_line(flags, word, capsys):
    assert word in refused("switokd", flags, capsys)


# ------------------------------------------------------------------------------------------ runs
TRIO = {"pair": "--compare fixed:0.2 never", "2t1s": "--topology 2t1s --teacher resnet8 resnet8",
        "1t2s": "--topology 1t2s --student resnet8x0.5 resnet8x0.5"}
STEPS = 6  # of an epoch: 260 images, 50 a step
CPU = Namespace(device=torch.device("cpu"), precision="fp32")


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """{name: (folder, what was printed)}; the threshold is low enough to switch."""
    flags = {name: f"--switch fixed:0.2 {TRIO[name]}" for name in TRIO} | {"compared": "--compare"}
    folders = {name: tmp_path_factory.mktemp(name) for name in flags}
    return {name: (folders[name], run("switokd", folders[name], flags[name])) for name in flags}


def trained(own, path, classes=20):
    model = "resnet8x0.5" if own.startswith("student") else "resnet8"
    return common.load_weights(common.build_model(model, classes, 16), path)


@pytest.mark.parametrize("topology", TRIO)
def test_what_a_run_leaves(finished, topology):
    """A row a pair a step in steps.csv, their means in log.csv, the summary in result.json and in
    the table, and weights that give the last accuracy."""
    (folder, printed), (students, teachers) = finished[topology], NAMES[topology]
    result, lines = result_of(folder), log(folder, "steps.csv")
    pairs = [(student, teacher) for teacher in teachers for student in students]
    assert [(line["epoch"], line["step"], line["student"], line["teacher"]) for line in lines] == [
        (epoch, str(k + 1), *pair) for epoch in "12" for k in range(STEPS) for pair in pairs]
    for line in lines:
        G, delta, eps, s, t = (float(line[name]) for name in switokd.Pair._fields[1:])
        assert delta == pytest.approx(0.2) and np.isnan(eps)
        assert (line["mode"] == "expert") == (G > delta and t < s)
    assert {line["mode"] for line in lines} == {"expert", "learning"}, "must switch"
    steps = [lines[k:k + len(pairs)] for k in range(0, len(lines), len(pairs))]
    pauses = {own: [all(line["mode"] == "expert" for line in now if line["teacher"] == own)
                    for now in steps] for own in teachers}
    for row, now in zip(result["rows"], (slice(STEPS), slice(STEPS, None)), strict=True):
        means = [np.mean([float(line[name]) for pair in steps[now] for line in pair])
                 for name in ("gap", "threshold")]
        share = 100 * np.mean([flags[now] for flags in pauses.values()])
        assert [row[name] for name in ("gap", "delta", "paused")] == pytest.approx([*means, share])
        assert all((row[f"L_{own}"] is None) == all(pauses[own][now]) for own in teachers)
    found = result["measures"]
    assert found.items() >= switokd.switching(pauses).items()  # checked by hand below
    assert found["gap"] == pytest.approx(np.mean([row["gap"] for row in result["rows"]]))
    assert result["images"] == {
        "each network forward": 2 * 260, "each student backward": 2 * 260,
        **{f"{own} backward, share": pytest.approx(1 - np.mean(pauses[own])) for own in teachers}}
    files = {path.stem: path for path in folder.glob("*.pt")}
    assert files.keys() == {*students, *teachers, "student"}
    for own, path in files.items():
        column = "test" if own in ("student", "student-2") else own
        accuracy = common.evaluate(trained(own, path), shapes_data().test, CPU)
        assert accuracy == pytest.approx(result["rows"][-1][column])
    row = table(printed)["fixed:0.2"]
    assert [row[name] for name in ("test", "switches", "paused")] == [
        f"{result['last_test']:.2f}", str(found["switches"]), f"{found['paused']:.1f}"]


def test_the_summary_counts_each_teacher():
    yes, no = True, False
    found = switokd.switching({"a": [no, yes, yes, no, yes, no], "b": [yes, yes, no, no, no, no]})
    assert found == {"paused": pytest.approx(100 * 5 / 12), "switches": 5,
                     "expert_run": pytest.approx(5 / 3), "paused_updates": [3, 2]}


def test_a_stopped_run_goes_on_bit_for_bit(finished, run, tmp_path, monkeypatch):
    """Ctrl-C in epoch 2, between its steps.csv and its checkpoint: no step counts twice."""
    (whole, _), flags = finished["2t1s"], f"--switch fixed:0.2 {TRIO['2t1s']}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, common, "save_file", 4)
        run("switokd", tmp_path, flags)
    assert len(log(tmp_path, "steps.csv")) == 2 * 2 * STEPS
    run("switokd", tmp_path, flags + " --resume")
    assert same_run(tmp_path, whole)
    assert (tmp_path / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()


def test_compare_prints_every_control(finished):
    """Each is the run that its own flags give; rules can be named, and none comes twice."""
    folder, printed = finished["compared"]
    found = table(printed)
    assert list(found) == ["each network alone", "adaptive", "kd", "never", "fixed:0.2",
                           "fixed:0.6", "fixed:0.8"]
    for name, values in (("never", ["0.0", "0", "0.0"]), ("kd", ["-", "-", "-"])):
        assert [found[name][key] for key in ("paused", "switches", "expert_run")] == values
    assert found["kd"]["teacher"] == found["each network alone"]["teacher"]
    assert same_run(finished["pair"][0], folder / "fixed-0.2")
    assert list(table(finished["pair"][1])) == ["each network alone", "fixed:0.2", "kd", "never",
                                                "adaptive"]


def test_kd_alone_of_three_networks(run, tmp_path):
    """Frozen teachers leave no loss, pause or weights, but seconds; recognition: of student-2."""
    folder, cache, data = tmp_path / "run", tmp_path / "cache", shapes_data(open_set=4)
    flags = f"{TRIO['1t2s']} --switch kd --open-set 4 --cache {cache}"
    run("switokd", folder, flags)
    result, alone = result_of(folder), {result_of(place)["arguments"]["seed"]: place
                                        for place in cache.iterdir()}
    teacher = result_of(alone[1000])
    assert [row["teacher"] for row in result["rows"]] == [teacher["last_test"]] * 2
    assert all(row["L_teacher"] is row["paused"] is None for row in result["rows"])
    assert {path.stem for path in folder.glob("*.pt")} == {"student", "student-1", "student-2"}
    (alone[1000] / "result.json").write_text(json.dumps({**teacher, "seconds": 1000.0}))
    found = table(run("switokd", folder, f"{flags} --resume"))
    assert float(found["kd"]["seconds"]) == pytest.approx(1000 + result["seconds"], abs=0.51)
    for name, path in (("kd", folder / "student-2.pt"),
                       ("each network alone", alone[1] / "epoch-0002.pt")):
        rank = common.recognition(trained("student", path, 16), data, CPU)["rank1"]
        assert (found[name]["rank1"], found[name]["epochs"]) == (f"{rank:.1f}", "2")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loop_takes_what_the_flags_say(precision, run, tmp_path, monkeypatch):
    """Each network has a seed and a schedule of its own, and is in train mode; the forward alone is
    bf16, all that follows float32."""
    calls, right, original = [], [], switokd.train_step

    def spy(students, teachers, optimizers, images, labels, *settings):
        networks = students | teachers
        for own, model, seed in zip(networks.values(), ("resnet8", "resnet8x0.5", "resnet8"),
                                    (3, 4, 1003), strict=True):
            fresh = common.build_model(model, 20, 16, seed)
            assert own.training and same(own.state_dict(), fresh.state_dict()) == (not calls)
        calls.append([optimizers[name].param_groups[0]["lr"] for name in networks])
        assert settings == (2.0, "fixed:0.4", precision)
        losses, logits, pairs = original(students, teachers, optimizers, images, labels, *settings)
        right.append(100.0 * (logits["student-2"].argmax(1) == labels))
        for z in logits.values():
            assert z.dtype == losses["student-1"].dtype == torch.float32
            assert torch.equal(z, z.bfloat16().float()) == (precision == "bf16")
        return losses, logits, pairs
    monkeypatch.setattr(switokd, "train_step", spy)
    run("switokd", tmp_path, "--topology 1t2s --student resnet8 resnet8x0.5 --switch fixed:0.4 "
        "--learning-rate 0.3 --student-learning-rate 0.1 0.2 --train-fraction 0.5 --schedule paper "
        f"--temperature 2 --seed 3 --precision {precision}")
    assert calls == [pytest.approx([0.1 * drop, 0.2 * drop, 0.3 * drop])
                     for drop in (1, 0.1) for _ in range(len(calls) // 2)]  # (lr) of two epochs
    train = np.mean([row["train"] for row in result_of(tmp_path)["rows"]])
    assert train == pytest.approx(torch.cat(right).mean().item())


def test_both_networks_learn_the_shapes(run, tmp_path, monkeypatch):
    """20 classes, chance 5 %."""
    monkeypatch.setattr(common, "SHAPES_TRAIN", 600)
    run("switokd", tmp_path, "--epochs 4 --batch-size 20 --learning-rate 0.05")
    rows = result_of(tmp_path)["rows"]
    assert min(rows[-1]["teacher"], rows[-1]["test"]) > 15
    assert rows[-1]["L_student"] < rows[0]["L_student"] and rows[-1]["train"] > rows[0]["train"]


def test_pictures(finished, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs")
    for folder, _ in (finished["compared"], finished["1t2s"]):
        importlib.import_module("figures").main(folder)
        assert {path.stem for path in folder.glob("*.png")} == {"degeneration", "gap", "rule"}
