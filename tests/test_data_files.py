"""Block 2 of common.py, on disk: tiny files of every data set, and how damage is reported."""

import gzip
import pickle
import re
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import common


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def identities(split):
    return [image.numpy().tobytes() for image in split.images]


# ----------------------------------------------------------------- the public sets' own formats
CIFAR = {  # name: (classes, folder, archive, training files, test file, key of the labels)
    "cifar10": (10, "cifar-10-batches-py", "cifar-10-python.tar.gz",
                [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels"),
    "cifar100": (100, "cifar-100-python", "cifar-100-python.tar.gz",
                 ["train"], "test", b"fine_labels")}


def write_cifar(folder, name, packed):
    """A tiny CIFAR as published, `packed` as the .tar.gz alone. Returns {file: (rows, labels)}."""
    classes, inner, archive, train, test, key = CIFAR[name]
    written = {}
    (folder / inner).mkdir(parents=True)
    for seed, file in enumerate([*train, test]):
        rows = pixels(classes, 3072, seed=seed)
        labels = np.random.default_rng(seed).permutation(classes).tolist()
        batch = {b"data": rows, key: labels, b"coarse_labels": [0] * classes}
        (folder / inner / file).write_bytes(pickle.dumps(batch, protocol=2))
        written[file] = rows, labels
    if packed:
        with tarfile.open(folder / archive, "w:gz") as tar:
            tar.add(folder / inner, inner)
        shutil.rmtree(folder / inner)
    return written


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar(tmp_path, name, packed):
    """A row of 3072 bytes is the red, then the green, then the blue plane, each row by row."""
    written = write_cifar(tmp_path, name, packed)
    data = common.load_data(name, tmp_path)
    *train, test = written.values()
    for split, batches in ((data.train, train), (data.test, [test])):
        rows, labels = np.concatenate([b[0] for b in batches]), [x for b in batches for x in b[1]]
        planes = np.stack([rows[:, :1024], rows[:, 1024:2048], rows[:, 2048:]], axis=1)
        assert np.array_equal(split.images.numpy(), planes.reshape(-1, 3, 32, 32))
        assert split.images[1, 2, 5, 7] == rows[1, 2 * 1024 + 5 * 32 + 7]
        assert split.labels.tolist() == labels and split.labels.dtype == torch.int64
    assert (data.classes, data.image_size) == (CIFAR[name][0], 32)


def write_fashion(folder, part, images, labels):
    """Gzipped idx files: magic number and sizes, big-endian, then the bytes."""
    head = struct.pack(">IIII", 2051, len(images), 28, 28)
    images = gzip.compress(head + images.tobytes(), 1)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(images)
    head = struct.pack(">II", 2049, len(labels))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(labels), 1))


def test_fashionmnist(tmp_path):
    for part, count in (("train", 30), ("t10k", 20)):
        labels = [i % 10 for i in range(count)]
        write_fashion(tmp_path, part, pixels(count, 28, 28, seed=count), labels)
    data = common.load_data("fashionmnist", tmp_path)
    for split, count in ((data.train, 30), (data.test, 20)):
        assert split.labels.tolist() == [i % 10 for i in range(count)]
        for channel in range(3):
            found = split.images[:, channel].numpy()
            assert np.array_equal(found, pixels(count, 28, 28, seed=count))
    assert (data.classes, data.image_size) == (10, 28)


def test_validation_is_at_most_ten_thousand(tmp_path):
    labels = [i % 10 for i in range(11_000)]
    write_fashion(tmp_path, "train", np.zeros((11_000, 28, 28), np.uint8), labels)
    write_fashion(tmp_path, "t10k", np.zeros((10, 28, 28), np.uint8), labels[:10])
    data = common.load_data("fashionmnist", tmp_path, validation=0.95)
    assert torch.bincount(data.validation.labels).tolist() == [1000] * 10
    assert len(data.train) == 1000


# --------------------------------------------------------------------------- folders of pictures
def write_pictures(folder, *pictures, ending="png"):
    """Arrays (H,W) or (H,W,3) as 0.png, 1.png, ... in `folder`."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.{ending}")


@pytest.mark.parametrize(("ending", "colours", "error"), [
    ("png", (16, 16, 3), 0), ("png", (16, 16), 0), ("pgm", (16, 16), 0), ("JPEG", (), 3)])
def test_folder_with_train_and_test(tmp_path, ending, colours, error):
    """Classes in alphabetical order, pixels as written; a one-coloured JPEG within 3 levels."""
    for seed, (part, name) in enumerate((p, n) for p in ("train", "test") for n in ("ant", "bee")):
        one = pixels(*colours, seed=seed) if colours else np.full((16, 16, 3), 40 * seed, np.uint8)
        write_pictures(tmp_path / part / name, one, one, ending=ending)
    data = common.load_data("folder", tmp_path, image_size=16)
    for seed, found in enumerate((*data.train.images[::2], *data.test.images[::2])):
        one = pixels(*colours, seed=seed) if colours else np.full((16, 16, 3), 40 * seed, np.uint8)
        expected = np.dstack([one] * 3) if one.ndim == 2 else one  # grey: three times the same
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= error
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1]
    scaled = data.train.images.numpy().astype(np.float64) / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-5)
    assert data.std == pytest.approx(scaled.std((0, 2, 3), ddof=1), abs=1e-5)


@pytest.mark.parametrize("side", [None, 10, 48])
def test_folder_resizes_both_sides(tmp_path, side):
    picture = np.add.outer(np.arange(24) * 4, np.arange(40) * 3).astype(np.uint8)
    for name in ("a", "b"):
        write_pictures(tmp_path / name, *[picture] * 5)
    data, size = common.load_data("folder", tmp_path, image_size=side), side or 32
    expected = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
    assert data.image_size == size and np.array_equal(data.train.images[0, 1].numpy(), expected)


def test_folder_without_test_is_split_80_to_20_by_the_seed(tmp_path):
    for label, name in enumerate("abcd"):
        write_pictures(tmp_path / name, *pixels(10, 8, 8, 3, seed=label))
    loaded = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(loaded))  # the global state must not matter
        loaded.append(common.load_data("folder", tmp_path, image_size=8, seed=seed))
        train, test = loaded[-1].train, loaded[-1].test
        assert torch.bincount(train.labels).tolist() == [8] * 4
        assert torch.bincount(test.labels).tolist() == [2] * 4
        assert len({*identities(train), *identities(test)}) == 40
    assert torch.equal(loaded[0].test.images, loaded[1].test.images)
    assert set(identities(loaded[0].test)) != set(identities(loaded[2].test))
    data = common.load_data("folder", tmp_path, image_size=8, seed=1, open_set=2)
    assert data.classes == 2 and torch.bincount(data.train.labels).tolist() == [8] * 2
    assert data.unseen.labels.tolist() == [2] * 10 + [3] * 10  # none was trained on


def test_tinyimagenet(tmp_path):
    """64 pixels unless told otherwise; its training pictures lie in CLASS/images."""
    for seed, part in enumerate(("train/n01/images", "train/n02/images", "val/n01", "val/n02")):
        write_pictures(tmp_path / part, *pixels(2, 64, 64, 3, seed=seed), ending="bmp")
    data = common.load_data("tinyimagenet", tmp_path)
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images.shape == (4, 3, 64, 64) and data.image_size == 64
    assert np.array_equal(data.test.images[3].permute(1, 2, 0), pixels(2, 64, 64, 3, seed=3)[1])


def test_imagenet_is_read_on_demand_and_no_batch_depends_on_the_workers(tmp_path, monkeypatch):
    from torchvision.transforms import Normalize, functional
    pictures = pixels(2, 40, 50, 3)
    for part, count in (("train", 5), ("val", 2)):
        for name, picture in zip("ab", pictures, strict=True):
            write_pictures(tmp_path / part / name, *[picture] * count)
    data, epochs = common.load_data("imagenet", tmp_path, image_size=32), []
    for workers, seed in ((1, 0), (2, 0), (1, 1)):
        monkeypatch.setattr(common.os, "cpu_count", lambda workers=workers: workers)
        torch.manual_seed(len(epochs))
        epochs.append(list(data.train.augmented(4, torch.Generator().manual_seed(seed))))
    one, two, other = epochs
    assert [tuple(images.shape) for images, _ in one] == [(4, 3, 32, 32)] * 2 + [(2, 3, 32, 32)]
    assert sorted(torch.cat([labels for _, labels in one]).tolist()) == [0] * 5 + [1] * 5
    for (images, labels), (images_two, labels_two) in zip(one, two, strict=True):
        assert torch.equal(images, images_two) and torch.equal(labels, labels_two)
    assert not torch.equal(one[0][0], other[0][0])
    crops = {crop.numpy().tobytes() for images, _ in one for crop in images}
    assert len(crops) == 10  # every image draws a crop of its own
    # evaluation: shorter side to 32 * 256 / 224 = 36, centre crop; two levels for PIL's rounding
    images, labels = next(iter(data.test.batches()))
    assert labels.tolist() == [0, 0, 1, 1]
    normalise = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for image, picture in zip(images[::2], pictures, strict=True):
        theirs = functional.center_crop(functional.resize(Image.fromarray(picture), 36), 32)
        assert (image - normalise(functional.to_tensor(theirs))).abs().max() < 2 / 255 / 0.22


# ------------------------------------------------------------------------------------- bad input
def write_healthy(folder, name):
    """A tiny data set that loads; `tree` is DIR/CLASS/*, `parts` is DIR/train and DIR/test."""
    if name == "fashionmnist":
        for part in ("train", "t10k"):
            write_fashion(folder, part, pixels(10, 28, 28), range(10))
    elif name.startswith("cifar"):
        write_cifar(folder, "cifar10", packed=name.endswith("packed"))
    else:
        for part in {"tree": ("",), "parts": ("train", "test")}[name]:
            for label in ("ant", "bee"):
                write_pictures(folder / part / label, *pixels(5, 8, 8))


def truncate(file, size):
    assert file.stat().st_size > size
    file.write_bytes(file.read_bytes()[:size])


BATCH, FASHION = "cifar-10-batches-py/data_batch_3", "train-{}-ubyte.gz"
DAMAGE = {  # what is wrong: (the healthy set, the damage, the data set to load, the message)
    "no folder": ("tree", shutil.rmtree, "folder", "DIR: no such folder"),
    "no ImageNet": ("tree", shutil.rmtree, "imagenet", "DIR: no such folder"),
    "empty folder": ("tree", lambda d: [shutil.rmtree(d / x) for x in ("ant", "bee")],
                     "folder", "DIR needs at least 2 class folders, it has 0"),
    "class without image": ("tree", lambda d: [x.rename(f"{x}.txt") for x in (d / "bee").iterdir()],
                            "folder", "class DIR/bee has no image"),
    "one image in a class": ("tree", lambda d: [(d / f"ant/{i}.png").unlink() for i in range(4)],
                             "folder", "class 0 has no image left to test on"),
    "truncated image": ("tree", lambda d: truncate(d / "bee/3.png", 60),
                        "folder", "DIR/bee/3.png cannot be read as an image"),
    "text as image": ("tree", lambda d: (d / "bee/3.png").write_text("no picture"),
                      "folder", "DIR/bee/3.png cannot be read as an image"),
    "other test classes": ("parts", lambda d: (d / "test/bee").rename(d / "test/cat"),
                           "folder", "class bee is not in both train/ and test/"),
    "no test": ("parts", lambda d: shutil.rmtree(d / "test"),
                "tinyimagenet", "neither test/ nor val/"),
    "truncated pickle": ("cifar", lambda d: truncate(d / BATCH, 2000),
                         "cifar10", "DIR are damaged or incomplete"),
    "text as pickle": ("cifar", lambda d: (d / BATCH).write_text("<html>not found</html>"),
                       "cifar10", "DIR are damaged or incomplete"),
    "missing batch": ("cifar", lambda d: (d / BATCH).unlink(), "cifar10", "data_batch_3"),
    "truncated archive": ("cifar packed", lambda d: truncate(d / CIFAR["cifar10"][2], 50_000),
                          "cifar10", "remove DIR/cifar-10-batches-py and get"),
    "truncated gz": ("fashionmnist", lambda d: truncate(d / FASHION.format("images-idx3"), 1000),
                     "fashionmnist", "train-images-idx3-ubyte.gz"),
    "text as gz": ("fashionmnist", lambda d: (d / FASHION.format("labels-idx1")).write_text("no"),
                   "fashionmnist", "train-labels-idx1-ubyte.gz in DIR is damaged"),
    "more images than labels": ("fashionmnist",
                                lambda d: write_fashion(d, "train", pixels(9, 28, 28), range(10)),
                                "fashionmnist", "images and labels do not belong together"),
}


@pytest.mark.parametrize("name", ["folder tree", "folder parts", "cifar10 cifar",
                                  "cifar10 cifar packed", "fashionmnist fashionmnist"])
def test_the_healthy_sets_load(tmp_path, name):
    name, healthy = name.split(" ", 1)
    write_healthy(tmp_path, healthy)
    assert len(common.load_data(name, tmp_path).train) > 0


@pytest.mark.parametrize("what", DAMAGE)
def test_what_the_user_can_mend_is_an_input_error(tmp_path, what):
    healthy, damage, name, message = DAMAGE[what]
    folder = tmp_path / "data"
    folder.mkdir()
    write_healthy(folder, healthy)
    damage(folder)
    with pytest.raises(common.InputError, match=re.escape(message.replace("DIR", str(folder)))):
        common.load_data(name, folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist"])
def test_image_size_is_refused_where_it_is_fixed(tmp_path, name):
    with pytest.raises(common.InputError, match=f"--image-size cannot change {name}"):
        common.load_data(name, tmp_path, image_size=16)


def test_download_without_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    import torchvision

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    with pytest.raises(common.InputError, match="Name or service not known") as caught:
        common.load_data("cifar100", tmp_path)
    assert f"put cifar-100-python.tar.gz into {tmp_path}" in str(caught.value)


def test_download_lands_in_the_folder_and_is_read(tmp_path, monkeypatch):
    import torchvision

    def publisher(folder, download):
        assert download
        write_cifar(folder, "cifar100", packed=True)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", publisher)
    assert len(common.load_data("cifar100", tmp_path).train) == 100
