"""Reading of tensors in tiles: parts of bounded size, whatever the tensor's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..distributed import ShardRegion
from .weight_files import InspectionError


# The largest number of values of a tile.
TILE_NUMEL = 2**21
# The largest side of a block that is detected. Tiles begin at multiples of it, so they cut no block.
MAX_BLOCK_SIDE = 64
# A file is opened anew after this many values: it is mapped into memory, and pages that were read count as ours.
_REOPEN_NUMEL = 2**26


def tile_regions(shape: Sequence[int], matrix_dims: Sequence[int] = ()) -> Iterator[ShardRegion]:
    """Yields regions of at most `TILE_NUMEL` values that together cover a tensor.

    Args:
        shape: of the tensor.
        matrix_dims: the dimensions of rows and columns, in which regions begin at multiples of `MAX_BLOCK_SIDE`.

    Example:
        >>> [region.shape for region in tile_regions((3000, 1024), (0, 1))]
        [(2048, 1024), (952, 1024)]
        >>> [region.shape for region in tile_regions((70, 2**16), (0, 1))]
        [(64, 32768), (64, 32768), (6, 32768), (6, 32768)]
    """
    units = [MAX_BLOCK_SIDE if dim in matrix_dims else 1 for dim in range(len(shape))]
    steps = [min(unit, size) for unit, size in zip(units, shape, strict=True)]
    for dim in reversed(range(len(shape))):
        others = math.prod(steps[:dim] + steps[dim + 1 :])
        largest = TILE_NUMEL // max(others, 1) // units[dim] * units[dim]
        steps[dim] = min(shape[dim], max(steps[dim], largest))
    if math.prod(shape) == 0:
        return
    for start in itertools.product(*(range(0, size, step) for size, step in zip(shape, steps, strict=True))):
        stop = (min(first + step, size) for first, step, size in zip(start, steps, shape, strict=True))
        yield ShardRegion(start, tuple(stop))


def read_tiles(file: Path, name: str, regions: Iterable[ShardRegion]) -> Iterator[tuple[ShardRegion, torch.Tensor]]:
    """Yields each region of a tensor with its values."""
    try:
        view, num_read = None, 0
        for region in regions:
            if view is None or num_read > _REOPEN_NUMEL:
                view, num_read = safe_open(str(file), framework="pt").get_slice(name), 0
            num_read += region.numel
            yield region, view[tuple(map(slice, region.start, region.stop))]
    except (SafetensorError, OSError) as error:
        raise InspectionError(f'"{name}" cannot be read from {file}: {error}') from error
