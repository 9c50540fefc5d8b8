"""TST against its specification: numpy oracles written from the equations; goldens typed from the
specification, beside what the usual mistakes would give; what each stage freezes; tiny runs."""

import copy
import functools
import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    ce, folder_of, forbidden, kl, log, log_p, refused, result_of, same, shapes_data, stopped, table,
    tensor, weights)
from PIL import Image

import common
import tst

T, S, Y = [[2, 0.5, -1], [0.3, -0.2, 1.5]], [[1, 0.8, -0.5], [0.9, 0.1, -0.3]], torch.tensor([0, 2])
STATS = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


def near(values, digits=1e-6):  # the goldens have six decimals
    return pytest.approx(np.asarray(values, float), abs=digits)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, low=0):
    v = np.random.default_rng(0).integers(low, 256, shape)
    return v, torch.tensor(v, dtype=torch.uint8)


def plain_augmenter(kind=tst.Augmenter, **flags):
    encoders = [tst.ColorEncoder() if i < 6 else tst.GeometricEncoder() for i in range(11)]
    return kind(encoders, *STATS, **flags)


def test_the_25_numbers_and_their_gates(monkeypatch):
    """Gates: values at two temperatures, slopes by the logit, u clamped to 1e-6, and the rate."""
    augmenter = plain_augmenter()
    learn = {name: p.tolist() for name, p in augmenter.named_parameters() if p.requires_grad}
    assert learn == {"theta_m": [0.0] * 11, "theta_p": [0.0] * 14}
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
    def transform(i, images, m, _):
        assert images is x and m.tolist() == [0.5] * 11
        return torch.full_like(x, {10: 0.8, 11: -0.4}[i])
    augmenter.transform = transform
    monkeypatch.setattr(torch, "randperm", lambda count, **__: torch.arange(count).roll(4))
    for g_a, g_b, wanted in ((0.75, 0.5, 0.35), (1, 1, 0.8 - 0.4 - 0.2), (0, 0, 0.2)):
        gates = torch.tensor([0.0] * 10 + [g_a, g_b, 0, 0])
        monkeypatch.setattr(tst, "relaxed_bernoulli", lambda *_, gates=gates: gates)
        assert augmenter(x).flatten().tolist() == near([wanted] * 12)


def test_geometric_encoder_golden_and_by_hand():
    """align_corners=True would give (1.75, 2.75, 3.75, 1) for the first offset."""
    encoder = tst.GeometricEncoder().double().requires_grad_(False)
    x, m = tensor([1, 2, 3, 4]).expand(1, 3, 4, 4), tensor([[0.7]])
    for offset, row in ((0.5, (2, 3, 4, 0)), (0.25, (1.5, 2.5, 3.5, 2)), (-0.5, (0, 1, 2, 3)),
                        (0, (1, 2, 3, 4))):  # the last: unfitted, the identity
        encoder.b[2] = offset
        assert encoder(x, m)[0, 0].numpy() == near([row] * 4)
    x, turned = tensor(np.zeros((1, 3, 5, 5))), np.zeros((5, 5))
    x[:, :, 2, 4], turned[0, 2] = 1, 1  # by a quarter: right-middle goes to top-middle
    encoder.b.copy_(tensor([0, -1, 0, 1, 0, 0]))
    assert encoder(x, m)[0, 0].numpy() == near(turned)
    h, W, b, m = (np.random.default_rng(0).normal(size=size) for size in (6, (6, 7), 6, (3, 1)))
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
    image = torch.full((1, 3, 32, 32), 10, dtype=torch.uint8)
    image[:, :, 16:24], image[:, :, 24:] = 20, 30
    assert tst.exact("Equalize", image, 0)[0, 1, [0, 16, 24], 0].tolist() == [0, 171, 255]


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
    """Cutout at all 32 x 32 centres, one a batch: 25 to 100 % erased, 56.25 % on average."""
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
    images = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear")
    tst.fit_encoder(encoder, name, images, *STATS, 500, 16, generator=generator(2))
    gap = encoder.affine(m[:, None], 0) - tensor([matrix(name, one) for one in m.tolist()])
    assert gap.abs().max() < limit if limit < 1 else gap.abs().max() > 0.5


def test_a_fit_step_is_eq_11(monkeypatch):
    """Level floor(10 rho), at most 9; the coin's sign where there is one; no noise."""
    images, encoder, exact = torch.randn(20, 3, 8, 8), tst.ColorEncoder(), tst.exact
    encoder.J.data.fill_(0.1), encoder.G.data.fill_(0.1)
    x = images[torch.randint(20, (16,), generator=generator(2))]
    target = tst.from_bytes(exact("Contrast", tst.to_bytes(x, *STATS), 5, -1), *STATS)
    wanted = [(made - target).square().mean().item()
              for made in (encoder(x, torch.full((16, 1), -0.57), 0), x)]
    found, asked = [], []
    monkeypatch.setattr(torch, "randn", forbidden)
    monkeypatch.setattr(tst, "exact", lambda *args: asked.append(args[2:]) or exact(*args))
    for name, *draw in (("Contrast", 0.57, 0.9), ("Solarize", 0.0, 0.9), ("Color", 0.0, 0.9),
                        ("Solarize", 0.999, 0.9), ("Color", 0.999, 0.1), ("Color", 1.0, 0.9)):
        monkeypatch.setattr(torch, "rand", lambda *_, draw=draw, **__: torch.tensor(draw))
        found.append(tst.fit_encoder(copy.deepcopy(encoder), name, images, *STATS, 1, 16, 0.0,
                                     generator=generator(2)))
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert asked == [(5, -1), (0, 1), (0, -1), (9, 1), (9, 1), (9, -1)]


@pytest.mark.parametrize("term, student, total, d_s", [
    ("non_saturating", 0.430834, 0.748819, [[0.244875, -0.192431, -0.052444],
                                           [-0.059358, -0.026671, 0.086030]]),
    ("negative_ce", -1.236888, -0.918903, [[0.255125, -0.200486, -0.054639],
                                          [-0.285629, -0.128341, 0.413970]])])
def test_augmentation_loss(term, student, total, d_s):
    t, s = tensor(T, True), tensor(S, True)
    found = tst.augmentation_loss(t, s, Y, term)
    assert [part.item() for part in found] == near([total, 0.317985, student])
    found[0].backward()
    d_t = [[-0.107201, 0.087645, 0.019556], [0.101489, 0.061556, -0.163045]]
    assert t.grad.numpy() == near(d_t) and s.grad.numpy() == near(d_s)
    (t, s), y = np.random.default_rng(0).normal(0, 2, (2, 5, 10)), torch.tensor([3, 0, 9, 0, 5])
    p_T, p_S = (np.exp(log_p(z))[np.arange(5), y] for z in (t, s))
    L_T, L_S = -np.log(p_T).mean(), -np.log(1 - p_S + 1e-8).mean()
    L_S = L_S if term == "non_saturating" else np.log(p_S).mean()
    found = tst.augmentation_loss(tensor(t), tensor(s), y, term)
    assert [part.item() for part in found] == near([L_T + L_S, L_T, L_S])
    assert tst.true_class(tensor(s), y).item() == near(p_S.mean())
    found = tst.augmentation_loss(tensor(S), tensor(S), Y, term)[0].item()
    assert found == near(1.667722 if term == "non_saturating" else 0)
    sure = tst.augmentation_loss(tensor([[60, 0, 0]]), tensor([[60, 0, 0]]), Y[:1])[2]
    assert sure.item() == near(18.42, 0.01)  # the bound of (13)
    for logits, name, word in ((S[:1], term, r"\(1, 3\)"), (S, "sigmoid", "sigmoid")):
        with pytest.raises(ValueError, match=word):
            tst.augmentation_loss(tensor(T), tensor(logits), Y, name)


def test_distillation_loss():
    t, s = tensor(T, True), tensor(S, True)
    for weight, tau, total in ((0.5, 4, 1.446812), (1, 1, 1.639677), (1, 4, 1.656736)):
        D, CE, KL = tst.distillation_loss(s, t, Y, weight, tau)
        assert D.item() == near(total)
    D.backward()
    assert t.grad is None and (CE.item(), KL.item()) == near((1.236888, 0.026240))
    assert s.grad.numpy() == near([[-0.423198, 0.285039, 0.138159],
                                   [0.448273, 0.222048, -0.670321]])
    # what the usual mistakes give: KL swapped, "mean", no tau^2
    assert 16 * kl(S, T, 4) == near(0.402480) and 16 * kl(T, S, 4) / 3 == near(0.139949)
    assert ce(S, Y) + kl(T, S, 4) == near(1.263129)
    # (17): the mean of D on two halves is D on both
    t2, s2 = [[1.2, 0, -0.3], [-0.5, 0.1, 2]], [[0.2, -0.1, 0.4], [-0.6, 0.5, 0.7]]
    second, *_ = tst.distillation_loss(tensor(s2), tensor(t2), Y)
    both, *_ = tst.distillation_loss(tensor(S + s2), tensor(T + t2), torch.cat([Y, Y]))
    assert (second, both, (1.656736 + second) / 2) == near((1.178002, 1.417369, 1.417369))
    (t, s), y = np.random.default_rng(0).normal(0, 2, (2, 5, 10)), torch.tensor([3, 0, 9, 0, 5])
    CE, KL = ce(s, y), kl(t, s, 2)
    found = tst.distillation_loss(tensor(s), tensor(t), y, 0.3, 2)
    assert [part.item() for part in found] == near([CE + 0.3 * 2**2 * KL, CE, KL])
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        tst.distillation_loss(tensor(S), tensor(T)[:, :1], Y)


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
    augmenter.transform = lambda i, images, m, _: images + 2 * m[0] if i == 0 else images
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


@pytest.mark.parametrize("flags, said", [
    ("--operations 15", "--operations"), ("--search-at 8 --epochs 8", "--search-at"),
    ("--gate-temperature 0", "--gate-temperature"), ("--temperature 0", "--temperature"),
    ("--method student", "--method"), ("--teacher-weights a b", "unrecognized arguments: b")])
def test_argument_errors_are_one_line(flags, said, capsys):
    assert said in refused("tst", flags, capsys)


@pytest.mark.parametrize("flags, wanted, rates", [
    ("cifar100", {"batch_size": 128, "weight_decay": 1e-4, "fit_steps": 2000, "momentum": 0.9,
                  "nesterov": True, "weight": 1, "temperature": 4, "operations": 4,
                  "gate_temperature": 0.05, "search_at": [30, 90], "search_epochs": 30},
     [0.1] * 150 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 30),
    ("imagenet", {"batch_size": 256, "fit_steps": 2000, "temperature": 1, "search_at": [10, 25],
                  "search_epochs": 5}, [0.3] * 40 + [0.03] * 30 + [0.003] * 30),
    ("shapes --epochs 9", {"search_at": [1, 3], "search_epochs": 1},
     [0.1] * 6 + [0.01, 0.001, 0.0001])])
def test_defaults_and_learning_rates(flags, wanted, rates):
    found = tst.parse_args(["--device", "cpu", "--dataset", *flags.split()])
    assert vars(found).items() >= wanted.items() and tst.learning_rates(found) == near(rates)


# -------------------------------------------------------------------------------------------- runs
TINY = "--epochs 3 --batch-size 24 --fit-steps 5 --search-epochs 3 --search-at 0 1 "  # 11 steps


def watch(patch, name, look):
    """look(*args) before each call of tst.name."""
    function = getattr(tst, name)

    @functools.wraps(function)  # of its module: this file decides no result
    def watched(*args, **kwargs):
        look(*args)
        return function(*args, **kwargs)
    patch.setattr(tst, name, watched)


def halve(patch, asked):
    """The plateau rule halves the rate, and what it was asked is in a list."""
    patch.setattr(tst, "plateau", functools.wraps(tst.plateau)(
        lambda previous, loss, rate: asked.append((previous, loss)) or rate / 2))


def same_runs(one, other):
    """Equal networks, logs and passes of searches, but for what a clock decides."""
    searches = [[{name: value for name, value in row.items() if name not in ("s", "img/s")}
                 for row in result_of(folder)["searches"]] for folder in (one, other)]
    return log(one) == log(other) and searches[0] == searches[1] and all(
        same(weights(one / name), weights(other / name)) for name in ("student.pt", "augmenter.pt"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """All METHODS, watched: the steps of each; of TST networks and optimizer as they were then."""
    found = Namespace(out=tmp_path_factory.mktemp("whole"), fits=[], asked=[],
                      steps={method: [] for method in tst.METHODS})
    def keep(name, *args):
        networks = copy.deepcopy(args[:4]) if args[-1].method == "TST" else args[:4]
        found.steps[args[-1].method].append((name, (*networks, *args[4:])))
    with pytest.MonkeyPatch.context() as patch:
        halve(patch, found.asked)
        watch(patch, "search_step", functools.partial(keep, "search_step"))
        watch(patch, "train_step", functools.partial(keep, "train_step"))
        watch(patch, "fit_encoder", lambda *args: found.fits.append(args[1]))
        found.table = table(run("tst", found.out, TINY + "--compare"))
    found.folder = folder_of(found.out, "TST")
    found.searches = [args for name, args in found.steps["TST"] if name == "search_step"]
    found.lessons = {method: [args for name, args in steps if name == "train_step"]
                     for method, steps in found.steps.items()}
    return found


def test_stages_take_turns(whole):
    """(b), (f): searches before epochs 0 and 1; theta moves in them, the student between them."""
    def modes(network):  # training, gradients
        return {network.training, *(p.requires_grad for p in network.parameters())}
    steps = whole.steps["TST"]
    searching = [name == "search_step" for name, _ in steps]
    assert searching == ([True] * 33 + [False] * 11) * 2 + [False] * 11
    students = [args[2 if search else 0] for search, (_, args) in zip(searching, steps)]
    for search, student, after, (_, args) in zip(searching, students, students[1:], steps):
        assert same(student.state_dict(), after.state_dict()) == search
        assert modes(student) == {not search} and modes(args[1]) == {False}
    for *_, labels, (augmented, y), _ in whole.lessons["TST"]:
        assert torch.equal(y, labels) and not augmented.requires_grad
    thetas = [torch.cat([args[0].theta_m, args[0].theta_p]) for args in whole.searches]
    assert not any(torch.equal(theta, after) for theta, after in itertools.pairwise(thetas))
    assert not thetas[0].any() and thetas[33].any()  # a new search keeps theta
    assert [len(whole.searches[i][3].state) for i in (0, 1, 33, 34)] == [0, 2, 0, 2]  # not momentum
    assert whole.searches[0][3].defaults.items() >= {
        "lr": 0.01, "momentum": 0.9, "weight_decay": 0, "nesterov": False}.items()


def test_a_step_of_stage_three(whole):
    """(c); eq. (17) on [x~ ; x] and [y' ; y], student in train mode; teacher without gradient."""
    *networks, images, y, (x, _), settings = whole.lessons["TST"][0]
    student, teacher, optimizer = copy.deepcopy(networks)
    graph, twin, others = [], copy.deepcopy(student), y.flip(0)
    teacher.register_forward_hook(lambda *_: graph.append(torch.is_grad_enabled()))
    both, targets = torch.cat([x, images]), torch.cat([others, y])
    terms, logits = tst.train_step(student, teacher, optimizer, images, y, (x, others), settings)
    assert graph == [False]
    s, t = twin(both), teacher(both)
    loss, ce, kl = tst.distillation_loss(s, t, targets, 1.0, 4.0)
    loss.backward()
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    conf_t, conf_s = (tst.true_class(z[:24], others) for z in (t, s))
    assert terms == {"ce": ce, "kl": kl, "conf_t": conf_t, "conf_s": conf_s}
    assert torch.equal(logits, s[24:])
    s = copy.deepcopy(student)(images)  # a control: the originals alone
    terms, logits = tst.train_step(student, teacher, optimizer, images, y, None, settings)
    _, ce, kl = tst.distillation_loss(s, teacher(images), y)
    assert torch.equal(logits, s) and terms == {"ce": ce, "kl": kl}


def test_plateau_golden():
    rates, losses = [0.01], (999, 2, 1.9, 1.89, 1.885, 1.95, 1.96, 1.93)
    for previous, loss in itertools.pairwise(losses):
        rates.append(tst.plateau(previous, loss, rates[-1]))
    assert rates[1:] == near([0.01, 0.01, 0.009, 0.0081, 0.0081, 0.00729, 0.00729])


def test_the_record_and_the_picture(whole):
    """Rates of the passes, the 25 numbers after each; an image, each operation alone, four x~."""
    found, rows = result_of(whole.folder), log(whole.folder)
    assert [float(row["lr"]) for row in rows] == near([0.1, 0.1, 0.01])
    assert [(row["before_epoch"], row["lr"]) for row in found["searches"]] == [
        (epoch, rate) for epoch in (1, 2) for rate in (0.01, 0.005, 0.0025)]
    a, b, _, c, d, _ = (row["L_T"] + row["L_S"] for row in found["searches"])
    assert whole.asked[:4] == [(999, a), (a, b), (999, c), (c, d)]
    last = common.load_weights(plain_augmenter(), whole.folder / "augmenter.pt")
    after = [args[0] for args in whole.searches[11::11]] + [last]
    for row, augmenter in zip(found["searches"], after, strict=True):
        m, q = augmenter.magnitudes().tolist(), augmenter.probabilities().tolist()
        assert [row[f"m_{name}"] for name in tst.OPERATIONS[:11]] == m
        assert [row[f"q_{name}"] for name in tst.OPERATIONS] == q
    assert found["measures"] == {"conf_t": float(rows[2]["conf_t"]), "k_images": 1.56,
                                 "conf_s": float(rows[2]["conf_s"]), "k_searched": 1.56}
    pixels = np.asarray(Image.open(whole.folder / "augmented.png"))[2:, 2:]
    tiles = pixels.reshape(8, 18, 19, 18, 3)[:, :16, :, :16]  # two pixels between them
    assert np.array_equal(tiles[:, :, 13], 255 - tiles[:, :, 0])  # Invert
    assert (tiles[:, :, 15] != tiles[:, :, 16]).any()


def test_the_rows_of_the_table(whole):
    """Equal originals in equal order for all; what the first half is; encoders are fitted once."""
    assert [*whole.table] == ["teacher alone", "student alone", *tst.METHODS]
    assert [(row["k_images"], row["k_searched"]) for row in whole.table.values()] == [
        *[("-", "-")] * 2, ("1.6", "1.6"), *[("1.6", "0.0")] * 2, ("0.8", "0.0"), ("1.6", "1.6")]
    assert whole.fits == [*tst.OPERATIONS[:11]]
    assert [len(steps) for steps in whole.steps.values()] == [99, 33, 33, 33, 99]
    for steps in whole.lessons.values():
        for args, twin in zip(steps, whole.lessons["TST"], strict=True):
            assert torch.equal(args[3], twin[3]) and torch.equal(args[4], twin[4])
    assert all(args[5] is None for args in whole.lessons["kd"])
    for args in whole.lessons["random"]:
        assert torch.equal(args[5][1], args[4]) and not torch.equal(args[5][0], args[3])
    others = shapes_data().train.augmented(24, generator(tst.SEARCH))
    for args, (images, labels) in zip(whole.lessons["kd twice"], others):  # other originals, not x~
        assert torch.equal(args[5][0], images) and torch.equal(args[5][1], labels)
    random = weights(folder_of(whole.out, "random") / "augmenter.pt")
    assert not random["theta_m"].any() and not random["theta_p"].any()
    negative = result_of(folder_of(whole.out, "TST negative ce"))["searches"]
    assert all(row["L_S"] < 0 for row in negative)


@pytest.mark.parametrize("name, call", [("train_step", 22 + 3), ("search_step", 33 + 22 + 4)])
def test_a_stopped_run_goes_on_bit_for_bit(whole, run, tmp_path, monkeypatch, name, call):
    """In the last epoch, behind one without a search; in the last pass of the second search."""
    halve(monkeypatch, [])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, tst, name, call)
        run("tst", tmp_path, TINY)
    stopped(monkeypatch, tst, name, 11 + 1, AssertionError)  # no closed pass is repeated
    run("tst", tmp_path, TINY)
    assert same_runs(folder_of(tmp_path, "TST"), whole.folder)


def test_imagenet_seeds_open_set_and_a_teacher_from_a_file(run, tmp_path):
    """Streamed: picture and confidences without all images in memory."""
    for part, label, index in itertools.product(("train", "val"), "0123", range(6)):
        path = tmp_path / part / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_bytes(40, 40, 3)[1].numpy()).save(path)
    file = tmp_path / "teacher.pt"
    torch.save(common.build_model("resnet8", 2, 16, 4).state_dict(), file)
    found = table(run("tst", tmp_path / "out", (
        f"--dataset imagenet --data {tmp_path} --image-size 16 --epochs 1 --batch-size 6 "
        f"--workers 1 --fit-steps 5 --teacher-weights {file} --seed 0 1 --open-set 2")))
    assert found["teacher alone"]["epochs"] == "-" != found["student alone"]["epochs"]
    assert all("±" in found["TST"][name] for name in ("test", "rank1", "conf_t"))
    assert (folder_of(tmp_path / "out", "TST", 1) / "augmented.png").stat().st_size > 1000
