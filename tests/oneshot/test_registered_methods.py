"""Methods that a user registers run in one-shot pruning by what they require."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hf_sparse import OneshotConfig, PruningConfigError, prune_oneshot
from hf_sparse.allocations import ALLOCATIONS, Allocation
from hf_sparse.criteria import CRITERIA, Criterion
from hf_sparse.requires import Requires
from hf_sparse.solvers import SOLVERS, Solver


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is gone afterwards."""
    for registry in (ALLOCATIONS, CRITERIA, SOLVERS):
        monkeypatch.setattr(registry, "_members", dict(registry._members))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


BATCHES = [torch.randn(20, 8, generator=torch.Generator().manual_seed(1))]


def run(model, batches=BATCHES, **options):
    return prune_oneshot(model, batches, OneshotConfig(target_sparsity=0.5, **options), progress=False)


def test_an_allocation_gets_its_own_outlier_ratios(model):
    @ALLOCATIONS.register("by_largest_score")
    @dataclass(frozen=True)
    class ByLargestScore(Allocation):
        """The layer with the largest score is pruned to 0.25, the other to 0.75."""

        requires = Requires.OUTLIERS

        def outlier_ratio(self, scores):
            return float(torch.cat([score.flatten() for score in scores]).max())

        def allocate(self, target, layers):
            first, second = layers
            largest = first if first.outliers > second.outliers else second
            return {layer.name: target - 0.25 if layer is largest else target + 0.25 for layer in layers}

    model[1].weight.data[0, 0] = 1e4
    report = run(model, allocation="by_largest_score", criterion="magnitude", scope="layer")
    assert [layer.sparsity for layer in report.layers] == [0.75, 0.25]
    words = 'allocation "by_largest_score" needs calibration data, but there is none'
    with pytest.raises(PruningConfigError, match=words):
        run(model, None, allocation="by_largest_score", criterion="magnitude", scope="layer")


def test_a_criterion_gets_input_norms(model):
    @CRITERIA.register("norms_alone")
    @dataclass(frozen=True)
    class NormsAlone(Criterion):
        requires = Requires.INPUT_NORMS
        default_scope = "row"

        def score(self, weight, statistic):
            return statistic.expand(weight.shape).clone()

    run(model, criterion="norms_alone", targets=["0"])
    smallest = BATCHES[0].norm(dim=0).argsort()[:4]
    assert (model[0].weight[:, smallest] == 0).all() and int((model[0].weight == 0).sum()) == 32


def test_a_solver_may_select_without_a_gram_matrix(model):
    @SOLVERS.register("first_columns")
    @dataclass(frozen=True)
    class FirstColumns(Solver):
        selects = True

        def solve_batched(self, requests, statistic=None):
            assert statistic is None
            masks = [torch.ones_like(request.weight_RC, dtype=torch.bool) for request in requests]
            for mask, request in zip(masks, requests, strict=True):
                mask[:, : round(request.sparsity * mask.shape[1])] = False
            return [(torch.where(mask, r.weight_RC, 0.0), mask) for mask, r in zip(masks, requests, strict=True)]

    run(model, solver="first_columns")
    assert all((layer.weight[:, :4] == 0).all() and (layer.weight[:, 4:] != 0).all() for layer in model)
    with pytest.raises(PruningConfigError, match='solver "first_columns" needs calibration data'):
        run(model, None, solver="first_columns")


def test_positions_need_no_calibration_data(model):
    assert run(model, None, criterion="random").sparsity == 0.5
