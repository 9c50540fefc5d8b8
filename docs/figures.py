"""Pictures of a finished run: needs matplotlib (pip install matplotlib), and no GPU.

    python docs/figures.py RUN_FOLDER          all pictures of the run, into its folder
    python docs/figures.py RUN_FOLDER FILE     one of them, into FILE, whose name ends in its

RUN_FOLDER is OUT/METHOD-seed-S-HASH. Those of trikd and letkd also need the run's data and cache,
from the folder that it was started in; --data, --cache and --teacher-weights say where they lie
now. What is compared are runs beside it with the same flags.
"""

import argparse
import csv
import json
import math
import re
import shlex
import sys
from pathlib import Path

import torch
from matplotlib import pyplot
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def axes_of(xlabel, ylabel, title, size=(5, 3.2)):
    """A figure with one pair of axes."""
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure, axes


def panels(count):
    """A figure with some pairs of axes side by side."""
    figure, axes = pyplot.subplots(1, count, figsize=(4.4 * count, 3.2), layout="constrained")
    return figure, axes


def legends(figure):
    """The figure, with a legend wherever something has a label."""
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    return figure


def arguments_of(result):
    """The flags of the run as its script had them, with the places of its command, on the CPU."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--data", type=Path, default="data")
    places.add_argument("--cache", type=Path, default="runs/cache")
    places.add_argument("--teacher-weights", type=Path, nargs="+")
    places, _ = places.parse_known_args(shlex.split(result["command"]))
    return argparse.Namespace(**{**result["arguments"], **vars(places), "workers": 8,
                                 "device": torch.device("cpu")})


def beside(folder, result, *free):
    """{folder: result} of the finished runs in one OUT, this one first, whose arguments differ in
    those that are `free` alone."""
    found = {folder: result}
    for path in sorted(folder.parent.glob("*/result.json")):
        other = json.loads(path.read_text())
        if all(other["arguments"].get(name) == value
               for name, value in result["arguments"].items() if name not in free):
            found[path.parent] = other
    return found


def alone(role, result, data, arguments):
    """(network, its test accuracy) that was trained alone for the run, from its file or the cache;
    (None, None) and a line if it is not there."""
    if role == "teacher" and arguments.teacher_weights:
        return common.load_frozen(arguments.teacher, arguments.teacher_weights[0], data, arguments)
    name, E, facts = getattr(arguments, role), arguments.epochs, result["arguments"]["data"]
    known = {**result["arguments"], "seed": arguments.seed + {"student": 0, "teacher": 1000}[role],
             "data": {**facts, "fingerprint": {
                 part: facts["fingerprint"][part] for part in ("train", "test")}}}
    for path in arguments.cache.glob(f"{data.name}-{name}-{E}-*/result.json"):
        found = json.loads(path.read_text())
        theirs = found["arguments"]
        if theirs["rates"][0] == arguments.learning_rate and all(
                theirs[flag] == known[flag] for flag in theirs.keys() & known.keys() - {"source"}):
            network = common.load_weights(data.build(name), path.parent / f"epoch-{E:04}.pt")
            return common.frozen(network), found["last_test"]
    print(f"the {role} alone is not in {arguments.cache}: the pictures do without it")
    return None, None


# One function a script: (folder, result.json) -> {file name: figure}.
def rco(folder, result):
    """rco.png: teacher and student by anchor; KL of the route's states to the student after each
    stage, the paper's Fig. 3 (mimic trains no logits and has none)."""
    figure, (axes, hardness) = panels(2)
    axes.set(xlabel="anchor (teacher epoch)", ylabel="test accuracy (%)", title="By anchor")
    last = {row["anchor"]: row["test"] for row in result["rows"]}
    axes.plot(*zip(*result["teacher_test"]), marker="o", label="teacher")
    axes.plot(list(last), list(last.values()), marker="o", label="student")
    hardness.set(xlabel="teacher epoch", ylabel="KL to the student (nats)",
                 title="Hardness of the route")
    ends = {row["stage"]: row for row in result["rows"]}.values()  # the last epoch of each stage
    for row, kl in zip(ends, result["route_kls"]):
        label = f"after stage {row['stage']}, anchor {row['anchor']}"
        hardness.plot(result["route"], kl, marker=".", label=label)
    return {"rco.png": legends(figure)}


def classical_scaling(squared_distances):
    """(n,2) coordinates by classical scaling (Torgerson 1952) of `squared_distances` (n,n)."""
    D = torch.as_tensor(squared_distances, dtype=torch.float64)
    J = torch.eye(len(D), dtype=D.dtype) - 1 / len(D)
    values, vectors = torch.linalg.eigh(-0.5 * J @ D @ J)  # ascending
    return (vectors * values.clamp_min(0).sqrt())[:, -2:].flip(1)  # (n,2)


def trikd(folder, result):
    """trikd.png: accuracies by generation, and how far the networks are apart; functions.png: the
    networks of the run, of mutual learning and of the born-again chain, if any, in function space;
    tradeoff.png, if there are runs of other anchor weights: teacher's nearness, student's accuracy.
    """
    from trikd import scaled_kl
    arguments = arguments_of(result)
    data = common.load_data(arguments)
    A_0, test = alone("student", result, data, arguments)
    runs = {place: run for place, run in beside(
        folder, result, "method", "peer", "peer_weight", "anchor_weight", "generations").items()
        if place == folder or run["arguments"]["method"] in ("born-again", "mutual learning")}

    figure, (axes, distances) = panels(2)
    axes.set(xlabel="generation", ylabel="test accuracy (%)", title="Curriculum")
    for run in runs.values():
        name, rows = run["arguments"]["method"], run["table"]
        if name != "mutual learning":  # which has one generation
            tests = [test, *(row["test"] for row in rows)]
            axes.plot(range(len(tests)), tests, marker="o",
                      label=f"{name}: student, the next anchor")
    rows = [row.get("teacher") for row in result["table"]]
    if None not in rows:  # born-again has no teacher
        axes.plot(range(1, len(rows) + 1), rows, marker="s", linestyle=":",
                  label=f"{result['arguments']['method']}: teacher")
    axes.set_xticks(range(len(rows) + 1))
    distances.set(xlabel="generation", ylabel="KL on the test images (nats)", title="Distances",
                  xticks=range(1, len(rows) + 1))
    for key, label in (("kl_ts", "KL(teacher || student)"), ("kl_at", "KL(anchor || teacher)")):
        if key in result["table"][0]:
            distances.plot(range(1, len(rows) + 1), [row[key] for row in result["table"]],
                           marker="o", label=label)
    pictures = {"trikd.png": legends(figure)}

    swept = [*beside(folder, result, "anchor_weight", "generations").values()]
    if len(swept) > 1 and rows[0] is not None:
        figure, axes = axes_of("KL(anchor || teacher), nats", "student test accuracy (%)",
                               "Trade-off over the anchor weight")
        swept.sort(key=lambda run: run["arguments"]["anchor_weight"])
        points = [(run["table"][0]["kl_at"], run["table"][0]["test"]) for run in swept]
        axes.plot(*zip(*points), marker="o")
        for run, point in zip(swept, points):
            share = f" (label share {run['label_shares'][1]:.2f})" if run["label_shares"] else ""
            axes.annotate(f"{run['arguments']['anchor_weight'][-1]:g}{share}", point, fontsize=8)
        pictures["tradeoff.png"] = figure

    networks = {"A0": A_0} if A_0 else {}
    for place, run in runs.items():
        for path in sorted(place.glob("*-[0-9]*.pt")):
            role, generation = path.stem.split("-")
            networks[f"{run['arguments']['method']} {role[0].upper()}{generation}"] = (
                common.load_weights(data.build(getattr(arguments, role)), path))
    outputs = [common.embeddings(network, data.test, arguments, network)[0]
               for network in networks.values()]
    D = torch.tensor([[scaled_kl(a, b).item() for b in outputs] for a in outputs])
    figure, axes = axes_of("root of the mean symmetric KL (nats)", "",
                           "Networks in function space", size=(5, 4))
    for name, (x, y) in zip(networks, classical_scaling((D + D.T) / 2).tolist()):
        axes.scatter([x], [y], s=14)
        axes.annotate(name, (x, y), fontsize=8)
    axes.set_aspect("equal", "datalim")
    return {**pictures, "functions.png": figure}


def switokd(folder, result):
    """switokd.png: gap and threshold by step, expert mode shaded; rule.png: eq. (10), step by step
    and over the training; degeneration.png, at tau = 1: t, the L1 distance of the student's two
    gradients, eq. (9), of this run and of those of other methods beside it."""
    def pairs_of(place):
        """{label of a pair: {column of its steps: values}}, with a column "when", in epochs."""
        pairs = {}
        for epoch, path in enumerate(sorted(place.glob("steps-*.csv"))):
            rows = list(csv.DictReader(path.open(newline="")))
            for row in rows:
                own = pairs.setdefault((row.pop("student"), row.pop("teacher")), {})
                row["when"] = epoch + int(row["step"]) / int(rows[-1]["step"])
                for name, value in row.items():
                    own.setdefault(name, []).append(value if name == "mode" else float(value))
        return {f", {teacher} to {student}" if len(pairs) > 1 else "": {**of, "teacher": teacher}
                for (student, teacher), of in pairs.items()}

    fixed, method = result["arguments"]["fixed"], result["arguments"]["method"]
    pairs = pairs_of(folder)
    figure, grid = pyplot.subplots(len(pairs), figsize=(7, 3 * len(pairs)), squeeze=False,
                                   layout="constrained")
    for axes, (label, of) in zip(grid[:, 0], pairs.items()):
        when = of["when"]
        axes.fill_between(when, 0, [mode == "expert" for mode in of["mode"]], step="pre",
                          linewidth=0, transform=axes.get_xaxis_transform(), color="0.85",
                          label="expert mode")
        lead = [s - t for s, t in zip(of["student_distance"], of["teacher_distance"])]
        delta = of["threshold"] if fixed in (None, 3) else [fixed] * len(when)
        for name, values in (("gap G", of["gap"]), ("threshold", delta), ("s - t", lead)):
            axes.plot(when, values, linewidth=0.8, label=name)
        axes.set(xlabel="epoch", title="Gap and threshold" + label)
        axes.legend(fontsize=8)
    pictures = {"switokd.png": figure}

    # Eq. (10): slack / t against r = t / (s + t); expert above 1 - exp(-r) = 1 - eps, if r < 1/2
    figure, (axes, series) = panels(2)
    axes.set(xlabel="r = t / (s + t)", ylabel="slack / t", title=f"Eq. (10), steps of {method}")
    for mode, color in (("learning", "tab:blue"), ("expert", "tab:orange")):
        points = [(t / (s + t), (gap - s + t) / t) for of in pairs.values()
                  for gap, s, t, own in zip(of["gap"], of["student_distance"],
                                            of["teacher_distance"], of["mode"])
                  if own == mode and t > 0]
        axes.scatter(*(zip(*points) if points else ((), ())), s=5, color=color, label=mode)
    curve = [k / 100 for k in range(101)]
    axes.plot(curve, [1 - math.exp(-r) for r in curve], color="black", label="1 - exp(-r)")
    axes.axvline(0.5, color="0.6", linestyle=":", label="guard t < s")
    series.set(xlabel="epoch", title="Steps with t < s; band: 90 % of an epoch's")
    for label, of in pairs.items():
        s, t, gap, when = (torch.tensor(of[name]) for name in (
            "student_distance", "teacher_distance", "gap", "when"))
        epochs = [(when > e) & (when <= e + 1) & (0 < t) & (t < s)
                  for e in range(math.ceil(when[-1]))]
        slack, asked = (gap - s + t) / t, 1 - torch.exp(-t / (s + t))
        x = [e + 0.5 for e, own in enumerate(epochs) if own.any()]
        low, middle, high = zip(*(slack[own].quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
                                  for own in epochs if own.any()))
        line, = series.plot(x, middle, label="slack / t, median" + label)
        series.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        series.plot(x, [asked[own].quantile(0.5) for own in epochs if own.any()], color="black",
                    linestyle="--", label="1 - exp(-r), median" + label)
    pictures["rule.png"] = legends(figure)

    if result["arguments"]["temperature"] == 1:
        figure, axes = axes_of("epoch", "L1 distance of the two gradients",
                               "Degeneration: 0 is the end of distillation")
        for place, run in beside(folder, result, "method", "fixed", "finished").items():
            # t is the same in all pairs of a teacher
            seen = {of["teacher"]: of for of in pairs_of(place).values()}
            for teacher, of in seen.items():
                axes.plot(of["when"], of["teacher_distance"], linewidth=0.8, label=run["arguments"][
                    "method"] + (f", {teacher}" if len(seen) > 1 else ""))
        axes.legend(fontsize=8)
        pictures["degeneration.png"] = figure
    return pictures


def letkd(folder, result):
    """layers.png: loss terms, scales and firing share by epoch; letkd.png: of eight test images the
    template that fires most at each location, white where none does."""
    import letkd as script
    rows = result["rows"]
    figure, axes = panels(3)
    shown = [(axes[0], name, name) for name in ("ce", "kl", "penult", "inter")]
    for layer in ("inter", "penult"):
        shown += [(axis, f"{key}_{layer}", f"{key}, {layer}")
                  for axis, key in ((axes[1], "s_q"), (axes[1], "s_v"), (axes[2], "fire"))]
    for axis, key, label in shown:
        if key in rows[0]:
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker=".",
                      label=label)
    axes[0].set(xlabel="epoch", title="Terms of eq. (16), nats")
    axes[1].set(xlabel="epoch", title="Scales of eqs. (1), (3)")
    axes[2].set(xlabel="epoch", title="Share of templates that fire", ylim=(0, 1.05))
    pictures, arguments = {"layers.png": legends(figure)}, arguments_of(result)
    if not arguments.layers:
        return pictures

    data, fired = common.load_data(arguments), {}
    inter = data.classes * arguments.per_class if arguments.layers == 2 else 0
    student = script.build_student(arguments.student, data.classes, data.image_size, inter,
                                   arguments.words, arguments.alpha)
    student.load_state_dict(torch.load(folder / "student.pt", weights_only=True))
    for name, layer in (("inter", student.inter), ("penult", student.penult)):
        if layer is not None:
            layer.norm.register_forward_hook(
                lambda norm, x, normed, name=name: fired.update({name: normed.relu()}))
    images, labels = next(data.test.batches(8))
    with common.evaluating(student):
        student(images)
    figure, grid = pyplot.subplots(1 + len(fired), 8, figsize=(9, 1.3 * (1 + len(fired))),
                                   layout="constrained")
    for image, label, axes in zip(data.test.images, labels.tolist(), grid[0]):
        axes.imshow(image.movedim(0, 2).numpy())
        axes.set_title(data.names[label], fontsize=6)
    for (name, p_hat), row in zip(fired.items(), grid[1:]):  # p_hat (8,K,H,W)
        most, template = p_hat.max(1)
        for maps, axes in zip(torch.where(most > 0, template.double(), torch.nan), row):
            axes.imshow(maps.numpy(), vmin=0, vmax=p_hat.shape[1] - 1, cmap="turbo")
        row[0].set_ylabel(name, fontsize=8)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    return {**pictures, "letkd.png": figure}


def tst(folder, result):
    """series.png: the 25 numbers over the run, searches shaded; operations.png: three images of
    augmented.png, each operation at its learned magnitude above the exact one. No augmenter: {}.
    """
    import tst as script
    pictures, searches = {}, result["searches"]
    if searches:  # pass after pass, the n-th being at before_epoch - 1 + n
        starts = [row["before_epoch"] - 1 + n for n, row in enumerate(searches)]
        x = [0, *(place for start in starts for place in (start, start + 1)),
             len(searches) + len(result["rows"])]
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
        for axis, letter, key in ((axes[0], "q", "probabilities"), (axes[1], "m", "magnitudes")):
            for i, name in enumerate(name for name in searches[0] if name[:2] == f"{letter}_"):
                y = [0.5, *(row[name] for row in searches)]  # 0.5: theta = 0
                axis.plot(x, [value for value in y for _ in (0, 1)], label=name[2:],
                          ls="-" if i < 7 else "--")
            for start in starts:
                axis.axvspan(start, start + 1, alpha=0.15, color="grey", lw=0)
            axis.set(title=f"{key} {letter} (grey: search)",
                     xlabel="passes over the training images")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
        pictures["series.png"] = figure
    if not (folder / "augmenter.pt").exists() or result["script"] != "tst":
        return pictures

    encoders = [script.ColorEncoder() if i < script.COLOR else script.GeometricEncoder()
                for i in range(script.MOVABLE)]
    augmenter = common.load_weights(script.Augmenter(encoders, [0.0] * 3, [1.0] * 3),
                                    folder / "augmenter.pt")
    grid = torch.tensor(pyplot.imread(folder / "augmented.png")).movedim(2, 0)  # in [0,1]
    side = (grid.shape[1] - 2) // 8 - 2
    images = torch.stack([grid[:, top:top + side, 2:2 + side]
                          for top in range(2, 2 + 3 * (side + 2), side + 2)])
    values = (255 * images).round().to(torch.uint8)
    images, draws = (images - augmenter.mean) / augmenter.std, torch.Generator().manual_seed(0)
    names = "original", *script.OPERATIONS
    figure, axes = pyplot.subplots(6, len(names), figsize=(15, 6.3), layout="constrained")
    for i, name in enumerate(names, -1):
        learned, title = images, name
        if i >= 0:
            with torch.no_grad():
                m = augmenter.magnitudes()
                learned = augmenter.transform(i, images, m, draws)
        shown = [script.to_bytes(learned, augmenter.mean, augmenter.std)] * 2
        if 0 <= i < script.MOVABLE:
            title = f"{name}\nm = {m[i].item():.2f}"
            shown[1] = script.exact(name, values, min(math.floor(10 * m[i].item()), 9))
        for row, image in enumerate(torch.stack(shown, 1).flatten(0, 1)):
            axes[row, i + 1].imshow(image.movedim(0, 2).numpy())
            axes[row, i + 1].set(xticks=[], yticks=[])
        axes[0, i + 1].set_title(title, fontsize=7)
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel("exact" if row % 2 else "learned", fontsize=7)
    return {**pictures, "operations.png": figure}


def main(folder, file=None, *places):
    if str(file or "").startswith("--"):
        file, places = None, (file, *places)
    if not (Path(folder) / "result.json").exists():
        sys.exit(f"figures.py: error: no result.json in {folder}; give OUT/METHOD-seed-S-HASH")
    pyplot.switch_backend("Agg")
    result = json.loads((Path(folder) / "result.json").read_text())
    result["command"] += f" {shlex.join(places)}"  # of a flag the last value counts
    script = re.search("rco|switokd|trikd|letkd|tst", result["script"])  # also of my_rco.py
    pictures = globals()[script[0]](Path(folder), result) if script else {}
    if not pictures:
        print(f"nothing to draw of a run of {result['script']}.py, {result['arguments']['method']}")
    wanted = [name for name in pictures if file is None or Path(file).name.endswith(name)]
    if file and not wanted:
        sys.exit(f"figures.py: error: no {Path(file).name} in this run, only: {[*pictures]}")
    for name in wanted:
        target = Path(file or Path(folder) / name)
        pictures[name].savefig(target, dpi=90)
        Image.open(target).quantize(128).save(target, optimize=True)  # small enough for a page
        print(target)
    return pictures


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
