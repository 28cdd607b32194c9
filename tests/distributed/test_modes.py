"""Pruning on several ranks equals pruning in one process: the same masks and weights, and zeros on every rank."""

import re
import shutil

import pytest
import torch
from helpers.masks import read_masks
from helpers.modes import MODES, mode_params
from helpers.tiny import PRUNE_STEPS, SCHEDULE, STEPS, same
from safetensors.torch import load_file
from spies import is_selected
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_sparse.training.checkpoint_search import find_checkpoint_error
from hf_sparse.training.resume import ResumeState


METHODS = {
    "magnitude": {"scope": "global"},
    "snip_momentum": {"criterion": "snip_momentum", "scope": "global"},
    "n_of_m": {"pattern": "2:4"},
    "blocks": {"pattern": "4x1", "scope": "layer"},
    "rows": {"scope": "row"},
    "channels": {"pattern": "channel"},
    "obert": {"criterion": "obert", "criterion_kwargs": {"block_size": 8, "num_gradients": 5}},
    "mfac": {"criterion": "mfac", "criterion_kwargs": {"num_gradients": 5}},
    "units": {
        "criterion": "snip_momentum",
        "groups": {"ffn": {"pattern": "neuron:1", "target_sparsity": 0.7}, "attention": {"pattern": "head"}},
    },
}
SELECTED = {"bert": 4416, "llama": 8704}
# Half of the heads, and 31 of 44 neurons of 2 x 24 weights, or 34 of 48 neurons of 3 x 32.
ZEROS_OF_UNITS = {"bert": 1152 + 31 * 48, "llama": 2048 + 34 * 96}
UPDATING = ("obert", "mfac")
CLASSES = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}


class Runs:
    """Pruning runs, cached."""

    def __init__(self, ranks, folder):
        self.ranks, self.folder, self.made = ranks, folder, {}

    def __call__(self, mode, method, world=None, **scenario):
        world = 1 if MODES[mode].kind == "NO" else world or self.ranks.world
        key = (mode, method, world, *scenario)
        if key not in self.made:
            options = {"target_sparsity": 0.5, **SCHEDULE, **METHODS[method], **scenario.pop("options", {})}
            output_dir = self.folder / f"{mode}-{method}-{world}-{len(self.made)}"
            if MODES[mode].checkpoints:
                options |= {"save_strategy": "steps", "save_steps": 6}
            scenario |= {"spies": {"zeros": {}}, "options": options}
            run = self.ranks.run(
                mode, f"{mode}-{method}", world=world, output_dir=output_dir, export=output_dir / "export", **scenario
            )
            self.made[key] = run, output_dir
        return self.made[key]

    def reference(self, mode, method, **scenario):
        """The same run in one process."""
        other = MODES[mode].exact_as or f"single_{MODES[mode].model}"
        return self(other, method, world=1, **scenario)


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def runs4(ranks4, tmp_path_factory):
    return Runs(ranks4, tmp_path_factory.mktemp("runs4"))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in UPDATING])
@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "fsdp_size", "tp", "zero2", "zero3"))
def test_two_ranks_prune_as_one_process(runs, mode, method):
    _check(runs, mode, method)


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2", "zero3"))
def test_weights_that_prune_steps_update_are_those_of_one_process(runs, mode):
    """Blocks of 8 inputs: ZeRO splits them, and rows are redistributed."""
    _check(runs, mode, "obert")


@pytest.mark.parametrize("mode", mode_params("fsdp2", "zero2"))
def test_weights_of_whole_rows_are_updated_as_in_one_process(runs, mode):
    _check(runs, mode, "mfac")


@pytest.mark.parametrize("method", ["snip_momentum", pytest.param("blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", mode_params("fsdp2_sharded", "zero1"))
def test_modes_with_the_same_shards_as_another_mode(runs, mode, method):
    _check(runs, mode, method)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", mode_params())
def test_more_ranks_prune_as_one_process(runs4, mode, method, world):
    """Three ranks hold shards of unequal size, and the mean of three gradients is rounded."""
    if world == 4 or MODES[mode].exact_as:
        _check(runs4, mode, method, world)


def _check(runs, mode, method, world=None):
    run, output_dir = runs(mode, method, world)
    single, _ = runs.reference(mode, method)
    world, rounded = len(run.ranks), world == 3
    _check_zeros(run, single, mode)
    weights, expected = run.weights, single.weights
    assert weights.keys() == expected.keys()
    if MODES[mode].exact_as and not rounded:
        assert same(weights, expected)
    exported = _exported(output_dir, mode)
    assert same(exported, weights)
    num_zeros = sum(int((exported[name] == 0).sum()) for name in exported if is_selected(name))
    model = MODES[mode].model
    assert num_zeros == (ZEROS_OF_UNITS[model] if "groups" in METHODS[method] else SELECTED[model] // 2)


def _exported(output_dir, mode):
    """Returns the weights that one process loads from the saved model."""
    model = CLASSES[MODES[mode].model].from_pretrained(output_dir / "export")
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _check_zeros(run, single, mode):
    """Checks zeros after every step, on every rank and in every copy; their number is that of one process."""
    whole = not MODES[mode].sharded and mode != "zero3"
    expected = [row["zeros"] for row in single.ranks[0]["zeros"]]
    assert [step for step in range(1, STEPS + 1) if expected[step - 1] > (expected[step - 2] if step > 1 else 0)] == [
        *PRUNE_STEPS
    ]
    for rank in run.ranks:
        assert [row["step"] for row in rank["zeros"]] == [*range(1, STEPS + 1)]
        assert not any(row["negative"] or row["revived"] or row["unlike"] for row in rank["zeros"])
        assert all(bool(row["copies"]) == (MODES[mode].kind == "DEEPSPEED") for row in rank["zeros"])
        assert not whole or [row["zeros"] for row in rank["zeros"]] == expected
    if not whole:
        rows = zip(*(rank["zeros"] for rank in run.ranks), strict=True)
        assert [sum(row["zeros"] for row in ranks) for ranks in rows] == expected


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2", "zero3"))
@pytest.mark.parametrize(
    "options",
    [{"algorithm": "rigl", "pattern": "2:4"}, {"algorithm": "set", "algorithm_kwargs": {"initial_mask": "random"}}],
    ids=["rigl", "set"],
)
def test_weights_are_exchanged_at_the_target_as_in_one_process(runs, mode, options):
    """Weights that return are 0 for one step; what the optimizer has of them decides later weights."""
    run, _ = runs(mode, "magnitude", options=options | {"scope": "layer"})
    single, _ = runs.reference(mode, "magnitude", options=options | {"scope": "layer"})
    assert same(run.weights, single.weights)
    for rank in run.ranks:
        assert not any(row["negative"] or row["unlike"] for row in rank["zeros"])
    assert [row["zeros"] > SELECTED["bert"] // 2 for row in single.ranks[0]["zeros"]] == [
        step in PRUNE_STEPS[:-1] for step in range(1, STEPS + 1)
    ]


@pytest.mark.parametrize("mode", mode_params("fsdp2", "zero2", "zero3"))
def test_shards_of_unequal_size(runs, mode):
    """45 rows: 23 and 22."""
    odd = {"config": {"intermediate_size": 45}}
    run, _ = runs(mode, "snip_momentum", **odd)
    assert same(run.weights, runs.reference(mode, "snip_momentum", **odd)[0].weights)


def test_tensor_parallel_masks_equal_those_of_one_process(runs):
    """With learning rate 0, rounding changes no weight and masks can be compared. Some rows are split over ranks."""
    still = {"options": {"learning_rate": 0.0}}
    for method in (method for method in METHODS if method not in UPDATING):  # whose updates gradients determine
        assert same(runs("tp", method, **still)[0].weights, runs("single_llama", method, **still)[0].weights), method


# Checkpoints


@pytest.mark.parametrize("mode", mode_params(checkpoints=True))
def test_resume_on_the_same_or_another_number_of_ranks(runs, tmp_path, mode):
    _resume(runs, tmp_path, mode, [(2, 2), (2, 1), (1, 2)] if MODES[mode].elastic else [(2, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", mode_params(checkpoints=True))
def test_resume_on_up_to_four_ranks(runs4, tmp_path, mode):
    _resume(runs4, tmp_path, mode, [(4, 4), (4, 2), (2, 4), (4, 1), (1, 4)] if MODES[mode].elastic else [(4, 4)])


def test_neurons_and_heads_resume_on_another_number_of_ranks(runs, tmp_path):
    _resume(runs, tmp_path, "fsdp2", [(2, 1)], "units")


def test_the_last_gradients_resume_on_another_number_of_ranks(runs, tmp_path):
    _resume(runs, tmp_path, "fsdp2", [(2, 1), (1, 2)], "obert")


def _resume(runs, tmp_path, mode, worlds, method="snip_momentum"):
    for before, after in worlds:
        whole, output_dir = runs(mode, method, world=before)
        begin = tmp_path / f"begin-{before}-{after}.safetensors"
        resumed = runs.ranks.run(
            mode,
            f"{mode}-{before}-to-{after}",
            world=after,
            seed=5,
            resume=str(output_dir / "checkpoint-6"),
            spies={"begin": {"path": str(begin)}},
            options={"target_sparsity": 0.5, **SCHEDULE, **METHODS[method]},
        )
        masks = dict(read_masks(output_dir / "checkpoint-6"))
        assert method == "units" or sum(mask.numel() for mask in masks.values()) == SELECTED["bert"]
        _check_initial_zeros(begin, masks)
        assert same(resumed.weights, whole.weights), (before, after)


def _check_initial_zeros(begin, masks):
    weights = load_file(begin)
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("mode", mode_params(checkpoints=True, elastic=False))
def test_deepspeed_on_another_number_of_ranks_raises(runs, mode):
    """DeepSpeed does not support it: the run must not restart from the beginning."""
    _, output_dir = runs(mode, "snip_momentum")
    run = runs.ranks.run(
        mode,
        f"{mode}-2-to-1",
        world=1,
        raises=True,
        resume=str(output_dir / "checkpoint-6"),
        options={"target_sparsity": 0.5, **SCHEDULE, **METHODS["snip_momentum"]},
    )
    assert re.match("CheckpointError: .*2 processes.*not with 1", run.ranks[0]["error"])


# By mode: files of a checkpoint that single ranks write.
PARTS = {
    "ddp": ["rng_state_1.pth", "optimizer.pt"],
    "fsdp2": ["rng_state_1.pth", "optimizer.bin", "pruning_state-00002-of-00002.safetensors"],
    "fsdp2_sharded": ["rng_state_0.pth", "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"],
    "zero2": ["global_step6/*rank_1*optim_states.pt", "latest", "pruning_state-00001-of-00002.safetensors"],
    "zero3": ["global_step6/*rank_1*optim_states.pt", "rng_state_1.pth"],
}


@pytest.mark.parametrize("mode", mode_params(*PARTS))
def test_checkpoint_without_a_file_of_one_rank_is_invalid(runs, tmp_path, mode):
    _, output_dir = runs(mode, "snip_momentum")
    assert find_checkpoint_error(ResumeState(output_dir / "checkpoint-6")) is None
    for index, part in enumerate(PARTS[mode]):
        checkpoint = shutil.copytree(output_dir / "checkpoint-6", tmp_path / str(index) / "checkpoint-6")
        (path,) = checkpoint.glob(part)
        path.unlink()
        assert find_checkpoint_error(ResumeState(checkpoint)), part


def test_different_masks_on_ranks_raise(ranks):
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    for step in PRUNE_STEPS[1:]:
        run = ranks.run(
            "ddp",
            "tampered",
            raises=True,
            spies={"tamper": {"on": 1, "step": step, "name": name}},
            options={"target_sparsity": 0.5, "scope": "layer", **SCHEDULE},
        )
        for rank in run.ranks:
            assert rank["error"].startswith("RuntimeError") and f'"{name}"' in rank["error"]
            assert re.search(r"ranks?\b.*\b1\b", rank["error"])
