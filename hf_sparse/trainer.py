"""SparseTrainer: Trainer, with pruning by its arguments, resume, logging and report."""

from __future__ import annotations

import inspect
from pathlib import Path

from transformers import Seq2SeqTrainer, Trainer

from .callback import SparsityCallback
from .checkpoints import CheckpointError, check_state, is_complete, last_complete_checkpoint
from .config import PruningConfig
from .pruner import Pruner


class SparseTrainerMixin:
    """Mix it into any Trainer: `class MyTrainer(SparseTrainerMixin, SomeTrainer)`. The signature stays that trainer's.

    What to prune is said by the arguments, when they are `SparseTrainingArguments`, or by a `SparsityCallback` among
    the callbacks. Without either, and with nothing to prune, it is the trainer it was, bit for bit.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sparsity = self._sparsity_callback()
        if self.sparsity is not None:
            self.sparsity.saves_on_event = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            cls.__signature__ = _signature_of_trainer(cls)

    def _sparsity_callback(self) -> SparsityCallback | None:
        """The user's callback, or one by the arguments, or None when there is nothing to prune."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SparsityCallback):
                return callback
        if not isinstance(self.args, PruningConfig) or not self.args.prunes:
            return None
        callback = SparsityCallback(self.args)
        callback.check(self.args, self.model)
        self.add_callback(callback)
        return callback

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trainer's `train`. `resume_from_checkpoint=True` takes the last checkpoint that was written to its end.

        Raises:
            CheckpointError: the checkpoint is incomplete, or its masks are missing, damaged, of other weights or of
                another pruning config: what is wrong is said before training starts.
        """
        if self.sparsity is not None:
            resume_from_checkpoint = self._find_checkpoint(resume_from_checkpoint)
            self.sparsity.resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"no complete checkpoint in {self.args.output_dir}: start without resume_from_checkpoint, or name one."
                )
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise CheckpointError(f"resume_from_checkpoint is {checkpoint}: there is no such folder.")
        if not is_complete(checkpoint):
            raise CheckpointError(f"{checkpoint} is incomplete: its saving was cut off. Resume from an earlier one.")
        if self.model is not None:
            check_state(checkpoint, Pruner(self.model, self.sparsity.config), cadence=None)
        return str(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's `save_model`, with the pruning files written first, so that an upload finds them."""
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.sparsity is not None and self.args.should_save:
            step = self.state.global_step
            is_checkpoint = directory.name == f"checkpoint-{step}"
            if is_checkpoint:
                # It marks a checkpoint as complete, and comes last. One from an earlier run must not vouch for this.
                (directory / "trainer_state.json").unlink(missing_ok=True)
            self.sparsity.write(directory, step if is_checkpoint else None)
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Trainer's `log`, with sparsity and target at each logging step, for every reporting integration."""
        if self.sparsity is not None:
            logs = {**logs, **self.sparsity.figures(logs, self.state)}
        super().log(logs, *args, **kwargs)


def _signature_of_trainer(cls: type) -> inspect.Signature:
    """The signature of the first class behind the mixin that spells out its own."""
    for base in cls.__mro__[1:]:
        if base is not SparseTrainerMixin and "__init__" in base.__dict__:
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            return inspect.Signature(parameters)
    return inspect.Signature()


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`transformers.Trainer` that prunes. Same signature: replacing the names of Trainer and TrainingArguments in a
    script is the whole migration.

    Example:
        >>> import inspect
        >>> inspect.signature(SparseTrainer) == inspect.signature(Trainer)
        True
    """


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that prunes."""
