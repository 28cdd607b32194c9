"""Plots accuracy against sparsity for several methods, from the folders of finished runs.

    python scripts/benchmarks/curve.py runs/* --metric eval_accuracy --output curve.png
    python scripts/benchmarks/curve.py dense runs/* --label "movement=runs/movement-*" --x parameters

A run is the output folder of a training or of one-shot pruning: the sparsity is read from pruning_report.json, the
metrics from all_results.json, oneshot_results.json or pruning_card.json. Folders without a report are dense runs: a
horizontal line is their mean or, without any, that of the dense metrics in the other folders.

Runs of one method and one target are one point, the mean over their seeds, with the standard deviation as error bar.
Methods are named by the options in which the runs differ; `--label NAME=GLOB` names the runs whose folder matches. The
values are printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.files import ONESHOT_RESULTS_FILE, REPORT_FILE, read_json, write_atomically
from hf_sparse.hub.card import SparsityCard, select_metrics
from hf_sparse.reporting.tables import format_markdown_table


if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS_FILE = "all_results.json"
# Values that say by themselves which option they are of.
_SPEAKING = ("algorithm", "allocation", "criterion", "pattern", "penalty", "quality", "solver")
# Options in which runs of one method differ.
_OF_A_POINT = ("target_sparsity", "target", "group", "groups")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: its output folder.
        metrics: of the pruned model, or of the dense one.
        options: of pruning, with the defaults that were chosen; None for a dense run.
        target: sparsity that was requested.
        sparsities: of the selected weights and of all parameters.
        dense_metrics: of the dense model that it was compared with.
    """

    folder: Path
    metrics: dict[str, float]
    options: dict[str, Any] | None = None
    target: float = 0.0
    sparsities: tuple[float, float] = (0.0, 0.0)
    dense_metrics: dict[str, float] | None = None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads a run from its output folder.

        Raises:
            ValueError: the folder has no results, or a damaged file.
        """
        results = read_json(folder / RESULTS_FILE) if (folder / RESULTS_FILE).is_file() else {}
        oneshot = read_json(folder / ONESHOT_RESULTS_FILE) if (folder / ONESHOT_RESULTS_FILE).is_file() else {}
        dense = {f"eval_{name.removeprefix('dense_')}": oneshot[name] for name in oneshot if name.startswith("dense_")}
        metrics = select_metrics(results | oneshot)
        if not (folder / REPORT_FILE).is_file():
            if not metrics:
                raise ValueError(f"{folder} is no finished run: it has neither {RESULTS_FILE} nor {REPORT_FILE}.")
            return cls(folder, metrics)
        card = SparsityCard.load(folder)
        options = dict(card.config)
        if len(card.settings) == 1:
            options |= card.settings[0]
        report = card.report
        return cls(
            folder,
            card.metrics | metrics,
            {name: value for name, value in options.items() if name not in _OF_A_POINT},
            report.target,
            (report.sparsity, report.parameter_sparsity),
            card.dense_metrics | select_metrics(dense),
        )


@dataclass(frozen=True)
class Point:
    """The runs of one method and one target.

    Args:
        label: name of the method.
        sparsity: mean over the runs.
        values: the metric of each run.
    """

    label: str
    sparsity: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the metric."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation of the metric; 0 of a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def label_runs(runs: Sequence[Run], given: Sequence[tuple[str, str]]) -> list[str]:
    """Returns the name of the method of each pruned run: the one given for its folder, or the options in which the
    runs differ.

    Args:
        runs: with options.
        given: (name, glob) pairs, of which the first that matches the folder counts.
    """
    own = [next((name for name, glob in given if fnmatch.fnmatch(str(run.folder), glob)), None) for run in runs]
    unnamed = [run.options or {} for run, name in zip(runs, own, strict=True) if name is None]
    names = list(dict.fromkeys(name for options in unnamed for name in options))
    texts = {name: {json.dumps(options.get(name)) for options in unnamed} for name in names}
    different = [name for name in names if len(texts[name]) > 1]

    def describe(options: dict[str, Any]) -> str:
        parts = [
            str(value) if name in _SPEAKING else f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name in different
            if (value := options.get(name)) not in (None, {}, [], False)
        ]
        return ", ".join(parts) or "pruned"

    return [name or describe(run.options or {}) for run, name in zip(runs, own, strict=True)]


def make_points(runs: Sequence[Run], labels: Sequence[str], metric: str, of_parameters: bool) -> list[Point]:
    """Returns a point for each label and target, in the order of the labels and by sparsity."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run, label in zip(runs, labels, strict=True):
        groups.setdefault((label, round(run.target, 4)), []).append(run)
    points = [
        Point(
            label,
            statistics.fmean(run.sparsities[of_parameters] for run in members),
            tuple(run.metrics[metric] for run in members),
        )
        for (label, _), members in groups.items()
    ]
    order = list(dict.fromkeys(labels))
    return sorted(points, key=lambda point: (order.index(point.label), point.sparsity))


def dense_values(runs: Sequence[Run], metric: str) -> list[float]:
    """Returns the metric of each dense run or, without one, of the dense models that the others name."""
    values = [run.metrics[metric] for run in runs if run.options is None and metric in run.metrics]
    named = {run.dense_metrics[metric] for run in runs if run.dense_metrics and metric in run.dense_metrics}
    return values or sorted(named)


def draw_curve(points: Sequence[Point], dense: Sequence[float], metric: str, x_label: str) -> Figure:
    """Returns a figure: a line with error bars over seeds for each label, and a dashed line for the dense model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    markers = "osD^vPX*<>"
    for number, label in enumerate(dict.fromkeys(point.label for point in points)):
        own = [point for point in points if point.label == label]
        shares, means = [100 * point.sparsity for point in own], [point.mean for point in own]
        deviations = [point.deviation for point in own]
        style: dict[str, Any] = {"marker": markers[number % len(markers)], "markersize": 5, "capsize": 3}
        axes.errorbar(shares, means, yerr=deviations if any(deviations) else None, label=label, **style)
    if dense:
        mean = statistics.fmean(dense)
        axes.axhline(mean, color="0.35", linestyle="--", label=f"dense: {mean:.4g}")
        if len(dense) > 1:
            deviation = statistics.stdev(dense)
            axes.axhspan(mean - deviation, mean + deviation, color="0.35", alpha=0.12, linewidth=0)
    axes.set(xlabel=f"{x_label}, %", ylabel=metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def format_points(points: Sequence[Point], dense: Sequence[float], metric: str) -> str:
    """Returns the points as a Markdown table."""
    rows = [
        (point.label, f"{point.sparsity:.2%}", f"{point.mean:.4f}", f"{point.deviation:.4f}", f"{len(point.values)}")
        for point in points
    ]
    if dense:
        whole = Point("dense", 0.0, tuple(dense))
        rows.insert(0, (whole.label, "-", f"{whole.mean:.4f}", f"{whole.deviation:.4f}", f"{len(dense)}"))
    return format_markdown_table(("method", "sparsity", metric, "deviation", "runs"), rows, text_columns=1)


def choose_metric(runs: Sequence[Run], asked: str | None) -> str:
    """Returns the metric that was asked for or, if all runs have only one besides the loss, that one.

    Raises:
        ValueError: a run does not have it, or there are several.
    """
    common = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    if asked is not None:
        for run in runs:
            if asked not in run.metrics:
                known = ", ".join(run.metrics) or "none"
                raise ValueError(f"{run.folder} has no metric {asked}: it has {known}. Name one with --metric.")
        return asked
    candidates = [name for name in common if not name.endswith("loss")] or common
    if len(candidates) != 1:
        raise ValueError(f"name the metric with --metric: all runs have {', '.join(candidates) or 'none in common'}.")
    return candidates[0]


def _label(text: str) -> tuple[str, str]:
    name, separator, glob = text.partition("=")
    if not (name and separator and glob):
        raise argparse.ArgumentTypeError(f'"{text}": write NAME=GLOB, as in "movement=runs/movement-*".')
    return name, glob


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="Output folders of finished runs, dense or pruned.")
    parser.add_argument("--metric", help="Metric on the y-axis, as in eval_accuracy. Left out: the only one.")
    parser.add_argument(
        "--x",
        choices=("selected", "parameters"),
        default="selected",
        help="Sparsity on the x-axis: of the selected weights, or of all parameters.",
    )
    parser.add_argument("--label", type=_label, action="append", default=[], help="Name of runs, as NAME=GLOB.")
    parser.add_argument("--output", type=Path, default=Path("curve.png"), help="File to write: .png, .svg or .pdf.")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f'--output is "{args.output}": its ending must be .png, .svg or .pdf.')
    try:
        runs = [Run.read(folder) for folder in args.folders]
        pruned = [run for run in runs if run.options is not None]
        if not pruned:
            raise ValueError(f"no folder has a {REPORT_FILE}: name the output folders of pruned runs too.")
        metric = choose_metric(pruned, args.metric)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    points = make_points(pruned, label_runs(pruned, args.label), metric, args.x == "parameters")
    dense = dense_values(runs, metric)
    of_what = "all parameters" if args.x == "parameters" else "the selected weights"
    figure = draw_curve(points, dense, metric, f"sparsity of {of_what}")
    kind = args.output.suffix[1:]
    write_atomically(args.output, lambda temporary: figure.savefig(temporary, dpi=150, format=kind))
    print(format_points(points, dense, metric))
    print(f"figure: {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
