"""Pruned blocks while they are tuned: their error against the dense model, gradients, Adam and zeros."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import mask_for_inputs, num_rows, token_masks
from ..engine.masks import MaskStore
from ..model.blocks import is_within
from .pipeline import CURRENT, BlockPipeline, Subgraph
from .prepare import PreparedRun
from .tuning_samples import TuningSamples


DENSE = "dense"
"""The stream of a pipeline that holds the outputs of the dense model."""

_RELATIVE_EPS = 1e-3
"""eps of Adam, as a share of the root mean square of a parameter's first gradient."""


def dense_inputs(block: Subgraph) -> str:
    """Returns the name of the stream that has the inputs of a block in the dense model."""
    return f"dense inputs of {block.name}"


def pruned_parameters(run: PreparedRun, blocks: Sequence[Subgraph]) -> dict[str, torch.Tensor]:
    """Returns the parameters of blocks whose zeros are kept: the selected weights, and the biases of units."""
    names = (name for group in run.groups for name in group.options.parameter_shapes)
    inside = dict.fromkeys(name for name in names if any(is_within(name, block.name) for block in blocks))
    return {name: run.model.get_parameter(name).detach() for name in inside}


def tuned_parameters(run: PreparedRun, blocks: Sequence[Subgraph]) -> dict[str, nn.Parameter]:
    """Returns the parameters of blocks that are tuned: all of a floating dtype in blocks with pruned layers, except
    those of embeddings and those that modules outside of the block share."""
    tuned: dict[str, nn.Parameter] = {}
    for block in (block for block in blocks if block.layers):
        module = run.model.get_submodule(block.name)
        named = run.model.named_parameters(remove_duplicate=False)
        fixed = {id(weight) for name, weight in named if not is_within(name, block.name)}
        embeddings = (part for part in module.modules() if isinstance(part, nn.Embedding))
        fixed |= {id(weight) for part in embeddings for weight in part.parameters()}
        tuned |= {
            f"{block.name}.{name}": weight
            for name, weight in module.named_parameters()
            if id(weight) not in fixed and weight.is_floating_point()
        }
    return tuned


def tuning_bytes(run: PreparedRun, blocks: Sequence[Subgraph]) -> int:
    """Returns the memory for tuning blocks together: gradients, moments of Adam and copies of weights of other dtypes,
    in float32; the weights at the start and the best ones; masks."""
    total = sum(weight.numel() for weight in pruned_parameters(run, blocks).values())
    for weight in tuned_parameters(run, blocks).values():
        is_float32 = weight.dtype == torch.float32
        total += weight.numel() * (3 * 4 + (0 if is_float32 else 4)) + 2 * weight.nbytes
    return total


class TunedBlocks:
    """Consecutive blocks with float32 parameters for an optimizer, on all ranks at once.

    A context manager: inside, the parameters that are tuned, and no others of the blocks, have gradients.

    Args:
        run: the model, the batches of this rank and the ranks.
        samples: the batches of all ranks, and which of them are held out.
        pipeline: over the batches of this rank, with the dense outputs of the last block in the stream `DENSE`.
        blocks: the blocks. Zeros of their pruned parameters remain.
        is_encoder_decoder: see `token_masks`.
        inputs: the stream of the pipeline from which the blocks get their inputs.
    """

    def __init__(
        self,
        run: PreparedRun,
        samples: TuningSamples,
        pipeline: BlockPipeline,
        blocks: Sequence[Subgraph],
        is_encoder_decoder: bool,
        inputs: str = CURRENT,
    ):
        self._communicator, self._batches, self._samples = run.communicator, run.local_batches, samples
        self._pipeline, self._first, self._last = pipeline, blocks[0], blocks[-1]
        self._is_encoder_decoder, self._inputs = is_encoder_decoder, inputs
        self._modules = [run.model.get_submodule(block.name) for block in blocks]
        self._parameters = tuned_parameters(run, blocks)
        pruned = pruned_parameters(run, blocks)
        self._masks = MaskStore({name: (weight.shape, weight.device) for name, weight in pruned.items()})
        for name, weight in pruned.items():
            self._masks.replace(name, weight != 0)
        self._rows = [num_rows(batch) or 1 for batch in samples.batches]
        self._scales = _scales(self._parameters)
        self._masters: dict[str, torch.Tensor] = {}
        self._eps: dict[str, float] = {}
        self._energy = 1.0
        """‖Y‖² of a held-out sample, on average."""

    def __enter__(self) -> TunedBlocks:
        self._context = _gradients_of(self._modules, self._parameters.values())
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(None, None, None)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns copies of the parameters."""
        return {name: weight.detach().clone() for name, weight in self._parameters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Sets the parameters to a `state`."""
        for name, weight in self._parameters.items():
            weight.detach().copy_(state[name])

    def new_optimizer(self) -> torch.optim.Adam:
        """Returns Adam over the parameters as they are, or over float32 copies of those of another dtype. Each has a
        group of its own with its "scale", the root mean square of its entries.

        eps is in proportion to the first gradient of a parameter, so that gradients which are zero but for rounding,
        as those of the biases of keys, move nothing.
        """
        self._masters = {
            name: weight if weight.dtype == torch.float32 else weight.detach().float()
            for name, weight in self._parameters.items()
        }
        if not self._eps:
            self.compute_gradients(self._samples.steps[0])
            gradients = {name: master.grad for name, master in self._masters.items() if master.grad is not None}
            sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in gradients.items()}
            least = 1e-2 * max(sizes.values())
            self._eps = {name: _RELATIVE_EPS * max(size, least) for name, size in sizes.items()}
        groups = [
            {"params": [master], "scale": self._scales[name], "eps": self._eps[name]}
            for name, master in self._masters.items()
        ]
        return torch.optim.Adam(groups)

    def update(self) -> None:
        """Copies what the optimizer has computed to the parameters, with their zeros."""
        for name, weight in self._parameters.items():
            if self._masters[name] is not weight:
                weight.detach().copy_(self._masters[name])
        self._masks.enforce({name: weight.detach() for name, weight in self._parameters.items()})

    def compute_gradients(self, numbers: range) -> None:
        """Sets the gradients for the optimizer to those of the error on some of the batches, of all ranks."""
        rows, error = sum(self._rows[number] for number in numbers), None
        for master in self._masters.values():
            master.grad = torch.zeros_like(master)
        try:
            for index in self._local(numbers):
                squares, _ = self._squared_error(index, gradients=True)
                with torch.enable_grad():
                    (squares / (self._energy * rows)).backward()
                self._move_gradients()
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
        self._communicator.raise_together(error)
        for master in self._masters.values():
            if master.grad is not None:
                self._communicator.all_reduce(master.grad)

    def _move_gradients(self) -> None:
        """Add the gradients of parameters of another dtype to those of their float32 copies."""
        for name, weight in self._parameters.items():
            master = self._masters[name]
            if master is not weight and weight.grad is not None and master.grad is not None:
                master.grad += weight.grad
                weight.grad = None

    def held_out_error(self) -> float:
        """Returns ‖Y - Ŷ‖² / ‖Y‖² on the held-out samples of all ranks; inf where it is not finite."""
        total, error = torch.zeros(2, dtype=torch.float64), None
        try:
            for index in self._local(self._samples.holdout):
                total += torch.stack(self._squared_error(index)).to("cpu", torch.float64)
        except Exception as exception:  # as above
            error = exception
        self._communicator.raise_together(error)
        self._communicator.all_reduce(total)
        squares, energy = total.tolist()
        if energy > 0:
            self._energy = energy / sum(self._rows[number] for number in self._samples.holdout)
        relative = squares / energy if energy else 0.0
        return relative if math.isfinite(relative) else math.inf

    def _local(self, numbers: range) -> Iterator[int]:
        """The numbers that batches of this rank have among its own."""
        rank, world_size = self._communicator.rank, self._communicator.world_size
        return (number // world_size for number in numbers if number % world_size == rank)

    def _squared_error(self, index: int, gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """‖Y - Ŷ‖² and ‖Y‖² of a batch, over the tokens that count."""
        first = self._first.name if gradients else None
        with self._pipeline.stream(self._inputs):
            output = _first_tensor(self._pipeline.block_output(self._last.name, index, first))
        with self._pipeline.stream(DENSE):
            target = _first_tensor(self._pipeline.cached_output(self._last, index)).float()
        masks = token_masks(self._batches[index], self._is_encoder_decoder)
        mask = mask_for_inputs([mask.to(output.device) for mask in masks], output)
        with torch.set_grad_enabled(gradients):
            difference = output.float() - target
            if mask is not None:
                difference, target = difference[mask], target[mask]
            return difference.square().sum(), target.square().sum()


def _first_tensor(output: Any) -> torch.Tensor:
    """The hidden states among the outputs of a block."""
    return next(leaf for leaf in _pytree.tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point())


def _scales(parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The root mean square of each parameter's entries that are not zero; that of all matrices where it is smaller, as
    for biases that are zero."""
    squares = {name: float(weight.detach().float().square().sum()) for name, weight in parameters.items()}
    counts = {name: max(1, int(torch.count_nonzero(weight.detach()))) for name, weight in parameters.items()}
    matrices = [name for name, weight in parameters.items() if weight.ndim > 1]
    least = sum(squares[name] for name in matrices) / max(1, sum(counts[name] for name in matrices))
    return {name: math.sqrt(max(least, squares[name] / counts[name])) or 1.0 for name in parameters}


@contextmanager
def _gradients_of(blocks: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which these parameters of blocks alone have gradients, all of which are removed at the end."""
    weights = {id(weight): weight for block in blocks for weight in block.parameters()}
    before = [(weight, weight.requires_grad, weight.grad) for weight in weights.values()]
    tuned = {id(weight) for weight in parameters}
    try:
        for weight, _, _ in before:
            weight.grad = None
            if weight.is_floating_point():
                weight.requires_grad_(id(weight) in tuned)
        yield
    finally:
        for weight, requires_grad, gradient in before:
            weight.requires_grad_(requires_grad)
            weight.grad = gradient
