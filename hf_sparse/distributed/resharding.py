"""Loads a shard from what any number of ranks has saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .regions import ShardRegion
from .shards import Shard


SavedPart = tuple[Sequence[ShardRegion], Callable[[], torch.Tensor]]
"""The regions that one rank has saved, and a function that reads their entries: flattened and concatenated."""


def load_local_part(shard: Shard, saved: Iterable[SavedPart], dtype: torch.dtype) -> torch.Tensor:
    """Returns this rank's part of a saved tensor, with the layout of `shard.tensor`.

    Args:
        shard: says which part.
        saved: the parts of all ranks that saved. Only those that overlap with this rank's regions are read.
        dtype: of the result.

    Raises:
        ValueError: entries are missing, or a part has more or fewer entries than its regions.
    """
    tensor = torch.empty(shard.tensor.shape, dtype=dtype)
    local_views = shard.local_views(tensor) if shard.local_regions else []
    # Regions of different parts may overlap where a file was not written by this package.
    loaded = torch.zeros(tensor.shape, dtype=torch.bool)
    loaded_views = shard.local_views(loaded) if shard.local_regions else []
    seen: set[tuple[ShardRegion, ...]] = set()
    for regions, read in saved:
        regions = tuple(regions)
        if regions in seen or not any(region & local for region in regions for local in shard.local_regions):
            continue
        seen.add(regions)
        flat, sizes = read().reshape(-1), [region.numel for region in regions]
        if len(flat) != sum(sizes):
            raise ValueError(f"{len(flat)} entries were saved instead of {sum(sizes)}.")
        for region, part in zip(regions, flat.split(sizes), strict=True):
            for local, view, is_loaded in zip(shard.local_regions, local_views, loaded_views, strict=True):
                if common := region & local:
                    view[common.slices_in(local)] = part.view(region.shape)[common.slices_in(region)].to(dtype)
                    is_loaded[common.slices_in(local)] = True
    if num_missing := loaded.numel() - int(torch.count_nonzero(loaded)):
        raise ValueError(f"{num_missing} entries are missing.")
    return tensor
