"""Shards of parameters that FSDP2, load-time sharding or tensor parallelism hold as DTensors."""

from __future__ import annotations

import torch

from .regions import ShardRegion
from .shards import Shard


class DTensorShard(Shard):
    """A parameter that FSDP2, load-time sharding or tensor parallelism has split.

    Raises:
        NotImplementedError: a placement other than Shard and Replicate.
    """

    strategy = "a DTensor"

    def __init__(self, parameter):
        super().__init__(parameter)
        start, stop = [0] * len(self.shape), list(self.shape)
        mesh = parameter.device_mesh
        for dim, placement in enumerate(parameter.placements):
            if type(placement).__name__ == "Shard":
                # As torch.chunk does: all chunks but the last few are of one length.
                length = stop[placement.dim] - start[placement.dim]
                step = -(-length // mesh.size(dim))
                first = min(length, step * mesh.get_local_rank(dim))
                stop[placement.dim] = start[placement.dim] + min(length, first + step)
                start[placement.dim] += first
            elif not placement.is_replicate():
                raise NotImplementedError(f"it is split by {placement}, which pruning does not follow")
        box = ShardRegion(tuple(start), tuple(stop))
        if box.shape != tuple(self.tensor.shape) or box.contiguous_runs(self.shape) is None:
            raise NotImplementedError(f"it is split by {parameter.placements}, which pruning does not follow")
        self.local_regions = (box,) if box.numel else ()

    @property
    def tensor(self):
        return _local(self.parameter)

    @property
    def gradient(self):
        gradient = self.parameter.grad
        if gradient is not None and gradient.placements != self.parameter.placements:
            gradient = gradient.redistribute(placements=self.parameter.placements)
        return None if gradient is None else _local(gradient)


@torch.no_grad()
def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that is here, itself: with gradients it would be a view, made by way of the dispatcher."""
    return tensor.to_local()
