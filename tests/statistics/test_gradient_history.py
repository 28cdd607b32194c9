"""GradientHistory: a ring of the last gradients."""

import pytest
import torch

from hf_sparse.statistics import GradientHistory


def observed(steps, dtype=torch.float32, length=3):
    history = GradientHistory(torch.zeros(2, 2), length, dtype)
    for step in range(1, steps + 1):
        history.observe(torch.full((2, 2), float(step)))
    return history


def values(history):
    return [float(gradient[0, 0]) for gradient in history.gradients]


@pytest.mark.parametrize(("steps", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (5, [4, 5, 3])])
def test_the_last_gradients_are_kept(steps, kept):
    history = observed(steps)
    assert values(history) == kept and history.count == steps
    padded = history.padded()
    assert len(padded) == 3 and all(torch.equal(*pair) for pair in zip(padded, history.gradients))
    assert not any(gradient.any() for gradient in padded[len(kept) :])


def test_gradients_are_copied_and_prune_steps_leave_them():
    history, gradient = GradientHistory(torch.zeros(2, 2), 2), torch.full((2, 2), 1 + 2.0**-10)
    history.observe(gradient)
    gradient.zero_()
    history.restart()
    assert history.gradients[0].dtype == torch.bfloat16 and values(history) == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_state_round_trip(steps, dtype):
    history, other = observed(steps, dtype), observed(1, dtype)
    tensors, counters = history.state()
    assert other.saved_dtypes(counters) == {kind: tensor.dtype for kind, tensor in tensors.items()}
    other.restore(tensors, counters)
    for each in (history, other):
        each.observe(torch.full((2, 2), 9.0))
    assert values(other) == values(history) and other.count == history.count
    other.gradients[0].zero_()
    assert history.gradients[0].any()
