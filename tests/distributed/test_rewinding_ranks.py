"""Rewinding on several ranks: the weights of one process, in all copies, also when the run is resumed."""

import pytest
import torch
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, same
from safetensors.torch import load_file


OPTIONS = {"target_sparsity": 0.5, "criterion": "magnitude", "rewind": 2, "save_strategy": "steps", "save_steps": 4}
OPTIONS |= SCHEDULE


def run(ranks, mode, folder, **scenario):
    world = 1 if MODES[mode].kind == "NO" else ranks.world
    return ranks.run(mode, f"{mode}-rewind", world=world, output_dir=folder, options=OPTIONS, **scenario)


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero1", "zero2", "zero3"))
def test_two_ranks_train_as_one_process_and_resume(ranks, tmp_path, mode):
    """From checkpoint 4, with the weights to rewind to, and checkpoint 8, right after they were restored."""
    exact = MODES[mode].exact_as
    single = ranks.run(exact, f"{mode}-single", world=1, output_dir=tmp_path / "single", options=OPTIONS)
    several = run(ranks, mode, tmp_path / mode, spies={"zeros": {}})
    assert same(single.weights, several.weights)
    assert all(row["revived"] == row["negative"] == 0 for rank in several.ranks for row in rank["zeros"])
    for step in (4, 8):
        checkpoint = tmp_path / mode / f"checkpoint-{step}"
        resumed = run(ranks, mode, tmp_path / f"resumed-{step}", seed=3, resume=str(checkpoint))
        assert same(resumed.weights, several.weights)


@pytest.mark.parametrize("mode", mode_params("zero2", "zero3"))
def test_zero_in_bf16_restores_the_masters_and_their_copies(ranks, tmp_path, mode):
    """Right after the last prune step, copies that were not restored would differ from the resumed ones."""
    options = OPTIONS | {"bf16": True, "deepspeed": MODES[mode].arguments["deepspeed"] | {"bf16": {"enabled": True}}}
    options |= {"save_steps": 2}
    run = ranks.run(mode, f"{mode}-rewind-bf16", output_dir=tmp_path / "run", options=options)
    checkpoint = str(tmp_path / "run" / "checkpoint-8")
    resumed = ranks.run(
        mode,
        f"{mode}-rewind-bf16-resumed",
        output_dir=tmp_path / "resumed",
        options=options,
        resume=checkpoint,
        seed=3,
    )
    assert same(resumed.weights, run.weights)
    kept, restored = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 8))
    assert same(restored, {name: torch.where(restored[name] == 0, 0, weight) for name, weight in kept.items()})


def test_another_number_of_ranks_resumes(ranks, tmp_path):
    """Each takes its part of the weights to rewind to from the shards of two ranks."""
    several = run(ranks, "fsdp2", tmp_path / "several")
    checkpoint = str(tmp_path / "several" / "checkpoint-4")
    resumed = ranks.run(
        "fsdp2", "fsdp2-rewind-one", world=1, output_dir=tmp_path / "one", options=OPTIONS, resume=checkpoint, seed=3
    )
    assert same(resumed.weights, several.weights)


@pytest.mark.parametrize("mode", mode_params("fsdp_size", "tp"))
def test_modes_that_write_no_checkpoints(ranks, mode):
    options = OPTIONS | {"save_strategy": "no"}
    runs = [ranks.run(mode, f"{mode}-rewind-{rewind}", options=options | {"rewind": rewind}) for rewind in (2, None)]
    assert not same(*(found.weights for found in runs))
    if MODES[mode].exact_as:
        single = ranks.run(MODES[mode].exact_as, f"{mode}-rewind-single", world=1, options=options)
        assert same(single.weights, runs[0].weights)
