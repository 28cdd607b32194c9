"""Sums over inputs on a GPU, and outputs of blocks that it copies to the CPU."""

import pytest
import torch
from helpers.modes import llama
from helpers.tiny import bits_equal

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.oneshot.activation_cache import ActivationCache
from hf_sparse.statistics import GramMatrix, InputNorms


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_sums_are_those_of_float64(cuda, kind, dtype):
    statistic, total = kind(4100, cuda), 0  # several products of the Gram matrix
    for seed in range(2):
        x = torch.randn(3, 500, 4100, generator=torch.Generator().manual_seed(seed)).to(dtype)
        keep = torch.rand(3, 500, generator=torch.Generator().manual_seed(seed)) > 0.1
        statistic.observe(x.to(cuda), keep)
        tokens = x[keep].to(cuda, torch.float64)
        total = total + (tokens.square().sum(0) if kind is InputNorms else tokens.t() @ tokens)
    statistic.check()
    found = statistic.total if kind is InputNorms else statistic.matrix()
    assert float((found - total).norm() / total.norm()) < 5e-5


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("solver", ["none", "sparsegpt"])
def test_inputs_that_are_not_finite_are_refused(cuda, solver, forwards):
    network = llama(num_hidden_layers=2).eval().to(cuda)
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3] = torch.inf
    data = [{"input_ids": torch.randint(3, 40, (2, 8))}]
    config = OneshotConfig(target_sparsity=0.5, solver=solver, forwards=forwards, exclude=["*.up_proj"])
    with pytest.raises(ValueError, match=r'inputs of "model.layers.1.mlp.down_proj.weight": inputs must be finite'):
        prune_oneshot(network, data, config, progress=False)


def test_entries_are_copied_while_the_gpu_computes(cuda):
    """Many passes over large entries: a copy that comes too early or too late shows."""
    cache, work = ActivationCache("cpu"), torch.randn(2048, 2048, device=cuda)
    expected = [torch.full((1 << 22,), float(index), device=cuda) for index in range(4)]
    for index, tensor in enumerate(expected):
        cache[index] = (tensor, None)
    for number in range(8):
        for index in range(4):
            (read, _) = cache[index] if number % 2 else cache.pop(index)
            work = (work @ work).clamp(-1, 1)
            cache[index] = (read * 2 + index + work[0, 0] * 0, None)
            del read
            expected[index] = expected[index] * 2 + index
    for index, tensor in enumerate(expected):
        assert bits_equal(cache[index][0].cpu(), tensor.cpu())
