"""Pictures of a finished run, from its record alone: needs matplotlib (pip install matplotlib).

    python docs/figures.py RUN_FOLDER          all pictures of the run, into its folder
    python docs/figures.py RUN_FOLDER FILE     one of them, named like FILE, into FILE
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def axes_of(xlabel, ylabel, title, size=(5, 3.2)):
    """A figure with one pair of axes."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure, axes


def steps_of(folder):
    """steps.csv as {column: [values]}, numbers as floats."""
    with open(folder / "steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    return {name: [value(row[name]) for row in rows] for name in rows[0]}


# One function a script: (folder, result.json) -> {file name: figure}.
def rco(folder, result):
    """hardness.png (the paper's Fig. 3): KL of the route to the student after each stage; gap.png:
    student and teacher by anchor."""
    pictures, rows = {}, result["rows"]
    if result["route_kls"]:  # mimic trains no logits and has none
        figure, axes = axes_of("teacher epoch", "KL to the student (nats)", "Hardness of the route")
        ends = {row["stage"]: row for row in rows}.values()  # the last epoch of each stage
        for row, kl in zip(ends, result["route_kls"]):
            label = f"after stage {row['stage']}, anchor {row['anchor']}"
            axes.plot(result["route"], kl, marker=".", label=label)
        axes.legend(fontsize=8)
        pictures["hardness.png"] = figure
    figure, axes = axes_of("anchor (teacher epoch)", "test accuracy (%)",
                           "Student and teacher by anchor")
    last = {row["anchor"]: row["test"] for row in rows}
    axes.plot(*zip(*result["teacher_test"]), marker="o", label="teacher")
    axes.plot(list(last), list(last.values()), marker="o", label="student")
    axes.legend(fontsize=8)
    return {**pictures, "gap.png": figure}


def main(folder, file=None):
    import matplotlib
    matplotlib.use("Agg")
    result = json.loads((Path(folder) / "result.json").read_text())
    pictures = globals()[result["script"]](Path(folder), result)
    if file and Path(file).name not in pictures:
        sys.exit(f"figures.py: error: no {Path(file).name} in this run, only: {[*pictures]}")
    for name, figure in pictures.items():
        target = Path(file or Path(folder) / name)
        if target.name == name:
            figure.savefig(target, dpi=110)
            print(target)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not (Path(sys.argv[1]) / "result.json").exists():
        sys.exit(__doc__)
    main(*sys.argv[1:])
