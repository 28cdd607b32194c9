"""The kernel for masks that prune the lowest units of every row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


MAX_UNITS = 16_384
"""Units of a row that one program holds."""


def keep_mask_by_row(scores_RU: torch.Tensor, k_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mask that prunes exactly the k lowest units of each row, the first by position of equal ones, and a
    tensor that says whether any score is NaN.

    Args:
        scores_RU: (R, U) float32, contiguous, U up to `MAX_UNITS`.
        k_R: (R) int64 on the same device, from 0 to U.
    """
    rows, units = scores_RU.shape
    kept_RU = torch.empty(rows, units, dtype=torch.bool, device=scores_RU.device)
    num_nan = torch.zeros(1, dtype=torch.int32, device=scores_RU.device)
    block = triton.next_power_of_2(units)
    warps = max(1, min(16, block // 512))
    _keep_by_row[(rows,)](scores_RU, k_R, kept_RU, num_nan, units, block, num_warps=warps)
    return kept_RU, num_nan[0] > 0


@triton.jit
def _keep_by_row(scores, k, kept, num_nan, units, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < units
    score = tl.load(scores + row * units + place, mask=inside, other=0.0)
    nan = tl.sum((score != score).to(tl.int32), 0)
    if nan > 0:
        tl.atomic_add(num_nan, nan, sem="relaxed")
    count = tl.load(k + row)
    word = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # one key for 0.0 and -0.0
    key = (word ^ ((word >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648  # from 0, in the order of scores
    # The k-th lowest key is the largest that fewer than k are below, found bit by bit.
    value = tl.full((), 0, dtype=tl.int64)
    for step in range(32):
        candidate = value | (tl.full((), 1, dtype=tl.int64) << (31 - step))
        below = tl.sum((inside & (key < candidate)).to(tl.int32), 0)
        value = tl.where(below < count, candidate, value)
    below = tl.sum((inside & (key < value)).to(tl.int32), 0)
    is_tie = inside & (key == value)
    rank = tl.cumsum(is_tie.to(tl.int32), 0)
    tl.store(kept + row * units + place, (key > value) | (is_tie & (rank > count - below)), mask=inside)
