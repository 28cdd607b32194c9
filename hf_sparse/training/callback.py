"""SparsityCallback: the events of a Trainer drive the pruner."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from ..config import PruningConfig, PruningConfigError
from ..config.distillation import published_options
from ..config.validation import training_errors
from ..distributed import get_communicator, is_deepspeed, observe_zero_gradients, raise_on_all_ranks
from ..engine.pruner import Pruner
from ..engine.resolve import removal_warnings, resolve_layers
from ..files import LAYERS_PLOT_FILE, SCHEDULE_PLOT_FILE
from ..hub.upload import hide_token
from ..reporting.plots import plot_layers, plot_schedule
from ..reporting.report import SparsityReport, write_report_and_config
from ..reporting.tabular import console_text
from ..schedulers import PruningSchedule
from .algorithm_run import AlgorithmRun
from .arguments import SparseTrainingArguments
from .best_metric import block_best_metric, clear_best_metric, unblock_best_metric
from .new_run import new_run
from .penalties import Penalties
from .resume import CheckpointError, ResumeState, keep_pruned
from .rewinding import Rewinding
from .state_files import delete_state_files, write_state_file
from .tuning import TUNINGS, Tuning
from .tuning.tuner import Tuner
from .zero_guard import ZeroGuard


logger = logging.getLogger(__name__)

GIVEN_TWICE = "the pruning config is given twice"


class SparsityCallback(TrainerCallback):
    """Prunes the model that a Trainer trains.

    Masks are enforced right after each optimizer step, before logging, evaluation and saving; zeros that other
    callbacks have overwritten since are restored before saving, and a warning is logged. Evaluation never prunes, and
    only checkpoints at the final sparsity can become the best checkpoint: early stopping counts from there.

    With a stock Trainer the masks are written in `on_save`, after the weights. A callback that changes weights in
    `on_train_end`, or at any time under ZeRO-3, must come before this one. With `save_strategy="best"` and an
    `EarlyStoppingCallback`, each evaluation before the final sparsity saves a checkpoint. `SparseTrainer` writes the
    masks before the weights, works with any order of callbacks, and saves none of those checkpoints: prefer it for
    runs that are resumed, pushed or stopped early.

    Args:
        config: what to prune. If None, the trainer's arguments must be `SparseTrainingArguments`.
        tune: what to train of a model that is pruned already, a name or an instance of `Tuning`, for `SparseTrainer`
            and its mixin. None: as the arguments say.

    Example:
        >>> from transformers import Trainer
        >>> callback = SparsityCallback(PruningConfig(target_sparsity=0.8))
        >>> # Trainer(model, args, train_dataset=train, callbacks=[callback]).train()
    """

    def __init__(self, config: PruningConfig | None = None, tune: Tuning | str | None = None):
        if config is not None and not isinstance(config, PruningConfig):
            raise TypeError(f"SparsityCallback takes a PruningConfig, not {type(config).__name__}.")
        self._given_config = self.config = config
        self._given_tuning: Tuning | None = TUNINGS.create(tune) if isinstance(tune, str) else tune
        self.tuning = self._given_tuning
        """What is trained, once `check` has read the arguments; None for all parameters."""
        self.tuner: Tuner | None = None
        """What trains it. `SparseTrainer` sets it."""
        self.pruner: Pruner | None = None
        self.schedule: PruningSchedule
        """The pruning schedule of the run, if there is a pruner."""
        self.run: AlgorithmRun
        """The algorithm at work, if there is a pruner."""
        self.penalties: Penalties
        """The terms of the loss that draw weights towards zero, if there is a pruner."""
        self.rewinding: Rewinding | None = None
        """What restores the weights of an earlier step after the last prune step; None if nothing does."""
        self.resume_state: ResumeState | None = None
        """The state that the next training resumes from. `SparseTrainer` sets it. With a stock Trainer it is read
        from the checkpoint of the current step."""
        self.owns_saving = True
        """Whether this callback writes the pruning files and blocks the best metric. `SparseTrainer` sets it to
        False, because it does both itself: before the weights are saved, and after all callbacks of an evaluation."""
        self.is_finished = False
        """Whether the run had taken its last step when this training began, so that there is nothing to train."""
        self._is_training = False
        self._gradient_hook: Any = None
        self._report: SparsityReport | None = None
        self._zero_guard: ZeroGuard | None = None
        self._earlier_sparsity = 0.0
        self.zeros_by_layer: dict[str, int] = {}
        """The number of zeros of each selected weight at the latest log of a training loss."""

    @property
    def prunes(self) -> bool:
        """Whether there is anything to prune. Options of the arguments may change until training begins."""
        return self.config is not None and self.config.prunes

    # Before training

    def check(self, args: TrainingArguments, model: nn.Module | None) -> PruningConfig:
        """Checks that the config fits the model and the optimizer. Returns the config.

        Raises:
            PruningConfigError: the config does not fit the model.
            ValueError: there is no config, or the arguments have another one.
            NotImplementedError: the optimizer is not supported.
        """
        given, by_arguments = self._given_config, args if isinstance(args, PruningConfig) else None
        if (
            given is not None
            and by_arguments is not None
            and by_arguments is not given
            and (by_arguments.prunes or by_arguments.distills)
        ):
            raise ValueError(f"{GIVEN_TWICE}: give it by one SparsityCallback or by the arguments, not by both.")
        self.config = by_arguments if given is None else given
        if self.config is None:
            raise ValueError("SparsityCallback needs a PruningConfig, or a trainer with SparseTrainingArguments.")
        if isinstance(args, SparseTrainingArguments):
            args.mark_as_read()
            self.tuning = self._given_tuning or args.tuning()
        optimizer = str(getattr(args.optim, "value", args.optim))
        if self.config.prunes and optimizer.startswith("schedule_free"):
            raise NotImplementedError(
                f'`optim="{optimizer}"` keeps a second copy of the weights that pruning cannot reach: use '
                '`optim="adamw_torch"`.'
            )
        if self.config.prunes and (errors := _training_errors(self.config)):
            raise PruningConfigError(errors)
        if self.config.prunes and model is not None:
            groups, skipped = resolve_layers(model, self.config)
            if skipped:
                logger.warning("not pruned, because the pattern does not divide them: %s", ", ".join(skipped))
            for warning in removal_warnings(model, groups):
                logger.warning(warning)
        return self.config

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.check(args, model)
        hide_token(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds the pruner on the current parameters: wrapping and `model_init` may have replaced them. Trainer calls
        this again for a second `train`, or to retry with a smaller batch size."""
        config = self.check(args, None)
        self.is_finished = config.prunes and state.global_step >= state.max_steps
        previous, self.pruner, self._is_training, self._report = self.pruner, None, True, None
        if self._zero_guard is not None:
            self._zero_guard.remove_hooks()  # of a training that ended with an exception
        self._zero_guard = None
        if self.owns_saving and config.distills:
            raise ValueError(
                "`distill_teacher` needs SparseTrainer: a stock Trainer runs no teacher. Or leave it out."
            )
        if (error := config.unused_error()) is not None:
            raise PruningConfigError([error])
        if not config.prunes:
            return
        if self.owns_saving and args.push_to_hub and "checkpoint" in HubStrategy(args.hub_strategy).value:
            logger.warning("a stock Trainer uploads checkpoints before their masks are written: use SparseTrainer.")
        if self.owns_saving and getattr(args, "shrink", False):
            raise ValueError(
                "`shrink` needs SparseTrainer: a stock Trainer saves the whole model. Or leave `shrink` out."
            )
        if self.owns_saving and self.tuning is not None:
            raise ValueError("`tune` needs SparseTrainer: a stock Trainer trains all parameters. Or leave `tune` out.")
        if self.owns_saving and config.rewind is not None:
            raise ValueError(
                "`rewind` needs SparseTrainer: a stock Trainer keeps its learning rate. Or leave `rewind` out."
            )
        if self.owns_saving and self.is_finished:
            logger.warning("the run is finished, and a stock Trainer may train one more step: use SparseTrainer.")
        resume_state = None
        if state.global_step > 0:
            resume_state = self.resume_state or ResumeState(_checkpoint_folder(args, state))
            with raise_on_all_ranks(CheckpointError):
                self.config = config = resume_state.with_its_defaults(config)
        self.schedule = config.schedule(state.max_steps)
        pruner = Pruner(kwargs["model"], config)
        optimizer = kwargs.get("optimizer")
        run = new_run(pruner, self.schedule, optimizer, args.seed)
        restores_weights = self.schedule.rewind is not None and config.rewind_weights
        self.rewinding = Rewinding(pruner, self.schedule, optimizer) if restores_weights else None
        if resume_state is not None:
            with raise_on_all_ranks(CheckpointError):
                resume_state.validate(pruner.groups, config, self.schedule, state.global_step, self.tuning)
                resume_state.apply(pruner, run, self.rewinding)
                if self.tuner is not None:
                    resume_state.start_tuner(self.tuner)
        elif previous is not None:
            keep_pruned(previous, pruner)
        pruner.apply_masks()
        if state.global_step == 0:
            run.start()
            if self.rewinding is not None:
                self.rewinding.after_step(0)
            if self.tuner is not None:
                self.tuner.start(None)
        self.pruner, self.run, self._zero_guard = pruner, run, ZeroGuard(pruner)
        self.penalties = Penalties(pruner, self.schedule, state.max_steps)
        self._remove_gradient_hook()
        if is_deepspeed(optimizer):
            self._install_gradient_hook(pruner, optimizer, state)
        self._earlier_sparsity = self._read_earlier_sparsity(state)
        if not self._is_at_final_sparsity(state):
            clear_best_metric(state)

    def _read_earlier_sparsity(self, state: TrainerState) -> float:
        """Returns the sparsity from before the first prune step: by the masks, or, once there was a prune step, by the
        first log. All ranks call this."""
        pruner = cast(Pruner, self.pruner)
        if not self.run.keeps_earlier_zeros:
            return 0.0
        if self.schedule.done(state.global_step) == 0:
            return pruner.masked_sparsity()
        first = next((log for log in state.log_history if "target_sparsity" in log), None)
        if first is None:
            return 0.0
        scheduled = pruner.scheduled(self.schedule.done(int(first["step"])), self.schedule.total)
        return first["target_sparsity"] if first["target_sparsity"] > scheduled + 1e-6 else 0.0

    def _target_after(self, prune_step: int) -> float:
        """Returns the sparsity that is demanded after a prune step: scheduled, but not less than before the first."""
        scheduled = cast(Pruner, self.pruner).scheduled(prune_step, self.schedule.total)
        return max(scheduled, self._earlier_sparsity)

    def _install_gradient_hook(self, pruner: Pruner, optimizer: Any, state: TrainerState) -> None:
        """Observes gradients when DeepSpeed steps, inside backward: at `on_pre_optimizer_step` they are freed."""
        shards = pruner.shards.values()
        if not any(shard.is_split for shard in shards):
            raise NotImplementedError(
                "DeepSpeed without ZeRO hides the weights that it steps: set zero_optimization.stage to 1, 2 or 3."
            )
        with raise_on_all_ranks(NotImplementedError):
            for shard in shards:
                shard.check_storage()
        if pruner.observes or self.run.requires_gradients or self.penalties.groups:
            self._gradient_hook = observe_zero_gradients(optimizer, shards, lambda: self._before_step(state))

    def _remove_gradient_hook(self) -> None:
        if self._gradient_hook is not None:
            self._gradient_hook.remove()
            self._gradient_hook = None

    # During training

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observes the gradients, which are reduced, unscaled and clipped by now."""
        if self._gradient_hook is None:
            self._before_step(state)
        if self.tuner is not None and self.pruner is not None:
            self.tuner.backward(self.pruner.masks)

    def _before_step(self, state: TrainerState) -> None:
        if self.pruner is None:
            return
        step = state.global_step + 1
        if self.pruner.observes and step <= self.schedule.end and not self.pruner.observe():
            logger.info("step %d: gradients are not finite and are not counted.", step)
        self.run.observe_gradients(step)
        self.penalties.before_step(step)  # after criterion and algorithm have seen the gradients of the loss alone
        self.run.before_step(step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes if a prune step is due, and enforces the masks. The optimizer has just changed the weights, but
        `state.global_step` does not count its step yet."""
        if self.pruner is None:
            return
        if self.tuner is not None:
            self.tuner.write()
        self.run.after_step(state.global_step + 1)
        if self.rewinding is not None:
            self.rewinding.after_step(state.global_step + 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget_early_best(state)
        if self._zero_guard is not None:
            self._zero_guard.remove_hooks()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        unblock_best_metric(state)
        self._guard_saving(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_finished and not self.owns_saving:
            # Nothing was trained: what Trainer logs, evaluates and saves at the end of an epoch is there already.
            control.should_log = control.should_evaluate = control.should_save = False
        self._guard_saving(state, control)

    def _guard_saving(self, state: TrainerState, control: TrainerControl) -> None:
        """Restores zeros before a stock Trainer evaluates or saves: those that are overwritten by now, and with hooks
        those that callbacks after this one overwrite."""
        if self._zero_guard is not None and self.owns_saving and (control.should_save or control.should_evaluate):
            self._zero_guard.restore(state)
            self._zero_guard.install_hooks()

    def restore_zeros(self, state: TrainerState) -> None:
        """Sets pruned weights to zero that other code has changed since the optimizer step. All ranks call this."""
        if self._zero_guard is not None:
            self._zero_guard.restore(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An early stopping callback that comes after this one would count a blocked metric as no improvement.
        if self.owns_saving and args.save_strategy == SaveStrategy.BEST and not _stops_early(state):
            self.block_best_metric_until_final(args, state)

    def block_best_metric_until_final(self, args: TrainingArguments, state: TrainerState) -> None:
        """Blocks the best metric while the model is trained and has not reached its final sparsity."""
        if self._is_training and not self._is_at_final_sparsity(state):
            block_best_metric(args, state)

    def _forget_early_best(self, state: TrainerState) -> None:
        """Forgets a best checkpoint from before the final sparsity."""
        if self._is_training and not self._is_at_final_sparsity(state):
            clear_best_metric(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the sparsity to the logs of a stock Trainer; `SparseTrainer` has added it already. Evaluation logs
        before other callbacks see its metric, and Trainer logs before it loads the best checkpoint."""
        self._forget_early_best(state)
        metrics = self.sparsity_metrics(logs, state)
        if logs is not None and metrics:
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    def sparsity_metrics(self, logs: dict[str, float] | None, state: TrainerState) -> dict[str, float]:
        """Returns what to add to the logs of a training loss: `sparsity`, the fraction of zeros among the selected
        weights, counted in the weights, and `target_sparsity`, the fraction that the schedule demands at this step, or
        that was pruned before its first step if that is more.
        Returns {} for other logs."""
        if self.pruner is None or not logs or "loss" not in logs or "sparsity" in logs:
            return {}
        target = self._target_after(self.schedule.done(state.global_step))
        self.zeros_by_layer = zeros = self.pruner.zeros_by_layer()
        sparsity = sum(zeros.values()) / sum(self.pruner.shards[name].shape.numel() for name in zeros)
        metrics = {"sparsity": round(sparsity, 6), "target_sparsity": round(target, 6)}
        return metrics | self.run.metrics() | self.penalties.metrics(state.global_step)

    # Saving

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.pruner is None or self._zero_guard is None or not self.owns_saving:
            return
        self._zero_guard.remove_hooks()
        if self._zero_guard.restore(state) and state.is_world_process_zero:
            text = "pruned weights may not be zero in the weights that were saved at step %d: use SparseTrainer."
            logger.error(text, state.global_step)
        self._forget_early_best(state)
        directory = _checkpoint_folder(args, state)
        if get_communicator().any(directory.is_dir() and state.is_world_process_zero):
            self.save(directory, args.should_save, state.global_step)
        else:
            logger.warning("%s was not found, so no masks were written: use SparseTrainer.", directory)

    def save(self, directory: str | Path, is_main: bool = True, step: int | None = None) -> None:
        """Writes config and report beside the weights of a model, once there is a pruner. All ranks call this, and
        return when all have written.

        Args:
            directory: where the weights are saved.
            is_main: whether this rank writes the files that exist once. Others write the state of their shards only.
            step: for a checkpoint, its optimizer step: then the state files are written too.
        """
        if self.pruner is None:
            return
        self._report = self.pruner.report()
        if step is not None:
            # No rank writes before the files of an earlier run are deleted.
            with raise_on_all_ranks(OSError):
                if is_main:
                    delete_state_files(directory)
        with raise_on_all_ranks(OSError):
            if step is not None:
                write_state_file(directory, self.pruner, self.schedule, step, is_main, self.run, self.rewinding)
                if self.tuner is not None and is_main:
                    self.tuner.save(directory, step)
            if is_main:
                _write_summary(directory, self._report, self.pruner.config)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes config, report and plots of the latest checkpoint into the output folder, which Trainer uploads with
        the weights of that checkpoint during training. Trainer calls this on the main rank alone, so that zeros cannot
        be counted anew unless there is only one."""
        if self.pruner is None or not self._is_training or not state.is_world_process_zero:
            return
        if self.owns_saving:  # the report of this checkpoint is not written yet
            self._report = self.pruner.report() if get_communicator().world_size == 1 else None
        self.write_summary(args, state)

    # After training

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is None:
            return
        self._is_training = False
        self._remove_gradient_hook()
        self.run.finish()
        if self._zero_guard is not None:
            self._zero_guard.remove_hooks()
        self.restore_zeros(state)
        unblock_best_metric(state)
        if not self._is_at_final_sparsity(state) and self.pruner.target:
            text = "training ended at step %d, before `prune_end` (step %d): the target was not reached."
            logger.warning(text, state.global_step, self.schedule.end)
        self._report = self.pruner.report()
        if self.owns_saving:
            self.finish(args, state)

    def finish(self, args: TrainingArguments, state: TrainerState) -> None:
        """Prints the report and writes the files of the output folder. `SparseTrainer` calls this when `on_train_end`
        of all callbacks and its uploads have ended. All ranks call this."""
        if self.pruner is None or self._report is None:
            return
        if self._zero_guard is not None and self._zero_guard.restore(state):
            self._report = self.pruner.report()
        if state.is_world_process_zero:
            print(f"\n{console_text(self._report)}\n", flush=True)
        self.write_summary(args, state)

    def write_summary(self, args: TrainingArguments, state: TrainerState) -> None:
        """Writes config and report into the output folder, and plots the sparsity over the steps and by layer. No
        upload from that folder may be running: `SparseTrainer` calls this when its uploads have ended."""
        if self.pruner is None or self._report is None or not args.output_dir or not state.is_world_process_zero:
            return
        directory, pruner, schedule = Path(args.output_dir), self.pruner, self.schedule
        _write_summary(directory, self._report, pruner.config)
        prune_steps = {step: schedule.prune_step(step) for step in range(1, state.max_steps + 1)}
        scheduled = [(step, self._target_after(count)) for step, count in prune_steps.items() if count]
        if self._earlier_sparsity:
            scheduled.insert(0, (0, self._earlier_sparsity))
        # The history of a resumed run comes from a file.
        logs = [log for log in state.log_history if isinstance(log.get("step"), int)]
        logged = [(int(log["step"]), log["sparsity"]) for log in logs if isinstance(log.get("sparsity"), float)]
        plot_schedule(directory / SCHEDULE_PLOT_FILE, scheduled, logged, state.max_steps)
        plot_layers(directory / LAYERS_PLOT_FILE, self._report)

    def _is_at_final_sparsity(self, state: TrainerState) -> bool:
        """Whether the sparsity is the final one from now on, also where no prune step is to come or changes it."""
        if self.pruner is None or not self.pruner.target:
            return True
        return self.run.is_at_final_sparsity(state.global_step)


def _write_summary(directory: str | Path, report: SparsityReport, config: PruningConfig) -> None:
    write_report_and_config(directory, report, published_options(PruningConfig.to_dict(config)))


def _stops_early(state: TrainerState) -> bool:
    """Whether there is a callback of the kind of `EarlyStoppingCallback`, by the state that it saves."""
    return "early_stopping_patience" in str(state.stateful_callbacks)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _training_errors(config: PruningConfig) -> list[str]:
    """Returns what the groups of a config need that training does not compute."""
    return [
        (f'group "{name}": ' if config.groups else "") + error
        for name, group in config.resolve_groups().items()
        for error in training_errors(group)
    ]
