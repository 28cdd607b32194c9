"""Triton kernels for CUDA, where torch would need many kernels or much memory.

Each function here computes, bit for bit, what torch code computes elsewhere. `has_kernels` decides which of both runs:
without Triton, or where it cannot compile, torch does. Triton comes with builds of torch for CUDA, and is imported
when the first CUDA tensor is pruned.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch


KERNEL_DEVICES = ("cuda",)
"""Device types that kernels run on. Tests add the CPU, where Triton's interpreter runs them."""


GROUP_SIZES = (2, 4, 8)
"""Values of M for which kernels compute the scores of N:M: powers of two, so that no group lies in two blocks."""


class StoredScores(NamedTuple):
    """Scores that kernels read, or compute, where they are: the entries of a tensor, float32.

    Args:
        tensor: contiguous, of any floating dtype.
        magnitude: whether the scores are the magnitudes of the entries.
        mask_bits: contiguous, int8: where it is 0 the score is -inf. None if there is no mask.
        n_of_m: (N, M), if the scores of the N highest of every M adjacent entries are +inf instead, the later of equal
            ones, unless they are masked or NaN. M is one of `GROUP_SIZES`.
    """

    tensor: torch.Tensor
    magnitude: bool = False
    mask_bits: torch.Tensor | None = None
    n_of_m: tuple[int, int] = (0, 1)


logger = logging.getLogger(__name__)


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of this room run on `device`. On CUDA it must be the current device, which Triton launches
    on."""
    if device.type not in KERNEL_DEVICES:
        return False
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return False
    return _can_run(device)


@lru_cache(maxsize=16)
def _can_run(device: torch.device) -> bool:
    """Runs a small kernel. Besides Triton itself, a C compiler may be missing, or the GPU may be too old."""
    try:
        from .masks import enforce_masks

        weight = torch.ones(2, device=device)
        enforce_masks([(weight, torch.tensor([-1, 0], dtype=torch.int8, device=device))])
        works = weight.tolist() == [1.0, 0.0]
    except Exception as error:  # whatever a compiler raises: there is another way
        logger.warning("Triton kernels do not run on %s; slower torch code is used instead: %s", device, error)
        works = False
    return works
