"""Which files a checkpoint is; what is refused, with the remedy. Nothing is downloaded: the cache is made by hand."""

import json
from fnmatch import fnmatch

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from hf_sparse.inspection import InspectionError, inspect_checkpoint
from hf_sparse.inspection.weight_files import find_weight_files


def save(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.tensor(values) for name, values in (tensors or {"a": [1.0]}).items()}, path)
    return path


def sharded(folder, names=("x.safetensors", "y.safetensors")):
    for number, name in enumerate(names):
        save(folder / name, **{f"t{number}": [0.0, 1.0]})
    index = {"metadata": {}, "weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_file_a_directory_an_index(tmp_path):
    path = save(tmp_path / "one" / "model.safetensors")
    assert find_weight_files(path) == find_weight_files(tmp_path / "one") == [path]
    folder = sharded(tmp_path)
    shards = [folder / "x.safetensors", folder / "y.safetensors"]
    assert find_weight_files(folder) == find_weight_files(folder / "model.safetensors.index.json") == shards
    assert [tensor.name for tensor in inspect_checkpoint(folder).tensors] == ["t0", "t1"]


def test_masks_and_optimizers_are_not_weights(tmp_path):
    for name in ("pruning_state", "pruning_state-00001-of-00002", "optimizer"):
        save(tmp_path / f"{name}.safetensors")
    unet = save(tmp_path / "custom.safetensors")
    assert find_weight_files(tmp_path) == [unet]
    adapter = save(tmp_path / "adapter_model.safetensors")
    assert find_weight_files(tmp_path) == [adapter]


def test_what_is_refused(tmp_path):
    def refused(source, *words):
        with pytest.raises(InspectionError) as error:
            inspect_checkpoint(source)
        assert all(word in str(error.value) for word in words), error.value

    refused(tmp_path / "gone" / "model.safetensors", "does not exist")
    refused("a/b/c", "does not exist")
    with pytest.raises(InspectionError, match="`revision` is of models on the Hub, and .* is on this machine"):
        find_weight_files(tmp_path, revision="main")
    refused(tmp_path, "no safetensors file", "save_pretrained")
    save(tmp_path / "checkpoint-5" / "model.safetensors")
    refused(tmp_path, f"Did you mean {tmp_path / 'checkpoint-5'}?")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (tmp_path / name).touch()
    refused(tmp_path, "Did you mean")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pickle (pytorch_model.bin)", "run any code", "save_pretrained")
    refused(tmp_path / "pytorch_model.bin", "pickle")
    for name in ("p", "q"):
        save(tmp_path / "two" / f"{name}.safetensors")
    refused(tmp_path / "two", "several", "p.safetensors, q.safetensors", "Name one")


def test_damaged_files_are_refused(tmp_path):
    def refused(folder, words):
        with pytest.raises(InspectionError, match=words):
            inspect_checkpoint(folder)

    whole = save(tmp_path / "model.safetensors").read_bytes()
    for content in (whole[:-2], whole[:5], b"", b"GGUF" + bytes(100)):
        (tmp_path / "model.safetensors").write_bytes(content)
        refused(tmp_path, "is cut short or not a safetensors file")
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is damaged")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "must hold a JSON object, but holds list")
    (tmp_path / "config.json").unlink()
    (tmp_path / "pruning_report.json").write_text('{"layers": [{}]}')
    refused(tmp_path, "pruning_report.json is not a report of hf_sparse")


def test_damaged_shards_are_refused(tmp_path):
    folder = sharded(tmp_path)
    (folder / "y.safetensors").unlink()
    with pytest.raises(InspectionError, match="1 of the 2 files that .* are missing, such as y.safetensors"):
        inspect_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    for content, words in (
        ({"weight_map": {"t": "../x.safetensors"}}, "cannot be a file in its directory: '../x"),
        ({"weight_map": {"t": 3}}, "is damaged"),
        ({}, "is damaged"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(InspectionError, match=words):
            inspect_checkpoint(folder)
    sharded(folder)
    # The index of another format has its own names, which are no concern.
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"gamma": "x.bin"}}))
    assert len(inspect_checkpoint(folder).tensors) == 2
    index.write_text(json.dumps({"weight_map": {"t0": "x.safetensors", "t9": "y.safetensors"}}))
    with pytest.raises(InspectionError, match="1 tensors that are not in its files, such as t9"):
        inspect_checkpoint(folder)


def test_a_repository_in_the_cache(tmp_path, monkeypatch):
    """Offline, what an earlier download left is read."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    sharded(snapshot)
    assert find_weight_files("someone/small") == [snapshot / "x.safetensors", snapshot / "y.safetensors"]
    with pytest.raises(InspectionError) as error:
        find_weight_files("someone/absent")
    assert 'there is no file or folder "someone/absent"' in str(error.value)
    assert "without a network" in str(error.value)


def test_no_more_is_downloaded_than_is_read(tmp_path, monkeypatch):
    """A Hub that is a folder: other formats of the same weights stay there."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(repo, revision, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("someone/small", "v1")
        for path in remote.rglob("*"):
            name = str(path.relative_to(remote))
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns) and not fnmatch(name, ignore_patterns)
            if wanted and path.is_file():
                (cache / name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("hf_sparse.inspection.weight_files.snapshot_download", snapshot_download)
    save(remote / "onnx" / "model.safetensors")
    with pytest.raises(InspectionError, match="someone/small holds no safetensors file at its top level"):
        find_weight_files("someone/small", "v1")
    save(remote / "consolidated.safetensors")
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (remote / name).write_text("{}")
    sharded(remote)
    assert find_weight_files("someone/small", "v1") == [cache / "x.safetensors", cache / "y.safetensors"]
    assert {path.name for path in cache.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "x.safetensors",
        "y.safetensors",
    }
