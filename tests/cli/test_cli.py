"""The program: exit codes, what goes where, and that nothing heavy is imported before it is needed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse import PruningConfig, SparsityReport
from hf_sparse.cli.app import app
from hf_sparse.reporting.report import LayerReport


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    live = torch.rand(16, 8, 4).argsort(-1) < 2
    weight = torch.randn(16, 32) * live.flatten(1)
    save_file({"up.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "other").mkdir()
    save_file({"up.weight": weight + 1e-3}, tmp_path / "other" / "model.safetensors")
    return tmp_path


@pytest.fixture
def run(capsys):
    def run_program(*words):
        with pytest.raises(SystemExit) as done:
            app([*map(str, words)], prog_name="hf-sparse")
        return done.value.code, *capsys.readouterr()

    return run_program


def test_report(folder, run):
    code, out, err = run("report", folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "up.weight   16x32  F32   2:4          256      512    50.00%"
    code, out, err = run("report", folder, "--json")
    assert (code, err) == (0, "") and json.loads(out)["sparsity_of_selected"] == 0.5
    assert json.loads(out)["unmet"] == []


def test_checks_decide_the_exit_code(folder, run):
    assert run("report", folder, "--min-sparsity", 0.5, "--expect", "2:4")[0] == 0
    code, out, err = run("report", folder, "--min-sparsity", 0.51, "--expect", "1:4")
    assert code == 1 and "up.weight" in out
    assert err.splitlines() == [
        "hf-sparse: 256 of 512 selected weights are zero (50.0000%), expected at least 51.0000%.",
        "hf-sparse: 1 of 1 selected weights do not have pattern 1:4, such as up.weight.",
    ]
    code, out, _ = run("report", folder, "--expect", "1:4", "--json")
    assert code == 1 and len(json.loads(out)["unmet"]) == 1


def test_compare_decides_the_exit_code(folder, run):
    assert run("compare", folder, folder, "--keeps-zeros")[0] == 0
    code, out, err = run("compare", folder, folder / "other", "--json", "--keeps-zeros")
    found = json.loads(out)
    assert code == 1 and found["kept_all"] is False and found["lost"] == 256 == found["first"]["zeros"]
    assert err == f"hf-sparse: 256 zeros of {folder} are not zero in {folder / 'other'}.\n"
    assert run("compare", folder, folder / "other")[0] == 0  # nothing is checked
    # The other way about nothing is lost: there was nothing.
    assert run("compare", folder / "other", folder, "--keeps-zeros")[0] == 0


def test_version(run):
    assert run("--version") == (0, f"hf_sparse {hf_sparse.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "completed"),
    (
        ("hf-sparse co", ["compare"]),
        ("hf-sparse compare --keep", ["--keeps-zeros"]),
        ("hf-sparse prune --target", ["--target-sparsity", "--targets"]),
    ),
)
def test_shell_completion(run, monkeypatch, words, completed):
    """Also of the options that are read from dataclasses."""
    monkeypatch.setenv("_HF_SPARSE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    code, out, _ = run()
    assert code == 0 and sorted(out.split()) == completed
    monkeypatch.setenv("_HF_SPARSE_COMPLETE", "source_bash")
    assert "complete -o default -F _hf_sparse_completion hf-sparse" in run()[1]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from hf_sparse.cli import main; sys.argv = ['hf-sparse', '--help']\n"
        "try: main()\nfinally: print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "report" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_module_is_the_program(folder):
    command = [sys.executable, "-m", "hf_sparse", "report", str(folder), "--expect", "1:4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "do not have pattern 1:4" in done.stderr


def test_card(folder, run):
    """Of a run that pruned 2:4, whose weights have lost a zero since."""
    report = SparsityReport((LayerReport("up.weight", "weights", "2:4", (16, 32), 512, 256),), 600, 300, 0.5)
    report.save(folder / "pruning_report.json")
    PruningConfig(pattern="2:4").save(folder / "pruning_config.json")
    weight = load_file(folder / "model.safetensors")["up.weight"]
    weight[weight == 0] = torch.tensor([1.0, *[0.0] * 255])
    save_file({"up.weight": weight}, folder / "model.safetensors")
    code, out, err = run("card", folder)
    assert (code, out, err) == (0, f"{folder / 'README.md'}\n", "")
    text = (folder / "README.md").read_text()
    assert "| selected weights | 255 | 512 | 49.80% |" in text and "| all parameters | 299 | 600 |" in text

    code, out, err = run("card", folder / "other")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"hf-sparse: {folder / 'other' / 'pruning_report.json'} does not exist: a card is generated from"
    )
