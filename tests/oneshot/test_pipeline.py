"""A pipeline computes each block once per batch."""

import pytest
import torch
from torch import nn

from hf_sparse.oneshot.pipeline import BlockPipeline, StopForward, Subgraph


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 3), 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.layer(x) * scale


class Model(nn.Module):
    """Two block lists; the output of the first is an input of every block of the second."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Counted() for _ in range(3))
        self.second = nn.ModuleList(Counted() for _ in range(2))
        self.end = nn.Linear(3, 1)

    def forward(self, x):
        for block in self.first:
            x = block(x)
        y = x
        for block in self.second:
            y = block(y, scale=x.mean())
        return self.end(y)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


BATCHES = [torch.arange(6.0).view(2, 3), torch.ones(4, 3)]


def test_each_block_computes_once_for_each_batch(model):
    expected = [model(batch) for batch in BATCHES]
    outputs = [model.first[0](batch) for batch in BATCHES]
    calls = [block.calls for block in (*model.first, *model.second)]
    with BlockPipeline(model, BATCHES) as pipeline:
        for block_list, count in (("first", 3), ("second", 2)):
            for number in range(count):
                subgraph = Subgraph(f"{block_list}.{number}", (), block_list)
                assert not pipeline.is_propagated(subgraph)
                if (block_list, number) == ("first", 0):
                    assert all(
                        torch.equal(pipeline.block_output("first.0", index), outputs[index]) for index in range(2)
                    )
                    calls[0] += 2
                pipeline.propagate(subgraph)
                assert pipeline.is_propagated(subgraph)
        assert all(torch.equal(pipeline.forward(index), expected[index]) for index in range(2))
        assert not pipeline.forward(0).requires_grad
    assert [block.calls for block in (*model.first, *model.second)] == [count + 2 for count in calls]
    assert all("forward" not in block.__dict__ for block in (*model.first, *model.second))
    assert torch.equal(model(BATCHES[0]), expected[0]) and model(BATCHES[0]).requires_grad


def test_a_forward_stops_at_the_end_of_its_subgraph(model):
    seen = []
    with BlockPipeline(model, BATCHES) as pipeline:
        pipeline.run_until(Subgraph("first.1", (), "first"), seen.append)
        assert seen == [0, 1] and [block.calls for block in model.first] == [2, 2, 0]
        pipeline.run_until(Subgraph("before the blocks", (), stop_before="first.1"))
        assert [block.calls for block in model.first] == [4, 2, 0]
        pipeline.run_until(Subgraph("after the blocks", ()))
        assert model.first[2].calls == model.second[1].calls == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_forwards_of_blocks_are_restored_after_an_exception(model):
    def special(x, scale=1.0):
        return x

    model.first[0].forward = special
    with pytest.raises(KeyError):
        with BlockPipeline(model, BATCHES) as pipeline:
            pipeline.propagate(Subgraph("first.0", (), "first"))
            pipeline.propagate(Subgraph("first.1", (), "first"))
            raise KeyError
    assert model.first[0].forward is special and "forward" not in model.first[1].__dict__
    assert torch.is_grad_enabled()


def test_a_block_that_a_batch_does_not_reach(model):
    model.forward = lambda x: x
    with (
        BlockPipeline(model, BATCHES) as pipeline,
        pytest.raises(ValueError, match='batch 1 does not reach the block "first.2"'),
    ):
        pipeline.block_output("first.2", 1)


def test_stop_forward_is_not_an_exception():
    assert not issubclass(StopForward, Exception)
