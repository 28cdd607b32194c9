"""The trace of a model: subgraphs in order, shared inputs, last modules."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import nn

from hf_sparse.model.layers import find_layers
from hf_sparse.oneshot.tracing import trace_model


def traced(name, sequential=True, exclude=()):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    layers = [layer for layer in find_layers(model) if layer.in_body and not layer.module.endswith(tuple(exclude))]
    return trace_model(model, layers, architecture.batches()[0], sequential), layers


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_subgraphs_are_in_the_order_of_the_blocks(name):
    architecture = ARCHITECTURES[name]
    trace, layers = traced(name, exclude=("dt_proj",))
    blocks = [subgraph.name for subgraph in trace.subgraphs if subgraph.block_list is not None]
    assert [f"{block}." for block in blocks] == list(architecture.blocks)
    assert sorted(layer.name for subgraph in trace.subgraphs for layer in subgraph.layers) == sorted(
        layer.name for layer in layers
    )
    for subgraph in trace.subgraphs:
        if subgraph.block_list is not None:
            assert all(layer.name.startswith(f"{subgraph.name}.") for layer in subgraph.layers)
    outside = {
        subgraph.name: [layer.module for layer in subgraph.layers]
        for subgraph in trace.subgraphs
        if subgraph.block_list is None
    }
    assert outside == {
        "opt": {"before the blocks": ["model.decoder.project_in"], "after the blocks": ["model.decoder.project_out"]},
        "bert": {"after the blocks": ["bert.pooler.dense"]},
    }.get(name, {})


def test_modules_with_the_same_input_map_to_the_first():
    shared = {name.split("layers.0.")[-1]: first for name, first in traced("llama")[0].shared_inputs.items()}
    same = {name: first.split("layers.0.")[-1] for name, first in shared.items() if "layers.1" not in name}
    assert same == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    trace, _ = traced("bart")
    assert trace.shared_inputs["model.decoder.layers.1.encoder_attn.v_proj"].endswith("layers.1.encoder_attn.k_proj")


def test_inputs_are_not_shared_across_blocks():
    """In T5 every block of the decoder reads the same output of the encoder."""
    trace, _ = traced("t5")
    for module, first in trace.shared_inputs.items():
        assert module.split(".layer.")[0] == first.split(".layer.")[0]


@pytest.mark.parametrize(
    "name, last", [("llama", "mlp.down_proj"), ("qwen3_moe", "mlp.experts"), ("bert", "output.dense")]
)
def test_the_last_module_of_a_block(name, last):
    trace, _ = traced(name)
    for subgraph in trace.subgraphs:
        if subgraph.block_list is not None:
            assert trace.last_module[subgraph.name] == f"{subgraph.name}.{last}"


def test_not_sequential_is_one_subgraph():
    trace, layers = traced("t5", sequential=False)
    (subgraph,) = trace.subgraphs
    assert subgraph.name == "the whole model" and len(subgraph.layers) == len(layers) and subgraph.block_list is None


def test_inputs_that_were_changed_in_place_or_whose_memory_was_reused_are_not_shared():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            y = self.a(x)
            x = x.clone()
            z = self.b(x)
            x += 1  # in place: the same memory, other numbers
            z = z + self.c(x)
            for _ in range(2):
                y = self.d(y.relu())
            return y + z

    model = nn.Sequential(Block())
    trace = trace_model(model, find_layers(model), torch.ones(2, 4), True)
    assert trace.shared_inputs == {f"0.{name}": f"0.{name}" for name in "abcd"}
    assert trace.repeated == {"0.d"} and trace.last_module == {}


def test_the_model_is_restored():
    model = ARCHITECTURES["bert"].model().train()
    trace_model(model, find_layers(model)[:2], ARCHITECTURES["bert"].batches()[0], True)
    assert model.training and not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_after_the_last_layer_that_is_pruned_do_not_run():
    model = ARCHITECTURES["llama"].model()
    layers = [layer for layer in find_layers(model) if "layers.0" in layer.name]
    trace = trace_model(model, layers, ARCHITECTURES["llama"].batches()[0], True)
    assert [subgraph.name for subgraph in trace.subgraphs] == ["model.layers.0"]
