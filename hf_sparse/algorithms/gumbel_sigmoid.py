"""Learned masks of single weights: a probability to be kept for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import torch

from ..patterns import Pattern
from .base import register_algorithm
from .learned_mask import MaskContext, Theta
from .sampled_mask import SampledMask


_FIXED_POINT = 1 << 20
"""Probabilities are summed up as multiples of its inverse, so that sums depend on no order."""


@register_algorithm("gumbel_sigmoid")
@dataclass(frozen=True)
class GumbelSigmoid(SampledMask):
    r"""Trains a logit l of each weight; steps compute with a relaxed sample of a mask that keeps it with probability
    sigmoid(kappa l), and the final mask keeps the highest logits.

        w = W * sigmoid((kappa l + log u - log(1 - u)) / tau),   u uniform in (0, 1)
        l = prior_strength at the start, or -prior_strength where the prior is zero
        loss += density_weight * n * (D - (1 - target))^2,   D = mean sigmoid(kappa l) over the n competing weights

    The density term holds the expected share D of kept weights at its target, so that the final mask differs little
    from the samples. The weights of a layer compete, or with scope global those of all layers. Nothing else trains
    before the last prune step: the model is frozen, and holds the samples w, which have no exact zeros. Afterwards
    what is kept trains as usual; with prune_end=0.9999 there is no afterwards. Memory, for each weight: its dense
    value, the logit, and two numbers of Adam. The other options are those of `SampledMask`.

    Args:
        density_weight: of the density term.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> GumbelSigmoid().init(torch.ones(1, 1, 2), mask, None)
        {'logits': tensor([[[ 3., -3.]]])}

    Reference: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018; for the relaxation
    Maddison et al., "The Concrete Distribution", 2017; for the prior Fang et al., "MaskLLM", 2024.
    """

    density_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.density_weight < math.inf):
            raise ValueError(f"`density_weight` is {self.density_weight}: it must be positive, as in 0.1.")

    def init(self, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> Theta:
        return {"logits": (2 * mask.to(dense.dtype) - 1) * self.prior_strength}

    def weight(self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> torch.Tensor:
        uniform = context.noise(0).to(dense.dtype)
        noise = torch.log(uniform) - torch.log1p(-uniform)
        return dense * torch.sigmoid((self.scale(context) * theta["logits"] + noise) / self.temperature(context))

    def totals(self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> torch.Tensor:
        kept = torch.sigmoid(self.scale(context) * theta["logits"])
        count = torch.tensor(kept.numel(), device=kept.device)
        return torch.stack([(kept.double() * _FIXED_POINT).round().long().sum(), count])

    def density(self, context: MaskContext) -> torch.Tensor:
        """Returns D: the expected share of kept weights among those that compete (a float64 scalar)."""
        kept, count = cast(torch.Tensor, context.totals).double().unbind()
        return kept / _FIXED_POINT / count

    def penalty(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> torch.Tensor | None:
        norm = super().penalty(theta, dense, mask, context)
        excess = self.density(context) - (1 - context.target)
        # Linear in this part's probabilities: n (D - d)^2 has the gradient 2 (D - d) with respect to each of them.
        kept = torch.sigmoid(self.scale(context) * theta["logits"])
        density = (2 * self.density_weight * excess).to(kept.dtype) * kept.sum()
        return density if norm is None else density + norm

    def scores(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor:
        return theta["logits"].detach().float()

    def metrics(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> Mapping[str, torch.Tensor]:
        """Returns the expected share of kept weights."""
        kept = torch.sigmoid(self.scale(context) * theta["logits"])
        return {"mask_density": kept.double().sum() / context.num_weights}

    def option_errors(self, options: SimpleNamespace, pattern: Pattern) -> list[str]:
        errors = super().option_errors(options, pattern)
        if not pattern.flat:
            errors.append(
                f'`algorithm` "{options.algorithm}" learns masks of single weights, not of `pattern` "{pattern}": use '
                '`pattern="unstructured"`, or `algorithm="gumbel_nm"` for an N:M pattern.'
            )
        return errors
