"""The parts of a weight that are computed at a time, and random numbers by the position of each entry."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import torch

from ...distributed import Shard, ShardRegion
from ...model.layers import PrunableLayer
from ...numerics import chunk_size, hash_bits, hash_uniform


class WeightParts:
    """Rows of the matrices of a weight, as far as this rank holds them, about a chunk at a time.

    A rank without entries of the weight has one empty part.

    Args:
        layer: the weight.
        shard: what this rank holds of it.
        unit_rows: the number of rows that stay together.
    """

    def __init__(self, layer: PrunableLayer, shard: Shard, unit_rows: int = 1):
        self.layer, self.shard, self.name = layer, shard, layer.name
        # A quarter, because weight, gradient, theta and its moments are in the cache together.
        size = chunk_size(shard.tensor.device) // 4
        self._parts: list[tuple[int, ShardRegion]] = [
            (index, part)
            for index, region in enumerate(shard.local_regions)
            for part in _split(region, layer, unit_rows, size)
        ]

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns the parts (R, P, C) of a tensor of the shape of the shard's: views, unless it is a convolution's
        that is not contiguous."""
        if not self._parts:
            _, positions, columns = self.layer.matrix_shape
            return [tensor.reshape(-1)[:0].reshape(0, positions, columns)]
        locals_ = self.shard.local_views(tensor)
        regions = self.shard.local_regions
        return [self.layer.matrices(locals_[index][part.slices_in(regions[index])])[0] for index, part in self._parts]

    def write(self, tensor: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Writes all parts into a tensor of the shape of the shard's."""
        target = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for view, part in zip(self.views(target), parts, strict=True):
            view.copy_(part)
        if target is not tensor:
            tensor.copy_(target)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns a contiguous tensor of the shape of the shard's, with the entries of all parts."""
        tensor = torch.empty(self.shard.tensor.shape, dtype=parts[0].dtype, device=parts[0].device)
        self.write(tensor, parts)
        return tensor

    def noise(self, part: int, key: int) -> torch.Tensor:
        """Returns numbers uniform in (0, 1), float32 of the shape of a part: a hash of the key and of the position of
        each entry in the whole weight.

        Args:
            part: index among `views`.
            key: any integer.
        """
        device = self.shard.tensor.device
        if not self._parts:
            return torch.empty(self.views(self.shard.tensor)[part].shape, dtype=torch.float32, device=device)
        positions = self.layer.matrices(_positions(self._parts[part][1], self.layer.shape, device))[0]
        salt = _signed(zlib.crc32(self.name.encode()) << 32)
        numbers = hash_bits(positions ^ salt) + _signed(key)
        # Neither 0 nor 1, where logarithms are infinite.
        return hash_uniform(numbers).mul_(1 - 2.0**-23).add_(2.0**-24)


def noise_key(seed: int, step: int, index: int) -> int:
    """Returns a number for each combination of its arguments, as good as random."""
    return int(hash_bits(hash_bits(torch.tensor([seed * 1_000_003 + index])) + step))


def _split(region: ShardRegion, layer: PrunableLayer, unit_rows: int, size: int) -> Iterator[ShardRegion]:
    """Yields the parts of a region: each of one expert, and of as many rows as have about `size` entries."""
    row_dim, expert_dim = layer.row_dim, layer.expert_dim
    experts = range(1) if expert_dim is None else range(region.start[expert_dim], region.stop[expert_dim])
    rows = region.shape[row_dim]
    per_row = region.numel // (rows * len(experts))
    step = max(1, size // (per_row * unit_rows)) * unit_rows
    for expert in experts:
        for first in range(region.start[row_dim], region.stop[row_dim], step):
            start, stop = list(region.start), list(region.stop)
            start[row_dim], stop[row_dim] = first, min(first + step, region.stop[row_dim])
            if expert_dim is not None:
                start[expert_dim], stop[expert_dim] = expert, expert + 1
            yield ShardRegion(tuple(start), tuple(stop))


def _positions(region: ShardRegion, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns the flat offset in a tensor of `shape` of each entry of a region, int64 of the region's shape."""
    positions = torch.zeros((), dtype=torch.int64, device=device)
    for dim in range(len(shape)):
        offsets = torch.arange(region.start[dim], region.stop[dim], device=device) * math.prod(shape[dim + 1 :])
        positions = positions + offsets.view(-1, *[1] * (len(shape) - 1 - dim))
    return positions


def _signed(number: int) -> int:
    """Returns the lowest 64 bits of a number as a signed number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
