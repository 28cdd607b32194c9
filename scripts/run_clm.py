"""Trains or fine-tunes a causal language model on text and prunes it during training; reports loss and perplexity.

A pretrained model:

    python run_clm.py --model_name_or_path openai-community/gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --target_sparsity 0.5 --block_size 512 \
        --per_device_train_batch_size 8 --learning_rate 5e-5 --output_dir out/gpt2

A model from scratch: --model_type llama --tokenizer_name ... --config_overrides hidden_size=256,num_hidden_layers=4
in place of --model_name_or_path.

Local files (--train_file, --validation_file) are .txt, or .csv, .tsv, .json, .jsonl or .parquet with a column "text".
The arguments can be in one .json or .yaml file. Without --target_sparsity the model is only trained.
--plugin my_methods.py loads methods of your own. The script runs under `accelerate launch` and `torchrun` as well.
"""

import logging
import math
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from _common import (
    ModelArguments,
    card_kwargs,
    check_best_metric,
    check_run,
    finish,
    load_config,
    load_tokenizer,
    measure_dense,
    report,
    setup_logging,
    train,
    use_mean_loss,
)
from _data import TABLE_FILES, check_columns, load_files, load_from_hub, need_split
from _program import parse_args, run_program
from datasets import Dataset, IterableDataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, EvalPrediction, default_data_collator, set_seed

from hf_sparse import SparseTrainer, SparseTrainingArguments


logger = logging.getLogger("scripts.clm")

# Some models declare limits of millions of tokens, which few machines can train on.
LONGEST_DEFAULT_BLOCK = 1024


@dataclass
class ClmModelArguments(ModelArguments):
    """Checkpoint to start from, or the model to build from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the pretrained model; leave out to start from scratch."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Type of model to build from scratch, such as gpt2 or llama."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration of a model from scratch: n_embd=256,n_layer=4"}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the weights; auto: that of the checkpoint.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise ValueError("no model: pass `model_name_or_path`, or `model_type` or `config_name` for a new one.")
        if self.config_overrides and (self.model_name_or_path or self.config_name):
            raise ValueError("`config_overrides` only goes with `model_type`: a checkpoint's shapes are fixed.")
        if self.model_type is not None and self.model_type not in CONFIG_MAPPING:
            raise ValueError(f'`model_type` "{self.model_type}" is not known to transformers. Try gpt2 or llama.')
        if not (self.tokenizer_name or self.model_name_or_path):
            raise ValueError("a model from scratch needs `tokenizer_name`: a tokenizer is not trained here.")
        if self.eval_dense and not self.model_name_or_path:
            raise ValueError(
                "`eval_dense` evaluates a model before training, and one from scratch has learned nothing."
            )


@dataclass
class DataTrainingArguments:
    """Text to train and evaluate on, and its division into blocks."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name of a data set with texts."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(default=None, metadata={"help": "File with the training text."})
    validation_file: str | None = field(default=None, metadata={"help": "File with the evaluation text."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first blocks only, this many."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first blocks only, this many."}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the data during training; needs max_steps."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per block. Default: the least of the tokenizer's limit, the model's positions and "
            f"{LONGEST_DEFAULT_BLOCK}."
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of reading the cache."})
    validation_split_percentage: int = field(
        default=5,
        metadata={
            "help": "Percentage of the training rows, from the first, to evaluate on if there is no other split."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes for tokenization."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of .txt files."})

    def __post_init__(self):
        files = [name for name in (self.train_file, self.validation_file) if name]
        if not (self.dataset_name or files):
            raise ValueError("no data: pass `dataset_name`, or files (`train_file`, `validation_file`).")
        if self.dataset_name and files:
            raise ValueError("`dataset_name` and data files exclude each other: leave one of them out.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"`validation_split_percentage` {self.validation_split_percentage} must be between 1 and 99."
            )


def load_texts(data_args: DataTrainingArguments, model_args: ClmModelArguments, training_args) -> dict:
    """Returns those of the splits "train" and "validation" that this run reads."""
    options = {"streaming": True} if data_args.streaming else {}
    if data_args.dataset_name is not None:
        splits = load_from_hub(
            data_args.dataset_name,
            data_args.dataset_config_name,
            model_args.cache_dir,
            model_args.token,
            **options,
        )
    else:
        splits = {}
        for split, name in (("train", data_args.train_file), ("validation", data_args.validation_file)):
            is_text = name is not None and name.lower().endswith(".txt")
            extra = {"keep_linebreaks": data_args.keep_linebreaks} if is_text else {}
            splits |= load_files({split: name}, (*TABLE_FILES, "txt"), model_args.cache_dir, **options, **extra)
    splits = dict(splits)
    if training_args.do_eval and "validation" not in splits and "train" in splits:
        splits |= split_off_validation(splits["train"], data_args)
    needed = []
    if training_args.do_train:
        needed += need_split(splits, ("train",), "do_train", "train_file")
    if training_args.do_eval:
        needed += need_split(splits, ("validation",), "do_eval", "validation_file")
    return {split: splits[split] for split in needed}


def split_off_validation(dataset: Dataset | IterableDataset, data_args: DataTrainingArguments) -> dict[str, Dataset]:
    """Splits off the first rows for evaluation."""
    if isinstance(dataset, IterableDataset):
        raise ValueError("a stream has no length to split off a percentage of: pass `validation_file`.")
    count = math.ceil(len(dataset) * data_args.validation_split_percentage / 100)
    if count >= len(dataset):
        raise ValueError(
            f"{len(dataset)} row(s) are too few to split off {data_args.validation_split_percentage} % of: pass "
            "`validation_file`."
        )
    return {"validation": dataset.select(range(count)), "train": dataset.select(range(count, len(dataset)))}


def text_column(dataset: Dataset | IterableDataset, split: str) -> str:
    """Returns the column "text", or the only column."""
    columns = dataset.column_names or list(next(iter(dataset)))
    if "text" not in columns and len(columns) == 1:
        return columns[0]
    check_columns(columns, ("text",), split)
    return "text"


def choose_block_size(requested: int | None, tokenizer, config) -> int:
    """Returns the number of tokens per block: the requested one, or else the least of three limits."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST_DEFAULT_BLOCK
    if requested is None:
        size = min(tokenizer.model_max_length, positions, LONGEST_DEFAULT_BLOCK)
        logger.info(
            f"`block_size` {size}: the least of the tokenizer's limit, the model's and {LONGEST_DEFAULT_BLOCK}"
        )
        return size
    limit = min(tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", requested))
    if not 1 < requested <= limit:
        raise ValueError(f"`block_size` {requested} must be at least 2 and at most {limit}, the limit of the model.")
    return requested


def group(ids: list[list[int]], block_size: int) -> dict[str, list[list[int]]]:
    """Joins the rows and splits them into full blocks; the rest of each batch of rows is dropped."""
    joined = list(chain.from_iterable(ids))
    end = len(joined) // block_size * block_size
    blocks = [joined[start : start + block_size] for start in range(0, end, block_size)]
    # The model shifts the labels itself.
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def cut_texts(
    splits: dict, columns: dict, tokenizer, block_size: int, data_args: DataTrainingArguments, training_args
) -> dict:
    """Converts texts to blocks of token ids; the main process first, so that the others can read its cache."""
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    blocks = {}
    with training_args.main_process_first(desc="tokenization"):
        for split, dataset in splits.items():
            options = {"remove_columns": dataset.column_names or list(next(iter(dataset)))}
            if not data_args.streaming:
                options |= {
                    "num_proc": data_args.preprocessing_num_workers,
                    "load_from_cache_file": not data_args.overwrite_cache,
                    "desc": f"Tokenizing {split}",
                }

            def to_blocks(rows, column=columns[split]):
                # No warning about texts longer than the model's limit: they are split into blocks.
                return group(tokenizer(rows[column], verbose=False)["input_ids"], block_size)

            blocks[split] = limited(dataset.map(to_blocks, batched=True, **options), limits[split])
            if isinstance(blocks[split], Dataset) and len(blocks[split]) == 0:
                raise ValueError(
                    f"the {split} text is shorter than one block of {block_size} tokens. Lower `block_size`, or pass "
                    "a longer text."
                )
    return blocks


def limited(blocks: Dataset | IterableDataset, limit: int | None) -> Dataset | IterableDataset:
    """Returns the first `limit` blocks."""
    if limit is None:
        return blocks
    return blocks.take(limit) if isinstance(blocks, IterableDataset) else blocks.select(range(min(limit, len(blocks))))


def build_config(model_args: ClmModelArguments):
    """Returns the configuration of the checkpoint, or a new one."""
    if model_args.config_name or model_args.model_name_or_path:
        return load_config(model_args)
    config = CONFIG_MAPPING[model_args.model_type]()
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    return config


def build_model(model_args: ClmModelArguments, config, tokenizer):
    """Returns the pretrained model, or one with random weights and the vocabulary of the tokenizer."""
    dtype = {"dtype": model_args.dtype} if model_args.dtype else {}
    if model_args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, config=config, **dtype, **model_args.hub_kwargs()
        )
    else:
        config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model_args.trust_remote_code, **({} if model_args.dtype == "auto" else dtype)
        )
        logger.info(f"new {model_args.model_type or config.model_type} with {model.num_parameters():,} parameters")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    # All blocks have one length, so the mean over them is exact. The Trainer's count of tokens is one too high per
    # block in older versions of transformers, and for GPT2LMHeadModel in newer ones too.
    use_mean_loss(model)
    return model


def most_likely_tokens(logits, labels):
    """Returns one number per token: all logits of an evaluation set would not fit into memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def token_accuracy(result: EvalPrediction) -> dict[str, float]:
    """Returns the fraction of correct predictions; the output at token i is the prediction of token i + 1."""
    predictions, labels = result.predictions[:, :-1], result.label_ids[:, 1:]
    counted = labels != -100
    return {"accuracy": float(np.mean(predictions[counted] == labels[counted]))}


def evaluate(trainer, n_blocks: int | None) -> dict[str, float]:
    """Returns the metrics; perplexity = exp(mean loss per token)."""
    metrics = trainer.evaluate()
    if n_blocks is not None:
        metrics["eval_samples"] = n_blocks
    loss = metrics["eval_loss"]
    # exp overflows past 709.
    metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    return metrics


CLASSES = (ClmModelArguments, DataTrainingArguments, SparseTrainingArguments)


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_args(CLASSES, argv)
    training_args.do_predict = False
    check_run(training_args, model_args)
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("a stream has no end to count epochs by: pass `max_steps` with `streaming`.")
    check_best_metric(training_args, ["loss", "accuracy"])
    setup_logging(training_args)
    set_seed(training_args.seed)

    config = build_config(model_args)
    tokenizer = load_tokenizer(model_args)
    block_size = choose_block_size(data_args.block_size, tokenizer, config)
    splits = load_texts(data_args, model_args, training_args)
    columns = {split: text_column(dataset, split) for split, dataset in splits.items()}
    model = build_model(model_args, config, tokenizer)
    blocks = cut_texts(splits, columns, tokenizer, block_size, data_args, training_args)
    counts = {split: None if data_args.streaming else len(dataset) for split, dataset in blocks.items()}

    trainer = SparseTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=token_accuracy,
        preprocess_logits_for_metrics=most_likely_tokens,
    )
    measure_dense(trainer, lambda: evaluate(trainer, counts["validation"]), model_args)
    if training_args.do_train:
        train(trainer, counts["train"])
    if training_args.do_eval:
        report(trainer, "eval", evaluate(trainer, counts["validation"]))
    finish(trainer, card_kwargs(model_args, data_args, "text-generation"))


if __name__ == "__main__":
    run_program(main, CLASSES)
