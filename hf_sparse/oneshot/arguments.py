"""OneshotJob: the options of a one-shot run from one checkpoint to another, beside those of `OneshotConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .loading import DTYPES


def option(default: Any, help: str) -> Any:  # noqa: A002 - the name that argument parsers use
    """Returns a dataclass field with its help text for command lines."""
    return field(default=default, metadata={"help": help})


@dataclass
class OneshotArguments:
    """Which model to prune, on which texts, and where the result goes."""

    model_name_or_path: str = option(None, "Folder or Hub name of the pretrained model.")
    output_dir: str | None = option(None, "Folder that the pruned model is saved to. A dry run needs none.")

    calibration_file: str | None = option(
        None, "Calibration texts: .txt (a text in each line), .json, .jsonl, .csv, .tsv or .parquet."
    )
    dataset_name: str | None = option(None, "Calibration texts: Hub name of a data set, in place of a file.")
    dataset_config_name: str | None = option(None, "Configuration of that data set.")
    dataset_split: str = option("train", "Split of that data set to calibrate on.")
    streaming: bool = option(False, "Read the first 10,000 rows of that split only, and download no more.")
    text_column: str | None = option(
        None,
        'Column of the texts, or "first,second" for pairs. Left out: text, sentence, or the only column of texts.',
    )
    label_column: str | None = option(
        None,
        "Labels of a classifier, or target texts of an encoder with a decoder. Left out: label or labels, for "
        "classifiers.",
    )
    samples: int = option(128, "How many blocks or rows to calibrate on, from all over the data.")
    length: int = option(512, "Tokens of a block, or at most of a row. Never more than the model has positions.")
    batch_size: int = option(8, "Blocks or rows that go through the model together.")
    per_row: bool = option(
        False,
        "Take each text for a sample of its own, padded, in place of blocks cut out of joined texts. So it always is "
        "for other than causal language models.",
    )
    seed: int = option(0, "Which blocks or rows are chosen.")

    eval: bool = option(
        False, "Measure perplexity of a causal language model, or accuracy of a classifier, before and after."
    )
    validation_file: str | None = option(None, "Texts to measure on, in the same formats.")
    validation_split: str = option("validation", "Split of the data set to measure on, where there is no file.")
    max_eval_samples: int | None = option(None, "Measure on this many first blocks or rows only.")

    dtype: str = option("auto", "Type to load the weights in: auto (the checkpoint's), bfloat16, float16, float32.")
    device: str | None = option(None, "Where to compute: cpu, cuda, cuda:1. Left out: a GPU where there is one.")
    device_map: str | None = option(
        None,
        "Spread the model over devices, CPU and disk as accelerate does: auto, balanced, sequential, or a JSON object "
        "of modules and devices. For a model larger than the GPU.",
    )
    offload_folder: str | None = option(None, "Where weights go that device_map sends to disk.")
    tokenizer_name: str | None = option(None, "Folder or Hub name of the tokenizer, if it is not the model's own.")
    model_revision: str = option("main", "Branch, tag or commit of the model.")
    cache_dir: str | None = option(None, "Where downloads and prepared data are kept.")
    trust_remote_code: bool = option(False, "Run model code that comes with the checkpoint. Read that code first.")

    dry_run: bool = option(False, "Say what would be pruned, and what memory and time it takes. Nothing is written.")
    overwrite: bool = option(False, "Replace what is in output_dir.")

    def __post_init__(self):
        errors = []
        if not self.model_name_or_path:
            errors.append("no model: pass model_name_or_path.")
        if not self.output_dir and not self.dry_run:
            errors.append("no place for the result: pass output_dir, or dry_run.")
        if self.dtype not in DTYPES:
            errors.append(f'dtype is "{self.dtype}": it must be one of {", ".join(DTYPES)}.')
        if self.device and self.device_map:
            errors.append("device and device_map exclude each other: leave one of them out.")
        if self.calibration_file and self.dataset_name:
            errors.append("calibration_file and dataset_name exclude each other: leave one of them out.")
        if self.eval and not (self.validation_file or self.dataset_name):
            errors.append("eval needs texts: pass validation_file, or dataset_name and validation_split.")
        if errors:
            raise ValueError(" ".join(errors))

    def hub_options(self) -> dict[str, Any]:
        """What every `from_pretrained` shares."""
        names = {"revision": self.model_revision, "cache_dir": self.cache_dir}
        return names | {"trust_remote_code": self.trust_remote_code}

    @property
    def reads_texts(self) -> bool:
        """Whether there are texts to calibrate or to measure on."""
        return bool(self.calibration_file or self.dataset_name or self.eval)

    @property
    def unfinished(self) -> Path:
        """Where finished blocks are kept until the result is."""
        output = Path(self.output_dir)
        return output.with_name(f"{output.name}.unfinished")
