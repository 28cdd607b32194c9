"""Quality of one-shot pruning methods: a metric of each pruned model, with the time and memory of the run.

    python scripts/benchmarks/oneshot_quality.py MODEL train.jsonl dev.jsonl test.jsonl \\
        --targets 50% 2:4 --methods wanda sparsegpt+owl --output rows.jsonl

A target is a sparsity, a pattern, or both (neuron@50%). A method is one or more parts joined by "+", whose options
are merged: those listed below, and those of `--part NAME=JSON`. Each run starts from the dense model, and appends
one row to the output: perplexity or accuracy on each file, seconds, the peak of the resident memory beyond that
before the run, and the share of zeros among the selected weights. Runs whose rows are in the output already are left
out, so that a table can be interrupted and continued. At the end all rows of these targets and methods are printed as
a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from memory import extra_bytes
from rows import append_row, find_row, method_options, target_options, with_given_parts
from torch import nn

from hf_sparse import OneshotConfig, evaluate_model, prune_oneshot
from hf_sparse.allocations import ALLOCATIONS
from hf_sparse.calibration.text_batches import TextReader
from hf_sparse.calibration.text_tables import load_texts
from hf_sparse.config.quality import QUALITIES
from hf_sparse.criteria import CRITERIA
from hf_sparse.hub.loading import load_model, load_tokenizer
from hf_sparse.reporting.report import SparsityReport
from hf_sparse.solvers import SOLVERS


PARTS: dict[str, dict[str, Any]] = {
    **{name: {"criterion": name} for name in CRITERIA.names()},
    **{name: {"solver": name} for name in SOLVERS.names()},
    **{name: {"allocation": name} for name in ALLOCATIONS.names()},
    **{name: {"quality": name} for name in QUALITIES},
    "swaps": {"swaps": 25},
    "permute": {"permute": True},
    "reconstruct": {"reconstruct": True},
}


class Bench:
    """Prunes fresh copies of a model and evaluates them."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._tokenizer = load_tokenizer(options.model)
        model = self._load()
        self._reader = TextReader(self._tokenizer, model, options.length, options.batch_size, per_row=options.per_row)
        self._texts = load_texts(options.calibration_file)
        self._evaluations = {
            Path(name).stem: self._reader.first(load_texts(name, purpose="validation"))
            for name in options.validation_files
        }
        self._calibration = self._reader.sample(self._texts, options.samples, options.seed)

    def _load(self) -> nn.Module:
        return load_model(self._options.model, "float32", torch.device(self._options.device))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        values = {name: evaluate_model(model, batches) for name, batches in self._evaluations.items()}
        return {name: found.get("perplexity", found.get("accuracy", 0.0)) for name, found in values.items()}

    def dense(self) -> dict[str, float]:
        return self.evaluate(self._load())

    def measure(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metrics, seconds, peak memory and share of zeros of one run."""
        model, reports = self._load(), list[SparsityReport]()
        start = time.perf_counter()
        peak = extra_bytes(
            lambda: reports.append(prune_oneshot(model, self._calibration, OneshotConfig(**options), progress=False))
        )
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "peak_mb": peak / 1e6, "zeros": reports[0].sparsity}
        return {"metrics": self.evaluate(model)} | found


def format_rows(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    """Returns a Markdown table, one line per row."""
    names = list(dense)
    lines = ["| target | method | " + " | ".join(names) + " | seconds | peak MB | zeros |"]
    lines += ["|---|---|" + "--:|" * (len(names) + 3)]
    lines += ["| | dense | " + " | ".join(f"{dense[name]:.4g}" for name in names) + " | | | |"]
    for row in rows:
        metrics = " | ".join(f"{row['metrics'][name]:.4g}" for name in names)
        cells = f"{row['seconds']:.1f} | {row['peak_mb']:.0f} | {row['zeros']:.2%}"
        lines.append(f"| {row['target']} | {row['method']} | {metrics} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration_file")
    parser.add_argument("validation_files", nargs="+")
    parser.add_argument("--targets", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"], help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--part", action="append", default=[], help='a part of methods, as in g={"scope": "global"}')
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_row", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("oneshot_quality.jsonl"))
    options = parser.parse_args(argv)

    parts = with_given_parts(PARTS, options.part)
    names = ("model", "calibration_file", "validation_files", "samples", "length", "batch_size", "seed", "per_row")
    data = {name: getattr(options, name) for name in names}
    runs = [
        {"target": target, "method": method, "options": target_options(target) | method_options(method, parts)} | data
        for target in options.targets
        for method in options.methods
    ]
    for run in runs:
        OneshotConfig(**run["options"])  # raises before hours have passed
    bench, rows = Bench(options), []
    dense = bench.dense()
    for run in runs:
        row = find_row(options.output, run)
        if row is None:
            row = run | bench.measure(run["options"])
            append_row(options.output, row)
            print(format_rows([row], dense).splitlines()[-1], flush=True)
        rows.append(row)
    print(format_rows(rows, dense))


if __name__ == "__main__":
    main()
