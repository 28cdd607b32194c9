"""The folder of a model that was pruned one-shot: a plain checkpoint, and what there is to say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config import OneshotConfig
from ..engine.resolve import resolve_layers
from ..files import LAYERS_PLOT_FILE, ONESHOT_RESULTS_FILE, write_json
from ..hub.card import SparsityCard, auto_class, write_card
from ..hub.card.command import command_line
from ..reporting.plots import plot_layers
from ..reporting.report import SparsityReport


# What the Hub calls the task of a model, by its Auto class.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForTokenClassification": "token-classification",
}


@dataclass
class OneshotResult:
    """What a run found out.

    Args:
        name: of the model that comes out.
        base_model: that went in, folder or Hub name.
        report: zeros in the weights.
        config: of the run.
        calibration: data, split, samples, unit, length, seed and tokens; empty where nothing was looked at.
        dataset: Hub name of the calibration data, if they are from there.
        measured_on: the same of the data that was measured on.
        dense: measurements before pruning.
        sparse: the same after.
        processes: how many pruned together.
    """

    name: str
    base_model: str
    report: SparsityReport
    config: OneshotConfig
    calibration: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    measured_on: str | None = None
    dense: dict[str, float] = field(default_factory=dict)
    sparse: dict[str, float] = field(default_factory=dict)
    processes: int = 1

    def save(self, folder: Path, model: nn.Module, tokenizer: Any) -> None:
        """Write checkpoint, tokenizer, report, config, results, a figure and the card."""
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        results = {"model": self.base_model, "calibration": self.calibration or None}
        results |= _named("dense", self.dense) | _named("eval", self.sparse)
        write_json(folder / ONESHOT_RESULTS_FILE, results)
        plot_layers(folder / LAYERS_PLOT_FILE, self.report)
        write_card(folder, self._card(model))

    def _card(self, model: nn.Module) -> SparsityCard:
        opener = auto_class(type(model).__name__)
        task = _TASKS.get(opener)
        metadata = {"base_model": self.base_model} | ({"datasets": [self.dataset]} if self.dataset else {})
        return SparsityCard(
            model_name=self.name,
            report=self.report,
            config=self.config.to_dict(),
            metadata=metadata | ({"pipeline_tag": task} if task else {}),
            task=task,
            dataset={"type": self.measured_on, "name": self.measured_on} if self.measured_on and self.sparse else None,
            dense_metrics=_named("eval", _measured(self.dense)),
            metrics=_named("eval", _measured(self.sparse)),
            calibration=told(self.calibration) if self.calibration else None,
            settings=[group.to_dict() for group in resolve_layers(model, self.config, observes_inputs=True)[0]],
            processes=self.processes,
            command=command_line(),
            auto_class=opener,
            oneshot=True,
        )


def told(calibration: dict[str, Any]) -> str:
    """Calibration data in words.

    Example:
        >>> told({"samples": 2, "unit": "blocks", "length": 8, "data": "a.txt", "seed": 0, "tokens": 16})
        '2 blocks of 8 tokens out of a.txt, 16 tokens in all, seed 0'
    """
    most = "at most " if calibration["unit"] == "rows" else ""
    return "{samples} {unit} of {most}{length} tokens out of {data}, {tokens:,} tokens in all, seed {seed}".format(
        most=most, **calibration
    )


def _measured(metrics: dict[str, float]) -> dict[str, float]:
    """Less what they are of."""
    return {name: value for name, value in metrics.items() if name not in ("tokens", "samples")}


def _named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in metrics.items()}
