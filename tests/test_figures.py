"""docs/figures.py: the pictures of runs of all five scripts, from their records, on the CPU."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT, common, folder_of, forbidden, log, pixels, result_of, shapes_data, tree, weights)
from PIL import Image

import letkd

pyplot = pytest.importorskip("matplotlib.pyplot")
sys.path.insert(0, str(ROOT / "docs"))
import ablations  # noqa: E402
import figures  # noqa: E402


def drawn(folder, *names):
    """{name: figure} of a run; its folder has these files now, and nothing was trained for them."""
    pyplot.close("all")  # those of other tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "train_network", forbidden)
        found = figures.main(folder)
    assert {path.name for path in folder.glob("*.png")} == {*names}
    return found


def lines(figure, place=0):
    """{label: [y]} of the lines in a pair of axes."""
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[place].lines}


def as_on_the_page(name, figure, *labels):
    """A picture of the pages has the size of one drawn anew, whose axes have these labels; it is
    small, and its page shows it."""
    path = ROOT / "docs" / name
    assert Image.open(path).size == pytest.approx(figure.get_size_inches() * 90, abs=1)
    assert path.stat().st_size <= 60_000
    assert [axes.get_xlabel() for axes in figure.axes][:len(labels)] == [*labels]
    assert any(f"({place}{name})" in page.read_text(encoding="utf-8") for page, place in (
        *((page, "") for page in (ROOT / "docs").glob("*.md")), (ROOT / "README.md", "docs/")))


def test_the_pictures_of_the_results():
    kept = json.loads(ablations.KEPT.read_text())
    before = (ROOT / "docs/results-embedded.png").read_bytes()
    figure = ablations.plot(kept)
    (ROOT / "docs/results-embedded.png").write_bytes(before)
    as_on_the_page("results-embedded.png", figure)
    assert len(figure.axes[0].get_yticklabels()) == len(ablations.EMBEDDED)
    centres = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    kd = np.mean(kept["rco-kd"]["test"])
    assert centres == pytest.approx([np.mean(kept[run]["test"]) - kd for _, run, _
                                     in ablations.EMBEDDED], abs=0.006)


def on_another_device(folder):
    """The records in the folder say that the runs were on a GPU, which this machine may lack."""
    for path in folder.rglob("result.json"):
        text = path.read_text().replace("--device cpu", "--device cuda")
        path.write_text(text.replace('"device": "cpu"', '"device": "cuda"'))


def test_rco(run, tmp_path, capsys):
    run("rco", tmp_path, "--epochs 3 --anchors 3 --image-size 8")
    folder = folder_of(tmp_path, "eei")
    result, found = result_of(folder), drawn(folder, "rco.png")
    stages = [f"after stage {i}, anchor {i}" for i in (1, 2, 3)]
    assert lines(found["rco.png"], 1) == dict(zip(stages, result["route_kls"]))
    assert lines(found["rco.png"]) == {
        "teacher": [test for _, test in result["teacher_test"]],
        "student": [row["test"] for row in result["rows"]]}  # stages of one epoch
    result["script"] = "my_rco"
    (folder / "result.json").write_text(json.dumps(result))
    figures.main(folder, tmp_path / "my-rco.png")
    assert [*tmp_path.glob("*.png")] == [tmp_path / "my-rco.png"]
    as_on_the_page("rco.png", found["rco.png"], "anchor (teacher epoch)", "teacher epoch")
    with pytest.raises(SystemExit, match="no other.png in this run"):
        figures.main(folder, "other.png")
    capsys.readouterr()
    result["script"] = "another"
    (folder / "result.json").write_text(json.dumps(result))
    assert figures.main(folder) == {}
    assert capsys.readouterr().out == "nothing to draw of a run of another.py, eei\n"
    with pytest.raises(SystemExit, match="no result.json in nowhere"):
        figures.main("nowhere")


def test_data_and_cache_that_have_moved(run, tmp_path):
    cache, data = tmp_path / "cache", tree(tmp_path / "data", {
        f"{part}/{name}/{n}.png": pixels(8, 8, 3, seed=n) for part in ("train", "test")
        for name in ("ant", "bee") for n in range(6)})
    run("trikd", tmp_path / "out", f"--dataset folder --data {data} --image-size 8 --epochs 1 "
        f"--generations 1 --batch-size 4 --cache {cache}")
    moved = data.rename(tmp_path / "elsewhere"), cache.rename(tmp_path / "kept")
    with pytest.raises(OSError, match="No such file"):
        figures.main(folder_of(tmp_path / "out", "TriKD"))
    found = figures.main(folder_of(tmp_path / "out", "TriKD"), "--data", str(moved[0]), "--cache",
                         str(moved[1]))
    assert {*found} == {"trikd.png", "functions.png"}


@pytest.mark.parametrize("flags, name, pairs", [
    ("--method switokd never --seed 0 1", "switokd", 1),  # the other seed is not compared
    ("--method 'fixed 0.2' --topology 1t2s --student resnet8x0.5 resnet8x0.5", "fixed 0.2", 2)])
def test_switokd(flags, name, pairs, run, tmp_path):
    run("switokd", tmp_path, f"{flags} --image-size 8")
    folder = folder_of(tmp_path, name)
    found = drawn(folder, "degeneration.png", "switokd.png", "rule.png")
    steps = [row for epoch in (1, 2) for row in log(folder, f"steps-{epoch:04}.csv")]
    first = steps[::pairs]  # of the first pair
    shown, t = lines(found["switokd.png"]), lines(found["degeneration.png"])
    assert shown["gap G"] == [float(row["gap"]) for row in first]
    assert shown["threshold"] == [0.2 if "fixed" in name else float(row["threshold"])
                                  for row in first]
    when = found["switokd.png"].axes[0].lines[0].get_xdata()
    assert list(when) == pytest.approx([step / 6 for step in range(1, 13)])  # 6 of 260 images
    assert t.pop(name) == [float(row["teacher_distance"]) for row in first]
    if name == "switokd":
        as_on_the_page("switokd.png", found["switokd.png"], "epoch")
    assert [*t] == ["never"] * (name == "switokd") and len(found["switokd.png"].axes) == pairs
    points = [len(dots.get_offsets()) for dots in found["rule.png"].axes[0].collections]
    expert = sum(row["mode"] == "expert" for row in steps)
    assert points == [len(steps) - expert, expert]
    s, t, gap = ([float(row[key]) for row in first[:6]] for key in (
        "student_distance", "teacher_distance", "gap"))
    slack, asked, *_ = found["rule.png"].axes[1].lines  # of the first pair
    assert len(found["rule.png"].axes[1].lines) == 2 * pairs
    ahead = [(a, b, G) for a, b, G in zip(t, s, gap) if a < b]  # in the first epoch
    assert (0.5 in slack.get_xdata()) == bool(ahead)
    if ahead:
        assert slack.get_ydata()[0] == pytest.approx(np.median(
            [(G - b + a) / a for a, b, G in ahead]), rel=1e-4)
        assert asked.get_ydata()[0] == pytest.approx(np.median(
            [1 - np.exp(-a / (a + b)) for a, b, _ in ahead]), rel=1e-4)


def test_classical_scaling():
    points = np.random.default_rng(0).normal(size=(7, 2)) * (3, 1)  # the longer axis comes first
    D = np.square(points[:, None] - points[None]).sum(2)
    found = figures.classical_scaling(torch.tensor(D)).numpy()
    assert np.square(found[:, None] - found[None]).sum(2) == pytest.approx(D, abs=1e-9)
    assert found[:, 0].std() > found[:, 1].std()


def test_trikd(run, tmp_path):
    flags = (f"--open-set 4 --mean 0.4 0.5 0.6 --std 0.2 0.2 0.2 --image-size 8 --cache "
             f"'{tmp_path / 'a b'}' ")
    run("trikd", tmp_path, flags + "--method TriKD born-again 'mutual learning'")
    folder = folder_of(tmp_path, "TriKD")
    run("trikd", tmp_path, flags + "--anchor-weight 3 --generations 1")
    on_another_device(tmp_path)
    result = result_of(folder)
    facts, device = (result["arguments"][name] for name in ("data", "device"))
    assert common.load_data(figures.arguments_of(result)).facts == facts and device == "cuda"
    found = drawn(folder, "functions.png", "trikd.png", "tradeoff.png")
    networks, shares = ([text.get_text() for text in found[name].axes[0].texts]
                        for name in ("functions.png", "tradeoff.png"))
    assert {*networks} == {"A0", *(f"{name} {network}" for name, chain in (
        ("TriKD", "S1 S2 T1 T2"), ("born-again", "S1 S2"), ("mutual learning", "S1 T1"))
        for network in chain.split())}
    assert shares == [f"0.1 (label share {1 / 1.1:.2f})", "3 (label share 0.25)"]  # eq. (8)
    A_0, = (tmp_path / "a b").glob("*x0.5-2-*")
    assert lines(found["trikd.png"], 1) == {
        "KL(teacher || student)": [row["kl_ts"] for row in result["table"]],
        "KL(anchor || teacher)": [row["kl_at"] for row in result["table"]]}
    as_on_the_page("trikd.png", found["trikd.png"], "generation", "generation")
    students = lines(found["trikd.png"])["TriKD: student, the next anchor"]
    assert students == [result_of(A_0)["last_test"], *(row["test"] for row in result["table"])]


def test_letkd(run, tmp_path):
    flags = f"--words 8 --per-class 2 --rows 2000 --image-size 8 --cache {tmp_path / 'cache'}"
    run("letkd", tmp_path, f"{flags} --method letKD-2 kd")
    folder = folder_of(tmp_path, "letKD-2")
    drawn(folder_of(tmp_path, "kd"), "layers.png")
    on_another_device(tmp_path)
    found = drawn(folder, "layers.png", "letkd.png")
    rows = result_of(folder)["rows"]
    terms, scales = lines(found["layers.png"]), lines(found["layers.png"], 1)
    assert terms == {name: [row[name] for row in rows] for name in ("ce", "penult", "inter")}
    assert scales["s_q, inter"] == [row["s_q_inter"] for row in rows] and len(scales) == 4
    data, settings = shapes_data(image_size=8), result_of(folder)["arguments"]
    student = letkd.build_student("resnet8x0.5", 20, 8, 40, 8, settings["alpha"])
    student.load_state_dict(weights(folder / "student.pt"))
    images, _ = next(data.test.batches(8))
    with torch.no_grad():
        _, *scores = student.eval().forward_scores(images)
    for row, layer, a in zip((1, 2), (student.inter, student.penult), scores):
        most, template = layer.norm(a).relu().max(1)  # (8,H,W)
        shown = np.stack([axes.images[0].get_array().filled(-1)
                          for axes in found["letkd.png"].axes[8 * row:8 * row + 8]])
        assert np.array_equal(shown, torch.where(most > 0, template, -1))
    as_on_the_page("letkd.png", found["letkd.png"])


def test_tst(run, tmp_path):
    run("tst", tmp_path, "--fit-steps 1 --epochs 3 --search-at 0 2 --method TST kd")
    drawn(folder_of(tmp_path, "kd"))
    folder = folder_of(tmp_path, "TST")
    found = drawn(folder, "augmented.png", "operations.png", "series.png")
    searches = result_of(folder)["searches"]
    for name in ("series.png", "operations.png"):
        as_on_the_page(f"tst-{name}", found[name])
    q = found["series.png"].axes[0].lines
    assert len(q) == 14 and len(found["series.png"].axes[1].lines) == 11
    assert list(q[0].get_xdata()) == [0, 0, 1, 3, 4, 5]  # passes: search, 1, 2, search, 3
    assert list(q[0].get_ydata()) == [0.5, 0.5, *(
        row["q_Brightness"] for row in searches for _ in (0, 1))]
    assert len(found["operations.png"].axes) == 2 * 3 * 15
