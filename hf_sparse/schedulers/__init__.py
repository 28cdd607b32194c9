"""When to prune and how much: the seed scheduler API, its curves, and the cadence of prune steps."""

from .curves import CURVES, register_curve
from .schedule import PruningSchedule
from .scheduler import SCHEDULERS, IterativeScheduler, OneshotScheduler, Scheduler, get_scheduler, register_scheduler


__all__ = [
    "CURVES",
    "SCHEDULERS",
    "PruningSchedule",
    "IterativeScheduler",
    "OneshotScheduler",
    "Scheduler",
    "get_scheduler",
    "register_curve",
    "register_scheduler",
]
