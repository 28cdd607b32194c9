"""Kernels for scores that are stored in tensors: histograms of them, and the masks that thresholds give.

A score has an integer key, whose order is that of the scores: the bits of its float32, of a negative number with the
31 lower bits inverted. The scores of 16-bit tensors need only the upper bits of the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from . import StoredScores
from .n_of_m import is_kept
from .tensor_table import BLOCK, FLOATS, TensorTable, address, length_of, number, to_device


ALL_TIES = 1 << 62
"""More ties than any tensor has."""


def sample_lengths(lengths: Sequence[int], stride: int) -> list[int]:
    """Returns how many entries of tensors of these lengths `count_keys` reads with a stride."""
    counts = []
    for length in lengths:
        last = (-(-length // BLOCK) - 1) // stride * stride  # the last block that is read
        counts.append(-(-last // stride) * BLOCK + min(BLOCK, length - last * BLOCK) if length else 0)
    return counts


def count_keys(
    scores: Sequence[StoredScores],
    indices: Sequence[int],
    ranges: torch.Tensor,
    counts: torch.Tensor,
    dropped_bits: int,
    stride: int = 1,
) -> None:
    """Adds the scores of each tensor to a histogram of their keys.

    Args:
        scores: of one device.
        indices: for each of them, its row in `ranges` and `counts`.
        ranges: (L, 3) int32, on the device: the lowest and the highest key that are counted, and how many lower bits
            of their difference to the lowest do not matter.
        counts: (L, 2 + buckets) int64, on the device: the number of scores below the range, that of NaN, and the
            histogram.
        dropped_bits: number of lower bits of keys that are left out.
        stride: reads one block of BLOCK entries of every `stride`.
    """
    for table, constants in _tables(scores, [(index,) for index in indices]):
        _count_keys[table.grid](
            table.data, ranges, counts, stride, *constants, dropped_bits, counts.shape[1], table.aligned, BLOCK
        )


def write_masks(scores: Sequence[StoredScores], values: Sequence[float], num_ties: Sequence[int]) -> None:
    """Prunes all scores below a value and the first ones equal to it, by position; pruned weights remain pruned.

    Args:
        scores: of one device, with masks, which are written.
        values: for each of them, the value.
        num_ties: for each of them, how many of those equal to the value are pruned; `ALL_TIES` for all.
    """
    device = scores[0].tensor.device
    values_L = to_device(torch.tensor(values, dtype=torch.float32), device)
    num_ties_L = to_device(torch.tensor(num_ties, dtype=torch.int64), device)
    some = any(0 < count < ALL_TIES for count in num_ties)
    blocks = [-(-stored.tensor.numel() // BLOCK) for stored in scores]
    firsts = [sum(blocks[:index]) for index in range(len(blocks))]
    ties = torch.zeros(sum(blocks) if some else 1, dtype=torch.int32, device=device)
    tables = list(_tables(scores, list(enumerate(firsts))))
    if some:
        for table, constants in tables:
            _count_ties[table.grid](table.data, values_L, ties, *constants, table.aligned, BLOCK)
    before = ties.cumsum(0) - ties  # int64: of all earlier blocks, those of earlier tensors too
    for table, constants in tables:
        _write_masks[table.grid](table.data, values_L, num_ties_L, before, *constants, int(some), table.aligned, BLOCK)


def _tables(scores: Sequence[StoredScores], numbers: Sequence[tuple[int, ...]]) -> Iterator[tuple[TensorTable, tuple]]:
    """Yields a table of tensor, mask and numbers for each kind of scores, and what kernels must know of the kind."""
    kinds: dict[tuple, list[int]] = {}
    for index, stored in enumerate(scores):
        if stored.tensor.numel():
            kind = FLOATS[stored.tensor.dtype], stored.magnitude, stored.mask_bits is not None, *stored.n_of_m
            kinds.setdefault(kind, []).append(index)
    for kind, same in kinds.items():
        rows = [(scores[index].tensor, scores[index].mask_bits) for index in same]
        # Without a mask the tensor takes its place, and is not read twice.
        table = TensorTable(
            [(tensor, tensor if bits is None else bits) for tensor, bits in rows], [numbers[index] for index in same]
        )
        yield table, kind


@triton.jit
def _load_scores(
    tensor,
    bits,
    inside,
    magnitude: tl.constexpr,
    masked: tl.constexpr,
    keep: tl.constexpr,
    of: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.arange(0, BLOCK)
    scores = tl.load(tensor + places, mask=inside, other=0).to(tl.float32)
    if magnitude:
        scores = tl.abs(scores)
    pruned = tl.zeros((BLOCK,), dtype=tl.int1)
    if masked:
        pruned = tl.load(bits + places, mask=inside, other=0) == 0
        scores = tl.where(pruned, float("-inf"), scores)
    if keep:
        protected = is_kept(scores, keep, of, BLOCK) & (scores == scores) & (pruned == 0)
        scores = tl.where(protected, float("inf"), scores)
    return scores


@triton.jit
def _sum_of_four(flags, BLOCK: tl.constexpr):
    """Adds neighbours, which one thread has: fewer registers for sums over the blocks of a program."""
    return tl.sum(tl.reshape(flags.to(tl.int32), (BLOCK // 4, 4)), 1)


@triton.jit
def _add_to_bucket(buckets, key, number, is_counted, low, high, shift):
    bucket = (key - low).to(tl.uint32, bitcast=True) >> shift  # a difference of two int32 may need 32 bits
    is_counted &= (key >= low) & (key <= high)
    tl.atomic_add(buckets + bucket, number.to(tl.int64), mask=is_counted, sem="relaxed")


@triton.jit
def _count_keys(
    table,
    ranges,
    counts,
    stride,
    dtype: tl.constexpr,
    magnitude: tl.constexpr,
    masked: tl.constexpr,
    keep: tl.constexpr,
    of: tl.constexpr,
    dropped_bits: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = address(table, 0, 3, dtype, aligned)
    bits = address(table, 1, 3, tl.int8, aligned)
    length = length_of(table, 3, aligned)
    layer = number(table, 2, 3)
    low = tl.load(ranges + layer * 3)
    high = tl.load(ranges + layer * 3 + 1)
    shift = tl.load(ranges + layer * 3 + 2).to(tl.uint32)
    counts += layer * width
    places = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK // 4,), dtype=tl.int32)
    nan, lowest, zero, highest = below, below, below, below
    ones = tl.full((BLOCK,), 1, dtype=tl.int64)
    for start in range(tl.program_id(0) * BLOCK * stride, length, tl.num_programs(0) * BLOCK * stride):
        inside = places < length - start
        scores = _load_scores(tensor + start, bits + start, inside, magnitude, masked, keep, of, BLOCK)
        word = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # one key for 0.0 and -0.0
        key = (word ^ ((word >> 31) & 0x7FFFFFFF)) >> dropped_bits
        nan += _sum_of_four(inside & (scores != scores), BLOCK)
        below += _sum_of_four(inside & (key < low), BLOCK)
        # Scores of pruned and protected weights, and zeros, are so many that their atomic additions would queue.
        is_lowest, is_zero, is_highest = scores == float("-inf"), scores == 0, scores == float("inf")
        lowest += _sum_of_four(inside & is_lowest, BLOCK)
        zero += _sum_of_four(inside & is_zero, BLOCK)
        highest += _sum_of_four(inside & is_highest, BLOCK)
        rare = inside & ~(is_lowest | is_zero | is_highest)
        _add_to_bucket(counts + 2, key, ones, rare, low, high, shift)
    tl.atomic_add(counts, tl.sum(below, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(nan, 0).to(tl.int64), sem="relaxed")
    minus_infinity = tl.full((), -0x7F800001, dtype=tl.int32) >> dropped_bits
    infinity = tl.full((), 0x7F800000, dtype=tl.int32) >> dropped_bits
    num_lowest, num_zero, num_highest = tl.sum(lowest, 0), tl.sum(zero, 0), tl.sum(highest, 0)
    _add_to_bucket(counts + 2, minus_infinity, num_lowest, num_lowest > 0, low, high, shift)
    _add_to_bucket(counts + 2, tl.full((), 0, dtype=tl.int32), num_zero, num_zero > 0, low, high, shift)
    _add_to_bucket(counts + 2, infinity, num_highest, num_highest > 0, low, high, shift)


@triton.jit
def _count_ties(
    table,
    values,
    ties,
    dtype: tl.constexpr,
    magnitude: tl.constexpr,
    masked: tl.constexpr,
    keep: tl.constexpr,
    of: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = address(table, 0, 4, dtype, aligned)
    bits = address(table, 1, 4, tl.int8, aligned)
    length = length_of(table, 4, aligned)
    value = tl.load(values + number(table, 2, 4))
    ties += number(table, 3, 4)
    places = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        inside = places < length - start
        scores = _load_scores(tensor + start, bits + start, inside, magnitude, masked, keep, of, BLOCK)
        tl.store(ties + start // BLOCK, tl.sum((inside & (scores == value)).to(tl.int32), 0))


@triton.jit
def _write_masks(
    table,
    values,
    num_ties,
    before,
    dtype: tl.constexpr,
    magnitude: tl.constexpr,
    masked: tl.constexpr,
    keep: tl.constexpr,
    of: tl.constexpr,
    some_ties: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = address(table, 0, 4, dtype, aligned)
    bits = address(table, 1, 4, tl.int8, aligned)
    length = length_of(table, 4, aligned)
    value = tl.load(values + number(table, 2, 4))
    pruned_ties = tl.load(num_ties + number(table, 2, 4))
    if some_ties:
        before += number(table, 3, 4)
        first = tl.load(before)
    places = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        inside = places < length - start
        scores = _load_scores(tensor + start, bits + start, inside, magnitude, masked, keep, of, BLOCK)
        is_tie = inside & (scores == value)
        if some_ties:
            earlier = tl.load(before + start // BLOCK) - first
            rank = earlier + tl.cumsum(is_tie.to(tl.int32), 0) - 1
            kept = (scores > value) | (is_tie & (rank >= pruned_ties))
        else:
            kept = (scores > value) | (is_tie & (pruned_ties == 0))
        earlier_bits = tl.load(bits + start + places, mask=inside, other=0)
        tl.store(bits + start + places, tl.where(kept, earlier_bits, 0), mask=inside)
