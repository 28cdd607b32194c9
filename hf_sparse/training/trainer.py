"""SparseTrainer: Trainer, with pruning by its arguments, resume, logging and report."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path

from transformers import Seq2SeqTrainer, Trainer

from ..config import PruningConfig
from ..distributed import get_communicator
from ..hub.upload import UploadError, hide_token
from .callback import SparsityCallback
from .checkpoints import find_checkpoint_error, last_complete_checkpoint, processes_of, start_checkpoint
from .model_card import write_trainer_card
from .state_files import CheckpointError, check_state
from .uploads import UploadMixin


logger = logging.getLogger(__name__)


class SparseTrainerMixin(UploadMixin):
    """Mix it into any Trainer: `class MyTrainer(SparseTrainerMixin, SomeTrainer)`. The signature stays that trainer's.

    What to prune is said by the arguments, when they are `SparseTrainingArguments`, or by a `SparsityCallback` among
    the callbacks. Without either, and with nothing to prune, it is the trainer it was, bit for bit.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        hide_token(self.args)
        self.sparsity = self._sparsity_callback()
        self.dense_metrics: dict[str, float] = {}
        """Measurements of the dense model, for the model card to compare with: what its `evaluate` returned."""
        self.saved_metrics: dict[str, float] = {}
        if self.sparsity is not None:
            self.sparsity.alone = False
            self._check_export()
            self._check_split()

    def _check_split(self) -> None:
        """Say so where weights will not be split though that was asked for: accelerate does not, on CPU for one."""
        runs = self.accelerator.distributed_type.value
        for name, option in {"FSDP": self.args.fsdp, "DEEPSPEED": self.args.deepspeed}.items():
            launched = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")
            if (option or launched) and runs.startswith("MULTI_") and self.is_local_process_zero():
                logger.warning(
                    "%s was asked for, but accelerate runs %s: DDP, with the whole model in each of %d processes. "
                    "That is what it does, without a word, where it finds no accelerator, as on CPU.",
                    name,
                    runs,
                    self.args.world_size,
                )

    def _check_export(self) -> None:
        """See that the weights can be saved in the end."""
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config if self.is_deepspeed_enabled else None
        option = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if config is not None and config.is_zero3() and not config.get_value(option):
            raise ValueError(
                f"DeepSpeed ZeRO-3 saves no weights that from_pretrained opens while {option} is "
                f"{config.get_value(option)}: set it to true."
            )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            cls.__signature__ = _signature_of_trainer(cls)

    def _sparsity_callback(self) -> SparsityCallback | None:
        """The user's callback, or one by the arguments, or None when there is nothing to prune."""
        given = [callback for callback in self.callback_handler.callbacks if isinstance(callback, SparsityCallback)]
        by_arguments = isinstance(self.args, PruningConfig) and self.args.prunes
        if len(given) > 1 or (given and by_arguments and given[0].config is not self.args):
            raise ValueError("what to prune is said twice: by one SparsityCallback, or by the arguments, not by both.")
        if given:
            return given[0] if given[0].config.prunes else None
        if not by_arguments:
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
        self.saved_metrics = {}
        if self.sparsity is not None:
            resume_from_checkpoint = self._find_checkpoint(resume_from_checkpoint)
            self.sparsity.resume_from = resume_from_checkpoint
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.sparsity is not None:
            self.sparsity.write_figures(self.args, self.state)
        self.finish_pushes()
        return result

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if not resume_from_checkpoint:
            return None
        weights_only = self.args.save_only_model
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, weights_only)
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"no complete checkpoint in {self.args.output_dir}: start without resume_from_checkpoint, or "
                    "name one."
                )
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise CheckpointError(f"resume_from_checkpoint is {checkpoint}: there is no such folder.")
        error_text = find_checkpoint_error(checkpoint, weights_only)
        if error_text:
            raise CheckpointError(f"{checkpoint} is incomplete: {error_text} Resume from another one.")
        if self.is_deepspeed_enabled and processes_of(checkpoint) not in (None, self.args.world_size):
            raise CheckpointError(
                f"{checkpoint} was written by {processes_of(checkpoint)} processes, and DeepSpeed resumes with as "
                f"many only, not with {self.args.world_size}: start so many, or start a new run from its weights "
                "with keep_zeros=True."
            )
        if weights_only:
            logger.warning("save_only_model is set: %s is resumed without its optimizer, not exactly.", checkpoint)
        check_state(checkpoint, self.model, self.sparsity.config, schedule=None)
        return str(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's `save_model`, with the pruning files written first, so that an upload finds them.

        With `push_to_hub=True` Trainer uploads what it saved. Where that fails the model is saved all the same: the
        log says why, with the remedy, and the run goes on.
        """
        if self.sparsity is not None:
            directory = Path(output_dir if output_dir is not None else self.args.output_dir)
            step = self.state.global_step
            is_checkpoint = _internal_call and output_dir is not None and directory.name == f"checkpoint-{step}"
            self.sparsity.release_best(self.state)
            if is_checkpoint and self.args.should_save:
                start_checkpoint(directory)
            self.sparsity.write(directory, self.args.should_save, step if is_checkpoint else None)
            if self.is_fsdp_enabled and not is_checkpoint and not self._gathers_weights():
                # Trainer leaves the shards where they are, and so nothing that from_pretrained could open.
                self._save(str(directory), state_dict=self.accelerator.get_state_dict(self.model))
        try:
            super().save_model(output_dir, _internal_call)
        except UploadError as error:
            logger.error("%s", error)

    def _gathers_weights(self) -> bool:
        """Whether Trainer saves whole weights under FSDP."""
        return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's. The first process goes on, to write `trainer_state.json` and to delete older checkpoints, only
        when all have written theirs: a checkpoint that looks complete is."""
        super()._save_rng_state(output_dir)
        get_communicator().any(False)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Trainer's `evaluate`. During training, a metric from before the final sparsity never becomes the best."""
        metrics = super().evaluate(*args, **kwargs)
        if self.sparsity is not None and self.is_in_train:
            # Not before: until here, callbacks such as early stopping compare with the best metric too.
            self.sparsity.hold_best(self.args, self.state)
        return metrics

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Trainer's `save_metrics`. The model card shows what is saved of evaluation and test."""
        self.saved_metrics |= metrics
        super().save_metrics(split, metrics, combined)

    def create_model_card(self, *args, **kwargs) -> None:
        """Trainer's `create_model_card`, with a section on sparsity: what was pruned, how, out of what, what it cost.

        Only that section is written anew next time: what a person changed elsewhere stays.
        """
        if self.sparsity is None or self.sparsity.pruner is None or not self.is_world_process_zero():
            super().create_model_card(*args, **kwargs)
        else:
            write_trainer_card(self, super().create_model_card, args, kwargs)

    create_model_card.__signature__ = inspect.signature(Trainer.create_model_card)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Trainer's `log`, with sparsity and target at each logging step, for every reporting integration."""
        if self.sparsity is not None:
            logs.update(self.sparsity.figures(logs, self.state))
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
