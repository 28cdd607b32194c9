"""The order of input channels in which N:M pruning keeps the most.

Shapes: R rows, C channels; G groups of M neighbouring channels, P pairs of groups.
"""

from __future__ import annotations

import torch


ROUNDS = 64
"""Rounds of exchanges, in each of which every group meets one other."""


def kept_scores(scores_RC: torch.Tensor, keep: int, of: int) -> float:
    """Returns the sum of the `keep` highest scores of every `of` neighbouring channels of each row.

    Example:
        >>> kept_scores(torch.tensor([[1.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0]]), 2, 4)
        12.0
    """
    groups = scores_RC.reshape(len(scores_RC), -1, of)
    return float(groups.topk(keep, dim=2).values.sum(dtype=torch.float64))


def find_channel_order(scores_RC: torch.Tensor, keep: int, of: int, rounds: int = ROUNDS) -> torch.Tensor:
    """Returns an order of the channels in which N:M keeps more of the scores, or the present one.

    Channels are first dealt to the groups by their sums, so that each group has large and small ones. Then, in each
    round, the groups meet in pairs, other pairs each time, and each pair makes the exchange of two channels that
    raises the sum of the kept scores the most, if one does. That takes C·M·R subtractions for each round.

    Args:
        scores_RC: non-negative, float32; not modified.
        keep: N.
        of: M, which divides the number of channels.
        rounds: the most rounds; fewer take place once no exchange is left.

    Returns:
        (C) int64: the present index of the channel for each place.

    Example:
        >>> scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]])
        >>> order = find_channel_order(scores, 2, 4)
        >>> kept_scores(scores, 2, 4), kept_scores(scores[:, order], 2, 4)
        (19.0, 30.0)

    Reference: Pool & Yu, "Channel Permutations for N:M Sparsity", 2021; the first order is the heuristic allocation of
    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", 2024.
    """
    channels = scores_RC.shape[1]
    present = torch.arange(channels, device=scores_RC.device)
    dealt = _deal(scores_RC.sum(0), of)
    best = max((present, dealt), key=lambda order: kept_scores(scores_RC[:, order], keep, of))
    order = _exchange(scores_RC, best, keep, of, rounds)
    is_better = kept_scores(scores_RC[:, order], keep, of) > kept_scores(scores_RC, keep, of)
    return order if is_better else present


def _deal(sums_C: torch.Tensor, of: int) -> torch.Tensor:
    """Deals channels in the order of their sums to the groups, back and forth."""
    rows_MG = sums_C.argsort(descending=True, stable=True).view(of, -1)
    return torch.stack([row.flip(0) if number % 2 else row for number, row in enumerate(rows_MG)], 1).reshape(-1)


def _exchange(scores_RC: torch.Tensor, order: torch.Tensor, keep: int, of: int, rounds: int) -> torch.Tensor:
    order_GM = order.view(-1, of).clone()
    scores_GMR = scores_RC.t()[order].contiguous().view(*order_GM.shape, -1)
    num_groups = len(order_GM)
    even = num_groups + num_groups % 2  # of an odd number, one group waits in each round
    quiet_rounds = 0
    for number in range(rounds if num_groups > 1 else 0):
        left, right = (groups.to(order.device) for groups in _pairs(even, number % (even - 1)))
        meets = (left < num_groups) & (right < num_groups)
        left, right = left[meets], right[meets]
        gains, first, second = _best_exchanges(scores_GMR[left], scores_GMR[right], keep)
        useful = gains > 0
        left, right, first, second = left[useful], right[useful], first[useful], second[useful]
        for tensor in (scores_GMR, order_GM):
            tensor[left, first], tensor[right, second] = tensor[right, second], tensor[left, first]
        quiet_rounds = 0 if len(left) else quiet_rounds + 1
        if quiet_rounds == even - 1:  # every pair has met
            break
    return order_GM.reshape(-1)


def _pairs(count: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pairs of one round of a tournament of `count` (even) members: all meet in count - 1 rounds."""
    ring = (torch.arange(count - 1) + number) % (count - 1)
    return torch.cat([ring[: count // 2 - 1], torch.tensor([count - 1])]), ring[count // 2 - 1 :].flip(0)


def _best_exchanges(
    left_PMR: torch.Tensor, right_PMR: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gain (P) of the best exchange of each pair of groups, and the place (P) of its channel in either."""
    total = torch.zeros((), device=left_PMR.device)
    for here, there, transpose in ((left_PMR, right_PMR, False), (right_PMR, left_PMR, True)):
        loss_PM, level_PMR = _without_each(here, keep)
        # The sum of max(x - level, 0), from the sums of |x - level| and x - level.
        distance_PMM = torch.cdist(level_PMR, there, p=1.0)
        gain_PMM = (distance_PMM + there.sum(2)[:, None, :] - level_PMR.sum(2)[:, :, None]) / 2 - loss_PM[:, :, None]
        total = total + (gain_PMM.transpose(1, 2) if transpose else gain_PMM)
    gains, best = total.flatten(1).max(1)
    size = left_PMR.shape[1]
    scale = left_PMR.sum((1, 2)) + right_PMR.sum((1, 2))
    return torch.where(gains > 1e-6 * scale, gains, 0.0), best // size, best % size


def _without_each(scores_PMR: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns for each channel of a group what the group keeps less without it (P, M), and the lowest score that it
    then keeps in each row (P, M, R)."""
    highest = _highest(scores_PMR, keep + 1)
    lowest_kept, next_one = highest[keep - 1][:, None], highest[keep][:, None]
    is_kept = scores_PMR >= lowest_kept
    level_PMR = torch.where(is_kept, next_one, lowest_kept)
    return (scores_PMR - level_PMR).mul_(is_kept).sum(2), level_PMR


def _highest(scores_PMR: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Returns the highest scores (P, R) over the channels of a group, in their order: many times faster than a sort of
    few numbers."""
    highest: list[torch.Tensor] = []
    for value in scores_PMR.unbind(1):
        for place, other in enumerate(highest):
            highest[place], value = torch.maximum(other, value), torch.minimum(other, value)
        if len(highest) < count:
            highest.append(value)
    return highest
