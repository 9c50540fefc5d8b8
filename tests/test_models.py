"""Block 3 of common.py: networks against published sizes, blocks by formula; evaluation."""

import contextlib
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same
from torch import nn
from torchvision import models

import common

PARAMETERS = {  # 100 classes, 32x32: the sizes reported by the CIFAR-100 distillation literature
    "resnet8": 83_892, "resnet56": 861_620, "resnet110": 1_736_564, "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_2": 2_255_156, "vgg8": 3_965_028,
    "vgg13": 9_462_180, "mobilenetv2": 812_836, "resnet50": 23_705_252,
    "resnet8x0.5": 22_924,  # by hand: stem 232, stages 1,184 + 3,680 + 14,528, head 3,300
}
STAGES = {  # blocks x channels x side of each stage for a 32x32 image, from the papers' tables
    "resnet8x0.5": "1x8x32 1x16x16 1x32x8", "wrn_40_2": "6x32x32 6x64x16 6x128x8",
    "vgg8": "1x64x32 1x128x16 1x256x8 1x512x4 1x512x4",
    "mobilenetv2": "1x8x16 2x12x16 3x16x8 4x32x4 3x48x4 3x80x2 1x160x2",
    "resnet18": "2x64x32 2x128x16 2x256x8 2x512x4",
    "resnet50": "3x256x32 4x512x16 6x1024x8 3x2048x4",
    "mobilenet_v2": "1x16x16 2x24x8 3x32x4 4x64x2 3x96x2 3x160x1 1x320x1",
}
CHANNELS_LAST = {"memory_format": torch.channels_last}


def size_of(name, classes, image_size):
    with torch.device("meta"):  # shapes alone
        model = common.build_model(name, classes, image_size)
    return sum(parameter.numel() for parameter in model.parameters())


def random_images(count=2, side=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator).to(**CHANNELS_LAST)


# ------------------------------------------------------------------------ sizes and interface
def test_parameter_counts():
    assert {name: size_of(name, 100, 32) for name in PARAMETERS} == PARAMETERS


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_parts_run_by_hand_equal_forward(name):
    """Stem, every block of every stage, neck, spatial mean, head: nothing else happens."""
    model, images = common.build_model(name, 100).eval(), random_images()
    x, shapes = model.stem(images), []
    for stage in model.stages:
        for block in stage:
            x = block(x)
        shapes.append(f"{len(stage)}x{x.shape[1]}x{x.shape[3]}")
    assert " ".join(shapes) == STAGES[name]
    x = model.neck(x)
    logits, features, vector = model(images), model.forward_features(images), model.embed(images)
    assert torch.equal(x, features) and torch.equal(model.forward_head(x), logits)
    assert features.is_contiguous(**CHANNELS_LAST)
    assert torch.equal(vector, features.mean(dim=(2, 3))) and vector.shape == (2, model.features)
    assert torch.equal(model.head(vector), logits) and logits.shape == (2, 100)
    assert (logits[0] - logits[1]).abs().max() > 0  # it looks at the images


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v2"])
def test_a_new_network_depends_on_the_seed_alone(name):
    built = []
    for seed in (3, 3, 4):
        before = torch.manual_seed(len(built)).get_state()
        built.append(common.build_model(name, 10, 32, seed))
        assert torch.equal(torch.get_rng_state(), before)  # drawn from a generator of its own
    one, two, other = built
    assert one.training and same(one.state_dict(), two.state_dict())
    assert not torch.equal(one.head.weight, other.head.weight)
    for a, b in zip(one.modules(), other.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert a.weight.is_contiguous(**CHANNELS_LAST) and not torch.equal(a.weight, b.weight)
            wanted = (2 / (a.weight[0, 0].numel() * len(a.weight))) ** 0.5  # He et al. 2015
            assert a.weight.std().item() == pytest.approx(wanted, rel=4 / a.weight.numel() ** 0.5)


def test_tensors_come_in_the_order_of_repdistillers_files():
    """Its names are others: conv1, bn1; of a block conv1, bn1, conv2, bn2, the shortcut; fc."""
    expected, inputs = [(16, 3, 3, 3), *[(16,)] * 4], 16
    for D in (16, 32, 64):
        expected += [(D, inputs, 3, 3), *[(D,)] * 4, (D, D, 3, 3), *[(D,)] * 4]
        expected += [(D, inputs, 1, 1), *[(D,)] * 4] if D != inputs else []
        inputs = D
    found = common.build_model("resnet8", 10).state_dict().values()
    assert [tuple(value.shape) for value in found if value.dim()] == [*expected, (10, 64), (10,)]


TWO_THREADS = """
import copy, torch, common
torch.set_num_threads(2)
network = common.build_model("resnet8x0.25", 10, 16)
exact = copy.deepcopy(network).double().to(memory_format=torch.contiguous_format)
for batch in (9, 33, 64):
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    network(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    exact(x.double()).square().sum().backward()
for a, b in zip(network.parameters(), exact.parameters()):
    assert (a.grad - b.grad).norm() < 1e-2 * b.grad.norm() + 1e-4
"""


def test_small_networks_learn_with_two_threads():
    """What oneDNN gets wrong there, or crashes or hangs in: see `conv_bn`. Its own process, since
    the other tests have one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, "-c", TWO_THREADS], cwd=ROOT, env=environment, timeout=100,
                   check=True)


def test_at_224_it_is_torchvisions_network_and_loads_its_files(tmp_path):
    for side, shape in ((64, (64, 64, 64)), (65, (64, 17, 17))):  # from there a stem of stride 4
        stem = common.build_model("resnet18", 10, side).stem
        assert stem(random_images(side=side)).shape[1:] == shape
    published = {"resnet18": 11_689_512, "resnet34": 21_797_672, "mobilenet_v2": 3_504_872}
    assert {name: size_of(name, 1000, 224) for name in published} == published
    for name in ("resnet18", "mobilenet_v2"):
        theirs, images = getattr(models, name)(num_classes=10).eval(), random_images(side=64)
        torch.save(theirs.state_dict(), tmp_path / "t.pt")
        ours = common.load_weights(common.build_model(name, 10, 224), tmp_path / "t.pt").eval()
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------- the blocks, from their papers
def basic_block(x, W, norms, stride, new):
    """He et al. 2016, Fig. 2: relu(bn(W2 relu(bn(W1 x))) + shortcut), option B for a new shape."""
    inner = norms[0](F.conv2d(x, W[0], stride=stride, padding=1)).clamp(min=0)
    inner = norms[1](F.conv2d(inner, W[1], padding=1))
    return (inner + (norms[2](F.conv2d(x, W[2], stride=stride)) if new else x)).clamp(min=0)


def wide_block(x, W, norms, stride, new):
    """Zagoruyko and Komodakis 2016: a = relu(bn(x)); W2 relu(bn(W1 a)) + x, + Ws a if wider."""
    active = norms[0](x).clamp(min=0)
    inner = norms[1](F.conv2d(active, W[0], stride=stride, padding=1)).clamp(min=0)
    return F.conv2d(inner, W[1], padding=1) + (F.conv2d(active, W[2], stride=stride) if new else x)


def inverted_block(x, W, norms, stride, new):
    """Sandler et al. 2018: expand, depthwise, project; plus x if the shapes agree. ReLU, not ReLU6.
    """
    hidden = norms[0](F.conv2d(x, W[0])).clamp(min=0)
    assert hidden.shape[1] == 24 and hidden.max() > 6  # where ReLU6 would clip
    hidden = norms[1](F.conv2d(hidden, W[1], stride=stride, padding=1, groups=24)).clamp(min=0)
    return norms[2](F.conv2d(hidden, W[2])) + (0 if new else x)


@pytest.mark.parametrize("formula, shape", [
    *((formula, shape) for formula in (basic_block, wide_block, inverted_block)
      for shape in ((4, 4, 1), (4, 6, 2), (4, 6, 1))), (inverted_block, (4, 4, 2))])
def test_block_by_its_formula(formula, shape):
    expansion = [6] if formula is inverted_block else []
    for training in (True, False):
        block = getattr(common, formula.__name__)(*shape, *expansion).double().train(training)
        norms, convolutions = ([layer for layer in block.modules() if isinstance(layer, kind)]
                               for kind in (nn.BatchNorm2d, nn.Conv2d))
        for norm in norms:
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 2.5)
        x = 3 * torch.randn(4, 4, 6, 7, dtype=torch.float64)
        W = [layer.weight for layer in convolutions]
        expected = formula(x, W, norms, shape[2], shape != (4, 4, 1))
        torch.testing.assert_close(block(x.clone()), expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------- frozen, evaluating
def test_evaluating_gives_every_module_its_own_mode_back():
    model, other = (common.build_model("resnet8", 10) for _ in range(2))
    model.stages[1].eval()
    other.eval().stages[1][0][0].body[1].train()
    parts = [*model.modules(), *other.modules()]
    modes = [module.training for module in parts]
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), common.evaluating(model, other):
            assert not any(module.training for module in parts) and not torch.is_grad_enabled()
            if error:
                raise error
        assert [module.training for module in parts] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_1", "vgg8", "mobilenetv2", "resnet18"])
@torch.no_grad()
def test_frozen_and_folded_copies_give_the_same_logits_and_stay(name):
    """Folded: to float32's last digits, without batch norm; where it comes first (`wide_block`) it
    stays."""
    model, images = common.build_model(name, 10, 32), random_images(8)
    model(images)  # statistics of its own
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    plain, twin = common.frozen(model), common.folded(model)
    left = sum(isinstance(part, nn.BatchNorm2d) for part in twin.modules())
    assert left == {"wrn_16_1": 7}.get(name, 0)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with common.evaluating(model):
        logits = model(images)
    for value in model.state_dict().values():
        value.add_(1)  # as training does, in place
    for copy, tolerance in ((plain, 0), (twin, 1e-4)):
        torch.testing.assert_close(copy(images), logits, rtol=tolerance, atol=tolerance)
        assert not any(part.training for part in copy.modules())
        assert not any(parameter.requires_grad for parameter in copy.parameters())


@pytest.mark.parametrize("make", [common.frozen, common.folded])
def test_a_frozen_network_for_bf16_is_cast_once(make):
    """Logits and the images' gradients as if autocast had cast it anew, to the bit; batch norms
    stay in float32, as under autocast, and so do copies for fp32 and the network."""
    model, found = common.build_model("wrn_16_1", 10, 32), []
    images = random_images(4).requires_grad_()
    for copy in (make(model), make(model, "bf16")):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as trace:
            logits = copy(images)
        names = [event.name for event in trace.events()]
        found.append((logits, *torch.autograd.grad(logits.square().sum(), images),
                      names.count("aten::_to_copy"), [one.dtype for one in copy.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    (_, _, before, _), (_, _, after, dtypes) = found
    assert before - after == dtypes.count(torch.bfloat16) > 16 and torch.float32 in dtypes
    assert {value.dtype for value in (*model.parameters(), *make(model).parameters())} == {
        torch.float32}


def test_evaluation_equals_counting_by_hand():
    """More than one batch of 500, with a last single image; labels below 0 are unknown."""
    images, _, _ = common.make_shapes(501, seed=4)
    mean, std = torch.tensor([[0.3, 0.4, 0.5], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    network = common.build_model("resnet8x0.5", 20, 16)
    with torch.no_grad():
        network(torch.rand(64, 3, 16, 16))  # moves the batch-norm statistics
        guess = common.frozen(network)((images / 255 - mean) / std).argmax(1)
    labels = torch.where(torch.arange(501) % 3 == 0, (guess + 1) % 20, guess)  # 167 are wrong
    labels[1:301:3] = -1  # 100 of those that were right
    split, before = common.Split(images, labels, mean, std), common.frozen(network).state_dict()
    cpu, always_7 = Namespace(device=torch.device("cpu"), precision="fp32"), torch.eye(20)[7]
    assert common.evaluate(network, split, cpu) == pytest.approx(100 * 234 / 401)
    assert network.training and same(network.state_dict(), before)
    given = common.evaluate(network, split, cpu, lambda x: always_7.repeat(len(x), 1))
    assert given == pytest.approx(100 * (labels == 7).sum().item() / 401) and given > 0
