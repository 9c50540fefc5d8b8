"""Blocks 1, 4, 5 and 6 of common.py: flags, evaluation, records, resume, cache, tables."""

import copy
import dataclasses
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT, forbidden, log, readme_commands, refused, result_of, same, same_run, shapes_data, stopped,
    table, weights)

import common
import rco

STEPS = 6  # of an epoch: 260 training images in batches of 50
TWO_STAGES = "--epochs 3 --stage-epochs 3 --anchors 2"
CPU = Namespace(device=torch.device("cpu"), precision="fp32")
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return Namespace(folder=folder, printed=run("rco", folder, TWO_STAGES))


@pytest.fixture(scope="module")
def interrupted(run, tmp_path_factory):
    """The same run, stopped by Ctrl-C in the middle of the second epoch of its second stage."""
    return stop_in_stage_2(run, tmp_path_factory.mktemp("interrupted"), TWO_STAGES)


def stop_in_stage_2(run, folder, flags):
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, rco, "train_step", 3 * STEPS + STEPS + 3)
        with pytest.raises(KeyboardInterrupt):
            run("rco", folder, flags)
    rows = weights(folder / "checkpoint.pt")["rows"]
    assert [(row["epoch"], row["stage"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    return folder


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------- the record
def drive(folder, tests, resume=False):
    """Fill a Record with hand-made epochs, going on where its checkpoint ends."""
    record = common.Record(folder, {"seed": 7, "depth": 1.5}, resume)
    generator = torch.Generator().manual_seed(3)
    draws = record.state.setdefault("draws", [])
    record.restore(generator=generator)
    while (epoch := len(record.rows)) < len(tests):
        mean = common.Mean()
        mean.add({"ce": torch.tensor(1.0), "kl": None}, torch.eye(3)[[0, 2, 2]], LABELS[:3])
        mean.add({"ce": 2.0, "kl": 4.0}, torch.eye(3)[:1], LABELS[3:])  # right
        draws.append(torch.rand((), generator=generator).item())
        record.close_epoch({"lr": 0.0005, **mean.row(), "test": tests[epoch]}, len(tests),
                           [{"step": step, "value": epoch + step} for step in (0, 1)])
    return record


def test_a_record_keeps_every_row_and_headlines_the_last_epoch(tmp_path, capsys):
    drive(tmp_path, [10.0, 30.0, 20.0]).finish({"student": {"w": torch.ones(2)}}, extra=5)
    result = result_of(tmp_path)
    assert (result["last_test"], result["best_test"], result["extra"]) == (20.0, 30.0, 5)
    assert result["arguments"] == {"seed": 7, "depth": 1.5}
    assert result["torch"] == torch.__version__
    assert {"script", "commit", "machine", "gpu", "threads", "python"} <= result.keys()
    assert result["seconds"] == pytest.approx(sum(row["s"] for row in result["rows"]))
    assert {**result["rows"][1], "s": 0, "img/s": 0} == {  # ce: (3 * 1 + 1 * 2) / 4 images
        "epoch": 2, "lr": 0.0005, "ce": 1.25, "kl": 4.0, "train": 75.0, "test": 30.0, "s": 0,
        "img/s": 0}
    assert [{key: float(value) for key, value in row.items()} for row in log(tmp_path)] == [
        {key: value for key, value in row.items() if key not in ("s", "img/s")}
        for row in result["rows"]]
    assert [row["value"] for row in log(tmp_path, "steps.csv")] == ["0", "1", "1", "2", "2", "3"]
    assert set(contents(tmp_path)) == {"log.csv", "steps.csv", "result.json", "student.pt"}
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4  # fixed width, one a row
    assert "0.00050" in lines[1]


@pytest.mark.parametrize("name, call", [("write_csv", 3), ("write_csv", 4), ("save_file", 2)])
def test_a_stop_while_an_epoch_is_closed_loses_no_row_and_no_draw(name, call, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, common, name, call)
        with pytest.raises(KeyboardInterrupt):
            drive(tmp_path / "a", [1.0, 2.0, 3.0])
    drive(tmp_path / "a", [1.0, 2.0, 3.0], resume=True).finish({})
    whole = drive(tmp_path / "b", [1.0, 2.0, 3.0])
    assert [row["test"] for row in log(tmp_path / "a")] == ["1.0", "2.0", "3.0"]
    assert log(tmp_path / "a", "steps.csv") == log(tmp_path / "b", "steps.csv")
    again = torch.Generator().manual_seed(3)
    assert whole.state["draws"] == [torch.rand((), generator=again).item() for _ in range(3)]


def test_resume_hands_every_part_its_state(tmp_path):
    """Networks, optimisers and generators; the draws after the stop are those of a whole run."""
    drive(tmp_path, [1.0])
    record = drive(tmp_path, [1.0, 2.0], resume=True)
    again = torch.Generator().manual_seed(3)
    assert record.state["draws"] == [torch.rand((), generator=again).item() for _ in range(2)]
    one, two = (torch.nn.Linear(2, 2) for _ in range(2))
    parts = [{"net": net, "sgd": torch.optim.SGD(net.parameters(), 0.1, 0.9)} for net in (one, two)]
    one(torch.ones(1, 2)).sum().backward()
    parts[0]["sgd"].step()
    for part, resume in zip(parts, (False, True)):
        record = common.Record(tmp_path / "net", {}, resume)
        record.restore(**part)
        if not resume:
            record.close_epoch({"test": 1.0}, 1)
    assert same(one.state_dict(), two.state_dict())
    for a, b in zip(parts[0]["sgd"].state.values(), parts[1]["sgd"].state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


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
    assert weights(path) == {"x": 1} and text.read_text() == "old"


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    holder = f"import common, time; r = common.Record({str(tmp_path)!r}, {{}}, False); " \
             "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(common.InputError, match="written by another process"):
            common.Record(tmp_path, {}, False)
    finally:
        process.kill()
        process.communicate()
    common.Record(tmp_path, {}, False)  # the lock dies with its process


def test_the_files_of_a_run_agree_with_each_other(finished):
    folder, result = finished.folder, result_of(finished.folder)
    assert set(contents(folder)) == {"log.csv", "result.json", "student.pt"}
    assert len(log(folder)) == len(result["rows"]) == 6
    data = shapes_data(validation=0.1)
    student = common.build_model("resnet8x0.5", 20, 16, seed=99)
    student.load_state_dict(weights(folder / "student.pt"))
    pixels = data.test.images.numpy().astype(np.float32) / 255
    pixels -= np.float32(data.mean).reshape(3, 1, 1)
    pixels /= np.float32(data.std).reshape(3, 1, 1)
    with torch.no_grad():
        guess = student.eval()(torch.from_numpy(pixels)).argmax(1)
    accuracy = 100 * (guess == data.test.labels).double().mean().item()
    assert accuracy == pytest.approx(result["last_test"])
    assert table(finished.printed)["eei"]["test"] == f"{result['last_test']:.2f}"
    assert result["measures"]["kl_final"] == pytest.approx(result["rows"][-1]["kl_final"])


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    calls, step = itertools.count(1), rco.train_step

    def diverging(*args):
        terms, logits = step(*args)
        if next(calls) == STEPS + 2:  # the second step of the second epoch
            terms["kl"] = torch.tensor(float("nan"))
        return terms, logits
    monkeypatch.setattr(rco, "train_step", diverging)
    with pytest.raises(common.InputError, match="'kl' is not finite"):
        run("rco", tmp_path, TWO_STAGES)
    assert len(weights(tmp_path / "checkpoint.pt")["rows"]) == 1
    assert not (tmp_path / "student.pt").exists()
    mean = common.Mean()
    with pytest.raises(common.InputError, match="'ce' is not finite"):
        for _ in range(50):  # in a long epoch it does not go on to the end
            mean.add({"ce": torch.tensor(float("inf"))}, None, LABELS)


# ------------------------------------------------------------------------- going on, and refusing
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_used_folder_is_refused_and_left_as_it_was(state, run, finished, interrupted,
                                                     monkeypatch):
    folder = {"finished": finished.folder, "interrupted": interrupted}[state]
    before = contents(folder)
    monkeypatch.setattr(rco, "train_network", forbidden)
    with pytest.raises(common.InputError, match="--resume"):
        run("rco", folder, TWO_STAGES)
    for flags in ("--temperature 2", "--seed 1", "--weight-decay 0.1", "--strategy greedy"):
        name = flags.split()[0].removeprefix("--").replace("-", "_")
        with pytest.raises(common.InputError, match=rf"{name} was .*, now {flags.split()[1]}"):
            run("rco", folder, f"{TWO_STAGES} --resume {flags}")
    assert contents(folder) == before


def test_resume_of_a_finished_run_trains_nothing(run, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    for owner, name in ((common, "sgd"), (rco, "sgd"), (rco, "train_step")):
        monkeypatch.setattr(owner, name, forbidden)
    printed = run("rco", folder, f"{TWO_STAGES} --resume")
    assert contents(folder) == contents(finished.folder)
    assert table(printed) == table(finished.printed)


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
        run("rco", folder, f"{TWO_STAGES} --resume")


@pytest.mark.parametrize("text", ["{", "", "[]", '{"rows": []}', '{"arguments": null, "rows": []}'])
def test_a_damaged_result_is_named(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(common.InputError, match=re.escape(str(tmp_path / "result.json"))):
        drive(tmp_path, [1.0], resume=True)


def test_out_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(common.InputError, match="--out .*file.* cannot be written"):
            common.Record(out, {}, False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stopped_run_goes_on_bit_for_bit(run, finished, interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    run("rco", folder, f"{TWO_STAGES} --resume")
    assert same_run(folder, finished.folder)


def test_a_stopped_greedy_run_with_hints_goes_on_bit_for_bit(run, tmp_path):
    flags = f"{TWO_STAGES} --strategy greedy --anchors 3 --transfer hint --threshold 0"
    folder = stop_in_stage_2(run, tmp_path / "stopped", flags)
    run("rco", folder, f"{flags} --resume")
    run("rco", tmp_path / "whole", flags)
    assert same_run(folder, tmp_path / "whole")
    student = common.build_model("resnet8x0.5", 20, 16)
    student.load_state_dict(weights(folder / "student.pt"))  # without the hint's adapter


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    command = [sys.executable, ROOT / "rco.py", *f"""--device cpu --teacher resnet8 --epochs 2
        --student resnet8x0.5 --anchors 2 --image-size 8 --train-fraction 0.2
        --cache {tmp_path}/cache --out""".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*rest):
        return subprocess.Popen([*command, *rest], env=environment, stdout=subprocess.DEVNULL)
    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    assert start(tmp_path / "killed", "--resume").wait() == 0
    assert same_run(tmp_path / "killed", tmp_path / "whole")


# ------------------------------------------------------------------- train_network and its cache
RATES = [0.1, 0.05, 0.01]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(...): common.train_network on a few images; `.runs` counts the trainings begun."""
    data = shapes_data()
    parts = {name: dataclasses.replace(part, images=part.images[:100], labels=part.labels[:100])
             for name, part in (("train", data.train), ("test", data.test))}
    sgd = common.sgd

    def counted(*args):
        call.runs += 1
        return sgd(*args)

    def call(rates=RATES, name="resnet8x0.5", data=None, seed=0, keep=(), **flags):
        arguments = rco.parse_args(["--device", "cpu", "--cache", str(call.cache)])
        vars(arguments).update(flags)
        return common.train_network(name, data or call.data, rates, arguments, keep, seed)
    monkeypatch.setattr(common, "sgd", counted)
    call.data, call.cache, call.runs = dataclasses.replace(data, **parts), tmp_path / "cache", 0
    return call


def equal(network, other):
    return same(network.state_dict(), other.state_dict())


def test_snapshots_are_the_states_after_their_epochs(train, tmp_path):
    result, states = train(keep=(1, 2))
    assert sorted(states) == [1, 2, 3] and not equal(states[1], states[2])
    for row, (epoch, network) in zip(result["rows"], states.items(), strict=True):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert row["epoch"] == epoch
        assert common.evaluate(network, train.data.test, CPU) == row["test"]
    assert [row["lr"] for row in result["rows"]] == RATES
    train.cache = tmp_path / "again"
    assert equal(train(RATES[:2])[1][2], states[2])  # a shorter run goes the same way
    assert not equal(train(RATES[:2], seed=1)[1][2], states[2])


def test_a_stopped_training_goes_on_bit_for_bit(train, tmp_path):
    whole = train(keep=(1, 2))
    first, train.cache = train.cache, tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:  # 100 images make 2 steps: the end of epoch 2
        stopped(patch, common.Mean, "add", 4)
        with pytest.raises(KeyboardInterrupt):
            train(keep=(1, 2))
    (folder,), (reference,) = train.cache.iterdir(), first.iterdir()
    assert weights(folder / "checkpoint.pt")["rows"][-1]["epoch"] == 1
    assert not (folder / "epoch-0002.pt").exists()
    result, states = train(keep=(1, 2))
    assert result["last_test"] == whole[0]["last_test"] and log(folder) == log(reference)
    assert all(equal(states[epoch], whole[1][epoch]) for epoch in (1, 2, 3))


def test_the_cache_is_used_only_for_the_same_training(train, tmp_path, monkeypatch):
    first, again = train(RATES[:1]), train(RATES[:1])
    assert train.runs == 1 and first[0] == again[0] and equal(first[1][1], again[1][1])
    fewer = dataclasses.replace(train.data.train, images=train.data.train.images[:90],
                                labels=train.data.train.labels[:90])
    others = [
        {"rates": [0.2]}, {"seed": 1}, {"name": "resnet8"}, {"momentum": 0.8}, {"batch_size": 50},
        {"weight_decay": 0.0}, {"precision": "bf16"}, {"nesterov": False},
        {"data": dataclasses.replace(train.data, train=fewer)},
        {"data": dataclasses.replace(train.data, test=fewer)}]
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
    assert train.runs == 2 and equal(states[3], last) and not equal(states[1], last)
    more = train(keep=(2,))[1]
    assert train.runs == 3 and equal(more[3], last) and sorted(more) == [2, 3]
    everything = train(keep=(1, 2))[1]
    assert train.runs == 3 and equal(everything[1], states[1]) and equal(everything[2], more[2])


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
    split, before = common.Split(images, labels, mean, std), copy.deepcopy(network)
    for mode in (True, False):
        network.train(mode)
        assert common.evaluate(network, split, CPU) == pytest.approx(100 * 466 / 700)
        found, order = common.embeddings(network, split, CPU)
        torch.testing.assert_close(found, vectors, rtol=1e-4, atol=1e-5)
        assert torch.equal(order, labels) and not found.requires_grad
        assert network.training is mode and all(m.training is mode for m in network.modules())
    assert equal(network, before)
    always_7 = F.one_hot(torch.tensor(7), 20)
    given = common.evaluate(network, split, CPU, lambda x: always_7.repeat(len(x), 1))
    assert given == pytest.approx(100 * (labels == 7).double().mean().item())


# ----------------------------------------------------------------------------------- command line
def test_two_seeds_print_mean_and_deviation_of_the_last_epochs(run, tmp_path, monkeypatch):
    accuracies = itertools.cycle([1.0, 40.0, 30.0, 30.0, 1.0, 20.0, 15.5, 15.5])
    monkeypatch.setattr(rco, "evaluate", lambda *_: next(accuracies))  # teacher, epochs, anchor
    printed = run("rco", tmp_path, "--seed 0 1 --epochs 2 --strategy kd")
    results = [result_of(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    assert [result["arguments"]["seed"] for result in results] == [0, 1]
    last = [result["last_test"] for result in results]
    assert last == [30.0, 15.5] and [result["best_test"] for result in results] == [40.0, 20.0]
    row = table(printed)["kd"]
    assert row["test"] == f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}"  # n - 1
    assert row["best"] == f"30.00 ± {statistics.stdev([40, 20]):.2f}"
    assert "2 seeds" in printed and "last-epoch" in printed
    heads = [weights(tmp_path / f"seed-{s}" / "student.pt")["head.weight"] for s in (0, 1)]
    assert not torch.equal(*heads)


def test_compare_prints_every_control_with_its_epochs(run, finished, tmp_path):
    """Equal compute for the chosen run and for every strategy named; nothing is trained twice."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    rows = table(run("rco", folder, f"{TWO_STAGES} --resume --compare one-stage"))
    assert {name: row["epochs"] for name, row in rows.items()} == {
        "teacher": "3", "student alone": "3", "eei": "6", "one-stage": "3", "kd": "3",
        "kd long, as eei": "6", "kd restarts, as eei": "6"}  # as one-stage: they are "kd"
    stages = {"kd": [1] * 3, "kd long, as eei": [1] * 6, "kd restarts, as eei": [1] * 3 + [2] * 3}
    for name, expected in stages.items():
        result = result_of(folder / name.replace(", ", "-").replace(" ", "-"))
        assert [row["stage"] for row in result["rows"]] == expected
        assert {row["anchor"] for row in result["rows"]} == {3}  # always the final teacher
        assert rows[name]["test"] == f"{result['last_test']:.2f}"
    for name, network in (("teacher", "resnet8"), ("student alone", "resnet8x0.5")):
        tests = {result_of(path)["last_test"] for path in run.cache.glob(f"shapes-{network}-3-*")}
        assert float(rows[name]["test"]) in {round(test, 2) for test in tests}
    untouched = {name: (folder / name).read_bytes() for name in contents(finished.folder)}
    assert untouched == contents(finished.folder)
    only = table(run("rco", tmp_path / "kd", "--epochs 3 --strategy kd --compare"))
    assert list(only) == ["teacher", "student alone", "kd"]


@pytest.mark.parametrize("flags, word", [
    ("--dataset nonsense", "nonsense"), ("--device cuda", "cuda"), ("--teacher resnet9", "resnet9"),
    ("--epochs 0", "--epochs"), ("--epochs 2.5", "a whole number"), ("--weight nan", "--weight"),
    ("--learning-rate 0", "above 0"), ("--nonsense", "--nonsense"), ("--seed -1", "--seed"),
    ("--train-fraction 2", "at most 1"), ("--student resnet8xnan", "no network is called"),
    ("--student resnet8xinf", "no network"), ("--student resnet8x0.2", "no network")])
def test_a_bad_flag_is_one_line_and_exit_2(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert word in refused("rco", flags, capsys)


def test_run_script_turns_errors_into_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rco.py"])

    def fail(error):
        def main():
            raise error
        return main
    for error, code in ((common.InputError("two\nlines"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop:
            common.run_script(fail(error))
        printed = capsys.readouterr()
        assert stop.value.code == code and printed.out == ""
        (line,) = printed.err.strip().splitlines()
        assert line.startswith("rco.py") and ("two lines" if code == 2 else "--resume") in line
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        common.run_script(fail(ZeroDivisionError()))


@pytest.mark.parametrize("script", ["rco", "switokd", "trikd", "letkd", "tst"])
def test_help_and_every_documented_command(script, capsys):
    """--help as a process lists every flag; every command of README and docs/ is understood."""
    printed = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, text=True,
                             capture_output=True, check=True).stdout
    source = (ROOT / "common.py").read_text() + (ROOT / f"{script}.py").read_text()
    flags = set(re.findall(r'add\("(--[a-z-]+)"', source))
    flags -= {"--teacher-weights"} if script in ("switokd", "trikd") else set()
    assert len(flags) > 20
    assert {f for f in flags if not re.search(rf"^  {f}\b", printed, re.MULTILINE)} == set()
    commands = readme_commands(script)
    assert "" in commands
    module = __import__(script)
    for command in commands:
        module.parse_args(["--device", "cpu", *command.split("#")[0].split()])


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    record = drive(tmp_path / "run", [1.0])
    record.finish({})
    assert record.result["commit"] is None


def test_table_leaves_out_what_no_run_has_and_seeds_come_once(capsys):
    """Mean and standard deviation (n - 1) by hand; "-" where a run has no value."""
    rows = [[{"run": "a", "test": 1.0}, {"run": "b", "test": 5.0, "kl": 0.5}],
            [{"run": "a", "test": 4.0}, {"run": "b", "test": 5.0, "kl": 1.5}]]
    common.print_table(rows, {"test": ".2f", "rank1": ".1f", "kl": ".1f"}, "T")
    out = capsys.readouterr().out
    assert "rank1" not in out and "of 2 seeds" in out
    assert "2.50 ± 2.12" in out and "1.0 ± 0.7" in out and "5.00 ± 0.00" in out
    assert out.splitlines()[3].split()[-1] == "-"
    runs = common.each_seed(Namespace(seed=[3, 5, 3], out=Path("x"), epochs=2))
    assert [(run.seed, str(run.out), run.epochs) for run in runs] == [
        (3, "x/seed-3", 2), (5, "x/seed-5", 2)]
    (run,) = common.each_seed(Namespace(seed=[4], out=Path("x")))
    assert (run.seed, str(run.out)) == (4, "x")
