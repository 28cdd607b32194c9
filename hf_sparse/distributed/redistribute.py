"""Moving parts of tensors between processes, when what decides together lies on several of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .communicator import Communicator
from .regions import ShardRegion


Boxes = Sequence[ShardRegion]


@dataclass(frozen=True)
class Transfer:
    """Parts of one tensor that are to move. Each entry comes from the one process that has it in its sources, and goes
    to every process that has it in its targets.

    Args:
        parts: the tensors of this process's boxes in `sources`, each of its box's shape.
        sources, targets: of each process, the boxes it has and the boxes it is to get.
        like: of the dtype that all parts have, and of the device that they are on.
        packed: whether every entry is 0 or -1, as in masks: eight of them travel in a byte.
    """

    parts: Sequence[torch.Tensor]
    sources: Sequence[Boxes]
    targets: Sequence[Boxes]
    like: torch.Tensor
    packed: bool = False

    def pack(self, rank: int, to: int) -> torch.Tensor:
        """The bytes for the process `to`."""
        pieces = [
            part[(own & box).slices_in(own)].reshape(-1)
            for own, part in zip(self.sources[rank], self.parts, strict=True)
            for box in self.targets[to]
            if own & box
        ]
        flat = torch.cat(pieces) if pieces else self.like.new_empty(0)
        if self.packed:
            return torch.from_numpy(np.packbits(flat.cpu().numpy() != 0)).to(flat.device)
        return flat.view(torch.uint8)

    def num_bytes_from(self, rank: int, source: int) -> int:
        """How many bytes come from the process `source`."""
        count = self._count(rank, source)
        return -(-count // 8) if self.packed else count * self.like.element_size()

    def _count(self, rank: int, source: int) -> int:
        common = (box & goal for box in self.sources[source] for goal in self.targets[rank])
        return sum(box.numel for box in common if box)

    def unpack(self, rank: int, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of this process's boxes in `targets`, from every process's bytes."""
        wanted = self.targets[rank]
        moved = [self.like.new_empty(box.shape) for box in wanted]
        for source, data in enumerate(received):
            flat, first = self._read(data, self._count(rank, source)), 0
            for box in self.sources[source]:
                for target, goal in zip(moved, wanted, strict=True):
                    common = box & goal
                    if common:
                        target[common.slices_in(goal)] = flat[first : first + common.numel].view(common.shape)
                        first += common.numel
        return moved

    def _read(self, data: torch.Tensor, count: int) -> torch.Tensor:
        if self.packed:
            bits = np.unpackbits(data.cpu().numpy(), count=count).view(np.int8)
            return torch.from_numpy(np.negative(bits, out=bits)).to(data.device)
        # Bytes may begin where no number may.
        aligned = data.storage_offset() % self.like.element_size() == 0
        return (data if aligned else data.clone()).view(self.like.dtype)


def redistribute(loads: Sequence[Transfer], communicator: Communicator) -> Iterator[list[torch.Tensor]]:
    """Bring parts of tensors to other processes, all in one exchange.

    Returns: of each load in turn, so that not all need be unpacked at once, the tensors of this process's boxes in its
    `targets`.
    """
    rank, ranks = communicator.rank, range(communicator.world_size)
    lengths = [[load.num_bytes_from(rank, source) for load in loads] for source in ranks]
    outgoing = [torch.cat([load.pack(rank, to) for load in loads]) for to in ranks]
    received = communicator.all_to_all(outgoing, [sum(sizes) for sizes in lengths])
    pieces = [data.split(sizes) for data, sizes in zip(received, lengths, strict=True)]
    return (load.unpack(rank, parts) for load, parts in zip(loads, zip(*pieces, strict=True), strict=True))
