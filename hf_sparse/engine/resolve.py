"""Resolves a config against a model: the parameter groups with their layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..config import PruningConfigError, ResolvedGroup
from ..config.base import PruningOptions
from ..config.validation import training_errors
from ..model.layers import PrunableLayer, find_layers, select_layers
from ..requires import Requires


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
        layers, problems = select_layers(all_layers, options.targets, options.exclude)
        problems += [] if observes_inputs else training_errors(options)
        errors += [where + problem for problem in problems]
        for layer in layers:
            if layer.name in owners:
                errors.append(f'"{layer.name}" is in the groups "{owners[layer.name]}" and "{name}": narrow one.')
            owners[layer.name] = name
        divisible = _divisible(layers, options, where, errors, skipped)
        if divisible and not errors:
            try:
                groups.append(options.with_layers(divisible))
            except ValueError as error:
                errors.append(f"{where}{error}")
        elif layers and not divisible and options.on_indivisible == "skip":
            errors.append(f'{where}pattern "{options.pattern}" divides none of the {len(layers)} selected weights.')
    if not errors:
        errors += _frozen_errors(model, groups)
    if errors:
        raise PruningConfigError(errors)
    return groups, skipped


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
                f'exclude=["{layer.module}"], set on_indivisible="skip", or choose pattern="unstructured".'
            )
    return divisible


def _frozen_errors(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[str]:
    parameters, errors = dict(model.named_parameters()), []
    for group in groups:
        frozen = [layer for layer in group.layers if not parameters[layer.name].requires_grad]
        if frozen and (group.requires & Requires.GRADIENTS or group.regrow):
            errors.append(
                f'criterion "{group.criterion_name}" needs gradients, but "{frozen[0].name}" is frozen '
                f"(requires_grad=False), one of {len(frozen)} such weights of {len(group.layers)}: exclude them, as "
                f'with exclude=["{frozen[0].module}"], or use criterion="magnitude".'
            )
    return errors
