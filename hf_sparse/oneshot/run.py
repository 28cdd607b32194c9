"""One-shot pruning: a pretrained model, some calibration data, one prune step, no training.

survey    the dense model, where something is shared out or ranked over all layers
decide    masks of what is ranked over all layers, or by gradients
walk      stage by stage: observe inputs, prune, pass on what the pruned block gives
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import PruningConfig
from ..group import Group
from ..pruner import build_groups
from ..report import LayerReport, SparsityReport, count_zeros
from ..sharding import all_processes, each_parameter, onboard
from ..solvers import SOLVERS
from ..targets import Layer
from .batches import merged, token_masks
from .blocks import Stage, Walk, by_block
from .config import OneshotConfig
from .dense import decide_on_dense, read_gradients
from .faults import check_once, check_run, decided_on_dense, looks_at_inputs, needs_survey
from .feeds import Feed, Feeds
from .layerwise import Layerwise, norms_of
from .probe import Probe, look
from .state import FinishedStages, identity_of


logger = logging.getLogger(__name__)


def prune_oneshot(
    model: nn.Module,
    calibration_data: Iterable[Any] | None,
    config: PruningConfig,
    state_dir: str | Path | None = None,
    progress: bool = True,
) -> SparsityReport:
    """Prune `model` in place, without training.

    Block by block, the inputs of each weight are observed over the calibration data, its weights are pruned, and what
    the pruned block gives is passed on to the next. Nothing is added to the model: `save_pretrained` writes a plain
    checkpoint, and `SparseTrainer` with `keep_zeros=True` fine-tunes the weights that are left.

    Args:
        model: of transformers or any other; on any device, or offloaded by accelerate (`device_map`).
        calibration_data: batches, as the model takes them (mappings of keyword arguments, tuples, or tensors), on the
            CPU. Padding, by `attention_mask`, is not counted. May be None where nothing looks at inputs. Under
            `accelerate launch` each process gives all of it, and takes its share.
        config: `OneshotConfig`, or a `PruningConfig` of the same options.
        state_dir: where finished blocks are kept, so that the same call goes on after an interruption.
        progress: whether a bar is shown.

    Returns: zeros counted in the weights, with each layer's error on calibration data.

    Raises:
        PruningConfigError: options that contradict each other or the model, all together.
        ValueError: calibration data that is missing, not finite, or does not reach a layer; a model without blocks.
        ResumeError: `state_dir` belongs to another run.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]]))
        >>> batch = torch.tensor([[1.0, 8.0, 1.0, 1.0]])
        >>> report = prune_oneshot(model, [batch], OneshotConfig(target_sparsity=0.5), progress=False)
        >>> model[0].weight.data
        tensor([[4., 1., 0., 0.],
                [0., 2., 0., 4.]])
    """
    return Oneshot(model, calibration_data, OneshotConfig.of(config)).run(state_dir, progress)


class Oneshot:
    """One run."""

    def __init__(self, model: nn.Module, calibration_data: Iterable[Any] | None, config: OneshotConfig):
        self.model, self.config, self.processes = model, config, all_processes()
        self.groups, self.skipped = build_groups(model, config, inputs=True)
        self.batches = list(calibration_data) if calibration_data is not None else []
        check_run(model, config, self.groups, self.batches, self.processes.size)
        if self.skipped:
            logger.warning("not pruned, because the pattern does not divide them: %s", ", ".join(self.skipped))
        self.group_of = {layer.name: group for group in self.groups for layer in group.layers}
        self.own = self.batches[self.processes.rank :: self.processes.size]
        if config.forwards == 1 and self.own:
            self.own = [merged(self.own)]
        self._decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    # What each group needs

    @property
    def dense(self) -> list[Group]:
        """Groups whose masks are decided on the dense model."""
        return [group for group in self.groups if group.target and decided_on_dense(group)]

    @property
    def seen(self) -> list[Layer]:
        """Layers that are pruned by what reaches them."""
        return [layer for group in self.groups for layer in group.layers if looks_at_inputs(group)]

    @property
    def surveyed(self) -> list[Layer]:
        """Layers whose inputs in the dense model matter."""
        return [layer for group in self.groups if needs_survey(group) for layer in group.layers]

    # The run

    def run(self, state_dir: str | Path | None, progress: bool) -> SparsityReport:
        finished = self._finished(state_dir)
        probe = None
        if watched := list(dict.fromkeys([*self.surveyed, *self.seen])):
            probe = look(self.model, watched, self.batches[0], self.config.sequential)
            check_once(self.config, self.seen, probe.repeated)
        norms, outliers = self._survey(probe) if self.surveyed else ({}, {})
        if any(group.observes_gradients for group in self.groups):
            read_gradients(self.model, self.groups, self.own, self.processes)
        masks = decide_on_dense(self.model, self.dense, norms) if self.dense else {}
        settled = Layerwise(
            groups=self.group_of,
            quotas=self._quotas(outliers),
            masks=masks,
            dampening=self.config.dampening,
            block=self.config.solver_block,
            on_unreached=self.config.on_unreached,
        )
        errors: dict[str, float | None] = {}
        self._prune_unseen(settled)
        if self.seen:
            errors = self._walk(probe, settled, finished, progress)
        return self._report(errors)

    def _finished(self, state_dir: str | Path | None) -> FinishedStages | None:
        if state_dir is None:
            return None
        identity = identity_of(self.config.to_dict(), each_parameter(self.model), self.batches)
        return FinishedStages(state_dir, identity, self.processes.rank == 0)

    def _quotas(self, outliers: dict[str, float]) -> dict[str, int]:
        quotas: dict[str, int] = {}
        for group in (group for group in self.groups if group.target and not decided_on_dense(group)):
            quotas |= group.quotas(self.gone(group), outliers)
        return quotas

    def gone(self, group: Group) -> dict[str, int]:
        """How many units of each layer are zero already, where they are locked."""
        if not self.config.keep_zeros:
            return {}
        gone = {}
        for layer in group.layers:
            with onboard(self.model.get_submodule(layer.module)):
                gone[layer.name] = group.pruned_units(layer, self.model.get_parameter(layer.name))
        return gone

    def _prune_unseen(self, settled: Layerwise) -> None:
        """What no input has a say in."""
        for layer in (layer for group in self.groups if not looks_at_inputs(group) for layer in group.layers):
            with onboard(self.model.get_submodule(layer.module)), torch.no_grad():
                settled.prune(layer, self.model.get_parameter(layer.name))

    def _survey(self, probe: Probe) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Norms of inputs in the dense model, and shares of outliers."""
        norms: dict[str, torch.Tensor] = {}
        outliers: dict[str, float] = {}
        wanted = {layer.name for layer in self.surveyed}
        ranked = {layer.name for group in self.dense for layer in group.layers if group.criterion.needs == "inputs"}
        shares = Layerwise(self.group_of, on_unreached=self.config.on_unreached)
        with Walk(self.model, self.own, self.config.activations) as walk:
            for stage in probe.stages:
                layers = [layer for layer in stage.layers if layer.name in wanted]
                with self._onboard(stage):
                    feeds = self._observe(walk, stage, layers, probe, gram=set(), passing=True)
                    shares.check_reached(feeds)
                    owls = [layer for layer in layers if self.group_of[layer.name].options.allocation == "owl"]
                    for block in by_block(self.model, owls):
                        outliers |= shares.outliers(feeds, block, self._weights(block))
                    norms |= {layer.name: norms_of(layer, feeds) for layer in layers if layer.name in ranked}
        return norms, outliers

    def _walk(
        self, probe: Probe, settled: Layerwise, finished: FinishedStages | None, progress: bool
    ) -> dict[str, float]:
        """Prune stage by stage."""
        errors: dict[str, float] = {}
        hidden = not progress or self.processes.rank > 0
        with Walk(self.model, self.own, self.config.activations) as walk, tqdm(probe.stages, disable=hidden) as bar:
            for number, stage in enumerate(bar):
                bar.set_description(stage.name)
                layers = [layer for layer in stage.layers if looks_at_inputs(self.group_of[layer.name])]
                passing = stage is not probe.stages[-1] and stage.stack is not None
                with self._onboard(stage):
                    if finished is not None and number < finished.count:
                        new = self._take(layers, *finished.read(number))
                    elif self.config.forwards == 1:
                        new = self._prune_passing(walk, stage, layers, probe, settled, passing)
                    else:
                        feeds = self._observe(walk, stage, layers, probe, self._gram(layers))
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
        self, walk: Walk, stage: Stage, layers: list[Layer], probe: Probe, gram: set[str], passing: bool = False
    ) -> list[Feed]:
        """Sum up what reaches these layers, over all batches of all processes. `passing` on as well what the block
        gives takes no other forward."""
        if not layers and not passing:
            return []
        error, found = None, []
        last = probe.last.get(stage.name) if len(layers) == len(stage.layers) and not passing else None
        with Feeds(self.model, layers, probe.leaders, gram, last) as feeds:

            def announce(index: int) -> None:
                feeds.masks = token_masks(self.own[index], self._decodes)

            try:
                if passing and stage.stack is not None:
                    walk.pass_on(stage, announce)
                else:
                    walk.run_to(stage, announce)
                found = feeds.all(lambda layer: self.model.get_parameter(layer.name).device)
            except Exception as problem:  # whatever it is, the other processes must not wait
                error = problem
        self.processes.raise_together(error)
        self._add_up(found)
        return found

    def _prune_passing(
        self, walk: Walk, stage: Stage, layers: list[Layer], probe: Probe, settled: Layerwise, passing: bool
    ) -> dict[str, float]:
        """Prune each layer when its inputs come, all batches at once, and let them go on through what is left."""
        errors: dict[str, float] = {}
        waiting, problem = True, None

        def ready(feed: Feed, error: Exception | None) -> None:
            nonlocal waiting
            waiting = False  # if this raises, the others know
            self.processes.raise_together(error)
            waiting = True
            self._add_up([feed])
            errors.update(settled.settle([feed], self._weights(feed.layers)))

        last = None if passing else probe.last.get(stage.name)
        with Feeds(self.model, layers, probe.leaders, self._gram(layers), last, ready) as feeds:
            feeds.masks = token_masks(self.own[0], self._decodes)
            try:
                walk.pass_on(stage) if passing else walk.run_to(stage)
            except Exception as error:
                if not waiting:
                    raise
                problem = error
        self.processes.raise_together(problem)
        return errors

    def _add_up(self, feeds: Sequence[Feed]) -> None:
        counts = self.processes.sum(np.array([feed.stat.count for feed in feeds], dtype=np.int64))
        for feed, count in zip(feeds, counts.tolist(), strict=True):
            self.processes.add_up(feed.stat.total)
            feed.stat.count = count

    def _compare(self, layers: Sequence[Layer]) -> None:
        """See that all processes have pruned the same weights."""
        if self.processes.size == 1 or not layers:
            return
        zeros = [zlib.crc32((weight != 0).cpu().numpy()) for weight in self._weights(layers).values()]
        told = torch.stack(self.processes.gather(torch.tensor(zeros, dtype=torch.int64)))
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
                self.model.get_parameter(layer.name).copy_(weights[layer.name])
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
        return {layer.name for layer in layers if SOLVERS[self.group_of[layer.name].options.solver].needs == "gram"}

    def _weights(self, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        return {layer.name: self.model.get_parameter(layer.name).detach() for layer in layers}

    @contextmanager
    def _onboard(self, stage: Stage) -> Iterator[None]:
        names = [stage.name] if stage.stack is not None else [layer.module for layer in stage.layers]
        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                stack.enter_context(onboard(self.model.get_submodule(name)))
            yield

    def _report(self, errors: dict[str, float]) -> SparsityReport:
        zeros, sizes = {}, {}
        for name, tensor in each_parameter(self.model):
            zeros[name], sizes[name] = count_zeros(tensor), tensor.numel()
        layers = tuple(
            LayerReport(
                layer.name,
                group.name,
                group.options.pattern,
                layer.shape,
                layer.numel,
                zeros[layer.name],
                errors.get(layer.name),
            )
            for group in self.groups
            for layer in group.layers
        )
        weights = sum(layer.weights for layer in layers)
        target = sum(group.target * layer.numel for group in self.groups for layer in group.layers) / weights
        return SparsityReport(layers, sum(sizes.values()), sum(zeros.values()), target)
