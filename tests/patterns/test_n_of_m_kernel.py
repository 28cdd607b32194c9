"""N:M masks against the definition: a stable sort of each group."""

import math

import numpy as np
import pytest
import torch

from hf_sparse import numerics
from hf_sparse.patterns.n_of_m_kernel import keep_n_of_m


@pytest.mark.parametrize(
    "keep, of", [(2, 4), (1, 4), (3, 4), (0, 4), (4, 4), (1, 1), (1, 2), (4, 8), (5, 7), (200, 300)]
)
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "infinite"])
def test_is_a_stable_sort_of_each_group(library, keep, of, kind, monkeypatch):
    monkeypatch.setattr(numerics, "CPU_CHUNK", 100)
    random = np.random.default_rng(keep)
    for groups in (0, 1, 25, 77):
        scores = {
            "normal": random.standard_normal((groups, of)),
            "ties": random.integers(0, 3, (groups, of)),
            "constant": np.full((groups, of), 7.0),
            "infinite": random.choice([-math.inf, math.inf, 0.0, -0.0], (groups, of)),
        }[kind].astype(np.float32)
        expected = np.ones((groups, of), dtype=bool)
        np.put_along_axis(expected, np.argsort(scores, axis=1, kind="stable")[:, : of - keep], False, axis=1)
        before = scores.copy()
        np.testing.assert_array_equal(keep_n_of_m(torch.from_numpy(scores), keep).numpy(), expected)
        np.testing.assert_array_equal(scores, before)


def test_2_of_4_by_hand(library):
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0], [5.0, 5.0, 5.0, 5.0], [3.0, 7.0, 3.0, 3.0], [6.0, 6.0, 0.0, 6.0]])
    expected = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1]]).bool()
    assert torch.equal(keep_n_of_m(scores, 2), expected)
    assert torch.equal(keep_n_of_m(scores.T.contiguous().T, 2), expected)
    assert torch.equal(keep_n_of_m(scores.bfloat16().float().requires_grad_(), 2), expected)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match=r"keep must be in 0\.\.4, the units of a group, but is 5"):
        keep_n_of_m(torch.ones(2, 4), 5)
