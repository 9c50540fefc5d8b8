"""docs/results.py, docs/ablations.py: pages hold the records; commands are the records' runs."""

import importlib
import json
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "docs"))
import ablations  # noqa: E402
import results  # noqa: E402


def holds(text, name, block):
    """The text has the block, once; and digits of it changed by hand are seen."""
    assert results.filled(text, {name: block}) == text and text.count(f"<!-- {name} -->") == 1
    wrong = text.replace(block, block.translate(str.maketrans("0123456789", "1234567890")))
    assert results.filled(wrong, {name: block}) == text != wrong


def test_the_pages_hold_what_the_records_say():
    page, readme = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md"))
    for name, block in results.blocks().items():
        holds(readme if name == "short table" else page, name, block)
    kept = json.loads(ablations.KEPT.read_text())
    holds(readme, "embedded", ablations.embedded(kept))
    for script, rows in ablations.ROWS.items():
        holds((ROOT / f"docs/{script}.md").read_text(), "removed", ablations.table(script, kept))
        assert all(len(kept[run]["test"]) == len(ablations.SEEDS) for run in rows)


def parsed(command):
    """The script of a command line, and the settings of its one method."""
    script, _, flags = command.partition("python ")[2].partition(" ")
    module = importlib.import_module(re.search(r"[a-z]+(?=(-\w+)?\.py)", script)[0])
    arguments = module.parse_args([*shlex.split(flags), "--device", "cpu"])
    changes, _ = module.METHODS[arguments.method[0]]
    return script, vars(arguments) | (changes(arguments) if callable(changes) else changes)


def test_every_command_is_the_run_of_its_record():
    """The flags in the published records, of the second house, have the same values now."""
    new = {"seed", "device", "teacher_weights", "search_at", "search_epochs", "student_term"}
    for seed in (1, results.TUNING):  # which have all runs
        records = results.records()[seed]
        for command in results.commands("DATA", "runs/x", seed):
            name, (_, settings) = command.rpartition("/")[2], parsed(command)
            record = records.get(name) or records.get(f"{name} 1", {"arguments": {}})
            for flag in record["arguments"].keys() & settings.keys() - new:
                old, now = (str(flags[flag]).replace(".0]", "]")  # [1] is [1.0]
                            for flags in (record["arguments"], settings))
                N = flag == "anchors" and name in ("one-stage", "kd-restarts")  # new defaults
                assert old == now or N, command
            assert "plan" not in settings or sum(map(len, settings["plan"])) == record["epochs"]
    for method, (_, values, _) in results.GRID.items():
        tests = {value: records[f"{method}-{value}"]["test"] for value in values}
        assert results.TAKEN[method] == max(tests, key=tests.get), method


def test_second_protocol():
    """Its commands parse, epochs are those of the runs' names, and each row comes from a run."""
    E, lengths, teachers = 120, {}, {}
    for command in results.commands("DATA", "runs/x", 0, results.END):
        name, (script, settings) = command.rpartition("/")[2], parsed(command)
        found = sum(map(len, settings["plan"])) if "plan" in settings else settings["epochs"]
        stage = 30 if name == "greedy" else E  # its first; the data add others
        assert found == int((re.findall(r"-(\d{3})$", name) or [stage])[0]), command
        assert settings["train_fraction"] == 0.1 and settings["image_size"] == 16
        if script == "rco.py":
            teachers |= {f"teacher-{settings['epochs']}": E}
        alone = settings["epochs"] // (2 if name == "alone-480" else 1)  # the script trains it
        lengths |= {name: found, f"alone-{alone}": alone}
        if script in ("letkd.py", "tst.py"):
            assert f"resnet20-{E}-*/epoch-0{E}.pt" in str(settings["teacher_weights"])
    lengths |= {"trikd 1": 2 * E, "trikd 2": 3 * E, **teachers}  # with their anchors
    rows = results.END.rows + sum((rows for rows, _ in results.END.small.values()), [])
    assert {run for _, run, *_ in rows} == lengths.keys() - {"trikd"}
    for label, run, kd, *control in results.END.rows:
        unequal = run in ("alone-480", "eei-480", "greedy", "trikd 2")  # to its control
        assert kd is None or lengths[kd] == lengths[run], label
        assert control == [None] or (lengths[control[0]] == lengths[run]) != unequal, label
    grid = [parsed(line)[1] for line in results.commands("DATA", "x", results.TUNING, results.END)]
    assert [(one["temperature"], one["epochs"]) for one in grid] == [
        (tau, E) for tau in (0.5, 1, 2, 4)]


def test_statistics():
    """By hand: differences 1, 2, 3: mean 2, sd 1, half width 4.303 / sqrt(3) = 2.48."""
    assert results.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00" and results.spread([4.0]) == "4.00"
    pairs = ([2, 4, 6], [1, 2, 3]), ([1.0], [2.5])
    assert [results.difference(*pair) for pair in pairs] == ["+2.00 [-0.48, +4.48]", "-1.50"]
    record = {"multiply_adds": [10, 100], "student": [5, 4, 0], "teacher": [3, 1, 7]}
    assert results.compute(record) == 10 * (5 + 8) + 100 * (3 + 2 + 7)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    assert results.cost(network, 8) == (27 * 4 + 4 + 256 * 5 + 5, 27 * 4 * 64 + 256 * 5)
    rows = [{"stage": 1, "s": 2.0}, {"stage": 1, "s": 1.0}, {"stage": 2, "s": 5.0}]
    assert results.seconds({"rows": rows, "searches": [{"before_epoch": 1, "s": 3.0}]}) == 2 + 5 + 3
    found = {0: {"a": {"test": 2.0}, "b": {"test": 1.0}}, 1: {"a": {"test": 4.0}},
             2: {"b": {"test": 0.0}}, results.TUNING: {"a": {"test": 9.0}, "b": {"test": 0.0}}}
    ours, gaps = results.of_row(found, "a", "b", None)  # paired: seed 0 alone has both
    assert [one["test"] for one in ours] == [2.0, 4.0] and gaps == ["+1.00", "-"]


def test_records_of_every_kind_of_run(run, tmp_path, monkeypatch):
    """Images forward and backward through student and teacher, of 260; measures of ablations."""
    monkeypatch.setattr(results, "RECORDS", tmp_path / "kept")
    place, n = tmp_path / "seed-0", 260
    for script, name, flags in (
            ("rco", "kd", "--method 'kd long' --anchors 1 --epochs 3 --stage-epochs 2"),
            ("switokd", "switokd", "--method 'fixed 0.2'"), ("trikd", "trikd", ""),
            ("trikd", "mutual", "--method 'mutual learning'"),
            ("trikd", "long", "--method 'student alone long' --generations 1"),
            ("tst", "tst", "--fit-steps 1"),
            ("letkd", "heads", "--words 8 --per-class 1 --rows 2000 --method 'auxiliary heads'")):
        run(script, place / name, f"{flags} --image-size 8 --cache {place}/cache")
    results.collect(tmp_path)
    found = results.records()[0]
    images = {name: (record["epochs"], *record["student"], *record["teacher"])
              for name, record in found.items()}
    steps = "".join(path.read_text() for path in place.glob("switokd/*/steps-*.csv"))
    paused = steps.count(",expert,") / (steps.count(",expert,") + steps.count(",learning,"))
    assert paused > 0 and images == {
        **{f"{name}-{E}": (E, E * n, E * n, 0, 0, 0, 0)
           for name in ("alone", "teacher") for E in (2, 3)},
        **dict.fromkeys(("kd", "heads"), (2, 2 * n, 2 * n, 0, 2 * n, 0, 0)),
        "switokd": pytest.approx((2, 2 * n, 2 * n, 0, 2 * n, 2 * n * (1 - paused), 0)),
        "trikd 1": (4, 6 * n, 4 * n, 0, 2 * n, 2 * n, 0),  # A_0 alone, then beside the student
        "trikd 2": (6, 10 * n, 6 * n, 0, 4 * n, 4 * n, 0),
        "mutual": (2, 2 * n, 2 * n, 0, 2 * n, 2 * n, 0),  # no A_0, no anchor
        "long": (4, 4 * n, 4 * n, 0, 0, 0, 0),
        "tst": (2, 5 * n, 4 * n, n, 5 * n, 0, n)}  # 2 x 2 originals and augmented, one pass
    times = [share for share, _ in found["switokd"]["by_epoch"]]
    assert sum(times) / len(times) == pytest.approx(100 * paused, abs=0.1)
    results.collect(tmp_path, results.END)  # beside the first protocol's, in files of its own
    assert results.records(results.END) == results.records() == {0: found}
    heads, plain = found["heads"], found["kd"]  # trained with two layers, deployed without
    assert heads["parameters"] == plain["parameters"]
    assert heads["multiply_adds"][0] - plain["multiply_adds"][0] == 2 * 32 * (20 + 8) * 2 * 2
    shutil.copytree(*place.glob("cache/*x0.5-2-*"), place / "cache" / "shapes-resnet8x0.5-12-0")
    monkeypatch.setattr(ablations, "KEPT", tmp_path / "ablations.json")
    ablations.collect(place)
    assert json.loads(ablations.KEPT.read_text()) == {}  # of five seeds four are not there
    monkeypatch.setattr(ablations, "SEEDS", range(1))
    ablations.collect(place)
    kept = json.loads(ablations.KEPT.read_text())
    assert {*kept} == {"switokd", "trikd", "tst", "alone-12"}
    assert kept["alone-12"]["test"] == [found["alone-2"]["test"]]
    assert kept["tst"]["T_end"] == [found["tst"]["measures"]["conf_t"]]
    assert kept["trikd"]["kl_ts"] == [found["trikd 2"]["measures"]["kl_ts"]]
    assert f"| {results.spread(kept['tst']['test'])} |" in ablations.table("tst", kept)
    with pytest.raises(SystemExit, match="holds alone-2 twice"):
        results.collect(tmp_path)


def test_every_ablation_parses_and_changes_one_thing(tmp_path):
    """Flags differ from the script's own run; an edit lies in the function it names."""
    commands = {line.rpartition("/")[2]: line for line in ablations.commands(tmp_path)}
    for script, rows in ablations.ROWS.items():
        source, own = (ROOT / f"{script}.py").read_text(), parsed(commands[script])[1]
        for run in rows.keys() & commands.keys():  # the students alone have none
            change, (path, settings) = rows[run][1], parsed(commands[run])
            assert settings["seed"] == [*ablations.SEEDS] and settings["dataset"] == "shapes"
            if isinstance(change, ablations.Edit):
                before = source[:source.index(change.old)]
                assert re.findall(r"^(?: *def )?(\w+)(?: = |\()", before, re.M)[-1] == change.place
                assert (tmp_path / path).read_text() == source.replace(change.old, change.new)
            else:
                same = {**settings, "out": 0, "method": 0} == {**own, "out": 0, "method": 0}
                assert path == f"{script}.py" and same == (run == script), run
