"""Regions, redistribution and resharding, with all ranks simulated in one process."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from hf_sparse.distributed import (
    Shard,
    ShardRegion,
    Transfer,
    full_region,
    load_local_part,
    redistribute,
    regions_of_range,
)
from hf_sparse.model.layers import PrunableLayer
from hf_sparse.selection.row_blocks import first_offset, keeps_units_whole, partition_rows


SHAPES = [(7,), (5, 4), (3, 4, 2), (2, 3, 2, 2)]
CUTS = [[0], [1, 5], [3, 3, 4], [6, 2]]


def entries(shape):
    return torch.arange(math.prod(shape)).view(shape)


def values_of(region, tensor):
    return tensor[region.slices_in(full_region(tensor.shape))]


@pytest.mark.parametrize("shape", SHAPES)
def test_range_of_offsets_is_a_few_regions_in_order(shape):
    everything = entries(shape)
    for first, last in itertools.combinations_with_replacement(range(everything.numel() + 1), 2):
        regions = regions_of_range(shape, first, last)
        offsets = [offset for region in regions for offset in values_of(region, everything).reshape(-1).tolist()]
        assert offsets == list(range(first, last))
        assert len(regions) <= 2 * len(shape) - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_runs_are_the_offsets_of_a_region(shape):
    everything = entries(shape)
    ranges = [[(first, last) for first in range(size) for last in range(first + 1, size + 1)] for size in shape]
    regular = 0
    for corners in itertools.product(*ranges):
        region = ShardRegion(*map(tuple, zip(*corners)))
        runs = region.contiguous_runs(shape)
        offsets = values_of(region, everything).reshape(-1).tolist()
        assert offsets[0] == region.flat_offset(shape)
        if runs is not None:
            regular += 1
            count, length, stride = runs
            assert offsets == [offsets[0] + run * stride + index for run in range(count) for index in range(length)]
    assert regular
    for dim, size in enumerate(shape):  # a split of one dimension always gives equal runs
        region = ShardRegion(tuple(0 if d != dim else 1 for d in range(len(shape))), shape)
        assert size == 1 or region.contiguous_runs(shape) is not None


def communicator(rank, sent):
    """A rank whose `all_to_all` exchanges tensors through the list `sent`, which has one entry per rank."""

    def all_to_all(tensors, lengths):
        sent[rank] = tensors
        assert all(tensors is None or len(tensors[rank]) == length for tensors, length in zip(sent, lengths))
        return [tensors[0].new_empty(0) if others is None else others[rank] for others in sent]

    return SimpleNamespace(rank=rank, world_size=len(sent), all_to_all=all_to_all)


def mask_of(tensor):
    return -(tensor % 3 == 0).to(torch.int8)


def redistributed(tensor, sources, targets):
    """The tensors and masks that each rank receives, when each holds its sources of `tensor`."""
    sent, results = [None] * len(sources), [None] * len(sources)
    mask = mask_of(tensor)
    for rank in 2 * list(range(len(sources))):  # in the second round all ranks have sent
        parts, masks = ([values_of(region, entire) for region in sources[rank]] for entire in (tensor, mask))
        transfers = [Transfer(parts, sources, targets, tensor), Transfer(masks, sources, targets, mask, packed=True)]
        try:
            results[rank] = list(redistribute(transfers, communicator(rank, sent)))
        except RuntimeError:  # in the first round some ranks have not sent yet
            continue
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("ends", [(0, 3, 20), (0, 0, 20), (0, 7, 7, 13, 20)])
def test_redistribution_there_and_back(ends, dtype):
    shape = (5, 4)
    tensor = entries(shape).to(dtype)
    ranges = [regions_of_range(shape, first, last) for first, last in zip(ends, ends[1:])]
    size = len(ranges)
    columns = [(ShardRegion((0, rank), (5, rank + 1)),) if rank < 3 else () for rank in range(size)]
    columns[-1] = (ShardRegion((0, size - 1), (5, 4)),)
    everywhere = [(full_region(shape),)] * size
    for sources, targets in [(ranges, columns), (columns, ranges), (ranges, everywhere), (columns, everywhere)]:
        for regions, (parts, masks) in zip(targets, redistributed(tensor, sources, targets), strict=True):
            for region, part, mask in zip(regions, parts, masks, strict=True):
                assert part.dtype == dtype and torch.equal(part, values_of(region, tensor))
                assert torch.equal(mask, values_of(region, mask_of(tensor)))


LAYERS = [
    PrunableLayer("w", "linear", (6, 4)),
    PrunableLayer("w", "conv1d", (4, 6)),
    PrunableLayer("w", "conv2d", (6, 2, 3, 1)),
    PrunableLayer("w", "experts", (3, 6, 4)),
    PrunableLayer("w", "experts_transposed", (3, 4, 6)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
@pytest.mark.parametrize("height", [1, 2, 6])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_block_is_assigned_to_one_rank(layer, height, world_size):
    # The offset of each weight when the matrices of the layer are flattened one after the other.
    offsets = torch.empty(layer.shape, dtype=torch.int64)
    first = 0
    for matrix in layer.matrices(offsets):
        matrix.copy_(torch.arange(matrix.numel()).view(matrix.shape) + first)
        first += matrix.numel()
    row_blocks = partition_rows(layer, height, world_size)
    seen = []
    for regions in row_blocks:
        for region in regions:
            part = values_of(region, offsets)
            assert first_offset(layer, region) == int(part.min())
            for matrix in layer.matrices(part):
                assert matrix.shape[0] % height == 0 and matrix.shape[1:] == layer.matrix_shape[1:]
                seen += matrix.reshape(-1).tolist()
    assert seen == list(range(offsets.numel()))
    sizes = [sum(region.numel for region in regions) for regions in row_blocks]
    assert max(sizes) - min(sizes) <= height * layer.matrix_shape[1] * layer.matrix_shape[2]
    shard = Shard(torch.empty(layer.shape))
    shard.regions_by_rank = row_blocks
    assert keeps_units_whole(layer, shard, height, layer.matrix_shape[2])


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
def test_split_inside_units_is_detected(layer):
    shard, columns = Shard(torch.empty(layer.shape)), layer.matrix_shape[2]
    for height in (1, 2, 3):
        assert keeps_units_whole(layer, shard, height, columns)
    size = layer.shape[layer.row_dim]
    start, stop = [0] * len(layer.shape), list(layer.shape)
    stop[layer.row_dim] = 3
    shard.regions_by_rank = ((ShardRegion(tuple(start), tuple(stop)),),)
    assert [keeps_units_whole(layer, shard, height, columns) for height in (1, 2, 3)] == [True, False, True]
    inner = next(dim for dim in range(len(layer.shape)) if dim not in (layer.row_dim, layer.expert_dim))
    stop[layer.row_dim], start[inner] = size, 1
    shard.regions_by_rank = ((ShardRegion(tuple(start), tuple(stop)),),)
    assert not keeps_units_whole(layer, shard, 1, 2)
    # Positions lie between the inputs of a convolution.
    assert keeps_units_whole(layer, shard, 1, 1) == (layer.kind != "conv2d")


def test_shard_is_loaded_from_the_parts_of_any_number_of_ranks():
    shape = (5, 4)
    tensor = entries(shape).float()
    shard = Shard(torch.empty(shape))
    for ends in [(0, 20), (0, 7, 20), (0, 3, 3, 11, 20)]:
        saved = [
            (regions_of_range(shape, first, last), lambda first=first, last=last: tensor.reshape(-1)[first:last])
            for first, last in zip(ends, ends[1:])
        ]
        assert torch.equal(load_local_part(shard, saved, torch.float32), tensor)
        twice = saved + saved  # replicas: two ranks saved the same regions
        assert torch.equal(load_local_part(shard, twice, torch.float32), tensor)
        with pytest.raises(ValueError, match="entries are missing"):
            load_local_part(shard, saved[1:], torch.float32)
    with pytest.raises(ValueError, match="3 entries were saved instead of 20"):
        load_local_part(shard, [((full_region(shape),), lambda: torch.zeros(3))], torch.float32)
