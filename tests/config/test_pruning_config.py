"""PruningConfig: faults told together, recipes, round trips."""

import json

import pytest

from hf_sparse import PruningConfig, PruningConfigError, Requires
from hf_sparse.criteria import CRITERIA


def faults_of(make, *args, **kwargs):
    with pytest.raises(PruningConfigError) as error:
        make(*args, **kwargs)
    assert all(error_text in str(error.value) for error_text in error.value.errors)
    return error.value.errors


def test_every_fault_is_told_at_once():
    errors = faults_of(
        PruningConfig,
        target_sparsity="0.8",
        criterion="magnitud",
        allocation="uniforms",
        scheduler="iterativ",
        sparsity_decay_type="cubik",
        scope="local",
        pattern="4;1",
        on_indivisible="ignore",
        regrow=1.5,
        prune_start=1.5,
        prune_end=float("inf"),
        targets="encoder",
        groups={"ffn": {"patern": "2:4", "target_sparsity": 2, "keep_zeros": True}, "rest": 3},
    )
    expected = [
        "target_sparsity is '0.8': it must be a number.",
        "targets is 'encoder': it must be a list of text, as in [\"*.query\"].",
        'criterion is "magnitud": known are',
        'allocation is "uniforms": known are erdos_renyi, owl, uniform. Did you mean "uniform"?',
        'scheduler is "iterativ": known are',
        'sparsity_decay_type is "cubik": known are cos, cube, cubic, exp, linear. Did you mean "cubic"?',
        'scope is "local": it must be row or layer or global.',
        'on_indivisible is "ignore": it must be error or skip.',
        'unknown pattern "4;1": known are',
        "regrow is 1.5: it must be a number from 0 to 1",
        "prune_start is 1.5: it must be a whole number of steps, or a fraction",
        "prune_end is inf: it must be a whole number of steps, or a fraction",
        'group "ffn": unknown option "patern". Did you mean "pattern"?',
        'group "ffn": unknown option "keep_zeros".',
        'group "ffn": target_sparsity is 2: it must be a number from 0 to 1',
        'group "rest": its options must be a mapping, but are 3.',
    ]
    assert len(errors) == len(expected)
    assert all(any(error_text.startswith(start) for error_text in errors) for start in expected)


@pytest.mark.parametrize(
    "options, error_text",
    [
        ({"target_sparsity": -0.1}, "target_sparsity is -0.1"),
        ({"target_sparsity": float("nan")}, "target_sparsity is nan"),
        ({"target_sparsity": True}, "target_sparsity is True: it must be a number"),
        ({"keep_zeros": "yes"}, "keep_zeros is 'yes': it must be true or false"),
        ({"pattern": 124}, "pattern is 124: it must be text (YAML needs quotes"),
        ({"exclude": ["a", 1]}, "exclude is ['a', 1]: it must be a list of text"),
        ({"prune_every": -1}, "prune_every is -1: it must be a whole number"),
        ({"prune_start": 9, "prune_end": 5}, "prune_start is 9, after prune_end, 5: swap them"),
        ({"target_sparsity": 0.7, "pattern": "2:4"}, 'target_sparsity is 0.7, but pattern "2:4" ends at 0.5'),
        ({"target_sparsity": 0.5, "pattern": "channel", "scope": "row"}, 'scope "row" needs several units in a row'),
        (
            {"target_sparsity": 0.5, "scope": "global", "allocation": "erdos_renyi"},
            "nothing is shared out over layers",
        ),
        ({"target_sparsity": 0.5, "pattern": "channel", "regrow": 0.1}, 'does not go with pattern "channel"'),
        ({"target_sparsity": 0.5, "scope": "row", "regrow": 0.1}, 'and scope "row"'),
        ({"target_sparsity": 0.5, "keep_zeros": True, "regrow": 0.1}, "regrow brings zeros back to life"),
        ({"target_sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity is 0.6, above the target, 0.5"),
        ({"target_sparsity": 0.5, "min_sparsity_per_layer": 0.6}, "min_sparsity_per_layer is 0.6, above the target"),
        ({"target_sparsity": 0.5, "max_sparsity_per_layer": 0.4}, "max_sparsity_per_layer is 0.4, below the target"),
        ({"groups": "{"}, "groups is no JSON object"),
        ({"groups": "[1]"}, "groups is [1]: it must be a mapping"),
    ],
)
def test_single_faults(options, error_text):
    (found,) = faults_of(PruningConfig, **options)
    assert error_text in found


def test_a_fault_of_what_groups_share_is_told_once():
    groups = {"a": {"targets": ["a"]}, "b": {"targets": ["b"]}}
    assert len(faults_of(PruningConfig, target_sparsity=3, prune_end=-1, groups=groups)) == 2


def test_unknown_keys_name_the_nearest_and_come_with_other_faults():
    errors = faults_of(PruningConfig.from_dict, {"target_sparsty": 0.5, "scope": "all", "zzz": 1})
    assert errors[0] == 'unknown option "target_sparsty". Did you mean "target_sparsity"?'
    assert errors[1].startswith('unknown option "zzz". Known are (') and "'scope'" in errors[1]
    assert errors[2].startswith('scope is "all"')
    assert faults_of(PruningConfig.from_dict, {"regro": 0.1}) == ['unknown option "regro". Did you mean "regrow"?']


RECIPE = """
target_sparsity: 0.8
criterion: random
pattern: 4x1
prune_every: 1e-2
groups:
  attention:
    targets: ["*.attention.*"]
  ffn:
    targets: ["*.intermediate", "*.output"]
    pattern: 2:4
    criterion: snip
"""


def test_a_recipe_with_groups(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    config = PruningConfig(pruning_config=str(path), scope="global")
    groups = config.resolve_groups()
    assert list(groups) == ["attention", "ffn"] and config.pruning_config is None
    assert [groups[name].pattern for name in groups] == ["4x1", "2:4"]
    # 0.8 is for those that leave it open; 2:4 cannot have but 0.5
    assert [groups[name].target for name in groups] == [0.8, 0.5]
    assert [groups[name].criterion for name in groups] == ["random", "snip"]
    assert {group.scope for group in groups.values()} == {"global"} and config.prune_every == 0.01
    assert config.prunes


@pytest.mark.parametrize(
    "text, errors",
    [
        ("target_sparsity: [", ["cannot be read"]),
        ("- 1", ["must hold options and their values, but holds list"]),
        ("", ["must hold options and their values, but holds NoneType"]),
        ("!!python/object/apply:os.getcwd []", ["cannot be read: could not determine a constructor"]),
        ("patern: 2:4\nscope: all\n", ['unknown option "patern". Did you mean "pattern"?', 'scope is "all"']),
        ("pruning_config: other.yaml", ['unknown option "pruning_config"']),
        ("target_sparsity: 0.9", ["target_sparsity is 0.5 in the arguments but 0.9 in"]),
    ],
)
def test_faults_of_a_recipe_name_the_file(tmp_path, text, errors):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    found = faults_of(PruningConfig, target_sparsity=0.5, pruning_config=str(path))
    assert len(found) == len(errors)
    assert all(error_text in each for error_text, each in zip(errors, found))
    assert "scope" in text or all(str(path) in each for each in found)


def test_a_missing_recipe_is_told(tmp_path):
    (error_text,) = faults_of(PruningConfig.from_file, tmp_path / "none.yaml")
    assert "none.yaml cannot be read" in error_text and "No such file" in error_text


def test_what_recipe_and_arguments_agree_on_is_no_conflict(tmp_path):
    (tmp_path / "recipe.json").write_text('{"target_sparsity": 0.5, "pattern": "2:4", "exclude": null}')
    config = PruningConfig(target_sparsity=0.5, pruning_config=str(tmp_path / "recipe.json"))
    assert config == PruningConfig(target_sparsity=0.5, pattern="2:4")


def test_round_trips(tmp_path):
    config = PruningConfig(
        target_sparsity=0.9,
        prune_start=0.00001,
        prune_end=100,
        targets=["re:query", "*.key"],
        min_sparsity_per_layer=0.1,
        groups={"a": {"pattern": "2:4", "targets": ["x"]}, "b": {"exclude": ["y"]}},
    )
    assert PruningConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / "config.json")
    assert PruningConfig.from_file(tmp_path / "config.json") == config
    assert PruningConfig(**json.loads((tmp_path / "config.json").read_text())) == config
    assert PruningConfig.from_dict({}) == PruningConfig()


def test_groups_as_a_json_string():
    config = PruningConfig(target_sparsity=0.5, groups='{"ffn": {"targets": ["*.ffn"], "pattern": "4x1"}}')
    assert config.groups == {"ffn": {"targets": ["*.ffn"], "pattern": "4x1"}}


def test_targets_and_whether_there_is_anything_to_do():
    assert [PruningConfig(pattern=pattern).target for pattern in ("2:4", "1:4", "4x1")] == [0.5, 0.75, None]
    assert PruningConfig(pattern="2:4").prunes and PruningConfig(keep_zeros=True).prunes
    assert not PruningConfig().prunes and not PruningConfig(target_sparsity=0.0, pattern="2:4").prunes
    assert PruningConfig(groups={"a": {"target_sparsity": 0.5}, "b": {}}).prunes


def test_nothing_is_shared_between_configs():
    assert not any(isinstance(value, (list, dict, set)) for value in PruningConfig().to_dict().values())
    config = PruningConfig(target_sparsity=0.5, groups={"a": {"targets": ["x"]}})
    config.to_dict()["groups"]["a"]["targets"].append("y")
    assert config.groups == {"a": {"targets": ["x"]}}


def test_a_type_that_went_wrong_later_is_not_passed_over():
    config = PruningConfig(target_sparsity=0.5)
    config.target_sparsity = "0.5"
    assert "target_sparsity is '0.5'" in faults_of(config.resolve_groups)[0]


def test_every_criterion_of_training_is_named_in_the_help():
    text = PruningConfig.__dataclass_fields__["criterion"].metadata["help"]
    assert all(name in text for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS)


def test_prune_end_of_one_is_refused_since_it_is_not_all_of_training():
    with pytest.raises(PruningConfigError, match="prune_end is 1, .* 0.9999 for the last"):
        PruningConfig(target_sparsity=0.5, prune_end=1.0)
