"""Keep N of every M neighbours.

    keep(i)  <=>  #{j: score_j beats score_i} < N        j beats i: higher, or equal and later

A group's M^2 comparisons are M - 1 comparisons of the flat scores with themselves, shifted by 1, ..., M - 1: no pass
has strides or gathers. Where a shift crosses into the next group a periodic mask drops the result.

Shapes: G groups, M units of a group.
"""

from __future__ import annotations

import numpy as np
import torch


_CHUNK = 131_072  # scores whose temporaries stay in a core's cache
_CHUNK_ON_ACCELERATOR = 16_777_216
_NUMPY_DEVICES = ("cpu",)


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
    on_cpu = scores_GM.device.type == "cpu"
    step = max(1, (_CHUNK if on_cpu else _CHUNK_ON_ACCELERATOR) // of)
    count_wins = _Wins(min(step, groups), of, scores_GM.device)
    for start in range(0, groups, step):
        scores = scores_GM[start : start + step].detach().reshape(-1)
        count_wins(scores, keep_GM[start : start + step].view(-1), at_least=of - keep)
    return keep_GM


class _Wins:
    """Counts, in reused memory, how many units of its group each unit beats."""

    def __init__(self, groups: int, of: int, device: torch.device):
        # the two have these operations under the same names; on CPUs numpy's comparisons are several times faster
        self.library = np if device.type in _NUMPY_DEVICES else torch
        dtype = torch.uint8 if of <= 256 else torch.int32
        place = torch.arange(of, device=device)
        self.of = of
        self.later = self._array((of - 1 - place).to(dtype).repeat(groups))
        self.within = [self._array((place + shift < of).to(dtype).repeat(groups)) for shift in range(1, of)]
        self.higher = self._array(torch.empty(groups * of, dtype=torch.bool, device=device))
        self.beaten = self._array(torch.empty(groups * of, dtype=dtype, device=device))
        self.wins = self._array(torch.empty(groups * of, dtype=dtype, device=device))

    def __call__(self, scores: torch.Tensor, kept: torch.Tensor, at_least: int) -> None:
        """Writes into `kept` which of the flat scores win `at_least` times."""
        library, scores = self.library, self._array(scores)
        wins = self.wins[: len(scores)]
        wins[:] = self.later[: len(scores)]
        for shift, within in enumerate(self.within, start=1):
            count = len(scores) - shift
            # the later one wins unless it is lower, and then the earlier one has one win less of those it began with
            beaten = library.less_equal(scores[:-shift], scores[shift:], out=self.higher[:count])
            beaten = library.multiply(beaten, within[:count], out=self.beaten[:count])
            library.add(wins[shift:], beaten, out=wins[shift:])
            library.subtract(wins[:-shift], beaten, out=wins[:-shift])
        library.greater_equal(wins, at_least, out=self._array(kept))

    def _array(self, tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
        return tensor.numpy() if self.library is np else tensor
