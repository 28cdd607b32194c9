"""Base class of second-order criteria: scores and updates by a damped empirical Fisher matrix of blocks of inputs.

Shapes: M gradients, R output rows, P kernel positions, C inputs of a matrix; N blocks of B inputs of a row, which hold
U units of W inputs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .base import GradientHistoryCriterion


DTYPES = ("bfloat16", "float32")
_CPU_NUMBERS, _ACCELERATOR_NUMBERS = 2**19, 2**25
"""Kept numbers at a time. Parts of a weight are padded to as many, so that rounding does not depend on what a rank
holds."""


@dataclass(frozen=True)
class FisherBlocks:
    """F = Gᵀ·G + λ of some blocks, in which pruned weights are independent of all others.

    Args:
        gradients_NMB: G, float32, 0 where a weight is pruned.
        damping_N: λ, in the dtype to compute with: float64 (float32 on MPS, which has no float64).
    """

    gradients_NMB: torch.Tensor
    damping_N: torch.Tensor

    def restricted(self, kept_NB: torch.Tensor) -> FisherBlocks:
        """Returns F as if all others were pruned."""
        return replace(self, gradients_NMB=self.gradients_NMB * kept_NB[:, None, :])

    def times_gradients(self, vector_NB: torch.Tensor) -> torch.Tensor:
        """Returns G·v, (N, M)."""
        return torch.bmm(self.gradients_NMB.to(vector_NB.dtype), vector_NB[:, :, None]).squeeze(2)

    def sum_gradients(self, vector_NM: torch.Tensor) -> torch.Tensor:
        """Returns Gᵀ·v, (N, B)."""
        return torch.bmm(vector_NM[:, None, :], self.gradients_NMB.to(vector_NM.dtype)).squeeze(1)


@dataclass(frozen=True)
class BlockFisherCriterion(GradientHistoryCriterion):
    """w²/(2·[F⁻¹]_ii): the rise of the loss when a weight is removed and the others of its block adapt to that.

    F is the sum of g·gᵀ over the last gradients g of the kept weights of a block of adjacent inputs of a row, plus
    `dampening` times the mean of its diagonal: relative, so that the scale of the loss changes no mask. The weights Q
    of a unit that lie in one row are scored together, w_Qᵀ·[F⁻¹]_QQ⁻¹·w_Q / 2, and rows by themselves. Then the
    weights that a prune step leaves in a block are updated by -F⁻¹_:Q·[F⁻¹]_QQ⁻¹·w_Q for all that it prunes there (Q):
    the least rise of the quadratic model ΔwᵀFΔw/2. A subclass computes F⁻¹.

    Args:
        block_size: largest number of inputs in a block; None for whole rows.
        num_gradients: how many gradients F is the sum of. Kept for each weight are as many numbers of 2 bytes (4 with
            dtype="float32"), also in checkpoints.
        dampening: multiple of the mean diagonal of a block that is added to its diagonal: the less, the more gradients
            are needed.
        update: whether the remaining weights are updated.
        dtype: of the kept gradients, bfloat16 or float32.
    """

    block_size: int | None = None
    num_gradients: int = 64
    dampening: float = 1.0
    update: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("block_size", "num_gradients"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"`{name}` is {number}: it must be at least 1, as in 50")
        if not 0 < self.dampening < math.inf:
            raise ValueError(f"`dampening` is {self.dampening}: it must be above 0, as in 1.0")
        if self.dtype not in DTYPES:
            raise ValueError(f'`dtype` is "{self.dtype}": it must be {" or ".join(DTYPES)}')

    @abstractmethod
    def inverse_of_units(self, fisher: FisherBlocks, width: int) -> torch.Tensor:
        """Returns [F⁻¹]_QQ of each unit Q of `width` inputs, (N, U, W, W)."""

    @abstractmethod
    def solve(self, fisher: FisherBlocks, vector_NM: torch.Tensor) -> torch.Tensor:
        """Returns F⁻¹·Gᵀ·v for a vector v of each block, (N, B)."""

    @property
    def updates_weights(self) -> bool:
        return self.update

    def block_columns(self, columns: int, width: int) -> int:
        """As equal as possible, and with whole units, unless a unit is the whole row."""
        balanced = -(-columns // -(-columns // (self.block_size or columns)))
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
        scores = torch.zeros(weight_RPC.shape, dtype=torch.float32, device=weight_RPC.device)
        for rows, count in self._row_chunks(weight_RPC, block) if gradients else ():
            kept_NB = _blocks(kept_RPC[rows], block, count)
            fisher, observed_N = self._fisher_blocks(gradients, rows, kept_NB)
            weight_NB = _blocks(weight_RPC[rows].detach(), block, count).to(fisher.damping_N.dtype) * kept_NB
            if width == block:
                moved_NB = fisher.sum_gradients(fisher.times_gradients(weight_NB))
                score_NB = weight_NB * (moved_NB + fisher.damping_N[:, None] * weight_NB)
            elif width == 1:
                score_NB = weight_NB.square() / self.inverse_of_units(fisher, 1).flatten(1)
            else:
                weight_NUW1 = weight_NB.unflatten(1, (-1, width)).unsqueeze(3)
                solved = torch.linalg.solve(self.inverse_of_units(fisher, width), weight_NUW1)
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
        # With S the weights that remain, -F⁻¹_SQ·[F⁻¹]_QQ⁻¹·w_Q = F_SS⁻¹·F_SQ·w_Q, and F_SQ = G_Sᵀ·G_Q.
        change = torch.zeros(weight_RPC.shape, dtype=torch.float32, device=weight_RPC.device)
        for rows, count in self._row_chunks(weight_RPC, block) if gradients else ():
            before_NB, after_NB = _blocks(before_RPC[rows], block, count), _blocks(kept_RPC[rows], block, count)
            pruned_NB = before_NB & ~after_NB
            if not bool(pruned_NB.any()):
                continue
            fisher, _ = self._fisher_blocks(gradients, rows, before_NB)
            weight_NB = _blocks(weight_RPC[rows].detach(), block, count).to(fisher.damping_N.dtype)
            moved_NM = fisher.times_gradients(weight_NB * pruned_NB)
            left_NB = before_NB & after_NB
            change_NB = self.solve(fisher.restricted(left_NB), moved_NM) * left_NB
            change[rows] = _rows(change_NB.float(), change[rows].shape)
        return change

    def _fisher_blocks(
        self, gradients: Sequence[torch.Tensor], rows: slice, kept_NB: torch.Tensor
    ) -> tuple[FisherBlocks, torch.Tensor]:
        """Returns F of the kept weights of some rows, and which blocks have a gradient that is not zero (N)."""
        dtype = torch.float32 if kept_NB.device.type == "mps" else torch.float64
        count, block = kept_NB.shape
        parts = [_blocks(gradient[rows], block, count) for gradient in gradients]
        gradients_NMB = torch.stack(parts, dim=1).float() * kept_NB[:, None, :]
        mean_N = torch.linalg.vector_norm(gradients_NMB, dim=(1, 2)).to(dtype).square() / kept_NB.sum(1).clamp(min=1)
        observed_N = mean_N > 0
        return FisherBlocks(gradients_NMB, torch.where(observed_N, self.dampening * mean_N, 1.0)), observed_N

    def _row_chunks(self, weight_RPC: torch.Tensor, block: int) -> Iterator[tuple[slice, int]]:
        """Yields slices of rows, and how many blocks those are padded to."""
        rows, positions, columns = weight_RPC.shape
        blocks = positions * -(-columns // block)
        numbers = _CPU_NUMBERS if weight_RPC.device.type == "cpu" else _ACCELERATOR_NUMBERS
        step = max(1, numbers // max(1, blocks * block * max(64, self.num_gradients)))
        for first in range(0, rows if blocks else 0, step):
            yield slice(first, min(rows, first + step)), step * blocks


def cholesky(matrices_NKK: torch.Tensor) -> torch.Tensor:
    """Returns lower triangular factors. Rounding can make a matrix with little damping indefinite: then more is added,
    as little as suffices."""
    factors, failed = torch.linalg.cholesky_ex(matrices_NKK)
    rise = 1e-7
    while bool(failed.any()) and rise <= 1:
        mean_N = matrices_NKK.diagonal(dim1=1, dim2=2).mean(1)
        extra = torch.diag_embed((torch.where(failed > 0, rise, 0.0) * mean_N)[:, None].expand(matrices_NKK.shape[:2]))
        factors, failed = torch.linalg.cholesky_ex(matrices_NKK + extra)
        rise *= 10
    return factors


def unit_products(rows_NKB: torch.Tensor, width: int) -> torch.Tensor:
    """Returns A_Qᵀ·A_Q for the columns Q of each unit of each matrix A, (N, U, W, W)."""
    if width == 1:
        return torch.linalg.vector_norm(rows_NKB, dim=1).square()[:, :, None, None]
    units_NUKW = rows_NKB.unflatten(2, (-1, width)).transpose(1, 2)
    return units_NUKW.transpose(2, 3) @ units_NUKW


def _blocks(part_RPC: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Returns the blocks of some rows (count, block): the last one of each row, and the last ones, are padded with
    zeros."""
    rows, positions, columns = part_RPC.shape
    width = -(-columns // block) * block
    padded = part_RPC.new_zeros((count * block // (positions * width), positions, width))
    padded[:rows, :, :columns] = part_RPC
    return padded.view(count, block)


def _rows(blocks_NB: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns the entries of blocks as rows (R, P, C), without the padding of `_blocks`."""
    rows, positions, columns = shape
    width = -(-columns // blocks_NB.shape[1]) * blocks_NB.shape[1]
    return blocks_NB.reshape(-1)[: rows * positions * width].view(rows, positions, width)[:, :, :columns]
