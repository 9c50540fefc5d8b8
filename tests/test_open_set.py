"""Recognition of unseen classes, eqs. (9) to (11), against plain loops."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import shapes_data

import common


def cosines(vectors):
    """Eq. (9): (N,N) similarities."""
    unit = vectors.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


def accuracy(threshold, similarities, same):
    return ((similarities >= threshold) == same).mean()


def by_brute_force(similarities, same):
    """Eq. (11): of the observed similarities, the smallest of those that maximise the accuracy."""
    return max(sorted(similarities), key=lambda t: (accuracy(t, similarities, same), -t))


def random_embeddings(seed, classes=6, images=6):
    """(N,4) vectors around a centre of each class, of any length, and labels."""
    torch.manual_seed(seed)
    labels = torch.arange(classes).repeat(images)
    vectors = torch.randn(classes, 4)[labels] + torch.randn(len(labels), 4)
    return vectors * (0.1 + torch.rand(len(labels), 1)), labels


GOLDEN = [(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8)]  # of the specification
TIED = [(1.0, 0), (0, 1), (0, 2), (0, 4)]  # images 1 to 3 are one direction; nearest: 1, 2, 1, 1


@pytest.mark.parametrize("vectors, labels, expected", [
    (GOLDEN, [0, 0, 1, 1], 0.5), (GOLDEN, [0, 1, 2, 3], 0), (TIED, [9, 0, 0, 1], 0.5),
    (TIED, [0, 0, 1, 1], 0.25)])
def test_rank_1_golden_and_the_lowest_index_on_a_tie(vectors, labels, expected):
    assert common.rank_1(torch.tensor(vectors), torch.tensor(labels)) == expected


def test_rank_1_equals_a_plain_loop():
    vectors, labels = random_embeddings(0, classes=5, images=210)  # more than one block of 1000
    hits = 0
    for image, row in enumerate(cosines(vectors).tolist()):
        nearest = max((other for other in range(1050) if other != image), key=row.__getitem__)
        hits += int(labels[nearest] == labels[image])
    assert 0 < hits < 1050
    assert common.rank_1(vectors, labels) == pytest.approx(hits / 1050, abs=1e-12)


def test_best_threshold_golden_and_brute_force_with_ties():
    golden = torch.tensor([0.9, 0.8, 0.4, 0.1, 0.3, 0.7])
    assert common.best_threshold(golden, torch.arange(6) < 3) == golden[2]
    draw = np.random.default_rng(0)
    for count in range(1, 60):  # many equal similarities
        similarities, same = draw.integers(-4, 5, count) / 4, draw.random(count) < draw.random()
        found = common.best_threshold(torch.tensor(similarities), torch.tensor(same))
        assert found == by_brute_force(similarities, same)


@pytest.mark.parametrize("seed", range(3))
def test_verification_equals_brute_force_and_no_fold_sees_its_own_pairs(seed):
    vectors, labels = random_embeddings(seed)
    pairs, same, fold = (part.numpy() for part in common.verification_pairs(labels, seed))
    similarities, scores, peeking = cosines(vectors)[pairs[:, 0], pairs[:, 1]], [], []
    for k in range(10):
        own, honest = fold == k, by_brute_force(similarities[fold != k], same[fold != k])
        scores.append(accuracy(honest, similarities[own], same[own]))
        peeking.append(accuracy(by_brute_force(similarities, same), similarities[own], same[own]))
    assert common.open_set_report(vectors, labels, seed) == pytest.approx(
        {"rank1": 100 * common.rank_1(vectors, labels), "verification": 10 * sum(scores)})
    assert seed > 0 or sum(scores) != pytest.approx(sum(peeking))  # a threshold of all folds


@pytest.mark.parametrize("classes, images, each", [(10, 10, 450), (3, 300, 3000), (4, 6, 60)])
def test_pairs_are_balanced_distinct_and_repeatable(classes, images, each):
    labels = torch.arange(classes * images) % classes
    pairs, same, fold = common.verification_pairs(labels, seed=5)
    assert torch.equal(labels[pairs[:, 0]] == labels[pairs[:, 1]], same) and same.sum() == each
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs) == 2 * each
    assert all(a != b for a, b in pairs.tolist())
    assert torch.bincount(2 * fold + same).tolist() == [each // 10] * 20  # folds and kinds
    again, other = common.verification_pairs(labels, seed=5), common.verification_pairs(labels, 6)
    assert all(map(torch.equal, again, (pairs, same, fold))) and not torch.equal(other[0], pairs)


def test_classes_are_drawn_alike_whatever_their_size_and_too_few_images_are_refused():
    labels = torch.tensor([0] * 200 + [1] * 40 + [2] * 40 + [3] * 40)
    pairs, same, _ = common.verification_pairs(labels, seed=0, most=800)
    # 400 pairs a kind: 100 same ones of a class, standard deviation 9; 200 and 10 in different ones
    assert (torch.bincount(labels[pairs[same, 0]]) - 100).abs().max() < 40
    assert (torch.bincount(labels[pairs[~same]].flatten()) - 200).abs().max() < 45
    for labels in ([0, 1], [0] * 50, [0, 0, 0, 1, 1, 1], list(range(50))):
        with pytest.raises(common.InputError, match="--open-set.*fewer than 10 pairs"):
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
