"""Puts a model into evaluation mode for calibration and measurement, and restores it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that switches a model to evaluation mode and restores its settings on exit.

    Inside the context, dropout is off, key-value caching (`config.use_cache`) is off, and transformers computes
    fused experts one by one ("eager"), so that hooks receive the input of every expert.
    """
    transformer: Any = model  # has the methods of PreTrainedModel, if it is one
    training = {module: module.training for module in model.modules()}
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in configs if hasattr(config, "use_cache")]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    unique = {id(config): config for config in configs}.values()
    cache_settings = [(config, config.use_cache) for config in unique if hasattr(config, "use_cache")]
    experts = _experts_implementation(transformer)
    try:
        model.eval()
        for config, _ in cache_settings:
            config.use_cache = False
        if experts is not None:
            transformer.set_experts_implementation("eager")
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, use_cache in cache_settings:
            config.use_cache = use_cache
        if experts is not None:
            transformer.set_experts_implementation(experts)


def _experts_implementation(model: Any) -> str | dict | None:
    """Returns the experts implementation that transformers uses, or None where it cannot be changed."""
    has_experts = any(type(module).__name__.endswith("Experts") for module in model.modules())
    if not has_experts or not hasattr(model, "set_experts_implementation"):
        return None
    if hasattr(model, "get_experts_implementation"):
        return model.get_experts_implementation()
    return getattr(model.config, "_experts_implementation", None)
