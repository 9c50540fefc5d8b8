"""What if I remove this? The runs behind the table of that name on each page, and the tables.

    python docs/ablations.py --commands FOLDER    print the commands, a line each (edited copies of
                                                  scripts go into FOLDER)
    python docs/ablations.py FOLDER    keep the records of the runs that have ended in
                                       docs/results/ablations.json, then write the tables
    python docs/ablations.py           the tables alone, from docs/results/ablations.json

Two commands at once: ... | OMP_NUM_THREADS=1 xargs -P 2 -d '\\n' -n 1 sh -c
"""

import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from results import RECORDS, ROOT, difference, filled, interval, markdown, spread

SEEDS = range(5)
KEPT = RECORDS / "ablations.json"


class Edit(NamedTuple):
    """A line of the script that no flag switches off: in `place`, `old` becomes `new`."""
    place: str  # a function or METHODS
    old: str
    new: str
    flags: str = ""


COLUMNS = {  # script -> measures beside the accuracy: (name, digits)
    "rco": [("kl_final", 3)], "switokd": [("teacher", 2), ("paused", 1)],
    "trikd": [("teacher", 2), ("kl_ts", 3)], "letkd": [("params", 0)],
    "tst": [("T_end", 3), ("S_end", 3)]}
MEASURED = {"T_end": "conf_t", "S_end": "conf_s"}  # on x~, in the last epoch
ALONE = ("everything: the student alone (12 epochs)", None, "")
ROWS = {  # script -> {run: (what is removed, flags or edit, what to expect)}
    "rco": {
        "rco": ("nothing: four anchors, three epochs each", "", ""),
        "rco-route": ("the route: every stage on the finished teacher", "--method 'kd restarts'",
                      "by the paper's argument worse; the restarts are left"),
        "rco-kd": ("route and restarts", "--method kd",
                   "the paper: 4.5 points worse, but there eei has 4x the epochs"),
        "rco-schedule": ("the stages: the same four anchors within one schedule",
                         "--method one-stage --anchors 4",
                         "the young anchors teach at the large rate"),
        "rco-stages": ("the stages, with an anchor for every epoch", "--method one-stage",
                       "the paper: level with EEI-4"),
        "rco-kl": ("the teacher (the restarts stay)", "--weight 0",
                   "worse: labels alone; `kl_final` far larger"),
        "rco-T": ("the temperature", "--temperature 1",
                  "less is learned of the wrong classes (`kl_final` is at T = 1, too)"),
        "rco-T2": ("T² in (2), for T = 4 a weight of 1 / 16", "--weight 0.0625",
                   "near the row without teacher"),
        "alone-12": ALONE,
    },
    "switokd": {
        "switokd": ("nothing", "", ""),
        "switokd-switch": ("the switch: deep mutual learning", "--method never",
                           "a better teacher; the paper: a worse student"),
        "switokd-adaptive": ("the threshold that adapts", "--method 'fixed 0.6'",
                             "few pauses: like `never`"),
        "switokd-epsilon": ("ε in (4): δ = s - t",
                            Edit("switching_threshold", "s - epsilon * t", "s - t"),
                            "by (10) G is never below s - t: a pause wherever t < s, so that "
                            "the teacher hardly gets ahead"),
        "switokd-guard": ("the guard t < s in (5)",
                          Edit("choose_mode", "gap > threshold and teacher_distance < "
                               "student_distance", "gap > threshold"),
                          "pauses while the student is ahead, too"),
        "switokd-peer": ("the student's KL in (8): the teacher learns from labels alone",
                         Edit("train_step", "peer != own and (peer, own) not in expert",
                              "peer != own and own in students"),
                         "a larger gap, so more pauses"),
        "switokd-online": ("learning together: a finished teacher", "--method kd",
                           "by the paper's argument worse; KD at τ = 1, teacher of 12 epochs"),
        "alone-12": ALONE,
    },
    "trikd": {
        "trikd": ("nothing: anchor, then two generations (36)", "", ""),
        "trikd-generation": ("the second generation (24)", "--generations 1", "a little worse"),
        "trikd-anchor": ("the anchor, and with it the chain: mutual learning (12)",
                         "--method 'mutual learning'",
                         "by the abstract's argument worse; `kl_ts` larger"),
        "trikd-compute": ("the same, its 36 epochs in one run (36)",
                          "--method 'mutual learning long'",
                          "more epochs help whatever the method"),
        "trikd-teacher": ("the teacher: the anchor alone teaches (36)",
                          Edit("METHODS", '"TriKD": ({"peer": "online"',
                               '"TriKD": ({"peer": "none"'),
                          "worse, if the teacher is what teaches"),
        "trikd-online": ("the online teacher: a finished one in its place (36)",
                         Edit("METHODS", '"kd": ({"peer": "finished", **NO_ANCHOR}',
                              '"kd": ({"peer": "finished"}', "--method kd"),
                         "by the abstract's argument worse: out of the student's reach"),
        "trikd-student": ("the anchor's term in the student's loss (36)", "--anchor-weight 0.1 0",
                          "no worse, if to restrict the teacher is what counts"),
        "trikd-fence": ("the anchor's term in the teacher's loss (36)", "--anchor-weight 0 0.1",
                        "by the abstract's argument worse; `kl_ts` larger"),
        "trikd-back": ("the student's term in the teacher's loss (36)", "--peer-weight 0 1",
                       "the teacher is harder to follow: `kl_ts` larger"),
        "alone-12": ALONE, "alone-36": ("everything: the student alone (36)", None, ""),
    },
    "letkd": {
        "letkd": ("nothing: letKD-2", "", ""),
        "letkd-supervision": ("the teacher: the layers learn by CE",
                              "--method 'unsupervised layers'",
                              "the paper (Table 6, on FitNet): hardly better than without layers"),
        "letkd-forward": ("what is added to the features: auxiliary heads",
                          "--method 'auxiliary heads'", "the paper (Table 5): worse"),
        "letkd-decisions": ("the layer of the decisions: letKD-1", "--method letKD-1",
                            "the paper: a little worse"),
        "letkd-inter": ("the decisions' loss, not their layer",
                        Edit("train_step", 'terms["inter"] = template_loss(',
                             'terms["inter"] = 0 * template_loss('),
                        "near letKD-1"),
        "letkd-words": ("the words' loss, not their layer",
                        Edit("train_step", 'terms["penult"] = template_loss(',
                             'terms["penult"] = 0 * template_loss('),
                        "worse: most of the gain is theirs in the paper's Table 1"),
        "letkd-few": ("all but 16 of 256 words (a smaller layer)", "--words 16",
                      "words too coarse: worse"),
        "letkd-sub": ("sub-classes: one a class (a smaller layer)", "--per-class 1",
                      "one target for all places of a class: worse"),
        "letkd-relu": ("the ReLU in (2)", Edit("forward", "F.relu(self.norm(scores))",
                                               "self.norm(scores)"),
                       "templates that do not match take their values away"),
        "letkd-norm": ("batch norm in (2)", Edit("forward", "F.relu(self.norm(scores))",
                                                 "F.relu(scores)"),
                       "a template fires wherever its cosine is positive"),
        "letkd-layers": ("layers and their losses: KD on logits", "--method kd",
                         "the paper (Table 1): worse"),
        "alone-12": ALONE,
    },
    "tst": {
        "tst": ("nothing", "", ""),
        "tst-search": ("the search: θ stays at 0", "--method random",
                       "by the paper's argument worse"),
        "tst-module": ("augmentation: originals twice", "--method 'kd twice'",
                       "by the paper's argument worse, at as many images"),
        "tst-half": ("the augmented half of the batch: KD", "--method kd",
                     "worse: half the images"),
        "tst-originals": ("the originals in (17)",
                          Edit("train_step", "torch.cat([first[0], images]), torch.cat([first[1], "
                               "labels])", "first"),
                          "worse: what is tested is never seen"),
        "tst-L_T": ("the teacher's term (12)",
                    Edit("augmentation_loss", "return L_T + L_S,", "return L_S,"),
                    "images that nobody knows: `T_end` falls"),
        "tst-L_S": ("the student's term (13)",
                    Edit("augmentation_loss", "return L_T + L_S,", "return L_T,"),
                    "images easy for both: `T_end` and `S_end` rise"),
        "tst-term": ("the bound of the student's term: (14) for (13)", "--method 'TST negative ce'",
                     "harder images: `T_end` and `S_end` fall"),
        "tst-one": ("all but one operation a call", "--operations 1",
                    "images nearer to natural ones"),
        "tst-all": ("the choice of K: all 14 at once", "--operations 14",
                    "far from natural images: worse"),
        "tst-once": ("the second search, its pass given to the first",
                     "--search-at 1 --search-epochs 2",
                     "a student that has learned meets images of the old one"),
        "tst-kl": ("the teacher's logits in (16)", "--weight 0",
                   "worse: labels alone, on hard images"),
        "alone-12": ALONE,
    },
}


EMBEDDED = (  # README.md's table: label, run, student epochs
    ("student alone", "alone-12", 12), ("KD, T = 4", "rco-kd", 12),
    ("RCO, four anchors", "rco", 12), ("SwitOKD", "switokd", 12), ("LetKD, letKD-2", "letkd", 12),
    ("TST", "tst", "12 of 2B images"), ("KD", "tst-module", "12 of 2B images"),
    ("TriKD, anchor and two generations", "trikd", "3 x 12"), ("student alone", "alone-36", 36))


def commands(folder):
    """One line a run, of all seeds; an edited copy of its script is written where it needs one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for script, rows in ROWS.items():
        for run, (_, change, _) in rows.items():
            if change is None:
                continue  # of the cache of the others
            path, flags = f"{script}.py", change
            if isinstance(change, Edit):
                source = (ROOT / path).read_text()
                if source.count(change.old) != 1:
                    sys.exit(f"ablations.py: error: {path} has not one line `{change.old}`")
                path, flags = folder / f"{run}.py", change.flags
                path.write_text(source.replace(change.old, change.new))
            place = shlex.quote(str(folder))
            lines.append(f"PYTHONPATH=. python {path} {flags}{' ' * bool(flags)}--seed "
                         f"{' '.join(map(str, SEEDS))} --cache {place}/cache --out {place}/{run}")
    return lines


def collect(folder):
    """Write docs/results/ablations.json: {run: commit, torch, threads, measures of each seed}."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for script, rows in ROWS.items():
        for run, (_, change, _) in rows.items():
            files = f"cache/shapes-resnet8x0.5-{run[6:]}-*" if change is None else f"{run}/*"
            results = [json.loads(path.read_text()) for path in folder.glob(f"{files}/result.json")]
            results.sort(key=lambda result: result["arguments"]["seed"])
            seeds = [result["arguments"]["seed"] for result in results]
            if seeds != [*SEEDS]:
                if seeds:
                    print(f"left out {run}: it has the seeds {seeds}")
                continue
            kept[run] = {key: results[0][key] for key in ("commit", "torch", "threads")}
            kept[run]["test"] = [result["last_test"] for result in results]
            for name, _ in COLUMNS[script]:
                values = [result.get("table", [result.get("measures", {})])[-1].get(
                    MEASURED.get(name, name)) for result in results]
                if None not in values:
                    kept[run][name] = values
    KEPT.write_text("{\n" + ",\n".join(f"{json.dumps(run)}: {json.dumps(record)}"
                                       for run, record in sorted(kept.items())) + "\n}\n")


def table(script, kept):
    """The table of a page: what is removed, how, what to expect, what was measured."""
    lines = []
    for run, (removed, change, expected) in ROWS[script].items():
        if run not in kept:
            continue
        how = f"`{change}`" if change else ""
        if isinstance(change, Edit):
            how = f"in `{change.place}`: `{change.old}` → `{change.new}`"
            how += f"; `{change.flags}`" * bool(change.flags)
        gap = difference(pairs(kept, run, script)) if run != script else ""
        lines.append([removed, how, expected, spread(kept[run]["test"]), gap,
                      *(spread(kept[run][name], digits) if name in kept[run] else "-"
                        for name, digits in COLUMNS[script])])
    return markdown(["removed", "by", "to expect", "accuracy", "difference [95 %]",
                     *(f"`{name}`" for name, _ in COLUMNS[script])], lines)


def pairs(kept, run, other):
    """[(accuracy of the run, of the other)] of each seed."""
    return list(zip(kept[run]["test"], kept[other]["test"]))


def embedded(kept):
    """README.md's table: all five methods beside KD."""
    return markdown(["run", "student epochs", "accuracy", "to KD of 12 epochs [95 %]"],
                    [[label, epochs, spread(kept[run]["test"]), "-" if run == "rco-kd" else
                      difference(pairs(kept, run, "rco-kd"))]
                     for label, run, epochs in EMBEDDED])


def plot(kept):
    """docs/results-embedded.png: the differences of that table with their intervals."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for place, (_, run, _) in enumerate(EMBEDDED):
        gap, low, high = interval(pairs(kept, run, "rco-kd"))
        axes.plot([low, high], [place, place], color="C0")
        axes.plot(gap, place, "o", color="C0")
    axes.set_yticks(range(len(EMBEDDED)), [f"{label} ({epochs})" for label, _, epochs in EMBEDDED])
    axes.axvline(0, color="0.6", linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="points above KD of 12 epochs, 95 % interval")
    figure.savefig(ROOT / "docs" / "results-embedded.png", dpi=90)
    return figure


def main(arguments):
    if arguments[:1] == ["--commands"]:
        print(*commands(Path(arguments[1])), sep="\n")
        return
    if arguments:
        collect(Path(arguments[0]))
    kept = json.loads(KEPT.read_text())
    pages = {f"docs/{script}.md": {"removed": table(script, kept)} for script in ROWS}
    for name, blocks in {**pages, "README.md": {"embedded": embedded(kept)}}.items():
        (ROOT / name).write_text(filled((ROOT / name).read_text(), blocks))
    try:
        plot(kept)
    except ImportError:
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main(sys.argv[1:])
