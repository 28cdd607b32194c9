"""2:4 layers are swapped where they are faster. The CPU has no such kernels: products are dense here, and times given;
tests/gpu runs the kernels."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from hf_sparse import Pruner, PruningConfig, accelerate_2of4
from hf_sparse.export import semi_structured
from hf_sparse.export.semi_structured import SemiStructuredLinear


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fast, self.slow, self.also_slow = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 8)
        self.dense, self.single = nn.Linear(8, 8), nn.Linear(8, 8).float()
        self.head, self.tied, self.moved = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.wide, self.own = nn.Linear(8, 48), type("Own", (nn.Linear,), {})(8, 8)
        self.bfloat16()
        self.single.float()
        self.tied.weight = self.head.weight


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model()
    names = ["fast", "slow", "also_slow", "single", "head", "wide"]
    config = PruningConfig(pattern="2:4", criterion="magnitude", targets=[f"{name}.weight" for name in names])
    Pruner(model, config).update(1, 1)
    model.moved.to("meta")
    return model


# Shape of a weight -> seconds of the dense kernel, and of the 2:4 kernel with algorithms 0 and 7, for 4 and 64 tokens.
SECONDS = {
    (32, 16): {4: (3.0, 4.0, 2.0), 64: (3.0, 1.0, 2.5)},  # only algorithm 7 is faster for both
    (16, 32): {4: (3.0, 4.0, 4.0), 64: (3.0, 1.0, 1.0)},
    (8, 16): {4: (3.0, 2.9, 3.0), 64: (3.0, 2.9, 3.0)},  # hardly faster
}


@pytest.fixture
def kernels(monkeypatch):
    """Dense products in place of 2:4 kernels, with the times above."""
    calls = SimpleNamespace(timed=[], packed=[])

    def pack(weight, algorithm):
        if weight.shape[0] % 32 == 16 and weight.shape[1] == 8:
            raise RuntimeError("Error original_tensor.shape is\nnot supported")
        calls.packed.append(algorithm)
        packed = weight.clone()
        packed.algorithm = algorithm
        return packed

    def seconds(work, cuda_graphs):
        x, weight, _ = work.args
        place = 0 if work.func is linear else 1 + (weight.algorithm == 7)
        calls.timed.append((tuple(weight.shape), len(x), place))
        return SECONDS.get(tuple(weight.shape), {4: (1.0, 2.0, 2.0), 64: (1.0, 2.0, 2.0)})[len(x)][place]

    def product(x, weight, bias):
        return linear(x, weight, bias)

    monkeypatch.setattr(semi_structured, "_DEVICE", "cpu")
    monkeypatch.setattr(semi_structured, "_check_devices", lambda modules: None)
    monkeypatch.setattr(semi_structured, "_algorithms", lambda *_: [0, 7])
    for name, replacement in (("_pack", pack), ("_seconds", seconds), ("_product", product)):
        monkeypatch.setattr(semi_structured, name, replacement)
    return calls


def test_only_faster_layers_are_swapped_and_each_other_one_says_why_not(model, kernels):
    x, hooked = torch.randn(2, 3, 16).bfloat16(), []
    model.fast.register_forward_hook(lambda module, args, output: hooked.append(output))
    expected, before = model.fast(x), dict(model.named_parameters())
    printed = []
    report = accelerate_2of4(model, tokens=(64, 4, 4), echo=printed.append)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "fast": None,
        "slow": "no gain",
        "also_slow": "no gain",
        "dense": "not 2:4",
        "single": "float32 has no 2:4 kernel, float16 and bfloat16 have",
        "head": "its weight is shared with another module",
        "tied": "its weight is shared with another module",
        "moved": "it is on meta",
        "wide": "refused: Error original_tensor.shape is not supported",
        "own": "it is not a plain linear layer",
    }
    speeds = {layer.name: [(speed.tokens, speed.speedup) for speed in layer.speeds] for layer in report.layers}
    assert speeds["fast"] == [(4, 1.5), (64, 1.2)] and speeds["slow"] == [(4, 0.75), (64, 3.0)]
    assert type(model.fast) is SemiStructuredLinear and torch.equal(model.fast(x), expected) and len(hooked) == 2
    assert model.fast.bias is before["fast.bias"] and not model.fast.weight.requires_grad
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before if name != "fast.weight")
    assert report.swapped == 1
    (text,) = printed
    assert text == str(report) and "fast       32x16  2:4" in text and "4: 1.50x, 64: 1.20x" in text
    assert text.endswith("1 of 10 linear layers use 2:4 kernels")


def test_layers_of_one_shape_are_timed_once(kernels):
    model = nn.Sequential(*(nn.Linear(16, 32, dtype=torch.bfloat16) for _ in range(3)))
    Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude", targets=["*.weight"])).update(1, 1)
    report = accelerate_2of4(model, tokens=(4,), echo=lambda text: None)
    assert report.swapped == 3 and kernels.timed == [((32, 16), 4, place) for place in range(3)]
    assert kernels.packed[-3:] == [7] * 3  # the algorithm that was faster
    again = accelerate_2of4(model, tokens=(4,), echo=lambda text: None)
    assert [layer.reason for layer in again.layers] == ["it is 2:4 already"] * 3 and not again.swapped


def test_a_gain_smaller_than_asked_for_swaps_nothing(kernels):
    model = nn.Sequential(nn.Linear(16, 32, dtype=torch.bfloat16))
    Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude", targets=["*.weight"])).update(1, 1)
    assert accelerate_2of4(model, tokens=(64, 4), min_speedup=1.3, echo=lambda text: None).swapped == 0
    assert accelerate_2of4(model, tokens=(64, 4), min_speedup=1.2, echo=lambda text: None).swapped == 1


def test_it_is_refused_without_a_gpu_that_has_such_kernels(model, monkeypatch):
    with pytest.raises(ValueError, match=r"tokens is \(\): give one number"):
        accelerate_2of4(model, tokens=())
    with pytest.raises(ValueError, match="`min_speedup` is 0.9: it must be 1 or more"):
        accelerate_2of4(model, min_speedup=0.9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="need a CUDA device, and torch finds none: run this on a machine with"):
        accelerate_2of4(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="no linear layer on a CUDA device"):
        accelerate_2of4(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    fake = nn.Linear(4, 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match=r"capability 8.0 \(Ampere\) or newer, but Tesla T4 \(cpu\) has 7.5"):
        accelerate_2of4(fake)
