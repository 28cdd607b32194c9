"""The output folder of a one-shot run: a plain checkpoint, with report, results and model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..config import OneshotConfig
from ..engine.resolve import resolve_layers
from ..files import LAYERS_PLOT_FILE, ONESHOT_RESULTS_FILE, write_json
from ..hub.card import SparsityCard, auto_class, write_card
from ..hub.card.command import command_line
from ..reporting.plots import plot_layers
from ..reporting.report import SparsityReport


# The Hub's name of the task of each Auto class.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForTokenClassification": "token-classification",
}


@dataclass
class OneshotResult:
    """The results of a one-shot run.

    Args:
        name: of the pruned model.
        base_model: folder or Hub name of the dense model.
        report: zeros of the weights.
        config: the options of the run.
        calibration: data, split, samples, unit, length, seed and tokens; empty without calibration data.
        dataset: Hub name of the calibration data, if they come from there.
        eval_dataset: Hub name of the evaluation data, if they come from there.
        dense_metrics: metrics before pruning.
        sparse_metrics: metrics after pruning.
        world_size: the number of processes.
    """

    name: str
    base_model: str
    report: SparsityReport
    config: OneshotConfig
    calibration: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    eval_dataset: str | None = None
    dense_metrics: dict[str, float] = field(default_factory=dict)
    sparse_metrics: dict[str, float] = field(default_factory=dict)
    world_size: int = 1

    def save(self, folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
        """Writes checkpoint, tokenizer, report, config, results, figure and model card."""
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        results: dict[str, Any] = {"model": self.base_model, "calibration": self.calibration or None}
        results |= {f"dense_{name}": value for name, value in self.dense_metrics.items()}
        results |= {f"eval_{name}": value for name, value in self.sparse_metrics.items()}
        write_json(folder / ONESHOT_RESULTS_FILE, results)
        plot_layers(folder / LAYERS_PLOT_FILE, self.report)
        write_card(folder, self._card(model))

    def _card(self, model: PreTrainedModel) -> SparsityCard:
        model_class = auto_class(type(model).__name__)
        task = _TASKS.get(model_class or "")
        metadata: dict[str, Any] = {"base_model": self.base_model}
        if self.dataset:
            metadata["datasets"] = [self.dataset]
        if task:
            metadata["pipeline_tag"] = task
        has_eval_dataset = self.eval_dataset and self.sparse_metrics
        return SparsityCard(
            model_name=self.name,
            report=self.report,
            config=self.config.to_dict(),
            metadata=metadata,
            task=task,
            dataset={"type": self.eval_dataset, "name": self.eval_dataset} if has_eval_dataset else None,
            dense_metrics=_card_metrics(self.dense_metrics),
            metrics=_card_metrics(self.sparse_metrics),
            calibration=format_calibration(self.calibration) if self.calibration else None,
            settings=[group.to_dict() for group in resolve_layers(model, self.config, observes_inputs=True)[0]],
            processes=self.world_size,
            command=command_line(),
            auto_class=model_class,
            oneshot=True,
        )


def format_calibration(calibration: dict[str, Any]) -> str:
    """Returns a description of calibration data.

    Example:
        >>> format_calibration(
        ...     {"samples": 2, "unit": "blocks", "length": 8, "data": "a.txt", "seed": 0, "tokens": 16}
        ... )
        '2 blocks of 8 tokens from a.txt, 16 tokens in total, seed 0'
    """
    at_most = "at most " if calibration["unit"] == "rows" else ""
    return "{samples} {unit} of {at_most}{length} tokens from {data}, {tokens:,} tokens in total, seed {seed}".format(
        at_most=at_most, **calibration
    )


def _card_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics as Trainer names them, without the size of the data."""
    return {f"eval_{name}": value for name, value in metrics.items() if name not in ("tokens", "samples")}
