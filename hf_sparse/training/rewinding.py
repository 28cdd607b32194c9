"""Rewinding: after the last prune step, training restarts from the weights of an earlier step with the final mask.

Buffers, such as the statistics of batch normalization, are not restored: no optimizer trains them, and the forward
passes after the restart estimate them anew.

Reference: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (weights); Renda et al.,
"Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020 (learning rate).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..distributed import ShardRegion, build_shards, load_local_part, reset_optimizer_state, write_copies
from ..engine.pruner import Pruner
from ..engine.saved_state import check_saved_state
from ..schedulers import PruningSchedule


_KIND = "rewind"
"""Begins the names of kept weights in state files, and names their description."""

SavedState = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
"""The tensors and the JSON values of the state file of one rank."""


class Rewinding:
    """The weights of an early step, which are written back after the last prune step.

    All trained parameters are kept, this rank's part of each, in the memory of the CPU: as much as the parameters take
    of it, from the step `schedule.rewind` to the last prune step. As long they are in the state files too.

    Args:
        pruner: of the model.
        schedule: the pruning schedule of the training, with a step to rewind to.
        optimizer: of the training, as accelerate has wrapped it.
    """

    def __init__(self, pruner: Pruner, schedule: PruningSchedule, optimizer: Any):
        if schedule.rewind is None:
            raise ValueError("the schedule has no step to rewind to")
        self._pruner, self._optimizer, self._first, self._last = pruner, optimizer, schedule.rewind, schedule.end
        trained = {name: value for name, value in pruner.model.named_parameters() if value.requires_grad}
        self._shards, self._communicator = build_shards(trained)
        self._kept: dict[str, torch.Tensor] = {}

    def after_step(self, step: int) -> None:
        """Keeps the weights at the step to rewind to, and restores them at that of the last prune step, with the zeros
        of the final mask and the optimizer as before its first step. All ranks call this.

        Args:
            step: of the optimizer, from 1; 0 before the first one.
        """
        if step == self._first:
            self._kept = {name: shard.tensor.to("cpu", copy=True) for name, shard in self._shards.items()}
        elif step == self._last:
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for name, shard in self._shards.items():
            shard.tensor.copy_(self._kept.pop(name))
        write_copies(self._shards.values(), self._communicator)
        self._pruner.enforce()
        reset_optimizer_state(self._optimizer)

    # Saving and resuming

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns what the state file of this rank must have; {} when nothing is kept."""
        return {f"{_KIND}/{name}": tensor for name, tensor in self._kept.items()}

    def values(self) -> dict[str, Any]:
        """Returns what describes the tensors, as JSON values: the shape of each parameter, and the regions of this
        rank."""
        regions = {name: self._shards[name].local_regions for name in self._kept}
        boxes = {name: [[region.start, region.stop] for region in own] for name, own in regions.items()}
        shapes = {name: list(self._shards[name].shape) for name in self._kept}
        return {_KIND: {"shapes": shapes, "boxes": boxes}} if self._kept else {}

    def load(self, states: Sequence[SavedState], step: int) -> None:
        """Takes the kept weights from a checkpoint, which any number of ranks may have written.

        Args:
            states: of all ranks that have written one.
            step: of the checkpoint.

        Raises:
            ValueError: they are missing, or of other weights.
        """
        if not self._first <= step < self._last:
            return
        for _, values in states:
            if _KIND not in values:
                raise ValueError(f"the weights of step {self._first}, to rewind to, are missing.")
            check_saved_state({**values[_KIND], "counters": {}})
        self._kept = {name: self._load(name, states) for name in self._shards}

    def _load(self, name: str, states: Sequence[SavedState]) -> torch.Tensor:
        shard, saved = self._shards[name], []
        for tensors, values in states:
            if values[_KIND]["shapes"].get(name) != list(shard.shape):
                raise ValueError(f'the weights to rewind to lack "{name}" of shape {list(shard.shape)}.')
            boxes = values[_KIND]["boxes"].get(name, ())
            regions = [ShardRegion(tuple(start), tuple(stop)) for start, stop in boxes]
            saved.append((regions, partial(tensors.__getitem__, f"{_KIND}/{name}")))
        try:
            return load_local_part(shard, saved, shard.tensor.dtype)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f'the value of "{name}" to rewind to is missing or misshapen: {error}') from error


def check_rewind_description(values: Mapping[str, Any]) -> None:
    """Checks the JSON values of kept weights in a state file, if there are any. Raises ValueError."""
    if _KIND in values:
        if not isinstance(values[_KIND], Mapping):
            raise ValueError(f"its description of the weights to rewind to is a {type(values[_KIND]).__name__}")
        check_saved_state({**values[_KIND], "counters": {}})


def replayed_step(step: int, schedule: PruningSchedule, max_steps: int) -> int:
    """Returns the step of the learning rate schedule that a step of a training with rewinding uses: its own up to the
    last prune step, then those from the step to rewind to up to the last one, evenly in the steps that remain.

    Example:
        >>> schedule = PruningSchedule(start=1, end=6, every=1, rewind=2)
        >>> [replayed_step(step, schedule, max_steps=10) for step in range(11)]
        [0, 1, 2, 3, 4, 5, 2, 4, 6, 8, 10]
    """
    if schedule.rewind is None or step < schedule.end:
        return step
    span = (max_steps - schedule.rewind) / (max_steps - schedule.end)
    return schedule.rewind + round((min(step, max_steps) - schedule.end) * span)
