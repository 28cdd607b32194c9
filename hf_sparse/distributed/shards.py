"""Shards: what this process holds of each parameter, whoever split it.

A shard's tensors are views of the trainer's own memory, so that writing to them changes the model. Nothing here ever
makes a whole weight.
"""

from __future__ import annotations

import torch

from .regions import ShardRegion, whole


class Shard:
    """A parameter of which this process holds everything.

    Args:
        parameter: as the model has it.
    """

    strategy: str | None = None
    """What splits the parameter, or None."""

    def __init__(self, parameter: torch.Tensor):
        self.parameter = parameter
        self.shape = shape_of(parameter)
        self.own: tuple[ShardRegion, ...] = (whole(self.shape),)
        """The boxes of this process. Flattened one after the other they are `tensor`, flattened."""
        self.boxes: tuple[tuple[ShardRegion, ...], ...] = (self.own,)
        """The boxes of every process."""
        self.holder = self.rank = 0
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
    def copy(self) -> torch.Tensor | None:
        """That weight; None while it is not there."""
        return None

    @property
    def first(self) -> bool:
        """Whether this process speaks for the shard: no process before it holds the same."""
        return self.holder == self.rank

    @property
    def primary_regions(self) -> tuple[tuple[ShardRegion, ...], ...]:
        """The boxes of every process, each entry of the weight once."""
        return tuple(() if boxes in self.boxes[:rank] else boxes for rank, boxes in enumerate(self.boxes))

    def check(self) -> None:
        """See that `tensor` is the weight's memory. Raises NotImplementedError if not."""

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of a tensor laid out like `tensor`, one for each of this process's boxes, of its shape."""
        if len(self.own) == 1:
            return [tensor.reshape(self.own[0].shape)]
        flat = tensor.reshape(-1).split([box.numel for box in self.own])
        return [part.view(box.shape) for part, box in zip(flat, self.own, strict=True)]


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has left an empty one in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
