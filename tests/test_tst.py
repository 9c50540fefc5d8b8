"""TST against its specification: numpy oracles written from the equations; goldens typed from the
specification, beside what the usual mistakes would give; what each stage freezes; tiny runs."""

import copy
import itertools
import math
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    altered, forbidden, log, refused, result_of, same, shapes_data, stopped, table, weights)
from torch.nn import functional as F

import common
import tst

T, S, Y = [[2, 0.5, -1], [0.3, -0.2, 1.5]], [[1, 0.8, -0.5], [0.9, 0.1, -0.3]], torch.tensor([0, 2])
STATS = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


def near(values, digits=1e-6):  # the goldens have six decimals
    return pytest.approx(np.asarray(values, float), abs=digits)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_p(z, tau=1.0):
    z = np.asarray(z, float) / tau
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(t, s, tau):
    return (np.exp(log_p(t, tau)) * (log_p(t, tau) - log_p(s, tau))).sum(1).mean()


def random_bytes(*shape, low=0):
    v = np.random.default_rng(0).integers(low, 256, shape)
    return v, torch.tensor(v, dtype=torch.uint8)


def plain_augmenter(**flags):
    encoders = [tst.ColorEncoder() if i < 6 else tst.GeometricEncoder() for i in range(11)]
    return tst.Augmenter(encoders, *STATS, **flags)


# ---------------------------------------------------------------- gates and encoders, (1) to (9)
def test_the_25_numbers_and_their_gates(monkeypatch):
    """Gates: values at two temperatures, slopes by the logit, u clamped to 1e-6, and the rate."""
    augmenter = plain_augmenter()
    assert {name: p.tolist() for name, p in augmenter.named_parameters() if p.requires_grad} == {
        "theta_m": [0.0] * 11, "theta_p": [0.0] * 14}
    augmenter.theta_m.data[3], augmenter.theta_p.data[13] = 2.0, -1.0
    assert augmenter.magnitudes().tolist() == near([0.5] * 3 + [0.880797] + [0.5] * 7)
    assert augmenter.probabilities().tolist() == near([0.5] * 13 + [0.268941])
    def gates(u, logits, temperature):
        monkeypatch.setattr(torch, "rand", lambda *_, **__: tensor(u))
        return tst.relaxed_bernoulli(logits, temperature)
    u, logits = [0.5, 0.5, 0.51, 0.48, 0.3], tensor([0, 0.05, -0.02, 0.1, 0.8], True)
    found = gates(u, logits, 0.05)
    found.sum().backward()
    assert found.tolist() == near([0.5, 0.731059, 0.598713, 0.598482, 0.279699])
    assert logits.grad.tolist() == near([5, 3.932239, 4.805114, 4.806024, 4.029346], 5e-6)
    assert gates(u, logits, 1.0).tolist() == near([0.5, 0.512497, 0.505001, 0.504989, 0.488178])
    assert gates([0, 1], tensor([0, 0]), 1.0).tolist() == near([1e-6, 1 - 1e-6], 1e-12)
    even = (np.arange(10_000) + 0.5) / 10_000
    for logit, rate in ((0, 0.5), (0.5, 0.6225), (-1, 0.2689)):
        assert (gates(even, tensor(logit), 0.05) > 0.5).double().mean() == near(rate, 1e-4)


def test_composition_golden(monkeypatch):
    """x = .2, T_a = .8, T_b = -.4, g = (.75, .5): .35; chained it were .125. Gates 1 and 0."""
    augmenter, x = plain_augmenter(operations=2), torch.full((1, 3, 2, 2), 0.2)
    def transform(i, images, magnitude, _):
        assert images is x and (magnitude is None) == (i == 11)
        return torch.full_like(x, {10: 0.8, 11: -0.4}[i])
    augmenter.transform = transform
    monkeypatch.setattr(torch, "randperm", lambda count, **__: torch.arange(count).roll(4))
    for g_a, g_b, wanted in ((0.75, 0.5, 0.35), (1, 1, 0.8 - 0.4 - 0.2), (0, 0, 0.2)):
        gates = torch.tensor([0.0] * 10 + [g_a, g_b, 0, 0])
        monkeypatch.setattr(tst, "relaxed_bernoulli", lambda *_, gates=gates: gates)
        assert augmenter(x).flatten().tolist() == near([wanted] * 12)


def test_geometric_encoder_golden_and_by_hand():
    """align_corners=True would give (1.75, 2.75, 3.75, 1) for the first offset."""
    encoder, random = tst.GeometricEncoder().double().requires_grad_(False), np.random
    x, m = tensor([1, 2, 3, 4]).expand(1, 3, 4, 4), tensor([[0.7]])
    for offset, row in ((0.5, (2, 3, 4, 0)), (0.25, (1.5, 2.5, 3.5, 2)), (-0.5, (0, 1, 2, 3)),
                        (0, (1, 2, 3, 4))):  # the last: unfitted, the identity
        encoder.b[2] = offset
        assert encoder(x, m)[0, 0].numpy() == near([row] * 4)
    x, turned = tensor(np.zeros((1, 3, 5, 5))), np.zeros((5, 5))
    x[:, :, 2, 4], turned[0, 2] = 1, 1  # by a quarter: right-middle goes to top-middle
    encoder.b.copy_(tensor([0, -1, 0, 1, 0, 0]))
    assert encoder(x, m)[0, 0].numpy() == near(turned)
    h, W, b, m = (random.default_rng(0).normal(size=size) for size in (6, (6, 7), 6, (3, 1)))
    for parameter, value in ((encoder.h, h), (encoder.W, W), (encoder.b, b)):
        parameter.copy_(tensor(value))
    epsilon = torch.randn(3, 7, generator=generator(1)).double().numpy()
    for noise in (0, 0.01):
        z = np.hstack([np.tile(h, (3, 1)), m]) + noise * epsilon  # (3,7)
        found = encoder.affine(tensor(m), noise, generator(1))
        assert found.numpy() == near((z @ W.T + b).reshape(3, 2, 3))


def test_color_encoder_golden_and_by_hand():
    """J mixes channels and neighbours after scale and shift; zeros, not d, outside."""
    encoder, m = tst.ColorEncoder().double().requires_grad_(False), tensor([[0], [0.5], [1]])
    random = np.random.default_rng(0)
    x, J = tensor(random.normal(size=(3, 3, 6, 6))), random.normal(size=(3, 3, 5, 5))
    assert encoder(x, m).numpy() == near(x)  # unfitted: the identity
    encoder.f.zero_()
    encoder.G[0, 10], encoder.G[1, 10] = 1, -0.5
    encoder.kappa.fill_(2)
    a, d = encoder.scale_shift(m, 0)
    assert a.flatten().tolist() == near([1, 1.244919, 1.462117])
    assert d.flatten().tolist() == near([0, -0.062177, -0.122459])
    out = encoder(torch.full((3, 3, 5, 5), 0.3).double(), m, 0)
    assert out[:, 1, 2, 2].tolist() == near([0.3, 0.311299, 0.316176])
    encoder.J.copy_(tensor(J))
    shaded = np.pad(1.24491866 * x[1].numpy() - 0.06217661, ((0, 0), (2, 2), (2, 2)))
    wanted = [[[(J[c] * shaded[:, r:r + 5, q:q + 5]).sum() for q in range(6)]
               for r in range(6)] for c in range(3)]
    assert encoder(x, m, 0)[1].numpy() == near(wanted, 5e-6)
    encoder.G[0, :10] = 1
    logit = 0.01 * torch.randn(10, generator=generator(3)).sum() + m  # one draw for the whole call
    assert encoder.scale_shift(m, 0.01, generator(3))[0].numpy() == near(2 * logit.sigmoid())


# ---------------------------------------------- hand-written operations and Stage I, (10), (11)
def test_pixel_goldens():
    """F = 1.5 and 0.5. The image's mean grey is 100: half its pixels 123, half 77."""
    image = torch.full((1, 3, 2, 2), 78, dtype=torch.uint8)
    image[0, :, 0] = torch.tensor([200, 100, 40], dtype=torch.uint8)[:, None]
    for operation, level, sign, wanted in (
            ("Brightness", 5, 1, [255, 150, 60]), ("Brightness", 5, -1, [100, 50, 20]),
            ("Color", 5, 1, [238, 88, 0]), ("Color", 5, -1, [161, 111, 81]),
            ("Contrast", 5, 1, [250, 100, 10]), ("Contrast", 5, -1, [150, 100, 70]),
            ("Posterize", 9, 1, [192, 96, 32]), ("Solarize", 9 * 127 / 255, 1, [55, 100, 40])):
        assert tst.exact(operation, image, level, sign)[0, :, 0, 0].tolist() == wanted
    dot = torch.full((1, 1, 3, 3), 13, dtype=torch.uint8)
    dot[0, 0, 1, 1] = 130  # smoothed: (8 * 13 + 5 * 130) / 13 = 58; the border stays as it is
    for sign, centre in ((1, 166), (-1, 94)):
        found = tst.exact("Sharpness", dot, 5, sign).flatten().tolist()
        assert found == [13] * 4 + [centre] + [13] * 4
    v, image = random_bytes(1, 3, 16, 16)
    for k, bits in enumerate((8, 8, 7, 7, 6, 6, 5, 5, 4, 4)):
        step, solarized = 2 ** (8 - bits), np.where(v >= 255 - 255 * k / 9, 255 - v, v)
        assert np.array_equal(tst.exact("Posterize", image, k), v // step * step)
        assert np.array_equal(tst.exact("Solarize", image, k), solarized)


def matrix(operation, m, shift=None):
    """A of the operation at the signed magnitude m; `shift` in place of 150/331 of the side."""
    shear, turn, shift = 0.3 * m, math.radians(30 * m), 150 / 331 * m if shift is None else shift
    return {
        "ShearX": [[1, shear, shear], [0, 1, 0]], "ShearY": [[1, 0, 0], [shear, 1, shear]],
        "TranslateX": [[1, 0, -2 * shift], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -2 * shift]],
        "Rotate": [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0]],
    }[operation]


@pytest.mark.parametrize("operation", tst.OPERATIONS[6:11])
def test_geometric_targets_by_their_matrix(operation):
    """Output pixel n reads v at A n, nearest, black outside; under 1 % of the pixels are ties."""
    v, image = random_bytes(1, 3, 32, 32, low=1)
    framed, centre = np.pad(v, ((0, 0), (0, 0), (32, 32), (32, 32))), (2 * np.arange(32) + 1) / 32
    n = np.stack([*np.meshgrid(centre - 1, centre - 1), np.ones((32, 32))])  # (3,32,32)
    pixels = (0, 1, 3, 4, 6, 8, 9, 11, 12, 14)  # of a translation, by level
    for level, sign in ((0, 1), (3, 1), (5, -1), (9, 1), (9, -1)):
        A = matrix(operation, sign * level / 9, sign * pixels[level] / 32)
        column, row = np.rint(((np.tensordot(A, n, 1) + 1) * 32 - 1) / 2).astype(int) + 32
        found = tst.exact(operation, image, level, sign).numpy()
        assert (found != framed[:, :, row, column]).mean() < 0.01


def test_bytes_and_fixed_operations(monkeypatch):
    image = torch.full((1, 3, 32, 32), 10, dtype=torch.uint8)
    image[:, :, 16:24], image[:, :, 24:] = 20, 30
    assert tst.exact("Equalize", image, 0)[0, 1, [0, 16, 24], 0].tolist() == [0, 171, 255]
    v, small = random_bytes(2, 3, 8, 8)
    assert torch.equal(tst.exact("Equalize", small, 0), small)
    x = tst.from_bytes(small, *STATS)
    assert x.numpy() == near((v / 255 - 0.5) / 0.25)
    for part in (-0.4, 0, 0.4):  # of a step: rounded, not cut off
        assert torch.equal(tst.to_bytes(x + part / 255 / 0.25, *STATS), small)
    assert tst.to_bytes(tensor([[[9]], [[-9]], [[9]]]), *STATS).flatten().tolist() == [255, 0, 255]
    x.requires_grad_()
    found = [plain_augmenter().transform(i, x, None, generator(2)) for i in (11, 12, 13)]
    assert not any(out.requires_grad for out in found)
    assert torch.equal(found[0], x) and torch.equal(found[2], tst.cutout(x, generator(2)))
    assert torch.equal(found[1], tst.from_bytes(255 - small, *STATS))
    # cutout at all 32 x 32 centres, one for the batch: 25 to 100 % erased, 56.25 % on average
    places = itertools.chain.from_iterable(itertools.product(range(32), repeat=2))
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: torch.tensor(
        [next(places)]) if high == 32 else None)
    shares = [(tst.cutout(torch.ones(2, 3, 32, 32)) == 0).double().mean() for _ in range(32 * 32)]
    assert (np.mean(shares), min(shares), max(shares)) == (0.5625, 0.25, 1.0)


@pytest.mark.parametrize("name, limit", [("ShearX", 0.06), ("TranslateX", 0.10), ("Rotate", 0.16),
                                         ("TranslateX", math.inf)])
def test_fitted_matrices_match_the_closed_forms(name, limit):
    """Within the limit; but white noise, the negative control, has no useful gradient."""
    torch.manual_seed(1)
    encoder, side, m = tst.GeometricEncoder(), 4 if limit < 1 else 32, torch.linspace(-1, 1, 9)
    noise = torch.randn(256, 3, side, side, generator=generator(9))
    images = F.interpolate(noise, (32, 32), mode="bilinear", align_corners=False)
    tst.fit_encoder(encoder, name, images, *STATS, 500, 16, generator=generator(2))
    gap = encoder.affine(m[:, None], 0) - tensor([matrix(name, one) for one in m.tolist()])
    assert gap.abs().max() < limit if limit < 1 else gap.abs().max() > 0.5
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_fit_step_is_eq_11(monkeypatch):
    images, encoder = torch.randn(20, 3, 8, 8), tst.ColorEncoder()
    encoder.J.data.fill_(0.1), encoder.G.data.fill_(0.1)
    monkeypatch.setattr(torch, "randn", forbidden)  # no noise
    def step(name, *draw):
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(draw))
        return tst.fit_encoder(copy.deepcopy(encoder), name, images, *STATS, 1, 16, 0.0,
                               generator=generator(2))
    x = images[torch.randint(20, (16,), generator=generator(2))]
    target = tst.exact("Contrast", tst.to_bytes(x, *STATS), 5, -1)  # floor(5.7), the coin: minus
    gap = encoder(x, torch.full((16, 1), -0.57), 0) - tst.from_bytes(target, *STATS)
    assert step("Contrast", 0.57, 0.9) == pytest.approx(gap.square().mean().item(), rel=1e-5)
    asked = []
    monkeypatch.setattr(tst, "exact", lambda *args: asked.append(args[2:]) or args[1])
    for rho, coin in ((0.0, 0.9), (0.999, 0.1), (1.0, 0.9)):
        step("Solarize", rho, coin)
        step("Color", rho, coin)
    assert asked == [(0, 1), (0, -1), (9, 1), (9, 1), (9, 1), (9, -1)]
    # the error of an encoder that does nothing: all ten levels, both signs where there are two
    monkeypatch.setattr(tst, "exact", lambda _, v, level, sign: v.int() + level + 20 * (sign < 0))
    x = tst.from_bytes(random_bytes(2, 3, 8, 8)[1], *STATS)
    for name, gaps in (("Solarize", [*range(10)]), ("Rotate", [*range(10), *range(20, 30)])):
        wanted = np.square(np.array(gaps) / 255 / 0.25).mean()
        assert tst.identity_error(name, x, *STATS) == pytest.approx(wanted, rel=1e-4)


# --------------------------------------------------------------------------- losses, (12) to (17)
@pytest.mark.parametrize("term, student, total, d_s", [
    ("non_saturating", 0.430834, 0.748819, [[0.244875, -0.192431, -0.052444],
                                           [-0.059358, -0.026671, 0.086030]]),
    ("negative_ce", -1.236888, -0.918903, [[0.255125, -0.200486, -0.054639],
                                          [-0.285629, -0.128341, 0.413970]])])
def test_augmentation_loss_golden(term, student, total, d_s):
    t, s = tensor(T, True), tensor(S, True)
    found = tst.augmentation_loss(t, s, Y, term)
    assert [part.item() for part in found] == near([total, 0.317985, student])
    found[0].backward()
    d_t = [[-0.107201, 0.087645, 0.019556], [0.101489, 0.061556, -0.163045]]
    assert t.grad.numpy() == near(d_t) and s.grad.numpy() == near(d_s)


def test_losses_by_hand():
    z, y = np.random.default_rng(0).normal(0, 2, (2, 5, 10)), torch.tensor([3, 0, 9, 0, 5])
    p_T, p_S = (np.exp(log_p(one))[np.arange(5), y] for one in z)
    t, s, sure = tensor(z[0]), tensor(z[1]), tensor([[60, 0, 0]])
    L_T, L_S = -np.log(p_T).mean(), -np.log(1 - p_S + 1e-8).mean()
    assert [part.item() for part in tst.augmentation_loss(t, s, y)] == near([L_T + L_S, L_T, L_S])
    D = -np.log(p_S).mean() + 0.3 * 2**2 * kl(*z, 2)
    assert tst.distillation_loss(s, t, y, 0.3, 2).item() == near(D)
    assert tst.true_class(s, y).item() == near(p_S.mean())
    assert tst.augmentation_loss(s, s, y, "negative_ce")[0].item() == near(0)
    assert tst.augmentation_loss(tensor(S), tensor(S), Y)[0].item() == near(1.667722)
    assert tst.augmentation_loss(sure, sure, Y[:1])[2].item() == near(18.42, 0.01)


def test_distillation_loss_golden():
    t, s = tensor(T, True), tensor(S, True)
    for weight, tau, total in ((0.5, 4, 1.446812), (1, 1, 1.639677), (1, 4, 1.656736)):
        loss = tst.distillation_loss(s, t, Y, weight, tau)
        assert loss.item() == near(total)
    loss.backward()
    assert t.grad is None
    assert s.grad.numpy() == near([[-0.423198, 0.285039, 0.138159],
                                   [0.448273, 0.222048, -0.670321]])
    assert tst.softened_kl(s, t, 4).item() == near(0.026240)
    # what the usual mistakes give: KL swapped, "mean", no tau^2
    assert 16 * kl(S, T, 4) == near(0.402480) and 16 * kl(T, S, 4) / 3 == near(0.139949)
    assert F.cross_entropy(s, Y).item() + kl(T, S, 4) == near(1.263129)
    # (17): the mean of D on two halves is D on both
    t2, s2 = [[1.2, 0, -0.3], [-0.5, 0.1, 2]], [[0.2, -0.1, 0.4], [-0.6, 0.5, 0.7]]
    second = tst.distillation_loss(tensor(s2), tensor(t2), Y).item()
    both = tst.distillation_loss(tensor(S + s2), tensor(T + t2), torch.cat([Y, Y])).item()
    assert (second, both, (1.656736 + second) / 2) == near((1.178002, 1.417369, 1.417369))


@pytest.mark.parametrize("call, word", [
    (lambda: tst.augmentation_loss(tensor(T), tensor(S), Y, "sigmoid"), "sigmoid"),
    (lambda: tst.augmentation_loss(tensor(T), tensor(S[:1]), Y), r"\(1, 3\)"),
    (lambda: tst.distillation_loss(tensor(S), tensor(T)[:, :2], Y), r"\(2, 2\)"),
    (lambda: plain_augmenter(operations=15), "operations = 15"),
    (lambda: plain_augmenter().transform(14, None, None), "operation 14: 0 to 13"),
    (lambda: tst.fit_encoder(tst.ColorEncoder(), "Invert", None, *STATS), "Invert"),
    (lambda: tst.exact("Cutout", None, 0), "Cutout"),
    (lambda: tst.ColorEncoder()(torch.zeros(2, 3, 4, 4), torch.zeros(2)), r"\(2,\)"),
    (lambda: tst.GeometricEncoder()(torch.zeros(2, 3, 4, 5), torch.zeros(2, 1)), "square"),
    (lambda: tst.relaxed_bernoulli(torch.zeros(2), 0), "temperature = 0")])
def test_wrong_input_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# ----------------------------------------------------------------- Stages II and III, (17) to (19)
def test_gradients_of_theta_against_central_differences():
    """(d): float64, equal draws each time, ten of 14 drawn; and (19) written out for Invert."""
    torch.manual_seed(0)
    augmenter = plain_augmenter(operations=10).double()
    augmenter.temperature = 1.0  # soft enough for differences
    for parameter in augmenter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, theta = torch.rand(2, 3, 6, 6).double(), {
        name: p for name, p in augmenter.named_parameters() if p.requires_grad}
    def augmented(*values):
        return torch.func.functional_call(augmenter, dict(zip(theta, values)), (x, generator(9)))
    assert torch.autograd.gradcheck(augmented, tuple(theta.values()))
    augmented(*theta.values()).sum().backward()
    assert augmenter.theta_p.grad.count_nonzero() == 10  # what is not drawn gets none
    # (19): g (1 - g) / tau_g <dL/dx~, T_i - x>
    u = torch.rand(14, generator=generator(9)).double()[12]
    g = torch.sigmoid(augmenter.theta_p[12] + (u / (1 - u)).log())
    wanted = g * (1 - g) * (augmenter.transform(12, x, None) - x).sum()
    assert augmenter.theta_p.grad[12].item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_toy_selection(sign):
    """(h): brightness hurts the student alone: theta_0 grows, all else stays exactly 0."""
    y = torch.arange(16) % 2
    pattern = torch.tensor([1.0, -1, 0]).view(3, 1, 1) * (1 - 2 * y).view(-1, 1, 1, 1)
    images = torch.randn(16, 3, 8, 8, generator=generator(1)) + pattern
    c = images[y == 0].mean(0) - images[y == 1].mean(0)

    def steady(x):
        score = (x * c).flatten(1).sum(1) * 2 / c.norm() ** 2
        return torch.stack([score, -score], 1)
    networks = [steady, lambda x: steady(x) * torch.exp(-x.mean((1, 2, 3)).abs())[:, None]]
    teacher, student = networks[::sign]  # -1: exchanged, and theta_0 shrinks
    augmenter, draws = plain_augmenter(operations=14), generator()
    augmenter.transform = lambda i, images, m, _: images + 2 * m if i == 0 else images
    search = torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], 0.01)
    cpu = Namespace(precision="fp32", device=torch.device("cpu"), student_term="non_saturating")
    x = augmenter(images, generator()).detach()
    _, L_T, L_S = tst.augmentation_loss(teacher(x), student(x), y)
    conf_t, conf_s = tst.true_class(teacher(x), y), tst.true_class(student(x), y)
    for step in range(200):
        terms = tst.search_step(augmenter, teacher, student, search, images, y, draws, cpu)
        assert step or terms == {"L_T": L_T, "L_S": L_S, "conf_t": conf_t, "conf_s": conf_s}
    assert sign * augmenter.theta_m[0] > 0 and sign * augmenter.theta_p[0] > 0
    assert not augmenter.theta_m[1:].any() and not augmenter.theta_p[1:].any()


# ------------------------------------------------------------------------------- flags, schedules
@pytest.mark.parametrize("flags", [
    "--operations 15", "--search-at 8 --epochs 8", "--gate-temperature 0", "--teacher-weights a b",
    "--temperature 0", "--augment random --search-at 1", "--augment none --search-epochs 1"])
def test_argument_errors_are_one_line(flags, capsys):
    assert flags.split()[0] in refused("tst", flags, capsys)


@pytest.mark.parametrize("dataset, flags, epochs_at_a_rate", [
    ("cifar100", {"teacher": "resnet32x4", "student": "resnet8x4", "epochs": 240, "batch_size": 128,
                  "learning_rate": 0.1, "temperature": 4}, [150, 30, 30, 30]),
    ("imagenet", {"teacher": "resnet34", "student": "resnet18", "epochs": 100, "batch_size": 256,
                  "learning_rate": 0.3, "temperature": 1}, [40, 30, 30])])
def test_defaults_and_learning_rates(dataset, flags, epochs_at_a_rate):
    found = tst.parse_args(["--device", "cpu", "--dataset", dataset])
    assert vars(found).items() >= {
        **flags, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": True, "weight": 1,
        "operations": 4, "gate_temperature": 0.05, "fit_steps": 2000}.items()
    rates = tst.learning_rates(1.0, found.epochs, found.drops)
    assert rates == near(np.repeat([1, 0.1, 0.01, 0.001][:len(epochs_at_a_rate)], epochs_at_a_rate))


@pytest.mark.parametrize("flags, at, passes", [
    ("--dataset cifar100", [30, 90], 30), ("--dataset imagenet", [10, 25], 5),
    ("--dataset imagenet --epochs 5", [0, 1], 1), ("--epochs 9 --search-at 0 8", [0, 8], 1),
    ("--search-epochs 3", [1, 4], 3), ("--augment random", [], 0)])
def test_schedule(flags, at, passes):
    arguments = tst.parse_args(["--device", "cpu", *flags.split()])
    wanted = [[*((2, epoch, n) for n in range(passes) if epoch in at), (3, epoch, 0)]
              for epoch in range(arguments.epochs)]
    assert tst.schedule(arguments) == sum(wanted, [])


# ------------------------------------------------------------------------------------------- runs
TINY = "--epochs 3 --batch-size 24 --fit-steps 5 --search-epochs 2 --search-at 0 1 "  # 11 steps


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A whole run, watched: what each step got, what the plateau rule (here: a half) was asked."""
    found = Namespace(folder=tmp_path_factory.mktemp("whole"), steps=[], asked=[])
    def watch(name):
        function = getattr(tst, name)
        def watched(*args):  # networks and optimizer as they are before the step
            found.steps.append((name, (*copy.deepcopy(args[:4]), *args[4:])))
            return function(*args)
        patch.setattr(tst, name, watched)
    with pytest.MonkeyPatch.context() as patch:
        watch("search_step")
        watch("train_step")
        patch.setattr(tst, "plateau", lambda previous, loss, rate: found.asked.append(
            (previous, loss)) or rate / 2)
        found.printed = run("tst", found.folder, TINY)
    found.searches = [args for name, args in found.steps if name == "search_step"]
    found.lessons = [args for name, args in found.steps if name == "train_step"]
    return found


def test_stages_take_turns(whole):
    """(b), (f): searches before epochs 0 and 1; theta moves in them, the student between them."""
    def modes(network):  # training, gradients
        return {network.training, *(p.requires_grad for p in network.parameters())}
    searching = [name == "search_step" for name, _ in whole.steps]
    assert searching == ([True] * 22 + [False] * 11) * 2 + [False] * 11
    students = [args[2 if search else 0] for search, (_, args) in zip(searching, whole.steps)]
    for search, student, after, (_, args) in zip(searching, students, students[1:], whole.steps):
        assert same(student.state_dict(), after.state_dict()) == search
        assert modes(student) == {not search} and modes(args[1]) == {False}
    for *_, labels, (augmented, y), _ in whole.lessons:
        assert torch.equal(y, labels) and not augmented.requires_grad
    thetas = [torch.cat([args[0].theta_m, args[0].theta_p]) for args in whole.searches]
    assert not any(torch.equal(theta, after) for theta, after in itertools.pairwise(thetas))
    assert not thetas[0].any() and thetas[22].any()  # a new search keeps theta
    assert [len(whole.searches[i][3].state) for i in (0, 1, 22, 23)] == [0, 2, 0, 2]  # not momentum
    assert whole.searches[0][3].defaults.items() >= {
        "lr": 0.01, "momentum": 0.9, "weight_decay": 0, "nesterov": False}.items()


def test_a_step_of_stage_three(whole):
    """(c); eq. (17) on [x~ ; x] and [y' ; y], student in train mode; teacher without gradient."""
    *networks, images, y, (x, _), arguments = whole.lessons[0]
    student, teacher, optimizer = copy.deepcopy(networks)
    graph, twin, others = [], copy.deepcopy(student), y.flip(0)
    teacher.register_forward_hook(lambda *_: graph.append(torch.is_grad_enabled()))
    both, targets = torch.cat([x, images]), torch.cat([others, y])
    terms, logits = tst.train_step(student, teacher, optimizer, images, y, (x, others), arguments)
    assert graph == [False]
    s, t = twin(both), teacher(both)
    tst.distillation_loss(s, t, targets).backward()
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(logits, s[24:]) and terms == {
        "ce": F.cross_entropy(s, targets), "kl": tst.softened_kl(s, t, 4),
        "conf_t": tst.true_class(t[:24], others), "conf_s": tst.true_class(s[:24], others)}
    s = copy.deepcopy(student)(images)  # a control: the originals alone
    terms, logits = tst.train_step(student, teacher, optimizer, images, y, None, arguments)
    assert torch.equal(logits, s) and terms == {
        "ce": F.cross_entropy(s, y), "kl": tst.softened_kl(s, teacher(images), 4)}


def test_the_log_and_the_25_series(whole):
    rows, steps = log(whole.folder), log(whole.folder, "steps.csv")
    assert [row["epoch"] + row["stage"] + row["student_epoch"] for row in rows] == [
        "121", "221", "331", "422", "522", "632", "733"]
    for row in rows:
        assert {name for name, value in row.items() if not value} == (
            {"ce", "kl", "train", "test"} if row["stage"] == "2" else {"L_T", "L_S"})
    assert list(steps[0]) == [
        "epoch", "step", *(f"m_{name}" for name in tst.OPERATIONS[:11]),
        *(f"q_{name}" for name in tst.OPERATIONS), "L_T", "L_S", "conf_t", "conf_s"]
    assert [row["epoch"] + row["step"] for row in steps] == [
        "11", "111", "21", "211", "41", "411", "51", "511"]
    augmenter = whole.searches[34][0]  # behind the first step of the fourth search pass
    assert [float(value) for value in list(steps[6].values())[2:27]] == near(
        augmenter.magnitudes().tolist() + augmenter.probabilities().tolist())


def test_the_plateau_rule_sets_the_rate_of_a_search(whole):
    rates, losses = [0.01], (999, 2, 1.9, 1.89, 1.885, 1.95, 1.96, 1.93)
    for previous, loss in itertools.pairwise(losses):
        rates.append(tst.plateau(previous, loss, rates[-1]))
    assert rates[1:] == near([0.01, 0.01, 0.009, 0.0081, 0.0081, 0.00729, 0.00729])
    rows = log(whole.folder)
    one, two, three, four = (float(row["L_T"]) + float(row["L_S"])
                             for row in rows if row["stage"] == "2")
    assert sum(whole.asked, ()) == near((999, one, one, two, 999, three, three, four))
    assert [float(row["lr"]) for row in rows] == near([0.01, 0.005, 0.1, 0.01, 0.005, 0.1, 0.01])


def test_the_result(whole):
    found = result_of(whole.folder)
    measured, (one, two) = found["measures"], found["blocks"]
    assert (one["search_at"], two["search_at"]) == (0, 1)
    assert one["after"][0] == two["before"][0]  # theta rests between the searches
    assert measured.items() >= {
        "epochs": 3, "k_images": 1.56, "k_searched": 1.04, "T_before": two["before"][0],
        "S_before": two["before"][1], "T_after": two["after"][0], "S_after": two["after"][1],
        "T_end": two["after"][0]}.items()
    assert found["images"] == {"student forward and backward": 1560, "teacher forward": 1560,
                               "both forward and backward to the image": 1040}
    assert found["seconds_by_stage"] == pytest.approx({"I": measured["fit"], **{
        name: sum(row["s"] for row in found["rows"] if row["stage"] == stage)
        for name, stage in (("II", 2), ("III", 3))}})
    assert list(found["fit_errors"]) == list(tst.OPERATIONS[:11])
    augmenter = common.load_weights(plain_augmenter(), whole.folder / "augmenter.pt")
    assert found["magnitudes"] == augmenter.magnitudes().tolist()
    assert found["probabilities"] == augmenter.probabilities().tolist()
    # T_end, S_end: the saved networks on the draws of the seed, ten images a draw
    student, teacher, *_ = whole.lessons[0]
    student = common.load_weights(common.frozen(student), whole.folder / "student.pt")
    draws, wanted = generator(0), []
    with torch.no_grad():
        for images, labels in shapes_data().test.batches(10):
            x = augmenter(images, draws)
            wanted.append([network(x).softmax(1)[torch.arange(10), labels].mean().item()
                           for network in (teacher, student)])
    assert [measured["T_end"], measured["S_end"]] == near(np.mean(wanted, 0), 1e-5)


@pytest.mark.parametrize("name, call", [("train_step", 22 + 3), ("search_step", 22 + 11 + 4)])
def test_a_stopped_run_goes_on_bit_for_bit(whole, run, tmp_path, monkeypatch, name, call):
    """In the last epoch, behind one without a search; in the second pass of the second search."""
    monkeypatch.setattr(tst, "plateau", lambda previous, loss, rate: rate / 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, tst, name, call)
        run("tst", tmp_path, TINY)
    stopped(monkeypatch, tst, name, 11 + 1)  # no closed pass is repeated
    run("tst", tmp_path, TINY + "--resume")
    for file in ("student.pt", "augmenter.pt"):
        assert same(weights(tmp_path / file), weights(whole.folder / file))
    for file in ("log.csv", "steps.csv"):
        assert log(tmp_path, file) == log(whole.folder, file)
    ours, theirs = result_of(tmp_path), result_of(whole.folder)
    assert ours["blocks"] == theirs["blocks"] and ours["measures"] == theirs["measures"]


def test_compare_prints_every_control(whole, run, tmp_path, monkeypatch):
    """Beside the finished run; equal originals in equal order; encoders come from the cache."""
    seen, original = {"none": [], "twice": [], "random": []}, tst.train_step
    monkeypatch.setattr(tst, "train_step", lambda *args: seen[args[-1].augment].append(
        args[4:6]) or original(*args))
    monkeypatch.setattr(tst, "search_step", forbidden)
    monkeypatch.setattr(tst, "fit_encoder", forbidden)
    out = shutil.copytree(whole.folder, tmp_path / "out")
    found = table(run("tst", out, TINY + "--compare --resume"))
    assert list(found) == ["teacher", "student alone", "TST", "kd", "kd twice", "random"]
    assert found["TST"] == table(whole.printed)["TST"]
    assert [(row["epochs"], row["k_images"], row["k_searched"]) for row in found.values()] == [
        ("3", "0.8", "0.0"), ("3", "0.8", "0.0"), ("3", "1.6", "1.0"), ("3", "0.8", "0.0"),
        ("3", "1.6", "0.0"), ("3", "1.6", "0.0")]
    assert found["random"]["T_before"] == found["kd"]["T_end"] == "-" != found["random"]["T_end"]
    assert result_of(out / "random")["probabilities"] == [0.5] * 14
    assert result_of(out / "kd")["images"]["student forward and backward"] == 780
    for steps in seen.values():
        for (labels, _), args in zip(steps, whole.lessons, strict=True):
            assert torch.equal(labels, args[4])
    assert all(first is None for _, first in seen["none"])
    assert all(torch.equal(first[1], labels) for labels, first in seen["random"])
    others = shapes_data().train.augmented(24, generator(tst.SEARCH))
    for (_, first), (images, labels) in zip(seen["twice"], others):  # other originals, not x~
        assert torch.equal(first[0], images) and torch.equal(first[1], labels)


def test_a_changed_copy_fits_its_own_encoders(tmp_path):
    """Whatever its name and folder; the script itself finds its own again."""
    arguments = tst.parse_args(f"--device cpu --fit-steps 1 --cache {tmp_path}".split())
    arguments.seed = 0
    for count, script in ((1, tst), (2, altered("tst", tmp_path)), (2, tst)):
        script.fitted_encoders(shapes_data(), arguments)
        assert len([*tmp_path.glob("shapes-encoders-*.pt")]) == count


def test_imagenet_seeds_open_set_negative_ce(run, tmp_path):
    """Streamed: picture and confidences without all images in memory. A teacher from a file."""
    from PIL import Image
    for part, label, index in itertools.product(("train", "val"), "0123", range(6)):
        path = tmp_path / part / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_bytes(40, 40, 3)[1].numpy()).save(path)
    file = tmp_path / "teacher.pt"
    torch.save(common.build_model("resnet8", 2, 16, 4).state_dict(), file)
    flags = (f"--dataset imagenet --data {tmp_path} --image-size 16 --epochs 1 --batch-size 6 "
             f"--fit-steps 5 --teacher-weights {file} --seed 0 1 --open-set 2 "
             "--student-term negative_ce ")
    with pytest.raises(common.InputError, match="--cache .*teacher.pt cannot be written"):
        run("tst", tmp_path / "no", flags + f"--cache {file}")
    found = table(run("tst", tmp_path / "out", flags))
    assert found["teacher"]["epochs"] == "-"
    assert all("±" in found["TST, negative_ce"][name] for name in ("rank1", "T_after"))
    assert float(log(tmp_path / "out" / "seed-0")[0]["L_S"]) < 0
    assert (tmp_path / "out" / "seed-1" / "augmented.png").stat().st_size > 1000


def test_pictures(whole, monkeypatch):
    """augmented.png: rows of an image, each operation alone, four draws of x~; and the figures."""
    from PIL import Image
    pixels = np.asarray(Image.open(whole.folder / "augmented.png"))[2:, 2:]
    tiles = pixels.reshape(8, 18, 19, 18, 3)[:, :16, :, :16]  # two pixels between them
    assert np.array_equal(tiles[:, :, 13], 255 - tiles[:, :, 0])  # Invert
    assert (tiles[:, :, 15] != tiles[:, :, 16]).any()
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(common.Path(common.__file__).parent / "docs")
    __import__("figures").main(whole.folder)
    assert {path.name for path in whole.folder.glob("*.png")} == {
        "augmented.png", "operations.png", "series.png"}
