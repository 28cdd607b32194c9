"""Cuts and masks against the definition: a stable sort of all scores, whose first k fall."""

import math

import numpy as np
import pytest
import torch

from hf_sparse import numerics
from hf_sparse.selection import scores, threshold
from hf_sparse.selection.ranking import Threshold, find_thresholds, keep, keep_mask_by_row, lowest
from hf_sparse.selection.scores import TensorScores


INFINITY = math.inf


@pytest.fixture(params=["numpy", "torch"])
def library(request, monkeypatch):
    """Runs a test with the code for CPU memory and with the code for accelerators."""
    if request.param == "torch":
        monkeypatch.setattr(numerics, "NUMPY_DEVICES", ())


@pytest.fixture(params=["collected", "sampled", "missed"])
def path(request, library, monkeypatch):
    """Makes few scores take the ways that many take: small chunks, a sample, and a sample that misled."""
    monkeypatch.setattr(numerics, "CPU_CHUNK", 37)
    monkeypatch.setattr(scores, "_MANY", 100)
    if request.param != "collected":
        monkeypatch.setattr(threshold, "_FEW", 3)
    if request.param == "missed":
        monkeypatch.setattr(threshold, "_BUCKETS", 5)
        monkeypatch.setattr(TensorScores, "sample", lambda self, count: self.tensor.reshape(-1)[:count].float())


def masks(layers, cuts):
    """Keep masks written chunk by chunk."""
    result = []
    for layer, cut in zip(layers, cuts):
        ties, parts = cut.ties, [torch.empty(0, dtype=torch.bool)]
        for chunk in layer.chunks():
            mask, ties = keep(chunk, cut, ties)
            parts.append(mask)
        result.append(torch.cat(parts).numpy())
    return result


def masks_by_definition(arrays, k, floors, caps):
    """The threshold by trial of every score, then its ties by layer, then each layer by its own stable sort."""
    floors = floors or [0] * len(arrays)
    caps = caps or [len(array) for array in arrays]

    def fallen(count):
        return [min(max(count(array), floor), cap) for array, floor, cap in zip(arrays, floors, caps)]

    falls = fallen(lambda array: 0)
    for value in np.unique(np.concatenate(arrays)):
        most = fallen(lambda array: int((array <= value).sum()))
        if sum(most) >= k:
            falls = fallen(lambda array: int((array < value).sum()))
            for index in range(len(arrays)):
                falls[index] += min(most[index] - falls[index], k - sum(falls))
            break
    result = []
    for array, fall in zip(arrays, falls):
        mask = np.ones(len(array), dtype=bool)
        mask[np.argsort(array, kind="stable")[:fall]] = False
        result.append(mask)
    return result


def random_scores(random, kind, size):
    normal = random.standard_normal(size)
    scores = {
        "normal": lambda: normal,
        "ties": lambda: random.integers(0, 4, size),
        "constant": lambda: np.zeros(size),
        "zeros": lambda: np.where(normal > 0, normal, random.choice([0.0, -0.0], size)),
        "pruned and protected": lambda: np.where(abs(normal) > 1, normal * INFINITY, normal),
        "tiny": lambda: normal * 1e-42,
        "sorted": lambda: np.sort(normal),
        "falling": lambda: -np.sort(normal),
        "periodic": lambda: np.where(np.arange(size) % 7 < 4, 100.0, normal),
    }
    return scores[kind]().astype(np.float32)


KINDS = ["normal", "ties", "constant", "zeros", "pruned and protected", "tiny", "sorted", "falling", "periodic"]


@pytest.mark.parametrize("kind", KINDS)
def test_lowest_together_is_a_stable_sort_of_all(path, kind):
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
def test_lowest_together_keeps_floors_and_caps(path, kind):
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
        assert threshold._ranked(values.clone(), ranks) == values.sort()[0][[rank - 1 for rank in ranks]].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_magnitudes_of_every_dtype_leave_the_tensor_alone(library, dtype):
    tensor = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor.clone()
    scores = TensorScores(tensor.T, magnitude=True)
    (mask,) = masks([scores], [lowest(scores, 9_001)])
    expected = np.ones(15_000, dtype=bool)
    expected[np.argsort(before.T.float().abs().numpy().reshape(-1), kind="stable")[:9_001]] = False
    np.testing.assert_array_equal(mask, expected)
    assert torch.equal(tensor, before)


def test_cuts_by_hand():
    first, second = TensorScores(torch.tensor([4.0, 1.0, 2.0, 2.0])), TensorScores(torch.tensor([2.0, 9.0, 8.0]))
    assert find_thresholds([first, second], 0) == [Threshold(-INFINITY, 0), Threshold(-INFINITY, 0)]
    assert find_thresholds([first, second], 2) == [Threshold(2.0, 1), Threshold(-INFINITY, 0)]
    assert find_thresholds([first, second], 4) == [Threshold(2.0, 2), Threshold(2.0, 1)]
    assert find_thresholds([first, second], 4, caps=[1, 3]) == [Threshold(1.0, 1), Threshold(INFINITY, 3)]
    assert find_thresholds([first, second], 3, floors=[0, 2]) == [Threshold(1.0, 1), Threshold(8.0, 1)]
    assert find_thresholds([first, second], 7) == [Threshold(INFINITY, 4), Threshold(INFINITY, 3)]
    assert find_thresholds([], 0) == []
    # of the four equal units, two in the first chunk and two in the second, three fall
    kept, left = keep(torch.tensor([1.0, 1.0, 2.0]), Threshold(1.0, 3), 3)
    assert kept.tolist() == [False, False, True] and left == 1
    kept, left = keep(torch.tensor([1.0, 1.0, 0.0]), Threshold(1.0, 3), left)
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
    with pytest.raises(ValueError, match="k is 6, but the layers can lose 0 to 5 of their 5 units: change k"):
        find_thresholds(layers, 6)
    with pytest.raises(ValueError, match="k is 1, but the layers can lose 2 to 5"):
        find_thresholds(layers, 1, floors=[1, 1])
    with pytest.raises(ValueError, match="layer 1 needs 0 <= floor <= cap <= 2.* floor is 0 and its cap 3"):
        find_thresholds(layers, 1, caps=[3, 3])
    with pytest.raises(ValueError, match="2 layers need as many floors and caps, but got 1 and 2"):
        find_thresholds(layers, 1, floors=[1])


@pytest.mark.parametrize("kind", KINDS)
def test_lowest_per_row_is_a_stable_sort_of_each(library, kind, monkeypatch):
    monkeypatch.setattr(numerics, "CPU_CHUNK", 50)
    random = np.random.default_rng(KINDS.index(kind))
    for rows, units in ((1, 1), (5, 7), (20, 13), (3, 200), (0, 4), (4, 0)):
        scores = random_scores(random, kind, rows * units).reshape(rows, units)
        for k in (0, units // 2, units, torch.from_numpy(random.integers(0, units + 1, rows))):
            expected = np.ones((rows, units), dtype=bool)
            for row, fall in enumerate(torch.as_tensor(k).expand(rows)):
                expected[row, np.argsort(scores[row], kind="stable")[: int(fall)]] = False
            np.testing.assert_array_equal(keep_mask_by_row(torch.from_numpy(scores), k).numpy(), expected)


def test_lowest_per_row_refuses():
    with pytest.raises(ValueError, match=r"k must be in 0\.\.2, the units of a row, but is 3\.\.3"):
        keep_mask_by_row(torch.ones(2, 2), 3)
    with pytest.raises(ValueError, match="must not be NaN"):
        keep_mask_by_row(torch.tensor([[1.0, math.nan]]), 1)
