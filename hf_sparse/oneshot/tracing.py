"""One forward that is looked at before anything is pruned: in which order a model calls its blocks and layers, which
layers get the same input, and whether the blocks can be gone through one after the other."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import count_tokens, first_row
from ..model.blocks import find_block_lists, is_within
from ..model.layers import PrunableLayer
from .pipeline import BlockPipeline, Subgraph


REMEDY = "Prune all layers at once, from the inputs that they have in the dense model, with sequential=False."


@dataclass(frozen=True)
class ModelTrace:
    """What the forward showed.

    Args:
        stages: in the order in which they are pruned.
        leaders: module of a layer -> the first module of the same stage that gets the same input.
        last: stage -> the module of its layers that is called last, if nothing of the stage is called twice.
        repeated: modules of layers that are called more than once.
        tokens: how many the forward was of, and the `seconds` that it took.
    """

    subgraphs: list[Subgraph]
    leaders: dict[str, str]
    last: dict[str, str]
    repeated: frozenset[str]
    tokens: int
    seconds: float


def trace_model(model: nn.Module, layers: Sequence[PrunableLayer], batch: Any, sequential: bool) -> ModelTrace:
    """Run the model once on (the first row of) a batch and, if it is to be gone through block by block, once more in
    that way, to see that every block gets what it got.

    Raises:
        ValueError: layers that the forward does not reach; no blocks, or some that are not called themselves, that run
            several times, or that read more than the blocks before them pass on.
    """
    batch = first_row(batch)
    stacks = find_block_lists(model, layers) if sequential else {}
    if sequential and not stacks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks (an nn.ModuleList or nn.Sequential) that hold what is to "
            f"be pruned. {REMEDY}"
        )
    block_of = {block: stack for stack, blocks in stacks.items() for block in blocks}
    calls = _Calls(model, layers, block_of)
    with BlockPipeline(model, [batch], "device") as pipeline:
        with calls:
            start = time.perf_counter()
            pipeline.forward(0)
            seconds = time.perf_counter() - start
        _check_reached(layers, calls.count)
        subgraphs = _stages(layers, calls, block_of)
        _check_chain(pipeline, subgraphs, calls)
    last = {subgraph.name: _last(subgraph, calls) for subgraph in subgraphs}
    last = {name: module for name, module in last.items() if module is not None}
    repeated = frozenset(layer.module for layer in layers if calls.count[layer.module] > 1)
    return ModelTrace(subgraphs, calls.leaders(), last, repeated, count_tokens(batch), seconds)


class _Calls:
    """Watches a forward: calls of blocks and of modules that hold layers, in order."""

    def __init__(self, model: nn.Module, layers: Sequence[PrunableLayer], block_of: Mapping[str, str]):
        self._model, self._block_of = model, block_of
        self._holders = list(dict.fromkeys(layer.module for layer in layers))
        self.order: list[str] = []
        self.count: Counter[str] = Counter()
        self.fingerprints: dict[str, list] = {}
        self._seen: dict[tuple, tuple] = {}
        self._shares: dict[str, str] = {}

    def __enter__(self) -> _Calls:
        self._handles = ExitStack()
        for name in dict.fromkeys([*self._block_of, *self._holders]):
            hook = self._hook(name)
            handle = self._model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            self._handles.callback(handle.remove)
        return self

    def __exit__(self, *error) -> None:
        self._handles.close()
        self._seen.clear()

    def _hook(self, name: str):
        holds = name in self._holders

        def called(module, args, kwargs):
            self.count[name] += 1
            self.order.append(name)
            if name in self._block_of or self.block(name) is None:
                self.fingerprints[name] = fingerprint((args, kwargs))
            if holds:
                self._shares[name] = self._first_with(name, next(iter((*args, *kwargs.values()))))

        return called

    def _first_with(self, name: str, x: torch.Tensor) -> str:
        """The first module of the same block that got the very same numbers."""
        block = self.block(name)
        key = (block, x.data_ptr(), x.shape[-1], x.numel())
        known, version, leader = self._seen.get(key, (None, None, None))
        if known is not None and known() is not None and version == x._version:
            return leader
        self._seen[key] = weakref.ref(x), x._version, name
        return name

    def block(self, name: str) -> str | None:
        """The block that a module is in."""
        return next((block for block in self._block_of if is_within(name, block)), None)

    def leaders(self) -> dict[str, str]:
        """Whose input is whose; nobody's but its own for what is called twice, or follows such."""
        twice = {name for name in self._shares if self.count[name] > 1}
        twice |= {leader for name, leader in self._shares.items() if name in twice}
        return {name: name if leader in twice or name in twice else leader for name, leader in self._shares.items()}


def fingerprint(structure: Any) -> list[tuple]:
    """A few numbers of each float tensor, by which to know it again."""
    tensors = [leaf for leaf in _pytree.tree_leaves(structure) if torch.is_tensor(leaf) and leaf.is_floating_point()]
    found = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)].double().nan_to_num().clamp(-1e30, 1e30)
        found.append((tuple(tensor.shape), some.cpu()))  # what is not finite is told where it is summed up
    return found


def _alike(left: list[tuple], right: list[tuple]) -> bool:
    if [shape for shape, _ in left] != [shape for shape, _ in right]:
        return False
    return all(
        float((one - other).norm()) <= 1e-2 * float(one.norm())
        for (_, one), (_, other) in zip(left, right, strict=True)
    )


def _check_reached(layers: Sequence[PrunableLayer], count: Counter[str]) -> None:
    idle = [layer.module for layer in layers if not count[layer.module]]
    if idle:
        raise ValueError(
            f"{len(idle)} of {len(layers)} selected weights are never reached by a forward on the first row of the "
            f"calibration data, such as {', '.join(idle[:3])}: nothing is known of their inputs. Leave them out, as "
            f'with exclude=["{idle[0]}"], or give calibration data that reaches them.'
        )


def _stages(layers: Sequence[PrunableLayer], calls: _Calls, block_of: Mapping[str, str]) -> list[Subgraph]:
    """Blocks in the order of their calls, up to the last that matters, and before and after them what is outside."""
    blocks = [name for name in dict.fromkeys(calls.order) if name in block_of]
    inside: dict[str | None, list[PrunableLayer]] = {}
    for layer in layers:
        inside.setdefault(calls.block(layer.module), []).append(layer)
    outside = inside.pop(None, [])
    uncalled = [block for block in inside if block not in blocks]
    if uncalled:
        raise ValueError(
            f'"{uncalled[0]}" is one of several like it that hold what is to be pruned, but no block: the model calls '
            f"its parts, and not itself. {REMEDY}"
        )
    if not blocks:
        return [Subgraph("the whole model", tuple(outside))]
    start = calls.order.index(blocks[0])
    early = [layer for layer in outside if layer.module in calls.order[:start]]
    late = [layer for layer in outside if layer not in early]
    subgraphs = [Subgraph(block, tuple(inside.get(block, ())), block_of[block]) for block in blocks]
    while not late and not subgraphs[-1].layers:
        subgraphs.pop()
    if early:
        subgraphs.insert(0, Subgraph("before the blocks", tuple(early), until=blocks[0]))
    return [*subgraphs, Subgraph("after the blocks", tuple(late))] if late else subgraphs


def _check_chain(pipeline: BlockPipeline, subgraphs: Sequence[Subgraph], calls: _Calls) -> None:
    """See that each block of a walk gets what it gets in a forward."""
    twice = [subgraph.name for subgraph in subgraphs if subgraph.stack is not None and calls.count[subgraph.name] > 1]
    if twice:
        raise ValueError(f'block "{twice[0]}" runs {calls.count[twice[0]]} times in one forward. {REMEDY}')
    blocks = [subgraph for subgraph in subgraphs if subgraph.stack is not None]
    for subgraph in blocks:
        if _changed(pipeline, [subgraph.name], calls, partial(pipeline.propagate, subgraph)):
            raise ValueError(
                f'block "{subgraph.name}" reads more than what the blocks before it pass on to each other. {REMEDY}'
            )
    if blocks and subgraphs[-1].stack is None:
        late = list(dict.fromkeys(layer.module for layer in subgraphs[-1].layers))
        changed = _changed(pipeline, late, calls, partial(pipeline.run_until, subgraphs[-1]))
        if changed:
            raise ValueError(f'"{changed[0]}" reads what blocks before the last one pass on. {REMEDY}')


def _changed(pipeline: BlockPipeline, names: Sequence[str], calls: _Calls, run: Callable[[], None]) -> list[str]:
    """Which of these modules get other inputs while `run` runs than in a forward."""
    got = {}
    with ExitStack() as handles:
        for name in names:

            def watch(module, args, kwargs, name=name):
                got[name] = fingerprint((args, kwargs))

            handle = pipeline.model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)
            handles.callback(handle.remove)
        run()
    return [name for name in names if not _alike(calls.fingerprints[name], got.get(name, []))]


def _last(subgraph: Subgraph, calls: _Calls) -> str | None:
    holders = {layer.module for layer in subgraph.layers}
    if not holders or any(calls.count[name] > 1 for name in holders):
        return None
    return [name for name in calls.order if name in holders][-1]
