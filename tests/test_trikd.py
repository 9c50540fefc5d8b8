"""TriKD against its specification: section 11, oracles, gradients, the fixed point, tiny runs.

The oracles are numpy in float64, written from the equations; goldens are typed from the
specification (six decimals), beside them the numbers that the usual mistakes would give.
"""

import copy
import importlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, result_of, same, same_run, shapes_data, stopped, table, weights
from torch import nn

import common
import trikd
from trikd import Weights

DIGITS = 1e-6
Z_T, Z_S = [[2, 0.5, -1], [0, 1, 0.5]], [[1, 0, 0], [0.5, 0.5, -1]]
Z_A, Y = [[0, 1, 0], [1, -1, 0]], [0, 2]
FENCED = Weights(1, 1, 0.1)  # the default
ONES, FIRST, SECOND = Weights(1, 1, 1), Weights(1, 0.5, 2), Weights(1, 1.5, 0.25)


def log_p(z, tau=1.0):
    z = np.asarray(z, float) / tau
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(target, own, tau=1.0):
    """Eq. (1), tau^2 included."""
    a, b = log_p(target, tau), log_p(own, tau)
    return tau**2 * (np.exp(a) * (a - b)).sum(1).mean()


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y].mean()


def loss(own, peer, anchor, y, w, tau):
    return w[0] * ce(own, y) + w[1] * kl(peer, own, tau) + w[2] * kl(anchor, own, tau)


def gradient(own, peer, anchor, y, w, tau):
    """Eq. (5), divided by N."""
    hot = np.eye(np.shape(own)[1])[y]
    p, q, a = (np.exp(log_p(z, tau)) for z in (own, peer, anchor))
    return (w[0] * (np.exp(log_p(own)) - hot)
            + tau * (w[1] * (p - q) + w[2] * (p - a))) / len(y)


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values, float), requires_grad=grad)


# -------------------------------------------------------------------------- equations (1) to (6)
@pytest.mark.parametrize("tau, values", [
    (1, (0.225261, 0.700731, 0.191891, 0.348894)), (2, (0.294106, 0.777433, 0.274194, 0.408557))])
def test_kl_goldens(tau, values):
    pairs = [(Z_S, Z_T), (Z_A, Z_T), (Z_T, Z_S), (Z_A, Z_S)]  # target, learner
    found = [trikd.kl_to(tensor(a), tensor(b), tau).item() for a, b in pairs]
    assert found == pytest.approx(values, abs=DIGITS)
    assert [kl(a, b, tau) for a, b in pairs] == pytest.approx(values, abs=DIGITS)  # the oracle


@pytest.mark.parametrize("w_T, w_S, tau, values, g_T, g_S", [
    (ONES, ONES, 1, (1.636783, 1.965966),
     [[0.284366, -0.131094, -0.153273], [-0.278043, 0.489797, -0.211754]],
     [[-0.134594, -0.057791, 0.192385], [0.248942, 0.376469, -0.625411]]),
    (FIRST, SECOND, 2, (2.412709, 1.938611),
     [[0.593224, -0.256613, -0.336611], [-0.486346, 0.726430, -0.240083]],
     [[-0.374395, 0.054724, 0.319671], [0.424699, 0.257308, -0.682007]])])
def test_loss_and_gradient_goldens(w_T, w_S, tau, values, g_T, g_S):
    """One backward on the sum: detached targets keep the gradients apart."""
    z_T, z_S, z_A = (tensor(z, True) for z in (Z_T, Z_S, Z_A))
    L_T = trikd.teacher_loss(z_T, z_S, z_A, torch.tensor(Y), w_T, tau)
    L_S = trikd.student_loss(z_S, z_T, z_A, torch.tensor(Y), w_S, tau)
    assert L_T.shape == L_S.shape == ()
    assert (L_T.item(), L_S.item()) == pytest.approx(values, abs=DIGITS)
    (L_T + L_S).backward()
    assert z_A.grad is None
    assert z_T.grad.numpy() == pytest.approx(np.array(g_T), abs=DIGITS)
    assert z_S.grad.numpy() == pytest.approx(np.array(g_S), abs=DIGITS)


def test_the_value_betrays_the_mistake():
    """The listed wrong values of the second case, recomputed: none is 2.412709."""
    right = loss(Z_T, Z_S, Z_A, Y, FIRST, 2)
    without = ce(Z_T, Y) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 4
    backwards = ce(Z_T, Y) + 0.5 * kl(Z_T, Z_S, 2) + 2 * kl(Z_T, Z_A, 2)
    mean = ce(Z_T, Y) + (0.5 * kl(Z_S, Z_T, 2) + 2 * kl(Z_A, Z_T, 2)) / 3
    for listed, wrong in ((1.136270, without), (2.469466, backwards), (1.278097, mean)):
        assert wrong == pytest.approx(listed, abs=DIGITS) and abs(wrong - right) > 1e-2


@pytest.mark.parametrize("batch, classes, tau", [(1, 3, 1), (6, 5, 1), (8, 20, 4), (3, 2, 0.5)])
def test_losses_on_random_logits(batch, classes, tau):
    """Eqs. (2), (3), (5), and their symmetry: roles and weights swapped, one becomes the other."""
    random = np.random.default_rng(batch)
    z = random.normal(0, 2, (3, batch, classes))
    y, w = random.integers(0, classes, batch), Weights(*random.uniform(0, 3, 3))
    labels = torch.tensor(y)
    for function in (trikd.teacher_loss, trikd.student_loss):
        own, peer, anchor = (tensor(part, True) for part in z)
        value = function(own, peer, anchor, labels, w, tau)
        assert value.item() == pytest.approx(loss(*z, y, w, tau), rel=1e-10)
        value.backward()
        assert own.grad.numpy() == pytest.approx(gradient(*z, y, w, tau), rel=1e-8, abs=1e-12)
        assert peer.grad is None and anchor.grad is None
    assert torch.autograd.gradcheck(lambda own: trikd.teacher_loss(
        own, peer.detach(), anchor.detach(), labels, w, tau), tensor(z[0], True))
    if tau == 1:  # eq. (6): W (p - mixture)
        mixture = (w.label * np.eye(classes)[y] + w.peer * np.exp(log_p(z[1]))
                   + w.anchor * np.exp(log_p(z[2]))) / sum(w)
        wanted = sum(w) * (np.exp(log_p(z[0])) - mixture) / batch
        assert own.grad.numpy() == pytest.approx(wanted, rel=1e-8, abs=1e-12)


def test_equal_logits_leave_the_label_term():
    z = tensor(Z_T, True)
    trikd.teacher_loss(z, z, z, torch.tensor(Y), Weights(0.7, 5, 9), 3).backward()
    wanted = 0.7 * (np.exp(log_p(Z_T)) - np.eye(3)[Y]) / 2
    assert z.grad.numpy() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("other", [(2, 4), (1, 3), (2, 1), (3,)])
def test_unequal_shapes_are_refused(other):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        trikd.kl_to(torch.zeros(2, 3), torch.zeros(other))


# ----------------------------------------------------------------------------- the fixed point, (7)
@pytest.mark.parametrize("T, S, shares", [
    ((1, 1, 1), (1, 1, 1), (0.5, 0.5)), ((1, 1, 1), (1, 1, 0), (0.6, 0.8)),
    ((1, 1, 0), (1, 1, 1), (0.8, 0.6)), ((1, 1, 3), (1, 1, 3), (0.25, 0.25)),
    ((1, 1, 10), (1, 1, 10), (1 / 11, 1 / 11)), ((1, 100, 100), (1, 100, 100), (1 / 101,) * 2),
    ((1, 1, 0), (1, 1, 0), (1, 1)), (FIRST, SECOND, (0.366197, 0.563380)),
    ((2, 1, 1), (1, 3, 0.5), None), ((0.3, 2, 1), (4, 0.2, 3), None)])
def test_label_shares(T, S, shares):
    """Both networks at rest: W_T l_T - pi_T l_S = lambda_T, W_S l_S - pi_S l_T = lambda_S."""
    found = trikd.label_shares(Weights(*T), Weights(*S))
    solved = np.linalg.solve([[sum(T), -T[1]], [-S[1], sum(S)]], [T[0], S[0]])
    assert found == pytest.approx(tuple(solved))
    assert shares is None or found == pytest.approx(shares, abs=DIGITS)
    assert trikd.label_shares(Weights(0, 1, 0), Weights(0, 1, 0)) == (None, None)


FIXED = [
    (ONES, ONES, [[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]],
     [[0.605971, 0.288058, 0.105971], [0.332620, 0.045015, 0.622364]]),
    (FIRST, SECOND, [[0.500526, 0.365145, 0.134329], [0.421632, 0.057062, 0.521307]],
     [[0.655918, 0.251544, 0.092538], [0.290457, 0.039309, 0.670234]])]


@pytest.mark.parametrize("w_T, w_S, p_T, p_S", FIXED)
def test_free_logits_reach_the_fixed_point(w_T, w_S, p_T, p_S):
    """Zero gradient at the listed outputs; and gradient descent from anywhere ends there."""
    labels, z_A = torch.tensor(Y), tensor(Z_A)
    z_T, z_S = tensor(np.log(p_T), True), tensor(np.log(p_S), True)
    (trikd.teacher_loss(z_T, z_S, z_A, labels, w_T)
     + trikd.student_loss(z_S, z_T, z_A, labels, w_S)).backward()
    assert max(z_T.grad.abs().max(), z_S.grad.abs().max()) < 2e-6
    z_T, z_S = tensor(Z_T, True), tensor(Z_S, True)
    optimizer = torch.optim.SGD([z_T, z_S], 0.5)
    for _ in range(800):
        optimizer.zero_grad()
        (trikd.teacher_loss(z_T, z_S, z_A, labels, w_T)
         + trikd.student_loss(z_S, z_T, z_A, labels, w_S)).backward()
        optimizer.step()
    for z, p, share in zip((z_T, z_S), (p_T, p_S), trikd.label_shares(w_T, w_S)):
        ends = z.detach().softmax(1).numpy()
        assert ends == pytest.approx(np.array(p), abs=2e-6)
        assert ends == pytest.approx(share * np.eye(3)[Y] + (1 - share) * np.exp(log_p(Z_A)),
                                     abs=2e-6)


# ---------------------------------------------------------------------------------- small functions
def test_learning_rates():
    rates = trikd.learning_rates(0.05, 240)
    exponents = [round(float(np.log10(0.05 / rate))) for rate in rates]
    assert exponents == [0] * 150 + [1] * 30 + [2] * 30 + [3] * 30
    assert trikd.learning_rates(1, 8) == pytest.approx([1] * 5 + [0.1, 0.01, 0.001])
    assert trikd.learning_rates(1, 1) == [1]


# ------------------------------------------------------------------------------------------ steps
IMAGES, LABELS, _ = common.make_shapes(32, 16, 0)
IMAGES = IMAGES.float() / 255 - 0.4


def triplet():
    """Student, teacher and anchor, the last one frozen."""
    student, teacher, anchor = (common.build_model(name, 20, 16, seed) for name, seed in (
        ("resnet8x0.5", 0), ("resnet8", 1), ("resnet8x0.5", 2)))
    return student, teacher, common.frozen(anchor)


def clone(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def sgd(network):
    return torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)


def flags(tau=1.0):
    return Namespace(temperature=tau, precision="fp32", device=torch.device("cpu"))


def play(networks, T, S, tau=1.0, steps=1):
    """Steps of the triplet; what the last one returned."""
    student, teacher, anchor = networks
    optimizers = {"student": sgd(student), "teacher": sgd(teacher)}
    for _ in range(steps):
        found = trikd.train_step(student, teacher, anchor, optimizers, IMAGES, LABELS,
                                 {"student": S, "teacher": T}, flags(tau))
    return found


def test_the_terms_are_those_of_the_logits_before_the_step():
    networks, y = triplet(), LABELS.numpy()
    with torch.no_grad():
        z_S, z_T, z_A = (copy.deepcopy(network)(IMAGES).double().numpy() for network in networks)
    terms, logits = play(networks, FIRST, SECOND, 2.0)
    wanted = {"T_ce": ce(z_T, y), "T_peer": kl(z_S, z_T, 2), "T_anchor": kl(z_A, z_T, 2),
              "S_ce": ce(z_S, y), "S_peer": kl(z_T, z_S, 2), "S_anchor": kl(z_A, z_S, 2)}
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(wanted, rel=1e-3)
    assert logits.detach().numpy() == pytest.approx(z_S, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("w_T, w_S, tau", [
    (FIRST, SECOND, 2), (Weights(1, 1, 0), Weights(1, 1, 0), 1)])  # the last: mutual learning
def test_each_network_follows_the_gradient_of_its_own_loss(w_T, w_S, tau):
    """Eq. (4): two steps against a loop written here, an autograd of its own for each network."""
    F, networks, (student, teacher, anchor) = nn.functional, triplet(), triplet()
    play(networks, w_T, w_S, tau, steps=2)
    optimizers = sgd(student), sgd(teacher)
    for _ in range(2):
        z_S, z_T, z_A = student(IMAGES), teacher(IMAGES), anchor(IMAGES)
        for network, own, peer, w in ((student, z_S, z_T, w_S), (teacher, z_T, z_S, w_T)):
            total = w.label * F.cross_entropy(own, LABELS)
            for weight, other in ((w.peer, peer), (w.anchor, z_A)):
                total = total + weight * tau**2 * F.kl_div(
                    F.log_softmax(own / tau, 1), F.softmax(other.detach() / tau, 1),
                    reduction="batchmean")
            parameters = list(network.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters)):
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(networks, (student, teacher, anchor)):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("roles", [["peer"], ["anchor"], ["peer", "anchor"], []])
def test_control_step_is_eq_3_with_fixed_networks(roles):
    """An absent network has no term; the fixed ones stay as they are."""
    student, peer, anchor = triplet()
    fixed = {"peer": common.frozen(peer), "anchor": anchor}
    before, w = [clone(network) for network in fixed.values()], Weights(0.7, 0.5, 2)
    with torch.no_grad():
        z = {role: network(IMAGES).double().numpy() for role, network in fixed.items()}
        z_S, y = copy.deepcopy(student)(IMAGES).double().numpy(), LABELS.numpy()
    terms, logits = trikd.control_step(student, {role: fixed[role] for role in roles}, sgd(student),
                                       IMAGES, LABELS, w, flags(2.0))
    wanted = {"S_ce": ce(z_S, y), **{f"S_{role}": kl(z[role], z_S, 2) for role in roles}}
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(wanted, rel=1e-4)
    assert logits.detach().numpy() == pytest.approx(z_S, rel=1e-4, abs=1e-4)
    present = (w.label, *(getattr(w, role) * (role in roles) for role in ("peer", "anchor")))
    bias = gradient(z_S, z["peer"], z["anchor"], y, present, 2).sum(0)
    assert student.head.bias.grad.numpy() == pytest.approx(bias, rel=1e-3, abs=1e-6)
    for network, state in zip(fixed.values(), before):
        assert same(state, clone(network)) and not network.training


# ------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("typed, T, S", [
    ("", FENCED, FENCED), ("--anchor-weight 3", Weights(1, 1, 3), Weights(1, 1, 3)),
    ("--label-weight 1 2 --peer-weight 0.5 1.5 --anchor-weight 2 0.25", FIRST,
     Weights(2, 1.5, 0.25)),
    ("--anchor-on teacher", FENCED, Weights(1, 1, 0)),
    ("--anchor-on student --anchor-weight 3", Weights(1, 1, 0), Weights(1, 1, 3)),
    ("--peer-weight 0", Weights(1, 0, 0.1), Weights(1, 0, 0.1)),
    ("--peer none --peer-weight 2", Weights(1, 0, 0.1), Weights(1, 0, 0.1))])
def test_the_six_weights(typed, T, S):
    arguments = trikd.parse_args(f"--device cpu {typed}".split())
    assert [trikd.weights_of(role, arguments) for role in ("teacher", "student")] == [T, S]


@pytest.mark.parametrize("typed, word", [
    ("--generations 0", "--generations"), ("--label-weight 1 2 3", "--label-weight"),
    ("--anchor-weight -1", "--anchor-weight"), ("--temperature 0", "--temperature"),
    ("--label-weight 0 --peer-weight 0 --anchor-weight 0", "nothing to learn"),
    ("--label-weight 1 0 --peer-weight 1 0 --anchor-on teacher", "the student are 0"),
    ("--label-weight 0 1 --peer-weight 0 --anchor-on student", "the teacher are 0"),
    ("--peer none --label-weight 0 --anchor-weight 0", "nothing to learn"),
    ("--train-fraction 2", "--train-fraction"), ("--anchor-on all", "--anchor-on"),
    ("--peer frozen", "--peer"), ("--label-weight 0 --compare", "--label-weight 0"),
    ("--teacher-weights x", "--teacher-weights"), ("--student nonsense", "nonsense")])
def test_argument_errors_are_one_line(typed, word, capsys):
    assert word in refused("trikd", typed, capsys)


def test_a_fraction_has_as_many_updates():
    for fraction, epochs in ((1, 7), (0.5, 14), (0.3, 23), (0.05, 140)):
        typed = f"--device cpu --epochs 7 --train-fraction {fraction}"
        assert trikd.parse_args(typed.split()).epochs == epochs


# ----------------------------------------------------------------------------- rows of the table
def test_counts_of_a_chain_start_before_it():
    """A_0 counts where an anchor is used, a finished teacher where it teaches; all is ADDED."""
    rows = [{"generation": g, "test": test, "s": 2.0}
            for g, test in ((1, None), (1, 30.0), (2, 50.0), (2, 40.0))]
    result = {"rows": rows, "generations": [{"generation": 1}, {"generation": 2}],
              "before": {"epochs": 5, "t_epochs": 7, "seconds": 100.0}}
    for peer, t_epochs in (("online", (9, 11)), ("finished", (7, 7))):
        found = trikd.generation_rows("chain", {**result, "arguments": {"peer": peer}})
        for one, g, t, rest in zip(found, (1, 2), t_epochs, ((7, 104, 30), (9, 108, 50))):
            assert one == {"generation": g, "run": f"chain, generation {g}", "t_epochs": t,
                           **dict(zip(("epochs", "seconds", "best"), rest))}
    alone = {name: (None, {"rows": [{}] * count, "seconds": seconds}) for name, count, seconds in (
        ("student alone", 3, 10.0), ("student alone, long", 9, 70.0), ("teacher alone", 4, 25.0))}
    off = Weights(1, 1, 0)
    for triples, peer, counts in (
            ([off, off], "online", (0, 0, 0)), ([off, ONES], "online", (3, 0, 10)),
            ([off], "finished", (0, 4, 25)), ([ONES], "finished", (3, 4, 35))):
        assert tuple(trikd.trained_before(alone, triples, peer).values()) == counts


# ------------------------------------------------------------------------------------------ runs
ALL = "--generations 2 --compare"


class Trace(Namespace):
    def __repr__(self):  # without it a failing test prints every weight of every step
        return "Trace"


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Two generations and all controls; the networks in the steps of the triplet."""
    folder, cache, steps = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache"), []
    with pytest.MonkeyPatch.context() as patch:
        original = trikd.train_step

        def spy(*given):
            networks, optimizers, labels = given[:3], given[3].values(), given[5]
            entry = Trace(before=[clone(network) for network in networks], labels=labels,
                          training=[network.training for network in networks],
                          momentum={len(one.state) > 0 for one in optimizers},
                          rates={one.param_groups[0]["lr"] for one in optimizers})
            steps.append(entry)
            found = original(*given)
            entry.after = [clone(network) for network in networks]
            return found
        patch.setattr(trikd, "train_step", spy)
        printed = run("trikd", folder, f"{ALL} --cache {cache}")
    return Trace(folder=folder, cache=cache, printed=printed, steps=steps)


def test_generations_hand_over(whole):
    """A_g is S_g to the bit, A_0 the plain student; S_g+1 and T_g+1 start elsewhere, fresh."""
    generations = whole.steps[:12], whole.steps[12:24]  # 6 batches in each of 2 epochs
    (cached,) = whole.cache.glob("shapes-resnet8x0.5-2-*")
    assert same(generations[0][0].before[2], weights(cached / "epoch-0002.pt"))
    assert same(generations[1][0].before[2], generations[0][-1].after[0])
    assert not torch.equal(generations[0][0].labels, generations[1][0].labels)
    for g, generation in enumerate(generations, 1):
        first = generation[0].before[2]
        assert all(same(step.before[2], first) and same(step.after[2], first)
                   and step.training == [True, True, False] for step in generation)
        assert [step.momentum for step in generation] == [{False}] + [{True}] * 11
        for index, (role, name) in enumerate((("student", "resnet8x0.5"), ("teacher", "resnet8"))):
            fresh = common.build_model(name, 20, 16, 10_000 * g + 1000 * index)
            assert same(generation[0].before[index], fresh.state_dict())
            assert same(weights(whole.folder / f"{role}-{g}.pt"), generation[-1].after[index])
    assert same(weights(whole.folder / "student.pt"), generations[-1][-1].after[0])
    rates = [rate for step in whole.steps[-36::6] for rate in step.rates]  # of the 6 epochs long
    assert rates == pytest.approx([0.1] * 4 + [0.01, 0.001])


def test_measures_by_hand(whole):
    """Accuracies, KL, agreement of the last generation from the saved weights, in numpy."""
    data, result = shapes_data(), result_of(whole.folder)

    def logits(role, g, split):
        network = common.build_model({"student": "resnet8x0.5", "teacher": "resnet8"}[role], 20, 16)
        network.load_state_dict(weights(whole.folder / f"{role}-{g}.pt"))
        with torch.no_grad():
            return network.eval()(split.normalise(split.images)).double().numpy()
    last = result["generations"][-1]
    S, T, A = (logits(*key, data.test) for key in (("student", 2), ("teacher", 2), ("student", 1)))
    assert last["kl_ts"] == pytest.approx(kl(T, S), rel=1e-3)
    assert last["kl_at"] == pytest.approx(kl(A, T), rel=1e-3)
    assert last["agree"] == pytest.approx(100 * (S.argmax(1) == T.argmax(1)).mean())
    for role, key, gap in (("student", "test", "s_gap"), ("teacher", "teacher", "t_gap")):
        right = [100 * (logits(role, 2, split).argmax(1) == split.labels.numpy()).mean()
                 for split in (data.test, data.train)]
        assert last[key] == result["rows"][-1][key] == pytest.approx(right[0])
        assert (last[f"{role}_train"], last[gap]) == pytest.approx((right[1], right[1] - right[0]))
    assert result["last_test"] == last["test"]
    assert result["label_shares"] == pytest.approx({"teacher": 1 / 1.1, "student": 1 / 1.1})  # (8)
    assert result["images"] == dict.fromkeys(("student forward and backward", "anchor forward",
                                              "teacher forward and backward"), 4 * 260)
    assert result_of(whole.folder / "kd")["images"] == dict.fromkeys((
        "student forward and backward", "peer forward"), 2 * 260)


def test_compare_prints_every_control_with_its_epochs(whole):
    """The counts, and where the seconds start: with A_0's, or with those of kd's teacher."""
    found = table(whole.printed)
    epochs = {name: (int(row["epochs"]), int(row["t_epochs"])) for name, row in found.items()}
    assert epochs == {
        "student alone": (2, 0), "student alone, long": (6, 0), "TriKD, generation 1": (4, 2),
        "TriKD, generation 2": (6, 4), "kd": (2, 2), "mutual learning": (2, 2),
        "born-again, generation 1": (4, 0), "born-again, generation 2": (6, 0),
        "mutual learning, long": (6, 6)}
    for name, network in (("born-again", "resnet8x0.5"), ("kd", "resnet8")):
        (cached,) = whole.cache.glob(f"shapes-{network}-2-*")
        before = result_of(whole.folder / name)["before"]
        assert before["seconds"] == sum(row["s"] for row in result_of(cached)["rows"]) > 0
    assert result_of(whole.folder / "mutual-learning-long")["before"] == {
        "epochs": 0, "t_epochs": 0, "seconds": 0}
    assert found["born-again, generation 1"]["teacher"] == "-" != found["kd"]["teacher"]


def test_a_stopped_run_goes_on_bit_for_bit(whole, run, tmp_path, monkeypatch):
    """Stopped in the middle of generation 2, then in that of the born-again chain."""
    for script_step, call in (("train_step", 12 + 6 + 3), ("control_step", 12 + 12 + 6 + 2)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, trikd, script_step, call)
            run("trikd", tmp_path, f"{ALL} --resume --cache {whole.cache}")
    printed = run("trikd", tmp_path, f"{ALL} --resume --cache {whole.cache}")
    for name in ("", "kd", "mutual-learning", "born-again", "mutual-learning-long"):
        assert same_run(tmp_path / name, whole.folder / name)
    timeless = [{name: {key: value for key, value in row.items() if key != "seconds"}
                 for name, row in table(text).items()} for text in (printed, whole.printed)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("typed, twin", [
    ("--peer none --anchor-weight 1 --generations 1", "born-again/student-1.pt"),
    # a teacher that teaches nobody
    ("--peer-weight 0 --anchor-weight 1 --generations 1", "born-again/student-1.pt"),
    ("--peer finished --anchor-weight 0 --generations 1", "kd/student.pt"),
    ("--anchor-weight 0 --generations 1 --epochs 6", "mutual-learning-long/student.pt")])
def test_controls_are_commands(typed, twin, whole, run, tmp_path):
    run("trikd", tmp_path, typed)
    assert same(weights(tmp_path / "student.pt"), weights(whole.folder / twin))
    assert not same(weights(tmp_path / "student.pt"), weights(whole.folder / "student-1.pt"))


def test_a_useless_control_is_left_out_and_born_again_always_learns(run, tmp_path):
    printed = run("trikd", tmp_path, "--anchor-weight 0 --peer-weight 0 --compare --generations 1 "
                  "--epochs 1")
    rows = ["student alone", "student alone, long", "TriKD", "born-again", "mutual learning, long"]
    assert list(table(printed)) == rows
    arguments = trikd.parse_args("--device cpu --anchor-on teacher".split())
    vars(arguments).update(trikd.CONTROLS["born-again"][0])
    assert trikd.weights_of("student", arguments) == (1, 0, 1)


def test_fraction_open_set_and_temperature(run, tmp_path):
    """Tested every 1 / F epochs; unseen classes have no logit; eq. (7) holds at tau = 1 alone."""
    found = table(run("trikd", tmp_path, "--train-fraction 0.3 --open-set 4 --generations 1 "
                      "--temperature 2"))
    result = result_of(tmp_path)
    for name in ("test", "teacher"):  # and at the end
        tested = [row["epoch"] for row in result["rows"] if row[name] is not None]
        assert tested == [3, 6, 7] and result["rows"][-1][name] == result["generations"][0][name]
    assert result["label_shares"] is None
    for row in found.values():
        assert 0 < float(row["rank1"]) <= 100 and 40 < float(row["verification"]) <= 100
    assert found["TriKD"]["t_rank1"] != "-" == found["student alone"]["t_rank1"]
    assert weights(tmp_path / "student.pt")["head.weight"].shape[0] == 16


def test_student_and_teacher_learn_the_shapes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 600)
    run("trikd", tmp_path, "--epochs 4 --batch-size 20 --generations 1")
    (last,) = result_of(tmp_path)["generations"]
    assert min(last["test"], last["teacher"]) > 15  # chance: 5


# --------------------------------------------------------------------------------------- pictures
@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("figures")


def test_classical_scaling_finds_a_known_plane(figures):
    """Points in the plane, up to rotation, reflection and shift; the longer axis first."""
    points = np.random.default_rng(0).normal(size=(7, 2)) * (3, 1)
    D = np.square(points[:, None] - points[None]).sum(2)
    found = figures.classical_scaling(torch.tensor(D)).numpy()
    assert np.square(found[:, None] - found[None]).sum(2) == pytest.approx(D, abs=1e-9)
    assert found[:, 0].std() > found[:, 1].std()


def test_pictures(figures, whole, run, capsys):
    """From the record and its networks; A_0 is found in the cache, not trained again."""
    pytest.importorskip("matplotlib")
    run("trikd", whole.folder / "anchor-3", "--anchor-weight 3 --generations 1 --epochs 1")
    drawn = figures.trikd(whole.folder, result_of(whole.folder))
    assert "resnet8x0.5, trained before" in capsys.readouterr().out
    texts = {name: [text.get_text() for text in figure.axes[0].texts]
             for name, figure in drawn.items()}
    networks = ["A0", *(f"{name} {network}" for name, chain in (
        ("TriKD", "S1 S2 T1 T2"), ("born-again", "S1 S2"), ("mutual learning", "S1 T1"))
        for network in chain.split())]
    assert texts == {"generations.png": [], "tradeoff.png": ["3 (label share 0.25)"],
                     "functions.png": networks}
    student = drawn["generations.png"].axes[0].lines[0].get_ydata()
    rows = ("student alone", "TriKD, generation 1", "TriKD, generation 2")
    assert list(student) == [float(table(whole.printed)[name]["test"]) for name in rows]
