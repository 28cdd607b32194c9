"""Prunes single layers: selects what is pruned, from statistics of their inputs, refines the mask by swaps, and
updates the remaining weights.

Shapes: R rows, C inputs of a matrix; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..allocations import DenseLayer, MeasuringAllocation
from ..distributed import Shard
from ..engine.masks import MaskStore
from ..engine.parameter_group import ParameterGroup
from ..model.layers import PrunableLayer
from ..requires import Requires
from ..selection.budgets import largest_remainder
from ..selection.layer_scores import LayerScores
from ..selection.swaps import refine_mask
from ..solvers import PruneRequest, Solver
from ..statistics import GramMatrix, InputNorms
from .observers import InputObserver, criterion_statistic, fill_unreached


@dataclass
class LayerPruner:
    """Prunes layers in place, each on its own.

    Args:
        groups: maps the name of each layer to its parameter group.
        prune_counts: maps the name of a layer to the number of its units to prune, units already zero included.
        masks: maps the name of a layer to a mask (bool, of the weight's shape, True is kept) that was selected before;
            those of other layers are selected here.
        on_unreached: see `fill_unreached`.
    """

    groups: Mapping[str, ParameterGroup]
    prune_counts: Mapping[str, int] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    on_unreached: str = "error"

    def prune_layers(
        self, observers: Sequence[InputObserver], weights: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Prunes all layers that the observers belong to, in place.

        Args:
            observers: all observers of these layers. Their statistics and samples are released.
            weights: maps the name of each layer to its weight.

        Returns:
            The relative squared error ‖XWᵀ - XŴᵀ‖² / ‖XWᵀ‖² of each layer's outputs on the sampled tokens X.

        Raises:
            ValueError: no token has reached a matrix and `on_unreached` is "error"; weights or statistics are not
                finite, or not fit for the solver.
        """
        fill_unreached(observers, self.on_unreached)
        layers = list(dict.fromkeys(layer for observer in observers for layer in observer.layers))
        masks = {layer.name: self._select(layer, observers, weights[layer.name]) for layer in layers}
        sparsities = {layer.name: self._solver_sparsities(layer, masks[layer.name]) for layer in layers}
        errors = {layer.name: np.zeros(2) for layer in layers}
        for observer in observers:
            number = observer.expert or 0
            requests = {}
            for layer in observer.layers:
                mask, sparsity = masks[layer.name], sparsities[layer.name][number]
                if mask is not None or sparsity is not None:
                    weight_RC = layer.matrices(weights[layer.name])[number][:, 0]
                    mask_RC = None if mask is None else layer.matrices(mask)[number][:, 0]
                    if mask_RC is not None:
                        mask_RC = self._refine(layer, weight_RC, mask_RC, observer)
                    group = self.groups[layer.name]
                    pattern = None if sparsity is None else group.pattern
                    by_row = pattern is not None and group.scope == "row"
                    requests[layer] = PruneRequest(weight_RC, mask_RC, pattern, sparsity, by_row)
            self._solve(observer, requests, errors)
            observer.release_statistic()
            observer.sample = None
        return {name: float(error / size) if size else 0.0 for name, (error, size) in errors.items()}

    def prune_without_inputs(self, layer: PrunableLayer, weight: torch.Tensor) -> None:
        """Prunes a layer that needs no statistic of its inputs, in place."""
        mask, group = self._select(layer, (), weight), self.groups[layer.name].options
        if mask is not None:
            if group.target and group.solver.updates:
                for matrix_RPC, mask_RPC in zip(layer.matrices(weight), layer.matrices(mask), strict=True):
                    new_RC, _ = group.solver.solve(matrix_RPC.flatten(1), mask_RC=mask_RPC.flatten(1))
                    matrix_RPC.copy_(new_RC.view(matrix_RPC.shape))
            masks = MaskStore({layer.name: (mask.shape, mask.device)})
            masks.replace(layer.name, mask)
            masks.enforce({layer.name: weight})

    def _select(
        self, layer: PrunableLayer, observers: Sequence[InputObserver], weight: torch.Tensor
    ) -> torch.Tensor | None:
        """The mask of a layer, bool of the weight's shape; None where the solver selects and no zeros are locked."""
        group = self.groups[layer.name]
        if layer.name in self.masks:
            return self.masks[layer.name].to(weight.device)
        locked = weight != 0 if group.options.keep_zeros else None
        if group.criterion is None or not group.target:
            return locked
        bits = torch.full(weight.shape, -1, dtype=torch.int8, device=weight.device)
        if locked is not None:
            bits.copy_(locked).neg_()
        statistic = None
        if group.criterion.requires & Requires.INPUT_NORMS:
            statistic = criterion_statistic(group.criterion, layer, weight, observers).expand(layer.shape)
        elif group.criterion.requires & Requires.GRADIENTS:
            statistic = group.gradient_sums[layer.name].total
        scores = LayerScores(
            layer, group.criterion, group.pattern, Shard(weight), bits, statistic, by_row=group.scope == "row"
        )
        group.prune_layer(scores, self.prune_counts[layer.name])
        return bits != 0

    def _solver_sparsities(self, layer: PrunableLayer, mask: torch.Tensor | None) -> list[float | None]:
        """The share of units that the solver is to select, of each matrix; None where the mask is complete."""
        group = self.groups[layer.name]
        num_matrices, units = layer.num_matrices, group.pattern.num_units(layer.matrix_shape)
        if group.criterion is not None or layer.name in self.masks or not group.target:
            return [None] * num_matrices
        if group.pattern.max_sparsity < 1:
            return [group.pattern.max_sparsity] * num_matrices
        locked = [0] * num_matrices
        if mask is not None:
            locked = [int(group.pattern.pruned_units(matrix).sum()) for matrix in layer.matrices(mask)]
        total = max(self.prune_counts[layer.name], sum(locked))
        equal_shares = [total / num_matrices] * num_matrices
        return [count / units for count in largest_remainder(total, equal_shares, locked, [units] * num_matrices)]

    def _refine(
        self, layer: PrunableLayer, weight_RC: torch.Tensor, mask_RC: torch.Tensor, observer: InputObserver
    ) -> torch.Tensor:
        """The mask of one matrix after its swaps, if there are any."""
        group = self.groups[layer.name]
        if not (group.options.swaps and group.target):
            return mask_RC
        return refine_mask(weight_RC, mask_RC, _gram_of(observer), group.options.swaps, group.pattern)

    def _solve(
        self, observer: InputObserver, requests: Mapping[PrunableLayer, PruneRequest], errors: Mapping[str, np.ndarray]
    ) -> None:
        """Solve the matrices of one input, those with the same solver together."""
        solvers = {layer: self.groups[layer.name].options.solver for layer in requests}
        # Solvers that require the Gram matrix come last: its memory can then be freed before the last one solves.
        distinct = sorted(dict.fromkeys(solvers.values()), key=lambda solver: bool(solver.requires & Requires.GRAM))
        dead_C = observer.statistic.squares == 0
        any_dead = bool(dead_C.any())
        for solver in distinct:
            layers = [layer for layer in requests if solvers[layer] == solver]
            requires_gram = bool(solver.requires & Requires.GRAM)
            prepared = self._prepare(solver, observer) if requires_gram else None
            if solver is distinct[-1]:
                observer.release_statistic()
            solved = solver.solve_batched([requests[layer] for layer in layers], prepared)
            for layer, (new_RC, mask_RC) in zip(layers, solved, strict=True):
                weight_RC = requests[layer].weight_RC
                if requires_gram and any_dead:
                    # Weights of dead inputs have no effect, but those that the mask keeps count as kept.
                    new_RC = torch.where(mask_RC & dead_C, weight_RC, new_RC)
                errors[layer.name] += _output_error(weight_RC, new_RC, observer.sample)
                weight_RC.copy_(new_RC)

    def _prepare(self, solver: Solver, observer: InputObserver) -> Any:
        try:
            return solver.prepare(_gram_of(observer))
        except ValueError as error:
            raise ValueError(f'inputs of "{observer.name}": {error}') from error


def _gram_of(observer: InputObserver) -> GramMatrix:
    if not isinstance(observer.statistic, GramMatrix):
        raise TypeError(f'a solver or swaps require the Gram matrix of the inputs of "{observer.name}"')
    return observer.statistic


def measure_layers(
    groups: Mapping[str, ParameterGroup],
    observers: Sequence[InputObserver],
    layers: Sequence[PrunableLayer],
    weights: Mapping[str, torch.Tensor],
    sensitivities: Mapping[str, float],
) -> dict[str, Any]:
    """Returns what the allocations measure of the `layers` of a block, of those in one group together. `groups`,
    `weights` and `sensitivities`, where required, are by the name of a layer."""
    measured: dict[str, Any] = {}
    for group in dict.fromkeys(groups[layer.name] for layer in layers):
        members = [layer for layer in layers if groups[layer.name] is group]
        allocation = group.options.allocation
        if isinstance(allocation, MeasuringAllocation):
            dense = [
                DenseLayer(
                    [matrix_RPC[:, 0] for matrix_RPC in layer.matrices(weights[layer.name])],
                    _input_statistics(layer, observers),
                    group.pattern,
                    sensitivities.get(layer.name, 1.0),
                )
                for layer in members
            ]
            names = [layer.name for layer in members]
            measured |= dict(zip(names, allocation.measure(dense), strict=True))
    return measured


def _input_statistics(layer: PrunableLayer, observers: Sequence[InputObserver]) -> list[InputNorms | GramMatrix]:
    """The statistics of the inputs of each matrix of a layer."""
    inputs = [observer.statistic for observer in observers if layer in observer.layers]
    return [statistic for statistic in inputs if isinstance(statistic, (InputNorms, GramMatrix))]


def _output_error(old_RC: torch.Tensor, new_RC: torch.Tensor, x_TC: torch.Tensor | None) -> np.ndarray:
    """The squared norm of the change of the outputs, and that of the outputs."""
    if x_TC is None:
        return np.zeros(2)
    old, new = old_RC.detach().float(), new_RC.float()
    squares = [(x_TC @ (old - new).t()).square().sum(), (x_TC @ old.t()).square().sum()]
    return np.array(torch.stack(squares).tolist())
