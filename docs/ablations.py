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

from results import RECORDS, ROOT, difference, filled, markdown, spread

SEEDS = range(5)
KEPT = RECORDS / "ablations.json"


class Edit(NamedTuple):
    """A line of the script that no flag switches off: in `function`, `old` becomes `new`."""
    function: str
    old: str
    new: str


COLUMNS = {  # script -> measures beside the accuracy: (name, digits)
    "rco": [("kl_final", 3)], "switokd": [("teacher", 2), ("paused", 1)],
    "trikd": [("teacher", 2), ("kl_ts", 3)], "letkd": [("params", 0)],
    "tst": [("T_end", 3), ("S_end", 3)]}
ROWS = {  # script -> {run: (what is removed, flags or edit, what to expect)}
    "rco": {
        "rco": ("nothing: four anchors, three epochs each", "", ""),
        "rco-route": ("the route: every stage on the finished teacher",
                      "--strategy kd --stages 4 --stage-epochs 3",
                      "the paper: worse; what is left are the restarts"),
        "rco-kd": ("route and restarts", "--strategy kd", "the paper: worse"),
        "rco-stages": ("the stages: the anchor changes within one schedule", "--strategy one-stage",
                       "the paper: between KD and eei"),
        "rco-equal": ("equal distances: anchors by hardness", "--strategy greedy",
                      "the paper: as good; mind the epochs, as many as it has stages"),
        "rco-kl": ("the teacher", "--weight 0", "worse: labels alone; `kl_final` far larger"),
        "rco-T": ("soft targets", "--temperature 1",
                  "less of what wrong classes tell (and `kl_final` is at T = 1)"),
        "rco-T2": ("T² in (2), for T = 4 a weight of 1 / 16", "--weight 0.0625",
                   "near the row without teacher"),
    },
    "switokd": {
        "switokd": ("nothing", "", ""),
        "switokd-switch": ("the switch: deep mutual learning", "--switch never",
                           "a better teacher; the paper: a worse student"),
        "switokd-adaptive": ("the threshold that adapts", "--switch fixed:0.6",
                             "hardly a pause, so like the row above"),
        "switokd-epsilon": ("ε in (4): δ = s - t",
                            Edit("switching_threshold", "s - epsilon * t", "s - t"),
                            "by (10) G is never below s - t: a pause wherever t < s, so that "
                            "the teacher hardly gets ahead"),
        "switokd-guard": ("the guard t < s in (5)",
                          Edit("choose_mode", "gap > threshold and teacher_distance < "
                               "student_distance", "gap > threshold"),
                          "pauses while the student is ahead, too"),
        "switokd-online": ("learning together: a finished teacher", "--switch kd",
                           "the paper: worse; the teacher costs its own training"),
    },
    "trikd": {
        "trikd": ("nothing: anchor, then two generations (36 student epochs)", "", ""),
        "trikd-generation": ("the second generation (24)", "--generations 1", "a little worse"),
        "trikd-anchor": ("the anchor: mutual learning (12)", "--generations 1 --anchor-weight 0",
                         "the abstract: worse; `kl_ts` larger"),
        "trikd-compute": ("the anchor, its epochs given to mutual learning (36)",
                          "--generations 1 --anchor-weight 0 --epochs 36",
                          "more epochs help whatever the method"),
        "trikd-teacher": ("the teacher: the anchor alone teaches (36)", "--peer none",
                          "worse, if the teacher is what teaches"),
        "trikd-online": ("the teacher's learning beside the student (36)", "--peer finished",
                         "the abstract: worse, a finished teacher is out of reach"),
        "trikd-student": ("the anchor's word to the student (36)", "--anchor-on teacher",
                          "the abstract's restriction of the teacher is all of it: the same"),
        "trikd-fence": ("the anchor's word to the teacher (36)", "--anchor-on student",
                        "the abstract: worse, the teacher is free; `kl_ts` larger"),
        "trikd-back": ("the student's word to the teacher (36)", "--peer-weight 0 1",
                       "the teacher is harder to follow: `kl_ts` larger"),
    },
    "letkd": {
        "letkd": ("nothing: letKD-2", "", ""),
        "letkd-supervision": ("the teacher: the layers learn by CE", "--supervision none",
                              "the paper (its Table 6): worse, near the student alone"),
        "letkd-forward": ("what is added to the features: auxiliary heads", "--alpha 0",
                          "the paper (its Table 5): worse"),
        "letkd-decisions": ("the decisions: letKD-1", "--layers 1", "the paper: a little worse"),
        "letkd-words": ("the words' loss (15)",
                        Edit("train_step", 'terms["penult"] = template_loss(',
                             'terms["penult"] = 0 * template_loss('),
                        "worse, a layer is unsupervised"),
        "letkd-few": ("all but 16 of 256 words", "--words 16", "words too coarse: worse"),
        "letkd-sub": ("sub-classes, one a class", "--per-class 1",
                      "the decisions say only the label: worse"),
        "letkd-relu": ("the ReLU in (2)", Edit("forward", "F.relu(self.norm(scores))",
                                               "self.norm(scores)"),
                       "templates that do not match add their values too"),
        "letkd-norm": ("batch norm in (2)", Edit("forward", "F.relu(self.norm(scores))",
                                                 "F.relu(scores)"),
                       "a template fires wherever its cosine is positive"),
        "letkd-layers": ("the layers: KD on logits", "--supervision logits", "the paper: worse"),
    },
    "tst": {
        "tst": ("nothing", "", ""),
        "tst-search": ("the search: θ stays at 0", "--augment random", "the paper: worse"),
        "tst-module": ("augmentation: originals twice", "--augment twice",
                       "the paper: worse, at as many images"),
        "tst-half": ("the second half of the batch: KD", "--augment none",
                     "worse: half the images"),
        "tst-L_T": ("the teacher's term (12)",
                    Edit("augmentation_loss", "return teacher_loss + student_loss,",
                         "return student_loss,"),
                    "images that nobody knows: `T_end` falls"),
        "tst-L_S": ("the student's term (13)",
                    Edit("augmentation_loss", "return teacher_loss + student_loss,",
                         "return teacher_loss,"),
                    "images easy for both: `T_end` and `S_end` rise"),
        "tst-term": ("the bound of the student's term: (14)", "--student-term negative_ce",
                     "harder images, in danger of (12) losing"),
        "tst-one": ("all but one operation a call", "--operations 1",
                    "images nearer to natural ones"),
        "tst-all": ("the choice of K: all 14 at once", "--operations 14",
                    "far from natural images: worse"),
        "tst-repeat": ("the alternation: one search", "--search-at 1",
                       "a student that has learned meets images of the old one"),
        "tst-kl": ("the teacher's logits in (16)", "--weight 0",
                   "worse: labels alone, on hard images"),
    },
}


def commands(folder):
    """One line a run, of all seeds; an edited copy of its script is written where it needs one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for script, rows in ROWS.items():
        for run, (_, change, _) in rows.items():
            path, source = f"{script}.py", (ROOT / f"{script}.py").read_text()
            if isinstance(change, Edit):
                if source.count(change.old) != 1:
                    sys.exit(f"ablations.py: error: {path} has not one line `{change.old}`")
                path, flags = folder / f"{run}.py", ""
                path.write_text(source.replace(change.old, change.new))
            else:
                flags = f"{change} " if change else ""
            place = shlex.quote(str(folder))
            lines.append(f"PYTHONPATH=. python {path} {flags}--seed {' '.join(map(str, SEEDS))} "
                         f"--cache {place}/cache --resume --out {place}/{run}")
    return lines


def collect(folder):
    """Write docs/results/ablations.json: {run: commit, torch, threads, measures of each seed}."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for script, rows in ROWS.items():
        for run in rows:
            paths = [folder / run / f"seed-{seed}" / "result.json" for seed in SEEDS]
            if not all(path.exists() for path in paths):
                continue
            results = [json.loads(path.read_text()) for path in paths]
            kept[run] = {key: results[0][key] for key in ("commit", "torch", "threads")}
            kept[run]["test"] = [result["last_test"] for result in results]
            for name, _ in COLUMNS[script]:
                values = [(result.get("generations") or [result["measures"]])[-1].get(name)
                          for result in results]
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
        how = f"in `{change.function}`: `{change.old}` → `{change.new}`" if isinstance(
            change, Edit) else f"`{change}`" if change else ""
        gap = difference(kept[run]["test"], kept[script]["test"]) if run != script else ""
        lines.append([removed, how, expected, spread(kept[run]["test"]), gap,
                      *(spread(kept[run][name], digits) if name in kept[run] else "-"
                        for name, digits in COLUMNS[script])])
    return markdown(["removed", "by", "to expect", "accuracy", "difference [95 %]",
                     *(f"`{name}`" for name, _ in COLUMNS[script])], lines)


def main(arguments):
    if arguments[:1] == ["--commands"]:
        print(*commands(Path(arguments[1])), sep="\n")
        return
    if arguments:
        collect(Path(arguments[0]))
    kept = json.loads(KEPT.read_text())
    for script in ROWS:
        path = ROOT / "docs" / f"{script}.md"
        path.write_text(filled(path.read_text(), {"removed": table(script, kept)}))


if __name__ == "__main__":
    main(sys.argv[1:])
