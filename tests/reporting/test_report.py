"""SparsityReport: counted in the weights, each share with its denominator."""

import json

import torch
from torch import nn

from hf_sparse import Pruner, PruningConfig, SparsityReport
from hf_sparse.numerics import count_zeros
from hf_sparse.reporting.report import LayerReport, write_report_and_config


def test_sparsities_by_hand():
    layers = (LayerReport("a.weight", "g", "2:4", (2, 8), 16, 8), LayerReport("b.weight", "g", "4x1", (4, 1), 4, 4))
    report = SparsityReport(layers, parameters=40, parameter_zeros=14, target=0.6)
    assert (report.selected, report.zeros, report.sparsity) == (20, 12, 0.6)
    assert report.parameter_sparsity == 0.35 and [layer.sparsity for layer in layers] == [0.5, 1.0]
    assert str(report).splitlines() == [
        "layer       shape  pattern  zeros  weights  sparsity   note",
        "a.weight    2x8    2:4          8       16    50.00%",
        "b.weight    4x1    4x1          4        4   100.00%  empty",
        "selected                       12       20    60.00%",
        "parameters                     14       40    35.00%",
    ]


def test_round_trip_and_file(tmp_path):
    layers = (LayerReport("a.weight", "g", "2:4", (2, 8), 16, 8),)
    report = SparsityReport(layers, 40, 14, 0.6)
    assert SparsityReport.from_dict(report.to_dict()) == report
    report.save(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert SparsityReport.from_dict(values) == report
    assert values["sparsity_of_selected"] == 0.5 and values["sparsity_of_parameters"] == 0.35
    assert values["layers"][0]["sparsity"] == 0.5


def test_an_empty_report_divides_nothing_by_zero():
    report = SparsityReport((), 0, 0, 0.0)
    assert (report.sparsity, report.parameter_sparsity) == (0.0, 0.0)
    assert "selected" in str(report)


def test_zeros_are_counted_in_the_weights_of_the_model():
    """The mask does not know of a weight that is zero by chance; biases count only among all parameters."""
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[0.0, -0.0], [1.0, 2.0]]))
    report = Pruner(model, PruningConfig(target_sparsity=0.5, targets=["1"])).report()
    assert (report.selected, report.zeros, report.target) == (4, 2, 0.5)
    assert (report.parameters, report.parameter_zeros) == (8 + 2 + 4, 4)
    assert count_zeros(torch.tensor([0.0, -0.0, float("nan"), 1e-30])) == 2


def test_report_and_config_are_read_back(tmp_path):
    report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
    config = PruningConfig(pattern="2:4")
    write_report_and_config(tmp_path / "new", report, config.to_dict())
    assert SparsityReport.load(tmp_path / "new" / "pruning_report.json") == report
    assert PruningConfig.from_file(tmp_path / "new" / "pruning_config.json") == config
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["pruning_config.json", "pruning_report.json"]


def test_layers_with_almost_no_weights_left_are_marked():
    sizes = {"full": (1000, 998), "almost": (1000, 999), "nothing": (8, 8)}
    layers = tuple(LayerReport(name, "g", "unstructured", (n, 1), n, zeros) for name, (n, zeros) in sizes.items())
    report = SparsityReport(layers, 2008, 2005, 0.9)
    assert [layer.note for layer in layers] == ["", "almost empty", "empty"]
    assert report.to_dict()["emptied_layers"] == ["almost", "nothing"]
    table = str(report).splitlines()
    assert table[0].endswith("sparsity          note") and [row.split("%")[1].strip() for row in table[1:4]] == [
        *("", "almost empty", "empty")
    ]
