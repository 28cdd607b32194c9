"""SNIP with momentum."""

from dataclasses import dataclass

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("snip_momentum")
@dataclass(frozen=True)
class SnipMomentum(GradientCriterion):
    """s <- decay·s + |w·g| over all steps: connection sensitivity, averaged over about 1 / (1 - decay) steps.

    Args:
        decay: weight of the earlier steps, from 0 to 1.

    Example:
        >>> import torch
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> SnipMomentum().saliency(weight, gradient, torch.empty(3))
        tensor([0.5000, 1.0000, 3.0000])

    Reference: Lee et al., "SNIP", 2019; the momentum form is the default of Intel Neural Compressor's pytorch_pruner.
    """

    decay: float = 0.9

    persistent = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"`decay` is {self.decay}: it must be from 0 to 1, as in 0.9")

    saliency = ProductSaliency(weighted=True, function="abs")
