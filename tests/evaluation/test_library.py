"""Perplexity and accuracy of texts, against the model called by hand, and the evaluate library."""

import math
import sys
import types

import pytest
import torch
from helpers.tiny_texts import bert_tokenizer, classifier, llama, word_tokenizer

from hf_sparse.calibration.text_batches import TextReader
from hf_sparse.evaluation import accuracy, evaluate_model


def test_perplexity_weights_all_tokens_equally_and_ignores_padding():
    model = llama().train()
    texts = ["good film", "a very very bad film", "one two three"]
    batches = TextReader(word_tokenizer(), model, length=9, batch_size=2, per_row=True).first(texts)
    found = evaluate_model(model, batches)
    assert model.training
    losses = []
    model.eval()
    for text in texts:  # each by itself, without padding
        ids = torch.tensor([word_tokenizer()(text)["input_ids"]])
        log_probabilities = model(ids).logits.detach().log_softmax(-1)[0]
        losses += [-float(log_probabilities[index, token]) for index, token in enumerate(ids[0, 1:])]
    assert found["tokens"] == len(losses) == 2 + 5 + 3
    assert found["loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_accuracy():
    model = classifier()
    rows = [{"text": text, "label": label} for text, label in (("good", 0), ("bad", 1), ("very good film", 1))]
    reader = TextReader(bert_tokenizer(), model, length=9, batch_size=2)
    tokenized = [bert_tokenizer()(row["text"], return_tensors="pt") for row in rows]
    answers = [int(model(**batch).logits.argmax()) for batch in tokenized]
    right = sum(answer == row["label"] for answer, row in zip(answers, rows, strict=True))
    assert evaluate_model(model, reader.first(rows)) == {"accuracy": right / 3, "samples": 3}


def test_accuracy_is_computed_by_the_evaluate_library_where_it_can_be_loaded(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    calls = []

    def load(*name, cache_dir):
        calls.append(name)
        return types.SimpleNamespace(compute=accuracy)

    monkeypatch.setitem(sys.modules, "evaluate", types.SimpleNamespace(load=load))
    batches = [{"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3], [2, 7, 3]]), "labels": torch.tensor([0, 1, 1])}]
    by_library = evaluate_model(classifier(), batches)
    assert calls == [("accuracy",)]
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert evaluate_model(classifier(), batches) == by_library
