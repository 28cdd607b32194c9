"""Scores of coupled units, which are slices of several parameters, and the masks that a selection of them writes.

    score(u) = mean of the scores of all weights of unit u

Each rank adds the scores of the weights that it holds, whatever split them. One all_reduce gives every rank the scores
of all units, so that each selects the same units and writes their masks into its own shards: no weight is sent. Sums
are float64 and the means float32, which leaves their order without influence.

Shapes: G groups of units, U units of one group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from ..criteria import Criterion
from ..distributed import SINGLE_PROCESS, Communicator, Shard, ShardRegion
from ..model.coupling import UnitGroup, UnitSlice
from ..numerics import chunk_size
from ..requires import Requires


def unit_size(group: UnitGroup, shapes: Mapping[str, Sequence[int]]) -> int:
    """Returns the number of weights of one unit of a group.

    Args:
        shapes: of the weights by name. Parameters that are not named, such as biases, are not counted.

    Example:
        >>> neurons = UnitGroup("neuron", "ffn", 6, (UnitSlice("up", 0), UnitSlice("bias", 0), UnitSlice("down", 1)))
        >>> unit_size(neurons, {"up": (6, 4), "down": (4, 6)})
        8
    """
    parts = [part for part in group.slices if part.name in shapes]
    return sum(slice_region(part, group.num_units, shapes[part.name]).numel for part in parts) // group.num_units


def score_units(
    groups: Sequence[UnitGroup],
    criterion: Criterion,
    shards: Mapping[str, Shard],
    mask_bits: Mapping[str, torch.Tensor],
    statistics: Mapping[str, torch.Tensor],
    communicator: Communicator = SINGLE_PROCESS,
) -> list[torch.Tensor]:
    """Returns the scores of the units of each group: (G) tensors (U), float32 on the CPU. Pruned units score -inf.

    Args:
        groups: (G) coupled units.
        criterion: scores the weights.
        shards: the local part of each weight by name. Parameters that are not named, such as biases, are not scored.
        mask_bits: int8 masks of the shards, -1 where a weight is kept and 0 where it is pruned.
        statistics: what the criterion requires besides the weights, of the shapes of the shards.
        communicator: of the ranks that hold the shards, which call this function together.
    """

    def add_scores(part: UnitSlice, num_units: int) -> torch.Tensor:
        shard, statistic = shards[part.name], statistics.get(part.name)
        tensors = [shard.tensor] if statistic is None else [shard.tensor, statistic.expand(shard.tensor.shape)]
        return sum_over_units(part, num_units, shard, tensors, partial(_sum_scores, criterion, part.name, shard))

    sums = torch.stack([local_sums(groups, shards, add_scores), _count_kept(groups, shards, mask_bits)])
    communicator.all_reduce(sums)
    totals, kept = (row.split([group.num_units for group in groups]) for row in sums.cpu())
    shapes = {name: shard.shape for name, shard in shards.items()}
    return [
        (total_U / unit_size(group, shapes)).float().masked_fill_(kept_U == 0, -torch.inf)
        for group, total_U, kept_U in zip(groups, totals, kept, strict=True)
    ]


def pruned_units(
    groups: Sequence[UnitGroup],
    shards: Mapping[str, Shard],
    mask_bits: Mapping[str, torch.Tensor],
    communicator: Communicator = SINGLE_PROCESS,
) -> list[torch.Tensor]:
    """Returns which units of each group are pruned, that is have no kept weight: (G) tensors (U), bool on the CPU.

    The arguments are those of `score_units`.
    """
    kept = _count_kept(groups, shards, mask_bits)
    communicator.all_reduce(kept)
    return [kept_U == 0 for kept_U in kept.cpu().split([group.num_units for group in groups])]


def sum_squares(groups: Sequence[UnitGroup], shards: Mapping[str, Shard]) -> torch.Tensor:
    """Returns this rank's part of the sum of the squared weights of each unit, all units of all groups one after the
    other, float64. Parameters that are not in `shards`, such as biases, are not counted."""

    def add_squares(part: UnitSlice, num_units: int) -> torch.Tensor:
        shard = shards[part.name]
        return sum_over_units(part, num_units, shard, [shard.tensor], _sum_squares)

    return local_sums(groups, shards, add_squares)


def prune_units(
    group: UnitGroup, keep_U: torch.Tensor, shards: Mapping[str, Shard], mask_bits: Mapping[str, torch.Tensor]
) -> None:
    """Prunes the units with keep_U False in the local masks of all parameters of a group that are in `shards`."""
    for part in (part for part in group.slices if part.name in shards):
        shard, bits = shards[part.name], mask_bits[part.name]
        keep_bits = keep_U.to(bits.device, torch.int8).neg_().repeat_interleave(part.width)
        for region, (local_bits,) in local_parts(part, group.num_units, shard, [bits]):
            first, stop = region.start[part.dim] - part.offset, region.stop[part.dim] - part.offset
            shape = [-1 if dim == part.dim else 1 for dim in range(local_bits.ndim)]
            local_bits.bitwise_and_(keep_bits[first:stop].view(shape))


def slice_region(part: UnitSlice, num_units: int, shape: Sequence[int]) -> ShardRegion:
    """Returns the region of a parameter of `shape` that all units of a slice own together."""
    start, stop = [0] * len(shape), list(shape)
    start[part.dim], stop[part.dim] = part.offset, part.offset + num_units * part.width
    if part.expert is not None:
        start[0], stop[0] = part.expert, part.expert + 1
    return ShardRegion(tuple(start), tuple(stop))


def local_parts(
    part: UnitSlice, num_units: int, shard: Shard, tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[ShardRegion, list[torch.Tensor]]]:
    """Yields the regions of a slice that this rank holds, with views of tensors of the shard's layout."""
    whole = slice_region(part, num_units, shard.shape)
    for held, *views in zip(shard.local_regions, *map(shard.local_views, tensors), strict=True):
        if region := held & whole:
            yield region, [view[region.slices_in(held)] for view in views]


def local_sums(
    groups: Sequence[UnitGroup], shards: Mapping[str, Shard], add: Callable[[UnitSlice, int], torch.Tensor]
) -> torch.Tensor:
    """Returns the sums of `add` over the slices of each unit, for all units of all groups, float64. Weights whose
    entries another rank counts, and parameters that are not in `shards`, add nothing."""
    device = next(iter(shards.values())).tensor.device
    sums = torch.zeros(sum(group.num_units for group in groups), dtype=torch.float64, device=device)
    with torch.no_grad():
        for group, sum_U in zip(groups, sums.split([group.num_units for group in groups]), strict=True):
            for part in group.slices:
                if part.name in shards and shards[part.name].is_primary:
                    sum_U += add(part, group.num_units).to(device)
    return sums


def _count_kept(
    groups: Sequence[UnitGroup], shards: Mapping[str, Shard], mask_bits: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Returns a number for each unit that is 0 if no local weight of it is kept."""

    def add_kept(part: UnitSlice, num_units: int) -> torch.Tensor:
        bits = mask_bits[part.name]
        return sum_over_units(part, num_units, shards[part.name], [bits], lambda region, dims, bits: -bits.amin(dims))

    return local_sums(groups, shards, add_kept)


def sum_over_units(
    part: UnitSlice,
    num_units: int,
    shard: Shard,
    tensors: Sequence[torch.Tensor],
    reduce: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Returns the sum over the local entries of each unit (U), float64.

    Args:
        tensors: of the shard's layout.
        reduce: called with a region, the dimensions to reduce, and the entries of each tensor in the region.
    """
    total = torch.zeros(num_units * part.width, dtype=torch.float64, device=tensors[0].device)
    for region, views in local_parts(part, num_units, shard, tensors):
        others = [dim for dim in range(len(region.start)) if dim != part.dim]
        for chunk, entries in row_chunks(region, views):
            first, stop = chunk.start[part.dim] - part.offset, chunk.stop[part.dim] - part.offset
            total[first:stop] += reduce(chunk, others, *entries)
    return total.view(num_units, -1).sum(1)


def _sum_scores(
    criterion: Criterion,
    name: str,
    shard: Shard,
    region: ShardRegion,
    dims: list[int],
    weight: torch.Tensor,
    statistic: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the sum of the scores of a region of a weight over `dims`."""
    if criterion.requires & Requires.POSITION:
        statistic = _positions(region, shard.shape, weight.device) + (zlib.crc32(name.encode()) << 31)
    scores = criterion.score(weight, statistic)
    if scores.shape != weight.shape:
        raise ValueError(
            f'criterion "{type(criterion).__name__}" must return one score per weight, but returns '
            f"{tuple(scores.shape)} for {tuple(weight.shape)}."
        )
    return scores.sum(dims, dtype=torch.float64)


def _sum_squares(region: ShardRegion, dims: list[int], weight: torch.Tensor) -> torch.Tensor:
    return weight.double().square().sum(dims)


def row_chunks(
    region: ShardRegion, tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[ShardRegion, list[torch.Tensor]]]:
    """Splits a region and tensors of its shape into chunks of rows that fit into a core's cache."""
    rows = len(tensors[0])
    step = max(1, chunk_size(tensors[0].device) // max(1, tensors[0][0].numel()))
    for first in range(0, rows, step):
        stop = min(rows, first + step)
        start = region.start[0]
        chunk = ShardRegion((start + first, *region.start[1:]), (start + stop, *region.stop[1:]))
        yield chunk, [tensor[first:stop] for tensor in tensors]


def _positions(region: ShardRegion, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns the position of each entry of a region in the flattened parameter of `shape`, int64."""
    positions = torch.zeros((), dtype=torch.int64, device=device)
    for first, stop, size in zip(region.start, region.stop, shape, strict=True):
        positions = positions[..., None] * size + torch.arange(first, stop, device=device)
    return positions
