"""Stages gone through one after the other: what reaches each is observed, its layers are pruned, and what it gives is
passed on to the next."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.batches import token_masks
from ..config import OneshotConfig
from ..distributed import Communicator, onload
from ..engine.parameter_group import ParameterGroup
from ..model.blocks import group_by_block
from ..model.layers import PrunableLayer
from ..numerics import count_zeros
from ..requires import Requires
from .layerwise import LayerPruner, norms_of
from .observers import InputObserver, InputObservers
from .pipeline import BlockPipeline, Subgraph
from .resume import FinishedSubgraphs
from .tracing import ModelTrace
from .validation import ranks_dense_model, requires_inputs


logger = logging.getLogger(__name__)


class SequentialPruner:
    """The stages of one run, in all processes at once.

    Args:
        model, config: of the run.
        batches: of this process.
        groups: name of a layer -> its group.
        communicator: that share the calibration data.
        probe: of the model; None where no input matters.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OneshotConfig,
        batches: Sequence[Any],
        groups: Mapping[str, ParameterGroup],
        communicator: Communicator,
        trace: ModelTrace | None,
    ):
        self._model, self._config, self._batches = model, config, batches
        self._groups, self._communicator, self._trace = groups, communicator, trace
        self._decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def dense_calibration_pass(
        self, layers: Sequence[PrunableLayer]
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Norms of these layers' inputs in the dense model, and shares of outliers, where groups need them."""
        norms: dict[str, torch.Tensor] = {}
        outliers: dict[str, float] = {}
        wanted = {layer.name for layer in layers}
        ranked = {name for name in wanted if ranks_dense_model(self._groups[name])}
        shares = LayerPruner(self._groups, on_unreached=self._config.on_unreached)
        with BlockPipeline(self._model, self._batches, self._config.activations) as pipeline:
            for subgraph in self._trace.subgraphs:
                own = [layer for layer in subgraph.layers if layer.name in wanted]
                with self._onload(subgraph):
                    observers = self._observe(
                        pipeline, subgraph, own, set(), passing=subgraph is not self._trace.subgraphs[-1]
                    )
                    shares.check_reached(observers)
                    owls = [
                        layer
                        for layer in own
                        if self._groups[layer.name].options.allocation.requires & Requires.OUTLIERS
                    ]
                    for block in group_by_block(self._model, owls):
                        outliers |= shares.outliers(observers, block, self._weights(block))
                    norms |= {layer.name: norms_of(layer, observers) for layer in own if layer.name in ranked}
        return norms, outliers

    def prune(self, layer_pruner: LayerPruner, finished: FinishedSubgraphs | None, progress: bool) -> dict[str, float]:
        """Prune stage by stage. Returns the error of each layer's outputs."""
        errors: dict[str, float] = {}
        subgraphs = self._trace.subgraphs
        hidden = not progress or self._communicator.rank > 0
        with (
            BlockPipeline(self._model, self._batches, self._config.activations) as pipeline,
            tqdm(subgraphs, disable=hidden) as bar,
        ):
            for number, subgraph in enumerate(bar):
                bar.set_description(subgraph.name)
                layers = [layer for layer in subgraph.layers if requires_inputs(self._groups[layer.name])]
                passing = subgraph is not subgraphs[-1] and subgraph.stack is not None
                with self._onload(subgraph):
                    if finished is not None and number < finished.count:
                        new = self._take(layers, *finished.read(number))
                    elif self._config.forwards == 1:
                        new = self._prune_passing(pipeline, subgraph, layers, layer_pruner, passing)
                    else:
                        observers = self._observe(pipeline, subgraph, layers, self._gram(layers))
                        new = layer_pruner.prune_layers(observers, self._weights(layers))
                    self._compare(layers)
                    if finished is not None and number >= finished.count:
                        finished.write(number, self._weights(layers), new)
                    if passing and subgraph.name not in pipeline:
                        pipeline.propagate(subgraph)
                    bar.set_postfix_str(self._told(layers, new))
                errors |= new
        return errors

    def _observe(
        self,
        pipeline: BlockPipeline,
        subgraph: Subgraph,
        layers: list[PrunableLayer],
        gram: set[str],
        passing: bool = False,
    ) -> list[InputObserver]:
        """Sum up what reaches these layers, over all batches of all processes. `passing` on as well what the block
        gives takes no other forward."""
        if not layers and not passing:
            return []
        error, found = None, []
        last = self._trace.last.get(subgraph.name) if len(layers) == len(subgraph.layers) and not passing else None
        with InputObservers(self._model, layers, self._trace.leaders, gram, last) as observers:

            def announce(index: int) -> None:
                observers.masks = token_masks(self._batches[index], self._decodes)

            try:
                if passing and subgraph.stack is not None:
                    pipeline.propagate(subgraph, announce)
                else:
                    pipeline.run_until(subgraph, announce)
                found = observers.all(lambda layer: self._model.get_parameter(layer.name).device)
            except Exception as problem:  # whatever it is, the other processes must not wait
                error = problem
        self._communicator.raise_together(error)
        self._all_reduce(found)
        return found

    def _prune_passing(
        self,
        pipeline: BlockPipeline,
        subgraph: Subgraph,
        layers: list[PrunableLayer],
        layer_pruner: LayerPruner,
        passing: bool,
    ) -> dict[str, float]:
        """Prune each layer when its inputs come, all batches at once, and let them go on through what is left."""
        errors: dict[str, float] = {}
        waiting, problem = True, None

        def ready(observer: InputObserver, error: Exception | None) -> None:
            nonlocal waiting
            waiting = False  # if this raises, the others know
            self._communicator.raise_together(error)
            waiting = True
            self._all_reduce([observer])
            errors.update(layer_pruner.prune_layers([observer], self._weights(observer.layers)))

        last = None if passing else self._trace.last.get(subgraph.name)
        with InputObservers(self._model, layers, self._trace.leaders, self._gram(layers), last, ready) as observers:
            observers.masks = token_masks(self._batches[0], self._decodes)
            try:
                pipeline.propagate(subgraph) if passing else pipeline.run_until(subgraph)
            except Exception as error:
                if not waiting:
                    raise
                problem = error
        self._communicator.raise_together(problem)
        return errors

    def _all_reduce(self, observers: Sequence[InputObserver]) -> None:
        counts = self._communicator.sum_counts(
            np.array([observer.stat.count for observer in observers], dtype=np.int64)
        )
        for observer, count in zip(observers, counts.tolist(), strict=True):
            self._communicator.all_reduce(observer.stat.total)
            observer.stat.count = count

    def _compare(self, layers: Sequence[PrunableLayer]) -> None:
        """See that all processes have pruned the same weights."""
        if self._communicator.world_size == 1 or not layers:
            return
        zeros = [zlib.crc32((weight != 0).cpu().numpy()) for weight in self._weights(layers).values()]
        told = torch.stack(self._communicator.all_gather(torch.tensor(zeros, dtype=torch.int64)))
        differing = [layer.name for layer, column in zip(layers, told.t()) if len(column.unique()) > 1]
        if differing:
            raise RuntimeError(
                f'processes have pruned different weights of "{differing[0]}": load the same model on every rank, and '
                "give each the same calibration data."
            )

    def _take(self, layers: Sequence[PrunableLayer], weights, errors: dict[str, float]) -> dict[str, float]:
        """The weights of a stage that was finished before."""
        for layer in layers:
            with torch.no_grad():
                self._model.get_parameter(layer.name).copy_(weights[layer.name])
        return errors

    def _told(self, layers: Sequence[PrunableLayer], errors: dict[str, float]) -> str:
        """A stage in a few words; each layer goes to the log."""
        if not layers:
            return ""
        zeros = {name: count_zeros(weight) for name, weight in self._weights(layers).items()}
        for layer in layers:
            share = zeros[layer.name] / layer.numel
            logger.info("%s: %.2f%% zero, error %.4f", layer.name, 100 * share, errors[layer.name])
        worst = max(errors, key=errors.get)
        share = sum(zeros.values()) / sum(layer.numel for layer in layers)
        return f"{share:.2%} zero, error up to {errors[worst]:.4f} in {worst}"

    def _gram(self, layers: Sequence[PrunableLayer]) -> set[str]:
        return {layer.name for layer in layers if self._groups[layer.name].options.solver.requires & Requires.GRAM}

    def _weights(self, layers: Sequence[PrunableLayer]) -> dict[str, torch.Tensor]:
        return {layer.name: self._model.get_parameter(layer.name).detach() for layer in layers}

    @contextmanager
    def _onload(self, subgraph: Subgraph) -> Iterator[None]:
        names = [subgraph.name] if subgraph.stack is not None else [layer.module for layer in subgraph.layers]
        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                stack.enter_context(onload(self._model.get_submodule(name)))
            yield
