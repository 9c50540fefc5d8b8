"""docs/tst_segmentation.py: what moves must move together; unknown pixels; files; runs."""

import copy
import itertools
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, folder_of, log, refused, result_of, same, stopped, table, weights
from PIL import Image
from test_tst import generator, near, plain_augmenter, same_runs, watch
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


def augmenter_of(*operations, **flags):
    """In it these operations alone act, each with gate 1, if any, moved by b alone, not noise."""
    augmenter = plain_augmenter(script.PixelAugmenter, operations=14, **flags)
    if operations:
        for encoder in augmenter.encoders[MOVED]:
            encoder.W.data.zero_()
        augmenter.theta_p.data.fill_(-1e4)
        augmenter.theta_p.data[[tst.OPERATIONS.index(name) for name in operations]] = 1e4
    return augmenter


def test_labels_move_with_their_image_by_the_known_maps():
    """Two shifts are summed as matrices, then one warp: by 2 + 1 pixels to the left; not chained,
    not twice. A quarter turn: out[y,x] = in[x, -1-y]. Unknown outside. The others move nothing."""
    augmenter = augmenter_of("TranslateX", "ShearX")
    for name, pixels in (("TranslateX", 2), ("ShearX", 1)):
        augmenter.encoders[tst.OPERATIONS.index(name)].b.data[2] = pixels * 2 / 8
    x, y = augmenter(IMAGES, LABELS, generator())
    wanted = np.full((2, 8, 8), U)
    wanted[:, :, :5] = LABELS[:, :, 3:]
    assert np.array_equal(y, wanted)
    assert x[:, 0].detach() == near(np.where(wanted == U, 0, wanted), 1e-5)
    augmenter = augmenter_of("Rotate")
    augmenter.encoders[tst.OPERATIONS.index("Rotate")].b.data = torch.tensor([0., 1, 0, -1, 0, 0])
    x, y = augmenter(IMAGES, LABELS, generator())
    rows, columns = np.indices((8, 8))
    wanted = LABELS.numpy()[:, 7 - columns, rows]
    assert np.array_equal(y, wanted) and x[:, 2].detach() == near(wanted, 1e-5)
    x.sum().backward()
    assert augmenter.theta_p.grad.isfinite().all()
    labels = torch.where(torch.rand(2, 8, 8, generator=generator()) < 0.2, U, LABELS)
    for name in (*tst.OPERATIONS[:tst.COLOR], *tst.OPERATIONS[tst.MOVABLE:]):
        x, y = augmenter_of(name)(IMAGES, labels, generator())
        assert torch.equal(y, labels), name
    assert 0.4 < (x == IMAGES).double().mean() < 1  # Cutout


def test_the_warp_reaches_theta_and_equals_the_sum_of_eq_20():
    """Soft gates of four geometric operations, with noise, against A = I + sum g_i (A_i - I)."""
    augmenter, images, labels = augmenter_of(temperature=5.0), IMAGES, LABELS
    for encoder in augmenter.encoders[MOVED]:
        encoder.W.data.normal_(0, 0.1, generator=generator(3))
    augmenter.theta_p.data[[i for i in range(14) if not tst.COLOR <= i < tst.MOVABLE]] = -1e5
    x, y = augmenter(images, labels, generator())
    draws = generator()
    gates, A = tst.relaxed_bernoulli(augmenter.theta_p, 5.0, draws), 0
    for i in torch.randperm(14, generator=draws).tolist():
        if tst.COLOR <= i < tst.MOVABLE:
            A_i = augmenter.encoders[i].affine(torch.full((2, 1), 0.5), generator=draws)
            A = A + gates[i] * (A_i - torch.eye(2, 3))
        else:
            augmenter.transform(i, images, torch.full((11,), 0.5), draws)
    grid = F.affine_grid(torch.eye(2, 3) + A, [2, 3, 8, 8], align_corners=False)
    torch.testing.assert_close(x, F.grid_sample(images, grid, align_corners=False))
    ix, iy = ((((grid[..., k] + 1) * 8 - 1) / 2).round().long() for k in (0, 1))  # by hand
    inside = (ix >= 0) & (ix < 8) & (iy >= 0) & (iy < 8)
    picked = labels[torch.arange(2)[:, None, None], iy.clamp(0, 7), ix.clamp(0, 7)]
    assert torch.equal(y, torch.where(inside, picked, U)) and 0.2 < inside.double().mean() < 1
    x.square().sum().backward()
    assert augmenter.theta_m.grad[MOVED].all() and augmenter.theta_p.grad[MOVED].all()


def test_unknown_pixels_give_no_loss_and_no_gradient():
    labels = torch.tensor([[[0, U], [2, 1]]])  # (1,2,2)
    t, s = torch.randn(2, 1, 3, 2, 2, generator=generator()).requires_grad_()
    y, z_t, z_s = script.known(labels, t, s)
    assert y.tolist() == [0, 2, 1] and z_t.shape == (3, 3)
    assert torch.equal(z_s[1], s[0, :, 1, 0])
    s.retain_grad(), t.retain_grad()
    (tst.distillation_loss(z_s, z_t, y)[0] + tst.augmentation_loss(z_t, z_s, y)[0]).backward()
    for z in (t, s):
        assert not z.grad[0, :, 0, 1].any() and z.grad.abs().sum(1).count_nonzero() == 3


def test_mean_iou_against_a_hand_made_case():
    """Classes 0, 1, 2: intersections 2, 1, 0, unions 4, 2, 1; a fourth never occurs: 1/3 (1/2 +
    1/2 + 0). Counting unknown pixels, or averaging over four classes, gives something else."""
    truth = torch.tensor([[[0, 0, 0], [1, 2, U]]])
    said = F.one_hot(torch.tensor([[[0, 0, 1], [1, 0, 1]]]), 4).movedim(3, 1).float()
    network, split = torch.nn.Identity(), Namespace(batches=lambda: [(said, truth)])
    arguments = Namespace(precision="fp32", device=torch.device("cpu"))
    assert script.mean_iou(network, split, arguments) == pytest.approx(100 * (1 / 2 + 1 / 2) / 3)
    assert common.evaluate(network, split, arguments) == pytest.approx(100 * 3 / 5)
    mean = common.Mean()
    mean.add({}, said, truth)
    assert mean.row()["train"] == pytest.approx(100 * 3 / 5)


def test_a_lesson_of_pixels():
    """Eq. (17) on both halves, each with the labels that it has left."""
    teacher, student = (script.pixel_network(name, 3, 16, 1) for name in ("resnet8", "resnet8x0.5"))
    images, x = torch.randn(2, 4, 3, 16, 16, generator=generator())
    labels, y = torch.randint(0, 3, (2, 4, 16, 16), generator=generator())
    labels[0, :5], y[:, 7:] = U, U
    teacher = common.frozen(teacher)
    with torch.no_grad():
        t, s = (network(torch.cat([x, images])) for network in (teacher, copy.deepcopy(student)))
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    terms, logits = script.train_step(student, teacher, optimizer, images, labels, (x, y),
                                      settings_of())
    assert torch.equal(logits, s[4:])
    truth = torch.cat([y, labels])
    p_T, p_S = (z.movedim(1, 3).softmax(3)[truth >= 0] for z in (t, s))
    truth = truth[truth >= 0]
    assert terms["ce"].item() == near(-p_S[range(len(truth)), truth].log().mean(), 1e-5)
    assert terms["kl"].item() == near((p_T * (p_T / p_S).log()).sum(1).mean(), 1e-5)
    for name, z in (("conf_t", t), ("conf_s", s)):
        p = z[:4].movedim(1, 3).softmax(3)[y >= 0]
        assert terms[name].item() == near(p[range(len(p)), y[y >= 0]].mean(), 1e-5)


def test_scenes_their_batches_and_the_network():
    """A quarter of a scene is a shape on background 0; crops and flips take labels along. The
    network is its classifier at every place."""
    data = script.load_scenes(settings_of("--train-fraction 0.5 --batch-size 5"))
    assert (data.classes, data.names[:2], data.image_size, len(data.train), len(data.test)) == (
        21, ["background", "solid disc"], 32, 12, 10)
    images, shapes, masks = common.make_shapes(40, 16, 1)
    _, labels = next(data.test.batches())
    for quarter, (top, left) in enumerate(itertools.product((0, 16), (0, 16)), 12):
        here = (..., slice(top, top + 16), slice(left, left + 16))
        assert torch.equal(labels[3][here], torch.where(masks[quarter], shapes[quarter] + 1, 0))
        assert torch.equal(data.test.images[3, :3][here], images[quarter])
    data.train.images[:, :3] = data.train.images[:, 3:]  # the codes
    batches = [*data.train.augmented(5, generator())]
    for x, y in batches:
        x = (x * data.train.std + data.train.mean)[:, 1] * 255
        assert torch.equal(x.round().long(), torch.where(y == U, 0, y + 1))
    assert any((y == U).any() for _, y in batches)  # what the padding adds
    network, plain = data.build("resnet8", 3).eval(), common.build_model("resnet8", 21, 32, 3)
    assert same(network.state_dict(), plain.state_dict())  # one file for both
    maps = network.forward_features(x := torch.randn(2, 3, 32, 32, generator=generator()))
    low = torch.stack([network.head(maps[:, :, i, j]) for i in range(8) for j in range(8)], 2)
    wanted = F.interpolate(low.view(2, 21, 8, 8), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(network(x), wanted)


def test_stage_two_moves_theta_alone_and_keeps_it_in_bounds(monkeypatch):
    """What Stage I left behind is not clipped with it; a steep loss is clipped at 20."""
    data = script.load_scenes(settings_of())
    teacher, student = (common.frozen(data.build(name)) for name in ("resnet14", "resnet8"))
    before = [copy.deepcopy(network.state_dict()) for network in (teacher, student)]
    images, labels = next(data.train.augmented(8, generator()))
    loss = tst.augmentation_loss
    for factor in (1, 1e5):
        augmenter = augmenter_of(temperature=5.0)  # soft gates
        augmenter.theta_m.data = torch.tensor([-30.0] + [30.0] * 10)
        augmenter.encoders[0].f.grad = torch.full((10,), 1e6)
        optimizer = torch.optim.SGD([augmenter.theta_m, augmenter.theta_p], 1.0)
        monkeypatch.setattr(tst, "augmentation_loss", lambda *args, factor=factor: (
            factor * loss(*args)[0], *loss(*args)[1:]))
        script.search_step(augmenter, teacher, student, optimizer, images, labels, generator(),
                           settings_of())
        norm = torch.cat([augmenter.theta_m.grad, augmenter.theta_p.grad]).norm().item()
        assert 1e-3 < norm < 20.001 if factor == 1 else norm == pytest.approx(20, rel=1e-3)
        bounds = [*augmenter.theta_m.tolist(), *augmenter.theta_p.tolist()]
        assert max(map(abs, bounds)) == 10 and augmenter.theta_m.tolist()[:2] == [-10, 10]
        assert augmenter.theta_p.any()
    for network, state in zip((teacher, student), before):
        assert same(network.state_dict(), state)
        assert all(p.grad is None for p in network.parameters())


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if path.parent.name == "SegmentationClass":
        image.putpalette([*range(256)] * 3)  # VOC's labels are places in a palette
    image.save(path)


def test_voc_and_cityscapes(tmp_path):
    """Trees as handed out: VOC's 255 and Cityscapes' void are unknown."""
    root, flags = tmp_path / "VOCdevkit" / "VOC2012", f"--data {tmp_path} --image-size 8 --dataset "
    codes = np.kron([[0, 15], [20, 255]], np.ones((4, 4), int))
    for part, names in (("train", "ab"), ("val", "c")):
        lists = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("\n".join(names) + "\n")
        for name in names:
            write(root / "JPEGImages" / f"{name}.jpg", np.full((8, 8, 3), 90))
            write(root / "SegmentationClass" / f"{name}.png", codes)
        stem = "city/x_000_000"
        write(tmp_path / "leftImg8bit" / part / f"{stem}_leftImg8bit.png", np.full((8, 16, 3), 9))
        ids = np.repeat(np.array([[7] * 8 + [26] * 4 + [0] * 4]), 8, 0)  # road, car, unlabelled
        write(tmp_path / "gtFine" / part / f"{stem}_gtFine_labelIds.png", ids)
    data = script.load_scenes(settings_of(flags + "voc"))
    assert (len(data.train), len(data.test), data.names[15]) == (2, 1, "person")
    assert np.array_equal(next(data.test.batches())[1][0], np.where(codes == 255, U, codes))
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(common.InputError, match="voc is damaged or missing in .*a.jpg"):
        script.load_scenes(settings_of(flags + "voc"))
    data = script.load_scenes(settings_of(flags + "cityscapes"))
    assert (data.classes, data.names[0], data.names[13]) == (19, "road", "car")
    assert next(data.test.batches())[1][0, 0].tolist() == [0] * 4 + [13] * 2 + [U] * 2


def test_bad_input(capsys):
    assert "invalid choice: 'folder'" in refused("tst_segmentation", "--dataset folder", capsys)
    with pytest.raises(common.InputError, match="--open-set: a scene has all classes"):
        script.load_scenes(settings_of("--open-set 2"))
    with pytest.raises(common.InputError, match="voc is damaged or missing in --data nowhere"):
        script.load_scenes(settings_of("--dataset voc --data nowhere"))


def test_a_changed_line_of_tst_or_common_is_another_run(monkeypatch):
    read, data, sources = common.Path.read_bytes, script.load_scenes(settings_of()), []
    for file in ("", "rco.py", "tst.py", "common.py", "tst_segmentation.py"):
        monkeypatch.setattr(common.Path, "read_bytes", lambda path, file=file: (
            read(path) + b"#" * (path.name == file)))
        sources.append(common.settings_of({}, data, script.train)["source"])
    assert sources[0] == sources[1] and len({*sources}) == 4


TINY = "--epochs 2 --batch-size 6 --fit-steps 3 --search-epochs 2 "  # 4 steps a pass


def test_runs_their_picture_and_a_kill_inside_a_search(run, tmp_path):
    sides = set()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, "cutout", lambda *args: sides.add(args[2]))
        found = table(run("tst_segmentation", tmp_path / "whole", TINY + "--compare"))
    assert [*found] == ["teacher alone", "student alone", *tst.METHODS] and sides == {0.25}
    assert all(0 <= float(row["test"]) < 100 for row in found.values())
    whole = folder_of(tmp_path / "whole", "TST")
    result, last = result_of(whole), log(whole)[-1]
    assert [row["before_epoch"] for row in result["searches"]] == [1, 1, 2, 2]
    assert result["arguments"].items() >= {"temperature": 1.0, "weight": 1.5}.items()
    assert found["TST"]["test"] == f"{float(last['test']):.2f}" != f"{float(last['train']):.2f}"
    picture = np.asarray(Image.open(whole / "augmented.png"))
    assert picture.shape == (8 * 34 + 2, 5 * 34 + 2, 3)
    assert (picture[2:34, 2:34] != picture[2:34, 36:68]).any()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, script, "search_step", 8 + 4 + 2)  # in the second pass of the second search
        run("tst_segmentation", tmp_path / "killed", TINY)
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, script, "search_step", 4 + 1, AssertionError)  # no closed pass again
        run("tst_segmentation", tmp_path / "killed", TINY)
    assert same_runs(folder_of(tmp_path / "killed", "TST"), whole)
    own = next(path for path in run.cache.glob("shapes-resnet8-2-*/epoch-0002.pt")
               if len(weights(path)["head.bias"]) == 21)  # a teacher of one's own
    data = script.load_scenes(settings_of())
    iou = script.mean_iou(common.load_weights(data.build("resnet8"), own), data.test, settings_of())
    alone = table(run("tst_segmentation", tmp_path / "own",
                      f"{TINY} --method kd --teacher-weights {own}"))
    assert alone["teacher alone"]["test"] == found["teacher alone"]["test"] == f"{iou:.2f}"
