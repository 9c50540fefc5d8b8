"""TST against its specification: section 11, oracles, gradients, the stages' freezing, tiny runs.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification, beside them the numbers that the usual mistakes would give.
"""

import copy
import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    forbidden, log, refused, result_of, same, shapes_data, stopped, table, weights)
from torch import nn
from torch.nn import functional as F

import common
import tst

DIGITS = 1e-6
T, S, Y = [[2, 0.5, -1], [0.3, -0.2, 1.5]], [[1, 0.8, -0.5], [0.9, 0.1, -0.3]], [0, 2]
STATS = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
T2, S2 = [[1.2, 0, -0.3], [-0.5, 0.1, 2]], [[0.2, -0.1, 0.4], [-0.6, 0.5, 0.7]]


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_p(z, tau=1.0):
    z = np.asarray(z, float) / tau
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(t, s, tau):
    a, b = log_p(t, tau), log_p(s, tau)
    return (np.exp(a) * (a - b)).sum(1).mean()


# ------------------------------------------------------------------------------ gates, (1) to (5)
@pytest.mark.parametrize("temperature, values, slopes", [
    (0.05, (0.5, 0.731059, 0.598713, 0.598482, 0.279699),
     (5, 3.932239, 4.805114, 4.806024, 4.029346)),
    (1.0, (0.5, 0.512497, 0.505001, 0.504989, 0.488178), None)])
def test_gate_golden(monkeypatch, temperature, values, slopes):
    u = torch.tensor([0.5, 0.5, 0.51, 0.48, 0.3], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **flags: u)
    logits = tensor([0, 0.05, -0.02, 0.1, 0.8], True)
    gates = tst.relaxed_bernoulli(logits, temperature)
    assert gates.detach().numpy() == pytest.approx(np.array(values), abs=DIGITS)
    gates.sum().backward()
    if slopes:
        assert logits.grad.numpy() == pytest.approx(np.array(slopes), abs=5e-6)


def test_the_gates_rate_is_the_sigmoid_of_its_logit():
    """Monte Carlo, four standard errors: .5, .6225, .2689; and .5 through the augmenter at 0."""
    for logit, rate in ((0, 0.5), (0.5, 0.6225), (-1, 0.2689)):
        gates = tst.relaxed_bernoulli(torch.full((40_000,), float(logit)), generator=generator())
        assert (gates > 0.5).double().mean().item() == pytest.approx(
            rate, abs=4 * (rate * (1 - rate) / 40_000) ** 0.5)
    augmenter, found, draws = plain_augmenter(operations=1), [], generator()
    augmenter.transform = lambda i, images, *_: images + 1
    for _ in range(2000):
        found.append((augmenter(torch.zeros(1, 3, 2, 2), draws).mean() > 0.5).item())
    assert np.mean(found) == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)  # 0.6225 if sigma twice


@pytest.mark.parametrize("value, wanted", [(0.0, 1e-6), (1.0, 1 - 1e-6)])
def test_the_uniform_draw_is_clamped(monkeypatch, value, wanted):
    monkeypatch.setattr(torch, "rand", lambda *args, **flags: torch.full((1,), value).double())
    gate = tst.relaxed_bernoulli(torch.zeros(1).double(), temperature=1.0).item()
    assert gate == pytest.approx(wanted, rel=1e-9) and 0 < gate < 1


def plain_augmenter(**flags):
    encoders = [tst.ColorEncoder() if i < 6 else tst.GeometricEncoder() for i in range(11)]
    return tst.Augmenter(encoders, *STATS, **flags)


def test_magnitudes_and_probabilities():
    augmenter = plain_augmenter()
    assert augmenter.magnitudes().tolist() == [0.5] * 11
    assert augmenter.probabilities().tolist() == [0.5] * 14
    with torch.no_grad():
        augmenter.theta_m[3], augmenter.theta_p[13] = 2.0, -1.0
    assert augmenter.magnitudes()[3].item() == pytest.approx(0.880797, abs=DIGITS)
    assert augmenter.probabilities()[13].item() == pytest.approx(0.268941, abs=DIGITS)


def test_composition_golden(monkeypatch):
    """x = .2, T_a = .8, T_b = -.4, g = (.75, .5): .35; chained it were .125. Gates 0 and 1."""
    augmenter, x = plain_augmenter(operations=2), torch.full((1, 3, 2, 2), 0.2)
    monkeypatch.setattr(torch, "randperm", lambda *args, **flags: torch.arange(14))
    augmenter.transform = lambda i, images, *_: torch.full_like(images, (0.8, -0.4)[i])
    for gates, wanted in (((0.75, 0.5), 0.35), ((1, 1), 0.8 - 0.4 - 0.2)):
        monkeypatch.setattr(tst, "relaxed_bernoulli",
                            lambda *args, g=gates: torch.tensor([*g, *[0.0] * 12]))
        assert augmenter(x).detach().flatten().tolist() == pytest.approx([wanted] * 12)
    monkeypatch.setattr(tst, "relaxed_bernoulli", lambda *args: torch.zeros(14))
    assert torch.equal(augmenter(x), x)


def test_k_of_fourteen_are_drawn_and_the_original_is_what_each_sees():
    counts = np.zeros(14)
    for K in (1, 4, 14):
        augmenter, x = plain_augmenter(operations=K), torch.randn(2, 3, 4, 4)
        for _ in range(300):
            seen = []

            def watch(i, images, magnitude, _, seen=seen, x=x):
                assert images is x
                assert (magnitude is None) == (i >= 11)
                seen.append(i)
                return images + 1
            augmenter.transform = watch
            augmenter(x)
            assert len(seen) == len(set(seen)) == K
            if K == 4:
                counts[seen] += 1
    assert counts / 300 == pytest.approx(np.full(14, 4 / 14), abs=0.12)


def test_equal_generators_equal_images():
    x = torch.rand(3, 3, 16, 16)
    augmenter, state = plain_augmenter(), torch.get_rng_state()
    a, b, c = ([augmenter(x, draws).detach() for _ in range(6)]
               for draws in (generator(4), generator(4), generator(5)))
    assert all(torch.equal(one, two) for one, two in zip(a, b))
    assert not any(torch.equal(one, two) for one, two in zip(a, c))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from elsewhere


# ------------------------------------------------------------------------- encoders, (6) to (9)
def test_unfitted_encoders_are_the_identity():
    x, m = torch.randn(2, 3, 9, 9), torch.rand(2, 1)
    for encoder in (tst.GeometricEncoder(), tst.ColorEncoder()):
        assert encoder(x, m).detach().numpy() == pytest.approx(x.numpy(), abs=1e-5)


def test_affine_by_hand():
    encoder = tst.GeometricEncoder().double()
    random = np.random.default_rng(0)
    h, W, b = random.normal(size=6), random.normal(size=(6, 7)), random.normal(size=6)
    with torch.no_grad():
        for parameter, value in ((encoder.h, h), (encoder.W, W), (encoder.b, b)):
            parameter.copy_(torch.tensor(value))
    m = random.normal(size=(3, 1))
    wanted = np.stack([(W @ np.append(h, one) + b).reshape(2, 3) for one in m[:, 0]])
    assert encoder.affine(tensor(m), 0).detach().numpy() == pytest.approx(wanted, abs=1e-12)
    noisy = encoder.affine(tensor(m), 0.01, generator(1)).detach().numpy()
    epsilon = torch.randn(3, 7, generator=generator(1)).double().numpy()
    wanted = np.stack([(W @ (np.append(h, one) + 0.01 * e) + b).reshape(2, 3)
                       for one, e in zip(m[:, 0], epsilon)])
    assert noisy == pytest.approx(wanted, abs=1e-9)


def geometric(matrix):
    encoder = tst.GeometricEncoder()
    with torch.no_grad():
        encoder.b.copy_(torch.tensor(matrix, dtype=torch.float32).flatten())
    return encoder


@pytest.mark.parametrize("offset, wanted", [(0.5, (2, 3, 4, 0)), (0.25, (1.5, 2.5, 3.5, 2)),
                                            (-0.5, (0, 1, 2, 3))])
def test_sampling_golden(offset, wanted):
    """align_corners=True would give (1.75, 2.75, 3.75, 1) for the first."""
    x = torch.tensor([1.0, 2, 3, 4]).expand(1, 3, 4, 4)
    encoder = geometric([[1, 0, offset], [0, 1, 0]])
    assert encoder(x, torch.zeros(1, 1), 0)[0, 0, 0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_quarter_turn():
    """Rotation by 90 degrees takes the right-middle pixel to the top-middle."""
    x = torch.zeros(1, 3, 5, 5)
    x[:, :, 2, 4] = 1
    turned = geometric([[0, -1, 0], [1, 0, 0]])(x, torch.zeros(1, 1), 0)
    assert turned[0, 0, 0, 2].item() == pytest.approx(1, abs=1e-5)
    assert turned.sum().item() == pytest.approx(3, abs=1e-4)


def color_of_the_spec():
    encoder = tst.ColorEncoder()
    with torch.no_grad():
        encoder.f.zero_()
        encoder.G[0, 10], encoder.G[1, 10] = 1, -0.5
        encoder.kappa.fill_(2)
    return encoder


def test_color_golden():
    encoder, m = color_of_the_spec(), torch.tensor([[0.0], [0.5], [1.0]])
    a, d = encoder.scale_shift(m, 0)
    assert a.flatten().tolist() == pytest.approx([1, 1.244919, 1.462117], abs=DIGITS)
    assert d.flatten().tolist() == pytest.approx([0, -0.062177, -0.122459], abs=DIGITS)
    out = encoder(torch.full((3, 3, 5, 5), 0.3), m, 0)
    assert out[:, 1, 2, 2].tolist() == pytest.approx([0.3, 0.311299, 0.316176], abs=DIGITS)
    a, d = encoder.scale_shift(m, 0.01, generator(3))  # one draw for the whole call
    epsilon = torch.randn(10, generator=generator(3))
    with torch.no_grad():
        encoder.G[0, :10] = 1
        a, _ = encoder.scale_shift(m, 0.01, generator(3))
        logit = 0.01 * epsilon.sum() + m[:, 0]
    assert a.flatten().detach().numpy() == pytest.approx(
        (2 * (torch.sigmoid(logit) - 0.5) + 1).numpy(), abs=1e-5)


def test_color_convolution_by_hand():
    """J mixes channels and neighbours after scale and shift; zeros, not d, outside."""
    encoder, random = color_of_the_spec().double(), np.random.default_rng(1)
    J, x = random.normal(size=(3, 3, 5, 5)), random.normal(size=(1, 3, 6, 6))
    with torch.no_grad():
        encoder.J.copy_(torch.tensor(J))
    out = encoder(tensor(x), tensor([[0.5]]), 0).detach().numpy()
    shaded = np.pad(1.24491866 * x - 0.06217661, ((0, 0), (0, 0), (2, 2), (2, 2)))
    wanted = np.array([[[(J[c] * shaded[0, :, r:r + 5, q:q + 5]).sum() for q in range(6)]
                        for r in range(6)] for c in range(3)])
    assert out[0] == pytest.approx(wanted, abs=5e-6)


# ------------------------------------------------------------- hand-written operations, (10), (11)
def test_pixel_goldens():
    """F = 1.5 and 0.5. The image's mean grey is 100: half its pixels 123, half 77."""
    image = torch.full((1, 3, 2, 2), 78, dtype=torch.uint8)
    image[0, :, 0] = torch.tensor([200, 100, 40], dtype=torch.uint8)[:, None]
    for operation, more, less in (("Brightness", [255, 150, 60], [100, 50, 20]),
                                  ("Color", [238, 88, 0], [161, 111, 81]),
                                  ("Contrast", [250, 100, 10], [150, 100, 70])):
        for sign, wanted in ((1, more), (-1, less)):
            assert tst.exact(operation, image, 5, sign)[0, :, 0, 0].tolist() == wanted
    assert tst.exact("Posterize", image, 9)[0, :, 0, 0].tolist() == [192, 96, 32]
    level = (255 - 128) / 255 * 9
    assert tst.exact("Solarize", image, level)[0, :, 0, 0].tolist() == [55, 100, 40]
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    for k, bits in enumerate((8, 8, 7, 7, 6, 6, 5, 5, 4, 4)):
        step, threshold = 2 ** (8 - bits), 255 - 255 * k / 9
        assert torch.equal(tst.exact("Posterize", ramp, k).int(), ramp.int() // step * step)
        wanted = torch.where(ramp >= threshold, 255 - ramp, ramp)
        assert torch.equal(tst.exact("Solarize", ramp, k), wanted)


def color_oracle(operation, v, F_):
    gray = np.floor(0.2989 * v[:, 0] + 0.587 * v[:, 1] + 0.114 * v[:, 2])[:, None]
    if operation == "Sharpness":
        smooth = v.copy()
        for r, c in itertools.product(range(1, v.shape[2] - 1), range(1, v.shape[3] - 1)):
            window = v[:, :, r - 1:r + 2, c - 1:c + 2]
            smooth[:, :, r, c] = np.round((window.sum((2, 3)) + 4 * v[:, :, r, c]) / 13)
    e = {"Brightness": 0, "Color": gray, "Contrast": gray.mean((1, 2, 3), keepdims=True),
         "Sharpness": smooth if operation == "Sharpness" else 0}[operation]
    return np.floor(np.clip(F_ * v + (1 - F_) * e, 0, 255))


@pytest.mark.parametrize("operation", ["Brightness", "Color", "Contrast", "Sharpness"])
def test_color_targets_by_the_table(operation):
    """1.4 v is a whole number for every fifth v, and float32 may fall either way: off by one."""
    v = np.random.default_rng(0).integers(0, 256, (3, 3, 12, 12))
    for level, sign in ((0, 1), (4, 1), (9, 1), (2, -1), (9, -1)):
        found = tst.exact(operation, torch.tensor(v, dtype=torch.uint8), level, sign).numpy()
        wanted = color_oracle(operation, v.astype(float), 1 + sign * 0.9 * level / 9)
        gap = np.abs(found - wanted)
        assert gap.max() <= 1 and (gap > 0).mean() < 0.2


def geometric_oracle(v, A):
    """Nearest sampling by loops: output pixel n reads v at A n, black outside."""
    side = v.shape[-1]
    out = np.zeros_like(v)
    for Yp, Xp in itertools.product(range(side), range(side)):
        x, y = np.array(A) @ [(2 * Xp + 1) / side - 1, (2 * Yp + 1) / side - 1, 1]
        column, row = (np.rint(((c + 1) * side - 1) / 2).astype(int) for c in (x, y))
        if 0 <= column < side and 0 <= row < side:
            out[:, :, Yp, Xp] = v[:, :, row, column]
    return out


PIXELS = [0, 1, 3, 4, 6, 8, 9, 11, 12, 14]


@pytest.mark.parametrize("operation", tst.OPERATIONS[6:11])
@pytest.mark.parametrize("level, sign", [(0, 1), (3, 1), (5, -1), (9, 1), (9, -1)])
def test_geometric_targets_by_their_matrix(operation, level, sign):
    """Ties between two pixels may fall either way in a shear: under 1 % of the pixels."""
    v = np.random.default_rng(level).integers(1, 256, (1, 3, 32, 32))
    shear, turn = sign * 0.3 * level / 9, math.radians(sign * 30 * level / 9)
    shift = -2 * sign * PIXELS[level] / 32
    A = {"ShearX": [[1, shear, shear], [0, 1, 0]], "ShearY": [[1, 0, 0], [shear, 1, shear]],
         "TranslateX": [[1, 0, shift], [0, 1, 0]], "TranslateY": [[1, 0, 0], [0, 1, shift]],
         "Rotate": [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0]]}
    found = tst.exact(operation, torch.tensor(v, dtype=torch.uint8), level, sign).numpy()
    assert (found != geometric_oracle(v, A[operation])).mean() < 0.01


def test_equalize_invert_golden():
    image = torch.full((1, 3, 32, 32), 10, dtype=torch.uint8)
    image[:, :, 16:24], image[:, :, 24:] = 20, 30
    found = tst.exact("Equalize", image, 0)
    assert [found[0, 1, r, 0].item() for r in (0, 16, 24)] == [0, 171, 255]
    small = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator())
    assert torch.equal(tst.exact("Equalize", small, 0), small)
    assert torch.equal(tst.exact("Invert", small, 0), 255 - small)
    v = np.random.default_rng(0).integers(40, 90, (2, 3, 32, 32))
    wanted = np.empty_like(v)
    for b, c in itertools.product(range(2), range(3)):
        hist = np.bincount(v[b, c].ravel(), minlength=256)
        step = (1024 - hist[np.nonzero(hist)[0][-1]]) // 255
        lut = np.minimum(255, (np.concatenate([[0], hist.cumsum()[:-1]]) + step // 2) // step)
        lut[0] = 0
        wanted[b, c] = lut[v[b, c]]
    assert np.array_equal(tst.exact("Equalize", torch.tensor(v, dtype=torch.uint8), 0), wanted)


def test_bytes_there_and_back():
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.full((3, 1, 1), 0.25)
    v = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=generator())
    x = tst.from_bytes(v, mean, std)
    assert x.numpy() == pytest.approx(((v / 255 - mean) / std).numpy())
    assert torch.equal(tst.to_bytes(x, mean, std), v)
    far = torch.tensor([9.0, -9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert tst.to_bytes(far, mean, std).flatten().tolist() == [255] * 3 + [0] * 3


def test_cutout():
    """Side H, anywhere: 56.25 % on average over all centres, from 25 to 100 %; one for all."""
    augmenter, x = plain_augmenter(), torch.ones(2, 3, 32, 32)
    shares = []
    for _ in range(400):
        cut = augmenter.transform(13, x, None)
        assert torch.equal(cut[0], cut[1])
        shares.append((cut[0, 0] == 0).double().mean().item())
    assert min(shares) >= 0.25 and max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.5625, abs=0.04)
    every = [(min(32, y + 16) - max(0, y - 16)) * (min(32, c + 16) - max(0, c - 16)) / 1024
             for y in range(32) for c in range(32)]
    assert (np.mean(every), min(every), max(every)) == (0.5625, 0.25, 1.0)


def test_fixed_operations_pass_no_gradient_but_their_gate_gets_one():
    for i in (11, 12, 13):
        augmenter = plain_augmenter(operations=14)
        x = torch.rand(2, 3, 16, 16, requires_grad=True)
        out = augmenter.transform(i, x, None)
        assert not out.requires_grad
        augmenter.transform = lambda j, images, *_, i=i, out=out: out if j == i else images
        augmenter(x, generator()).sum().backward()
        assert augmenter.theta_p.grad[i] != 0
        assert torch.count_nonzero(augmenter.theta_p.grad) == 1


# -------------------------------------------------------------------------------- Stage I, (11)
def smooth_images(count=256):
    noise = torch.randn(count, 3, 4, 4, generator=generator(9))
    return F.interpolate(noise, (32, 32), mode="bilinear", align_corners=False)


LIMITS = {"ShearX": 0.06, "ShearY": 0.06, "TranslateX": 0.10, "TranslateY": 0.10, "Rotate": 0.16}


def matrix_error(encoder, name):
    worst = 0
    for m in np.linspace(-1, 1, 9):
        r = math.radians(30 * m)
        A = {"ShearX": [[1, 0.3 * m, 0.3 * m], [0, 1, 0]],
             "ShearY": [[1, 0, 0], [0.3 * m, 1, 0.3 * m]],
             "TranslateX": [[1, 0, -2 * 150 / 331 * m], [0, 1, 0]],
             "TranslateY": [[1, 0, 0], [0, 1, -2 * 150 / 331 * m]],
             "Rotate": [[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0]]}[name]
        found = encoder.affine(torch.tensor([[m]], dtype=torch.float32), 0)[0].numpy()
        worst = max(worst, np.abs(found - A).max())
    return worst


@pytest.mark.parametrize("name", LIMITS)
def test_fitted_matrices_match_the_closed_forms(name):
    torch.manual_seed(1)
    encoder = tst.GeometricEncoder()
    loss = tst.fit_encoder(encoder, name, smooth_images(), *STATS, steps=500, batch_size=16,
                           generator=generator(2))
    assert math.isfinite(loss) and not any(p.requires_grad for p in encoder.parameters())
    assert matrix_error(encoder, name) < LIMITS[name]


def test_white_noise_has_no_useful_gradient():
    """The negative control of the fit."""
    torch.manual_seed(1)
    encoder, noise = tst.GeometricEncoder(), torch.randn(256, 3, 32, 32, generator=generator(3))
    tst.fit_encoder(encoder, "TranslateX", noise, *STATS, steps=300, generator=generator(2))
    assert matrix_error(encoder, "TranslateX") > 0.5


def test_brightness_is_fitted_better_than_the_identity():
    torch.manual_seed(1)
    encoder, images = tst.ColorEncoder(), smooth_images()
    loss = tst.fit_encoder(encoder, 0, images, *STATS, steps=500, batch_size=16,
                           generator=generator(2))
    nothing = tst.identity_error("Brightness", images, *STATS)
    assert loss < 0.4 * nothing
    a, d = encoder.scale_shift(torch.tensor([[-1.0], [1.0]]), 0)
    assert a[0] < a[1]  # brighter at a larger magnitude


def test_a_fit_step_is_eq_11(monkeypatch):
    """One step at rate 0: the loss that is returned, from its definition."""
    images, encoder = smooth_images(20), geometric([[1, 0.1, 0], [0, 1, 0.2]])
    with torch.no_grad():
        encoder.W.fill_(0.1)  # so that noise would show
    monkeypatch.setattr(torch, "rand", lambda *args, **flags: torch.tensor([0.57, 0.9]))
    loss = tst.fit_encoder(encoder, "Rotate", images, *STATS, steps=1, batch_size=8, lr=0.0,
                           generator=generator(5))
    x = images[torch.randint(20, (8,), generator=generator(5))]
    target = tst.exact("Rotate", tst.to_bytes(x, *STATS), 5, -1)  # floor(5.7), the coin says minus
    wanted = (encoder(x, torch.full((8, 1), -0.57), 0) - tst.from_bytes(target, *STATS))
    assert loss == pytest.approx(wanted.square().mean().item(), rel=1e-5)
    seen = []

    def watch(name, values, level, sign=1):
        seen.append((level, sign))
        return values
    monkeypatch.setattr(tst, "exact", watch)
    for rho in (0.0, 0.999, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *args, r=rho, **f: torch.tensor([r, 0.9]))
        tst.fit_encoder(tst.ColorEncoder(), "Solarize", images, *STATS, steps=1, batch_size=4)
        tst.fit_encoder(tst.ColorEncoder(), "Color", images, *STATS, steps=1, batch_size=4)
    assert seen == [(0, 1), (0, -1), (9, 1), (9, -1), (9, 1), (9, -1)]


def test_the_error_of_doing_nothing(monkeypatch):
    """The mean over all ten levels, and both signs where the operation has one."""
    v = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8))
    images = tst.from_bytes(torch.tensor(v), *STATS).float()
    wanted = np.mean([np.square((v - np.where(v >= 255 - 255 * k / 9, 255 - v, v)) / 255 / 0.25)
                      for k in range(10)])
    assert tst.identity_error("Solarize", images, *STATS) == pytest.approx(wanted, rel=1e-4)
    asked = []
    monkeypatch.setattr(tst, "exact", lambda name, values, level, sign: asked.append(
        (name, level, sign)) or values)
    for name, signs in (("Posterize", (1,)), ("Rotate", (1, -1))):
        tst.identity_error(name, images, *STATS)
        assert sorted(asked) == sorted(itertools.product([name], range(10), signs))
        asked.clear()


# --------------------------------------------------------------------------- losses, (12) to (17)
@pytest.mark.parametrize("term, student, total, d_s", [
    ("non_saturating", 0.430834, 0.748819, [[0.244875, -0.192431, -0.052444],
                                           [-0.059358, -0.026671, 0.086030]]),
    ("negative_ce", -1.236888, -0.918903, [[0.255125, -0.200486, -0.054639],
                                          [-0.285629, -0.128341, 0.413970]])])
def test_augmentation_loss_golden(term, student, total, d_s):
    t, s = tensor(T, True), tensor(S, True)
    found = tst.augmentation_loss(t, s, torch.tensor(Y), term)
    assert [part.item() for part in found] == pytest.approx([total, 0.317985, student], abs=DIGITS)
    found[0].backward()
    assert t.grad.numpy() == pytest.approx(np.array(
        [[-0.107201, 0.087645, 0.019556], [0.101489, 0.061556, -0.163045]]), abs=DIGITS)
    assert s.grad.numpy() == pytest.approx(np.array(d_s), abs=DIGITS)


def test_augmentation_loss_of_equal_logits():
    t, s = tensor(S, True), tensor(S, True)
    loss = tst.augmentation_loss(t, s, torch.tensor(Y), "negative_ce")[0]
    loss.backward()
    assert loss.item() == pytest.approx(0) and torch.allclose(t.grad, -s.grad)
    loss = tst.augmentation_loss(tensor(S), tensor(S), torch.tensor(Y))[0]
    assert loss.item() == pytest.approx(1.667722, abs=DIGITS)
    sure = torch.tensor([[60.0, 0, 0]])
    assert tst.augmentation_loss(sure, sure, torch.tensor([0]))[2].item() == pytest.approx(
        18.42, abs=0.01)


@pytest.mark.parametrize("weight, tau, total", [(1, 4, 1.656736), (0.5, 4, 1.446812),
                                                (1, 1, 1.639677)])
def test_distillation_loss_golden(weight, tau, total):
    t, s = tensor(T, True), tensor(S, True)
    loss = tst.distillation_loss(s, t, torch.tensor(Y), weight, tau)
    assert loss.item() == pytest.approx(total, abs=DIGITS)
    loss.backward()
    assert t.grad is None
    if (weight, tau) == (1, 4):
        assert s.grad.numpy() == pytest.approx(np.array(
            [[-0.423198, 0.285039, 0.138159], [0.448273, 0.222048, -0.670321]]), abs=DIGITS)
        assert tst.softened_kl(s, t, 4).item() == pytest.approx(0.026240, abs=DIGITS)


def test_the_loss_betrays_the_mistake():
    ce = -log_p(S)[[0, 1], Y].mean()
    swapped, mean, no_square = 16 * kl(S, T, 4), 16 * kl(T, S, 4) / 3, ce + kl(T, S, 4)
    for wrong, listed, right in ((swapped, 0.402480, 0.419848), (mean, 0.139949, 0.419848),
                                 (no_square, 1.263129, 1.656736)):
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - right) > 1e-2


def test_the_mean_of_halves_is_the_loss_of_the_concatenation():
    """Eq. (17): 1.417369, and D of the second half 1.178002."""
    y = torch.tensor(Y)
    first, second = (tst.distillation_loss(tensor(s), tensor(t), y).item()
                     for s, t in ((S, T), (S2, T2)))
    both = tst.distillation_loss(tensor(S + S2), tensor(T + T2), torch.cat([y, y])).item()
    assert second == pytest.approx(1.178002, abs=DIGITS)
    assert both == pytest.approx(1.417369, abs=DIGITS)
    assert both == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("batch, classes, tau, weight", [(5, 4, 4, 1), (3, 10, 1, 0.3)])
def test_losses_on_random_logits(batch, classes, tau, weight):
    random = np.random.default_rng(batch)
    t, s, y = *random.normal(0, 2, (2, batch, classes)), random.integers(0, classes, batch)
    p_T, p_S = (np.exp(log_p(z))[np.arange(batch), y] for z in (t, s))
    found = tst.augmentation_loss(tensor(t), tensor(s), torch.tensor(y))
    assert found[1].item() == pytest.approx(-np.log(p_T).mean())
    assert found[2].item() == pytest.approx(-np.log(1 - p_S + 1e-8).mean())
    loss = tst.distillation_loss(tensor(s), tensor(t), torch.tensor(y), weight, tau).item()
    assert loss == pytest.approx(-np.log(p_S).mean() + weight * tau**2 * kl(t, s, tau))
    assert tst.true_class(tensor(s), torch.tensor(y)).item() == pytest.approx(p_S.mean())


@pytest.mark.parametrize("call, word", [
    (lambda: tst.augmentation_loss(tensor(T), tensor(S), torch.tensor(Y), "sigmoid"), "sigmoid"),
    (lambda: tst.augmentation_loss(tensor(T), tensor(S[:1]), torch.tensor(Y)), r"\(1, 3\)"),
    (lambda: tst.distillation_loss(tensor(S), tensor(T)[:, :2], torch.tensor(Y)), r"\(2, 2\)"),
    (lambda: tst.distillation_loss(tensor(S), tensor(T)[:1], torch.tensor(Y)), r"\(1, 3\)"),
    (lambda: plain_augmenter(operations=0), "operations = 0"),
    (lambda: plain_augmenter(operations=15), "operations = 15"),
    (lambda: plain_augmenter().transform(14, torch.zeros(1, 3, 4, 4), None),
     "operation 14: 0 to 13"),
    (lambda: plain_augmenter().transform(-1, torch.zeros(1, 3, 4, 4), None), "operation -1"),
    (lambda: tst.Augmenter([], *STATS), "0 encoders"),
    (lambda: tst.fit_encoder(tst.ColorEncoder(), "Invert", None, *STATS), "Invert"),
    (lambda: tst.fit_encoder(tst.ColorEncoder(), 11, None, *STATS), "11"),
    (lambda: tst.fit_encoder(tst.ColorEncoder(), "Blur", None, *STATS), "Blur"),
    (lambda: tst.exact("Cutout", None, 0), "Cutout"),
    (lambda: tst.ColorEncoder()(torch.zeros(2, 3, 4, 4), torch.zeros(2)), r"\(2,\)"),
    (lambda: tst.GeometricEncoder()(torch.zeros(2, 3, 4, 4), torch.zeros(1, 1)), r"\(1, 1\)"),
    (lambda: tst.GeometricEncoder()(torch.zeros(2, 3, 4, 5), torch.zeros(2, 1)), "square"),
    (lambda: tst.relaxed_bernoulli(torch.zeros(2), 0), "temperature = 0")])
def test_wrong_input_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_plateau_golden():
    rate, previous, rates = 0.01, 999.0, []
    for loss in (2, 1.9, 1.89, 1.885, 1.95, 1.96, 1.93):
        rate, previous = tst.plateau(previous, loss, rate), loss
        rates.append(rate)
    assert rates == pytest.approx([0.01, 0.01, 0.009, 0.0081, 0.0081, 0.00729, 0.00729])


def test_learning_rates():
    exponents = [round(float(np.log10(0.1 / rate))) for rate in tst.learning_rates(0.1, 240)]
    assert exponents == [0] * 150 + [1] * 30 + [2] * 30 + [3] * 30
    drops = tst.parse_args("--dataset imagenet --device cpu".split()).drops
    exponents = [round(float(-np.log10(rate))) for rate in tst.learning_rates(1, 100, drops)]
    assert exponents == [0] * 40 + [1] * 30 + [2] * 30


# -------------------------------------------------------------------------- Stage II, (18), (19)
def test_gradients_of_theta_against_central_differences():
    """(d): float64, the same generator state each time; and (18), (19) written out."""
    torch.manual_seed(0)
    augmenter = plain_augmenter(operations=14).double()
    augmenter.temperature = 1.0  # soft enough for differences
    with torch.no_grad():
        for encoder in augmenter.encoders:
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        augmenter.theta_m.copy_(torch.randn(11))
        augmenter.theta_p.copy_(torch.randn(14))
    x, direction = torch.rand(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()

    def value():
        return (augmenter(x, generator(3)) * direction).sum()
    value().backward()
    analytic = torch.cat([augmenter.theta_m.grad, augmenter.theta_p.grad])
    numeric = []
    for theta in (augmenter.theta_m, augmenter.theta_p):
        for i in range(len(theta)):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    theta[i] += step
                    ends.append(value().item())
                    theta[i] -= step
            numeric.append((ends[0] - ends[1]) / 2e-6)
    assert analytic.numpy() == pytest.approx(np.array(numeric), rel=1e-4, abs=1e-6)
    # (19): g (1 - g) / tau_g <dL/dx~, T_i - x>, for Invert, which needs no draw
    u = torch.rand(14, generator=generator(3)).double()
    g = torch.sigmoid(augmenter.theta_p[12] + (u[12] / (1 - u[12])).log())
    inverted = augmenter.transform(12, x, None)
    wanted = g * (1 - g) * (direction * (inverted - x)).sum()
    assert augmenter.theta_p.grad[12].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_operations_not_drawn_get_no_gradient():
    augmenter = plain_augmenter(operations=4)
    seen, original = [], augmenter.transform
    augmenter.transform = lambda i, *rest: seen.append(i) or original(i, *rest) + 0.1
    augmenter(torch.rand(2, 3, 8, 8)).sum().backward()
    assert all(augmenter.theta_p.grad[i] == 0 for i in range(14) if i not in seen)
    assert all(augmenter.theta_m.grad[i] == 0 for i in range(11) if i not in seen)


class Toy(nn.Module):
    """(h): a teacher or student whose logits are (-c, c), shrunk by the mean of |x| or not."""

    def __init__(self, shrinks, c):
        super().__init__()
        self.shrinks, self.c = shrinks, c

    def forward(self, x):
        score = (x * self.c).flatten(1).sum(1)
        if self.shrinks:
            score = score * torch.exp(-x.mean((1, 2, 3)).abs())
        return torch.stack([score, -score], 1)


@pytest.mark.parametrize("exchanged", [False, True])
def test_toy_selection(exchanged):
    """Adding brightness hurts the student alone: theta_0 grows, all else stays exactly 0."""
    labels = torch.arange(16) % 2
    pattern = torch.tensor([1.0, -1, 0]).view(3, 1, 1) * (1 - 2 * labels).view(-1, 1, 1, 1)
    x = torch.randn(16, 3, 8, 8, generator=generator(1)) + pattern
    c = (x[labels == 0].mean(0) - x[labels == 1].mean(0)) / 2
    c = c / c.norm() ** 2
    augmenter = plain_augmenter(operations=14)
    augmenter.transform = lambda i, images, m, _: images + 2 * m if i == 0 else images
    teacher, student = Toy(exchanged, c), Toy(not exchanged, c)
    optimizer = torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], 0.01)
    for _ in range(200):
        loss, *_ = tst.augmentation_loss(teacher(augmenter(x)), student(augmenter(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sign = -1 if exchanged else 1
    assert sign * augmenter.theta_m[0] > 0 and sign * augmenter.theta_p[0] > 0
    assert not augmenter.theta_m[1:].any() and not augmenter.theta_p[1:].any()


# ------------------------------------------------------------------------------------------ steps
STEP = Namespace(precision="fp32", device=torch.device("cpu"), student_term="non_saturating",
                 weight=1.0, temperature=4.0, seed=0)


def networks_of_shapes():
    images, labels, _ = common.make_shapes(24, 16, 0)
    student, teacher = (common.build_model(name, 20, 16, seed) for seed, name in enumerate(
        ("resnet8x0.5", "resnet8")))
    return student, common.frozen(teacher), images.float() / 255 - 0.4, labels


def clone(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_stage_two_moves_theta_alone():
    """(a), (b): 25 trainable numbers; weights, buffers, modes and gradients of both networks."""
    student, teacher, images, labels = networks_of_shapes()
    fixed, augmenter = common.frozen(student), plain_augmenter(operations=14)
    learn = [name for name, p in augmenter.named_parameters() if p.requires_grad]
    assert learn == ["theta_m", "theta_p"]
    assert sum(p.numel() for p in augmenter.parameters() if p.requires_grad) == 25
    with torch.no_grad():  # encoders that do something
        for parameter in augmenter.encoders.parameters():
            parameter.add_(0.05)
    networks = fixed, teacher, augmenter.encoders
    before = [clone(network) for network in networks]
    search = tst.search_optimizer(augmenter)
    assert (search.defaults["lr"], search.defaults["momentum"], search.defaults["weight_decay"]
            ) == (0.01, 0.9, 0)
    draws, twin = generator(), generator()
    for _ in range(3):
        x = augmenter(images, twin)
        terms = tst.search_step(augmenter, teacher, fixed, search, images, labels, draws, STEP)
    assert all(same(clone(network), old) for network, old in zip(networks, before))
    assert all(p.grad is None for network in networks for p in network.parameters())
    assert not fixed.training and not teacher.training
    assert augmenter.theta_m.abs().min() > 0 and augmenter.theta_p.abs().min() > 0
    t, s = teacher(x).detach(), fixed(x).detach()
    _, L_T, L_S = tst.augmentation_loss(t, s, labels)
    for name, wanted in (("L_T", L_T), ("L_S", L_S), ("conf_t", tst.true_class(t, labels)),
                         ("conf_s", tst.true_class(s, labels))):
        assert terms[name].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_stage_three_moves_the_student_alone():
    """(c); eq. (17) on [x~ ; x], the student in train mode on all 2B."""
    student, teacher, images, labels = networks_of_shapes()
    first, before, twin, seen = images.flip(0) * 2, clone(teacher), copy.deepcopy(student), []
    student.register_forward_pre_hook(lambda module, inputs: seen.append(
        (inputs[0].clone(), module.training)))
    still = torch.optim.SGD(student.parameters(), 0.0)
    terms, logits = tst.train_step(student, teacher, still, images, labels,
                                   (first, labels.flip(0)), STEP)
    assert same(clone(teacher), before) and all(p.grad is None for p in teacher.parameters())
    (both, training), = seen
    assert training and torch.equal(both, torch.cat([first, images]))
    s, t, y = twin(both), teacher(both).detach(), labels.flip(0)
    loss = (tst.distillation_loss(s[:24], t[:24], y)
            + tst.distillation_loss(s[24:], t[24:], labels)) / 2
    loss.backward()
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(logits, s[24:])
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(s, torch.cat([y, labels])).item())
    assert terms["kl"].item() == pytest.approx(kl(t.numpy(), s.detach().numpy(), 4), rel=1e-3)
    assert terms["conf_t"].item() == pytest.approx(tst.true_class(t[:24], y).item())
    assert terms["conf_s"].item() == pytest.approx(tst.true_class(s[:24], y).item())
    s = copy.deepcopy(student)(images)
    terms, logits = tst.train_step(student, teacher, still, images, labels, None, STEP)
    assert torch.equal(logits, s) and terms.keys() == {"ce", "kl"}
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(s, labels).item())


# ------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("flags, word", [
    ("--operations 0", "--operations"), ("--operations 15", "--operations"),
    ("--search-at 8 --epochs 8", "--search-at 8"), ("--search-at -1", "--search-at"),
    ("--search-epochs 0", "--search-epochs"), ("--student-term ce", "--student-term"),
    ("--augment some", "--augment"), ("--gate-temperature 0", "--gate-temperature"),
    ("--fit-steps 0", "--fit-steps"), ("--teacher-weights a b", "--teacher-weights"),
    ("--temperature 0", "--temperature"), ("--augment random --search-at 1", "--search-at"),
    ("--augment none --search-epochs 1", "--search-epochs")])
def test_argument_errors_are_one_line(flags, word, capsys):
    assert word in refused("tst", flags, capsys)


def test_defaults():
    found = tst.parse_args("--dataset cifar100 --device cpu".split())
    assert (found.teacher, found.student, found.epochs, found.batch_size, found.learning_rate,
            found.weight_decay, found.momentum, found.nesterov, found.temperature, found.weight,
            found.operations, found.gate_temperature, found.fit_steps) == (
        "resnet32x4", "resnet8x4", 240, 128, 0.1, 1e-4, 0.9, True, 4, 1, 4, 0.05, 2000)
    assert tst.parse_args("--dataset imagenet --device cpu".split()).temperature == 1


@pytest.mark.parametrize("flags, at, passes", [
    ("--dataset cifar100", [30, 90], 30), ("--dataset imagenet", [10, 25], 5),
    ("--dataset imagenet --epochs 5", [0, 1], 1), ("--dataset cifar10", [1, 3], 1),
    ("--epochs 1", [0], 1), ("--epochs 9 --search-at 0 8", [0, 8], 1),
    ("--search-epochs 3", [1, 4], 3), ("--augment random", [], 0), ("--augment twice", [], 0)])
def test_schedule(flags, at, passes):
    """Every epoch of Stage III once and in order; a whole search right before some."""
    arguments = tst.parse_args(["--device", "cpu", *flags.split()])
    wanted = [[*((2, epoch, n) for n in range(passes) if epoch in at), (3, epoch, 0)]
              for epoch in range(arguments.epochs)]
    assert tst.schedule(arguments) == sum(wanted, [])


# ------------------------------------------------------------------------------------------ runs
TINY = "--epochs 3 --fit-steps 5 "
SEARCH = "--search-epochs 2 --search-at 0 1 "


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A whole run, watched: what every step got."""
    folder, steps = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        search, train, forward = tst.search_step, tst.train_step, tst.Augmenter.forward
        theta = []

        def watch_forward(augmenter, *args):
            theta[:] = [torch.cat([augmenter.theta_m, augmenter.theta_p]).detach()]
            found = forward(augmenter, *args)
            assert found.requires_grad == torch.is_grad_enabled()
            return found

        def watch_search(augmenter, teacher, student, optimizer, images, labels, *rest):
            entry = Namespace(stage=2, student=clone(student), networks=(teacher, student),
                              learning=any(p.requires_grad for p in student.parameters()),
                              training=student.training, momentum=len(optimizer.state),
                              rate=optimizer.param_groups[0]["lr"])
            found = search(augmenter, teacher, student, optimizer, images, labels, *rest)
            entry.theta, entry.loss = theta[0], (found["L_T"] + found["L_S"]).item()
            steps.append(entry)
            return found

        def watch_train(student, teacher, optimizer, images, labels, first, *rest):
            assert torch.equal(first[1], labels) and not first[0].requires_grad
            steps.append(Namespace(stage=3, student=clone(student), training=student.training,
                                   learning=all(p.requires_grad for p in student.parameters()),
                                   networks=(teacher,), labels=labels, theta=theta[0]))
            return train(student, teacher, optimizer, images, labels, first, *rest)
        patch.setattr(tst.Augmenter, "forward", watch_forward)
        patch.setattr(tst, "search_step", watch_search)
        patch.setattr(tst, "train_step", watch_train)
        printed = run("tst", folder, TINY + SEARCH)
    return Namespace(folder=folder, steps=steps, printed=printed)


def test_stages_take_turns(whole):
    """Blocks of 2 x 6 steps before epochs 0 and 1; theta moves in them alone, the student not."""
    steps = whole.steps
    assert [step.stage for step in steps] == ([2] * 12 + [3] * 6) * 2 + [3] * 6
    for before, after in itertools.pairwise(steps):
        assert same(before.student, after.student) == (before.stage == 2)
        assert torch.equal(before.theta, after.theta) == (before.stage == 3)
    assert all(step.training == step.learning == (step.stage == 3) for step in steps)
    assert all(not network.training and not any(p.requires_grad for p in network.parameters())
               for step in steps for network in step.networks)
    assert not steps[0].theta.any()
    first, second = steps[0], steps[18]
    assert first.momentum == second.momentum == 0  # (f): a new block clears momentum
    assert steps[1].momentum == 2 and second.rate == 0.01
    assert second.theta.any()  # and keeps theta


def test_the_log_and_the_25_series(whole):
    rows, steps = log(whole.folder), log(whole.folder, "steps.csv")
    assert [(row["epoch"], row["stage"], row["student_epoch"]) for row in rows] == [
        ("1", "2", "1"), ("2", "2", "1"), ("3", "3", "1"), ("4", "2", "2"), ("5", "2", "2"),
        ("6", "3", "2"), ("7", "3", "3")]
    for row in rows:
        searching = row["stage"] == "2"
        assert {name for name, value in row.items() if not value} == (
            {"ce", "kl", "train", "test"} if searching else {"L_T", "L_S"})
    assert list(steps[0]) == [
        "epoch", "step", *(f"m_{name}" for name in tst.OPERATIONS[:11]),
        *(f"q_{name}" for name in tst.OPERATIONS), "L_T", "L_S", "conf_t", "conf_s"]
    assert [(row["epoch"], row["step"]) for row in steps] == [
        ("1", "1"), ("2", "1"), ("4", "1"), ("5", "1")]
    after = torch.sigmoid(whole.steps[25].theta)  # behind the step that the last row tells of
    assert [float(steps[3][name]) for name in ("m_Rotate", "q_Brightness", "q_Cutout")] == (
        pytest.approx([after[place].item() for place in (10, 11, 24)], abs=1e-6))
    losses = [step.loss for step in whole.steps[:6]]
    assert float(steps[0]["L_T"]) + float(steps[0]["L_S"]) == pytest.approx(losses[0])
    assert float(rows[0]["L_T"]) + float(rows[0]["L_S"]) == pytest.approx(
        np.average(losses, weights=[50] * 5 + [10]), rel=1e-5)


def test_the_plateau_rule_sets_the_search_rate(run, tmp_path, monkeypatch):
    """It gets the pass before (999 in a new block) and this pass's mean loss; every block starts
    at 0.01. And every tenth step of a pass, of 13, is logged."""
    asked = []
    monkeypatch.setattr(tst, "plateau", lambda previous, loss, rate: asked.append(
        (previous, loss)) or rate / 2)
    run("tst", tmp_path, "--batch-size 20 --fit-steps 5 " + SEARCH)
    rows = [row for row in log(tmp_path) if row["stage"] == "2"]
    losses = [float(row["L_T"]) + float(row["L_S"]) for row in rows]
    assert [float(row["lr"]) for row in rows] == [0.01, 0.005] * 2
    assert sum(asked, ()) == pytest.approx(
        (999, losses[0], losses[0], losses[1], 999, losses[2], losses[2], losses[3]))
    assert [row["step"] for row in log(tmp_path, "steps.csv")] == ["1", "11"] * 4


def test_the_result(whole):
    found = result_of(whole.folder)
    assert [block["search_at"] for block in found["blocks"]] == [0, 1]
    one, two = found["blocks"]  # theta rests between the searches and behind the last
    assert one["after"][0] == two["before"][0] and two["after"][0] == found["measures"]["T_end"]
    stages = {name: sum(row["s"] for row in found["rows"] if row["stage"] == stage)
              for name, stage in (("II", 2), ("III", 3))}
    assert found["seconds_by_stage"] == {"I": pytest.approx(found["measures"]["fit"]), **{
        name: pytest.approx(value) for name, value in stages.items()}}
    assert found["images"] == {"student forward and backward": 2 * 3 * 260,
                               "teacher forward": 2 * 3 * 260,
                               "both forward and backward to the image": 4 * 260}
    assert set(found["fit_errors"]) == set(tst.OPERATIONS[:11])
    state = weights(whole.folder / "augmenter.pt")
    for key, theta in (("magnitudes", "theta_m"), ("probabilities", "theta_p")):
        assert found[key] == pytest.approx(torch.sigmoid(state[theta]).tolist())
    row = table(whole.printed)["TST"]
    for when in ("before", "after"):
        assert [float(row[f"{who}_{when}"]) for who in "TS"] == pytest.approx(
            found["blocks"][-1][when], abs=5e-4)
    assert (row["epochs"], row["k_images"], row["k_searched"]) == ("3", "1.6", "1.0")
    assert found["last_test"] == found["rows"][-1]["test"] == pytest.approx(float(row["test"]))


def test_the_picture_of_the_images(whole):
    """Rows of an image, of each operation alone at its magnitude, and of four draws of x~."""
    from PIL import Image
    with Image.open(whole.folder / "augmented.png") as picture:
        pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)
    assert pixels.shape == (3, 8 * 18 + 2, 19 * 18 + 2)
    tiles = [[pixels[:, 2 + 18 * r:18 + 18 * r, 2 + 18 * c:18 + 18 * c] for c in range(19)]
             for r in range(8)]
    for row in tiles:
        assert torch.equal(row[13], 255 - row[0])  # Invert, the twelfth of 0 to 13
        assert not torch.equal(row[15], row[16])


def test_confidences_by_hand(whole, run):
    """The end's: the saved networks on the draws of the seed, ten images a draw."""
    data = shapes_data()
    teacher, student = (common.build_model(name, 20, 16) for name in ("resnet8", "resnet8x0.5"))
    teacher.load_state_dict(weights(next(run.cache.glob("shapes-resnet8-3-*")) / "epoch-0003.pt"))
    student.load_state_dict(weights(whole.folder / "student.pt"))
    augmenter, draws, found = plain_augmenter(), generator(0), []
    augmenter.load_state_dict(weights(whole.folder / "augmenter.pt"))
    with torch.no_grad():
        for images, labels in data.test.batches(10):
            x = augmenter(images, draws)
            found.append([network.eval()(x).softmax(1)[torch.arange(10), labels].mean().item()
                          for network in (teacher, student)])
    measured = result_of(whole.folder)["measures"]
    assert [measured["T_end"], measured["S_end"]] == pytest.approx(np.mean(found, 0), abs=1e-5)
    student.train()
    again = [tst.confidences(augmenter, teacher, student, data, STEP) for _ in "ab"]
    assert again[0] == again[1] == pytest.approx([measured["T_end"], measured["S_end"]])
    assert student.training


@pytest.mark.parametrize("name, calls, left", [
    ("train_step", 15, 6), ("search_step", 12 + 9, 18)])
def test_a_stopped_run_goes_on_bit_for_bit(whole, run, tmp_path, name, calls, left):
    """In the last epoch, behind one without a search; in the second pass of the second search."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, tst, name, calls)
        run("tst", tmp_path, TINY + SEARCH)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        search, train = tst.search_step, tst.train_step
        patch.setattr(tst, "search_step", lambda *args: steps.append(2) or search(*args))
        patch.setattr(tst, "train_step", lambda *args: steps.append(3) or train(*args))
        run("tst", tmp_path, TINY + SEARCH + "--resume")
    assert len(steps) == left  # no closed pass is repeated
    for file in ("student.pt", "augmenter.pt"):
        assert same(weights(tmp_path / file), weights(whole.folder / file))
    assert log(tmp_path) == log(whole.folder)
    assert log(tmp_path, "steps.csv") == log(whole.folder, "steps.csv")
    ours, theirs = result_of(tmp_path), result_of(whole.folder)
    assert ours["blocks"] == theirs["blocks"] and ours["measures"] == theirs["measures"]


def test_compare_prints_every_control(whole, run, tmp_path, monkeypatch):
    """With equal originals in equal order; Stage I's encoders come from the cache."""
    seen, original = [], tst.train_step

    def watch(student, teacher, optimizer, images, labels, first, arguments):
        seen.append((arguments.augment, labels, first))
        return original(student, teacher, optimizer, images, labels, first, arguments)
    fitted, fit = [], tst.fitted_encoders
    monkeypatch.setattr(tst, "train_step", watch)
    monkeypatch.setattr(tst, "fit_encoder", forbidden)
    monkeypatch.setattr(tst, "fitted_encoders", lambda data, arguments: fitted.append(
        arguments.augment) or fit(data, arguments))
    found = table(run("tst", tmp_path, TINY + SEARCH + "--compare"))
    assert list(found) == ["teacher", "student alone", "TST", "kd", "kd twice", "random"]
    assert found["TST"]["test"] == table(whole.printed)["TST"]["test"]
    assert [row["k_images"] for row in found.values()] == ["0.8", "0.8", "1.6", "0.8", "1.6", "1.6"]
    assert [row["k_searched"] for row in found.values()] == ["0.0"] * 2 + ["1.0"] + ["0.0"] * 3
    assert {row["epochs"] for row in found.values()} == {"3"}
    random, none = result_of(tmp_path / "random"), result_of(tmp_path / "kd")
    assert random["probabilities"] == [0.5] * 14 and random["magnitudes"] == [0.5] * 11
    assert found["random"]["T_before"] == "-" != found["random"]["T_end"]
    assert none["images"]["student forward and backward"] == 780
    assert not (tmp_path / "kd" / "augmenter.pt").exists() and fitted == ["learned", "random"]
    orders = {kind: [labels for augment, labels, _ in seen if augment == kind]
              for kind in ("learned", "none", "twice", "random")}
    first = {kind: [half for augment, _, half in seen if augment == kind] for kind in orders}
    for kind in ("none", "twice", "random"):
        assert len(orders[kind]) == 18
        assert all(torch.equal(a, b) for a, b in zip(orders[kind], orders["learned"]))
    assert first["none"] == [None] * 18
    assert all(torch.equal(half[1], labels) for half, labels in zip(
        first["random"], orders["random"]))
    others = shapes_data().train.augmented(50, generator(tst.SEARCH))
    for half, (images, labels) in zip(first["twice"], others):  # other originals, not x~
        assert torch.equal(half[0], images) and torch.equal(half[1], labels)


def test_imagenet_is_streamed_to_the_end(run, tmp_path):
    """A tiny one: picture and confidences without all images in memory; a teacher from a file."""
    from PIL import Image
    for part, count in (("train", 6), ("val", 4)):
        for label in range(2):
            folder = tmp_path / "data" / part / f"class-{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    torch.save(common.build_model("resnet8", 2, 16, 4).state_dict(), tmp_path / "teacher.pt")
    flags = (f"--dataset imagenet --data {tmp_path / 'data'} --image-size 16 --epochs 1 "
             f"--batch-size 6 --fit-steps 5 --teacher-weights {tmp_path / 'teacher.pt'}")
    found = table(run("tst", tmp_path / "out", flags))
    assert list(found) == ["teacher", "TST"] and found["teacher"]["epochs"] == "-"
    assert (tmp_path / "out" / "augmented.png").stat().st_size > 1000


def test_a_cache_that_cannot_be_written(run, tmp_path):
    torch.save(common.build_model("resnet8", 20, 16, 4).state_dict(), tmp_path / "teacher.pt")
    (tmp_path / "file").touch()
    with pytest.raises(common.InputError, match="--cache .*file cannot be written"):
        run("tst", tmp_path / "out", f"--teacher-weights {tmp_path / 'teacher.pt'} "
                                     f"--cache {tmp_path / 'file'}")


def test_negative_ce_seeds_open_set(run, tmp_path):
    flags = "--student-term negative_ce --open-set 4 --seed 0 1 --epochs 1 --fit-steps 5"
    row = table(run("tst", tmp_path, flags))["TST, negative_ce"]
    assert "±" in row["rank1"] and "±" in row["T_after"]
    assert float(log(tmp_path / "seed-0")[0]["L_S"]) < 0


def test_a_search_raises_the_gap_on_a_fixed_student(tmp_path, run):
    """Trained networks, several passes: mean p_T - p_S on augmented held-out images goes up."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, tst, "train_step", 2 * 13 + 1)  # right behind the search
        run("tst", tmp_path, "--epochs 12 --batch-size 20 --search-at 2 --search-epochs 6 "
                             "--fit-steps 40 --teacher resnet8x0.5")
    (block,) = weights(tmp_path / "checkpoint.pt")["state"]["blocks"]
    before, after = (block[when][0] - block[when][1] for when in ("before", "after"))
    assert after > before + 0.01


def test_pictures(whole, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(common.Path(common.__file__).parent / "docs")
    figures = __import__("figures")
    figures.main(whole.folder)
    assert {path.name for path in whole.folder.glob("*.png")} == {
        "augmented.png", "operations.png", "series.png"}
