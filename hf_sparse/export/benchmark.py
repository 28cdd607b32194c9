"""Measures the speed, the size and the memory of models side by side.

The models run in turns, so that a change of the machine's speed meets all of them, and are compared by ratios of
times measured next to each other:

    ratio = median over rounds of  time of a model in the round / time of the first model in the round
"""

from __future__ import annotations

import multiprocessing
import statistics
import string
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

from ..distributed import parse_device
from ..hub.loading import load_model
from ..hub.sources import check_model
from ..optional_packages import require
from ..reporting.tables import Table
from ..reporting.tabular import Tabular
from .inputs import random_inputs
from .onnx import ONNX_FILE, to_onnx
from .openvino import OPENVINO_FILE, to_openvino
from .runtimes import (
    PACKAGES,
    Runtime,
    exported_runtime,
    generation_runtime,
    installed_runtimes,
    onnx_runtime,
    open_exported,
    openvino_runtime,
    torch_runtime,
)


_LABELS = string.ascii_uppercase
_WARM_UP, _MIN_ROUNDS, _MAX_ROUNDS = 2, 5, 200


@dataclass(frozen=True)
class ModelSize:
    """Number of parameters, file size and peak memory of a model.

    Args:
        name: the folder or Hub name.
        parameters: number of parameters; None for an exported model.
        file_size: bytes of the files with weights.
        peak_memory: bytes by which a process grows that loads the model and runs the largest batch in torch; on a GPU
            the peak of its memory. None for an exported model, and where the system does not tell it.
    """

    name: str
    parameters: int | None
    file_size: int
    peak_memory: int | None


@dataclass(frozen=True)
class Latency:
    """Times of one model in one runtime at one batch size.

    Args:
        model, runtime: names.
        batch_size: number of texts or images.
        median: of the times of one batch, in seconds.
        ratio: median over rounds of its time / the time of the first model in the same runtime.
        low, high: the quartiles of these ratios.
        to_reference: the same ratio to the first model in the first runtime.
    """

    model: str
    runtime: str
    batch_size: int
    median: float
    ratio: float
    low: float
    high: float
    to_reference: float


@dataclass(frozen=True, repr=False)
class BenchmarkResult(Tabular):
    """The figures of `benchmark_models`, which print as two tables."""

    sizes: tuple[ModelSize, ...]
    latencies: tuple[Latency, ...]
    length: int
    clock: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        count = len(self.latencies)
        latencies = f"{count} latenc{'y' if count == 1 else 'ies'}"
        return f"BenchmarkResult({', '.join(size.name for size in self.sizes)}; {latencies})"

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        labels = dict(zip((size.name for size in self.sizes), _LABELS, strict=False))
        sizes: list[tuple[str, ...]] = []
        for size in self.sizes:
            parameters = "" if size.parameters is None else f"{size.parameters:,}"
            peak = "" if size.peak_memory is None else f"{size.peak_memory / 1e6:.0f}"
            sizes.append((labels[size.name], size.name, parameters, f"{size.file_size / 1e6:.1f}", peak))
        first = self.sizes[0].name
        rows: list[tuple[str, ...]] = []
        for row in self.latencies:
            rows.append(
                (str(row.batch_size), row.runtime, labels[row.model], f"{row.median * 1e3:.2f}", f"{row.ratio:.2f}")
                + (f"{row.low:.2f}-{row.high:.2f}", f"{row.to_reference:.2f}")
            )
        reference = f"{labels[first]} in {self.latencies[0].runtime}"
        note = f"{self.clock} of one batch; sequences of {self.length} tokens; the reference is {reference}."
        header = ("batch", "runtime", "model", "ms", f"/ {labels[first]}", "quartiles", "/ reference")
        size_table = Table(("", "model", "parameters", "file MB", "peak MB"), tuple(sizes), 2)
        return [size_table, Table(header, tuple(rows), 3), note]


def benchmark_models(
    models: Sequence[str],
    batch_sizes: Sequence[int] = (1, 8, 32),
    length: int = 128,
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 20.0,
    device: str = "cpu",
) -> BenchmarkResult:
    """Measures models side by side, on random inputs without padding.

    Args:
        models: checkpoints (folders or Hub names), and folders that `export_model` wrote, which run in their own
            runtime. The first is what the others are compared with.
        batch_sizes: numbers of texts or images in a batch.
        length: number of tokens of each text.
        runtimes: of "torch", "compile" (`torch.compile`), "onnx" (ONNX Runtime) and "openvino", for one forward, for
            which checkpoints are exported as needed, and "generate", for 32 new tokens in torch after texts of
            `length` tokens. None for torch and what is installed of onnx and openvino.
        threads: number of threads; None for all cores. With one thread CPU time is measured, which other processes
            on the machine disturb less, else wall time.
        seconds: about how long to measure each batch size. At least 5 rounds are run.
        device: "cpu" or "cuda", for torch.

    Raises:
        ImportError: a runtime is not installed.
        OSError: there is no such model.
        ValueError: an option is not valid, or a model takes neither texts nor images.
    """
    _check(models, batch_sizes, runtimes, device)
    names = _default_runtimes(device) if runtimes is None else list(runtimes)
    old_threads = torch.get_num_threads()
    torch.set_num_threads(threads or old_threads)
    is_cpu_time = threads == 1 and device == "cpu"
    clock = time.process_time if is_cpu_time else time.perf_counter
    try:
        with TemporaryDirectory() as folder:
            cases = _open(models, names, threads, device, Path(folder))
            inputs_of = next(model for model in map(_config_model, models) if model is not None)
            latencies: list[Latency] = []
            for batch_size in batch_sizes:
                inputs = random_inputs(inputs_of, batch_size, length)
                latencies += _compare(_time_in_turns(cases, inputs, seconds, clock), batch_size)
    finally:
        torch.set_num_threads(old_threads)
    sizes = tuple(_measure_size(model, max(batch_sizes), length, device) for model in models)
    return BenchmarkResult(sizes, tuple(latencies), length, "CPU time" if is_cpu_time else "wall time")


def _check(models: Sequence[str], batch_sizes: Sequence[int], runtimes: Sequence[str] | None, device: str) -> None:
    if len(set(models)) != len(models):
        raise ValueError("a model is named twice: name each once.")
    if len(models) > len(_LABELS):
        raise ValueError(f"{len(models)} models are too many for one table: name at most {len(_LABELS)}.")
    for name in runtimes or ():
        if name not in PACKAGES:
            raise ValueError(f'`runtime` is "{name}": it must be one of {", ".join(PACKAGES)}.')
        require("export", *PACKAGES[name])
    parse_device(device)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"`batch` is {list(batch_sizes)}: it must be one or more numbers from 1.")
    if device != "cpu" and set(runtimes or ()) & {"onnx", "openvino"}:
        raise ValueError(f'`device` is "{device}": onnx and openvino are measured on the CPU only.')
    if device != "cpu" and (exported := [model for model in models if exported_runtime(model)]):
        raise ValueError(f'`device` is "{device}": {exported[0]} is exported, and measured on the CPU only.')
    for model in models:
        if exported_runtime(model) is None:
            check_model(model)
    if all(exported_runtime(model) for model in models):
        raise ValueError("all models are exported: name a checkpoint as well, whose inputs are used.")


def _default_runtimes(device: str) -> list[str]:
    return ["torch"] if device != "cpu" else [name for name in installed_runtimes() if name != "compile"]


def _config_model(model: str) -> transformers.PreTrainedModel | None:
    """Returns a checkpoint as a model on the meta device, which says what inputs it takes; None if it is exported."""
    if exported_runtime(model):
        return None
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def _open(
    models: Sequence[str], runtimes: Sequence[str], threads: int | None, device: str, folder: Path
) -> list[tuple[str, str, Runtime]]:
    """Returns (model, runtime, function) of each case. Checkpoints are exported to `folder` as needed."""
    cases = []
    for index, name in enumerate(models):
        if own := exported_runtime(name):
            cases.append((name, own, open_exported(name, threads)))
            continue
        model = load_model(name, device=device)
        for runtime in runtimes:
            path = folder / str(index) / runtime
            path.mkdir(parents=True)
            if runtime == "onnx":
                to_onnx(model, path / ONNX_FILE)
                cases.append((name, runtime, onnx_runtime(path / ONNX_FILE, threads)))
            elif runtime == "openvino":
                to_openvino(model.float(), path / OPENVINO_FILE)
                cases.append((name, runtime, openvino_runtime(path / OPENVINO_FILE, threads)))
            elif runtime == "generate":
                cases.append((name, runtime, generation_runtime(model)))
            else:
                cases.append((name, runtime, torch_runtime(model, compiled=runtime == "compile")))
    return cases


def _time_in_turns(
    cases: Sequence[tuple[str, str, Runtime]],
    inputs: dict[str, torch.Tensor],
    seconds: float,
    clock: Callable[[], float],
) -> dict[tuple[str, str], list[float]]:
    """Returns the times of each case, one of each round."""
    for _, _, run in cases:
        for _ in range(_WARM_UP):
            run(inputs)
    times: dict[tuple[str, str], list[float]] = {(model, runtime): [] for model, runtime, _ in cases}
    end = time.perf_counter() + seconds
    for index in range(_MAX_ROUNDS):
        if index >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for model, runtime, run in cases:
            start = clock()
            run(inputs)
            times[model, runtime].append(clock() - start)
    return times


def _compare(times: dict[tuple[str, str], list[float]], batch_size: int) -> list[Latency]:
    """Returns the latencies, with ratios to the first model in the same runtime and to the first case."""
    reference = next(iter(times.values()))
    rows = []
    for (model, runtime), values in times.items():
        same_runtime = next(other for (_, name), other in times.items() if name == runtime)
        ratios = [value / other for value, other in zip(values, same_runtime, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        to_reference = statistics.median(value / other for value, other in zip(values, reference, strict=True))
        rows.append(Latency(model, runtime, batch_size, statistics.median(values), ratio, low, high, to_reference))
    return sorted(rows, key=lambda row: [name for _, name in times].index(row.runtime))


def _measure_size(model: str, batch_size: int, length: int, device: str) -> ModelSize:
    # The files of a model on the Hub are in the cache since it was loaded.
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))
    files = [file for ending in ("safetensors", "bin", "onnx", "data") for file in folder.glob(f"*.{ending}")]
    file_size = sum(file.stat().st_size for file in files if file.name != "training_args.bin")
    if exported_runtime(model):
        return ModelSize(model, None, file_size, None)
    # In a process of its own: memory that other models have freed would be used again without counting.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        parameters, peak = pool.submit(_load_and_run, model, batch_size, length, device).result()
    return ModelSize(model, parameters, file_size, peak)


def _load_and_run(name: str, batch_size: int, length: int, device: str) -> tuple[int, int | None]:
    """Returns the number of parameters and the growth of this process's peak memory, in bytes, where it is known."""
    before = _reset_peak_memory()
    model = load_model(name, device=device)
    torch_runtime(model)(random_inputs(model, batch_size, length))
    if device != "cpu":
        peak: int | None = torch.cuda.max_memory_allocated(device)
    else:
        peak = None if before is None else _memory("VmHWM") - before
    return sum(parameter.numel() for parameter in model.parameters()), peak


def _reset_peak_memory() -> int | None:
    """Makes the peak the present memory of this process, and returns it, in bytes; None where that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except OSError:
        return None


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
