"""Writes the masks that thresholds give, for many layers at once where they are on a device with kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import StoredScores, has_kernels
from .layer_scores import LayerScores
from .threshold import Threshold


def apply_thresholds(scores: Sequence[LayerScores], thresholds: Sequence[Threshold]) -> None:
    """Prunes the local units of each layer that its threshold prunes, and keeps all others.

    Args:
        scores: (L) the layers.
        thresholds: (L) those of this rank, see `split_ties`.
    """
    together: dict[torch.device, list[tuple[StoredScores, Threshold]]] = {}
    for layer, threshold in zip(scores, thresholds, strict=True):
        stored = layer.stored if has_kernels(layer.device) else None
        if stored is None:
            layer.apply_threshold(threshold)
        else:
            together.setdefault(layer.device, []).append((stored, threshold))
    for pairs in together.values():
        from ..kernels.scores import ALL_TIES, write_masks

        write_masks(
            [stored for stored, _ in pairs],
            [threshold.value for _, threshold in pairs],
            [
                ALL_TIES if threshold.num_ties and threshold.includes_all_ties else threshold.num_ties
                for _, threshold in pairs
            ],
        )
