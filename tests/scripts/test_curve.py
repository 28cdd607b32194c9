"""scripts/benchmarks/curve.py: points, error bars, names of methods and the dense line, from folders of runs."""

import importlib.util
import json
import sys

import pytest
from helpers.scripts import SCRIPTS

from hf_sparse import OneshotConfig, PruningConfig, SparsityReport
from hf_sparse.reporting.report import LayerReport, write_report_and_config


@pytest.fixture(scope="module")
def curve():
    spec = importlib.util.spec_from_file_location("curve", SCRIPTS / "benchmarks" / "curve.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["curve"] = module
    spec.loader.exec_module(module)
    return module


def write_run(folder, accuracy, config=None, zeros=0):
    """A run of one layer of 100 weights, in a model of 200 parameters."""
    folder.mkdir(parents=True)
    if config is not None:
        layer = LayerReport("a.weight", "weights", str(config.pattern), (10, 10), 100, zeros)
        write_report_and_config(folder, SparsityReport((layer,), 200, zeros, zeros / 100), config.to_dict())
    (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": accuracy, "eval_loss": 1, "epoch": 2}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run(tmp_path / f"dense-{seed}", 0.9 + seed / 50)
        for zeros in (50, 80):
            options = {"target_sparsity": zeros / 100}
            write_run(tmp_path / f"snip-{zeros}-{seed}", 1 - zeros / 200 + seed / 10, PruningConfig(**options), zeros)
    write_run(tmp_path / "magnitude", 0.5, PruningConfig(target_sparsity=0.8, criterion="magnitude"), 80)
    return tmp_path


def test_points_are_means_over_seeds_with_error_bars(runs, curve, capsys, monkeypatch):
    drawn, draw = [], curve.draw_curve
    monkeypatch.setattr(curve, "draw_curve", lambda *given: drawn.append((*given, draw(*given))) or drawn[0][-1])
    curve.main([str(path) for path in sorted(runs.iterdir())])
    points, dense, *_, figure = drawn[0]
    found = [(point.label, point.sparsity, point.mean, round(point.deviation, 6)) for point in points]
    deviation = round(0.1 / 2**0.5, 6)
    assert found == [
        ("magnitude", 0.8, 0.5, 0.0),
        ("snip_momentum", 0.5, pytest.approx(0.8), deviation),
        ("snip_momentum", 0.8, pytest.approx(0.65), deviation),
    ]
    assert dense == [0.9, 0.92]
    table = capsys.readouterr().out
    assert (
        "| dense | - | 0.9100 | 0.0141 | 2 |" in table and "| snip_momentum | 80.00% | 0.6500 | 0.0707 | 2 |" in table
    )
    (axes,) = figure.axes
    assert axes.get_xlabel() == "sparsity of the selected weights, %" and axes.get_ylabel() == "eval accuracy"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"magnitude", "snip_momentum", "dense: 0.91"}
    bars = [container for container in axes.containers if container.has_yerr]
    assert [[len(path.vertices) for path in bar.lines[2][0].get_paths()] for bar in bars] == [[2, 2]]


def test_labels_and_the_sparsity_of_all_parameters(runs, curve, capsys):
    curve.main(["snip-80-0", "magnitude", "--label", "mine=snip-*", "--x", "parameters", "--output", "c.svg"])
    assert "| mine | 40.00% | 0.6000 | 0.0000 | 1 |" in capsys.readouterr().out
    assert (runs / "c.svg").read_text().lstrip().startswith("<?xml")


def test_oneshot_runs_bring_their_dense_model(tmp_path, curve, capsys):
    config = OneshotConfig(target_sparsity=0.5)
    layer = LayerReport("a.weight", "weights", "unstructured", (10, 10), 100, 50)
    write_report_and_config(tmp_path / "run", SparsityReport((layer,), 200, 50, 0.5), config.to_dict())
    results = {"model": "m", "dense_perplexity": 4.0, "eval_perplexity": 5.0, "eval_tokens": 9}
    (tmp_path / "run" / "oneshot_results.json").write_text(json.dumps(results))
    curve.main([str(tmp_path / "run"), "--metric", "eval_perplexity", "--output", str(tmp_path / "c.png")])
    table = capsys.readouterr().out
    assert "| dense | - | 4.0000 |" in table and "| pruned | 50.00% | 5.0000 |" in table
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, error",
    [
        (["none"], "none is no finished run"),
        (["dense-0"], "no folder has a pruning_report.json"),
        (["magnitude", "--metric", "eval_f1"], "magnitude has no metric eval_f1: it has eval_accuracy, eval_loss."),
        (["magnitude", "--output", "c.gif"], "its ending must be .png, .svg or .pdf"),
        (["magnitude", "--label", "x"], "write NAME=GLOB"),
    ],
)
def test_mistakes_are_one_line(runs, curve, capsys, words, error):
    with pytest.raises(SystemExit) as exit_info:
        curve.main(words)
    assert exit_info.value.code == 2 and error in capsys.readouterr().err.splitlines()[-1]
