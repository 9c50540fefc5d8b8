"""Make an assignment: a copy of a script in which the bodies of some functions are gone.

    python docs/exercise.py rco                       what can be left out, with its equations
    python docs/exercise.py rco kd_loss next_anchor > my_rco.py
    python -m pytest --script=my_rco.py               grades my_rco.py by the tests of rco.py

Docstrings and the comments that print an equation stay.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("rco", "switokd", "trikd", "letkd", "tst")


def equations(source):
    """{function, or Class.method: (its node, the equations named in it)} of a script's text."""
    lines, found = source.splitlines(), {}
    for owner in (tree := ast.parse(source), *tree.body):
        if isinstance(owner, (ast.Module, ast.ClassDef)):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef):
                    text = "\n".join(lines[node.lineno - 1:node.end_lineno])
                    named = re.findall(r"Eqs?\. ((?:\(\w+\)(?:, | to | and )?)+)", text)
                    numbers = re.findall(r"\((\w+)\)", " ".join(named))
                    if numbers:
                        prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
                        found[prefix + node.name] = node, ", ".join(
                            f"({number})" for number in dict.fromkeys(numbers))
    return found


def blanked(source, names):
    """The script's text with `raise NotImplementedError` for the bodies of `names`."""
    lines, found = source.splitlines(), equations(source)
    for node, _ in sorted((found[name] for name in names), key=lambda one: -one[0].lineno):
        start = node.body[0].lineno - 1
        if ast.get_docstring(node):
            start = node.body[0].end_lineno
        indent = " " * node.body[0].col_offset
        kept, goes_on = [], False
        for line in map(str.strip, lines[start:node.end_lineno]):
            goes_on = line.startswith("# Eq") or goes_on and line.startswith("#")
            kept += [indent + line] * goes_on
        lines[start:node.end_lineno] = [*kept, f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def main(script, *names):
    script = Path(script).stem
    if script not in METHODS:
        sys.exit(f"exercise.py: error: no script {script}.py; there are {', '.join(METHODS)}")
    source = (ROOT / f"{script}.py").read_text()
    found = equations(source)
    unknown = [name for name in names if name not in found]
    if unknown:
        sys.exit(f"exercise.py: error: {script}.py has no {unknown[0]} with an equation; "
                 f"python docs/exercise.py {script} lists them")
    if names:
        print(blanked(source, names), end="")
    for name, (node, numbers) in found.items() if not names else ():
        print(f"{name:28} {numbers:28} {(ast.get_docstring(node) or '-').splitlines()[0]}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
