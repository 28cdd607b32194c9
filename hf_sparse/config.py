"""PruningConfig: every choice about pruning as one dataclass, all faults told together, JSON and YAML both ways."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .allocations import ALLOCATIONS
from .criteria import CRITERIA
from .patterns import get_pattern
from .registry import nearest
from .schedulers import CURVES, SCHEDULERS
from .storage import write_json


SCOPES = ("row", "layer", "global")
ON_INDIVISIBLE = ("error", "skip")


class PruningConfigError(ValueError):
    """A config that cannot be carried out. `faults` holds every reason, one sentence or two each."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"the pruning config has {count}:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _option(default: Any, help: str) -> Any:  # noqa: A002 - the name that argument parsers use
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
        hf_sparse.config.PruningConfigError: the pruning config has 2 faults:
          - criterion is "magnitud": known are gradient, magnitude, movement, random, snip, snip_momentum, taylor. \
Did you mean "magnitude"?
          - target_sparsity is 1.5: it must be a number from 0 to 1 (0.8 prunes 80%).
    """

    target_sparsity: float | None = _option(
        None,
        "Share of the selected weights to prune, from 0 to 1. Left out: nothing is pruned, or what the pattern implies "
        "(0.5 for 2:4).",
    )
    pattern: str = _option(
        "unstructured",
        'What falls together: "unstructured", "N:M" (2:4 keeps 2 of every 4), "RxC" blocks (4x1), "channel" (output '
        'rows), "channel:in" (input columns).',
    )
    criterion: str = _option(
        "magnitude",
        "What a weight is worth: magnitude, random, gradient, snip, snip_momentum, taylor, movement, or one that you "
        "registered.",
    )
    scope: str = _option("layer", "Who competes with whom: row, layer or global.")
    allocation: str = _option(
        "uniform", "How the target is shared out over layers with scope row or layer: uniform or erdos_renyi."
    )
    scheduler: str | None = _option(
        None,
        "oneshot, iterative, or one that you registered. Left out: oneshot when prune_start equals prune_end, else "
        "iterative.",
    )
    sparsity_decay_type: str = _option(
        "cubic", "Curve of the iterative scheduler from initial_sparsity to the target: cubic, linear, exp, cos, cube."
    )
    prune_start: float = _option(
        0.0, "First prune step: an optimizer step, or a fraction of training when below 1. 0 is the first step."
    )
    prune_end: float = _option(
        0.7, "Last prune step, which reaches the target: an optimizer step, or a fraction of training when below 1."
    )
    prune_every: float = _option(0.01, "Optimizer steps between prune steps, or a fraction of training when below 1.")
    initial_sparsity: float = _option(0.0, "Sparsity from which the curve starts, from 0 to target_sparsity.")
    min_sparsity_per_layer: float | None = _option(None, "The least sparsity that any selected layer ends with.")
    max_sparsity_per_layer: float | None = _option(None, "The largest sparsity that any selected layer may get.")
    targets: list[str] | None = _option(
        None,
        "Which parameters: globs, or regular expressions after re:, on parameter or module names. Left out: all "
        "prunable weights of the model's body; no embeddings, no task head.",
    )
    exclude: list[str] | None = _option(None, "Which of those to leave alone: globs or re: regular expressions.")
    on_indivisible: str = _option(
        "error", "What to do with a weight that the pattern does not divide: error, or skip (it is named in the log)."
    )
    keep_zeros: bool = _option(
        False, "Lock the zeros that the selected weights already have, and keep fine-tuning the others."
    )
    regrow: float = _option(
        0.0,
        "Share of the kept weights that each prune step exchanges for pruned ones with the largest gradient, falling to "
        "0 at the end (0 to 1). Needs a pattern of single weights or blocks with scope layer or global.",
    )
    pruning_config: str | None = _option(
        None, "A recipe file (.yaml or .json) that sets any of these options, and groups with options of their own."
    )
    groups: dict[str, Any] | str | None = _option(
        None,
        "Group name -> options for the weights that its targets name; what a group leaves out is as above. Best "
        "written in a recipe file.",
    )

    def __post_init__(self):
        faults: list[str] = []
        if self.pruning_config is not None:
            self._take_recipe(faults)
        if isinstance(self.groups, str):
            self._parse_groups(faults)
        faults += _type_faults(self, "")
        if not faults:
            faults += [fault for name, group in self._raw_groups(faults).items() for fault in group._faults(name)]
        if faults:
            raise PruningConfigError(faults)

    # Reading and writing

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        """A config from keys and values.

        Raises:
            PruningConfigError: an unknown key (the nearest known one is named), or any other fault.
        """
        faults = _unknown_keys(values, "")
        if faults:
            raise PruningConfigError(faults)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> PruningConfig:
        """A config from a recipe file, YAML or JSON."""
        return cls(pruning_config=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The options of pruning and their values, without what a subclass adds."""
        return {name: getattr(self, name) for name in OPTIONS if name != "pruning_config"}

    def save(self, path: str | Path) -> None:
        """Write the options as JSON, which `from_file` reads back."""
        write_json(path, self.to_dict())

    def _take_recipe(self, faults: list[str]) -> None:
        """Fill in what the recipe file sets. From then on the config stands by itself."""
        path, self.pruning_config = self.pruning_config, None
        values = _read_recipe(path, faults)
        faults += _unknown_keys(values, f"{path}: ")
        defaults = {option.name: option.default for option in dataclasses.fields(PruningConfig)}
        for name, value in values.items():
            if name not in defaults or name == "pruning_config":
                continue
            given = getattr(self, name)
            if given != defaults[name] and given != value:
                faults.append(f"{name} is {given!r} in the arguments but {value!r} in {path}: set it in one of them.")
            setattr(self, name, value)

    def _parse_groups(self, faults: list[str]) -> None:
        try:
            self.groups = json.loads(self.groups)
        except json.JSONDecodeError as error:
            faults.append(f"groups is no JSON object: {error}. Write groups in a recipe file.")
            self.groups = None

    # Groups

    def resolve_groups(self) -> dict[str, PruningConfig]:
        """Group name -> its options, with what it leaves out taken from this config. Without groups, one: "weights".

        Example:
            >>> config = PruningConfig(target_sparsity=0.5, groups={"ffn": {"targets": ["*.ffn"], "pattern": "4x1"}})
            >>> {name: (group.pattern, group.target_sparsity) for name, group in config.resolve_groups().items()}
            {'ffn': ('4x1', 0.5)}
        """
        return self._raw_groups([])

    def _raw_groups(self, faults: list[str]) -> dict[str, PruningConfig]:
        shared = {name: getattr(self, name) for name in OPTIONS if name not in ("groups", "pruning_config")}
        if not self.groups:
            return {"weights": _unchecked(shared)}
        resolved = {}
        for name, options in self.groups.items():
            where = f'group "{name}": '
            if not isinstance(options, dict):
                faults.append(f"{where}its options must be a mapping, but are {options!r}.")
                continue
            unknown = _unknown_keys(options, where, allowed=GROUP_OPTIONS)
            group = _unchecked(shared | options)
            problems = unknown or _type_faults(group, where)
            faults += problems
            if not problems:
                resolved[name] = group
        return resolved

    @property
    def target(self) -> float | None:
        """`target_sparsity`, or the one that the pattern implies, or None."""
        return get_pattern(self.pattern).implied_sparsity if self.target_sparsity is None else self.target_sparsity

    @property
    def prunes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.keep_zeros or any(group.target for group in self.resolve_groups().values()))

    # Faults

    def _faults(self, group: str) -> list[str]:
        """What is wrong with the values of one group, each sentence with its remedy."""
        where = f'group "{group}": ' if group != "weights" else ""
        faults = self._name_faults() + self._range_faults()
        if not faults:
            faults += self._pattern_faults() + self._bound_faults()
        return [where + fault for fault in faults]

    def _name_faults(self) -> list[str]:
        faults = []
        known = {
            "criterion": CRITERIA,
            "allocation": ALLOCATIONS,
            "scheduler": SCHEDULERS,
            "sparsity_decay_type": CURVES,
        }
        for name, registry in known.items():
            value = getattr(self, name)
            if value not in registry and not (name == "scheduler" and value is None):
                faults.append(f"{name} is {registry.describe(value)}")
        for name, allowed in (("scope", SCOPES), ("on_indivisible", ON_INDIVISIBLE)):
            value = getattr(self, name)
            if value not in allowed:
                faults.append(f'{name} is "{value}": it must be {" or ".join(allowed)}.{nearest(value, allowed)}')
        try:
            get_pattern(self.pattern)
        except ValueError as error:
            faults.append(f"{error}")
        return faults

    def _range_faults(self) -> list[str]:
        faults = []
        shares = ("target_sparsity", "initial_sparsity", "min_sparsity_per_layer", "max_sparsity_per_layer", "regrow")
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                faults.append(f"{name} is {value}: it must be a number from 0 to 1 (0.8 prunes 80%).")
        for name in ("prune_start", "prune_end", "prune_every"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0 and (value < 1 or value == int(value))):
                faults.append(
                    f"{name} is {value}: it must be a whole number of steps, or a fraction of training below 1."
                )
        if (self.prune_start < 1) == (self.prune_end < 1) and self.prune_start > self.prune_end:
            faults.append(f"prune_start is {self.prune_start}, after prune_end, {self.prune_end}: swap them.")
        return faults

    def _pattern_faults(self) -> list[str]:
        faults, pattern = [], get_pattern(self.pattern)
        implied = pattern.implied_sparsity
        if implied is not None and self.target and abs(self.target - implied) > 1e-9:
            faults.append(
                f'target_sparsity is {self.target}, but pattern "{self.pattern}" ends at {implied:g} by its nature: '
                "leave target_sparsity out or choose another pattern."
            )
        if self.scope == "row" and not pattern.has_rows:
            faults.append(
                f'scope "row" needs several units in a row, but pattern "{self.pattern}" has none: use layer.'
            )
        if self.regrow and (not pattern.has_rows or self.scope == "row"):
            faults.append(
                f'regrow is {self.regrow}, but it does not go with pattern "{self.pattern}" and scope "{self.scope}": '
                "use single weights or blocks with scope layer or global, or regrow=0."
            )
        if self.regrow and self.keep_zeros:
            faults.append("regrow brings zeros back to life and keep_zeros forbids it: choose one.")
        return faults

    def _bound_faults(self) -> list[str]:
        target = self.target or 0.0
        least, most = self.min_sparsity_per_layer or 0.0, self.max_sparsity_per_layer
        most = 1.0 if most is None else most
        faults = []
        if self.initial_sparsity > target:
            faults.append(f"initial_sparsity is {self.initial_sparsity}, above the target, {target}: lower it.")
        if least > target:
            faults.append(f"min_sparsity_per_layer is {least}, above the target, {target}: lower it.")
        if most < target:
            faults.append(f"max_sparsity_per_layer is {most}, below the target, {target}: raise it.")
        return faults


OPTIONS = tuple(option.name for option in dataclasses.fields(PruningConfig))
# When to prune is one decision for the whole run, and so is whether the zeros at hand are locked.
_SHARED = ("prune_start", "prune_end", "prune_every", "keep_zeros", "pruning_config", "groups")
GROUP_OPTIONS = tuple(name for name in OPTIONS if name not in _SHARED)


def _unchecked(values: dict[str, Any]) -> PruningConfig:
    """A config that has not been looked over yet, so that the faults of several can be told together."""
    config = object.__new__(PruningConfig)
    for option in dataclasses.fields(PruningConfig):
        setattr(config, option.name, values.get(option.name, option.default))
    return config


def _unknown_keys(values: dict[str, Any], where: str, allowed: tuple[str, ...] = OPTIONS) -> list[str]:
    unknown = (key for key in values if key not in allowed)
    return [f'{where}unknown option "{key}".{nearest(key, allowed) or f" Known are {allowed}."}' for key in unknown]


def _read_recipe(path: str, faults: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        faults.append(f"pruning_config {path} cannot be read: {error}.")
        return {}
    if not isinstance(values, dict):
        faults.append(f"pruning_config {path} must hold options and their values, but holds {type(values).__name__}.")
        return {}
    return values


def _type_faults(config: PruningConfig, where: str) -> list[str]:
    """Values of a type that no later check could make sense of."""
    kinds = {"float": ((int, float), "a number"), "str": (str, "text"), "bool": (bool, "true or false")}
    faults = []
    for option in dataclasses.fields(PruningConfig):
        # Not `option.type`: HfArgumentParser overwrites it.
        value, declared = getattr(config, option.name), PruningConfig.__annotations__[option.name].split(" | ")
        if value is None and "None" in declared:
            continue
        if declared[0] == "list[str]":
            if not (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)):
                faults.append(f'{where}{option.name} is {value!r}: it must be a list of text, as in ["*.query"].')
        elif declared[0].startswith("dict"):
            if not isinstance(value, dict):
                faults.append(f"{where}{option.name} is {value!r}: it must be a mapping of group names to options.")
        else:
            kind, words = kinds[declared[0]]
            if not isinstance(value, kind) or (declared[0] == "float" and isinstance(value, bool)):
                faults.append(f"{where}{option.name} is {value!r}: it must be {words}.")
    return faults
