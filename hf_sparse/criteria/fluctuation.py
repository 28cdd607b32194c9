"""Fluctuation: pruning inputs that a bias can replace."""

from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from .base import Criterion, register_criterion


@register_criterion("fluctuation")
@dataclass(frozen=True)
class Fluctuation(Criterion):
    """w_ij²·Var(x_j), with the variance of input feature j over the tokens of the calibration data.

    Summed over a column it is the squared error that is left when the column is pruned and its mean contribution is
    added to the bias. Each token is weighted by 1/‖y‖², y being the layer's output. One-shot pruning only.

    Example:
        >>> weight, variances = torch.tensor([[4.0, -1.0], [2.0, 0.5]]), torch.tensor([0.5, 8.0])
        >>> Fluctuation().score(weight, variances)
        tensor([[8., 8.],
                [2., 2.]])

    Reference: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, eq. 5.
    """

    requires = Requires.INPUT_VARIANCES
    default_scope = "layer"

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return weight.detach().float().square() * statistic
