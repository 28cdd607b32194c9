"""Sampled masks on shards: the same noise, totals and masks as in one process, and errors by name."""

import pytest
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, same


OPTIONS = {
    "gumbel_nm": {"pattern": "2:4"},
    "gumbel_sigmoid": {"target_sparsity": 0.5, "scope": "global"},
}


def options_of(algorithm, **options):
    kwargs = {"learning_rate": 0.1, "norm_weight": 0.01}
    return {"algorithm": algorithm, "algorithm_kwargs": kwargs, **OPTIONS[algorithm], **SCHEDULE, **options}


@pytest.mark.parametrize("algorithm", OPTIONS)
@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "fsdp_size", "tp"))
def test_two_ranks_learn_the_masks_of_one_process(ranks, tmp_path, mode, algorithm):
    options, alone = options_of(algorithm), MODES[mode].exact_as or f"single_{MODES[mode].model}"
    run = ranks.run(mode, f"{mode}-{algorithm}", options=options)
    single = ranks.run(alone, f"single-{mode}-{algorithm}", world=1, options=options)
    zeros = {name: weight == 0 for name, weight in run.weights.items()}
    assert sum(int(zero.sum()) for zero in zeros.values()) > 2000
    if MODES[mode].exact_as:
        assert same(run.weights, single.weights)
    else:
        differing = sum(int((zero != (single.weights[name] == 0)).sum()) for name, zero in zeros.items())
        assert differing < 10


@pytest.mark.parametrize("algorithm", OPTIONS)
def test_a_run_on_shards_resumes_on_one_rank_and_back(ranks, tmp_path, algorithm):
    options = options_of(algorithm, save_strategy="steps", save_steps=5)
    whole = ranks.run("fsdp2", "whole", output_dir=tmp_path / "whole", options=options)
    for world in (2, 1):
        again = ranks.run(
            "fsdp2",
            f"again-{world}",
            world=world,
            output_dir=tmp_path / f"again-{world}",
            options=options,
            seed=5,
            resume=str(tmp_path / "whole" / "checkpoint-5"),
        )
        assert same(again.weights, whole.weights)


def test_groups_that_are_split_between_ranks_are_named(ranks):
    # Each rank holds 28 of the 56 inputs of down_proj.
    options, config = options_of("gumbel_nm", pattern="4:8"), {"intermediate_size": 56}
    run = ranks.run("tp", "split", raises=True, config=config, options=options)
    assert "down_proj" in run.ranks[0]["error"] and '`pattern` "4:8"' in run.ranks[0]["error"]
