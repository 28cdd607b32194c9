"""One-shot pruning from checkpoint to checkpoint: load, evaluate, prune, evaluate, save. `hf-sparse prune` and
`scripts/run_oneshot.py` call it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..calibration.batches import count_tokens
from ..calibration.data_files import BUILDERS, extension
from ..calibration.text_batches import TextReader
from ..calibration.text_tables import check_columns, load_texts
from ..config import OneshotConfig
from ..distributed import get_communicator, init_distributed, raise_on_all_ranks
from ..evaluation import evaluate_model, metric_for, reference_outputs
from ..files import (
    DENSE_RESULTS_FILE,
    LAYERS_PLOT_FILE,
    ONESHOT_RESULTS_FILE,
    check_writable,
    read_json,
    write_folder_atomically,
    write_json,
)
from ..hub.auto_classes import auto_class
from ..hub.card import SparsityCard, write_card
from ..hub.card.command import command_line
from ..hub.loading import load_model, load_tokenizer
from ..hub.next_steps import format_next_steps
from ..hub.sources import check_model, check_tokenizer_source
from ..local_paths import published_name
from ..reporting.plots import plot_layers
from ..reporting.report import SparsityReport
from ..reporting.tabular import console_text
from .arguments import OneshotArguments
from .plan import OneshotPlan, plan_oneshot
from .prepare import methods_requiring_data
from .prune import prune_oneshot
from .resume import count_finished_subgraphs, remove_finished_subgraphs


logger = logging.getLogger(__name__)

# The Hub's name of the task of each Auto class.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModel": "feature-extraction",
}

# Tasks of metrics that are no task of a whole model on the Hub any more.
_NO_PIPELINE = ("text2text-generation",)

# The main inputs of models that cannot read texts.
_OTHER_INPUTS = ("pixel_values", "input_values", "input_features")

# The arguments that the metrics of the dense model depend on. A continued run reuses metrics if these are the same.
_EVALUATION_ARGUMENTS = (
    "model_name_or_path",
    "model_revision",
    "tokenizer_name",
    "dtype",
    "validation_file",
    "dataset_name",
    "dataset_config_name",
    "validation_split",
    "max_eval_samples",
    "text_column",
    "label_column",
    "per_row",
    "length",
)


def run_oneshot(
    arguments: OneshotArguments, config: OneshotConfig, echo: Callable[[str], None] = print
) -> SparsityReport | OneshotPlan:
    """Prunes a checkpoint and writes the result to `output_dir`, completely or not at all.

    An interrupted run that is started again with the same options continues after the last finished block.

    Args:
        arguments: model, data and output.
        config: what to prune, and how.
        echo: prints a line of progress, on rank 0.

    Returns:
        The report of the pruned model; with `dry_run` the plan.

    Raises:
        OSError: a model, a data file or the output folder cannot be used.
        ValueError: an option is not valid.
    """
    run = _CheckpointRun(arguments, config, init_distributed(arguments.device), echo)
    if arguments.dry_run:
        return run.plan()
    try:
        return run.prune()
    except KeyboardInterrupt:
        run.echo_finished("interrupted", "Run the same command again to continue.")
        raise


class _CheckpointRun:
    def __init__(
        self, arguments: OneshotArguments, config: OneshotConfig, device: torch.device, echo: Callable[[str], None]
    ):
        self._args, self._config, self._device = arguments, config, device
        self._communicator = get_communicator()
        self._is_main = self._communicator.rank == 0
        self._print = echo
        self._calibration_info: dict[str, Any] = {}

    def plan(self) -> OneshotPlan:
        self._check_sources()
        self._load_texts()
        self._load_model()
        plan = plan_oneshot(self._model, self._calibration_batches(), self._config)
        self._echo(console_text(plan))
        return plan

    def prune(self) -> SparsityReport:
        args = self._args
        with raise_on_all_ranks(OSError):
            if self._is_main:
                _check_output(args)
        self._check_sources()
        self._load_texts()
        self._load_model()
        eval_batches = self._reader.first(self._eval_texts, args.max_eval_samples) if args.eval else []
        batches = self._calibration_batches()
        self.echo_finished("continuing")
        # Computed again in a run that continues: until it is pruned again, the model is the dense one.
        reference = reference_outputs(self._model, eval_batches) if eval_batches else None
        dense_metrics = self._evaluate_dense(eval_batches, reference) if eval_batches else {}
        report = prune_oneshot(self._model, batches, self._config, state_dir=args.unfinished_dir)
        self._echo(console_text(report))
        sparse_metrics = evaluate_model(self._model, eval_batches, reference) if eval_batches else {}
        if eval_batches:
            self._echo(f"after pruning:  {_format_metrics(sparse_metrics)}")
        with raise_on_all_ranks(Exception):
            if self._is_main:
                self._save(report, dense_metrics, sparse_metrics)
        self._echo(self._closing_lines())
        return report

    def _closing_lines(self) -> str:
        """Returns where the model is, how to compare it where it was not evaluated, and what can be done next."""
        args = self._args
        compare = "to compare with the dense model: --eval, with --validation_file or --dataset_name\n"
        return f"{'' if args.eval else compare}saved to {args.output_dir}\n{format_next_steps(args.output_path)}"

    def _echo(self, text: str) -> None:
        if self._is_main:
            self._print(text)

    def echo_finished(self, event: str, remedy: str = "") -> None:
        """Print the number of finished blocks, if there are any."""
        folder = self._args.unfinished_dir
        if count := count_finished_subgraphs(folder):
            self._echo(f"{event}: finished blocks in {folder}: {count}. {remedy}".rstrip())

    def _check_sources(self) -> None:
        """Check that model and tokenizer exist: before the texts, which may be downloaded."""
        args = self._args
        check_model(args.model_name_or_path, revision=args.model_revision, cache_dir=args.cache_dir)
        if args.tokenizer_name is not None:
            check_tokenizer_source(args.tokenizer_name, "tokenizer_name", cache_dir=args.cache_dir)

    def _load_texts(self) -> None:
        """Load calibration and evaluation texts: before the model, which takes longer."""
        args = self._args
        self._texts = self._eval_texts = None
        options: dict[str, Any] = {"streaming": args.streaming, "cache_dir": args.cache_dir}
        methods = methods_requiring_data(self._config, self._config.resolve_groups().values())
        if methods and not (args.calibration_file or args.dataset_name):
            raise ValueError(f"{methods[0]} needs calibration data: pass `calibration_file` or `dataset_name`.")
        if methods:
            self._texts = load_texts(
                args.calibration_file, args.dataset_name, args.dataset_config_name, args.dataset_split, **options
            )
            for names in (args.text_column, args.label_column):
                check_columns(self._texts, [name.strip() for name in names.split(",")] if names else ())
        elif args.calibration_file or args.dataset_name:
            self._echo("The calibration data are not read: no method that was chosen needs any.")
        if args.eval:
            dataset = (None, None) if args.validation_file else (args.dataset_name, args.dataset_config_name)
            self._eval_texts = load_texts(
                args.validation_file, *dataset, args.validation_split, purpose="validation", **options
            )

    def _load_model(self) -> None:
        """Load the model, and its tokenizer if there is one."""
        args = self._args
        self._echo(f"loading {args.model_name_or_path}")
        self._model = load_model(
            args.model_name_or_path,
            args.dtype,
            self._device,
            args.device_map,
            args.offload_folder,
            **args.hub_options(),
        )
        if args.eval:
            metric_for(self._model)  # raises if the model cannot be evaluated
        if args.reads_texts and (inputs := getattr(self._model, "main_input_name", None)) in _OTHER_INPUTS:
            raise ValueError(
                f"{type(self._model).__name__} reads {inputs}, not texts: leave `eval` and the calibration data out, "
                "or pass batches to prune_oneshot and evaluate_model in Python."
            )
        options = args.hub_options()
        if args.tokenizer_name is not None:
            options["revision"] = "main"
        try:
            self._tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path, **options)
        except OSError:
            if args.reads_texts:
                raise
            self._tokenizer = None

    @cached_property
    def _reader(self) -> TextReader:
        args = self._args
        return TextReader(
            self._tokenizer,
            self._model,
            args.length,
            args.batch_size,
            per_row=args.per_row,
            same_length=self._config.prefers_single_forward,
            text_column=args.text_column,
            label_column=args.label_column,
        )

    def _calibration_batches(self) -> list[dict[str, torch.Tensor]] | None:
        args = self._args
        if self._texts is None:
            return None
        batches = self._reader.sample(self._texts, args.samples, args.seed)
        dataset = (args.dataset_name, args.dataset_config_name, args.dataset_split)
        self._calibration_info = {
            "data": _data_name(args.calibration_file, *dataset),
            "samples": args.samples,
            "unit": "rows" if self._reader.per_row else "blocks",
            "length": args.length,
            "seed": args.seed,
            "tokens": sum(map(count_tokens, batches)),
        }
        self._echo(f"calibration data: {_format_calibration(self._calibration_info)} (--samples, --length, --seed)")
        return batches

    def _evaluate_dense(
        self, batches: list[dict[str, torch.Tensor]], reference: list[torch.Tensor] | None
    ) -> dict[str, float]:
        """Evaluate the model before it is pruned, or read the metrics of the run that is continued."""
        arguments = {name: getattr(self._args, name) for name in _EVALUATION_ARGUMENTS}
        path = self._args.unfinished_dir / DENSE_RESULTS_FILE
        metrics = read_dense_metrics(path, arguments) if self._is_main else None
        if not self._communicator.any(metrics is not None):
            metrics = evaluate_model(self._model, batches, reference)
            if self._is_main:
                write_json(path, {"asked": arguments, "metrics": metrics})
        metrics = metrics or {}
        self._echo(f"before pruning: {_format_metrics(metrics)}")
        return metrics

    def _save(self, report: SparsityReport, dense_metrics: dict[str, float], sparse_metrics: dict[str, float]) -> None:
        """Write the output folder and remove what is only needed to continue."""
        args = self._args
        model = published_name(args.model_name_or_path)
        results: dict[str, Any] = {"model": model, "calibration": self._calibration_info or None}
        results |= {f"dense_{name}": value for name, value in dense_metrics.items()}
        results |= {f"eval_{name}": value for name, value in sparse_metrics.items()}

        def write(folder: Path) -> None:
            self._model.save_pretrained(folder)
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)
            write_json(folder / ONESHOT_RESULTS_FILE, results)
            plot_layers(folder / LAYERS_PLOT_FILE, report)
            write_card(folder, self._card(report, dense_metrics, sparse_metrics))

        write_folder_atomically(args.output_path, write)
        for path in args.unfinished_dir.glob(f"*{Path(DENSE_RESULTS_FILE).stem}*"):
            path.unlink()
        remove_finished_subgraphs(args.unfinished_dir)

    def _card(
        self, report: SparsityReport, dense_metrics: dict[str, float], sparse_metrics: dict[str, float]
    ) -> SparsityCard:
        args = self._args
        model_class = auto_class(type(self._model).__name__)
        task = _TASKS.get(model_class or "")
        metadata: dict[str, Any] = {"base_model": args.model_name_or_path}
        # The Hub refuses a card with a folder as data set, and a local path may be private.
        is_on_hub = args.dataset_name and not Path(args.dataset_name).is_dir()
        metadata |= {"datasets": [args.dataset_name]} if is_on_hub else {}
        metadata |= {"pipeline_tag": task} if task and task not in _NO_PIPELINE else {}
        return SparsityCard(
            model_name=args.output_path.resolve().name,
            report=report,
            config=self._config.to_dict(),
            metadata=metadata,
            given=args.card_metadata().to_dict(),
            task=task,
            dataset=_evaluation_dataset(args) if sparse_metrics else None,
            dense_metrics=_card_metrics(dense_metrics),
            metrics=_card_metrics(sparse_metrics),
            calibration=_format_calibration(self._calibration_info) if self._calibration_info else None,
            processes=self._communicator.world_size,
            command=command_line(),
            auto_class=model_class,
            oneshot=True,
        )


def _data_name(file: str | None, dataset: str | None, *options: str | None) -> str:
    """The calibration data as a reader knows them: a file without its folder, or a data set, its config and split."""
    if file:
        return Path(file).name
    return " ".join(filter(None, (published_name(str(dataset)), *options)))


def _evaluation_dataset(arguments: OneshotArguments) -> dict[str, Any]:
    """The evaluation data as the Hub's metadata name them: a data set of the Hub, or a file without its folder.

    Example:
        >>> _evaluation_dataset(OneshotArguments("model", "out", eval=True, validation_file="data/dev.jsonl"))
        {'type': 'json', 'name': 'dev'}
    """
    if arguments.validation_file:
        path = Path(arguments.validation_file)
        return {"type": BUILDERS[extension(path)][0], "name": path.stem}
    name = published_name(str(arguments.dataset_name))
    values = {"type": name, "name": name, "config": arguments.dataset_config_name, "split": arguments.validation_split}
    return {key: value for key, value in values.items() if value}


def _card_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics as Trainer names them, without the size of the data."""
    return {f"eval_{name}": value for name, value in metrics.items() if name not in ("tokens", "samples")}


def _format_calibration(info: dict[str, Any]) -> str:
    """A description of calibration data.

    Example:
        >>> _format_calibration(
        ...     {"samples": 2, "unit": "blocks", "length": 8, "data": "a.txt", "seed": 0, "tokens": 16}
        ... )
        '2 blocks of 8 tokens from a.txt, 16 tokens in total, seed 0'
    """
    at_most = "at most " if info["unit"] == "rows" else ""
    text = "{samples} {unit} of {at_most}{length} tokens from {data}, {tokens:,} tokens in total, seed {seed}"
    return text.format(at_most=at_most, **info)


def _format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}" for name, value in metrics.items()
    )


def _check_output(arguments: OneshotArguments) -> None:
    """Check that the result can be written to `output_dir`."""
    output = arguments.output_path
    check_writable(output.absolute().parent, f"`output_dir` {output}")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise NotADirectoryError(f"`output_dir` {output} is a file: name a folder.")
    if not arguments.overwrite:
        raise FileExistsError(f"`output_dir` {output} is not empty: name another folder, or pass `overwrite=True`.")
    if Path(arguments.model_name_or_path).is_dir() and output.samefile(arguments.model_name_or_path):
        raise FileExistsError(f"`output_dir` {output} is the model to prune: name another folder.")
    if not (output / "config.json").is_file():
        raise FileExistsError(
            f"`output_dir` {output} holds no model (config.json), so it is not replaced: remove it yourself."
        )


def read_dense_metrics(path: Path, arguments: Mapping[str, Any]) -> dict[str, float] | None:
    """Returns the metrics of the dense model that an interrupted run with the same arguments has stored; None if there
    are none. Those in a damaged file are measured again."""
    try:
        stored = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s The dense model is evaluated again.", error)
        return None
    metrics = stored.get("metrics")
    is_whole = isinstance(metrics, dict) and all(isinstance(value, (int, float)) for value in metrics.values())
    return metrics if is_whole and stored.get("asked") == arguments else None
