"""Traces a model with one forward before it is pruned: the order in which it calls its blocks and layers, which layers
share their input, and whether the blocks form a chain that can be pruned one after the other."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import first_row
from ..model.blocks import find_block_lists, is_within
from ..model.layers import PrunableLayer
from .pipeline import BlockPipeline, Subgraph


class BlocksError(ValueError):
    """A model cannot be pruned block by block.

    Args:
        problem: why not.
    """

    def __init__(self, problem: str):
        self.problem = problem
        super().__init__(
            f"{problem} Prune all layers at once, from the inputs that they have in the dense model, with "
            "`sequential=False`."
        )


@dataclass(frozen=True)
class ModelTrace:
    """The structure of a model's forward.

    Args:
        subgraphs: in the order in which they are pruned.
        shared_inputs: maps the module of each layer to the first module of the same subgraph that has the same input.
            Modules called more than once map to themselves.
        last_module: maps the name of each subgraph to the module of its layers that is called last. Subgraphs without
            layers, or with a module that is called more than once, are left out.
        repeated: the modules of layers that are called more than once in a forward.
    """

    subgraphs: list[Subgraph]
    shared_inputs: dict[str, str]
    last_module: dict[str, str]
    repeated: frozenset[str]


def trace_model(model: nn.Module, layers: Sequence[PrunableLayer], batch: Any, sequential: bool) -> ModelTrace:
    """Runs the model on the first row of a batch and records the calls of its blocks and layers.

    A sequential trace runs the model a second time, block by block, to check that every block then has the same
    inputs.

    Args:
        model: any module.
        layers: the layers whose inputs are observed.
        batch: arguments of the model, as in `BlockPipeline`.
        sequential: whether the layers are pruned block by block; if not, all of them are one subgraph.

    Raises:
        ValueError: the forward does not reach a layer; or the model has no blocks, or its blocks are not modules that
            are called once each and whose inputs come from the block before.
    """
    batch = first_row(batch)
    block_lists = find_block_lists(model, layers) if sequential else {}
    if sequential and not block_lists:
        raise BlocksError(
            f"{type(model).__name__} has no repeated blocks (an nn.ModuleList or nn.Sequential) that contain "
            "layers to prune."
        )
    list_of_block = {block: name for name, blocks in block_lists.items() for block in blocks}
    calls = _CallRecorder(model, layers, list_of_block)
    with BlockPipeline(model, [batch], "device") as pipeline:
        with calls:
            pipeline.forward(0)
        _check_reached(layers, calls.num_calls)
        subgraphs = _subgraphs(layers, calls, list_of_block)
        _check_chain(pipeline, subgraphs, calls)
    last_module = {}
    for subgraph in subgraphs:
        modules = {layer.module for layer in subgraph.layers}
        if modules and all(calls.num_calls[name] == 1 for name in modules):
            last_module[subgraph.name] = [name for name in calls.order if name in modules][-1]
    repeated = frozenset(layer.module for layer in layers if calls.num_calls[layer.module] > 1)
    return ModelTrace(subgraphs, calls.shared_inputs(), last_module, repeated)


class _CallRecorder:
    """Records the calls of blocks, and of modules that hold layers, during a forward."""

    def __init__(self, model: nn.Module, layers: Sequence[PrunableLayer], blocks: Iterable[str]):
        self._model, self._blocks = model, tuple(blocks)
        self._layer_modules = list(dict.fromkeys(layer.module for layer in layers))
        self.order: list[str] = []
        self.num_calls: Counter[str] = Counter()
        self.fingerprints: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
        self._inputs: dict[tuple, tuple[weakref.ref, int, str]] = {}
        self._shared_inputs: dict[str, str] = {}

    def __enter__(self) -> _CallRecorder:
        self._handles = ExitStack()
        for name in dict.fromkeys([*self._blocks, *self._layer_modules]):
            module = self._model.get_submodule(name)
            self._handles.enter_context(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()
        self._inputs.clear()

    def _hook(self, name: str) -> Callable:
        holds_layers = name in self._layer_modules

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.num_calls[name] += 1
            self.order.append(name)
            if name in self._blocks or self.block_of(name) is None:
                self.fingerprints[name] = fingerprint((args, kwargs))
            if holds_layers:
                self._shared_inputs[name] = self._first_with_input(name, next(iter((*args, *kwargs.values()))))

        return record

    def _first_with_input(self, name: str, x: torch.Tensor) -> str:
        """The first module of the same block that was called with the same tensor, unchanged since."""
        key = (self.block_of(name), x.data_ptr(), x.shape[-1], x.numel())
        if key in self._inputs:
            reference, version, first = self._inputs[key]
            if reference() is not None and version == x._version:
                return first
        self._inputs[key] = weakref.ref(x), x._version, name
        return name

    def block_of(self, name: str) -> str | None:
        """The block that a module is in."""
        return next((block for block in self._blocks if is_within(name, block)), None)

    def shared_inputs(self) -> dict[str, str]:
        """Maps each module to the module whose input it shares. Modules called more than once map to themselves."""
        repeated = {name for name in self._shared_inputs if self.num_calls[name] > 1}
        repeated |= {first for name, first in self._shared_inputs.items() if name in repeated}
        return {
            name: name if name in repeated or first in repeated else first
            for name, first in self._shared_inputs.items()
        }


def fingerprint(structure: Any) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Returns the shape and up to about 64 sampled values of each floating-point tensor of a structure."""
    tensors = [leaf for leaf in _pytree.tree_leaves(structure) if torch.is_tensor(leaf) and leaf.is_floating_point()]
    fingerprints = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        # Values that are not finite are reported later, when they are accumulated.
        sample = flat[:: max(1, len(flat) // 64)].double().nan_to_num().clamp(-1e30, 1e30)
        fingerprints.append((tuple(tensor.shape), sample.cpu()))
    return fingerprints


def _is_close(left: Sequence[tuple], right: Sequence[tuple]) -> bool:
    if [shape for shape, _ in left] != [shape for shape, _ in right]:
        return False
    return all(
        float((one - other).norm()) <= 1e-2 * float(one.norm())
        for (_, one), (_, other) in zip(left, right, strict=True)
    )


def _check_reached(layers: Sequence[PrunableLayer], num_calls: Counter[str]) -> None:
    unreached = [layer.module for layer in layers if not num_calls[layer.module]]
    if unreached:
        raise ValueError(
            f"{len(unreached)} of {len(layers)} selected weights are never reached by a forward on the first row of "
            f"the calibration data, such as {', '.join(unreached[:3])}: nothing is known of their inputs. Leave them "
            f'out, as with `exclude=["{unreached[0]}"]`, or give calibration data that reaches them.'
        )


def _subgraphs(
    layers: Sequence[PrunableLayer], calls: _CallRecorder, list_of_block: Mapping[str, str]
) -> list[Subgraph]:
    """Blocks in the order of their calls, up to the last one needed, and the layers outside before and after them."""
    blocks = [name for name in dict.fromkeys(calls.order) if name in list_of_block]
    layers_of: dict[str | None, list[PrunableLayer]] = {}
    for layer in layers:
        layers_of.setdefault(calls.block_of(layer.module), []).append(layer)
    outside = layers_of.pop(None, [])
    uncalled = [block for block in layers_of if block not in blocks]
    if uncalled:
        raise BlocksError(
            f'"{uncalled[0]}" is in a module list and contains layers to prune, but the model calls its submodules '
            "and not itself, so it cannot be pruned as a block."
        )
    if not blocks:
        return [Subgraph("the whole model", tuple(outside))]
    start = calls.order.index(blocks[0])
    early = [layer for layer in outside if layer.module in calls.order[:start]]
    late = [layer for layer in outside if layer not in early]
    subgraphs = [Subgraph(block, tuple(layers_of.get(block, ())), list_of_block[block]) for block in blocks]
    while not late and not subgraphs[-1].layers:
        subgraphs.pop()
    if early:
        subgraphs.insert(0, Subgraph("before the blocks", tuple(early), stop_before=blocks[0]))
    return [*subgraphs, Subgraph("after the blocks", tuple(late))] if late else subgraphs


def _check_chain(pipeline: BlockPipeline, subgraphs: Sequence[Subgraph], calls: _CallRecorder) -> None:
    """Check that each block has the same inputs in a pipeline as in a plain forward."""
    blocks = [subgraph for subgraph in subgraphs if subgraph.is_block]
    for block in blocks:
        if calls.num_calls[block.name] > 1:
            raise BlocksError(f'block "{block.name}" runs {calls.num_calls[block.name]} times in one forward.')
    for block in blocks:
        if _with_other_inputs(pipeline, [block.name], calls, partial(pipeline.propagate, block)):
            raise BlocksError(f'block "{block.name}" reads more than the output of the block before it.')
    if blocks and not subgraphs[-1].is_block:
        run = partial(pipeline.run_until, subgraphs[-1])
        if changed := _with_other_inputs(pipeline, subgraphs[-1].modules, calls, run):
            raise BlocksError(f'"{changed[0]}" reads outputs of blocks before the last one.')


def _with_other_inputs(
    pipeline: BlockPipeline, names: Sequence[str], calls: _CallRecorder, run: Callable[[], None]
) -> list[str]:
    """The modules whose inputs during `run` differ from those that were recorded."""
    with _CallRecorder(pipeline.model, (), names) as new_calls:
        run()
    return [name for name in names if not _is_close(calls.fingerprints[name], new_calls.fingerprints.get(name, []))]
