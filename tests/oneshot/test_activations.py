"""What blocks have given, kept in memory or on disk, comes back as it was."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.tiny import bits_equal
from transformers.modeling_outputs import BaseModelOutput

from hf_sparse.config.oneshot import ACTIVATIONS
from hf_sparse.oneshot.activations import Activations


@dataclass(frozen=True)
class Opaque:
    """What is no tensor and holds none."""

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


@pytest.mark.parametrize("place", ACTIVATIONS)
@pytest.mark.parametrize("number", range(len(STRUCTURES)))
def test_every_structure_comes_back(number, place):
    kept, structure = Activations(place), STRUCTURES[number]
    kept[1] = structure
    for _ in range(2):
        found = kept[1]
        assert type(found) is type(structure) and len(leaves(found)) == len(leaves(structure))
        for left, right in zip(leaves(found), leaves(structure), strict=True):
            assert bits_equal(left, right) if torch.is_tensor(left) else left == right


@pytest.mark.parametrize("place", ACTIVATIONS)
def test_what_is_taken_out_is_a_copy(place):
    kept = Activations(place)
    kept[0] = (torch.ones(2),)
    kept[0][0].zero_()
    assert kept[0][0].tolist() == [1, 1]


@pytest.mark.parametrize("place", ACTIVATIONS)
def test_what_is_put_in_anew_takes_the_place_of_the_old(place):
    kept = Activations(place)
    for number in range(3):
        for index in range(2):
            kept[index] = torch.full((2,), 10.0 * number + index)
    assert [kept[index].tolist() for index in range(2)] == [[20, 20], [21, 21]]


def test_files_go_with_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = Activations("disk")
    kept[0] = torch.ones(2)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in Path(folder).iterdir()] == ["0.safetensors"]
    del kept
    assert not list(tmp_path.iterdir())


def test_no_other_place():
    with pytest.raises(ValueError, match='activations are kept in "ram": it must be device, cpu, disk'):
        Activations("ram")


@pytest.mark.parametrize("place", ACTIVATIONS)
def test_what_is_popped_is_handed_over_and_kept_no_longer(place):
    kept, tensor = Activations(place), torch.randn(2, 3)
    kept[0] = (tensor, None)
    (found, _) = kept.pop(0)
    assert bits_equal(found, tensor) and (found is tensor) == (place != "disk")
    with pytest.raises(KeyError):
        kept[0]
