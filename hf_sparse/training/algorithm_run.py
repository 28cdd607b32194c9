"""AlgorithmRun: an algorithm at work in one training, before and after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..engine.pruner import Pruner
from ..schedulers import PruningSchedule


class AlgorithmRun:
    """Prunes when a prune step is due, and else enforces the masks: gradual pruning.

    Kinds of algorithms that do more are subclasses, which `new_run` chooses.

    Args:
        pruner: of the model.
        schedule: the pruning schedule of the training.
        optimizer: of the training, as accelerate has wrapped it.
        seed: of the training.

    Attributes:
        requires_gradients: whether `observe_gradients` or `before_step` reads gradients.
    """

    requires_gradients = False

    def __init__(self, pruner: Pruner, schedule: PruningSchedule, optimizer: Any, seed: int):
        self.pruner, self.schedule, self.optimizer, self.seed = pruner, schedule, optimizer, seed

    @property
    def learning_rate_factor(self) -> float:
        """The present learning rate of the optimizer's first parameter group, relative to its initial one."""
        group = self.optimizer.param_groups[0]
        initial = group.get("initial_lr", group["lr"])
        return float(group["lr"] / initial) if initial else 1.0

    def start(self) -> None:
        """Called before the first step of a new training, when masks are known and their zeros enforced."""

    def observe_gradients(self, step: int) -> None:
        """Called before `before_step`, as often, with the gradients of the loss alone: those of penalties are added
        afterwards.

        Args:
            step: of the optimizer, from 1.
        """

    def before_step(self, step: int) -> None:
        """Called before the optimizer changes the weights. Gradients are reduced over ranks, unscaled and clipped.
        DeepSpeed may call this several times in a step, each time with the gradients of other shards.

        Args:
            step: of the optimizer, from 1.
        """

    def after_step(self, step: int) -> None:
        """Called when the optimizer has changed the weights. Afterwards pruned weights are +0.0.

        Args:
            step: of the optimizer, from 1.
        """
        prune_step = self.schedule.prune_step(step)
        if prune_step is not None:
            self.pruner.update(prune_step, self.schedule.total)
        else:
            self.pruner.enforce()

    def is_at_final_sparsity(self, step: int) -> bool:
        """Whether the model has its final sparsity after an optimizer step, and after all later ones: then a
        checkpoint can be the best one.

        Args:
            step: of the optimizer, from 1; 0 before the first.
        """
        return step >= self.schedule.end

    @property
    def keeps_earlier_zeros(self) -> bool:
        """Whether weights that are pruned before the first prune step remain so, or others in their place."""
        return True

    def metrics(self) -> dict[str, float]:
        """Returns what to add to the logs of a training loss, equal on all ranks. All ranks call this."""
        return {}

    def finish(self) -> None:
        """Called at the end of the training."""

    # Saving and resuming

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Returns what a resumed run needs beside the masks: kind -> name of a selected weight -> a float32 tensor of
        the shape of its shard's tensor. State files hold it as "kind/name"."""
        return {}

    def values(self) -> dict[str, Any]:
        """Returns JSON values that a resumed run needs, equal on all ranks."""
        return {}

    def load(self, read: Callable[[str], dict[str, torch.Tensor]], values: Mapping[str, Any]) -> None:
        """Restores what `tensors` and `values` have returned, whatever the number of ranks was. Called in place of
        `start`, when the weights and masks of the checkpoint are loaded.

        Args:
            read: returns the tensors of a kind, by the name of their weight. Raises ValueError if they are missing.
            values: of JSON.

        Raises:
            ValueError: something is missing, or does not fit.
        """
