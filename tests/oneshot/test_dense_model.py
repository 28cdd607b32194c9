"""Masks and gradient statistics of the dense model."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.tiny import same, weights
from torch import nn

from hf_sparse import OneshotConfig
from hf_sparse.distributed import SINGLE_PROCESS
from hf_sparse.engine.parameter_group import ParameterGroup
from hf_sparse.engine.resolve import resolve_layers
from hf_sparse.oneshot.dense_model import accumulate_gradients, masks_from_dense_model


def groups_of(model, **options):
    return [
        ParameterGroup(group)
        for group in resolve_layers(model, OneshotConfig(target_sparsity=0.5, **options), True)[0]
    ]


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    model[1].weight.data = torch.tensor([[4.0, 5.0], [6.0, -0.0]])
    return model


@pytest.mark.parametrize(
    "options, norms, first, second",
    [
        ({"criterion": "magnitude"}, None, [[0, 0], [1, 0]], [[1, 1], [1, 0]]),
        ({"criterion": "wanda"}, [[9.0, 9.0], [1.0, 1.0]], [[1, 1], [1, 0]], [[0, 0], [1, 0]]),
        ({"criterion": "magnitude", "keep_zeros": True}, None, [[0, 0], [1, 0]], [[1, 1], [1, 0]]),
    ],
)
def test_all_layers_are_ranked_together(options, norms, first, second):
    """Four of eight weights are pruned in the masks; the weights do not change."""
    model = two_layers()
    before = weights(model)
    known = {} if norms is None else {f"{n}.weight": torch.tensor([values]) for n, values in enumerate(norms)}
    masks = masks_from_dense_model(model, groups_of(model, scope="global", **options), known)
    assert masks["0.weight"].int().tolist() == first and masks["1.weight"].int().tolist() == second
    assert same(weights(model), before)


def test_gradients_are_summed_over_batches_and_cleared():
    model = ARCHITECTURES["gpt2"].model().train()
    batches, groups = ARCHITECTURES["gpt2"].batches(3), groups_of(model, criterion="snip")
    with torch.no_grad():  # whatever mode the caller is in
        accumulate_gradients(model, groups, batches, SINGLE_PROCESS)
    name = groups[0].layers[0].name
    model.eval()
    expected = torch.zeros_like(model.get_parameter(name))
    for batch in batches:
        (gradient,) = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, [model.get_parameter(name)])
        expected += (gradient * model.get_parameter(name).detach()).abs()
    stat = groups[0].statistics[name]
    assert torch.allclose(stat.total, expected, atol=1e-6) and stat.count == 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_of_a_mapping_or_an_object():
    """An output without a loss is an error."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x, loss=True):
            return {"loss": self.layer(x).sum()} if loss else (self.layer(x),)

    model = Model()
    groups = groups_of(model, criterion="gradient", scope="layer")
    accumulate_gradients(model, groups, [{"x": torch.ones(3, 2)}], SINGLE_PROCESS)
    assert groups[0].statistics["layer.weight"].total.tolist() == [[3, 3]]
    with pytest.raises(
        ValueError, match='criterion of gradients needs a loss, .* for calibration batch 1: add "labels"'
    ):
        accumulate_gradients(model, groups, [(torch.ones(3, 2),), (torch.ones(3, 2), False)], SINGLE_PROCESS)
    assert all(parameter.grad is None for parameter in model.parameters())
