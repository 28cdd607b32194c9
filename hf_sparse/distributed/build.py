"""Builds the shard of every parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from .communicator import SINGLE_PROCESS, Communicator, get_communicator
from .dtensor import DTensorShard
from .regions import ShardRegion
from .shards import Shard
from .zero import ZeroShard


def build_shards(parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, Shard], Communicator]:
    """Returns this rank's shard of each parameter, and the ranks that hold the rest.

    The communicator is `SINGLE_PROCESS` where every parameter is whole, as with one process and with DDP: then each
    rank decides alone, from the same weights.

    Raises:
        NotImplementedError: a parameter, which is named, is split in an unsupported way.
    """
    shards = {name: _build_shard(name, parameter) for name, parameter in parameters.items()}
    if not any(shard.is_split for shard in shards.values()):
        return shards, SINGLE_PROCESS
    communicator = get_communicator()
    local_regions = [shard.local_regions for shard in shards.values()]
    for shard, regions_by_rank in zip(shards.values(), _gather_regions(local_regions, communicator), strict=True):
        shard.regions_by_rank, shard.rank = regions_by_rank, communicator.rank
        shard.primary_rank = regions_by_rank.index(shard.local_regions)
    return shards, communicator


def _build_shard(name: str, parameter: torch.Tensor) -> Shard:
    try:
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return ZeroShard(parameter)
        if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):
            return DTensorShard(parameter)
        if isinstance(parameter, _flat_parameter()) or getattr(parameter, "_fsdp_flattened", False):
            raise NotImplementedError("it is flattened by FSDP version 1: set version 2 in `fsdp_config`")
        if parameter.is_meta:
            raise NotImplementedError("it is on the meta device, where it holds no values")
    except NotImplementedError as error:
        raise NotImplementedError(f'"{name}" cannot be pruned: {error}.') from None
    return Shard(parameter)


def _flat_parameter() -> type | tuple[()]:
    """The class of FSDP version 1, if anything has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else fsdp.FlatParameter


def _gather_regions(
    local_regions: Sequence[tuple[ShardRegion, ...]], communicator: Communicator
) -> list[tuple[tuple[ShardRegion, ...], ...]]:
    """Returns the regions of every rank, for each parameter."""
    numbers = []
    for regions in local_regions:
        numbers.append(len(regions))
        for region in regions:
            numbers += [len(region.start), *region.start, *region.stop]
    gathered = communicator.all_gather(torch.tensor(numbers, dtype=torch.int64))
    by_rank = [iter(rank_numbers.tolist()) for rank_numbers in gathered]
    return [tuple(_read_regions(rank_numbers) for rank_numbers in by_rank) for _ in local_regions]


def _read_regions(numbers: Iterator[int]) -> tuple[ShardRegion, ...]:
    regions = []
    for _ in range(next(numbers)):
        dims = range(next(numbers))
        regions.append(ShardRegion(tuple(next(numbers) for _ in dims), tuple(next(numbers) for _ in dims)))
    return tuple(regions)
