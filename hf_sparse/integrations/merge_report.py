"""MergeReport: what merging adapters into a pruned base left out to keep the zeros of the base."""

from __future__ import annotations

from dataclasses import dataclass

from ..reporting.tables import Table
from ..reporting.tabular import Tabular


@dataclass(frozen=True)
class MergedLayer:
    """One weight of the base that an update U was merged into, under the mask M that keeps its zeros.

    Args:
        name: parameter name in the model without PEFT.
        weights: number of entries.
        zeros: number of entries that stay zero, where M is False.
        masked: number of nonzero entries of U among those.
        update_norm: Frobenius norm of U.
        masked_norm: Frobenius norm of U * (1 - M), the part of the update that was left out.
    """

    name: str
    weights: int
    zeros: int
    masked: int
    update_norm: float
    masked_norm: float

    @property
    def norm_lost(self) -> float:
        """masked_norm / update_norm."""
        return self.masked_norm / self.update_norm if self.update_norm else 0.0


@dataclass(frozen=True, repr=False)
class MergeReport(Tabular):
    """What `merge_and_unload` left out of the adapters' updates to keep the zeros of the base.

    Args:
        layers: the weights that updates were merged into.

    Example:
        >>> layer = MergedLayer("query.weight", weights=16, zeros=8, masked=8, update_norm=5.0, masked_norm=3.0)
        >>> MergeReport((layer,)).norm_lost
        0.6
        >>> print(MergeReport((layer,)))
        layer         zeros  weights  masked  norm lost
        query.weight      8       16       8      60.0%
        all               8       16       8      60.0%
    """

    layers: tuple[MergedLayer, ...]

    @property
    def total(self) -> MergedLayer:
        """The sums of the counts and the joint norms over all layers."""
        return MergedLayer(
            name="all",
            weights=sum(layer.weights for layer in self.layers),
            zeros=sum(layer.zeros for layer in self.layers),
            masked=sum(layer.masked for layer in self.layers),
            update_norm=sum(layer.update_norm**2 for layer in self.layers) ** 0.5,
            masked_norm=sum(layer.masked_norm**2 for layer in self.layers) ** 0.5,
        )

    @property
    def masked(self) -> int:
        """The number of nonzero entries of the updates that were left out."""
        return self.total.masked

    @property
    def norm_lost(self) -> float:
        """The norm of what was left out of the updates, relative to the norm of the updates, over all layers."""
        return self.total.norm_lost

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        return f"MergeReport({layers}, {self.norm_lost:.1%} of the norm of the updates lost)"

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        rows: list[tuple[str, ...]] = []
        for layer in (*self.layers, self.total):
            zeros, weights, masked = (f"{count:,}" for count in (layer.zeros, layer.weights, layer.masked))
            rows.append((layer.name, zeros, weights, masked, f"{layer.norm_lost:.1%}"))
        header = ("layer", "zeros", "weights", "masked", "norm lost")
        return [Table(header, tuple(rows), 1, totals=1)]
