"""How much each block of a model changes the direction of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import call_model, mask_for_inputs, to_device, token_masks
from ..distributed import Communicator, input_device
from ..engine.coupled_group import CoupledParameterGroup
from ..model.coupling import UnitGroup
from ..model.evaluation_mode import evaluation_mode
from ..requires import Requires


def score_blocks(
    model: nn.Module, groups: Sequence[CoupledParameterGroup], batches: Sequence[Any], communicator: Communicator
) -> dict[UnitGroup, torch.Tensor]:
    """Returns the score of each block that a criterion of block influences may prune, from one forward per batch: how
    much the block changes the direction of its input, a tensor of shape (1).

    Args:
        model: in which no block has been pruned.
        groups: those whose criterion requires something else are left alone.
        batches: those of this rank.
        communicator: the ranks.
    """
    groups = [group for group in groups if group.options.requires & Requires.BLOCK_INFLUENCES]
    blocks = [units for group in groups for units in group.units]
    if not blocks:
        return {}
    observer, error = _BlockObserver(model, [units.name for units in blocks]), None
    config = getattr(model, "config", None)
    with torch.no_grad(), evaluation_mode(model), observer:
        try:
            for batch in batches:
                observer.masks = token_masks(batch, bool(getattr(config, "is_encoder_decoder", False)))
                call_model(model, to_device(batch, input_device(model)))
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
    communicator.raise_together(error)
    totals = torch.tensor([observer.totals[units.name] for units in blocks], dtype=torch.float64)
    communicator.all_reduce(totals)
    counts = communicator.sum_counts(np.array([observer.counts[units.name] for units in blocks], dtype=np.int64))
    influences = totals / torch.from_numpy(counts).clamp(min=1)
    statistics = dict(zip(blocks, influences.float(), strict=True))
    return {
        units: group.criterion.score(torch.ones(1), statistics[units])
        for group in groups
        if group.criterion is not None
        for units in group.units
    }


class _BlockObserver:
    """Sums 1 - cos(x, y) over the tokens that blocks map from x to y."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]):
        self._modules = {name: model.get_submodule(name) for name in blocks}
        self.totals, self.counts = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
        self.masks: list[torch.Tensor] = []

    def __enter__(self) -> _BlockObserver:
        self._handles = ExitStack()
        for name, module in self._modules.items():
            self._handles.enter_context(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def _hook(self, name: str) -> Callable:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x, y = _first_tensor((args, kwargs)), _first_tensor(output)
            distance = 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)
            keep = mask_for_inputs(self.masks, x)
            distance = distance if keep is None else distance[keep.to(distance.device)]
            self.totals[name] += float(distance.sum(dtype=torch.float64))
            self.counts[name] += distance.numel()

        return observe


def _first_tensor(structure: Any) -> torch.Tensor:
    return next(leaf for leaf in _pytree.tree_leaves(structure) if torch.is_tensor(leaf) and leaf.is_floating_point())
