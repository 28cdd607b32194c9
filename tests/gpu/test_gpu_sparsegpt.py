"""SparseGPT with its kernels against its code for all devices, on the same GPU and in float64 on the CPU."""

import pytest
import torch

from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import HessianFactor, output_energy, sparsegpt
from hf_sparse.solvers.sparsegpt import SparseGPT
from hf_sparse.statistics import GramMatrix


CASES = {
    "given mask": (None, None, None),
    "unstructured": ("unstructured", 0.5, None),
    "2x2": ("2x2", 0.25, None),
    "2:4": ("2:4", 0.5, None),
    "1:4": ("1:4", 0.75, None),
    "wide blocks": ("unstructured", 0.5, 2048),  # too wide for a kernel
}


def problem(rows, columns):
    generator = torch.Generator().manual_seed(0)
    x, mixing = (torch.randn(size, columns, generator=generator) for size in (2 * columns, columns))
    gram, weight = GramMatrix(columns), torch.randn(rows, columns, generator=generator)
    gram.observe(x @ mixing / columns**0.5)
    return gram, weight, torch.rand(rows, columns, generator=generator) > 0.5


@pytest.mark.parametrize("rows, columns", [(200, 1200), (36, 72)])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_solve_like_the_reference(cuda, monkeypatch, case, rows, columns):
    text, sparsity, block = CASES[case]
    gram, weight, mask = problem(rows, columns)
    mask, pattern = (mask, None) if text is None else (None, get_pattern(text))
    exact = HessianFactor(gram.matrix().double())
    on_gpu = HessianFactor(gram.matrix().to(cuda))
    solver, mask_on_gpu = SparseGPT(block_size=block), None if mask is None else mask.to(cuda)
    expected, kept = solver.solve(weight.double(), exact, pattern, sparsity, mask)
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(sparsegpt, "_kernels", lambda device: None)
        solved, found_kept = solver.solve(weight.to(cuda), on_gpu, pattern, sparsity, mask_on_gpu)
        assert int(found_kept.sum()) == int(kept.sum())
        assert not solved[~found_kept].view(torch.int32).any()
        found.append((solved.cpu(), found_kept.cpu()))
    for solved, found_kept in found:
        # Rounding decides between scores that are almost equal; what follows from such a choice is as good.
        assert int((found_kept != kept).sum()) <= 0.01 * kept.numel()
        error, least = (output_energy(part.double() - weight, gram) for part in (solved, expected))
        assert abs(error / least - 1) < 1e-2
        if mask is not None:
            assert float((solved - expected).norm() / expected.norm()) < 1e-3


def test_triton_builds_the_kernels(cuda):
    pytest.importorskip("triton")
    assert sparsegpt._kernels(torch.device("cuda", torch.cuda.current_device())) is not None
