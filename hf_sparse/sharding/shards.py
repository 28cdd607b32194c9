"""Shards: what this process holds of each parameter, whoever split it.

A shard's tensors are views of the trainer's own memory, so that writing to them changes the model. Nothing here ever
makes a whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .boxes import Box, whole
from .processes import ALONE, OneProcess, all_processes


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
        self.own: tuple[Box, ...] = (whole(self.shape),)
        """The boxes of this process. Flattened one after the other they are `tensor`, flattened."""
        self.boxes: tuple[tuple[Box, ...], ...] = (self.own,)
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
    def counterparts(self) -> list[torch.Tensor]:
        """Other memory of the same part, which must hold the same zeros."""
        return []

    has_copy = False
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
    def originals(self) -> tuple[tuple[Box, ...], ...]:
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
        box = Box(tuple(start), tuple(stop))
        if box.shape != tuple(self.tensor.shape) or box.runs(self.shape) is None:
            raise NotImplementedError(f"it is split by {parameter.placements}, which pruning does not follow")
        self.own = (box,) if box.numel else ()

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


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has left an empty one in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def place(parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, Shard], OneProcess]:
    """What this process holds of each parameter, and the processes that hold the rest: this one alone where every
    parameter is whole, as with one process and with DDP.

    Raises:
        NotImplementedError: a parameter is split in a way that pruning does not follow; it is named.
    """
    shards = {name: _shard(name, parameter) for name, parameter in parameters.items()}
    if all(type(shard) is Shard for shard in shards.values()):
        return shards, ALONE
    processes = all_processes()
    for name, boxes in zip(shards, _tell([shard.own for shard in shards.values()], processes), strict=True):
        shard = shards[name]
        shard.boxes, shard.rank = boxes, processes.rank
        shard.holder = boxes.index(shard.own)
    return shards, processes


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


def _tell(owned: Sequence[tuple[Box, ...]], processes: OneProcess) -> list[tuple[tuple[Box, ...], ...]]:
    """Every process's boxes of every parameter, from this process's."""
    numbers = []
    for boxes in owned:
        numbers.append(len(boxes))
        for box in boxes:
            numbers += [len(box.start), *box.start, *box.stop]
    told = [iter(part.tolist()) for part in processes.gather(torch.tensor(numbers, dtype=torch.int64))]
    return [tuple(_read_boxes(numbers) for numbers in told) for _ in owned]


def _read_boxes(numbers) -> tuple[Box, ...]:
    boxes = []
    for _ in range(next(numbers)):
        dims = range(next(numbers))
        boxes.append(Box(tuple(next(numbers) for _ in dims), tuple(next(numbers) for _ in dims)))
    return tuple(boxes)
