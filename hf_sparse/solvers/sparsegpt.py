"""SparseGPT: the weights to the right of a pruned weight compensate for it.

Shapes: C inputs, B of them in a block, S in a strip of a block; R rows, of all weights that share the input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch

from ..patterns import Pattern
from ..patterns.n_of_m import NOfM
from ..requires import Requires
from ..selection.budgets import largest_remainder
from ..statistics import GramMatrix
from .base import PruneRequest, Solver, register_solver
from .hessian import DAMPENING, HessianFactor
from .unit_selection import check_request, mask_of, prune_lowest


logger = logging.getLogger(__name__)

BLOCK_SIZE = 128
STRIP_SIZE = 16  # columns whose mutual updates are computed one by one


@register_solver("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prunes column by column, from the first: for every pruned w_j the later weights of its row take the optimal
    update, given the earlier ones (Optimal Brain Surgeon on the columns j..C).

        e_j = w_j / U_jj        w_k <- w_k - e_j·U_jk for k > j        with (G + damping)^-1 = U^T·U

    The squared error over the damped inputs is the sum of e_j² over all pruned weights. It is minimal if the pruned
    columns precede the kept ones; otherwise updating earlier weights as well could lower it further.

    Without a mask each block of columns selects its pruned units when it is reached: the weights with the smallest
    e_j² of all rows, units of several weights by their mean; N:M selects group by group instead. Over all blocks
    exactly round(sparsity·units) units are pruned (more only if the mask prunes more), ties by position; N:M keeps
    exactly N of every M, fewer only where the mask does. Weights of dead inputs become 0, whatever the mask says.

    Args:
        dampening: d of `HessianFactor`, the share of the mean square of the inputs that is added to each, from 0 to 1.
            It determines what calibration data of too few tokens leave undetermined.
        block_size: columns that select together, rounded up to the pattern's width. None is the paper's 128, or an
            eighth of the columns of narrower weights: with one block nothing is updated before everything is selected.

    Raises:
        ValueError: an option is out of range; in `solve`, a pattern whose units span whole rows, a sparsity that N:M
            does not have, a Gram matrix of another size, and what `HessianFactor` raises.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> mask = torch.tensor([[False, True]])
        >>> SparseGPT(dampening=0).solve(torch.tensor([[2.0, 3.0]]), gram, mask_RC=mask)[0]
        tensor([[0., 4.]])

    Reference: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """

    dampening: float = DAMPENING
    block_size: int | None = None

    requires = Requires.GRAM
    selects = True

    def __post_init__(self) -> None:
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"`dampening` is {self.dampening}: it must be from 0 to 1, as in {DAMPENING}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size` is {self.block_size}: it must be 1 or more, as in {BLOCK_SIZE}")

    @property
    def needs_full_rank(self) -> bool:
        return self.dampening == 0

    def prepare(self, gram: GramMatrix) -> Any:
        return HessianFactor(gram, self.dampening)

    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        factor = statistic if isinstance(statistic, HessianFactor) else self.prepare(statistic)
        for request in requests:
            _check(request, factor)
        solved: list = [None] * len(requests)
        patterns = [request.pattern for request in requests]
        for pattern in dict.fromkeys(patterns):
            chosen = [index for index, other in enumerate(patterns) if other == pattern]
            results = _solve_stack([requests[index] for index in chosen], factor, pattern, self.block_size)
            for index, result in zip(chosen, results, strict=True):
                solved[index] = result
        return solved


def _check(request: PruneRequest, factor: HessianFactor) -> None:
    check_request(request, "sparsegpt", SparseGPT.scopes, len(factor.upper_CC))
    pattern, (rows, columns) = request.pattern, request.weight_RC.shape
    if pattern is not None and pattern.max_sparsity == 1 and 1 < columns == _width(pattern, rows, columns):
        raise ValueError(
            f'`solver` "sparsegpt" cannot select units of {pattern} in a weight of {columns} inputs: whole rows are '
            'pruned, and no weight remains in them to compensate. Use `solver="none"`, or give a mask.'
        )


def _width(pattern: Pattern, rows: int, columns: int) -> int:
    """The fewest columns that the pattern divides and whose share of the units is their share of the columns."""

    total = pattern.num_units((rows, 1, columns))
    widths = (width for width in range(1, columns) if columns % width == 0)
    fitting = (width for width in widths if pattern.check(rows, width) is None)
    return next(
        (width for width in fitting if pattern.num_units((rows, 1, width)) * columns == total * width), columns
    )


def _solve_stack(
    requests: Sequence[PruneRequest], factor: HessianFactor, pattern: Pattern | None, block: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Solves for weights whose rows form one stack; each weight selects its own pruned units."""
    like = factor.upper_CC
    weight_CR = _stack_rows([request.weight_RC.detach().to(like.device, like.dtype) for request in requests])
    weight_CR[factor.dead_C] = 0.0
    masked = any(request.mask_RC is not None for request in requests)
    kept_CR = torch.ones_like(weight_CR, dtype=torch.bool)
    if masked:
        kept_CR = _stack_rows([mask_of(request).to(like.device) for request in requests])
    width = 1 if pattern is None else _width(pattern, *requests[0].weight_RC.shape)
    columns = requests[0].weight_RC.shape[1]
    block = min(BLOCK_SIZE, max(STRIP_SIZE, columns // 8)) if block is None else block
    block = -(-block // width) * width
    select_block, select_strip, counts = None, None, []
    if pattern is not None and pattern.max_sparsity < 1:
        select_strip = partial(_select_strip, pattern, masked)
    elif pattern is not None:
        counts = [_prune_counts(request, pattern, block) for request in requests]
        select_block = _block_selector(requests, pattern, block, counts)
    kernels = _kernels(weight_CR.device) if weight_CR.is_cuda and like.dtype == torch.float32 else None
    group = pattern if isinstance(pattern, NOfM) else None
    heights = [len(request.weight_RC) for request in requests]
    if kernels is not None and block <= kernels.MAX_BLOCK and (select_strip is None or group is not None):
        if pattern is not None and pattern.flat:
            select_block = kernels.LowestScores(heights, counts, weight_CR.device)
        kernels.eliminate(weight_CR, kept_CR, like, block, select_block, group)
    else:
        strip = STRIP_SIZE if select_strip is None else width
        _eliminate(weight_CR, kept_CR, like, block, strip, select_block, select_strip)
    if not bool(torch.isfinite(weight_CR).all()):
        raise ValueError("the solution holds inf or nan: check the weight for values that are far too large")
    return [
        (_unstack(weight, request.weight_RC.dtype, request.weight_RC), _unstack(kept, torch.bool, request.weight_RC))
        for request, weight, kept in zip(requests, weight_CR.split(heights, 1), kept_CR.split(heights, 1), strict=True)
    ]


def _stack_rows(matrices_RC: list[torch.Tensor]) -> torch.Tensor:
    """Returns (C, R), the transposed rows of all matrices: a copy in which a column of the weights is contiguous."""
    stack = matrices_RC[0] if len(matrices_RC) == 1 else torch.cat(matrices_RC)
    return stack.t().clone(memory_format=torch.contiguous_format)


def _unstack(part_CR: torch.Tensor, dtype: torch.dtype, like_RC: torch.Tensor) -> torch.Tensor:
    return torch.empty(like_RC.shape, dtype=dtype, device=like_RC.device).copy_(part_CR.t())


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The module with the kernels for GPUs, or None where they cannot be built, which is tried once."""
    try:
        from . import sparsegpt_triton

        eye, kept = torch.eye(2, device=device), torch.ones(2, 2, dtype=torch.bool, device=device)
        sparsegpt_triton.eliminate(eye.clone(), kept, eye, block=2)
    except Exception as error:  # Triton raises errors of many kinds where it has no compiler or no such GPU
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("SparseGPT runs without its Triton kernels, many times slower: %s", reason)
        return None
    return sparsegpt_triton


def _eliminate(
    weight_CR: torch.Tensor,
    kept_CR: torch.Tensor,
    upper_CC: torch.Tensor,
    block: int,
    strip: int,
    select_block: Callable | None,
    select_strip: Callable | None,
) -> None:
    """Overwrites `weight_CR` with the solution and `kept_CR` with the selected mask.

    The changes of earlier blocks, D = W - Ŵ, update the weights of block b to W_b + (D_<b·R_<b,b)·U_bb, with
    U_bb = (R_bb)^-1, so that no inverse of the size of R is computed.
    """
    columns, rows = weight_CR.shape
    change_CR = torch.empty_like(weight_CR)
    eye = torch.eye(min(block, columns), dtype=upper_CC.dtype, device=upper_CC.device)
    for start in range(0, columns, block):
        here = slice(start, min(columns, start + block))
        size = here.stop - start
        inner_BB = upper_CC[here, here]
        inverse_BB = torch.linalg.solve_triangular(inner_BB, eye[:size, :size], upper=True)
        updated_BR = torch.addmm(weight_CR[here], (upper_CC[:start, here] @ inverse_BB).t(), change_CR[:start])
        scale_B1 = inner_BB.diagonal()[:, None]
        if select_block is not None:
            select_block((updated_BR * scale_B1).square_(), kept_CR[here], start)
        error_BR = torch.empty_like(updated_BR)
        for first in range(0, size, strip):
            last = min(size, first + strip)
            updated_SR, kept_SR, scale_S1 = updated_BR[first:last], kept_CR[here][first:last], scale_B1[first:last]
            updated_SR.addmm_(inverse_BB[:first, first:last].t(), error_BR[:first], alpha=-1)
            if select_strip is not None:
                select_strip((updated_SR * scale_S1).square_(), kept_SR)
            torch.mul(~kept_SR, scale_S1, out=error_BR[first:last])
            for j in range(first, last):
                error_BR[j].mul_(updated_BR[j])
                updated_BR[j + 1 : last].addr_(inverse_BB[j, j + 1 : last], error_BR[j], alpha=-1)
        updated_BR.mul_(kept_CR[here]).add_(0.0)  # several times faster than a fill; adding 0.0 turns -0.0 into +0.0
        torch.sub(weight_CR[here], updated_BR, out=change_CR[here])
        weight_CR[here] = updated_BR


def _select_strip(pattern: Pattern, masked: bool, scores_SR: torch.Tensor, kept_SR: torch.Tensor) -> None:
    """Clears in `kept_SR` what an N:M pattern prunes in a strip of columns. Overwrites the scores."""
    prune_lowest(pattern, scores_SR.t(), kept_SR.t(), None, masked)


def _block_selector(
    requests: Sequence[PruneRequest], pattern: Pattern, block: int, counts: Sequence[Sequence[int]]
) -> Callable:
    """Returns a function that selects the pruned units in a block of columns, `counts` of each weight of a stack."""
    heights = [len(request.weight_RC) for request in requests]

    def select(scores_BR: torch.Tensor, kept_BR: torch.Tensor, start: int) -> None:
        parts = zip(requests, counts, scores_BR.split(heights, 1), kept_BR.split(heights, 1), strict=True)
        for request, count, scores, kept in parts:
            prune_lowest(pattern, scores.t(), kept.t(), count[start // block], request.mask_RC is not None)

    return select


def _prune_counts(request: PruneRequest, pattern: Pattern, block: int) -> list[int]:
    """Returns the number of pruned units in each block of columns: equal shares, up to whole units and the mask."""
    rows, columns = request.weight_RC.shape
    widths = [min(block, columns - start) for start in range(0, columns, block)]
    units = [pattern.num_units((rows, 1, width)) for width in widths]
    masked = [0] * len(units)
    if request.mask_RC is not None:
        masked = [int(pattern.pruned_units(mask[:, None, :]).sum()) for mask in request.mask_RC.split(block, dim=1)]
    total = max(round((request.sparsity or 0.0) * sum(units)), sum(masked))
    return largest_remainder(total, [total * count / sum(units) for count in units], masked, units).tolist()
