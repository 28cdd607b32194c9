"""One-shot pruning of a Llama with random weights: `python scripts/benchmarks/bench.py oneshot`.

Compares each method, with two forwards per block and with one, to a plain implementation (`oneshot_plain.py`), in one
process, on the same data, alternating:

    forwards    time in units of one forward of all calibration data through the blocks of the dense model, which is
                measured (for a part of the data) just before and after: total, and the parts for statistics and for
                selecting, solving and tuning (10 steps of 16 samples; 300 are the default); the rest are forwards
    peak        memory beyond that before the run, in units of the model, and its maximum while solving
    plain       time of the plain implementation divided by this time

Times are medians over `--repeats`: CPU time with one thread, else wall-clock time. First both implementations must
give the same masks on a small model, up to rounding, and similar errors. `prototype` is the time and peak of early
prototypes of the methods for 16 x 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import oneshot_plain as plain
import torch
from memory import give_back, resident, restart_peak
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse.oneshot import OneshotConfig, prune_oneshot
from hf_sparse.oneshot.layerwise import LayerPruner
from hf_sparse.oneshot.observers import InputObserver
from hf_sparse.oneshot.reconstruct import BlockReconstructor


PHASES = ("forward", "statistics", "solve")
PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """Options of the package and of the plain implementation; time and peak of the prototypes for both forms."""

    options: dict[str, Any]
    plain: dict[str, bool] | None = None
    prototypes: dict[int, str] = field(default_factory=dict)


METHODS = {
    "magnitude": Method({"criterion": "magnitude"}),
    "wanda": Method(
        {"criterion": "wanda"},
        {"solves": False, "by_wanda": True, "of_four": False},
        {2: "2.10 0.2x", 1: "1.50 0.8x"},
    ),
    "sparsegpt": Method(
        {"solver": "sparsegpt", "solver_kwargs": {"block_size": plain.BLOCK}},
        {"solves": True, "by_wanda": False, "of_four": False},
        {2: "2.75 0.5x", 1: "1.95 0.9x"},
    ),
    "wanda+sparsegpt": Method(
        {"criterion": "wanda", "solver": "sparsegpt", "solver_kwargs": {"block_size": plain.BLOCK}},
        {"solves": True, "by_wanda": True, "of_four": False},
    ),
    "admm": Method(
        {"solver": "admm", "solver_kwargs": {"iterations": plain.ITERATIONS}},
        {"solves": True, "by_wanda": False, "of_four": False, "alternates": True},
    ),
    "wanda 2:4": Method(
        {"criterion": "wanda", "pattern": "2:4"}, {"solves": False, "by_wanda": True, "of_four": True}
    ),
    "sparsegpt 2:4": Method(
        {"solver": "sparsegpt", "pattern": "2:4", "solver_kwargs": {"block_size": plain.BLOCK}},
        {"solves": True, "by_wanda": False, "of_four": True},
    ),
    "wanda+tuning": Method(
        {"criterion": "wanda", "reconstruct": True, "reconstruct_kwargs": {"steps": 10, "learning_rate": 0.01}}
    ),
}


class Meter:
    """Measures time and memory of phases, of which one is always active: "forward" by default."""

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peak = dict.fromkeys(PHASES, 0)
        self._now = PHASES[0]

    def measure(self, work: Callable[[], object]) -> Meter:
        give_back()
        self._before = resident()
        restart_peak()
        self._since = clock()
        work()
        self._switch(PHASES[0])
        return self

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> str:
        before, self._now = self._now, name
        self.seconds[before] += clock() - self._since
        self.peak[before] = max(self.peak[before], resident("VmHWM") - self._before)
        restart_peak()
        self._since = clock()
        return before

    def watched(self, name: str, function: Callable) -> Callable:
        def called(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return called

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def build(layers: int, hidden: int, intermediate: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def calibration(samples: int, length: int, batch: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.split(batch)]


class Bench:
    """A model that is made dense again before each run."""

    def __init__(self, model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]):
        self.model, self.batches = model, batches
        self._dense = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self._dense.values())

    @torch.no_grad()
    def restore(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.data = weight.data.copy_(self._dense[name])

    @torch.no_grad()
    def outputs(self, batches: Sequence[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield self.model.model(**batch, use_cache=False)[0]

    def forward(self) -> float:
        """Returns the seconds of one forward of all data through all blocks, estimated from every fourth batch."""
        self.restore()
        part = self.batches[::4]
        start = clock()
        for _ in self.outputs(part):
            pass
        return (clock() - start) * len(self.batches) / len(part)

    def prune(self, method: Method, form: int | str) -> Meter:
        """Prunes the dense model with one or two forwards per block, or with the plain implementation."""
        self.restore()
        meter = Meter()
        if form == PLAIN:
            return meter.measure(lambda: plain.prune(self.model, self.batches, meter, **method.plain))
        forwards = None if method.plain is None else form  # magnitude observes no inputs
        config = OneshotConfig(target_sparsity=0.5, forwards=forwards, **method.options)
        watched = {
            (InputObserver, "observe"): "statistics",
            (LayerPruner, "prune_layers"): "solve",
            (LayerPruner, "prune_without_inputs"): "solve",
            (BlockReconstructor, "reconstruct"): "solve",
        }
        with ExitStack() as patches:
            for (owner, name), phase in watched.items():
                patches.enter_context(patch.object(owner, name, meter.watched(phase, getattr(owner, name))))
            return meter.measure(lambda: prune_oneshot(self.model, self.batches, config, progress=False))


def forms(method: Method, options: argparse.Namespace) -> list[int | str]:
    if method.plain is None:
        return [2]  # without forwards, or with two
    return [*options.forwards, *([] if options.alone else [PLAIN])]


# The same result


def check() -> None:
    """Checks that both implementations give the same masks and errors."""
    bench = Bench(build(2, 192, 320, 1000), calibration(4, 96, 2, 1000))
    dense = torch.cat(list(bench.outputs(bench.batches)))
    print("on a small model       masks that differ   error ‖Y - Ŷ‖²/‖Y‖²: two forwards, one, plain")
    for name, method in METHODS.items():
        if method.plain is None:
            continue
        zeros, errors = {}, {}
        for form in (2, 1, PLAIN):
            bench.prune(method, form)
            zeros[form] = torch.cat([layer.weight.eq(0).flatten() for layer in _linears(bench.model)])
            difference = torch.cat(list(bench.outputs(bench.batches))) - dense
            errors[form] = float(difference.square().sum() / dense.square().sum())
        differ = float((zeros[2] != zeros[PLAIN]).float().mean())
        print(f"{name:22s} {differ:17.4%}   {errors[2]:.4f}, {errors[1]:.4f}, {errors[PLAIN]:.4f}")
        # Where scores are almost equal rounding decides, and later columns of the row or block depend on it; after
        # many iterations a few percent of the mask, with equal errors.
        assert differ < (3e-2 if method.plain.get("alternates") else 1e-3)
        assert abs(errors[2] / errors[PLAIN] - 1) < 0.01
        assert abs(errors[1] / errors[PLAIN] - 1) < 0.2


def _linears(model: LlamaForCausalLM) -> Iterator[torch.nn.Linear]:
    return (module for module in model.model.modules() if isinstance(module, torch.nn.Linear))


# The measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--forwards", type=int, nargs="+", choices=(1, 2), default=[2, 1])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens per sample")
    parser.add_argument("--batch", type=int, default=1, help="samples per forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without the plain implementation, which is slow")


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    check()
    model = build(options.layers, options.hidden, options.intermediate, options.vocabulary)
    bench = Bench(model, calibration(options.samples, options.length, options.batch, options.vocabulary))
    weights = sum(layer.weight.numel() for layer in _linears(model))
    bench.forward()
    before = bench.forward()
    print(
        f"\n{weights / 1e6:.0f}M weights to prune to 50% in a model of {bench.bytes / 1e6:.0f} MB, {options.samples} "
        f"x {options.length} tokens in batches of {options.batch}, {options.threads} thread(s), one forward "
        f"{before:.1f} s"
    )
    print("method           form     seconds  forwards = forward + stats + solve   peak  solving  plain  prototype")
    for name in options.methods:
        order = forms(METHODS[name], options)
        found: dict[int | str, list[tuple[float, Meter]]] = {form: [] for form in order}
        for repeat in range(options.repeats):
            for form in order if repeat % 2 == 0 else order[::-1]:
                meter, after = bench.prune(METHODS[name], form), bench.forward()
                found[form].append(((before + after) / 2, meter))
                before = after
        for form in order:
            _print(name, form, bench.bytes, found[form], found.get(PLAIN))


def _print(name: str, form: int | str, size: int, runs, plainly) -> None:
    def median(value: Callable[[float, Meter], float]) -> float:
        return statistics.median(value(unit, meter) for unit, meter in runs)

    shares = [median(lambda unit, meter, phase=phase: meter.seconds[phase] / unit) for phase in PHASES]
    against = ""
    if plainly is not None and form != PLAIN:
        pairs = zip(plainly, runs, strict=True)
        against = f"{statistics.median(other.total / own.total for (_, other), (_, own) in pairs):.2f}x"
    seconds, total = median(lambda _, meter: meter.total), median(lambda unit, meter: meter.total / unit)
    peak = median(lambda _, meter: max(meter.peak.values())) / size
    solving = median(lambda _, meter: meter.peak["solve"]) / size
    print(
        f"{name:16s} {form!s:7} {seconds:8.1f}  {total:8.2f} = {shares[0]:7.2f} + {shares[1]:5.2f} + {shares[2]:5.2f}"
        f"  {peak:5.2f}x   {solving:5.2f}x {against:>6}  {METHODS[name].prototypes.get(form, '')}",
        flush=True,
    )
