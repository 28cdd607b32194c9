"""Repeated blocks of a model, found by its structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .layers import PrunableLayer


def find_stacks(model: nn.Module, layers: Sequence[PrunableLayer]) -> dict[str, list[str]]:
    """Lists of modules that hold layers, the outermost ones, with the names of their members.

    Example:
        >>> from hf_sparse.targets import find_layers
        >>> model = nn.ModuleDict({"body": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])})
        >>> find_stacks(model, find_layers(model))
        {'body': ['body.0', 'body.1']}
    """
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(is_within(name, outer) for outer in stacks):
            continue
        blocks = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        if any(is_within(layer.module, block) for layer in layers for block in blocks):
            stacks[name] = blocks
    return stacks


def is_within(name: str, outer: str) -> bool:
    """Whether a module is `outer` or in it.

    Example:
        >>> is_within("layers.10.mlp", "layers.10"), is_within("layers.10.mlp", "layers.1")
        (True, False)
    """
    return not outer or name == outer or name.startswith(outer + ".")


def by_block(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[list[PrunableLayer]]:
    """The layers of each block, and those of none, together."""
    blocks = [block for stack in find_stacks(model, layers).values() for block in stack]
    parts: dict[str | None, list[PrunableLayer]] = {}
    for layer in layers:
        block = next((block for block in blocks if is_within(layer.module, block)), None)
        parts.setdefault(block, []).append(layer)
    return list(parts.values())
