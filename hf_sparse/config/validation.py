"""Validation of options: each error is one or two sentences, with the value, what is allowed, and the remedy.

`options` is a namespace of the options of one group.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..allocations import ALLOCATIONS
from ..criteria import CRITERIA
from ..patterns import Pattern, get_pattern
from ..registry import format_name, format_value, nearest
from ..requires import Requires
from ..schedulers import CURVES, SCHEDULERS
from ..selection.swaps import supports_swaps
from ..solvers import SOLVERS
from .options import DEFAULT_ALLOCATION, METHODS
from .resolved import ResolvedGroup, resolve_max_sparsity


SCOPES = ("row", "layer", "global")
ON_INDIVISIBLE = ("error", "skip")

_TYPES: dict[str, tuple[Any, str]] = {
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "list[str]": ((list, tuple), 'a list of text, as in ["*.query"]'),
    "dict[str, Any]": (dict, "a mapping"),
    "str": (str, 'text (YAML needs quotes for some: "2:4")'),
}


def type_error(name: str, value: Any, annotation: str) -> str | None:
    """Returns why the value of an option is not of its annotation's type, or None."""
    declared = annotation.split(" | ")
    if value is None and "None" in declared:
        return None
    # The text of a mapping is JSON, which has been parsed by now.
    kind, words = _TYPES[next(kind for kind in _TYPES if kind in declared)]
    valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if valid and "list[str]" in declared:
        valid = all(isinstance(item, str) for item in value)
    return None if valid else f"`{name}` is {format_value(value)}: it must be {words}."


def choice_error(name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    """Returns why a value is none of the allowed ones, or None."""
    if value in allowed:
        return None
    return f"`{name}` is {format_name(value)}: it must be {' or '.join(allowed)}.{nearest(value, allowed)}"


def target_of(options: SimpleNamespace) -> float | None:
    """Returns `target_sparsity`, or the sparsity that the pattern implies, or None."""
    if options.target_sparsity is not None:
        return options.target_sparsity
    return get_pattern(options.pattern).implied_sparsity


def option_errors(options: SimpleNamespace, criterion: str | None, solver: str) -> list[str]:
    """Returns the errors of options by themselves: unknown names, invalid method options, numbers out of range.

    Args:
        criterion, solver: the names, with defaults filled in; no criterion if the solver selects the pruned units.
    """
    return _name_errors(options, criterion, solver) + _range_errors(options)


def pattern_of(options: SimpleNamespace) -> Pattern | None:
    """Returns the pattern of the options; None if it is unknown, which is an error of its own."""
    try:
        return get_pattern(options.pattern)
    except ValueError:
        return None


def is_n_of_m(pattern: object) -> bool:
    """Whether the value of the option `pattern` is N:M."""
    found = pattern_of(SimpleNamespace(pattern=pattern))
    return found is not None and found.n_of_m[0] > 0


def _name_errors(options: SimpleNamespace, criterion: str | None, solver: str) -> list[str]:
    errors, defaults = [], {"criterion": criterion, "solver": solver}
    for name, registry in METHODS.items():
        if not hasattr(options, name):
            continue
        value, kwargs = getattr(options, name), getattr(options, f"{name}_kwargs")
        chosen = defaults.get(name, value)
        if chosen is None:
            if kwargs:
                errors.append(
                    f"`{name}_kwargs` is {format_value(kwargs)}, but no {name} is used: name one, or leave them out."
                )
        elif chosen not in registry:
            others = [other for other in METHODS if chosen in METHODS[other]]
            hint = "".join(f' Another option has a method of this name: `{other}="{chosen}"`.' for other in others)
            errors.append(f"`{name}` is {registry.describe(chosen)}{hint}")
        else:
            try:
                registry.create(chosen, kwargs)
            except ValueError as error:
                text = str(error)
                errors.append(f"`{name}_kwargs`: {text}{'' if text.endswith(('.', '?')) else '.'}")
    for name, names in {"scheduler": SCHEDULERS, "sparsity_decay_type": CURVES}.items():
        value = getattr(options, name, None)
        if value is not None and value not in names:
            errors.append(f"`{name}` is {names.describe(value)}")
    scope = choice_error("scope", options.scope, SCOPES) if options.scope is not None else None
    errors += [
        error for error in (scope, choice_error("on_indivisible", options.on_indivisible, ON_INDIVISIBLE)) if error
    ]
    try:
        get_pattern(options.pattern)
    except ValueError as error:
        errors.append(f"{error}")
    return errors


def _range_errors(options: SimpleNamespace) -> list[str]:
    errors = []
    shares = ("target_sparsity", "initial_sparsity", "min_sparsity_per_layer", "max_sparsity_per_layer")
    for name in shares:
        value = getattr(options, name, None)
        if value is not None and not 0 <= value <= 1:
            errors.append(f"`{name}` is {format_value(value)}: it must be a number from 0 to 1 (0.8 prunes 80%).")
    swaps = getattr(options, "swaps", None) or 0
    if swaps < 0:
        errors.append(f"`swaps` is {swaps}: it must be 0, to leave the mask as it is, or more, as in 25.")
    return errors + (_schedule_errors(options) if hasattr(options, "prune_start") else [])


_MAX_STEPS = 10**15
"""More optimizer steps than any training has. Up to here floats hold whole numbers exactly."""


def _is_steps_or_fraction(value: float) -> bool:
    return 0 <= value < 1 or (1 <= value <= _MAX_STEPS and value == int(value))


def _schedule_errors(options: SimpleNamespace) -> list[str]:
    errors = []
    for name in ("prune_start", "prune_end", "prune_every"):
        value = getattr(options, name)
        if not _is_steps_or_fraction(value):
            errors.append(
                f"`{name}` is {format_value(value)}: it must be a whole number of steps, or a fraction of training "
                "below 1."
            )
    errors += _rewind_errors(options)
    start, end = options.prune_start, options.prune_end
    if 0 <= end < start and (start < 1) == (end < 1):
        errors.append(f"`prune_start` is {start}, after `prune_end`, {end}: swap them.")
    if end == 1:
        errors.append(
            "`prune_end` is 1, which is the first optimizer step and not all of training: give 0 for the first step, "
            "0.9999 for the last, or a number of steps."
        )
    return errors


def _rewind_errors(options: SimpleNamespace) -> list[str]:
    rewind, end = options.rewind, options.prune_end
    if rewind is None:
        return [] if options.rewind_weights else ["`rewind_weights` needs `rewind`: give it, as in `rewind=0.1`."]
    if not _is_steps_or_fraction(rewind):
        return [
            f"`rewind` is {format_value(rewind)}: it must be a whole number of steps, or a fraction of training below "
            "1."
        ]
    if 0 <= end <= rewind and (rewind < 1) == (end < 1):
        return [
            f"`rewind` is {rewind}, not before `prune_end`, {end}: training can only restart from a step before the "
            "last prune step. Lower `rewind`."
        ]
    return []


def consistency_errors(options: SimpleNamespace, criterion: str | None) -> list[str]:
    """Returns the errors of valid options that contradict each other."""
    errors, pattern = [], get_pattern(options.pattern)
    target = target_of(options) or 0.0
    implied = pattern.implied_sparsity
    if implied is not None and target and abs(target - implied) > 1e-9:
        errors.append(
            f'`target_sparsity` is {target}, but `pattern` "{options.pattern}" always gives {implied:g}: leave '
            "`target_sparsity` out or choose another pattern."
        )
    if implied is not None and options.allocation != DEFAULT_ALLOCATION:
        errors.append(
            f'`allocation` is "{options.allocation}", but `pattern` "{options.pattern}" gives every layer '
            f"{implied:g}: leave `allocation` out, or choose another pattern."
        )
    if not pattern.has_layers:
        errors += _scope_errors(options)
    elif options.scope == "row" and not pattern.has_rows:
        errors.append(
            f'`scope` "row" needs several units in a row, but `pattern` "{options.pattern}" has one: use '
            '`scope="layer"`.'
        )
    if pattern.has_layers and options.scope == "global" and options.allocation != DEFAULT_ALLOCATION:
        errors.append(
            f'`allocation` is "{options.allocation}", but `scope` "global" distributes nothing over layers: use '
            '`scope="layer"`, or leave one of them out.'
        )
    return errors + _bound_errors(options, target)


def _scope_errors(options: SimpleNamespace) -> list[str]:
    """Returns the errors of options under which a layer is pruned by itself, with units that are whole layers."""
    errors = []
    for name, usual in (("scope", "global"), ("allocation", DEFAULT_ALLOCATION)):
        value = getattr(options, name)
        if value not in (None, usual):
            errors.append(
                f'`{name}` is "{value}", but with `pattern` "{options.pattern}" a layer is one unit, so that only '
                f'layers compete: use `{name}="{usual}"`, or leave it out.'
            )
    return errors


def _bound_errors(options: SimpleNamespace, target: float) -> list[str]:
    least, initial = options.min_sparsity_per_layer or 0.0, getattr(options, "initial_sparsity", 0.0)
    most = resolve_max_sparsity(options.max_sparsity_per_layer, target, get_pattern(options.pattern))
    errors = []
    if initial > target:
        errors.append(f"`initial_sparsity` is {initial}, above the target, {target}: lower it.")
    if least > target:
        errors.append(f"`min_sparsity_per_layer` is {least}, above the target, {target}: lower it.")
    if most < target:
        errors.append(f"`max_sparsity_per_layer` is {most}, below the target, {target}: raise it.")
    return errors


def training_errors(group: ResolvedGroup) -> list[str]:
    """Returns what a group needs that training does not compute: anything about the inputs of weights."""
    methods = {"criterion": group.criterion, "allocation": group.allocation}
    usable = {
        "criterion": [name for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS],
        "allocation": [name for name in ALLOCATIONS.names() if not ALLOCATIONS[name].requires & Requires.INPUTS],
    }
    names = {"criterion": group.criterion_name, "allocation": group.allocation_name}
    return [
        f'`{kind}` "{names[kind]}" needs inputs of the weights, which training does not observe: use prune_oneshot, '
        f"or one of {', '.join(usable[kind])}."
        for kind, method in methods.items()
        if method is not None and method.requires & Requires.INPUTS
    ]


def oneshot_errors(options: SimpleNamespace, criterion: str | None, solver: str) -> list[str]:
    """Returns what one-shot pruning cannot do."""
    errors = _coupled_errors(options, criterion, solver) + _swap_errors(options, criterion)
    errors += _permute_errors(options, criterion)
    if criterion is None and options.scope not in (None, *SOLVERS[solver].scopes):
        within = " or ".join(f"a {scope}" for scope in SOLVERS[solver].scopes)
        usable = " or ".join(f'`scope="{scope}"`' for scope in SOLVERS[solver].scopes)
        errors.append(
            f'`scope` is "{options.scope}", but `solver` "{options.solver}" selects within {within}: use {usable}, or '
            'name a criterion, as in `criterion="wanda"`.'
        )
    if criterion is None and not get_pattern(options.pattern).has_rows:
        errors.append(
            f'`solver` "{options.solver}" cannot select units of `pattern` "{options.pattern}", which leaves no '
            'weight in a row to compensate: name a criterion, as in `criterion="wanda"`.'
        )
    if criterion is not None and CRITERIA[criterion].requires & Requires.GRADIENT_HISTORY:
        errors.append(
            f'`criterion` "{criterion}" needs the gradients of many optimizer steps, and one-shot pruning takes none: '
            'use `criterion="fisher"`, or prune while training.'
        )
    elif criterion is not None and getattr(CRITERIA.create(criterion, options.criterion_kwargs), "decay", 1.0) < 1:
        errors.append(
            f'`criterion` "{criterion}" weights later batches more, which has no meaning while weights are constant: '
            'use `criterion="snip"`, or `criterion_kwargs={"decay": 1.0}`.'
        )
    return errors


def _swap_errors(options: SimpleNamespace, criterion: str | None) -> list[str]:
    """Returns the errors of refining a mask: it must exist before the solver, and have units of single weights."""
    errors = []
    if options.swaps and criterion is None:
        errors.append(
            f'`swaps` is {options.swaps}, but `solver` "{options.solver}" selects the pruned units itself: name a '
            'criterion, as in `criterion="wanda"`, or use `swaps=0`.'
        )
    if options.swaps and not supports_swaps(get_pattern(options.pattern)):
        errors.append(
            f'`swaps` is {options.swaps}, but with `pattern` "{options.pattern}" units are not single weights: use '
            "`swaps=0`, or a pattern of single weights, as in unstructured or 2:4."
        )
    return errors


def _permute_errors(options: SimpleNamespace, criterion: str | None) -> list[str]:
    if not options.permute:
        return []
    if not get_pattern(options.pattern).n_of_m[0]:
        return [
            f'`permute` orders channels for N:M, and has no effect on `pattern` "{options.pattern}": use '
            '`pattern="2:4"`, or leave `permute` out.'
        ]
    if criterion is not None and CRITERIA[criterion].requires & Requires.POSITION:
        return [
            f'`permute` keeps more of the scores of weights, and `criterion` "{criterion}" scores their positions: '
            'use `criterion="wanda"`, or leave `permute` out.'
        ]
    return []


def _coupled_errors(options: SimpleNamespace, criterion: str | None, solver: str) -> list[str]:
    """Returns the errors of methods that are of coupled units alone, or not of these."""
    kind, errors = get_pattern(options.pattern).coupled_kind, []
    requires = Requires.NOTHING if criterion is None else CRITERIA[criterion].requires
    if kind is None and requires & (Requires.INPUT_VARIANCES | Requires.GRAM):
        errors.append(
            f'`criterion` "{criterion}" scores neurons and heads, not units of `pattern` "{options.pattern}": use '
            '`pattern="neuron"`, `pattern="head"`, or `criterion="wanda"`.'
        )
    if kind is None and SOLVERS[solver].prunes_columns:
        errors.append(
            f'`solver` "{solver}" updates weights of which whole columns are pruned, not those of `pattern` '
            f'"{options.pattern}": use `pattern="neuron"`, `pattern="head"`, or `solver="sparsegpt"`.'
        )
    if (requires & Requires.BLOCK_INFLUENCES) and kind != "layer":
        errors.append(
            f'`criterion` "{criterion}" scores whole layers, not units of `pattern` "{options.pattern}": use '
            '`pattern="layer"`.'
        )
    if kind == "layer" and requires & (Requires.INPUTS ^ Requires.BLOCK_INFLUENCES):
        errors.append(
            f'`criterion` "{criterion}" scores the inputs of single weights, not whole layers: leave it out, or use '
            '`criterion="block_influence"` or "magnitude".'
        )
    if kind == "layer" and SOLVERS[solver].updates:
        errors.append(
            f'`solver` "{solver}" updates the weights that remain in a matrix, but `pattern` "{options.pattern}" '
            'leaves none: use `solver="none"`.'
        )
    if kind == "layer" and options.reconstruct:
        errors.append(
            f'`reconstruct` tunes the weights that remain in a block, but `pattern` "{options.pattern}" may leave '
            "none: leave `reconstruct` out."
        )
    if kind is not None and ALLOCATIONS[options.allocation].requires & Requires.DENSE_INPUTS:
        errors.append(
            f'`allocation` "{options.allocation}" is of weights by themselves, not of `pattern` "{options.pattern}": '
            'use `allocation="uniform"`, which also gives all layers one width.'
        )
    return errors
