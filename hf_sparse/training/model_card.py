"""The model card that a trainer writes: Trainer's own, with a section on sparsity."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import CARD_FILE, README_FILE, REPORT_FILE
from ..hub.card import (
    CardVersion,
    SparsityCard,
    auto_class,
    download_card,
    parse_card,
    recount_zeros,
    select_metrics,
    write_card,
)
from ..hub.card.command import command_line
from ..hub.card.escaping import escape
from ..inspection import InspectionError
from ..reporting.report import SparsityReport


logger = logging.getLogger(__name__)


def write_trainer_card(trainer: Any, create: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Have `create`, the trainer's own `create_model_card`, write its card, and write ours into it. What a person has
    changed in an earlier one stays, whether here or on the Hub. The main process alone does this, so nothing here may
    wait for the others.
    """
    directory, args_of_run = Path(trainer.args.output_dir), trainer.args
    name, given, escaped = _escape_given(trainer, create, args, kwargs)
    tags = _listed(given.arguments.get("tags"))
    here = CardVersion.read(directory / README_FILE, directory / CARD_FILE)
    there = None
    if trainer.hub_model_id:
        there = download_card(trainer.hub_model_id, args_of_run.hub_token, getattr(args_of_run, "hub_revision", None))
    edited = [version for version in (there, here) if version is not None and version.is_ours]
    try:
        create(*given.args, **given.kwargs)
        outer = _with_true_base((directory / README_FILE).read_text(encoding="utf-8"), given.arguments)
        metadata = _restore(parse_card(outer).data.to_dict(), escaped)
        metadata["tags"] = [tag for tag in _listed(metadata.get("tags")) if tag in tags or tag not in _earlier(here)]
        write_card(directory, _fill(trainer, name, metadata), outer, edited, secrets=[args_of_run.hub_token])
    except BaseException:
        if here is not None:  # what a person wrote outlives this too
            (directory / README_FILE).write_text(here.text, encoding="utf-8")
        raise


def _earlier(here: CardVersion | None) -> list[str]:
    """Our tags of an earlier run, which Trainer takes over from the card that it finds."""
    metadata = here.base.get("metadata", {}) if here is not None else {}
    return _listed(metadata.get("sparsity", {}).get("pattern"))


def _listed(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _fill(trainer: Any, name: str, metadata: dict[str, Any]) -> SparsityCard:
    """What the trainer knows."""
    callback, model = trainer.sparsity, trainer.accelerator.unwrap_model(trainer.model)
    results = [result for index in metadata.pop("model-index", ()) for result in index["results"]]
    measured = results[0] if results else {"task": {"type": None}, "dataset": None}
    adapter = hasattr(model, "peft_config")
    return SparsityCard(
        model_name=name,
        report=_report(trainer),
        config=callback.config_as_run().to_dict(),
        metadata=metadata,
        task=measured["task"]["type"],
        dataset=measured["dataset"],
        dense_metrics=select_metrics(trainer.dense_metrics),
        repo_id=trainer.hub_model_id,
        settings=[group.options.to_dict() for group in callback.pruner.groups],
        metrics=_metrics(trainer),
        max_steps=trainer.state.max_steps,
        processes=trainer.args.world_size,
        command=command_line(),
        auto_class=None if adapter else auto_class(type(model).__name__),
        adapter=adapter,
    )


def _report(trainer: Any) -> SparsityReport:
    """Counted in the weights: those of the model, or where several processes hold it, which the others are not here
    for, those of the saved files."""
    if trainer.args.world_size == 1:
        return trainer.sparsity.pruner.report()
    directory = Path(trainer.args.output_dir)
    stored = SparsityReport.load(directory / REPORT_FILE)
    try:
        return recount_zeros(directory, stored)
    except InspectionError as error:
        logger.warning("the zeros are counted as in %s: %s", REPORT_FILE, error)
        return stored


def _metrics(trainer: Any) -> dict[str, float]:
    """Of the weights as they are: no evaluation from before the last step counts, or the best one's when that was
    loaded. What the script saved under its own names comes last."""
    state = trainer.state
    best = trainer.args.load_best_model_at_end and state.best_global_step
    step = best or state.global_step
    found: dict[str, float] = {}
    for log in state.log_history:
        if log.get("step") == step:
            found |= {name: value for name, value in log.items() if name.startswith("eval_")}
    return select_metrics(found | trainer.saved_metrics)


def _escape_given(trainer: Any, create: Callable, args: tuple, kwargs: dict[str, Any]):
    """The arguments of `create` with names escaped, for the text; and what they were, for the metadata."""
    given = inspect.signature(create).bind(*args, **kwargs)
    known = inspect.signature(create).parameters
    name = given.arguments.get("model_name") or Path(trainer.args.output_dir).resolve().name
    if "model_name" in known:
        given.arguments["model_name"] = name
    if isinstance(given.arguments.get("tags"), list):
        given.arguments["tags"] = list(given.arguments["tags"])  # Trainer adds to it
    escaped = {}
    for option in ("model_name", "dataset", "dataset_name"):
        value = given.arguments.get(option)
        if value is not None:
            names = [value] if isinstance(value, str) else list(value)
            escaped |= {escape(one): one for one in names}
            given.arguments[option] = escape(value) if isinstance(value, str) else [escape(one) for one in names]
    return name, given, escaped


def _restore(value: Any, escaped: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _restore(item, escaped) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, escaped) for item in value]
    return escaped.get(value, value) if isinstance(value, str) else value


def _with_true_base(text: str, given: dict[str, Any]) -> str:
    """A folder is no page of the Hub: it gets no link, and its place on this machine is nobody's business. And what
    has no name at all was not fine-tuned from it."""
    base = given.get("finetuned_from")
    if isinstance(base, str) and base and Path(base).is_dir():
        link = f"[{base}](https://huggingface.co/{base})"
        return text.replace(link, f"{escape(Path(base).resolve().name)} (a local folder)")
    return text.replace(
        "This model is a fine-tuned version of [](https://huggingface.co/) on", "This model was trained on"
    )
