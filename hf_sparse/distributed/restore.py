"""Putting together what this process holds of a weight from what others, or as many as there were, have saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .regions import ShardRegion
from .shards import Shard


def load_local_part(
    shard: Shard, saved: Sequence[tuple[Sequence[ShardRegion], Callable[[], torch.Tensor]]], dtype: torch.dtype
) -> torch.Tensor:
    """The tensor of this process's part, laid out like `shard.tensor`.

    Args:
        shard: says which part.
        saved: the boxes that each file has, and how to read them: flattened, one after the other.
        dtype: of the tensors.

    Raises:
        ValueError: some entries are in no file, or a file has more or fewer than its boxes say.
    """
    tensor = torch.empty(shard.tensor.shape, dtype=dtype)
    parts, left, seen = shard.local_views(tensor) if shard.local_regions else [], tensor.numel(), set()
    for boxes, read in saved:
        boxes = tuple(boxes)
        if boxes in seen or not any(box & own for box in boxes for own in shard.local_regions):
            continue
        seen.add(boxes)
        flat, sizes = read().reshape(-1), [box.numel for box in boxes]
        if len(flat) != sum(sizes):
            raise ValueError(f"{len(flat)} entries were saved instead of {sum(sizes)}.")
        for box, piece in zip(boxes, flat.split(sizes), strict=True):
            for own, part in zip(shard.local_regions, parts, strict=True):
                common = box & own
                if common:
                    part[common.slices_in(own)] = piece.view(box.shape)[common.slices_in(box)].to(dtype)
                    left -= common.numel
    if left:
        raise ValueError(f"{left} entries are missing.")
    return tensor
