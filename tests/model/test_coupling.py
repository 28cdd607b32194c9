"""Coupled units: what reads a unit is all that a model sees of it."""

import pytest
import torch
from torch import nn

from hf_sparse.model.coupling import UnitGroup, UnitSlice, find_unit_groups
from tests.helpers.architectures import ARCHITECTURES


# name -> (groups of neurons, units of each), (groups of heads, units of each); written down by hand from the configs.
UNITS = {
    "bert": ((2, 24), (2, 2)),
    "gpt2": ((2, 64), (2, 2)),
    "llama": ((2, 24), (2, 1)),
    "t5": ((4, 24), (4, 2)),  # the heads of each stack, and of the cross-attention of two blocks
    "opt": ((2, 24), (2, 2)),
    "mixtral": ((8, 24), (2, 1)),
    "qwen3_moe": ((8, 8), (2, 1)),
    "gpt_oss": ((8, 24), (2, 1)),
    "gemma3": ((2, 24), (2, 1)),
}


def entries(parameter: torch.Tensor, part: UnitSlice, units: torch.Tensor) -> tuple:
    """The index of what units own of a parameter."""
    index = [slice(None)] * parameter.ndim
    index[part.dim] = part.indices(units)
    if part.expert is not None:
        index[0] = part.expert
    return tuple(index)


def logits(model: nn.Module, architecture) -> torch.Tensor:
    with torch.no_grad():
        return model(**architecture.batches(1)[0]).logits


@pytest.mark.parametrize("kind", ["neuron", "head"])
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_reaches_the_model_only_through_what_reads_it(name, kind):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    parameters = dict(model.named_parameters())
    groups = find_unit_groups(model, kind)
    assert (len(groups), groups[0].num_units) == UNITS[name][kind == "head"]
    assert {group.num_units for group in groups} == {groups[0].num_units}
    for part in (part for group in groups for part in group.slices):
        assert part.offset + groups[0].num_units * part.width <= parameters[part.name].shape[part.dim]

    pruned = {group.name: torch.arange(0, group.num_units, 2) for group in groups}
    dense = logits(model, architecture)
    with torch.no_grad():
        for group in groups:
            for part in group.readers:
                parameters[part.name][entries(parameters[part.name], part, pruned[group.name])] = 0
    zeroed = logits(model, architecture)
    with torch.no_grad():
        for group in groups:
            for part in group.slices:
                if not part.reads:
                    index = entries(parameters[part.name], part, pruned[group.name])
                    parameters[part.name][index] += torch.randn(parameters[part.name][index].shape)
    changed = logits(model, architecture)
    assert torch.equal(changed, zeroed)
    assert not torch.allclose(zeroed, dense, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2"])
def test_a_block_without_its_units_is_the_identity(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    parameters = dict(model.named_parameters())
    first, second = find_unit_groups(model, "layer")
    with torch.no_grad():
        for part in first.slices:
            parameters[part.name].zero_()
        states = model(**architecture.batches(1)[0], output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[0])
    assert second.num_units == 1 and not torch.equal(states[2], states[1])


def test_units_of_sharded_experts_and_tables():
    (encoder, *_) = find_unit_groups(ARCHITECTURES["t5"].model(), "head")
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert encoder.attached == (UnitSlice(table, dim=1, width=1),)
    assert {part.name.split(".")[2] for part in encoder.slices} == {"0", "1"}


def test_other_structures_have_no_units():
    model = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 5)}), nn.Linear(4, 4)])
    assert [find_unit_groups(model, kind) for kind in ("neuron", "head", "value", "layer")] == [[]] * 4
    with pytest.raises(ValueError, match='"neurons": known are neuron, head, value and layer'):
        find_unit_groups(model, "neurons")


def test_a_model_on_the_meta_device_has_the_same_units():
    architecture = ARCHITECTURES["llama"]
    assert find_unit_groups(architecture.model().to("meta"), "head") == find_unit_groups(architecture.model(), "head")
    assert isinstance(find_unit_groups(architecture.model(), "head")[0], UnitGroup)
