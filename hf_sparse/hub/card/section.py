"""The text of a card, piece by piece, for template.md. All that others wrote is escaped here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub.utils import yaml_dump

from ...config import OneshotConfig, PruningConfig
from ...files import LAYERS_PLOT_FILE, SCHEDULE_PLOT_FILE
from ...reporting.report import SparsityReport
from ...reporting.tables import format_markdown_table, format_sparsity
from ...schedulers import PruningSchedule
from .data import SparsityCard, measurements
from .escaping import code_block, escape
from .merge import SECTION_END, SECTION_START


IMAGES = {
    SCHEDULE_PLOT_FILE: "Sparsity of the selected weights over the optimizer steps",
    LAYERS_PLOT_FILE: "Sparsity of each selected weight",
}

# Forms of patterns, and what can be said for each of speed and size.
LIMITS = {
    r"unstructured": "Single weights are zero, anywhere. Dense kernels multiply by zeros: no speed-up is claimed, nor "
    "less memory. The zeros pay where files are compressed, or in a runtime with kernels for unstructured sparsity.",
    r"2:4": "Of every 4 weights along the inputs at most 2 are not zero. GPUs with sparse tensor cores (NVIDIA Ampere "
    "and newer) have kernels for that, which torch reaches by `torch.sparse.to_sparse_semi_structured`. As loaded "
    "above the weights are dense, and no speed was measured.",
    r"\d+:\d+": "Of every M weights along the inputs at most N are not zero ({pattern}). Sparse tensor cores of GPUs "
    "take 2:4: see whether yours take {pattern}. No speed was measured.",
    r"\d+x\d+": "Zeros come in blocks of outputs by inputs ({pattern}). Runtimes with block-sparse kernels of that "
    "shape can leave zero blocks out; the dense kernels of transformers multiply by them. No speed was measured.",
    r"channel": "Whole output rows are zero. They could be cut out for a smaller dense model; here they are still "
    "there, so size and speed are those of the dense model.",
    r"channel:in": "Whole input columns are zero. They could be cut out for a smaller dense model; here they are "
    "still there, so size and speed are those of the dense model.",
}
_STORED_DENSE = "Zeros are stored like other numbers: the weight files are as large as those of the dense model."


def template_values(card: SparsityCard, images: Sequence[str]) -> dict[str, Any]:
    """What template.md needs beside the metadata. `images` are the names of the figures that lie beside the card."""
    report = card.report
    totals = [
        ("selected weights", *format_sparsity(report.zeros, report.selected)),
        ("all parameters", *format_sparsity(report.parameter_zeros, report.parameters)),
    ]
    return {
        "title": escape(card.model_name),
        "introduction": _introduction(card),
        "start": SECTION_START,
        "end": SECTION_END,
        "totals": format_markdown_table(("of", "zeros", "count", "sparsity"), totals, text_columns=1),
        "layer_count": len(report.layers),
        "settings": _settings(card.settings),
        "how": _how(card),
        "images": [{"text": IMAGES[name], "file": name} for name in IMAGES if name in images],
        "layers": _layers(report),
        "measured": any(layer.error is not None for layer in report.layers),
        "evaluation": _evaluation(card),
        "compared": bool(card.dense_metrics),
        "oneshot": card.oneshot,
        "loading": _loading(card),
        "tuning": _tuning(card),
        "version": escape(card.version),
        "processes": f", on {card.processes} processes" if card.processes > 1 else "",
        "command": code_block(card.command, "bash") if card.command else None,
        "options": _options(card.config, card.oneshot),
        "limits": [*_limits(card.patterns), _STORED_DENSE],
    }


def _layers(report: SparsityReport) -> str:
    names = ["layer", "shape", "pattern", "zeros", "weights", "sparsity"]
    rows = [
        [escape(layer.name), "x".join(map(str, layer.shape)), escape(layer.pattern)]
        + [*format_sparsity(layer.zeros, layer.weights)]
        for layer in report.layers
    ]
    if any(layer.error is not None for layer in report.layers):
        names.append("error")
        for layer, row in zip(report.layers, rows, strict=True):
            row.append("-" if layer.error is None else _number(layer.error))
    return format_markdown_table(names, rows, text_columns=3)


def _introduction(card: SparsityCard) -> str:
    base = card.metadata.get("base_model")
    of = f", made of {escape(', '.join(base) if isinstance(base, list) else base)}" if base else ""
    return f"A model with zeros among its weights{of}: pruned with hf_sparse."


def _settings(rows: Sequence[dict[str, Any]]) -> str:
    """One row per group, less the columns that say nothing."""
    quiet = {"solver": (None, "none"), "allocation": (None, "uniform"), "group": ("weights",)}
    names = [
        name
        for name in ("group", "pattern", "criterion", "scope", "allocation", "solver", "target")
        if any(row.get(name) not in quiet.get(name, ()) for row in rows)
    ]
    cells = ([_setting(name, row.get(name)) for name in names] for row in rows)
    return format_markdown_table(names, cells, text_columns=len(names))


def _setting(name: str, value: Any) -> str:
    if name == "target":
        return f"{value:.2%}".replace(".00%", "%") if value else "the zeros it had"
    if name == "criterion" and value is None:
        return "the solver's own"
    return "-" if value is None else escape(value)


def _how(card: SparsityCard) -> str:
    config, words = card.config, []
    if card.oneshot:
        words.append("Pruned in one shot, without training.")
    elif any(row.get("target") for row in card.settings):
        words.append(_schedule(config, card.settings, card.max_steps))
    if config.get("keep_zeros"):
        words.append("The zeros that the selected weights started with were kept (keep_zeros).")
    if config.get("regrow"):
        words.append(f"Each prune step exchanged weights for pruned ones (regrow {config['regrow']}).")
    if card.calibration:
        words.append(f"What it looked at: {escape(card.calibration)}.")
    return " ".join(words)


def _schedule(config: dict[str, Any], settings: Sequence[dict[str, Any]], max_steps: int | None) -> str:
    start, end, every = (config[name] for name in ("prune_start", "prune_end", "prune_every"))
    name = settings[0].get("scheduler") or ("oneshot" if start == end else "iterative")
    curve = f" ({config['sparsity_decay_type']} curve)" if name == "iterative" else ""
    words = f"Scheduler: {escape(name + curve)}"
    if max_steps is None:
        return f"{words}."
    schedule = PruningSchedule.from_fractions(start, end, every, max_steps)
    if schedule.total == 1:
        return f"{words}, one prune step, after optimizer step {schedule.end} of {max_steps}."
    steps = f"{schedule.total} prune steps, after optimizer steps {schedule.start} to {schedule.end}"
    return f"{words}, {steps} of {max_steps}."


def _evaluation(card: SparsityCard) -> str:
    sparse, dense = measurements(card.metrics), measurements(card.dense_metrics)
    if not dense:
        rows = [(escape(name), _number(value)) for name, value in sparse.items()]
        return format_markdown_table(("metric", "sparse"), rows, text_columns=1) if rows else ""
    rows = []
    for name, value in sparse.items():
        known = name in dense
        difference = f"{value - dense[name]:+.4f}" if known else "-"
        rows.append((escape(name), _number(dense[name]) if known else "-", _number(value), difference))
    return format_markdown_table(("metric", "dense", "sparse", "difference"), rows, text_columns=1) if rows else ""


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _loading(card: SparsityCard) -> str:
    if card.adapter:
        return "What is saved here is an adapter of PEFT. The zeros are in the weights of its base model."
    if card.auto_class is None:
        return "Load it with the class that it was trained with; it needs no hf_sparse."
    name = card.auto_class
    where = json.dumps(card.repo_id or f"path/to/{card.model_name}", ensure_ascii=False)
    code = f"from transformers import {name}\n\nmodel = {name}.from_pretrained({where})  # no hf_sparse needed"
    return code_block(code, "python")


def _tuning(card: SparsityCard) -> str:
    options = {"targets": _all_of(card.config, "targets"), "exclude": card.config.get("exclude")}
    more = "".join(f", {name}={json.dumps(value)}" for name, value in options.items() if value)
    code = (
        "from hf_sparse import SparseTrainer, SparseTrainingArguments\n\n"
        f'args = SparseTrainingArguments(output_dir="out", keep_zeros=True{more})\n'
        "SparseTrainer(model=model, args=args, train_dataset=train_dataset).train()"
    )
    return code_block(code, "python")


def _all_of(config: dict[str, Any], name: str) -> list[str]:
    groups = config.get("groups") or {}
    values = [*(config.get(name) or ()), *(value for group in groups.values() for value in group.get(name) or ())]
    return list(dict.fromkeys(values))


def _options(config: dict[str, Any], oneshot: bool) -> str:
    """A recipe file."""
    defaults = (OneshotConfig if oneshot else PruningConfig)().to_dict()
    given = {name: value for name, value in config.items() if name not in defaults or value != defaults[name]}
    return code_block(yaml_dump(given, sort_keys=False) if given else "{}", "yaml")


def _limits(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        form = next((form for form in LIMITS if re.fullmatch(form, pattern)), None)
        if form is not None:
            yield LIMITS[form].format(pattern=pattern)
        else:
            yield f"No kernel is known that uses pattern {escape(pattern)}: no speed-up is claimed."
