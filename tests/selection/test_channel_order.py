"""The order of channels for N:M against all orders, and that nothing is lost."""

import itertools

import pytest
import torch

from hf_sparse.selection.channel_order import _pairs, find_channel_order, kept_scores


@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("rows, groups", [(1, 2), (7, 5), (16, 8)])
def test_more_is_kept_in_an_order_of_all_channels(keep, of, rows, groups):
    generator = torch.Generator().manual_seed(rows)
    scores = torch.rand(rows, groups * of, generator=generator) * torch.rand(groups * of, generator=generator) ** 3
    order = find_channel_order(scores, keep, of)
    assert torch.equal(order.sort().values, torch.arange(groups * of))
    before, after = kept_scores(scores, keep, of), kept_scores(scores[:, order], keep, of)
    assert after >= before * (1.0 if rows == 1 else 1.001)
    assert torch.equal(order, find_channel_order(scores.clone(), keep, of))


def test_two_groups_are_divided_nearly_as_by_trying_all_divisions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        scores = torch.rand(5, 8, generator=generator) ** 2
        best = 0.0
        for left in itertools.combinations(range(8), 4):
            right = [channel for channel in range(8) if channel not in left]
            best = max(best, kept_scores(scores[:, [*left, *right]], 2, 4))
        found = kept_scores(scores[:, find_channel_order(scores, 2, 4)], 2, 4)
        assert found >= kept_scores(scores, 2, 4) and found > 0.985 * best


@pytest.mark.parametrize("scores", [torch.zeros(3, 8), torch.ones(3, 8), torch.full((3, 8), float("nan"))])
def test_where_nothing_can_be_gained_the_order_stays(scores):
    assert torch.equal(find_channel_order(scores, 2, 4), torch.arange(8))
    assert torch.equal(find_channel_order(torch.rand(3, 4), 2, 4), torch.arange(4))


@pytest.mark.parametrize("count", [2, 4, 10])
def test_all_groups_meet(count):
    rounds = [
        list(zip(*(side.tolist() for side in _pairs(count, number)), strict=True)) for number in range(count - 1)
    ]
    assert all(sorted(itertools.chain(*pairs)) == list(range(count)) for pairs in rounds)
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert len(met) == count * (count - 1) // 2
