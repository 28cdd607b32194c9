"""Mappings of option names to values: of groups, of files of earlier versions, with instances of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..algorithms import ALGORITHMS
from ..allocations import ALLOCATIONS
from ..criteria import CRITERIA
from ..methods import MethodRegistry
from ..model.layers import BODY
from ..patterns import Pattern, get_pattern
from ..penalties import PENALTIES
from ..registry import format_name, nearest
from ..solvers import SOLVERS


DEFAULT_ALLOCATION, DEFAULT_SOLVER = "uniform", "none"
EARLIER_DEFAULTS: dict[str, Any] = {"targets": [BODY], "max_sparsity_per_layer": 1.0}
"""Defaults that earlier versions have written as None. Later versions have others, which are never None in a file."""
METHODS: dict[str, MethodRegistry] = {
    "criterion": CRITERIA,
    "allocation": ALLOCATIONS,
    "solver": SOLVERS,
    "algorithm": ALGORITHMS,
    "penalty": PENALTIES,
}
"""Options that name a method with options of its own, `<name>_kwargs`."""


def merge_group_options(shared: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of one group: its own, and for the others those that all groups share.

    A group that names a method does not inherit the shared options of that method, and a group whose pattern implies a
    target (2:4) inherits neither the shared target nor an allocation of it.

    Example:
        >>> merge_group_options({"pattern": "4x1", "target_sparsity": 0.8}, {"pattern": "2:4"})
        {'pattern': '2:4', 'target_sparsity': None}
    """
    merged = {**shared, **group}
    for method in METHODS:
        if method in group and f"{method}_kwargs" not in group and f"{method}_kwargs" in merged:
            merged[f"{method}_kwargs"] = None
    try:
        implied = get_pattern(merged["pattern"]).implied_sparsity
    except (ValueError, KeyError):  # an unknown pattern is an error of its own
        implied = None
    if implied is not None:
        foreign = {"target_sparsity": None, "allocation": DEFAULT_ALLOCATION, "allocation_kwargs": None}
        given = group.keys() | ({"allocation_kwargs"} if "allocation" in group else set())
        merged |= {name: value for name, value in foreign.items() if name in merged and name not in given}
    return merged


def upgrade_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options that an earlier version has written under their present names.

    Example:
        >>> upgrade_options({"solver": "sparsegpt", "dampening": 0.1, "solver_block": None})
        {'solver': 'sparsegpt', 'solver_kwargs': {'dampening': 0.1}}
        >>> upgrade_options({"solver": "zero", "dampening": 0.01, "criterion": "movement"})
        {'solver': 'none', 'criterion': 'greedy_movement'}
        >>> upgrade_options({"criterion": "snip", "regrow": 0.3})["algorithm_kwargs"]
        {'fraction': 0.3, 'decay': 'linear'}

    Raises:
        ValueError: an option has no present form.
    """
    values = upgrade_defaults(_upgrade_regrow(values))
    # These were options of the run, written whatever the solver was.
    old = {"dampening": values.pop("dampening", None), "block_size": values.pop("solver_block", None)}
    kwargs = {name: value for name, value in old.items() if value not in (None, _OLD_DEFAULTS.get(name))}
    values = _upgrade_methods(values, kwargs)
    if isinstance(groups := values.get("groups"), Mapping):
        values["groups"] = {
            name: _upgrade_methods(group, kwargs) if isinstance(group, Mapping) else group
            for name, group in groups.items()
        }
    return values


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether options are those of a file that some version has written, which has all of them, not of a recipe."""
    return {"pattern", "groups"} <= values.keys()


def upgrade_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with the defaults of the version that has written all of them, where these were others."""
    earlier = EARLIER_DEFAULTS.items() if is_whole(values) else ()
    return {**values, **{name: value for name, value in earlier if values.get(name, value) is None}}


_OLD_DEFAULTS = {"dampening": 0.01}


def _upgrade_regrow(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with the algorithm that has replaced `regrow`, and the criterion that was the default then."""
    values, groups = dict(values), values.get("groups")
    found = [values.pop("regrow", None)]
    if isinstance(groups, Mapping):
        values["groups"] = {
            name: dict(group) if isinstance(group, Mapping) else group for name, group in groups.items()
        }
        own = [group.pop("regrow", found[0]) for group in values["groups"].values() if isinstance(group, dict)]
        found = own or found
    fractions = [fraction or 0.0 for fraction in found]
    if any(fraction != fractions[0] for fraction in fractions):
        raise ValueError(
            f"regrow of an earlier version differs between groups ({', '.join(map(str, fractions))}), and the option "
            'that has replaced it, `algorithm="granet"`, is of the whole run: give all groups one value.'
        )
    if not fractions[0]:
        return values
    for options in (values, *(group for group in values.get("groups") or {}.values() if isinstance(group, dict))):
        if options.get("criterion") is None and (options is values or "criterion" in options):
            options["criterion"] = _OLD_CRITERION
    return values | {"algorithm": "granet", "algorithm_kwargs": {"fraction": fractions[0], "decay": "linear"}}


_OLD_CRITERION = "snip_momentum"
"""The criterion of regrowth, where the options named none."""


_OLD_NAMES = {"solver": {"zero": DEFAULT_SOLVER}, "criterion": {"movement": "greedy_movement"}}


def _upgrade_methods(values: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with the present names of methods, and with the options of the solver where they name one."""
    values = dict(values)
    for option, names in _OLD_NAMES.items():
        if isinstance(value := values.get(option), str):
            values[option] = names.get(value, value)
    if kwargs and values.get("solver") not in (None, DEFAULT_SOLVER):
        values["solver_kwargs"] = dict(kwargs)
    return values


def unknown_options(values: Mapping[str, Any], where: str, allowed: tuple[str, ...]) -> list[str]:
    """Returns an error for every key of `values` that is no option."""
    known = f" Known are {', '.join(allowed)}."
    unknown = [key for key in values if key not in allowed]
    # As many as anybody reads.
    errors = [f"{where}unknown option {format_name(key)}.{nearest(key, allowed) or known}" for key in unknown[:20]]
    return errors + ([f"{where}{len(unknown) - 20:,} more unknown options."] if len(unknown) > 20 else [])


def replace_instances(values: dict[str, Any]) -> list[str]:
    """Replaces instances in a mapping of options by names and options, in place. Returns the errors."""
    errors = []
    for method, registry in METHODS.items():
        instance = values.get(method)
        if registry.base is None or not isinstance(instance, registry.base):
            continue
        try:
            values[method], kwargs = registry.name_and_options(instance)
        except ValueError as error:
            errors.append(f"`{method}`: {error}")
            values[method], kwargs = None, {}
        if values.get(f"{method}_kwargs"):
            errors.append(f"`{method}` is an instance with its own options: leave `{method}_kwargs` out.")
        values[f"{method}_kwargs"] = kwargs
    if isinstance(pattern := values.get("pattern"), Pattern):
        values["pattern"] = str(pattern)
        try:
            known = get_pattern(str(pattern))
        except ValueError as error:
            errors.append(f"{error} Decorate its class with register_pattern.")
        else:
            if known != pattern:
                errors.append(
                    f"`pattern` {pattern!r} is written as {pattern}, which means {known!r}: define its __str__."
                )
    return errors
