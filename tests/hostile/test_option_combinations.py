"""Random combinations of options: each works on a tiny model, or is refused with a clear text.

The values of an option come from its declared type, so that a new option joins by itself; `VALID` has values that are
worth trying, by name.
"""

import math
import os
import re

import pytest
import torch
from helpers.tiny import bert, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparse import OneshotConfig, PruningConfig, PruningConfigError, prune_oneshot
from hf_sparse.allocations import ALLOCATIONS
from hf_sparse.criteria import CRITERIA
from hf_sparse.schedulers import CURVES, SCHEDULERS
from hf_sparse.solvers import SOLVERS


SHARES = (0, 0.0, 0.25, 0.5, 0.9, 1, 1.0)
# Invalid for most options.
NUMBERS = (-1, -0.5, 1.5, 2, 10**30, 10**400, -(10**400), math.nan, math.inf, -math.inf, 5e-324, True)
TEXTS = ("", "x", "\u0000", "nan", "x" * 3_000, "{}", "[" * 3_000, "9" * 5_000, "re:(", "*", '{"a": 1, "a": 2}')
OTHERS = (
    [],
    {},
    (),
    [None],
    [[]],
    ["x"],
    {"x": 1},
    {None: None},
    {1: {2: 3}},
    object(),
    1j,
    b"x",
    {"x": {"x": []}},
    set(),
)

NAMES = {
    "criterion": CRITERIA,
    "allocation": ALLOCATIONS,
    "solver": SOLVERS,
    "scheduler": SCHEDULERS,
    "sparsity_decay_type": CURVES,
}
KWARGS = ({}, {"decay": 0.5}, {"decay": 2}, {"decay": "x"}, {"dampening": 0.1}, {"block_size": 4}, {"m": 5}, {"x": 1})
GROUPS = (
    {"a": {"targets": ["*.query", "*.key"]}, "b": {"targets": ["*.dense"], "pattern": "2:4"}},
    {"a": {"targets": ["*.query"], "criterion": "magnitude", "target_sparsity": 0.25}},
    {"a": {"targets": ["*.query"]}, "b": {"targets": ["*.query"]}},
    {"a": {}},
    {"a": {"targets": ["*.query"], "keep_zeros": True}},
    {"a": {"targets": 5}},
    {"a": 5},
    {1: {}},
)
VALID = {
    "pattern": (
        "unstructured",
        "2:4",
        "1:4",
        "4x1",
        "1x4",
        "8x8",
        "channel",
        "channel:in",
        "4:2",
        "0x0",
        "3:7",
        "0:4",
    ),
    "scope": ("row", "layer", "global"),
    "targets": (["*.query"], ["*"], ["re:query|key"], ["none"], ["*embed*"]),
    "exclude": (["*.query"], ["*"], ["re:dense"], ["none"]),
    "on_indivisible": ("error", "skip"),
    "activations": ("cpu", "disk", "device"),
    "on_unreached": ("error", "magnitude"),
    "layer_sparsity": ({"*.query": 0.5}, {"*.query": 0.5, "*.key": 0}, {"none": 0.5}, {"*.query": 5}),
    "forwards": (1, 2, 3),
    "groups": GROUPS,
    **{f"{name}_kwargs": KWARGS for name in ("criterion", "allocation", "solver")},
    **{name: (*registry.names(), "unknown") for name, registry in NAMES.items()},
    "pruning_config": ("no_such_recipe.yaml", os.devnull, "."),
    "prune_start": (*SHARES, 2, 3, 4),
    "prune_end": (*SHARES, 2, 3, 4),
    "prune_every": (*SHARES, 2, 10),
}


def values_of(cls, name):
    """Values of an option, most of them valid."""
    kind = cls._annotations()[name]
    if name in VALID:
        usual = VALID[name]
    else:
        usual = (
            (True, False) if "bool" in kind else SHARES if "float" in kind else (1, 2, 5) if "int" in kind else TEXTS
        )
    return st.one_of(*[st.sampled_from(usual)] * 12, st.sampled_from((*NUMBERS, *TEXTS, *OTHERS)), st.none())


def combinations(cls):
    """Dicts of up to four options of a config, most of them with a target."""
    names = [name for name in cls.options() if name != "target_sparsity"]
    options = st.lists(st.sampled_from(names), unique=True, max_size=3).flatmap(
        lambda chosen: st.fixed_dictionaries({name: values_of(cls, name) for name in chosen})
    )
    target = st.one_of(
        st.just({}), *[st.sampled_from([{"target_sparsity": share} for share in (0.25, 0.5, 0.5, 0.9, *SHARES)])] * 4
    )
    return st.builds(lambda first, others: {**first, **others}, target, options)


def few(count):
    """Settings of a test in CI: the same cases each time."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def many(count):
    return settings(few(count), derandomize=False, print_blob=True)


def clear(error):
    """An error that a person can read: of a bounded length, about options and not about Python."""
    text = str(error)
    assert 20 < len(text) < 20_000
    python = (
        "NoneType|object has no attribute|unhashable|positional argument|object is not (iterable|callable)|list index"
    )
    assert not re.search(python, text), text


def check_oneshot(options):
    try:
        config = OneshotConfig(**options)
        batches = [{"input_ids": torch.arange(16).reshape(2, 8) + 2}]
        model = bert()
        report = prune_oneshot(model, batches, config, progress=False)
    except (PruningConfigError, ValueError) as error:
        clear(error)
        return
    targets = [group.target for group in config.resolve_groups().values()]
    assert report.zeros == zeros_of(model, report)
    assert min(targets) - 0.1 <= report.sparsity <= max(*targets, 0.1) + 0.1


def zeros_of(model, report):
    weights = dict(model.named_parameters())
    return sum(int((weights[layer.name] == 0).sum()) for layer in report.layers)


def check_training(options, folder):
    try:
        run = make(folder, target_sparsity=options.get("target_sparsity"), max_steps=3, **without_target(options))
        run.train()
    except (PruningConfigError, ValueError) as error:
        clear(error)
        return
    pruner = run.sparsity_callback.pruner
    if pruner is not None:
        report = pruner.report()
        assert report.zeros == zeros_of(run.model, report)
        assert report.sparsity >= min(group.target for group in run.args.resolve_groups().values()) - 0.1


def without_target(options):
    return {name: value for name, value in options.items() if name != "target_sparsity"}


@few(60)
@given(options=combinations(OneshotConfig))
def test_oneshot_options_work_or_are_refused(options):
    check_oneshot(options)


@few(25)
@given(options=combinations(PruningConfig))
def test_training_options_work_or_are_refused(options, tmp_path):
    check_training(options, tmp_path)


@few(150)
@given(options=combinations(OneshotConfig), others=combinations(PruningConfig))
def test_configs_work_or_are_refused(options, others):
    for cls, values in ((OneshotConfig, options), (PruningConfig, others), (OneshotConfig, others)):
        for read in (lambda cls, values: cls(**values), lambda cls, values: cls.from_dict(values)):
            try:
                config = read(cls, {name: value for name, value in values.items() if name in cls.options()})
                groups = config.resolve_groups()
                assert cls.from_dict(config.to_dict()).resolve_groups().keys() == groups.keys()
            except PruningConfigError as error:
                clear(error)


@pytest.mark.slow
@many(400)
@given(options=combinations(OneshotConfig))
def test_many_oneshot_options_work_or_are_refused(options):
    check_oneshot(options)


@pytest.mark.slow
@many(200)
@given(options=combinations(PruningConfig))
def test_many_training_options_work_or_are_refused(options, tmp_path):
    check_training(options, tmp_path)
