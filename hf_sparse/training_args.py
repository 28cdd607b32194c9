"""SparseTrainingArguments: TrainingArguments with the options of pruning."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from .config import PruningConfig


@dataclass
class SparseTrainingArguments(PruningConfig, TrainingArguments):
    """Every field of `TrainingArguments` and of `PruningConfig`; no default of either is changed.

    For Python, `HfArgumentParser` (command line, JSON, YAML) and JSON round trips.

    Raises:
        PruningConfigError: with every fault of the pruning options.

    Example:
        >>> args = SparseTrainingArguments("out", target_sparsity=0.8, use_cpu=True)
        >>> args.target_sparsity, args.learning_rate
        (0.8, 5e-05)
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "groups"]

    def __post_init__(self):
        PruningConfig.__post_init__(self)
        TrainingArguments.__post_init__(self)
