"""Rows of words with labels, of questions with answers, and of several labels or numbers; masking of tokens."""

import json

import pytest
import torch
from datasets import Dataset
from helpers.tiny_texts import bert_tokenizer, classifier, word_tokenizer
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification

from hf_sparse import calibration_batches, evaluation_batches, mask_tokens
from hf_sparse.calibration.text_tables import load_texts


TAGS = {0: "O", 1: "NAME"}


def token_classifier():
    return BertForTokenClassification(classifier(id2label=TAGS).config)


def read(rows, model, length=12, **options):
    return evaluation_batches(rows, bert_tokenizer(), model, length=length, **options)


def test_the_first_token_of_a_word_has_its_label():
    rows = [
        {"tokens": ["the", "good-bad", "film"], "ner_tags": ["O", "NAME", "O"]},
        {"tokens": ["story"], "ner_tags": ["NAME"]},
        {"tokens": [], "ner_tags": []},
    ]
    (batch,) = read(rows, token_classifier())
    # [CLS] story [SEP] and [CLS] the good - bad film [SEP]
    assert batch["input_ids"].tolist() == [[2, 8, 3, 0, 0, 0, 0], [2, 9, 5, 1, 6, 7, 3]]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, -100, -100, -100], [-100, 0, 1, -100, -100, 0, -100]]
    assert token_classifier()(**batch).loss.isfinite()
    (short,) = read(rows, token_classifier(), length=4, samples=1)
    assert short["labels"].tolist() == [[-100, 0, 1, -100]]
    (calibration,) = calibration_batches(rows, bert_tokenizer(), token_classifier(), length=12, samples=2)
    assert torch.equal(calibration["labels"].sort(0).values, batch["labels"].sort(0).values)


def test_token_classifiers_calibrate_on_plain_texts():
    (batch,) = read([{"text": "good film", "label": 1}], token_classifier())
    assert batch["input_ids"].tolist() == [[2, 5, 7, 3]] and "labels" not in batch


@pytest.mark.parametrize(
    "row, options, text",
    [
        ({"tokens": ["good"], "labels": [1, 0]}, {}, r"has 1 words and the labels \[1, 0\]: give one for each word"),
        ({"tokens": ["good"], "labels": ["PLACE"]}, {}, "the label 'PLACE': it must be a number, or one of \"O\""),
        ({"tokens": [3], "labels": [1]}, {}, r"holds \[3\]: it must be text"),
        ({"text": "good", "tags": [1]}, {"label_column": "tags"}, "need a list of words for each row"),
    ],
)
def test_labels_of_words_that_cannot_be_used(row, options, text):
    with pytest.raises(ValueError, match=text):
        read([row], token_classifier(), **options)


def test_several_labels_and_numbers():
    several = classifier(id2label={0: "x", 1: "y", 2: "z"}, problem_type="multi_label_classification")
    rows = [{"text": "good", "labels": ["z", "x"]}, {"text": "bad", "labels": []}]
    assert read(rows, several)[0]["labels"].tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert read([{"text": "good", "labels": [0, 1, 1]}], several)[0]["labels"].tolist() == [[0.0, 1.0, 1.0]]
    for wrong in (["w"], [1], [0, 2, 1]):
        with pytest.raises(ValueError, match="they must be 3 zeros or ones, or a list of names"):
            read([{"text": "good", "labels": wrong}], several)
    score = read([{"text": "good", "label": 5}, {"text": "bad", "label": 0}], classifier(num_labels=1))[0]["labels"]
    assert score.tolist() == [5.0, 0.0] and score.is_floating_point()
    with pytest.raises(ValueError, match="the label 'high': it must be a number"):
        read([{"text": "good", "label": "high"}], classifier(num_labels=1))


# Questions


def question(context="the story is very bad", answer="very bad", question="good film"):
    found = [answer] if answer else []
    answers = {"text": found, "answer_start": [context.index(text) for text in found]}
    return {"question": question, "context": context, "answers": answers}


def qa_model():
    return BertForQuestionAnswering(classifier().config)


def test_answers_become_the_positions_of_their_tokens():
    # [CLS] good film [SEP] the story is very bad [SEP]
    (batch,) = read([question()], qa_model())
    assert batch["input_ids"].tolist() == [[2, 5, 7, 3, 9, 8, 11, 13, 6, 3]]
    assert batch["start_positions"].tolist() == [7] and batch["end_positions"].tolist() == [8]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]
    assert qa_model()(**batch).loss.isfinite()
    (none,) = read([question(answer=None)], qa_model())
    assert none["start_positions"].tolist() == none["end_positions"].tolist() == [0]
    (unlabelled,) = read([("good film", "the story")], qa_model())
    assert "start_positions" not in unlabelled


def test_a_long_context_is_cut_to_the_window_with_the_answer():
    context = "one two three four five six seven eight good bad film story"
    (batch,) = read([question(context, "good bad")], qa_model(), length=10)
    ids = batch["input_ids"][0].tolist()
    assert len(ids) == 10 and ids[:4] == [2, 5, 7, 3]
    start, end = int(batch["start_positions"]), int(batch["end_positions"])
    assert start > 3 and ids[start : end + 1] == [5, 6]
    (first,) = read([question(context, None)], qa_model(), length=10)
    assert first["input_ids"][0].tolist() == [2, 5, 7, 3, 15, 16, 17, 18, 19, 3]


def test_questions_that_cannot_be_used():
    for row, options, text in (
        (question(question="one two three"), {"length": 6}, "leaves its context no room in 6 tokens"),
        (question() | {"answers": "bad"}, {}, "has the answers 'bad': they must be of the form"),
        (question() | {"answers": {"text": ["bad"], "answer_start": []}}, {}, "must be of the form"),
        (question(), {"text_column": "context", "label_column": "answers"}, 'text_column="question,context"'),
    ):
        with pytest.raises(ValueError, match=text):
            read([row], qa_model(), **options)


def test_files_in_the_format_of_squad(tmp_path):
    row = question()
    answers = [{"text": "very bad", "answer_start": 13}]
    paragraph = {"context": row["context"], "qas": [{"id": "1", "question": row["question"], "answers": answers}]}
    (tmp_path / "nested.json").write_text(json.dumps({"version": "1", "data": [{"paragraphs": [paragraph]}]}))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": [row]}))
    (tmp_path / "lines.jsonl").write_text(json.dumps(row))
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list([row | {"answers": json.dumps(row["answers"])}]).to_csv(tmp_path / "rows.csv")
    for name in ("nested.json", "wrapped.json", "lines.jsonl", "rows.parquet", "rows.csv"):
        (batch,) = read(load_texts(str(tmp_path / name)), qa_model())
        assert (int(batch["start_positions"]), int(batch["end_positions"])) == (7, 8), name
    (tmp_path / "other.json").write_text(json.dumps({"data": [{"paragraphs": [{"text": "good"}]}]}))
    with pytest.raises(ValueError, match='other.json" is not in the format of SQuAD: KeyError'):
        load_texts(str(tmp_path / "other.json"))


# Masking


def test_masked_tokens_depend_on_the_row_alone():
    texts = ["one two three four five six seven eight good bad", "good", "very very bad film the story"]
    model = BertForMaskedLM(classifier().config)

    def masked(**options):
        rows = {}
        for batch in read(texts, model, length=16, **options):
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                chosen = labels != -100
                assert torch.equal(chosen, ids == 4) and mask[chosen].all()
                rows[tuple(ids.where(~chosen, labels)[mask.bool()].tolist())] = chosen.nonzero()[:, 0].tolist()
        return rows

    rows = masked()
    # round(.15 x 10) = 2 tokens, round(.15 x 1) = 0 and so 1, round(.15 x 6) = 1; never [CLS] or [SEP].
    assert sorted((len(ids) - 2, len(chosen)) for ids, chosen in rows.items()) == [(1, 1), (6, 1), (10, 2)]
    assert all(0 < position < len(ids) - 1 for ids, chosen in rows.items() for position in chosen)
    assert rows == masked(batch_size=1)
    batches = [{"input_ids": torch.arange(5, 15)[None]}]
    by_seed = [mask_tokens(batches, bert_tokenizer(), seed=seed)[0]["labels"] for seed in range(8)]
    assert len({tuple(labels[0].tolist()) for labels in by_seed}) > 4
    assert torch.equal(batches[0]["input_ids"], torch.arange(5, 15)[None])  # unchanged


def test_masking_needs_a_mask_token():
    model = BertForMaskedLM(classifier().config)
    with pytest.raises(
        ValueError, match="the tokenizer has no mask token, .* with `tokenizer_name`, or leave `eval` out"
    ):
        evaluation_batches(["good"], word_tokenizer(), model, length=8)
    calibration_batches(["good"], word_tokenizer(), model, length=8, samples=1)  # needs none
    with pytest.raises(ValueError, match="share is 0: it must be above 0"):
        mask_tokens([], bert_tokenizer(), share=0)
