"""What one-shot pruning decides on the dense model: masks of what competes over all layers, and sums of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.batches import call_model, to_device, with_labels
from ..distributed import Communicator, build_shards, input_device
from ..engine.masks import MaskStore
from ..engine.parameter_group import ParameterGroup
from ..model.evaluation_mode import evaluation_mode
from ..requires import Requires
from ..statistics import all_finite


def masks_from_dense_model(
    model: nn.Module, groups: Sequence[ParameterGroup], norms: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Masks (bool, of the weight's shape) of the layers of groups that rank over all of them. The weights stay.

    Args:
        norms: name of a layer -> norms of its inputs, of a shape that broadcasts to the weight's, where a group needs
            them.
    """
    shards, _ = build_shards(dict(model.named_parameters()))
    masks: dict[str, torch.Tensor] = {}
    for group in groups:
        names = [layer.name for layer in group.layers]
        store = MaskStore({name: (shards[name].tensor.shape, shards[name].tensor.device) for name in names})
        if group.options.keep_zeros:
            for name in names:
                store.replace(name, shards[name].tensor != 0)
        known = None
        if group.criterion.requires & Requires.INPUT_NORMS:
            known = {name: norms[name].expand(shards[name].shape) for name in names}
        group.prune(1, 1, shards, store, known)
        masks |= {name: store.bits(name).neg_().view(torch.bool) for name in names}  # in the store's memory
    return masks


def accumulate_gradients(
    model: nn.Module, groups: Sequence[ParameterGroup], batches: Sequence[Any], communicator: Communicator
) -> None:
    """Sum up, over all batches of all processes, the saliencies of the groups whose criteria need gradients.

    Raises:
        ValueError: a batch gives no loss, or a gradient is inf or nan.
    """
    groups = [group for group in groups if group.requires_gradients]
    shards, _ = build_shards(dict(model.named_parameters()))
    error = None
    with evaluation_mode(model), torch.enable_grad():
        try:
            for index, batch in enumerate(batches):
                _observe(model, groups, shards, batch, index)
        except Exception as problem:  # whatever it is, the other processes must not wait
            error = problem
        finally:
            model.zero_grad(set_to_none=True)
    communicator.raise_together(error)
    for stat in (stat for group in groups for stat in group.statistics.values()):
        communicator.all_reduce(stat.total)
        stat.count = int(communicator.sum_counts(np.array([stat.count]))[0])


def _observe(model: nn.Module, groups: Sequence[ParameterGroup], shards, batch: Any, index: int) -> None:
    model.zero_grad(set_to_none=True)
    loss = _loss(model, to_device(with_labels(model, batch), input_device(model)), index)
    loss.backward()
    gradients = [shards[layer.name].gradient for group in groups for layer in group.layers]
    if not all_finite(gradient for gradient in gradients if gradient is not None):
        raise ValueError(
            f"gradients of calibration batch {index} are inf or nan: run the model in bfloat16 or float32, or look "
            "for a broken weight."
        )
    for group in groups:
        group.observe(shards)


def _loss(model: nn.Module, batch: Any, index: int) -> torch.Tensor:
    output = call_model(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"a criterion of gradients needs a loss, but the model gives none for calibration batch {index}: add "
            '"labels" to the batches.'
        )
    return loss
