"""Data, models, evaluation and the training loop's frame for the five scripts. No method is here.

B images in a batch, C classes, D features, H x W pixels. Images rest as uint8 (N,3,H,W) on the
device and are augmented a batch at a time; ImageNet is read from disk. Every network shows its
parts (`stem`, `stages`, `neck`, `head`), so that a method can put a layer between two. All that is
random is drawn by torch on the CPU, from --seed, and what follows from equal seeds is equal, bit
for bit on one machine's CPU with one torch and number of threads. The blocks of this file:
1. flags   2. data   3. models   4. evaluation   5. runs   6. methods and their table
"""

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from modulefinder import ModuleFinder
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models
from torchvision.transforms import v2

SHAPES = {  # one recipe for all scripts, so that their tables can be compared
    "teacher": "resnet14", "student": "resnet8x0.5", "epochs": 12, "batch_size": 64,
    "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
SMALL = {**SHAPES, "teacher": "resnet20", "epochs": 15, "learning_rate": 0.05}  # small real sets
NETWORKS = ("resnet20, resnet8x4, wrn_16_2 and the like, vgg8, vgg13, mobilenetv2, resnet18, "
            "resnet34, resnet50, mobilenet_v2")
SIZES = {"shapes": 16, "fashionmnist": 28, "cifar10": 32, "cifar100": 32, "tinyimagenet": 64,
         "imagenet": 224, "folder": 32}  # side of the images, unless --image-size says otherwise


class InputError(SystemExit):
    """Something the user can mend: Python prints its text alone and exits with code 1."""


def run_script(main):
    """Call main(); what is no fault of the code ends as one line: Ctrl-C, a full disk, `| head`."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without ± shows "?"
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on after the last closed epoch")
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        sys.exit((str(error) or type(error).__name__).strip().splitlines()[-1])


def in_terminal():
    """sys.stdout can be any object with `write`, as in IDLE or under Jupyter's %run."""
    return getattr(sys.stdout, "isatty", bool)()


# ----------------------------------------------------------------------------------------- 1. flags
def number(kind, low, high=1e9):
    """An argparse type: an int or a float from `low` to `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie from {low} to {high:g}")
        return value
    convert.__name__ = kind.__name__  # for argparse's "invalid int value"
    return convert


def usable_gpu():
    """Whether a kernel runs on the first GPU; where torch has none for it, one line says so."""
    try:
        return torch.cuda.is_available() and bool(torch.zeros(1, device="cuda") + 1)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        print(f"no GPU: {str(error).splitlines()[0]}; the CPU is used")
        return False


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the defaults, where there are any, and the methods line by line."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


def base_parser(description, methods, files=None, networks=None, datasets=tuple(SIZES)):
    """The flags all scripts share. `methods`: see `run_methods`; `files`: nargs of
    --teacher-weights, None: no such flag; `networks`: of --teacher and --student; `datasets`:
    choices."""
    table = [f"  {name}: {question}" for name, (_, question) in methods.items()]
    parser = argparse.ArgumentParser(
        description=description, epilog="\n".join(["methods, each a row of the table:", *table]),
        allow_abbrev=False, usage="%(prog)s [flags]; --help lists them",
        formatter_class=partial(Help, width=100))
    add, positive, part = parser.add_argument, number(float, 1e-9), number(float, 0, 1)
    natural, count = number(int, 0), number(int, 1)
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    devices += ["mps"] * torch.backends.mps.is_available()
    add("--method", nargs="+", choices=methods, default=[*methods][:1], metavar="NAME",
        help="what to run, see below")
    add("--compare", action="store_const", const=[*methods], dest="method", help="run all of them")
    add("--dataset", default="shapes", choices=datasets, help="shapes: drawn by this program")
    add("--data", type=Path, default="data", metavar="DIR", help="where its files lie or go")
    add("--image-size", type=number(int, 8, 1024), metavar="PX", help="side of the images")
    add("--mean", type=part, nargs=3, help="of the pixels in [0,1]; else known, or measured")
    add("--std", type=number(float, 1e-3), nargs=3, help="likewise the standard deviation")
    add("--train-fraction", type=number(float, 1e-6, 1), default=1.0, metavar="F",
        help="share of every class used")
    add("--no-flip", action="store_true", help="mirror no image: for letters, digits and signs")
    add("--open-set", type=natural, default=0, metavar="K", help="hold out K classes to recognise")
    add("--teacher", nargs=networks, metavar="NAME", help=f"network: {NETWORKS}")
    add("--student", nargs=networks, metavar="NAME", help="likewise")
    if files:
        add("--teacher-weights", type=Path, nargs=files, metavar="FILE", help="your own teacher")
    add("--epochs", type=count, metavar="E", help="epochs of a training")
    add("--batch-size", type=number(int, 2), metavar="B", help="images a step")
    add("--learning-rate", type=positive, metavar="LR", help="initial rate of SGD")
    add("--momentum", type=part, metavar="M", help="of SGD")
    add("--weight-decay", type=number(float, 0), metavar="WD", help="L2 penalty, all parameters")
    add("--seed", type=natural, nargs="+", default=[0], metavar="S", help="several: a run of each")
    add("--device", choices=devices, help="where to compute (the GPU, if it runs; else the CPU)")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16 is autocast")
    add("--workers", type=count, default=8, metavar="N", help="processes that read imagenet")
    add("--out", type=Path, metavar="DIR", help="folder of the runs, else runs/SCRIPT-DATASET")
    add("--cache", type=Path, default="runs/cache", metavar="DIR", help="of networks trained alone")
    return parser


def parse(parser, defaults, argv=None):
    """Parse; what is not typed comes from `defaults`: {data set: {flag: value}}, or a function of
    the arguments that gives {flag: value}."""
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**(defaults(known) if callable(defaults) else defaults[known.dataset]))
    arguments = parser.parse_args(argv)
    if (arguments.mean is None) != (arguments.std is None):
        parser.error("--mean and --std go together")
    files = [path.name for path in getattr(arguments, "teacher_weights", None) or ()]
    for one, other in zip(files, files[1:]):  # names that differ in their numbers alone
        digits = re.compile(r"\d+(?:\.\d+)?")
        before, after = ([float(part) for part in digits.findall(name)] for name in (one, other))
        if after < before and digits.sub("#", one) == digits.sub("#", other):
            parser.error(f"--teacher-weights: {one} stands before {other}; early states first (a * "
                         "sorts numbers as text)")
    arguments.device = torch.device(arguments.device or ("cuda" if usable_gpu() else "cpu"))
    for name in np.hstack([arguments.teacher, arguments.student]).tolist():
        with torch.device("meta"):
            _build(name, 2, 32)  # an unknown one ends here
    arguments.out = arguments.out or Path("runs", f"{Path(parser.prog).stem}-{arguments.dataset}")
    return arguments


# ------------------------------------------------------------------------------------------ 2. data
CHANNEL_STATISTICS = {  # mean, standard deviation of training pixels in [0,1]; others: measured
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashionmnist": ((0.2860,) * 3, (0.3530,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
FASHION = "a0dd82600d74"  # digest of Fashion-MNIST: torchvision compares only its archives
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
    mirrored: bool = True  # by `augmented`

    def __len__(self):
        return len(self.labels)

    def normalise(self, images):
        """uint8 (B,3,H,W) -> float32: (x / 255 - mean) / std, as torchvision does it."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def batches(self, batch_size=None):
        """Normalised images and labels in their order, not augmented; few at a time if large."""
        size = batch_size or max(32, min(500, 2**19 // self.images.shape[3] ** 2))
        for images, labels in zip(self.images.split(size), self.labels.split(size)):
            yield self.normalise(images), labels

    def augmented(self, batch_size, generator):
        """An epoch, shuffled, cropped, flipped; `generator` (CPU) draws all of it at the start."""
        size, device = len(self), self.labels.device
        order = torch.randperm(size, generator=generator)
        top, left = torch.randint(0, 9, (2, size), generator=generator)  # offsets 0..8
        flip = torch.randint(0, 2, (size,), generator=generator).bool() & self.mirrored
        cuts = [*range(batch_size, size - 1, batch_size)]  # so that no batch has a single image
        draws = (draw.to(device).tensor_split(cuts) for draw in (order, top, left, flip))
        for chosen, *offsets in zip(*draws):
            images = crop_and_flip(self.images.index_select(0, chosen), *offsets)
            yield self.normalise(images), self.labels[chosen]

    def fingerprint(self):
        return digest(self.images.cpu().numpy(), self.labels.cpu().numpy())


def crop_and_flip(images, top, left, flip):
    """Pad with 4 black pixels, crop each image back at its own offset, mirror it where `flip`.

    images (B,3,H,W); top, left (B,) in 0..8; flip (B,) bool. Of equal draws torchvision's
    RandomCrop(H, padding=4) and horizontal flip make the same images.
    """
    height, width = images.shape[2:]
    windows = F.pad(images, [4] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    image = torch.arange(len(images), device=images.device)
    cropped = windows[image, :, top, left]  # (B,3,9,9,H,W) -> (B,3,H,W)
    return torch.where(flip[:, None, None, None], cropped.flip(3), cropped)


@dataclass
class Streamed(Split):
    """ImageNet, read from disk: `images` (N,) are places in `folder.samples`."""
    folder: datasets.ImageFolder = None  # see Pictures
    size: int = 224
    workers: int = 8

    def batches(self, batch_size=100, generator=None):
        """As Split.batches; with a generator shuffled, cropped at random and flipped."""
        crop = [v2.Resize(self.size * 256 // 224), v2.CenterCrop(self.size)]
        if generator:
            crop = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(self.mirrored / 2)]
        folder, device, places = copy.copy(self.folder), self.mean.device, self.images.cpu()
        folder.transform = v2.Compose([v2.ToImage(), *crop])  # bytes: workers hold many batches
        if generator:
            places = places[torch.randperm(len(places), generator=generator)]
            folder.seeds = torch.randint(2**62, places.shape, generator=generator)
        folder.samples = [folder.samples[place] for place in places.tolist()]
        cuts = [*range(batch_size, len(places) - 1, batch_size)]  # as Split.augmented
        for batch in torch.utils.data.DataLoader(
                folder, batch_sampler=torch.arange(len(places)).tensor_split(cuts),
                num_workers=self.workers, generator=torch.Generator(),
                pin_memory=device.type == "cuda"):
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            yield self.normalise(images), labels

    augmented = batches

    def fingerprint(self):  # to read every file would take as long as an epoch
        files = [self.folder.samples[place][0] for place in self.images.tolist()]
        return digest(self.labels.cpu().numpy(),
                      [(os.path.basename(file), os.path.getsize(file)) for file in files])


def make_shapes(count, image_size=16, seed=0):
    """Draw RGB images of 20 classes: class = 2 * outline + fill, ten outlines, solid or hollow.

    Place, size, turn, stretch, colours, gradient and noise are random; objects are brighter than
    their background. An outline is a radius over the angle, R(a): a pixel at (radius, angle) in the
    shape's own axes lies inside where radius < R(angle). Equal seed, equal images. Returns images
    (N,3,S,S) uint8, labels (N,), masks (N,S,S) bool: the silhouettes, their holes included.
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


def share(where, labels, fraction, generator):
    """Of the images in the mask `where` this share of each class, at least one, as a mask."""
    chosen = torch.zeros_like(where)
    for label in labels[where].unique():
        members = (where & (labels == label)).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def load_data(arguments, validation=0.0):
    """The data set that the flags name, see `data_of`; prints what it is.

    --train-fraction keeps that share of each class; `validation` of as many images (at most 10,000)
    are held out of what it leaves, or else of the training images. (Of shapes they are drawn
    besides: so scripts can train on the same images, and share a teacher.) --open-set K keeps the
    last K classes for `unseen`. A folder without a test part is split 80/20. --seed draws all this.
    """
    name, size = arguments.dataset, arguments.image_size or SIZES[arguments.dataset]
    images, labels, part, names, folder = read_set(name, arguments.data, size, validation)
    generator = torch.Generator().manual_seed(arguments.seed)
    classes = len(names) - arguments.open_set
    if classes < 2:
        raise InputError(f"--open-set {arguments.open_set}: of {len(names)} classes 2 must be left")
    known = labels < classes
    train, test, held = part == 0, part == 1, (part == 2) & known
    if not test.any():  # all images of the unseen classes are `unseen`
        train = share(train, labels, 0.8, generator) & known
        test = ~train
    train, test, unseen, rest = train & known, test & known, test & ~known, train & False
    if arguments.open_set:
        verification_pairs(labels[unseen])  # too few images: say so now, not after the training
    if arguments.train_fraction < 1:
        used = share(train, labels, arguments.train_fraction, generator)
        train, rest = used, train & ~used
    if validation and name != "shapes":
        source = rest if rest.any() else train
        count = min(validation * train.sum().item(), 10_000)
        held = share(source, labels, min(1, count / max(1, source.sum().item())), generator)
        train = train & ~held
    there = {*labels[train].tolist()} & {*labels[test].tolist()} | {*labels[unseen].tolist()}
    if missing := {*range(len(names))} - there:
        raise InputError(f"{name}: class {names[min(missing)]} has no image left to train or to "
                         "test on; add some, or raise --train-fraction")
    if arguments.batch_size > train.sum():
        raise InputError(f"--batch-size {arguments.batch_size}: there are {train.sum()} training "
                         "images; lower it")
    sample = images[train][:: max(1, train.sum() // 5000)].float() / 255
    usual = CHANNEL_STATISTICS.get(name) or (
        sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3))
    mean, std = (torch.as_tensor(value if given is None else given).view(3, 1, 1)
                 for given, value in zip((arguments.mean, arguments.std), usual))
    kind, own = (Streamed, (folder, size, arguments.workers)) if name == "imagenet" else (Split, ())
    parts = [kind(*(value.contiguous().to(arguments.device) for value in (
        images[mask], labels[mask], mean, std)), not arguments.no_flip, *own)
        for mask in (train, held, test, unseen)]
    print(f"{name}: {train.sum()} training, {held.sum()} held-out, {test.sum()} test images of "
          f"{size}x{size}, {classes} classes; seed {arguments.seed}, {arguments.device}")
    return data_of(name, parts[:4 if arguments.open_set else 3], names[:classes], size)


def data_of(name, parts, names, size, build=None):
    """What the scripts know of a data set: `train`; `validation`, held out of it, and `test`, which
    select nothing; `unseen`, of --open-set, or None; `facts`, all that a loaded student needs."""
    train, validation, test, unseen = [*parts, None][:4]
    mean, std = (value.flatten().tolist() for value in (train.mean, train.std))
    print("  in training: " + ("a random part of each image" if name == "imagenet" else
                               "4 black pixels around each image, a random crop")
          + (", a random flip (--no-flip: none)" if train.mirrored else ", no flip"))
    return argparse.Namespace(
        name=name, train=train, validation=validation, test=test, unseen=unseen, image_size=size,
        mean=mean, std=std, classes=len(names), names=names,
        build=lambda name, seed=0: (build or build_model)(name, len(names), size, seed),
        facts={"classes": names, "image_size": size, "mean": mean, "std": std,
               "mirrored": train.mirrored, "fingerprint": {
                   kind: part.fingerprint() for kind, part in zip(
                       ("train", "validation", "test", "unseen"), parts) if part}})


def read_set(name, folder, size, validation=0.0):
    """(images, labels, part, names of the classes, ImageFolder or None).

    images (N,3,size,size) uint8, of imagenet places in its ImageFolder; labels (N,); part (N,): 0
    to train on, 1 to test on, 2, of shapes, held out.
    """
    if name not in ("shapes", "fashionmnist", "cifar10", "cifar100"):
        return read_folder(folder, name, size)
    if name == "shapes":
        counts, names = (SHAPES_TRAIN, SHAPES_TEST, round(validation * SHAPES_TRAIN)), SHAPE_NAMES
        parts = [make_shapes(n, size, seed)[:2] for seed, n in enumerate(counts)]
    else:
        title = {"fashionmnist": "FashionMNIST"}.get(name, name.upper())
        kind, parts = getattr(datasets, title), []
        try:  # torchvision compares CIFAR's md5 sums before it opens a pickle
            both = [kind(folder, train=train, download=True) for train in (True, False)]
            if any(len(one.data) != len(one.targets) or max(one.targets) >= len(one.classes)
                   for one in both):
                raise ValueError("images and labels do not belong together")
            if name == "fashionmnist" and digest(*(
                    value.numpy() for one in both for value in (one.data, one.targets))) != FASHION:
                raise ValueError("its files hold other images, as MNIST's of the same names")
        except Exception as error:  # urllib, sockets, sums, gzip: each has its own
            raise InputError(f"{name} is damaged or missing in --data {folder}, and was not "
                             f"downloaded ({error})") from None
        for one in both:
            images = torch.as_tensor(one.data).reshape(len(one), *one.data.shape[1:3], -1)
            images = images.movedim(3, 1).expand(-1, 3, -1, -1)  # grey three times
            parts.append((v2.functional.resize(images, [size, size]), torch.as_tensor(one.targets)))
        names = one.classes
    images, labels = map(torch.cat, zip(*parts))
    counts = torch.tensor([len(labels) for _, labels in parts])
    return images, labels, torch.arange(len(parts)).repeat_interleave(counts), names, None


PARTS = {"train", "training"}, {"test", "testing", "val", "valid", "validation", "dev", "eval"}


def look_like_parts(names):
    """Whether some of the names say train and others test, as trainA and testA do."""
    words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", " ".join(names)).lower())
    return all(part & {*words} for part in PARTS)


class Pictures(datasets.ImageFolder):
    """torchvision's ImageFolder, without hidden folders and files and those of archivers.

    `seeds` (N,): each image draws its crop by its own, whatever the number of workers."""
    seeds = None

    def __getitem__(self, index):
        if self.seeds is not None:  # in a worker process
            torch.manual_seed(self.seeds[index].item())
        return super().__getitem__(index)

    def __init__(self, root, **flags):
        super().__init__(root, is_valid_file=lambda path: path.lower().endswith(
            (*datasets.folder.IMG_EXTENSIONS, ".gif")) and not self.hidden(path, root),
                         allow_empty=True, **flags)  # `load_data` names an empty class

    @staticmethod
    def hidden(path, root):
        parts = os.path.relpath(path, root).split(os.sep)
        return any(part[0] == "." or part in ("__MACOSX", "@eaDir", "Thumbs.db") for part in parts)

    @staticmethod
    def find_classes(directory):
        names = sorted(entry.name for entry in os.scandir(directory)
                       if entry.is_dir() and not Pictures.hidden(entry.path, directory))
        return names, {name: label for label, name in enumerate(names)}


def read_folder(folder, name, size):
    """`read_set` of DIR/train/CLASS/* with DIR/test/CLASS/* or DIR/val/CLASS/*, or DIR/CLASS/*."""
    order = ("test", "val") if name == "folder" else ("val", "test")  # ImageNets' test: no labels
    held = next((folder / part for part in order if (folder / part).is_dir()), None)
    root = folder / "train" if held else folder
    names, _ = Pictures.find_classes(root)
    if held and any((held / "images" / one).is_dir() for one in names):
        held = held / "images"  # Tiny-ImageNet's val, sorted into classes
    below = {one: Pictures.find_classes(root / one)[0] for one in names}
    alike = len(below) > 1 and len(below[names[0]]) > 1 and len({*map(tuple, below.values())}) == 1
    if len(names) < 2 or not held and (alike or below.get("train") or look_like_parts(names)
                                       or any(map(look_like_parts, below.values()))):
        raise InputError(f"--data {folder}: no classes ({', '.join(names[:4])}); the layout is DIR/"
                         "train/CLASS/* with DIR/test/CLASS/* or DIR/val/CLASS/*, or DIR/CLASS/*")
    train = Pictures(root, loader=partial(open_picture, plain=name == "imagenet"))
    samples, count = train.samples, len(train)
    of_test = {*Pictures.find_classes(held)[0]} if held else {*names}
    if held and not of_test & {*names} and (held / "val_annotations.txt").exists():
        lines = [line.split() for line in (held / "val_annotations.txt").read_text().splitlines()]
        samples += [(str(held / "images" / line[0]), train.class_to_idx[line[1]])
                    for line in lines if {*names} & {*line[1:2]}]  # others count as left out
    elif held:
        if odd := {*names} ^ (of_test - {"images"} if name == "tinyimagenet" else of_test):
            raise InputError(f"--data: class {min(odd)} is not in both train/ and {held.name}/")
        samples += Pictures(held).samples
    if not samples:
        raise InputError(f"--data {folder}: no pictures in the folders {', '.join(names[:4])}")
    images, labels = torch.arange(len(samples)), torch.tensor([label for _, label in samples])
    if name != "imagenet":
        if len({os.path.realpath(path) for path, _ in samples}) < len(samples):
            raise InputError(f"--data {folder}: links give a picture more than once")
        files = [os.path.join(place, file) for place, _, files in os.walk(folder) for file in files]
        left = Counter(os.path.splitext(file)[1].lower() or "no ending" for file in files
                       if not Pictures.hidden(file, folder))
        if left := left - Counter(os.path.splitext(path)[1].lower() for path, _ in samples):
            print(f"{name}: left out {left.total()} files, {dict(left)}")
        train.transform = lambda image: np.asarray(image.resize((size, size), Image.BILINEAR))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes beside Python
            images = [*pool.map(partial(sound, train), images.tolist())]
        if broken := [str(image) for image in images if isinstance(image, OSError)]:
            raise InputError(f"{len(broken)} of {len(images)} pictures: {'; '.join(broken[:5])}")
        images = torch.from_numpy(np.stack(images)).movedim(3, 1)  # (N,3,S,S)
    return images, labels, torch.arange(len(samples)) >= count, names, train


def sound(folder, place):
    """The picture at a place of a `Pictures`, or the OSError that says why there is none."""
    try:
        return folder[place][0]
    except OSError as error:
        return error


def open_picture(path, plain=False):
    """A file as a PIL image in RGB, turned as EXIF says, alpha laid over white; OSError for what
    cannot be read, and for deep grey and floats, which PIL would clip. `plain`: neither turned nor
    laid over white, as the field reads ImageNet."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("its pixels have more than 8 bits; save it with 8")
            if plain:
                return image.convert("RGB")
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} cannot be used: {error}") from None  # what PIL says of damage


# ---------------------------------------------------------------------------------------- 3. models
class Network(nn.Module):
    """`stem`, `stages` of blocks, `neck` (what follows the last block), pooling, `head`."""

    def __init__(self, stem, stages, neck, head):
        super().__init__()
        self.stem, self.stages, self.neck, self.head = stem, nn.ModuleList(stages), neck, head
        self.features = head.in_features  # D, the width of the embedding

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


def conv_bn(inputs, outputs, k=3, stride=1, groups=1, bias=False, relu=True):
    """Layers: k x k convolution, batch norm, ReLU. A 1x1's stride is a pooling over 1 pixel before
    it: oneDNN's backward of a strided 1x1 can write past its buffer (uxlfoundation/oneDNN 6035)."""
    pool = [nn.AvgPool2d(1, stride)] if k == 1 < stride else []
    conv = nn.Conv2d(inputs, outputs, k, 1 if pool else stride, k // 2, groups=groups, bias=bias)
    return [*pool, conv, nn.BatchNorm2d(outputs), *[nn.ReLU(inplace=True)] * relu]


class Residual(nn.Module):
    """x -> body(x) + shortcut(x), two lists of layers; without a shortcut x itself."""

    def __init__(self, body, shortcut=()):
        super().__init__()
        self.body, self.shortcut = nn.Sequential(*body), nn.Sequential(*shortcut)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def basic_block(inputs, outputs, stride):
    """He et al. 2016; the shortcut is a 1x1 convolution where the shape changes."""
    same = stride == 1 and inputs == outputs
    shortcut = [] if same else conv_bn(inputs, outputs, 1, stride, relu=False)
    body = [*conv_bn(inputs, outputs, 3, stride), *conv_bn(outputs, outputs, relu=False)]
    return nn.Sequential(Residual(body, shortcut), nn.ReLU(inplace=True))


def wide_block(inputs, outputs, stride):
    """Zagoruyko and Komodakis 2016: batch norm and ReLU come before each convolution."""
    norm = [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
    body = [*conv_bn(inputs, outputs, 3, stride), *conv_bn(outputs, outputs)[:1]]
    if inputs == outputs:
        return Residual([*norm, *body])
    return nn.Sequential(*norm, Residual(body, conv_bn(inputs, outputs, 1, stride)[:-2]))


def inverted_block(inputs, outputs, stride, expansion):
    """Sandler et al. 2018, with ReLU for ReLU6 as in the distillation literature."""
    D = inputs * expansion
    body = [*conv_bn(inputs, D, 1), *conv_bn(D, D, 3, stride, groups=D),
            *conv_bn(D, outputs, 1, relu=False)]
    return Residual(body) if stride == 1 and inputs == outputs else nn.Sequential(*body)


def vgg_block(inputs, outputs, stride):
    """Simonyan and Zisserman 2015, with batch norm; a pooling for the stride."""
    pool = [nn.MaxPool2d(2)] if stride > 1 else []
    return nn.Sequential(*pool, *conv_bn(inputs, outputs, bias=True))


def build_model(name, classes, image_size=32, seed=0):
    """A network by name in train mode, its weights drawn from `seed` alone, channels_last.

    resnetD and resnetDxW (D = 6n + 2; W times the widths 16, 32, 64), wrn_D_W, vgg8, vgg13 and
    mobilenetv2 (width 0.5) are those of the CIFAR distillation literature; resnet18, resnet34,
    resnet50 and mobilenet_v2 torchvision's, the ResNets with a 3x3 stem up to 64 pixels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build(name, classes, image_size).to(memory_format=torch.channels_last)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _build(name, classes, image_size):
    if name in ("resnet18", "resnet34", "resnet50"):
        source = getattr(models, name)(num_classes=classes)
        stem = [source.conv1, source.bn1, source.relu, source.maxpool]
        stem = conv_bn(3, 64) if image_size <= 64 else stem
        stages = [source.layer1, source.layer2, source.layer3, source.layer4]
        return Network(nn.Sequential(*stem), stages, nn.Identity(), source.fc)
    if name == "mobilenet_v2":
        source = models.mobilenet_v2(num_classes=classes)
        stem, *blocks, neck = source.features
        cuts = (0, 1, 3, 6, 10, 13, 16, 17)  # the seven rows of the paper's table 2
        stages = [nn.Sequential(*blocks[a:b]) for a, b in zip(cuts, cuts[1:])]
        return Network(stem, stages, neck, source.classifier[1])
    if name in ("vgg8", "vgg13"):  # rows, of the stages: outputs, blocks, first stride
        n = 1 if name == "vgg8" else 2
        rows = [(64, n, 1), (128, n, 2), (256, n, 2), (512, n, 2), (512, n, 1)]
        block, inputs, stem, neck = vgg_block, 3, [], []
    elif name == "mobilenetv2":  # width 0.5, the strides of the distillation literature
        rows = [(8, 1, 1, 1), (12, 2, 1, 6), (16, 3, 2, 6), (32, 4, 2, 6), (48, 3, 1, 6),
                (80, 3, 2, 6), (160, 1, 1, 6)]  # and the expansion
        block, inputs, stem, neck = inverted_block, 16, conv_bn(3, 16, 3, 2), conv_bn(160, 1280, 1)
    else:
        found = (re.fullmatch(r"(resnet)(\d+)(?:x(\d+(?:\.\d+)?))?", name)
                 or re.fullmatch(r"(wrn)_(\d+)_(\d+(?:\.\d+)?)", name))
        kind, depth, factor = found.groups() if found else ("", 0, 1)
        blocks, rest = divmod(int(depth) - (2 if kind == "resnet" else 4), 6)
        widths = [round(base * float(factor or 1)) for base in (16, 32, 64)]
        if blocks < 1 or rest or not 4 <= widths[0] <= 256:
            raise InputError(f"no network is called {name!r}; there are {NETWORKS}")
        rows = [*zip(widths, [blocks] * 3, (1, 2, 2))]
        if kind == "resnet":
            block, inputs, neck = basic_block, min(32, widths[0]), []
            stem = conv_bn(3, inputs)
        else:
            block, inputs, stem = wide_block, 16, conv_bn(3, 16)[:1]
            neck = [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
    stages = []
    for outputs, count, stride, *more in rows:
        shapes = [(inputs, outputs, stride), *[(outputs, outputs, 1)] * (count - 1)]
        stages.append(nn.Sequential(*(block(*shape, *more) for shape in shapes)))
        inputs = outputs
    head = nn.Linear(1280 if name == "mobilenetv2" else inputs, classes)
    return Network(nn.Sequential(*stem), stages, nn.Sequential(*neck), head)


def frozen(network, precision="fp32"):
    """A deep copy, batch-norm statistics included, in eval mode, that gets no gradient. With "bf16"
    for use under `autocast` alone, which would cast its weights anew in every step."""
    twin = copy.deepcopy(network).eval().requires_grad_(False)
    for module in twin.modules() if precision == "bf16" else ():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bfloat16()
    return twin


def folded(network, precision="fp32"):
    """`frozen`, and every batch norm merged into the convolution before it: the same outputs but
    for the last digits, in less time; for a teacher that will never learn again."""
    twin = frozen(network)
    for module in twin.modules():
        parts = list(module.named_children())
        for (name, convolution), (after, norm) in zip(parts, parts[1:]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.utils.fuse_conv_bn_eval(convolution, norm))
                setattr(module, after, nn.Identity())
    return frozen(twin, precision)


def load_weights(network, path):
    """Load a state dict into `network`, also one that is wrapped or has the names of other code:
    then tensor by tensor in the file's order, if all kinds and shapes agree."""
    wrappers = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict",
                "model_state_dict", "model", "net", "student")  # where files keep weights
    state, own = load(path), network.state_dict()
    for _ in wrappers:  # one may lie in another
        inner = [state[key] for key in wrappers if isinstance(state.get(key), dict)]
        state = next((one for one in inner if any(
            isinstance(value, (torch.Tensor, dict)) for value in one.values())), state)
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value
             for name, value in state.items() if isinstance(value, torch.Tensor)}
    theirs, ours = ({name: (name.split(".")[-1], *value.shape) for name, value in part.items()
                     if value.is_floating_point() and not name.endswith("num_batches_tracked")}
                    for part in (state, own))
    if theirs.keys() != ours.keys() and [*theirs.values()] == [*ours.values()]:
        state, theirs = dict(zip(ours, (state[name] for name in theirs))), ours
    if theirs.items() ^ ours.items():
        both = [name for name in theirs if name in ours]
        unlike = [f"; first, {name} {theirs[name][1:]} is not {other} {ours[other][1:]}"
                  for name, other in (zip(both, both) if both else zip(theirs, ours))
                  if theirs[name] != ours[other]]
        unlike += [f"; it has no {name}" for name in ours if name not in theirs]
        raise InputError(f"{path} does not hold the weights of this network: it has {len(theirs)} "
                         f"tensors, expected are {len(ours)}{[*unlike, ''][0]}")
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{path} holds weights that are not finite")
    network.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    return network


def load_frozen(name, path, data, arguments):
    """A given teacher (--teacher-weights), frozen, on the device, and its test accuracy in %."""
    network = frozen(load_weights(data.build(name), path)).to(arguments.device)
    accuracy, labels = evaluate(network, data.test, arguments), data.test.labels
    known = labels[labels >= 0]
    chance = 100 * (known.bincount().max() / len(known)).item()
    print(f"{path}: {name}, {accuracy:.2f} % on the test images")
    if accuracy < chance + 0.1 * (100 - chance):
        print(f"warning: that is near chance ({chance:.1f} %); the usual reasons are another "
              "normalisation (--mean, --std) and another order of the classes")
    return network, accuracy


# ------------------------------------------------------------------------------------ 4. evaluation
def autocast(arguments):
    """bf16 autocast with --precision bf16, otherwise a context that does nothing."""
    bf16 = arguments.precision == "bf16"
    return torch.autocast(arguments.device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def evaluating(*networks):
    """Networks in eval mode, no gradients; each module gets its own mode back afterwards."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(network, split, arguments, forward=None):
    """Top-1 accuracy in %, eval mode. `forward`: images -> (B,C) scores, instead of the logits."""
    right = known = 0
    with evaluating(network), autocast(arguments):
        for images, labels in split.batches():  # labels (B,), or pixels'; below 0 they are unknown
            right += ((forward or network)(images).argmax(1) == labels).sum()
            known += (labels >= 0).sum()
    return 100 * right.item() / known.item()


def embeddings(network, split, arguments, forward=None):
    """(N,D) float32 embeddings and (N,) labels, eval mode. `forward` replaces `network.embed`."""
    with evaluating(network), autocast(arguments):
        parts = [((forward or network.embed)(images).float(), labels)
                 for images, labels in split.batches()]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def verification_pairs(labels, seed=0, most=3000):
    """(P,2) places of images, (P,) of one class or not: `most` of each, or as many tens as 100,000
    draws find. Same: a class, two of its images; different: two classes, an image of each; none
    twice."""
    labels, n = labels.cpu(), 100_000
    _, sizes = labels.unique(return_counts=True)  # (C,)
    C, several = len(sizes), (sizes > 1).nonzero().flatten()
    u = torch.rand(4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs, places, starts = [], labels.argsort(stable=True), sizes.cumsum(0) - sizes
    for same in (True, False) if C > 1 and len(several) else ():
        c = several[(u[0] * len(several)).long()] if same else (u[0] * C).long()  # (n,)
        d = c if same else (c + 1 + (u[1] * (C - 1)).long()) % C
        i = (u[2] * sizes[c]).long()
        j = (i + 1 + (u[3] * (sizes[c] - 1)).long()) % sizes[c] if same else (
            u[3] * sizes[d]).long()
        drawn = places[torch.stack([starts[c] + i, starts[d] + j], 1)].sort(1).values.numpy()
        _, first = np.unique(drawn, axis=0, return_index=True)
        pairs.append(torch.from_numpy(drawn[np.sort(first)]))  # in the order of the draws
    count = min(most, *map(len, pairs or [()])) // 10 * 10
    if count == 0:
        raise InputError(f"--open-set: {len(labels)} images of {C} unseen classes give fewer than "
                         "10 pairs of a kind; keep out more classes")
    return torch.cat([kind[:count] for kind in pairs]), torch.arange(2 * count) < count


def open_set_report(vectors, labels, seed=0):
    """Recognition of unseen classes in %, embeddings (N,D), labels (N,); equations of trikd.py.

    rank1, (10): share of images whose most similar OTHER image has the same class. verification,
    (11): as on LFW, mean over 10 folds of the accuracy of "same class iff s >= t", t the smallest
    similarity that is best on the other nine.
    """
    unit, labels, right = F.normalize(vectors.cpu().double(), dim=1), labels.cpu(), 0
    for rows in torch.arange(len(unit)).split(1000):
        similarity = unit[rows] @ unit.T  # Eq. (9): s_ab = u_a . u_b
        similarity[torch.arange(len(rows)), rows] = -2.0  # not the image itself
        right += (labels[similarity.argmax(1)] == labels[rows]).sum().item()
    pairs, same = verification_pairs(labels, seed)
    similarity = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)  # Eq. (9), (P,)
    fold, scores = torch.arange(len(same)) % 10, []
    for k in range(10):
        others, own = similarity[fold != k], fold == k
        hits = ((others >= others[:, None]) == same[fold != k]).sum(1)  # at each t = s, (P',)
        t = others[hits == hits.max()].min()
        scores.append(((similarity[own] >= t) == same[own]).double().mean().item())
    return {"rank1": 100 * (right / len(unit)), "verification": 10 * sum(scores)}


def recognition(network, data, arguments, forward=None):
    """`open_set_report` on the unseen classes of `data`; {} where none was kept out."""
    if not data.unseen:
        return {}
    return open_set_report(*embeddings(network, data.unseen, arguments, forward))


def open_set_rows(data, arguments):
    """Rows of the table that recognition is to be compared with; [] where no class was kept out."""
    if not data.unseen:
        return []
    *_, name = np.hstack([arguments.student]).tolist()
    untrained = data.build(name, arguments.seed).to(arguments.device)
    sizes = data.unseen.labels.cpu().bincount().double()
    chance = 100 * (sizes * (sizes - 1)).sum() / (sizes.sum() * (sizes.sum() - 1))
    return [{"run": "chance", "rank1": chance.item(), "verification": 50.0},
            {"run": "raw pixels", **recognition(untrained, data, arguments, nn.Flatten())},
            {"run": "untrained student", **recognition(untrained, data, arguments)}]


def wide(values):
    """float16 and bfloat16 in float32: there sums overflow, and 1e-8 is 0."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def same_shape(one, other, names="student's and teacher's logits"):
    """Two tensors that a loss compares, `wide`; ValueError if they are empty, or differ in shape:
    broadcasting would hide it."""
    if one.shape != other.shape or not one.numel():
        raise ValueError(f"{names}: {tuple(one.shape)} and {tuple(other.shape)} must be one shape")
    return wide(one), wide(other)


# ------------------------------------------------------------------------------------------ 5. runs
class Mean:
    """What an epoch's batches average to: loss terms, training accuracy, images a second."""

    def __init__(self):
        self.sums, self.steps, self.images, self.start = {}, 0, 0, time.time()

    def add(self, terms, logits, labels):
        """A batch: {name: 0-dim tensor or float, None where it has none}; logits (B,C) or None."""
        B, found = len(labels), {}  # {name: (sum, count)}
        for name, value in terms.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            found[name] = (0, 0) if value is None else (value * B, B)
        if logits is not None:  # labels (B,), or pixels; below 0 they are unknown
            right = (logits.detach().argmax(1) == labels).sum()
            found["train"] = 100 * right, (labels >= 0).sum()
        for name, (total, count) in found.items():
            before = self.sums.get(name, (0, 0))
            self.sums[name] = before[0] + total, before[1] + count
        self.steps, self.images = self.steps + 1, self.images + B
        if self.steps % 20 == 0:  # not at every step: a GPU has to wait for it
            row = {"step": self.steps, **self.row()}
            if in_terminal():
                text = "  ".join(f"{key} {row[key]:.4g}" for key in row if row[key] is not None)
                print(text[:shutil.get_terminal_size().columns - 1], end="\033[K\r")

    def row(self):
        """The terms' means over the images that have them, "train" in %, images a second."""
        row = {name: float(total) / float(count) if count else None
               for name, (total, count) in self.sums.items()}
        for name, value in row.items():
            if not math.isfinite(value or 0):
                raise InputError(f"the loss term '{name}' is not finite: lower --learning-rate")
        seconds = time.time() - self.start
        return {**row, "img/s": round(self.images / seconds), "s": seconds}


def digest(*values):
    """A short hash of arrays by their bytes, of other values by what Python prints for them."""
    sha = hashlib.sha1()
    for value in values:
        array = isinstance(value, np.ndarray)
        sha.update(np.ascontiguousarray(value) if array else repr(value).encode())
    return sha.hexdigest()[:12]


def save(value, path):
    """Write text or a checkpoint; a kill leaves the old file or the new one, whole."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    buffer = io.BytesIO(value.encode() if isinstance(value, str) else b"")
    if not isinstance(value, str):
        torch.save(value, buffer)  # not to the disk: if that is full, torch's words do not say so
    partial.write_bytes(buffer.getbuffer())
    os.replace(partial, path)


def load(path):
    """The dict of tensors and plain values that a file holds."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # RepDistiller's files have it
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # zipfile, pickle, EOF: by where the damage lies
        kind = type(error).__name__
        raise InputError(f"{path} is damaged or holds more than a dict of tensors ({kind}); remove "
                         "what a run left, save a state dict again") from None


def cached(name, settings, make):
    """What `make()` gives, kept in a file `name` + hash of `settings`."""
    path = Path(f"{name}-{digest(settings)}.pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(make(), path)
    return load(path)


@cache
def source_of(file):
    """The texts of a module and of all that it imports of this project, as they are at first."""
    finder = ModuleFinder([str(Path(__file__).parent), str(Path(file).parent)])
    finder.run_script(file)
    return {Path(module.__file__).read_bytes() for module in finder.modules.values()
            if module.__file__}


def settings_of(flags, data, *code):
    """All that decides a result: flags, not folders; data; torch; the source of this file, of the
    modules of `code`, functions or classes, and of what these import of the project."""
    owners = [sys.modules[owner.__module__] for owner in (*code, type(data.train))]
    texts = set().union(*(source_of(getattr(owner, "__file__", __file__)) for owner in owners))
    flags = {name: value for name, value in flags.items()
             if not isinstance(value, Path) and name != "workers"}
    return {**flags, "data": data.facts, "torch": torch.__version__,
            "source": digest(*sorted(texts))}


class Record:
    """One training and its folder, which is named after all that decides its result.

    So the same command finds its run again: a killed one goes on after its last closed epoch, with
    every part as it was then; a finished one is read. `rows`: one for each closed epoch: their
    number says where the loop stands; `state`: plain values of the script's own, saved likewise;
    `result`: what a finished run left, else None. `train_network` is the plainest user.
    """

    def __init__(self, name, settings):
        self.settings, self.folder = settings, Path(f"{name}-{digest(settings)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.restart()
        try:
            if (path := self.folder / "checkpoint.pt").exists():
                self.saved = load(path)
                self.rows, self.state = self.saved["rows"], self.saved["state"]
            elif (path := self.folder / "result.json").exists():
                self.result = json.loads(path.read_text())
                self.rows = self.result["rows"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it") from None

    def restart(self):
        """Forget what the folder holds."""
        self.rows, self.state, self.saved, self.result, self.columns = [], {}, None, None, []

    def restore(self, **parts):
        """Name what a checkpoint holds: networks, optimizers, generators; before the loop, once."""
        self.parts, self.commit = parts, os.popen(
            f'git -C "{Path(__file__).parent}" describe --always --dirty 2>{os.devnull}').read()
        if self.saved:
            print(f"  goes on after epoch {len(self.rows)}")
        for name, part in parts.items() if self.saved else ():
            load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            load(self.saved["parts"][name])

    def close_epoch(self, row, epochs):
        """Print and log the row, of `epochs` in all, and save all parts."""
        self.rows = [*self.rows, {"epoch": len(self.rows) + 1, **row}]
        left = sum(row["s"] for row in self.rows) / len(self.rows) * (epochs - len(self.rows))
        text = {name: "-" if value is None else str(value) if not isinstance(value, float)
                else f"{value:#.4g}" for name, value in self.rows[-1].items()}
        text["left"] = f"{left / 60:.1f}m"
        header = [] if self.columns == [*text] else [[*text]]
        for cells in (*header, text.values()):
            print(" ", *(cell.rjust(max(9, len(name))) for name, cell in zip(text, cells)),
                  end="\033[K\n" if in_terminal() else "\n")
        self.columns = [*text]
        self.write_csv("log", self.rows)
        self.save()

    def write_csv(self, name, rows):
        """Dicts as the lines of a table; a value that a row lacks is left empty."""
        names = dict.fromkeys(name for row in rows for name in row)
        with open(self.folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def save(self):
        """Write the checkpoint."""
        parts = {name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                 for name, part in self.parts.items()}
        saved = {"rows": self.rows, "state": self.state, "parts": parts}
        save(saved, self.folder / "checkpoint.pt")

    def finish(self, weights, **found):
        """Write NAME.pt, plain CPU tensors, for each state dict in `weights`, and result.json."""
        for name, state in weights.items():
            save({key: value.cpu() for key, value in state.items()}, self.folder / f"{name}.pt")
        tests = [row["test"] for row in self.rows if row.get("test") is not None]
        result = {
            "script": Path([*sys.argv, ""][0]).stem, "command": shlex.join(sys.argv),
            "commit": self.commit.strip(), "torch": torch.__version__, "arguments": self.settings,
            "threads": torch.get_num_threads(), "last_test": tests[-1], "best_test": max(tests),
            "seconds": sum(row["s"] for row in self.rows), **found, "rows": self.rows}
        text = json.dumps(result, default=lambda value: (
            value.item() if hasattr(value, "item") else str(value)))  # torch's and numpy's numbers
        self.result = json.loads(text, parse_constant=lambda _: None)  # NaN, which JSON has not
        save(json.dumps(self.result, indent=1), self.folder / "result.json")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)


def sgd(parameters, arguments):
    """SGD with the shared flags, by Nesterov's rule where the script's paper has it."""
    nesterov = arguments.momentum > 0 and getattr(arguments, "nesterov", False)
    return torch.optim.SGD(parameters, arguments.learning_rate, arguments.momentum,
                           weight_decay=arguments.weight_decay, nesterov=nesterov,
                           fused=arguments.device.type != "mps")


def step_rates(initial, epochs):
    """The rate of each epoch, ten times smaller after 5/8, 3/4 and 7/8 of them, as in the field."""
    return [initial * 0.1 ** sum(8 * e >= k * epochs for k in (5, 6, 7)) for e in range(epochs)]


def train_network(name, data, rates, arguments, keep=(), seed=0, title="teacher"):
    """Train a network by cross-entropy, an epoch for each of the `rates`; kept under --cache.

    Returns its result (see Record.finish) and {epoch: frozen network} for the last epoch and those
    in `keep` (counted from 1), all states of ONE run.
    """
    flags = {flag: getattr(arguments, flag, None) for flag in (
        "batch_size", "momentum", "weight_decay", "nesterov", "precision", "device")}
    # without held-out and unseen images: rco.py, which holds some out, shares it with the others
    used = {part: data.facts["fingerprint"][part] for part in ("train", "test")}
    record = Record(arguments.cache / f"{data.name}-{name}-{len(rates)}", {
        **settings_of({**flags, "network": name, "rates": rates, "seed": seed}, data),
        "data": {**data.facts, "fingerprint": used}})
    states = {epoch: record.folder / f"epoch-{epoch:04}.pt"
              for epoch in sorted({*keep, len(rates)})}
    if not all(path.exists() for epoch, path in states.items() if epoch <= len(record.rows)):
        record.restart()  # a state that was not kept: the whole run again
    print(f"{title}: {name}, {len(rates)} epochs" + ", trained before" * bool(record.result))
    if not record.result:
        network = data.build(name, seed).to(arguments.device)
        shuffle = torch.Generator().manual_seed(seed)  # order, crops and flips
        optimizer = sgd(network.parameters(), arguments)
        record.restore(network=network, optimizer=optimizer, shuffle=shuffle)
        while (epoch := len(record.rows)) < len(rates):
            optimizer.param_groups[0]["lr"] = rates[epoch]
            mean = Mean()
            network.train()
            for images, labels in data.train.augmented(arguments.batch_size, shuffle):
                with autocast(arguments):
                    logits = network(images)  # (B,C)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                mean.add({"ce": loss}, logits, labels)
            path = record.folder / f"epoch-{epoch + 1:04}.pt"
            if epoch + 1 in states or path.exists():  # also what another script kept: ONE run
                save(network.state_dict(), path)
            record.close_epoch({"lr": rates[epoch], **mean.row(),
                                "test": evaluate(network, data.test, arguments)}, len(rates))
        record.finish({})
    return record.result, {epoch: frozen(load_weights(data.build(name), path)).to(arguments.device)
                           for epoch, path in states.items()}


def network_alone(role, data, rates, arguments):
    """The "student" or the "teacher" of the run by itself: (frozen network, row of the table).

    Trained by cross-entropy, or, a teacher, the first file of --teacher-weights."""
    name, row = getattr(arguments, role), {"run": f"{role} alone"}
    if role == "teacher" and getattr(arguments, "teacher_weights", None):
        network, row["test"] = load_frozen(name, arguments.teacher_weights[0], data, arguments)
    else:
        seed = arguments.seed + {"student": 0, "teacher": 1000}[role]
        result, states = train_network(name, data, rates, arguments, seed=seed, title=row["run"])
        network = states[len(rates)]
        row, = rows_of(row["run"], result)
    return network, {**row, **recognition(network, data, arguments)}


# -------------------------------------------------------------------- 6. methods and their table
def each_seed(arguments):
    """The arguments of the runs of each --seed."""
    for seed in dict.fromkeys(arguments.seed):
        yield argparse.Namespace(**{**vars(arguments), "seed": seed})


def rows_of(name, result):
    """The table's rows of a finished run: one, unless its `train` left several in `table`."""
    row = {"test": result["last_test"], "best": result["best_test"], "epochs": len(result["rows"]),
           "seconds": result["seconds"], **result.get("measures", {})}
    return [{**one, "run": name + one.get("run", "")} for one in result.get("table", [row])]


def run_methods(arguments, methods, train, data, *networks):
    """The table's rows of the methods asked for: `train(record, data, *networks, settings)` each.

    `methods`: {name: (changes, question)}; `changes`: the settings that make the method, a dict or
    a function of the arguments. Of two that are one run the second is left out. One that diverges
    leaves the others their rows; its own says why.
    """
    table, known = [], {}
    for name in dict.fromkeys(arguments.method):
        changes, question = methods[name]
        changes = changes(arguments) if callable(changes) else changes
        settings = argparse.Namespace(**{**vars(arguments), **changes, "method": None})
        files = vars(settings).get("teacher_weights") or ()
        files = [digest(np.fromfile(path, np.uint8)) for path in files]
        found = settings_of({**vars(settings), "teacher_weights": files}, data, train)
        first = known.setdefault(digest(found), name)
        if first != name:
            table.append({"run": name, "note": f"the same run as {first}"})
            continue
        settings.method = found["method"] = name
        folder = re.sub(r"[^\w.]+", "-", f"{name}-seed-{arguments.seed}")
        record = Record(arguments.out / folder, found)
        print(f"\n{name}: {question}\n  {record.folder}")
        try:
            if not record.result:
                train(record, data, *networks, settings)
            table += [{**row, "folder": record.folder.name}
                      for row in rows_of(name, record.result)]
        except InputError as error:
            table.append({"run": name, "note": f"seed {arguments.seed}: {error}", "failed": True})
    return table


def print_table(tables, formats, title, folder):
    """Print `tables` as one, also into folder/table.txt; exit code 1 where a run has failed.

    `tables`: of each seed a list of dicts with "run" and other keys. Several seeds: mean ± standard
    deviation (n - 1). `formats`: {key: format} of the columns to show.
    """
    every = [row for table in tables for row in table]
    columns = {name: style for name, style in formats.items() if any(name in row for row in every)}
    lines = [["run", *columns, f"in {folder}"]]
    for label in dict.fromkeys(row["run"] for row in every):
        rows, line = [row for row in every if row["run"] == label], [label]
        for name, style in columns.items():
            values = np.array([row[name] for row in rows if row.get(name) is not None])
            text = format(values.mean(), style) if len(values) else "-"
            line.append(text + (f" ± {values.std(ddof=1):{style}}" if len(values) > 1 else ""))
        kinds = ("note", "folder") if len(tables) == 1 else ("note",)
        notes = dict.fromkeys(row[kind] for row in rows for kind in kinds if kind in row)
        lines.append([*line, ", ".join(notes)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = f"{title}; seeds: {len(tables)}\n" + "\n".join("  ".join([
        "", name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), note]).rstrip()
        for name, *cells, note in lines)
    print(f"\n{text}")
    with open(folder / "table.txt", "a", encoding="utf-8") as file:
        file.write(f"{' '.join(sys.argv)}\n{text}\n\n")
    if any("failed" in row for row in every):
        sys.exit(1)
