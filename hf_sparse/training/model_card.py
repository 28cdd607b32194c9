"""The model card that a trainer writes: Trainer's own, with a section on sparsity."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..config import PruningConfig
from ..config.distillation import published_options
from ..engine.pruner import Pruner
from ..files import CARD_FILE, README_FILE, REPORT_FILE
from ..hub.auto_classes import auto_class
from ..hub.card import (
    CardMetadata,
    CardVersion,
    SparsityCard,
    download_card,
    parse_card,
    recount_zeros,
    select_metrics,
    write_card,
)
from ..hub.card.command import command_line
from ..hub.card.escaping import escape
from ..inspection import InspectionError
from ..local_paths import is_local, is_path, published_name
from ..reporting.report import SparsityReport
from ..structured.plan import ShrinkPlan
from .tuning.tuner import Tuner


logger = logging.getLogger(__name__)

# Stands for a base model in a local folder while Trainer writes its card. No repository of the Hub can have this name.
_LOCAL_BASE_MODEL = "hf-sparse--local-base-model"
_LINK_TO_LOCAL_BASE_MODEL = re.compile(rf"\[[^\]]*\]\([^)]*{_LOCAL_BASE_MODEL}[^)]*\)")


class TrainerWithMetrics(Protocol):
    """What a card needs of a `SparseTrainer`."""

    args: TrainingArguments
    state: TrainerState
    model: Any
    accelerator: Any
    hub_model_id: str | None
    is_output_shrunk: bool
    tuner: Tuner | None
    dense_metrics: dict[str, float]
    saved_metrics: dict[str, float]


def write_trainer_card(
    trainer: TrainerWithMetrics,
    pruner: Pruner,
    create_model_card: Callable[..., None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Writes the model card of a trainer and adds the section on sparsity. What a person has changed in an earlier
    card, in the output folder or on the Hub, stays. The main rank alone calls this, so nothing in it may wait for
    other ranks.

    `create_model_card` is the trainer's own method, which writes the card without the section; `args` and `kwargs` are
    its arguments.
    """
    directory, token = Path(str(trainer.args.output_dir)), trainer.args.hub_token
    given, kwargs = split_metadata(inspect.signature(create_model_card), kwargs)
    arguments = _CardArguments.prepare(
        create_model_card, args, kwargs, directory.resolve().name, _loaded_from(trainer)
    )
    arguments.name_given(given)
    local = CardVersion.read(directory / README_FILE, directory / CARD_FILE)
    remote = None
    if trainer.hub_model_id:
        remote = download_card(trainer.hub_model_id, token, getattr(trainer.args, "hub_revision", None))
    edited = [version for version in (remote, local) if version is not None and version.is_generated]
    given_tags = _as_list(arguments.bound.arguments.get("tags"))
    try:
        with _unnamed_model_has_no_base(trainer.model):
            create_model_card(*arguments.bound.args, **arguments.bound.kwargs)
        outer = parse_card((directory / README_FILE).read_text(encoding="utf-8"))
        outer.text = arguments.name_local_base_model(outer.text)
        metadata = arguments.original_metadata(outer.data.to_dict())
        # Trainer takes tags over from the card that it finds, those of an earlier pattern among them.
        stale = set(_pattern_tags(local)) - set(given_tags)
        metadata["tags"] = [tag for tag in _as_list(metadata.get("tags")) if tag not in stale]
        card = _sparsity_card(trainer, pruner, arguments.model_name, metadata)
        write_card(directory, card, outer.content, edited, secrets=[token], given=given)
    except BaseException:
        if local is not None:  # a person's changes survive a failure
            (directory / README_FILE).write_text(local.text, encoding="utf-8")
        raise


def split_metadata(signature: inspect.Signature, kwargs: dict[str, Any]) -> tuple[CardMetadata, dict[str, Any]]:
    """Returns the metadata among the arguments of `create_model_card`, and those of the arguments that the method of
    this signature, the trainer's own, takes."""
    given = {item.name: kwargs[item.name] for item in fields(CardMetadata) if item.name in kwargs}
    passed_on = {name: value for name, value in kwargs.items() if name not in given or name in signature.parameters}
    return CardMetadata(**given), passed_on


def card_signature(create_model_card: Callable[..., None]) -> inspect.Signature:
    """Returns the signature of a trainer's `create_model_card`, with the fields of `CardMetadata` that it lacks."""
    signature = inspect.signature(create_model_card)
    own = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=item.type)
        for item in fields(CardMetadata)
        if item.name not in signature.parameters
    ]
    return signature.replace(parameters=[*signature.parameters.values(), *own])


def _loaded_from(trainer: TrainerWithMetrics) -> str | None:
    """Returns what the model was loaded from, if that is a local file or folder: Trainer would call such a model
    trained from scratch, or link a path that does not exist any more."""
    name = getattr(trainer.model.config, "name_or_path", None) if hasattr(trainer.model, "config") else None
    return name if isinstance(name, str) and name and is_local(name) else None


@dataclass
class _CardArguments:
    """The arguments of `create_model_card` as they are passed on: names are escaped for Markdown, and a base model in
    a local folder is replaced by a placeholder, since its path must not be published.

    Args:
        bound: the arguments to pass on.
        model_name: not escaped.
        originals: escaped name -> name.
        local_base_model: folder name of the base model, if that is in a local folder.
        local_datasets: folder names of data sets in local folders.
    """

    bound: inspect.BoundArguments
    model_name: str
    originals: dict[str, str]
    local_base_model: str | None = None
    local_datasets: tuple[str, ...] = ()

    @classmethod
    def prepare(
        cls,
        create_model_card: Callable[..., None],
        args: tuple,
        kwargs: dict[str, Any],
        default_name: str,
        loaded_from: str | None,
    ) -> _CardArguments:
        signature = inspect.signature(create_model_card)
        bound = signature.bind(*args, **kwargs)
        values = bound.arguments
        prepared = cls(bound, published_name(values.get("model_name") or default_name), {})
        if "model_name" in signature.parameters:
            values["model_name"] = prepared.model_name
        if isinstance(values.get("tags"), list):
            values["tags"] = list(values["tags"])  # Trainer appends to it
        tags = _as_list(values.get("dataset_tags"))
        prepared.local_datasets = tuple(published_name(name) for name in tags if is_local(name))
        if tags:
            values["dataset_tags"] = [published_name(name) for name in tags]
        for option in ("model_name", "dataset", "dataset_name"):
            names = [published_name(name) if is_path(name) else name for name in _as_list(values.get(option))]
            if names:
                prepared.originals |= {escape(name): name for name in names}
                values[option] = escape(names[0]) if isinstance(values[option], str) else list(map(escape, names))
        base = values.get("finetuned_from") or loaded_from
        if isinstance(base, str) and base and is_local(base) and "finetuned_from" in signature.parameters:
            prepared.local_base_model = published_name(base)
            values["finetuned_from"] = _LOCAL_BASE_MODEL
        return prepared

    def name_given(self, given: CardMetadata) -> None:
        """Lets the trainer's card name the base model that was given."""
        if isinstance(given.base_model, str) and "finetuned_from" in self.bound.signature.parameters:
            self.bound.arguments["finetuned_from"], self.local_base_model = given.base_model, None

    def name_local_base_model(self, text: str) -> str:
        """Replaces links to the placeholder, and the placeholder itself, by the name of the folder."""
        if self.local_base_model is None:
            return text
        if _LOCAL_BASE_MODEL not in text:
            logger.warning("The trainer's model card does not name its base model, %s.", self.local_base_model)
        name = f"{escape(self.local_base_model)} (a local folder)"
        return _LINK_TO_LOCAL_BASE_MODEL.sub(lambda _: name, text).replace(_LOCAL_BASE_MODEL, name)

    def original_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Undoes the escaping, and drops a base model that is not on the Hub."""
        if metadata.get("base_model") == _LOCAL_BASE_MODEL:
            del metadata["base_model"]
        if self.local_datasets and (datasets := _as_list(metadata.pop("datasets", None))):
            public = [name for name in datasets if name not in self.local_datasets]
            metadata |= {"datasets": public} if public else {}
        return _replace_strings(metadata, self.originals)


def _replace_strings(value: Any, replacements: dict[str, str]) -> Any:
    """Replaces strings in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _replace_strings(item, replacements) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_strings(item, replacements) for item in value]
    return replacements.get(value, value) if isinstance(value, str) else value


@contextmanager
def _unnamed_model_has_no_base(model: PreTrainedModel) -> Iterator[None]:
    """Trainer calls a model fine-tuned from its `name_or_path` unless that is a folder. A model that was made from a
    config has an empty one: within, it has that of a folder, so that the card says "trained from scratch"."""
    config = model.config
    is_unnamed = getattr(config, "name_or_path", None) == ""
    try:
        if is_unnamed:
            config.name_or_path = os.curdir
        yield
    finally:
        if is_unnamed:
            config.name_or_path = ""


def _pattern_tags(card: CardVersion | None) -> list[str]:
    """Returns the tags of pruning patterns that an earlier run wrote into a card."""
    metadata = card.base.get("metadata", {}) if card is not None else {}
    return _as_list(metadata.get("sparsity", {}).get("pattern"))


def _as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _sparsity_card(
    trainer: TrainerWithMetrics, pruner: Pruner, model_name: str, metadata: dict[str, Any]
) -> SparsityCard:
    model = trainer.accelerator.unwrap_model(trainer.model)
    results = [result for index in metadata.pop("model-index", ()) for result in index["results"]]
    task, dataset = (results[0]["task"]["type"], results[0]["dataset"]) if results else (None, None)
    is_adapter = hasattr(model, "peft_config")
    return SparsityCard(
        model_name=model_name,
        report=_current_report(trainer, pruner),
        config=published_options(PruningConfig.to_dict(pruner.config)),
        metadata=metadata,
        task=task,
        dataset=dataset,
        dense_metrics=select_metrics(trainer.dense_metrics),
        repo_id=trainer.hub_model_id,
        settings=[group.options.to_dict() for group in pruner.groups],
        metrics=_metrics_of_final_weights(trainer),
        max_steps=trainer.state.max_steps,
        step=_step_of_weights(trainer),
        processes=trainer.args.world_size,
        command=command_line(),
        auto_class=None if is_adapter else auto_class(type(model).__name__),
        adapter=is_adapter,
        tuned=None if trainer.tuner is None else trainer.tuner.description,
        shrunk=ShrinkPlan.load(str(trainer.args.output_dir)) if trainer.is_output_shrunk else None,
    )


def _current_report(trainer: TrainerWithMetrics, pruner: Pruner) -> SparsityReport:
    """Counts zeros in the weights of the model or, since with several ranks the other ones do not take part, in the
    saved files."""
    directory = Path(str(trainer.args.output_dir))
    if trainer.is_output_shrunk:
        return SparsityReport.load(directory / REPORT_FILE)
    if trainer.args.world_size == 1:
        return pruner.report()
    saved = SparsityReport.load(directory / REPORT_FILE)
    try:
        return recount_zeros(directory, saved)
    except InspectionError as error:
        logger.warning("The model card shows the sparsity in %s; zeros were not counted again: %s", REPORT_FILE, error)
        return saved


def _step_of_weights(trainer: TrainerWithMetrics) -> int:
    """Returns the last step, or the best one if its checkpoint was loaded at the end."""
    return (trainer.args.load_best_model_at_end and trainer.state.best_global_step) or trainer.state.global_step


def _metrics_of_final_weights(trainer: TrainerWithMetrics) -> dict[str, float]:
    """Returns the evaluation of the last step, or of the best step if its checkpoint was loaded at the end, updated
    with the metrics that the script saved."""
    step = _step_of_weights(trainer)
    metrics: dict[str, float] = {}
    for log in trainer.state.log_history:
        if log.get("step") == step:
            metrics |= {name: value for name, value in log.items() if name.startswith("eval_")}
    return select_metrics(metrics | trainer.saved_metrics)
