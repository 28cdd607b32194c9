"""Kernels for the selection of SparseGPT: the lowest scores of each weight of a stack, in a block of columns.

The key of a score (x_j / U_jj)² is the bits of its float32, which are in the order of scores, plus 1; it is 0 where a
weight is pruned already. The k-th lowest key is found digit by digit, from histograms that the host does not wait for.

Shapes: B columns of a block; R rows of the stack; L weights in it; T tiles of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .tensor_table import to_device


_ROWS = 32  # of a tile


class LowestScores:
    """Prunes the lowest scores of each weight, ties by position in its rows.

    Args:
        heights: (L) rows of each weight.
        counts: (L) for each weight the number of pruned entries in each block, those pruned before included.
        device: of the stack.
    """

    def __init__(self, heights: Sequence[int], counts: Sequence[Sequence[int]], device: torch.device):
        firsts = [sum(heights[:index]) for index in range(len(heights))]
        rows = [[*firsts, *heights, *of_block] for of_block in zip(*counts, strict=True)]
        self._tables = to_device(torch.tensor(rows, dtype=torch.int32), device)
        self._grid = triton.cdiv(max(heights), _ROWS), len(heights)

    def prune(self, updated_BR: torch.Tensor, kept_BR: torch.Tensor, scale_B: torch.Tensor, block: int) -> None:
        """Clears the pruned entries of a block in its mask.

        Args:
            updated_BR: float32, contiguous.
            kept_BR: uint8, contiguous.
            scale_B: 1 / U_jj.
            block: its index.
        """
        size, rows = updated_BR.shape
        tiles, weights = self._grid
        numbers = torch.zeros(weights * (4 * 256 + tiles), dtype=torch.int32, device=updated_BR.device)
        ties = numbers[weights * 4 * 256 :]
        inputs = updated_BR, kept_BR, scale_B, self._tables[block], numbers
        sizes = {"SIZE": size, "BLOCK": triton.next_power_of_2(size), "ROWS": _ROWS}
        with torch.cuda.device_of(updated_BR):
            for digit in range(4):
                _count_digit[self._grid](*inputs, rows, DIGIT=digit, **sizes)
            _count_ties[self._grid](*inputs, ties, rows, **sizes)
            _prune[self._grid](*inputs, ties, rows, **sizes)


@triton.jit
def _load_keys(updated_BR, kept_BR, scale_B, table, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Returns the keys (BLOCK, ROWS) of a tile, where they are in memory, and which are inside the block."""
    weight, weights = tl.program_id(1), tl.num_programs(1)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (column < SIZE)[:, None] & (row < tl.load(table + weights + weight))[None, :]
    at = column[:, None] * rows + (tl.load(table + weight) + row)[None, :]
    scale = tl.load(scale_B + column, mask=column < SIZE, other=0.0)
    scores = tl.load(updated_BR + at, mask=inside, other=0.0) * scale[:, None]
    word = (scores * scores).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    kept = tl.load(kept_BR + at, mask=inside, other=0) != 0
    return tl.where(kept, tl.minimum(word, 0x7FFFFFFE) + 1, 0), at, inside


@triton.jit
def _upper_digits(table, histograms, DIGITS: tl.constexpr):
    """Returns the upper digits of the k-th lowest key, and how many of the k keys have the same ones."""
    bins = tl.arange(0, 256)
    digits = tl.full((), 0, dtype=tl.int32)
    rank = tl.load(table + 2 * tl.num_programs(1) + tl.program_id(1))
    for digit in tl.static_range(DIGITS):
        numbers = tl.load(histograms + (tl.program_id(1) * 4 + digit) * 256 + bins)
        found = tl.sum((tl.cumsum(numbers, 0) < rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < found, numbers, 0), 0)
        digits = digits * 256 + found
    return digits, rank


@triton.jit
def _count_digit(
    updated_BR,
    kept_BR,
    scale_B,
    table,
    histograms,
    rows,
    DIGIT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    key, _, counted = _load_keys(updated_BR, kept_BR, scale_B, table, rows, SIZE, BLOCK, ROWS)
    if DIGIT > 0:
        upper, _ = _upper_digits(table, histograms, DIGIT)
        counted &= key >> (32 - 8 * DIGIT) == upper
    digit = tl.where(counted, (key >> (24 - 8 * DIGIT)) & 255, 0)
    numbers = tl.histogram(tl.reshape(digit, (BLOCK * ROWS,)), 256)
    bins = tl.arange(0, 256)
    numbers -= tl.where(bins == 0, tl.sum(tl.where(counted, 0, 1)), 0)
    at = histograms + (tl.program_id(1) * 4 + DIGIT) * 256 + bins
    tl.atomic_add(at, numbers, mask=numbers > 0, sem="relaxed")


@triton.jit
def _count_ties(
    updated_BR,
    kept_BR,
    scale_B,
    table,
    histograms,
    ties,
    rows,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    key, _, inside = _load_keys(updated_BR, kept_BR, scale_B, table, rows, SIZE, BLOCK, ROWS)
    value, _ = _upper_digits(table, histograms, 4)
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(ties + tile, tl.sum((inside & (key == value)).to(tl.int32)))


@triton.jit
def _prune(
    updated_BR,
    kept_BR,
    scale_B,
    table,
    histograms,
    ties,
    rows,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    key, at, inside = _load_keys(updated_BR, kept_BR, scale_B, table, rows, SIZE, BLOCK, ROWS)
    value, num_pruned_ties = _upper_digits(table, histograms, 4)
    is_tie = (inside & (key == value)).to(tl.int32)
    earlier = tl.zeros((256,), dtype=tl.int32)
    for first in range(0, tl.program_id(0), 256):
        tile = first + tl.arange(0, 256)
        of_weight = ties + tl.program_id(1) * tl.num_programs(0)
        earlier += tl.load(of_weight + tile, mask=tile < tl.program_id(0), other=0)
    in_row = tl.sum(is_tie, 0)
    in_earlier_rows = tl.sum(earlier, 0) + tl.cumsum(in_row, 0) - in_row
    rank = in_earlier_rows[None, :] + tl.cumsum(is_tie, 0)
    pruned = inside & ((key < value) | ((is_tie != 0) & (rank <= num_pruned_ties)))
    tl.store(kept_BR + at, tl.zeros((BLOCK, ROWS), dtype=tl.uint8), mask=pruned)
