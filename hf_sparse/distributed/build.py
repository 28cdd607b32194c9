"""Builds the shard of every parameter, whichever strategy has split it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .communicator import SINGLE_PROCESS, Communicator, get_communicator
from .dtensor import DTensorShard
from .regions import ShardRegion
from .shards import Shard


def build_shards(parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, Shard], Communicator]:
    """What this process holds of each parameter, and the processes that hold the rest: this one alone where every
    parameter is whole, as with one process and with DDP.

    Raises:
        NotImplementedError: a parameter is split in a way that pruning does not follow; it is named.
    """
    shards = {name: _shard(name, parameter) for name, parameter in parameters.items()}
    if all(type(shard) is Shard for shard in shards.values()):
        return shards, SINGLE_PROCESS
    communicator = get_communicator()
    local_regions = [shard.local_regions for shard in shards.values()]
    for name, boxes in zip(shards, _tell(local_regions, communicator), strict=True):
        shard = shards[name]
        shard.regions_by_rank, shard.rank = boxes, communicator.rank
        shard.primary_rank = boxes.index(shard.local_regions)
    return shards, communicator


def _shard(name: str, parameter: torch.Tensor) -> Shard:
    try:
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from .zero import ZeroShard

            return ZeroShard(parameter)
        if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):
            return DTensorShard(parameter)
        if hasattr(parameter, "_is_flat_param") or getattr(parameter, "_fsdp_flattened", False):
            raise NotImplementedError("it is flattened by FSDP version 1: set fsdp_config version to 2")
        if parameter.is_meta:
            raise NotImplementedError("it is on the meta device, where it holds no values")
    except NotImplementedError as error:
        raise NotImplementedError(f'"{name}" cannot be pruned: {error}.') from None
    return Shard(parameter)


def _tell(
    owned: Sequence[tuple[ShardRegion, ...]], communicator: Communicator
) -> list[tuple[tuple[ShardRegion, ...], ...]]:
    """Every process's boxes of every parameter, from this process's."""
    numbers = []
    for boxes in owned:
        numbers.append(len(boxes))
        for box in boxes:
            numbers += [len(box.start), *box.start, *box.stop]
    told = [iter(part.tolist()) for part in communicator.all_gather(torch.tensor(numbers, dtype=torch.int64))]
    return [tuple(_read_boxes(numbers) for numbers in told) for _ in owned]


def _read_boxes(numbers) -> tuple[ShardRegion, ...]:
    boxes = []
    for _ in range(next(numbers)):
        dims = range(next(numbers))
        boxes.append(ShardRegion(tuple(next(numbers) for _ in dims), tuple(next(numbers) for _ in dims)))
    return tuple(boxes)
