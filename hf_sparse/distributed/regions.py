"""Boxes: the rectangular parts of a tensor that a process holds or decides, and what lies in two of them.

The place of an entry is its index in the flattened tensor.
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
        """What lies in both, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return ShardRegion(start, stop) if all(map(int.__lt__, start, stop)) else None

    def slices_in(self, outer: ShardRegion) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        return tuple(
            slice(start - base, stop - base)
            for start, stop, base in zip(self.start, self.stop, outer.start, strict=True)
        )

    def flat_offset(self, shape: Sequence[int]) -> int:
        """The place of the first entry in a tensor of `shape`."""
        return sum(index * stride for index, stride in zip(self.start, strides(shape), strict=True))

    def contiguous_runs(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """The runs of neighbouring places that make up the box in a tensor of `shape`: (count, length, stride), or
        None where no single stride leads from each to the next.

        Example:
            >>> ShardRegion((1, 0), (3, 4)).contiguous_runs((5, 4))
            (1, 8, 8)
            >>> ShardRegion((0, 1), (5, 3)).contiguous_runs((5, 4))
            (5, 2, 4)
        """
        own, steps = self.shape, strides(shape)
        inner = len(own)
        while inner and own[inner - 1] == shape[inner - 1]:
            inner -= 1
        if inner == 0:  # all of it
            return 1, self.numel, self.numel
        length = math.prod(own[inner - 1 :])
        outer = [dim for dim in range(inner - 1) if own[dim] > 1]
        if not outer:
            return 1, length, length
        if any(own[dim] != shape[dim] for dim in range(outer[0] + 1, outer[-1] + 1)):
            return None
        return math.prod(own[: inner - 1]), length, steps[outer[-1]]


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """How far the places of neighbours are apart in each dimension."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def full_region(shape: Sequence[int]) -> ShardRegion:
    """All of a tensor."""
    return ShardRegion((0,) * len(shape), tuple(shape))


def regions_of_range(shape: Sequence[int], first: int, last: int) -> tuple[ShardRegion, ...]:
    """The boxes that make up the places first..last-1, in order.

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
    low, high = -(-first // row), last // row
    if low > high:  # inside one row
        return _in_row(shape, high, first - high * row, last - high * row)
    boxes = _in_row(shape, low - 1, row - (low * row - first), row) if low * row > first else ()
    if high > low:
        boxes += (ShardRegion((low, *(0 for _ in shape[1:])), (high, *shape[1:])),)
    return boxes + (_in_row(shape, high, 0, last - high * row) if last > high * row else ())


def _in_row(shape: Sequence[int], row: int, first: int, last: int) -> tuple[ShardRegion, ...]:
    inner = regions_of_range(shape[1:], first, last)
    return tuple(ShardRegion((row, *box.start), (row + 1, *box.stop)) for box in inner)
