"""What is removed from a model, and how its config changes: filled step by step, before any weight is copied."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..distributed import full_shape
from ..model.blocks import find_block_lists, is_within
from ..model.layers import find_layers
from .plan import SizeChange
from .slicing import KeptEntries


class ShrinkError(ValueError):
    """A model cannot be shrunk. The message says why, and what to do."""


class Reduction:
    """What is removed from a model. The model is not changed.

    Args:
        model: a model of transformers.

    Attributes:
        config: that of the smaller model.
        entries: what remains of each parameter.
        blocks: name of a list of blocks -> the numbers of those that stay, where some are removed.
        named_blocks: the blocks that were removed because the caller named others.
        experts: name of the module around experts -> the experts that stay, where some are removed.
        is_uneven: whether sizes may differ from those of the config.
        changes, reasons: for `ShrinkPlan`.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.parameters = dict(model.named_parameters())
        self.config: Any = copy.deepcopy(model.config)
        tensors = self.parameters | dict(model.named_buffers())
        self.entries = KeptEntries({name: tuple(full_shape(tensor)) for name, tensor in tensors.items()})
        self.layers = find_layers(model)
        self.block_lists = find_block_lists(model, [layer for layer in self.layers if layer.in_body])
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.named_blocks: list[str] = []
        self.experts: dict[str, tuple[int, ...]] = {}
        self.is_uneven = False
        self.changes: list[SizeChange] = []
        self.reasons: list[str] = []

    def is_removed(self, name: str) -> bool:
        """Returns whether a parameter or module is in a block that is removed."""
        for blocks_name, kept in self.blocks.items():
            if is_within(name, blocks_name) and name != blocks_name:
                return int(name.removeprefix(f"{blocks_name}.").split(".")[0]) not in kept
        return False
