"""Masks by row against the definition: a stable sort of each row, whose first k are pruned."""

import math

import numpy as np
import pytest
import torch
from helpers.random_scores import KINDS, random_scores

from hf_sparse import numerics
from hf_sparse.selection.row_masks import keep_mask_by_row


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_a_stable_sort_of_each_row(library, kind, monkeypatch):
    monkeypatch.setattr(numerics, "CPU_CHUNK", 50)
    random = np.random.default_rng(KINDS.index(kind))
    for rows, units in ((1, 1), (5, 7), (20, 13), (3, 200), (0, 4), (4, 0)):
        scores = random_scores(random, kind, rows * units).reshape(rows, units)
        for k in (0, units // 2, units, torch.from_numpy(random.integers(0, units + 1, rows))):
            expected = np.ones((rows, units), dtype=bool)
            for row, count in enumerate(torch.as_tensor(k).expand(rows)):
                expected[row, np.argsort(scores[row], kind="stable")[: int(count)]] = False
            np.testing.assert_array_equal(keep_mask_by_row(torch.from_numpy(scores), k).numpy(), expected)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match=r"k must be in 0\.\.2, the units of a row, but is 3\.\.3"):
        keep_mask_by_row(torch.ones(2, 2), 3)
    with pytest.raises(ValueError, match="must not be NaN"):
        keep_mask_by_row(torch.tensor([[1.0, math.nan]]), 1)
