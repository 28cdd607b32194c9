"""Squared norms of units, and tensors of units spread over their weights, whatever splits the weights over ranks.

Units that one rank holds whole are pooled where they are, in chunks. Of units that a split divides each rank sums what
it holds, and the caller sums over ranks: only sums are sent, and no rank needs a whole weight. Sums are float64, so
that the order of additions does not change a result of float32.

Shapes: R rows, P kernel positions and C columns of a part of one matrix, U of the units of such a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..distributed import Shard, ShardRegion
from ..model.layers import PrunableLayer
from ..numerics import chunk_size
from ..patterns import Pattern


@dataclass(frozen=True)
class _SplitRows:
    """Rows of one matrix that a region holds, of units that it does not hold whole."""

    matrix: int
    first: int
    stop: int
    region: ShardRegion
    held: int
    """Index of the region of the shard that contains `region`."""


class LayerUnits:
    """The units of one layer, as far as this rank holds them.

    Args:
        layer: the weight.
        pattern: what its units are.
        shard: the part of this rank.

    Attributes:
        size: the number of weights of a unit.
        num_split: the number of sums that `add_split_squares` takes: of units that are divided over regions.
    """

    def __init__(self, layer: PrunableLayer, pattern: Pattern, shard: Shard):
        self.layer, self.pattern, self.shard = layer, pattern, shard
        rows, positions, columns = layer.matrix_shape
        num_units = pattern.num_units(layer.matrix_shape)
        self.size = rows * positions * columns // num_units
        self._height, self._width = pattern.unit_rows(rows), pattern.unit_columns(columns)
        self._units_per_block = num_units * self._height // rows
        self._parts = [self._partition(region) for region in shard.local_regions]
        blocks = sorted({block for regions in shard.regions_by_rank for block in self._split_blocks(regions)})
        self._block_index = {block: index for index, block in enumerate(blocks)}
        self.num_split = len(blocks) * self._units_per_block

    def whole_parts(self, *tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Yields chunks (R, P, C) of whole units, views of tensors of the shard's layout."""
        views = [self.shard.local_views(tensor) if self.shard.local_regions else [] for tensor in tensors]
        for number, (held, (whole, _)) in enumerate(zip(self.shard.local_regions, self._parts, strict=True)):
            if whole is None:
                continue
            index = whole.slices_in(held)
            for matrices in zip(*(self.layer.matrices(view[number][index]) for view in views), strict=True):
                rows, others = len(matrices[0]), max(1, matrices[0][0].numel())
                step = max(1, chunk_size(matrices[0].device) // (others * self._height)) * self._height
                for first in range(0, rows, step):
                    yield [matrix[first : first + step] for matrix in matrices]

    def squared_norms(self, weight_RPC: torch.Tensor) -> torch.Tensor:
        """Returns the squared norms (U) of the units of a part of `whole_parts`, float64."""
        return self.pattern.pool(weight_RPC.double().square()) * self.size

    def add_split_squares(self, sums: torch.Tensor) -> None:
        """Adds the squares of this rank's weights to the sums (num_split) of their units, float64, unless another rank
        with the same weights adds them."""
        if not self.shard.is_primary:
            return
        for units, weight in self.split_parts(self.shard.tensor):
            squares = weight.double().square().sum_to_size(units.shape)
            sums.index_add_(0, units.reshape(-1), squares.reshape(-1))

    def split_parts(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields chunks of the weights of divided units: the index of the unit of each weight, int64 of a shape that
        broadcasts to (R, P, C), and views (R, P, C) of tensors of the shard's layout."""
        if not self.num_split:
            return
        views = [self.shard.local_views(tensor) for tensor in tensors if self.shard.local_regions]
        for part in self._split_rows:
            index = part.region.slices_in(self.shard.local_regions[part.held])
            matrices = [self.layer.matrices(view[part.held][index])[part.matrix] for view in views]
            positions, columns = self._positions(part.region), self._columns(part.region)
            step = max(1, chunk_size(tensors[0].device) // max(1, matrices[0][0].numel()))
            expert = self._first_expert(part.region) + part.matrix
            for first in range(part.first, part.stop, step):
                stop = min(part.stop, first + step)
                units = self._unit_ids(expert, first, stop, positions, columns)
                chunk = slice(first - part.first, stop - part.first)
                yield units, *(matrix[chunk] for matrix in matrices)

    # Layout

    @cached_property
    def _split_rows(self) -> list[_SplitRows]:
        row_dim, expert_dim = self.layer.row_dim, self.layer.expert_dim
        return [
            _SplitRows(matrix, region.start[row_dim], region.stop[row_dim], region, held)
            for held, (_, split) in enumerate(self._parts)
            for region in split
            for matrix in range(1 if expert_dim is None else region.shape[expert_dim])
        ]

    @cached_property
    def _block_units(self) -> torch.Tensor:
        """The unit of each weight of a block of rows, int64 of a shape that broadcasts to (R, P, C): 1 in dimensions
        along which units extend."""
        _, positions, columns = self.layer.matrix_shape
        shape = (self._height, positions, columns)
        units = torch.arange(self._units_per_block, device=self._device).view(self.pattern.unit_shape(shape))
        units = self.pattern.expand(units, shape).expand(shape)
        for dim in range(3):
            units = units.narrow(dim, 0, 1) if units.stride(dim) == 0 else units
        return units

    @cached_property
    def _first_units(self) -> torch.Tensor:
        """The index of the first divided unit of each block of rows, by matrix, int64; undefined without one."""
        rows, *_ = self.layer.matrix_shape
        first = torch.zeros(self.layer.num_matrices, rows // self._height, dtype=torch.int64)
        for (matrix, block), index in self._block_index.items():
            first[matrix, block] = index * self._units_per_block
        return first.to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.shard.tensor.device

    def _unit_ids(
        self, expert: int, first: int, stop: int, positions: torch.Tensor | slice, columns: slice
    ) -> torch.Tensor:
        """Returns the index of the unit of each weight of rows first..stop-1, of a shape that broadcasts to them."""
        within = self._block_units
        within = within[:, :, columns] if within.shape[2] > 1 else within
        within = within[:, positions] if within.shape[1] > 1 else within
        if within.shape[0] == 1 and first // self._height == (stop - 1) // self._height:
            return within + self._first_units[expert, first // self._height]
        rows = torch.arange(first, stop, device=self._device)
        within = within[rows % self._height] if within.shape[0] > 1 else within
        return within + self._first_units[expert, rows // self._height][:, None, None]

    def _partition(self, region: ShardRegion) -> tuple[ShardRegion | None, list[ShardRegion]]:
        """Returns the part of a region that has whole units, and the other parts."""
        dim, height = self.layer.row_dim, self._height
        start, stop = region.start[dim], region.stop[dim]
        first, last = -(-start // height) * height, stop // height * height
        if not self._has_whole_columns(region) or first >= last:
            return None, [region]
        edges = [(start, first), (last, stop)]
        return _rows(region, dim, first, last), [_rows(region, dim, *edge) for edge in edges if edge[0] < edge[1]]

    def _has_whole_columns(self, region: ShardRegion) -> bool:
        for dim, (start, stop, size) in enumerate(zip(region.start, region.stop, self.layer.shape, strict=True)):
            if dim == self.layer.column_dim:
                if start % self._width or (stop % self._width and stop != size):
                    return False
            elif dim not in (self.layer.row_dim, self.layer.expert_dim) and (start, stop) != (0, size):
                return False
        return True

    def _split_blocks(self, regions: Sequence[ShardRegion]) -> Iterator[tuple[int, int]]:
        """Yields matrix and number of each block of rows with units that one of the regions holds partly."""
        dim = self.layer.row_dim
        for region in (region for held in regions for region in self._partition(held)[1]):
            expert, count = self._first_expert(region), len(self._experts(region))
            for matrix in range(expert, expert + count):
                for block in range(region.start[dim] // self._height, -(-region.stop[dim] // self._height)):
                    yield matrix, block

    def _experts(self, region: ShardRegion) -> range:
        dim = self.layer.expert_dim
        return range(1) if dim is None else range(region.start[dim], region.stop[dim])

    def _first_expert(self, region: ShardRegion) -> int:
        return self._experts(region).start

    def _columns(self, region: ShardRegion) -> slice:
        return slice(region.start[self.layer.column_dim], region.stop[self.layer.column_dim])

    def _positions(self, region: ShardRegion) -> torch.Tensor | slice:
        """Returns the kernel positions (P) of a region."""
        matrix_dims = (self.layer.row_dim, self.layer.column_dim, self.layer.expert_dim)
        dims = [dim for dim in range(len(self.layer.shape)) if dim not in matrix_dims]
        if not dims:
            return slice(None)
        shape = [self.layer.shape[dim] for dim in dims]
        index = tuple(slice(region.start[dim], region.stop[dim]) for dim in dims)
        return torch.arange(self.layer.matrix_shape[1], device=self._device).view(shape)[index].reshape(-1)


def _rows(region: ShardRegion, dim: int, first: int, stop: int) -> ShardRegion:
    """Returns the part of a region with first <= index[dim] < stop."""
    start = (*region.start[:dim], first, *region.start[dim + 1 :])
    return ShardRegion(start, (*region.stop[:dim], stop, *region.stop[dim + 1 :]))
