"""Every metric, against values computed by hand."""

import math

import pytest
import torch
import transformers
from helpers.fixed_outputs import fixed_outputs, split_rows

from hf_sparse import evaluate_model, reference_outputs
from hf_sparse.evaluation import metric_for


def log_odds(probabilities):
    """Logits of these probabilities."""
    return torch.tensor(probabilities).log()


# The probabilities of two tokens at three positions, of two rows.
PREDICTED = [[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], [[0.5, 0.5], [0.125, 0.875], [0.4, 0.6]]]


def test_perplexity_of_tokens_predicted_from_those_before():
    model = fixed_outputs("TinyForCausalLM", logits=log_odds(PREDICTED))
    batch = {"input_ids": [[0, 1, 0], [1, 0, 0]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    # .5 for token 1 and .25 for token 0; in the second row .125 for the last token: its first comes after padding.
    loss = -(math.log(0.5) + math.log(0.25) + math.log(0.125)) / 3
    expected = {"loss": pytest.approx(loss), "perplexity": pytest.approx(4.0), "tokens": 3}
    assert evaluate_model(model, split_rows(batch, 2)) == expected
    assert evaluate_model(model, split_rows(batch, 1, 1)) == expected
    images = fixed_outputs("TinyForConditionalGeneration", logits=log_odds(PREDICTED))
    assert evaluate_model(images, split_rows(batch, 2)) == expected


def test_perplexity_of_masked_tokens():
    model = fixed_outputs("TinyForMaskedLM", logits=log_odds(PREDICTED))
    batch = {"input_ids": [[5, 5, 0], [0, 5, 0]], "labels": [[1, 0, -100], [-100, 0, -100]]}
    found = evaluate_model(model, split_rows(batch, 1, 1))
    assert found == {"loss": pytest.approx(math.log(4)), "perplexity": pytest.approx(4.0), "tokens": 3}


def test_perplexity_of_target_texts():
    model = fixed_outputs("TinyForConditionalGeneration", {"is_encoder_decoder": True}, logits=log_odds(PREDICTED))
    batch = {"input_ids": [[1, 1], [0, 1]], "labels": [[1, 0, -100], [-100, 0, -100]]}
    assert evaluate_model(model, split_rows(batch, 2))["perplexity"] == pytest.approx(4.0)


@pytest.mark.parametrize("class_name", ["TinyForSequenceClassification", "TinyForImageClassification"])
def test_accuracy(class_name):
    logits = [[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 9.0], [0.0, 1.0, 0.0]]
    model = fixed_outputs(class_name, {"num_labels": 3, "problem_type": None}, logits=logits)
    assert evaluate_model(model, split_rows({"labels": [0, 1, 1, 2]}, 3, 1)) == {"accuracy": 0.5, "samples": 4}


def test_f1_of_several_labels():
    config = {"num_labels": 2, "problem_type": "multi_label_classification"}
    model = fixed_outputs("TinyForSequenceClassification", config, logits=[[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    # Predicted are [1, 0], [1, 1], [0, 0]: two true positives, one false positive, one false negative; one row right.
    batch = {"labels": [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]}
    assert evaluate_model(model, split_rows(batch, 2, 1)) == {"f1": 4 / 6, "accuracy": 1 / 3, "samples": 3}


def test_correlations():
    model = fixed_outputs("TinyForSequenceClassification", {"num_labels": 1}, logits=[[1.0], [2.0], [3.0], [4.0]])
    # Deviations (-1.5, -.5, .5, 1.5) and (-1, 0, -1, 2): 4 / sqrt(5 * 6); ranks of the labels 1.5, 3, 1.5, 4 have the
    # deviations (-1, .5, -1, 1.5): 3 / sqrt(5 * 4.5). Squared errors 0, 0, 4, 0.
    found = evaluate_model(model, split_rows({"labels": [1.0, 2.0, 1.0, 4.0]}, 1, 3))
    assert found == {
        "pearsonr": pytest.approx(4 / math.sqrt(30)),
        "spearmanr": pytest.approx(3 / math.sqrt(22.5)),
        "mse": 1.0,
        "samples": 4,
    }
    assert evaluate_model(model, split_rows({"labels": [5, 5, 5, 5]}, 4))["pearsonr"] == 0.0
    scipy = pytest.importorskip("scipy.stats")
    predictions, labels = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).mul(3).round()
    model = fixed_outputs("TinyForSequenceClassification", {"num_labels": 1}, logits=predictions[:, None])
    found = evaluate_model(model, split_rows({"labels": labels}, 20, 30))
    assert found["pearsonr"] == pytest.approx(scipy.pearsonr(predictions, labels)[0])
    assert found["spearmanr"] == pytest.approx(scipy.spearmanr(predictions, labels)[0])


def test_correlations_of_several_outputs_are_means():
    config = {"num_labels": 2, "problem_type": "regression"}
    model = fixed_outputs("TinyForSequenceClassification", config, logits=[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = evaluate_model(model, split_rows({"labels": [[2.0, 3.0], [4.0, 2.0], [6.0, 1.0]]}, 3))
    assert found == {
        "pearsonr": pytest.approx(0.0),  # of 1 and -1
        "spearmanr": pytest.approx(0.0),
        "mse": pytest.approx((1 + 4 + 9 + 4 + 0 + 4) / 6),
        "samples": 3,
    }


def test_accuracy_of_tokens():
    logits = [[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]
    model = fixed_outputs("TinyForTokenClassification", {"num_labels": 2}, logits=logits)
    batch = {"labels": [[-100, 1, 0], [-100, 0, -100]]}
    assert evaluate_model(model, split_rows(batch, 1, 1)) == {"accuracy": 2 / 3, "tokens": 3}


def test_spans_of_answers():
    model = fixed_outputs(
        "TinyForQuestionAnswering",
        # Best are 1..2; 2..2, as a span cannot end before it starts; 0..1, as the rest is padding.
        start_logits=[[0.0, 5.0, 1.0, 0.0], [0.0, 1.0, 9.0, 0.0], [3.0, 1.0, 9.0, 9.0]],
        end_logits=[[9.0, 0.0, 8.0, 0.0], [9.0, 0.0, 8.5, 0.0], [1.0, 2.0, 9.0, 9.0]],
    )
    batch = {
        "input_ids": [[7, 7, 7, 7]] * 3,
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]],
        "start_positions": [1, 1, 1],
        "end_positions": [2, 3, 1],
    }
    # Two of two tokens; one common of 1 and 3; one common of 2 and 1.
    expected = {"exact_match": 1 / 3, "f1": pytest.approx((1 + 2 / 4 + 2 / 3) / 3), "samples": 3}
    assert evaluate_model(model, split_rows(batch, 2, 1)) == expected


def test_cosine_to_the_embeddings_of_the_dense_model():
    batch = {"attention_mask": [[1, 1, 0], [1, 1, 1]], "input_ids": [[7, 7, 0], [7, 7, 7]]}
    batches = split_rows(batch, 1, 1)
    dense = fixed_outputs(
        "TinyModel",
        last_hidden_state=[[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]], [[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]],
    )
    reference = reference_outputs(dense, batches)
    assert [part.tolist() for part in reference] == [[[2.0, 0.0]], [[1.0, 1.0]]]
    assert evaluate_model(dense, batches, reference) == {"cosine": pytest.approx(1.0), "samples": 2}
    pruned = fixed_outputs(
        "TinyModel",
        last_hidden_state=[[[0.0, 0.0], [3.0, 4.0], [5.0, 5.0]], [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]],
    )
    # cos of (2, 0) and (1.5, 2), and of (1, 1) and (2/3, 0)
    found = evaluate_model(pruned, batches, reference)
    assert found == {"cosine": pytest.approx((0.6 + math.sqrt(0.5)) / 2), "samples": 2}
    images = fixed_outputs("TinyModel", last_hidden_state=[[[[1.0, 3.0]], [[4.0, 6.0]]]])
    assert reference_outputs(images, split_rows({}, 1))[0].tolist() == [[2.0, 5.0]]


ENCODER_DECODER = {"is_encoder_decoder": True}


@pytest.mark.parametrize(
    "class_name, config, name",
    [
        ("LlamaForCausalLM", {}, "perplexity"),
        ("GPT2LMHeadModel", {}, "perplexity"),
        ("LlavaForConditionalGeneration", {}, "perplexity"),
        ("ModernBertForMaskedLM", {}, "perplexity of masked tokens"),
        ("T5ForConditionalGeneration", ENCODER_DECODER, "perplexity of target texts"),
        ("VisionEncoderDecoderModel", ENCODER_DECODER, "perplexity of target texts"),
        ("BartForSequenceClassification", ENCODER_DECODER | {"num_labels": 3}, "accuracy"),
        ("ViTForImageClassification", {"num_labels": 3}, "accuracy"),
        ("BertForSequenceClassification", {"num_labels": 1}, "correlation"),
        ("BertForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}, "F1"),
        ("RoFormerForTokenClassification", {"num_labels": 3}, "accuracy"),
        ("DistilBertForQuestionAnswering", {}, "exact match of answers"),
        ("RoFormerModel", {}, "cosine similarity to the dense model"),
        ("T5EncoderModel", {}, "cosine similarity to the dense model"),
    ],
)
def test_the_metric_of_each_kind_of_model(class_name, config, name):
    assert hasattr(transformers, class_name)
    assert metric_for(fixed_outputs(class_name, config)).name == name


def test_models_without_a_metric_are_refused():
    with pytest.raises(
        ValueError,
        match=r"BertForNextSentencePrediction cannot be evaluated: the metrics are perplexity of causal language "
        r"models, .*accuracy of classifiers, .* Leave eval out, and measure the result with your own metric",
    ):
        evaluate_model(fixed_outputs("BertForNextSentencePrediction"), [{}])
    with pytest.raises(ValueError, match="TinyModel cannot be evaluated: .* its outputs no last_hidden_state"):
        reference_outputs(fixed_outputs("TinyModel", pooled=[[1.0]]), split_rows({}, 1))


@pytest.mark.parametrize(
    "class_name, config, batch, text",
    [
        ("TinyForSequenceClassification", {"num_labels": 2}, {}, "accuracy .* needs labels: name the `label_column`"),
        ("TinyForSequenceClassification", {"num_labels": 2}, {"labels": [2]}, "a label is 2: it must be from 0 to 1"),
        ("TinyForSequenceClassification", {"num_labels": 2}, {"labels": [[0, 1]]}, 'has problem_type="multi_label'),
        ("TinyForSequenceClassification", {"num_labels": 1}, {"labels": [math.nan]}, "not 1 finite numbers"),
        ("TinyForTokenClassification", {"num_labels": 2}, {"labels": [[-100, -1]]}, "a label is -1"),
        ("TinyForTokenClassification", {"num_labels": 2}, {}, "accuracy of token classifiers needs labels"),
        ("TinyForMaskedLM", {}, {"input_ids": [[1]]}, "make the batches with evaluation_batches, or .* mask_tokens"),
        ("TinyForQuestionAnswering", {}, {}, "needs start_positions and end_positions: .* answers as in SQuAD"),
        (
            "TinyForQuestionAnswering",
            {},
            {"input_ids": [[1, 2]], "start_positions": [1], "end_positions": [2]},
            "must be spans within the 2 tokens",
        ),
        ("TinyForCausalLM", {}, {}, "pass batches that are dicts with input_ids or labels"),
        ("TinyModel", {}, {}, r"pass reference=reference_outputs\(model, batches\), computed before pruning"),
    ],
)
def test_wrong_batches_are_refused_before_the_model_is_called(class_name, config, batch, text):
    model = fixed_outputs(class_name, config)
    model.forward = lambda *args, **inputs: pytest.fail("it was called")
    with pytest.raises(ValueError, match=text):
        evaluate_model(model, split_rows(batch, 1))


def test_references_that_do_not_belong_to_the_batches_are_refused():
    model, batches = fixed_outputs("TinyModel", last_hidden_state=torch.ones(2, 3, 4)), split_rows({}, 1, 1)
    reference = reference_outputs(model, batches)
    with pytest.raises(ValueError, match="has 1 entries, but this process evaluates 2 batches"):
        evaluate_model(model, batches, reference[:1])
    with pytest.raises(ValueError, match=r"shape \(2, 4\) does not belong to the embeddings \(1, 4\)"):
        evaluate_model(model, batches, [torch.ones(2, 4)] * 2)
    head = fixed_outputs("TinyForTokenClassification", {"num_labels": 2})
    assert reference_outputs(head, batches) is None
    with pytest.raises(ValueError, match="is not compared with a reference: leave it out"):
        evaluate_model(head, split_rows({"labels": [[0]]}, 1), reference)
    with pytest.raises(ValueError, match="nothing to evaluate on: the batches are empty"):
        evaluate_model(model, [], reference)
    for name, labels in (("TinyForMaskedLM", [[-100]]), ("TinyForTokenClassification", [[-100]])):
        empty = fixed_outputs(name, {"num_labels": 2}, logits=[[[0.0, 1.0]]])
        with pytest.raises(ValueError, match="nothing to evaluate on"):
            evaluate_model(empty, split_rows({"labels": labels}, 1))
