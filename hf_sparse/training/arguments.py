"""SparseTrainingArguments: TrainingArguments with pruning options."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..config import PruningConfig, PruningConfigError
from ..config.base import PruningOptions
from ..files import parse_json
from ..registry import format_value
from .tuning import TUNINGS, Tuning


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
            "help": "Save the final model without the pruned neurons, heads and layers: smaller and faster, with the "
            "same outputs. Checkpoints keep their size, so that runs can be resumed."
        },
    )
    heterogeneous: bool = field(
        default=False,
        metadata={
            "help": "With shrink: give each layer a size of its own, which the config cannot express. The saved model "
            "then opens only after `import hf_sparse`."
        },
    )

    tune: Tuning | str | None = field(
        default=None,
        metadata={
            "help": "Train only part of the parameters of an already pruned model, with keep_zeros: norms, biases, "
            "masked_lora (low-rank updates of the selected weights that keep their zeros), or a registered one. "
            "Default: all parameters are trained."
        },
    )
    tune_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Options of tune, as JSON: {"rank": 16, "alpha": 32} for masked_lora.'},
    )

    # Both parents have these methods. Those of TrainingArguments show every field and hide tokens.
    to_dict = TrainingArguments.to_dict
    __repr__ = TrainingArguments.__repr__

    def __post_init__(self) -> None:
        PruningConfig.__post_init__(self)
        if errors := self._read_tune():
            raise PruningConfigError(errors)
        if self.heterogeneous and not self.shrink:
            raise PruningConfigError(
                [("`heterogeneous` needs `shrink`: set `shrink=True`, or leave `heterogeneous` out.")]
            )
        super(PruningOptions, self).__post_init__()

    def _read_tune(self) -> list[str]:
        """Replaces an instance by its name and options, and parses options that are text. Returns the errors."""
        if isinstance(self.tune, Tuning):
            if self.tune_kwargs:
                return ["`tune` is an instance with its own options: leave `tune_kwargs` out."]
            try:
                self.tune, self.tune_kwargs = TUNINGS.name_and_options(self.tune)
            except ValueError as error:
                return [f"`tune`: {error}"]
        if isinstance(self.tune_kwargs, str):
            try:
                self.tune_kwargs = parse_json(self.tune_kwargs)
            except ValueError as error:
                return [f"`tune_kwargs` is {format_value(self.tune_kwargs)}: it must be a JSON object ({error})."]
        if self.tune_kwargs is not None and not isinstance(self.tune_kwargs, dict):
            return [f"`tune_kwargs` is {format_value(self.tune_kwargs)}: it must be a mapping."]
        self.tune_kwargs = self.tune_kwargs or None
        if self.tune is None:
            return ['`tune_kwargs` needs `tune`: name one, as in `tune="masked_lora"`.'] if self.tune_kwargs else []
        try:
            self.tuning()
        except ValueError as error:
            return [f"{error}"]
        return []

    def tuning(self) -> Tuning | None:
        """Returns the tuning that `tune` names, with its options; None if all parameters are trained.

        Raises:
            ValueError: the name or an option is unknown or invalid.
        """
        if self.tune is None:
            return None
        if self.tune not in TUNINGS:
            raise ValueError(f"`tune` is {TUNINGS.describe(self.tune)}")
        return TUNINGS.create(cast(str, self.tune), cast(dict[str, Any] | None, self.tune_kwargs))

    def mark_as_read(self) -> None:
        """Notes that a trainer prunes by these arguments. Copies of them are unmarked."""
        self._read_object = id(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """`TrainingArguments.get_warmup_steps`. Any Trainer calls this right before training, to make the learning
        rate scheduler: the one public method by which the arguments can notice that nobody prunes."""
        unread = getattr(self, "_read_object", None) != id(self) and self.process_index == 0
        if unread and self.distills:
            logger.warning(
                "`distill_teacher` is set in the arguments, but this trainer runs no teacher: use SparseTrainer "
                "instead of Trainer."
            )
        if unread and self.prunes:
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
