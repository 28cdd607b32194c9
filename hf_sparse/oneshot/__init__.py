"""One-shot pruning: from calibration data, without training, block by block."""

from .config import OneshotConfig
from .run import prune_oneshot
from .state import ResumeError


__all__ = ["OneshotConfig", "ResumeError", "prune_oneshot"]
