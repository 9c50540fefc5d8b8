"""Block 3 of common.py: networks against published sizes, blocks against their papers' formulas."""

import contextlib
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same
from torch import nn

import common

PARAMETERS = {  # 100 classes, 32x32: the sizes reported by the CIFAR-100 distillation literature
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756,
    "resnet44": 667_188, "resnet56": 861_620, "resnet110": 1_736_564, "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860, "wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156, "vgg8": 3_965_028, "vgg13": 9_462_180, "mobilenetv2": 812_836,
    "resnet50": 23_705_252,
    "resnet8x0.5": 22_924,  # by hand: stem 232, stages 1,184 + 3,680 + 14,528, head 3,300
    "wrn_16_8": 11_007_540, "wrn_16_10": 17_174_324,  # by hand, as wrn_16_1 and wrn_16_2
}
STAGES = {  # (blocks, channels, side) of each stage for a 32x32 image, from the papers' tables
    "resnet8x0.5": [(1, 8, 32), (1, 16, 16), (1, 32, 8)],
    "resnet110": [(18, 16, 32), (18, 32, 16), (18, 64, 8)],
    "wrn_16_1": [(2, 16, 32), (2, 32, 16), (2, 64, 8)],
    "wrn_40_2": [(6, 32, 32), (6, 64, 16), (6, 128, 8)],
    "vgg8": [(1, 64, 32), (2, 128, 16), (2, 256, 8), (2, 512, 4), (1, 512, 4)],  # 2: with a pooling
    "mobilenetv2": [(1, 8, 16), (2, 12, 16), (3, 16, 8), (4, 32, 4), (3, 48, 4), (3, 80, 2),
                    (1, 160, 2)],
    "resnet18": [(2, 64, 32), (2, 128, 16), (2, 256, 8), (2, 512, 4)],
    "resnet50": [(3, 256, 32), (4, 512, 16), (6, 1024, 8), (3, 2048, 4)],
    "mobilenet_v2": [(1, 16, 16), (2, 24, 8), (3, 32, 4), (4, 64, 2), (3, 96, 2), (3, 160, 1),
                     (1, 320, 1)],
}
CHANNELS_LAST = {"memory_format": torch.channels_last}


@cache
def network(name):
    """The network in eval mode, built once; tests that change a network build their own."""
    return common.build_model(name, 100, 32, seed=0).eval()


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def random_images(count=2, side=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator).to(**CHANNELS_LAST)


# ------------------------------------------------------------------------ sizes and interface
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert size_of(network(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_parts_run_by_hand_equal_forward(name):
    """Stem, every block of every stage, neck, spatial mean, head: nothing else happens."""
    model, images = network(name), random_images()
    x = model.stem(images)
    for stage, (blocks, width, side) in zip(model.stages, STAGES[name], strict=True):
        for block in stage:
            x = block(x)
        assert (len(stage), *x.shape[1:]) == (blocks, width, side, side)
    x = model.neck(x)
    logits, features, vector = model(images), model.forward_features(images), model.embed(images)
    assert torch.equal(x, features) and torch.equal(model.forward_head(x), logits)
    assert features.is_contiguous(**CHANNELS_LAST)
    assert torch.equal(vector, features.mean(dim=(2, 3))) and vector.shape == (2, model.features)
    assert torch.equal(model.head(vector), logits) and logits.shape == (2, 100)
    assert (logits[0] - logits[1]).abs().max() > 0  # it looks at the images


# ---------------------------------------------------------------- building: seed, layout, errors
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v2"])
def test_a_new_network_depends_on_the_seed_alone(name):
    before, built = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        built.append(common.build_model(name, 10, 32, seed))
        assert torch.equal(torch.get_rng_state(), before)  # drawn from a generator of its own
        torch.manual_seed(len(built))
        before = torch.get_rng_state()
    one, two, other = built
    assert one.training and same(one.state_dict(), two.state_dict())
    assert not torch.equal(one.head.weight, other.head.weight)
    for a, b in zip(one.modules(), other.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert a.weight.is_contiguous(**CHANNELS_LAST) and not torch.equal(a.weight, b.weight)
        if isinstance(a, nn.BatchNorm2d):  # the trial forward of build_model is no batch
            assert a.num_batches_tracked == 0 and not a.running_mean.any()


TWO_THREADS = """
import copy, torch, common
torch.set_num_threads(2)
for width in ("0.25", "0.5"):
    network = common.build_model("resnet8x" + width, 10, 16)
    exact = copy.deepcopy(network).double().to(memory_format=torch.contiguous_format)
    for batch in (9, 33, 64):
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        network(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        exact(x.double()).square().sum().backward()
    for (name, a), b in zip(network.named_parameters(), exact.parameters()):
        assert (a.grad - b.grad).norm() < 1e-2 * b.grad.norm() + 1e-4, (width, name)
"""


def test_small_networks_learn_with_two_threads():
    """What oneDNN gets wrong there, or crashes or hangs in: see `Conv1x1`. Its own process, since
    the other tests have one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, "-c", TWO_THREADS], cwd=ROOT, env=environment, timeout=100,
                   check=True)


def test_the_shortcut_is_a_strided_1x1_convolution():
    for side, stride in ((6, 2), (7, 2), (7, 3), (5, 1)):
        layer = common.Conv1x1(4, 6, stride, bias=True).double()
        x = torch.randn(3, 4, side, side + 1, dtype=torch.float64)
        plain = F.conv2d(x, layer.weight, layer.bias, stride=stride)
        torch.testing.assert_close(layer(x), plain, rtol=1e-12, atol=1e-12)
    for name in ("resnet8", "wrn_16_2", "mobilenetv2"):  # torch's own has the fault above
        assert not any(type(layer) is nn.Conv2d and layer.kernel_size == (1, 1)
                       for layer in network(name).modules())


@pytest.mark.parametrize("name", ["alexnet", "resnet9", "resnet8y4", "resnet8x0.01", "resnet18x2"])
def test_a_name_that_there_is_not(name):
    with pytest.raises(common.InputError, match=f"no network is called '{name}'.*resnet8"):
        common.build_model(name, 10)


# ------------------------------------------------------------------------------- torchvision's
@pytest.mark.parametrize("side, shape", [(64, (64, 64, 64)), (65, (64, 17, 17))])
def test_the_stem_of_torchvisions_resnet_follows_the_image_size(side, shape):
    """3x3 with stride 1 up to 64 pixels; 7x7 with stride 2 and pooling from there."""
    stem = common.build_model("resnet18", 10, side).stem
    assert stem(random_images(side=side)).shape[1:] == shape
    assert stem[0].kernel_size == ((3, 3) if side == 64 else (7, 7))


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("resnet34", 21_797_672),
                                                 ("mobilenet_v2", 3_504_872)])
def test_at_224_it_is_torchvisions_network(name, published):
    """Same parameter count, and with torchvision's weights the same logits."""
    from torchvision import models
    ours = common.build_model(name, 1000, 224).eval()
    theirs = getattr(models, name)(num_classes=1000).eval()
    assert size_of(ours) == size_of(theirs) == published
    weights = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    images = random_images(side=64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------- the blocks, from their papers
def prepared(block, inputs, training):
    """The block in float64, a batch, and its convolutions' weights and batch norms, in order."""
    block = block.double().train(training)
    layers = [*block.modules()]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2.5)
    x = 3 * torch.randn(4, inputs, 6, 6, dtype=torch.float64)
    return block, x, [layer.weight for layer in layers if isinstance(layer, nn.Conv2d)], norms


def basic(inputs, outputs, stride, training):
    """He et al. 2016, Fig. 2: relu(bn(W2 relu(bn(W1 x))) + shortcut), option B for a new shape."""
    block, x, convs, norms = prepared(common.BasicBlock(inputs, outputs, stride), inputs, training)
    inner = norms[0](F.conv2d(x, convs[0], stride=stride, padding=1)).clamp(min=0)
    inner = norms[1](F.conv2d(inner, convs[1], padding=1))
    unchanged = (inputs, stride) == (outputs, 1)
    shortcut = x if unchanged else norms[2](F.conv2d(x, convs[2], stride=stride))
    return block, x, (inner + shortcut).clamp(min=0)


def wide(inputs, outputs, stride, training):
    """Zagoruyko and Komodakis 2016: a = relu(bn(x)); W2 relu(bn(W1 a)) + x, + Ws a if wider."""
    block, x, convs, norms = prepared(common.WideBlock(inputs, outputs, stride), inputs, training)
    active = norms[0](x).clamp(min=0)
    inner = norms[1](F.conv2d(active, convs[0], stride=stride, padding=1)).clamp(min=0)
    shortcut = x if inputs == outputs else F.conv2d(active, convs[2], stride=stride)
    return block, x, F.conv2d(inner, convs[1], padding=1) + shortcut


def inverted(inputs, outputs, stride, training):
    """Sandler et al. 2018: expand, depthwise, project; plus x if the shapes agree. ReLU, not ReLU6.
    """
    block = common.InvertedResidual(inputs, outputs, stride, 6)
    block, x, convs, norms = prepared(block, inputs, training)
    hidden = norms[0](F.conv2d(x, convs[0])).clamp(min=0)
    assert hidden.shape[1] == 6 * inputs and hidden.max() > 6  # where ReLU6 would clip
    hidden = norms[1](F.conv2d(hidden, convs[1], stride=stride, padding=1, groups=6 * inputs))
    hidden = norms[2](F.conv2d(hidden.clamp(min=0), convs[2]))
    return block, x, hidden + x if (inputs, stride) == (outputs, 1) else hidden


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("formula, shape", [
    *((formula, shape) for formula in (basic, wide, inverted)
      for shape in ((4, 4, 1), (4, 6, 2), (4, 6, 1))), (inverted, (4, 4, 2))])
def test_block_by_its_formula(formula, shape, training):
    block, x, expected = formula(*shape, training)
    torch.testing.assert_close(block(x.clone()), expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------- frozen, evaluating
def test_frozen_is_a_copy_that_training_does_not_reach():
    model, images = common.build_model("resnet8", 10, 32), random_images(8)
    model(images)  # batch-norm statistics of its own
    copy, before = common.frozen(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert not any(module.training for module in copy.modules())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    F.cross_entropy(model(images), torch.arange(8)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert same(copy.state_dict(), before)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method, path", [
    ("forward", ""), ("forward_features", ""), ("forward", "head"), ("forward_features", "inner")])
def test_frozen_drops_what_is_patched_onto_the_network_or_a_part_of_it(method, path):
    """A wrapped method (torch.compile, autocast) would go on running the original's weights."""
    model, images = common.build_model("resnet8", 10), random_images()
    model.inner = common.build_model("resnet8", 10)
    expected, part = common.frozen(model)(images), model.get_submodule(path)
    original = getattr(part, method)
    setattr(part, method, lambda x: original(x) + 1)
    copy = common.frozen(model)
    assert torch.equal(copy(images), expected)
    assert method not in vars(copy.get_submodule(path)) and method in vars(part)


def test_evaluating_gives_every_module_its_own_mode_back():
    model, other = (common.build_model("resnet8", 10) for _ in range(2))
    model.stages[1].eval()
    model.stages[1][0].body[1].train()
    other.eval().head.train()
    parts = [*model.modules(), *other.modules()]
    modes = [module.training for module in parts]
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), common.evaluating(model, other):
            assert not any(module.training for module in parts) and not torch.is_grad_enabled()
            if error:
                raise error
        assert [module.training for module in parts] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_1", "vgg8", "mobilenetv2", "resnet18",
                                  "mobilenet_v2"])
@torch.no_grad()
def test_folded_gives_the_same_logits_without_batch_norm(name):
    """Up to float32's last digits; where a norm comes first (WideBlock) it stays; no gradients."""
    model, images = common.build_model(name, 10, 32), random_images(8)
    model(images)  # statistics of its own
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    plain, twin = common.frozen(model), common.folded(model)
    torch.testing.assert_close(twin(images), plain(images), rtol=1e-4, atol=1e-4)
    left = sum(isinstance(part, nn.BatchNorm2d) for part in twin.modules())
    assert left == {"wrn_16_1": 7}.get(name, 0) and model.training
    assert not any(part.training for part in twin.modules())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
