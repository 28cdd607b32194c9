"""The files that a run writes: state files, config and report beside saved weights, and plots in the output folder."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from ..config import PruningConfig
from ..engine.pruner import Pruner
from ..files import LAYERS_PLOT_FILE, SCHEDULE_PLOT_FILE
from ..reporting.plots import plot_layers, plot_schedule
from ..reporting.pruning_files import write_report_and_config
from ..reporting.report import SparsityReport
from ..schedulers import PruningSchedule
from .collective_errors import raise_on_all_ranks
from .state_files import delete_state_files, write_state_file


def write_pruning_files(
    directory: str | Path,
    pruner: Pruner,
    schedule: PruningSchedule,
    report: SparsityReport,
    is_main: bool = True,
    step: int | None = None,
) -> None:
    """Writes config and report beside the weights of a model. All ranks call this, and return when all have written.

    Args:
        directory: where the weights are saved.
        pruner: provides config, masks and statistics.
        schedule: the pruning schedule of the run.
        report: the sparsity of the weights.
        is_main: whether this rank writes the files that exist once. Other ranks write the state of their shards only.
        step: for a checkpoint, its optimizer step: then the state files are written too.
    """
    if step is not None:
        # No rank writes before the files of an earlier run are deleted.
        with raise_on_all_ranks(OSError):
            if is_main:
                delete_state_files(directory)
    with raise_on_all_ranks(OSError):
        if step is not None:
            write_state_file(directory, pruner, schedule, step, is_main)
        if is_main:
            write_report_and_config(directory, report, PruningConfig.to_dict(pruner.config))


def write_run_summary(
    output_dir: str | Path,
    pruner: Pruner,
    schedule: PruningSchedule,
    report: SparsityReport,
    state: TrainerState,
) -> None:
    """Writes config and report, and plots the sparsity over the steps of the run and by layer. The main rank calls
    this.

    Args:
        output_dir: the output folder of the trainer.
        pruner: provides config and scheduled sparsity.
        schedule: the pruning schedule of the run.
        report: the sparsity of the weights.
        state: provides the logged sparsity and the number of steps.
    """
    directory = Path(output_dir)
    write_report_and_config(directory, report, PruningConfig.to_dict(pruner.config))
    prune_steps = {step: schedule.prune_step(step) for step in range(1, state.max_steps + 1)}
    scheduled = [(step, pruner.scheduled(count, schedule.total)) for step, count in prune_steps.items() if count]
    logged = [(int(log["step"]), log["sparsity"]) for log in state.log_history if "sparsity" in log]
    plot_schedule(directory / SCHEDULE_PLOT_FILE, scheduled, logged, state.max_steps)
    plot_layers(directory / LAYERS_PLOT_FILE, report)
