"""Export: what another runtime computes is what the checkpoint computes, for any batch size and length."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_sparse.export.agreement import measure_agreement
from hf_sparse.export.inputs import random_inputs, text_inputs
from hf_sparse.export.runtimes import exported_runtime, open_exported, torch_runtime
from hf_sparse.export.workflow import export_model
from tests.helpers import tiny_texts
from tests.helpers.architectures import ARCHITECTURES


pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier and a language model with tokenizers, and texts."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny_texts.save(folder / "bert", tiny_texts.classifier(), tiny_texts.bert_tokenizer())
    tiny_texts.save(folder / "llama", tiny_texts.llama(), tiny_texts.word_tokenizer())
    tiny_texts.write_rows(folder / "texts.jsonl", [{"text": text} for text in tiny_texts.texts(24)])
    return folder


def test_onnx_computes_the_same_for_every_batch_size_and_length(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    agreement = export_model(str(folder / "bert"), tmp_path / "out", "onnx")
    assert agreement.relative_difference < 1e-5 and agreement.same_argmax == 1
    assert exported_runtime(tmp_path / "out") == "onnx"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"
    assert (tmp_path / "out" / "tokenizer.json").is_file() or (tmp_path / "out" / "vocab.txt").is_file()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert")
    program, reference = open_exported(tmp_path / "out", threads=1), torch_runtime(model)
    padded = text_inputs(tiny_texts.texts(7), tiny_texts.bert_tokenizer(), length=12, batch_size=3)
    assert [len(batch["input_ids"]) for batch in padded] == [3, 3, 1]
    assert any(not batch["attention_mask"].all() for batch in padded)
    assert measure_agreement(program, reference, padded).relative_difference < 1e-5
    assert program(random_inputs(model, 1, 5)).shape == reference(random_inputs(model, 1, 5)).shape


def test_openvino_in_bf16_and_int8(folder, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    texts = str(folder / "texts.jsonl")
    agreement = export_model(str(folder / "llama"), tmp_path / "bf16", "openvino", dtype="bf16")
    assert agreement.relative_difference < 3e-2
    assert "INFERENCE_PRECISION_HINT" in (tmp_path / "bf16" / "openvino_model.xml").read_text()
    quantized = export_model(
        str(folder / "llama"), tmp_path / "int8", "openvino", int8=True, calibration_file=texts, samples=20
    )
    assert 0 < quantized.relative_difference < 0.3
    weights = [(tmp_path / name / "openvino_model.bin").stat().st_size for name in ("bf16", "int8")]
    assert weights[1] < weights[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    batch = random_inputs(model, 2, 9, seed=3)
    output = open_exported(tmp_path / "bf16")(batch)
    assert torch.allclose(output, torch_runtime(model)(batch), atol=0.05 * float(output.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, '`to` is "tflite": it must be onnx or openvino'),
        ({"to": "onnx", "dtype": "int4"}, '`dtype` is "int4": it must be one of fp32, bf16, fp16'),
        ({"to": "onnx", "dtype": "bf16"}, 'use `to="openvino"`, or `dtype="fp16"`'),
        ({"to": "onnx", "int8": True}, 'use `to="openvino"`'),
        ({"to": "openvino", "int8": True}, "`int8` needs `calibration_file`"),
        ({"to": "onnx", "samples": 7}, "`samples` has no effect without `calibration_file`"),
        ({"to": "openvino", "int8": True, "calibration_file": "a.txt", "dtype": "bf16"}, "exclude each other"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model("no such model", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_encoder_decoders_are_refused(tmp_path):
    ARCHITECTURES["t5"].model().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match='type "t5" have an encoder and a decoder'):
        export_model(str(tmp_path / "t5"), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse.optional_packages.has_packages", lambda *names: names != ("onnxscript",))
    with pytest.raises(ImportError, match=r'onnxscript is not installed: pip install "hf_sparse\[export\]"'):
        export_model(str(folder / "bert"), tmp_path / "out", "onnx")
