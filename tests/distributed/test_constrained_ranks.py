"""Constrained training computes the same on any number of ranks, in every mode, and resumes."""

import pytest
import torch
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, same
from spies import is_selected


OPTIONS = {"algorithm": "elsa", "target_sparsity": 0.5, **SCHEDULE}
_reference = {}


def reference(ranks, mode):
    """Returns the weights after training in one process, and what was logged."""
    other = MODES[mode].exact_as or "single_llama"
    if other not in _reference:
        run = ranks.run(other, f"elsa-{other}", world=1, options=OPTIONS)
        _reference[other] = run.weights, run.ranks[0]["log"]
    return _reference[other]


def residuals(log):
    return [row["constraint_residual"] for row in log if "constraint_residual" in row]


@pytest.mark.parametrize("mode", mode_params())
def test_two_ranks_train_as_one(ranks, mode):
    """Bit for bit, where the mode itself does; the sums of the residual are rounded differently."""
    weights, log = reference(ranks, mode)
    run = ranks.run(mode, f"elsa-{mode}", options=OPTIONS)
    selected = [weight for name, weight in run.weights.items() if is_selected(name)]
    zeros = sum(int((weight == 0).sum()) for weight in selected)
    assert zeros == round(0.5 * sum(weight.numel() for weight in selected))
    if MODES[mode].exact_as:
        assert same(run.weights, weights)
    else:
        assert all(torch.allclose(run.weights[name], weights[name], atol=2e-2) for name in weights)
    found = residuals(run.ranks[0]["log"])
    assert len(found) == 5 and found == pytest.approx(residuals(log), rel=1e-4 if MODES[mode].exact_as else 0.1)
    assert all(residuals(rank["log"]) == found for rank in run.ranks)


@pytest.mark.parametrize("mode", mode_params("fsdp2", "zero2"))
def test_resumes_exactly_on_other_numbers_of_ranks(ranks, tmp_path, mode):
    saved = {"options": OPTIONS | {"save_strategy": "steps", "save_steps": 6}}
    for before, after in [(2, 1), (1, 2)] if MODES[mode].elastic else [(2, 2)]:
        whole = tmp_path / f"whole{before}"
        ranks.run(mode, f"elsa-{mode}-saved", world=before, output_dir=whole, **saved)
        checkpoint = str(whole / "checkpoint-6")
        resumed = ranks.run(mode, f"elsa-{mode}-resumed", world=after, seed=5, resume=checkpoint, **saved)
        assert same(resumed.weights, reference(ranks, mode)[0]), (before, after)
