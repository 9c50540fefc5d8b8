"""Data, models, evaluation and the training loop's frame for the five scripts. No method is here.

B images in a batch, C classes, D features, H x W pixels. Images rest as uint8 (N,3,H,W) on the
device and are augmented a batch at a time. Every network shows its parts (`stem`, `stages`, `neck`,
`head`), so that a method can put a layer between two of them. All that is random is drawn by torch
on the CPU: splits from --seed, batches from the script's generator, weights from the seed of
`build_model`; shapes and verification pairs have fixed seeds. Equal seed, machine, threads and
torch: equal bits on the CPU; a GPU may differ in the last ones. The blocks of this file:
1. flags   2. data   3. models   4. evaluation   5. runs   6. controls and their table
"""

from __future__ import annotations

import sys


def on_error(kind, error, trace):
    """Ctrl-C ends as one line, also while torch is imported: the scripts import this file first."""
    if kind is KeyboardInterrupt:
        script = sys.argv[0].rpartition("/")[2]
        print(f"\n{script}: stopped; the same command with --resume goes on after the last "
              "finished epoch", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = on_error

import argparse
import copy
import csv
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SHAPES = {  # one recipe for all scripts, so that their tables can be compared
    "teacher": "resnet14", "student": "resnet8x0.5", "epochs": 12, "batch_size": 64,
    "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
SMALL = {**SHAPES, "teacher": "resnet20", "epochs": 15, "learning_rate": 0.05}  # small real sets
DATASETS = ("shapes", "fashionmnist", "cifar10", "cifar100", "tinyimagenet", "imagenet", "folder")
FIXED_SIZES = {"fashionmnist": 28, "cifar10": 32, "cifar100": 32}


class InputError(ValueError):
    """Something the user can mend. `run_script` prints it as one line and exits with code 2."""


# ----------------------------------------------------------------------------------------- 1. flags
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low, high=1e100, low_allowed=True):
    """An argparse type: int or float within [low, high]; (low, high] if not `low_allowed`."""
    high = min(high, 10**9) if kind is int else high

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        if not low <= value <= high or value == low and not low_allowed:
            top = f" and at most {high}" if high < 1e100 else ""
            start = "at least" if low_allowed else "above"
            raise argparse.ArgumentTypeError(f"{text} must be {start} {low}{top}")
        return value
    return convert


def place(text):
    """An argparse type: a path; the empty one, which would be the current folder, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def base_parser(description, defaults, online=False, networks=None, datasets=DATASETS):
    """The flags all scripts share.

    `defaults`: {data set: {flag: value}}, or a function of the arguments that gives {flag: value};
    `parse` applies them. `online`: teachers start from scratch, there is no --teacher-weights.
    `networks`: nargs of --teacher and --student for scripts that take several. `datasets`: choices.
    """
    parser = Parser(description=description, allow_abbrev=False)
    parser.chosen_defaults = defaults
    positive = number(float, 0, low_allowed=False)
    add = parser.add_argument_group("data and networks").add_argument
    add("--dataset", default="shapes", choices=datasets,
        help="default: shapes, drawn by this program, no download")
    add("--data", type=place, metavar="DIR", help="where its files lie or go (default: data)")
    add("--image-size", type=number(int, 8, 1024), metavar="PX",
        help="side of the images, for shapes, folder, tinyimagenet and imagenet")
    for name, value in (("mean", "mean"), ("std", "standard deviation")):
        add(f"--{name}", type=number(float, 0, 1), nargs=3, metavar=("R", "G", "B"),
            help=f"{value} of the pixels in [0,1] that normalises them (default: by the data set)")
    add("--train-fraction", type=number(float, 1e-6, 1), metavar="F", default=1.0,
        help="share of every class's training images to use (default: 1)")
    add("--open-set", type=number(int, 0), default=0, metavar="K",
        help="keep the last K classes out of training, test recognition on them (default: 0)")
    add("--teacher", nargs=networks, metavar="NAME", help="network of the teacher")
    add("--student", nargs=networks, metavar="NAME", help="network of the student")
    if not online:
        add("--teacher-weights", type=place, nargs="+", metavar="FILE",
            help="your own teacher: a state dict, also as the field's repositories wrap it")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10**6), metavar="E", help="epochs of a training")
    add("--batch-size", type=number(int, 2), metavar="B", help="images a step")
    add("--learning-rate", type=positive, metavar="LR", help="initial learning rate of SGD")
    add("--momentum", type=number(float, 0, 1), metavar="M", help="momentum of SGD")
    add("--weight-decay", type=number(float, 0), metavar="WD", help="L2 penalty, all parameters")
    add("--seed", type=number(int, 0), nargs="+", default=[0], metavar="S",
        help="seed of weights, split and batches (default: 0); several: one run each, then mean "
             "and standard deviation")
    add = parser.add_argument_group("machine and records").add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    add("--precision", default="fp32", choices=("fp32", "bf16"),
        help="bf16 is autocast; fp32 on a GPU leaves convolutions to TF32, torch's default")
    add("--compile", action="store_true", help="torch.compile the networks that learn")
    add("--workers", type=number(int, 0, 256), metavar="N",
        help="processes that read imagenet (default: one a core, at most 16)")
    add("--out", type=place, metavar="DIR", help="folder of the records (default: runs/...)")
    add("--cache", type=place, default=Path("runs/cache"), metavar="DIR",
        help="folder of networks trained alone, shared by all runs (default: runs/cache)")
    add("--resume", action="store_true", help="go on with the run in --out")
    return parser


def parse(parser, argv=None):
    """Parse, fill in the data set's defaults, choose the device; bad input ends here, exit 2."""
    arguments = parser.parse_args(argv)
    parser.typed = {flag: value for flag, value in vars(arguments).items()
                    if value != parser.get_default(flag)}
    if arguments.out is None:  # a folder named after the flags typed, so that runs do not collide
        silent = {"dataset", "data", "out", "cache", "device", "resume", "workers"}
        words = [Path(parser.prog).stem, arguments.dataset]
        for flag, value in parser.typed.items():
            if flag not in silent:
                values = value if isinstance(value, list) else [value] * (value is not True)
                words += [flag, *map(str, values)]
        name = "-".join(words)
        arguments.out = Path("runs") / re.sub(r"[^\w.]+", "-", name).strip("-")[:150]
    defaults = parser.chosen_defaults
    for flag, value in (defaults(arguments) if callable(defaults)
                        else defaults[arguments.dataset]).items():
        if getattr(arguments, flag, None) is None:
            setattr(arguments, flag, value)
    for name in np.hstack([arguments.teacher, arguments.student]).tolist():
        if name not in MODELS and _resnet_plan(name) is None:
            parser.error(_unknown_network(name))
    refuse_useless(parser, {
        "data": (arguments.dataset != "shapes", "a --dataset that is read from files"),
        "image_size": (arguments.dataset not in FIXED_SIZES, "shapes, folder and the ImageNets"),
        "workers": (arguments.dataset == "imagenet", "imagenet")})
    if bool(arguments.mean) != bool(arguments.std) or min(arguments.std or [1]) < 1e-3:
        parser.error("--mean and --std go together, and --std must be at least 0.001")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if arguments.device == "auto":
        arguments.device = next(kind for kind in available if available[kind])
    if not available[arguments.device]:
        parser.error(f"--device {arguments.device}: torch sees no such device; try --device cpu")
    arguments.device = torch.device(arguments.device)
    if arguments.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=arguments.device))
        except Exception as error:  # a compiler, Triton, this Python: torch has many words for it
            first, *_ = str(error).strip().splitlines() or [type(error).__name__]
            parser.error(f"--compile: torch.compile does not work on this machine ({first}); leave "
                         "it out")
    if arguments.precision == "bf16" and arguments.device.type == "cpu":
        features = Path("/proc/cpuinfo")  # of the processor, where the system is Linux
        if features.exists() and "bf16" not in features.read_text():
            print("--precision bf16: slow here, this processor has no bf16: up to 10 times "
                  "the time of fp32")
    return arguments


def refuse_useless(parser, conditions):
    """Refuse what was typed without effect; {flag: (has it one here?, what it belongs to)}."""
    for flag, (useful, owner) in conditions.items():
        if flag in parser.typed and not useful:
            parser.error(f"--{flag.replace('_', '-')} has no effect here: it belongs to {owner}")


def run_script(main):
    """Call `main()`. Bad input ends as one line and exit code 2, a fault of the machine as 1."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell: >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without ± shows "?"
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        text, code = error, 2
    except BrokenPipeError:  # `| head`: nobody reads on, and Python must not flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        text, code = "stopped, its output was closed; the same command with --resume goes on", 1
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        text, code = f"{type(error).__name__}: {error}", 1
    else:
        return
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(text).split())}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------------------------ 2. data
CHANNEL_STATISTICS = {  # mean, standard deviation of training pixels in [0,1]; others: measured
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashionmnist": ((0.2860,) * 3, (0.3530,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SHAPES_TRAIN, SHAPES_TEST = 2500, 2000  # images of the embedded set
OUTLINES = ("disc", "ellipse", "triangle", "square", "bar", "pentagon", "cross", "flower",
            "trefoil", "cardioid")
SHAPE_NAMES = [f"{fill} {outline}" for outline in OUTLINES for fill in ("solid", "hollow")]


@dataclass
class Split:
    """Images held in memory: (N,3,H,W) uint8, labels (N,) int64; mean and std (3,1,1) of [0,1]."""
    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def normalise(self, images):
        """uint8 (B,3,H,W) -> float32: (x / 255 - mean) / std, as torchvision does it."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def batches(self, batch_size=None):
        """Normalised images and labels in their order, not augmented."""
        size = batch_size or evaluation_batch(self.images.shape[3])
        for images, labels in zip(self.images.split(size), self.labels.split(size)):
            yield self.normalise(images), labels

    def augmented(self, batch_size, generator):
        """One epoch of shuffled, cropped and flipped batches; the last may be smaller.

        All draws come from `generator` (CPU) before the first batch.
        """
        size, device = len(self), self.labels.device
        order = torch.randperm(size, generator=generator)
        top, left = torch.randint(0, 9, (2, size), generator=generator)  # offsets 0..8
        flip = torch.randint(0, 2, (size,), generator=generator).bool()
        draws = [draw.to(device) for draw in (order, top, left, flip)]
        for where in batch_slices(size, batch_size):
            chosen, *offsets = (draw[where] for draw in draws)
            images = crop_and_flip(self.images.index_select(0, chosen), *offsets)
            yield self.normalise(images), self.labels[chosen]

    def fingerprint(self):
        digest = hashlib.sha1(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()


def evaluation_batch(side):
    """Images of side x side pixels in a batch that is only evaluated: 500, of large ones fewer."""
    return max(32, min(500, 2**19 // side**2))


def batch_slices(size, batch_size):
    """Slices of 0..size; a last single image joins the batch before it: batch norm needs two."""
    starts = list(range(0, size, batch_size))
    if size - starts[-1] == 1 < size:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], size])]


def crop_and_flip(images, top, left, flip):
    """Pad with 4 black pixels, crop each image back at its own offset, mirror it where `flip`.

    images (B,3,H,W); top, left (B,) in 0..8; flip (B,) bool. For the same draws exactly
    torchvision's RandomCrop(H, padding=4) and horizontal flip.
    """
    height, width = images.shape[2:]
    windows = F.pad(images, [4] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    image = torch.arange(len(images), device=images.device)
    cropped = windows[image, :, top, left]  # (B,3,9,9,H,W) -> (B,3,H,W)
    return torch.where(flip[:, None, None, None], cropped.flip(3), cropped)


class StreamedSplit:
    """ImageNet, read from disk on demand; `batches`, `augmented`, `labels` as in Split.

    Every image draws its crop from a seed of its own: the workers' number changes no pixel.
    """

    def __init__(self, paths, labels, size, mean, std, arguments):
        self.paths = np.array([os.fsencode(path) for path in paths], "S")  # one block of memory
        self.labels, self.size, self.device = labels, size, arguments.device
        own = min(16, os.cpu_count() or 1)
        self.workers = own if arguments.workers is None else arguments.workers
        self.statistics = mean.flatten().tolist(), std.flatten().tolist()

    def __len__(self):
        return len(self.paths)

    def read(self, index, seed):
        """One image (3,S,S), normalised; cropped at random by `seed`, at the centre if it is 0."""
        from torchvision.transforms import v2
        crop = [v2.Resize(self.size * 256 // 224, antialias=True), v2.CenterCrop(self.size)]
        if seed:
            crop = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        transform = v2.Compose([v2.ToImage(), *crop, v2.ToDtype(torch.float32, scale=True),
                                v2.Normalize(*self.statistics)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transform(eight_bits(open_picture(os.fsdecode(self.paths[index]), False)))

    def __getitem__(self, batch):
        """(images, labels) of a batch's indices and seeds; of an unreadable file its message."""
        indices, seeds = batch
        try:
            images = [self.read(*one) for one in zip(indices.tolist(), seeds.tolist())]
        except InputError as error:
            return str(error)
        return torch.stack(images), self.labels[indices]

    def batches(self, batch_size=None, order=None, seeds=None):
        order = torch.arange(len(self)) if order is None else order
        seeds = torch.zeros_like(order) if seeds is None else seeds
        slices = batch_slices(len(order), batch_size or evaluation_batch(self.size))
        loader = torch.utils.data.DataLoader(
            self, None, sampler=[(order[where], seeds[where]) for where in slices],
            num_workers=self.workers, generator=torch.Generator(),
            pin_memory=self.device.type == "cuda")
        for batch in loader:
            if isinstance(batch, str):
                raise InputError(batch)
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)

    def augmented(self, batch_size, generator):
        order = torch.randperm(len(self), generator=generator)
        seeds = torch.randint(1, 2**62, (len(self),), generator=generator)
        return self.batches(batch_size, order, seeds[order])

    def fingerprint(self):
        """By label, name and size: to read every file would take as long as an epoch."""
        files = [b"%d %s %d" % (label, os.path.basename(path), os.path.getsize(path))
                 for label, path in zip(self.labels.tolist(), self.paths)]
        return hashlib.sha1(b"\n".join(files)).hexdigest()


@dataclass
class Data:
    """A data set: four parts (each a Split or StreamedSplit) and what a network must know."""
    name: str
    train: Split
    validation: Split  # held out of train, never trained on; empty unless asked for
    test: Split  # never selects anything
    unseen: Split | None  # the classes that `open_set` kept out of all else
    names: list  # of the classes, by label
    image_size: int
    mean: tuple
    std: tuple
    largest: int = 2**16 - 1  # value of its deep grey pictures, see `eight_bits`

    @property
    def classes(self):
        return len(self.names)

    def build(self, name, seed=0):
        """A network by name for these images, see `build_model`."""
        return build_model(name, self.classes, self.image_size, seed)

    def facts(self):
        """What settings and result.json say of the data: all that a loaded student needs."""
        parts = (self.train, self.validation, self.test, self.unseen)
        return {"classes": self.names, "image_size": self.image_size, "mean": self.mean,
                "std": self.std, "largest": self.largest,
                "fingerprint": [part.fingerprint() for part in parts if part]}


def make_shapes(count, image_size=16, seed=0):
    """Draw RGB images of 20 classes: class = 2 * outline + fill, ten outlines, solid or hollow.

    Place, size, turn, stretch, colours, background gradient and noise are random; the object is
    brighter than its background. An outline is a radius over the angle, R(a): a pixel at (radius,
    angle) in the shape's own axes lies inside where radius < R(angle). The same seed gives the
    same images. Returns images (N,3,S,S) uint8, labels (N,) int64, masks (N,S,S) bool (the
    silhouette; the hole of a hollow shape belongs to it).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle = torch.linspace(0, 2 * math.pi, 361)[:-1]  # (360,)
    cosine, sine = angle.cos(), angle.sin()

    def polygon(corners):
        sector = angle % (2 * math.pi / corners) - math.pi / corners
        return math.cos(math.pi / corners) / sector.cos()

    def box(a, b):
        return torch.minimum(a / cosine.abs().clamp_min(1e-6), b / sine.abs().clamp_min(1e-6))

    outlines = torch.stack([  # (10,360)
        torch.full_like(angle, 0.88),  # disc
        0.55 / torch.sqrt((0.55 * cosine) ** 2 + sine**2),  # ellipse
        polygon(3), polygon(4), box(1.0, 0.5), polygon(5),  # triangle, square, bar, pentagon
        torch.maximum(box(1.0, 0.33), box(0.33, 1.0)),  # cross
        0.72 + 0.28 * (5 * angle).cos(), 0.72 + 0.28 * (3 * angle).cos(),  # flower, trefoil
        0.52 * (1 + cosine) + 0.1])  # cardioid
    labels = torch.randint(0, 20, (count,), generator=generator)
    grid = (torch.arange(image_size) + 0.5) / image_size * 2 - 1  # pixel centres in [-1,1]
    x = grid[None, None, :] - uniform(-0.15, 0.15, 1, 1)  # (N,1,S)
    y = grid[None, :, None] - uniform(-0.15, 0.15, 1, 1)  # (N,S,1)
    turn, size = uniform(-0.5, 0.5, 1, 1), uniform(0.65, 0.95, 1, 1)
    u = (x * turn.cos() + y * turn.sin()) / size * uniform(0.85, 1.15, 1, 1)  # (N,S,S)
    v = (y * turn.cos() - x * turn.sin()) / size  # (N,S,S)
    degrees = (torch.atan2(v, u) * 180 / math.pi).floor().long() % 360
    outline = outlines[labels // 2].gather(1, degrees.flatten(1)).view_as(u)  # R at each pixel
    radius, edge = torch.sqrt(u**2 + v**2), size * image_size / 2  # `edge` pixels a unit
    silhouette = ((outline - radius) * edge + 0.5).clamp(0, 1)  # soft edges
    hole = ((0.55 * outline - radius) * edge + 0.5).clamp(0, 1) * (labels % 2)[:, None, None]
    cover = (silhouette - hole)[:, None]  # (N,1,S,S)
    slope_x, slope_y = uniform(-0.2, 0.2, 3, 1, 1), uniform(-0.2, 0.2, 3, 1, 1)
    back = uniform(0.0, 0.4, 3, 1, 1) + slope_x * x[:, None] + slope_y * y[:, None]
    images = cover * uniform(0.45, 1.0, 3, 1, 1) + (1 - cover) * back  # (N,3,S,S)
    images += 0.06 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, silhouette > 0.5


def stratified(labels, fraction, generator):
    """Indices of max(1, round(fraction * size)) images of each class, in increasing order."""
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def load_data(arguments, validation=0.0):
    """The data set that the flags name, as `Data`; prints what it is.

    --train-fraction keeps that share of each class; `validation` of as many images (at most about
    10,000) are then held out, of what it leaves, or where it leaves nothing of the training images;
    both are drawn by --seed. (Of shapes they are drawn besides. So wherever it can be all scripts
    train on the same images, and share their teacher.) --open-set K keeps the
    last K classes out of all parts but `unseen`, and out of the class count. A folder without a
    test part is split 80/20 per class by the seed, and all images of its K unseen classes are
    `unseen`. Raises InputError when files are missing, empty or damaged.
    """
    name = arguments.dataset
    size = FIXED_SIZES.get(name) or arguments.image_size or {
        "shapes": 16, "tinyimagenet": 64, "imagenet": 224}.get(name, 32)
    names, parts = _split(arguments, validation, size)
    largest = Data.largest
    if name in ("folder", "tinyimagenet"):
        parts, largest = _decode(parts, size)
    if arguments.mean:
        mean, std = torch.tensor(arguments.mean), torch.tensor(arguments.std)
    elif name in CHANNEL_STATISTICS:
        mean, std = (torch.tensor(value) for value in CHANNEL_STATISTICS[name])
    else:
        images = parts[0][0]
        sample = images[:: max(1, len(images) // 5000)].float() / 255
        mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    statistics = mean.view(3, 1, 1), std.view(3, 1, 1)
    if name == "imagenet":
        parts = [StreamedSplit(*part, size, *statistics, arguments) for part in parts]
    else:
        parts = [Split(*(value.contiguous().to(arguments.device)
                         for value in (*part, *statistics))) for part in parts]
    train, held, test, unseen = parts
    if arguments.open_set:
        verification_pairs(unseen.labels)  # too few images: say so now, not after the training
    if arguments.batch_size > len(train):
        raise InputError(f"--batch-size {arguments.batch_size}: there are only {len(train)} "
                         f"training images at --train-fraction {arguments.train_fraction:g}")
    held_out = f"{len(held)} held-out, " if len(held) else ""
    print(f"{name}: {len(train)} training, {held_out}{len(test)} test images of {size}x{size}, "
          f"{len(names)} classes ({names[0]} to {names[-1]}); seed {arguments.seed}, "
          f"{arguments.device}")
    return Data(name, train, held, test, unseen if arguments.open_set else None, names, size,
                tuple(mean.tolist()), tuple(std.tolist()), largest)


def _split(arguments, validation, size):
    """(names of the known classes, [train, held out, test, unseen] as read)."""
    name, folder = arguments.dataset, arguments.data or Path("data")
    if name == "shapes":
        train, test = make_shapes(SHAPES_TRAIN, size, 0)[:2], make_shapes(SHAPES_TEST, size, 1)[:2]
        names = SHAPE_NAMES
    elif name == "fashionmnist":
        train, test, names = _read_fashionmnist(folder, arguments.data is None)
    else:
        train, test, names = (_read_cifar if name in FIXED_SIZES else _list_folder)(folder, name)
    generator = torch.Generator().manual_seed(arguments.seed)
    known = len(names) - arguments.open_set
    if known < 2 or arguments.open_set == 1:
        raise InputError(f"--open-set {arguments.open_set}: keep out 2 classes or more, and leave "
                         f"2 or more of the {len(names)} of {name} to train on")
    if test is None:
        keep = torch.zeros(len(train[1]), dtype=torch.bool)
        keep[stratified(train[1], 0.8, generator)] = True
        keep &= train[1] < known
        train, test = _take(train, keep), _take(train, ~keep)
    unseen, test, train = (_take(test, test[1] >= known), _take(test, test[1] < known),
                           _take(train, train[1] < known))
    rest = held = _take(train, train[1] < 0)  # nothing
    if arguments.train_fraction < 1:
        train, rest = _divide(train, arguments.train_fraction, generator)
    count = min(validation * len(train[1]), 10_000)
    if validation and name == "shapes":
        held = make_shapes(round(validation * SHAPES_TRAIN), size, 2)[:2]
        held = _take(held, held[1] < known)
    elif validation and len(rest[1]):
        held, _ = _divide(rest, min(1, count / len(rest[1])), generator)
    elif validation:
        held, train = _divide(train, count / len(train[1]), generator)
    for part, purpose in ((train, "train on"), (test, "test on")):
        missing = set(range(known)) - set(part[1].tolist())
        if missing:
            hint = ", or a larger --train-fraction" * (part is train)
            raise InputError(f"{name}: class {names[min(missing)]} has no image left to {purpose}; "
                             f"it needs more images{hint}")
    return names[:known], [train, held, test, unseen]


def _divide(part, fraction, generator):
    """The share `fraction` of every class of (images, labels), and what is left; see `stratified`.
    """
    chosen = torch.zeros(len(part[1]), dtype=torch.bool)
    chosen[stratified(part[1], fraction, generator)] = True
    return _take(part, chosen), _take(part, ~chosen)


def _take(part, where):
    """Images and labels at `where`: indices, or a mask."""
    images, labels = part
    where = where.nonzero().flatten() if where.dtype == torch.bool else where
    if isinstance(images, list):
        return [images[index] for index in where.tolist()], labels[where]
    return images[where], labels[where]


def _read_cifar(folder, name):
    """(train, test, names) by torchvision, which checks every file's md5 before it unpickles."""
    from torchvision import datasets
    kind = getattr(datasets, name.upper())
    if folder.name == kind.base_folder:
        folder = folder.parent
    unpacked = (folder / kind.base_folder).is_dir()
    if not unpacked and not (folder / kind.filename).exists():
        print(f"{name}: not in {folder}, downloading it there")
    try:
        parts = [kind(folder, train, download=not unpacked) for train in (True, False)]
    except Exception as error:  # urllib, sockets, checksums, pickles: each has its own
        raise InputError(f"{name} is damaged or missing in {folder} and was not downloaded "
                         f"({error}); put {kind.filename} there, remove what is there of "
                         f"{kind.base_folder}, or name another folder with --data") from None
    train, test = ((torch.from_numpy(part.data).movedim(3, 1), torch.tensor(part.targets))
                   for part in parts)  # (N,3,32,32) uint8, (N,)
    return train, test, parts[0].classes


DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where its package puts the files


def _read_fashionmnist(folder, anywhere):
    """(train, test, names); `anywhere`: Debian's copy will do, since no --data was named."""
    names = [[f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
             for part in ("train", "t10k")]
    places = [folder, folder / "FashionMNIST/raw", *[DEBIAN] * anywhere]
    from torchvision import datasets
    if not any([*place.glob(f"{names[0][0]}*")] for place in places):
        print(f"fashionmnist: not in {folder}, downloading it there")
        try:
            datasets.FashionMNIST(folder, download=True)
        except Exception as error:  # urllib, sockets and checksums: each has its own
            raise InputError(f"fashionmnist could not be downloaded ({error}); put "
                             f"{'.gz, '.join(sum(names, []))}.gz into {folder}, or name their "
                             "folder with --data") from None
    place = next(place for place in places if [*place.glob(f"{names[0][0]}*")])
    parts = []
    for pair in names:
        try:
            raw = [path.read_bytes() if (path := place / name).exists()
                   else gzip.decompress((place / f"{name}.gz").read_bytes()) for name in pair]
            pixels = np.frombuffer(raw[0], np.uint8, offset=16).reshape(-1, 1, 28, 28)
            classes = np.frombuffer(raw[1], np.uint8, offset=8).astype(np.int64)
            if len(pixels) != len(classes) or classes.max() > 9:
                raise ValueError("images and labels do not belong together")
        except Exception as error:  # gzip, zlib and numpy each have their own errors
            raise InputError(f"{' or '.join(pair)} in {place} is damaged or missing ({error}); "
                             "get it again") from None
        parts.append((torch.from_numpy(pixels.copy()).expand(-1, 3, -1, -1),
                      torch.from_numpy(classes)))
    return *parts, datasets.FashionMNIST.classes


LAYOUT = "the layout is DIR/train/CLASS/* with DIR/test/CLASS/* or DIR/val/CLASS/*, or DIR/CLASS/*"
PARTS = ({"train", "training"}, {"test", "testing", "val", "valid", "validation", "dev", "eval"})


def _list_folder(folder, name):
    """(train, test, names), parts as (paths, labels): see LAYOUT; test is None in its last form.

    Names that start with a dot, __MACOSX, @eaDir and Thumbs.db are not there; links are followed.
    Of test/ and val/ a folder's test part is test/, ImageNets' is val/: their test/ has no labels.
    """
    from PIL import Image
    endings = {ending for ending, kind in Image.registered_extensions().items()
               if kind in Image.OPEN}
    left_out = Counter()

    def entries(root):
        return sorted((entry for entry in os.scandir(root) if not entry.name.startswith(".")
                       and entry.name not in ("__MACOSX", "@eaDir", "Thumbs.db")),
                      key=lambda entry: entry.name)

    def ending(entry):
        return os.path.splitext(entry.name)[1].lower() or "no ending"

    def pictures(root, above=()):
        """All pictures in and below `root`, in the order of their names; no link back up."""
        above, found = (*above, os.path.realpath(root)), []
        for entry in entries(root):
            if entry.is_dir() and os.path.realpath(entry.path) not in above:
                found += pictures(entry.path, above)
            elif entry.is_file() and ending(entry) in endings:
                found.append(entry.path)
            else:
                left_out[ending(entry)] += 1
        return found

    def listing(root):
        folders = [entry for entry in entries(root) if entry.is_dir()]
        left_out.update(ending(entry) for entry in entries(root) if not entry.is_dir())
        names = [entry.name for entry in folders]
        if len(names) < 2:
            raise InputError(f"--data: {root} needs at least 2 class folders, it has {len(names)}; "
                             + LAYOUT)
        paths, labels = [], []
        for label, entry in enumerate(folders):
            files = pictures(entry.path)
            if not files:
                raise InputError(f"--data: class {entry.path} has no image; add or remove it")
            paths += files
            labels += [label] * len(files)
        return names, (paths, torch.tensor(labels))

    def parts(names):
        """Whether they name a part to train on and one to test on, like trainA and testA."""
        words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", " ".join(names)).lower())
        return all(part & {*words} for part in PARTS)

    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; {LAYOUT}")
    if not (folder / "train").is_dir():
        inner = {entry.name: entries(entry.path) for entry in entries(folder) if entry.is_dir()}
        below = [sorted(entry.name for entry in inside if entry.is_dir())
                 for inside in inner.values()]
        alike = all(inside and inside == below[0] for inside in below) and below and below[0][1:]
        if alike or parts(inner) or any(map(parts, below)):
            raise InputError(f"--data {folder}: {', '.join(inner)} look like parts of a data set, "
                             f"not like classes; {LAYOUT}")
        names, train = listing(folder)
        test = None
    else:
        order = ("test", "val") if name == "folder" else ("val", "test")
        held = [folder / part for part in order if (folder / part).is_dir()]
        if not held:
            raise InputError(f"--data: {folder} has train/ but neither test/ nor val/; {LAYOUT}")
        if len(held) > 1:
            print(f"{name}: {held[0].name}/ is the test part, {held[1].name}/ is not read")
        names, train = listing(folder / "train")
        annotations = held[0] / "val_annotations.txt"  # Tiny-ImageNet as it is handed out
        if annotations.exists():
            test = _annotated(annotations, names)
        else:
            test_names, test = listing(held[0])
            if names != test_names:
                odd = min(set(names) ^ set(test_names))
                raise InputError(f"--data: class {odd} is not in both train/ and {held[0].name}/")
    if left_out:
        print(f"{name}: left out {left_out.total()} files: "
              + ", ".join(f"{ending} {count}" for ending, count in left_out.most_common()))
    return train, test, names


def _annotated(annotations, names):
    """(paths, labels) of Tiny-ImageNet's validation images, of the classes `names` alone."""
    lines = [line.split() for line in content(annotations).decode(errors="replace").splitlines()]
    short = next((number for number, line in enumerate(lines, 1) if len(line) < 2), None)
    if short:
        raise InputError(f"{annotations}, line {short} does not name a file and its class")
    others = [name for _, name, *_ in lines if name not in names]
    if others:
        print(f"{annotations.name}: left out {len(others)} lines of classes that train/ does not "
              f"have, such as {others[0]}")
    lines = [line for line in lines if line[1] in names]
    return ([str(annotations.parent / "images" / line[0]) for line in lines],
            torch.tensor([names.index(line[1]) for line in lines], dtype=torch.long))


def open_picture(path, upright=True):
    """A file as a PIL image in RGB; grey of 16 bits as mode "I", for `eight_bits`.

    Alpha is laid over white; floats, whose white nobody knows, are refused; of a moving picture the
    first is taken. `upright`: turned as EXIF says (not for ImageNet: the field trains on it as is).
    InputError for a file that cannot be read.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("its pixels are floats: save it with 8 or 16 bits")
            if image.mode.startswith("I"):
                image = image.convert("I")
                least, most = image.getextrema()
                if least < 0 or most >= 2**16:
                    raise ValueError(f"grey from {least} to {most}: save it with 8 or 16 bits")
                return image
            if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); mend it") from None


def eight_bits(image, largest=2**16 - 1):
    """(H,W,3) uint8 of an `open_picture`; deep grey by one factor for a set whose largest value is
    `largest`: of the least of 2^8, 2^10, 2^12, 2^14, 2^16 levels that hold it the last is 255."""
    pixels = np.array(image)
    if pixels.ndim == 3:
        return pixels
    levels = next(2**bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits)
    grey = (pixels * (255 / (levels - 1))).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2)


def _decode(parts, size):
    """[(paths, labels)] -> [((N,3,size,size) uint8, labels)], largest value of the deep
    grey ones; resized, bilinear, where the size differs."""
    def read(path):
        image = open_picture(path)
        largest = image.getextrema()[1] if image.mode == "I" else 0
        return largest, image if image.size == (size, size) else image.resize((size, size), 2)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(read, sum((paths for paths, _ in parts), [])))
        largest = max(value for value, _ in found) or Data.largest
        pixels = list(pool.map(lambda one: eight_bits(one[1], largest), found))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # (N,3,S,S)
    images = stacked.split([len(paths) for paths, _ in parts])
    return [(one, labels) for one, (_, labels) in zip(images, parts)], largest


# ---------------------------------------------------------------------------------------- 3. models
MODELS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
          "resnet8x4", "resnet32x4", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "wrn_16_8",
          "wrn_16_10", "vgg8", "vgg13", "mobilenetv2", "resnet18", "resnet34", "resnet50",
          "mobilenet_v2")


class Network(nn.Module):
    """`stem`, `stages` of blocks, `neck` (what follows the last block), pooling, `head`."""

    def __init__(self, stem, stages, neck, head):
        super().__init__()
        self.stem, self.stages, self.neck, self.head = stem, nn.ModuleList(stages), neck, head

    @property
    def features(self):
        """D, the width of the embedding."""
        return self.head.in_features

    def forward_features(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.neck(x)  # (B,D,H,W)

    def forward_head(self, x):
        return self.head(x.mean((2, 3)))  # (B,D,H,W) -> (B,C)

    def embed(self, x):
        return self.forward_features(x).mean((2, 3))  # (B,D), the vector before the classifier

    def forward(self, x):
        return self.forward_head(self.forward_features(x))  # (B,C) logits


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution that takes every `stride`-th pixel itself and then has stride 1.

    The same function, but for oneDNN, whose backward of a strided one with few input channels
    writes past its buffer (uxlfoundation/oneDNN issue 6035): wrong gradients, a crash or a hang.
    """

    def __init__(self, inputs, outputs, stride=1, bias=False):
        super().__init__(inputs, outputs, 1, stride, bias=bias)

    def forward(self, x):
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight, self.bias)


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, bias=False):
    if kernel == 1:
        return [Conv1x1(inputs, outputs, stride, bias), nn.BatchNorm2d(outputs)]
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias),
            nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """He et al. 2016; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True),
                                  *conv_bn(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else conv_bn(inputs, outputs, 1, stride)))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class WideBlock(nn.Module):
    """Zagoruyko and Komodakis 2016: batch norm and ReLU come before each convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.body = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True),
                                  nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False))
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = Conv1x1(inputs, outputs, stride)

    def forward(self, x):
        active = self.norm(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, with ReLU for ReLU6 as in the distillation literature."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            *conv_bn(inputs, hidden, 1), nn.ReLU(inplace=True),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU(inplace=True),
            *conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


def _resnet_plan(name):
    """`resnetD` or `resnetDxW` -> (blocks a stage, stem width, stage widths); None: no such name.

    W multiplies the widths 16, 32, 64; the stem keeps at most 32 channels, as in the field's
    resnet8x4. This project's small student is resnet8x0.5: stem 8, stages 8, 16, 32. The smallest
    W is 0.25: a stem of 4 channels, one for each colour and one to spare.
    """
    match = re.fullmatch(r"resnet(8|14|20|32|44|56|110)(?:x(\d+(?:\.\d+)?))?", str(name))
    if not match or not 0.25 <= float(match[2] or 1) <= 16:
        return None
    depth, factor = int(match[1]), float(match[2] or 1)
    widths = [round(base * factor) for base in (16, 32, 64)]
    return (depth - 2) // 6, min(32, widths[0]), widths


def _unknown_network(name):
    return (f"no network is called {name!r}; there are {', '.join(MODELS)}, and resnetDxW such as "
            "resnet8x0.5")


def build_model(name, classes, image_size=32, seed=0):
    """A network by name in train mode, its weights drawn from `seed` alone, channels_last.

    resnet18/34/50 and mobilenet_v2 are torchvision's; for images of up to 64 pixels the ResNets
    take the usual small-image stem (3x3, stride 1, no pooling). All others are the networks of the
    CIFAR distillation literature. InputError for an unknown name.
    """
    if name not in MODELS and _resnet_plan(name) is None:
        raise InputError(_unknown_network(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build(name, classes, image_size).to(memory_format=torch.channels_last)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _chain(block, plan, inputs):
    """Stages of blocks from (outputs, blocks, stride) rows, and the width they end with."""
    stages = []
    for outputs, count, stride in plan:
        blocks = [block(inputs, outputs, stride)]
        blocks += [block(outputs, outputs, 1) for _ in range(count - 1)]
        stages.append(nn.Sequential(*blocks))
        inputs = outputs
    return stages, inputs


def _build(name, classes, image_size):
    if name in ("resnet18", "resnet34", "resnet50"):
        from torchvision import models
        source = getattr(models, name)(num_classes=classes)
        stem = [source.conv1, source.bn1, source.relu, source.maxpool]
        if image_size <= 64:
            stem = [*conv_bn(3, 64), source.relu]
        stages = [source.layer1, source.layer2, source.layer3, source.layer4]
        return Network(nn.Sequential(*stem), stages, nn.Identity(), source.fc)
    if name == "mobilenet_v2":
        from torchvision import models
        source = models.mobilenet_v2(num_classes=classes)
        stem, *blocks, neck = source.features
        cuts = (0, 1, 3, 6, 10, 13, 16, 17)  # the seven rows of the paper's table 2
        stages = [nn.Sequential(*blocks[a:b]) for a, b in zip(cuts, cuts[1:])]
        return Network(stem, stages, neck, source.classifier[1])
    if name.startswith("wrn_"):
        depth, factor = map(int, name.split("_")[1:])
        plan = [(width * factor, (depth - 4) // 6, 1 if width == 16 else 2)
                for width in (16, 32, 64)]
        stages, width = _chain(WideBlock, plan, 16)
        neck = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        return Network(stem, stages, neck, nn.Linear(width, classes))
    if name in ("vgg8", "vgg13"):
        inputs, stages = 3, []
        for index, outputs in enumerate((64, 128, 256, 512, 512)):
            layers = [nn.MaxPool2d(2)] if index in (1, 2, 3) else []
            for _ in range(1 if name == "vgg8" else 2):
                block = [*conv_bn(inputs, outputs, bias=True), nn.ReLU(inplace=True)]
                layers, inputs = [*layers, nn.Sequential(*block)], outputs
            stages.append(nn.Sequential(*layers))
        return Network(nn.Identity(), stages, nn.Identity(), nn.Linear(512, classes))
    if name == "mobilenetv2":  # expansion 6, width 0.5, the strides of the distillation literature
        first, width = _chain(lambda *shape: InvertedResidual(*shape, 1), [(8, 1, 1)], 16)
        rows = [(12, 2, 1), (16, 3, 2), (32, 4, 2), (48, 3, 1), (80, 3, 2), (160, 1, 1)]
        rest, width = _chain(lambda *shape: InvertedResidual(*shape, 6), rows, width)
        stem = nn.Sequential(*conv_bn(3, 16, 3, 2), nn.ReLU(inplace=True))
        neck = nn.Sequential(*conv_bn(width, 1280, 1), nn.ReLU(inplace=True))
        return Network(stem, first + rest, neck, nn.Linear(1280, classes))
    count, stem_width, widths = _resnet_plan(name)
    rows = [(width, count, 1 if index == 0 else 2) for index, width in enumerate(widths)]
    stages, width = _chain(BasicBlock, rows, stem_width)
    stem = nn.Sequential(*conv_bn(3, stem_width), nn.ReLU(inplace=True))
    return Network(stem, stages, nn.Identity(), nn.Linear(width, classes))


def compile_network(network, arguments):
    """With --compile, let torch.compile take the part that `embed` and `forward` share."""
    if arguments.compile:
        network.forward_features = torch.compile(network.forward_features)


def sound(path):
    """Whether a file that `save_file` wrote is there and whole."""
    try:
        return bool(load_file(path))
    except InputError:
        return False


def frozen(network):
    """A deep copy, batch-norm statistics included, in eval mode, that gets no gradient.

    (A bare state_dict() holds references to the weights that go on training.)
    """
    twin = copy.deepcopy(network).eval().requires_grad_(False)
    for module in twin.modules():  # a compiled or wrapped method would run the original's weights
        for method in ("forward", "forward_features"):
            module.__dict__.pop(method, None)
    return twin


def folded(network):
    """`frozen`, and every batch norm merged into the convolution before it: the same outputs but
    for the last digits, in less time; for a teacher that will never learn again."""
    twin = frozen(network)
    for module in twin.modules():
        parts = list(module.named_children())
        for (name, convolution), (after, norm) in zip(parts, parts[1:]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.utils.fuse_conv_bn_eval(convolution, norm))
                setattr(module, after, nn.Identity())
    return twin.eval().requires_grad_(False)


WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict",
            "model_state_dict", "model", "net", "student")  # where the field's files keep weights
ENDINGS = {"weight", "bias", "running_mean", "running_var"}


def load_weights(network, path):
    """Load a state dict into `network`, also one that is wrapped or has the names of other code.

    By name, without `module.` and `_orig_mod.`; else tensor by tensor in the file's order, if all
    shapes agree. Half precision and files without `num_batches_tracked` will do. InputError else.
    """
    state, own = load_file(path), network.state_dict()
    state = state if isinstance(state, dict) else {}
    for _ in range(4):  # wrappers in wrappers; one without tensors of its own comes last
        inner = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]
        inner.sort(key=lambda one: not any(isinstance(v, torch.Tensor) for v in one.values()))
        state = inner[0] if inner else state
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value
             for name, value in state.items() if isinstance(value, torch.Tensor)}
    found, wanted = ({name: value for name, value in part.items() if value.is_floating_point()
                      and not name.endswith("num_batches_tracked")} for part in (state, own))
    theirs, ours = ({name: tuple(value.shape) for name, value in part.items()}
                    for part in (found, wanted))
    ends = [{*pair} for pair in zip(*([name.split(".")[-1] for name in part]
                                      for part in (theirs, ours)))]
    if theirs.keys() != ours.keys() and [*theirs.values()] == [*ours.values()] and not any(
            pair <= ENDINGS and len(pair) > 1 for pair in ends):
        state, theirs = dict(zip(ours, found.values())), ours
    if theirs != ours:
        odd = [[f"{name} {shape}" for name, shape in part.items() if other.get(name) != shape][:2]
               for part, other in ((theirs, ours), (ours, theirs))]
        raise InputError(f"{path} does not hold the weights of this network: it has {len(theirs)} "
                         f"tensors, such as {', '.join(odd[0] or [*theirs][:2]) or 'none'}; "
                         f"expected are {len(ours)}, such as {', '.join(odd[1] or [*ours][:2])}")
    try:
        network.load_state_dict({**own, **{name: state[name] for name in own if name in state}})
    except RuntimeError as error:  # sparse, quantised, without storage
        raise InputError(f"{path} holds tensors that are not plain ({str(error)[:200]})") from None
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise InputError(f"{path} holds weights that are not finite")
    return network


def load_frozen(name, path, data, arguments):
    """A given teacher (--teacher-weights), frozen, on the device; prints how good it is here."""
    network = frozen(load_weights(data.build(name), path))
    network.to(arguments.device)
    accuracy, sizes = evaluate(network, data.test, arguments), data.test.labels.flatten().bincount()
    chance = 100 * (sizes.max() / sizes.sum()).item()
    mean, std = ([round(value, 4) for value in part] for part in (data.mean, data.std))
    print(f"{path}: {name}, {accuracy:.2f} % on the test images, normalised by mean {mean}, "
          f"standard deviation {std}")
    if accuracy < chance + 0.1 * (100 - chance):
        print(f"warning: that is near chance ({chance:.1f} %); the usual reasons are another "
              "normalisation (--mean, --std) and another order of the classes")
    return network


# ------------------------------------------------------------------------------------ 4. evaluation
def autocast(arguments):
    """bf16 autocast with --precision bf16, otherwise a context that does nothing."""
    if arguments.precision == "fp32":
        return nullcontext()
    return torch.autocast(arguments.device.type, torch.bfloat16)


@contextmanager
def evaluating(*networks):
    """Networks in eval mode, no gradients; each module gets its own mode back afterwards."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(network, split, arguments, forward=None):
    """Top-1 accuracy in %, eval mode. `forward`: images -> (B,C) scores, instead of the logits."""
    correct, count = torch.zeros(2, dtype=torch.long, device=arguments.device)
    with evaluating(network), autocast(arguments):
        for images, labels in split.batches():
            correct += ((forward or network)(images).argmax(1) == labels).sum()
            count += (labels >= 0).sum()  # (B,), or pixels, some unknown
    return 100 * correct.item() / count.item()


def embeddings(network, split, arguments, forward=None):
    """(N,D) float32 embeddings and (N,) labels, eval mode. `forward` replaces `network.embed`."""
    with evaluating(network), autocast(arguments):
        parts = [((forward or network.embed)(images).float(), labels)
                 for images, labels in split.batches()]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def rank_1(vectors, labels):
    """Eq. (10): share of images whose most similar OTHER image has the same class.

    Similarity is the cosine; on a tie the lowest index counts. vectors (N,D), labels (N,).
    """
    unit, labels, right = F.normalize(vectors.cpu().double(), dim=1), labels.cpu(), 0
    for start in range(0, len(unit), 1000):
        similarity = unit[start:start + 1000] @ unit.T  # Eq. (9): s_ab = u_a . u_b
        row = torch.arange(len(similarity))
        similarity[row, start + row] = -2.0  # not the image itself
        right += (labels[similarity.argmax(1)] == labels[start:start + 1000]).sum().item()
    return right / len(unit)


def best_threshold(similarities, same):
    """The smallest observed similarity t that maximises the accuracy of "same iff s >= t"."""
    order = similarities.argsort(descending=True)
    value, hit = similarities[order], same[order].long()
    correct = hit.cumsum(0) + (~same).sum() - (1 - hit).cumsum(0)  # pairs told right at t = value
    correct[:-1][value[:-1] == value[1:]] = -1  # equal similarities are accepted together
    return value[(correct == correct.max()).nonzero().max()].item()


def verification_pairs(labels, seed=0, most=6000, folds=10):
    """(P,2) image indices, (P,) same-class flags, (P,) folds; each fold half same, half different.

    Same: a class, two of its images. Different: two classes, an image of each. All uniform, no
    pair twice; `most` pairs, or as many as both kinds have. `seed` makes all networks' pairs alike.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels.cpu() == label).nonzero().flatten().tolist()
               for label in labels.unique().cpu()]
    several = [group for group in members if len(group) > 1]
    possible = sum(len(group) * (len(group) - 1) // 2 for group in members)
    different = len(labels) * (len(labels) - 1) // 2 - possible
    count = min(most // 2, possible, different) // folds * folds
    if count == 0:
        raise InputError(f"--open-set: {len(labels)} images of {len(members)} unseen classes give "
                         f"fewer than {folds} pairs of a kind; keep out more classes")

    def draw(items, how_many):
        chosen = torch.randperm(len(items), generator=generator)[:how_many].tolist()
        return [items[index] for index in chosen]

    pairs = []
    for same in (True, False):
        found = {}
        while len(found) < count:
            if same:
                pair = draw(draw(several, 1)[0], 2)
            else:
                pair = [draw(group, 1)[0] for group in draw(members, 2)]
            found[tuple(sorted(pair))] = None
        pairs += found
    index = torch.arange(2 * count)
    return torch.tensor(pairs), index < count, index % folds


def open_set_report(vectors, labels, seed=0):
    """Recognition of classes never seen in training: {"rank1": %, "verification": %}.

    rank1: see `rank_1`. verification, eq. (11): mean over 10 folds of the accuracy of "same class
    iff s >= t", with t from `best_threshold` on the other nine folds. The equations are (9) to
    (11) of this project's TriKD specification. vectors (N,D) embeddings, labels (N,).
    """
    pairs, same, fold = verification_pairs(labels, seed)
    unit = F.normalize(vectors.cpu().double(), dim=1)
    similarity = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)  # Eq. (9), (P,)
    scores = []
    for k in range(10):
        own, threshold = fold == k, best_threshold(similarity[fold != k], same[fold != k])
        scores.append(((similarity[own] >= threshold) == same[own]).double().mean().item())
    return {"rank1": 100 * rank_1(vectors, labels), "verification": 10 * sum(scores)}


def recognition(network, data, arguments, forward=None):
    """`open_set_report` on the unseen classes of `data`; {} where none were kept out."""
    found = embeddings(network, data.unseen, arguments, forward) if data.unseen else ()
    return open_set_report(*found) if found else {}


def open_set_rows(data, arguments):
    """Rows of the table that recognition is to be compared with; [] where no class was kept out."""
    if not data.unseen:
        return []
    sizes = data.unseen.labels.bincount().double()
    chance = (sizes * (sizes - 1)).sum() / (sizes.sum() * (sizes.sum() - 1))
    *_, name = np.hstack([arguments.student]).tolist()
    untrained = data.build(name, arguments.seed).to(arguments.device)
    return [{"run": "chance", "rank1": 100 * chance.item(), "verification": 50.0},
            {"run": "raw pixels", **recognition(untrained, data, arguments, nn.Flatten())},
            {"run": "untrained student", **recognition(untrained, data, arguments)}]


# ------------------------------------------------------------------------------------------ 5. runs
FORMATS = {"lr": ".5f", "train": ".2f", "test": ".2f", "teacher": ".2f", "teacher-1": ".2f",
           "teacher-2": ".2f", "student-1": ".2f", "paused": ".1f", "img/s": ".0f", "s": ".1f"}


def save_file(value, path):
    """Write text or a checkpoint atomically: a kill leaves the old file or the new one, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    buffer = io.BytesIO(value.encode() if isinstance(value, str) else b"")
    if not isinstance(value, str):
        torch.save(value, buffer)  # of a full disk torch itself would say nothing one can read
    with open(partial, "wb") as file:
        file.write(buffer.getbuffer())
    os.replace(partial, path)


def load_file(path):
    """torch.load with weights_only; InputError when missing, damaged or something else."""
    raw = content(path)
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle, EOF: by where the damage lies
        advice = "is damaged, or no file of torch.save"
        if raw[8:10] == b'{"':
            advice = ("is a safetensors file; re-save it in Python: from safetensors.torch import "
                      f"load_file; torch.save(load_file('{path}'), 'plain.pt')")
        elif re.search("nsupported (global|class)|TorchScript", str(error)):  # pickled code
            advice = ("holds more than tensors; if you trust it, re-save it in Python: "
                      f"d = torch.load('{path}', weights_only=False); d = next((d[k] for k in "
                      "('model', 'state_dict', 'net') if isinstance(d, dict) and k in d), d); "
                      "torch.save(d if isinstance(d, dict) else d.state_dict(), 'plain.pt')")
        raise InputError(f"{path} {advice}") from None


class Mean:
    """What an epoch's batches average to: loss terms, training accuracy, images a second."""

    def __init__(self, network="the networks"):  # as an error names them
        self.network = network
        self.sums, self.images, self.batches, self.correct, self.classified = {}, 0, 0, 0, 0
        self.start = self.shown = time.time()

    def add(self, terms, logits, labels):
        """A batch: {name: 0-dim tensor or float, None where it has none}; logits (B,C) or None.

        On a terminal the means so far are shown once a second. A term that is not finite stops the
        run within 50 batches: to read every one would make a GPU wait.
        """
        B = len(labels)
        for name, value in terms.items():
            total, count = self.sums.get(name, (0.0, 0))
            if value is not None:
                value = value.detach().float() if isinstance(value, torch.Tensor) else value
                total, count = total + value * B, count + B
            self.sums[name] = total, count
        if logits is not None:
            self.correct = self.correct + (logits.detach().argmax(1) == labels).sum()
            self.classified = self.classified + (labels >= 0).sum()  # (B,), or pixels
        self.images, self.batches = self.images + B, self.batches + 1
        live = sys.stdout.isatty() and time.time() - self.shown > 1
        if live or self.batches % 50 == 0:
            means = [f"{name} {value:.4f}" for name, value in self.terms().items() if value]
        if live:
            self.shown = time.time()
            print(f"  step {self.batches} ", *means, end="\033[K\r", flush=True)

    def terms(self):
        """{term: its mean over the images that have it, or None}; waits for a GPU."""
        means = {name: float(total) / count if count else None
                 for name, (total, count) in self.sums.items()}
        for name, value in means.items():
            if not math.isfinite(value or 0):
                raise InputError(f"the loss term '{name}' of {self.network} is not finite; lower "
                                 "--learning-rate or its weight, and choose another --out")
        return means

    def row(self):
        """The terms, "train" accuracy in %, and the seconds ("s") since this Mean was made."""
        row = self.terms()
        if self.classified:
            row["train"] = 100 * self.correct.item() / self.classified.item()
        seconds = time.time() - self.start
        return {**row, "img/s": self.images / max(seconds, 1e-9), "s": seconds}


class Record:
    """The folder of one training: log.csv, checkpoint.pt, at the end result.json and weights.

        record = Record(folder, settings, resume)  # only where it has no `result`:
        record.restore(student=student, optimizer=optimizer, shuffle=generator)
        while (epoch := len(record.rows)) < E:  # the rows are the position
            mean = Mean()
            for images, labels in data.train.augmented(batch_size, generator):
                mean.add({"ce": loss}, logits, labels)
            record.close_epoch({**mean.row(), "test": evaluate(student, data.test, ..)}, E)
        record.finish({"student": student.state_dict()}, measures={..})

    After a kill the loop goes on behind the last closed epoch, with every part as it was then.
    `state` holds plain values of the script's own, saved likewise; both are loaded by the
    constructor. `result` is what a finished run left, else None. A folder of another run, of this
    one without `resume`, or that another process is writing, is refused; with `wait` that other
    process is waited for.
    """

    def __init__(self, folder, settings, resume, wait=False):
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.parts, self.saved, self.state, self.rows, self.result = {}, {}, {}, [], None
        finished, checkpoint = self.folder / "result.json", self.folder / "checkpoint.pt"
        ours, flag = (self.folder / ".lock").exists(), "--cache" if wait else "--out"
        left = next((path for path in (finished, checkpoint) if path.exists()), None)
        foreign = [path.name for pattern in ("*.pt", "*.csv") for path in self.folder.glob(pattern)]
        if left is None and foreign and not ours:
            raise InputError(f"{flag} {folder} holds {foreign[0]}, but no run of this project; "
                             f"choose another {flag}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder / ".lock", wait)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"{flag} {folder} cannot be written ({error.strerror}); choose "
                             "another folder") from None
        for partial in self.folder.glob("*.[0-9]*.partial") if ours else ():
            partial.unlink()  # what a kill left half written
        left = next((path for path in (finished, checkpoint) if path.exists()), None)  # by now
        if left is None:
            return
        try:
            if left == finished:
                self.result = json.loads(content(finished))
                theirs, self.rows = self.result["arguments"], self.result["rows"]
                lost = [name for name in self.result["weights"]
                        if not sound(self.folder / f"{name}.pt")]
            else:
                self.saved = load_file(checkpoint)
                theirs, self.rows, self.state = (
                    self.saved[name] for name in ("settings", "rows", "state"))
            odd = [key for key in self.settings if theirs.get(key) != self.settings[key]]
            written = csv_text(self.rows)
        except (InputError, ValueError, LookupError, TypeError, AttributeError) as error:
            if not wait:
                raise InputError(f"{left} is damaged or of another project ({error}); choose "
                                 "another --out") from None
            self.discard(left)
            return
        if odd == ["source"]:
            print(f"{folder}: the code has changed since this run began")
        elif odd:
            raise InputError(f"--out {folder} is of another run: {odd[0]} was "
                             f"{theirs.get(odd[0])}, now {self.settings[odd[0]]}; choose another")
        if not resume:
            raise InputError(f"--out {folder} holds this run; add --resume to go on with it, or "
                             "choose another --out")
        if self.saved:
            print(f"{folder}: goes on after epoch {len(self.rows)}")
        elif lost:
            raise InputError(f"{folder}: {lost[0]}.pt is missing or damaged; choose another --out")
        if not wait:  # again, as it was; a cache may be read-only
            save_file(written, self.folder / "log.csv")

    def discard(self, why):
        """Forget what a folder of the cache holds: `why`, a file, is damaged or missing."""
        print(f"{why} is damaged or missing: trained again")
        for path in (*self.folder.glob("*.pt"), *self.folder.glob("*.json")):
            path.unlink()
        self.result, self.rows, self.saved, self.state = None, [], {}, {}

    def restore(self, **parts):
        """Name what a checkpoint holds: networks, optimizers, generators; before the loop, once.

        After a kill each gets the state it had when the last epoch was closed.
        """
        if self.result:
            raise RuntimeError(f"{self.folder} holds a finished run: nothing to go on with")
        self.parts, self.fresh, self.start = parts, len(self.rows), time.time()
        for name, part in parts.items():
            if self.saved:
                load = getattr(part, "set_state", None) or part.load_state_dict
                load(self.saved["parts"][name])
        steps, self.size = self.folder / "steps.csv", self.saved.get("steps", 0)
        if steps.exists() and steps.stat().st_size >= self.size:
            os.truncate(steps, self.size)  # what a killed run wrote after its last checkpoint
        elif self.size:
            print(f"{steps} was deleted or shortened: it begins again, without its earlier lines")
            steps.unlink(missing_ok=True)
            self.size = 0

    def close_epoch(self, row, epochs, lines=()):
        """Print the row, write log.csv, and the checkpoint; `lines` go to steps.csv.

        `epochs`: how many the run will have, as far as is known.
        """
        self.rows = [*self.rows, {"epoch": len(self.rows) + 1, **row}]
        done = len(self.rows) - self.fresh
        left = (time.time() - self.start) / done * (epochs - len(self.rows))
        cells = {name: "-" if value is None else value if isinstance(value, int)
                 else format(value, FORMATS.get(name, ".4f"))
                 for name, value in self.rows[-1].items()} | {"left": f"{left / 60:.1f}m"}
        if done == 1:
            print("  " + " ".join(f"{name:>9}" for name in cells))
        print("  " + " ".join(f"{cell:>{max(9, len(name))}}" for name, cell in cells.items())
              + "\033[K" * sys.stdout.isatty(), flush=True)
        save_file(csv_text(self.rows), self.folder / "log.csv")
        if lines:
            with open(self.folder / "steps.csv", "a", newline="") as file:
                file.write(csv_text(lines, header=file.tell() == 0))
                self.size = file.tell()
        state = {name: getattr(part, "get_state", None) or part.state_dict
                 for name, part in self.parts.items()}
        save_file({"settings": self.settings, "rows": self.rows, "state": self.state,
                   "steps": self.size, "parts": {name: get() for name, get in state.items()}},
                  self.folder / "checkpoint.pt")

    def finish(self, weights, **found):
        """Write NAME.pt, plain CPU tensors, for each state dict in `weights`, and result.json."""
        for name, state in weights.items():
            if not all(value.isfinite().all() for value in state.values()):
                raise InputError(f"the weights of {name} are not finite; lower --learning-rate, "
                                 "and choose another --out")
            save_file({key: value.detach().cpu() for key, value in state.items()},
                      self.folder / f"{name}.pt")
        tests = [row["test"] for row in self.rows if row.get("test") is not None]
        self.result = {
            "arguments": self.settings, **environment(), "last_test": tests[-1],
            "best_test": max(tests), "seconds": sum(row["s"] for row in self.rows), **found,
            "weights": [*weights], "rows": self.rows}
        save_file(json.dumps(self.result, indent=1), self.folder / "result.json")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def table_row(self):
        """What a finished run shows in the table of all runs."""
        return {"test": self.result["last_test"], "best": self.result["best_test"],
                "epochs": len(self.rows), "seconds": self.result["seconds"],
                **self.result["measures"]}


def lock(path, wait=False):
    """Lock `path` while the returned file is open; InputError where another process holds it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file")
    file = open(path, "w")
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are not noticed there
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            raise InputError(f"--out {path.parent} is being written by another process; choose "
                             "another --out") from None
        print(f"waiting for another process, which trains {path.parent}")
        fcntl.lockf(file, fcntl.LOCK_EX)
    return file


def csv_text(rows, header=True):
    """Dicts as the lines of a table, a value that a row lacks as ""."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def environment():
    """What ran: command, script, commit, machine and versions."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], text=True,
                                cwd=Path(__file__).resolve().parent, capture_output=True,
                                check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"script": Path(sys.argv[0]).stem, "command": shlex.join(sys.argv),
            "commit": commit or None, "machine": platform.machine(), "gpu": gpu,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__}


def sgd(parameters, arguments):
    """SGD with the shared flags, by Nesterov's rule where the script's paper has it.

    `fused` makes a step one call, not several for each tensor; on mps we have not tried it.
    """
    nesterov = arguments.momentum > 0 and getattr(arguments, "nesterov", False)
    return torch.optim.SGD(parameters, arguments.learning_rate, arguments.momentum,
                           weight_decay=arguments.weight_decay, nesterov=nesterov,
                           fused=arguments.device.type != "mps")


def step_rates(initial, epochs):
    """The rate of each epoch, ten times smaller after 5/8, 3/4 and 7/8 of them (150, 180 and 210 of
    240, as the distillation literature has it)."""
    return [initial * 0.1 ** sum(8 * e >= part * epochs for part in (5, 6, 7))
            for e in range(epochs)]


def train_network(name, data, learning_rates, arguments, keep=(), seed=0, title="teacher"):
    """Train a network by plain cross-entropy, one epoch for each entry of `learning_rates`.

    Returns its result (see Record.finish) and {epoch: network} for the last epoch and those in
    `keep` (counted from 1), frozen, in eval mode, all states of ONE run. Cached under --cache by
    everything that changes it: data, network, recipe, seed, precision, device, torch, and the
    source of this file and of the data's class. Where a state asked for was not kept, the whole run
    is trained again. (Of segmentation accuracies here are those of pixels.)
    """
    epochs = len(learning_rates)
    keep = {*keep, epochs}
    settings = {
        "network": name, "classes": data.classes, "image_size": data.image_size, "seed": seed,
        "train": data.train.fingerprint(), "test": data.test.fingerprint(),
        "statistics": [*data.mean, *data.std], "rates": list(learning_rates),
        **{flag: str(getattr(arguments, flag, None)) for flag in (
            "batch_size", "momentum", "weight_decay", "nesterov", "precision", "compile",
            "device")},
        "torch": torch.__version__, "source": hashlib.sha1(b"".join(
            Path(file).read_bytes() for file in {__file__: 0, inspect.getfile(type(data)): 0})
        ).hexdigest()}
    key = hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    record = Record(arguments.cache / f"{data.name}-{name}-{epochs}-{key}", settings, True, True)
    states = {epoch: record.folder / f"epoch-{epoch:04}.pt" for epoch in sorted(keep)}
    keep |= {int(path.stem.removeprefix("epoch-")) for path in record.folder.glob("epoch-*.pt")}
    for epoch, path in states.items():
        if epoch <= len(record.rows) and not sound(path):
            record.discard(path)

    def build():
        return data.build(name, seed).to(arguments.device)

    if record.result:
        print(f"{title}: {name}, trained before, {record.result['last_test']:.2f} % at the end")
    else:
        print(f"{title}: training {name} for {epochs} epochs")
        network, shuffle = build(), torch.Generator().manual_seed(seed)
        optimizer = sgd(network.parameters(), arguments)
        record.restore(network=network, optimizer=optimizer, shuffle=shuffle)
        compile_network(network, arguments)
        while (epoch := len(record.rows)) < epochs:
            optimizer.param_groups[0]["lr"] = learning_rates[epoch]
            mean = Mean(title.strip())
            network.train()
            for images, labels in data.train.augmented(arguments.batch_size, shuffle):
                with autocast(arguments):
                    logits = network(images)  # (B,C)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                mean.add({"ce": loss}, logits, labels)
            if epoch + 1 in keep:
                save_file(network.state_dict(), record.folder / f"epoch-{epoch + 1:04}.pt")
            record.close_epoch({"lr": learning_rates[epoch], **mean.row(),
                                "test": evaluate(network, data.test, arguments)}, epochs)
        record.finish({})
    return record.result, {epoch: frozen(load_weights(build(), path))
                           for epoch, path in states.items()}


# ------------------------------------------------------------------- 6. controls and their table
def each_seed(arguments):
    """The arguments of the runs of each --seed; several seeds get folders of their own."""
    seeds = list(dict.fromkeys(arguments.seed))
    for seed in seeds:
        folder = arguments.out / f"seed-{seed}" if len(seeds) > 1 else arguments.out
        yield argparse.Namespace(**{**vars(arguments), "seed": seed, "out": folder})


def planned_runs(arguments, data, name, controls):
    """Iterate over (name, flags, Record): the chosen run, and with --compare its controls.

    `controls`: {name: (the flags it changes, why)}. The flags may be a function of {name: Record},
    the runs before it, finished by then; None leaves the control out. A control that repeats an
    earlier run is left out. InputError, at the call, where the chosen run's folder is in use.
    """
    facts, records = data.facts(), {}

    def planned(label, changed, why, folder=""):
        if callable(changed):
            changed = changed(records)
        flags = argparse.Namespace(**{**vars(arguments), **(changed or {})})
        settings = json.loads(json.dumps({**describe(flags), "data": facts}))
        if changed is None or settings in [record.settings for record in records.values()]:
            return []
        folder = arguments.out / re.sub(r"[^\w.]+", "-", folder)
        record = records[label] = Record(folder, settings, arguments.resume)
        if not record.result:
            print(f"\n{label}: {why}; records in {folder}")
        return [(label, flags, record)]

    chosen = planned(name, {}, "the chosen run")
    if arguments.resume and not (records[name].rows or records[name].result):
        print(f"--resume: {arguments.out} holds nothing to resume, the run starts")

    def in_order():
        yield from chosen
        for label, (changed, why) in (controls if arguments.compare is not None else {}).items():
            yield from planned(label, changed, why, label)
    return in_order()


def describe(arguments):
    """Every argument that changes the result, as JSON: what a checkpoint must agree with.

    Files count by their content, whatever their place.
    """
    skip = {"out", "resume", "cache", "compare", "data", "workers"}
    found = {key: value if isinstance(value, (int, float, str, list, type(None))) else str(value)
             for key, value in sorted(vars(arguments).items()) if key not in skip}
    code = [path.read_bytes() for path in map(Path, (sys.argv[0], __file__)) if path.is_file()]
    found["source"] = hashlib.sha1(b"".join(code)).hexdigest()
    if found.get("teacher_weights"):
        found["teacher_weights"] = [hashlib.sha1(content(path)).hexdigest()
                                    for path in arguments.teacher_weights]
    return found


def content(path):
    """The bytes of a file that the user named; InputError where there is none."""
    if not os.path.isfile(path):  # a FIFO would wait for ever
        raise InputError(f"{path}: no such file")
    return Path(path).read_bytes()


def print_table(tables, formats, title):
    """Print one table from `tables`: for each seed a list of dicts with "run" and other keys.

    `formats`: {key: format}, the columns in their order; one that no row has is left out. Several
    seeds: mean ± standard deviation (n - 1). Missing: "-".
    """
    columns = {name: style for name, style in formats.items()
               if any(name in row for table in tables for row in table)}
    spread = f"mean ± standard deviation of {len(tables)} seeds" if len(tables) > 1 else "one seed"
    lines = [["run", *columns]]
    for label in dict.fromkeys(row["run"] for table in tables for row in table):
        rows = [row for table in tables for row in table if row["run"] == label]
        cells = [label + (f" ({len(rows)} seeds)" if 1 < len(tables) != len(rows) else "")]
        for name, style in columns.items():
            values = np.array([row[name] for row in rows if row.get(name) is not None])
            text = format(values.mean(), style) if len(values) else "-"
            cells.append(text + (f" ± {values.std(ddof=1):{style}}" if len(values) > 1 else ""))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}, {spread}")
    for first, *rest in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:])]
        print(f"  {first:<{widths[0]}}  " + "  ".join(cells), flush=True)
