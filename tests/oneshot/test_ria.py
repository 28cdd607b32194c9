"""RIA's scores and masks, by hand from the paper's formula and by a reference in float64."""

import copy

import naive
import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import nn

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.criteria import CRITERIA


WEIGHT = torch.tensor([[2.0, -6.0], [-2.0, 2.0], [0.0, 0.0]])
NORMS = torch.tensor([9.0, 4.0])
# Sums: rows 8, 4, 0; columns 4, 8. Roots of the norms: 3, 2.
BY_HAND = torch.tensor(
    [[3 * (1 / 4 + 1 / 2), 2 * (3 / 4 + 3 / 4)], [3 * (1 / 2 + 1 / 2), 2 * (1 / 2 + 1 / 4)], [0, 0]]
)


def test_scores_by_hand():
    ria = CRITERIA.create("ria")
    assert torch.allclose(ria.score(WEIGHT, ria.prepare_statistic(WEIGHT, NORMS)), BY_HAND)
    squared = CRITERIA.create("ria", {"alpha": 1.0})
    scaled = BY_HAND * torch.tensor([3.0, 2.0])
    assert torch.allclose(squared.score(WEIGHT, squared.prepare_statistic(WEIGHT, NORMS)), scaled)
    with pytest.raises(ValueError, match='"alpha" is -1.0: it must be 0 or more, as in 0.5'):
        CRITERIA.create("ria", {"alpha": -1.0})


def reference(weight_RC, x_TC, share, scope):
    magnitudes = weight_RC.double().abs()
    relative = magnitudes / magnitudes.sum(1, keepdim=True) + magnitudes / magnitudes.sum(0)
    scores = relative * x_TC.double().square().sum(0).sqrt() ** 0.5
    scores = scores if scope == "row" else scores.reshape(1, -1)
    pruned = scores.argsort(dim=1, stable=True)[:, : round(share * scores.shape[1])]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, pruned, True)
    return weight_RC.masked_fill(mask.view(weight_RC.shape), 0.0)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_pruned_model_equals_the_reference(name, scope):
    """GPT-2 has its weights transposed."""
    architecture = ARCHITECTURES[name]
    model, batches = architecture.model(), architecture.batches()
    expected = copy.deepcopy(model)
    config = OneshotConfig(target_sparsity=0.5, criterion="ria", scope=scope)
    names = [layer.name for layer in prune_oneshot(model, batches, config, progress=False).layers]
    parts = naive.by_blocks(architecture, names)
    naive.prune(expected, architecture, parts, batches, lambda w, x: reference(w, x, 0.5, scope))
    assert all(torch.equal(model.get_parameter(name) == 0, expected.get_parameter(name) == 0) for name in names)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_each_expert_has_its_own_sums(name):
    """An expert of small weights among large ones: all experts of a layer are ranked together."""
    architecture = ARCHITECTURES[name]
    model, batches = architecture.model(), architecture.batches()
    experts = [name for name, weight in model.named_parameters() if name.endswith("experts.down_proj")]
    with torch.no_grad():
        for weight in map(model.get_parameter, experts):
            weight[1] *= 1e-3
    config = OneshotConfig(target_sparsity=0.5, criterion="ria", targets=["*experts*"], on_unreached="magnitude")
    report = prune_oneshot(model, batches, config, progress=False)
    assert report.sparsity == 0.5
    shares = [float((model.get_parameter(name)[1] == 0).float().mean()) for name in experts]
    assert len(shares) == 2 and all(0.2 < share < 0.8 for share in shares)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "4x1"}, {"scope": "global"}, {"scope": "row"}])
def test_patterns_and_scopes(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False))
    config = OneshotConfig(criterion="ria", **{"target_sparsity": 0.5, **options})
    report = prune_oneshot(model, [torch.randn(30, 8)], config, progress=False)
    assert report.sparsity == 0.5
    if "pattern" not in options:
        assert all((model[index].weight != 0).any(1).all() for index in (0, 1))


def test_zeros_are_kept_and_an_empty_row_is_no_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False))
    with torch.no_grad():
        model[0].weight[3] = 0.0
        model[0].weight[:, 5] = 0.0
    zeros = model[0].weight == 0
    config = OneshotConfig(target_sparsity=0.5, criterion="ria", keep_zeros=True)
    assert prune_oneshot(model, [torch.randn(30, 8)], config, progress=False).sparsity == 0.5
    assert (model[0].weight == 0)[zeros].all()
