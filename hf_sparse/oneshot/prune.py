"""One-shot pruning of a pretrained model: calibration data, one prune step, no training.

1. Dense model: observe inputs, for globally ranked groups and for allocations; accumulate gradients; select masks of
   globally ranked groups.
2. Prune the layers that need no observation of their inputs; with reconstruction this waits for their block.
3. Subgraph by subgraph: observe inputs, prune, reconstruct the outputs of the dense block, propagate those of the
   pruned one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.batches import first_row
from ..config import OneshotConfig, PruningConfig, PruningConfigError
from ..distributed import iter_parameters, onload, raise_on_all_ranks
from ..engine.emptied_layers import EmptiedLayers
from ..model.coupling import UnitGroup
from ..numerics import count_zeros
from ..reporting.report import SparsityReport
from .block_influence import score_blocks
from .dense_model import accumulate_gradients, masks_from_dense_model
from .free_channels import verify_free_channels
from .layerwise import LayerPruner
from .permutation import ChannelPermuter
from .prepare import PreparedRun, prepare_run
from .resume import FinishedSubgraphs, ResumeError, run_digest
from .sequential import SequentialPruner
from .unit_pruner import UnitPruner
from .unit_selection import select_units


def prune_oneshot(
    model: nn.Module,
    calibration_data: Iterable[Any] | None,
    config: OneshotConfig | PruningConfig,
    state_dir: str | Path | None = None,
    progress: bool = True,
) -> SparsityReport:
    """Prunes `model` in place, without training.

    Block by block, the inputs of each layer are observed over the calibration data, its weights are pruned, and the
    outputs of the pruned block become the inputs of the next one. Nothing is added to the model: `save_pretrained`
    writes a plain checkpoint, and `SparseTrainer` with `keep_zeros=True` fine-tunes the remaining weights.

    Args:
        model: a transformers model or any other, on any device or offloaded by accelerate (`device_map`).
        calibration_data: batches on the CPU, in a form that the model takes: mappings of keyword arguments, tuples of
            positional arguments, or tensors. Padding tokens, where `attention_mask` is 0, do not count. May be None
            if no method needs data. Under `accelerate launch` every process gives all batches and uses its share.
        config: what to prune, and how. A `PruningConfig` must not set a schedule.
        state_dir: a folder for finished blocks, from which the same call continues after an interruption.
        progress: whether to show a progress bar.

    Returns:
        The zeros of each layer, counted in the weights, and the error of its outputs on calibration data.

    Raises:
        PruningConfigError: options that contradict each other or the model, all together.
        ValueError: calibration data that is missing, is not finite or does not reach a layer; a model without blocks.
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
    run = prepare_run(model, calibration_data, OneshotConfig.of(config))
    emptied = _emptied_layers(run)
    finished = None if state_dir is None else _open_finished(run, state_dir)
    trace = run.trace()
    channels = _verified_channels(run)
    sequential = None if trace is None else SequentialPruner(run, trace)
    statistics, measured, unit_scores = ({}, {}, {}) if sequential is None else sequential.dense_calibration_pass()
    if any(group.requires_gradients for group in run.groups):
        unit_scores |= accumulate_gradients(model, run.groups, run.whole_batches, run.communicator)
    unit_scores |= score_blocks(model, run.unit_groups, run.whole_batches, run.communicator)
    selection = select_units(model, run.unit_groups, unit_scores)
    unit_pruner = UnitPruner(model, run.unit_groups, selection, str(run.config.on_unreached))
    layer_pruner = LayerPruner(
        groups=run.group_of,
        prune_counts=run.prune_counts(measured),
        masks=masks_from_dense_model(model, run.dense_ranked_groups, statistics) if run.dense_ranked_groups else {},
        on_unreached=str(run.config.on_unreached),
    )
    emptied.warn({name: count_zeros(mask) for name, mask in layer_pruner.masks.items()}, "after the global ranking")
    if run.samples is None:
        _prune_unobserved(run, layer_pruner, unit_pruner)
    errors: Mapping[str, float] = {}
    if sequential is not None and (run.calibrated_layers or run.reconstructed_layers):
        permuter = ChannelPermuter(model, run.group_of, channels, layer_pruner.masks)
        errors = sequential.prune(layer_pruner, unit_pruner, permuter, finished, progress)
    zeros = _zeros(run)
    emptied.warn(zeros, "after pruning")
    sizes = {name: tensor.numel() for name, tensor in iter_parameters(model)}
    return SparsityReport.from_counts(run.groups, zeros, sizes, errors)


def _verified_channels(run: PreparedRun) -> list[UnitGroup]:
    """The channels to permute.

    Raises:
        PruningConfigError: the options ask for it, and there are none.
    """
    if not any(group.options.permute for group in run.groups):
        return []
    row = first_row(run.batches[0])
    channels = verify_free_channels(run.model, run.free_channels, row, run.communicator)
    if not channels:
        raise PruningConfigError(
            ["`permute` has no effect: no layer before the selected weights can take over their order. Leave it out."]
        )
    return channels


def _prune_unobserved(run: PreparedRun, layer_pruner: LayerPruner, unit_pruner: UnitPruner) -> None:
    """Prune what needs no observation of its inputs."""
    model, calibrated = run.model, set(run.calibrated_layers)
    for unit_group in run.unit_groups:
        if not unit_group.options.requires_calibration:
            with torch.no_grad():
                unit_pruner.prune_selected(unit_group)
    groups = [group for group in run.groups if not group.options.units]
    for layer in (layer for group in groups for layer in group.layers if layer not in calibrated):
        with onload(model.get_submodule(layer.module)), torch.no_grad():
            layer_pruner.prune_without_inputs(layer, model.get_parameter(layer.name))


def _open_finished(run: PreparedRun, folder: str | Path) -> FinishedSubgraphs:
    """Read the finished subgraphs, on all ranks."""
    digest = run_digest(run.config.to_dict(), iter_parameters(run.model), run.batches)
    with raise_on_all_ranks(ResumeError):
        finished = FinishedSubgraphs(folder, digest, run.communicator.rank == 0)
    counts = torch.cat(run.communicator.all_gather(torch.tensor([finished.count]))).tolist()
    if len(set(counts)) > 1:
        raise ResumeError(f"ranks find {counts} finished blocks in {folder}: use a folder that all of them share.")
    return finished


def _emptied_layers(run: PreparedRun) -> EmptiedLayers:
    """Returns the layers that are empty before pruning, with the zeros that it keeps."""
    emptied = EmptiedLayers(run.groups)
    if run.config.keep_zeros:
        emptied.add(_zeros(run))
    return emptied


def _zeros(run: PreparedRun) -> dict[str, int]:
    """Returns the number of zeros of each parameter, by name."""
    return {name: count_zeros(tensor) for name, tensor in iter_parameters(run.model)}
