"""`hf-sparse prune`: its options are those of the script, its exit codes and what goes where."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_texts import llama, save, texts, word_tokenizer, write_rows
from transformers import AutoModelForCausalLM, HfArgumentParser

from hf_sparse import OneshotConfig, oneshot
from hf_sparse.cli.app import app
from hf_sparse.files import CARD_FILE
from hf_sparse.oneshot import OneshotArguments


@pytest.fixture
def run(capsys):
    def run_program(*words):
        with pytest.raises(SystemExit) as done:
            app(["prune", *map(str, words)], prog_name="hf-sparse")
        return done.value.code, *capsys.readouterr()

    return run_program


@pytest.fixture
def model(tmp_path):
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts(60)])
    return save(tmp_path / "model", llama(), word_tokenizer())


@pytest.fixture
def given(monkeypatch):
    """The arguments of every call of `run_oneshot`, which is replaced."""
    calls = []
    monkeypatch.setattr(oneshot, "run_oneshot", lambda arguments, config, echo: calls.append((arguments, config)))
    return calls


def test_it_prunes(model, tmp_path, run):
    words = ["--calibration-file", tmp_path / "texts.jsonl", "--samples", 4, "--length", 16, "--pattern", "2:4"]
    code, out, err = run(model, tmp_path / "out", *words)
    assert code == 0 and f"saved to {tmp_path / 'out'}\nnext:\n  hf-sparse report {tmp_path / 'out'} " in out
    assert f"\n  hf-sparse push {tmp_path / 'out'} USER/out " in out and "hf-sparse shrink" not in out
    assert "calibration data: 4 blocks of 16 tokens" in out and "selected" in out
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    assert ((weight != 0).reshape(32, 4, 4).sum(-1) == 2).all()


def test_its_options_are_those_of_the_script(run, given):
    """Every option, set to something else than its default, is read to the same by both."""
    others = {
        "pattern": "4x1",
        "scope": "layer",
        "allocation": "erdos_renyi",
        "solver": "sparsegpt",
        "solver_kwargs": '{"dampening": 0.5, "block_size": 64}',
        "criterion": "magnitude",
        "criterion_kwargs": "{}",
        "allocation_kwargs": "{}",
        "on_indivisible": "skip",
        "activations": "disk",
        "on_unreached": "magnitude",
        "dtype": "float16",
        "forwards": 2,
        "swaps": 0,
        "quality": "fast",
        "reconstruct_kwargs": "{}",
        "target_sparsity": 0.6,
        "min_sparsity_per_layer": 0.1,
        "max_sparsity_per_layer": 0.9,
        "max_eval_samples": 7,
    }
    left_out = {"pruning_config", "groups", "layer_sparsity", "model_name_or_path"}
    left_out |= {"device_map", "offload_folder"}  # which exclude device
    flags = {"keep_zeros": True, "sequential": False, "permute": False, "reconstruct": False}
    files = {"calibration_file", "validation_file"}
    hub = {"dataset_name", "dataset_config_name", "dataset_split", "streaming", "validation_split"}
    changed = set()
    for exclusive in (files, hub):  # data come from files, or from the Hub
        by_script, by_program = ["--model_name_or_path", "m"], []
        for field in (field for cls in (OneshotArguments, OneshotConfig) for field in dataclasses.fields(cls)):
            if field.name in left_out | exclusive:
                continue
            dashed = "--" + field.name.replace("_", "-")
            changed.add(field.name)
            if isinstance(field.default, bool) or field.name in flags:
                value = flags.get(field.name, not field.default)
                by_script += [f"--{field.name}", str(value)]
                by_program += [dashed if value else dashed.replace("--", "--no-", 1)]
            elif field.name in ("targets", "exclude"):
                by_script += [f"--{field.name}", "*.a", "*.b"]
                by_program += [dashed, "*.a", dashed, "*.b"]
            else:
                value = others.get(field.name, 7 if isinstance(field.default, int) else "x")
                by_script += [f"--{field.name}", str(value)]
                by_program += ["x"] if field.name == "output_dir" else [dashed, str(value)]
        code, out, err = run("m", *by_program)
        assert (code, err) == (0, "")
        expected = HfArgumentParser((OneshotArguments, OneshotConfig)).parse_args_into_dataclasses(by_script)
        assert given.pop() == tuple(expected)
    fields = {field.name for cls in (OneshotArguments, OneshotConfig) for field in dataclasses.fields(cls)}
    assert fields - changed == left_out


def test_underscores_and_mappings(run, given):
    run(
        "m",
        "out",
        "--keep_zeros",
        "--layer_sparsity",
        '{"*.q_proj": 0.25}',
        "--no_sequential",
        "--on_unreached",
        "error",
    )
    (job, config), *_ = given
    assert config.keep_zeros and not config.sequential and config.groups["*.q_proj"]["target_sparsity"] == 0.25


PLUGIN = """
from hf_sparse import Criterion, register_criterion


@register_criterion("signed")
class Signed(Criterion):
    def score(self, weight, statistic):
        return weight.detach().float()
"""


def test_a_plugin_registers_a_method_before_the_options_are_checked(model, tmp_path, run):
    (tmp_path / "my_methods.py").write_text(PLUGIN)
    words = [model, tmp_path / "out", "--criterion", "signed", "--target-sparsity", 0.5]
    code, _, err = run(*words, "--plugin", tmp_path / "no_such.py")
    assert code == 2 and "no_such.py: there is no such file" in err
    code, _, err = run(*words)
    assert code == 2 and 'criterion is "signed"' in err
    code, _, err = run(*words, "--plugin", tmp_path / "my_methods.py", "--scope", "row")
    assert code == 0, err
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.up_proj.weight
        for folder in (model, tmp_path / "out")
    )
    medians = before.median(dim=1, keepdim=True).values
    assert torch.equal(after, before.where(before > medians, torch.zeros(())))
    (tmp_path / "out" / CARD_FILE).unlink()  # a new card is made from the config, which names the criterion
    card = [sys.executable, "-m", "hf_sparse", "card", str(tmp_path / "out"), "--plugin", f"{tmp_path}/my_methods.py"]
    done = subprocess.run(card, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_is_130(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(oneshot, "run_oneshot", interrupted)
    assert run("m", "out", "--target-sparsity", 0.5)[0] == 130


def test_help_names_every_option(run):
    code, out, err = run("--help")
    assert code == 0 and "Usage: hf-sparse prune" in out.replace("\n", " ")
    for name in ("calibration", "dry-run", "solver", "target-spar"):
        assert f"--{name}" in out


def test_the_program_by_itself(model, tmp_path):
    command = [sys.executable, "-m", "hf_sparse", "prune", model, str(tmp_path / "out"), "--target-sparsity", "0.5"]
    command += ["--criterion", "magnitude", "--scope", "layer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nsaved to" in done.stdout and Path(tmp_path, "out", "README.md").is_file()
