"""Data, models, evaluation and run records for the five distillation scripts. No method lives here.

Shapes: B images in a batch, C classes, D features, H x W pixels. Images rest as uint8 (N,3,H,W) on the device and are
augmented a batch at a time; every network shows its parts (`stem`, `stages`, `neck`, `head`), so that a method can put a
layer between two of them. Everything random comes from torch generators seeded by `--seed`. The blocks of this file:
1. flags   2. data   3. models   4. evaluation   5. records and checkpoints   6. training one network, cached on disk
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
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

if {"-h", "--help"} & set(sys.argv[1:]) and Path(sys.argv[0]).parent == Path(__file__).parent:
    # `python rco.py --help` needs the flags alone, not the two seconds that importing torch takes.
    torch, nn, F = None, SimpleNamespace(Module=object), None
else:
    import torch
    import torch.nn.functional as F
    from torch import nn

DATASETS = ("shapes", "fashionmnist", "cifar10", "cifar100", "tinyimagenet", "imagenet", "folder")


class InputError(ValueError):
    """Something the user can mend. `run_script` prints it as one line and exits with code 2."""


# ------------------------------------------------------------------------------------------------------------- 1. flags
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low, high=math.inf, low_allowed=True):
    """An argparse type: an int or float within [low, high], or (low, high] where `low_allowed` is False."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not (low <= value <= high) or (value == low and not low_allowed) or math.isinf(value):
            top = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {'at least' if low_allowed else 'above'} {low}{top}")
        return value
    return convert


def base_parser(description, defaults):
    """The flags all five scripts share. `defaults` maps a data set to its default flags; it is applied by `parse`."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.defaults_by_dataset = defaults
    add = parser.add_argument_group("data and networks").add_argument
    add("--dataset", default="shapes", choices=DATASETS, help="default: shapes, drawn by this program, no download")
    add("--data", type=Path, metavar="DIR", help="where the files of the data set lie or go (default: data/)")
    add("--image-size", type=number(int, 8, 1024), metavar="PX", help="side of the images (shapes, folder, *imagenet)")
    add("--train-fraction", type=number(float, 0, 1, False), default=1.0, metavar="F",
        help="use this share of every class's training images (default: 1)")
    add("--open-set", type=number(int, 0), default=0, metavar="K",
        help="keep the last K classes out of training, test recognition on them (default: 0, off)")
    add("--teacher", metavar="NAME", help="network of the teacher")
    add("--student", metavar="NAME", help="network of the student")
    add("--teacher-weights", type=Path, nargs="+", metavar="FILE", help="your own teacher: a plain state dict")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), metavar="E", help="epochs of the teacher, and of the student")
    add("--batch-size", type=number(int, 2), metavar="B", help="images per step")
    add("--learning-rate", type=number(float, 0, low_allowed=False), metavar="LR", help="initial learning rate")
    add("--momentum", type=number(float, 0, 1), metavar="M", help="SGD momentum")
    add("--weight-decay", type=number(float, 0), metavar="WD", help="L2 penalty, on every parameter")
    add("--seed", type=number(int, 0), nargs="+", default=[0], metavar="S",
        help="seed of weights, split and batches; several seeds: one run each, then mean and standard deviation")
    add = parser.add_argument_group("machine and records").add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: cuda where there is one")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16 is autocast (default: fp32)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--out", type=Path, metavar="DIR", help="folder of the records (default: runs/SCRIPT-DATASET-...)")
    add("--cache", type=Path, default=Path("runs/cache"), metavar="DIR", help="trained teachers (default: runs/cache)")
    add("--resume", action="store_true", help="go on with the run in --out")
    return parser


def parse(parser, argv=None):
    """Parse, fill in the data set's defaults, turn `device` into a torch.device; one line and exit 2 on bad input."""
    arguments = parser.parse_args(argv)
    for flag, value in parser.defaults_by_dataset[arguments.dataset].items():
        if getattr(arguments, flag) is None:
            setattr(arguments, flag, value)
    for name in (arguments.teacher, arguments.student):
        if name not in MODELS and _resnet_plan(name) is None:
            parser.error(f"no network is called {name!r}; there are {', '.join(MODELS)}, and resnetDxW (resnet8x0.5)")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if arguments.device == "auto":
        arguments.device = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[arguments.device]:
        parser.error(f"--device {arguments.device}: this torch sees no such device; try --device cpu")
    arguments.device = torch.device(arguments.device)
    return arguments


def run_script(main):
    """Call `main()`. What the user can mend ends as one line and exit code 2; Ctrl-C says how to go on, code 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; the last finished epoch is saved, go on with the same command and --resume",
              file=sys.stderr)
        sys.exit(130)


# -------------------------------------------------------------------------------------------------------------- 2. data
CHANNEL_STATISTICS = {  # mean and standard deviation of the training pixels in [0,1]; other sets: measured when loaded
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashionmnist": ((0.2860,) * 3, (0.3530,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SHAPES_TRAIN, SHAPES_TEST = 2500, 2000  # images of the embedded set


@dataclass
class Split:
    """Images that fit in memory: `images` (N,3,H,W) uint8 and `labels` (N,) int64 on one device."""
    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor = None  # (3,1,1), in [0,1]
    std: torch.Tensor = None

    def __len__(self):
        return len(self.labels)

    def normalise(self, images):
        """uint8 (B,3,H,W) -> float32 (B,3,H,W): (x / 255 - mean) / std, as torchvision's ToTensor and Normalize."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def batches(self, batch_size=500):
        """Normalised images and labels in their order, no augmentation."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield self.normalise(images), labels

    def augmented(self, batch_size, generator):
        """One epoch: shuffled, cropped and flipped batches. All draws come from `generator` (CPU), before the first."""
        size, device = len(self), self.labels.device
        order = torch.randperm(size, generator=generator)
        top, left = torch.randint(0, 9, (2, size), generator=generator)  # offsets 0..8, each equally likely
        flip = torch.randint(0, 2, (size,), generator=generator).bool()
        draws = [draw.to(device) for draw in (order, top, left, flip)]  # one transfer an epoch, none a step
        for start in range(0, size, batch_size):
            stop = size if size - start - batch_size == 1 else start + batch_size  # no batch of one: batch norm
            if start and size - start == 1:
                break
            chosen, *offsets = (draw[start:stop] for draw in draws)
            yield self.normalise(crop_and_flip(self.images[chosen], *offsets)), self.labels[chosen]

    def fingerprint(self):
        images = self.images.cpu().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return hashlib.sha1(images.numpy().tobytes() + self.labels.cpu().numpy().tobytes()).hexdigest()


def crop_and_flip(images, top, left, flip, padding=4):
    """Pad with black, crop each image back at its own offset, mirror where `flip`: torchvision's RandomCrop(H, padding=4)
    and horizontal flip for the same draws, to the bit. images (B,3,H,W); top, left (B,) in 0..2*padding; flip (B,) bool."""
    batch, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (B,H+8,W+8,3)
    rows = top[:, None] + torch.arange(height, device=images.device)  # (B,H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + left[:, None]  # (B,W)
    image = torch.arange(batch, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B,3,H,W), channels last


class StreamedSplit:
    """ImageNet: files read on demand. Same `batches`, `augmented`, `labels` as Split. Every image draws its crop from a
    seed of its own, so that the batches do not depend on the number of workers."""

    def __init__(self, paths, labels, size, mean, std, device):
        self.paths, self.labels, self.size, self.device = paths, labels, size, device
        self.mean, self.std = mean.cpu(), std.cpu()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        from torchvision.transforms import v2
        index, seed = item
        if seed is None:
            crop = [v2.Resize(self.size * 256 // 224, antialias=True), v2.CenterCrop(self.size)]
        else:
            crop = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        tail = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean.flatten().tolist(),
                                                                    self.std.flatten().tolist())]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            return v2.Compose([v2.ToImage(), *crop, *tail])(_open_image(self.paths[index])), int(self.labels[index])

    def _load(self, items, batch_size):
        workers = min(16, os.cpu_count() or 1)
        loader = torch.utils.data.DataLoader(self, batch_size, sampler=items, num_workers=workers,
                                             pin_memory=self.device.type == "cuda")
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

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
    """A data set. `unseen` holds images of the classes that `open_set` kept out of everything else (None without it)."""
    name: str
    train: Split
    validation: Split  # held out of train, never trained on; empty unless asked for
    test: Split  # never selects anything
    unseen: Split | None
    classes: int
    image_size: int
    mean: tuple
    std: tuple


def make_shapes(count, image_size=16, seed=0):
    """Draw `count` RGB images of 20 classes: class = 2 * outline + fill, ten outlines, filled or hollow.

    Pose, colours, background gradient and noise are random. An outline is a radius over the angle, R(a), so that a pixel at
    (radius, angle) in the shape's own axes is inside where radius < R(angle). Returns images (N,3,S,S) uint8, labels (N,)
    int64, masks (N,S,S) bool (the silhouette; a hollow shape's inside counts). The same seed gives the same images.

    {SHAPES_MEASURED}
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle = torch.linspace(0, 2 * math.pi, 361)[:-1]  # (360,)
    cosine, sine = angle.cos(), angle.sin()

    def polygon(corners):
        return math.cos(math.pi / corners) / (angle % (2 * math.pi / corners) - math.pi / corners).cos()

    def box(a, b):
        return torch.minimum(a / cosine.abs().clamp_min(1e-6), b / sine.abs().clamp_min(1e-6))

    ellipse = 0.55 / torch.sqrt((0.55 * cosine) ** 2 + sine**2)
    outlines = torch.stack([
        torch.full_like(angle, 0.88), ellipse, polygon(3), polygon(4), box(1.0, 0.5), polygon(5),
        torch.maximum(box(1.0, 0.33), box(0.33, 1.0)), 0.72 + 0.28 * (5 * angle).cos(), 0.72 + 0.28 * (3 * angle).cos(),
        0.52 * (1 + cosine) + 0.1])  # disc, ellipse, triangle, square, bar, pentagon, cross, flower, trefoil, cardioid
    labels = torch.randint(0, 20, (count,), generator=generator)
    grid = (torch.arange(image_size) + 0.5) / image_size * 2 - 1  # pixel centres in [-1,1]
    x = grid[None, None, :] - uniform(-0.15, 0.15, 1, 1)  # (N,1,S)
    y = grid[None, :, None] - uniform(-0.15, 0.15, 1, 1)  # (N,S,1)
    turn, size = uniform(-0.5, 0.5, 1, 1), uniform(0.65, 0.95, 1, 1)
    u, v = (x * turn.cos() + y * turn.sin()) / size, (y * turn.cos() - x * turn.sin()) / size  # (N,S,S)
    u = u * uniform(0.85, 1.15, 1, 1)  # a slight stretch
    index = (torch.atan2(v, u) * 180 / math.pi).floor().long() % 360
    outline = outlines[labels // 2].gather(1, index.flatten(1)).view_as(u)  # R(angle) at each pixel
    radius, edge = torch.sqrt(u**2 + v**2), size * image_size / 2  # `edge` pixels per unit: soft edges
    silhouette = ((outline - radius) * edge + 0.5).clamp(0, 1)
    hole = ((0.55 * outline - radius) * edge + 0.5).clamp(0, 1) * (labels % 2)[:, None, None]
    cover = (silhouette - hole)[:, None]  # (N,1,S,S)
    back = uniform(0.0, 0.4, 3, 1, 1) + uniform(-0.2, 0.2, 3, 1, 1) * x[:, None] + uniform(-0.2, 0.2, 3, 1, 1) * y[:, None]
    front = uniform(0.45, 1.0, 3, 1, 1)  # brighter than the background, in a colour of its own
    images = cover * front + (1 - cover) * back  # (N,3,S,S)
    images += 0.06 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, silhouette > 0.5


def stratified(labels, fraction, generator):
    """Indices of max(1, round(fraction * size)) images of each class, drawn by `generator`, in increasing order."""
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def load_data(name, folder=None, image_size=None, train_fraction=1.0, validation=0.0, open_set=0, seed=0, device="cpu"):
    """Load a data set of DATASETS as `Data`.

    `train_fraction` keeps that share of each class; then `validation` (a share, at most 10,000 images) is held out of it;
    both are drawn by `seed`. `open_set` = K keeps the last K classes out of train, validation, test and the class count.
    Where the set has no test part of its own (a folder of classes), `seed` splits each class 80/20, and all images of the
    K unseen classes are `unseen`. Raises InputError when files are missing, empty or damaged.
    """
    folder, device = Path(folder or "data"), torch.device(device)
    if image_size and name in ("fashionmnist", "cifar10", "cifar100"):
        raise InputError(f"--image-size cannot change {name}; it works with shapes, folder and the ImageNets")
    size = image_size or {"shapes": 16, "fashionmnist": 28, "imagenet": 224, "tinyimagenet": 64}.get(name, 32)
    if name == "shapes":
        train, test = (make_shapes(SHAPES_TRAIN, size, seed=0)[:2], make_shapes(SHAPES_TEST, size, seed=1)[:2])
        classes = 20
    elif name == "fashionmnist":
        train, test, classes = _read_fashionmnist(folder, "train"), _read_fashionmnist(folder, "t10k"), 10
    elif name in ("cifar10", "cifar100"):
        train, test, classes = *_read_cifar(folder, name), int(name[5:])
    else:
        train, test, classes = _list_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    known = classes - open_set
    if open_set and not 2 <= known:
        raise InputError(f"--open-set {open_set}: {name} has {classes} classes, at least 2 must be left to train on")
    if test is None:  # a folder of classes: 80/20 for the known ones; of the unseen ones everything is for testing
        labels, keep = train[1], torch.zeros(len(train[1]), dtype=torch.bool)
        keep[stratified(labels, 0.8, generator)] = True
        keep &= labels < known
        train, test = _take(train, keep.nonzero().flatten()), _take(train, (~keep).nonzero().flatten())
    unseen = _take(test, (test[1] >= known).nonzero().flatten())
    train, test = (_take(part, (part[1] < known).nonzero().flatten()) for part in (train, test))
    if train_fraction < 1:
        train = _take(train, stratified(train[1], train_fraction, generator))
    held_out = torch.zeros(len(train[1]), dtype=torch.bool)
    if validation:
        held_out[stratified(train[1], min(validation, 10_000 / len(train[1])), generator)] = True
    held, train = _take(train, held_out.nonzero().flatten()), _take(train, (~held_out).nonzero().flatten())
    for part, word in ((train, "train on"), (test, "test on")):
        if len(part[1].unique()) < known:
            missing = min(set(range(known)) - set(part[1].tolist()))
            raise InputError(f"{name}: class {missing} has no image left to {word}; add images to it")
    parts = [train, held, test, unseen]
    if name == "imagenet":
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in CHANNEL_STATISTICS[name])
        parts = [StreamedSplit(paths, labels, size, mean, std, device) for paths, labels in parts]
    else:
        if isinstance(train[0], list):
            parts = [(_decode(paths, size), labels) for paths, labels in parts]
        if name in CHANNEL_STATISTICS:
            mean, std = (torch.tensor(value) for value in CHANNEL_STATISTICS[name])
        else:
            sample = parts[0][0][:: max(1, len(parts[0][0]) // 5000)].float() / 255
            mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
        mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
        parts = [Split(images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device),
                       mean.to(device), std.to(device)) for images, labels in parts]
    train, held, test, unseen = parts
    return Data(name, train, held, test, unseen if open_set else None, known, size,
                tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))


def _take(part, indices):
    images, labels = part
    return ([images[i] for i in indices.tolist()] if isinstance(images, list) else images[indices]), labels[indices]


def _download(name, folder, files):
    from torchvision import datasets
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashionmnist": datasets.FashionMNIST}[name]
    print(f"{name}: not in {folder}, downloading it there")
    try:
        kind(folder, download=True)
    except Exception as error:  # urllib, sockets, checksums and file systems all speak their own errors here
        raise InputError(f"{name} could not be downloaded ({error}); put {files} into {folder} or name its folder with "
                         f"--data") from None


def _read_cifar(folder, name):
    inner, train_files, test_file, key = {
        "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels"),
        "cifar100": ("cifar-100-python", ["train"], "test", b"fine_labels")}[name]
    archive = folder / {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
    if not (folder / inner).is_dir() and not archive.exists():
        _download(name, folder, archive.name)
    try:
        if not (folder / inner).is_dir():
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")

        def read(names):
            batches = [pickle.loads((folder / inner / file).read_bytes(), encoding="bytes") for file in names]
            images = torch.from_numpy(np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32))
            labels = torch.tensor([label for batch in batches for label in batch[key]])
            if len(images) != len(labels) or images.dtype != torch.uint8 or not 0 <= labels.min() <= labels.max() < int(name[5:]):
                raise ValueError("images and labels do not belong together")
            return images, labels
        return read(train_files), read([test_file])
    except (OSError, EOFError, ValueError, KeyError, TypeError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise InputError(f"the files of {name} in {folder} are damaged or incomplete ({error}); delete "
                         f"{folder / inner} and {archive.name} and get them again") from None


def _read_fashionmnist(folder, part):
    places = [folder, folder / "FashionMNIST" / "raw", Path("/usr/share/datasets/fashion-mnist")]
    names = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]

    def find():
        return next((place for place in places if all((place / name).exists() for name in names)), None)

    if find() is None:
        _download("fashionmnist", folder, " and ".join(names))
    try:
        raw = [np.frombuffer(gzip.decompress((find() / name).read_bytes()), np.uint8) for name in names]
        images = torch.from_numpy(raw[0][16:].reshape(-1, 1, 28, 28).copy())
        labels = torch.from_numpy(raw[1][8:].astype(np.int64))
        if len(images) != len(labels) or labels.max() > 9:
            raise ValueError("images and labels do not belong together")
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError(f"the files {', '.join(names)} in {find() or folder} are damaged ({error})") from None
    return images.expand(-1, 3, -1, -1), labels


def _list_folder(folder):
    """(train, test, classes): paths and labels of DIR/train/CLASS/* and DIR/test (or val), or of DIR/CLASS/*, test None."""
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; give DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*")
    from PIL import Image
    endings = set(Image.registered_extensions())

    def listing(root):
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise InputError(f"--data: {root} holds {len(names)} class folders, at least 2 are needed")
        paths, labels = [], []
        for label, name in enumerate(names):
            files = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in endings and file.is_file())
            if not files:
                raise InputError(f"--data: class {root / name} has no image; add some or remove the folder")
            paths += files
            labels += [label] * len(files)
        return names, (paths, torch.tensor(labels))

    if not (folder / "train").is_dir():
        names, both = listing(folder)
        return both, None, len(names)
    held = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held is None:
        raise InputError(f"--data: {folder} has train/ but neither test/ nor val/ beside it")
    (names, train), (test_names, test) = listing(folder / "train"), listing(held)
    if names != test_names:
        odd = sorted(set(names) ^ set(test_names))
        raise InputError(f"--data: train/ and {held.name}/ have different classes, for example {odd[0]}")
    return train, test, len(names)


def _open_image(path):
    from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); mend or remove it") from None


def _decode(paths, size):
    """Files -> (N,3,size,size) uint8; other sizes are resized (bilinear, both sides, as the pictures of one set agree)."""
    def read(path):
        image = _open_image(path)
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), 2))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = list(pool.map(read, paths))
    stacked = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)  # (N,3,S,S), channels last


# ------------------------------------------------------------------------------------------------------------ 3. models
MODELS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
          "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "wrn_16_8", "vgg8", "vgg13", "mobilenetv2",
          "resnet18", "resnet34", "resnet50", "mobilenet_v2")


class Network(nn.Module):
    """`stem`, `stages` (each a sequence of blocks), `neck` (what follows the last block), average pooling, `head`."""

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
        return self.forward_features(x).mean((2, 3))  # (B,D), the vector that enters the classifier

    def forward(self, x):
        return self.forward_head(self.forward_features(x))  # (B,C) logits


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, bias=False):
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias), nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """He et al. 2016: relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); a 1x1 convolution where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *conv_bn(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class WideBlock(nn.Module):
    """Zagoruyko and Komodakis 2016: batch norm and ReLU before each convolution; a new width shares the first pair."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.body = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True),
                                  nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False))
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        active = self.norm(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: 1x1 expansion, 3x3 depthwise, 1x1 projection; residual where the shape stays."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            *conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True), *conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


def _resnet_plan(name):
    """`resnetD` or `resnetDxW` -> (blocks a stage, stem width, stage widths); None if the name is no such network.

    The suffix multiplies the widths 16, 32, 64; the stem keeps at most 32 channels, as in the field's resnet8x4.
    resnet8x0.5 (widths 8, 16, 32) is this project's student for small images.
    """
    depth, _, factor = str(name).removeprefix("resnet").partition("x")
    try:
        depth, factor = int(depth), float(factor or 1)
    except ValueError:
        return None
    widths = [round(base * factor) for base in (16, 32, 64)]
    if depth not in (8, 14, 20, 32, 44, 56, 110) or not str(name).startswith("resnet") or not 4 <= widths[0] <= 256:
        return None
    return (depth - 2) // 6, min(32, widths[0]), widths


def build_model(name, classes, image_size=32, seed=0):
    """A network by name, weights drawn from `seed` alone, channels_last. InputError if unknown or the images are too small.

    resnet18/34/50 and mobilenet_v2 are torchvision's; for images of up to 64 pixels the ResNets take the usual small-image
    stem (3x3, stride 1, no pooling). All others are the networks of the CIFAR distillation literature.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build(name, classes, image_size)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    network = network.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size))
    except RuntimeError:
        raise InputError(f"{name} cannot take images of {image_size}x{image_size}; choose another network or --image-size"
                         ) from None
    return network.train()


def _chain(block, plan, inputs):
    """Stages of blocks from (outputs, count, stride) rows; returns them and the last width."""
    stages = []
    for outputs, count, stride in plan:
        blocks = [block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(count)]
        stages.append(nn.Sequential(*blocks))
        inputs = outputs
    return stages, inputs


def _build(name, classes, image_size):
    relu = nn.ReLU(inplace=True)
    if name in ("resnet18", "resnet34", "resnet50", "mobilenet_v2"):
        from torchvision import models
        source = getattr(models, name)(num_classes=classes)
        if name == "mobilenet_v2":
            parts = list(source.features)
            return Network(parts[0], [nn.Sequential(*parts[a:b]) for a, b in ((1, 2), (2, 4), (4, 7), (7, 11), (11, 14),
                                      (14, 17), (17, 18))], parts[18], source.classifier[1])
        stem = [source.conv1, source.bn1, source.relu, source.maxpool]
        if image_size <= 64:
            stem = [*conv_bn(3, 64), source.relu]
        stages = [source.layer1, source.layer2, source.layer3, source.layer4]
        return Network(nn.Sequential(*stem), stages, nn.Identity(), source.fc)
    if name.startswith("wrn_"):
        depth, factor = map(int, name.split("_")[1:])
        plan = [(16 * factor, (depth - 4) // 6, 1), (32 * factor, (depth - 4) // 6, 2), (64 * factor, (depth - 4) // 6, 2)]
        stages, width = _chain(WideBlock, plan, 16)
        neck = nn.Sequential(nn.BatchNorm2d(width), relu)
        return Network(nn.Conv2d(3, 16, 3, 1, 1, bias=False), stages, neck, nn.Linear(width, classes))
    if name.startswith("vgg"):
        inputs, stages = 3, []
        for index, outputs in enumerate((64, 128, 256, 512, 512)):
            layers = [nn.MaxPool2d(2)] if index in (1, 2, 3) else []
            for _ in range({"vgg8": 1, "vgg13": 2}[name]):
                layers += [nn.Sequential(*conv_bn(inputs, outputs, bias=True), nn.ReLU(inplace=True))]
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        return Network(nn.Identity(), stages, nn.MaxPool2d(2), nn.Linear(512, classes))
    if name == "mobilenetv2":  # expansion 6, width 0.5, the small-image strides of the distillation literature
        inputs, stages = 16, []
        for expansion, outputs, count, stride in ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1),
                                                  (6, 80, 3, 2), (6, 160, 1, 1)):
            def block(a, b, step, expansion=expansion):
                return InvertedResidual(a, b, step, expansion)
            stage, inputs = _chain(block, [(outputs, count, stride)], inputs)
            stages += stage
        stem = nn.Sequential(*conv_bn(3, 16, 3, 2), nn.ReLU6(inplace=True))
        return Network(stem, stages, nn.Sequential(*conv_bn(160, 1280, 1), nn.ReLU6(inplace=True)), nn.Linear(1280, classes))
    plan = _resnet_plan(name)
    if plan is None:
        raise InputError(f"no network is called {name!r}; there are {', '.join(MODELS)}, and resnetDxW such as resnet8x0.5")
    count, stem_width, widths = plan
    stages, width = _chain(BasicBlock, [(w, count, 1 if i == 0 else 2) for i, w in enumerate(widths)], stem_width)
    return Network(nn.Sequential(*conv_bn(3, stem_width), relu), stages, nn.Identity(), nn.Linear(width, classes))


def compile_network(network, arguments):
    """With --compile, let torch.compile take the part that `embed` and `forward` share."""
    if arguments.compile:
        network.forward_features = torch.compile(network.forward_features)


def frozen(network):
    """A deep copy in eval mode that gets no gradient: parameters and batch-norm statistics (a bare state_dict() would be
    references to the weights that go on training)."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def load_weights(network, path):
    """Load a plain state dict from `path` into `network`; InputError when it is none or does not fit."""
    state = load_file(path)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold the weights of this network: {str(error)[:300]}") from None
    return network


# -------------------------------------------------------------------------------------------------------- 4. evaluation
def autocast(arguments):
    """bf16 autocast with --precision bf16, otherwise a context that does nothing."""
    return torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.precision == "bf16")


class evaluating:
    """Context: networks in eval mode without gradients; each gets its own mode back afterwards."""

    def __init__(self, *networks):
        self.networks, self.grad = networks, torch.no_grad()

    def __enter__(self):
        self.modes = [network.training for network in self.networks]
        self.grad.__enter__()
        for network in self.networks:
            network.eval()

    def __exit__(self, *error):
        self.grad.__exit__(*error)
        for network, mode in zip(self.networks, self.modes):
            network.train(mode)


def evaluate(network, split, arguments, forward=None):
    """Top-1 accuracy in %, eval mode. `forward(images) -> (B,C)` scores replaces the network's own logits if given."""
    correct = torch.zeros((), dtype=torch.long, device=arguments.device)
    with evaluating(network), autocast(arguments):
        for images, labels in split.batches():
            correct += ((forward or network)(images).argmax(1) == labels).sum()
    return 100 * correct.item() / len(split)


def embeddings(network, split, arguments, forward=None):
    """(N,D) float32 embeddings in eval mode, and their labels (N,). `forward` replaces `network.embed`."""
    with evaluating(network), autocast(arguments):
        parts = [((forward or network.embed)(images).float(), labels) for images, labels in split.batches()]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def rank_1(vectors, labels):
    """Share of images whose most similar OTHER image (cosine; the lowest index on a tie) has the same class."""
    unit = F.normalize(vectors.double(), dim=1)
    best = torch.cat([(rows @ unit.T).index_put((torch.arange(len(rows), device=unit.device), where), unit.new_tensor(-2.0))
                      .argmax(1) for rows, where in zip(unit.split(1000),
                                                        torch.arange(len(unit), device=unit.device).split(1000))])
    return (labels[best] == labels).double().mean().item()


def best_threshold(similarities, same):
    """The smallest observed similarity t that maximises the accuracy of "same class iff similarity >= t"."""
    order = similarities.argsort(descending=True)
    value, hit = similarities[order], same[order].long()
    correct = hit.cumsum(0) + ((~same).sum() - (1 - hit).cumsum(0))  # pairs told right if t = value
    correct[:-1][value[:-1] == value[1:]] = -1  # equal similarities are accepted together
    return value[(correct == correct.max()).nonzero().max()].item()


def verification_pairs(labels, seed=0, most=6000, folds=10):
    """(P,2) indices, (P,) same-class flags, (P,) folds: half same, half different, each fold alike, no pair twice.

    Same: class uniform, two of its images. Different: two classes uniform, one image each. `most` pairs, or as many as
    both kinds have in equal numbers. Drawn by `seed`, hence the same for all networks.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels.cpu() == label).nonzero().flatten().tolist() for label in labels.unique().cpu()]
    sizes = [len(group) for group in members]
    groups = [group for group in members if len(group) > 1]
    possible = sum(size * (size - 1) // 2 for size in sizes)
    different = len(labels) * (len(labels) - 1) // 2 - possible
    count = min(most // 2, possible, different) // folds * folds
    if count == 0 or len(members) < 2:
        raise InputError(f"--open-set: {len(labels)} images of {len(members)} unseen classes give fewer than {folds} pairs "
                         f"of each kind; keep out more classes")

    def draw(high, how_many):
        return torch.randperm(high, generator=generator)[:how_many].tolist()

    pairs = []
    for same in (True, False):
        found = {}
        while len(found) < count:
            if same:
                group = groups[draw(len(groups), 1)[0]]
                pair = [group[i] for i in draw(len(group), 2)]
            else:
                pair = [members[i][draw(len(members[i]), 1)[0]] for i in draw(len(members), 2)]
            found[tuple(sorted(pair))] = None
        pairs += list(found)
    fold = torch.arange(2 * count) % folds
    return torch.tensor(pairs), torch.arange(2 * count) < count, fold


def open_set_report(vectors, labels, seed=0):
    """Recognition of classes never seen in training, from their embeddings alone: {"rank1": %, "verification": %}.

    rank1: see `rank_1`. verification: mean over 10 folds of the accuracy of "same class iff cosine >= t", with t by
    `best_threshold` on the other nine folds. Equations (9) to (11) of this project's TriKD specification.
    """
    pairs, same, fold = verification_pairs(labels, seed)
    unit = F.normalize(vectors.double(), dim=1).cpu()
    similarity = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    scores = []
    for k in range(10):
        threshold = best_threshold(similarity[fold != k], same[fold != k])
        scores.append(((similarity[fold == k] >= threshold) == same[fold == k]).double().mean().item())
    return {"rank1": 100 * rank_1(vectors, labels), "verification": 100 * sum(scores) / 10}


# --------------------------------------------------------------------------------------- 5. records and checkpoints
def save_file(value, path):
    """Write atomically: a kill leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    if isinstance(value, str):
        partial.write_text(value)
    else:
        torch.save(value, partial)
    os.replace(partial, path)


def load_file(path):
    """torch.load with weights_only; InputError when the file is missing, truncated or holds something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, pickle, EOF and OS errors, depending on where the file is damaged
        raise InputError(f"{path} is truncated or no checkpoint ({type(error).__name__}); delete it or name another"
                         ) from None


def random_states(generator):
    states = {"loader": generator.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states, generator):
    generator.set_state(states["loader"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


FORMATS = {"lr": ".5f", "train": ".2f", "test": ".2f", "img/s": ".0f", "s": ".1f", "left": "s"}


def describe(arguments, skip=()):
    """Every argument that changes the result, as JSON values: what a checkpoint must agree with."""
    skip = {"out", "resume", "cache", "plot", "compare", "data", *skip}
    return {key: value if isinstance(value, (int, float, str, list, bool, type(None))) else str(value)
            for key, value in sorted(vars(arguments).items()) if key not in skip}


class Record:
    """What one run leaves behind, in `folder`: console rows, log.csv, checkpoint.pt after each epoch, result.json.

    `state` is the last checkpoint's dict when a killed run goes on, else None; `result` is a finished run's result.json.
    Refuses a folder that holds another run, or this one without --resume.
    """

    def __init__(self, folder, settings, resume, device, epochs):
        self.folder, self.settings, self.device, self.epochs = Path(folder), settings, device, epochs
        self.rows, self.state, self.result, self.before = [], None, None, 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(json.dumps(settings, indent=1), self.folder / ".writable")
            (self.folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder} cannot be written ({error.strerror}); choose another folder") from None
        finished, checkpoint = self.folder / "result.json", self.folder / "checkpoint.pt"
        if (finished.exists() or checkpoint.exists()) and not resume:
            kind = "a finished" if finished.exists() else "an unfinished"
            raise InputError(f"--out {folder} holds {kind} run; add --resume to go on with it, or choose another --out")
        if finished.exists():
            try:
                self.result = json.loads(finished.read_text())
                self._check(self.result["arguments"], finished)
                self.rows = self.result["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise error if isinstance(error, InputError) else InputError(f"{finished} is damaged; choose another --out")
        elif checkpoint.exists():
            self.state = load_file(checkpoint)
            if not isinstance(self.state, dict) or "settings" not in self.state:
                raise InputError(f"{checkpoint} is no checkpoint of this project; choose another --out")
            self._check(self.state["settings"], checkpoint)
            self.rows, self.before = self.state["rows"], self.state["seconds"]
        self.begin()

    def begin(self):
        """Start the clock of this run (again, if time has passed since the record was opened)."""
        self.started = self.tick = time.time()
        self.shown = self.fresh_rows = 0
        self._reset()

    def _check(self, theirs, path):
        for key, value in self.settings.items():
            if theirs.get(key) != value:
                raise InputError(f"{path} is of another run: {key} was {theirs.get(key)}, now {value}; choose another --out")

    def _reset(self):
        self.sums, self.steps, self.images, self.training_seconds = {}, 0, 0, 0.0
        self.correct, self.classifies = torch.zeros((), dtype=torch.long, device=self.device), False

    @property
    def seconds(self):
        return self.before + time.time() - self.started

    def step(self, terms, logits, labels, steps=None):
        """Add one batch: `terms` maps the name of a loss to its 0-dim tensor. A term that is not finite stops the run (on a
        GPU within 50 steps: reading it every step would make the GPU wait)."""
        if self.steps == 0:
            self.tick = time.time()
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float() * len(labels)
        if logits is not None:  # a method that trains no classifier has no training accuracy
            self.correct += (logits.detach().argmax(1) == labels).sum()
            self.classifies = True
        self.images, self.steps = self.images + len(labels), self.steps + 1
        if self.device.type == "cpu" or self.steps % 50 == 0:
            self._check_finite()
            if sys.stdout.isatty() and time.time() - self.shown > 0.5:
                self.shown = time.time()
                means = " ".join(f"{name} {value.item() / self.images:.4f}" for name, value in self.sums.items())
                print(f"\r  step {self.steps}{f'/{steps}' if steps else ''}  {means}\033[K", end="\r", flush=True)

    def _check_finite(self):
        for name, value in self.sums.items():
            if not math.isfinite(value.item()):
                raise InputError(f"the loss term '{name}' is not finite (epoch row {len(self.rows) + 1}); lower "
                                 f"--learning-rate or its weight; the last good epoch is in {self.folder}")

    def trained(self):
        """Call after the last batch of an epoch, before evaluation: closes the epoch's training time."""
        self._check_finite()
        self.training_seconds = time.time() - self.tick

    def epoch(self, before, after, state):
        """Finish an epoch: print its row, save log.csv and the checkpoint `state` (atomically, log first)."""
        self.fresh_rows += 1
        left = (time.time() - self.started) / self.fresh_rows * max(0, self.epochs - len(self.rows) - 1)
        row = {**before, **{name: value.item() / self.images for name, value in self.sums.items()},
               **({"train": 100 * self.correct.item() / self.images} if self.classifies else {}), **after,
               "img/s": self.images / max(self.training_seconds, 1e-9), "s": self.seconds}
        self.rows.append(row)
        cells = {**row, "left": f"{left / 60:.1f}m" if left < 5400 else f"{left / 3600:.1f}h"}
        if self.fresh_rows == 1:
            print("  " + " ".join(f"{name:>9}" for name in cells))
        print("  " + " ".join(f"{_cell(name, value):>9}" for name, value in cells.items()), flush=True)
        self.write_log()
        save_file({**state, "rows": self.rows, "seconds": self.seconds, "settings": self.settings},
                  self.folder / "checkpoint.pt")
        self._reset()

    def write_log(self):
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        partial = self.folder / "log.csv.partial"
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.folder / "log.csv")

    def finish(self, student_state=None, **more):
        """Write student.pt (a plain state dict) and result.json; the checkpoint goes. Returns the result."""
        if student_state:
            student_state = {name: value.detach().cpu() for name, value in student_state.items()}
            save_file(student_state, self.folder / "student.pt")
        best = max(range(len(self.rows)), key=lambda index: self.rows[index]["test"])
        self.result = {
            "arguments": self.settings, "seed": self.settings["seed"], **environment(self.device),
            "last_test": self.rows[-1]["test"], "best_test": self.rows[best]["test"], "best_row": best + 1,
            "seconds": self.seconds, "img/s": sum(row["img/s"] for row in self.rows) / len(self.rows), **more,
            "rows": self.rows}
        save_file(json.dumps(self.result, indent=1), self.folder / "result.json")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return self.result


def _cell(name, value):
    return str(value) if isinstance(value, (int, str)) else format(value, FORMATS.get(name, ".4f"))


def environment(device):
    """Versions, commit and machine, for the record."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {"commit": run.stdout.strip() or None, "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type} ({platform.machine()})",
            "threads": torch.get_num_threads()}


def print_table(tables, columns, title):
    """Print rows of one or several seeds: `tables` is a list (one a seed) of lists of dicts with "run" and `columns`.

    `columns` maps a key to its format. Several seeds give mean +- standard deviation (n - 1). A missing value is "-".
    """
    print(f"\n{title}" + (f", mean ± standard deviation of {len(tables)} seeds" if len(tables) > 1 else ", one seed"))
    labels = list(dict.fromkeys(row["run"] for table in tables for row in table))
    width = max(len(label) for label in labels)
    print(f"  {'run':<{width}} " + " ".join(f"{name:>16}" for name in columns))
    for label in labels:
        cells = []
        for name, style in columns.items():
            values = [row[name] for table in tables for row in table if row["run"] == label and row.get(name) is not None]
            text = format(sum(values) / len(values), style) if values else "-"
            if len(values) > 1:
                text += f" ± {format(torch.tensor(values).double().std().item(), style)}"
            cells.append(f"{text:>16}")
        print(f"  {label:<{width}} " + " ".join(cells), flush=True)


# ------------------------------------------------------------------------- 6. training one network, cached on disk
def sgd(parameters, arguments):
    """SGD with the shared flags; `fused` does one step in one call instead of several a tensor."""
    return torch.optim.SGD(parameters, arguments.learning_rate, arguments.momentum,
                           weight_decay=arguments.weight_decay, fused=True)


def train_network(name, data, learning_rates, arguments, keep=(), seed=0, title="teacher"):
    """Train a network by plain cross-entropy, one epoch for each entry of `learning_rates`, SGD with the shared flags.

    Returns a `Record.result`-like dict and {epoch: frozen copy} for the epochs in `keep` (counted from 1) and the last one.
    Cached under --cache by everything that changes the result (data, network, recipe, seed, precision, device, torch and this
    file's source): five scripts and ten runs share one teacher. A killed training goes on at its last epoch.
    """
    epochs = len(learning_rates)
    keep = sorted({*keep, epochs})
    settings = {"network": name, "classes": data.classes, "image_size": data.image_size, "data": data.train.fingerprint(),
                "test": data.test.fingerprint(), "statistics": [data.mean, data.std], "rates": list(learning_rates),
                "batch_size": arguments.batch_size, "momentum": arguments.momentum, "seed": seed,
                "weight_decay": arguments.weight_decay, "precision": arguments.precision, "compile": arguments.compile,
                "device": arguments.device.type, "torch": torch.__version__,
                "source": hashlib.sha1(Path(__file__).read_bytes()).hexdigest()}
    settings = json.loads(json.dumps(settings))
    key = hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = arguments.cache / f"{data.name}-{name}-{epochs}-{key}"
    network = build_model(name, data.classes, data.image_size, seed).to(arguments.device)

    def snapshot(epoch):
        return folder / f"epoch-{epoch:04d}.pt"

    record = Record(folder, settings, True, arguments.device, epochs)
    held = {int(path.stem[6:]) for path in folder.glob("epoch-*.pt")}
    done = epochs if record.result else (record.state or {}).get("epoch", 0)
    if any(epoch not in held for epoch in keep if epoch <= done):  # states nobody asked for then: the whole run once more
        keep = sorted({*keep, *held})
        for path in (folder / "result.json", folder / "checkpoint.pt"):
            path.unlink(missing_ok=True)
        record = Record(folder, settings, True, arguments.device, epochs)
    if record.result:
        print(f"{title}: {name}, trained before (last epoch {record.result['last_test']:.2f} %)")
    else:
        print(f"{title}: training {name} for {epochs} epochs")
        generator = torch.Generator().manual_seed(seed)
        optimizer, start = sgd(network.parameters(), arguments), 0
        if record.state:
            network.load_state_dict(record.state["network"])
            optimizer.load_state_dict(record.state["optimizer"])
            restore_random_states(record.state["random"], generator)
            start = record.state["epoch"]
        compile_network(network, arguments)
        for epoch in range(start, epochs):
            optimizer.param_groups[0]["lr"] = learning_rates[epoch]
            network.train()
            for images, labels in data.train.augmented(arguments.batch_size, generator):
                with autocast(arguments):
                    logits = network(images)  # (B,C)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                record.step({"ce": loss}, logits, labels, math.ceil(len(data.train) / arguments.batch_size))
            record.trained()
            if epoch + 1 in keep:
                save_file(network.state_dict(), snapshot(epoch + 1))
            test = evaluate(network, data.test, arguments)
            record.epoch({"epoch": epoch + 1, "lr": learning_rates[epoch]}, {"test": test},
                         {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1,
                          "random": random_states(generator)})
        record.finish()

    def state(epoch):
        twin = build_model(name, data.classes, data.image_size).to(arguments.device)
        return frozen(load_weights(twin, snapshot(epoch)))

    return record.result, {epoch: state(epoch) for epoch in keep}
