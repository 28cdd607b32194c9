"""Callbacks that watch a run from inside, and faults that strike it."""

from __future__ import annotations

from transformers import TrainerCallback


class Checks(TrainerCallback):
    """Calls `check` once, after the first optimizer step."""

    def __init__(self, check):
        self.check = check

    def on_optimizer_step(self, *args, **kwargs):
        self.check()
        self.check = lambda: None


SPIES = {}
