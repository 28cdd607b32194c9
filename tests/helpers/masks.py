"""Reads the masks of a checkpoint, whichever number of ranks has written them."""

from collections.abc import Iterator

import torch

from hf_sparse.distributed import ShardRegion, full_region
from hf_sparse.engine.masks import unpack_mask
from hf_sparse.training.resume import ResumeState


def read_masks(checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and the whole mask (bool, True is kept) of each pruned weight."""
    state = ResumeState(checkpoint)
    state.verify()
    for name, shape in state.files[0].values["shapes"].items():
        mask = torch.zeros(shape, dtype=torch.bool)
        for file in state.files:
            regions = [ShardRegion(tuple(start), tuple(stop)) for start, stop in file.values["boxes"].get(name, ())]
            sizes = [region.numel for region in regions]
            flat = unpack_mask(file.tensors[f"mask/{name}"], sum(sizes))
            for region, part in zip(regions, flat.split(sizes), strict=True):
                mask[region.slices_in(full_region(shape))] = part.view(region.shape)
        yield name, mask
