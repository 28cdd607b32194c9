"""Inspection of checkpoints from their safetensors files, without building the model.

`weight_files` finds the files, `checkpoint` reads their headers, `roles` guesses what each tensor is, `tiles` reads
values in parts of bounded size, `counting` counts zeros, `structure` detects their patterns, `contents` is the result,
`verification` checks it; `compare` compares two checkpoints, `card_metrics` reads the metrics of their cards.
"""

from .compare import CheckpointComparison, CheckpointTotals, compare_checkpoints
from .contents import CheckpointContents
from .counting import inspect_checkpoint
from .verification import unmet_expectations
from .weight_files import InspectionError


__all__ = [
    "CheckpointComparison",
    "CheckpointContents",
    "CheckpointTotals",
    "InspectionError",
    "compare_checkpoints",
    "inspect_checkpoint",
    "unmet_expectations",
]
