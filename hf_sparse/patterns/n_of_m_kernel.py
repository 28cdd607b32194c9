"""Exact N:M masks: keep the N highest scores of every M adjacent ones.

    keep(i)  <=>  #{j: score_j beats score_i} < N        j beats i: higher, or equal and later

The M² comparisons of a group are M - 1 comparisons of the flat scores with themselves, shifted by 1, ..., M - 1,
without strides or gathers. Where a shift crosses into the next group a periodic mask discards the result.

Shapes: G groups, M units of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import local
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..kernels import has_kernels
from ..numerics import chunk_size, prefers_numpy


Array = np.ndarray | torch.Tensor

_MAX_CHUNK = 4_194_304  # units: a layout holds M arrays of this length, and several layouts are cached


def keep_n_of_m(scores_GM: torch.Tensor, keep: int) -> torch.Tensor:
    """Returns the mask that keeps the `keep` highest units of each group; ties are pruned from the lowest index.

    Args:
        scores_GM: (G, M) scores without NaN.
        keep: 0..M.

    Returns:
        (G, M) bool with exactly `keep` True in each row.

    Raises:
        ValueError: `keep` is not in 0..M.

    Example:
        >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]]), 2)
        tensor([[False,  True, False,  True],
                [False, False,  True,  True]])
    """
    groups, of = scores_GM.shape
    if not 0 <= keep <= of:
        raise ValueError(f"keep must be in 0..{of}, the units of a group, but is {keep}")
    if has_kernels(scores_GM.device) and scores_GM.numel():
        from ..kernels import n_of_m

        return n_of_m.keep_n_of_m(scores_GM.detach().contiguous(), keep)
    keep_GM = torch.empty(groups, of, dtype=torch.bool, device=scores_GM.device)
    if not keep_GM.numel():
        return keep_GM
    step = max(1, min(chunk_size(scores_GM.device), _MAX_CHUNK) // of)
    # numpy and torch name these operations alike; numpy's comparisons are several times faster on CPUs
    library = np if prefers_numpy(scores_GM.device) else torch
    size = min(step, 1 << (groups - 1).bit_length())  # few distinct sizes, so that few layouts are cached
    layout = _group_layout(size, of, scores_GM.device, library)
    for start in range(0, groups, step):
        scores: Any = scores_GM[start : start + step].detach().reshape(-1)
        kept: Any = keep_GM[start : start + step].view(-1)
        if library is np:
            scores, kept = scores.numpy(), kept.numpy()
        library.greater_equal(_num_beaten(scores, layout, library), of - keep, out=kept)
    return keep_GM


@dataclass(frozen=True)
class _GroupLayout:
    """Of flat groups: the number of later units in each unit's group, and, for each shift, whether the unit `shift`
    positions later is in the same group."""

    followers: Array
    within: list[Array]


@lru_cache(maxsize=16)
def _group_layout(groups: int, of: int, device: torch.device, library: ModuleType) -> _GroupLayout:
    position = torch.arange(of, device=device)
    dtype = torch.uint8 if of <= 256 else torch.int32
    arrays: list[Any] = [(of - 1 - position).to(dtype).repeat(groups)]
    arrays += [(position + shift < of).to(dtype).repeat(groups) for shift in range(1, of)]
    if library is np:
        arrays = [array.numpy() for array in arrays]
    return _GroupLayout(arrays[0], arrays[1:])


def _num_beaten(scores: Array, layout: _GroupLayout, library: ModuleType) -> Array:
    """Returns how many units of its group each of the flat scores beats."""
    followers = layout.followers[: len(scores)]
    wins, spare, higher = (part[: len(scores)] for part in _workspace(followers, library))
    wins[...] = followers
    for shift, within in enumerate(layout.within, start=1):
        count = len(scores) - shift
        # The later unit beats the earlier unless it is lower; then the earlier loses one of its initial wins.
        later = library.less_equal(scores[:-shift], scores[shift:], out=higher[:count])
        later = library.multiply(later, within[:count], out=spare[:count])
        library.add(wins[shift:], later, out=wins[shift:])
        library.subtract(wins[:-shift], later, out=wins[:-shift])
    return wins


_workspaces = local()


def _workspace(like: Array, library: ModuleType) -> tuple:
    """Returns three buffers of at least `like`'s length, on CPUs reused by the next call of the thread: allocating
    memory would cost as much as the comparisons."""
    if isinstance(like, torch.Tensor):
        return torch.empty_like(like), torch.empty_like(like), torch.empty_like(like, dtype=torch.bool)
    buffers = getattr(_workspaces, "buffers", None)
    if buffers is None or len(buffers[0]) < len(like) or buffers[0].dtype != like.dtype:
        buffers = np.empty_like(like), np.empty_like(like), np.empty_like(like, dtype=bool)
        _workspaces.buffers = buffers
    return buffers
