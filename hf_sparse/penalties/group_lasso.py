"""Group lasso."""

import math
from dataclasses import dataclass

import torch

from .base import Penalty, register_penalty


@register_penalty("group_lasso")
@dataclass(frozen=True)
class GroupLasso(Penalty):
    """sum_u sqrt(n_u)·||w_u||: draws whole units to zero, which then can be pruned at little cost.

    A unit is what the pattern prunes as one: a block, a row, a column, and of neurons, heads and layers all slices of
    weights together (no biases). Where units are single weights, as with N:M, this is `l1`. The gradient of a weight
    is about as large as the strength, whatever the size of the unit.

    Args:
        strength: factor of the term, positive.
        warmup: optimizer steps, or a fraction of training below 1, over which the strength increases from 0.
        until_prune_end: whether the strength is 0 after the last prune step.

    Example:
        >>> norms = torch.tensor([0.0, 2.0])
        >>> GroupLasso().value(norms, size=4), GroupLasso().coefficients(norms, size=4)
        (tensor([0., 4.]), tensor([0., 1.]))

    Reference: Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006; Wen et al.,
    "Learning Structured Sparsity in Deep Neural Networks", 2016.
    """

    def value(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        return norms * math.sqrt(size)

    def slope(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        return torch.full_like(norms, math.sqrt(size))
