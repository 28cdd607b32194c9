"""Resolves a config against a model: the parameter groups with their layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..config import PruningConfigError, ResolvedGroup
from ..config.base import PruningOptions
from ..config.options import DEFAULT_ALLOCATION
from ..config.validation import training_errors
from ..distributed import full_shape
from ..model.coupling import UnitGroup, find_unit_groups
from ..model.layers import PrunableLayer, find_layers, select_layers
from ..requires import Requires
from ..structured.obstacles import selection_obstacle


def resolve_layers(
    model: nn.Module, config: PruningOptions, observes_inputs: bool = False
) -> tuple[list[ResolvedGroup], list[str]]:
    """Returns the groups of a config with the layers of a model, and the weights that the pattern does not divide.

    Args:
        model: any module.
        config: of training or of one-shot pruning.
        observes_inputs: whether the inputs of the weights are observed, as in one-shot pruning.

    Raises:
        PruningConfigError: with every error.
    """
    all_layers = find_layers(model)
    errors: list[str] = []
    groups: list[ResolvedGroup] = []
    skipped: list[str] = []
    owners: dict[str, str] = {}
    for name, options in config.resolve_groups().items():
        where = f'group "{name}": ' if config.groups else ""
        units, layers, problems = _select(model, all_layers, options)
        problems += [
            f'"{layer.name}" of shape {layer.shape} holds no weights: exclude it, as with '
            f'`exclude=["{layer.module}"]`.'
            for layer in layers
            if not layer.numel
        ]
        layers = [layer for layer in layers if layer.numel]
        problems += [] if observes_inputs else training_errors(options)
        errors += [where + problem for problem in problems]
        for layer in layers:
            if layer.name in owners:
                errors.append(f'"{layer.name}" is in the groups "{owners[layer.name]}" and "{name}": narrow one.')
            owners[layer.name] = name
        if options.pattern.coupled_kind is not None:
            groups.append(options.with_units(units, layers, _biases(model, units, layers)))
            continue
        divisible = _divisible(layers, options, where, errors, skipped)
        if divisible and not errors:
            try:
                groups.append(options.with_layers(divisible))
            except ValueError as error:
                errors.append(f"{where}{error}")
        elif layers and not divisible and options.on_indivisible == "skip":
            errors.append(f'{where}`pattern` "{options.pattern}" divides none of the {len(layers)} selected weights.')
    if not errors:
        errors += _frozen_errors(model, groups)
    if errors:
        raise PruningConfigError(errors)
    return groups, skipped


def removal_warnings(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[str]:
    """Returns for each group whose coupled units `shrink` will not be able to remove why, and what to do instead."""
    warnings = []
    for group in groups:
        uneven = group.scope == "global" or group.allocation_name != DEFAULT_ALLOCATION
        if group.units and (obstacle := selection_obstacle(model, group.units, uneven)):
            warnings.append(f'pattern "{group.pattern}" of group "{group.name}": {obstacle}')
    return warnings


def _select(
    model: nn.Module, all_layers: Sequence[PrunableLayer], options: ResolvedGroup
) -> tuple[list[UnitGroup], list[PrunableLayer], list[str]]:
    """Returns the selected coupled units (none where units are parts of one weight), the selected layers, and errors.

    Coupled units are selected if any of their weights matches `targets` and none matches `exclude`.
    """
    kind = options.pattern.coupled_kind
    if kind is None:
        return [], *select_layers(all_layers, options.targets, options.exclude)
    found = find_unit_groups(model, kind)
    if not found:
        remedy = 'choose another pattern, such as "channel".'
        return [], [], [f'`pattern` "{options.pattern}" finds none of its units in {type(model).__name__}: {remedy}']
    names = {name for group in found for name in group.parameters}
    members = [layer for layer in all_layers if layer.name in names]
    targeted, errors = select_layers(members, options.targets, None)
    left, more = (members, []) if not options.exclude else select_layers(members, ["*"], options.exclude)
    targeted_names = {layer.name for layer in targeted}
    excluded_names = {layer.name for layer in members} - {layer.name for layer in left}
    units = [
        group
        for group in found
        if not targeted_names.isdisjoint(group.parameters) and excluded_names.isdisjoint(group.parameters)
    ]
    errors += more
    if not units and not errors:
        errors.append(f"nothing is left to prune: `targets={options.targets}`, `exclude={options.exclude}`.")
    selected = {name for group in units for name in group.parameters}
    return units, [layer for layer in members if layer.name in selected], errors


def _biases(
    model: nn.Module, units: Sequence[UnitGroup], layers: Sequence[PrunableLayer]
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter of coupled units that is not one of their weights."""
    weights, parameters = {layer.name for layer in layers}, dict(model.named_parameters())
    names = dict.fromkeys(name for group in units for name in group.parameters if name not in weights)
    return {name: tuple(full_shape(parameters[name])) for name in names}


def _divisible(
    layers: Sequence[PrunableLayer], options: ResolvedGroup, where: str, errors: list[str], skipped: list[str]
) -> list[PrunableLayer]:
    """Returns the layers that the pattern divides; the names of the others go to `errors` or `skipped`."""
    divisible = []
    for layer in layers:
        rows, _, columns = layer.matrix_shape
        problem = options.pattern.check(rows, columns)
        if not problem:
            divisible.append(layer)
        elif options.on_indivisible == "skip":
            skipped.append(layer.name)
        else:
            errors.append(
                f'{where}{problem}, but "{layer.name}" has {rows} outputs and {columns} inputs. Exclude it with '
                f'`exclude=["{layer.module}"]`, set `on_indivisible="skip"`, or choose `pattern="unstructured"`.'
            )
    return divisible


def _frozen_errors(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[str]:
    parameters, errors = dict(model.named_parameters()), []
    for group in groups:
        frozen = [layer for layer in group.layers if not parameters[layer.name].requires_grad]
        if not frozen:
            continue
        needs = []
        if group.penalty is not None:
            what = f'`penalty` "{group.penalty_name}" draws weights towards zero in training'
            needs.append((what, "leave `penalty` out"))
        if group.algorithm.reads_gradients:
            remedy = 'use `algorithm="gradual"` and `criterion="magnitude"`'
            needs.append((f'`algorithm` "{group.algorithm_name}" needs gradients', remedy))
        elif group.requires & Requires.GRADIENTS:
            needs.append((f'`criterion` "{group.criterion_name}" needs gradients', 'use `criterion="magnitude"`'))
        errors += [
            f'{what}, but "{frozen[0].name}" is frozen (requires_grad=False), one of {len(frozen)} such weights of '
            f'{len(group.layers)}: exclude them, as with `exclude=["{frozen[0].module}"]`, or {remedy}.'
            for what, remedy in needs
        ]
    return errors
