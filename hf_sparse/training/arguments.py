"""SparseTrainingArguments: TrainingArguments with pruning options."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..config import PruningConfig, PruningConfigError
from ..config.base import PruningOptions


logger = logging.getLogger(__name__)


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

    shrink: bool = field(
        default=False,
        metadata={
            "help": "Save the final model without the neurons, heads and layers that were pruned: smaller and faster, "
            "with the same outputs. Checkpoints keep their size, so that runs can be resumed."
        },
    )
    heterogeneous: bool = field(
        default=False,
        metadata={
            "help": "With shrink: each layer gets a size of its own, which the config cannot express. The saved model "
            "then opens only after `import hf_sparse`."
        },
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "groups", "criterion_kwargs", "allocation_kwargs"]

    # Both parents have these methods. Those of TrainingArguments show every field and hide tokens.
    to_dict = TrainingArguments.to_dict
    __repr__ = TrainingArguments.__repr__

    def __post_init__(self) -> None:
        PruningConfig.__post_init__(self)
        if self.heterogeneous and not self.shrink:
            raise PruningConfigError(["heterogeneous needs shrink: set shrink=True, or leave heterogeneous out."])
        super(PruningOptions, self).__post_init__()

    def mark_as_read(self) -> None:
        """Notes that a trainer prunes by these arguments. Copies of them are unmarked."""
        self._read_object = id(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """`TrainingArguments.get_warmup_steps`. Any Trainer calls this right before training, to make the learning
        rate scheduler: the one public method by which the arguments can notice that nobody prunes."""
        if getattr(self, "_read_object", None) != id(self) and self.prunes and self.process_index == 0:
            what = "pruning" if self.target_sparsity is None else f"target_sparsity={self.target_sparsity}"
            logger.warning(
                "%s is set in the arguments, but this trainer was made without a callback that prunes, and trains a "
                "dense model unless one was added by add_callback. Use SparseTrainer instead of Trainer, or "
                "Trainer(..., callbacks=[SparsityCallback()]).",
                what,
            )
        return super().get_warmup_steps(num_training_steps)


@dataclass(repr=False)
class SparseSeq2SeqTrainingArguments(SparseTrainingArguments, Seq2SeqTrainingArguments):
    """`SparseTrainingArguments` with the fields of `Seq2SeqTrainingArguments`, for `SparseSeq2SeqTrainer`."""

    to_dict = Seq2SeqTrainingArguments.to_dict
