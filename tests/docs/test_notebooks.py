"""Runs the notebooks of the documentation, for one epoch, and shows what their cells end with as Jupyter would."""

import ast
import json
from pathlib import Path

import pytest

from hf_sparse import SparsityReport
from hf_sparse.inspection import CheckpointComparison, CheckpointContents
from hf_sparse.structured.plan import ShrinkPlan


NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
SHOWN = {
    "oneshot": [SparsityReport, ShrinkPlan],
    "train": [SparsityReport, CheckpointContents, CheckpointComparison],
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def run_cell(text, names):
    """Runs a cell, and returns the value of the expression that it ends with, or None."""
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)  # noqa: S102 - our own notebooks
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)  # noqa: S307


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_tables(path, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "code":
            text = (
                "".join(cell["source"])
                .replace("EPOCHS = 20", "EPOCHS = 1")
                .replace('"save_strategy"', '"use_cpu": True, "save_strategy"')
            )
            value = run_cell(text, names)
            shown += [value] if hasattr(value, "_repr_html_") else []
    assert [type(value) for value in shown] == SHOWN[path.stem]
    assert all("<table>" in value._repr_html_() and len(repr(value)) < 150 for value in shown)
