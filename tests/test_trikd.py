"""TriKD against its specification: its section 11, numpy oracles, the fixed point, tiny runs.

Goldens are typed from the specification (six decimals), beside them what usual mistakes would give.
"""

import copy
import importlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, result_of, same, same_run, shapes_data, stopped, table, weights
from torch import nn

import common
import trikd
from trikd import Weights

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


def ce(z, y=Y):
    return -log_p(z)[np.arange(len(y)), y].mean()


def gradient(own, peer, anchor, y, w, tau):
    """Eq. (5), divided by N; w: label, peer, anchor."""
    p, q, a = (np.exp(log_p(z, tau)) for z in (own, peer, anchor))
    hard = np.exp(log_p(own)) - np.eye(np.shape(own)[1])[y]
    return (w[0] * hard + tau * (w[1] * (p - q) + w[2] * (p - a))) / len(y)


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
    for other in ((2, 4), (1, 3), (2, 1), (3,)):  # broadcasting would hide it
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            trikd.kl_to(torch.zeros(2, 3), torch.zeros(other))


@pytest.mark.parametrize("w_T, w_S, tau, values, g_T, g_S", [
    (ONES, ONES, 1, (1.636783, 1.965966),
     [[0.284366, -0.131094, -0.153273], [-0.278043, 0.489797, -0.211754]],
     [[-0.134594, -0.057791, 0.192385], [0.248942, 0.376469, -0.625411]]),
    (FIRST, SECOND, 2, (2.412709, 1.938611),
     [[0.593224, -0.256613, -0.336611], [-0.486346, 0.726430, -0.240083]],
     [[-0.374395, 0.054724, 0.319671], [0.424699, 0.257308, -0.682007]])])
def test_loss_and_gradient_goldens(w_T, w_S, tau, values, g_T, g_S):
    """One backward on the sum: detached targets keep the gradients apart."""
    z_T, z_S, z_A = (tensor(z, True) for z in (Z_T, Z_S, Z_A))
    L_T = trikd.teacher_loss(z_T, z_S, z_A, torch.tensor(Y), w_T, tau)
    L_S = trikd.student_loss(z_S, z_T, z_A, torch.tensor(Y), w_S, tau)
    assert (L_T.item(), L_S.item()) == pytest.approx(values, abs=DIGITS)
    (L_T + L_S).backward()
    assert z_A.grad is None
    assert z_T.grad.numpy() == pytest.approx(np.array(g_T), abs=DIGITS)
    assert z_S.grad.numpy() == pytest.approx(np.array(g_S), abs=DIGITS)


def test_what_the_usual_mistakes_would_give():
    """Listed wrong values of the second case; right are 2.412709 and, of the gradient, 0.593224."""
    without = ce(Z_T) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 4
    backwards = ce(Z_T) + 0.5 * kl(Z_T, Z_S, 2) + 2 * kl(Z_T, Z_A, 2)
    mean = ce(Z_T) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 3
    assert (without, backwards, mean) == pytest.approx((1.136270, 2.469466, 1.278097), abs=DIGITS)
    p, log_ratio = np.exp(log_p(Z_T, 2)), log_p(Z_T, 2) - log_p(Z_S, 2)
    leak = p * (log_ratio - (p * log_ratio).sum(1, keepdims=True))  # of L_S, target not detached
    assert 0.593224 + 1.5 * leak[0, 0] == pytest.approx(0.7713, abs=5e-5)


# ----------------------------------------------------------------------------- the fixed point, (7)
@pytest.mark.parametrize("T, S, shares", [
    ((1, 1, 1), (1, 1, 1), (0.5, 0.5)), ((1, 1, 1), (1, 1, 0), (0.6, 0.8)),
    ((1, 1, 0), (1, 1, 1), (0.8, 0.6)), ((1, 1, 3), (1, 1, 3), (0.25, 0.25)),
    ((1, 1, 10), (1, 1, 10), (1 / 11, 1 / 11)), ((1, 100, 100), (1, 100, 100), (1 / 101,) * 2),
    ((1, 1, 0), (1, 1, 0), (1, 1)), (FIRST, SECOND, (0.366197, 0.563380))])
def test_label_shares(T, S, shares):
    """Both networks at rest: W_T l_T - pi_T l_S = lambda_T, W_S l_S - pi_S l_T = lambda_S."""
    found = trikd.label_shares(Weights(*T), Weights(*S))
    assert found == pytest.approx(shares, abs=DIGITS)
    solved = np.linalg.solve([[sum(T), -T[1]], [-S[1], sum(S)]], [T[0], S[0]])
    assert found == pytest.approx(tuple(solved))
    assert trikd.label_shares(Weights(0, 1, 0), Weights(0, 1, 0)) == (None, None)


@pytest.mark.parametrize("w_T, w_S, p_T, p_S", [
    (ONES, ONES, [[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]],
     [[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]]),
    (FIRST, SECOND, [[0.500526, 0.365145, 0.134329], [0.421632, 0.057062, 0.521307]],
     [[0.655918, 0.251544, 0.092538], [0.290457, 0.039309, 0.670234]])])
def test_free_logits_reach_the_fixed_point(w_T, w_S, p_T, p_S):
    """Gradient descent from anywhere ends at the listed outputs, which are those of (7)."""
    z_T, z_S, z_A = tensor(Z_T, True), tensor(Z_S, True), tensor(Z_A)
    optimizer = torch.optim.SGD([z_T, z_S], 2)
    for _ in range(200):
        optimizer.zero_grad()
        (trikd.teacher_loss(z_T, z_S, z_A, torch.tensor(Y), w_T)
         + trikd.student_loss(z_S, z_T, z_A, torch.tensor(Y), w_S)).backward()
        optimizer.step()
    for z, p, share in zip((z_T, z_S), (p_T, p_S), trikd.label_shares(w_T, w_S)):
        line = share * np.eye(3)[Y] + (1 - share) * np.exp(log_p(Z_A))
        assert z.detach().softmax(1).numpy() == pytest.approx(np.array(p), abs=2e-6)
        assert line == pytest.approx(np.array(p), abs=2e-6)


# ------------------------------------------------------------------------------------------ steps
class Logits(nn.Module):
    """A network that answers with a parameter, whatever it is shown; an old gradient lies on it."""

    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(tensor(z))
        self.z.grad = torch.ones_like(self.z)

    def forward(self, images):
        return self.z


@pytest.mark.parametrize("roles", [None, [], ["peer"], ["anchor"], ["peer", "anchor"]])
@pytest.mark.parametrize("batch, classes, tau", [(1, 3, 1), (6, 5, 1), (8, 20, 4), (3, 2, 0.5)])
def test_steps_follow_the_gradients(roles, batch, classes, tau):
    """Eq. (4), both networks at once, by (5); or a control: the student by (3), where an absent
    network (not in `roles`) has no term. What is fixed stays as it is."""
    random = np.random.default_rng(batch)
    z_S, z_T, z_A = random.normal(0, 2, (3, batch, classes))
    y, w_T, w_S = random.integers(0, classes, batch), FIRST, Weights(*random.uniform(0, 3, 3))
    student, teacher, anchor = Logits(z_S), Logits(z_T), common.frozen(Logits(z_A))
    fixed = {"peer": common.frozen(teacher), "anchor": anchor}
    flags = Namespace(temperature=tau, precision="fp32", device=torch.device("cpu"))
    sgd = {"student": torch.optim.SGD(student.parameters(), 0.5),
           "teacher": torch.optim.SGD(teacher.parameters(), 0.5)}
    wanted = {"S_ce": ce(z_S, y), "S_peer": kl(z_T, z_S, tau), "S_anchor": kl(z_A, z_S, tau)}
    if roles is None:
        terms, logits = trikd.train_step(student, teacher, anchor, sgd, None, torch.tensor(y),
                                         {"student": w_S, "teacher": w_T}, flags)
        wanted |= {"T_ce": ce(z_T, y), "T_peer": kl(z_S, z_T, tau), "T_anchor": kl(z_A, z_T, tau)}
        ended = z_T - 0.5 * gradient(z_T, z_S, z_A, y, w_T, tau)
    else:
        terms, logits = trikd.control_step(student, {role: fixed[role] for role in roles},
                                           sgd["student"], None, torch.tensor(y), w_S, flags)
        w_S = [w_S.label, *(getattr(w_S, role) * (role in roles) for role in ("peer", "anchor"))]
        wanted = {name: wanted[name] for name in ("S_ce", *(f"S_{role}" for role in roles))}
        ended = z_T
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-5)
    assert logits.dtype == torch.float32 and logits.tolist() == pytest.approx(z_S.astype("f4"))
    assert teacher.z.detach().numpy() == pytest.approx(ended, abs=1e-6)
    ended = z_S - 0.5 * gradient(z_S, z_T, z_A, y, w_S, tau)
    assert student.z.detach().numpy() == pytest.approx(ended, abs=1e-6)
    assert torch.equal(fixed["peer"].z, tensor(z_T)) and torch.equal(anchor.z, tensor(z_A))


# ------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("typed, T, S", [
    ("", (1, 1, 0.1), (1, 1, 0.1)), ("--anchor-weight 3", (1, 1, 3), (1, 1, 3)),
    ("--label-weight 1 2 --peer-weight 0.5 1.5 --anchor-weight 2 0.25", FIRST, (2, 1.5, 0.25)),
    ("--anchor-on teacher", (1, 1, 0.1), (1, 1, 0)),
    ("--anchor-on student --anchor-weight 3", (1, 1, 0), (1, 1, 3)),
    ("--peer none", (1, 0, 0.1), (1, 0, 0.1))])
def test_the_six_weights(typed, T, S):
    arguments = trikd.parse_args(f"--device cpu {typed}".split())
    assert [trikd.weights_of(role, arguments) for role in ("teacher", "student")] == [T, S]


@pytest.mark.parametrize("typed, word", [
    ("--label-weight 1 2 3", "--label-weight"), ("--anchor-weight -1", "--anchor-weight"),
    ("--label-weight 1 0 --peer-weight 1 0 --anchor-on teacher", "the student are 0"),
    ("--label-weight 0 1 --peer-weight 0 --anchor-on student", "the teacher are 0"),
    ("--peer none --label-weight 0 --anchor-weight 0", "nothing to learn"),
    ("--label-weight 0 --compare", "--label-weight 0"),
    ("--peer none --peer-weight 2", "--peer-weight has no effect here")])
def test_argument_errors_are_one_line(typed, word, capsys):
    assert word in refused("trikd", typed, capsys)


def test_counts_of_a_chain_start_before_it():
    """A_0 counts where an anchor is used, a finished teacher where it teaches; all is ADDED."""
    rows = [{"generation": g, "test": test, "s": 2.0}
            for g, test in ((1, None), (1, 30.0), (2, 50.0), (2, 40.0))]
    result = {"rows": rows, "generations": [{"generation": 1}, {"generation": 2}],
              "before": {"epochs": 5, "t_epochs": 7, "seconds": 100.0}}
    for peer, t_epochs in (("online", (9, 11)), ("finished", (7, 7))):
        found = trikd.generation_rows("chain", {**result, "arguments": {"peer": peer}})
        assert [(one["epochs"], one["t_epochs"], one["seconds"], one["best"]) for one in found] == [
            (7, t_epochs[0], 104, 30), (9, t_epochs[1], 108, 50)]
    alone = {name: (None, {"rows": [{}] * count, "seconds": seconds}) for name, count, seconds in (
        ("student alone", 3, 10.0), ("student alone, long", 9, 70.0), ("teacher alone", 4, 25.0))}
    off = Weights(1, 1, 0)
    for triples, peer, counts in (
            ([off, off], "online", (0, 0, 0)), ([off, ONES], "online", (3, 0, 10)),
            ([off], "finished", (0, 4, 25)), ([ONES], "finished", (3, 4, 35))):
        assert tuple(trikd.trained_before(alone, triples, peer).values()) == counts


# ------------------------------------------------------------------------------------------ runs
class Trace(Namespace):
    __repr__ = object.__repr__  # else a failing test prints every weight of every step


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Two generations and all controls; the networks in the steps of the triplet."""
    folder, cache, steps = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache"), []
    original = trikd.train_step

    def spy(*given):
        networks, optimizers, labels = given[:3], given[3].values(), given[5]
        states = [network.state_dict() for network in networks]
        steps.append(Trace(before=copy.deepcopy(states), labels=labels,
                           training=[network.training for network in networks],
                           momentum={len(one.state) > 0 for one in optimizers},
                           rates={one.param_groups[0]["lr"] for one in optimizers}))
        found = original(*given)
        steps[-1].after = copy.deepcopy(states)
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trikd, "train_step", spy)
        printed = run("trikd", folder, f"--generations 2 --compare --cache {cache}")
    return Trace(folder=folder, cache=cache, printed=printed, steps=steps)


def test_generations_hand_over(whole):
    """A_g is S_g to the bit, A_0 the plain student; S_g+1 and T_g+1 start elsewhere, fresh."""
    generations = whole.steps[:12], whole.steps[12:24]  # 6 batches in each of 2 epochs
    (cached,) = whole.cache.glob("shapes-resnet8x0.5-2-*")
    anchors = weights(cached / "epoch-0002.pt"), generations[0][-1].after[0]
    assert not torch.equal(generations[0][0].labels, generations[1][0].labels)
    for g, (generation, anchor) in enumerate(zip(generations, anchors), 1):
        assert all(same(step.before[2], anchor) and same(step.after[2], anchor)
                   and step.training == [True, True, False] for step in generation)
        assert [step.momentum for step in generation] == [{False}] + [{True}] * 11
        for index, (role, name) in enumerate((("student", "resnet8x0.5"), ("teacher", "resnet8"))):
            fresh = common.build_model(name, 20, 16, 10_000 * g + 1000 * index)
            assert same(generation[0].before[index], fresh.state_dict())
            assert same(weights(whole.folder / f"{role}-{g}.pt"), generation[-1].after[index])
    assert same(weights(whole.folder / "student.pt"), generations[-1][-1].after[0])
    rates = [rate for step in whole.steps[-36::6] for rate in step.rates]  # of the 6 epochs long
    assert rates == pytest.approx([0.1] * 4 + [0.01, 0.001])


def test_measures_by_hand(whole):
    """Accuracies, KL, agreement of the last generation from the saved weights, in numpy."""
    data, result = shapes_data(), result_of(whole.folder)
    last = result["generations"][-1]

    def logits(role, g, split):
        network = common.build_model({"student": "resnet8x0.5", "teacher": "resnet8"}[role], 20, 16)
        network.load_state_dict(weights(whole.folder / f"{role}-{g}.pt"))
        with torch.no_grad():
            return network.eval()(split.normalise(split.images)).double().numpy()
    S, T, A = (logits(*key, data.test) for key in (("student", 2), ("teacher", 2), ("student", 1)))
    assert (last["kl_ts"], last["kl_at"]) == pytest.approx((kl(T, S), kl(A, T)), rel=1e-3)
    assert last["agree"] == pytest.approx(100 * (S.argmax(1) == T.argmax(1)).mean())
    for role, key, gap in (("student", "test", "s_gap"), ("teacher", "teacher", "t_gap")):
        test, train = (100 * (logits(role, 2, split).argmax(1) == split.labels.numpy()).mean()
                       for split in (data.test, data.train))
        assert last[key] == result["rows"][-1][key] == pytest.approx(test)
        assert (last[f"{role}_train"], last[gap]) == pytest.approx((train, train - test))
    assert result["label_shares"] == pytest.approx({"teacher": 1 / 1.1, "student": 1 / 1.1})  # (8)
    assert result["images"] == dict.fromkeys(("student forward and backward", "anchor forward",
                                              "teacher forward and backward"), 4 * 260)
    assert result_of(whole.folder / "kd")["images"] == dict.fromkeys((
        "student forward and backward", "peer forward"), 2 * 260)


def test_compare_prints_every_control_with_its_epochs(whole):
    """The counts, and where the seconds start: with A_0's, or with those of kd's teacher."""
    found = table(whole.printed)
    epochs = {name: (int(row["epochs"]), int(row["t_epochs"])) for name, row in found.items()}
    assert epochs == {
        "student alone": (2, 0), "student alone, long": (6, 0), "TriKD, generation 1": (4, 2),
        "TriKD, generation 2": (6, 4), "kd": (2, 2), "mutual learning": (2, 2),
        "born-again, generation 1": (4, 0), "born-again, generation 2": (6, 0),
        "mutual learning, long": (6, 6)}
    for name, network in (("born-again", "resnet8x0.5"), ("kd", "resnet8")):
        (cached,) = whole.cache.glob(f"shapes-{network}-2-*")
        assert result_of(whole.folder / name)["before"]["seconds"] == result_of(cached)["seconds"]
    assert not any(result_of(whole.folder / "mutual-learning-long")["before"].values())


@pytest.mark.parametrize("typed, twin, at", [
    ("--generations 2", "", ("train_step", 12 + 6 + 3)),
    ("--generations 2 --peer none --anchor-weight 1", "born-again", ("control_step", 12 + 6 + 3)),
    ("--generations 1 --peer finished --anchor-weight 0", "kd", ("control_step", 6 + 3)),
    ("--generations 1 --anchor-weight 0", "mutual-learning", ("train_step", 6 + 3))])
def test_a_stopped_chain_goes_on_bit_for_bit(typed, twin, at, whole, run, tmp_path, monkeypatch):
    """Stopped in epoch 2 of the last generation. A control is the run that its flags give."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, trikd, *at)
        run("trikd", tmp_path, f"{typed} --cache {whole.cache}")
    run("trikd", tmp_path, f"{typed} --cache {whole.cache} --resume")
    assert same_run(tmp_path, whole.folder / twin)


@pytest.mark.parametrize("typed, controls", [
    ("--anchor-weight 0 --peer-weight 0", "born-again/mutual learning, long"),
    ("--anchor-weight 1 --peer none", "kd/mutual learning/mutual learning, long")])
def test_useless_controls_are_left_out_and_all_others_learn(typed, controls, run, tmp_path,
                                                            monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 130)
    printed = run("trikd", tmp_path, f"{typed} --compare --generations 1 --epochs 1")
    rows = ["student alone", "student alone, long", "TriKD", *controls.split("/")]
    assert list(table(printed)) == rows
    for control, terms in (("born-again", {"S_anchor"}), ("kd", {"S_peer"})):
        if control in rows:
            assert {"S_ce"} | terms <= set(result_of(tmp_path / control)["rows"][0])


def test_fraction_open_set_and_temperature(run, tmp_path, monkeypatch):
    """Tested every 1 / F epochs; unseen classes have no logit; eq. (7) holds at tau = 1 alone."""
    found = table(run("trikd", tmp_path, "--train-fraction 0.3 --open-set 4 --generations 1 "
                      "--temperature 2 --mean 0.4 0.5 0.6 --std 0.2 0.2 0.2"))
    result = result_of(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs")  # pictures load the same images from the record
    again = common.load_data(importlib.import_module("figures").arguments_of(result))
    assert again.mean == pytest.approx((0.4, 0.5, 0.6)) and again.classes == 16
    assert result["arguments"]["anchor_weight"] == [0.1]  # a list, as typed by hand
    for name in ("test", "teacher"):  # and at the end
        tested = [row["epoch"] for row in result["rows"] if row[name] is not None]
        assert tested == [3, 6, 7] and result["rows"][-1][name] == result["generations"][0][name]
    assert result["label_shares"] is None
    for row in found.values():
        assert 0 < float(row["rank1"]) <= 100 and 40 < float(row["verification"]) <= 100
    assert found["TriKD"]["t_rank1"] != "-" == found["student alone"]["t_rank1"]
    assert weights(tmp_path / "student.pt")["head.weight"].shape[0] == 16


def test_student_and_teacher_learn_the_shapes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 400)
    run("trikd", tmp_path, "--epochs 4 --batch-size 20 --generations 1")
    (last,) = result_of(tmp_path)["generations"]
    assert min(last["test"], last["teacher"]) > 12  # chance: 5


def test_pictures(whole, run, capsys, monkeypatch):
    """From the record and its networks; A_0 is found in the cache, not trained again."""
    pytest.importorskip("matplotlib.pyplot").close("all")  # those of other tests
    monkeypatch.syspath_prepend(ROOT / "docs")
    figures = importlib.import_module("figures")
    points = np.random.default_rng(0).normal(size=(7, 2)) * (3, 1)  # the longer axis comes first
    D = np.square(points[:, None] - points[None]).sum(2)
    found = figures.classical_scaling(torch.tensor(D)).numpy()
    assert np.square(found[:, None] - found[None]).sum(2) == pytest.approx(D, abs=1e-9)
    assert found[:, 0].std() > found[:, 1].std()
    run("trikd", whole.folder / "anchor-3", "--anchor-weight 3 --generations 1 --epochs 1")
    drawn = figures.trikd(whole.folder, result_of(whole.folder))
    assert "resnet8x0.5, trained before" in capsys.readouterr().out
    texts = {name: [text.get_text() for text in figure.axes[0].texts]
             for name, figure in drawn.items()}
    networks = ["A0", *(f"{name} {network}" for name, chain in (
        ("TriKD", "S1 S2 T1 T2"), ("born-again", "S1 S2"), ("mutual learning", "S1 T1"))
        for network in chain.split())]
    assert texts == {"generations.png": [], "tradeoff.png": ["3 (label share 0.25)"],
                     "functions.png": networks}
    student = drawn["generations.png"].axes[0].lines[0].get_ydata()
    assert list(student) == [float(table(whole.printed)[name]["test"]) for name in (
        "student alone", "TriKD, generation 1", "TriKD, generation 2")]
