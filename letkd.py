"""LetKD: Knowledge Distillation Layer that Lets the Student Decide.

A. Gorgun, Y. Z. Gurbuz, A. A. Alatan. BMVC 2023, arXiv:2309.02843.
Authors' code: adagorgun/letKD-framework (cited as CODE; nothing is copied from it).

A layer inside the student compares every location of a feature map with K templates and adds the
semantic vectors of the matching ones back onto the features. The teacher supervises the scores:
visual words in the layer `penult`, before the pooling; its decisions (which parts of classes its
feature space confuses) in the layer `inter`, after the first block of the last stage (where
that is its only block, as in resnet8x0.5, the layers follow each other). The layers stay at
inference; teacher, words, tables and labels do not.

    symbol          in code                              shape                meaning
    x, x_hat        x, x_hat                             (B,d,H,W)            features before, after
    Omega, s_q      KDLayer.match.weight, .scale         (K,d,1,1), scalar    templates; start at 3
    gamma, beta     KDLayer.norm (BatchNorm2d)           (K,)                 start at 1 and 0
    V, s_v          KDLayer.value.weight, .scale         (d,K,1,1), scalar    values; start at 1
    alpha           KDLayer.alpha                        constant             weight of the output
    a_m|i           scores                               (B,K,H,W)            template m, location i
    p_S, p_T        softmax of scores; targets           (B,K,H,W)            over templates
    z               features                             (B,D,H,W) or (N,D)   teacher's maps; rows
    rho             words                                (K,D)                visual words
    C, k; n         classes, per_class                   n = label k + j      sub-classes, j < k
    W, b; c_n; s_T  Decisions.weight, .bias, .centres,   (L,D), (L,);         LDA to L dimensions;
                    .table                               (Ck,L); (Ck,Ck)      centres; decisions

    network    where it comes from                              in a training step
    teacher    trained alone before, from --seed + 1000, or a   eval mode, frozen
               file; words and Decisions are fitted on it once
    student    weights drawn from --seed, its layers' likewise  train mode, learns, in one stage
Order, crops and flips of the batches: one generator, `shuffle`, seeded by --seed. Others, with the
same seed, draw the locations to fit on and the starts of k-means.

Equations, numbered by this project. PAPER: in its abstract, supplement, figures or tables. CODE: in
the authors' code. READING: our choice. unit(u) = u / max(||u||, 1e-12).

    (1)  a_m|i = s_q <unit(omega_m), unit(x_i)>                         PAPER, CODE
    (2)  p^_m|i = max(0, BatchNorm(a_m|i))                              PAPER, CODE
    (3)  v_j|i = s_v <unit(V_j), unit(p^_i)>, unit along K              CODE
    (4)  x_hat_i = x_i + alpha v_i                                      PAPER, CODE
    (5)  p_S(m|i) = softmax_m(a_m|i), of the scores BEFORE BatchNorm    PAPER, CODE
    (6)  rho = k-means centres of the teacher's z                       PAPER, CODE
    (7)  p_T(m|i) = softmax_m(-tau ||z_i - rho_m||^2)                   PAPER; tau = 1: CODE
    (8)  LDA: g = W z + b, with W S_w W^T = I                           PAPER, CODE; cut: READING
    (9)  k-means per class on g; h1 = the nearest c_n of the OWN class  PAPER, CODE
    (10) q_n = mean of g with h1 = n; h2 = the nearest of ALL q_n       PAPER, CODE
    (11) s_T[n,m] = #(h1 = n, h2 = m) / #(h1 = n)                       PAPER, CODE
    (12) p_T(.|i) = s_T[h1(z_i, y)], y the training label               PAPER, CODE
    (13) template_loss = mean over B H W of KL(p_T || p_S)              PAPER, CODE
    (14) its gradient by the scores: (p_S - p_T) / (B H W)              algebra
    (15) letKD-1: CE + template_loss of `penult`, by (7)                PAPER; weight 1: CODE
    (16) letKD-2: (15) + template_loss of `inter`, by (12)              PAPER; weight 1: CODE
    (17) a layer costs 2dK + 2K + 2 parameters, 2dK H W multiply-adds   algebra
    (kd) a control: CE + T^2 mean_b KL(p_t^T || p_s^T), T = 4           READING
    (lr) lr0 0.1^j, j = how many of 5/8, 3/4, 7/8 of the run are over   PAPER (150, 180, 210 of 240;
                                                                        ImageNet 30, 60, 90 of 100)

The supplement prints softmax(d) in Algorithm 1 and min for argmin in Algorithm 2: slips; here
softmax(-d) and argmin. Where gradients go: the loss of `inter` reaches the student before that
layer and its templates and s_q, nothing else; the loss of `penult` these, BatchNorm and values of
`inter`, the blocks after it, templates and s_q of `penult`, but not the head; CE reaches everything
(with alpha 0 neither of these two reaches `inter`, nor CE `penult`).
Capacity: the deployed student is larger than the plain one, which every table shows (layers of
alpha 0 change nothing and are not counted). By our count, on the paper's resnet56 -> resnet20 it
grows from 0.278 M to 0.915 M parameters, more than its teacher.
As in CODE, h1 goes by k-means centres and h2 by means, and p^ is normalised (the appendix keeps
emphasis in its length). Not copied: CODE's h1 as argmax of mask (row maximum - distance), which for
k = 1 can leave the label's class; its equal slices that lose rows; its epoch that is best on test.
UNKNOWN: what the paper's main text states on loss weights, tau and layer places (here: CODE); best
or last epoch behind its numbers, and what their "-+" is; batch, weight decay and tau outside
CIFAR-100, L outside the CIFARs (CODE: 8 on CIFAR-10; here 9). READING: small data and teachers, few
epochs and seeds, rate 0.1 on shapes, K = 256 words on small data, sampled locations, k-means in
torch, L = min(dimensions, C - 1, rank), the cut of small eigenvalues, signs of the axes, empty
sub-classes, ImageNet's batch and weight decay, the last batch kept (CODE drops it), black padding
(CODE: reflected), one place for all networks (CODE takes MobileNetV2's 80 channels), last-epoch
accuracy, the kd control, the fifth field of Decisions. Not set by themselves: rate 0.01 and alpha
0.1, 0.2 of MobileNetV2 (PAPER).

    python letkd.py                        embedded shapes; 2 CPU cores: 25 s + 15 s of teacher
    python letkd.py --compare              with its controls; 2 CPU cores: about 2 minutes
    python letkd.py --alpha 0              equal compute: the same losses, nothing fed forward
    python letkd.py --supervision none     equal epochs, equal capacity: the layers, no teacher
    python letkd.py --supervision logits   equal epochs: (kd) on the plain student
    python letkd.py --open-set 5           recognition of classes never trained on
    python letkd.py --dataset cifar100     resnet56 -> resnet20, 4096 words, 240 epochs: not yet run
"""

from __future__ import annotations

import hashlib
import inspect
import time
from pathlib import Path
from typing import NamedTuple

from common import (
    SHAPES, SMALL, InputError, Mean, Network, autocast, base_parser, build_model, each_seed,
    embeddings, evaluate, evaluating, folded, load_data, load_file, load_frozen, number,
    open_set_rows, parse, planned_runs, print_table, recognition, refuse_useless, run_script,
    save_file, sgd, sound, step_rates, train_network)

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
CONTROLS = {  # --compare: name -> (the flags it changes, perhaps by the runs before it; why)
    "kd": ({"supervision": "logits", "alpha": 1.0},
           "equal epochs: the plain student learns from the teacher's logits"),
    "unsupervised layers": (
        lambda runs: {"supervision": "none",  # the chosen run's alpha, but for 0
                      "alpha": next(iter(runs.values())).settings["alpha"] or 1.0},
        "equal epochs and capacity: the layers without a teacher"),
    "auxiliary heads": ({"supervision": "teacher", "alpha": 0.0},
                        "equal compute: the same losses, but nothing is fed forward"),
    "letKD-1": ({"supervision": "teacher", "alpha": 1.0, "layers": 1}, "eq. (15), words alone"),
    "letKD-2": ({"supervision": "teacher", "alpha": 1.0, "layers": 2}, "eq. (16), decisions too"),
}


# -------------------------------------------------------------------------- 1. losses and equations
def at_every_location(maps, matrix, bias=None):
    """maps (B,in,H,W), matrix (out,in) -> (B,out,H,W), a 1x1 convolution in full float32.

    Autocast is off; and a GPU may round convolutions to TF32, but not matrix products.
    """
    with torch.autocast(maps.device.type, enabled=False):
        return F.linear(maps.movedim(1, 3), matrix, bias).movedim(3, 1)


def nearest(points, centres):
    """Index of the nearest centre (N,), the lowest on a tie, and the squared distance (N,)."""
    chunks, shift = [], centres.mean(0)  # moves points and centres alike: fewer digits are lost
    centres = centres - shift
    for z in points.split(max(1, 2**24 // len(centres))):  # 64 MB of distances at a time
        z = z - shift
        d = torch.addmm(centres.square().sum(1), z, centres.T, alpha=-2)  # (n,K), without ||z||^2
        least, index = d.min(1)
        chunks.append((index, (least + z.square().sum(1)).clamp_min(0)))
    return tuple(torch.cat(part) for part in zip(*chunks))


def group_means(points, index, count):
    """Of points (N,D) and their groups' index (N,): means (count,D) in float64, sizes (count,)."""
    sums = torch.zeros(count, points.shape[1], dtype=torch.float64, device=points.device)
    for part, z in zip(index.split(100_000), points.split(100_000)):
        sums.index_add_(0, part, z.double())
    size = index.bincount(minlength=count)
    return sums / size.clamp_min(1)[:, None], size  # the mean of an empty group is 0


def k_means(points, count, generator=None, iterations=20):
    """k-means of points (N,D): centres (count,D), the nearest of each point, squared distances.

    Starts at `count` points drawn by `generator` (CPU). An empty centre takes the point farthest
    from its own centre, a second one the next farthest. ValueError for fewer points than centres.
    READING (the authors: faiss, 20 iterations).
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"{count} centres need as many rows, there are {len(points)}")
    start = torch.randperm(len(points), generator=generator)[:count]
    centres = points[start.to(points.device)]
    for _ in range(iterations):
        index, distance = nearest(points, centres)
        means, size = group_means(points, index, count)
        centres = means.to(points.dtype)
        empty = (size == 0).nonzero().flatten()
        if len(empty):
            farthest = distance.argsort(descending=True, stable=True)[:len(empty)]
            centres[empty] = points[farthest]
    return centres, *nearest(points, centres)


def fit_words(features, count, generator=None):
    """Eq. (6): visual words (count,D) from the teacher's features (N,D) at single locations."""
    # Eq. (6): rho = k-means centres; no PCA, whitening or normalisation
    return k_means(features, count, generator)[0]


def word_targets(features, words, tau=1.0):
    """Eq. (7): p_T, (B,K,H,W), from the teacher's features (B,D,H,W) and words (K,D).

    tau multiplies (an inverse temperature). ValueError if the widths differ. No gradients.
    """
    if features.shape[1] != words.shape[1]:
        raise ValueError(f"features have {features.shape[1]} channels, words {words.shape[1]}")
    shift = words.detach().mean(0)  # (D,), moves z and rho alike: fewer digits are lost
    z, rho = features.detach() - shift[:, None, None], words.detach() - shift
    # Eq. (7): softmax_m(-tau ||z - rho_m||^2); ||z||^2 is the same for every m and cancels
    closeness = 2 * at_every_location(z, rho) - rho.square().sum(1)[:, None, None]  # (B,K,H,W)
    return F.softmax(tau * closeness, dim=1)


class Decisions(NamedTuple):
    """What eqs. (8) to (11) find; plain tensors, never trained."""
    weight: torch.Tensor  # (L,D)
    bias: torch.Tensor  # (L,)
    centres: torch.Tensor  # (C k, L)
    table: torch.Tensor  # (C k, C k), rows sum to 1
    per_class: int = 8


def discriminant(features, labels, classes, dimensions):
    """Eq. (8): W (L,D) and b (L,) of the LDA of features (N,D) with labels (N,), in float64."""
    D = features.shape[1]
    mu, size = group_means(features, labels, classes)  # (C,D), (C,)
    mu_all = size.double() @ mu / len(labels)  # (D,)
    # Eq. (8): S_w = sum (z - mu_y)(z - mu_y)^T / (N - C),
    #          S_b = sum_c N_c (mu_c - mu_all)(mu_c - mu_all)^T / N
    S_w = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for y, z in zip(labels.split(100_000), features.split(100_000)):
        centred = z.double() - mu[y]
        S_w += centred.T @ centred
    S_w /= max(1, len(labels) - classes)
    S_b = ((mu - mu_all).T * size) @ (mu - mu_all) / len(labels)
    # S_w = U diag(lambda) U^T; dead channels have lambda = 0: cut, never invert
    values, U = torch.linalg.eigh(S_w)
    large = values > 1e-6 * values.max()
    P = U[:, large] * values[large].rsqrt()  # (D, how many are large)
    # P^T S_b P = E diag(e) E^T, e descending;  W = (P E[:, :L])^T,  b = -W mu_all
    E = torch.linalg.eigh(P.T @ S_b @ P)[1].flip(1)
    L = min(dimensions, classes - 1, P.shape[1])
    W = (P @ E[:, :L]).T  # (L,D)
    # READING: the entry of largest magnitude of each row is positive
    W = W * W.gather(1, W.abs().argmax(1, keepdim=True)).sign()
    return W, -W @ mu_all


def fit_decisions(features, labels, classes, per_class=8, dimensions=60, generator=None):
    """Eqs. (8) to (11) on the teacher's features (N,D), labels (N,): its `Decisions`.

    Fitted in float64, returned in the features' type. ValueError where a class has fewer rows than
    sub-classes.
    """
    k = per_class
    W, b = discriminant(features, labels, classes, dimensions)
    # Eq. (8): g = W z + b, class after class
    g = [features[labels == y].double() @ W.T + b for y in range(classes)]  # (N_y,L) each
    # Eq. (9): k centres per class, by one generator; h1 = the nearest of the own class
    centres, nearest_own, _ = zip(*(k_means(g_y, k, generator) for g_y in g))
    c_n, g = torch.cat(centres), torch.cat(g)  # (C k, L), (N,L)
    h1 = torch.cat([y * k + index for y, index in enumerate(nearest_own)])  # (N,)
    # Eq. (10): q_n = mean of the g with h1 = n; an empty one keeps its centre (READING)
    means, size = group_means(g, h1, len(c_n))
    q_n = torch.where(size[:, None] > 0, means, c_n)
    # Eq. (10): h2 = argmin over ALL n of ||g - q_n||^2
    h2, _ = nearest(g, q_n)
    # Eq. (11): s_T[n,m] = #{h1 = n and h2 = m} / #{h1 = n}; an empty row: one-hot (READING)
    pairs = (h1 * len(c_n) + h2).bincount(minlength=len(c_n)**2).view(len(c_n), len(c_n))
    counts = pairs.double() + (size == 0).diag()
    s_T = counts / counts.sum(1, keepdim=True)
    return Decisions(*(part.to(features.dtype) for part in (W, b, c_n, s_T)), k)


def decision_targets(features, labels, decisions):
    """Eq. (12): p_T, (B,Ck,H,W), from the teacher's features (B,D,H,W) and labels (B,).

    Rows k y to k y + k - 1 are class y's. ValueError if widths, batch or labels (0 to C - 1) do
    not fit `decisions`. No gradients.
    """
    W, b, c, s_T, k = decisions
    if features.shape[1] != W.shape[1] or len(features) != len(labels) or len(c) % k:
        raise ValueError(f"{len(features)} feature maps of {features.shape[1]} channels, "
                         f"{len(labels)} labels, an LDA of {W.shape[1]} channels, {len(c)} centres "
                         f"of {k} a class")
    if labels.device.type == "cpu" and not (0 <= labels).logical_and(labels < len(c) // k).all():
        raise ValueError(f"labels must lie in 0..{len(c) // k - 1}")  # a GPU would have to wait
    # Eq. (8): g = W z + b
    g = at_every_location(features, W, b)  # (B,L,H,W)
    # Eq. (9): h1 = argmin over the sub-classes n of class y of ||g - c_n||^2
    c_y = c.view(-1, k, c.shape[1])[labels]  # (B,k,L)
    with torch.autocast(g.device.type, enabled=False):
        product = torch.einsum("bkl,blhw->bkhw", c_y, g)
    distance = c_y.square().sum(2)[:, :, None, None] - 2 * product  # (B,k,H,W), without ||g||^2
    h1 = labels[:, None, None] * k + distance.argmin(1)  # (B,H,W)
    # Eq. (12): p_T(.|i) = s_T[h1(z_i, y)]
    return s_T.detach()[h1].movedim(3, 1)  # (B,Ck,H,W)


def template_loss(scores, targets):
    """Eq. (13), a scalar in nats. Scores a and targets p_T (B,K,H,W); ValueError if they differ.

    Only the scores get a gradient, eq. (14). p_T may hold zeros.
    """
    if scores.shape != targets.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} must "
                         "have one shape")
    # Rows first: "batchmean" on maps would divide by B alone. kl_div takes the learner first and
    # as LOG-probabilities; its 0 log 0 is 0.
    a, p_T = (maps.movedim(1, 3).flatten(0, 2) for maps in (scores, targets.detach()))  # (BHW,K)
    # Eq. (5): p_S = softmax over m of the scores before BatchNorm
    log_p_S = F.log_softmax(a, dim=1)
    # Eq. (13): 1/(B H W) sum_i sum_m p_T (log p_T - log p_S)
    return F.kl_div(log_p_S, p_T, reduction="batchmean")


def kd_loss(student_logits, teacher_logits, temperature=4.0):
    """The second term of (kd), a scalar; logits (B,C). Only the student gets gradients."""
    # (kd): T^2 mean_b KL(p_t^T || p_s^T)
    return temperature**2 * F.kl_div(
        F.log_softmax(student_logits / temperature, 1),
        F.log_softmax(teacher_logits.detach() / temperature, 1), reduction="batchmean",
        log_target=True)


def learning_rates(initial, epochs, dataset):
    """(lr): the rate of each epoch; drops after 5/8, 3/4, 7/8, of ImageNet 3/10, 6/10, 9/10."""
    if dataset != "imagenet":
        return step_rates(initial, epochs)
    # (lr): lr0 0.1^j, j = how many of the shares are over
    return [initial * 0.1 ** sum(10 * e >= part * epochs for part in (3, 6, 9))
            for e in range(epochs)]


# --------------------------------------------------------------------------------------- 2. modules
class CosineConv1x1(nn.Module):
    """Eqs. (1), (3): (B,in,H,W) -> (B,out,H,W), a learned scale times cosines; no bias."""

    def __init__(self, in_channels, out_channels, scale):
        super().__init__()
        start = torch.randn(out_channels, in_channels, 1, 1) * (2 / in_channels) ** 0.5
        self.weight = nn.Parameter(start)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x):
        # Eq. (1): s_q <unit(omega_m), unit(x_i)>, both of unit length along the input channels;
        # Eq. (3): s_v <unit(V_j), unit(p^_i)>, likewise: the input channels are the K templates
        unit_weight = F.normalize(self.weight, dim=1).flatten(1)  # (out,in)
        return self.scale * at_every_location(F.normalize(x, dim=1), unit_weight)


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
    """A network of common.py with a KDLayer at one or both places; None: no layer there."""

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

    def layers(self):
        """{"i": inter, "p": penult}, those that there are."""
        both = {"i": self.inter, "p": self.penult}
        return {letter: layer for letter, layer in both.items() if layer is not None}


def map_shapes(network, image_size):
    """[(channels, side)] at the places of `inter` and `penult`, of a network on the CPU."""
    with evaluating(network):
        x = up_to_tap(network, torch.zeros(1, 3, image_size, image_size))
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
    """Average-pool square maps r times larger than the student's, as in CODE; ValueError if r is no
    integer."""
    r, rest = divmod(features.shape[3], side)
    if rest or features.shape[2] != features.shape[3]:
        raise ValueError(f"the teacher's maps are {features.shape[2]}x{features.shape[3]}, the "
                         f"student's {side}x{side}")
    return F.avg_pool2d(features, r) if r > 1 else features


# -------------------------------------------------------------------------------------- 3. training
def networks_alone(data, arguments):
    """{name: (network, result)}: the teacher, if a run needs one, and the student alone.

    Frozen, in eval mode. The result of a teacher from --teacher-weights is {}.
    """
    E, alone = arguments.epochs, {}
    rates = learning_rates(arguments.learning_rate, E, arguments.dataset)
    if arguments.teacher_weights:
        path = arguments.teacher_weights[0]
        alone["teacher"] = load_frozen(arguments.teacher, path, data, arguments), {}
    elif arguments.compare or arguments.supervision != "none":
        result, states = train_network(arguments.teacher, data, rates, arguments,
                                       seed=arguments.seed + 1000)
        alone["teacher"] = states[E], result
    result, states = train_network(arguments.student, data, rates, arguments, seed=arguments.seed,
                                   title="\nstudent alone")
    return {**alone, "student alone": (states[E], result)}


def reference_rows(alone, data, arguments):
    """The table's rows of the networks trained alone."""
    return [{"run": name, "test": evaluate(network, data.test, arguments),
             "best": result.get("best_test"), "epochs": arguments.epochs if result else None,
             "seconds": result.get("seconds"), **measures(network, data, arguments)}
            for name, (network, result) in alone.items()]


class Targets(NamedTuple):
    """What is fitted once per teacher: words (K,D) for `penult`, decisions for `inter`."""
    words: torch.Tensor
    decisions: Decisions


def sample(sides, data, arguments):
    """What --rows leaves to fit on: a mask of the training images, how many locations of an image
    on maps of each side, and the generator that draws them."""
    generator, size = torch.Generator().manual_seed(arguments.seed), len(data.train)
    used = torch.zeros(size, dtype=torch.bool)
    used[torch.randperm(size, generator=generator)[:arguments.rows]] = True
    return used, [max(1, min(side**2, arguments.rows // size)) for side in sides], generator


def float64_ready(tensor):
    """The tensor, but on the CPU where its device knows no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def teacher_features(teacher, data, sides, arguments):
    """The teacher's features at the two places, (N,D) each, and the labels (N,) of the first.

    Images are not augmented, locations those of `sample`.
    """
    used, counts, generator = sample(sides, data, arguments)
    features, tags, seen = [[], []], [], 0
    with evaluating(teacher), autocast(arguments):
        for images, labels in data.train.batches():
            here = used[seen:seen + len(images)].to(images.device)
            seen += len(images)
            x = up_to_tap(teacher, images)
            for maps, side, count, batches in zip((x, after_tap(teacher, x)), sides, counts,
                                                  features):
                z = pooled(maps.float(), side).movedim(1, 3).flatten(1, 2)  # (B,HW,D)
                drawn = torch.rand(z.shape[:2], generator=generator).argsort(1)
                drawn = drawn[:, :count, None].to(z.device)
                z = z.gather(1, drawn.expand(-1, -1, z.shape[2]))  # (B,count,D)
                batches.append(z[here].flatten(0, 1))
            tags.append(labels[here].repeat_interleave(counts[0]))
    for place, batches in enumerate(features):
        features[place] = float64_ready(torch.cat(batches))
        batches.clear()  # one place at a time is there twice
    return *features, float64_ready(torch.cat(tags))


def prepare(teacher, data, arguments):
    """`Targets` of the frozen teacher, eqs. (6) and (8) to (11); kept in --cache."""
    network = build_model(arguments.student, data.classes, data.image_size)
    sides = [side for _, side in map_shapes(network, data.image_size)]
    weights = hashlib.sha1(b"".join(value.cpu().contiguous().numpy().tobytes()
                                    for value in teacher.state_dict().values())).hexdigest()
    files = Path(__file__), Path(inspect.getfile(build_model))  # this script, whatever its name
    sources = [file.read_bytes() for file in files]
    settings = [weights, sources, data.train.fingerprint(), data.mean, data.std, data.classes,
                sides, arguments.seed, arguments.rows, arguments.words, arguments.per_class,
                arguments.dimensions, arguments.precision, arguments.device.type,
                torch.__version__]
    key = hashlib.sha1(repr(settings).encode()).hexdigest()[:12]
    path = arguments.cache / f"{data.name}-{arguments.teacher}-targets-{key}.pt"
    if not sound(path):
        began = time.time()
        inter, penult, labels = teacher_features(teacher, data, sides, arguments)
        print(f"fitting words on {len(penult)} locations, decisions on {len(inter)}")
        generator = torch.Generator()  # of the starts of k-means
        words = fit_words(penult, arguments.words, generator.manual_seed(arguments.seed))
        decisions = fit_decisions(inter, labels, data.classes, arguments.per_class,
                                  arguments.dimensions, generator.manual_seed(arguments.seed))
        save_file({"words": words, **decisions._asdict()}, path)
        print(f"fitted in {time.time() - began:.1f} s, kept in {path}")
    words, *decisions, per_class = load_file(path).values()
    return Targets(words.to(arguments.device),
                   Decisions(*(part.to(arguments.device) for part in decisions), per_class))


def train_step(student, teacher, targets, optimizer, images, labels, arguments):
    """One step by --supervision: (15), or (16) if the student has `inter`; (kd); or CE alone.

    Returns the loss terms, and the logits.
    """
    with autocast(arguments):
        if arguments.supervision != "none":
            with torch.no_grad():  # eval mode, see `frozen`
                z_inter = up_to_tap(teacher, images)  # (B,D,H',W')
                z_penult = after_tap(teacher, z_inter)  # (B,D,H',W')
                teacher_logits = teacher.forward_head(z_penult)  # (B,C), for (kd) alone
        u, scores_i, scores_p = student.forward_scores(images)
        logits = student.forward_head(u).float()  # (B,C)
    terms = {"ce": F.cross_entropy(logits, labels)}
    if arguments.supervision == "logits":
        terms["kl"] = kd_loss(logits, teacher_logits.float())  # (kd)
    if arguments.supervision == "teacher":
        # Eq. (15): letKD-1 = CE + template_loss of `penult`, by (7)
        z = pooled(z_penult.float(), scores_p.shape[3])
        terms["penult"] = template_loss(scores_p, word_targets(z, targets.words))
    if arguments.supervision == "teacher" and scores_i is not None:
        # Eq. (16): letKD-2 = (15) + template_loss of `inter`, by (12)
        z = pooled(z_inter.float(), scores_i.shape[3])
        terms["inter"] = template_loss(scores_i, decision_targets(z, labels, targets.decisions))
    loss = sum(terms.values())  # all of weight 1
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return terms, logits


def train(record, data, teacher, targets, arguments):
    """Train the student with its layers, from scratch and in one stage, and finish `record`.

    The record is the loop's memory. `rows`: one for each closed epoch, so their number says where
    the loop stands. `restore` names what a checkpoint holds and, by --resume, gives each part its
    state of the last closed epoch; `close_epoch` prints, logs and saves; `finish` writes student.pt
    and result.json. A `Mean` averages an epoch's batches.
    """
    rates = learning_rates(arguments.learning_rate, arguments.epochs, arguments.dataset)
    teacher = folded(teacher) if teacher else None
    student = new_student(data, arguments).to(arguments.device)
    optimizer = sgd(student.parameters(), arguments)
    shuffle = torch.Generator().manual_seed(arguments.seed)  # order, crops and flips
    record.restore(student=student, optimizer=optimizer, shuffle=shuffle)
    if arguments.compile:
        student.forward_scores = torch.compile(student.forward_scores)
    while (epoch := len(record.rows)) < arguments.epochs:
        optimizer.param_groups[0]["lr"] = rates[epoch]
        student.train()
        for layer in student.layers().values():
            layer.fired.zero_()
        mean = Mean("the student")
        for images, labels in data.train.augmented(arguments.batch_size, shuffle):
            terms, logits = train_step(student, teacher, targets, optimizer, images, labels,
                                       arguments)
            mean.add(terms, logits, labels)
        row = {"lr": rates[epoch], **mean.row(), "test": evaluate(student, data.test, arguments)}
        for letter, layer in student.layers().items():
            row |= {f"s_q_{letter}": layer.match.scale.item(),
                    f"s_v_{letter}": layer.value.scale.item(),
                    f"fire_{letter}": layer.fired.float().mean().item()}
        record.close_epoch(row, arguments.epochs)
    fire = {name: value for name, value in record.rows[-1].items() if name.startswith("fire_")}
    seen = len(data.train) * len(record.rows)
    forward = {} if arguments.supervision == "none" else {"teacher forward": seen}
    numbers = {**measures(student, data, arguments), **fire}
    if arguments.supervision == "teacher":
        numbers |= agreement(student, teacher, targets, data, arguments)
    record.finish(
        {"student": student.state_dict()}, measures=numbers,
        paths={"data": arguments.data and str(arguments.data), "cache": str(arguments.cache),
               "teacher_weights": [str(path) for path in arguments.teacher_weights or ()]},
        images={"student forward and backward": seen, **forward})


def new_student(data, arguments):
    """The student of a run, with its layers."""
    layers = 0 if arguments.supervision == "logits" else arguments.layers
    inter = data.classes * arguments.per_class if layers == 2 else 0
    penult = arguments.words if layers else 0
    return build_student(arguments.student, data.classes, data.image_size, inter, penult,
                         arguments.alpha, arguments.seed)


def measures(network, data, arguments):
    """What one network costs, its linear probes at the place of `inter`, and its unseen classes."""
    parameters, multiply_adds = cost(network, data.image_size)
    numbers = {"params": parameters, "madds": multiply_adds,
               "probe_x": probe(lambda images: up_to_tap(network, images).mean((2, 3)),
                                network, data, arguments)}
    if getattr(network, "inter", None) is not None:
        numbers["probe_x_hat"] = probe(
            lambda images: network.inter(up_to_tap(network, images))[0].mean((2, 3)),
            network, data, arguments)
    return {**numbers, **recognition(network, data, arguments)}


def cost(network, image_size):
    """(parameters, multiply-adds for one image) of inference: convolutions and linear layers.

    A layer of alpha 0 adds nothing to the logits: it is left out, as one would when deploying.
    """
    if isinstance(network, Student):
        layers = [layer if layer is not None and layer.alpha else None
                  for layer in (network.inter, network.penult)]
        network = Student(network, *layers).train(network.training)
    counts = []

    def count(module, _, output):  # every weight is used once at every location of the output
        counts.append(module.weight.numel() * output[0, 0].numel())

    hooks = [module.register_forward_hook(count) for module in network.modules()
             if isinstance(module, (nn.Conv2d, nn.Linear, CosineConv1x1))]
    with evaluating(network):
        network(torch.zeros(1, 3, image_size, image_size, device=network.head.weight.device))
    for hook in hooks:
        hook.remove()
    return sum(parameter.numel() for parameter in network.parameters()), sum(counts)


def probe(forward, network, data, arguments):
    """Accuracy in % of an LDA classifier on (B,d) vectors, fitted on the training images.

    The supplement's Table 4 test. READING: equal priors, images not augmented.
    """
    vectors, labels = map(float64_ready, embeddings(network, data.train, arguments, forward))
    W, b = discriminant(vectors, labels, data.classes, data.classes - 1)
    g = vectors.double() @ W.T + b  # (N,L)
    means, _ = group_means(g, labels, data.classes)  # (C,L)
    vectors, labels = map(float64_ready, embeddings(network, data.test, arguments, forward))
    right = nearest(vectors.double() @ W.T + b, means)[0] == labels
    return 100 * right.double().mean().item()


def agreement(student, teacher, targets, data, arguments):
    """On test locations: % with argmax p_S = argmax p_T (7), the mean of max_m p_T; and, of
    letKD-2, the mean entropy of a row of s_T in nats."""
    def forward(images):
        scores = student.forward_scores(images)[2]
        z = after_tap(teacher, up_to_tap(teacher, images))
        p_T = word_targets(pooled(z.float(), scores.shape[3]), targets.words)  # (B,K,H,W)
        same = scores.argmax(1) == p_T.argmax(1)  # (B,H,W)
        return torch.stack([100.0 * same, p_T.amax(1)], 1).mean((2, 3))  # (B,2)

    agree, p_max = embeddings(student, data.test, arguments, forward)[0].mean(0).tolist()
    numbers = {"agree": agree, "p_max": p_max}
    if student.inter is not None:
        s_T = targets.decisions.table.cpu()
        numbers["entropy"] = torch.special.entr(s_T).sum(1).mean().item()
    return numbers


# ----------------------------------------------------------------------------------------- 4. flags
REAL = {**SMALL, "words": 256, "rows": 200_000}
DEFAULTS = {  # flags by data set; each can be given by hand
    "shapes": {**REAL, **SHAPES},
    "fashionmnist": REAL, "cifar10": REAL, "folder": REAL, "tinyimagenet": REAL,
    "cifar100": {**RECIPE, "teacher": "resnet56", "student": "resnet20", "epochs": 240,
                 "words": 4096, "rows": 3_200_000},  # all locations of all images
    "imagenet": {**RECIPE, "teacher": "resnet34", "student": "resnet18", "epochs": 100,
                 "words": 4096, "rows": 2_000_000, "learning_rate": 0.1, "weight_decay": 1e-4,
                 "batch_size": 256},
}
COLUMNS = {"test": ".2f", "best": ".2f", "params": ",.0f", "madds": ",.0f", "fire_i": ".3f",
           "fire_p": ".3f", "agree": ".1f", "p_max": ".3f", "entropy": ".2f", "probe_x": ".2f",
           "probe_x_hat": ".2f", "rank1": ".1f", "verification": ".1f", "epochs": ".0f",
           "seconds": ".0f"}


def name_of(arguments):
    """The name of the chosen run in the table."""
    names = {"logits": "kd", "none": "unsupervised layers",
             "teacher": f"letKD-{arguments.layers}" if arguments.alpha else "auxiliary heads"}
    alpha = "" if arguments.alpha in (0, 1) else f", alpha {arguments.alpha:g}"
    return names[arguments.supervision] + alpha


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], DEFAULTS)
    add = parser.add_argument_group("LetKD").add_argument
    add("--layers", type=int, choices=(1, 2), default=2,
        help="1: before the pooling alone, eq. (15); 2: eq. (16) (default: 2)")
    add("--alpha", type=number(float, 0), default=1.0, metavar="A",
        help="weight of the layers' output, eq. (4); 0: auxiliary heads (default: 1)")
    add("--supervision", choices=("teacher", "none", "logits"), default="teacher",
        help="none: the layers without a teacher, a control of capacity; logits: the plain "
             "student learns by (kd) (default: teacher)")
    add("--words", type=number(int, 2), metavar="K",
        help="visual words, eq. (6) (default: 256; cifar100, imagenet 4096)")
    add("--per-class", type=number(int, 1), default=8, metavar="k",
        help="sub-classes of a class, eq. (9), fitted for --layers 1 too (default: 8)")
    add("--dimensions", type=number(int, 1), default=60, metavar="L",
        help="of the LDA, eq. (8); at most classes - 1 (default: 60)")
    add("--rows", type=number(int, 1), metavar="N",
        help="locations of the teacher's maps to fit on (default: 200000; cifar100 all, "
             "imagenet 2000000)")
    add("--compare", action="store_true", default=None,
        help=f"run the controls as well: {', '.join(CONTROLS)}; one table")
    arguments = parse(parser, argv)
    arguments.nesterov = True  # PAPER
    if len(arguments.teacher_weights or ()) > 1:
        parser.error("--teacher-weights: one file, LetKD has one teacher")
    if arguments.alpha == 0 and arguments.supervision == "none":
        parser.error("--alpha 0 --supervision none: nothing is left but the student alone")
    every = arguments.compare is not None
    layered, taught = every or arguments.supervision != "logits", arguments.supervision != "none"
    fitted, owner = every or arguments.supervision == "teacher", "--supervision teacher"
    refuse_useless(parser, {
        "alpha": (arguments.supervision != "logits", "the layers, which a plain student lacks"),
        "layers": (arguments.supervision != "logits", "the layers, which a plain student lacks"),
        "words": (layered, "the layers, which a plain student lacks"),
        "per_class": (fitted or layered and arguments.layers == 2, "the layer of the decisions"),
        "dimensions": (fitted, owner),
        "rows": (fitted, owner),
        "teacher_weights": (every or taught, "a --supervision by a teacher")})
    return arguments


def check_locations(data, arguments):
    """InputError where the teacher's maps do not fit the student's, or are too few to fit on."""
    student, teacher = ([side for _, side in map_shapes(
        build_model(name, data.classes, data.image_size), data.image_size)]
        for name in (arguments.student, arguments.teacher))
    for side, teacher_side in zip(student, teacher):
        if teacher_side % side:
            raise InputError(f"{arguments.teacher} has maps of side {teacher_side} where "
                             f"{arguments.student} has {side}: choose networks whose sides divide")
    used, counts, _ = sample(student, data, arguments)
    sizes = torch.as_tensor(data.train.labels).cpu()[used].bincount(minlength=data.classes)
    smallest, every = int(sizes.min()) * counts[0], int(sizes.sum()) * counts[1]
    if arguments.words > every:
        raise InputError(f"--words {arguments.words}: the training images have only {every} "
                         "locations to fit them on; fewer words, or more --rows")
    if arguments.per_class > smallest:
        raise InputError(f"--per-class {arguments.per_class}: the smallest class has only "
                         f"{smallest} locations; fewer sub-classes, or more --rows or images")


def main():
    arguments, tables = parse_args(), []
    for of_seed in each_seed(arguments):
        data = load_data(of_seed)
        supervised = of_seed.compare or of_seed.supervision == "teacher"
        if supervised:
            check_locations(data, of_seed)
        runs = planned_runs(of_seed, data, name_of(of_seed), CONTROLS)
        alone = networks_alone(data, of_seed)
        teacher, _ = alone.get("teacher", (None, None))
        targets = prepare(teacher, data, of_seed) if supervised else None
        rows = open_set_rows(data, of_seed) + reference_rows(alone, data, of_seed)
        for name, flags, record in runs:
            if not record.result:
                train(record, data, teacher, targets, flags)
            rows.append({"run": name, **record.table_row()})
        tables.append(rows)
    print_table(tables, COLUMNS, f"LetKD on {arguments.dataset}: last-epoch test accuracy (%)")


if __name__ == "__main__":
    run_script(main)
