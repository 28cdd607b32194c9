"""Layers decided and solved one after the other, each from what has been seen of its inputs.

Shapes: R rows, C inputs of a matrix; E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..distributed import Shard
from ..engine.parameter_group import ParameterGroup
from ..model.layers import PrunableLayer
from ..requires import Requires
from ..selection.budgets import largest_remainder
from ..selection.layer_scores import LayerScores
from ..solvers import PruneRequest, Solver
from ..statistics import GramMatrix
from .observers import InputObserver


logger = logging.getLogger(__name__)


@dataclass
class LayerPruner:
    """Prunes single layers in place.

    Args:
        groups: name of a layer -> its group.
        quotas: name of a layer -> how many of its units are to be zero in all.
        masks: name of a layer -> mask (bool, of the weight's shape) decided before; others are decided here.
        on_unreached: "error", or "magnitude" for matrices that no token has reached.
    """

    groups: Mapping[str, ParameterGroup]
    prune_counts: Mapping[str, int] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    on_unreached: str = "error"

    def prune_layers(
        self, observers: Sequence[InputObserver], parameters: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Prune the layers that the feeds feed. The feeds must be all of those layers, and are used up.

        Args:
            parameters: name of a layer -> its weight, which is written to.

        Returns: of each layer the error ‖XWᵀ - XŴᵀ‖² / ‖XWᵀ‖² of its outputs over the tokens set aside.

        Raises:
            ValueError: no token has reached a matrix; weights, inputs or sums are not finite; or as `HessianFactor`.
        """
        self.check_reached(observers)
        layers = list(dict.fromkeys(layer for observer in observers for layer in observer.layers))
        kept = {layer.name: self._decide(layer, observers, parameters[layer.name]) for layer in layers}
        shares = {layer.name: self._shares(layer, kept[layer.name]) for layer in layers}
        errors = {layer.name: np.zeros(2) for layer in layers}
        for observer in observers:
            self._solve(observer, parameters, kept, shares, errors)
            observer.stat = observer.sample = None
        return {name: float(error / size) if size else 0.0 for name, (error, size) in errors.items()}

    def prune(self, layer: PrunableLayer, weight: torch.Tensor) -> None:
        """Prune a layer that needs nothing of its inputs, in place."""
        kept = self._decide(layer, (), weight)
        if kept is not None:
            weight.detach().masked_fill_(~kept, 0.0)

    def outliers(
        self,
        observers: Sequence[InputObserver],
        layers: Sequence[PrunableLayer],
        parameters: Mapping[str, torch.Tensor],
    ) -> dict[str, float]:
        """Each layer's share of outliers: that of all `layers` of its group together."""
        shares = {}
        for group in dict.fromkeys(self.groups[layer.name] for layer in layers):
            own = [layer for layer in layers if self.groups[layer.name] is group]
            scores = [parameters[layer.name].float().abs() * norms_of(layer, observers) for layer in own]
            ratio = group.options.allocation.outlier_ratio(scores)
            shares |= dict.fromkeys((layer.name for layer in own), ratio)
        return shares

    def check_reached(self, observers: Sequence[InputObserver]) -> None:
        """Give feeds that no token has reached inputs all alike: what is left of any criterion then is the weight.

        Raises:
            ValueError: there are such, and that is an error.
        """
        idle = [observer for observer in observers if not observer.stat.count]
        if idle and self.on_unreached == "error":
            raise ValueError(
                f"no token of the calibration data reaches {len(idle)} of {len(observers)} inputs, such as that of "
                f'"{idle[0].name}": give more data, set on_unreached="magnitude" to prune these by magnitude, or '
                f'leave the weight out, as with exclude=["{idle[0].layers[0].module}"].'
            )
        levels = [_level(observer, observers) for observer in idle]
        for observer, level in zip(idle, levels, strict=True):
            logger.warning('no token reaches "%s": it is pruned by magnitude.', observer.name)
            total = observer.stat.total
            total.copy_(
                level * (torch.eye(len(total)) if isinstance(observer.stat, GramMatrix) else torch.ones(len(total)))
            )
            observer.stat.count = len(total)

    # Which weights

    def _decide(
        self, layer: PrunableLayer, observers: Sequence[InputObserver], weight: torch.Tensor
    ) -> torch.Tensor | None:
        """What is kept, bool of the weight's shape; None where the solver chooses and nothing is locked."""
        group = self.groups[layer.name]
        if layer.name in self.masks:
            return self.masks[layer.name].to(weight.device)
        locked = weight != 0 if group.options.keep_zeros else None
        if group.criterion is None or not group.target:
            return locked
        bits = torch.full(weight.shape, -1, dtype=torch.int8, device=weight.device)
        if locked is not None:
            bits.copy_(locked).neg_()
        stat = None
        if group.criterion.requires & Requires.INPUT_NORMS:
            stat = norms_of(layer, observers).expand(layer.shape)
        elif group.criterion.requires & Requires.GRADIENTS:
            stat = group.statistics[layer.name].total
        scores = LayerScores(
            layer, group.criterion, group.pattern, Shard(weight), bits, stat, by_row=group.scope == "row"
        )
        group.prune_layer(scores, self.prune_counts[layer.name])
        return bits != 0

    def _shares(self, layer: PrunableLayer, kept: torch.Tensor | None) -> list[float | None]:
        """Of each matrix the share of units that the solver is to choose; None where a mask says it all."""
        group = self.groups[layer.name]
        matrices = layer.num_matrices
        if group.criterion is not None or layer.name in self.masks or not group.target:
            return [None] * matrices
        if group.pattern.max_sparsity < 1:
            return [group.pattern.max_sparsity] * matrices
        units = torch.Size(group.pattern.unit_shape(layer.matrix_shape)).numel()
        locked = (
            [0] * matrices
            if kept is None
            else [int(group.pattern.pruned_units(part).sum()) for part in layer.matrices(kept)]
        )
        total = max(self.prune_counts[layer.name], sum(locked))
        return [
            count / units
            for count in largest_remainder(total, [total / matrices] * matrices, locked, [units] * matrices)
        ]

    # What becomes of the others

    def _solve(self, observer: InputObserver, parameters, kept, shares, errors) -> None:
        """Settle the matrices of one feed, those of one solver together."""
        number = observer.expert or 0
        matrices = {layer: layer.matrices(parameters[layer.name])[number][:, 0] for layer in observer.layers}
        dead_C = observer.stat.norms == 0
        solvers = list(dict.fromkeys(self.groups[layer.name].options.solver for layer in observer.layers))
        for solver in solvers:
            own = [layer for layer in observer.layers if self.groups[layer.name].options.solver == solver]
            wanted = [self._wanted(layer, matrices[layer], kept, shares, number) for layer in own]
            chosen = [(layer, each) for layer, each in zip(own, wanted, strict=True) if each is not None]
            uses_gram = bool(solver.requires & Requires.GRAM)
            stat = self._prepare(solver, observer, last=solver is solvers[-1]) if uses_gram and chosen else None
            solved = solver.solve_batched([each for _, each in chosen], stat) if chosen else []
            for (layer, _), (weight, mask) in zip(chosen, solved, strict=True):
                if uses_gram and bool(dead_C.any()):  # what is kept there does nothing, but is counted
                    weight = torch.where(mask & dead_C, matrices[layer], weight)
                errors[layer.name] += _output_error(matrices[layer], weight, observer.sample)
                matrices[layer].copy_(weight)

    def _wanted(self, layer: PrunableLayer, weight_RC: torch.Tensor, kept, shares, number: int) -> PruneRequest | None:
        mask, share = kept[layer.name], shares[layer.name][number]
        if mask is None and share is None:
            return None
        mask_RC = None if mask is None else layer.matrices(mask)[number][:, 0]
        return PruneRequest(weight_RC, mask_RC, None if share is None else self.groups[layer.name].pattern, share)

    def _prepare(self, solver: Solver, observer: InputObserver, last: bool) -> Any:
        try:
            prepared = solver.prepare(observer.stat)
        except ValueError as error:
            raise ValueError(f'inputs of "{observer.name}": {error}') from error
        if last:
            observer.stat = None  # its memory is free for the solver
        return prepared


def norms_of(layer: PrunableLayer, observers: Sequence[InputObserver]) -> torch.Tensor:
    """The norm of each weight's input, of a shape that broadcasts to the weight's."""
    own = [observer.stat.norms for observer in observers if layer in observer.layers]
    norms = torch.stack(own) if layer.expert_dim is not None else own[0]
    return norms.unsqueeze(layer.row_dim)


def _level(observer: InputObserver, observers: Sequence[InputObserver]) -> float:
    """The mean sum of squares of the inputs of the other experts, with which this one may compete."""
    known = [
        other.stat.norms.square().mean() for other in observers if other.layers == observer.layers and other.stat.count
    ]
    return float(torch.stack(known).mean()) if known else 1.0


def _output_error(old_RC: torch.Tensor, new_RC: torch.Tensor, x_TC: torch.Tensor | None) -> np.ndarray:
    """The squared change of the outputs, and their square."""
    if x_TC is None:
        return np.zeros(2)
    old, new = old_RC.detach().float(), new_RC.float()
    return np.array([float((x_TC @ (old - new).t()).square().sum()), float((x_TC @ old.t()).square().sum())])
