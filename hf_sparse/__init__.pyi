# The public names and where they come from: type checkers read this, and __init__.py does.
from .config.pruning import PruningConfig, PruningConfigError
from .criteria import Criterion, GradientCriterion, register_criterion
from .engine.pruner import Pruner
from .hub.upload import UploadError
from .integrations.merge_report import MergeReport
from .integrations.peft import merge_and_unload, merged_adapter
from .oneshot import OneshotConfig, ResumeError, calibration_batches, evaluate_model, plan_oneshot, prune_oneshot
from .patterns import register_pattern
from .reporting.report import SparsityReport
from .schedulers import (
    IterativeScheduler,
    OneshotScheduler,
    Scheduler,
    get_scheduler,
    register_curve,
    register_scheduler,
)
from .training.arguments import SparseSeq2SeqTrainingArguments, SparseTrainingArguments
from .training.callback import SparsityCallback
from .training.state_files import CheckpointError
from .training.trainer import SparseSeq2SeqTrainer, SparseTrainer, SparseTrainerMixin

__version__: str

__all__ = [
    "CheckpointError",
    "Criterion",
    "GradientCriterion",
    "IterativeScheduler",
    "MergeReport",
    "OneshotConfig",
    "OneshotScheduler",
    "Pruner",
    "PruningConfig",
    "PruningConfigError",
    "ResumeError",
    "Scheduler",
    "SparseSeq2SeqTrainer",
    "SparseSeq2SeqTrainingArguments",
    "SparseTrainer",
    "SparseTrainerMixin",
    "SparseTrainingArguments",
    "SparsityCallback",
    "SparsityReport",
    "UploadError",
    "calibration_batches",
    "evaluate_model",
    "get_scheduler",
    "merge_and_unload",
    "merged_adapter",
    "plan_oneshot",
    "prune_oneshot",
    "register_criterion",
    "register_curve",
    "register_pattern",
    "register_scheduler",
]
