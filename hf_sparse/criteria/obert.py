"""oBERT: second-order pruning with a block-diagonal empirical Fisher matrix.

Shapes: M gradients; N blocks of B inputs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import register_criterion
from .block_fisher import BlockFisherCriterion, FisherBlocks, cholesky, unit_products


@register_criterion("obert")
@dataclass(frozen=True)
class OBert(BlockFisherCriterion):
    """w²/(2·[F⁻¹]_ii): the rise of the loss when a weight is removed and the others of its block adapt to that.

    F is the sum of g·gᵀ over the last gradients g of the kept weights of a block of adjacent inputs of a row, plus
    `dampening` times the mean of its diagonal. The weights Q of a unit that lie in one row are scored together,
    w_Qᵀ·[F⁻¹]_QQ⁻¹·w_Q / 2, and rows by themselves. Then the weights that a prune step leaves in a block are updated
    by -F⁻¹_:Q·[F⁻¹]_QQ⁻¹·w_Q for all that it prunes there (Q): the least rise of the quadratic model ΔwᵀFΔw/2.

    Kept for each weight are `num_gradients` numbers of 2 bytes (4 with dtype="float32"), also in checkpoints; a step
    costs one copy of the gradients. Sums of g·gᵀ would take 200 bytes, and two hundred times as long in each step. A
    prune step takes 1.6 to 2.3 s for each million weights on one CPU core: use few, as with prune_every=0.1.

    Args:
        block_size: largest number of inputs in a block.

    Example:
        >>> obert, weight = OBert(dampening=1e-6), torch.tensor([[[1.0, 2.0]]])
        >>> gradients, kept = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])], weight > 0
        >>> obert.weight_scores(weight, kept, gradients, block=2, width=1)  # F = [[2, 1], [1, 1]]
        tensor([[[0.5000, 1.0000]]])
        >>> obert.weight_change(weight, kept, torch.tensor([[[False, True]]]), gradients, block=2).round(decimals=3)
        tensor([[[0., 1.]]])
        >>> obert.block_columns(384, width=1), obert.block_columns(384, width=4)
        (48, 48)

    Reference: Kurtic et al., "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language
    Models", 2022. The damping of the paper is absolute; here it is relative, so that the scale of the loss changes no
    mask.
    """

    block_size: int = 50

    default_scope: ClassVar[str] = "global"

    def inverse_of_units(self, fisher: FisherBlocks, width: int) -> torch.Tensor:
        factor_NBB = cholesky(_matrices(fisher))
        identity = torch.eye(factor_NBB.shape[1], dtype=factor_NBB.dtype, device=factor_NBB.device)
        # F⁻¹ = (L⁻¹)ᵀ·L⁻¹ for F = L·Lᵀ.
        inverse_factor_NBB = torch.linalg.solve_triangular(factor_NBB, identity.expand_as(factor_NBB), upper=False)
        return unit_products(inverse_factor_NBB, width)

    def solve(self, fisher: FisherBlocks, vector_NM: torch.Tensor) -> torch.Tensor:
        right_NB = fisher.sum_gradients(vector_NM)
        return torch.cholesky_solve(right_NB[:, :, None], cholesky(_matrices(fisher))).squeeze(2)


def _matrices(fisher: FisherBlocks) -> torch.Tensor:
    """Returns F of each block, (N, B, B)."""
    matrices_NBB = torch.bmm(fisher.gradients_NMB.transpose(1, 2), fisher.gradients_NMB).to(fisher.damping_N.dtype)
    matrices_NBB.diagonal(dim1=1, dim2=2).add_(fisher.damping_N[:, None])
    return matrices_NBB
