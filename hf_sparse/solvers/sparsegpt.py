"""SparseGPT: what falls is made up for by the weights to its right.

Shapes: C inputs, B of them in a block, S in a strip of a block; R rows, of all weights that share the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..patterns import Pattern
from ..selection.budgets import largest_remainder
from ..selection.ranking import keep, lowest
from ..selection.scores import TensorScores
from .base import PruneRequest, Solver, register_solver
from .hessian import HessianFactor


BLOCK = 128
STRIP = 16  # columns whose updates of one another are written out one by one


@register_solver("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Solver):
    """Column by column, from the first: where w_j falls, the later weights of its row take the step that makes up for
    it best, given that the earlier ones are settled (Optimal Brain Surgeon on the columns j..C).

        e_j = w_j / U_jj        w_k <- w_k - e_j·U_jk for k > j        with (G + dampening)⁻¹ = Uᵀ·U

    so that the squared error over the (dampened) inputs is exactly the sum of e_j² over all that fall. It is the least
    possible one where what falls stands left of what is kept; elsewhere the earlier weights could do better still.

    Unless a mask says it all, each block of columns chooses when it is reached: the weights with the least e_j² of all
    rows fall, of a unit of several weights those with the least mean; N:M chooses group by group instead. Over all
    blocks exactly round(sparsity·units) fall (more only if the mask asks for more), ties by position; of N:M exactly N
    of every M stay, fewer only if the mask says so. Weights of dead inputs become 0, whatever the mask says.

    A `HessianFactor` that is given instead of a Gram matrix has its own dampening.

    Args:
        block: columns that choose together; a pattern's width rounds it up. If None, the paper's 128, but of narrow
            weights an eighth: one block of all columns would choose everything before anything is made up for.

    Raises:
        ValueError: a pattern whose units span whole rows, which leaves nothing to make up for them; a share that N:M
            does not end at; sums of other inputs; and what `HessianFactor` refuses.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> mask = torch.tensor([[False, True]])
        >>> SparseGPT().solve(torch.tensor([[2.0, 3.0]]), HessianFactor(gram, dampening=0), mask_RC=mask)[0]
        tensor([[0., 4.]])

    Reference: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """

    block: int | None = None

    needs = "gram"
    selects = True

    def solve_batched(self, wanted, stat=None):
        factor = stat if isinstance(stat, HessianFactor) else HessianFactor(stat)
        for each in wanted:
            _check(each, factor)
        solved: list = [None] * len(wanted)
        kinds = [each.pattern for each in wanted]
        for pattern in dict.fromkeys(kinds):
            chosen = [index for index, kind in enumerate(kinds) if kind == pattern]
            results = _solve_stack([wanted[index] for index in chosen], factor, pattern, self.block)
            for index, result in zip(chosen, results, strict=True):
                solved[index] = result
        return solved


def _check(wanted: PruneRequest, factor: HessianFactor) -> None:
    rows, columns = wanted.weight_RC.shape
    if len(factor.upper_CC) != columns:
        raise ValueError(f"the weight has {columns} inputs, but the Gram matrix is of {len(factor.upper_CC)}")
    pattern = wanted.pattern
    if pattern is None:
        return
    if pattern.max_sparsity < 1:
        if abs(wanted.sparsity - pattern.max_sparsity) > 1e-9:
            raise ValueError(
                f'solver "sparsegpt" ends at sparsity {pattern.max_sparsity:g} with {pattern}, and not at '
                f"{wanted.sparsity}"
            )
    elif 1 < columns == _width(pattern, rows, columns):
        raise ValueError(
            f'solver "sparsegpt" cannot choose for {pattern} in a weight of {columns} inputs: whole rows fall, and '
            'nothing is left in them to make up for it. Use solver "zero", or give a mask.'
        )


def _width(pattern: Pattern, rows: int, columns: int) -> int:
    """The fewest columns that the pattern takes for a matrix of its own, with its share of the units."""

    def units(width: int) -> int:
        return torch.Size(pattern.unit_shape((rows, 1, width))).numel()

    widths = (width for width in range(1, columns) if columns % width == 0)
    fitting = (width for width in widths if pattern.check(rows, width) is None)
    return next((width for width in fitting if units(width) * columns == units(columns) * width), columns)


def _solve_stack(
    wanted: Sequence[PruneRequest], factor: HessianFactor, pattern: Pattern | None, block: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights whose rows are solved as one stack; each chooses by itself."""
    like = factor.upper_CC
    weight_CR = _stacked([each.weight_RC.detach().to(like.device, like.dtype) for each in wanted])
    weight_CR[factor.dead_C] = 0.0
    locked = any(each.mask_RC is not None for each in wanted)
    kept_CR = torch.ones_like(weight_CR, dtype=torch.bool)
    if locked:
        kept_CR = _stacked([_given(each).to(like.device) for each in wanted])
    width = 1 if pattern is None else _width(pattern, *wanted[0].weight_RC.shape)
    columns = wanted[0].weight_RC.shape[1]
    block = min(BLOCK, max(STRIP, columns // 8)) if block is None else block
    block = -(-block // width) * width
    strip, choose_block, choose_strip = STRIP, None, None
    if pattern is not None and pattern.max_sparsity < 1:
        strip, choose_strip = width, partial(_choose, pattern, locked)
    elif pattern is not None:
        choose_block = _chooser(wanted, pattern, block)
    _eliminate(weight_CR, kept_CR, like, block, strip, choose_block, choose_strip)
    heights = [len(each.weight_RC) for each in wanted]
    return [
        (_unstacked(weight, each.weight_RC.dtype, each.weight_RC), _unstacked(kept, torch.bool, each.weight_RC))
        for each, weight, kept in zip(wanted, weight_CR.split(heights, 1), kept_CR.split(heights, 1), strict=True)
    ]


def _stacked(matrices_RC: list[torch.Tensor]) -> torch.Tensor:
    """(C, R) the rows of all, in memory of its own: a column of the weights is contiguous then."""
    stack = matrices_RC[0] if len(matrices_RC) == 1 else torch.cat(matrices_RC)
    return stack.t().clone(memory_format=torch.contiguous_format)


def _unstacked(part_CR: torch.Tensor, dtype: torch.dtype, like_RC: torch.Tensor) -> torch.Tensor:
    return torch.empty(like_RC.shape, dtype=dtype, device=like_RC.device).copy_(part_CR.t())


def _given(wanted: PruneRequest) -> torch.Tensor:
    if wanted.mask_RC is None:
        return torch.ones(wanted.weight_RC.shape, dtype=torch.bool, device=wanted.weight_RC.device)
    return wanted.mask_RC


def _eliminate(weight_CR, kept_CR, upper_CC, block, strip, choose_block, choose_strip) -> None:
    """Overwrites `weight_CR` by the solution, and `kept_CR` by the mask that was chosen on the way.

    What earlier blocks changed, D = W - Ŵ, moves the weights of block b to where they make up for it best:
    W_b + (D_<b·R_<b,b)·U_bb, with U_bb = (R_bb)⁻¹. So R serves as it is and no inverse of its size is made.
    """
    columns, rows = weight_CR.shape
    change_CR = torch.empty_like(weight_CR)
    eye = torch.eye(min(block, columns), dtype=upper_CC.dtype, device=upper_CC.device)
    for start in range(0, columns, block):
        here = slice(start, min(columns, start + block))
        size = here.stop - start
        inner_BB = upper_CC[here, here]
        inverse_BB = torch.linalg.solve_triangular(inner_BB, eye[:size, :size], upper=True)
        now_BR = torch.addmm(weight_CR[here], (upper_CC[:start, here] @ inverse_BB).t(), change_CR[:start])
        worth_B1 = inner_BB.diagonal()[:, None]
        if choose_block is not None:
            choose_block((now_BR * worth_B1).square_(), kept_CR[here], start)
        error_BR = torch.empty_like(now_BR)
        for first in range(0, size, strip):
            last = min(size, first + strip)
            now_SR, kept_SR, worth_S1 = now_BR[first:last], kept_CR[here][first:last], worth_B1[first:last]
            now_SR.addmm_(inverse_BB[:first, first:last].t(), error_BR[:first], alpha=-1)
            if choose_strip is not None:
                choose_strip((now_SR * worth_S1).square_(), kept_SR)
            torch.mul(~kept_SR, worth_S1, out=error_BR[first:last])
            for j in range(first, last):
                error_BR[j].mul_(now_BR[j])
                now_BR[j + 1 : last].addr_(inverse_BB[j, j + 1 : last], error_BR[j], alpha=-1)
        now_BR.mul_(kept_CR[here]).add_(0.0)  # several times faster than a fill; adding makes +0.0 of -0.0
        torch.sub(weight_CR[here], now_BR, out=change_CR[here])
        weight_CR[here] = now_BR


def _chooser(wanted: Sequence[PruneRequest], pattern: Pattern, block: int) -> Callable:
    """A function that chooses what falls in a block of columns, of each weight of a stack by itself."""
    starts = range(0, wanted[0].weight_RC.shape[1], block)
    counts = [dict(zip(starts, _counts(each, pattern, block), strict=True)) for each in wanted]
    heights = [len(each.weight_RC) for each in wanted]

    def choose(scores_BR: torch.Tensor, kept_BR: torch.Tensor, start: int) -> None:
        parts = zip(wanted, counts, scores_BR.split(heights, 1), kept_BR.split(heights, 1), strict=True)
        for each, count, scores, kept in parts:
            _choose(pattern, each.mask_RC is not None, scores, kept, count[start])

    return choose


def _counts(wanted: PruneRequest, pattern: Pattern, block: int) -> list[int]:
    """How many units fall in each block of columns: the same share of each, as far as whole units and the mask let."""
    rows, columns = wanted.weight_RC.shape
    widths = [min(block, columns - start) for start in range(0, columns, block)]
    units = [torch.Size(pattern.unit_shape((rows, 1, width))).numel() for width in widths]
    locked = [0] * len(units)
    if wanted.mask_RC is not None:
        masks = wanted.mask_RC.split(block, dim=1)
        locked = [int(pattern.fallen(mask[:, None, :]).sum()) for mask in masks]
    total = max(round(wanted.sparsity * sum(units)), sum(locked))
    return largest_remainder(total, [total * count / sum(units) for count in units], locked, units).tolist()


def _choose(
    pattern: Pattern, locked: bool, scores_BR: torch.Tensor, kept_BR: torch.Tensor, count: int | None = None
) -> None:
    """Clears in `kept_BR` what falls: `count` units with those that have fallen, or all that the pattern does not
    protect. Overwrites the scores. `locked`: whether something may have fallen before."""
    scores, kept = scores_BR.t()[:, None, :], kept_BR.t()[:, None, :]
    if count is None:
        if locked:
            scores.masked_fill_(~kept, -torch.inf)
        protected = pattern.pool(scores.float()) == torch.inf
    else:
        if locked:
            scores.masked_fill_(~kept, 0.0)
        scores_U = pattern.pool(scores).float()
        if locked:
            scores_U = scores_U.masked_fill(pattern.fallen(kept), -torch.inf)
        scores_U = scores_U.contiguous()
        cut = lowest(TensorScores(scores_U), count)
        protected = keep(scores_U.view(-1), cut, cut.ties)[0].view(scores_U.shape)
    kept.logical_and_(pattern.expand(protected, tuple(kept.shape)))
