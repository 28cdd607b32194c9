"""The run of an algorithm, by its kind."""

from __future__ import annotations

from typing import Any

from ..algorithms import Algorithm, ConstrainedTraining, DynamicSparsity, LearnedMask
from ..engine.pruner import Pruner
from ..schedulers import PruningSchedule
from .algorithm_run import AlgorithmRun
from .constrained_run import ConstrainedRun
from .dynamic_run import DynamicRun
from .learned_masks.run import LearnedMaskRun


RUNS: dict[type[Algorithm], type[AlgorithmRun]] = {
    ConstrainedTraining: ConstrainedRun,
    DynamicSparsity: DynamicRun,
    LearnedMask: LearnedMaskRun,
}
"""Kinds of algorithms that need more than prune steps."""


def new_run(pruner: Pruner, schedule: PruningSchedule, optimizer: Any, seed: int) -> AlgorithmRun:
    """Returns the run of the algorithm that the options name.

    Args:
        pruner: of the model.
        schedule: the pruning schedule of the training.
        optimizer: of the training, as accelerate has wrapped it.
        seed: of the training.

    Raises:
        NotImplementedError: the run does not support how weights are split, or the optimizer.
    """
    algorithm = next((group.options.algorithm for group in pruner.groups if group.target), None)
    for kind, run in RUNS.items():
        if isinstance(algorithm, kind):
            return run(pruner, schedule, optimizer, seed)
    return AlgorithmRun(pruner, schedule, optimizer, seed)
