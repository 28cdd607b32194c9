"""Runs run_qa.py on a tiny BERT and small files; expected answers and metrics are computed by hand."""

import json
import math

import numpy as np
import pytest
import qa_metrics
import run_qa
from datasets import Dataset
from helpers.scripts import (
    NAMES,
    PLACES,
    is_encoder_matrix,
    read_json,
    train_args,
    word_tokenizer,
    write_rows,
    zero_fraction,
)
from qa_data import Windows, load_qa_files
from qa_postprocessing import best_spans, postprocess
from transformers import AutoModelForQuestionAnswering, AutoTokenizer


def question_rows(count: int) -> list[dict]:
    """Questions "where does anna live ?" and the like; the answer is the only place in the context."""
    rows = []
    for index in range(count):
        name, place = NAMES[index % 4], PLACES[(index + index // 4) % 4]
        context = f"{name} lives in {place} and is fine ."
        answers = {"text": [place], "answer_start": [context.index(place)]}
        rows.append(
            {"id": f"q{index}", "question": f"where does {name} live ?", "context": context, "answers": answers}
        )
    return rows


def nested(rows: list[dict]) -> dict:
    """The rows in the nested form of SQuAD: one article, one question per paragraph."""
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        paragraphs.append(
            {"context": row["context"], "qas": [{k: row[k] for k in ("id", "question")} | {"answers": answers}]}
        )
    return {"version": "1.1", "data": [{"title": "people", "paragraphs": paragraphs}]}


def arguments(model, output_dir, *more, **options) -> list[str]:
    shape = ["--max_seq_length", "24", "--doc_stride", "4"]
    return ["--model_name_or_path", model, *shape, *train_args(output_dir, **options), *more]


def test_training_evaluation_and_prediction(tiny_bert_qa, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(nested(question_rows(32))))
    (tmp_path / "dev.json").write_text(json.dumps({"data": question_rows(8)}))
    test_rows = [{name: row[name] for name in ("id", "question", "context")} for row in question_rows(4)]
    out = tmp_path / "out"
    parts = ["--train_file", str(tmp_path / "train.json"), "--validation_file", str(tmp_path / "dev.json")]
    parts += ["--test_file", write_rows(tmp_path / "test.jsonl", test_rows), "--do_train", "--do_eval", "--do_predict"]
    run_qa.main(arguments(tiny_bert_qa, out, *parts, max_steps=60, learning_rate=0.01, eval_strategy="epoch"))

    metrics = read_json(out / "eval_results.json")
    # The place always stands at the same position.
    assert metrics["eval_exact_match"] == 100.0 and metrics["eval_f1"] == 100.0 and metrics["eval_samples"] == 8
    assert read_json(out / "eval_predictions.json") == {
        row["id"]: row["answers"]["text"][0] for row in question_rows(8)
    }
    assert read_json(out / "test_predictions.json") == {f"q{index}": PLACES[index] for index in range(4)}
    n_best = read_json(out / "test_nbest_predictions.json")["q0"]
    assert n_best[0]["text"] == "paris" and sum(item["probability"] for item in n_best) == pytest.approx(1.0)
    assert "test_exact_match" not in read_json(out / "test_results.json")
    assert not (out / "test_null_odds.json").exists()
    history = read_json(out / "trainer_state.json")["log_history"]
    assert sum("eval_f1" in entry for entry in history) >= 2, "evaluation during training has to score answers too"


def test_questions_without_an_answer(tiny_bert_qa, tmp_path):
    rows = question_rows(12)
    for row in rows[::3]:
        row["answers"] = {"text": [], "answer_start": []}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(nested(rows)))
    parts = ["--train_file", str(file), "--validation_file", str(file), "--do_train", "--do_eval"]
    with pytest.raises(ValueError, match="4 questions of the train split have no answer .*`version_2_with_negative`"):
        run_qa.main(arguments(tiny_bert_qa, tmp_path / "out", *parts))
    run_qa.main(arguments(tiny_bert_qa, tmp_path / "out", *parts, "--version_2_with_negative"))
    metrics = read_json(tmp_path / "out" / "eval_results.json")
    assert (metrics["eval_total"], metrics["eval_HasAns_total"], metrics["eval_NoAns_total"]) == (12, 8, 4)
    assert len(read_json(tmp_path / "out" / "eval_null_odds.json")) == 12


def test_all_formats_give_the_same_rows(tmp_path):
    rows = question_rows(3)
    (tmp_path / "nested.json").write_text(json.dumps(nested(rows)))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": rows}))
    write_rows(tmp_path / "list.json", rows)
    write_rows(tmp_path / "lines.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    flat = Dataset.from_list([row | {"answers": json.dumps(row["answers"])} for row in rows])
    flat.to_csv(tmp_path / "rows.csv")
    for name in ("nested.json", "wrapped.json", "list.json", "lines.jsonl", "rows.parquet", "rows.csv"):
        loaded = load_qa_files({"train": str(tmp_path / name), "test": None})["train"]
        assert loaded.select_columns(list(rows[0])).to_list() == rows, name


@pytest.mark.parametrize(
    "parts, error, text",
    [
        ([], ValueError, "no data: pass `dataset_name`"),
        (["--train_file", "no.json", "--do_train"], FileNotFoundError, 'train file "no.json" does not exist'),
        (["--train_file", "{rows}", "--do_eval"], ValueError, "Pass `validation_file`"),
        (["--train_file", "{bare}", "--do_train"], ValueError, 'the train split has no column "answers"'),
        (["--train_file", "{csv}", "--do_train"], ValueError, "rows.csv\": a row has the answers 'in oslo'"),
        (["--train_file", "{rows}", "--do_train", "--doc_stride", "24"], ValueError, "less than the window of 24"),
    ],
)
def test_errors_are_raised_before_training(tiny_bert_qa, tmp_path, parts, error, text):
    rows = question_rows(2)
    bare = [{name: row[name] for name in ("id", "question", "context")} for row in rows]
    written = {
        "rows": write_rows(tmp_path / "rows.jsonl", rows),
        "bare": write_rows(tmp_path / "bare.jsonl", bare),
        "csv": write_rows(tmp_path / "rows.csv", [row | {"answers": "in oslo"} for row in bare]),
    }
    with pytest.raises(error) as caught:
        run_qa.main(arguments(tiny_bert_qa, tmp_path / "out", *[part.format(**written) for part in parts]))
    assert text in str(caught.value)


def test_an_answer_is_found_in_the_window_that_holds_it(tiny_bert_qa):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_qa)
    context = "the film is fine and anna lives in oslo"
    row = {"id": ["q"], "question": ["where ?"], "context": [context]}
    # [CLS] where ? [SEP] + 5 words of the context + [SEP]; neighbouring windows share 2 words.
    windows = Windows(tokenizer, max_length=10, stride=2, pad_to_max_length=True)
    answers = {"text": [" anna lives"], "answer_start": [context.index(" anna")]}
    encoded = windows.for_training(row | {"answers": [answers]})
    words = [[tokenizer.decode([token]) for token in ids] for ids in encoded["input_ids"]]
    assert [window[4:9] for window in words] == [
        ["the", "film", "is", "fine", "and"],
        ["fine", "and", "anna", "lives", "in"],
        ["lives", "in", "oslo", "[SEP]", "[PAD]"],
    ]
    # The no-answer token is [CLS], at 0; the space before "anna" is no token.
    assert encoded["start_positions"] == [0, 6, 0] and encoded["end_positions"] == [0, 7, 0]
    evaluated = windows.for_evaluation(row)
    assert evaluated["example_id"] == ["q"] * 3 and evaluated["null_index"] == [0] * 3
    assert evaluated["offset_mapping"][0][:6] == [None, None, None, None, (0, 3), (4, 8)]


def test_a_tokenizer_that_pads_on_the_left_gets_the_context_first():
    tokenizer = word_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", "<eos>"
    windows = Windows(tokenizer, max_length=8, stride=0, pad_to_max_length=True)
    row = {
        "question": ["where ?"],
        "context": ["anna lives in oslo"],
        "answers": [{"text": ["oslo"], "answer_start": [14]}],
    }
    encoded = windows.for_training(row)
    assert tokenizer.decode(encoded["input_ids"][0]).split()[-6:] == ["anna", "lives", "in", "oslo", "where", "?"]
    assert encoded["start_positions"] == [5]


def test_best_spans_by_hand():
    start, end = np.array([0.0, 5.0, 1.0]), np.array([0.0, 1.0, 4.0])
    offsets = [None, (0, 3), (4, 8)]
    assert best_spans(start, end, offsets, 20, 30) == [(9.0, 0, 8), (6.0, 0, 3), (5.0, 4, 8)]
    assert best_spans(start, end, offsets, 20, 1) == [(6.0, 0, 3), (5.0, 4, 8)]
    # Only the best start and the best end are combined.
    assert best_spans(start, end, offsets, 1, 30) == [(9.0, 0, 8)]
    # Logits of padding beyond the offsets are not looked at.
    assert best_spans(np.append(start, 99.0), np.append(end, 99.0), offsets, 1, 30) == [(9.0, 0, 8)]


def test_postprocess_takes_the_best_window_and_weighs_no_answer():
    examples = Dataset.from_dict({"id": ["q"], "context": ["anna lives"]})
    offsets = [[None, (0, 4)], [None, (5, 10)]]
    features = Dataset.from_dict({"example_id": ["q", "q"], "offset_mapping": offsets, "null_index": [0, 0]})
    # Spans score 2 + 2 and 3 + 3; no answer scores 4 + 4 and 3.5 + 3.5, of which the lower one counts.
    logits = (np.array([[4.0, 2.0], [3.5, 3.0]]), np.array([[4.0, 2.0], [3.5, 3.0]]))
    texts, n_best, null_odds = postprocess(examples, features, logits)
    assert texts == {"q": "lives"} and null_odds == {}
    assert [item["text"] for item in n_best["q"]] == ["lives", "anna"]
    assert n_best["q"][0]["probability"] == pytest.approx(1 / (1 + math.exp(-2)))
    texts, n_best, null_odds = postprocess(examples, features, logits, version_2_with_negative=True)
    assert texts == {"q": ""} and null_odds == {"q": 1.0}
    assert [item["text"] for item in n_best["q"]] == ["", "lives", "anna"]
    texts, _, _ = postprocess(examples, features, logits, True, null_score_diff_threshold=1.5)
    assert texts == {"q": "lives"}
    with pytest.raises(ValueError, match="1 predictions for 2 windows"):
        postprocess(examples, features, (logits[0][:1], logits[1][:1]))


@pytest.mark.parametrize(
    "prediction, reference, exact, overlap",
    [
        ("The Eiffel Tower!", "eiffel  tower", 1.0, 1.0),
        ("in Oslo", "Oslo", 0.0, 2 / 3),
        ("Rome", "Oslo", 0.0, 0.0),
        # Common words count with their repeats: 2 of 3 and of 2.
        ("a b b c", "b b", 0.0, 2 * 2 / 5),
        ("twenty-one", "twenty one", 0.0, 0.0),
        # Articles inside of words stay.
        ("theatre", "atre", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1_by_hand(prediction, reference, exact, overlap):
    assert qa_metrics.exact_match(prediction, reference) == exact
    assert qa_metrics.f1(prediction, reference) == pytest.approx(overlap)


def test_squad_takes_the_best_reference_of_each_question():
    predictions = [{"id": "1", "prediction_text": "in oslo"}, {"id": "2", "prediction_text": "rome"}]
    references = [
        {"id": "1", "answers": {"text": ["Bonn", "Oslo"], "answer_start": [0, 0]}},
        {"id": "2", "answers": {"text": ["Rome"], "answer_start": [0]}},
    ]
    figures = qa_metrics.squad(predictions, references)
    assert figures == pytest.approx({"exact_match": 50.0, "f1": 100 * (2 / 3 + 1) / 2})


def test_squad_v2_splits_the_figures():
    predictions = [{"id": "1", "prediction_text": "oslo"}, {"id": "2", "prediction_text": "rome"}]
    predictions += [{"id": "3", "prediction_text": ""}]
    references = [{"id": "1", "answers": {"text": ["in Oslo"]}}]
    references += [{"id": key, "answers": {"text": []}} for key in ("2", "3")]
    figures = qa_metrics.squad_v2(predictions, references)
    overlap = 2 / 3
    assert figures == pytest.approx(
        {
            "exact": 100 / 3,
            "f1": 100 * (overlap + 1) / 3,
            "total": 3,
            "HasAns_exact": 0.0,
            "HasAns_f1": 100 * overlap,
            "HasAns_total": 1,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
            "NoAns_total": 2,
        }
    )


def test_the_script_prunes_with_the_mixed_in_trainer(tiny_bert_qa, tmp_path):
    """With a .json file of arguments."""
    file = write_rows(tmp_path / "rows.jsonl", question_rows(16))
    content = {
        "model_name_or_path": tiny_bert_qa,
        "train_file": file,
        "validation_file": file,
        "output_dir": str(tmp_path / "out"),
        "max_seq_length": 24,
        "doc_stride": 4,
        "max_steps": 4,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
        "target_sparsity": 0.5,
    }
    (tmp_path / "arguments.json").write_text(json.dumps(content))
    run_qa.main([str(tmp_path / "arguments.json")])
    assert "eval_exact_match" in read_json(tmp_path / "out" / "eval_results.json")
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    zeros, total = zero_fraction(model.state_dict(), is_encoder_matrix)
    assert zeros == round(0.5 * total) and total > 0
