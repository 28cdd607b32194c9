"""Common thresholds by histograms on an accelerator: few kernels, and few numbers for the host to wait for.

Each pass over the scores narrows the range of a problem's threshold to one bucket of a histogram over the keys of
scores in it, until buckets are single keys. The first range is that of a sample. Scores that are stored are read in
place by one kernel for all layers; others are computed in chunks.

Shapes: L layers, P problems, B buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..kernels import StoredScores
from .bracket import from_key, to_key
from .packed_scores import nan_error
from .problem import SelectionProblem


_SAMPLED = 1 << 24  # number of scores from which a sample of about this many is read first


class Found(NamedTuple):
    """The threshold of a problem, and the numbers of scores of each of its layers (L) below and up to it."""

    value: float
    num_below: np.ndarray
    num_up_to: np.ndarray


def search_by_histograms(problems: Sequence[SelectionProblem]) -> list[Found]:
    """Finds the common threshold of each problem, where sum(floors) < k < sum(caps).

    All scores are on one device that has kernels, and belong to this process.

    Raises:
        ValueError: a score is NaN.
    """
    search = _Search(problems)
    search.narrow_by_sample()
    while not all(search.found):
        search.narrow()
    return [found for found in search.found if found]


class _Search:
    """The ranges of keys (P) in which the thresholds are, and the histograms of the scores in them."""

    def __init__(self, problems: Sequence[SelectionProblem]):
        self.problems = problems
        self.layers = [layer for problem in problems for layer in problem.layers]
        self.device = self.layers[0].device
        self.stored = [layer.stored for layer in self.layers]
        bits = {torch.bfloat16: 16, torch.float16: 13}  # that are the same in all scores of these dtypes
        self.dropped_bits = min(bits.get(stored.tensor.dtype, 0) if stored else 0 for stored in self.stored)
        self.lowest, self.highest = (to_key(value) >> self.dropped_bits for value in (-math.inf, math.inf))
        self.ranges = [(self.lowest, self.highest) for _ in problems]
        self.bucket_bits = max(8, min(12, 20 - len(self.layers).bit_length()))
        self.sizes = np.concatenate([problem.sizes for problem in problems])
        self.problem_of = np.repeat(np.arange(len(problems)), [len(problem.layers) for problem in problems])
        bounds = [np.concatenate([getattr(each, name) for each in problems]) for name in ("floors", "caps")]
        self.floors, self.caps, self.problem_index, self.goals = (
            torch.from_numpy(numbers).to(self.device)
            for numbers in (*bounds, self.problem_of, np.array([problem.k for problem in problems]))
        )
        self.found: list[Found | None] = [None] * len(problems)

    def narrow_by_sample(self) -> None:
        """Narrows the ranges to a few buckets, in which a sample has the thresholds."""
        from ..kernels.scores import BLOCK

        stride = int(self.sizes.sum()) // _SAMPLED
        if stride < 2:
            return
        counts_LB = self._new_counts()
        shifts = self._shifts()
        lengths = np.array(self._count(counts_LB, shifts, stride))
        scale_L = torch.from_numpy(self.sizes / np.maximum(lengths, 1)).to(self.device)
        totals_PB = self._totals(counts_LB, scale_L)
        sizes, sampled = (np.bincount(self.problem_of, numbers) for numbers in (self.sizes, lengths))
        # Neighbours are alike, so that the error is that of so many blocks instead of so many scores.
        margin_P = torch.from_numpy(sizes * (0.005 + 0.25 / np.sqrt(sampled / BLOCK + 1))).to(self.device)
        at_low, at_high = ((totals_PB < (self.goals + sign * margin_P)[:, None]).sum(1).tolist() for sign in (-1, 1))
        for index, (low, high) in enumerate(zip(at_low, at_high, strict=True)):
            first, last = self.lowest + (low << shifts[index]), self.lowest + ((high + 1) << shifts[index]) - 1
            self.ranges[index] = min(first, self.highest), min(last, self.highest)

    def narrow(self) -> None:
        """Narrows each range by one pass over all scores."""
        counts_LB, shifts = self._new_counts(), self._shifts()
        self._count(counts_LB, shifts)
        totals_PB, histogram_LB = self._totals(counts_LB), counts_LB[:, 2:]
        bucket_P = (totals_PB < self.goals[:, None]).sum(1)
        below_P = self._sum(self._clamp(counts_LB[:, :1]))[:, 0]
        picked_L1 = bucket_P.clamp(max=histogram_LB.shape[1] - 1)[self.problem_index][:, None]
        up_to_L = counts_LB[:, 0] + histogram_LB.cumsum(1).gather(1, picked_L1)[:, 0]
        below_L = up_to_L - histogram_LB.gather(1, picked_L1)[:, 0]
        parts = bucket_P, (below_P >= self.goals).long(), counts_LB[:, 1], below_L, up_to_L
        numbers = torch.cat(parts).cpu().numpy()
        buckets, misses, nan, below, up_to = np.split(numbers, np.cumsum([len(part) for part in parts])[:-1])
        if nan.any():
            indices = [index for problem in self.problems for index in problem.layer_indices]
            raise nan_error(indices[int(nan.argmax())])
        for index, (bucket, shift) in enumerate(zip(buckets.tolist(), shifts, strict=True)):
            low, high = self.ranges[index]
            if misses[index]:
                self.ranges[index] = self.lowest, low - 1
            elif bucket == histogram_LB.shape[1]:
                self.ranges[index] = high + 1, self.highest
            else:
                first = low + (bucket << shift)
                self.ranges[index] = first, min(high, first + (1 << shift) - 1)
                if shift == 0 and self.found[index] is None:
                    mine = self.problem_of == index
                    self.found[index] = Found(self._value(first), below[mine], up_to[mine])

    def _value(self, key: int) -> float:
        """Returns the score of a key; the bits that were dropped are those of the key's sign."""
        return from_key((key << self.dropped_bits) | ((1 << self.dropped_bits) - 1 if key < 0 else 0))

    def _shifts(self) -> list[int]:
        """Returns for each problem the number of lower bits of keys that its buckets are wide."""
        return [max(0, (high - low).bit_length() - self.bucket_bits) for low, high in self.ranges]

    def _new_counts(self) -> torch.Tensor:
        return torch.zeros(len(self.layers), 2 + (1 << self.bucket_bits), dtype=torch.int64, device=self.device)

    def _count(self, counts_LB: torch.Tensor, shifts: Sequence[int], stride: int = 1) -> list[int]:
        """Counts all scores, or about one of every `stride`. Returns how many of each layer (L)."""
        from ..kernels.scores import count_keys, sample_lengths, to_device

        rows = [(*self.ranges[index], shifts[index]) for index in self.problem_of.tolist()]
        ranges = to_device(torch.tensor(rows, dtype=torch.int32), self.device)
        stored = {index: scores for index, scores in enumerate(self.stored) if scores is not None}
        lengths = sample_lengths(self.sizes.tolist(), stride)
        if stored:
            count_keys([*stored.values()], [*stored], ranges, counts_LB, self.dropped_bits, stride)
        for index, layer in enumerate(self.layers):
            if index in stored:
                continue
            chunks = layer.chunks() if stride == 1 else [layer.sample(math.ceil(layer.numel / stride))]
            lengths[index] = 0
            for chunk in chunks:
                count_keys([StoredScores(chunk)], [index], ranges, counts_LB, self.dropped_bits)
                lengths[index] += len(chunk)
        return lengths

    def _totals(self, counts_LB: torch.Tensor, scale_L: torch.Tensor | None = None) -> torch.Tensor:
        """Returns how many units of each problem are pruned with a threshold at the end of each bucket (P, B)."""
        up_to_LB = counts_LB[:, :1] + counts_LB[:, 2:].cumsum(1)
        return self._sum(self._clamp(up_to_LB if scale_L is None else up_to_LB * scale_L[:, None]))

    def _clamp(self, numbers_LX: torch.Tensor) -> torch.Tensor:
        bounds = (bound[:, None].to(numbers_LX.dtype) for bound in (self.floors, self.caps))
        return numbers_LX.clamp(*bounds)

    def _sum(self, numbers_LX: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the layers of each problem."""
        total = torch.zeros(len(self.problems), numbers_LX.shape[1], dtype=numbers_LX.dtype, device=self.device)
        return total.index_add_(0, self.problem_index, numbers_LX)
