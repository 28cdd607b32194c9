"""Boxes and what moves between them, with the processes of this test in one."""

import itertools
import math

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
from hf_sparse.distributed.communicator import Communicator
from hf_sparse.model.layers import PrunableLayer
from hf_sparse.selection.row_blocks import first_offset, keeps_units_whole, partition_rows


SHAPES = [(7,), (5, 4), (3, 4, 2), (2, 3, 2, 2)]
CUTS = [[0], [1, 5], [3, 3, 4], [6, 2]]


def entries(shape):
    return torch.arange(math.prod(shape)).view(shape)


def inside(box, tensor):
    return tensor[box.slices_in(full_region(tensor.shape))]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_range_of_places_is_a_few_boxes_in_order(shape):
    everything = entries(shape)
    for first, last in itertools.combinations_with_replacement(range(everything.numel() + 1), 2):
        boxes = regions_of_range(shape, first, last)
        found = torch.cat([inside(box, everything).reshape(-1) for box in boxes]) if boxes else torch.empty(0)
        assert found.tolist() == list(range(first, last))
        assert len(boxes) <= 2 * len(shape) - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_are_the_places_of_a_box(shape):
    everything = entries(shape)
    ranges = [[(first, last) for first in range(size) for last in range(first + 1, size + 1)] for size in shape]
    regular = 0
    for corners in itertools.product(*ranges):
        box = ShardRegion(*map(tuple, zip(*corners)))
        runs = box.contiguous_runs(shape)
        places = inside(box, everything).reshape(-1).tolist()
        assert places[0] == box.flat_offset(shape)
        if runs is not None:
            regular += 1
            count, length, stride = runs
            assert places == [places[0] + run * stride + index for run in range(count) for index in range(length)]
    assert regular
    for dim, size in enumerate(shape):  # what one dimension cuts is always regular
        box = ShardRegion(tuple(0 if d != dim else 1 for d in range(len(shape))), shape)
        assert size == 1 or box.contiguous_runs(shape) is not None


class Mail:
    """What the processes of a test send each other: each is asked in turn, twice."""

    def __init__(self, size):
        self.sent = [None] * size

    def process(self, rank):
        mail = self

        class Process(Communicator):
            world_size = len(mail.sent)

            def all_to_all(self, tensors, lengths):
                mail.sent[rank] = tensors
                assert all(sent is None or len(sent[rank]) == size for sent, size in zip(mail.sent, lengths))
                return [sent[rank] if sent else tensors[0].new_empty(0) for sent in mail.sent]

        Process.rank = rank
        return Process()


def mask_of(tensor):
    return -(tensor % 3 == 0).to(torch.int8)


def moved(tensor, sources, targets):
    """What each process gets, when each holds its sources of `tensor`."""
    mail, results = Mail(len(sources)), [None] * len(sources)
    mask = mask_of(tensor)
    for rank in 2 * list(range(len(sources))):  # the second time everything has been sent
        parts, masks = ([inside(box, entire) for box in sources[rank]] for entire in (tensor, mask))
        try:
            loads = [Transfer(parts, sources, targets, tensor), Transfer(masks, sources, targets, mask, packed=True)]
            results[rank] = list(redistribute(loads, mail.process(rank)))
        except RuntimeError:  # nothing has come yet
            continue
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("ends", [(0, 3, 20), (0, 0, 20), (0, 7, 7, 13, 20)])
def test_what_moves_arrives_and_comes_back(ends, dtype):
    shape = (5, 4)
    tensor = entries(shape).to(dtype)
    ranges = [regions_of_range(shape, first, last) for first, last in zip(ends, ends[1:])]
    size = len(ranges)
    columns = [(ShardRegion((0, rank), (5, rank + 1)),) if rank < 3 else () for rank in range(size)]
    columns[-1] = (ShardRegion((0, size - 1), (5, 4)),)
    everywhere = [(full_region(shape),)] * size
    for sources, targets in [(ranges, columns), (columns, ranges), (ranges, everywhere), (columns, everywhere)]:
        for boxes, (parts, masks) in zip(targets, moved(tensor, sources, targets), strict=True):
            for box, part, mask in zip(boxes, parts, masks, strict=True):
                assert part.dtype == dtype and torch.equal(part, inside(box, tensor))
                assert torch.equal(mask, inside(box, mask_of(tensor)))


LAYERS = [
    PrunableLayer("w", "linear", (6, 4)),
    PrunableLayer("w", "conv1d", (4, 6)),
    PrunableLayer("w", "conv2d", (6, 2, 3, 1)),
    PrunableLayer("w", "experts", (3, 6, 4)),
    PrunableLayer("w", "experts_transposed", (3, 4, 6)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
@pytest.mark.parametrize("height", [1, 2, 6])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_row_is_dealt_to_one_process_whole(layer, height, processes):
    """A tensor that says where each weight is in the matrices, flattened one after the other."""
    places = torch.empty(layer.shape, dtype=torch.int64)
    first = 0
    for matrix in layer.matrices(places):
        matrix.copy_(torch.arange(matrix.numel()).view(matrix.shape) + first)
        first += matrix.numel()
    row_blocks = partition_rows(layer, height, processes)
    seen = []
    for boxes in row_blocks:
        for box in boxes:
            part = places[box.slices_in(full_region(layer.shape))]
            assert first_offset(layer, box) == int(part.min())
            for matrix in layer.matrices(part):
                assert matrix.shape[0] % height == 0 and matrix.shape[1:] == layer.matrix_shape[1:]
                seen += matrix.reshape(-1).tolist()
    assert seen == list(range(places.numel()))
    sizes = [sum(box.numel for box in boxes) for boxes in row_blocks]
    assert max(sizes) - min(sizes) <= height * layer.matrix_shape[1] * layer.matrix_shape[2]
    shard = Shard(torch.empty(layer.shape))
    shard.regions_by_rank = row_blocks
    assert keeps_units_whole(layer, shard, height, layer.matrix_shape[2])


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
def test_a_split_through_units_is_noticed(layer):
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


def test_parts_saved_by_some_are_put_together_by_others():
    shape = (5, 4)
    tensor = entries(shape).float()
    shard = Shard(torch.empty(shape))
    for ends in [(0, 20), (0, 7, 20), (0, 3, 3, 11, 20)]:
        saved = [
            (regions_of_range(shape, first, last), lambda first=first, last=last: tensor.reshape(-1)[first:last])
            for first, last in zip(ends, ends[1:])
        ]
        assert torch.equal(load_local_part(shard, saved, torch.float32), tensor)
        twice = saved + saved  # two processes with the same part
        assert torch.equal(load_local_part(shard, twice, torch.float32), tensor)
        with pytest.raises(ValueError, match="entries are missing"):
            load_local_part(shard, saved[1:], torch.float32)
    with pytest.raises(ValueError, match="3 entries were saved instead of 20"):
        load_local_part(shard, [((full_region(shape),), lambda: torch.zeros(3))], torch.float32)
