"""Which pruned units return: the highest of a score, as the most important ones of a criterion are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..criteria import Criterion
from ..criteria.random_scores import Random
from ..requires import Requires


@dataclass(frozen=True)
class LargestGradient(Criterion):
    """|g|, where the statistic is the gradient g of the loss with respect to the weight.

    Example:
        >>> LargestGradient().score(torch.zeros(2), torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """

    requires = Requires.GRADIENTS

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return statistic.detach().float().abs()


@dataclass(frozen=True)
class RandomGrowth(Criterion):
    """A hash of the weight's position and of the prune step, uniform in [0, 1): equal on every rank and device.

    Args:
        prune_step: of the growth.

    Example:
        >>> first, second = (RandomGrowth(step).score(torch.zeros(1000), torch.arange(1000)) for step in (1, 2))
        >>> bool(((first - second).abs() > 0.5).float().mean() > 0.2)
        True
    """

    prune_step: int

    requires = Requires.POSITION

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        # Steele et al.: successive states of the generator are this odd number apart, modulo 2^64.
        shift = (self.prune_step * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)
        return Random().score(weight, statistic + shift)
