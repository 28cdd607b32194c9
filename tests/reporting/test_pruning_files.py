"""Report and config beside the weights."""

from hf_sparse import PruningConfig, SparsityReport
from hf_sparse.reporting.pruning_files import write_report_and_config
from hf_sparse.reporting.report import LayerReport


def test_report_and_config_are_read_back(tmp_path):
    report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
    config = PruningConfig(pattern="2:4")
    write_report_and_config(tmp_path / "new", report, config.to_dict())
    assert SparsityReport.load(tmp_path / "new" / "pruning_report.json") == report
    assert PruningConfig.from_file(tmp_path / "new" / "pruning_config.json") == config
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["pruning_config.json", "pruning_report.json"]
