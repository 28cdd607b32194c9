"""SparseTrainer: a Trainer that prunes as its arguments say, resumes exactly, and logs and reports sparsity."""

from __future__ import annotations

import inspect
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import TrainOutput

from ..config import PruningConfig
from ..distributed import get_communicator, raise_on_all_ranks
from ..engine.resolve import resolve_layers
from ..files import SHRINK_FILE
from ..hub.upload import UploadError, hide_token
from .best_metric import unblock_best_metric
from .callback import GIVEN_TWICE, SparsityCallback
from .checkpoint_search import find_checkpoint_error, newest_complete_checkpoint, read_step
from .distillation.mixin import DistillationMixin
from .model_card import card_signature, split_metadata, write_trainer_card
from .resume import CheckpointError, ResumeState
from .rewinding_mixin import RewindingMixin
from .run_trackers import RunTrackers
from .shrinking import ShrinkMixin, check_shrink
from .state_files import start_checkpoint
from .tuning_mixin import TuningMixin
from .uploads import HubUploadMixin
from .whole_weights import saving_whole_weights


logger = logging.getLogger(__name__)


class SparseTrainerMixin(RewindingMixin, ShrinkMixin, TuningMixin, DistillationMixin, HubUploadMixin):
    """Adds pruning to any Trainer: `class MyTrainer(SparseTrainerMixin, SomeTrainer)`. It keeps that trainer's
    signature.

    What to prune is given by the arguments, if they are `SparseTrainingArguments`, or by a `SparsityCallback` among
    the callbacks. Without either, or with nothing to prune, the trainer behaves as without the mixin, bit for bit.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        hide_token(self.args)
        self._has_given_scheduler = self.lr_scheduler is not None
        self._has_given_optimizer = self.optimizer is not None or self.lr_scheduler is not None
        self._callback_of_arguments: SparsityCallback | None = None
        self._is_set_up = False
        self._has_awaited_ranks = True
        self.sparsity_callback: SparsityCallback | None = None
        """The callback that prunes, if there are pruning options. With nothing to prune it does nothing."""
        self.dense_metrics: dict[str, float] = {}
        """Metrics of the dense model, as `evaluate` returned them, for the comparison in the model card."""
        self.saved_metrics: dict[str, float] = {}
        """What `save_metrics` was given since training began."""
        self.resumed_from: str | None = None
        """The checkpoint that the latest `train` was resumed from."""
        self._trackers = RunTrackers(())
        self._set_up_pruning()

    @property
    def _prunes(self) -> bool:
        return self.sparsity_callback is not None and self.sparsity_callback.prunes

    @property
    def _shrinks_by_default(self) -> bool:
        return getattr(self.args, "shrink", False)

    def _set_up_pruning(self) -> None:
        """Finds the callback that prunes, and checks what it needs once there is something to prune: callbacks and
        arguments may change until training begins."""
        self.sparsity_callback = self._get_sparsity_callback()
        if self._prunes and not self._is_set_up:
            self._check_deepspeed_export()
            self._warn_if_not_sharded()
            if self._shrinks_by_default:
                config = cast(PruningConfig, cast(SparsityCallback, self.sparsity_callback).config)
                check_shrink(cast(nn.Module, self.model), config, getattr(self.args, "heterogeneous", False))
            self._check_tuning()
            self._check_rewinding()
            self._is_set_up = True

    def _warn_if_not_sharded(self) -> None:
        """Warns if FSDP or DeepSpeed was requested but accelerate runs DDP, as it does on CPU."""
        runs = self.accelerator.distributed_type.value
        for name, option in {"FSDP": self.args.fsdp, "DEEPSPEED": self.args.deepspeed}.items():
            launched = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")
            if (option or launched) and runs.startswith("MULTI_") and self.is_local_process_zero():
                logger.warning(
                    f"{name} was requested, but accelerate runs {runs}: DDP, with the whole model on each of "
                    f"{self.args.world_size} ranks. It does so without an accelerator, as on CPU."
                )

    def _check_deepspeed_export(self) -> None:
        """Checks before training that DeepSpeed will save weights that `from_pretrained` can open."""
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config if self.is_deepspeed_enabled else None
        option = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if config is not None and config.is_zero3() and not config.get_value(option):
            raise ValueError(
                f"DeepSpeed ZeRO-3 saves no weights that from_pretrained can open while {option} is "
                f"{config.get_value(option)}: set it to true."
            )

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            setattr(cls, "__signature__", _signature_of_trainer(cls))

    def _get_sparsity_callback(self) -> SparsityCallback | None:
        """Returns the user's callback, or one made from the arguments; None if neither gives pruning options."""
        own = self._callback_of_arguments
        given = [callback for callback in self.callback_handler.callbacks if isinstance(callback, SparsityCallback)]
        given = [callback for callback in given if callback is not own]
        if len(given) > 1:
            raise ValueError(f"{GIVEN_TWICE}: there are {len(given)} SparsityCallbacks. Keep one of them.")
        if own is not None and (given or own not in self.callback_handler.callbacks):
            self.remove_callback(own)
            self._callback_of_arguments = own = None
        callback = given[0] if given else own
        if callback is None and isinstance(self.args, PruningConfig):
            callback = self._callback_of_arguments = SparsityCallback()
            callback.check(self.args, self.model)
            self.add_callback(callback)
        elif callback is not None:
            callback.check(self.args, None)
        if callback is not None:
            callback.owns_saving = False
        return callback

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's `train`. `resume_from_checkpoint=True` takes the newest checkpoint that was written completely.

        Raises:
            CheckpointError: the checkpoint is incomplete, or its masks are missing, damaged, of other weights or of
                another pruning config. This is found before training starts.
        """
        self.saved_metrics, self.is_output_shrunk = {}, False
        self._set_up_pruning()
        if self._shrinks_by_default and not self._prunes:
            raise ValueError(
                '`shrink` is set, but nothing is pruned: add `pattern="neuron"` and `target_sparsity=0.5`.'
            )
        self._check_tuning()
        self._check_rewinding()
        self._trackers = RunTrackers(self.callback_handler.callbacks)
        callback = self.sparsity_callback
        if callback is not None and callback.prunes:
            state = self._open_checkpoint(callback, resume_from_checkpoint) if resume_from_checkpoint else None
            resume_from_checkpoint = self.resumed_from = None if state is None else str(state.checkpoint)
            callback.resume_state = state
        try:
            with self._distilling(resume_from_checkpoint), self._tuning(), self._watching_uploads():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if callback is not None:
                callback.resume_state = None
        if callback is not None:
            callback.finish(self.args, self.state)
            if callback.pruner is not None:
                self._trackers.add_figures(str(self.args.output_dir), self.state.global_step)
        if not self._has_awaited_ranks and get_communicator().world_size > 1:
            logger.warning(
                "This version of transformers does not call _save_rng_state: a checkpoint may count as complete while "
                "a rank still writes its files. If a run is killed, resume from the checkpoint before the last."
            )
        self.finish_pushes()
        return result

    def _open_checkpoint(self, callback: SparsityCallback, resume_from_checkpoint: str | bool) -> ResumeState:
        """Returns the state of the checkpoint to resume from, which is complete and fits the run."""
        weights_only = self.args.save_only_model
        with raise_on_all_ranks(CheckpointError):
            if resume_from_checkpoint is True:
                state = newest_complete_checkpoint(str(self.args.output_dir), weights_only)
            else:
                state = ResumeState(str(resume_from_checkpoint))
                if not state.checkpoint.is_dir():
                    raise CheckpointError(f"`resume_from_checkpoint` is {state.checkpoint}: there is no such folder.")
                error_text = find_checkpoint_error(state, weights_only)
                if error_text:
                    raise CheckpointError(f"{state.checkpoint} is incomplete: {error_text} Resume from another one.")
            if self.is_deepspeed_enabled and state.world_size not in (None, self.args.world_size):
                raise CheckpointError(
                    f"{state.checkpoint} was written by {state.world_size} processes, and DeepSpeed can only resume "
                    f"with the same number, not with {self.args.world_size}: start {state.world_size} processes, or "
                    "start a new run from its weights with `keep_zeros=True`."
                )
            if weights_only:
                text = "`save_only_model` is set: %s has no optimizer state, so the run is not resumed exactly."
                logger.warning(text, state.checkpoint)
            config = state.with_its_defaults(callback.check(self.args, None))
            groups, _ = resolve_layers(cast(nn.Module, self.model), config)
            state.validate(groups, config, step=read_step(state.checkpoint), tuning=callback.tuning)
        return state

    def save_model(
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,
        shrink: bool | None = None,
        heterogeneous: bool | None = None,
    ) -> None:
        """Trainer's `save_model`, with the pruning files written first, so that an upload includes them.

        With `push_to_hub=True` Trainer uploads what it saved. If that fails, the model is saved nevertheless, the log
        has the reason and the remedy, and the run continues.

        Args:
            output_dir: folder to write. None for that of the arguments.
            shrink: whether to write a smaller model, without the neurons, heads and layers that are zero. The model of
                the trainer stays as it is. None: as the arguments say, once training has ended.
            heterogeneous: whether layers of the smaller model may get different sizes. None: as the arguments say.

        Raises:
            ShrinkError: the model cannot be made smaller. It is saved as it is.
        """
        directory = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        is_checkpoint = self._write_pruning_files(directory, _internal_call and output_dir is not None)
        self._save_distillation(directory, _internal_call and output_dir is not None)
        if _internal_call and output_dir is not None:
            self._last_saved_checkpoint = output_dir
        is_whole = self._prunes and self.is_fsdp_enabled and not is_checkpoint
        enclosing, self._save_options = self._save_options, self._options_of_save(shrink, heterogeneous)
        shrink, heterogeneous = self._save_options
        try:
            if self.args.should_save:
                (directory / SHRINK_FILE).unlink(missing_ok=True)
            with saving_whole_weights(self.accelerator) if is_whole else nullcontext():
                super().save_model(output_dir, _internal_call or shrink)  # a smaller model is uploaded below
            if shrink:
                self._make_smaller(directory, heterogeneous)
            if directory == Path(str(self.args.output_dir)):
                self.is_output_shrunk = shrink
            if shrink and self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        except UploadError as error:
            logger.error("%s", error)
        finally:
            self._save_options = enclosing

    def _write_pruning_files(self, directory: Path, may_be_checkpoint: bool) -> bool:
        """Writes what is saved beside the weights. Returns whether the folder is a checkpoint of this step."""
        if not self._prunes or self.sparsity_callback is None:
            return False
        step = self.state.global_step
        is_checkpoint = may_be_checkpoint and directory.name == f"checkpoint-{step}"
        unblock_best_metric(self.state)
        self.sparsity_callback.restore_zeros(self.state)
        if is_checkpoint:
            self._has_awaited_ranks = bool(self.args.save_only_model)
        if is_checkpoint and self.args.should_save:
            start_checkpoint(directory)
        self.sparsity_callback.save(directory, self.args.should_save, step if is_checkpoint else None)
        return is_checkpoint

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's, followed by a barrier: the main rank writes `trainer_state.json`, which marks a checkpoint as
        complete, and deletes older checkpoints only when all ranks have written theirs."""
        super()._save_rng_state(output_dir)
        get_communicator().any(False)
        self._has_awaited_ranks = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `get_batch_samples`; no batches where the run that is resumed was finished already. Trainer would
        train one step more, because it compares with `max_steps` only after a step."""
        if self.sparsity_callback is not None and self.sparsity_callback.is_finished:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's `evaluate`. During training, a metric from before the final sparsity never becomes the best."""
        callback = self.sparsity_callback if self.is_in_train else None
        if callback is not None:
            callback.restore_zeros(self.state)
        metrics = super().evaluate(*args, **kwargs)
        if callback is not None:
            # After `on_evaluate`, in which callbacks such as early stopping compare with the best metric too.
            callback.block_best_metric_until_final(self.args, self.state)
        return metrics

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Trainer's `save_metrics`. The model card shows the saved metrics of evaluation and test."""
        self.saved_metrics |= metrics
        super().save_metrics(split, metrics, combined)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's `create_model_card`, with a section on sparsity: what was pruned, how, and what it cost.

        A later call rewrites this section and keeps what a person has changed elsewhere. Further arguments:
        the fields of `CardMetadata` that Trainer's has not. `push_to_hub` passes them on.
        """
        if self.sparsity_callback is None or self.sparsity_callback.pruner is None or not self.is_world_process_zero():
            create = super().create_model_card
            create(*args, **split_metadata(inspect.signature(create), kwargs)[1])
        else:
            write_trainer_card(self, self.sparsity_callback.pruner, super().create_model_card, args, kwargs)

    setattr(create_model_card, "__signature__", card_signature(Trainer.create_model_card))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's `log`, with the sparsity and the terms of the loss at each logging step, for every reporting
        integration."""
        callback, metrics = self.sparsity_callback, {}
        if callback is not None:
            metrics = callback.sparsity_metrics(logs, self.state)
            logs.update(metrics)
            logs.update(self._distillation_metrics(logs))
        super().log(logs, *args, **kwargs)
        if callback is not None and metrics:
            self._trackers.log(callback, self.state.global_step)


def _signature_of_trainer(cls: type) -> inspect.Signature:
    """Returns the signature of the first base class, other than the mixin, that defines `__init__`."""
    for base in cls.__mro__[1:]:
        if base is not SparseTrainerMixin and "__init__" in base.__dict__:
            parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())[1:]
            return inspect.Signature(parameters)
    return inspect.Signature()


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`transformers.Trainer` that prunes, with the same signature: to migrate a script, replace the names of Trainer
    and TrainingArguments.

    Example:
        >>> import inspect
        >>> inspect.signature(SparseTrainer) == inspect.signature(Trainer)
        True
    """


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that prunes, with the same signature. Its arguments are
    `SparseSeq2SeqTrainingArguments`."""
