"""Schedulers and curves (how sparse after each prune step) and the pruning schedule (at which optimizer steps)."""

from .curves import CURVES, Curve, register_curve
from .schedule import PruningSchedule
from .scheduler import SCHEDULERS, IterativeScheduler, OneshotScheduler, Scheduler, get_scheduler, register_scheduler


__all__ = [
    "CURVES",
    "Curve",
    "SCHEDULERS",
    "PruningSchedule",
    "IterativeScheduler",
    "OneshotScheduler",
    "Scheduler",
    "get_scheduler",
    "register_curve",
    "register_scheduler",
]
