"""Evaluation of real models: what must not change the values, and what evaluation must not change."""

import pytest
import torch
from helpers.evaluations import KINDS, batches_of, perturb

from hf_sparse import evaluate_model, reference_outputs


def evaluate(kind, *sizes):
    model, batches = KINDS[kind][0](), batches_of(kind, *sizes)
    reference = reference_outputs(model, batches)
    return evaluate_model(perturb(model), batches, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_values_depend_neither_on_batches_nor_on_padding(kind, monkeypatch):
    found = evaluate(kind, 6)
    assert evaluate(kind, 2, 3, 1) == pytest.approx(found, rel=1e-4)
    make, data = KINDS[kind]
    rows = data()
    if "attention_mask" in rows:
        rows["input_ids"] = rows["input_ids"].where(rows["attention_mask"].bool(), torch.tensor(1))
        monkeypatch.setitem(KINDS, kind, (make, lambda: rows))
        assert evaluate(kind, 6) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_batches_are_left_as_they_are(kind):
    model, batches = KINDS[kind][0]().train(), batches_of(kind, 4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    evaluate_model(model, batches, reference_outputs(model, batches))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(batch[name], values[name]) for batch, values in zip(batches, data) for name in values)


@pytest.mark.parametrize("kind", ["causal", "masked", "targets", "classes", "answers", "embeddings"])
def test_half_precision(kind):
    make, batches = KINDS[kind][0], batches_of(kind, 6)
    full, half = make(), make().to(torch.bfloat16)
    found = evaluate_model(half, batches, reference_outputs(full, batches))
    expected = evaluate_model(full, batches, reference_outputs(full, batches))
    assert found == pytest.approx(expected, rel=0.2, abs=0.2)


def test_losses_are_those_of_the_model():
    for kind in ("masked", "targets"):
        model, batch = KINDS[kind][0](), batches_of(kind, 6)
        assert evaluate_model(model, batch)["loss"] == pytest.approx(float(model(**batch[0]).loss), rel=1e-5)
