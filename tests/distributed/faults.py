"""Fault injection: kills a rank with SIGKILL at a chosen moment, so that nothing is cleaned up.

Each function takes the checkpoint's step and patches the call to interrupt. It is called once, on the ranks to kill.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner, method: str, step: int) -> None:
    """Kills the rank when `method` is called to write into the checkpoint of `step`."""
    call = getattr(owner, method)

    def patched(self, folder, *args, **kwargs):
        return die() if f"checkpoint-{step}" in str(folder) else call(self, folder, *args, **kwargs)

    setattr(owner, method, patched)


def _halfway(owner, method: str, step: int) -> None:
    """Kills the rank when half of a file of the checkpoint of `step` is written."""
    call = getattr(owner, method)

    def patched(*args, **kwargs):
        call(*args, **kwargs)
        for path in args:
            if isinstance(path, (str, Path)) and f"checkpoint-{step}" in str(path) and Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
                die()

    setattr(owner, method, patched)


def in_masks(step: int, trainer: Trainer) -> None:
    import hf_sparse.files

    _halfway(hf_sparse.files, "save_file", step)


def before_weights(step: int, trainer: Trainer) -> None:
    _before(Trainer, "_save", step)


def before_optimizer(step: int, trainer: Trainer) -> None:
    _before(Trainer, "_save_optimizer_and_scheduler", step)


def in_optimizer(step: int, trainer: Trainer) -> None:
    _halfway(torch, "save", step)


def before_rng(step: int, trainer: Trainer) -> None:
    _before(Trainer, "_save_rng_state", step)


def in_state(step: int, trainer: Trainer) -> None:
    _halfway(transformers.TrainerState, "save_to_json", step)


class _Dies(TrainerCallback):
    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self._event)

    def _event(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def after_save(step: int, trainer: Trainer) -> None:
    trainer.add_callback(_Dies("on_save", step))


def in_training(step: int, trainer: Trainer) -> None:
    """Before the optimizer step of the checkpoint."""
    trainer.add_callback(_Dies("on_pre_optimizer_step", step - 1))


FAULTS = {
    fault.__name__: fault
    for fault in (
        in_masks,
        before_weights,
        before_optimizer,
        in_optimizer,
        before_rng,
        in_state,
        after_save,
        in_training,
    )
}
