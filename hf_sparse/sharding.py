"""Where parameters live: the only room that knows about ranks, DTensor and ZeRO.

Today every rank must hold its weights whole: one process, DataParallel, or DDP, whose ranks see the same reduced
gradients and so decide the same masks. Everything else is refused before training starts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_supported(parameters: Mapping[str, torch.Tensor]) -> None:
    """See that every parameter is whole on this rank.

    Raises:
        NotImplementedError: one is sharded; the strategy is named.
    """
    for name, parameter in parameters.items():
        strategy = _strategy(parameter)
        if strategy:
            raise NotImplementedError(
                f'"{name}" is sharded by {strategy}: pruning needs weights that are whole on every rank. '
                "Train with one process or with DDP."
            )


def _strategy(parameter: torch.Tensor) -> str | None:
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3"
    if hasattr(parameter, "_hp_mapping"):
        return "DeepSpeed ZeRO"
    if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):
        return "FSDP2 or tensor parallelism (a DTensor)"
    if parameter.ndim < 2:
        return "FSDP1 (a flattened parameter)"
    if parameter.is_meta:
        return "the meta device (it holds no values)"
    return None
