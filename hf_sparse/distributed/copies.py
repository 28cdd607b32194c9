"""Writes weights that have changed on one rank's shard to all other memory that holds them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .communicator import Communicator
from .redistribute import Transfer, redistribute
from .regions import full_region
from .shards import Shard


@torch.no_grad()
def write_copies(shards: Iterable[Shard], communicator: Communicator) -> None:
    """Copies `shard.tensor` to its replicas and to the full copies of all ranks, which ZeRO has beside its masters.
    All ranks call this. Full copies are sent one at a time, so that no more than one weight is in memory twice."""
    for shard in shards:
        for replica in shard.replicas:
            replica.copy_(shard.tensor)
        if not shard.has_full_copy:
            continue
        copy = shard.full_copy
        values = shard.tensor.to(shard.parameter.dtype)
        targets = [(full_region(shard.shape),)] * communicator.world_size
        views = shard.local_views(values) if shard.is_primary and shard.local_regions else []
        transfer = Transfer(views, shard.primary_regions, targets, values)
        ((received,),) = redistribute([transfer], communicator)
        if copy is not None:
            copy.copy_(received)
