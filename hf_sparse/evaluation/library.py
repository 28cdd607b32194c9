"""Metrics of the evaluate library, where it can load them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)

Metric = Callable[..., dict[str, float]]
"""A function of `predictions` and `references` that returns values by name, as `compute` of the evaluate library."""

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Returns the share of predictions that equal their references, 1/n sum [p_i = r_i].

    Example:
        >>> accuracy([1, 1, 0, 0], [1, 0, 0, 0])
        {'accuracy': 0.75}
    """
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def load_metric_or_fallback(name: tuple[str, ...], fallback: Metric, cache_dir: str | None = None) -> Metric:
    """Loads a metric of the evaluate library, or returns `fallback` where that is not possible.

    The library downloads metrics from the Hub, so the fallback is used offline, and where the library or what its
    metric imports is not installed.

    Args:
        name: arguments of `evaluate.load`, as in ("glue", "mrpc").
        fallback: computes the same values with the same names.
        cache_dir: where the library keeps its files.
    """
    shown = " ".join(name)
    # evaluate ignores HF_HUB_OFFLINE, and takes seconds to give up without a network.
    if any(os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE") for variable in _OFFLINE_VARIABLES):
        logger.info(f"offline mode: the metric {shown} is computed by {fallback.__module__}.")
        return fallback
    try:
        import evaluate

        return evaluate.load(*name, cache_dir=cache_dir).compute
    except (OSError, ImportError) as error:
        logger.warning(
            f"evaluate could not load the metric {shown} ({type(error).__name__}); it is computed by "
            f"{fallback.__module__} instead, with the same names."
        )
        return fallback
