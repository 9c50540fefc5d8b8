"""Speed, run by hand: `python tests/benchmark.py` (a few minutes on 2 CPU cores), --device cuda.

Loader: images per second of the batched crop and flip against torchvision's per-image pipeline;
same images, process and threads. Step: one training step as the script runs it, loader and record
included, against its floor: on ready tensors the forwards of the frozen networks, and forward,
backward and optimiser step of those that learn, with cross-entropy as the loss; in TST on what the
augmenter makes of them. Both take turns; the median of their ratios is printed.
"""

import argparse
import contextlib
import io
import itertools
import platform
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import letkd  # noqa: E402
import rco  # noqa: E402
import switokd  # noqa: E402
import trikd  # noqa: E402
import tst  # noqa: E402


def seconds(function, device):
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def in_turns(ours, other, device, rounds):
    """Median seconds of each, and the median ratio ours / other of the rounds; one warm-up."""
    ours(), other()
    pairs = [(seconds(ours, device), seconds(other, device)) for _ in range(rounds)]
    return (*map(statistics.median, zip(*pairs)), statistics.median(a / b for a, b in pairs))


def loader(device, size=32, count=4096, batch=64):
    """An epoch by common.py, and one image by image, as functions."""
    from PIL import Image
    from torchvision import transforms

    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(value) for value in common.CHANNEL_STATISTICS["cifar10"])
    split = common.Split(*(value.to(device) for value in (
        images, torch.zeros(count).long(), mean.view(3, 1, 1), std.view(3, 1, 1))))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pipeline = transforms.Compose([
        transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())])
    generator = torch.Generator().manual_seed(0)

    def ours():
        for _ in split.augmented(batch, generator):
            pass

    def one_by_one():
        for start in range(0, count, batch):
            chosen = pictures[start:start + batch]
            torch.stack([pipeline(picture) for picture in chosen]).to(device)
    return ours, one_by_one


class Setting:
    """A method's flags, its data, and an epoch of `steps` batches, also as ready tensors."""

    def __init__(self, script, method, device, precision, teacher, student, size, batch, steps):
        arguments = script.parse_args([
            "--teacher", teacher, "--student", student, "--image-size", str(size), "--batch-size",
            str(batch), "--device", str(device), "--precision", precision])
        changes, _ = script.METHODS[method]
        changes = changes(arguments) if callable(changes) else changes
        self.flags = argparse.Namespace(**{**vars(arguments), **changes, "seed": 0, "rows": 20_000})
        self.teacher, self.student, self.batch = teacher, student, batch
        self.data = common.load_data(self.flags)
        train, part = self.data.train, slice(steps * batch)
        self.split = common.Split(train.images[part], train.labels[part], train.mean, train.std)
        self.generator = torch.Generator().manual_seed(0)
        self.ready = list(self.split.augmented(batch, self.generator))

    def build(self, name):
        return self.data.build(name).to(self.flags.device)

    def sgd(self, network):
        return common.sgd(network.parameters(), self.flags)

    def step(self, train_step):
        """An epoch as a script runs it; `train_step`: images, labels -> terms, logits."""
        def step():
            mean = common.Mean()
            for images, labels in self.split.augmented(self.batch, self.generator):
                mean.add(*train_step(images, labels), labels)
        return step

    def floor(self, learners, optimizers, frozen=(), inputs=lambda *batch: batch):
        """`inputs`: images, labels -> what the networks see and shall say."""
        def floor():
            for images, labels in itertools.starmap(inputs, self.ready):
                with common.autocast(self.flags):
                    with torch.no_grad():
                        for network in frozen:
                            network(images)
                    z = [network(images) for network in learners]
                loss = sum(F.cross_entropy(logits.float(), labels) for logits in z)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
        return floor


def rco_pair(of):
    teacher, bare = common.frozen(of.build(of.teacher)), of.build(of.student)
    ours = rco.build_student(of.data, teacher.features, of.flags)
    sgd = of.sgd(ours)
    return (of.step(lambda *batch: rco.train_step(ours, teacher, sgd, *batch, of.flags)),
            of.floor([bare], [of.sgd(bare)], [teacher]))


def switokd_pair(of, learn):
    """`learn`: how many of student and teacher."""
    students, teachers = {"student": of.build(of.student)}, {"teacher": of.build(of.teacher)}
    bare = [of.build(name) for name in (of.student, of.teacher)]
    sgd = {name: of.sgd(network) for name, network in [*(students | teachers).items()][:learn]}

    def train_step(*batch):
        losses, logits, _ = switokd.train_step(students, teachers, sgd, *batch, of.flags)
        return losses, logits["student"]
    return of.step(train_step), of.floor(bare[:learn], [*map(of.sgd, bare[:learn])], bare[learn:])


def trikd_pair(of):
    anchor = common.frozen(of.build(of.student))
    ours, bare = (trikd.new_learners(1, of.data, of.flags) for _ in range(2))
    weights, sgd = {role: trikd.weights_of(role, of.flags) for role in ours}, of.sgd(ours)
    step = of.step(lambda *batch: trikd.train_step(
        ours["student"], ours["teacher"], anchor, sgd, *batch, weights, of.flags))
    return step, of.floor([*bare.values()], [of.sgd(bare)], [anchor])


def letkd_pair(of):
    teacher, flags, C = common.frozen(of.build(of.teacher)), of.flags, of.data.classes
    targets = [*letkd.fit_targets(teacher, of.data, flags).values()]
    ours, bare = (letkd.build_student(of.student, C, of.data.image_size, C * flags.per_class,
                                      flags.words).to(flags.device) for _ in range(2))
    sgd = of.sgd(ours)
    return (of.step(lambda *batch: letkd.train_step(ours, teacher, targets, sgd, *batch, flags)),
            of.floor([bare], [of.sgd(bare)], [teacher]))


def tst_pair(of, stage):
    """II: gradients to theta through both networks; III: the student on 2B images."""
    teacher = common.frozen(of.build(of.teacher))
    ours, bare = of.build(of.student), of.build(of.student)
    encoders = [tst.ColorEncoder() if i < tst.COLOR else tst.GeometricEncoder()
                for i in range(tst.MOVABLE)]
    augmenter = tst.Augmenter(encoders, of.data.mean, of.data.std).to(of.flags.device)
    draws, sgd = torch.Generator().manual_seed(0), of.sgd(ours)
    if stage == "II":
        fixed, theta = common.frozen(ours), torch.optim.SGD(
            [augmenter.theta_m, augmenter.theta_p], tst.SEARCH_RATE, tst.SEARCH_MOMENTUM)
        step = of.step(lambda *batch: (tst.search_step(
            augmenter, teacher, fixed, theta, *batch, draws, of.flags), None))
        return step, of.floor([teacher, fixed], [theta],
                              inputs=lambda images, labels: (augmenter(images, draws), labels))

    @torch.no_grad()
    def both(images, labels):
        return torch.cat([augmenter(images, draws), images]), torch.cat([labels, labels])

    def train_step(images, labels):
        with torch.no_grad():
            first = augmenter(images, draws), labels
        return tst.train_step(ours, teacher, sgd, images, labels, first, of.flags)
    return of.step(train_step), of.floor([bare], [of.sgd(bare)], [teacher], both)


ROWS = {  # row of the table: (the script, its method, what makes step and floor)
    "rco": (rco, "kd", rco_pair),
    "switokd learning": (switokd, "never", lambda of: switokd_pair(of, 2)),
    "switokd expert": (switokd, "switokd", lambda of: switokd_pair(of, 1)),
    "trikd": (trikd, "TriKD", trikd_pair), "letkd": (letkd, "letKD-2", letkd_pair),
    "tst II": (tst, "TST", lambda of: tst_pair(of, "II")),
    "tst III": (tst, "TST", lambda of: tst_pair(of, "III"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is printed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*: (.+)", known)
    name = torch.cuda.get_device_name() if cuda else (
        f"{named[1] if named else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, {name}\n")
    mine, theirs, ratio = in_turns(*loader(device), device, arguments.rounds)
    print("loader, 32x32, batch 64, crop and flip    images/s")
    print(f"  whole batches (common.py)               {4096 / mine:8.0f}")
    print(f"  torchvision, image by image             {4096 / theirs:8.0f}    "
          f"{1 / ratio:.1f} times as fast\n")
    print(f"{'step, teacher -> student, side, batch':54} {'':5}     ms   floor  ratio")
    networks = [("resnet14", "resnet8x0.5", 16, 64), ("resnet20", "resnet8", 32, 64)]
    if cuda:
        networks += [("resnet50", "mobilenetv2", 32, 64), ("wrn_40_2", "wrn_16_2", 32, 64)]
    for pair in networks:
        for precision in ("fp32", "bf16"):
            steps = 20 if cuda or precision == "fp32" else 2  # bf16 crawls on CPUs without AVX512
            for name, (script, method, functions) in ROWS.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    made = functions(Setting(script, method, device, precision, *pair, steps))
                mine, floor, ratio = in_turns(*made, device, arguments.rounds)
                label = "{} {} -> {}, {}, {}".format(name, *pair)
                print(f"  {label:52} {precision:5} {1000 * mine / steps:6.1f} "
                      f"{1000 * floor / steps:7.1f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
