"""Numerical helpers that choose the faster library, and chunk sizes."""

from __future__ import annotations

import numpy as np
import torch


def count_zeros(tensor: torch.Tensor) -> int:
    """How many entries of `tensor` are exactly zero."""
    # Counting in floats branches at each, several times slower where half of them are zero.
    zeros = array(tensor.detach() == 0)
    return int(np.count_nonzero(zeros) if isinstance(zeros, np.ndarray) else torch.count_nonzero(zeros))


NUMPY_DEVICES = ("cpu",)  # where numpy's comparisons and partition are several times faster than torch's


def array(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    """The same memory in the library that is faster on its device."""
    return tensor.numpy() if tensor.device.type in NUMPY_DEVICES else tensor


# A chunk and its masks stay in a core's cache. It holds whole groups of every size up to 10, of 12 to 16 and of 32.
CHUNK = 262_080


CHUNK_ON_ACCELERATOR = 64 * CHUNK  # there, launching a kernel costs more than memory
