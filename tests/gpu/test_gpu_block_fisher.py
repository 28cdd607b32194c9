"""oBERT and M-FAC on a GPU: their scores and updates are those of the CPU, up to rounding."""

import pytest
import torch

from hf_sparse.criteria.mfac import MFAC
from hf_sparse.criteria.obert import OBert


@pytest.mark.parametrize("cls", [OBert, MFAC])
@pytest.mark.parametrize("width", [1, 4, 200])
def test_scores_and_changes_are_those_of_the_cpu(cuda, cls, width):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 1, 200, generator=generator)
    gradients = [torch.randn(weight.shape, generator=generator).bfloat16() for _ in range(64)]
    before = torch.rand(weight.shape, generator=generator) > 0.3
    after = before & (torch.rand(weight.shape, generator=generator) > 0.3)
    criterion, found = cls(), []
    block = criterion.block_columns(200, width)
    for device in ("cpu", cuda):
        w, b, a, g = weight.to(device), before.to(device), after.to(device), [part.to(device) for part in gradients]
        scores, change = criterion.weight_scores(w, b, g, block, width), criterion.weight_change(w, b, a, g, block)
        assert scores.device == change.device == w.device
        found.append((scores.cpu(), change.cpu()))
    for expected, other in zip(*found, strict=True):
        assert torch.allclose(other, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
