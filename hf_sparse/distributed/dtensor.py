"""Shards of DTensors: parameters split by FSDP2, load-time sharding or tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch

from .regions import ShardRegion
from .shards import Shard


class DTensorShard(Shard):
    """This rank's part of a DTensor.

    Raises:
        NotImplementedError: a placement other than Shard and Replicate, or a part that is no region of equal runs.
    """

    is_split = True

    def __init__(self, parameter: torch.Tensor):
        super().__init__(parameter)
        start, stop = [0] * len(self.shape), list(self.shape)
        mesh = self.parameter.device_mesh
        for mesh_dim, placement in enumerate(self.parameter.placements):
            if type(placement).__name__ == "Shard":
                # As torch.chunk: all chunks have equal length, but for the last ones.
                dim = placement.dim
                size = stop[dim] - start[dim]
                chunk = -(-size // mesh.size(mesh_dim))
                offset = min(size, chunk * mesh.get_local_rank(mesh_dim))
                stop[dim] = start[dim] + min(size, offset + chunk)
                start[dim] += offset
            elif not placement.is_replicate():
                raise NotImplementedError(f"it is split by {placement}, which pruning does not support")
        region = ShardRegion(tuple(start), tuple(stop))
        if region.shape != tuple(self.tensor.shape) or region.contiguous_runs(self.shape) is None:
            raise NotImplementedError(f"it is split by {self.parameter.placements}, which pruning does not support")
        self.local_regions = (region,) if region.numel else ()

    @property
    def tensor(self) -> torch.Tensor:
        return to_local(self.parameter)

    @property
    def gradient(self) -> torch.Tensor | None:
        gradient = self.parameter.grad
        if gradient is not None and gradient.placements != self.parameter.placements:
            # Kept, so that what is written to the gradient reaches the optimizer.
            gradient = self.parameter.grad = gradient.redistribute(placements=self.parameter.placements)
        return None if gradient is None else to_local(gradient)


@torch.no_grad()
def to_local(tensor: Any) -> torch.Tensor:
    """Returns the local part of a DTensor, and any other tensor itself. With autograd on, the method `to_local` would
    return a view instead, through the dispatcher."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
