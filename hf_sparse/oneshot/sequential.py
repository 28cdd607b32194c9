"""Prunes a model subgraph by subgraph: observe the inputs of its layers, prune them, propagate its outputs."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..calibration.batches import token_masks
from ..distributed import onload
from ..engine.coupled_group import CoupledParameterGroup
from ..model.blocks import group_by_block, is_within
from ..model.coupling import UnitGroup
from ..model.layers import PrunableLayer
from ..numerics import count_true, gather_counts
from ..requires import Requires
from ..statistics import WeightedInputs
from .layerwise import LayerPruner, measure_layers
from .observers import InputObserver, InputObservers, criterion_statistic, fill_unreached
from .permutation import ChannelPermuter
from .pipeline import BlockPipeline, Subgraph
from .prepare import PreparedRun
from .reconstruct import BlockReconstructor
from .resume import FinishedSubgraphs
from .sensitivity import output_sensitivities
from .tracing import ModelTrace
from .tuned_blocks import dense_inputs, pruned_parameters, tuned_parameters
from .unit_pruner import UnitPruner
from .unit_scores import score_by_inputs


logger = logging.getLogger(__name__)


class SequentialPruner:
    """Prunes the subgraphs of a model one after the other, on all ranks at once."""

    def __init__(self, run: PreparedRun, trace: ModelTrace):
        self._run, self._trace = run, trace
        self._model, self._communicator = run.model, run.communicator
        self._gram_layers = run.layers_requiring(Requires.GRAM)
        model_config = getattr(run.model, "config", None)
        self._is_encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))

    def dense_calibration_pass(
        self,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[UnitGroup, torch.Tensor]]:
        """Observes inputs in the dense model.

        Returns:
            What the criterion requires of each layer's inputs, see `criterion_statistic`, for groups ranked in the
            dense model; what allocations measure of each layer; and the scores of coupled units that are selected in
            the dense model.
        """
        scores: dict[UnitGroup, torch.Tensor] = {}
        statistics: dict[str, torch.Tensor] = {}
        measured: dict[str, Any] = {}
        observed = set(self._run.dense_pass_layers)
        if not observed:
            return statistics, measured, scores
        ranked = {layer for group in self._run.dense_ranked_groups for layer in group.layers}
        measured_layers = self._run.layers_requiring(Requires.DENSE_INPUTS)
        unit_groups = [group for group in self._run.unit_groups if group.options.requires_dense_pass]
        readers = {layer for group in unit_groups for layer in group.options.observed_layers}
        gram_groups = [group for group in unit_groups if _criterion_requires(group) & Requires.GRAM]
        gram_layers = {layer for group in gram_groups for layer in group.options.observed_layers}
        gram_layers |= self._run.layers_requiring(Requires.DENSE_GRAM)
        sensitive = self._run.layers_requiring(Requires.OUTPUT_GRADIENTS)
        sensitivities = output_sensitivities(self._model, sensitive, self._run.whole_batches, self._communicator)
        with self._pipeline() as pipeline:
            for subgraph in self._trace.subgraphs:
                layers = [layer for layer in subgraph.layers if layer in observed]
                propagate = subgraph is not self._trace.subgraphs[-1]
                with self._onload([subgraph]):
                    observers = self._calibrate(pipeline, subgraph, layers, gram_layers, propagate)
                    fill_unreached(observers, str(self._run.config.on_unreached))
                    scored = [layer for layer in layers if layer in ranked]
                    statistics |= self._criterion_statistics(scored, observers)
                    allocated = [layer for layer in layers if layer in measured_layers]
                    for block in group_by_block(self._model, allocated):
                        measured |= measure_layers(
                            self._run.group_of, observers, block, self._weights(block), sensitivities
                        )
                    self._add_unit_scores(scores, [o for o in observers if not readers.isdisjoint(o.layers)])
        return statistics, measured, scores

    def _criterion_statistics(
        self, layers: Sequence[PrunableLayer], observers: Sequence[InputObserver]
    ) -> dict[str, torch.Tensor]:
        """What the criteria of layers require of their inputs, by the name of the layer."""
        criteria = {layer: self._run.group_of[layer.name].required_criterion for layer in layers}
        weights = self._weights(layers)
        return {
            layer.name: criterion_statistic(criteria[layer], layer, weights[layer.name], observers) for layer in layers
        }

    def _add_unit_scores(self, scores: dict[UnitGroup, torch.Tensor], observers: Sequence[InputObserver]) -> None:
        """Add the scores that coupled units have in the matrices of these observers."""
        for observer in observers:
            reader, statistic = self._run.unit_readers[observer.layers[0].name, observer.expert], observer.statistic
            if not isinstance(statistic, WeightedInputs):
                raise TypeError(f'the inputs of "{observer.name}" have no weighted statistic')
            weight_RC = reader.matrix(self._model.get_parameter(reader.layer.name).detach())
            has_bias = reader.bias(self._model) is not None
            new = score_by_inputs(reader.criterion, weight_RC, statistic, reader.part.width, has_bias, None)
            scores[reader.units] = scores[reader.units] + new if reader.units in scores else new

    def prune(
        self,
        layer_pruner: LayerPruner,
        unit_pruner: UnitPruner,
        permuter: ChannelPermuter,
        finished: FinishedSubgraphs | None,
        show_progress: bool,
    ) -> dict[str, float]:
        """Prunes the layers whose inputs are observed, in place. Reads subgraphs that an earlier run has `finished`
        and adds those of this run. Returns the relative squared error of each layer's outputs."""
        errors: dict[str, float] = {}
        pruners = layer_pruner, unit_pruner
        subgraphs, calibrated = self._trace.subgraphs, set(self._run.calibrated_layers)
        hide_bar = not show_progress or self._communicator.rank > 0
        window: list[Subgraph] = []
        with self._pipeline() as pipeline, tqdm(subgraphs, disable=hide_bar) as bar:
            reconstructor = self._reconstructor(pipeline)
            for number, subgraph in enumerate(bar):
                bar.set_description(subgraph.name)
                layers = [layer for layer in subgraph.layers if layer in calibrated]
                propagate, notes = subgraph.is_block and subgraph is not subgraphs[-1], []
                self._extend_window(pipeline, window, subgraph)
                with self._onload([*window, subgraph]):
                    if reconstructor is not None and subgraph.is_block:
                        reconstructor.observe_dense(subgraph)
                    tuned, permuted = window if reconstructor is not None else (), permuter.parameters(layers)
                    changed = self._changed_parameters(subgraph, layers, tuned, permuted)
                    if finished is not None and number < finished.count:
                        weights, new_errors = finished.read(number)
                        for name, weight in changed.items():
                            weight.copy_(weights[name])
                    elif self._run.single_forward:
                        new_errors = self._prune_during_forward(pipeline, subgraph, layers, pruners, propagate)
                    else:
                        observers = self._calibrate(pipeline, subgraph, layers, self._gram_layers)
                        permuter.permute(observers)
                        new_errors = self._prune_observed(observers, subgraph, *pruners)
                        if reconstructor is not None:
                            self._prune_unobserved(subgraph, *pruners)
                            if subgraph.is_block and subgraph.layers:
                                notes.append(str(reconstructor.reconstruct(window)))
                    self._check_same_zeros(changed)
                    if finished is not None and number >= finished.count:
                        finished.write(number, changed, new_errors)
                    if propagate:
                        self._propagate(pipeline, window, 1 if reconstructor is None else reconstructor.window)
                    bar.set_postfix_str(", ".join([*self._report_progress(layers, new_errors), *notes]))
                errors |= new_errors
        return errors

    def _extend_window(self, pipeline: BlockPipeline, window: list[Subgraph], subgraph: Subgraph) -> None:
        """Add a block to those that are pruned and not propagated, after propagating those of another list."""
        if window and window[-1].block_list != subgraph.block_list:
            self._propagate(pipeline, window, 1)
        if subgraph.is_block:
            window.append(subgraph)

    def _propagate(self, pipeline: BlockPipeline, window: list[Subgraph], size: int) -> None:
        """Propagate the first blocks of a window, so that fewer than `size` remain in it."""
        while len(window) >= size:
            block = window.pop(0)
            if not pipeline.is_propagated(block):  # during the forward that pruned it
                pipeline.propagate(block)
            pipeline.drop_stream(dense_inputs(block))

    def _reconstructor(self, pipeline: BlockPipeline) -> BlockReconstructor | None:
        if self._run.samples is None:
            return None
        return BlockReconstructor(self._run, self._run.samples, pipeline, self._is_encoder_decoder)

    def _calibrate(
        self,
        pipeline: BlockPipeline,
        subgraph: Subgraph,
        layers: Sequence[PrunableLayer],
        gram_layers: Collection[PrunableLayer],
        propagate: bool = False,
    ) -> list[InputObserver]:
        """Observe the inputs of layers over the batches of all ranks. With `propagate`, the same forward also caches
        the outputs of the block."""
        if not layers and not propagate:
            return []
        error, observed = None, []
        can_stop = len(layers) == len(subgraph.layers) and not propagate
        last_module = self._trace.last_module.get(subgraph.name) if can_stop else None
        shared_inputs, readers = self._trace.shared_inputs, self._run.unit_readers
        with InputObservers(
            self._model, layers, shared_inputs, gram_layers, last_module, unit_readers=readers
        ) as observers:

            def set_token_masks(index: int) -> None:
                observers.token_masks = token_masks(self._run.local_batches[index], self._is_encoder_decoder)

            try:
                run = pipeline.propagate if propagate and subgraph.is_block else pipeline.run_until
                run(subgraph, set_token_masks)
                observed = observers.in_order()
            except Exception as exception:  # of any kind: the other ranks must not wait for this one
                error = exception
        self._communicator.raise_together(error)
        self._all_reduce(observed)
        return observed

    def _prune_during_forward(
        self,
        pipeline: BlockPipeline,
        subgraph: Subgraph,
        layers: Sequence[PrunableLayer],
        pruners: tuple[LayerPruner, UnitPruner],
        propagate: bool,
    ) -> dict[str, float]:
        """Run all batches at once and prune each layer when it is called, before it computes its output."""
        errors: dict[str, float] = {}
        others_wait, error = True, None

        def prune_readers(observer: InputObserver, observer_error: Exception | None) -> None:
            nonlocal others_wait
            others_wait = False  # if this raises, the other ranks know of the error
            self._communicator.raise_together(observer_error)
            others_wait = True
            self._all_reduce([observer])
            errors.update(self._prune_observed([observer], subgraph, *pruners))

        last_module = None if propagate else self._trace.last_module.get(subgraph.name)
        with InputObservers(
            self._model,
            layers,
            self._trace.shared_inputs,
            self._gram_layers,
            last_module,
            prune_readers,
            self._run.unit_readers,
        ) as observers:
            observers.token_masks = token_masks(self._run.local_batches[0], self._is_encoder_decoder)
            try:
                pipeline.propagate(subgraph) if propagate else pipeline.run_until(subgraph)
            except Exception as exception:
                if not others_wait:
                    raise
                error = exception
        self._communicator.raise_together(error)
        return errors

    def _prune_observed(
        self,
        observers: Sequence[InputObserver],
        subgraph: Subgraph,
        layer_pruner: LayerPruner,
        unit_pruner: UnitPruner,
    ) -> dict[str, float]:
        """Prune what the observers belong to: layers by themselves, and coupled units."""
        of_units = [o for o in observers if (o.layers[0].name, o.expert) in self._run.unit_readers]
        of_layers = [observer for observer in observers if observer not in of_units]
        layers = list(dict.fromkeys(layer for observer in of_layers for layer in observer.layers))
        errors = layer_pruner.prune_layers(of_layers, self._weights(layers)) if of_layers else {}
        if of_units:
            errors |= unit_pruner.prune_observed(of_units, subgraph.name if subgraph.is_block else None)
        return errors

    def _prune_unobserved(self, subgraph: Subgraph, layer_pruner: LayerPruner, unit_pruner: UnitPruner) -> None:
        """Prune what a subgraph holds of layers and coupled units that need no observation of their inputs."""
        calibrated = set(self._run.calibrated_layers)
        of_units = {layer for group in self._run.groups if group.options.units for layer in group.layers}
        for layer in subgraph.layers:
            if layer not in calibrated and layer not in of_units:
                layer_pruner.prune_without_inputs(layer, self._model.get_parameter(layer.name).detach())
        for group in self._run.unit_groups:
            if not group.options.requires_calibration and subgraph.is_block:
                unit_pruner.prune_selected(group, subgraph.name)

    def _changed_parameters(
        self, subgraph: Subgraph, layers: Sequence[PrunableLayer], tuned: Sequence[Subgraph], permuted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The parameters that pruning these layers changes, with those of the coupled units that they read, those of
        blocks that are tuned, and those whose channels are permuted."""
        names = [layer.name for layer in layers] + list(permuted)
        if self._run.samples is not None:
            names += [layer.name for layer in subgraph.layers]
            names += [*pruned_parameters(self._run, tuned), *tuned_parameters(self._run, tuned)]
        for reader in self._run.unit_readers.values():
            if reader.layer in layers:
                parts = [name for name in reader.units.parameters if is_within(name, subgraph.name)]
                bias = reader.bias_name(self._model)
                names += (parts if subgraph.is_block else reader.units.parameters) + ([bias] if bias else [])
        return {name: self._model.get_parameter(name).detach() for name in dict.fromkeys(names)}

    def _all_reduce(self, observers: Sequence[InputObserver]) -> None:
        statistics = [observer.statistic for observer in observers]
        counts = np.array([statistic.count for statistic in statistics], dtype=np.int64)
        for statistic, count in zip(statistics, self._communicator.sum_counts(counts).tolist(), strict=True):
            self._communicator.all_reduce(statistic.total)
            statistic.count = count

    def _check_same_zeros(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Check that all ranks have pruned the same weights."""
        if self._communicator.world_size == 1 or not parameters:
            return
        checksums = [zlib.crc32((weight != 0).cpu().numpy().tobytes()) for weight in parameters.values()]
        by_rank = torch.stack(self._communicator.all_gather(torch.tensor(checksums, dtype=torch.int64)))
        differing = [name for name, column in zip(parameters, by_rank.t()) if len(column.unique()) > 1]
        if differing:
            raise RuntimeError(
                f'ranks have pruned different weights of "{differing[0]}": load the same model on every rank, and '
                "give each the same calibration data."
            )

    def _report_progress(self, layers: Sequence[PrunableLayer], errors: Mapping[str, float]) -> list[str]:
        """Log the sparsity and the error of each layer, and return a summary of them."""
        if not layers:
            return []
        counts = gather_counts([count_true(weight == 0) for weight in self._weights(layers).values()]).tolist()
        zeros = dict(zip((layer.name for layer in layers), counts, strict=True))
        for layer in layers:
            sparsity = zeros[layer.name] / layer.numel
            logger.info("%s: %.2f%% zero, error %.4f", layer.name, 100 * sparsity, errors[layer.name])
        worst = max(errors, key=errors.__getitem__)
        sparsity = sum(zeros.values()) / sum(layer.numel for layer in layers)
        return [f"{sparsity:.2%} zero, error up to {errors[worst]:.4f} in {worst}"]

    def _pipeline(self) -> BlockPipeline:
        return BlockPipeline(self._model, self._run.local_batches, str(self._run.config.activations))

    def _weights(self, layers: Sequence[PrunableLayer]) -> dict[str, torch.Tensor]:
        return {layer.name: self._model.get_parameter(layer.name).detach() for layer in layers}

    @contextmanager
    def _onload(self, subgraphs: Sequence[Subgraph]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in dict.fromkeys(name for subgraph in subgraphs for name in subgraph.modules):
                stack.enter_context(onload(self._model.get_submodule(name)))
            yield


def _criterion_requires(group: CoupledParameterGroup) -> Requires:
    return Requires.NOTHING if group.criterion is None else group.criterion.requires
