"""L1."""

from dataclasses import dataclass

import torch

from .base import Penalty, register_penalty


@register_penalty("l1")
@dataclass(frozen=True)
class L1(Penalty):
    """sum |w|: draws single weights to zero, whatever the pattern. Its gradient is the strength times the sign.

    Args:
        strength: factor of the term, positive.
        warmup: optimizer steps, or a fraction of training below 1, over which the strength increases from 0.
        until_prune_end: whether the strength is 0 after the last prune step.

    Example:
        >>> L1().coefficients(torch.tensor([0.0, 0.5, 2.0]), size=1)
        tensor([0.0000, 2.0000, 0.5000])

    Reference: Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    """

    by_unit = False

    def value(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        return norms.clone()

    def slope(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        return torch.ones_like(norms)
