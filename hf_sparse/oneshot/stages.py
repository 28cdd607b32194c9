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

from ..group import Group
from ..report import count_zeros
from ..sharding import OneProcess, onboard
from ..solvers import SOLVERS
from ..targets import Layer
from .batches import token_masks
from .blocks import Stage, Walk, by_block
from .config import OneshotConfig
from .faults import decided_on_dense, looks_at_inputs
from .feeds import Feed, Feeds
from .layerwise import Layerwise, norms_of
from .probe import Probe
from .state import FinishedStages


logger = logging.getLogger(__name__)


class Stages:
    """The stages of one run, in all processes at once.

    Args:
        model, config: of the run.
        batches: of this process.
        groups: name of a layer -> its group.
        processes: that share the calibration data.
        probe: of the model; None where no input matters.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OneshotConfig,
        batches: Sequence[Any],
        groups: Mapping[str, Group],
        processes: OneProcess,
        probe: Probe | None,
    ):
        self._model, self._config, self._batches = model, config, batches
        self._groups, self._processes, self._probe = groups, processes, probe
        self._decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def survey(self, layers: Sequence[Layer]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Norms of these layers' inputs in the dense model, and shares of outliers, where groups need them."""
        norms: dict[str, torch.Tensor] = {}
        outliers: dict[str, float] = {}
        wanted = {layer.name for layer in layers}
        ranked = {name for name in wanted if decided_on_dense(self._groups[name])}
        shares = Layerwise(self._groups, on_unreached=self._config.on_unreached)
        with Walk(self._model, self._batches, self._config.activations) as walk:
            for stage in self._probe.stages:
                own = [layer for layer in stage.layers if layer.name in wanted]
                with self._onboard(stage):
                    feeds = self._observe(walk, stage, own, set(), passing=stage is not self._probe.stages[-1])
                    shares.check_reached(feeds)
                    owls = [layer for layer in own if self._groups[layer.name].options.allocation == "owl"]
                    for block in by_block(self._model, owls):
                        outliers |= shares.outliers(feeds, block, self._weights(block))
                    norms |= {layer.name: norms_of(layer, feeds) for layer in own if layer.name in ranked}
        return norms, outliers

    def prune(self, settled: Layerwise, finished: FinishedStages | None, progress: bool) -> dict[str, float]:
        """Prune stage by stage. Returns the error of each layer's outputs."""
        errors: dict[str, float] = {}
        stages = self._probe.stages
        hidden = not progress or self._processes.rank > 0
        with Walk(self._model, self._batches, self._config.activations) as walk, tqdm(stages, disable=hidden) as bar:
            for number, stage in enumerate(bar):
                bar.set_description(stage.name)
                layers = [layer for layer in stage.layers if looks_at_inputs(self._groups[layer.name])]
                passing = stage is not stages[-1] and stage.stack is not None
                with self._onboard(stage):
                    if finished is not None and number < finished.count:
                        new = self._take(layers, *finished.read(number))
                    elif self._config.forwards == 1:
                        new = self._prune_passing(walk, stage, layers, settled, passing)
                    else:
                        feeds = self._observe(walk, stage, layers, self._gram(layers))
                        new = settled.settle(feeds, self._weights(layers))
                    self._compare(layers)
                    if finished is not None and number >= finished.count:
                        finished.write(number, self._weights(layers), new)
                    if passing and stage.name not in walk:
                        walk.pass_on(stage)
                    bar.set_postfix_str(self._told(layers, new))
                errors |= new
        return errors

    def _observe(
        self, walk: Walk, stage: Stage, layers: list[Layer], gram: set[str], passing: bool = False
    ) -> list[Feed]:
        """Sum up what reaches these layers, over all batches of all processes. `passing` on as well what the block
        gives takes no other forward."""
        if not layers and not passing:
            return []
        error, found = None, []
        last = self._probe.last.get(stage.name) if len(layers) == len(stage.layers) and not passing else None
        with Feeds(self._model, layers, self._probe.leaders, gram, last) as feeds:

            def announce(index: int) -> None:
                feeds.masks = token_masks(self._batches[index], self._decodes)

            try:
                if passing and stage.stack is not None:
                    walk.pass_on(stage, announce)
                else:
                    walk.run_to(stage, announce)
                found = feeds.all(lambda layer: self._model.get_parameter(layer.name).device)
            except Exception as problem:  # whatever it is, the other processes must not wait
                error = problem
        self._processes.raise_together(error)
        self._add_up(found)
        return found

    def _prune_passing(
        self, walk: Walk, stage: Stage, layers: list[Layer], settled: Layerwise, passing: bool
    ) -> dict[str, float]:
        """Prune each layer when its inputs come, all batches at once, and let them go on through what is left."""
        errors: dict[str, float] = {}
        waiting, problem = True, None

        def ready(feed: Feed, error: Exception | None) -> None:
            nonlocal waiting
            waiting = False  # if this raises, the others know
            self._processes.raise_together(error)
            waiting = True
            self._add_up([feed])
            errors.update(settled.settle([feed], self._weights(feed.layers)))

        last = None if passing else self._probe.last.get(stage.name)
        with Feeds(self._model, layers, self._probe.leaders, self._gram(layers), last, ready) as feeds:
            feeds.masks = token_masks(self._batches[0], self._decodes)
            try:
                walk.pass_on(stage) if passing else walk.run_to(stage)
            except Exception as error:
                if not waiting:
                    raise
                problem = error
        self._processes.raise_together(problem)
        return errors

    def _add_up(self, feeds: Sequence[Feed]) -> None:
        counts = self._processes.sum(np.array([feed.stat.count for feed in feeds], dtype=np.int64))
        for feed, count in zip(feeds, counts.tolist(), strict=True):
            self._processes.add_up(feed.stat.total)
            feed.stat.count = count

    def _compare(self, layers: Sequence[Layer]) -> None:
        """See that all processes have pruned the same weights."""
        if self._processes.size == 1 or not layers:
            return
        zeros = [zlib.crc32((weight != 0).cpu().numpy()) for weight in self._weights(layers).values()]
        told = torch.stack(self._processes.gather(torch.tensor(zeros, dtype=torch.int64)))
        differing = [layer.name for layer, column in zip(layers, told.t()) if len(column.unique()) > 1]
        if differing:
            raise RuntimeError(
                f'processes have pruned different weights of "{differing[0]}": load the same model on every rank, and '
                "give each the same calibration data."
            )

    def _take(self, layers: Sequence[Layer], weights, errors: dict[str, float]) -> dict[str, float]:
        """The weights of a stage that was finished before."""
        for layer in layers:
            with torch.no_grad():
                self._model.get_parameter(layer.name).copy_(weights[layer.name])
        return errors

    def _told(self, layers: Sequence[Layer], errors: dict[str, float]) -> str:
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

    def _gram(self, layers: Sequence[Layer]) -> set[str]:
        return {layer.name for layer in layers if SOLVERS[self._groups[layer.name].options.solver].needs == "gram"}

    def _weights(self, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        return {layer.name: self._model.get_parameter(layer.name).detach() for layer in layers}

    @contextmanager
    def _onboard(self, stage: Stage) -> Iterator[None]:
        names = [stage.name] if stage.stack is not None else [layer.module for layer in stage.layers]
        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                stack.enter_context(onboard(self._model.get_submodule(name)))
            yield
