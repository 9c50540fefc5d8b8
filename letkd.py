"""LetKD: Knowledge Distillation Layer that Lets the Student Decide.

A. Gorgun, Y. Z. Gurbuz, A. A. Alatan. BMVC 2023, arXiv:2309.02843.
Authors' code: adagorgun/letKD-framework (cited as CODE; nothing is copied from it).

A layer inside the student compares every location with K templates and adds the semantic vectors
of the matching ones back onto the features. The teacher supervises the scores: visual words before
the pooling, its decisions (which parts of classes its feature space confuses) after the first
block of the last stage. The layer stays at inference; teacher, words and tables do not.

    symbol          in code                              shape                meaning
    x, x_hat        x, x_hat                             (B,d,H,W)            features before, after
    Omega, s_q      KDLayer.match.weight, .scale         (K,d,1,1), scalar    templates; start at 3
    gamma, beta     KDLayer.norm (BatchNorm2d)           (K,)                 start at 1 and 0
    V, s_v          KDLayer.value.weight, .scale         (d,K,1,1), scalar    values; start at 1
    alpha           KDLayer.alpha                        constant             weight of the output
    a; p_S, p_T     scores; p_T: targets                 (B,K,H,W)            over templates
    z               features                             (B,D,H,W)            the teacher's, frozen
    rho             words                                (K,D)                visual words
    C, k; n         classes, per_class                   n = label k + j      sub-classes, j < k
    W, b; c_n; s_T  Decisions.weight, .bias, .centres,   (L,D), (L,);         LDA to L dimensions;
                    .table                               (Ck,L); (Ck,Ck)      centres; decisions

Equations, numbered by this project. PAPER: in the paper or its supplement. CODE: in the authors'
code. READING: our choice. unit(u) = u / max(||u||, 1e-12).

    (1)  a_k|i = s_q <unit(omega_k), unit(x_i)>                         PAPER, CODE
    (2)  p^_k|i = max(0, BatchNorm(a_k|i))                              PAPER, CODE
    (3)  v_j|i = s_v <unit(V_j), unit(p^_i)>, unit along K              CODE
    (4)  x_hat_i = x_i + alpha v_i                                      PAPER, CODE
    (5)  p_S(k|i) = softmax_k(a_k|i), of the scores BEFORE BatchNorm    PAPER, CODE
    (6)  rho = k-means centres of the teacher's rows                    PAPER, CODE
    (7)  p_T(k|i) = softmax_k(-tau ||z_i - rho_k||^2)                   PAPER; tau = 1: CODE
    (8)  LDA: g = W z + b, with W S_w W^T = I                           PAPER, CODE; cut: READING
    (9)  k-means per class on g; h1 = the nearest of the OWN class      PAPER, CODE
    (10) q_n = mean of g with h1 = n; h2 = the nearest of ALL q_n       PAPER, CODE
    (11) s_T[n,m] = #(h1 = n, h2 = m) / #(h1 = n)                       PAPER, CODE
    (12) p_T(.|i) = s_T[h1(z_i, y)], y the training label               PAPER, CODE
    (13) template_loss = mean over B H W of KL(p_T || p_S)              PAPER, CODE
    (14) its gradient by the scores: (p_S - p_T) / (B H W)              algebra
    (15) letKD-1: CE + template_loss before the pooling                 PAPER; weight 1: CODE
    (16) letKD-2: (15) + template_loss after the tap                    PAPER; weight 1: CODE
    (17) a layer costs 2dK + 2K + 2 parameters, 2dK H W multiply-adds   algebra
    (lr) lr0 0.1^j, j = how many of 5/8, 3/4, 7/8 of the run are over   PAPER (150, 180, 210 of 240)

The supplement prints softmax(d) in Algorithm 1 and min for argmin in Algorithm 2: slips; here
softmax(-d) and argmin. Where gradients go: the inner loss reaches the student before its layer and
that layer's templates and s_q, nothing else; the outer loss these, the inner BatchNorm and values,
the rest of the student, the outer templates and s_q; CE reaches everything (with alpha 0: nothing
of the layers).

Capacity: the deployed student is larger than the plain one, which every table shows (layers of
alpha 0 change nothing and are not counted). By our count, on the paper's resnet56 -> resnet20 it
grows from 0.278 M to 0.915 M parameters, more than its teacher.

UNKNOWN: what the paper's main text states on loss weights, tau and layer places (here: CODE); best
or last epoch behind its numbers, and what their "-+" is; batch, weight decay, tau and L outside
CIFAR-100. The appendix keeps emphasis in the length of p^; CODE, and this script, normalise it. h1
uses k-means centres, h2 means, as in CODE; at convergence they nearly coincide. READING: small data
and teachers, few epochs and seeds, rate 0.1 on shapes, K = 256 words on small data, sampled rows,
k-means in torch with a seed, L = min(dimensions, C - 1, rank), a cut of small eigenvalues, signs of
the axes, empty sub-classes (q_n = c_n, a one-hot row), ImageNet's batch and weight decay, the last
batch kept where CODE drops it, black padding (CODE: reflected), one place for all networks (CODE
takes MobileNetV2's 80 channels), last-epoch accuracy, the KD control (T = 4, weight 1), the fifth
field of Decisions. Not set by themselves: rate 0.01 and alpha 0.1, 0.2 of MobileNetV2 (PAPER). Not
copied from CODE: its slices that lose rows, its choice of h1, the epoch that is best on test.

    python letkd.py                       embedded shapes; 2 CPU cores: about a minute
    python letkd.py --compare             with its controls; 2 CPU cores: 2 to 3 minutes
    python letkd.py --dataset cifar100    resnet56 -> resnet20, 4096 words, 240 epochs: not yet run
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import (
    F, InputError, Network, Record, autocast, base_parser, build_model, check_batch_size,
    check_plot, describe, each_seed, embeddings, evaluate, evaluating, introduce, load_data,
    load_file, load_frozen, make_folder, nn, number, open_set_report, parse, print_table,
    random_states, restore_random_states, run_script, save_file, sgd, torch, train_network,
    training_seconds)

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
SMALL = {"teacher": "resnet20", "student": "resnet8x0.5", "epochs": 24, "words": 256,
         "rows": 200_000, **RECIPE}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {**SMALL, "teacher": "resnet14", "epochs": 12, "learning_rate": 0.1},
    "fashionmnist": SMALL, "cifar10": SMALL, "folder": SMALL, "tinyimagenet": SMALL,
    "cifar100": {**SMALL, "teacher": "resnet56", "student": "resnet20", "epochs": 240,
                 "words": 4096, "rows": 3_200_000},  # all locations of all images
    "imagenet": {**SMALL, "teacher": "resnet34", "student": "resnet18", "epochs": 100,
                 "words": 4096, "rows": 2_000_000, "learning_rate": 0.1, "weight_decay": 1e-4,
                 "batch_size": 256},
}
DROPS = (5 / 8, 3 / 4, 7 / 8)  # (lr); ImageNet: after 30, 60 and 90 of 100 epochs (PAPER)


class Decisions(NamedTuple):
    """What eqs. (8) to (11) found; plain tensors, never trained."""
    weight: torch.Tensor  # (L,D)
    bias: torch.Tensor  # (L,)
    centres: torch.Tensor  # (C k, L)
    table: torch.Tensor  # (C k, C k), rows sum to 1
    per_class: int = 8


# -------------------------------------------------------------------------- 1. losses and equations
def at_every_location(maps, matrix, bias=None):
    """maps (B,in,H,W), matrix (out,in) -> (B,out,H,W), a 1x1 convolution in full float32.

    Autocast is off; and a GPU may round convolutions to TF32, but not matrix products.
    """
    with torch.autocast(maps.device.type, enabled=False):
        return F.linear(maps.movedim(1, 3), matrix, bias).movedim(3, 1)


def word_targets(features, words, tau=1.0):
    """Eq. (7): p_T, (B,K,H,W), from the teacher's features (B,D,H,W) and words (K,D).

    tau multiplies (an inverse temperature). ValueError if the widths differ. No gradients.
    """
    if features.shape[1] != words.shape[1]:
        raise ValueError(f"features have {features.shape[1]} channels, words {words.shape[1]}")
    shift = words.detach().mean(0)  # (D,), moves z and rho alike: fewer digits are lost
    z, rho = features.detach() - shift[:, None, None], words.detach() - shift
    # Eq. (7): softmax_k(-tau ||z - rho_k||^2); ||z||^2 is the same for every k and cancels
    closeness = 2 * at_every_location(z, rho) - rho.square().sum(1)[:, None, None]  # (B,K,H,W)
    return F.softmax(tau * closeness, dim=1)


def decision_targets(features, labels, decisions):
    """Eq. (12): p_T, (B,Ck,H,W), from the teacher's features (B,D,H,W) and labels (B,).

    ValueError if widths, batch or labels do not fit `decisions`. No gradients.
    """
    W, b, c, s_T, k = decisions
    if features.shape[1] != W.shape[1]:
        raise ValueError(f"features have {features.shape[1]} channels, the LDA {W.shape[1]}")
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} feature maps, {len(labels)} labels")
    if len(c) % k:
        raise ValueError(f"{len(c)} centres are no multiple of {k} a class")
    if labels.device.type == "cpu" and not (0 <= labels).logical_and(labels < len(c) // k).all():
        raise ValueError(f"labels must lie in 0..{len(c) // k - 1}")  # a GPU would have to wait
    # Eq. (8): g = W z + b
    g = at_every_location(features, W, b)  # (B,L,H,W)
    # Eq. (9): h1 = argmin over the sub-classes n of class y of ||g - c_n||^2
    own = c.view(-1, k, c.shape[1])[labels]  # (B,k,L)
    with torch.autocast(g.device.type, enabled=False):
        inner = torch.einsum("bkl,blhw->bkhw", own, g)
    distance = own.square().sum(2)[:, :, None, None] - 2 * inner  # (B,k,H,W), without ||g||^2
    h1 = labels[:, None, None] * k + distance.argmin(1)  # (B,H,W)
    # Eq. (12): p_T(.|i) = s_T[h1(z_i, y)]
    return s_T.detach()[h1].movedim(3, 1)  # (B,Ck,H,W)


def template_loss(scores, targets):
    """Eq. (13), a scalar in nats. Scores a and targets p_T (B,K,H,W); ValueError if they differ.

    Only the scores get a gradient, eq. (14).
    """
    if scores.shape != targets.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} must "
                         "have one shape")
    # Rows first: "batchmean" on maps would divide by B alone. kl_div takes the learner first and
    # as LOG-probabilities; its 0 log 0 is 0.
    a, p_T = (maps.movedim(1, 3).flatten(0, 2) for maps in (scores, targets.detach()))  # (BHW,K)
    # Eq. (5): p_S = softmax over k of the scores before BatchNorm
    log_p_S = F.log_softmax(a, dim=1)
    # Eq. (13): 1/(B H W) sum_i sum_k p_T (log p_T - log p_S)
    return F.kl_div(log_p_S, p_T, reduction="batchmean")


def kd_loss(student_logits, teacher_logits, temperature=4.0):
    """The KD control's second term, T^2 mean_b KL(p_t^T || p_s^T); logits (B,C). READING."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student_logits / temperature, 1),
        F.log_softmax(teacher_logits.detach() / temperature, 1), reduction="batchmean",
        log_target=True)


def nearest(rows, centres):
    """Index of the nearest centre (N,), the lowest on a tie, and the squared distance (N,)."""
    found, shift = [], centres.mean(0)  # moves rows and centres alike: fewer digits are lost
    centres = centres - shift
    for z in rows.split(max(1, 2**24 // len(centres))):  # 64 MB of distances at a time
        z = z - shift
        d = torch.addmm(centres.square().sum(1), z, centres.T, alpha=-2)  # (n,K), without ||z||^2
        least, index = d.min(1)
        found.append((index, (least + z.square().sum(1)).clamp_min(0)))
    return tuple(torch.cat(part) for part in zip(*found))


def k_means(rows, count, generator=None, iterations=20, show=""):
    """k-means of rows (N,D): centres (count,D), the nearest of each row, squared distances.

    Starts at `count` rows drawn by `generator` (CPU). An empty centre takes the row farthest from
    its own centre, a second one the next farthest. ValueError for fewer rows than centres. READING
    (the authors: faiss, 20 iterations).
    """
    if not 1 <= count <= len(rows):
        raise ValueError(f"{count} centres need as many rows, there are {len(rows)}")
    centres = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    for iteration in range(iterations):
        index, distance = nearest(rows, centres)
        sums = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device)
        for part, z in zip(index.split(100_000), rows.split(100_000)):
            sums.index_add_(0, part, z.double())
        size = index.bincount(minlength=count)
        centres = (sums / size.clamp_min(1)[:, None]).to(rows.dtype)
        empty = (size == 0).nonzero().flatten()
        if len(empty):
            farthest = distance.argsort(descending=True, stable=True)[:len(empty)]
            centres[empty] = rows[farthest]
        if show and sys.stdout.isatty():
            print(f"  {show}: k-means {iteration + 1}/{iterations}, mean squared distance "
                  f"{distance.mean():.4f}", end="\033[K\r", flush=True)
    return centres, *nearest(rows, centres)


def fit_words(features, count, generator=None, show=""):
    """Eq. (6): visual words (count,D), the k-means centres of the teacher's raw rows (N,D).

    ValueError for fewer rows than words.
    """
    # Eq. (6): rho = k-means centres; no PCA, whitening or normalisation
    return k_means(features, count, generator, show=show)[0]


def discriminant(features, labels, classes, dimensions):
    """Eq. (8): W (L,D) and b (L,) of the LDA of rows (N,D), in float64."""
    D = features.shape[1]
    count = labels.bincount(minlength=classes).double()  # (C,)
    sums = torch.zeros(classes, D, dtype=torch.float64, device=features.device)
    for y, z in zip(labels.split(100_000), features.split(100_000)):
        sums.index_add_(0, y, z.double())
    mu, m = sums / count.clamp_min(1)[:, None], sums.sum(0) / len(labels)  # (C,D), (D,)
    # Eq. (8): S_w = sum (z - mu_y)(z - mu_y)^T / (N - C), S_b = sum_c N_c (mu_c - m)(..)^T / N
    S_w = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for y, z in zip(labels.split(100_000), features.split(100_000)):
        centred = z.double() - mu[y]
        S_w += centred.T @ centred
    S_w /= max(1, len(labels) - classes)
    S_b = ((mu - m).T * count) @ (mu - m) / len(labels)
    # S_w = U diag(lambda) U^T; dead channels have lambda = 0: cut, never invert
    values, U = torch.linalg.eigh(S_w)
    keep = values > 1e-6 * values.max()
    P = U[:, keep] * values[keep].rsqrt()  # (D,kept)
    # P^T S_b P = E diag(e) E^T, e descending;  W = (P E[:, :L])^T,  b = -W m
    E = torch.linalg.eigh(P.T @ S_b @ P)[1].flip(1)
    L = min(dimensions, classes - 1, P.shape[1])
    W = (P @ E[:, :L]).T  # (L,D)
    # READING: the entry of largest magnitude of each row is positive
    W = W * W.gather(1, W.abs().argmax(1, keepdim=True)).sign()
    return W, -W @ m


def fit_decisions(features, labels, classes, per_class=8, dimensions=60, generator=None, show=""):
    """Eqs. (8) to (11): the teacher's decisions on sub-classes; rows (N,D), labels (N,).

    Fitted in float64, returned in the features' type. ValueError where a class has fewer rows than
    sub-classes.
    """
    k, kind = per_class, features.dtype
    sizes = labels.bincount(minlength=classes)
    if len(sizes) > classes or sizes.min() < k:
        raise ValueError(f"every one of {classes} classes needs at least {k} rows, the smallest "
                         f"has {int(sizes.min())}")
    W, b = discriminant(features, labels, classes, dimensions)
    centres, prototypes, h1 = [], [], []
    for c in range(classes):  # one generator, in the order of the classes
        # Eq. (8): g = W z + b
        g = features[labels == c].double() @ W.T + b  # (N_c,L)
        # Eq. (9): k centres per class; h1 = the nearest of the own class
        c_n, index, _ = k_means(g, k, generator)
        size = index.bincount(minlength=k)[:, None]
        # Eq. (10): q_n = mean of the g with h1 = n; an empty one keeps its centre (READING)
        means = torch.zeros_like(c_n).index_add_(0, index, g) / size.clamp_min(1)
        centres.append(c_n)
        prototypes.append(torch.where(size > 0, means, c_n))
        h1.append(index)
        if show and sys.stdout.isatty():
            print(f"  {show}: class {c + 1}/{classes}", end="\033[K\r", flush=True)
    q, counts = torch.cat(prototypes), []
    for c in range(classes):
        # Eq. (10): h2 = argmin over ALL n of ||g - q_n||^2
        h2, _ = nearest(features[labels == c].double() @ W.T + b, q)
        # Eq. (11): s_T[n,m] = #{h1 = n and h2 = m} / #{h1 = n}, the k rows of class c
        pairs = (h1[c] * len(q) + h2).bincount(minlength=k * len(q))
        counts.append(pairs.view(k, len(q)).double())
    counts = torch.cat(counts)  # (C k, C k)
    empty = (counts.sum(1) == 0).nonzero().flatten()
    counts[empty, empty] = 1  # READING: a one-hot row
    table = counts / counts.sum(1, keepdim=True)
    return Decisions(*(part.to(kind) for part in (W, b, torch.cat(centres), table)), k)


def learning_rates(initial, epochs, drops=DROPS):
    """(lr): the rate of each epoch, ten times smaller after each share of the run in `drops`."""
    return [initial * 0.1 ** sum(e >= drop * epochs for drop in drops) for e in range(epochs)]


# --------------------------------------------------------------------------------------- 2. modules
class CosineConv1x1(nn.Module):
    """Eqs. (1), (3): (B,in,H,W) -> (B,out,H,W), a learned scale times cosines; no bias."""

    def __init__(self, in_channels, out_channels, scale):
        super().__init__()
        start = torch.randn(out_channels, in_channels, 1, 1) * (2 / in_channels) ** 0.5
        self.weight = nn.Parameter(start)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x):
        # s <unit(w_o), unit(x_i)>, both of unit length along the input channels
        omega = F.normalize(self.weight, dim=1).flatten(1)  # (out,in)
        return self.scale * at_every_location(F.normalize(x, dim=1), omega)


class KDLayer(nn.Module):
    """The distillation layer, eqs. (1) to (4), always in float32.

    x (B,d,H,W) -> x_hat (B,d,H,W) and the scores (B,K,H,W), which the teacher supervises. `fired`
    (K,) remembers which templates had p^ > 0 anywhere since it was zeroed, in train mode.
    """

    def __init__(self, channels, templates, alpha=1.0, query_scale=3.0, value_scale=1.0):
        super().__init__()
        self.match = CosineConv1x1(channels, templates, query_scale)
        self.norm = nn.BatchNorm2d(templates)
        self.value = CosineConv1x1(templates, channels, value_scale)
        self.register_buffer("alpha", torch.tensor(float(alpha)))  # so that student.pt knows it
        self.register_buffer("fired", torch.zeros(templates, dtype=torch.bool), persistent=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            scores = self.match(x)  # Eq. (1): (B,K,H,W)
            # Eq. (2): p^ = max(0, gamma (a - mean) / sqrt(var + 1e-5) + beta)
            p_hat = F.relu(self.norm(scores))  # (B,K,H,W)
            v = self.value(p_hat)  # Eq. (3): (B,d,H,W)
            # Eq. (4): x_hat = x + alpha v; no ReLU after it
            x_hat = x + self.alpha * v
        if self.training:
            self.fired |= p_hat.detach().amax((0, 2, 3)) > 0
        return x_hat, scores


def up_to_tap(network, images):
    """Images to the output of the FIRST block of the LAST stage."""
    x = network.stem(images)
    for stage in network.stages[:-1]:
        x = stage(x)
    return network.stages[-1][0](x)  # (B,D,H,W)


def after_tap(network, x):
    """The rest of the features: the last stage's other blocks, and the neck."""
    return network.neck(network.stages[-1][1:](x))  # (B,D,H,W), before the pooling


class Student(Network):
    """A network of common.py with KDLayers at the two taps; None: no layer there."""

    def __init__(self, network, inter, penult):
        super().__init__(network.stem, network.stages, network.neck, network.head)
        self.inter, self.penult = inter, penult

    def forward_scores(self, images):
        """Features before the pooling (B,d,H,W), and both layers' scores (None: no layer)."""
        u, scores_i, scores_p = up_to_tap(self, images), None, None
        if self.inter is not None:
            u, scores_i = self.inter(u)
        u = after_tap(self, u)
        if self.penult is not None:
            u, scores_p = self.penult(u)
        return u, scores_i, scores_p

    def forward_features(self, images):
        return self.forward_scores(images)[0]


def map_shapes(network, image_size):
    """[(channels, side)] of the feature maps at the two taps."""
    image = torch.zeros(1, 3, image_size, image_size, device=network.head.weight.device)
    with evaluating(network):
        x = up_to_tap(network, image)
        return [(maps.shape[1], maps.shape[3]) for maps in (x, after_tap(network, x))]


def build_student(name, classes, image_size, inter=0, penult=0, alpha=1.0, seed=0):
    """A student with so many templates in its two layers; 0: no layer. All `student.pt` needs."""
    network = build_model(name, classes, image_size, seed)
    widths = [channels for channels, _ in map_shapes(network, image_size)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [KDLayer(width, templates, alpha) if templates else None
                  for width, templates in zip(widths, (inter, penult))]
    return Student(network, *layers).to(memory_format=torch.channels_last)


def pooled(features, side):
    """Average-pool square maps r times larger than the student's, CODE; ValueError if r is no
    integer."""
    r, rest = divmod(features.shape[3], side)
    if r < 1 or rest or features.shape[2] != features.shape[3]:
        raise ValueError(f"the teacher's maps are {features.shape[2]}x{features.shape[3]}, the "
                         f"student's {side}x{side}")
    return F.avg_pool2d(features, r) if r > 1 else features


# ---------------------------------------------------------------------------------- 3. training
class Targets(NamedTuple):
    """What is prepared once per teacher: words (K,D), and decisions for letKD-2 (else None)."""
    words: torch.Tensor
    decisions: Decisions | None


def rows_used(data, run):
    """Which training images the targets are fitted on: all, or a sample of --rows; a generator
    for what else is drawn."""
    generator = torch.Generator().manual_seed(run.seed)
    used = torch.zeros(len(data.train), dtype=torch.bool)
    used[torch.randperm(len(used), generator=generator)[:run.rows]] = True
    return used, generator


def per_image(side, data, run):
    """How many locations of an image the targets are fitted on."""
    return max(1, min(side**2, run.rows // len(data.train)))


def teacher_rows(teacher, data, sides, run):
    """Rows of the teacher at both taps, (N,D) each, and the inner ones' labels (N,).

    Images are not augmented. At most about --rows: equally many random locations of an image,
    drawn by the seed.
    """
    used, generator = rows_used(data, run)
    rows, tags, seen = [[], []], [], 0
    with evaluating(teacher), autocast(run):
        for batch, labels in data.train.batches():
            take = used[seen:seen + len(batch)].to(batch.device)
            seen += len(batch)
            x = up_to_tap(teacher, batch)
            for maps, side, kept in zip((x, after_tap(teacher, x)), sides, rows):
                z = pooled(maps.float(), side).movedim(1, 3).flatten(1, 2)  # (B,HW,D)
                places = torch.rand(z.shape[:2], generator=generator).argsort(1)
                places = places[:, :per_image(side, data, run), None].to(z.device)
                z = z.gather(1, places.expand(-1, -1, z.shape[2]))  # (B,count,D)
                kept.append(z[take].flatten(0, 1))
            tags.append(labels[take].repeat_interleave(per_image(sides[0], data, run)))
    for place, kept in enumerate(rows):
        rows[place] = torch.cat(kept)
        kept.clear()  # one tap at a time is there twice
    return *rows, torch.cat(tags)


def prepare(teacher, data, sides, run):
    """Section 5, steps 2 and 3: words, and decisions for letKD-2; cached like the teacher."""
    weights = hashlib.sha1(b"".join(value.cpu().contiguous().numpy().tobytes()
                                    for value in teacher.state_dict().values())).hexdigest()
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("letkd.py", "common.py")]
    shared = [weights, data.train.fingerprint(), run.seed, run.rows, sides, run.precision,
              run.device.type, torch.__version__, sources]
    wanted = {"words": [run.words]}
    if run.layers == 2:
        wanted["decisions"] = [run.per_class, run.dimensions, data.classes]
    found, rows = {}, None
    for kind, settings in wanted.items():
        key = hashlib.sha1(repr([shared, kind, settings]).encode()).hexdigest()[:12]
        path = run.cache / f"{data.name}-{run.teacher}-{kind}-{key}.pt"
        if not path.exists():
            start = time.time()
            rows = rows or teacher_rows(teacher, data, sides, run)
            inter, penult, labels = (part.cpu() if run.device.type == "mps" else part
                                     for part in rows)  # float64 is unknown there
            generator = torch.Generator().manual_seed(run.seed)
            try:
                if kind == "words":
                    fitted = {"words": fit_words(penult, run.words, generator, kind)}
                else:
                    fitted = fit_decisions(inter, labels, data.classes, run.per_class,
                                           run.dimensions, generator, kind)._asdict()
            except ValueError as error:
                raise InputError(f"{kind}: {error}") from None
            make_folder(run.cache, "--cache")
            save_file(fitted, path)
            clear = "\033[K" if sys.stdout.isatty() else ""
            print(f"{clear}{kind}: fitted on {len(labels if kind == 'decisions' else penult)} "
                  f"locations in {time.time() - start:.1f} s, kept in {path}")
        found[kind] = {name: value.to(run.device) if isinstance(value, torch.Tensor) else value
                       for name, value in load_file(path).items()}
    decisions = Decisions(**found["decisions"]) if "decisions" in found else None
    return Targets(found["words"]["words"], decisions)


def train_step(student, teacher, targets, optimizer, images, labels, arguments):
    """One step. Returns the loss terms, all of weight 1, and the logits.

    `teacher` None: CE alone. `targets` None: the KD control, on the teacher's logits.
    """
    with autocast(arguments):
        if teacher is not None:
            with torch.no_grad():
                z_inter = up_to_tap(teacher, images)  # (B,D,H',W')
                z_penult = after_tap(teacher, z_inter)
                teacher_logits = teacher.forward_head(z_penult) if targets is None else None
        features, scores_i, scores_p = student.forward_scores(images)
        logits = student.forward_head(features).float()  # (B,C)
    terms = {"ce": F.cross_entropy(logits, labels)}
    if teacher is not None and targets is None:
        terms["kl"] = kd_loss(logits, teacher_logits.float())
    elif teacher is not None:
        # Eq. (15): letKD-1 = CE + template_loss before the pooling, by (7)
        p_T = word_targets(pooled(z_penult.float(), scores_p.shape[3]), targets.words)
        terms["penult"] = template_loss(scores_p, p_T)
        if scores_i is not None:
            # Eq. (16): letKD-2 = (15) + template_loss after the tap, by (12)
            p_T = decision_targets(pooled(z_inter.float(), scores_i.shape[3]), labels,
                                   targets.decisions)
            terms["inter"] = template_loss(scores_i, p_T)
    loss = sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return terms, logits


def layers_of(student):
    """{"i": the inner layer, "p": the outer one}, those that there are."""
    both = {"i": student.inter, "p": student.penult}
    return {name: layer for name, layer in both.items() if layer is not None}


def distill(student, teacher, targets, data, run, record):
    """Steps 4 to 7: train the student with its layers, from scratch and in one stage, in place."""
    E = run.epochs
    rates = learning_rates(run.learning_rate, E, run.drops)
    generator = torch.Generator().manual_seed(run.seed)
    optimizer, start = sgd(student.parameters(), run), 0
    if record.state:
        student.load_state_dict(record.state["student"])
        optimizer.load_state_dict(record.state["optimizer"])
        restore_random_states(record.state["random"], generator)
        start = record.state["epoch"]
    if run.compile:
        student.forward_scores = torch.compile(student.forward_scores)
    record.begin(E)
    for epoch in range(start, E):
        optimizer.param_groups[0]["lr"] = rates[epoch]
        student.train()
        for layer in layers_of(student).values():
            layer.fired.zero_()
        for images, labels in data.train.augmented(run.batch_size, generator):
            terms, logits = train_step(student, teacher, targets, optimizer, images, labels, run)
            record.step(terms, logits, labels, len(data.train) // run.batch_size)
        record.trained()
        after = {"test": evaluate(student, data.test, run)}
        for name, layer in layers_of(student).items():
            after |= {f"s_q_{name}": layer.match.scale.item(),
                      f"s_v_{name}": layer.value.scale.item(),
                      f"fire_{name}": layer.fired.float().mean().item()}
        record.epoch({"epoch": epoch + 1, "lr": rates[epoch]}, after,
                     {"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                      "epoch": epoch + 1, "random": random_states(generator)})


# --------------------------------------------------------------------------------------- 4. results
def cost(network, image_size):
    """(parameters, multiply-adds for one image) of inference: convolutions and linear layers.

    A layer of alpha 0 adds nothing to the logits: it is left out, as one would when deploying.
    """
    if isinstance(network, Student):
        layers = [layer if layer is not None and layer.alpha else None
                  for layer in (network.inter, network.penult)]
        network = Student(network, *layers).train(network.training)
    total = 0

    def count(module, _, output):
        nonlocal total  # every weight is used once at every location of the output
        total += module.weight.numel() * (output.shape[2:].numel() if output.dim() == 4 else 1)

    kinds = (nn.Conv2d, nn.Linear, CosineConv1x1)
    hooks = [module.register_forward_hook(count) for module in network.modules()
             if isinstance(module, kinds)]
    with evaluating(network):
        network(torch.zeros(1, 3, image_size, image_size, device=network.head.weight.device))
    for hook in hooks:
        hook.remove()
    return sum(parameter.numel() for parameter in network.parameters()), total


def probe(forward, network, data, run):
    """Accuracy in % of an LDA classifier on (B,d) features, fitted on the training images.

    The supplement's Table 4 test. READING: equal priors, images not augmented.
    """
    vectors, labels = embeddings(network, data.train, run, forward)  # (N,d), (N,)
    if run.device.type == "mps":
        vectors, labels = vectors.cpu(), labels.cpu()
    W, b = discriminant(vectors, labels, data.classes, data.classes - 1)
    g = vectors.double() @ W.T + b  # (N,L)
    means = torch.stack([g[labels == c].mean(0) for c in range(data.classes)])  # (C,L)
    vectors, labels = (part.to(means.device) for part in embeddings(network, data.test, run,
                                                                    forward))
    right = nearest(vectors.double() @ W.T + b, means)[0] == labels
    return 100 * right.double().mean().item()


def word_agreement(student, teacher, words, data, run):
    """On test locations: % with argmax p_S = argmax p_T (7), and the mean of max_k p_T."""
    agree, soft, count = 0, 0.0, 0
    with evaluating(student, teacher):
        for images, _ in data.test.batches():
            with autocast(run):
                scores = student.forward_scores(images)[2]
                z = after_tap(teacher, up_to_tap(teacher, images))
            p_T = word_targets(pooled(z.float(), scores.shape[3]), words)  # (B,K,H,W)
            agree += (scores.argmax(1) == p_T.argmax(1)).sum().item()
            soft, count = soft + p_T.amax(1).sum().item(), count + p_T[:, 0].numel()
    return {"agree": 100 * agree / count, "p_max": soft / count}


def measures(network, data, run):
    """What one network costs, its linear probes at the inner tap, and its unseen classes."""
    parameters, multiply_adds = cost(network, data.image_size)
    found = {"params": parameters, "madds": multiply_adds,
             "probe_x": probe(lambda images: up_to_tap(network, images).mean((2, 3)),
                              network, data, run)}
    if getattr(network, "inter", None) is not None:
        found["probe_x_hat"] = probe(
            lambda images: network.inter(up_to_tap(network, images))[0].mean((2, 3)),
            network, data, run)
    if data.unseen:
        found |= open_set_report(*embeddings(network, data.unseen, run))
    return found


def name_of(run):
    """The name of a run in the table."""
    if run.supervision == "logits":
        return "KD on logits"
    plural = "s" if run.layers == 2 else ""
    name = {"teacher": f"letKD-{run.layers}",
            "none": f"{run.layers} unsupervised layer{plural}"}[run.supervision]
    if run.alpha == 0 and run.supervision == "teacher":
        name = f"{run.layers} auxiliary head{plural}"
    return name if run.alpha == 1 else f"{name}, alpha {run.alpha:g}"


def new_student(data, run):
    """The student of a run, with its layers."""
    inter = data.classes * run.per_class if run.layers == 2 else 0
    penult = run.words if run.layers else 0
    return build_student(run.student, data.classes, data.image_size, inter, penult, run.alpha,
                         run.seed).to(run.device)


def run_student(teacher, targets, data, run, record):
    """Train one student, unless its record is finished; returns its table row."""
    if not record.result:
        print(f"\n{name_of(run)}: {run.student}"
              f"{'' if run.supervision == 'none' else f' learns from {run.teacher}'}; records in "
              f"{record.folder}")
        guide = None if run.supervision == "none" else teacher
        own = targets if run.supervision == "teacher" else None
        student = new_student(data, run)
        distill(student, guide, own, data, run, record)
        found, images = measures(student, data, run), len(data.train) * len(record.rows)
        if own:
            found |= word_agreement(student, teacher, own.words, data, run)
            if run.layers == 2:
                s_T = own.decisions.table.cpu()
                found["entropy"] = torch.special.entr(s_T).sum(1).mean().item()
        passes = {"student forward and backward": images}
        if guide:
            passes["teacher forward"] = images
        record.finish(student.state_dict(), measures=found, images=passes)
    rows, last = record.result["rows"], record.result["rows"][-1]
    return {"run": name_of(run), "test": record.result["last_test"], "epochs": len(rows),
            "seconds": training_seconds(rows, len(data.train)), **record.result["measures"],
            **{f"fire_{name}": 100 * last[f"fire_{name}"] for name in ("i", "p")
               if f"fire_{name}" in last}}


def plot(record, teacher, targets, data, run):
    """layers.png: loss terms, scales, firing share by epoch. subclasses.png (letKD-2 and its
    teacher): the sub-class of every location of some test images, and their rows of s_T."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, files = record.result["rows"], [record.folder / "layers.png"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    shown = [(axes[0], name, name) for name in ("ce", "penult", "inter")]
    for name, place in (("i", "inner"), ("p", "outer")):
        shown += [(axis, f"{key}_{name}", f"{key}, {place}")
                  for axis, key in ((axes[1], "s_q"), (axes[1], "s_v"), (axes[2], "fire"))]
    for axis, key, label in shown:
        if key in rows[0]:
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker=".",
                      label=label)
    axes[0].set(title="Terms of eq. (16), nats")
    axes[1].set(title="Scales of eqs. (1), (3)")
    axes[2].set(title="Share of templates that fire", ylim=(0, 1.05))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.legend(fontsize=8)
    figure.savefig(files[0], dpi=110)
    pyplot.close(figure)
    if run.supervision == "teacher" and targets.decisions:
        files.append(record.folder / "subclasses.png")
        images, labels = next(data.test.batches(4))
        W, b, c, s_T, k = targets.decisions
        identity = Decisions(W, b, c, torch.eye(len(c), device=c.device), k)
        with evaluating(teacher), autocast(run):
            z = up_to_tap(teacher, images).float()
            z = pooled(z, map_shapes(new_student(data, run), data.image_size)[0][1])
            h1 = decision_targets(z, labels, identity).argmax(1)  # (4,H,W)
        figure, axes = pyplot.subplots(len(images), 3, figsize=(9, 2 * len(images)), squeeze=False,
                                       layout="constrained", width_ratios=(1, 1, 3))
        for image, label, found, axis in zip(images, labels, h1, axes):
            seen = image.cpu() * torch.tensor(data.std).view(3, 1, 1)
            seen = (seen + torch.tensor(data.mean).view(3, 1, 1)).clamp(0, 1)
            axis[0].imshow(seen.permute(1, 2, 0).numpy())
            axis[0].set_title(f"class {int(label)}", fontsize=8)
            axis[1].imshow((found - label * k).cpu().numpy(), vmin=0, vmax=k - 1, cmap="turbo")
            axis[1].set_title("sub-class of each location", fontsize=8)
            for n in found.unique()[:3].tolist():
                color = pyplot.get_cmap("turbo")((n - int(label) * k) / max(1, k - 1))
                axis[2].bar(range(len(c)), s_T[n].cpu().numpy(), width=1.0, color=color,
                            label=f"row of sub-class {n - int(label) * k}")
            axis[2].set_xlabel("sub-class of the whole table, k to a class", fontsize=8)
            axis[2].legend(fontsize=7)
            for picture in axis[:2]:
                picture.set_axis_off()
        figure.savefig(files[1], dpi=110)
        pyplot.close(figure)
    print("pictures:", *files)


# ----------------------------------------------------------------------------------------- 5. flags
def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], DEFAULTS)
    add = parser.add_argument_group("LetKD").add_argument
    add("--layers", type=int, choices=(1, 2), default=2,
        help="1: before the pooling alone, eq. (15); 2: eq. (16) (default: 2)")
    add("--alpha", type=number(float, 0), default=1.0, metavar="A",
        help="weight of the layers' output, eq. (4); 0: auxiliary heads (default: 1)")
    add("--supervision", choices=("teacher", "none"), default="teacher",
        help="none: the layers without a teacher, a control of capacity (default: teacher)")
    add("--words", type=number(int, 2), metavar="K",
        help="visual words, eq. (6) (default: 256; cifar100, imagenet 4096)")
    add("--per-class", type=number(int, 1), default=8, metavar="k",
        help="sub-classes of a class, eq. (9) (default: 8)")
    add("--dimensions", type=number(int, 1), default=60, metavar="L",
        help="of the LDA, eq. (8); at most classes - 1 (default: 60)")
    add("--rows", type=number(int, 1), metavar="N",
        help="locations of the teacher's maps to fit on (default: 200000; cifar100 all, "
             "imagenet 2000000)")
    add("--compare", action="store_true",
        help="run the controls as well: KD, unsupervised layers, alpha 0, the other letKD")
    add("--plot", action="store_true",
        help="write layers.png and subclasses.png (needs matplotlib)")
    arguments = parse(parser, argv)
    arguments.nesterov = True  # PAPER
    arguments.drops = (0.3, 0.6, 0.9) if arguments.dataset == "imagenet" else DROPS
    if len(arguments.teacher_weights or ()) > 1:
        parser.error("--teacher-weights: one file, LetKD has one teacher")
    if arguments.alpha == 0 and arguments.supervision == "none":
        parser.error("--alpha 0 --supervision none: nothing is left but the student alone")
    check_plot(parser, arguments)
    return arguments


def variant(arguments, **flags):
    """The arguments of one student run; `flags` replace those given."""
    return argparse.Namespace(**{**vars(arguments), **flags})


# ------------------------------------------------------------------------------------------ 6. main
def check_maps(data, arguments, runs):
    """Sides of the student's maps at the two taps; InputError, before any training, where the
    teacher's do not fit them or the rows do not suffice."""
    shapes = [map_shapes(build_model(name, data.classes, data.image_size), data.image_size)
              for name in (arguments.teacher, arguments.student)]
    sides = [side for _, side in shapes[1]]
    supervised = [run.layers for run in runs if run.supervision == "teacher"]
    if not supervised:
        return sides
    for (_, side), own in zip(shapes[0], sides):
        if side % own:
            raise InputError(f"{arguments.teacher} has maps of side {side} where "
                             f"{arguments.student} has {own}: choose networks whose sides divide")
    used, _ = rows_used(data, arguments)
    rows = int(used.sum()) * per_image(sides[1], data, arguments)
    if arguments.words > rows:
        raise InputError(f"--words {arguments.words}: the training images have only {rows} "
                         "locations to fit them on; fewer words, or more --rows")
    sizes = torch.as_tensor(data.train.labels).cpu()[used].bincount(minlength=data.classes)
    smallest = int(sizes.min()) * per_image(sides[0], data, arguments)
    if 2 in supervised and arguments.per_class > smallest:
        raise InputError(f"--per-class {arguments.per_class}: the smallest class has only "
                         f"{smallest} locations; fewer sub-classes, or more --rows or images")
    return sides


def run_seed(arguments):
    """All of one seed: teacher, targets, the student alone, the chosen run, the controls."""
    data = load_data(
        arguments.dataset, arguments.data, arguments.image_size, arguments.train_fraction,
        0, arguments.open_set, arguments.seed, arguments.device)
    check_batch_size(data, arguments)
    runs = {"": arguments}
    if arguments.compare:
        once = {"alpha": 1.0, "supervision": "teacher"}
        runs |= {"kd": variant(arguments, alpha=1.0, supervision="logits", layers=0),
                 "unsupervised": variant(arguments, alpha=arguments.alpha or 1.0,
                                         supervision="none"),
                 "alpha-0": variant(arguments, alpha=0.0, supervision="teacher"),
                 "letkd-1": variant(arguments, **once, layers=1),
                 "letkd-2": variant(arguments, **once, layers=2)}
    sides = check_maps(data, arguments, runs.values())
    introduce(data, arguments)
    E = arguments.epochs
    rates = learning_rates(arguments.learning_rate, E, arguments.drops)
    fingerprint = {"data_fingerprint": data.train.fingerprint()}

    def record_of(run, folder):
        settings = {**describe(run), **fingerprint}
        return Record(arguments.out / folder, settings, arguments.resume, arguments.device)

    record = record_of(arguments, "")  # first: refuse a folder that holds another run
    rows, teacher, targets = [], None, None
    if any(run.supervision != "none" for run in runs.values()):
        if arguments.teacher_weights:
            teacher = load_frozen(arguments.teacher, arguments.teacher_weights[0], data, arguments)
            found = {"test": evaluate(teacher, data.test, arguments)}
        else:
            result, kept = train_network(arguments.teacher, data, rates, arguments,
                                         seed=arguments.seed + 1000)
            teacher, found = kept[E], {
                "test": result["last_test"], "epochs": E,
                "seconds": training_seconds(result["rows"], len(data.train))}
        rows.append({"run": "teacher", **found, **measures(teacher, data, arguments)})
        both = any(run.supervision == "teacher" and run.layers == 2 for run in runs.values())
        if any(run.supervision == "teacher" for run in runs.values()):
            targets = prepare(teacher, data, sides, variant(arguments, layers=2 if both else 1))
    result, kept = train_network(arguments.student, data, rates, arguments, seed=arguments.seed,
                                 title="\nstudent alone")
    rows.append({"run": "student alone", "test": result["last_test"], "epochs": E,
                 "seconds": training_seconds(result["rows"], len(data.train)),
                 **measures(kept[E], data, arguments)})
    names = set()
    for folder, run in runs.items():
        if name_of(run) not in names:
            names.add(name_of(run))
            own = record if folder == "" else record_of(run, folder)
            rows.append(run_student(teacher, targets, data, run, own))
    if arguments.plot:
        plot(record, teacher, targets, data, arguments)
    chosen = name_of(arguments)
    return sorted(rows, key=lambda row: row["run"] == chosen)  # after its controls


def main():
    arguments = parse_args()
    tables = [run_seed(run) for run in each_seed(arguments)]
    formats = {"test": ".2f", "params": ",.0f", "madds": ",.0f", "fire_i": ".1f", "fire_p": ".1f",
               "agree": ".1f", "p_max": ".3f", "entropy": ".2f", "probe_x": ".2f",
               "probe_x_hat": ".2f", "rank1": ".1f", "verification": ".1f", "epochs": ".0f",
               "seconds": ".0f"}
    print_table(tables, formats, f"LetKD on {arguments.dataset}: last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
