"""Options of block-wise reconstruction."""

from __future__ import annotations

from dataclasses import dataclass


INPUTS = ("sparse", "dense")


@dataclass(frozen=True)
class Reconstruction:
    """How the remaining weights of a block are tuned after pruning (`reconstruct_kwargs`).

    Args:
        steps: optimizer steps of each block.
        learning_rate: of Adam at the first step, as a share of the root mean square of each parameter. None tries
            several, and takes the one with the smallest error on the held-out samples.
        samples: calibration samples per step. None for as many as have about 2,048 tokens, and 16 where samples have
            no tokens, such as images.
        window: how many blocks are tuned together, to give the dense outputs of the last one: a block that has just
            been pruned, and those before it. More take longer, and as many times the memory.
        holdout: share of the calibration samples that are held out to judge the result.
        inputs: what the first of these blocks gets while they are tuned. "sparse": the outputs of the pruned blocks
            before it, so that errors of those are corrected, which has given the lower perplexities. "dense": the
            outputs of the dense model, which take one more set of cached outputs for each block of the window.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> Reconstruction(steps=100)
        Reconstruction(steps=100, learning_rate=None, samples=None, window=3, holdout=0.125, inputs='sparse')
    """

    steps: int = 300
    learning_rate: float | None = None
    samples: int | None = None
    window: int = 3
    holdout: float = 0.125
    inputs: str = "sparse"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` is {self.steps}: it must be at least 1, as in 300")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"`samples` is {self.samples}: it must be at least 1, as in 16, or left out")
        if self.window < 1:
            raise ValueError(f"`window` is {self.window}: it must be at least 1, as in 3")
        if not 0 < self.holdout < 1:
            raise ValueError(f"`holdout` is {self.holdout}: it must be above 0 and below 1, as in 0.125")
        if self.inputs not in INPUTS:
            raise ValueError(f'`inputs` is "{self.inputs}": it must be {" or ".join(INPUTS)}')
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"`learning_rate` is {self.learning_rate}: it must be above 0 and at most 1, as in 0.01, or left out"
            )
