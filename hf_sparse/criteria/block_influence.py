"""Block influence: how much a transformer layer changes its input."""

from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from .base import Criterion, register_criterion


@register_criterion("block_influence")
@dataclass(frozen=True)
class BlockInfluence(Criterion):
    """1 - cos(x, y), the mean over all tokens of the calibration data, of a block with input x and output y.

    One-shot pruning of whole layers only (pattern "layer").

    Example:
        >>> BlockInfluence().score(torch.zeros(2, 2), torch.tensor(0.25))
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])

    Reference: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, eq. 1.
    """

    requires = Requires.BLOCK_INFLUENCES

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return statistic.detach().float().expand(weight.shape).clone()
