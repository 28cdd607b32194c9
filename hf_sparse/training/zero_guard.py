"""ZeroGuard: zeros in what is evaluated and saved, also where other code changes weights after the optimizer step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerState

from ..engine.pruner import Pruner


logger = logging.getLogger(__name__)


class ZeroGuard:
    """Sets pruned weights to zero again that other code has changed, such as a callback that averages weights.

    Args:
        pruner: of the present training.
    """

    def __init__(self, pruner: Pruner):
        self.pruner = pruner
        self._hooks: list[Any] = []
        self._restored_by_hooks = 0
        self._has_warned = False

    def restore(self, state: TrainerState) -> int:
        """Sets pruned weights that are not zero to zero. All ranks call this. Weights are only read where none has
        changed. Logs a warning the first time.

        Returns:
            How many there were, without those that the hooks have restored.
        """
        counts = np.array([self.pruner.restore_zeros(), self._restored_by_hooks], dtype=np.int64)
        found, restored = self.pruner.communicator.sum_counts(counts).tolist()
        self._restored_by_hooks = 0
        if found + restored and not self._has_warned and state.is_world_process_zero:
            self._has_warned = True
            logger.warning(
                "step %d: %s pruned weights were brought back by other code after the optimizer step, such as a "
                "callback that averages weights. They are set to zero before each evaluation and save, and at the end "
                "of training; this is logged once.",
                state.global_step,
                f"{found + restored:,}",
            )
        return found

    def install_hooks(self) -> None:
        """Restores the zeros of each weight whenever its module returns its state dict, until `remove_hooks`: a stock
        Trainer has no event between other callbacks and saving. Nothing happens on ranks whose state dict nobody
        reads, nor under ZeRO-3, which collects weights by itself."""
        if not self._hooks:
            for name in [name for name, shard in self.pruner.shards.items() if shard.is_in_state_dict]:
                module = self.pruner.model.get_submodule(name.rpartition(".")[0])
                self._hooks.append(module.register_state_dict_pre_hook(self._hook_for(name)))

    def _hook_for(self, name: str) -> Any:
        def restore(module: nn.Module, prefix: str, keep_vars: bool) -> None:
            self._restored_by_hooks += self.pruner.restore_zeros([name])

        return restore

    def remove_hooks(self) -> None:
        """Removes the hooks, so that no copy or pickle of the model has them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
