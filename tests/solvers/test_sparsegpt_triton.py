"""The kernels of SparseGPT for GPUs against its code for all devices, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest


PROGRAM = """
from functools import partial

import torch

from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import HessianFactor, sparsegpt, sparsegpt_triton


def correlated(columns):
    x = torch.randn(4 * columns, columns) @ torch.randn(columns, columns)
    return HessianFactor(x.t() @ x).upper_CC


def both(columns, rows, block, share, text=None, select_block=None):
    pattern = text and get_pattern(text)
    upper, weight = correlated(columns), torch.randn(columns, rows)
    locked = torch.rand(columns, rows) >= share
    expected, expected_kept, found, kept = weight.clone(), locked.clone(), weight.clone(), locked.clone()
    strip, select = (pattern.of, partial(sparsegpt._select_strip, pattern, True)) if text else (16, None)
    sparsegpt._eliminate(expected, expected_kept, upper, block, strip, select_block, select)
    sparsegpt_triton.eliminate(found, kept, upper, block, select_block, pattern)
    name = f"{columns} x {rows}, blocks of {block}, {text}"
    assert torch.equal(kept, expected_kept) and not (kept & ~locked).any(), name
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), name
    assert not found[~kept].view(torch.int32).any(), f"{name}: a pruned weight is not +0.0"


def lowest_half(scores, kept, start):
    kept &= scores > scores.median()


torch.manual_seed(0)
both(38, 17, 4, share=0.5)  # rows of two programs, two panels of blocks, the last block narrower
both(20, 3, 16, share=0.0, select_block=lowest_half)
both(40, 17, 4, share=0.0, text="2:4")
both(24, 3, 16, share=0.3, text="2:4")
both(15, 3, 6, share=0.1, text="1:3")
both(8, 2, 8, share=0.1, text="4:8")

# Ties are pruned from the lowest index, as everywhere.
weight, kept = torch.ones(8, 2), torch.ones(8, 2, dtype=torch.bool)
sparsegpt_triton.eliminate(weight, kept, torch.eye(8), 8, None, get_pattern("2:4"))
assert kept.t().tolist() == [[False, False, True, True] * 2] * 2
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_are_the_elimination_of_the_solver():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
