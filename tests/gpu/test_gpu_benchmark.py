"""The measurements of scripts/check_gpu.sh run, at sizes that say nothing of speed, and are written."""

import importlib
import json
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    return importlib.import_module("gpu")


def test_all_sections_are_written(gpu, tmp_path):
    on = "cuda" if torch.cuda.is_available() else "cpu"
    report = gpu.main([str(tmp_path), "--tiny", "--device", on])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["sections"].keys() == gpu.SECTIONS.keys()
    status = {name: (section["status"], section["reason"]) for name, section in written["sections"].items()}
    assert all(outcome == ("ok", "") for outcome in status.values()), status
    table = (tmp_path / "gpu.md").read_text()
    assert len(report.rows) > len(gpu.SECTIONS)
    assert all(row.what in table for row in report.rows)
    assert all(any(row.section == name for row in report.rows) for name in gpu.SECTIONS)
    missing = [pattern for pattern in gpu.SUMMARY if not any(fnmatch(row.what, pattern) for row in report.rows)]
    assert all("2:4 time" in pattern for pattern in missing)  # which a device may refuse
    if on == "cpu":
        assert "2:4 kernels | refused: " in table


def test_a_section_that_fails_or_takes_too_long_stops_no_other(gpu, tmp_path, monkeypatch):
    def fail(setup):
        setup.report.row("before", "1")
        raise RuntimeError("no | such kernel")

    def hang(setup):
        time.sleep(20)

    sections = {"fails": (fail, 5), "hangs": (hang, 0.05), "works": (gpu.measure_n_of_m, 20)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    report = gpu.main([str(tmp_path), "--tiny", "--device", "cpu"])
    outcomes = {name: section.status for name, section in report.sections.items()}
    assert outcomes == {"fails": "failed", "hangs": "out of time", "works": "ok"}
    table = (tmp_path / "gpu.md").read_text()
    assert "| fails | failed | RuntimeError: no / such kernel |" in table and "| fails | before | 1 |" in table
    report = gpu.main([str(tmp_path), "--tiny", "--device", "cpu", "--seconds", "1"])
    assert {section.status for section in report.sections.values()} == {"skipped"}
