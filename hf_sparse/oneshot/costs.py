"""What a one-shot run costs: memory by counting, time from the speed of a few forwards.

Shapes: T tokens, C inputs of a weight, R rows of all weights that share an input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import call_model, count_tokens, first_row, to_device
from ..distributed import input_device
from ..model.evaluation_mode import evaluation_mode
from ..model.layers import PrunableLayer
from ..requires import Requires
from .observers import SAMPLE
from .pipeline import BlockPipeline, Subgraph
from .prune import OneshotRun
from .tracing import ModelTrace, trace_model


RANKING = 1000
"""Operations that ranking one weight takes the time of, on a CPU that multiplies large matrices at full speed."""

_READING = 30
"""The same for an input that is squared and added."""

_UNKNOWN_SPEED = 1e11
_QUICK = 1.0
_FLOAT = 4


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds of one process. What a forward takes is not counted: of one batch, or with forwards=1 of
    all calibration data.

    Args:
        place: where activations are kept.
        block: bytes of the weights of the largest block.
        statistics: of the sums for one block, at most.
        solving: of factors and copies while weights that share an input are solved, at most.
        activations: of what blocks have given for the calibration data.
        whole: of what is held for all blocks: gradients and their sums, masks that are decided over all layers.
        forwards: seconds of forwards (and backwards).
        summing: seconds of making the sums.
        pruning: seconds of choosing weights and solving for others.
    """

    place: str
    block: int
    statistics: int
    solving: int
    activations: int
    whole: int
    forwards: float
    summing: float
    pruning: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.forwards + self.summing + self.pruning

    def __str__(self) -> str:
        memory = f"largest block {size(self.block)}, its sums {size(self.statistics)}, solving {size(self.solving)}"
        kept = f"activations {size(self.activations)} on {self.place}"
        kept += f", for all blocks {size(self.whole)}" if self.whole else ""
        parts = f"forwards {span(self.forwards)}, sums {span(self.summing)}, pruning {span(self.pruning)}"
        return f"memory: {memory}; {kept}\ntime: about {span(self.seconds)} ({parts})"


@dataclass(frozen=True)
class _Input:
    """What feeds some weights of a stage: `matrices` inputs alike, of experts, or one."""

    subgraph: str
    columns: int
    rows: int
    gram: bool
    matrices: int = 1
    share: float = 1.0
    """Of the tokens, that reaches it."""

    @property
    def sums(self) -> int:
        """Bytes of its sums and of the tokens set aside."""
        return _FLOAT * self.matrices * self.columns * ((self.columns if self.gram else 1) + SAMPLE)

    @property
    def solving(self) -> int:
        """Bytes while its weights are settled, one matrix after the other: factor and its source, weights in float32
        before and after; or scores of a part, and masks."""
        if self.gram:
            return 2 * _FLOAT * self.columns * (self.columns + self.rows)
        return 2 * self.columns * self.rows

    def operations(self, tokens: int) -> tuple[float, float]:
        """Of summing, by halves of a square; and of one Cholesky factor, elimination and ranking."""
        summing = tokens * self.share * self.columns * (self.columns if self.gram else _READING)
        solving = self.columns**3 / 3 + self.rows * self.columns**2 if self.gram else 0.0
        ranking = RANKING * self.rows * self.columns
        return self.matrices * summing, self.matrices * (solving + ranking)


def costs_of(run: OneshotRun) -> tuple[ModelTrace | None, Costs]:
    """What a run would cost, and what a forward showed; no probe where no input matters."""
    layers = list(dict.fromkeys([*run.dense_pass_layers, *run.seen]))
    tokens, share, speed, seconds, kept = sum(map(_width, run.own)), 0.0, _UNKNOWN_SPEED, 0.0, 0
    trace, inputs, sample = None, [], None
    if run.batches:
        sample = _sample(run.model, run.batches[0])
        share = tokens / max(1, _width(sample))
    if layers:
        trace = trace_model(run.model, layers, run.batches[0], run.config.sequential)
        inputs = _inputs(run, trace)
        with BlockPipeline(run.model, [sample], "device") as pipeline:
            entry = _timed(lambda: pipeline.run_until(_entrance(trace)))
            body = max(_timed(lambda: pipeline.run_until(trace.subgraphs[-1])) - entry, 1e-9)
            first = {
                subgraph.stack: subgraph.name for subgraph in reversed(trace.subgraphs) if subgraph.stack is not None
            }
            kept = int(share * sum(_bytes(pipeline.output(name, 0)) for name in first.values()))
        speed = (
            sum(2 * _width(sample) * each.share * each.rows * each.columns * each.matrices for each in inputs) / body
        )
        seconds = share * _passes(run, trace, body, entry)
    if any(group.requires_gradients for group in run.groups):
        seconds += 3 * share * _timed(lambda: _forward(run.model, sample))
    summing, pruning = map(sum, zip(*(each.operations(tokens) for each in inputs))) if inputs else (0.0, 0.0)
    known = set(layers)
    pruning += RANKING * sum(layer.numel for group in run.groups for layer in group.layers if layer not in known)
    memory = _memory(run, trace, inputs)
    return trace, Costs(run.config.activations, *memory, kept, _whole(run), seconds, summing / speed, pruning / speed)


def _sample(model: nn.Module, batch: Any) -> Any:
    """The first row of a batch, or all of it where that is quick: what a row costs falls with their number."""
    row = first_row(batch)
    _timed(lambda: _forward(model, row))  # the first forward of a process is slow
    return batch if _timed(lambda: _forward(model, row)) < _QUICK else row


def _forward(model: nn.Module, batch: Any) -> None:
    with torch.no_grad(), evaluation_mode(model):
        call_model(model, to_device(batch, input_device(model)))


def _timed(work: Callable[[], Any]) -> float:
    """Seconds, GPUs included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _width(batch: Any) -> int:
    """How many tokens are computed, padding included."""
    return count_tokens(
        {name: value for name, value in batch.items() if name != "attention_mask"}
        if isinstance(batch, Mapping)
        else batch
    )


def _bytes(structure: Any) -> int:
    return sum(leaf.nbytes for leaf in _pytree.tree_leaves(structure) if torch.is_tensor(leaf))


def _entrance(trace: ModelTrace) -> Subgraph:
    """What a model does before its first block."""
    blocks = [subgraph.name for subgraph in trace.subgraphs if subgraph.stack is not None]
    return Subgraph("before the blocks", (), until=blocks[0]) if blocks else trace.subgraphs[0]


def _inputs(run: OneshotRun, trace: ModelTrace) -> list[_Input]:
    config = getattr(run.model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    found = []
    for subgraph in trace.subgraphs:
        fed: dict[str, list[PrunableLayer]] = {}
        for layer in subgraph.layers:
            rows, _, columns = layer.matrix_shape
            if layer.expert_dim is not None:
                experts = layer.shape[0]
                found.append(
                    _Input(subgraph.name, columns, rows, _solves(run, layer), experts, min(1.0, chosen / experts))
                )
            else:
                fed.setdefault(trace.leaders[layer.module], []).append(layer)
        for layers in fed.values():
            rows = sum(layer.matrix_shape[0] for layer in layers)
            gram = any(_solves(run, layer) for layer in layers)
            found.append(_Input(subgraph.name, layers[0].matrix_shape[2], rows, gram))
    return found


def _solves(run: OneshotRun, layer: PrunableLayer) -> bool:
    return bool(run.group_of[layer.name].options.solver.requires & Requires.GRAM)


def _passes(run: OneshotRun, trace: ModelTrace, body: float, entry: float) -> float:
    """Seconds of all forwards over the sample. Each stage begins anew before the first block."""
    count = len(trace.subgraphs)
    once = body + count * entry
    total = once if run.dense_pass_layers else 0.0
    if run.seen and run.config.sequential and run.config.forwards == 2:
        total += (2 - 1 / count) * body + (2 * count - 1) * entry
    elif run.seen:
        total += once
    return total


def _memory(run: OneshotRun, trace: ModelTrace | None, inputs: list[_Input]) -> tuple[int, int, int]:
    """Bytes of the largest block, of the sums of one block, and while an input's weights are solved."""
    sums: dict[str, int] = {}
    for each in inputs:
        at_once = (
            max(sums.get(each.subgraph, 0), each.sums)
            if run.config.forwards == 1
            else sums.get(each.subgraph, 0) + each.sums
        )
        sums[each.subgraph] = at_once
    blocks = [0]
    for subgraph in trace.subgraphs if trace else ():
        names = [subgraph.name] if subgraph.stack is not None else {layer.module for layer in subgraph.layers}
        weights = (parameter for name in names for parameter in run.model.get_submodule(name).parameters())
        blocks.append(sum(weight.nbytes for weight in weights))
    return max(blocks), max(sums.values(), default=0), max((each.solving for each in inputs), default=0)


def _whole(run: OneshotRun) -> int:
    """Bytes of gradients, of a float32 sum for each weight scored by them, and of a mask, made as int8 and as bool."""
    learning = [group for group in run.groups if group.requires_gradients]
    total = sum(weight.nbytes for weight in run.model.parameters()) if learning else 0
    total += sum(_FLOAT * layer.numel for group in learning for layer in group.layers)
    return total + sum(2 * layer.numel for group in run.dense for layer in group.layers)


def size(count: int) -> str:
    """Bytes for people.

    Example:
        >>> size(1_500_000), size(20)
        ('1.5 MB', '20 B')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def span(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> span(7384), span(75), span(0.5)
        ('2 h 3 min', '1 min 15 s', '0.5 s')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s"
