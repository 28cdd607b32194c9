"""The matrix of versions: which rows it has, and what it says of an environment; no environment is made."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import matrix
import pytest


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Rows run with the Python of this process, and leave their results in a temporary folder."""
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / "matrix")
    monkeypatch.setattr(matrix, "newest_minors", lambda package, count: ["5.24", "5.23"])
    monkeypatch.setattr(matrix, "make_environment", make_environment)
    uv = ModuleType("uv")
    uv.__spec__ = ModuleSpec("uv", None)
    monkeypatch.setitem(sys.modules, "uv", uv)
    return tmp_path


def make_environment(row, torch, until):
    return sys.executable, "error: no such Python\n\nhint: install it" if row.python == "3.14" else None


def test_the_rows_are_the_newest_the_floors_and_each_python(in_folder):
    rows = matrix.rows()
    lowest = matrix.floors()
    assert rows["transformers-5.23"].packages == ("transformers==5.23.*",)
    assert rows["accelerate-floor"].packages == (f"accelerate=={lowest['accelerate']}",)
    assert {"newest", "transformers-5.24", "transformers-floor", "floors", "python-3.10", "main"} < rows.keys()
    assert all((matrix.ROOT / path).exists() for path in matrix.TESTS)


def test_each_row_is_a_line_and_a_failure_the_exit_code(in_folder, monkeypatch, capsys):
    (in_folder / "test_good.py").write_text("def test_good(): pass")
    (in_folder / "test_bad.py").write_text("def test_bad(): assert False")
    page = in_folder / "page.md"
    page.write_text(f"before\n{matrix.START}\nold\n{matrix.END}\nafter\n")

    def run(*arguments, tests):
        monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments, "--tests", str(in_folder / tests)])
        return matrix.main(), capsys.readouterr()

    code, said = run("newest", "--write", str(page), tests="test_good.py")
    assert code == 0 and "newest" in said.out and "passed    1 passed" in said.out
    code, said = run("floors", tests="test_bad.py")
    assert code == 1 and "failed    1 failed" in said.out and "test_bad.py::test_bad" in said.out
    code, said = run("python-3.14", tests="test_good.py")
    assert code == 1 and "not made  error: no such Python" in said.out
    code, said = run("newst", tests="test_good.py")
    assert code == 2 and said.err.startswith("There is no row newst: the rows are newest, ")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| newest |" in text
    results = json.loads((in_folder / "matrix" / "results.json").read_text())
    assert {name: result["outcome"] for name, result in results.items()} == {
        "newest": "passed",
        "floors": "failed",
        "python-3.14": "not made",
    }


def test_without_uv_no_row_is_tried(in_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setattr(sys, "argv", ["matrix.py"])
    assert matrix.main() == 2
    said = capsys.readouterr()
    assert said.err == "uv is not installed: pip install uv (or make matrix).\n" and not said.out
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--list"])
    assert matrix.main() == 0


def test_the_floors_are_exact_versions_of_all_that_setup_cfg_names(in_folder, monkeypatch):
    monkeypatch.undo()
    commands = []
    monkeypatch.setattr(matrix, "FOLDER", in_folder)
    monkeypatch.setattr(
        matrix.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    matrix.make_environment(matrix.Row("floors", python="3.10", lowest=True), "torch==2.13.0", None)
    install = commands[-1]
    pins = (in_folder / "floors.txt").read_text().splitlines()
    assert install[install.index("--constraint") + 1] == str(in_folder / "floors.txt")
    assert {"datasets==3.0", "torch==2.6", "evaluate==0.4.2", "peft==0.21", "scipy==1.13"} <= {*pins}
    assert "torch==2.13.0" not in install and not any(pin.startswith(("pytest", "onnx")) for pin in pins)
    # What is named without a lowest version has none that could be tested.
    assert len(pins) == 15 + 2 + 3
