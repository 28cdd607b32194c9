"""Learned N:M masks: a categorical distribution over the masks of each group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch

from ..patterns import Pattern
from .base import register_algorithm
from .learned_mask import MaskContext, Theta
from .sampled_mask import SampledMask


_MAX_CANDIDATES = 128
"""Masks of one group, such as the 70 of 4:8: each has a logit, and Adam keeps two numbers more of it."""


@register_algorithm("gumbel_nm")
@dataclass(frozen=True)
class GumbelNM(SampledMask):
    r"""Trains logits l_i of the C(M, N) masks M_i of each group; steps compute with a relaxed sample of a mask, and
    the final one is the most likely.

        w = W * sum_i p_i M_i,   p = softmax((kappa l + g) / tau),   g_i = -log(-log u_i),   u_i uniform in (0, 1)
        l_i = prior_strength * (<M_0, M_i> - N^2 / M) at the start, for the mask M_0 of the prior

    Nothing else trains before the last prune step: the model is frozen, and holds the samples w, which have no exact
    zeros. Afterwards what is kept trains as usual; with prune_end=0.9999 there is no afterwards. kappa and l are on
    the scale of the paper's for logits of standard deviation 0.01: its kappa is 100 to 500, and learning rates are a
    hundredth of ours. Memory, for each weight of 2:4: its dense value, two numbers of logits, and four of Adam.
    Options are those of `SampledMask`.

    Example:
        >>> from hf_sparse.patterns.n_of_m import NOfM
        >>> mask = torch.tensor([[[True, False, False, True]]])
        >>> context = SimpleNamespace(pattern=NOfM(2, 4))
        >>> theta = GumbelNM().init(torch.ones(1, 1, 4), mask, context)
        >>> candidate_logits(theta, NOfM(2, 4))  # of the masks 1100, 1010, 1001, 0110, 0101, 0011
        tensor([[[[ 0.,  0.,  3., -3.,  0.,  0.]]]])
        >>> GumbelNM().scores(theta, torch.ones(1, 1, 4), context)
        tensor([[[1., 0., 0., 1.]]])

    Reference: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", 2024.
    """

    needs_whole_units: ClassVar[bool] = True

    def init(self, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> Theta:
        keep, of = context.pattern.n_of_m
        candidates = candidate_masks(context.pattern, dense)
        overlaps = mask.unflatten(-1, (-1, of)).to(dense.dtype) @ candidates.T
        logits = self.prior_strength * (overlaps - keep * keep / of)
        # Tensors of the weight's shape, which are split and saved like it: the last one may have entries to spare.
        spare = -logits.shape[-1] % of
        parts = torch.nn.functional.pad(logits, (0, spare)).unflatten(-1, (-1, of)).unbind(-2)
        return {f"logits{index:02}": part.reshape(dense.shape).clone() for index, part in enumerate(parts)}

    def weight(self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> torch.Tensor:
        pattern = context.pattern
        logits = candidate_logits(theta, pattern)
        noise = {f"noise{index:02}": context.noise(index).to(dense.dtype) for index in range(len(theta))}
        gumbel = -torch.log(-torch.log(candidate_logits(noise, pattern)))
        shares = torch.softmax((self.scale(context) * logits + gumbel) / self.temperature(context), dim=-1)
        return dense * (shares @ candidate_masks(pattern, dense)).flatten(-2)

    def scores(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor:
        best = candidate_logits(theta, context.pattern).argmax(-1)
        return candidate_masks(context.pattern, dense)[best].flatten(-2)

    def metrics(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> Mapping[str, torch.Tensor]:
        """Returns the mean probability of the most likely mask of a group, as it is without noise."""
        logits = candidate_logits(theta, context.pattern)
        most = torch.softmax(self.scale(context) * logits, dim=-1).amax(-1)
        return {"mask_confidence": most.double().sum() * context.pattern.n_of_m[1] / context.num_weights}

    def option_errors(self, options: SimpleNamespace, pattern: Pattern) -> list[str]:
        errors, (keep, of) = super().option_errors(options, pattern), pattern.n_of_m
        count = math.comb(of, keep)
        if not keep:
            errors.append(
                f'`algorithm` "{options.algorithm}" learns N:M masks, not those of `pattern` "{pattern}": use '
                '`pattern="2:4"`, or `algorithm="gumbel_sigmoid"` for single weights.'
            )
        elif count > _MAX_CANDIDATES:
            errors.append(
                f'`algorithm` "{options.algorithm}" has a logit for each of the {count:,} masks of a group of '
                f'`pattern` "{pattern}", and supports up to {_MAX_CANDIDATES}: use a smaller pattern, such as 2:4 or '
                "4:8."
            )
        return errors


def candidate_masks(pattern: Pattern, like: torch.Tensor) -> torch.Tensor:
    """Returns all masks of a group of an N:M pattern, (C(M, N), M) of zeros and ones, of the dtype of `like`.

    Example:
        >>> from hf_sparse.patterns.n_of_m import NOfM
        >>> candidate_masks(NOfM(1, 2), torch.ones(1))
        tensor([[1., 0.],
                [0., 1.]])
    """
    keep, of = pattern.n_of_m
    rows = [[float(index in kept) for index in range(of)] for kept in itertools.combinations(range(of), keep)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def candidate_logits(theta: Theta, pattern: Pattern) -> torch.Tensor:
    """Returns the logits of the masks of each group, (..., C / M, C(M, N)), from tensors (..., C) by name.

    The logits of a group are the entries at its M positions in the first tensor by name, then those in the second, and
    so on.
    """
    keep, of = pattern.n_of_m
    groups = [theta[name].unflatten(-1, (-1, of)) for name in sorted(theta)]
    return torch.cat(groups, dim=-1)[..., : math.comb(of, keep)]
