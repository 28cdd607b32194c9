"""Single layers: exact counts, a factor shared by solvers, errors of outputs, inputs that no token reached."""

import pytest
import torch

from hf_sparse import OneshotConfig
from hf_sparse.engine.parameter_group import ParameterGroup
from hf_sparse.model.layers import PrunableLayer
from hf_sparse.oneshot.layerwise import LayerPruner
from hf_sparse.oneshot.observers import InputObserver, input_norms
from hf_sparse.solvers.sparsegpt import SparseGPT
from hf_sparse.statistics import GramMatrix, InputNorms


def pruner_of(layers, **options):
    """A LayerPruner of one group with these layers."""
    (options,) = OneshotConfig(**options).resolve_groups().values()
    group = ParameterGroup(options.with_layers(layers))
    groups = {layer.name: group for layer in layers}
    return LayerPruner(groups, group.prune_counts({}, {}))


def observed(layers, x, kind=InputNorms, expert=None):
    observer = InputObserver(kind(x.shape[-1]), layers, expert)
    observer.observe(x, None)
    return observer


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LINEAR = PrunableLayer("a.weight", "linear", (4, 8))


@pytest.mark.parametrize("kind, shape", [("linear", (4, 8)), ("conv1d", (8, 4)), ("experts", (3, 4, 8))])
@pytest.mark.parametrize("target", [0.0625, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("solver", ["none", "sparsegpt", "admm"])
def test_exactly_the_target_is_pruned(kind, shape, target, solver):
    """Also where it is not a whole number in each row, matrix or layer."""
    layers = [PrunableLayer(f"{name}.weight", kind, shape) for name in "ab"]
    weights = {layer.name: random(*shape, seed=number) for number, layer in enumerate(layers)}
    gram = InputNorms if solver == "none" else GramMatrix
    experts = range(3) if kind == "experts" else [None]
    observers = [observed([layer], random(40, 8, seed=9 + (e or 0)), gram, e) for layer in layers for e in experts]
    pruner_of(layers, target_sparsity=target, solver=solver).prune_layers(observers, weights)
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(target * total)


def test_errors_of_outputs_on_the_sample():
    weight, x = random(4, 8), random(30, 8, seed=1)
    parameters = {LINEAR.name: weight.clone()}
    errors = pruner_of([LINEAR], target_sparsity=0.5).prune_layers([observed([LINEAR], x)], parameters)
    change = parameters[LINEAR.name] - weight
    expected = float((x @ change.t()).square().sum() / (x @ weight.t()).square().sum())
    assert errors == {LINEAR.name: pytest.approx(expected, rel=1e-5)}


def test_errors_of_experts_are_those_of_all_together():
    layer = PrunableLayer("e.weight", "experts", (2, 4, 8))
    weight, inputs = random(2, 4, 8), [random(10, 8, seed=1), 5 * random(20, 8, seed=2)]
    parameters = {layer.name: weight.clone()}
    observers = [observed([layer], x, expert=expert) for expert, x in enumerate(inputs)]
    errors = pruner_of([layer], target_sparsity=0.5).prune_layers(observers, parameters)
    pairs = [(x @ (parameters[layer.name] - weight)[e].t(), x @ weight[e].t()) for e, x in enumerate(inputs)]
    expected = sum(float(change.square().sum()) for change, _ in pairs) / sum(
        float(output.square().sum()) for _, output in pairs
    )
    assert errors[layer.name] == pytest.approx(expected, rel=1e-5)


def test_one_factor_for_all_weights_of_an_input(monkeypatch):
    made = []
    real = SparseGPT.prepare
    monkeypatch.setattr(SparseGPT, "prepare", lambda *args: made.append(args) or real(*args))
    layers = [PrunableLayer(f"{name}.weight", "linear", (4, 8)) for name in "qkv"]
    parameters = {layer.name: random(4, 8, seed=number) for number, layer in enumerate(layers)}
    alone = {name: weight.clone() for name, weight in parameters.items()}
    x = random(40, 8, seed=5)
    observer = observed(layers, x, GramMatrix)
    pruner_of(layers, pattern="2:4", solver="sparsegpt").prune_layers([observer], parameters)
    assert len(made) == 1 and observer._statistic is None and observer.sample is None
    for layer in layers:
        pruner_of([layer], pattern="2:4", solver="sparsegpt").prune_layers([observed([layer], x, GramMatrix)], alone)
    assert all(torch.allclose(alone[name], parameters[name], rtol=1e-5, atol=1e-6) for name in alone)


def test_given_masks_are_applied():
    parameters, mask = {LINEAR.name: random(4, 8)}, random(4, 8, seed=3) > 0
    expected = parameters[LINEAR.name] * mask
    given = pruner_of([LINEAR], target_sparsity=0.5)
    given = LayerPruner(given.groups, given.prune_counts, {LINEAR.name: mask})
    given.prune_without_inputs(LINEAR, parameters[LINEAR.name])
    assert torch.equal(parameters[LINEAR.name], expected)


def test_inputs_that_no_token_reached(caplog):
    parameters = {LINEAR.name: random(4, 8)}
    before = parameters[LINEAR.name].clone()
    for kind, options in ((InputNorms, {}), (GramMatrix, {"solver": "sparsegpt"})):
        given = pruner_of([LINEAR], target_sparsity=0.5, **options)
        with pytest.raises(ValueError, match=r'reaches 1 of 1 inputs, such as that of "a.weight": .*exclude=\["a"\]'):
            given.prune_layers([InputObserver(kind(8), [LINEAR])], parameters)
        assert torch.equal(parameters[LINEAR.name], before)
        parameters[LINEAR.name] = before.clone()
        given.on_unreached = "magnitude"
        errors = given.prune_layers([InputObserver(kind(8), [LINEAR])], parameters)
        kept = before.abs() > before.abs().flatten().kthvalue(16)[0]
        if not options:
            kept = before.abs() > before.abs().kthvalue(4, dim=1, keepdim=True)[0]
        assert torch.allclose(parameters[LINEAR.name], before * kept) and errors == {LINEAR.name: 0.0}
        parameters[LINEAR.name] = before.clone()
    assert caplog.text.count('no token reaches "a.weight": it is pruned by magnitude') == 2


def test_errors_of_a_factor_name_the_weight():
    given = pruner_of([LINEAR], target_sparsity=0.5, solver="sparsegpt", solver_kwargs={"dampening": 0})
    with pytest.raises(ValueError, match='inputs of "a.weight": the Gram matrix is not positive definite'):
        given.prune_layers([observed([LINEAR], random(2, 8), GramMatrix)], {LINEAR.name: random(4, 8)})


def test_norms_broadcast_to_the_weight():
    x, y = random(5, 8), random(6, 8, seed=1)
    norms = x.norm(dim=0)
    for kind, shape, expected in (
        ("linear", (4, 8), norms.view(1, 8)),
        ("conv1d", (8, 4), norms.view(8, 1)),
        ("experts", (2, 4, 8), torch.stack([norms, y.norm(dim=0)]).view(2, 1, 8)),
        ("experts_transposed", (2, 8, 4), torch.stack([norms, y.norm(dim=0)]).view(2, 8, 1)),
    ):
        layer = PrunableLayer("w", kind, shape)
        observers = [observed([layer], x), observed([layer], y)] if len(shape) == 3 else [observed([layer], x)]
        assert torch.allclose(input_norms(layer, observers), expected)
