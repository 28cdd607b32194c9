"""AC/DC: phases of sparse and of dense training in turn."""

from dataclasses import dataclass

from .base import register_algorithm
from .dynamic import DynamicSparsity


@register_algorithm("acdc")
@dataclass(frozen=True)
class ACDC(DynamicSparsity):
    """Alternating compressed and decompressed training: the weights are at the target sparsity in every second phase.

    In a compressed phase they have the mask that the criterion selects at its start; in a dense phase all weights are
    trained, the pruned ones again from 0. Training starts dense; the prune steps are divided into equal phases, the
    first and the last of them compressed; the last one goes on after the last prune step.

    Args:
        compressed_phases: number of compressed phases, with a dense one between any two. With fewer prune steps than
            phases, each prune step begins one.

    Example:
        >>> [ACDC(compressed_phases=2).sparsity(0.0, 0.9, step, 6) for step in range(7)]
        [0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9]

    Reference: Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", 2021.
    """

    compressed_phases: int = 5

    follows_scheduler = False

    def __post_init__(self) -> None:
        if self.compressed_phases < 1:
            raise ValueError(f"`compressed_phases` is {self.compressed_phases}: it must be at least 1, as in 5")

    def phases_left(self, prune_step: int, total: int) -> int:
        """Returns the number of phases after the one that a prune step is in; 0 in the last."""
        phases = min(2 * self.compressed_phases - 1, total)
        return (total - prune_step) * phases // total

    def is_dense(self, prune_step: int, total: int) -> bool:
        """Whether a prune step begins or continues a dense phase."""
        return prune_step < 1 or self.phases_left(prune_step, total) % 2 == 1

    def sparsity(self, scheduled: float, target: float, prune_step: int, total: int) -> float:
        return 0.0 if self.is_dense(prune_step, total) else target

    def opens_masks(self, prune_step: int, total: int) -> bool:
        return self.is_dense(prune_step, total)
