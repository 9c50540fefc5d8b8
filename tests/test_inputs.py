"""Inputs of the outside world: each case with the line or the value that it must give.

Flags of the five scripts, teachers' files, folders of pictures, faults of machine and disk.
"""

import os
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, folder_of, refused, result_of, shapes_data
from PIL import Image
from test_data import load, pixels, tree
from torch import nn

import common
import rco
import switokd

CPU, RGB = torch.device("cpu"), pixels(16, 16, 3)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


# ----------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("script, flags, says", [
    ("letkd", "--mean 0.5 0.5 0.5", "--mean and --std go together"),
    ("tst", "--std 0.5 0.5 0.5", "--mean and --std go together"),
    ("trikd", "--mean 0 0 0 --std 1 0 1", "argument --std: 0 does not lie from 0.001 to 1e+09"),
    ("trikd", "--mean 0 0 2 --std 1 1 1", "argument --mean: 2 does not lie from 0 to 1"),
    ("rco", "--learning-rate nan", "nan does not lie from"), ("tst", "--weight-decay inf", "inf"),
    ("switokd", "--epochs 0", "0 does not lie from 1"), ("rco", "--epochs x", "invalid int value"),
    ("rco", "--seed 99999999999999999999", "does not lie from 0 to 1e+09"),
    ("switokd", "--weight 2", "unrecognized arguments: --weight 2"),
    ("letkd", "--epoch 2", "unrecognized arguments: --epoch 2"),  # no flag is shortened
    ("letkd", "--teacher-weights a.pt b.pt", "unrecognized arguments: b.pt"),
    ("rco", "--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("trikd", "--method none", "argument --method: invalid choice: 'none'"),
    ("rco", "--out ", "argument --out: expected one argument")])
def test_bad_flags_are_one_line(script, flags, says, capsys):
    assert says in refused(script, flags, capsys)


@pytest.mark.parametrize("name", ["alexnet", "resnet9", "resnet8y4", "resnet8x0.01", "resnet18x2"])
def test_a_network_that_there_is_not(name):
    for parse, flags in ((rco.parse_args, ["--student", name]),
                         (switokd.parse_args, ["--teacher", name])):
        with pytest.raises(common.InputError, match=f"^no network is called '{name}'.*resnet8x4"):
            parse(flags)


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


class Pickled(nn.Linear):
    """A module that somebody pickled whole."""


def swapped(key):
    """Other names, in which the mean of a batch norm stands where its bias should."""
    name = {"bias": "running_mean", "running_mean": "bias"}.get(key.split(".")[-1])
    return f"x.{key.rpartition('.')[0]}.{name}" if name else f"x.{key}"


DAMAGED = "is damaged or holds more than a dict of tensors"


@pytest.mark.parametrize("content, says", [
    (lambda s: Pickled(2, 2), DAMAGED), (lambda s: {"model": s, "acc": np.float64(3)}, DAMAGED),
    (lambda s: (60).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}}', DAMAGED),  # safetensors
    (lambda s: b"", DAMAGED), (lambda s: b"PK\3\4 and no more", DAMAGED),
    (lambda s: [1, 2], DAMAGED), (lambda s: b"<html>not found</html>", DAMAGED),
    (lambda s: {"epoch": 3}, "it has 0 tensors"),
    (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "it has 0 tensors"),
    (lambda s: {k: v * float("nan") for k, v in s.items()}, "weights that are not finite"),
    (lambda s: renamed(s, swapped), "does not hold the weights of this network"),
    (lambda s: without(s, "head"), "has 45 tensors, expected are 47; ('head.bias', ('bias', 20))"),
    (lambda s: common.build_model("resnet8", 10).state_dict(), "('head.bias', ('bias', 10))"),
    (lambda s: common.build_model("resnet14", 20).state_dict(), "it has 77 tensors")])
def test_a_file_that_is_no_teacher_is_one_line_and_kept(content, says, teacher, tmp_path):
    content, path = content(teacher.state_dict()), tmp_path / "t.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(common.InputError) as error:
        common.load_weights(common.build_model("resnet8", 20, 16), path)
    assert str(error.value).startswith(str(path)) and says in str(error.value)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_a_given_teachers_accuracy_is_printed(run, tmp_path, teacher, capsys):
    """Near chance with a warning; --mean and --std reach the images; its content names the run."""
    poor, good, mean, std = tmp_path / "poor.pt", tmp_path / "good.pt", [0.3] * 3, [0.2] * 3
    torch.save(teacher.state_dict(), poor)
    run("rco", tmp_path, "--method kd --epochs 6 --learning-rate 0.2 --batch-size 20")
    good.write_bytes(next(run.cache.glob("shapes-resnet8-6-*/epoch-0006.pt")).read_bytes())
    data, cpu = shapes_data(mean=mean, std=std), Namespace(device=CPU, precision="fp32")
    for path, near_chance in ((good, False), (poor, True)):
        network, accuracy = common.load_frozen("resnet8", path, data, cpu)
        right = network((data.test.images / 255 - 0.3) / 0.2).argmax(1) == data.test.labels
        printed = capsys.readouterr().out
        assert accuracy == pytest.approx(100 * right.double().mean().item())
        assert f"{path}: resnet8, {accuracy:.2f} % on the test images\n" in printed
        assert ("warning: that is near chance (" in printed) == near_chance
    (tmp_path / "same.pt").write_bytes(good.read_bytes())
    for name, folders in (("good", 1), ("same", 1), ("poor", 2)):
        run("rco", tmp_path / "a", f"--method kd --epochs 1 --teacher-weights {tmp_path}/{name}.pt")
        assert len([*(tmp_path / "a").glob("kd-*")]) == folders
    with pytest.raises(SystemExit, match="No such file or directory: '.*/none.pt'"):
        common.run_script(lambda: common.load_frozen("resnet8", tmp_path / "none.pt", data, cpu))


# --------------------------------------------------------------------------- folders of pictures
def split(*parts, classes=("ant", "bee"), count=2):
    return {f"{part}/{name}/{n}.png": RGB for part in parts for name in classes
            for n in range(count)}


GOOD = split("train", "test")


@pytest.mark.parametrize("more, left", [
    ({"train/.DS_Store": b"x", "train/ant/.hidden.png": b"x", "train/__MACOSX/ant/._0.png": b"x",
      "train/ant/@eaDir/0.png": b"x", "test/bee/Thumbs.db": b"x", "train/.git/x.png": b"x"}, {}),
    ({"train/ant/a.heic": b"x", "train/bee/b.HEIC": b"x", "test/ant/c.jpg_large": b"x",
      "test/bee/README": b"x", "train/stray.png": RGB, "val/ant/0.bmp": RGB},
     {".heic": "2", ".jpg_large": "1", "no ending": "1", ".png": "1", ".bmp": "1"})])
def test_what_a_folder_may_hold_besides(more, left, tmp_path, capsys):
    """Of test/ and val/ the test part is test/; what is not read is counted, but hidden files."""
    data, printed = load("folder", tree(tmp_path, {**GOOD, **more})), capsys.readouterr().out
    assert len(data.train) == len(data.test) == 4 and data.names == ["ant", "bee"]
    assert dict(re.findall(r"'([^']+)': (\d+)", printed.partition("left out")[2])) == left


LAYOUT = "no classes .*; the layout is DIR/train/CLASS"


@pytest.mark.parametrize("files, says", [
    (split("training", "testing"), LAYOUT), (split("Train", "Valid"), LAYOUT),
    (split("2019", "2020"), LAYOUT), (split("seg_train", "seg_test", "seg_pred"), LAYOUT),
    ({"trainA/0.png": RGB, "testA/0.png": RGB, "trainB/0.png": RGB}, LAYOUT),
    (split("bottle/train", "bottle/test", "cable/train"), LAYOUT), (split("train"), LAYOUT),
    (split("train", "test", classes=["ant"]), LAYOUT), ({"train/0.png": RGB}, LAYOUT),
    ({**split("train"), **split("test", classes=("ant", "cat"))}, "class bee is not in both"),
    ({**GOOD, "train/cat/x.txt": b"x", "test/cat/x.png": RGB}, "no valid file for the classes cat"),
    ({**GOOD, "train/ant/2.png": b"no picture"}, "ant/2.png cannot be used: cannot identify"),
    ({**GOOD, "train/ant/2.tif": np.ones((16, 16), np.float32)}, "2.tif .* more than 8 bits"),
    ({**GOOD, "test/bee/2.png": np.ones((16, 16), np.uint16)}, "2.png .* more than 8 bits"),
    ({"ant/0.png": RGB, "ant/1.png": RGB, "ant/2.png": RGB, "bee/0.png": RGB},
     "folder: class bee has no image left"), ({}, LAYOUT),
    ({**split("train"), "test/0.png": RGB}, "class ant is not in both train/ and test/")])
def test_folders_that_are_refused_in_one_line(files, says, tmp_path):
    with pytest.raises(SystemExit, match=says) as stop:
        common.run_script(lambda: load("folder", tree(tmp_path, files)))
    assert "\n" not in stop.value.code


def see_through(mode="RGBA"):
    """Left half opaque, right half transparent, whatever colours lie below."""
    alpha = np.repeat([[255] * 8 + [0] * 8], 16, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([RGB, alpha])).convert(mode)


def with_info(picture, **saved):
    picture.saved = saved
    return picture


def turned():
    """Stored lying on its side; EXIF's orientation 6 says: turn it clockwise."""
    exif = Image.Exif()
    exif[274] = 6
    return with_info(Image.fromarray(np.rot90(RGB).copy()), exif=exif)


def palette():
    """Two colours in turn, the second of them transparent."""
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2).convert("P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    return with_info(picture, transparency=1)


def test_kinds_of_pictures(tmp_path):
    """Pixels as written, grey three times, alpha over white; other sizes bilinear, 32 unless told.
    """
    opaque, large = np.arange(16)[:, None] < 8, pixels(24, 40, 3)
    grey = GREY[..., None].repeat(3, 2)
    kinds = [
        ("png", RGB, RGB), ("bmp", RGB, RGB), ("pgm", GREY, grey), ("gif", GREY, grey),
        ("jpeg", np.full_like(RGB, 40), np.full_like(RGB, 40)),
        ("JPG", np.full_like(RGB, 99), np.full_like(RGB, 99)), ("png", turned(), RGB),
        ("png", see_through(), np.where(opaque, RGB, 255)),
        ("png", see_through("LA"), np.where(opaque, grey, 255)),
        ("png", palette(), np.where(np.arange(16)[:, None] % 2, 255, [10, 20, 30]) + 0 * RGB),
        ("png", large, np.asarray(Image.fromarray(large).resize((16, 16), Image.BILINEAR)))]
    for mode, ending in (("1", "png"), ("P", "png"), ("CMYK", "tif")):
        picture = Image.fromarray(RGB).convert(mode)
        kinds.append((ending, picture, np.asarray(picture.convert("RGB"))))
    tree(tmp_path, {f"train/ant/{n + 10}.{ending}": picture
                    for n, (ending, picture, _) in enumerate(kinds)})
    tree(tmp_path, {"train/bee/0.png": RGB, "test/ant/0.png": RGB, "test/bee/0.png": 255 - RGB})
    data = load("folder", tmp_path, image_size=16)
    for (ending, _, expected), image in zip(kinds, data.train.images.movedim(1, 3).numpy()):
        difference = np.abs(image.astype(int) - expected).max()
        assert difference <= (3 if ending in ("jpeg", "JPG") else 0), ending
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


def test_other_test_images_are_another_run(tmp_path):
    facts = load("folder", tree(tmp_path, {**GOOD, "test/ant/2.png": 255 - RGB})).facts
    (tmp_path / "test/ant/2.png").rename(tmp_path / "test/bee/2.png")
    assert load("folder", tmp_path).facts["fingerprint"] != facts["fingerprint"]


# --------------------------------------------------------------------- faults of disk and machine
@pytest.mark.parametrize("error, says", [
    (KeyboardInterrupt(), "\nstopped; the same command goes on after the last closed epoch"),
    (OSError(28, "No space left on device", "runs/x"), "[Errno 28] No space left on device: "
     "'runs/x'"), (OSError("Traceback of a worker\n  line 3\nOSError: x"), "OSError: x"),
    (MemoryError(), "MemoryError"), (common.InputError("mend it"), "mend it")])
def test_faults_are_one_line(error, says):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    assert stop.value.code == says  # a text: Python prints it alone, and exits with code 1


IMPORTED = """
import os, random, signal, sys, warnings
import numpy, torch, torchvision
def world():
    return (sys.excepthook, signal.getsignal(signal.SIGINT), sys.stdout.errors, dict(os.environ),
            torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
            torch.get_num_threads(), torch.get_default_dtype(), [*warnings.filters])
before = world()
import common
assert world() == before and sys.excepthook is sys.__excepthook__
common.run_script(lambda: os.kill(os.getpid(), signal.SIGINT))
"""
CLOSED = """
import common
def main():
    while True:
        print("1 ± 0", flush=True)
common.run_script(main)
"""


def test_importing_changes_nothing_and_ctrl_c_and_a_closed_pipe_are_one_line():
    """A terminal without ± shows "?"."""
    imported, closed = (subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}) for code in (IMPORTED, CLOSED))
    assert closed.stdout.readline() == "1 ? 0\n"
    closed.stdout.close()
    assert (closed.stderr.read(), closed.wait()) == ("[Errno 32] Broken pipe\n", 1)
    printed, error = imported.communicate()
    assert error == "\nstopped; the same command goes on after the last closed epoch\n"
    assert (printed, imported.returncode) == ("", 1)


def test_the_readmes_loading_lines_classify_one_picture(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    green = np.zeros_like(RGB) + np.uint8([40, 200, 40])
    tree(tmp_path / "data", {f"{part}/{name}/{n}.png": picture - np.uint8(n)
                             for part in ("train", "test") for n in range(30)
                             for name, picture in (("ant", 255 - green), ("bee", green))})
    run("rco", "runs/rco-shapes", f"--dataset folder --data {tmp_path}/data --image-size 16 "
        "--method eei --anchors 1 --epochs 6 --batch-size 6")
    facts = result_of(folder_of("runs/rco-shapes", "eei"))["arguments"]["data"]
    assert facts["classes"] == ["ant", "bee"] and facts["image_size"] == 16
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, picture in (("ant", 255 - green), ("bee", green)):
        Image.fromarray(picture).resize((40, 30)).save("picture.png")
        exec(block, {})
        assert capsys.readouterr().out.strip() == name
