"""The kernel for N:M masks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


_BLOCK = 1024  # units of a program, about


def keep_n_of_m(scores_GM: torch.Tensor, keep: int) -> torch.Tensor:
    """Returns the mask (G, M) that keeps the `keep` highest scores of each group, the later of equal ones.

    Args:
        scores_GM: (G, M) contiguous, of any floating dtype.
        keep: 0..M.
    """
    groups, of = scores_GM.shape
    kept_GM = torch.empty(groups, of, dtype=torch.bool, device=scores_GM.device)
    block = max(_BLOCK, triton.next_power_of_2(of))
    grid = (-(-groups // (block // of)),)
    _keep_n_of_m[grid](scores_GM, kept_GM, groups, keep, of, block)
    return kept_GM


@triton.jit
def _keep_n_of_m(scores, kept, groups, keep, of: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK // of)  # group
    scores += first * of
    kept += first * of
    place = tl.arange(0, BLOCK)
    inside = (place < (groups - first) * of) & (place < BLOCK // of * of)
    index = place % of  # in its group
    dtype: tl.constexpr = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    score = tl.load(scores + place, mask=inside, other=0).to(dtype)
    num_ahead = tl.zeros((BLOCK,), dtype=tl.int32)
    for shift in range(1, of):
        other_index = (index + shift) % of
        other = tl.load(scores + place - index + other_index, mask=inside, other=0).to(dtype)
        num_ahead += ((other > score) | ((other == score) & (other_index > index))).to(tl.int32)
    tl.store(kept + place, num_ahead < keep, mask=inside)
