"""Blocks are found by structure, and a pipeline computes each once per batch."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import nn

from hf_sparse.model.blocks import find_block_lists, group_by_block
from hf_sparse.model.evaluation_mode import evaluation_mode
from hf_sparse.model.layers import find_layers
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


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_block_lists_of_every_architecture(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    layers = [layer for layer in find_layers(model) if layer.in_body]
    blocks = [f"{block}." for stack in find_block_lists(model, layers).values() for block in stack]
    assert blocks == list(architecture.blocks)
    parts = group_by_block(model, layers)
    assert sorted(layer.name for part in parts for layer in part) == sorted(layer.name for layer in layers)
    for part in parts:
        prefixes = {next((block for block in blocks if layer.name.startswith(block)), None) for layer in part}
        assert len(prefixes) == 1


def test_lists_without_layers_are_not_block_lists(model):
    layers = find_layers(model)
    assert find_block_lists(model, layers) == {
        "first": ["first.0", "first.1", "first.2"],
        "second": ["second.0", "second.1"],
    }
    assert list(find_block_lists(model, [layer for layer in layers if "second" in layer.name])) == ["second"]


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


def experts_of(model):
    """How the experts of a model are computed."""
    return model.config._experts_implementation


def test_evaluation_mode():
    model = ARCHITECTURES["qwen3_moe"].model().train()
    model.config.use_cache = True
    model.model.layers[1].mlp.eval()
    model.set_experts_implementation("grouped_mm")
    for raising in (False, True):
        try:
            with evaluation_mode(model):
                assert not any(module.training for module in model.modules())
                assert model.config.use_cache is False and experts_of(model) == "eager"
                if raising:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert model.config.use_cache is True and experts_of(model) == "grouped_mm"
        assert model.training and not model.model.layers[1].mlp.training and model.model.layers[0].mlp.training
