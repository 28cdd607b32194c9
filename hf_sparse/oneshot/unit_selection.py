"""Selects coupled units in the dense model, where they are not selected block by block.

Shapes: U units of one group of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..distributed import Shard
from ..engine.coupled_group import CoupledParameterGroup, keep_masks
from ..engine.masks import MaskStore
from ..model.coupling import UnitGroup
from ..selection.coupled_units import pruned_units, score_units


@dataclass
class UnitSelection:
    """Which coupled units are pruned.

    Args:
        counts: how many units of each group of units to prune, units already zero included.
        keep: (U) bool, True is kept: of groups of units that have been selected.
        locked: (U) bool, True where a unit is zero and stays so.
    """

    counts: dict[UnitGroup, int] = field(default_factory=dict)
    keep: dict[UnitGroup, torch.Tensor] = field(default_factory=dict)
    locked: dict[UnitGroup, torch.Tensor] = field(default_factory=dict)


def select_units(
    model: nn.Module, groups: Sequence[CoupledParameterGroup], known: Mapping[UnitGroup, torch.Tensor]
) -> UnitSelection:
    """Returns the number of units to prune, and the masks of those that are selected before their inputs are observed.

    Args:
        model: the dense model, which is not changed.
        groups: the parameter groups of coupled units.
        known: (U) the scores of groups of units whose criterion needs more than the weights.
    """
    selection = UnitSelection()
    for group in (group for group in groups if group.target):
        locked, scores_of = [torch.zeros(units.num_units, dtype=torch.bool) for units in group.units], []
        shards, masks = {}, MaskStore({})
        if group.options.keep_zeros or group.options.scores_units_by_weights:
            parameters = {name: model.get_parameter(name).detach() for name in group.parameter_shapes}
            shards = {name: Shard(parameter) for name, parameter in parameters.items()}
            masks = MaskStore({name: (parameter.shape, parameter.device) for name, parameter in parameters.items()})
        bits = {name: masks.bits(name) for name in masks}
        weights = {layer.name: shards[layer.name] for layer in group.layers if shards}
        if group.options.keep_zeros:
            group.keep_zeros(shards, masks)
            locked = pruned_units(group.units, weights, bits)
            selection.locked |= dict(zip(group.units, locked, strict=True))
        if group.options.scores_units_by_weights and group.criterion is not None:
            scores_of = score_units(group.units, group.criterion, weights, bits, {})
        elif group.options.selects_units_first:
            scores_of = [known[units] for units in group.units]
        else:
            scores_of = [torch.zeros(units.num_units) for units in group.units]
        scores_of = [
            score_U.masked_fill(mask_U, -torch.inf) for score_U, mask_U in zip(scores_of, locked, strict=True)
        ]
        _check(group, scores_of)
        counts = group.num_pruned_by_group(scores_of, group.target)
        selection.counts |= dict(zip(group.units, counts, strict=True))
        if group.options.selects_units_first:
            selection.keep |= dict(zip(group.units, keep_masks(scores_of, sum(counts), counts, counts), strict=True))
    return selection


def _check(group: CoupledParameterGroup, scores: Sequence[torch.Tensor]) -> None:
    names = [f'"{units.name}"' for units, score_U in zip(group.units, scores, strict=True) if score_U.isnan().any()]
    if names:
        raise ValueError(
            f'group "{group.name}", criterion "{group.options.criterion_name}": scores are nan in {", ".join(names)}'
        )
