"""Runs whose ranks are killed at any moment resume from the last complete checkpoint, to the same weights."""

from pathlib import Path

import pytest
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, same


STEP = 4
OPTIONS = {"target_sparsity": 0.5, "criterion": "snip_momentum", **SCHEDULE}
OPTIONS |= {"save_strategy": "steps", "save_steps": 1}
ALL, FIRST, OTHER = [0, 1], [0], [1]
# By moment and killed ranks: the checkpoint to resume from. What a surviving rank writes after the kill must not be
# taken for a complete checkpoint.
KILLS = {
    ("in_training", "ALL"): 3,
    ("in_training", "OTHER"): 3,
    ("in_masks", "FIRST"): 3,
    ("before_weights", "ALL"): 3,
    ("before_optimizer", "ALL"): 3,
    ("before_optimizer", "OTHER"): 3,
    ("before_rng", "OTHER"): 3,
    ("in_state", "FIRST"): 3,
    ("after_save", "ALL"): 4,
}
WHO = {"ALL": ALL, "FIRST": FIRST, "OTHER": OTHER}
# Where every rank writes its own files; the slow tests have more moments.
SPLIT = {
    "fsdp2": [("before_rng", "OTHER"), ("in_masks", "OTHER")],
    "fsdp2_sharded": [("before_rng", "OTHER"), ("in_masks", "OTHER"), ("in_optimizer", "OTHER")],
    "zero1": [("in_optimizer", "OTHER")],
    "zero3": [("in_masks", "OTHER"), ("in_optimizer", "OTHER")],
}
_reference = {}


def _uninterrupted(ranks, mode):
    if mode not in _reference:
        options = OPTIONS | {"save_strategy": "no"}
        _reference[mode] = ranks.run(mode, f"{mode}-uninterrupted", options=options).weights
    return _reference[mode]


def _kill_and_resume(ranks, folder, mode, moment, who, resumed_from):
    killed = ranks.run(
        mode, f"{mode}-{moment}", fails=True, output_dir=folder, options=OPTIONS, kill=[moment, STEP, WHO[who]]
    )
    assert [killed.exits[rank] for rank in WHO[who]] == [-9] * len(WHO[who]), killed.log
    assert all(killed.exits), "surviving ranks must not exit with 0"
    again = ranks.run(mode, f"{mode}-{moment}-again", output_dir=folder, options=OPTIONS, seed=5, resume=True)
    expected = f"checkpoint-{resumed_from}"
    assert {rank["from"] for rank in again.ranks} == {expected}, (mode, moment, who)
    assert same(again.weights, _uninterrupted(ranks, mode)), (mode, moment, who)
    assert not list(Path(folder).rglob(".pruning*"))


@pytest.mark.parametrize("moment, who", KILLS)
def test_killed_under_ddp(ranks, tmp_path, moment, who):
    _kill_and_resume(ranks, tmp_path, "ddp", moment, who, KILLS[moment, who])


@pytest.mark.parametrize("mode", mode_params(*SPLIT))
def test_killed_with_files_of_every_rank(ranks, tmp_path, mode):
    for moment, who in SPLIT[mode]:
        _kill_and_resume(ranks, tmp_path / moment, mode, moment, who, resumed_from=3)


@pytest.mark.slow
@pytest.mark.parametrize("moment, who", KILLS)
@pytest.mark.parametrize("mode", mode_params(checkpoints=True))
def test_killed_in_any_mode(ranks, tmp_path, mode, moment, who):
    not_applicable = (MODES[mode].kind == "DEEPSPEED" and moment == "in_masks") or (
        mode == "fsdp2_sharded" and moment == "before_weights"  # its checkpoints contain shards only
    )
    if not not_applicable:
        _kill_and_resume(ranks, tmp_path, mode, moment, who, KILLS[moment, who])
