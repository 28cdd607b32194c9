"""oBERT: second-order pruning with a block-diagonal empirical Fisher matrix.

Shapes: M gradients, R output rows, P kernel positions, C inputs of a matrix; N blocks of B inputs of a row, which hold
units of W inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import GradientHistoryCriterion, register_criterion


DTYPES = ("bfloat16", "float32")
_CPU_BLOCKS, _ACCELERATOR_BLOCKS = 256, 8192
"""Blocks at a time. Parts of a weight are padded to as many, so that rounding does not depend on what a rank holds."""


@register_criterion("obert")
@dataclass(frozen=True)
class OBert(GradientHistoryCriterion):
    """w²/(2·[F⁻¹]_ii): the rise of the loss when a weight is removed and the others of its block adapt to that.

    F is the sum of g·gᵀ over the last gradients g of the kept weights of a block of adjacent inputs of a row, plus
    `dampening` times the mean of its diagonal. The weights Q of a unit that lie in one row are scored together,
    w_Qᵀ·[F⁻¹]_QQ⁻¹·w_Q / 2, and rows by themselves. Then the weights that a prune step leaves in a block are updated
    by -F⁻¹_:Q·[F⁻¹]_QQ⁻¹·w_Q for all that it prunes there (Q): the least rise of the quadratic model ΔwᵀFΔw/2.

    Kept for each weight are `num_gradients` numbers of 2 bytes (4 with dtype="float32"), also in checkpoints; a step
    costs one copy of the gradients. Sums of g·gᵀ would take 200 bytes, and two hundred times as long in each step. A
    prune step takes 1.1 to 1.6 s for each million weights on one CPU core: use few, as with prune_every=0.1.

    Args:
        block_size: largest number of inputs in a block.
        num_gradients: how many gradients F is the sum of.
        dampening: multiple of the mean diagonal of a block that is added to its diagonal, above 0: the less, the more
            gradients are needed.
        update: whether the remaining weights are updated.
        dtype: of the kept gradients, bfloat16 or float32.

    Example:
        >>> obert, weight = OBert(dampening=1e-6), torch.tensor([[[1.0, 2.0]]])
        >>> gradients, kept = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])], weight > 0
        >>> obert.weight_scores(weight, kept, gradients, block=2, width=1)  # F = [[2, 1], [1, 1]]
        tensor([[[0.5000, 1.0000]]])
        >>> obert.weight_change(weight, kept, torch.tensor([[[False, True]]]), gradients, block=2).round(decimals=3)
        tensor([[[0., 1.]]])

    Reference: Kurtic et al., "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language
    Models", 2022. The damping of the paper is absolute; here it is relative, so that the scale of the loss changes no
    mask.
    """

    block_size: int = 50
    num_gradients: int = 64
    dampening: float = 1.0
    update: bool = True
    dtype: str = "bfloat16"

    default_scope: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        for name in ("block_size", "num_gradients"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1, as in 50")
        if not 0 < self.dampening < math.inf:
            raise ValueError(f"dampening is {self.dampening}: it must be above 0, as in 1.0")
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype is "{self.dtype}": it must be {" or ".join(DTYPES)}')

    @property
    def updates_weights(self) -> bool:
        return self.update

    def block_columns(self, columns: int, width: int) -> int:
        """As equal as possible, and with whole units, unless a unit is the whole row.

        Example:
            >>> OBert().block_columns(384, width=1), OBert().block_columns(384, width=4)
            (48, 48)
        """
        balanced = -(-columns // -(-columns // self.block_size))
        return balanced if width == columns else -(-balanced // width) * width

    def weight_scores(
        self,
        weight_RPC: torch.Tensor,
        kept_RPC: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        block: int,
        width: int,
    ) -> torch.Tensor:
        width = min(width, block)
        scores = torch.empty(weight_RPC.shape, dtype=torch.float32, device=weight_RPC.device)
        for rows, count in _row_chunks(weight_RPC, block):
            kept_NB = _blocks(kept_RPC[rows], block, count)
            fisher_NBB, observed_N = self._damped_fisher(_gradient_blocks(gradients, rows, block, count), kept_NB)
            weight_NB = _blocks(weight_RPC[rows].detach(), block, count).to(fisher_NBB.dtype) * kept_NB
            if width == block:
                score_NB = weight_NB * (fisher_NBB @ weight_NB[:, :, None]).squeeze(2)
            elif width == 1:
                score_NB = weight_NB.square() / _inverse_factor(fisher_NBB).square().sum(1)
            else:
                inverse_NBB = _inverse_factor(fisher_NBB)
                units_NUBW = inverse_NBB.unflatten(2, (-1, width)).transpose(1, 2)
                weight_NUW1 = weight_NB.unflatten(1, (-1, width)).unsqueeze(3)
                solved = torch.linalg.solve(units_NUBW.transpose(2, 3) @ units_NUBW, weight_NUW1)
                score_NB = (weight_NUW1 * solved).flatten(1)
            score_NB = torch.where(observed_N[:, None], score_NB, 0.0) / 2
            scores[rows] = _rows(score_NB.float(), scores[rows].shape)
        return scores

    def weight_change(
        self,
        weight_RPC: torch.Tensor,
        before_RPC: torch.Tensor,
        kept_RPC: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        block: int,
    ) -> torch.Tensor:
        # With S the weights that remain, -F⁻¹_SQ·[F⁻¹]_QQ⁻¹·w_Q = F_SS⁻¹·F_SQ·w_Q.
        change = torch.zeros(weight_RPC.shape, dtype=torch.float32, device=weight_RPC.device)
        for rows, count in _row_chunks(weight_RPC, block):
            before_NB, after_NB = _blocks(before_RPC[rows], block, count), _blocks(kept_RPC[rows], block, count)
            pruned_NB = before_NB & ~after_NB
            if not bool(pruned_NB.any()):
                continue
            fisher_NBB, _ = self._damped_fisher(_gradient_blocks(gradients, rows, block, count), before_NB)
            weight_NB = _blocks(weight_RPC[rows].detach(), block, count).to(fisher_NBB.dtype)
            left_NB = before_NB & after_NB
            moved_NB1 = (fisher_NBB @ (weight_NB * pruned_NB)[:, :, None]) * left_NB[:, :, None]
            between_NBB = left_NB[:, :, None] & left_NB[:, None, :]
            between_NBB.diagonal(dim1=1, dim2=2).fill_(True)
            factor_NBB = _cholesky(torch.where(between_NBB, fisher_NBB, 0.0))
            change_NB = torch.cholesky_solve(moved_NB1, factor_NBB).squeeze(2) * left_NB
            change[rows] = _rows(change_NB.float(), change[rows].shape)
        return change

    def _damped_fisher(self, gradients_NMB: torch.Tensor, kept_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns F of each block (N, B, B), in which pruned weights are independent of all others, and which blocks
        have a gradient that is not zero (N)."""
        kept_gradients = gradients_NMB * kept_NB[:, None, :]
        fisher_NBB = torch.bmm(kept_gradients.transpose(1, 2), kept_gradients).to(_solving_dtype(kept_NB.device))
        diagonal_NB = fisher_NBB.diagonal(dim1=1, dim2=2)
        mean_N = diagonal_NB.sum(1) / kept_NB.sum(1).clamp(min=1)
        observed_N = mean_N > 0
        diagonal_NB += torch.where(observed_N, self.dampening * mean_N, 1.0)[:, None]
        return fisher_NBB, observed_N


def _solving_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _cholesky(matrices_NBB: torch.Tensor) -> torch.Tensor:
    """Returns lower triangular factors. Rounding can make a matrix with little damping indefinite: then more is added,
    as little as suffices."""
    factors, failed = torch.linalg.cholesky_ex(matrices_NBB)
    rise = 1e-7
    while bool(failed.any()) and rise <= 1:
        mean_N = matrices_NBB.diagonal(dim1=1, dim2=2).mean(1)
        extra = torch.diag_embed((torch.where(failed > 0, rise, 0.0) * mean_N)[:, None].expand(matrices_NBB.shape[:2]))
        factors, failed = torch.linalg.cholesky_ex(matrices_NBB + extra)
        rise *= 10
    return factors


def _inverse_factor(matrices_NBB: torch.Tensor) -> torch.Tensor:
    """Returns L⁻¹ of each matrix L·Lᵀ, whose inverse is (L⁻¹)ᵀ·L⁻¹."""
    factors = _cholesky(matrices_NBB)
    identity = torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device)
    return torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)


def _row_chunks(weight_RPC: torch.Tensor, block: int) -> Iterator[tuple[slice, int]]:
    """Yields slices of rows, and how many blocks those are padded to."""
    rows, positions, columns = weight_RPC.shape
    blocks = positions * -(-columns // block)
    step = max(1, (_CPU_BLOCKS if weight_RPC.device.type == "cpu" else _ACCELERATOR_BLOCKS) // max(1, blocks))
    for first in range(0, rows if blocks else 0, step):
        yield slice(first, min(rows, first + step)), step * blocks


def _blocks(part_RPC: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Returns the blocks of some rows (count, block): the last one of each row, and the last ones, are padded with
    zeros."""
    rows, positions, columns = part_RPC.shape
    width = -(-columns // block) * block
    padded = part_RPC.new_zeros((count * block // (positions * width), positions, width))
    padded[:rows, :, :columns] = part_RPC
    return padded.view(count, block)


def _gradient_blocks(gradients: Sequence[torch.Tensor], rows: slice, block: int, count: int) -> torch.Tensor:
    """Returns the blocks of all gradients of some rows (count, M, block), float32."""
    return torch.stack([_blocks(gradient[rows], block, count) for gradient in gradients], dim=1).float()


def _rows(blocks_NB: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns the entries of blocks as rows (R, P, C), without the padding of `_blocks`."""
    rows, positions, columns = shape
    width = -(-columns // blocks_NB.shape[1]) * blocks_NB.shape[1]
    return blocks_NB.reshape(-1)[: rows * positions * width].view(rows, positions, width)[:, :, :columns]
