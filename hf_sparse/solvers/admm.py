"""ADMM: which weights are pruned and what the others become, optimized together, then least squares.

Shapes: C inputs; R rows, of all weights that share the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from ..statistics import GramMatrix
from .base import PruneRequest, Solver, register_solver
from .conjugate_gradients import solve_kept
from .hessian import DAMPENING, checked_sums
from .unit_selection import check_request, mask_of, prune_count, prune_lowest


ITERATIONS = 30
RHO = 0.1
LAST_RHO = 4.0
"""The penalty of the last iterations: where it dominates the Gram matrix, whose diagonal is 1, the mask stays."""

ITERATIONS_PER_RHO = 2
RELAXATION = 1.6
"""The share of the new weights in the next ones, the rest being that of the projected ones: above 1, up to 2, fewer
iterations give the same error."""

LEAST_SQUARES_STEPS = 10
MASKED_LEAST_SQUARES_STEPS = 30
"""Steps from weights that no iteration has updated."""


@register_solver("admm")
@dataclass(frozen=True)
class ADMM(Solver):
    """Least squared error of the outputs over masks and weights together, by alternating directions.

        H = S^-1·(G + damping)·S^-1, of unit diagonal,    W = weight·S
        X <- W + ρ·(D - W - U)·(H + ρ·I)^-1
        Y <- 1.6·X - 0.6·D + U
        D <- Y where it is kept, else 0,    U <- Y - D

    X minimizes tr((X - W)·H·(X - W)^T) + ρ·‖X - D + U‖². Kept are the units with the largest mean squares of Y, so
    that exactly round(sparsity·units) are pruned, of each weight or with `by_row` of each row, ties by position;
    N:M keeps exactly N of every M. ρ grows geometrically until the mask stays. Conjugate gradients (`solve_kept`)
    then solve the least squares problem of the mask; a mask that was given takes these alone. Rows whose error is
    not less than with the kept weights as they were keep them.

    Every iteration is a product of the weights with a C x C matrix, and each of half as many ρ takes an inverse,
    from a Cholesky factor.

    Args:
        iterations: more take proportionally longer and give lower errors, as ρ grows in smaller steps.
        rho: ρ of the first iterations, up to 4, that of the last ones.
        dampening: share of the mean square of the inputs that is added to each, from 0 to 1.

    Raises:
        ValueError: an option is out of range; in `solve`, a sparsity that N:M does not have, a Gram matrix of another
            size, and what `HessianFactor` raises.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> mask = torch.tensor([[False, True]])
        >>> ADMM(dampening=0).solve(torch.tensor([[2.0, 3.0]]), gram, mask_RC=mask)[0]
        tensor([[0., 4.]])

    Reference: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    2024; Boyd et al., "Distributed Optimization and Statistical Learning via the
    Alternating Direction Method of Multipliers", 2011, section 3.4.3, for the relaxation.
    """

    iterations: int = ITERATIONS
    rho: float = RHO
    dampening: float = DAMPENING

    requires = Requires.GRAM
    selects = True
    scopes = ("layer", "row")

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"`iterations` is {self.iterations}: it must be 1 or more, as in {ITERATIONS}")
        if not 1e-3 <= self.rho <= LAST_RHO:
            raise ValueError(f"`rho` is {self.rho}: it must be from 0.001 to {LAST_RHO:g}, as in {RHO}")
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"`dampening` is {self.dampening}: it must be from 0 to 1, as in {DAMPENING}")

    def prepare(self, gram: GramMatrix) -> Any:
        return ScaledGram(gram, self.dampening)

    def factor_operations(self, columns: int) -> float:
        return self.iterations / ITERATIONS_PER_RHO * columns**3

    def operations(self, rows: int, columns: int) -> float:
        return float((self.iterations + LEAST_SQUARES_STEPS + 4) * rows * columns**2)

    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        scaled = statistic if isinstance(statistic, ScaledGram) else self.prepare(statistic)
        for request in requests:
            check_request(request, "admm", self.scopes, len(scaled.gram_CC))
        solved: list = [None] * len(requests)
        for selects in (True, False):
            chosen = [index for index, request in enumerate(requests) if (request.pattern is not None) == selects]
            if chosen:
                results = self._solve_stack([requests[index] for index in chosen], scaled, selects)
                for index, result in zip(chosen, results, strict=True):
                    solved[index] = result
        return solved

    def _solve_stack(
        self, requests: Sequence[PruneRequest], scaled: ScaledGram, selects: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Solves for weights whose rows form one stack; each weight selects its own pruned units."""
        like = scaled.gram_CC
        old_RC = torch.cat([request.weight_RC.detach().to(like.device, like.dtype) for request in requests])
        old_RC[:, scaled.dead_C] = 0.0
        kept_RC = torch.cat([mask_of(request).to(like.device) for request in requests])
        weight_RC = old_RC * scaled.scale_C
        start_RC = torch.where(kept_RC, weight_RC, 0.0)
        if selects:
            start_RC, kept_RC = self._alternate(weight_RC, kept_RC, requests, scaled.gram_CC)
        steps = LEAST_SQUARES_STEPS if selects else MASKED_LEAST_SQUARES_STEPS
        solution_RC = solve_kept(scaled.gram_CC, weight_RC, start_RC, kept_RC, steps)
        del start_RC
        if not bool(torch.isfinite(solution_RC).all()):
            raise ValueError("the solution holds inf or nan: check the weight for values that are far too large")
        solution_RC.div_(scaled.scale_C)
        heights = [len(request.weight_RC) for request in requests]
        parts = zip(requests, *(both.split(heights) for both in (old_RC, solution_RC, kept_RC)), strict=True)
        return [_best(request, old, new, kept, scaled) for request, old, new, kept in parts]

    def _alternate(
        self,
        weight_RC: torch.Tensor,
        kept_RC: torch.Tensor,
        requests: Sequence[PruneRequest],
        gram_CC: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pruned weights and the mask after all iterations."""
        project = _Projection(requests, kept_RC)
        current_RC, kept_RC, inverse_CC = weight_RC, project(weight_RC), gram_CC
        last, growth = 0.0, 0.0  # the dual U is 0 at the start
        for iteration, rho in enumerate(self._penalties()):
            if rho != last:
                growth, last = last / rho, rho
                inverse_CC = _inverse(gram_CC, rho)
            sparse_RC, dual_RC = current_RC.masked_fill(~kept_RC, 0.0), current_RC.masked_fill(kept_RC, 0.0)
            change_RC = torch.sub(sparse_RC, weight_RC).sub_(dual_RC, alpha=growth)
            current_RC = torch.addmm(weight_RC, change_RC, inverse_CC, alpha=rho).mul_(RELAXATION)
            current_RC.add_(sparse_RC, alpha=1 - RELAXATION).add_(dual_RC, alpha=growth)
            del sparse_RC, dual_RC, change_RC
            kept_RC, growth = project(current_RC), 1.0
        return current_RC.masked_fill_(~kept_RC, 0.0), kept_RC

    def _penalties(self) -> Iterator[float]:
        """Yields ρ of each iteration."""
        last = (self.iterations - 1) // ITERATIONS_PER_RHO
        for iteration in range(self.iterations):
            yield self.rho * (LAST_RHO / self.rho) ** (iteration // ITERATIONS_PER_RHO / max(1, last))


class ScaledGram:
    """A damped Gram matrix that is scaled to unit diagonal: S^-1·(G + d·mean(diag G)·I)·S^-1.

    An input feature that is always 0 (a zero on the diagonal) is `dead`: its row and column are those of I.

    Args:
        gram: the Gram matrix, or a tensor (C, C), float32 or float64, of which the lower triangle is read.
        dampening: d, from 0 to 1.

    Attributes:
        gram_CC: the scaled matrix, symmetric.
        scale_C: the diagonal of S.
        damping_C: the share of the diagonal of `gram_CC` that is damping.
        dead_C: bool, the dead input features.

    Raises:
        ValueError: as `HessianFactor`.

    Example:
        >>> scaled = ScaledGram(torch.tensor([[4.0, 0.0], [2.0, 16.0]]), dampening=0)
        >>> scaled.gram_CC, scaled.scale_C
        (tensor([[1.0000, 0.2500],
                [0.2500, 1.0000]]), tensor([2., 4.]))
    """

    def __init__(self, gram: GramMatrix | torch.Tensor, dampening: float = DAMPENING):
        sums = checked_sums(gram, dampening)
        diagonal = sums.diagonal()
        self.dead_C = diagonal == 0
        damping = dampening * diagonal.sum() / (~self.dead_C).sum().clamp(min=1)
        self.scale_C = torch.where(self.dead_C, 1.0, diagonal + damping).sqrt()
        self.damping_C = damping / self.scale_C.square()
        lower = sums.tril(-1).div_(self.scale_C).div_(self.scale_C[:, None])
        self.gram_CC = lower + lower.t()
        self.gram_CC.fill_diagonal_(1.0)

    def energies(self, scaled_RC: torch.Tensor) -> torch.Tensor:
        """Returns the sum of squares (R) of the outputs of each row of a scaled weight, without damping."""
        product_RC = (scaled_RC @ self.gram_CC).addcmul_(scaled_RC, self.damping_C, value=-1)
        return product_RC.mul_(scaled_RC).sum(1)


class _Projection:
    """Masks of the largest units of each weight of a stack, among those that the given masks keep.

    Args:
        requests: the weights, each with a pattern.
        kept_RC: the given masks.
    """

    def __init__(self, requests: Sequence[PruneRequest], kept_RC: torch.Tensor):
        self._requests, self._given_RC = requests, kept_RC
        self._counts = [prune_count(request) for request in requests]

    def __call__(self, weight_RC: torch.Tensor) -> torch.Tensor:
        heights = [len(request.weight_RC) for request in self._requests]
        scores_RC, kept_RC = weight_RC.square(), self._given_RC.clone()
        parts = zip(self._requests, self._counts, scores_RC.split(heights), kept_RC.split(heights), strict=True)
        for request, count, scores, kept in parts:
            if request.pattern is not None:
                prune_lowest(request.pattern, scores, kept, count, request.mask_RC is not None)
        return kept_RC


def _inverse(gram_CC: torch.Tensor, rho: float) -> torch.Tensor:
    damped_CC = gram_CC.clone()
    damped_CC.diagonal().add_(rho)
    lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
    if int(failed):
        raise ValueError("the Gram matrix is not positive semidefinite: it must be a sum of squares of inputs")
    del damped_CC
    return torch.cholesky_inverse(lower_CC)


def _best(
    request: PruneRequest, old_RC: torch.Tensor, new_RC: torch.Tensor, kept_RC: torch.Tensor, scaled: ScaledGram
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight and mask of a request: of each row the solution, or the kept weights as they were if their error
    is not larger."""
    target = request.weight_RC
    solved_RC = torch.where(kept_RC, new_RC, 0.0).to(target.dtype)
    same_RC = torch.where(kept_RC, old_RC, 0.0).to(target.dtype)
    errors = [scaled.energies((each.to(old_RC.dtype) - old_RC).mul_(scaled.scale_C)) for each in (solved_RC, same_RC)]
    weight_RC = torch.where((errors[0] < errors[1])[:, None], solved_RC, same_RC)
    return weight_RC.to(target.device), kept_RC.to(target.device, copy=True)
