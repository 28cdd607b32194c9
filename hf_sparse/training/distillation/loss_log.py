"""LossLog: the terms of a loss, summed until Trainer logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class LossLog(TrainerCallback):
    """Sums of the terms of the loss since the last log, on their device, so that no step waits for it.

    As a callback of the trainer it starts anew whenever training begins, also when `auto_find_batch_size` repeats it.

    Example:
        >>> log = LossLog()
        >>> for step in range(2):
        ...     log.add({"loss_task": torch.tensor(1.0 + step)}, step)
        >>> log.pop(2, lambda sums: sums)
        {'loss_task': 1.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._first_step = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Drops what a failed attempt has added."""
        self._sums = {}

    def add(self, terms: dict[str, Tensor], step: int) -> None:
        """Adds the terms of a part of an optimizer step.

        Args:
            terms: name -> scalar, scaled so that the terms of all parts of the step sum up to its loss.
            step: optimizer steps done so far.
        """
        if not self._sums:
            self._first_step = step
        for name, term in terms.items():
            term = term.detach().float()
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def pop(self, step: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the means over the optimizer steps since the last call, and over ranks; {} if nothing was added.
        All ranks call this.

        Args:
            step: optimizer steps done so far.
            reduce: of a tensor, its mean over ranks.
        """
        if not self._sums:
            return {}
        names, sums = list(self._sums), torch.stack(list(self._sums.values()))
        steps = max(step - self._first_step, 1)
        self._sums = {}
        means = (reduce(sums) / steps).tolist()
        return dict(zip(names, means, strict=True))
