"""PruningConfig: every choice about pruning as one dataclass, all faults told together, JSON and YAML both ways."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json
from ..patterns import get_pattern
from ..registry import nearest
from ..solvers import SOLVERS
from .recipe import read_recipe
from .validation import bound_errors, name_errors, pattern_errors, range_errors, type_error


TRAINING_CRITERION = "snip_momentum"
"""That of training, where none is named."""


class PruningConfigError(ValueError):
    """A config that cannot be carried out. `errors` holds every reason, one sentence or two each."""

    def __init__(self, errors: list[str]):
        self.errors = errors
        count = "1 fault" if len(errors) == 1 else f"{len(errors)} faults"
        super().__init__(
            f"the pruning config has {count}:\n" + "\n".join(f"  - {error_text}" for error_text in errors)
        )


def option(default: Any, help: str) -> Any:  # noqa: A002 - the name that argument parsers use
    """A field of a config, with its help."""
    return field(default=default, metadata={"help": help})


@dataclass
class PruningConfig:
    """What to prune, by which measure, in which shape, and when.

    Nothing is pruned unless `target_sparsity` is given, a pattern implies one (2:4), `groups` are, or `keep_zeros`.

    Raises:
        PruningConfigError: with every fault found.

    Example:
        >>> PruningConfig(target_sparsity=1.5, criterion="magnitud")
        Traceback (most recent call last):
        ...
        hf_sparse.config.pruning.PruningConfigError: the pruning config has 2 faults:
          - criterion is "magnitud": known are fisher, gradient, magnitude, movement, random, snip, snip_momentum, \
taylor, wanda. Did you mean "magnitude"?
          - target_sparsity is 1.5: it must be a number from 0 to 1 (0.8 prunes 80%).
    """

    target_sparsity: float | None = option(
        None,
        "Share of the selected weights to prune, from 0 to 1. Left out: nothing is pruned, or what the pattern "
        "implies (0.5 for 2:4).",
    )
    pattern: str = option(
        "unstructured",
        'What falls together: "unstructured", "N:M" (2:4 keeps 2 of every 4), "RxC" blocks (4x1), "channel" (output '
        'rows), "channel:in" (input columns).',
    )
    criterion: str | None = option(
        None,
        "What a weight is worth: magnitude, random, gradient, snip, snip_momentum, taylor, fisher, movement, one-shot "
        "also wanda, or one that you registered. Left out: snip_momentum; one-shot wanda, or what the solver chooses.",
    )
    solver: str = option(
        "zero",
        "What the weights that survive become: zero leaves them as they are, sparsegpt, one-shot only, makes up for "
        "those that fall.",
    )
    scope: str | None = option(
        None,
        "Who competes with whom: row, layer or global. Left out: global, row for wanda, or layer for the channel "
        "patterns, whose units differ in size, and for an allocation other than uniform.",
    )
    allocation: str = option(
        "uniform",
        "How the target is shared out over layers with scope row or layer: uniform, erdos_renyi, one-shot also owl.",
    )
    scheduler: str | None = option(
        None,
        "oneshot, iterative, or one that you registered. Left out: oneshot when prune_start equals prune_end, else "
        "iterative.",
    )
    sparsity_decay_type: str = option(
        "cubic", "Curve of the iterative scheduler from initial_sparsity to the target: cubic, linear, exp, cos, cube."
    )
    prune_start: float = option(
        0.0, "First prune step: an optimizer step, or a fraction of training when below 1. 0 is the first step."
    )
    prune_end: float = option(
        0.7, "Last prune step, which reaches the target: an optimizer step, or a fraction of training when below 1."
    )
    prune_every: float = option(0.01, "Optimizer steps between prune steps, or a fraction of training when below 1.")
    initial_sparsity: float = option(0.0, "Sparsity from which the curve starts, from 0 to target_sparsity.")
    min_sparsity_per_layer: float | None = option(None, "The least sparsity that any selected layer ends with.")
    max_sparsity_per_layer: float | None = option(None, "The largest sparsity that any selected layer may get.")
    targets: list[str] | None = option(
        None,
        "Which parameters: globs, or regular expressions after re:, on parameter or module names. Left out: all "
        "prunable weights of the model's body; no embeddings, no task head.",
    )
    exclude: list[str] | None = option(None, "Which of those to leave alone: globs or re: regular expressions.")
    on_indivisible: str = option(
        "error", "What to do with a weight that the pattern does not divide: error, or skip (it is named in the log)."
    )
    keep_zeros: bool = option(
        False, "Lock the zeros that the selected weights already have, and keep fine-tuning the others."
    )
    regrow: float = option(
        0.0,
        "Share of the kept weights that each prune step exchanges for pruned ones with the largest gradient, falling "
        "to 0 at the end (0 to 1). Needs a pattern of single weights or blocks with scope layer or global.",
    )
    pruning_config: str | None = option(
        None, "A recipe file (.yaml or .json) that sets any of these options, and groups with options of their own."
    )
    groups: dict[str, Any] | str | None = option(
        None,
        "Group name -> options for the weights that its targets name; what a group leaves out is as above. Best "
        "written in a recipe file.",
    )

    def __post_init__(self):
        errors: list[str] = []
        if self.pruning_config is not None:
            self._take_recipe(errors)
        if isinstance(self.groups, str):
            self._parse_groups(errors)
        sound, mistyped = _sound({name: getattr(self, name) for name in OPTIONS})
        errors += mistyped
        shared = name_errors(sound) + range_errors(sound)
        errors += shared
        for name, (group, problems) in sound._raw_groups().items():
            where = f'group "{name}": ' if sound.groups else ""
            problems += [
                error_text for error_text in name_errors(group) + range_errors(group) if error_text not in shared
            ]
            if not (mistyped or shared or problems):  # each option by itself makes sense
                problems = pattern_errors(group) + bound_errors(group)
            errors += [where + problem for problem in problems]
        if errors:
            raise PruningConfigError(errors)

    # Reading and writing

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of the options of pruning, without what a subclass for training adds."""
        return OPTIONS

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        """A config from keys and values.

        Raises:
            PruningConfigError: an unknown key (the nearest known one is named), or any other fault.
        """
        unknown = _unknown_keys(values, "", cls.options())
        try:
            config = cls(**{name: value for name, value in values.items() if name in cls.options()})
        except PruningConfigError as error:
            raise PruningConfigError(unknown + error.errors) from None
        if unknown:
            raise PruningConfigError(unknown)
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> PruningConfig:
        """A config from a recipe file, YAML or JSON."""
        return cls(pruning_config=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The options of pruning and their values, without what a subclass adds."""
        return {name: copy.deepcopy(getattr(self, name)) for name in OPTIONS if name != "pruning_config"}

    def save(self, path: str | Path) -> None:
        """Write the options as JSON, which `from_file` reads back."""
        write_json(path, self.to_dict())

    def _take_recipe(self, errors: list[str]) -> None:
        """Fill in what the recipe file sets. From then on the config stands by itself."""
        path, self.pruning_config = self.pruning_config, None
        try:
            values = read_recipe(path)
        except ValueError as error:
            errors.append(str(error))
            return
        allowed = tuple(name for name in self.options() if name != "pruning_config")
        errors += _unknown_keys(values, f"{path}: ", allowed)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (name for name in allowed if name in values):
            given, value = getattr(self, name), values[name]
            if given != defaults[name] and given != value:
                errors.append(f"{name} is {given!r} in the arguments but {value!r} in {path}: set it in one of them.")
            setattr(self, name, value)

    def _parse_groups(self, errors: list[str]) -> None:
        try:
            self.groups = json.loads(self.groups)
        except json.JSONDecodeError as error:
            errors.append(f"groups is no JSON object: {error}. Write groups in a recipe file.")
            self.groups = None

    # Groups

    def resolve_groups(self, oneshot: bool = False) -> dict[str, PruningConfig]:
        """Group name -> its options, with what it leaves out taken from this config. Without groups, one: "weights".
        A pattern that implies a target (2:4) is not asked for this config's. Criteria that are left out are those of
        training or of one-shot pruning; there None means that the solver chooses.

        Raises:
            PruningConfigError: options were set to what they cannot be since this config was made.

        Example:
            >>> config = PruningConfig(target_sparsity=0.5, groups={"ffn": {"targets": ["*.ffn"], "pattern": "4x1"}})
            >>> {name: (group.pattern, group.target_sparsity) for name, group in config.resolve_groups().items()}
            {'ffn': ('4x1', 0.5)}
        """
        groups = self._raw_groups()
        if errors := [f'group "{name}": {problem}' for name, (_, problems) in groups.items() for problem in problems]:
            raise PruningConfigError(errors)
        resolved = {name: group for name, (group, _) in groups.items()}
        for group in resolved.values():
            left_out = None if SOLVERS[group.solver].selects else "wanda"
            group.criterion = group.criterion or (left_out if oneshot else TRAINING_CRITERION)
        return resolved

    def _raw_groups(self) -> dict[str, tuple[PruningConfig, list[str]]]:
        """Group name -> its options as far as they make sense, and the faults of those that do not."""
        shared = {name: getattr(self, name) for name in OPTIONS if name not in ("groups", "pruning_config")}
        if not self.groups:
            return {"weights": _sound(shared)}
        resolved = {}
        for name, options in self.groups.items():
            if not isinstance(options, dict):
                resolved[name] = _sound(shared)[0], [f"its options must be a mapping, but are {options!r}."]
                continue
            own = {key: value for key, value in options.items() if key in GROUP_OPTIONS}
            group, mistyped = _sound(shared | own)
            if "target_sparsity" not in own and _implies_target(group.pattern):
                group.target_sparsity = None
            resolved[name] = group, _unknown_keys(options, "", GROUP_OPTIONS) + mistyped
        return resolved

    @property
    def target(self) -> float | None:
        """`target_sparsity`, or the one that the pattern implies, or None."""
        return get_pattern(self.pattern).implied_sparsity if self.target_sparsity is None else self.target_sparsity

    @property
    def prunes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.keep_zeros or any(group.target for group in self.resolve_groups().values()))


OPTIONS = tuple(option.name for option in dataclasses.fields(PruningConfig))
# When to prune is one decision for the whole run, and so is whether the zeros at hand are locked.
_SHARED = ("prune_start", "prune_end", "prune_every", "keep_zeros", "pruning_config", "groups")
GROUP_OPTIONS = tuple(name for name in OPTIONS if name not in _SHARED)
_DEFAULTS = {option.name: option.default for option in dataclasses.fields(PruningConfig)}
# Not the fields' types: HfArgumentParser overwrites those.
_DECLARED = dict(PruningConfig.__annotations__)


def _sound(values: dict[str, Any]) -> tuple[PruningConfig, list[str]]:
    """A config that is not looked over further, so that the faults of several can be told together: with defaults
    for values of a type that no later check could make sense of. And the faults of those values."""
    errors = {name: type_error(name, value, _DECLARED[name]) for name, value in values.items() if name in _DEFAULTS}
    config = object.__new__(PruningConfig)
    for name, default in _DEFAULTS.items():
        setattr(config, name, default if errors.get(name) else values.get(name, default))
    return config, [error_text for error_text in errors.values() if error_text]


def _implies_target(pattern: str) -> bool:
    try:
        return get_pattern(pattern).implied_sparsity is not None
    except ValueError:
        return False  # unknown, which is told by itself


def _unknown_keys(values: dict[str, Any], where: str, allowed: tuple[str, ...] = OPTIONS) -> list[str]:
    unknown = (key for key in values if key not in allowed)
    return [f'{where}unknown option "{key}".{nearest(key, allowed) or f" Known are {allowed}."}' for key in unknown]
