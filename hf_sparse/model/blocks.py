"""Finds the repeated blocks of a model, such as its transformer layers, from its module structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .layers import PrunableLayer


def find_block_lists(model: nn.Module, layers: Sequence[PrunableLayer]) -> dict[str, list[str]]:
    """Returns the name of each outermost `nn.ModuleList` or `nn.Sequential` that contains any of the `layers`, with
    the names of its members, the blocks, in order.

    Example:
        >>> from hf_sparse.model.layers import find_layers
        >>> model = nn.ModuleDict({"body": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])})
        >>> find_block_lists(model, find_layers(model))
        {'body': ['body.0', 'body.1']}
    """
    block_lists: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        if not is_list or any(is_within(name, outer) for outer in block_lists):
            continue
        blocks = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        if any(is_within(layer.module, block) for layer in layers for block in blocks):
            block_lists[name] = blocks
    return block_lists


def is_within(name: str, outer: str) -> bool:
    """Returns whether the module `name` is the module `outer` or one of its descendants.

    Example:
        >>> is_within("layers.10.mlp", "layers.10"), is_within("layers.10.mlp", "layers.1")
        (True, False)
    """
    return not outer or name == outer or name.startswith(outer + ".")


def group_by_block(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[list[PrunableLayer]]:
    """Groups layers by the block that contains them; layers outside all blocks form one group."""
    blocks = [block for block_list in find_block_lists(model, layers).values() for block in block_list]
    groups: dict[str | None, list[PrunableLayer]] = {}
    for layer in layers:
        block = next((block for block in blocks if is_within(layer.module, block)), None)
        groups.setdefault(block, []).append(layer)
    return list(groups.values())
