"""Plots show the given values, and their files are written atomically."""

import matplotlib
import pytest

from hf_sparse.reporting import plots
from hf_sparse.reporting.report import LayerReport, SparsityReport


@pytest.fixture
def drawn(monkeypatch):
    """The figures, caught on their way to the file."""
    figures, save = [], plots._save

    def catch(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", catch)
    return figures


def test_the_schedule_is_a_staircase_with_the_measurements_on_it(tmp_path, drawn):
    backend = matplotlib.get_backend()
    plots.plot_schedule(tmp_path / "a.png", [(3, 0.25), (6, 0.5)], [(2, 0.0), (4, 0.25)], steps=10)
    staircase, dots = drawn[0].axes[0].get_lines()
    assert staircase.get_xydata().tolist() == [[0, 0], [3, 0.25], [6, 0.5], [10, 0.5]]
    assert staircase.get_drawstyle() == "steps-post"
    assert dots.get_xydata().tolist() == [[2, 0.0], [4, 0.25]]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert matplotlib.get_backend() == backend


def test_a_run_without_measurements_or_prune_steps_has_a_schedule_too(tmp_path, drawn):
    plots.plot_schedule(tmp_path / "a.png", [(3, 0.5)], [], steps=10)
    plots.plot_schedule(tmp_path / "b.png", [], [], steps=10)
    assert len(drawn[0].axes[0].get_lines()) == 1
    assert drawn[1].axes[0].get_lines()[0].get_xydata().tolist() == [[0, 0], [10, 0]]


def test_many_layers_are_a_heat_map_of_blocks_and_kinds(tmp_path, drawn):
    """A kind that is absent from a block has an empty cell, experts share one, an emptied layer is framed."""
    names = [f"model.layers.{block}.{kind}.weight" for block in range(12) for kind in ("attn.q", "mlp.up")]
    names += [f"model.layers.11.mlp.experts.{expert}.up.weight" for expert in range(6)] + ["pooler.weight"]
    zeros = [1000 if name == names[3] else index for index, name in enumerate(names)]
    layers = tuple(LayerReport(*names[i : i + 1], "weights", "2:4", (10, 100), 1000, zeros[i]) for i in range(31))
    plots.plot_layers(tmp_path / "a.png", SparsityReport(layers, 40000, 4000, 0.5))
    axes = drawn[0].axes[0]
    kinds, blocks = (
        [label.get_text() for label in labels] for labels in (axes.get_yticklabels(), axes.get_xticklabels())
    )
    assert kinds == ["attn.q", "mlp.up", "mlp.experts.*.up", "pooler"]
    assert blocks == [*map(str, range(12)), "outside blocks"]
    values = axes.get_images()[0].get_array().filled(-1)
    assert values[0].tolist() == [*(block * 2 / 1000 for block in range(12)), -1]
    assert values[2].tolist() == [-1] * 11 + [sum(range(24, 30)) / 6000, -1] and values[3, 12] == 0.03
    (border,) = axes.patches
    assert (round(border.get_x()), round(border.get_y())) == (1, 1)


@pytest.mark.parametrize("count", [1, 60])
def test_each_layer_has_a_bar(tmp_path, drawn, count):
    layers = tuple(LayerReport(f"layer.{i}.weight", "weights", "2:4", (4, 4), 16, i % 17) for i in range(count))
    report = SparsityReport(layers, 16 * count + 4, 8, 0.5)
    plots.plot_layers(tmp_path / "a.png", report)
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [layer.sparsity for layer in layers]
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "layer.0"
    assert axes.get_lines()[0].get_xdata()[0] == report.sparsity


def test_bars_of_emptied_layers_are_red(tmp_path, drawn):
    layers = tuple(LayerReport(name, "g", "unstructured", (2, 2), 4, zeros) for name, zeros in [("a", 3), ("b", 4)])
    plots.plot_layers(tmp_path / "a.png", SparsityReport(layers, 8, 7, 0.5))
    axes = drawn[0].axes[0]
    blue, red = (matplotlib.colors.to_rgba(color) for color in ("tab:blue", "tab:red"))
    assert [bar.get_facecolor() for bar in axes.patches] == [blue, red]
    assert "less than 0.1% of the weights remain" in [text.get_text() for text in axes.get_legend().get_texts()]
