"""The faster of numpy and torch for a device, and the sizes of the chunks that large tensors are processed in."""

from __future__ import annotations

import numpy as np
import torch


NUMPY_DEVICES = ("cpu",)
"""Device types where numpy's comparisons and partition are several times faster than torch's."""

CPU_CHUNK = 262_080
"""Elements per chunk on CPUs: temporaries of this size stay in a core's cache.

A multiple of every N:M group size up to 10, from 12 to 16, and of 32, so that chunks do not split groups.
"""

ACCELERATOR_CHUNK = 64 * CPU_CHUNK
"""Elements per chunk on accelerators, where launching a kernel costs more than memory traffic."""


def chunk_size(device: torch.device) -> int:
    """Returns the number of elements to process at a time on `device`."""
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def prefers_numpy(device: torch.device) -> bool:
    """Whether tensors on `device` are compared and partitioned faster by numpy."""
    return device.type in NUMPY_DEVICES


def as_fastest_array(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    """Returns the tensor, or a numpy view of its memory where `prefers_numpy` holds."""
    return tensor.numpy() if prefers_numpy(tensor.device) else tensor


def count_zeros(tensor: torch.Tensor) -> int:
    """Returns the number of entries that are exactly zero (+0.0 or -0.0).

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1e-30]))
        2
    """
    # Counting in floating point branches at each entry: several times slower at 50% zeros than counting a mask.
    is_zero = as_fastest_array(tensor.detach() == 0)
    return int(np.count_nonzero(is_zero) if isinstance(is_zero, np.ndarray) else torch.count_nonzero(is_zero))
