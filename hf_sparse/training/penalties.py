"""Penalties at work in one training: their gradients before each optimizer step, and their values in the log."""

from __future__ import annotations

from ..engine.penalty import GroupPenalty, new_group_penalty
from ..engine.pruner import Pruner
from ..schedulers import PruningSchedule


class Penalties:
    """The penalties of all parameter groups of a training.

    Args:
        pruner: of the model.
        schedule: the pruning schedule of the training.
        max_steps: the number of its optimizer steps.

    Attributes:
        groups: the penalty of each group that has one.
    """

    def __init__(self, pruner: Pruner, schedule: PruningSchedule, max_steps: int):
        self._schedule, self._max_steps, self._observed_step = schedule, max_steps, 0
        self.groups: list[GroupPenalty] = [
            new_group_penalty(group.options.penalty, group.options, pruner.shards, pruner.communicator)
            for group in pruner.groups
            if group.options.penalty is not None and group.target
        ]

    def before_step(self, step: int) -> None:
        """Adds the gradients of the penalties to those of the loss, which are reduced, unscaled and clipped. DeepSpeed
        may call this several times in a step, each time with the gradients of other shards.

        Args:
            step: of the optimizer, from 1.
        """
        for group in self.groups:
            strength = self._strength(group, step)
            if strength:
                if step != self._observed_step:  # in a later call of a step some weights have changed already
                    group.observe()
                group.add_gradients(strength)
        self._observed_step = step

    def metrics(self, step: int) -> dict[str, float]:
        """Returns what to add to the logs of a training loss: `penalty_<name>`, the term that each kind of penalty is
        of the loss, for the present weights. All ranks call this.

        Args:
            step: of the optimizer, the last one that was taken.
        """
        values: dict[str, float] = {}
        for group in self.groups:
            name, strength = f"penalty_{group.options.penalty_name}", self._strength(group, step)
            values[name] = values.get(name, 0.0) + (strength * group.value() if strength else 0.0)
        return values

    def _strength(self, group: GroupPenalty, step: int) -> float:
        return group.penalty.strength_at(step, self._max_steps, self._schedule.end)
