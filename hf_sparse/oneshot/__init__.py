"""One-shot pruning: from calibration data, without training, block by block."""

from .calibration import calibration_batches
from .config import OneshotConfig
from .evaluation import evaluate_model
from .job import run_job
from .job_options import OneshotJob
from .plan import OneshotPlan, plan_oneshot
from .run import prune_oneshot
from .state import ResumeError


__all__ = [
    "OneshotConfig",
    "OneshotJob",
    "OneshotPlan",
    "ResumeError",
    "calibration_batches",
    "evaluate_model",
    "plan_oneshot",
    "prune_oneshot",
    "run_job",
]
