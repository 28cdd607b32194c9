"""Measures pruning on one CUDA GPU: `python scripts/benchmarks/gpu.py OUTPUT_DIR`, or all of it by
`scripts/check_gpu.sh`.

Writes gpu.json and gpu.md, with a table of the main figures and one of all, to the output folder after each section. A
section that fails, or that runs out of time, is recorded and does not stop the others. `--tiny` runs every section
that the device allows at sizes that say nothing of speed: the tests do so on the CPU.

A read is the time of one `sum()` of each weight. Times of the GPU are taken with events, after a warm-up.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from unittest.mock import patch

import accelerate
import torch
import transformers
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse import OneshotConfig, Pruner, PruningConfig, accelerate_2of4, prune_oneshot, shrink
from hf_sparse.numerics import chunk_size
from hf_sparse.oneshot.layerwise import LayerPruner
from hf_sparse.oneshot.observers import InputObserver
from hf_sparse.patterns import get_pattern
from hf_sparse.patterns.n_of_m_kernel import keep_n_of_m
from hf_sparse.selection.scores import TensorScores
from hf_sparse.selection.threshold import find_thresholds
from hf_sparse.solvers import HessianFactor
from hf_sparse.solvers.sparsegpt import SparseGPT
from hf_sparse.statistics import GramMatrix, InputNorms


MODELS = {
    "1B": LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
    "7B": LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "tiny": LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
}
MB = 1e6
NOTES = (
    "Weights are random (a model from its config): sparsities and speeds are those of any weights, errors are not.",
)


# What the table of the main figures has, as patterns of names of rows.
SUMMARY = (
    "1B, half of neurons*",
    "copy on the device*",
    "exact global selection, 50%",
    "exact global selection, 50%: peak*",
    "whole prune step, magnitude, global",
    "whole prune step, magnitude, 2:4",
    "2:4 masks*keep_n_of_m",
    "training step, *",
    "enforcing masks",
    "observing gradients*",
    "1B: wanda, outputs of blocks on device",
    "1B: sparsegpt, outputs of blocks on device",
    "1B, 8 x 2048 tokens: dense / 2:4 time",
)


class OutOfTime(BaseException):
    """A section has used up its time. Not an `Exception`, so that no code that it interrupts catches it."""


# The report


@dataclass
class Row:
    """One line of the table: what was measured, its value, and the goal that it is held against."""

    section: str
    what: str
    value: str
    goal: str = ""
    met: bool | None = None


@dataclass
class Section:
    """The outcome of one section: "ok", "failed", "out of time" or "skipped", and all its numbers."""

    status: str = "ok"
    reason: str = ""
    seconds: float = 0.0
    results: dict = field(default_factory=dict)


class Report:
    """Collects sections and rows, and writes both files.

    Args:
        folder: for the files.
        machine: the device and the versions.
    """

    def __init__(self, folder: Path, machine: dict):
        self.folder, self.machine = folder, machine
        self.sections: dict[str, Section] = {}
        self.rows: list[Row] = []
        self.current = ""

    @property
    def results(self) -> dict:
        """The numbers of the current section."""
        return self.sections[self.current].results

    def row(self, what: str, value: str, goal: str = "", met: bool | None = None) -> None:
        self.rows.append(Row(self.current, what, value, goal, met))
        outcome = {True: " (met)", False: " (NOT met)", None: ""}[met]
        say(f"  {what}: {value}" + (f"; goal: {goal}{outcome}" if goal else ""))

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {
            "machine": self.machine,
            "sections": {name: asdict(section) for name, section in self.sections.items()},
            "rows": [asdict(row) for row in self.rows],
            "notes": NOTES,
        }
        (self.folder / "gpu.json").write_text(json.dumps(data, indent=1))
        (self.folder / "gpu.md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = [", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        lines += ["| what | measured | goal |", "|---|---|---|"]
        main = [row for pattern in SUMMARY for row in self.rows if fnmatch(row.what, pattern)]
        lines += [f"| {row.what} | {row.value} | {row.goal} |" for row in main]
        lines += ["", "| section | what | measured | goal | met |", "|---|---|---|---|---|"]
        for name, section in self.sections.items():
            met = {True: "yes", False: "no", None: ""}
            rows = [row for row in self.rows if row.section == name]
            lines += [f"| {name} | {row.what} | {row.value} | {row.goal} | {met[row.met]} |" for row in rows]
            if section.status != "ok":
                lines.append(f"| {name} | {section.status} | {one_line(section.reason)} | | |")
        return "\n".join([*lines, "", *(f"- {note}" for note in NOTES), ""])


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]


_started = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _started:6.1f} s] {text}", flush=True)


# Measuring


class Device:
    """What is measured on: a GPU, or the CPU, where there are no figures of memory and copies."""

    def __init__(self, name: str):
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def once(self, work: Callable[[], object]) -> float:
        """The seconds of one call, until the device has finished."""
        if not self.is_cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def seconds(self, work: Callable[[], object], repeats: int = 7) -> float:
        """The median of `repeats` calls after one that does not count."""
        work()
        return statistics.median(self.once(work) for _ in range(repeats))

    def free(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    @contextmanager
    def peak(self, result: dict, key: str) -> Iterator[None]:
        """Stores in `result[key]` the bytes that the context needs at its peak beyond what is held before."""
        self.synchronize()
        before = self.held()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        self.synchronize()
        result[key] = torch.cuda.max_memory_allocated() - before if self.is_cuda else 0

    def traffic(self, work: Callable[[], object]) -> dict:
        """The bytes that `work` copies to the host, and how often it waits for the device; by the profiler."""
        if not self.is_cuda:
            work()
            return {"host_bytes": 0, "host_copies": 0, "largest_copy": 0, "waits": 0, "kernels": 0}
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            work()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        copies = [
            event["args"].get("bytes", 0)
            for event in events
            if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]
        ]
        waits = [event for event in events if str(event.get("name")).startswith("cudaStreamSynchronize")]
        kernels = [event for event in events if event.get("cat") == "kernel"]
        return {
            "host_bytes": sum(copies),
            "host_copies": len(copies),
            "largest_copy": max(copies, default=0),
            "waits": len(waits),
            "kernels": len(kernels),
        }

    def kernels(self, work: Callable[[], object]) -> dict[str, float]:
        """The milliseconds of each kernel that `work` runs, by the profiler, the longest first."""
        if not self.is_cuda:
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        times = {event.key: event.self_device_time_total / 1e3 for event in profiler.key_averages()}
        return dict(sorted(times.items(), key=lambda item: -item[1])[:12])


@dataclass
class Setup:
    """Where, at which sizes and until when to measure."""

    on: Device
    report: Report
    tiny: bool
    deadline: float

    def model(self, size: str) -> nn.Module:
        """A Llama from its config with random weights, in bfloat16, initialised on the device."""
        torch.manual_seed(0)
        with torch.device(self.on.device):
            model = AutoModelForCausalLM.from_config(MODELS["tiny" if self.tiny else size], dtype=torch.bfloat16)
        return model.eval()

    def tokens(self, batch: int, length: int, generator: int = 0) -> torch.Tensor:
        random = torch.Generator().manual_seed(generator)
        return torch.randint(0, MODELS["tiny"].vocab_size, (batch, length), generator=random)


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """The weights of the blocks' linear layers, which are what is pruned by default."""
    return [module.weight.detach() for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def randomize(weights: list[torch.Tensor]) -> None:
    """Makes pruned weights dense again."""
    torch.manual_seed(0)
    for weight in weights:
        weight.normal_(0, 0.02)


def read(weights: list[torch.Tensor]) -> None:
    for weight in weights:
        weight.sum()


# Sections


def measure_device(setup: Setup) -> None:
    """The ceilings: bandwidth of memory, and matrix products."""
    on, size = setup.on, 1 << (12 if setup.tiny else 30)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=on.device) for _ in range(2))
    bandwidth = 2 * size / on.seconds(lambda: target.copy_(source))
    side = 64 if setup.tiny else 8192
    left, right = (torch.randn(side, side, device=on.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / on.seconds(lambda: left @ right)
    single = left.float()
    rate_float32 = 2 * side**3 / on.seconds(lambda: single @ single, 3)
    launch = on.seconds(lambda: [source[:1].add_(1) for _ in range(1000)], 3) / 1000
    setup.report.results.update(bandwidth=bandwidth, bf16=rate, float32=rate_float32, launch=launch)
    setup.report.row("copy on the device, bytes read and written", f"{bandwidth / 1e12:.2f} TB/s")
    setup.report.row(f"product of {side} x {side}, bfloat16", f"{rate / 1e12:.0f} TFLOP/s")
    setup.report.row(f"product of {side} x {side}, float32", f"{rate_float32 / 1e12:.0f} TFLOP/s")
    setup.report.row("one small kernel after another", f"{launch * 1e6:.1f} us")


def measure_ranking(setup: Setup) -> None:
    """Exact global selection by magnitude, and whole prune steps."""
    on, report = setup.on, setup.report
    model = setup.model("1B")
    weights = linear_weights(model)
    total, size = sum(weight.numel() for weight in weights), num_bytes(weights)
    one_read = on.seconds(lambda: read(weights))
    report.results.update(weights=total, layers=len(weights), read=one_read)
    report.row(f"one read of {total / 1e6:.0f}M bfloat16 weights", f"{one_read * 1e3:.2f} ms")

    def select(share: float) -> list:
        return find_thresholds([TensorScores(weight, magnitude=True) for weight in weights], int(share * total))

    for share in (0.5, 0.9):
        ratio = on.seconds(lambda: select(share)) / one_read
        found = report.results[f"select {share}"] = {"reads": ratio}
        with on.peak(found, "peak"):
            select(share)
        found |= on.traffic(lambda: select(share))
        thresholds = select(share)
        pruned = sum(
            int((weight.abs() < threshold.value).sum()) + threshold.num_ties
            for weight, threshold in zip(weights, thresholds, strict=True)
        )
        if pruned != int(share * total):
            raise AssertionError(f"{pruned} weights are selected instead of {int(share * total)}")
        name = f"exact global selection, {share:.0%}"
        report.row(name, f"{ratio:.1f} reads", "at most 6 reads", ratio <= 6)
        peak = found["peak"] / size
        report.row(f"{name}: peak beyond the weights", f"{peak:.1%} of their bytes", "at most 5%", peak <= 0.05)
        copied = (
            f"{found['host_bytes']} bytes in {found['host_copies']} copies, the largest of {found['largest_copy']}"
        )
        report.row(f"{name}: copied to the host", copied, "counts only", found["host_bytes"] <= 1_000_000)
        report.row(f"{name}: waits and kernels", f"{found['waits']} waits, {found['kernels']} kernels")
    prune_steps(setup, model, weights, one_read)


def prune_steps(setup: Setup, model: nn.Module, weights: list[torch.Tensor], one_read: float) -> None:
    """Whole prune steps: scores, threshold, masks, zeros and the report."""
    settings = {
        "magnitude, global": {"criterion": "magnitude"},
        "snip_momentum, global": {"criterion": "snip_momentum"},
        "magnitude, layer": {"criterion": "magnitude", "scope": "layer"},
        "magnitude, row": {"criterion": "magnitude", "scope": "row"},
        "magnitude, 2:4": {"criterion": "magnitude", "pattern": "2:4"},
        "magnitude, 4x1, global": {"criterion": "magnitude", "pattern": "4x1"},
    }
    for name, options in settings.items():
        randomize(weights)
        prune_step(setup, model, name, PruningConfig(target_sparsity=0.5, **options), one_read)
        setup.on.free()


def prune_step(setup: Setup, model: nn.Module, name: str, config: PruningConfig, one_read: float) -> None:
    on, found = setup.on, setup.report.results.setdefault(f"prune step {name}", {})
    pruner = Pruner(model, config)
    size = num_bytes(list(pruner.parameters.values()))
    if pruner.observes:
        for weight in pruner.parameters.values():
            weight.grad = torch.randn_like(weight)
        pruner.observe()
        model.zero_grad(set_to_none=True)
    with on.peak(found, "peak"):
        found["first"] = on.once(lambda: pruner.update(1, 1))
    sparsity = pruner.sparsity()
    if abs(sparsity - 0.5) > 1e-6:
        raise AssertionError(f"prune step {name} leaves sparsity {sparsity}")
    again = found["again"] = on.once(lambda: pruner.update(1, 1))
    times = f"first {found['first'] * 1e3:.1f} ms, then {again * 1e3:.1f} ms = {again / one_read:.1f} reads"
    setup.report.row(f"whole prune step, {name}", f"{times}, peak {found['peak'] / size:.1%} of the weights' bytes")


def measure_n_of_m(setup: Setup) -> None:
    """2:4 masks of |w|."""
    on, report = setup.on, setup.report
    weights = linear_weights(setup.model("1B"))
    one_read, masks = on.seconds(lambda: read(weights)), [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    report.results["read"] = one_read

    def write_masks() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            groups, mask_groups = weight.view(-1, 4), mask.view(-1, 4)
            step = max(1, chunk_size(weight.device) // 4)
            for start in range(0, len(groups), step):
                mask_groups[start : start + step] = keep_n_of_m(groups[start : start + step].float().abs_(), 2)

    def write_masks_by_topk() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            places = weight.view(-1, 4).abs().topk(2, dim=1)[1]
            mask.view(-1, 4).zero_().scatter_(1, places, True)

    for name, work, goal in (("keep_n_of_m", write_masks, 6), ("topk and scatter", write_masks_by_topk, None)):
        ratio = on.seconds(work, 5 if goal else 2) / one_read
        found = report.results[name] = {"reads": ratio}
        with on.peak(found, "peak"):
            work()
        if sum(int(mask.sum()) for mask in masks) * 2 != sum(mask.numel() for mask in masks):
            raise AssertionError(f"{name} does not keep half of the weights")
        text, met = (f"at most {goal} reads", ratio <= goal) if goal else ("", None)
        report.row(f"2:4 masks of |w|, {name}", f"{ratio:.1f} reads", text, met)


def measure_upkeep(setup: Setup) -> None:
    """What pruning adds to a training step between prune steps."""
    on, report = setup.on, setup.report
    batch, length = (2, 16) if setup.tiny else (8, 2048)
    model = setup.model("1B").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on.is_cuda)
    tokens = setup.tokens(batch, length).to(on.device)
    criteria = ("magnitude", "snip_momentum")
    pruners = {name: Pruner(model, PruningConfig(target_sparsity=0.5, criterion=name)) for name in criteria}

    def step(pruner: Pruner | None = None) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if pruner is not None and pruner.observes:
            pruner.observe()
        optimizer.step()
        if pruner is not None:
            pruner.enforce()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step(pruners["snip_momentum"])
    for pruner in pruners.values():
        pruner.update(1, 1)
    found = report.results
    with on.peak(found, "step_peak"):
        step()
    times: dict[str, list[float]] = {"plain": [], **{name: [] for name in pruners}}
    for _ in range(2 if setup.tiny else 7):
        times["plain"].append(on.once(step))
        for name, pruner in pruners.items():
            times[name].append(on.once(lambda pruner=pruner: step(pruner)))
    found["steps"] = times
    plain = statistics.median(times["plain"])
    report.row(f"training step, {batch} x {length} tokens, bfloat16", f"{plain * 1e3:.0f} ms")
    enforce = found["enforce"] = on.seconds(pruners["magnitude"].enforce, 20)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with on.peak(found, "observe_peak"):
        observe = found["observe"] = on.seconds(pruners["snip_momentum"].observe, 10)
    share = enforce / plain
    report.row("enforcing masks", f"{enforce * 1e3:.2f} ms, {share:.2%} of a step", "at most 1%", share <= 0.01)
    report.row("observing gradients (snip_momentum)", f"{observe * 1e3:.2f} ms, {observe / plain:.2%} of a step")
    for name in pruners:
        more = statistics.median(times[name]) / plain - 1
        goal, met = ("at most 1%", more <= 0.01) if name == "magnitude" else ("", None)
        report.row(f"whole steps with {name} against without, interleaved", f"{more:+.2%}", goal, met)
    traffic = found["traffic"] = on.traffic(
        lambda: (pruners["snip_momentum"].observe(), pruners["magnitude"].enforce())
    )
    report.row("observe and enforce: copied to the host", f"{traffic['host_bytes']} bytes, {traffic['waits']} waits")
    update = found["update"] = on.once(lambda: pruners["magnitude"].update(1, 1))
    report.row("a prune step (magnitude)", f"{update / plain:.2f} training steps")


class Phases:
    """The time of the statistics, the solving and the factors within a one-shot run: on a GPU between events, so that
    nothing waits for it that would not otherwise."""

    METHODS = {
        "statistics": (InputObserver, "observe"),
        "solve": (LayerPruner, "prune_layers"),
        "factors in it": (SparseGPT, "prepare"),
    }

    def __init__(self, on: Device):
        self.on = on
        self.marks: dict[str, list[tuple]] = {name: [] for name in self.METHODS}

    def _now(self) -> object:
        if not self.on.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, phase: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            start = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.marks[phase].append((start, self._now()))

        return run

    @contextmanager
    def watch(self) -> Iterator[None]:
        with ExitStack() as stack:
            for phase, (owner, name) in self.METHODS.items():
                stack.enter_context(patch.object(owner, name, self._timed(phase, getattr(owner, name))))
            yield

    @property
    def seconds(self) -> dict[str, float]:
        self.on.synchronize()
        if self.on.is_cuda:
            return {
                name: sum(start.elapsed_time(end) for start, end in marks) / 1e3 for name, marks in self.marks.items()
            }
        return {name: sum(end - start for start, end in marks) for name, marks in self.marks.items()}


GOAL_ONESHOT = "at most two forwards + 50%"
METHODS = {
    "wanda": {"target_sparsity": 0.5},
    "wanda 2:4": {"pattern": "2:4"},
    "sparsegpt": {"target_sparsity": 0.5, "solver": "sparsegpt"},
    "sparsegpt 2:4": {"pattern": "2:4", "solver": "sparsegpt"},
}


def oneshot(setup: Setup, size: str, methods: list[tuple[str, str]], samples: int) -> None:
    """One-shot pruning with calibration data of `samples` x 2048 tokens.

    Args:
        methods: pairs of a key of `METHODS` and where outputs of blocks are cached.
    """
    on, report = setup.on, setup.report
    batch, length = (2, 16) if setup.tiny else (8, 2048)
    samples = 4 if setup.tiny else samples
    data = [{"input_ids": setup.tokens(batch, length, seed)} for seed in range(samples // batch)]
    model = setup.model(size)
    weights = linear_weights(model)
    device_data = [each["input_ids"].to(on.device) for each in data]

    @torch.no_grad()
    def forward() -> None:
        for tokens in device_data:
            model.model(input_ids=tokens, use_cache=False)

    forward_memory: dict = {}
    with on.peak(forward_memory, "peak"), torch.no_grad():
        model.model(input_ids=device_data[0], use_cache=False)
    one_forward = on.once(forward)
    report.results.update(tokens=samples * length, forward=one_forward, forward_peak=forward_memory["peak"])
    tokens = f"{samples} x {length} tokens"
    report.row(f"{size}: one forward of {tokens}", f"{one_forward:.1f} s")
    config = model.config
    block = num_bytes(list(model.model.layers[0].parameters()))
    grams = 4 * (3 * config.hidden_size**2 + config.intermediate_size**2)
    cache = samples * length * config.hidden_size * 2
    if any("sparsegpt" in method for method, _ in methods):
        build_kernels(setup)
    for method, activations in methods:
        randomize(weights)
        phases, found = Phases(on), report.results.setdefault(f"{method}, {activations}", {})
        options = OneshotConfig(**METHODS[method], activations=activations)
        with phases.watch(), on.peak(found, "peak"):
            start = time.perf_counter()
            result = prune_oneshot(model, data, options, progress=False)
            on.synchronize()
            found["seconds"] = time.perf_counter() - start
        found |= {"phases": phases.seconds, "sparsity": result.sparsity}
        if abs(result.sparsity - 0.5) > 1e-4:
            raise AssertionError(f"{method} leaves sparsity {result.sparsity}")
        ratio = found["seconds"] / one_forward
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.seconds.items())
        name = f"{size}: {method}, outputs of blocks on {activations}"
        report.row(name, f"{found['seconds']:.1f} s = {ratio:.2f} forwards ({parts})", GOAL_ONESHOT, ratio <= 3)
        statistics_bytes = grams if "sparsegpt" in method else 0
        limit = block + statistics_bytes + forward_memory["peak"] + (cache if activations == "device" else 0)
        report.row(
            f"{name}: peak beyond the model",
            f"{found['peak'] / MB:.0f} MB",
            f"at most a block, its statistics, a forward and the outputs kept: {limit / MB:.0f} MB",
            found["peak"] <= limit,
        )
        report.write()


def build_kernels(setup: Setup) -> None:
    """Builds the kernels of SparseGPT, which takes time once on a machine."""
    size = 256 if setup.tiny else 1024  # from 1024 inputs on blocks are as wide as in larger weights
    weight, gram = torch.randn(size, size, device=setup.on.device), torch.eye(size, device=setup.on.device)
    start = time.perf_counter()
    for pattern in ("unstructured", "2:4"):
        SparseGPT().solve(weight, gram, get_pattern(pattern), 0.5)
    setup.on.synchronize()
    setup.report.row("building the kernels of SparseGPT", f"{time.perf_counter() - start:.1f} s")


def measure_sparsegpt(setup: Setup) -> None:
    """The parts of SparseGPT: the Gram matrix, its factor, and the blocks of columns of a weight."""
    on, report = setup.on, setup.report
    tokens, sizes = (64, [(64, 64)]) if setup.tiny else (16_384, [(16_384, 2048), (2048, 8192), (4096, 11_008)])
    for rows, columns in sizes:
        x = torch.randn(tokens, columns, device=on.device, dtype=torch.bfloat16)
        gram = GramMatrix(columns, on.device)
        seconds = {"Gram matrix": on.seconds(lambda gram=gram, x=x: gram.observe(x), 3)}
        norms = InputNorms(columns, on.device)
        seconds["norms"] = on.seconds(lambda norms=norms, x=x: norms.observe(x), 3)
        factor = HessianFactor(gram)
        seconds["factor"] = on.seconds(lambda gram=gram: HessianFactor(gram), 3)
        weight = torch.randn(rows, columns, device=on.device)
        mask = weight.abs() > 0.67
        for name, options in {
            "given mask": {"mask_RC": mask},
            "unstructured": {"pattern": get_pattern("unstructured"), "sparsity": 0.5},
            "2:4": {"pattern": get_pattern("2:4"), "sparsity": 0.5},
        }.items():
            solve = partial(SparseGPT().solve, weight, factor, **options)
            solve()
            seconds[f"solve, {name}"] = on.seconds(solve, 3)
            kernels = on.kernels(solve)
            report.results[f"{rows} x {columns}, {name}: kernels"] = kernels
            longest = ", ".join(f"{kernel[:40]} {time:.1f} ms" for kernel, time in list(kernels.items())[:4])
            report.row(f"{rows} x {columns}, {name}: longest kernels", longest)
        report.results[f"{rows} x {columns}"] = seconds
        report.row(
            f"{rows} x {columns}, {tokens} tokens",
            ", ".join(f"{name} {time * 1e3:.2f} ms" for name, time in seconds.items()),
        )
        report.write()


def measure_oneshot_1b(setup: Setup) -> None:
    """One-shot pruning of the 1B model."""
    methods = [("wanda", "cpu"), ("wanda", "device"), ("wanda 2:4", "device")]
    methods += [("sparsegpt", "device"), ("sparsegpt 2:4", "device")]
    oneshot(setup, "1B", methods, 64)


def measure_oneshot_7b(setup: Setup) -> None:
    """One-shot pruning of the 7B model."""
    oneshot(setup, "7B", [("sparsegpt", "device"), ("wanda", "device"), ("wanda", "cpu")], 128)


def measure_offload(setup: Setup) -> None:
    """One-shot pruning of a model whose weights stay on the CPU."""
    on, report = setup.on, setup.report
    model = setup.model("1B").cpu()
    on.free()
    total = num_bytes(list(model.parameters()))
    model = cpu_offload(model, execution_device=on.device)
    batch, length, samples = (2, 16, 4) if setup.tiny else (4, 2048, 32)
    data = [{"input_ids": setup.tokens(batch, length, seed)} for seed in range(samples // batch)]
    for method in ("wanda",) if setup.tiny else ("wanda", "sparsegpt"):
        found = report.results[method] = {}
        with on.peak(found, "peak"):
            found["seconds"] = on.once(
                lambda method=method: prune_oneshot(model, data, OneshotConfig(**METHODS[method]), progress=False)
            )
        report.row(f"1B on the CPU, {method}, {samples} x {length} tokens", f"{found['seconds']:.1f} s")
        share = found["peak"] / total
        report.row(f"1B on the CPU, {method}: peak on the GPU", f"{share:.0%} of the model", "below 100%", share < 1)


SHAPES = {
    "4096 x 4096": (4096, 4096),
    "11008 x 4096": (11_008, 4096),
    "4096 x 11008": (4096, 11_008),
    "8192 x 2048": (8192, 2048),
    "2048 x 8192": (2048, 8192),
}


def measure_semi_structured(setup: Setup) -> None:
    """Speed of torch's 2:4 kernels, per layer and number of tokens, each with its fastest algorithm."""
    report, tensors = setup.report, torch.sparse.SparseSemiStructuredTensor
    shapes, counts = ({"64 x 64": (64, 64)}, (16,)) if setup.tiny else (SHAPES, (16, 256, 4096, 16_384))
    for kernel, cutlass in (("cuSPARSELt", False), ("CUTLASS", True)):
        with patch.object(tensors, "_FORCE_CUTLASS", cutlass):
            for name, (rows, columns) in shapes.items():
                for graphs in (False, True):
                    found = [semi_structured_speed(setup, rows, columns, count, graphs) for count in counts]
                    how = "CUDA graphs" if graphs else "single calls"
                    report.results[f"{kernel}, {name}, {how}"] = found
                    values = [f"{each['tokens']}: {each.get('speedup', each.get('refused'))}" for each in found]
                    if any("speedup" in each for each in found):
                        report.row(f"{kernel}, {how}, {name}: dense / 2:4 time, by tokens", "; ".join(values))
                if not any("speedup" in each for each in found):  # by the device, whatever the shape
                    report.row(f"{kernel}, all shapes", found[0]["refused"])
                    break
        report.write()


def semi_structured_speed(setup: Setup, rows: int, columns: int, tokens: int, graphs: bool) -> dict:
    layer = nn.Linear(columns, rows, bias=False, device=setup.on.device, dtype=torch.bfloat16).requires_grad_(False)
    mask = keep_n_of_m(layer.weight.float().abs().view(-1, 4), 2).view(rows, columns)
    layer.weight.mul_(mask)
    try:
        (outcome,) = accelerate_2of4(layer, (tokens,), cuda_graphs=graphs, echo=lambda text: None).layers
    except RuntimeError as error:
        return {"tokens": tokens, "refused": f"refused: {one_line(str(error))[:80]}"}
    if not outcome.speeds:
        return {"tokens": tokens, "refused": one_line(str(outcome.reason))[:90]}
    (speed,) = outcome.speeds
    return {"tokens": tokens, "dense": speed.dense, "sparse": speed.sparse, "speedup": f"{speed.speedup:.2f}x"}


@torch.no_grad()
def measure_shrunk_model(setup: Setup) -> None:
    """Speed of the 1B model without half of its neurons and key-value groups, which are removed."""
    on, report, dense = setup.on, setup.report, setup.model("1B")
    groups = {"neurons": {"pattern": "neuron"}, "heads": {"pattern": "head"}}
    Pruner(dense, PruningConfig(target_sparsity=0.5, criterion="magnitude", groups=groups)).update(1, 1)
    start = time.perf_counter()
    small = shrink(dense)
    report.row("1B: shrinking, with a comparison of outputs", f"{time.perf_counter() - start:.1f} s")
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    report.row("1B: parameters, dense and shrunk", f"{sizes[0] / 1e6:.0f}M, {sizes[1] / 1e6:.0f}M")
    for batch, length in [(2, 16)] if setup.tiny else [(64, 1), (1, 512), (8, 2048)]:
        ids = setup.tokens(batch, length).to(on.device)
        times = [on.seconds(lambda model=model: model(ids, use_cache=False)) for model in (dense, small)]
        report.results[f"shrunk {batch} x {length}"] = times
        report.row(
            f"1B, half of neurons and KV groups removed, {batch} x {length} tokens",
            f"{times[1] / times[0]:.2f} of the dense time ({times[1] * 1e3:.1f} ms)",
        )


def measure_semi_structured_model(setup: Setup) -> None:
    """Speed of the whole 1B model after accelerate_2of4."""
    report, model = setup.report, setup.model("1B")
    Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude")).update(1, 1)
    sizes = [(2, 16)] if setup.tiny else [(64, 1), (1, 512), (8, 2048)]
    for batch, length in sizes:
        for graphs in (False, True):
            how = f"{batch} x {length} tokens, {'CUDA graphs' if graphs else 'single calls'}"
            try:
                accelerated_model(setup, copy.deepcopy(model), how, batch, length, graphs)
            except (RuntimeError, ValueError, NotImplementedError) as problem:
                report.row("1B: 2:4 kernels", f"refused: {one_line(str(problem))}")
                if not setup.on.is_cuda:
                    return
            setup.on.free()


@torch.no_grad()
def accelerated_model(setup: Setup, model: nn.Module, how: str, batch: int, length: int, graphs: bool) -> None:
    on, report = setup.on, setup.report
    tokens, held = setup.tokens(batch, length).to(on.device), on.held()

    def forward() -> torch.Tensor:
        return model.model(input_ids=tokens, use_cache=False).last_hidden_state

    def timed() -> tuple[float, torch.Tensor]:
        if not graphs:
            return on.seconds(forward, 5), forward()
        forward()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = forward()
        return on.seconds(graph.replay, 5), output.clone()

    dense, expected = timed()
    start = time.perf_counter()
    outcome = accelerate_2of4(model, (batch * length,), cuda_graphs=graphs, echo=lambda text: None)
    took = time.perf_counter() - start
    found = report.results[how] = {"dense": dense, "swapped": outcome.swapped, "table": str(outcome), "took": took}
    text = (
        f"{outcome.swapped} of {len(outcome.layers)} layers swapped in {took:.1f} s, model dense {dense * 1e3:.1f} ms"
    )
    if outcome.swapped:
        on.free()
        found["sparse"], output = timed()
        found["error"] = float((output - expected).float().norm() / expected.float().norm())
        found["bytes"] = on.held() - held
        text += f", dense / 2:4 time {dense / found['sparse']:.2f}x (error {found['error']:.1e})"
    report.row(f"1B, {how}", text)


# Name: what measures it, and the most seconds that it may take.
SECTIONS: dict[str, tuple[Callable[[Setup], None], float]] = {
    "device": (measure_device, 20),
    "ranking": (measure_ranking, 50),
    "n_of_m": (measure_n_of_m, 20),
    "upkeep": (measure_upkeep, 50),
    "sparsegpt": (measure_sparsegpt, 20),
    "oneshot_1b": (measure_oneshot_1b, 60),
    "semi_structured": (measure_semi_structured, 45),
    "semi_structured_model": (measure_semi_structured_model, 30),
    "shrunk_model": (measure_shrunk_model, 30),
    "offload": (measure_offload, 45),
    "oneshot_7b": (measure_oneshot_7b, 90),
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the context after this many seconds. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_section(setup: Setup, name: str) -> None:
    report, (measure, limit) = setup.report, SECTIONS[name]
    section = report.sections[name] = Section()
    report.current = name
    left = setup.deadline - time.perf_counter()
    if left < 5:
        section.status, section.reason = "skipped", "the time for the measurements is used up"
        say(f"{name}: {section.status}, {section.reason}")
        return
    say(f"{name}: {measure.__doc__}")
    start = time.perf_counter()
    try:
        with time_limit(min(limit, left)):
            measure(setup)
    except OutOfTime as error:
        section.status, section.reason = "out of time", str(error)
    except Exception as error:
        section.status, section.reason = "failed", f"{type(error).__name__}: {error}"
        section.results["traceback"] = traceback.format_exc()
        traceback.print_exc()
    section.seconds = time.perf_counter() - start
    setup.on.free()
    say(f"{name}: {section.status} {section.reason} after {section.seconds:.1f} s")


def machine(on: Device) -> dict:
    name = torch.cuda.get_device_name() if on.is_cuda else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"accelerate": accelerate.__version__, "python": platform.python_version()}
    return {"device": name, **versions}


def main(argv: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seconds", type=float, default=330, help="for all sections together")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing of speed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    on = Device(options.device)
    if not on.is_cuda and not options.tiny:
        parser.error("torch finds no CUDA device: only --tiny runs on the CPU")
    report = Report(options.output_dir, machine(on))
    setup = Setup(on, report, options.tiny, time.perf_counter() + options.seconds)
    say(f"{report.machine}")
    for name in options.sections:
        run_section(setup, name)
        report.write()
    print(report.markdown())
    return report


if __name__ == "__main__":
    main()
    sys.exit(0)
