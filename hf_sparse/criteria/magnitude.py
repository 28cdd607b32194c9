"""Weight magnitude."""

from dataclasses import dataclass

import torch

from .base import Criterion, register_criterion


@register_criterion("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """|w|.

    Example:
        >>> Magnitude().score(torch.tensor([0.5, -2.0, 0.0]), None)
        tensor([0.5000, 2.0000, 0.0000])

    Reference: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """

    def score(self, weight: torch.Tensor, statistic: torch.Tensor | None) -> torch.Tensor:
        return weight.detach().float().abs()
