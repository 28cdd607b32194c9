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

from ..calibration.batches import concatenate_batches
from ..config import OneshotConfig, PruningConfig
from ..distributed import get_communicator, iter_parameters, onload
from ..engine.parameter_group import ParameterGroup
from ..engine.resolve import resolve_layers
from ..model.layers import PrunableLayer
from ..numerics import count_zeros
from ..reporting.report import SparsityReport
from .dense_pass import accumulate_gradients, masks_from_dense_model
from .layerwise import LayerPruner
from .resume import FinishedSubgraphs, ResumeError, identity_of
from .sequential import SequentialPruner
from .tracing import trace_model
from .validation import check_once, check_run, ranks_dense_model, requires_dense_pass, requires_inputs


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
    return OneshotRun(model, calibration_data, OneshotConfig.of(config)).run(state_dir, progress)


class OneshotRun:
    """One run."""

    def __init__(self, model: nn.Module, calibration_data: Iterable[Any] | None, config: OneshotConfig):
        self.model, self.config, self.communicator = model, config, get_communicator()
        resolved, self.skipped = resolve_layers(model, config, observes_inputs=True)
        self.groups = [ParameterGroup(group) for group in resolved]
        self.batches = list(calibration_data) if calibration_data is not None else []
        check_run(model, config, self.groups, self.batches, self.communicator.world_size)
        if self.skipped:
            logger.warning("not pruned, because the pattern does not divide them: %s", ", ".join(self.skipped))
        self.group_of = {layer.name: group for group in self.groups for layer in group.layers}
        self.own = self.batches[self.communicator.rank :: self.communicator.world_size]
        if config.forwards == 1 and self.own:
            self.own = [concatenate_batches(self.own)]

    # What each group needs

    @property
    def dense(self) -> list[ParameterGroup]:
        """Groups whose masks are decided on the dense model."""
        return [group for group in self.groups if group.target and ranks_dense_model(group)]

    @property
    def seen(self) -> list[PrunableLayer]:
        """Layers that are pruned by what reaches them."""
        return [layer for group in self.groups for layer in group.layers if requires_inputs(group)]

    @property
    def dense_pass_layers(self) -> list[PrunableLayer]:
        """Layers whose inputs in the dense model matter."""
        return [layer for group in self.groups if requires_dense_pass(group) for layer in group.layers]

    # The run

    def run(self, state_dir: str | Path | None, progress: bool) -> SparsityReport:
        finished = self._finished(state_dir)
        trace = None
        if watched := list(dict.fromkeys([*self.dense_pass_layers, *self.seen])):
            trace = trace_model(self.model, watched, self.batches[0], self.config.sequential)
            check_once(self.config, self.seen, trace.repeated)
        subgraphs = SequentialPruner(self.model, self.config, self.own, self.group_of, self.communicator, trace)
        norms, outliers = (
            subgraphs.dense_calibration_pass(self.dense_pass_layers) if self.dense_pass_layers else ({}, {})
        )
        if any(group.requires_gradients for group in self.groups):
            accumulate_gradients(self.model, self.groups, self.own, self.communicator)
        masks = masks_from_dense_model(self.model, self.dense, norms) if self.dense else {}
        layer_pruner = LayerPruner(
            groups=self.group_of,
            prune_counts=self._prune_counts(outliers),
            masks=masks,
            on_unreached=self.config.on_unreached,
        )
        errors: dict[str, float | None] = {}
        self._prune_unseen(layer_pruner)
        if self.seen:
            errors = subgraphs.prune(layer_pruner, finished, progress)
        return self._report(errors)

    def _finished(self, state_dir: str | Path | None) -> FinishedSubgraphs | None:
        if state_dir is None:
            return None
        identity = identity_of(self.config.to_dict(), iter_parameters(self.model), self.batches)
        finished, error = None, None
        try:
            finished = FinishedSubgraphs(state_dir, identity, self.communicator.rank == 0)
        except ResumeError as problem:
            error = problem
        self.communicator.raise_together(error)
        counts = torch.cat(self.communicator.all_gather(torch.tensor([finished.count]))).tolist()
        if len(set(counts)) > 1:
            raise ResumeError(
                f"processes find {counts} finished stages in {state_dir}: give a folder that all of them share."
            )
        return finished

    def _prune_counts(self, outliers: dict[str, float]) -> dict[str, int]:
        prune_counts: dict[str, int] = {}
        for group in (group for group in self.groups if group.target and not ranks_dense_model(group)):
            prune_counts |= group.prune_counts(self.gone(group), outliers)
        return prune_counts

    def gone(self, group: ParameterGroup) -> dict[str, int]:
        """How many units of each layer are zero already, where they are locked."""
        if not self.config.keep_zeros:
            return {}
        gone = {}
        for layer in group.layers:
            with onload(self.model.get_submodule(layer.module)):
                gone[layer.name] = group.pruned_units(layer, self.model.get_parameter(layer.name))
        return gone

    def _prune_unseen(self, layer_pruner: LayerPruner) -> None:
        """What no input has a say in."""
        for layer in (layer for group in self.groups if not requires_inputs(group) for layer in group.layers):
            with onload(self.model.get_submodule(layer.module)), torch.no_grad():
                layer_pruner.prune(layer, self.model.get_parameter(layer.name))

    def _report(self, errors: dict[str, float]) -> SparsityReport:
        zeros, sizes = {}, {}
        for name, tensor in iter_parameters(self.model):
            zeros[name], sizes[name] = count_zeros(tensor), tensor.numel()
        return SparsityReport.from_counts(self.groups, zeros, sizes, errors)
