"""The values of the template of a card, as Markdown. Text of others is escaped here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from huggingface_hub.utils import yaml_dump

from ...algorithms import DEFAULT_ALGORITHM
from ...config import OneshotConfig, PruningConfig, Reconstruction
from ...config.distillation import SELF
from ...config.options import DEFAULT_SOLVER, METHODS
from ...files import LAYERS_PLOT_FILE, SCHEDULE_PLOT_FILE
from ...local_paths import published_name
from ...model.layers import DEFAULT_TARGETS
from ...patterns import Pattern, get_pattern
from ...reporting.report import SparsityReport
from ...reporting.tables import format_markdown_table, format_sparsity, without_empty_columns
from ...schedulers import CURVES, SCHEDULERS
from ...structured.plan import ShrinkPlan
from .data import SparsityCard, select_metrics
from .escaping import code_block, escape
from .latency import latency_table
from .merge import SECTION_END, SECTION_START


IMAGES = {
    SCHEDULE_PLOT_FILE: "Sparsity of the selected weights over the optimizer steps",
    LAYERS_PLOT_FILE: "Sparsity of each selected weight",
}

HETEROGENEOUS_NOTICE = (
    "**This model opens after `import hf_sparse`** (`pip install hf_sparse`), because its layers have sizes that its "
    "config cannot express. Without it, `from_pretrained` fails with an error."
)

_STORED_DENSE = "Zeros are stored like other values: the weight files are as large as those of the dense model."

# Columns of the settings table, with the values that are not worth a column.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "group": ("weights",),
    "pattern": (),
    "criterion": (),
    "scope": (),
    "allocation": (None, OneshotConfig.defaults["allocation"]),
    "swaps": (None, OneshotConfig.defaults["swaps"]),
    "solver": (None, DEFAULT_SOLVER),
    "permute": (None,),
    "penalty": (None,),
    "target": (),
}


def template_values(card: SparsityCard, images: Sequence[str]) -> dict[str, Any]:
    """Returns the values that template.md needs beside the metadata. `images` are the plots beside the card."""
    report = card.report
    totals = [
        ("selected weights", *format_sparsity(report.zeros, report.selected)),
        ("all parameters", *format_sparsity(report.parameter_zeros, report.parameters)),
    ]
    return {
        "title": escape(card.model_name),
        "introduction": introduction(card),
        "start": SECTION_START,
        "end": SECTION_END,
        "size": _size(card.shrunk) if card.shrunk is not None else None,
        "latency": latency_table(card.latency) if card.latency is not None else None,
        "is_sparse": not card.is_dense and bool(report.layers),
        "totals": format_markdown_table(("parameters", "zeros", "total", "sparsity"), totals, text_columns=1),
        "layer_count": len(report.layers),
        "settings": _settings_table(card.settings) if report.layers else None,
        "method": _method(card),
        "images": [
            {"text": text, "file": name}
            for name, text in IMAGES.items()
            if name in images and (card.shrunk is None or name != LAYERS_PLOT_FILE)  # of the model before
        ],
        "layers": _layer_table(report),
        "has_errors": _has_errors(report),
        "evaluation": _metric_table(card),
        "has_dense_metrics": bool(card.dense_metrics),
        "oneshot": card.oneshot,
        "loading": _loading(card),
        "fine_tuning": _fine_tuning(card),
        "version": escape(card.version),
        "processes": f", on {card.processes} processes" if card.processes > 1 else "",
        "command": code_block(card.command, "bash") if card.command else None,
        "options": _options(card),
        "limits": [*_limits(card)],
    }


def introduction(card: SparsityCard) -> str:
    """The first sentence of a card."""
    kind, base = "sparse" if card.shrunk is None else "smaller", name_base_model(card)
    of_what = f"version of {base}" if base else "model"
    sentence = f"A {kind} {of_what}, pruned with hf_sparse."
    return f"{HETEROGENEOUS_NOTICE}\n\n{sentence}" if card.is_heterogeneous else sentence


def name_base_model(card: SparsityCard) -> str | None:
    """The name of the base model in a text: a link to the Hub, or the name of a local folder; None if unknown."""
    if not card.base_model:
        return f"{escape(card.local_base_model)} (a local folder)" if card.local_base_model else None
    names = card.base_model if isinstance(card.base_model, list) else [card.base_model]
    return ", ".join(f"[{escape(name)}](https://huggingface.co/{name})" for name in names)


def _size(shrunk: ShrinkPlan) -> str:
    """What was removed, and the size before and after."""
    rows = []
    for name, (before, after), unit in (
        ("parameters", shrunk.parameters, 1),
        ("weights, MB", shrunk.num_bytes, 1e6),
    ):
        sizes = (f"{size / unit:,.1f}" if unit > 1 else f"{size:,}" for size in (before, after))
        rows.append((name, *sizes, f"{after / before:.1%}" if before else "-"))
    table = format_markdown_table(("", "before", "after", "ratio"), rows, text_columns=1)
    removed = (
        f"- {escape(change.field)}, from {change.before:,} to {change.after:,}: {escape(change.detail)}"
        for change in shrunk.changes
    )
    return "\n".join([table, "", "Removed:", "", *removed])


def _layer_table(report: SparsityReport) -> str:
    rows: list[tuple[str, ...]] = [("layer", "shape", "pattern", "zeros", "weights", "sparsity", "error", "note")]
    for layer in report.layers:
        shape, counts = "x".join(map(str, layer.shape)), format_sparsity(layer.zeros, layer.weights)
        error = "-" if layer.error is None else _format_number(layer.error)
        rows.append((escape(layer.name), shape, escape(layer.pattern), *counts, error, layer.note))
    header, *rows = without_empty_columns(rows, empty="-")
    return format_markdown_table(header, rows, text_columns=3)


def _has_errors(report: SparsityReport) -> bool:
    return any(layer.error is not None for layer in report.layers)


def _settings_table(groups: Sequence[dict[str, Any]]) -> str:
    """One row per parameter group, without columns in which all groups have the usual value."""
    header = [name for name, usual in _SETTINGS.items() if any(group.get(name) not in usual for group in groups)]
    rows = ([_format_setting(group, name) for name in header] for group in groups)
    return format_markdown_table(header, rows, text_columns=len(header))


def _format_setting(group: dict[str, Any], name: str) -> str:
    value, target = group.get(name), group.get("target")
    if name == "target":
        return f"{value:.2%}".replace(".00%", "%") if value else "existing zeros"
    if value is True:
        return "yes"
    if name == "criterion" and value is None and target:
        return "selected by the solver"
    options = group.get(f"{name}_kwargs") or {}
    kwargs = ", ".join(f"{option}={json.dumps(given)}" for option, given in options.items())
    return "-" if value is None else escape(f"{value} ({kwargs})" if kwargs else value)


def _method(card: SparsityCard) -> str:
    """How the model was pruned, in sentences."""
    config, sentences = card.config, []
    if card.oneshot:
        preset = f" Options that were not given are those of quality {config['quality']}." if config["quality"] else ""
        sentences.append(f"Pruned in one shot, without training.{preset}")
    elif any(group.get("target") for group in card.settings):
        sentences.append(_schedule(card))
    if config.get("rewind") is not None and not card.oneshot and _is_rewound(card):
        sentences.append(_rewinding(card))
    if config.get("keep_zeros"):
        sentences.append("Zeros that the selected weights had at the start were kept (keep_zeros).")
    if card.tuned:
        sentences.append(f"Tuned: {escape(card.tuned)}.")
    if (config.get("algorithm") or DEFAULT_ALGORITHM) != DEFAULT_ALGORITHM:
        sentences.append(f"Pruning algorithm: {_format_setting(config, 'algorithm')}.")
    if config.get("distill_teacher"):
        sentences.append(_distillation(config))
    if card.oneshot and config.get("reconstruct"):
        sentences.append(_reconstruction(config.get("reconstruct_kwargs") or {}))
    if card.calibration:
        sentences.append(f"Calibration data: {escape(card.calibration)}.")
    return " ".join([*sentences, *_plugins(card)])


def _distillation(config: Mapping[str, Any]) -> str:
    teacher = config["distill_teacher"]
    source = "the dense weights that the run started from" if teacher == SELF else escape(published_name(teacher))
    named = ((name, config.get(f"distill_{name}")) for name in ("alpha", "temperature", "hidden"))
    options = ", ".join(f"{name} {value:g}" for name, value in named if value is not None)
    return f"Distilled from {source} ({options})."


def _reconstruction(given: Mapping[str, Any]) -> str:
    options = {**asdict(Reconstruction()), **given}
    options = {name: "chosen" if value is None else value for name, value in options.items()}
    listed = escape(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in options.items()))
    return (
        "The remaining weights, biases and norms of each block were tuned to give the outputs of the dense model on "
        f"the calibration data (reconstruct: {listed})."
    )


def _schedule(card: SparsityCard) -> str:
    config = card.config
    names = list(dict.fromkeys(group["scheduler"] for group in card.settings if group.get("scheduler")))
    has_curve = any(name in SCHEDULERS and SCHEDULERS[name].has_curve for name in names)
    curve = f" ({config['sparsity_decay_type']} curve)" if has_curve else ""
    scheduler = f"Scheduler: {escape(', '.join(map(str, names)) + curve)}" if names else "Sparsity by the algorithm"
    if card.max_steps is None:
        return f"{scheduler}."
    schedule = card.schedule(card.max_steps)
    steps = f"{schedule.total} prune steps, after optimizer steps {schedule.start} to {schedule.end}"
    if schedule.total == 1:
        steps = f"one prune step, after optimizer step {schedule.end}"
    planned = f"{scheduler}, {steps} of {card.max_steps}."
    if card.step is None or card.step >= card.max_steps:
        return planned
    done = f"{schedule.done(card.step)} of {schedule.total} prune steps"
    return f"{planned} These weights are those of optimizer step {card.step}, after {done}."


def _is_rewound(card: SparsityCard) -> bool:
    """Whether the weights are from after the last prune step, at which training is rewound."""
    if card.step is None or card.max_steps is None:
        return True
    return card.step >= card.schedule(card.max_steps).end


def _rewinding(card: SparsityCard) -> str:
    where = f"option rewind {card.config['rewind']}"
    if card.max_steps is not None:
        where = f"optimizer step {card.schedule(card.max_steps).rewind}"
    what = "weights and learning rate" if card.config.get("rewind_weights") else "learning rate"
    return f"Rewound after the last prune step to the {what} of {where}."


def _plugins(card: SparsityCard) -> Iterator[str]:
    """Names the loaded plug-ins if the run used methods that hf_sparse does not have."""
    methods = [f'pattern "{text}"' for text in card.patterns if not _is_built_in(_find_pattern(text))]
    curve = {"curve": card.config.get("sparsity_decay_type")}
    for family, registry in {**METHODS, "scheduler": SCHEDULERS, "curve": CURVES}.items():
        for name in dict.fromkeys({**group, **curve}.get(family) for group in card.settings):
            if name is not None and not (name in registry and _is_built_in(registry[name])):
                methods.append(f'{family} "{name}"')
    if card.plugins and methods:
        files = ", ".join(f'"{name}"' for name in card.plugins)
        plugins, registers = ("plug-in", "registers") if len(card.plugins) == 1 else ("plug-ins", "register")
        needed = f"the {plugins} {files}, which {registers} {', '.join(methods)}"
        yield escape(f"Pruning it again needs {needed}; loading it does not.")


def _is_built_in(method: object) -> bool:
    """Whether a method or its class is one of hf_sparse, not of a plug-in."""
    return getattr(method, "__module__", "").startswith(f"{__name__.partition('.')[0]}.")


def _find_pattern(text: str) -> Pattern | None:
    try:
        return get_pattern(text)
    except ValueError:  # registered by a plug-in that is not loaded now
        return None


def _metric_table(card: SparsityCard) -> str:
    sparse, dense = select_metrics(card.metrics), select_metrics(card.dense_metrics)
    if not sparse:
        return ""
    column = "sparse" if card.shrunk is None else "smaller"
    if not dense:
        rows = ([escape(name), _format_number(value)] for name, value in sparse.items())
        return format_markdown_table(("metric", column), rows, text_columns=1)
    rows = (
        [escape(name), _format_number(dense[name]), _format_number(value), f"{value - dense[name]:+.4f}"]
        if name in dense
        else [escape(name), "-", _format_number(value), "-"]
        for name, value in sparse.items()
    )
    return format_markdown_table(("metric", "dense", column, "difference"), rows, text_columns=1)


def _format_number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _loading(card: SparsityCard) -> str:
    if card.adapter:
        return "The saved files are a PEFT adapter. The zeros are in the weights of its base model."
    if card.auto_class is None:
        return "Load it with the model class that it was trained with; hf_sparse is not needed."
    name = card.auto_class
    path = json.dumps(card.repo_id or f"path/to/{card.model_name}", ensure_ascii=False)
    if card.is_heterogeneous:
        code = f"import hf_sparse\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained({path})"
    else:
        code = f"from transformers import {name}\n\nmodel = {name}.from_pretrained({path})  # no hf_sparse needed"
    return code_block(code, "python")


def _fine_tuning(card: SparsityCard) -> str:
    default, groups = card.config.get("targets") or DEFAULT_TARGETS, card.config.get("groups") or {"weights": {}}
    targets = list(dict.fromkeys(target for group in groups.values() for target in group.get("targets") or default))
    options = {"targets": None if targets == list(DEFAULT_TARGETS) else targets, "exclude": card.config.get("exclude")}
    arguments = "".join(f", {name}={json.dumps(value)}" for name, value in options.items() if value)
    code = (
        "from hf_sparse import SparseTrainer, SparseTrainingArguments\n\n"
        f'args = SparseTrainingArguments(output_dir="out", keep_zeros=True{arguments})\n'
        "SparseTrainer(model=model, args=args, train_dataset=train_dataset).train()"
    )
    return code_block(code, "python")


def _options(card: SparsityCard) -> str:
    """Returns a recipe file with the options that differ from their defaults."""
    config, defaults = card.config, (OneshotConfig if card.oneshot else PruningConfig)().to_dict()
    if card.oneshot and not any(getattr(_find_pattern(text), "coupled_kind", None) for text in card.patterns):
        # What leaving it out means here. Version 0.1.0 wrote it into every file.
        defaults["forwards"] = config.get("forwards") if config.get("forwards") == 2 else None
    given = {name: value for name, value in config.items() if name not in defaults or value != defaults[name]}
    return code_block(yaml_dump(given, sort_keys=False) if given else "{}", "yaml")


def _limits(card: SparsityCard) -> Iterator[str]:
    """Yields the notes on speed and size: of each pattern, and of what was removed; and on emptied layers."""
    if emptied := card.report.emptied:
        names = ", ".join(escape(layer.name) for layer in emptied)
        yield f"Less than 0.1% of the weights remain in {len(emptied)} of {len(card.report.layers)} layers: {names}."
    if card.shrunk is not None:
        for reason in card.shrunk.kept:
            yield f"Zero, but not removed: {escape(reason)}"
        if card.latency is None:
            yield (
                "The speed of this model was not measured: `hf-sparse bench DENSE THIS --json > bench.json` measures "
                "it, and `hf-sparse card THIS --benchmark bench.json` adds it here."
            )
        if not card.report.zeros:
            return
    for text in card.patterns:
        pattern = _find_pattern(text)
        if card.shrunk is not None and getattr(pattern, "coupled_kind", None) is not None:
            continue
        yield (
            getattr(pattern, "deployment_note", None)
            or f"No kernels for pattern {escape(text)} are known: no speed-up is claimed."
        )
    yield _STORED_DENSE if card.shrunk is None else "The zeros that are left are stored like other values."
