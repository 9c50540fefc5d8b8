"""What several test files need: the scripts as modules, runs in this process, tables, weights."""

import contextlib
import csv
import functools
import hashlib
import importlib
import io
import itertools
import json
import pickle
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(1)  # so that equal means equal to the bit


def pytest_addoption(parser):
    parser.addoption("--script", metavar="FILE", help="grade FILE, function by function")
    parser.addoption("--grade", metavar="FILE", help="with --script: the grades, as JSON")


def pytest_configure(config):
    if config.getoption("--script"):
        import grading
        grading.start(config, Path(config.getoption("--script")))


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """Every run of a test sees 260 drawn images and 100 test images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHAPES_TRAIN", 260)
        patch.setattr(common, "SHAPES_TEST", 100)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run("rco", folder, "--epochs 2"): `python rco.py ...` in this process; what it printed.

    Two small networks, batches of 50, on the CPU, one cache for all tests; flags given later win.
    """
    cache = tmp_path_factory.mktemp("cache")

    def call(script, out, flags=""):
        tiny = "--device cpu --teacher resnet8 --student resnet8x0.5 --epochs 2 --batch-size 50"
        argv = [f"{script}.py", *tiny.split(), "--out", out, "--cache", cache, *shlex.split(flags)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(word) for word in argv])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                importlib.import_module(script).main()
        return printed.getvalue()
    call.cache = cache
    return call


def refused(script, flags, capsys):
    """What bad flags give: argparse's usage, then the one line that this returns; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args(shlex.split(flags))
    out, error = capsys.readouterr()
    usage, line = error.strip().splitlines()
    assert (stop.value.code, out) == (2, "") and usage.startswith("usage: ")
    return line


def folder_of(out, name, seed=0):
    """The only folder of a method's runs in `out`."""
    name = re.sub(r"[^\w.]+", "-", name)
    folder, = Path(out).glob(f"{name}-seed-{seed}-*")
    return folder


def stopped(patch, owner, name, call, error=KeyboardInterrupt):
    """From now on the `call`-th call of owner.name raises `error`, as Ctrl-C would there."""
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)  # of its module: this file decides no result
    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)
    patch.setattr(owner, name, wrapped)


def forbidden(*_, **__):
    raise AssertionError("this must not be called")


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


def log_p(z, T=1.0):
    """The oracle's log softmax of logits (B,C) at temperature T."""
    z = np.asarray(z, float) / T
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(target, own, T=1.0):
    """The oracle's KL(target || own) from logits (B,C), nats, mean over the batch, no T^2."""
    a, b = log_p(target, T), log_p(own, T)
    return (np.exp(a) * (a - b)).sum(1).mean()


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y].mean()


def shapes_data(validation=0.0, **flags):
    """The embedded set as the scripts load it."""
    return common.load_data(Namespace(**{
        "dataset": "shapes", "data": None, "image_size": None, "train_fraction": 1.0, "open_set": 0,
        "mean": None, "std": None, "workers": 1, "seed": 0, "batch_size": 50,
        "device": torch.device("cpu"), "no_flip": False, **flags}), validation)


def load(name, folder, validation=0.0, **flags):
    return shapes_data(validation, dataset=name, data=folder, **{"batch_size": 1, **flags})


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tree(root, files):
    """Write {"train/ant/0.png": picture}: an array, a PIL image, bytes, or where a link leads."""
    for name, picture in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, str):
            path.symlink_to(picture)
        elif isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path)
    return root


def weights(path):
    return torch.load(path, weights_only=True)


def same(one, other):
    """Two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def result_of(folder):
    return json.loads((Path(folder) / "result.json").read_text())


def log(folder, name="log.csv"):
    """The rows of a csv file of a run, without what a clock decides."""
    with open(Path(folder) / name, newline="") as file:
        return [{key: value for key, value in row.items() if key not in ("s", "img/s")}
                for row in csv.DictReader(file)]


def same_run(one, other):
    """Two folders hold the same networks, logs and results, but for what a clock decides."""
    names = {path.name for path in Path(one).glob("*.pt")}
    timed = {"seconds", "rows", "command", "commit"}
    ours, theirs = ({key: value for key, value in result_of(folder).items() if key not in timed}
                    for folder in (one, other))
    for result, part in itertools.product((ours, theirs), ("table", "searches")):
        for row in result.get(part, ()):
            for clock in ("s", "img/s", "seconds"):
                row.pop(clock, None)
    return (names == {path.name for path in Path(other).glob("*.pt")} and len(names) > 0
            and all(same(weights(Path(one) / name), weights(Path(other) / name)) for name in names)
            and log(one) == log(other) and ours == theirs)


def table(printed):
    """{run: {column: text}} of the last table that a script printed; "note" is what ends a row."""
    title = [line for line in printed.splitlines() if re.search(r"; seeds: \d+$", line)][-1]
    head, *rows = printed.split(title)[1].strip("\n").splitlines()
    head, *rows = (re.split(r" {2,}", row.strip()) for row in (head, *rows))
    return {row[0]: dict(zip([*head[1:-1], "note"], row[1:])) for row in rows}


def tiny_cifar(folder, monkeypatch, name="cifar100"):
    """Write its files, 100 (10) images in each, one of each class, and publish their md5 sums.

    Returns their contents, [(rows (N,3072) uint8, labels)], the test file last.
    """
    from torchvision import datasets
    kind, classes, written = getattr(datasets, name.upper()), int(name[5:]), []

    def write(file, value):
        raw = pickle.dumps(value, protocol=2)
        tree(folder / kind.base_folder, {file: raw})
        return hashlib.md5(raw).hexdigest()

    for part in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(kind, part):
            rows = pixels(classes, 3072, seed=len(written))
            labels = np.random.default_rng(len(written)).permutation(classes).tolist()
            key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
            sums.append([file, write(file, {"data": rows, key: labels, "coarse_labels": [0]})])
            written.append((rows, labels))
        monkeypatch.setattr(kind, part, sums)
    names = {kind.meta["key"]: [f"class {label}" for label in range(classes)]}
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], names)})
    return written
