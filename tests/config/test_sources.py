"""Where options come from: arguments, recipe files, command lines, and files of other configs and earlier versions."""

import json

import pytest
from torch import nn
from transformers import HfArgumentParser

from hf_sparse import OneshotConfig, PruningConfig, PruningConfigError, SparseTrainingArguments, prune_oneshot
from hf_sparse.algorithms.granet import GraNet
from hf_sparse.criteria.snip_momentum import SnipMomentum
from hf_sparse.patterns.block import Block
from hf_sparse.solvers.none import NoUpdate
from hf_sparse.solvers.sparsegpt import SparseGPT


OTHER_VALUES = {
    "pattern": "4x1",
    "allocation": "erdos_renyi",
    "max_sparsity_per_layer": 0.9,
    "targets": ["all-body"],
    "on_indivisible": "skip",
    "keep_zeros": True,
    "rewind_weights": False,
    "sparsity_decay_type": "linear",
    "prune_start": 0.1,
    "prune_end": 0.6,
    "prune_every": 0.02,
    "initial_sparsity": 0.1,
    "algorithm": "granet",
    "distill_alpha": 0.5,
    "distill_temperature": 3.0,
    "distill_hidden": 0.5,
    "solver": "sparsegpt",
    "sequential": False,
    "forwards": 1,
    "activations": "disk",
    "permute": True,
    "swaps": 3,
    "reconstruct": True,
    "on_unreached": "magnitude",
}
"""A valid value that is not the default, of each option with a default."""
NEEDED = {
    "forwards": {"target_sparsity": 0.5},
    "initial_sparsity": {"target_sparsity": 0.5},
    "permute": {"pattern": "2:4"},
    "rewind_weights": {"target_sparsity": 0.5, "rewind": 0.1},
    **{f"distill_{name}": {"distill_teacher": "self"} for name in ("alpha", "temperature", "hidden")},
}
"""Further options with which the value is valid."""


def write(path, **options):
    path.write_text(json.dumps(options))
    return str(path)


def parse(*line, cls=SparseTrainingArguments):
    words = ["--output_dir", "out", "--use_cpu", *line] if cls is SparseTrainingArguments else line
    return HfArgumentParser(cls).parse_args_into_dataclasses([*map(str, words)])[0]


@pytest.mark.parametrize(
    "config, name", [(cls, name) for cls in (PruningConfig, OneshotConfig) for name in cls.defaults]
)
def test_a_given_default_is_not_overridden_by_the_recipe(config, name, tmp_path):
    """Given in Python or on a command line; an option that is left out has the value of the recipe."""
    default, other = config.defaults[name], OTHER_VALUES[name]
    recipe = write(tmp_path / "recipe.json", **{name: other}, **NEEDED.get(name, {}))
    expected = f"`{name}` is {default!r} in the arguments but {other!r} in {recipe}: set it in one of them."
    values = default if isinstance(default, list) else [default]
    line = ("--pruning_config", recipe, f"--{name}", *values)
    for make in (
        lambda: config(pruning_config=recipe, **{name: default}),
        lambda: parse(*line, cls=SparseTrainingArguments if config is PruningConfig else config),
    ):
        with pytest.raises(PruningConfigError) as error:
            make()
        assert error.value.errors == [expected]
    assert getattr(config(pruning_config=recipe), name) == other
    assert getattr(parse(*line[:2], cls=config), name) == other
    assert getattr(config(), name) == default


def test_equal_values_in_any_form_are_no_conflict(tmp_path):
    """Instances and JSON text are compared by what they mean."""
    options = {"pattern": "4x1", "criterion": "snip_momentum", "criterion_kwargs": {"decay": 0.5}, "prune_end": 0.7}
    recipe = write(tmp_path / "recipe.json", target_sparsity=0.5, **options)
    instances = {"pattern": Block(4, 1), "criterion": SnipMomentum(decay=0.5)}
    expected = PruningConfig(target_sparsity=0.5, **options)
    assert PruningConfig(pruning_config=recipe, **instances) == expected
    assert PruningConfig(pruning_config=recipe, criterion_kwargs='{"decay": 0.5}') == expected
    with pytest.raises(PruningConfigError, match="`criterion_kwargs` is {} in the arguments but {'decay': 0.5} in"):
        PruningConfig(pruning_config=recipe, criterion=SnipMomentum())
    expected.save(tmp_path / "saved.json")
    assert PruningConfig(pruning_config=str(tmp_path / "saved.json"), prune_end=0.7, keep_zeros=False) == expected


def test_flags_on_the_command_line():
    assert parse("--keep_zeros").keep_zeros is True
    assert parse("--keep_zeros", "False").keep_zeros is False
    assert parse().keep_zeros is False
    assert parse("--sequential", "false", cls=OneshotConfig).sequential is False
    assert parse(cls=OneshotConfig).sequential is True


def test_options_of_methods_on_the_command_line():
    args = parse("--target_sparsity", 0.5, "--criterion", "snip_momentum", "--criterion_kwargs", '{"decay": 0.95}')
    assert args.resolve_groups()["weights"].criterion == SnipMomentum(decay=0.95)
    line = ("--target_sparsity", 0.5, "--solver", "sparsegpt", "--solver_kwargs", '{"dampening": 0.1}')
    assert parse(*line, cls=OneshotConfig).resolve_groups()["weights"].solver == SparseGPT(dampening=0.1)
    with pytest.raises(PruningConfigError, match="`criterion_kwargs` is '{decay: 0.95}': it must be a JSON object"):
        parse("--criterion_kwargs", "{decay: 0.95}")


# What, when and how


def test_training_has_no_solver_and_oneshot_pruning_no_schedule():
    training, oneshot = set(PruningConfig.options()), set(OneshotConfig.options())
    only = {"scheduler", "algorithm_kwargs", "distill_teacher", "distill_teacher_dtype"}
    only |= {"penalty", "penalty_kwargs", "rewind"}
    assert training - oneshot == set(PruningConfig.defaults) - set(OneshotConfig.defaults) | only
    assert not {name for name in training if "solver" in name}
    with pytest.raises(TypeError, match="unexpected keyword argument 'solver'"):
        PruningConfig(solver="sparsegpt")
    with pytest.raises(TypeError, match="unexpected keyword argument 'prune_end'"):
        OneshotConfig(prune_end=0.5)


SCHEDULE = {"prune_end": 0.5, "scheduler": "iterative"}
SCHEDULE_ERROR = (
    "one-shot pruning has a single prune step and does not train: remove `prune_end` (0.5), `scheduler` ('iterative')."
)


def test_oneshot_pruning_takes_a_config_of_training_without_a_schedule():
    model = nn.Sequential(nn.Linear(8, 4))
    config = PruningConfig(target_sparsity=0.5, criterion="magnitude", **SCHEDULE)
    with pytest.raises(PruningConfigError) as error:
        prune_oneshot(model, None, config)
    assert error.value.errors == [SCHEDULE_ERROR] and (model[0].weight != 0).all()
    config = PruningConfig(target_sparsity=0.5, criterion="magnitude", scope="layer")
    assert prune_oneshot(model, None, config, progress=False).zeros == 16
    args = parse("--target_sparsity", 0.25, "--criterion", "magnitude")
    assert prune_oneshot(nn.Linear(8, 4), None, args, progress=False).zeros == 8


def test_files_of_a_training_run_are_read_for_oneshot_pruning(tmp_path):
    PruningConfig(pattern="2:4", criterion="magnitude").save(tmp_path / "pruning_config.json")
    config = OneshotConfig.from_file(tmp_path / "pruning_config.json")
    assert config == OneshotConfig(pattern="2:4", criterion="magnitude")
    recipe = write(tmp_path / "recipe.json", target_sparsity=0.5, **SCHEDULE)
    with pytest.raises(PruningConfigError) as error:
        OneshotConfig.from_file(recipe)
    assert error.value.errors == [f"{recipe}: {SCHEDULE_ERROR}"]
    groups = {"ffn": {"targets": ["*"], "initial_sparsity": 0.1}, "rest": {"targets": ["x"], "initial_sparsity": 0.0}}
    with pytest.raises(PruningConfigError, match=r'group "ffn": one-shot .* remove `initial_sparsity` \(0.1\)\.$'):
        OneshotConfig.from_dict({"target_sparsity": 0.5, "groups": groups})
    groups["ffn"]["initial_sparsity"] = 0.0
    assert list(OneshotConfig.from_dict({"groups": groups}).groups["ffn"]) == ["targets"]


def test_regrow_of_an_earlier_version_is_the_fraction_of_an_algorithm():
    granet = {"algorithm": "granet", "algorithm_kwargs": {"fraction": 0.1, "decay": "linear"}}
    old = {"target_sparsity": 0.5, "regrow": 0.1}
    assert PruningConfig.from_dict(old) == PruningConfig(target_sparsity=0.5, criterion="snip_momentum", **granet)
    assert PruningConfig.from_dict(old | {"regrow": 0.0}) == PruningConfig(target_sparsity=0.5)
    groups = {"ffn": {"targets": ["*"]}, "rest": {"targets": ["x"], "criterion": "snip", "regrow": 0.1}}
    config = PruningConfig.from_dict(old | {"groups": groups})
    assert [group.criterion_name for group in config.resolve_groups().values()] == ["snip_momentum", "snip"]
    assert [group.algorithm for group in config.resolve_groups().values()] == [GraNet(0.1, "linear")] * 2
    with pytest.raises(PruningConfigError, match=r"regrow of an earlier version differs between groups \(0.1, 0.3\)"):
        PruningConfig.from_dict(old | {"groups": groups | {"rest": {"targets": ["x"], "regrow": 0.3}}})
    with pytest.raises(PruningConfigError, match='"fraction" is 3: it must be a number from 0 to 1'):
        PruningConfig.from_dict(old | {"regrow": 3})


def test_options_without_effect_in_files_of_an_earlier_version_are_dropped(tmp_path):
    """Which have all options, unlike recipes."""
    old = OneshotConfig(pattern="2:4", criterion="magnitude").to_dict() | {"scope": "row"}
    path = write(tmp_path / "pruning_config.json", **old)
    assert (
        OneshotConfig.from_file(path) == OneshotConfig.from_dict(old) == OneshotConfig.from_dict(old | {"scope": None})
    )
    groups = {"a": {"targets": ["a"], "pattern": "2:4", "scope": "row"}, "b": {"targets": ["b"], "scope": "row"}}
    read = OneshotConfig.from_dict(OneshotConfig(target_sparsity=0.5).to_dict() | {"groups": groups})
    assert [group["scope"] for group in read.groups.values()] == [None, "row"]
    with pytest.raises(PruningConfigError, match="`scope` has no effect"):
        OneshotConfig.from_file(write(tmp_path / "recipe.json", pattern="2:4", scope="row"))
    old = PruningConfig(target_sparsity=0.5, scheduler="oneshot").to_dict() | {"prune_end": 0.9, "prune_every": 0.1}
    read = PruningConfig.from_dict(old)
    assert (read.prune_end, read.prune_every) == (read.prune_start, 0.01)
    old = PruningConfig(pattern="2:4", scheduler="oneshot").to_dict() | {"scope": "row"}
    assert PruningConfig.from_dict(old).scope is None
    assert PruningConfig.from_dict(old | {"scheduler": "iterative"}).scope == "row"


def test_a_scope_that_groups_share_is_that_of_those_that_rank():
    groups = {"a": {"targets": ["a"], "pattern": "2:4"}, "b": {"targets": ["b"]}}
    found = OneshotConfig(target_sparsity=0.5, scope="row", groups=groups).resolve_groups()
    assert found["b"].scope == "row"
    groups["b"]["pattern"] = "1:4"
    with pytest.raises(PruningConfigError, match="^`scope` has no effect"):
        OneshotConfig(scope="row", groups=groups)


def test_files_of_a_oneshot_run_are_refused_for_training_where_weights_would_be_updated(tmp_path):
    assert PruningConfig.from_dict({"target_sparsity": 0.5, "solver": "none"}) == PruningConfig(target_sparsity=0.5)
    with pytest.raises(PruningConfigError, match='`solver` is "sparsegpt": weights are updated by one-shot pruning'):
        PruningConfig.from_file(write(tmp_path / "recipe.json", solver="sparsegpt"))
    with pytest.raises(PruningConfigError, match='^group "a": `solver` is "sparsegpt"'):
        PruningConfig.from_dict({"groups": {"a": {"solver": "sparsegpt"}}})


OLD_SPARSEGPT = {"solver": "sparsegpt", "dampening": 0.1, "solver_block": 64}
NEW_SPARSEGPT = SparseGPT(dampening=0.1, block_size=64)
OLD_GROUPS = {
    "a": {"target_sparsity": 0.5},
    "b": {"target_sparsity": 0.5, "solver": "zero", "criterion": "magnitude"},
    "c": {"target_sparsity": 0.5, "solver": "sparsegpt"},
}


@pytest.mark.parametrize(
    "config, options, solvers",
    [
        (PruningConfig, {"solver": "zero"}, [NoUpdate()]),
        (PruningConfig, {"groups": {"b": OLD_GROUPS["b"]}}, [NoUpdate()]),
        (OneshotConfig, {"solver": "zero", "dampening": 0.01, "solver_block": None}, [NoUpdate()]),
        (OneshotConfig, {"solver": "zero", "dampening": 0.3}, [NoUpdate()]),
        (OneshotConfig, {"solver": "sparsegpt", "dampening": 0.01}, [SparseGPT()]),
        (OneshotConfig, OLD_SPARSEGPT, [NEW_SPARSEGPT]),
        (OneshotConfig, OLD_SPARSEGPT | {"groups": OLD_GROUPS}, [NEW_SPARSEGPT, NoUpdate(), NEW_SPARSEGPT]),
        (OneshotConfig, OLD_SPARSEGPT | {"solver": "zero", "groups": {"c": OLD_GROUPS["c"]}}, [NEW_SPARSEGPT]),
    ],
)
def test_files_of_earlier_versions(config, options, solvers, tmp_path):
    """Whose solvers had other names, and one dampening and block size for the whole run."""
    path = write(tmp_path / "pruning_config.json", **options)
    for upgraded in (config.from_file(path), config.from_dict(options)):
        assert [group.solver for group in upgraded.resolve_groups().values()] == solvers
