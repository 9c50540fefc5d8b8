"""One table of the five methods: the commands of its runs, and its numbers from their records.

    python docs/results.py --commands DATA FOLDER SEED ...    print the commands, a line each
    python docs/results.py FOLDER    keep the records of the runs that have ended in docs/results/,
                                     then write the tables of docs/results.md and README.md
    python docs/results.py           the tables alone, from docs/results/; and the plot, where
                                     matplotlib is installed

DATA is CIFAR-10 as DATA/train/CLASS/* and DATA/test/CLASS/*; seed 9 is the tuning, with a test part
cut from DATA/train. Two commands at once: ... | OMP_NUM_THREADS=1 xargs -P 2 -d '\\n' -n 1 sh -c
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORDS = ROOT / "docs" / "results"

FLAGS = "--dataset folder --data {data} --image-size 16 --train-fraction 0.4"  # else the defaults
E = 15  # epochs; trikd.py divides its own by --train-fraction: 6 / 0.4 = 15
RCO = "rco.py --epochs 30"  # the finished teacher's epochs; for letkd.py and tst.py it is a file:
TEACHER = "--teacher-weights {place}/cache/folder-resnet20-30-*/epoch-0030.pt"
T = "--temperature 8"  # the grid's choice for KD, in whatever method has KD's loss
TUNING = 9  # the seed of the grid
GRID = {  # method -> (what is chosen, its values, the command)
    "KD": ("T", (1, 2, 4, 8), f"{RCO} --strategy kd --stage-epochs {E} --temperature VALUE"),
    "RCO": ("N, with stages of about 15 / N epochs", (2, 4, 8, 15),
            f"{RCO} {T} --anchors VALUE --stage-epochs LENGTH"),
    "SwitOKD": ("tau", (0.5, 1, 2, 4), "switokd.py --temperature VALUE"),
    "TriKD": ("anchor weight, one generation", (0.1, 0.2, 0.5, 1),
              "trikd.py --epochs 6 --generations 1 --anchor-weight VALUE"),
    "LetKD": ("alpha, two layers", (0.1, 0.2, 0.5, 1), f"letkd.py --alpha VALUE {TEACHER}"),
    "TST": ("operations", (1, 2, 4, 8), f"tst.py {T} --operations VALUE {TEACHER}"),
}
RUNS = {  # run -> its command; the constants are those that the grid chose
    "kd-15": f"{RCO} {T} --strategy kd --stage-epochs 15",
    "kd-30": f"{RCO} {T} --strategy kd --stage-epochs 30",
    "kd-45": f"{RCO} {T} --strategy kd --stage-epochs 45",
    "kd-60": f"{RCO} {T} --strategy kd --stage-epochs 60",
    "kd-2b": f"tst.py {T} --augment twice {TEACHER}",
    "one-stage": f"{RCO} {T} --strategy one-stage",
    "eei": f"{RCO} {T} --anchors 4 --stage-epochs 4",
    "eei-60": f"{RCO} {T} --anchors 4 --stage-epochs 15",
    "mutual-15": "switokd.py --temperature 2 --switch never",
    "switokd": "switokd.py --temperature 2",
    "mutual-30": "trikd.py --epochs 12 --generations 1 --anchor-weight 0",
    "mutual-45": "trikd.py --epochs 18 --generations 1 --anchor-weight 0",
    "trikd": "trikd.py --epochs 6 --anchor-weight 0.2",
    "letkd-1": f"letkd.py --layers 1 {TEACHER}",
    "letkd-2": f"letkd.py {TEACHER}",
    "unsupervised": "letkd.py --supervision none",
    "heads": f"letkd.py --alpha 0 {TEACHER}",
    "random": f"tst.py {T} --augment random {TEACHER}",
    "tst": f"tst.py {T} {TEACHER}",
    # two small ones, where a method's claim lives elsewhere; 4 / 0.1 = 40 epochs
    "firing": "switokd.py --dataset shapes --epochs 24",
    "firing-never": "switokd.py --dataset shapes --epochs 24 --switch never",
    "few-trikd": "trikd.py --train-fraction 0.1 --epochs 4 --generations 1 --anchor-weight 0.2",
    "few-mutual": "trikd.py --train-fraction 0.1 --epochs 8 --generations 1 --anchor-weight 0",
}
ROWS = [  # of the table: label, run, the run it is compared with
    ("teacher, alone", "teacher-30", None),
    ("student alone", "alone-15", "kd-15"), ("student alone", "alone-30", "kd-30"),
    ("student alone", "alone-45", "kd-45"),
    ("KD", "kd-15", None), ("KD", "kd-30", None), ("KD", "kd-45", None), ("KD", "kd-60", None),
    ("KD, 2B images a step", "kd-2b", "kd-15"),
    ("RCO, one-stage", "one-stage", "kd-30"), ("RCO, eei, equal compute", "eei", "kd-15"),
    ("RCO, eei, as in the paper", "eei-60", "kd-60"),
    ("mutual learning", "mutual-15", "kd-15"), ("SwitOKD", "switokd", "kd-15"),
    ("mutual learning", "mutual-30", "kd-30"), ("TriKD, generation 1", "trikd 1", "kd-30"),
    ("mutual learning", "mutual-45", "kd-45"), ("TriKD, generation 2", "trikd 2", "kd-45"),
    ("LetKD-1", "letkd-1", "kd-15"), ("LetKD-2", "letkd-2", "kd-15"),
    ("unsupervised layers", "unsupervised", "kd-15"), ("auxiliary heads", "heads", "kd-15"),
    ("random augmentation, 2B images", "random", "kd-2b"), ("TST, 2B images", "tst", "kd-2b"),
]
SMALL = {  # table: its rows as above, and columns from the runs' measures
    "firing": ([("never paused", "firing-never", None), ("SwitOKD", "firing", "firing-never")],
               ("teacher", "paused", "switches")),
    "few": ([("student alone", "alone-40", None), ("student alone", "alone-80", "few-mutual"),
             ("mutual learning", "few-mutual", None),
             ("TriKD, generation 1", "few-trikd", "few-mutual")], ("s_gap", "teacher", "t_gap")),
}


# --------------------------------------------------------------------------------------- commands
def commands(data, folder, seed):
    """The command lines of a seed: of the table, or of the grid."""
    runs = RUNS
    if seed == TUNING:
        runs = {f"{method}-{value}": command.replace("VALUE", str(value)).replace(
                    "LENGTH", str(math.ceil(E / value)))
                for method, (_, values, command) in GRID.items() for value in values}
        data = f"{data}/train"  # whose test part are 10,000 training images that no run trains on
    place = f"{folder}/seed-{seed}"
    return [line(command, data, seed, place, f"{place}/{name}") for name, command in runs.items()]


def line(command, data, seed, place, out):
    """A run's command line; its own flags come after the shared ones."""
    script, _, own = command.partition(" ")
    shared = "" if "--dataset" in own else FLAGS.format(data=data) + " "
    own = own.format(place=place) + " " if own else ""
    return f"python {script} {shared}{own}--seed {seed} --cache {place}/cache --out {out}"


# ---------------------------------------------------------------------------------------- records
def kept(name, result):
    """{name: what the tables need of a result.json}, of two generations of TriKD one each.

    student, teacher: [images forward, images backward] through them; an anchor is a student.
    """
    from common import build_model
    from letkd import cost
    rows, images, measures = (result.get(key, {}) for key in ("rows", "images", "measures"))
    arguments, script, epochs = result["arguments"], result["script"], len(rows)
    seen = sum(round(row["img/s"] * row["s"]) for row in rows)
    fastest = {}  # of each stage: what else the machine does makes single epochs slow
    for row in rows:
        fastest[row.get("stage")] = min(row["s"], fastest.get(row.get("stage"), math.inf))
    student, teacher = [seen, seen], [images.get("teacher forward", 0), 0]
    names = [arguments.get("network") or arguments["student"], arguments.get("teacher", "resnet20")]
    (parameters, of_student), (_, of_teacher) = (  # switokd.py has lists of names
        cost(build_model(str(name).strip("[']"), 10, 16), 16) for name in names)
    multiply_adds = [of_student, of_teacher]
    if script == "letkd" and images:
        parameters, multiply_adds[0] = measures["params"], measures["madds"]
    if script == "switokd" and images:
        teacher = [seen, seen * images["teacher backward, share"]]
    if script == "tst" and images:
        both, epochs = images["both forward and backward to the image"], arguments["epochs"]
        student = [images["student forward and backward"] + both] * 2
        teacher = [images["teacher forward"] + both, both]
    record = {
        "arguments": {key: value for key, value in arguments.items()
                      if key not in ("data", "rates", "statistics", "train", "test")},
        **{key: result[key] for key in ("commit", "torch", "threads")},
        "test": result["last_test"], "tests": [row["test"] for row in rows], "epochs": epochs,
        "student": student, "teacher": teacher, "multiply_adds": multiply_adds,
        "parameters": parameters, "measures": measures,
        "seconds": round(sum(fastest[row.get("stage")] for row in rows), 1)}
    if script != "trikd" or not images:
        return {name: record}
    found, share = {}, len(rows) // len(result["generations"])
    for g, one in enumerate(result["generations"], 1):
        done, before = seen * g * share // len(rows), result["before"]["epochs"]
        first = done // (g * share) * before  # of A_0
        found[f"{name} {g}".removesuffix(" 1" * (len(rows) == share))] = {
            **record, "test": one["test"], "measures": one, "epochs": before + g * share,
            "student": [first + 2 * done, first + done], "teacher": [done, done],
            "seconds": round(record["seconds"] * g * share / len(rows)
                             + result["before"]["seconds"], 1)}
    return found


def collect(folder):
    """Write docs/results/seed-S.json, {run: see `kept`}, for each seed in `folder`."""
    RECORDS.mkdir(exist_ok=True)
    for place in sorted(folder.glob("seed-*")):
        seed, found = int(place.name.removeprefix("seed-")), {}
        for path in sorted([*place.glob("*/result.json"), *place.glob("cache/*/result.json")]):
            result, name = json.loads(path.read_text()), path.parent.name
            if "network" in result["arguments"]:  # one of the cache: the teacher, a student alone
                kind = {seed: "alone", seed + 1000: "teacher"}[result["arguments"]["seed"]]
                name = f"{kind}-{len(result['rows'])}"
            found |= kept(name, result)
        lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in found.items()]
        (RECORDS / f"{place.name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def records():
    """{seed: {run: its record}} of docs/results/."""
    return {int(path.stem.removeprefix("seed-")): json.loads(path.read_text())
            for path in sorted(RECORDS.glob("seed-*.json"))}


# ----------------------------------------------------------------------------------------- tables
QUANTILES = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by the number of seeds


def spread(values):
    """mean ± standard deviation (n - 1)."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def difference(ours, theirs):
    """Mean of the paired differences and its 95 % interval."""
    pairs = [a - b for a, b in zip(ours, theirs)]
    mean = f"{statistics.mean(pairs):+.2f}"
    if len(pairs) < 2:
        return mean
    half = QUANTILES[len(pairs)] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{mean} [{statistics.mean(pairs) - half:+.2f}, {statistics.mean(pairs) + half:+.2f}]"


def compute(record):
    """Multiply-adds of the training: forward 1, backward 2 of a network's."""
    return sum(madds * (forward + 2 * backward) for madds, (forward, backward) in zip(
        record["multiply_adds"], (record["student"], record["teacher"])))


def markdown(header, lines):
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def rows_of(found, rows):
    """(label, `against`, records of the seeds that have both, the difference) of each row."""
    for label, run, against in rows:
        both = [(one[run], one.get(against)) for seed, one in found.items() if seed != TUNING
                and run in one and (against is None or against in one)]
        if both:
            ours, theirs = zip(*both)
            yield label, against or "-", ours, difference(
                [record["test"] for record in ours],
                [record["test"] for record in theirs]) if against else "-"


def main_tables(found):
    """(the table of the page, its short form)."""
    long, short = [], []
    for label, against, ours, gap in rows_of(found, ROWS):
        thousand = [f"{statistics.mean(r[who][0] for r in ours) / 1000:.0f}, "
                    f"{statistics.mean(r[who][1] for r in ours) / 1000:.0f}"
                    for who in ("student", "teacher")]
        first = [label, ours[0]["epochs"], spread([record["test"] for record in ours]), gap]
        work = f"{statistics.mean(map(compute, ours)) / 1e12:.1f}"
        seconds = statistics.median(record["seconds"] for record in ours)
        long.append([*first, against, *thousand, work, f"{seconds:.0f}",
                     f"{ours[0]['parameters']:,}", len(ours)])
        short.append([*first, work])
    return (markdown(["run", "epochs", "accuracy", "difference [95 %]", "against",
                      "student: images forward, backward (thousands)", "teacher: the same",
                      "multiply-adds (10^12)", "seconds", "parameters", "seeds"], long),
            markdown(["run", "epochs", "accuracy", "difference to KD [95 %]",
                      "multiply-adds (10^12)"], short))


def small_table(found, rows, columns):
    lines = []
    for label, against, ours, gap in rows_of(found, rows):
        measures = [[r["measures"][name] for r in ours if name in r["measures"]]
                    for name in columns]
        lines.append([label, ours[0]["epochs"], spread([r["test"] for r in ours]), gap, against,
                      *(spread(values) if values else "-" for values in measures),
                      f"{statistics.median(r['seconds'] for r in ours):.1f}", len(ours)])
    return markdown(["run", "epochs", "accuracy", "difference [95 %]", "against", *columns,
                     "seconds", "seeds"], lines)


def tuning_table(of_seed):
    """The grid; the best value of each method is bold."""
    lines = []
    for method, (constant, values, _) in GRID.items():
        tests = [of_seed.get(f"{method}-{value}", {}).get("test") for value in values]
        best = max((test for test in tests if test is not None), default=None)
        lines.append([method, constant, *(
            f"{value}: " + ("-" if test is None else f"**{test:.2f}**" if test == best
                            else f"{test:.2f}") for value, test in zip(values, tests))])
    return markdown(["method", "constant", *["value: accuracy"] * 4], lines)


def blocks():
    """{name of a block in the pages: its text}, made from docs/results/ alone."""
    found = records()
    long, short = main_tables(found)
    flags, teacher = FLAGS.format(data="cifar10"), TEACHER.format(place="$P")
    listing = ["P=runs/results/seed-0", f'F="{flags}"', f'T="{teacher}"']
    listing += [line(command, "cifar10", 0, "$P", f"$P/{name}").replace(flags, "$F").replace(
        teacher, "$T") for name, command in RUNS.items()]
    return {"table": long, "short table": short, "tuning": tuning_table(found.get(TUNING, {})),
            **{name: small_table(found, *table) for name, table in SMALL.items()},
            "commands": "```\n" + "\n".join(listing) + "\n```"}


def filled(text, of):
    """A page with each block between `<!-- name -->` and `<!-- end -->` written anew."""
    for name, block in of.items():
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- end -->)",
                      lambda match, block=block: match[1] + block + "\n" + match[2], text,
                      flags=re.DOTALL)
    return text


def plot(found):
    """docs/results.png: accuracy against compute, one point a run."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    labels = list(dict.fromkeys(label.split(",")[0].rstrip("-12") for label, *_ in ROWS))
    for label, run, _ in ROWS:
        points = [(compute(of_seed[run]) / 1e12, of_seed[run]["test"])
                  for seed, of_seed in found.items() if seed != TUNING and run in of_seed]
        if points:
            kind = label.split(",")[0].rstrip("-12")
            axes.scatter(*zip(*points), s=18, color=f"C{labels.index(kind) % 10}",
                         marker="os^"[labels.index(kind) // 10], label=kind)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys(), fontsize=8)
    axes.set(xscale="log", ylabel="test accuracy (%)",
             xlabel="multiply-adds of the training (10^12), without the finished teacher's",
             title="CIFAR-10 (JPEG) at 16x16, one point a run")
    figure.savefig(ROOT / "docs" / "results.png", dpi=110)


def main(arguments):
    if arguments[:1] == ["--commands"]:
        data, folder, *seeds = arguments[1:]
        print(*(line for seed in seeds for line in commands(data, folder, int(seed))), sep="\n")
        return
    if arguments:
        collect(Path(arguments[0]))
    for path in (ROOT / "docs" / "results.md", ROOT / "README.md"):
        path.write_text(filled(path.read_text(), blocks()))
    try:
        plot(records())
    except ImportError:
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main(sys.argv[1:])
