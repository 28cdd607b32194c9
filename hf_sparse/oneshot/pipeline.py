"""Runs a model block by block over calibration batches, so that each block computes each batch once.

The model's own forward is run for every step: blocks that are finished return their cached outputs, and the forward is
stopped after the last block that is needed. Attention masks, position embeddings and whatever else the model passes to
its blocks are therefore right without knowledge of its architecture.

A pipeline can hold several streams, each with finished blocks and cached outputs of its own: those of the pruned
model, and beside them those of the dense one. A stream can be copied, to run again later from where it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from ..calibration.batches import call_model, pin_memory, to_device
from ..distributed import input_device
from ..model.evaluation_mode import evaluation_mode
from ..model.layers import PrunableLayer
from .activation_cache import ActivationCache


CURRENT = "current"
"""The stream in which a pipeline begins, of the model as it is at the time."""


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


@dataclass
class _Stream:
    """Finished blocks, and the outputs of the last one of each block list for every batch."""

    finished: set[str] = field(default_factory=set)
    caches: dict[str, ActivationCache] = field(default_factory=dict)


class BlockPipeline:
    """Runs a model over calibration batches, subgraph by subgraph.

    A context manager: inside, the model is in evaluation mode, without gradients and without a key-value cache. It
    begins in the stream `CURRENT`.

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
        self._stream = _Stream()
        self._streams = {CURRENT: self._stream}
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
        self._stream = _Stream()
        self._streams = {CURRENT: self._stream}
        self._cached_outputs.clear()

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Context in which the pipeline runs and propagates in another stream, which begins empty."""
        before, self._stream = self._stream, self._streams.setdefault(name, _Stream())
        try:
            yield
        finally:
            self._stream = before

    def copy_stream(self, name: str) -> None:
        """Copies the stream as it is now to one with this name. Cached outputs are shared, and are not overwritten as
        long as both streams have them."""
        self._streams[name] = _Stream(set(self._stream.finished), dict(self._stream.caches))

    def drop_stream(self, name: str) -> None:
        """Removes a stream, if there is one with this name, and the cached outputs that no other stream has."""
        self._streams.pop(name, None)

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
        inputs = self._stream.caches.get(block_list)
        is_shared = sum(inputs is stream.caches.get(block_list) for stream in self._streams.values()) > 1
        cache = ActivationCache(self._storage) if inputs is None or is_shared else inputs
        self._overwritten_list = block_list if cache is inputs else None  # outputs replace the inputs in the cache
        try:
            for index in range(len(self.batches)):
                before_batch(index)
                cache[index] = self.block_output(subgraph.name, index)
        finally:
            self._overwritten_list = None
        self._stream.caches[block_list] = cache
        self._stream.finished.add(subgraph.name)
        self._replace_forward(subgraph.name, block_list)

    def _replace_forward(self, block: str, block_list: str) -> None:
        """Make a block return its cached outputs in the streams in which it is finished."""
        if block in self._original_forwards:
            return
        module = self.model.get_submodule(block)
        compute = module.forward
        self._original_forwards[block] = module, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._cached_output(block_list) if block in self._stream.finished else compute(*args, **kwargs)

        module.forward = forward

    def cached_output(self, subgraph: Subgraph, index: int) -> Any:
        """Returns the output for batch `index` of the last block of this list that was propagated."""
        return self._stream.caches[subgraph.block_list or ""][index]

    def block_output(self, block: str, index: int, gradients_from: str | None = None) -> Any:
        """Returns the output of a block for batch `index`.

        Args:
            block: name of the block.
            index: number of the batch.
            gradients_from: a block. What is computed from it on is recorded for gradients.

        Raises:
            ValueError: the model does not call the block for this batch.
        """
        outputs, module = [], self.model.get_submodule(block)

        def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> NoReturn:
            outputs.append(output)
            raise StopForward

        with module.register_forward_hook(capture), ExitStack() as context:
            if gradients_from is not None:
                context.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # restores it at the end
                first = self.model.get_submodule(gradients_from)
                context.enter_context(first.register_forward_pre_hook(_enable_gradients))
            self.forward(index)
        if not outputs:
            raise ValueError(f'a forward on calibration batch {index} does not reach the block "{block}".')
        return outputs[0]

    def _cached_output(self, block_list: str) -> Any:
        """The cached output for the current batch, read once however many finished blocks of the list return it."""
        if block_list not in self._cached_outputs:
            cache, index = self._stream.caches[block_list], self._batch_index
            overwritten = block_list == self._overwritten_list
            self._cached_outputs[block_list] = cache.pop(index) if overwritten else cache[index]
        return self._cached_outputs[block_list]

    def is_propagated(self, subgraph: Subgraph) -> bool:
        """Whether the block returns cached outputs."""
        return subgraph.name in self._stream.finished

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


def _enable_gradients(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: what the model computes from here on is recorded for gradients."""
    torch.set_grad_enabled(True)


def stop_forward(module: nn.Module, *arguments: Any) -> NoReturn:
    """A forward hook or forward pre-hook that ends the forward."""
    raise StopForward
