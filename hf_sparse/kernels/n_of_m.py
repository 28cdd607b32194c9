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
    kernel = _keep_in_registers if of == 4 else _keep_n_of_m
    kernel[grid](scores_GM, kept_GM, groups, keep, of, block)
    return kept_GM


@triton.jit
def is_kept(scores, keep: tl.constexpr, of: tl.constexpr, BLOCK: tl.constexpr):
    """Returns which of a block of scores are among the `keep` highest of their group; `of` is a power of two."""
    if of == 4:
        k0, k1, k2, k3 = _are_kept_of_four(scores, keep, BLOCK)
        kept = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK,))
    else:
        groups = tl.reshape(scores, (BLOCK // of, of))
        index = tl.arange(0, of)
        is_later = index[None, None, :] > index[None, :, None]
        is_ahead = groups[:, None, :] > groups[:, :, None]
        is_ahead |= (groups[:, None, :] == groups[:, :, None]) & is_later
        kept = tl.reshape(tl.sum(is_ahead.to(tl.int32), 2) < keep, (BLOCK,))
    return kept


@triton.jit
def _are_kept_of_four(scores, keep, BLOCK: tl.constexpr):
    """Compares registers: a group is loaded by one thread."""
    even, odd = tl.split(tl.reshape(scores, (BLOCK // 4, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    # The later of equal scores is ahead.
    a01, a02, a03 = (s1 >= s0).to(tl.int32), (s2 >= s0).to(tl.int32), (s3 >= s0).to(tl.int32)
    a12, a13, a23 = (s2 >= s1).to(tl.int32), (s3 >= s1).to(tl.int32), (s3 >= s2).to(tl.int32)
    k0, k1 = a01 + a02 + a03 < keep, 1 - a01 + a12 + a13 < keep
    k2, k3 = 2 - a02 - a12 + a23 < keep, 3 - a03 - a13 - a23 < keep
    return k0, k1, k2, k3


@triton.jit
def _keep_in_registers(scores, kept, groups, keep, of: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < groups * of - first
    dtype: tl.constexpr = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    score = tl.load(scores + first + place, mask=inside, other=0).to(dtype)
    k0, k1, k2, k3 = _are_kept_of_four(score, keep, BLOCK)
    word = k0.to(tl.int32) | k1.to(tl.int32) << 8 | k2.to(tl.int32) << 16 | k3.to(tl.int32) << 24
    group = tl.arange(0, BLOCK // 4)
    words = (kept + first).to(tl.pointer_type(tl.int32))
    tl.store(words + group, word, mask=group < groups - first // 4)


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
