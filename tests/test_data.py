"""Block 2 of common.py, in memory: crops against torchvision, batches, splits, the drawn shapes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import common

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_split(images, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    """A Split of uint8 images (N,3,H,W), each labelled by its own index."""
    statistics = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    return common.Split(torch.as_tensor(images), torch.arange(len(images)), *statistics)


def position_images(count, side=12):
    """Images that know their pixels: channels row + 1, column + 1, noise."""
    images = np.empty((count, 3, side, side), np.uint8)
    images[:, 0] = np.arange(1, side + 1)[:, None]
    images[:, 1] = np.arange(1, side + 1)[None, :]
    images[:, 2] = pixels(count, side, side)
    return images


def read_draws(crops):
    """(top, left, flip) of crops (B,3,12,12) of position images, from their pixels (6,6), (6,5).

    Pixel (6,6) shows row 6 + top - 4 of the image, and column 6 + left - 4, mirrored 5 + left - 4.
    """
    row, here, beside = crops[:, 0, 6, 6] - 1, crops[:, 1, 6, 6] - 1, crops[:, 1, 6, 5] - 1
    flip = here < beside
    return row - 2, here - 2 + flip.long(), flip


def torchvision_crop(image, top, left, flip):
    """One image (3,H,W) uint8 as PIL through torchvision's pad, crop and flip; a PIL image."""
    from torchvision.transforms import functional
    padded = functional.pad(Image.fromarray(image.transpose(1, 2, 0).copy()), 4)
    crop = functional.crop(padded, top, left, *image.shape[1:])
    return functional.hflip(crop) if flip else crop


def torchvision_normalise(image):
    from torchvision import transforms
    return transforms.Normalize(MEAN, STD)(transforms.ToTensor()(image))


# ------------------------------------------------------------------------- augmentation, batches
def test_crop_and_flip_equals_torchvision_for_every_draw():
    draws = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = pixels(len(draws), 3, 10, 13)  # not square: rows and columns cannot be swapped
    top, left, flip = (torch.tensor(column) for column in zip(*draws, strict=True))
    ours = common.crop_and_flip(torch.as_tensor(images), top, left, flip)
    assert ours.dtype == torch.uint8
    for image, crop, draw in zip(images, ours.permute(0, 2, 3, 1).numpy(), draws, strict=True):
        assert np.array_equal(crop, np.asarray(torchvision_crop(image, *draw))), draw


def test_augmented_batches_equal_torchvisions_pipeline_exactly():
    """Read each image's draw back, repeat it with torchvision on PIL images: difference 0.0."""
    images = position_images(150)
    for batch, labels in as_split(images, mean=MEAN, std=STD).augmented(64, seeded()):
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        draws = read_draws(((batch * std + mean) * 255).round().long())
        for ours, label, *draw in zip(batch, labels, *(d.tolist() for d in draws), strict=True):
            theirs = torchvision_normalise(torchvision_crop(images[label], *draw))
            assert (ours - theirs).abs().max() == 0.0


def test_plain_batches_keep_the_order_and_equal_torchvision():
    images = pixels(10, 3, 8, 9)
    found = list(as_split(images, mean=MEAN, std=STD).batches(4))
    assert [len(labels) for _, labels in found] == [4, 4, 2]
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(10))
    for ours, image in zip(torch.cat([batch for batch, _ in found]), images, strict=True):
        assert (ours - torchvision_normalise(image.transpose(1, 2, 0))).abs().max() == 0.0


def test_histogram_of_the_draws():
    """81 offsets x 2 mirrorings, all equally likely: chi-square within 4 standard deviations."""
    count = 20_000

    def even(observed):
        cells = len(observed)
        chi_square = ((observed - count / cells) ** 2 / (count / cells)).sum()
        return chi_square < cells - 1 + 4 * math.sqrt(2 * (cells - 1))

    crops = [batch for batch, _ in as_split(position_images(count)).augmented(2000, seeded())]
    top, left, flip = read_draws((torch.cat(crops) * 255).round().long())
    for offset in (top, left):
        assert sorted(set(offset.tolist())) == list(range(9))
        assert even(torch.bincount(offset))
    assert even(torch.bincount(flip.long()))
    assert even(torch.bincount((top * 9 + left) * 2 + flip, minlength=162))


def test_batches_depend_on_the_generator_alone():
    split = as_split(position_images(20))

    def epochs(seed, disturb):
        generator, found = seeded(seed), []
        for _ in range(2):
            for images, labels in split.augmented(6, generator):
                torch.rand(disturb), np.random.rand(disturb)
                found.append((images, labels))
        return found

    one, two, other = epochs(3, 0), epochs(3, 5), epochs(4, 0)
    for (images, labels), (images_two, labels_two) in zip(one, two, strict=True):
        assert torch.equal(images, images_two) and torch.equal(labels, labels_two)
    assert not torch.equal(one[0][0], other[0][0])
    assert not torch.equal(one[0][1], one[4][1])  # the second epoch has an order of its own


@pytest.mark.parametrize(("count", "batch", "sizes"), [
    (10, 5, [5, 5]), (11, 4, [4, 4, 3]), (9, 4, [4, 5]), (5, 4, [5]), (3, 4, [3]), (1, 4, [1])])
def test_every_image_once_and_no_left_over_single(count, batch, sizes):
    """The last batch may be small; one image alone (bad for batch norm) joins the batch before."""
    epoch = [labels for _, labels in as_split(position_images(count)).augmented(batch, seeded())]
    assert [len(labels) for labels in epoch] == sizes
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
def few_shapes(monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 600)
    monkeypatch.setattr(common, "SHAPES_TEST", 300)


def identities(split):
    return [image.numpy().tobytes() for image in split.images]


def test_train_fraction_keeps_its_share_of_every_class(few_shapes):
    full, part = (common.load_data("shapes", train_fraction=share) for share in (1.0, 0.2))
    sizes, kept = (Counter(data.train.labels.tolist()) for data in (full, part))
    assert kept == {label: max(1, round(0.2 * size)) for label, size in sizes.items()}
    assert set(identities(part.train)) < set(identities(full.train))
    assert torch.equal(part.test.images, full.test.images)


def test_validation_is_held_out_of_training(few_shapes):
    full = common.load_data("shapes")
    data, again, other = (common.load_data("shapes", validation=0.2, seed=s) for s in (1, 1, 2))
    sizes, held = (Counter(split.labels.tolist()) for split in (full.train, data.validation))
    assert held == {label: max(1, round(0.2 * size)) for label, size in sizes.items()}
    assert len(full.validation) == 0 and full.unseen is None
    for each in (data, other):
        train, validation = set(identities(each.train)), set(identities(each.validation))
        assert not train & validation and train | validation == set(identities(full.train))
    assert torch.equal(data.validation.images, again.validation.images)
    assert set(identities(data.validation)) != set(identities(other.validation))


def test_open_set_keeps_the_last_classes_apart(few_shapes):
    full, data = (common.load_data("shapes", validation=0.1, open_set=kept) for kept in (0, 4))
    assert data.classes == 16
    for part in ("train", "validation", "test"):
        assert set(getattr(data, part).labels.tolist()) == set(range(16)), part
    assert set(data.unseen.labels.tolist()) == {16, 17, 18, 19}
    assert sorted(identities(data.unseen) + identities(data.test)) == sorted(identities(full.test))


@pytest.mark.parametrize("kept_out", [1, 19, 20, 25])
def test_open_set_must_leave_two_classes(few_shapes, kept_out):
    with pytest.raises(common.InputError, match=f"--open-set {kept_out}: keep out 2 .* of the 20"):
        common.load_data("shapes", open_set=kept_out)


# -------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize(("count", "side"), [(1, 8), (3, 17), (40, 64)])
def test_shapes_of_any_count_and_size(count, side):
    torch.manual_seed(count)
    images, labels, masks = common.make_shapes(count, side, seed=5)
    assert images.shape == (count, 3, side, side) and images.dtype == torch.uint8
    assert labels.shape == (count,) and labels.dtype == torch.int64
    assert masks.shape == (count, side, side) and masks.dtype == torch.bool
    torch.manual_seed(count + 1)  # only its own seed counts
    again, other = common.make_shapes(count, side, seed=5), common.make_shapes(count, side, seed=6)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, masks), again, strict=True))
    assert not torch.equal(images, other[0])


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
