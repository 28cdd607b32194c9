"""Shards: what this process holds of each parameter, whoever split it.

A shard's tensors are views of the trainer's own memory, so that writing to them changes the model. Nothing here ever
makes a whole weight.
"""

from __future__ import annotations

import torch

from .regions import ShardRegion, full_region


class Shard:
    """A parameter of which this process holds everything.

    Args:
        parameter: as the model has it.
    """

    strategy: str | None = None
    """What splits the parameter, or None."""

    def __init__(self, parameter: torch.Tensor):
        self.parameter = parameter
        self.shape = full_shape(parameter)
        self.local_regions: tuple[ShardRegion, ...] = (full_region(self.shape),)
        """The boxes of this process. Flattened one after the other they are `tensor`, flattened."""
        self.regions_by_rank: tuple[tuple[ShardRegion, ...], ...] = (self.local_regions,)
        """The boxes of every process."""
        self.primary_rank = self.rank = 0
        """The first process with the same boxes as this one; this process."""

    @property
    def tensor(self) -> torch.Tensor:
        """What this process holds: what is ranked, and where zeros are written."""
        return self.parameter.detach()

    @property
    def gradient(self) -> torch.Tensor | None:
        """The same part of the gradient."""
        return self.parameter.grad

    @property
    def replicas(self) -> list[torch.Tensor]:
        """Other memory of the same part, which must hold the same zeros."""
        return []

    has_full_copy = False
    """Whether, at some time, the whole weight is beside the shard: it must hold the same zeros."""

    @property
    def full_copy(self) -> torch.Tensor | None:
        """That weight; None while it is not there."""
        return None

    @property
    def is_primary(self) -> bool:
        """Whether this process speaks for the shard: no process before it holds the same."""
        return self.primary_rank == self.rank

    @property
    def primary_regions(self) -> tuple[tuple[ShardRegion, ...], ...]:
        """The boxes of every process, each entry of the weight once."""
        every = self.regions_by_rank
        return tuple(() if regions in every[:rank] else regions for rank, regions in enumerate(every))

    def check(self) -> None:
        """See that `tensor` is the weight's memory. Raises NotImplementedError if not."""

    def local_views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of a tensor laid out like `tensor`, one for each of this process's boxes, of its shape."""
        if len(self.local_regions) == 1:
            return [tensor.reshape(self.local_regions[0].shape)]
        flat = tensor.reshape(-1).split([box.numel for box in self.local_regions])
        return [part.view(box.shape) for part, box in zip(flat, self.local_regions, strict=True)]


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has left an empty one in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
