"""How well the outputs of an exported model agree with those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .runtimes import Runtime


@dataclass(frozen=True)
class Agreement:
    """Differences between the outputs of two programs for the same inputs; padding does not count.

    Args:
        max_difference: the largest absolute difference.
        relative_difference: |a - b| / |b| over all outputs, as Euclidean norms; b is the reference.
        same_argmax: share of output vectors with the same largest entry: for logits, the same prediction.
        vectors: number of output vectors.
    """

    max_difference: float
    relative_difference: float
    same_argmax: float
    vectors: int

    def __str__(self) -> str:
        return (
            f"relative difference {self.relative_difference:.1e}, largest {self.max_difference:.1e}, same argmax in "
            f"{self.same_argmax:.2%} of {self.vectors:,} output vectors"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_agreement(program: Runtime, reference: Runtime, batches: Iterable[dict[str, torch.Tensor]]) -> Agreement:
    """Compares the first outputs of two programs.

    Args:
        program, reference: functions from inputs by name to outputs (B, ..., V).
        batches: the inputs.

    Example:
        >>> batches = [{"x": torch.eye(2)}]
        >>> print(measure_agreement(lambda batch: batch["x"] * 1.5, lambda batch: batch["x"], batches))
        relative difference 5.0e-01, largest 5.0e-01, same argmax in 100.00% of 2 output vectors
    """
    largest = squared = norm = 0.0
    same = vectors = 0
    for batch in batches:
        output, expected = (run(batch).float() for run in (program, reference))
        mask = batch.get("attention_mask")
        if mask is not None and output.shape[:2] == mask.shape:
            output, expected = output[mask.bool()], expected[mask.bool()]
        output, expected = output.flatten(0, -2), expected.flatten(0, -2)
        difference = output - expected
        largest = max(largest, float(difference.abs().max()))
        squared += float(difference.double().square().sum())
        norm += float(expected.double().square().sum())
        same += int((output.argmax(-1) == expected.argmax(-1)).sum())
        vectors += len(output)
    return Agreement(largest, (squared / norm) ** 0.5 if norm else squared**0.5, same / vectors, vectors)
