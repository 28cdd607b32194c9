"""Files are complete or absent."""

import os

import pytest
import torch

from hf_sparse.files import open_tensors, write_atomically, write_json, write_tensors


def test_tensors_and_metadata_round_trip(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor([1, 2], dtype=torch.uint8)}
    write_tensors(path, tensors, {"note": "ä"})
    found, metadata = open_tensors(path)
    assert metadata == {"note": "ä"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["file.json"]


def test_files_have_the_usual_permissions(tmp_path):
    """mkstemp creates files that only their owner may read; checkpoints need the default permissions."""
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "file.json", 1)
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damaged_files_raise(tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError, match=r"file\.safetensors does not exist"):
        open_tensors(path)
    write_tensors(path, {"a": torch.ones(100)}, {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"PK" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"file\.safetensors is damaged or not a safetensors file"):
            open_tensors(path)
