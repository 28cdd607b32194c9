"""The contract of every registered criterion."""

import pytest
import torch
from torch import nn

from hf_sparse import Pruner, PruningConfig, PruningConfigError, Requires
from hf_sparse.criteria import CRITERIA
from hf_sparse.statistics import InputNorms


# Criteria of single weights; those of coupled units and of layers are tested in tests/criteria and tests/oneshot.
NAMES = [
    name for name in CRITERIA.names() if not CRITERIA[name].requires & (Requires.GRAM | Requires.BLOCK_INFLUENCES)
]


def inputs(criterion, dtype, shape=(6, 1, 8)):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).to(dtype)
    if criterion.requires == Requires.NOTHING:
        return weight, None
    if criterion.requires & Requires.POSITION:
        return weight, torch.arange(weight.numel()).view(shape) + (7 << 40)
    if criterion.requires & Requires.INPUTS:
        norms = InputNorms(shape[-1])
        norms.observe(torch.randn(20, shape[-1], generator=generator))
        matrix = weight.reshape(-1, shape[-1])
        return weight, criterion.prepare_statistic(matrix, norms.norms).expand(matrix.shape).reshape(shape)
    gradient = torch.randn(shape, generator=generator)
    if criterion.requires & Requires.GRADIENT_HISTORY:
        kept = torch.ones(shape, dtype=torch.bool)
        return weight, criterion.weight_scores(weight, kept, [gradient, gradient.flip(0)], block=4, width=1)
    return weight, criterion.saliency(weight.float(), gradient, torch.empty(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_float32_of_the_same_shape_and_inputs_stay(name, dtype):
    criterion = CRITERIA.create(name)
    weight, statistic = inputs(criterion, dtype)
    weight = nn.Parameter(weight)
    before = weight.detach().clone(), None if statistic is None else statistic.clone()
    scores = criterion.score(weight, statistic)
    assert scores.dtype == torch.float32 and scores.shape == weight.shape and not scores.requires_grad
    assert torch.isfinite(scores).all() and scores.unique().numel() > 1
    scores.fill_(7)  # the reader may write to them
    assert torch.equal(weight.detach(), before[0]) and (statistic is None or torch.equal(statistic, before[1]))


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_of_parts_are_the_parts_of_the_scores(name):
    criterion = CRITERIA.create(name)
    weight, statistic = inputs(criterion, torch.float32)
    whole = criterion.score(weight, statistic)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    for rows in (order[:1], order[1:4], order[4:]):
        part = criterion.score(weight[rows], None if statistic is None else statistic[rows])
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in CRITERIA.names() if CRITERIA[name].requires & Requires.GRADIENTS])
def test_gradients_that_are_not_finite_are_refused_and_add_nothing(name, bad):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion=name))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    assert pruner.observe()
    before = {key: value.clone() for key, value in pruner.state_dict()[0].items()}
    model[1].weight.grad[0, 0] = bad
    assert not pruner.observe() and pruner.refused_observations == 1
    tensors, values = pruner.state_dict()
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[key], before[key]) for key in before)
    assert {counters["count"] for counters in values["counters"].values()} == {1}


INPUTS = [name for name in CRITERIA.names() if CRITERIA[name].requires & Requires.INPUTS]


@pytest.mark.parametrize("name", [name for name in INPUTS if name in NAMES])
def test_norms_of_inputs_are_one_for_each_column(name):
    criterion = CRITERIA.create(name)
    weight, statistic = inputs(criterion, torch.float32, (6, 8))
    prepared = criterion.prepare_statistic(weight, torch.rand(8))
    scores = criterion.score(weight, prepared)
    assert torch.equal(scores, criterion.score(weight, prepared.expand(6, 8))) and scores.shape == weight.shape


@pytest.mark.parametrize("name", [name for name in INPUTS if name in NAMES])
def test_the_statistic_follows_the_order_of_rows_and_columns(name):
    criterion = CRITERIA.create(name)
    weight, _ = inputs(criterion, torch.float32, (6, 8))
    norms, rows, columns = torch.rand(8), torch.randperm(6), torch.randperm(8)
    whole = criterion.prepare_statistic(weight, norms).expand(6, 8)
    part = criterion.prepare_statistic(weight[rows][:, columns], norms[columns]).expand(6, 8)
    assert torch.allclose(part, whole[rows][:, columns], rtol=1e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_training_refuses_criteria_that_need_inputs(name):
    with pytest.raises(
        PruningConfigError, match=f'`criterion` "{name}" needs inputs of the weights, which training does not observe'
    ):
        Pruner(nn.Sequential(nn.Linear(4, 3)), PruningConfig(target_sparsity=0.5, criterion=name))
