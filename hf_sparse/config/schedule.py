"""Options of when to prune, which only training has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..algorithms import DEFAULT_ALGORITHM, Algorithm
from ..schedulers import SCHEDULERS
from .base import FLAG, mappings, option


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


def unused_schedule_options(values: Mapping[str, Any]) -> list[str]:
    """Returns those of `prune_end` and `prune_every` that have no effect: with one prune step, or where the first one
    reaches the target and gradual pruning changes nothing later. Rewinding and penalties depend on the last one.

    Args:
        values: the options of a config, or of a file.

    Example:
        >>> unused_schedule_options({"scheduler": "oneshot"})
        ['prune_end', 'prune_every']
        >>> unused_schedule_options({"prune_start": 0.5, "prune_end": 0.5, "scheduler": "iterative"})
        ['prune_every']
        >>> unused_schedule_options({"scheduler": "oneshot", "algorithm": "rigl"})
        []
    """
    if _value(values, "prune_start") == _value(values, "prune_end"):
        return ["prune_every"]
    groups = mappings(values.get("groups"))
    later = [values.get("rewind"), *(options.get("penalty") for options in (values, *groups))]
    at_once = all(reaches_target_at_once({**values, **group}) for group in groups or [{}])
    return ["prune_end", "prune_every"] if at_once and not any(option is not None for option in later) else []


def reaches_target_at_once(options: Mapping[str, Any]) -> bool:
    """Whether gradual pruning of a group with these options reaches the target in its first prune step.

    Example:
        >>> reaches_target_at_once({"scheduler": "oneshot"}), reaches_target_at_once({"scheduler": "iterative"})
        (True, False)
    """
    if _value(options, "algorithm") != DEFAULT_ALGORITHM:
        return False
    scheduler = options.get("scheduler")
    at_once = isinstance(scheduler, str) and scheduler in SCHEDULERS and SCHEDULERS[scheduler].reaches_target_at_once
    return at_once or _value(options, "prune_start") == _value(options, "prune_end")


def drop_unused_schedule_options(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a file of an earlier version, which had such options, without them."""
    unused = unused_schedule_options(values)
    dropped = {"prune_every": ScheduleOptions.schedule_defaults["prune_every"]} if "prune_every" in unused else {}
    return values | dropped | ({"prune_end": _value(values, "prune_start")} if "prune_end" in unused else {})


def _value(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    return ScheduleOptions.schedule_defaults[name] if value is None else value
