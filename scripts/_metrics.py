"""Loads a metric through the evaluate library, or falls back on our own function for it."""

import logging
import os
from collections.abc import Callable


logger = logging.getLogger("scripts.metrics")

Metric = Callable[..., dict[str, float]]


def load_or_fall_back(name: tuple[str, ...], fallback: Metric, cache_dir: str | None = None) -> Metric:
    """Returns `evaluate.load(*name).compute`, or the local function with a warning if that cannot be loaded."""
    shown = " ".join(name)
    # evaluate does not look at the first variable, and takes seconds to give up on a network that is not there.
    if any(os.environ.get(variable, "").upper() in _ON for variable in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")):
        logger.warning(f"offline mode: the metric {shown} is computed by {fallback.__module__}.py.")
        return fallback
    try:
        import evaluate

        return evaluate.load(*name, cache_dir=cache_dir).compute
    except (OSError, ImportError) as error:
        logger.warning(
            f"evaluate could not load the metric {shown} ({type(error).__name__}); it is computed by "
            f"{fallback.__module__}.py instead, with the same keys."
        )
        return fallback


_ON = ("1", "ON", "YES", "TRUE")
