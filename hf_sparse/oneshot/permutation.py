"""Puts the input channels of weights in the order in which N:M pruning keeps the most, with the layers before them.

Shapes: R rows, C inputs of a matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ..engine.parameter_group import ParameterGroup
from ..model.coupling import UnitGroup, UnitSlice
from ..model.layers import PrunableLayer
from ..requires import Requires
from ..selection.channel_order import find_channel_order, kept_scores
from ..statistics import GradientStatistic, GramMatrix, InputNorms
from .free_channels import reading_weight
from .observers import InputObserver


logger = logging.getLogger(__name__)


class ChannelPermuter:
    """Permutes channels in place: columns of the weights that read them, rows and biases of those that produce them,
    and everything that belongs to these.

    Args:
        model: the model.
        groups: maps the name of each selected layer to its parameter group.
        channels: of free order.
        masks: masks of layers that were selected before, by name; those of producers are permuted with them.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, ParameterGroup],
        channels: Sequence[UnitGroup],
        masks: Mapping[str, torch.Tensor],
    ):
        self._model, self._groups, self._masks = model, groups, masks
        self._channels: dict[str, list[UnitGroup]] = {}
        for units in channels:
            self._channels.setdefault(reading_weight(units), []).append(units)

    def parameters(self, layers: Collection[PrunableLayer]) -> list[str]:
        """Returns the names of the parameters that change when the inputs of these layers are permuted."""
        own = (units for layer in layers for units in self._channels.get(layer.name, ()))
        return list(dict.fromkeys(name for units in own for name in units.parameters))

    def permute(self, observers: Sequence[InputObserver]) -> None:
        """Permutes the inputs of the layers that the observers belong to, before any of them is pruned. The statistics
        and samples of the observers follow."""
        for observer in observers:
            (layer, *others) = observer.layers
            if layer.name in self._channels and not others and isinstance(observer.statistic, InputNorms | GramMatrix):
                self._permute_inputs(layer, observer, observer.statistic)

    def _permute_inputs(
        self, layer: PrunableLayer, observer: InputObserver, statistic: InputNorms | GramMatrix
    ) -> None:
        group = self._groups[layer.name]
        keep, of = group.pattern.n_of_m
        scores_RC = self._scores(layer, group, statistic.norms)
        order_C = torch.arange(scores_RC.shape[1], device=scores_RC.device)
        for units in self._channels[layer.name]:
            columns = [part.indices(torch.arange(units.num_units)).to(scores_RC.device) for part in units.readers]
            together = torch.cat([scores_RC[:, index] for index in columns])
            order = find_channel_order(together, keep, of)
            for index in columns:
                order_C[index] = index[order]
            for part in units.slices:
                for tensor in self._tensors(part.name):
                    _reorder(tensor, part, order)
        before = kept_scores(scores_RC, keep, of)
        after, total = kept_scores(scores_RC[:, order_C], keep, of), float(scores_RC.sum(dtype=torch.float64))
        logger.info(
            "%s: the order of %d inputs was changed; %s keeps %.2f%% of the scores instead of %.2f%%",
            layer.name,
            int((order_C != torch.arange(len(order_C), device=order_C.device)).sum()),
            group.pattern,
            100 * after / total if total else 0.0,
            100 * before / total if total else 0.0,
        )
        statistic.reorder(order_C.to(statistic.total.device))
        if observer.sample is not None:
            observer.sample = observer.sample[:, order_C.to(observer.sample.device)]

    def _scores(self, layer: PrunableLayer, group: ParameterGroup, norms_C: torch.Tensor) -> torch.Tensor:
        """The scores (R, C) of the criterion, float32; |w|·‖x‖ where the solver selects the pruned weights."""
        weight_RC = layer.matrices(self._model.get_parameter(layer.name).detach())[0][:, 0]
        norms_C = norms_C.to(weight_RC.device)
        if group.criterion is None:
            return weight_RC.float().abs() * norms_C
        statistic = None
        if group.criterion.requires & Requires.INPUT_NORMS:
            statistic = group.criterion.prepare_statistic(weight_RC, norms_C)
        elif layer.name in group.gradient_sums:
            statistic = layer.matrices(group.gradient_sums[layer.name].total)[0][:, 0]
        scores_RC = group.criterion.score(weight_RC, statistic)
        return scores_RC.masked_fill(weight_RC == 0, 0.0) if group.options.keep_zeros else scores_RC

    def _tensors(self, name: str) -> list[torch.Tensor]:
        """The parameter, its mask, and the sum of its gradients, as far as there are any."""
        tensors = [self._model.get_parameter(name).detach()]
        if name in self._masks:
            tensors.append(self._masks[name])
        statistic: GradientStatistic | None = None
        if name in self._groups:
            statistic = self._groups[name].gradient_sums.get(name)
        return tensors if statistic is None else [*tensors, statistic.total]


def _reorder(tensor: torch.Tensor, part: UnitSlice, order: torch.Tensor) -> None:
    """Puts channel `order[i]` in place i, in place."""
    order = order.to(tensor.device)
    places = part.indices(torch.arange(len(order), device=order.device))
    tensor.index_copy_(part.dim, places, tensor.index_select(part.dim, part.indices(order)))
