"""Speed, run by hand: `python tests/benchmark.py` (a few minutes on 2 CPU cores), --device cuda.

Loader: images per second of the batched crop and flip against torchvision's per-image pipeline;
same images, process and threads. Step: one training step as the script runs it, loader and record
included, against its floor: on ready tensors the forwards of the frozen networks, and forward,
backward and optimiser step of those that learn, with cross-entropy as the loss; in LetKD also the
targets, in TST the augmenter ("augmenter": its share of a step of Stage III, as ms and ratio).
Both take turns; the median of their ratios is printed.
"""

import argparse
import contextlib
import io
import platform
import statistics
import sys
import tempfile
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
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
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
    """A script's flags, its data, and an epoch of `steps` batches, also as ready tensors."""

    def __init__(self, script, device, precision, teacher, student, size, batch, steps):
        self.arguments = script.parse_args([
            "--teacher", teacher, "--student", student, "--image-size", str(size), "--batch-size",
            str(batch), "--device", str(device), "--precision", precision,
            *(["--rows", "20000"] if script is letkd else [])])
        self.arguments.seed, self.arguments.cache = 0, Path(tempfile.mkdtemp())
        with contextlib.redirect_stdout(io.StringIO()):
            self.data = common.load_data(self.arguments)
        train, part = self.data.train, slice(steps * batch)
        self.split = common.Split(train.images[part], train.labels[part], train.mean, train.std)
        self.generator = torch.Generator().manual_seed(0)
        self.teacher, self.student, self.ready = teacher, student, list(self.epoch())

    def epoch(self):
        return self.split.augmented(self.arguments.batch_size, self.generator)

    def build(self, name):
        network = common.build_model(name, self.data.classes, self.data.image_size)
        return network.to(self.arguments.device)

    def sgd(self, network):
        return common.sgd(network.parameters(), self.arguments)

    def twins(self):
        """Twice student and teacher, and their optimisers: {role: ...}; ours, and the floor's."""
        for _ in range(2):
            networks = {"student": self.build(self.student), "teacher": self.build(self.teacher)}
            yield networks, {role: self.sgd(network) for role, network in networks.items()}

    def step(self, train_step):
        """An epoch as a script runs it; `train_step`: images, labels -> terms, logits."""
        def step():
            mean = common.Mean()
            for images, labels in self.epoch():
                mean.add(*train_step(images, labels), labels)
        return step

    def floor(self, forward, optimizers, frozen=None, prepare=lambda *batch: batch):
        """`forward`: images -> outputs; `prepare`: images, labels -> images, a target for each
        output (one for all). An output behind the last target has a graph, but no backward."""
        def floor():
            for images, labels in self.ready:
                images, targets = prepare(images, labels)
                with common.autocast(self.arguments):
                    if frozen:
                        with torch.no_grad():
                            frozen(images)
                    outputs = forward(images)
                loss = sum(F.cross_entropy(z.float(), target) for z, target in zip(
                    outputs, targets if isinstance(targets, list) else [targets] * len(outputs)))
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
        return floor


def rco_pair(of):
    teacher = common.frozen(of.build(of.teacher))
    ours, bare = of.build(of.student), of.build(of.student)
    ours.adapter, sgd = torch.nn.Identity(), of.sgd(ours)
    return (of.step(lambda *batch: rco.train_step(ours, teacher, sgd, *batch, of.arguments)),
            of.floor(lambda images: [bare(images)], [of.sgd(bare)], teacher))


def switokd_pair(of, mode):
    """In expert mode the teacher's forward has a graph, but no backward and no step."""
    (ours, sgd), (bare, bare_sgd) = of.twins()
    students, teachers = ({role: ours[role]} for role in ("student", "teacher"))
    switch, learn = ("never", 2) if mode == "learning" else ("kd", 1)

    def train_step(images, labels):
        losses, logits, _ = switokd.train_step(students, teachers, sgd, images, labels, 1.0, switch,
                                               of.arguments.precision)
        return losses, logits["student"]
    return of.step(train_step), of.floor(
        lambda images: [network(images) for network in bare.values()],
        [*bare_sgd.values()][:learn], prepare=lambda images, labels: (images, [labels] * learn))


def trikd_pair(of):
    (ours, sgd), (bare, bare_sgd) = of.twins()
    anchor = common.frozen(of.build(of.student))
    weights = {role: trikd.weights_of(role, of.arguments) for role in ours}
    step = of.step(lambda *batch: trikd.train_step(*ours.values(), anchor, sgd, *batch, weights,
                                                   of.arguments))
    return step, of.floor(lambda images: [network(images) for network in bare.values()],
                          bare_sgd.values(), anchor)


def letkd_pair(of):
    """The floor has the teacher to both taps and the targets once."""
    teacher = common.frozen(of.build(of.teacher))
    with contextlib.redirect_stdout(io.StringIO()):
        fitted = letkd.prepare(teacher, of.data, of.arguments)
    ours, bare = (letkd.new_student(of.data, of.arguments).to(of.arguments.device)
                  for _ in range(2))
    sgd = of.sgd(ours)

    def prepare(images, labels):
        with torch.no_grad(), common.autocast(of.arguments):
            z_inter = letkd.up_to_tap(teacher, images)
            z_penult = letkd.after_tap(teacher, z_inter)
        return images, [labels, letkd.decision_targets(z_inter.float(), labels, fitted.decisions),
                        letkd.word_targets(z_penult.float(), fitted.words)]

    def forward(images):
        features, *scores = bare.forward_scores(images)
        return [bare.forward_head(features), *scores]
    step = of.step(lambda *batch: letkd.train_step(ours, teacher, fitted, sgd, *batch,
                                                   of.arguments))
    return step, of.floor(forward, [of.sgd(bare)], prepare=prepare)


def tst_pair(of, stage):
    """II: augmenter, both networks, backward to theta; III: augmenter, both networks on 2B."""
    teacher, (student, own) = common.frozen(of.build(of.teacher)), (
        of.build(of.student) for _ in range(2))
    encoders = [tst.ColorEncoder() if i < tst.COLOR else tst.GeometricEncoder()
                for i in range(tst.MOVABLE)]
    ours, bare = (tst.Augmenter(encoders, of.data.mean, of.data.std).to(of.arguments.device)
                  for _ in range(2))
    draws, sgd = torch.Generator().manual_seed(0), of.sgd(student)
    if stage == "II":
        fixed, (search, bare_search) = common.frozen(student), (
            torch.optim.SGD(augmenter.parameters(), tst.SEARCH_RATE, tst.MOMENTUM)
            for augmenter in (ours, bare))
        step = of.step(lambda *batch: (tst.search_step(
            ours, teacher, fixed, search, *batch, draws, of.arguments), None))
        return step, of.floor(lambda images: [teacher(images), fixed(images)],
                              [bare_search],
                              prepare=lambda images, labels: (bare(images, draws), labels))

    @torch.no_grad()
    def both(images, labels):
        return torch.cat([bare(images, draws), images]), torch.cat([labels, labels])

    @torch.no_grad()
    def augment():
        for images, _ in of.ready:
            ours(images, draws)

    def train_step(images, labels):
        with torch.no_grad():
            first = ours(images, draws), labels
        return tst.train_step(student, teacher, sgd, images, labels, first, of.arguments)
    return (augment if stage == "augmenter" else of.step(train_step),
            of.floor(lambda images: [own(images)], [of.sgd(own)], teacher, both))


ROWS = {"rco": rco_pair, "switokd learning": switokd_pair, "switokd expert": switokd_pair,
        "trikd": trikd_pair, "letkd": letkd_pair, "tst II": tst_pair, "tst III": tst_pair,
        "tst augmenter": tst_pair}


def processor():
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is printed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else (
        f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, "
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
            for name, functions in ROWS.items():
                script, *mode = name.split()
                setting = Setting(sys.modules[script], device, precision, *pair, steps)
                step, floor = functions(setting, *mode)
                mine, floor, ratio = in_turns(step, floor, device, arguments.rounds)
                label = "{} {} -> {}, {}, {}".format(name, *pair)
                print(f"  {label:52} {precision:5} {1000 * mine / steps:6.1f} "
                      f"{1000 * floor / steps:7.1f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
