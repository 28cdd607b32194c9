"""Runs the code and commands of the README and of the pages of the site, each page in a folder of its own."""

import dataclasses
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import USER
from helpers.modes import MODES
from helpers.pages import PAGES, ROOT, TRAINING, PageRun, blocks, check_zeros, fill_workplace
from helpers.programs import run_launcher
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from hf_sparse import PruningConfig, SparseTrainingArguments, load_plugin
from hf_sparse.algorithms import ALGORITHMS
from hf_sparse.export import benchmark


TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
PRUNING_FILES = ("pruning_report.json", "pruning_config.json", "pruning_schedule.png", "pruning_layers.png")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fill_workplace(folder)
    return folder


@pytest.fixture
def workplace(filled, tmp_path, monkeypatch):
    """A folder with the models and files that the pages name."""
    folder = tmp_path / "workplace"
    shutil.copytree(filled, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(benchmark, "_measure_size", lambda name, *args: benchmark.ModelSize(name, 1, 1, None))
    return folder


def folders_pushed(run, hub):
    files = {"README.md", "model.safetensors", *PRUNING_FILES}
    assert files <= hub.repos[f"{USER}/out"].files.keys() and "user/pruned" in hub.repos
    assert hub.repos["user/pruned"].files["model.safetensors"] == Path("out-pushed/model.safetensors").read_bytes()
    for name in PRUNING_FILES:
        assert Path("out", name).stat().st_size > 0


def models_are_smaller(run, hub):
    names = ("small", "small-pruned", "three-layers")
    configs = [AutoModelForSequenceClassification.from_pretrained(name).config for name in names]
    assert [config.intermediate_size for config in configs] == [8, 8, 16]
    assert [config.num_hidden_layers for config in configs] == [6, 6, 3]
    assert "## Speed" in Path("small/README.md").read_text()


def half_of_the_weights_are_zero(run, hub):
    for name in ("pruned-half", "pruned-tuned", "pruned-2of4"):
        weight = AutoModelForCausalLM.from_pretrained(name).model.layers[0].mlp.up_proj.weight
        assert (weight == 0).sum() == weight.numel() // 2
    assert "time: about" in run.output


def plugins_are_used(run, hub):
    weight = AutoModelForCausalLM.from_pretrained("pruned-soft").model.layers[0].mlp.up_proj.weight
    assert (weight == 0).sum() == weight.numel() // 2 and run.names["args"].scheduler == "half_way"


def checkpoints_are_described(run, hub):
    assert run.output.count("50.00%") > 10 and '"selected_by": "guess"' in run.output


# What is checked after a page has run, beside the zeros of every folder that its commands write.
CHECKS = {
    "docs/howto/hub.md": folders_pushed,
    "docs/howto/structured.md": models_are_smaller,
    "docs/howto/oneshot.md": half_of_the_weights_are_zero,
    "docs/howto/plugins.md": plugins_are_used,
    "docs/howto/inspect.md": checkpoints_are_described,
}


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if re.search("```(python|bash)", text)])
def test_a_page_runs(page, workplace, plots, hub):
    run = PageRun().run(TEXTS[page])
    assert run.ran or all(block.not_run or block.commands() for block in blocks(TEXTS[page]))
    CHECKS.get(page, lambda run, hub: None)(run, hub)


# Arguments of the Python interpreter for each program that starts processes, on a free port.
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--main_process_port", "0"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
}


@pytest.mark.parametrize("program", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_commands_on_several_processes_run(program, workplace):
    commands = [command for block in blocks(TEXTS["docs/howto/processes.md"]) for command in block.commands()]
    (words,) = (shlex.split(command) for command in commands if command.startswith(program))
    given = words[2:] if program == "accelerate" else words[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = run_launcher([sys.executable, *LAUNCHERS[program], *given, *TRAINING], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 of 2" in done.stdout
    output = Path(words[words.index("--output_dir") + 1])
    assert ", on 2 processes:" in (output / "README.md").read_text()
    check_zeros(output)


def test_every_algorithm_is_in_the_table():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", TEXTS["docs/howto/algorithms.md"], flags=re.MULTILINE)
    assert set(ALGORITHMS.names()) <= set(", ".join(rows).replace("`", "").split(", "))


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert (
        {"demo", "test", "docs"}
        == set(re.findall(r"(?:^|`)make ([a-z]+)", TEXTS["README.md"], flags=re.MULTILINE))
        <= targets
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in ci and "make docs" in ci


def test_the_readme_is_short_and_its_links_are_absolute():
    assert TEXTS["README.md"].count("\n") <= 200
    links = re.findall(r"\]\(([^)]+)\)", TEXTS["README.md"])
    assert len(links) > 10 and [link for link in links if not link.startswith("https://")] == []


# The rows of the table of modes, and the modes that test each of them.
ROWS = {
    "one process": ("single", "single_llama"),
    "DDP": ("ddp",),
    "FSDP2": ("fsdp2",),
    "FSDP2, sharded checkpoints": ("fsdp2_sharded",),
    "sharded as it loads": ("fsdp_size",),
    "tensor parallelism": ("tp",),
    "ZeRO-1": ("zero1",),
    "ZeRO-2": ("zero2",),
    "ZeRO-3": ("zero3",),
}


def test_the_table_of_modes_is_what_is_tested():
    assert sorted(name for names in ROWS.values() for name in names) == sorted(MODES)
    table = TEXTS["docs/howto/processes.md"].split("## What each mode supports\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert rows.keys() == ROWS.keys() | {"DataParallel"} and rows["DataParallel"]["tested"] == "no"
    for row, names in ROWS.items():
        for mode in (MODES[name] for name in names):
            resume = "resumes on any number" if mode.elastic else "resumes on as many"
            assert rows[row]["checkpoint and resume"].startswith(resume if mode.checkpoints else "none"), row
            assert mode.load is None or f"DistributedConfig({mode.load}=2)" in rows[row]["how to enable it"], row
            assert rows[row]["tested"] == ("CPU" if mode.kind == "NO" else "CPU, 2 to 4 processes")


def test_the_recipes_that_are_named_are_those_of_the_folder_and_valid():
    names = {name for text in TEXTS.values() for name in re.findall(r"scripts/recipes/\w+\.yaml", text)}
    assert names == {f"scripts/recipes/{path.name}" for path in (ROOT / "scripts/recipes").iterdir()}
    for name in names:
        assert PruningConfig.from_file(ROOT / name).resolve_groups()


def test_no_default_of_training_arguments_is_changed():
    inherited = {option.name: option.default for option in dataclasses.fields(TrainingArguments)}
    sparse = {option.name: option.default for option in dataclasses.fields(SparseTrainingArguments)}
    assert {name: sparse[name] for name in inherited} == inherited


def test_the_example_of_contributing_is_a_criterion(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "power.py").write_text(example, encoding="utf-8")
    load_plugin(str(tmp_path / "power.py"))
    config = PruningConfig(target_sparsity=0.5, criterion="power", criterion_kwargs={"exponent": 3.0})
    assert config.resolve_groups()["weights"].criterion.score(torch.tensor([-2.0]), None) == 8.0
