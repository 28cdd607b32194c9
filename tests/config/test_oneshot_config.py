"""OneshotConfig: what PruningConfig has and more; faults told together; read and written."""

import json

import pytest

from hf_sparse import OneshotConfig, PruningConfig
from hf_sparse.config import PruningConfigError


@pytest.mark.parametrize(
    "options, words",
    [
        ({"forwards": 3}, "forwards is 3: it must be 1 or 2"),
        ({"forwards": 1, "sequential": False}, "forwards=1 prunes while data passes through"),
        ({"dampening": 1.5}, "dampening is 1.5: it must be a number from 0 to 1, as in 0.01"),
        ({"dampening": "much"}, "dampening is much"),
        ({"solver_block": 0}, "solver_block is 0: it must be a whole number, 1 or more"),
        ({"activations": "dsk"}, 'activations is "dsk": it must be device or cpu or disk. Did you mean "disk"'),
        ({"on_unreached": "skip"}, 'on_unreached is "skip": it must be error or magnitude'),
        ({"criterion": "wnda"}, 'criterion is "wnda": .* Did you mean "wanda"'),
        ({"solver": "sparsegpt", "scope": "row"}, 'scope is "row", but solver "sparsegpt" chooses within a layer'),
        ({"solver": "sparsegpt", "pattern": "channel"}, 'cannot choose for pattern "channel".*name a criterion'),
        ({"criterion": "snip_momentum"}, 'criterion "snip_momentum" lets later batches count more'),
        ({"layer_sparsity": {"a": 2.0}}, r'group "a": .*target_sparsity is 2.0'),
        ({"layer_sparsity": "[1]"}, r"layer_sparsity is \[1\]: it must be a mapping"),
        ({"layer_sparsity": "{"}, "layer_sparsity is no JSON object"),
        ({"layer_sparsity": {"a": 0.5}, "targets": ["a"]}, "leave targets out"),
        ({"groups": {"g": {"forwards": 1}}}, 'unknown option "forwards"'),
    ],
)
def test_faults(options, words):
    with pytest.raises(PruningConfigError, match=words):
        OneshotConfig(**options)


def test_all_faults_together():
    with pytest.raises(PruningConfigError) as raised:
        OneshotConfig(forwards=0, dampening=-1, target_sparsity=7)
    assert len(raised.value.errors) == 3


def test_criteria_that_are_left_out():
    def criterion(**options):
        (group,) = OneshotConfig(**options).resolve_groups(oneshot=True).values()
        return group.criterion

    assert criterion() == "wanda" and criterion(solver="sparsegpt") is None
    assert criterion(solver="sparsegpt", criterion="magnitude") == "magnitude"


def test_each_entry_of_layer_sparsity_is_a_group():
    text = json.dumps({"*.q": 0.25, "*.k": 0.5})
    for given in (text, json.loads(text)):
        config = OneshotConfig(layer_sparsity=given, solver="sparsegpt")
        groups = config.resolve_groups(oneshot=True)
        assert {name: (group.targets, group.target) for name, group in groups.items()} == {
            "*.q": (["*.q"], 0.25),
            "*.k": (["*.k"], 0.5),
        }


def test_written_and_read(tmp_path):
    config = OneshotConfig(layer_sparsity={"*.q": 0.25}, forwards=1, dampening=0.1, pattern="2x2")
    config.save(tmp_path / "config.json")
    assert OneshotConfig.from_file(tmp_path / "config.json") == config == OneshotConfig.from_dict(config.to_dict())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('solver: sparsegpt\nforwards: 1\nlayer_sparsity:\n  "*.q": 0.5\n')
    config = OneshotConfig.from_file(recipe)
    assert config.forwards == 1 and config.solver == "sparsegpt" and list(config.groups) == ["*.q"]
    recipe.write_text("forward: 1\n")
    with pytest.raises(PruningConfigError, match='unknown option "forward".*Did you mean "forwards"'):
        OneshotConfig.from_file(recipe)


def test_of_any_config():
    config = OneshotConfig(forwards=1)
    assert OneshotConfig.of(config) is config
    plain = PruningConfig(target_sparsity=0.5, criterion="magnitude", groups={"a": {"targets": ["x"]}})
    found = OneshotConfig.of(plain)
    shared = set(PruningConfig.options()) & set(OneshotConfig.options())
    assert {name: getattr(found, name) for name in shared} == {name: getattr(plain, name) for name in shared}
