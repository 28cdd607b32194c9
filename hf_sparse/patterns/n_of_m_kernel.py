"""Keep N of every M neighbours.

    keep(i)  <=>  #{j: score_j beats score_i} < N        j beats i: higher, or equal and later

A group's M^2 comparisons are M - 1 comparisons of the flat scores with themselves, shifted by 1, ..., M - 1: no pass
has strides or gathers. Where a shift crosses into the next group a periodic mask drops the result.

Shapes: G groups, M units of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import local
from types import ModuleType

import numpy as np
import torch

from ..numerics import chunk_size, prefers_numpy


_MAX_PATTERN = 4_194_304  # units per chunk: patterns hold M arrays of this length, and several of them are cached


def keep_n_of_m(scores_GM: torch.Tensor, keep: int) -> torch.Tensor:
    """Keeps the `keep` highest units of each group; of equal ones the lower index falls first.

    Args:
        scores_GM: (G, M) scores without NaN.
        keep: 0..M.

    Returns: (G, M) bool with exactly `keep` True in each row.

    Raises: ValueError if `keep` is not in 0..M.

    >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]]), 2)
    tensor([[False,  True, False,  True],
            [False, False,  True,  True]])
    """
    groups, of = scores_GM.shape
    if not 0 <= keep <= of:
        raise ValueError(f"keep must be in 0..{of}, the units of a group, but is {keep}")
    keep_GM = torch.empty(groups, of, dtype=torch.bool, device=scores_GM.device)
    if not keep_GM.numel():
        return keep_GM
    step = max(1, min(chunk_size(scores_GM.device), _MAX_PATTERN) // of)
    # the two have these operations under the same names; on CPUs numpy's comparisons are several times faster
    library = np if prefers_numpy(scores_GM.device) else torch
    size = min(step, 1 << (groups - 1).bit_length())  # few sizes, so that few patterns are held
    pattern = _pattern(size, of, scores_GM.device, library)
    for start in range(0, groups, step):
        scores = scores_GM[start : start + step].detach().reshape(-1)
        kept = keep_GM[start : start + step].view(-1)
        if library is np:
            scores, kept = scores.numpy(), kept.numpy()
        library.greater_equal(_wins(scores, pattern, library), of - keep, out=kept)
    return keep_GM


@dataclass(frozen=True)
class _Pattern:
    """Of flat groups: how many units of the group follow each, and whether the one `shift` places on is among them."""

    followers: np.ndarray | torch.Tensor
    within: list[np.ndarray | torch.Tensor]


@lru_cache(maxsize=16)
def _pattern(groups: int, of: int, device: torch.device, library: ModuleType) -> _Pattern:
    place = torch.arange(of, device=device)
    dtype = torch.uint8 if of <= 256 else torch.int32
    arrays = [(of - 1 - place).to(dtype).repeat(groups)]
    arrays += [(place + shift < of).to(dtype).repeat(groups) for shift in range(1, of)]
    if library is np:
        arrays = [array.numpy() for array in arrays]
    return _Pattern(arrays[0], arrays[1:])


def _wins(scores: np.ndarray | torch.Tensor, pattern: _Pattern, library: ModuleType) -> np.ndarray | torch.Tensor:
    """How many units of its group each of the flat scores beats."""
    followers = pattern.followers[: len(scores)]
    wins, spare, higher = (part[: len(scores)] for part in _workspace(followers, library))
    wins[...] = followers
    for shift, within in enumerate(pattern.within, start=1):
        count = len(scores) - shift
        # the later one wins unless it is lower; the earlier one has one less then of the wins it began with
        later = library.less_equal(scores[:-shift], scores[shift:], out=higher[:count])
        later = library.multiply(later, within[:count], out=spare[:count])
        library.add(wins[shift:], later, out=wins[shift:])
        library.subtract(wins[:-shift], later, out=wins[:-shift])
    return wins


_workspaces = local()


def _workspace(like: np.ndarray | torch.Tensor, library: ModuleType) -> tuple:
    """Three buffers of at least `like`'s length, kept for the thread's next call: fresh memory costs as much as the
    comparisons do. Only on CPUs, whose chunks are small."""
    if library is torch:
        return torch.empty_like(like), torch.empty_like(like), torch.empty_like(like, dtype=torch.bool)
    held = getattr(_workspaces, "held", None)
    if held is None or len(held[0]) < len(like) or held[0].dtype != like.dtype:
        held = np.empty_like(like), np.empty_like(like), np.empty_like(like, dtype=bool)
        _workspaces.held = held
    return held
