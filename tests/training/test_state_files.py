"""State files that nobody should trust: foreign, of another version, or crafted, with a checksum that fits.

What a run writes and reads back is tested in test_resume.py.
"""

import json
import shutil

import pytest
import torch
from helpers.bounds import bounded
from helpers.tiny import SCHEDULE, bert, make, same, weights
from safetensors.torch import save_file

from hf_sparse.files import CONFIG_FILE, STATE_FILE, open_tensors
from hf_sparse.training import state_files
from hf_sparse.training.checkpoint_search import find_checkpoint_error, newest_complete_checkpoint
from hf_sparse.training.resume import CheckpointError, ResumeState


OPTIONS = {"target_sparsity": 0.5, "criterion": "greedy_movement", **SCHEDULE}
WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make(folder, **OPTIONS, save_strategy="steps", save_steps=4).train()
    return folder


@pytest.fixture
def checkpoint(tmp_path, saved):
    shutil.copytree(saved / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    return shutil.copytree(saved / "checkpoint-8", tmp_path / "run" / "checkpoint-8")


def craft(checkpoint, change) -> None:
    """Rewrites the state file after `change(tensors, values)`, with a checksum that fits."""
    path = checkpoint / STATE_FILE
    tensors, metadata = open_tensors(path)
    tensors, values = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(metadata["hf_sparse"])
    del values["checksum"]
    change(tensors, values)
    values = {"checksum": state_files.checksum(tensors, values)} | values
    save_file(tensors, path, metadata={"hf_sparse": json.dumps(values)})


def resume(checkpoint, named=True):
    """Resumes the run in a new folder, or, where the checkpoint is not named, where it is."""
    folder = checkpoint.parent.parent / "resumed" if named else checkpoint.parent
    run = make(folder, model=bert(seed=9), **OPTIONS)
    run.train(resume_from_checkpoint=str(checkpoint) if named else True)
    return run


def nested(depth: int):
    return [] if not depth else [nested(depth - 1)]


# By the value that is replaced, values that are not as they were written. "*" is for any name of a weight.
VALUES = {
    "shapes": [[], None, 3, {"*": [24.0, 24]}, {"*": [-24, -24]}, {"*": [10**30]}, {"*": {}}, {"*": [[24], [24]]}],
    "boxes": [[], 0, {"*": {}}, {"*": [[0, 0], [24, 24]]}, {"*": [[[0, 0]]]}, {"*": [[[0.0, 0], [24, 24]]]}]
    + [{"*": [[[0, 0], [24, 25]]]}, {"*": [[[0, -1], [24, 24]]]}, {"*": [[[24, 24], [0, 0]]]}, {"*": [[[0], [24]]]}]
    + [{"unheard of": [[[0], [24]]]}],
    "counters": [[], "x", {"*": {"count": -1, "stale": 0}}, {"*": {"count": 1.5, "stale": 0}}, {"*": ["count"]}]
    + [{"*": {"count": True, "stale": 0}}, {"*": {"count": 10**400, "stale": 0}}, {"*": {"count": [], "stale": 0}}]
    + [{"unheard of": {"count": 1, "stale": 0}}, {"*": {"count": float("nan"), "stale": 0}}],
    "config": [[], None, "x", {"groups": nested(100)}],
    "step": [-1, 8.0, "8", None, True, 2**64, [8]],
    "processes": [0, -1, 1.0, "1", None, True, 10**8 + 0.5, 2**40, [1]],
    "version": ["1", 1.0, -1, None, [1]],
    "checksum": [[], None, "x", 1.5, -1],
    "more": [nested(500)],
}


@pytest.mark.parametrize("key", VALUES)
def test_wrong_kinds_under_a_right_checksum_are_refused(checkpoint, key):
    original = (checkpoint / STATE_FILE).read_bytes()
    for value in VALUES[key]:

        def change(tensors, values, value=value):
            if isinstance(value, dict) and "*" in value:
                values[key] = values[key] | {WEIGHT: value["*"]}
            else:
                values[key] = value

        (checkpoint / STATE_FILE).write_bytes(original)
        craft(checkpoint, change)
        with bounded(), pytest.raises(CheckpointError, match=STATE_FILE) as error:
            ResumeState(checkpoint).verify()
        assert len(str(error.value)) < 1_000, value
        with bounded():
            assert newest_complete_checkpoint(checkpoint.parent).checkpoint.name == "checkpoint-4", value


TENSORS = {
    "nan": lambda tensors: tensors[f"stat/{WEIGHT}"].fill_(torch.nan),
    "float64": lambda tensors: tensors.update({f"stat/{WEIGHT}": tensors[f"stat/{WEIGHT}"].double()}),
    "bool": lambda tensors: tensors.update({f"stat/{WEIGHT}": tensors[f"stat/{WEIGHT}"] > 0}),
    "shape": lambda tensors: tensors.update({f"stat/{WEIGHT}": tensors[f"stat/{WEIGHT}"][1:].clone()}),
    "no sums": lambda tensors: tensors.pop(f"stat/{WEIGHT}"),
    "mask of floats": lambda tensors: tensors.update({f"mask/{WEIGHT}": tensors[f"mask/{WEIGHT}"].float()}),
    "short mask": lambda tensors: tensors.update({f"mask/{WEIGHT}": tensors[f"mask/{WEIGHT}"][1:].clone()}),
    "no mask": lambda tensors: tensors.pop(f"mask/{WEIGHT}"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_wrong_tensors_under_a_right_checksum_are_refused(checkpoint, kind):
    craft(checkpoint, lambda tensors, values: TENSORS[kind](tensors))
    with pytest.raises(CheckpointError, match=f'{STATE_FILE}: the (mask|scores) of "{WEIGHT}"'):
        resume(checkpoint)


def test_regions_that_overlap_or_leave_a_gap_are_refused(checkpoint):
    """Twice the same half of a weight are as many entries as the whole."""
    halves = [[[0, 0], [12, 24]], [[0, 0], [12, 24]]]
    craft(checkpoint, lambda tensors, values: values["boxes"].update({WEIGHT: halves}))
    with pytest.raises(CheckpointError, match="288 entries are missing"):
        resume(checkpoint)


@pytest.mark.parametrize("processes", [10**8, 2**31 - 1])
def test_a_crafted_number_of_processes_costs_nothing(checkpoint, processes):
    """It is read before the checksum is compared."""
    craft(checkpoint, lambda tensors, values: values.update(processes=processes))
    with bounded():
        assert find_checkpoint_error(ResumeState(checkpoint)).startswith(f"rng_state_*.pth of {processes} of")
        assert newest_complete_checkpoint(checkpoint.parent).checkpoint.name == "checkpoint-4"


NAMES = [
    "pruning_state-00001-of-99999999.safetensors",
    "pruning_state-00001-of-00002.safetensors",
    f"pruning_state-00001-of-{'9' * 200}.safetensors",
    f"pruning_state-{'9' * 200}-of-00001.safetensors",
    "pruning_state-000001-of-00001.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alone", [True, False])
def test_an_absurd_file_name_costs_nothing(checkpoint, name, alone):
    """With or without the right file beside it: then nobody can know which is meant."""
    shutil.copy(checkpoint / STATE_FILE, checkpoint / name)
    if alone:
        (checkpoint / STATE_FILE).unlink()
    with bounded():
        error = find_checkpoint_error(ResumeState(checkpoint))
        assert ": missing, though there is " in error and name in error and len(error) < 1_000
        assert newest_complete_checkpoint(checkpoint.parent).checkpoint.name == "checkpoint-4"
        with pytest.raises(CheckpointError, match=name):
            ResumeState(checkpoint).verify()
        state_files.start_checkpoint(checkpoint)
    assert not list(checkpoint.glob("pruning_state*"))


@pytest.mark.parametrize(
    "name", ["pruning_state-\u0661\u0661\u0661\u0661\u0661-of-00002.safetensors", "pruning_state"]
)
def test_a_file_that_is_no_state_file_is_nobodys_concern(checkpoint, name):
    (checkpoint / name).write_text("mine")
    assert len(ResumeState(checkpoint).files) == 1 and find_checkpoint_error(ResumeState(checkpoint)) is None
    state_files.start_checkpoint(checkpoint)
    assert (checkpoint / name).read_text() == "mine"


def test_many_tensors_are_read_in_linear_time(tmp_path):
    save_file({f"mask/{number}": torch.zeros(1) for number in range(20_000)}, tmp_path / "many.safetensors")
    tensors, _ = open_tensors(tmp_path / "many.safetensors")
    with bounded():
        assert sum(len(tensor) for tensor in tensors.values()) == 20_000


@pytest.mark.parametrize("kind", ["F4", "F8_E8M0", "C64"])
def test_a_tensor_of_an_unusual_dtype_is_refused_by_name(checkpoint, kind):
    """As the header of a crafted file says; not every dtype of the format can be read."""
    path = checkpoint / STATE_FILE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[f"stat/{WEIGHT}"]
    bits = {"F4": 4, "F8_E8M0": 8, "C64": 64}[kind]
    entry |= {"dtype": kind, "shape": [(entry["data_offsets"][1] - entry["data_offsets"][0]) * 8 // bits]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(CheckpointError, match=STATE_FILE):
        ResumeState(checkpoint).verify()


# Versions


def test_a_checkpoint_of_an_earlier_version_selects_what_it_selected(tmp_path, caplog):
    """Also the checkpoints of the run that has resumed from it."""
    saving, body = {"save_strategy": "steps", "save_steps": 4}, {"targets": ["all-body"]}
    whole = make(tmp_path / "whole", **OPTIONS, **saving, **body)
    whole.train()

    def as_before(tensors, values):
        del values["defaults"]
        values["config"]["max_sparsity_per_layer"] = None

    craft(tmp_path / "whole" / "checkpoint-4", as_before)
    for start in (tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-8"):
        folder = tmp_path / ("resumed" if start.parent.name == "whole" else "again")
        resumed = make(folder, model=bert(seed=9), **OPTIONS, **saving)
        resumed.train(resume_from_checkpoint=str(start))
        assert same(weights(resumed.model), weights(whole.model))
        assert "bert.pooler.dense.weight" in resumed.sparsity_callback.pruner.masks
        assert json.loads((folder / CONFIG_FILE).read_text())["targets"] == ["all-body"]
    assert caplog.text.count("resuming with the options of") >= 2


def test_files_have_a_format_version(saved):
    assert ResumeState(saved / "checkpoint-8").files[0].values["version"] == state_files.FORMAT_VERSION == 1


def test_a_file_from_before_there_were_versions_is_read(checkpoint, saved):
    craft(checkpoint, lambda tensors, values: values.pop("version"))
    old, new = resume(checkpoint), resume(saved / "checkpoint-8")
    assert same(weights(old.model), weights(new.model)) and old.sparsity_callback.pruner.sparsity() == 0.5


def test_a_file_of_a_later_version_is_refused(checkpoint, caplog):
    """Whatever else it holds."""

    def change(tensors, values):
        values.update(version=2, boxes="of another kind")
        del values["processes"]

    craft(checkpoint, change)
    with pytest.raises(
        CheckpointError, match=f"{STATE_FILE} was written by a later version of hf_sparse.*format is 2"
    ):
        resume(checkpoint)
    assert resume(checkpoint, named=False).resumed_from.endswith("checkpoint-4")
    assert "Upgrade hf_sparse" in caplog.text
