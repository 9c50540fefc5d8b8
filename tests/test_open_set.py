"""Recognition of unseen classes, eqs. (9) to (11), against plain loops."""

import time
from argparse import Namespace
from functools import partial

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


GOLDEN = [(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8)]  # of the specification
TIED = [(1.0, 0), (0, 1), (0, 2), (0, 4)]  # images 1 to 3 are one direction; nearest: 1, 2, 1, 1


@pytest.mark.parametrize("vectors, labels, expected", [
    (GOLDEN, [0, 0, 1, 1], 50), (GOLDEN, [0, 1, 2, 3], 0), (TIED, [9, 0, 0, 1], 50),
    (TIED, [0, 0, 1, 1], 25)])
def test_rank_1_golden_and_the_lowest_index_on_a_tie(vectors, labels, expected, monkeypatch):
    pairs = torch.tensor([(0, 1)] * 10), torch.ones(10, dtype=torch.bool)  # four images are too few
    monkeypatch.setattr(common, "verification_pairs", lambda *_: pairs)
    report = common.open_set_report(torch.tensor(vectors), torch.tensor(labels))
    assert report == {"rank1": expected, "verification": 100}


@pytest.mark.parametrize("classes, images, tied", [(5, 210, False), (6, 6, False), (6, 8, True)])
def test_report_equals_plain_loops_and_no_fold_sees_its_own(classes, images, tied, monkeypatch):
    """1050 images: more than one block of 1000; coordinates of 1 and -1: few similarities."""
    few = partial(common.verification_pairs, most=300)
    monkeypatch.setattr(common, "verification_pairs", few)
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat(images)
    vectors = torch.randn(classes, 4)[labels] + torch.randn(len(labels), 4)  # around centres
    vectors = vectors.sign() if tied else vectors * (0.1 + torch.rand(len(labels), 1))
    similarities, hits, scores, peeking = cosines(vectors), 0, [], []
    for image, row in enumerate(similarities.tolist()):
        row[image] = -2  # not the image itself
        hits += int(labels[row.index(max(row))] == labels[image])
    pairs, same = (part.numpy() for part in few(labels, 3))
    found, fold = similarities[pairs[:, 0], pairs[:, 1]], np.arange(len(pairs)) % 10
    assert tied == (len({*found}) < 6)
    for k in range(10):
        own, honest = fold == k, by_brute_force(found[fold != k], same[fold != k])
        scores.append(accuracy(honest, found[own], same[own]))
        peeking.append(accuracy(by_brute_force(found, same), found[own], same[own]))
    report = common.open_set_report(vectors, labels, 3)
    assert 0 < hits < len(labels) and report["rank1"] == pytest.approx(100 * hits / len(labels))
    assert report["verification"] == pytest.approx(10 * sum(scores))
    assert tied or sum(scores) != pytest.approx(sum(peeking))  # a threshold of all folds


@pytest.mark.parametrize("classes, images, each", [(10, 10, 450), (3, 300, 3000), (4, 6, 60)])
def test_pairs_are_balanced_distinct_and_repeatable(classes, images, each):
    labels = torch.arange(classes * images + 1) % classes
    labels[-1] = classes  # a class of one image
    pairs, same = common.verification_pairs(labels, seed=5)
    assert torch.equal(labels[pairs[:, 0]] == labels[pairs[:, 1]], same) and same.sum() == each
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs) == 2 * each
    assert all(a != b for a, b in pairs.tolist())
    fold = torch.arange(len(same)) % 10  # the same number of either kind in each
    assert torch.bincount(2 * fold + same).tolist() == [each // 10] * 20
    again, other = common.verification_pairs(labels, seed=5), common.verification_pairs(labels, 6)
    assert all(map(torch.equal, again, (pairs, same))) and not torch.equal(other[0], pairs)


def test_one_large_class_among_many_small_ones_takes_no_time():
    labels, start = torch.tensor([0] * 5000 + [*range(1, 301)] * 2), time.time()
    pairs, same = common.verification_pairs(labels)
    assert time.time() - start < 5 and len(pairs) == 2 * same.sum() > 1000
    assert len({*map(tuple, pairs.tolist())}) == len(pairs)


def test_classes_are_drawn_alike_whatever_their_size_and_too_few_images_are_refused():
    labels = torch.tensor([0] * 200 + [1] * 40 + [2] * 40 + [3] * 40)
    pairs, same = common.verification_pairs(labels, seed=0, most=400)
    # 400 pairs a kind: 100 same ones of a class, standard deviation 9; 200 and 10 in different ones
    assert (torch.bincount(labels[pairs[same, 0]]) - 100).abs().max() < 40
    assert (torch.bincount(labels[pairs[~same]].flatten()) - 200).abs().max() < 45
    for labels in ([0] * 50, [0, 0, 0, 1, 1, 1], list(range(50))):
        with pytest.raises(common.InputError, match="--open-set.*fewer than 10 pairs"):
            common.verification_pairs(torch.tensor(labels))


def test_recognition_and_the_rows_that_it_is_compared_with():
    """The unseen classes of the data, embedded; chance: by hand, over all pairs of images."""
    arguments = Namespace(device=torch.device("cpu"), precision="fp32", student="resnet8", seed=0)
    data, network = shapes_data(open_set=4), torch.nn.Flatten()
    network.embed = lambda images: images.flatten(1)[:, :5]
    labels, vectors = data.unseen.labels, data.unseen.normalise(data.unseen.images).flatten(1)
    for forward, expected in ((None, vectors[:, :5]), (torch.nn.Flatten(), vectors)):
        found = common.recognition(network, data, arguments, forward)
        assert found == common.open_set_report(expected, labels)
    chance, pixels, untrained = common.open_set_rows(data, arguments)
    alike = np.mean([a == b for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j])
    assert (chance["rank1"], chance["verification"]) == (pytest.approx(100 * alike), 50)
    assert pixels == {"run": "raw pixels", **found} and untrained.keys() == pixels.keys()
    assert common.recognition(network, shapes_data(), arguments) == {}
    assert common.open_set_rows(shapes_data(), arguments) == []
