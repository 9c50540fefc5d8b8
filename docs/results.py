"""The two tables of the five methods: the commands of their runs, numbers from the records.

    python docs/results.py --commands DATA FOLDER SEED ...    print the commands, a line each
    python docs/results.py FOLDER    keep the records of the runs that have ended in docs/results/,
                                     then write the tables of PAGES
    python docs/results.py           the tables alone, from docs/results/; and the plot, where
                                     matplotlib is installed
    python docs/results.py end ...   the same two for the second protocol, of docs/protocol.md

DATA is CIFAR-10 as DATA/train/CLASS/* and DATA/test/CLASS/*; seed 9 is the tuning, with a test part
cut from DATA/train. Two commands at once: ... | OMP_NUM_THREADS=1 xargs -P 2 -d '\\n' -n 1 sh -c
"""

import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from letkd import build_student  # noqa: E402

RECORDS, PAGES = ROOT / "docs" / "results", ("docs/results.md", "docs/protocol.md", "README.md")
FLAGS = "--dataset folder --data {data} --image-size 16 --train-fraction 0.4"  # else the defaults
E = 15  # epochs of the student, the default
RCO = "rco.py --epochs 30"  # the finished teacher's epochs; for letkd.py and tst.py it is a file:
TEACHER = "--teacher-weights {place}/cache/folder-resnet20-30-*/epoch-0030.pt"
TUNING = 9  # the seed of the grid
TAKEN = {"KD": 8, "RCO": 3, "SwitOKD": 2, "TriKD": 0.2, "LetKD": 1, "TST": 1}  # what it chose
T = f"--temperature {TAKEN['KD']}"  # in whatever method has KD's loss
KD = f"{RCO} --method 'kd long' --anchors 1 --stage-epochs"  # plain KD of so many epochs
GRID = {  # method -> (what is chosen, its values, the command)
    "KD": ("T", (1, 2, 4, 8), f"{KD} {E} --temperature VALUE"),
    "RCO": ("N, with stages of 15 / N epochs, rounded up", (2, 3, 4, 5),
            f"{RCO} {T} --anchors VALUE --stage-epochs LENGTH"),
    "SwitOKD": ("tau", (0.5, 1, 2, 4), "switokd.py --temperature VALUE"),
    "TriKD": ("anchor weight, one generation", (0.1, 0.2, 0.5, 1),
              "trikd.py --generations 1 --anchor-weight VALUE"),
    "LetKD": ("alpha, two layers", (0.1, 0.2, 0.5, 1), f"letkd.py --alpha VALUE {TEACHER}"),
    "TST": ("operations", (1, 2, 4, 8), f"tst.py {T} --operations VALUE {TEACHER}"),
}
RUNS = {  # run -> its command; the constants are those that the grid chose
    **{f"kd-{epochs}": f"{KD} {epochs} {T}" for epochs in (15, 30, 45, 60)},
    "kd-2b": f"tst.py --method 'kd twice' {T} {TEACHER}",
    "one-stage": f"{RCO} --method one-stage {T}",
    "kd-restarts": f"{RCO} --method 'kd restarts' {T} --anchors 3 --stage-epochs 5",
    "eei": f"{RCO} {T} --anchors {TAKEN['RCO']} --stage-epochs 5",
    "eei-60": f"{RCO} {T} --anchors 4 --stage-epochs 15",
    "mutual-15": f"switokd.py --method never --temperature {TAKEN['SwitOKD']}",
    "switokd": f"switokd.py --temperature {TAKEN['SwitOKD']}",
    "mutual-30": "trikd.py --method 'mutual learning' --epochs 30",
    "mutual-45": "trikd.py --method 'mutual learning' --epochs 45",
    "again-75": "trikd.py --method born-again --epochs 75 --generations 1",  # for its A_0 alone
    "trikd": f"trikd.py --anchor-weight {TAKEN['TriKD']}",
    "letkd-1": f"letkd.py --method letKD-1 --alpha {TAKEN['LetKD']} {TEACHER}",
    "letkd-2": f"letkd.py --alpha {TAKEN['LetKD']} {TEACHER}",
    "unsupervised": f"letkd.py --method 'unsupervised layers' {TEACHER}",
    "heads": f"letkd.py --method 'auxiliary heads' {TEACHER}",
    "heads-1": f"letkd.py --method letKD-1 --alpha 0 {TEACHER}",
    "random": f"tst.py --method random {T} --operations {TAKEN['TST']} {TEACHER}",
    "tst": f"tst.py {T} --operations {TAKEN['TST']} {TEACHER}",
    # a small one, where SwitOKD's rule fires
    "firing": "switokd.py --dataset shapes --epochs 24",
    "firing-never": "switokd.py --method never --dataset shapes --epochs 24",
}
ROWS = [  # of the table: label, run, KD with as many epochs, the method's own control
    ("teacher, alone", "teacher-30", None, None),
    ("student alone", "alone-15", "kd-15", None), ("student alone", "alone-30", "kd-30", None),
    ("student alone", "alone-45", "kd-45", None),
    ("student alone, the compute of KD of 15", "alone-75", None, "kd-15"),
    ("KD", "kd-15", None, None), ("KD", "kd-30", None, None), ("KD", "kd-45", None, None),
    ("KD", "kd-60", None, None), ("KD, 3 stages", "kd-restarts", "kd-15", None),
    ("KD, 2B images", "kd-2b", "kd-15", None),
    ("RCO, one-stage", "one-stage", "kd-30", None),
    ("RCO, eei, 3 anchors", "eei", "kd-15", "kd-restarts"),
    ("RCO, eei, 4 anchors, as in the paper", "eei-60", "kd-60", None),
    ("never paused", "mutual-15", "kd-15", None),
    ("SwitOKD", "switokd", "kd-15", "mutual-15"),
    ("mutual learning", "mutual-30", "kd-30", None),
    ("TriKD, generation 1", "trikd 1", "kd-30", "mutual-30"),
    ("mutual learning", "mutual-45", "kd-45", None),
    ("TriKD, generation 2", "trikd 2", "kd-45", "mutual-45"),
    ("unsupervised layers", "unsupervised", "kd-15", None),
    ("auxiliary heads, one layer", "heads-1", "kd-15", None),
    ("auxiliary heads, two layers", "heads", "kd-15", None),
    ("LetKD-1", "letkd-1", "kd-15", "heads-1"), ("LetKD-2", "letkd-2", "kd-15", "heads"),
    ("random augmentation, one operation, 2B images", "random", "kd-2b", None),
    ("TST, one operation, 2B images", "tst", "kd-2b", "random"),
]
SHORT = ("teacher-30", "alone-15", "alone-75", "kd-15", "kd-2b", "eei", "eei-60", "switokd",
         "trikd 1", "trikd 2", "letkd-1", "letkd-2", "tst")  # in README.md
FIRING = [("never paused", "firing-never", None), ("SwitOKD", "firing", "firing-never")]

# The second protocol, of docs/protocol.md: few images, many epochs. Its runs stand in the order to
# run in: the first trains the finished teacher and the student alone; the long ones come late; the
# last two, of SwitOKD, wait for its grid.
END_FLAGS = "--dataset folder --data {data} --image-size 16 --train-fraction 0.1"
END_TAKEN = {**TAKEN, "RCO": 4, "SwitOKD": 2}  # N: the paper's; tau: by the grid
END_RCO = f"rco.py --epochs 120 {T}"  # the finished teacher's epochs; the student's are in a stage
END_KD = f"{END_RCO} --method 'kd long' --anchors 1 --stage-epochs"
OF_TEACHER = "--epochs 120 --teacher-weights {place}/cache/folder-resnet20-120-*/epoch-0120.pt"
END_RUNS = {
    "kd-120": f"{END_KD} 120",
    "eei": f"{END_RCO} --anchors {END_TAKEN['RCO']} --stage-epochs 30",
    "kd-restarts": f"{END_RCO} --method 'kd restarts' --anchors 4 --stage-epochs 30",
    "one-stage": f"{END_RCO} --method one-stage",
    **{run: RUNS[run].replace(TEACHER, OF_TEACHER) for run in (
        "letkd-1", "letkd-2", "heads-1", "heads", "unsupervised", "tst", "random", "kd-2b")},
    "greedy": f"{END_RCO} --method greedy --stage-epochs 30",  # as many stages as it takes
    "trikd": f"trikd.py --epochs 120 --anchor-weight {TAKEN['TriKD']}",
    "mutual-240": "trikd.py --method 'mutual learning' --epochs 240",
    "alone-480": "trikd.py --method 'student alone long' --epochs 240 --generations 1",  # 2 x 240
    "kd-480": f"{END_KD} 480",
    "eei-480": f"{END_RCO} --anchors {END_TAKEN['RCO']} --stage-epochs 120",
    "never": f"switokd.py --method never --epochs 120 --temperature {END_TAKEN['SwitOKD']}",
    "switokd": f"switokd.py --epochs 120 --temperature {END_TAKEN['SwitOKD']}",
}
END_GRID = {"SwitOKD": ("tau", (0.5, 1, 2, 4), "switokd.py --epochs 120 --temperature VALUE")}
END_ROWS = [  # as above; the student alone of 240 epochs is a by-product of mutual learning
    ("teacher, alone", "teacher-120", None, None),
    ("student alone", "alone-120", "kd-120", None), ("student alone", "alone-240", None, None),
    ("student alone", "alone-480", "kd-480", "kd-120"),
    ("KD", "kd-120", None, None), ("KD", "kd-480", None, None),
    ("KD, 4 stages", "kd-restarts", "kd-120", None), ("KD, 2B images", "kd-2b", "kd-120", None),
    ("RCO, one-stage", "one-stage", "kd-120", None),
    ("RCO, eei, 4 anchors", "eei", "kd-120", "kd-restarts"),
    ("RCO, eei, 4 anchors, as in the paper", "eei-480", "kd-480", "kd-120"),
    ("RCO, greedy", "greedy", None, "eei"),
    ("never paused", "never", "kd-120", None),
    ("SwitOKD", "switokd", "kd-120", "never"),
    ("mutual learning", "mutual-240", None, "alone-240"),
    ("TriKD, generation 1", "trikd 1", None, "mutual-240"),
    ("TriKD, generation 2", "trikd 2", None, "trikd 1"),
    ("unsupervised layers", "unsupervised", "kd-120", "alone-120"),
    ("auxiliary heads, one layer", "heads-1", "kd-120", "alone-120"),
    ("auxiliary heads, two layers", "heads", "kd-120", "alone-120"),
    ("LetKD-1", "letkd-1", "kd-120", "heads-1"), ("LetKD-2", "letkd-2", "kd-120", "heads"),
    ("random augmentation, one operation, 2B images", "random", "kd-2b", None),
    ("TST, one operation, 2B images", "tst", "kd-2b", "random"),
]
ABOVE, BELOW, LEVEL = (0, math.inf), (-math.inf, 0), (-1, 1)  # points
NOT_BELOW, NOT_ABOVE = (-1, math.inf), (-math.inf, 1)  # level, or beyond
HEADLINE = [  # claim, from, then run and other of the first table, of the second
    ("RCO of four times the epochs > KD", "PAPER", ("eei-60", "kd-15"), ("eei-480", "kd-120")),
    ("RCO, one-stage > KD", "PAPER", ("one-stage", "kd-30"), ("one-stage", "kd-120")),
    ("SwitOKD > never paused", "PAPER", ("switokd", "mutual-15"), ("switokd", "never")),
    ("TriKD > mutual learning of as many epochs", "PAPER, in words; rival: READING",
     ("trikd 1", "mutual-30"), ("trikd 1", "mutual-240")),
    ("LetKD-2 > KD", "PAPER", ("letkd-2", "kd-15"), ("letkd-2", "kd-120")),
    ("LetKD-2 > auxiliary heads", "PAPER", ("letkd-2", "heads"), ("letkd-2", "heads")),
    ("TST > random augmentation", "PAPER, in words", ("tst", "random"), ("tst", "random")),
    ("TST > KD on as many images", "PAPER, in words", ("tst", "kd-2b"), ("tst", "kd-2b")),
    ("RCO of four times the epochs > KD of as many", "READING",
     ("eei-60", "kd-60"), ("eei-480", "kd-480")),
    ("KD > student alone", "READING", ("kd-15", "alone-15"), ("kd-120", "alone-120")),
    ("KD > student alone of no more multiply-adds", "READING",
     ("kd-15", "alone-75"), ("kd-120", "alone-480")),
]
END_CLAIMS = [  # what docs/protocol.md predicts of run - other (of a measure): between what it lies
    ("the regime", [("alone 480 at most a point above alone 120",
                     "alone-480", "alone-120", NOT_ABOVE)]),
    ("KD", [("KD 120 > alone 120 *", "kd-120", "alone-120", ABOVE),
            ("KD 120 > alone 480", "kd-120", "alone-480", ABOVE),
            ("with restarts at most a point above KD 120 *", "kd-restarts", "kd-120", NOT_ABOVE)]),
    ("RCO", [("eei 480 > KD 120", "eei-480", "kd-120", ABOVE),
             ("eei 480 > KD 480", "eei-480", "kd-480", ABOVE),
             ("eei 120 > KD with restarts *", "eei", "kd-restarts", ABOVE),
             ("one-stage > KD 120", "one-stage", "kd-120", ABOVE),
             ("one-stage at most a point below eei 480", "one-stage", "eei-480", NOT_BELOW),
             ("greedy 510 at most a point below eei 120", "greedy", "eei", NOT_BELOW)]),
    ("SwitOKD", [("SwitOKD > never paused", "switokd", "never", ABOVE),
                 ("teacher below the one never paused", "switokd", "never", BELOW, "teacher")]),
    ("TriKD", [("generation 1 > mutual learning", "trikd 1", "mutual-240", ABOVE),
               ("generation 2 > generation 1", "trikd 2", "trikd 1", ABOVE),
               ("generation 2 (360) > mutual learning (240)", "trikd 2", "mutual-240", ABOVE),
               ("`s_gap`: below mutual learning's", "trikd 1", "mutual-240", BELOW, "s_gap"),
               ("`t_gap`: below mutual learning's", "trikd 1", "mutual-240", BELOW, "t_gap")]),
    ("LetKD", [("LetKD-2 > LetKD-1", "letkd-2", "letkd-1", ABOVE),
               ("LetKD-1 > KD 120", "letkd-1", "kd-120", ABOVE),
               ("LetKD-2 > KD 120", "letkd-2", "kd-120", ABOVE),
               ("LetKD-2 > auxiliary heads, two layers", "letkd-2", "heads", ABOVE),
               ("auxiliary heads, one layer > alone 120", "heads-1", "alone-120", ABOVE),
               ("auxiliary heads, two layers > alone 120", "heads", "alone-120", ABOVE),
               ("unsupervised layers within a point of alone 120",
                "unsupervised", "alone-120", LEVEL)]),
    ("TST", [("TST > random augmentation", "tst", "random", ABOVE),
             ("TST > KD on as many images", "tst", "kd-2b", ABOVE),
             ("random augmentation > the same KD", "random", "kd-2b", ABOVE)]),
]

# prefix: of the names of its records' files and of its blocks in the pages
FIRST = SimpleNamespace(prefix="", flags=FLAGS, taken=TAKEN, grid=GRID, runs=RUNS, rows=ROWS)
END = SimpleNamespace(prefix="end-", flags=END_FLAGS, taken=END_TAKEN, grid=END_GRID,
                      runs=END_RUNS, rows=END_ROWS)
LEAST = 3  # seeds: a row or a difference of fewer is not printed


# --------------------------------------------------------------------------------------- commands
def commands(data, folder, seed, protocol=FIRST):
    """The command lines of a seed: of the table, or of the grid."""
    place, runs = f"{folder}/seed-{seed}", protocol.runs
    if seed == TUNING:
        runs = {f"{method}-{value}": command.replace("VALUE", str(value)).replace(
                    "LENGTH", str(math.ceil(E / value)))
                for method, (_, values, command) in protocol.grid.items() for value in values}
        data = f"{data}/train"  # whose test part are 10,000 images on which no run of it trains
    flags = protocol.flags.format(data=data)
    return [line(command, flags, seed, place, f"{place}/{name}") for name, command in runs.items()]


def line(command, flags, seed, place, out):
    """A run's command line; its own flags come after the shared ones."""
    script, own = command.format(place=place).split(" ", 1)
    shared = "" if "--dataset" in own else flags + " "
    return f"python {script} {shared}{own} --seed {seed} --cache {place}/cache --out {out}"


# ---------------------------------------------------------------------------------------- records
def cost(network, image_size):
    """(parameters, multiply-adds for one image); torch counts a multiplication and an addition."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    return sum(part.numel() for part in network.parameters()), counter.get_total_flops() // 2


def seconds(result):
    """Of each stage, epochs times the fastest: what else the machine does makes some slow."""
    times = {}
    for row in [*result["rows"], *result.get("searches", ())]:  # a search's rows are passes
        times.setdefault((row.get("stage"), "before_epoch" in row), []).append(row["s"])
    return sum(min(stage) * len(stage) for stage in times.values())


def kept(name, result, alone=None):
    """{name: what the tables need of a result.json}, of two generations of TriKD one each.

    student, teacher: images that went [forward, backward, backward to the image alone] through
    them in training; an anchor with a weight is a student. `alone`: the result of TriKD's A_0.
    """
    settings, measures = result["arguments"], result.get("measures", {})
    classes, size = len(settings["data"]["classes"]), settings["data"]["image_size"]
    names = settings.get("network") or settings["student"], settings.get("teacher", "resnet20")
    names = [name[0] if isinstance(name, list) else name for name in names]  # switokd.py's
    layers, templates = settings.get("layers"), ()
    if layers:  # LetKD's
        templates = classes * settings["per_class"] * (layers == 2), settings["words"]
    parameters, of_student = cost(build_student(names[0], classes, size, *templates), size)
    _, of_teacher = cost(build_student(names[1], classes, size), size)
    seen = sum(round(row["img/s"] * row["s"]) for row in result["rows"])
    student, teacher = [seen, seen, 0], [seen, 0, 0]
    if "network" in settings or settings.get("supervision") == "none":  # alone; no teacher
        teacher = [0, 0, 0]
    if "paused" in measures:  # a teacher that learns with its student
        teacher = [seen, seen * (1 - measures["paused"] / 100), 0]
    if "k_images" in measures:  # TST's; in its searches images alone get a gradient
        taught, searched = (round(1000 * measures[key]) for key in ("k_images", "k_searched"))
        student, teacher = ([taught + searched, learned, searched] for learned in (taught, 0))
    record = {
        "arguments": {key: value for key, value in settings.items()
                      if key not in ("data", "rates", "plan", "candidates")},
        **{key: result[key] for key in ("commit", "torch", "threads")},
        "test": result["last_test"], "epochs": len(result["rows"]), "student": student,
        "teacher": teacher, "multiply_adds": [of_student, of_teacher],
        "parameters": measures.get("params", parameters),  # LetKD's: without auxiliary heads
        "measures": measures, "seconds": round(seconds(result), 1)}
    if "paused" in measures:  # when, in %, and each epoch's seconds: the fastest hide the pauses
        record["by_epoch"] = [[round(row["paused"], 1), row["s"]] for row in result["rows"]]
    if "table" not in result:
        return {name: record}
    found, G, peer = {}, len(result["table"]), settings["peer"]
    anchored = any(settings["anchor_weight"])
    for g, one in enumerate(result["table"], 1):
        done, first = seen * g // G, seen // G * anchored  # of A_0
        found[f"{name} {g}" if G > 1 else name] = {
            **record, "test": one["test"], "measures": one, "epochs": one["epochs"],
            "student": [first + done * (1 + anchored), first + done, 0],
            "teacher": [done * (peer != "none"), done * (peer == "online"), 0],
            "seconds": round(seconds(result) * g / G + (seconds(alone) if first else 0), 1)}
    return found


def collect(folder, protocol=FIRST):
    """Write docs/results/(end-)seed-S.json, {run: see `kept`}, for each seed in `folder`.

    Runs of a seed that stand there and are not in `folder` stay: it may hold a later part of them.
    """
    RECORDS.mkdir(exist_ok=True)
    for place in sorted(folder.glob("seed-*")):
        seed, ended = int(place.name[5:]), {}
        file = RECORDS / f"{protocol.prefix}{place.name}.json"
        for path in sorted(place.glob("*/*/result.json")):
            result, name = json.loads(path.read_text()), path.parents[1].name
            if name == "cache":  # teachers and students alone
                kind = {seed: "alone", seed + 1000: "teacher"}[result["arguments"]["seed"]]
                name = f"{kind}-{len(result['rows'])}"
            if name in ended:
                sys.exit(f"results.py: error: {place} holds {name} twice: remove one")
            ended[name] = result
        found = json.loads(file.read_text()) if file.exists() else {}
        for name, result in ended.items():
            found |= kept(name, result, ended.get(f"alone-{result['arguments'].get('epochs')}"))
        file.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}"
                                           for name, record in sorted(found.items())) + "\n}\n")


def records(protocol=FIRST):
    """{seed: {run: its record}} of docs/results/."""
    name = f"{protocol.prefix}seed-"
    return {int(path.stem.removeprefix(name)): json.loads(path.read_text())
            for path in sorted(RECORDS.glob(f"{name}*.json"))}


# ----------------------------------------------------------------------------------------- tables
QUANTILES = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by number of seeds


def spread(values, digits=2):
    """mean ± standard deviation (n - 1); of one seed, or of a count, without."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) < 2 or not digits:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def interval(pairs):
    """(mean, low, high) of the paired differences: their 95 % interval."""
    gaps = [ours - theirs for ours, theirs in pairs]
    mean = statistics.mean(gaps)
    half = QUANTILES[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - half, mean + half


def difference(pairs):
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval(pairs)) if len(pairs) >= LEAST else "-"


def paired(found, run, other, measure=None):
    """[(of the run, of the other)], test accuracies or a measure: of the seeds that have both."""
    return [tuple(one[name]["measures"][measure] if measure else one[name]["test"]
                  for name in (run, other))
            for seed, one in found.items() if seed != TUNING and run in one and other in one]


def verdict(pairs, floor, ceiling):
    """Whether the difference lies between the two, as a claim says: by its interval."""
    _, low, high = interval(pairs)
    if all(ours == theirs for ours, theirs in pairs):
        return "not tested"  # the same run twice
    if high < floor or low > ceiling:
        return "**contradicted**"
    return "**seen**" if low > floor and high < ceiling else "open"


def compute(record):
    """Multiply-adds of the training: forward 1, backward 2, backward to the image alone 1."""
    return sum(madds * (forward + 2 * backward + image)
               for madds, (forward, backward, image) in zip(
                   record["multiply_adds"], (record["student"], record["teacher"])))


def markdown(header, lines):
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def of_row(found, run, *others):
    """The records of `run`, if enough seeds have them; and its differences to the others."""
    ours = [one[run] for seed, one in found.items() if seed != TUNING and run in one]
    return (ours if len(ours) >= LEAST else [],
            [difference(paired(found, run, other)) for other in others])


def main_tables(found, protocol):
    """(the table of the page, its short form)."""
    long, short, names = [], [], {run: label for label, run, *_ in protocol.rows}
    for label, run, kd, control in protocol.rows:
        ours, (gap, own_gap) = of_row(found, run, kd, control)
        if not ours:
            continue
        thousand = [f"{statistics.mean(r[who][0] for r in ours) / 1000:.0f}, "
                    f"{statistics.mean(r[who][1] + r[who][2] for r in ours) / 1000:.0f}"
                    for who in ("student", "teacher")]
        epochs = f"{statistics.mean(record['epochs'] for record in ours):.0f}"  # greedy's differ
        first = [label, epochs, spread([record["test"] for record in ours]), gap]
        work = f"{statistics.mean(map(compute, ours)) / 1e12:.1f}"
        seconds = statistics.median(record["seconds"] for record in ours)
        if own_gap != "-":
            others, _ = of_row(found, control)
            length = f" of {others[0]['epochs']}" * (others[0]["epochs"] != ours[0]["epochs"])
            own_gap += f" ({names[control]}{length})"
        long.append([*first, own_gap, *thousand, work, f"{seconds:.0f}",
                     f"{ours[0]['parameters']:,}", len(ours)])
        if run in SHORT:
            short.append([*first, own_gap, work])
    return (markdown(["run", "epochs", "accuracy", "to KD", "to its control",
                      "student: images forward, backward (thousands)", "teacher: the same",
                      "multiply-adds (10^12)", "seconds", "parameters", "seeds"], long),
            markdown(["run", "epochs", "accuracy", "to KD [95 %]", "to its control [95 %]",
                      "multiply-adds (10^12)"], short))


def firing_table(found, measures=("teacher", "paused", "switches")):
    lines = []
    for label, run, control in FIRING:
        ours, (gap,) = of_row(found, run, control)
        lines.append([label, ours[0]["epochs"], spread([r["test"] for r in ours]), gap,
                      *(spread([r["measures"][name] for r in ours]) for name in measures),
                      f"{statistics.mean(map(compute, ours)) / 1e12:.2f}", len(ours)])
    return markdown(["run", "epochs", "accuracy", "difference", *measures,
                     "multiply-adds (10^12)", "seeds"], lines)


def tuning_table(of_seed, protocol):
    """The grid; the value that was taken is bold."""
    lines = []
    for method, (constant, values, _) in protocol.grid.items():
        tests = [of_seed.get(f"{method}-{value}", {}).get("test") for value in values]
        cells = [f"{value}: " + ("-" if test is None else f"{test:.2f}")
                 for value, test in zip(values, tests)]
        taken = protocol.taken[method]
        lines.append([method, constant, *(f"**{cell}**" if value == taken else cell
                                          for value, cell in zip(values, cells))])
    return markdown(["method", "constant", *["value: accuracy"] * 4], lines)


def headline(*tables):
    """What the papers claim, and what we add, in both tables."""
    lines = []
    for said, source, *runs in HEADLINE:
        pairs = [paired(found, *two) for found, two in zip(tables, runs)]
        lines.append([said, source,
                      *(f"{difference(one)}, {verdict(one, *ABOVE)}" for one in pairs)])
    return markdown(["claim", "from", "first table, points [95 %]", "second table"], lines)


def claims_table(found):
    """What was predicted of the second protocol, and what came."""
    lines = []
    for of, claims in END_CLAIMS:
        cells = []
        for said, run, other, limits, *measure in claims:
            pairs = paired(found, run, other, *measure)
            if len(pairs) >= LEAST:
                cells.append([said, difference(pairs), verdict(pairs, *limits)])
        if cells:
            lines.append([of, *("<br>".join(column) for column in zip(*cells))])
    return markdown(["of", "predicted", "points [95 %]", "came"], lines)


def blocks(protocol=FIRST):
    """{name of a block in the pages: its text}, made from docs/results/ alone."""
    found = records(protocol)
    long, short = main_tables(found, protocol)
    tuning = tuning_table(found.get(TUNING, {}), protocol)
    if protocol is END:
        return {"end-table": long, "end-tuning": tuning, "end-claims": claims_table(found),
                "headline": headline(records(), found)}
    return {"table": long, "short table": short, "tuning": tuning, "firing": firing_table(found)}


def filled(text, of):
    """A page with each block between `<!-- name -->` and `<!-- end -->` written anew."""
    for name, block in of.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = f"{before}{mark}{block}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def plot():
    """docs/results.png: accuracy against compute, one point a run, both tables."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    kind = {run: label.split(",")[0].rstrip("-12") for label, run, *_ in ROWS + END_ROWS}
    places = [*dict.fromkeys(kind.values())]
    for axes, protocol, title in zip(panels, (FIRST, END), ("20,000 images", "5,000 images")):
        for _, run, *_ in protocol.rows:
            place = places.index(kind[run])
            ours, _ = of_row(records(protocol), run)
            axes.scatter([compute(one) / 1e12 for one in ours], [one["test"] for one in ours],
                         s=18, color=f"C{place % 10}", marker="os^"[place // 10], label=kind[run])
        axes.set(xscale="log", ylabel="test accuracy (%)", title=title)
        axes.set_xticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
        axes.minorticks_off()
    figure.supxlabel("multiply-adds of the training (10^12), without the finished teacher's")
    handles = dict(zip(*reversed(panels[1].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right")
    figure.savefig(ROOT / "docs" / "results.png", dpi=100)


def main(arguments):
    protocol = FIRST
    if arguments[:1] == ["end"]:
        protocol, arguments = END, arguments[1:]
    if arguments[:1] == ["--commands"]:
        data, folder, *seeds = arguments[1:]
        print(*(line for seed in seeds for line in commands(data, folder, int(seed), protocol)),
              sep="\n")
        return
    if arguments:
        collect(Path(arguments[0]), protocol)
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(), blocks(FIRST) | blocks(END)))
    try:
        plot()
    except ImportError:
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main(sys.argv[1:])
