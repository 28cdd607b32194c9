"""SparsityCard: all that a model card is made from."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ... import files as storage
from ...config import OneshotConfig, PruningConfig, ResolvedGroup, upgrade_options
from ...config.base import PruningOptions
from ...files import CARD_FILE, CONFIG_FILE, REPORT_FILE, write_json
from ...reporting.report import SparsityReport
from ..model_classes import auto_class
from .escaping import remove_secrets


# What `evaluate` returns beside measurements, by the end of its name.
_NO_MEASUREMENTS = ("runtime", "per_second", "samples", "time", "epoch", "step")
_SPLITS = ("eval", "test")


def _version() -> str:
    return importlib.import_module("hf_sparse").__version__


@dataclass
class SparsityCard:
    """All that a model card is made from. It is stored in three files: report, config, and the rest.

    Args:
        model_name: any text.
        report: how much is zero, counted in the weights.
        config: the options of pruning, as `PruningConfig.to_dict` or `OneshotConfig.to_dict` gives them.
        metadata: given by the user: what else the Hub is to know, under its own names (base_model, datasets, language,
            license, ...). See `huggingface_hub.ModelCardData`.
        task: given: what the metrics are of, as the Hub calls it ("text-classification"), for the results in the
            metadata.
        dataset: given: what they were measured on: `type` and `name`, and where known `config`, `split`, `args`.
        dense_metrics: given: the same measurements of the dense model.
        calibration: given: the data that one-shot pruning looked at, in words.
        repo_id: given: where the model is or will be on the Hub.
        settings: filled while pruning: for each group what `describe` says. Left out: as the config says.
        metrics: filled: measurements of the weights as they are, under the names that `Trainer.evaluate` gives them.
        oneshot: filled: whether it was pruned without training.
        max_steps: filled: optimizer steps of the training; None when that is not known.
        processes: filled: how many pruned together.
        command: filled: how to start the same again; None when no command did it.
        auto_class: filled: the class of transformers whose `from_pretrained` opens the model; None when it has none.
        adapter: filled: whether what is saved is an adapter of PEFT, without the weights that were pruned.
        version: filled: of hf_sparse.
        written: kept from one writing to the next: what was written last, so that a person's edits can be told.

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
    task: str | None = None
    dataset: dict[str, Any] | None = None
    dense_metrics: dict[str, float] = field(default_factory=dict)
    calibration: str | None = None
    repo_id: str | None = None

    settings: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    oneshot: bool = False
    max_steps: int | None = None
    processes: int = 1
    command: str | None = None
    auto_class: str | None = None
    adapter: bool = False
    version: str = field(default_factory=_version)

    written: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not all(map(_is_on_the_hub, _listed(self.metadata.get("base_model")))):
            # A folder: the Hub refuses a card that names one, and it is nobody's business.
            self.metadata = {name: value for name, value in self.metadata.items() if name != "base_model"}
        kind = OneshotConfig if self.oneshot else PruningConfig
        # An earlier version may have had fewer options, and others.
        self.config = kind().to_dict() | kind.accepted_options(upgrade_options(self.config))
        if not self.settings:
            self.settings = describe(kind.from_dict(self.config).resolve_groups().values())

    # Files

    def save(self, directory: str | Path, secrets: Iterable[str | None] = ()) -> None:
        """Write report, config and the rest to their files, less the secrets."""
        directory = Path(directory)
        self.report.save(directory / REPORT_FILE)
        write_json(directory / CONFIG_FILE, self.config)
        stored = json.dumps({name: getattr(self, name) for name in _STORED}, ensure_ascii=False)
        write_json(directory / CARD_FILE, json.loads(remove_secrets(stored, secrets)))

    @classmethod
    def load(cls, directory: str | Path) -> SparsityCard:
        """What `save` wrote. Of a folder that has report and config only, a card without what is not known.

        Raises:
            FileNotFoundError: the report or the config is missing.
            ValueError: a file is damaged.
        """
        directory = Path(directory)
        report, config = (read_card_file(directory / name) for name in (REPORT_FILE, CONFIG_FILE))
        stored = read_card_file(directory / CARD_FILE) if (directory / CARD_FILE).is_file() else {}
        if not stored:
            stored = _found_beside(directory) | {
                "oneshot": bool(config.keys() & (set(OneshotConfig.run_options) - set(PruningOptions.run_options)))
            }
        try:
            values = {"model_name": directory.resolve().name}
            values |= {name: stored[name] for name in _STORED if name in stored}
            wrong = [name for name, value in values.items() if not _fits(name, value)]
            if wrong or "pattern" not in config:
                raise ValueError(f"{wrong or CONFIG_FILE} cannot be")
            return cls(report=SparsityReport.from_dict(report), config=config, **values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the pruning files in {directory} are damaged: {error!r}.") from error

    # Metadata

    @property
    def patterns(self) -> list[str]:
        """Of the selected weights, each once."""
        return list(dict.fromkeys(layer.pattern for layer in self.report.layers))

    def hub_metadata(self) -> dict[str, Any]:
        """The metadata for the head of the card: what was given, and what is known of sparsity and results."""
        values = copy.deepcopy(self.metadata)
        values.setdefault("library_name", "transformers")
        values["tags"] = list(dict.fromkeys([*_listed(values.get("tags")), "sparse", "pruned", *self.patterns]))
        results = self._results()
        if results:
            names = [*_listed(values.get("metrics")), *(result.metric_type for result in results)]
            values |= {"metrics": list(dict.fromkeys(names)), "model_name": self.model_name, "eval_results": results}
            values.pop("model-index", None)
        metadata = ModelCardData(**values).to_dict()
        if not any(index["results"] for index in metadata.get("model-index", ())):
            metadata.pop("model-index", None)
        return metadata | {"sparsity": self._figures()}

    def _figures(self) -> dict[str, Any]:
        report = self.report
        figures = {
            "selected": round(report.sparsity, 6),
            "selected_zeros": report.zeros,
            "selected_weights": report.selected,
            "parameters": round(report.parameter_sparsity, 6),
            "parameter_zeros": report.parameter_zeros,
            "parameter_count": report.parameters,
            "pattern": _one_or_all(self.patterns),
        }
        for name in ("criterion", "scope", "solver"):
            figures[name] = _one_or_all(list(dict.fromkeys(row[name] for row in self.settings if row.get(name))))
        if figures.get("solver") == "none":
            del figures["solver"]  # which changes nothing
        return {name: value for name, value in figures.items() if value is not None} | {"library": "hf_sparse"}

    def _results(self) -> list[EvalResult]:
        """The metrics as the Hub lists them, where it is known what they were measured on."""
        if self.task is None or self.dataset is None:
            return []
        results = []
        for name, value in measurements(self.metrics).items():
            split, _, metric = name.partition("_")
            split, metric = (split, metric) if split in _SPLITS else ("eval", name)
            if metric == "loss":
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
                metric_name=metric.replace("_", " ").capitalize(),
            )
            results.append(result)
        return results


_APART = ("report", "config")
_TYPES = {option.name: str(option.type) for option in fields(SparsityCard) if option.name not in _APART}
_STORED = tuple(_TYPES)


def _fits(name: str, value: Any) -> bool:
    """Whether a value that was read from a file can be that field's."""
    kinds = {"str": str, "int": int, "bool": bool, "dict": dict, "list": list}
    kind = kinds[_TYPES[name].split(" |")[0].split("[")[0]]
    return isinstance(value, kind) or (value is None and _TYPES[name].endswith("None"))


def describe(groups: Iterable[ResolvedGroup]) -> list[dict[str, Any]]:
    """Returns the resolved options of each group as JSON values."""
    return [group.to_dict() for group in groups]


def measurements(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of what `evaluate` and `predict` return, the measurements.

    Example:
        >>> measurements({"eval_accuracy": 0.5, "eval_runtime": 3.1, "epoch": 2.0, "train_loss": 0.1})
        {'eval_accuracy': 0.5}
    """
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Real) and not isinstance(value, bool):
            if not name.startswith("train_") and not name.endswith(_NO_MEASUREMENTS):
                found[name] = int(value) if isinstance(value, Integral) else float(value)  # numpy's too
    return found


def _found_beside(directory: Path) -> dict[str, Any]:
    """What the files of Trainer and transformers tell about a model that has no card yet."""
    found: dict[str, Any] = {}
    if (directory / "all_results.json").is_file():
        found["metrics"] = measurements(read_card_file(directory / "all_results.json"))
    if (directory / "trainer_state.json").is_file():
        found["max_steps"] = read_card_file(directory / "trainer_state.json").get("max_steps")
    if (directory / "config.json").is_file():
        architectures = read_card_file(directory / "config.json").get("architectures") or [None]
        found["auto_class"] = auto_class(architectures[0])
    return found


def read_card_file(path: str | Path) -> dict[str, Any]:
    """The values of one of the files that a card is made from."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a card is made from the files that pruning writes beside the weights, "
            f"{REPORT_FILE} and {CONFIG_FILE}."
        )
    return storage.read_json(path)


def _is_on_the_hub(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def _listed(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _one_or_all(values: list) -> Any:
    return values[0] if len(values) == 1 else values or None
