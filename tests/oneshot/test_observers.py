"""Statistics of the inputs of a subgraph, one for each distinct input."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import nn

from hf_sparse.model.layers import find_layers
from hf_sparse.oneshot.observers import SAMPLE, InputObserver, InputObservers
from hf_sparse.statistics import GramMatrix, InputNorms


class Twins(nn.Module):
    """Three layers, two of one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.c(self.a(input=x) + self.b(x))


SHARED_INPUTS = {"a": "a", "b": "a", "c": "c"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Twins()


def test_one_statistic_for_each_input(model):
    x, y = torch.randn(2, 5, 3), torch.randn(1, 4, 3)
    with (
        torch.no_grad(),
        InputObservers(model, find_layers(model), SHARED_INPUTS, gram_layers=find_layers(model)[1:2]) as observers,
    ):
        model(x), model(y)
        found = observers.in_order()
    tokens = torch.cat([x.view(-1, 3), y.view(-1, 3)])
    assert [[layer.module for layer in observer.layers] for observer in found] == [["a", "b"], ["c"]]
    first, second = found
    assert isinstance(first.statistic, GramMatrix) and isinstance(second.statistic, InputNorms)
    assert torch.allclose(first.statistic.matrix(), tokens.t() @ tokens, atol=1e-5) and first.statistic.count == 14
    middle = model.a(tokens) + model.b(tokens)
    assert torch.allclose(second.statistic.total, middle.square().sum(0)) and torch.equal(first.sample, tokens)
    assert [observer.name for observer in found] == ["a.weight", "c.weight"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_is_left_out_of_statistics_and_samples(model):
    x, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, False, False], [True, True, True, False]])
    x[~mask] = torch.nan
    with torch.no_grad(), InputObservers(model, find_layers(model)[:2], SHARED_INPUTS, set()) as observers:
        observers.token_masks = [mask]
        model(x)
    (observer,) = observers.in_order()
    assert torch.allclose(observer.statistic.total, x[mask].square().sum(0)) and torch.equal(observer.sample, x[mask])


def test_a_sample_is_the_first_tokens():
    observer, x = InputObserver(InputNorms(2), []), torch.randn(SAMPLE + 50, 2).bfloat16()
    observer.observe(x[:60], None)
    observer.observe(x[60:], None)
    assert observer.statistic.count == SAMPLE + 50 and torch.equal(observer.sample, x[:SAMPLE].float())
    observer.observe(x, None)
    assert len(observer.sample) == SAMPLE


def test_the_forward_ends_at_the_last_module(model):
    reached = []
    model.c.register_forward_hook(lambda *_: reached.append(1))
    with InputObservers(model, find_layers(model), SHARED_INPUTS, set(), last_module="c") as observers:
        with pytest.raises(BaseException) as ended:
            model(torch.ones(1, 3))
    assert ended.typename == "StopForward" and not reached
    assert [observer.statistic.count for observer in observers.in_order()] == [1, 1]


def test_on_input_is_called_with_the_observer_and_its_error(model):
    calls = []
    x = torch.ones(1, 3)
    x[0, 1] = torch.inf
    with InputObservers(
        model,
        find_layers(model),
        SHARED_INPUTS,
        set(),
        on_input=lambda observer, error: calls.append((observer.name, error)),
    ):
        model(torch.ones(1, 3))
        model(x)
    assert [name for name, _ in calls] == ["a.weight", "c.weight"] * 2 and calls[0][1] is calls[1][1] is None
    assert str(calls[2][1]).startswith('inputs of "a.weight": inputs must be finite, but 1 of 3 (input 1 first)')
    with (
        InputObservers(model, find_layers(model), SHARED_INPUTS, set()),
        pytest.raises(ValueError, match='inputs of "a.weight"'),
    ):
        model(x)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_experts_are_observed_where_they_multiply(name):
    """Against inputs computed by hand; reading a weight without a product of it counts for nothing."""
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    module = model.model.layers[0].get_submodule("feed_forward.experts" if name == "llama4" else "mlp.experts")
    path = next(path for path, each in model.named_modules() if each is module)
    layers = [layer for layer in find_layers(model) if layer.module == path]
    args = []
    handle = module.register_forward_pre_hook(lambda _, given: args.append(given))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad(), InputObservers(model, layers, {}, {layers[1]}) as observers:
        module.gate_up_proj[0] * 2
        torch.matmul(torch.ones(2, 16), torch.ones(16, 16))
        model(**architecture.batches()[0])
    handle.remove()
    with torch.no_grad():
        expected = list(zip(*architecture.experts(args[0], module), strict=True))
    found = observers.in_order()
    assert [(observer.layers[0].name, observer.expert) for observer in found] == [
        (layer.name, expert) for layer in layers for expert in range(module.num_experts)
    ]
    for observer in found:
        x = expected[layers.index(observer.layers[0])][observer.expert]
        assert observer.statistic.count == len(x) and torch.allclose(
            observer.statistic.norms, x.norm(dim=0), atol=1e-4
        )
        assert observer.name == f"{observer.layers[0].name}[{observer.expert}]"


def test_experts_that_no_token_reached_have_an_observer():
    """So that all ranks have the same observers."""
    model = ARCHITECTURES["qwen3_moe"].model()
    layers = [layer for layer in find_layers(model) if layer.name.startswith("model.layers.0.mlp.experts")]
    with InputObservers(model, layers, {}, {layers[0]}) as observers:
        pass
    found = observers.in_order()
    assert len(found) == 8 and not any(observer.statistic.count for observer in found)
    assert [type(observer.statistic) for observer in found] == [GramMatrix] * 4 + [InputNorms] * 4
