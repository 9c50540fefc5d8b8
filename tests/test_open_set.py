"""Recognition of unseen classes, eqs. (9) to (11), against plain loops."""

import itertools
import random
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import shapes_data

import common


def accuracy(threshold, pairs):
    return sum((s >= threshold) == bool(same) for s, same in pairs) / len(pairs)


def oracle_threshold(pairs):
    """Eq. (11): of the observed similarities, the smallest of those that maximise the accuracy."""
    return max(sorted(s for s, _ in pairs), key=lambda t: (accuracy(t, pairs), -t))


def oracle_verification(pairs, fold, peek=False):
    scores = []
    for k in range(10):
        theta = oracle_threshold([p for p, f in zip(pairs, fold, strict=True) if peek or f != k])
        scores.append(accuracy(theta, [p for p, f in zip(pairs, fold, strict=True) if f == k]))
    return 100 * sum(scores) / 10


def cosines(vectors):
    """Eq. (9): (N,N) similarities."""
    rows = vectors.double().numpy()
    length = np.linalg.norm(rows, axis=1)
    return (rows @ rows.T / np.outer(length, length)).tolist()


def random_embeddings(seed, classes=6, images=6, noise=0.9, width=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(images)
    centres = torch.randn(classes, width, generator=generator)
    vectors = centres[labels] + noise * torch.randn(len(labels), width, generator=generator)
    return vectors * (0.1 + torch.rand(len(labels), 1, generator=generator)), labels


def test_golden_values_of_the_specification():
    golden = torch.tensor([(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8)])
    assert common.rank_1(golden, torch.tensor([0, 0, 1, 1])) == 0.5
    assert common.rank_1(golden, torch.arange(4)) == 0  # one image a class: nobody can be right
    similarities, same = [0.9, 0.8, 0.4, 0.1, 0.3, 0.7], [True] * 3 + [False] * 3
    exact = torch.tensor(similarities, dtype=torch.float64)
    assert common.best_threshold(exact, torch.tensor(same)) == 0.4
    assert accuracy(0.4, [*zip(similarities, same)]) == 5 / 6


def test_rank_1_takes_the_lowest_index_on_a_tie_and_never_the_image_itself():
    vectors = torch.tensor([(1.0, 0), (0, 1), (0, 2), (0, 4)])  # images 1 to 3 are one direction
    assert common.rank_1(vectors, torch.tensor([9, 0, 0, 1])) == 0.5  # nearest: 1, 2, 1, 1
    assert common.rank_1(vectors, torch.tensor([0, 0, 1, 1])) == 0.25


def test_rank_1_equals_a_plain_loop_also_over_several_blocks():
    vectors, labels = random_embeddings(0, classes=5, images=210)  # more than one block of 1000
    nearest = [max((j for j in range(1050) if j != i), key=row.__getitem__)
               for i, row in enumerate(cosines(vectors))]
    hits = sum(int(labels[i]) == int(labels[j]) for i, j in enumerate(nearest))
    assert 0 < hits < 1050
    assert common.rank_1(vectors, labels) == pytest.approx(hits / 1050, abs=1e-12)


def test_report_ignores_lengths_and_is_perfect_in_percent_for_separate_classes():
    vectors, labels = random_embeddings(1)
    stretched = vectors * 2.0 ** torch.randint(-6, 7, (len(vectors), 1)).float()  # exact in float
    assert not torch.equal(vectors, stretched)
    assert common.open_set_report(stretched, labels) == common.open_set_report(vectors, labels)
    perfect = common.open_set_report(torch.eye(6)[labels] * 5, labels)
    assert perfect == {"rank1": 100, "verification": 100}


@pytest.mark.parametrize("seed", range(60))
def test_best_threshold_equals_brute_force_with_ties(seed):
    draw = random.Random(seed)
    pairs = [(draw.randint(-4, 4) / 4, draw.random() < draw.choice((0.1, 0.5, 0.9)))
             for _ in range(draw.randint(1, 40))]  # many equal similarities
    similarities, same = map(torch.tensor, zip(*pairs))
    assert common.best_threshold(similarities.double(), same) == oracle_threshold(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_verification_equals_brute_force_and_no_fold_sees_its_own_pairs(seed):
    vectors, labels = random_embeddings(seed)
    index, same, fold = (part.tolist() for part in common.verification_pairs(labels, seed))
    similarity = cosines(vectors)
    pairs = [(similarity[i][j], flag) for (i, j), flag in zip(index, same)]
    honest = oracle_verification(pairs, fold)
    assert common.open_set_report(vectors, labels, seed)["verification"] == pytest.approx(honest)
    if seed == 0:  # where a threshold from all folds would give another number
        assert honest != pytest.approx(oracle_verification(pairs, fold, peek=True))


@pytest.mark.parametrize("classes, images, each", [(10, 10, 450), (3, 300, 3000), (4, 6, 60)])
def test_pairs_are_balanced_distinct_and_repeatable(classes, images, each):
    labels = torch.arange(classes * images) % classes
    pairs, same, fold = common.verification_pairs(labels, seed=5)
    assert torch.equal(labels[pairs[:, 0]] == labels[pairs[:, 1]], same) and same.sum() == each
    assert all(a != b for a, b in pairs.tolist())
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs) == 2 * each
    sizes = Counter(zip(fold.tolist(), same.tolist(), strict=True))
    assert sizes == dict.fromkeys(itertools.product(range(10), (True, False)), each // 10)
    again, other = common.verification_pairs(labels, seed=5), common.verification_pairs(labels, 6)
    assert all(map(torch.equal, again, (pairs, same, fold))) and not torch.equal(other[0], pairs)


def test_classes_are_drawn_alike_whatever_their_size():
    labels = torch.tensor([0] * 200 + [1] * 40 + [2] * 40 + [3] * 40)
    pairs, same, _ = common.verification_pairs(labels, seed=0, most=800)
    of_same = Counter(labels[pairs[same]][:, 0].tolist())
    of_different = Counter(labels[pairs[~same]].flatten().tolist())
    for label in range(4):  # 400 pairs a kind: 100 of a class, standard deviation 9; 200 and 10
        assert abs(of_same[label] - 100) < 40 and abs(of_different[label] - 200) < 45


def test_too_few_images_are_refused():
    for labels in ([0, 1], [0] * 50, [0, 0, 0, 1, 1, 1], list(range(50))):
        with pytest.raises(common.InputError, match="--open-set"):
            common.verification_pairs(torch.tensor(labels))


def test_recognition_embeds_the_unseen_classes_of_the_data():
    cpu, network = Namespace(device=torch.device("cpu"), precision="fp32"), torch.nn.Flatten()
    network.embed = lambda images: images.flatten(1)[:, :5]
    data = shapes_data(open_set=4)
    vectors = data.unseen.normalise(data.unseen.images).flatten(1)
    for forward, expected in ((None, vectors[:, :5]), (torch.nn.Flatten(), vectors)):
        found = common.recognition(network, data, cpu, forward)
        assert found == common.open_set_report(expected, data.unseen.labels)
    assert common.recognition(network, shapes_data(), cpu) == {}
