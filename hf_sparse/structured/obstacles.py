"""Which kinds of units can be removed from a model, asked before training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..model.coupling import UnitGroup, find_unit_groups
from ..model.layers import plain_name
from .config_fields import table_obstacle
from .reduction import Reduction
from .unit_removal import remove_units


def shrink_obstacle(model: nn.Module, kind: str) -> str | None:
    """Returns why units of a kind cannot be removed from a model, and what to do instead; None if they can.

    It can be asked before training, of models on the meta device, sharded models and models with adapters of PEFT.

    Args:
        model: a model of transformers.
        kind: "neuron", "head" or "layer".

    Raises:
        ValueError: the kind is unknown.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> model = BertModel(BertConfig(vocab_size=9, **sizes))
        >>> print(shrink_obstacle(model, "neuron"))
        None
        >>> shrink_obstacle(model, "head")[:75]
        'the config of a "bert" model has no field for fewer heads of the same size,'
    """
    if hasattr(model, "get_base_model"):
        model = _without_adapters(model)
    groups = find_unit_groups(model, kind)
    if not groups:
        return f"no units of kind {kind} were found in {type(model).__name__}: its structure is not known."
    for group in groups:
        if obstacle := table_obstacle(model, group):
            return obstacle
    if kind == "layer":
        return None
    trial = Reduction(model)
    remove_units(trial, kind, multiple_of=1, find_zeros=_all_but_one)
    return None if trial.changes else trial.reasons[0].partition(": ")[2]


def selection_obstacle(model: nn.Module, groups: Sequence[UnitGroup], uneven: bool) -> str | None:
    """Returns why units that are about to be pruned cannot be removed afterwards, and what to do instead; None if they
    can.

    Args:
        model: a model of transformers.
        groups: the units to prune, of one kind.
        uneven: whether layers may lose different numbers of units.
    """
    kind = groups[0].kind
    if (obstacle := shrink_obstacle(model, kind)) or kind == "layer":
        return obstacle
    if uneven:
        return (
            f"layers may keep different numbers of {kind}s, but the config has one size for all of them, so that the "
            'largest decides: use `scope="layer"` and `allocation="uniform"` for a model that gets smaller.'
        )
    names = {plain_name(group.name) for group in groups}
    if hasattr(model, "get_base_model"):
        model = _without_adapters(model)
    trial = Reduction(model)

    def find_zeros(group: UnitGroup, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return _all_but_one(group, parameters) & (group.name in names)

    remove_units(trial, kind, multiple_of=1, find_zeros=find_zeros)
    if trial.changes:
        return None
    return (
        f"{len(groups)} of {len(find_unit_groups(model, kind))} modules with {kind}s are selected, but the config has "
        "one size for all of them, so that none gets smaller: select all, with targets and exclude left out."
    )


def _without_adapters(model: Any) -> nn.Module:
    """Returns the structure, without weights, that a PEFT model has once its adapters are merged."""
    base = model.get_base_model()
    with torch.device("meta"):
        return type(base)(copy.deepcopy(base.config))


def _all_but_one(group: UnitGroup, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.arange(group.num_units) > 0
