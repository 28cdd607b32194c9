"""Base class of solvers: the values of the weights that remain after pruning.

Shapes: R output rows, C inputs of one weight matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..methods import MethodRegistry
from ..patterns import Pattern
from ..requires import Requires
from ..statistics import GramMatrix


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """One weight matrix with a mask, with a pattern and a sparsity, or with both.

    Args:
        weight_RC: any floating dtype.
        mask_RC: bool, True is kept. All weights may be kept if None.
        pattern: of the units that the solver selects, in addition to the mask.
        sparsity: share of the pattern's units that are zero in the result, those of the mask included. If None, the
            mask alone decides.
        by_row: whether the solver selects equally many units of each row, up to whole units and the mask, instead of
            the lowest of the whole weight.

    Raises:
        ValueError: the weight, the mask or the sparsity is invalid.
    """

    weight_RC: torch.Tensor
    mask_RC: torch.Tensor | None = None
    pattern: Pattern | None = None
    sparsity: float | None = None
    by_row: bool = False

    def __post_init__(self) -> None:
        weight, mask = self.weight_RC, self.mask_RC
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"a weight must be a matrix of floats, but is {weight.dtype} {tuple(weight.shape)}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("a weight holds inf or nan, so that its outputs are not defined")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
            raise ValueError(
                f"a mask must be bool, of shape {tuple(weight.shape)}, but is {mask.dtype} {tuple(mask.shape)}"
            )
        if (self.pattern is None) != (self.sparsity is None) or (mask is None and self.pattern is None):
            raise ValueError("a request needs a mask, or a pattern together with a sparsity, or all three")
        if self.pattern is not None and self.sparsity is not None:
            problem = self.pattern.check(*weight.shape)
            if problem:
                rows, columns = weight.shape
                raise ValueError(f"{problem}, but the weight has {rows} outputs and {columns} inputs")
            if self.by_row and not self.pattern.has_rows:
                raise ValueError(f"`by_row` needs several units in a row, but pattern {self.pattern} has one")
            most = self.pattern.max_sparsity
            if not 0 <= self.sparsity <= most + 1e-9:
                raise ValueError(f"sparsity is {self.sparsity}: it must be from 0 to {most:g} with {self.pattern}")

    def required_mask(self, solver: str) -> torch.Tensor:
        """Returns the mask, for a solver that selects no units.

        Args:
            solver: its registered name.

        Raises:
            ValueError: there is no mask, or a sparsity to select units for.
        """
        if self.mask_RC is None or self.sparsity is not None:
            raise ValueError(f'solver "{solver}" selects no units itself: give it a mask, made by a criterion')
        return self.mask_RC


class Solver(ABC):
    """Computes the weights that remain after pruning.

    A subclass is registered with `register_solver`; when it is a frozen dataclass, its fields are its options
    (`solver_kwargs`).
    """

    requires: ClassVar[Requires] = Requires.NOTHING
    """`NOTHING`, or `GRAM` to get the Gram matrix of the weights' inputs."""
    selects: ClassVar[bool] = False
    """Whether the solver can select the pruned units itself, from a pattern and a sparsity. Otherwise every request
    needs a mask."""
    scopes: ClassVar[tuple[str, ...]] = ("layer",)
    """Which units can compete where the solver selects: those of a "layer", of a "row", or either."""
    updates: ClassVar[bool] = True
    """Whether the solver changes the weights that remain."""
    prunes_columns: ClassVar[bool] = False
    """Whether the solver is only efficient where whole columns are pruned."""
    solves_bias: ClassVar[bool] = False
    """Whether a request may have the bias as its last column, with a `WeightedGram`."""

    @property
    def needs_full_rank(self) -> bool:
        """Whether the Gram matrix must have full rank, which takes at least as many tokens as inputs."""
        return False

    def prepare(self, gram: GramMatrix) -> Any:
        """Returns what `solve_batched` takes as `statistic` for all weights with this input, computed once."""
        return gram

    def factor_operations(self, columns: int) -> float:
        """Returns the number of multiply-adds of `prepare`, for plans: by default those of a Cholesky factor if the
        Gram matrix is required."""
        return columns**3 / 3 if self.requires & Requires.GRAM else 0.0

    def operations(self, rows: int, columns: int) -> float:
        """Returns the number of multiply-adds of `solve_batched` for matrices of so many rows together, for plans: by
        default those of a product with a factor if the Gram matrix is required."""
        return float(rows * columns**2) if self.requires & Requires.GRAM else 0.0

    def solve(
        self,
        weight_RC: torch.Tensor,
        statistic: Any = None,
        pattern: Pattern | None = None,
        sparsity: float | None = None,
        mask_RC: torch.Tensor | None = None,
        by_row: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solves for one matrix: see `PruneRequest` for the arguments and `solve_batched` for the result."""
        return self.solve_batched([PruneRequest(weight_RC, mask_RC, pattern, sparsity, by_row)], statistic)[0]

    @abstractmethod
    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Solves for matrices that share their input, such as query, key and value, each independently.

        Args:
            requests: the matrices; not modified.
            statistic: None, or what `prepare` returned.

        Returns:
            For each request the new weight (R, C), of the old dtype and device, +0.0 wherever the mask is False, and
            the mask (R, C), bool.

        Raises:
            ValueError: the solver does not support a request.
        """


def output_energy(weight_RC: torch.Tensor, gram: GramMatrix) -> float:
    """Returns tr(W G W^T): the sum of squares of all outputs over the tokens in `gram`.

    Of a difference of weights it is the squared reconstruction error. Costs R·C² multiplications.

    Example:
        >>> gram = GramMatrix(2)
        >>> gram.observe(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
        >>> output_energy(torch.tensor([[1.0, -1.0]]), gram)  # (1 - 2)² + (3 - 1)²
        5.0
    """
    weight = weight_RC.detach().to(gram.total.device, gram.total.dtype)
    below = (weight @ gram.total.tril(-1)).mul_(weight).sum(dtype=torch.float64)
    diagonal = (weight.square() @ gram.total.diagonal()).sum(dtype=torch.float64)
    return float(2 * below + diagonal)


SOLVERS = MethodRegistry("solver", Solver, {Requires.NOTHING: Solver, Requires.GRAM: Solver})
register_solver = SOLVERS.register
