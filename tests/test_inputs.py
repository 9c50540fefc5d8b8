"""Inputs of the outside world: each case with the line or the value that it must give.

Flags of the five scripts, teachers' files, folders of pictures, faults of machine and disk.
"""

import io
import os
import re
import subprocess
import sys
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, load, pixels, refused, shapes_data, tree
from PIL import Image
from torch import nn

import common
import letkd
import rco
import switokd
import trikd
import tst

CPU, RGB = torch.device("cpu"), pixels(16, 16, 3)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


# ----------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("script, flags, says", [
    ("letkd", "--mean 0.5 0.5 0.5", "--mean and --std go together"),
    ("trikd", "--mean 0 0 0 --std 1 0 1", "argument --std: 0 does not lie from 0.001 to 1e+09"),
    ("trikd", "--mean 0 0 2 --std 1 1 1", "argument --mean: 2 does not lie from 0 to 1"),
    ("rco", "--learning-rate nan", "nan does not lie from"), ("tst", "--weight-decay inf", "inf"),
    ("switokd", "--epochs 0", "0 does not lie from 1"), ("rco", "--epochs x", "invalid int value"),
    ("letkd", "--train-fraction 0", "0 does not lie from 1e-06 to 1"),
    ("letkd", "--epoch 2", "unrecognized arguments: --epoch 2"),  # no flag is shortened
    ("letkd", "--teacher-weights a.pt b.pt", "unrecognized arguments: b.pt"),
    ("rco", "--teacher-weights a_120.pt a_30.pt a_60.pt --epochs 120", "a_120.pt stands "
     "before a_30.pt; early states first"),
    ("trikd", "--method none", "argument --method: invalid choice: 'none'")])
def test_bad_flags_are_one_line(script, flags, says, capsys):
    assert says in refused(script, flags, capsys)


@pytest.mark.parametrize("flag, name", [
    ("--student", "alexnet"), ("--teacher", "resnet9"), ("--student", "resnet8x0.01")])
def test_a_network_that_there_is_not(flag, name):
    with pytest.raises(common.InputError, match=f"^no network is called '{name}'.*resnet8x4"):
        rco.parse_args([flag, name])


def test_files_of_the_route_whose_numbers_say_nothing_against_their_order():
    for files in ("a_9.pt a_10.pt", "best.pt a.pt", "a_1_seed3.pt a_2_seed3.pt final.pt",
                  "e_40.pth e_80.pth resnet32x4_last.pth", "r56_60.pt r56.pt", "a0.71.pt a0.8.pt"):
        rco.parse_args(f"--device cpu --epochs 12 --teacher-weights {files}".split())


# ---------------------------------------------------------------------------- what losses are given
def losses():
    """name -> (a loss of (learner, constant), its shape)."""
    y = torch.tensor([0, 2, 1, 3, 4, 4])
    three = trikd.Weights(1, 1, 1)
    return {
        "rco.softened_kl": lambda s, t: rco.softened_kl(s, t, 4.0),
        "rco.kd_loss": lambda s, t: rco.kd_loss(s, t, y)[0],
        "rco.hint_loss": rco.hint_loss, "rco.mimic_loss": rco.mimic_loss,
        "switokd.distillation_gap": switokd.distillation_gap,
        "switokd.kl_to": lambda s, t: switokd.kl_to(t, s),
        "switokd.online_loss": lambda s, t: switokd.online_loss(s, [t], y),
        "trikd.scaled_kl": lambda s, t: trikd.scaled_kl(t, s),
        "trikd.triplet_loss": lambda s, t: trikd.triplet_loss(s, t, t, y, three)[0],
        "letkd.scaled_kl": lambda s, t: letkd.scaled_kl(t, s),
        "letkd.template_loss": lambda s, t: letkd.template_loss(
            s[..., None, None], common.wide(t).softmax(1)[..., None, None]),
        "tst.distillation_loss": lambda s, t: tst.distillation_loss(s, t, y)[0],
        "tst.augmentation_loss": lambda s, t: tst.augmentation_loss(t, s, y)[0]}


@pytest.mark.parametrize("name", losses())
def test_a_loss_takes_any_float_and_no_shape_but_its_own(name):
    """float16, bfloat16: as of the same numbers in float32, also where squares of 300 are summed or
    the student is sure; an empty batch, and what broadcasting would hide, is a ValueError."""
    loss = losses()[name]
    s, t = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).mul(8)
    s[0], s[1, 2] = torch.tensor([40.0, 0, 0, 0, 0]), 300.0
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        one, other = s.to(kind), t.to(kind)
        found, wide = loss(one, other), loss(one.double(), other.double())
        assert found.dtype == (kind if kind == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), wide, rtol=2e-5, atol=1e-6)
    columns = loss(s.T.contiguous().T, torch.cat([t, t], 1)[:, :5])  # not contiguous
    torch.testing.assert_close(columns, loss(s, t))
    for shapes in (((6, 5), (6, 1)), ((6, 5), (1, 5)), ((1, 5), (6, 5)), ((0, 5), (0, 5))):
        with pytest.raises(ValueError):
            loss(*map(torch.zeros, shapes))


# ------------------------------------------------------------------------------- teachers' files
def renamed(state, name):
    return {name(key): value for key, value in state.items()}


def prefixed(state, prefix):
    """In another order too, so that the names alone can tell."""
    return {prefix + key: state[key] for key in sorted(state)}


def without(state, word):
    return {key: value for key, value in state.items() if word not in key}


FORMS = {  # what people have: a function of the plain state dict
    "plain": lambda s: s,
    "RepDistiller": lambda s: {"epoch": 240, "model": s, "best_acc": torch.tensor(70.0)},
    "lightning": lambda s: {"state_dict": s, "epoch": 3},
    "net": lambda s: {"net": s, "acc": 70.0},
    "student": lambda s: {"student": s},
    "DataParallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "both, turned": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "timm's EMA": lambda s: {"state_dict": renamed(s, lambda key: key + "x"), "state_dict_ema": s},
    "another EMA": lambda s: {"model": {k: 0 * v for k, v in s.items()}, "model_ema": s},
    "teacher and student": lambda s: {"student": renamed(s, str.upper), "teacher": s},
    "an average without tensors": lambda s: {"ema": {"decay": 0.9}, "model": s},
    "wrapped twice": lambda s: {"state_dict": {"model": s}},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "half": lambda s: {key: value.half() for key, value in s.items()},
    "before num_batches_tracked": lambda s: without(s, "num_batches"),
    "other names": lambda s: {f"{n}.{k.split('.')[-1]}": s[k] for n, k in enumerate(s)},
    "other names, wrapped, untracked": lambda s: {"model": {
        f"layer{n}.{k.split('.')[-1]}": s[k] for n, k in enumerate(without(s, "num_batches"))}},
}


@pytest.fixture(scope="module")
def teacher():
    network = common.build_model("resnet8", 20, 16, seed=9)
    network(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return network.eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_as_people_have_it_gives_the_same_logits(form, teacher, tmp_path):
    torch.save(FORMS[form](teacher.state_dict()), tmp_path / "t.pt")
    found = common.load_weights(common.build_model("resnet8", 20, 16, seed=1), tmp_path / "t.pt")
    images = torch.randn(5, 3, 16, 16)
    tolerance = 1e-2 if form == "half" else 0
    torch.testing.assert_close(found.eval()(images), teacher(images), rtol=0, atol=tolerance)


def swapped(key):
    """Other names, in which the mean of a batch norm stands where its bias should."""
    name = {"bias": "running_mean", "running_mean": "bias"}.get(key.split(".")[-1])
    return f"x.{key.rpartition('.')[0]}.{name}" if name else f"x.{key}"


DAMAGED = "is damaged or holds more than a dict of tensors"


@pytest.mark.parametrize("content, says", [
    (lambda s: nn.Linear(2, 2), DAMAGED), (lambda s: {"model": s, "acc": np.float64(3)}, DAMAGED),
    (lambda s: b"", DAMAGED), (lambda s: b"PK\3\4 and no more", DAMAGED),
    (lambda s: [1, 2], DAMAGED), (lambda s: b"<html>not found</html>", DAMAGED),
    (lambda s: {"epoch": 3}, "it has 0 tensors"),
    (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "it has 0 tensors"),
    (lambda s: {k: v * float("nan") for k, v in s.items()}, "weights that are not finite"),
    (lambda s: renamed(s, swapped), "does not hold the weights of this network"),
    (lambda s: without(s, "head"), "it has 45 tensors, expected are 47"),
    (lambda s: common.build_model("resnet8", 10).state_dict(), "expected are 47; first, "
     "head.weight (10, 64) is not head.weight (20, 64)"),
    (lambda s: renamed(common.build_model("resnet8", 10).state_dict(), "x.{}".format), "are 47; "
     "first, x.head.weight (10, 64) is not head.weight (20, 64)"),
    (lambda s: common.build_model("resnet14", 20).state_dict(), "it has 77 tensors")])
def test_a_file_that_is_no_teacher_is_one_line_and_kept(content, says, teacher, tmp_path):
    content, path = content(teacher.state_dict()), tmp_path / "t.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(common.InputError) as error:
        common.load_weights(common.build_model("resnet8", 20, 16), path)
    assert str(error.value).startswith(str(path)) and says in str(error.value)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_a_given_teachers_accuracy_is_printed(tmp_path, teacher, capsys):
    """Near chance with a warning; --mean and --std reach the images."""
    data, cpu = shapes_data(mean=[0.3] * 3, std=[0.2] * 3), Namespace(device=CPU, precision="fp32")
    guess = teacher((data.test.images / 255 - 0.3) / 0.2).argmax(1)
    torch.save(teacher.state_dict(), tmp_path / "t.pt")
    for right in (10, 95):  # of 100
        data.test.labels[:] = torch.where(torch.arange(100) < right, guess, (guess + 1) % 20)
        accuracy = common.load_frozen("resnet8", tmp_path / "t.pt", data, cpu)[1]
        printed = capsys.readouterr().out
        assert accuracy == pytest.approx(right)
        assert f"t.pt: resnet8, {right}.00 % on the test images\n" in printed
        assert ("warning: that is near chance (" in printed) == (right == 10)
    with pytest.raises(SystemExit, match="No such file or directory: '.*/none.pt'"):
        common.run_script(lambda: common.load_frozen("resnet8", tmp_path / "none.pt", data, cpu))


# --------------------------------------------------------------------------- folders of pictures
def split(*parts, classes=("ant", "bee"), count=2):
    return {f"{part}/{name}/{n}.png": RGB for part in parts for name in classes
            for n in range(count)}


GOOD = split("train", "test")


def test_what_a_folder_may_hold_besides_and_other_labels_are_another_run(tmp_path, capsys):
    """Of test/ and val/ the test part is test/; what is not read is counted, but hidden files."""
    more = dict.fromkeys([  # the first five are hidden
        "train/ant/.hidden.png", "train/__MACOSX/ant/._0.png", "train/ant/@eaDir/0.png",
        "test/bee/Thumbs.db", "train/.git/x.png", "train/ant/a.heic", "train/bee/b.HEIC",
        "test/ant/c.jpg_large", "test/bee/README", "train/stray.png", "val/ant/0.bmp"], b"x")
    data, printed = load("folder", tree(tmp_path, {**GOOD, **more})), capsys.readouterr().out
    assert len(data.train) == len(data.test) == 4 and data.names == ["ant", "bee"]
    assert dict(re.findall(r"'([^']+)': (\d+)", printed.partition("left out")[2])) == {
        ".heic": "2", ".jpg_large": "1", "no ending": "1", ".png": "1", ".bmp": "1"}
    (tmp_path / "test/ant/1.png").rename(tmp_path / "test/bee/2.png")
    assert load("folder", tmp_path).facts["fingerprint"] != data.facts["fingerprint"]


LAYOUT = "no classes .*; the layout is DIR/train/CLASS"


@pytest.mark.parametrize("files, says", [
    (split("Training", "Valid"), LAYOUT), (split("2019", "2020"), LAYOUT),
    ({"trainA/0.png": RGB, "testA/0.png": RGB, "trainB/0.png": RGB}, LAYOUT), ({}, LAYOUT),
    (split("bottle/train", "bottle/test", "cable/train"), LAYOUT),
    (split("train", "test", classes=["ant"]), LAYOUT),
    ({**split("train"), **split("test", classes=("ant", "cat"))}, "class bee is not in both"),
    ({**GOOD, "train/cat/x.txt": b"x", "test/cat/x.png": RGB}, "class cat has no image left"),
    (dict.fromkeys(["ant/0.heic", "bee/0.heic"], b"x"), "no pictures in the folders ant, bee"),
    ({**GOOD, "train/ant/2.png": b"no picture"}, "1 of 9 pictures: .*ant/2.png cannot be used"),
    ({**GOOD, **{f"train/bee/{n}.jpg": b"x" for n in range(2, 9)}},
     "7 of 15 pictures: .*2.jpg .*3.jpg .*4.jpg .*5.jpg .*6.jpg((?!7.jpg).)*$"),
    ({**GOOD, "train/ant/2.tif": np.ones((16, 16), np.float32)}, "2.tif .* more than 8 bits"),
    ({**GOOD, "train/cat": "ant", "test/cat": "ant"}, "links give a picture more than once"),
    ({"ant/0.png": RGB, "ant/1.png": RGB, "ant/2.png": RGB, "bee/0.png": RGB},
     "folder: class bee has no image left")])
def test_folders_that_are_refused_in_one_line(files, says, tmp_path):
    with pytest.raises(SystemExit, match=says) as stop:
        common.run_script(lambda: load("folder", tree(tmp_path, files)))
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("val, more", [
    ("val/{}/{}.png", {}), ("val/images/{}/{}.png", {}), ("val/{}/images/{}.png", {}),
    ("val/{}/{}.png", {"val/val_annotations.txt": b"0.png\tant\n"}),
    ("val/images/{}/{}.png", {"val/val_annotations.txt": b"0.png\tant\n\n"}),
    ("val/{}/{}.png", {"val/images/README": b"moved"}),
    ("val/images/{}{}.png", {"val/val_annotations.txt": b"ant0.png\tant\t1\nbee0.png\tbee\n\n"})])
def test_tiny_imagenet_as_the_usual_scripts_leave_it(val, more, tmp_path):
    """val/ as it comes, or sorted into classes: then these count, whatever else was left."""
    pictures = {val.format(name, 0): RGB for name in ("ant", "bee")}
    data = load("tinyimagenet", tree(tmp_path, {**split("train"), **pictures, **more}))
    assert data.test.labels.tolist() == [0, 1] and len(data.train) == 4


@pytest.mark.parametrize("no_flip", [False, True])
def test_classes_that_are_mirror_images(no_flip, tmp_path, capsys):
    """--no-flip keeps them apart; what changes the pixels is printed."""
    bright = np.zeros((16, 16, 3), np.uint8)
    bright[:, :8] = 255
    data = load("folder", tree(tmp_path, {
        f"{part}/{name}/{n}.png": picture for part in ("train", "test") for n in range(20)
        for name, picture in (("left", bright), ("right", bright[:, ::-1]))}), no_flip=no_flip)
    images, labels = next(data.train.augmented(40, torch.Generator().manual_seed(0)))
    left = images[..., :8].mean((1, 2, 3)) > images[..., -8:].mean((1, 2, 3))
    assert ((labels == 0) == left).all() == no_flip
    said = "a random crop, no flip" if no_flip else "a random flip (--no-flip: none)"
    assert said in capsys.readouterr().out


def see_through(mode="RGBA"):
    """Left half opaque, right half transparent, whatever colours lie below."""
    alpha = np.repeat([[255] * 8 + [0] * 8], 16, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([RGB, alpha])).convert(mode)


def turned():
    """Stored lying on its side; EXIF's orientation 6 says: turn it clockwise."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.fromarray(np.rot90(RGB).copy()).save(file, "png", exif=exif)
    return file.getvalue()


def test_kinds_of_pictures(tmp_path):
    """Pixels as written, grey three times, alpha over white; other sizes bilinear, 32 unless told.
    """
    opaque, large = np.arange(16)[:, None] < 8, pixels(24, 40, 3)
    grey = GREY[..., None].repeat(3, 2)
    palette = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.info["transparency"] = 1
    kinds = [
        ("png", RGB, RGB), ("pgm", GREY, grey), ("gif", GREY, grey), ("png", turned(), RGB),
        ("JPG", np.full_like(RGB, 99), np.full_like(RGB, 99)),
        ("png", see_through(), np.where(opaque, RGB, 255)),
        ("png", see_through("LA"), np.where(opaque, grey, 255)),
        ("png", palette, np.where(np.arange(16)[:, None] % 2, 255, [10, 20, 30]) + 0 * RGB),
        ("png", large, np.asarray(Image.fromarray(large).resize((16, 16), Image.BILINEAR))),
        ("tif", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), [255, 0, 0] + 0 * RGB)]
    tree(tmp_path, {f"train/ant/{n + 10}.{ending}": picture
                    for n, (ending, picture, _) in enumerate(kinds)})
    tree(tmp_path, {"train/bee/0.png": RGB, "test/ant/0.png": RGB, "test/bee/0.png": 255 - RGB})
    data = load("folder", tmp_path, image_size=16)
    for (ending, _, expected), image in zip(kinds, data.train.images.movedim(1, 3).numpy()):
        difference = np.abs(image.astype(int) - expected).max()
        assert difference <= (3 if ending == "JPG" else 0), ending
    assert data.train.labels.tolist() == [0] * len(kinds) + [1]
    assert data.test.labels.tolist() == [0, 1] and data.image_size == 16
    scaled = data.train.images.numpy().astype(np.float64) / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-5)
    assert data.std == pytest.approx(scaled.std((0, 2, 3), ddof=1), abs=1e-5)
    assert load("folder", tmp_path).train.images.shape[1:] == (3, 32, 32)


def test_imagenets_pictures_are_as_they_are_but_not_deep(tmp_path):
    """Neither turned nor laid over white, as the field reads them; deep grey is refused too."""
    tree(tmp_path, {"0.png": turned(), "1.png": see_through(), "2.png": np.ones((9, 9), np.uint16)})
    one, two = (common.open_picture(tmp_path / f"{n}.png", plain=True) for n in (0, 1))
    assert np.array_equal(one, np.rot90(RGB)) and np.array_equal(two, RGB)
    with pytest.raises(OSError, match="2.png cannot be used: its pixels have more than 8 bits"):
        common.open_picture(tmp_path / "2.png", plain=True)


# --------------------------------------------------------------------- faults of disk and machine
@pytest.mark.parametrize("error, says", [
    (OSError(28, "No space left on device", "runs/x"), "[Errno 28] No space left on device: "
     "'runs/x'"), (OSError("Traceback of a worker\n  line 3\nOSError: x"), "OSError: x"),
    (MemoryError(), "MemoryError")])
def test_faults_are_one_line(error, says):
    with pytest.raises(SystemExit) as stop:
        common.run_script(Mock(side_effect=error))
    assert stop.value.code == says  # a text: Python prints it alone, and exits with code 1


class Written(list):
    """All that print needs."""
    write = list.append


@pytest.mark.parametrize("script, method, output", [
    ("rco", "kd", Written()), ("rco", "kd", None),
    ("tst", "TST --fit-steps 1 --search-at 0 --search-epochs 1", Written())])
def test_output_may_go_to_any_object_with_write(script, method, output, run, tmp_path, monkeypatch):
    """As in IDLE, under Jupyter's %run, in a logger, or, None, in pythonw."""
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", f"{script}.py --device cpu --method {method} --epochs 2 "
                        f"--teacher resnet8 --image-size 8 --out {tmp_path} --cache {run.cache}"
                        .split())
    monkeypatch.setattr(common, "SHAPES_TRAIN", 1300)  # more than 20 steps
    common.run_script(sys.modules[script].main)
    assert output is None or "last-epoch test accuracy" in "".join(output)
    assert method[:3] in (tmp_path / "table.txt").read_text()


IMPORTED = """
import os, random, signal, sys, warnings
import numpy, torch, torchvision
def world():
    return (sys.excepthook, signal.getsignal(signal.SIGINT), sys.stdout.errors, dict(os.environ),
            torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
            torch.get_num_threads(), torch.get_default_dtype(), [*warnings.filters])
sys.argv[:] = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
before = world()
import common, letkd, rco, switokd, trikd, tst
import tst_detection, tst_segmentation
assert world() == before and sys.excepthook is sys.__excepthook__
common.run_script(lambda: (print("1 ± 0"), os.kill(os.getpid(), signal.SIGINT)))
"""


def test_importing_changes_nothing_and_ctrl_c_is_one_line(tmp_path):
    """A terminal without ± shows "?"."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii",
                                          "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'docs'}"})
    assert (done.returncode, done.stdout) == (1, "1 ? 0\n")
    assert done.stderr == "\nstopped; the same command goes on after the last closed epoch\n"


def test_the_readmes_loading_lines_classify_one_picture(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    green = np.zeros_like(RGB) + np.uint8([40, 200, 40])
    tree(tmp_path / "data", {f"{part}/{name}/{n}.png": picture - np.uint8(n)
                             for part in ("train", "test") for n in range(30)
                             for name, picture in (("ant", 255 - green), ("bee", green))})
    run("rco", "runs/rco-shapes", f"--dataset folder --data {tmp_path}/data --image-size 16 "
        "--method eei --anchors 1 --epochs 6 --batch-size 6")
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, picture in (("ant", 255 - green), ("bee", green)):
        Image.fromarray(picture).resize((40, 30)).save("picture.png")
        exec(block, {})
        assert capsys.readouterr().out.strip() == name
