"""One-shot pruning: from calibration data, without training, block by block."""

from ..calibration.text_batches import calibration_batches
from ..config import OneshotConfig
from ..evaluation import evaluate_model
from .arguments import OneshotArguments
from .plan import OneshotPlan, plan_oneshot
from .prune import prune_oneshot
from .resume import ResumeError
from .run import run_oneshot


__all__ = [
    "OneshotConfig",
    "OneshotArguments",
    "OneshotPlan",
    "ResumeError",
    "calibration_batches",
    "evaluate_model",
    "plan_oneshot",
    "prune_oneshot",
    "run_oneshot",
]
