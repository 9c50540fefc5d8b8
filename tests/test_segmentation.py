"""docs/tst_segmentation.py: what moves must move together; unknown pixels; files; runs."""

import io
import itertools
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, folder_of, result_of, same, stopped, table, tree
from PIL import Image
from test_tst import by_hand, generator, near, plain_augmenter
from torch.nn import functional as F

import common
import tst

sys.path.append(str(ROOT / "docs"))
import tst_segmentation as script  # noqa: E402

U, MOVED = script.NO_LABEL, slice(tst.COLOR, tst.MOVABLE)
LABELS = torch.randint(0, 5, (2, 8, 8), generator=generator())
IMAGES = LABELS[:, None].expand(-1, 3, -1, -1).float()  # all channels are the labels


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(script, "SCENES", (24, 10))


def settings_of(flags=""):
    found = next(common.each_seed(script.parse_args(f"--device cpu {flags}".split())))
    return Namespace(**vars(found), student_term="non_saturating")


def augmenter_of(*operations):
    """With gate 1 for these operations, 0 for others."""
    augmenter = plain_augmenter(script.Augmenter, operations=14)
    augmenter.theta_p.data.fill_(-1e5)
    augmenter.theta_p.data[[tst.OPERATIONS.index(name) for name in operations]] = 1e5
    return augmenter


def test_labels_move_with_their_image():
    """Two shifts: one warp by their sum, 2 + 1 pixels to the left, and unknown outside."""
    augmenter = augmenter_of("TranslateX", "ShearX")
    for name, pixels in (("TranslateX", 2), ("ShearX", 1)):
        augmenter.encoders[tst.OPERATIONS.index(name)].b.data[2] = pixels * 2 / 8
    x, y = augmenter(IMAGES, LABELS, generator())
    wanted = np.full((2, 8, 8), U)
    wanted[:, :, :5] = LABELS[:, :, 3:]
    assert np.array_equal(y, wanted)
    assert x[:, 0].detach() == near(np.where(wanted == U, 0, wanted), 1e-5)
    labels = torch.where(torch.rand(2, 8, 8, generator=generator()) < 0.2, U, LABELS)
    for name in (*tst.OPERATIONS[:tst.COLOR], *tst.OPERATIONS[tst.MOVABLE:]):
        x, y = augmenter_of(name)(IMAGES, labels, generator())
        assert torch.equal(y, labels), name
    assert 0.4 < (x == IMAGES).double().mean() < 1  # Cutout


def test_the_warp_reaches_theta_and_is_eqs_20_and_21():
    """Soft gates of the geometric operations, with noise; the nearest label by hand."""
    augmenter = plain_augmenter(script.Augmenter, operations=14, temperature=5.0)
    augmenter.transform = lambda i, images, *_: images
    for encoder in augmenter.encoders[MOVED]:
        encoder.W.data.normal_(0, 0.1, generator=generator(3))
    x, y = augmenter(IMAGES, LABELS, generator())
    draws, identity = generator(), torch.eye(2, 3)
    gates, A = tst.relaxed_bernoulli(augmenter.theta_p, 5.0, draws), identity
    for i in torch.randperm(14, generator=draws).tolist():
        if tst.COLOR <= i < tst.MOVABLE:
            A_i = augmenter.encoders[i].affine(torch.full((2, 1), 0.5), generator=draws)
            A = A + gates[i] * (A_i - identity)  # (2,2,3)
    centres = (2 * torch.arange(8) + 1) / 8 - 1
    n = torch.stack([*torch.meshgrid(centres, centres, indexing="xy"), torch.ones(8, 8)])
    grid = torch.einsum("brk,kyx->byxr", A, n)
    torch.testing.assert_close(x, F.grid_sample(IMAGES, grid, align_corners=False))
    ix, iy = ((((grid[..., k] + 1) * 8 - 1) / 2).round().long() for k in (0, 1))
    inside = (ix >= 0) & (ix < 8) & (iy >= 0) & (iy < 8)
    picked = LABELS[torch.arange(2)[:, None, None], iy.clamp(0, 7), ix.clamp(0, 7)]
    assert torch.equal(y, torch.where(inside, picked, U)) and 0.2 < inside.double().mean() < 1
    x.square().sum().backward()
    assert augmenter.theta_m.grad[MOVED].all() and augmenter.theta_p.grad[MOVED].all()


def test_unknown_pixels_give_no_loss_and_no_gradient():
    labels = torch.tensor([[[0, U], [2, 1]]])  # (1,2,2)
    t, s = torch.randn(2, 1, 3, 2, 2, generator=generator()).requires_grad_()
    y, z_t, z_s = script.known(labels, t, s)
    assert y.tolist() == [0, 2, 1] and z_t.shape == (3, 3)
    assert torch.equal(z_s[1], s[0, :, 1, 0])
    loss = tst.distillation_loss(z_s, z_t, y)[0] + tst.augmentation_loss(z_t, z_s, y)[0]
    for grad in torch.autograd.grad(loss, (t, s)):
        assert not grad[0, :, 0, 1].any() and grad.abs().sum(1).count_nonzero() == 3


def test_mean_iou_against_a_hand_made_case():
    """Classes 0, 1, 2: intersections 2, 1, 0, unions 4, 2, 1; a fourth never occurs: 1/3 (1/2 +
    1/2 + 0). Counting unknown pixels, or averaging over four classes, gives something else."""
    truth = torch.tensor([[[0, 0, 0], [1, 2, U]]])
    said = F.one_hot(torch.tensor([[[0, 0, 1], [1, 0, 1]]]), 4).movedim(3, 1).float()
    scored = torch.nn.Identity(), Namespace(batches=lambda: [(said, truth)]), settings_of()
    assert script.measure(*scored) == pytest.approx(100 * (1 / 2 + 1 / 2) / 3)
    mean = common.Mean()
    mean.add({}, said, truth)
    assert mean.row()["train"] == common.evaluate(*scored) == pytest.approx(100 * 3 / 5)


def test_scenes_their_batches_and_the_network():
    """A quarter is a shape on background 0; labels follow crops; a classifier at every place."""
    data = script.load_scenes(settings_of("--train-fraction 0.5"))
    assert (data.classes, data.names[:2], data.image_size, len(data.train), len(data.test)) == (
        21, ["background", "solid disc"], 32, 12, 10)
    images, shapes, masks = common.make_shapes(40, 16, 1)
    _, labels = next(data.test.batches())
    for quarter, (top, left) in enumerate(itertools.product((0, 16), (0, 16)), 12):
        here = (..., slice(top, top + 16), slice(left, left + 16))
        assert torch.equal(labels[3][here], torch.where(masks[quarter], shapes[quarter] + 1, 0))
        assert torch.equal(data.test.images[3, :3][here], images[quarter])
    data.train.images[:, :3] = data.train.images[:, 3:]  # the codes
    x, y = next(data.train.augmented(12, generator()))
    x = ((x * data.train.std + data.train.mean)[:, 1] * 255).round().long()
    assert torch.equal(x, torch.where(y == U, 0, y + 1)) and (y == U).any()  # the padding
    network, plain = data.build("resnet8", 3).eval(), common.build_model("resnet8", 21, 32, 3)
    assert same(network.state_dict(), plain.state_dict())  # one file for both
    maps = network.forward_features(x := torch.randn(2, 3, 32, 32, generator=generator()))
    low = torch.stack([network.head(maps[:, :, i, j]) for i in range(8) for j in range(8)], 2)
    wanted = F.interpolate(low.view(2, 21, 8, 8), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(network(x), wanted)


def test_stage_two_clips_the_gradient_of_theta_alone_and_keeps_it_in_bounds(monkeypatch):
    """A steep loss at 20, without what Stage I left behind."""
    data, loss = script.load_scenes(settings_of()), tst.augmentation_loss
    monkeypatch.setattr(tst, "augmentation_loss", lambda *args: (
        1e5 * loss(*args)[0], *loss(*args)[1:]))
    networks = [common.frozen(data.build(name)) for name in ("resnet14", "resnet8")]
    augmenter = plain_augmenter(script.Augmenter, operations=14, temperature=5.0)
    augmenter.theta_m.data = torch.tensor([-30.0] + [30.0] * 10)
    augmenter.theta_p.data[11] = 30
    augmenter.encoders[0].f.grad = torch.full((10,), 1e6)
    thetas = [augmenter.theta_m, augmenter.theta_p]
    script.search_step(augmenter, *networks, torch.optim.SGD(thetas, 1.0),
                       *next(data.train.augmented(8, generator())), generator(), settings_of())
    assert torch.cat([theta.grad for theta in thetas]).norm().item() == near(20, 0.02)
    assert augmenter.theta_m.tolist() == [-10] + [10] * 10
    assert augmenter.theta_p.abs().max() == 10 and augmenter.theta_p.count_nonzero() > 1


def test_voc_and_cityscapes(tmp_path):
    """Trees as handed out: VOC's 255 and Cityscapes' void are unknown."""
    codes, voc = np.kron([[0, 15], [20, 255]], np.ones((4, 4), int)), "VOCdevkit/VOC2012"
    outlines = Image.fromarray(codes.astype(np.uint8))
    outlines.putpalette([*range(256)] * 3)  # VOC's labels are places in a palette
    ids = np.array([[7] * 8 + [26] * 4 + [0] * 4] * 8, np.uint8)  # road, car, unlabelled
    for part, names in (("train", "ab"), ("val", "c")):
        stem = f"{part}/city/x_000_000"
        tree(tmp_path, {
            f"{voc}/ImageSets/Segmentation/{part}.txt": "\n".join(names).encode(),
            **{f"{voc}/JPEGImages/{name}.jpg": np.full((8, 8, 3), 90, np.uint8) for name in names},
            **{f"{voc}/SegmentationClass/{name}.png": outlines for name in names},
            f"leftImg8bit/{stem}_leftImg8bit.png": np.full((8, 16, 3), 9, np.uint8),
            f"gtFine/{stem}_gtFine_labelIds.png": ids})
    flags = f"--data {tmp_path} --image-size 8 --dataset "
    data = script.load_scenes(settings_of(flags + "voc"))
    assert (len(data.train), len(data.test), data.names[15]) == (2, 1, "person")
    assert np.array_equal(next(data.test.batches())[1][0], np.where(codes == 255, U, codes))
    (tmp_path / voc / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(common.InputError, match="voc is damaged or missing in .*a.jpg"):
        script.load_scenes(settings_of(flags + "voc"))
    data = script.load_scenes(settings_of(flags + "cityscapes"))
    assert (data.classes, data.names[0], data.names[13]) == (19, "road", "car")
    assert next(data.test.batches())[1][0, 0].tolist() == [0] * 4 + [13] * 2 + [U] * 2
    with pytest.raises(common.InputError, match="--open-set: a scene has all classes"):
        script.load_scenes(settings_of("--open-set 2"))


def voc(folder, masks, picture=None):
    """A VOC 2012 tree of these masks, {name: image}; the last is the test part."""
    *train, test = masks
    picture = picture or Image.new("RGB", (8, 8))
    return tree(folder / "VOCdevkit/VOC2012", {
        "ImageSets/Segmentation/train.txt": "\n".join(train).encode(),
        "ImageSets/Segmentation/val.txt": test.encode(),
        **{f"JPEGImages/{name}.jpg": picture for name in masks},
        **{f"SegmentationClass/{name}.png": mask for name, mask in masks.items()}})


def of(values, mode="L"):
    """A mask of 8x8 pixels, its columns."""
    return Image.fromarray(np.tile(np.uint8(values), (8, 1))).convert(mode)


COLUMNS = [0, 0, 15, 15, 20, 20, 255, 255]


def test_masks_of_colours_and_the_places_of_voc(tmp_path, capsys):
    """VOC's colours are its numbers; the folder, VOCdevkit or VOC2012 in it; the unknown share."""
    colours = of(COLUMNS)
    palette = np.zeros((256, 3), int)
    palette[script.VOC] = script.COLOURS
    colours.putpalette(palette.flatten().tolist())
    place = voc(tmp_path, {"a": colours.convert("RGB"), "b": of(COLUMNS), "c": of(COLUMNS)})
    assert script.COLOURS[[0, 1, 15, 20, 21]].tolist() == [  # of the development kit
        [0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
    for folder in (tmp_path, place.parent, place):
        data = script.load_scenes(settings_of(f"--data {folder} --image-size 8 --dataset voc"))
        assert data.train.images[0, 3].unique().tolist() == [0, 1, 16, 21]
        assert torch.equal(*data.train.images)
    assert "pixels of 21 classes, 25.0 % unknown" in capsys.readouterr().out


def turned_picture(size=(8, 8)):
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.new("RGB", size).save(file, "jpeg", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("mask, picture, says", [
    (of([0, 255] * 4), None, None), (of([0, 3] * 4, "P"), None, None),
    (of([0, 100] * 4), None, r"a.png has pixels of no class, with the values \[100\]"),
    (of([0, 100] * 4, "RGB"), None, r"a.png has a colour of no class, \[100, 100, 100\]"),
    (of([0, 255] * 4, "1"), None, "a.png has mode 1; a mask"),
    (of([0, 255] * 4, "RGBA"), None, "a.png has mode RGBA"),
    (of([0, 255] * 4).convert("I;16"), None, "a.png has mode I;16"),
    (of([0, 1] * 4), Image.new("RGB", (8, 6)), r"a.png is \(8, 8\), its picture \(8, 6\)"),
    (of([0, 1] * 4), turned_picture(), "is turned by EXIF"),
    (of([255] * 8), None, "no pixel of the training or of the test images has a label")])
def test_masks_that_do_not_fit_are_one_line(mask, picture, says, tmp_path):
    voc(tmp_path, {"a": mask, "b": mask, "c": mask}, picture)
    flags = settings_of(f"--data {tmp_path} --image-size 8 --dataset voc")
    if says is None:
        assert len(script.load_scenes(flags).train) == 2
    else:
        with pytest.raises(common.InputError, match=says) as error:
            script.load_scenes(flags)
        assert "\n" not in str(error.value) and "download" not in str(error.value)


def test_batches_without_a_label_cost_nothing():
    """Of images, and of x~: no term, no gradient, no division by zero."""
    data, how = script.load_scenes(settings_of()), settings_of()
    data.train.images[:, 3] = 0
    assert [*data.train.augmented(6, generator())] == []
    student, teacher = data.build("resnet8x0.5"), common.frozen(data.build("resnet8"))
    images, labels = next(data.test.batches())
    void, still = torch.full_like(labels, U), torch.optim.SGD(student.parameters(), 0.1)
    terms, _ = script.train_step(student, teacher, still, images, labels, (images, void), how)
    assert {*terms} == {"ce", "kl"} and terms["ce"].isfinite()
    augmenter = augmenter_of("TranslateX")
    augmenter.encoders[tst.OPERATIONS.index("TranslateX")].b.data[2] = 9  # all of it out of sight
    before = augmenter.theta_p.clone()
    theta = torch.optim.SGD([augmenter.theta_p], 1.0)
    assert script.search_step(augmenter, teacher, teacher, theta, images, labels, generator(),
                              how) == {}
    assert torch.equal(augmenter.theta_p, before)


def test_a_stopped_run_is_the_algorithm_to_the_bit(run, tmp_path):
    """In the second pass of TST's second search; the picture; the table."""
    flags = "--teacher resnet8 --epochs 2 --batch-size 6 --fit-steps 3 --search-epochs 2 "
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, script, "search_step", 8 + 4 + 2)  # a pass has 4
        run("tst_segmentation", tmp_path, flags)
    rows = table(run("tst_segmentation", tmp_path, flags + "--compare"))
    settings, folder = settings_of(f"{flags} --cache {run.cache}"), folder_of(tmp_path, "TST")
    data, result = script.load_scenes(settings), result_of(folder)
    augmenter = script.Augmenter(tst.fitted_encoders(data, settings)[0], data.mean, data.std,
                                      erased=0.25)
    student = by_hand(folder, data, settings, augmenter, augmenter, script.known)
    teacher, _ = common.network_alone("teacher", data, tst.learning_rates(settings), settings)
    for name, network in (("teacher alone", teacher), ("TST", student)):
        assert rows[name]["test"] == f"{script.measure(network, data.test, settings):.2f}"
    assert [*rows] == ["teacher alone", "student alone", *tst.METHODS]
    assert [row["before_epoch"] for row in result["searches"]] == [1, 1, 2, 2]
    assert result["arguments"].items() >= {"temperature": 1.0, "weight": 1.5}.items()
    picture = np.asarray(Image.open(folder / "augmented.png"))
    assert picture.shape == (8 * 34 + 2, 5 * 34 + 2, 3)
    assert (picture[2:34, 2:34] != picture[2:34, 36:68]).any()


def test_a_changed_line_of_tst_or_common_is_another_run(monkeypatch):
    read, data, sources = common.Path.read_bytes, script.load_scenes(settings_of()), []
    for file in ("", "rco.py", "tst.py", "common.py", "tst_segmentation.py"):
        common.source_of.cache_clear()
        monkeypatch.setattr(common.Path, "read_bytes", lambda path, file=file: (
            read(path) + b"#" * (path.name == file)))
        sources.append(common.settings_of({}, data, script.train)["source"])
    common.source_of.cache_clear()
    assert sources[0] == sources[1] and len({*sources}) == 4
