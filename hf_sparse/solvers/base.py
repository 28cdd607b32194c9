"""What a solver is, and what can be asked of it.

Shapes: R output rows, C inputs of one weight matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..patterns import Pattern
from ..registry import Registry
from ..statistics import GramMatrix


SOLVERS = Registry("solver")
register_solver = SOLVERS.register


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """One weight matrix and what is asked of it: a mask as it is, or so many zeros in a pattern.

    Args:
        weight_RC: any floating dtype.
        mask_RC: bool; what is False becomes, or stays, zero. All may be kept if None.
        pattern: of the zeros that are to be chosen, beside those of the mask.
        sparsity: share of the pattern's units that are zero in the end, those of the mask included; the mask alone
            decides if None.

    Raises:
        ValueError: what is wrong with the weight, or with what is asked.
    """

    weight_RC: torch.Tensor
    mask_RC: torch.Tensor | None = None
    pattern: Pattern | None = None
    sparsity: float | None = None

    def __post_init__(self):
        weight, mask = self.weight_RC, self.mask_RC
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"a weight must be a matrix of floats, but is {weight.dtype} {tuple(weight.shape)}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("a weight holds inf or nan: it cannot be pruned by what it does")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
            raise ValueError(
                f"a mask must be bool, of shape {tuple(weight.shape)}, but is {mask.dtype} {tuple(mask.shape)}"
            )
        if (self.pattern is None) != (self.sparsity is None) or (mask is None and self.pattern is None):
            raise ValueError("ask for a mask, or for a pattern together with a sparsity, or for both")
        if self.pattern is not None:
            problem = self.pattern.check(*weight.shape)
            if problem:
                rows, columns = weight.shape
                raise ValueError(f"{problem}, but the weight has {rows} outputs and {columns} inputs")
            most = self.pattern.max_sparsity
            if not 0 <= self.sparsity <= most + 1e-9:
                raise ValueError(f"sparsity is {self.sparsity}: it must be from 0 to {most:g} with {self.pattern}")


class Solver(ABC):
    """Gives the weights that survive their values."""

    needs: str = "nothing"
    """What it gets as `stat`: "nothing" (None) or "gram" (a `GramMatrix` of the weight's inputs, a matrix of its sums,
    or a `HessianFactor` made of one)."""
    selects: bool = False
    """Whether it can choose what falls by itself, from a pattern and a sparsity; if not, it needs a mask."""

    def solve(
        self,
        weight_RC: torch.Tensor,
        stat: Any = None,
        pattern: Pattern | None = None,
        sparsity: float | None = None,
        mask_RC: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One matrix; see `PruneRequest` for the arguments and `solve_batched` for the rest."""
        return self.solve_batched([PruneRequest(weight_RC, mask_RC, pattern, sparsity)], stat)[0]

    @abstractmethod
    def solve_batched(
        self, wanted: Sequence[PruneRequest], stat: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Matrices that share their input, such as query, key and value; each gets what it would get alone.

        Returns: for each, (R, C) the new weight, of the old one's dtype and device, +0.0 wherever the mask is False;
            and (R, C) bool, the mask. Inputs are untouched.

        Raises:
            ValueError: what is asked is not for this solver.
        """


def output_energy(weight_RC: torch.Tensor, gram: GramMatrix) -> float:
    """tr(W G Wᵀ): the sum of squares of all outputs over the tokens that `gram` has seen. Of a change of weights it is
    the error that the change makes; divide by that of the weights for the relative one. Costs R·C² products.

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
