"""The scheduler API of Intel Neural Compressor's pytorch_pruner, letter for letter.

A scheduler is a pure function of (target, prune step, number of prune steps): it keeps no counter, so a resumed run
needs nothing from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ..registry import Registry
from .curves import CURVES


SCHEDULERS = Registry("scheduler")


def register_scheduler(name: str):
    """Class decorator: makes a `Scheduler` selectable as `scheduler=name`, in arguments and on the command line.

    Example:
        >>> @register_scheduler("half_at_once")
        ... class HalfAtOnce(Scheduler):
        ...     def update_sparsity_ratio(self, target_ratio, current_prune_step, total_prune_steps, masks):
        ...         return target_ratio if current_prune_step >= total_prune_steps else target_ratio / 2
        >>> get_scheduler({"scheduler": "half_at_once"}).update_sparsity_ratio(0.8, 1, 4, {})
        0.4
    """
    return SCHEDULERS.register(name)


def get_scheduler(config: Any) -> Scheduler:
    """The scheduler that `config` asks for: by `config.scheduler` where given; else one-shot when pruning starts and
    ends at the same step (`prune_start`/`prune_end`, or `start_step`/`end_step`); else iterative.

    Args:
        config: a mapping or any object with the settings as keys or attributes.

    Raises:
        ValueError: the name is not registered; the known ones are listed.

    Example:
        >>> type(get_scheduler({"prune_start": 5, "prune_end": 5})).__name__
        'OneshotScheduler'
    """
    name = _setting(config, "scheduler")
    if not name:
        start = _setting(config, "prune_start", "start_step")
        end = _setting(config, "prune_end", "end_step")
        name = "oneshot" if start is not None and start == end else "iterative"
    return SCHEDULERS[name](config)


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that `config` (mapping or object) gives a value other than None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return default


class Scheduler(ABC):
    """Says how sparse the selected weights must be after each prune step.

    Args:
        config: a mapping or any object; each scheduler documents the settings it reads.
    """

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def update_sparsity_ratio(
        self,
        aggressive_ratio: float,
        current_prune_step: int,
        total_prune_steps: int,
        masks: dict[str, torch.Tensor],
    ) -> float:
        """The sparsity, in [0, aggressive_ratio], that prune step `current_prune_step` of `total_prune_steps` brings.

        Args:
            aggressive_ratio: the final sparsity.
            current_prune_step: counts from 1; 0 means "nothing pruned yet"; beyond the last it stays at the target.
            total_prune_steps: how many prune steps there are, at least 1.
            masks: name -> mask, True is kept; may be ignored.
        """


def _check_steps(current_prune_step: int, total_prune_steps: int) -> None:
    if total_prune_steps < 1:
        raise ValueError(
            f"total_prune_steps is {total_prune_steps}: it must be at least 1. Check that prune_end lies within the "
            "training steps."
        )
    if current_prune_step < 0:
        raise ValueError(f"current_prune_step is {current_prune_step}: it counts from 0 to total_prune_steps.")


@register_scheduler("oneshot")
class OneshotScheduler(Scheduler):
    """Everything in one prune step.

    Example:
        >>> OneshotScheduler({}).update_sparsity_ratio(0.8, 1, 1, {})
        0.8
    """

    def update_sparsity_ratio(
        self,
        aggressive_ratio: float,
        current_prune_step: int,
        total_prune_steps: int,
        masks: dict[str, torch.Tensor],
    ) -> float:
        """`aggressive_ratio`, whatever the step."""
        _check_steps(current_prune_step, total_prune_steps)
        return aggressive_ratio


@register_scheduler("iterative")
class IterativeScheduler(Scheduler):
    """Step by step along a curve: s0 + (1-s0)·f(c/n, (A-s0)/(1-s0)), which for s0 = 0 is f(c/n, A).

    Settings read from `config`: `sparsity_decay_type`, the curve (default `cubic`); `max_sparsity_per_layer` (also
    under its older name `max_sparsity_ratio_per_op`), which caps the target: A = min(cap, target);
    `initial_sparsity`, s0 (default 0).

    Raises:
        ValueError: the curve is unknown (the known ones are listed).

    Example:
        >>> scheduler = IterativeScheduler({"sparsity_decay_type": "linear"})
        >>> [round(scheduler.update_sparsity_ratio(0.8, c, 4, {}), 3) for c in range(6)]
        [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self._curve = CURVES[_setting(config, "sparsity_decay_type", default="cubic")]

    def update_sparsity_ratio(
        self,
        target_ratio: float,
        current_prune_step: int,
        total_prune_steps: int,
        masks: dict[str, torch.Tensor],
    ) -> float:
        """The curve's value at c/n; exactly A at the last prune step and after it."""
        _check_steps(current_prune_step, total_prune_steps)
        cap = _setting(self.config, "max_sparsity_per_layer", "max_sparsity_ratio_per_op", default=1.0)
        target = min(cap, target_ratio)
        if current_prune_step >= total_prune_steps:
            return target
        initial = min(_setting(self.config, "initial_sparsity", default=0.0), target)
        if initial >= 1.0:
            return target
        share = current_prune_step / total_prune_steps
        ratio = initial + (1.0 - initial) * self._curve(share, (target - initial) / (1.0 - initial))
        return min(max(ratio, initial), target)
