"""`python -m pytest --script=my_rco.py`: grades each function of my_rco.py that has an equation.

A function is put alone into the project's own script, so that the mistakes of others do not count
against it, and called with the arguments of tests/exercises.py in a process of its own. What it
returns, its gradients and what it leaves of its arguments are compared with the script's own.
"""

import ast
import faulthandler
import functools
import inspect
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections import namedtuple
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import exercise  # noqa: E402
import exercises  # noqa: E402

SECONDS = 10  # for all calls of one function


# ------------------------------------------------------------------------------- an answer's module
@functools.cache
def compiled(method, old, new):
    text = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    assert old in text, f"{method}.py has no {old!r}"
    return compile(text.replace(old, new), f"{method}.py", "exec")


def script(method, old="", new=""):
    """The method's own script as a new module, with `new` wherever its text has `old`."""
    module = ModuleType(f"graded_{method}")
    exec(compiled(method, old, new), vars(module))
    return module


def defined(node):
    """The names that a statement at the top of a file, or of a class, defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    inner = [part for part in ast.iter_child_nodes(node)]  # of `if`, `try` and assignments
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(defined, inner))


def named(nodes):
    return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}


def answered(method, name, tree, file):
    """The method's own script with the function `name` of an answer, whose text is `tree`.

    With it comes what it uses of the answer and the script has not: imports, helpers, constants;
    of its class the members that the script's class has not.
    """
    module, body = script(method), tree.body
    *owner, function = name.split(".")
    if owner:
        body = [part for node in body if getattr(node, "name", "") == owner[0]
                for part in node.body]
    found = [node for node in body if function in defined(node)]
    if not found:
        raise LookupError(f"there is no {name} in the file")
    delattr(getattr(module, owner[0]) if owner else module, function)  # so that none can call it
    functions = {key for key, value in vars(module).items() if inspect.isfunction(value)}
    own, helpers = found[-1:], []
    if owner:
        there = {*dir(getattr(module, owner[0])), function}
        own = [node for node in body if defined(node) - there] + own
    for _ in tree.body:  # helpers of helpers
        wanted = named([*own, *helpers]) - {*vars(module)}
        helpers = [node for node in tree.body
                   if defined(node) & wanted and not defined(node) & functions]
    if owner:  # a subclass, under the name of its class
        own = [ast.ClassDef(owner[0], [ast.Name(owner[0], ast.Load())], [], own, [])]
    tree = ast.fix_missing_locations(ast.Module([*helpers, *own], []))
    exec(compile(tree, file, "exec"), vars(module))
    return module


# ------------------------------------------------------------------------------- what a call leaves
def leaves(value, path=()):
    """{where: tensor, number, word, ...} of all that a value holds."""
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if isinstance(part, torch.Tensor)}
        value = {**value.state_dict(keep_vars=True), **own,
                 "train mode": str([module.training for module in value.modules()]),
                 "requires_grad": str([part.requires_grad for part in value.parameters()])}
    elif isinstance(value, torch.optim.Optimizer):
        value = value.state_dict()
    elif isinstance(value, torch.Generator):
        value = value.get_state()
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {where: leaf for key, part in value.items()
            for where, leaf in leaves(part, (*path, key)).items()}


def copied(found):
    return {where: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
            for where, leaf in found.items()}


def learning(found):
    return {where: leaf for where, leaf in found.items()
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad}


# returned, before, after: copies of the `leaves` of the result and of the arguments; gradients:
# {where in the arguments: tensor or None}, or None of a result that has none; learning: where the
# result has some
Outcome = namedtuple("Outcome", "error returned gradients before after learning")


def outcomes(method, name, module):
    """What the function of the module does in each of its CASES."""
    found, function = [], attrgetter(name)(module)
    torch.manual_seed(0)
    for arguments in exercises.CASES[method](module)[name]():
        torch.manual_seed(0)
        torch.set_grad_enabled(True)  # whatever the last call has left
        torch.set_default_dtype(torch.float32)
        before, gradients, wanted = copied(leaves(arguments)), None, learning(leaves(arguments))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = function(*arguments)
            returned, after = leaves(result), copied(leaves(arguments))
            if not name.endswith("_step"):
                after |= {(*where, "grad"): leaf.grad for where, leaf in wanted.items()}
                before |= {(*where, "grad"): None for where in wanted}
            if learning(returned):
                learner, gradients = [*learning(returned).values()][0], {}  # of (loss, ...): loss
                if not name.endswith("_step"):  # whose gradients have been used
                    weights = torch.rand(learner.shape, generator=exercises.seeded(0))
                    left = {where: leaf for where, leaf in wanted.items() if leaf.requires_grad}
                    gradients = dict.fromkeys(wanted) | dict(zip(left, torch.autograd.grad(
                        (learner * weights).sum(), [*left.values()], allow_unused=True)))
            returned = leaves(exercises.CANONICAL.get(name, lambda it: it)(result))
            loose = [where for where in learning(leaves(result))]
            found.append(Outcome(None, copied(returned), gradients, before, after, loose))
        except (Exception, SystemExit) as error:
            found.append(Outcome(error, {}, None, before, {}, []))
    return found


@functools.cache
def known(method, name, old="", new=""):
    """The outcomes of the script's own function, or of a usual mistake."""
    return outcomes(method, name, script(method, old, new))


def equal(one, other):
    """Are two leaves equal, but for rounding? NaN equals NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.allclose(
            one.double(), other.double(), 1e-4, 1e-6, equal_nan=True)
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-6 + 1e-4 * abs(other) or one != one and other != other
    comparable = isinstance(one, (str, bool, type(None)))
    return type(one) is type(other) and (one == other or not comparable)


def all_equal(one, other):
    return one.keys() == other.keys() and all(equal(one[where], other[where]) for where in one)


def alike(ours, theirs):
    """Do two functions do the same, but for gradients?"""
    return all(type(one.error) is type(other.error) and all_equal(one.returned, other.returned)
               and all_equal(one.after, other.after) for one, other in zip(ours, theirs))


# ----------------------------------------------------------------------------------- what is said
def kind(leaf):
    """What a leaf is, apart from its value."""
    if isinstance(leaf, torch.Tensor):
        return f"a tensor {tuple(leaf.shape)} of {leaf.dtype}"
    return "a number" if type(leaf) in (int, float) else f"a {type(leaf).__name__}"


def at(where):
    return ".".join(map(str, where))


def failure(error, file):
    """One line on an exception, with the last line of the answer that it passed."""
    if isinstance(error, SystemExit):
        return "ends the program"
    if isinstance(error, NotImplementedError) and not str(error):  # torch's say something
        return "not written yet"
    lines, trace = [], error.__traceback__
    while trace:
        lines += [trace.tb_lineno] * (trace.tb_frame.f_code.co_filename == file)
        trace = trace.tb_next
    where = f"line {lines[-1]}: {type(error).__name__}: " if lines else ""
    return where + " ".join(str(error).split())[:100]


def complaint(ours, right, names, file):
    """What is wrong with one outcome, in a line; "" if nothing. `names`: of the parameters."""
    if right.error and not isinstance(ours.error, type(right.error)):
        return f"does not raise the {type(right.error).__name__} of its docstring"
    if ours.error:
        return "" if right.error else failure(ours.error, file)
    returned, wanted = ours.returned, right.returned
    if [*returned.values()] == [None] != [*wanted.values()]:
        return "returns None: is a `return` missing?"
    for where, leaf in right.after.items():
        if where in ours.after and equal(right.before.get(where), leaf) and not equal(
                ours.after[where], leaf):
            return f"changes its argument {at((names[where[0]], *where[1:]))}"
    count, right_count = (len({where[:1] for where in found}) for found in (returned, wanted))
    if () in returned and () not in wanted:
        return f"returns {kind(returned[()])}, not {right_count} values"
    if count != right_count:
        return f"returns {count} value{'s' * (count != 1)}, not {right_count}"
    if odd := [*(where for where in wanted if where not in returned), *(
            where for where in returned if where not in wanted)]:
        return f"returns other names or numbers of parts: see {at(odd[0])!r}"
    for where, other in wanted.items():
        if kind(one := returned[where]) != kind(other) or (type(one), type(other)) == (float, int):
            return f"returns {kind(one)}, not {kind(other)}" if kind(one) != kind(other) else (
                "returns a float, not a whole number")
    if not all_equal(returned, wanted):
        return WRONG
    for where, leaf in right.after.items():
        if where not in ours.after or not equal(ours.after[where], leaf):
            place = at((names[where[0]], *where[1:]))
            return f"right value, but what it leaves of {place} is wrong"
    if (ours.gradients is None) != (right.gradients is None):
        return f"right value, but {'no' if right.gradients else 'a'} gradient: detached?"
    if right.gradients and right.learning[0] not in ours.learning:
        return f"right value, but what it returns at {at(right.learning[0])} has no gradient"
    for where, gradient in (right.gradients or {}).items():
        got = ours.gradients[where]
        argument = f"right value, but {at((names[where[0]], *where[1:]))} gets "
        if got is None and gradient is not None:
            return argument + "no gradient"
        if got is not None and gradient is None:
            return argument + "a gradient, and must not"
        if got is not None and not equal(got, gradient):
            return argument + "a wrong gradient"
    if more := [where for where in ours.learning if where not in right.learning]:
        return f"right value, but what it returns at {at(more[0])} is not detached"
    return ""


WRONG = "wrong, and none of the usual mistakes"


def row_of(method, name, ours, file):
    """{"function", "passed", "of", "says"} of the outcomes `ours`: how many are right, and a line.
    """
    names = [*inspect.signature(attrgetter(name)(script(method))).parameters]
    found = [complaint(*both, names, file) for both in zip(ours, known(method, name))]
    says = next(filter(None, found), "")
    if says:
        for label, change in exercises.MISTAKES.get(f"{method}.{name}", {}).items():
            if alike(ours, known(method, name, *change)):
                says = f"looks like: {label}"
    values = [said for said, one in zip(found, known(method, name)) if not one.error]
    passed = found.count("") if "" in values else 0  # who raises whatever comes has nothing right
    return {"function": name, "passed": passed, "of": len(found), "says": says}


def grade(method, name, tree, file):
    """The row of a function in an answer."""
    known(method, name)  # before any line of the answer
    try:
        module = answered(method, name, tree, file)
    except (Exception, SystemExit) as error:  # whatever its first lines do
        of = len(known(method, name))
        return {"function": name, "passed": 0, "of": of, "says": failure(error, file)}
    return row_of(method, name, outcomes(method, name, module), file)


# ----------------------------------------------------------------------------- pytest and processes
def work(method, file, names, pipe):
    """Grade in a process of its own, without a word and without the finished scripts."""
    faulthandler.disable()
    sys.breakpointhook, nothing = sys.__breakpointhook__, open(os.devnull, "r+")
    for number in range(3):
        os.dup2(nothing.fileno(), number)
    sys.stdin = sys.stdout = sys.stderr = nothing
    sys.modules.update(dict.fromkeys(exercise.METHODS))
    torch.set_num_threads(1)
    tree = ast.parse(Path(file).read_bytes())
    pipe.send("ready")
    sys.path.append(str(Path(file).resolve().parent))  # for helpers beside it
    for name in names:
        pipe.send(grade(method, name, tree, file))


def rows(method, file, names, start="fork" if sys.platform == "linux" else "spawn"):
    """Grade them one after the other; what hangs or ends its process costs its own row alone.

    A fork is cheap, and each has its own: so no function sees what another has left in torch.
    """
    context, names = multiprocessing.get_context(start), [*names]
    while names:
        pipe, theirs = context.Pipe(duplex=False)
        part = names[:1] if start == "fork" else names
        process = context.Process(target=work, args=(method, str(file), part, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            pipe.recv()  # "ready"
            says = f"no answer within {SECONDS} s"
            for _ in [*part]:
                if not pipe.poll(SECONDS):
                    break
                yield pipe.recv()
                del names[0]
            else:
                says = ""
        except EOFError:
            says = "ends the program"
        process.kill()
        process.join()
        if says:
            of = len(known(method, names[0]))
            yield {"function": names.pop(0), "passed": 0, "of": of, "says": says}


def start(config, file):
    """Grade `file` in place of the tests, as the script that its docstring or its name says."""
    try:
        if file.suffix != ".py":
            raise ValueError("a Python file is needed, with .py; save a notebook as a script")
        if b"\0" in file.read_bytes():
            raise ValueError("it is no UTF-8 text; PowerShell's > writes another, -o does not")
        texts = [ast.get_docstring(ast.parse(file.read_bytes())) or "", file.stem.replace("_", " ")]
        method = next(name for text in texts for name in exercise.METHODS
                      if re.search(rf"\b{name}\b", text.lower()))
    except StopIteration:
        raise pytest.UsageError(f"--script {file}: neither its docstring nor its name says which "
                                f"of {', '.join(exercise.METHODS)} it is") from None
    except (OSError, SyntaxError, ValueError) as error:
        if grades := config.getoption("--grade"):
            write(grades, [{"function": "", "passed": 0, "of": 1, "says": str(error)}])
        raise pytest.UsageError(f"--script {file}: {error}") from None
    source = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    for name, mistakes in exercises.MISTAKES.items():
        if odd := [old for old, _ in mistakes.values() if name.startswith(f"{method}.")
                   and old not in source]:
            raise pytest.UsageError(f"tests/mistakes.txt: [{name}]: {method}.py has no {odd[0]!r}")
    config.pluginmanager.register(Grades(method, file), "grades")
    config.args = [__file__]
    if config.option.tbstyle == "auto":
        config.option.tbstyle, config.option.reportchars = "no", ""


def write(file, rows):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(rows, indent=1) + "\n")


class Grades:
    """A plugin: a test for each function, and a table at the end."""

    def __init__(self, method, file):
        source = (ROOT / f"{method}.py").read_text(encoding="utf-8")
        self.method, self.file, self.rows = method, file, []
        self.equations = {name: it for name, (_, it) in exercise.equations(source).items()}

    def pytest_collection_finish(self, session):
        names = [item.callspec.params["name"] for item in session.items]
        self.graded = rows(self.method, self.file, names)

    def pytest_terminal_summary(self, terminalreporter, config):
        terminalreporter.section(f"{self.method}.py, function by function")
        for row in self.rows:
            terminalreporter.write_line(
                f"{row['function']:26} {self.equations[row['function']]:26} {row['passed']:2} of "
                f"{row['of']:2} calls  {row['says']}".rstrip())
        if file := config.getoption("--grade"):
            write(file, self.rows)


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", metafunc.config.pluginmanager.get_plugin("grades").equations)


def test_answer(name, request):
    grades = request.config.pluginmanager.get_plugin("grades")
    grades.rows.append(next(grades.graded))
    assert grades.rows[-1]["passed"] == grades.rows[-1]["of"], grades.rows[-1]["says"]
