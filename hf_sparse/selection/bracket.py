"""Brackets: small intervals of scores that contain the common threshold of a selection problem.

Shapes: L layers, B buckets of a histogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..distributed import Communicator
from .packed_scores import PackedScores
from .problem import SelectionProblem


_MIN_SAMPLED = 4096  # below this number of units, all are collected without a sample
_DEVIATIONS = 4.0  # half-width of a bracket in standard deviations of the sample's rank: 1 in 16,000 searches misses
_BUCKETS = 256  # of the histogram of each layer


@dataclass(frozen=True)
class Bracket:
    """The interval [low, high] of scores.

    Args:
        low, high: the ends.
        counts_ends: whether scores equal to an end are counted instead of collected, because there are many.
    """

    low: float
    high: float
    counts_ends: bool = False


ALL_SCORES = Bracket(-math.inf, math.inf)


def sample_sizes(problem: SelectionProblem) -> np.ndarray:
    """Returns the number of scores to sample of each layer (L): about 2·n^(2/3) of all n units, which balances the
    cost of the sample with that of the scores inside its bracket; 0 for small problems."""
    total = int(problem.sizes.sum())
    if total <= _MIN_SAMPLED:
        return np.zeros_like(problem.sizes)
    return np.diff(np.floor(np.cumsum(problem.sizes) * (2 * total ** (2 / 3) / total)), prepend=0).astype(np.int64)


def bracket_from_sample(problem: SelectionProblem, sample: PackedScores) -> Bracket:
    """Returns a bracket that very likely contains the common threshold; all scores if the sample is empty."""
    if not len(sample.values):
        return ALL_SCORES
    low, high = (_bounded_interval if problem.is_bounded else _unbounded_interval)(problem, sample)
    num_at_ends = sample.count_where(lambda values: (values == low) | (values == high)).sum()
    return Bracket(low, high, counts_ends=bool(num_at_ends > len(sample.values) // 64))


def _unbounded_interval(problem: SelectionProblem, sample: PackedScores) -> tuple[float, float]:
    """Returns the sample's scores at the ranks around k that the binomial distribution allows."""
    fraction, count = problem.k / problem.sizes.sum(), len(sample.values)
    half = _DEVIATIONS * math.sqrt(count * fraction * (1 - fraction)) + 8
    low, high = math.floor(count * fraction - half), math.ceil(count * fraction + half)
    at_low, at_high = sample.values_at_ranks([min(max(rank, 1), count) for rank in (low, high)])
    return at_low if low >= 1 else -math.inf, at_high if high <= count else math.inf


def _bounded_interval(problem: SelectionProblem, sample: PackedScores) -> tuple[float, float]:
    """The same with each layer's counts scaled up to the layer, so that its floor and cap bind as in the layer."""
    scale = problem.sizes / np.maximum(sample.lengths, 1)
    # layers without samples are taken to be pruned like the average
    unsampled = np.where(sample.lengths == 0, problem.sizes * (problem.k / problem.sizes.sum()), 0.0)

    def total_pruned(counts: np.ndarray) -> float:
        return problem.total_pruned(counts * scale + unsampled)

    def value_reaching(goal: float) -> float:
        if goal <= total_pruned(np.zeros_like(scale)):
            return -math.inf
        if goal > total_pruned(sample.lengths):
            return math.inf
        return sample.lowest_value_reaching(goal, total_pruned)

    middle = value_reaching(problem.k)
    counts = sample.count_where(lambda values: values <= middle)
    is_free = (counts * scale > problem.floors) & (counts * scale < problem.caps)
    variance = (scale**2 * counts * (1 - counts / np.maximum(sample.lengths, 1)))[is_free].sum()
    half = _DEVIATIONS * math.sqrt(variance) + 8 * scale.max()
    return value_reaching(problem.k - half), value_reaching(problem.k + half)


def bracket_from_histograms(problem: SelectionProblem, communicator: Communicator) -> Bracket:
    """Returns a bracket that contains the common threshold for certain and few other scores.

    Each pass over the scores narrows the bracket to one bucket of a histogram over the float32 numbers in it.
    """
    low, high = to_key(-math.inf), to_key(math.inf)
    num_below = np.zeros_like(problem.sizes)
    few = 2**18 + int(problem.sizes.sum()) // 64
    while True:
        width = (high - low) // _BUCKETS + 1
        local_LB = torch.zeros(len(problem.layers), _BUCKETS, dtype=torch.int64)
        for counts_B, layer in zip(local_LB, problem.layers, strict=True):
            for chunk in layer.chunks():
                keys = _keys_of(chunk)
                keys = keys[(keys >= low) & (keys <= high)]
                buckets = (keys - low).div_(width, rounding_mode="floor")
                counts_B += torch.bincount(buckets, minlength=_BUCKETS).cpu()
        counts_LB = communicator.sum_counts(local_LB.numpy())
        up_to_LB = num_below[:, None] + counts_LB.cumsum(1)
        is_reached = problem.num_pruned(up_to_LB.T).sum(1) >= problem.k
        # NaN is in no bucket, so that k may not be reached; the pass that follows raises the error
        bucket = int(is_reached.argmax()) if is_reached.any() else _BUCKETS - 1
        num_below = up_to_LB[:, bucket] - counts_LB[:, bucket]
        low, high = low + bucket * width, min(high, low + (bucket + 1) * width - 1)
        if low == high or counts_LB[:, bucket].sum() <= few:
            return Bracket(from_key(low), from_key(high), counts_ends=True)


def _keys_of(scores: torch.Tensor) -> torch.Tensor:
    """Returns int64 keys in the order of float32 scores; -0.0 has the key of 0.0."""
    bits = (scores + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def to_key(value: float) -> int:
    """Returns the key of a float32 score."""
    bits = int(np.float32(value).view(np.int32))
    return bits ^ (0x7FFFFFFF if bits < 0 else 0)


def from_key(key: int) -> float:
    """Returns the score of a key."""
    return float(np.int32(key ^ (0x7FFFFFFF if key < 0 else 0)).view(np.float32)) + 0.0
