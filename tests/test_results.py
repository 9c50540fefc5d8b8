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
    pages = [(ROOT / name).read_text() for name in results.PAGES]
    readme = pages[-1]
    for name, block in (results.blocks() | results.blocks(results.END)).items():
        page, = (text for text in pages if f"<!-- {name} -->" in text)
        holds(page, name, block)
    kept = json.loads(ablations.KEPT.read_text())
    holds(readme, "embedded", ablations.embedded(kept))
    for script, rows in ablations.ROWS.items():
        holds((ROOT / f"docs/{script}.md").read_text(), "removed", ablations.table(script, kept))
        assert all(len(kept[run]["test"]) == len(ablations.SEEDS) for run in rows)


FOUND = results.records()
TABLE = {seed: runs for seed, runs in FOUND.items() if seed != results.TUNING}
END = results.records(results.END)
LONG = [runs for runs in END.values() if "greedy" in runs]


def gap(ours, theirs, measure=None, found=FOUND):
    """(mean, low, high) of the paired differences."""
    return results.interval(results.paired(found, ours, theirs, measure))


def below(ours, theirs, measure=None, found=FOUND):
    return gap(theirs, ours, measure, found)


def mean(run, measure=None, found=FOUND):
    values = [ours for ours, _ in results.paired(found, run, run, measure)]
    return sum(values) / len(values)


def times(run, other, found):
    """The multiply-adds of `run` in those of `other`."""
    record, base = next((runs[run], runs[other]) for runs in found.values() if run in runs)
    return results.compute(record) / results.compute(base)


def shares(run, other):
    """Of the multiply-adds of `other`, smallest and largest share that `run` saves, in %."""
    saved = [100 * (1 - results.compute(runs[run]) / results.compute(runs[other]))
             for runs in TABLE.values()]
    return min(saved), max(saved)


KEPT = json.loads(ablations.KEPT.read_text())  # the runs with one thing removed


def removal(run, other):
    return results.interval(ablations.pairs(KEPT, run, other))


EEI = sorted(route - eei for eei, route in ablations.pairs(KEPT, "rco", "rco-route"))
TEACHERS = {run: sorted(KEPT[f"switokd{run}"]["teacher"]) for run in (
    "", "-epsilon", "-guard", "-peer", "-online")}
LETKD = [abs(removal("letkd", f"letkd-{run}")[0]) for run in (
    "supervision", "forward", "sub", "decisions", "inter", "layers", "words", "relu")]
STUDENT, TEACHER = TABLE[1]["kd-15"]["multiply_adds"]
PROSE = {  # of the pages in GIVEN: the text, with {} for what follows from the records
    "costs 1/{:.0f} of its multiply-adds": [TEACHER / STUDENT],
    "student alone: by {:.1f}, {:.1f} and {:.1f} points at 15, 30 and 45": [
        gap(f"kd-{E}", f"alone-{E}")[0] for E in (15, 30, 45)],
    "cost no more than 15 of KD, and are {:.1f} points ahead": gap("alone-75", "kd-15"),
    "costs a {:.0f}th of its teacher": [TEACHER / STUDENT],
    "one-stage barely: {:+.1f} [{:+.1f}, {:.1f}]": gap("one-stage", "kd-30"),
    "cost KD {:.1f} points": below("kd-restarts", "kd-15"),
    "restarts is open: {:+.1f} [{:+.1f}, {:+.1f}]": gap("eei", "kd-restarts"),
    "It is {:.1f} points below KD": below("switokd", "kd-15"),
    "At as many epochs {:.1f} and {:.1f} points below mutual learning": [
        below(f"trikd {g}", f"mutual-{15 * (g + 1)}")[0] for g in (1, 2)],
    "generation 1 is {:.1f} points ahead [{:.1f}, {:.1f}]": gap("trikd 1", "mutual-15"),
    "its teacher {:.1f} behind": below("trikd 1", "mutual-15", "teacher"),
    "LetKD-2 minus unsupervised layers: {:+.1f} [{:+.1f}, {:+.1f}]": gap("letkd-2", "unsupervised"),
    "KD on logits is {:.0f} to {:.0f} points ahead": [
        below(f"letkd-{layers}", "kd-15")[0] for layers in (1, 2)],
    "{:.1f} points below KD on as many plain originals, random augmentation {:.1f}": [
        below(run, "kd-2b")[0] for run in ("tst", "random")],
    "teacher {:.3f} to {:.3f}, student {:.3f} to {:.3f}": [
        mean("tst", f"{who}_{when}") for who in "TS" for when in ("before", "after")],
    "save {:.0f} to {:.0f} % of the multiply-adds": shares("firing", "firing-never"),
    "The teacher loses {:.1f} points [{:+.1f}, {:+.1f}]": [
        below("firing", "firing-never", "teacher")[0],
        *gap("firing", "firing-never", "teacher")[1:]],
    "tried first, gave {:.2f} and {:.2f}": [FOUND[9][f"RCO-{N}"]["test"] for N in (8, 15)],
    # the second table
    "alone are {:.1f} points above 120, 480 are {:.1f}": [
        gap(f"alone-{E}", "alone-120", found=END)[0] for E in (240, 480)],
    "the gain is open ({:+.1f} [{:+.1f}, {:+.1f}])": gap("alone-480", "alone-240", found=END),
    "KD is ahead, by {:.1f} at 120, by {:.1f} at 480": [
        gap(f"kd-{E}", f"alone-{E}", found=END)[0] for E in (120, 480)],
    "480 epochs is {:.1f} [{:.1f}, {:.1f}] above KD of 120": gap("eei-480", "kd-120", found=END),
    "KD of 480 costs the same and is {:.1f} [{:.1f}, {:.1f}] above": gap(
        "kd-480", "eei-480", found=END),
    "but takes {:.0f}, of 30 epochs": [*{runs["greedy"]["epochs"] / 30 for runs in LONG}],
    "It is {:.1f} [{:.1f}, {:.1f}] below KD of 480": below("greedy", "kd-480", found=END),
    "alone is {:+.1f} [{:+.1f}, {:+.1f}] at as many epochs": gap(
        "trikd 1", "alone-240", found=END),
    "{:+.1f} [{:+.1f}, {:+.1f}] at 120": gap("trikd 1", "alone-120", found=END),
    "mutual learning of as many epochs costs {:.1f} times": [
        times("mutual-240", "trikd 1", END)],
    "TriKD's rival costs {:.1f} times as much": [times("mutual-30", "trikd 1", TABLE)],
    "and is level: {:+.1f} [{:+.1f}, {:+.1f}]": gap("trikd 1", "switokd", found=END),
    "LetKD-2 is {:.1f} [{:.1f}, {:.1f}] above the student alone":
        gap("letkd-2", "alone-120", found=END),
    "and {:+.1f} [{:+.1f}, {:+.1f}] to unsupervised layers":
        gap("letkd-2", "unsupervised", found=END),
    "plain images is {:.1f} [{:.1f}, {:.1f}] ahead of it, and {:.1f} [{:.1f}, {:.1f}] of random": [
        *gap("kd-2b", "tst", found=END), *gap("kd-2b", "random", found=END)],
    # what the embedded set shows
    "(alone {:.0f} %)": [sum(TEACHERS["-online"]) / 5],
    "In four seeds eei is on average {:.0f} points": [sum(EEI[:4]) / 4],
    "in the fifth {:.0f}.": EEI[4:],
    "costs {:.0f} points [{:.0f}, {:.0f}]": removal("rco", "rco-stages"),
    "without T² {:.1f} times": [sum(KEPT["rco-T2"]["kl_final"]) / sum(KEPT["rco"]["kl_final"])],
    "ends at {:.0f} to {:.0f} %": TEACHERS["-epsilon"][::4],
    "paused, at {:.0f} to {:.0f} %": TEACHERS["-guard"][:4:3],
    "ends {:.0f} points lower": [(sum(TEACHERS[""]) - sum(TEACHERS["-peer"])) / 5],
    "{:.0f} points [{:+.1f}, {:+.0f}] ahead": removal("switokd-online", "switokd-switch"),
    "is {:.0f} points better to learn from, [{:+.0f}, {:+.0f}]": removal("trikd-online", "trikd"),
    "No teacher at all is {:.0f} points better, [{:+.0f}, {:+.0f}]":
        removal("trikd-teacher", "trikd"),
    "run's {:.0f} points": removal("trikd-compute", "trikd"),
    "has {:.1f}, by mutual learning {:.1f}": [
        sum(KEPT[run]["test"]) / 5 for run in ("alone-36", "trikd-compute")],
    "supervision ({:.2f}), what is added ({:.2f}), sub-classes ({:.2f})": LETKD[:3],
    "decisions ({:.2f}), their loss ({:.2f}), KD on logits ({:.2f})": LETKD[3:6],
    "words' loss ({:.2f}), what is added, the ReLU ({:.2f})": LETKD[6:],
    "(17) are worth {:.0f} points": removal("tst", "tst-originals"),
    "plain originals are {:.0f} points better": removal("tst-module", "tst"),
    "Half as many are {:.0f} points better": removal("tst-half", "tst"),
    "alone: 0 ± {:.1f}": removal("tst", "alone-12")[2:],
}
GIVEN = {  # what the prose says of protocols and machines
    "docs/results.md": "0 1 2 3 4 5 7 8 10 12 15 24 30 40 45 60 64 75 95 120 240 480 512 0.05 0.4 "
                       "0.9 5,000 10,000 20,000 2.14.1",
    "docs/protocol.md": "0 1 2 3 4 5 6 7 8 9 10 14 15 16 24 30 45 64 75 95 120 0.05 0.2 0.5 0.8 "
                        "0.9 5,000 10,000 16,000",
    "README.md": "1 2 4 6 10 12 15 16 20 36 64 75 120 512 0.1 2,000 2,500 5,000 2.14.1 "
                 "20,000",
    # numbers of equations and flags, parts of the data, what other runs than these measured
    "docs/rco.md": "1 3 4 5 6 7 8 13 15 78 84", "docs/switokd.md": "8", "docs/trikd.md": "0 0.1 36",
    "docs/letkd.md": "0 832", "docs/tst.md": "0 12 13 14 80"}


def prose(page):
    """Without blocks, code and commands, in one line: of a method's page below its removals."""
    text = (ROOT / page).read_text()
    if page == "README.md":
        text = text.partition("**The embedded set")[2].partition("## Running")[0]
    if "<!-- removed -->" in text:
        text = text.partition("<!-- removed -->")[2].partition("<!-- end -->")[2]
        text = text.partition("\n## ")[0]
    text = re.sub(r"<!-- (?!end -->).*?<!-- end -->|```.*?```|`[^`]*`", " ", text, flags=re.DOTALL)
    return " ".join(text.split())


def test_every_number_of_the_prose_follows_from_the_records():
    """Each of PROSE stands in a page, and a number beside them is one of GIVEN."""
    pages = {page: prose(page) for page in GIVEN}
    for words, values in PROSE.items():
        said = words.format(*values)
        assert any(said in text for text in pages.values()), said
        pages = {page: text.replace(said, " ") for page, text in pages.items()}
    for page, text in pages.items():
        numbers = re.findall(r"(?<![\w.,])[-+]?\d+(?:[.,]\d+)*(?!\w)", text)
        assert {*numbers} <= {*GIVEN[page].split()}, page


def test_what_the_prose_calls_ahead_and_level():
    """Ahead: the interval is above 0. Level: it contains 0, and the mean is below a point."""
    behind = {run for run, record in TABLE[1].items() if record["epochs"] in (15, 30)
              and run not in ("teacher-30", "kd-30")}
    assert all(gap("alone-75", run)[1] > 0 for run in behind) and len(behind) == 18
    for pair in [("alone-75", run) for run in ("kd-45", "kd-60", "eei-60")] + [
            ("eei", "kd-15"), ("eei-60", "kd-60"), ("tst", "random"), ("tst", "alone-30"),
            ("trikd 2", "trikd 1"), ("letkd-1", "heads-1"), ("letkd-2", "heads")]:
        middle, low, high = gap(*pair)
        assert low < 0 < high and abs(middle) < 1, pair
    for found, kd, behind in ((TABLE, "kd-15", "mutual-15 letkd-1"), (END, "kd-120", "")):
        for run in ["switokd", "letkd-2", "tst", *behind.split()]:
            assert gap(run, "kd-2b" if run == "tst" else kd, found=found)[2] < 0, run
    assert all(gap(f"trikd {g}", f"{run}-{15 * (g + 1)}")[2] < 0
               for g in (1, 2) for run in ("kd", "alone"))
    assert abs(gap("kd-120", "letkd-2", found=END)[0]
               - gap("letkd-2", "alone-120", found=END)[0]) < 0.1
    assert abs(times("mutual-240", "trikd 1", END) - times("mutual-30", "trikd 1", TABLE)) < 0.01
    assert gap("letkd-1", "kd-120", found=END)[2] > 0
    route = [(END, "eei", "kd-120"), (END, "one-stage", "kd-120"), (END, "eei-480", "kd-480"),
             (FOUND, "eei", "kd-15"), (FOUND, "one-stage", "kd-30"), (FOUND, "eei-60", "kd-60")]
    assert all(abs(gap(run, kd, found=found)[0]) < 1 for found, run, kd in route)
    assert abs(times("alone-480", "kd-120", END) - 0.75) < 0.03
    assert abs(times("switokd", "trikd 1", END) - 0.9) < 0.03
    assert not any(runs[run]["measures"]["paused"] for runs in END.values() if "kd-120" in runs
                   for run in ("switokd", "never") if run in runs)
    for ours, theirs in (("alone-75", "kd-30"), ("eei", "kd-restarts"), ("letkd-2", "unsupervised"),
                         ("unsupervised", "alone-15"), ("firing", "firing-never")):
        assert gap(ours, theirs)[1] < 0 < gap(ours, theirs)[2], ours  # open
    assert all(gap(run, kd)[1] < 0 for _, run, kd, _ in results.ROWS if kd and run != "kd-2b")
    assert not any(gap(run, kd, found=END)[1] > 0 for _, run, kd, _ in results.END_ROWS
                   if kd and len(results.paired(END, run, kd)) >= results.LEAST)
    assert 0.9 < times("alone-75", "kd-15", TABLE) < 1


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
    tests = {tau: results.records(results.END)[results.TUNING][f"SwitOKD-{tau}"]["test"]
             for tau in results.END_GRID["SwitOKD"][1]}
    assert results.END_TAKEN["SwitOKD"] == max(tests, key=tests.get)


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
    assert {run for _, run, *_ in results.END.rows} == lengths.keys() - {"trikd"}
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
    pairs = [(2, 1), (4, 2), (6, 3)]
    assert results.difference(pairs) == "+2.00 [-0.48, +4.48]"
    assert results.difference(pairs[:2]) == "-"
    verdicts = {(0, 9): "open", (-1, 9): "seen", (-1, 4): "open", (5, 9): "contradicted",
                (-9, -1): "contradicted", (4, 9): "open"}
    assert {claim: results.verdict(pairs, *claim).strip("*") for claim in verdicts} == verdicts
    assert results.verdict([(1, 1), (2, 2), (3, 3)], *results.ABOVE) == "not tested"
    record = {"multiply_adds": [10, 100], "student": [5, 4, 0], "teacher": [3, 1, 7]}
    assert results.compute(record) == 10 * (5 + 8) + 100 * (3 + 2 + 7)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    assert results.cost(network, 8) == (27 * 4 + 4 + 256 * 5 + 5, 27 * 4 * 64 + 256 * 5)
    rows = [{"stage": 1, "s": 2.0}, {"stage": 1, "s": 1.0}, {"stage": 2, "s": 5.0}]
    assert results.seconds({"rows": rows, "searches": [{"before_epoch": 1, "s": 3.0}]}) == 2 + 5 + 3
    tests = {0: {"a": 2.0, "b": 1.0}, 1: {"a": 4.0}, 2: {"b": 0.0}, 3: {"a": 4.0, "b": 2.0},
             4: {"a": 6.0, "b": 3.0}, results.TUNING: {"a": 9.0, "b": 0.0}}
    found = {seed: {run: {"test": test} for run, test in runs.items()}
             for seed, runs in tests.items()}
    ours, gaps = results.of_row(found, "a", "b", None)  # paired: seeds 0, 3 and 4 have both
    assert [one["test"] for one in ours] == [2, 4, 4, 6] and gaps == ["+2.00 [-0.48, +4.48]", "-"]
    del found[2], found[4]  # a row of three seeds, a difference of two
    assert len(results.of_row(found, "a", "b")[0]) == 3
    assert results.of_row(found, "a", "b")[1] == ["-"] and not results.of_row(found, "b")[0]


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
