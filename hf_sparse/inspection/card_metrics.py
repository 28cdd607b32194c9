"""The metrics that the files beside a checkpoint's weights report: those of its model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..files import CARD_FILE, README_FILE
from .weight_files import read_json


def read_card_metrics(folder: Path) -> dict[str, float]:
    """Returns the metrics of the model card in a folder, without the prefix "eval_".

    They are those of pruning_card.json or, without one, the results in the metadata of README.md, which cards of other
    tools have too. A README.md whose metadata cannot be read has none.

    Raises:
        InspectionError: pruning_card.json is damaged.
    """
    if (folder / CARD_FILE).is_file():
        stored = read_json(folder / CARD_FILE).get("metrics")
        return _numbers(stored if isinstance(stored, Mapping) else {})
    try:
        metadata = metadata_load(folder / README_FILE) if (folder / README_FILE).is_file() else None
        _, results = model_index_to_eval_results((metadata or {})["model-index"])
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError):
        return {}
    datasets = {str(result.dataset_name) for result in results}
    return _numbers(
        {
            f"{result.dataset_name} {result.metric_type}" if len(datasets) > 1 else str(result.metric_type): value
            for result in results
            for value in [result.metric_value]
        }
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        str(name).removeprefix("eval_"): float(value)
        for name, value in values.items()
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    }
