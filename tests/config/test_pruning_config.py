"""PruningConfig: errors reported together, recipes, round trips."""

import json

import pytest

from hf_sparse import PruningConfig, PruningConfigError, Requires
from hf_sparse.criteria import CRITERIA
from hf_sparse.registry import format_options


def errors_of(make, *args, **kwargs):
    with pytest.raises(PruningConfigError) as error:
        make(*args, **kwargs)
    assert all(text in str(error.value) for text in error.value.errors)
    return error.value.errors


def test_every_error_is_reported_at_once():
    errors = errors_of(
        PruningConfig,
        target_sparsity="0.8",
        criterion="magnitud",
        allocation="uniforms",
        scheduler="iterativ",
        sparsity_decay_type="cubik",
        scope="local",
        pattern="4;1",
        on_indivisible="ignore",
        algorithm="rig",
        prune_start=1.5,
        prune_end=float("inf"),
        targets="encoder",
        groups={"ffn": {"patern": "2:4", "target_sparsity": 2, "keep_zeros": True}, "rest": 3},
    )
    expected = [
        "`target_sparsity` is '0.8': it must be a number.",
        "`targets` is 'encoder': it must be a list of text, as in [\"*.query\"].",
        '`criterion` is "magnitud": known are',
        '`allocation` is "uniforms": known are dlp, erdos_renyi, global, lsa, owl, uniform. Did you mean "uniform"?',
        '`scheduler` is "iterativ": known are',
        '`sparsity_decay_type` is "cubik": known are cos, cube, cubic, exp, linear. Did you mean "cubic"?',
        '`scope` is "local": it must be row or layer or global.',
        '`on_indivisible` is "ignore": it must be error or skip.',
        'unknown pattern "4;1": known are',
        '`algorithm` is "rig": known are',
        "`prune_start` is 1.5: it must be a whole number of steps, or a fraction",
        "`prune_end` is inf: it must be a whole number of steps, or a fraction",
        'group "ffn": unknown option "patern". Did you mean "pattern"?',
        'group "ffn": unknown option "keep_zeros".',
        'group "ffn": `target_sparsity` is 2: it must be a number from 0 to 1',
        'group "rest": its options must be a mapping, but are 3.',
    ]
    assert len(errors) == len(expected)
    assert all(any(text.startswith(start) for text in errors) for start in expected)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"target_sparsity": -0.1}, "`target_sparsity` is -0.1"),
        ({"target_sparsity": float("nan")}, "`target_sparsity` is nan"),
        ({"target_sparsity": True}, "`target_sparsity` is True: it must be a number"),
        ({"keep_zeros": "yes"}, "`keep_zeros` is 'yes': it must be true or false"),
        ({"pattern": 124}, "`pattern` is 124: it must be text (YAML needs quotes"),
        ({"exclude": ["a", 1]}, "`exclude` is ['a', 1]: it must be a list of text"),
        ({"prune_every": -1}, "`prune_every` is -1: it must be a whole number"),
        ({"prune_start": 9, "prune_end": 5}, "`prune_start` is 9, after `prune_end`, 5: swap them"),
        ({"target_sparsity": 0.7, "pattern": "2:4"}, '`target_sparsity` is 0.7, but `pattern` "2:4" always gives 0.5'),
        ({"target_sparsity": 0.5, "pattern": "channel", "scope": "row"}, '`scope` "row" needs several units in a row'),
        (
            {"target_sparsity": 0.5, "scope": "global", "allocation": "erdos_renyi"},
            '`allocation` is "erdos_renyi", but `scope` "global" distributes nothing over layers',
        ),
        (
            {"target_sparsity": 0.5, "pattern": "channel", "algorithm": "granet"},
            '`algorithm` "granet" exchanges single weights, N:M or blocks, not units of `pattern` "channel": choose',
        ),
        (
            {"target_sparsity": 0.5, "pattern": "neuron", "algorithm": "rigl"},
            '`algorithm` "rigl" exchanges single weights, N:M or blocks, not units of `pattern` "neuron": choose',
        ),
        (
            {"target_sparsity": 0.5, "keep_zeros": True, "algorithm": "acdc"},
            '`algorithm` "acdc" restores pruned weights and `keep_zeros` forbids it: leave `keep_zeros` out',
        ),
        (
            {"target_sparsity": 0.5, "initial_sparsity": 0.2, "algorithm": "set"},
            '`initial_sparsity` is 0.2, but `algorithm` "set" sets the sparsity itself: leave `initial_sparsity` out.',
        ),
        (
            {"target_sparsity": 0.5, "sparsity_decay_type": "cos", "algorithm": "rigl"},
            "`sparsity_decay_type` is 'cos', but `algorithm` \"rigl\" sets the sparsity itself",
        ),
        (
            {"target_sparsity": 0.5, "criterion": "obert", "algorithm": "rigl"},
            '`criterion` "obert" updates the weights that remain, also those that `algorithm` "rigl" lets return at '
            "zero",
        ),
        (
            {"algorithm": "rigl", "algorithm_kwargs": {"fraction": 1.5}},
            '`algorithm_kwargs`: algorithm "rigl": "fraction" is 1.5: it must be a number from 0 to 1, as in 0.3.',
        ),
        (
            {"algorithm": "set", "algorithm_kwargs": {"decay": "cosin"}},
            '"decay" is "cosin": known are cosine, linear, constant. Did you mean "cosine"?',
        ),
        (
            {"algorithm": "set", "algorithm_kwargs": {"initial_mask": "snip"}},
            '"initial_mask" is "snip": it must be a criterion that can score weights before training, one of '
            "magnitude,",
        ),
        (
            {"algorithm": "acdc", "algorithm_kwargs": {"compressed_phases": 0}},
            '"compressed_phases" is 0: it must be at least 1, as in 5.',
        ),
        ({"target_sparsity": 0.5, "initial_sparsity": 0.6}, "`initial_sparsity` is 0.6, above the target, 0.5"),
        ({"target_sparsity": 0.5, "min_sparsity_per_layer": 0.6}, "`min_sparsity_per_layer` is 0.6, above the target"),
        ({"target_sparsity": 0.5, "max_sparsity_per_layer": 0.4}, "`max_sparsity_per_layer` is 0.4, below the target"),
        (
            {"target_sparsity": 0.5, "initial_sparsity": 0.2, "scheduler": "oneshot"},
            "`initial_sparsity` has no effect, because the target is reached in the first prune step: leave it out, "
            "or",
        ),
        (
            {"target_sparsity": 0.5, "sparsity_decay_type": "cos", "prune_start": 5, "prune_end": 5},
            "`sparsity_decay_type` has no effect, because the target is reached in the first prune step",
        ),
        (
            {"target_sparsity": 0.5, "scheduler": "oneshot", "prune_start": 0.8, "prune_end": 0.9},
            "`prune_end` has no effect, because the target is reached in the first prune step: use `prune_end=0.8`",
        ),
        (
            {"target_sparsity": 0.5, "prune_start": 5, "prune_end": 5, "prune_every": 2},
            "`prune_every` has no effect, because the target is reached in the first prune step: leave it out, or use",
        ),
        (
            {"pattern": "2:4", "scope": "row", "scheduler": "oneshot"},
            '`scope` has no effect, because units of `pattern` "2:4" compete within their group: leave `scope` out.',
        ),
        (
            {"pattern": "2:4", "scope": "row", "prune_start": 5, "prune_end": 5},
            '`scope` has no effect, because units of `pattern` "2:4" compete within their group: leave `scope` out.',
        ),
        (
            {"pattern": "2:4", "allocation": "erdos_renyi"},
            '`allocation` is "erdos_renyi", but `pattern` "2:4" gives every layer 0.5: leave `allocation` out',
        ),
        ({"groups": "{"}, "`groups` is '{': it must be a JSON object"),
        ({"groups": "[1]"}, "`groups` is [1]: it must be a mapping"),
    ],
)
def test_single_errors(options, text):
    (error,) = errors_of(PruningConfig, **options)
    assert text in error


@pytest.mark.parametrize(
    "options",
    [
        {"prune_start": 0.8, "prune_end": 0.8},
        {"prune_end": 0.9, "rewind": 0.1},
        {"prune_end": 0.9, "penalty": "l1"},
        {"prune_end": 0.9, "prune_every": 0.1, "algorithm": "granet"},
        {"prune_end": 0.9, "groups": {"a": {"targets": ["a"]}, "b": {"targets": ["b"], "scheduler": "iterative"}}},
    ],
    ids=str,
)
def test_the_last_prune_step_of_the_oneshot_scheduler_may_matter(options):
    """It begins rewinding, ends a penalty, and prune steps of other algorithms and groups change masks."""
    assert PruningConfig(target_sparsity=0.5, scheduler="oneshot", **options).prune_end == options["prune_end"]


def test_an_error_in_options_that_groups_share_is_reported_once():
    groups = {"a": {"targets": ["a"]}, "b": {"targets": ["b"]}}
    assert len(errors_of(PruningConfig, target_sparsity=3, prune_end=-1, groups=groups)) == 2


def test_groups_whose_pattern_implies_a_target_do_not_inherit_an_allocation():
    groups = {"a": {"targets": ["a"], "pattern": "2:4"}, "b": {"targets": ["b"]}}
    config = PruningConfig(target_sparsity=0.5, allocation="erdos_renyi", scope="layer", groups=groups)
    found = {name: group.allocation_name for name, group in config.resolve_groups().items()}
    assert found == {"a": "uniform", "b": "erdos_renyi"}


@pytest.mark.parametrize(
    "options, unused",
    [
        ({}, []),
        ({"distill_teacher": "self", "distill_alpha": 0.5}, []),
        ({"pattern": "4x1", "prune_end": 0.5}, ["pattern", "prune_end"]),
        ({"criterion": "magnitude", "groups": {"a": {"targets": ["*"]}}}, ["criterion", "groups"]),
        ({"criterion": "magnitude", "target_sparsity": 0.0}, []),  # which says that nothing is pruned
        ({"criterion": "magnitude", "groups": {"a": {"targets": ["*"], "pattern": "2:4"}}}, []),
        ({"keep_zeros": True, "targets": ["*"]}, []),
        ({"keep_zeros": True, "scope": "layer"}, ["scope"]),
    ],
)
def test_options_without_anything_to_prune(options, unused):
    config = PruningConfig(**options)
    assert sorted(config.unused_options) == unused
    assert (config.unused_error() or "").startswith(format_options(config.unused_options))


def test_unknown_options_name_the_nearest_and_come_with_other_errors():
    errors = errors_of(PruningConfig.from_dict, {"target_sparsty": 0.5, "scope": "all", "zzz": 1})
    assert errors[0] == 'unknown option "target_sparsty". Did you mean "target_sparsity"?'
    assert errors[1].startswith('unknown option "zzz". Known are ') and ", scope, " in errors[1]
    assert errors[2].startswith('`scope` is "all"')
    (error,) = errors_of(PruningConfig.from_dict, {"algoritm": "set"})
    assert error == 'unknown option "algoritm". Did you mean "algorithm"?'


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
    assert [str(groups[name].pattern) for name in groups] == ["4x1", "2:4"]
    # 2:4 implies 0.5, so the shared target is not for it
    assert [groups[name].target for name in groups] == [0.8, 0.5]
    assert [groups[name].criterion_name for name in groups] == ["random", "snip"]
    assert {group.scope for group in groups.values()} == {"global"} and config.prune_every == 0.01
    assert config.prunes


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("target_sparsity: [", ["cannot be read"]),
        ("- 1", ["must hold options and their values, but holds list"]),
        ("", ["must hold options and their values, but is empty"]),
        ("!!python/object/apply:os.getcwd []", ["cannot be read: could not determine a constructor"]),
        ("patern: 2:4\nscope: all\n", ['unknown option "patern". Did you mean "pattern"?', '`scope` is "all"']),
        ("pruning_config: other.yaml", ['unknown option "pruning_config"']),
        ("target_sparsity: 0.9", ["`target_sparsity` is 0.5 in the arguments but 0.9 in"]),
    ],
)
def test_errors_of_a_recipe_name_the_file(tmp_path, recipe, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    errors = errors_of(PruningConfig, target_sparsity=0.5, pruning_config=str(path))
    assert len(errors) == len(expected)
    assert all(text in error for text, error in zip(expected, errors))
    assert "scope" in recipe or all(str(path) in error for error in errors)


def test_a_missing_recipe(tmp_path):
    (error,) = errors_of(PruningConfig.from_file, tmp_path / "none.yaml")
    assert "none.yaml cannot be read" in error and "No such file" in error


def test_equal_values_in_recipe_and_arguments_are_no_conflict(tmp_path):
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


def test_targets_and_whether_anything_is_pruned():
    targets = [PruningConfig(pattern=pattern).resolve_groups()["weights"].target for pattern in ("2:4", "1:4", "4x1")]
    assert targets == [0.5, 0.75, 0]
    assert PruningConfig(pattern="2:4").prunes and PruningConfig(keep_zeros=True).prunes
    assert not PruningConfig().prunes and not PruningConfig(target_sparsity=0.0, pattern="2:4").prunes
    assert PruningConfig(groups={"a": {"target_sparsity": 0.5}, "b": {}}).prunes


def test_nothing_is_shared_between_configs():
    PruningConfig().targets.append("x")
    PruningConfig().to_dict()["targets"].append("y")
    assert PruningConfig().targets == ["all-blocks"]
    others = {name: value for name, value in PruningConfig().to_dict().items() if name != "targets"}
    assert not any(isinstance(value, (list, dict, set)) for value in others.values())
    config = PruningConfig(target_sparsity=0.5, groups={"a": {"targets": ["x"]}})
    config.to_dict()["groups"]["a"]["targets"].append("y")
    assert config.groups == {"a": {"targets": ["x"]}}


def test_an_option_set_to_a_wrong_type_later_is_refused():
    config = PruningConfig(target_sparsity=0.5)
    config.target_sparsity = "0.5"
    assert "`target_sparsity` is '0.5'" in errors_of(config.resolve_groups)[0]


def test_every_criterion_of_training_is_named_in_the_help():
    text = PruningConfig.__dataclass_fields__["criterion"].metadata["help"]
    assert all(name in text for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS)


def test_prune_end_1_is_refused_because_it_means_one_step():
    with pytest.raises(PruningConfigError, match="`prune_end` is 1, .* 0.9999 for the last"):
        PruningConfig(target_sparsity=0.5, prune_end=1.0)
