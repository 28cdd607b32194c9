"""Wanda's masks, drawn by hand from the paper's formula."""

import pytest
import torch

from hf_sparse import Pruner, PruningConfig, PruningConfigError
from hf_sparse.criteria.wanda import Wanda
from hf_sparse.patterns import get_pattern
from hf_sparse.selection.row_masks import keep_mask_by_row
from hf_sparse.statistics import GramMatrix, InputNorms


# ‖x‖ of four inputs over three tokens: 5, 1, 2, 10.
INPUTS = torch.tensor([[3.0, 0.0, 2.0, 6.0], [4.0, 1.0, 0.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
WEIGHT = torch.tensor([[1.0, -4.0, 3.0, 0.2], [-0.5, 9.0, 1.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
SCORES = torch.tensor([[5.0, 4.0, 6.0, 2.0], [2.5, 9.0, 2.0, 10.0], [10.0, 2.0, 4.0, 20.0]])


def norms(kind=InputNorms):
    stat = kind(4)
    stat.observe(INPUTS)
    return stat.norms


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_scores_by_hand(kind):
    assert torch.allclose(Wanda().score(WEIGHT, norms(kind)), SCORES)


def test_the_mask_of_half_of_each_row_by_hand():
    """Magnitude would keep the second and third weight of the first row."""
    mask = keep_mask_by_row(Wanda().score(WEIGHT, norms()), 2)
    assert ["".join(".#"[kept] for kept in row) for row in mask.tolist()] == ["#.#.", ".#.#", "#..#"]


def test_the_mask_of_1_of_4_by_hand():
    scores = Wanda().score(WEIGHT, norms())[:, None, :]
    mask = get_pattern("1:4").pool(scores)[:, 0] == torch.inf
    assert ["".join(".#"[kept] for kept in row) for row in mask.tolist()] == ["..#.", "...#", "...#"]


def test_the_norms_may_be_expanded_over_rows_and_split_like_the_weight():
    criterion = Wanda()
    expanded = norms().expand(3, 4)
    assert torch.equal(criterion.score(WEIGHT[1:], expanded[1:]), criterion.score(WEIGHT, norms())[1:])
    columns = slice(1, 3)
    part = criterion.score(WEIGHT[:, columns], expanded[:, columns])
    assert torch.equal(part, criterion.score(WEIGHT, norms())[:, columns])


def test_training_refuses_it_at_the_start():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(PruningConfigError) as error:
        Pruner(model, PruningConfig(target_sparsity=0.5, criterion="wanda"))
    assert error.value.errors == [
        '`criterion` "wanda" needs inputs of the weights, which training does not observe: use prune_oneshot, or one '
        "of fisher, gradient, greedy_movement, magnitude, mfac, obert, random, snip, snip_momentum, taylor."
    ]
    groups = {"some": {"targets": ["0"], "criterion": "wanda", "scope": "layer", "allocation": "owl"}}
    with pytest.raises(PruningConfigError) as error:
        Pruner(model, PruningConfig(target_sparsity=0.5, groups=groups))
    assert error.value.errors == [
        'group "some": `criterion` "wanda" needs inputs of the weights, which training does not observe: use '
        "prune_oneshot, or one of fisher, gradient, greedy_movement, magnitude, mfac, obert, random, snip, "
        "snip_momentum, taylor.",
        'group "some": `allocation` "owl" needs inputs of the weights, which training does not observe: use '
        "prune_oneshot, or one of erdos_renyi, uniform.",
    ]
