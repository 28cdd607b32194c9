"""Block reconstruction: tunes the remaining weights of a pruned block to give the outputs of the dense model.

Reference: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", 2024; "A Free Lunch in LLM
Compression: Revisiting Retraining after Pruning", 2025 (arXiv 2510.14444).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..config import Reconstruction
from .pipeline import CURRENT, BlockPipeline, Subgraph
from .prepare import PreparedRun
from .tuned_blocks import DENSE, TunedBlocks, dense_inputs
from .tuning_samples import TuningSamples


logger = logging.getLogger(__name__)

_FIRST_RATE, _RATE_FACTOR, _MOST_TRIALS = 0.01, 3.0, 3
"""The first learning rate that is tried, the ratio of one to the next, and how many are tried above or below it."""

_TRIAL_SHARE, _LEAST_TRIAL_STEPS = 0.1, 10
"""Steps of a trial, as a share of all steps."""

_NUM_EVALUATIONS = 10
"""How often the error on the held-out samples is measured while a block is tuned."""


@dataclass(frozen=True)
class ReconstructedBlock:
    """What tuning has achieved for a block.

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
        run: the model and its batches.
        samples: of the run.
        pipeline: over the local batches of the run. Its own stream is the one of the pruned model.
        is_encoder_decoder: see `token_masks`.
    """

    def __init__(self, run: PreparedRun, samples: TuningSamples, pipeline: BlockPipeline, is_encoder_decoder: bool):
        self._run, self._samples, self._pipeline = run, samples, pipeline
        self._options = run.config.reconstruction or Reconstruction()
        self._has_dense_inputs = self._options.inputs == "dense"
        self._is_encoder_decoder = is_encoder_decoder

    def observe_dense(self, subgraph: Subgraph) -> None:
        """Computes the outputs of a block in the dense model. To be called for each block, before it is pruned.

        With dense inputs, those of the block are kept as long as its stream `dense_inputs` is."""
        error = None
        try:
            with self._pipeline.stream(DENSE):
                if self._has_dense_inputs:
                    self._pipeline.copy_stream(dense_inputs(subgraph))
                self._pipeline.propagate(subgraph)
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
        self._run.communicator.raise_together(error)

    @property
    def window(self) -> int:
        """How many blocks are tuned together."""
        return self._options.window

    def reconstruct(self, window: Sequence[Subgraph]) -> ReconstructedBlock:
        """Tunes a pruned block whose dense outputs were observed, together with those before it, in place.

        Args:
            window: the blocks, in order. The first one gets what the pruned blocks before it give, or with dense
                inputs what those of the dense model gave.

        The learning rate falls to zero along a cosine. Of the states on the way and the one at the start, the one with
        the smallest error on the held-out samples is kept.
        """
        inputs = dense_inputs(window[0]) if self._has_dense_inputs else CURRENT
        with TunedBlocks(self._run, self._samples, self._pipeline, window, self._is_encoder_decoder, inputs) as blocks:
            result = self._tune(blocks)
        if result.after == result.before > 0:
            logger.warning(
                "%s: tuning does not lower the error on held-out samples; its weights stay as they were.",
                window[-1].name,
            )
        logger.info("%s: %s with learning rate %g", window[-1].name, result, result.learning_rate)
        return result

    def _tune(self, blocks: TunedBlocks) -> ReconstructedBlock:
        start = best = blocks.state()
        before = smallest = blocks.held_out_error()
        if not before:
            return ReconstructedBlock(0.0, 0.0, 0.0)
        rate = self._options.learning_rate or self._find_learning_rate(blocks, start)
        for error in self._descend(blocks, start, rate, self._options.steps, _NUM_EVALUATIONS):
            if error < smallest:
                smallest, best = error, blocks.state()
        blocks.load(best)
        return ReconstructedBlock(before, smallest, rate)

    def _find_learning_rate(self, blocks: TunedBlocks, start: Mapping[str, torch.Tensor]) -> float:
        """Returns the learning rate with the smallest error after a short trial, of those in a geometric series: from
        the first one on upwards, or else downwards, as long as the error becomes smaller."""
        steps = min(self._options.steps, max(_LEAST_TRIAL_STEPS, round(_TRIAL_SHARE * self._options.steps)))

        def error_of(rate: float) -> float:
            return list(self._descend(blocks, start, rate, steps, 1))[-1]

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

    def _descend(
        self, blocks: TunedBlocks, start: Mapping[str, torch.Tensor], rate: float, steps: int, evaluations: int
    ) -> Iterator[float]:
        """Tunes from a state on, and yields the error on the held-out samples `evaluations` times."""
        blocks.load(start)
        optimizer = blocks.new_optimizer()
        every = math.ceil(steps / evaluations)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            blocks.compute_gradients(self._samples.steps[step % len(self._samples.steps)])
            optimizer.step()
            blocks.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                error = blocks.held_out_error()
                yield error
                if error == math.inf:
                    return


def tuning_passes(options: Reconstruction, samples: TuningSamples) -> tuple[float, float]:
    """Returns how many times the calibration data passes through a block that is tuned, with gradients and without.
    Three learning rates are tried, as a rule."""
    trials = 0 if options.learning_rate else 3
    steps = options.steps * (1 + trials * _TRIAL_SHARE)
    share = (1 - options.holdout) / len(samples.steps)
    return steps * share, (1 + _NUM_EVALUATIONS + trials) * options.holdout
