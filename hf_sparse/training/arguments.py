"""SparseTrainingArguments: TrainingArguments with pruning options."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..config import PruningConfig
from ..config.base import PruningOptions


@dataclass(repr=False)
class SparseTrainingArguments(PruningConfig, TrainingArguments):
    """`TrainingArguments` with the options of `PruningConfig` as further fields. No default of either is changed.

    Can be made in Python or by `HfArgumentParser` (command line, JSON, YAML), and written to JSON and read back.

    Raises:
        PruningConfigError: with every error in the pruning options.

    Example:
        >>> args = SparseTrainingArguments("out", target_sparsity=0.8, use_cpu=True)
        >>> args.target_sparsity, args.learning_rate
        (0.8, 5e-05)
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "groups", "criterion_kwargs", "allocation_kwargs"]

    # Both parents have these methods. Those of TrainingArguments show every field and hide tokens.
    to_dict = TrainingArguments.to_dict
    __repr__ = TrainingArguments.__repr__

    def __post_init__(self) -> None:
        PruningConfig.__post_init__(self)
        super(PruningOptions, self).__post_init__()


@dataclass(repr=False)
class SparseSeq2SeqTrainingArguments(SparseTrainingArguments, Seq2SeqTrainingArguments):
    """`SparseTrainingArguments` with the fields of `Seq2SeqTrainingArguments`, for `SparseSeq2SeqTrainer`."""

    to_dict = Seq2SeqTrainingArguments.to_dict
