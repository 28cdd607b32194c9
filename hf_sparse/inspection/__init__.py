"""Checkpoints read from their safetensors files, part by part and without building the model.

`files` finds them, `checkpoint` reads their headers, `layouts` says what a tensor is likely to be, `tiles` reads
values in bounded parts, `structure` sees what zeros have in common; `contents` and `compare` put it together.
"""

from .compare import Comparison, compare_checkpoints
from .contents import CheckpointContents, inspect_checkpoint
from .expectations import unmet_expectations
from .files import InspectionError


__all__ = [
    "CheckpointContents",
    "Comparison",
    "InspectionError",
    "compare_checkpoints",
    "inspect_checkpoint",
    "unmet_expectations",
]
