"""Quality of pruning during training: metrics of runs of run_glue.py, with several seeds.

    python scripts/benchmarks/training_quality.py --model_name_or_path MODEL --train_file train.json \\
        --validation_file dev.json --test_file test.json --targets 80% 2:4 --methods default movement+distill \\
        --seeds 0 1 2 --epochs 2 --output rows.jsonl --learning_rate 2e-4 --max_seq_length 64
    python scripts/benchmarks/training_quality.py --table --output rows.jsonl

A target is a sparsity, a pattern, or both (4x1@80%), or "none" for dense runs and recipes. A method is one or more
parts joined by "+", whose options are merged: those listed below, and those of `--part NAME=JSON`, which can be any
options of run_glue.py. Arguments that are none of this script are passed to run_glue.py as they are.

Each run is a process, and appends one row to the output: the metric on the validation file and on the test file, which
has labels, seconds, and the share of zeros among the selected weights. Runs whose rows are in the output already are
left out, so that a table can be interrupted and continued. `--table` prints all rows of a file as Markdown: mean and
standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import append_row, find_row, method_options, read_rows, target_options, with_given_parts

from hf_sparse.algorithms import ALGORITHMS
from hf_sparse.criteria import CRITERIA
from hf_sparse.penalties import PENALTIES


SCRIPTS = Path(__file__).resolve().parents[1]
PARTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{name: {"criterion": name} for name in CRITERIA.names()},
    **{name: {"algorithm": name} for name in ALGORITHMS.names()},
    **{name: {"penalty": name} for name in PENALTIES.names()},
    **{path.stem: {"pruning_config": str(path)} for path in sorted((SCRIPTS / "recipes").glob("*.yaml"))},
}


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Returns options as arguments of a script.

    Example:
        >>> command_line({"keep_zeros": True, "criterion_kwargs": {"decay": 0.5}, "exclude": ["a", "b"]})
        ['--keep_zeros', 'True', '--criterion_kwargs', '{"decay": 0.5}', '--exclude', 'a', 'b']
    """
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def measure(run: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Returns the results of one run of run_glue.py.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": folder, "seed": run["seed"], "num_train_epochs": run["epochs"]}
        own |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        words = ["--do_train", "--do_eval", "--do_predict", *run["arguments"], *command_line(run["options"] | own)]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(SCRIPTS / "run_glue.py"), *words], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:] or done.stdout[-2000:])
        results = json.loads(Path(folder, "all_results.json").read_text(encoding="utf-8"))
        report = Path(folder, "pruning_report.json")
        zeros = json.loads(report.read_text(encoding="utf-8"))["sparsity_of_selected"] if report.exists() else 0.0
    found = {"dev": results[f"eval_{metric}"], "test": results[f"test_{metric}"], "zeros": zeros}
    return found | {"seconds": seconds, "train_seconds": results["train_runtime"]}


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns Markdown: a table for each list of arguments, with one line for the seeds of a run."""
    tables: dict[str, dict[tuple[Any, ...], list[Mapping[str, Any]]]] = {}
    for row in rows:
        key = row["target"], row["method"], row["epochs"], json.dumps(row["options"])
        tables.setdefault(" ".join(row["arguments"]), {}).setdefault(key, []).append(row)
    texts = []
    for arguments, groups in tables.items():
        lines = [arguments, "", "| target | method | epochs | dev | test | runs | seconds | zeros |"]
        lines.append("|---|---|" + "--:|" * 6)
        for (target, method, epochs, _), group in groups.items():
            cells = [
                target,
                method,
                f"{epochs:g}",
                *(_spread([row[name] for row in group]) for name in ("dev", "test")),
            ]
            cells += [str(len(group)), f"{statistics.mean(row['seconds'] for row in group):.0f}"]
            lines.append(f"| {' | '.join(cells)} | {group[0]['zeros']:.2%} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _spread(values: Sequence[float]) -> str:
    """Returns the mean and, of several values, their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--targets", nargs="+", default=["80%"])
    parser.add_argument("--methods", nargs="+", default=["default"], help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--part", action="append", default=[], help='a part of methods, as in g={"scope": "layer"}')
    parser.add_argument("--teacher", default="self", help="of the part distill: a folder, a Hub name, or self")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, nargs="+", default=[2.0])
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--output", type=Path, default=Path("training_quality.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the rows of the output, and run nothing")
    options, arguments = parser.parse_known_args(argv)
    if options.table:
        print(format_rows(read_rows(options.output)))
        return

    parts = with_given_parts(PARTS | {"distill": {"distill_teacher": options.teacher}}, options.part)
    runs = [
        {"target": target, "method": method, "epochs": epochs, "seed": seed, "arguments": arguments}
        | {"options": ({} if target == "none" else target_options(target)) | method_options(method, parts)}
        for seed in options.seeds
        for epochs in options.epochs
        for target in options.targets
        for method in options.methods
    ]
    rows, failed = [], 0
    for run in runs:
        row = find_row(options.output, run)
        if row is None:
            try:
                row = run | measure(run, options.metric)
            except RuntimeError as error:
                failed += 1
                print(f"{run['target']} {run['method']} failed: {error}", file=sys.stderr, flush=True)
                continue
            append_row(options.output, row)
            print(format_rows([row]).splitlines()[-1], flush=True)
        rows.append(row)
    print(format_rows(rows))
    if failed:
        raise SystemExit(f"{failed} of {len(runs)} runs failed.")


if __name__ == "__main__":
    main()
