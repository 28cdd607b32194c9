"""Puts a model into evaluation mode for calibration and measurement, and restores it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within, dropout is off, nothing is cached, and experts are computed one by one, so that inputs are seen."""
    training = {module: module.training for module in model.modules()}
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "use_cache")]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    unique = {id(config): config for config in configs}.values()
    cached = [(config, config.use_cache) for config in unique if hasattr(config, "use_cache")]
    experts = _experts_implementation(model)
    try:
        model.eval()
        for config, _ in cached:
            config.use_cache = False
        if experts is not None:
            model.set_experts_implementation("eager")
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, value in cached:
            config.use_cache = value
        if experts is not None:
            model.set_experts_implementation(experts)


def _experts_implementation(model: nn.Module) -> str | dict | None:
    """How transformers computes the model's experts; None where it has none, or one way only."""
    has_experts = any(type(module).__name__.endswith("Experts") for module in model.modules())
    if not has_experts or not hasattr(model, "set_experts_implementation"):
        return None
    if hasattr(model, "get_experts_implementation"):
        return model.get_experts_implementation()
    return getattr(model.config, "_experts_implementation", None)
