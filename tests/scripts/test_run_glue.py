"""Runs run_glue.py on a tiny BERT and small files."""

import ast

import pytest
import run_glue
import torch
import yaml
from _common import resume_point, setup_logging
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from glue_labels import GLUE_LABELS, Labels, find_labels
from glue_metrics import GLUE_METRICS
from helpers.scripts import (
    SCRIPTS,
    is_encoder_matrix,
    read_json,
    run_script,
    sentiment_rows,
    train_args,
    write_rows,
    zero_fraction,
)
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig


# The tiny checkpoint has a head for two labels.
NEW_HEAD = "--ignore_mismatched_sizes"


@pytest.fixture
def files(tmp_path):
    """Training and evaluation rows in two formats."""
    return [
        "--train_file",
        write_rows(tmp_path / "train.csv", sentiment_rows(24)),
        "--validation_file",
        write_rows(tmp_path / "dev.jsonl", sentiment_rows(12)),
    ]


def arguments(model, output_dir, *more, **options) -> list[str]:
    return ["--model_name_or_path", model, "--max_seq_length", "16", *train_args(output_dir, **options), *more]


def predictions(path) -> list[str]:
    lines = path.read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(index) for index in range(len(lines) - 1)]
    return [line.split("\t")[1] for line in lines[1:]]


def test_task_name_and_files_go_together(tiny_bert, tmp_path, files):
    test_file = write_rows(tmp_path / "test.tsv", sentiment_rows(6))
    out = tmp_path / "out"
    parts = ["--task_name", "SST2", *files, "--test_file", test_file, "--do_train", "--do_eval", "--do_predict"]
    run_glue.main(arguments(tiny_bert, out, *parts, max_steps=40, learning_rate=0.01))

    train, evaluation, test = (read_json(out / f"{name}_results.json") for name in ("train", "eval", "test"))
    assert train["train_samples"] == 24 and train["train_loss"] > 0
    assert evaluation["eval_samples"] == 12
    # One word decides the label, so even this model learns it.
    assert evaluation["eval_accuracy"] == 1.0 and test["test_accuracy"] == 1.0
    assert predictions(out / "predict_results_sst2.txt") == ["negative", "positive"] * 3
    assert {**train, **evaluation, **test} == read_json(out / "all_results.json")
    assert (out / "trainer_state.json").is_file() and (out / "tokenizer.json").is_file()
    assert (out / "README.md").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_the_card_compares_with_a_dense_run_and_names_the_base(tiny_bert, tmp_path, files, capsys):
    (tmp_path / "dense.json").write_text('{"eval_accuracy": 0.75, "epoch": 1.0}')
    named = ["--base_model", "user/base", "--dense_results", str(tmp_path / "dense.json"), "--license", "mit"]
    named += ["--datasets", "user/one", "user/two", "--pipeline_tag", "text-classification"]
    parts = [*files, "--do_train", "--do_eval", "--target_sparsity", "0.5", *named]
    run_glue.main(arguments(tiny_bert, tmp_path / "out", *parts, max_steps=4))
    measured = read_json(tmp_path / "out" / "eval_results.json")["eval_accuracy"]
    lines = capsys.readouterr().out.splitlines()
    assert f"eval_accuracy: 0.7500 dense, {measured:.4f} now ({measured - 0.75:+.4f})" in lines
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"| eval_accuracy | 0.7500 | {measured:.4f} | {measured - 0.75:+.4f} |" in card.text
    assert card.data.base_model == "user/base" and tiny_bert not in str(card)
    assert (card.data.license, card.data.datasets) == ("mit", ["user/one", "user/two"])
    assert card.data.pipeline_tag == "text-classification"


def test_eval_dense_measures_the_model_before_training(tiny_bert, tmp_path, files, capsys):
    parts = [*files, "--do_train", "--do_eval", "--target_sparsity", "0.5", "--eval_dense"]
    run_glue.main(arguments(tiny_bert, tmp_path / "out", *parts, max_steps=4, learning_rate=0.01))
    run_glue.main(arguments(tiny_bert, tmp_path / "same", *files, "--do_eval"))
    out = tmp_path / "out"
    before, after = read_json(tmp_path / "same" / "eval_results.json"), read_json(out / "eval_results.json")
    dense = read_json(out / "dense_results.json")
    assert dense["eval_loss"] == before["eval_loss"] != after["eval_loss"]
    difference = f"({after['eval_loss'] - dense['eval_loss']:+.4f})"
    lines = capsys.readouterr().out.splitlines()
    assert f"eval_loss: {dense['eval_loss']:.4f} dense, {after['eval_loss']:.4f} now {difference}" in lines
    assert f"  hf-sparse push {out} USER/out  # upload it to the Hub with its card" in lines
    with pytest.raises(ValueError, match='lacks 2 weights for this task, such as "classifier.bias"'):
        rows = [{"sentence": "a film", "label": label} for label in range(3)]
        new_head = ["--train_file", write_rows(tmp_path / "three.csv", rows), NEW_HEAD]
        new_head += ["--validation_file", new_head[1], "--do_train", "--do_eval", "--eval_dense"]
        run_glue.main(arguments(tiny_bert, tmp_path / "new", *new_head))


def test_the_recipe_for_half_the_latency_gives_a_smaller_model(tiny_bert, tmp_path, files):
    """Evaluated and predicted by the model with zeros, whose outputs are the same."""
    out, recipe = tmp_path / "out", str(SCRIPTS / "recipes" / "half_latency.yaml")
    test_file = write_rows(tmp_path / "test.tsv", sentiment_rows(6))
    parts = [
        "--test_file",
        test_file,
        "--do_train",
        "--do_eval",
        "--do_predict",
        "--pruning_config",
        recipe,
        "--shrink",
    ]
    run_glue.main(arguments(tiny_bert, out, *files, *parts, max_steps=6, save_strategy="steps", save_steps=6))
    small = AutoModelForSequenceClassification.from_pretrained(out)
    assert small.config.intermediate_size == 8  # of 32
    trained = AutoModelForSequenceClassification.from_pretrained(out / "checkpoint-6")
    assert trained.config.intermediate_size == 32
    batch = AutoTokenizer.from_pretrained(out)([row["sentence"] for row in sentiment_rows(6)], return_tensors="pt")
    expected, found = (model(**batch).logits for model in (trained, small))
    assert torch.allclose(found, expected, atol=1e-5)
    assert predictions(out / "predict_results.txt") == [str(label.item()) for label in found.argmax(1)]
    accuracy = read_json(out / "eval_results.json")["eval_accuracy"]
    assert f"| eval_accuracy | {accuracy:.4f} |" in (out / "README.md").read_text()


def test_own_text_labels_and_a_test_file_without_labels(tiny_bert, tmp_path):
    rows = [row | {"label": ("sad", "glad")[row["label"]]} for row in sentiment_rows(12)]
    train = write_rows(tmp_path / "train.json", rows)
    test = write_rows(tmp_path / "test.csv", [{"sentence": row["sentence"]} for row in rows[:4]])
    out = tmp_path / "out"
    parts = ["--train_file", train, "--test_file", test, "--do_train", "--do_predict"]
    run_glue.main(arguments(tiny_bert, out, *parts, "--pad_to_max_length", "False"))
    assert set(predictions(out / "predict_results.txt")) <= {"sad", "glad"}
    assert not (out / "test_results.json").exists()
    assert AutoModelForSequenceClassification.from_pretrained(out).config.label2id == {"glad": 0, "sad": 1}


def test_numbers_with_a_point_are_regression(tiny_bert, tmp_path):
    rows = [
        {"sentence1": row["sentence"], "sentence2": "a film", "label": 0.5 + row["label"]} for row in sentiment_rows(9)
    ]
    file = write_rows(tmp_path / "rows.csv", rows)
    out = tmp_path / "out"
    parts = ["--train_file", file, "--validation_file", file, "--test_file", file]
    run_glue.main(arguments(tiny_bert, out, *parts, "--do_train", "--do_eval", "--do_predict", NEW_HEAD))
    assert read_json(out / "eval_results.json")["eval_mse"] >= 0
    assert all(len(text.split(".")[1]) == 3 for text in predictions(out / "predict_results.txt"))
    assert AutoModelForSequenceClassification.from_pretrained(out).config.problem_type == "regression"


def test_stsb_reports_both_correlations_and_their_mean(tiny_bert, tmp_path):
    rows = [
        {"sentence1": row["sentence"], "sentence2": "a film", "label": float(index % 5)}
        for index, row in enumerate(sentiment_rows(10))
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run_glue.main(
        arguments(tiny_bert, tmp_path / "out", "--task_name", "stsb", "--validation_file", file, "--do_eval", NEW_HEAD)
    )
    metrics = read_json(tmp_path / "out" / "eval_results.json")
    mean = (metrics["eval_pearson"] + metrics["eval_spearmanr"]) / 2
    assert metrics["eval_combined_score"] == pytest.approx(mean)


def mnli(*name, **kwargs) -> DatasetDict:
    """A small form of `load_dataset("nyu-mll/glue", "mnli")`; the test labels are -1."""
    features = Features(
        premise=Value("string"), hypothesis=Value("string"), label=ClassLabel(names=list(GLUE_LABELS["mnli"]))
    )

    def split(count, label=None):
        rows = sentiment_rows(count)
        columns = {
            "premise": [row["sentence"] for row in rows],
            "hypothesis": ["a film"] * count,
            "label": [index % 3 if label is None else label for index in range(count)],
        }
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(
        train=split(12),
        validation_matched=split(9),
        validation_mismatched=split(6),
        test_matched=split(5, -1),
        test_mismatched=split(4, -1),
    )


def test_mnli_is_evaluated_and_predicted_twice(tiny_bert, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *name, **kwargs: asked.append(name) or mnli())
    out = tmp_path / "out"
    parts = ["--task_name", "mnli", "--do_train", "--do_eval", "--do_predict", "--max_eval_samples", "7"]
    run_glue.main(arguments(tiny_bert, out, *parts, NEW_HEAD))
    assert asked == [("nyu-mll/glue", "mnli")]
    metrics = read_json(out / "eval_results.json")
    assert metrics["eval_samples"] == 7 and metrics["eval_samples_mm"] == 6
    assert 0 <= metrics["eval_accuracy"] <= 1 and 0 <= metrics["eval_accuracy_mm"] <= 1
    assert len(predictions(out / "predict_results_mnli.txt")) == 5
    mismatched = predictions(out / "predict_results_mnli-mm.txt")
    assert len(mismatched) == 4 and set(mismatched) <= set(GLUE_LABELS["mnli"])
    assert not (out / "test_results.json").exists()


def test_every_task_has_columns_labels_and_a_metric():
    assert set(run_glue.TASK_COLUMNS) == set(GLUE_LABELS) == set(GLUE_METRICS)
    assert len(GLUE_LABELS) == 9


def test_a_checkpoint_keeps_its_order_of_the_same_labels():
    config = BertConfig(id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"})
    labels = find_labels({}, "mnli", config)
    assert labels.names == ("contradiction", "neutral", "entailment")
    # 0 in the data is entailment, the last output of this checkpoint.
    assert [labels.encode(label) for label in (0, 1, 2, "entailment")] == [2, 1, 0, 2]


def test_without_training_rows_the_labels_are_the_checkpoints():
    rows = {"validation": Dataset.from_dict({"sentence": ["a"], "label": ["glad"]})}
    assert find_labels(rows, None, BertConfig(id2label={0: "sad", 1: "glad"})) == Labels(("sad", "glad"))
    assert find_labels(rows, None, BertConfig(num_labels=3)).names == ("0", "1", "2")


def test_labels_of_all_rows_are_known_when_only_the_first_are_read(tiny_bert, tmp_path):
    rows = sorted(sentiment_rows(12), key=lambda row: row["label"])
    file = write_rows(tmp_path / "rows.csv", rows)
    parts = ["--train_file", file, "--validation_file", file, "--do_train", "--do_eval", "--max_train_samples", "3"]
    run_glue.main(arguments(tiny_bert, tmp_path / "out", *parts, max_steps=1))
    assert read_json(tmp_path / "out" / "train_results.json")["train_samples"] == 3


def test_resume_continues_where_the_last_checkpoint_ended(tiny_bert, tmp_path, files):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    parts = ["--task_name", "sst2", *files, "--do_train"]
    run_glue.main(arguments(tiny_bert, straight, *parts, max_steps=4, **options))
    run_glue.main(arguments(tiny_bert, resumed, *parts, max_steps=2, **options))
    more = ["--resume_from_checkpoint", "True"]
    run_glue.main(arguments(tiny_bert, resumed, *parts, *more, max_steps=4, **options))
    assert read_json(resumed / "trainer_state.json")["global_step"] == 4
    expected, found = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in (straight, resumed)
    )
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def one_sgd_step(model, output_dir, *parts, **options) -> tuple[dict, float]:
    step = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
    }
    run_glue.main(arguments(model, output_dir, *parts, "--task_name", "sst2", "--do_train", **step, **options))
    state = AutoModelForSequenceClassification.from_pretrained(output_dir).state_dict()
    return state, read_json(output_dir / "train_results.json")["train_loss"]


def test_accumulated_gradients_equal_those_of_one_large_batch(tiny_bert, tmp_path, files):
    """Without `use_mean_loss` two accumulation steps would double gradient and loss."""
    large, large_loss = one_sgd_step(tiny_bert, tmp_path / "large", *files, per_device_train_batch_size=8)
    small, small_loss = one_sgd_step(
        tiny_bert, tmp_path / "small", *files, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert small_loss == pytest.approx(large_loss, rel=1e-4)
    before = AutoModelForSequenceClassification.from_pretrained(tiny_bert).state_dict()
    for name, weight in large.items():
        torch.testing.assert_close(small[name], weight, atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(before[name], weight) for name, weight in large.items())


@pytest.mark.parametrize(
    "parts, error, text",
    [
        (["--train_file", "{unlabelled}", "--do_train"], ValueError, 'no column "label"'),
        (
            ["--train_file", "{rows}", "--validation_file", "{strange}", "--do_train", "--do_eval"],
            ValueError,
            'the validation split has the label 7 (and 0 more that are not known). Allowed: "0", "1"',
        ),
        (["--task_name", "sst2", "--do_eval"], ConnectionError, "or pass local files with `train_file`"),
    ],
)
def test_errors_are_raised_before_training(tiny_bert, tmp_path, parts, error, text):
    rows = sentiment_rows(4)
    written = {
        "rows": write_rows(tmp_path / "rows.csv", rows),
        "unlabelled": write_rows(tmp_path / "u.csv", [{"sentence": "a"}]),
        "strange": write_rows(tmp_path / "s.csv", [rows[0], {"sentence": "a", "label": 7}]),
    }
    parts = [part.format(**written) for part in parts]
    with pytest.raises(error) as caught:
        run_glue.main(arguments(tiny_bert, tmp_path / "out", *parts))
    assert text in str(caught.value)


def test_resume_point_takes_text_for_true_and_false(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()

    class Arguments:
        output_dir = str(tmp_path)
        resume_from_checkpoint = None

    for value, expected in ((None, None), (False, None), ("false", None), (True, True), ("True", True)):
        Arguments.resume_from_checkpoint = value
        assert resume_point(Arguments) is expected


def test_a_pruned_checkpoint_opens_plainly_and_has_its_zeros(tiny_bert, tmp_path, files):
    out = tmp_path / "out"
    parts = ["--task_name", "sst2", *files, "--do_train", "--do_eval", "--target_sparsity", "0.5"]
    run_glue.main(arguments(tiny_bert, out, *parts, max_steps=8))
    model = AutoModelForSequenceClassification.from_pretrained(out)
    zeros, total = zero_fraction(model.state_dict(), is_encoder_matrix)
    assert zeros == round(0.5 * total) and total > 0
    assert zero_fraction(model.state_dict(), lambda name: name.startswith("classifier"))[0] == 0, (
        "the head stays dense"
    )
    assert read_json(out / "pruning_report.json")


def test_logging_is_quiet_on_other_processes(caplog):
    class Arguments:
        should_log, log_level, process_index, world_size, device, fp16, bf16 = (
            False,
            "passive",
            1,
            2,
            "cpu",
            False,
            False,
        )

        @staticmethod
        def get_process_log_level():
            return 30

    setup_logging(Arguments)
    assert "process 1 of 2" not in caplog.text


@pytest.mark.parametrize("script", ["run_clm", "run_glue", "run_oneshot", "run_qa"])
def test_a_script_is_a_program(script):
    """One of them is started below."""
    *_, last = ast.parse((SCRIPTS / f"{script}.py").read_text()).body
    assert ast.unparse(last) == "if __name__ == '__main__':\n    run_program(main, CLASSES)"


def test_the_script_runs_from_a_yaml_file(tiny_bert, tmp_path, files):
    options = dict(zip(files[::2], files[1::2], strict=True))
    content = {name.lstrip("-"): value for name, value in options.items()} | {
        "model_name_or_path": tiny_bert,
        "task_name": "sst2",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
    }
    # YAML reads 5e-5 as text; the script must not.
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(content) + "learning_rate: 5e-5\n")
    done = run_script("run_glue.py", str(tmp_path / "arguments.yaml"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_accuracy" in done.stdout and f"hf-sparse push {tmp_path / 'out'} USER/out" not in done.stdout
    assert "next: prune it by the same command with --target_sparsity 0.8" in done.stdout
    assert "Setting accelerator" not in done.stdout + done.stderr  # DeepSpeed says so when it is imported
    assert "eval_accuracy" in read_json(tmp_path / "out" / "eval_results.json")
