"""TST against its specification: numpy oracles written from the equations; goldens typed from the
specification, beside what the usual mistakes would give; what each stage freezes; tiny runs."""

import copy
import itertools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ce, folder_of, kl, log_p, pixels, refused, result_of, same, stopped, table, tensor,
    weights)
from PIL import Image

import common
import tst

T, S, Y = [[2, 0.5, -1], [0.3, -0.2, 1.5]], [[1, 0.8, -0.5], [0.9, 0.1, -0.3]], torch.tensor([0, 2])
(Z_T, Z_S), LABELS = np.random.default_rng(0).normal(0, 2, (2, 5, 10)), torch.arange(5) * 2
STATS = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


def near(values, digits=1e-6):  # the goldens have six decimals
    return pytest.approx(np.asarray(values, float), abs=digits)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_augmenter(kind=tst.Augmenter, **flags):
    encoders = [tst.ColorEncoder() if i < 6 else tst.GeometricEncoder() for i in range(11)]
    return kind(encoders, *STATS, **flags)


def test_the_25_numbers_and_their_gates(monkeypatch):
    """Gates: values at two temperatures, slopes by the logit, rates; u is clamped to 1e-6."""
    augmenter = plain_augmenter()
    learn = {name: p.tolist() for name, p in augmenter.named_parameters() if p.requires_grad}
    assert learn == {"theta_m": [0.0] * 11, "theta_p": [0.0] * 14}
    augmenter.theta_m.data[3], augmenter.theta_p.data[13] = 2.0, -1.0
    found = [*augmenter.series().values()]  # m, then q
    assert found == near([0.5] * 3 + [0.880797] + [0.5] * 20 + [0.268941])
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
    rate = np.array([0.5, 0.6225, 0.2689])  # of gates above 1/2: these turn at u = 1 - rate
    assert gates(1 - rate, tensor([0, 0.5, -1]), 0.05).tolist() == near([0.5] * 3, 5e-3)


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
    for seed, parameter in enumerate(encoder.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    m, epsilon = tensor([[0], [0.5], [1]]), torch.randn(3, 7, generator=generator(1)).double()
    for noise in (0, 0.01):
        z = torch.hstack([encoder.h.expand(3, 6), m]) + noise * epsilon  # (3,7)
        wanted = (z.numpy() @ encoder.W.numpy().T + encoder.b.numpy()).reshape(3, 2, 3)
        assert encoder.affine(m, noise, generator(1)).numpy() == near(wanted)


def test_color_encoder_golden_and_by_hand():
    """J mixes channels and neighbours after scale and shift; zeros, not d, outside."""
    encoder, m = tst.ColorEncoder().double().requires_grad_(False), tensor([[0], [0.5], [1]])
    random = np.random.default_rng(0)
    x, J = tensor(random.normal(size=(3, 3, 6, 6))), random.normal(size=(3, 3, 5, 5))
    assert encoder(x, m).numpy() == near(x)  # unfitted: the identity
    encoder.f.zero_()
    encoder.G[0, 10], encoder.G[1, 10] = 1, -0.5
    encoder.kappa.fill_(2)
    a_and_d = [[1, 0], [1.244919, -0.062177], [1.462117, -0.122459]]
    assert torch.hstack(encoder.scale_shift(m, 0)).numpy() == near(a_and_d)
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
            ("Contrast", 5, 1, [250, 100, 10]), ("Contrast", 5, -1, [150, 100, 70])):
        assert tst.exact(operation, image, level, sign)[0, :, 0, 0].tolist() == wanted
    dot = torch.full((1, 1, 3, 3), 13, dtype=torch.uint8)
    dot[0, 0, 1, 1] = 130  # smoothed: (8 * 13 + 5 * 130) / 13 = 58; the border stays as it is
    for sign, centre in ((1, 166), (-1, 94)):
        found = tst.exact("Sharpness", dot, 5, sign).flatten().tolist()
        assert found == [13] * 4 + [centre] + [13] * 4
    v = pixels(1, 3, 16, 16)
    for k, bits in enumerate((8, 8, 7, 7, 6, 6, 5, 5, 4, 4)):
        step, solarized = 2 ** (8 - bits), np.where(v >= 255 - 255 * k / 9, 255 - v, v)
        assert np.array_equal(tst.exact("Posterize", torch.tensor(v), k), v // step * step)
        assert np.array_equal(tst.exact("Solarize", torch.tensor(v), k), solarized)
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
    v = np.maximum(pixels(1, 3, 32, 32), 1)
    framed, centre = np.pad(v, ((0, 0), (0, 0), (32, 32), (32, 32))), (2 * np.arange(32) + 1) / 32
    n = np.stack([*np.meshgrid(centre - 1, centre - 1), np.ones((32, 32))])  # (3,32,32)
    shifts = (0, 1, 3, 4, 6, 8, 9, 11, 12, 14)  # of a translation, by level
    for level, sign in ((0, 1), (3, 1), (5, -1), (9, 1), (9, -1)):
        A = matrix(operation, sign * level / 9, sign * shifts[level] / 32)
        column, row = np.rint(((np.tensordot(A, n, 1) + 1) * 32 - 1) / 2).astype(int) + 32
        found = tst.exact(operation, torch.tensor(v), level, sign).numpy()
        assert (found != framed[:, :, row, column]).mean() < 0.01


def test_bytes_and_fixed_operations(monkeypatch):
    """Cutout at all 32 x 32 centres, one a batch: 25 to 100 % erased, 56.25 % on average."""
    small = torch.tensor(pixels(2, 3, 8, 8))
    x = tst.from_bytes(small, *STATS)
    assert x.numpy() == near((small.numpy() / 255 - 0.5) / 0.25)
    for part in (-0.4, 0, 0.4):  # of a step: rounded, not cut off
        assert torch.equal(tst.to_bytes(x + part / 255 / 0.25, *STATS), small)
    assert tst.to_bytes(tensor([[[9]], [[-9]], [[9]]]), *STATS).flatten().tolist() == [255, 0, 255]
    x.requires_grad_()
    found = [plain_augmenter().transform(i, x, None, generator(2)) for i in (11, 12, 13)]
    assert not any(out.requires_grad for out in found)
    assert torch.equal(found[0], x) and torch.equal(found[2], tst.cutout(x, generator(2)))
    assert torch.equal(found[1], tst.from_bytes(255 - small, *STATS))
    place = itertools.chain.from_iterable(itertools.product(range(32), repeat=2))
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: torch.tensor([next(place) % high]))
    shares = [(tst.cutout(torch.ones(2, 3, 32, 32)) == 0).double().mean() for _ in range(32 * 32)]
    assert (np.mean(shares), min(shares), max(shares)) == (0.5625, 0.25, 1.0)


@pytest.mark.parametrize("name, limit", [
    ("ShearX", 0.06), ("TranslateX", 0.10), ("Rotate", 0.16), ("TranslateX", math.inf),
    ("Contrast", None), ("Solarize", None)])
def test_stage_one_is_eq_11_and_meets_the_closed_forms(name, limit):
    """By one plain loop. White noise, the negative control, has no useful gradient."""
    torch.manual_seed(1)
    encoder = tst.GeometricEncoder() if limit else tst.ColorEncoder()
    fitted, draws, errors = copy.deepcopy(encoder), generator(2), []
    side = 32 if limit == math.inf else 4
    noise, steps = torch.randn(256, 3, side, side, generator=generator(9)), 500 if limit else 120
    images = F.interpolate(noise, (32, 32), mode="bilinear")
    found = tst.fit_encoder(fitted, name, images, *STATS, steps, 16, generator=generator(2))
    optimizer = torch.optim.AdamW(encoder.parameters(), 0.01, weight_decay=0)
    for _ in range(steps):
        x = images[torch.randint(256, (16,), generator=draws)]
        rho, coin = torch.rand(2, generator=draws).tolist()
        sign = 1 if coin < 0.5 or name == "Solarize" else -1
        v = tst.exact(name, tst.to_bytes(x, *STATS), math.floor(10 * rho), sign)
        target = tst.from_bytes(v, *STATS)
        loss = F.mse_loss(encoder(x, torch.full((16, 1), sign * rho), 0), target)
        errors.append([loss.item(), F.mse_loss(x, target).item()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.998
    assert found == pytest.approx(np.mean(errors[-100:], 0))
    assert same(fitted.state_dict(), encoder.state_dict())
    if limit:
        m = torch.linspace(-1, 1, 9)
        gap = fitted.affine(m[:, None], 0) - tensor([matrix(name, one) for one in m.tolist()])
        assert gap.abs().max() < limit if limit < 1 else gap.abs().max() > 0.5


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
    p_T, p_S = (np.exp(log_p(z))[np.arange(5), LABELS] for z in (Z_T, Z_S))
    L_T, L_S = -np.log(p_T).mean(), -np.log(1 - p_S + 1e-8).mean()
    L_S = L_S if term == "non_saturating" else np.log(p_S).mean()
    found = tst.augmentation_loss(tensor(Z_T), tensor(Z_S), LABELS, term)
    assert [part.item() for part in found] == near([L_T + L_S, L_T, L_S])
    confidence = tst.true_class(tensor(Z_S).requires_grad_(), LABELS)  # a measure, not a loss
    assert confidence.item() == near(p_S.mean()) and not confidence.requires_grad
    found = tst.augmentation_loss(tensor(S), tensor(S), Y, term)[0].item()
    assert found == near(1.667722 if term == "non_saturating" else 0)
    sure = tensor([[60, 0, 0]])
    assert tst.augmentation_loss(sure, sure, Y[:1])[2].item() == near(18.42, 0.01)  # bound of (13)
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
    CE, KL = ce(Z_S, LABELS), kl(Z_T, Z_S, 2)
    found = tst.distillation_loss(tensor(Z_S), tensor(Z_T), LABELS, 0.3, 2)
    assert [part.item() for part in found] == near([CE + 0.3 * 2**2 * KL, CE, KL])
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        tst.distillation_loss(tensor(S), tensor(T)[:, :1], Y)


def test_gradients_of_theta_against_central_differences():
    """(18), (19): float64, equal draws each time, ten of 14 drawn; what is not drawn gets none."""
    torch.manual_seed(0)
    augmenter = plain_augmenter(operations=10, temperature=1.0).double()  # soft gates
    for parameter in augmenter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, thetas = torch.rand(2, 3, 6, 6).double(), (augmenter.theta_m, augmenter.theta_p)
    assert torch.autograd.gradcheck(lambda *_: augmenter(x, generator(9)), thetas)
    augmenter(x, generator(9)).sum().backward()
    assert augmenter.theta_p.grad.count_nonzero() == 10


def test_plateau_golden():
    rates, losses = [0.01], (999, 2, 1.9, 1.89, 1.885, 1.95, 1.96, 1.93)
    for previous, loss in itertools.pairwise(losses):
        rates.append(tst.plateau(previous, loss, rates[-1]))
    assert rates[1:] == near([0.01, 0.01, 0.009, 0.0081, 0.0081, 0.00729, 0.00729])


@pytest.mark.parametrize("flags, wanted, rates", [
    ("cifar100", {"batch_size": 128, "weight_decay": 1e-4, "fit_steps": 2000, "momentum": 0.9,
                  "nesterov": True, "weight": 1, "temperature": 4, "operations": 4,
                  "gate_temperature": 0.05, "search_at": [30, 90], "search_epochs": 30},
     [0.1] * 150 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 30),
    ("imagenet", {"batch_size": 256, "fit_steps": 2000, "temperature": 1, "search_at": [10, 25],
                  "search_epochs": 5}, [0.3] * 40 + [0.03] * 30 + [0.003] * 30),
    ("shapes --epochs 9", {"search_at": [1, 3], "search_epochs": 1},
     [0.1] * 6 + [0.01, 0.001, 0.0001])])
def test_defaults_and_learning_rates(flags, wanted, rates, capsys):
    found = tst.parse_args(["--device", "cpu", "--dataset", *flags.split()])
    assert vars(found).items() >= wanted.items() and tst.learning_rates(found) == near(rates)
    late = refused("tst", f"--dataset {flags} --search-at {len(rates)}", capsys)
    assert f"--search-at: epochs count from 0 to {len(rates) - 1}" in late


# -------------------------------------------------------------------------------------------- runs
TINY = ("--device cpu --teacher resnet8 --student resnet8x0.5 --epochs 3 --train-fraction 0.4 "
        "--batch-size 24 --fit-steps 5 --search-epochs 3 --search-at 0 1 ")  # 104 images, 5 steps


def by_hand(folder, data, settings, augmenter, augment, known=lambda *batch: batch):
    """The algorithm in one plain loop, of which the run in `folder` has every bit; the student.

    `augmenter`: with theta = 0; `augment`: x~ and its labels; `known`: the pixels with a label.
    """
    def confidences(y, t, s):
        return {"conf_t": tst.true_class(t, y), "conf_s": tst.true_class(s, y)}
    def terms(mean):
        return {name: one for name, one in mean.row().items() if name not in ("s", "img/s")}
    result, B = result_of(folder), settings.batch_size
    method = result["arguments"]["method"]
    teacher, _ = common.network_alone("teacher", data, tst.learning_rates(settings), settings)
    teacher, student = common.folded(teacher), data.build(settings.student, 0)
    optimizer = torch.optim.SGD(student.parameters(), momentum=0.9, nesterov=True,
                                weight_decay=5e-4, fused=True)
    shuffle, aside, draws = generator(), generator(10_000), generator(20_000)
    for row, rate in zip(result["rows"], tst.learning_rates(settings), strict=True):
        # Stage II: the student is fixed; theta goes on, its momentum and rate do not
        fixed, lr, before = common.frozen(student), 0.01, 999
        search = torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], momentum=0.9)
        for one in [one for one in result["searches"] if one["before_epoch"] == row["epoch"]]:
            search.param_groups[0]["lr"], mean = lr, common.Mean()
            for images, labels in data.train.augmented(B, aside):
                x, y = augment(images, labels, draws)
                y, t, s = known(y, teacher(x), fixed(x))
                term = "negative_ce" if "negative" in method else "non_saturating"
                loss, L_T, L_S = tst.augmentation_loss(t, s, y, term)
                search.zero_grad()
                loss.backward()
                search.step()
                mean.add({"L_T": L_T, "L_S": L_S, **confidences(y, t, s)}, None, labels)
            assert {"lr": lr, **terms(mean), **augmenter.series()}.items() <= one.items()
            lr, before = tst.plateau(before, one["L_T"] + one["L_S"], lr), one["L_T"] + one["L_S"]
        # Stage III: theta is fixed; the student learns from [x~ ; x]
        others, mean = data.train.augmented(B, aside), common.Mean()
        optimizer.param_groups[0]["lr"] = rate
        for images, labels in data.train.augmented(B, shuffle):
            x, y = images[:0], labels[:0]  # kd
            if method == "kd twice":
                x, y = next(others)
            elif method != "kd":
                x, y = (half.detach() for half in augment(images, labels, draws))
            n, both = len(x), torch.cat([x, images])
            t, s = teacher(both), student.train()(both)
            truth, z_t, z_s = known(torch.cat([y, labels]), t, s)
            loss, CE, KL = tst.distillation_loss(z_s, z_t, truth, settings.weight,
                                                 settings.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = confidences(*known(y, t[:n], s[:n])) if n else {}
            mean.add({"ce": CE, "kl": KL, **first}, s[n:], labels)
        assert {"lr": rate, **terms(mean)}.items() <= row.items()
    assert same(weights(folder / "student.pt"), student.state_dict())
    assert method.startswith("kd") or same(weights(folder / "augmenter.pt"), augmenter.state_dict())
    return student


def test_compare_stopped_twice_is_the_algorithm_to_the_bit(run, tmp_path, monkeypatch):
    """In the last pass of TST's second search, and in its last epoch; the picture; the table."""
    monkeypatch.setattr(tst, "plateau", lambda before, loss, rate: rate / (1 + loss / before))
    for name, last in (("search_step", 15 + 10 + 3), ("train_step", 5 + 3)):
        monkeypatch.setattr(tst, name, Mock(wraps=getattr(tst, name)))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, tst, name, last)
            run("tst", tmp_path, TINY + "--compare")
    printed = run("tst", tmp_path, TINY + "--compare")
    assert tst.search_step.call_count == 27 + 5 + 30  # the stopped pass alone again; that of (14)
    frozen = [network for call in tst.search_step.call_args_list for network in call.args[1:3]]
    assert not any(p.requires_grad for network in frozen for p in network.parameters())
    lessons = [call.args for call in tst.train_step.call_args_list]
    assert not any(first and first[0].requires_grad for *_, first, _ in lessons)  # x~: a constant
    settings = next(common.each_seed(tst.parse_args(f"{TINY} --cache {run.cache}".split())))
    data = common.load_data(settings)
    for method in tst.METHODS:
        folder, searched = folder_of(tmp_path, method), method.startswith("TST")
        augmenter = tst.Augmenter(tst.fitted_encoders(data, settings)[0], data.mean, data.std)
        student = by_hand(folder, data, settings, augmenter,
                          lambda x, y, draws, augmenter=augmenter: (augmenter(x, draws), y))
        found = result_of(folder)
        assert found["last_test"] == common.evaluate(student, data.test, settings)
        assert [row["before_epoch"] for row in found["searches"]] == searched * [1, 1, 1, 2, 2, 2]
        assert augmenter.theta_m.any() == augmenter.theta_p.any() == searched
    tiles = np.asarray(Image.open(folder / "augmented.png"))[2:, 2:].reshape(8, 18, 19, 18, 3)
    assert np.array_equal(tiles[:, :16, 13, :16], 255 - tiles[:, :16, 0, :16])  # Invert
    assert (tiles[:, :16, 15, :16] != tiles[:, :16, 16, :16]).any()  # two draws of x~
    rows = table(printed)
    assert [*rows] == ["teacher alone", "student alone", *tst.METHODS]
    assert [(row["k_images"], row["k_searched"]) for row in rows.values()] == [
        *[("-", "-")] * 2, ("0.6", "0.6"), *[("0.6", "0.0")] * 2, ("0.3", "0.0"), ("0.6", "0.6")]
    assert rows["TST negative ce"]["conf_s"] == f"{found['rows'][2]['conf_s']:.3f}"
    assert [*found["fit_errors"]] == [*tst.OPERATIONS[:11]] and "Stage I:" not in printed
