"""Moving parts of a tensor between processes, when what decides together lies on several of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .boxes import Box
from .processes import OneProcess


Boxes = Sequence[Box]


def move(
    parts: Sequence[torch.Tensor],
    sources: Sequence[Boxes],
    targets: Sequence[Boxes],
    processes: OneProcess,
    like: torch.Tensor,
) -> list[torch.Tensor]:
    """Bring parts of a tensor to other processes. Each entry comes from the one process that has it in its sources,
    and goes to every process that has it in its targets.

    Args:
        parts: the tensors of this process's boxes in `sources`, each of its box's shape.
        sources, targets: of each process, the boxes it has and the boxes it is to get.
        like: of the dtype that all parts have, and of the device that they are on.

    Returns: the tensors of this process's boxes in `targets`.
    """
    mine, wanted = sources[processes.rank], targets[processes.rank]
    outgoing = []
    for boxes in targets:
        pieces = [
            part[(own & box).within(own)].reshape(-1)
            for own, part in zip(mine, parts, strict=True)
            for box in boxes
            if own & box
        ]
        outgoing.append(torch.cat(pieces) if pieces else like.new_empty(0))
    moved = [like.new_empty(box.shape) for box in wanted]
    for boxes, received in zip(sources, processes.exchange(outgoing), strict=True):
        first = 0
        for box in boxes:
            for target, goal in zip(moved, wanted, strict=True):
                common = box & goal
                if common:
                    target[common.within(goal)] = received[first : first + common.numel].view(common.shape)
                    first += common.numel
    return moved
