"""TST: Teaching What You Should Teach: A Data-Based Distillation Method.

S. Shao, H. Chen, Z. Huang, L. Gong, S. Wang, X. Wu. IJCAI 2023, pp. 1351-1359,
DOI 10.24963/ijcai.2023/150, arXiv:2212.05422. Authors' code: shaoshitong/TST at f9616a2 (CODE;
nothing is copied from it).

An augmentation module of 25 numbers (a magnitude for 11 image operations, a probability for 14)
looks for images that the teacher still recognises and the student does not; the student is then
taught on those and on the originals. Stage I: small networks imitate the operations, so that their
magnitudes have gradients. Stage II, a search: the 25 numbers learn, both models fixed. Stage III:
the student learns. II and III alternate.

    symbol              in code                           shape            meaning
    x, y                images, labels                    (B,3,H,W), (B,)  normalised; H = W; ints
    theta_m, theta_p    Augmenter.theta_m, .theta_p       (11,), (14,)     all that Stage II trains
    m, q                .magnitudes(), .probabilities()   (11,), (14,)     their sigmoids
    u, g                u, gates                          (14,)            uniform draw, soft gate
    I, K                chosen, operations                K ids, int       drawn in this call; K = 4
    T_i(x; m)           .transform(i, images, m)          (B,3,H,W)        operation i on x
    x~                  augmented                         (B,3,H,W)
    t, s                teacher_logits, student_logits    (B,C)            p_T, p_S: their softmax
    tau_g, tau, w       temperature (gate, KD), weight    scalars          0.05; 4; 1
    E                   epochs                            int              of Stage III

    network    where it comes from                in a step of Stage II      of Stage III
    teacher    trained alone before, or a file    eval mode, frozen          eval mode, frozen
    student    weights drawn from --seed          a frozen copy, eval mode   train mode, learns (17)
    encoders   Stage I fits them by (11), once    frozen; they have no mode  frozen
    theta      0 at first, kept between searches  learns by (15)             used without gradient
Gradients of Stage II pass through both models and the encoders to theta. Three CPU generators of
--seed: `shuffle` has order, crops and flips of Stage III, `aside` those of the searches and of
`twice`'s other originals, `draws` what the augmenter draws. A killed run goes on after its last
epoch, or its last pass of a search.

Equations, numbered by this project (the paper's own are UNKNOWN). PAPER: in the paper, its abstract
or a published account of it. CODE: in the authors' code. READING: our choice, or a departure.

    (1)  m_i = sigmoid(theta_m,i)                                         CODE
    (2)  q_i = sigmoid(theta_p,i)                                         CODE
    (3)  g_i = sigmoid((theta_p,i + log u_i - log(1 - u_i)) / tau_g)      CODE; the logit: READING
    (4)  I = the first K of a random permutation of 0..13                 CODE
    (5)  x~ = x + sum_{i in I} g_i (T_i(x; m_i) - x)                      CODE
    (6)  z = [h ; m] + 0.01 eps;  A = reshape(W z + b, 2x3)               CODE
    (7)  T_i reads x at A n, n the pixel centres in [-1,1] and a 1        CODE
    (8)  z = [f + 0.01 eps ; m];  (s0, s1) = G z;                         CODE; one linear map:
         a = kappa (sigmoid(s0) - 1/2) + 1,  d = sigmoid(s1) - 1/2        READING
    (9)  T_i = J * (a x + d), a 5x5 convolution, no clamp                 CODE
    (10) v = clamp(floor(255 (x std + mean) + 1/2), 0, 255), and back     CODE
    (11) Stage I: mean ( T_i(x; sgn rho) - Norm(Op_i(v; sgn level[k])) )^2,
         k = min(floor(10 rho), 9), without the noise of (6), (8)         CODE; noise: READING
    (12) L_T = mean -log p_T(y | x~)                                      PAPER
    (13) L_S = mean -log(1 - p_S(y | x~) + 1e-8), the default             CODE
    (14) L_S = mean log p_S(y | x~), negative_ce                          PAPER, in words
    (15) L_II = L_T + L_S                                                 CODE
    (16) D = CE(s, y) + w tau^2 mean KL(softmax(t / tau) || softmax(s / tau))    CODE
    (17) L_III = D on the 2B batch [x~ ; x] with labels [y ; y]           CODE
    (lr) lr0 0.1^j, j = how many of 5/8, 3/4, 7/8 of the run are over     CODE (150, 180, 210;
                                                                          imagenet 0.4, 0.7)

Segmentation (--task segmentation): (12) to (17) for every pixel that has a label; networks with the
head as a 1x1 convolution, upsampled. What is not geometric in (5) comes first, then one warp:
    (20) A = [I|0] + sum_{geometric i in I} g_i (A_i - [I|0])             CODE
    (21) x~ and its labels are read at A n; outside they are unknown      CODE

Departure from the paper's words: the default student term is (13), not (14); which one made its
tables is UNKNOWN. Departures from CODE (READING): the gate's logit is theta_p, not
sigmoid(theta_p), so that q_i is the apply rate; no inner random-apply gate, no mask of zero rows;
identity start; Stage I on demand, its schedule; the teacher's own recipe; u clamped to [1e-6, 1 -
1e-6]; one CPU generator for the augmenter; float32; targets by torchvision, which rounds a few
pixels otherwise than the plain formulas; the small recipes; the controls.
Kept although odd (CODE): image-sized cutout (centre anywhere: 25 to 100 % erased), additive
residuals, positive magnitudes only, one gate a call for the whole batch, the plateau rule.
Segmentation. CODE: theta in [-10, 10], gradient clipped at 20, tau = 1, w = 1.5, searches of one
pass. READING: scenes of four shapes, networks, recipes, searches before epochs 0, E // 4, E // 2; a
cutout of a quarter of the side (CODE: 128 pixels); (13) with 1e-8 as a mean over known pixels
(CODE: 1e-10, over all pixels and classes); the KL on known, upsampled pixels, no auxiliary head.
Detection is not done.
UNKNOWN: the paper's equations, its tau_g, K, weights, schedule, pairs, all numbers, the figures'
conclusions, whether its last operation is Cutout or CutMix, whether its batch of 256 is 128 + 128,
how often Stages II and III alternate.

    python tst.py                       embedded shapes; 2 CPU cores: 40 s + 15 s of teacher
    python tst.py --compare             with its controls; 2 CPU cores: about 2 minutes
    python tst.py --augment twice       equal compute but for Stages I and II: KD on 2B originals
    python tst.py --augment random      the same, x~ without learning; none: KD, half the images
    python tst.py --open-set 5          recognition of classes never trained on
    python tst.py --task segmentation   pixels of scenes of shapes; 2 CPU cores: 2 minutes
    python tst.py --dataset cifar100    resnet32x4 -> resnet8x4, 240 epochs: not yet run
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path

from common import (
    SHAPE_NAMES, SHAPES, SMALL, Data, InputError, Mean, Network, Split, autocast, base_parser,
    compile_network, each_seed, evaluate, evaluating, folded, frozen, load_data, load_file,
    load_frozen, make_shapes, number, open_set_rows, parse, planned_runs, print_table, recognition,
    refuse_useless, run_script, save_file, sgd, sound, train_network)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CONTROLS = {  # --compare: name -> (the flags it changes, why)
    "kd": ({"augment": "none"}, "equal steps, half the images: plain KD on the originals"),
    "kd twice": ({"augment": "twice"}, "equal compute but for Stages I and II: KD on 2B originals"),
    "random": ({"augment": "random"}, "equal compute but for Stage II: theta stays 0"),
    "TST": ({"augment": "learned", "student_term": "non_saturating"}, "the method"),
}


# -------------------------------------------------------------------------- 1. losses and equations
OPERATIONS = ("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize",  # colour
              "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",  # geometric
              "Equalize", "Invert", "Cutout")  # fixed: no encoder, no magnitude
COLOR, MOVABLE = 6, 11  # operations before 6 have a colour encoder, before 11 a magnitude
UNSIGNED = ("Posterize", "Solarize")
STUDENT_TERMS = ("non_saturating", "negative_ce")
NO_LABEL = -100  # the label of a pixel that has none; F.cross_entropy leaves it out


def relaxed_bernoulli(logits, temperature=0.05, generator=None):
    """Eq. (3): soft gates in (0,1), the shape of `logits`; u is drawn from `generator` (CPU).

    u is clamped to [1e-6, 1 - 1e-6]; P(gate > 1/2) = sigmoid(logit). The gradient reaches `logits`.
    ValueError: temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: above 0")
    u = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits)
    # Eq. (3): g = sigmoid((theta_p + log u - log(1 - u)) / tau_g)
    return torch.sigmoid((logits + u.log() - (1 - u).log()) / temperature)


def augmentation_loss(teacher_logits, student_logits, labels, student_term="non_saturating"):
    """Eq. (15): (loss, teacher term, student term), scalars; logits (B,C), labels (B,).

    Gradients reach both logits. ValueError for another student term or unequal shapes.
    """
    if student_term not in STUDENT_TERMS:
        raise ValueError(f"no student term is called {student_term!r}; there are {STUDENT_TERMS}")
    same_shape(student_logits, teacher_logits)
    # Eq. (12): L_T = mean -log p_T(y | x~)
    teacher_loss = F.cross_entropy(teacher_logits, labels)
    if student_term == "non_saturating":
        # Eq. (13): L_S = mean -log(1 - p_S(y | x~) + 1e-8)
        p_S = F.softmax(student_logits, dim=1).gather(1, labels[:, None])  # (B,1)
        student_loss = -torch.log(1 - p_S + 1e-8).mean()
    else:
        # Eq. (14): L_S = -mean -log p_S(y | x~), unbounded below
        student_loss = -F.cross_entropy(student_logits, labels)
    # Eq. (15): L_II = L_T + L_S
    return teacher_loss + student_loss, teacher_loss, student_loss


def distillation_loss(student_logits, teacher_logits, labels, weight=1.0, temperature=4.0):
    """Eq. (16), a scalar; logits (B,C), labels (B,) int. Only the student gets gradients."""
    # Eq. (16): D = CE(s, y) + w tau^2 mean_b KL( softmax(t/tau) || softmax(s/tau) )
    ce = F.cross_entropy(student_logits, labels)
    return ce + weight * temperature**2 * softened_kl(student_logits, teacher_logits, temperature)


def softened_kl(student_logits, teacher_logits, temperature):
    """The KL of eq. (16) in nats, mean over the batch; the teacher's logits are constants."""
    same_shape(student_logits, teacher_logits)
    # kl_div takes the learner first and as LOG-probabilities; "batchmean" divides by B, not B C
    return F.kl_div(F.log_softmax(student_logits / temperature, dim=1),
                    F.log_softmax(teacher_logits.detach() / temperature, dim=1),
                    reduction="batchmean", log_target=True)


def same_shape(student_logits, teacher_logits):
    if student_logits.shape != teacher_logits.shape:  # broadcasting would hide it
        raise ValueError(f"logits of {tuple(student_logits.shape)} and "
                         f"{tuple(teacher_logits.shape)} must have one shape")


def true_class(logits, labels):
    """Mean probability of the true class, the confidence; logits (B,C), labels (B,)."""
    return F.softmax(logits, dim=1).gather(1, labels[:, None]).mean()


def to_bytes(images, mean, std):
    """Eq. (10), uint8: v = clamp(floor(255 (x std + mean) + 1/2), 0, 255)."""
    return (255 * (images * std + mean) + 0.5).floor().clamp(0, 255).to(torch.uint8)


def from_bytes(values, mean, std):
    """Eq. (10), back: x = (v / 255 - mean) / std."""
    return (values / 255 - mean) / std


def exact(operation, values, level, sign=1):
    """The hand-written operation at level[k], k = `level`, 0..9, sign +1 or -1: uint8 (B,3,H,W).

    torchvision's own; geometric ones sample the nearest pixel, black outside. ValueError: unknown.
    """
    if operation not in OPERATIONS[:-1]:
        raise ValueError(f"no operation is called {operation!r}; there are {OPERATIONS[:-1]}")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    factor = 1 + sign * 0.9 * level / 9
    slope = math.degrees(math.atan(sign * 0.3 * level / 9))
    shift = math.trunc(sign * 150 / 331 * level / 9 * values.shape[3])  # whole pixels
    affine = partial(tv.affine, values, 0.0, scale=1.0, interpolation=InterpolationMode.NEAREST)
    return {
        "Brightness": lambda: tv.adjust_brightness(values, factor),
        "Color": lambda: tv.adjust_saturation(values, factor),
        "Contrast": lambda: tv.adjust_contrast(values, factor),
        "Sharpness": lambda: tv.adjust_sharpness(values, factor),
        "Posterize": lambda: tv.posterize(values, 8 - round(level / 2.25)),
        "Solarize": lambda: tv.solarize(values, 255 - 255 * level / 9),
        "ShearX": lambda: affine([0, 0], shear=[slope, 0.0], center=[0, 0]),
        "ShearY": lambda: affine([0, 0], shear=[0.0, slope], center=[0, 0]),
        "TranslateX": lambda: affine([shift, 0], shear=[0.0, 0.0]),
        "TranslateY": lambda: affine([0, shift], shear=[0.0, 0.0]),
        "Rotate": lambda: tv.rotate(values, sign * 30 * level / 9, InterpolationMode.NEAREST),
        "Equalize": lambda: tv.equalize(values),
        "Invert": lambda: tv.invert(values),
    }[operation]()


def plateau(previous, loss, rate):
    """The search's learning rate after a pass of mean loss `loss`; `previous`: the pass before,
    999 at first (CODE)."""
    delta = previous - loss
    return rate * 0.9 if delta < 0.02 and abs(delta / (previous - 1e-6)) < 0.02 else rate


def learning_rates(initial, epochs, drops):
    """(lr): the rate of each epoch, ten times smaller after each share of the run in `drops`."""
    return [initial * 0.1 ** sum(e >= drop * epochs for drop in drops) for e in range(epochs)]


# --------------------------------------------------------------------------------------- 2. modules
def check_shapes(images, magnitudes):
    if magnitudes.shape != (len(images), 1) or images.shape[2] != images.shape[3]:
        raise ValueError(f"images {tuple(images.shape)} must be square, magnitudes "
                         f"{tuple(magnitudes.shape)} be ({len(images)}, 1)")


class GeometricEncoder(nn.Module):
    """Eqs. (6), (7): an operation as an affine map, itself affine in the magnitude."""

    def __init__(self):
        super().__init__()
        self.h = nn.Parameter(torch.randn(6))
        self.W = nn.Parameter(torch.zeros(6, 7))
        self.b = nn.Parameter(torch.tensor([1.0, 0, 0, 0, 1, 0]))  # the identity

    def affine(self, magnitudes, noise=0.01, generator=None):
        """Eq. (6): A (B,2,3) from magnitudes (B,1)."""
        # Eq. (6): z = [h ; m] + 0.01 eps, eps per sample;  A = reshape(W z + b, 2x3)
        z = torch.cat([self.h.expand(len(magnitudes), 6), magnitudes], 1)  # (B,7)
        if noise:
            z = z + noise * torch.randn(z.shape, generator=generator).to(z)
        return (z @ self.W.T + self.b).view(-1, 2, 3)

    def forward(self, images, magnitudes, noise=0.01, generator=None):
        check_shapes(images, magnitudes)
        # Eq. (7): the pixel (X,Y) reads x at A ((2X+1)/W - 1, (2Y+1)/H - 1, 1); zeros outside
        A = self.affine(magnitudes, noise, generator)
        grid = F.affine_grid(A, list(images.shape), align_corners=False)  # (B,H,W,2)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros",
                             align_corners=False)


class ColorEncoder(nn.Module):
    """Eqs. (8), (9): an operation as a scale, a shift and a 5x5 convolution."""

    def __init__(self):
        super().__init__()
        self.f = nn.Parameter(torch.randn(10))
        self.G = nn.Parameter(torch.zeros(2, 11))
        self.kappa = nn.Parameter(torch.tensor(1.0))
        self.J = nn.Parameter(nn.init.dirac_(torch.empty(3, 3, 5, 5)))  # the identity

    def scale_shift(self, magnitudes, noise=0.01, generator=None):
        """Eq. (8): a and d, (B,1) each, from magnitudes (B,1)."""
        # Eq. (8): z = [f + 0.01 eps ; m], eps once a call;  (s0, s1) = G z
        f = self.f + noise * torch.randn(10, generator=generator).to(self.f) if noise else self.f
        z = torch.cat([f.expand(len(magnitudes), 10), magnitudes], 1)  # (B,11)
        s0, s1 = (z @ self.G.T).split(1, dim=1)  # (B,1), (B,1)
        # Eq. (8): a = kappa (sigmoid(s0) - 1/2) + 1,  d = sigmoid(s1) - 1/2
        return self.kappa * (torch.sigmoid(s0) - 0.5) + 1, torch.sigmoid(s1) - 0.5

    def forward(self, images, magnitudes, noise=0.01, generator=None):
        check_shapes(images, magnitudes)
        a, d = (part[:, :, None, None] for part in self.scale_shift(magnitudes, noise, generator))
        # Eq. (9): T = J * (a x + d), zero padding 2
        return F.conv2d(a * images + d, self.J, padding=2)


class Augmenter(nn.Module):
    """The augmentation module, eqs. (1) to (5): 25 numbers over eleven frozen encoders.

    `encoders` in the order of OPERATIONS; mean, std (3,1,1) of the images in [0,1]; `operations`
    K of 14; `erased`: side of the cutout in that of the image. All that a call draws comes from the
    `generator` (CPU) it is given.
    """

    def __init__(self, encoders, mean, std, operations=4, temperature=0.05, erased=1.0):
        super().__init__()
        if not 1 <= operations <= len(OPERATIONS):
            raise ValueError(f"operations = {operations}: 1 to {len(OPERATIONS)}")
        if len(encoders) != MOVABLE:
            raise ValueError(f"{len(encoders)} encoders: {MOVABLE} are needed")
        self.encoders = nn.ModuleList(encoders).requires_grad_(False)
        self.theta_m = nn.Parameter(torch.zeros(MOVABLE))
        self.theta_p = nn.Parameter(torch.zeros(len(OPERATIONS)))
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1))
        self.operations, self.temperature, self.erased = operations, temperature, erased

    def magnitudes(self):
        return torch.sigmoid(self.theta_m)  # Eq. (1): m_i = sigmoid(theta_m,i), (11,)

    def probabilities(self):
        return torch.sigmoid(self.theta_p)  # Eq. (2): q_i = sigmoid(theta_p,i), (14,)

    def transform(self, i, images, magnitude, generator=None):
        """T_i(x; m) (B,3,H,W); magnitude a scalar tensor, not used from 11 on."""
        if not 0 <= i < len(OPERATIONS):
            raise ValueError(f"operation {i}: 0 to {len(OPERATIONS) - 1}")
        if i < MOVABLE:
            return self.encoders[i](images, magnitude.expand(len(images), 1), generator=generator)
        with torch.no_grad():
            if OPERATIONS[i] == "Cutout":
                return cutout(images, generator, self.erased)
            values = to_bytes(images, self.mean, self.std)  # Eq. (10)
            return from_bytes(exact(OPERATIONS[i], values, 0), self.mean, self.std).to(images)

    def forward(self, images, generator=None, labels=None):
        """x~ (B,3,H,W); of pixels' `labels` (B,H,W) both, moved alike by eqs. (20), (21).

        Draws: 14 gates, the permutation, then noise and cutout in the order of I.
        """
        gates = relaxed_bernoulli(self.theta_p, self.temperature, generator)  # (14,)
        # Eq. (4): I = first K entries of a random permutation of 0..13
        chosen = torch.randperm(len(OPERATIONS), generator=generator)[:self.operations]
        m, augmented, A = self.magnitudes(), images, torch.eye(2, 3).to(images)
        for i in chosen.tolist():
            if labels is not None and COLOR <= i < MOVABLE:
                # Eq. (20): A = [I|0] + sum_{geometric i in I} g_i (A_i - [I|0])
                A_i = self.encoders[i].affine(m[i].expand(len(images), 1), generator=generator)
                A = A + gates[i] * (A_i - torch.eye(2, 3).to(images))  # (B,2,3)
                continue
            # Eq. (5): x~ = x + sum_{i in I} g_i (T_i(x; m_i) - x); residuals are added, not chained
            T = self.transform(i, images, m[i] if i < MOVABLE else None, generator)
            augmented = augmented + gates[i] * (T - images)
        return augmented if labels is None else warp(augmented, labels, A)


def warp(images, labels, A):
    """Eq. (21): images, bilinear, zeros outside; labels, nearest, unknown outside. A (B,2,3)."""
    # Eq. (21): the pixel (X,Y) reads both at A ((2X+1)/W - 1, (2Y+1)/H - 1, 1)
    grid = F.affine_grid(A.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    codes = (labels.clamp(min=-1) + 1)[:, None].to(images)  # (B,1,H,W)
    codes = F.grid_sample(codes, grid.detach(), mode="nearest", align_corners=False)[:, 0]
    return F.grid_sample(images, grid, align_corners=False), decoded(codes)


def decoded(codes):
    """Labels from codes, which are the class + 1, and 0 where it is unknown."""
    return torch.where(codes == 0, NO_LABEL, codes.long() - 1)


def cutout(images, generator=None, erased=1.0):
    """A square of side `erased` H, centred on any pixel, set to zero, the mean colour; one a batch.
    """
    H, W = images.shape[2:]
    cy = torch.randint(H, (1,), generator=generator).item()
    cx = torch.randint(W, (1,), generator=generator).item()
    half, images = int(erased * H) // 2, images.clone()
    images[:, :, max(0, cy - half):cy + half, max(0, cx - half):cx + half] = 0
    return images


# -------------------------------------------------------------------------------------- 3. training
SEARCH, DRAWS, PICTURES = 10_000, 20_000, 30_000  # seeds apart: search batches, augmenter, display
SEARCH_RATE, MOMENTUM = 0.01, 0.9  # CODE, of a search; no weight decay
TERMS = ("ce", "kl", "L_T", "L_S", "conf_t", "conf_s", "train")  # of log.csv; some of each stage


def fit_encoder(encoder, operation, images, mean, std, steps=2000, batch_size=64, lr=1e-2,
                decay=0.998, generator=None):
    """Stage I, eq. (11): fit `encoder` to the operation of that name.

    `images` (N,3,H,W) normalised by mean, std (3,1,1), drawn with replacement by `generator` (CPU).
    Returns the mean loss of the last 100 steps; the encoder is left frozen, in place.
    """
    if operation not in OPERATIONS[:MOVABLE]:
        raise ValueError(f"no encoder for {operation!r}; there are {OPERATIONS[:MOVABLE]}")
    optimizer = torch.optim.AdamW(encoder.parameters(), lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x = images[chosen.to(images.device)]
        rho, coin = torch.rand(2, generator=generator).tolist()
        sign = 1 if operation in UNSIGNED or coin < 0.5 else -1
        level = min(math.floor(10 * rho), 9)
        target = from_bytes(exact(operation, to_bytes(x, mean, std), level, sign), mean, std)
        # Eq. (11): mean ( T_i(x; sgn rho) - Norm(Op_i(v(x); sgn level[k])) )^2
        fitted = encoder(x, torch.full((len(x), 1), sign * rho, device=x.device), noise=0.0)
        loss = F.mse_loss(fitted, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    encoder.requires_grad_(False)
    last = torch.stack(losses[-100:]).mean().item()
    if not math.isfinite(last):
        raise InputError(f"Stage I: the fit of {operation} is not finite; are the images damaged?")
    return last


def identity_error(name, images, mean, std):
    """Eq. (11) of an encoder that returns x: the mean over all levels and signs."""
    values, signs = to_bytes(images, mean, std), (1,) if name in UNSIGNED else (1, -1)
    losses = [F.mse_loss(images, from_bytes(exact(name, values, level, sign), mean, std)).item()
              for level in range(10) for sign in signs]
    return sum(losses) / len(losses)


def fitted_encoders(data, arguments):
    """Stage I: all eleven encoders, frozen, {operation: (its loss, the identity's)}, seconds.

    Cached on disk by data, seed, steps, device, versions and the source of both files.
    """
    from torchvision import __version__ as torchvision_version

    files = Path(__file__), Path(inspect.getfile(Data))  # this script, whatever its name
    sources = [file.read_bytes() for file in files]
    settings = [data.train.fingerprint(), data.image_size, data.mean, data.std, arguments.seed,
                arguments.fit_steps, arguments.batch_size, arguments.device.type,
                torch.__version__, torchvision_version, sources]
    key = hashlib.sha1(repr(settings).encode()).hexdigest()[:12]
    path = arguments.cache / f"{data.name}-encoders-{arguments.fit_steps}-{key}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        encoders = nn.ModuleList([ColorEncoder() if i < COLOR else GeometricEncoder()
                                  for i in range(MOVABLE)]).to(arguments.device)
    if not sound(path):
        try:
            arguments.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--cache {arguments.cache} cannot be written ({error.strerror}); "
                             "choose another folder") from None
        print(f"Stage I: {MOVABLE} encoders, {arguments.fit_steps} steps each; mean squared error "
              "of the fit (of doing nothing)")
        generator, errors, start = torch.Generator().manual_seed(arguments.seed), {}, time.time()
        most = 5000 if data.image_size <= 64 else 500  # large images would fill the memory
        batches = islice(data.train.augmented(arguments.batch_size, generator),
                         math.ceil(most / arguments.batch_size))
        images = torch.cat([batch for batch, _ in batches])[:most]
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
        for name, encoder in zip(OPERATIONS, encoders):
            error = fit_encoder(encoder, name, images, mean, std, arguments.fit_steps,
                                generator=generator)
            errors[name] = (error, identity_error(name, images[:500], mean, std))
            print(f"  {name:10} {errors[name][0]:8.4f} ({errors[name][1]:.4f})", flush=True)
        seconds = time.time() - start
        save_file({"encoders": encoders.state_dict(), "errors": errors, "seconds": seconds}, path)
        print(f"  {seconds:.1f} s, kept in {path}")
    kept = load_file(path)
    encoders.load_state_dict(kept["encoders"])
    return encoders.requires_grad_(False), kept["errors"], kept["seconds"]


def networks_alone(data, arguments):
    """{name: (network, its result)}, trained by cross-entropy alone, frozen, in eval mode.

    The "teacher", of which a file has no result, and with --compare the "student alone".
    """
    rates = learning_rates(arguments.learning_rate, arguments.epochs, arguments.drops)
    wanted, alone = {"teacher": (arguments.teacher, arguments.seed + 1000)}, {}
    if arguments.compare:
        wanted["student alone"] = arguments.student, arguments.seed
    for name, (model, seed) in wanted.items():
        if name == "teacher" and arguments.teacher_weights:
            alone[name] = load_frozen(model, arguments.teacher_weights[0], data, arguments), None
        else:
            result, states = train_network(model, data, rates, arguments, seed=seed,
                                           title=f"\n{name}")
            alone[name] = states[arguments.epochs], result
    return alone


def reference_rows(alone, data, arguments):
    """The table's rows of the networks trained alone."""
    trained = {"epochs": arguments.epochs, "k_images": len(data.train) * arguments.epochs / 1000,
               "k_searched": 0}
    images = arguments.task == "recognition"  # the records' accuracies are of pixels, not IoU
    return [{"run": name, "test": score(network, data.test, arguments),
             **({"best": result["best_test"] if images else None, **trained,
                 "seconds": result["seconds"]} if result else {}),
             **recognition(network, data, arguments)}
            for name, (network, result) in alone.items()]


def schedule(arguments):
    """[(stage, epoch, n)]: the epochs of Stage III, and before some the passes n of a search.

    Counted from 0. CODE: 30 passes before epochs 30 and 90 of 240; 5 before 10 and 25 of ImageNet's
    100. Other lengths, where nothing is typed: in proportion. Segmentation: one pass each.
    """
    E, released = arguments.epochs, arguments.dataset == "imagenet" and arguments.epochs == 100
    at, passes = ([10, 25], 5) if released else ([E // 8, 3 * E // 8], max(1, E // 8))
    if arguments.task == "segmentation":
        at, passes = [0, E // 4, E // 2], 1
    at, passes = arguments.search_at or at, arguments.search_epochs or passes
    plan = []
    for epoch in range(E):
        if epoch in at and arguments.augment == "learned":
            plan += [(2, epoch, n) for n in range(passes)]
        plan.append((3, epoch, 0))
    return plan


def search_step(augmenter, teacher, student, optimizer, images, labels, draws, arguments):
    """Stage II: one step of theta. `student`: a frozen copy. Returns the terms.

    Of pixels the norm of the whole gradient is clipped at 20, then theta to [-10, 10].
    """
    augmented, moved = augment(augmenter, images, labels, draws)  # (B,3,H,W), (B,)
    with autocast(arguments):  # both frozen, in eval mode: gradients pass through them to x~
        t, s = teacher(augmented).float(), student(augmented).float()  # (B,C), (B,C)
    y, t, s = known(moved, t, s)
    loss, L_T, L_S = augmentation_loss(t, s, y, arguments.student_term)  # Eq. (15)
    optimizer.zero_grad()
    loss.backward()
    thetas = augmenter.theta_m, augmenter.theta_p
    if labels.ndim > 1:
        nn.utils.clip_grad_norm_(thetas, 20.0)
    optimizer.step()
    if labels.ndim > 1:
        for theta in thetas:
            theta.data.clamp_(-10, 10)
    return {"L_T": L_T.detach(), "L_S": L_S.detach(),
            "conf_t": true_class(t.detach(), y), "conf_s": true_class(s.detach(), y)}


def train_step(student, teacher, optimizer, images, labels, first, arguments):
    """Stage III: one step of the student. Returns the terms, and the logits of the originals.

    `first`: (images, labels), the half before the originals: x~ and y; controls: others, or None.
    """
    B, both, targets = len(labels), images, labels
    if first is not None:
        both, targets = torch.cat([first[0], images]), torch.cat([first[1], labels])
    with autocast(arguments):
        with torch.no_grad():  # eval mode, see `frozen`
            t = teacher(both).float()  # (2B,C)
        s = student(both).float()  # (2B,C)
    y, z_t, z_s = known(targets, t, s)
    # Eq. (17): L_III = 1/2 D(x~) + 1/2 D(x) = D on [x~ ; x] with labels [y ; y]; of pixels the
    # halves weigh by how many are known
    loss = distillation_loss(z_s, z_t, y, arguments.weight, arguments.temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    s, z_s = s.detach(), z_s.detach()  # the terms of eq. (16) apart, without weights, for the log
    terms = {"ce": F.cross_entropy(z_s, y), "kl": softened_kl(z_s, z_t, arguments.temperature)}
    if first is not None:
        y, z_t, z_s = known(first[1], t[:B], s[:B])
        terms |= {"conf_t": true_class(z_t, y), "conf_s": true_class(z_s, y)}
    return terms, s[-B:]


def train(record, data, teacher, arguments):
    """Stages I, II and III; finish `record`. `teacher`: frozen, in eval mode.

    The record is the loop's memory. `rows`: one for each closed epoch, so their number says where
    the loop stands; `state`: plain values that grow. `restore` names what a checkpoint holds and,
    by --resume, gives each part its state of the last closed epoch; `close_epoch` prints, logs
    and saves; `finish` writes student.pt and result.json. A `Mean` averages an epoch's batches.
    """
    plan, B, seed = schedule(arguments), arguments.batch_size, arguments.seed
    rates = learning_rates(arguments.learning_rate, arguments.epochs, arguments.drops)
    student = data.build(arguments.student, seed).to(arguments.device)
    teacher = folded(teacher)
    optimizer = sgd(student.parameters(), arguments)
    shuffle = torch.Generator().manual_seed(seed)  # order, crops and flips of Stage III
    aside = torch.Generator().manual_seed(seed + SEARCH)  # those of searches, of "twice"'s others
    draws = torch.Generator().manual_seed(seed + DRAWS)  # gates, operations, cutout, noise
    parts, augmenter, errors, fit_seconds = {}, None, None, None
    if arguments.augment in ("learned", "random"):
        encoders, errors, fit_seconds = fitted_encoders(data, arguments)  # Stage I
        augmenter = Augmenter(encoders, data.mean, data.std, arguments.operations,
                              arguments.gate_temperature, ERASED[arguments.task])
        augmenter.to(arguments.device)
        search = torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], SEARCH_RATE, MOMENTUM)
        parts = {"augmenter": augmenter, "search": search}
    record.restore(student=student, optimizer=optimizer, shuffle=shuffle, aside=aside, draws=draws,
                   **parts)
    blocks = record.state.setdefault("blocks", [])  # of each search: confidences before and after
    compile_network(student, arguments)
    while (done := len(record.rows)) < len(plan):
        stage, epoch, n = plan[done]
        test, lines = None, []
        if stage == 2:  # a pass of a search: theta learns
            fixed = frozen(student)  # as the teacher is: eval mode, no gradients for its weights
            if n == 0:  # theta goes on; momentum, rate and plateau rule start again
                search.state.clear()
                search.param_groups[0]["lr"] = SEARCH_RATE
                blocks.append({"search_at": epoch, "before": confidences(
                    augmenter, teacher, fixed, data, arguments)})
            lr, mean = search.param_groups[0]["lr"], Mean()
            for images, labels in data.train.augmented(B, aside):
                terms = search_step(augmenter, teacher, fixed, search, images, labels, draws,
                                    arguments)
                mean.add(terms, None, labels)
                if mean.batches % 10 == 1:
                    lines.append({"epoch": done + 1, "step": mean.batches, **series(augmenter),
                                  **{name: float(value) for name, value in terms.items()}})
            row = mean.row()
            before = record.rows[-1]["L_T"] + record.rows[-1]["L_S"] if n else 999.0  # last pass's
            search.param_groups[0]["lr"] = plateau(before, row["L_T"] + row["L_S"], lr)
            if plan[done + 1][0] == 3:
                blocks[-1]["after"] = confidences(augmenter, teacher, fixed, data, arguments)
        else:  # Stage III: the student learns
            lr, mean = rates[epoch], Mean("the student")
            optimizer.param_groups[0]["lr"] = lr
            student.train()
            others = data.train.augmented(B, aside) if arguments.augment == "twice" else None
            for images, labels in data.train.augmented(B, shuffle):
                first = next(others) if others else None
                if augmenter is not None:
                    with torch.no_grad():  # theta does not learn here
                        first = augment(augmenter, images, labels, draws)
                terms, logits = train_step(student, teacher, optimizer, images, labels, first,
                                           arguments)
                mean.add(terms, logits, labels)
            row, test = mean.row(), score(student, data.test, arguments)
        record.close_epoch({"stage": stage, "student_epoch": epoch + 1, "lr": lr,
                            **dict.fromkeys(TERMS), **row, "test": test}, len(plan), lines)
    seconds = {stage: sum(row["s"] for row in record.rows if row["stage"] == stage)
               for stage in (2, 3)}
    taught = len(data.train) * arguments.epochs * (1 if arguments.augment == "none" else 2)
    searched = len(data.train) * (len(plan) - arguments.epochs)
    weights, found = {"student": student.state_dict()}, {}
    if augmenter is not None:
        weights["augmenter"] = augmenter.state_dict()
        found = {"fit_errors": errors, "magnitudes": augmenter.magnitudes().tolist(),
                 "probabilities": augmenter.probabilities().tolist()}
        save_grid(augmenter, data, seed + PICTURES, record.folder / "augmented.png")
    record.finish(
        weights, blocks=blocks, **found,
        seconds_by_stage={"I": fit_seconds, "II": seconds[2], "III": seconds[3]},
        images={"student forward and backward": taught, "teacher forward": taught,
                "both forward and backward to the image": searched},
        measures={**measures(student, teacher, augmenter, blocks, data, arguments),
                  "epochs": arguments.epochs, "k_images": taught / 1000,
                  "k_searched": searched / 1000, "fit": fit_seconds})


def series(augmenter):
    """The 25 numbers by name, for steps.csv."""
    return {**{f"m_{name}": m for name, m in zip(OPERATIONS, augmenter.magnitudes().tolist())},
            **{f"q_{name}": q for name, q in zip(OPERATIONS, augmenter.probabilities().tolist())}}


def confidences(augmenter, teacher, student, data, arguments):
    """[T, S]: mean true-class probability of teacher and student on augmented TEST images.

    Ten images share a draw of gates and operations; the draws are the same in every call.
    """
    draws, found = torch.Generator().manual_seed(arguments.seed), 0
    with evaluating(teacher, student):
        for images, labels in data.test.batches(10):
            augmented, y = augment(augmenter, images, labels, draws)
            with autocast(arguments):
                logits = teacher(augmented).float(), student(augmented).float()
            y, *logits = known(y, *logits)
            found += len(labels) * torch.stack([true_class(one, y) for one in logits])
    return (found / len(data.test)).tolist()


def measures(student, teacher, augmenter, blocks, data, arguments):
    """Confidences T, S before and after the last search and at the end; recognition, if any."""
    pairs = {when: blocks[-1][when] for when in ("before", "after") if blocks}
    if augmenter is not None:
        pairs["end"] = confidences(augmenter, teacher, student, data, arguments)
    return {**{f"{who}_{when}": value for when, pair in pairs.items()
               for who, value in zip("TS", pair)}, **recognition(student, data, arguments)}


def save_grid(augmenter, data, seed, path):
    """A PNG of eight rows: a training image, the 14 operations alone on it, four draws of x~.

    Of segmentation the image and the four draws, with their labels laid over.
    """
    from torchvision.utils import save_image

    draws = torch.Generator().manual_seed(seed)
    images, labels = next(data.train.augmented(8, draws))
    if labels.ndim > 1:
        pairs = [(images, labels), *(augmenter(images, draws, labels) for _ in range(4))]
        shown = torch.stack([painted(*pair, augmenter) for pair in pairs], 1).flatten(0, 1)
        return save_image(shown, path, nrow=len(pairs))
    m = [*augmenter.magnitudes(), *[None] * (len(OPERATIONS) - MOVABLE)]
    with torch.no_grad():
        columns = [images, *(augmenter.transform(i, images, m[i], draws) for i in range(len(m))),
                   *(augmenter(images, draws) for _ in range(4))]
    shown = torch.stack(columns, 1).flatten(0, 1)  # (8 * 19,3,H,W)
    save_image(to_bytes(shown, augmenter.mean, augmenter.std) / 255, path, nrow=len(columns))


# ---------------------------------------------------------------------------------- 4. segmentation
SCENES = 1000, 500  # images of four shapes, to train on and to test on
SIDES = {"shapes": 32, "voc": 128, "cityscapes": 128}  # unless --image-size says otherwise
ERASED = {"recognition": 1.0, "segmentation": 0.25}


def augment(augmenter, images, labels, draws):
    """(x~, its labels): those of images stay, those of pixels (B,H,W) move with them."""
    if labels.ndim == 1:
        return augmenter(images, draws), labels
    return augmenter(images, draws, labels)


def known(labels, *logits):
    """All P pixels that have a label: labels (P,), logits (P,C) each. Those of images as given."""
    if labels.ndim == 1:
        return labels, *logits
    where = labels >= 0  # (B,H,W)
    return labels[where], *(z.movedim(1, 3)[where] for z in logits)


def score(network, split, arguments):
    """Top-1 accuracy; of pixels intersection over union, mean over the classes. In %."""
    if arguments.task == "recognition":
        return evaluate(network, split, arguments)
    confusion = 0
    with evaluating(network), autocast(arguments):
        for images, labels in split.batches():
            y, z = known(labels, network(images))
            C = z.shape[1]
            confusion = confusion + (C * y + z.argmax(1)).bincount(minlength=C * C).view(C, C)
    confusion = confusion.cpu()  # mps knows no float64
    both = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - both
    return 100 * (both / union)[union > 0].mean().item()


class PixelNetwork(Network):
    """The head as a 1x1 convolution on the last feature map, then bilinear upsampling."""

    def forward(self, x):
        logits = F.conv2d(self.forward_features(x), self.head.weight[:, :, None, None],
                          self.head.bias)  # (B,C,h,w)
        return F.interpolate(logits, x.shape[2:], mode="bilinear")  # (B,C,H,W)


class PixelSplit(Split):
    """A Split whose labels are codes of pixels, (N,H,W) uint8; its batches have labels (B,H,W)."""

    def batches(self, batch_size=None):
        for images, codes in super().batches(batch_size):
            yield images, decoded(codes)

    def augmented(self, batch_size, generator):
        mean, std = (torch.cat([value, torch.full_like(value[:1], last)])
                     for value, last in ((self.mean, 0), (self.std, 1 / 255)))
        joined = Split(torch.cat([self.images, self.labels[:, None]], 1), self.labels, mean, std)
        for both, _ in joined.augmented(batch_size, generator):  # labels are cropped and flipped
            yield both[:, :3], decoded(both[:, 3].round())  # what the crop adds is unknown


class PixelData(Data):
    def build(self, name, seed=0):
        network = super().build(name, seed)
        return PixelNetwork(network.stem, network.stages, network.neck, network.head)


def scenes(count, size, seed):
    """Four shapes an image, each in its quarter: (N,3,S,S) uint8, codes (N,S,S) uint8.

    The hole of a hollow shape has the shape's class.
    """
    images, labels, masks = make_shapes(4 * count, size // 2, seed)
    codes = torch.where(masks, labels[:, None, None] + 2, 1)  # class 0 is the background
    tiles = torch.cat([images, codes[:, None].byte()], 1).view(count, 2, 2, 4, size // 2, size // 2)
    both = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, 4, size, size)
    return both[:, :3], both[:, 3]


def read_scenes(name, folder, size):
    """(train, test, names) of VOC 2012 or Cityscapes, as torchvision reads them, resized."""
    from torchvision import datasets
    codes = np.zeros(256, np.uint8)  # of the values in the files of labels
    try:
        if name == "voc":
            from torchvision.models.segmentation import FCN_ResNet50_Weights
            names = FCN_ResNet50_Weights.DEFAULT.meta["categories"]
            codes[:len(names)] = np.arange(len(names)) + 1  # 255, the outlines, stays unknown
            parts = [datasets.VOCSegmentation(folder, image_set=part) for part in ("train", "val")]
        else:
            kinds = [kind for kind in datasets.Cityscapes.classes if not kind.ignore_in_eval]
            names = [kind.name for kind in kinds]
            codes[[kind.id for kind in kinds]] = np.arange(len(kinds)) + 1
            parts = [datasets.Cityscapes(folder, part, target_type="semantic")
                     for part in ("train", "val")]
        read = [[(np.array(image.resize((size, size), 2)),
                  codes[np.array(labels.resize((size, size), 0))]) for image, labels in part]
                for part in parts]
        train, test = ([torch.from_numpy(np.stack(one)) for one in zip(*part)] for part in read)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name} is damaged or missing in {folder} ({error}); name the folder of "
                         "its unpacked archives with --data") from None
    return (train[0].movedim(3, 1), train[1]), (test[0].movedim(3, 1), test[1]), names


def load_scenes(arguments):
    """`load_data` for --task segmentation; --train-fraction takes images, drawn by the seed."""
    name, size = arguments.dataset, arguments.image_size or SIDES[arguments.dataset]
    if name == "shapes":
        train, test = (scenes(count, size, seed) for seed, count in enumerate(SCENES))
        names = ["background", *SHAPE_NAMES]
    else:
        train, test, names = read_scenes(name, arguments.data or Path("data"), size)
    generator = torch.Generator().manual_seed(arguments.seed)
    count = max(2, round(arguments.train_fraction * len(train[1])))
    chosen = torch.randperm(len(train[1]), generator=generator)[:count].sort().values
    train = [value[chosen] for value in train]
    pixels = train[0].float() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)
    if arguments.mean:
        mean, std = torch.tensor(arguments.mean), torch.tensor(arguments.std)
    if arguments.batch_size > count:
        raise InputError(f"--batch-size {arguments.batch_size}: only {count} training images")
    train, test = (PixelSplit(*(value.contiguous().to(arguments.device) for value in (
        *part, mean.view(3, 1, 1), std.view(3, 1, 1)))) for part in (train, test))
    print(f"{name}: {count} training, {len(test)} test images of {size}x{size}, the pixels of "
          f"{len(names)} classes; seed {arguments.seed}, {arguments.device}")
    return PixelData(name, train, None, test, None, names, size, tuple(mean.tolist()),
                     tuple(std.tolist()))


def painted(images, labels, augmenter):
    """Pixels (B,3,H,W) in [0,1], labels laid over: unknown black, the background as it is."""
    rgb = to_bytes(images.detach(), augmenter.mean, augmenter.std) / 255
    colours = torch.rand(256, 3, generator=torch.Generator().manual_seed(0)).to(rgb)
    over = colours[labels.clamp(min=0)].movedim(3, 1)
    return torch.where((labels > 0)[:, None], 0.4 * rgb + 0.6 * over,
                       rgb * (labels == 0)[:, None])


# ----------------------------------------------------------------------------------------- 5. flags
REAL = {**SMALL, "fit_steps": 500, "temperature": 4.0, "drops": (5 / 8, 3 / 4, 7 / 8)}
DEFAULTS = {  # by data set; all but nesterov and the drops of the rate (CODE) are flags
    "shapes": {**REAL, **SHAPES},
    "fashionmnist": REAL, "cifar10": REAL, "folder": REAL, "tinyimagenet": REAL,
    "cifar100": {**REAL, "teacher": "resnet32x4", "student": "resnet8x4", "epochs": 240,
                 "fit_steps": 2000, "batch_size": 128, "learning_rate": 0.1, "weight_decay": 1e-4},
    "imagenet": {**REAL, "teacher": "resnet34", "student": "resnet18", "epochs": 100,
                 "fit_steps": 2000, "batch_size": 256, "learning_rate": 0.3, "weight_decay": 1e-4,
                 "temperature": 1.0, "drops": (0.4, 0.7)},
}
SEGMENTATION = {  # what --task segmentation changes: temperature and weight are CODE's
    "shapes": {"temperature": 1.0, "weight": 1.5, "batch_size": 16},
    "voc": {**REAL, "teacher": "resnet50", "student": "resnet18", "epochs": 60, "batch_size": 16,
            "learning_rate": 0.01, "temperature": 1.0, "weight": 1.5},
}
SEGMENTATION["cityscapes"] = SEGMENTATION["voc"]
COLUMNS = {"test": ".2f", "best": ".2f", "T_before": ".3f", "S_before": ".3f", "T_after": ".3f",
           "S_after": ".3f", "T_end": ".3f", "S_end": ".3f", "rank1": ".1f", "verification": ".1f",
           "k_images": ".1f", "k_searched": ".1f", "epochs": ".0f", "fit": ".0f", "seconds": ".0f"}


def defaults(arguments):
    """The flags of a data set and a task."""
    flags = {"weight": 1.0, **DEFAULTS.get(arguments.dataset, SEGMENTATION["voc"])}
    if arguments.task == "segmentation":
        flags |= SEGMENTATION.get(arguments.dataset, {})
    return flags


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], defaults, datasets=[*DEFAULTS | SEGMENTATION])
    positive, weight = number(float, 0, low_allowed=False), number(float, 0)
    add = parser.add_argument_group("TST").add_argument
    add("--task", choices=("recognition", "segmentation"), default="recognition",
        help="segmentation: pixels of shapes, voc (VOC 2012) or cityscapes (default: recognition)")
    add("--augment", choices=("learned", "random", "none", "twice"), default="learned",
        help="random: theta stays 0, no search; none: plain KD on the originals; twice: on two "
             "batches of originals a step (default: learned)")
    add("--student-term", choices=STUDENT_TERMS, default="non_saturating",
        help="eq. (13) or (14) (default: non_saturating)")
    add("--operations", type=number(int, 1, len(OPERATIONS)), default=4, metavar="K",
        help="operations of a call, eq. (4) (default: 4)")
    add("--search-at", type=number(int, 0), nargs="+", metavar="EPOCH",
        help="epochs, from 0, that a search comes before (default: E // 8 and 3 E // 8; "
             "imagenet's 100: 10 and 25; segmentation 0, E // 4, E // 2)")
    add("--search-epochs", type=number(int, 1), metavar="N",
        help="passes over the training images of a search (default: max(1, E // 8); imagenet's "
             "100: 5; segmentation 1)")
    add("--gate-temperature", type=positive, default=0.05, metavar="TAU_G",
        help="eq. (3) (default: 0.05)")
    add("--fit-steps", type=number(int, 1), metavar="N",
        help="Stage I steps of an encoder, eq. (11) (default: 500; cifar100, imagenet 2000)")
    add("--temperature", type=positive, metavar="TAU",
        help="eq. (16) (default: 4; imagenet, segmentation 1)")
    add("--weight", type=weight, metavar="W", help="eq. (16) (default: 1; segmentation 1.5)")
    add("--compare", action="store_true", default=None,
        help=f"run the controls as well: student alone, {', '.join(CONTROLS)}; one table")
    arguments = parse(parser, argv)
    readable = SEGMENTATION if arguments.task == "segmentation" else DEFAULTS
    if arguments.dataset not in readable:
        parser.error(f"--task {arguments.task} reads {', '.join(readable)}")
    if readable is SEGMENTATION and arguments.dataset == "shapes" and (
            arguments.image_size or 0) % 2:
        parser.error("--image-size: the side of a scene of four shapes is even")
    every = arguments.compare is not None
    learned = (every or arguments.augment == "learned", "--augment learned")
    augmented = (every or arguments.augment in ("learned", "random"), "--augment learned, random")
    refuse_useless(parser, {
        "search_at": learned, "search_epochs": learned, "operations": augmented,
        "gate_temperature": augmented, "fit_steps": augmented,
        "student_term": (arguments.augment == "learned", "--augment learned"),
        "open_set": (arguments.task == "recognition", "--task recognition")})
    late = [epoch for epoch in arguments.search_at or () if epoch >= arguments.epochs]
    if late:
        parser.error(f"--search-at {late[0]}: epochs count from 0 to {arguments.epochs - 1}")
    if len(arguments.teacher_weights or ()) > 1:
        parser.error("--teacher-weights: one file, TST has one teacher")
    return arguments


def main():
    arguments, tables = parse_args(), []
    chosen = next(name for name, (flags, _) in CONTROLS.items()
                  if flags["augment"] == arguments.augment)
    if arguments.student_term != "non_saturating" and arguments.augment == "learned":
        chosen += f", {arguments.student_term}"
    for of_seed in each_seed(arguments):
        data = (load_scenes if of_seed.task == "segmentation" else load_data)(of_seed)
        runs = planned_runs(of_seed, data, chosen, CONTROLS)
        alone = networks_alone(data, of_seed)
        rows = open_set_rows(data, of_seed) + reference_rows(alone, data, of_seed)
        for name, flags, record in runs:
            if not record.result:
                train(record, data, alone["teacher"][0], flags)
            rows.append({"run": name, **record.table_row()})
        tables.append(rows)
    test = "mean IoU" if arguments.task == "segmentation" else "test accuracy"
    print_table(tables, COLUMNS, f"TST on {arguments.dataset}: last-epoch {test} (%); T, S: "
                                 "confidence of teacher, student on augmented test images")


if __name__ == "__main__":
    run_script(main)
