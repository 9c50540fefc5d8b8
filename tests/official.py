"""The authors' released code, live, beside ours: same networks, weights, batches, draws; CPU.

    python tests/official.py --switokd DIR --letkd DIR --tst DIR

DIR: a checkout of hfutqian/SwitOKD, adagorgun/letKD-framework or shaoshitong/TST, each as it is; no
line of them belongs to this project. Only the functions and classes named here are taken from their
files, `.cuda()` does nothing. Where a script declares a slip or a departure, their text is changed
in that one place before it runs: the table says so. Exit code 1 where anything else differs.
"""

import argparse
import ast
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Optional
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import common  # noqa: E402
import letkd  # noqa: E402
import switokd  # noqa: E402
import tst  # noqa: E402

failed = 0


def report(what, ours, theirs, limit, note=""):
    """A line of the table: the largest difference over all pairs, by the size of their tensor."""
    global failed
    ours, theirs = ([torch.as_tensor(one).detach().double() for one in part]
                    for part in (ours, theirs))
    worst = torch.stack([(a - b).abs().max() / b.abs().max().clamp_min(1e-12)  # NaN stays NaN
                         for a, b in zip(ours, theirs, strict=True)]).max().item()
    failed += not worst <= limit
    print(f"{what:52} {len(ours):5} {worst:9.1e} {'' if worst <= limit else 'DIFFERS '}{note}",
          flush=True)


def taken(path, names, changes=(), **given):
    """The functions and classes `names` of their file, its text changed as declared."""
    if not path.exists():
        sys.exit(f"official.py: error: {path} is missing: is that the checkout?")
    text = path.read_text()
    for old, new in changes:
        if old not in text:
            sys.exit(f"official.py: error: {path} has no {old!r}: another version than we know")
        text = text.replace(old, new)
    nodes = [node for node in ast.parse(text).body if getattr(node, "name", None) in names]
    if len(nodes) != len(names):
        sys.exit(f"official.py: error: {path} lacks one of {', '.join(names)}")
    space = {"torch": torch, "nn": nn, "F": F, "np": np, "math": math, "random": random,
             "Variable": lambda tensor: tensor, "print": lambda *_: None, **given}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), space)
    return SimpleNamespace(space=space, **{name: space[name] for name in names})


# ---------------------------------------------------------------------------------------- SwitOKD
def check_switokd(folder, epochs=12):
    """Their `train()` over whole epochs in float64, our `train_step` on the same batches; last.

    The teachers start sure of some wrong labels, so that both modes occur.
    """
    names = ("kl_div", "dist_s_label", "dist_s_t", "compute_entropy", "train")
    three = ("SwitOKD_code/multi-net results (table 7)/{}/CIFAR_100_wrn16-10_wrn16-2_mobilenet/"
             "main.py")
    slip = "epsilon{} = torch.exp(-1 * (t_label{} / (t_label{} + s_label{})) )"
    programs = [
        ("pair", "SwitOKD_code/CIFAR-100/WRN16-2_0.5mobilenetv2/main.py", (),
         {"model": "teacher", "model_ks2": "student"}, ""),
        ("2t1s", three.format("2T1S"), [(slip.format(2, "", "", ""), slip.format(2, 2, 2, 2))],
         {"model": "teacher-1", "model2": "teacher-2", "model_ks2": "student"},
         "their eps of pair 2 put right"),
        ("1t2s", three.format("1T2S"), [
            (slip.format("", 2, 2, 2), slip.format("", "", "", "")),
            ("        optimizer2.step()", "        optimizer2.step() if w0 else None")],
         {"model": "student-1", "model2": "teacher", "model_ks2": "student-2"},
         "their eps of pair 1, and steps in a full pause, put right"),
    ]
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 3, 12, 12, generator=generator, dtype=torch.float64),
                torch.randint(0, 100, (16,), generator=generator)) for _ in range(23)]

    def networks(roles):
        """{role: network}, and their optimizers."""
        found = {}
        for seed, role in enumerate(sorted(roles)):
            name = "resnet14" if role.startswith("teacher") else "resnet8x0.5"
            found[role] = common.build_model(name, 100, 12, seed).double().train()
            if role.startswith("teacher"):
                found[role].head.weight.data *= 12
        return found, {role: torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=5e-4)
                       for role, network in found.items()}

    torch.Tensor.float = torch.Tensor.double  # the scripts' losses are float32; here all is float64
    settings = SimpleNamespace(temperature=1.0, fixed=None, precision="fp32",
                               device=torch.device("cpu"))
    for topology, path, changes, roles, note in programs:
        (theirs, sgd), (ours, own) = networks(roles.values()), networks(roles.values())
        code = taken(folder / path, names, changes, trainloader=batches,
                     criterion=nn.CrossEntropyLoss())
        for name, role in roles.items():
            code.space[name] = theirs[role]
            code.space[name.replace("model", "optimizer")] = sgd[role]
        students, teachers = ({role: ours[role] for role in ours if role.startswith(kind)}
                              for kind in ("student", "teacher"))
        expert = 0
        for _ in range(epochs):
            code.train(1)
            for images, labels in batches:
                _, _, pairs = switokd.train_step(students, teachers, own, images, labels, settings)
                expert += sum(pair.mode == "expert" for pair in pairs.values())
        weights = ([value for network in found.values() for value in network.parameters()]
                   for found in (ours, theirs))
        steps = epochs * len(batches)
        report(f"SwitOKD {topology}: weights after {steps} steps, {expert} x expert", *weights,
               1e-9, note)


# ------------------------------------------------------------------------------------------ LetKD
def check_letkd(folder):
    """Their layers, quantiser and losses against ours: outputs and gradients, float32."""
    torch.manual_seed(0)
    tools = taken(folder / "distillation/architectures/tools.py", ["Conv2dCos"])
    place = folder / "distillation/architectures/miscellaneous"
    B, d, K, H, C, k, D, L = 4, 10, 12, 6, 3, 4, 9, 5
    x, gradients = torch.randn(B, d, H, H, requires_grad=True), torch.autograd.grad

    theirs, ours = tools.Conv2dCos(d, K, scale=3.0), letkd.CosineConv1x1(d, K, 3.0)
    ours.weight.data = theirs.weight.data.clone()
    parts = []
    for layer in (ours, theirs):
        out = layer(x)
        parts.append([out, *gradients(out.square().sum(), (x, layer.weight, layer.scale))])
    report("LetKD cosine classifier: output, gradients", *parts, 2e-5)

    plain = taken(place / "valueLayer.py", ["Classifier", "valueLayer"], tools=tools)
    layer, value = letkd.KDLayer(d, K, 0.7), plain.valueLayer(d, K, 0.7)
    match = tools.Conv2dCos(d, K, scale=3.0)
    layer.match.weight.data = match.weight.data.clone()
    layer.value.weight.data = value.conv_value.layers.weight.data.clone()
    x_hat, scores = layer(x)
    their_scores = match(x)
    features, _ = value(their_scores, x)
    own = x, layer.match.weight, layer.value.weight, *layer.norm.parameters()
    their = x, match.weight, value.conv_value.layers.weight, *value.bn.parameters()
    report("LetKD layer `penult`: output, scores, gradients",
           [x_hat, scores, layer.norm.running_var,
            *gradients(x_hat.square().sum() + scores.square().sum(), own)],
           [features, their_scores, value.bn.running_var,
            *gradients(features.square().sum() + their_scores.square().sum(), their)], 5e-5)

    quantiser = taken(place / "vector_quantization.py", ["VectorQuantizerEMA"])
    words = quantiser.VectorQuantizerEMA(K, D, 0.0, 0.0, temperature=1.0).eval()
    z = torch.randn(B, D, H, H)
    *_, p_T, _ = words(z, encodings_out=True)  # (B,H,W,K)
    report("LetKD words: p_T of eq. (7)", [letkd.word_targets(z, words._embedding.weight)],
           [p_T.movedim(3, 1)], 2e-5)

    subclass = taken(place / "valueLayer_subclass.py", [
        "Classifier", "LDA_Layer", "PCA_Layer", "sub_dense_prediction", "valueLayer"], tools=tools)
    W, mean = np.random.default_rng(0).normal(size=(D, L)), np.random.default_rng(1).normal(size=D)
    centres = np.random.default_rng(2).normal(size=(C * k, L)).astype(np.float32)
    table = np.random.default_rng(3).dirichlet(np.ones(C * k), C * k).astype(np.float32)
    labels = torch.randint(0, C, (B,))
    with tempfile.TemporaryDirectory() as files:
        for name, value in (("c", centres), ("s", table), ("l_scalings", W), ("l_xbar", mean)):
            with open(f"{files}/{name}" + ".npy" * name.startswith("l_"), "wb") as file:
                np.save(file, value)
        inter = subclass.valueLayer(d, C, C * k, f"{files}/c", f"{files}/l", f"{files}/s",
                                    value_ratio=0.7)
    layer = letkd.KDLayer(d, C * k, 0.7)
    layer.value.weight.data = inter.conv_value.layers.weight.data.clone()
    match = tools.Conv2dCos(d, C * k, scale=3.0)
    layer.match.weight.data = match.weight.data.clone()
    x_hat, scores = layer(x)
    decisions = (torch.tensor(W.T).float(), torch.tensor(-W.T @ mean).float(),
                 torch.tensor(centres).view(C, k, L), torch.tensor(table))  # W, b, c_n, s_T
    loss = letkd.template_loss(scores, letkd.decision_targets(z, labels, *decisions))
    features, _, their_loss, _ = inter(z, match(x), x, labels, {})
    own = x, layer.match.weight, layer.value.weight
    their = x, match.weight, inter.conv_value.layers.weight
    report("LetKD layer `inter`: output, loss (12) (13), gradients",
           [x_hat, loss, *gradients(loss + x_hat.square().sum(), own)],
           [features, their_loss, *gradients(their_loss + features.square().sum(), their)], 5e-5)
    kd = taken(folder / "distillation/criterions/KD.py", ["DistillKL"])
    s, t = torch.randn(2, 8, 20)
    report("LetKD control (kd)", [letkd.scaled_kl(t, s, 4.0)], [kd.DistillKL(4.0)(s, t)], 2e-5)


# -------------------------------------------------------------------------------------------- TST
def check_tst(folder):
    """Their operations, encoders (their weights), gate, module and losses against ours."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv
    base = folder / "SDAKD_FOR_BASELINE"
    words = {"List": list, "Optional": Optional, "Tensor": torch.Tensor, "transforms": transforms,
             "InterpolationMode": InterpolationMode, "Parameter": nn.Parameter, "os": os}
    operations = taken(base / "datas/COLOR.py", ["_apply_op"], **{**words, "F": tv})
    space = taken(base / "datas/STN.py", ["Alignment"], **words).Alignment._augmentation_space
    values = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    levels, ours, theirs = space(None, 10, (32, 32)), [], []
    for name in tst.OPERATIONS[:-1]:
        sizes, signed = levels[name]
        for level, size in enumerate(sizes.view(-1).tolist()):
            for sign in (1, -1) if signed else (1,):
                theirs.append(operations._apply_op(values, name, sign * size,
                                                   InterpolationMode.NEAREST, None))
                ours.append(tst.exact(name, values, level, sign))
    report(f"TST operations: bytes, {len(ours)} levels and signs", [torch.stack(ours)],
           [torch.stack(theirs)], 1.01 / 255, "one level of 255: torchvision's v2 rounds otherwise")

    gate = taken(base / "datas/Augmention.py", ["relaxed_bernoulli"])
    logits = torch.randn(14)
    torch.manual_seed(3)
    own = tst.relaxed_bernoulli(logits, 0.05, torch.Generator().manual_seed(3))
    report("TST gate, eq. (3)", [own], [gate.relaxed_bernoulli(logits)], 1e-5)

    # their module with its own trained encoders; without noise
    changes = [("p = torch.sigmoid(self.probabilities)", "p = self.probabilities"),
               ("tran(image, _m)", "tran(image, _m, False)"),
               ("torch.load(path)", "torch.load(path, map_location='cpu')")]
    stn = taken(base / "datas/STN.py", ["FreezeSTN", "relaxed_bernoulli"], **words)
    color = taken(base / "datas/COLOR.py", ["ColorAugmentation", "relaxed_bernoulli"], **words)
    code = taken(base / "datas/Augmention.py", [
        "relaxed_bernoulli", "pre_tran", "LAMBDA_AUG", "_gen_cutout_coord", "Cutout",
        "Mulit_Augmentation"], changes, FreezeSTN=stn.FreezeSTN,
        ColorAugmentation=color.ColorAugmentation, _apply_op=operations._apply_op, **words)
    module = code.Mulit_Augmentation(str(base / "checkpoints/Augmentation"), "CIFAR", 4)
    encoders = []
    for their in module.learning_color_model_list:
        own = tst.ColorEncoder()
        own.f.data, own.kappa.data = their.feature.data, their.scale.data[0]
        own.G.data = (their.n_regress.weight + their.c_regress.weight).data
        own.J.data = their.conv.weight.data
        encoders.append(own)
    for their in module.learning_stn_model_list:
        own = tst.GeometricEncoder()
        own.h.data, own.W.data, own.b.data = their.H.data, their.fc.weight.data, their.fc.bias.data
        encoders.append(own)
    mean, std = common.CHANNEL_STATISTICS["cifar100"]
    augmenter = tst.Augmenter(encoders, torch.tensor(mean), torch.tensor(std))
    images = tst.from_bytes(values, augmenter.mean, augmenter.std)
    module.magnitudes.data, module.probabilities.data = torch.randn(11), 0.1 * torch.randn(14)
    augmenter.theta_m.data = module.magnitudes.data
    augmenter.theta_p.data = module.probabilities.data
    found = [], []
    with mock.patch.multiple(torch, randn=lambda *shape, **_: torch.zeros(*shape),
                             randn_like=torch.zeros_like):
        for seed in range(40):
            torch.manual_seed(seed)
            torch.rand(14)
            if 13 in torch.randperm(14)[:4]:
                continue  # the cutout's place: Python's random there, torch's here
            torch.manual_seed(seed)
            pairs = ((augmenter(images, torch.Generator().manual_seed(seed)),
                      (augmenter.theta_m, augmenter.theta_p)),
                     (module(images), (module.magnitudes, module.probabilities)))
            for part, (x, thetas) in zip(found, pairs):
                x.square().sum().backward()
                part += [x, *(theta.grad.clone() for theta in thetas)]
    report("TST module: x~, gradients by theta", *found, 1e-3,
           "their gate's logit is theta here; no inner gate, no noise, no cutout")

    critic = taken(base / "datas/SDAGAN.py", ["criticion", "ALRS"])
    t, s, y = *torch.randn(2, 16, 10), torch.randint(0, 10, (16,))
    loss_t, loss_s = critic.criticion("")(s, t, F.one_hot(y, 10))
    report("TST Stage II: L_T, L_S", tst.augmentation_loss(t, s, y)[1:], (loss_t, loss_s), 1e-5)
    kd = taken(base / "losses/KD.py", ["KDLoss"])
    report("TST Stage III: D", tst.distillation_loss(s, t, y)[:1], [kd.KDLoss(4)(s, t, y)], 1e-5)
    rule, rate = critic.ALRS(SimpleNamespace(param_groups=[{"lr": 0.01}])), [0.01]
    losses, rates = [2, 1.9, 1.89, 1.885, 1.95, 1.96, 1.93, 1.92], []
    for before, loss in zip([999, *losses], losses):
        rule.step(loss)
        rates.append(rule.optimizer.param_groups[0]["lr"])
        rate.append(tst.plateau(before, loss, rate[-1]))
    report("TST plateau rule", [rate[1:]], [rates], 1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for method in ("switokd", "letkd", "tst"):
        parser.add_argument(f"--{method}", type=Path, metavar="DIR", help="the authors' checkout")
    arguments = parser.parse_args()
    if not any(vars(arguments).values()):
        parser.error("name at least one checkout")
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    print(f"{'compared':52} {'pairs':>5} {'largest relative difference':>9}")
    for method, check in (("letkd", check_letkd), ("tst", check_tst), ("switokd", check_switokd)):
        if getattr(arguments, method):
            check(getattr(arguments, method))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
