"""Speed, run by hand: `python tests/benchmark.py` (about two minutes on 2 CPU cores; --device cuda on a GPU).

Two tables. Loader: images per second of the batched crop and flip against torchvision's per-image pipeline, same
images, same process, same threads. Step: one training step of the method as its script runs it, loader and record
included, against its floor: the forwards, backwards and optimiser step that the equations need, on ready tensors.
Ours and the other take turns, and the median of the ratios is printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

import common
import rco


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ours, other, device, rounds=7):
    """Median seconds of both, and the median of the ratios ours / other, one pair a round after one warm-up."""
    ours(), other()
    pairs = [(seconds(ours, device), seconds(other, device)) for _ in range(rounds)]
    return (*map(statistics.median, zip(*pairs)), statistics.median(a / b for a, b in pairs))


def loader_row(device, size=32, count=4096, batch=64):
    from PIL import Image
    from torchvision import transforms

    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in common.CHANNEL_STATISTICS["cifar10"])
    split = common.Split(images.contiguous(memory_format=torch.channels_last).to(device),
                         labels.to(device), mean.to(device), std.to(device))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pipeline = transforms.Compose([
        transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(mean.flatten().tolist(), std.flatten().tolist())])
    generator = torch.Generator().manual_seed(0)

    def ours():
        for _ in split.augmented(batch, generator):
            pass

    def per_image():
        for start in range(0, count, batch):
            torch.stack([pipeline(picture) for picture in pictures[start:start + batch]]).to(device)

    mine, theirs, _ = in_turns(ours, per_image, device, rounds=5)
    return count / mine, count / theirs


def step_row(device, precision, teacher_name, student_name, size, batch, steps=20):
    arguments = rco.variant(rco.parse_args(["--device", str(device), "--precision", precision]))
    data = common.load_data("shapes", image_size=size, device=device)
    common_split = data.train
    teacher = common.frozen(common.build_model(teacher_name, data.classes, size)).to(device)
    students = [rco.build_student(data, teacher.features, arguments) for _ in range(2)]
    students[1].load_state_dict(rco.build_student(data, teacher.features, arguments).state_dict())
    optimizers = [common.sgd(student.parameters(), arguments) for student in students]
    generator = torch.Generator().manual_seed(0)
    split = common.Split(common_split.images[: steps * batch], common_split.labels[: steps * batch],
                         common_split.mean, common_split.std)
    ready = list(split.augmented(batch, generator))

    def step():
        record = common.Record(tempfile.mkdtemp(), {"seed": 0}, False, device, 1)
        for images, labels in split.augmented(batch, generator):
            terms, logits = rco.train_step(students[0], teacher, optimizers[0], images, labels, arguments)
            record.step(terms, logits, labels)

    def floor():
        for images, labels in ready:
            with common.autocast(arguments):
                with torch.no_grad():
                    teacher_logits = teacher(images)
                logits = students[1](images)
            loss = F.cross_entropy(logits.float(), labels) + 16 * nn.functional.kl_div(
                F.log_softmax(logits.float() / 4, 1), F.log_softmax(teacher_logits.float() / 4, 1),
                reduction="batchmean", log_target=True)
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()

    for student in students:
        student.train()
    mine, bare, ratio = in_turns(step, floor, device)
    return 1000 * mine / len(ready), 1000 * bare / len(ready), ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}\n")
    mine, theirs = loader_row(device)
    print("loader, 32x32, batch 64, crop and flip      images/s")
    print(f"  whole batches on the device (common.py)   {mine:8.0f}")
    print(f"  torchvision, image by image               {theirs:8.0f}    ours / theirs {mine / theirs:.1f}\n")
    print("step (teacher -> student, image side, batch)              precision    ms  floor  step / floor")
    pairs = [("resnet14", "resnet8x0.5", 16, 64), ("resnet20", "resnet8", 32, 64)]
    if device.type == "cuda":
        pairs += [("resnet50", "mobilenetv2", 32, 64), ("wrn_40_2", "wrn_16_2", 32, 64)]
    for teacher, student, size, batch in pairs:
        for precision in ("fp32", "bf16"):
            mine, bare, ratio = step_row(device, precision, teacher, student, size, batch,
                                         steps=20 if precision == "fp32" else 4)
            label = f"rco {teacher} -> {student}, {size}, {batch}"
            print(f"  {label:<55} {precision:>9} {mine:5.1f} {bare:6.1f} {ratio:10.2f}", flush=True)


if __name__ == "__main__":
    main()
