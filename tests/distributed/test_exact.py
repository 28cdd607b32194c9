"""What the other tests here rest on: plain Trainer, on the same samples, computes the same on one rank and on several.

Where it does, bit for bit, a difference in a pruning run is pruning's doing.
"""

import pytest
import torch
from helpers.modes import MODES, each
from helpers.tiny import same


_reference = {}


def reference(ranks, mode):
    """The weights that one process trains."""
    other = MODES[mode].exact_as or "single_llama"
    if other not in _reference:
        _reference[other] = ranks.run(other, f"dense-{other}", world=1, trainer="plain").weights
    return _reference[other]


@pytest.mark.parametrize("mode", each())
def test_two_ranks_train_what_one_does(ranks, mode):
    _check(ranks, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", each())
def test_four_ranks_train_what_one_does(ranks4, mode):
    _check(ranks4, mode)


def _check(ranks, mode):
    weights, expected = ranks.run(mode, f"dense-{mode}", trainer="plain").weights, reference(ranks, mode)
    if MODES[mode].exact_as:
        assert same(weights, expected)
    else:
        assert weights.keys() == expected.keys()
        assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)


@pytest.mark.parametrize("mode", each("zero3"))
def test_zero3_on_one_rank_is_as_near_to_a_single_process_as_rounding_allows(ranks, mode):
    weights, expected = reference(ranks, mode), reference(ranks, "ddp")
    assert all(torch.allclose(weights[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("mode", each(checkpoints=True))
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
