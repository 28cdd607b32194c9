"""The faster of numpy and torch for a device, and the sizes of the chunks that large tensors are processed in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


NUMPY_DEVICES = ("cpu",)
"""Device types where numpy's comparisons and partition are several times faster than torch's."""

CPU_CHUNK = 262_080
"""Elements per chunk on CPUs: temporaries of this size stay in a core's cache.

A multiple of every N:M group size up to 10, from 12 to 16, and of 32, so that chunks do not split groups.
"""

ACCELERATOR_CHUNK = 65 * CPU_CHUNK
"""Elements per chunk on accelerators, where launching a kernel costs more than memory traffic: a whole matrix of 2^24,
as of 2048 x 8192."""

BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
"""The same-sized integer of each floating dtype."""


def chunk_size(device: torch.device) -> int:
    """Returns the number of elements to process at a time on `device`."""
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def prefers_numpy(device: torch.device) -> bool:
    """Whether tensors on `device` are compared and partitioned faster by numpy."""
    return device.type in NUMPY_DEVICES


def as_fastest_array(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    """Returns the tensor, or a numpy view of its memory where `prefers_numpy` holds."""
    return tensor.numpy() if prefers_numpy(tensor.device) else tensor


def divide(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """Returns `tensor / number`, rounded alike on all devices: CUDA multiplies by the rounded reciprocal of a Python
    number.

    Example:
        >>> divide(torch.tensor([1.0, 2.0]), 4)
        tensor([0.2500, 0.5000])
    """
    return tensor / torch.full((), number, dtype=tensor.dtype, device=tensor.device)


def gather_counts(counts: Sequence[int | torch.Tensor]) -> np.ndarray:
    """Returns counts as int64. Those in tensors of an accelerator are read together, which waits for it once.

    Example:
        >>> gather_counts([2, torch.tensor(3)])
        array([2, 3])
    """
    tensors = [count for count in counts if isinstance(count, torch.Tensor)]
    values = iter(torch.stack([count.to(tensors[0].device) for count in tensors]).tolist() if tensors else ())
    return np.array([next(values) if isinstance(count, torch.Tensor) else count for count in counts], dtype=np.int64)


def count_zeros(tensor: torch.Tensor) -> int:
    """Returns the number of entries that are exactly zero (+0.0 or -0.0).

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1e-30]))
        2
    """
    return int(count_true(tensor.detach() == 0))


def count_true(mask: torch.Tensor) -> int | torch.Tensor:
    """Returns the number of True entries, for `gather_counts`.

    Counting zeros of a floating-point array branches at each entry: several times slower than counting a mask.
    """
    array = as_fastest_array(mask)
    return int(np.count_nonzero(array)) if isinstance(array, np.ndarray) else torch.count_nonzero(array)


# Odd 64-bit constants of the splitmix64 finalizer, as signed numbers.
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def hash_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Returns a hash of each number, int64, the same on every device.

    Reference: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    bits = numbers.clone()
    for shift, factor in zip((30, 27), _MIX, strict=True):
        bits = (bits ^ _logical_right_shift(bits, shift)) * factor
    return bits ^ _logical_right_shift(bits, 31)


def hash_uniform(numbers: torch.Tensor) -> torch.Tensor:
    """Returns a hash of each number (int64) as float32, uniform in [0, 1), in steps of 2^-24.

    Example:
        >>> 0.49 < hash_uniform(torch.arange(10_000)).mean() < 0.51
        tensor(True)
    """
    return _logical_right_shift(hash_bits(numbers), 40).to(torch.float32) / 2**24


def _logical_right_shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


def keep_where_(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sets the entries of a tensor to +0.0 in place where a mask (bool) is False, whatever they hold; on CPUs several
    times faster than `masked_fill_` and a multiplication.

    Example:
        >>> keep_where_(torch.tensor([-1.0, float("nan")]), torch.tensor([True, False]))
        tensor([-1.,  0.])
    """
    tensor.view(BITS[tensor.dtype]).bitwise_and_(mask.view(torch.int8).neg())
    return tensor
