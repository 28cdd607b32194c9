"""Runs run_oneshot.py on a tiny Llama: as a program, on two ranks, and before run_clm.py with zeros kept."""

import json
import os
import subprocess
import sys

import pytest
import run_clm
import run_oneshot
import torch
from _program import parse_args
from helpers.scripts import SCRIPTS, WORDS, read_json, run_script, train_args
from transformers import AutoModelForCausalLM

from hf_sparse.oneshot import OneshotArguments, OneshotConfig


SIGNED = """
from dataclasses import dataclass
from hf_sparse import Criterion, register_criterion

@register_criterion("signed_magnitude")
@dataclass(frozen=True)
class SignedMagnitude(Criterion):
    sign: float = 1.0

    def score(self, weight, statistic):
        return self.sign * weight.detach().float().abs()
"""


@pytest.fixture
def text(tmp_path) -> str:
    """200 lines of 8 words in a fixed order."""
    lines = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(8)) for start in range(0, 1600, 8)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "text.txt")


def arguments(model, output_dir, text, *more) -> list[str]:
    words = ["--model_name_or_path", model, "--output_dir", str(output_dir), "--calibration_file", text]
    return [*words, "--samples", "8", "--length", "16", "--batch_size", "2", "--device", "cpu", *more]


def matrices(folder) -> dict[str, torch.Tensor]:
    """Returns the weights of attention and MLP."""
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name: weight for name, weight in weights.items() if ".layers." in name and weight.ndim == 2}


def test_pruned_and_then_trained_with_zeros_kept(tiny_llama, tmp_path, text):
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    more = ["--target_sparsity", "0.5", "--solver", "sparsegpt", "--eval", "--validation_file", text]
    run_oneshot.main(arguments(tiny_llama, pruned, text, *more))
    parts = ["--model_name_or_path", str(pruned), "--keep_zeros", "--train_file", text, "--validation_file", text]
    parts += ["--do_train", "--do_eval", "--block_size", "16", *train_args(tuned, max_steps=40, learning_rate=0.01)]
    run_clm.main(parts)
    before, after = matrices(pruned), matrices(tuned)
    for name, weight in before.items():
        assert (weight == 0).sum() == weight.numel() // 2
        assert torch.equal(weight == 0, after[name] == 0) and not torch.equal(weight, after[name])
    results = read_json(pruned / "oneshot_results.json")
    assert read_json(tuned / "eval_results.json")["perplexity"] < results["eval_perplexity"] / 2


def test_a_file_of_options(tiny_llama, tmp_path, text):
    content = {"model_name_or_path": tiny_llama, "calibration_file": text, "samples": 4, "length": 16}
    content |= {"pattern": "2:4", "output_dir": str(tmp_path / "out"), "device": "cpu"}
    (tmp_path / "options.json").write_text(json.dumps(content))
    run_oneshot.main([str(tmp_path / "options.json")])
    assert all(((weight != 0).reshape(-1, 4).sum(-1) == 2).all() for weight in matrices(tmp_path / "out").values())
    # A second time there is something in the way, which is one line and exit code 2.
    done = run_script("run_oneshot.py", str(tmp_path / "options.json"), tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("run_oneshot.py: `output_dir`")


def test_a_plugin_is_loaded_before_the_options_are_checked(tiny_llama, tmp_path, text):
    (tmp_path / "signed.py").write_text(SIGNED)
    more = ["--plugin", str(tmp_path / "signed.py"), "--criterion", "signed_magnitude", "--scope", "row"]
    more += ["--target_sparsity", "0.5", "--criterion_kwargs", '{"sign": -1.0}']
    run_oneshot.main(arguments(tiny_llama, tmp_path / "out", text, *more))
    dense, pruned = matrices(tiny_llama), matrices(tmp_path / "out")
    for name, weight in dense.items():  # the larger half of each row is pruned
        median = weight.abs().median(dim=1, keepdim=True).values
        assert torch.equal(pruned[name] == 0, weight.abs() > median)
    written = read_json(tmp_path / "out" / "pruning_config.json")
    assert written["criterion_kwargs"] == {"sign": -1.0}


@pytest.mark.parametrize("words", [["--no_sequential"], ["--no-sequential"], ["--sequential", "false"]])
def test_boolean_options_can_be_negated(words):
    options = ["--model_name_or_path", "m", "--dry_run", "--target_sparsity", "0.5", *words]
    job, config = parse_args((OneshotArguments, OneshotConfig), options)
    assert job.dry_run is True and config.sequential is False


def test_two_processes_prune_as_one(tiny_llama, tmp_path, text):
    more = ["--target_sparsity", "0.5", "--eval", "--validation_file", text]
    run_oneshot.main(arguments(tiny_llama, tmp_path / "one", text, *more))
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPTS / "run_oneshot.py"),
    ]
    command = [sys.executable, *launcher, *arguments(tiny_llama, tmp_path / "two", text, *more)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(SCRIPTS.parent)]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == done.stdout.count("loading") == 1
    one, two = matrices(tmp_path / "one"), matrices(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    alone, together = (read_json(tmp_path / name / "oneshot_results.json") for name in ("one", "two"))
    assert together == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in alone.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "text.txt", "two"]
