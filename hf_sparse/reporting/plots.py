"""Plots of a pruning run: sparsity over the optimizer steps, and sparsity of each layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_atomically
from .layer_groups import OUTSIDE_BLOCKS, split_name
from .report import LayerReport, SparsityReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


MAX_BARS = 30
"""Of more layers, a heat map is easier to read than bars."""
MAX_LABELLED_BLOCKS = 16
"""With more blocks, the cells of a heat map have no room for numbers."""


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
    """Plots the sparsity of each selected weight into a PNG file: of up to `MAX_BARS` as bars, with their overall
    sparsity as a line, of more as a heat map of blocks and kinds of layers, where there are such. Layers of which
    almost nothing is left are red."""
    if len(report.layers) > MAX_BARS and len({split_name(layer.name)[0] for layer in report.layers}) > 2:
        _plot_heat_map(path, report)
    else:
        _plot_bars(path, report)


def _plot_bars(path: str | Path, report: SparsityReport) -> None:
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


def _plot_heat_map(path: str | Path, report: SparsityReport) -> None:
    """One cell for each block and kind; of a kind that a block has several times, such as experts, all of them
    together. Layers outside blocks are a row of cells of their own."""
    cells: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        cells.setdefault(split_name(layer.name), []).append(layer)
    blocks = list(dict.fromkeys(block for block, _ in cells))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    values = np.full((len(kinds), len(blocks)), np.nan)
    figure, axes = _new_figure(max(6, 3 + 0.35 * len(blocks)), max(2.5, 1.8 + 0.3 * len(kinds)))
    for (block, kind), layers in cells.items():
        row, column = kinds.index(kind), blocks.index(block)
        values[row, column] = share = sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)
        if any(layer.emptied for layer in layers):
            axes.add_patch(_cell_border(row, column))
        if len(blocks) <= MAX_LABELLED_BLOCKS:
            color = "black" if share > 0.6 else "white"
            axes.text(column, row, f"{share:.1%}", ha="center", va="center", fontsize=6, color=color)
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=range(len(blocks)), yticks=range(len(kinds)), xlabel="block")
    axes.set_xticklabels(_shorten_names(blocks), fontsize=7, rotation=90 if len(blocks) > MAX_LABELLED_BLOCKS else 0)
    axes.set_yticklabels(kinds, fontsize=7)
    note = "; red: less than 0.1% of the weights remain" if report.emptied else ""
    axes.set_title(f"sparsity; all selected weights: {report.sparsity:.1%}{note}", fontsize=9)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def _cell_border(row: int, column: int) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor="tab:red", linewidth=1.5)


def _shorten_names(names: Sequence[str]) -> list[str]:
    """Returns the names of blocks without the beginning that all of them share, up to the last dot in it.

    Example:
        >>> _shorten_names(["model.layers.0", "model.layers.1", "outside blocks"])
        ['0', '1', 'outside blocks']
    """
    blocks = [name for name in names if name != OUTSIDE_BLOCKS]
    common = os.path.commonprefix(blocks).rpartition(".")
    return [name.removeprefix("".join(common[:2])) for name in names]


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
