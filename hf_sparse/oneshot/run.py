"""OneshotRun: what a one-shot run is going to do, shared by the run itself and by its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..config import ResolvedGroup
from ..distributed import Communicator, onload
from ..engine.parameter_group import ParameterGroup
from ..model.layers import PrunableLayer
from ..requires import Requires
from .tracing import ModelTrace, trace_model


@dataclass(frozen=True, eq=False)
class OneshotRun:
    """A one-shot run: the parameter groups with their layers, and the calibration data. See `prepare_run`.

    Args:
        model: the model to prune.
        groups: the parameter groups.
        batches: all calibration batches.
        local_batches: those of this rank; of a single forward, concatenated to one batch.
        communicator: the ranks that share the calibration data.
        sequential: whether layers are pruned block by block, or all at once.
        single_forward: whether layers are pruned during the forward that observes their inputs.
        activation_storage: where outputs of blocks are cached, see `ActivationCache`.
        on_unreached: what to do with experts that no token reaches, see `fill_unreached`.
    """

    model: nn.Module
    groups: Sequence[ParameterGroup]
    batches: Sequence[Any]
    local_batches: Sequence[Any]
    communicator: Communicator
    sequential: bool = True
    single_forward: bool = False
    activation_storage: str = "cpu"
    on_unreached: str = "error"

    @cached_property
    def group_of(self) -> dict[str, ParameterGroup]:
        """Maps the name of each layer to its parameter group."""
        return {layer.name: group for group in self.groups for layer in group.layers}

    @property
    def calibrated_layers(self) -> list[PrunableLayer]:
        """The layers that are pruned block by block, after their inputs have been observed."""
        return [layer for group in self.groups if requires_calibration(group.options) for layer in group.layers]

    @property
    def dense_pass_layers(self) -> list[PrunableLayer]:
        """The layers whose inputs are observed in the dense model, before anything is pruned."""
        return [layer for group in self.groups if requires_dense_pass(group.options) for layer in group.layers]

    @property
    def dense_ranked_groups(self) -> list[ParameterGroup]:
        """The groups whose masks are selected in the dense model, for all their layers together."""
        return [group for group in self.groups if group.target and group.options.ranks_all_layers]

    def layers_requiring(self, requirement: Requires) -> set[PrunableLayer]:
        """Returns the layers of the groups with this requirement."""
        groups = (group for group in self.groups if group.options.requires & requirement)
        return {layer for group in groups for layer in group.layers}

    def trace(self) -> ModelTrace | None:
        """Traces the model for the layers whose inputs are observed. Returns None if there are none.

        Raises:
            ValueError: see `trace_model`; or `forwards=1` would prune a layer before all its inputs are observed.
        """
        layers = list(dict.fromkeys([*self.dense_pass_layers, *self.calibrated_layers]))
        if not layers:
            return None
        trace = trace_model(self.model, layers, self.batches[0], self.sequential)
        repeated = [layer.module for layer in self.calibrated_layers if layer.module in trace.repeated]
        if repeated and self.single_forward:
            raise ValueError(
                f'forwards=1 prunes a layer when it is called, but "{repeated[0]}" is called several times in one '
                "forward: use forwards=2."
            )
        return trace

    def num_pruned(self, group: ParameterGroup) -> dict[str, int]:
        """Returns the number of units of each layer that are zero and stay so, with `keep_zeros`; else nothing."""
        if not group.options.keep_zeros:
            return {}
        counts = {}
        for layer in group.layers:
            with onload(self.model.get_submodule(layer.module)):
                counts[layer.name] = group.pruned_units(layer, self.model.get_parameter(layer.name))
        return counts

    def prune_counts(self, outliers: Mapping[str, float]) -> dict[str, int]:
        """Returns the number of units to prune of each layer that is pruned on its own.

        Args:
            outliers: maps the name of a layer to its outlier ratio, where the allocation requires it.
        """
        counts: dict[str, int] = {}
        for group in self.groups:
            if group.target and not group.options.ranks_all_layers:
                counts |= group.prune_counts(self.num_pruned(group), outliers)
        return counts


def requires_calibration(group: ResolvedGroup) -> bool:
    """Whether the group's layers are pruned block by block, after their inputs have been observed."""
    if not group.target:
        return False
    scored_by_norms = bool(group.requires & Requires.INPUT_NORMS) and not group.ranks_all_layers
    return group.criterion is None or scored_by_norms or bool(group.requires & Requires.GRAM)


def requires_dense_pass(group: ResolvedGroup) -> bool:
    """Whether the inputs of the group's layers are observed in the dense model, before anything is pruned."""
    ranked_by_norms = bool(group.requires & Requires.INPUT_NORMS) and group.ranks_all_layers
    return ranked_by_norms or bool(group.requires & Requires.OUTLIERS)
