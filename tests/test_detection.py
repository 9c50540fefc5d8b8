"""docs/tst_detection.py: boxes move with their image; precision; losses; files; runs."""

import itertools
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, folder_of, kl, result_of, same_run, stopped, table, tree
from PIL import Image
from test_segmentation import turned_picture
from test_tst import generator, near, plain_augmenter
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import common
import tst

sys.path.append(str(ROOT / "docs"))
import tst_detection as script  # noqa: E402

NONE = [-1.0, 0, 0, 0, 0]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(script, "SCENES", (24, 10))


def settings_of(flags=""):
    found = next(common.each_seed(script.parse_args(f"--device cpu {flags}".split())))
    return Namespace(**vars(found), student_term="non_saturating", augment="learned")


def moved(box, A, size=16):
    targets = torch.tensor([[[3.0, *box]]])
    return script.Augmenter.moved(targets, torch.tensor([A], dtype=torch.float32), size)[0, 0]


@pytest.mark.parametrize("A, box, wanted", [
    ([[1, 0, 0], [0, 1, 0]], [2, 3, 8, 9], [3, 2, 3, 8, 9]),
    ([[1, 0, 0.25], [0, 1, 0]], [2, 3, 8, 9], [3, 0, 3, 6, 9]),  # reads 2 pixels to the right
    ([[-1, 0, 0], [0, 1, 0]], [2, 3, 8, 9], [3, 8, 3, 14, 9]),  # the mirror image
    ([[0, 1, 0], [-1, 0, 0]], [2, 3, 8, 9], [3, 7, 2, 13, 8]),  # a quarter turn
    ([[0.5, 0, 0], [0, 0.5, 0]], [6, 6, 9, 10], [3, 4, 4, 10, 12]),  # twice as large
    ([[1, 0, 0.75], [0, 1, 0]], [4, 0, 8, 4], [3, 0, 0, 2, 4]),  # half is left
    ([[1, 0, 0.875], [0, 1, 0]], [4, 0, 8, 4], [3, 0, 0, 1, 4]),  # a quarter
    ([[1, 0, 0.876], [0, 1, 0]], [4, 0, 8, 4], NONE),  # less
    ([[1, 0, 2], [0, 1, 0]], [4, 0, 8, 4], NONE),  # all of it is outside
    ([[0, 0, 0], [0, 1, 0]], [4, 0, 8, 4], NONE),  # an image folded up
    ([[1, 0, 0], [0, 1, 0]], [0, 0, 0, 0], NONE)])
def test_boxes_by_closed_forms(A, box, wanted):
    assert moved(box, A).tolist() == near(wanted, 1e-5)


def hull(image):
    """The box around the pixels above one half; image (H,W)."""
    y, x = np.nonzero(np.asarray(image) > 0.5)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_boxes_go_where_the_augmenter_takes_their_pixels():
    """A bright rectangle; soft gates, all geometric operations, noise; to a pixel."""
    torch.manual_seed(0)
    augmenter = plain_augmenter(script.Augmenter, operations=14, temperature=5.0, erased=0.01)
    augmenter.transform = lambda i, images, *_: images
    for encoder in augmenter.encoders[tst.COLOR:tst.MOVABLE]:
        encoder.W.data.normal_(0, 0.1, generator=generator(3))
    images = torch.zeros(6, 3, 64, 64)
    images[:, :, 20:40, 24:50] = 1
    targets = torch.tensor([[[7.0, 24, 20, 50, 40], NONE]]).repeat(6, 1, 1)
    x, y = augmenter(images, targets, generator())
    assert not y.requires_grad and torch.equal(y[:, 1], targets[:, 1]) and (y[:, 0, 0] == 7).all()
    change = y[:, 0, 1:] - targets[:, 0, 1:]
    assert change.abs().amax() > 2  # it does move
    for image, box in zip(x.detach(), y[:, 0, 1:]):
        assert hull(image[0]) == pytest.approx(box.tolist(), abs=1.01)


def test_crops_and_flips_take_boxes_along():
    images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    images[:, :, 4:9, 3:12] = 255
    targets = torch.tensor([[[2.0, 3, 4, 12, 9]]]).repeat(40, 1, 1)
    targets[:, 0, 0] = torch.arange(40)
    split = script.BoxSplit(images, targets, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    batches = [*split.augmented(16, generator())]
    assert [len(x) for x, _ in batches] == [16, 16, 8]
    boxes = []
    for x, y in ((x, y[0]) for batch in batches for x, y in zip(*batch)):
        assert hull(x[0]) == y[1:].tolist()
        boxes.append(y.tolist())
    assert sorted(box[0] for box in boxes) == [*range(40)]
    assert len({tuple(box[1:]) for box in boxes}) > 20
    plain = common.Split(images, torch.arange(40), split.mean, split.std)
    x, y = next(plain.augmented(16, generator()))  # the draws are those of Split
    assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1][:, 0, 0].long())


# ------------------------------------------------------------------------------------------- losses
MATCHED = torch.tensor([[0, -1, 0, 1], [-1, -1, 1, -1]])  # (B,L)
TARGETS = torch.tensor([[[2.0, 0, 0, 4, 4], [0, 4, 4, 8, 8]], [NONE, [1, 1, 1, 6, 6]]])


def said(seed, scale=1.0):
    draw = generator(seed)
    return {"cls_logits": scale * torch.randn(2, 4, 3, generator=draw),
            "bbox_regression": torch.rand(2, 4, 4, generator=draw) + 0.2,
            "anchors": 2 * [torch.tensor([[-2.0, -2, 2, 2], [2, -2, 6, 2], [-2, 2, 2, 6],
                                          [2, 2, 6, 6]])]}


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, float)))


def test_the_scores_of_boxes_and_the_losses_of_stage_two():
    z = said(0)["cls_logits"].requires_grad_()
    p = script.box_scores(z, MATCHED, TARGETS)
    q = sigmoid(z.detach())
    wanted = [(q[0, 0, 2] + q[0, 2, 2]) / 2, q[0, 3, 0], q[1, 2, 1]]
    assert p.tolist() == near(wanted)
    p.sum().backward()
    assert {*map(tuple, z.grad.nonzero().tolist())} == {
        (0, 0, 2), (0, 2, 2), (0, 3, 0), (1, 2, 1)}
    p_S = torch.tensor([0.5, 0.2, 0.9])
    for term, L_S in (("non_saturating", -np.log(1 - p_S.numpy()).mean()),
                      ("negative_ce", np.log(p_S.numpy()).mean())):
        loss, L_T, found = script.augmentation_loss(p.detach(), p_S, term)
        assert L_T.item() == near(-np.log(wanted).mean()) and found.item() == near(L_S, 1e-4)
        assert loss.item() == near(L_T.item() + found.item())


def giou_by_hand(a, b):
    both = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both
    around = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return both / union - (around - union) / around


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_distillation_is_eq_24_and_teaches_the_student_alone(tau):
    s, t = said(1), said(2, 3.0)
    for one in (s, t):
        for name in ("cls_logits", "bbox_regression"):
            one[name].requires_grad_()
    detector = script.detector("resnet8x0.5", 3, 16)
    found = script.distillation_loss(s, t, detector, MATCHED, tau)
    z_s, z_t = (one["cls_logits"].detach().numpy().reshape(-1, 1) for one in (s, t))
    pair = [np.hstack([z, 0 * z]) for z in (z_t, z_s)]  # softmax of (z,0) is (sigmoid, 1 - sigmoid)
    assert found[0].item() == near(kl(*pair, tau) * len(z_s) / 4, 1e-4)  # P = 4
    sure = sigmoid(z_t).reshape(2, 4, 3).max(2) > 0.5
    assert 0 < sure.sum() < 8
    sizes, centres = 4, np.array([[0, 0], [4, 0], [0, 4], [4, 4]])
    losses = []
    for b, at in np.argwhere(sure):
        boxes = []
        for one in (s, t):
            left, top, right, bottom = sizes * one["bbox_regression"][b, at].detach().numpy()
            x, y = centres[at]
            boxes.append(np.array([x - left, y - top, x + right, y + bottom]))
        losses.append(1 - giou_by_hand(*boxes))
    assert found[1].item() == near(np.mean(losses), 1e-4)
    sum(found).backward()
    assert all(t[name].grad is None and s[name].grad.any() for name in (
        "cls_logits", "bbox_regression"))
    assert not s["bbox_regression"].grad[~torch.from_numpy(sure)].any()
    with pytest.raises(ValueError, match="class logits"):
        t["cls_logits"] = t["cls_logits"][:, :3]
        script.distillation_loss(s, t, detector, MATCHED)


def test_the_detector_is_torchvisions():
    """Its forward pass in train mode gives our loss, in eval mode our detections."""
    own = script.detector("resnet8x0.5", 20, 40, seed=5)
    assert [*own.head.children()][0].conv[0].in_channels == script.WIDTH
    same = script.detector("resnet8x0.5", 20, 40, seed=5).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in own.state_dict().items())
    images, targets = script.scenes(4, 40, 3)
    images, targets[1] = images / 255, torch.tensor(NONE)  # an image without boxes
    own.transform = GeneralizedRCNNTransform(40, 40, [0.0] * 3, [1.0] * 3, size_divisible=1)
    own.score_thresh = 0.005
    theirs = [{"boxes": y[y[:, 0] >= 0, 1:], "labels": y[y[:, 0] >= 0, 0].long()} for y in targets]
    terms = script.FCOS.forward
    own.train()
    plain = own.head.compute_loss
    own.head.compute_loss = lambda *args: {
        name: value for name, value in plain(*args).items() if name != "matched"}
    wanted = sum(terms(own, [*images], theirs).values())
    del own.head.compute_loss
    loss, matched = own.loss(own(images), targets)
    torch.testing.assert_close(loss, wanted)
    assert (matched[1] == -1).all() and {*matched[0].tolist()} - {-1} == {
        i for i in range(4) if targets[0, i, 0] >= 0}
    first = matched[0, matched[0] >= 0][0].item()
    targets[0, first, 0] = -2 - targets[0, first, 0]  # a difficult one is background
    _, matched = own.loss(own(images), targets)
    assert not (matched[0] == first).any()
    own.eval()
    with torch.no_grad():
        ours, theirs = own.detections(images), terms(own, [*images])
    for one, other in zip(ours, theirs, strict=True):
        assert len(one["boxes"]) > 0
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(one[name], other[name])
    assert script.detector("resnet8x0.5", 20, 40).score_thresh == 0.05
    for name, size, stride in (("resnet8x0.5", 42, 4), ("resnet18", 100, 32), ("vgg8", 12, 8)):
        with pytest.raises(common.InputError, match=f": {size} is no multiple .* {stride}"):
            script.detector(name, 20, size)
    with pytest.raises(common.InputError, match="--student: the stride of its"):
        script.load_scenes(settings_of("--teacher vgg8"))


# ------------------------------------------------------------------------------- average precision
def image_of(*found):
    """Of (class, score, x1, y1, x2, y2)."""
    found = torch.tensor(found, dtype=torch.float32).view(-1, 6)
    return {"labels": found[:, 0].long(), "scores": found[:, 1], "boxes": found[:, 2:]}


BOX, OTHER = [0, 0, 10, 10], [20, 20, 30, 30]


@pytest.mark.parametrize("found, truth, wanted", [
    ([(0, 0.9, *BOX)], [[0, *BOX]], 100),
    ([(1, 0.9, *BOX)], [[0, *BOX]], 0),  # another class
    ([(0, 0.9, 0, 0, 10, 5)], [[0, *BOX]], 100),  # IoU 0.5
    ([(0, 0.9, 0, 0, 10, 4.9)], [[0, *BOX]], 0),
    ([(0, 0.9, *BOX), (0, 0.8, *BOX)], [[0, *BOX], [0, *OTHER]], 50),  # the second is false
    ([(0, 0.9, *OTHER), (0, 0.8, *BOX)], [[0, *BOX]], 50),  # a false one first
    ([(0, 0.8, *OTHER), (0, 0.9, *BOX)], [[0, *BOX]], 100),  # a false one after it
    # right, false, right: recalls 1/2, 1/2, 1 of precision 1, 1/2, 2/3
    ([(0, 0.9, *BOX), (0, 0.8, 50, 50, 60, 60), (0, 0.7, *OTHER)], [[0, *BOX], [0, *OTHER]],
     100 * (1 + 2 / 3) / 2),
    # false, right, right: 1/2 rises to 2/3 where more is recalled
    ([(0, 0.9, 50, 50, 60, 60), (0, 0.8, *BOX), (0, 0.7, *OTHER)], [[0, *BOX], [0, *OTHER]],
     100 * 2 / 3),
    ([(0, 0.9, *OTHER), (0, 0.8, *BOX)], [[0, *BOX], [-2, *OTHER]], 100),  # difficult: left out
    ([(0, 0.9, *BOX)], [[-2, *BOX], [1, *OTHER]], 0),  # class 0 has difficult boxes alone
    ([(0, 0.9, *BOX)], [[0, *BOX], [2, *OTHER]], 50),  # mean of classes 0 and 2
    ([], [[0, *BOX]], 0)])
def test_average_precision_of_hand_made_cases(found, truth, wanted):
    targets = torch.tensor([[*truth, NONE]], dtype=torch.float32)
    assert script.average_precision([image_of(*found)], targets) == pytest.approx(wanted)


def slow_precision(found, targets, classes):
    """Plain loops: every threshold of a class's scores gives a recall and a precision; the area
    under the highest precision at each recall or beyond."""
    areas = []
    for c in range(classes):
        hits, total = [], 0
        for n, image in enumerate(found):
            total += sum(int(box[0]) == c for box in targets[n])
            hits += [(score.item(), n, box.tolist()) for label, score, box in zip(
                image["labels"], image["scores"], image["boxes"]) if label == c]
        if not total:
            continue
        taken, right, wrong, curve = set(), 0, 0, []
        for _, n, (a, b, x, y) in sorted(hits, key=lambda hit: -hit[0]):
            best, place = 0, None
            for m, (k, a2, b2, x2, y2) in enumerate(targets[n].tolist()):
                if k in (c, -2 - c):
                    both = max(0, min(x, x2) - max(a, a2)) * max(0, min(y, y2) - max(b, b2))
                    iou = both / ((x - a) * (y - b) + (x2 - a2) * (y2 - b2) - both)
                    if iou > best:
                        best, place = iou, m
            if best >= 0.5 and targets[n, place, 0] < 0:
                continue
            fits = best >= 0.5 and (n, place) not in taken
            taken |= {(n, place)} if fits else set()
            right, wrong = right + fits, wrong + (not fits)
            curve.append((right / total, right / (right + wrong)))
        steps = np.arange(1, total + 1) / total
        areas.append(np.mean([max((p for r, p in curve if r >= step - 1e-9), default=0)
                              for step in steps]))
    return 100 * np.mean(areas)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_against_a_slow_computation(seed):
    rng = np.random.default_rng(seed)
    targets, found = [], []
    for _ in range(12):
        corner, side = rng.uniform(0, 20, (6, 2)), rng.uniform(5, 20, (6, 2))
        kind = rng.choice([0, 1, 2, -1, -2, -3], 6)
        truth = np.hstack([kind[:, None], corner, corner + side]) * (kind != -1)[:, None]
        truth[kind == -1, 0] = -1
        targets.append(truth)
        guess = np.repeat(np.hstack([corner, corner + side]), 2, 0) + rng.normal(0, 1.5, (12, 4))
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        labels = rng.permuted(np.repeat(np.where(kind < -1, -2 - kind, abs(kind)), 2)) if (
            seed == 2) else np.repeat(np.where(kind < -1, -2 - kind, abs(kind)), 2)
        found.append(image_of(*np.hstack([labels[:, None], rng.random((12, 1)), guess]).tolist()))
    targets = torch.tensor(np.array(targets), dtype=torch.float32)
    wanted = slow_precision(found, targets, 4)
    assert 1 < wanted < 99
    assert script.average_precision(found, targets) == pytest.approx(wanted)


# --------------------------------------------------------------------------------------------- data
def test_scenes_have_the_boxes_of_their_shapes():
    images, targets = script.scenes(30, 40, 1)
    drawn, labels, masks = common.make_shapes(120, 16, 1)
    there = targets[:, :, 0] >= 0
    assert 0.6 < there.double().mean() < 0.9
    places = set()
    for n, i in there.nonzero().tolist():
        x1, y1, x2, y2 = targets[n, i, 1:].int().tolist()
        rows, columns = (np.nonzero(np.asarray(masks[4 * n + i]).any(axis))[0] for axis in (1, 0))
        top, left, k = y1 - rows[0], x1 - columns[0], 4 * n + i
        assert (x2, y2) == (left + columns[-1] + 1, top + rows[-1] + 1)
        assert targets[n, i, 0] == labels[k] and (top // 20, left // 20) == (i // 2, i % 2)
        assert top % 20 <= 4 and left % 20 <= 4
        here = images[n, :, top:top + 16, left:left + 16]
        assert torch.equal(here[:, masks[k]], drawn[k][:, masks[k]])
        places.add((top % 20, left % 20))
    assert len(places) > 15
    data = script.load_scenes(settings_of("--train-fraction 0.5"))
    assert (data.classes, data.names[0], data.image_size, len(data.train), len(data.test)) == (
        20, "solid disc", 40, 12, 10)


def voc(folder, objects, picture=None):
    """A VOC 2012 tree, {name: [(class, difficult, xmin, ymin, xmax, ymax), ...]}; the last: val."""
    *train, test = objects
    def note(things):
        return "".join(
            f"<object><name>{kind}</name><difficult>{hard}</difficult><part><name>head</name>"
            f"<bndbox><xmin>1</xmin></bndbox></part><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
            f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>" for kind, hard, a, b, c, d in
            things).join(
            ["<annotation><filename>x</filename>", "</annotation>"])
    return tree(folder / "VOCdevkit/VOC2012", {
        "ImageSets/Main/train.txt": "\n".join(train).encode(),
        "ImageSets/Main/val.txt": test.encode(),
        **{f"JPEGImages/{name}.jpg": picture or Image.new("RGB", (20, 10)) for name in objects},
        **{f"Annotations/{name}.xml": note(things).encode() for name, things in objects.items()}})


DOG = ("dog", 0, 1, 1, 10, 5)


def test_voc(tmp_path):
    """Pixels count from 1; a picture of 20x10 becomes 8x8; difficult ones; one without boxes."""
    place = voc(tmp_path, {"a": [DOG, ("person", 1, 11, 6, 20, 10)], "b": [],
                           "c": [("aeroplane", 0, "2.5", 1, 20, 10)]})
    for folder in (tmp_path, place.parent, place):
        data = script.load_scenes(settings_of(f"--data {folder} --image-size 8 --dataset voc"))
        assert (data.names[0], len(data.names)) == ("aeroplane", 20)
        train = data.train.labels[data.train.labels[:, 0, 0].argsort(descending=True)]
        dog, person = data.names.index("dog"), data.names.index("person")
        assert train.tolist() == [[[dog, 0, 0, 4, 4], [-2 - person, 4, 4, 8, 8]], [[-1] * 5] * 2]
        assert data.test.labels[0, 0].tolist() == near([0, 0.6, 0, 8, 8])


@pytest.mark.parametrize("thing, picture, says", [
    (("dog", 0, 0, 0, 21, 11), None, None),  # a pixel too far: clipped
    (("dog", 0, 1, 1, 22, 5), None, r"a.xml: \[1.0, 1.0, 22.0, 5.0\] is no box in"),
    (("dog", 0, -1, 1, 5, 5), None, "is no box"),
    (("dog", 0, 5, 1, 4, 5), None, "is no box"),
    (("dog", 0, 21, 1, 21, 5), None, "is no box"),
    (("dog", 0, 25, 1, 40, 5), None, "is no box"),
    (("dog", 0, "nan", 1, 5, 5), None, "is no box"),
    (("dog", 0, "x", 1, 5, 5), None, "could not convert string"),
    (("wolf", 0, 1, 1, 5, 5), None, "a.xml: no class is called 'wolf'"),
    (("dog", 1, 1, 1, 5, 5), None, "no box to learn from, or none to test on"),
    (DOG, turned_picture((20, 10)), "is turned by EXIF")])
def test_boxes_that_do_not_fit_are_one_line(thing, picture, says, tmp_path):
    place = voc(tmp_path, {"a": [thing], "c": [DOG]}, picture)
    flags = settings_of(f"--data {tmp_path} --image-size 8 --dataset voc")
    if says is None:
        data = script.load_scenes(flags)
        assert data.train.labels[0, 0, 1:].tolist() == near([0, 0, 8, 8])
    else:
        with pytest.raises(common.InputError, match=says) as error:
            script.load_scenes(flags)
        assert "\n" not in str(error.value)
    for text in ("<annotation><object>", "<annotation><object><name>dog</name></object>"):
        text += "</annotation>" * text.endswith("</object>")
        (place / "Annotations/a.xml").write_text(text)
        with pytest.raises(common.InputError, match="a.xml(: no element| has no 'bndbox')"):
            script.load_scenes(flags)
    (place / "ImageSets/Main/train.txt").write_text("")
    with pytest.raises(common.InputError, match="voc is damaged or missing in --data"):
        script.load_scenes(flags)
    with pytest.raises(common.InputError, match="voc is damaged or missing in --data .*/no"):
        script.load_scenes(settings_of(f"--data {tmp_path}/no --dataset voc"))
    with pytest.raises(common.InputError, match="--open-set: a scene has all classes"):
        script.load_scenes(settings_of("--open-set 2"))


# --------------------------------------------------------------------------------------------- runs
def test_who_learns_in_each_stage():
    """Stage II: theta alone, by both networks; Stage III: the student alone; w = 0: no teacher."""
    data, how = script.load_scenes(settings_of()), settings_of()
    teacher, student = (common.frozen(data.build(name)) for name in ("resnet8", "resnet8x0.5"))
    for network in (teacher, student):
        network.head.classification_head.cls_logits.bias.data.zero_()  # scores that are no 0.01
    augmenter = plain_augmenter(script.Augmenter, operations=14, temperature=5.0)
    for encoder in augmenter.encoders:  # so that magnitudes matter
        (encoder.G if hasattr(encoder, "G") else encoder.W).data.normal_(0, 0.1)
    thetas = [augmenter.theta_m, augmenter.theta_p]
    images, targets = next(data.train.augmented(8, generator()))
    before = [one.state_dict() for one in (teacher, student)]
    before = [{name: value.clone() for name, value in state.items()} for state in before]
    terms = script.search_step(augmenter, teacher, student, torch.optim.SGD(thetas, 0.1), images,
                               targets, generator(), how)
    assert all(theta.grad.count_nonzero() == len(theta) for theta in thetas)
    assert {*terms} == {"L_T", "L_S", "conf_t", "conf_s"}
    twin = common.frozen(student).requires_grad_(True).train()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    terms, _ = script.train_step(twin, teacher, optimizer, images, targets, (images, targets), how)
    assert {*terms} == {"fcos", "kl", "giou", "conf_t", "conf_s"}
    assert all(parameter.grad is not None for parameter in twin.parameters())
    for network, state in zip((teacher, student), before):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    how.weight = 0
    terms, _ = script.train_step(twin, None, optimizer, images, targets, None, how)
    assert {*terms} == {"fcos"}


def test_images_without_boxes_cost_nothing():
    data, how = script.load_scenes(settings_of()), settings_of()
    student, teacher = data.build("resnet8x0.5"), common.frozen(data.build("resnet8"))
    images, targets = next(data.test.batches())
    none = torch.tensor(NONE).expand_as(targets)
    still = torch.optim.SGD(student.parameters(), 0.1)
    terms, _ = script.train_step(student, teacher, still, images, none, (images, none), how)
    assert {*terms} == {"fcos", "kl", "giou"}
    assert all(value.isfinite() for value in terms.values())
    augmenter = plain_augmenter(script.Augmenter)
    theta = torch.optim.SGD([augmenter.theta_p], 1.0)
    assert script.search_step(augmenter, teacher, teacher, theta, images, none, generator(),
                              how) == {}
    assert not augmenter.theta_p.any()


def test_stage_three_is_eq_24(monkeypatch):
    """The step of a student by hand: weights after it, to the bit."""
    data, how = script.load_scenes(settings_of("--weight 0.7 --temperature 2")), settings_of()
    how.weight, how.temperature = 0.7, 2.0
    student, teacher = data.build("resnet8x0.5"), common.frozen(data.build("resnet8", 1))
    teacher.head.classification_head.cls_logits.bias.data.zero_()
    (x, y), (images, targets) = itertools.islice(data.train.augmented(8, generator()), 2)
    twin = data.build("resnet8x0.5")
    script.train_step(student, teacher, torch.optim.SGD(student.parameters(), 0.1), images, targets,
                      (x, y), how)
    both, truth = torch.cat([x, images]), torch.cat([y, targets])
    s, t = twin(both), teacher(both)
    loss, matched = twin.loss(s, truth)
    z_s, z_t = s["cls_logits"] / 2, t["cls_logits"].detach() / 2
    p = z_t.sigmoid()
    bernoulli = F.binary_cross_entropy_with_logits(z_s, p, reduction="sum") - (
        F.binary_cross_entropy_with_logits(z_t, p, reduction="sum"))
    sure = t["cls_logits"].sigmoid().amax(2) > 0.5
    boxes = [twin.box_coder.decode(one["bbox_regression"], torch.stack(one["anchors"]))[sure]
             for one in (s, t)]
    giou = script.generalized_box_iou_loss(boxes[0], boxes[1].detach(), reduction="mean")
    (loss + 0.7 * (4 * bernoulli / (matched >= 0).sum() + giou)).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for (name, one), other in zip(student.named_parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_a_stopped_run_ends_as_one_that_was_not(run, tmp_path):
    """To the bit: killed in the teacher, in a search, in an epoch; the table; the picture."""
    flags = "--teacher resnet8 --epochs 2 --batch-size 6 --fit-steps 3 --search-epochs 2 "
    for owner, call in (("train_step", 6), ("search_step", 8 + 4 + 2), ("train_step", 3)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, script, owner, call)
            run("tst_detection", tmp_path / "killed", f"{flags} --cache {tmp_path}/1")
    said = run("tst_detection", tmp_path / "killed", f"{flags} --cache {tmp_path}/1 --compare")
    rows = table(said)
    alone = [result_of(path)["arguments"] for path in (tmp_path / "1").glob("*-detector-*")]
    assert {one["student"]: one["seed"] for one in alone} == {"resnet8": 1000, "resnet8x0.5": 0}
    assert all((one["weight"], one["augment"]) == (0, "none") for one in alone)
    run("tst_detection", tmp_path / "whole", f"{flags} --cache {tmp_path}/2")
    assert same_run(folder_of(tmp_path / "killed", "TST"), folder_of(tmp_path / "whole", "TST"))
    assert [*rows] == ["teacher alone", "student alone", *tst.METHODS]
    folder = folder_of(tmp_path / "whole", "TST")
    assert [one["before_epoch"] for one in result_of(folder)["searches"]] == [1, 1, 2, 2]
    student = script.detector("resnet8x0.5", 20, 40)
    student.load_state_dict(torch.load(folder / "student.pt", weights_only=True))
    data = script.load_scenes(settings_of())
    precision = script.measure(student, data.test, settings_of())
    assert rows["TST"]["test"] == f"{precision:.2f}"
    assert np.asarray(Image.open(folder / "augmented.png")).shape == (8 * 162 + 2, 4 * 162 + 2, 3)
    torch.save(script.detector("resnet8", 20, 40, 7).state_dict(), tmp_path / "own.pt")
    rows = table(run("tst_detection", tmp_path / "own", f"{flags} --method kd --cache {tmp_path}/2 "
                     f"--teacher-weights {tmp_path / 'own.pt'}"))
    own = script.measure(script.detector("resnet8", 20, 40, 7), data.test, settings_of())
    assert rows["teacher alone"]["test"] == f"{own:.2f}"


def test_bf16_and_an_odd_handful_of_images(run, tmp_path):
    """5 training images in one batch of 5, not 4 and 1; the picture has as many rows."""
    run("tst_detection", tmp_path, "--precision bf16 --epochs 1 --train-fraction 0.21 "
        f"--fit-steps 3 --batch-size 4 --cache {tmp_path / 'cache'}")
    picture = np.asarray(Image.open(folder_of(tmp_path, "TST") / "augmented.png"))
    assert picture.shape == (5 * 162 + 2, 4 * 162 + 2, 3)
    assert result_of(folder_of(tmp_path, "TST"))["rows"][0]["fcos"] > 0


def test_a_changed_line_of_what_it_imports_is_another_run(monkeypatch):
    read, data, sources = common.Path.read_bytes, script.load_scenes(settings_of()), []
    for file in ("", "rco.py", "tst.py", "common.py", "tst_segmentation.py", "tst_detection.py"):
        common.source_of.cache_clear()
        monkeypatch.setattr(common.Path, "read_bytes", lambda path, file=file: (
            read(path) + b"#" * (path.name == file)))
        sources.append(common.settings_of({}, data, script.train)["source"])
    common.source_of.cache_clear()
    assert sources[0] == sources[1] and len({*sources}) == 5
