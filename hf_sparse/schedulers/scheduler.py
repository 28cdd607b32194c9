"""Schedulers: how sparse the selected weights are after each prune step.

Names and arguments are those of Intel Neural Compressor's `pytorch_pruner`. A scheduler has no state: the sparsity
depends only on the target, the prune step and the number of prune steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from ..registry import Registry
from .curves import CURVES, Curve


def register_scheduler(name: str) -> Callable[[Any], Any]:
    """Class decorator: registers a `Scheduler` as `scheduler=name`, in arguments and on the command line.

    Raises:
        TypeError: the class is not a complete subclass of `Scheduler`.
        ValueError: another scheduler has this name.

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
    """Creates the scheduler that `config` selects.

    This is the scheduler named by `config.scheduler`. If that is unset, it is "oneshot" where pruning starts and ends
    at the same step (`prune_start` and `prune_end`, or `start_step` and `end_step`), and "iterative" otherwise.

    Args:
        config: a mapping or any object with the settings as keys or attributes.

    Raises:
        ValueError: no scheduler of this name is registered.

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
    """Returns the first setting of these names in `config`, a mapping or an object, that is not None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return default


class Scheduler(ABC):
    """Maps a prune step to the sparsity of the selected weights after it.

    Args:
        config: a mapping or any object; each scheduler documents the settings that it reads.
    """

    has_curve: ClassVar[bool] = False
    """Whether `sparsity_decay_type` selects the curve along which the sparsity increases."""
    reaches_target_at_once: ClassVar[bool] = False
    """Whether the sparsity is the target from the first prune step on."""
    unused_options: ClassVar[tuple[str, ...]] = ()
    """Options of the config that have no effect."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def update_sparsity_ratio(
        self, aggressive_ratio: float, current_prune_step: int, total_prune_steps: int, masks: dict[str, torch.Tensor]
    ) -> float:
        """Returns the sparsity, in [0, aggressive_ratio], after prune step `current_prune_step`.

        Args:
            aggressive_ratio: the target sparsity.
            current_prune_step: from 1 to `total_prune_steps`; 0 is the state before pruning, and values beyond the
                last prune step return the target.
            total_prune_steps: number of prune steps, at least 1.
            masks: parameter name -> current mask (bool, True is kept); may be ignored.
        """


SCHEDULERS = Registry("scheduler", Scheduler)
"""Scheduler classes by name."""


def _check_steps(current_prune_step: int, total_prune_steps: int) -> None:
    if total_prune_steps < 1:
        raise ValueError(
            f"`total_prune_steps` is {total_prune_steps}: it must be at least 1. Check that `prune_end` is not after "
            "the last training step."
        )
    if current_prune_step < 0:
        raise ValueError(f"`current_prune_step` is {current_prune_step}: it must be at least 0.")


@register_scheduler("oneshot")
class OneshotScheduler(Scheduler):
    """Reaches the target sparsity in the first prune step.

    Example:
        >>> OneshotScheduler({}).update_sparsity_ratio(0.8, 1, 1, {})
        0.8

    Reference: Intel Neural Compressor, pytorch_pruner.
    """

    reaches_target_at_once = True
    unused_options = ("sparsity_decay_type", "initial_sparsity")

    def update_sparsity_ratio(
        self, aggressive_ratio: float, current_prune_step: int, total_prune_steps: int, masks: dict[str, torch.Tensor]
    ) -> float:
        """Returns `aggressive_ratio` at every prune step."""
        _check_steps(current_prune_step, total_prune_steps)
        return aggressive_ratio


@register_scheduler("iterative")
class IterativeScheduler(Scheduler):
    """Increases the sparsity along a curve f from the initial sparsity s0 to the target A, at prune step c of n:

        sparsity = s0 + (1-s0)·f(c/n, (A-s0)/(1-s0)), which is f(c/n, A) for s0 = 0

    Args:
        config: a mapping or any object. Settings read from it: `sparsity_decay_type`, the name of the curve (default
            "cubic"); `max_sparsity_per_layer`, or its older name `max_sparsity_ratio_per_op`, an upper bound of the
            target (default 1); `initial_sparsity`, s0 (default 0).

    Raises:
        ValueError: no curve of this name is registered.

    Example:
        >>> scheduler = IterativeScheduler({"sparsity_decay_type": "linear"})
        >>> [round(scheduler.update_sparsity_ratio(0.8, c, 4, {}), 3) for c in range(6)]
        [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]

    Reference: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
    2017, section 3.
    """

    has_curve = True

    def __init__(self, config: Any):
        super().__init__(config)
        self._curve: Curve = CURVES[_setting(config, "sparsity_decay_type", default="cubic")]

    def update_sparsity_ratio(
        self, target_ratio: float, current_prune_step: int, total_prune_steps: int, masks: dict[str, torch.Tensor]
    ) -> float:
        """Returns the sparsity on the curve; exactly the target A from the last prune step on."""
        _check_steps(current_prune_step, total_prune_steps)
        cap = _setting(self.config, "max_sparsity_per_layer", "max_sparsity_ratio_per_op", default=1.0)
        target = min(cap, target_ratio)
        if current_prune_step >= total_prune_steps:
            return target
        initial = min(_setting(self.config, "initial_sparsity", default=0.0), target)
        if initial >= 1.0:
            return target
        t = current_prune_step / total_prune_steps
        ratio = initial + (1.0 - initial) * self._curve(t, (target - initial) / (1.0 - initial))
        return min(max(ratio, initial), target)
