"""What the zeros of a matrix have in common: N:M, blocks, rows, columns. Seen tile by tile.

Letters: R output rows, P kernel positions, C inputs, as in `targets`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..patterns import Pattern, get_pattern
from ..patterns.block import Block
from ..patterns.channel import Channel, ChannelIn
from ..patterns.n_of_m import NOfM
from .tiles import SIDE


SIDES = tuple(2**power for power in range(SIDE.bit_length()))
GROUPS = (2, 4, 8, 16, 32)
# Blocks, rows and columns are structure when they hold this share of the zeros: kept weights may be zero by chance.
NEARLY_ALL = 0.99
# Structure is only what as many zeros, strewn at random, would be expected to break this often.
_BROKEN_BY_CHANCE = 3
# In N:M at least this share of the groups keeps all of its N.
_USED = 0.1


class Scan:
    """Takes in equal matrices tile by tile; `result` is their structure.

    Args:
        layout: which dimensions are rows and columns, a kind of `targets.PrunableLayer`.
        matrices, rows, positions, columns: how many there are.
    """

    def __init__(self, layout: str, matrices: int, rows: int, positions: int, columns: int):
        self.layout, self.rows, self.positions, self.columns = layout, rows, positions, columns
        self._live_rows = np.zeros((matrices, rows), dtype=bool)
        self._live_columns = np.zeros((matrices, columns), dtype=bool)
        self._most_kept = {of: 0 for of in GROUPS if columns % of == 0}
        self._full_groups = dict(self._most_kept)
        self._in_blocks = {(h, w): 0 for h in SIDES for w in SIDES if rows % h == 0 and columns % w == 0}

    def add(self, live_RPC: np.ndarray, matrix: int, row: int, column: int) -> None:
        """Take in a tile (bool, True where not zero) whose first entry is in this matrix, row and column."""
        rows, _, columns = live_RPC.shape
        self._live_rows[matrix, row : row + rows] |= live_RPC.any(axis=(1, 2))
        self._live_columns[matrix, column : column + columns] |= live_RPC.any(axis=(0, 1))
        kept, width = live_RPC.view(np.uint8), 1  # how many entries live in each part of `width` neighbouring inputs
        while True:
            if width in self._most_kept:
                self._count_full(kept, width)
            self._count_blocks(kept == 0, width)
            width *= 2
            if width > SIDE or self.columns % width:
                return
            kept = kept[..., 0::2] + kept[..., 1::2]

    def _count_full(self, kept: np.ndarray, of: int) -> None:
        most = int(kept.max())
        if most > self._most_kept[of]:
            self._most_kept[of], self._full_groups[of] = most, 0
        self._full_groups[of] += int(np.count_nonzero(kept == self._most_kept[of]))

    def _count_blocks(self, free: np.ndarray, width: int) -> None:
        height = 1
        while True:
            self._in_blocks[height, width] += int(np.count_nonzero(free)) * height * width
            height *= 2
            if height > SIDE or self.rows % height:
                return
            free = free[0::2] & free[1::2]

    @property
    def result(self) -> Structure:
        """The structure of all that was added."""
        rows, columns = (~self._live_rows).sum(axis=1), (~self._live_columns).sum(axis=1)
        lines = rows * self.columns + columns * self.rows - rows * columns
        return Structure(
            layout=self.layout,
            rows=self._live_rows.size,
            zero_rows=int(rows.sum()),
            columns=self._live_columns.size,
            zero_columns=int(columns.sum()),
            weights=self._live_rows.size * self.positions * self.columns,
            in_lines=int(lines.sum()) * self.positions,
            most_kept=dict(self._most_kept),
            full_groups=dict(self._full_groups),
            in_blocks=dict(self._in_blocks),
        )


@dataclass(frozen=True)
class Structure:
    """The zeros of a weight, seen as output rows by inputs.

    Args:
        layout: which of its dimensions those are: "linear" (O, I), "conv1d" (I, O), "conv2d" (O, I, ...), "experts"
            (E, O, I) or "experts_transposed" (E, I, O).
        rows, zero_rows: output rows, and those that are entirely zero; over all experts.
        columns, zero_columns: the same of inputs.
        weights: their number.
        in_lines: the zeros in rows and columns that are entirely zero.
        most_kept: M -> the most weights that are not zero in any M neighbours along the input dimension.
        full_groups: M -> how many of the groups of M keep that many.
        in_blocks: (R, C) -> the zeros that lie in blocks of R outputs by C inputs that are entirely zero.
    """

    layout: str
    rows: int
    zero_rows: int
    columns: int
    zero_columns: int
    weights: int
    in_lines: int
    most_kept: dict[int, int]
    full_groups: dict[int, int]
    in_blocks: dict[tuple[int, int], int]

    @property
    def zeros(self) -> int:
        """The number of zeros."""
        return self.in_blocks.get((1, 1), 0)

    @property
    def n_of_m(self) -> tuple[str, ...]:
        """The N:M that hold, each the tightest of its kind: what follows from another (4:8 from 2:4) is left out, and
        what zeros strewn at random would hold as well, and what few groups make use of (5:8 where 2:4 holds but for a
        group)."""
        held = {
            of: kept
            for of, kept in self.most_kept.items()
            if 0 < kept < of
            and self.full_groups[of] >= _USED * (self.weights // of)
            and not self._n_of_m_by_chance(kept, of)
        }
        return tuple(
            f"{kept}:{of}"
            for of, kept in held.items()
            if not any(other != of and _implies(n, other, kept, of) for other, n in held.items())
        )

    @property
    def block(self) -> str | None:
        """The largest block, RxC, such that nearly all zeros lie in blocks of it that are entirely zero; None if
        there is none, or if rows and columns explain the zeros."""
        if self.in_lines >= NEARLY_ALL * self.zeros:
            return None
        fitting = [side for side in self.in_blocks if side != (1, 1) and self._in_blocks_of(*side)]
        return "{}x{}".format(*max(fitting, key=lambda side: (side[0] * side[1], side))) if fitting else None

    def _n_of_m_by_chance(self, keep: int, of: int) -> bool:
        density = 1 - self.zeros / self.weights
        broken = sum(
            math.comb(of, kept) * density**kept * (1 - density) ** (of - kept) for kept in range(keep + 1, of + 1)
        )
        return self.weights // of * broken < _BROKEN_BY_CHANCE

    def _in_blocks_of(self, height: int, width: int) -> bool:
        outside = self.zeros - self.in_blocks[height, width]
        by_chance = self.zeros * (1 - (self.zeros / self.weights) ** (height * width - 1))
        few = outside <= (1 - NEARLY_ALL) * self.zeros and 10 * outside <= by_chance
        return few and by_chance >= _BROKEN_BY_CHANCE

    def holds(self, pattern: str) -> bool:
        """Whether the zeros are those of a pattern of hf_sparse: 2:4 when no four neighbours keep more than two; a
        block, channel or channel:in when nearly all zeros lie in whole ones.

        Raises:
            ValueError: see `readable_pattern`.
        """
        wanted = readable_pattern(pattern)
        if isinstance(wanted, NOfM):
            return self.most_kept.get(wanted.of, wanted.of) <= wanted.keep
        if isinstance(wanted, Block):
            inside = self.in_blocks.get((wanted.height, wanted.width), 0)
        elif isinstance(wanted, Channel):
            inside = self.zero_rows * (self.weights // self.rows)
        else:
            inside = self.zero_columns * (self.weights // self.columns)
        return 0 < self.zeros and inside >= NEARLY_ALL * self.zeros

    def __str__(self) -> str:
        if not self.zeros:
            return ""
        if self.zeros == self.weights:
            return "all zero"
        found = [*self.n_of_m, f"{self.block} blocks" if self.block else None]
        found += [f"{self.zero_rows:,} of {self.rows:,} rows zero" if self.zero_rows else None]
        found += [f"{self.zero_columns:,} of {self.columns:,} columns zero" if self.zero_columns else None]
        return ", ".join(filter(None, found))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "layout": self.layout,
            "n_of_m": list(self.n_of_m),
            "block": self.block,
            "rows": self.rows,
            "zero_rows": self.zero_rows,
            "columns": self.columns,
            "zero_columns": self.zero_columns,
        }


def _implies(n: int, m: int, keep: int, of: int) -> bool:
    """Whether n of m holds keep of `of`."""
    return keep >= n * of // m if of % m == 0 else m % of == 0 and keep >= n


def readable_pattern(text: str) -> Pattern:
    """The pattern that `text` names, if zeros can tell it.

    Raises:
        ValueError: it is unknown, or cannot be told from zeros: M and the sides of blocks must be powers of two.
    """
    pattern = get_pattern(text)
    if isinstance(pattern, NOfM):
        readable = pattern.of in GROUPS
    elif isinstance(pattern, Block):
        readable = {pattern.height, pattern.width} <= set(SIDES)
    else:
        readable = isinstance(pattern, (Channel, ChannelIn))
    if not readable:
        raise ValueError(
            f'pattern "{text}" cannot be told from zeros: possible are N:M with M of {GROUPS}, blocks with sides of '
            f"{SIDES}, channel and channel:in."
        )
    return pattern
