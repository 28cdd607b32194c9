"""Fine-tunes a sequence classifier on a GLUE task or on local files and prunes it during training.

A GLUE task from the Hub, pruned to 80% zeros:

    python run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 --do_train --do_eval \
        --target_sparsity 0.8 --per_device_train_batch_size 32 --learning_rate 5e-5 --num_train_epochs 3 \
        --output_dir out/sst2

Local files (.csv, .tsv, .json, .jsonl or .parquet) with a column "label" and one of the columns "sentence" or
"sentence1" and "sentence2". With --task_name the rows come from the files, the columns and the metric from the task:

    python run_glue.py --model_name_or_path ... --task_name sst2 --train_file train.tsv --validation_file dev.tsv ...

The arguments can be in one .json or .yaml file: `python run_glue.py arguments.yaml`. Without --target_sparsity the
model is only fine-tuned. --plugin my_methods.py loads methods of your own. The script runs under `accelerate launch`
and `torchrun` as well.
"""

import logging
import os
from dataclasses import dataclass, field

import numpy as np
from _common import (
    ModelArguments,
    build_collator,
    card_kwargs,
    check_best_metric,
    check_dense_head,
    check_run,
    finish,
    load_config,
    load_tokenizer,
    measure_dense,
    report,
    sequence_length,
    setup_logging,
    train,
    use_mean_loss,
)
from _data import check_columns, first_rows, load_files, load_from_hub, need_split
from _program import parse_args, run_program
from glue_labels import Labels, check_labels, find_labels, has_labels
from glue_metrics import load_metric, metric_names, with_combined_score
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    set_seed,
)

from hf_sparse import SparseTrainer, SparseTrainingArguments


logger = logging.getLogger("scripts.glue")

TASK_COLUMNS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class GlueModelArguments(ModelArguments):
    """Checkpoint to start from."""

    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Initialize a new head if the head of the checkpoint has another size."}
    )


@dataclass
class DataTrainingArguments:
    """Data to train and evaluate on, and the truncation of texts."""

    task_name: str | None = field(
        default=None, metadata={"help": "GLUE task, one of: " + ", ".join(sorted(TASK_COLUMNS))}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name of a data set, in place of a GLUE task."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    max_seq_length: int = field(default=128, metadata={"help": "Truncate longer texts to this many tokens."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of reading the cache."})
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Pad every text to max_seq_length, not to the longest of its batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only, this many."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first rows only, this many."}
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first rows only, this many."})
    train_file: str | None = field(default=None, metadata={"help": "File with the training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "File with the evaluation rows."})
    test_file: str | None = field(default=None, metadata={"help": "File with the rows to predict."})

    def __post_init__(self):
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_COLUMNS:
                known = ", ".join(sorted(TASK_COLUMNS))
                raise ValueError(f'`task_name` "{self.task_name}" is not a GLUE task. Choose one of: {known}.')
        if not (self.task_name or self.dataset_name or any(self.files.values())):
            raise ValueError("no data: pass `task_name`, `dataset_name`, or files (`train_file`, `validation_file`).")
        if self.dataset_name and any(self.files.values()):
            raise ValueError("`dataset_name` and data files exclude each other: leave one of them out.")

    @property
    def files(self) -> dict[str, str | None]:
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}


def load_splits(data_args: DataTrainingArguments, model_args: ModelArguments):
    """Loads the splits from files, else from the Hub. With files, a task name selects only columns and metric."""
    if any(data_args.files.values()):
        return load_files(data_args.files, cache_dir=model_args.cache_dir)
    if data_args.dataset_name is not None:
        name, config = data_args.dataset_name, data_args.dataset_config_name
    else:
        name, config = "nyu-mll/glue", data_args.task_name
    return load_from_hub(name, config, model_args.cache_dir, model_args.token)


def text_columns(columns: list[str], task: str | None) -> tuple[str, ...]:
    """The one or two columns to read: the task's, else "sentence1" (and "sentence2"), "sentence" or "text"."""
    if task is not None and set(TASK_COLUMNS[task]) <= set(columns):
        return TASK_COLUMNS[task]
    for candidate in (("sentence1", "sentence2"), ("sentence1",), ("sentence",), ("text",)):
        if set(candidate) <= set(columns) and (task is None or len(candidate) == len(TASK_COLUMNS[task])):
            return candidate
    expected = " and ".join(f'"{name}"' for name in TASK_COLUMNS.get(task, ("sentence1", "sentence2")))
    hint = ' (or "sentence")' if task is None else ""
    raise ValueError(
        f"no text column found: the data has {', '.join(columns)}. Name the text columns {expected}{hint} in the file."
    )


def needed_splits(splits, training_args) -> dict[str, list[str]]:
    """Returns the splits that training, evaluation and prediction read; MNLI has two for each of the latter."""
    train, evaluate, predict = [], [], []
    if training_args.do_train:
        train = need_split(splits, ("train",), "do_train", "train_file")
    if training_args.do_eval:
        names = ("validation_matched", "validation_mismatched", "validation")
        evaluate = need_split(splits, names, "do_eval", "validation_file")
    if training_args.do_predict:
        names = ("test_matched", "test_mismatched", "test")
        predict = need_split(splits, names, "do_predict", "test_file")
    return {"train": train, "eval": evaluate, "predict": predict}


def cut_splits(splits: dict, data_args: DataTrainingArguments) -> dict:
    """Returns the splits, each limited to its number of samples."""
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    return {name: first_rows(dataset, limits[name.split("_")[0]]) for name, dataset in splits.items()}


def tokenize_splits(splits: dict, tokenizer, labels: Labels, columns: tuple[str, ...], data_args, training_args):
    """Converts texts to token ids and labels to output indices; the main process first, for the cache."""
    length = sequence_length(data_args.max_seq_length, tokenizer)
    padding = "max_length" if data_args.pad_to_max_length else False

    def tokenize(rows):
        texts = [rows[column] for column in columns]
        encoded = tokenizer(*texts, padding=padding, max_length=length, truncation=True)
        if "label" in rows:
            encoded["label"] = [labels.encode(label) for label in rows["label"]]
        return encoded

    tokenized = {}
    with training_args.main_process_first(desc="tokenization"):
        for name, dataset in splits.items():
            if "label" in dataset.column_names and not has_labels(dataset, labels):
                dataset = dataset.remove_columns("label")
            # The old columns are removed: a label that changes from text to a number changes the type of its column.
            tokenized[name] = dataset.map(
                tokenize,
                batched=True,
                remove_columns=dataset.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {name}",
            )
    return tokenized


def build_model(model_args: GlueModelArguments, config, tokenizer, labels: Labels):
    """Returns the pretrained model with a head for these labels."""
    config.num_labels = labels.count
    if labels.names is not None:
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: index for index, name in enumerate(labels.names)}
    config.problem_type = "regression" if labels.is_regression else "single_label_classification"
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        output_loading_info=True,
        **model_args.hub_kwargs(),
    )
    check_dense_head(model_args, loading)
    use_mean_loss(model)
    return model


def outputs_of(predictions, labels: Labels) -> np.ndarray:
    """Returns the predicted indices, or the predicted numbers for regression."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.squeeze(logits, axis=-1) if labels.is_regression else np.argmax(logits, axis=1)


def build_metrics(labels: Labels, data_args: DataTrainingArguments, model_args: ModelArguments):
    """Returns the `compute_metrics` function of the trainer."""
    metric = load_metric(data_args.task_name, labels.is_regression, model_args.cache_dir)

    def compute_metrics(result: EvalPrediction) -> dict[str, float]:
        predictions = outputs_of(result.predictions, labels)
        return with_combined_score(metric(predictions=predictions, references=result.label_ids))

    return compute_metrics


def suffixed(metrics: dict, split: str) -> dict:
    """Returns the metrics, renamed to end in "_mm" for the mismatched splits of MNLI."""
    return {f"{name}_mm": value for name, value in metrics.items()} if split.endswith("_mismatched") else metrics


def evaluate(trainer, data: dict, names: list[str]) -> dict[str, float]:
    """Returns the metrics of every given split."""
    combined = {}
    for name in names:
        metrics = trainer.evaluate(eval_dataset=data[name]) | {"eval_samples": len(data[name])}
        combined |= suffixed(metrics, name)
    return combined


def predict(trainer, data: dict, names: list[str], labels: Labels, task: str | None) -> None:
    """Writes predict_results_{task}.txt per split, and the metrics of splits that have labels."""
    combined = {}
    for name in names:
        result = trainer.predict(data[name], metric_key_prefix="test")
        if "label" in data[name].column_names:
            combined |= suffixed(dict(result.metrics) | {"test_samples": len(data[name])}, name)
        suffix = f"_{task}" if task else ""
        suffix += "-mm" if name.endswith("_mismatched") else ""
        if trainer.is_world_process_zero():
            path = os.path.join(trainer.args.output_dir, f"predict_results{suffix}.txt")
            write_predictions(path, outputs_of(result.predictions, labels), labels)
    if combined:
        report(trainer, "test", combined)


def write_predictions(path: str, outputs: np.ndarray, labels: Labels) -> None:
    """Writes one line per row: its number and the predicted label."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tprediction\n")
        file.writelines(f"{index}\t{labels.decode(output)}\n" for index, output in enumerate(outputs))
    logger.info(f"predictions written to {path}")


def glue_card_kwargs(model_args: ModelArguments, data_args: DataTrainingArguments) -> dict:
    """Returns the arguments of `create_model_card`. With a GLUE task the data set is GLUE, also for local files."""
    kwargs = card_kwargs(model_args, data_args, "text-classification")
    if data_args.task_name is not None:
        task = data_args.task_name
        kwargs |= {"language": "en", "dataset_tags": "glue", "dataset_args": task, "dataset": f"GLUE {task.upper()}"}
    return kwargs


CLASSES = (GlueModelArguments, DataTrainingArguments, SparseTrainingArguments)


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_args(CLASSES, argv)
    check_run(training_args, model_args)
    setup_logging(training_args)
    set_seed(training_args.seed)

    splits = load_splits(data_args, model_args)
    needed = needed_splits(splits, training_args)
    splits = {name: splits[name] for names in needed.values() for name in names}
    columns = text_columns(next(iter(splits.values())).column_names, data_args.task_name)
    for name, dataset in splits.items():
        check_columns(dataset.column_names, columns, name)

    config = load_config(model_args)
    labels = find_labels(splits, data_args.task_name, config)
    check_labels(splits, labels)
    check_best_metric(training_args, ["loss", *metric_names(data_args.task_name, labels.is_regression)])
    tokenizer = load_tokenizer(model_args)
    model = build_model(model_args, config, tokenizer, labels)
    # After the labels are known: the first rows may lack one that later rows have.
    splits = cut_splits(splits, data_args)
    data = tokenize_splits(splits, tokenizer, labels, columns, data_args, training_args)

    trainer = SparseTrainer(
        model=model,
        args=training_args,
        train_dataset=data[needed["train"][0]] if needed["train"] else None,
        eval_dataset=data[needed["eval"][0]] if needed["eval"] else None,
        compute_metrics=build_metrics(labels, data_args, model_args),
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer, data_args.pad_to_max_length, training_args),
    )
    measure_dense(trainer, lambda: evaluate(trainer, data, needed["eval"]), model_args)
    if training_args.do_train:
        train(trainer, len(data["train"]))
    if training_args.do_eval:
        report(trainer, "eval", evaluate(trainer, data, needed["eval"]))
    if training_args.do_predict:
        predict(trainer, data, needed["predict"], labels, data_args.task_name)
    finish(trainer, glue_card_kwargs(model_args, data_args))


if __name__ == "__main__":
    run_program(main, CLASSES)
