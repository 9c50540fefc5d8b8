"""LetKD against its specification: goldens typed from its section 11 (six decimals), beside them
what the usual mistakes give; numpy oracles in float64, written from the equations; tiny runs."""

import copy
import dataclasses
import functools
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT, altered, forbidden, refused, result_of, same_run, shapes_data, stopped, table, weights)
from torch import nn
from torch.nn import functional as F

import common
import letkd
from letkd import Decisions, KDLayer

DIGITS = 2e-6
double = functools.partial(torch.tensor, dtype=torch.float64)
seeded = torch.Generator().manual_seed
X = [(1, 0), (3, 4), (-1, 2), (2, -1)]  # rows: (b,w) = (0,0), (0,1), (1,0), (1,1)
OMEGA = np.array([[2, 0], [0, 0.5], [-1, 1], [3, 4]])
V = np.array([[1, 0, -1, 2], [0.5, 1, 1, -0.5]])
BETA = np.array([0, 0.1, -0.1, 0.2])
SCORES = np.array([
    [3, 0, -2.121320, 1.8], [1.8, 2.4, 0.424264, 3.0],
    [-1.341641, 2.683282, 2.846050, 1.341641], [2.683282, -1.341641, -2.846050, 0.536656]])
P_HAT = np.array([[0.852352, 0, 0, 0.346321], [0.153984, 0.972922, 0.277964, 1.692571],
                  [0, 1.141763, 1.356712, 0], [0.668031, 0, 0, 0]])
X_HAT = [[1.342786, 0.086966], [3.336549, 4.076995], [-1.156178, 2.445568], [2.204124, -0.841886]]
X_EVAL = [[1.396145, 0.052603], [3.360967, 4.150831], [-0.983621, 2.358035], [2.304921, -0.889387]]
Z = [(0.5, 0), (0, 1), (0.7, 1.0), (1.2, 0.1)]
WORDS = [[0, 0], [1, 0], [0, 1], [1, 1]]
P_T = np.array([[0.365529, 0.365529, 0.134471, 0.134471], [0.196612, 0.072329, 0.534447, 0.196612],
                [0.107930, 0.161012, 0.293383, 0.437676], [0.136488, 0.553486, 0.061328, 0.248697]])
TABLE = np.array([[0.75, 0.25, 0, 0], [0.1, 0.5, 0.4, 0], [0, 0.3, 0.6, 0.1], [0, 0, 0.125, 0.875]])
BEFORE = ("stem", "stages.0", "stages.1", "stages.2.0")  # parts of resnet14 before the tap
DECISIONS = Decisions(*map(double, ([[1, -1]], [0.5], [[-1], [0.2], [0.4], [2]], TABLE)), 2)


def grid(rows):
    """Rows in the order (b,w) = (0,0), (0,1), (1,0), (1,1) -> maps (2,channels,1,2)."""
    return double(rows).view(2, 1, 2, -1).permute(0, 3, 1, 2)


def rows_of(maps):
    return maps.detach().movedim(1, 3).flatten(0, 2).numpy()  # (B H W, channels)


def check(maps, rows, digits=DIGITS):
    assert rows_of(maps) == pytest.approx(np.asarray(rows, float), abs=digits)


def unit(u, axis=-1):
    return u / np.maximum(np.sqrt((u**2).sum(axis, keepdims=True)), 1e-12)


def softmax(a):
    a = np.exp(a - a.max(1, keepdims=True))
    return a / a.sum(1, keepdims=True)


def kl(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p / q, 1)), 0).sum(1)


# ------------------------------------------------------------------------- the layer, (1) to (5)
def layer_of(omega, V, gamma, beta, alpha, **scales):
    layer = KDLayer(omega.shape[1], len(omega), alpha, **scales).double()
    layer.match.weight.data = double(omega)[..., None, None]
    layer.value.weight.data = double(V)[..., None, None]
    layer.norm.weight.data, layer.norm.bias.data = double(gamma), double(beta)
    return layer


def test_layer_goldens_and_the_usual_mistakes():
    layer = layer_of(OMEGA, V, np.ones(4), BETA, 0.5)
    fresh = copy.deepcopy(layer).eval()
    (x_hat, scores), (x_hat_eval, same_scores) = layer(grid(X)), fresh(grid(X))
    check(scores, SCORES)
    check(x_hat, X_HAT)
    check(x_hat_eval, X_EVAL)
    check(F.relu(layer.norm(scores)), P_HAT)
    assert torch.equal(same_scores, scores) and layer.fired.all() and not fresh.fired.any()
    for wrong, listed in (  # p^ as it is; V normalised along d
            (X[0] + 0.5 * unit(V) @ P_HAT[0], (1.315371, 0.080011)),
            (X[0] + 0.5 * unit(V, 0) @ unit(P_HAT[0]), (1.596913, 0.161511))):
        assert wrong == pytest.approx(listed, abs=DIGITS) and np.abs(wrong - X_HAT[0]).max() > 5e-3


def test_layer_on_random_maps():
    random, B, d, H, W, K = np.random.default_rng(4), 4, 5, 3, 2, 7
    x, omega, V = (random.normal(size=size) for size in ((B, d, H, W), (K, d), (d, K)))
    gamma, beta, s_q, s_v, alpha = *random.normal(size=(2, K)), 2.5, 0.75, 1.25
    layer = layer_of(omega, V, gamma, beta, alpha, query_scale=s_q, value_scale=s_v)
    x = torch.tensor(x, requires_grad=True)
    a = s_q * unit(rows_of(x)) @ unit(omega).T
    kept = 0.1 * a.mean(0), 0.9 + 0.1 * a.var(0, ddof=1)  # torch keeps the unbiased variance
    for mode, (mean, var) in ((True, (a.mean(0), a.var(0))), (False, kept)):
        x_hat, scores = layer.train(mode)(x)
        p_hat = np.maximum(0, gamma * (a - mean) / np.sqrt(var + 1e-5) + beta)
        check(scores, a, 1e-10)
        check(x_hat, rows_of(x) + alpha * s_v * unit(p_hat) @ unit(V).T, 1e-10)
    assert torch.autograd.gradcheck(layer.train(), x)
    dead = layer_of(omega, V, 0 * gamma, -np.ones(K), alpha)  # no template fires: 0, and not 0/0
    assert torch.equal(dead(x)[0], x) and not dead.fired.any()


def test_start_and_cost():
    """Weights N(0, 2/in), scales 3 and 1; (17); multiply-adds by hand and by the specification."""
    layer = KDLayer(64, 512, alpha=0.3)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 64 * 512 + 2 * 512 + 2
    assert (layer.match.scale.item(), layer.value.scale.item()) == (3, 1)
    for part, inputs in ((layer.match, 64), (layer.value, 512)):
        assert part.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.02)
    assert "alpha" in layer.state_dict() and "fired" not in layer.state_dict()
    adds = 27 * 8 * 256 + 32 * 20
    for inputs, outputs, side, shortcut in ((8, 8, 16, 0), (8, 16, 8, 1), (16, 32, 4, 1)):
        adds += (9 * inputs * outputs + 9 * outputs**2 + shortcut * inputs * outputs) * side**2
    assert letkd.cost(common.build_model("resnet8x0.5", 20, 16), 16)[1] == adds
    plain, grown = (letkd.cost(letkd.build_student("resnet20", 100, 32, *sizes), 32)
                    for sizes in ((0, 0), (800, 4096)))
    assert [g / p for g, p in zip(grown, plain)] == pytest.approx((3.29, 1.98), abs=0.006)


# ----------------------------------------------------------------- targets and loss, (7), (12)-(14)
def test_word_targets():
    check(letkd.word_targets(grid(Z), double(WORDS)), P_T)
    first = rows_of(letkd.word_targets(grid(Z), double(WORDS), tau=2.0))[0]
    assert first == pytest.approx([0.440399, 0.440399, 0.059601, 0.059601], abs=DIGITS)
    random = np.random.default_rng(0)  # maps far from the origin
    z, rho = double(random.normal(30, 3, (2, 5, 3, 3))), random.normal(30, 3, (11, 5))
    wanted = softmax(-0.1 * np.square(rows_of(z)[:, None] - rho).sum(2))
    check(letkd.word_targets(z, double(rho), 0.1), wanted, 1e-9)
    single = letkd.word_targets(z.float(), double(rho).float(), 0.1)
    check(single, wanted, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # targets stay in float32
        assert torch.equal(letkd.word_targets(z.float(), double(rho).float(), 0.1), single)


def test_decision_targets():
    """Picked n = 1, 0, 2, 3, inside the label's class; without labels they were 2, 0, 1, 3."""
    for labels, picked in (([0, 1], [1, 0, 2, 3]), ([1, 0], [2, 2, 1, 1])):
        found = letkd.decision_targets(grid(Z), torch.tensor(labels), DECISIONS)
        check(found, TABLE[picked])
    # k = 1, the own centre the farthest: CODE's masked argmax would fail here
    one = DECISIONS._replace(centres=double([[-50], [0.4]]), table=double(np.eye(2)), per_class=1)
    check(letkd.decision_targets(grid(Z), torch.tensor([0, 1]), one), np.eye(2)[[0, 0, 1, 1]])


def test_template_loss_goldens_and_the_usual_mistakes():
    for p_T, wanted, row, gradient in (
            (P_T, 1.213579, 0, (0.092854, -0.082210, -0.032518, 0.021873)),
            (TABLE[[1, 0, 2, 3]], 1.603321, 3, (0.219546, 0.003922, -0.030379, -0.193090))):
        scores = grid(SCORES).requires_grad_()
        value = letkd.template_loss(scores, grid(p_T))
        value.backward()
        assert value.shape == () and value.item() == pytest.approx(wanted, abs=DIGITS)
        assert rows_of(scores.grad)[row] == pytest.approx(gradient, abs=DIGITS)
    swapped = letkd.template_loss(grid(SCORES), grid(TABLE[[2, 2, 1, 1]]))  # the labels
    assert swapped.item() == pytest.approx(2.171603, abs=DIGITS)
    p_S = softmax(SCORES)
    normed = (SCORES - SCORES.mean(0)) / np.sqrt(SCORES.var(0) + 1e-5) + BETA
    for wrong, listed in ((kl(P_T, p_S).sum() / 2, 2.427157), (kl(P_T, p_S).mean() / 4, 0.303395),
                          (kl(p_S, P_T).mean(), 0.801349),  # reversed
                          (kl(P_T, softmax(normed)).mean(), 0.555170)):  # after BatchNorm
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - 1.213579) > 0.1


def test_template_loss_and_gradient_on_random_maps():
    """Eqs. (13), (14), zeros in p_T among them; p_T gets no gradient."""
    random, size = np.random.default_rng(1), (4, 10, 3, 2)
    p_T = np.maximum(random.normal(0, 3, size), 0) + 0.1 * (np.arange(10) == 0).reshape(10, 1, 1)
    p_T = double(p_T / p_T.sum(1, keepdims=True), requires_grad=True)
    scores = double(random.normal(0, 3, size), requires_grad=True)
    value = letkd.template_loss(scores, p_T)
    value.backward()
    p_S, flat = softmax(rows_of(scores)), rows_of(p_T)
    assert value.item() == pytest.approx(kl(flat, p_S).mean(), rel=1e-9)
    check(scores.grad, (p_S - flat) / len(flat), 1e-12)
    assert p_T.grad is None


def test_targets_and_teacher_logits_get_no_gradient():
    """Whatever comes in: no graph leads to features, words, table or teacher."""
    grad = functools.partial(double, requires_grad=True)
    z, decisions = grid(Z).requires_grad_(), DECISIONS._replace(table=grad(TABLE))
    assert not letkd.word_targets(z, grad(WORDS)).requires_grad
    assert not letkd.decision_targets(z, torch.tensor([0, 1]), decisions).requires_grad
    student, teacher = grad([[1, 0.5, -1]]), grad([[0, 1, 0]])
    letkd.kd_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.any()


@pytest.mark.parametrize("call, word", [
    (lambda: letkd.template_loss(torch.zeros(2, 3, 1, 1), torch.zeros(1, 3, 1, 1)), r"\(2, 3"),
    (lambda: letkd.word_targets(grid(Z), torch.zeros(4, 3).double()), "words 3"),
    (lambda: letkd.decision_targets(grid(Z), torch.tensor([0, 2]), DECISIONS), r"0\.\.1"),
    (lambda: letkd.decision_targets(grid(Z), torch.tensor([0]), DECISIONS), "1 labels"),
    (lambda: letkd.decision_targets(torch.zeros(1, 3, 1, 1), torch.tensor([0]), DECISIONS), "of 3"),
    (lambda: letkd.fit_words(torch.zeros(3, 2), 4), "4 centres"),
    (lambda: letkd.fit_decisions(torch.zeros(9, 2), torch.tensor([0] * 7 + [1] * 2), 2, 3), "2$"),
    (lambda: letkd.pooled(torch.zeros(1, 1, 6, 6), 4), "6x6"),
    (lambda: letkd.pooled(torch.zeros(1, 1, 8, 4), 4), "8x4")])
def test_wrong_shapes_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# --------------------------------------------------------------- k-means, LDA, table, (6), (8)-(11)
def test_k_means(monkeypatch):
    rows = double([(0, 0), (1, 0), (10, 0), (12, 0)])
    for seed in range(12):
        assert sorted(letkd.fit_words(rows, 2, seeded(seed)).tolist()) == [[0.5, 0], [11, 0]]
    rows = np.random.default_rng(1).normal(size=(1000, 3))
    centres = rows[torch.randperm(1000, generator=seeded(7)).numpy()[:40]]
    for _ in range(20):
        index = np.square(rows[:, None] - centres).sum(2).argmin(1)
        centres = np.stack([rows[index == e].mean(0) for e in range(40)])
    d = np.square(rows[:, None] - centres).sum(2)
    found = letkd.k_means(double(rows), 40, seeded(7))
    for ours, theirs in zip(found, (centres, d.argmin(1), d.min(1))):
        assert ours.numpy() == pytest.approx(theirs, abs=1e-9)
    # two of three equal starts stay empty and take the rows farthest from their own centre
    monkeypatch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
    centres, *_ = letkd.k_means(double([(0, 0)] * 4 + [(5, 0), (9, 0)]), 3, iterations=1)
    assert centres.tolist() == [[pytest.approx(14 / 6), 0], [9, 0], [5, 0]]


def test_nearest_in_chunks():
    rows, centres = torch.randn(20_000, 4), torch.randn(1000, 4)  # 16,777 rows a chunk
    d = torch.cdist(rows.double(), centres.double()).square().min(1)
    for offset, digits in ((0, 1e-4), (500, 1e-2)):  # the offset costs few digits
        index, distance = letkd.nearest(rows + offset, centres + offset)
        assert (index == d.indices).double().mean() > 0.99
        assert distance.numpy() == pytest.approx(d.values.numpy(), abs=digits)


def test_fit_decisions_golden():
    z = [(-8, 1), (-8, -1), (0, 1), (0, -1), (3, 0),
         (1, 1), (1, -1), (1, 0), (4, 0), (9, 1), (9, -1)]
    for seed in range(8):
        found = letkd.fit_decisions(torch.tensor(z).float(), torch.tensor([0] * 5 + [1] * 6), 2, 2,
                                    generator=seeded(seed))
        assert found.per_class == 2 and {part.dtype for part in found[:4]} == {torch.float32}
        assert found.weight.numpy() == pytest.approx(np.array([[0.223586, 0]]), abs=DIGITS)
        c = found.centres.flatten()
        order = torch.cat([c[:2].argsort(), 2 + c[2:].argsort()])
        assert [found.bias.item(), *c[order].tolist()] == pytest.approx(
            [-0.243912, -2.032601, -0.020326, 0.147364, 1.768363], abs=DIGITS)
        assert found.table[order][:, order].numpy() == pytest.approx(np.array(
            [[1, 0, 0, 0], [0, 2 / 3, 1 / 3, 0], [0, 3 / 4, 1 / 4, 0], [0, 0, 0, 1]]), abs=1e-6)


@pytest.mark.parametrize("classes, D", [(2, 6), (4, 6), (9, 5)])
def test_discriminant_by_its_definition(classes, D):
    """W S_w W^T = I, W S_b W^T diagonal and descending, b centres; --dimensions cuts."""
    random, y = np.random.default_rng(5), np.arange(300) % classes
    z = random.normal(size=(300, D)) @ random.normal(size=(D, D))
    z += random.normal(0, 2, (classes, D))[y]
    W, b = (part.numpy() for part in letkd.discriminant(double(z), torch.tensor(y), classes, 60))
    mu, m = np.stack([z[y == c].mean(0) for c in range(classes)]), z.mean(0)
    S_w = (z - mu[y]).T @ (z - mu[y]) / (300 - classes)
    S_b = (mu - m).T * np.bincount(y) @ (mu - m) / 300
    e = np.sort(np.linalg.eigvals(np.linalg.solve(S_w, S_b)).real)[::-1][:min(classes - 1, D)]
    assert W @ S_w @ W.T == pytest.approx(np.eye(len(e)), abs=1e-9)
    assert W @ S_b @ W.T == pytest.approx(np.diag(e), abs=1e-10 * e[0])
    assert W @ m + b == pytest.approx(np.zeros(len(e)), abs=1e-9)
    assert all(row[np.abs(row).argmax()] > 0 for row in W)
    dead = double(np.insert(z, 1, 0, axis=1))  # a channel that is 0 everywhere
    found, _ = letkd.discriminant(dead, torch.tensor(y), classes, 2)
    assert found.numpy() == pytest.approx(np.insert(W[:2], 1, 0, axis=1), abs=1e-8)


def test_decision_table_by_its_definition(monkeypatch):
    """Loops over single rows of clustered data. Centres that are no means, and the sixth without a
    row of its own class: q_n = c_n takes rows of the others, its own row is one-hot."""
    def k_means(g, k, generator):
        centres = torch.stack([*g[:2], -g.mean(0)])
        return centres, *letkd.nearest(g, centres)
    monkeypatch.setattr(letkd, "k_means", k_means)
    random, y = np.random.default_rng(2), np.arange(180) % 3
    parts, choice = random.normal(0, 3, (6, 4)), [[0, 1, 2], [2, 3, 4], [5, 1, 3]]  # some shared
    z = np.stack([parts[choice[c][random.integers(3)]] for c in y])
    z += random.normal(0, 0.5, (180, 4))
    found = letkd.fit_decisions(double(z), torch.tensor(y), 3, 3)
    g, c = z @ found.weight.numpy().T + found.bias.numpy(), found.centres.numpy()
    h1 = np.array([3 * label + np.square(row - c[3 * label:3 * label + 3]).sum(1).argmin()
                   for row, label in zip(g, y)])
    q = np.stack([g[h1 == n].mean(0) if n in h1 else c[n] for n in range(9)])
    table = np.diag([float(n not in h1) for n in range(9)])
    for row, n in zip(g, h1):
        table[n, np.square(row - q).sum(1).argmin()] += 1
    assert 5 not in h1 and table[:, 5].sum() > 1 + 3
    table /= table.sum(1, keepdims=True)
    assert found.table.numpy() == pytest.approx(table, abs=1e-9)


# ------------------------------------------------------------------------------ student and routing
@pytest.mark.parametrize("name, size", [("resnet14", 16), ("wrn_16_2", 16), ("vgg8", 32)])
def test_taps_and_places_of_the_layers(name, size):
    """Two of a seed are equal; one of alpha 0 gives the logits of the network of its seed."""
    layered = letkd.build_student(name, 10, size, 20, 30).eval()
    network, x = common.build_model(name, 10, size, 1).eval(), torch.randn(2, 3, size, size)
    first = nn.Sequential(network.stem, *network.stages[:-1], network.stages[-1][0])
    assert torch.equal(letkd.up_to_tap(network, x), first(x))
    assert torch.equal(letkd.build_student(name, 10, size, 20, 30, 0, 1).eval()(x), network(x))
    u = letkd.after_tap(layered, layered.inter(letkd.up_to_tap(layered, x))[0])
    twin = letkd.build_student(name, 10, size, 20, 30).eval()
    torch.testing.assert_close(twin(x), layered.head(layered.penult(u)[0].mean((2, 3))))


@pytest.mark.parametrize("alpha, routes", [
    (1, {"inter": (*BEFORE, "inter.match"), "ce": ("",),
         "penult": (*BEFORE, "inter", "stages.2.1", "penult.match")}),
    (0, {"inter": (*BEFORE, "inter.match"), "ce": (*BEFORE, "stages.2.1", "head"),
         "penult": (*BEFORE, "stages.2.1", "penult.match")})])
def test_gradient_routing(alpha, routes):
    """The routing table of section 4, row by row, by the first part of the parameters' names."""
    student = letkd.build_student("resnet14", 4, 16, 12, 10, alpha)
    u, scores_i, scores_p = student.forward_scores(torch.randn(8, 3, 16, 16))
    losses = {"inter": letkd.template_loss(scores_i, torch.rand(8, 12, 4, 4).softmax(1)),
              "penult": letkd.template_loss(scores_p, torch.rand(8, 10, 4, 4).softmax(1)),
              "ce": F.cross_entropy(student.forward_head(u), torch.arange(8) % 4)}
    parameters = [*student.named_parameters()]
    for name, wanted in routes.items():
        student.zero_grad()
        losses[name].backward(retain_graph=True)
        reached = {part for part, p in parameters if p.grad is not None and p.grad.any()}
        assert reached == {part for part, _ in parameters if part.startswith(wanted)}


@pytest.mark.parametrize("supervision, layers, name, size", [
    ("teacher", 1, "resnet14", 16), ("teacher", 2, "resnet14", 16),
    ("teacher", 2, "vgg8", 32),  # the teacher's maps are twice as large
    ("logits", 0, "resnet14", 16), ("none", 2, "resnet14", 16)])
def test_a_step_by_hand(supervision, layers, name, size):
    """Each term and every gradient of (15), (16), (kd), CE; the teacher and its targets stay."""
    images, labels = torch.randn(24, 3, size, size, generator=seeded(2)), torch.arange(24) % 4
    teacher = common.frozen(common.build_model("resnet14", 4, size, 9))
    words = torch.randn(10, 64, generator=seeded(3)) / 5
    decisions = Decisions(*(torch.randn(*shape, generator=seeded(4)) for shape in (
        (3, 64), (3,), (12, 3))), torch.eye(12) * 0.9 + 0.1 / 12, 3)
    student = letkd.build_student(name, 4, size, 12 * (layers == 2), 10 * (layers > 0))
    twin, before = copy.deepcopy((student, [teacher.state_dict(), words, decisions]))
    terms, logits = letkd.train_step(
        student, None if supervision == "none" else teacher, letkd.Targets(words, decisions),
        torch.optim.SGD(student.parameters(), 0.1), images, labels,
        parsed(f"--supervision {supervision}"))
    z = letkd.up_to_tap(teacher, images)  # maps of 4x4, after the pooling
    z, z_penult = (F.avg_pool2d(maps, size // 16) for maps in (z, letkd.after_tap(teacher, z)))
    u, scores_i, scores_p = twin.forward_scores(images)
    z_s = twin.head(u.mean((2, 3)))
    wanted = {"ce": F.cross_entropy(z_s, labels)}
    if supervision == "logits":
        p_t = F.softmax(teacher(images) / 4, 1)
        wanted["kl"] = 16 * (p_t * (p_t.log() - F.log_softmax(z_s / 4, 1))).sum(1).mean()
    if supervision == "teacher":
        wanted["penult"] = letkd.template_loss(scores_p, letkd.word_targets(z_penult, words))
    if supervision == "teacher" and layers == 2:
        p_T = letkd.decision_targets(z, labels, decisions)
        wanted["inter"] = letkd.template_loss(scores_i, p_T)
    sum(wanted.values()).backward()
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(
        {key: value.item() for key, value in wanted.items()}, rel=1e-4)
    torch.testing.assert_close(logits, z_s)
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert not torch.equal(student.head.weight, twin.head.weight) and not teacher.training
    torch.testing.assert_close([teacher.state_dict(), words, decisions], before, rtol=0, atol=0)


def test_the_papers_recipe():
    found = letkd.parse_args("--dataset cifar100 --device cpu".split())
    assert (found.teacher, found.student, found.words, found.per_class, found.dimensions,
            found.epochs, found.batch_size, found.learning_rate, found.weight_decay,
            found.momentum, found.nesterov, found.layers, found.alpha, found.supervision) == (
        "resnet56", "resnet20", 4096, 8, 60, 240, 64, 0.05, 5e-4, 0.9, True, 2, 1, "teacher")
    for dataset, counts in (("cifar100", [150, 30, 30, 30]), ("imagenet", [30, 30, 30, 10])):
        wanted = [0.05 / 10**j for j, count in enumerate(counts) for _ in range(count)]
        assert letkd.learning_rates(0.05, sum(counts), dataset) == pytest.approx(wanted)


@pytest.mark.parametrize("typed, word", [
    ("--words 1", "--words"), ("--alpha -1", "--alpha"), ("--teacher-weights a b", "one file"),
    ("--alpha 0 --supervision none", "alone"), ("--supervision logits --layers 1", "--layers"),
    ("--supervision logits --alpha 0", "--alpha")])
def test_argument_errors_are_one_line(typed, word, capsys):
    assert word in refused("letkd", typed, capsys)


# ------------------------------------------------------------------------------------------ runs
TINY = "--words 12 --per-class 2 --rows 1500 "


def parsed(typed):
    return next(common.each_seed(letkd.parse_args(
        f"--device cpu --teacher resnet8 --student resnet8x0.5 {typed}".split())))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Namespace(folder=folder, printed=run("letkd", folder, TINY + "--compare"))


def loaded(folder):
    student = letkd.build_student("resnet8x0.5", classes=20, image_size=16, inter=40, penult=12)
    student.load_state_dict(weights(folder / "student.pt"))
    return student.eval()


def test_every_control(whole):
    """Flags of each, columns of its log, images it passed, parameters and multiply-adds by (17)."""
    controls = {  # name: supervision, layers, alpha; terms; places of layers; templates that count
        "letKD-2": ("teacher", 2, 1, ["ce", "penult", "inter"], "ip", 52),
        "kd": ("logits", 2, 1, ["ce", "kl"], "", 0),
        "unsupervised layers": ("none", 2, 1, ["ce"], "ip", 52),
        "auxiliary heads": ("teacher", 2, 0, ["ce", "penult", "inter"], "ip", 0),
        "letKD-1": ("teacher", 1, 1, ["ce", "penult"], "p", 12)}
    found, plain = table(whole.printed), letkd.cost(common.build_model("resnet8x0.5", 20, 16), 16)
    assert list(found) == ["teacher", "student alone", *controls]
    for name, (*flags, terms, places, K) in controls.items():
        result = result_of(whole.folder / ("" if name == "letKD-2" else name.replace(" ", "-")))
        assert [result["arguments"][flag] for flag in ("supervision", "layers", "alpha")] == flags
        assert list(result["rows"][1]) == [
            "epoch", "lr", *terms, "train", "img/s", "s", "test",
            *(f"{key}_{place}" for place in places for key in ("s_q", "s_v", "fire"))]
        teacher = {} if "none" in flags else {"teacher forward": 520}  # 2 epochs of 260
        assert result["images"] == {"student forward and backward": 520, **teacher}
        size, adds = (int(found[name][key].replace(",", "")) for key in ("params", "madds"))
        assert size == plain[0] + 2 * 32 * K + 2 * K + {0: 0, 12: 2, 52: 4}[K]
        assert adds == plain[1] + 2 * 32 * K * 16
    assert found["unsupervised layers"]["agree"] == found["kd"]["fire_p"] == "-"
    heads, last = found["auxiliary heads"], result_of(whole.folder)["rows"][-1]
    assert heads["probe_x"] == heads["probe_x_hat"] and heads["agree"] != "-"
    assert last["s_q_i"] == loaded(whole.folder).inter.match.scale.item()
    assert last["s_v_p"] == loaded(whole.folder).penult.value.scale.item()


def test_a_run_without_a_teacher(run, tmp_path, monkeypatch):
    """A tenth of the rate in the third of three epochs; firing is counted in each epoch anew;
    --compile takes what the steps call; the student runs without anything else."""
    compiled, rates, step = [], [], letkd.train_step
    def watched(student, teacher, targets, optimizer, *rest):
        assert student.training and teacher is None and targets is None
        rates.append(optimizer.param_groups[0]["lr"])
        if len(rates) > 6:  # from the second epoch on no template of `inter` can fire
            nn.init.zeros_(student.inter.norm.weight)
            nn.init.constant_(student.inter.norm.bias, -1)
        return step(student, teacher, targets, optimizer, *rest)
    monkeypatch.setattr(letkd, "train_step", watched)
    monkeypatch.setattr(torch, "compile", lambda part: compiled.append(part.__name__) or part)
    flags = "--words 12 --per-class 2 --supervision none --epochs 3 --compile"
    found = table(run("letkd", tmp_path, flags))
    assert list(found) == ["student alone", "unsupervised layers"]
    assert rates == pytest.approx([0.1] * 12 + [0.01] * 6)
    # whether it works at all; the student alone; this one
    assert compiled == ["sin", "forward_features", "forward_scores"]
    result = result_of(tmp_path)
    assert [row["fire_i"] > 0.5 for row in result["rows"]] == [True, False, False]
    assert all(row["fire_p"] > 0.5 for row in result["rows"])
    assert common.evaluate(loaded(tmp_path), shapes_data().test, parsed("")) == result["last_test"]


@torch.no_grad()
def test_measures_by_hand(whole, run):
    """Agreement, softness, entropy and both probes from the saved student, in numpy."""
    student, data, found = loaded(whole.folder), shapes_data(), result_of(whole.folder)["measures"]
    arguments = parsed(f"--epochs 2 --batch-size 50 --cache {run.cache} {TINY}")
    teacher, _ = letkd.networks_alone(data, arguments)["teacher"]
    words, decisions = letkd.prepare(teacher, data, arguments)
    images, y = data.test.normalise(data.test.images), data.train.labels.numpy()
    z = letkd.after_tap(teacher, letkd.up_to_tap(teacher, images))
    p_T, a = (rows_of(maps) for maps in (letkd.word_targets(z, words),
                                         student.forward_scores(images)[2]))
    assert found["agree"] == pytest.approx(100 * (p_T.argmax(1) == a.argmax(1)).mean(), abs=0.2)
    assert found["p_max"] == pytest.approx(p_T.max(1).mean(), rel=1e-3)
    s_T = decisions.table.double().numpy()
    assert found["entropy"] == pytest.approx(np.log(40) - kl(s_T, 1 / 40).mean(), rel=1e-5)
    for key, layer in (("probe_x", lambda x: [x]), ("probe_x_hat", student.inter)):
        fitted, tested = (
            layer(letkd.up_to_tap(student, part.normalise(part.images)))[0].mean((2, 3))
            .double().numpy() for part in (data.train, data.test))
        mu = np.stack([fitted[y == c].mean(0) for c in range(20)])
        S_w = (fitted - mu[y]).T @ (fitted - mu[y]) / (len(y) - 20)
        S = np.linalg.pinv(S_w, rcond=1e-6, hermitian=True)
        # the linear discriminant functions, equal priors
        score = tested @ S @ mu.T - 0.5 * np.einsum("cd,de,ce->c", mu, S, mu)
        right = 100 * (score.argmax(1) == data.test.labels.numpy()).mean()
        assert found[key] == pytest.approx(right, abs=1.01)  # of 100 images, one may lie between


def test_a_stopped_run_goes_on_bit_for_bit(whole, run, tmp_path, monkeypatch):
    """Stopped in the second epoch of letKD-2, then in that of a control."""
    for call in (6 + 2, 4 + 6 + 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, letkd, "train_step", call)
            run("letkd", tmp_path, TINY + "--compare --resume")
    assert (tmp_path / "kd").exists() and not (tmp_path / "unsupervised-layers").exists()
    run("letkd", tmp_path, TINY + "--compare --resume")
    for name in (".", "kd", "unsupervised-layers", "auxiliary-heads", "letKD-1"):
        assert same_run(tmp_path / name, whole.folder / name)


@pytest.mark.parametrize("typed, chosen, unsupervised", [
    ("--alpha 0 --layers 1", "auxiliary heads", (1, 1)),
    ("--alpha 0.5", "letKD-2, alpha 0.5", (2, 0.5)), ("--supervision logits", "kd", (2, 1))])
def test_controls_of_other_choices(tmp_path, typed, chosen, unsupervised):
    """What would be run, without running it: layers and alpha of each; nothing is run twice."""
    arguments = parsed(f"--compare --out {tmp_path} {typed}")
    runs = {name: (flags.layers, flags.alpha) for name, flags, _ in common.planned_runs(
        arguments, shapes_data(), letkd.name_of(arguments), letkd.CONTROLS)}
    assert list(runs) == [chosen, *(name for name in letkd.CONTROLS if name != chosen)]
    assert runs["unsupervised layers"] == unsupervised and runs["letKD-2"] == (2, 1)
    assert runs["auxiliary heads"] == (unsupervised[0], 0) and runs["letKD-1"] == (1, 1)


def test_targets_are_cached_and_belong_to_their_teacher(tmp_path, monkeypatch):
    """One file for each teacher and each flag that changes them, and for no other flag."""
    data, last = shapes_data(), "--seed 1 --dimensions 3"
    teacher, other = (common.frozen(common.build_model("resnet8", 20, 16, seed)) for seed in (1, 2))
    for count, (network, typed) in enumerate((
            (teacher, ""), (other, ""), (teacher, "--words 13"), (teacher, "--rows 600"),
            (teacher, "--per-class 1"), (teacher, "--dimensions 3"), (teacher, last)), 1):
        arguments = parsed(f"--cache {tmp_path} {TINY} {typed}")
        words, decisions = letkd.prepare(network, data, arguments)
        assert len([*tmp_path.glob("shapes-resnet8-targets-*.pt")]) == count
    letkd.prepare(teacher, dataclasses.replace(data, mean=(0, 0, 0)), arguments)
    assert len([*tmp_path.glob("shapes-resnet8-targets-*.pt")]) == count + 1
    mine = altered("letkd", tmp_path)  # a changed copy, wherever it lies, has files of its own
    mine.prepare(teacher, data, arguments)
    assert len([*tmp_path.glob("shapes-resnet8-targets-*.pt")]) == count + 2
    inter, penult, labels = letkd.teacher_features(teacher, data, [4, 4], arguments)
    wanted = (letkd.fit_words(penult, 12, seeded(1)),
              letkd.fit_decisions(inter, labels, 20, 2, 3, seeded(1)))
    monkeypatch.setattr(letkd, "teacher_features", forbidden)
    arguments = parsed(f"--cache {tmp_path} {TINY} {last} --alpha 0.5 --learning-rate 3")
    arguments.layers = 1
    again = letkd.prepare(teacher, data, arguments)
    for found in (words, decisions), again:
        torch.testing.assert_close([*found], [*wanted], rtol=0, atol=0)


def test_features_are_the_teachers_own():
    """Every row is a location of its image, with its label; equally many an image."""
    data, arguments = shapes_data(), parsed("--rows 1500")
    teacher = common.frozen(common.build_model("resnet14", 20, 16, 1))
    inter, penult, labels = letkd.teacher_features(teacher, data, [4, 4], arguments)
    assert torch.equal(labels, data.train.labels.repeat_interleave(5))
    z = letkd.up_to_tap(teacher, data.train.normalise(data.train.images))
    for maps, rows in ((z, inter), (letkd.after_tap(teacher, z), penult)):
        places = maps.movedim(1, 3).flatten(1, 2)  # (N,16,D)
        gap = (rows.view(260, 5, 1, 64) - places[:, None]).abs().amax(3)  # (260,5,16)
        assert gap.amin(2).max() < 1e-4
        assert all(len(set(own)) == 5 for own in gap.argmin(2).tolist())  # none is drawn twice
    arguments.rows = 100  # fewer than images: some images, one location each
    used, *_ = letkd.sample([4, 4], data, arguments)
    rows, _, labels = letkd.teacher_features(teacher, data, [4, 4], arguments)
    assert len(rows) == 100 and torch.equal(labels, data.train.labels[used])
    arguments.rows = 10**6  # all, of maps that are pooled to 2x2
    every, *_ = letkd.teacher_features(teacher, data, [2, 2], arguments)
    torch.testing.assert_close(every.view(260, 4, 64).mean(1), z.mean((2, 3)))


@pytest.mark.parametrize("typed, word", [
    ("--words 5000", "--words 5000"), ("--per-class 200", "--per-class 200"),
    ("--rows 30 --words 12", "--per-class 2"), ("--words 31 --rows 30 --per-class 1", "only 30"),
    ("--teacher vgg8 --image-size 16", "divide"),
    ("--teacher-weights missing.pt", "missing.pt")])
def test_what_does_not_fit_is_refused_before_any_training(run, tmp_path, monkeypatch, typed, word):
    monkeypatch.setattr(letkd, "train_network", forbidden)
    with pytest.raises(common.InputError, match=word):
        run("letkd", tmp_path / "out", TINY + typed)
    assert not [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.json")]


def test_open_set_teacher_weights_and_seeds(run, tmp_path):
    given = tmp_path / "teacher.pt"
    torch.save(common.build_model("resnet8", 16, 16, 4).state_dict(), given)
    found = table(run("letkd", tmp_path / "out", TINY +
                      f"--epochs 1 --open-set 4 --seed 0 1 --teacher-weights {given}"))
    assert "±" in found["letKD-2"]["rank1"] and "±" in found["letKD-2"]["verification"]
    assert found["teacher"]["epochs"] == found["teacher"]["seconds"] == "-"


def test_pictures(whole, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import figures
    for folder, names in (("", {"layers.png", "subclasses.png"}), ("kd", {"layers.png"})):
        figures.main(whole.folder / folder)
        assert {path.name for path in (whole.folder / folder).glob("*.png")} == names
    layers, _ = figures.letkd(whole.folder, result_of(whole.folder)).values()
    assert list(layers.axes[0].lines[1].get_ydata()) == [
        row["penult"] for row in result_of(whole.folder)["rows"]]


def test_the_student_learns_the_shapes_and_the_words(tmp_path, run, monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 500)
    run("letkd", tmp_path, TINY + "--epochs 4 --batch-size 20")
    result = result_of(tmp_path)
    assert result["last_test"] > 20 and result["measures"]["agree"] > 3 * 100 / 12
    first, *_, last = result["rows"]
    assert last["penult"] < 0.7 * first["penult"] and last["inter"] < first["inter"]
