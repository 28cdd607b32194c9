"""Zeros of a checkpoint as masks of a model's weights."""

import pytest
import torch
from safetensors.torch import save_file

from hf_sparse.distributed import ShardRegion
from hf_sparse.inspection import InspectionError
from hf_sparse.inspection.zeros import CheckpointZeros


@pytest.fixture
def checkpoint(tmp_path):
    weight = torch.arange(24.0).view(4, 6) % 3
    save_file({"up.weight": weight, "codes.weight": weight.to(torch.int8)}, tmp_path / "model.safetensors")
    return tmp_path, weight


def test_regions_of_a_weight_under_the_names_of_a_body_or_a_whole_model(checkpoint):
    folder, weight = checkpoint
    region = ShardRegion((1, 2), (3, 6))
    for name in ("up.weight", "bert.up.weight"):
        mask = CheckpointZeros(folder, {name: (4, 6)}).keep_mask(name, region)
        assert torch.equal(mask, weight[1:3, 2:6] != 0)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("down.weight", (4, 6), 'has no weight "down.weight"'),
        ("up.weight", (6, 4), "is 4x6 in .* but 6x4 in the model"),
        ("codes.weight", (4, 6), "not quantised"),
    ],
)
def test_other_models_are_refused_by_name(checkpoint, name, shape, words):
    with pytest.raises(InspectionError, match=words):
        CheckpointZeros(checkpoint[0], {name: shape})


def test_pickle_is_never_opened(tmp_path):
    torch.save({"up.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InspectionError, match="pickle"):
        CheckpointZeros(tmp_path, {"up.weight": (2, 2)})
