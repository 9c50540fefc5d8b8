"""Inputs of the outside world: each case with the line or the value that it must give.

Flags of the five scripts, teachers' files, folders of pictures, faults of machine and disk.
"""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, log, refused, result_of, same, shapes_data, table, weights
from PIL import Image
from torch import nn

import common
import rco

RGB = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
DEEP = np.arange(256, dtype=np.uint16).reshape(16, 16)  # grey


# ----------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("script, flags, says", [
    ("rco", "--data x", "--data has no effect here: it belongs to a --dataset that is read"),
    ("tst", "--dataset cifar10 --image-size 16", "--image-size has no effect here"),
    ("switokd", "--workers 2", "--workers has no effect here: it belongs to imagenet"),
    ("letkd", "--mean 0.5 0.5 0.5", "--mean and --std go together"),
    ("letkd", "--std 0.5 0.5 0.5", "--mean and --std go together"),
    ("trikd", "--mean 0 0 0 --std 1 0 1", "--std must be at least 0.001"),
    ("trikd", "--train-fraction 1e-9", "must be at least 1e-06"),
    ("trikd", "--peer none --anchor-on teacher", "--anchor-on has no effect here"),
    ("trikd", "--peer finished --label-weight 3 1", "--label-weight: one value"),
    ("letkd", "--supervision none --rows 9", "--rows has no effect here"),
    ("switokd", "--weight 2", "unrecognized arguments: --weight 2"),
    ("trikd", "--mean 0 0 2 --std 1 1 1", "2 must be at least 0 and at most 1"),
    ("rco", "--out ", "--out: expected one argument"),
    ("rco", "--seed 99999999999999999999", "at most 1000000000"),
    ("rco", "--epochs 10000000", "at most 1000000"),
    ("rco", "--threshold 0.5", "--threshold has no effect here: it belongs to --strategy greedy"),
    ("rco", "--hint-weight 2", "--hint-weight has no effect here: it belongs to --transfer hint"),
    ("rco", "--transfer mimic --weight 2", "--weight has no effect here"),
    ("rco", "--transfer mimic --temperature 2", "--temperature has no effect here"),
    ("rco", "--stages 2", "--stages has no effect here: it belongs to --strategy kd"),
    ("rco", "--strategy one-stage --stage-epochs 3", "--stage-epochs has no effect here")])
def test_flags(script, flags, says, capsys):
    assert says in refused(script, flags, capsys)


@pytest.mark.parametrize("flag", ["--out", "--data", "--cache"])
def test_an_empty_name_is_not_the_current_folder(flag, capsys):
    with pytest.raises(SystemExit):
        rco.parse_args([flag, ""])
    assert f"argument {flag}: the name is empty" in capsys.readouterr().err


def test_compile_that_cannot_work_ends_and_slow_bf16_goes_on_with_a_line(monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler\nlong story")
    monkeypatch.setattr(torch, "compile", no_compiler)
    line = refused("tst", "--device cpu --compile", capsys)
    assert "torch.compile does not work on this machine (No working C++ compiler)" in line
    for flags, says in (("avx2", "slow here"), ("avx2 avx512_bf16", ""), ("asimd bf16", "")):
        monkeypatch.setattr(common.Path, "exists", lambda _: True)
        monkeypatch.setattr(common.Path, "read_text", lambda _, flags=flags: f"flags: {flags}")
        assert rco.parse_args(["--device", "cpu", "--precision", "bf16"]).precision == "bf16"
        printed = capsys.readouterr().out
        assert says in printed and bool(printed) == bool(says)


# ------------------------------------------------------------------------------- teachers' files
def renamed(state, name):
    return {name(key): value for key, value in state.items()}


def without(state, word):
    return {key: value for key, value in state.items() if word not in key}


FORMS = {  # what people have: a function of the plain state dict
    "plain": lambda s: s,
    "RepDistiller": lambda s: {"epoch": 240, "model": s, "best_acc": torch.tensor(70.0)},
    "lightning": lambda s: {"state_dict": s, "epoch": 3},
    "net": lambda s: {"net": s, "acc": 70.0},
    "student": lambda s: {"student": s},
    "DataParallel": lambda s: renamed(s, lambda key: "module." + key),
    "compiled": lambda s: renamed(s, lambda key: "_orig_mod." + key),
    "both": lambda s: {"model": renamed(s, lambda key: "module._orig_mod." + key)},
    "both, turned": lambda s: {"model": renamed(s, lambda key: "_orig_mod.module." + key)},
    "timm's EMA": lambda s: {"state_dict": renamed(s, lambda key: key + "x"), "state_dict_ema": s},
    "another EMA": lambda s: {"model": {k: 0 * v for k, v in s.items()}, "model_ema": s},
    "teacher and student": lambda s: {"student": renamed(s, str.upper), "teacher": s},
    "an average without tensors": lambda s: {"ema": {"decay": 0.9}, "model": s},
    "wrapped twice": lambda s: {"state_dict": {"model": s}},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **renamed(s, "module.{}".format)},
    "half": lambda s: {key: value.half() for key, value in s.items()},
    "before num_batches_tracked": lambda s: without(s, "num_batches"),
    "other names": lambda s: {f"{n}.{k.split('.')[-1]}": s[k] for n, k in enumerate(s)},
    "other names, wrapped": lambda s: {"model": {
        f"features.{n}": v for n, v in enumerate(without(s, "num_batches").values())}},
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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvisions_own_files(name, tmp_path):
    from torchvision import models
    theirs = getattr(models, name)(num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "t.pt")
    ours = common.load_weights(common.build_model(name, 10, 224), tmp_path / "t.pt").eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


class Pickled(nn.Linear):
    """A module that somebody pickled whole."""


def endless():
    state = {}
    state["model"] = state
    return state


def swapped(key):
    """Other names, in which the mean of a batch norm stands where its bias should."""
    name = {"bias": "running_mean", "running_mean": "bias"}.get(key.split(".")[-1])
    return f"x.{key.rpartition('.')[0]}.{name}" if name else f"x.{key}"


def write(path, value):
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)


@pytest.mark.parametrize("content, says", [
    (lambda s: Pickled(2, 2), "holds more than tensors; if you trust it, re-save it in Python"),
    (lambda s: {"model": s, "acc": np.float64(3)}, "holds more than tensors"),
    (lambda s: (60).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}}', "is a safetensors file"),
    (lambda s: b"", "is damaged, or no file of torch.save"),
    (lambda s: b"PK\3\4 and no more", "is damaged, or no file of torch.save"),
    (lambda s: [1, 2], "it has 0 tensors, such as none"),
    (lambda s: {"epoch": 3}, "it has 0 tensors"), (lambda s: endless(), "it has 0 tensors"),
    (lambda s: b"<html>not found</html>", "is damaged, or no file of torch.save"),
    (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "it has 0 tensors"),
    (lambda s: {k: v * float("nan") for k, v in s.items()}, "weights that are not finite"),
    (lambda s: renamed(s, swapped), "does not hold the weights"),
    (lambda s: without(s, "head"), "expected are 47, such as head.weight (20, 64)"),
    (lambda s: common.build_model("resnet8", 10).state_dict(), "such as head.weight (10, 64)"),
    (lambda s: common.build_model("resnet14", 20).state_dict(), "it has 77 tensors"),
    (lambda s: renamed(common.build_model("resnet8", 10).state_dict(), "x.{}".format),
     "it has 47 tensors, such as x.stem.0.weight (16, 3, 3, 3), x.stem")])
def test_a_file_that_is_no_teacher_is_refused_and_kept(content, says, teacher, tmp_path):
    write(tmp_path / "t.pt", content(teacher.state_dict()))
    before = (tmp_path / "t.pt").read_bytes()
    with pytest.raises(common.InputError) as error:
        common.load_weights(common.build_model("resnet8", 20, 16), tmp_path / "t.pt")
    assert says in str(error.value) and "remove" not in str(error.value)
    assert (tmp_path / "t.pt").read_bytes() == before


@pytest.mark.parametrize("content", [
    lambda s: {"net": s, "acc": np.float64(3)}, lambda s: common.build_model("resnet8", 20, 16)])
def test_the_printed_lines_re_save_a_file(content, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(teacher.state_dict()), "t.pt")
    with pytest.raises(common.InputError) as error:
        common.load_file("t.pt")
    exec(str(error.value).split("in Python: ")[1], {"torch": torch})
    common.load_weights(common.build_model("resnet8", 20, 16), "plain.pt")


@pytest.mark.parametrize("make", [lambda path: None, os.mkfifo, os.mkdir])
def test_a_teacher_that_is_not_there_or_no_file(make, tmp_path):
    make(tmp_path / "t.pt")
    with pytest.raises(common.InputError, match="t.pt: no such file"):
        common.load_file(tmp_path / "t.pt")


def test_a_given_teachers_accuracy_and_normalisation_are_printed(run, tmp_path, teacher):
    """Near chance with a warning; a trained one without; --mean and --std reach the images."""
    torch.save(teacher.state_dict(), tmp_path / "poor.pt")
    run("rco", tmp_path / "a", "--strategy kd --epochs 6 --learning-rate 0.2 --batch-size 20")
    good = next(run.cache.glob("shapes-resnet8-6-*/epoch-0006.pt"))
    flags = "--strategy kd --epochs 1 --teacher-weights"
    assert "near chance" not in run("rco", tmp_path / "b", f"{flags} {good}")
    printed = run("rco", tmp_path / "c", f"{flags} {tmp_path}/poor.pt")
    assert "warning: that is near chance (" in printed and "order of the classes" in printed

    mean, std = [0.25, 0.5, 0.75], [0.5, 0.25, 0.125]
    printed = run("rco", tmp_path / "d", f"{flags} {good} --mean 0.25 0.5 0.75 --std 0.5 0.25 "
                  "0.125")
    network = common.load_weights(common.build_model("resnet8", 20, 16), good).eval()
    test, (low, wide) = shapes_data().test, torch.tensor([mean, std]).view(2, 3, 1, 1)
    right = 100 * (network((test.images / 255 - low) / wide).argmax(1) == test.labels).double()
    assert (f"{good}: resnet8, {right.mean():.2f} % on the test images, normalised by mean {mean}, "
            f"standard deviation {std}") in printed
    facts = result_of(tmp_path / "d")["arguments"]["data"]
    assert (facts["mean"], facts["std"]) == (mean, std)


def test_resume_looks_at_the_content_of_a_teachers_file(run, tmp_path, teacher):
    torch.save(teacher.state_dict(), tmp_path / "a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    torch.save(common.build_model("resnet8", 20, 16).state_dict(), tmp_path / "c.pt")
    flags = "--strategy kd --epochs 1 --teacher-weights {}/{}.pt --resume"
    run("rco", tmp_path / "out", flags.format(tmp_path, "a"))
    run("rco", tmp_path / "out", flags.format(tmp_path, "b"))  # the same file in another place
    with pytest.raises(common.InputError, match="is of another run: teacher_weights was"):
        run("rco", tmp_path / "out", flags.format(tmp_path, "c"))


# --------------------------------------------------------------------------- folders of pictures
def tree(root, files):
    """Write {"train/ant/0.png": picture}: an array, a PIL image, bytes, or None for RGB."""
    for name, picture in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            picture = RGB if picture is None else picture
            picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            picture.save(path, **getattr(picture, "saved", {}))
    return root


def split(*parts, classes=("ant", "bee"), count=2):
    return {f"{part}/{name}/{n}.png": None for part in parts for name in classes
            for n in range(count)}


def folder(root, name="folder", **flags):
    return shapes_data(dataset=name, data=root, batch_size=1, image_size=16, **flags)


GOOD = split("train", "test")


@pytest.mark.parametrize("more, says", [
    ({"train/.DS_Store": b"x", "train/ant/.hidden.png": b"x", "train/__MACOSX/ant/._0.png": b"x",
      "train/ant/@eaDir/0.png": b"x", "test/bee/Thumbs.db": b"x"}, None),
    ({"train/ant/a.heic": b"x", "train/bee/b.HEIC": b"x", "test/ant/c.jpg_large": b"x",
      "test/bee/README": b"x", "train/stray.png": None},
     "left out 5 files: .heic 2, .png 1, .jpg_large 1, no ending 1"),
    ({"val/ant/0.png": None, "val/bee/0.png": None}, "test/ is the test part, val/ is not read")])
def test_what_a_folder_may_hold_besides(more, says, tmp_path, capsys):
    data, printed = folder(tree(tmp_path, {**GOOD, **more})), capsys.readouterr().out
    assert len(data.train) == len(data.test) == 4 and data.names == ["ant", "bee"]
    assert (says in printed) if says else "left out" not in printed
    assert "2 classes (ant to bee)" in printed


def test_links_are_followed_and_a_loop_ends(tmp_path, capsys):
    tree(tmp_path / "other", {"x.png": None, "deep/y.png": None})
    root = tree(tmp_path / "data", GOOD)
    (root / "train/cat").symlink_to(tmp_path / "other")
    (root / "test/cat").symlink_to(tmp_path / "other/deep")
    (tmp_path / "other/deep/up").symlink_to(tmp_path / "other")
    data = folder(root)
    assert (len(data.train), len(data.test), data.names[2]) == (6, 6, "cat")
    assert "left out" in capsys.readouterr().out  # the link that goes back up


@pytest.mark.parametrize("files, says", [
    (split("training", "testing"), "testing, training look like parts"),
    (split("Train", "Valid"), "look like parts of a data set, not like classes; the layout is"),
    (split("2019", "2020"), "2019, 2020 look like parts"),
    (split("seg_train", "seg_test", "seg_pred"), "look like parts"),
    ({"trainA/0.png": None, "testA/0.png": None, "trainB/0.png": None}, "look like parts"),
    (split("bottle/train", "bottle/test", "cable/train"), "look like parts"),
    (split("train"), "has train/ but neither test/ nor val/"),
    (split("train", "test", classes=["ant"]), "needs at least 2 class folders, it has 1"),
    ({**split("train"), **split("test", classes=("ant", "cat"))}, "class bee is not in both"),
    ({**GOOD, "train/cat/x.txt": b"x", "test/cat/x.png": None}, "class .*train/cat has no image"),
    ({**split("train", "test"), "train/ant/2.png": b"no picture"}, "2.png cannot be read"),
    ({**GOOD, "train/ant/2.tif": np.ones((16, 16), np.float32)}, "its pixels are floats"),
    ({**GOOD, "train/ant/2.tif": np.full((16, 16), 70000, np.int32)}, "grey from 70000 to 70000")])
def test_folders_that_are_refused(files, says, tmp_path):
    with pytest.raises(common.InputError, match=says):
        folder(tree(tmp_path, files))


def test_a_missing_class_is_named_not_numbered(tmp_path):
    with pytest.raises(common.InputError, match="folder: class bee has no image left to train on"):
        folder(tree(tmp_path, {"ant/0.png": None, "ant/1.png": None, "bee/0.png": None,
                               "ant/2.png": None}), validation=0.5)


def kind(mode, saved=None, **info):
    """A picture of another mode, made from RGB."""
    image = Image.fromarray(RGB).convert(mode)
    image.saved = saved or {}
    return image


def see_through():
    """Left half opaque, right half transparent, whatever colours lie below."""
    alpha = np.repeat([[255] * 8 + [0] * 8], 16, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([RGB, alpha]))


def turned():
    """Stored lying on its side; EXIF's orientation 6 says: turn it clockwise."""
    image = Image.fromarray(np.rot90(RGB).copy())
    exif = image.getexif()
    exif[274] = 6
    image.saved = {"exif": exif}
    return image


ON_WHITE = np.where(np.arange(16)[None, :, None] < 8, RGB, 255)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


@pytest.mark.parametrize("picture, expected", [
    (see_through(), ON_WHITE), (see_through().convert("LA"), np.where(
        np.arange(16) < 8, GREY, 255)[..., None].repeat(3, 2)),
    (kind("L"), GREY[..., None].repeat(3, 2)), (turned(), RGB), (kind("1"), None),
    (kind("P"), None), (kind("CMYK"), None)])
def test_kinds_of_pictures(picture, expected, tmp_path):
    ending = "tif" if picture.mode == "CMYK" else "png"
    root = tree(tmp_path, {**GOOD, f"train/ant/2.{ending}": picture})
    found = folder(root).train.images[2].permute(1, 2, 0).numpy()
    expected = np.asarray(picture.convert("RGB")) if expected is None else expected
    assert np.array_equal(found, expected)


def test_a_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.saved = {"transparency": 1}
    found = folder(tree(tmp_path, {**GOOD, "train/ant/2.png": image})).train.images[2]
    assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 0, 1].tolist() == [255] * 3


@pytest.mark.parametrize("largest, levels", [
    (255, 256), (256, 1024), (1023, 1024), (4095, 4096), (5000, 16384), (65535, 65536)])
def test_deep_grey_has_one_factor_for_the_set(largest, levels, tmp_path):
    """The largest value lies in the TEST part and decides for all."""
    bright = DEEP.copy()
    bright[0, 0] = largest
    root = tree(tmp_path, {**GOOD, "train/ant/2.png": DEEP, "test/bee/2.png": bright})
    data = folder(root)
    for images, truth in ((data.train.images[2], DEEP), (data.test.images[4], bright)):
        wanted = np.round(truth.astype(float) * 255 / (levels - 1))
        assert np.array_equal(images[1].numpy(), wanted)
    picture = common.open_picture(root / "train/ant/2.png")
    alone = common.eight_bits(picture, data.facts()["largest"])
    assert np.array_equal(alone.transpose(2, 0, 1), data.train.images[2])  # as README loads one


@pytest.mark.parametrize("lines, says", [
    ("0.png ant\n1.png", "line 2 does not name a file and its class"),
    ("0.png cat", "class ant has no image left to test on"),
    ("0.png ant 0 0 9 9\n1.png bee\n2.png cat\n", None)])
def test_tiny_imagenets_annotations(lines, says, tmp_path, capsys):
    root = tree(tmp_path, {**split("train"), **{f"val/images/{n}.png": None for n in range(3)},
                           "val/val_annotations.txt": lines.encode()})
    if says:
        with pytest.raises(common.InputError, match=says):
            folder(root, "tinyimagenet")
    else:
        assert folder(root, "tinyimagenet").test.labels.tolist() == [0, 1]
        assert "left out 1 lines of classes that train/ does not have, such as cat" in (
            capsys.readouterr().out)


def test_imagenet_does_not_turn_pictures_as_the_field_does_not(tmp_path):
    plain = Image.fromarray(np.rot90(RGB).copy())
    root = tree(tmp_path, {**split("train", "val"), "train/ant/2.png": turned(),
                           "train/ant/3.png": plain})
    train = folder(root, "imagenet", workers=0).train
    assert torch.equal(train.read(2, 0), train.read(3, 0))


def test_a_broken_picture_of_imagenet_is_one_line_whatever_the_workers(tmp_path):
    root = tree(tmp_path, {**split("train", "val"), "train/bee/9.png": b"broken"})
    for workers in (0, 2):
        data = folder(root, "imagenet", workers=workers)
        with pytest.raises(common.InputError, match="9.png cannot be read as an image") as error:
            list(data.train.augmented(5, torch.Generator().manual_seed(0)))
        assert "Traceback" not in str(error.value)
    before = data.train.fingerprint()
    data.train.labels = data.train.labels.flip(0)
    assert data.train.fingerprint() != before
    data.train.labels = data.train.labels.flip(0)
    os.truncate(root / "train/ant/0.png", 20)  # the same name, another size
    assert data.train.fingerprint() != before


def test_large_images_are_evaluated_in_smaller_batches():
    assert [common.evaluation_batch(side) for side in (16, 32, 64, 128, 224)] == [
        500, 500, 128, 32, 32]


# --------------------------------------------------------------------- faults of disk and machine
def record(folder, resume=False, **settings):
    return common.Record(folder, settings, resume)


def test_a_folder_with_our_names_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "student.pt").write_text("mine")
    for _ in range(2):
        with pytest.raises(common.InputError, match="holds student.pt, but no run of this project"):
            record(tmp_path)
    assert (tmp_path / "student.pt").read_text() == "mine"


def test_a_finished_run_that_lost_its_student_says_so(run, tmp_path):
    run("rco", tmp_path, "--strategy kd --epochs 1")
    os.truncate(tmp_path / "student.pt", 100)
    with pytest.raises(common.InputError, match="student.pt is missing or damaged"):
        run("rco", tmp_path, "--strategy kd --epochs 1 --resume")


def test_other_test_images_are_another_run(tmp_path):
    root = tree(tmp_path, {**split("train", "test"), "test/ant/0.png": 255 - RGB})
    before = folder(root).facts()
    (root / "test/ant/0.png").rename(root / "test/bee/9.png")
    assert folder(root).facts()["fingerprint"] != before["fingerprint"]


def test_changed_code_is_said(run, tmp_path, monkeypatch):
    run("rco", tmp_path, "--strategy kd --epochs 1")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "log.csv"))
    printed = run("rco", tmp_path, "--strategy kd --epochs 1 --resume")
    assert "the code has changed since this run began" in printed


def test_weights_that_are_not_finite_are_not_a_result(tmp_path):
    broken = record(tmp_path)
    broken.rows = [{"test": 1.0, "s": 1.0}]
    with pytest.raises(common.InputError, match="the weights of student are not finite"):
        broken.finish({"student": {"w": torch.tensor([1.0, float("nan")])}})
    assert not (tmp_path / "result.json").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    (tmp_path / "film.7.partial").write_text("somebody else's")
    record(tmp_path)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["film.7.partial"]
    (tmp_path / "log.csv").write_text("epoch\n1\n")
    (tmp_path / "checkpoint.pt.77.partial").write_text("half")
    assert record(tmp_path, True).rows == []
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_log_that_was_deleted_or_cut_is_written_again(run, tmp_path):
    run("rco", tmp_path, "--strategy kd")
    before = log(tmp_path)
    for damage in (lambda path: path.unlink(), lambda path: os.truncate(path, 30)):
        damage(tmp_path / "log.csv")
        run("rco", tmp_path, "--strategy kd --resume")
        assert log(tmp_path) == before


def test_a_shortened_steps_file_is_said_and_begins_again(tmp_path, capsys):
    begun = record(tmp_path)
    begun.restore()
    begun.close_epoch({"test": 1.0, "s": 1.0}, 2, [{"value": 1}])
    os.truncate(tmp_path / "steps.csv", 2)
    again = record(tmp_path, True)
    again.restore()
    assert "steps.csv was deleted or shortened" in capsys.readouterr().out
    again.close_epoch({"test": 2.0, "s": 1.0}, 2, [{"value": 2}])
    assert log(tmp_path, "steps.csv") == [{"value": "2"}]


def test_resume_that_finds_nothing_says_so(run, tmp_path):
    says = f"--resume: {tmp_path} holds nothing to resume, the run starts"
    assert says in run("rco", tmp_path, "--strategy kd --resume")
    assert says not in run("rco", tmp_path, "--strategy kd --resume")


@pytest.mark.parametrize("damaged", ["result.json", "epoch-0002.pt"])
def test_a_damaged_entry_of_the_cache_is_made_again(damaged, run, tmp_path):
    flags = f"--strategy kd --cache {tmp_path}/cache"
    run("rco", tmp_path / "a", flags)
    (path,) = (tmp_path / "cache").rglob(damaged)
    path.write_bytes(path.read_bytes()[:40])
    assert f"{path} is damaged or missing: trained again" in run("rco", tmp_path / "b", flags)
    assert same(weights(tmp_path / "a/student.pt"), weights(tmp_path / "b/student.pt"))
    assert "trained before" in run("rco", tmp_path / "c", flags)


@pytest.mark.parametrize("error, code, says", [
    (OSError(28, "No space left on device", "runs/x"), 1, "No space left on device: 'runs/x'"),
    (PermissionError(13, "Permission denied", "y"), 1, "Permission denied: 'y'"),
    (IsADirectoryError(21, "Is a directory", "log.csv"), 1, "Is a directory: 'log.csv'"),
    (MemoryError("too large"), 1, "MemoryError: too large"),
    (common.InputError("two\nlines"), 2, "error: two lines")])
def test_faults_are_one_line(error, code, says, monkeypatch, capfd):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["rco.py"])
    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    printed = capfd.readouterr()
    assert stop.value.code == code and says in printed.err and printed.err.count("\n") == 1


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    common.save_file("old", tmp_path / "a.json")
    monkeypatch.setattr(common, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    for value in ("new", {"a": torch.zeros(10**6)}):
        with pytest.raises(OSError, match="No space left"):
            common.save_file(value, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old"


def process(folder, flags, **keywords):
    command = [sys.executable, ROOT / "rco.py", *f"""--device cpu --teacher resnet8 --epochs 1
        --student resnet8x0.5 --strategy kd --image-size 8 --train-fraction 0.2 --seed 0 1
        --cache {folder}/cache --out {folder}/out""".split(), *flags.split()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **keywords,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"})


def test_an_ascii_terminal_a_closed_pipe_and_ctrl_c(tmp_path):
    """The table's ± cannot be shown; nobody reads on; stopped while torch is being imported."""
    ascii_only = process(tmp_path, "", stdout=subprocess.PIPE)
    printed, errors = ascii_only.communicate()
    assert ascii_only.returncode == 0 and errors == "" and " ? " in printed
    assert table(printed.replace(" ? ", " ± "))["kd"]["epochs"] == "1 ± 0"

    assert subprocess.run(f"{sys.executable} {ROOT}/rco.py --help >&-", shell=True).returncode == 0
    closed = process(tmp_path, "--resume --seed 0 1 2", stdout=subprocess.PIPE)
    closed.stdout.readline()
    closed.stdout.close()
    line = closed.stderr.read()
    assert line.count("\n") == 1 and "its output was closed" in line and closed.wait() == 1
    assert (tmp_path / "out/seed-0/result.json").exists()

    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "class Finder:\n    def find_spec(self, name, *_):\n        if name == 'torch':\n"
        "            raise KeyboardInterrupt\nsys.meta_path.insert(0, Finder())\nimport rco")
    stopped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Traceback" not in stopped.stderr and "--resume" in stopped.stderr
    assert stopped.returncode in (-2, 130)


def test_a_loss_that_is_not_finite_names_its_network(run, tmp_path):
    with pytest.raises(common.InputError, match="the loss term 'ce' of teacher is not finite"):
        run("rco", tmp_path / "a", "--strategy kd --learning-rate 1e30")
    with pytest.raises(common.InputError, match="the loss term 'ce' of the student is not finite"):
        run("rco", tmp_path / "b", "--strategy kd --student-learning-rate 1e30")


def test_open_set_tables_say_what_chance_pixels_and_random_weights_give(run, tmp_path):
    rows = table(run("rco", tmp_path, "--strategy kd --epochs 1 --open-set 5"))
    data = shapes_data(open_set=5)
    sizes = data.unseen.labels.bincount().tolist()
    pairs = sum(n * (n - 1) for n in sizes) / (sum(sizes) * (sum(sizes) - 1))
    assert rows["chance"]["rank1"] == f"{100 * pairs:.1f}"
    assert rows["chance"]["verification"] == "50.0"
    pixels = data.unseen.normalise(data.unseen.images).flatten(1)
    report = common.open_set_report(pixels, data.unseen.labels)
    assert rows["raw pixels"]["rank1"] == f"{report['rank1']:.1f}"
    assert {"untrained student", "kd"} < set(rows)


def test_the_readmes_loading_lines_classify_one_picture(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    green = np.zeros_like(RGB) + np.uint8([40, 200, 40])
    root = tree(tmp_path / "data", {f"{part}/{name}/{n}.png": picture - np.uint8(n)
                                    for part in ("train", "test") for n in range(30)
                                    for name, picture in (("ant", 255 - green), ("bee", green))})
    run("rco", "runs/rco-shapes", f"--dataset folder --data {root} --image-size 16 --strategy kd "
        "--epochs 6 --batch-size 6")
    facts = result_of("runs/rco-shapes")["arguments"]["data"]
    assert facts["classes"] == ["ant", "bee"] and facts["image_size"] == 16
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, picture in (("ant", 255 - green), ("bee", green)):
        Image.fromarray(picture).resize((40, 30)).save("picture.png")
        exec(block, {})
        assert capsys.readouterr().out.strip() == name
