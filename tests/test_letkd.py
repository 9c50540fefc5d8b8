"""LetKD against its specification: section 11, oracles, gradient routing, tiny runs.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give.
"""

import copy
import importlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT, forbidden, log, readme_commands, refused, result_of, same, same_run, shapes_data, stopped,
    table, weights)
from torch import nn
from torch.nn import functional as F

import common
import letkd
from letkd import CosineConv1x1, Decisions, KDLayer

DIGITS = 2e-6


def grid(rows):
    """Rows in the order (b,w) = (0,0), (0,1), (1,0), (1,1) -> maps (2,channels,1,2)."""
    return torch.tensor(np.asarray(rows, float).reshape(2, 1, 2, -1).transpose(0, 3, 1, 2).copy())


def rows_of(maps):
    return maps.detach().movedim(1, 3).flatten(0, 2).numpy()  # (B H W, channels)


X = [(1, 0), (3, 4), (-1, 2), (2, -1)]
Z = [(0.5, 0), (0, 1), (0.7, 1.0), (1.2, 0.1)]
SCORES = [[3, 0, -2.121320, 1.8], [1.8, 2.4, 0.424264, 3.0],
          [-1.341641, 2.683282, 2.846050, 1.341641], [2.683282, -1.341641, -2.846050, 0.536656]]
P_HAT = [[0.852352, 0, 0, 0.346321], [0.153984, 0.972922, 0.277964, 1.692571],
         [0, 1.141763, 1.356712, 0], [0.668031, 0, 0, 0]]
X_HAT = [[1.342786, 0.086966], [3.336549, 4.076995], [-1.156178, 2.445568], [2.204124, -0.841886]]
X_HAT_EVAL = [[1.396145, 0.052603], [3.360967, 4.150831], [-0.983621, 2.358035],
              [2.304921, -0.889387]]
WORDS = [[0, 0], [1, 0], [0, 1], [1, 1]]
P_T = [[0.365529, 0.365529, 0.134471, 0.134471], [0.196612, 0.072329, 0.534447, 0.196612],
       [0.107930, 0.161012, 0.293383, 0.437676], [0.136488, 0.553486, 0.061328, 0.248697]]
TABLE = [[0.75, 0.25, 0, 0], [0.1, 0.5, 0.4, 0], [0, 0.3, 0.6, 0.1], [0, 0, 0.125, 0.875]]


def layer_of_the_spec():
    layer = KDLayer(2, 4, alpha=0.5).double()
    with torch.no_grad():
        layer.match.weight.copy_(torch.tensor([[2, 0], [0, 0.5], [-1, 1], [3, 4]])[..., None, None])
        layer.value.weight.copy_(torch.tensor([[1, 0, -1, 2], [0.5, 1, 1, -0.5]])[..., None, None])
        layer.norm.bias.copy_(torch.tensor([0, 0.1, -0.1, 0.2]))
    return layer


def decisions_of_the_spec():
    return Decisions(*(torch.tensor(part, dtype=torch.float64) for part in (
        [[1, -1]], [0.5], [[-1], [0.2], [0.4], [2]], TABLE)), 2)


# ------------------------------------------------------------------------------ numpy oracles
def unit(u, axis=-1):
    return u / np.maximum(np.sqrt((u**2).sum(axis, keepdims=True)), 1e-12)


def layer_oracle(x, omega, s_q, gamma, beta, V, s_v, alpha, statistics=None):
    """Eqs. (1) to (4) for rows x (N,d): scores, p^, x_hat."""
    a = s_q * unit(x) @ unit(omega).T
    mean, var = statistics or (a.mean(0), a.var(0))
    p_hat = np.maximum(0, gamma * (a - mean) / np.sqrt(var + 1e-5) + beta)
    v = s_v * unit(p_hat) @ unit(V).T
    return a, p_hat, x + alpha * v


def softmax(a):
    a = np.exp(a - a.max(1, keepdims=True))
    return a / a.sum(1, keepdims=True)


def kl(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(1)


# ------------------------------------------------------------------------- the layer, (1) to (5)
def test_layer_golden():
    layer = layer_of_the_spec()
    assert layer.match.scale.item() == 3 and layer.value.scale.item() == 1
    x_hat, scores = layer(grid(X))
    assert rows_of(scores) == pytest.approx(np.array(SCORES), abs=DIGITS)
    assert rows_of(x_hat) == pytest.approx(np.array(X_HAT), abs=DIGITS)
    assert rows_of(F.relu(layer.norm(scores))) == pytest.approx(np.array(P_HAT), abs=DIGITS)
    x_hat, again = layer_of_the_spec().eval()(grid(X))
    assert rows_of(x_hat) == pytest.approx(np.array(X_HAT_EVAL), abs=DIGITS)
    assert torch.equal(again, scores)


def test_the_usual_mistakes_give_other_numbers():
    """The listed wrong first x_hat: p^ not normalised; V normalised along d."""
    p, V = np.array(P_HAT[0]), np.array([[1, 0, -1, 2], [0.5, 1, 1, -0.5]])
    raw = np.array([1, 0]) + 0.5 * unit(V) @ p
    along_d = np.array([1, 0]) + 0.5 * unit(V, 0) @ unit(p)
    for wrong, listed in ((raw, (1.315371, 0.080011)), (along_d, (1.596913, 0.161511))):
        assert wrong == pytest.approx(listed, abs=DIGITS)
        assert np.abs(wrong - X_HAT[0]).max() > 5e-3


@pytest.mark.parametrize("size", [(4, 5, 3, 3, 7), (2, 3, 1, 2, 16), (3, 8, 2, 1, 4)])
def test_layer_on_random_maps(size):
    B, d, H, W, K = size
    random = np.random.default_rng(B)
    x, omega, V = random.normal(size=(B, d, H, W)), random.normal(size=(K, d)), random.normal(
        size=(d, K))
    gamma, beta, s_q, s_v, alpha = *random.normal(size=(2, K)), 2.5, 0.75, 1.25
    layer = KDLayer(d, K, alpha, s_q, s_v).double()
    with torch.no_grad():
        for parameter, value in ((layer.match.weight, omega[..., None, None]),
                                 (layer.value.weight, V[..., None, None]),
                                 (layer.norm.weight, gamma), (layer.norm.bias, beta)):
            parameter.copy_(torch.tensor(value))
    x_hat, scores = layer(torch.tensor(x))
    assert x_hat.shape == (B, d, H, W) and scores.shape == (B, K, H, W)
    flat = x.transpose(0, 2, 3, 1).reshape(-1, d)
    a, _, wanted = layer_oracle(flat, omega, s_q, gamma, beta, V, s_v, alpha)
    assert rows_of(scores) == pytest.approx(a, abs=1e-10)
    assert rows_of(x_hat) == pytest.approx(wanted, abs=1e-10)
    # Eq. (2)'s running statistics: momentum 0.1, and torch keeps the unbiased variance
    kept = 0.1 * a.mean(0), 0.9 + 0.1 * a.var(0, ddof=1)
    x_hat, _ = layer.eval()(torch.tensor(x))
    _, _, wanted = layer_oracle(flat, omega, s_q, gamma, beta, V, s_v, alpha, kept)
    assert rows_of(x_hat) == pytest.approx(wanted, abs=1e-10)


def test_dead_templates_and_alpha_zero_are_the_identity():
    x = torch.randn(2, 5, 3, 3)
    for layer in (KDLayer(5, 8), KDLayer(5, 8, alpha=0)):
        if layer.alpha:
            with torch.no_grad():
                layer.norm.weight.zero_()
                layer.norm.bias.fill_(-1)
        for mode in (True, False):
            x_hat, scores = layer.train(mode)(x)
            assert torch.equal(x_hat, x) and scores.abs().max() > 0
    zeros, _ = KDLayer(5, 8)(torch.zeros(2, 5, 1, 1))  # no 0/0
    assert torch.isfinite(zeros).all()


def test_start_and_cost_of_a_layer():
    """Eq. (17), N(0, 2/in) templates, scales 3 and 1, alpha no parameter but in the state dict."""
    d, K = 64, 512
    layer = KDLayer(d, K, alpha=0.3)
    assert sum(p.numel() for p in layer.parameters()) == 2 * d * K + 2 * K + 2
    assert layer.match.weight.std().item() == pytest.approx((2 / d) ** 0.5, rel=0.02)
    assert layer.value.weight.std().item() == pytest.approx((2 / K) ** 0.5, rel=0.02)
    assert (layer.match.scale.item(), layer.value.scale.item()) == (3, 1)
    other = KDLayer(d, K)
    other.load_state_dict(layer.state_dict())
    assert other.alpha.item() == pytest.approx(0.3) and "fired" not in layer.state_dict()
    plain, big = (letkd.build_student("resnet8x4", 10, 32, inter, penult)
                  for inter, penult in ((0, 0), (80, 256)))
    extra = [a - b for a, b in zip(letkd.cost(big, 32), letkd.cost(plain, 32))]
    width = 256
    assert extra == [2 * width * 336 + 2 * 336 + 4, 2 * width * 336 * 64]


def test_multiply_adds_by_hand():
    """resnet8x0.5 at 16x16, layer by layer; and the specification's factors for resnet56 -> 20."""
    stem, body = 27 * 8 * 256, 0
    for inputs, outputs, side, shortcut in ((8, 8, 16, 0), (8, 16, 8, 1), (16, 32, 4, 1)):
        body += (9 * inputs * outputs + 9 * outputs**2 + shortcut * inputs * outputs) * side**2
    assert letkd.cost(common.build_model("resnet8x0.5", 20, 16), 16)[1] == stem + body + 32 * 20
    plain = letkd.cost(letkd.build_student("resnet20", 100, 32), 32)
    grown = letkd.cost(letkd.build_student("resnet20", 100, 32, 800, 4096), 32)
    assert [g / p for g, p in zip(grown, plain)] == pytest.approx([3.29, 1.98], abs=0.006)
    assert (plain[0], grown[0]) == (pytest.approx(278_000, abs=600), pytest.approx(915e3, abs=600))
    assert letkd.cost(letkd.build_student("resnet20", 100, 32, 800, 4096, alpha=0), 32) == plain
    wide = [letkd.cost(letkd.build_student("wrn_16_2", 100, 32, *k), 32)
            for k in ((0, 0), (800, 4096))]
    assert [b / a for a, b in zip(*wide)] == pytest.approx([2.80, 1.79], abs=0.006)


def test_fired_remembers_an_epoch():
    layer = layer_of_the_spec()
    layer(grid(X))
    assert layer.fired.tolist() == [True] * 4
    layer.fired.zero_()
    with torch.no_grad():
        layer.norm.weight[1:3] = 0
        layer.norm.bias[1], layer.norm.bias[2] = -1, 0.5
    layer.eval()(grid(X))
    assert not layer.fired.any()  # evaluation does not count
    layer.train()(grid(X))
    assert layer.fired.tolist() == [True, False, True, True]


# ----------------------------------------------------------------- targets and loss, (7), (12)-(14)
def test_word_targets_golden():
    found = letkd.word_targets(grid(Z), torch.tensor(WORDS).double())
    assert rows_of(found) == pytest.approx(np.array(P_T), abs=DIGITS)
    found = letkd.word_targets(grid(Z), torch.tensor(WORDS).double(), tau=2.0)
    assert rows_of(found)[0] == pytest.approx([0.440399, 0.440399, 0.059601, 0.059601], abs=DIGITS)


def test_word_targets_on_random_maps_far_from_the_origin():
    random = np.random.default_rng(0)
    z, rho = random.normal(30, 3, (2, 5, 3, 3)), random.normal(30, 3, (11, 5))
    flat = z.transpose(0, 2, 3, 1).reshape(-1, 5)
    wanted = softmax(-0.1 * np.square(flat[:, None] - rho).sum(2))
    found = letkd.word_targets(torch.tensor(z), torch.tensor(rho), 0.1)
    assert rows_of(found) == pytest.approx(wanted, abs=1e-9)
    single = letkd.word_targets(torch.tensor(z).float(), torch.tensor(rho).float(), 0.1)
    assert rows_of(single) == pytest.approx(wanted, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # targets stay in float32
        again = letkd.word_targets(torch.tensor(z).float(), torch.tensor(rho).float(), 0.1)
    assert torch.equal(again, single)


def test_decision_targets_golden():
    """Picked n = 1, 0, 2, 3, inside the label's class; without labels it were 2, 0, 1, 3."""
    found = letkd.decision_targets(grid(Z), torch.tensor([0, 1]), decisions_of_the_spec())
    assert rows_of(found) == pytest.approx(np.array(TABLE)[[1, 0, 2, 3]], abs=1e-12)
    found = letkd.decision_targets(grid(Z), torch.tensor([1, 0]), decisions_of_the_spec())
    assert rows_of(found) == pytest.approx(np.array(TABLE)[[2, 2, 1, 1]], abs=1e-12)


def test_one_sub_class_per_class_is_the_label():
    """k = 1, the own centre the farthest: CODE's masked argmax would fail here."""
    one = Decisions(*(torch.tensor(part).double() for part in (
        [[1, -1]], [0.5], [[-50], [0.4]], [[0.9, 0.1], [0.2, 0.8]])), 1)
    found = letkd.decision_targets(grid(Z), torch.tensor([0, 1]), one)
    assert rows_of(found) == pytest.approx(np.array([[0.9, 0.1]] * 2 + [[0.2, 0.8]] * 2))


def test_targets_and_the_controls_teacher_get_no_gradient():
    """Whatever comes in: no graph leads to features, words, table or the teacher's logits."""
    def grad(values):
        return torch.tensor(np.asarray(values, float), requires_grad=True)
    z = grid(Z).requires_grad_()
    assert not letkd.word_targets(z, grad(WORDS)).requires_grad
    loose = decisions_of_the_spec()._replace(table=grad(TABLE))
    assert not letkd.decision_targets(z, torch.tensor([0, 1]), loose).requires_grad
    student, teacher = grad([[1, 0.5, -1]]), grad([[0, 1, 0]])
    letkd.kd_loss(student, teacher).backward()
    assert teacher.grad is None
    wanted = 4 * (softmax(student.detach().numpy() / 4) - softmax(teacher.detach().numpy() / 4))
    assert student.grad.numpy() == pytest.approx(wanted)


def test_template_loss_goldens():
    scores = grid(SCORES).requires_grad_()
    value = letkd.template_loss(scores, grid(P_T))
    value.backward()
    assert value.shape == () and value.item() == pytest.approx(1.213579, abs=DIGITS)
    assert rows_of(scores.grad)[0] == pytest.approx([0.092854, -0.082210, -0.032518, 0.021873],
                                                    abs=DIGITS)
    for labels, wanted, where in (([0, 1], 1.603321, (0.219546, 0.003922, -0.030379, -0.193090)),
                                  ([1, 0], 2.171603, None)):
        scores.grad = None
        p_T = letkd.decision_targets(grid(Z), torch.tensor(labels), decisions_of_the_spec())
        value = letkd.template_loss(scores, p_T)
        value.backward()
        assert value.item() == pytest.approx(wanted, abs=DIGITS)
        if where:
            assert rows_of(scores.grad)[3] == pytest.approx(where, abs=DIGITS)


def test_the_loss_betrays_the_mistake():
    """The listed wrong values: two divisors, KL reversed, softmax after BatchNorm."""
    p_S, p_T = softmax(np.array(SCORES)), np.array(P_T)
    right = kl(p_T, p_S).mean()
    normed = np.array(SCORES)
    normed = (normed - normed.mean(0)) / np.sqrt(normed.var(0) + 1e-5) + [0, 0.1, -0.1, 0.2]
    for wrong, listed in ((kl(p_T, p_S).sum() / 2, 2.427157), (right / 4, 0.303395),
                          (kl(p_S, p_T).mean(), 0.801349),
                          (kl(p_T, softmax(normed)).mean(), 0.555170)):
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - 1.213579) > 0.1


@pytest.mark.parametrize("size", [(1, 3, 1, 1), (4, 10, 3, 2), (2, 50, 4, 4)])
def test_template_loss_and_gradient_on_random_maps(size):
    """Eqs. (13), (14), zeros in p_T among them; the targets get no gradient."""
    random = np.random.default_rng(size[1])
    a, raw = random.normal(0, 3, size), random.normal(0, 3, size)
    p_T = np.where(raw > 0, raw, 0)
    p_T[:, 0] += 0.1
    p_T /= p_T.sum(1, keepdims=True)
    scores, targets = (torch.tensor(part, requires_grad=True) for part in (a, p_T))
    value = letkd.template_loss(scores, targets)
    value.backward()
    p_S, flat = softmax(rows_of(scores)), rows_of(targets)
    assert value.item() == pytest.approx(kl(flat, p_S).mean(), rel=1e-9)
    assert rows_of(scores.grad) == pytest.approx((p_S - flat) / len(flat), abs=1e-12)
    assert targets.grad is None
    assert letkd.template_loss(scores, scores.softmax(1)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("call, word", [
    (lambda: letkd.template_loss(torch.zeros(1, 3, 1, 1), torch.zeros(1, 4, 1, 1)), r"\(1, 3"),
    (lambda: letkd.template_loss(torch.zeros(2, 3, 1, 1), torch.zeros(1, 3, 1, 1)), r"\(2, 3"),
    (lambda: letkd.word_targets(grid(Z), torch.zeros(4, 3).double()), "3"),
    (lambda: letkd.decision_targets(grid(Z), torch.tensor([0, 2]), decisions_of_the_spec()), "1"),
    (lambda: letkd.decision_targets(grid(Z), torch.tensor([0]), decisions_of_the_spec()), "2 feat"),
    (lambda: letkd.decision_targets(torch.zeros(1, 3, 1, 1), torch.tensor([0]),
                                    decisions_of_the_spec()), "3 channels"),
    (lambda: letkd.fit_words(torch.zeros(3, 2), 4), "4 centres"),
    (lambda: letkd.fit_decisions(torch.zeros(9, 2), torch.tensor([0] * 7 + [1] * 2), 2, 3), "2"),
    (lambda: letkd.decision_targets(grid(Z), torch.tensor([0, 0]),
                                    decisions_of_the_spec()._replace(per_class=3)), "multiple"),
    (lambda: letkd.pooled(torch.zeros(1, 1, 6, 6), 4), "6x6"),
    (lambda: letkd.pooled(torch.zeros(1, 1, 8, 4), 4), "8x4"),
    (lambda: letkd.pooled(torch.zeros(1, 1, 2, 2), 4), "2x2")])
def test_wrong_shapes_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# --------------------------------------------------------------- k-means, LDA, table, (6), (8)-(11)
def test_fit_words_golden():
    rows = torch.tensor([(0, 0), (1, 0), (10, 0), (12, 0)]).float()
    for seed in range(12):
        words = letkd.fit_words(rows, 2, torch.Generator().manual_seed(seed))
        assert words.dtype == torch.float32
        assert sorted(words.tolist()) == [[0.5, 0], [11, 0]]


def k_means_oracle(rows, count, order, iterations):
    centres = rows[order[:count]].copy()

    def assign():
        d = np.square(rows[:, None] - centres).sum(2)
        return d.argmin(1), d.min(1)
    for _ in range(iterations):
        index, distance = assign()
        farthest = list(np.argsort(-distance, kind="stable"))
        empty = [e for e in range(count) if not (index == e).any()]
        centres = np.stack([rows[index == e].mean(0) if (index == e).any() else np.zeros(
            rows.shape[1]) for e in range(count)])
        for place, e in enumerate(empty):
            centres[e] = rows[farthest[place]]
    return centres, *assign()


@pytest.mark.parametrize("n, d, count", [(60, 3, 5), (200, 2, 17), (30, 4, 30)])
def test_k_means_against_a_plain_loop(n, d, count):
    rows = np.random.default_rng(n).normal(size=(n, d))
    for iterations in (1, 3, 20):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(7)).numpy()
        wanted = k_means_oracle(rows, count, order, iterations)
        found = letkd.k_means(torch.tensor(rows), count, torch.Generator().manual_seed(7),
                              iterations)
        for ours, theirs in zip(found, wanted):
            assert ours.numpy() == pytest.approx(theirs, abs=1e-9)


def test_empty_centres_take_the_farthest_rows(monkeypatch):
    """Two of four equal starts stay empty; they take the two rows farthest from their centre."""
    rows = torch.tensor([(0, 0)] * 4 + [(5, 0), (9, 0)]).double()
    order = torch.arange(6)
    monkeypatch.setattr(torch, "randperm", lambda *args, **flags: order)
    centres = letkd.k_means(rows, 3, None, 1)[0]
    assert centres.tolist() == [[pytest.approx(14 / 6), 0], [9, 0], [5, 0]]
    wanted = k_means_oracle(rows.numpy(), 3, order.numpy(), 1)[0]
    assert centres.numpy() == pytest.approx(wanted)


def test_nearest_takes_the_lowest_index_and_works_in_chunks(monkeypatch):
    rows = torch.tensor([[0.0], [2.0], [1.0]])
    index, distance = letkd.nearest(rows, torch.tensor([[1.0], [1.0], [3.0]]))
    assert index.tolist() == [0, 0, 0] and distance.tolist() == [1, 1, 0]
    rows = torch.randn(50_000, 4)
    centres = torch.randn(1000, 4)  # 16777 rows a chunk
    index, distance = letkd.nearest(rows, centres)
    far, _ = letkd.nearest(rows + 500, centres + 500)  # an offset costs few digits
    assert (far == index).double().mean() > 0.995
    d = torch.cdist(rows[::7].double(), centres.double()).square()
    assert distance[::7].numpy() == pytest.approx(d.min(1).values.numpy(), abs=1e-4)
    assert (index[::7] == d.argmin(1)).double().mean() > 0.999


FIT_Z = [(-8, 1), (-8, -1), (0, 1), (0, -1), (3, 0), (1, 1), (1, -1), (1, 0), (4, 0), (9, 1),
         (9, -1)]
FIT_Y = [0] * 5 + [1] * 6


def test_fit_decisions_golden():
    for seed in range(8):
        found = letkd.fit_decisions(torch.tensor(FIT_Z).float(), torch.tensor(FIT_Y), 2, 2,
                                    generator=torch.Generator().manual_seed(seed))
        assert found.per_class == 2 and found.table.dtype == torch.float32
        assert found.weight.numpy() == pytest.approx(np.array([[0.223586, 0]]), abs=DIGITS)
        assert found.bias.item() == pytest.approx(-0.243912, abs=DIGITS)
        centres = found.centres.flatten()
        order = torch.cat([centres[:2].argsort(), 2 + centres[2:].argsort()])
        assert centres[order].numpy() == pytest.approx(
            np.array([-2.032601, -0.020326, 0.147364, 1.768363]), abs=DIGITS)
        table = found.table[order][:, order].numpy()
        assert table == pytest.approx(np.array(
            [[1, 0, 0, 0], [0, 2 / 3, 1 / 3, 0], [0, 3 / 4, 1 / 4, 0], [0, 0, 0, 1]]), abs=1e-6)


def test_discriminant_against_the_closed_form():
    """Two classes: W is along S_w^-1 (mu_1 - mu_0). Any number: W S_w W^T = I, S_b diagonal."""
    random = np.random.default_rng(5)
    for classes, D in ((2, 6), (4, 6), (9, 5)):
        y = np.arange(300) % classes
        z = random.normal(size=(300, D)) @ random.normal(size=(D, D)) + random.normal(
            0, 2, (classes, D))[y]
        W, b = letkd.discriminant(torch.tensor(z), torch.tensor(y), classes, 60)
        W, mu = W.numpy(), np.stack([z[y == c].mean(0) for c in range(classes)])
        assert W.shape == (min(classes - 1, D), D)
        S_w = (z - mu[y]).T @ (z - mu[y]) / (300 - classes)
        assert W @ S_w @ W.T == pytest.approx(np.eye(len(W)), abs=1e-9)
        assert (z @ W.T + b.numpy()).mean(0) == pytest.approx(np.zeros(len(W)), abs=1e-9)
        size = np.bincount(y)
        S_b = (mu - z.mean(0)).T * size @ (mu - z.mean(0)) / 300
        spread = W @ S_b @ W.T
        e = np.sort(np.linalg.eigvals(np.linalg.solve(S_w, S_b)).real)[::-1][:len(W)]
        assert spread == pytest.approx(np.diag(e), abs=1e-8)  # descending
        assert all(row[np.abs(row).argmax()] > 0 for row in W)
        if classes == 2:
            axis = np.linalg.solve(S_w, mu[1] - mu[0])
            assert abs(unit(axis) @ unit(W[0])) == pytest.approx(1, abs=1e-9)


def test_discriminant_cuts_dead_channels_and_dimensions():
    z = np.random.default_rng(1).normal(size=(90, 5))
    z[:, 2] = 0
    y = torch.arange(90) % 8
    W, _ = letkd.discriminant(torch.tensor(z), y, 8, 60)
    assert W.shape == (4, 5) and torch.isfinite(W).all() and W[:, 2].abs().max() < 1e-12
    assert torch.allclose(letkd.discriminant(torch.tensor(z), y, 8, 2)[0], W[:2])


def test_decision_table_by_its_definition():
    """Clustered data; h1, q, h2 and the table from loops that look at one row at a time."""
    random = np.random.default_rng(2)
    parts = random.normal(0, 3, (6, 4))  # class 0 and 1 share part 2
    choice = {0: [0, 1, 2], 1: [2, 3, 4], 2: [5, 1, 3]}
    y = np.arange(180) % 3
    z = np.stack([parts[choice[c][random.integers(3)]] for c in y])
    z = z + random.normal(0, 0.5, (180, 4))
    found = letkd.fit_decisions(torch.tensor(z), torch.tensor(y), 3, 3,
                                generator=torch.Generator().manual_seed(4))
    g = z @ found.weight.numpy().T + found.bias.numpy()
    c = found.centres.numpy()
    h1 = np.array([3 * label + np.square(row - c[3 * label:3 * label + 3]).sum(1).argmin()
                   for row, label in zip(g, y)])
    assert c == pytest.approx(np.stack([g[h1 == n].mean(0) for n in range(9)]), abs=1e-6)
    q = np.stack([g[h1 == n].mean(0) for n in range(9)])
    table = np.zeros((9, 9))
    for row, n in zip(g, h1):
        table[n, np.square(row - q).sum(1).argmin()] += 1
    table /= table.sum(1, keepdims=True)
    assert found.table.numpy() == pytest.approx(table, abs=1e-9)
    assert found.table.sum(1).numpy() == pytest.approx(np.ones(9))
    off = [table[3 * a:3 * a + 3, 3 * b:3 * b + 3].sum() for a, b in ((0, 1), (1, 0))]
    assert min(off) > 0.3  # the shared part is confused
    maps = torch.tensor(z).view(180, 4, 1, 1)
    assert rows_of(letkd.decision_targets(maps, torch.tensor(y), found)) == pytest.approx(table[h1])


def centres_by_hand(left, right, W, b):
    """In place of k_means: the centres of class 0 (on the left) and of class 1, given in z."""
    def k_means(g, k, generator):
        places = torch.tensor(left if g.mean() < 0 else right).double()
        centres = places[:, None] * W[0, 0] + b
        return centres, *letkd.nearest(g, centres)
    return k_means


def test_an_empty_sub_class_keeps_its_place(monkeypatch):
    """C k rows stay. Centres given by hand: class 0's third has no row of its own class, but lies
    among those of class 1: q_n = c_n takes some of them; its own row is one-hot. The first one's
    q_n is the mean of its rows, not the centre that k-means left off it."""
    z = torch.tensor([-3.0, -2, -1, 0, 5, 6, 8, 9, 10])
    z = torch.stack([z, torch.zeros(9)], 1)
    W, b = letkd.discriminant(z, torch.tensor([0] * 4 + [1] * 5), 2, 1)

    monkeypatch.setattr(letkd, "k_means", centres_by_hand([-6, -0.5, 6], [5.5, 9, 30], W, b))
    found = letkd.fit_decisions(z, torch.tensor([0] * 4 + [1] * 5), 2, 3)
    # rows of class 0: -3 -> first, the others -> second; q = -3, -1 (empty: 6), 5.5, 9 (empty: 30)
    wanted = np.zeros((6, 6))
    wanted[0, 0], wanted[1, 1], wanted[2, 2] = 1, 1, 1
    wanted[3, 2], wanted[3, 3] = 0.5, 0.5  # 6 is nearer to the empty 6 than to 5.5
    wanted[4, 4], wanted[5, 5] = 1, 1
    assert found.table.numpy() == pytest.approx(wanted)
    found = letkd.fit_decisions(z[:, :1].expand(9, 2), torch.tensor([0] * 4 + [1] * 5), 2, 3)
    assert torch.isfinite(found.table).all()  # two equal channels


def test_prototypes_are_means_and_not_the_centres(monkeypatch):
    """Where k-means has not converged, h2 goes by q_n, the mean, and not by the centre."""
    z = torch.tensor([-2.5, -1.8, 1, 5, 6, 7, 8])
    z, y = torch.stack([z, torch.zeros(7)], 1), torch.tensor([0] * 3 + [1] * 4)
    W, b = letkd.discriminant(z, y, 2, 1)

    monkeypatch.setattr(letkd, "k_means", centres_by_hand([-3.4, -0.5], [5.5, 7.5], W, b))
    found = letkd.fit_decisions(z, y, 2, 2)
    # h1 of -1.8 is the second; q = -2.5, (-1.8 + 1) / 2 = -0.4; its h2 is the first
    assert found.table[:2].flatten().tolist() == pytest.approx([1, 0, 0, 0, 0.5, 0.5, 0, 0])


# ------------------------------------------------------------------------------ student and routing
def test_taps_split_every_network():
    """Nothing is lost between the two parts; plain students, and those of alpha 0, are the network
    of the same seed."""
    for name, size in (("resnet14", 16), ("wrn_16_2", 16), ("vgg8", 32), ("mobilenetv2", 32)):
        network, x = common.build_model(name, 10, size).eval(), torch.randn(2, 3, size, size)
        with torch.no_grad():
            u, logits = letkd.up_to_tap(network, x), network(x)
            assert torch.equal(network.forward_head(letkd.after_tap(network, u)), logits)
            assert torch.equal(letkd.build_student(name, 10, size).eval()(x), logits)
            student = letkd.build_student(name, 10, size, 20, 30, alpha=0).eval()
            assert torch.equal(student(x), logits)
        widths = [channels for channels, _ in letkd.map_shapes(network, size)]
        assert widths[0] == u.shape[1]
        for layer, templates, width in zip((student.inter, student.penult), (20, 30), widths):
            assert layer.match.weight.shape[:2] == (templates, width)
    assert letkd.map_shapes(common.build_model("resnet20", 10, 32), 32) == [(64, 8)] * 2
    two = common.build_model("resnet20", 10, 32).eval()
    x = torch.randn(1, 3, 32, 32)
    first = two.stages[2][0](two.stages[1](two.stages[0](two.stem(x))))
    assert torch.equal(letkd.up_to_tap(two, x), first)


def test_pooled():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert letkd.pooled(maps, 4) is maps
    assert letkd.pooled(maps, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def tiny_setup(layers=2, alpha=1.0, name="resnet14", size=16):
    """Student, frozen teacher, targets, a batch."""
    images, labels, _ = common.make_shapes(24, size, 0)
    images = images.float() / 255 - 0.4
    teacher = common.frozen(common.build_model("resnet14", 20, size, 9))
    with torch.no_grad():
        z = letkd.up_to_tap(teacher, images)
        rows = [maps.movedim(1, 3).flatten(0, 2) for maps in (z, letkd.after_tap(teacher, z))]
    generator = torch.Generator().manual_seed(0)
    labels = labels % 4
    decisions = letkd.fit_decisions(rows[0], labels.repeat_interleave(len(rows[0]) // 24), 4, 3,
                                    generator=generator)
    targets = letkd.Targets(letkd.fit_words(rows[1], 10, generator), decisions)
    student = letkd.build_student(name, 4, size, 12 if layers == 2 else 0, 10 if layers else 0,
                                  alpha)
    return student, teacher, targets, images, labels


def flags(supervision="teacher"):
    return Namespace(supervision=supervision, precision="fp32", device=torch.device("cpu"))


def still(network):
    return torch.optim.SGD(network.parameters(), 0.0)


def reached(student):
    """The parts whose parameters all have a gradient that is not zero; others have none at all."""
    parts = {"before": [student.stem, *student.stages[:-1], student.stages[-1][0]],
             "after": list(student.stages[-1][1:]), "head": [student.head],
             "i_match": [student.inter.match], "i_value": [student.inter.norm, student.inter.value],
             "p_match": [student.penult.match],
             "p_value": [student.penult.norm, student.penult.value]}
    found = set()
    for name, modules in parts.items():
        gradients = [p.grad for module in modules for p in module.parameters()]
        alive = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
        assert all(alive) or not any(alive), name
        found |= {name} if all(alive) else set()
    return found


INNER = {"before", "i_match"}
ALL = {"before", "after", "head", "i_match", "i_value", "p_match", "p_value"}


@pytest.mark.parametrize("loss, alpha, wanted", [
    ("inter", 1, INNER), ("penult", 1, INNER | {"i_value", "after", "p_match"}), ("ce", 1, ALL),
    ("inter", 0, INNER), ("penult", 0, {"before", "after", "p_match"}),
    ("ce", 0, {"before", "after", "head"})])
def test_gradient_routing(loss, alpha, wanted, monkeypatch):
    """The routing table of section 4, row by row; CE reaches scores only through x_hat."""
    student, teacher, targets, images, labels = tiny_setup(alpha=alpha)
    student.penult.alpha.fill_(alpha)
    values = {}

    def only(value, name):
        values[name] = value
        return value if name == loss else value.detach() * 0
    ce, template = F.cross_entropy, letkd.template_loss
    names = iter(["penult", "inter"])
    monkeypatch.setattr(letkd.F, "cross_entropy", lambda *args: only(ce(*args), "ce"))
    monkeypatch.setattr(letkd, "template_loss", lambda *args: only(template(*args), next(names)))
    letkd.train_step(student, teacher, targets, still(student), images, labels, flags())
    if alpha == 0 and loss == "ce":  # CE reaches "everything but BN, V, s_v", templates included
        wanted = {"before", "after", "head"}  # through the identity alone: x_hat = x
    assert reached(student) == wanted and len(values) == 3


@pytest.mark.parametrize("layers, terms, name, size", [
    (1, {"ce", "penult"}, "resnet14", 16), (2, {"ce", "penult", "inter"}, "resnet14", 16),
    (2, {"ce", "penult", "inter"}, "vgg8", 32)])  # the teacher's maps are twice as large
def test_a_step_against_autograd_by_hand(layers, terms, name, size):
    """Values of the terms, and every gradient of (15) and (16), written out with other calls."""
    student, teacher, targets, images, labels = tiny_setup(layers, 1.0, name, size)
    twin = copy.deepcopy(student)
    found, logits = letkd.train_step(student, teacher, targets, still(student), images, labels,
                                     flags())
    assert found.keys() == terms
    with torch.no_grad():
        z = letkd.up_to_tap(teacher, images)
        z, z_penult = (maps.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5))
                       for maps in (z, letkd.after_tap(teacher, z)))  # (24,64,4,4)
        p_words = letkd.word_targets(z_penult, targets.words)
        p_inter = letkd.decision_targets(z, labels, targets.decisions)
    u = letkd.up_to_tap(twin, images)
    loss = 0
    if layers == 2:
        u, a = twin.inter(u)
        loss = -(p_inter * a.log_softmax(1)).sum() / (24 * 16)
    u, a = twin.penult(letkd.after_tap(twin, u))
    loss = loss - (p_words * a.log_softmax(1)).sum() / (24 * 16)
    (loss + F.cross_entropy(twin.head(u.mean((2, 3))), labels)).backward()
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert found["penult"].item() == pytest.approx(
        kl(rows_of(p_words), softmax(rows_of(a).astype(float))).mean(), rel=1e-4)


def test_teacher_and_targets_never_move():
    student, teacher, targets, images, labels = tiny_setup()
    before = [copy.deepcopy(teacher.state_dict()), copy.deepcopy(targets)]
    start = copy.deepcopy(student.state_dict())
    for _ in range(2):
        letkd.train_step(student, teacher, targets, torch.optim.SGD(student.parameters(), 0.1),
                         images, labels, flags())
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(),
                                                 before[0].values()))
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert torch.equal(targets.words, before[1].words)
    assert all(torch.equal(a, b) for a, b in zip(targets.decisions[:4], before[1].decisions[:4]))
    assert not any(part.requires_grad for part in (targets.words, *targets.decisions[:4]))
    assert not any(torch.equal(start[name], value) for name, value in student.state_dict().items()
                   if value.is_floating_point() and "alpha" not in name)


@pytest.mark.parametrize("supervision", ["none", "logits"])
@pytest.mark.parametrize("layers", [0, 2])
def test_control_steps_against_autograd_by_hand(supervision, layers):
    """CE alone, or with T^2 KL to the teacher's logits, T = 4; the templates have no loss."""
    student, teacher, _, images, labels = tiny_setup(layers)
    with torch.no_grad():
        z_t = teacher(images)[:, :4]
    teacher.forward_head = lambda maps: z_t
    twin = copy.deepcopy(student)
    found, logits = letkd.control_step(student, teacher if supervision == "logits" else None,
                                       still(student), images, labels, flags(supervision))
    z_s = twin(images)
    loss = -z_s.log_softmax(1)[torch.arange(24), labels].mean()
    assert torch.equal(logits, z_s) and found["ce"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.keys() == ({"ce", "kl"} if supervision == "logits" else {"ce"})
    if supervision == "logits":
        p_t, p_s = (softmax(z.detach().double().numpy() / 4) for z in (z_t, z_s))
        assert found["kl"].item() == pytest.approx(16 * kl(p_t, p_s).mean(), rel=1e-3)
        loss = loss - 16 * (F.softmax(z_t / 4, 1) * F.log_softmax(z_s / 4, 1)).sum(1).mean()
    loss.backward()
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training


def test_learning_rates():
    exponents = [round(float(np.log10(0.05 / rate))) for rate in letkd.learning_rates(0.05, 240)]
    assert exponents == [0] * 150 + [1] * 30 + [2] * 30 + [3] * 30
    imagenet = letkd.parse_args("--dataset imagenet --device cpu --learning-rate 1".split())
    exponents = [round(float(-np.log10(rate))) for rate in letkd.rates_of(imagenet)]
    assert exponents == [0] * 30 + [1] * 30 + [2] * 30 + [3] * 10
    for name in ("cifar100", "shapes"):
        found = letkd.parse_args(f"--dataset {name} --device cpu --epochs 16".split())
        lr = found.learning_rate
        wanted = [lr] * 10 + [lr / 10] * 2 + [lr / 100] * 2 + [lr / 1000] * 2
        assert letkd.rates_of(found) == pytest.approx(wanted)


def test_the_paper_scale_defaults():
    found = letkd.parse_args("--dataset cifar100 --device cpu".split())
    assert (found.teacher, found.student, found.words, found.per_class, found.dimensions,
            found.epochs, found.batch_size, found.learning_rate, found.weight_decay,
            found.momentum, found.layers, found.alpha, found.supervision) == (
        "resnet56", "resnet20", 4096, 8, 60, 240, 64, 0.05, 5e-4, 0.9, 2, 1, "teacher")
    optimizer = common.sgd(nn.Linear(2, 2).parameters(), found)
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize("typed, word", [
    ("--layers 3", "--layers"), ("--alpha -1", "--alpha"), ("--supervision both", "--supervision"),
    ("--words 1", "--words"), ("--per-class 0", "--per-class"), ("--dimensions 0", "--dimensions"),
    ("--rows 0", "--rows"), ("--teacher-weights a b", "--teacher-weights"),
    ("--student nonsense", "nonsense"), ("--alpha x", "--alpha"),
    ("--alpha 0 --supervision none", "student alone"),
    ("--supervision logits --layers 1", "--layers"), ("--supervision logits --alpha 0", "--alpha")])
def test_argument_errors_are_one_line(typed, word, capsys):
    assert word in refused("letkd", typed, capsys)


@pytest.mark.parametrize("command", readme_commands("letkd"))
def test_documented_commands_parse(command):
    letkd.parse_args(command.split())


def test_layers_start_from_the_seed():
    a, b, c = (letkd.build_student("resnet8", 10, 16, 5, 6, seed=seed) for seed in (1, 1, 2))
    assert same(a.state_dict(), b.state_dict())
    assert not torch.equal(a.penult.match.weight, c.penult.match.weight)
    assert isinstance(a.inter.match, CosineConv1x1)


# ------------------------------------------------------------------------------------------ runs
TINY = "--words 12 --per-class 2 --rows 1500 "


@pytest.fixture(scope="module")
def play(run):
    """play(folder, flags): a tiny run of two epochs; what it printed."""
    return lambda folder, typed="": run("letkd", folder, TINY + typed)


def parsed(typed):
    """The arguments of the run of the first seed."""
    return next(common.each_seed(letkd.parse_args(
        f"--device cpu --teacher resnet8 --student resnet8x0.5 {typed}".split())))


@pytest.fixture(scope="module")
def whole(play, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Namespace(folder=folder, printed=play(folder, "--compare"))


def loaded(folder, **templates):
    """As a reader of the documentation loads a student."""
    student = letkd.build_student("resnet8x0.5", classes=20, image_size=16,
                                  **{"inter": 40, "penult": 12, **templates})
    student.load_state_dict(weights(folder / "student.pt"))
    return student.eval()


def test_every_control_and_its_capacity(whole):
    """Names in order; the flags of each; parameters and multiply-adds by eq. (17)."""
    found = table(whole.printed)
    assert list(found) == ["teacher", "student alone", "letKD-2", *list(letkd.CONTROLS)[:4]]
    flags_of = {name: result_of(whole.folder / name)["arguments"] for name in (
        ".", "kd", "unsupervised-layers", "auxiliary-heads", "letKD-1")}
    assert [[one["supervision"], one["layers"], one["alpha"]] for one in flags_of.values()] == [
        ["teacher", 2, 1], ["logits", 2, 1], ["none", 2, 1], ["teacher", 2, 0], ["teacher", 1, 1]]
    plain = letkd.cost(common.build_model("resnet8x0.5", 20, 16), 16)
    extra = {"letKD-2": 52, "unsupervised layers": 52, "letKD-1": 12}  # templates
    for name, row in list(found.items())[1:]:
        K = extra.get(name, 0)
        size, adds = (int(row[column].replace(",", "")) for column in ("params", "madds"))
        assert size == plain[0] + 2 * 32 * K + 2 * K + 2 * (K > 0) + 2 * (K == 52)
        assert adds == plain[1] + 2 * 32 * K * 16
    assert found["unsupervised layers"]["agree"] == found["kd"]["fire_p"] == "-"
    assert found["letKD-1"]["probe_x_hat"] == found["letKD-1"]["entropy"] == "-"
    heads = found["auxiliary heads"]
    assert heads["probe_x"] == heads["probe_x_hat"] and heads["agree"] != "-"


def test_the_log_of_an_epoch(whole):
    before, after = ["epoch", "lr", "ce"], ["train", "img/s", "s", "test"]
    inter, penult = ([f"s_q_{letter}", f"s_v_{letter}", f"fire_{letter}"] for letter in "ip")
    for folder, columns in (
            (".", [*before, "penult", "inter", *after, *inter, *penult]),
            ("kd", [*before, "kl", *after]), ("letKD-1", [*before, "penult", *after, *penult]),
            ("unsupervised-layers", [*before, *after, *inter, *penult])):
        rows = result_of(whole.folder / folder)["rows"]
        assert [list(row) for row in rows] == [columns] * 2
    for letter, layer in loaded(whole.folder).layers().items():
        last = {key: float(value) for key, value in log(whole.folder)[-1].items()}
        assert (last[f"s_q_{letter}"], last[f"s_v_{letter}"]) == (
            layer.match.scale.item(), layer.value.scale.item())
        assert 0.5 < last[f"fire_{letter}"] <= 1


def test_firing_is_counted_in_each_epoch_anew(play, tmp_path, monkeypatch):
    """From the second epoch on, no template of `inter` can fire."""
    steps, original = [], letkd.train_step

    def silenced(student, *rest):
        steps.append(0)
        if len(steps) > 6:
            student.inter.norm.weight.data.zero_()
            student.inter.norm.bias.data.fill_(-1)
        return original(student, *rest)
    monkeypatch.setattr(letkd, "train_step", silenced)
    play(tmp_path)
    first, second = result_of(tmp_path)["rows"]
    assert first["fire_i"] > 0.5 and second["fire_i"] == 0 and second["fire_p"] > 0.5


@pytest.mark.parametrize("typed, taught", [
    ("--supervision none", 0), ("--supervision logits", 520), ("--layers 1", 520)])
def test_reported_passes_are_those_made(play, tmp_path, monkeypatch, typed, taught):
    """Images that enter the student and the teacher in the steps: two epochs of 260."""
    seen = {"student": 0, "teacher": 0}

    def counting(step):
        def counted(student, teacher, *rest):
            def count(module, inputs, _):
                for name, network in (("student", student), ("teacher", teacher)):
                    if network is not None and module is network.stem:
                        seen[name] += len(inputs[0])
            hook = nn.modules.module.register_module_forward_hook(count)
            found = step(student, teacher, *rest)
            hook.remove()
            return found
        return counted
    for name in ("train_step", "control_step"):
        monkeypatch.setattr(letkd, name, counting(getattr(letkd, name)))
    play(tmp_path, typed)
    assert seen == {"student": 520, "teacher": taught}
    wanted = {"student forward and backward": 520, "teacher forward": taught}
    assert result_of(tmp_path)["images"] == {key: value for key, value in wanted.items() if value}


def test_the_student_runs_alone(whole, monkeypatch):
    """student.pt, without teacher, words and tables; labels do not matter."""
    student, data = loaded(whole.folder), shapes_data()
    for name in ("word_targets", "decision_targets", "template_loss", "prepare"):
        monkeypatch.setattr(letkd, name, forbidden)
    with torch.no_grad():
        logits = student(data.test.normalise(data.test.images))
        right = (logits.argmax(1) == data.test.labels).double().mean().item()
        data.test.labels = data.test.labels.flip(0)
        again = torch.cat([student(images) for images, _ in data.test.batches(100)])
    assert 100 * right == pytest.approx(result_of(whole.folder)["last_test"])
    assert torch.equal(logits, again)


def test_measures_by_hand(whole, run):
    """Agreement, softness, entropy and both probes from the saved student, in numpy."""
    student, data = loaded(whole.folder), shapes_data()
    arguments = parsed(f"--epochs 2 --batch-size 50 --cache {run.cache} {TINY}")
    assert [result_of(place)["arguments"]["seed"] for place in run.cache.glob(
        "shapes-resnet8-2-*")] == [1000]
    teacher, _ = letkd.networks_alone(data, arguments)["teacher"]
    words, decisions = letkd.prepare(teacher, data, arguments)
    assert decisions.table.shape == (40, 40) and decisions.per_class == 2
    found = result_of(whole.folder)["measures"]
    with torch.no_grad():
        images = data.test.normalise(data.test.images)
        z = letkd.after_tap(teacher, letkd.up_to_tap(teacher, images))
        z = z.movedim(1, 3).flatten(0, 2).double().numpy()
        a = student.forward_scores(images)[2].movedim(1, 3).flatten(0, 2)
        p_T = softmax(-np.square(z[:, None] - words.double().numpy()).sum(2))
        assert found["agree"] == pytest.approx(
            100 * (p_T.argmax(1) == a.argmax(1).numpy()).mean(), abs=0.2)
        assert found["p_max"] == pytest.approx(p_T.max(1).mean(), rel=1e-3)
        s_T = decisions.table.double().numpy()
        assert found["entropy"] == pytest.approx(
            -(s_T * np.log(np.where(s_T > 0, s_T, 1))).sum(1).mean(), rel=1e-5)
        vectors = []
        for part in (data.train, data.test):
            u = letkd.up_to_tap(student, part.normalise(part.images))
            vectors.append([maps.mean((2, 3)).double().numpy() for maps in (
                u, student.inter(u)[0])])
    for index, key in enumerate(("probe_x", "probe_x_hat")):
        X, y, T = vectors[0][index], data.train.labels.numpy(), vectors[1][index]
        mu = np.stack([X[y == c].mean(0) for c in range(20)])
        S = np.linalg.pinv((X - mu[y]).T @ (X - mu[y]) / (len(X) - 20), rcond=1e-6, hermitian=True)
        # the linear discriminant functions, equal priors
        score = T @ S @ mu.T - 0.5 * np.einsum("cd,de,ce->c", mu, S, mu)
        right = 100 * (score.argmax(1) == data.test.labels.numpy()).mean()
        assert found[key] == pytest.approx(right, abs=1.01)  # of 100 images, one may lie between


def test_compile_takes_what_the_steps_call(play, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda part: compiled.append(part.__name__) or part)
    play(tmp_path, "--supervision none --epochs 1 --compile")
    assert compiled == ["forward_features", "forward_scores"]  # the student alone; this one


def test_a_stopped_run_goes_on_bit_for_bit(whole, play, tmp_path, monkeypatch):
    """In the second epoch of letKD-2, then in the second epoch of a control."""
    for function, call in (("train_step", 6 + 2), ("control_step", 6 + 2)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, letkd, function, call)
            play(tmp_path, "--compare --resume")
    assert not (tmp_path / "letKD-1").exists()
    printed = play(tmp_path, "--compare --resume")
    folders = [".", "kd", "unsupervised-layers", "auxiliary-heads", "letKD-1"]
    assert all(same_run(tmp_path / name, whole.folder / name) for name in folders)

    def untimed(printed):
        return {name: {key: value for key, value in row.items() if key != "seconds"}
                for name, row in table(printed).items()}
    assert untimed(printed) == untimed(whole.printed)


@pytest.mark.parametrize("typed, chosen, layers, alpha", [
    ("--alpha 0 --layers 1", "auxiliary heads", "p", 1),
    ("--alpha 0.5", "letKD-2, alpha 0.5", "ip", 0.5),
    ("--supervision none", "unsupervised layers", "ip", 1),
    ("--supervision logits", "kd", "ip", 1)])
def test_controls_of_other_choices(tmp_path, typed, chosen, layers, alpha):
    """What would be run, without running it: layers and alpha of each; nothing is run twice."""
    arguments, data, kinds = parsed(f"--compare --out {tmp_path} {typed}"), shapes_data(), {}
    for name, typed_flags, _ in common.planned_runs(arguments, data, letkd.name_of(arguments),
                                                    letkd.CONTROLS):
        found = letkd.new_student(data, typed_flags).layers()
        kinds[name] = "".join(found), *{layer.alpha.item() for layer in found.values()}
    assert list(kinds) == [chosen, *(name for name in letkd.CONTROLS if name != chosen)]
    wanted = {"kd": ("",), "unsupervised layers": (layers, alpha), "auxiliary heads": (layers, 0),
              "letKD-1": ("p", 1), "letKD-2": ("ip", 1), "letKD-2, alpha 0.5": ("ip", 0.5)}
    assert kinds == {name: wanted[name] for name in kinds}


def test_no_teacher_is_run_without_supervision(play, tmp_path, monkeypatch):
    """And the optimizer takes the rates of eq. (lr): a tenth in the third of three epochs."""
    trained, original, rates, step = [], letkd.train_network, [], letkd.control_step
    monkeypatch.setattr(letkd, "train_network", lambda name, *rest, **settings: trained.append(
        name) or original(name, *rest, **settings))
    monkeypatch.setattr(letkd, "control_step", lambda student, teacher, optimizer, *rest:
                        rates.append(optimizer.param_groups[0]["lr"])
                        or step(student, teacher, optimizer, *rest))
    monkeypatch.setattr(letkd, "prepare", forbidden)
    found = table(play(tmp_path, "--supervision none --layers 1 --epochs 3"))
    assert list(found) == ["student alone", "unsupervised layers"] and trained == ["resnet8x0.5"]
    assert same(weights(tmp_path / "student.pt"), loaded(tmp_path, inter=0).state_dict())
    assert rates == pytest.approx([0.1] * 12 + [0.01] * 6)


def test_targets_are_cached_and_belong_to_their_teacher(tmp_path, monkeypatch):
    """One file for each teacher and each flag that changes them, and for no other flag."""
    data, fitted, files = shapes_data(), {}, 0
    teacher, other = (common.frozen(common.build_model("resnet8", 20, 16, seed)) for seed in (1, 2))
    for network, typed in ((teacher, ""), (other, ""), (teacher, "--words 13"),
                           (teacher, "--rows 600"), (teacher, "--per-class 1"),
                           (teacher, "--dimensions 3"), (teacher, "--seed 1")):
        fitted[network, typed] = letkd.prepare(network, data, parsed(
            f"--cache {tmp_path} {TINY} {typed}"))
        files += 1
        assert len([*tmp_path.glob("shapes-resnet8-targets-*.pt")]) == files
    seed = torch.Generator().manual_seed
    inter, penult, labels = letkd.teacher_features(teacher, data, [4, 4], parsed(TINY + "--seed 1"))
    words, decisions = fitted[teacher, "--seed 1"]
    assert torch.equal(words, letkd.fit_words(penult, 12, seed(1)))
    wanted = letkd.fit_decisions(inter, labels, 20, 2, 60, seed(1))
    assert all(torch.equal(a, b) for a, b in zip(decisions[:4], wanted[:4]))
    assert fitted[teacher, "--words 13"].words.shape == (13, 64)
    assert fitted[teacher, "--dimensions 3"].decisions.weight.shape == (3, 64)
    monkeypatch.setattr(letkd, "teacher_features", forbidden)
    for (network, typed), found in fitted.items():
        again = letkd.prepare(network, data, parsed(
            f"--cache {tmp_path} {TINY} {typed} --alpha 0.5 --layers 1 --learning-rate 3"))
        assert torch.equal(again.words, found.words)
        assert all(torch.equal(a, b) for a, b in zip(again.decisions[:4], found.decisions[:4]))
        assert again.decisions.per_class == found.decisions.per_class


def test_features_are_the_teachers_own():
    """Every row is a location of its image, with its label; equally many an image."""
    data = shapes_data()
    teacher = common.frozen(common.build_model("resnet8", 20, 16, 1))
    args = Namespace(**vars(flags()), seed=0, rows=1500)
    inter, penult, labels = letkd.teacher_features(teacher, data, [4, 4], args)
    assert len(inter) == len(penult) == len(labels) == 260 * 5
    with torch.no_grad():
        z = letkd.up_to_tap(teacher, data.train.normalise(data.train.images))
    for maps, rows in ((z, inter), (letkd.after_tap(teacher, z), penult)):
        places = maps.detach().movedim(1, 3).flatten(1, 2)  # (N,16,D)
        for n in (0, 7, 259):
            own = rows[5 * n:5 * n + 5]
            gap = (own[:, None] - places[n]).abs().amax(2)  # (5,16)
            assert gap.min(1).values.max() < 1e-4 and len(set(gap.argmin(1).tolist())) == 5
            assert set(labels[5 * n:5 * n + 5].tolist()) == {int(data.train.labels[n])}
    args.rows = 100  # fewer than images: some images, one location each
    assert len(letkd.teacher_features(teacher, data, [4, 4], args)[0]) == 100
    args.rows = 10**6
    every = letkd.teacher_features(teacher, data, [2, 2], args)[0]
    assert every.shape == (260 * 4, 64)
    wanted = F.avg_pool2d(z[:1], 2).movedim(1, 3).flatten(0, 2)
    assert sorted(every[:4].sum(1).tolist()) == pytest.approx(sorted(wanted.sum(1).tolist()),
                                                              rel=1e-4)


@pytest.mark.parametrize("typed, word", [
    ("--words 5000", "--words 5000"), ("--per-class 200", "--per-class 200"),
    ("--rows 30 --words 12", "--per-class 2"), ("--words 31 --rows 30 --per-class 1", "only 30"),
    ("--teacher vgg8 --image-size 16", "divide"),
    ("--teacher-weights missing.pt", "missing.pt")])
def test_what_does_not_fit_is_refused_before_any_training(play, tmp_path, monkeypatch, typed, word):
    monkeypatch.setattr(letkd, "train_network", forbidden)
    with pytest.raises(common.InputError, match=word):
        play(tmp_path / "out", typed)
    assert not [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.json")]


def test_open_set_teacher_weights_and_seeds(play, tmp_path):
    teacher = common.build_model("resnet8", 16, 16, 4)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    found = table(play(tmp_path / "out", f"--epochs 1 --open-set 4 --seed 0 1 --teacher-weights "
                                         f"{tmp_path / 'teacher.pt'}"))
    assert "±" in found["letKD-2"]["rank1"] and "±" in found["letKD-2"]["verification"]
    assert found["teacher"]["epochs"] == found["teacher"]["seconds"] == "-"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"seed-0", "seed-1"}


def test_pictures(whole, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs")
    figures = importlib.import_module("figures")
    figures.main(whole.folder)
    figures.main(whole.folder / "unsupervised-layers")
    names = {"layers.png", "subclasses.png"}
    assert {path.name for path in whole.folder.glob("*.png")} == names
    assert not (whole.folder / "unsupervised-layers" / "subclasses.png").exists()
    drawn = figures.letkd(whole.folder, result_of(whole.folder))
    terms, _, fire = drawn["layers.png"].axes
    rows = log(whole.folder)
    for line, name in zip(terms.lines, ("ce", "penult", "inter"), strict=True):
        assert line.get_ydata() == pytest.approx([float(row[name]) for row in rows])
    assert [line.get_label() for line in fire.lines] == ["fire, inter", "fire, penult"]
    image, places, bars = drawn["subclasses.png"].axes[:3]
    label, k = int(image.get_title().split()[-1]), 2
    assert label == int(shapes_data().test.labels[0])
    shown = places.images[0].get_array()
    assert shown.shape == (4, 4) and shown.min() >= 0 and shown.max() < k
    assert len(bars.containers) == len(np.unique(shown))
    for container in bars.containers:  # a row of s_T each
        assert sum(bar.get_height() for bar in container) == pytest.approx(1, abs=1e-5)


def test_the_student_learns_the_shapes_and_the_words(tmp_path, play, monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 500)
    play(tmp_path, "--epochs 5 --batch-size 20")
    result = result_of(tmp_path)
    assert result["last_test"] > 25
    assert result["measures"]["agree"] > 3 * 100 / 12
    rows = result["rows"]
    assert rows[-1]["penult"] < 0.7 * rows[0]["penult"] and rows[-1]["inter"] < rows[0]["inter"]
