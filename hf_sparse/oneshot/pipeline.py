"""Runs a model block by block over calibration batches, so that each block computes each batch once.

The model's own forward is run for every step: blocks that are finished return their cached outputs, and the forward is
stopped after the last block that is needed. Attention masks, position embeddings and whatever else the model passes to
its blocks are therefore right without knowledge of its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from ..calibration.batches import call_model, pin_memory, to_device
from ..distributed import input_device
from ..model.evaluation_mode import evaluation_mode
from ..model.layers import PrunableLayer
from .activation_cache import ActivationCache


class StopForward(BaseException):
    """Ends a forward early. Not an `Exception`, so that no code of a model catches it."""


@dataclass(frozen=True)
class Subgraph:
    """Layers that are calibrated and pruned together: those of one block, or those outside all blocks.

    Args:
        name: of the block's module, or a description for layers outside blocks.
        layers: the layers to prune; empty for a block that only propagates activations.
        block_list: name of the `nn.ModuleList` or `nn.Sequential` that the block is in; None outside blocks.
        stop_before: outside blocks, the name of the block at which the forward ends; None to run it to its end.
    """

    name: str
    layers: tuple[PrunableLayer, ...]
    block_list: str | None = None
    stop_before: str | None = None

    @property
    def is_block(self) -> bool:
        """Whether these are the layers of a block, whose output can be cached."""
        return self.block_list is not None

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that hold its weights: the block, or the modules of its layers."""
        return (self.name,) if self.is_block else tuple(dict.fromkeys(layer.module for layer in self.layers))


class BlockPipeline:
    """Runs a model over calibration batches, subgraph by subgraph.

    A context manager: inside, the model is in evaluation mode, without gradients and without a key-value cache.

    Args:
        model: any module.
        batches: arguments of the model: a mapping of keyword arguments, a tuple of positional ones, or a tensor.
        storage: where outputs of blocks are cached, see `ActivationCache`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with BlockPipeline(model, [torch.ones(3, 2)]) as pipeline:
        ...     pipeline.propagate(Subgraph("0", (), block_list=""))  # "0" computes once and is cached
        ...     output = pipeline.forward(0)
        >>> output.shape
        torch.Size([3, 1])
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], storage: str = "cpu"):
        self.model, self.batches, self._storage = model, batches, storage
        if input_device(model).type == "cuda":
            self.batches = [pin_memory(batch) for batch in batches]  # each is copied twice for every block
        self._caches: dict[str, ActivationCache] = {}
        """Block list -> outputs of the last block of it that was propagated."""
        self._original_forwards: dict[str, tuple[nn.Module, Any]] = {}
        self._batch_index = 0
        self._cached_outputs: dict[str, Any] = {}
        """Block list -> cached output for the batch that is running."""
        self._overwritten_list: str | None = None
        self._context = ExitStack()

    def __enter__(self) -> BlockPipeline:
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(evaluation_mode(self.model))
        self._context.callback(self._restore_forwards)
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()

    def _restore_forwards(self) -> None:
        for module, original in self._original_forwards.values():
            if original is None:
                del module.forward
            else:
                module.forward = original
        self._original_forwards.clear()
        self._caches.clear()
        self._cached_outputs.clear()

    def forward(self, index: int) -> Any:
        """Runs the model on batch `index`. Returns its output, or None if a hook ended the forward early."""
        self._batch_index = index
        try:
            return call_model(self.model, to_device(self.batches[index], input_device(self.model)))
        except StopForward:
            return None
        finally:
            self._cached_outputs.clear()

    def propagate(self, subgraph: Subgraph, before_batch: Callable[[int], None] = lambda index: None) -> None:
        """Runs every batch through a block and caches its outputs, which it returns from then on without computing.

        Args:
            subgraph: a block.
            before_batch: called with the number of each batch before it runs.

        Raises:
            ValueError: the subgraph is not a block.
        """
        block_list = subgraph.block_list
        if block_list is None:
            raise ValueError(f'"{subgraph.name}" is not a block, so its outputs cannot be cached')
        if block_list not in self._caches:
            self._caches[block_list] = ActivationCache(self._storage)
        cache = self._caches[block_list]
        self._overwritten_list = block_list  # a block's outputs replace its inputs in the cache
        try:
            for index in range(len(self.batches)):
                before_batch(index)
                cache[index] = self.block_output(subgraph.name, index)
        finally:
            self._overwritten_list = None
        module = self.model.get_submodule(subgraph.name)
        self._original_forwards[subgraph.name] = module, module.__dict__.get("forward")
        module.forward = lambda *args, **kwargs: self._cached_output(block_list)

    def block_output(self, block: str, index: int) -> Any:
        """Returns the output of a block for batch `index`.

        Raises:
            ValueError: the model does not call the block for this batch.
        """
        outputs = []

        def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> NoReturn:
            outputs.append(output)
            raise StopForward

        with self.model.get_submodule(block).register_forward_hook(capture):
            self.forward(index)
        if not outputs:
            raise ValueError(f'a forward on calibration batch {index} does not reach the block "{block}".')
        return outputs[0]

    def _cached_output(self, block_list: str) -> Any:
        """The cached output for the current batch, read once however many finished blocks of the list return it."""
        if block_list not in self._cached_outputs:
            cache, index = self._caches[block_list], self._batch_index
            overwritten = block_list == self._overwritten_list
            self._cached_outputs[block_list] = cache.pop(index) if overwritten else cache[index]
        return self._cached_outputs[block_list]

    def is_propagated(self, subgraph: Subgraph) -> bool:
        """Whether the block returns cached outputs."""
        return subgraph.name in self._original_forwards

    def run_until(self, subgraph: Subgraph, before_batch: Callable[[int], None] = lambda index: None) -> None:
        """Runs every batch up to the end of a subgraph and discards the outputs."""
        with ExitStack() as hooks:
            if subgraph.is_block:
                hooks.enter_context(self.model.get_submodule(subgraph.name).register_forward_hook(stop_forward))
            elif subgraph.stop_before is not None:
                block = self.model.get_submodule(subgraph.stop_before)
                hooks.enter_context(block.register_forward_pre_hook(stop_forward))
            for index in range(len(self.batches)):
                before_batch(index)
                self.forward(index)


def stop_forward(module: nn.Module, *arguments: Any) -> NoReturn:
    """A forward hook or forward pre-hook that ends the forward."""
    raise StopForward
