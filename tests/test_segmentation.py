"""tst.py --task segmentation: what moves must move together; unknown pixels; files; runs."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from conftest import log, refused, result_of, same, stopped, table, weights
from PIL import Image
from test_tst import generator, near, plain_augmenter
from torch.nn import functional as F

import common
import tst

U = tst.NO_LABEL


def moving(*operations):
    """An augmenter without noise in which these operations alone act, each with gate 1."""
    augmenter = plain_augmenter(operations=14)
    for name, parameter in augmenter.encoders.named_parameters():
        if name.endswith("W"):  # not by magnitude or noise; b alone
            parameter.data.zero_()
    augmenter.theta_p.data.fill_(-1e4)
    augmenter.theta_p.data[[tst.OPERATIONS.index(name) for name in operations]] = 1e4
    return augmenter


def pair(size=8):
    """Images whose three channels are their labels."""
    labels = torch.randint(0, 5, (2, size, size), generator=generator())
    return labels[:, None].expand(-1, 3, -1, -1).float(), labels


# ----------------------------------------------------------------------------- equations (20), (21)
def test_labels_move_with_their_image_by_the_known_maps():
    """Two shifts are summed as matrices, then one warp: by 2 + 1 pixels to the left; not chained,
    not twice. A quarter turn: out[y,x] = in[x, -1-y]. Unknown outside."""
    images, labels = pair()
    augmenter = moving("TranslateX", "ShearX")
    for name, pixels in (("TranslateX", 2), ("ShearX", 1)):
        augmenter.encoders[tst.OPERATIONS.index(name)].b.data[2] = pixels * 2 / 8
    x, y = augmenter(images, generator(), labels)
    wanted = np.full((2, 8, 8), U)
    wanted[:, :, :5] = labels[:, :, 3:]
    assert np.array_equal(y, wanted)
    assert x[:, 0].detach() == near(np.where(wanted == U, 0, wanted), 1e-5)
    augmenter = moving("Rotate")
    augmenter.encoders[tst.OPERATIONS.index("Rotate")].b.data = torch.tensor([0., 1, 0, -1, 0, 0])
    x, y = augmenter(images, generator(), labels)
    rows, columns = np.indices((8, 8))
    wanted = labels.numpy()[:, 7 - columns, rows]
    assert np.array_equal(y, wanted) and x[:, 2].detach() == near(wanted, 1e-5)
    x.sum().backward()
    assert augmenter.theta_p.grad.isfinite().all()


def test_colour_and_fixed_operations_leave_the_labels():
    images, labels = pair()
    labels[0, 0, :3] = U
    for name in (*tst.OPERATIONS[:tst.COLOR], *tst.OPERATIONS[tst.MOVABLE:]):
        x, y = moving(name)(images, generator(), labels)
        assert torch.equal(y, labels), name
    assert not torch.equal(x, images)  # Cutout
    assert (x[:, 0] == images[:, 0]).double().mean() > 0.4


def test_the_warp_reaches_theta_and_equals_the_sum_of_eq_20():
    """Soft gates of four geometric operations, with noise, against A = I + sum g_i (A_i - I)."""
    augmenter, (images, labels) = plain_augmenter(operations=14), pair()
    for encoder in augmenter.encoders[tst.COLOR:]:
        encoder.W.data.normal_(0, 0.1, generator=generator(3))
    augmenter.temperature = 5.0
    augmenter.theta_p.data[[i for i in range(14) if not tst.COLOR <= i < tst.MOVABLE]] = -1e5
    x, y = augmenter(images, generator(), labels)
    draws = generator()
    gates, A = tst.relaxed_bernoulli(augmenter.theta_p, 5.0, draws), 0
    for i in torch.randperm(14, generator=draws).tolist():
        if tst.COLOR <= i < tst.MOVABLE:
            A_i = augmenter.encoders[i].affine(torch.full((2, 1), 0.5), generator=draws)
            A = A + gates[i] * (A_i - torch.eye(2, 3))
        else:
            augmenter.transform(i, images, torch.tensor(0.5), draws)
    grid = F.affine_grid(torch.eye(2, 3) + A, [2, 3, 8, 8], align_corners=False)
    torch.testing.assert_close(x, F.grid_sample(images, grid, align_corners=False))
    ix, iy = (((grid[..., k] + 1) * 8 - 1) / 2 for k in (0, 1))  # nearest, by hand
    ix, iy = ix.round().long(), iy.round().long()
    inside = (ix >= 0) & (ix < 8) & (iy >= 0) & (iy < 8)
    picked = labels[torch.arange(2)[:, None, None], iy.clamp(0, 7), ix.clamp(0, 7)]
    assert torch.equal(y, torch.where(inside, picked, U)) and 0.2 < inside.double().mean() < 1
    x.square().sum().backward()
    moved = slice(tst.COLOR, tst.MOVABLE)
    assert augmenter.theta_m.grad[moved].all() and augmenter.theta_p.grad[moved].all()


# ------------------------------------------------------------------------------ pixels and networks
def test_unknown_pixels_give_no_loss_and_no_gradient():
    labels = torch.tensor([[[0, U], [2, 1]]])  # (1,2,2)
    t, s = torch.randn(2, 1, 3, 2, 2, generator=generator()).requires_grad_()
    y, z_t, z_s = tst.known(labels, t, s)
    assert y.tolist() == [0, 2, 1] and z_t.shape == (3, 3)
    assert torch.equal(z_s[1], s[0, :, 1, 0])
    s.retain_grad(), t.retain_grad()
    (tst.distillation_loss(z_s, z_t, y) + tst.augmentation_loss(z_t, z_s, y)[0]).backward()
    for z in (t, s):
        assert not z.grad[0, :, 0, 1].any() and z.grad.abs().sum(1).count_nonzero() == 3
    one, two = torch.zeros(4), torch.zeros(4, 3)
    assert tst.known(one, two)[1] is two  # images: nothing is touched


def test_mean_iou_against_a_hand_made_case():
    """Classes 0, 1, 2: intersections 2, 1, 0, unions 4, 2, 1; a fourth never occurs: 1/3 (1/2 +
    1/2 + 0). Counting unknown pixels, or averaging over four classes, gives something else."""
    truth = torch.tensor([[[0, 0, 0], [1, 2, U]]])
    said = F.one_hot(torch.tensor([[[0, 0, 1], [1, 0, 1]]]), 4).movedim(3, 1).float()

    class Fixed(torch.nn.Module):
        def forward(self, _):
            return said

    class Split:
        def batches(self):
            yield torch.zeros(1, 3, 2, 3), truth
    arguments = common.argparse.Namespace(task="segmentation", precision="fp32", device="cpu")
    assert tst.score(Fixed(), Split(), arguments) == pytest.approx(100 * (2 / 4 + 1 / 2 + 0) / 3)
    assert common.evaluate(Fixed(), Split(), arguments) == pytest.approx(100 * 3 / 5)
    mean = common.Mean()
    mean.add({}, said, truth)
    assert mean.row()["train"] == pytest.approx(100 * 3 / 5)


def test_a_lesson_of_pixels():
    """Eq. (17) on both halves, each with the labels that it has left."""
    data = tst.PixelData("shapes", None, None, None, None, list("abc"), 16, (0,) * 3, (1,) * 3)
    teacher, student = common.frozen(data.build("resnet8", 1)), data.build("resnet8x0.5", 2)
    images, x = torch.randn(2, 4, 3, 16, 16, generator=generator())
    labels, y = torch.randint(0, 3, (2, 4, 16, 16), generator=generator())
    labels[0, :5], y[:, 7:] = U, U
    with torch.no_grad():
        t, s = (network(torch.cat([x, images])) for network in (teacher, common.copy.deepcopy(
            student)))
    optimizer, arguments = torch.optim.SGD(student.parameters(), 0.1), arguments_of()
    terms, logits = tst.train_step(student, teacher, optimizer, images, labels, (x, y), arguments)
    assert torch.equal(logits, s[4:])
    here, halves = torch.cat([y, labels]) >= 0, [z.movedim(1, 3) for z in (t, s)]
    p_T, p_S = (F.softmax(z[here], 1) for z in halves)
    truth = torch.cat([y, labels])[here]
    assert terms["ce"].item() == near(-p_S[range(len(truth)), truth].log().mean(), 1e-5)
    assert terms["kl"].item() == near((p_T * (p_T / p_S).log()).sum(1).mean(), 1e-5)
    for name, z in zip(("conf_t", "conf_s"), halves):
        p = F.softmax(z[:4][y >= 0], 1)
        assert terms[name].item() == near(p[range(len(p)), y[y >= 0]].mean(), 1e-5)


def arguments_of(flags=""):
    return tst.parse_args(f"--task segmentation --device cpu {flags}".split())


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(tst, "SCENES", (24, 10))


def test_scenes_and_their_batches(few_scenes):
    """A quarter of a scene is a shape on background 0; crops and flips take labels along."""
    data = tst.load_scenes(next(common.each_seed(arguments_of(
        "--train-fraction 0.5 --batch-size 5"))))
    assert (data.classes, data.names[0], data.names[1], data.image_size) == (
        21, "background", "solid disc", 32)
    assert (len(data.train), len(data.test)) == (12, 10)
    images, shapes, masks = common.make_shapes(40, 16, 1)
    test, labels = next(data.test.batches())
    for quarter, (top, left) in enumerate(itertools.product((0, 16), (0, 16))):
        here = labels[3, top:top + 16, left:left + 16]
        assert torch.equal(here, torch.where(masks[12 + quarter], shapes[12 + quarter] + 1, 0))
        assert torch.equal(data.test.images[3, :, top:top + 16, left:left + 16],
                           images[12 + quarter])
    data.train.images = data.train.labels[:, None].expand(-1, 3, -1, -1).contiguous()
    seen = 0
    for x, y in data.train.augmented(5, generator()):
        x = (x * data.train.std + data.train.mean)[:, 1] * 255  # the codes
        assert torch.equal(x.round().long(), torch.where(y == U, 0, y + 1))
        seen += (y == U).sum()
    assert seen > 0  # what the padding adds


def test_the_network_is_its_classifier_at_every_location(few_scenes):
    data = tst.load_scenes(next(common.each_seed(arguments_of())))
    network, plain = data.build("resnet8", 3).eval(), common.build_model("resnet8", 21, 32, 3)
    assert same(network.state_dict(), plain.state_dict())  # one file for both
    x = torch.randn(2, 3, 32, 32, generator=generator())
    maps = network.forward_features(x)  # (2,64,8,8)
    low = torch.stack([network.head(maps[:, :, i, j]) for i in range(8) for j in range(8)], 2)
    wanted = F.interpolate(low.view(2, 21, 8, 8), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(network(x), wanted)


def test_stage_two_moves_theta_alone_and_keeps_it_in_bounds(few_scenes):
    data = tst.load_scenes(next(common.each_seed(arguments_of())))
    teacher, student = (common.frozen(data.build(name)) for name in ("resnet14", "resnet8"))
    augmenter = plain_augmenter()
    augmenter.theta_m.data.fill_(30.0)
    augmenter.theta_m.data[0] = -30.0
    augmenter.temperature = 5.0  # soft gates
    augmenter.encoders[0].f.grad = torch.full((10,), 1e6)  # what Stage I left behind is not clipped
    before = [value.clone() for net in (teacher, student) for value in net.state_dict().values()]
    optimizer = torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], 1.0)
    images, labels = next(data.train.augmented(8, generator()))
    tst.search_step(augmenter, teacher, student, optimizer, images, labels, generator(),
                    arguments_of())
    assert augmenter.theta_m.tolist() == [-10.0] + [10.0] * 10 and augmenter.theta_p.any()
    grads = torch.cat([augmenter.theta_m.grad, augmenter.theta_p.grad])
    assert 1e-3 < grads.norm() <= 20.001
    steep = common.copy.deepcopy(augmenter)
    with pytest.MonkeyPatch.context() as patch:
        loss = tst.augmentation_loss
        patch.setattr(tst, "augmentation_loss", lambda *args: (
            1e5 * loss(*args)[0], *loss(*args)[1:]))
        tst.search_step(steep, teacher, student, optimizer, images, labels, generator(),
                        arguments_of())
    found = torch.cat([steep.theta_m.grad, steep.theta_p.grad])
    assert found.norm().item() == pytest.approx(20, rel=1e-3)
    after = [value for net in (teacher, student) for value in net.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert all(p.grad is None for net in (teacher, student) for p in net.parameters())


# -------------------------------------------------------------------------------------------- files
def write(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette:
        image = image.convert("P")
        image.putdata(np.asarray(array).flatten().tolist())
    image.save(path)


def test_voc_and_cityscapes(tmp_path):
    """Trees as handed out: VOC's 255 and Cityscapes' void are unknown."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    codes = np.repeat(np.repeat(np.array([[0, 15], [20, 255]]), 4, 0), 4, 1)
    for part, names in (("train", "ab"), ("val", "c")):
        lists = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("\n".join(names) + "\n")
        for name in names:
            write(root / "JPEGImages" / f"{name}.jpg", np.full((8, 8, 3), 90))
            write(root / "SegmentationClass" / f"{name}.png", codes, palette=True)
    flags = f"--data {tmp_path} --image-size 8 --batch-size 2 --dataset "
    data = tst.load_scenes(next(common.each_seed(arguments_of(flags + "voc"))))
    assert (len(data.train), len(data.test), data.names[15]) == (2, 1, "person")
    _, labels = next(data.test.batches())
    assert np.array_equal(labels[0], np.where(codes == 255, U, codes))
    for part in ("train", "val"):
        stem = "city/x_000_000"
        write(tmp_path / "leftImg8bit" / part / f"{stem}_leftImg8bit.png", np.full((8, 16, 3), 9))
        ids = np.repeat(np.array([[7] * 8 + [26] * 4 + [0] * 4]), 8, 0)  # road, car, unlabelled
        write(tmp_path / "gtFine" / part / f"{stem}_gtFine_labelIds.png", ids)
    data = tst.load_scenes(next(common.each_seed(arguments_of(flags + "cityscapes"))))
    assert (data.classes, data.names[0], data.names[13]) == (19, "road", "car")
    assert next(data.test.batches())[1][0, 0].tolist() == [0] * 4 + [13] * 2 + [U] * 2
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(common.InputError, match="voc is damaged or missing in .*a.jpg"):
        tst.load_scenes(next(common.each_seed(arguments_of(flags + "voc"))))


@pytest.mark.parametrize("flags, line", [
    ("--task segmentation --dataset folder --data x", "--task segmentation reads shapes, voc, "),
    ("--dataset voc --data x", "--task recognition reads shapes, fashionmnist"),
    ("--task segmentation --open-set 2", "--open-set has no effect here"),
    ("--task segmentation --image-size 33", "the side of a scene of four shapes is even")])
def test_bad_input(flags, line, capsys):
    assert line in refused("tst", flags, capsys)


# --------------------------------------------------------------------------------------------- runs
TINY = "--task segmentation --epochs 2 --batch-size 6 --fit-steps 3 "


def test_a_run_its_controls_its_picture_and_its_resumption(run, tmp_path, few_scenes, monkeypatch):
    found = table(run("tst", tmp_path / "whole", TINY + "--compare"))
    assert list(found) == ["teacher", "student alone", "TST", "kd", "kd twice", "random"]
    assert all(0 <= float(row["test"]) < 100 for row in found.values())
    rows = log(tmp_path / "whole")
    assert [row["stage"] + row["student_epoch"] for row in rows] == ["21", "31", "22", "32"]
    assert result_of(tmp_path / "whole")["arguments"].items() >= {
        "temperature": 1.0, "weight": 1.5}.items()
    picture = np.asarray(Image.open(tmp_path / "whole" / "augmented.png"))
    assert picture.shape == (8 * 34 + 2, 5 * 34 + 2, 3)
    assert (picture[2:34, 2:34] != picture[2:34, 36:68]).any()
    if importlib.util.find_spec("matplotlib"):
        monkeypatch.syspath_prepend(common.Path(common.__file__).parent / "docs")
        __import__("figures").main(tmp_path / "whole")
        assert (tmp_path / "whole" / "series.png").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, tst, "search_step", 6)  # in the second search
        run("tst", tmp_path / "killed", TINY)
    run("tst", tmp_path / "killed", TINY + "--resume")
    for file in ("student.pt", "augmenter.pt"):
        assert same(weights(tmp_path / "killed" / file), weights(tmp_path / "whole" / file))
    assert log(tmp_path / "killed") == rows
    sides = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tst, "cutout", lambda images, _, erased: sides.add(erased) or images)
        run("tst", tmp_path / "random", TINY + "--augment random --operations 14 --epochs 1")
    assert sides == {0.25}
    own = next(path for path in run.cache.glob("shapes-resnet8-2-*/epoch-0002.pt")
               if len(weights(path)["head.bias"]) == 21)  # a teacher of one's own
    flags = f"{TINY.replace('--fit-steps 3', '')} --augment none --teacher-weights {own}"
    printed = run("tst", tmp_path / "own", flags)
    assert "% on the test images" in printed
