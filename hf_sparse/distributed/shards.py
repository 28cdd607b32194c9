"""The part of a parameter that this rank holds, whatever has split it.

A shard's tensors are views of the trainer's own memory: writing to them changes the model. No method allocates a whole
weight.
"""

from __future__ import annotations

from typing import Any

import torch

from .regions import ShardRegion, full_region


class Shard:
    """A parameter that this rank holds whole; subclasses hold a part of one.

    Args:
        parameter: of the model.

    Attributes:
        shape: of the whole parameter.
        local_regions: the regions of this rank. Flattened and concatenated they are `tensor`, flattened.
        regions_by_rank: the regions of every rank; those of one rank where nothing is split.
        rank: of this process.
        primary_rank: the first rank that holds the same regions as this one.
    """

    is_split = False
    """Whether ranks hold different parts of such parameters."""

    def __init__(self, parameter: torch.Tensor):
        self.parameter: Any = parameter  # FSDP2 and DeepSpeed give it attributes and methods of their own
        self.shape = full_shape(parameter)
        self.local_regions: tuple[ShardRegion, ...] = (full_region(self.shape),)
        self.regions_by_rank: tuple[tuple[ShardRegion, ...], ...] = (self.local_regions,)
        self.rank = 0
        self.primary_rank = 0

    @property
    def tensor(self) -> torch.Tensor:
        """This rank's entries of the weight: scores are computed from them and zeros written to them."""
        return self.parameter.detach()

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient of `tensor`."""
        return self.parameter.grad

    @property
    def keeps_gradient(self) -> bool:
        """Whether `gradient` is the same until the next step begins."""
        return True

    @property
    def replicas(self) -> list[torch.Tensor]:
        """Other tensors with the same entries on this rank, which need the same zeros."""
        return []

    @property
    def has_full_copy(self) -> bool:
        """Whether `full_copy` may exist later in the run."""
        return False

    @property
    def full_copy(self) -> torch.Tensor | None:
        """The whole weight on this rank beside the shard, which needs the same zeros; None where there is none now."""
        return None

    @property
    def is_in_state_dict(self) -> bool:
        """Whether weights are saved from the state dict of their module."""
        return True

    @property
    def is_primary(self) -> bool:
        """Whether no lower rank holds the same regions. Every entry is counted and sent by its primary rank only."""
        return self.primary_rank == self.rank

    @property
    def primary_regions(self) -> tuple[tuple[ShardRegion, ...], ...]:
        """`regions_by_rank` without replicas: each entry of the weight is in the regions of one rank."""
        by_rank = self.regions_by_rank
        return tuple(() if regions in by_rank[:rank] else regions for rank, regions in enumerate(by_rank))

    def check_storage(self) -> None:
        """Checks that `tensor` is the memory that the optimizer updates.

        Raises:
            NotImplementedError: it is not, and what to change.
        """

    def local_views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns views of a tensor with the layout of `self.tensor`: one for each local region, of its shape."""
        if len(self.local_regions) == 1:
            return [tensor.reshape(self.local_regions[0].shape)]
        parts = tensor.reshape(-1).split([region.numel for region in self.local_regions])
        return [part.view(region.shape) for part, region in zip(parts, self.local_regions, strict=True)]


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Returns the shape of the whole parameter, also where ZeRO-3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
