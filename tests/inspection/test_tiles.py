"""Tiles cover a tensor once, are bounded, and cut no block."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_sparse.inspection import InspectionError, inspect_checkpoint
from hf_sparse.inspection import tiles as tiles_module
from hf_sparse.inspection.tiles import MAX_BLOCK_SIDE, read_tiles, tile_regions


SHAPES = [
    ((), ()),
    ((100_000,), ()),
    ((300, 130), (0, 1)),
    ((130, 300), (1, 0)),
    ((2, 50_000), (0, 1)),
    ((5, 128, 70), (1, 2)),
    ((70, 65, 3, 3), (0, 1)),
    ((3, 5, 7, 11, 13), ()),
    ((0, 4), (0, 1)),
]


@pytest.mark.parametrize("shape, matrix_dims", SHAPES)
def test_every_entry_is_in_one_tile_of_bounded_size(shape, matrix_dims, monkeypatch):
    monkeypatch.setattr(tiles_module, "TILE_NUMEL", 2**13)
    seen = np.zeros(shape, dtype=int)
    for region in tile_regions(shape, matrix_dims):
        assert region.numel <= 2**13
        assert all(region.start[dim] % MAX_BLOCK_SIDE == 0 for dim in matrix_dims)
        seen[tuple(map(slice, region.start, region.stop))] += 1
    assert (seen == 1).all()


def test_no_more_than_a_tile_is_ever_read(tmp_path, monkeypatch):
    """Of a checkpoint whose tensors are all larger than a tile, by spying on what is asked of the library."""
    tensors = {
        "a.weight": torch.randn(300, 200),
        "a.bias": torch.randn(30_000),
        "mlp.experts.up": torch.randn(3, 100, 64).bfloat16(),
        "conv.weight": torch.randn(70, 70, 3, 3).half(),
    }
    tensors["a.weight"][::2] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    expected = inspect_checkpoint(tmp_path)
    sizes, real = [], tiles_module.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def get_slice(self, name):
            view = self.file.get_slice(name)

            class Slice:
                def __getitem__(self, index):
                    sizes.append(view[index].numel())
                    return view[index]

            return Slice()

    monkeypatch.setattr(tiles_module, "safe_open", Spy)
    monkeypatch.setattr(tiles_module, "TILE_NUMEL", 2**13)
    monkeypatch.setattr(tiles_module, "_REOPEN_NUMEL", 2**14)
    assert inspect_checkpoint(tmp_path) == expected
    assert max(sizes) <= 2**13 and sum(sizes) == sum(tensor.numel() for tensor in tensors.values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InspectionError, match='"a" cannot be read from'):
        next(read_tiles(tmp_path / "gone.safetensors", "a", tile_regions((2,))))
