"""Distillation on several ranks: as one process, in every mode, with a whole teacher on each rank, and resumed."""

import pytest
import torch
from helpers.modes import MODELS, MODES, mode_params
from helpers.tiny import same

from hf_sparse.files import DISTILLATION_FILE


OPTIONS = {"target_sparsity": 0.5, "criterion": "magnitude", "scope": "layer", "distill_hidden": 0.5}
TERMS = ("loss", "loss_task", "loss_distill", "loss_hidden")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of teachers, by model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        MODELS[name](seed=7).save_pretrained(folder)
    return folders


def run(ranks, mode, name, teacher, **scenario):
    world = 1 if MODES[mode].kind == "NO" else ranks.world
    options = OPTIONS | {"distill_teacher": str(teacher)} | scenario.pop("options", {})
    return ranks.run(mode, f"{name}-{mode}", world=world, options=options, **scenario)


def logged(done, rank=0):
    return [[log[name] for name in TERMS] for log in done.ranks[rank]["log"] if "loss_task" in log]


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "fsdp_size", "tp", "zero2", "zero3"))
def test_two_ranks_train_as_one_process(ranks, teachers, mode):
    """`fsdp_size` and `tp` with the mean over the tokens of all ranks."""
    model = MODES[mode].model
    single = run(ranks, "single" if model == "bert" else "single_llama", "distilled", teachers[model])
    several = run(ranks, mode, "distilled", teachers[model])
    exact = MODES[mode].exact_as in ("single", "single_llama")
    for name, weight in single.weights.items():
        if exact:
            assert torch.equal(several.weights[name], weight), name
        else:
            torch.testing.assert_close(several.weights[name], weight, rtol=1e-3, atol=1e-4)
    tolerance = {"rel": 1e-6} if exact else {"rel": 1e-3, "abs": 1e-5}
    assert logged(several) == [pytest.approx(row, **tolerance) for row in logged(single)]
    assert logged(several) == logged(several, rank=1) and len(logged(several)) == 10


def test_ranks_with_data_of_their_own_compute_the_mean_over_all(ranks, teachers):
    """Two rows on each of two ranks, and four rows in one process."""
    single = run(ranks, "single", "own", teachers["bert"])
    several = run(ranks, "ddp", "own", teachers["bert"], options={"per_device_train_batch_size": 2}, copies=1)
    assert len({rank["digest"] for rank in several.ranks}) == 1
    assert logged(several)[0] == pytest.approx(logged(single)[0], rel=1e-4)


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero3"))
def test_a_resumed_run_learns_from_the_weights_that_the_first_began_with(ranks, tmp_path, mode):
    saving = {"save_strategy": "steps", "save_steps": 6}
    whole = run(ranks, mode, "whole", "self", output_dir=tmp_path, options=saving)
    assert (tmp_path / "checkpoint-6" / DISTILLATION_FILE).is_file()
    resumed = run(ranks, mode, "resumed", "self", resume=str(tmp_path / "checkpoint-6"))
    assert same(resumed.weights, whole.weights)
    refused = run(ranks, mode, "other", "self", resume=str(tmp_path / "checkpoint-6"), seed=3, raises=True)
    errors = [rank["error"] for rank in refused.ranks]
    assert "with other weights than the run of" in errors[0] and all("Error" in error for error in errors)


def test_a_copy_of_weights_that_are_split_is_refused(ranks):
    done = run(ranks, "fsdp_size", "refused", "self", raises=True)
    assert all("are split over processes from the start" in rank["error"] for rank in done.ranks)
