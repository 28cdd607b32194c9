"""A dry run of one-shot pruning: what would be pruned, and the memory and time that it would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.batches import count_tokens
from ..config import OneshotConfig, PruningConfig
from ..engine.coupled_group import CoupledParameterGroup
from ..engine.parameter_group import ParameterGroup
from ..model.coupling import UnitGroup
from ..model.layers import PrunableLayer
from ..reporting.layer_groups import group_layers, group_rows, is_grouped
from ..reporting.tables import Table
from ..reporting.tabular import Tabular
from ..requires import Requires
from .costs import Costs, estimate_costs
from .prepare import PreparedRun, prepare_run
from .unit_selection import select_units


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer.

    Args:
        num_pruned: how many of the units will be zero; None if that is decided by a global ranking or by its inputs.
        subgraph: name of the block or subgraph that it is pruned with; None if its inputs are not observed.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    pattern: str
    num_weights: int
    num_units: int
    num_pruned: int | None
    subgraph: str | None


@dataclass(frozen=True, repr=False)
class OneshotPlan(Tabular):
    """What a one-shot run would do. `print(plan)` and notebooks show a table.

    Args:
        layers: the selected layers.
        num_subgraphs: the number of blocks, or of subgraphs outside blocks, that are pruned one after the other.
        num_tokens: the number of calibration tokens without padding.
        costs: memory and time.
        methods: for each group of layers that is pruned, criterion, scope, allocation and solver; and what is done
            block by block.
    """

    layers: tuple[LayerPlan, ...]
    num_subgraphs: int
    num_tokens: int
    costs: Costs
    methods: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"OneshotPlan({self._summary})"

    @property
    def _summary(self) -> str:
        return (
            f"layers: {len(self.layers)} with {sum(layer.num_weights for layer in self.layers):,} weights; "
            f"blocks: {self.num_subgraphs}; calibration tokens: {self.num_tokens:,}"
        )

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        names = [layer.name for layer in self.layers]
        shapes = ["x".join(map(str, layer.shape)) for layer in self.layers]
        rows: list[tuple[str, ...]]
        if is_grouped(names, all_layers):
            labels = [shapes, [layer.pattern for layer in self.layers]]
            rows = group_rows(group_layers(names)[1], labels, self._counts)
            table = Table(("kind", "shape", "pattern", "layers", "units", "to prune"), tuple(rows), 3)
        else:
            rows = [
                (layer.name, shape, layer.pattern, layer.subgraph or "-", *self._counts([index]))
                for index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True))
            ]
            table = Table(("layer", "shape", "pattern", "block", "units", "to prune"), tuple(rows), 4)
        return [table, *self.methods, self._summary, str(self.costs)]

    def _counts(self, indices: Sequence[int]) -> tuple[str, str]:
        """The units of some layers, and how many of them are pruned."""
        layers = [self.layers[index] for index in indices]
        pruned = [layer.num_pruned for layer in layers if layer.num_pruned is not None]
        to_prune = f"{sum(pruned):,}" if len(pruned) == len(layers) else "ranked"
        return f"{sum(layer.num_units for layer in layers):,}", to_prune


def plan_oneshot(
    model: nn.Module, calibration_data: Iterable[Any] | None, config: OneshotConfig | PruningConfig
) -> OneshotPlan:
    """Returns what `prune_oneshot` would do with the same arguments, without changing the model. It raises the same
    errors, as far as one batch shows them.

    Runs a few forwards of one batch. The memory is that of a block while it is pruned, in addition to the model and
    one forward; it is counted. The time is extrapolated from the measured forwards: an order of magnitude.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> plan = plan_oneshot(model, [torch.ones(3, 4)], OneshotConfig(target_sparsity=0.5))
        >>> plan.layers[0].num_units, plan.layers[0].num_pruned, plan.costs.activation_bytes
        (8, 4, 24)
    """
    run = prepare_run(model, calibration_data, OneshotConfig.of(config))
    trace = run.trace()
    costs = estimate_costs(run, trace)
    subgraphs = () if trace is None else tuple(trace.subgraphs)
    subgraph_of = {layer.name: subgraph.name for subgraph in subgraphs for layer in subgraph.layers}
    num_pruned = {name: count for group in run.groups for name, count in _num_pruned(run, group).items()}
    layers = tuple(
        LayerPlan(
            name=layer.name,
            group=group.name,
            shape=layer.shape,
            pattern=str(group.pattern),
            num_weights=layer.numel,
            num_units=_num_units(group, layer),
            num_pruned=num_pruned.get(layer.name),
            subgraph=subgraph_of.get(layer.name),
        )
        for group in run.groups
        for layer in group.layers
    )
    return OneshotPlan(layers, len(subgraphs), sum(map(count_tokens, run.batches)), costs, _methods(run))


def _methods(run: PreparedRun) -> tuple[str, ...]:
    """What a quality preset or the options chose, in lines."""
    quality = f"quality {run.config.quality}: " if run.config.quality else ""
    stages = ", reconstruct" if run.config.reconstruct else ""
    groups = [group.options.to_dict() for group in run.groups if group.target]
    options = ("criterion", "scope", "allocation", "permute", "swaps", "solver")
    lines = (", ".join(_format_option(name, group[name]) for name in options if group.get(name)) for group in groups)
    names = (f"{group['group']}: " if len(groups) > 1 else "" for group in groups)
    return tuple(f"{quality}{name}{line}{stages}" for name, line in zip(names, lines, strict=True))


def _num_pruned(run: PreparedRun, group: ParameterGroup) -> dict[str, int]:
    """The number of units of each layer that will be zero, as far as it is known in advance."""
    if isinstance(group, CoupledParameterGroup):
        counts = _unit_counts(run, group)
        return {
            layer.name: sum(counts[units] for units in _units_of(group, layer)) for layer in group.layers if counts
        }
    if not group.target:
        return run.num_locked(group) or dict.fromkeys((layer.name for layer in group.layers), 0)
    if group.options.ranks_all_layers or group.options.requires & Requires.DENSE_INPUTS:
        return {}
    return group.prune_counts(run.num_locked(group), {})


def _num_units(group: ParameterGroup, layer: PrunableLayer) -> int:
    """The number of units of a layer, or of the coupled units that have a part in it."""
    if not isinstance(group, CoupledParameterGroup):
        return group.options.num_units(layer)
    return sum(units.num_units for units in _units_of(group, layer))


def _units_of(group: CoupledParameterGroup, layer: PrunableLayer) -> list[UnitGroup]:
    return [units for units in group.units if layer.name in units.parameters]


def _unit_counts(run: PreparedRun, group: CoupledParameterGroup) -> dict[UnitGroup, int]:
    """The number of coupled units to prune, where scope layer decides it; else nothing."""
    if not group.target or group.options.ranks_all_layers:
        return {}
    zeros = {units: torch.zeros(units.num_units) for units in group.units}
    return select_units(run.model, [group], zeros).counts


def _format_option(name: str, value: object) -> str:
    return name if value is True else f"{name} {value}"
