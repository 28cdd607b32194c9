"""Learned masks are the same on any number of ranks, in every mode, and resume."""

import pytest
import torch
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, same
from spies import is_selected


METHODS = {
    "movement": {"algorithm": "movement", "scope": "global"},
    "soft_movement": {"algorithm": "soft_movement", "algorithm_kwargs": {"threshold": 0.52, "lambda_": 20.0}},
    "sr_ste": {"algorithm": "sr_ste", "pattern": "2:4", "algorithm_kwargs": {"decay": 0.01}},
}
_references = {}


def options_of(method, **more):
    return {"target_sparsity": 0.5, **SCHEDULE, **METHODS[method], **more}


def reference(ranks, mode, method):
    """Returns the run in one process, once."""
    other = MODES[mode].exact_as or "single_llama"
    key = other, method
    if key not in _references:
        run = ranks.run(other, f"{method}-{other}", world=1, options=options_of(method), spies={"zeros": {}})
        _references[key] = run
    return _references[key]


def check(ranks, mode, method):
    run = ranks.run(mode, f"{method}-{mode}", options=options_of(method), spies={"zeros": {}})
    single = reference(ranks, mode, method)
    selected = [weight for name, weight in run.weights.items() if is_selected(name)]
    assert sum(int((weight == 0).sum()) for weight in selected) == sum(weight.numel() for weight in selected) // 2
    assert method == "soft_movement" or any(row["revived"] for row in single.ranks[0]["zeros"])
    for rank in run.ranks:
        assert not any(row["negative"] or row["unlike"] for row in rank["zeros"])
        assert all(bool(row["copies"]) == (MODES[mode].kind == "DEEPSPEED") for row in rank["zeros"])
    if MODES[mode].exact_as:
        assert same(run.weights, single.weights)
    else:
        assert all(torch.allclose(run.weights[name], single.weights[name], atol=2e-2) for name in run.weights)


@pytest.mark.parametrize("mode", mode_params())
def test_two_ranks_learn_the_masks_of_one(ranks, mode):
    check(ranks, mode, "movement")


@pytest.mark.parametrize("mode", mode_params("fsdp2", "zero2"))
def test_masks_by_a_threshold(ranks, mode):
    check(ranks, mode, "soft_movement")


@pytest.mark.parametrize("mode", mode_params("fsdp2", "zero2", "zero3"))
def test_groups_of_weights_that_shards_split(ranks, mode):
    check(ranks, mode, "sr_ste")


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2"))
def test_resumes_exactly_on_other_numbers_of_ranks(ranks, tmp_path, mode):
    saved = {"options": options_of("movement", save_strategy="steps", save_steps=6)}
    for before, after in [(2, 1), (1, 2)] if MODES[mode].elastic else [(2, 2)]:
        whole = tmp_path / f"whole{before}"
        ranks.run(mode, f"movement-{mode}-saved", world=before, output_dir=whole, **saved)
        checkpoint = str(whole / "checkpoint-6")
        resumed = ranks.run(mode, f"movement-{mode}-resumed", world=after, seed=5, resume=checkpoint, **saved)
        assert same(resumed.weights, reference(ranks, mode, "movement").weights), (before, after)
