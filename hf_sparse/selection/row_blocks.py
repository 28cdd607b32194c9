"""Row blocks: the rows of a layer that are selected together, and their partition over ranks.

A row block is as many rows as one unit spans. If every shard holds whole row blocks, each rank selects what it holds.
If shards split units (a block across two shards) or rows whose units compete (inputs of a row on several ranks), row
blocks are partitioned evenly over the ranks instead, and are redistributed for the selection.

Shapes: a layer has E matrices of R rows, P positions and C columns; a row block has `height` rows.
"""

from __future__ import annotations

from ..distributed import Shard, ShardRegion, regions_of_range
from ..model.layers import PrunableLayer


def keeps_units_whole(layer: PrunableLayer, shard: Shard, height: int, width: int) -> bool:
    """Returns whether every rank can select from its own shard: whether all regions hold whole row blocks of `height`
    rows and whole sets of `width` adjacent columns."""
    return all(_is_whole(layer, region, height, width) for regions in shard.regions_by_rank for region in regions)


def _is_whole(layer: PrunableLayer, region: ShardRegion, height: int, width: int) -> bool:
    """Returns whether a region has whole row blocks, whole sets of `width` columns and all positions."""
    for dim, (start, stop, size) in enumerate(zip(region.start, region.stop, layer.shape, strict=True)):
        if dim in (layer.row_dim, _contiguous_column_dim(layer)):
            step = height if dim == layer.row_dim else width
            if start % step or (stop % step and stop != size):
                return False
        elif dim != layer.expert_dim and (start, stop) != (0, size):
            return False
    return True


def _contiguous_column_dim(layer: PrunableLayer) -> int | None:
    """Returns the dimension of columns, or None for a convolution, whose positions lie between its columns."""
    return None if layer.kind == "conv2d" else layer.column_dim


def partition_rows(layer: PrunableLayer, height: int, num_ranks: int) -> tuple[tuple[ShardRegion, ...], ...]:
    """Partitions the row blocks of `height` rows of a layer evenly over ranks. Returns the regions of the weight that
    each rank selects from."""
    blocks_per_matrix = layer.matrix_shape[0] // height
    num_blocks = layer.num_matrices * blocks_per_matrix
    ends = [num_blocks * rank // num_ranks for rank in range(num_ranks + 1)]
    return tuple(
        tuple(
            _region_of_blocks(layer, blocks, height)
            for blocks in regions_of_range((layer.num_matrices, blocks_per_matrix), first, last)
        )
        for first, last in zip(ends, ends[1:])
    )


def _region_of_blocks(layer: PrunableLayer, blocks: ShardRegion, height: int) -> ShardRegion:
    """Returns the region of the weight for a region of (matrix, row block) indices."""
    start, stop = [0] * len(layer.shape), list(layer.shape)
    if layer.expert_dim is not None:
        start[layer.expert_dim], stop[layer.expert_dim] = blocks.start[0], blocks.stop[0]
    start[layer.row_dim], stop[layer.row_dim] = blocks.start[1] * height, blocks.stop[1] * height
    return ShardRegion(tuple(start), tuple(stop))


def first_offset(layer: PrunableLayer, region: ShardRegion) -> int:
    """Returns the position of a region's first weight in the layer's matrices (R, P, C), flattened one after the
    other."""
    rows, positions, columns = layer.matrix_shape
    matrix = 0 if layer.expert_dim is None else region.start[layer.expert_dim]
    column_dim = _contiguous_column_dim(layer)
    column = 0 if column_dim is None else region.start[column_dim]
    return (matrix * rows + region.start[layer.row_dim]) * positions * columns + column
