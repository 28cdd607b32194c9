"""2:4 weights run on sparse tensor cores."""

import pytest
import torch
from torch import nn

from hf_sparse import Pruner, PruningConfig


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
