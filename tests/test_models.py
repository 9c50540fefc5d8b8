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
}
STAGES = {  # (blocks, channels, side) of each stage for a 32x32 image, from the papers' tables
    "resnet8": [(1, 16, 32), (1, 32, 16), (1, 64, 8)],
    "resnet8x0.5": [(1, 8, 32), (1, 16, 16), (1, 32, 8)],
    "resnet8x4": [(1, 64, 32), (1, 128, 16), (1, 256, 8)],
    "resnet20": [(3, 16, 32), (3, 32, 16), (3, 64, 8)],
    "resnet110": [(18, 16, 32), (18, 32, 16), (18, 64, 8)],
    "wrn_16_2": [(2, 32, 32), (2, 64, 16), (2, 128, 8)],
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


def random_images(count=2, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator).to(**CHANNELS_LAST)


# ------------------------------------------------------------------------ sizes and interface
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert size_of(network(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", STAGES)
def test_blocks_width_and_side_of_every_stage(name):
    x = network(name).stem(random_images())
    for stage, (blocks, width, side) in zip(network(name).stages, STAGES[name], strict=True):
        x = stage(x)
        assert (len(stage), *x.shape[1:]) == (blocks, width, side, side)


@pytest.mark.parametrize("name", [*common.MODELS, "resnet8x0.5"])
@torch.no_grad()
def test_parts_run_by_hand_equal_forward(name):
    """stem, every block of every stage, neck, spatial mean, head: nothing else happens."""
    model, images = network(name), random_images()
    assert isinstance(model.stem, nn.Module) and isinstance(model.neck, nn.Module)
    assert isinstance(model.head, nn.Linear)
    assert all(isinstance(stage, nn.Sequential) and len(stage) for stage in model.stages)
    x = model.stem(images)
    for stage in model.stages:
        for block in stage:
            x = block(x)
    x = model.neck(x)
    logits, features, vector = model(images), model.forward_features(images), model.embed(images)
    assert torch.equal(x, features) and torch.equal(model.forward_head(x), logits)
    assert features.ndim == 4 and features.shape[:2] == (2, model.features)
    assert torch.equal(vector, features.mean(dim=(2, 3))) and vector.shape == (2, model.features)
    assert torch.equal(model.head(vector), logits) and logits.shape == (2, 100)
    assert logits[0].sub(logits[1]).abs().max() > 0  # it looks at the images


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "mobilenet_v2"])
def test_a_layer_can_be_put_between_two_blocks(name):
    """No line of common.py changes: appending to a stage is enough, and the layer trains."""
    model, images = common.build_model(name, 10, 32), random_images()
    with torch.no_grad():
        plain = model.stages[0](model.stem(images))
        channels = plain.shape[1]
        layer = nn.Conv2d(channels, channels, 1)
        expected = layer(plain)
        for stage in model.stages[1:]:
            expected = stage(expected)
        expected = model.head(model.neck(expected).mean((2, 3)))
    before = model(images)
    model.stages[0].append(layer)
    after = model(images)
    assert torch.equal(after, expected) and (after - before).abs().max() > 0.01
    after.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert any(parameter is layer.weight for parameter in model.parameters())


# ---------------------------------------------------------------- building: seed, layout, errors
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenetv2", "vgg8", "mobilenet_v2",
                                  "resnet18"])
def test_a_new_network_depends_on_the_seed_alone_and_is_channels_last(name):
    torch.manual_seed(1)
    one = common.build_model(name, 10, 32, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = common.build_model(name, 10, 32, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "building a network drew from the global RNG"
    assert one.training and same(one.state_dict(), two.state_dict())
    other = common.build_model(name, 10, 32, seed=4)
    assert not torch.equal(one.head.weight, other.head.weight)
    for a, b in zip(one.modules(), other.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert a.weight.is_contiguous(**CHANNELS_LAST) and not torch.equal(a.weight, b.weight)
        if isinstance(a, nn.BatchNorm2d):  # the trial forward of build_model is no batch
            assert a.num_batches_tracked == 0
            assert not a.running_mean.any() and (a.running_var == 1).all()
    assert one.forward_features(random_images()).is_contiguous(**CHANNELS_LAST)


SMALL_NETWORKS = """
import sys, torch, common
import torch.nn.functional as F
torch.set_num_threads(2)

def gradients(function, x, weight, gradient):
    x, weight = x.requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(function(x, weight), (x, weight), gradient)

def watch(layer, inputs, output):
    output.register_hook(lambda gradient: seen.update({layer: (inputs[0].detach(), gradient)}))

for name in sys.argv[1:]:
    network, seen, worst = common.build_model(name, 10, 16), {}, 0
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(watch)
    for batch in (9, 33, 64) if name[0] in 'rw' else [9]:
        images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        network(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        torch.optim.SGD(network.parameters(), 1e-3, fused=True).step()
        for layer, (x, gradient) in list(seen.items()):  # each layer against float64, contiguous
            def ours(x, weight):
                return torch.func.functional_call(layer, {"weight": weight}, x)
            def plain(x, weight):
                return F.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)
            exact = [value.double().contiguous() for value in (x, layer.weight, gradient)]
            for a, b in zip(gradients(ours, x, layer.weight, gradient), gradients(plain, *exact)):
                worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    print(name, "agrees" if worst < 1e-4 else f"differs by {worst}", flush=True)
"""


def test_small_networks_learn_with_two_threads():
    """oneDNN's backward of a 1x1 convolution with stride 2, channels_last, fewer input channels
    than its vector block (AVX2: 8, AVX-512: 16) and two threads writes past a buffer
    (uxlfoundation/oneDNN issue 6035): wrong gradients, a crash or a hang. `Conv1x1` avoids it.

    In a process of its own, since the other tests have one thread. 4 channels show it on AVX2.
    """
    names = ["resnet8x0.25", "resnet8x0.5", "resnet14x0.75", "resnet8", "wrn_16_1", "mobilenetv2",
             "vgg8"]
    done = subprocess.run([sys.executable, "-c", SMALL_NETWORKS, *names], capture_output=True,
                          text=True, timeout=100, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"})
    assert done.stdout.splitlines() == [f"{name} agrees" for name in names], done.stderr
    assert done.returncode == 0


def test_the_shortcut_is_a_strided_1x1_convolution(monkeypatch):
    """None that is strided reaches torch: what it breaks above depends on luck with the memory."""
    generator, conv2d, strides = torch.Generator().manual_seed(0), F.conv2d, []

    def spied(x, weight, bias=None, stride=1, *rest):
        strides.append(stride)
        return conv2d(x, weight, bias, stride, *rest)

    monkeypatch.setattr(F, "conv2d", spied)
    for side, stride in ((6, 2), (7, 2), (7, 3), (5, 1)):
        layer = common.Conv1x1(4, 6, stride, bias=True).double()
        x = torch.randn(3, 4, side, side, dtype=torch.float64, generator=generator)
        plain = conv2d(x, layer.weight, layer.bias, stride=stride)
        torch.testing.assert_close(layer(x), plain, rtol=1e-12, atol=1e-12)
    assert strides == [1] * 4
    for name in ("resnet8", "wrn_16_2", "mobilenetv2"):
        assert not any(type(layer) is nn.Conv2d and layer.kernel_size == (1, 1)
                       for layer in network(name).modules())


@pytest.mark.parametrize("name", ["alexnet", "resnet9", "resnet8y4", "resnet8x0.01", "resnet18x2"])
def test_unknown_name(name):
    with pytest.raises(common.InputError, match=f"no network is called '{name}'.*resnet8"):
        common.build_model(name, 10)


def test_images_too_small_have_a_name_and_other_errors_keep_theirs(monkeypatch):
    for name in ("vgg8", "vgg13"):
        with pytest.raises(common.InputError, match=f"{name} cannot take images of 4x4"):
            common.build_model(name, 10, image_size=4)
    monkeypatch.setattr(common.Network, "forward_head", lambda network, x: network.head(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        common.build_model("resnet8", 10)


# ------------------------------------------------------------------------------- torchvision's
def test_the_stem_of_torchvisions_resnet_follows_the_image_size():
    large = common.build_model("resnet18", 10, 224).stem
    assert large[0].kernel_size == (7, 7) and large[0].stride == (2, 2)
    assert any(isinstance(module, nn.MaxPool2d) for module in large)
    for side in (32, 64):
        small = common.build_model("resnet18", 10, side).stem
        assert small[0].kernel_size == (3, 3) and small[0].stride == (1, 1)
        assert not any(isinstance(module, nn.MaxPool2d) for module in small)


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
    """The block in float64, its batch norms drawn; a batch; the convolutions' weights; norms."""
    block = block.double().train(training)
    generator = torch.Generator().manual_seed(7)
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.copy_(2 * torch.rand(tensor.shape, generator=generator) + 0.5)
    convs = [module.weight for module in block.modules() if isinstance(module, nn.Conv2d)]
    images = 3 * torch.randn(4, inputs, 6, 6, dtype=torch.float64, generator=generator)
    return block, images, convs, norms


def normalised(x, norm, training):
    """Batch norm by definition: gamma (x - mean) / sqrt(var + 1e-5) + beta in each channel."""
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = norm.weight / (variance + 1e-5).sqrt()
    return scale[:, None, None] * (x - mean[:, None, None]) + norm.bias[:, None, None]


CASES = [(inputs, outputs, stride, training) for training in (True, False)
         for inputs, outputs, stride in ((4, 4, 1), (4, 6, 2), (4, 6, 1))]


@pytest.mark.parametrize(("inputs", "outputs", "stride", "training"), CASES)
def test_basic_block(inputs, outputs, stride, training):
    """He et al. 2016, Fig. 2: relu(bn(W2 relu(bn(W1 x))) + shortcut), option B for a new shape."""
    block, x, convs, norms = prepared(common.BasicBlock(inputs, outputs, stride), inputs, training)
    inner = F.conv2d(x, convs[0], stride=stride, padding=1)
    inner = normalised(inner, norms[0], training).clamp(min=0)
    inner = normalised(F.conv2d(inner, convs[1], padding=1), norms[1], training)
    shortcut, same = x, (inputs, stride) == (outputs, 1)
    if not same:
        shortcut = normalised(F.conv2d(x, convs[2], stride=stride), norms[2], training)
    expected = (inner + shortcut).clamp(min=0)
    assert len(convs) == len(norms) == (2 if same else 3)
    torch.testing.assert_close(block(x.clone()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs", "stride", "training"), CASES)
def test_wide_block(inputs, outputs, stride, training):
    """Zagoruyko and Komodakis 2016: a = relu(bn(x)); W2 relu(bn(W1 a)) + x, + Ws a if wider."""
    block, x, convs, norms = prepared(common.WideBlock(inputs, outputs, stride), inputs, training)
    active = normalised(x, norms[0], training).clamp(min=0)
    inner = F.conv2d(active, convs[0], stride=stride, padding=1)
    inner = normalised(inner, norms[1], training).clamp(min=0)
    shortcut = x if inputs == outputs else F.conv2d(active, convs[2], stride=stride)
    expected = F.conv2d(inner, convs[1], padding=1) + shortcut
    torch.testing.assert_close(block(x.clone()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs", "stride", "training"), [*CASES, (4, 4, 2, True)])
def test_inverted_residual(inputs, outputs, stride, training):
    """Expand, ReLU, depthwise, ReLU, project; plus x if the shapes agree."""
    block = common.InvertedResidual(inputs, outputs, stride, 6)
    block, x, convs, norms = prepared(block, inputs, training)
    hidden = normalised(F.conv2d(x, convs[0]), norms[0], training).clamp(min=0)
    assert hidden.shape[1] == 6 * inputs and hidden.max() > 6  # where ReLU6 would clip
    hidden = F.conv2d(hidden, convs[1], stride=stride, padding=1, groups=6 * inputs)
    hidden = normalised(hidden, norms[1], training).clamp(min=0)
    expected = normalised(F.conv2d(hidden, convs[2]), norms[2], training)
    if (inputs, stride) == (outputs, 1):
        expected = expected + x
    torch.testing.assert_close(block(x.clone()), expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------- frozen, evaluating
def test_frozen_is_a_copy_that_training_does_not_reach():
    model, images = common.build_model("resnet8", 10, 32), random_images(8)
    model(images)  # batch-norm statistics of its own
    copy = common.frozen(model)
    assert same(copy.state_dict(), model.state_dict())
    assert not any(module.training for module in copy.modules())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    logits, before = copy(images), {name: x.clone() for name, x in copy.state_dict().items()}
    assert not logits.requires_grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images), torch.arange(8)).backward()
    optimizer.step()
    assert same(copy.state_dict(), before) and torch.equal(copy(images), logits)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} did not train, the test shows nothing"


def test_frozen_drops_what_is_patched_onto_the_network_or_a_part_of_it():
    """A wrapped method (torch.compile, autocast) would go on running the original's weights."""
    images = random_images()
    expected = common.frozen(common.build_model("resnet8", 10))(images)
    for method, path in (("forward", ""), ("forward_features", ""), ("forward", "stages.1.0.body"),
                         ("forward", "head"), ("forward_features", "inner")):
        model = common.build_model("resnet8", 10)
        model.inner = common.build_model("resnet8", 10)
        part = model.get_submodule(path)
        original = getattr(part, method)
        setattr(part, method, lambda x, original=original: original(x) + 1)
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
            assert not any(module.training for module in parts)
            assert not torch.is_grad_enabled()
            if error:
                raise error
        assert [module.training for module in parts] == modes and torch.is_grad_enabled()
