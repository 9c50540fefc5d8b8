"""SwitOKD against its specification: its section 11, numpy oracles, gradients, tiny runs. Networks
that return a parameter put the goldens, typed from the specification, into a step."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    ce, folder_of, kl, log, log_p, refused, result_of, same, same_run, shapes_data,
    stopped, table, tensor)
from torch import nn

import common
import switokd

Y, LABELS, STEPS = [0, 1], torch.tensor([0, 1]), 6  # of an epoch of a run
LATE, THREE_OF_100 = (140, 200, 250), "wrn_16_2 mobilenetv2 wrn_16_10"  # CIFAR-100
CPU = Namespace(device=torch.device("cpu"), precision="fp32")
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
FIXED = {"A": {0.7: "learning", 0.6: "expert"}, "C": {0.2: "learning"}}
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


# ------------------------------------------------------------------------------ a step on logits
def numbers(z_s, z_t, y=Y, tau=1):
    """G, delta, eps, s, t by equations (1) to (4)."""
    p_s, p_t, hot = np.exp(log_p(z_s, tau)), np.exp(log_p(z_t, tau)), np.eye(len(z_s[0]))[y]
    s, t, G = (np.abs(a - b).sum(1).mean() for a, b in ((p_s, hot), (p_t, hot), (p_s, p_t)))
    eps = np.exp(-t / (s + t))
    return G, s - eps * t, eps, s, t


def close(values):
    """Goldens have six decimals, and a step computes in float32."""
    return pytest.approx(values, abs=2e-6)


class Logits(nn.Module):
    """A network that answers with a parameter, whatever it is shown; batch norm beside it."""

    def __init__(self, z):
        super().__init__()
        self.z, self.norm, self.calls = nn.Parameter(tensor(z)), nn.BatchNorm1d(2).double(), 0

    def forward(self, x):
        self.calls += 1
        return self.z + 0 * self.norm(x).sum()


NAMES = {  # (students, teachers)
    "pair": (["student"], ["teacher"]), "2t1s": (["student"], ["teacher-1", "teacher-2"]),
    "1t2s": (["student-1", "student-2"], ["teacher"])}


def step(*case, y=Y, tau=1.0, fixed=None, finished=False, topology="pair"):
    """A step on the logits of the students, then of the teachers: losses, pairs, networks.

    Each pair is as the oracle says, with its bounds and the rule in one line, (10); each network
    has its own loss and gradient, (7) to (9), (11), (12), peers as constants. Those without a
    loss, and no others, stay as they were but for batch norm; ONE forward each.
    """
    students, teachers = NAMES[topology]
    z = {name: np.array(one, float) for name, one in zip([*students, *teachers], case, strict=True)}
    networks, sgd = {name: Logits(one) for name, one in z.items()}, {}
    for name, network in networks.items():  # an old gradient, momentum and decay would move z
        sgd[name] = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.1)
        network.z.grad = torch.ones_like(network.z)
        sgd[name].state[network.z]["momentum_buffer"] = torch.ones_like(network.z)
    losses, logits, pairs = switokd.train_step(
        *({name: networks[name] for name in part} for part in (students, teachers)),
        {name: sgd[name] for name in (students if finished else networks)},
        torch.tensor([[1.0, 2], [3, 5]], dtype=torch.float64), torch.tensor(y),
        Namespace(**vars(CPU), temperature=tau, fixed=fixed))
    assert list(losses) == list(logits) == list(networks)
    assert list(pairs) == [(student, teacher) for teacher in teachers for student in students]
    p, hot = {name: np.exp(log_p(one, tau)) for name, one in z.items()}, np.eye(len(z[name].T))[y]
    for (student, teacher), pair in pairs.items():
        G, delta, eps, s, t = numbers(z[student], z[teacher], y, tau)
        assert pair[1:] == pytest.approx((G, delta, eps, s, t), abs=1e-5)
        above = np.where(hot, p[student] - p[teacher], p[teacher] - p[student])
        slack = 2 * np.maximum(above, 0).sum(1).mean()
        assert slack == pytest.approx(G - (s - t)) and G <= s + t and s - t <= delta <= s
        assert s - np.exp(t / (s + t)) * t < G  # with a plus sign no teacher would learn
        expert = (slack > (1 - eps) * t if fixed is None else G > fixed) and t < s
        assert pair.mode == ("expert" if expert else "learning")
    for own, network in networks.items():
        assert logits[own].dtype == torch.float32 and not logits[own].requires_grad
        assert logits[own].numpy() == pytest.approx(z[own], rel=1e-6)
        assert network.calls == 1 and network.norm.running_mean.all()
        momentum, grad = sgd[own].state[network.z]["momentum_buffer"], network.z.grad.numpy()
        kept = torch.equal(network.z, tensor(z[own])), (momentum == 1).all(), (grad == 1).all()
        expert = {peer for (peer, other), pair in pairs.items()
                  if other == own and pair.mode == "expert"}
        paused = own in teachers and (finished or len(expert) == len(students))
        assert kept == (paused,) * 3 and (losses[own] is None) == paused
        if not paused:
            others = [name for name in z if name != own and name not in expert]
            loss = ce(z[own], y) + sum(kl(z[other], z[own], tau) for other in others)
            losses[own] = losses[own].item()
            assert losses[own] == pytest.approx(loss, rel=1e-5)
            soft = sum((p[own] - p[other]) / tau for other in others)
            assert grad == close((np.exp(log_p(z[own])) - hot + soft) / len(y))
    return losses, pairs, networks


# ------------------------------------------------------------------------- equations (1) to (12)
@pytest.mark.parametrize("name", CASES)
def test_goldens_of_a_pair(name):
    (z_s, z_t, tau), (s, t, G, eps, delta, to_s, to_t, L_s, L_t) = CASES[name], GOLDEN[name]
    a, b = tensor(z_s), tensor(z_t)
    found = switokd.kl_to(b, a, tau).item(), switokd.kl_to(a, b, tau).item()
    assert found == close((to_s, to_t))
    losses, pairs, networks = step(z_s, z_t, tau=tau)
    (pair,) = pairs.values()
    assert pair.mode == ("learning" if L_t else "expert")
    assert pair[1:] == close((G, delta, eps, s, t))
    assert losses == {"student": close(L_s), "teacher": L_t and close(L_t)}
    if name == "A":
        assert networks["student"].z.grad.numpy() == close(np.array(GRADIENT))
    # fixed thresholds, one of them infinite: the numbers stay, and a step in the same mode as well
    for fixed, mode in [*FIXED.get(name, {}).items(), (np.inf, "learning")]:
        losses, others, twins = step(z_s, z_t, tau=tau, fixed=fixed)
        assert [*others.values()] == [pair._replace(mode=mode)]
        assert (losses["teacher"] is None) == (mode == "expert")
        assert mode != pair.mode or all(
            same(networks[own].state_dict(), twins[own].state_dict()) for own in twins)


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
    assert ce(z_s, Y) + kl(z_s, z_t) == close(1.000682)  # A with the KL reversed
    assert ce(z_s, Y) + kl(z_t, z_s) / 3 == close(0.634145)  # A with "mean"
    assert ce(z_s, Y) + 4 * kl(z_t, z_s, 2) == close(1.072192)  # E with tau^2
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
    """NaN for two perfect networks; both comparisons are strict; unequal shapes are refused."""
    for s, t, delta, eps in (
            (1.2, 0.8, 0.663744, 0.670320), (1, 1, 0.393469, 0.606531), (1, 0, 1, 1),
            (0, 1, -0.367879, 0.367879), (0, 0, np.nan, np.nan)):
        found = switokd.switching_threshold(tensor(s), tensor(t))
        assert found == pytest.approx((delta, eps), abs=1e-6, nan_ok=True)
    z_s, z_t = torch.randn(2, 6, 5, requires_grad=True)
    s, t = (switokd.label_distance(z, torch.zeros(6, dtype=torch.long)) for z in (z_s, z_t))
    G, thresholds = switokd.distillation_gap(z_s, z_t), switokd.switching_threshold(z_s.sum(), 1.0)
    thresholds += switokd.switching_threshold(1.0, z_t.sum())
    assert not any(one.requires_grad for one in (s, t, G, *thresholds))  # (1) to (4) decide alone
    for G, delta, s, t, mode in (
            (1, 1, 1.2, 0.8, "learning"), (1, 0.9, 1.2, 0.8, "expert"),
            (1, 0.9, 0.8, 0.8, "learning"), (0, np.nan, 0, 0, "learning")):
        assert switokd.choose_mode(G, delta, s, t) == mode
    for function in (switokd.kl_to, switokd.distillation_gap, switokd.label_distance):
        for other in ((2, 4), (1, 3), (2, 1), (3,)):  # broadcasting would hide it
            with pytest.raises(ValueError, match="must be one shape|for logits of"):
                function(torch.zeros(2, 3), torch.zeros(other, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits of \(3, 3, 3, 3\)"):
        switokd.label_distance(torch.zeros(3, 3, 3, 3), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("topology", NAMES)
@pytest.mark.parametrize("method", ["switokd", "never", "kd"])
@pytest.mark.parametrize("tau", [0.5, 1, 3])
def test_a_step_on_random_logits(topology, method, tau):
    """By the oracle of `step`; both modes occur."""
    random, modes = np.random.default_rng(4), set()
    for batch, classes in [(2, 3), (3, 3), (5, 7), (33, 20)] * 2:
        case = random.normal(0, 2 * tau, (2 if topology == "pair" else 3, batch, classes))
        _, pairs, _ = step(*case, y=random.integers(0, classes, batch), tau=tau, topology=topology,
                           **switokd.METHODS[method][0])
        modes |= {pair.mode for pair in pairs.values()}
    assert len(modes) == (1 if method == "never" else 2)


@pytest.mark.parametrize("flags, networks, epochs, initial, drops", [
    ("cifar10", "wrn_16_1 wrn_16_8", 299, [0.1, 0.1], (100, 150, 200)),
    ("cifar10 --epochs 300", "wrn_16_1 wrn_16_8", 300, [0.1, 0.1], (151, 201, 251)),
    ("cifar100", "mobilenetv2 wrn_16_2", 299, [0.01, 0.1], LATE),
    ("cifar100 --student resnet8", "resnet8 wrn_16_2", 299, [0.1, 0.1], LATE),
    ("cifar100 --topology 2t1s", "mobilenetv2 wrn_16_2 wrn_16_10", 269, [0.01, 0.1, 0.1], LATE),
    ("cifar100 --topology 1t2s", THREE_OF_100, 269, [0.1, 0.01, 0.1], LATE),
    ("cifar100 --topology 1t2s --learning-rate 0.05", THREE_OF_100, 269, [0.05] * 3, LATE),
    ("imagenet", "resnet18 resnet34", 120, [0.1, 0.1], (31, 61, 91)),
    ("fashionmnist", "resnet8x0.5 resnet20", 15, [0.05, 0.05], (11, 13, 15)),
    ("shapes", "resnet8x0.5 resnet14", 12, [0.1, 0.1], (9, 10, 12))])
def test_recipes(flags, networks, epochs, initial, drops):
    """Section 6: networks (students, then teachers), epochs, rates and where they drop (from 1)."""
    arguments = switokd.parse_args(f"--device cpu --dataset {flags}".split())
    batch, decay = {"imagenet": (512, 1e-4), "cifar10": (128, 5e-4), "cifar100": (128, 5e-4)}.get(
        arguments.dataset, (64, 5e-4))
    assert (arguments.batch_size, arguments.weight_decay, arguments.momentum) == (batch, decay, 0.9)
    assert " ".join([*arguments.student, *arguments.teacher]) == networks
    assert (arguments.temperature, arguments.method) == (1, ["switokd"])
    assert getattr(arguments, "nesterov", False) == (batch == 64)
    arguments.seed = 0
    of = switokd.networks_of("student", arguments) | switokd.networks_of("teacher", arguments)
    for (*_, rate), first in zip(of.values(), initial, strict=True):
        assert (len(rate), rate[0], rate[-1]) == (epochs, first, pytest.approx(first / 1000))
        assert tuple(e + 1 for e in range(1, epochs) if rate[e] != rate[e - 1]) == drops


def test_a_topology_counts_its_networks(capsys):
    for flags, word in (("--topology 2t1s --teacher resnet8", "2t1s takes 2 --teacher"),
                        ("--student resnet8 resnet8", "pair takes 1 --student")):
        assert word in refused("switokd", flags, capsys)


# ------------------------------------------------------------------------------------------ runs
RUNS = {  # "fixed 0.2" switches
    "pair": "--compare", "2t1s": "--method 'fixed 0.2' --topology 2t1s --teacher resnet8 resnet8",
    "1t2s": "--method kd 'fixed 0.2' --topology 1t2s --student resnet8x0.5 resnet8x0.5 "
            "--open-set 8 --batch-size 30"}


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """{topology: (folder of its runs and their cache, the table)}."""
    folders = {topology: tmp_path_factory.mktemp(topology) for topology in RUNS}
    return {topology: (out, table(run("switokd", out, f"{RUNS[topology]} --cache {out}/cache")))
            for topology, out in folders.items()}


@pytest.mark.parametrize("topology", RUNS)
def test_what_a_run_leaves(finished, topology):
    """A row a pair a step in the steps of each epoch, their means in log.csv, the summary in the
    table, and weights that give the last accuracy."""
    (out, rows), (students, teachers) = finished[topology], NAMES[topology]
    data = shapes_data(open_set=8 if topology == "1t2s" else 0)
    folder, row = folder_of(out, "fixed 0.2"), rows["fixed 0.2"]
    result = result_of(folder)
    lines = [line for epoch in "12" for line in log(folder, f"steps-000{epoch}.csv")]
    assert [(line["step"], line["student"], line["teacher"]) for line in lines] == [
        (str(k + 1), student, teacher) for _ in "12" for k in range(STEPS)
        for teacher in teachers for student in students]
    G, delta, eps, s, t = np.array([[float(line[name]) for name in switokd.Pair._fields[1:]]
                                    for line in lines]).T
    assert delta == close(s - eps * t) and eps == close(np.exp(-t / (s + t)))
    expert = (G > 0.2) & (t < s)
    assert [line["mode"] for line in lines] == np.where(expert, "expert", "learning").tolist()
    paused = expert.reshape(2, STEPS, len(teachers), len(students)).all(3)  # full pauses
    for name, values in (("gap", G), ("delta", delta), ("paused", 100 * paused)):
        assert [one[name] for one in result["rows"]] == pytest.approx(
            values.reshape(2, -1).mean(1))
    summary = switokd.switching(dict(zip(teachers, paused.reshape(2 * STEPS, -1).T.tolist())))
    assert summary["switches"] > 0 and result["measures"].items() >= summary.items()
    assert result["measures"]["gap"] == pytest.approx(G.mean())
    files = {path.stem: path for path in folder.glob("*.pt")}
    assert files.keys() == {*students, *teachers, "student"}
    for own, path in files.items():
        network = data.build("resnet8x0.5" if own.startswith("student") else "resnet8")
        accuracy = common.evaluate(common.load_weights(network, path), data.test, CPU)
        column = "test" if own in ("student", "student-2") else own
        assert (row[column], result["rows"][-1][column]) == (f"{accuracy:.2f}", accuracy)


def test_the_summary_counts_each_teacher():
    yes, no = True, False
    found = switokd.switching({"a": [no, yes, yes, no, yes, no], "b": [yes, yes, no, no, no, no]})
    assert found == {"paused": pytest.approx(100 * 5 / 12), "switches": 5,
                     "expert_run": pytest.approx(5 / 3)}


def test_a_stopped_run_goes_on_bit_for_bit(finished, run, tmp_path, monkeypatch):
    """Ctrl-C in epoch 2, between its steps and its checkpoint: no step counts twice."""
    out, _ = finished["2t1s"]
    whole, flags = folder_of(out, "fixed 0.2"), f"{RUNS['2t1s']} --cache {out}/cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, common, "save", 2)
        run("switokd", tmp_path, flags)
    assert len(log(folder := folder_of(tmp_path, "fixed 0.2"))) == 2
    assert "goes on after epoch 1" in run("switokd", tmp_path, flags)
    assert same_run(folder, whole) and all(
        log(folder, f"steps-000{epoch}.csv") == log(whole, f"steps-000{epoch}.csv")
        for epoch in (1, 2))


def test_the_rows_of_the_table_and_finished_teachers(finished):
    """--compare: each network alone, then all METHODS. Finished teachers leave no loss, pause or
    weights; recognition is of student-2."""
    _, found = finished["pair"]
    assert list(found) == ["teacher alone", "student alone", *switokd.METHODS]
    assert list(finished["2t1s"][1]) == ["student alone", "fixed 0.2"]
    assert [changes["fixed"] for changes, _ in switokd.METHODS.values()] == [
        None, 3, *(float(name[6:]) for name in found if name.startswith("fixed")), None]
    for name, values in (("never", ["0.0", "0", "0.0"]), ("kd", ["-", "-", "-"])):
        assert [found[name][key] for key in ("paused", "switches", "expert_run")] == values
    out, found = finished["1t2s"]
    folder, data = folder_of(out, "kd"), shapes_data(open_set=8)
    alone = {result_of(place)["arguments"]["seed"]: result_of(place)["last_test"]
             for place in (out / "cache").iterdir()}
    for row in result_of(folder)["rows"]:
        assert row["teacher"] == alone[1000] and row["L_teacher"] is row["paused"] is None
    assert {path.stem for path in folder.glob("*.pt")} == {"student", "student-1", "student-2"}
    assert found["kd"]["teacher"] == found["teacher alone"]["teacher"] == f"{alone[1000]:.2f}"
    assert [found["student alone"][name] for name in ("student-1", "test")] == [
        f"{alone[seed]:.2f}" for seed in (0, 1)]
    student = common.load_weights(data.build("resnet8x0.5"), folder / "student-2.pt")
    assert found["kd"]["rank1"] == f"{common.recognition(student, data, CPU)['rank1']:.1f}"


def test_the_loop_takes_what_the_flags_say(run, tmp_path, monkeypatch):
    """Each network has a seed and a schedule of its own, and is in train mode; the forward alone is
    bf16, all that follows float32."""
    calls, original = [], switokd.train_step

    def spy(students, teachers, optimizers, images, labels, settings):
        networks = students | teachers
        for own, model, seed in zip(networks.values(), ("resnet8", "resnet8x0.5", "resnet8"),
                                    (3, 4, 1003), strict=True):
            fresh = common.build_model(model, 20, 16, seed)
            assert own.training and same(own.state_dict(), fresh.state_dict()) == (not calls)
        calls.append([optimizers[name].param_groups[0]["lr"] for name in networks])
        assert (settings.temperature, settings.fixed, settings.precision) == (2, 0.6, "bf16")
        losses, logits, pairs = original(students, teachers, optimizers, images, labels, settings)
        for z in logits.values():
            assert z.dtype == losses["student-1"].dtype == torch.float32
            assert torch.equal(z, z.bfloat16().float())
        return losses, logits, pairs
    monkeypatch.setattr(switokd, "train_step", spy)
    run("switokd", tmp_path, "--topology 1t2s --student resnet8 resnet8x0.5 --method 'fixed 0.6' "
        "--learning-rate 0.3 --student-learning-rate 0.2 --train-fraction 0.5 --schedule paper "
        "--temperature 2 --seed 3 --precision bf16")
    assert calls == [pytest.approx([0.2 * drop, 0.2 * drop, 0.3 * drop])
                     for drop in (1, 0.1) for _ in range(len(calls) // 2)]  # (lr) of two epochs
