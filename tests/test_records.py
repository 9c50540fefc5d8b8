"""Blocks 1, 4, 5 and 6 of common.py: flags, evaluation, records, resume, cache, tables."""

import dataclasses
import io
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT, forbidden, log, readme_commands, refused, result_of, same, same_run, shapes_data, stopped,
    table, weights)

import common
import rco

STEPS = 6  # of an epoch: 260 training images in batches of 50
GREEDY = ("--epochs 3 --stage-epochs 3 --strategy greedy --anchors 3 --threshold 0 "
          "--transfer hint")
CPU = Namespace(device=torch.device("cpu"), precision="fp32")
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run("rco", folder, GREEDY)
    return folder


KILLED = f"""
import os, runpy, signal, common
common.SHAPES_TRAIN, common.SHAPES_TEST = 260, 100
add, calls = common.Mean.add, []
def killed(*args):
    calls.append(add(*args))
    if len(calls) == {3 * STEPS + STEPS + 3}:
        os.kill(os.getpid(), signal.SIGKILL)
common.Mean.add = killed
runpy.run_path("rco.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def interrupted(run, finished, tmp_path_factory):
    """The same run as a process, killed in the second epoch of its second stage."""
    folder = tmp_path_factory.mktemp("interrupted")
    flags = f"--device cpu --teacher resnet8 --student resnet8x0.5 --batch-size 50 {GREEDY}"
    done = subprocess.run([sys.executable, "-c", KILLED, *flags.split(), "--out", folder,
                           "--cache", run.cache], cwd=ROOT, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
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


def test_a_record_keeps_every_row_and_headlines_the_last_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    drive(tmp_path, [10.0, 30.0, 20.0]).finish({"student": {"w": torch.ones(2)}}, extra=5)
    result = result_of(tmp_path)
    assert (result["last_test"], result["best_test"], result["extra"]) == (20.0, 30.0, 5)
    assert (result["arguments"], result["commit"]) == ({"seed": 7, "depth": 1.5}, None)
    assert result["torch"] == torch.__version__
    assert {"script", "machine", "gpu", "threads", "python"} <= result.keys()
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


@pytest.mark.parametrize("name, call", [("csv_text", 3), ("csv_text", 4), ("save_file", 4)])
def test_a_stop_while_an_epoch_is_closed_loses_no_row_and_no_draw(name, call, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, common, name, call)
        with pytest.raises(KeyboardInterrupt):
            drive(tmp_path, [1.0, 2.0, 3.0])
    record = drive(tmp_path, [1.0, 2.0, 3.0], resume=True)
    assert capsys.readouterr().out.count("     test") == 2  # each run heads its columns
    assert [row["test"] for row in log(tmp_path)] == ["1.0", "2.0", "3.0"]
    assert [row["value"] for row in log(tmp_path, "steps.csv")] == ["0", "1", "1", "2", "2", "3"]
    again = torch.Generator().manual_seed(3)
    assert record.state["draws"] == [torch.rand((), generator=again).item() for _ in range(3)]


@pytest.mark.parametrize("owner, writer, old, new", [
    (torch, "save", {"x": 1}, {"x": 2}), (os, "replace", "old", "new")])
def test_saving_is_atomic(owner, writer, old, new, tmp_path, monkeypatch):
    def half(*arguments):
        if writer == "save":
            arguments[1].write(b"half")
        raise KeyboardInterrupt
    common.save_file(old, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(owner, writer, half)
    with pytest.raises(KeyboardInterrupt):
        common.save_file(new, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before


def open_record(folder):
    common.Record(folder, {}, False)


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    record = common.Record(tmp_path, {}, False)
    with multiprocessing.get_context("fork").Pool(1) as other:
        with pytest.raises(common.InputError, match="written by another process"):
            other.apply(open_record, [tmp_path])
        record.lock.close()  # as when its process ends
        other.apply(open_record, [tmp_path])


def test_a_term_that_is_not_finite_stops():
    """In a long epoch it does not go on to the end."""
    mean = common.Mean("the student")
    with pytest.raises(common.InputError, match="'kl' of the student is not finite"):
        for _ in range(50):
            mean.add({"ce": 1.0, "kl": torch.tensor(float("nan"))}, None, LABELS)
    with pytest.raises(common.InputError, match="'kl' of the student is not finite"):
        mean.row()


# ------------------------------------------------------------------------- going on, and refusing
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_used_folder_is_refused_and_left_as_it_was(state, run, finished, interrupted,
                                                     monkeypatch):
    folder = finished if state == "finished" else interrupted
    before = contents(folder)
    monkeypatch.setattr(rco, "train_network", forbidden)
    with pytest.raises(common.InputError, match="--resume"):
        run("rco", folder, GREEDY)
    for flags in ("--temperature 2", "--seed 1", "--weight-decay 0.1", "--hint-weight 0.5"):
        name = flags.split()[0].removeprefix("--").replace("-", "_")
        with pytest.raises(common.InputError, match=rf"{name} was .*, now {flags.split()[1]}"):
            run("rco", folder, f"{GREEDY} --resume {flags}")
    assert contents(folder) == before


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name, content", [
    ("checkpoint.pt", saved({"rows": []})[:500]), ("checkpoint.pt", b"not a checkpoint"),
    ("checkpoint.pt", saved({"epoch": 3})), ("result.json", b"{"), ("result.json", b"[]"),
    ("result.json", b'{"arguments": null, "rows": []}')])
def test_a_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(common.InputError, match=re.escape(str(tmp_path / name))):
        drive(tmp_path, [1.0], resume=True)


def test_out_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(common.InputError, match="--out .*file.* cannot be written"):
            common.Record(out, {}, False)


def test_a_killed_run_goes_on_bit_for_bit_and_a_finished_one_trains_nothing(
        run, finished, interrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    run("rco", folder, f"{GREEDY} --resume")
    assert same_run(folder, finished)
    before = contents(folder)
    monkeypatch.setattr(rco, "train_step", forbidden)
    run("rco", folder, f"{GREEDY} --resume")
    assert contents(folder) == before


# ------------------------------------------------------------------- train_network and its cache
RATES = [0.1, 0.05, 0.01]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(...): common.train_network on a few images; `.runs` counts the trainings begun."""
    sgd = common.sgd

    def counted(*args):
        call.runs += 1
        return sgd(*args)

    def call(rates=RATES, name="resnet8x0.5", data=None, seed=0, keep=(), **flags):
        arguments = rco.parse_args(["--device", "cpu", "--cache", str(call.cache)])
        vars(arguments).update(flags)
        return common.train_network(name, data or call.data, rates, arguments, keep, seed)
    monkeypatch.setattr(common, "sgd", counted)
    call.data, call.cache, call.runs = shapes_data(train_fraction=0.4), tmp_path / "cache", 0
    return call


def equal(network, other):
    return same(network.state_dict(), other.state_dict())


def test_states_are_those_after_their_epochs_also_after_a_stop(train, tmp_path):
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
    train.cache = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:  # 2 steps an epoch: the end of epoch 2
        stopped(patch, common.Mean, "add", 4)
        with pytest.raises(KeyboardInterrupt):
            train(keep=(1, 2))
    (folder,) = train.cache.iterdir()
    assert {path.name for path in folder.glob("*.pt")} == {"checkpoint.pt", "epoch-0001.pt"}
    again, others = train(keep=(1, 2))
    assert again["last_test"] == result["last_test"] and len(log(folder)) == 3
    assert all(equal(others[epoch], states[epoch]) for epoch in (1, 2, 3))


def test_the_cache_is_used_only_for_the_same_training(train, tmp_path, monkeypatch):
    first, again = train(RATES[:1]), train(RATES[:1])
    assert train.runs == 1 and first[0] == again[0] and equal(first[1][1], again[1][1])
    fewer = shapes_data(train_fraction=0.3).train
    changed = tmp_path / "common.py"
    changed.write_bytes((ROOT / "common.py").read_bytes() + b"#\n")
    others = [
        {"rates": [0.2]}, {"seed": 1}, {"name": "resnet8"}, {"momentum": 0.8}, {"batch_size": 50},
        {"weight_decay": 0.0}, {"precision": "bf16"}, {"nesterov": False},
        {"data": dataclasses.replace(train.data, train=fewer)},
        {"data": dataclasses.replace(train.data, test=fewer)}, {}]  # the last: another common.py
    for number, other in enumerate(others, 2):
        if not other:
            monkeypatch.setattr(common, "__file__", str(changed))
        train(**{"rates": RATES[:1], **other})
        assert train.runs == number and len(list(train.cache.iterdir())) == number, other


def test_states_that_were_not_kept_are_trained_again_and_then_kept(train):
    last = train()[1][3]
    states = train(keep=(1,))[1]
    assert train.runs == 2 and equal(states[3], last) and not equal(states[1], last)
    more = train(keep=(2,))[1]
    assert train.runs == 3 and equal(more[3], last) and sorted(more) == [2, 3]
    everything = train(keep=(1, 2))[1]
    assert train.runs == 3 and equal(everything[1], states[1]) and equal(everything[2], more[2])


def test_a_teacher_that_diverges_leaves_nothing_and_a_foreign_state_is_named(train):
    with pytest.raises(common.InputError, match="'ce' of teacher is not finite"):
        train([1e30, 1e30])
    assert not list(train.cache.rglob("*.pt"))
    train(RATES[:1])
    (path,) = train.cache.rglob("epoch-0001.pt")
    path.write_bytes(saved({"x": LABELS}))
    with pytest.raises(common.InputError, match=re.escape(f"{path} does not hold the weights of")):
        train(RATES[:1])


# ------------------------------------------------------------------------------------- evaluation
def test_evaluation_equals_counting_by_hand_and_restores_the_mode():
    images, _, _ = common.make_shapes(700, seed=4)  # more than one batch of 500
    mean, std = torch.tensor([[0.3, 0.4, 0.5], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    network = common.build_model("resnet8x0.5", 20, 16)
    with torch.no_grad():
        network(torch.rand(64, 3, 16, 16))  # moves the batch-norm statistics
        vectors = common.frozen(network).embed((images / 255 - mean) / std)
        guess = F.linear(vectors, network.head.weight, network.head.bias).argmax(1)
    labels = torch.where(torch.arange(700) % 3 == 0, (guess + 1) % 20, guess)  # 234 of 700 wrong
    split, before = common.Split(images, labels, mean, std), common.frozen(network)
    assert common.evaluate(network, split, CPU) == pytest.approx(100 * 466 / 700)
    assert network.training and equal(network, before)
    always_7 = F.one_hot(torch.tensor(7), 20)
    given = common.evaluate(network, split, CPU, lambda x: always_7.repeat(len(x), 1))
    assert given == pytest.approx(100 * (labels == 7).double().mean().item())


# ----------------------------------------------------------------------------------- command line
def test_two_seeds_print_mean_and_deviation_of_the_last_epochs(run, tmp_path):
    printed = run("rco", tmp_path, "--seed 0 1 0 --strategy kd")
    results = [result_of(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    assert [result["arguments"]["seed"] for result in results] == [0, 1]
    for column, key in (("test", "last_test"), ("best", "best_test")):
        values = [result[key] for result in results]
        assert table(printed)["kd"][column] == (
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
    assert "2 seeds" in printed and "last-epoch" in printed
    heads = [weights(tmp_path / f"seed-{s}" / "student.pt")["head.weight"] for s in (0, 1)]
    assert not torch.equal(*heads)


def test_compare_prints_every_control_with_its_epochs(run, finished, tmp_path):
    """Equal compute for the chosen run and for every strategy named; nothing is trained twice."""
    folder = shutil.copytree(finished, tmp_path / "run")
    rows = table(run("rco", folder, f"{GREEDY} --resume --compare one-stage"))
    plan = result_of(folder)["plan"]
    took = sum(map(len, plan))
    expected = {"teacher": 3, "student alone": 3, "greedy hint": took, "one-stage hint": 3, "kd": 3,
                "kd by transfer": 3, "kd long, as greedy hint": took,
                "kd restarts, as greedy hint": took}  # as one-stage: they are "kd by transfer"
    assert {name: int(row["epochs"]) for name, row in rows.items()} == expected and took >= 6
    for name, stages in (("kd", 1), ("kd long, as greedy hint", 1),
                         ("kd restarts, as greedy hint", len(plan))):
        result = result_of(folder / re.sub(r"\W+", "-", name))
        assert result["plan"] == [[3] * (expected[name] // stages)] * stages  # the final teacher
        assert rows[name]["test"] == f"{result['last_test']:.2f}"
    untouched = {name: (folder / name).read_bytes() for name in contents(finished)}
    assert untouched == contents(finished)


@pytest.mark.parametrize("flags, word", [
    ("--dataset nonsense", "nonsense"), ("--device cuda", "cuda"), ("--teacher resnet9", "resnet9"),
    ("--epochs 0", "--epochs"), ("--epochs 2.5", "a whole number"), ("--weight nan", "--weight"),
    ("--learning-rate 0", "above 0"), ("--nonsense", "--nonsense"), ("--seed -1", "--seed"),
    ("--train-fraction 2", "at most 1"), ("--student resnet8xnan", "no network is called"),
    ("--student resnet8x0.2", "no network")])
def test_a_bad_flag_is_one_line_and_exit_2(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert word in refused("rco", flags, capsys)


def test_ctrl_c_and_errors_of_the_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rco.py"])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err.startswith("\nrco.py: stopped; the same command with --resume")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        common.run_script(Mock(side_effect=ZeroDivisionError))


@pytest.mark.parametrize("script", ["rco", "switokd", "trikd", "letkd", "tst"])
def test_help_and_every_documented_command(script, capsys, monkeypatch):
    """--help lists every flag; every command of README and docs/ is understood."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    source = (ROOT / "common.py").read_text() + (ROOT / f"{script}.py").read_text()
    flags = set(re.findall(r'add\("(--[a-z-]+)"', source))
    flags -= {"--teacher-weights"} if script in ("switokd", "trikd") else set()
    assert len(flags) > 20
    assert {f for f in flags if not re.search(rf"^  {f}\b", printed, re.MULTILINE)} == set()
    commands = readme_commands(script)
    assert "" in commands
    for command in commands:
        __import__(script).parse_args(["--device", "cpu", *command.split("#")[0].split()])


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
