"""The benchmark: models in turns, ratios of neighbouring times."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sparse.cli.app import app
from hf_sparse.export import benchmark
from tests.helpers import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and one of twice the depth and width."""
    folder = tmp_path_factory.mktemp("models")
    tiny.bert(hidden_size=32, num_hidden_layers=2).save_pretrained(folder / "small")
    tiny.bert(hidden_size=256, num_hidden_layers=8, intermediate_size=1024).save_pretrained(folder / "large")
    return [str(folder / "small"), str(folder / "large")]


def test_a_larger_model_is_slower(models, capsys, tmp_path):
    words = ["bench", *models, "--batch", "1", "4", "--length", "16", "--runtime", "torch"]
    with pytest.raises(SystemExit) as done:
        app([*words, "--seconds", "0", "--threads", "1", "--plot", str(tmp_path / "a.png"), "--json"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(out)
    assert result["clock"] == "CPU time"
    small, large = result["sizes"]
    assert small["parameters"] < large["parameters"] and small["file_size"] < large["file_size"]
    assert 0 < large["peak_memory"]
    rows = result["latencies"]
    assert [(row["batch_size"], row["model"]) for row in rows] == [
        (batch, name) for batch in (1, 4) for name in models
    ]
    assert all(row["ratio"] == row["to_reference"] == 1 for row in rows[::2])
    assert all(1 < row["low"] <= row["ratio"] <= row["high"] for row in rows[1::2])


def test_generation_is_measured_of_models_that_generate(models, tmp_path):
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    options = {"batch_sizes": (1,), "length": 4, "runtimes": ["generate"], "seconds": 0}
    result = benchmark.benchmark_models([str(tmp_path / "gpt2")], **options)
    assert result.latencies[0].runtime == "generate" and "generate" in str(result)
    with pytest.raises(ValueError, match="9 tokens and 32 new ones are more than the model's 40 positions"):
        benchmark.benchmark_models([str(tmp_path / "gpt2")], **options | {"length": 9})
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot generate text"):
        benchmark.benchmark_models(models[:1], **options)


def test_ratios_are_medians_of_neighbouring_times():
    times = {("a", "torch"): [1.0, 2.0, 10.0], ("b", "torch"): [0.5, 1.0, 6.0], ("b", "onnx"): [0.25, 0.5, 3.0]}
    a, b, onnx = benchmark._compare(times, batch_size=1)
    assert (a.ratio, b.ratio, onnx.ratio) == (1, 0.5, 1)  # onnx ran no other model
    assert (a.median, b.median) == (2, 1) and onnx.to_reference == 0.25
    assert (b.low, b.high) == (0.5, 0.55)
    torch.testing.assert_close(onnx.low, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["a", "a"]}, "named twice"),
        (
            {"runtimes": ["tensorrt"]},
            '`runtime` is "tensorrt": it must be one of torch, compile, generate, onnx, openvino',
        ),
        ({"batch_sizes": [0]}, r"`batch` is \[0\]"),
        ({"runtimes": ["onnx"], "device": "meta"}, "measured on the CPU only"),
    ],
)
def test_options_are_checked_first(options, message, tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="is exported, and measured on the CPU only"):
        benchmark.benchmark_models(["a", str(tmp_path)], device="meta")
    with pytest.raises(ValueError, match=message):
        benchmark.benchmark_models(**{"models": ["a", "b"]} | options)
