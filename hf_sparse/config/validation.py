"""What can be wrong with the options of pruning: each fault a sentence or two, with the value and the remedy.

`options` is a `PruningConfig` (of one group).
"""

from __future__ import annotations

import math
from typing import Any

from ..allocations import ALLOCATIONS
from ..criteria import CRITERIA
from ..patterns import get_pattern
from ..registry import nearest
from ..schedulers import CURVES, SCHEDULERS
from ..solvers import SOLVERS


SCOPES = ("row", "layer", "global")
ON_INDIVISIBLE = ("error", "skip")


def type_error(name: str, value: Any, annotation: str) -> str | None:
    """What keeps the value of an option from being of its annotation's type, or None."""
    declared = annotation.split(" | ")
    if value is None and "None" in declared:
        return None
    kinds = {
        "float": ((int, float), "a number"),
        "str": (str, 'text (YAML needs quotes for some: "2:4")'),
        "bool": (bool, "true or false"),
        "list[str]": ((list, tuple), 'a list of text, as in ["*.query"]'),
        "dict[str, Any]": (dict, "a mapping of group names to options"),
    }
    kind, words = kinds[declared[0]]
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if good and declared[0] == "list[str]":
        good = all(isinstance(item, str) for item in value)
    return None if good else f"{name} is {value!r}: it must be {words}."


def name_errors(options: Any) -> list[str]:
    """Names that no registry knows."""
    errors = []
    known = {
        "criterion": CRITERIA,
        "solver": SOLVERS,
        "allocation": ALLOCATIONS,
        "scheduler": SCHEDULERS,
        "sparsity_decay_type": CURVES,
    }
    for name, registry in known.items():
        value = getattr(options, name)
        if value not in registry and not (name in ("criterion", "scheduler") and value is None):
            errors.append(f"{name} is {registry.describe(value)}")
    for name, allowed in (("scope", SCOPES), ("on_indivisible", ON_INDIVISIBLE)):
        value = getattr(options, name)
        if value not in allowed and not (name == "scope" and value is None):
            errors.append(f'{name} is "{value}": it must be {" or ".join(allowed)}.{nearest(value, allowed)}')
    try:
        get_pattern(options.pattern)
    except ValueError as error:
        errors.append(f"{error}")
    return errors


def range_errors(options: Any) -> list[str]:
    """Numbers out of range."""
    errors = []
    shares = ("target_sparsity", "initial_sparsity", "min_sparsity_per_layer", "max_sparsity_per_layer", "regrow")
    for name in shares:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            errors.append(f"{name} is {value}: it must be a number from 0 to 1 (0.8 prunes 80%).")
    for name in ("prune_start", "prune_end", "prune_every"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0 and (value < 1 or value == int(value))):
            errors.append(f"{name} is {value}: it must be a whole number of steps, or a fraction of training below 1.")
    start, end = options.prune_start, options.prune_end
    if 0 <= end < start and (start < 1) == (end < 1):
        errors.append(f"prune_start is {start}, after prune_end, {end}: swap them.")
    if end == 1:
        errors.append(
            "prune_end is 1, which is the first optimizer step and not all of training: give 0 for the first step, "
            "0.9999 for the last, or a number of steps."
        )
    return errors


def pattern_errors(options: Any) -> list[str]:
    """What the pattern does not go with."""
    errors, pattern = [], get_pattern(options.pattern)
    implied = pattern.implied_sparsity
    if implied is not None and options.target and abs(options.target - implied) > 1e-9:
        errors.append(
            f'target_sparsity is {options.target}, but pattern "{options.pattern}" ends at {implied:g} by its nature: '
            "leave target_sparsity out or choose another pattern."
        )
    if options.scope == "row" and not pattern.has_rows:
        errors.append(
            f'scope "row" needs several units in a row, but pattern "{options.pattern}" has none: use layer.'
        )
    if options.scope == "global" and options.allocation != "uniform":
        errors.append(
            f'allocation is "{options.allocation}", but with scope "global" nothing is shared out over layers: use '
            "scope=layer, or leave one of them out."
        )
    if options.regrow and (not pattern.has_rows or options.scope == "row"):
        errors.append(
            f'regrow is {options.regrow}, but it does not go with pattern "{options.pattern}" and scope '
            f'"{options.scope}": use single weights or blocks with scope layer or global, or regrow=0.'
        )
    if options.regrow and options.keep_zeros:
        errors.append("regrow brings zeros back to life and keep_zeros forbids it: choose one.")
    return errors


def input_errors(options: Any) -> list[str]:
    """What is decided from the inputs of the weights, which training does not observe."""
    errors, remedy = [], "needs inputs of the weights: use prune_oneshot, or"
    if SOLVERS[options.solver].needs != "nothing":
        errors.append(f'solver "{options.solver}" {remedy} zero in training.')
    if CRITERIA[options.criterion].needs == "inputs":
        errors.append(f'criterion "{options.criterion}" {remedy} magnitude / snip_momentum in training.')
    if ALLOCATIONS[options.allocation].needs == "outliers":
        errors.append(f'allocation "{options.allocation}" {remedy} uniform / erdos_renyi in training.')
    return errors


def oneshot_errors(options: Any) -> list[str]:
    """What one-shot pruning cannot do."""
    errors, criterion = [], CRITERIA[options.criterion] if options.criterion else None
    if criterion is None and options.scope not in (None, "layer"):
        errors.append(
            f'scope is "{options.scope}", but solver "{options.solver}" chooses within a layer: use scope=layer, or '
            'name a criterion, as in criterion="wanda".'
        )
    if criterion is None and not get_pattern(options.pattern).has_rows:
        errors.append(
            f'solver "{options.solver}" cannot choose for pattern "{options.pattern}", which leaves nothing in a row '
            'to make up for it: name a criterion, as in criterion="wanda".'
        )
    if getattr(criterion, "decay", 1.0) < 1:
        errors.append(
            f'criterion "{options.criterion}" lets later batches count more, which means nothing while weights stand '
            'still: use criterion="snip".'
        )
    return errors


def bound_errors(options: Any) -> list[str]:
    """Sparsities that contradict each other."""
    target = options.target or 0.0
    least, most = options.min_sparsity_per_layer or 0.0, options.max_sparsity_per_layer
    most = 1.0 if most is None else most
    errors = []
    if options.initial_sparsity > target:
        errors.append(f"initial_sparsity is {options.initial_sparsity}, above the target, {target}: lower it.")
    if least > target:
        errors.append(f"min_sparsity_per_layer is {least}, above the target, {target}: lower it.")
    if most < target:
        errors.append(f"max_sparsity_per_layer is {most}, below the target, {target}: raise it.")
    return errors
