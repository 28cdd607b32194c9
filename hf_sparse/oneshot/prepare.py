"""Prepares a one-shot run: selects the layers, distributes the calibration data over ranks, and checks both.

`prune_oneshot` carries the prepared run out, `plan_oneshot` only describes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..calibration.batches import can_concatenate, concatenate_batches, count_tokens, is_padded
from ..config import OneshotConfig, PruningConfigError, ResolvedGroup
from ..distributed import Communicator, build_shards, get_communicator, is_offloaded, onload
from ..engine.coupled_group import CoupledParameterGroup, new_parameter_group
from ..engine.parameter_group import ParameterGroup
from ..engine.resolve import resolve_layers
from ..model.coupling import UnitGroup
from ..model.layers import PrunableLayer
from ..requires import Requires
from .free_channels import find_free_channels
from .tracing import BlocksError, ModelTrace, trace_model
from .tuning_samples import TuningSamples
from .unit_scores import UnitReader, find_unit_readers


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A one-shot run that is ready to start or to plan, see `prepare_run`.

    Args:
        model: the model to prune.
        config: the options.
        groups: the parameter groups, with their layers.
        batches: all calibration batches.
        local_batches: those of this rank; of a single forward, concatenated to one batch.
        communicator: the ranks that share the calibration data.
        single_forward: whether layers are pruned during the forward that observes their inputs.
        samples: with block reconstruction, the batches of all ranks and what they are used for. The local batches are
            then those of this rank.
    """

    model: nn.Module
    config: OneshotConfig
    groups: Sequence[ParameterGroup]
    batches: Sequence[Any]
    local_batches: Sequence[Any]
    communicator: Communicator
    single_forward: bool = False
    samples: TuningSamples | None = None

    @property
    def whole_batches(self) -> Sequence[Any]:
        """The batches of this rank, as they were given: the mean loss of a batch depends on what is in it."""
        if self.samples is None:
            return self.local_batches
        return self.batches[self.communicator.rank :: self.communicator.world_size]

    @cached_property
    def unit_groups(self) -> list[CoupledParameterGroup]:
        """The groups of coupled units that are pruned."""
        return [group for group in self.groups if isinstance(group, CoupledParameterGroup) and group.target]

    @cached_property
    def unit_readers(self) -> dict[tuple[str, int | None], UnitReader]:
        """The matrices that read coupled units, by the name of the weight and the number of the expert or None."""
        return find_unit_readers(self.unit_groups)

    @cached_property
    def free_channels(self) -> list[UnitGroup]:
        """The channels to permute, as far as the structure of the model shows them."""
        return find_free_channels(self.model, self.group_of)

    @cached_property
    def group_of(self) -> dict[str, ParameterGroup]:
        """Maps the name of each layer to its parameter group."""
        return {layer.name: group for group in self.groups for layer in group.layers}

    @property
    def calibrated_layers(self) -> list[PrunableLayer]:
        """The layers that are pruned block by block, after their inputs have been observed."""
        return [
            layer
            for group in self.groups
            if group.options.requires_calibration
            for layer in group.options.observed_layers
        ]

    @property
    def reconstructed_layers(self) -> list[PrunableLayer]:
        """With block reconstruction the layers that are pruned, block by block, whether their inputs are observed or
        not."""
        if self.samples is None:
            return []
        return [layer for group in self.groups if group.target for layer in group.layers]

    @property
    def dense_pass_layers(self) -> list[PrunableLayer]:
        """The layers whose inputs are observed in the dense model, before anything is pruned."""
        return [
            layer
            for group in self.groups
            if group.options.requires_dense_pass
            for layer in group.options.observed_layers
        ]

    @property
    def dense_ranked_groups(self) -> list[ParameterGroup]:
        """The groups of layers whose masks are selected in the dense model, for all their layers together."""
        groups = (group for group in self.groups if not group.options.units)
        return [group for group in groups if group.target and group.options.ranks_all_layers]

    def layers_requiring(self, requirement: Requires) -> set[PrunableLayer]:
        """Returns the layers of the groups with this requirement."""
        groups = (group for group in self.groups if group.options.requires & requirement)
        return {layer for group in groups for layer in group.layers}

    def trace(self) -> ModelTrace | None:
        """Traces the model for the layers whose inputs are observed. Returns None if there are none.

        Raises:
            ValueError: see `trace_model`; or `forwards=1` would prune a layer before all its inputs are observed.
        """
        layers = list(dict.fromkeys([*self.dense_pass_layers, *self.calibrated_layers, *self.reconstructed_layers]))
        if not layers:
            return None
        try:
            trace = trace_model(self.model, layers, self.batches[0], bool(self.config.sequential))
        except BlocksError as error:
            if self.samples is not None:
                remedy = "`reconstruct` needs blocks: leave it out and use `sequential=False`."
                raise ValueError(f"{error.problem} {remedy}") from error
            raise
        repeated = [layer.module for layer in self.calibrated_layers if layer.module in trace.repeated]
        if repeated and self.single_forward:
            raise ValueError(
                f'`forwards=1` prunes a layer when it is called, but "{repeated[0]}" is called several times in one '
                "forward: use `forwards=2`."
            )
        return trace

    def num_locked(self, group: ParameterGroup) -> dict[str, int]:
        """Returns the number of units of each layer that are zero and stay so, with `keep_zeros`; else nothing."""
        counts: dict[str, int] = {}
        if not group.options.keep_zeros or group.options.units:
            return counts
        for layer in group.layers:
            with onload(self.model.get_submodule(layer.module)):
                counts[layer.name] = group.pruned_units(layer, self.model.get_parameter(layer.name))
        return counts

    def prune_counts(self, measured: Mapping[str, Any]) -> dict[str, int]:
        """Returns the number of units to prune of each layer that is pruned on its own. `measured` maps the name of a
        layer to what its group's allocation has measured of it."""
        counts: dict[str, int] = {}
        for group in self.groups:
            if group.target and not group.options.ranks_all_layers and not group.options.units:
                counts |= group.prune_counts(self.num_locked(group), measured)
        return counts


def prepare_run(model: nn.Module, calibration_data: Iterable[Any] | None, config: OneshotConfig) -> PreparedRun:
    """Returns the run of a config. Warns if there is too little calibration data.

    Raises:
        PruningConfigError: options that contradict each other, the model or the data, all together.
        NotImplementedError: the weights are sharded.
    """
    communicator = get_communicator()
    groups, skipped = resolve_layers(model, config, observes_inputs=True)
    batches = [] if calibration_data is None else list(calibration_data)
    offloaded = is_offloaded(model)
    _check_not_sharded(model, offloaded)
    errors = []
    if not any(group.target for group in groups):
        errors.append("there is nothing to prune: give `target_sparsity`, or a pattern that implies it.")
    pieces, samples = batches, None
    if config.reconstruction is not None and batches:
        try:
            samples = TuningSamples.of(batches, config.reconstruction, communicator.world_size)
            pieces = samples.batches
        except ValueError as error:
            errors.append(str(error))
    errors += _data_errors(config, groups, pieces, communicator.world_size) + _unused_options(config, groups)
    observed = [group for group in groups if group.requires_calibration or group.requires_dense_pass]
    observed_layers = [layer for group in observed for layer in group.observed_layers]
    single_forward = _is_single_forward(config, groups, observed_layers, batches)
    errors += _layer_errors(observed_layers, config, batches)
    errors += _fused_expert_errors(groups)
    if config.reconstruct and torch.is_inference_mode_enabled():
        errors.append("`reconstruct` computes gradients, which torch.inference_mode() rules out: prune outside of it.")
    errors += _offload_errors(groups, config) if offloaded else []
    errors += _rank_errors(groups, batches)
    if errors:
        raise PruningConfigError(errors)
    if skipped:
        logger.warning("not pruned, because the pattern does not divide them: %s", ", ".join(skipped))
    local_batches = pieces[communicator.rank :: communicator.world_size]
    if single_forward and local_batches:
        local_batches = [concatenate_batches(local_batches)]
    parameter_groups = [new_parameter_group(group) for group in groups]
    return PreparedRun(model, config, parameter_groups, batches, local_batches, communicator, single_forward, samples)


def _is_single_forward(
    config: OneshotConfig, groups: Sequence[ResolvedGroup], layers: Sequence[PrunableLayer], batches: Sequence[Any]
) -> bool:
    """Whether one forward observes inputs and propagates: where the config says so, and by default for coupled units,
    unless fused experts or batches of different lengths rule it out."""
    if config.forwards is not None or config.reconstruct:
        return config.forwards == 1
    coupled = all(group.units for group in groups if group.target)
    if not (coupled and config.sequential) or any(layer.expert_dim is not None for layer in layers):
        return False
    return bool(batches) and can_concatenate(batches)


def _fused_expert_errors(groups: Sequence[ResolvedGroup]) -> list[str]:
    """Returns an error for each kind of gradients that is needed of fused experts, in which it is not observed."""
    unit_masks = [group for group in groups if group.units and group.requires & Requires.GRADIENTS]
    outputs = [group for group in groups if group.requires & Requires.OUTPUT_GRADIENTS]
    errors = []
    for group, expert in _first_fused_expert(unit_masks):
        errors.append(
            f'`criterion` "{group.criterion_name}" needs gradients of unit masks, which are not observed in fused '
            f'experts such as "{expert}": use `criterion="fluctuation"`.'
        )
    for group, expert in _first_fused_expert(outputs):
        errors.append(
            f'`allocation` "{group.allocation_name}" needs gradients of the outputs of layers, which are not observed '
            f'in fused experts such as "{expert}": use `allocation="dlp"`, or `exclude=["{expert}"]`.'
        )
    return errors


def _first_fused_expert(groups: Sequence[ResolvedGroup]) -> list[tuple[ResolvedGroup, str]]:
    """The first group with an observed layer of fused experts, and the module of that layer."""
    found = ((group, layer) for group in groups for layer in group.observed_layers if layer.expert_dim is not None)
    return [(group, layer.module) for group, layer in found][:1]


def method_requiring_data(group: ResolvedGroup) -> str | None:
    """Returns what of a group requires calibration data, an option or a method; None if nothing does.

    Example:
        >>> (group,) = OneshotConfig(target_sparsity=0.5).resolve_groups().values()
        >>> method_requiring_data(group)
        '`criterion` "wanda"'
        >>> (group,) = OneshotConfig(target_sparsity=0.5, criterion="random").resolve_groups().values()
        >>> method_requiring_data(group)
    """
    if not group.target:
        return None
    if group.permute:
        return "`permute`"
    if group.criterion is None or group.solver.requires & Requires.CALIBRATION_DATA:
        return f'`solver` "{group.solver_name}"'
    if group.criterion.requires & Requires.CALIBRATION_DATA:
        return f'`criterion` "{group.criterion_name}"'
    if group.allocation.requires & Requires.CALIBRATION_DATA:
        return f'`allocation` "{group.allocation_name}"'
    return f"`swaps={group.swaps}`" if group.swaps else None


def _check_not_sharded(model: nn.Module, offloaded: bool) -> None:
    # Offloaded weights are on the meta device, and not sharded.
    present = {name: weight for name, weight in model.named_parameters() if not (offloaded and weight.is_meta)}
    shards, _ = build_shards(present)
    sharded = next((name for name, shard in shards.items() if shard.is_split), None)
    if sharded is not None:
        raise NotImplementedError(
            f'"{sharded}" is sharded over processes, but one-shot pruning needs whole weights on every process: load '
            "the model without FSDP, tensor parallelism or ZeRO-3, or offload it (`device_map`)."
        )


def methods_requiring_data(config: OneshotConfig, groups: Iterable[ResolvedGroup]) -> list[str]:
    """Returns what requires calibration data: methods of groups, and block reconstruction."""
    methods = [method for method in map(method_requiring_data, groups) if method is not None]
    return methods + (["`reconstruct`"] if config.reconstruct else [])


def _data_errors(
    config: OneshotConfig, groups: Sequence[ResolvedGroup], batches: Sequence[Any], world_size: int
) -> list[str]:
    methods = methods_requiring_data(config, groups)
    if methods and not batches:
        return [f"{methods[0]} needs calibration data, but there is none: give batches of it."]
    if methods and len(batches) < world_size:
        return [f"{len(batches)} calibration batches are too few for {world_size} processes: make smaller batches."]
    return []


def _unused_options(config: OneshotConfig, groups: Sequence[ResolvedGroup]) -> list[str]:
    """Returns an error for each option about the pass of data through the model, where no data are needed."""
    if methods_requiring_data(config, groups) or not any(group.target for group in groups):
        return []
    given = {"sequential": config.sequential is False, "forwards": config.forwards == 1}
    given |= {"activations": config.activations != config.defaults["activations"]}
    return [
        f"`{name}` has no effect, because no method that was chosen observes inputs: leave it out, or use a method "
        'that does, as in `criterion="wanda"`.'
        for name, is_given in given.items()
        if is_given
    ]


def _layer_errors(layers: Sequence[PrunableLayer], config: OneshotConfig, batches: Sequence[Any]) -> list[str]:
    errors = []
    convolutions = [layer.module for layer in layers if layer.kind == "conv2d"]
    if convolutions:
        errors.append(
            f'inputs of convolutions are not observed, but "{convolutions[0]}" is one: leave it out with '
            f'`exclude=["{convolutions[0]}"]`, or use `criterion="magnitude"` without `solver` and `swaps`.'
        )
    experts = [layer.module for layer in layers if layer.expert_dim is not None]
    if experts and config.forwards == 1:
        errors.append("`forwards=1` does not go with fused experts, which run one after the other: use `forwards=2`.")
    padded = next((index for index, batch in enumerate(batches) if is_padded(batch)), None)
    if experts and padded is not None:
        errors.append(
            f'padding cannot be distinguished from tokens once they are routed to experts, as in "{experts[0]}", but '
            f"calibration batch {padded} has some: cut the data into blocks of one length."
        )
    return errors


def _offload_errors(groups: Sequence[ResolvedGroup], config: OneshotConfig) -> list[str]:
    errors = []
    for group in groups:
        if group.requires & Requires.GRADIENTS:
            errors.append(
                f'`criterion` "{group.criterion_name}" needs gradients, but some weights are offloaded: use '
                '`criterion="wanda"`, or a device that holds the model.'
            )
        elif group.requires & Requires.OUTPUT_GRADIENTS:
            errors.append(
                f'`allocation` "{group.allocation_name}" needs gradients, but some weights are offloaded: use '
                '`allocation="dlp"`, or a device that holds the model.'
            )
        elif group.target and group.units and (group.keep_zeros or group.scores_units_by_weights):
            reason = "`keep_zeros`" if group.keep_zeros else f'`criterion` "{group.criterion_name}"'
            errors.append(
                f'{reason} needs all weights of units at once, but some are offloaded: use `criterion="fluctuation"` '
                "without `keep_zeros`, or a device that holds the model."
            )
        elif group.target and group.ranks_all_layers:
            errors.append('`scope` "global" needs all weights at once, but some are offloaded: use `scope="layer"`.')
    if not config.sequential:
        errors.append("`sequential=False` needs all weights at once, but some are offloaded: leave it out.")
    return errors


def _rank_errors(groups: Sequence[ResolvedGroup], batches: Sequence[Any]) -> list[str]:
    """With too few tokens for a Gram matrix of full rank: an error without damping, a warning with it."""
    groups = [group for group in groups if group.requires & Requires.GRAM]
    layers = [layer for group in groups for layer in group.observed_layers if layer.expert_dim is None]
    tokens = sum(count_tokens(batch) for batch in batches)
    deficient = [layer for layer in layers if layer.matrix_shape[2] > tokens > 0]
    if not deficient:
        return []
    widest = max(deficient, key=lambda layer: layer.matrix_shape[2])
    columns = widest.matrix_shape[2]
    text = (
        f"calibration data of {tokens:,} tokens is too little for Gram matrices of full rank: {len(deficient)} "
        f'weights have more inputs, such as "{widest.name}" with {columns:,}.'
    )
    if any(group.solver.needs_full_rank for group in groups):
        return [
            f"{text} Give {columns:,} tokens or more, several times as many for good results, or a damping, as in "
            '`solver_kwargs={"dampening": 0.01}`.'
        ]
    if any(group.solver.requires & Requires.GRAM for group in groups):
        text += " The solver's damping determines what they leave undetermined."
    logger.warning("%s More data improves the result.", text)
    return []
