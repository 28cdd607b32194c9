"""When to prune and how much: the seed scheduler API, its curves, and the cadence of prune steps."""

from .cadence import Cadence
from .curves import CURVES, register_curve
from .scheduler import (
    SCHEDULERS,
    IterativeScheduler,
    OneshotScheduler,
    Scheduler,
    get_scheduler,
    register_scheduler,
)


__all__ = [
    "CURVES",
    "SCHEDULERS",
    "Cadence",
    "IterativeScheduler",
    "OneshotScheduler",
    "Scheduler",
    "get_scheduler",
    "register_curve",
    "register_scheduler",
]
