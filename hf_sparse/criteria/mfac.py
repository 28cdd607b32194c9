"""M-FAC: second-order pruning by the inverse of a low-rank Fisher matrix of whole rows.

Shapes: M gradients; N blocks of B inputs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import register_criterion
from .block_fisher import BlockFisherCriterion, FisherBlocks, cholesky, unit_products


LEAST_DAMPENING = 1e-8
"""Scores subtract nearly equal numbers where the damping is little: their error is 1e-16 * inputs / dampening."""


@register_criterion("mfac")
@dataclass(frozen=True)
class MFAC(BlockFisherCriterion):
    """w²/(2·[F⁻¹]_ii), as `obert`, with F of whole rows, whose inverse is computed from the M gradients it is made of:

        F = λ + Gᵀ·G,   F⁻¹ = (1 - Gᵀ·K⁻¹·G) / λ,   K = λ + G·Gᵀ (M x M)

    G (M x inputs) are the last gradients of the kept weights of a row, and λ is `dampening` times the mean diagonal of
    Gᵀ·G. The weights Q of a unit that lie in one row are scored together, w_Qᵀ·[F⁻¹]_QQ⁻¹·w_Q / 2. The weights S that
    a prune step leaves in a row are updated by -F⁻¹_SQ·[F⁻¹]_QQ⁻¹·w_Q = G_Sᵀ·(λ + G_S·G_Sᵀ)⁻¹·G_Q·w_Q for all that it
    prunes there (Q): the least rise of the quadratic model ΔwᵀFΔw/2.

    In the paper a block is a whole weight, or thousands of adjacent entries of it. Here it lies within a row, so that
    nothing is summed over ranks, and masks are those of one process on any number of them. The paper adds up the
    updates of single weights, each as if it alone was pruned; for several, the rise is then not the least. Its damping
    is absolute.

    Kept for each weight are `num_gradients` numbers of 2 bytes (4 with dtype="float32"), also in checkpoints; a step
    costs one copy of the gradients. A prune step takes 1.8 to 2.4 s for each million weights on one CPU core, with 256
    gradients 17 s: use few, as with prune_every=0.1.

    Args:
        block_size: largest number of inputs in a block; None for whole rows.

    Example:
        >>> mfac, weight = MFAC(dampening=1e-6), torch.tensor([[[1.0, 2.0]]])
        >>> gradients, kept = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])], weight > 0
        >>> mfac.weight_scores(weight, kept, gradients, block=2, width=1)  # F = [[2, 1], [1, 1]]
        tensor([[[0.5000, 1.0000]]])
        >>> mfac.weight_change(weight, kept, torch.tensor([[[False, True]]]), gradients, block=2).round(decimals=3)
        tensor([[[0., 1.]]])
        >>> mfac.block_columns(384, width=1)
        384

    Reference: Frantar et al., "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", 2021.
    """

    block_size: int | None = None

    default_scope: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dampening < LEAST_DAMPENING:
            raise ValueError(f"`dampening` is {self.dampening}: it must be at least {LEAST_DAMPENING}, as in 1.0")

    def inverse_of_units(self, fisher: FisherBlocks, width: int) -> torch.Tensor:
        # Gᵀ·K⁻¹·G = (L⁻¹·G)ᵀ·(L⁻¹·G) for K = L·Lᵀ.
        gradients_NMB = fisher.gradients_NMB.to(fisher.damping_N.dtype)
        solved_NMB = torch.linalg.solve_triangular(_factors(fisher), gradients_NMB, upper=False)
        identity_WW = torch.eye(width, dtype=solved_NMB.dtype, device=solved_NMB.device)
        return (identity_WW - unit_products(solved_NMB, width)) / fisher.damping_N[:, None, None, None]

    def solve(self, fisher: FisherBlocks, vector_NM: torch.Tensor) -> torch.Tensor:
        # (λ + Gᵀ·G)⁻¹·Gᵀ = Gᵀ·(λ + G·Gᵀ)⁻¹
        return fisher.sum_gradients(torch.cholesky_solve(vector_NM[:, :, None], _factors(fisher)).squeeze(2))


def _factors(fisher: FisherBlocks) -> torch.Tensor:
    """Returns the lower triangular factor of K of each block, (N, M, M)."""
    gradients_NMB = fisher.gradients_NMB.to(fisher.damping_N.dtype)
    gram_NMM = torch.bmm(gradients_NMB, gradients_NMB.transpose(1, 2))
    gram_NMM.diagonal(dim1=1, dim2=2).add_(fisher.damping_N[:, None])
    return cholesky(gram_NMM)
