"""Channels whose order is free: an order of the columns of a weight that the layer before it can take over.

These are the neurons of an FFN and the values of an attention head. Whether nothing between the two layers acts on
single channels is checked on calibration data.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..calibration.batches import call_model, to_device
from ..distributed import Communicator, input_device
from ..engine.parameter_group import ParameterGroup
from ..model.coupling import UnitGroup, UnitSlice, find_unit_groups
from ..model.evaluation_mode import evaluation_mode


logger = logging.getLogger(__name__)

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5}
_HALF_PRECISION_TOLERANCE = 1e-3


def find_free_channels(model: nn.Module, groups: Mapping[str, ParameterGroup]) -> list[UnitGroup]:
    """Returns the channels that may be put in any order, where their order matters to a group with `permute`.

    Channels of fused experts are left out, those of weights with several names, and those whose producer is pruned in
    blocks of rows.

    Args:
        model: the model.
        groups: maps the name of each selected layer to its parameter group.
    """
    if not any(group.options.permute for group in groups.values()):
        return []
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    found = []
    for units in (*find_unit_groups(model, "neuron"), *find_unit_groups(model, "value")):
        (reader,) = {part.name for part in units.readers}
        group = groups.get(reader)
        if group is None or not group.options.permute or units.num_units % group.pattern.n_of_m[1]:
            continue
        if any(part.expert is not None or names[id(parameters[part.name])] > 1 for part in units.slices):
            continue
        producers = [
            part.name for part in units.slices if not part.reads
        ]  # none where values are those of a layer before
        if producers and all(_keeps_units(groups.get(name), parameters[name]) for name in producers):
            found.append(units)
    return found


def _keeps_units(group: ParameterGroup | None, parameter: nn.Parameter) -> bool:
    """Whether another order of the rows of a weight leaves the units of its group whole."""
    return group is None or not group.target or group.pattern.unit_rows(parameter.shape[0]) == 1


def reading_weight(units: UnitGroup) -> str:
    """Returns the name of the weight that reads the channels."""
    return units.readers[0].name


def verify_free_channels(
    model: nn.Module, channels: Sequence[UnitGroup], batch: Any, communicator: Communicator
) -> list[UnitGroup]:
    """Returns the channels whose order has no effect on the outputs for a batch, and warns of the others.

    The outputs of the producing layers are permuted, and the inputs of the reading layers permuted back.
    """
    if not channels:
        return []
    expected = _outputs(model, batch)

    def agrees(chosen: Sequence[UnitGroup]) -> bool:
        with _Permuted(model, chosen):
            differs = _difference(expected, _outputs(model, batch)) > _tolerance(model)
        return not communicator.any(differs)

    if agrees(channels):
        return list(channels)
    by_reader: dict[str, list[UnitGroup]] = {}
    for units in channels:
        by_reader.setdefault(reading_weight(units), []).append(units)
    free = []
    for name, own in by_reader.items():
        if agrees(own):
            free += own
        else:
            logger.warning('the inputs of "%s" keep their order: the model treats them differently.', name)
    return free


class _Permuted:
    """A context in which channels pass from their producers to their readers in another order."""

    def __init__(self, model: nn.Module, channels: Iterable[UnitGroup]):
        self._model = model
        self._orders: dict[tuple[str, bool], torch.Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for units in channels:
            order = torch.randperm(units.num_units, generator=generator)
            for part in units.slices:
                self._add(part, order)

    def _add(self, part: UnitSlice, order: torch.Tensor) -> None:
        weight = self._model.get_parameter(part.name)
        if weight.ndim < 2:
            return  # a bias is in the output of its layer
        key = (part.name.rpartition(".")[0], part.reads)
        places, sources = part.indices(torch.arange(len(order))), part.indices(order)
        index = self._orders.setdefault(key, torch.arange(weight.shape[part.dim]))
        index[sources if part.reads else places] = places if part.reads else sources

    def __enter__(self) -> None:
        self._handles = ExitStack()
        for (name, reads), order in self._orders.items():
            module = self._model.get_submodule(name)
            if reads:
                handle = module.register_forward_pre_hook(_reorder_input(order), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_reorder_output(order))
            self._handles.enter_context(handle)

    def __exit__(self, *error: object) -> None:
        self._handles.close()


def _reorder_input(order: torch.Tensor) -> Callable:
    def reorder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0][..., order.to(args[0].device)], *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, kwargs | {name: x[..., order.to(x.device)]}

    return reorder


def _reorder_output(order: torch.Tensor) -> Callable:
    def reorder(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output[..., order.to(output.device)]

    return reorder


def _outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    """The floating-point outputs of the model, without a cache of keys and values, which hold permuted channels."""
    with torch.no_grad(), evaluation_mode(model):
        output = call_model(model, to_device(batch, input_device(model)))
    named = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    return [value.float() for value in named if torch.is_tensor(value) and value.is_floating_point()]


def _difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """The largest relative difference of an output."""
    pairs = zip(expected, found, strict=True)
    return max((float((left - right).norm() / left.norm().clamp(min=1e-30)) for left, right in pairs), default=0.0)


def _tolerance(model: nn.Module) -> float:
    return _TOLERANCES.get(next(model.parameters()).dtype, _HALF_PRECISION_TOLERANCE)
