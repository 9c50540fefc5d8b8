"""Data, models, evaluation and run records for the five distillation scripts. No method lives here.

B images in a batch, C classes, D features, H x W pixels. Images rest as uint8 (N,3,H,W) on the
device and are augmented a batch at a time. Every network shows its parts (`stem`, `stages`, `neck`,
`head`), so that a method can put a layer between two of them. Everything random comes from torch
generators seeded by `--seed`. The blocks of this file:
1. flags   2. data   3. models   4. evaluation   5. records   6. training one network, cached
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import hashlib
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
if {"-h", "--help"} & set(sys.argv[1:]) and Path(sys.argv[0]).resolve().parent == HERE:
    # `python rco.py --help` needs the flags alone, not the two seconds that importing torch takes.
    torch, nn, F = None, SimpleNamespace(Module=object, Conv2d=object), None
else:
    import torch
    import torch.nn.functional as F
    from torch import nn

DATASETS = ("shapes", "fashionmnist", "cifar10", "cifar100", "tinyimagenet", "imagenet", "folder")


class InputError(ValueError):
    """Something the user can mend. `run_script` prints it as one line and exits with code 2."""


# ----------------------------------------------------------------------------------------- 1. flags
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low, high=math.inf, low_allowed=True):
    """An argparse type: int or float within [low, high]; (low, high] if not `low_allowed`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        inside = low <= value <= high and (low_allowed or value > low) and math.isfinite(value)
        if not inside:
            top = f" and at most {high}" if high < math.inf else ""
            start = "at least" if low_allowed else "above"
            raise argparse.ArgumentTypeError(f"{text} must be {start} {low}{top}")
        return value
    return convert


def base_parser(description, defaults, online=False, networks=None, fractions=None):
    """The flags all scripts share.

    `defaults`: {data set: {flag: value}}, or a function of the arguments that gives {flag: value};
    `parse` applies them. `online`: teachers start from scratch, there is no --teacher-weights.
    `networks`: nargs of --teacher and --student, `fractions` of --train-fraction, for scripts that
    take several.
    """
    parser = Parser(description=description)
    parser.chosen_defaults = defaults
    positive = number(float, 0, low_allowed=False)
    add = parser.add_argument_group("data and networks").add_argument
    add("--dataset", default="shapes", choices=DATASETS,
        help="default: shapes, drawn by this program, no download")
    add("--data", type=Path, metavar="DIR", help="where its files lie or go (default: data)")
    add("--image-size", type=number(int, 8, 1024), metavar="PX",
        help="side of the images, for shapes, folder, tinyimagenet and imagenet")
    add("--train-fraction", type=number(float, 0, 1, False), nargs=fractions, metavar="F",
        default=[1.0] if fractions else 1.0,
        help="share of every class's training images to use (default: 1)")
    add("--open-set", type=number(int, 0), default=0, metavar="K",
        help="keep the last K classes out of training, test recognition on them (default: 0)")
    add("--teacher", nargs=networks, metavar="NAME", help="network of the teacher")
    add("--student", nargs=networks, metavar="NAME", help="network of the student")
    if not online:
        add("--teacher-weights", type=Path, nargs="+", metavar="FILE",
            help="your own teacher, as a plain state dict")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), metavar="E", help="epochs of a training")
    add("--batch-size", type=number(int, 2), metavar="B", help="images a step")
    add("--learning-rate", type=positive, metavar="LR", help="initial learning rate of SGD")
    add("--momentum", type=number(float, 0, 1), metavar="M", help="momentum of SGD")
    add("--weight-decay", type=number(float, 0), metavar="WD", help="L2 penalty, all parameters")
    add("--seed", type=number(int, 0), nargs="+", default=[0], metavar="S",
        help="seed of weights, split and batches (default: 0); several: one run each, then mean "
             "and standard deviation")
    add = parser.add_argument_group("machine and records").add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16 is autocast")
    add("--compile", action="store_true", help="torch.compile the networks that learn")
    add("--out", type=Path, metavar="DIR", help="folder of the records (default: runs/...)")
    add("--cache", type=Path, default=Path("runs/cache"), metavar="DIR",
        help="folder of networks trained alone, shared by all runs (default: runs/cache)")
    add("--resume", action="store_true", help="go on with the run in --out")
    return parser


def parse(parser, argv=None):
    """Parse, fill in the data set's defaults, choose the device; bad input ends here, exit 2."""
    arguments = parser.parse_args(argv)
    if arguments.out is None:  # a folder named after the flags typed, so that runs do not collide
        silent = {"dataset", "data", "out", "cache", "device", "resume", "plot"}
        typed = [f"{flag}-{value}" for flag, value in vars(arguments).items()
                 if flag not in silent and value != parser.get_default(flag)]
        name = "-".join([Path(parser.prog).stem, arguments.dataset, *typed])
        arguments.out = Path("runs") / re.sub(r"[^\w.]+", "-", name).strip("-")[:150]
    defaults = parser.chosen_defaults
    for flag, value in (defaults(arguments) if callable(defaults)
                        else defaults[arguments.dataset]).items():
        if getattr(arguments, flag) is None:
            setattr(arguments, flag, value)
    for name in np.hstack([arguments.teacher, arguments.student]).tolist():
        if name not in MODELS and _resnet_plan(name) is None:
            parser.error(_unknown_network(name))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if arguments.device == "auto":
        arguments.device = next(kind for kind in available if available[kind])
    if not available[arguments.device]:
        parser.error(f"--device {arguments.device}: torch sees no such device; try --device cpu")
    arguments.device = torch.device(arguments.device)
    return arguments


def check_plot(parser, arguments):
    """Refuse --plot now, not after the training, where matplotlib is missing."""
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install matplotlib")


def each_seed(arguments):
    """The arguments of every seed's run, once each; several seeds go to --out/seed-S."""
    seeds = list(dict.fromkeys(arguments.seed))
    return [argparse.Namespace(**{
        **vars(arguments), "seed": seed,
        "out": arguments.out / f"seed-{seed}" if len(seeds) > 1 else arguments.out})
        for seed in seeds]


def run_script(main):
    """Call `main()`. Bad input ends as one line and exit code 2; Ctrl-C as 130 with a hint."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; the last finished epoch is saved, go on with the same command "
              "and --resume", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------ 2. data
CHANNEL_STATISTICS = {  # mean, standard deviation of training pixels in [0,1]; others: measured
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashionmnist": ((0.2860,) * 3, (0.3530,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SHAPES_TRAIN, SHAPES_TEST = 2500, 2000  # images of the embedded set


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

    def batches(self, batch_size=500):
        """Normalised images and labels in their order, not augmented."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield self.normalise(images), labels

    def augmented(self, batch_size, generator):
        """One epoch of shuffled, cropped and flipped batches; the last may be smaller.

        All draws come from `generator` (CPU) before the first batch: one transfer an epoch.
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
        arrays = (self.images.cpu().contiguous().numpy(), self.labels.cpu().numpy())
        return hashlib.sha1(b"".join(array.tobytes() for array in arrays)).hexdigest()


def batch_slices(size, batch_size):
    """Slices of 0..size; a last single image joins the batch before it: batch norm needs two."""
    starts = list(range(0, size, batch_size))
    if size - starts[-1] == 1 < size:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], size])]


def crop_and_flip(images, top, left, flip, padding=4):
    """Pad with black, crop each image back at its own offset, mirror it where `flip`.

    images (B,3,H,W); top, left (B,) in 0..2*padding; flip (B,) bool. For the same draws exactly
    torchvision's RandomCrop(H, padding=4) and horizontal flip.
    """
    height, width = images.shape[2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    image = torch.arange(len(images), device=images.device)
    cropped = windows[image, :, top, left]  # (B,3,9,9,H,W) -> (B,3,H,W)
    return torch.where(flip[:, None, None, None], cropped.flip(3), cropped)


class StreamedSplit:
    """ImageNet, read from disk on demand; `batches`, `augmented`, `labels` as in Split.

    Every image draws its crop from a seed of its own: the workers' number changes no pixel.
    """

    def __init__(self, paths, labels, size, mean, std, device):
        self.paths, self.labels, self.size, self.device = paths, labels, size, device
        self.statistics = mean.flatten().tolist(), std.flatten().tolist()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        from torchvision.transforms import v2
        index, seed = item
        if seed is None:
            crop = [v2.Resize(self.size * 256 // 224, antialias=True), v2.CenterCrop(self.size)]
        else:
            crop = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        transform = v2.Compose([v2.ToImage(), *crop, v2.ToDtype(torch.float32, scale=True),
                                v2.Normalize(*self.statistics)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            return transform(_open_image(self.paths[index])), int(self.labels[index])

    def _load(self, items, batch_size):
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=[items[where] for where in batch_slices(len(items), batch_size)],
            num_workers=min(16, os.cpu_count() or 1), generator=torch.Generator(),
            pin_memory=self.device.type == "cuda")
        for images, labels in loader:
            yield (images.to(self.device, non_blocking=True),
                   labels.to(self.device, non_blocking=True))

    def batches(self, batch_size=250):
        return self._load([(index, None) for index in range(len(self))], batch_size)

    def augmented(self, batch_size, generator):
        order = torch.randperm(len(self), generator=generator).tolist()
        seeds = torch.randint(1, 2**62, (len(self),), generator=generator).tolist()
        return self._load(list(zip(order, seeds)), batch_size)

    def fingerprint(self):
        names = [f"{path.parent.name}/{path.name}" for path in self.paths]
        return hashlib.sha1("\n".join(names).encode()).hexdigest()


@dataclass
class Data:
    """A data set: four parts (each a Split or StreamedSplit) and what a network must know."""
    name: str
    train: Split
    validation: Split  # held out of train, never trained on; empty unless asked for
    test: Split  # never selects anything
    unseen: Split | None  # the classes that `open_set` kept out of all else
    classes: int
    image_size: int
    mean: tuple
    std: tuple


def make_shapes(count, image_size=16, seed=0):
    """Draw RGB images of 20 classes: class = 2 * outline + fill, ten outlines, solid or hollow.

    Place, size, turn, stretch, colours, background gradient and noise are random; the object is
    brighter than its background. An outline is a radius over the angle, R(a): a pixel at (radius,
    angle) in the shape's own axes lies inside where radius < R(angle). The same seed gives the
    same images. Returns images (N,3,S,S) uint8, labels (N,) int64, masks (N,S,S) bool (the
    silhouette; the hole of a hollow shape belongs to it).

    Room to teach, measured with rco.py's default pair and budget (resnet14, resnet8x0.5, 8 epochs),
    mean ± standard deviation of 5 seeds: teacher 64.4 ± 4.0 %, student alone 44.7 ± 4.5 %, plain KD
    45.5 ± 8.7 %: 20 points of gap; that KD is ahead is true of the mean, well inside the spread.
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


def load_data(name, folder=None, image_size=None, train_fraction=1.0, validation=0.0, open_set=0,
              seed=0, device="cpu"):
    """Load a data set of DATASETS as `Data`.

    `train_fraction` keeps that share of each class; then the share `validation` (at most about
    10,000 images) is held out of it; both are drawn by `seed`. `open_set` = K keeps the last K
    classes out of all parts but `unseen`, and out of the class count. A folder without a test part
    is split 80/20 per class by `seed`, and all images of its K unseen classes are `unseen`.
    Raises InputError when files are missing, empty or damaged.
    """
    folder, device = Path(folder or "data"), torch.device(device)
    if image_size and name in ("fashionmnist", "cifar10", "cifar100"):
        raise InputError(f"--image-size cannot change {name}, only shapes, folder, *imagenet")
    size = image_size or {"shapes": 16, "fashionmnist": 28, "tinyimagenet": 64,
                          "imagenet": 224}.get(name, 32)
    if name == "shapes":
        train, test = make_shapes(SHAPES_TRAIN, size, 0)[:2], make_shapes(SHAPES_TEST, size, 1)[:2]
        classes = 20
    elif name == "fashionmnist":
        train, test = (_read_fashionmnist(folder, part) for part in ("train", "t10k"))
        classes = 10
    elif name in ("cifar10", "cifar100"):
        train, test, classes = *_read_cifar(folder, name), int(name[5:])
    else:
        train, test, classes = _list_folder(folder)
    generator, known = torch.Generator().manual_seed(seed), classes - open_set
    if known < 2 or open_set == 1:
        raise InputError(f"--open-set {open_set}: keep out 2 classes or more, and leave 2 or more "
                         f"of the {classes} of {name} to train on")
    if test is None:
        keep = torch.zeros(len(train[1]), dtype=torch.bool)
        keep[stratified(train[1], 0.8, generator)] = True
        keep &= train[1] < known
        train, test = _take(train, keep), _take(train, ~keep)
    unseen, test, train = (_take(test, test[1] >= known), _take(test, test[1] < known),
                           _take(train, train[1] < known))
    if train_fraction < 1:
        train = _take(train, stratified(train[1], train_fraction, generator))
    held = torch.zeros(len(train[1]), dtype=torch.bool)
    if validation:
        share = min(validation, 10_000 / len(train[1]))
        held[stratified(train[1], share, generator)] = True
    held, train = _take(train, held), _take(train, ~held)
    for part, purpose in ((train, "train on"), (test, "test on")):
        missing = set(range(known)) - set(part[1].tolist())
        if missing:
            raise InputError(f"{name}: class {min(missing)} has no image left to {purpose}; it "
                             "needs more images, or a larger --train-fraction")
    parts = [train, held, test, unseen]
    if name != "imagenet" and isinstance(train[0], list):
        parts = [(_decode(paths, size), labels) for paths, labels in parts]
    if name in CHANNEL_STATISTICS:
        mean, std = (torch.tensor(value) for value in CHANNEL_STATISTICS[name])
    else:
        sample = parts[0][0][:: max(1, len(parts[0][0]) // 5000)].float() / 255
        mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    statistics = mean.view(3, 1, 1), std.view(3, 1, 1)
    if name == "imagenet":
        parts = [StreamedSplit(paths, labels, size, *statistics, device) for paths, labels in parts]
    else:
        parts = [Split(*(value.contiguous().to(device) for value in (*part, *statistics)))
                 for part in parts]
    train, held, test, unseen = parts
    if open_set:
        verification_pairs(unseen.labels)  # too few images: say so now, not after the training
    return Data(name, train, held, test, unseen if open_set else None, known, size,
                tuple(mean.tolist()), tuple(std.tolist()))


def introduce(data, arguments):
    """Say what is trained on, before anything long."""
    held = f"{len(data.validation)} held-out, " if len(data.validation) else ""
    print(f"{data.name}: {len(data.train)} training, {held}{len(data.test)} test images of "
          f"{data.image_size}x{data.image_size}, {data.classes} classes; seed {arguments.seed}, "
          f"{arguments.device}")


def check_batch_size(data, arguments):
    """InputError, before anything is written, where one batch would be more than all images."""
    if arguments.batch_size > len(data.train):
        raise InputError(f"--batch-size {arguments.batch_size}: there are only {len(data.train)} "
                         f"training images at --train-fraction {arguments.train_fraction:g}")


def _take(part, where):
    """Images and labels at `where`: indices, or a mask."""
    images, labels = part
    where = where.nonzero().flatten() if where.dtype == torch.bool else where
    if isinstance(images, list):
        return [images[index] for index in where.tolist()], labels[where]
    return images[where], labels[where]


def _download(name, folder, files):
    from torchvision import datasets
    print(f"{name}: not in {folder}, downloading it there")
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashionmnist": "FashionMNIST"}[name]
    try:
        getattr(datasets, kind)(folder, download=True)
    except Exception as error:  # urllib, sockets, checksums and file systems: each has its own
        raise InputError(f"{name} could not be downloaded ({error}); put {files} into {folder}, "
                         "or name their folder with --data") from None


def _read_cifar(folder, name):
    inner, train_files, test_file, key = {
        "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch",
                    b"labels"),
        "cifar100": ("cifar-100-python", ["train"], "test", b"fine_labels")}[name]
    archive = folder / f"cifar-{name[5:]}-python.tar.gz"
    if not (folder / inner).is_dir() and not archive.exists():
        _download(name, folder, archive.name)

    def read(names):
        files = [(folder / inner / file).read_bytes() for file in names]
        batches = [pickle.loads(file, encoding="bytes") for file in files]
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = torch.tensor([label for batch in batches for label in batch[key]])
        if len(pixels) != len(labels) or labels.max() >= int(name[5:]) or labels.min() < 0:
            raise ValueError("images and labels do not belong together")
        return torch.from_numpy(pixels), labels

    try:
        if not (folder / inner).is_dir():
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        return read(train_files), read([test_file])
    except Exception as error:  # a damaged pickle or archive can raise almost anything
        raise InputError(f"the files of {name} in {folder} are damaged or incomplete ({error}); "
                         f"remove {folder / inner} and get {archive.name} again") from None


def _read_fashionmnist(folder, part):
    names = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
    places = [folder, folder / "FashionMNIST/raw", Path("/usr/share/datasets/fashion-mnist")]
    if not any((place / names[0]).exists() for place in places):
        _download("fashionmnist", folder, f"{' and '.join(names)} (and the other two)")
    place = next(place for place in places if (place / names[0]).exists())
    try:
        raw = [gzip.decompress((place / name).read_bytes()) for name in names]
        pixels = np.frombuffer(raw[0], np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.frombuffer(raw[1], np.uint8, offset=8).astype(np.int64)
        if len(pixels) != len(labels) or labels.max() > 9:
            raise ValueError("images and labels do not belong together")
    except Exception as error:  # gzip, zlib and numpy each have their own errors
        raise InputError(f"{' or '.join(names)} in {place} is damaged or missing ({error}); get "
                         "it again") from None
    return torch.from_numpy(pixels.copy()).expand(-1, 3, -1, -1), torch.from_numpy(labels)


def _list_folder(folder):
    """(train, test, classes), parts as (paths, labels): DIR/train/CLASS/* and DIR/val (or test),
    or DIR/CLASS/*, where test is None."""
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; it must hold train/CLASS/* and "
                         "test/CLASS/*, or CLASS/*")
    from PIL import Image
    endings = set(Image.registered_extensions())

    def listing(root):
        names = sorted(entry.name for entry in root.iterdir()
                       if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise InputError(f"--data: {root} needs at least 2 class folders, it has {len(names)}")
        paths, labels = [], []
        for label, name in enumerate(names):
            files = sorted(file for file in (root / name).rglob("*")
                           if file.suffix.lower() in endings)
            if not files:
                raise InputError(f"--data: class {root / name} has no image; add or remove it")
            paths, labels = paths + files, labels + [label] * len(files)
        return names, (paths, torch.tensor(labels))

    if not (folder / "train").is_dir():
        names, both = listing(folder)
        return both, None, len(names)
    held = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held is None:
        raise InputError(f"--data: {folder} has train/ but neither test/ nor val/ beside it")
    names, train = listing(folder / "train")
    if (held / "val_annotations.txt").exists():  # Tiny-ImageNet as it is handed out
        lines = [line.split() for line in (held / "val_annotations.txt").read_text().splitlines()]
        labels = torch.tensor([names.index(line[1]) for line in lines])
        return train, ([held / "images" / line[0] for line in lines], labels), len(names)
    test_names, test = listing(held)
    if names != test_names:
        odd = min(set(names) ^ set(test_names))
        raise InputError(f"--data: class {odd} is not in both train/ and {held.name}/")
    return train, test, len(names)


def _open_image(path):
    from PIL import Image
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); mend it") from None


def _decode(paths, size):
    """Files -> (N,3,size,size) uint8; an image of another size is resized, bilinear."""
    def read(path):
        image = _open_image(path)
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), 2))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = list(pool.map(read, paths))
    stacked = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)  # (N,3,S,S)


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
    CIFAR distillation literature. InputError for an unknown name or images that are too small.
    """
    if name not in MODELS and _resnet_plan(name) is None:
        raise InputError(_unknown_network(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build(name, classes, image_size).to(memory_format=torch.channels_last)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    try:
        with evaluating(network):
            network(torch.zeros(1, 3, image_size, image_size))
    except RuntimeError:
        raise InputError(f"{name} cannot take images of {image_size}x{image_size}; choose another "
                         "network or --image-size") from None
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


def frozen(network):
    """A deep copy, batch-norm statistics included, in eval mode, that gets no gradient.

    (A bare state_dict() holds references to the weights that go on training.)
    """
    twin = copy.deepcopy(network).eval().requires_grad_(False)
    twin.__dict__.pop("forward_features", None)  # a compiled one would run the original's weights
    return twin


def load_weights(network, path):
    """Load a plain state dict into `network`; InputError when it is none or does not fit."""
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold the weights of this network: {str(error)[:200]}"
                         ) from None
    return network


def load_frozen(name, path, data, arguments):
    """A finished network from a plain state dict (--teacher-weights), frozen, on the device."""
    network = load_weights(build_model(name, data.classes, data.image_size), path)
    return frozen(network).to(arguments.device)


# ------------------------------------------------------------------------------------ 4. evaluation
def autocast(arguments):
    """bf16 autocast with --precision bf16, otherwise a context that does nothing."""
    return torch.autocast(arguments.device.type, torch.bfloat16,
                          enabled=arguments.precision == "bf16")


@contextmanager
def evaluating(*networks):
    """Networks in eval mode, no gradients; each gets its own mode back afterwards."""
    modes = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for network, mode in zip(networks, modes):
            network.train(mode)


def evaluate(network, split, arguments, forward=None):
    """Top-1 accuracy in %, eval mode. `forward`: images -> (B,C) scores, instead of the logits."""
    correct = torch.zeros((), dtype=torch.long, device=arguments.device)
    with evaluating(network), autocast(arguments):
        for images, labels in split.batches():
            correct += ((forward or network)(images).argmax(1) == labels).sum()
    return 100 * correct.item() / len(split)


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


# --------------------------------------------------------------------------------------- 5. records
FORMATS = {"lr": ".5f", "train": ".2f", "test": ".2f", "img/s": ".0f", "s": ".1f"}


def save_file(value, path):
    """Write text or a checkpoint atomically: a kill leaves the old file or the new one, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    if isinstance(value, str):
        partial.write_text(value)
    else:
        torch.save(value, partial)
    os.replace(partial, path)


def make_folder(folder, flag):
    """Create `folder` where it is missing; InputError naming `flag` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written ({error.strerror}); choose another "
                         "folder") from None


def save_weights(state, path):
    """A state dict as plain CPU tensors, which loads without this project."""
    save_file({name: value.detach().cpu() for name, value in state.items()}, path)


def load_file(path):
    """torch.load with weights_only; InputError when missing, truncated or something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, pickle, EOF or OS errors, by where the damage lies
        raise InputError(f"{path} is truncated or no checkpoint ({type(error).__name__}); remove "
                         "it or name another") from None


def random_states(generator):
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"loader": generator.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states, generator):
    generator.set_state(states["loader"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def describe(arguments, skip=()):
    """Every argument that changes the result, as JSON: what a checkpoint must agree with."""
    skip = {"out", "resume", "cache", "plot", "compare", "data", *skip}
    return {key: value if isinstance(value, (int, float, str, type(None))) else str(value)
            for key, value in sorted(vars(arguments).items()) if key not in skip}


def environment(device):
    """Versions, commit and machine."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True,
                                capture_output=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"commit": commit or None, "device": f"{device.type} ({name})",
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}


class Record:
    """What a run leaves in `folder`: console rows, log.csv, checkpoint.pt, result.json.

    Refuses a folder that holds another run, or this one without `resume`. Afterwards `state` is
    the last checkpoint of a killed run (else None), `result` a finished run's result (else None).
    """

    def __init__(self, folder, settings, resume, device):
        self.folder, self.device = Path(folder), device
        self.settings = json.loads(json.dumps(settings))  # plain values: weights_only loads them
        self.rows, self.state, self.result, self.before = [], None, None, 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file("", self.folder / ".writable")
            (self.folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder} cannot be written ({error.strerror}); choose another "
                             "folder") from None
        finished, checkpoint = self.folder / "result.json", self.folder / "checkpoint.pt"
        if not resume and (finished.exists() or checkpoint.exists()):
            kind = "a finished" if finished.exists() else "an unfinished"
            raise InputError(f"--out {folder} holds {kind} run; add --resume to go on with it, or "
                             "choose another --out")
        if finished.exists():
            try:
                self.result = json.loads(finished.read_text())
                theirs, self.rows = dict(self.result["arguments"]), self.result["rows"]
                float(self.result["last_test"])
            except (ValueError, LookupError, TypeError):
                raise InputError(f"{finished} is damaged; choose another --out") from None
            self._same(theirs, finished)
        elif checkpoint.exists():
            self.state = load_file(checkpoint)
            whole = {"settings", "rows", "seconds"}
            if not isinstance(self.state, dict) or whole - set(self.state):
                raise InputError(f"{checkpoint} is not of this project; choose another --out")
            self._same(self.state["settings"], checkpoint)
            self.rows, self.before = self.state["rows"], self.state["seconds"]
            if "log" in self.state:
                self._cut_log(self.state["log"])
        self.begin(0)

    def _same(self, theirs, path):
        for key, value in self.settings.items():
            if theirs.get(key) != value:
                raise InputError(f"{path} is of another run: {key} was {theirs.get(key)}, now "
                                 f"{value}; choose another --out")

    def begin(self, epochs):
        """Start the clock of a run of so many epochs (an upper bound will do)."""
        self.epochs, self.started, self.shown, self.fresh = epochs, time.time(), 0.0, 0
        self._new_epoch()

    def _new_epoch(self):
        self.sums, self.counts, self.steps, self.images, self.training = {}, {}, 0, 0, 0.0
        self.correct, self.classifies = torch.zeros((), dtype=torch.long, device=self.device), False

    @property
    def seconds(self):
        return self.before + time.time() - self.started

    def step(self, terms, logits, labels, steps=None):
        """Add a batch: `terms` maps a loss term's name to its 0-dim tensor; logits (B,C) or None.

        A term may be a float, or None where this batch has none: its mean is over the other
        images. A term that is not finite stops the run; a tensor on a GPU within 50 steps, since
        reading it at every step would make the GPU wait.
        """
        if self.steps == 0:
            self.tick = time.time()
        for name, value in terms.items():
            count = 0 if value is None else len(labels)
            value = value.detach().float() if isinstance(value, torch.Tensor) else value or 0.0
            self.sums[name] = self.sums.get(name, 0.0) + value * len(labels)
            self.counts[name] = self.counts.get(name, 0) + count
        if logits is not None:
            self.correct += (logits.detach().argmax(1) == labels).sum()
            self.classifies = True
        self.images, self.steps = self.images + len(labels), self.steps + 1
        here = self.device.type == "cpu" or not any(isinstance(value, torch.Tensor)
                                                    for value in self.sums.values())
        if here or self.steps % 50 == 0:
            self._check_finite()
            if sys.stdout.isatty() and time.time() - self.shown > 0.5:
                self.shown = time.time()
                means = [f"{name} {float(value) / max(1, self.counts[name]):.4f}"
                         for name, value in self.sums.items()]
                print(f"  step {self.steps}/{steps or '?'} ", *means, end="\033[K\r", flush=True)

    def _check_finite(self):
        for name, value in self.sums.items():
            if not math.isfinite(float(value)):
                raise InputError(
                    f"the loss term '{name}' is not finite (row {len(self.rows) + 1} of the log); "
                    f"lower --learning-rate or the term's weight, and choose another --out")

    def trained(self):
        """The epoch's batches are done: stop its training clock, before anything is evaluated."""
        self._check_finite()
        self.training = time.time() - self.tick

    def epoch(self, before, after, state, steps=None):
        """Finish an epoch: print its row, write log.csv, then the checkpoint with `state`.

        The row is `before`, the mean of each loss term, the training accuracy, `after`, speed.
        `steps`: rows, a dict for each step of the epoch, for a finer log.csv than a row an epoch.
        """
        row = {**before, **{name: float(value) / self.counts[name] if self.counts[name] else None
                            for name, value in self.sums.items()}}
        if self.classifies:
            row["train"] = 100 * self.correct.item() / self.images
        row |= {**after, "img/s": self.images / max(self.training, 1e-9), "s": self.seconds}
        self.rows, self.fresh = [*self.rows, row], self.fresh + 1
        left = (time.time() - self.started) / self.fresh * max(0, self.epochs - len(self.rows))
        cells = {name: "-" if value is None else value if isinstance(value, int)
                 else format(value, FORMATS.get(name, ".4f")) for name, value in row.items()}
        cells["left"] = f"{left / 60:.1f}m"
        if self.fresh == 1:
            print("  " + " ".join(f"{name:>9}" for name in cells))
        clear = "\033[K" if sys.stdout.isatty() else ""
        print(clear + "  " + " ".join(f"{cell:>9}" for cell in cells.values()), flush=True)
        state = {**state, "rows": self.rows, "seconds": self.seconds, "settings": self.settings}
        if steps is None:
            self.write_log()
        else:
            state["log"] = self._append_log(steps)
        save_file(state, self.folder / "checkpoint.pt")
        self._new_epoch()

    def write_log(self):
        names = dict.fromkeys(name for row in self.rows for name in row)
        partial = self.folder / "log.csv.partial"
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.folder / "log.csv")

    def _append_log(self, rows):
        """Add `rows`, dicts of the same keys in the whole run, to log.csv; returns its size."""
        first = len(self.rows) == 1
        with open(self.folder / "log.csv", "w" if first else "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if first:
                writer.writeheader()
            writer.writerows(rows)
            return file.tell()

    def _cut_log(self, size):
        """Drop from a log.csv of steps what a killed run wrote after its last checkpoint."""
        log = self.folder / "log.csv"
        if not log.exists() or log.stat().st_size < size:
            raise InputError(f"{log} is missing or shorter than its checkpoint says; choose "
                             "another --out")
        os.truncate(log, size)

    def finish(self, student_state=None, **more):
        """Write student.pt (a plain state dict) and result.json, remove the checkpoint."""
        if student_state:
            save_weights(student_state, self.folder / "student.pt")
        tests = [-1.0 if row["test"] is None else row["test"] for row in self.rows]  # not tested
        self.result = {
            "arguments": self.settings, "seed": self.settings["seed"], **environment(self.device),
            "last_test": tests[-1], "best_test": max(tests),
            "best_row": tests.index(max(tests)) + 1, "seconds": self.seconds,
            "img/s": sum(row["img/s"] for row in self.rows) / len(self.rows), **more,
            "rows": self.rows}
        save_file(json.dumps(self.result, indent=1), self.folder / "result.json")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return self.result


def training_seconds(rows, images):
    """Seconds of training alone, without evaluation; `images` an epoch, `rows` of a Record."""
    return sum(images / row["img/s"] for row in rows)


def print_table(tables, formats, title):
    """Print one table from `tables`: for each seed a list of dicts with "run" and other keys.

    `formats`: {key: format}, the columns in their order; one that no row has is left out. Several
    seeds: mean ± standard deviation (n - 1). Missing: "-". Returns the columns shown.
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
    return list(columns)


# ------------------------------------------------------- 6. training one network, cached on disk
def sgd(parameters, arguments):
    """SGD with the shared flags, by Nesterov's rule where the script's paper has it.

    `fused` makes a step one call, not several for each tensor.
    """
    nesterov = arguments.momentum > 0 and getattr(arguments, "nesterov", False)
    return torch.optim.SGD(parameters, arguments.learning_rate, arguments.momentum,
                           weight_decay=arguments.weight_decay, nesterov=nesterov, fused=True)


def train_network(name, data, learning_rates, arguments, keep=(), seed=0, title="teacher"):
    """Train a network by plain cross-entropy, one epoch for each entry of `learning_rates`.

    Returns its result (see Record.finish) and {epoch: frozen network} for the last epoch and those
    in `keep` (counted from 1). Cached under --cache by everything that changes the result: data,
    network, recipe, seed, precision, device, torch, and this file's source. A killed training goes
    on at its last epoch. Where a state asked for was not kept, the whole run is trained again: the
    states always come from ONE run.
    """
    epochs = len(learning_rates)
    asked = keep = {*keep, epochs}
    settings = {
        "network": name, "classes": data.classes, "image_size": data.image_size, "seed": seed,
        "train": data.train.fingerprint(), "test": data.test.fingerprint(),
        "statistics": [*data.mean, *data.std], "rates": list(learning_rates),
        "batch_size": arguments.batch_size, "momentum": arguments.momentum,
        "weight_decay": arguments.weight_decay, "precision": arguments.precision,
        "nesterov": getattr(arguments, "nesterov", False),
        "compile": arguments.compile, "device": arguments.device.type, "torch": torch.__version__,
        "source": hashlib.sha1(Path(__file__).read_bytes()).hexdigest()}
    key = hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = arguments.cache / f"{data.name}-{name}-{epochs}-{key}"
    record = Record(folder, settings, True, arguments.device)
    held = {int(path.stem.removeprefix("epoch-")) for path in folder.glob("epoch-*.pt")}
    done = epochs if record.result else len(record.rows)
    if {epoch for epoch in keep if epoch <= done} - held:
        keep = keep | held
        for stale in folder.glob("epoch-*.pt"):
            stale.unlink()
        for stale in ("result.json", "checkpoint.pt"):
            (folder / stale).unlink(missing_ok=True)
        record = Record(folder, settings, True, arguments.device)

    def build(epoch=None):
        network = build_model(name, data.classes, data.image_size, seed).to(arguments.device)
        return load_weights(network, folder / f"epoch-{epoch:04}.pt") if epoch else network

    if record.result:
        print(f"{title}: {name}, trained before, {record.result['last_test']:.2f} % at the end")
    else:
        print(f"{title}: training {name} for {epochs} epochs")
        network, generator = build(), torch.Generator().manual_seed(seed)
        optimizer = sgd(network.parameters(), arguments)
        if record.state:
            network.load_state_dict(record.state["network"])
            optimizer.load_state_dict(record.state["optimizer"])
            restore_random_states(record.state["random"], generator)
        compile_network(network, arguments)
        record.begin(epochs)
        for epoch in range(len(record.rows), epochs):
            optimizer.param_groups[0]["lr"] = learning_rates[epoch]
            network.train()
            for images, labels in data.train.augmented(arguments.batch_size, generator):
                with autocast(arguments):
                    logits = network(images)  # (B,C)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                record.step({"ce": loss}, logits, labels, len(data.train) // arguments.batch_size)
            record.trained()
            if epoch + 1 in keep:
                save_file(network.state_dict(), folder / f"epoch-{epoch + 1:04}.pt")
            record.epoch({"epoch": epoch + 1, "lr": learning_rates[epoch]},
                         {"test": evaluate(network, data.test, arguments)},
                         {"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                          "random": random_states(generator)})
        record.finish()
    return record.result, {epoch: frozen(build(epoch)) for epoch in sorted(asked)}
