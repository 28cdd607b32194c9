"""Methods with options of their own: a name and a mapping become an instance, and back."""

import dataclasses
from typing import Any

import pytest

from hf_sparse import OneshotConfig, PruningConfig, PruningConfigError, Requires
from hf_sparse.algorithms import ALGORITHMS, DEFAULT_ALGORITHM
from hf_sparse.allocations.owl import OWL
from hf_sparse.config.options import METHODS
from hf_sparse.criteria.snip_momentum import SnipMomentum
from hf_sparse.methods import MethodRegistry, type_name
from hf_sparse.solvers.sparsegpt import SparseGPT


SAMPLED = {"prior": "path/to/pruned", "prior_strength": 2.0, "learning_rate": 0.1, "scale_end": 3.0}
SAMPLED |= {"temperature_start": 2.0, "temperature_end": 0.1, "norm_weight": 0.5}
OPTIONS = {
    "criterion": {
        "mfac": {"block_size": 512, "num_gradients": 8, "dampening": 0.5, "update": False, "dtype": "float32"},
        "obert": {"block_size": 16, "num_gradients": 8, "dampening": 0.5, "update": False, "dtype": "float32"},
        "obs": {"ridge": 0.2, "columns_at_once": 4},
        "ria": {"alpha": 1.0},
        "snip_momentum": {"decay": 1.0},
    },
    "allocation": {"owl": {"m": 3.0, "lambda_": 0.2}, "dlp": {"alpha": 0.2}, "lsa": {"beta": 0.2}},
    "algorithm": {
        "acdc": {"compressed_phases": 3},
        "elsa": {"strength": 0.5, "weighting": 0.5},
        "granet": {"fraction": 0.2, "decay": "linear"},
        "gumbel_nm": SAMPLED,
        "gumbel_sigmoid": {**SAMPLED, "density_weight": 0.3},
        "movement": {"learning_rate": 0.1, "init_scale": 0.5},
        "rigl": {"fraction": 0.2, "decay": "linear", "initial_mask": "random"},
        "set": {"fraction": 0.2, "decay": "constant", "initial_mask": "random"},
        "soft_movement": {"learning_rate": 0.1, "init_scale": 0.5, "threshold": 0.2, "lambda_": 1.0},
        "sr_ste": {"decay": 1e-3},
    },
    "solver": {
        "admm": {"iterations": 10, "rho": 0.2, "dampening": 0.1},
        "sparsegpt": {"dampening": 0.1, "block_size": 64},
        "lstsq": {"ridge": 0.2},
    },
    "penalty": {
        "group_lasso": {"strength": 0.5, "warmup": 2.0, "until_prune_end": False},
        "l1": {"strength": 0.5, "warmup": 2.0, "until_prune_end": False},
    },
}
"""A valid value that is not the default, of every option of the methods of hf_sparse."""
# Methods of coupled units, and what they are used with.
WITH = {
    "gumbel_nm": {"pattern": "2:4"},
    "block_influence": {"pattern": "layer"},
    "fluctuation": {"pattern": "neuron", "scope": "layer"},
    "obs": {"pattern": "neuron", "scope": "layer"},
    "lstsq": {"pattern": "neuron", "scope": "layer"},
}
NAMED = [
    (family, name, OPTIONS[family].get(name, {})) for family, registry in METHODS.items() for name in registry.names()
]


def test_no_option_is_left_out_here():
    options = {
        family: {
            name: {field.name for field in dataclasses.fields(registry[name])}
            for name in registry.names()
            if registry[name].__module__.startswith("hf_sparse.") and dataclasses.fields(registry[name])
        }
        for family, registry in METHODS.items()
    }
    assert options == {family: {name: set(kwargs) for name, kwargs in own.items()} for family, own in OPTIONS.items()}


@pytest.mark.parametrize("family, name, kwargs", NAMED)
def test_an_instance_is_its_name_and_options(family, name, kwargs, tmp_path):
    """In the registry, in a config and in its file."""
    registry = METHODS[family]
    instance = registry.create(name, kwargs)
    assert instance == registry[name](**kwargs) and registry.name_and_options(instance) == (name, kwargs)
    assert registry.name_and_options(registry.create(name)) == (name, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        instance.other = 1

    target = {"target_sparsity": 0.5} | WITH.get(name, {"scope": "layer"})
    in_training = getattr(registry[name], "requires", Requires.NOTHING) & Requires.GRADIENT_HISTORY
    cls = PruningConfig if in_training or family not in OneshotConfig.options() else OneshotConfig
    by_name = cls(**target, **{family: name, f"{family}_kwargs": kwargs or None})
    by_instance = cls(**target, **{family: instance})
    assert by_name == by_instance and getattr(by_instance, f"{family}_kwargs") == (kwargs or None)
    in_group = [cls(**target, groups={"a": {family: instance}})] if family in cls.group_options() else []
    for config in (by_name, *in_group):
        config.save(tmp_path / "config.json")
        for read in (config, cls.from_file(tmp_path / "config.json")):
            (group,) = read.resolve_groups().values()
            assert read == config and getattr(group, family) == instance
            if family != "algorithm" or instance != ALGORITHMS.create(DEFAULT_ALGORITHM):
                assert group.to_dict()[family] == name and group.to_dict().get(f"{family}_kwargs", {}) == kwargs


NO_OPTION = 'has no option "decya": known are decay. Did you mean "decay"?'
NOT_A_NUMBER = "it must be a number."
INVALID = [
    ("criterion", "snip_momentum", {"decya": 0.5}, f'criterion "snip_momentum" {NO_OPTION}'),
    ("criterion", "magnitude", {"decay": 0.5}, 'criterion "magnitude" has no option "decay": it has none.'),
    ("criterion", "snip_momentum", {"decay": 1.5}, '"decay" is 1.5: it must be from 0 to 1, as in 0.9.'),
    ("criterion", "snip_momentum", {"decay": float("nan")}, '"decay" is nan: it must be from 0 to 1, as in 0.9.'),
    ("criterion", "snip_momentum", {"decay": True}, f'"decay" of criterion "snip_momentum" is True: {NOT_A_NUMBER}'),
    ("criterion", "snip_momentum", {"decay": "0.5"}, f"is '0.5': {NOT_A_NUMBER}"),
    ("allocation", "owl", {"lambda": 0.1}, 'no option "lambda": known are m, lambda_. Did you mean "lambda_"?'),
    ("allocation", "owl", {"lambda_": -0.1}, 'allocation "owl": "lambda_" is -0.1: it must be from 0 to 1'),
    ("allocation", "owl", {"m": 0}, '"m" is 0: it must be above 0, as in 5.'),
    ("allocation", "owl", {"m": float("nan")}, '"m" is nan: it must be above 0'),
    (
        "solver",
        "sparsegpt",
        {"damping": 0.1},
        'has no option "damping": known are dampening, block_size. Did you mean',
    ),
    ("solver", "sparsegpt", {"dampening": 2}, '"dampening" is 2: it must be from 0 to 1, as in 0.01.'),
    ("solver", "sparsegpt", {"block_size": 0}, '"block_size" is 0: it must be 1 or more, as in 128.'),
    ("solver", "admm", {"iterations": 0}, '"iterations" is 0: it must be 1 or more, as in 30.'),
    ("solver", "admm", {"rho": 0}, '"rho" is 0: it must be from 0.001 to 4, as in 0.1.'),
    ("solver", "admm", {"dampening": -1}, '"dampening" is -1: it must be from 0 to 1, as in 0.01.'),
    ("solver", "sparsegpt", {"block_size": 64.5}, "is 64.5: it must be a whole number or None."),
]


@pytest.mark.parametrize("family, name, kwargs, message", INVALID)
def test_invalid_options_are_refused_by_name(family, name, kwargs, message):
    """With every other error of the config, and of a group with the group's name."""
    own = {family: name, f"{family}_kwargs": kwargs}
    with pytest.raises(PruningConfigError) as error:
        OneshotConfig(**own, target_sparsity=7)
    first, second = error.value.errors
    assert (
        first.startswith(f"`{family}_kwargs`: ") and message in first and second.startswith("`target_sparsity` is 7")
    )
    with pytest.raises(PruningConfigError) as error:
        OneshotConfig(target_sparsity=0.5, groups={"ffn": own})
    assert error.value.errors == [f'group "ffn": {first}']


def test_options_without_a_method_and_beside_an_instance_are_refused():
    with pytest.raises(PruningConfigError, match="but no criterion is used: name one"):
        OneshotConfig(target_sparsity=0.5, solver="sparsegpt", criterion_kwargs={"decay": 1.0})
    with pytest.raises(
        PruningConfigError, match="`criterion` is an instance with its own options: leave `criterion_kwa"
    ):
        PruningConfig(target_sparsity=0.5, criterion=SnipMomentum(), criterion_kwargs={"decay": 0.5})
    with pytest.raises(PruningConfigError, match=r"`criterion`: criterion Mine\(.*\) is not registered: decorate its"):
        PruningConfig(target_sparsity=0.5, criterion=type("Mine", (SnipMomentum,), {})())
    with pytest.raises(PruningConfigError, match="`criterion_kwargs` is .*: it must be a mapping"):
        PruningConfig(criterion_kwargs=["decay"])


def test_groups_inherit_the_options_of_a_method_only_with_the_method():
    groups = {
        "inherits": {},
        "own options": {"criterion_kwargs": {"decay": 0.25}},
        "own method": {"criterion": "snip"},
        "same method": {"criterion": "snip_momentum"},
        "instance": {"criterion": SnipMomentum(decay=0.75)},
    }
    config = PruningConfig(target_sparsity=0.5, criterion=SnipMomentum(decay=0.5), groups=groups)
    resolved = config.resolve_groups()
    criteria = {name: group.criterion for name, group in resolved.items()}
    assert criteria.pop("own method").decay == 1.0 and resolved["own method"].criterion_name == "snip"
    assert {name: criterion.decay for name, criterion in criteria.items()} == {
        "inherits": 0.5,
        "own options": 0.25,
        "same method": 0.9,
        "instance": 0.75,
    }
    groups = {"a": {"solver": "none", "criterion": "wanda"}, "b": {"allocation": "uniform"}, "c": {}}
    config = OneshotConfig(
        target_sparsity=0.5, scope="layer", solver=SparseGPT(dampening=0.1), allocation=OWL(m=3), groups=groups
    )
    a, b, c = config.resolve_groups().values()
    assert (a.solver_name, a.allocation) == ("none", OWL(m=3)) and (b.solver, b.allocation_name) == (
        c.solver,
        "uniform",
    )
    assert c.solver == SparseGPT(dampening=0.1) and c.allocation == OWL(m=3)


# The registry by itself


class Method:
    pass


@dataclasses.dataclass(frozen=True)
class Sized(Method):
    size: int
    ratio: float = 0.5
    shape: tuple[int, ...] = (1, 2)
    label: str | None = None
    extra: Any = None
    exact: bool = False
    total: float = dataclasses.field(default=0.0, init=False)


@pytest.fixture
def methods():
    registry = MethodRegistry("method", Method)
    registry.register("sized")(Sized)
    registry.register("plain")(type("Plain", (Method,), {}))
    return registry


def test_options_of_every_type(methods):
    kwargs = {"size": 3, "ratio": 1, "shape": [4, 5], "label": "x", "extra": {"a": 1}, "exact": True}
    method = methods.create("sized", kwargs)
    assert method == Sized(3, 1, (4, 5), "x", {"a": 1}, True)
    assert methods.name_and_options(method) == ("sized", kwargs)
    assert type(methods.create("plain")).__name__ == "Plain"
    for option, value, words in (
        ("size", 1.0, "a whole number"),
        ("size", True, "a whole number"),
        ("shape", "4,5", "tuple"),
        ("label", 7, "text or None"),
        ("exact", 1, "true or false"),
    ):
        with pytest.raises(ValueError, match=f'option "{option}" of method "sized" is .*: it must be {words}'):
            methods.create("sized", {"size": 1, option: value})
    assert type_name(int | None) == "a whole number or None"


def test_an_option_without_a_default_must_be_given(methods):
    with pytest.raises(ValueError, match='method "sized" has no default for size: give `method_kwargs`'):
        methods.create("sized", {"ratio": 0.1})
    with pytest.raises(ValueError, match='has no option "total": known are size, ratio'):
        methods.create("sized", {"size": 1, "total": 0.0})
