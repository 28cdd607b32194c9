"""Block reconstruction: tunes the remaining weights of a pruned block, so that its outputs are those of the dense one.

Reference: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", 2024; "A Free Lunch in LLM
Compression: Revisiting Retraining after Pruning", 2025 (arXiv 2510.14444).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import mask_for_inputs, num_rows, token_masks
from ..config import Reconstruction
from ..engine.masks import MaskStore
from ..model.blocks import is_within
from .pipeline import BlockPipeline, Subgraph
from .prepare import PreparedRun


logger = logging.getLogger(__name__)

_DENSE = "dense"
"""The stream of the dense model."""

_FIRST_RATE, _RATE_FACTOR, _MOST_TRIALS = 0.01, 3.0, 3
"""The first learning rate that is tried, the ratio of one to the next, and how many are tried above or below it."""

_TRIAL_SHARE, _LEAST_TRIAL_STEPS = 0.1, 10
"""Steps of a trial, as a share of all steps."""

_RELATIVE_EPS = 1e-3
"""eps of Adam, as a share of the root mean square of a parameter's first gradient."""

_NUM_EVALUATIONS = 10
"""How often the error on the held-out samples is measured while a block is tuned."""


@dataclass(frozen=True)
class ReconstructedBlock:
    """What tuning a block has achieved.

    Args:
        before, after: ‖Y - Ŷ‖² / ‖Y‖² on the held-out samples, for outputs Y of the dense model, Ŷ of the pruned one.
        learning_rate: of the first step; 0 if there was no error.
    """

    before: float
    after: float
    learning_rate: float

    def __str__(self) -> str:
        return f"reconstructed, error {self.before:.4f} -> {self.after:.4f}"


class BlockReconstructor:
    """Tunes the blocks of a model, on all ranks at once.

    Args:
        run: with `samples`.
        pipeline: over the local batches of the run. Its own stream is the one of the pruned model.
        is_encoder_decoder: see `token_masks`.
    """

    def __init__(self, run: PreparedRun, pipeline: BlockPipeline, is_encoder_decoder: bool):
        if run.samples is None:
            raise ValueError("the run has no samples for reconstruction")
        self._run, self._pipeline, self._samples = run, pipeline, run.samples
        self._options: Reconstruction = run.config.reconstruction or Reconstruction()
        self._is_encoder_decoder = is_encoder_decoder

    def observe_dense(self, subgraph: Subgraph) -> None:
        """Computes the outputs of a block in the dense model, before it is pruned. To be called for each block in
        order."""
        error = None
        try:
            with self._pipeline.stream(_DENSE):
                self._pipeline.propagate(subgraph)
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
        self._run.communicator.raise_together(error)

    def pruned_parameters(self, subgraph: Subgraph) -> dict[str, torch.Tensor]:
        """Returns the parameters of a block whose zeros are kept: the selected weights, and the biases of units."""
        names = (name for group in self._run.groups for name in group.options.parameter_shapes)
        inside = dict.fromkeys(name for name in names if is_within(name, subgraph.name))
        return {name: self._run.model.get_parameter(name).detach() for name in inside}

    def tuned_parameters(self, subgraph: Subgraph) -> dict[str, nn.Parameter]:
        """Returns the parameters of a block that are tuned: all of a floating dtype, except those of embeddings and
        those that modules outside the block share."""
        block = self._run.model.get_submodule(subgraph.name)
        named = self._run.model.named_parameters(remove_duplicate=False)
        fixed = {id(weight) for name, weight in named if not is_within(name, subgraph.name)}
        embeddings = (module for module in block.modules() if isinstance(module, nn.Embedding))
        fixed |= {id(weight) for module in embeddings for weight in module.parameters()}
        return {
            f"{subgraph.name}.{name}": weight
            for name, weight in block.named_parameters()
            if id(weight) not in fixed and weight.is_floating_point()
        }

    def reconstruct(self, subgraph: Subgraph) -> ReconstructedBlock:
        """Tunes a block, whose dense outputs were observed before, in place. Zeros of its pruned parameters remain.

        The learning rate falls to zero along a cosine. Of the states on the way and the one at the start, the one with
        the smallest error on the held-out samples is kept.
        """
        pruned, parameters = self.pruned_parameters(subgraph), self.tuned_parameters(subgraph)
        masks = MaskStore({name: (weight.shape, weight.device) for name, weight in pruned.items()})
        for name, weight in pruned.items():
            masks.replace(name, weight != 0)
        tuner = _BlockTuner(self, subgraph, parameters, masks)
        block = self._run.model.get_submodule(subgraph.name)
        with _gradients_of(block, parameters.values()):
            result = tuner.tune()
        logger.info("%s: %s with learning rate %g", subgraph.name, result, result.learning_rate)
        return result


class _BlockTuner:
    """Tunes one block."""

    def __init__(
        self,
        owner: BlockReconstructor,
        subgraph: Subgraph,
        parameters: Mapping[str, nn.Parameter],
        masks: MaskStore,
    ):
        self._pipeline, self._samples, self._options = owner._pipeline, owner._samples, owner._options
        self._communicator, self._batches = owner._run.communicator, owner._run.local_batches
        self._is_encoder_decoder = owner._is_encoder_decoder
        self._subgraph, self._parameters, self._masks = subgraph, dict(parameters), masks
        self._scales = _scales(self._parameters)
        self._eps: dict[str, float] = {}
        self._energy = 1.0
        """‖Y‖² of a held-out sample, on average."""

    def tune(self) -> ReconstructedBlock:
        start = best = self._state()
        before = smallest = self._held_out_error()
        if not before:
            return ReconstructedBlock(0.0, 0.0, 0.0)
        self._measure_eps()
        rate = self._options.learning_rate or self._find_learning_rate(start)
        for error in self._descend(start, rate, self._options.steps):
            if error < smallest:
                smallest, best = error, self._state()
        self._load(best)
        if best is start:
            logger.warning(
                "%s: tuning does not make the error on held-out samples smaller; its weights remain as they were.",
                self._subgraph.name,
            )
        return ReconstructedBlock(before, smallest, rate)

    def _find_learning_rate(self, start: Mapping[str, torch.Tensor]) -> float:
        """Returns the learning rate with the smallest error after a short trial, of those in a geometric series: from
        the first one on upwards, or else downwards, as long as the error becomes smaller."""
        steps = min(self._options.steps, max(_LEAST_TRIAL_STEPS, round(_TRIAL_SHARE * self._options.steps)))

        def error_of(rate: float) -> float:
            return list(self._descend(start, rate, steps))[-1]

        rate, smallest = _FIRST_RATE, error_of(_FIRST_RATE)
        for factor in (_RATE_FACTOR, 1 / _RATE_FACTOR):
            for _ in range(_MOST_TRIALS):
                error = error_of(rate * factor)
                if error >= smallest:
                    break
                rate, smallest = rate * factor, error
            if rate != _FIRST_RATE:
                break
        return rate

    def _descend(self, start: Mapping[str, torch.Tensor], rate: float, steps: int) -> Iterator[float]:
        """Tunes from a state on, and yields the error on the held-out samples now and then, and at the end."""
        self._load(start)
        optimizer, masters = self._optimizer()
        every = max(1, -(-steps // _NUM_EVALUATIONS))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            self._compute_gradients(self._samples.steps[step % len(self._samples.steps)], masters)
            optimizer.step()
            self._copy_masters(masters)
            if (step + 1) % every == 0 or step + 1 == steps:
                error = self._held_out_error()
                yield error if math.isfinite(error) else math.inf
                if not math.isfinite(error):
                    return

    def _optimizer(self) -> tuple[torch.optim.Adam, dict[str, torch.Tensor]]:
        """Adam over float32 weights: the parameters themselves, or copies of those of another dtype."""
        masters = {
            name: weight if weight.dtype == torch.float32 else weight.detach().float()
            for name, weight in self._parameters.items()
        }
        groups = [
            {"params": [masters[name]], "scale": self._scales[name], "eps": self._eps.get(name, 0.0)}
            for name in masters
        ]
        return torch.optim.Adam(groups, lr=1.0), masters

    def _measure_eps(self) -> None:
        """Set the eps of Adam of each parameter in proportion to its gradient at the start, so that gradients which
        are zero but for rounding, as those of the biases of keys, move nothing."""
        _, masters = self._optimizer()
        self._compute_gradients(self._samples.steps[0], masters)
        gradients = {name: master.grad for name, master in masters.items() if master.grad is not None}
        sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in gradients.items()}
        least = 1e-2 * max(sizes.values())
        self._eps = {name: _RELATIVE_EPS * max(size, least) for name, size in sizes.items()}
        self._drop_gradients(masters)

    def _copy_masters(self, masters: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._parameters.items():
            if masters[name] is not weight:
                weight.detach().copy_(masters[name])
        self._masks.enforce({name: weight.detach() for name, weight in self._parameters.items()})

    def _compute_gradients(self, numbers: range, masters: Mapping[str, torch.Tensor]) -> None:
        """Set the gradients of the masters to those of the error on the batches of a step, on all ranks."""
        rows = sum(num_rows(self._samples.batches[number]) or 1 for number in numbers)
        error = None
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        try:
            for index in self._local(numbers):
                squares, _ = self._squared_error(index, gradients=True)
                with torch.enable_grad():
                    (squares / (self._energy * rows)).backward()
                self._move_gradients(masters)
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
        self._communicator.raise_together(error)
        for master in masters.values():
            if master.grad is not None:
                self._communicator.all_reduce(master.grad)

    def _drop_gradients(self, masters: Mapping[str, torch.Tensor]) -> None:
        for tensor in (*masters.values(), *self._parameters.values()):
            tensor.grad = None

    def _move_gradients(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of parameters of another dtype to those of their float32 copies."""
        for name, weight in self._parameters.items():
            master = masters[name]
            if master is not weight and weight.grad is not None and master.grad is not None:
                master.grad += weight.grad
                weight.grad = None

    def _held_out_error(self) -> float:
        """The relative squared error on the held-out samples of all ranks."""
        total, error = torch.zeros(2, dtype=torch.float64), None
        try:
            for index in self._local(self._samples.holdout):
                squares, energy = self._squared_error(index)
                total += torch.stack([squares.detach(), energy]).to("cpu", torch.float64)
        except Exception as exception:
            error = exception
        self._communicator.raise_together(error)
        self._communicator.all_reduce(total)
        squares, energy = total.tolist()
        rows = sum(num_rows(self._samples.batches[number]) or 1 for number in self._samples.holdout)
        self._energy = energy / rows if energy > 0 else 1.0
        return squares / energy if energy else 0.0

    def _local(self, numbers: range) -> Iterator[int]:
        """The numbers that batches of this rank have among its own."""
        rank, world_size = self._communicator.rank, self._communicator.world_size
        return (number // world_size for number in numbers if number % world_size == rank)

    def _squared_error(self, index: int, gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared error of the block's outputs for a batch, and the square of the dense outputs, both summed over
        the tokens that count."""
        output = _first_tensor(self._pipeline.block_output(self._subgraph.name, index, gradients))
        with self._pipeline.stream(_DENSE):
            target = _first_tensor(self._pipeline.cached_output(self._subgraph, index)).float()
        masks = token_masks(self._batches[index], self._is_encoder_decoder)
        mask = mask_for_inputs([mask.to(output.device) for mask in masks], output)
        with torch.set_grad_enabled(gradients):
            difference = output.float() - target
            if mask is not None:
                difference, target = difference[mask], target[mask]
            return difference.square().sum(), target.square().sum()

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self._parameters.items()}

    def _load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._parameters.items():
            weight.detach().copy_(state[name])


def _first_tensor(output: Any) -> torch.Tensor:
    """The hidden states among the outputs of a block."""
    return next(leaf for leaf in _pytree.tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point())


def _scales(parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The root mean square of each parameter's entries that are not zero; of all matrices where it is smaller, as of
    biases that are zero."""
    squares = {name: float(weight.detach().float().square().sum()) for name, weight in parameters.items()}
    counts = {name: max(1, int(torch.count_nonzero(weight.detach()))) for name, weight in parameters.items()}
    matrices = [name for name, weight in parameters.items() if weight.ndim > 1]
    least = sum(squares[name] for name in matrices) / max(1, sum(counts[name] for name in matrices))
    return {name: math.sqrt(max(least, squares[name] / counts[name])) or 1.0 for name in parameters}


@contextmanager
def _gradients_of(block: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which these parameters of a block alone have gradients, all of which are removed at the end."""
    everything = list(block.parameters())
    before = [(weight, weight.requires_grad, weight.grad) for weight in everything]
    tuned = {id(weight) for weight in parameters}
    try:
        for weight in everything:
            weight.grad = None
            if weight.is_floating_point():
                weight.requires_grad_(id(weight) in tuned)
        yield
    finally:
        for weight, requires_grad, gradient in before:
            weight.requires_grad_(requires_grad)
            weight.grad = gradient
