"""Make an assignment: a copy of a script in which the bodies of some functions are gone.

    python docs/exercise.py rco                       what can be left out, with its equations
    python docs/exercise.py rco kd_loss next_anchor -o my_rco.py
    python -m pytest --script=my_rco.py               grades my_rco.py, function by function

Docstrings and the comments that print an equation stay. Without -o the copy is printed.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("rco", "switokd", "trikd", "letkd", "tst")
MACHINERY = {"arguments", "record"}  # a function of flags or of a run's files is no exercise


def equations(source):
    """{function, or Class.method: (its node, the equations named in it)} of a script's text."""
    lines, found = source.splitlines(), {}
    for owner in (tree := ast.parse(source), *tree.body):
        if not isinstance(owner, (ast.Module, ast.ClassDef)):
            continue
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef) or (
                    MACHINERY & {parameter.arg for parameter in node.args.args}):
                continue
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
            line = line[line.find("# Eq"):] if "# Eq" in line else line  # also behind code
            goes_on = line.startswith("# Eq") or goes_on and line.startswith("#")
            kept += [indent + line] * goes_on
        lines[start:node.end_lineno] = [*kept, f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def main(script, *names):
    script, out = Path(script).stem, None
    if "-o" in names[:-1]:
        at = names.index("-o")
        out, names = Path(names[at + 1]), (*names[:at], *names[at + 2:])
    if script not in METHODS:
        sys.exit(f"exercise.py: error: no script {script}.py; there are {', '.join(METHODS)}")
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    found = equations(source)
    unknown = [name for name in names if name not in found]
    if unknown:
        sys.exit(f"exercise.py: error: {script}.py has no {unknown[0]} with an equation; "
                 f"python docs/exercise.py {script} lists them")
    if out and out.exists():
        sys.exit(f"exercise.py: error: {out} is there already; nothing is overwritten")
    if out:
        out.write_text(blanked(source, names), encoding="utf-8")
    elif names:
        print(blanked(source, names), end="")
    for name, (node, numbers) in found.items() if not names else ():
        print(f"{name:28} {numbers:28} {(ast.get_docstring(node) or '-').splitlines()[0]}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
