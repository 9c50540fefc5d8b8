"""TST: Teaching What You Should Teach: A Data-Based Distillation Method.

S. Shao, H. Chen, Z. Huang, L. Gong, S. Wang, X. Wu. IJCAI 2023, pp. 1351-1359,
DOI 10.24963/ijcai.2023/150, arXiv:2212.05422. Authors' code: shaoshitong/TST at f9616a2 (CODE;
nothing is copied from it).

An augmentation module of 25 numbers (a magnitude for 11 image operations, a probability for 14)
looks for images that the teacher still recognises and the student does not; the student is then
taught on those and on the originals. Stage I: small networks imitate the operations, so that their
magnitudes have gradients. Stage II: the 25 numbers learn, both models fixed. Stage III: the student
learns. II and III alternate.

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
    (18), (19) the gradients of Stage II: see the tests                   algebra
    (lr) lr0 0.1^j, j = how many of 5/8, 3/4, 7/8 of the run are over     CODE (150, 180, 210)

From the paper's words: the default student term is (13), not (14); which one made its tables is
UNKNOWN. From CODE (READING): the gate's logit is theta_p, not sigmoid(theta_p), so that q_i is the
apply rate; no inner random-apply gate, no mask of zero rows; one linear map for two; identity
start; own Stage I schedule, no noise in the colour fit; u clamped to [1e-6, 1 - 1e-6]; one CPU
generator for gates, permutation, cutout and noise; float32, one device, no moving average of
weights; training accuracy on the original half; Stage I runs on demand (a clone of CODE without
encoder files cannot start); the targets are torchvision's, which round a few pixels of shears,
colour and sharpness otherwise than the plain formulas; all small recipes (on shapes 12 epochs at
0.1), weight decay 5e-4 there; the controls, "2B originals" being two random batches a step.
Kept although odd (CODE): image-sized cutout (centre anywhere: 25 to 100 % erased), additive
residuals, positive magnitudes only, one gate a call for the whole batch, the plateau rule. Not
copied (CODE): `SDA.lr` (never used), 75 % of the data (resnet56 pair), `only_stage_one` (resnet110
-> resnet20; it fails at its first Stage II).
UNKNOWN: the paper's equations, its tau_g, K, weights, schedule, pairs, all tables, the figures'
conclusions, whether its last operation is Cutout or CutMix, whether its batch of 256 is 128 + 128,
how often Stages II and III alternate. None of its accuracies is known to this project.

    python tst.py                       embedded shapes; 2 CPU cores: about 80 seconds
    python tst.py --compare             with its controls; 2 CPU cores: 2 to 3 minutes
    python tst.py --dataset cifar100    resnet32x4 -> resnet8x4, 240 epochs: not yet run
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from contextlib import contextmanager
from pathlib import Path

from common import (
    F, InputError, Record, autocast, base_parser, build_model, check_batch_size, check_plot,
    compile_network, describe, each_seed, embeddings, evaluate, evaluating, introduce,
    load_data, load_file, load_frozen, load_weights, make_folder, nn, number, open_set_report,
    parse, print_table, random_states, restore_random_states, run_script, save_file,
    save_weights, sgd, torch, train_network, training_seconds)

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
SMALL = {"teacher": "resnet20", "student": "resnet8x0.5", "epochs": 8, "fit_steps": 500,
         "temperature": 4.0, **RECIPE}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {**SMALL, "teacher": "resnet14", "epochs": 12, "learning_rate": 0.1},
    "fashionmnist": SMALL, "cifar10": SMALL, "folder": SMALL, "tinyimagenet": SMALL,
    "cifar100": {**SMALL, "teacher": "resnet32x4", "student": "resnet8x4", "epochs": 240,
                 "fit_steps": 2000, "batch_size": 128, "learning_rate": 0.1, "weight_decay": 1e-4},
    "imagenet": {**SMALL, "teacher": "resnet34", "student": "resnet18", "epochs": 100,
                 "fit_steps": 2000, "batch_size": 256, "learning_rate": 0.3, "weight_decay": 1e-4,
                 "temperature": 1.0},  # and CODE's searches, see parse_args
}
DROPS = (5 / 8, 3 / 4, 7 / 8)  # (lr); ImageNet: after 40 and 70 of 100 epochs (CODE)
OPERATIONS = ("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize",  # colour
              "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",  # geometric
              "Equalize", "Invert", "Cutout")  # fixed: no encoder, no magnitude
COLOR, MOVABLE = 6, 11  # operations before 6 have a colour encoder, before 11 a magnitude
UNSIGNED = ("Posterize", "Solarize")
STUDENT_TERMS = ("non_saturating", "negative_ce")
SEARCH, DRAWS, PICTURES = 10_000, 20_000, 30_000  # seeds apart: search batches, augmenter, display


# -------------------------------------------------------------------------- 1. losses and equations
def relaxed_bernoulli(logits, temperature=0.05, generator=None):
    """Eq. (3): soft gates in (0,1), the shape of `logits`; u is drawn from `generator` (CPU).

    P(gate > 1/2) = sigmoid(logit). The gradient reaches `logits`. ValueError: temperature <= 0.
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
    _same_shape(student_logits, teacher_logits)
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
    """Eq. (16), a scalar; logits (B,C), labels (B,); ValueError for unequal shapes.

    Only the student gets a gradient.
    """
    # Eq. (16): D = CE(s, y) + w tau^2 mean_b KL( softmax(t/tau) || softmax(s/tau) )
    ce = F.cross_entropy(student_logits, labels)
    return ce + weight * temperature**2 * softened_kl(student_logits, teacher_logits, temperature)


def softened_kl(student_logits, teacher_logits, temperature):
    """The KL of eq. (16) in nats, mean over the batch; the teacher's logits are constants."""
    _same_shape(student_logits, teacher_logits)
    # kl_div takes the learner first and as LOG-probabilities; "batchmean" divides by B
    return F.kl_div(F.log_softmax(student_logits / temperature, dim=1),
                    F.log_softmax(teacher_logits.detach() / temperature, dim=1),
                    reduction="batchmean", log_target=True)


def _same_shape(student_logits, teacher_logits):
    if student_logits.shape != teacher_logits.shape:  # broadcasting would hide it
        raise ValueError(f"logits of {tuple(student_logits.shape)} and "
                         f"{tuple(teacher_logits.shape)} must have one shape")


def true_class(logits, labels):
    """Mean probability of the true class, the confidence; logits (B,C), labels (B,)."""
    return F.softmax(logits, dim=1).gather(1, labels[:, None]).mean()


def to_bytes(images, mean, std):
    """Eq. (10): normalised images to uint8."""
    # Eq. (10): v = clamp(floor(255 (x std + mean) + 1/2), 0, 255)
    return (255 * (images * std + mean) + 0.5).floor().clamp(0, 255).to(torch.uint8)


def from_bytes(values, mean, std):
    """Eq. (10), back: x = (v / 255 - mean) / std."""
    return (values / 255 - mean) / std


def exact(operation, values, level, sign=1):
    """The hand-written operation at `level` 0..9 of 9, sign +1 or -1: uint8 to uint8 (B,3,H,W).

    torchvision's own; geometric ones sample the nearest pixel and leave black outside. ValueError
    for an unknown operation.
    """
    if operation not in OPERATIONS[:-1]:
        raise ValueError(f"no operation is called {operation!r}; there are {OPERATIONS[:-1]}")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    factor = 1 + sign * 0.9 * level / 9
    slope = math.degrees(math.atan(sign * 0.3 * level / 9))
    shift = math.trunc(sign * 150 / 331 * level / 9 * values.shape[3])  # whole pixels

    def affine(translate, shear, center=None):
        return tv.affine(values, angle=0.0, translate=translate, scale=1.0, shear=shear,
                         interpolation=InterpolationMode.NEAREST, center=center)

    return {
        "Brightness": lambda: tv.adjust_brightness(values, factor),
        "Color": lambda: tv.adjust_saturation(values, factor),
        "Contrast": lambda: tv.adjust_contrast(values, factor),
        "Sharpness": lambda: tv.adjust_sharpness(values, factor),
        "Posterize": lambda: tv.posterize(values, 8 - round(level / 2.25)),
        "Solarize": lambda: tv.solarize(values, 255 - 255 * level / 9),
        "ShearX": lambda: affine([0, 0], [slope, 0.0], [0, 0]),
        "ShearY": lambda: affine([0, 0], [0.0, slope], [0, 0]),
        "TranslateX": lambda: affine([shift, 0], [0.0, 0.0]),
        "TranslateY": lambda: affine([0, shift], [0.0, 0.0]),
        "Rotate": lambda: tv.rotate(values, sign * 30 * level / 9, InterpolationMode.NEAREST),
        "Equalize": lambda: tv.equalize(values),
        "Invert": lambda: tv.invert(values),
    }[operation]()


def plateau(previous, loss, rate):
    """The search's learning rate after a pass of mean loss `loss`; `previous`: the pass before,
    999 at first (CODE)."""
    delta = previous - loss
    return rate * 0.9 if delta < 0.02 and abs(delta / (previous - 1e-6)) < 0.02 else rate


def learning_rates(initial, epochs, drops=DROPS):
    """(lr): the rate of each epoch, ten times smaller after each share of the run in `drops`."""
    return [initial * 0.1 ** sum(e >= drop * epochs for drop in drops) for e in range(epochs)]


# --------------------------------------------------------------------------------------- 2. modules
def _check(images, magnitudes):
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
        _check(images, magnitudes)
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
        _check(images, magnitudes)
        a, d = (part[:, :, None, None] for part in self.scale_shift(magnitudes, noise, generator))
        # Eq. (9): T = J * (a x + d), zero padding 2
        return F.conv2d(a * images + d, self.J, padding=2)


class Augmenter(nn.Module):
    """The augmentation module, eqs. (1) to (5): 25 numbers over eleven frozen encoders.

    `encoders` in the order of OPERATIONS; mean, std (3,1,1) of the images in [0,1]; `operations`
    K of 14. Every draw comes from `generator` (CPU).
    """

    def __init__(self, encoders, mean, std, operations=4, temperature=0.05, generator=None):
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
        self.operations, self.temperature, self.generator = operations, temperature, generator

    def magnitudes(self):
        return torch.sigmoid(self.theta_m)  # Eq. (1): m_i = sigmoid(theta_m,i), (11,)

    def probabilities(self):
        return torch.sigmoid(self.theta_p)  # Eq. (2): q_i = sigmoid(theta_p,i), (14,)

    def transform(self, i, images, magnitude):
        """T_i(x; m) (B,3,H,W); magnitude a scalar tensor, not used from 11 on."""
        if not 0 <= i < len(OPERATIONS):
            raise ValueError(f"operation {i}: 0 to {len(OPERATIONS) - 1}")
        if i < MOVABLE:
            return self.encoders[i](images, magnitude.expand(len(images), 1),
                                    generator=self.generator)
        with torch.no_grad():
            if OPERATIONS[i] == "Cutout":
                return self._cutout(images)
            values = to_bytes(images, self.mean, self.std)  # Eq. (10)
            return from_bytes(exact(OPERATIONS[i], values, 0), self.mean, self.std).to(images)

    def _cutout(self, images):
        H, W = images.shape[2:]
        cy, cx = torch.randint(H, (1,), generator=self.generator).item(), torch.randint(
            W, (1,), generator=self.generator).item()
        half, erased = H // 2, images.clone()  # side S = H; zero is the mean colour
        erased[:, :, max(0, cy - half):cy + half, max(0, cx - half):cx + half] = 0
        return erased

    def forward(self, images):
        gates = relaxed_bernoulli(self.theta_p, self.temperature, self.generator)  # (14,)
        # Eq. (4): I = first K entries of a random permutation of 0..13
        chosen = torch.randperm(len(OPERATIONS), generator=self.generator)[:self.operations]
        m, augmented = self.magnitudes(), images
        for i in chosen.tolist():
            # Eq. (5): x~ = x + sum_{i in I} g_i (T_i(x; m_i) - x); residuals are added, not chained
            T = self.transform(i, images, m[i] if i < MOVABLE else None)
            augmented = augmented + gates[i] * (T - images)
        return augmented


# -------------------------------------------------------------------------------------- 3. training
def fit_encoder(encoder, operation, images, mean, std, steps=2000, batch_size=64, lr=1e-2,
                decay=0.998, generator=None):
    """Stage I, eq. (11): fit `encoder` to an operation (a name, or an index of OPERATIONS).

    `images` (N,3,H,W) normalised by mean, std (3,1,1), drawn with replacement by `generator` (CPU).
    Returns the mean loss of the last 100 steps; the encoder is left frozen, in place.
    """
    name = OPERATIONS[operation] if operation in range(MOVABLE) else operation
    if name not in OPERATIONS[:MOVABLE]:
        raise ValueError(f"no encoder for {operation!r}; there are {OPERATIONS[:MOVABLE]}")
    optimizer = torch.optim.AdamW(encoder.parameters(), lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x = images[chosen.to(images.device)]
        rho, coin = torch.rand(2, generator=generator).tolist()
        sign = 1 if name in UNSIGNED or coin < 0.5 else -1
        level = min(math.floor(10 * rho), 9)
        target = from_bytes(exact(name, to_bytes(x, mean, std), level, sign), mean, std)
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
        raise InputError(f"Stage I: the fit of {name} is not finite; are the images damaged?")
    return last


def fitted_encoders(data, arguments):
    """Stage I: all eleven encoders, frozen, {operation: (its loss, the identity's)}, seconds.

    Cached on disk by data, seed, steps, device, versions and the source of both files.
    """
    from torchvision import __version__ as torchvision_version

    sources = [Path(__file__).with_name(name).read_bytes() for name in ("tst.py", "common.py")]
    settings = [data.train.fingerprint(), data.image_size, data.mean, data.std, arguments.seed,
                arguments.fit_steps, arguments.batch_size, arguments.device.type,
                torch.__version__, torchvision_version, sources]
    key = hashlib.sha1(repr(settings).encode()).hexdigest()[:12]
    path = arguments.cache / f"{data.name}-encoders-{arguments.fit_steps}-{key}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        encoders = nn.ModuleList([ColorEncoder() if i < COLOR else GeometricEncoder()
                                  for i in range(MOVABLE)]).to(arguments.device)
    make_folder(arguments.cache, "--cache")
    if not path.exists():
        print(f"Stage I: {MOVABLE} encoders, {arguments.fit_steps} steps each; mean squared error "
              "of the fit (of doing nothing)")
        generator, images, start = torch.Generator().manual_seed(arguments.seed), [], time.time()
        most = 5000 if data.image_size <= 64 else 500  # large images would fill the memory
        for batch, _ in data.train.augmented(arguments.batch_size, generator):
            images.append(batch)
            if sum(map(len, images)) >= most:
                break
        images, errors = torch.cat(images)[:most], {}
        mean, std = (torch.tensor(value, device=arguments.device).view(3, 1, 1)
                     for value in (data.mean, data.std))
        for name, encoder in zip(OPERATIONS, encoders):
            error = fit_encoder(encoder, name, images, mean, std, arguments.fit_steps,
                                generator=generator)
            errors[name] = (error, identity_error(name, images[:500], mean, std))
            print(f"  {name:10} {errors[name][0]:8.4f} ({errors[name][1]:.4f})", flush=True)
        save_file({"encoders": encoders.state_dict(), "errors": errors,
                   "seconds": time.time() - start}, path)
        print(f"  {time.time() - start:.1f} s, kept in {path}")
    kept = load_file(path)
    try:
        encoders.load_state_dict(kept["encoders"])
        return encoders.requires_grad_(False), kept["errors"], kept["seconds"]
    except (RuntimeError, LookupError, TypeError):
        raise InputError(f"{path} does not hold Stage I's encoders; remove it") from None


def identity_error(name, images, mean, std):
    """Eq. (11) of an encoder that returns x: the mean over all levels and signs."""
    values, signs = to_bytes(images, mean, std), (1,) if name in UNSIGNED else (1, -1)
    losses = [F.mse_loss(images, from_bytes(exact(name, values, level, sign), mean, std)).item()
              for level in range(10) for sign in signs]
    return sum(losses) / len(losses)


@contextmanager
def held(student):
    """Stage II: the student in eval mode, its parameters fixed; then in train mode, learning."""
    student.eval().requires_grad_(False)
    try:
        yield
    finally:
        student.train().requires_grad_(True)


def search_step(augmenter, teacher, student, optimizer, images, labels, arguments):
    """Stage II, one step of theta. Gradients pass through both fixed models to x~."""
    augmented = augmenter(images)  # (B,3,H,W)
    with autocast(arguments):
        t, s = teacher(augmented).float(), student(augmented).float()  # (B,C), (B,C)
    loss, L_T, L_S = augmentation_loss(t, s, labels, arguments.student_term)  # Eq. (15)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"L_T": L_T, "L_S": L_S, "conf_t": true_class(t.detach(), labels),
            "conf_s": true_class(s.detach(), labels)}


def train_step(student, teacher, augmenter, optimizer, images, labels, arguments, further=None):
    """Stage III, one step of the student. Returns the terms, and the logits of the originals.

    `augmenter` None: originals alone; `further`: (images, labels) that take the place of x~.
    """
    B = len(labels)
    with torch.no_grad():
        if augmenter is not None:
            further = augmenter(images), labels
        both, targets = images, labels
        if further is not None:  # the augmented half first
            both, targets = torch.cat([further[0], images]), torch.cat([further[1], labels])
        with autocast(arguments):
            t = teacher(both).float()  # (2B,C)
    with autocast(arguments):
        s = student(both).float()  # (2B,C)
    # Eq. (17): L_III = 1/2 D(x~) + 1/2 D(x) = D on [x~ ; x] with labels [y ; y]
    loss = distillation_loss(s, t, targets, arguments.weight, arguments.temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    terms = {"conf_t": None, "conf_s": None}
    with torch.no_grad():
        terms |= {"ce": F.cross_entropy(s, targets),
                  "kl": softened_kl(s, t, arguments.temperature)}
        if augmenter is not None:
            terms |= {"conf_t": true_class(t[:B], labels), "conf_s": true_class(s[:B], labels)}
    return terms, s[-B:]


def log_row(step, epoch, stage, terms, augmenter):
    """A row of log.csv: the loss terms and the 25 series."""
    def value(name):
        return float(torch.as_tensor(terms[name]).detach()) if terms.get(name) is not None else None

    row = {"step": step, "epoch": epoch, "stage": stage, "teacher_term": value("L_T"),
           "student_term": value("L_S"), "conf_teacher": value("conf_t"),
           "conf_student": value("conf_s")}
    if augmenter is not None:
        row |= {f"m_{name}": m for name, m in zip(OPERATIONS, augmenter.magnitudes().tolist())}
        row |= {f"q_{name}": q for name, q in zip(OPERATIONS, augmenter.probabilities().tolist())}
    return row


def confidences(augmenter, teacher, student, data, arguments):
    """Mean true-class probability of teacher and student on augmented TEST images.

    Ten images share a draw of gates and operations. The draws are the same in every call, and do
    not touch the augmenter's own generator.
    """
    kept, augmenter.generator = augmenter.generator, torch.Generator().manual_seed(arguments.seed)
    found = torch.zeros(2, device=arguments.device)
    with evaluating(teacher, student):
        for images, labels in data.test.batches(10):
            augmented = augmenter(images)
            with autocast(arguments):
                logits = teacher(augmented).float(), student(augmented).float()
            found += len(labels) * torch.stack([true_class(one, labels) for one in logits])
    augmenter.generator = kept
    return (found / len(data.test)).tolist()


def distill(student, teacher, augmenter, data, run, record):
    """Section 5: Stages II and III by turns, in place. `augmenter` None for the controls.

    Returns the search blocks: {"search_at" (from 0), "before", "after"}, see `confidences`.
    """
    E, rates = run.epochs, learning_rates(run.learning_rate, run.epochs, run.drops)
    steps = len(data.train) // run.batch_size
    learned = run.augment == "learned"
    plan = []  # (stage, epoch, which of the block's passes)
    for epoch in range(E):
        if learned and epoch in run.search_at:
            plan += [(2, epoch, number) for number in range(run.search_epochs)]
        plan.append((3, epoch, 0))
    optimizer = sgd(student.parameters(), run)
    loader = torch.Generator().manual_seed(run.seed)
    aside = torch.Generator().manual_seed(run.seed + SEARCH)  # the search's own batches
    search, place, step, blocks, previous = None, 0, 0, [], 999.0
    if record.state:
        state = record.state
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"], loader)
        aside.set_state(state["aside"])
        place, step, blocks, previous = (state[k] for k in ("place", "step", "blocks", "previous"))
        if augmenter is not None:
            augmenter.load_state_dict(state["augmenter"])
            augmenter.generator.set_state(state["draws"])
        if state["search"]:
            search = search_optimizer(augmenter)
            search.load_state_dict(state["search"])
    compile_network(student, run)
    record.begin(len(plan))
    for place in range(place, len(plan)):  # noqa: B020  (a resumed run starts in its middle)
        stage, epoch, number = plan[place]
        lines, terms = [], {}
        if stage == 2:
            if number == 0:  # a new block: theta stays, momentum and the plateau rule start again
                search, previous = search_optimizer(augmenter), 999.0
                blocks = [*blocks, {"search_at": epoch, "before": confidences(
                    augmenter, teacher, student, data, run)}]
            rate = search.param_groups[0]["lr"]
            optimizer.zero_grad()  # Stage III's last gradients
            with held(student):
                for images, labels in data.train.augmented(run.batch_size, aside):
                    terms = search_step(augmenter, teacher, student, search, images, labels, run)
                    terms = {"ce": None, "kl": None, **terms}
                    record.step(terms, None, labels, steps)
                    if step % 10 == 0 or not lines:  # the first of a pass as well
                        lines.append(log_row(step, epoch + 1, stage, terms, augmenter))
                    step += 1
            search.zero_grad()
            record.trained()
            mean = sum(float(record.sums[name]) for name in ("L_T", "L_S")) / record.images
            search.param_groups[0]["lr"] = plateau(previous, mean, rate)
            previous, after = mean, {"train": None, "test": None}
            if number + 1 == run.search_epochs:
                blocks[-1]["after"] = confidences(augmenter, teacher, student, data, run)
                print(f"  search before epoch {epoch + 1}, confidence on augmented test images: "
                      "teacher {:.3f}, student {:.3f} before; ".format(*blocks[-1]["before"])
                      + "teacher {:.3f}, student {:.3f} after".format(*blocks[-1]["after"]))
        else:
            rate = optimizer.param_groups[0]["lr"] = rates[epoch]
            student.train()
            more = data.train.augmented(run.batch_size, aside) if run.augment == "twice" else None
            for images, labels in data.train.augmented(run.batch_size, loader):
                terms, logits = train_step(student, teacher, augmenter, optimizer, images, labels,
                                           run, next(more) if more else None)
                terms = {**terms, "L_T": None, "L_S": None}
                terms = {name: terms[name] for name in ("ce", "kl", "L_T", "L_S", "conf_t",
                                                        "conf_s")}
                record.step(terms, logits, labels, steps)
                step += 1
            record.trained()
            means = {name: float(record.sums[name]) / record.images for name in (
                "conf_t", "conf_s") if record.counts[name]}
            lines.append(log_row(step, epoch + 1, stage, means, augmenter))
            after = {"test": evaluate(student, data.test, run)}
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                 "place": place + 1, "step": step, "blocks": blocks, "previous": previous,
                 "aside": aside.get_state(), "random": random_states(loader),
                 "search": search.state_dict() if search else None}
        if augmenter is not None:
            state |= {"augmenter": augmenter.state_dict(), "draws": augmenter.generator.get_state()}
        record.epoch({"stage": stage, "epoch": epoch + 1, "lr": rate}, after, state, lines)
    return blocks


def search_optimizer(augmenter):
    """Stage II's SGD over the 25 numbers; no weight decay. READING: 0.01, momentum 0.9."""
    return torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], 0.01, 0.9)


# --------------------------------------------------------------------------------------- 4. results
def name_of(run):
    """The name of a run in the table."""
    name = {"none": "KD on originals", "twice": "KD, 2B originals a step",
            "random": "random augmentation", "learned": "TST"}[run.augment]
    if run.augment == "learned" and run.student_term != "non_saturating":
        name += f", {run.student_term}"
    return name


def build_augmenter(encoders, data, run):
    """The augmenter of a run, theta = 0; None for the controls without one."""
    if run.augment not in ("learned", "random"):
        return None
    generator = torch.Generator().manual_seed(run.seed + DRAWS)
    return Augmenter(encoders, torch.tensor(data.mean), torch.tensor(data.std), run.operations,
                     run.gate_temperature, generator).to(run.device)


def run_student(teacher, stage_one, data, run, record):
    """Train one student, unless its record is finished; returns its table row."""
    if not record.result:
        print(f"\n{name_of(run)}: {run.student} learns from {run.teacher}; records in "
              f"{record.folder}")
        student = build_model(run.student, data.classes, data.image_size, run.seed).to(run.device)
        encoders, errors, fit_seconds = stage_one or (None, None, None)
        augmenter = build_augmenter(encoders, data, run)
        blocks = distill(student, teacher, augmenter, data, run, record)
        found = {}
        if data.unseen:
            found |= open_set_report(*embeddings(student, data.unseen, run))
        more = {"blocks": blocks}
        if augmenter is not None:
            teacher_end, student_end = confidences(augmenter, teacher, student, data, run)
            found |= {"T_end": teacher_end, "S_end": student_end}
            more |= {"fit_errors": errors, "probabilities": augmenter.probabilities().tolist(),
                     "magnitudes": augmenter.magnitudes().tolist()}
            save_weights(augmenter.state_dict(), record.folder / "augmenter.pt")
            save_grid(augmenter, data, run, record.folder / "augmented.png")
            more["seconds_by_stage"] = {"I": fit_seconds} | {
                name: training_seconds([row for row in record.rows if row["stage"] == stage],
                                       len(data.train)) for stage, name in ((2, "II"), (3, "III"))}
        N, passes = len(data.train), {}
        searched = N * sum(row["stage"] == 2 for row in record.rows)
        taught = N * run.epochs * (1 if run.augment == "none" else 2)
        passes["student forward and backward"] = passes["teacher forward"] = taught
        if searched:
            passes["both forward and backward to the image"] = searched
        record.finish(student.state_dict(), measures=found, images=passes, **more)
    result = record.result
    row = {"run": name_of(run), "test": result["last_test"], "epochs": run.epochs,
           "k images": result["images"]["student forward and backward"] / 1000,
           "k searched": result["images"].get("both forward and backward to the image", 0) / 1000,
           "seconds": training_seconds(result["rows"], len(data.train)),
           "fit": result.get("seconds_by_stage", {}).get("I"), **result["measures"]}
    if result["blocks"]:
        for when in ("before", "after"):
            row |= dict(zip((f"T_{when}", f"S_{when}"), result["blocks"][-1][when]))
    return row


def display(images, data):
    """Normalised images as they look, in [0,1], on the CPU."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    return (images.cpu() * std + mean).clamp(0, 1)


def some_images(data, arguments):
    """Eight test images from all over the test part, (8,3,H,W)."""
    places = range(0, len(data.test), max(1, len(data.test) // 8))[:8]
    if hasattr(data.test, "images"):
        return data.test.normalise(data.test.images[list(places)])
    return torch.stack([data.test[place, None][0] for place in places]).to(arguments.device)


def save_grid(augmenter, data, run, path):
    """A PNG without matplotlib: a row for each of eight images; the original, each of the 14
    operations alone (gate 1, present magnitude), four draws of x~."""
    from torchvision.utils import save_image

    kept, augmenter.generator = augmenter.generator, torch.Generator().manual_seed(
        run.seed + PICTURES)
    images, m = some_images(data, run), augmenter.magnitudes()
    with torch.no_grad():
        columns = [images, *(augmenter.transform(i, images, m[i] if i < MOVABLE else None)
                             for i in range(len(OPERATIONS))),
                   *(augmenter(images) for _ in range(4))]
    augmenter.generator = kept
    shown = torch.stack([display(column, data) for column in columns], 1)  # (8,19,3,H,W)
    save_image(shown.flatten(0, 1), path, nrow=len(columns))


def plot(record, augmenter, data, run):
    """series.png: the 25 series over training. operations.png: learned against exact."""
    import csv

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(record.folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    files, steps = [record.folder / "series.png"], [int(row["step"]) for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    for axis, kind, title in ((axes[0], "q", "probabilities q"), (axes[1], "m", "magnitudes m")):
        for i, name in enumerate(OPERATIONS if kind == "q" else OPERATIONS[:MOVABLE]):
            axis.plot(steps, [float(row[f"{kind}_{name}"]) for row in rows], label=name,
                      linestyle="-" if i < 7 else "--")
        for before, row in zip([None, *rows], rows):
            if row["stage"] == "2" and (before is None or before["stage"] == "3"):
                block = [int(one["step"]) for one in rows
                         if one["stage"] == "2" and one["epoch"] == row["epoch"]]
                axis.axvspan(min(block), max(block), alpha=0.15, color="grey")
        axis.set(title=f"{title} (grey: search)", xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(files[0], dpi=110)
    pyplot.close(figure)

    files.append(record.folder / "operations.png")
    images, m = some_images(data, run)[:3], augmenter.magnitudes()
    values = to_bytes(images, augmenter.mean, augmenter.std)
    augmenter.generator = torch.Generator().manual_seed(PICTURES)
    figure, axes = pyplot.subplots(2 * len(images), 1 + len(OPERATIONS), squeeze=False,
                                   figsize=(15, 2.1 * len(images)), layout="constrained")
    for column, name in enumerate(("original", *OPERATIONS)):
        i = column - 1
        with torch.no_grad():
            if i < 0:
                pair = (images, images)
            else:
                pair = [augmenter.transform(i, images, m[i] if i < MOVABLE else None)] * 2
            if 0 <= i < MOVABLE:
                level = min(math.floor(10 * m[i].item()), 9)
                pair[1] = from_bytes(exact(name, values, level), augmenter.mean, augmenter.std)
        for kind, batch in enumerate(pair):
            for place, image in enumerate(display(batch, data).cpu()):
                axis = axes[2 * place + kind, column]
                axis.imshow(image.permute(1, 2, 0).numpy())
                axis.set(xticks=[], yticks=[])
                if column == 0:
                    axis.set_ylabel("exact" if kind else "learned", fontsize=7)
                if place == kind == 0:
                    title = name if not 0 <= i < MOVABLE else f"{name}\nm = {m[i].item():.2f}"
                    axis.set_title(title, fontsize=7)
    figure.savefig(files[1], dpi=110)
    pyplot.close(figure)
    print("pictures:", *files)


# ----------------------------------------------------------------------------------------- 5. flags
def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], DEFAULTS)
    positive, weight = number(float, 0, low_allowed=False), number(float, 0)
    add = parser.add_argument_group("TST").add_argument
    add("--augment", choices=("learned", "random", "none"), default="learned",
        help="random: theta stays 0, no search; none: plain KD on the originals "
             "(default: learned)")
    add("--student-term", choices=STUDENT_TERMS, default="non_saturating",
        help="eq. (13) or (14) (default: non_saturating)")
    add("--operations", type=number(int, 1, len(OPERATIONS)), default=4, metavar="K",
        help="operations of a call, eq. (4) (default: 4)")
    add("--search-at", type=number(int, 0), nargs="+", metavar="EPOCH",
        help="epochs, from 0, that a search comes before (default: E // 8 and 3 E // 8; "
             "imagenet's 100: 10 and 25)")
    add("--search-epochs", type=number(int, 1), metavar="N",
        help="passes over the training images of a search (default: max(1, E // 8); imagenet's "
             "100: 5)")
    add("--gate-temperature", type=positive, default=0.05, metavar="TAU_G",
        help="eq. (3) (default: 0.05)")
    add("--fit-steps", type=number(int, 1), metavar="N",
        help="Stage I steps of an encoder, eq. (11) (default: 500; cifar100, imagenet 2000)")
    add("--temperature", type=positive, metavar="TAU", help="eq. (16) (default: 4; imagenet 1)")
    add("--weight", type=weight, default=1.0, metavar="W", help="eq. (16) (default: 1)")
    add("--compare", action="store_true",
        help="run the controls as well: student alone, KD, KD on twice the originals, random")
    add("--plot", action="store_true",
        help="write series.png and operations.png (needs matplotlib)")
    arguments = parse(parser, argv)
    E = arguments.epochs
    if arguments.augment != "learned" and not arguments.compare and (
            arguments.search_at or arguments.search_epochs):
        parser.error(f"--augment {arguments.augment} never searches; --search-at and "
                     "--search-epochs are for the learned augmentation")
    released = arguments.dataset == "imagenet" and E == 100  # CODE
    arguments.search_at = arguments.search_at or (
        [10, 25] if released else sorted({E // 8, 3 * E // 8}))
    arguments.search_epochs = arguments.search_epochs or (5 if released else max(1, E // 8))
    arguments.nesterov = True  # CODE
    arguments.drops = (0.4, 0.7) if arguments.dataset == "imagenet" else DROPS
    late = [epoch for epoch in arguments.search_at if epoch >= E]
    if late:
        parser.error(f"--search-at {late[0]}: epochs count from 0 to {E - 1}")
    if len(arguments.teacher_weights or ()) > 1:
        parser.error("--teacher-weights: one file, TST has one teacher")
    if arguments.plot and arguments.augment == "none":
        parser.error("--plot draws the augmenter, and --augment none has none")
    check_plot(parser, arguments)
    return arguments


def variant(arguments, **flags):
    """The arguments of one student run; `flags` replace those given."""
    return argparse.Namespace(**{**vars(arguments), **flags})


# ------------------------------------------------------------------------------------------ 6. main
def run_seed(arguments):
    """All of one seed: teacher, Stage I, the chosen run, with --compare its controls; the rows."""
    data = load_data(
        arguments.dataset, arguments.data, arguments.image_size, arguments.train_fraction,
        0, arguments.open_set, arguments.seed, arguments.device)
    check_batch_size(data, arguments)
    introduce(data, arguments)
    E, N = arguments.epochs, len(data.train)
    rates = learning_rates(arguments.learning_rate, E, arguments.drops)
    fingerprint = {"data_fingerprint": data.train.fingerprint()}

    def record_of(run, folder):
        settings = {**describe(run), **fingerprint}
        return Record(arguments.out / folder, settings, arguments.resume, arguments.device)

    record = record_of(arguments, "")  # first: refuse a folder that holds another run
    rows = []

    def alone(name, seed, title):
        result, kept = train_network(name, data, rates, arguments, seed=seed, title=title)
        found = open_set_report(*embeddings(kept[E], data.unseen, arguments)) if data.unseen else {}
        rows.append({"run": title.strip(), "test": result["last_test"], "epochs": E, **found,
                     "k images": N * E / 1000, "k searched": 0,
                     "seconds": training_seconds(result["rows"], N)})
        return kept[E]

    if arguments.teacher_weights:
        teacher = load_frozen(arguments.teacher, arguments.teacher_weights[0], data, arguments)
        rows.append({"run": "teacher", "test": evaluate(teacher, data.test, arguments)})
    else:
        teacher = alone(arguments.teacher, arguments.seed + 1000, "teacher")
    runs = {"": arguments}
    if arguments.compare:
        alone(arguments.student, arguments.seed, "\nstudent alone")
        runs |= {kind: variant(arguments, augment=kind, student_term="non_saturating")
                 for kind in ("none", "twice", "random", "learned")}
    stage_one = None
    if any(run.augment in ("learned", "random") for run in runs.values()):
        stage_one = fitted_encoders(data, arguments)
    names = set()
    for folder, run in runs.items():
        if name_of(run) not in names:
            names.add(name_of(run))
            own = record if folder == "" else record_of(run, folder)
            rows.append(run_student(teacher, stage_one, data, run, own))
    if arguments.plot:
        augmenter = build_augmenter(stage_one[0], data, arguments)
        load_weights(augmenter, arguments.out / "augmenter.pt")
        plot(record, augmenter, data, arguments)
    chosen = name_of(arguments)
    return sorted(rows, key=lambda row: row["run"] == chosen)  # after its controls


def main():
    arguments = parse_args()
    tables = [run_seed(run) for run in each_seed(arguments)]
    formats = {"test": ".2f", "T_before": ".3f", "S_before": ".3f", "T_after": ".3f",
               "S_after": ".3f", "T_end": ".3f", "S_end": ".3f", "rank1": ".1f",
               "verification": ".1f", "epochs": ".0f", "k images": ".1f", "k searched": ".1f",
               "fit": ".0f", "seconds": ".0f"}
    shown = print_table(
        tables, formats, f"TST on {arguments.dataset}: last-epoch test accuracy (%)")
    if "T_end" in shown:
        print("T, S: mean true-class probability of teacher and student on augmented test images, "
              "before\nand after the last search, and at the end by the run's own theta; k: "
              "thousands of images;\nfit: seconds of the fit of Stage I, not in `seconds`")


if __name__ == "__main__":
    run_script(main)
