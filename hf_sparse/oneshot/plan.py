"""A dry run: what one-shot pruning would prune, and about what memory and time it would take. Nothing changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.batches import count_tokens
from ..config import OneshotConfig, PruningConfig
from ..engine.parameter_group import ParameterGroup
from ..model.layers import PrunableLayer
from ..reporting.tables import format_table
from ..requires import Requires
from .costs import Costs, costs_of
from .prune import OneshotRun
from .validation import ranks_dense_model


@dataclass(frozen=True)
class LayerPlan:
    """One weight. `falling` of its `units` are to be zero; None where that is decided over all layers together or by
    what is seen of their inputs. `subgraph` is what it is pruned with; None where no input has a say."""

    name: str
    group: str
    shape: tuple[int, ...]
    pattern: str
    weights: int
    units: int
    falling: int | None
    subgraph: str | None


@dataclass(frozen=True)
class OneshotPlan:
    """What a run would do.

    Args:
        layers: the selected weights.
        stages: how many blocks are gone through, one after the other.
        tokens: of the calibration data, padding left out.
        costs: memory and time.
    """

    layers: tuple[LayerPlan, ...]
    subgraphs: int
    tokens: int
    costs: Costs

    def __str__(self) -> str:
        rows = [("layer", "shape", "pattern", "stage", "units", "to fall")]
        for layer in self.layers:
            falling = "ranked" if layer.falling is None else f"{layer.falling:,}"
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, shape, layer.pattern, layer.subgraph or "-", f"{layer.units:,}", falling))
        weights = sum(layer.weights for layer in self.layers)
        text = f"{len(self.layers)} weights of {weights:,} in all, {self.subgraphs} stages, {self.tokens:,} tokens"
        return f"{format_table(rows, text_columns=4)}\n\n{text}\n{self.costs}"


def plan_oneshot(model: nn.Module, calibration_data: Iterable[Any] | None, config: PruningConfig) -> OneshotPlan:
    """What `prune_oneshot` would do with the same arguments. Takes a few forwards of one batch.

    Memory is what stays while a block is pruned, beside the model and one forward. Time comes from the speed of the
    forwards that were run, and is an order of magnitude: see `Costs`.

    Raises:
        as `prune_oneshot` before it prunes anything.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> plan = plan_oneshot(model, [torch.ones(3, 4)], OneshotConfig(target_sparsity=0.5))
        >>> plan.layers[0].units, plan.layers[0].falling, plan.costs.activations
        (8, 4, 24)
    """
    run = OneshotRun(model, calibration_data, OneshotConfig.of(config))
    trace, costs = costs_of(run)
    stage_of = {
        layer.name: subgraph.name for subgraph in (trace.subgraphs if trace else ()) for layer in subgraph.layers
    }
    layers = [
        LayerPlan(
            layer.name,
            group.name,
            layer.shape,
            str(group.pattern),
            layer.numel,
            _units(group, layer),
            falling.get(layer.name),
            stage_of.get(layer.name),
        )
        for group in run.groups
        for falling in [_falling(run, group)]
        for layer in group.layers
    ]
    tokens = sum(map(count_tokens, run.batches))
    return OneshotPlan(tuple(layers), len(trace.subgraphs) if trace else 0, tokens, costs)


def _units(group: ParameterGroup, layer: PrunableLayer) -> int:
    matrices = layer.num_matrices
    return matrices * torch.Size(group.pattern.unit_shape(layer.matrix_shape)).numel()


def _falling(run: OneshotRun, group: ParameterGroup) -> dict[str, int]:
    """How many units of each layer are to be zero, as far as that is known before."""
    if not group.target:
        return run.gone(group) or dict.fromkeys((layer.name for layer in group.layers), 0)
    if ranks_dense_model(group) or group.options.allocation.requires & Requires.OUTLIERS:
        return {}
    return group.prune_counts(run.gone(group), {})
