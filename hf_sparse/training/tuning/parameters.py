"""Names of the parameters of a model by their role: normalization, biases, task head."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def norm_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of normalization modules.

    These are modules with "norm" in the name of their class, and modules without children that hold a vector `weight`
    of more than one element and nothing but vectors.

    Example:
        >>> sorted(norm_parameters(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4))))
        ['1.bias', '1.weight', '2.weight']
    """
    names = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(parameter.dim() <= 1 for parameter in own.values()) and _is_norm(module, own):
            names |= {f"{path}.{name}" if path else name for name in own}
    return names & _unique_names(model)


def _is_norm(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    if "norm" in type(module).__name__.lower():
        return True
    has_vector = "weight" in own and own["weight"].numel() > 1 and own.keys() <= {"weight", "bias"}
    return has_vector and not any(True for _ in module.children())


def bias_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the biases, those of normalization modules among them.

    Example:
        >>> sorted(bias_parameters(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4))))
        ['0.bias', '1.bias']
    """
    leaves = {name: name.rpartition(".")[2] for name in _unique_names(model)}
    return {name for name, leaf in leaves.items() if leaf == "bias" or leaf.endswith("_bias")}


def head_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of the task head: outside the body of the model (`base_model` of a
    transformers model), without output embeddings."""
    body = getattr(model, "base_model", model)
    output = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = [module for module in (body, output) if isinstance(module, nn.Module)]
    others = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in others}


def _unique_names(model: nn.Module) -> set[str]:
    """Returns the names under which an optimizer gets the parameters: one for each."""
    return {name for name, _ in model.named_parameters()}
