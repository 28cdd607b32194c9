"""Tables of results: plain text, grouped by kind and block, drawn on a console, HTML in notebooks."""

import re
from html.parser import HTMLParser

import pytest

from hf_sparse import ShrinkPlan, SparsityReport
from hf_sparse.export.benchmark import BenchmarkResult, Latency, ModelSize
from hf_sparse.inspection.compare import CheckpointComparison, CheckpointTotals, LayerComparison
from hf_sparse.inspection.contents import CheckpointContents, TensorContents
from hf_sparse.integrations.merge_report import MergedLayer, MergeReport
from hf_sparse.oneshot.plan import LayerPlan, OneshotPlan
from hf_sparse.reporting.report import LayerReport
from hf_sparse.reporting.tabular import console_text
from hf_sparse.structured.plan import SizeChange


BLOCKS = 14


def names():
    """Of 2 layers in each of 14 blocks, and one outside them."""
    blocks = [f"model.layers.{block}.{kind}.weight" for block in range(BLOCKS) for kind in ("up", "down")]
    return [*blocks, "model.pooler.weight"]


@pytest.fixture
def report():
    """Block b has b zeros of 100 in up, twice as many in down; the pooler has 10 of 10."""
    layers = [
        LayerReport(name, "weights", "unstructured", (10, 10), 100, int(name.split(".")[2]) * (1 + ("down" in name)))
        for name in names()[:-1]
    ]
    layers.append(LayerReport("model.pooler.weight", "weights", "2:4", (1, 10), 10, 10))
    return SparsityReport(tuple(layers), parameters=4000, parameter_zeros=300, target=0.1)


def test_many_layers_are_grouped_by_kind_and_block(report):
    zeros = sum(range(BLOCKS))  # 91
    lines = str(report).splitlines()
    assert lines[:6] == [
        "kind          shape  pattern       layers  zeros  weights  sparsity   lowest  highest",
        "up            10x10  unstructured      14     91    1,400     6.50%    0.00%   13.00%",
        "down          10x10  unstructured      14    182    1,400    13.00%    0.00%   26.00%",
        "model.pooler  1x10   2:4                1     10       10   100.00%  100.00%  100.00%",
        "selected                                     283    2,810    10.07%",
        "parameters                                   300    4,000     7.50%",
    ]
    assert lines[6] == "" and lines[7].split() == "block layers zeros weights sparsity lowest highest".split()
    assert lines[9] == "model.layers.1        2      3      200     1.50%    1.00%    2.00%"
    assert lines[22].startswith("outside blocks") and len(lines) == 8 + BLOCKS + 1 + 3
    assert lines[-2:] == [
        "10.07% of the 2,810 selected weights are zero (target 10.00%), 7.50% of all 4,000 parameters.",
        "Empty: model.pooler.weight",
    ]
    assert zeros == 91 and report.zeros == 283


def test_all_layers_are_shown_when_asked_for(report):
    text = report.format(all_layers=True)
    assert all(f"{name} " in text for name in names())
    few = SparsityReport(report.layers[:4], 4000, 300, 0.1)
    assert str(few) == few.format(all_layers=True) != few.format(all_layers=False)


def test_a_console_shows_the_same_cells_in_its_width(report, capsys):
    for all_layers in (None, True):
        plain = re.sub(r"\s+", "", report.format(all_layers))
        drawn = console_text(report, all_layers, width=100)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()
        assert max(map(len, lines)) <= 100
        assert re.sub(r"[\s─]+", "", "".join(lines)) == plain
    narrow = re.sub(r"\x1b\[[0-9;]*m", "", console_text(report, True, width=60)).splitlines()
    assert max(map(len, narrow)) <= 60 and sum("100.00%" in line for line in narrow) == 1
    assert console_text(report) == str(report)  # the captured output is no terminal


class Cells(HTMLParser):
    """The texts of the cells of each table."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tables = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.tables[-1][-1].append(data)


def test_notebooks_show_tables(report):
    kinds, blocks = Cells(report._repr_html_()).tables
    assert kinds[1] == ["up", "10x10", "unstructured", "14", "91", "1,400", "6.50%", "0.00%", "13.00%"]
    assert len(blocks) == 1 + BLOCKS + 1
    assert repr(report) == "SparsityReport(29 layers, 283 of 2,810 selected weights are zero: 10.07%)"


def test_inspections_and_comparisons():
    tensors = tuple(TensorContents(name, "F32", (10, 10), True, 100, 25, 0) for name in names())
    contents = CheckpointContents("folder<b>", (), "guess", tensors, {}, (), {})
    (kinds, _) = Cells(contents._repr_html_()).tables
    assert kinds[1] == ["up", "10x10", "F32", "14", "350", "1,400", "25.00%", "25.00%", "25.00%"]
    assert repr(contents) == "CheckpointContents(folder<b>, 725 of 2,900 selected weights are zero: 25.00%)"
    assert "Selected: guessed by name and shape" in str(contents)

    layers = tuple(LayerComparison(name, zeros=5, kept=4, new=2, changed=3) for name in names())
    totals = [CheckpointTotals(name, "report", 8, 4, 10, 5, 4_000_000, {"f1": 0.5}) for name in ("a<b>", "c")]
    comparison = CheckpointComparison(*totals, layers, ("x",), ())
    _, rows = Cells(comparison._repr_html_()).tables
    assert rows[1:] == [
        ["up", "14", "70", "56", "14", "28", "42"],
        ["down", "14", "70", "56", "14", "28", "42"],
        ["model.pooler", "1", "5", "4", "1", "2", "3"],
        ["selected", "29", "145", "116", "29", "58", "87"],
    ]
    assert "Only in a&lt;b&gt;: x." in comparison._repr_html_()
    assert repr(comparison) == "CheckpointComparison(a<b>, c, 116 of 145 zeros kept, 58 new)"
    assert comparison.format(all_layers=True).count("model.layers") == 28


def test_plans_of_smaller_models():
    change = SizeChange("intermediate_size", 1536, 768, "768 neurons are zero")
    plan = ShrinkPlan("BertModel", (change,), ("one head: no field",), {}, (200, 100), (2_000_000, 1_000_000))
    (table,) = Cells(plan._repr_html_()).tables
    assert table[1] == ["intermediate_size", "1,536", "768", "768 neurons are zero"]
    assert "one head: no field" in plan._repr_html_()
    assert repr(plan) == "ShrinkPlan(BertModel: 200 -> 100 parameters (50.0 %), 2.0 -> 1.0 MB)"
    empty = ShrinkPlan("BertModel", (), (), {}, (200, 200), (2, 2))
    assert "nothing is removed." in str(empty) and "nothing is removed." in empty._repr_html_()


def test_plans_of_oneshot_runs():
    layers = tuple(LayerPlan(name, "g", (10, 10), "2:4", 100, 100, 50, "block") for name in names()[:-1])
    pooler = LayerPlan("model.pooler.weight", "g", (1, 10), "4x1", 10, 10, None, None)
    plan = OneshotPlan((*layers, pooler), 14, 1024, "costs", ("criterion wanda",))
    (table,) = Cells(plan._repr_html_()).tables
    assert table == [
        ["kind", "shape", "pattern", "layers", "units", "to prune"],
        ["up", "10x10", "2:4", "14", "1,400", "700"],
        ["down", "10x10", "2:4", "14", "1,400", "700"],
        ["model.pooler", "1x10", "4x1", "1", "10", "ranked"],
    ]
    summary = "layers: 29 with 2,810 weights; blocks: 14; calibration tokens: 1,024"
    assert str(plan).splitlines()[-4:] == ["", "criterion wanda", summary, "costs"]
    assert repr(plan) == f"OneshotPlan({summary})"
    assert plan.format(all_layers=True).count("model.layers") == 28


def test_measurements_and_merges():
    size, latency = ModelSize("dense", 10, 4_000_000, None), Latency("dense", "torch", 8, 0.002, 1.0, 0.9, 1.1, 1.0)
    result = BenchmarkResult((size,), (latency,), 128, "CPU time")
    sizes, rows = Cells(result._repr_html_()).tables
    assert sizes[1][1:] == ["dense", "10", "4.0"] and rows[1][:2] + rows[1][3:4] == ["8", "torch", "2.00"]
    assert repr(result) == "BenchmarkResult(dense; 1 latency)"
    merged = MergeReport((MergedLayer("query.weight", 16, 8, 8, 5.0, 3.0),))
    assert Cells(merged._repr_html_()).tables[0][1] == ["query.weight", "8", "16", "8", "60.0%"]
    assert repr(merged) == "MergeReport(1 layer, 60.0% of the norm of the updates lost)"
