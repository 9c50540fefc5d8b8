"""Records, checkpoints, resumed runs, cached teachers, bad input and the command line."""

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import rco

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ["--teacher", "resnet8", "--student", "resnet8x0.5", "--device", "cpu"]
TINY = [*NETWORKS, "--epochs", "3", "--anchors", "2"]  # two stages of three epochs of STEPS steps
STEPS = 5
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHAPES_TRAIN", 300)
        patch.setattr(common, "SHAPES_TEST", 150)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(out, *flags): `python rco.py` in this process; returns what it printed."""
    cache = tmp_path_factory.mktemp("cache")

    def call(out, *flags):
        with pytest.MonkeyPatch.context() as patch:
            argv = ["rco.py", *TINY, "--out", str(out), "--cache", str(cache), *map(str, flags)]
            patch.setattr(sys, "argv", argv)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                rco.main()
        return printed.getvalue()
    call.cache = cache
    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return SimpleNamespace(folder=folder, printed=run(folder))


@pytest.fixture(scope="module")
def interrupted(run, tmp_path_factory):
    """The same run, stopped by Ctrl-C in the middle of the second epoch of its second stage."""
    return stop_in_stage_2(run, tmp_path_factory.mktemp("interrupted"))


def stop_in_stage_2(run, folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rco, "train_step", raise_at(3 * STEPS + STEPS + 3, rco.train_step))
        with pytest.raises(KeyboardInterrupt):
            run(folder, *flags)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    done = [(row["stage"], row["epoch"]) for row in state["rows"]]
    assert done == [(1, 1), (1, 2), (1, 3), (2, 1)]
    return folder


def raise_at(count, function, error=KeyboardInterrupt):
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == count:
            raise error
        return function(*args, **kwargs)
    return wrapped


def forbidden(*_, **__):
    raise AssertionError("this must not be called")


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def log(folder, times=False):
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    skip = () if times else ("s", "img/s")
    return [{key: value for key, value in row.items() if key not in skip} for row in rows]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def assert_same_state(mine, other):
    mine, other = (torch.load(path, weights_only=True) for path in (mine, other))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def assert_same_run(mine, other):
    assert_same_state(mine / "student.pt", other / "student.pt")
    assert log(mine) == log(other) and len(log(mine)) > 1
    mine, other = result_of(mine), result_of(other)
    for name in ("arguments", "last_test", "best_test", "anchors", "curves", "measures", "images"):
        assert mine[name] == other[name]


def final_table(printed):
    """{run: {column: text}} of the table at the end."""
    head, *rows = printed.split("\nRCO on")[1].strip().splitlines()[1:]
    columns = head.split()
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    return {name: dict(zip(columns[1:], values, strict=True)) for name, *values in cells}


# ------------------------------------------------------------------------------------- the record
def drive(folder, tests, resume=False):
    """Fill a Record with hand-made epochs, going on where its checkpoint ends."""
    settings = {"seed": 7, "depth": 1.5}
    record = common.Record(folder, settings, resume, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    start = record.state["epoch"] if record.state else 0
    for epoch, test in list(enumerate(tests, 1))[start:]:
        logits = torch.eye(3)[[0, 2, 2]]  # right, wrong, right
        record.step({"ce": torch.tensor(1.0)}, logits, LABELS[:3])
        record.step({"ce": torch.tensor(2.0)}, torch.eye(3)[:1], LABELS[3:])
        record.trained()
        record.epoch({"epoch": epoch, "lr": 0.0005}, {"test": test},
                     {"epoch": epoch, "random": common.random_states(generator)})
    return record


def test_a_record_keeps_every_row_and_headlines_the_last_epoch(tmp_path, capsys):
    result = drive(tmp_path, [10.0, 30.0, 20.0]).finish({"w": torch.ones(2)}, extra=5)
    assert result == result_of(tmp_path) and result["extra"] == 5
    assert (result["last_test"], result["best_test"], result["best_row"]) == (20.0, 30.0, 2)
    assert result["seed"] == 7 and result["arguments"] == {"seed": 7, "depth": 1.5}
    assert result["versions"] == {"python": platform.python_version(), "torch": torch.__version__}
    assert {"commit", "device", "threads", "seconds"} <= result.keys()
    assert [row["ce"] for row in result["rows"]] == [1.25] * 3  # (3 * 1 + 1 * 2) / 4 images
    assert [row["train"] for row in result["rows"]] == [75.0] * 3
    assert {**result["rows"][1], "s": 0, "img/s": 0} == {
        "epoch": 2, "lr": 0.0005, "ce": 1.25, "train": 75.0, "test": 30.0, "s": 0, "img/s": 0}
    assert [{key: float(value) for key, value in row.items()} for row in log(tmp_path, True)] \
        == result["rows"]
    assert not (tmp_path / "checkpoint.pt").exists() and (tmp_path / "student.pt").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4  # fixed width, one a row
    assert "0.00050" in lines[1]


def test_a_checkpoint_holds_the_random_states(tmp_path):
    drive(tmp_path, [1.0])
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["random"]
    assert torch.equal(states["loader"], torch.Generator().manual_seed(3).get_state())
    generator = torch.Generator().manual_seed(8)
    states = common.random_states(generator)
    draws = torch.rand(5, generator=generator), torch.rand(5)
    common.restore_random_states(states, other := torch.Generator())
    assert torch.equal(draws[0], torch.rand(5, generator=other))
    assert torch.equal(draws[1], torch.rand(5))


@pytest.mark.parametrize("owner, name, call", [
    (common.Record, "write_log", 3), (common, "save_file", 4)])  # save_file: first the write test
def test_a_stop_between_log_and_checkpoint_loses_no_row(owner, name, call, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raise_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            drive(tmp_path, [1.0, 2.0, 3.0])
    drive(tmp_path, [1.0, 2.0, 3.0], resume=True).finish()
    assert [row["test"] for row in log(tmp_path)] == ["1.0", "2.0", "3.0"]
    assert [row["test"] for row in result_of(tmp_path)["rows"]] == [1.0, 2.0, 3.0]


def test_saving_is_atomic(tmp_path, monkeypatch):
    path, text = tmp_path / "a.pt", tmp_path / "a.json"
    common.save_file({"x": 1}, path)
    common.save_file("old", text)

    def half(value, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    def half_text(file, value):
        file.write_bytes(b"ha")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(Path, "write_text", half_text)
    for value, file in (({"x": 2}, path), ("new", text)):
        with pytest.raises(KeyboardInterrupt):
            common.save_file(value, file)
    assert torch.load(path, weights_only=True) == {"x": 1} and text.read_text() == "old"


def test_the_files_of_a_run_agree_with_each_other(finished):
    folder, result = finished.folder, result_of(finished.folder)
    assert set(contents(folder)) == {"log.csv", "result.json", "student.pt"}
    rows = [{key: float(value) for key, value in row.items()} for row in log(folder, times=True)]
    assert rows == result["rows"] and len(rows) == 6
    data = common.load_data("shapes", validation=0.1)
    student = common.build_model("resnet8x0.5", 20, 16, seed=99)
    student.load_state_dict(torch.load(folder / "student.pt", weights_only=True))
    pixels = data.test.images.numpy().astype(np.float32) / 255
    pixels -= np.float32(data.mean).reshape(3, 1, 1)
    pixels /= np.float32(data.std).reshape(3, 1, 1)
    with torch.no_grad():
        guess = student.eval()(torch.from_numpy(pixels)).argmax(1)
    assert 100 * (guess == data.test.labels).double().mean().item() == pytest.approx(
        result["last_test"])
    assert final_table(finished.printed)["eei, 2 stages"]["test"] == f"{result['last_test']:.2f}"


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    calls, step = itertools.count(1), rco.train_step

    def diverging(*args):
        terms, logits = step(*args)
        if next(calls) == STEPS + 2:  # the second step of the second epoch
            terms["kl"] = torch.tensor(float("nan"))
        return terms, logits
    monkeypatch.setattr(rco, "train_step", diverging)
    with pytest.raises(common.InputError, match="'kl' is not finite"):
        run(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert next(calls) == STEPS + 3  # stopped at once
    assert len(state["rows"]) == 1 and not (tmp_path / "student.pt").exists()


# ------------------------------------------------------------------------- going on, and refusing
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_used_folder_is_refused_and_left_as_it_was(state, run, finished, interrupted,
                                                     monkeypatch):
    folder = {"finished": finished.folder, "interrupted": interrupted}[state]
    before = contents(folder)
    monkeypatch.setattr(rco, "train_network", forbidden)
    with pytest.raises(common.InputError, match="--resume"):
        run(folder)
    assert contents(folder) == before


def test_resume_of_a_finished_run_trains_nothing(run, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    for owner, name in ((common, "sgd"), (rco, "sgd"), (rco, "train_step")):
        monkeypatch.setattr(owner, name, forbidden)
    printed = run(folder, "--resume")
    assert contents(folder) == contents(finished.folder)
    assert final_table(printed) == final_table(finished.printed)


@pytest.mark.parametrize("state, flag, value", [
    ("finished", "temperature", 2), ("finished", "seed", 1), ("interrupted", "weight_decay", 0.1),
    ("interrupted", "train_fraction", 0.5), ("interrupted", "strategy", "greedy")])
def test_resume_with_other_arguments_names_the_argument(state, flag, value, run, finished,
                                                        interrupted, monkeypatch):
    folder = {"finished": finished.folder, "interrupted": interrupted}[state]
    before = contents(folder)
    monkeypatch.setattr(rco, "train_network", forbidden)
    with pytest.raises(common.InputError, match=rf"{flag} was .*, now {value}"):
        run(folder, "--resume", "--" + flag.replace("_", "-"), value)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other"])
def test_a_damaged_checkpoint_is_named(damage, run, interrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    path, whole = folder / "checkpoint.pt", (interrupted / "checkpoint.pt").read_bytes()
    half = whole[:len(whole) // 2]
    path.write_bytes({"truncated": half, "text": b"not a checkpoint"}.get(damage, b""))
    if damage == "other":
        torch.save({"epoch": 3}, path)
    monkeypatch.setattr(rco, "train_network", forbidden)
    with pytest.raises(common.InputError, match=re.escape(str(path))):
        run(folder, "--resume")


def test_a_damaged_result_is_named(run, finished, tmp_path):
    for number, text in enumerate((b"{", b"", b"[]", b'{"rows": []}')):
        folder = shutil.copytree(finished.folder, tmp_path / str(number))
        (folder / "result.json").write_bytes(text)
        with pytest.raises(common.InputError, match=re.escape(str(folder / "result.json"))):
            run(folder, "--resume")


def test_out_that_cannot_be_a_folder(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(common.InputError, match="--out .*file.* cannot be written"):
            run(out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stopped_run_goes_on_bit_for_bit(run, finished, interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    run(folder, "--resume")
    assert_same_run(folder, finished.folder)


def test_a_stopped_greedy_run_with_hints_goes_on_bit_for_bit(run, tmp_path):
    flags = ["--strategy", "greedy", "--anchors", "3", "--transfer", "hint", "--threshold", "0"]
    folder = stop_in_stage_2(run, tmp_path / "stopped", *flags)
    run(folder, "--resume", *flags)
    run(tmp_path / "whole", *flags)
    assert_same_run(folder, tmp_path / "whole")
    weights = torch.load(folder / "student.pt", weights_only=True)
    common.build_model("resnet8x0.5", 20, 16).load_state_dict(weights)  # without the hint's adapter


# ------------------------------------------------------------------- train_network and its cache
RATES = [0.1, 0.05, 0.01]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(...): common.train_network on a few images; `.runs` counts the trainings begun."""
    data = common.load_data("shapes")
    parts = {name: dataclasses.replace(part, images=part.images[:100], labels=part.labels[:100])
             for name, part in (("train", data.train), ("test", data.test))}
    sgd = common.sgd

    def counted(*args):
        call.runs += 1
        return sgd(*args)

    def call(rates=RATES, name="resnet8x0.5", data=None, seed=0, keep=(), **flags):
        arguments = rco.parse_args([*NETWORKS, "--cache", str(call.cache)])
        vars(arguments).update(flags)
        return common.train_network(name, data or call.data, rates, arguments, keep, seed)
    monkeypatch.setattr(common, "sgd", counted)
    call.data, call.cache, call.runs = dataclasses.replace(data, **parts), tmp_path / "cache", 0
    return call


def same(network, other):
    mine, theirs = network.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_snapshots_are_the_states_after_their_epochs(train, tmp_path):
    result, states = train(keep=(1, 2))
    assert sorted(states) == [1, 2, 3] and not same(states[1], states[2])
    arguments = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    for row, (epoch, network) in zip(result["rows"], states.items(), strict=True):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert row["epoch"] == epoch
        assert common.evaluate(network, train.data.test, arguments) == row["test"]
    assert [row["lr"] for row in result["rows"]] == RATES
    train.cache = tmp_path / "again"
    assert same(train(RATES[:2])[1][2], states[2])  # a shorter run goes the same way
    assert not same(train(RATES[:2], seed=1)[1][2], states[2])


def test_a_stopped_training_goes_on_bit_for_bit(train, tmp_path, monkeypatch):
    whole = train(keep=(1, 2))
    first, train.cache = train.cache, tmp_path / "stopped"
    with monkeypatch.context() as patch:  # 100 images make 2 steps: the last step of epoch 2
        patch.setattr(common.Record, "step", raise_at(4, common.Record.step))
        with pytest.raises(KeyboardInterrupt):
            train(keep=(1, 2))
    (folder,), (reference,) = train.cache.iterdir(), first.iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["rows"][-1]["epoch"] == 1
    assert not (folder / "epoch-0002.pt").exists()
    result, states = train(keep=(1, 2))
    assert result["last_test"] == whole[0]["last_test"] and log(folder) == log(reference)
    assert all(same(states[epoch], whole[1][epoch]) for epoch in (1, 2, 3))


def test_the_cache_is_used_only_for_the_same_training(train, tmp_path, monkeypatch):
    first = train(RATES[:1])
    again = train(RATES[:1])
    assert train.runs == 1 and first[0] == again[0] and same(first[1][1], again[1][1])
    data = train.data
    fewer = dataclasses.replace(data.train, images=data.train.images[:90],
                                labels=data.train.labels[:90])
    others = [
        {"rates": [0.2]}, {"seed": 1}, {"name": "resnet8"}, {"momentum": 0.8}, {"batch_size": 50},
        {"weight_decay": 0.0}, {"precision": "bf16"},
        {"data": dataclasses.replace(data, train=fewer)},
        {"data": dataclasses.replace(data, test=fewer)}]
    for number, other in enumerate(others, 2):
        train(**{"rates": RATES[:1], **other})
        assert train.runs == number and len(list(train.cache.iterdir())) == number, other
    changed = tmp_path / "common.py"
    changed.write_bytes((ROOT / "common.py").read_bytes() + b"#\n")
    monkeypatch.setattr(common, "__file__", str(changed))
    train(RATES[:1])
    assert train.runs == len(others) + 2


def test_states_that_were_not_kept_are_trained_again_and_then_kept(train):
    last = train()[1][3]
    states = train(keep=(1,))[1]
    assert train.runs == 2 and same(states[3], last) and not same(states[1], last)
    more = train(keep=(2,))[1]
    assert train.runs == 3 and same(more[3], last)
    everything = train(keep=(1, 2))[1]
    assert train.runs == 3 and same(everything[1], states[1]) and same(everything[2], more[2])


def test_a_teacher_that_diverges_is_stopped_and_leaves_nothing(train):
    with pytest.raises(common.InputError, match="'ce' is not finite"):
        train([1e30, 1e30])
    assert not list(train.cache.rglob("*.pt"))


def test_a_damaged_cached_state_is_named(train):
    train(RATES[:1])
    (path,) = train.cache.rglob("epoch-0001.pt")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(common.InputError, match=re.escape(str(path))):
        train(RATES[:1])


# ------------------------------------------------------------------------------------- evaluation
def test_evaluation_equals_counting_by_hand_and_restores_the_mode():
    images, _, _ = common.make_shapes(700, seed=4)  # more than one batch of 500
    mean, std = torch.tensor([[0.3, 0.4, 0.5], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    network = common.build_model("resnet8x0.5", 20, 16)
    with torch.no_grad():
        network(torch.rand(64, 3, 16, 16))  # moves the batch-norm statistics
        vectors = copy.deepcopy(network).eval().embed((images / 255 - mean) / std)
        guess = F.linear(vectors, network.head.weight, network.head.bias).argmax(1)
    labels = torch.where(torch.arange(700) % 3 == 0, (guess + 1) % 20, guess)  # 234 of 700 wrong
    split = common.Split(images, labels, mean, std)
    arguments = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    before = copy.deepcopy(network)
    for mode in (True, False):
        network.train(mode)
        assert common.evaluate(network, split, arguments) == pytest.approx(100 * 466 / 700)
        found, order = common.embeddings(network, split, arguments)
        torch.testing.assert_close(found, vectors, rtol=1e-4, atol=1e-5)
        assert torch.equal(order, labels) and not found.requires_grad
        assert network.training is mode and all(m.training is mode for m in network.modules())
    assert same(network, before)
    always_7 = F.one_hot(torch.tensor(7), 20)
    given = common.evaluate(network, split, arguments, lambda x: always_7.repeat(len(x), 1))
    assert given == pytest.approx(100 * (labels == 7).double().mean().item())


def test_evaluating_restores_modes_and_gradients_after_an_error():
    training, resting = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).eval()
    with pytest.raises(ZeroDivisionError), common.evaluating(training, resting):
        assert not training.training and not resting.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert training.training and not resting.training and torch.is_grad_enabled()


# ----------------------------------------------------------------------------------- command line
def test_two_seeds_print_mean_and_deviation_of_the_last_epochs(run, tmp_path, monkeypatch):
    accuracies = iter([40.0, 30.0, 20.0, 15.5])  # the last epoch of each seed is not its best
    monkeypatch.setattr(rco, "evaluate", lambda *_: next(accuracies))
    printed = run(tmp_path, "--seed", 0, 1, "--epochs", 2, "--anchors", 1, "--strategy", "kd")
    results = [result_of(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    assert [result["seed"] for result in results] == [0, 1]
    last = [result["last_test"] for result in results]
    assert last == [30.0, 15.5] and [result["best_test"] for result in results] == [40.0, 20.0]
    row = final_table(printed)["kd"]
    assert row["test"] == f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}"  # n - 1
    assert row["best"] == f"30.00 ± {statistics.stdev([40, 20]):.2f}"
    assert "2 seeds" in printed and "last-epoch" in printed
    students = [torch.load(tmp_path / f"seed-{seed}" / "student.pt") for seed in (0, 1)]
    assert not torch.equal(*[student["head.weight"] for student in students])


def test_compare_prints_every_control_with_its_epochs(run, finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    table = final_table(run(folder, "--resume", "--compare"))
    assert {name: row["epochs"] for name, row in table.items()} == {
        "teacher": "3", "student alone": "3", "kd": "3", "kd, stages of 6 epochs": "6",
        "kd, 2 stages": "6", "eei, 2 stages": "6"}
    assert {name: row["cost"] for name, row in table.items()} == {
        "teacher": "-", "student alone": "1.0", "kd": "1.0", "kd, stages of 6 epochs": "2.0",
        "kd, 2 stages": "2.0", "eei, 2 stages": "2.0"}
    stages = {"kd": ("kd", [1] * 3), "kd, stages of 6 epochs": ("kd-long-6", [1] * 6),
              "kd, 2 stages": ("kd-restarts-6", [1] * 3 + [2] * 3)}
    for name, (control, expected) in stages.items():
        result = result_of(folder / control)
        assert [row["stage"] for row in result["rows"]] == expected
        assert {row["anchor"] for row in result["rows"]} == {3}  # always the final teacher
        assert table[name]["test"] == f"{result['last_test']:.2f}"
    for name, network in (("teacher", "resnet8"), ("student alone", "resnet8x0.5")):
        (path,) = run.cache.glob(f"shapes-{network}-3-*")
        assert table[name]["test"] == f"{result_of(path)['last_test']:.2f}"
    untouched = {name: (folder / name).read_bytes() for name in contents(finished.folder)}
    assert untouched == contents(finished.folder)


def test_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        rco.parse_args(["--plot"])
    assert re.fullmatch(r".*--plot needs matplotlib.*\n", capsys.readouterr().err)


def test_plot_writes_two_pictures(run, finished, tmp_path):
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    run(folder, "--resume", "--plot")
    for name in ("hardness.png", "gap.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


@pytest.mark.parametrize("argv, word", [
    (["--dataset", "nonsense"], "nonsense"), (["--device", "cuda"], "cuda"),
    (["--teacher", "resnet9"], "resnet9"), (["--epochs", "0"], "--epochs"),
    (["--weight", "nan"], "--weight"), (["--learning-rate", "0"], "--learning-rate"),
    (["--epochs", "3", "--anchors", "4"], "--anchors 4"), (["--nonsense"], "--nonsense"),
    (["--strategy", "greedy", "--transfer", "mimic"], "mimic")])
def test_a_bad_flag_is_one_line_and_exit_2(argv, word, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        rco.parse_args(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error


def test_run_script_turns_errors_into_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rco.py"])
    for error, code in ((common.InputError("two\nlines"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop:
            common.run_script(raise_at(1, None, error))
        printed = capsys.readouterr()
        assert stop.value.code == code and printed.out == ""
        (line,) = printed.err.strip().splitlines()
        assert line.startswith("rco.py") and ("two lines" if code == 2 else "--resume") in line
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        common.run_script(raise_at(1, None, ZeroDivisionError))


def start(*argv, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def script(*argv, **environment):
    process = start(*argv, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_help_lists_every_flag_without_importing_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    printed = script("rco.py", "--help", PYTHONPATH=str(tmp_path))
    source = (ROOT / "common.py").read_text() + (ROOT / "rco.py").read_text()
    flags = re.findall(r'add\("(--[a-z-]+)"', source)
    assert len(flags) > 25
    assert [flag for flag in flags if not re.search(rf"^  {flag}\b", printed, re.MULTILINE)] == []


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    flags = ["rco.py", *NETWORKS, "--epochs", 2, "--anchors", 2, "--image-size", 8,
             "--train-fraction", 0.2, "--cache", tmp_path / "cache", "--out"]
    printed = script(*flags, tmp_path / "whole")
    assert set(contents(tmp_path / "whole")) == {"log.csv", "result.json", "student.pt"}
    accuracy = float(final_table(printed)["eei, 2 stages"]["test"])
    assert 0 < accuracy < 100
    process = start(*flags, tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    script(*flags, tmp_path / "killed", "--resume")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_cifar100_from_its_own_archive(tmp_path):
    draw = np.random.default_rng(0)
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
        for name, each in (("train", 3), ("test", 1)):
            labels = [label for label in range(100) for _ in range(each)]
            pixels = draw.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            coarse = [label // 5 for label in labels]
            content = pickle.dumps(
                {b"data": pixels, b"fine_labels": labels, b"coarse_labels": coarse})
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    printed = script("rco.py", "--dataset", "cifar100", "--data", tmp_path, *NETWORKS,
                     "--epochs", 1, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert "200 training, 100 held-out, 100 test images of 32x32, 100 classes" in printed
    result = result_of(tmp_path / "run")
    assert final_table(printed)["eei"]["test"] == f"{result['last_test']:.2f}"
    assert np.isfinite([list(row.values()) for row in result["rows"]]).all()
    assert torch.load(tmp_path / "run" / "student.pt")["head.weight"].shape == (100, 32)


# ------------------------------------------------------------------- what the first readers found
def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert drive(tmp_path / "run", [1.0]).finish()["commit"] is None


def test_a_teacher_of_ones_own(run, tmp_path):
    torch.save(common.build_model("resnet8", 20, 16).state_dict(), tmp_path / "w.pt")
    flags = ["--strategy", "kd", "--anchors", 1, "--teacher-weights", tmp_path / "w.pt"]
    run(tmp_path / "run", *flags)
    assert "w.pt" in result_of(tmp_path / "run")["arguments"]["teacher_weights"]
    run(tmp_path / "run", *flags, "--resume")


@pytest.mark.parametrize("name", ["resnet8xnan", "resnet8xinf", "resnet8x0.2", "resnet9", "vgg16"])
def test_networks_that_do_not_exist_are_refused(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        rco.parse_args(["--student", name])
    assert f"no network is called '{name}'" in capsys.readouterr().err


def test_only_the_states_asked_for_come_back(train):
    train(keep=(1,))
    assert sorted(train(keep=(2,))[1]) == sorted(train(keep=(2,))[1]) == [2, 3]


def test_a_result_without_arguments_is_damaged(tmp_path):
    (tmp_path / "result.json").write_text('{"arguments": null, "rows": []}')
    with pytest.raises(common.InputError, match="damaged"):
        drive(tmp_path, [1.0], resume=True)


def test_no_control_is_trained_twice(run, tmp_path):
    table = run(tmp_path, "--strategy", "kd", "--anchors", 1, "--compare")
    assert "±" not in table and list(final_table(table)) == ["teacher", "student alone", "kd"]


def test_table_leaves_out_what_no_run_has_and_seeds_come_once(capsys):
    """Mean and standard deviation (n - 1) by hand; "-" where a run has no value."""
    rows = [[{"run": "a", "test": 1.0}, {"run": "b", "test": 5.0, "kl": 0.5}],
            [{"run": "a", "test": 4.0}, {"run": "b", "test": 5.0, "kl": 1.5}]]
    shown = common.print_table(rows, {"test": ".2f", "rank1": ".1f", "kl": ".1f"}, "T")
    out = capsys.readouterr().out
    assert shown == ["test", "kl"] and "rank1" not in out and "of 2 seeds" in out
    assert "2.50 ± 2.12" in out and "1.0 ± 0.7" in out and "5.00 ± 0.00" in out
    assert out.splitlines()[3].split()[-1] == "-"
    runs = common.each_seed(SimpleNamespace(seed=[3, 5, 3], out=Path("x"), epochs=2))
    assert [(run.seed, str(run.out), run.epochs) for run in runs] == [
        (3, "x/seed-3", 2), (5, "x/seed-5", 2)]
    (run,) = common.each_seed(SimpleNamespace(seed=[4], out=Path("x")))
    assert (run.seed, str(run.out)) == (4, "x")
