"""Runs the code and commands of the README on tiny models and files under the names that it uses."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import USER
from helpers.modes import MODES
from helpers.programs import run_launcher
from helpers.scripts import run_in_process
from helpers.tiny_texts import llama, save, texts, word_tokenizer, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    TrainingArguments,
)
from typer.testing import CliRunner

import hf_sparse.cli.app
from hf_sparse import Pruner, PruningConfig, SparseTrainingArguments, load_plugin
from hf_sparse.algorithms import ALGORITHMS
from hf_sparse.export import benchmark


PRUNING_FILES = ("pruning_report.json", "pruning_config.json", "pruning_schedule.png", "pruning_layers.png")
ROOT = Path(__file__).parent.parent
PAGES = "structured trainer other-trainers distillation algorithms peft scripts oneshot"
PAGES += " processes resume inspect hub plugins"
README = "\n".join((ROOT / "docs" / "howto" / f"{name}.md").read_text(encoding="utf-8") for name in PAGES.split())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a model, data files, the recipe and the plug-in, in which the commands of the README run."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = tmp_path / "path" / "to" / "model"
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(model)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(model)
    rows = [{"sentence": f"a very {word} film", "label": label} for label, word in enumerate(("bad", "good"))] * 16
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    (plugin,) = [block for block in blocks("python") if block.startswith("# my_methods.py")]
    (tmp_path / "my_methods.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_in_order(workplace, plots, capsys, hub):
    model = AutoModelForSequenceClassification.from_pretrained("path/to/model")
    dataset = [{"input_ids": torch.tensor([2, 8, 9, 5 + label, 7, 3]), "labels": label} for label in (0, 1)] * 8
    names = {"model": model, "train_dataset": dataset, "eval_dataset": dataset}
    for block in blocks("python"):
        libraries = re.findall(r"^from (trl|peft) import", block, flags=re.MULTILINE)
        if not all(importlib.util.find_spec(library) for library in libraries):
            continue
        block = block.replace("resume_from_checkpoint=True", 'resume_from_checkpoint="out/checkpoint-6"')
        if "resume_from_checkpoint" in block:
            # The same arguments, with a checkpoint during training.
            names["args"] = SparseTrainingArguments("out", num_train_epochs=3, target_sparsity=0.8, save_steps=6)
            names["trainer"] = names["SparseTrainer"](names["model"], names["args"], train_dataset=dataset)
            names["trainer"].train()
        exec(block, names)  # noqa: S102 - the README's own code
    assert names["args"].scheduler == "half_way"
    files = {"README.md", "model.safetensors", *PRUNING_FILES}
    assert files <= hub.repos[f"{USER}/out"].files.keys()
    assert "selected" in capsys.readouterr().out
    for name in PRUNING_FILES:
        assert (workplace / "out" / name).stat().st_size > 0


def test_the_card_command_writes_the_card_again(workplace):
    model = AutoModelForSequenceClassification.from_pretrained("path/to/model")
    config = PruningConfig(pattern="2:4", criterion="magnitude")
    report = Pruner(model, config).update(1, 1)
    lines = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("hf-sparse card")]
    (command,) = [line for line in lines if "--benchmark" not in line]
    _, word, folder = shlex.split(command)
    model.save_pretrained(folder)
    report.save(f"{folder}/pruning_report.json")
    config.save(f"{folder}/pruning_config.json")
    with pytest.raises(SystemExit) as done:
        hf_sparse.cli.app.app([word, folder])
    assert done.value.code == 0
    assert f"| {report.zeros:,} | {report.selected:,} | 50.00% |" in Path(folder, "README.md").read_text()


def commands() -> list[Any]:
    """The commands that start a script; torchrun, which starts the ranks of other tests, is left to the slow ones."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if "scripts/run_" in line]
    others = {"path/to/llm", "pruned", "--shrink"}
    lines = [line for line in lines if not others & set(shlex.split(line))]
    return [
        pytest.param(line, id=shlex.split(line)[-1], marks=[pytest.mark.slow] * line.startswith("torchrun"))
        for line in lines
    ]


# Arguments of the Python interpreter for each program of the README that starts processes, on a free port.
LAUNCHERS = {
    "python": [],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--main_process_port", "0"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
}


@pytest.mark.parametrize("command", commands())
def test_shell_commands_run(workplace, command, hub):
    words = shlex.split(command)
    program = "accelerate launch" if words[0] == "accelerate" else words[0]
    given = words[len(program.split()) :]
    extra = ["--max_steps", "6", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"]
    launcher = LAUNCHERS[program]
    several = bool(launcher)
    if several:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = run_launcher([sys.executable, *launcher, *given, *extra], environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "process 0 of 2" in done.stdout
    else:  # most of the time of a program is that of its imports; tests/scripts/ starts some
        run_in_process(command, *extra)
    output = Path(words[words.index("--output_dir") + 1])
    assert (", on 2 processes:" in (output / "README.md").read_text()) == several
    report = json.loads((output / "pruning_report.json").read_text())
    assert report["sparsity_of_selected"] > 0.45
    weights = AutoModelForSequenceClassification.from_pretrained(output).state_dict()
    zeros = sum(int((weights[layer["name"]] == 0).sum()) for layer in report["layers"])
    assert zeros == report["selected_zeros"]
    assert zeros == report["selected_weights"] // 2 or not several
    assert ("user/pruned" in hub.repos) == ("--push_to_hub" in words)
    if "--push_to_hub" in words:
        assert hub.repos["user/pruned"].files["model.safetensors"] == (output / "model.safetensors").read_bytes()


def test_models_get_smaller(workplace, monkeypatch):
    """The commands of the first section in their order, on models of six layers."""
    model = BertForSequenceClassification(BertConfig.from_pretrained("path/to/model", num_hidden_layers=6))
    model.save_pretrained("path/to/model")
    Pruner(model, PruningConfig(pattern="neuron", target_sparsity=0.5, criterion="magnitude")).update(1, 1)
    model.save_pretrained("pruned")
    monkeypatch.setattr(benchmark, "_measure_size", lambda name, *args: benchmark.ModelSize(name, 1, 1, None))
    section = (ROOT / "docs" / "howto" / "structured.md").read_text(encoding="utf-8")
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)).replace("\\\n", " ")
    training, *lines = filter(None, shell.splitlines())
    extra = ["--max_steps", "6", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"]
    run_in_process(training, *extra)
    for line in lines:
        _, *words = shlex.split(line.partition(" > ")[0])
        if words[0] == "export" and not importlib.util.find_spec("openvino"):
            continue
        small = ["--runtime", "torch", "--seconds", "0"] if words[0] == "bench" else []
        result = CliRunner().invoke(hf_sparse.cli.app.app, [*words, *small])
        assert result.exit_code == 0, (line, result.output, result.exception)
        if ">" in line:
            Path(line.split()[-1]).write_text(result.stdout)
    configs = {name: AutoModelForSequenceClassification.from_pretrained(name).config for name in SMALLER}
    assert [config.intermediate_size for config in configs.values()] == [8, 8, 16]
    assert [config.num_hidden_layers for config in configs.values()] == [6, 6, 3]
    assert "## Speed" in Path("small/README.md").read_text()


SMALLER = ("small", "small-pruned", "three-layers")


def test_checkpoints_are_inspected(workplace, capsys):
    """On a 2:4 model, a copy of it, and a folder in place of the name on the Hub."""
    model = AutoModelForSequenceClassification.from_pretrained("path/to/model")
    model.save_pretrained("google-bert/bert-base-uncased")
    report = Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude")).update(1, 1)
    for name in ("out", "out-finetuned"):
        model.save_pretrained(name)
        report.save(f"{name}/pruning_report.json")
    lines = [
        shlex.split(line)
        for line in "\n".join(blocks("bash")).splitlines()
        if line.startswith(("hf-sparse report", "hf-sparse compare"))
    ]
    assert len(lines) == 4
    for _, *words in lines:
        with pytest.raises(SystemExit) as done:
            hf_sparse.cli.app.app(words)
        assert done.value.code == 0, words
    output = capsys.readouterr().out
    assert output.count("50.00%") > 20 and '"selected_by": "guess"' in output


def test_the_push_command_runs(workplace, hub):
    line = next(line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-sparse push"))
    _, command, folder, repo = shlex.split(line)
    (workplace / "path/to/model").rename(folder)
    assert CliRunner().invoke(hf_sparse.cli.app.app, [command, folder, repo]).stdout == f"{hub.url}/{repo}\n"
    assert "model.safetensors" in hub.repos[repo].files


def test_models_are_pruned_without_training_and_then_trained(workplace, capsys):
    """The commands in their order, each with options that make it small."""
    save(Path("path/to/llm"), llama(), word_tokenizer())
    for name, count in (("train.jsonl", 60), ("dev.jsonl", 20)):
        write_rows(Path(name), [{"text": text} for text in texts(count)])
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if "path/to/llm" in line or "pruned-tuned" in line]
    assert [shlex.split(line)[:2] for line in lines] == [
        ["hf-sparse", "prune"],
        ["hf-sparse", "prune"],
        ["python", "scripts/run_oneshot.py"],
        ["python", "scripts/run_clm.py"],
        ["python", "scripts/run_oneshot.py"],
    ]
    small = ["--length", "16", "--samples", "8", "--device", "cpu"]
    train = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--block_size", "16", "--save_strategy", "no"]
    for line, extra in zip(lines[2:], (small, train, small), strict=True):
        run_in_process(line, *extra)
    for line in lines[:2]:
        with pytest.raises(SystemExit) as done:
            hf_sparse.cli.app.app([*shlex.split(line)[1:], *small])
        assert done.value.code == 0
    assert "time: about" in capsys.readouterr().out
    for name in ("pruned", "pruned-tuned", "pruned-2of4", "pruned-soft"):
        weight = AutoModelForCausalLM.from_pretrained(name).model.layers[0].mlp.up_proj.weight
        assert (weight == 0).sum() == weight.numel() // 2


def test_the_methods_are_listed():
    lines = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("hf-sparse methods")]
    assert len(lines) == 2
    for line in lines:
        assert CliRunner().invoke(hf_sparse.cli.app.app, shlex.split(line)[1:]).exit_code == 0


def test_every_algorithm_is_in_the_table():
    table = README.split("# Algorithms of training")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, flags=re.MULTILINE)
    assert set(", ".join(rows).replace("`", "").split(", ")) == {"algorithm", *ALGORITHMS.names()}


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z]+)", readme))
    assert named == {"demo", "test", "docs"}
    assert named <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


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
    table = README.split("## What each mode supports\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert rows.keys() == ROWS.keys() | {"DataParallel"} and rows["DataParallel"]["tested"] == "no"
    for row, names in ROWS.items():
        for mode in (MODES[name] for name in names):
            resume = "resumes on any number" if mode.elastic else "resumes on as many"
            assert rows[row]["checkpoint and resume"].startswith(resume if mode.checkpoints else "none"), row
            assert mode.load is None or f"DistributedConfig({mode.load}=2)" in rows[row]["how to enable it"], row
            assert rows[row]["tested"] == ("CPU" if mode.kind == "NO" else "CPU, 2 to 4 processes")


def test_the_recipes_that_it_names_are_valid():
    names = re.findall(r"scripts/recipes/\w+\.yaml", README)
    assert sorted(set(names)) == sorted(
        f"scripts/recipes/{path.name}" for path in (ROOT / "scripts/recipes").iterdir()
    )
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
