"""Options of what to prune, shared by training and one-shot pruning, and how every config is read and written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar, cast

from ..algorithms import ALGORITHMS, DEFAULT_ALGORITHM, Algorithm
from ..allocations import ALLOCATIONS, Allocation
from ..criteria import CRITERIA, Criterion
from ..files import parse_json, write_json
from ..model.layers import DEFAULT_TARGETS
from ..patterns import Pattern, get_pattern
from ..penalties import PENALTIES, Penalty
from ..plugins import load_installed_plugins
from ..registry import format_name, format_value
from ..schedulers import OneshotScheduler, Scheduler
from ..solvers import SOLVERS
from .options import (
    DEFAULT_ALLOCATION,
    DEFAULT_SOLVER,
    METHODS,
    is_whole,
    merge_group_options,
    replace_instances,
    unknown_options,
    upgrade_options,
)
from .recipe import read_recipe
from .resolved import DEFAULT_MAX_SPARSITY, ResolvedGroup, resolve_max_sparsity
from .validation import consistency_errors, option_errors, target_of, type_error


Config = TypeVar("Config", bound="PruningOptions")

_MAX_SHOWN = 50
"""Errors in one message."""


class PruningConfigError(ValueError):
    """A config that cannot be carried out.

    Attributes:
        errors: every reason, one or two sentences each. The message has the first of them and the recipe file.
    """

    def __init__(self, errors: list[str], recipe: str | None = None):
        self.errors = errors
        shown = [f"- {error}" for error in errors[:_MAX_SHOWN]]
        if len(errors) > _MAX_SHOWN:
            shown.append(f"- and {len(errors) - _MAX_SHOWN:,} more.")
        unnamed = recipe is not None and not any(recipe in error for error in errors[:_MAX_SHOWN])
        if len(errors) == 1:
            super().__init__(
                errors[0] + (f" (The options are those of {recipe} and the arguments.)" if unnamed else "")
            )
        else:
            where = f" (those of {recipe} and the arguments)" if unnamed else ""
            super().__init__("\n".join([f"{len(errors)} errors in the pruning config{where}:", *shown]))


def option(help: str, **arguments: Any) -> Any:  # noqa: A002 - the name that argument parsers use
    """Returns a dataclass field with its help text. None means that the option was not given.

    Args:
        help: for command lines.
        arguments: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    return dataclasses.field(default=None, metadata={"help": help, **arguments})


FLAG = {"nargs": "?", "const": True}
"""Arguments of an option that is true or false: `--keep_zeros` alone means true."""


@dataclass
class PruningOptions:
    """What to prune: sparsity, granularity, importance criterion, ranking scope, and which layers.

    An option that was not given is None until `__post_init__`, which takes it from the recipe file, if one is named,
    or else from `defaults`. An option given beside a recipe with another value is an error.
    """

    target_sparsity: float | None = option(
        "Target sparsity: the fraction of the selected weights to prune, from 0 to 1. Default: nothing is pruned, or "
        "what the pattern implies (0.5 for 2:4)."
    )
    pattern: Pattern | str | None = option(
        'Pruning granularity: "unstructured" (single weights, the default), "N:M" (2:4 keeps 2 of every 4), "RxC" '
        'blocks (4x1), "channel" (output rows), "channel:in" (input columns); structured over several weights: '
        '"neuron" (of feed-forward networks; keeps a multiple of 8, "neuron:1" any number), "head" (attention heads), '
        '"layer".'
    )
    criterion: Criterion | str | None = option(
        "Importance criterion: magnitude, random, gradient, snip, snip_momentum, taylor, fisher, greedy_movement, "
        "obert, mfac, in one-shot pruning also wanda, ria, fluctuation and obs (of neurons and heads), "
        "block_influence (of layers), or a registered one. Default: snip_momentum in training; in one-shot pruning "
        "wanda or the solver's own selection, fluctuation for neurons and heads, block_influence for layers."
    )
    criterion_kwargs: dict[str, Any] | str | None = option(
        'Options of the criterion, as JSON: {"decay": 0.95} for snip_momentum, {"alpha": 0.5} for ria.'
    )
    scope: str | None = option(
        "Ranking scope: units compete within a row, a layer, or all layers (global); those of N:M always within their "
        "group. Default: that of the criterion (global; row for wanda, layer for ria); layer for channels, neurons "
        "and heads, with an allocation other than uniform, and in one-shot pruning with criteria without gradients, "
        "such as magnitude."
    )
    allocation: Allocation | str | None = option(
        "Allocation of the target sparsity to layers, with scope row or layer: uniform (the default), erdos_renyi, in "
        "one-shot pruning also owl, dlp, lsa and global, or a registered one."
    )
    allocation_kwargs: dict[str, Any] | str | None = option(
        'Options of the allocation, as JSON: {"m": 5, "lambda_": 0.08} for owl, {"alpha": 0.08} for dlp, '
        '{"beta": 0.08} for lsa.'
    )
    min_sparsity_per_layer: float | None = option("Minimum sparsity of each selected layer at the end, from 0 to 1.")
    max_sparsity_per_layer: float | None = option(
        "Maximum sparsity of each selected layer, from 0 to 1 (0.995 by default, more for targets above 0.99), so "
        "that a global ranking empties no layer. 1: no bound."
    )
    targets: list[str] | None = option(
        "Layers to prune: globs, or regular expressions after re:, on parameter or module names; all-blocks (the "
        "default) for the weights of the model's repeated blocks, all-body to add those beside them, such as a "
        "pooler. Embeddings and task head must be named."
    )
    exclude: list[str] | None = option("Layers not to prune: globs, or regular expressions after re:.")
    on_indivisible: str | None = option(
        "What to do with weights whose shape the pattern does not divide: error (the default), or skip (they are "
        "logged)."
    )
    keep_zeros: bool | None = option(
        "Keep the existing zeros of the selected weights, as when a pruned model is fine-tuned.", **FLAG
    )
    pruning_config: str | None = option(
        "Recipe file (.yaml or .json) with any of these options and with parameter groups."
    )
    groups: dict[str, Any] | str | None = option(
        "Parameter groups, as JSON: name -> options for the layers that its targets match; options that a group "
        "leaves out are inherited. Easier to write in a recipe file."
    )

    defaults: ClassVar[dict[str, Any]] = {
        "pattern": "unstructured",
        "allocation": DEFAULT_ALLOCATION,
        "max_sparsity_per_layer": DEFAULT_MAX_SPARSITY,
        "targets": list(DEFAULT_TARGETS),
        "on_indivisible": "error",
        "keep_zeros": False,
    }
    """Values of options that were not given, where None is not the value."""
    run_options: ClassVar[tuple[str, ...]] = ("keep_zeros", "pruning_config", "groups")
    """Options of the whole run, which a group cannot have."""

    def __post_init__(self) -> None:
        load_installed_plugins()
        errors: list[str] = []
        self._parse_json(errors)
        errors += self._replace_instances()
        recipe = self.pruning_config
        if recipe is not None and not isinstance(recipe, (str, PathLike)):
            errors.append(f"`pruning_config` is {format_value(recipe)}: it must be the name of a recipe file.")
            recipe = self.pruning_config = None
        if recipe is not None:
            self._take_recipe(errors)
            self._parse_json(errors)
        self._fill_presets()
        for name in self.options():
            if getattr(self, name) is None or (name.endswith("_kwargs") and getattr(self, name) == {}):
                setattr(self, name, copy.copy(self.defaults.get(name)))
        errors += self._errors()
        if errors:
            raise PruningConfigError(errors, None if recipe is None else str(recipe))

    def _fill_presets(self) -> None:
        """Sets options that were not given to the values of a preset, where a kind of config has presets."""

    def _errors(self) -> list[str]:
        """The errors of all groups; those of options that the groups share are reported once."""
        values, type_errors = self._check_types(self._values())
        shared = option_errors(values, self.resolve_criterion(values), self.resolve_solver(values))
        errors = type_errors + shared
        for name, options in self._group_values().items():
            if len(errors) > _MAX_SHOWN:
                errors.append("The other groups were not checked.")
                break
            where = f"group {format_name(name)}: " if self.groups else ""
            if self.groups and not (isinstance(name, str) and name):
                errors.append(f"{where}the name of a group must be text.")
            if isinstance(options, str):
                errors.append(where + options)
                continue
            own, problems = self._check_types(options) if self.groups else (values, [])
            criterion = self.resolve_criterion(own)
            problems += option_errors(own, criterion, self.resolve_solver(own))
            problems = [error for error in problems if error not in type_errors + shared]
            if isinstance(self.groups, Mapping) and self.groups:
                problems = unknown_options(self.groups[name], "", self.group_options()) + problems
            if not (type_errors or shared or problems):  # each option is valid by itself
                problems = consistency_errors(own, criterion) + self.more_errors(own, criterion)
            errors += [where + problem for problem in problems]
        return errors or self._scope_errors()

    def _scope_errors(self) -> list[str]:
        """Returns the errors of a scope that ranks nothing: of a group, or of all that there are."""
        values = {name: found for name, found in self._group_values().items() if not isinstance(found, str)}
        options = {name: SimpleNamespace(**found) for name, found in values.items()}
        ignoring = [name for name, found in options.items() if found.scope is not None and self.ignores_scope(found)]
        groups = self.groups if isinstance(self.groups, Mapping) else {}
        wrong = {f"group {format_name(name)}: ": name for name in ignoring if groups and groups[name].get("scope")}
        if not wrong and ignoring and len(ignoring) == len(options):
            wrong = {"": ignoring[0]}
        return [
            f'{where}`scope` has no effect, because units of `pattern` "{options[name].pattern}" compete within their '
            "group: leave `scope` out."
            for where, name in wrong.items()
        ]

    @classmethod
    def ignores_scope(cls, options: SimpleNamespace) -> bool:
        """Whether the ranking scope of a group's options changes nothing."""
        return False

    def more_errors(self, options: SimpleNamespace, criterion: str | None) -> list[str]:
        """Returns further errors of a group's options, which only this kind of config has."""
        return []

    def _replace_instances(self) -> list[str]:
        """Replaces methods and patterns that were given as instances by their names and options."""
        values = self._values()
        errors = replace_instances(values)
        for name in (*METHODS, *(f"{name}_kwargs" for name in METHODS), "pattern"):
            if name in values:
                setattr(self, name, values[name])
        if isinstance(self.groups, Mapping):
            self.groups = {
                name: dict(group) if isinstance(group, Mapping) else group for name, group in self.groups.items()
            }
            for group in self.groups.values():
                errors += replace_instances(group) if isinstance(group, dict) else []
        return errors

    @classmethod
    def _check_types(cls, values: Mapping[str, Any]) -> tuple[SimpleNamespace, list[str]]:
        """Returns the options with the default for each value of a wrong type, so that the errors of the others can be
        reported too, and the errors of those values."""
        annotations = cls._annotations()
        errors = {name: type_error(name, value, annotations[name]) for name, value in values.items()}
        checked = {name: cls.defaults.get(name) if errors[name] else value for name, value in values.items()}
        return SimpleNamespace(**checked), [error for error in errors.values() if error]

    @classmethod
    def type_errors(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns the errors of values that an option, also one of a group, cannot have, whatever methods there are.
        Unknown options are no errors here."""
        groups = values.get("groups") or {}
        errors = [error for options in (values, *mappings(groups)) for error in cls._known_type_errors(options)]
        if isinstance(groups, Mapping) and len(mappings(groups)) < len(groups):
            errors.append("`groups` must be a mapping of names to mappings.")
        return errors

    @classmethod
    def _known_type_errors(cls, values: Mapping[str, Any]) -> list[str]:
        return cls._check_types({name: value for name, value in values.items() if name in cls.options()})[1]

    @classmethod
    def _annotations(cls) -> dict[str, str]:
        """Returns the declared types of the options; those of the fields are overwritten by HfArgumentParser."""
        own = (base.__dict__.get("__annotations__", {}) for base in reversed(cls.__mro__))
        return {name: kind for annotations in own for name, kind in annotations.items()}

    # Reading and writing

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Returns the names of the options of pruning, without those that a subclass for a trainer adds."""
        config = next(base for base in cls.__mro__ if base.__module__.startswith(__name__.rpartition(".")[0]))
        return tuple(field.name for field in dataclasses.fields(config))

    @classmethod
    def group_options(cls) -> tuple[str, ...]:
        """Returns the names of the options that a group can have."""
        return tuple(name for name in cls.options() if name not in cls.run_options)

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Returns a config from option names and values, also those that an earlier version has written.

        Raises:
            PruningConfigError: an unknown option (the nearest known one is named), or any other error.
        """
        if not isinstance(values, Mapping):
            raise PruningConfigError([f"a config is a mapping of options to values, but is {format_value(values)}."])
        try:
            values = cls.read_options(values)
        except ValueError as error:
            raise PruningConfigError([str(error)]) from None
        unknown = unknown_options(values, "", cls.options())
        try:
            config = cls(**{name: value for name, value in values.items() if name in cls.options()})
        except PruningConfigError as error:
            raise PruningConfigError(unknown + error.errors) from None
        if unknown:
            raise PruningConfigError(unknown)
        return config

    @classmethod
    def from_file(cls: type[Config], path: str | Path) -> Config:
        """Returns a config from a recipe file, YAML or JSON.

        Raises:
            PruningConfigError: the file cannot be read, or an option in it is invalid.
        """
        return cls(pruning_config=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Returns the options of pruning and their values as JSON values, without those that a subclass adds."""
        return {name: copy.deepcopy(value) for name, value in self._values().items() if name != "pruning_config"}

    def save(self, path: str | Path) -> None:
        """Writes the options as JSON, which `from_file` reads."""
        write_json(path, self.to_dict())

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.options()}

    def _take_recipe(self, errors: list[str]) -> None:
        """Takes options from the recipe file. The config does not refer to the file afterwards."""
        path, self.pruning_config = str(self.pruning_config), None
        try:
            values = self.read_options(read_recipe(path), f"{path}: ")
        except ValueError as error:
            errors.append(str(error))
            return
        allowed = tuple(name for name in self.options() if name != "pruning_config")
        errors += unknown_options(values, f"{path}: ", allowed)
        for name in (name for name in allowed if name in values):
            given, value = getattr(self, name), values[name]
            if given is not None and given != value and (given != {} or value):
                errors.append(
                    f"`{name}` is {format_value(given)} in the arguments but {format_value(value)} in {path}: set it "
                    "in one of them."
                )
            setattr(self, name, value)

    @classmethod
    def read_options(cls, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Returns the options of a file under their present names, without those that only another kind of config has.

        Raises:
            ValueError: such an option has another value than its default. The message begins with `where`.
        """
        values = cls._drop_foreign(upgrade_options(values), where)
        if isinstance(groups := values.get("groups"), Mapping):
            values["groups"] = {
                name: cls._drop_foreign(dict(group), f'{where}group "{name}": ')
                if isinstance(group, Mapping)
                else group
                for name, group in groups.items()
            }
        return cls.drop_unused_scopes(values) if is_whole(values) else values

    @classmethod
    def drop_unused_scopes(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options of a file of an earlier version, which took scopes without effect, without them."""
        shared = cls.defaults | {name: value for name, value in values.items() if value is not None}
        groups = values["groups"]

        def is_ignored(group: Mapping[str, Any]) -> bool:
            return cls.ignores_scope(SimpleNamespace(**merge_group_options(shared, group)))

        if not mappings(groups):
            return {**values, "scope": None} if is_ignored({}) else dict(values)
        ignoring = [name for name, group in groups.items() if isinstance(group, Mapping) and is_ignored(group)]
        without = {name: {**groups[name], "scope": None} for name in ignoring if "scope" in groups[name]}
        inherited = {"scope": None} if len(ignoring) == len(groups) else {}
        return {**values, **inherited, "groups": {**groups, **without}}

    @classmethod
    def _drop_foreign(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Drops options of another kind of config from those of a file or of a group in it."""
        return values

    def _parse_json(self, errors: list[str]) -> None:
        """Parses the options that take mappings, where they were given as text."""
        annotations = self._annotations()
        for name in (name for name in self.options() if "dict" in annotations[name]):
            text = getattr(self, name)
            if isinstance(text, str):
                try:
                    setattr(self, name, parse_json(text))
                except ValueError as error:
                    reason = f"it must be a JSON object ({error}). It can be set in a recipe file."
                    errors.append(f"`{name}` is {format_value(text)}: {reason}")
                    setattr(self, name, None)

    # Groups

    def _group_values(self) -> dict[str, dict[str, Any] | str]:
        """Group name -> the values of all options of the group, or what is wrong with it."""
        shared = {name: value for name, value in self._values().items() if name not in ("groups", "pruning_config")}
        if not isinstance(self.groups, Mapping) or not self.groups:
            return {"weights": shared}
        groups: dict[str, dict[str, Any] | str] = {}
        for name, options in self.groups.items():
            if not isinstance(options, Mapping):
                groups[name] = f"its options must be a mapping, but are {format_value(options)}."
                continue
            allowed = {key: value for key, value in options.items() if key in self.group_options()}
            merged = merge_group_options(shared, allowed)
            groups[name] = {key: self.defaults.get(key) if value is None else value for key, value in merged.items()}
        return groups

    def resolve_groups(self) -> dict[str, ResolvedGroup]:
        """Returns the resolved options of each group by name, without layers. Without groups, one: "weights".

        Defaults that depend on other options are filled in here and nowhere else.

        Raises:
            PruningConfigError: an option was set to an invalid value after the config was made.

        Example:
            >>> from hf_sparse import PruningConfig
            >>> config = PruningConfig(target_sparsity=0.5, groups={"ffn": {"targets": ["*.ffn"], "pattern": "4x1"}})
            >>> {name: (str(group.pattern), group.target) for name, group in config.resolve_groups().items()}
            {'ffn': ('4x1', 0.5)}
        """
        errors = self._errors()
        if self.pruning_config is not None:
            errors.append(
                f"`pruning_config` is {self.pruning_config!r}, but was set after the config was made, and recipes are "
                f"read only then: make a new {type(self).__name__} with `pruning_config`."
            )
        if errors:
            raise PruningConfigError(errors)
        groups = self._group_values()
        return {name: self._resolve(name, options) for name, options in groups.items() if not isinstance(options, str)}

    def _resolve(self, name: str, values: dict[str, Any]) -> ResolvedGroup:
        options = SimpleNamespace(**values)
        pattern, criterion_name = get_pattern(options.pattern), self.resolve_criterion(options)
        criterion = CRITERIA.create(criterion_name, options.criterion_kwargs) if criterion_name else None
        algorithm: Algorithm = ALGORITHMS.create(
            getattr(options, "algorithm", DEFAULT_ALGORITHM), getattr(options, "algorithm_kwargs", None)
        )
        target = target_of(options) or 0.0
        options.max_sparsity_per_layer = resolve_max_sparsity(options.max_sparsity_per_layer, target, pattern)
        return ResolvedGroup(
            name=name,
            pattern=pattern,
            criterion=criterion,
            solver=SOLVERS.create(self.resolve_solver(options), getattr(options, "solver_kwargs", None)),
            scope=options.scope or self._default_scope(options.allocation, pattern, criterion, algorithm),
            allocation=ALLOCATIONS.create(options.allocation, options.allocation_kwargs),
            scheduler=self.resolve_scheduler(options),
            target=target,
            min_sparsity_per_layer=options.min_sparsity_per_layer or 0.0,
            max_sparsity_per_layer=options.max_sparsity_per_layer,
            targets=options.targets,
            exclude=options.exclude,
            on_indivisible=options.on_indivisible,
            keep_zeros=options.keep_zeros,
            swaps=getattr(options, "swaps", None) or 0,
            permute=getattr(options, "permute", False),
            algorithm=algorithm,
            penalty=self._resolve_penalty(options),
        )

    @staticmethod
    def _resolve_penalty(options: SimpleNamespace) -> Penalty | None:
        name = getattr(options, "penalty", None)
        return None if name is None else PENALTIES.create(name, options.penalty_kwargs)

    def resolve_criterion(self, options: SimpleNamespace) -> str | None:
        """Returns the name of the criterion of a group's options; None if the solver selects the pruned units."""
        raise NotImplementedError

    def resolve_solver(self, options: SimpleNamespace) -> str:
        """Returns the name of the solver of a group's options: training updates the weights itself."""
        return DEFAULT_SOLVER

    def _default_scope(
        self, allocation: str, pattern: Pattern, criterion: Criterion | None, algorithm: Algorithm
    ) -> str:
        if not pattern.has_layers:
            return "global"
        if not pattern.has_rows or (criterion is None and algorithm.default_scope is None):
            return "layer"
        scope = algorithm.default_scope or self.criterion_scope(cast(Criterion, criterion))
        return "layer" if scope == "global" and allocation != DEFAULT_ALLOCATION else scope

    def criterion_scope(self, criterion: Criterion | type[Criterion]) -> str:
        """Returns the ranking scope of a criterion where the other options leave it open."""
        return criterion.default_scope

    def resolve_scheduler(self, options: SimpleNamespace) -> Scheduler:
        """Returns the scheduler of a group's options: one-shot pruning has a single prune step."""
        return OneshotScheduler({})

    @property
    def prunes(self) -> bool:
        """Whether the config prunes anything or keeps zeros."""
        return bool(self.keep_zeros or any(group.target for group in self.resolve_groups().values()))


def mappings(groups: Any) -> list[Mapping[str, Any]]:
    """Returns the groups of an option `groups` that are mappings, as they must be."""
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
