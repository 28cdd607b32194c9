"""OneshotConfig: options of its own, errors reported together, reading and writing."""

import json

import pytest

from hf_sparse import OneshotConfig, PruningConfig, Requires
from hf_sparse.config import PruningConfigError
from hf_sparse.config.quality import QUALITIES


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forwards": 3}, "`forwards` is 3: it must be 1 or 2"),
        ({"forwards": 1, "sequential": False}, "`forwards=1` prunes while data passes through"),
        (
            {"solver": "sparsegpt", "solver_kwargs": {"dampening": 1.5}},
            '`solver_kwargs`: solver "sparsegpt": "dampening" is 1.5: it must be from 0 to 1, as in 0.01.$',
        ),
        (
            {"solver": "sparsegpt", "solver_kwargs": {"dampening": "much"}},
            'option "dampening" of solver "sparsegpt" is \'much\': it must be a number',
        ),
        (
            {"solver": "sparsegpt", "solver_kwargs": {"block_size": 0}},
            '"block_size" is 0: it must be 1 or more, as in 128',
        ),
        ({"activations": "dsk"}, '`activations` is "dsk": it must be device or cpu or disk. Did you mean "disk"'),
        ({"on_unreached": "skip"}, '`on_unreached` is "skip": it must be error or magnitude'),
        ({"criterion": "wnda"}, '`criterion` is "wnda": .* Did you mean "wanda"'),
        ({"solver": "sparsegpt", "scope": "row"}, '`scope` is "row", but `solver` "sparsegpt" selects within a layer'),
        (
            {"pattern": "2:4", "scope": "row"},
            '`scope` has no effect, because units of `pattern` "2:4" compete within their group: leave `scope` out.',
        ),
        (
            {"target_sparsity": 0.5, "groups": {"a": {"targets": ["a"], "pattern": "1:4", "scope": "layer"}, "b": {}}},
            'group "a": `scope` has no effect, because units of `pattern` "1:4" compete within their group',
        ),
        (
            {"solver": "admm", "scope": "global"},
            '`scope` is "global", but `solver` "admm" selects within a layer or a row: use `scope="layer"` or '
            '`scope="row"`, or',
        ),
        (
            {"solver": "sparsegpt", "pattern": "channel"},
            'cannot select units of `pattern` "channel".*name a criterion',
        ),
        ({"swaps": -1}, "`swaps` is -1: it must be 0, to leave the mask as it is, or more"),
        ({"swaps": 2.5}, "`swaps` is 2.5: it must be a whole number"),
        ({"swaps": 9, "solver": "sparsegpt"}, '`swaps` is 9, but `solver` "sparsegpt" selects.*name a criterion'),
        (
            {"swaps": 9, "pattern": "4x1"},
            '`swaps` is 9, but with `pattern` "4x1" units are not single weights: use `swaps=0`',
        ),
        ({"swaps": 9, "pattern": "neuron"}, 'with `pattern` "neuron" units are not single weights'),
        (
            {"criterion": "obert"},
            '`criterion` "obert" needs the gradients of many optimizer steps, and one-shot pruning',
        ),
        ({"criterion": "snip_momentum"}, '`criterion` "snip_momentum" weights later batches more'),
        ({"layer_sparsity": {"a": 2.0}}, r'group "a": .*`target_sparsity` is 2.0'),
        ({"layer_sparsity": "[1]"}, r"`layer_sparsity` is \[1\]: it must be a mapping"),
        ({"layer_sparsity": "{"}, "`layer_sparsity` is '{': it must be a JSON object"),
        ({"layer_sparsity": {"a": 0.5}, "targets": ["a"]}, "leave `targets` out"),
        ({"groups": {"g": {"forwards": 1}}}, 'unknown option "forwards"'),
        ({"quality": "better"}, '`quality` is "better": it must be fast or good or best. Did you mean "best"'),
        (
            {"quality": "good", "solver_kwargs": {"steps": 3}},
            'has no option "steps"[^$]*`quality` "good" sets `solver="sparsegpt"`: give others, or leave it out.$',
        ),
        ({"quality": "good", "target_sparsity": 2.0}, "^`target_sparsity` is 2.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(PruningConfigError, match=message):
        OneshotConfig(**options)


def test_all_errors_are_reported_together():
    with pytest.raises(PruningConfigError) as raised:
        OneshotConfig(forwards=0, solver="sparsegpt", solver_kwargs={"dampening": -1}, target_sparsity=7)
    assert len(raised.value.errors) == 3


def methods(**options):
    """Criterion, scope, solver and allocation of each group, and whether blocks are reconstructed."""
    config = OneshotConfig(**options)
    assert OneshotConfig.from_dict(config.to_dict()) == config
    groups = config.resolve_groups().values()
    found = [(group.criterion_name, group.scope, group.solver_name, group.allocation_name) for group in groups]
    return found, config.reconstruct


def test_a_quality_fills_the_options_that_are_not_given():
    for pattern in ("unstructured", "2:4", "4x1", "channel:in", "neuron", "head", "layer"):
        options = {} if pattern == "2:4" else {"target_sparsity": 0.5}
        assert methods(quality="fast", pattern=pattern, **options) == methods(pattern=pattern, **options)
        found = [methods(quality=quality, pattern=pattern, **options) for quality in QUALITIES]
        assert [reconstruct for _, reconstruct in found] == [False, False, pattern != "layer"]
        if pattern != "layer":
            assert found[0] != found[1] != found[2]
    half = {"target_sparsity": 0.5, "quality": "best"}
    ((_, _, solver, allocation),), _ = methods(**half)
    assert methods(quality="best", pattern="2:4") == ([(None, "layer", solver, "uniform")], True)
    # What is given stays, and what it rules out is not added.
    assert methods(**half, solver="none", allocation="erdos_renyi", reconstruct=False) == (
        [("wanda", "row", "none", "erdos_renyi")],
        False,
    )
    assert methods(**half, criterion="ria") == ([("ria", "layer", solver, allocation)], True)
    assert methods(**half, criterion="snip") == ([("snip", "global", solver, "uniform")], True)
    assert methods(**half, swaps=9)[0] == [("wanda", "row", solver, allocation)]
    assert methods(**half, scope="global") == ([("wanda", "global", solver, "uniform")], True)
    assert methods(**half, sequential=False)[1] is False and methods(**half, forwards=1)[1] is False
    assert methods(quality="best", layer_sparsity={"*.up": 0.5}) == ([(None, "layer", solver, "uniform")], True)
    groups = {"a": {"targets": ["a"], "pattern": "2:4"}, "b": {"targets": ["b"], "solver": "none"}}
    assert methods(**half, groups=groups) == (
        [(None, "layer", solver, "uniform"), ("wanda", "row", "none", allocation)],
        True,
    )
    assert groups["a"] == {"targets": ["a"], "pattern": "2:4"}
    assert methods(**half, groups=groups | {"c": {"targets": ["c"], "pattern": "layer"}})[1] is False


def test_swaps_of_one_group():
    config = OneshotConfig(target_sparsity=0.5, criterion="magnitude", groups={"a": {"swaps": 9}, "b": {}})
    a, b = config.resolve_groups().values()
    assert a.to_dict()["swaps"] == 9 and a.requires_calibration and a.requires == Requires.GRAM
    assert "swaps" not in b.to_dict() and not b.requires_calibration


def test_default_criterion():
    def criterion(**options):
        (group,) = OneshotConfig(**options).resolve_groups().values()
        return group.criterion_name

    assert criterion() == "wanda" and criterion(solver="sparsegpt") is None
    assert criterion(solver="sparsegpt", criterion="magnitude") == "magnitude"


def test_each_entry_of_layer_sparsity_is_a_group():
    text = json.dumps({"*.q": 0.25, "*.k": 0.5})
    for given in (text, json.loads(text)):
        config = OneshotConfig(layer_sparsity=given, solver="sparsegpt")
        groups = config.resolve_groups()
        assert {name: (group.targets, group.target) for name, group in groups.items()} == {
            "*.q": (["*.q"], 0.25),
            "*.k": (["*.k"], 0.5),
        }


def test_files(tmp_path):
    config = OneshotConfig(
        layer_sparsity={"*.q": 0.25}, forwards=1, solver="sparsegpt", solver_kwargs={"dampening": 0.1}, pattern="2x2"
    )
    config.save(tmp_path / "config.json")
    assert OneshotConfig.from_file(tmp_path / "config.json") == config == OneshotConfig.from_dict(config.to_dict())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('solver: sparsegpt\nforwards: 1\nlayer_sparsity:\n  "*.q": 0.5\n')
    config = OneshotConfig.from_file(recipe)
    assert config.forwards == 1 and config.solver == "sparsegpt" and list(config.groups) == ["*.q"]
    recipe.write_text("forward: 1\n")
    with pytest.raises(PruningConfigError, match='unknown option "forward".*Did you mean "forwards"'):
        OneshotConfig.from_file(recipe)


def test_from_any_config():
    config = OneshotConfig(forwards=1)
    assert OneshotConfig.of(config) is config
    plain = PruningConfig(target_sparsity=0.5, criterion="magnitude", groups={"a": {"targets": ["x"]}})
    oneshot = OneshotConfig.of(plain)
    shared = set(PruningConfig.options()) & set(OneshotConfig.options())
    assert {name: getattr(oneshot, name) for name in shared} == {name: getattr(plain, name) for name in shared}
