"""What one-shot pruning computes in the dense model: gradient statistics, and masks of globally ranked groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.batches import call_model, to_device, with_labels
from ..distributed import Communicator, Shard, build_shards, input_device
from ..engine.coupled_group import CoupledParameterGroup
from ..engine.masks import MaskStore
from ..engine.parameter_group import ParameterGroup
from ..model.coupling import UnitGroup
from ..model.evaluation_mode import evaluation_mode
from ..requires import Requires
from ..statistics import all_finite
from .unit_scores import UnitMaskGradients


def masks_from_dense_model(
    model: nn.Module, groups: Sequence[ParameterGroup], input_statistics: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns masks (bool, of the weight's shape) for groups with scope global. The weights are not changed.

    `input_statistics` maps the name of a layer to what its criterion requires of its inputs, of a shape that
    broadcasts to the weight's, where it requires anything.
    """
    shards, _ = build_shards(dict(model.named_parameters()))
    masks: dict[str, torch.Tensor] = {}
    for group in groups:
        names = [layer.name for layer in group.layers]
        store = MaskStore({name: (shards[name].tensor.shape, shards[name].tensor.device) for name in names})
        if group.options.keep_zeros:
            for name in names:
                store.replace(name, shards[name].tensor != 0)
        statistics = None
        if group.options.requires & Requires.INPUT_NORMS:
            statistics = {name: input_statistics[name].expand(shards[name].shape) for name in names}
        group.prune(1, 1, shards, store, statistics)
        masks |= {name: store.bits(name).neg_().view(torch.bool) for name in names}  # without a copy
    return masks


def accumulate_gradients(
    model: nn.Module, groups: Sequence[ParameterGroup], batches: Sequence[Any], communicator: Communicator
) -> dict[UnitGroup, torch.Tensor]:
    """Runs forward and backward passes over the batches of all ranks, and accumulates the statistics of the criteria
    that require gradients, either of weights or of the masks of coupled units.

    Args:
        model: its gradients are cleared.
        groups: those whose criterion requires no gradients are left alone.
        batches: those of this rank.
        communicator: the ranks.

    Returns:
        The scores of coupled units.

    Raises:
        ValueError: a batch gives no loss, or a gradient is inf or nan.
    """
    groups = [group for group in groups if group.requires_gradients]
    unit_masks = UnitMaskGradients(model, [group for group in groups if isinstance(group, CoupledParameterGroup)])
    groups = [group for group in groups if not group.options.units]
    shards, _ = build_shards(dict(model.named_parameters()))
    error = None
    with evaluation_mode(model), torch.enable_grad(), unit_masks:
        try:
            for index, batch in enumerate(batches):
                _observe_gradients(model, groups, shards, batch, index)
                unit_masks.step()
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
        finally:
            model.zero_grad(set_to_none=True)
    communicator.raise_together(error)
    statistics = [statistic for group in groups for statistic in group.gradient_sums.values()]
    for statistic in (*statistics, *unit_masks.statistics.values()):
        communicator.all_reduce(statistic.total)
        statistic.count = int(communicator.sum_counts(np.array([statistic.count]))[0])
    return unit_masks.scores()


def _observe_gradients(
    model: nn.Module, groups: Sequence[ParameterGroup], shards: Mapping[str, Shard], batch: Any, index: int
) -> None:
    model.zero_grad(set_to_none=True)
    output = call_model(model, to_device(with_labels(model, batch), input_device(model)))
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"a criterion of gradients needs a loss, but the model gives none for calibration batch {index}: add "
            '"labels" to the batches.'
        )
    loss.backward()
    gradients = [shards[layer.name].gradient for group in groups for layer in group.layers]
    if not all_finite(gradient for gradient in gradients if gradient is not None):
        raise ValueError(
            f"gradients of calibration batch {index} are inf or nan: run the model in bfloat16 or float32, or check "
            "it for a broken weight."
        )
    for group in groups:
        group.observe(shards)
