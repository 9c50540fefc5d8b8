"""Speed, run by hand: `python tests/benchmark.py` (a few minutes on 2 CPU cores), --device cuda.

Loader: images per second of the batched crop and flip against torchvision's per-image pipeline;
same images, process and threads. Step: one training step as the script runs it, loader and record
included, against its floor: the forwards, backwards and optimiser step that the equations need, on
ready tensors. Both take turns; the median of their ratios is printed.
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


def in_turns(ours, other, device, rounds=7):
    """Median seconds of each, and the median ratio ours / other of the rounds; one warm-up."""
    ours(), other()
    pairs = [(seconds(ours, device), seconds(other, device)) for _ in range(rounds)]
    return (*map(statistics.median, zip(*pairs)), statistics.median(a / b for a, b in pairs))


def loader_row(device, size=32, count=4096, batch=64):
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

    mine, theirs, ratio = in_turns(ours, one_by_one, device)
    return count / mine, count / theirs, 1 / ratio


def prepared(script, device, precision, teacher, student, size, batch, steps, *flags):
    """The script's flags, the data, an epoch of `steps` batches, and the same as ready tensors."""
    arguments = script.parse_args([
        "--teacher", teacher, "--student", student, "--image-size", str(size), "--batch-size",
        str(batch), "--device", str(device), "--precision", precision, *flags])
    arguments.seed, arguments.cache = 0, Path(tempfile.mkdtemp())
    with contextlib.redirect_stdout(io.StringIO()):
        data = common.load_data(arguments)
    part, generator = slice(steps * batch), torch.Generator().manual_seed(0)
    split = common.Split(data.train.images[part], data.train.labels[part], data.train.mean,
                         data.train.std)

    def epoch():
        return split.augmented(batch, generator)
    return arguments, data, epoch, list(epoch())


def rco_row(*setting):
    device, _, teacher, student, size, *_ = setting
    arguments, data, epoch, ready = prepared(rco, *setting)
    teacher = common.frozen(common.build_model(teacher, data.classes, size)).to(device)
    ours, bare = (rco.build_student(student, data, teacher.features, "kd", 0).to(device)
                  for _ in range(2))
    our_sgd, bare_sgd = (common.sgd(net.parameters(), arguments) for net in (ours, bare))

    def step():
        mean = common.Mean()
        for images, labels in epoch():
            terms, logits = rco.train_step(ours, teacher, our_sgd, images, labels, arguments)
            mean.add(terms, logits, labels)

    def floor():
        for images, labels in ready:
            with common.autocast(arguments):
                with torch.no_grad():
                    teacher_logits = teacher(images)
                logits = bare(images)
            loss = F.cross_entropy(logits.float(), labels) + 16 * F.kl_div(
                F.log_softmax(logits.float() / 4, 1), F.log_softmax(teacher_logits.float() / 4, 1),
                reduction="batchmean", log_target=True)
            bare_sgd.zero_grad()
            loss.backward()
            bare_sgd.step()

    mine, least, ratio = in_turns(step, floor, device)
    return 1000 * mine / len(ready), 1000 * least / len(ready), ratio


def switokd_row(*setting):
    """A step in `mode`; its floor has the passes of that mode alone, in expert mode no backward
    of the teacher."""
    *setting, mode = setting
    device, precision = setting[:2]
    arguments, data, epoch, ready = prepared(switokd, *setting)
    roles = switokd.roles(arguments)
    ours, bare = ([switokd.build_networks(of, data, device) for of in roles] for _ in range(2))
    our_sgd = {name: common.sgd(network.parameters(), arguments)
               for networks in ours for name, network in networks.items()}
    bare = [bare[0]["student"], bare[1]["teacher"]]
    bare_sgd = [common.sgd(net.parameters(), arguments) for net in bare]
    switch = {"learning": "never", "expert": "kd"}[mode]

    def step():
        mean = common.Mean()
        for images, labels in epoch():
            losses, logits, _ = switokd.train_step(*ours, our_sgd, images, labels, 1.0, switch,
                                                   precision)
            mean.add(losses, logits["student"], labels)

    def floor():
        for images, labels in ready:
            with common.autocast(arguments):
                z_s, z_t = (network(images).float() for network in bare)
            pairs = [(z_s, z_t, bare_sgd[0]), (z_t, z_s, bare_sgd[1])]
            for own, peer, optimizer in pairs if mode == "learning" else pairs[:1]:
                loss = F.cross_entropy(own, labels) + F.kl_div(
                    F.log_softmax(own, 1), F.log_softmax(peer.detach(), 1), reduction="batchmean",
                    log_target=True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    mine, least, ratio = in_turns(step, floor, device)
    return 1000 * mine / len(ready), 1000 * least / len(ready), ratio


def trikd_row(*setting):
    """Its floor: the anchor's forward; forward, backward and step of teacher and student."""
    device, _, teacher, student, size, *_ = setting
    arguments, data, epoch, ready = prepared(trikd, *setting)
    ours, bare = ([common.build_model(name, data.classes, size).to(device)
                   for name in (student, teacher, student)] for _ in range(2))
    ours[2], bare[2] = common.frozen(ours[2]), common.frozen(bare[2])
    our_sgd, bare_sgd = ([common.sgd(net.parameters(), arguments) for net in nets[:2]]
                         for nets in (ours, bare))
    our_sgd = dict(zip(("student", "teacher"), our_sgd))
    weights = {role: trikd.weights_of(role, arguments) for role in our_sgd}

    def step():
        mean = common.Mean()
        for images, labels in epoch():
            terms, logits = trikd.train_step(*ours, our_sgd, images, labels, weights, arguments)
            mean.add(terms, logits, labels)

    def floor():
        for images, labels in ready:
            with common.autocast(arguments):
                with torch.no_grad():
                    z_a = bare[2](images)
                z = [net(images) for net in bare[:2]]
            log_p = [F.log_softmax(one.float(), 1) for one in (*z, z_a)]
            loss = sum(
                F.cross_entropy(one.float(), labels) + sum(F.kl_div(
                    log_p[own], log_p[peer].detach(), reduction="batchmean", log_target=True)
                    for peer in (1 - own, 2)) for own, one in enumerate(z))
            for optimizer in bare_sgd:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in bare_sgd:
                optimizer.step()

    mine, least, ratio = in_turns(step, floor, device)
    return 1000 * mine / len(ready), 1000 * least / len(ready), ratio


def letkd_row(*setting):
    """Its floor: the teacher to both taps, the targets once; forward, backward and step of the
    student with its layers."""
    device, _, teacher, student, size, *_ = setting
    arguments, data, epoch, ready = prepared(letkd, *setting, "--rows", "20000")
    teacher = common.frozen(common.build_model(teacher, data.classes, size)).to(device)
    with contextlib.redirect_stdout(io.StringIO()):
        targets = letkd.prepare(teacher, data, arguments)
    ours, bare = (letkd.new_student(data, arguments).to(device) for _ in range(2))
    our_sgd, bare_sgd = (common.sgd(net.parameters(), arguments) for net in (ours, bare))

    def step():
        mean = common.Mean()
        for images, labels in epoch():
            terms, logits = letkd.train_step(ours, teacher, targets, our_sgd, images, labels,
                                             arguments)
            mean.add(terms, logits, labels)

    def floor():
        for images, labels in ready:
            with torch.no_grad(), common.autocast(arguments):
                z_inter = letkd.up_to_tap(teacher, images)
                z_penult = letkd.after_tap(teacher, z_inter)
            p_words = letkd.word_targets(z_penult.float(), targets.words)
            p_table = letkd.decision_targets(z_inter.float(), labels, targets.decisions)
            with common.autocast(arguments):
                features, scores_i, scores_p = bare.forward_scores(images)
                logits = bare.forward_head(features)
            loss = (F.cross_entropy(logits.float(), labels)
                    + letkd.template_loss(scores_p, p_words)
                    + letkd.template_loss(scores_i, p_table))
            bare_sgd.zero_grad()
            loss.backward()
            bare_sgd.step()

    mine, least, ratio = in_turns(step, floor, device)
    return 1000 * mine / len(ready), 1000 * least / len(ready), ratio


def tst_row(*setting):
    """Stage II: augmenter, both networks, backward to theta, step. Stage III: augmenter, teacher
    on 2B, student on 2B forward, backward, step. "augmenter": its share of a Stage III step, as
    ms, floor and ratio."""
    *setting, stage = setting
    device, _, teacher, student, size, *_ = setting
    arguments, data, epoch, ready = prepared(tst, *setting)
    teacher = common.frozen(common.build_model(teacher, data.classes, size)).to(device)
    encoders = [tst.ColorEncoder() if i < tst.COLOR else tst.GeometricEncoder()
                for i in range(tst.MOVABLE)]
    augmenters = [tst.Augmenter(encoders, data.mean, data.std).to(device) for _ in range(2)]
    students = [common.build_model(student, data.classes, size).to(device) for _ in range(2)]
    fixed = common.frozen(students[0])
    optimizers = [common.sgd(network.parameters(), arguments) for network in students]
    searches = [tst.search_optimizer(augmenter) for augmenter in augmenters]
    draws = torch.Generator().manual_seed(0)

    def search():
        mean = common.Mean()
        for images, labels in epoch():
            mean.add(tst.search_step(augmenters[0], teacher, fixed, searches[0], images, labels,
                                     draws, arguments), None, labels)

    def search_floor():
        for images, labels in ready:
            augmented = augmenters[1](images, draws)
            with common.autocast(arguments):
                t, s = teacher(augmented).float(), fixed(augmented).float()
            p = F.softmax(s, 1).gather(1, labels[:, None])
            loss = F.cross_entropy(t, labels) - torch.log(1 - p + 1e-8).mean()
            searches[1].zero_grad()
            loss.backward()
            searches[1].step()

    def teach():
        mean = common.Mean()
        for images, labels in epoch():
            with torch.no_grad():
                first = augmenters[0](images, draws), labels
            terms, logits = tst.train_step(students[0], teacher, optimizers[0], images, labels,
                                           first, arguments)
            mean.add(terms, logits, labels)

    def teach_floor():
        for images, labels in ready:
            with torch.no_grad():
                both = torch.cat([augmenters[1](images, draws), images])
                with common.autocast(arguments):
                    t = teacher(both).float()
            with common.autocast(arguments):
                s = students[1](both).float()
            loss = F.cross_entropy(s, torch.cat([labels, labels])) + 16 * F.kl_div(
                F.log_softmax(s / 4, 1), F.log_softmax(t / 4, 1), reduction="batchmean",
                log_target=True)
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()

    def augment():
        with torch.no_grad():
            for images, _ in ready:
                augmenters[0](images, draws)

    pair = {"II": (search, search_floor), "III": (teach, teach_floor),
            "augmenter": (augment, teach_floor)}[stage]
    mine, least, ratio = in_turns(*pair, device)
    return 1000 * mine / len(ready), 1000 * least / len(ready), ratio


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
    device = torch.device(parser.parse_args().device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else (
        f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, {name}\n")
    mine, theirs, ratio = loader_row(device)
    print("loader, 32x32, batch 64, crop and flip    images/s")
    print(f"  whole batches (common.py)               {mine:8.0f}")
    print(f"  torchvision, image by image             {theirs:8.0f}    {ratio:.1f} times as fast\n")
    print(f"{'step, teacher -> student, side, batch':54} {'':5}     ms   floor  ratio")
    pairs = [("resnet14", "resnet8x0.5", 16, 64), ("resnet20", "resnet8", 32, 64)]
    if cuda:
        pairs += [("resnet50", "mobilenetv2", 32, 64), ("wrn_40_2", "wrn_16_2", 32, 64)]
    for pair in pairs:
        for precision in ("fp32", "bf16"):
            steps = 20 if cuda or precision == "fp32" else 2  # bf16 crawls on CPUs without AVX512
            setting = (device, precision, *pair, steps)
            for name, row in (("rco", rco_row), ("switokd learning", switokd_row),
                              ("switokd expert", switokd_row), ("trikd", trikd_row),
                              ("letkd", letkd_row), ("tst II", tst_row), ("tst III", tst_row),
                              ("tst augmenter", tst_row)):
                mode = name.split()[1:]
                mine, floor, ratio = row(*setting, *mode)
                label = "{} {} -> {}, {}, {}".format(name, *pair)
                print(f"  {label:52} {precision:5} {mine:6.1f} {floor:7.1f} {ratio:6.2f}",
                      flush=True)


if __name__ == "__main__":
    main()
