"""SparsityCard: the contents of a model card."""

from __future__ import annotations

import copy
import importlib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ...config import OneshotConfig, PruningConfig
from ...config.base import PruningOptions
from ...config.distillation import published_options
from ...config.options import DEFAULT_SOLVER, upgrade_defaults
from ...files import CARD_FILE, CONFIG_FILE, REPORT_FILE, SHRINK_FILE, read_json, write_json
from ...local_paths import is_path, published_name, published_values, shorten_paths
from ...plugins import loaded_plugins
from ...reporting.report import SparsityReport, write_report_and_config
from ...schedulers import PruningSchedule
from ...structured.plan import ShrinkPlan
from ..auto_classes import auto_class
from ..card_metadata import CardMetadata, is_hub_name
from .escaping import remove_secrets
from .latency import is_latency


# Endings of the names of values that `evaluate` and `predict` return beside the metrics.
_NOT_METRICS = ("runtime", "per_second", "samples", "time", "epoch", "step")
_SPLITS = ("eval", "test")

# Names of metrics for readers, where they are not those of the Hub with spaces.
_METRIC_NAMES = {
    "cosine": "Cosine similarity to the dense model",
    "mse": "Mean squared error",
    "pearsonr": "Pearson correlation",
    "spearmanr": "Spearman correlation",
}


@dataclass
class SparsityCard:
    """The contents of a model card: what was pruned and how, and the metrics of the pruned and the dense model.

    The report, the config and what was removed are saved in files of their own, all other fields in pruning_card.json.

    Args:
        model_name: title of the card.
        config: pruning options, from `PruningConfig.to_dict` or `OneshotConfig.to_dict`.
        metadata: further metadata for the Hub, given by the user under the Hub's names (base_model, datasets,
            language, license, ...), see `huggingface_hub.ModelCardData`. Local folders as base_model are removed.
        given: metadata that the user has given for this model, see `CardMetadata`. They replace those in `metadata`.
        local_base_model: name of the folder of the base model, if that is not on the Hub.
        task: the Hub's name of the task that the metrics belong to, such as "text-classification".
        dataset: the data set that the metrics were measured on: `type` and `name`, and optionally `config`, `split`,
            `args`. With `task` and `dataset` the metrics enter the metadata.
        dense_metrics: metrics of the dense model, under the same names as `metrics`.
        calibration: description of the calibration data of one-shot pruning.
        settings: `ResolvedGroup.to_dict` of every parameter group; computed from `config` if empty.
        metrics: metrics of the pruned model, under the names that `Trainer.evaluate` gives them.
        oneshot: whether the model was pruned without training.
        max_steps: number of optimizer steps of the training; None if unknown.
        step: the optimizer step of the weights, which is less than `max_steps` in checkpoints and after a training
            that ended early; None if unknown.
        processes: world size of the run.
        command: the command that started the run.
        auto_class: the class of transformers whose `from_pretrained` opens the model; None if there is none.
        adapter: whether the saved files are a PEFT adapter, without the pruned weights.
        plugins: names of the plug-ins that the run has loaded.
        tuned: which few parameters were trained, and how many; None if all were.
        shrunk: what was removed from the model, if it was made smaller; the report is that of the smaller model.
        latency: measured times, as `read_latency` returns them.
        written: metadata and text digests of the card as it was generated last, see `CardVersion.base`.

    Example:
        >>> from hf_sparse.reporting.report import LayerReport
        >>> report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
        >>> card = SparsityCard("my-model", report, PruningConfig(pattern="2:4").to_dict())
        >>> card.hub_metadata()["tags"], card.settings[0]["scope"]
        (['sparse', 'pruned', '2:4'], 'global')
    """

    model_name: str
    report: SparsityReport
    config: dict[str, Any]

    metadata: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    local_base_model: str | None = None
    task: str | None = None
    dataset: dict[str, Any] | None = None
    dense_metrics: dict[str, float] = field(default_factory=dict)
    calibration: str | None = None
    repo_id: str | None = None

    settings: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    oneshot: bool = False
    max_steps: int | None = None
    step: int | None = None
    processes: int = 1
    command: str | None = None
    auto_class: str | None = None
    adapter: bool = False
    tuned: str | None = None
    plugins: list[str] = field(default_factory=loaded_plugins)
    version: str = field(default_factory=lambda: importlib.import_module("hf_sparse").__version__)

    shrunk: ShrinkPlan | None = None
    latency: dict[str, Any] | None = None

    written: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._remove_local_paths()
        self.given = CardMetadata(**self.given).to_dict()
        config_class = OneshotConfig if self.oneshot else PruningConfig
        # Options that an earlier version did not have get their defaults.
        self.config = config_class().to_dict() | config_class.read_options(self.config)
        if not self.settings or any("scheduler" not in group for group in self.settings):  # of an earlier version
            groups = config_class.from_dict(self.config).resolve_groups().values()
            scopes = {group.get("group"): group["scope"] for group in self.settings if group.get("scope")}
            self.settings = [group.to_dict() for group in groups]
            for group in self.settings:  # the default was another one
                group["scope"] = scopes.get(group["group"], group["scope"])

    def _remove_local_paths(self) -> None:
        """Removes what may be private, and what the Hub refuses: folders as base_model and data sets."""
        bases = _as_list(self.metadata.get("base_model"))
        if not all(is_hub_name(name) and not Path(name).is_dir() for name in bases):
            self.local_base_model = ", ".join(published_name(str(name)) for name in bases)
            self.metadata = {name: value for name, value in self.metadata.items() if name != "base_model"}
        datasets = _as_list(self.metadata.get("datasets"))
        if any(is_path(str(name)) for name in datasets):
            public = [name for name in datasets if not is_path(str(name))]
            self.metadata = {name: value for name, value in self.metadata.items() if name != "datasets"}
            self.metadata |= {"datasets": public} if public else {}
        self.config, self.settings = published_options(self.config), published_values(self.settings)
        self.command = shorten_paths(self.command) if self.command else self.command

    @property
    def base_model(self) -> str | list[str] | None:
        """The base model on the Hub."""
        return self.given.get("base_model") or self.metadata.get("base_model")

    # Files

    def save(self, directory: str | Path, secrets: Iterable[str | None] = ()) -> None:
        """Writes the files that `load` reads; pruning_card.json without the `secrets`."""
        directory = Path(directory)
        write_report_and_config(directory, self.report, self.config)
        if self.shrunk is not None:
            self.shrunk.save(directory)
        else:
            (directory / SHRINK_FILE).unlink(missing_ok=True)
        values = {name: getattr(self, name) for name in _STORED_FIELDS}
        if self.latency is None:
            del values["latency"]
        stored = json.dumps(values, ensure_ascii=False)
        write_json(directory / CARD_FILE, json.loads(remove_secrets(stored, secrets)))

    @classmethod
    def load(cls, directory: str | Path) -> SparsityCard:
        """Reads a card from the files in the folder of a model.

        Without pruning_card.json, metrics, steps and model class are taken from the files of Trainer and transformers.

        Raises:
            FileNotFoundError: the report or the config is missing.
            ValueError: a file is damaged.
        """
        directory = Path(directory)
        try:
            report, config = SparsityReport.load(directory / REPORT_FILE), read_json(directory / CONFIG_FILE)
            config = upgrade_defaults(config)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} does not exist: a card is generated from the files that pruning writes beside the "
                f"weights, {REPORT_FILE} and {CONFIG_FILE}."
            ) from error
        shrunk = ShrinkPlan.load(directory)
        if (directory / CARD_FILE).is_file():
            stored = read_json(directory / CARD_FILE)
        else:
            oneshot_options = set(OneshotConfig.run_options) - set(PruningOptions.run_options)
            stored = _read_training_files(directory) | {"oneshot": bool(config.keys() & oneshot_options)}
        is_oneshot = bool(stored.get("oneshot"))
        config_class = OneshotConfig if is_oneshot else PruningConfig
        if errors := ["it has no pattern"] * ("pattern" not in config) + config_class.type_errors(config):
            raise ValueError(f"{directory / CONFIG_FILE} is damaged: {' '.join(errors)}")
        values: dict[str, Any] = {"model_name": directory.resolve().name}
        values |= {name: stored[name] for name in _STORED_FIELDS if name in stored}
        if wrong := [name for name, value in values.items() if not _is_valid_field(name, value)]:
            raise ValueError(f"{directory / CARD_FILE} is damaged: {', '.join(wrong)} cannot be used.")
        try:
            card = cls(report=report, config=config, shrunk=shrunk, **values)
            card.hub_metadata()
            if card.max_steps is not None and not card.oneshot:
                card.schedule(card.max_steps)
            return card
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{directory / CARD_FILE} or {CONFIG_FILE} is damaged: {error}") from error

    def schedule(self, max_steps: int) -> PruningSchedule:
        """Returns the prune steps of the training.

        Raises:
            ValueError: the schedule in the config does not fit a training of this length.
        """
        start, end, every = (self.config[name] for name in ("prune_start", "prune_end", "prune_every"))
        return PruningSchedule.from_fractions(start, end, every, max_steps, self.config["rewind"])

    # Metadata

    @property
    def patterns(self) -> list[str]:
        """The distinct patterns of the selected weights."""
        return list(dict.fromkeys(layer.pattern for layer in self.report.layers))

    @property
    def is_dense(self) -> bool:
        """Whether the model was made smaller and has no selected weights that are zero."""
        return self.shrunk is not None and not self.report.zeros

    @property
    def is_heterogeneous(self) -> bool:
        """Whether the model opens only after `import hf_sparse`."""
        return self.shrunk is not None and self.shrunk.heterogeneous

    def hub_metadata(self) -> dict[str, Any]:
        """Returns the metadata of the card: `metadata`, tags, metrics, and the sparsity."""
        values = copy.deepcopy(self.metadata | self.given)
        values.setdefault("library_name", "transformers")
        kinds = ["pruned"] if self.is_dense else ["sparse", "pruned"]
        kinds += [] if self.shrunk is None else ["shrunk"]
        values["tags"] = list(dict.fromkeys([*_as_list(values.get("tags")), *kinds, *self.patterns]))
        results = self._eval_results()
        if results:
            names = [*_as_list(values.get("metrics")), *(result.metric_type for result in results)]
            values |= {"metrics": list(dict.fromkeys(names)), "model_name": self.model_name, "eval_results": results}
            values.pop("model-index", None)
        metadata = ModelCardData(**values).to_dict()
        if not any(index["results"] for index in metadata.get("model-index", ())):
            metadata.pop("model-index", None)
        return metadata | {"sparsity": self._sparsity_metadata()}

    def _sparsity_metadata(self) -> dict[str, Any]:
        report = self.report
        values: dict[str, Any] = {
            "selected": round(report.sparsity, 6),
            "selected_zeros": report.zeros,
            "selected_weights": report.selected,
            "parameters": round(report.parameter_sparsity, 6),
            "parameter_zeros": report.parameter_zeros,
            "parameter_count": report.parameters,
            "pattern": _unwrap_single(self.patterns),
        }
        for name in ("criterion", "scope", "solver", "swaps", "permute"):
            values[name] = _unwrap_single(list(dict.fromkeys(row[name] for row in self.settings if row.get(name))))
        if values["solver"] == DEFAULT_SOLVER:
            del values["solver"]
        if self.shrunk is not None:
            values["parameter_count_before"] = self.shrunk.parameters[0]
        return {name: value for name, value in values.items() if value is not None} | {"library": "hf_sparse"}

    def _eval_results(self) -> list[EvalResult]:
        """Returns the metrics in the Hub's form; none if the task or the data set is unknown."""
        if self.task is None or self.dataset is None:
            return []
        results = []
        for name, value in select_metrics(self.metrics).items():
            split, _, metric = name.partition("_")
            split, metric = (split, metric) if split in _SPLITS else ("eval", name)
            if metric == "loss" or not math.isfinite(value):
                continue
            result = EvalResult(
                task_type=self.task,
                dataset_type=self.dataset["type"],
                dataset_name=self.dataset["name"],
                dataset_config=self.dataset.get("config"),
                dataset_split="test" if split == "test" else self.dataset.get("split"),
                dataset_args=self.dataset.get("args"),
                metric_type=metric,
                metric_value=value,
                metric_name=_METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize()),
            )
            results.append(result)
        return results


_STORED_FIELDS = tuple(item.name for item in fields(SparsityCard) if item.name not in ("report", "config", "shrunk"))


def _is_valid_field(name: str, value: Any) -> bool:
    """Whether a value that was read from a file can be that of the field `name`."""
    if not _is_instance(value, typing.get_type_hints(SparsityCard)[name]):
        return False
    if name == "settings":
        return all(map(_is_setting, value))
    if name == "dataset" and value is not None:
        return isinstance(value.get("type"), str) and isinstance(value.get("name"), str)
    if name == "latency":
        return value is None or is_latency(value)
    if name == "written":
        return all(isinstance(part, dict) for part in value.values())
    return True


def _is_instance(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has a type; the values of mappings are not looked at."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, UnionType):
        return any(_is_instance(value, kind) for kind in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_is_instance(item, typing.get_args(hint)[0]) for item in value)
    return isinstance(value, origin) and (origin is bool or not isinstance(value, bool))


def _is_setting(group: dict[str, Any]) -> bool:
    """Whether the values of a group are as `ResolvedGroup.to_dict` gives them."""
    texts = [value for name, value in group.items() if name != "target" and not name.endswith("_kwargs")]
    options = [value for name, value in group.items() if name.endswith("_kwargs")]
    target = group.get("target")
    return (
        all(value is None or isinstance(value, str) for value in texts)
        and all(isinstance(value, dict) for value in options)
        and (target is None or (isinstance(target, (int, float)) and 0 <= target <= 1))
    )


def select_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics among the values that `evaluate` and `predict` return, as Python numbers.

    Example:
        >>> select_metrics({"eval_accuracy": 0.5, "eval_runtime": 3.1, "epoch": 2.0, "train_loss": 0.1})
        {'eval_accuracy': 0.5}
    """
    return {
        name: int(value) if isinstance(value, Integral) else float(value)
        for name, value in values.items()
        if isinstance(value, Real) and not isinstance(value, bool)
        if not name.startswith("train_") and not name.endswith(_NOT_METRICS)
    }


def _read_training_files(directory: Path) -> dict[str, Any]:
    """Returns the fields of a card that can be read from the files of Trainer and transformers."""
    results, state, config = (
        read_json(directory / name) if (directory / name).is_file() else {}
        for name in ("all_results.json", "trainer_state.json", "config.json")
    )
    architectures = config.get("architectures") or [None]
    return {
        "metrics": select_metrics(results),
        "max_steps": state.get("max_steps"),
        "step": state.get("global_step"),
        "auto_class": auto_class(architectures[0]),
    }


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _unwrap_single(values: list[str]) -> list[str] | str | None:
    return values[0] if len(values) == 1 else values or None
