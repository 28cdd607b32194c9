"""Fine-tunes a model for extractive question answering on SQuAD or local files and prunes it during training.

    python run_qa.py --model_name_or_path google-bert/bert-base-uncased --dataset_name rajpurkar/squad --do_train \
        --do_eval --target_sparsity 0.8 --per_device_train_batch_size 12 --learning_rate 3e-5 --num_train_epochs 2 \
        --max_seq_length 384 --doc_stride 128 --output_dir out/squad

Local files (--train_file, --validation_file, --test_file) are SQuAD's own .json, or .json, .jsonl, .parquet, .csv or
.tsv with the columns "id", "question", "context" and "answers". Pass --version_2_with_negative where a question may
have no answer. The arguments can be in one .json or .yaml file. Without --target_sparsity the model is only
fine-tuned. --plugin my_methods.py loads methods of your own. The script runs under `accelerate launch` and `torchrun`
as well.
"""

import logging
from dataclasses import dataclass, field

import qa_metrics
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
from _data import first_rows, load_from_hub, need_split
from _program import parse_args, run_program
from qa_data import Windows, check_questions, load_qa_files
from qa_postprocessing import postprocess, write_answers
from qa_trainer import SparseQuestionAnsweringTrainer
from transformers import AutoModelForQuestionAnswering, set_seed

from hf_sparse import SparseTrainingArguments
from hf_sparse.evaluation import load_metric_or_fallback


logger = logging.getLogger("scripts.qa")


@dataclass
class DataTrainingArguments:
    """Questions to train and evaluate on, and how contexts are split and answers selected."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name of a data set with the columns of SQuAD."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(default=None, metadata={"help": "File with the training questions."})
    validation_file: str | None = field(default=None, metadata={"help": "File with the evaluation questions."})
    test_file: str | None = field(default=None, metadata={"help": "File with the questions to predict."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of reading the cache."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes for tokenization."}
    )
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of one window: question and context."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two neighbouring windows share."})
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Pad every window to max_seq_length, not to the longest of its batch."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first questions only, this many."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first questions only, this many."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Predict the first questions only, this many."}
    )
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer."})
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Give no answer if the no-answer score exceeds that of the best answer by more than this."},
    )
    n_best_size: int = field(default=20, metadata={"help": "Start and end positions to combine into answers."})
    max_answer_length: int = field(default=30, metadata={"help": "Longest answer, in tokens."})

    def __post_init__(self):
        if not (self.dataset_name or any(self.files.values())):
            raise ValueError("no data: pass `dataset_name`, or files (`train_file`, `validation_file`, `test_file`).")
        if self.dataset_name and any(self.files.values()):
            raise ValueError("`dataset_name` and data files exclude each other: leave one of them out.")

    @property
    def files(self) -> dict[str, str | None]:
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}


def load_questions(data_args: DataTrainingArguments, model_args: ModelArguments, training_args) -> dict:
    """Returns the splits that this run reads, checked, each limited to its number of samples."""
    if data_args.dataset_name is not None:
        splits = load_from_hub(
            data_args.dataset_name, data_args.dataset_config_name, model_args.cache_dir, model_args.token
        )
    else:
        splits = load_qa_files(data_args.files, model_args.cache_dir)
    parts = (
        ("train", training_args.do_train, "do_train", "train_file", data_args.max_train_samples),
        ("validation", training_args.do_eval, "do_eval", "validation_file", data_args.max_eval_samples),
        ("test", training_args.do_predict, "do_predict", "test_file", data_args.max_predict_samples),
    )
    questions = {}
    for split, is_needed, flag, remedy, limit in parts:
        if is_needed:
            need_split(splits, (split,), flag, remedy)
            rows = first_rows(splits[split], limit)
            questions[split] = check_questions(rows, split, data_args.version_2_with_negative)
    return questions


def build_windows(tokenizer, data_args: DataTrainingArguments) -> Windows:
    """Returns the windows, after checks that the tokenizer has offsets and that neighbouring windows advance."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot map tokens to characters. Choose a model whose tokenizer is backed by "
            "the tokenizers library."
        )
    length = sequence_length(data_args.max_seq_length, tokenizer)
    if not 0 <= data_args.doc_stride < length:
        raise ValueError(
            f"`doc_stride` {data_args.doc_stride} must be at least 0 and less than the window of {length} tokens. "
            "Lower `doc_stride` or raise `max_seq_length`."
        )
    return Windows(tokenizer, length, data_args.doc_stride, data_args.pad_to_max_length)


def cut_contexts(questions: dict, windows: Windows, data_args: DataTrainingArguments, training_args) -> dict:
    """Converts questions to windows; the main process first, so that the others can read its cache."""
    features = {}
    with training_args.main_process_first(desc="tokenization"):
        for split, dataset in questions.items():
            features[split] = dataset.map(
                windows.for_training if split == "train" else windows.for_evaluation,
                batched=True,
                num_proc=data_args.preprocessing_num_workers,
                remove_columns=dataset.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {split}",
            )
    return features


def build_post_process(data_args: DataTrainingArguments, training_args):
    """Returns the function that converts logits to answers and, on the main process, writes them to files."""

    def post_process(examples, features, predictions, prefix: str) -> dict[str, str]:
        texts, n_best, null_odds = postprocess(
            examples,
            features,
            predictions,
            version_2_with_negative=data_args.version_2_with_negative,
            n_best_size=data_args.n_best_size,
            max_answer_length=data_args.max_answer_length,
            null_score_diff_threshold=data_args.null_score_diff_threshold,
        )
        if training_args.should_save:
            write_answers(training_args.output_dir, prefix, texts, n_best, null_odds)
        return texts

    return post_process


def build_metrics(data_args: DataTrainingArguments, model_args: ModelArguments):
    """Returns the function that scores answers against the references."""
    with_negative = data_args.version_2_with_negative
    fallback = qa_metrics.squad_v2 if with_negative else qa_metrics.squad
    metric = load_metric_or_fallback((fallback.__name__,), fallback, model_args.cache_dir)

    def compute_metrics(answers: dict[str, str], examples) -> dict[str, float]:
        predictions = [{"id": key, "prediction_text": text} for key, text in answers.items()]
        if with_negative:
            predictions = [prediction | {"no_answer_probability": 0.0} for prediction in predictions]
        references = [{"id": row["id"], "answers": row["answers"]} for row in examples]
        return metric(predictions=predictions, references=references)

    return compute_metrics


CLASSES = (ModelArguments, DataTrainingArguments, SparseTrainingArguments)


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_args(CLASSES, argv)
    check_run(training_args, model_args)
    # No loss: the windows for evaluation have no labels.
    check_best_metric(training_args, qa_metrics.metric_names(data_args.version_2_with_negative))
    setup_logging(training_args)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    windows = build_windows(tokenizer, data_args)
    questions = load_questions(data_args, model_args, training_args)
    model, loading = AutoModelForQuestionAnswering.from_pretrained(
        model_args.model_name_or_path,
        config=load_config(model_args),
        output_loading_info=True,
        **model_args.hub_kwargs(),
    )
    check_dense_head(model_args, loading)
    use_mean_loss(model)
    features = cut_contexts(questions, windows, data_args, training_args)

    trainer = SparseQuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=features.get("train"),
        eval_dataset=features.get("validation"),
        eval_examples=questions.get("validation"),
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer, data_args.pad_to_max_length, training_args),
        post_process=build_post_process(data_args, training_args),
        compute_metrics=build_metrics(data_args, model_args),
    )
    measure_dense(trainer, trainer.evaluate, model_args)
    if training_args.do_train:
        train(trainer, len(questions["train"]))
    if training_args.do_eval:
        report(trainer, "eval", trainer.evaluate() | {"eval_samples": len(questions["validation"])})
    if training_args.do_predict:
        output = trainer.predict(features["test"], questions["test"])
        report(trainer, "test", output.metrics | {"test_samples": len(questions["test"])})
    finish(trainer, card_kwargs(model_args, data_args, "question-answering"))


if __name__ == "__main__":
    run_program(main, CLASSES)
