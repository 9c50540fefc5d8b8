"""LetKD against its specification: goldens typed from its section 11 (six decimals), beside them
what the usual mistakes give; numpy oracles in float64, written from the equations; tiny runs."""

import copy
import functools
import shlex
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    folder_of, log_p, refused, result_of, same_run, shapes_data, stopped, table, tensor, weights)
from torch import nn
from torch.nn import functional as F

import common
import letkd
from letkd import KDLayer

DIGITS = 2e-6
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
W, b, C_N, S_T = map(tensor, ([[1, -1]], [0.5], [[[-1], [0.2]], [[0.4], [2]]], TABLE))


def grid(rows):
    """Rows in the order (b,w) = (0,0), (0,1), (1,0), (1,1) -> maps (2,channels,1,2)."""
    return tensor(rows).view(2, 1, 2, -1).permute(0, 3, 1, 2)


def rows_of(maps):
    return maps.detach().movedim(1, 3).flatten(0, 2).numpy()  # (B H W, channels)


def check(maps, rows, digits=DIGITS):
    assert rows_of(maps) == pytest.approx(np.asarray(rows, float), abs=digits)


def unit(u, axis=-1):
    return u / np.maximum(np.sqrt((u**2).sum(axis, keepdims=True)), 1e-12)


def kl(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p / q, 1)), 0).sum(1)


# ------------------------------------------------------------------------- the layer, (1) to (5)
def layer_of(omega, V, gamma, beta, alpha):
    layer = KDLayer(omega.shape[1], len(omega), alpha).double()
    layer.match.weight.data = tensor(omega)[..., None, None]
    layer.value.weight.data = tensor(V)[..., None, None]
    layer.norm.weight.data, layer.norm.bias.data = tensor(gamma), tensor(beta)
    return layer


def test_layer_goldens_and_the_usual_mistakes():
    layer = layer_of(OMEGA, V, np.ones(4), BETA, 0.5)
    fresh = copy.deepcopy(layer).eval()
    (x_hat, scores), (x_hat_eval, same_scores) = layer(grid(X)), fresh(grid(X))
    check(scores, SCORES)
    check(x_hat, X_HAT)
    check(x_hat_eval, X_EVAL)
    check(F.relu(layer.norm(scores)), P_HAT)
    assert torch.equal(same_scores, scores) and layer.fired == fresh.fired == 1
    for wrong, listed in (  # p^ as it is; V normalised along d
            (X[0] + 0.5 * unit(V) @ P_HAT[0], (1.315371, 0.080011)),
            (X[0] + 0.5 * unit(V, 0) @ unit(P_HAT[0]), (1.596913, 0.161511))):
        assert wrong == pytest.approx(listed, abs=DIGITS) and np.abs(wrong - X_HAT[0]).max() > 5e-3


def test_layer_on_random_maps():
    random, B, d, H, W, K = np.random.default_rng(4), 4, 5, 3, 2, 7
    x, omega, V = (random.normal(size=size) for size in ((B, d, H, W), (K, d), (d, K)))
    gamma, beta, s_q, s_v, alpha = *random.normal(size=(2, K)), 2.5, 0.75, 1.25
    layer, x = layer_of(omega, V, gamma, beta, alpha), tensor(x, grad=True)
    layer.match.scale.data, layer.value.scale.data = tensor(s_q), tensor(s_v)
    a = s_q * unit(rows_of(x)) @ unit(omega).T
    kept = 0.1 * a.mean(0), 0.9 + 0.1 * a.var(0, ddof=1)  # torch keeps the unbiased variance
    for mode, (mean, var) in ((True, (a.mean(0), a.var(0))), (False, kept)):
        x_hat, scores = layer.train(mode)(x)
        p_hat = np.maximum(0, gamma * (a - mean) / np.sqrt(var + 1e-5) + beta)
        check(scores, a, 1e-10)
        check(x_hat, rows_of(x) + alpha * s_v * unit(p_hat) @ unit(V).T, 1e-10)
        assert layer.fired.item() == pytest.approx((p_hat.max(0) > 0).mean())
    assert torch.autograd.gradcheck(layer.train(), x)
    dead = layer_of(omega, V, 0 * gamma, -np.ones(K), alpha)  # no template fires: 0, and not 0/0
    assert torch.equal(dead(x)[0], x) and dead.fired == 0
    wide = KDLayer(64, 512)  # weights start with variance 2 by their inputs
    assert wide.match.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    assert wide.value.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):  # has no hold of the layer
        for found, wanted in zip(layer.float()(x.float()), layer.double()(x)):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------- targets and loss, (7), (12)-(14)
def decide(*labels, c_n=C_N, s_T=S_T):
    return letkd.decision_targets(grid(Z), torch.tensor(labels), W, b, c_n, s_T)


def test_targets_of_words_and_decisions():
    """n = 1, 0, 2, 3 are picked inside the label's class; without labels they were 2, 0, 1, 3."""
    check(letkd.word_targets(grid(Z), tensor(WORDS)), P_T)
    first = rows_of(letkd.word_targets(grid(Z), tensor(WORDS), tau=2.0))[0]
    assert first == pytest.approx([0.440399, 0.440399, 0.059601, 0.059601], abs=DIGITS)
    random = np.random.default_rng(0)  # maps far from the origin
    z, rho = tensor(random.normal(30, 3, (2, 5, 3, 3))), random.normal(30, 3, (11, 5))
    wanted = np.exp(log_p(-0.1 * np.square(rows_of(z)[:, None] - rho).sum(2)))
    check(letkd.word_targets(z, tensor(rho), 0.1), wanted, 1e-9)
    check(letkd.word_targets(z.float(), tensor(rho).float(), 0.1), wanted, 1e-4)
    check(decide(0, 1), TABLE[[1, 0, 2, 3]])
    check(decide(1, 0), TABLE[[2, 2, 1, 1]])
    # k = 1, the own centre the farthest: CODE's masked argmax would fail here
    check(decide(0, 1, c_n=tensor([[[-50]], [[0.4]]]), s_T=torch.eye(2)), np.eye(2)[[0, 0, 1, 1]])


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
    p_S = np.exp(log_p(SCORES))
    normed = (SCORES - SCORES.mean(0)) / np.sqrt(SCORES.var(0) + 1e-5) + BETA
    for wrong, listed in ((kl(P_T, p_S).sum() / 2, 2.427157), (kl(P_T, p_S).mean() / 4, 0.303395),
                          (kl(p_S, P_T).mean(), 0.801349),  # reversed
                          (kl(P_T, np.exp(log_p(normed))).mean(), 0.555170)):  # after BatchNorm
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - 1.213579) > 0.1


def test_losses_and_gradients_on_random_input():
    """Eqs. (13), (14), (kd), zeros in p_T among them; targets and teacher get no gradient."""
    random, size = np.random.default_rng(1), (4, 10, 3, 2)
    p_T = np.maximum(random.normal(0, 3, size), 0) + 0.1 * (np.arange(10) == 0).reshape(10, 1, 1)
    p_T = tensor(p_T / p_T.sum(1, keepdims=True), grad=True)
    a, z_s, z_t = (tensor(random.normal(0, 3, size), grad=True)
                   for size in (size, (6, 5), (6, 5)))
    losses = letkd.template_loss(a, p_T), letkd.scaled_kl(z_t, z_s, 3.0)
    sum(losses).backward()
    p_S, flat = np.exp(log_p(rows_of(a))), rows_of(p_T)
    p_s, p_t = (np.exp(log_p(z.detach().numpy(), 3)) for z in (z_s, z_t))
    values = kl(flat, p_S).mean(), 9 * kl(p_t, p_s).mean()
    assert [loss.item() for loss in losses] == pytest.approx(values, rel=1e-9)
    check(a.grad, (p_S - flat) / len(flat), 1e-12)
    assert z_s.grad.numpy() == pytest.approx(3 * (p_s - p_t) / 6, abs=1e-12)
    assert p_T.grad is None and z_t.grad is None


@pytest.mark.parametrize("error, words, call, given", [
    (ValueError, r"\(1, 3", letkd.template_loss, (torch.ones(2, 3, 1, 1), torch.ones(1, 3, 1, 1))),
    (ValueError, r"\(1, 3", letkd.scaled_kl, (torch.ones(2, 3), torch.ones(1, 3))),
    (ValueError, r"labels: \(2,\) and \(1,\)", decide, (0,)),
    (IndexError, "range", decide, (0, 2)), (IndexError, "range", decide, (-1, 0)),
    (common.InputError, "3 centres for 2", letkd.fit_decisions, (
        torch.eye(9), torch.tensor([0] * 7 + [1] * 2), 2, 3))])
def test_what_broadcasting_or_an_index_would_hide(error, words, call, given):
    with pytest.raises(error, match=words):
        call(*given)


# --------------------------------------------------------------- k-means, LDA, table, (6), (8)-(11)
def test_k_means(monkeypatch):
    """A golden from any start, Lloyd's loop in numpy, empty centres."""
    golden = np.array([(0, 0), (1, 0), (10, 0), (12, 0)])
    normal = np.random.default_rng(1).normal(size=(1000, 3))
    for rows, k, seed in (*((golden, 2, seed) for seed in range(12)), (normal, 40, 7)):
        centres = rows[torch.randperm(len(rows), generator=seeded(seed)).numpy()[:k]]
        for _ in range(20):
            index = np.square(rows[:, None] - centres).sum(2).argmin(1)
            centres = np.stack([rows[index == e].mean(0) for e in range(k)])
        found, nearest = letkd.k_means(tensor(rows), k, seeded(seed))
        assert found.numpy() == pytest.approx(centres, abs=1e-9)
        assert nearest.tolist() == np.square(rows[:, None] - centres).sum(2).argmin(1).tolist()
        assert k > 2 or sorted(found.tolist()) == [[0.5, 0], [11, 0]]
    # two of three equal starts stay empty and take the rows farthest from their own centre
    monkeypatch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
    centres, _ = letkd.k_means(tensor([(0, 0)] * 4 + [(5, 0), (9, 0)]), 3, iterations=1)
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
        W, b, c_n, s_T = found = letkd.fit_decisions(
            torch.tensor(z).float(), torch.tensor([0] * 5 + [1] * 6), 2, 2, generator=seeded(seed))
        assert {part.dtype for part in found} == {torch.float32} and c_n.shape == (2, 2, 1)
        sign = W[0, 0].sign()  # of the axis, which decides nothing
        assert (sign * W).numpy() == pytest.approx(np.array([[0.223586, 0]]), abs=DIGITS)
        c = sign * c_n.flatten()
        order = torch.cat([c[:2].argsort(), 2 + c[2:].argsort()])
        assert [sign * b.item(), *c[order].tolist()] == pytest.approx(
            [-0.243912, -2.032601, -0.020326, 0.147364, 1.768363], abs=DIGITS)
        assert s_T[order][:, order].numpy() == pytest.approx(np.array(
            [[1, 0, 0, 0], [0, 2 / 3, 1 / 3, 0], [0, 3 / 4, 1 / 4, 0], [0, 0, 0, 1]]), abs=1e-6)


@pytest.mark.parametrize("classes, D", [(2, 6), (4, 6), (9, 5)])
def test_discriminant_by_its_definition(classes, D):
    """W S_w W^T = I, W S_b W^T diagonal and descending, b centres; --dimensions cuts."""
    random, y = np.random.default_rng(5), np.arange(300) % classes
    z = random.normal(size=(300, D)) @ random.normal(size=(D, D))
    z += random.normal(0, 2, (classes, D))[y]
    z = np.insert(z, 1, 0, axis=1)  # a channel that is 0 everywhere
    given = tensor(z), torch.tensor(y), classes
    W, b = map(np.asarray, letkd.discriminant(*given, 60))
    mu, m = np.stack([z[y == c].mean(0) for c in range(classes)]), z.mean(0)
    S_w = (z - mu[y]).T @ (z - mu[y]) / (300 - classes)
    S_b = (mu - m).T * np.bincount(y) @ (mu - m) / 300
    e = np.sort(np.linalg.eigvals(np.linalg.pinv(S_w) @ S_b).real)[::-1][:min(classes - 1, D)]
    assert W @ S_w @ W.T == pytest.approx(np.eye(len(e)), abs=1e-9)
    assert W @ S_b @ W.T == pytest.approx(np.diag(e), abs=1e-10 * e[0])
    assert W @ m + b == pytest.approx(np.zeros(len(e)), abs=1e-9)
    assert letkd.discriminant(*given, 2)[0].numpy() == pytest.approx(W[:2], abs=1e-9)


def test_decision_table_by_its_definition(monkeypatch):
    """Loops over single rows of clustered data. Centres that are no means, and the sixth without a
    row of its own class: q_n = c_n takes rows of the others, its own row is one-hot."""
    def k_means(g, k, generator):
        centres = torch.stack([*g[:2], -g.mean(0)])
        return centres, letkd.nearest(g, centres)[0]
    monkeypatch.setattr(letkd, "k_means", k_means)
    random, y = np.random.default_rng(2), np.arange(180) % 3
    parts, choice = random.normal(0, 3, (6, 4)), [[0, 1, 2], [2, 3, 4], [5, 1, 3]]  # some shared
    z = np.stack([parts[choice[c][random.integers(3)]] for c in y])
    z += random.normal(0, 0.5, (180, 4))
    W, b, c_n, s_T = map(np.asarray, letkd.fit_decisions(tensor(z), torch.tensor(y), 3, 3))
    g = z @ W.T + b
    h1 = np.array([3 * c + np.square(row - c_n[c]).sum(1).argmin() for row, c in zip(g, y)])
    q = np.stack([g[h1 == n].mean(0) if n in h1 else c_n[n // 3, n % 3] for n in range(9)])
    table = np.diag([float(n not in h1) for n in range(9)])
    for row, n in zip(g, h1):
        table[n, np.square(row - q).sum(1).argmin()] += 1
    assert 5 not in h1 and table[:, 5].sum() > 1 + 3
    assert s_T == pytest.approx(table / table.sum(1, keepdims=True), abs=1e-9)


# ------------------------------------------------------------------------------ student and routing
@pytest.mark.parametrize("name, size", [("resnet14", 16), ("wrn_16_2", 16), ("vgg8", 32)])
def test_taps_and_places_of_the_layers(name, size):
    """Two of a seed are equal; one of alpha 0 gives the logits of the network of its seed."""
    layered, twin = (letkd.build_student(name, 10, size, 20, 30).eval() for _ in range(2))
    network, x = common.build_model(name, 10, size, 1).eval(), torch.randn(2, 3, size, size)
    first = nn.Sequential(network.stem, *network.stages[:-1], network.stages[-1][0])
    assert torch.equal(letkd.up_to_tap(network, x), first(x))
    assert torch.equal(letkd.build_student(name, 10, size, 20, 30, 0, 1).eval()(x), network(x))
    u = letkd.after_tap(layered, layered.inter(letkd.up_to_tap(layered, x))[0])
    torch.testing.assert_close(twin(x), layered.head(layered.penult(u)[0].mean((2, 3))))


@pytest.mark.parametrize("alpha", [0, 1])
def test_gradient_routing(alpha):
    """The routing table of section 4, row by row, by the first part of the parameters' names."""
    before = "stem", "stages.0", "stages.1", "stages.2.0"  # the tap
    routes = {"inter": (*before, "inter.match"),
              "penult": (*before, *["inter"] * alpha, "stages.2.1", "penult.match"),
              "ce": (*before, *["inter", "penult"] * alpha, "stages.2.1", "head")}
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


@pytest.mark.parametrize("typed, name, size", [
    ("letKD-1", "resnet14", 16), ("letKD-2", "resnet14", 16), ("kd", "resnet14", 16),
    ("letKD-2", "vgg8", 32),  # the teacher's maps are twice as large
    ("'unsupervised layers'", "resnet14", 16), ("letKD-2 --precision bf16", "resnet14", 16)])
def test_a_step_by_hand(typed, name, size):
    """Each term and every gradient of (15), (16), (kd), CE; the teacher and its targets stay."""
    settings = parsed(f"--method {typed}")
    random = functools.partial(torch.randn, generator=seeded(2))
    images, labels = random(24, 3, size, size), torch.arange(24) % 4
    targets = [random(10, 64) / 5, random(3, 64), random(3), random(4, 3, 3),
               torch.eye(12) * 0.9 + 0.1 / 12]
    teacher = common.frozen(common.build_model("resnet14", 4, size, 9))
    student = letkd.build_student(name, 4, size, 12 * (settings.layers == 2),
                                  10 * (settings.layers > 0))
    twin, before = copy.deepcopy((student, [teacher.state_dict(), targets]))
    terms, logits = letkd.train_step(
        student, None if settings.supervision == "none" else teacher, targets,
        torch.optim.SGD(student.parameters(), 0.1), images, labels, settings)
    with common.autocast(settings):  # not of the targets
        z = letkd.up_to_tap(teacher, images)  # maps of 4x4, after the pooling
        z, z_penult = (F.avg_pool2d(maps.float(), size // 16)
                       for maps in (z, letkd.after_tap(teacher, z)))
        u, scores_i, scores_p = twin.forward_scores(images)
        z_s = twin.head(u.mean((2, 3))).float()
    wanted = {"ce": F.cross_entropy(z_s, labels)}
    if settings.supervision == "logits":
        wanted["kl"] = letkd.scaled_kl(teacher(images), z_s, 4)
    if settings.supervision == "teacher":
        wanted["penult"] = letkd.template_loss(
            scores_p, letkd.word_targets(z_penult, targets[0]))
        if settings.layers == 2:
            wanted["inter"] = letkd.template_loss(
                scores_i, letkd.decision_targets(z, labels, *targets[1:]))
    sum(wanted.values()).backward()
    for key, value in wanted.items():
        assert terms[key].item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(logits, z_s)
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert not torch.equal(student.head.weight, twin.head.weight) and not teacher.training
    torch.testing.assert_close([teacher.state_dict(), targets], before, rtol=0, atol=0)


def test_the_papers_recipe():
    found = letkd.parse_args("--dataset cifar100".split())
    assert (found.teacher, found.student, found.words, found.per_class, found.dimensions,
            found.epochs, found.batch_size, found.learning_rate, found.weight_decay,
            found.momentum, found.nesterov, found.alpha, found.method) == (
        "resnet56", "resnet20", 4096, 8, 60, 240, 64, 0.05, 5e-4, 0.9, True, 1, ["letKD-2"])
    for dataset, first, rest in (("cifar100", 150, [30, 30, 30]), ("imagenet", 30, [30, 30, 10])):
        drops = letkd.parse_args(["--dataset", dataset]).drops
        assert letkd.learning_rates(0.05, first + sum(rest), drops) == pytest.approx(
            [0.05] * first + [0.05 / 10 ** j for j in (1, 2, 3) for _ in range(rest[j - 1])])


def test_mps_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "use --device cpu" in refused("letkd", "--device mps", capsys)


# ------------------------------------------------------------------------------------------ runs
TINY = "--words 12 --per-class 2 --rows 1500 "


def parsed(typed):
    """The settings of a run: the flags, with what METHODS changes."""
    tiny = "--device cpu --teacher resnet8 --student resnet8x0.5"
    arguments = next(common.each_seed(letkd.parse_args(shlex.split(f"{tiny} {typed}"))))
    return Namespace(**{**vars(arguments), **letkd.METHODS[arguments.method[0]][0]})


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run("letkd", folder, f"{TINY} --compare --cache {folder / 'cache'}")


@pytest.mark.parametrize("name, terms, inter, penult, alpha", [
    ("letKD-2", ["ce", "penult", "inter"], 40, 12, 1), ("letKD-1", ["ce", "penult"], 0, 12, 1),
    ("kd", ["ce", "kl"], 0, 0, None), ("auxiliary heads", ["ce", "penult", "inter"], 40, 12, 0),
    ("unsupervised layers", ["ce"], 40, 12, 1)])
def test_every_method(whole, name, terms, inter, penult, alpha):
    """Columns of its log, parameters by (17); the saved student runs without anything else."""
    result, row = result_of(folder := folder_of(whole[0], name)), table(whole[1])[name]
    places = [place for place, K in (("inter", inter), ("penult", penult)) if K]
    assert [*result["rows"][1]] == ["epoch", "lr", *terms, *(
        f"{key}_{place}" for place in places for key in ("s_q", "s_v", "fire")),
        "train", "img/s", "s", "test"]
    assert places == [place for place in ("inter", "penult") if row[f"fire_{place}"] != "-"]
    student = letkd.build_student("resnet8x0.5", 20, 16, inter, penult)
    student.load_state_dict(weights(folder / "student.pt"))  # alpha too
    assert all(getattr(student, place).alpha == alpha for place in places)
    assert common.evaluate(student, shapes_data().test, parsed("")) == result["last_test"]
    size = sum(p.numel() for p in common.build_model("resnet8x0.5", 20, 16).parameters())
    if alpha:
        size += sum(2 * 32 * K + 2 * K + 2 for K in (inter, penult) if K)
    assert row["params"] == f"{size:,}"


def test_a_stopped_run_goes_on_bit_for_bit(whole, run, tmp_path, monkeypatch):
    """Stopped in the fit, in epoch 2 of letKD-2, in that of letKD-1; with a cache of its own."""
    command = f"{TINY} --compare --cache {tmp_path / 'cache'}"
    for name, call in (("k_means", 5), ("train_step", 6 + 2), ("train_step", 6 + 6 + 2)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, letkd, name, call)
            run("letkd", tmp_path, command)
    assert not [*tmp_path.glob("auxiliary*")]
    assert "fitting" not in run("letkd", tmp_path, command)
    unharmed, printed = whole
    assert printed.count("fitting words on 1300 locations, decisions on 1300") == 1
    for name in letkd.METHODS:
        assert same_run(folder_of(tmp_path, name), folder_of(unharmed, name))


def test_targets_are_cached_and_belong_to_their_teacher(tmp_path):
    """One file for each teacher and each flag that changes them, and for no other flag."""
    data, last = shapes_data(), "--seed 1 --dimensions 3"
    other, teacher = (common.frozen(common.build_model("resnet8", 20, 16, seed)) for seed in (1, 2))
    flags = ("--words 13", "--rows 600", "--per-class 1", "--dimensions 3", "--student vgg8",
             "--precision bf16", last, f"{last} --alpha 0.5 --learning-rate 3 --method letKD-1")
    for typed, network in (("", other), *((typed, teacher) for typed in ("", *flags))):
        arguments = parsed(f"--cache {tmp_path} {TINY} {typed}")
        found = letkd.targets_of(network, data, arguments)
    assert len([*tmp_path.glob("shapes-targets-*.pt")]) == 2 + len(flags) - 1
    inter, penult, labels = letkd.teacher_rows(teacher, data, [4, 4], arguments)
    wanted = [letkd.k_means(penult, 12, seeded(1))[0],
              *letkd.fit_decisions(inter, labels, 20, 2, 3, seeded(1))]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rows, images, each", [(1500, 260, 5), (100, 100, 1)])
def test_rows_are_the_teachers_own(rows, images, each):
    """Every row is a location of its image, with its label; of each image equally many."""
    data, arguments = shapes_data(), parsed(f"--rows {rows}")
    teacher = common.frozen(common.build_model("resnet14", 20, 16, 1))
    *found, labels = letkd.teacher_rows(teacher, data, [4, 4], arguments)
    z = letkd.up_to_tap(teacher, data.train.normalise(data.train.images))
    for maps, z_rows in zip((z, letkd.after_tap(teacher, z)), found):
        places = maps.movedim(1, 3).flatten(0, 2)  # (260 * 16, D)
        gap, place = torch.cdist(z_rows, places, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert gap.max() < 1e-3 and len({*place.tolist()}) == len(z_rows)  # none is drawn twice
        counts = (place // 16).bincount()
        assert counts[counts > 0].tolist() == [each] * images and len(counts) > 250
        assert torch.equal(labels, data.train.labels[place // 16])
    arguments.rows = 10**6  # all, of maps that are pooled to 2x2
    every, *_ = letkd.teacher_rows(teacher, data, [2, 2], arguments)
    torch.testing.assert_close(every.view(260, 4, 64).mean(1), z.mean((2, 3)))


def test_rates_and_modes_of_a_run(tmp_path, run, monkeypatch):
    """Rates fall after 5/8 and 3/4 of four epochs; all rows recognise unseen classes."""
    rates, step = [], letkd.train_step

    def watched(student, teacher, targets, optimizer, *batch):
        rates.append(optimizer.param_groups[0]["lr"])
        assert student.training and not teacher.training
        return step(student, teacher, targets, optimizer, *batch)
    monkeypatch.setattr(letkd, "train_step", watched)
    found = table(run("letkd", tmp_path, TINY + "--epochs 4 --open-set 4"))
    assert rates == pytest.approx([0.1] * 15 + [0.001] * 5)
    assert all(row["rank1"] != "-" for row in found.values()) and len(found) == 6
