"""Least squares: the columns that remain take over from those that were pruned.

Shapes: R output rows, C inputs; S of them are kept, P are pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from ..statistics import GramMatrix, WeightedGram
from .base import PruneRequest, Solver, register_solver
from .hessian import HessianFactor


RIDGE = 0.1


@register_solver("lstsq")
@dataclass(frozen=True)
class LeastSquares(Solver):
    """The weights of least squared error of the outputs, among those that are zero where the mask is False:

        Ŵ = argmin Σ ‖W x - Ŵ x‖² + d·‖W_S - Ŵ_S‖²,    d = ridge · mean diag(G_SS)
        Ŵ_S = W_S + W_P·G_PS·(G_SS + d·I)^-1

    With a `WeightedGram` each token counts by the weight 1/‖y‖², and the last column of a matrix with one column more
    than there are inputs is its bias, which is free: G is then the matrix of the centered inputs.

    Rows with the same mask share one Cholesky factor: whole columns cost one in all, masks of single weights one per
    row. One-shot pruning uses it for pattern neuron and head.

    Args:
        ridge: weight of the distance to the old weights, from 0 to 1; 0 requires a G of full rank.

    Raises:
        ValueError: an option is out of range; in `solve`, a request without a mask, a Gram matrix of another size, and
            what `HessianFactor` raises.

    Example:
        >>> gram = GramMatrix(2)
        >>> gram.total.copy_(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([[2., 1.],
                [1., 2.]])
        >>> gram.count = 2
        >>> LeastSquares(ridge=0).solve(torch.tensor([[2.0, 3.0]]), gram, mask_RC=torch.tensor([[False, True]]))[0]
        tensor([[0., 4.]])

    Reference: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022, section 4.3; Kurtić et
    al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, eq. 3.
    """

    ridge: float = RIDGE

    requires = Requires.GRAM
    prunes_columns = True
    solves_bias = True

    def __post_init__(self) -> None:
        if not 0 <= self.ridge <= 1:
            raise ValueError(f"`ridge` is {self.ridge}: it must be from 0 to 1, as in {RIDGE}")

    @property
    def needs_full_rank(self) -> bool:
        return self.ridge == 0

    def factor_operations(self, columns: int) -> float:
        return 0.0

    def operations(self, rows: int, columns: int) -> float:
        # One factor for whole columns, which is that of the kept inputs: at most all.
        return columns**3 / 3 + rows * columns**2

    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        solved = []
        for request in requests:
            mask_RC = request.required_mask("lstsq")
            columns, inputs = request.weight_RC.shape[1], len(statistic.total)
            allowed = (inputs - 1, inputs) if isinstance(statistic, WeightedGram) else (inputs,)
            if columns not in allowed:
                raise ValueError(f"the weight has {columns} inputs, but the Gram matrix is of {allowed[0]}")
            solved.append((self._solve(request.weight_RC, mask_RC, statistic), mask_RC.clone()))
        return solved

    def _solve(self, weight_RC: torch.Tensor, mask_RC: torch.Tensor, statistic: GramMatrix) -> torch.Tensor:
        device, has_bias = statistic.total.device, False
        if isinstance(statistic, WeightedGram):
            has_bias = weight_RC.shape[1] == len(statistic.total)
            gram_CC = statistic.centered_matrix() if has_bias else statistic.matrix_without_bias()
        else:
            gram_CC = statistic.matrix()
        old_RC = weight_RC.detach().to(device, gram_CC.dtype, copy=True, memory_format=torch.contiguous_format)
        kept_RC = mask_RC.to(device)
        num_inputs = len(gram_CC)
        new_RC = torch.where(kept_RC, old_RC, 0.0)
        masks, mask_of_row = kept_RC[:, :num_inputs].unique(dim=0, return_inverse=True)
        for number, kept_C in enumerate(masks):
            rows = (mask_of_row == number).nonzero()[:, 0]
            change_SR = _change_of_kept(old_RC[rows, :num_inputs], gram_CC, kept_C, self.ridge)
            if change_SR is not None:
                new_RC[rows[:, None], kept_C.nonzero()[:, 0]] += change_SR.t()
        if has_bias and isinstance(statistic, WeightedGram):
            lost_RC = old_RC[:, :-1] - new_RC[:, :-1]
            new_RC[:, -1] += (lost_RC @ statistic.sums) / statistic.weight
            new_RC[:, -1].mul_(kept_RC[:, -1])
        return torch.empty(weight_RC.shape, dtype=weight_RC.dtype, device=weight_RC.device).copy_(new_RC)


def _change_of_kept(
    weight_RC: torch.Tensor, gram_CC: torch.Tensor, kept_C: torch.Tensor, ridge: float
) -> torch.Tensor | None:
    """Returns Ŵ_S - W_S, transposed to (S, R); None where nothing is pruned or nothing is kept."""
    kept, pruned = kept_C.nonzero()[:, 0], (~kept_C).nonzero()[:, 0]
    if not len(kept) or not len(pruned):
        return None
    factor = HessianFactor(gram_CC[kept[:, None], kept], ridge)
    upper_SS = factor.upper_CC
    lost_SR = gram_CC[kept[:, None], pruned] @ weight_RC[:, pruned].t()
    # (U U^T)^-1 with U upper triangular
    half_SR = torch.linalg.solve_triangular(upper_SS, lost_SR, upper=True)
    return torch.linalg.solve_triangular(upper_SS.t(), half_SR, upper=False)
