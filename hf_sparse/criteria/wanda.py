"""Wanda: pruning by weights and activations."""

from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from .base import Criterion, register_criterion


@register_criterion("wanda")
@dataclass(frozen=True)
class Wanda(Criterion):
    """|w_ij|·‖x_j‖₂, with the norm of input feature j over all tokens of the calibration data.

    The paper ranks within each output (scope "row"). One-shot pruning only: training does not observe inputs.

    Example:
        >>> weight, norms = torch.tensor([[4.0, -1.0], [2.0, 0.5]]), torch.tensor([0.5, 8.0])
        >>> Wanda().score(weight, norms)
        tensor([[2., 8.],
                [1., 4.]])

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, eq. 1.
    """

    requires = Requires.INPUT_NORMS
    default_scope = "row"

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return weight.detach().float().abs() * statistic
