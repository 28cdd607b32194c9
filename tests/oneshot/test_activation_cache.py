"""Outputs of blocks, cached in memory or on disk, are read back unchanged."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.tiny import bits_equal
from transformers.modeling_outputs import BaseModelOutput

from hf_sparse.config.oneshot import ACTIVATIONS
from hf_sparse.oneshot.activation_cache import ActivationCache


@dataclass(frozen=True)
class Opaque:
    """A leaf that is not a tensor."""

    number: int = 3


SHARED = torch.randn(2, 3)
STRUCTURES = [
    torch.randn(2, 3),
    (torch.randn(2, 3).bfloat16(), None, [torch.tensor(4), "text"]),
    {"a": torch.randn(4)[::2], "b": {"c": torch.tensor([True, False])}},
    (SHARED, SHARED, SHARED[:1]),
    (torch.empty(0, 3), torch.randn(1, 3).expand(4, 3), torch.randn(3, 2).t()),
    (torch.tensor([1 + 2j]), Opaque()),
    BaseModelOutput(last_hidden_state=torch.randn(1, 2), hidden_states=(torch.randn(1),)),
]


def leaves(structure):
    return torch.utils._pytree.tree_leaves(structure)


@pytest.mark.parametrize("storage", ACTIVATIONS)
@pytest.mark.parametrize("number", range(len(STRUCTURES)))
def test_every_structure_is_read_back(number, storage):
    cache, structure = ActivationCache(storage), STRUCTURES[number]
    cache[1] = structure
    for _ in range(2):
        found = cache[1]
        assert type(found) is type(structure) and len(leaves(found)) == len(leaves(structure))
        for left, right in zip(leaves(found), leaves(structure), strict=True):
            assert bits_equal(left, right) if torch.is_tensor(left) else left == right


@pytest.mark.parametrize("storage", ACTIVATIONS)
def test_reading_returns_a_copy(storage):
    cache = ActivationCache(storage)
    cache[0] = (torch.ones(2),)
    cache[0][0].zero_()
    assert cache[0][0].tolist() == [1, 1]


@pytest.mark.parametrize("storage", ACTIVATIONS)
def test_writing_restorages_the_old_entry(storage):
    cache = ActivationCache(storage)
    for number in range(3):
        for index in range(2):
            cache[index] = torch.full((2,), 10.0 * number + index)
    assert [cache[index].tolist() for index in range(2)] == [[20, 20], [21, 21]]


def test_files_are_removed_with_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = ActivationCache("disk")
    cache[0] = torch.ones(2)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in Path(folder).iterdir()] == ["0.safetensors"]
    del cache
    assert not list(tmp_path.iterdir())


def test_unknown_storage():
    with pytest.raises(ValueError, match='`activations` is "ram": it must be device or cpu or disk'):
        ActivationCache("ram")


@pytest.mark.parametrize("storage", ACTIVATIONS)
def test_pop_removes_the_entry(storage):
    cache, tensor = ActivationCache(storage), torch.randn(2, 3)
    cache[0] = (tensor, None)
    (found, _) = cache.pop(0)
    assert bits_equal(found, tensor) and (found is tensor) == (storage != "disk")
    with pytest.raises(KeyError):
        cache[0]
