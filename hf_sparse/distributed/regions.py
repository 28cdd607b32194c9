"""Axis-aligned regions of tensors, which describe the parts that ranks hold.

A flat offset is an index into the flattened (contiguous, row-major) tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardRegion:
    """The entries of a tensor with start[d] <= index[d] < stop[d] in every dimension d.

    Example:
        >>> left, right = ShardRegion((0, 0), (2, 3)), ShardRegion((1, 2), (4, 4))
        >>> left & right
        ShardRegion(start=(1, 2), stop=(2, 3))
        >>> (left & right).slices_in(right)
        (slice(0, 1, None), slice(0, 1, None))
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __and__(self, other: ShardRegion) -> ShardRegion | None:
        """The intersection; None if it is empty."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return ShardRegion(start, stop) if all(map(int.__lt__, start, stop)) else None

    def slices_in(self, outer: ShardRegion) -> tuple[slice, ...]:
        """Returns the index of this region in a tensor that holds the entries of `outer`."""
        return tuple(
            slice(start - base, stop - base)
            for start, stop, base in zip(self.start, self.stop, outer.start, strict=True)
        )

    def flat_offset(self, shape: Sequence[int]) -> int:
        """Returns the flat offset of the region's first entry in a tensor of `shape`."""
        return sum(index * stride for index, stride in zip(self.start, _strides(shape), strict=True))

    def contiguous_runs(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Describes the region in a flattened tensor of `shape` as equal runs of contiguous entries.

        Returns: (count, length, stride): `count` runs of `length` entries, which start `stride` entries apart. None if
            the distance between runs varies.

        Example:
            >>> ShardRegion((1, 0), (3, 4)).contiguous_runs((5, 4))
            (1, 8, 8)
            >>> ShardRegion((0, 1), (5, 3)).contiguous_runs((5, 4))
            (5, 2, 4)
        """
        sizes, strides = self.shape, _strides(shape)
        inner = len(sizes)
        while inner and sizes[inner - 1] == shape[inner - 1]:
            inner -= 1
        if inner == 0:  # the whole tensor
            return 1, self.numel, self.numel
        length = math.prod(sizes[inner - 1 :])
        outer = [dim for dim in range(inner - 1) if sizes[dim] > 1]
        if not outer:
            return 1, length, length
        if any(sizes[dim] != shape[dim] for dim in range(outer[0] + 1, outer[-1] + 1)):
            return None
        return math.prod(sizes[: inner - 1]), length, strides[outer[-1]]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in entries."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def full_region(shape: Sequence[int]) -> ShardRegion:
    """Returns the region of all entries of a tensor of `shape`."""
    return ShardRegion((0,) * len(shape), tuple(shape))


def regions_of_range(shape: Sequence[int], first: int, last: int) -> tuple[ShardRegion, ...]:
    """Splits the flat offsets first..last-1 of a tensor of `shape` into regions, in order of their offsets.

    Example:
        >>> for region in regions_of_range((3, 4), 2, 9):
        ...     print(region)
        ShardRegion(start=(0, 2), stop=(1, 4))
        ShardRegion(start=(1, 0), stop=(2, 4))
        ShardRegion(start=(2, 0), stop=(3, 1))
    """
    if first >= last:
        return ()
    if len(shape) == 1:
        return (ShardRegion((first,), (last,)),)
    row = math.prod(shape[1:])
    low, high = -(-first // row), last // row  # rows low..high-1 lie in the range whole
    if low > high:  # the range lies inside one row
        return _regions_in_row(shape, high, first - high * row, last - high * row)
    regions = _regions_in_row(shape, low - 1, row - (low * row - first), row) if low * row > first else ()
    if high > low:
        regions += (ShardRegion((low, *(0 for _ in shape[1:])), (high, *shape[1:])),)
    return regions + (_regions_in_row(shape, high, 0, last - high * row) if last > high * row else ())


def _regions_in_row(shape: Sequence[int], row: int, first: int, last: int) -> tuple[ShardRegion, ...]:
    inner = regions_of_range(shape[1:], first, last)
    return tuple(ShardRegion((row, *region.start), (row + 1, *region.stop)) for region in inner)
