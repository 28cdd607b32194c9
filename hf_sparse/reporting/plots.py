"""Plots of a pruning run: sparsity over the optimizer steps, and sparsity of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from .report import SparsityReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_schedule(
    path: str | Path, planned: Sequence[tuple[int, float]], measured: Sequence[tuple[int, float]], steps: int
) -> None:
    """Plots the sparsity of the selected weights over the optimizer steps: planned as a staircase, measured as dots.

    Args:
        path: the PNG file to write.
        planned: (optimizer step, scheduled sparsity) of each prune step.
        measured: (optimizer step, measured sparsity) of each log.
        steps: number of optimizer steps of the run.
    """
    figure, axes = _new_figure(8, 4)
    points = [(0, 0.0), *planned]
    points.append((steps, points[-1][1]))
    axes.step(*zip(*points), where="post", color="tab:blue", label="planned")
    if measured:
        axes.plot(*zip(*measured), "o", markersize=4, color="tab:orange", label="measured in the weights")
    axes.set(xlabel="optimizer step", ylabel="sparsity of the selected weights", ylim=(0, 1), xlim=(0, steps))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_layers(path: str | Path, report: SparsityReport) -> None:
    """Plots the sparsity of each selected weight as a bar, and their overall sparsity as a line, into a PNG file. Bars
    of layers of which almost nothing is left are red."""
    names = [layer.name.removesuffix(".weight") for layer in report.layers]
    figure, axes = _new_figure(9, max(2.5, 0.22 * len(names) + 1.2))
    colors = ["tab:red" if layer.emptied else "tab:blue" for layer in report.layers]
    axes.barh(range(len(names)), [layer.sparsity for layer in report.layers], color=colors)
    if report.emptied:
        axes.barh([], [], color="tab:red", label="less than 0.1% of the weights remain")
    axes.axvline(report.sparsity, color="tab:orange", label=f"all selected weights: {report.sparsity:.1%}")
    axes.set(xlabel="sparsity", xlim=(0, 1), yticks=range(len(names)))
    axes.set_yticklabels(names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(loc="lower left", fontsize=8)
    _save(figure, path)


def plot_latencies(path: str | Path, latencies: Sequence[Any]) -> None:
    """Plots the time of each model in each runtime, as a share of the first one's in the first runtime, into a PNG
    file: one group of bars for each batch size.

    Args:
        path: the file.
        latencies: with `model`, `runtime`, `batch_size` and `to_reference`.
    """
    batches = sorted({row.batch_size for row in latencies})
    cases = list(dict.fromkeys((row.runtime, row.model) for row in latencies))
    figure, axes = _new_figure(1.5 + 0.35 * len(cases) * len(batches), 4)
    for index, case in enumerate(cases):
        rows = {row.batch_size: row.to_reference for row in latencies if (row.runtime, row.model) == case}
        places = [number + (index + 0.5) / (len(cases) + 1) for number in range(len(batches))]
        axes.bar(places, [rows[batch] for batch in batches], 0.9 / (len(cases) + 1), label=f"{case[0]}: {case[1]}")
    axes.set(ylabel="time / time of the reference", xticks=[number + 0.45 for number in range(len(batches))])
    axes.set_xticklabels([f"batch {batch}" for batch in batches])
    figure.legend(loc="outside upper center", fontsize=7)
    _save(figure, path)


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    # matplotlib's object interface draws to a file without changing the backend of the user's process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: str | Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
