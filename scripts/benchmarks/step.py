"""Overhead of pruning on a training step: `python scripts/benchmarks/bench.py step`.

Steps of a BERT with the shape of MiniLM-L6. Criteria are measured in one run of SparseTrainer each, between prune
steps. Both hooks of pruning and the whole step are timed in the same run, so

    ratio = step / (step - hooks)

has no noise between runs, which would be larger than the effect. Every second step is without hooks, for a comparison
of whole steps within the same run.

What changes the training itself (algorithms, penalties, distillation) is trained in turns with plain Trainer: one
step of one, one step of the other. A ratio is that of two neighbouring steps: its median with the quartiles, and apart
from them the median of steps with a prune step. Distillation is compared to a plain step and one forward of the
teacher, which has turns of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from turns import StepTimes, quartiles, run_in_turns

from hf_sparse import PruningConfig, PruningConfigError, SparseTrainer, SparseTrainingArguments, SparsityCallback
from hf_sparse.algorithms import ALGORITHMS
from hf_sparse.penalties import PENALTIES


WARMUP = 10
PRUNE_EVERY = 5
"""Optimizer steps between two prune steps of trainings in turns."""
TRAININGS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS.names()},
    **{name: {"penalty": name} for name in PENALTIES.names()},
    "distill": {"distill_teacher": "self"},
    "distill_hidden": {"distill_teacher": "self", "distill_hidden": 1.0},
}
"""What is trained in turns with plain Trainer."""


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


def new_model(options: argparse.Namespace) -> BertForSequenceClassification:
    """Returns the same model at every call."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        intermediate_size=4 * options.hidden,
    )
    return BertForSequenceClassification(config)


def new_data(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of all steps, as one epoch: a restart of the data loader would be in steps of one parity."""
    example = {"input_ids": torch.randint(0, 30_000, (options.tokens,)), "labels": 1}
    return [example] * options.batch * options.steps


def training_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def sparse_arguments(directory: str, name: str, options: argparse.Namespace) -> SparseTrainingArguments:
    """Returns the arguments of a training, with 80% of single weights pruned, or with 2:4 where it needs that."""
    given = training_options(options) | TRAININGS[name]
    given |= {"prune_start": WARMUP, "prune_every": PRUNE_EVERY, "prune_end": options.steps}
    try:
        return SparseTrainingArguments(directory, target_sparsity=0.8, **given)
    except PruningConfigError:
        return SparseTrainingArguments(directory, pattern="2:4", **given)


@dataclass(frozen=True)
class Ratios:
    """Steps of a training, relative to the plain steps (and forwards of the teacher) beside them."""

    plain: float
    between: Sequence[float]
    pruning: Sequence[float]
    pattern: str


def measure_in_turns(name: str, options: argparse.Namespace) -> Ratios:
    """Trains with plain Trainer and otherwise in turns; where there is a teacher, it has its own turn."""
    data, teacher = new_data(options), []
    plain_times, times = StepTimes(), StepTimes()
    with tempfile.TemporaryDirectory() as directory:
        plain_args = TrainingArguments(directory, **training_options(options))
        plain = Trainer(new_model(options), plain_args, train_dataset=data, callbacks=[plain_times])
        args = sparse_arguments(directory, name, options)
        sparse = SparseTrainer(new_model(options), args, train_dataset=data, callbacks=[times])

        def train(trainer: Trainer, times: StepTimes, switch: Callable[[], None]) -> None:
            times.switch = switch
            trainer.train()

        def forward(switch: Callable[[], None]) -> None:
            model = new_model(options).to(sparse.args.device).eval()
            batch = sparse._prepare_inputs(next(iter(sparse.get_train_dataloader())))
            for _ in range(options.steps):
                switch()
                start = time.perf_counter()
                with torch.no_grad():
                    model(**batch)
                teacher.append(time.perf_counter() - start)

        run_in_turns([partial(train, plain, plain_times), partial(train, sparse, times), *[forward] * args.distills])
    references = [step + (teacher[number] if teacher else 0) for number, step in enumerate(plain_times.seconds)]
    schedule = sparse.sparsity_callback.schedule
    counted = range(WARMUP, options.steps - 1)
    ratios = {step: times.seconds[step] / references[step] for step in counted}
    pruning = {step for step in counted if schedule.prune_step(step + 1)}
    return Ratios(
        statistics.median(references[step] for step in counted),
        [ratio for step, ratio in ratios.items() if step not in pruning],
        [ratio for step, ratio in ratios.items() if step in pruning],
        args.pattern,
    )


def measure(criterion: str, options: argparse.Namespace) -> TimedCallback:
    """Trains for `options.steps` steps, with a prune step at the start and one at the end."""
    model, data = new_model(options), new_data(options)
    callback = TimedCallback(
        PruningConfig(
            target_sparsity=0.8, criterion=criterion, prune_start=1, prune_every=10**6, prune_end=options.steps
        )
    )
    with tempfile.TemporaryDirectory() as directory:
        args = SparseTrainingArguments(directory, **training_options(options))
        SparseTrainer(model, args, train_dataset=data, callbacks=[callback]).train()
    start = time.perf_counter()
    callback.pruner.groups[0].prune(1, 2, callback.pruner.shards, callback.pruner.masks)
    callback.prune_step = time.perf_counter() - start
    masks = callback.pruner.masks
    stored = sum(masks.bits(name).numel() * masks.bits(name).element_size() for name in masks)
    callback.mask_bytes = stored / sum(weight.numel() for weight in callback.pruner.parameters.values())
    return callback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--criteria", nargs="*", default=["magnitude", "snip_momentum"])
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS), choices=list(TRAININGS))
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
        for name in options.trainings:
            ratios = measure_in_turns(name, options)
            median, low, high = quartiles(ratios.between)
            lines.append(
                f"{name:15s} {threads} thread(s): step {ratios.plain * 1e3:6.0f} ms without, {ratios.pattern}, ratio "
                f"{median:.4f} ({low:.4f} to {high:.4f}), with a prune step {statistics.median(ratios.pruning):.4f}"
            )
    print(f"\nsteps of {options.batch} x {options.tokens} tokens, medians over steps")
    print("\n".join(lines))
