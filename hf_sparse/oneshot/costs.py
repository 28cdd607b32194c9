"""Estimates the costs of a one-shot run: memory by counting, time from the speed of a few forwards.

Shapes: T tokens, C inputs of a weight, R rows of all weights that share an input.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..allocations import MeasuringAllocation
from ..calibration.batches import call_model, count_tokens, first_row, to_device
from ..distributed import input_device
from ..model.evaluation_mode import evaluation_mode
from ..model.layers import PrunableLayer
from ..requires import Requires
from ..selection.channel_order import ROUNDS
from ..solvers import Solver
from .free_channels import reading_weight
from .observers import SAMPLE
from .pipeline import BlockPipeline, Subgraph
from .prepare import PreparedRun
from .reconstruct import tuning_passes
from .tracing import ModelTrace
from .tuned_blocks import tuning_bytes
from .unit_scores import UnitReader


RANKING_OPERATIONS = 1000
"""Multiply-adds in the time that ranking one weight takes, on a CPU that multiplies large matrices at full speed."""

EXCHANGE_OPERATIONS = 200
"""The same for comparing one score with those of another channel, when channels are permuted."""

_NORM_OPERATIONS = 30
"""The same for squaring one input and adding it to a sum."""

_SWAP_OPERATIONS = 1000
"""The same for one input of a row in one round of swaps."""

_INPUTS_PER_SWAP = 16
"""The number of inputs of a row for each swap that lowers its error."""

_DEFAULT_SPEED = 1e11
"""Multiply-adds per second where no forward was measured."""

_SHORT_FORWARD = 1.0
"""Seconds of a forward below which a whole batch is measured, not only its first row."""

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """Memory and time of a one-shot run on one rank.

    The memory of a forward is not included: of one batch, or with `forwards=1` of all calibration data.

    Args:
        activation_storage: where activations are cached: cpu, disk or device.
        block_bytes: the weights of the largest block.
        statistics_bytes: the statistics of one block, at most.
        solver_bytes: factors and copies while the weights that share an input are solved, or scores while the
            allocation measures a block, at most.
        activation_bytes: the cached outputs of blocks for all calibration data of the rank.
        model_wide_bytes: what is held for all blocks: gradients and their statistics, masks of globally ranked groups.
        reconstruction_bytes: gradients, moments of Adam and copies of the parameters of a block that is tuned.
        forward_seconds: forwards and backwards.
        statistics_seconds: accumulating statistics.
        pruning_seconds: ranking and solving.
        reconstruction_seconds: tuning the blocks.
    """

    activation_storage: str
    block_bytes: int
    statistics_bytes: int
    solver_bytes: int
    activation_bytes: int
    model_wide_bytes: int
    reconstruction_bytes: int
    forward_seconds: float
    statistics_seconds: float
    pruning_seconds: float
    reconstruction_seconds: float

    @property
    def seconds(self) -> float:
        """Estimated time of the whole run, in seconds."""
        pruning = self.statistics_seconds + self.pruning_seconds
        return self.forward_seconds + pruning + self.reconstruction_seconds

    def __str__(self) -> str:
        memory = [
            f"largest block {format_bytes(self.block_bytes)}",
            f"its statistics {format_bytes(self.statistics_bytes)}",
            f"solver {format_bytes(self.solver_bytes)}",
            f"activations {format_bytes(self.activation_bytes)} on {self.activation_storage}",
        ]
        if self.model_wide_bytes:
            memory.append(f"for all blocks {format_bytes(self.model_wide_bytes)}")
        times = {
            "forwards": self.forward_seconds,
            "statistics": self.statistics_seconds,
            "pruning": self.pruning_seconds,
        }
        if self.reconstruction_bytes:
            memory.append(f"reconstruction {format_bytes(self.reconstruction_bytes)}")
            times["reconstruction"] = self.reconstruction_seconds
        parts = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in times.items())
        return f"memory: {', '.join(memory)}\ntime: about {format_seconds(self.seconds)} ({parts})"


@dataclass(frozen=True)
class _SharedInput:
    """An input that some weights of a subgraph share, or the inputs of all experts of a weight.

    Args:
        subgraph: name of the subgraph.
        columns: C.
        rows: R.
        gram: whether its statistic is a Gram matrix.
        solver_rows: the solvers, and for each the rows of its weights.
        experts: the number of inputs, one for each expert; 1 for other layers.
        token_share: the share of the tokens that reaches each expert.
        weighted: whether outputs are computed again to weight the tokens.
        greedy: whether the criterion removes units one after the other.
        swaps: the number of swaps in all rows together.
    """

    subgraph: str
    columns: int
    rows: int
    gram: bool
    solver_rows: Mapping[Solver, int] = field(default_factory=dict)
    experts: int = 1
    token_share: float = 1.0
    weighted: bool = False
    greedy: bool = False
    swaps: int = 0

    @property
    def statistics_bytes(self) -> int:
        """Bytes of its statistic and of the sampled tokens."""
        return _FLOAT_BYTES * self.experts * self.columns * ((self.columns if self.gram else 1) + SAMPLE)

    @property
    def solver_bytes(self) -> int:
        """Bytes while one matrix is pruned: factor and Gram matrix, float32 weights before and after; or two masks."""
        if self.gram:
            return 2 * _FLOAT_BYTES * self.columns * (self.columns + self.rows)
        return 2 * self.columns * self.rows

    def operations(self, tokens: float) -> tuple[float, float]:
        """Multiply-adds of its statistic (half a square) and of pruning (solving, ranking)."""
        solving = sum(
            solver.factor_operations(self.columns) + solver.operations(rows, self.columns)
            for solver, rows in self.solver_rows.items()
        )
        # Of the greedy removal an inverse, and the products that update it and the weights.
        solving += self.greedy * self.columns**2 * (2 * self.columns + self.rows)
        ranking = RANKING_OPERATIONS * self.rows * self.columns + _SWAP_OPERATIONS * self.swaps * self.columns
        return self.statistic_operations(tokens), self.experts * (solving + ranking)

    def statistic_operations(self, tokens: float) -> float:
        """Multiply-adds of its statistic."""
        each = tokens * self.token_share * self.columns * (self.columns if self.gram else _NORM_OPERATIONS)
        each += tokens * self.token_share * self.columns * self.rows * self.weighted
        return self.experts * each


def estimate_costs(run: PreparedRun, trace: ModelTrace | None) -> Costs:
    """Returns the costs of a run. Its trace is None if no inputs are observed."""
    num_tokens = sum(map(_count_computed_tokens, run.local_batches))
    inputs: list[_SharedInput] = []
    speed, forward_seconds, activation_bytes, num_samples = _DEFAULT_SPEED, 0.0, 0, 0.0
    sample, tuning_seconds = None, 0.0
    if run.batches:
        sample = _sample(run.model, run.batches[0])
        num_samples = num_tokens / max(1, _count_computed_tokens(sample))
    if trace is not None:
        inputs = _shared_inputs(run, trace)
        with BlockPipeline(run.model, [sample], "device") as pipeline:
            before_blocks = _measure(lambda: pipeline.run_until(_before_blocks(trace)))
            blocks = max(_measure(lambda: pipeline.run_until(trace.subgraphs[-1])) - before_blocks, 1e-9)
            first_blocks = {subgraph.block_list: subgraph.name for subgraph in reversed(trace.subgraphs)}
            first_blocks.pop(None, None)
            outputs = {name: _tensor_bytes(pipeline.block_output(block, 0)) for name, block in first_blocks.items()}
            activation_bytes = int(num_samples * _activation_bytes(run, trace, outputs))
        products = sum(shared.token_share * shared.rows * shared.columns * shared.experts for shared in inputs)
        speed = 2 * _count_computed_tokens(sample) * products / blocks
        forward_seconds = num_samples * _forward_seconds(run, trace, blocks, before_blocks)
        tuning_seconds = num_samples * _tuning_seconds(run, trace, blocks, before_blocks)
    if any(group.requires_gradients for group in run.groups) or run.layers_requiring(Requires.OUTPUT_GRADIENTS):
        forward_seconds += 3 * num_samples * _measure(lambda: _forward(run.model, sample))
    operations = [shared.operations(num_tokens) for shared in inputs]
    measured = [] if trace is None else _shared_inputs(run, trace, dense=True)
    measuring = sum(shared.statistic_operations(num_tokens) for shared in measured), _measuring_operations(run)
    permuting, permuting_bytes = _permutation_costs(run)
    observed = {layer for subgraph in (trace.subgraphs if trace else ()) for layer in subgraph.layers}
    unobserved = sum(layer.numel for group in run.groups for layer in group.layers if layer not in observed)
    return Costs(
        activation_storage=str(run.config.activations),
        block_bytes=_largest_block_bytes(run.model, trace.subgraphs if trace else ()),
        statistics_bytes=max(
            _largest_statistics_bytes(inputs, run.single_forward), _largest_statistics_bytes(measured, False)
        ),
        solver_bytes=max([*(shared.solver_bytes for shared in inputs), _measuring_bytes(measured), permuting_bytes]),
        activation_bytes=activation_bytes,
        model_wide_bytes=_model_wide_bytes(run),
        reconstruction_bytes=max((tuning_bytes(run, window) for window in _windows(run, trace)), default=0),
        forward_seconds=forward_seconds,
        statistics_seconds=(sum(statistic for statistic, _ in operations) + measuring[0]) / speed,
        pruning_seconds=(
            sum(pruning for _, pruning in operations) + RANKING_OPERATIONS * unobserved + measuring[1] + permuting
        )
        / speed,
        reconstruction_seconds=tuning_seconds,
    )


def _activation_bytes(run: PreparedRun, trace: ModelTrace, outputs: Mapping[str | None, int]) -> int:
    """Bytes of all outputs that are cached at once, for those of one block of each list: of the pruned model; with
    reconstruction of the dense model as well; with dense inputs those of the blocks of a window, but for the first
    block of a list, too."""
    options, total = run.config.reconstruction, sum(outputs.values())
    if options is None:
        return total
    total *= 2
    if options.inputs == "dense":
        counts = Counter(subgraph.block_list for subgraph in trace.subgraphs)
        total += max(min(options.window, counts[name] - 1) * size for name, size in outputs.items())
    return total


def _tensor_bytes(output: Any) -> int:
    return sum(leaf.nbytes for leaf in _pytree.tree_leaves(output) if torch.is_tensor(leaf))


def _sample(model: nn.Module, batch: Any) -> Any:
    """The first row of a batch, or all of it if that is fast: rows are cheaper in a large batch."""
    row = first_row(batch)
    _forward(model, row)  # the first forward of a process is slow
    return batch if _measure(lambda: _forward(model, row)) < _SHORT_FORWARD else row


def _forward(model: nn.Module, batch: Any) -> None:
    with torch.no_grad(), evaluation_mode(model):
        call_model(model, to_device(batch, input_device(model)))


def _measure(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, on GPUs as well."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _count_computed_tokens(batch: Any) -> int:
    """The number of tokens of a batch, padding included."""
    if isinstance(batch, Mapping):
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}
    return count_tokens(batch)


def _before_blocks(trace: ModelTrace) -> Subgraph:
    """The part of the model before its first block."""
    first = next((subgraph.name for subgraph in trace.subgraphs if subgraph.is_block), None)
    return trace.subgraphs[0] if first is None else Subgraph("before the blocks", (), stop_before=first)


def _shared_inputs(run: PreparedRun, trace: ModelTrace, dense: bool = False) -> list[_SharedInput]:
    """The inputs of all observed layers; with `dense` those that allocations measure in the dense model."""
    gram_layers = run.layers_requiring(Requires.DENSE_GRAM if dense else Requires.GRAM)
    measured = run.layers_requiring(Requires.DENSE_INPUTS)
    config = getattr(run.model, "config", None)
    experts_per_token = getattr(config, "num_experts_per_tok", None) or 1
    inputs = []
    for subgraph in trace.subgraphs:
        readers: dict[str, list[PrunableLayer]] = {}
        units = {name: reader for (name, _), reader in run.unit_readers.items()}
        for layer in (layer for layer in subgraph.layers if not dense or layer in measured):
            if layer.expert_dim is None:
                first = layer.module if layer.name in units else trace.shared_inputs[layer.module]
                readers.setdefault(first, []).append(layer)
                continue
            rows, _, columns = layer.matrix_shape
            experts = layer.shape[0]
            share = min(1.0, experts_per_token / experts)
            solvers = _solver_rows(run, [layer])
            kinds, swaps = _unit_costs(units.get(layer.name)), _count_swaps(run, [layer])
            gram = layer in gram_layers
            inputs.append(_SharedInput(subgraph.name, columns, rows, gram, solvers, experts, share, *kinds, swaps))
        for layers in readers.values():
            rows = sum(layer.matrix_shape[0] for layer in layers)
            gram = not gram_layers.isdisjoint(layers)
            kinds, columns = _unit_costs(units.get(layers[0].name)), layers[0].matrix_shape[2]
            solvers, swaps = _solver_rows(run, layers), _count_swaps(run, layers)
            inputs.append(_SharedInput(subgraph.name, columns, rows, gram, solvers, 1, 1.0, *kinds, swaps))
    return inputs


def _permutation_costs(run: PreparedRun) -> tuple[float, int]:
    """The multiply-adds of finding the orders of channels, and bytes of scores for one weight."""
    reading = {reading_weight(units) for units in run.free_channels}
    layers = [layer for group in run.groups for layer in group.layers if layer.name in reading]
    comparisons = sum(run.group_of[layer.name].pattern.n_of_m[1] * layer.numel for layer in layers)
    most = max((layer.numel for layer in layers), default=0)
    return float(EXCHANGE_OPERATIONS * ROUNDS * comparisons), 4 * _FLOAT_BYTES * most


def _solver_rows(run: PreparedRun, layers: Sequence[PrunableLayer]) -> dict[Solver, int]:
    """The solvers of layers that share an input, and for each the rows of its weights."""
    rows: Counter[Solver] = Counter()
    for layer in layers:
        rows[run.group_of[layer.name].options.solver] += layer.matrix_shape[0]
    return dict(rows)


def _count_swaps(run: PreparedRun, layers: Sequence[PrunableLayer]) -> int:
    """The number of swaps in all rows of layers together, at most."""
    return sum(
        layer.matrix_shape[0] * min(run.group_of[layer.name].options.swaps, layer.matrix_shape[2] // _INPUTS_PER_SWAP)
        for layer in layers
    )


def _unit_costs(reader: UnitReader | None) -> tuple[bool, bool]:
    """Whether the inputs of a layer are weighted by its outputs, and whether its units are removed greedily."""
    return reader is not None, reader is not None and bool(reader.criterion.requires & Requires.GRAM)


def _forward_seconds(run: PreparedRun, trace: ModelTrace, blocks: float, before_blocks: float) -> float:
    """Seconds of all forwards over the sample. `blocks` are those of the blocks, `before_blocks` those
    of what is before them, which runs again for every subgraph."""
    count = len(trace.subgraphs)
    one_pass = blocks + count * before_blocks
    total = one_pass if run.dense_pass_layers else 0.0
    if run.calibrated_layers and run.config.sequential and not run.single_forward:
        total += (2 - 1 / count) * blocks + (2 * count - 1) * before_blocks
    elif run.calibrated_layers:
        total += one_pass
    return total


def _windows(run: PreparedRun, trace: ModelTrace | None) -> list[list[Subgraph]]:
    """The blocks that are tuned together, for each block that is pruned."""
    options, windows = run.config.reconstruction, []
    if options is None or trace is None:
        return []
    for number, subgraph in enumerate(trace.subgraphs):
        if subgraph.is_block and subgraph.layers:
            before = trace.subgraphs[max(0, number + 1 - options.window) : number + 1]
            windows.append([block for block in before if block.block_list == subgraph.block_list])
    return windows


def _tuning_seconds(run: PreparedRun, trace: ModelTrace, blocks: float, before_blocks: float) -> float:
    """Seconds of tuning with all data, for forwards of the sample that take as long as in `_forward_seconds`. Beside
    the forward, a step takes two more for the gradients; the dense outputs take one forward of each block."""
    options, samples = run.config.reconstruction, run.samples
    if options is None or samples is None:
        return 0.0
    count, sizes = len(trace.subgraphs), [len(window) for window in _windows(run, trace)]
    passes, evaluations = tuning_passes(options, samples)
    of_block = blocks / count
    seconds = blocks + count * before_blocks
    for size in sizes:
        seconds += passes * (3 * size * of_block + before_blocks) + evaluations * (size * of_block + before_blocks)
        seconds += 2 * (size - 1) * of_block  # the blocks before, when inputs are observed and outputs propagated
    return seconds


def _measuring_bytes(inputs: Sequence[_SharedInput]) -> int:
    """Scores of the weights of a subgraph, and a copy, while an allocation measures them."""
    totals: dict[str, int] = {}
    for shared in inputs:
        weights = shared.experts * shared.rows * shared.columns
        totals[shared.subgraph] = totals.get(shared.subgraph, 0) + 2 * _FLOAT_BYTES * weights
    return max(totals.values(), default=0)


def _measuring_operations(run: PreparedRun) -> float:
    """Multiply-adds with which allocations measure the layers, ranking or sorting their weights included."""
    total = 0.0
    for group in run.groups:
        allocation = group.options.allocation
        if group.target and isinstance(allocation, MeasuringAllocation):
            for layer in group.layers:
                rows, _, columns = layer.matrix_shape
                total += RANKING_OPERATIONS * layer.numel
                total += layer.num_matrices * allocation.operations(rows, columns)
    return total


def _largest_statistics_bytes(inputs: Sequence[_SharedInput], single_forward: bool) -> int:
    """Of all inputs of a subgraph; in a single forward, of one input at a time."""
    totals: dict[str, int] = {}
    for shared in inputs:
        both = (totals.get(shared.subgraph, 0), shared.statistics_bytes)
        totals[shared.subgraph] = max(both) if single_forward else sum(both)
    return max(totals.values(), default=0)


def _largest_block_bytes(model: nn.Module, subgraphs: Sequence[Subgraph]) -> int:
    blocks = ([model.get_submodule(name) for name in subgraph.modules] for subgraph in subgraphs)
    return max((sum(weight.nbytes for part in parts for weight in part.parameters()) for parts in blocks), default=0)


def _model_wide_bytes(run: PreparedRun) -> int:
    """Gradients, a float32 statistic for each weight whose criterion has one, and masks as int8 and as bool."""
    groups = [group for group in run.groups if group.requires_gradients]
    total = sum(weight.nbytes for weight in run.model.parameters()) if groups else 0
    prepared = [group for group in run.dense_ranked_groups if group.required_criterion.prepares_statistic]
    total += sum(_FLOAT_BYTES * layer.numel for group in groups + prepared for layer in group.layers)
    return total + sum(2 * layer.numel for group in run.dense_ranked_groups for layer in group.layers)


def format_bytes(count: int) -> str:
    """Returns a number of bytes with a unit.

    Example:
        >>> format_bytes(1_500_000), format_bytes(20)
        ('1.5 MB', '20 B')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """Returns a time in hours, minutes and seconds.

    Example:
        >>> format_seconds(7384), format_seconds(75), format_seconds(0.5)
        ('2 h 3 min', '1 min 15 s', '0.5 s')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s"
