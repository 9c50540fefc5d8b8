"""Block 2 of common.py: augmentation against torchvision, splits, drawn shapes, files on disk."""

import gzip
import math
import os
import pickle
import re
import shutil
import struct
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import shapes_data, tiny_cifar
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional

import common

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of CIFAR-100


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


def load(name, folder, validation=0.0, **flags):
    return shapes_data(validation, dataset=name, data=folder, batch_size=1, **flags)


def identities(split):
    return {image.numpy().tobytes() for image in split.images}


def sizes(split):
    return Counter(split.labels.tolist())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_split(images):
    """A Split of uint8 images (N,3,H,W), each labelled by its own index."""
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1)
    return common.Split(torch.as_tensor(images), torch.arange(len(images)), mean, std)


def torchvision(image, top=4, left=4, flip=False):
    """One image (3,H,W) uint8 through torchvision's pad, crop, flip and normalisation, as PIL."""
    padded = functional.pad(Image.fromarray(image.transpose(1, 2, 0).copy()), 4)
    crop = functional.crop(padded, top, left, *image.shape[1:])
    pixels = functional.to_tensor(functional.hflip(crop) if flip else crop)
    return functional.normalize(pixels, MEAN, STD)


# ------------------------------------------------------------------------- augmentation, batches
def test_batches_equal_torchvisions_pipeline_for_every_draw(monkeypatch):
    """Difference 0.0 to PIL images; all 81 offsets x 2 mirrorings are equally likely (chi-square
    within 4 standard deviations)."""
    images, crop, draws = pixels(4860, 3, 10, 13), common.crop_and_flip, []  # not square
    (plain, labels), = as_split(images[:10]).batches(10)
    assert labels.tolist() == list(range(10)) and all(
        torch.equal(ours, torchvision(image)) for ours, image in zip(plain, images))

    def crop_and_flip(chosen, *draw):
        draws.append(draw)
        return crop(chosen, *draw)

    monkeypatch.setattr(common, "crop_and_flip", crop_and_flip)
    for batch, labels in as_split(images).augmented(500, seeded()):
        for ours, label, *draw in zip(batch, labels, *(d.tolist() for d in draws[-1]), strict=True):
            assert torch.equal(ours, torchvision(images[label], *draw)), draw
    top, left, flip = map(torch.cat, zip(*draws))
    observed, mean = torch.bincount((top * 9 + left) * 2 + flip, minlength=162), len(images) / 162
    assert len(observed) == 162 and observed.min() > 0
    assert ((observed - mean) ** 2 / mean).sum() - 161 < 4 * math.sqrt(2 * 161)


def equal(one, two):
    """Two lists of (images, labels) are equal bit for bit."""
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a, b) for batch, other in pairs for a, b in zip(batch, other))


@pytest.mark.parametrize(("count", "batch", "expected"), [
    (11, 4, [4, 4, 3]), (9, 4, [4, 5]), (5, 4, [5]), (3, 4, [3]), (1, 4, [1])])
def test_every_image_once_by_the_generator_alone_and_no_left_over_single(count, batch, expected):
    """The last batch may be small; one image alone (bad for batch norm) joins the batch before."""
    split, generator = as_split(pixels(count, 3, 12, 12)), seeded(3)
    epochs = [list(split.augmented(batch, one)) for one in (seeded(3), generator, generator)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == expected
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(count))
    assert equal(epochs[0], epochs[1]) and not equal(epochs[1], epochs[2])


# --------------------------------------------------------------------------------- choosing images
@pytest.mark.parametrize("fraction, expected", [
    (0.1, [1, 1, 1, 4]), (0.25, [1, 1, 3, 10]), (1.0, [1, 3, 12, 40])])
def test_stratified(fraction, expected):
    labels = torch.tensor([0] * 1 + [1] * 3 + [2] * 12 + [3] * 40)  # four class sizes
    labels = labels[torch.randperm(56, generator=seeded())]
    chosen, again, other = (common.stratified(labels, fraction, seeded(s)) for s in (1, 1, 2))
    assert torch.bincount(labels[chosen]).tolist() == expected and (chosen.diff() > 0).all()
    assert torch.equal(chosen, again) and torch.equal(chosen, other) == (fraction == 1)


def write_fashion(folder, part, images, labels):
    """Gzipped idx files: magic number and sizes, big-endian, then the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, head, content in (
            ("images-idx3", struct.pack(">IIII", 2051, len(images), 28, 28), images.tobytes()),
            ("labels-idx1", struct.pack(">II", 2049, len(labels)), bytes(labels))):
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + content, 1))


def fashion_labels(count):
    return [min(index % 16, 9) for index in range(count)]  # class 9 is seven times as large


@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_fashionmnist_and_the_shares_of_its_classes(tmp_path, inner, capsys):
    """As written; --train-fraction and the held-out images take their share of every class."""
    for part, count in (("train", 260), ("t10k", 32)):
        write_fashion(tmp_path / inner, part, pixels(count, 28, 28), fashion_labels(count))
    full, part = (load("fashionmnist", tmp_path, train_fraction=share) for share in (1.0, 0.2))
    assert capsys.readouterr().out.splitlines()[0] == (
        "fashionmnist: 260 training, 32 test images of 28x28, 10 classes (T-shirt/top to Ankle "
        "boot); seed 0, cpu")
    for split, count in ((full.train, 260), (full.test, 32)):
        assert split.labels.tolist() == fashion_labels(count)
        assert np.array_equal(split.images, np.stack([pixels(count, 28, 28)] * 3, axis=1))
    assert (full.classes, full.image_size, full.unseen, len(full.validation)) == (10, 28, None, 0)
    data, again, other = (load("fashionmnist", tmp_path, 0.2, seed=seed) for seed in (1, 1, 2))
    fifth = {label: round(0.2 * count) for label, count in sizes(full.train).items()}
    assert sizes(part.train) == sizes(data.validation) == fifth
    assert identities(part.train) < identities(full.train)
    assert torch.equal(part.test.images, full.test.images)
    shared = load("fashionmnist", tmp_path, 0.1, train_fraction=0.2)  # X' of what is left out
    assert torch.equal(shared.train.images, part.train.images)
    tenth = shared.validation.labels.bincount(minlength=10)
    assert tenth.tolist() == [1] * 9 + [2]  # a tenth of 49 images, of each class at least one
    assert not identities(shared.validation) & identities(part.train)
    assert identities(shared.validation) < identities(full.train)
    for each in (data, other):
        train, held = identities(each.train), identities(each.validation)
        assert not train & held and train | held == identities(full.train)
    assert torch.equal(data.validation.images, again.validation.images)
    assert identities(data.validation) != identities(other.validation)
    many = np.zeros((11_000, 28, 28), np.uint8), fashion_labels(11_000)
    write_fashion(tmp_path / inner, "train", *many)  # at most about 10,000 are held out
    assert 9_990 < len(load("fashionmnist", tmp_path, 0.95).validation) < 10_010
    for path in [*(tmp_path / inner).glob("*.gz")]:  # as torchvision unpacks them
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(load("fashionmnist", tmp_path).train) == 11_000


def test_debians_fashionmnist_is_no_substitute_for_a_mistyped_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DEBIAN", tmp_path)
    for part in ("train", "t10k"):
        write_fashion(tmp_path, part, pixels(20, 28, 28), fashion_labels(20))
    assert len(load("fashionmnist", None).train) == 20
    with pytest.raises(common.InputError, match="or name their folder with --data"):
        load("fashionmnist", tmp_path / "mistyped")


def test_shapes_are_held_out_besides_and_open_set_keeps_the_last_classes_apart():
    full, held = shapes_data(), shapes_data(0.1, seed=1)
    assert torch.equal(held.train.images, full.train.images)  # all scripts train on the same
    for data in (held, shapes_data(0.1, train_fraction=0.5)):
        assert torch.equal(data.validation.images, common.make_shapes(26, 16, 2)[0])
    assert not identities(held.validation) & (identities(full.train) | identities(full.test))
    data = shapes_data(0.1, open_set=4)
    assert data.classes == 16 and set(sizes(data.train)) == set(sizes(data.test)) == set(range(16))
    assert 0 < len(data.validation) < 26 and data.validation.labels.max() < 16
    assert set(sizes(data.unseen)) == {16, 17, 18, 19}
    assert identities(data.unseen) | identities(data.test) == identities(full.test)
    for kept in (1, 19, 25):
        with pytest.raises(common.InputError, match=f"--open-set {kept}: keep out 2 .* of the 20"):
            shapes_data(open_set=kept)
    with pytest.raises(common.InputError, match="--batch-size 500: there are only 260 training im"):
        shapes_data(batch_size=500)


# -------------------------------------------------------------------------------------- shapes
def test_shapes_have_the_areas_and_fills_of_their_names():
    """Each outline's mean mask area is the textbook's; a hollow mask has it too: hole included."""
    images, labels, masks = common.make_shapes(6000, 20, seed=3)
    assert (images.shape, images.dtype) == ((6000, 3, 20, 20), torch.uint8)
    assert (masks.shape, masks.dtype) == ((6000, 20, 20), torch.bool)
    assert set(labels.tolist()) == set(range(20)) and common.make_shapes(1, 8)[0].shape[3] == 8
    wave = math.pi * (0.72**2 + 0.28**2 / 2)  # inside r = 0.72 + 0.28 cos(n t), for any n
    areas = {
        "disc": math.pi * 0.88**2, "ellipse": math.pi * 0.55, "triangle": 3 * math.sqrt(3) / 4,
        "square": 2, "bar": 2 * 1, "pentagon": 2.5 * math.sin(2 * math.pi / 5),
        "cross": 2 * (2 * 0.66) - 0.66**2, "flower": wave, "trefoil": wave,
        "cardioid": math.pi * (0.62**2 + 0.52**2 / 2)}
    # pixels in a unit of area: 10 a side, times scale^2 (0.65..0.95), over the stretch (0.85..1.15)
    unit = 10**2 * (0.95**3 - 0.65**3) / 0.9 * math.log(1.15 / 0.85) / 0.3
    grey = images.float().mean(1)
    contrast = (grey * masks).sum((1, 2)) / masks.sum((1, 2))
    contrast -= (grey * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    assert contrast.min() > 10  # every single mask is brighter than what surrounds it
    mean = [masks[labels == label].float().sum((1, 2)).mean().item() for label in range(20)]
    light = torch.stack([contrast[labels == label].mean() for label in range(20)]).view(10, 2)
    assert mean == pytest.approx(np.repeat([*areas.values()], 2) * unit, rel=0.06)
    # the hole is the outline at 0.55 of its size, in the background's colour
    assert (light[:, 1] / light[:, 0] - (1 - 0.55**2)).abs().max() < 0.1


# ----------------------------------------------------------------------------- files on the disk
@pytest.mark.parametrize("name, state", [
    ("cifar10", "packed"), ("cifar10", "inner folder"), ("cifar100", "unpacked"),
    ("cifar100", "to download")])
def test_cifar(tmp_path, name, state, monkeypatch):
    """A row of 3072 bytes is the red, then the green, then the blue plane, each row by row."""
    *train, test = tiny_cifar(tmp_path, monkeypatch, name)
    kind, folder = getattr(datasets, name.upper()), tmp_path
    if state == "to download":
        folder = tmp_path / "new"
        monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", lambda url, root, **_:
                            shutil.unpack_archive(tmp_path / kind.filename, root))
    elif state != "packed":
        shutil.unpack_archive(tmp_path / kind.filename, tmp_path)
        (tmp_path / kind.filename).unlink()
        folder = tmp_path / kind.base_folder if state == "inner folder" else tmp_path
    data = load(name, folder)
    for split, files in ((data.train, train), (data.test, [test])):
        rows, labels = np.concatenate([f[0] for f in files]), [x for f in files for x in f[1]]
        planes = np.stack([rows[:, :1024], rows[:, 1024:2048], rows[:, 2048:]], axis=1)
        assert np.array_equal(split.images.numpy(), planes.reshape(-1, 3, 32, 32))
        assert split.labels.tolist() == labels and split.labels.dtype == torch.int64
    assert (data.classes, data.image_size) == (int(name[5:]), 32)
    assert name == "cifar10" or data.mean + data.std == pytest.approx(MEAN + STD)


def write_pictures(folder, *pictures, ending="png"):
    """Arrays (H,W) or (H,W,3) as 0.png, 1.png, ... in `folder`."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.{ending}")


@pytest.mark.parametrize(("ending", "shape", "scale", "size", "error"), [
    ("png", (16, 16, 3), 1, 16, 0), ("pgm", (16, 16), 1, 16, 0),
    ("png", (16, 16), 257, 16, 0), ("JPEG", (), 1, 16, 3),  # 257: 16-bit grey
    ("png", (24, 40), 1, None, 0), ("png", (24, 40), 1, 10, 0)])
def test_folder_with_train_and_test(tmp_path, ending, shape, scale, size, error):
    """Classes in alphabetical order; pixels as written, a JPEG within 3 levels; bilinear for
    another size, 32x32 unless told."""
    drawn = []
    for seed, part in enumerate(("train/ant", "train/bee", "test/ant", "test/bee")):
        one = pixels(*shape, seed=seed) if shape else np.full((16, 16, 3), 40 * seed, np.uint8)
        picture = Image.fromarray(one).convert("RGB")  # grey: three times the same
        drawn.append(np.asarray(picture.resize((size or 32,) * 2, Image.Resampling.BILINEAR)))
        one = one if scale == 1 else one.astype(np.uint16) * scale
        write_pictures(tmp_path / part, one, one, ending=ending)
    data = load("folder", tmp_path, image_size=size)
    found = torch.cat([data.train.images[::2], data.test.images[::2]]).permute(0, 2, 3, 1)
    assert np.abs(found.numpy().astype(int) - np.stack(drawn)).max() <= error
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1]
    scaled = data.train.images.numpy().astype(np.float64) / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-5)
    assert data.std == pytest.approx(scaled.std((0, 2, 3), ddof=1), abs=1e-5)


def test_folder_without_test_is_split_80_to_20_by_the_seed(tmp_path):
    for label, name in enumerate("abcd"):
        write_pictures(tmp_path / name, *pixels(10, 8, 8, 3, seed=label))
    loaded = [load("folder", tmp_path, image_size=8, seed=seed) for seed in (1, 1, 2)]
    one, two, other = (identities(data.test) for data in loaded)
    assert one == two and one != other and len(one | identities(loaded[0].train)) == 40
    assert sizes(loaded[0].train) == dict.fromkeys(range(4), 8)
    data = load("folder", tmp_path, image_size=8, seed=1, open_set=2)
    assert data.classes == 2 and sizes(data.train) == {0: 8, 1: 8}
    assert sizes(data.unseen) == {2: 10, 3: 10}  # none was trained on
    for file in [file for name in "cd" for file in (tmp_path / name).glob("[3-9].png")]:
        file.unlink()
    with pytest.raises(common.InputError, match="fewer than 10 pairs"):  # before any training
        load("folder", tmp_path, image_size=8, open_set=2)


def test_tinyimagenet_as_it_is_handed_out(tmp_path):
    """64 pixels; training pictures in CLASS/images, test pictures in one folder with a list."""
    for seed, part in enumerate(("train/n01/images", "train/n02/images", "val/images")):
        write_pictures(tmp_path / part, *pixels(2, 64, 64, 3, seed=seed), ending="bmp")
    lines = ("1.bmp\tn02\t0\t0\t63\t63", "0.bmp\tn01\t0\t0\t63\t63")
    (tmp_path / "val/val_annotations.txt").write_text("\n".join(lines))
    data = load("tinyimagenet", tmp_path)
    for split, labels, seed in ((data.train, [0, 0, 1, 1], 0), (data.test, [1, 0], 2)):
        first = pixels(2, 64, 64, 3, seed=seed)[labels[0]]
        assert split.labels.tolist() == labels
        assert np.array_equal(split.images[0].permute(1, 2, 0), first)


def test_imagenet_is_read_on_demand_and_no_batch_depends_on_the_workers(tmp_path, monkeypatch):
    pictures = pixels(2, 40, 50, 3)
    for name, picture in zip("ab", pictures, strict=True):
        write_pictures(tmp_path / "train" / name, *[picture] * 5)
        write_pictures(tmp_path / "val" / name, picture)
    data, epochs = load("imagenet", tmp_path, image_size=32), []
    for workers, seed in ((1, 0), (2, 0), (1, 1)):
        monkeypatch.setattr(common.os, "cpu_count", lambda workers=workers: workers)
        epochs.append(list(data.train.augmented(4, seeded(seed))))
    assert equal(epochs[0], epochs[1]) and not equal(epochs[0], epochs[2])
    images, labels = (torch.cat(part) for part in zip(*epochs[0]))
    assert [len(part) for _, part in epochs[0]] == [4, 4, 2]
    assert images.shape == (10, 3, 32, 32) and sorted(labels.tolist()) == [0] * 5 + [1] * 5
    assert len({crop.numpy().tobytes() for crop in images}) == 10  # each draws its own crop
    # evaluation: shorter side to 32 * 256 / 224 = 36, centre crop; two levels for PIL's rounding
    images, labels = next(iter(data.test.batches()))
    assert labels.tolist() == [0, 1]
    for image, picture in zip(images, pictures, strict=True):
        theirs = functional.center_crop(functional.resize(Image.fromarray(picture), 36), 32)
        theirs = functional.normalize(functional.to_tensor(theirs), (0.485, 0.456, 0.406),
                                      (0.229, 0.224, 0.225))
        assert (image - theirs).abs().max() < 2 / 255 / 0.22


# ------------------------------------------------------------------------------------- bad input
def write_sets(folder, patch):
    """Tiny data sets that load: `tree` is DIR/CLASS/*, `parts` is DIR/train and DIR/test."""
    for part in ("tree", "parts/train", "parts/test"):
        for label in ("ant", "bee"):
            write_pictures(folder / part / label, *pixels(5, 8, 8))
    for part in ("train", "t10k"):
        write_fashion(folder / "fashion", part, pixels(10, 28, 28), range(10))
    tiny_cifar(folder / "packed", patch, "cifar10")
    shutil.unpack_archive(folder / "packed" / ARCHIVE, folder / "unpacked")


class Program:
    """A pickle of it makes the folder `made` when it is read."""
    def __reduce__(self):
        return os.mkdir, ("made",)


DAMAGE = {
    "remove": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "rename": lambda path: path.rename(f"{path}.txt"),
    "halve": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "make a program": lambda path: path.write_bytes(pickle.dumps(Program())),
    "drop an image": lambda path: write_fashion(path, "train", pixels(9, 28, 28), range(10)),
}
ARCHIVE, BATCH = "cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_3"
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
MISSING = "cifar10 is damaged or missing in DIR and was not downloaded ("


@pytest.mark.parametrize("kind, damage, path, name, message", [
    ("tree", "remove", "", "folder", "DIR: no such folder"),
    ("tree", "remove", "*", "folder", "DIR needs at least 2 class folders, it has 0"),
    ("tree", "rename", "bee/*", "folder", "class DIR/bee has no image"),
    ("tree", "remove", "ant/[1-4].png", "folder", "class ant has no image left to test on"),
    ("tree", "halve", "bee/3.png", "folder", "DIR/bee/3.png cannot be read as an image"),
    ("parts", "rename", "test/bee", "folder", "class bee is not in both train/ and test/"),
    ("parts", "remove", "test", "tinyimagenet", "neither test/ nor val/"),
    ("unpacked", "make a program", BATCH, "cifar10", MISSING),
    ("unpacked", "make a program", "*/batches.meta", "cifar10", MISSING),
    ("unpacked", "remove", BATCH, "cifar10", "what is there of cifar-10-batches-py, or"),
    ("packed", "halve", ARCHIVE, "cifar10", MISSING),
    ("packed", "remove", ARCHIVE, "cifar10", f"not known); put {ARCHIVE} there, remove"),
    ("fashion", "halve", f"{LABELS}.gz", "fashionmnist", f"{IMAGES} or {LABELS} in DIR is damaged"),
    ("fashion", "drop an image", "", "fashionmnist", "images and labels do not belong together")])
def test_what_the_user_can_mend_is_an_input_error(tmp_path, monkeypatch, kind, damage, path, name,
                                                  message):
    write_sets(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / kind
    assert len(load(name, shutil.copytree(folder, tmp_path / "copy")).train) > 0  # undamaged
    for damaged in list(folder.glob(path)) if path else [folder]:
        DAMAGE[damage](damaged)
    with pytest.raises(common.InputError, match=re.escape(message.replace("DIR", str(folder)))):
        load(name, folder)
    assert not (tmp_path / "made").exists()  # no pickle was opened before its md5 was right
