"""One-shot pruning with --eval: every kind of model that reads texts, and the results in the card's metadata."""

import json

import pytest
import torch
from helpers.tiny_texts import WORDS, bert_tokenizer, classifier, llama, save, texts, word_tokenizer, write_rows
from huggingface_hub import ModelCard
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sparse.oneshot import OneshotArguments, OneshotConfig, run_oneshot
from hf_sparse.oneshot import run as run_module


def bert(cls=BertForSequenceClassification, **config):
    """A model whose weights are large enough for pruning to change its predictions."""
    torch.manual_seed(0)
    return cls(classifier(initializer_range=0.6, **config).config).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS) + 5}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def rows(**columns):
    """Rows with a text, the function of which each column is, given the text and the number of the row."""
    return [{name: make(text, index) for name, make in columns.items()} for index, text in enumerate(texts(24))]


def text_of(text, index):
    return text


def answers(text, index):
    word = text.split()[-1]
    return {"text": [word], "answer_start": [text.rindex(word)]}


# The model, its data, the task of the Hub, and the metrics in the metadata.
KINDS = {
    "causal": (llama, rows(text=text_of), "text-generation", ["perplexity"]),
    "classifier": (
        bert,
        rows(sentence=text_of, label=lambda text, index: index % 2),
        "text-classification",
        ["accuracy"],
    ),
    "regression": (
        lambda: bert(num_labels=1),
        rows(sentence=text_of, label=lambda text, index: len(text)),
        "text-classification",
        ["pearsonr", "spearmanr", "mse"],
    ),
    "masked": (lambda: bert(BertForMaskedLM), rows(text=text_of), "fill-mask", ["perplexity"]),
    "embedding": (lambda: bert(BertModel), rows(text=text_of), "feature-extraction", ["cosine"]),
    "tokens": (
        lambda: bert(BertForTokenClassification, num_labels=3),
        rows(
            tokens=lambda text, index: text.split(),
            ner_tags=lambda text, index: [len(word) % 3 for word in text.split()],
        ),
        "token-classification",
        ["accuracy"],
    ),
    "questions": (
        lambda: bert(BertForQuestionAnswering),
        rows(id=lambda text, index: str(index), question=lambda *_: "good film", context=text_of, answers=answers),
        "question-answering",
        ["exact_match", "f1"],
    ),
    "targets": (
        t5,
        rows(text=text_of, short=lambda text, index: text[:9].strip()),
        "text2text-generation",
        ["perplexity"],
    ),
}


def prune(model, out, data, lines=None, **options):
    given = {"calibration_file": data, "validation_file": data, "eval": True, "samples": 8, "length": 24} | options
    arguments = OneshotArguments(str(model), str(out), batch_size=4, device="cpu", **given)
    return run_oneshot(arguments, OneshotConfig(target_sparsity=0.75), [].append if lines is None else lines.append)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_every_kind_are_in_the_card(kind, tmp_path):
    make, data, task, metrics = KINDS[kind]
    model = save(tmp_path / "model", make(), word_tokenizer() if kind == "causal" else bert_tokenizer())
    file, lines = write_rows(tmp_path / "dev.jsonl", data), []
    prune(model, tmp_path / "out", file, lines, label_column="short" if kind == "targets" else None)
    results = json.loads((tmp_path / "out" / "oneshot_results.json").read_text())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = {result.metric_type: result for result in card.data.eval_results}
    assert list(found) == metrics == card.data.metrics
    for name, result in found.items():
        assert result.metric_value == results[f"eval_{name}"]
        assert (result.task_type, result.dataset_type, result.dataset_name) == (task, "json", "dev")
        assert f"| eval_{name} |" in card.content
    assert any(results[f"eval_{name}"] != results[f"dense_{name}"] for name in metrics)
    if kind == "embedding":
        assert results["dense_cosine"] == pytest.approx(1.0) and 0 < results["eval_cosine"] < 1
        assert found["cosine"].metric_name == "Cosine similarity to the dense model"
    shown = next(line for line in lines if line.startswith("after pruning:"))
    assert all(f"{name} {results[f'eval_{name}']:,.4g}" in shown for name in metrics)


def test_a_continued_run_compares_with_the_dense_model(tmp_path, monkeypatch):
    make, data, *_ = KINDS["embedding"]
    model = save(tmp_path / "model", make(), bert_tokenizer())
    file = write_rows(tmp_path / "dev.jsonl", data)
    prune(model, tmp_path / "whole", file)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate_model", _fails_the_second_time(run_module.evaluate_model))
        with pytest.raises(OSError, match="interrupted"):
            prune(model, tmp_path / "out", file)
    prune(model, tmp_path / "out", file)
    whole, continued = (
        json.loads((tmp_path / name / "oneshot_results.json").read_text()) for name in ("whole", "out")
    )
    assert continued == whole and whole["eval_cosine"] < 0.999


def _fails_the_second_time(evaluate):
    calls = []

    def called(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("interrupted")
        return evaluate(*arguments)

    return called


def test_a_data_set_in_a_folder_gives_no_path_away(tmp_path):
    make, data, *_ = KINDS["masked"]
    model = save(tmp_path / "model", make(), bert_tokenizer())
    (tmp_path / "films").mkdir()
    write_rows(tmp_path / "films" / "train.jsonl", data)
    write_rows(tmp_path / "films" / "validation.jsonl", data)
    options = {"dataset_name": str(tmp_path / "films"), "calibration_file": None, "validation_file": None}
    prune(model, tmp_path / "out", None, **options)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("films", "films", "validation")
    assert data.datasets is None and str(tmp_path) not in str(data)


def test_what_cannot_be_evaluated_is_refused_before_pruning(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "prune_oneshot", lambda *args, **options: pytest.fail("it was pruned"))
    masked = save(tmp_path / "masked", bert(BertForMaskedLM), bert_tokenizer())
    texts_only = write_rows(tmp_path / "texts.jsonl", KINDS["masked"][1])
    speechless = save(tmp_path / "words", llama(), word_tokenizer())
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        prune(masked, tmp_path / "out", texts_only, tokenizer_name=speechless)
    classifies = save(tmp_path / "bert", bert(), bert_tokenizer())
    with pytest.raises(ValueError, match="accuracy of classifiers needs labels: name the `label_column`"):
        prune(classifies, tmp_path / "out", texts_only)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="ViTForImageClassification reads pixel_values, not texts: leave `eval`"):
        prune(tmp_path / "vit", tmp_path / "out", texts_only)
