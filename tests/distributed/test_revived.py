"""What is saved has zeros on any number of ranks, where a callback changes weights between the step and the save."""

import pytest
from helpers.masks import read_masks
from helpers.modes import mode_params
from helpers.tiny import SCHEDULE, STEPS
from safetensors.torch import load_file


PRUNING = {"target_sparsity": 0.5, "scope": "layer", "criterion": "magnitude", **SCHEDULE}
SAVING = {"save_strategy": "steps", "save_steps": STEPS}
SELECTED = 4416


def check(weights, masks):
    assert sum(int((~mask).sum()) for mask in masks.values()) == SELECTED // 2
    for name, mask in masks.items():
        assert not weights[name][~mask].any(), name


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2", "zero3"))
def test_no_file_has_weights_that_another_callback_brought_back(ranks, tmp_path, mode):
    run = ranks.run(
        mode,
        f"{mode}-revived",
        output_dir=tmp_path,
        export=tmp_path / "export",
        options=PRUNING | SAVING,
        spies={"revive": {"step": STEPS}},
    )
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    masks = dict(read_masks(checkpoint))
    check(load_file(checkpoint / "model.safetensors"), masks)
    check(load_file(tmp_path / "export" / "model.safetensors"), masks)
    assert run.log.count("2,208 pruned weights were brought back") == 1


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2", "zero3"))
def test_nor_has_a_checkpoint_of_a_stock_trainer(ranks, tmp_path, mode):
    """But under ZeRO-3, which collects the weights without asking the modules for them: an error is logged."""
    run = ranks.run(
        mode,
        f"{mode}-revived-stock",
        output_dir=tmp_path,
        trainer="plain",
        options=SAVING,
        spies={"prune": PRUNING, "revive": {"step": STEPS}},
    )
    assert run.log.count("2,208 pruned weights were brought back") == 1
    assert run.log.count("may not be zero in the weights that were saved") == (mode == "zero3")
    if mode != "zero3":
        checkpoint = tmp_path / f"checkpoint-{STEPS}"
        check(load_file(checkpoint / "model.safetensors"), dict(read_masks(checkpoint)))
