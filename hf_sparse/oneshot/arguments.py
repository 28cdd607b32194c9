"""OneshotArguments: the options of one-shot pruning from checkpoint to checkpoint, in addition to `OneshotConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..hub.card_metadata import HELP, CardMetadata
from ..hub.device_map import parse_device_map
from ..hub.loading import DTYPES
from ..registry import format_options


def option(default: Any, help: str) -> Any:  # noqa: A002 - the name that argument parsers use
    """Returns a dataclass field with its help text for command lines."""
    return field(default=default, metadata={"help": help})


_MISSING_OUTPUT = "missing output folder: pass `output_dir` (the second argument of hf-sparse prune), or `dry_run`."


@dataclass
class OneshotArguments:
    """Model, calibration data and output."""

    model_name_or_path: str = option(None, "Model to prune: a folder or a Hub name.")
    output_dir: str | None = option(None, "Output folder for the pruned model. Not needed for a dry run.")

    calibration_file: str | None = option(
        None, "Calibration texts: a .txt file (one text per line), .json, .jsonl, .csv, .tsv or .parquet."
    )
    dataset_name: str | None = option(None, "Calibration texts: a dataset on the Hub, instead of a file.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_split: str = option("train", "Split of the dataset for calibration.")
    streaming: bool = option(False, "Download only the first 10,000 rows of the split.")
    text_column: str | None = option(
        None,
        'Column with the texts, or "first,second" for text pairs. Default: text, sentence, or the only text column; '
        "tokens, with lists of words, and question,context for models that read these.",
    )
    label_column: str | None = option(
        None,
        "Column with the labels of a classifier, the labels of words, the answers to questions, or the target texts "
        "of an encoder-decoder model. Default: label or labels; for words also ner_tags or tags; for questions "
        "answers, as in SQuAD.",
    )
    samples: int = option(128, "Number of calibration samples (blocks or rows), drawn from the whole data.")
    length: int = option(
        512, "Number of tokens per block, or the maximum per row; at most the number of positions of the model."
    )
    batch_size: int = option(8, "Number of samples per forward pass.")
    per_row: bool = option(
        False,
        "Use each text as one padded sample instead of blocks of concatenated texts. Always on for models other than "
        "causal language models.",
    )
    seed: int = option(0, "Random seed for choosing the samples.")

    eval: bool = option(
        False,
        "Evaluate before and after pruning: perplexity of a language model, accuracy or F1 of a classifier, "
        "correlation of a regression model, exact match and F1 of answers to questions; of a model without a task "
        "head the cosine similarity of its embeddings to those of the dense model.",
    )
    validation_file: str | None = option(None, "Evaluation texts: a file in one of the formats above.")
    validation_split: str = option("validation", "Evaluation split of the dataset, without a validation file.")
    max_eval_samples: int | None = option(None, "Maximum number of evaluation samples, from the start of the data.")

    dtype: str = option("auto", "Data type of the weights: auto (as in the checkpoint), bfloat16, float16 or float32.")
    device: str | None = option(None, "Device to compute on: cpu, cuda, cuda:1. Default: a GPU if there is one.")
    device_map: str | None = option(
        None,
        "Split a model that is larger than the GPU across GPUs, CPU and disk, as in accelerate: auto, balanced, "
        "sequential, or a JSON object that maps modules to devices.",
    )
    offload_folder: str | None = option(None, "Folder for weights that device_map offloads to disk.")
    tokenizer_name: str | None = option(None, "Tokenizer, if not the model's own: a folder or a Hub name.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    cache_dir: str | None = option(None, "Cache folder for downloads and prepared data.")
    trust_remote_code: bool = option(False, "Run model code that comes with the checkpoint. Read that code first.")

    base_model: str | None = option(None, HELP["base_model"])
    license: str | None = option(None, HELP["license"])
    datasets: list[str] | None = option(None, HELP["datasets"])
    pipeline_tag: str | None = option(None, HELP["pipeline_tag"])

    dry_run: bool = option(False, "Print what would be pruned, and the memory and time it would take; write nothing.")
    overwrite: bool = option(False, "Replace the contents of output_dir.")

    def __post_init__(self) -> None:
        errors = []
        if not self.model_name_or_path:
            errors.append("missing model: pass `model_name_or_path` (the first argument of hf-sparse prune).")
        if not self.output_dir and not self.dry_run:
            errors.append(_MISSING_OUTPUT)
        if self.dtype not in DTYPES:
            errors.append(f'`dtype` is "{self.dtype}": it must be one of {", ".join(DTYPES)}.')
        for name, least in (("samples", 1), ("length", 2), ("batch_size", 1), ("max_eval_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                errors.append(f"`{name}` is {value}: it must be {least} or more.")
        if self.device and self.device_map:
            errors.append("`device` and `device_map` exclude each other: leave one of them out.")
        if self.calibration_file and self.dataset_name:
            errors.append("`calibration_file` and `dataset_name` exclude each other: leave one of them out.")
        if self.eval and not (self.validation_file or self.dataset_name):
            errors.append("`eval` needs texts: pass `validation_file`, or `dataset_name` and `validation_split`.")
        try:
            if self.device_map is not None:
                parse_device_map(self.device_map)
        except ValueError as error:
            errors.append(str(error))
        try:
            self.card_metadata()
        except ValueError as error:
            errors.append(str(error))
        errors += self._unused_options()
        if errors:
            raise ValueError(" ".join(errors))

    def card_metadata(self) -> CardMetadata:
        """Returns what the user says of the model for its card."""
        return CardMetadata(self.base_model, self.license, self.datasets, self.pipeline_tag)

    def _unused_options(self) -> Iterator[str]:
        """Yields an error for the options that were given and have no effect without another one."""
        calibrates = bool(self.calibration_file or self.dataset_name)
        for names, needed, is_given in (
            (("dataset_config_name", "dataset_split", "streaming"), "`dataset_name`", bool(self.dataset_name)),
            (("samples", "seed"), "`calibration_file` or `dataset_name`", calibrates),
            (
                ("text_column", "label_column", "length", "batch_size", "per_row"),
                "`calibration_file` or `dataset_name`",
                self.reads_texts,
            ),
            (("validation_file", "validation_split", "max_eval_samples"), "`eval`", self.eval),
            (("offload_folder",), "`device_map`", bool(self.device_map)),
        ):
            unused = [] if is_given else [name for name in names if self._is_set(name)]
            if unused:
                listed = format_options(unused)
                verb = "has" if len(unused) == 1 else "have"
                yield f"{listed} {verb} no effect without {needed}: give that too, or leave {listed} out."
        if self.eval and self.validation_file and self._is_set("validation_split"):
            yield "`validation_split` is of `dataset_name`, not of `validation_file`: leave one of the two out."
        if self._is_set("model_revision") and Path(self.model_name_or_path or "").is_dir():
            yield (
                f"`model_revision` is of models on the Hub, and {self.model_name_or_path} is a folder: leave "
                "`model_revision` out."
            )

    def _is_set(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return getattr(self, name) != next(field.default for field in fields(self) if field.name == name)

    def hub_options(self) -> dict[str, Any]:
        """Returns the keyword arguments of `from_pretrained` for the model."""
        trusted, cache = self.trust_remote_code, self.cache_dir
        return {"revision": self.model_revision, "cache_dir": cache, "trust_remote_code": trusted}

    @property
    def reads_texts(self) -> bool:
        """Whether there are calibration or evaluation texts."""
        return bool(self.calibration_file or self.dataset_name or self.eval)

    @property
    def output_path(self) -> Path:
        """`output_dir` as a path. A dry run may have none.

        Raises:
            ValueError: there is none.
        """
        if not self.output_dir:
            raise ValueError(_MISSING_OUTPUT)
        return Path(self.output_dir)

    @property
    def unfinished_dir(self) -> Path:
        """The folder for finished blocks while the run is not complete, beside `output_dir`."""
        return self.output_path.with_name(f"{self.output_path.name}.unfinished")
