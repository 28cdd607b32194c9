"""Keeps a checkpoint from before the final sparsity from becoming the best checkpoint of a run."""

from __future__ import annotations

import sys

from transformers import TrainerState, TrainingArguments


# Trainer finds no metric better than this. It is finite, so that trainer_state.json stays valid JSON.
_UNBEATABLE = sys.float_info.max


def block_best_metric(args: TrainingArguments, state: TrainerState) -> None:
    """Makes every metric worse than the best one, until `unblock_best_metric`. To be called after evaluation, before
    Trainer compares metrics."""
    if args.metric_for_best_model is not None:
        state.best_metric = _UNBEATABLE if args.greater_is_better else -_UNBEATABLE


def unblock_best_metric(state: TrainerState) -> None:
    """Undoes `block_best_metric`. To be called before the state is saved or another callback reads it."""
    if state.best_metric is not None and abs(state.best_metric) == _UNBEATABLE:
        state.best_metric = None


def clear_best_metric(state: TrainerState) -> None:
    """Forgets the best checkpoint, as if no metric had been compared yet."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
