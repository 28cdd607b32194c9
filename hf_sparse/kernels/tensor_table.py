"""Tables of tensors in device memory, so that one launch of a kernel processes tensors of many sizes.

Row l of a table has the number of entries of the l-th tensor of each column, and their addresses. A launch has the
same number of programs for each row; program p of P processes the blocks p, p + P, p + 2P, ... of its row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


BLOCK = 2048
"""Entries that a program processes at a time."""
_PROGRAMS = 4096  # of a launch, about: several for each multiprocessor

INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""Signed integers by their size in bytes."""
FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""Floating dtypes that kernels read."""


class TensorTable:
    """Tensors of the same device, in columns of the same dtypes.

    Args:
        rows: (L) tensors, contiguous and with the same number of entries in each row.
        numbers: (L) further numbers of each row.

    Attributes:
        data: (L, 1 + columns) int64 on the device: number of entries, addresses, further numbers.
        aligned: whether addresses and numbers of entries are multiples of 16, so that accesses can be 16 bytes wide.
        lengths: (L) numbers of entries.
    """

    def __init__(self, rows: Sequence[Sequence[torch.Tensor]], numbers: Sequence[Sequence[int]] = ()):
        self.lengths = [row[0].numel() for row in rows]
        data = [[length, *(each.data_ptr() for each in row)] for length, row in zip(self.lengths, rows, strict=True)]
        self.aligned = all(number % 16 == 0 for row in data for number in row)
        for row, more in zip(data, numbers):
            row.extend(more)
        self.data = to_device(torch.tensor(data, dtype=torch.int64), rows[0][0].device)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs for each row, rows."""
        blocks = -(-max(self.lengths) // BLOCK)
        return max(1, min(blocks, -(-_PROGRAMS // len(self.lengths)))), len(self.lengths)


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a small tensor to a device, without waiting for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


@triton.jit
def address(table, column: tl.constexpr, columns: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """Returns the address of the tensor in a column of this program's row."""
    pointer = tl.load(table + tl.program_id(1) * (columns + 1) + column + 1).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def number(table, column: tl.constexpr, columns: tl.constexpr):
    """Returns the number in a column of this program's row."""
    return tl.load(table + tl.program_id(1) * (columns + 1) + column + 1)


@triton.jit
def length_of(table, columns: tl.constexpr, aligned: tl.constexpr):
    """Returns the number of entries of this program's row."""
    length = tl.load(table + tl.program_id(1) * (columns + 1))
    if aligned:
        length = tl.multiple_of(length, 16)
    return length
