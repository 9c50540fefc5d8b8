"""RCO against its specification: oracles, goldens, gradients, and tiny runs under spies.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give.
"""

from argparse import Namespace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import (
    ce, folder_of, kl, log, log_p, refused, result_of, same, shapes_data, table, tensor, weights)
from test_gpu import leaves, pretended_gpu, there
from torch import nn

import common
import rco

DIGITS = 1e-6  # the goldens have six decimals
Z_S, Z_T, Y = [[1, 2, 3], [0, 0, 0]], [[3, 2, 1], [1, -1, 0]], [2, 0]
F_S, F_T = [[1, 2, 0], [0, -1, 3]], [[0, 2, 0], [2, 1, 3]]
A = [1, 1.2, 1.5, 1.79, 1.81, 2.5]  # KLs of candidates


def clone(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


# --------------------------------------------------------------------- losses, eqs. (1) to (4)
def test_goldens():
    """Loss, CE and KL, these two without lambda and T^2; gradient; features."""
    z_s, z_t, y = tensor(Z_S, grad=True), tensor(Z_T), torch.tensor(Y)
    for settings, value, kl_value, reversed_kl in (  # settings: weight, T
            ((1, 1), 1.461428, 0.708319, 0.729707),
            ((1, 2), 0.753109 + 0.797155, 0.199289, 0.200907),
            ((0.5, 4), 1.165067, 0.051495, 0.051601), ((0, 4), 0.753109, 0.051495, 0.051601),
            ((1, 4), 1.577025, 0.051495, 0.051601), ((), 1.577025, 0.051495, 0.051601)):
        found = rco.kd_loss(z_s, z_t, y, *settings)
        assert [one.item() for one in found] == pytest.approx([value, 0.753109, kl_value],
                                                              abs=DIGITS)
        assert kl(Z_S, Z_T, *settings[1:] or [4]) == pytest.approx(reversed_kl, abs=DIGITS)
    found[0].backward()
    golden = [[-0.284892, 0.122364, 0.162528], [-0.505125, 0.324783, 0.180342]]
    assert z_s.grad.numpy() == pytest.approx(np.array(golden), abs=DIGITS)
    assert rco.hint_loss(tensor(F_S), tensor(F_T)).item() == 2.25
    assert rco.mimic_loss(tensor(F_S), tensor(F_T)).item() == 4.5
    assert np.square(np.subtract(F_S, F_T)).mean() == 1.5  # F.mse_loss, which divides by D too
    for loss in (rco.hint_loss, rco.mimic_loss, lambda *z: rco.kd_loss(*z, y)):
        for other in ((2, 5), (1, 3), (2, 1), (3,)):
            with pytest.raises(ValueError, match="2, 3"):
                loss(z_s, torch.zeros(other))


def test_the_value_betrays_the_mistake():
    right, _, _ = rco.kd_loss(tensor(Z_S), tensor(Z_T), torch.tensor(Y), 1, 4)
    for mistake, listed, computed in (
            ("no T^2", 0.804604, ce(Z_S, Y) + kl(Z_T, Z_S, 4)),
            ("mean", 1.027748, ce(Z_S, Y) + 16 * kl(Z_T, Z_S, 4) / 3),
            ("reversed KL", 1.578730, ce(Z_S, Y) + 16 * kl(Z_S, Z_T, 4)),
            ("softmax twice", 1.771817, ce(np.exp(log_p(Z_S)), Y) + 16 * kl(Z_T, Z_S, 4)),
            ("a = 0.5 mix", 0.788513, 0.5 * ce(Z_S, Y) + 0.5 * 16 * kl(Z_T, Z_S, 4)),
            ("sum over the batch", 2.400941, ce(Z_S, Y) + 16 * 2 * kl(Z_T, Z_S, 4))):
        assert computed == pytest.approx(listed, abs=DIGITS), mistake
        assert abs(right.item() - listed) > 1e-5, mistake


@pytest.mark.parametrize("batch, width, weight, T", [(5, 7, 1, 4), (1, 3, 0.3, 1), (8, 20, 2.5, 2)])
def test_losses_and_gradients_on_random_input(batch, width, weight, T):
    """Eqs. (2) to (4) and closed-form gradients: the student's; the teacher gets none."""
    random = np.random.default_rng(batch)
    a, b, y = *random.normal(0, 2, (2, batch, width)), random.integers(0, width, batch)
    hot, squared = np.eye(width)[y], np.square(a - b).sum(1).mean()
    labels, soft = torch.tensor(y), np.exp(log_p(a, T)) - np.exp(log_p(b, T))
    for loss, value, gradient in (
            (lambda s, t: rco.kd_loss(s, t, labels, weight, T)[0],
             ce(a, y) + weight * T**2 * kl(b, a, T), np.exp(log_p(a)) - hot + weight * T * soft),
            (rco.hint_loss, squared / 2, a - b), (rco.mimic_loss, squared, 2 * (a - b))):
        student, teacher = tensor(a, grad=True), tensor(b, grad=True)
        found = loss(student, teacher)
        found.backward()
        assert found.shape == () and found.item() == pytest.approx(value, rel=1e-12)
        assert student.grad.numpy() == pytest.approx(gradient / batch, rel=1e-9, abs=1e-12)
        assert teacher.grad is None


@pytest.mark.parametrize("transfer", ["kd", "hint", "mimic"])
def test_one_step_follows_the_total_loss(transfer):
    """Terms and gradients of (2), of (2) + mu (3), of (4) alone; none for the teacher."""
    settings, data = Namespace(
        transfer=transfer, weight=0.7, temperature=3.0, hint_weight=0.3, precision="fp32", seed=0,
        student="resnet8x0.5", device=torch.device("cpu")), shapes_data()
    assert isinstance(rco.build_student(data, 32, settings).adapter, nn.Identity)  # equal widths
    student, teacher = rco.build_student(data, 64, settings), data.build("resnet8", 1).eval()
    assert same(clone(student), clone(rco.build_student(data, 64, settings)))  # by the seed alone
    (x, y), still = next(data.test.batches(9)), torch.optim.SGD(student.parameters(), 0.0)
    terms, logits = rco.train_step(student, teacher, still, x, y, settings)
    f_s, f_t = student.embed(x), teacher.embed(x)
    z_s = student.head(f_s)
    total, *terms_of_2 = rco.kd_loss(z_s, teacher.head(f_t), y, 0.7, 3.0)
    wanted = dict(zip(("ce", "kl"), terms_of_2))
    if transfer == "hint":
        wanted["hint"] = rco.hint_loss(student.adapter(f_s), f_t)
        total = total + 0.3 * wanted["hint"]
    elif transfer == "mimic":
        total = rco.mimic_loss(student.adapter(f_s), f_t)
        wanted = {"mimic": total}
    found = [parameter.grad for parameter in student.parameters()]
    student.zero_grad()
    total.backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in student.parameters()])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in wanted.items()}, rel=1e-5)
    assert logits is None if transfer == "mimic" else torch.equal(logits, z_s)


# ------------------------------------------ anchors, rates, hardness of the route, eqs. (7) to (12)
def test_equal_epoch_and_one_stage_anchors():
    for E, N, anchors in (
            (240, 1, [240]), (240, 3, [80, 160, 240]), (240, 4, [60, 120, 180, 240]),
            (10, 3, [3, 6, 10]), (25, 4, [6, 12, 18, 25]), (5, 6, [1, 2, 3, 4, 5])):  # N at most E
        assert rco.equal_epoch_anchors(E, N) == anchors
    for E, N, anchors in (
            (240, 24, {0: 10, 9: 10, 10: 20, 239: 240}), (240, 1, {0: 240, 239: 240}),
            (10, 10, {3: 4}), (25, 3, {0: 9, 8: 9, 9: 18, 17: 18, 18: 25, 24: 25}),
            (3, 24, {0: 1, 1: 2, 2: 3})):
        found = rco.one_stage_anchors(E, N)
        assert len(found) == E and {e: found[e] for e in anchors} == anchors


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


@pytest.mark.parametrize("flags, method, plan", [  # a list for each stage: its epochs' anchors
    ("", "eei", [[3] * 3, [6] * 3, [9] * 3, [12] * 3]), ("--epochs 2", "eei", [[1], [2]]),
    ("", "greedy", [[3] * 3]), ("", "one-stage", [[*range(1, 13)]]), ("", "kd", [[12] * 12]),
    ("--anchors 2", "kd restarts", [[12] * 6] * 2), ("--anchors 5", "kd long", [[12] * 10]),
    ("--dataset folder --anchors 2", "kd long", [[15] * 30]),
    ("--dataset folder", "greedy", [[1] * 15])])
def test_plans(flags, method, plan):
    """The stages of shapes cost together what kd costs, those of other sets E epochs each."""
    arguments = rco.parse_args(f"--device cpu {flags}".split())
    assert rco.METHODS[method][0](arguments)["plan"] == plan


def test_learning_rates():
    """Eq. (12): the whole of E = 240, E = 1, E not a multiple of 4; "steps" on shapes."""
    assert rco.learning_rates(0.05, 240) == pytest.approx(
        [0.05] * 60 + [5e-3] * 60 + [5e-4] * 60 + [5e-5] * 60, rel=1e-12)
    assert rco.learning_rates(0.05, 1) == [0.05]
    assert rco.learning_rates(1, 10) == pytest.approx([1] * 3 + [.1] * 2 + [.01] * 3 + [.001] * 2)
    steps = rco.learning_rates(1, 16, rco.parse_args(["--device", "cpu"]).schedule)
    assert steps == pytest.approx([1] * 10 + [.1] * 2 + [.01] * 2 + [.001] * 2)


@pytest.mark.parametrize("training", [True, False])
def test_route_kl_golden(training):
    """Batches count by their size; batch norm by its own statistics; no trace is left."""
    factors, x = (1, 0.5, 1.5, 3), np.array([[1.0, 2, 3], [0, 0, 0], [2, -1, 0]])
    networks = [nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, eps=0)).train(training)
                for _ in factors]  # until it has learned, this batch norm changes nothing
    for network, factor in zip(networks, factors):
        network[0].weight.data = factor * torch.eye(3)
    before = [clone(network) for network in networks]
    for T, golden in ((1, [0.071442, 0.029211, 0.136410]), (4, [0.005933, 0.005724, 0.077090])):
        batches = ((images, None) for images in tensor(x).float().split([2, 1]))
        found = rco.route_kl(networks[0], networks[1:], batches, T)
        assert found == pytest.approx(golden, abs=DIGITS) and all(type(h) is float for h in found)
    wrong = [0.059194, 0.037526, 0.344838]  # reversed, T = 1
    assert [kl(x, k * x) for k in factors[1:]] == pytest.approx(wrong, abs=DIGITS)
    for network, state in zip(networks, before):
        assert same(clone(network), state) and network[1].training == training


# ------------------------------------------------------------------------------------------ runs
def play(run, out, flags):
    """rco.py with a look at its data and its route; its result."""
    trace, route = Namespace(), rco.teacher_route

    def spy(data, arguments):
        trace.data, trace.arguments, (trace.route, row) = data, arguments, route(data, arguments)
        trace.stored = {epoch: clone(network) for epoch, network in trace.route.items()}
        return trace.route, row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rco, "teacher_route", spy)
        trace.printed = run("rco", out, "--epochs 3 --stage-epochs 3 --schedule paper " + flags)
    trace.folder, = (path for path in out.iterdir() if path.is_dir())
    trace.result, trace.student = result_of(trace.folder), weights(trace.folder / "student.pt")
    return trace


def sgd(network):
    return torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True,
                           fused=True)


def plain_loop(trace, used, L):
    """The student after each epoch, by eqs. (6) to (8) and Algorithms 1 and 2: `used` holds the
    epochs' anchors. Weights, buffers and shuffling go on; every L epochs SGD and rate start anew.
    """
    student = rco.build_student(trace.data, 64, trace.arguments)
    generator = torch.Generator().manual_seed(0)
    initial = 0.01 if trace.arguments.transfer == "mimic" else 0.1
    for e, anchor in enumerate(used):
        if e % L == 0:
            optimizer = sgd(student)
        optimizer.param_groups[0]["lr"] = initial * 0.1 ** (4 * (e % L) // L)  # eq. (12)
        for batch in trace.data.train.augmented(50, generator):
            rco.train_step(student.train(), trace.route[anchor], optimizer, *batch,
                           trace.arguments)
        yield student


@pytest.fixture(scope="module")
def once(run, tmp_path_factory):
    """flags -> trace; each run once, all with the same teacher."""
    return cache(lambda flags: play(run, tmp_path_factory.mktemp("rco"), flags))


def test_route_holds_the_states_of_one_run_which_may_be_files(once, run, tmp_path):
    """Eq. (5): C_e is, to the bit, the state after epoch e of the plain loop written here."""
    trace = once("--anchors 3")
    network = common.build_model("resnet8", 20, 16, seed=1000)
    optimizer, generator = sgd(network), torch.Generator().manual_seed(1000)
    assert sorted(trace.route) == [1, 2, 3]
    for epoch in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** (epoch - 1)  # eq. (12)
        for images, labels in trace.data.train.augmented(50, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        assert same(trace.stored[epoch], clone(common.folded(network)))
        torch.save(network.state_dict(), tmp_path / f"{epoch}.pt")
    files = " ".join(str(tmp_path / f"{epoch}.pt") for epoch in (1, 2, 3))
    given = play(run, tmp_path / "run", f"--teacher-weights {files}")
    assert same(given.student, trace.student) and given.result["plan"] == trace.result["plan"]


def test_of_the_route_only_what_is_in_use_lies_on_a_gpu(run, tmp_path, monkeypatch):
    """`teacher_route` leaves it on the CPU, where it is at the end; a step's anchor is a copy."""
    seen = []

    def spy(name):
        function = getattr(rco, name)
        monkeypatch.setattr(rco, name, lambda *args: seen.append(args) or function(*args))

    with pretended_gpu():
        spy("train"), spy("train_step")
        run("rco", tmp_path, "--device cuda --epochs 4 --anchors 2 --method eei")
        (_, _, route, _), *steps = seen
        assert len(route) == 4 and len(steps) >= 4
        assert not any(map(there, leaves([one.state_dict() for one in route.values()])))
        assert all(there(value) for step in steps for value in step[1].state_dict().values())


@pytest.mark.parametrize("flags", ["--epochs 50 --anchors 7", "--epochs 7", "--dataset folder"])
def test_route_keeps_what_every_method_needs(flags, monkeypatch):
    """All methods with their usual N share one route, also for odd E; C_E is its last state."""
    monkeypatch.setattr(rco, "train_network", lambda *_, keep, **__: (
        {"last_test": 0, "best_test": 0, "rows": [], "seconds": 0},
        dict.fromkeys(keep, nn.Identity())))
    arguments = rco.parse_args(f"--device cpu {flags}".split())
    arguments.seed = 0
    kept = {*rco.teacher_route(None, arguments)[0]}
    for arguments.anchors in [arguments.anchors, None]:  # noqa: B020
        for changes, _ in rco.METHODS.values():
            assert {*sum(changes(arguments)["plan"], [])} <= kept
        assert {*rco.anchors("greedy", arguments)} <= kept and max(kept) == arguments.epochs


def test_eei_with_one_anchor_is_plain_kd_and_weight_zero_the_student_alone(once, run):
    """And the default rows of the table."""
    kd, zero = once("--method kd"), once("--method kd --weight 0")
    assert same(once("--anchors 1").student, kd.student) and not same(zero.student, kd.student)
    alone, *_ = [folder for folder in run.cache.glob("shapes-resnet8x0.5-3-*")
                 if same(weights(folder / "epoch-0003.pt"), zero.student)]
    rows, ((_, teacher),) = table(kd.printed), kd.result["teacher_test"]
    assert {name: row["test"] for name, row in rows.items()} == {
        "teacher alone": f"{teacher:.2f}", "student alone": f"{result_of(alone)['last_test']:.2f}",
        "kd": f"{kd.result['last_test']:.2f}"}
    assert rows["teacher alone"]["kl_final"] == "0.0000" < rows["student alone"]["kl_final"]


@pytest.mark.parametrize("flags, used", [  # the teacher of every epoch
    ("--anchors 3", [1] * 3 + [2] * 3 + [3] * 3), ("--anchors 1", [3] * 3),
    ("--anchors 2 --transfer hint", [1] * 3 + [3] * 3),
    ("--anchors 2 --transfer mimic", [1] * 3 + [3] * 3),
    ("--method one-stage --anchors 2", [2, 2, 3]),
    ("--method 'kd restarts' --stage-epochs 1", [3] * 3),
    ("--method 'kd long' --anchors 2 --stage-epochs 2", [3] * 4),
    ("--method greedy --threshold 1e6", [1] * 3 + [3] * 3)])
def test_stages_equal_the_plain_loop(once, flags, used):
    """To the bit, the last weights, not the best; the teachers stay; the record agrees."""
    trace = once(flags)
    *_, student = plain_loop(trace, used, len(trace.result["plan"][0]))
    assert hasattr(student.adapter, "weight") == ("--transfer" in flags)  # from 32 to 64 features
    assert same(trace.student, {name: value for name, value in student.state_dict().items()
                                if "mimic" in flags or not name.startswith("adapter.")})
    for epoch, network in trace.route.items():
        assert same(clone(network), trace.stored[epoch]) and not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert [row["anchor"] for row in trace.result["rows"]] == used == sum(trace.result["plan"], [])
    assert [epoch for epoch, _ in trace.result["teacher_test"]] == sorted(set(used))


def test_greedy_measures_the_current_student(run, tmp_path, monkeypatch):
    """Eq. (9) on X' for the student as each epoch left it; the longest way: N stages."""
    choices = []

    def next_anchor(kl, current, threshold):
        choices.append((kl, threshold))
        assert current == len(choices)
        return current + 1
    monkeypatch.setattr(rco, "next_anchor", next_anchor)
    trace = play(run, tmp_path / "out", "--method greedy --threshold 0.7")
    held, truth = trace.data.validation, []
    assert [stage[0] for stage in trace.result["plan"]] == [1, 2, 3]
    epochs = plain_loop(trace, sum(trace.result["plan"], []), 3)
    for student, row in zip(epochs, log(trace.folder), strict=True):
        with torch.no_grad():
            z_s, *z_t = (network.eval()(held.normalise(held.images)).double().numpy()
                         for network in (student, *(trace.route[e] for e in (1, 2, 3))))
        truth.append([kl(z, z_s, 4) for z in z_t])
        assert [float(row["kl_anchor"]), float(row["kl_final"])] == pytest.approx(
            [truth[-1][int(row["anchor"]) - 1], truth[-1][2]], rel=1e-3, abs=1e-6)
    stages = truth[2::3]
    assert not np.allclose(stages[0], stages[1], rtol=0.02)  # an earlier student's would not do
    assert np.array(trace.result["route_kls"]) == pytest.approx(np.array(stages), rel=1e-3)
    assert choices == [(measured, 0.7) for measured in trace.result["route_kls"][:2]]
    assert trace.result["measures"]["kl_final"] == pytest.approx(stages[-1][-1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("transfer, left_out", [("kd", "kd on logits"), ("mimic", "greedy")])
def test_compare(transfer, left_out, run, tmp_path):
    """On shapes kd long is kd; mimic trains no logits for greedy; its rate is its own alone."""
    rows = table(run("rco", tmp_path, f"--transfer {transfer} --compare --cache {tmp_path}/cache"))
    assert list(rows) == ["teacher alone", "student alone", *(
        name for name in rco.METHODS if name != left_out)]
    assert rows.pop("kd long")["note"] == "the same run as kd"
    assert rows.pop("teacher alone") and {row["epochs"] for row in rows.values()} == {"2"}
    alone, = tmp_path.glob("cache/shapes-resnet8x0.5-2-*")
    for name in rows:
        folder = alone if name == "student alone" else folder_of(tmp_path, name)
        own = 0.1 if transfer == "kd" or name in ("student alone", "kd on logits") else 0.01
        assert result_of(folder)["rows"][0]["lr"] == pytest.approx(own)


@pytest.mark.parametrize("flags, says", [
    ("--method 'kd on logits'", "kd on logits is no row of"),
    ("--method greedy --transfer mimic", "greedy is no row of --transfer mimic"),
    ("--teacher-weights a b --epochs 3", "their number divides --epochs")])
def test_argument_errors_are_one_line(flags, says, capsys):
    assert says in refused("rco", flags, capsys)
