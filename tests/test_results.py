"""docs/results.py, docs/ablations.py: the pages hold the records' numbers; the statistics; every
command parses."""

import ast
import importlib
import json
import shlex
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import ablations  # noqa: E402
import results  # noqa: E402


def test_the_pages_hold_what_the_records_say():
    blocks = results.blocks()
    page, readme = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md"))
    for name in blocks:
        text = readme if name == "short table" else page
        assert results.filled(text, {name: blocks[name]}) == text  # `python docs/results.py`
        start = text.index(f"<!-- {name} -->\n")  # and a number changed by hand is seen
        end = text.index("<!-- end -->", start)
        digit = next((i for i in range(start, end) if text[i].isdigit()), None)
        if digit:
            wrong = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1:]
            assert results.filled(wrong, blocks) == text != wrong


def test_every_command_parses_and_takes_what_the_grid_chose():
    seen = set()
    for command in [*results.commands("DATA", "runs/x", 0),
                 *results.commands("DATA", "runs/x", results.TUNING)]:
        _, script, *flags = shlex.split(command)
        arguments = importlib.import_module(script[:-3]).parse_args([*flags, "--device", "cpu"])
        assert str(arguments.out) not in seen and arguments.seed[0] in (0, results.TUNING)
        seen.add(str(arguments.out))
        if arguments.dataset == "shapes":
            continue
        recipe = (arguments.batch_size, arguments.learning_rate, arguments.weight_decay,
                  arguments.nesterov, getattr(arguments, "schedule", "steps"))
        assert recipe == (64, 0.05, 5e-4, True, "steps")
    grid = results.records().get(results.TUNING, {})
    for method, (_, values, _) in results.GRID.items():
        tests = {value: grid[f"{method}-{value}"]["test"] for value in values}
        assert results.TAKEN[method] == max(tests, key=tests.get), method


def test_statistics():
    """By hand: differences 1, 2, 3: mean 2, sd 1, half width 4.303 / sqrt(3) = 2.48."""
    assert results.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00" and results.spread([4.0]) == "4.00"
    assert results.difference([2, 4, 6], [1, 2, 3]) == "+2.00 [-0.48, +4.48]"
    assert results.difference([1.0], [2.5]) == "-1.50"
    record = {"multiply_adds": [10, 100], "student": [5, 4, 0], "teacher": [3, 1, 7]}
    assert results.compute(record) == 10 * (5 + 8) + 100 * (3 + 2 + 7)
    found = {0: {"a": {"test": 2.0}, "b": {"test": 1.0}}, 1: {"a": {"test": 4.0}},
             2: {"b": {"test": 0.0}}, results.TUNING: {"a": {"test": 9.0}, "b": {"test": 0.0}}}
    ours, gaps = results.of_row(found, "a", "b", None)  # paired: seed 0 alone has both
    assert [one["test"] for one in ours] == [2.0, 4.0] and gaps == ["+1.00", "-"]


def test_records_of_every_kind_of_run(run, tmp_path, monkeypatch):
    """Images forward and backward through student and teacher, from runs of 260 images."""
    monkeypatch.setattr(results, "RECORDS", tmp_path / "kept")
    place, n = tmp_path / "seed-0", 260
    common = f"--cache {place}/cache"
    run("rco", place / "kd", f"--strategy kd --epochs 3 --stage-epochs 2 {common}")
    run("switokd", place / "pair", f"--switch fixed:0 {common}")
    run("trikd", place / "chain", common)
    run("trikd", place / "mutual", f"--generations 1 --anchor-weight 0 {common}")
    run("letkd", place / "heads", f"--words 8 --per-class 1 --rows 2000 --alpha 0 {common}")
    run("tst", place / "tst", f"--fit-steps 1 {common}")
    results.collect(tmp_path)
    found = results.records()[0]
    images = {name: (record["epochs"], *record["student"], *record["teacher"])
              for name, record in found.items()}
    share = json.loads((place / "pair/result.json").read_text())["images"]
    assert images.pop("pair") == (
        2, 2 * n, 2 * n, 0, 2 * n, 2 * n * share["teacher backward, share"], 0)
    assert images == {
        "alone-2": (2, 2 * n, 2 * n, 0, 0, 0, 0), "teacher-2": (2, 2 * n, 2 * n, 0, 0, 0, 0),
        "teacher-3": (3, 3 * n, 3 * n, 0, 0, 0, 0), "kd": (2, 2 * n, 2 * n, 0, 2 * n, 0, 0),
        "heads": (2, 2 * n, 2 * n, 0, 2 * n, 0, 0),
        "chain 1": (4, 6 * n, 4 * n, 0, 2 * n, 2 * n, 0),  # A_0 alone, then beside the student
        "chain 2": (6, 10 * n, 6 * n, 0, 4 * n, 4 * n, 0),
        "mutual": (2, 2 * n, 2 * n, 0, 2 * n, 2 * n, 0),  # no A_0, no anchor
        "tst": (2, 5 * n, 4 * n, n, 5 * n, 0, n)}  # 2 x 2 originals and augmented, one pass
    heads, plain = found["heads"], found["kd"]  # trained with two layers, deployed without
    assert heads["parameters"] == plain["parameters"]
    assert heads["multiply_adds"][0] > plain["multiply_adds"][0]


def test_the_pages_hold_the_ablations():
    kept = json.loads(ablations.KEPT.read_text())
    for script, rows in ablations.ROWS.items():
        text = (ROOT / f"docs/{script}.md").read_text()
        assert results.filled(text, {"removed": ablations.table(script, kept)}) == text
        assert text.count("<!-- removed -->") == 1 and set(rows) <= set(kept), script
        assert all(len(kept[run]["test"]) == len(ablations.SEEDS) for run in rows)
    text = (ROOT / "README.md").read_text()
    assert results.filled(text, {"embedded": ablations.embedded(kept)}) == text
    assert text.count("<!-- embedded -->") == 1


def test_every_ablation_parses_and_changes_one_thing(tmp_path):
    """Flags differ from the script's own run; an edit lies in the function it names."""
    lines = ablations.commands(tmp_path)
    for script, rows in ablations.ROWS.items():
        source, parse = (ROOT / f"{script}.py").read_text(), importlib.import_module(script)
        for run, (_, change, _) in rows.items():
            if change is None:
                continue
            command = next(line for line in lines if line.endswith(f"/{run}"))
            _, _, path, *flags = shlex.split(command)
            arguments = vars(parse.parse_args([*flags, "--device", "cpu"]))
            assert arguments["seed"] == [*ablations.SEEDS] and arguments["dataset"] == "shapes"
            if run == script:
                own = arguments
            elif isinstance(change, ablations.Edit):
                changed = [node.name for node in ast.walk(ast.parse(source))
                           if isinstance(node, ast.FunctionDef)
                           and change.old in ast.get_source_segment(source, node)]
                assert changed == [change.function], run
                assert (tmp_path / path).read_text() == source.replace(change.old, change.new)
            else:
                assert path == f"{script}.py" and {**arguments, "out": 0} != {**own, "out": 0}, run


def test_ablations_are_collected(run, tmp_path, monkeypatch):
    """A run of two seeds; one that lacks a seed is left out; a table of what there is."""
    monkeypatch.setattr(ablations, "KEPT", tmp_path / "ablations.json")
    monkeypatch.setattr(ablations, "SEEDS", range(2))
    run("switokd", tmp_path / "switokd", "--seed 0 1")
    run("switokd", tmp_path / "switokd-switch/seed-0", "--switch never")
    ablations.collect(tmp_path)
    kept = json.loads(ablations.KEPT.read_text())
    tests = [json.loads((tmp_path / f"switokd/seed-{seed}/result.json").read_text())["last_test"]
             for seed in (0, 1)]
    assert list(kept) == ["switokd"] and kept["switokd"]["test"] == tests
    assert f"| {results.spread(tests)} |" in ablations.table("switokd", kept)
