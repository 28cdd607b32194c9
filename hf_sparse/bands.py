"""Bands: the rows of units of a layer, and which process decides which of them when the weight is split.

Where every process holds whole bands it decides those, and nothing moves. Where the split runs through bands (a block
across two shards, the inputs of a row on many processes) the bands are dealt out in equal numbers, and what the
decision needs of the weight moves there and back.

Shapes: E matrices of a layer, R rows of each, P positions, C columns; H rows make a band.
"""

from __future__ import annotations

from .sharding import Box, Shard, boxes_of_range
from .targets import Layer


def holds_bands(layer: Layer, shard: Shard, height: int) -> bool:
    """Whether every process holds whole bands only."""
    return all(_is_whole(layer, box, height) for boxes in shard.boxes for box in boxes)


def _is_whole(layer: Layer, box: Box, height: int) -> bool:
    for dim, (start, stop, size) in enumerate(zip(box.start, box.stop, layer.shape, strict=True)):
        if dim == layer.row_dim:
            if start % height or (stop % height and stop != size):
                return False
        elif dim != layer.expert_dim and (start, stop) != (0, size):
            return False
    return True


def deal_bands(layer: Layer, height: int, processes: int) -> tuple[tuple[Box, ...], ...]:
    """The bands of each process, as boxes of the weight: as many for each, as far as that goes."""
    matrices = layer.shape[0] if layer.expert_dim == 0 else 1
    per_matrix = layer.matrix_shape[0] // height
    ends = [matrices * per_matrix * count // processes for count in range(processes + 1)]
    return tuple(
        tuple(_box(layer, part, height) for part in boxes_of_range((matrices, per_matrix), first, last))
        for first, last in zip(ends, ends[1:])
    )


def _box(layer: Layer, part: Box, height: int) -> Box:
    """The box of the weight that holds bands part.start[1]..part.stop[1] of matrices part.start[0]..part.stop[0]."""
    start, stop = [0] * len(layer.shape), list(layer.shape)
    if layer.expert_dim == 0:
        start[0], stop[0] = part.start[0], part.stop[0]
    start[layer.row_dim], stop[layer.row_dim] = part.start[1] * height, part.stop[1] * height
    return Box(tuple(start), tuple(stop))


def first_place(layer: Layer, box: Box) -> int:
    """The place of a box's first weight when the matrices (R, P, C) are flattened one after the other."""
    rows, positions, columns = layer.matrix_shape
    matrix = box.start[0] if layer.expert_dim == 0 else 0
    return (matrix * rows + box.start[layer.row_dim]) * positions * columns
