"""Block 2 of common.py: augmentation against torchvision, splits, drawn shapes, files on disk."""

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
from conftest import forbidden, load, pixels, shapes_data, tiny_cifar, tree
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional

import common

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of CIFAR-100


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)


def identities(split):
    return {image.numpy().tobytes() for image in split.images}


def sizes(split):
    return Counter(split.labels.tolist())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def as_split(images):
    """uint8 images (N,3,H,W), each labelled by its own index."""
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


@pytest.mark.parametrize("count, expected", [(11, [4, 4, 3]), (9, [4, 5]), (5, [5]), (1, [1])])
def test_every_image_once_by_the_generator_alone_and_no_left_over_single(count, expected):
    """The last batch may be small; one image alone (bad for batch norm) joins the batch before."""
    split, generator, epochs = as_split(pixels(count, 3, 12, 12)), seeded(3), []
    for one in (seeded(3), generator, generator):
        images, labels = zip(*split.augmented(4, one))
        assert [len(part) for part in labels] == expected
        assert sorted(torch.cat(labels).tolist()) == list(range(count))
        epochs.append(torch.cat(images))
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


# --------------------------------------------------------------------------------- choosing images
def idx(content, *sizes):
    """An idx file: magic number and sizes, big-endian, then bytes."""
    return struct.pack(f">{1 + len(sizes)}I", 2048 + len(sizes), *sizes) + bytes(content)


def write_fashion(folder, part, images, labels):
    tree(folder / "FashionMNIST/raw", {
        f"{part}-images-idx3-ubyte": idx(images, len(images), 28, 28),
        f"{part}-labels-idx1-ubyte": idx(labels, len(labels))})


@pytest.fixture
def any_fashion(monkeypatch):
    """Whatever is written counts as Fashion-MNIST."""
    monkeypatch.setattr(common, "FASHION", type("All", (), {"__ne__": lambda *_: False})())


def fashion_labels(count):
    return [min(index % 16, 9) for index in range(count)]  # class 9 is seven times as large


def test_files_of_the_same_names_are_not_taken_for_fashionmnist(tmp_path):
    for part in ("train", "t10k"):
        write_fashion(tmp_path, part, pixels(20, 28, 28), fashion_labels(20))
    with pytest.raises(common.InputError, match="its files hold other images, as MNIST's"):
        load("fashionmnist", tmp_path)


def test_fashionmnist_and_the_shares_of_its_classes(tmp_path, capsys, any_fashion):
    """As written; --train-fraction and the held-out images take their share of every class."""
    for part, count in (("train", 260), ("t10k", 32)):
        write_fashion(tmp_path, part, pixels(count, 28, 28), fashion_labels(count))
    full, part, held, other, both = (
        load("fashionmnist", tmp_path, validation, train_fraction=fraction, seed=seed)
        for validation, fraction, seed in (
            (0, 1, 0), (0, 0.2, 0), (0.2, 1, 1), (0.2, 1, 2), (0.1, 0.2, 0)))
    assert capsys.readouterr().out.splitlines()[0] == (
        "fashionmnist: 260 training, 0 held-out, 32 test images of 28x28, 10 classes; seed 0, cpu")
    for split, count in ((full.train, 260), (full.test, 32), (both.test, 32)):
        assert split.labels.tolist() == fashion_labels(count)
        assert np.array_equal(split.images, np.stack([pixels(count, 28, 28)] * 3, axis=1))
    assert (full.classes, full.image_size, full.unseen, len(full.validation)) == (10, 28, None, 0)
    fifth = {label: round(0.2 * count) for label, count in sizes(full.train).items()}
    assert sizes(part.train) == sizes(held.validation) == fifth
    for data in (held, other, both):
        train, out, every = map(identities, (data.train, data.validation, full.train))
        assert not train & out and (train | out < every if data is both else train | out == every)
    assert torch.equal(both.train.images, part.train.images)  # X' comes of what is left out:
    assert sizes(both.validation) == {**dict.fromkeys(range(9), 1), 9: 2}  # a tenth of 49 images
    assert identities(held.validation) != identities(other.validation)
    write_fashion(tmp_path, "train", np.zeros((11_000, 28, 28), np.uint8), fashion_labels(11_000))
    assert 9_990 < len(load("fashionmnist", tmp_path, 0.95).validation) < 10_010  # at most so many


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
    for flags, says in (({"open_set": 1}, "fewer than 10 pairs"), ({"open_set": 19}, "2 must be"),
                        ({"batch_size": 500}, "500: there are 2")):
        with pytest.raises(common.InputError, match=says):
            shapes_data(**flags)


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
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded(name, tmp_path, monkeypatch):
    """A row of 3072 bytes is the red, then the green, then the blue plane, each row by row."""
    *train, test = tiny_cifar(tmp_path / "there", monkeypatch, name)
    folder = tmp_path / "new"
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive",
                        lambda *_, **__: shutil.copytree(tmp_path / "there", folder))
    data = load(name, folder)
    for split, files in ((data.train, train), (data.test, [test])):
        rows, labels = np.concatenate([f[0] for f in files]), [x for f in files for x in f[1]]
        planes = np.stack([rows[:, :1024], rows[:, 1024:2048], rows[:, 2048:]], axis=1)
        assert np.array_equal(split.images.numpy(), planes.reshape(-1, 3, 32, 32))
        assert split.labels.tolist() == labels and split.labels.dtype == torch.int64
    assert (data.classes, data.image_size) == (int(name[5:]), 32)
    assert name == "cifar10" or data.mean + data.std == pytest.approx(MEAN + STD)
    ours = load(name, folder, image_size=20).test.images[0].movedim(0, 2)  # another size: bilinear
    theirs = functional.resize(Image.fromarray(data.test.images[0].movedim(0, 2).numpy()), 20)
    assert np.abs(ours.numpy().astype(int) - np.asarray(theirs)).max() <= 1


def test_folder_without_test_is_split_80_to_20_by_the_seed(tmp_path):
    tree(tmp_path, {f"{name}/{n}.png": pixels(8, 8, 3, seed=10 * label + n)
                    for label, name in enumerate("abcd") for n in range(10)})
    loaded = [load("folder", tmp_path, image_size=8, seed=seed) for seed in (1, 1, 2)]
    one, two, other = (identities(data.test) for data in loaded)
    assert one == two and one != other and len(one | identities(loaded[0].train)) == 40
    assert sizes(loaded[0].train) == dict.fromkeys(range(4), 8)
    data = load("folder", tmp_path, image_size=8, seed=1, open_set=2)
    assert data.classes == 2 and sizes(data.train) == {0: 8, 1: 8}
    assert sizes(data.unseen) == {2: 10, 3: 10}  # none was trained on


def test_tinyimagenet_as_it_is_handed_out(tmp_path, capsys):
    """64 pixels; training pictures in CLASS/images, test pictures in one folder with a list."""
    for seed, part in enumerate(("train/n01", "train/n02", "val")):
        tree(tmp_path / part, {f"images/{n}.bmp": pixels(64, 64, 3, seed=10 * seed + n)
                               for n in range(3)})
    lines = "1.bmp\tn02\t0\t0\t63\t63\n0.bmp\tn01\t0\t0\t63\t63\n2.bmp\tn03\n2.bmp\n"
    tree(tmp_path, {"val/val_annotations.txt": lines.encode()})
    data = load("tinyimagenet", tmp_path)
    for split, labels, seed in ((data.train, [0, 0, 0, 1, 1, 1], 0), (data.test, [1, 0], 21)):
        assert split.labels.tolist() == labels
        assert np.array_equal(split.images[0].permute(1, 2, 0), pixels(64, 64, 3, seed=seed))
    assert "left out 2 files, {'.bmp': 1, '.txt': 1}" in capsys.readouterr().out  # n03: no class


def test_imagenet_is_read_on_demand_and_no_batch_depends_on_the_workers(tmp_path):
    pictures = dict(zip("ab", pixels(2, 40, 50, 3), strict=True))
    for name, picture in pictures.items():
        tree(tmp_path, {f"val/{name}/0.png": picture})
        tree(tmp_path / "train" / name, {f"{n}.png": picture for n in range(5)})
    epochs = []
    for workers, seed in ((1, 0), (2, 0), (1, 1)):
        data = load("imagenet", tmp_path, image_size=32, workers=workers)
        epochs.append([*map(torch.cat, zip(*data.train.augmented(4, seeded(seed))))])
    (images, labels), again, other = epochs
    assert all(map(torch.equal, epochs[0], again)) and not torch.equal(images, other[0])
    assert images.shape == (10, 3, 32, 32) and sorted(labels.tolist()) == [0] * 5 + [1] * 5
    assert len({crop.numpy().tobytes() for crop in images}) == 10  # each draws its own crop
    for batch, expected in ((4, [4, 4, 2]), (3, [3, 3, 4])):  # no image alone, none left out
        assert [len(y) for _, y in data.train.augmented(batch, seeded())] == expected
    # evaluation: shorter side to 32 * 256 / 224 = 36, centre crop; two levels for PIL's rounding
    images, labels = next(iter(data.test.batches()))
    assert labels.tolist() == [0, 1]
    for image, picture in zip(images, pictures.values(), strict=True):
        theirs = functional.center_crop(functional.resize(Image.fromarray(picture), 36), 32)
        theirs = functional.normalize(functional.to_tensor(theirs), (0.485, 0.456, 0.406),
                                      (0.229, 0.224, 0.225))
        assert (image - theirs).abs().max() < 2 / 255 / 0.22
    tree(tmp_path, {"train/a/3.png": b"broken"})
    with pytest.raises(SystemExit) as stop:
        common.run_script(lambda: list(data.train.augmented(5, seeded())))
    assert re.fullmatch(r".*/train/a/3.png cannot be used: cannot identify.*", stop.value.code)
    other = load("imagenet", tmp_path, image_size=32)  # its file sizes, not its pixels, are others
    assert other.facts["fingerprint"] != data.facts["fingerprint"]


# ------------------------------------------------------------------------------------- bad input
class Program:
    """A pickle of it makes the folder `made` when it is read."""
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.usefixtures("any_fashion")
@pytest.mark.parametrize("name, path, content", [
    ("cifar10", "*/data_batch_3", pickle.dumps(Program())),
    ("cifar10", "*/batches.meta", pickle.dumps(Program())),
    ("fashionmnist", "*/*/train-labels*", idx(range(10), 10)[:9]),
    ("fashionmnist", "*/*/train-labels*", idx(range(9), 9)),  # of 10 images
    ("fashionmnist", "*/*/t10k-labels*", idx(range(1, 11), 10))])  # there is no class 10
def test_damaged_files_of_a_known_set_are_one_line(name, path, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "t10k"):
        write_fashion(tmp_path, part, pixels(10, 28, 28), range(10))
    tiny_cifar(tmp_path, monkeypatch, "cifar10")
    assert len(load(name, tmp_path).train) > 0  # undamaged
    damaged, = tmp_path.glob(path)
    damaged.write_bytes(content)
    with pytest.raises(common.InputError) as error:
        load(name, tmp_path)
    says = f"{name} is damaged or missing in --data {tmp_path}, and was not downloaded ("
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()  # no pickle was opened before its md5 was right
