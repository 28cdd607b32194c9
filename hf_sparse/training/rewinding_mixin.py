"""Rewinding in SparseTrainer: the learning rate, and what is refused before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..config import PruningConfig, PruningConfigError
from ..schedulers import PruningSchedule
from .callback import SparsityCallback
from .rewinding import replayed_step


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


# Learning rate schedules of transformers that depend on metrics.
_OF_METRICS = ("reduce_lr_on_plateau", "greedy")


class RewindingMixin(TrainerBase):
    """The methods of `SparseTrainerMixin` that rewind the learning rate."""

    sparsity_callback: SparsityCallback | None
    _has_given_scheduler = False
    """Whether the learning rate scheduler was given to the trainer."""

    @property
    def _rewinds(self) -> bool:
        callback = self.sparsity_callback
        return callback is not None and callback.prunes and cast(PruningConfig, callback.config).rewind is not None

    def _check_rewinding(self) -> None:
        """Checks before training that the learning rate can be rewound, if the options say so.

        Raises:
            PruningConfigError: it cannot, with what to do instead.
        """
        if self._rewinds and (errors := list(self._rewinding_errors())):
            raise PruningConfigError(errors)

    def _rewinding_errors(self) -> Iterator[str]:
        schedule = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if schedule in _OF_METRICS:
            yield _refusal(f'lr_scheduler_type="{schedule}"', "depends on metrics")
        if self._has_given_scheduler:
            yield _refusal(f"the {type(self.lr_scheduler).__name__} that the trainer was given", "has a state")
        if "layerwise" in optimizer:
            yield _refusal(f'that of `optim="{optimizer}"`', "is one for each layer")
        if self.is_deepspeed_enabled and "scheduler" in self.accelerator.state.deepspeed_plugin.deepspeed_config:
            yield _refusal("the scheduler of the DeepSpeed config", "is made by DeepSpeed")

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's `create_scheduler`; with `rewind`, the learning rate runs through its schedule from that step on
        once more after the last prune step."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._rewinds:
            config = cast(PruningConfig, cast(SparsityCallback, self.sparsity_callback).config)
            replay(scheduler, config.schedule(num_training_steps), num_training_steps)
        return scheduler


def replay(scheduler: Any, schedule: PruningSchedule, max_steps: int) -> None:
    """Makes a learning rate scheduler follow `replayed_step`.

    Raises:
        PruningConfigError: its learning rate is no function of the step.
    """
    # Subclasses such as AdafactorSchedule compute the learning rate otherwise.
    if not isinstance(scheduler, LambdaLR) or type(scheduler).get_lr is not LambdaLR.get_lr:
        raise PruningConfigError([_refusal(type(scheduler).__name__, "is no LambdaLR, a function of the step alone")])
    scheduler.lr_lambdas = [_replayed(factor, schedule, max_steps) for factor in scheduler.lr_lambdas]


def _replayed(factor: Callable[[int], float], schedule: PruningSchedule, max_steps: int) -> Callable[[int], float]:
    # A plain function: the state of any other callable would be saved with the scheduler.
    return lambda step: factor(replayed_step(step, schedule, max_steps))


def _refusal(scheduler: str, reason: str) -> str:
    return (
        f"`rewind` runs through the schedule of the learning rate again, but {scheduler} {reason}: use "
        '`lr_scheduler_type="linear"`, or leave `rewind` out.'
    )
