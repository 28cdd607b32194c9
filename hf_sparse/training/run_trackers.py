"""RunTrackers: what TensorBoard and Weights & Biases get of a pruning run beside Trainer's logs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..config import PruningConfig
from ..config.distillation import published_options
from ..files import LAYERS_PLOT_FILE, SCHEDULE_PLOT_FILE
from ..reporting.layer_groups import group_layers
from .callback import SparsityCallback


_FIGURES = {"schedule": SCHEDULE_PLOT_FILE, "layers": LAYERS_PLOT_FILE}


class RunTrackers:
    """Sends the options that a run has resolved, the sparsity of each kind of layer, and figures to the trackers among
    a trainer's callbacks. Trainer's logs, which these get too, would be too long for a console with all that.

    Args:
        callbacks: those of a trainer.
    """

    def __init__(self, callbacks: Iterable[TrainerCallback]):
        callbacks = list(callbacks)
        self._boards = [callback for callback in callbacks if isinstance(callback, TensorBoardCallback)]
        self._has_wandb = any(isinstance(callback, WandbCallback) for callback in callbacks)
        self._has_options = False
        self._writers: list[tuple[type, str]] = []
        """The class and the folder of each writer of TensorBoard, whose callback closes it after training."""

    def log(self, callback: SparsityCallback, step: int) -> None:
        """Sends the sparsities at a logging step and, at the first one, the options.

        Args:
            callback: of the run, which has just added the sparsity to Trainer's logs.
            step: of the optimizer.
        """
        writers = [board.tb_writer for board in self._boards if board.tb_writer is not None]
        self._writers = [(type(writer), writer.get_logdir()) for writer in writers]
        values = {f"sparsity/{kind}": value for kind, value in sparsity_by_kind(callback).items()}
        options = {} if self._has_options else resolved_options(callback)
        for writer in writers:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            if options:
                writer.add_text("pruning", f"```json\n{json.dumps(options, indent=2)}\n```")
        if (run := self._wandb_run()) is not None:
            run.config.update(options, allow_val_change=True)  # None by the trainer's arguments, if not given
            run.log({**values, "train/global_step": step})
        self._has_options = True

    def add_figures(self, directory: str | Path, step: int) -> None:
        """Sends the figures at the end of a run.

        Args:
            directory: the output folder.
            step: the last one of the optimizer.
        """
        figures = {
            name: Path(directory) / file for name, file in _FIGURES.items() if (Path(directory) / file).is_file()
        }
        for writer_type, folder in self._writers:
            from matplotlib.image import imread

            with writer_type(folder) as writer:
                for name, path in figures.items():
                    writer.add_image(f"pruning/{name}", imread(path), step, dataformats="HWC")
        if (run := self._wandb_run()) is not None and figures:
            image = importlib.import_module("wandb").Image
            run.log({f"pruning/{name}": image(str(path)) for name, path in figures.items()})

    def _wandb_run(self) -> Any:
        """The run that `WandbCallback` logs to: on the main rank only."""
        return importlib.import_module("wandb").run if self._has_wandb else None


def sparsity_by_kind(callback: SparsityCallback) -> dict[str, float]:
    """Returns the fraction of zeros of each kind of layer, such as attention.self.query, at the latest log."""
    zeros = callback.zeros_by_layer
    if callback.pruner is None or not zeros:
        return {}
    names, sizes = list(zeros), {name: shard.shape.numel() for name, shard in callback.pruner.shards.items()}
    sparsities = {}
    for kind in group_layers(names)[1]:
        members = [names[index] for index in kind.layers]
        sparsities[kind.name] = round(sum(zeros[name] for name in members) / sum(sizes[name] for name in members), 6)
    return sparsities


def resolved_options(callback: SparsityCallback) -> dict[str, Any]:
    """Returns the options of pruning with every default that was chosen, without those that are None."""
    if callback.pruner is None:
        return {}
    options = published_options(PruningConfig.to_dict(callback.pruner.config))
    groups = {group.options.name: _without_none(group.options.to_dict()) for group in callback.pruner.groups}
    if len(groups) == 1:
        (group,) = groups.values()
        options |= {"target_sparsity": group.pop("target"), **group}
    else:
        options["groups"] = groups
    schedule = callback.schedule
    steps = {"first_step": schedule.start, "last_step": schedule.end, "prune_steps": schedule.total}
    return _without_none(options) | {"pruning_schedule": steps}


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
