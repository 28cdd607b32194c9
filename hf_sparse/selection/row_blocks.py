"""Bands: the rows of units of a layer, and which process decides which of them when the weight is split.

Where the split runs through no unit, and through no row whose units compete with each other, every process decides
what it holds, and nothing moves. Elsewhere (a block across two shards, the inputs of a row on many processes) the
bands are dealt out in equal numbers, and what the decision needs of the weight moves there and back.

Shapes: E matrices of a layer, R rows of each, P positions, C columns; H rows make a band, and of those W neighbouring
columns must stay together.
"""

from __future__ import annotations

from ..distributed import Shard, ShardRegion, regions_of_range
from ..model.layers import PrunableLayer


def keeps_units_whole(layer: PrunableLayer, shard: Shard, height: int, width: int) -> bool:
    """Whether every process holds whole bands only, or such parts of them as can be decided by themselves."""
    return all(_is_whole(layer, box, height, width) for boxes in shard.regions_by_rank for box in boxes)


def _is_whole(layer: PrunableLayer, box: ShardRegion, height: int, width: int) -> bool:
    column_dim = _column_dim(layer)
    for dim, (start, stop, size) in enumerate(zip(box.start, box.stop, layer.shape, strict=True)):
        if dim in (layer.row_dim, column_dim):
            step = height if dim == layer.row_dim else width
            if start % step or (stop % step and stop != size):
                return False
        elif dim != layer.expert_dim and (start, stop) != (0, size):
            return False
    return True


def _column_dim(layer: PrunableLayer) -> int | None:
    """The dimension that counts columns; None where positions lie between those of a row and the next."""
    if layer.kind == "conv2d":
        return None
    return next(dim for dim in range(len(layer.shape)) if dim not in (layer.row_dim, layer.expert_dim))


def partition_rows(layer: PrunableLayer, height: int, processes: int) -> tuple[tuple[ShardRegion, ...], ...]:
    """The bands of each process, as boxes of the weight: as many for each, as far as that goes."""
    matrices = layer.shape[0] if layer.expert_dim == 0 else 1
    per_matrix = layer.matrix_shape[0] // height
    ends = [matrices * per_matrix * count // processes for count in range(processes + 1)]
    return tuple(
        tuple(_box(layer, part, height) for part in regions_of_range((matrices, per_matrix), first, last))
        for first, last in zip(ends, ends[1:])
    )


def _box(layer: PrunableLayer, part: ShardRegion, height: int) -> ShardRegion:
    """The box of the weight that holds bands part.start[1]..part.stop[1] of matrices part.start[0]..part.stop[0]."""
    start, stop = [0] * len(layer.shape), list(layer.shape)
    if layer.expert_dim == 0:
        start[0], stop[0] = part.start[0], part.stop[0]
    start[layer.row_dim], stop[layer.row_dim] = part.start[1] * height, part.stop[1] * height
    return ShardRegion(tuple(start), tuple(stop))


def first_offset(layer: PrunableLayer, box: ShardRegion) -> int:
    """The place of a box's first weight when the matrices (R, P, C) are flattened one after the other."""
    rows, positions, columns = layer.matrix_shape
    matrix, column_dim = box.start[0] if layer.expert_dim == 0 else 0, _column_dim(layer)
    column = 0 if column_dim is None else box.start[column_dim]
    return (matrix * rows + box.start[layer.row_dim]) * positions * columns + column
