"""Assignments: `docs/exercise.py` leaves bodies out, `pytest --script` grades answers."""

import ast
import subprocess
import sys
from argparse import Namespace

import grading
import pytest
from conftest import ROOT

KNOWN = [(method, name) for method in grading.MISTAKES for name in grading.MISTAKES[method]]


@pytest.mark.parametrize("method, name", KNOWN)
def test_every_known_mistake_is_told_from_the_others(method, name):
    """And from the right function, of which no mistake is said."""
    right = grading.load(method, ROOT / f"{method}.py", f"right_{method}")
    assert grading.looks_like(method, name, right).startswith("right by itself")
    for label, mistake in grading.MISTAKES[method][name][1]:
        found = grading.looks_like(method, name, Namespace(**{name: mistake}))
        assert found == f"looks like: {label}"

    def unwritten(*_):
        raise NotImplementedError
    assert grading.looks_like(method, name, Namespace(**{name: unwritten})) == "not written yet"
    broken = Namespace(**{name: lambda *_: [].missing})
    assert grading.looks_like(method, name, broken).startswith("AttributeError: ")


def test_a_constant_that_gets_a_gradient_is_seen():
    import rco
    wrong = Namespace(mimic_loss=lambda s, t: (s - t).square().sum(1).mean())
    assert "gradient" in grading.looks_like("rco", "mimic_loss", wrong)
    assert "gradient" not in grading.looks_like("rco", "mimic_loss", rco)


@pytest.mark.parametrize("method", grading.exercise.METHODS)
def test_blanked_scripts(method):
    """Every function with an equation: docstring and equation stay, the body is gone."""
    source = (ROOT / f"{method}.py").read_text()
    found = grading.exercise.equations(source)
    assert len(found) >= 6 and set(grading.MISTAKES[method]) <= set(found)
    text = grading.exercise.blanked(source, list(found))
    for name, (node, _) in grading.exercise.equations(text).items():
        assert ast.get_docstring(node) == ast.get_docstring(found[name][0])
        assert ast.unparse(node.body[-1]) == "raise NotImplementedError"
        assert len(node.body) == 1 + (ast.get_docstring(node) is not None)
    for line in map(str.strip, source.splitlines()):
        assert line in text or not line.startswith("# Eq")
    assert text.splitlines()[0] == source.splitlines()[0]


def python(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_graded_file(tmp_path):
    """Blanked, then with T^2 forgotten: a failed run that says so, and what the others did."""
    code, text = python("docs/exercise.py", "rco", "kd_loss", "next_anchor")
    assert code == 0
    text = text.replace("    raise NotImplementedError", """\
    kl = softened_kl(student_logits, teacher_logits.detach(), temperature)
    return F.cross_entropy(student_logits, labels) + weight * kl""", 1)
    (tmp_path / "my_answer.py").write_text(text)
    code, printed = python("-m", "pytest", "-q", f"--script={tmp_path / 'my_answer.py'}", "-k",
                           "losses or anchor", "-p", "no:cacheprovider")
    lines = {line.split()[0]: line for line in printed.splitlines() if " tests" in line}
    assert code == 1 and "looks like: without T^2" in lines["kd_loss"]
    assert lines["next_anchor"].endswith("not written yet")
    passed, _, total = lines["equal_epoch_anchors"].split("(7)")[1].split()[:3]
    assert passed == total != "0"


@pytest.mark.parametrize("content, says", [
    ("def broken(:", "SyntaxError"), ("'''My work.'''", "neither its docstring nor its name"),
    ("'''RCO: mine.'''\nimport nothing_of_this_name", "nothing_of_this_name")])
def test_files_that_cannot_be_graded(tmp_path, content, says):
    (tmp_path / "work.py").write_text(content)
    code, printed = python("-m", "pytest", f"--script={tmp_path / 'work.py'}")
    assert code == 4 and says in printed and "Traceback" not in printed


def test_bad_exercises():
    for words, says in ((["rcx"], "no script rcx.py"), (["rco", "main"], "has no main with an eq")):
        code, printed = python("docs/exercise.py", *words)
        assert code == 1 and says in printed and "Traceback" not in printed
    code, printed = python("docs/exercise.py", "trikd")
    assert code == 0 and "label_shares" in printed and "(7)" in printed
