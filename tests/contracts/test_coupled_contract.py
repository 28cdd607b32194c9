"""The contract of coupled patterns (neurons, heads, layers), for a tiny model of each type: which units are pruned, by
a reference that computes scores from the definition; that they are pruned whole; and that `shrink` removes them."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.invariants import Spy, exactly_positive_zero
from helpers.masks import read_masks
from helpers.model_types import MODEL_TYPES
from helpers.tiny import SCHEDULE, STEPS, bert, content, make, same, weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_sparse import Pruner, PruningConfig, PruningConfigError, Requires, SparsityCallback
from hf_sparse.criteria import CRITERIA
from hf_sparse.model.coupling import find_unit_groups
from hf_sparse.patterns import PATTERNS, get_pattern
from hf_sparse.structured.shrink import plan_shrink, shrink


COUPLED = [PATTERNS[name].example for name in PATTERNS.names() if PATTERNS[name].coupled_kind is not None]
PATTERNS_OF_UNITS = sorted({*COUPLED, "neuron:1"})
CRITERIA_IN_TRAINING = [name for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS]


def entries(tensor, part, unit):
    """The entries of a parameter that belong to a unit, by the definition of `UnitSlice`."""
    array = np.asarray(tensor.detach().float())
    dim = part.dim
    if part.expert is not None:
        array, dim = array[part.expert], dim - 1
    first = part.offset + unit * part.width
    return array.take(range(first, first + part.width), axis=dim).reshape(-1)


def unit_values(groups, tensors, names):
    """All entries of each unit in the parameters `names`: [group][unit] -> array."""
    return [
        [
            np.concatenate([entries(tensors[part.name], part, unit) for part in group.slices if part.name in names])
            for unit in range(group.num_units)
        ]
        for group in groups
    ]


def weight_names(groups, model):
    """The names of the weights among the parameters of units; the others are biases."""
    parameters = dict(model.named_parameters())
    names = {name for group in groups for name in group.parameters}
    return {name for name in names if parameters[name].ndim > 1 and not name.endswith("bias")}


def num_pruned(pattern, ratio, units):
    """Of neurons, the number kept is rounded to a multiple, 8 for "neuron"; one is kept, but of layers."""
    if pattern.startswith("neuron"):
        multiple = int(pattern.partition(":")[2] or 8)
        return units - min(units, max(1, math.floor((units - round(ratio * units)) / multiple + 0.5)) * multiple)
    return min(round(ratio * units), units - 1)


def fill(model, seed=0, eighths=False):
    """Random values everywhere, biases too. Eighths have many ties and exact sums."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1 + 0.01
            parameter.copy_((values * 8).round() / 8 if eighths else values)
    return model


def pruned_by_group(groups, model, masks):
    """Which units of each group are pruned. No unit is pruned in part."""
    tensors = {name: masks[name] for group in groups for name in group.parameters}
    pruned = []
    for values in unit_values(groups, tensors, set(tensors)):
        assert all(len(set(kept.tolist())) == 1 for kept in values)
        pruned.append(np.array([not kept[0] for kept in values]))
    return pruned


def lowest(scores, count):
    is_lowest = np.zeros(len(scores), dtype=bool)
    is_lowest[np.argsort(scores, kind="stable")[:count]] = True
    return is_lowest


@pytest.mark.parametrize("pattern", PATTERNS_OF_UNITS)
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_the_units_with_the_lowest_mean_scores_are_pruned_whole(name, pattern):
    model = MODEL_TYPES[name].make()
    groups = find_unit_groups(model, get_pattern(pattern).coupled_kind)
    if not groups:
        with pytest.raises(PruningConfigError, match=f'`pattern` "{pattern}" finds none of its units'):
            Pruner(model, PruningConfig(target_sparsity=0.5, pattern=pattern))
        return
    names = weight_names(groups, model)
    scores = [
        np.array([np.abs(unit).astype(np.float64).mean() for unit in units]).astype(np.float32)
        for units in unit_values(groups, dict(model.named_parameters()), names)
    ]
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, pattern=pattern, criterion="magnitude"))
    assert set(pruner.shards) == {name for group in groups for name in group.parameters}
    for prune_step in (1, 2, 3):
        report = pruner.update(prune_step, 3)
        ratio = 0.5 * (1 - (1 - prune_step / 3) ** 3)
        if pattern == "layer":
            expected = lowest(np.concatenate(scores), num_pruned(pattern, ratio, len(groups)))[:, None]
        else:
            expected = [lowest(part, num_pruned(pattern, ratio, len(part))) for part in scores]
        found = pruned_by_group(groups, model, pruner.masks)
        assert all((left == right).all() for left, right in zip(found, expected, strict=True)), prune_step
        zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in names)
        assert {layer.name for layer in report.layers} == names and report.zeros == zeros
        assert pruner.sparsity() == report.sparsity == zeros / report.selected


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", ["neuron", "neuron:1", "head"])
@pytest.mark.parametrize("criterion", CRITERIA_IN_TRAINING)
def test_every_criterion_is_pooled_over_the_weights_of_a_unit(criterion, pattern, scope):
    model = fill(bert(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=40))
    groups = find_unit_groups(model, get_pattern(pattern).coupled_kind)
    names = weight_names(groups, model)
    options = {"pattern": pattern, "criterion": criterion, "scope": scope, "initial_sparsity": 0.2}
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, **options))
    for prune_step in (1, 2):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * prune_step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        pruner.observe()
        before = pruned_by_group(groups, model, pruner.masks)
        (group,) = pruner.groups
        totals = group.scored_statistics(pruner.shards, pruner.masks)
        if not group.criterion.requires & Requires.POSITION:  # whose scores depend on where a weight is
            scores = {name: group.criterion.score(model.get_parameter(name), totals.get(name)) for name in names}
            means = [
                np.array([unit.mean(dtype=np.float64) for unit in part]) for part in unit_values(groups, scores, names)
            ]
            means = [np.where(gone, -np.inf, part) for part, gone in zip(means, before)]
        pruner.update(prune_step, 2)
        found = pruned_by_group(groups, model, pruner.masks)
        ratio = 0.5 - 0.3 * (1 - prune_step / 2) ** 3
        if scope == "layer":
            counts = [num_pruned(pattern, ratio, group.num_units) for group in groups]
            assert [int(part.sum()) for part in found] == counts
        elif pattern != "neuron":  # whose counts are rounded for each layer
            assert sum(int(part.sum()) for part in found) == round(ratio * sum(group.num_units for group in groups))
        assert all((~gone | part).all() for gone, part in zip(before, found))
        if not group.criterion.requires & Requires.POSITION:
            for part, mean in zip(found, means, strict=True):
                assert 0 < part.sum() < len(part) and mean[part].max() <= mean[~part].min()


def test_ties_are_pruned_by_position_and_regardless_of_chunks(monkeypatch):
    digests = set()
    for chunk in (262_080, 7):
        monkeypatch.setattr("hf_sparse.numerics.CPU_CHUNK", chunk)
        model = bert(num_hidden_layers=2)
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        pruner = Pruner(model, PruningConfig(target_sparsity=0.5, pattern="neuron", criterion="magnitude"))
        pruner.update(1, 1)
        assert all(pruner.masks[name].view(-1)[-1] for name in pruner.masks)
        assert not pruner.masks["bert.encoder.layer.0.intermediate.dense.bias"][:16].any()
        digests.add(pruner.masks.digest())
    assert len(digests) == 1


def test_random_scores_and_chunks(monkeypatch):
    digests = set()
    for chunk in (262_080, 7):
        monkeypatch.setattr("hf_sparse.numerics.CPU_CHUNK", chunk)
        pruner = Pruner(bert(), PruningConfig(target_sparsity=0.5, pattern="neuron:1", criterion="random"))
        pruner.update(1, 1)
        digests.add(pruner.masks.digest())
    assert len(digests) == 1


def test_global_scope_keeps_a_unit_of_every_layer_and_multiples_of_neurons():
    model = fill(bert(num_hidden_layers=3))
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight.mul_(1e-3)
        model.bert.encoder.layer[1].output.dense.weight.mul_(1e-3)
        model.bert.encoder.layer[1].attention.output.dense.weight.mul_(1e-3)
        for name in ("query", "key", "value"):
            getattr(model.bert.encoder.layer[1].attention.self, name).weight.mul_(1e-3)
    for pattern, kept in (("neuron", 8), ("neuron:1", 1), ("head", 1)):
        pruner = Pruner(
            model, PruningConfig(target_sparsity=0.6, pattern=pattern, scope="global", criterion="magnitude")
        )
        pruner.update(1, 1)
        pruned = pruned_by_group(find_unit_groups(model, pattern.partition(":")[0]), model, pruner.masks)
        counts = [int((~part).sum()) for part in pruned]
        assert counts[1] == kept and (pattern != "neuron" or all(count % 8 == 0 for count in counts))


def test_allocation_and_bounds():
    model = fill(bert(num_hidden_layers=2))
    options = {"pattern": "neuron:1", "criterion": "magnitude"}
    groups = find_unit_groups(model, "neuron")

    def counts(**more):
        pruner = Pruner(fill(bert(num_hidden_layers=2)), PruningConfig(**options | more))
        pruner.update(1, 1)
        return [int(part.sum()) for part in pruned_by_group(groups, model, pruner.masks)]

    assert counts(target_sparsity=0.33) == [13, 13]  # 0.33 of 40 is 13.2; of 80, 26.4
    assert counts(target_sparsity=1.0) == [40, 40]
    assert counts(target_sparsity=0.99) == [39, 39]
    assert sum(counts(target_sparsity=0.5, allocation="erdos_renyi")) == 40
    bounded = counts(target_sparsity=0.5, scope="global", min_sparsity_per_layer=0.45, max_sparsity_per_layer=0.55)
    assert sum(bounded) == 40 and min(bounded) >= 18


def test_kept_zeros_are_those_of_weights_and_of_biases_of_zero_units():
    model = fill(bert())
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        for parameter in (layer.intermediate.dense.weight[:20], layer.output.dense.weight[:, :20]):
            parameter.zero_()
        layer.intermediate.dense.bias[[3, 30]] = 0.0
        layer.output.dense.weight[5, 31] = 0.0
    pruner = Pruner(model, PruningConfig(pattern="neuron", keep_zeros=True, target_sparsity=0.0))
    bias = pruner.masks["bert.encoder.layer.0.intermediate.dense.bias"]
    assert (~bias).nonzero().flatten().tolist() == [3]
    assert not pruner.masks["bert.encoder.layer.0.output.dense.weight"][5, 31]
    pruner = Pruner(model, PruningConfig(pattern="neuron", keep_zeros=True, target_sparsity=0.6, criterion="random"))
    pruner.update(1, 1)
    assert not pruner.masks["bert.encoder.layer.0.intermediate.dense.bias"][:20].any()
    assert pruner.masks["bert.encoder.layer.0.intermediate.dense.bias"].sum() == 16


def test_nan_scores_name_the_module():
    model = fill(bert())
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, pattern="neuron", criterion="magnitude"))
    with pytest.raises(ValueError, match=r'scores are nan in "bert\.encoder\.layer\.0"'):
        pruner.update(1, 1)


# Whole runs

GROUPS = {
    "ffn": {"pattern": "neuron", "target_sparsity": 0.4},
    "attention": {"pattern": "head", "target_sparsity": 0.5, "criterion": "taylor"},
}


def test_neurons_and_heads_of_one_run_are_zero_in_its_files_and_leave_with_shrink(tmp_path):
    """Heads of BERT cannot leave: its config has no field for them."""
    options = {"groups": GROUPS, "criterion": "snip_momentum", **SCHEDULE, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, model=fill(bert(num_hidden_layers=2)), save_strategy="steps", save_steps=5, **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for checkpoint in tmp_path.glob("checkpoint-*"):
        saved, masks = load_file(checkpoint / "model.safetensors"), dict(read_masks(checkpoint))
        assert len([name for name in masks if name.endswith("bias")]) == 2 * 4
        assert all(exactly_positive_zero(saved[name], mask) for name, mask in masks.items())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert same(weights(plain), weights(trainer.model))
    for kind, count in (("neuron", 16), ("head", 1)):
        groups = find_unit_groups(plain, kind)
        zeros = {name: plain.get_parameter(name) != 0 for group in groups for name in group.parameters}
        assert [int(part.sum()) for part in pruned_by_group(groups, plain, zeros)] == [count, count]
    plan = plan_shrink(plain)
    assert [(change.before, change.after) for change in plan.changes] == [(40, 24)]
    assert any("heads" in reason for reason in plan.kept)
    shrink(plain)  # which compares the outputs
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Whole neurons of feed-forward networks are zero" in card and "Whole attention heads are zero" in card


@pytest.mark.parametrize("feature", [{"optim": "adamw_torch_fused", "bf16": True}, {"gradient_accumulation_steps": 2}])
def test_zeros_hold_at_every_event(tmp_path, feature):
    options = {"pattern": "neuron:1", "target_sparsity": 0.5, "criterion": "snip_momentum", "eval_strategy": "steps"}
    trainer = make(tmp_path, model=fill(bert()), eval_steps=3, **options, **SCHEDULE, **feature)
    spy = Spy(trainer.sparsity_callback, unit=2 * 24 + 1)
    trainer.add_callback(spy)
    trainer.train()
    assert spy.pruned_at[STEPS] == 20 * 49


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    options = {"groups": GROUPS, "criterion": "snip_momentum", **SCHEDULE, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path / "whole", **options).train()
    for step in (1, 5, 9):
        resumed = make(tmp_path / f"from{step}", model=bert(seed=99), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        last = f"checkpoint-{STEPS}"
        assert content(tmp_path / f"from{step}" / last) == content(tmp_path / "whole" / last), step


# Refusals

REFUSED = {
    "scope_row": ({"pattern": "neuron", "scope": "row"}, '`scope` "row" needs several units in a row'),
    "scope_of_layers": ({"pattern": "layer", "scope": "layer"}, "a layer is one unit, so that only layers compete"),
    "allocation_of_layers": (
        {"pattern": "layer", "allocation": "erdos_renyi"},
        '`allocation` is "erdos_renyi", but with `pattern` "layer" a layer is one unit',
    ),
    "granet": (
        {"pattern": "head", "algorithm": "granet"},
        '`algorithm` "granet" exchanges single weights, N:M or blocks, not units of `pattern` "head"',
    ),
    "multiple": ({"pattern": "neuron:0"}, "keeps a multiple of 0 neurons: it must be at least 1"),
    "inputs": ({"pattern": "neuron", "criterion": "wanda"}, "needs inputs of the weights, which training does not"),
    "no_match": ({"pattern": "neuron", "targets": ["*.query"]}, "matches none of the 2 prunable parameters"),
    "nothing_left": (
        {"pattern": "neuron", "exclude": ["*.intermediate.*"]},
        "nothing is left to prune: `targets=['all-blocks']`, `exclude=['*.intermediate.*']`",
    ),
    "twice": (
        {"groups": {"a": {"pattern": "neuron"}, "b": {"pattern": "layer"}}},
        'output.dense.weight" is in the groups "a" and "b": narrow one.',
    ),
    "twice_with_weights": (
        {"groups": {"a": {"pattern": "neuron"}, "b": {"targets": ["*.intermediate.*"]}}},
        'intermediate.dense.weight" is in the groups "a" and "b": narrow one.',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_impossible_is_refused_before_training(case):
    options, message = REFUSED[case]
    with pytest.raises(PruningConfigError, match=re.escape(message)):
        Pruner(bert(), PruningConfig(target_sparsity=0.5, **options))


def test_models_without_such_units_are_refused():
    with pytest.raises(PruningConfigError, match='`pattern` "head" finds none of its units in Sequential: choose'):
        Pruner(nn.Sequential(nn.Linear(4, 4)), PruningConfig(target_sparsity=0.5, pattern="head"))


def test_targets_select_units_by_any_of_their_weights():
    model = bert(num_hidden_layers=3)
    options = {"target_sparsity": 0.5, "pattern": "neuron", "criterion": "magnitude"}
    pruner = Pruner(model, PruningConfig(targets=["*.intermediate.dense"], exclude=["*.1.output.dense"], **options))
    assert [group.name for group in pruner.groups[0].units] == ["bert.encoder.layer.0", "bert.encoder.layer.2"]
    assert len(pruner.shards) == 6


WARNINGS = {
    "heads_of_bert": (bert, {"pattern": "head"}, 'of group "weights": the config of a "bert" model has no field'),
    "layers_of_bert": (bert, {"pattern": "layer"}, "a block of zeros is not the identity"),
    "global": (bert, {"pattern": "neuron", "scope": "global"}, 'use `scope="layer"` and `allocation="uniform"`'),
    "allocation": (
        bert,
        {"pattern": "neuron", "allocation": "erdos_renyi"},
        'use `scope="layer"` and `allocation="uniform"`',
    ),
    "some_layers": (
        lambda: bert(num_hidden_layers=2),
        {"pattern": "neuron", "exclude": ["*.layer.1.*"]},
        "1 of 2 modules with neurons are selected, but the config has one size for all of them",
    ),
    "other_models": (
        lambda: nn.ModuleList([nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))]),
        {"pattern": "neuron"},
        "no config of ModuleList",
    ),
    "neurons": (lambda: bert(num_hidden_layers=2), {"pattern": "neuron"}, None),
    "key_value_groups": (MODEL_TYPES["llama"].make, {"pattern": "head"}, None),
    "layers": (MODEL_TYPES["llama"].make, {"pattern": "layer"}, None),
    "encoder": (MODEL_TYPES["bart"].make, {"pattern": "neuron", "targets": ["re:encoder"]}, None),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_shrink_cannot_remove_is_said_before_training(case, caplog):
    make_model, options, message = WARNINGS[case]
    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, **options))
    callback.check(TrainingArguments("unused", use_cpu=True), make_model())
    assert (message in caplog.text) if message else not caplog.text
