"""Blocks: the repeated parts of a model, found by its structure, and a walk over them that computes each block of each
batch once, however often the model around them is asked.

The model itself says what reaches a block: its own forward is run, with blocks that are done giving back what they
gave, and stops where it has gone far enough. So masks, positions, and whatever else a model hands to its blocks are
right without this package knowing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.batches import call_model, to_device
from ..distributed import input_device
from ..model.evaluation_mode import evaluation_mode
from ..model.layers import PrunableLayer
from .activations import Activations


class Stop(BaseException):
    """A forward has gone far enough. No code of a model catches it."""


@dataclass(frozen=True)
class Subgraph:
    """What is pruned together, from what reaches it: the layers of a block, or those outside all blocks.

    Args:
        name: of the block, or of what stands for one.
        layers: those to prune; of a block that only passes on what it gets there are none.
        stack: the name of the list that the block is in; None outside blocks.
        until: the name of the block that is not to be entered any more, outside blocks; None if there is none.
    """

    name: str
    layers: tuple[PrunableLayer, ...]
    stack: str | None = None
    until: str | None = None


class BlockPipeline:
    """Runs a model over batches. Within `with walk:` the model is in evaluation mode, without gradients and cache.

    Args:
        model: any module.
        batches: what it is called with: keyword arguments in a mapping, positional ones in a tuple, or a tensor.
        place: where outputs of blocks are kept, see `Activations`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], place: str = "cpu"):
        self.model, self.batches, self._place = model, batches, place
        self._passed: dict[str, Activations] = {}
        self._done: dict[str, tuple[nn.Module, Any]] = {}
        self._now = 0
        self._taken: dict[str, Any] = {}
        self._used_up: str | None = None
        self._context: ExitStack | None = None

    def __enter__(self) -> BlockPipeline:
        self._context = ExitStack()
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(evaluation_mode(self.model))
        self._context.callback(self._forget)
        return self

    def __exit__(self, *error) -> None:
        self._context.close()

    def _forget(self) -> None:
        """Blocks compute again."""
        for module, own in self._done.values():
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._done.clear()
        self._passed.clear()
        self._taken.clear()

    def forward(self, index: int) -> Any:
        """Run one batch until something raises `Stop`. Returns what the model gives, if nothing does."""
        self._now = index
        try:
            return call_model(self.model, to_device(self.batches[index], input_device(self.model)))
        except Stop:
            return None
        finally:
            self._taken.clear()

    def propagate(self, subgraph: Subgraph, before: Callable[[int], None] = lambda index: None) -> None:
        """Run every batch through a block and keep what it gives; `before` is called with each batch's number first.
        From then on the block gives that without computing."""
        self._used_up = subgraph.stack  # what a block gives takes the place of what it got
        try:
            for index in range(len(self.batches)):
                before(index)
                self.keep(subgraph, index, self.output(subgraph.name, index))
        finally:
            self._used_up = None
        self.finish(subgraph)

    def output(self, block: str, index: int) -> Any:
        """What a block gives for one batch."""
        found = []

        def take(module, args, output):
            found.append(output)
            raise Stop

        handle = self.model.get_submodule(block).register_forward_hook(take)
        try:
            self.forward(index)
        finally:
            handle.remove()
        if not found:
            raise ValueError(f'a forward on calibration batch {index} does not reach the block "{block}".')
        return found[0]

    def keep(self, subgraph: Subgraph, index: int, output: Any) -> None:
        """Take `output` for what a block gives for a batch."""
        self._passed.setdefault(subgraph.stack, Activations(self._place))[index] = output

    def finish(self, subgraph: Subgraph) -> None:
        """From now on the block gives what is kept of its stack, without computing."""
        module = self.model.get_submodule(subgraph.name)
        self._done[subgraph.name] = module, module.__dict__.get("forward")
        module.forward = lambda *args, **kwargs: self._take(subgraph.stack)

    def _take(self, stack: str) -> Any:
        """What is kept of a stack for the batch that runs: brought once, however many of its blocks are done."""
        if stack not in self._taken:
            kept = self._passed[stack]
            self._taken[stack] = kept.pop(self._now) if stack == self._used_up else kept[self._now]
        return self._taken[stack]

    def __contains__(self, block: str) -> bool:
        """Whether a block gives what is kept."""
        return block in self._done

    def run_until(self, subgraph: Subgraph, before: Callable[[int], None] = lambda index: None) -> None:
        """Run every batch as far as a stage goes, and keep nothing."""
        with ExitStack() as handles:
            if subgraph.stack is not None:
                handle = self.model.get_submodule(subgraph.name).register_forward_hook(stop)
                handles.callback(handle.remove)
            elif subgraph.until is not None:
                handle = self.model.get_submodule(subgraph.until).register_forward_pre_hook(stop)
                handles.callback(handle.remove)
            for index in range(len(self.batches)):
                before(index)
                self.forward(index)


def stop(module, *arguments) -> None:
    """A hook that ends the forward."""
    raise Stop
