"""Without pruning, Trainer computes the same on one rank and on several, bit for bit where `exact_as` is given.

The other tests rely on it: any difference in a pruning run is then due to pruning.
"""

import pytest
import torch
from helpers.modes import MODES, mode_params
from helpers.tiny import same


_reference = {}


def reference(ranks, mode):
    """Returns the weights after training in one process."""
    other = MODES[mode].exact_as or "single_llama"
    if other not in _reference:
        _reference[other] = ranks.run(other, f"dense-{other}", world=1, trainer="plain").weights
    return _reference[other]


@pytest.mark.parametrize("mode", mode_params())
def test_two_ranks_train_as_one(ranks, mode):
    _check(ranks, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", mode_params())
def test_four_ranks_train_as_one(ranks4, mode):
    _check(ranks4, mode)


def _check(ranks, mode):
    weights, expected = ranks.run(mode, f"dense-{mode}", trainer="plain").weights, reference(ranks, mode)
    if MODES[mode].exact_as:
        assert same(weights, expected)
    else:
        assert weights.keys() == expected.keys()
        assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)


@pytest.mark.parametrize("mode", mode_params("zero3"))
def test_zero3_on_one_rank_equals_a_single_process_up_to_rounding(ranks, mode):
    weights, expected = reference(ranks, mode), reference(ranks, "ddp")
    assert all(torch.allclose(weights[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("mode", mode_params(checkpoints=True))
def test_trainer_resumes_exactly(ranks, tmp_path, mode):
    run = {"trainer": "plain", "options": {"save_strategy": "steps", "save_steps": 6}}
    for before, after in [(2, 2), (2, 1), (1, 2)] if MODES[mode].elastic else [(2, 2)]:
        whole = tmp_path / f"whole{before}"
        if not whole.exists():
            ranks.run(mode, f"dense-{mode}-saved", world=before, output_dir=whole, **run)
        resumed = ranks.run(
            mode, f"dense-{mode}-resumed", world=after, seed=5, resume=str(whole / "checkpoint-6"), **run
        )
        assert same(resumed.weights, reference(ranks, mode)), (before, after)
