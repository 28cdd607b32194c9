"""Selected scores of many layers, packed into one tensor, and exact order statistics of them.

Shapes: N scores, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..distributed import Communicator
from ..numerics import as_fastest_array, prefers_numpy


Array = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class PackedScores:
    """Some scores of each of L layers.

    Args:
        values: (N) scores, layer by layer.
        lengths: (L) number of scores of each layer.
    """

    values: torch.Tensor
    lengths: np.ndarray

    def count_where(self, condition: Callable[[Any], Any]) -> np.ndarray:
        """Returns the number of scores of each layer (L) that satisfy an elementwise condition on arrays or tensors.

        Example:
            >>> PackedScores(torch.tensor([1.0, 2.0, 3.0]), np.array([2, 1])).count_where(lambda values: values > 1)
            array([1, 1])
        """
        hits: Any = condition(as_fastest_array(self.values)).nonzero()
        ends = self.lengths.cumsum()
        if isinstance(hits, tuple):
            return np.diff(np.searchsorted(hits[0], ends), prepend=0)
        before = torch.searchsorted(hits[:, 0].contiguous(), torch.from_numpy(ends).to(hits.device))
        return np.diff(before.cpu().numpy(), prepend=0)

    def split(self, num_layers: Sequence[int]) -> list[PackedScores]:
        """Splits into the scores of the first num_layers[0] layers, of the next num_layers[1] layers, and so on."""
        lengths = np.split(self.lengths, np.cumsum(num_layers)[:-1])
        values = self.values.split([int(part.sum()) for part in lengths])
        return [PackedScores(*both) for both in zip(values, lengths, strict=True)]

    def values_at_ranks(self, ranks: Sequence[int]) -> list[float]:
        """Returns the scores at these ranks, from 1 to N and ascending, of an ascending sort of all layers' scores.

        Example:
            >>> PackedScores(torch.tensor([3.0, 1.0, 2.0]), np.array([3])).values_at_ranks([1, 3])
            [1.0, 3.0]
        """
        if not prefers_numpy(self.values.device):
            return self.values.sort()[0][[rank - 1 for rank in ranks]].tolist()
        values, selected, start = self.values.numpy().copy(), [], 0
        for rank in ranks:  # one by one is faster than all at once, since each partition sorts only the rest
            values[start:].partition(rank - 1 - start)
            selected.append(float(values[rank - 1]))  # read now: the next partition may move it
            start = rank - 1
        return selected

    def lowest_value_reaching(self, goal: float, total: Callable[[np.ndarray], float]) -> float:
        """Returns min{v: total(counts) >= goal} for counts[l] = #{scores <= v of layer l}, by quickselect.

        Args:
            goal: must satisfy total(0) < goal <= total(lengths).
            total: maps counts (L) to a number that does not decrease with any count.
        """
        values, num_below = self.values, np.zeros_like(self.lengths)
        layer_of = torch.repeat_interleave(torch.from_numpy(self.lengths)).to(values.device)

        def count(chosen: torch.Tensor) -> np.ndarray:
            return num_below + torch.bincount(layer_of[chosen], minlength=len(num_below)).cpu().numpy()

        while True:
            pivot = values[:: len(values) // 256 + 1].median()
            below, up_to = count(values < pivot), count(values <= pivot)
            if total(below) < goal <= total(up_to):
                return float(pivot)
            is_lower = total(below) >= goal
            rest = values < pivot if is_lower else values > pivot
            num_below = num_below if is_lower else up_to
            values, layer_of = values[rest], layer_of[rest]


def gather_scores(
    parts_by_layer: Sequence[list[Array]], layer_indices: Sequence[int], communicator: Communicator
) -> PackedScores:
    """Packs the scores that all ranks have collected of each of L layers.

    Args:
        parts_by_layer: (L) lists of 1-D arrays or tensors of this rank.
        layer_indices: (L) names of the layers in an error message.
        communicator: of the ranks, which call this function together.

    Raises:
        ValueError: a score is NaN.
    """
    values = _concatenate([part for parts in parts_by_layer for part in parts])
    lengths = np.array([sum(map(len, parts)) for parts in parts_by_layer], dtype=np.int64)
    if communicator.world_size > 1:
        gathered = communicator.all_gather(torch.from_numpy(lengths), [len(lengths)] * communicator.world_size)
        lengths_by_rank = [part.tolist() for part in gathered]
        values_by_rank = communicator.all_gather(values, [sum(some) for some in lengths_by_rank])
        pieces = [part.split(some) for part, some in zip(values_by_rank, lengths_by_rank, strict=True)]
        values = torch.cat([piece for layer in zip(*pieces, strict=True) for piece in layer])
        lengths = np.sum(lengths_by_rank, axis=0, dtype=np.int64)
    scores = PackedScores(values, lengths)
    num_nan = scores.count_where(lambda values: values != values)
    if num_nan.any():
        raise nan_error(layer_indices[int(num_nan.argmax())])
    return scores


def nan_error(layer_index: int) -> ValueError:
    """Returns the error about a layer whose scores are NaN."""
    return ValueError(
        f"the scores of layer {layer_index} must not be NaN, but some are: check the weights, gradients or "
        "activations that they are computed from"
    )


def _concatenate(parts: Sequence[Array]) -> torch.Tensor:
    if len(parts) == 1:
        return torch.as_tensor(parts[0])
    if all(isinstance(part, np.ndarray) for part in parts):
        return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]))
    tensors = [torch.as_tensor(part) for part in parts]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    return torch.cat([tensor.to(device) for tensor in tensors])
