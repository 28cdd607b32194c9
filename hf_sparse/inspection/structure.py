"""Structure of the zeros in a weight: N:M, blocks, rows and columns.

Letters: R output rows, P kernel positions, C input columns, as in `model.layers`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..patterns import Pattern, get_pattern
from ..patterns.block import Block
from ..patterns.channel import Channel, ChannelIn
from ..patterns.n_of_m import NOfM
from .tiles import MAX_BLOCK_SIDE


BLOCK_SIDES = tuple(2**power for power in range(MAX_BLOCK_SIDE.bit_length()))
GROUP_SIZES = (2, 4, 8, 16, 32)
# The share of the zeros that blocks, rows or columns must hold: kept weights may be zero by chance.
NEARLY_ALL = 0.99
# As many zeros at random places must be expected to violate a structure this often, or chance explains it.
_MIN_VIOLATIONS_BY_CHANCE = 3
# The share of the groups that must keep all of their N weights for N:M to be reported.
_MIN_SHARE_OF_FULL_GROUPS = 0.1


class StructureScan:
    """Counts the zeros of matrices of shape (R, P, C) by structure, tile by tile. `kind`: as in `PrunableLayer`."""

    def __init__(self, kind: str, num_matrices: int, rows: int, positions: int, columns: int):
        self.kind, self.rows, self.positions, self.columns = kind, rows, positions, columns
        self._nonzero_rows = np.zeros((num_matrices, rows), dtype=bool)
        self._nonzero_columns = np.zeros((num_matrices, columns), dtype=bool)
        self._max_kept = {size: 0 for size in GROUP_SIZES if columns % size == 0}
        self._full_groups = dict(self._max_kept)
        sizes = itertools.product(BLOCK_SIDES, BLOCK_SIDES)
        self._zeros_in_blocks = {(h, w): 0 for h, w in sizes if rows % h == 0 and columns % w == 0}

    def add(self, nonzero_RPC: np.ndarray, matrix: int, row: int, column: int) -> None:
        """Counts one tile.

        Args:
            nonzero_RPC: bool, False at zeros.
            matrix, row, column: of the tile's first entry. Rows and columns are multiples of `MAX_BLOCK_SIDE`.
        """
        rows, _, columns = nonzero_RPC.shape
        self._nonzero_rows[matrix, row : row + rows] |= nonzero_RPC.any(axis=(1, 2))
        self._nonzero_columns[matrix, column : column + columns] |= nonzero_RPC.any(axis=(0, 1))
        kept, width = nonzero_RPC.view(np.uint8), 1  # nonzeros among each `width` neighbouring columns
        while True:
            if width in self._max_kept:
                self._count_full_groups(kept, width)
            self._count_zero_blocks(kept == 0, width)
            width *= 2
            if width > MAX_BLOCK_SIDE or self.columns % width:
                return
            kept = kept[..., 0::2] + kept[..., 1::2]

    def _count_full_groups(self, kept: np.ndarray, size: int) -> None:
        most = int(kept.max())
        if most > self._max_kept[size]:
            self._max_kept[size], self._full_groups[size] = most, 0
        self._full_groups[size] += int(np.count_nonzero(kept == self._max_kept[size]))

    def _count_zero_blocks(self, is_zero: np.ndarray, width: int) -> None:
        height = 1
        while True:
            self._zeros_in_blocks[height, width] += int(np.count_nonzero(is_zero)) * height * width
            height *= 2
            if height > MAX_BLOCK_SIDE or self.rows % height:
                return
            is_zero = is_zero[0::2] & is_zero[1::2]

    @property
    def structure(self) -> Structure:
        """How the zeros of the weight are arranged (whole rows and columns, blocks, N:M groups), in the tiles that
        were added so far."""
        rows, columns = (~self._nonzero_rows).sum(axis=1), (~self._nonzero_columns).sum(axis=1)
        in_lines = rows * self.columns + columns * self.rows - rows * columns
        return Structure(
            kind=self.kind,
            rows=self._nonzero_rows.size,
            zero_rows=int(rows.sum()),
            columns=self._nonzero_columns.size,
            zero_columns=int(columns.sum()),
            weights=self._nonzero_rows.size * self.positions * self.columns,
            zeros_in_lines=int(in_lines.sum()) * self.positions,
            max_kept=self._max_kept.copy(),
            full_groups=self._full_groups.copy(),
            zeros_in_blocks=self._zeros_in_blocks.copy(),
        )


@dataclass(frozen=True)
class Structure:
    """The zeros of a weight by structure.

    Args:
        kind: of the layer, as in `PrunableLayer`.
        rows, columns: number of output rows and of input columns, over all experts.
        zero_rows, zero_columns: number of those that are entirely zero.
        weights: number of weights.
        zeros_in_lines: number of zeros in rows and columns that are entirely zero.
        max_kept: M -> the most nonzeros in any group of M neighbouring columns.
        full_groups: M -> number of groups of M with that many nonzeros.
        zeros_in_blocks: (height, width) -> number of zeros in blocks of this size that are entirely zero.
    """

    kind: str
    rows: int
    zero_rows: int
    columns: int
    zero_columns: int
    weights: int
    zeros_in_lines: int
    max_kept: dict[int, int]
    full_groups: dict[int, int]
    zeros_in_blocks: dict[tuple[int, int], int]

    @property
    def zeros(self) -> int:
        return self.zeros_in_blocks.get((1, 1), 0)

    @property
    def n_of_m(self) -> tuple[str, ...]:
        """The N:M patterns that every group satisfies, as in ("2:4",).

        Left out are patterns that follow from another (4:8 from 2:4), that zeros at random places would satisfy as
        well, and that hardly any group needs (5:8 where all groups but one satisfy 2:4).
        """
        satisfied = {
            size: kept
            for size, kept in self.max_kept.items()
            if 0 < kept < size
            and self.full_groups[size] >= _MIN_SHARE_OF_FULL_GROUPS * (self.weights // size)
            and not self._is_n_of_m_by_chance(kept, size)
        }
        return tuple(
            f"{kept}:{size}"
            for size, kept in satisfied.items()
            if not any(other != size and _implies(n, other, kept, size) for other, n in satisfied.items())
        )

    @property
    def block(self) -> str | None:
        """The largest block RxC such that nearly all zeros lie in blocks of this size that are entirely zero.

        None if there is none, or if rows and columns explain the zeros.
        """
        if self.zeros_in_lines >= NEARLY_ALL * self.zeros:
            return None
        sizes = [size for size in self.zeros_in_blocks if size != (1, 1) and self._has_blocks(*size)]
        return "{}x{}".format(*max(sizes, key=lambda size: (size[0] * size[1], size))) if sizes else None

    def _is_n_of_m_by_chance(self, keep: int, of: int) -> bool:
        density = 1 - self.zeros / self.weights
        violation = sum(
            math.comb(of, kept) * density**kept * (1 - density) ** (of - kept) for kept in range(keep + 1, of + 1)
        )
        return self.weights // of * violation < _MIN_VIOLATIONS_BY_CHANCE

    def _has_blocks(self, height: int, width: int) -> bool:
        outside = self.zeros - self.zeros_in_blocks[height, width]
        outside_by_chance = self.zeros * (1 - (self.zeros / self.weights) ** (height * width - 1))
        few = outside <= (1 - NEARLY_ALL) * self.zeros and 10 * outside <= outside_by_chance
        return few and outside_by_chance >= _MIN_VIOLATIONS_BY_CHANCE

    def has_pattern(self, pattern: str) -> bool:
        """Whether no group of M keeps more than N, or nearly all zeros are in units that are entirely zero.

        Raises:
            ValueError: as `detectable_pattern`.
        """
        expected = detectable_pattern(pattern)
        if isinstance(expected, NOfM):
            return self.max_kept.get(expected.of, expected.of) <= expected.keep
        if isinstance(expected, Block):
            zeros_in_units = self.zeros_in_blocks.get((expected.height, expected.width), 0)
        elif isinstance(expected, Channel):
            zeros_in_units = self.zero_rows * (self.weights // self.rows)
        else:
            zeros_in_units = self.zero_columns * (self.weights // self.columns)
        return 0 < self.zeros and zeros_in_units >= NEARLY_ALL * self.zeros

    def __str__(self) -> str:
        if not self.zeros:
            return ""
        if self.zeros == self.weights:
            return "all zero"
        parts = list(self.n_of_m)
        parts += [f"{self.block} blocks"] if self.block else []
        parts += [f"{self.zero_rows:,} of {self.rows:,} rows zero"] if self.zero_rows else []
        parts += [f"{self.zero_columns:,} of {self.columns:,} columns zero"] if self.zero_columns else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the structure as JSON values."""
        counts = {name: getattr(self, name) for name in ("rows", "zero_rows", "columns", "zero_columns")}
        return {"layout": self.kind, "n_of_m": list(self.n_of_m), "block": self.block, **counts}


def _implies(n: int, m: int, keep: int, of: int) -> bool:
    """Whether every group with n of m also has `keep` of `of`."""
    return keep >= n * of // m if of % m == 0 else m % of == 0 and keep >= n


def detectable_pattern(text: str) -> Pattern:
    """Returns the pattern that `text` names, if zeros show it.

    Raises:
        ValueError: if it is unknown, or is not detected: M and the sides of blocks must be powers of two.
    """
    pattern = get_pattern(text)
    if isinstance(pattern, NOfM):
        is_detectable = pattern.of in GROUP_SIZES
    elif isinstance(pattern, Block):
        is_detectable = {pattern.height, pattern.width} <= set(BLOCK_SIDES)
    else:
        is_detectable = isinstance(pattern, (Channel, ChannelIn))
    if not is_detectable:
        raise ValueError(
            f'pattern "{text}" cannot be detected from zeros. Detectable are N:M with M in {GROUP_SIZES}, blocks with '
            f"sides in {BLOCK_SIDES}, channel and channel:in."
        )
    return pattern
