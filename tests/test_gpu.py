"""A GPU that is not there: runs with `--device cuda` on CPU tensors that claim to lie on it.

A TorchFunctionMode sees every call of torch, also getters, factories and what nn, optim and
torchvision call. A tensor lies on the pretended GPU when its storage is marked: `.to("cuda")`
copies and marks, what a marked tensor gives is marked, `.cpu()` copies without the mark. Values are
the CPU's own, so that a run must end with the weights of the same run on the CPU, bit for bit.
As a real GPU does, it raises where tensors of both places meet (but for a CPU scalar in arithmetic
and CPU indices), for a CPU generator that is to draw there, and for numpy of what lies there.
`waits` lists (what, file:line) of all that makes the program wait for the GPU: .item(), bool(),
masks as indices, bincount, copies in either direction.

Two gaps. Not among the waits: those of torch.save and of the backward of a mask. Not simulated:
kernels and their rounding, dtypes of CUDA's autocast, memory, time.

By hand, `python tests/test_gpu.py rco.py --epochs 2 --device cuda`: the waits of a run, by line.
"""

import contextlib
import importlib
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, folder_of, same_run, stopped
from torch.overrides import TorchFunctionMode

import common
import rco

sys.path.append(str(ROOT / "docs"))
import tst_detection  # noqa: E402
import tst_segmentation  # noqa: E402

PROJECT, GPU = (ROOT, ROOT / "docs"), torch.device("cuda", 0)
READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__format__",
         "__contains__", "__repr__", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique",
         "bincount", "equal", "allclose", "linalg_eigh", "linalg_inv", "linalg_solve"}
STRICT = {  # no TensorIterator behind them: not even a scalar of the CPU may join
    "cat", "stack", "conv2d", "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm",
    "einsum", "gather", "index_select", "index_add_", "scatter_", "scatter_add_", "batch_norm",
    "cross_entropy", "nll_loss", "grid_sample", "_fused_sgd_", "_fused_adam_", "_fused_adamw_"}
ANYWHERE = {"copy_", "expand_as", "view_as", "reshape_as", "_has_compatible_shallow_copy_type",
            "is_same_size", "result_type", "promote_types", "can_cast", "_parse_to"}
INPLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__"}


def leaves(value):
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))


def there(tensor):
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def mark(value):
    for tensor in leaves(value):
        tensor.untyped_storage().on_gpu = True
    return value


def is_gpu(device):
    return isinstance(device, int) or device is not None and torch.device(device).type == "cuda"


def of_project(frame):
    return Path(frame.f_code.co_filename).parent in PROJECT


class PretendedGPU(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits = []

    def where(self):
        """file:line of the project's innermost frame."""
        frame = sys._getframe(2)
        while frame and not of_project(frame):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"

    def wait(self, what):
        self.waits.append((what, self.where()))

    def fail(self, name, text):
        raise RuntimeError(f"{self.where()}: {name}: {text}")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        owner = getattr(getattr(function, "__self__", None), "__name__", "")
        if name == "__get__":
            return self.attribute(owner, function, args)
        if name == "__set__":
            if owner == "grad" and len({there(one) for one in leaves(args)}) > 1:
                self.fail("grad", "lies elsewhere than its tensor")
            return function(*args, **kwargs)
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], torch.Tensor):
            return self.move(name, *args, **kwargs)
        tensors = [*leaves(args[:1] if name == "__deepcopy__" else args), *leaves(kwargs)]
        marks = [there(tensor) for tensor in tensors]
        first = bool(marks) and there(next(leaves(args), tensors[0]))
        target = is_gpu(kwargs.get("device"))
        if target:
            kwargs["device"] = "cpu"
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu" and (target or any(marks)):
            self.fail(name, "Expected a 'cuda' device type for generator but found 'cpu'")
        if name in ("numpy", "__array__") and any(marks):
            raise TypeError(f"{self.where()}: can't convert cuda:0 device type tensor to numpy")
        if any(marks):
            if not all(marks):
                self.check(name, args, kwargs, tensors, marks, first)
            self.count(name, args, kwargs, marks, first)
            if name.startswith("_fused_"):
                self.check_layout(name, args)
        elif target and name in ("tensor", "as_tensor", "asarray", "scalar_tensor"):
            self.wait("copy to the GPU")
        result = function(*args, **kwargs)
        elsewhere = "device" in kwargs and kwargs["device"] is not None and not target
        if target or any(marks) and name not in ANYWHERE and not elsewhere:
            mark(result)
        return result

    def attribute(self, owner, function, args):
        if not isinstance(args[0], torch.Tensor) or args[0].layout != torch.strided:
            return function(*args)
        marked = there(args[0])
        if owner == "device":
            return GPU if marked else function(*args)
        if owner in ("is_cuda", "is_cpu"):
            return marked == (owner == "is_cuda")
        result = function(*args)
        return mark(result) if marked else result

    def move(self, name, tensor, *args, **kwargs):
        copy, other = kwargs.pop("copy", False), next(leaves([args, kwargs]), None)
        dtype, quick = None, kwargs.get("non_blocking", False)
        form, goal = kwargs.get("memory_format"), name == "cuda"
        if other is not None:
            dtype, goal = other.dtype, there(other)
        elif name == "to":
            device, dtype, quick, form = torch._C._nn._parse_to(*args, **kwargs)
            goal = there(tensor) if device is None else device.type == "cuda"
        moved = goal != there(tensor)
        if moved and not (quick and goal):  # of few bytes also without pinned memory
            self.wait("copy to the GPU" if goal else "copy to the CPU")
        flags = {"memory_format": form} if form is not None else {}
        result = torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy or moved, **flags)
        return mark(result) if goal else result

    def check(self, name, args, kwargs, tensors, marks, first):
        """Raise as torch does where tensors of both places may not meet."""
        if name in ANYWHERE:
            if name == "copy_":
                self.wait("copy to the GPU" if first else "copy to the CPU")
            return
        strangers = [tensor for tensor, mark in zip(tensors, marks) if not mark]
        if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
            index, values = args[1], [*leaves(args[2:])]
            if not first and any(map(there, leaves(index))):
                self.fail(name, "indices should be on the device of the indexed tensor (cpu)")
            if first and any(not there(one) for one in leaves(index)):
                self.wait("indices from the CPU")
            if any(there(one) != first and (one.dim() or not first) for one in values):
                if [*leaves(index)]:
                    self.fail(name, "values lie elsewhere")
                self.wait("copy")
            return
        inplace = name in INPLACE or name.endswith("_") and not name.endswith("__")
        if name not in STRICT and not (inplace and not first) and "out" not in kwargs and all(
                one.dim() == 0 for one in strangers) and len(strangers) == 1:
            return  # a scalar of the CPU is read before the kernel starts
        self.fail(name, "Expected all tensors on the same device, but found two devices")

    def check_layout(self, name, lists):
        """CUDA's fused optimizers refuse gradients and states that are laid out otherwise."""
        lists = [one for one in lists if isinstance(one, (list, tuple)) and len(one)]
        for same in zip(*(one for one in lists if len(one) == len(lists[0]))):
            steps = {tuple(step for step, size in zip(one.stride(), one.shape) if size > 1)
                     for one in same if one.dim() == same[0].dim()}
            if len(steps) > 1:
                self.fail(name, f"strides {steps} of one parameter and its gradient or state")

    def count(self, name, args, kwargs, marks, first):
        if name in READS:
            self.wait(name.strip("_"))
        elif name == "new_tensor":
            self.wait("copy to the GPU")
        elif name in ("__getitem__", "__setitem__") and any(
                one.dtype == torch.bool and there(one) for one in leaves(args[1])):
            if name == "__getitem__" or [*leaves(args[2:])]:
                self.wait("mask as index")
        elif name == "repeat_interleave" and len(marks) > 1 and "output_size" not in kwargs:
            self.wait(name)


@contextlib.contextmanager
def pretended_gpu():
    """Yield the mode; the project, but not torch, sees a GPU, and CUDA's autocast is the CPU's."""
    autocast, grouped = torch.autocast, torch._C._group_tensors_by_device_and_dtype

    def groups(lists, *rest):  # C++ asks no mode
        device = GPU if all(map(there, leaves(lists[0]))) else torch.device("cpu")
        return {(device, key[1]): value for key, value in grouped(lists, *rest).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: of_project(sys._getframe(1)))
        patch.setattr(torch, "autocast", lambda kind, *rest, **flags: autocast(
            "cpu" if kind == "cuda" else kind, *rest, **flags))
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", groups)
        with PretendedGPU() as mode:
            yield mode


@pytest.mark.parametrize("call, says", [
    (lambda gpu, cpu: gpu + cpu, "devices"), (lambda gpu, cpu: cpu.add_(gpu[0]), "devices"),
    (lambda gpu, cpu: torch.cat([gpu, cpu]), "devices"), (lambda gpu, cpu: cpu[gpu], "indices"),
    (lambda gpu, cpu: gpu.numpy(), "numpy"), (lambda gpu, cpu: np.asarray(gpu), "numpy"),
    (lambda gpu, cpu: torch.rand(2, device="cuda", generator=torch.Generator()), "generator"),
    (lambda gpu, cpu: gpu.float().uniform_(generator=torch.Generator()), "generator")])
def test_the_pretended_gpu_raises_where_a_real_one_would(call, says):
    with pretended_gpu() as gpu, pytest.raises((RuntimeError, TypeError), match=says):
        call(torch.arange(2, device="cuda"), torch.arange(2))
    assert not gpu.waits


# ----------------------------------------------------------------------------------------- the runs
LETKD, TST = "--words 8 --per-class 2", "--fit-steps 2 --search-at 0 --search-epochs 1"
RUNS = {
    "rco": "--anchors 2 --method greedy kd",
    "rco mimic": "--transfer mimic --open-set 4 --anchors 1",
    "rco hint": "--transfer hint --anchors 2 --precision bf16 --teacher-weights 0.pt 1.pt",
    "switokd": "--method switokd kd",
    "switokd 1t2s": "--topology 1t2s --teacher resnet8 --student resnet8 resnet8x0.5",
    "trikd": "--epochs 1 --method TriKD kd born-again",
    "letkd": f"--method letKD-2 kd --teacher-weights 0.pt {LETKD}",
    "tst": f"--method TST 'kd twice' {TST}",
    "tst_segmentation": f"--batch-size 8 --method TST 'kd twice' {TST}",
    "tst_detection": f"--batch-size 8 --method TST 'kd twice' {TST}",
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "SHAPES_TRAIN", 120)
    for module in (tst_segmentation, tst_detection):
        monkeypatch.setattr(module, "SCENES", (24, 10))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", RUNS)
def test_a_run_killed_on_a_gpu_ends_as_on_the_cpu(run, case):
    """To the bit; Ctrl-C in the second epoch of the first method, then the same command again."""
    script, flags = case.split()[0], f"--batch-size 32 {RUNS[case]}"
    for seed in range(flags.count(".pt")):
        torch.save(common.build_model("resnet8", 20, 16, seed).state_dict(), f"{seed}.pt")
    run(script, "cpu", flags)
    with pretended_gpu() as gpu:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopped(patch, sys.modules[script], "train_step", 5)
            run(script, "gpu", f"--device cuda {flags}")
        assert "goes on after epoch 1" in run(script, "gpu", f"--device cuda {flags}")
    assert gpu.waits
    for folder in Path("cpu").glob("*-seed-0-*"):
        result = folder / "result.json"
        result.write_text(result.read_text().replace('"device": "cpu"', '"device": "cuda"'))
        assert same_run(folder, folder_of("gpu", folder.name.split("-seed-")[0]))


PIXELS = {"labels[where]": 6, "(pair[1] >= 0)": 3}
STEP_WAITS = {  # in one more step of both networks alone and of the method (of tst: II and III)
    "rco --transfer hint --anchors 1": {}, "trikd": {}, f"letkd {LETKD}": {},
    "switokd": {"torch.stack([G, delta, epsilon, s, t]).tolist()": 1},
    f"tst {TST} --operations 14": {},
    f"tst_segmentation --method random {TST} --operations 14": PIXELS}


@pytest.mark.parametrize("case", STEP_WAITS)
def test_how_often_a_step_waits_for_a_gpu(run, case):
    """By a part of the line, or of the next: of 3 steps an epoch in place of 2."""
    (script, _, flags), waits = case.partition(" "), []
    for steps in (2, 3):
        size = (24 if "segmentation" in script else 120) // steps
        with pretended_gpu() as gpu:
            run(script, "out", f"--device cuda --epochs 1 --batch-size {size} {flags} "
                f"--cache {steps}")
        waits.append(Counter(place for _, place in gpu.waits))
    found = Counter()
    for place, count in (waits[1] - waits[0]).items():
        file, line = place.split(":")
        path, = (part / file for part in PROJECT if (part / file).exists())
        text = "".join(path.read_text().splitlines()[int(line) - 1:int(line) + 1])
        found[next((part for part in STEP_WAITS[case] if part in text), place)] += count
    assert found == STEP_WAITS[case]


# --------------------------------------------------------------- --device, if none is typed: no GPU
BROKEN = "CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize("part", ["mark", "count", "all is well", "none"])
def test_usable_gpu_decides_the_default_of_device(monkeypatch, capsys, part):
    """On a GPU memory (`mark`) or a kernel (`count`) fails; all is well; or there is none."""
    fails, well = part in ("mark", "count"), part == "all is well"
    if fails:
        monkeypatch.setattr(sys.modules[__name__] if part == "mark" else PretendedGPU, part,
                            Mock(side_effect=RuntimeError(f"{BROKEN}\nCompile with ...")))
    with pretended_gpu(), pytest.MonkeyPatch.context() as patch:  # undone before the GPU is
        if part == "none":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        assert rco.parse_args([]).device.type == ("cuda" if well else "cpu")
        said = f"no GPU: {BROKEN}; the CPU is used\n" if fails else ""
        assert capsys.readouterr().out == said and common.usable_gpu() is well


if __name__ == "__main__":
    del sys.argv[0]
    with pretended_gpu() as gpu:
        importlib.import_module(Path(sys.argv[0]).stem).main()
    for (what, place), count in Counter(gpu.waits).most_common():
        print(f"{count:7} {place:24} {what}")
