"""Thresholds and masks against the definition: a stable sort of all scores, whose first k are pruned."""

import math

import numpy as np
import pytest
import torch
from helpers.random_scores import KINDS, random_scores

from hf_sparse import numerics
from hf_sparse.selection import bracket, threshold
from hf_sparse.selection.packed_scores import PackedScores
from hf_sparse.selection.scores import TensorScores
from hf_sparse.selection.threshold import Threshold, find_threshold, find_thresholds


INFINITY = math.inf


@pytest.fixture(params=["collected", "sampled", "missed"])
def path(request, library, monkeypatch):
    """Runs few scores through the code for many: small chunks, threads, a sample, and a misleading sample."""
    monkeypatch.setattr(numerics, "CPU_CHUNK", 37)
    monkeypatch.setattr(threshold, "_MIN_THREADED", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if request.param != "collected":
        monkeypatch.setattr(bracket, "_MIN_SAMPLED", 3)
    if request.param == "missed":
        monkeypatch.setattr(bracket, "_BUCKETS", 5)
        monkeypatch.setattr(TensorScores, "sample", lambda self, count: self.tensor.reshape(-1)[:count].float())


def masks(layers, thresholds):
    """Keep masks computed chunk by chunk."""
    result = []
    for layer, limit in zip(layers, thresholds):
        ties, parts = limit.num_ties, [torch.empty(0, dtype=torch.bool)]
        for chunk in layer.chunks():
            mask, ties = limit.keep_mask(chunk, ties)
            parts.append(mask)
        result.append(torch.cat(parts).numpy())
    return result


def masks_by_definition(arrays, k, floors, caps):
    """The threshold by trial of every score, then its ties by layer, then each layer by its own stable sort."""
    floors = floors or [0] * len(arrays)
    caps = caps or [len(array) for array in arrays]

    def bounded(count):
        return [min(max(count(array), floor), cap) for array, floor, cap in zip(arrays, floors, caps)]

    counts = bounded(lambda array: 0)
    for value in np.unique(np.concatenate(arrays)):
        most = bounded(lambda array: int((array <= value).sum()))
        if sum(most) >= k:
            counts = bounded(lambda array: int((array < value).sum()))
            for index in range(len(arrays)):
                counts[index] += min(most[index] - counts[index], k - sum(counts))
            break
    result = []
    for array, count in zip(arrays, counts):
        mask = np.ones(len(array), dtype=bool)
        mask[np.argsort(array, kind="stable")[:count]] = False
        result.append(mask)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_a_stable_sort_of_all(path, kind):
    random = np.random.default_rng(KINDS.index(kind))
    for _ in range(5):
        arrays = [random_scores(random, kind, size) for size in random.choice([0, 1, 2, 36, 75, 300], 4)]
        total = sum(map(len, arrays))
        layers = [TensorScores(torch.from_numpy(array)) for array in arrays]
        for k in {0, total, min(1, total), int(random.integers(0, total + 1)), int(0.9 * total)}:
            expected = np.ones(total, dtype=bool)
            expected[np.argsort(np.concatenate(arrays), kind="stable")[:k]] = False
            np.testing.assert_array_equal(np.concatenate(masks(layers, find_thresholds(layers, k))), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_keep_floors_and_caps(path, kind):
    random = np.random.default_rng(KINDS.index(kind))
    for _ in range(5):
        arrays = [random_scores(random, kind, size) + random.integers(0, 3) for size in random.integers(0, 200, 5)]
        floors, caps = np.sort([random.integers(0, len(array) + 1, 2) for array in arrays]).T.tolist()
        k = int(random.integers(sum(floors), sum(caps) + 1))
        layers = [TensorScores(torch.from_numpy(array)) for array in arrays]
        found = masks(layers, find_thresholds(layers, k, floors, caps))
        assert sum(int((~mask).sum()) for mask in found) == k
        for mask, expected in zip(found, masks_by_definition(arrays, k, floors, caps)):
            np.testing.assert_array_equal(mask, expected)


def test_many_scores_with_a_misleading_order(library):
    """The real sizes of sample, bracket and chunks, on an order that hides the low scores from most samples."""
    size = 1_500_007
    scores = np.sort(np.random.default_rng(0).standard_normal(size).astype(np.float32))
    arrays = [scores, np.where(np.arange(size) % 97 == 5, scores - 9, 3.0).astype(np.float32), np.zeros(0, np.float32)]
    layers = [TensorScores(torch.from_numpy(array)) for array in arrays]
    for k in (1, 13_000, 1_600_000, 2 * size - 1):
        expected = np.ones(2 * size, dtype=bool)
        expected[np.argsort(np.concatenate(arrays), kind="stable")[:k]] = False
        np.testing.assert_array_equal(np.concatenate(masks(layers, find_thresholds(layers, k))), expected)


def test_values_of_two_ranks_are_read_before_they_move():
    for seed in range(20):
        values = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
        ranks = [2000 + seed, 2000 + 40 * seed]
        packed = PackedScores(values, np.array([5000]))
        assert packed.values_at_ranks(ranks) == values.sort()[0][[rank - 1 for rank in ranks]].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_magnitudes_of_every_dtype_leave_the_tensor_alone(library, dtype):
    tensor = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor.clone()
    scores = TensorScores(tensor.T, magnitude=True)
    (mask,) = masks([scores], [find_threshold(scores, 9_001)])
    expected = np.ones(15_000, dtype=bool)
    expected[np.argsort(before.T.float().abs().numpy().reshape(-1), kind="stable")[:9_001]] = False
    np.testing.assert_array_equal(mask, expected)
    assert torch.equal(tensor, before)


def test_thresholds_by_hand():
    first, second = TensorScores(torch.tensor([4.0, 1.0, 2.0, 2.0])), TensorScores(torch.tensor([2.0, 9.0, 8.0]))
    assert find_thresholds([first, second], 0) == [Threshold(-INFINITY, 0), Threshold(-INFINITY, 0)]
    assert find_thresholds([first, second], 2) == [Threshold(2.0, 1), Threshold(-INFINITY, 0)]
    assert find_thresholds([first, second], 4) == [Threshold(2.0, 2), Threshold(2.0, 1)]
    assert find_thresholds([first, second], 4, caps=[1, 3]) == [Threshold(1.0, 1), Threshold(INFINITY, 3)]
    assert find_thresholds([first, second], 3, floors=[0, 2]) == [Threshold(1.0, 1), Threshold(8.0, 1)]
    assert find_thresholds([first, second], 7) == [Threshold(INFINITY, 4), Threshold(INFINITY, 3)]
    assert find_thresholds([], 0) == []
    # of the four equal units, two in the first chunk and two in the second, three are pruned
    kept, left = Threshold(1.0, 3).keep_mask(torch.tensor([1.0, 1.0, 2.0]), 3)
    assert kept.tolist() == [False, False, True] and left == 1
    kept, left = Threshold(1.0, 3).keep_mask(torch.tensor([1.0, 1.0, 0.0]), left)
    assert kept.tolist() == [False, True, False] and left == 0


def test_nan_is_refused_and_named(path):
    for size, places in ((500, [411]), (500, range(500)), (4, [0])):
        scores = torch.arange(float(size))
        scores[places] = math.nan
        layers = [TensorScores(torch.ones(3)), TensorScores(scores)]
        with pytest.raises(ValueError, match="scores of layer 1 must not be NaN"):
            find_thresholds(layers, 2)
        with pytest.raises(ValueError, match="scores of layer 1 must not be NaN"):
            find_thresholds(layers, 2, floors=[0, 1], caps=[1, 2])


def test_impossible_requests_are_refused():
    layers = [TensorScores(torch.ones(3)), TensorScores(torch.ones(2))]
    with pytest.raises(ValueError, match="k is 6, but 0 to 5 of the layers' 5 units can be pruned: change k"):
        find_thresholds(layers, 6)
    with pytest.raises(ValueError, match="k is 1, but 2 to 5 of the layers"):
        find_thresholds(layers, 1, floors=[1, 1])
    with pytest.raises(ValueError, match="layer 1 needs 0 <= floor <= cap <= 2.* floor is 0 and its cap 3"):
        find_thresholds(layers, 1, caps=[3, 3])
    with pytest.raises(ValueError, match="2 layers need as many floors and caps, but got 1 and 2"):
        find_thresholds(layers, 1, floors=[1])
