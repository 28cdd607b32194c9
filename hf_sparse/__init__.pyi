# The public names and where they come from: type checkers read this, and __init__.py does.
from .algorithms import Algorithm, ConstrainedTraining, DynamicSparsity, LearnedMask, register_algorithm
from .allocations import Allocation, DenseLayer, MeasuringAllocation, register_allocation
from .calibration.masking import mask_tokens
from .calibration.text_batches import evaluation_batches
from .config import OneshotConfig, PruningConfig, PruningConfigError
from .criteria import Criterion, GradientCriterion, GradientHistoryCriterion, register_criterion
from .engine.pruner import Pruner
from .evaluation import reference_outputs
from .export.semi_structured import accelerate_2of4
from .hub.shrinking import shrink_checkpoint
from .hub.upload import UploadError
from .inspection import compare_checkpoints, inspect_checkpoint
from .integrations.merge_report import MergeReport
from .integrations.peft import merge_and_unload, merged_adapter
from .oneshot import ResumeError, calibration_batches, evaluate_model, plan_oneshot, prune_oneshot
from .patterns import Pattern, register_pattern
from .penalties import Penalty, register_penalty
from .plugins import load_plugin
from .reporting.report import SparsityReport
from .requires import Requires
from .schedulers import (
    Curve,
    IterativeScheduler,
    OneshotScheduler,
    Scheduler,
    get_scheduler,
    register_curve,
    register_scheduler,
)
from .solvers import Solver, register_solver
from .structured.obstacles import shrink_obstacle
from .structured.plan import ShrinkPlan
from .structured.reduction import ShrinkError
from .structured.saving import save_shrunk
from .structured.shrink import plan_shrink, shrink
from .training.arguments import SparseSeq2SeqTrainingArguments, SparseTrainingArguments
from .training.callback import SparsityCallback
from .training.resume import CheckpointError
from .training.trainer import SparseSeq2SeqTrainer, SparseTrainer, SparseTrainerMixin
from .training.tuning import Tuning, register_tune

__version__: str

__all__ = [
    "Algorithm",
    "Allocation",
    "CheckpointError",
    "ConstrainedTraining",
    "Criterion",
    "Curve",
    "DenseLayer",
    "DynamicSparsity",
    "GradientCriterion",
    "GradientHistoryCriterion",
    "IterativeScheduler",
    "LearnedMask",
    "MeasuringAllocation",
    "MergeReport",
    "OneshotConfig",
    "OneshotScheduler",
    "Pattern",
    "Penalty",
    "Pruner",
    "PruningConfig",
    "PruningConfigError",
    "Requires",
    "ResumeError",
    "Scheduler",
    "ShrinkError",
    "ShrinkPlan",
    "Solver",
    "SparseSeq2SeqTrainer",
    "SparseSeq2SeqTrainingArguments",
    "SparseTrainer",
    "SparseTrainerMixin",
    "SparseTrainingArguments",
    "SparsityCallback",
    "SparsityReport",
    "Tuning",
    "UploadError",
    "accelerate_2of4",
    "calibration_batches",
    "compare_checkpoints",
    "evaluate_model",
    "evaluation_batches",
    "get_scheduler",
    "inspect_checkpoint",
    "load_plugin",
    "mask_tokens",
    "merge_and_unload",
    "merged_adapter",
    "plan_oneshot",
    "plan_shrink",
    "prune_oneshot",
    "reference_outputs",
    "register_algorithm",
    "register_allocation",
    "register_criterion",
    "register_curve",
    "register_pattern",
    "register_penalty",
    "register_scheduler",
    "register_solver",
    "register_tune",
    "save_shrunk",
    "shrink",
    "shrink_checkpoint",
    "shrink_obstacle",
]
