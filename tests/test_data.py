"""Block 2 of common.py: augmentation against torchvision, splits, drawn shapes, files on disk."""

import gzip
import math
import os
import pickle
import re
import shutil
import struct
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

    for module in (datasets.cifar, datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", unreachable)


def load(name, folder, **flags):
    return shapes_data(dataset=name, data=folder, batch_size=1, **flags)


def identities(split):
    return [image.numpy().tobytes() for image in split.images]


def sizes(split):
    return Counter(split.labels.tolist())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_split(images):
    """A Split of uint8 images (N,3,H,W), each labelled by its own index."""
    statistics = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return common.Split(torch.as_tensor(images), torch.arange(len(images)), *statistics)


def torchvision(image, top=4, left=4, flip=False):
    """One image (3,H,W) uint8 through torchvision's pad, crop, flip and normalisation, as PIL."""
    padded = functional.pad(Image.fromarray(image.transpose(1, 2, 0).copy()), 4)
    crop = functional.crop(padded, top, left, *image.shape[1:])
    pixels = functional.to_tensor(functional.hflip(crop) if flip else crop)
    return functional.normalize(pixels, MEAN, STD)


# ------------------------------------------------------------------------- augmentation, batches
def test_batches_equal_torchvisions_pipeline_for_every_draw(monkeypatch):
    """Each image's draw repeated with PIL images: difference 0.0; all draws are equally likely.

    81 offsets x 2 mirrorings, chi-square within 4 standard deviations. Plain ones keep the order.
    """
    images, crop, draws = pixels(4860, 3, 10, 13), common.crop_and_flip, []  # not square
    plain = list(as_split(images[:10]).batches(4))
    assert [labels.tolist() for _, labels in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for ours, image in zip(torch.cat([batch for batch, _ in plain]), images):
        assert (ours - torchvision(image)).abs().max() == 0.0

    def crop_and_flip(chosen, *draw):
        draws.append(draw)
        return crop(chosen, *draw)

    monkeypatch.setattr(common, "crop_and_flip", crop_and_flip)
    for batch, labels in as_split(images).augmented(500, seeded()):
        for ours, label, *draw in zip(batch, labels, *(d.tolist() for d in draws[-1]), strict=True):
            assert (ours - torchvision(images[label], *draw)).abs().max() == 0.0, draw
    top, left, flip = map(torch.cat, zip(*draws))
    for drawn, cells in ((top, 9), (left, 9), (flip, 2), ((top * 9 + left) * 2 + flip, 162)):
        observed, mean = torch.bincount(drawn.long(), minlength=cells), len(images) / cells
        assert len(observed) == cells and observed.min() > 0
        spread = ((observed - mean) ** 2 / mean).sum() - (cells - 1)
        assert spread < 4 * math.sqrt(2 * (cells - 1))


def equal(one, two):
    """Two lists of (images, labels) are equal bit for bit."""
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a, b) for batch, other in pairs for a, b in zip(batch, other))


def test_batches_depend_on_the_generator_alone():
    split, runs = as_split(pixels(20, 3, 12, 12)), []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))
        generator = seeded(seed)
        runs.append([batch for _ in range(2) for batch in split.augmented(6, generator)])
    one, two, other = runs
    assert equal(one, two)
    assert not equal(one[:1], other[:1])
    assert not torch.equal(one[0][1], one[4][1])  # the second epoch has an order of its own


@pytest.mark.parametrize(("count", "batch", "expected"), [
    (10, 5, [5, 5]), (11, 4, [4, 4, 3]), (9, 4, [4, 5]), (5, 4, [5]), (3, 4, [3]), (1, 4, [1])])
def test_every_image_once_and_no_left_over_single(count, batch, expected):
    """The last batch may be small; one image alone (bad for batch norm) joins the batch before."""
    epoch = [labels for _, labels in as_split(pixels(count, 3, 4, 4)).augmented(batch, seeded())]
    assert [len(labels) for labels in epoch] == expected
    assert sorted(torch.cat(epoch).tolist()) == list(range(count))


# --------------------------------------------------------------------------------- choosing images
@pytest.mark.parametrize(("fraction", "expected"), [
    (0.1, [1, 1, 1, 4]), (0.25, [1, 1, 3, 10]), (0.9, [1, 3, 11, 36]), (1.0, [1, 3, 12, 40])])
def test_stratified(fraction, expected):
    labels = torch.tensor([0] * 1 + [1] * 3 + [2] * 12 + [3] * 40)  # four class sizes
    labels = labels[torch.randperm(56, generator=seeded())]
    chosen = common.stratified(labels, fraction, seeded(1))
    assert torch.bincount(labels[chosen]).tolist() == expected
    assert (chosen.diff() > 0).all()
    assert torch.equal(chosen, common.stratified(labels, fraction, seeded(1)))
    assert fraction == 1 or not torch.equal(chosen, common.stratified(labels, fraction, seeded(2)))


@pytest.fixture
def drawn(monkeypatch):
    """drawn(validation, ...): drawn images as if they had been read from the files of a set."""
    def call(validation=0.0, count=260, **flags):
        parts = [common.make_shapes(size, 28, seed)[:2] for seed, size in enumerate((count, 100))]
        monkeypatch.setattr(common, "_read_fashionmnist", lambda folder: (*parts, 20))
        return shapes_data(validation, dataset="fashionmnist", **flags)
    return call


def test_train_fraction_and_validation_take_their_share_of_every_class(drawn, capsys):
    full, part = (drawn(train_fraction=share) for share in (1.0, 0.2))
    data, again, other = (drawn(0.2, seed=seed) for seed in (1, 1, 2))
    fifth = {label: max(1, round(0.2 * count)) for label, count in sizes(full.train).items()}
    assert sizes(part.train) == sizes(data.validation) == fifth
    assert len(full.validation) == 0 and full.unseen is None
    assert set(identities(part.train)) < set(identities(full.train))
    assert torch.equal(part.test.images, full.test.images)
    for each in (data, other):
        train, validation = set(identities(each.train)), set(identities(each.validation))
        assert not train & validation and train | validation == set(identities(full.train))
    assert torch.equal(data.validation.images, again.validation.images)
    assert set(identities(data.validation)) != set(identities(other.validation))
    lines, count = capsys.readouterr().out.splitlines(), sum(fifth.values())
    assert lines[0] == ("fashionmnist: 260 training, 100 test images of 28x28, 20 classes; seed 0, "
                        "cpu")
    assert f"fashionmnist: {260 - count} training, {count} held-out, 100 test images" in lines[2]
    full, data = (drawn(share, 11_000) for share in (0.0, 0.95))  # at most 10,000 are held out
    expected = {label: round(count * 10 / 11) for label, count in sizes(full.train).items()}
    assert sizes(data.validation) == expected


def test_held_out_shapes_are_drawn_besides():
    full, data = shapes_data(), shapes_data(0.1, seed=1)
    other = shapes_data(0.1, train_fraction=0.5)
    assert torch.equal(data.train.images, full.train.images)
    assert torch.equal(data.validation.images, common.make_shapes(26, 16, 2)[0])
    assert torch.equal(other.validation.images, data.validation.images)
    assert not {*identities(data.validation)} & {*identities(full.train), *identities(full.test)}


def test_open_set_keeps_the_last_classes_apart_and_leaves_two():
    full, data = (shapes_data(0.1, open_set=kept) for kept in (0, 4))
    assert data.classes == 16
    for part in (data.train, data.test):
        assert set(part.labels.tolist()) == set(range(16))
    assert 0 < len(data.validation) < 26 and data.validation.labels.max() < 16
    assert set(data.unseen.labels.tolist()) == {16, 17, 18, 19}
    assert sorted(identities(data.unseen) + identities(data.test)) == sorted(identities(full.test))
    for kept in (1, 19, 20, 25):
        with pytest.raises(common.InputError, match=f"--open-set {kept}: keep out 2 .* of the 20"):
            shapes_data(open_set=kept)


# -------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize(("count", "side"), [(1, 8), (3, 17), (40, 64)])
def test_shapes_of_any_count_and_size(count, side):
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(drawn))  # only its own seed counts
        drawn.append(common.make_shapes(count, side, seed=seed))
    images, labels, masks = drawn[0]
    assert images.shape == (count, 3, side, side) and images.dtype == torch.uint8
    assert labels.shape == (count,) and labels.dtype == torch.int64
    assert masks.shape == (count, side, side) and masks.dtype == torch.bool
    assert equal(drawn[:1], drawn[1:2]) and not torch.equal(images, drawn[2][0])


def test_shapes_have_the_areas_and_fills_of_their_names():
    """Each outline's mean mask area is the textbook's; a hollow mask has it too: hole included."""
    images, labels, masks = common.make_shapes(6000, 20, seed=3)
    assert set(labels.tolist()) == set(range(20))
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
    for outline, (name, area) in enumerate(areas.items()):
        filled, hollow = labels == 2 * outline, labels == 2 * outline + 1
        for one in (filled, hollow):
            found = masks[one].float().sum((1, 2)).mean().item()
            assert found == pytest.approx(area * unit, rel=0.06), name
        # the hole is the outline at 0.55 of its size, in the background's colour
        ratio = contrast[hollow].mean() / contrast[filled].mean()
        assert ratio.item() == pytest.approx(1 - 0.55**2, abs=0.1), name


# ----------------------------------------------------------------- the public sets' own formats
@pytest.mark.parametrize("state", ["packed", "unpacked", "inner folder", "to download"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name, state, monkeypatch):
    """A row of 3072 bytes is the red, then the green, then the blue plane, each row by row.

    What lies there is read without a download: `no_network`.
    """
    *train, test = tiny_cifar(tmp_path, monkeypatch, name)
    kind = getattr(datasets, name.upper())
    archive, folder = tmp_path / kind.filename, tmp_path / "new"
    if state == "to download":
        monkeypatch.setattr(datasets.cifar, "download_and_extract_archive",
                            lambda url, root, **_: shutil.unpack_archive(archive, root))
    elif state == "packed":
        folder = tmp_path
    else:
        shutil.unpack_archive(archive, folder)
        folder = folder / kind.base_folder if state == "inner folder" else folder
    data = load(name, folder)
    for split, files in ((data.train, train), (data.test, [test])):
        rows, labels = np.concatenate([f[0] for f in files]), [x for f in files for x in f[1]]
        planes = np.stack([rows[:, :1024], rows[:, 1024:2048], rows[:, 2048:]], axis=1)
        assert np.array_equal(split.images.numpy(), planes.reshape(-1, 3, 32, 32))
        assert split.labels.tolist() == labels and split.labels.dtype == torch.int64
    assert (data.classes, data.image_size) == (int(name[5:]), 32)
    assert name == "cifar10" or data.mean + data.std == pytest.approx(MEAN + STD)
    with pytest.raises(common.InputError, match=f"--image-size cannot change {name}"):
        load(name, folder, image_size=16)


def write_fashion(folder, part, images, labels):
    """Gzipped idx files: magic number and sizes, big-endian, then the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, head, content in (
            ("images-idx3", struct.pack(">IIII", 2051, len(images), 28, 28), images.tobytes()),
            ("labels-idx1", struct.pack(">II", 2049, len(labels)), bytes(labels))):
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + content, 1))


@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_fashionmnist(tmp_path, inner):
    for part, count in (("train", 30), ("t10k", 20)):
        write_fashion(tmp_path / inner, part, pixels(count, 28, 28), [i % 10 for i in range(count)])
    data = load("fashionmnist", tmp_path)
    for split, count in ((data.train, 30), (data.test, 20)):
        assert split.labels.tolist() == [i % 10 for i in range(count)]
        expected = np.stack([pixels(count, 28, 28)] * 3, axis=1)
        assert np.array_equal(split.images.numpy(), expected)
    assert (data.classes, data.image_size) == (10, 28)
    with pytest.raises(common.InputError, match="--image-size cannot change fashionmnist"):
        load("fashionmnist", tmp_path, image_size=16)


# --------------------------------------------------------------------------- folders of pictures
def write_pictures(folder, *pictures, ending="png"):
    """Arrays (H,W) or (H,W,3) as 0.png, 1.png, ... in `folder`."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.{ending}")


@pytest.mark.parametrize(("ending", "shape", "scale", "size", "error"), [
    ("png", (16, 16, 3), 1, 16, 0), ("png", (16, 16), 1, 16, 0), ("pgm", (16, 16), 1, 16, 0),
    ("png", (16, 16), 257, 16, 0), ("JPEG", (), 1, 16, 3),  # 257: 16-bit grey
    ("png", (24, 40), 1, None, 0), ("png", (24, 40), 1, 10, 0), ("png", (24, 40), 1, 48, 0)])
def test_folder_with_train_and_test(tmp_path, ending, shape, scale, size, error):
    """Classes in alphabetical order, pixels as written; a one-coloured JPEG within 3 levels.

    Another size than the picture's is bilinear interpolation, 32x32 unless told.
    """
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
    loaded = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(loaded))  # the global state must not matter
        loaded.append(load("folder", tmp_path, image_size=8, seed=seed))
        train, test = loaded[-1].train, loaded[-1].test
        assert sizes(train) == dict.fromkeys(range(4), 8) and sizes(test)[3] == 2
        assert len({*identities(train), *identities(test)}) == 40
    assert torch.equal(loaded[0].test.images, loaded[1].test.images)
    assert set(identities(loaded[0].test)) != set(identities(loaded[2].test))
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
        assert split.labels.tolist() == labels and split.images.shape[1:] == (3, 64, 64)
        first = pixels(2, 64, 64, 3, seed=seed)[labels[0]]
        assert np.array_equal(split.images[0].permute(1, 2, 0), first)


def test_imagenet_is_read_on_demand_and_no_batch_depends_on_the_workers(tmp_path, monkeypatch):
    pictures = pixels(2, 40, 50, 3)
    for part, count in (("train", 5), ("val", 2)):
        for name, picture in zip("ab", pictures, strict=True):
            write_pictures(tmp_path / part / name, *[picture] * count)
    data, epochs = load("imagenet", tmp_path, image_size=32), []
    for workers, seed in ((1, 0), (2, 0), (1, 1)):
        monkeypatch.setattr(common.os, "cpu_count", lambda workers=workers: workers)
        torch.manual_seed(len(epochs))
        epochs.append(list(data.train.augmented(4, seeded(seed))))
    one, two, other = epochs
    assert [tuple(images.shape) for images, _ in one] == [(4, 3, 32, 32)] * 2 + [(2, 3, 32, 32)]
    assert sorted(torch.cat([labels for _, labels in one]).tolist()) == [0] * 5 + [1] * 5
    assert equal(one, two)
    assert not equal(one, other)
    crops = {crop.numpy().tobytes() for images, _ in one for crop in images}
    assert len(crops) == 10  # every image draws a crop of its own
    # evaluation: shorter side to 32 * 256 / 224 = 36, centre crop; two levels for PIL's rounding
    images, labels = next(iter(data.test.batches()))
    assert labels.tolist() == [0, 0, 1, 1]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for image, picture in zip(images[::2], pictures, strict=True):
        theirs = functional.center_crop(functional.resize(Image.fromarray(picture), 36), 32)
        theirs = functional.normalize(functional.to_tensor(theirs), mean, std)
        assert (image - theirs).abs().max() < 2 / 255 / 0.22


# ------------------------------------------------------------------------------------- bad input
def write_healthy(folder, name, patch):
    """A tiny data set that loads; `tree` is DIR/CLASS/*, `parts` is DIR/train and DIR/test."""
    for part in {"tree": [""], "parts": ["train", "test"]}.get(name, []):
        for label in ("ant", "bee"):
            write_pictures(folder / part / label, *pixels(5, 8, 8))
    for part in ("train", "t10k") if name == "fashion" else ():
        write_fashion(folder, part, pixels(10, 28, 28), range(10))
    if "packed" in name:
        tiny_cifar(folder, patch, "cifar10")
    if name == "unpacked":
        shutil.unpack_archive(folder / ARCHIVE, folder)


def plant_a_program(path):
    """A pickle that makes the folder `made` when it is read, shown here once."""
    made = path.parents[1] / "made"
    path.write_bytes(pickle.dumps(type("P", (), {"__reduce__": lambda _: (os.mkdir, (made,))})()))
    pickle.loads(path.read_bytes())
    made.rmdir()


DAMAGE = {
    "remove": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "rename": lambda path: path.rename(f"{path}.txt"),
    "halve": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "lengthen": lambda path: path.write_bytes(path.read_bytes() + bytes(1)),
    "make text": lambda path: path.write_text("<html>not found</html>"),
    "make a program": plant_a_program,
    "drop an image": lambda path: write_fashion(path, "train", pixels(9, 28, 28), range(10)),
}
ARCHIVE, BATCH = "cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_3"
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
UNREADABLE = "DIR/bee/3.png cannot be read as an image"
INCOMPLETE = "cifar10 in DIR are damaged or incomplete ("


@pytest.mark.parametrize(("healthy", "damage", "path", "name", "message"), [
    ("tree", "remove", "", "folder", "DIR: no such folder"),
    ("tree", "remove", "", "imagenet", "DIR: no such folder"),
    ("tree", "remove", "*", "folder", "DIR needs at least 2 class folders, it has 0"),
    ("tree", "rename", "bee/*", "folder", "class DIR/bee has no image"),
    ("tree", "remove", "ant/[1-4].png", "folder", "class 0 has no image left to test on"),
    ("tree", "halve", "bee/3.png", "folder", UNREADABLE),
    ("tree", "make text", "bee/3.png", "folder", UNREADABLE),
    ("parts", "rename", "test/bee", "folder", "class bee is not in both train/ and test/"),
    ("parts", "remove", "test", "tinyimagenet", "neither test/ nor val/"),
    ("unpacked", "halve", BATCH, "cifar10", INCOMPLETE),
    ("unpacked", "make text", BATCH, "cifar10", INCOMPLETE),
    ("unpacked", "make a program", BATCH, "cifar10", INCOMPLETE),
    ("unpacked", "make a program", "*/test_batch", "cifar10", INCOMPLETE),
    ("unpacked", "make a program", "*/batches.meta", "cifar10", INCOMPLETE),
    ("unpacked", "remove", BATCH, "cifar10", f"cifar-10-batches-py there and get {ARCHIVE} again"),
    ("packed", "halve", ARCHIVE, "cifar10", f"{INCOMPLETE}the md5 of {ARCHIVE}"),
    ("packed", "lengthen", ARCHIVE, "cifar10", f"{INCOMPLETE}the md5 of {ARCHIVE}"),
    ("packed", "remove", ARCHIVE, "cifar10", f"not known); put {ARCHIVE} into DIR, or name its"),
    ("fashion", "halve", IMAGES, "fashionmnist", f"{IMAGES} or {LABELS} in DIR is damaged"),
    ("fashion", "make text", LABELS, "fashionmnist", f"{LABELS} in DIR is damaged"),
    ("fashion", "drop an image", "", "fashionmnist", "images and labels do not belong together")])
def test_what_the_user_can_mend_is_an_input_error(tmp_path, monkeypatch, healthy, damage, path,
                                                  name, message):
    """The same set loads, undamaged."""
    folder, undamaged = tmp_path / "data", tmp_path / "undamaged"
    write_healthy(folder, healthy, monkeypatch)
    shutil.copytree(folder, undamaged)
    assert len(load(name, undamaged).train) > 0
    for damaged in list(folder.glob(path)) if path else [folder]:
        DAMAGE[damage](damaged)
    with pytest.raises(common.InputError, match=re.escape(message.replace("DIR", str(folder)))):
        load(name, folder)
    assert not (folder / "made").exists()  # no pickle was opened before its md5 was right
