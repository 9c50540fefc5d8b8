"""Pictures of a finished run: needs matplotlib (pip install matplotlib).

From its record; those of trikd, letkd and tst also need its data and cache.

    python docs/figures.py RUN_FOLDER          all pictures of the run, into its folder
    python docs/figures.py RUN_FOLDER FILE     one of them, named like FILE, into FILE
"""

import argparse
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


def arguments_of(result):
    """The flags of the run as its script had them, with the places of data and cache."""
    import torch
    arguments = argparse.Namespace(**result["arguments"], compare=None, workers=None)
    arguments.device = torch.device(arguments.device)
    places = (result["paths"][key] for key in ("data", "cache"))
    arguments.data, arguments.cache = (place and Path(place) for place in places)
    return arguments


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


def classical_scaling(squared_distances):
    """(n,2) coordinates by classical scaling (Torgerson 1952) of `squared_distances` (n,n)."""
    import torch
    D = torch.as_tensor(squared_distances, dtype=torch.float64)
    J = torch.eye(len(D), dtype=D.dtype) - 1 / len(D)
    values, vectors = torch.linalg.eigh(-0.5 * J @ D @ J)  # ascending
    return (vectors * values.clamp_min(0).sqrt())[:, -2:].flip(1)  # (n,2)


def trikd(folder, result):
    """generations.png: students and teachers by generation; functions.png: the networks of the run,
    its mutual learning and its born-again chain, if any, in function space; tradeoff.png, if there
    are runs of other anchor weights in FOLDER/anchor-Z: teacher's nearness and student's accuracy.
    """
    import torch

    import common
    import trikd as script

    def of(name):
        path = folder / name / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    figure, axes = axes_of("generation", "test accuracy (%)", "Curriculum")
    chains = {"TriKD": result, "born-again": of("born-again")}
    for name, chain in chains.items():
        if chain:
            tests = [chain["anchor_test"], *(one["test"] for one in chain["generations"])]
            axes.plot(range(len(tests)), tests, marker="o",
                      label=f"{name}: student, the next anchor")
    ones = [one for one in result["generations"] if "teacher" in one]  # --peer none has none
    if ones:
        axes.plot([one["generation"] for one in ones], [one["teacher"] for one in ones],
                  marker="s", linestyle=":", label="TriKD: teacher")
    axes.set_xticks(range(len(result["generations"]) + 1))
    axes.legend(fontsize=8)
    pictures = {"generations.png": figure}

    swept = [json.loads(path.read_text()) for path in folder.glob("anchor-*/result.json")]
    if swept:
        points = sorted(((one["arguments"]["anchor_weight"][-1],
                          one["generations"][0], one["label_shares"]) for one in swept),
                        key=lambda point: point[0])
        figure, axes = axes_of("KL(anchor || teacher), nats", "student test accuracy (%)",
                               "Trade-off over the anchor weight")
        axes.plot([one["kl_at"] for _, one, _ in points], [one["test"] for _, one, _ in points],
                  marker="o")
        for value, one, shares in points:
            share = f" (label share {shares['student']:.2f})" if shares else ""
            axes.annotate(f"{value:g}{share}", (one["kl_at"], one["test"]), fontsize=8)
        pictures["tradeoff.png"] = figure

    arguments = arguments_of(result)
    arguments.peer = "online"
    data = common.load_data(arguments)
    networks = {"A0": script.networks_alone(data, arguments)["student alone"][0]}
    for name, place in (("TriKD", folder), ("born-again", folder / "born-again"),
                        ("mutual learning", folder / "mutual-learning")):
        for path in sorted(place.glob("*-[0-9]*.pt")):
            role, generation = path.stem.split("-")
            networks[f"{name} {role[0].upper()}{generation}"] = common.load_weights(
                script.build_network(role, 0, data, arguments), path)
    outputs = [common.embeddings(network, data.test, arguments, network)[0]
               for network in networks.values()]
    D = torch.tensor([[script.kl_to(a, b).item() for b in outputs] for a in outputs])
    figure, axes = axes_of("root of the mean symmetric KL (nats)", "",
                           "Networks in function space", size=(5, 4))
    for name, (x, y) in zip(networks, classical_scaling((D + D.T) / 2).tolist()):
        axes.scatter([x], [y], s=14)
        axes.annotate(name, (x, y), fontsize=8)
    axes.set_aspect("equal", "datalim")
    return {**pictures, "functions.png": figure}


def switokd(folder, result):
    """gap.png: gap and threshold by step, expert mode shaded; rule.png: eq. (10), step by step;
    degeneration.png, at tau = 1: t, the L1 distance of the student's two gradients, eq. (9), of
    this run and of its controls never and adaptive, if any."""
    import math

    from matplotlib import pyplot

    def pairs_of(place):
        """{label of a pair: its steps.csv}, with a column "when", in epochs."""
        steps = steps_of(place)
        length = max(steps["step"])
        steps["when"] = [e - 1 + k / length for e, k in zip(steps["epoch"], steps["step"])]
        owners = list(zip(steps["student"], steps["teacher"]))
        return {f", {teacher} to {student}" if len(set(owners)) > 1 else "": {
            name: [value for value, owner in zip(values, owners) if owner == (student, teacher)]
            for name, values in steps.items()} for student, teacher in dict.fromkeys(owners)}

    pairs = pairs_of(folder)
    figure, grid = pyplot.subplots(len(pairs), figsize=(7, 3 * len(pairs)), squeeze=False,
                                   layout="constrained")
    for axes, (label, of) in zip(grid[:, 0], pairs.items()):
        when = of["when"]
        axes.fill_between(when, 0, [mode == "expert" for mode in of["mode"]], step="pre",
                          linewidth=0, transform=axes.get_xaxis_transform(), color="0.85",
                          label="expert mode")
        lead = [s - t for s, t in zip(of["student_distance"], of["teacher_distance"])]
        for name, values in (("gap G", of["gap"]), ("threshold", of["threshold"]), ("s - t", lead)):
            axes.plot(when, values, linewidth=0.8, label=name)
        axes.set(xlabel="epoch", title="Gap and threshold" + label)
        axes.legend(fontsize=8)
    pictures = {"gap.png": figure}

    # Eq. (10): slack / t against r = t / (s + t); expert above 1 - exp(-r) = 1 - eps, if r < 1/2
    figure, axes = axes_of("r = t / (s + t)", "slack / t",
                           f"The adaptive rule; points: {result['arguments']['switch']}")
    for mode, color in (("learning", "tab:blue"), ("expert", "tab:orange")):
        points = [(t / (s + t), (gap - s + t) / t) for of in pairs.values()
                  for gap, s, t, own in zip(of["gap"], of["student_distance"],
                                            of["teacher_distance"], of["mode"])
                  if own == mode and t > 0]
        axes.scatter(*(zip(*points) if points else ((), ())), s=5, color=color, label=mode)
    curve = [k / 100 for k in range(101)]
    axes.plot(curve, [1 - math.exp(-r) for r in curve], color="black", label="1 - exp(-r)")
    axes.axvline(0.5, color="0.6", linestyle=":", label="guard t < s")
    axes.legend(fontsize=8)
    pictures["rule.png"] = figure

    if result["arguments"]["temperature"] == 1:
        figure, axes = axes_of("epoch", "L1 distance of the two gradients",
                               "Degeneration: 0 is the end of distillation")
        runs = {result["arguments"]["switch"]: folder}
        runs |= {name: folder / name for name in ("never", "adaptive")
                 if (folder / name / "steps.csv").exists()}
        for name, place in runs.items():
            # t is the same in all pairs of a teacher
            seen = {of["teacher"][0]: of for of in pairs_of(place).values()}
            for teacher, of in seen.items():
                axes.plot(of["when"], of["teacher_distance"], linewidth=0.8,
                          label=name + (f", {teacher}" if len(seen) > 1 else ""))
        axes.legend(fontsize=8)
        pictures["degeneration.png"] = figure
    return pictures


def letkd(folder, result):
    """layers.png: loss terms, scales and firing share by epoch. subclasses.png (letKD-2 and its
    teacher): the sub-class of every location of four test images, and rows of s_T in its colours.
    """
    import torch
    from matplotlib import pyplot

    import common
    import letkd as script

    rows = result["rows"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    shown = [(axes[0], name, name) for name in ("ce", "kl", "penult", "inter")]
    for letter, layer in (("i", "inter"), ("p", "penult")):
        shown += [(axis, f"{key}_{letter}", f"{key}, {layer}")
                  for axis, key in ((axes[1], "s_q"), (axes[1], "s_v"), (axes[2], "fire"))]
    for axis, key, label in shown:
        if key in rows[0]:
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker=".",
                      label=label)
    axes[0].set(title="Terms of eq. (16), nats")
    axes[1].set(title="Scales of eqs. (1), (3)")
    axes[2].set(title="Share of templates that fire", ylim=(0, 1.05))
    for axis in axes:
        axis.set_xlabel("epoch")
        if axis.lines:
            axis.legend(fontsize=8)
    pictures = {"layers.png": figure}
    arguments = arguments_of(result)
    if (arguments.supervision, arguments.layers) != ("teacher", 2):
        return pictures

    arguments.teacher_weights = [Path(path) for path in result["paths"]["teacher_weights"]]
    data = common.load_data(arguments)
    teacher, _ = script.networks_alone(data, arguments)["teacher"]
    decisions = script.prepare(teacher, data, arguments).decisions
    k, s_T = decisions.per_class, decisions.table.cpu()
    own = decisions._replace(table=torch.eye(len(s_T), device=arguments.device))
    images, labels = next(data.test.batches(4))
    student = script.new_student(data, arguments)
    with common.evaluating(teacher), common.autocast(arguments):
        z = script.up_to_tap(teacher, images).float()
        z = script.pooled(z, script.map_shapes(student, data.image_size)[0][1])
        h1 = script.decision_targets(z, labels, own).argmax(1).cpu()  # (4,H,W)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    figure, axes = pyplot.subplots(len(images), 3, figsize=(9, 2 * len(images)), squeeze=False,
                                   layout="constrained", width_ratios=(1, 1, 3))
    for image, label, found, axis in zip(images.cpu(), labels.tolist(), h1, axes):
        axis[0].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        axis[0].set_title(f"class {label}", fontsize=8)
        axis[1].imshow((found - label * k).numpy(), vmin=0, vmax=max(1, k - 1), cmap="turbo")
        axis[1].set_title("sub-class of each location", fontsize=8)
        for n in found.unique()[:3].tolist():
            color = pyplot.get_cmap("turbo")((n - label * k) / max(1, k - 1))
            axis[2].bar(range(len(s_T)), s_T[n].numpy(), width=1.0, color=color,
                        label=f"row of sub-class {n - label * k}")
        axis[2].set_xlabel("sub-class of the whole table, k to a class", fontsize=8)
        axis[2].legend(fontsize=7)
        for picture in axis[:2]:
            picture.set_axis_off()
    return {**pictures, "subclasses.png": figure}


def tst(folder, result):
    """series.png: the 25 numbers over the run, searches shaded; operations.png: three images of
    augmented.png, each operation at its learned magnitude above the exact one. No augmenter: {}.
    """
    import math

    import torch
    from matplotlib import pyplot

    import common
    import tst as script

    arguments, names, pictures = result["arguments"], script.OPERATIONS, {}
    if arguments["augment"] == "learned":
        images, epochs = result["images"]["student forward and backward"], arguments["epochs"]
        batches, steps = math.ceil(images / 2 / epochs / arguments["batch_size"]), steps_of(folder)
        points, last = [], steps["epoch"][0]  # (passes, row of steps.csv)
        for row, (epoch, step) in enumerate(zip(steps["epoch"], steps["step"])):
            if epoch > last + 1:  # theta rests between two searches
                points += [(last, row), (epoch - 1, row)]
            points.append((epoch - 1 + step / batches, row))
            last = epoch
        x = [place for place, _ in points] + [last, len(result["rows"])]
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
        for axis, letter, key in ((axes[0], "q", "probabilities"), (axes[1], "m", "magnitudes")):
            for i, end in enumerate(result[key]):
                values = [steps[f"{letter}_{names[i]}"][row] for _, row in points]
                axis.plot(x, [*values, end, end], label=names[i], ls="-" if i < 7 else "--")
            for row in result["rows"]:
                if row["stage"] == 2:
                    axis.axvspan(row["epoch"] - 1, row["epoch"], alpha=0.15, color="grey", lw=0)
            axis.set(title=f"{key} {letter} (grey: search)",
                     xlabel="passes over the training images")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
        pictures["series.png"] = figure
    if not (folder / "augmenter.pt").exists() or arguments["task"] == "segmentation":
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
    figure, axes = pyplot.subplots(2 * len(images), 1 + len(names), figsize=(15, 6.3),
                                   layout="constrained")
    for i, name in enumerate(("original", *names), -1):
        learned, title = images, name
        if i >= 0:
            m = augmenter.magnitudes()[i] if i < script.MOVABLE else None
            with torch.no_grad():
                learned = augmenter.transform(i, images, m, draws)
        shown = [script.to_bytes(learned, augmenter.mean, augmenter.std)] * 2
        if 0 <= i < script.MOVABLE:
            title = f"{name}\nm = {m.item():.2f}"
            shown[1] = script.exact(name, values, min(math.floor(10 * m.item()), 9))
        for row, image in enumerate(torch.stack(shown, 1).flatten(0, 1)):
            axes[row, i + 1].imshow(image.movedim(0, 2).numpy())
            axes[row, i + 1].set(xticks=[], yticks=[])
        axes[0, i + 1].set_title(title, fontsize=7)
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel("exact" if row % 2 else "learned", fontsize=7)
    return {**pictures, "operations.png": figure}


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
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    if not (Path(sys.argv[1]) / "result.json").exists():
        sys.exit(f"figures.py: error: {sys.argv[1]} holds no finished run (result.json); a run of "
                 "several seeds has one in each seed-S")
    main(*sys.argv[1:])
