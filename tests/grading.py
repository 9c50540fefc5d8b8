"""`python -m pytest --script=my_rco.py`: the tests of a script against a file in its place.

Only the tests of that method run. At the end a table: each function with an equation, how many of
the tests that call it passed, and what its values look like, beside those of the script and of the
usual mistakes in MISTAKES.
"""

import ast
import functools
import importlib.util
import inspect
import re
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import exercise  # noqa: E402


def load(method, file):
    """The script in `file` as the method's module."""
    spec = importlib.util.spec_from_file_location(method, file)
    module = sys.modules[method] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def changed(method, old="", new=""):
    """The method's own script as a module, with `new` wherever its text has `old`."""
    text, module = (ROOT / f"{method}.py").read_text(), ModuleType(f"changed_{method}")
    assert old in text, f"{method}.py has no {old!r}"
    exec(text.replace(old, new), vars(module))
    return module


def start(config, file):
    """Take `file` for the script of the method in its docstring, and its tests alone."""
    try:
        text = f"{ast.get_docstring(ast.parse(file.read_text()))} {file.stem}".replace("_", " ")
        method = next(name for name in exercise.METHODS if re.search(rf"\b{name}\b", text.lower()))
        config.pluginmanager.register(Grades(method, load(method, file)))
    except StopIteration:
        raise pytest.UsageError(f"--script {file}: neither its docstring nor its name says which "
                                f"of {', '.join(exercise.METHODS)} it is") from None
    except Exception as error:
        raise pytest.UsageError(f"--script {file}: {type(error).__name__}: {error}") from None
    if config.args == config.getini("testpaths"):
        config.args = [str(ROOT / "tests" / f"test_{method}.py")]
    if config.option.tbstyle == "auto":
        config.option.tbstyle, config.option.reportchars = "no", ""  # --tb short shows where


class Grades:
    """A plugin: the result of every test, and the functions that it calls."""

    def __init__(self, method, module):
        self.method, self.module, self.names, self.passed = method, module, {}, {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            text = inspect.getsource(item.function)
            helpers = vars(inspect.getmodule(item.function))
            for name in set(re.findall(r"\b(\w+)\(", text)):  # of the same file, one level
                if inspect.isfunction(helpers.get(name)):
                    text += inspect.getsource(helpers[name])
            imported = {name for name, value in helpers.items() if re.search(rf"\b{name}\b", text)
                        and getattr(value, "__module__", "") == self.method}
            self.names[item.nodeid] = imported | set(re.findall(rf"\b{self.method}\.(\w+)", text))
            if "run" in item.fixturenames:
                self.names[item.nodeid] |= {"whole runs"}

    def pytest_runtest_logreport(self, report):
        if not report.skipped:
            self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.passed

    def pytest_terminal_summary(self, terminalreporter):
        source = (ROOT / f"{self.method}.py").read_text()
        terminalreporter.section(f"{self.method}.py, function by function")
        for name, (_, numbers) in {**exercise.equations(source), "whole runs": (0, "-")}.items():
            own = {test: passed for test, passed in self.passed.items()
                   if name.split(".")[0] in self.names[test]}
            said = "" if all(own.values()) else looks_like(self.method, name, self.module) or (
                "see " + next(test.split("::")[1] for test in own if not own[test]))
            if own:
                terminalreporter.write_line(f"{name:26} {numbers:26} {sum(own.values()):3} of "
                                            f"{len(own):3} tests  {said}".rstrip())


def parts_of(result):
    """The tensors, numbers and words of what a function returns; of a dict its keys as well."""
    if isinstance(result, dict):
        result = sorted(result.items())
    if isinstance(result, (tuple, list)):
        return [part for one in result for part in parts_of(one)]
    return [result]


def values(function, arguments):
    """What it returns for all arguments, as floats and words; and which of them get a gradient."""
    found, graded = [], []
    for one in arguments():
        parts = parts_of(function(*one))
        found += [x for part in parts for x in (part.detach().double().flatten().tolist() if
                                                isinstance(part, torch.Tensor) else [part])]
        loss = sum(part.sum() for part in parts if getattr(part, "requires_grad", False))
        if isinstance(loss, torch.Tensor):
            loss.backward()
        graded += [part.grad is not None for part in parts_of(one)
                   if isinstance(part, torch.Tensor)]
    return found, graded


def equal(one, other):
    return len(one) == len(other) and all(
        abs(a - b) <= 1e-4 * (1 + abs(b)) if {type(a), type(b)} <= {int, float} else a == b
        for a, b in zip(one, other))


def looks_like(method, name, module):
    """One line on a function that failed a test, "" where nothing is known of it."""
    function = module
    for word in name.split("."):
        function = getattr(function, word, None)
    if "NotImplementedError" in getattr(getattr(function, "__code__", None), "co_names", ()):
        return "not written yet"
    if name not in MISTAKES[method]:
        return ""
    arguments, wrong = MISTAKES[method][name]
    try:
        ours, graded = values(function, arguments)
    except NotImplementedError:
        return "calls one that is not written yet"
    except Exception as error:  # whatever an unfinished function raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    truth, should = values(getattr(changed(method), name), arguments)
    if equal(ours, truth):
        return ("right by itself; its tests call others too" if graded == should else
                "its value is right, but a gradient goes where none should, or is missing")
    for label, change in wrong.items():
        if equal(ours, values(getattr(changed(method, *change), name), arguments)[0]):
            return f"looks like: {label}"
    return "wrong, and none of the usual mistakes"


# ------------------------------------------------------------------------------- the usual mistakes
def z(*seeds, shape=(6, 5)):
    """Logits, or maps, or whatever has this shape: for each seed another tensor."""
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            for seed in seeds]


Y = torch.tensor([0, 4, 1, 1, 3, 2])
MAPS = (2, 5, 3, 4)
WEIGHTS = namedtuple("Weights", "label peer anchor")(0.9, 0.5, 2.0)  # as trikd.Weights
ROUTES = [(kl, current, 0.8) for kl, current in (  # H_1 .. H_N, the current anchor, delta
    ([1.0, 1.2, 2.5, 3.0, 1.0], 1), ([1.0, 3.0, 3.1, 3.2, 1.0], 1), ([1.0, 2.0, 2.1, 4.0, 9.0], 2),
    ([4.0, 5.0, 6.0, 9.0, 1.0], 1), ([1.0, 1.1, 1.2, 1.3, 9.0], 1))]
# A mistake is a place in the script's text, and what stands there in its stead
NO_TEMPERATURE = (" / temperature, dim", ", dim")
KL = {
    "the two distributions of the KL are swapped":
        ("F.kl_div(", "(lambda own, target, **how: F.kl_div(target, own, **how))("),
    "the KL is divided by B C, not by B": ("F.kl_div(", "1 / 5 * F.kl_div("),  # C = 5, below
    "the KL is summed over the batch, not its mean": ('"batchmean"', '"sum"'),
    "the temperature is left out of the KL": NO_TEMPERATURE}
PLAIN_KL = {
    **KL, "the KL times tau^2, which is not its part": ("F.kl_div(", "temperature**2 * F.kl_div(")}
KD = {
    "without T^2": ("weight * temperature**2 * kl", "weight * kl"),
    "T in place of T^2": ("temperature**2 * kl", "temperature * kl"),
    "without the weight": ("ce + weight * ", "ce + "),
    "(1 - weight) CE, as Hinton et al. have it": ("return ce", "return (1 - weight) * ce"),
    "without the cross-entropy": ("return ce + ", "return "),
    "the loss alone, without CE and KL": ("* kl, ce, kl", "* kl"),
    **KL}
# method -> function -> (its arguments, drawn anew by every call; {mistake: (old, new)}). The values
# of a list of argument tuples are compared together.
MISTAKES = {
    "rco": {
        "softened_kl": (lambda: [(*z(0, 1), 3.0)], PLAIN_KL),
        "kd_loss": (lambda: [(*z(0, 1), Y, 0.7, 3.0)], KD),
        "hint_loss": (lambda: [tuple(z(0, 1))], {
            "divided by D, as F.mse_loss does": (".square().sum(1).mean()", ".square().mean()"),
            "F.mse_loss": ("0.5 * mimic_loss(student_feature", "F.mse_loss(student_feature"),
            "without 1/2": ("return 0.5 * mimic_loss", "return mimic_loss"),
            "the norm is not squared": (".square().sum(1).mean()", ".norm(dim=1).mean()")}),
        "mimic_loss": (lambda: [tuple(z(0, 1))], {
            "divided by D, as F.mse_loss does": (".square().sum(1).mean()", ".square().mean()"),
            "with the 1/2 of eq. (3)": ("return (student_emb", "return 0.5 * (student_emb"),
            "the norm is not squared": (".square().sum(1).mean()", ".norm(dim=1).mean()")}),
        "equal_epoch_anchors": (lambda: [(25, 4), (24, 7)], {
            "rounded, not floored": ("k * E // N for", "round(k * E / N) for"),
            "k floor(E / N): the last anchor is not E": ("k * E // N for", "k * (E // N) for"),
            "k counts from 0": ("in range(1, N + 1)", "in range(N)")}),
        "one_stage_anchors": (lambda: [(23, 5), (10, 4)], {
            "the start of the segment, not its end": ("gap + 1) * gap)", "gap) * gap)"),
            "epochs counted from 1": ("(e // gap + 1)", "((e - 1) // gap + 1)"),
            "beyond the teacher's last epoch": ("[min(E, (e", "[((e"),
            "segments of floor(E / N) epochs": ("math.ceil(epochs / count)", "epochs // count")}),
        "next_anchor": (lambda: ROUTES, {
            "the candidate that crosses, not the one before it": ("max(j - 1, i + 1)", "j"),
            "without the guard: it can stay where it is": ("max(j - 1, i + 1)", "j - 1"),
            "H_j - H_i is not divided by H_i, or by H_1": (" / kl[i - 1]", ""),
            "candidate N is tested as well": ("range(i + 1, N)", "range(i + 1, N + 1)")}),
    },
    "switokd": {
        "label_distance": (lambda: [(*z(0), Y, 2.0)], {
            "the mean over the classes, not their sum": ("(p - Y).abs().sum(1)", "(p - Y).abs()"),
            "summed over the batch": ("(p - Y).abs().sum(1).mean()", "(p - Y).abs().sum()"),
            "without the temperature": NO_TEMPERATURE,
            "squared": ("(p - Y).abs()", "(p - Y).square()"),
            "half of it, 1 - p_y": ("return (p - Y)", "return 0.5 * (p - Y)")}),
        "distillation_gap": (lambda: [(*z(0, 1), 2.0)], {
            "the mean over the classes, not their sum": ("p_t).abs().sum(1)", "p_t).abs()"),
            "without the temperature": NO_TEMPERATURE,
            "without the absolute value": ("(p_s - p_t).abs()", "(p_s - p_t)"),
            "of the logits": ("(p_s - p_t)", "(student_logits - teacher_logits)"),
            "a KL": ("(p_s - p_t).abs()", "(p_t * (p_t / p_s).log())")}),
        "switching_threshold": (lambda: [(torch.tensor(1.5), torch.tensor(0.4))], {
            "exp(+t / (s + t))": ("torch.exp(-t / (s + t))", "torch.exp(t / (s + t))"),
            "exp(-t / s)": ("torch.exp(-t / (s + t))", "torch.exp(-t / s)"),
            "exp(-s / (s + t))": ("torch.exp(-t / (s + t))", "torch.exp(-s / (s + t))"),
            "delta = eps s - t": ("return s - epsilon * t", "return epsilon * s - t"),
            "delta and eps are swapped": ("s - epsilon * t, epsilon", "epsilon, s - epsilon * t")}),
        "choose_mode": (lambda: [(1.0, 0.5, 1.0, 0.5), (1.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 0.5),
                                 (0.1, 0.5, 1.0, 0.5)], {
            "without the guard t < s": (" and teacher_distance < student_distance", ""),
            "equality counts as expert": ("gap > threshold", "gap >= threshold"),
            "the guard is the other way round": ("_distance < ", "_distance > "),
            "the modes are swapped": ("if expert else", "if not expert else")}),
        "kl_to": (lambda: [(*z(0, 1), 2.0)], PLAIN_KL),
        "online_loss": (lambda: [(*z(0), z(1, 2), Y, 2.0)], {
            "the mean over the peers, not their sum":
                ("loss + kl_to(", "loss + 1 / len(peer_logits) * kl_to("),
            "without the cross-entropy": ("loss = F.cross_entropy(own_logits, labels)", "loss = 0"),
            "the cross-entropy has the temperature too":
                ("F.cross_entropy(own_logits,", "F.cross_entropy(own_logits / temperature,"),
            **PLAIN_KL}),
    },
    "trikd": {
        "kl_to": (lambda: [(*z(0, 1), 2.0)], {
            "without tau^2": ("return temperature**2 * ", "return "),
            "tau in place of tau^2": ("return temperature**2", "return temperature"),
            "the temperature is left out, and so is tau^2":
                ("same_shape(target_logits", "temperature = 1\n    same_shape(target_logits"),
            **KL}),
        "triplet_loss": (lambda: [(*z(0, 1, 2), Y, WEIGHTS, 2.0)], {
            "the weights of peer and anchor are swapped": ('    terms = {"ce"',
                '    weights = type(weights)(weights.label, *weights[:0:-1])\n    terms = {"ce"'),
            "without the anchor": ('loss + weights.anchor * terms["anchor"]', "loss"),
            "without the peer": ('loss + weights.peer * terms["peer"]', "loss"),
            "the cross-entropy has the temperature too":
                ("F.cross_entropy(logits,", "F.cross_entropy(logits / temperature,"),
            "the loss of the other network": ('    terms = {"ce"',
                '    logits, peer_logits = peer_logits, logits\n    terms = {"ce"'),
            "the terms have their weights": ("return loss, terms",
                "return loss, {name: w * terms[name] for name, w in zip(terms, weights)}"),
            **KL}),
        "label_shares": (lambda: [(WEIGHTS, WEIGHTS._replace(label=0.3))], {
            "l_T and l_S are swapped":
                ("T, S = teacher_weights", "S, T = teacher_weights"),
            "lambda / (lambda + zeta), which holds for equal triples alone":
                ("if D == 0:\n        return None, None",
                 "return T.label / (T.label + T.anchor), S.label / (S.label + S.anchor)")}),
    },
    "letkd": {
        "word_targets": (lambda: [(*z(0, shape=MAPS), *z(1, shape=(7, 5)), 0.6)], {
            "the sign: the farthest word wins": ("(tau * closeness", "(-tau * closeness"),
            "the distance is not squared":
                ("tau * closeness", "-tau * (z.square().sum(1, keepdim=True) - closeness).sqrt()"),
            "without tau": ("tau * closeness", "closeness"),
            "divided by tau": ("tau * closeness", "closeness / tau"),
            "inner products, without ||rho||^2":
                ("tau * closeness", "2 * tau * at_every_location(features, words)")}),
        "template_loss": (lambda: [(*z(0, shape=MAPS), z(1, shape=MAPS)[0].softmax(1).detach())], {
            "divided by B alone, as batchmean does on maps":
                ("return F.kl_div(", "return scores[0, 0].numel() * F.kl_div("),
            "divided by K as well": KL["the KL is divided by B C, not by B"],
            "the two distributions are swapped": ("(log_p_S, p_T", "(p_T.log(), log_p_S.exp()"),
            "a cross-entropy: the entropy of p_T is not subtracted":
                ("return F.kl_div(", "return -(p_T * log_p_S).sum(1).mean() + 0 * F.kl_div(")}),
    },
    "tst": {
        "relaxed_bernoulli": (lambda: [
            (*z(0, shape=(14,)), 0.5, torch.Generator().manual_seed(3))], {
            "the probability itself as the logit": ("((logits + u", "((logits.sigmoid() + u"),
            "without the temperature": ("(1 - u).log()) / temperature", "(1 - u).log())"),
            "the noise alone has the temperature": ("(logits + u.log()", "logits + (u.log()"),
            "the sign of the noise": ("+ u.log() - (1 - u)", "- u.log() + (1 - u)"),
            "hard gates, without a gradient": ("torch.sigmoid((logits + u", "0 < ((logits + u")}),
        "augmentation_loss": (lambda: [(*z(0, 1), Y)], {
            "student and teacher are swapped": ("same_shape(student_logits, teacher_logits)",
                "teacher_logits, student_logits = student_logits, teacher_logits"),
            "the student's cross-entropy is added: both shall know":
                ("-torch.log(1 - p_S + 1e-8).mean()", "F.cross_entropy(student_logits, labels)"),
            "eq. (14) in place of (13)": ('="non_saturating"', '="negative_ce"')}),
        "distillation_loss": (lambda: [(*z(0, 1), Y, 0.7, 3.0)], KD),
    },
}
