"""DynamicRun: dynamic sparse training at work, whose prune steps let weights return."""

from __future__ import annotations

from typing import Any

import torch

from ..distributed import optimizer_state
from ..engine.pruner import Pruner
from ..schedulers import PruningSchedule
from .algorithm_run import AlgorithmRun


class DynamicRun(AlgorithmRun):
    """Prunes to the target before the first step where the algorithm says so, and resets the optimizer's state of
    weights that return at a prune step.

    With Adam they take larger steps than others for a while, since their second moment starts at 0 and its correction
    follows from the number of steps that all weights share. Keeping that moment, which knows their dense gradients, is
    worse: perplexity 13.5 in place of 12.7 (`rigl`, 80% of a Llama of 260,000 parameters in 1,500 steps).

    Args:
        pruner, schedule, optimizer, seed: see `AlgorithmRun`.
    """

    def __init__(self, pruner: Pruner, schedule: PruningSchedule, optimizer: Any, seed: int):
        super().__init__(pruner, schedule, optimizer, seed)
        self.algorithm = next(group.dynamic for group in pruner.groups if group.dynamic is not None)
        self.requires_gradients = pruner.reads_gradients
        self._has_penalties = any(group.options.penalty is not None for group in pruner.groups)
        self._gradients: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        self.pruner.start_sparse()

    def observe_gradients(self, step: int) -> None:
        """Keeps the gradients of shards that lose them before the prune step, as under DeepSpeed, and those to which
        gradients of penalties are added."""
        if not self.requires_gradients or self.schedule.prune_step(step) is None:
            return
        for name, shard in self.pruner.shards.items():
            if (self._has_penalties or not shard.keeps_gradient) and (gradient := shard.gradient) is not None:
                self._gradients[name] = gradient.clone()

    def after_step(self, step: int) -> None:
        prune_step = self.schedule.prune_step(step)
        if prune_step is None:
            self.pruner.enforce()
            return
        masks = self.pruner.masks
        before = {name: masks.bits(name).clone() for name in masks}
        self.pruner.update(prune_step, self.schedule.total, self._gradients_of_step())
        self._gradients.clear()
        for name, tensors in optimizer_state(self.optimizer, self.pruner.shards).items():
            returned = (masks.bits(name) != 0) & (before[name] == 0)
            for tensor in tensors.values():
                tensor.masked_fill_(returned.to(tensor.device), 0.0)

    def _gradients_of_step(self) -> dict[str, torch.Tensor | None]:
        """Returns the gradient of each shard's tensor. Where a rank holds nothing of a weight, it is empty."""
        if not self.requires_gradients:
            return {}
        return {
            name: self._gradients.get(name, shard.gradient) if shard.tensor.numel() else shard.tensor
            for name, shard in self.pruner.shards.items()
        }

    def is_at_final_sparsity(self, step: int) -> bool:
        return self.algorithm.initial_criterion is not None or super().is_at_final_sparsity(step)

    @property
    def keeps_earlier_zeros(self) -> bool:
        total = self.schedule.total
        return not any(self.algorithm.opens_masks(prune_step, total) for prune_step in range(1, total + 1))
