"""Sends regions of tensors between ranks, where units that must be selected together are on several of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .communicator import Communicator
from .regions import ShardRegion


@dataclass(frozen=True)
class Transfer:
    """Regions of one tensor to redistribute.

    Args:
        parts: this rank's entries of its regions in `sources`, a tensor of the region's shape for each.
        sources: the regions that each rank sends from, without overlap.
        targets: the regions that each rank receives.
        like: a tensor of the dtype and on the device of all parts.
        packed: whether every entry is 0 or -1, as in masks: eight of them are sent in a byte.
    """

    parts: Sequence[torch.Tensor]
    sources: Sequence[Sequence[ShardRegion]]
    targets: Sequence[Sequence[ShardRegion]]
    like: torch.Tensor
    packed: bool = False

    def pack(self, rank: int, target: int) -> torch.Tensor:
        """Returns the bytes that `rank` (this one) sends to rank `target`."""
        pieces = [
            part[common.slices_in(region)].reshape(-1)
            for region, part in zip(self.sources[rank], self.parts, strict=True)
            for requested in self.targets[target]
            if (common := region & requested)
        ]
        flat = torch.cat(pieces) if pieces else self.like.new_empty(0)
        if self.packed:
            return torch.from_numpy(np.packbits(flat.cpu().numpy() != 0)).to(flat.device)
        return flat.view(torch.uint8)

    def num_bytes_from(self, rank: int, source: int) -> int:
        """Returns the number of bytes that `rank` receives from rank `source`."""
        numel = self._numel_from(rank, source)
        return -(-numel // 8) if self.packed else numel * self.like.element_size()

    def unpack(self, rank: int, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the tensors of this rank's target regions, from the bytes that every rank has sent."""
        tensors = [self.like.new_empty(region.shape) for region in self.targets[rank]]
        for source, data in enumerate(received):
            flat, first = self._decode(data, self._numel_from(rank, source)), 0
            for region in self.sources[source]:
                for requested, tensor in zip(self.targets[rank], tensors, strict=True):
                    if common := region & requested:
                        tensor[common.slices_in(requested)] = flat[first : first + common.numel].view(common.shape)
                        first += common.numel
        return tensors

    def _numel_from(self, rank: int, source: int) -> int:
        overlaps = (region & requested for region in self.sources[source] for requested in self.targets[rank])
        return sum(common.numel for common in overlaps if common)

    def _decode(self, data: torch.Tensor, numel: int) -> torch.Tensor:
        if self.packed:
            bits = np.unpackbits(data.cpu().numpy(), count=numel).view(np.int8)
            return torch.from_numpy(np.negative(bits, out=bits)).to(data.device)
        # A tensor can be viewed as a wider dtype only where its offset is a multiple of the width.
        is_aligned = data.storage_offset() % self.like.element_size() == 0
        return (data if is_aligned else data.clone()).view(self.like.dtype)


def redistribute(transfers: Sequence[Transfer], communicator: Communicator) -> Iterator[list[torch.Tensor]]:
    """Sends regions of several tensors to the ranks that need them, in one all-to-all.

    Returns: for each transfer in turn, the tensors of this rank's target regions. They are unpacked one transfer at a
        time, which bounds memory.
    """
    rank, ranks = communicator.rank, range(communicator.world_size)
    num_bytes = [[transfer.num_bytes_from(rank, source) for transfer in transfers] for source in ranks]
    packed = [torch.cat([transfer.pack(rank, target) for transfer in transfers]) for target in ranks]
    received = communicator.all_to_all(packed, [sum(sizes) for sizes in num_bytes])
    by_source = [data.split(sizes) for data, sizes in zip(received, num_bytes, strict=True)]
    by_transfer = zip(*by_source, strict=True)
    return (transfer.unpack(rank, data) for transfer, data in zip(transfers, by_transfer, strict=True))
