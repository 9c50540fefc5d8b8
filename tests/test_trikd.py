"""TriKD against its specification: its section 11, numpy oracles, the fixed point, tiny runs.

Goldens are typed from the specification (six decimals), beside them what usual mistakes would give.
"""

from argparse import Namespace

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    ce, folder_of, log_p, refused, result_of, same, same_run, shapes_data, stopped, table, tensor,
    weights)
from torch import nn

import common
import trikd
from trikd import Weights

DIGITS = 1e-6
Z_T, Z_S = [[2, 0.5, -1], [0, 1, 0.5]], [[1, 0, 0], [0.5, 0.5, -1]]
Z_A, Y = [[0, 1, 0], [1, -1, 0]], [0, 2]
FP32 = Namespace(temperature=1.0, precision="fp32", device=torch.device("cpu"))
ONES, FIRST, SECOND = Weights(1, 1, 1), Weights(1, 0.5, 2), Weights(1, 1.5, 0.25)


def kl(target, own, tau=1.0):
    """Eq. (1), tau^2 included."""
    return tau**2 * conftest.kl(target, own, tau)


def gradient(own, peer, anchor, y, w, tau):
    """Eq. (5), divided by N; w: label, peer, anchor."""
    p, q, a = (np.exp(log_p(z, tau)) for z in (own, peer, anchor))
    hard = np.exp(log_p(own)) - np.eye(np.shape(own)[1])[y]
    return (w[0] * hard + tau * (w[1] * (p - q) + w[2] * (p - a))) / len(y)


# -------------------------------------------------------------------------- equations (1) to (6)
@pytest.mark.parametrize("tau, values", [
    (1, (0.225261, 0.700731, 0.191891, 0.348894)), (2, (0.294106, 0.777433, 0.274194, 0.408557))])
def test_kl_goldens(tau, values):
    pairs = [(Z_S, Z_T), (Z_A, Z_T), (Z_T, Z_S), (Z_A, Z_S)]  # target, learner
    found = [trikd.scaled_kl(tensor(a), tensor(b), tau).item() for a, b in pairs]
    assert found == pytest.approx(values, abs=DIGITS)
    assert [kl(a, b, tau) for a, b in pairs] == pytest.approx(values, abs=DIGITS)  # the oracle
    for other in ((2, 4), (1, 3), (2, 1), (3,)):  # broadcasting would hide it
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            trikd.scaled_kl(torch.zeros(2, 3), torch.zeros(other))


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
    L_T, _ = trikd.triplet_loss(z_T, z_S, z_A, torch.tensor(Y), w_T, tau)
    L_S, _ = trikd.triplet_loss(z_S, z_T, z_A, torch.tensor(Y), w_S, tau)
    assert (L_T.item(), L_S.item()) == pytest.approx(values, abs=DIGITS)
    (L_T + L_S).backward()
    assert z_A.grad is None
    assert z_T.grad.numpy() == pytest.approx(np.array(g_T), abs=DIGITS)
    assert z_S.grad.numpy() == pytest.approx(np.array(g_S), abs=DIGITS)


def test_what_the_usual_mistakes_would_give():
    """Listed wrong values of the second case; right are 2.412709 and, of the gradient, 0.593224."""
    without = ce(Z_T, Y) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 4
    backwards = ce(Z_T, Y) + 0.5 * kl(Z_T, Z_S, 2) + 2 * kl(Z_T, Z_A, 2)
    mean = ce(Z_T, Y) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 3
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
    (ONES, ONES, *[[[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]]] * 2),
    (FIRST, SECOND, [[0.500526, 0.365145, 0.134329], [0.421632, 0.057062, 0.521307]],
     [[0.655918, 0.251544, 0.092538], [0.290457, 0.039309, 0.670234]])])
def test_free_logits_reach_the_fixed_point(w_T, w_S, p_T, p_S):
    """Gradient descent from anywhere ends at the listed outputs, which are those of (7)."""
    z_T, z_S, z_A = tensor(Z_T, True), tensor(Z_S, True), tensor(Z_A)
    optimizer = torch.optim.SGD([z_T, z_S], 2)
    for _ in range(200):
        optimizer.zero_grad()
        (trikd.triplet_loss(z_T, z_S, z_A, torch.tensor(Y), w_T)[0]
         + trikd.triplet_loss(z_S, z_T, z_A, torch.tensor(Y), w_S)[0]).backward()
        optimizer.step()
    for z, p, share in zip((z_T, z_S), (p_T, p_S), trikd.label_shares(w_T, w_S)):
        line = share * np.eye(3)[Y] + (1 - share) * np.exp(log_p(Z_A))
        assert z.detach().softmax(1).numpy() == pytest.approx(np.array(p), abs=2e-6)
        assert line == pytest.approx(np.array(p), abs=2e-6)


# ------------------------------------------------------------------------------------------ steps
def answering(z):
    """A network that shows image n row n of z, its weights; an old gradient lies on them."""
    network = nn.Embedding.from_pretrained(tensor(z), freeze=False)
    network.weight.grad = torch.ones_like(network.weight)
    return network


@pytest.mark.parametrize("learns, peer, anchor", [  # does T learn; are T and A there?
    (1, 1, 1), (1, 1, 0), (0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("batch, classes, tau", [(1, 3, 1), (6, 5, 1), (8, 20, 4), (3, 2, 0.5)])
def test_steps_follow_the_gradients(learns, peer, anchor, batch, classes, tau):
    """Eq. (4) by (5): who is absent has no term, who does not learn stays as it is."""
    random = np.random.default_rng(batch)
    z_S, z_T, z_A = random.normal(0, 2, (3, batch, classes))
    x, y = torch.arange(batch), random.integers(0, classes, batch)
    teacher, w_S = answering(z_T), Weights(*random.uniform(0, 3, 3))
    networks = [answering(z_S), (teacher if learns else common.frozen(teacher)) if peer else None,
                common.frozen(answering(z_A)) if anchor else None]
    triples = {"student": w_S, "teacher": FIRST} if learns else {"student": w_S}
    flags = Namespace(**{**vars(FP32), "temperature": tau})
    sgd = torch.optim.SGD([one.weight for one in networks if one], 0.5)
    terms, logits = trikd.train_step(*networks, sgd, x, torch.tensor(y), triples, flags)
    assert logits.dtype == torch.float32 and logits.tolist() == pytest.approx(z_S.astype("f4"))
    wanted, ended = {}, [z_S, z_T, z_A]
    for place, (role, w) in enumerate(triples.items()):
        own, other = (z_S, z_T) if role == "student" else (z_T, z_S)
        values = {"ce": ce(own, y), "peer": kl(other, own, tau), "anchor": kl(z_A, own, tau)}
        there = np.array([1, peer, anchor])
        wanted |= {f"{role[0].upper()}_{name}": value
                   for (name, value), here in zip(values.items(), there) if here}
        ended[place] = own - 0.5 * gradient(own, other, z_A, y, there * w, tau)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-5)
    for network, z in zip(networks, ended):
        assert network is None or network.weight.detach().numpy() == pytest.approx(z, abs=1e-6)


# ------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("typed, T, S", [
    ("", (1, 1, 0.1), (1, 1, 0.1)), ("--anchor-weight 3", (1, 1, 3), (1, 1, 3)),
    ("--label-weight 1 2 --peer-weight 0.5 1.5 --anchor-weight 2 0.25", FIRST, (2, 1.5, 0.25))])
def test_the_six_weights(typed, T, S, capsys):
    arguments = trikd.parse_args(f"--device cpu {typed}".split())
    assert [trikd.weights_of(role, arguments) for role in ("teacher", "student")] == [T, S]
    assert "--label-weight: one value" in refused("trikd", f"{typed} --label-weight 1 2 3", capsys)


# ------------------------------------------------------------------------------------------ runs
@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Two generations and all other METHODS: the folder, what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run("trikd", folder, f"--generations 2 --compare --cache {folder}/cache")


@pytest.mark.parametrize("method, G, E, T, S", [
    ("TriKD", 2, 2, (1, 1, 0.1), (1, 1, 0.1)), ("kd", 1, 2, None, (1, 1, 0)),
    ("born-again", 2, 2, None, (1, 0, 1)), ("mutual learning long", 1, 6, (1, 1, 0), (1, 1, 0)),
    ("student alone long", 1, 6, None, (1, 0, 0))])
def test_generations_equal_the_plain_loop(method, G, E, T, S, whole):
    """To the bit: A_g is S_g, A_0 the plain student; S_g and T_g start elsewhere, SGD anew."""
    def alone(name):
        (path,) = whole[0].glob(f"cache/shapes-{name}-2-*/epoch-0002.pt")
        return common.frozen(common.load_weights(common.build_model(name, 20, 16), path))
    shuffle, images_of = torch.Generator().manual_seed(0), shapes_data().train.augmented
    folder = folder_of(whole[0], method)
    anchor, teacher = alone("resnet8x0.5"), None
    if method == "kd":
        teacher = common.folded(alone("resnet8"))
    triples = {"student": Weights(*S), **({"teacher": Weights(*T)} if T else {})}
    for g in range(1, G + 1):
        student = common.build_model("resnet8x0.5", 20, 16, 10_000 * g)
        learners = {"student": student}
        if T:
            learners["teacher"] = teacher = common.build_model("resnet8", 20, 16, 10_000 * g + 1000)
        sgd = torch.optim.SGD(nn.ModuleDict(learners).parameters(), 0.1, 0.9, weight_decay=5e-4,
                              nesterov=True, fused=True)
        for tenths in [0, 0] if E == 2 else [0, 0, 0, 0, 1, 2]:
            sgd.param_groups[0]["lr"] = 0.1 * 0.1**tenths
            nn.ModuleDict(learners).train()
            for images, labels in images_of(50, shuffle):
                trikd.train_step(student, teacher, anchor if S[2] else None, sgd, images, labels,
                                 triples, FP32)
        for role, network in learners.items():
            assert same(weights(folder / f"{role}-{g}.pt"), network.state_dict())
        anchor = common.frozen(student)
    assert same(weights(folder / "student.pt"), anchor.state_dict())


def test_measures_by_hand(whole):
    """Accuracies, KL, agreement of the last generation from the saved weights, in numpy."""
    data, result = shapes_data(), result_of(folder := folder_of(whole[0], "TriKD"))
    last, rows = result["table"][-1], result["rows"]

    def logits(role, g, split):
        network = common.build_model({"student": "resnet8x0.5", "teacher": "resnet8"}[role], 20, 16)
        network.load_state_dict(weights(folder / f"{role}-{g}.pt"))
        with torch.no_grad():
            return network.eval()(split.normalise(split.images)).double().numpy()
    S, T, A = (logits(*key, data.test) for key in (("student", 2), ("teacher", 2), ("student", 1)))
    assert (last["kl_ts"], last["kl_at"]) == pytest.approx((kl(T, S), kl(A, T)), rel=1e-3)
    assert last["agree"] == pytest.approx(100 * (S.argmax(1) == T.argmax(1)).mean())
    for role, key, gap in (("student", "test", "s_gap"), ("teacher", "teacher", "t_gap")):
        test, train = (100 * (logits(role, 2, split).argmax(1) == split.labels.numpy()).mean()
                       for split in (data.test, data.train))
        assert last[key] == rows[-1][key] == pytest.approx(test)
        assert last[gap] == pytest.approx(train - test)
    assert last["best"] == max(row["test"] for row in rows[2:])  # of this generation
    assert last["seconds"] == pytest.approx(sum(row["s"] for row in rows))  # of both
    assert result["label_shares"] == pytest.approx([1 / 1.1, 1 / 1.1])  # Eq. (8)


def test_compare_prints_every_method_with_its_epochs(whole):
    """A_0 counts where an anchor is used, a finished teacher where it teaches."""
    found = table(whole[1])
    assert [(name, int(row["epochs"]), int(row["t_epochs"])) for name, row in found.items()] == [
        ("teacher alone", 0, 2), ("student alone", 2, 0), ("TriKD, generation 1", 4, 2),
        ("TriKD, generation 2", 6, 4), ("mutual learning", 2, 2), ("kd", 2, 2),
        ("born-again, generation 1", 4, 0), ("born-again, generation 2", 6, 0),
        ("mutual learning long", 6, 6), ("student alone long", 6, 0)]
    assert found["kd"]["teacher"] == found["teacher alone"]["test"]


def test_a_stopped_chain_goes_on_bit_for_bit(whole, run, tmp_path, monkeypatch):
    """Stopped in epoch 2 of the second generation; the networks of the first lie there."""
    flags = f"--generations 2 --cache {whole[0]}/cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, trikd, "train_step", 12 + 6 + 3)
        run("trikd", tmp_path, flags)
    folder = folder_of(tmp_path, "TriKD")
    assert (folder / "student-1.pt").exists()
    assert "goes on after epoch 3" in run("trikd", tmp_path, flags)
    assert same_run(folder, folder_of(whole[0], "TriKD"))


def test_open_set_temperature_and_a_method_that_is_another(run, tmp_path):
    """Eq. (7) holds at tau = 1 alone; without the anchor TriKD is mutual learning."""
    found = table(run("trikd", tmp_path, "--open-set 4 --generations 1 --temperature 2 "
                      "--anchor-weight 0 --method TriKD 'mutual learning'"))
    assert result_of(folder_of(tmp_path, "TriKD"))["label_shares"] is None
    assert "the same run as TriKD" in found.pop("mutual learning").values()
    assert list(found) == ["chance", "raw pixels", "untrained student", "student alone", "TriKD"]
    assert all(0 < float(row["rank1"]) <= 100 for row in found.values())
