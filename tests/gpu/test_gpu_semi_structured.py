"""2:4 weights run on sparse tensor cores."""

import pytest
import torch
from torch import nn

from hf_sparse import Pruner, PruningConfig, accelerate_2of4
from hf_sparse.export import semi_structured


@pytest.mark.parametrize("cutlass", [False, True], ids=["cusparselt", "cutlass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_takes_the_weights_as_semi_structured(cuda, monkeypatch, cutlass, dtype):
    if cutlass and torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("torch has CUTLASS kernels for 2:4 for compute capability 8 only")
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    torch.manual_seed(0)
    layer = nn.Linear(512, 256, bias=False, device=cuda, dtype=dtype)
    Pruner(layer, PruningConfig(pattern="2:4", criterion="magnitude", targets=["weight"])).update(1, 1)
    x = torch.randn(64, 512, device=cuda, dtype=dtype)
    expected = layer(x).detach()
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), False)
    with torch.no_grad():
        output = layer(x)
    assert float((output.float() - expected.float()).norm() / expected.float().norm()) < 1e-2


def pruned_model(device, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias), nn.GELU(), nn.Linear(512, 128, bias)).to(device, torch.bfloat16)
    Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude", targets=["*.weight"])).update(1, 1)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_swapped_layers_compute_the_same(cuda, monkeypatch, bias):
    """Inputs of any shape, also of a number of tokens that the kernels do not have, and inside a CUDA graph."""
    model = pruned_model(cuda, bias)
    inputs = [torch.randn(*shape, 256, device=cuda).bfloat16() for shape in ((64,), (64, 1), (2, 3, 5), (1,), (1, 1))]
    inputs.append(torch.randn(16, 3, 256, device=cuda).bfloat16().transpose(0, 1))
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    monkeypatch.setattr(semi_structured, "_seconds", lambda work, graphs: 2.0 if "linear" in str(work.func) else 1.0)
    assert accelerate_2of4(model, (64, 3)).swapped == 2
    with torch.no_grad():
        for x, dense in zip(inputs, expected, strict=True):
            output = model(x)
            assert output.shape == dense.shape and output.is_contiguous()
            assert float((output.float() - dense.float()).norm() / dense.float().norm()) < 1e-2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(inputs[0])
        graph.replay()
    assert float((output.float() - expected[0].float()).norm() / expected[0].float().norm()) < 1e-2


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_layers_are_swapped_where_the_measurement_shows_a_gain(cuda, cuda_graphs):
    model = pruned_model(cuda)
    report = accelerate_2of4(model, (16, 64), cuda_graphs=cuda_graphs)
    for layer, module in zip(report.layers, (model[0], model[2]), strict=True):
        assert [speed.tokens for speed in layer.speeds] == [16, 64], layer.reason
        gain = all(speed.dense / speed.sparse >= 1.05 for speed in layer.speeds)
        assert layer.reason == (None if gain else "no gain")
        assert layer.swapped == isinstance(module, semi_structured.SemiStructuredLinear) == gain


def test_what_the_kernels_do_not_have_stays_dense(cuda):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(cuda, torch.float16)
    model.requires_grad_(False)
    for layer in model:
        layer.weight[:, ::2] = 0
    report = accelerate_2of4(model, (16,))
    assert [layer.reason.split(":")[0] for layer in report.layers] == ["refused"] * 2
