"""Divides calibration batches into the steps of block reconstruction and the samples that are held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from ..calibration.batches import count_tokens, num_rows, slice_rows
from ..config import Reconstruction


_STEP_TOKENS, _STEP_SAMPLES = 2048, 16
"""Tokens of a step, or samples that have no tokens, where the options do not say."""


@dataclass(frozen=True)
class TuningSamples:
    """Calibration batches, cut where a step or the held-out samples begin.

    Args:
        batches: of all ranks, in the order of the samples.
        steps: the numbers of the batches of each step, for one pass over the samples that are not held out.
        holdout: the numbers of the batches that are held out.

    Example:
        >>> import torch
        >>> options = Reconstruction(samples=4, holdout=0.25)
        >>> samples = TuningSamples.of([torch.ones(5, 2), torch.ones(3, 2)], options, 1)
        >>> [len(batch) for batch in samples.batches], samples.steps, samples.holdout
        ([3, 2, 1, 2], [range(0, 1), range(1, 3)], range(3, 4))
    """

    batches: list[Any]
    steps: list[range]
    holdout: range

    @classmethod
    def of(cls, batches: Sequence[Any], options: Reconstruction, world_size: int) -> TuningSamples:
        """Divides batches: the last samples are held out, and all steps have about the same number of samples, in
        equal parts for each rank.

        Batches whose tensors differ in their number of rows are not cut, and count as one sample.

        Raises:
            ValueError: nothing is left to tune with, or to hold out.
        """
        counts = [num_rows(batch) for batch in batches]
        total = sum(count or 1 for count in counts)
        held_out = max(1, round(options.holdout * total))
        tuned = total - held_out
        if tuned < 1:
            raise ValueError(
                f"`reconstruct` needs two calibration samples or more, one of them to judge the result, but there are "
                f"{total}: give more, or leave `reconstruct` out."
            )
        starts = list(_step_starts(tuned, options.samples or _samples_per_step(batches, total)))
        cuts = [*(cut for start, stop in zip(starts, [*starts[1:], tuned]) for cut in _parts(start, stop, world_size))]
        pieces: list[Any] = []
        first_rows: list[int] = []
        offset = 0
        for batch, count in zip(batches, counts, strict=True):
            end = offset + (count or 1)
            inner = [offset, *(cut for cut in (*cuts, tuned) if offset < cut < end), end]
            for start, stop in zip(inner, inner[1:]):
                pieces.append(batch if len(inner) == 2 else slice_rows(batch, start - offset, stop - offset))
                first_rows.append(start)
            offset = end
        bounds = [next(i for i, row in enumerate(first_rows) if row >= start) for start in (*starts, tuned)]
        steps = [range(start, stop) for start, stop in zip(bounds, bounds[1:])]
        return cls(pieces, steps, range(bounds[-1], len(pieces)))


def _samples_per_step(batches: Sequence[Any], total: int) -> int:
    """As many samples as have about `_STEP_TOKENS` tokens; `_STEP_SAMPLES` where they have none."""
    if not all(_has_token_ids(batch) for batch in batches):
        return _STEP_SAMPLES
    tokens = sum(count_tokens(batch) for batch in batches)
    return max(1, round(_STEP_TOKENS * total / max(1, tokens)))


def _has_token_ids(batch: Any) -> bool:
    leaves = _pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return any(torch.is_tensor(leaf) and not leaf.is_floating_point() for leaf in leaves)


def _step_starts(total: int, samples: int) -> Iterator[int]:
    """The first sample of each step, for steps of nearly equal size."""
    count = -(-total // samples)
    return (number * total // count for number in range(count))


def _parts(start: int, stop: int, count: int) -> Iterator[int]:
    """The first sample of each of `count` parts of nearly equal size, without empty ones."""
    count = min(count, stop - start)
    return (start + number * (stop - start) // count for number in range(count))
