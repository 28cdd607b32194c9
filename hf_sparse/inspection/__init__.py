"""Inspection of checkpoints from their safetensors files, without building the model.

`weight_files` finds the files, `checkpoint` reads their headers, `roles` guesses what each tensor is, `tiles` reads
values in parts of bounded size, `counting` counts zeros, `structure` detects their patterns, `contents` is the result,
`verification` checks it; `compare` compares two checkpoints.
"""

from .compare import CheckpointComparison, compare_checkpoints
from .contents import CheckpointContents
from .counting import inspect_checkpoint
from .verification import unmet_expectations
from .weight_files import InspectionError


__all__ = [
    "CheckpointComparison",
    "CheckpointContents",
    "InspectionError",
    "compare_checkpoints",
    "inspect_checkpoint",
    "unmet_expectations",
]
