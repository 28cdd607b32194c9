"""Training few parameters of a pruned model on several ranks: as one process, resumed on any number, or refused."""

import pytest
from helpers.modes import MODES, mode_params
from helpers.tiny import same
from spies import is_selected

from hf_sparse.files import TUNING_FILE


TUNED = {"keep_zeros": True, "save_strategy": "steps", "save_steps": 6}


def run(ranks, mode, tune, folder, **scenario):
    world = 1 if MODES[mode].kind == "NO" else ranks.world
    options = {"tune": tune, **TUNED}
    return ranks.run(mode, f"{mode}-{tune}", world=world, output_dir=folder, options=options, pruned=0.5, **scenario)


@pytest.mark.parametrize(
    "mode, tune", [("ddp", "masked_lora"), ("ddp", "norms"), ("fsdp2", "norms"), ("fsdp2", "biases")]
)
def test_two_ranks_train_as_one_process(ranks, tmp_path, mode, tune):
    single = run(ranks, "single", tune, tmp_path / "single")
    several = run(ranks, mode, tune, tmp_path / mode, spies={"zeros": {}}, export=tmp_path / "export")
    assert same(single.weights, several.weights)
    selected = {name: weight for name, weight in several.weights.items() if is_selected(name)}
    assert sum(int((weight == 0).sum()) for weight in selected.values()) == 4416 // 2
    assert all(row["revived"] == row["negative"] == 0 for rank in several.ranks for row in rank["zeros"])
    checkpoint = tmp_path / mode / "checkpoint-6"
    assert (checkpoint / TUNING_FILE).is_file()
    for other in ("single", mode) if mode == "ddp" else (mode,):  # FSDP writes checkpoints that it alone reads
        resumed = run(ranks, other, tune, tmp_path / f"resumed-{other}", seed=3, resume=str(checkpoint))
        assert same(resumed.weights, several.weights)


REFUSED = {
    "fsdp2": ("masked_lora", "needs whole weights, but the run splits them"),
    "fsdp_size": ("masked_lora", "needs whole weights, but the run splits them"),
    "zero2": ("norms", "DeepSpeed does not support"),
}


@pytest.mark.parametrize("mode", mode_params(*REFUSED))
def test_weights_that_are_split_are_refused(ranks, mode):
    tune, message = REFUSED[mode]
    done = ranks.run(mode, f"refused-{mode}", fails=True, options={"tune": tune, "keep_zeros": True}, pruned=0.5)
    assert any(done.exits) and message in done.log


def test_ranks_with_data_of_their_own_compute_the_same_weights(ranks):
    """Batches of two of the four rows that both ranks would see."""
    options = {"tune": "masked_lora", "keep_zeros": True, "per_device_train_batch_size": 2}
    done = ranks.run("ddp", "own-data", options=options, pruned=0.5)
    assert len({rank["digest"] for rank in done.ranks}) == 1
