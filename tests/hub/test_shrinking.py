"""Shrunk checkpoints: the command, the folder that it writes, and its card."""

import json
from pathlib import Path

import pytest
import torch
from helpers.scripts import bert_config, bert_tokenizer
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification
from typer.testing import CliRunner

from hf_sparse import Pruner, PruningConfig, SparsityReport
from hf_sparse.cli.app import app
from hf_sparse.export.benchmark import BenchmarkResult, Latency, ModelSize
from hf_sparse.hub.card import SparsityCard, rewrite_card, write_card
from hf_sparse.structured.plan import ShrinkPlan


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def pruned(tmp_path) -> Path:
    """A BERT with 16 of 32 neurons pruned in both layers, with tokenizer, report, config and card."""
    torch.manual_seed(0)
    folder, model = tmp_path / "pruned", BertForSequenceClassification(bert_config())
    config = PruningConfig(pattern="neuron", target_sparsity=0.5, criterion="magnitude")
    report = Pruner(model, config).update(1, 1)
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    metrics = {"metrics": {"eval_accuracy": 0.75}, "metadata": {"base_model": "user/dense"}, "max_steps": 10}
    write_card(folder, SparsityCard("pruned", report, config.to_dict(), **metrics))
    return folder


def outputs(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder)(torch.tensor([[5, 9, 3, 7]])).logits


def test_the_command_writes_a_smaller_plain_model_with_its_card(pruned, tmp_path):
    small, dense = tmp_path / "small", AutoModelForSequenceClassification.from_pretrained(pruned)
    dry = run("shrink", pruned, small, "--dry-run")
    assert dry.exit_code == 0 and "intermediate_size 32 -> 16" in dry.stdout and not small.exists()
    done = run("shrink", pruned, small)
    assert (done.exit_code, done.stdout) == (0, dry.stdout)
    assert AutoModelForSequenceClassification.from_pretrained(small).config.intermediate_size == 16
    assert torch.allclose(outputs(small), outputs(pruned), atol=1e-6)
    assert AutoTokenizer.from_pretrained(small)("good film") == AutoTokenizer.from_pretrained(pruned)("good film")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "small"]

    # A neuron has a row of 16 and a bias, and a column of 16; 16 are removed in each of 2 layers.
    before = sum(parameter.numel() for parameter in dense.parameters())
    after = before - 2 * 16 * 33
    report, card = SparsityReport.load(small / "pruning_report.json"), ModelCard.load(small / "README.md")
    assert (report.parameters, report.zeros) == (after, 0) and report.layers[0].shape == (16, 16)
    assert f"| parameters | {before:,} | {after:,} | {after / before:.1%} |" in card.text
    assert "- intermediate_size, from 32 to 16: 16 of 32 neurons are zero in 2 modules" in card.text
    assert "| eval_accuracy | 0.7500 |" in card.text and "no hf_sparse needed" in card.text
    assert "speed of this model was not measured" in card.text and "keep_zeros" not in card.text
    assert card.data["base_model"] == "user/dense" and card.data["tags"] == ["pruned", "shrunk", "neuron"]
    text = (small / "README.md").read_text()
    assert rewrite_card(small).read_text() == text
    assert run("report", small, "--verify").exit_code == 0


def test_measured_latency_enters_the_card(pruned, tmp_path):
    small, file = tmp_path / "small", tmp_path / "bench.json"
    run("shrink", pruned, small)
    sizes = tuple(ModelSize(str(folder), 9, 9, None) for folder in (pruned, small))
    ratios = (1.0, 1.0, 1.0, 1.0), (0.625, 0.6, 0.65, 0.625)
    latencies = [
        Latency(size.name, "torch", batch, ratio[0] * batch / 100, *ratio)
        for batch in (1, 8)
        for size, ratio in zip(sizes, ratios, strict=True)
    ]
    file.write_text(json.dumps(BenchmarkResult(sizes, tuple(latencies), 128, "CPU time").to_dict()))
    assert run("card", small, "--benchmark", file).exit_code == 0
    text = (small / "README.md").read_text()
    assert "| runtime | batch | pruned, ms | this model, ms | ratio | quartiles |" in text
    assert "| torch | 8 | 80.00 | 50.00 | 0.62 | 0.60-0.65 |" in text
    assert str(tmp_path) not in text + (small / "pruning_card.json").read_text()
    assert "not measured" not in text and rewrite_card(small).read_text() == text
    refused = run("card", pruned, "--benchmark", file)  # the model that the other is compared with
    assert refused.exit_code == 2 and "after the model that it is compared with" in refused.stderr


def test_a_heterogeneous_model_says_so_in_the_first_line(pruned, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(pruned)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:, :24] = 0
    model.save_pretrained(pruned)
    assert run("shrink", pruned, tmp_path / "small", "--heterogeneous").exit_code == 0
    lines = ModelCard.load(tmp_path / "small" / "README.md").text.split("\n\n")
    assert lines[0].strip() == "# small" and lines[1].startswith("**This model opens after `import hf_sparse`**")
    assert "import hf_sparse\nfrom transformers import" in "\n\n".join(lines)
    assert torch.allclose(outputs(tmp_path / "small"), outputs(pruned), atol=1e-6)


def test_any_checkpoint_can_lose_layers(tmp_path):
    """Without files of hf_sparse; metrics of the larger model do not hold for it."""
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config()).save_pretrained(tmp_path / "dense")
    assert run("shrink", tmp_path / "dense", tmp_path / "small", "--layers", "1").exit_code == 0
    card = SparsityCard.load(tmp_path / "small")
    assert card.shrunk.layers == {"bert.encoder.layer": (1,)} and card.report.layers == ()
    assert "Reproduce" not in (tmp_path / "small" / "README.md").read_text()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").config.num_hidden_layers == 1


def test_what_cannot_be_shrunk_is_refused(pruned, tmp_path):
    small = tmp_path / "small"
    run("shrink", pruned, small)
    for words, error in (
        ([small, tmp_path / "x"], "nothing can be removed"),
        ([pruned, pruned], "write to a folder beside the source"),
        ([pruned, small, "--layers", "0,one"], '--layers is "0,one": write numbers with commas'),
        ([pruned, small, "--layers", "0", "--layers", "1"], 'gives "0" twice|gives "1" twice'),
        ([tmp_path / "none", small], "no folder"),
    ):
        done = run("shrink", *words)
        assert done.exit_code == 2 and any(part in done.stderr for part in error.split("|")), done.stderr
    assert ShrinkPlan.load(small).changes and not (tmp_path / "x").exists()
