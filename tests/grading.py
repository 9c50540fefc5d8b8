"""`python -m pytest --script=my_rco.py`: the tests of a script against a file in its place.

Only the tests of that method run. At the end a table: each function with an equation, how many of
the tests that call it passed, and what its values look like, beside those of the script and of the
usual mistakes in MISTAKES.
"""

import ast
import importlib.util
import inspect
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

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


def z(*seeds, shape=(6, 5)):
    return [logits(*shape, seed=seed) for seed in seeds]


Y = torch.tensor([0, 4, 1, 1, 3, 2])
CE = F.cross_entropy
MAPS = (2, 5, 3, 4)


def p(z, tau=1.0):
    return F.softmax(z / tau, 1)


def distances(z, y, tau=1.0):
    return (p(z, tau) - F.one_hot(y, z.shape[1])).abs()


def closeness(z, rho, power=2):
    return -(z[:, None] - rho[None, :, :, None, None]).square().sum(2) ** (power / 2)


def segments(anchor):
    """Eq. (8) with another `anchor`, of the epoch e, the segment's length and E."""
    return lambda E, N: [anchor(e, math.ceil(E / N), E) for e in range(E)]


def rows(maps):
    return maps.movedim(1, 3).flatten(0, 2)


def noise(theta, generator):
    u = torch.rand(theta.shape, generator=generator)
    return u.log() - (1 - u).log()


def terms(teacher, student):
    return teacher + student, teacher, student


Weights = namedtuple("Weights", "label peer anchor")  # as trikd.Weights
WEIGHTS = Weights(0.9, 0.5, 2.0)


def triplet(weights=lambda w: w, ce=lambda z, y, tau: CE(z, y), kl=softened):
    """(loss, terms) of eqs. (2), (3), with other `weights`, another `ce`, another `kl`."""
    def wrong(z, peer, anchor, y, w, tau):
        terms = {"ce": ce(z, y, tau), "peer": tau**2 * kl(peer, z, tau),
                 "anchor": tau**2 * kl(anchor, z, tau)}
        return sum(w * term for w, term in zip(weights(w), terms.values())), terms
    return wrong


def distilled(loss=lambda ce, kl, w, T: ce + w * T**2 * kl, kl=softened):
    """(loss, CE, KL), with another `loss` of CE, KL, w, T, or another `kl` of teacher, student, T.
    """
    def wrong(s, t, y, w, T):
        return loss(CE(s, y), kl(t, s, T), w, T), CE(s, y), kl(t, s, T)
    return wrong


KD = [  # of student, teacher, y, w, T
    ("without T^2", distilled(lambda ce, kl, w, T: ce + w * kl)),
    ("T in place of T^2", distilled(lambda ce, kl, w, T: ce + w * T * kl)),
    ("without the weight", distilled(lambda ce, kl, w, T: ce + T**2 * kl)),
    ("(1 - weight) CE, as Hinton et al. have it",
     distilled(lambda ce, kl, w, T: (1 - w) * ce + w * T**2 * kl)),
    ("without the cross-entropy", distilled(lambda ce, kl, w, T: w * T**2 * kl)),
    ("the KL's two distributions are swapped", distilled(kl=lambda t, s, T: softened(s, t, T))),
    ("the KL is divided by B C, not by B", distilled(kl=lambda t, s, T: softened(t, s, T) / 5)),
    ("the loss alone, without CE and KL", lambda *given: distilled()(*given)[0])]
KL = [  # of the target's and the learner's logits, tau
    ("the two distributions are swapped", lambda t, z, tau: softened(z, t, tau)),
    ("divided by B C, not by B", lambda t, z, tau: softened(t, z, tau) / 5),
    ("summed over the batch, not its mean", lambda t, z, tau: softened(t, z, tau) * 6),
    ("the temperature is left out", lambda t, z, tau: softened(t, z)),
    ("times tau^2, which is not its part", lambda t, z, tau: tau**2 * softened(t, z, tau))]
ROUTES = [  # H_1 .. H_N, the current anchor, delta
    ([1.0, 1.2, 2.5, 3.0, 1.0], 1, 0.8), ([1.0, 3.0, 3.1, 3.2, 1.0], 1, 0.8),
    ([1.0, 2.0, 2.1, 4.0, 9.0], 2, 0.8), ([4.0, 5.0, 6.0, 9.0, 1.0], 1, 0.8),
    ([1.0, 1.1, 1.2, 1.3, 9.0], 1, 0.8)]
# method -> function -> (its arguments, drawn anew by every call; {mistake: what it computes}). The
# values of a list of argument tuples are compared together.
MISTAKES = {
    "rco": {
        "softened_kl": (lambda: [(*z(0, 1), 3.0)], [
            (label, lambda s, t, T, wrong=wrong: wrong(t, s, T)) for label, wrong in KL]),
        "kd_loss": (lambda: [(*z(0, 1), Y, 0.7, 3.0)], KD),
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
        "one_stage_anchors": (lambda: [(23, 5), (10, 4)], [
            ("the start of the segment, not its end", segments(lambda e, gap, E: e // gap * gap)),
            ("epochs counted from 1",
             segments(lambda e, gap, E: min(E, ((e - 1) // gap + 1) * gap))),
            ("beyond the teacher's last epoch", segments(lambda e, gap, E: (e // gap + 1) * gap)),
            ("segments of floor(E / N) epochs",
             lambda E, N: [min(E, (e // (E // N) + 1) * (E // N)) for e in range(E)])]),
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
        "kl_to": (lambda: [(*z(0, 1), 2.0)], KL),
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
        "triplet_loss": (lambda: [(*z(0, 1, 2), Y, WEIGHTS, 2.0)], [
            ("the weights of peer and anchor are swapped", triplet(lambda w: (w[0], w[2], w[1]))),
            ("without the anchor", triplet(lambda w: (*w[:2], 0))),
            ("without the peer", triplet(lambda w: (w[0], 0, w[2]))),
            ("the cross-entropy has the temperature too",
             triplet(ce=lambda z, y, tau: CE(z / tau, y))),
            ("the KLs are the other way round",
             triplet(kl=lambda target, z, tau: softened(z, target, tau))),
            ("the loss of the other network", lambda z, peer, *more: triplet()(peer, z, *more)),
            ("the terms have their weights", lambda *given: (triplet()(*given)[0], {
                name: w * term for w, (name, term) in zip(
                    given[4], triplet()(*given)[1].items())}))]),
        "label_shares": (lambda: [(WEIGHTS, WEIGHTS._replace(label=0.3))], [
            ("l_T and l_S are swapped", lambda T, S: (
                (S[0] * sum(T) + S[1] * T[0]) / (sum(T) * sum(S) - T[1] * S[1]),
                (T[0] * sum(S) + T[1] * S[0]) / (sum(T) * sum(S) - T[1] * S[1]))),
            ("lambda / (lambda + zeta), which holds for equal triples alone",
             lambda T, S: (T[0] / (T[0] + T[2]), S[0] / (S[0] + S[2])))]),
    },
    "letkd": {
        "word_targets": (lambda: [(*z(0, shape=MAPS), logits(7, 5, seed=1), 0.6)], [
            ("the sign: the farthest word wins",
             lambda z, rho, tau: F.softmax(-tau * closeness(z, rho), 1)),
            ("the distance is not squared",
             lambda z, rho, tau: F.softmax(tau * closeness(z, rho, 1), 1)),
            ("without tau", lambda z, rho, tau: F.softmax(closeness(z, rho), 1)),
            ("divided by tau", lambda z, rho, tau: F.softmax(closeness(z, rho) / tau, 1)),
            ("inner products, without ||rho||^2", lambda z, rho, tau: F.softmax(
                2 * tau * torch.einsum("bdhw,kd->bkhw", z, rho), 1))]),
        "template_loss": (lambda: [(*z(0, shape=MAPS), p(logits(*MAPS, seed=1)).detach())], [
            ("divided by B alone, as batchmean does on maps",
             lambda a, q: softened(rows(q.log()), rows(a)) * 3 * 4),
            ("divided by K as well", lambda a, q: softened(rows(q.log()), rows(a)) / 5),
            ("the two distributions are swapped",
             lambda a, q: softened(rows(a), rows(q.log()))),
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
            ("student and teacher are swapped", lambda t, s, y: terms(
                CE(s, y), -(1 - p(t).gather(1, y[:, None])).log().mean())),
            ("the student's cross-entropy is added: both shall know", lambda t, s, y: terms(
                CE(t, y), CE(s, y))),
            ("eq. (14) in place of (13)", lambda t, s, y: terms(CE(t, y), -CE(s, y)))]),
        "distillation_loss": (lambda: [(*z(0, 1), Y, 0.7, 3.0)], KD),
    },
}
