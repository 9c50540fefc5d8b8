"""docs/figures.py: the pictures of runs of all five scripts, from their records, on the CPU."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, common, folder_of, forbidden, log, pixels, result_of, tree

pyplot = pytest.importorskip("matplotlib.pyplot")
sys.path.insert(0, str(ROOT / "docs"))
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


def on_another_device(folder):
    """The records in the folder say that the runs were on a GPU, which this machine may lack."""
    for path in folder.rglob("result.json"):
        text = path.read_text().replace("--device cpu", "--device cuda")
        path.write_text(text.replace('"device": "cpu"', '"device": "cuda"'))


def test_rco(run, tmp_path, capsys):
    run("rco", tmp_path, "--epochs 3 --anchors 3 --image-size 8")
    folder = folder_of(tmp_path, "eei")
    result, found = result_of(folder), drawn(folder, "hardness.png", "gap.png")
    stages = [f"after stage {i}, anchor {i}" for i in (1, 2, 3)]
    assert lines(found["hardness.png"]) == dict(zip(stages, result["route_kls"]))
    assert lines(found["gap.png"]) == {
        "teacher": [test for _, test in result["teacher_test"]],
        "student": [row["test"] for row in result["rows"]]}  # stages of one epoch
    result["script"] = "my_rco"
    (folder / "result.json").write_text(json.dumps(result))
    figures.main(folder, tmp_path / "gap.png")
    assert [*tmp_path.glob("*.png")] == [tmp_path / "gap.png"]
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
    assert {*found} == {"generations.png", "functions.png"}


@pytest.mark.parametrize("flags, name, pairs", [
    ("--method switokd never --seed 0 1", "switokd", 1),  # the other seed is not compared
    ("--method 'fixed 0.2' --topology 1t2s --student resnet8x0.5 resnet8x0.5", "fixed 0.2", 2)])
def test_switokd(flags, name, pairs, run, tmp_path):
    run("switokd", tmp_path, f"{flags} --image-size 8")
    folder = folder_of(tmp_path, name)
    found = drawn(folder, "degeneration.png", "gap.png", "rule.png")
    steps = [row for epoch in (1, 2) for row in log(folder, f"steps-{epoch:04}.csv")]
    first = steps[::pairs]  # of the first pair
    shown, t = lines(found["gap.png"]), lines(found["degeneration.png"])
    assert shown["gap G"] == [float(row["gap"]) for row in first]
    assert shown["threshold"] == [0.2 if "fixed" in name else float(row["threshold"])
                                  for row in first]
    when = found["gap.png"].axes[0].lines[0].get_xdata()
    assert list(when) == pytest.approx([step / 6 for step in range(1, 13)])  # 6 of 260 images
    assert t.pop(name) == [float(row["teacher_distance"]) for row in first]
    assert [*t] == ["never"] * (name == "switokd") and len(found["gap.png"].axes) == pairs
    points = [len(dots.get_offsets()) for dots in found["rule.png"].axes[0].collections]
    expert = sum(row["mode"] == "expert" for row in steps)
    assert points == [len(steps) - expert, expert]


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
    found = drawn(folder, "functions.png", "generations.png", "tradeoff.png")
    networks, shares = ([text.get_text() for text in found[name].axes[0].texts]
                        for name in ("functions.png", "tradeoff.png"))
    assert {*networks} == {"A0", *(f"{name} {network}" for name, chain in (
        ("TriKD", "S1 S2 T1 T2"), ("born-again", "S1 S2"), ("mutual learning", "S1 T1"))
        for network in chain.split())}
    assert shares == [f"0.1 (label share {1 / 1.1:.2f})", "3 (label share 0.25)"]  # eq. (8)
    A_0, = (tmp_path / "a b").glob("*x0.5-2-*")
    students = lines(found["generations.png"])["TriKD: student, the next anchor"]
    assert students == [result_of(A_0)["last_test"], *(row["test"] for row in result["table"])]


def test_letkd(run, tmp_path):
    flags = f"--words 8 --per-class 2 --rows 2000 --image-size 8 --cache {tmp_path / 'cache'}"
    run("letkd", tmp_path, f"{flags} --method letKD-2 kd")
    folder = folder_of(tmp_path, "letKD-2")
    drawn(folder_of(tmp_path, "kd"), "layers.png")
    on_another_device(tmp_path)  # the teacher is found, words and decisions are fitted again
    found = drawn(folder, "layers.png", "subclasses.png")
    rows = result_of(folder)["rows"]
    terms, scales = lines(found["layers.png"]), lines(found["layers.png"], 1)
    assert terms == {name: [row[name] for row in rows] for name in ("ce", "penult", "inter")}
    assert scales["s_q, inter"] == [row["s_q_inter"] for row in rows] and len(scales) == 4
    maps = [axes.images[0].get_array() for axes in found["subclasses.png"].axes[1::3]]
    assert len(maps) == 4 and {*np.unique(maps)} <= {0, 1}  # of the own class, k = 2


def test_tst(run, tmp_path):
    run("tst", tmp_path, "--fit-steps 1 --epochs 3 --search-at 0 2 --method TST kd")
    drawn(folder_of(tmp_path, "kd"))
    folder = folder_of(tmp_path, "TST")
    found = drawn(folder, "augmented.png", "operations.png", "series.png")
    searches = result_of(folder)["searches"]
    q = found["series.png"].axes[0].lines
    assert len(q) == 14 and len(found["series.png"].axes[1].lines) == 11
    assert list(q[0].get_xdata()) == [0, 0, 1, 3, 4, 5]  # passes: search, 1, 2, search, 3
    assert list(q[0].get_ydata()) == [0.5, 0.5, *(
        row["q_Brightness"] for row in searches for _ in (0, 1))]
    assert len(found["operations.png"].axes) == 2 * 3 * 15
