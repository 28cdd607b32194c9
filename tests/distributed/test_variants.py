"""Options of the modes: dtypes, gradient accumulation, small weights whole under ZeRO-3; and options that raise."""

import re

import pytest
import torch
from helpers.masks import read_masks
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, STEPS, same
from safetensors.torch import load_file
from spies import is_selected


OPTIONS = {"target_sparsity": 0.5, "criterion": "snip_momentum", **SCHEDULE}
SELECTED = 4416


def deepspeed(mode, **zero):
    """Returns the mode's DeepSpeed config with changed `zero_optimization` options."""
    config = MODES[mode].arguments["deepspeed"]
    return config | {"zero_optimization": config["zero_optimization"] | zero}


def zeros(weights):
    return sum(int((weight == 0).sum()) for name, weight in weights.items() if is_selected(name))


@pytest.mark.parametrize("mode", mode_params("zero1", "zero2", "zero3"))
def test_zero_in_bf16_masks_the_master_and_the_copy(ranks, tmp_path, mode):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    options = OPTIONS | {"bf16": True, "deepspeed": MODES[mode].arguments["deepspeed"] | {"bf16": {"enabled": True}}}
    options |= {"save_strategy": "steps", "save_steps": STEPS}
    ranks.run(mode, f"{mode}-bf16", output_dir=tmp_path, export=tmp_path / "export", options=options)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    masters = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    masks = dict(read_masks(checkpoint))
    assert sum(int((~mask).sum()) for mask in masks.values()) == SELECTED // 2
    for name, mask in masks.items():
        assert exported[name].dtype == torch.bfloat16 and masters[name].dtype == torch.float32
        for weight in (exported[name], masters[name]):
            assert not weight[~mask].any() and not torch.signbit(weight[~mask]).any() and weight[mask].all()


@pytest.mark.parametrize("threshold", [700, 100_000])
@pytest.mark.parametrize("mode", mode_params("zero3"))
def test_zero3_with_small_weights_whole(ranks, tmp_path, mode, threshold):
    """Threshold 700 leaves weights of 24 x 24 whole; 100,000, the default, leaves all."""
    weights = []
    for index, options in enumerate(({}, deepspeed(mode, stage3_param_persistence_threshold=threshold))):
        options = OPTIONS | ({"deepspeed": options} if options else {})
        run = ranks.run(
            mode, f"{mode}-{threshold}", options=options, checked=not index, export=tmp_path / str(index), spies={}
        )
        weights.append(run.weights)
        assert same(load_file(tmp_path / str(index) / "model.safetensors"), weights[-1])
    assert zeros(weights[0]) == SELECTED // 2 and same(*weights)


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2"))
def test_accumulated_gradients_count_as_one(ranks, mode):
    options = OPTIONS | {"gradient_accumulation_steps": 2}
    runs = [
        ranks.run(name, f"{mode}-accumulated", world=world, options=options)
        for name, world in [("single", 1), (mode, 2)]
    ]
    assert zeros(runs[1].weights) == SELECTED // 2
    assert same(*(run.weights for run in runs))


@pytest.mark.parametrize(
    "change", [{"bf16": True}, {"fsdp_config": {"activation_checkpointing": True}}], ids=["bf16", "checkpointing"]
)
def test_fsdp2_with_other_options(ranks, change):
    fsdp = MODES["fsdp2"].arguments["fsdp_config"] | change.get("fsdp_config", {})
    run = ranks.run("fsdp2", "fsdp2-other", options=OPTIONS | change | {"fsdp_config": fsdp}, spies={"zeros": {}})
    assert zeros(run.weights) == SELECTED // 2
    assert not any(row["negative"] or row["revived"] for rank in run.ranks for row in rank["zeros"])


REFUSED = {
    "round_robin": (
        "zero2",
        {"deepspeed": lambda mode: deepspeed(mode, round_robin_gradients=True)},
        "NotImplementedError: .* switch off round_robin_gradients",
    ),
    "stage_0": (
        "zero1",
        {"deepspeed": lambda mode: deepspeed(mode, stage=0)},
        "NotImplementedError: DeepSpeed without ZeRO .* set zero_optimization.stage to 1, 2 or 3",
    ),
    "not_gathered": (
        "zero3",
        {"deepspeed": lambda mode: deepspeed(mode, stage3_gather_16bit_weights_on_model_save=False)},
        "ValueError: .*stage3_gather_16bit_weights_on_model_save is False: set it to true",
    ),
    "fsdp1": (
        "fsdp2",
        {"fsdp_config": {"version": 1, "sync_module_states": "false"}},
        "NotImplementedError: .*flattened by FSDP version 1: set version 2 in `fsdp_config`",
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=mode_params(REFUSED[case][0])[0].marks, id=case) for case in REFUSED]
)
def test_unsupported_options_raise_on_every_rank_before_training(ranks, case):
    mode, options, message = REFUSED[case]
    options = {name: value(mode) if callable(value) else value for name, value in options.items()}
    run = ranks.run(mode, case, fails=True, raises=True, checked=False, options=OPTIONS | options)
    for rank, found in enumerate(run.ranks):
        text = found.get("error") or (run.folder / f"rank-{rank}.log").read_text()
        assert re.search(message, text), text[-2000:]
        assert "step" not in found, "training went on"
