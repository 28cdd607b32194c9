"""Tensors in parts of bounded size, whatever theirs is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..distributed import ShardRegion
from .files import InspectionError


# The most values that are read at once.
TILE = 2**21
# The largest side of a block that is looked for. Tiles begin at multiples of it, so they cut no block.
SIDE = 64
# A file's mapping into memory is given up after so many values: the pages that were read would count as ours.
_REMAP = 2**26


def tiles(shape: Sequence[int], matrix_dims: Sequence[int] = ()) -> Iterator[ShardRegion]:
    """The boxes that a tensor of `shape` is read in, none of more than TILE entries.

    Args:
        shape: of the tensor.
        matrix_dims: its dimensions of rows and columns, in which boxes begin at multiples of SIDE.

    Example:
        >>> [box.shape for box in tiles((3000, 1024), (0, 1))]
        [(2048, 1024), (952, 1024)]
        >>> [box.shape for box in tiles((70, 2**16), (0, 1))]
        [(64, 32768), (64, 32768), (6, 32768), (6, 32768)]
    """
    units = [SIDE if dim in matrix_dims else 1 for dim in range(len(shape))]
    steps = [min(unit, size) for unit, size in zip(units, shape, strict=True)]
    for dim in reversed(range(len(shape))):
        others = math.prod(steps[:dim] + steps[dim + 1 :])
        grown = TILE // max(others, 1) // units[dim] * units[dim]
        steps[dim] = min(shape[dim], max(steps[dim], grown))
    if math.prod(shape) == 0:
        return
    for start in itertools.product(*(range(0, size, step) for size, step in zip(shape, steps, strict=True))):
        stop = (min(first + step, size) for first, step, size in zip(start, steps, shape, strict=True))
        yield ShardRegion(start, tuple(stop))


def read_tiles(file: Path, name: str, boxes: Iterator[ShardRegion]) -> Iterator[tuple[ShardRegion, torch.Tensor]]:
    """Each box with its values.

    Raises:
        InspectionError: the file cannot be read.
    """
    try:
        tensor, read = None, 0
        for box in boxes:
            if tensor is None or read > _REMAP:
                tensor, read = safe_open(str(file), framework="pt").get_slice(name), 0
            read += box.numel
            yield box, tensor[tuple(map(slice, box.start, box.stop))]
    except (SafetensorError, OSError) as error:
        raise InspectionError(f'"{name}" cannot be read from {file}: {error}') from error
