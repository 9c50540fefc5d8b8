"""Assignments: `docs/exercise.py` leaves bodies out, `pytest --script` grades answers."""

import ast
import subprocess
import sys
from argparse import Namespace

import grading
import pytest
from conftest import ROOT
from grading import exercise

KNOWN = [(method, name) for method in grading.MISTAKES for name in grading.MISTAKES[method]]


@pytest.mark.parametrize("method, name", KNOWN)
def test_every_known_mistake_is_told_from_the_others(method, name):
    """And from the right function, of which no mistake is said."""
    assert grading.looks_like(method, name, grading.changed(method)).startswith("right by itself")
    for label, change in grading.MISTAKES[method][name][1].items():
        found = grading.looks_like(method, name, grading.changed(method, *change))
        assert found == f"looks like: {label}"

    def unwritten(*_):
        raise NotImplementedError
    assert grading.looks_like(method, name, Namespace(**{name: unwritten})) == "not written yet"
    broken = Namespace(**{name: lambda *_: [].missing})
    assert grading.looks_like(method, name, broken).startswith("AttributeError: ")


@pytest.mark.parametrize("method, name", [
    ("rco", "mimic_loss"), ("rco", "kd_loss"), ("trikd", "triplet_loss")])
def test_a_constant_that_gets_a_gradient_is_seen(method, name):
    assert "gradient" in grading.looks_like(method, name, grading.changed(method, ".detach()", ""))


@pytest.mark.parametrize("method", exercise.METHODS)
def test_blanked_scripts(method):
    """Every function with an equation: docstring and equation stay, the body is gone."""
    source = (ROOT / f"{method}.py").read_text()
    found = exercise.equations(source)
    assert len(found) >= 4 and set(grading.MISTAKES[method]) <= set(found)
    text = exercise.blanked(source, list(found))
    for name, (node, _) in exercise.equations(text).items():
        assert ast.get_docstring(node) == ast.get_docstring(found[name][0])
        assert ast.unparse(node.body[-1]) == "raise NotImplementedError"
        assert len(node.body) == 1 + (ast.get_docstring(node) is not None)
    for line in map(str.strip, source.splitlines()):
        assert line in text or not line.startswith("# Eq")
    assert text.splitlines()[0] == source.splitlines()[0]


def test_a_graded_file(tmp_path, capsys):
    """Blanked, then with T^2 forgotten: a failed run that says so, and what the others did."""
    exercise.main("rco", "kd_loss", "next_anchor")
    (tmp_path / "my_answer.py").write_text(capsys.readouterr().out.replace(
        "    raise NotImplementedError", """\
    ce = F.cross_entropy(student_logits, labels)
    kl = softened_kl(student_logits, teacher_logits.detach(), temperature)
    return ce + weight * kl, ce, kl""", 1))
    done = subprocess.run([
        sys.executable, "-m", "pytest", "-q", f"--script={tmp_path / 'my_answer.py'}", "-k",
        "losses or test_next or one_stage", "-p", "no:cacheprovider"], cwd=ROOT,
        capture_output=True, text=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if " tests" in line}
    assert done.returncode == 1 and "looks like: without T^2" in lines["kd_loss"]
    assert lines["next_anchor"].endswith("not written yet")
    passed, _, total = lines["equal_epoch_anchors"].split("(7)")[1].split()[:3]
    assert passed == total != "0"


@pytest.mark.parametrize("content, says", [
    ("def broken(:", "SyntaxError"), ("'''My work.'''", "neither its docstring nor its name"),
    ("'''RCO: mine.'''\nimport nothing_of_this_name", "nothing_of_this_name")])
def test_files_that_cannot_be_graded(content, says, tmp_path, pytestconfig, monkeypatch):
    monkeypatch.delitem(sys.modules, "rco", raising=False)  # what was there comes back
    (tmp_path / "work.py").write_text(content)
    with pytest.raises(pytest.UsageError, match=says):
        grading.start(pytestconfig, tmp_path / "work.py")


def test_exercises_that_cannot_be_made(capsys):
    for words, says in ((["rcx"], "no script rcx.py"), (["rco", "main"], "has no main with an eq")):
        with pytest.raises(SystemExit, match=says):
            exercise.main(*words)
    exercise.main("trikd")
    printed = capsys.readouterr().out
    assert "label_shares" in printed and "(7)" in printed
