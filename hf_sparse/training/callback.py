"""SparsityCallback: Trainer's events -> the pruner. Time is read from `state.global_step` alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..config import PruningConfig
from ..distributed import get_communicator, is_deepspeed, observe_zero_gradients
from ..engine.pruner import Pruner
from ..engine.resolve import resolve_layers
from ..files import CONFIG_FILE, LAYERS_PLOT_FILE, REPORT_FILE, SCHEDULE_PLOT_FILE
from ..hub.upload import hide_token
from ..reporting.plots import plot_layers, plot_schedule
from ..reporting.report import SparsityReport
from ..schedulers import PruningSchedule
from .state_files import check_state, clear_states, restore_state, write_state


logger = logging.getLogger(__name__)

# No metric beats it. Unlike inf it is valid JSON, and the trainer's state is written as JSON.
_UNBEATABLE = sys.float_info.max


class SparsityCallback(TrainerCallback):
    """Prunes the model that a Trainer trains.

    Masks are enforced right after each optimizer step, before logging, evaluation and saving. Evaluation never
    prunes, and only checkpoints at the final sparsity compete for the best. With a stock Trainer the masks are
    written on `on_save`, and an `EarlyStoppingCallback` belongs before this one, or it counts the evaluations before
    the final sparsity. `SparseTrainer` writes the masks ahead of the weights and needs no order: it is the better
    choice for runs that are resumed, pushed or stopped early.

    Args:
        config: what to prune. Left out, the trainer's arguments are taken, if they are `SparseTrainingArguments`.

    Example:
        >>> from transformers import Trainer
        >>> callback = SparsityCallback(PruningConfig(target_sparsity=0.8))
        >>> # Trainer(model, args, train_dataset=train, callbacks=[callback]).train()
    """

    def __init__(self, config: PruningConfig | None = None):
        if config is not None and not isinstance(config, PruningConfig):
            raise TypeError(f"SparsityCallback takes a PruningConfig, not {type(config).__name__}.")
        self.given = self.config = config
        self.pruner: Pruner | None = None
        self.schedule: PruningSchedule | None = None
        self._training = False
        self._hook = None
        self._saved: SparsityReport | None = None
        self.resume_from: str | None = None
        """The checkpoint that the next `train` goes on from, where the trainer says so beforehand."""
        self.alone = True
        """Whether the trainer is a stock one. `SparseTrainer` says False, and itself writes masks ahead of weights
        and holds back the best metric after all callbacks."""

    # Before training

    def check(self, args, model: nn.Module) -> None:
        """See that the config fits the model and the optimizer, so that faults come before any work.

        Raises:
            PruningConfigError, NotImplementedError: what does not fit, and the remedy.
        """
        self.config = self.given or (args if isinstance(args, PruningConfig) else None)
        if self.config is None:
            raise ValueError("SparsityCallback needs a PruningConfig, or a trainer with SparseTrainingArguments.")
        optimizer = str(getattr(args.optim, "value", args.optim))
        if self.config.prunes and optimizer.startswith("schedule_free"):
            raise NotImplementedError(
                f"optim={optimizer} keeps a second copy of the weights that pruning does not reach: use adamw_torch."
            )
        if self.config.prunes and model is not None:
            _, skipped = resolve_layers(model, self.config)
            if skipped:
                logger.warning("not pruned, because the pattern does not divide them: %s", ", ".join(skipped))

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.check(args, model)
        hide_token(args)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Build the pruner on the parameters as they are now: wrapping and `model_init` replace them. May come
        twice, after a batch size that did not fit, or with a second `train`."""
        self.check(args, None)
        previous, self.pruner, self._training, self._saved = self.pruner, None, True, None
        if not self.config.prunes:
            return
        if self.alone and args.push_to_hub and "checkpoint" in args.hub_strategy.value:
            logger.warning("a stock Trainer uploads checkpoints before their masks are written: use SparseTrainer.")
        config = self.config
        self.schedule = PruningSchedule.from_fractions(
            config.prune_start, config.prune_end, config.prune_every, state.max_steps
        )
        pruner = Pruner(model, config)
        if state.global_step > 0:
            directory = self.resume_from or _checkpoint(args, state)
            check_state(directory, model, config, self.schedule, state.global_step)
            restore_state(directory, pruner)
        elif previous is not None:
            _keep_masks(previous, pruner)
        pruner.apply_masks()
        self.pruner = pruner
        self._watch(optimizer, state)
        if not self._final(state):
            _forget_best(state)

    def _watch(self, optimizer, state) -> None:
        """DeepSpeed steps inside backward and leaves no gradients for `on_pre_optimizer_step`: look when it steps."""
        self._look_away()
        if not is_deepspeed(optimizer):
            return
        if not any(shard.is_split for shard in self.pruner.shards.values()):
            raise NotImplementedError(
                "DeepSpeed without ZeRO hides the weights that it steps: set zero_optimization.stage to 1, 2 or 3."
            )
        error = None
        try:
            for shard in self.pruner.shards.values():
                shard.check_storage()
        except NotImplementedError as problem:
            error = problem
        get_communicator().raise_together(error)
        if any(group.options.regrow for group in self.pruner.groups):
            raise NotImplementedError("regrow needs gradients at the prune step, which DeepSpeed has deleted by then.")
        if self.pruner.observes:
            self._hook = observe_zero_gradients(optimizer, self.pruner.shards.values(), lambda: self._observe(state))

    def _look_away(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # During training

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Gradients are there, reduced, unscaled and clipped."""
        if self._hook is None:
            self._observe(state)

    def _observe(self, state) -> None:
        if self.pruner is None or not self.pruner.observes or self._final(state):
            return
        if not self.pruner.observe():
            logger.info("step %d: gradients are not finite and do not count.", state.global_step + 1)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The weights have just changed. `state.global_step` still counts the earlier steps only."""
        if self.pruner is None:
            return
        prune_step = self.schedule.prune_step(state.global_step + 1)
        if prune_step is not None:
            self.pruner.update(prune_step, self.schedule.total)
        else:
            self.pruner.enforce()

    def on_step_end(self, args, state, control, **kwargs):
        self.release_best(state)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.alone:
            self.hold_best(args, state)

    def hold_best(self, args, state) -> None:
        """Until the final sparsity no checkpoint may be the best: called between evaluating and comparing metrics."""
        if self._training and args.metric_for_best_model is not None and not self._final(state):
            state.best_metric = _UNBEATABLE if args.greater_is_better else -_UNBEATABLE

    def release_best(self, state) -> None:
        """Take back what `hold_best` did, before the state is written or another callback reads it."""
        if state.best_metric is not None and abs(state.best_metric) == _UNBEATABLE:
            state.best_metric = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the figures where a stock Trainer logs its loss; `SparseTrainer` has added them already."""
        figures = self.figures(logs, state)
        if figures:
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    def figures(self, logs: dict | None, state) -> dict[str, float]:
        """What to add to `logs`: at a logging step, the share of the selected weights that is zero, counted in the
        weights, and the share that the schedule asks for by now."""
        if self.pruner is None or not logs or "loss" not in logs or "sparsity" in logs:
            return {}
        scheduled = self.pruner.scheduled(self.schedule.done(state.global_step), self.schedule.total)
        return {"sparsity": round(self.pruner.sparsity(), 6), "target_sparsity": round(scheduled, 6)}

    # Saving

    def on_save(self, args, state, control, **kwargs):
        if self.pruner is None or not self.alone:
            return
        directory = Path(_checkpoint(args, state))
        if get_communicator().any(directory.is_dir() and state.is_world_process_zero):
            self.write(directory, args.should_save, state.global_step)
        else:
            logger.warning("%s was not found, so no masks were written: use SparseTrainer.", directory)

    def write(self, directory: str | Path, main: bool = True, step: int | None = None) -> None:
        """Write the pruning files: config and report, and with `step`, for a checkpoint, the masks. All processes call
        this, and return when everything is written; those that are not `main` write their shards only."""
        if self.pruner is None:
            return
        self._saved = report = self.pruner.report()
        if step is not None:
            # Nobody writes before what is old has gone.
            _together(lambda: clear_states(directory) if main else None)

        def write() -> None:
            if step is not None:
                write_state(directory, self.pruner, self.schedule, step, main)
            if main:
                self.config_as_run().save(Path(directory) / CONFIG_FILE)
                report.save(Path(directory) / REPORT_FILE)

        _together(write)

    def on_push_begin(self, args, state, control, **kwargs):
        """During training Trainer copies the weights of a checkpoint, but not the pruning files, to the folder that it
        uploads. Only the main process comes here then, and the zeros are as they were counted for the checkpoint."""
        if self.pruner is None or not self._training or not state.is_world_process_zero:
            return
        if self.alone:
            self._saved = self.pruner.report() if get_communicator().world_size == 1 else None
        self.write_figures(args, state)

    def config_as_run(self) -> PruningConfig:
        """The config alone, without what a trainer's arguments add."""
        return PruningConfig.from_dict(PruningConfig.to_dict(self.config))

    # After training

    def on_train_end(self, args, state, control, **kwargs):
        if self.pruner is None:
            return
        self._training = False
        self._look_away()
        self.release_best(state)
        if not self._final(state) and self.pruner.target:
            logger.warning(
                "training ended at step %d, before prune_end (step %d): the target was not reached.",
                state.global_step,
                self.schedule.end,
            )
        self._saved = self.pruner.report()
        if state.is_world_process_zero:
            print(f"\n{self._saved}\n", flush=True)
        if self.alone:
            self.write_figures(args, state)

    def write_figures(self, args, state) -> None:
        """Write config, report and figures into the output folder, where nothing may be uploaded from at the time:
        `SparseTrainer` calls this after training, when its uploads have ended."""
        if self._saved is None or not args.output_dir or not state.is_world_process_zero:
            return
        directory, schedule = Path(args.output_dir), self.schedule
        self._saved.save(directory / REPORT_FILE)
        self.config_as_run().save(directory / CONFIG_FILE)
        steps = range(1, state.max_steps + 1)
        planned = [
            (step, self.pruner.scheduled(schedule.prune_step(step), schedule.total))
            for step in steps
            if schedule.prune_step(step)
        ]
        measured = [(log["step"], log["sparsity"]) for log in state.log_history if "sparsity" in log]
        plot_schedule(directory / SCHEDULE_PLOT_FILE, planned, measured, state.max_steps)
        plot_layers(directory / LAYERS_PLOT_FILE, self._saved)

    def _final(self, state) -> bool:
        """Whether the last prune step has happened."""
        return self.pruner is None or state.global_step >= self.schedule.end


def _checkpoint(args, state) -> str:
    return str(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _together(work: Callable[[], None]) -> None:
    """Do something with files, wait until all processes have, and raise in all when one could not."""
    error = None
    try:
        work()
    except OSError as problem:
        error = problem
    get_communicator().raise_together(error)


def _forget_best(state) -> None:
    """A best metric from before the final sparsity must not stand."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _keep_masks(previous: Pruner, pruner: Pruner) -> None:
    """What an earlier `train` of the same weights pruned stays pruned: zeros do not come back to life between two
    runs. Weights that were replaced, reset or split otherwise in between start anew."""
    if pruner.communicator.any(not _still_zero(previous, pruner)):
        return
    for name in pruner.shards:
        pruner.masks.replace(name, previous.masks[name] & pruner.masks[name])


def _still_zero(previous: Pruner, pruner: Pruner) -> bool:
    if previous.shards.keys() != pruner.shards.keys():
        return False
    for name, shard in pruner.shards.items():
        bits, weight = previous.masks.bits(name), shard.tensor
        if previous.shards[name].local_regions != shard.local_regions or bits.shape != weight.shape:
            return False
        if torch.count_nonzero(weight[bits.to(weight.device) == 0]):
            return False
    return True
