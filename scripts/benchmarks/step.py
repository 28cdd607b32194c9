"""Overhead of pruning on a training step between prune steps: `python scripts/benchmarks/bench.py step`.

One run of SparseTrainer on a BERT with the shape of MiniLM-L6. Both hooks of pruning and the whole step are timed in
the same run, so

    ratio = step / (step - hooks)

has no noise between runs, which would be larger than the effect. Every second step is without hooks, for a comparison
of whole steps within the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_sparse import PruningConfig, SparseTrainer, SparseTrainingArguments, SparsityCallback


WARMUP = 10


class TimedCallback(SparsityCallback):
    """Measures its hooks, and the steps with and without them."""

    def __init__(self, config: PruningConfig):
        super().__init__(config)
        self.hooks, self.with_hooks, self.without = [], [], []
        self.prune_step = self.mask_bytes = 0.0
        self._inside = self._started = 0.0

    def _timed(self, event, args, state, control, **kwargs) -> None:
        if state.global_step > 1 and state.global_step % 2 and state.global_step < state.max_steps - 1:
            return
        start = time.perf_counter()
        event(args, state, control, **kwargs)
        self._inside += time.perf_counter() - start

    def on_step_begin(self, args, state, control, **kwargs):
        self._inside, self._started = 0.0, time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._timed(super().on_pre_optimizer_step, args, state, control, **kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._timed(super().on_optimizer_step, args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        step = time.perf_counter() - self._started
        if state.global_step <= WARMUP or state.global_step >= state.max_steps:
            return
        if self._inside:
            self.hooks.append(step / (step - self._inside))
            self.with_hooks.append(step)
        else:
            self.without.append(step)


def measure(criterion: str, options: argparse.Namespace) -> TimedCallback:
    """Trains for `options.steps` steps, with a prune step at the start and one at the end."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        intermediate_size=4 * options.hidden,
    )
    example = {"input_ids": torch.randint(0, 30_000, (options.tokens,)), "labels": 1}
    callback = TimedCallback(
        PruningConfig(
            target_sparsity=0.8, criterion=criterion, prune_start=1, prune_every=10**6, prune_end=options.steps
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        args = SparseTrainingArguments(
            output_dir=directory,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        # One epoch: a restart of the data loader would be in steps of one parity.
        data = [example] * options.batch * options.steps
        SparseTrainer(BertForSequenceClassification(config), args, train_dataset=data, callbacks=[callback]).train()
    start = time.perf_counter()
    callback.pruner.groups[0].prune(1, 2, callback.pruner.shards, callback.pruner.masks)
    callback.prune_step = time.perf_counter() - start
    masks = callback.pruner.masks
    stored = sum(masks.bits(name).numel() * masks.bits(name).element_size() for name in masks)
    callback.mask_bytes = stored / sum(weight.numel() for weight in callback.pruner.parameters.values())
    return callback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "snip_momentum"])
    parser.add_argument("--steps", type=int, default=80, help=f"of which {WARMUP} are not counted")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])


def run(options: argparse.Namespace) -> None:
    lines = []
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for criterion in options.criteria:
            found = measure(criterion, options)
            plain = statistics.median(found.without)
            lines.append(
                f"{criterion:15s} {threads} thread(s): step {plain * 1e3:6.0f} ms without, ratio in situ "
                f"{statistics.median(found.hooks):.4f}, whole steps interleaved "
                f"{statistics.median(found.with_hooks) / plain:.4f}, {found.mask_bytes:.2f} byte of mask per weight, "
                f"a prune step {found.prune_step / plain:.2f} steps"
            )
    print(f"\nsteps of {options.batch} x {options.tokens} tokens, medians of {options.steps // 2 - WARMUP // 2}")
    print("\n".join(lines))
