"""Options of when to prune, which only training has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..algorithms import DEFAULT_ALGORITHM, Algorithm
from .base import FLAG, option


@dataclass
class ScheduleOptions:
    """When to prune: the schedule of prune steps, and how the sparsity increases over them."""

    algorithm: Algorithm | str | None = option(
        "Pruning algorithm, how training finds the zeros: gradual (the default: prune steps by the criterion), granet "
        "(gradual, with regrowth by gradients), set or rigl (sparse from the start; prune steps exchange weights), "
        "acdc (alternating sparse and dense phases), elsa (weights are drawn to a sparse point that each prune step "
        "selects anew), movement or soft_movement (learned scores, also of pruned weights), sr_ste (magnitude; pruned "
        "weights are trained on), gumbel_nm or gumbel_sigmoid (the mask is learned on a frozen model, of N:M groups "
        "or of single weights), or a registered one."
    )
    algorithm_kwargs: dict[str, Any] | str | None = option(
        'Options of the algorithm, as JSON: {"fraction": 0.3} for rigl, {"strength": 0.1} for elsa.'
    )
    scheduler: str | None = option(
        "Sparsity scheduler: oneshot, iterative, or a registered one. Default: oneshot if prune_start equals "
        "prune_end, else iterative."
    )
    sparsity_decay_type: str | None = option(
        "Curve of the iterative scheduler from initial_sparsity to the target: cubic (the default), linear, exp, cos, "
        "cube."
    )
    prune_start: float | None = option(
        "First prune step: an optimizer step, or a fraction of training if below 1. Default: 0, the first step."
    )
    prune_end: float | None = option(
        "Last prune step, at which the target is reached: an optimizer step, or a fraction of training if below 1. "
        "Default: 0.7."
    )
    prune_every: float | None = option(
        "Interval between prune steps: optimizer steps, or a fraction of training if below 1. Default: 0.01."
    )
    initial_sparsity: float | None = option(
        "Sparsity at which the curve starts, from 0 (the default) to target_sparsity."
    )

    rewind: float | None = option(
        "Rewinding: after the last prune step, training restarts with the final mask from the weights and the "
        "learning rate of this optimizer step, or fraction of training if below 1 (0: from the start). The learning "
        "rate then follows its schedule from there over the remaining steps. Default: no rewinding."
    )
    rewind_weights: bool | None = option(
        "With rewind: whether the weights are restored (the default), or only the learning rate.", **FLAG
    )

    schedule_defaults: ClassVar[dict[str, object]] = {
        "algorithm": DEFAULT_ALGORITHM,
        "sparsity_decay_type": "cubic",
        "prune_start": 0.0,
        "prune_end": 0.7,
        "prune_every": 0.01,
        "initial_sparsity": 0.0,
        "rewind_weights": True,
    }
