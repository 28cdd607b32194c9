"""Optimal Brain Surgeon on whole units: greedy removal by the error that the best update leaves.

Shapes: R output rows, I inputs; U units of K adjacent inputs each.
"""

from dataclasses import dataclass

import torch

from ..requires import Requires
from .base import UnitCriterion, register_criterion


@register_criterion("obs")
@dataclass(frozen=True)
class OptimalBrainSurgeon(UnitCriterion):
    """Removes the units of the smallest error one after the other, the remaining columns of the matrix always updated:

        error_u = tr(W_u·(H^-1_uu)^-1·W_u^T)    W <- W - W_u·(H^-1_uu)^-1·H^-1_u:    H = G + ridge · mean diag(G)·I

    A unit's score is the largest error of those removed up to it, so that scores have the order of removal. Beyond
    what solver lstsq costs it takes an inverse, and about two products of matrices of that size. One-shot pruning of
    neurons and heads only.

    Args:
        ridge: damping of H, above 0 and at most 1.
        columns_at_once: columns that are removed before errors are computed anew; of a wider unit all.

    Example:
        >>> gram = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> scores = OptimalBrainSurgeon(columns_at_once=1).score_units(torch.tensor([[0.9, 1.0, 0.8]]), gram, 1)
        >>> scores.argsort()  # input 1 can take over from input 0, but then nothing from input 1
        tensor([0, 2, 1])

    Reference: Kurtić et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, algorithm 1.
    """

    ridge: float = 0.01
    columns_at_once: int = 16

    requires = Requires.GRAM

    def __post_init__(self) -> None:
        if not 0 < self.ridge <= 1:
            raise ValueError(f"`ridge` is {self.ridge}: it must be above 0 and at most 1, as in 0.01")
        if self.columns_at_once < 1:
            raise ValueError(f"`columns_at_once` is {self.columns_at_once}: it must be 1 or more, as in 16")

    def score_units(
        self, weight_RI: torch.Tensor, gram_II: torch.Tensor, width: int, count: int | None = None
    ) -> torch.Tensor:
        num_units = weight_RI.shape[1] // width
        weight_RI = weight_RI.detach().to(gram_II.device, torch.float32, copy=True)
        weight_RI[:, gram_II.diagonal() == 0] = 0.0  # weights of dead inputs have no effect
        inverse_II = _damped_inverse(gram_II, self.ridge)
        scores_U = torch.full((num_units,), torch.inf, device=gram_II.device)
        alive_U = torch.ones(num_units, dtype=torch.bool, device=gram_II.device)
        at_once, largest = max(1, self.columns_at_once // width), torch.zeros((), device=gram_II.device)
        left = num_units if count is None else min(count, num_units)
        while left:
            errors_U = _errors(weight_RI, inverse_II, width).masked_fill_(~alive_U, torch.inf)
            errors, units = errors_U.topk(min(at_once, left), largest=False)
            scores_U[units] = errors.clamp(min=largest)
            alive_U[units] = False
            # The error of a later unit may be smaller; its score may not, nor may it be the same.
            largest = scores_U[units[-1]].nextafter(torch.full_like(largest, torch.inf))
            left -= len(units)
            if left:
                _remove(weight_RI, inverse_II, (units[:, None] * width + _range(width, units)).reshape(-1))
        return scores_U


def _range(width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(width, device=like.device)


def _damped_inverse(gram_II: torch.Tensor, ridge: float) -> torch.Tensor:
    """The inverse of H. Where rounding makes H indefinite, the ridge is raised tenfold until it is not."""
    mean = gram_II.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1.0)
    while True:
        damped = gram_II.clone()
        damped.diagonal().add_(ridge * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_inverse(lower)
        if ridge >= 1:
            raise ValueError("the Gram matrix is not positive definite with any damping: check the calibration data")
        ridge = min(1.0, 10 * ridge)


def _errors(weight_RI: torch.Tensor, inverse_II: torch.Tensor, width: int) -> torch.Tensor:
    """Returns (U) the error of removing each unit alone."""
    if width == 1:
        return weight_RI.square().sum(0) / inverse_II.diagonal()
    num_units = weight_RI.shape[1] // width
    diagonal_UKK = inverse_II.view(num_units, width, num_units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    units_URK = weight_RI.view(-1, num_units, width).transpose(0, 1)
    return (units_URK.transpose(1, 2) @ units_URK * torch.linalg.inv(diagonal_UKK)).sum((1, 2))


def _remove(weight_RI: torch.Tensor, inverse_II: torch.Tensor, columns: torch.Tensor) -> None:
    """Removes columns, in place: the others take the best update. Removed columns are 0, with a 1 in the diagonal."""
    rows_KI = inverse_II[columns]
    factor_KI = torch.linalg.solve(rows_KI[:, columns], rows_KI)
    weight_RI.addmm_(weight_RI[:, columns], factor_KI, alpha=-1)
    inverse_II.addmm_(rows_KI.t(), factor_KI, alpha=-1)
    weight_RI[:, columns] = 0.0
    inverse_II[columns] = 0.0
    inverse_II[:, columns] = 0.0
    inverse_II[columns, columns] = 1.0
