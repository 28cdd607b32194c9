"""ConstrainedRun: training under the constraint that the weights have the zeros of the target, by ADMM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from ..algorithms.constrained import ConstrainedTraining
from ..distributed import elementwise_state_keys, optimizer_name, optimizer_state
from ..engine.masks import MaskStore
from ..engine.pruner import Pruner
from ..engine.saved_state import is_count
from ..engine.unreached_layers import warn_of_unreached
from ..schedulers import PruningSchedule
from .algorithm_run import AlgorithmRun


logger = logging.getLogger(__name__)

_SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
"""The key of the second moment in the state of optimizers: of the Adam family, and of RMSprop."""


class ConstrainedRun(AlgorithmRun):
    """Draws the weights x to a sparse point z, whose zeros each prune step selects anew; see `ConstrainedTraining`.

    The step of the optimizer comes first, and then that of the penalty. As a gradient, the penalty would pass through
    Adam, which moves a weight by about the learning rate, however far z is, and would enter the second moment by which
    points are projected.

    Memory: z is x where the mask of z keeps a weight, and the dual variable u is zero there. So u, 4 bytes for each
    selected weight, float32 whatever the dtype of the weight, and this mask, one byte, are all. A prune step has
    4 bytes more for the scores, and the checkpoint 8 bytes for u and the mask.

    Raises:
        NotImplementedError: scores need a second moment of each weight, which the optimizer does not hold.
        ValueError: the schedule has one prune step alone.
    """

    def __init__(self, pruner: Pruner, schedule: PruningSchedule, optimizer: Any, seed: int):
        super().__init__(pruner, schedule, optimizer, seed)
        options = next(group.options for group in pruner.groups if group.target)
        self._algorithm, self._name = cast(ConstrainedTraining, options.algorithm), options.algorithm_name
        keys = elementwise_state_keys(optimizer) if self._algorithm.needs_second_moment else None
        if keys is not None and keys.isdisjoint(_SECOND_MOMENTS):
            raise NotImplementedError(self._refusal("each weight"))
        if schedule.total < 2:
            raise ValueError(
                f'`algorithm` "{self._name}" draws weights to zeros between the first prune step and the last, but '
                f"`prune_start` and `prune_end` are both step {schedule.end}: lower `prune_start`, or raise "
                "`prune_end`."
            )
        self._shards = {
            layer.name: pruner.shards[layer.name] for group in pruner.groups if group.target for layer in group.layers
        }
        self._masks = MaskStore({})
        """Where z is not zero."""
        self._duals: dict[str, torch.Tensor] = {}
        """u of each weight, zero where z is not; empty before the first and after the last prune step."""
        self._prune_step = 0
        """At which z was projected."""

    def _refusal(self, what: str) -> str:
        return (
            f'`algorithm` "{self._name}" projects weights by the second moment that Adam holds of {what}, which '
            f'{optimizer_name(self.optimizer)} does not: use `optim="adamw_torch"`, or `algorithm="gradual"`.'
        )

    def _strength(self, prune_steps: int) -> float:
        """Returns the strength of the penalty after this number of prune steps."""
        return self._algorithm.strength_at(prune_steps / self.schedule.total)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, dual in self._duals.items():
            weight = self._shards[name].tensor
            change = torch.add(weight, dual).mul_(-self._strength(self._prune_step))
            weight.add_(change.masked_fill_(self._masks[name], 0))
        prune_step = self.schedule.prune_step(step)
        if prune_step is None or not self._has_state(prune_step):
            self._enforce()
        elif prune_step < self.schedule.total:
            self._project_point(prune_step)
            self._enforce()
        else:
            scores = self._scores({name: shard.tensor for name, shard in self._shards.items()})
            self._warn_of_unused()
            self.pruner.write_copies()
            self.pruner.select(prune_step, self.schedule.total, scores)
            self._duals, self._masks = {}, MaskStore({})

    def _enforce(self) -> None:
        """Enforces earlier zeros, and writes the weights, which the penalty has moved, to all their copies."""
        self.pruner.enforce()
        if self._duals:
            self.pruner.write_copies()

    def _has_state(self, prune_step: int) -> bool:
        """Whether the optimizer has what scores need: it has taken a step. All ranks call this.

        Raises:
            RuntimeError: it has not, up to the last prune step.
        """
        if not self._algorithm.needs_second_moment:
            return True
        if self.pruner.communicator.any(bool(self._second_moments())):
            return True
        if prune_step == self.schedule.total:
            raise RuntimeError(
                f'`algorithm` "{self._name}" cannot reach its target: the optimizer has taken no step up to the last '
                "prune step, because no gradient was finite. Prune later (`prune_end`), or lower the loss scale."
            )
        logger.warning("prune step %d of %d: no finite gradient so far.", prune_step, self.schedule.total)
        return False

    @torch.no_grad()
    def _project_point(self, prune_step: int) -> None:
        """Projects p = x + u onto the zeros of this prune step. Where z is zero then, the new u is p."""
        points = self._duals
        if not points:
            self._masks = self.pruner.new_masks()
            points = {
                name: torch.zeros_like(shard.tensor, dtype=torch.float32) for name, shard in self._shards.items()
            }
        for name, point in points.items():
            point.add_(self._shards[name].tensor)
        self.pruner.select(prune_step, self.schedule.total, self._scores(points), self._masks)
        # strength * u, the dual variable itself, does not change with the strength.
        ratio = self._strength(self._prune_step) / self._strength(prune_step) if self._duals else 1.0
        for name, point in points.items():
            point.masked_fill_(self._masks[name], 0).mul_(ratio)
        self._duals, self._prune_step = points, prune_step

    def _scores(self, points: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the scores of points, all ranks at once."""
        if not self._algorithm.needs_second_moment:
            return {name: self._algorithm.scores(point.float(), None) for name, point in points.items()}
        moments = self._second_moments()
        scores = {}
        for name, point in points.items():
            # A weight without a gradient so far has no state.
            moment = moments[name].float() if name in moments else torch.zeros_like(point, dtype=torch.float32)
            scores[name] = self._algorithm.scores(point.float(), moment)
        return scores

    def _second_moments(self) -> dict[str, torch.Tensor]:
        """Returns the second moment of each weight that has had a gradient, all ranks at once.

        Raises:
            NotImplementedError: the optimizer holds none of one of the weights, which is named.
        """
        moments, refused = {}, None
        for name, state in optimizer_state(self.optimizer, self._shards).items():
            key = next((key for key in _SECOND_MOMENTS if key in state), None)
            if key is None:
                refused = refused or NotImplementedError(self._refusal(f'"{name}"'))
            else:
                moments[name] = state[key]
        self.pruner.communicator.raise_together(refused)
        return moments

    def _warn_of_unused(self) -> None:
        """Warns of weights without a gradient, where they score 0 and are pruned first."""
        if not self._algorithm.needs_second_moment:
            return
        moments = self._second_moments()
        unused = [name for name, shard in self._shards.items() if name not in moments and shard.tensor.numel()]
        warn_of_unreached(unused, f'`algorithm` "{self._name}"')

    # Logs

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Returns the strength in the next step and the residual of the constraint, ‖x - z‖ / ‖x‖ over all weights."""
        if not self._duals:
            return {}
        total = torch.zeros(2, device=next(iter(self._duals.values())).device)
        for name, dual in self._duals.items():
            if self._shards[name].is_primary:
                squares = self._shards[name].tensor.to(dual.dtype).square()
                total += torch.stack([squares.masked_fill(self._masks[name], 0).sum(), squares.sum()])
        self.pruner.communicator.all_reduce(total)
        residual_norm, norm = total.sqrt().tolist()
        return {
            "constraint_strength": self._strength(self._prune_step),
            "constraint_residual": residual_norm / norm if norm else 0.0,
        }

    # Saving and resuming

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        if not self._duals:
            return {}
        return {"dual": dict(self._duals), "kept": {name: self._masks[name].float() for name in self._duals}}

    def values(self) -> dict[str, Any]:
        return {"prune_step": self._prune_step} if self._duals else {}

    def load(self, read: Callable[[str], dict[str, torch.Tensor]], values: Mapping[str, Any]) -> None:
        prune_step = values.get("prune_step")
        if prune_step is None:
            return
        if not (is_count(prune_step) and 0 < prune_step < self.schedule.total):
            raise ValueError(f"its prune step is {prune_step!r}: there are {self.schedule.total}.")
        kept, duals, self._masks = read("kept"), read("dual"), self.pruner.new_masks()
        for name, shard in self._shards.items():
            if name not in kept or name not in duals:
                raise ValueError(f'the sparse point of "{name}" is missing.')
            self._masks.replace(name, (kept[name] != 0).to(shard.tensor.device))
            self._duals[name] = duals[name].to(shard.tensor.device)
        self._prune_step = prune_step
