"""One-shot pruning of cases that are computed by hand."""

import logging

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import nn

from hf_sparse import OneshotConfig, PruningConfig, prune_oneshot
from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import SOLVERS


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def run(model, batches, **options):
    return prune_oneshot(model, batches, OneshotConfig(**options), progress=False)


def test_wanda_by_hand():
    """Norms over both batches are 1, 8, 2, 1: scores 4 8 6 2 and 1 16 6 4. Two of each row are pruned."""
    model = nn.Sequential(linear([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]]))
    batches = [torch.tensor([[1.0, 8.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -2.0, 1.0]])]
    report = run(model, batches, target_sparsity=0.5)
    assert model[0].weight.tolist() == [[0, 1, 3, 0], [0, 2, 3, 0]]
    # outputs of the two tokens: 12, 17 and -4, -2 before; 8, 16 and -6, -6 after
    expected = (4**2 + 1**2 + 2**2 + 4**2) / (12**2 + 17**2 + 4**2 + 2**2)
    assert report.layers[0].error == pytest.approx(expected) and report.sparsity == 0.5


@pytest.mark.parametrize(
    "options, kept",
    [
        # the four lowest of all scores, 4 8 6 2 / 1 16 6 4: 1, 2 and both 4
        ({"scope": "layer", "target_sparsity": 0.5}, ["-##-", "-##-"]),
        ({"scope": "layer", "target_sparsity": 0.25}, ["###-", "-###"]),
        ({"scope": "row", "target_sparsity": 0.25}, ["###-", "-###"]),
        ({"pattern": "1:4"}, ["-#--", "-#--"]),
        ({"pattern": "2:4", "criterion": "magnitude"}, ["#-#-", "--##"]),
        ({"pattern": "channel", "target_sparsity": 0.5}, ["----", "####"]),  # means 5 and 6.75
        ({"pattern": "channel:in", "target_sparsity": 0.5}, ["-##-", "-##-"]),  # means 2.5, 12, 6, 3
        ({"pattern": "2x2", "target_sparsity": 0.5}, ["##--", "##--"]),  # means 7.25 and 4.5
        ({"target_sparsity": 0.0, "keep_zeros": True, "pattern": "unstructured"}, None),
    ],
    ids=str,
)
def test_patterns_and_scopes_by_hand(options, kept):
    model = nn.Sequential(linear([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]]))
    batches = [torch.tensor([[1.0, 8.0, 0.0, 0.0], [0.0, 0.0, -2.0, 1.0]])]
    if kept is None:
        with pytest.raises(ValueError, match="there is nothing to prune: give `target_sparsity`"):
            run(model, batches, **options)
        return
    run(model, batches, **options)
    assert ["".join("-#"[bool(weight)] for weight in row) for row in model[0].weight] == kept


def test_owl_by_hand():
    """Scores are the weights, since inputs are ones. Of the first layer's, mean 2.5, one of 16 is above 5 times that;
    of the second's none. So the first is to get 0.5 - 0.08 and the second 0.5 + 0.08 of 16 weights: 6.72 and 9.28."""
    first = [[1.0, 1.1, 1.2, 1.3]] * 3 + [[1.0, 1.1, 1.2, 26.2]]
    second = [[2.1, 2.2, 2.3, 2.4]] * 4
    model = nn.Sequential(linear(first), nn.Sequential(linear(second)))
    model[0].register_forward_hook(lambda module, args, output: torch.ones(1, 4))
    report = run(model, [torch.ones(1, 4)], target_sparsity=0.5, allocation="owl", scope="layer")
    assert [layer.zeros for layer in report.layers] == [7, 9]


@pytest.mark.parametrize(
    "name, formula",
    [
        ("snip", lambda w, gradients: sum((w * g).abs() for g in gradients)),
        ("taylor", lambda w, gradients: sum((w * g).square() for g in gradients)),
        ("fisher", lambda w, gradients: w.square() * sum(g.square() for g in gradients)),
        ("gradient", lambda w, gradients: sum(g.abs() for g in gradients)),
    ],
)
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_criteria_of_gradients_are_those_of_the_dense_model(name, formula, scope):
    """Against autograd, the loss written out: a causal language model gets its own tokens as labels, and padding is
    no label."""
    architecture = ARCHITECTURES["llama"]
    model, batches = architecture.model(), architecture.batches(2)
    reference, gradients = architecture.model(), []
    for batch in batches:
        reference.zero_grad()
        logits = reference(**batch).logits[:, :-1].flatten(0, 1)
        labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100).flatten()
        nn.functional.cross_entropy(logits, labels).backward()
        gradients.append({name: weight.grad.clone() for name, weight in reference.named_parameters()})
    report = run(model, batches, target_sparsity=0.5, criterion=name, scope=scope)
    scores = {
        layer.name: formula(reference.get_parameter(layer.name), [each[layer.name] for each in gradients]).detach()
        for layer in report.layers
    }
    if scope == "global":
        every = torch.cat([score.flatten() for score in scores.values()])
        expected = {key: score > every.kthvalue(len(every) // 2)[0] for key, score in scores.items()}
    elif scope == "layer":
        expected = {key: score > score.flatten().kthvalue(score.numel() // 2)[0] for key, score in scores.items()}
    else:
        expected = {
            key: score > score.kthvalue(score.shape[1] // 2, dim=1, keepdim=True)[0] for key, score in scores.items()
        }
    wrong = sum(int((expected[key] != (model.get_parameter(key) != 0)).sum()) for key in expected)
    assert wrong <= 2  # where rounding decides between neighbours
    assert all(parameter.grad is None for parameter in model.parameters())


def test_global_wanda_ranks_scores_of_the_dense_model():
    """Second inputs are 10 times the first output: the first layer is pruned entirely."""
    model = nn.Sequential(linear([[1.0, 2.0], [3.0, 4.0]]), linear([[5.0, 6.0], [7.0, 8.0]]))
    report = run(model, [10 * torch.eye(2)], target_sparsity=0.5, scope="global", max_sparsity_per_layer=1.0)
    assert [layer.zeros for layer in report.layers] == [4, 0]


def test_layer_sparsity():
    model = ARCHITECTURES["llama"].model()
    shares = {"*.q_proj": 0.25, "*.layers.1.mlp.*": 0.75}
    report = run(model, ARCHITECTURES["llama"].batches(), layer_sparsity=shares)
    found = {layer.name.removesuffix(".weight").split("layers.")[1]: layer.sparsity for layer in report.layers}
    assert found == {
        "0.self_attn.q_proj": 0.25,
        "1.self_attn.q_proj": 0.25,
        "1.mlp.gate_proj": 0.75,
        "1.mlp.up_proj": 0.75,
        "1.mlp.down_proj": 0.75,
    }


@pytest.mark.parametrize("forwards", [1, 2])
def test_solvers_that_share_an_input(forwards):
    """Of one input, a Gram matrix serves SparseGPT's weights and its diagonal Wanda's; one layer is left alone."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Block()), torch.randn(40, 8)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    groups = {
        "q": {"targets": ["*.q"], "solver": "sparsegpt", "pattern": "2:4"},
        "k": {"targets": ["*.k"], "target_sparsity": 0.25},
    }
    run(model, [x], groups=groups, forwards=forwards)
    solved, _ = SOLVERS["sparsegpt"]().solve(before["0.q.weight"], x.t() @ x, get_pattern("2:4"), 0.5)
    assert torch.allclose(model[0].q.weight, solved, atol=1e-5)
    scores = before["0.k.weight"].abs() * x.norm(dim=0)
    kept = scores > scores.kthvalue(2, dim=1, keepdim=True)[0]
    assert torch.equal(model[0].k.weight, before["0.k.weight"] * kept)
    assert torch.equal(model[0].v.weight, before["0.v.weight"])


def test_weights_of_inputs_that_are_always_zero_are_counted_too():
    """SparseGPT is given a mask that keeps some of them: they stay, and the count is exact."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(30, 8)
    x[:, 3] = 0
    model[0].weight.data[:, 3] = 5.0
    report = run(model, [x], target_sparsity=0.5, criterion="magnitude", solver="sparsegpt", scope="row")
    assert report.zeros == 16 and (model[0].weight[:, 3] == 5).all()


def test_other_kinds_of_config_and_data():
    """A PruningConfig, and a generator of tuples."""
    model = nn.Sequential(linear([[4.0, 1.0]]))
    report = prune_oneshot(
        model,
        ((torch.ones(1, 2),) for _ in range(2)),
        PruningConfig(target_sparsity=0.5, criterion="wanda"),
        None,
        False,
    )
    assert report.zeros == 1 and model[0].weight.tolist() == [[4, 0]]


def test_progress_is_logged_and_shown(caplog, capsys):
    architecture = ARCHITECTURES["bert"]
    with caplog.at_level(logging.INFO, logger="hf_sparse"):
        prune_oneshot(architecture.model(), architecture.batches(), OneshotConfig(target_sparsity=0.5))
    assert "bert.encoder.layer.0.attention.self.query.weight: 50.00% zero, error 0." in caplog.text
    assert "50.00% zero, error up to 0." in capsys.readouterr().err
    run(architecture.model(), architecture.batches(), target_sparsity=0.5)
    assert "zero" not in capsys.readouterr().err


def test_magnitude_needs_no_data():
    model = nn.Sequential(linear([[4.0, -1.0, 3.0, 2.0]]))
    run(model, None, target_sparsity=0.5, criterion="magnitude")
    assert model[0].weight.tolist() == [[4, 0, 3, 0]]
