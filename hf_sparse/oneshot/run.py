"""One-shot pruning: a pretrained model, some calibration data, one prune step, no training.

survey    the dense model, where something is shared out or ranked over all layers
decide    masks of what is ranked over all layers, or by gradients
walk      stage by stage: observe inputs, prune, pass on what the pruned block gives
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PruningConfig
from ..group import Group
from ..pruner import build_groups
from ..report import LayerReport, SparsityReport, count_zeros
from ..sharding import all_processes, each_parameter, onboard
from ..targets import Layer
from .batches import merged
from .config import OneshotConfig
from .dense import decide_on_dense, read_gradients
from .faults import check_once, check_run, decided_on_dense, looks_at_inputs, needs_survey
from .layerwise import Layerwise
from .probe import look
from .stages import Stages
from .state import FinishedStages, ResumeError, identity_of


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
        stages = Stages(self.model, self.config, self.own, self.group_of, self.processes, probe)
        norms, outliers = stages.survey(self.surveyed) if self.surveyed else ({}, {})
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
            errors = stages.prune(settled, finished, progress)
        return self._report(errors)

    def _finished(self, state_dir: str | Path | None) -> FinishedStages | None:
        if state_dir is None:
            return None
        identity = identity_of(self.config.to_dict(), each_parameter(self.model), self.batches)
        finished, error = None, None
        try:
            finished = FinishedStages(state_dir, identity, self.processes.rank == 0)
        except ResumeError as problem:
            error = problem
        self.processes.raise_together(error)
        counts = torch.cat(self.processes.gather(torch.tensor([finished.count]))).tolist()
        if len(set(counts)) > 1:
            raise ResumeError(
                f"processes find {counts} finished stages in {state_dir}: give a folder that all of them share."
            )
        return finished

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
