"""Assignments: `docs/exercise.py` leaves bodies out, `pytest --script` grades answers."""

import ast
import json
import subprocess
import sys

import exercises
import grading
import pytest
from conftest import ROOT
from grading import exercise


def text_of(method):
    return (ROOT / f"{method}.py").read_text(encoding="utf-8")


def graded(method, name, text):
    """The grade of function `name` in an answer's text: (passed, of), what it says."""
    row = grading.grade(method, name, ast.parse(text), "answer.py")
    return (row["passed"], row["of"]), row["says"]


OFFERED = [(method, name) for method in exercise.METHODS
           for name in exercise.equations(text_of(method))]


@pytest.mark.parametrize("method, name", OFFERED)
def test_every_function_and_its_usual_mistakes(method, name):
    """The script's own passes, each known mistake is told from the others; blanked, that function
    alone fails; every error that is asked for stands in the docstring."""
    source, right = text_of(method), grading.known(method, name)
    assert graded(method, name, source) == ((len(right), len(right)), "")
    for label, change in exercises.MISTAKES.get(f"{method}.{name}", {}).items():
        row = grading.row_of(method, name, grading.known(method, name, *change), "answer.py")
        assert row["passed"] < row["of"] and row["says"] == f"looks like: {label}"
        own = change[0] in ast.get_source_segment(source, exercise.equations(source)[name][0])
        says = graded(method, name, source.replace(*change))[1]
        assert says == f"looks like: {label}" * own  # that of another function is not its own
    blank = exercise.blanked(source, [name])
    assert graded(method, name, blank) == ((0, len(right)), "not written yet")
    other = next(one for own, one in OFFERED if own == method and one != name)
    assert graded(method, other, blank)[1] == ""
    for error in {type(one.error).__name__ for one in right if one.error}:
        assert error in ast.get_docstring(exercise.equations(source)[name][0])
    assert {name for own, name in OFFERED if own == method} == {
        *exercises.CASES[method](grading.script(method))}


KL = "return F.kl_div(log_p_s, log_p_t, reduction='batchmean', log_target=True)"
LOGS = """log_p_s = F.log_softmax(student_logits / temperature, dim=1)
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=1)
    """
KD = "ce = F.cross_entropy(student_logits, labels)\n    kl = softened_kl(student_logits, {}, " \
     "temperature)\n    return {}"
LOSS = "ce + weight * temperature**2 * kl"
WRONG = [  # a body in place of the script's; what must be said
    ("rco", "softened_kl", "pass", "returns None: is a `return` missing?"),
    ("rco", "softened_kl", LOGS + KL, "does not raise the ValueError of its docstring"),
    ("rco", "softened_kl", LOGS + "log_p_t = log_p_t.detach()\n    " + KL,
     "right value, but teacher_logits gets no gradient"),
    ("rco", "softened_kl", LOGS + KL.replace("batchmean", "none"),
     "returns a tensor (6, 5) of torch.float32, not a tensor () of torch.float32"),
    ("rco", "softened_kl", LOGS + KL + "[None]",
     "returns a tensor (1,) of torch.float32, not a tensor () of torch.float32"),
    ("rco", "softened_kl", LOGS + KL + ".item()",
     "returns a number, not a tensor () of torch.float32"),
    ("rco", "softened_kl", LOGS + KL + ".detach().numpy()",
     "returns a ndarray, not a tensor () of torch.float32"),
    ("rco", "softened_kl", LOGS + KL + ".double()",
     "returns a tensor () of torch.float64, not a tensor () of torch.float32"),
    ("rco", "softened_kl", "same_shape(student_logits, teacher_logits)\n    " + LOGS.replace(
        " / temperature", "") + KL, "looks like: the temperature is left out of the KL"),
    ("rco", "softened_kl", "student_logits.data /= temperature\n    same_shape(student_logits, "
     "teacher_logits)\n    temperature = 1\n    " + LOGS + KL,
     "changes its argument student_logits"),
    ("rco", "kd_loss", KD.format("teacher_logits", f"{LOSS}, ce, kl"),
     "right value, but teacher_logits gets a gradient, and must not"),
    ("rco", "kd_loss", KD.format("teacher_logits.detach()", LOSS), "returns a tensor () of "
     "torch.float32, not 3 values"),
    ("rco", "kd_loss", KD.format("teacher_logits.detach()", f"{LOSS}, kl, ce"),
     "wrong, and none of the usual mistakes"),
    ("rco", "kd_loss", KD.format("teacher_logits.detach()", "{'loss': ce, 'ce': ce, 'kl': kl}"),
     "returns other names or numbers of parts: see '0'"),
    ("rco", "kd_loss", "return student_logit", "NameError: name 'student_logit' is not defined"),
    ("rco", "kd_loss", "raise SystemExit(0)", "ends the program"),
    ("rco", "kd_loss", "import rco_of_mine", "ModuleNotFoundError: No module named 'rco_of_mine'"),
    ("rco", "kd_loss", KD.format("teacher_logits.detach()", f"{LOSS}, ce, kl").replace(
        "(student_logits,", "(student_logits.detach(),"), "right value, but no gradient: detach"),
    ("rco", "kd_loss", "kl = softened_kl(student_logits.detach(), teacher_logits.detach(), "
     f"temperature)\n    ce = F.cross_entropy(student_logits, labels)\n    return {LOSS}, ce, kl",
     "right value, but student_logits gets a wrong gradient"),
    ("rco", "kd_loss", "labels -= 0 * labels\n    labels[0] = 1\n    "
     + KD.format("teacher_logits.detach()", f"{LOSS}, ce, kl"), "changes its argument labels"),
    ("rco", "kd_loss", "torch.set_default_dtype(torch.float64)\n    sys.setrecursionlimit(99)",
     "NameError: name 'sys' is not defined"),
    ("rco", "kd_loss", "teacher_logits.requires_grad_(False)\n    "
     + KD.format("teacher_logits", f"{LOSS}, ce, kl"), ""),
    ("rco", "equal_epoch_anchors", "return torch.tensor([k * epochs // count for k in range(1, "
     "count + 1)])", "returns a tensor (4,) of torch.int64, not 4 values"),
    ("rco", "next_anchor", "kl.sort()\n    return len(kl)", "changes its argument kl.1"),
    ("rco", "next_anchor", "while current < len(kl):\n        kl.pop()\n    return 1", "wrong"),
    ("rco", "kd_loss", "raise ValueError('whatever comes')", "ValueError: whatever comes"),
    ("rco", "kd_loss", KD.format("teacher_logits.detach()", f"({LOSS}).detach(), ce, kl"),
     "right value, but what it returns at 0 has no gradient"),
    ("rco", "kd_loss", KD.format("teacher_logits.detach()", f"{LOSS} ^ 2, ce, kl"),
     "not implemented for"),
    ("rco", "kd_loss", "return kd_loss(student_logits, teacher_logits, labels, weight, 4.0)",
     "RecursionError"),
    ("rco", "next_anchor", "return float(len(kl))", "returns a float, not a whole number"),
    ("letkd", "discriminant", "return None, None, None", "returns 3 values, not 2"),
    ("switokd", "choose_mode", "return gap > threshold", "returns a bool, not a str"),
    ("switokd", "choose_mode", "student_distance += 0\n    return 'Expert'", "wrong, and none of"),
    ("switokd", "switching_threshold", "s, t = student_distance, teacher_distance\n    epsilon = "
     "torch.exp(-t / (s + t))\n    return s - epsilon * t, epsilon",
     "right value, but a gradient: detached?"),
    ("switokd", "switching_threshold", "import math\n    s, t = float(student_distance), float("
     "teacher_distance)\n    return s - math.exp(-t / (s + t)) * t, math.exp(-t / (s + t))",
     "returns a number, not a tensor () of torch.float32"),
    ("switokd", "kl_to", "same_shape(peer_logits, own_logits)\n    with torch.no_grad():\n        "
     "return F.kl_div(F.log_softmax(own_logits / temperature, 1), F.softmax(peer_logits / "
     "temperature, 1), reduction='batchmean')", "right value, but no gradient: detached?"),
    ("switokd", "train_step", "z = {name: network(images) for name, network in (students | "
     "teachers).items()}\n    return {}, z, {}", "returns other names or numbers of parts"),
    ("trikd", "label_shares", "return 0.5", "returns a number, not 2 values"),
    ("letkd", "template_loss", "same_shape(scores, targets)\n    scores.data += 1\n    p_T = "
     "targets.detach()\n    return (p_T * (p_T.log() - scores.log_softmax(1))).sum(1).mean()",
     "changes its argument scores"),
    ("letkd", "word_targets", "features.zero_()\n    return features", "changes its arg"),
    ("letkd", "KDLayer.forward", "return self.match(x)", "returns a tensor (2, 7, 3, 4)"),
    ("letkd", "CosineConv1x1.forward", "self.weight.data = F.normalize(self.weight, dim=1).data\n"
     "        return self.scale * at_every_location(F.normalize(x, dim=1), self.weight.flatten(1))",
     "changes its argument self.weight"),
    ("tst", "relaxed_bernoulli", "u = torch.rand(logits.shape)\n    return torch.sigmoid((logits "
     "+ u.log() - (1 - u).log()) / temperature)", "wrong, and none of the usual mistakes"),
    ("tst", "augmentation_loss", "raise KeyError(student_term)", "KeyError: 'non_saturating'"),
    ("tst", "to_bytes", "return (255 * (images * std + mean) + 0.5).floor().clamp(0, 255)",
     "returns a tensor (1, 3, 2, 2) of torch.float32, not a tensor (1, 3, 2, 2) of torch.uint8"),
    ("tst", "Augmenter.magnitudes", "return self.theta_m.data.sigmoid()",
     "right value, but no gradient: detached?"),
    ("tst", "GeometricEncoder.forward", "return images", "wrong, and none"),
    ("tst", "Augmenter.probabilities", "theta_p = self.theta_p.detach().requires_grad_()\n        "
     "return torch.sigmoid(theta_p)", "right value, but self.theta_p gets no gradient"),
]


@pytest.mark.parametrize("method, name, body, says", WRONG)
def test_wrong_answers(method, name, body, says):
    text = exercise.blanked(text_of(method), [name]).replace("raise NotImplementedError", body)
    (passed, of), said = graded(method, name, text)
    assert passed < of and says in said


def test_answers_in_another_form():
    """A helper, an import, a constant of one's own; other words in an error; other formulas."""
    text = exercise.blanked(text_of("rco"), ["kd_loss"]).replace("raise NotImplementedError", """\
    if student_logits.shape != teacher_logits.shape:
        raise ValueError("no")
    ce, kl = nn.CrossEntropyLoss()(student_logits, labels), mine(student_logits, teacher_logits,
                                                                 temperature)
    return ce + weight * temperature ** TWO * kl, ce, kl""".strip()) + """
import torch.nn.functional as functional
TWO = 2
import torch as again, math as maths
if TWO:
    try:
        THREE = TWO + 1
    except NameError:
        pass
TWO += 0
raise SystemExit("the file as a whole is never run")
import no_such_module  # and no other function needs it
def mine(s, t, T):
    assert maths.ceil(2.5) == THREE and again is torch
    p, q = functional.log_softmax(t.detach() / T, 1), functional.log_softmax(s / T, 1)
    return (p.exp() * (p - q)).sum(1).mean()
"""
    assert graded("rco", "kd_loss", text) == ((6, 6), "")
    text = text_of("rco").replace("def kd_loss", "def kd_los")
    assert graded("rco", "kd_loss", text) == ((0, 6), "there is no kd_loss in the file")
    assert graded("rco", "softened_kl", text)[1] == ""
    text = text_of("rco").replace("def kd_loss", "async def kd_loss")
    assert graded("rco", "kd_loss", text)[1] == "returns a coroutine, not 3 values"
    assert graded("rco", "train_step", text)[1] == ""
    head = "class CosineConv1x1(nn.Module):\n"
    text = text_of("letkd").replace(head, head + """
    length = 1.0

    def unit(self, x):
        return self.length * F.normalize(x, dim=1)
""").replace("at_every_location(F.normalize(x, dim=1)", "at_every_location(self.unit(x)")
    assert graded("letkd", "CosineConv1x1.forward", text)[1] == ""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_what_hangs_or_ends_the_process_costs_its_own_row(start, tmp_path, monkeypatch):
    if start not in grading.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    monkeypatch.setattr(grading, "SECONDS", 1)
    bodies = {"scaled_kl": "import trikd\n    return trikd.scaled_kl(target_logits, logits, 1.0)",
              "triplet_loss": "import os\n    os._exit(0)",
              "label_shares": "while True: print('loud')"}
    names = [*bodies][:3 if start == "fork" else 2] + ["train_step"]  # a spawn takes seconds
    text = exercise.blanked(text_of("trikd"), bodies)
    for body in bodies.values():
        text = text.replace("raise NotImplementedError", body, 1)
    (tmp_path / "answer.py").write_text(text, encoding="utf-8-sig")
    rows = grading.rows("trikd", tmp_path / "answer.py", names, start)
    said = ["halted; None in sys.modules", "ends the program", "no answer within 1 s", ""]
    assert [row["says"][-27:] for row in rows] == said[:len(names) - 1] + said[3:]


@pytest.mark.parametrize("method", exercise.METHODS)
def test_blanked_scripts(method):
    """Every function with an equation: docstring and equation stay, the body is gone."""
    source = text_of(method)
    found = exercise.equations(source)
    text = exercise.blanked(source, list(found))
    for name, (node, _) in exercise.equations(text).items():
        assert ast.get_docstring(node) == ast.get_docstring(found[name][0])
        assert ast.unparse(node.body[-1]) == "raise NotImplementedError"
        assert len(node.body) == 1 + (ast.get_docstring(node) is not None)
    for line in map(str.strip, source.splitlines()):
        assert line in text or not line.startswith("# Eq")
    assert text.splitlines()[0] == source.splitlines()[0]


def test_a_graded_file(tmp_path):
    """By the command of the README: the table, the exit code, the grades as JSON."""
    answer = tmp_path / "my_answer.py"
    exercise.main("rco", "kd_loss", "next_anchor", "-o", str(answer))
    answer.write_text(answer.read_text().replace("raise NotImplementedError", KD.format(
        "teacher_logits.detach()", "ce + weight * kl, ce, kl"), 1))

    done = subprocess.run([
        sys.executable, "-m", "pytest", "-q", f"--script={answer}", "-p", "no:cacheprovider",
        f"--grade={tmp_path / 'grades.json'}"], cwd=ROOT, capture_output=True, text=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if " calls" in line}
    assert done.returncode == 1 and "looks like: without T^2" in lines["kd_loss"]
    assert lines["next_anchor"].endswith("not written yet")
    rows = {row.pop("function"): row for row in json.loads((tmp_path / "grades.json").read_text())}
    assert {*rows} == {*lines} == {name for method, name in OFFERED if method == "rco"}
    assert rows["kd_loss"] == {"passed": 0, "of": 6, "says": "looks like: without T^2"}
    assert [name for name, row in rows.items() if row["passed"] < row["of"]] == [
        "kd_loss", "next_anchor"]
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        exercise.main("rco", "kd_loss", "-o", str(answer))


@pytest.mark.parametrize("name, content, says", [
    ("work.py", "def broken(:", "invalid syntax"), ("work.py", "'''My work.'''", "neither its doc"),
    ("my_rco.ipynb", "{}", "save a notebook"), ("my_rco.py", "\0", "no UTF-8 text"),
    ("none/my_rco.py", None, "No such file")])
def test_files_that_cannot_be_graded(name, content, says, tmp_path, pytestconfig):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(pytest.UsageError, match=says):
        grading.start(pytestconfig, tmp_path / name)


def test_exercises_that_cannot_be_made(capsys):
    for words, says in ((["rcx"], "no script rcx.py"), (["rco", "main"], "has no main with an eq")):
        with pytest.raises(SystemExit, match=says):
            exercise.main(*words)
    exercise.main("trikd")
    printed = capsys.readouterr().out
    assert "label_shares" in printed and "(7)" in printed
