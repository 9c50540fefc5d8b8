"""Speed, run by hand: `python tests/benchmark.py` (a few minutes on 2 CPU cores), --device cuda.

Loader: images per second of the batched crop and flip against torchvision's per-image pipeline.
Step: one training step as the script runs it, loader and record included, against its floor: on
ready tensors the forwards of the frozen networks, and forward, backward and optimiser step of those
that learn, by cross-entropy; in TST on what the augmenter makes of them. The two take turns.
With --device cuda also, of a step and of its floor: kernels and copies, their ms, the ms in which
the host sends them, how often it waits, peak memory (written without a GPU, not run on one yet).
"""

import argparse
import contextlib
import functools
import io
import itertools
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402

import common  # noqa: E402
import letkd  # noqa: E402
import rco  # noqa: E402
import switokd  # noqa: E402
import trikd  # noqa: E402
import tst  # noqa: E402


def in_turns(ours, other, device):
    """Median seconds of each, and the median ratio ours / other, of 7 rounds after a warm-up."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(function):
        finish()
        start = time.perf_counter()
        function()
        finish()
        return time.perf_counter() - start

    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(7)]
    return (*map(statistics.median, zip(*pairs)), statistics.median(a / b for a, b in pairs))


def on_gpu(epoch, steps):
    """Of a step of `epoch`: kernels and copies, their ms, the host's ms, waits; and peak MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        start = time.perf_counter()
        epoch()
        host = time.perf_counter() - start
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        epoch()
        torch.cuda.synchronize()
    kernels = [event.device_time_total for event in trace.events()
               if event.device_type == torch.autograd.DeviceType.CUDA]  # microseconds
    every = (len(kernels), sum(kernels) / 1000, 1000 * host, len(waits))
    return *(value / steps for value in every), torch.cuda.max_memory_allocated() / 2**20


def loader(device, count=4096, batch=64):
    """An epoch by common.py, and one image by image, as functions."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(value) for value in common.CHANNEL_STATISTICS["cifar10"])
    split = common.Split(*(value.to(device) for value in (
        images, torch.zeros(count).long(), mean.view(3, 1, 1), std.view(3, 1, 1))))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pipeline = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())])

    def ours():
        for _ in split.augmented(batch, torch.Generator()):
            pass

    def one_by_one():
        for start in range(0, count, batch):
            torch.stack([*map(pipeline, pictures[start:start + batch])]).to(device)
    return ours, one_by_one


class Setting:
    """A method's flags, its data, an epoch of `steps` batches, also as ready tensors; networks."""

    def __init__(self, script, method, device, precision, teacher, student, size, batch, steps):
        arguments = script.parse_args([
            "--teacher", teacher, "--student", student, "--image-size", str(size), "--batch-size",
            str(batch), "--device", str(device), "--precision", precision])
        changes, _ = script.METHODS[method]
        changes = changes(arguments) if callable(changes) else changes
        self.flags = argparse.Namespace(**{**vars(arguments), **changes, "seed": 0, "rows": 20_000})
        self.data = common.load_data(self.flags)
        train, part = self.data.train, slice(steps * batch)
        self.split = common.Split(train.images[part], train.labels[part], train.mean, train.std)
        self.generator = torch.Generator().manual_seed(0)
        self.ready = list(self.split.augmented(batch, self.generator))
        self.student = self.data.build(student).to(device)
        self.teacher = self.data.build(teacher).to(device)

    def sgd(self, *networks):
        return common.sgd([one for network in networks for one in network.parameters()], self.flags)

    def step(self, train_step):
        """An epoch as a script runs it; `train_step`: images, labels -> terms, logits."""
        mean = common.Mean()
        for images, labels in self.split.augmented(self.flags.batch_size, self.generator):
            mean.add(*train_step(images, labels), labels)

    def floor(self, optimizer, learners, frozen, inputs=lambda *batch: batch):
        """`inputs`: images, labels -> what the networks see and shall say."""
        for images, labels in itertools.starmap(inputs, self.ready):
            with common.autocast(self.flags):
                with torch.no_grad():
                    for network in frozen:
                        network(images)
                z = [network(images) for network in learners]
            loss = sum(F.cross_entropy(logits.float(), labels) for logits in z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# Each returns the networks that learn, those that are frozen, a step of the script and, where the
# networks see other images than those of the batch, the floor's `inputs`.
def rco_step(of):
    teacher = common.folded(of.teacher, of.flags.precision)
    student = rco.build_student(of.data, teacher.features, of.flags)
    sgd = of.sgd(student)
    return [student], [teacher], lambda *batch: rco.train_step(
        student, teacher, sgd, *batch, of.flags)


def switokd_step(of):
    students, teachers = {"student": of.student}, {"teacher": of.teacher}
    sgd = {name: of.sgd(network) for name, network in (students | teachers).items()}

    def step(*batch):
        losses, logits, _ = switokd.train_step(students, teachers, sgd, *batch, of.flags)
        return losses, logits["student"]
    return [of.student, of.teacher], [], step


def trikd_step(of):
    both = trikd.new_learners(1, of.data, of.flags)
    anchor = common.frozen(of.student, of.flags.precision)
    weights, sgd = {role: trikd.weights_of(role, of.flags) for role in both}, of.sgd(both)
    return [*both.values()], [anchor], lambda *batch: trikd.train_step(
        both["student"], both["teacher"], anchor, sgd, *batch, weights, of.flags)


def letkd_step(of):
    flags, C = of.flags, of.data.classes
    targets = [*letkd.fit_targets(of.teacher, of.data, flags).values()]
    teacher = common.folded(of.teacher, flags.precision)
    student = letkd.build_student(flags.student, C, of.data.image_size, C * flags.per_class,
                                  flags.words).to(flags.device)
    sgd = of.sgd(student)
    return [student], [teacher], lambda *batch: letkd.train_step(
        student, teacher, targets, sgd, *batch, flags)


def tst_step(of):
    """Stage III: the student on B augmented and B original images."""
    teacher = common.folded(of.teacher, of.flags.precision)
    sgd, draws = of.sgd(of.student), torch.Generator()
    encoders = [tst.ColorEncoder() if i < tst.COLOR else tst.GeometricEncoder()
                for i in range(tst.MOVABLE)]
    augmenter = tst.Augmenter(encoders, of.data.mean, of.data.std).to(of.flags.device)

    @torch.no_grad()
    def augmented(images, labels):
        return augmenter(images, draws), labels
    return [of.student], [teacher], lambda *batch: tst.train_step(
        of.student, teacher, sgd, *batch, augmented(*batch), of.flags), lambda *batch: [
        torch.cat(pair) for pair in zip(augmented(*batch), batch)]


METHODS = {rco: ("kd", rco_step), switokd: ("never", switokd_step), trikd: ("TriKD", trikd_step),
           letkd: ("letKD-2", letkd_step), tst: ("TST", tst_step)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    mine, theirs, ratio = in_turns(*loader(device), device)
    print("\nloader, 32x32, batch 64, crop and flip    images/s")
    print(f"  whole batches (common.py)               {4096 / mine:8.0f}")
    print(f"  torchvision, image by image             {4096 / theirs:8.0f}    "
          f"{1 / ratio:.1f} times as fast\n")
    print(f"{'step, teacher -> student, side, batch':54} {'':5}     ms   floor  ratio")
    networks = [("resnet14", "resnet8x0.5", 16, 64),
                ("resnet50", "mobilenetv2", 32, 64) if cuda else ("resnet20", "resnet8", 32, 64)]
    for pair, precision in itertools.product(networks, ("fp32", "bf16")):
        steps = 20 if cuda or precision == "fp32" else 2  # bf16 crawls on CPUs without AVX512
        for script, (method, step_of) in METHODS.items():
            with contextlib.redirect_stdout(io.StringIO()):
                of = Setting(script, method, device, precision, *pair, steps)
                learners, frozen, step, *inputs = step_of(of)
            both = (functools.partial(of.step, step), functools.partial(
                of.floor, of.sgd(*learners), learners, frozen, *inputs))
            mine, floor, ratio = in_turns(*both, device)
            label = "{} {} -> {}, {}, {}".format(script.__name__, *pair)
            print(f"  {label:52} {precision:5} {1000 * mine / steps:6.1f} "
                  f"{1000 * floor / steps:7.1f} {ratio:6.2f}", flush=True)
            for name, epoch in zip(("step", "floor"), both) if cuda else ():
                print("    {:10} {:6.0f} kernels {:6.2f} ms, host {:6.2f} ms, {:4.1f} waits, peak "
                      "{:.0f} MiB".format(name, *on_gpu(epoch, steps)), flush=True)


if __name__ == "__main__":
    main()
