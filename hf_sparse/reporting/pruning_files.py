"""The two files that pruning writes beside the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import CONFIG_FILE, REPORT_FILE, write_json
from .report import SparsityReport


def write_report_and_config(directory: str | Path, report: SparsityReport, config: Mapping[str, Any]) -> None:
    """Writes `pruning_report.json` and `pruning_config.json`.

    Args:
        directory: where the weights are saved.
        report: the sparsity of the weights.
        config: the options of pruning, as `PruningConfig.to_dict` or `OneshotConfig.to_dict` returns them.
    """
    report.save(Path(directory) / REPORT_FILE)
    write_json(Path(directory) / CONFIG_FILE, config)
