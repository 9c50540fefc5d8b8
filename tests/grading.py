"""`python -m pytest --script=my_rco.py`: the tests of a script against a file in its place.

Only the tests of that method run. At the end a table: each function with an equation, how many of
the tests that call it passed, and what its values look like, beside those of the script and of the
usual mistakes in MISTAKES.
"""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import exercise  # noqa: E402


def load(method, file, name=None):
    """A script from `file` as a module of that name, or of the method's."""
    spec = importlib.util.spec_from_file_location(name or method, file)
    module = sys.modules[name or method] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(config, file):
    """Take `file` for the script of the method in its docstring, and its tests alone."""
    try:
        text = (ast.get_docstring(ast.parse(file.read_text())) or "") + " " + file.stem
        method = next(name for name in exercise.METHODS if re.search(rf"\b{name}\b", re.sub(
            "_", " ", text).lower()))
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
            before = self.passed.get(report.nodeid, True)
            self.passed[report.nodeid] = before and report.passed

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


def values(function, arguments):
    """What it returns for all arguments, as floats and words; and which of them get a gradient."""
    found, graded = [], []
    for one in arguments():
        result = function(*one)
        parts = result if isinstance(result, (tuple, list)) else [result]
        found += [x for part in parts for x in (part.detach().double().flatten().tolist() if
                                                isinstance(part, torch.Tensor) else [part])]
        loss = sum(part.sum() for part in parts if getattr(part, "requires_grad", False))
        if isinstance(loss, torch.Tensor):
            loss.backward()
        graded += [tensor.grad is not None for part in one for tensor in (
            part if isinstance(part, list) else [part]) if isinstance(tensor, torch.Tensor)]
    return found, graded


def equal(one, other):
    return len(one) == len(other) and all(
        a == b if isinstance(a, str) or isinstance(b, str) else abs(a - b) <= 1e-4 * (1 + abs(b))
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
    right = load(method, ROOT / f"{method}.py", f"right_{method}")
    truth, should = values(getattr(right, name), arguments)
    if equal(ours, truth):
        return ("right by itself; its tests call others too" if graded == should else
                "its value is right, but a gradient goes where none should, or is missing")
    for label, mistake in wrong:
        if equal(ours, values(mistake, arguments)[0]):
            return f"looks like: {label}"
    return "wrong, and none of the usual mistakes"


# ------------------------------------------------------------------------------- the usual mistakes
def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def softened(p, q, tau=1.0):
    """KL(p || q) of logits, summed over classes, the mean over the batch."""
    p, q = F.log_softmax(p / tau, 1), F.log_softmax(q / tau, 1)
    return (p.exp() * (p - q)).sum(1).mean()


def z(*seeds, C=5):
    return [logits(6, C, seed=seed) for seed in seeds]


Y = torch.tensor([0, 4, 1, 1, 3, 2])
CE = F.cross_entropy


def p(z, tau=1.0):
    return F.softmax(z / tau, 1)


def distances(z, y, tau=1.0):
    return (p(z, tau) - F.one_hot(y, z.shape[1])).abs()


def maps(*seeds):
    return [logits(2, 5, 3, 4, seed=seed) for seed in seeds]


def closeness(z, rho, power=2):
    return -(z[:, None] - rho[None, :, :, None, None]).square().sum(2) ** (power / 2)


def map_kl(a, p_T):
    return (p_T * (p_T.log() - F.log_softmax(a, 1))).sum()


def triplet(w, z, peer, anchor, y, tau, ce_tau=1.0):
    """lambda CE + pi tau^2 KL + zeta tau^2 KL, of the learner's logits z."""
    return (w[0] * CE(z / ce_tau, y) + w[1] * tau**2 * softened(peer, z, tau)
            + w[2] * tau**2 * softened(anchor, z, tau))


class Weights(NamedTuple):  # as trikd.Weights
    label: float = 0.9
    peer: float = 0.5
    anchor: float = 2.0


WEIGHTS = Weights()
TRIPLET = [  # of eqs. (2) and (3): learner, peer, anchor, y, weights, tau
    ("the weights of peer and anchor are swapped",
     lambda z, b, c, y, w, tau: triplet((w[0], w[2], w[1]), z, b, c, y, tau)),
    ("without the anchor", lambda z, b, c, y, w, tau: triplet((*w[:2], 0), z, b, c, y, tau)),
    ("without the peer", lambda z, b, c, y, w, tau: triplet((w[0], 0, w[2]), z, b, c, y, tau)),
    ("the cross-entropy has the temperature too",
     lambda z, b, c, y, w, tau: triplet(w, z, b, c, y, tau, tau)),
    ("the KLs are the other way round", lambda z, b, c, y, w, tau: w[0] * CE(z, y) + tau**2 * (
        w[1] * softened(z, b, tau) + w[2] * softened(z, c, tau))),
    ("the loss of the other network",
     lambda z, b, c, y, w, tau: triplet(w, b, z, c, y, tau)),
]
KL = [("the two distributions are swapped", lambda s, t, tau: softened(s, t, tau)),
      ("divided by B C, not by B", lambda s, t, tau: softened(t, s, tau) / 5),
      ("summed over the batch, not its mean", lambda s, t, tau: softened(t, s, tau) * 6),
      ("the temperature is left out", lambda s, t, tau: softened(t, s)),
      ("times T^2, which is not its part", lambda s, t, tau: tau**2 * softened(t, s, tau))]
ROUTES = [  # H_1 .. H_N, the current anchor, delta
    ([1.0, 1.2, 2.5, 3.0, 1.0], 1, 0.8), ([1.0, 3.0, 3.1, 3.2, 1.0], 1, 0.8),
    ([1.0, 2.0, 2.1, 4.0, 9.0], 2, 0.8), ([4.0, 5.0, 6.0, 9.0, 1.0], 1, 0.8),
    ([1.0, 1.1, 1.2, 1.3, 9.0], 1, 0.8)]
# method -> function -> (its arguments, drawn anew by every call; {mistake: what it computes}). The
# values of a list of argument tuples are compared together.
MISTAKES = {
    "rco": {
        "softened_kl": (lambda: [(*z(0, 1), 3.0)], KL),
        "kd_loss": (lambda: [(*z(0, 1), Y, 0.7, 3.0)], [
            ("without T^2", lambda s, t, y, w, T: CE(s, y) + w * softened(t, s, T)),
            ("T in place of T^2", lambda s, t, y, w, T: CE(s, y) + w * T * softened(t, s, T)),
            ("the KL's two distributions are swapped",
             lambda s, t, y, w, T: CE(s, y) + w * T**2 * softened(s, t, T)),
            ("without lambda", lambda s, t, y, w, T: CE(s, y) + T**2 * softened(t, s, T)),
            ("(1 - lambda) CE, as Hinton et al. have it",
             lambda s, t, y, w, T: (1 - w) * CE(s, y) + w * T**2 * softened(t, s, T)),
            ("without the cross-entropy", lambda s, t, y, w, T: w * T**2 * softened(t, s, T)),
            ("the KL is divided by B C, not by B",
             lambda s, t, y, w, T: CE(s, y) + w * T**2 * softened(t, s, T) / 5)]),
        "hint_loss": (lambda: [tuple(z(0, 1))], [
            ("divided by D, as F.mse_loss does", lambda s, t: (s - t).square().mean() / 2),
            ("F.mse_loss", lambda s, t: (s - t).square().mean()),
            ("without 1/2", lambda s, t: (s - t).square().sum(1).mean()),
            ("the norm is not squared", lambda s, t: (s - t).norm(dim=1).mean() / 2)]),
        "mimic_loss": (lambda: [tuple(z(0, 1))], [
            ("divided by D, as F.mse_loss does", lambda s, t: (s - t).square().mean()),
            ("with the 1/2 of eq. (3)", lambda s, t: (s - t).square().sum(1).mean() / 2),
            ("the norm is not squared", lambda s, t: (s - t).norm(dim=1).mean())]),
        "equal_epoch_anchors": (lambda: [(25, 4), (24, 7)], [
            ("rounded, not floored", lambda E, N: [round(k * E / N) for k in range(1, N + 1)]),
            ("k floor(E / N): the last anchor is not E",
             lambda E, N: [k * (E // N) for k in range(1, N + 1)]),
            ("k counts from 0", lambda E, N: [k * E // N for k in range(N)])]),
        "one_stage_anchor": (lambda: [(7, 5, 23), (10, 5, 23), (22, 5, 23)], [
            ("the start of the segment, not its end", lambda e, gap, E: e // gap * gap),
            ("epochs counted from 1", lambda e, gap, E: min(E, ((e - 1) // gap + 1) * gap)),
            ("beyond the teacher's last epoch", lambda e, gap, E: (e // gap + 1) * gap)]),
        "next_anchor": (lambda: ROUTES, [
            ("the candidate that crosses, not the one before it", lambda H, i, d: next(
                (j for j in range(i + 1, len(H)) if H[j - 1] / H[i - 1] - 1 > d), len(H))),
            ("without the guard: it can stay where it is", lambda H, i, d: next(
                (j - 1 for j in range(i + 1, len(H)) if H[j - 1] / H[i - 1] - 1 > d), len(H))),
            ("H_j - H_i is not divided by H_i, or by H_1", lambda H, i, d: next(
                (max(j - 1, i + 1) for j in range(i + 1, len(H)) if H[j - 1] - H[i - 1] > d),
                len(H))),
            ("candidate N is tested as well", lambda H, i, d: next(
                (max(j - 1, i + 1) for j in range(i + 1, len(H) + 1)
                 if H[j - 1] / H[i - 1] - 1 > d), len(H)))]),
    },
    "switokd": {
        "label_distance": (lambda: [(*z(0), Y, 2.0)], [
            ("the mean over the classes, not their sum", lambda z, y, t: distances(z, y, t).mean()),
            ("summed over the batch", lambda z, y, t: distances(z, y, t).sum()),
            ("without the temperature", lambda z, y, t: distances(z, y).sum(1).mean()),
            ("squared", lambda z, y, t: distances(z, y, t).square().sum(1).mean()),
            ("half of it, 1 - p_y", lambda z, y, t: distances(z, y, t).sum(1).mean() / 2)]),
        "distillation_gap": (lambda: [(*z(0, 1), 2.0)], [
            ("the mean over the classes, not their sum",
             lambda s, t, tau: (p(s, tau) - p(t, tau)).abs().mean()),
            ("without the temperature", lambda s, t, tau: (p(s) - p(t)).abs().sum(1).mean()),
            ("without the absolute value", lambda s, t, tau: (p(s, tau) - p(t, tau)).sum(1).mean()),
            ("of the logits", lambda s, t, tau: (s - t).abs().sum(1).mean()),
            ("a KL", lambda s, t, tau: softened(t, s, tau))]),
        "switching_threshold": (lambda: [(torch.tensor(1.5), torch.tensor(0.4))], [
            ("exp(+t / (s + t))", lambda s, t: (s - (t / (s + t)).exp() * t, (t / (s + t)).exp())),
            ("exp(-t / s)", lambda s, t: (s - (-t / s).exp() * t, (-t / s).exp())),
            ("exp(-s / (s + t))", lambda s, t: (s - (-s / (s + t)).exp() * t,
                                                (-s / (s + t)).exp())),
            ("delta = eps s - t", lambda s, t: ((-t / (s + t)).exp() * s - t,
                                                (-t / (s + t)).exp())),
            ("delta and eps are swapped", lambda s, t: ((-t / (s + t)).exp(),
                                                        s - (-t / (s + t)).exp() * t))]),
        "choose_mode": (lambda: [(1.0, 0.5, 1.0, 0.5), (1.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 0.5),
                                 (0.1, 0.5, 1.0, 0.5)], [
            ("without the guard t < s", lambda G, d, s, t: "expert" if G > d else "learning"),
            ("equality counts as expert",
             lambda G, d, s, t: "expert" if G >= d and t < s else "learning"),
            ("the guard is the other way round",
             lambda G, d, s, t: "expert" if G > d and t > s else "learning"),
            ("the modes are swapped",
             lambda G, d, s, t: "learning" if G > d and t < s else "expert")]),
        "kl_to": (lambda: [(*z(0, 1), 2.0)], [
            (label, lambda peer, own, tau, wrong=wrong: wrong(own, peer, tau))
            for label, wrong in KL]),
        "online_loss": (lambda: [(*z(0), z(1, 2), Y, 2.0)], [
            ("the mean over the peers, not their sum", lambda z, peers, y, tau: CE(z, y) + sum(
                softened(peer, z, tau) for peer in peers) / len(peers)),
            ("without the cross-entropy",
             lambda z, peers, y, tau: sum(softened(peer, z, tau) for peer in peers)),
            ("times tau^2", lambda z, peers, y, tau: CE(z, y) + tau**2 * sum(
                softened(peer, z, tau) for peer in peers)),
            ("the KLs are the other way round", lambda z, peers, y, tau: CE(z, y) + sum(
                softened(z, peer, tau) for peer in peers)),
            ("the cross-entropy has the temperature too",
             lambda z, peers, y, tau: CE(z / tau, y) + sum(
                 softened(peer, z, tau) for peer in peers))]),
    },
    "trikd": {
        "kl_to": (lambda: [(*z(0, 1), 2.0)], [
            ("without tau^2", lambda t, z, tau: softened(t, z, tau)),
            ("tau in place of tau^2", lambda t, z, tau: tau * softened(t, z, tau)),
            ("the two distributions are swapped", lambda t, z, tau: tau**2 * softened(z, t, tau)),
            ("divided by B C, not by B", lambda t, z, tau: tau**2 * softened(t, z, tau) / 5),
            ("the temperature is left out", lambda t, z, tau: softened(t, z))]),
        "teacher_loss": (lambda: [(*z(0, 1, 2), Y, WEIGHTS, 2.0)], TRIPLET),
        "student_loss": (lambda: [(*z(0, 1, 2), Y, WEIGHTS, 2.0)], TRIPLET),
        "label_shares": (lambda: [(WEIGHTS, WEIGHTS._replace(label=0.3))], [
            ("l_T and l_S are swapped", lambda T, S: (
                (S[0] * sum(T) + S[1] * T[0]) / (sum(T) * sum(S) - T[1] * S[1]),
                (T[0] * sum(S) + T[1] * S[0]) / (sum(T) * sum(S) - T[1] * S[1]))),
            ("lambda / (lambda + zeta), which holds for equal triples alone",
             lambda T, S: (T[0] / (T[0] + T[2]), S[0] / (S[0] + S[2])))]),
    },
    "letkd": {
        "word_targets": (lambda: [(*maps(0), logits(7, 5, seed=1), 0.6)], [
            ("the sign: the farthest word wins",
             lambda z, rho, tau: F.softmax(-tau * closeness(z, rho), 1)),
            ("the distance is not squared",
             lambda z, rho, tau: F.softmax(tau * closeness(z, rho, 1), 1)),
            ("without tau", lambda z, rho, tau: F.softmax(closeness(z, rho), 1)),
            ("divided by tau", lambda z, rho, tau: F.softmax(closeness(z, rho) / tau, 1)),
            ("inner products, without ||rho||^2", lambda z, rho, tau: F.softmax(
                2 * tau * torch.einsum("bdhw,kd->bkhw", z, rho), 1))]),
        "template_loss": (lambda: [(*maps(0), F.softmax(maps(1)[0].detach(), 1))], [
            ("divided by B alone, as batchmean does on maps", lambda a, q: map_kl(a, q) / 2),
            ("divided by K as well", lambda a, q: map_kl(a, q) / (2 * 5 * 3 * 4)),
            ("the two distributions are swapped", lambda a, q: softened(
                a.movedim(1, 3).flatten(0, 2), q.log().movedim(1, 3).flatten(0, 2))),
            ("a cross-entropy: the entropy of p_T is not subtracted", lambda a, q: -(
                q * F.log_softmax(a, 1)).sum() / (2 * 3 * 4))]),
    },
    "tst": {
        "relaxed_bernoulli": (lambda: [(logits(14), 0.5, torch.Generator().manual_seed(3))], [
            ("the probability itself as the logit", lambda theta, tau, g: torch.sigmoid((
                torch.sigmoid(theta) + noise(theta, g)) / tau)),
            ("without the temperature", lambda theta, tau, g: torch.sigmoid(
                theta + noise(theta, g))),
            ("the noise alone has the temperature", lambda theta, tau, g: torch.sigmoid(
                theta + noise(theta, g) / tau)),
            ("the sign of the noise", lambda theta, tau, g: torch.sigmoid(
                (theta - noise(theta, g)) / tau)),
            ("hard gates, without a gradient",
             lambda theta, tau, g: (theta + noise(theta, g) > 0).float().detach())]),
        "augmentation_loss": (lambda: [(*z(0, 1), Y)], [
            ("student and teacher are swapped", lambda t, s, y: terms(CE(s, y), away(t, y))),
            ("the student's cross-entropy is added: both shall know", lambda t, s, y: terms(
                CE(t, y), CE(s, y))),
            ("eq. (14) in place of (13)", lambda t, s, y: terms(CE(t, y), -CE(s, y)))]),
        "distillation_loss": (lambda: [(*z(0, 1), Y, 0.7, 3.0)], [
            ("without tau^2", lambda s, t, y, w, T: CE(s, y) + w * softened(t, s, T)),
            ("the KL's two distributions are swapped",
             lambda s, t, y, w, T: CE(s, y) + w * T**2 * softened(s, t, T)),
            ("without w", lambda s, t, y, w, T: CE(s, y) + T**2 * softened(t, s, T)),
            ("without the cross-entropy", lambda s, t, y, w, T: w * T**2 * softened(t, s, T)),
            ("the KL is divided by B C, not by B",
             lambda s, t, y, w, T: CE(s, y) + w * T**2 * softened(t, s, T) / 5)]),
    },
}


def noise(theta, generator):
    u = torch.rand(theta.shape, generator=generator)
    return u.log() - (1 - u).log()


def away(z, y):
    return -(1 - p(z).gather(1, y[:, None]) + 1e-8).log().mean()


def terms(teacher, student):
    return teacher + student, teacher, student
