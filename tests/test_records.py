"""Blocks 1, 5 and 6 of common.py: flags, records, kills, the cache, methods and their table."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT, folder_of, forbidden, log, result_of, same, same_run, shapes_data, stopped, table,
    weights)

import common
import rco

GREEDY = "--epochs 2 --stage-epochs 2 --method greedy --anchors 2 --transfer hint"  # two stages
CPU = Namespace(device=torch.device("cpu"), precision="fp32")
LABELS = torch.tensor([0, 1, 2, 0])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_table(folder):
    """Of the tables that table.txt keeps, each under its command."""
    return table((folder / "table.txt").read_text().strip().rpartition("\n\n")[2])


# ------------------------------------------------------------------------------------- the record
def test_a_record_keeps_every_row_and_headlines_the_last_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    record = common.Record(tmp_path / "run", {"seed": 7, "depth": 1.5})
    record.restore(generator=torch.Generator())
    for test in (10.0, 30.0, 20.0):
        mean = common.Mean()
        mean.add({"ce": torch.tensor(1.0), "kl": None}, torch.eye(3)[[0, 2, 2]], LABELS[:3])
        mean.add({"ce": 2.0, "kl": 4.0}, torch.eye(3)[:1], LABELS[3:])  # right
        record.close_epoch({"lr": 0.0005, **mean.row(), "s": 1.0, "test": test}, 3)
    record.finish({"student": {"w": torch.ones(2)}}, measures={"kl": 0.5, "nan": torch.nan})
    assert record.result == result_of(record.folder) and "NaN" not in (
        record.folder / "result.json").read_text()  # no JSON: null
    result, clock = result_of(record.folder), {"s": 0, "img/s": 0}
    assert {**result["rows"][1], **clock} == {  # ce: (3 * 1 + 1 * 2) / 4 images
        "epoch": 2, "lr": 0.0005, "ce": 1.25, "kl": 4.0, "train": 75.0, "test": 30.0, **clock}
    assert common.rows_of("a", result) == [{
        "run": "a", "test": 20.0, "best": 30.0, "epochs": 3, "kl": 0.5, "nan": None,
        "seconds": pytest.approx(sum(row["s"] for row in result["rows"]))}]
    assert [{key: float(value) for key, value in row.items()} for row in log(record.folder)] == [
        {key: row[key] for key in row if key not in clock} for row in result["rows"]]
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4 and "0.0005000" in lines[1]
    assert {path.name for path in contents(tmp_path)} == {"log.csv", "result.json", "student.pt"}


def test_a_term_that_is_not_finite_stops_also_a_long_epoch():
    mean = common.Mean()
    with pytest.raises(common.InputError, match="'kl' is not finite: lower --learning-rate"):
        for _ in range(50):
            mean.add({"ce": 1.0, "kl": torch.tensor(float("nan"))}, None, LABELS)


@pytest.mark.parametrize("name, content", [
    ("checkpoint.pt", b"PK\x03\x04cut"), ("checkpoint.pt", {"head.weight": LABELS}),
    ("result.json", b"{"), ("result.json", b"[]"), ("result.json", b'{"arguments": {}}')])
def test_a_file_that_is_damaged_or_of_another_kind_is_named(name, content, tmp_path):
    path = common.Record(tmp_path / "run", {}).folder / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(common.InputError, match=f"^{re.escape(str(path))} .*$"):
        common.Record(tmp_path / "run", {})


# ----------------------------------------------------------------------- kills, and the same again
KILLED = """
import os, runpy, common
common.SHAPES_TRAIN, common.SHAPES_TEST = 260, 100
common.Record.write_csv = lambda record, *_: len(record.rows) < 3 or os.kill(os.getpid(), 9)
runpy.run_path("rco.py", run_name="__main__")
"""


def test_killed_runs_go_on_and_finished_ones_train_nothing(run, tmp_path, monkeypatch):
    """A process killed as it closes the first epoch of its second stage; then further stops."""
    run("rco", tmp_path / "whole", GREEDY)
    out = tmp_path / "killed"
    flags = f"--device cpu --teacher resnet8 --student resnet8x0.5 --batch-size 50 {GREEDY}"
    done = subprocess.run([sys.executable, "-c", KILLED, *flags.split(), "--out", out,
                           "--cache", run.cache], cwd=ROOT, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -9, done.stderr
    folder, whole = folder_of(out, "greedy"), folder_of(tmp_path / "whole", "greedy")
    assert folder.name == whole.name
    for owner, name, call, rows in (  # the rows that the checkpoint has afterwards
            (common.Mean, "add", 3, 2), (os, "replace", 1, 2), (os, "replace", 2, 3),
            (os, "replace", 3, 4),  # between student.pt and result.json
            (Path, "unlink", 1, 4)):  # between result.json and the end of the checkpoint
        with pytest.MonkeyPatch.context() as patch:
            stopped(patch, owner, name, call)
            with pytest.raises(KeyboardInterrupt):
                run("rco", out, GREEDY)
        assert len(weights(folder / "checkpoint.pt")["rows"]) == rows
    run("rco", out, GREEDY)
    assert same_run(folder, whole) and not (folder / "checkpoint.pt").exists()
    before, rows = contents(folder), last_table(out)
    monkeypatch.setattr(common.Mean, "add", forbidden)
    assert rows == table(run("rco", out, GREEDY)) == last_table(out) and before == contents(folder)


TOY = """import toy_part

def train(record, data, settings):
    record.restore()
    record.close_epoch({"test": 50.0, "s": 0.5}, 1)
    record.finish({"student": {}})
"""


def test_other_flags_data_or_sources_touch_nothing(tmp_path, monkeypatch):
    """They are another folder. Sources: the script, common.py, what the script imports of ours."""
    for name in ("toy", "toy_part", "unrelated", "common", "teacher"):
        (tmp_path / f"{name}.py").write_text(TOY if name == "toy" else "VALUE = 1\n")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.syspath_prepend(tmp_path)
    toy, _ = (importlib.import_module(name) for name in ("toy", "unrelated"))
    shapes, methods = shapes_data(), {"one": ({}, "?"), "two": ({"bonus": 2}, "?")}

    def ran(facts=shapes.facts, **flags):
        common.source_of.cache_clear()  # as in another process
        arguments = {"seed": 0, "bonus": 1, "method": ["one"], "out": tmp_path / "out",
                     "teacher_weights": [tmp_path / "teacher.py"], **flags}
        common.run_methods(Namespace(**arguments), methods, toy.train,
                           Namespace(**{**vars(shapes), "facts": facts}))
        return contents(tmp_path / "out")

    before = ran()
    (tmp_path / "unrelated.py").write_text("VALUE = 2\n")
    assert ran(teacher_weights=[tmp_path / "common.py"]) == before  # equal in content
    for change in ({"bonus": 2}, {"seed": 1}, {"method": ["two"]}, {"facts": {"image_size": 17}},
                   "teacher", "toy_part", "toy", "common"):
        if isinstance(change, str):
            (tmp_path / f"{change}.py").write_text("VALUE = 2\n")
        after = ran(**change if isinstance(change, dict) else {})
        assert len(after) == len(before) + 3 and before.items() <= after.items(), change
        before = after


# ------------------------------------------------------------------- train_network and its cache
RATES = [0.1, 0.05, 0.01]


@pytest.fixture
def train(tmp_path):
    """train(...): common.train_network on a few images, 2 steps an epoch."""
    def call(rates=RATES, name="resnet8x0.5", data=None, seed=0, keep=(), **flags):
        arguments = rco.parse_args(["--device", "cpu", "--cache", str(call.cache)])
        vars(arguments).update(flags)
        return common.train_network(name, data or call.data, rates, arguments, keep, seed)
    call.data, call.cache = shapes_data(train_fraction=0.4), tmp_path / "cache"
    return call


def equal(network, other):
    return same(network.state_dict(), other.state_dict())


def test_states_are_those_after_their_epochs_and_of_one_run(train, tmp_path, monkeypatch):
    result, states = train(keep=(1, 2))
    assert sorted(states) == [1, 2, 3] and not equal(states[1], states[2])
    for row, rate, (epoch, network) in zip(result["rows"], RATES, states.items(), strict=True):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert (row["epoch"], row["lr"]) == (epoch, rate)
        assert common.evaluate(network, train.data.test, CPU) == row["test"]
    train.cache = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:  # at the end of epoch 2
        stopped(patch, common.Mean, "add", 4)
        with pytest.raises(KeyboardInterrupt):
            train(keep=(1, 2))
    again, others = train(keep=(1, 2))
    assert again["last_test"] == result["last_test"] and others.keys() == states.keys()
    assert all(equal(others[epoch], states[epoch]) for epoch in states)
    train.cache = tmp_path / "other"
    assert equal(train(RATES[:2])[1][2], states[2])  # a shorter run goes the same way
    assert not equal(train(RATES[:2], seed=1)[1][2], states[2])
    for keep in ((), (1,), (2,)):  # states that were not kept are trained again, and then kept
        assert all(equal(network, states[epoch]) for epoch, network in train(keep=keep)[1].items())
    monkeypatch.setattr(common.Mean, "add", forbidden)
    assert sorted(train(keep=(1, 2))[1]) == [1, 2, 3]


def test_the_cache_is_used_only_for_the_same_training(train):
    with pytest.raises(common.InputError, match="'ce' is not finite"):
        train([1e30, 1e30])
    assert not list(train.cache.rglob("*.pt"))  # what diverged leaves nothing
    own, fewer = train.data, shapes_data(train_fraction=0.3)
    tests = common.data_of("shapes", [own.train, own.validation, fewer.train], own.names, 16)
    train(RATES[:1])
    for number, change in enumerate((
            {}, {"rates": [0.2]}, {"seed": 1}, {"name": "resnet8"}, {"momentum": 0.8},
            {"batch_size": 50}, {"weight_decay": 0.0}, {"precision": "bf16"}, {"nesterov": False},
            {"data": fewer}, {"data": tests}), 2):
        train(**{"rates": RATES[:1], **change})
        assert len(list(train.cache.iterdir())) == number, change


# ------------------------------------------------------------------------ command line and tables
def test_a_method_that_diverges_leaves_the_others_their_rows(run, tmp_path, monkeypatch):
    """Two seeds; exit code 1."""
    plan, question = rco.METHODS["one-stage"]
    monkeypatch.setitem(rco.METHODS, "one-stage", (
        lambda a: {**plan(a), "learning_rate": 1e30}, question))
    with pytest.raises(SystemExit, match="^1$"):
        run("rco", tmp_path, "--seed 0 1 0 --method one-stage kd")
    rows = last_table(tmp_path)
    why = r"the loss term '\w+' is not finite: lower --learning-rate"
    assert re.fullmatch(f"seed 0: {why}, seed 1: {why}", rows["one-stage"]["note"])
    assert "note" not in rows["kd"]  # of one seed alone the row ends in its folder's name


def test_table_leaves_out_what_no_run_has(capsys, tmp_path):
    """Mean and standard deviation (n - 1) by hand; "-" where a run has no value."""
    rows = [[{"run": "a", "test": 1.0}, {"run": "b", "test": 5.0, "kl": 0.5}],
            [{"run": "a", "test": 4.0}, {"run": "b", "test": 5.0, "kl": 1.5}]]
    common.print_table(rows, {"test": ".2f", "rank1": ".1f", "kl": ".1f"}, "T", tmp_path)
    printed = capsys.readouterr().out
    assert table(printed) == {
        "a": {"test": "2.50 ± 2.12", "kl": "-"}, "b": {"test": "5.00 ± 0.00", "kl": "1.0 ± 0.7"}}
    assert (tmp_path / "table.txt").read_text().endswith(f"{printed}\n")


@pytest.mark.parametrize("script", ["rco", "switokd", "trikd", "letkd", "tst"])
def test_help_and_every_documented_command(script, capsys):
    """--help has the methods and the data set's defaults; README.md and docs/ are understood."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match="0"):
        module.parse_args(["--dataset", "cifar100", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {method}: " in printed for method in module.METHODS)
    usual = module.parse_args(["--dataset", "cifar100", "--device", "cpu"])
    assert f"(default: {usual.epochs})" in " ".join(printed.split())
    pages = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "results.md"}
    commands = {match for page in pages for match in re.findall(
        rf"python {script}\.py(?! --help)([^`\n|]*)", page.read_text())}
    assert "" in commands
    for command in commands:
        words = shlex.split(command.split("#")[0])
        module.parse_args(["--device", "cpu", *(word for word in words if word != "--help")])
