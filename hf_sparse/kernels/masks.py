"""Kernels for masks of many weights: enforcing their zeros, and counting zeros."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl

from .tensor_table import BLOCK, INTEGERS, TensorTable, address, length_of


def enforce_masks(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Sets weights to +0.0 in place where their mask is 0; others do not change, bit for bit.

    Args:
        pairs: contiguous weights of one device, and their int8 masks, -1 where a weight is kept and 0 where it is
            pruned.
    """
    by_size: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in pairs:
        if pair[0].numel():
            by_size.setdefault(pair[0].element_size(), []).append(pair)
    for size, same in by_size.items():
        table = TensorTable(same)
        _enforce[table.grid](table.data, INTEGERS[size], table.aligned, BLOCK)


@triton.jit
def _enforce(table, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    weight = address(table, 0, 2, dtype, aligned)
    bits = address(table, 1, 2, tl.int8, aligned)
    length = length_of(table, 2, aligned)
    places = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        inside = places < length - start
        kept = tl.load(bits + start + places, mask=inside, other=0).to(dtype)  # sign extension: all bits or none
        values = tl.load(weight + start + places, mask=inside, other=0)
        tl.store(weight + start + places, values & kept, mask=inside)


def count_zeros_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the number of zeros (-0.0 too) of each tensor, int64 on their device.

    Args:
        tensors: contiguous, of one device, of integer or floating dtypes.
    """
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    by_size: dict[tuple[int, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            by_size.setdefault((tensor.element_size(), tensor.is_floating_point()), []).append(index)
    for (size, is_floating), same in by_size.items():
        table = TensorTable([(tensors[index],) for index in same])
        found = torch.zeros(len(same), dtype=torch.int64, device=counts.device)
        _count_zeros[table.grid](table.data, found, INTEGERS[size], int(is_floating), table.aligned, BLOCK)
        if len(same) == len(tensors):
            return found
        counts[same] = found
    return counts


@triton.jit
def _count_zeros(
    table, counts, dtype: tl.constexpr, sign_bits: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    tensor = address(table, 0, 1, dtype, aligned)
    length = length_of(table, 1, aligned)
    places = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        values = tl.load(tensor + start + places, mask=places < length - start, other=1)
        zeros += ((values << sign_bits) == 0).to(tl.int32)
    tl.atomic_add(counts + tl.program_id(1), tl.sum(zeros, 0).to(tl.int64), sem="relaxed")
