"""A one-shot run from one checkpoint to another: load, measure, prune, measure, save. What `hf-sparse prune` and
`scripts/run_oneshot.py` do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..calibration.batches import count_tokens
from ..calibration.text_batches import TextReader
from ..calibration.text_rows import load_texts
from ..config import OneshotConfig
from ..distributed import get_communicator, init_distributed
from ..evaluation import evaluate_model, metric_for
from ..files import DENSE_RESULTS_FILE, write_folder_atomically, write_json
from ..reporting.report import SparsityReport
from ..requires import Requires
from .arguments import OneshotArguments
from .loading import load_model, load_tokenizer
from .plan import OneshotPlan, plan_oneshot
from .prune import prune_oneshot
from .result import OneshotResult, told
from .resume import count_finished, remove_finished


# What the measurements of the dense model depend on: the same run, started again, does not make them again.
_MEASURED_BY = (
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
    job: OneshotArguments, config: OneshotConfig, say: Callable[[str], None] = print
) -> SparsityReport | OneshotPlan:
    """Do it. Killed at any moment and started again, it goes on after the last block that was finished; what is in
    `output_dir` is whole or not there.

    Args:
        say: gets lines for people, in the first process only.

    Returns: the report, or the plan of a dry run.

    Raises:
        OSError, ValueError: what the user can mend.
    """
    device = init_distributed(job.device)
    run = _Run(job, config, device, say)
    if job.dry_run:
        return run.plan()
    try:
        return run.prune()
    except KeyboardInterrupt:
        run.tell("interrupted", "Started again in the same way, the run goes on from there.")
        raise


class _Run:
    def __init__(self, job: OneshotArguments, config: OneshotConfig, device: torch.device, say: Callable[[str], None]):
        self._job, self._config, self._device = job, config, device
        self._communicator = get_communicator()
        self._main = self._communicator.rank == 0
        self._say = say if self._main else _say_nothing
        self._state = None if job.dry_run else job.unfinished
        self._facts: dict[str, Any] = {}

    def plan(self) -> OneshotPlan:
        self._read_texts()
        self._load()
        plan = plan_oneshot(self._model, self._calibration(), self._config)
        self._say(str(plan))
        return plan

    def prune(self) -> SparsityReport:
        self._communicator.raise_together(_output_error_of(self._job) if self._main else None)
        self._read_texts()
        self._load()
        held_out = self._reader.first(self._validation, self._job.max_eval_samples) if self._job.eval else []
        batches = self._calibration()
        self.tell("going on")
        dense = self._measure_dense(held_out) if held_out else {}
        report = prune_oneshot(self._model, batches, self._config, state_dir=self._state)
        self._say(str(report))
        sparse = evaluate_model(self._model, held_out) if held_out else {}
        if held_out:
            self._say(f"before: {_told(dense)}\nafter:  {_told(sparse)}")
        self._communicator.raise_together(self._save(report, dense, sparse) if self._main else None)
        self._say(f"saved to {self._job.output_dir}")
        return report

    def tell(self, what: str, then: str = "") -> None:
        """Say how many blocks are finished, if any."""
        if count := count_finished(self._state):
            self._say(f"{what}: finished blocks in {self._state}: {count}. {then}".rstrip())

    # What goes in

    def _read_texts(self) -> None:
        """First, as a model takes long to load."""
        job = self._job
        hub = {"cache_dir": job.cache_dir, "streaming": job.streaming}
        named = (job.dataset_name, job.dataset_config_name)
        self._texts = self._validation = None
        if job.calibration_file or job.dataset_name:
            self._texts = load_texts(job.calibration_file, *named, job.dataset_split, **hub)
        elif needing := needs_data(self._config):
            raise ValueError(f"{needing} needs calibration data: pass calibration_file or dataset_name.")
        if job.eval:
            named = () if job.validation_file else named
            hub |= {"split": job.validation_split, "purpose": "validation"}
            self._validation = load_texts(job.validation_file, *named, **hub)

    def _load(self) -> None:
        """The model, and the tokenizer where it is needed or there is one."""
        job = self._job
        self._say(f"loading {job.model_name_or_path}")
        self._model = load_model(
            job.model_name_or_path, job.dtype, self._device, job.device_map, job.offload_folder, **job.hub_options()
        )
        if job.eval:
            metric_for(self._model)  # raises before any work if the model cannot be evaluated
        own = {} if job.tokenizer_name is None else {"revision": "main"}
        try:
            self._tokenizer = load_tokenizer(job.tokenizer_name or job.model_name_or_path, **job.hub_options() | own)
        except OSError:
            if job.reads_texts:
                raise
            self._tokenizer = None
        self._reader = None
        if job.reads_texts:
            columns = {"text_column": job.text_column, "label_column": job.label_column}
            same_length = self._config.forwards == 1
            self._reader = TextReader(
                self._tokenizer,
                self._model,
                job.length,
                job.batch_size,
                per_row=job.per_row,
                same_length=same_length,
                **columns,
            )

    def _calibration(self) -> list[dict[str, torch.Tensor]] | None:
        job = self._job
        if self._texts is None:
            return None
        batches = self._reader.sample(self._texts, job.samples, job.seed)
        named = (job.dataset_name, job.dataset_config_name, job.dataset_split)
        self._facts = {
            "data": job.calibration_file or " ".join(filter(None, named)),
            "samples": job.samples,
            "unit": "rows" if self._reader.per_row else "blocks",
            "length": job.length,
            "seed": job.seed,
            "tokens": sum(map(count_tokens, batches)),
        }
        self._say(f"calibration: {told(self._facts)} (--samples, --length, --seed)")
        return batches

    def _measure_dense(self, held_out: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Before pruning; once, however often the run is started."""
        asked = {name: getattr(self._job, name) for name in _MEASURED_BY}
        path = self._state / DENSE_RESULTS_FILE
        known = {}
        if self._main and path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
        if self._communicator.any(known.get("asked") == asked):
            return known.get("metrics", {})
        metrics = evaluate_model(self._model, held_out)
        if self._main:
            write_json(path, {"asked": asked, "metrics": metrics})
        self._say(f"before pruning: {_told(metrics)}")
        return metrics

    # What comes out

    def _save(self, report: SparsityReport, dense: dict[str, float], sparse: dict[str, float]) -> Exception | None:
        job = self._job
        result = OneshotResult(
            Path(job.output_dir).resolve().name,
            job.model_name_or_path,
            report,
            self._config,
            self._facts,
            job.dataset_name,
            None if job.validation_file else job.dataset_name,
            dense,
            sparse,
            self._communicator.world_size,
        )
        try:
            write_folder_atomically(job.output_dir, lambda folder: result.save(folder, self._model, self._tokenizer))
        except Exception as error:  # the other processes wait to hear of it
            return error
        for path in self._state.glob(f"*{Path(DENSE_RESULTS_FILE).stem}*"):
            path.unlink()
        remove_finished(self._state)
        return None


def needs_data(config: OneshotConfig) -> str | None:
    """What of a config looks at calibration data; None if nothing does.

    Example:
        >>> needs_data(OneshotConfig(target_sparsity=0.5))
        'criterion "wanda"'
        >>> needs_data(OneshotConfig(target_sparsity=0.5, criterion="random"))
    """
    for group in config.resolve_groups().values():
        methods = {"solver": group.solver, "criterion": group.criterion, "allocation": group.allocation}
        names = {"solver": group.solver_name, "criterion": group.criterion_name, "allocation": group.allocation_name}
        for kind, method in methods.items():
            if group.target and method is not None and method.requires & Requires.CALIBRATION_DATA:
                return f'{kind} "{names[kind]}"'
    return None


def _say_nothing(text: str) -> None:
    """Of other processes than the first."""


def _told(metrics: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}" for name, value in metrics.items()
    )


def _output_error_of(job: OneshotArguments) -> OSError | None:
    """Why the result cannot go where it is to go."""
    output = Path(job.output_dir)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not output.is_dir():
        return NotADirectoryError(f"output_dir {output} is a file: name a folder.")
    if not job.overwrite:
        return FileExistsError(f"output_dir {output} is not empty: name another folder, or pass --overwrite.")
    if Path(job.model_name_or_path).is_dir() and output.samefile(job.model_name_or_path):
        return FileExistsError(f"output_dir {output} is the model that is to be pruned: name another folder.")
    if not (output / "config.json").is_file():
        return FileExistsError(f"output_dir {output} holds no model (config.json), so it is not replaced: remove it.")
    return None
