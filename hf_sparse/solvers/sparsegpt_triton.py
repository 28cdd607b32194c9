"""The elimination of SparseGPT on GPUs: one kernel for each block of columns, instead of several for each column.

The rows of a weight are independent given the factor. Each program of a kernel keeps the errors e of a few rows in
registers while it passes through the columns of the block:

    x_j = w_j - sum over i < j of e_i·U_ij        e_j = x_j / U_jj if w_j is pruned, else 0

Triton comes with the CUDA builds of torch. This module is imported only where it is installed.

Shapes: C inputs, B of them in a block; R rows, of all weights that share the input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..kernels.lowest_scores import LowestScores
from ..patterns.n_of_m import NOfM


MAX_BLOCK = 256
"""Columns of a block whose errors fit in registers."""

_ROWS = 16  # of a program: few, because a weight has too few rows to fill a GPU
_PANEL = 8  # blocks whose updates are small products; those of earlier blocks are added in one large product


@triton.jit
def _store_column(old, x, kept, weight_BR, change_BR, at, valid):
    new = tl.where(kept, x, 0.0)
    tl.store(weight_BR + at, new, mask=valid)
    tl.store(change_BR + at, old - new, mask=valid)


@triton.jit
def _eliminate_masked(
    updated_BR,
    kept_BR,
    inverse_t_BB,
    scale_B,
    weight_BR,
    change_BR,
    rows,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Eliminates the weights that the mask prunes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    columns = tl.arange(0, BLOCK)
    errors = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
    # What a column needs is loaded one column ahead: none of it depends on the column before.
    x = tl.load(updated_BR + row, mask=valid, other=0.0)
    old = tl.load(weight_BR + row, mask=valid, other=0.0)
    kept = tl.load(kept_BR + row, mask=valid, other=1) != 0
    scale = tl.load(scale_B)
    factor = tl.load(inverse_t_BB + columns, mask=columns < SIZE, other=0.0)
    for j in range(SIZE):
        at = j * rows + row
        more = valid & (j + 1 < SIZE)
        next_x = tl.load(updated_BR + at + rows, mask=more, other=0.0)
        next_old = tl.load(weight_BR + at + rows, mask=more, other=0.0)
        next_kept = tl.load(kept_BR + at + rows, mask=more, other=1) != 0
        next_scale = tl.load(scale_B + j + 1, mask=j + 1 < SIZE, other=0.0)
        next_columns = (columns < SIZE) & (j + 1 < SIZE)
        next_factor = tl.load(inverse_t_BB + (j + 1) * SIZE + columns, mask=next_columns, other=0.0)
        # Errors of the columns from j on are still 0, so that only earlier ones count.
        x -= tl.sum(factor[:, None] * errors, axis=0)
        error = tl.where(kept, 0.0, x * scale)
        errors = tl.where((columns == j)[:, None], error[None, :], errors)
        _store_column(old, x, kept, weight_BR, change_BR, at, valid)
        x, old, kept, scale, factor = next_x, next_old, next_kept, next_scale, next_factor


@triton.jit
def _eliminate_groups(
    updated_BR,
    kept_BR,
    inverse_t_BB,
    scale_B,
    weight_BR,
    change_BR,
    rows,
    SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Keeps the KEEP highest scores of every OF columns when they are reached, and eliminates the others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    columns, members = tl.arange(0, BLOCK), tl.arange(0, GROUP)
    errors = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
    for first in range(0, SIZE, OF):
        at_group = (first + members)[:, None] * rows + row[None, :]
        in_group = (members < OF)[:, None] & valid[None, :]
        x_group = tl.load(updated_BR + at_group, mask=in_group, other=0.0)
        old_group = tl.load(weight_BR + at_group, mask=in_group, other=0.0)
        kept_group = tl.load(kept_BR + at_group, mask=in_group, other=0).to(tl.int32)
        for k in tl.static_range(OF):
            factor = tl.load(inverse_t_BB + (first + k) * SIZE + columns, mask=columns < SIZE, other=0.0)
            update = tl.sum(factor[:, None] * errors, axis=0)
            x_group = tl.where((members == k)[:, None], x_group - update[None, :], x_group)
        scale = tl.load(scale_B + first + members, mask=members < OF, other=0.0)
        scores = x_group * scale[:, None]
        scores = tl.where(kept_group != 0, scores * scores, float("-inf"))
        for k in tl.static_range(OF):
            own = tl.sum(tl.where((members == k)[:, None], scores, 0.0), axis=0)[None, :]
            beaten = (scores < own) | ((scores == own) & (members < k)[:, None])
            beaten = tl.sum((beaten & in_group).to(tl.int32), axis=0)
            pruned = (members == k)[:, None] & (beaten < OF - KEEP)[None, :]
            kept_group = tl.where(pruned, 0, kept_group)
        tl.store(kept_BR + at_group, kept_group, mask=in_group)
        for k in tl.static_range(OF):
            j = first + k
            x = tl.sum(tl.where((members == k)[:, None], x_group, 0.0), axis=0)
            old = tl.sum(tl.where((members == k)[:, None], old_group, 0.0), axis=0)
            kept = tl.sum(tl.where((members == k)[:, None], kept_group, 0), axis=0) != 0
            error = tl.where(kept, 0.0, x * tl.load(scale_B + j))
            errors = tl.where((columns == j)[:, None], error[None, :], errors)
            following = (members > k) & (members < OF)
            factor = tl.load(inverse_t_BB + (first + members) * SIZE + j, mask=following, other=0.0)
            x_group -= factor[:, None] * error[None, :]
            _store_column(old, x, kept, weight_BR, change_BR, j * rows + row, valid)


def eliminate(
    weight_CR: torch.Tensor,
    kept_CR: torch.Tensor,
    upper_CC: torch.Tensor,
    block: int,
    select_block: Callable[[torch.Tensor, torch.Tensor, int], None] | LowestScores | None = None,
    group: NOfM | None = None,
) -> None:
    """Overwrites `weight_CR` with the solution and `kept_CR` with the selected mask.

    Args:
        weight_CR: float32, contiguous.
        kept_CR: bool, contiguous.
        upper_CC: R of `HessianFactor`, float32.
        block: columns that are eliminated together, at most `MAX_BLOCK`; with `group` a multiple of its size.
        select_block: clears pruned weights in a block of the mask, from its scores (B, R) and its first column; or
            prunes the lowest scores.
        group: keep N of every M columns instead.
    """
    columns, rows = weight_CR.shape
    # Where the columns are finished the changes D = W - Ŵ; before, the sums D_<b·R_<b,b of the panels before theirs.
    change_CR = torch.zeros_like(weight_CR)
    scale_C, inverses, panel = upper_CC.diagonal().contiguous(), _inverses(upper_CC, block), _PANEL * block
    for first in range(0, columns, panel):
        last = min(columns, first + panel)
        for start in range(first, last, block):
            here = slice(start, min(columns, start + block))
            inverse_t_BB, scale_B = inverses[start // block], scale_C[here]
            changed_BR = change_CR[here]
            if start > first:
                changed_BR = torch.addmm(changed_BR, upper_CC[first:start, here].t(), change_CR[first:start])
            updated_BR = torch.addmm(weight_CR[here], inverse_t_BB, changed_BR)
            kept_BR = kept_CR[here].view(torch.uint8)
            if isinstance(select_block, LowestScores):
                select_block.prune(updated_BR, kept_BR, scale_B, start // block)
            elif select_block is not None:
                select_block((updated_BR * scale_B[:, None]).square_(), kept_CR[here], start)
            _launch((updated_BR, kept_BR, inverse_t_BB, scale_B, weight_CR[here], change_CR[here]), group)
        if last < columns:
            change_CR[last:].addmm_(upper_CC[first:last, last:].t(), change_CR[first:last])


def _launch(arrays: tuple[torch.Tensor, ...], group: NOfM | None) -> None:
    size, rows = arrays[0].shape
    grid = (triton.cdiv(rows, _ROWS),)
    sizes = {"SIZE": size, "BLOCK": triton.next_power_of_2(size), "ROWS": _ROWS}
    with torch.cuda.device_of(arrays[0]):
        if group is not None:
            sizes |= {"KEEP": group.keep, "OF": group.of, "GROUP": triton.next_power_of_2(group.of)}
            _eliminate_groups[grid](*arrays, rows, **sizes)
        else:
            _eliminate_masked[grid](*arrays, rows, **sizes)


def _inverses(upper_CC: torch.Tensor, block: int) -> list[torch.Tensor]:
    """Returns the transposed inverses (B, B) of the blocks on the diagonal: of all whole ones at once, as a single one
    does not fill a GPU."""
    whole = len(upper_CC) - len(upper_CC) % block
    inverses = []
    for first, last, size in ((0, whole, block), (whole, len(upper_CC), len(upper_CC) - whole)):
        if last > first:
            parts = [upper_CC[start : start + size, start : start + size] for start in range(first, last, size)]
            eye = torch.eye(size, dtype=upper_CC.dtype, device=upper_CC.device).expand(len(parts), -1, -1)
            inverses += torch.linalg.solve_triangular(torch.stack(parts), eye, upper=True).mT.contiguous().unbind()
    return inverses
