"""What one forward shows: stages in order, inputs that are shared, where a forward may end."""

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

from hf_sparse.oneshot.probe import look
from hf_sparse.targets import find_layers


def looked(name, sequential=True, exclude=()):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    layers = [layer for layer in find_layers(model) if layer.in_base and not layer.module.endswith(tuple(exclude))]
    return look(model, layers, architecture.batches()[0], sequential), layers


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_stages_follow_each_other_as_the_blocks_do(name):
    architecture = ARCHITECTURES[name]
    probe, layers = looked(name, exclude=("dt_proj",))
    blocks = [stage.name for stage in probe.stages if stage.stack is not None]
    assert [f"{block}." for block in blocks] == list(architecture.blocks)
    assert sorted(layer.name for stage in probe.stages for layer in stage.layers) == sorted(
        layer.name for layer in layers
    )
    for stage in probe.stages:
        if stage.stack is not None:
            assert all(layer.name.startswith(f"{stage.name}.") for layer in stage.layers)
    outside = {stage.name: [layer.module for layer in stage.layers] for stage in probe.stages if stage.stack is None}
    assert outside == {
        "opt": {"before the blocks": ["model.decoder.project_in"], "after the blocks": ["model.decoder.project_out"]},
        "bert": {"after the blocks": ["bert.pooler.dense"]},
    }.get(name, {})


def test_weights_that_get_the_same_numbers_have_one_leader():
    leaders = {name.split("layers.0.")[-1]: leader for name, leader in looked("llama")[0].leaders.items()}
    same = {name: leader.split("layers.0.")[-1] for name, leader in leaders.items() if "layers.1" not in name}
    assert same == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    probe, _ = looked("bart")
    assert probe.leaders["model.decoder.layers.1.encoder_attn.v_proj"].endswith("layers.1.encoder_attn.k_proj")


def test_leaders_do_not_cross_blocks():
    """In T5 every block of the decoder reads the same output of the encoder."""
    probe, _ = looked("t5")
    for module, leader in probe.leaders.items():
        assert module.split(".layer.")[0] == leader.split(".layer.")[0]


@pytest.mark.parametrize(
    "name, last", [("llama", "mlp.down_proj"), ("qwen3_moe", "mlp.experts"), ("bert", "output.dense")]
)
def test_a_forward_may_end_at_the_last_layer_of_a_block(name, last):
    probe, _ = looked(name)
    for stage in probe.stages:
        if stage.stack is not None:
            assert probe.last[stage.name] == f"{stage.name}.{last}"


def test_one_row_is_enough_and_is_counted():
    probe, _ = looked("llama")
    assert probe.tokens == 10 and probe.seconds > 0 and probe.repeated == frozenset()  # the first row has no padding


def test_all_at_once_is_one_stage():
    probe, layers = looked("t5", sequential=False)
    (stage,) = probe.stages
    assert stage.name == "the whole model" and len(stage.layers) == len(layers) and stage.stack is None


def test_inputs_that_were_changed_or_whose_memory_was_used_again_are_not_the_same():
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
    probe = look(model, find_layers(model), torch.ones(2, 4), True)
    assert probe.leaders == {f"0.{name}": f"0.{name}" for name in "abcd"}
    assert probe.repeated == {"0.d"} and probe.last == {}


def test_the_model_is_as_before():
    model = ARCHITECTURES["bert"].model().train()
    look(model, find_layers(model)[:2], ARCHITECTURES["bert"].batches()[0], True)
    assert model.training and not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_after_the_last_layer_that_is_pruned_do_not_run():
    model = ARCHITECTURES["llama"].model()
    layers = [layer for layer in find_layers(model) if "layers.0" in layer.name]
    probe = look(model, layers, ARCHITECTURES["llama"].batches()[0], True)
    assert [stage.name for stage in probe.stages] == ["model.layers.0"]
