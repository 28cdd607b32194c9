"""ResolvedGroup: every default is filled in once, and engine, report and card read it."""

import dataclasses

import pytest
from helpers.mixed import Mixed
from torch import nn

from hf_sparse import OneshotConfig, Pruner, PruningConfig, Requires, prune_oneshot
from hf_sparse.config import ResolvedGroup
from hf_sparse.hub.card import SparsityCard
from hf_sparse.model.layers import find_layers


NOTHING, POSITION, GRADIENTS = Requires.NOTHING, Requires.POSITION, Requires.GRADIENTS
NORMS, GRAM, DENSE_NORMS = Requires.INPUT_NORMS, Requires.GRAM, Requires.DENSE_NORMS
COMMON = {"pattern": "unstructured", "allocation": "uniform", "solver": "none", "target": 0.5}
DEFAULTS = {
    PruningConfig: {
        **COMMON,
        "criterion": "snip_momentum",
        "scope": "global",
        "scheduler": "iterative",
        "requires": GRADIENTS,
    },
    OneshotConfig: {**COMMON, "criterion": "wanda", "scope": "row", "scheduler": "oneshot", "requires": NORMS},
}
"""What target sparsity 0.5 alone resolves to."""
HALF = {"target_sparsity": 0.5}
ERDOS_RENYI = {"target_sparsity": 0.5, "allocation": "erdos_renyi"}
MAGNITUDE = {"criterion": "magnitude", "requires": NOTHING}
SPARSEGPT = {"criterion": None, "scope": "layer", "solver": "sparsegpt", "requires": GRAM}
CASES = {
    PruningConfig: [
        ({}, {"target": 0.0, "requires": NOTHING}),
        (HALF, {}),
        ({"pattern": "1:4"}, {"pattern": "1:4", "target": 0.75}),
        ({"pattern": "2:4", "target_sparsity": 0.0}, {"pattern": "2:4", "target": 0.0, "requires": NOTHING}),
        (HALF | {"pattern": "4x1"}, {"pattern": "4x1"}),
        (HALF | {"pattern": "channel"}, {"pattern": "channel", "scope": "layer"}),
        (HALF | {"criterion": "magnitude"}, MAGNITUDE),
        (HALF | {"criterion": "random"}, {"criterion": "random", "requires": POSITION}),
        (ERDOS_RENYI, {"allocation": "erdos_renyi", "scope": "layer"}),
        (ERDOS_RENYI | {"scope": "row"}, {"allocation": "erdos_renyi", "scope": "row"}),
        (HALF | {"prune_start": 5, "prune_end": 5}, {"scheduler": "oneshot"}),
        (HALF | {"prune_start": 0.0, "prune_end": 0.0, "scheduler": "iterative"}, {"scheduler": "iterative"}),
        (HALF | {"scheduler": "oneshot"}, {"scheduler": "oneshot"}),
    ],
    OneshotConfig: [
        ({}, {"target": 0.0, "requires": NOTHING}),
        (HALF, {}),
        ({"pattern": "2:4"}, {"pattern": "2:4"}),
        (HALF | {"pattern": "channel:in"}, {"pattern": "channel:in", "scope": "layer"}),
        (HALF | {"criterion": "magnitude"}, {"scope": "layer", **MAGNITUDE}),
        (HALF | {"criterion": "magnitude", "scope": "global"}, {"scope": "global", **MAGNITUDE}),
        (HALF | {"criterion": "snip"}, {"criterion": "snip", "scope": "global", "requires": GRADIENTS}),
        (ERDOS_RENYI, {"allocation": "erdos_renyi"}),
        (ERDOS_RENYI | {"criterion": "magnitude"}, {"allocation": "erdos_renyi", "scope": "layer", **MAGNITUDE}),
        (HALF | {"allocation": "owl"}, {"allocation": "owl", "requires": NORMS | DENSE_NORMS}),
        (HALF | {"solver": "sparsegpt"}, SPARSEGPT),
        (HALF | {"solver": "admm"}, SPARSEGPT | {"solver": "admm"}),
        (HALF | {"solver": "admm", "scope": "row"}, SPARSEGPT | {"solver": "admm", "scope": "row"}),
        (HALF | {"solver": "sparsegpt", "criterion": "wanda"}, {"solver": "sparsegpt", "requires": GRAM | NORMS}),
        ({"solver": "sparsegpt", "keep_zeros": True}, {**SPARSEGPT, "target": 0.0, "requires": NOTHING}),
    ],
}


def summary(group):
    return {
        "criterion": group.criterion_name,
        "pattern": str(group.pattern),
        "scope": group.scope,
        "allocation": group.allocation_name,
        "solver": group.solver_name,
        "scheduler": type(group.scheduler).__name__.removesuffix("Scheduler").lower(),
        "target": group.target,
        "requires": group.requires,
    }


@pytest.mark.parametrize(
    "config, options, changes", [(config, *case) for config, cases in CASES.items() for case in cases]
)
def test_defaults_by_hand(config, options, changes):
    expected = DEFAULTS[config] | changes
    (group,) = config(**options).resolve_groups().values()
    assert summary(group) == expected
    assert (group.name, group.layers) == ("weights", ())
    most = 1.0 if group.pattern.max_sparsity < 1 or not group.pattern.has_layers else 0.995
    assert (group.min_sparsity_per_layer, group.max_sparsity_per_layer) == (0.0, most)
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.scope = "row"

    del expected["requires"]
    if not expected["target"]:  # nothing is pruned, so no method is named
        expected = dict.fromkeys(expected) | {name: expected[name] for name in ("pattern", "target")}
    assert group.to_dict() == {"group": "weights", **expected}


GROUPS = {
    "linear": {"targets": ["linear"], "pattern": "2:4"},
    "kernel": {"targets": ["conv*"], "pattern": "channel", "criterion": "magnitude", "max_sparsity_per_layer": 0.75},
    "experts": {"targets": ["*.up"], "target_sparsity": 0.25, "criterion_kwargs": {"decay": 0.5}},
}


def test_engine_report_and_card_read_the_resolved_groups():
    config = PruningConfig(target_sparsity=0.5, groups=GROUPS)
    groups = list(config.resolve_groups().values())
    assert [(group.criterion_name, str(group.pattern), group.scope) for group in groups] == [
        ("snip_momentum", "2:4", "global"),
        ("magnitude", "channel", "layer"),
        ("snip_momentum", "unstructured", "global"),
    ]
    assert [group.max_sparsity_per_layer for group in groups] == [1.0, 0.75, 0.995]

    model = Mixed()
    pruner = Pruner(model, config)
    layers = [[layer.name for layer in group.layers] for group in pruner.groups]
    assert layers == [["linear.weight"], ["conv1d.weight", "conv2d.weight"], ["experts.up", "transposed.up"]]
    for group, resolved in zip(pruner.groups, groups, strict=True):
        fields = {field.name for field in dataclasses.fields(ResolvedGroup)} - {"layers", "scheduler"}
        assert all(getattr(group.options, name) == getattr(resolved, name) for name in fields)
        assert type(group.options.scheduler) is type(resolved.scheduler)
    report = pruner.report()
    assert [layer.group for layer in report.layers] == ["linear", "kernel", "kernel", "experts", "experts"]
    assert [layer.pattern for layer in report.layers] == ["2:4", *["channel"] * 2, *["unstructured"] * 2]
    assert report.target == pruner.target == (0.5 * 128 + 0.5 * 192 + 0.25 * 128) / 448

    card = SparsityCard("mixed", report, config.to_dict())
    assert card.settings == [group.to_dict() for group in groups]
    assert card.settings[2]["criterion_kwargs"] == {"decay": 0.5}
    assert card.hub_metadata()["sparsity"]["scope"] == ["global", "layer"]
    oneshot = OneshotConfig(target_sparsity=0.5, groups={"a": {"targets": ["linear"], "criterion": "magnitude"}})
    card = SparsityCard("mixed", prune_oneshot(Mixed(), None, oneshot), oneshot.to_dict(), oneshot=True)
    assert card.settings == [group.to_dict() for group in oneshot.resolve_groups().values()]
    assert card.settings[0]["scope"] == "layer"


def test_layers_are_added_once_the_model_is_known():
    (group,) = PruningConfig(target_sparsity=0.5, pattern="2x1", criterion="magnitude").resolve_groups().values()
    layers = find_layers(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    resolved = group.with_layers(layers)
    assert group.layers == () and resolved.layers == tuple(layers)
    assert [resolved.num_units(layer) for layer in layers] == [12, 6]
    assert dataclasses.replace(resolved, layers=()) == group


def test_the_default_bound_of_layers_leaves_room_for_any_target():
    """Half of what the target leaves of an average layer, where that is less than the default leaves."""

    def bound(target_sparsity=None, **options):
        config = PruningConfig(target_sparsity=target_sparsity, criterion="magnitude", **options)
        (group,) = config.resolve_groups().values()
        return round(group.max_sparsity_per_layer, 6)

    assert [bound(target) for target in (0.5, 0.98, 0.99, 0.999, 1.0)] == [0.995, 0.995, 0.995, 0.9995, 1.0]
    assert bound(0.8, max_sparsity_per_layer=1.0) == 1.0 and bound(0.8, max_sparsity_per_layer=0.9) == 0.9
    assert bound(pattern="2:4") == 1.0 and bound(0.5, pattern="layer") == 1.0 and bound(0.5, pattern="neuron") == 0.995
    groups = {"all": {"targets": ["*"], "max_sparsity_per_layer": None}}
    assert bound(0.5, groups=groups) == 0.995


def test_a_config_of_an_earlier_version_selects_what_it_selected():
    """Earlier versions have written all options, and None for those whose default has become another one."""
    earlier = PruningConfig(target_sparsity=0.5).to_dict() | {"targets": None, "max_sparsity_per_layer": None}
    (group,) = PruningConfig.from_dict(earlier).resolve_groups().values()
    assert (group.targets, group.max_sparsity_per_layer) == (["all-body"], 1.0)
    (group,) = PruningConfig.from_dict({"target_sparsity": 0.5, "targets": None}).resolve_groups().values()
    assert group.targets == ["all-blocks"]
    copied = PruningConfig.from_dict(PruningConfig(target_sparsity=0.5).to_dict())
    assert copied == PruningConfig(target_sparsity=0.5)
