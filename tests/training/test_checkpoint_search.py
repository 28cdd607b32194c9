"""Which checkpoint can be trusted, and what is in the state file. Resuming itself is tested in test_resume.py."""

import json
import re
import shutil
import zipfile

import pytest
import torch
from helpers.tiny import SCHEDULE, make
from safetensors.torch import load_file, save_file

from hf_sparse.files import STATE_FILE
from hf_sparse.training import checkpoint_search
from hf_sparse.training.checkpoint_search import newest_complete_checkpoint
from hf_sparse.training.resume import CheckpointError, ResumeState
from hf_sparse.training.state_files import start_checkpoint


def find_checkpoint_error(checkpoint, **kwargs):
    return checkpoint_search.find_checkpoint_error(ResumeState(checkpoint), **kwargs)


def newest(run):
    return newest_complete_checkpoint(run).checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    options = {"target_sparsity": 0.5, "criterion": "greedy_movement", **SCHEDULE}
    make(folder, **options, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def run(tmp_path, saved):
    return shutil.copytree(saved, tmp_path / "run")


def test_the_newest_complete_checkpoint_is_found_by_number(run):
    (run / "checkpoint-x").mkdir()
    (run / "checkpoint-100").mkdir()
    assert find_checkpoint_error(run / "checkpoint-10") is None
    assert newest(run) == run / "checkpoint-10"  # not 8, which sorts later as text
    with pytest.raises(CheckpointError, match="no complete checkpoint in .*nowhere"):
        newest(run / "nowhere")


FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_noticed(run, name, share):
    path = run / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert name in find_checkpoint_error(path.parent) and "truncated" in find_checkpoint_error(path.parent)
    assert newest(run) == run / "checkpoint-8"


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_file_that_is_missing_is_noticed(run, name):
    (run / "checkpoint-10" / name).unlink()
    assert find_checkpoint_error(run / "checkpoint-10")
    weights_only_files = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert (find_checkpoint_error(run / "checkpoint-10", weights_only=True) is None) == (name in weights_only_files)


def test_a_dense_checkpoint_of_several_processes_is_whole(run):
    """What it lacks, masks, is said where they are looked for."""
    checkpoint = run / "checkpoint-10"
    (checkpoint / STATE_FILE).unlink()
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert ResumeState(checkpoint).world_size is None and find_checkpoint_error(checkpoint) is None
    (checkpoint / "rng_state_0.pth").unlink()
    assert "rng_state*.pth" in find_checkpoint_error(checkpoint)


def test_a_missing_shard_is_noticed(run):
    folder = run / "checkpoint-10"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors: missing" in find_checkpoint_error(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert find_checkpoint_error(folder) is None


SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
INDEX = "model.safetensors.index.json"
DAMAGED = {
    INDEX: ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": ["a"]}', "[" * 100_000]
    + [json.dumps({"weight_map": {"a": name}}) for name in (3, None, ["x"], "../x", "x" * 5_000, "\0", "", ".")]
    + [json.dumps({"weight_map": SHARDS}), "\udcff"],
    "config.json": ["", "[]", "{"],
    "trainer_state.json": ["", "[]", "{}", "3", "[" * 100_000]
    + [json.dumps({"global_step": step}) for step in (None, "10", 10.0, True, [10], -1, 8)]
    + [json.dumps({"global_step": 10, key: 3}) for key in ("log_history", "stateful_callbacks", "unheard_of")]
    + [
        json.dumps({"global_step": 10} | change)
        for change in ({"best_metric": {}}, {"save_steps": 0}, {"epoch": True})
    ]
    + [
        '{"global_step": 10, "log_history": [1]}',
        '{"global_step": 10, "epoch": "x"}',
        '{"global_step": 1' + "0" * 5_000 + "}",
    ],
    "scheduler.pt": ["", "x" * 100],
    "scaler.pt": ["PK"],
    STATE_FILE: ["", "x" * 100],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_whatever_is_wrong_with_a_file_the_checkpoint_before_is_taken(run, caplog, name):
    for number, text in enumerate(DAMAGED[name]):
        path = run / "checkpoint-10" / name
        whole = path.read_bytes() if path.is_file() else None
        path.write_bytes(text.encode(errors="surrogateescape"))
        caplog.clear()
        assert newest(run) == run / "checkpoint-8", number
        skipped, taken = (record.getMessage() for record in caplog.records)
        assert "checkpoint-10 is skipped: " in skipped and (name in skipped or "model-00001" in skipped), skipped
        assert re.fullmatch("resuming from .*checkpoint-8, the newest complete checkpoint.", taken)
        path.unlink() if whole is None else path.write_bytes(whole)
    assert newest(run) == run / "checkpoint-10"


def test_an_archive_that_torch_could_not_read_is_noticed(run, monkeypatch):
    path = run / "checkpoint-10" / "optimizer.pt"
    data = path.read_bytes()
    pickle = data.index(b"state") + 2
    damaged = {
        "a prefix": b"xxxx" + data,
        "a suffix": data + b"xxxx",
        "a changed pickle": data[:pickle] + b"\xff" + data[pickle + 1 :],
        "several disks": data[:-18] + b"\x01" + data[-17:],
        "fewer members": data[:-14] + b"\x01" + data[-13:],
    }
    for kind, content in damaged.items():
        path.write_bytes(content)
        assert find_checkpoint_error(path.parent) == "optimizer.pt: truncated or damaged.", kind
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 1_000)
    assert find_checkpoint_error(path.parent)
    path.write_bytes(data)
    saved = torch.load(path, weights_only=True)
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: False)
    torch.save(saved, path)
    assert path.read_bytes() != data and find_checkpoint_error(path.parent) is None


def test_a_checkpoint_without_its_own_masks_is_skipped(run, caplog):
    """No masks, masks with a flipped bit, masks of another step; then a damaged index, in a run of three."""
    (run / "checkpoint-10" / STATE_FILE).unlink()
    path = run / "checkpoint-8" / STATE_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shutil.copy(run / "checkpoint-2" / STATE_FILE, run / "checkpoint-6" / STATE_FILE)
    (run / "checkpoint-4" / INDEX).write_text("{")
    resumed = make(run, target_sparsity=0.5, criterion="greedy_movement", **SCHEDULE)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from == str(run / "checkpoint-2")
    for text in ("checkpoint-10 holds no masks", "checksum", "of step 2, its weights of step 6", INDEX, "from .*-2,"):
        assert re.search(text, caplog.text)
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(CheckpointError, match="no complete checkpoint.*-10: .*no masks.*-8: .*-6: .*1 more"):
        newest(run)


def test_only_files_that_resuming_reads_are_judged(run):
    """Plain Trainer resumes beside all of these."""
    folder = run / "checkpoint-10"
    names = ["embeddings.pt", "notes.bin", "x.pth", "rng_state_7.pth", "pytorch_model.bin", "optimizer_old.pt"]
    names += ["other_model.safetensors", ".model.safetensors", "faiss.index.json", "pruning_state_old.safetensors"]
    names += ["nested/optimizer.pt", "nested/model.safetensors", "nested/scheduler.pt", "checkpoint-x/rng_state.pth"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not of this run")
    (folder / "pruning_state_notes").mkdir()
    assert find_checkpoint_error(folder) is None and newest(run) == folder
    steps = SCHEDULE | {"save_strategy": "steps", "save_steps": 2}
    resumed = make(run, target_sparsity=0.5, criterion="greedy_movement", **steps)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from == str(folder)
    start_checkpoint(folder)
    assert all((folder / name).is_file() for name in names)  # somebody's own


def test_folders_that_only_look_like_checkpoints_are_not_taken(run):
    for name in (
        "checkpoint-0010",
        "checkpoint-\u0661\u0662",
        "checkpoint-" + "9" * 200,
        "checkpoint--1",
        "checkpoint-",
    ):
        shutil.copytree(run / "checkpoint-8", run / name)
    (run / "checkpoint-99").write_text("a file")
    assert newest(run) == run / "checkpoint-10"


def test_a_state_of_another_step_is_noticed(run):
    shutil.rmtree(run / "checkpoint-8")
    (run / "checkpoint-10").rename(run / "checkpoint-8")
    assert find_checkpoint_error(run / "checkpoint-8") == "trainer_state.json is of step 10."


def test_starting_a_checkpoint_clears_what_a_killed_run_left(run):
    folder = run / "checkpoint-10"
    (folder / ".pruning_state-abc.safetensors").write_bytes(b"half")
    assert find_checkpoint_error(folder) is None  # nothing reads it
    start_checkpoint(folder)
    assert not (folder / ".pruning_state-abc.safetensors").exists()
    assert find_checkpoint_error(folder).startswith("trainer_state.json is missing")
    start_checkpoint(run / "not-there-yet")


def test_masks_take_an_eighth_of_a_byte_per_weight_and_sums_four(saved):
    tensors = load_file(saved / "checkpoint-10" / STATE_FILE)
    sizes = dict.fromkeys(("mask", "stat"), 0)
    for name, tensor in tensors.items():
        sizes[name.split("/")[0]] += tensor.numel() * tensor.element_size()
    assert sizes == {"mask": 4224 / 8, "stat": 4224 * 4}


def test_a_changed_description_is_refused(run):
    path = run / "checkpoint-10" / STATE_FILE
    (file,) = ResumeState(path.parent).files
    metadata = {"hf_sparse": json.dumps(file.values | {"step": 8})}
    save_file(dict(file.tensors), path, metadata=metadata)
    with pytest.raises(CheckpointError, match="checksum"):
        ResumeState(path.parent).verify()
    save_file({"mask/a": torch.zeros(1)}, path, metadata={"hf_sparse": '{"shapes": {}}'})
    with pytest.raises(CheckpointError, match="its description is incomplete"):
        ResumeState(path.parent).verify()
