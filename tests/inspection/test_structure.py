"""Structure is found where it was put, counted as plain loops count it, and not found where zeros are strewn."""

import numpy as np
import pytest

from hf_sparse.inspection.structure import BLOCK_SIDES, GROUP_SIZES, StructureScan, detectable_pattern


def structure(live, layout="linear"):
    """Of one matrix (R, C), True where not zero."""
    scan = StructureScan(layout, 1, live.shape[0], 1, live.shape[1])
    if live.size:
        scan.add(np.ascontiguousarray(live[:, None, :]), 0, 0, 0)
    return scan.structure


def n_of_m(keep, of, rows=64, columns=128):
    """Each group keeps `keep` entries at random places."""
    order = np.random.default_rng(0).random((rows, columns // of, of)).argsort(axis=2)
    return (order < keep).reshape(rows, columns)


def blocks(height, width, share=0.5, rows=128, columns=128):
    live = np.random.default_rng(0).random((rows // height, columns // width)) >= share
    return live.repeat(height, axis=0).repeat(width, axis=1)


def strewn(share, rows=128, columns=128):
    return np.random.default_rng(0).random((rows, columns)) >= share


@pytest.mark.parametrize("keep, of", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 16), (8, 32)])
def test_n_of_m_is_found_and_what_follows_from_it_left_out(keep, of):
    found = structure(n_of_m(keep, of))
    assert found.n_of_m == (f"{keep}:{of}",) and str(found) == f"{keep}:{of}"
    assert found.block is None


def test_one_group_too_full_is_no_n_of_m():
    live = n_of_m(2, 4)
    live[3, 8:12] = True, True, True, False
    found = structure(live)
    assert found.n_of_m == () and (found.max_kept[4], found.full_groups[4]) == (3, 1)


def test_n_of_m_runs_along_the_inputs_only():
    assert structure(n_of_m(2, 4, 128, 128).T).n_of_m == ()


@pytest.mark.parametrize("height, width", [(4, 1), (1, 4), (2, 2), (4, 4), (1, 16), (16, 16), (32, 8)])
def test_blocks_are_found_at_their_full_size(height, width):
    live = blocks(height, width)
    assert structure(live).block == f"{height}x{width}"
    # A kept weight that is zero by chance changes nothing, a hundredth of strewn zeros does.
    live[tuple(np.argwhere(live)[0])] = False
    assert structure(live).block == f"{height}x{width}"
    assert structure(live & strewn(0.05)).block is None


def test_rows_and_columns_are_not_called_blocks():
    live = np.ones((64, 32), dtype=bool)
    live[5:21] = False
    assert str(structure(live)) == "16 of 64 rows zero"
    live[:, 3] = False
    assert str(structure(live)) == "16 of 64 rows zero, 1 of 32 columns zero"
    assert structure(live).zeros_in_lines == structure(live).zeros == 16 * 32 + 64 - 16


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_strewn_zeros_have_no_structure(share):
    found = structure(strewn(share, 512, 512))
    assert (found.n_of_m, found.block) == ((), None)


def test_the_extremes():
    assert str(structure(np.ones((8, 8), dtype=bool))) == ""
    assert str(structure(np.zeros((8, 8), dtype=bool))) == "all zero"
    assert str(structure(np.ones((0, 8), dtype=bool))) == ""


@pytest.mark.parametrize("rows, columns", [(48, 24), (7, 13), (64, 64)])
def test_counts_are_those_of_plain_loops(rows, columns):
    live = blocks(1, 1, 0.7, rows, columns) & strewn(0.2, rows, columns)
    found = structure(live)
    for of in GROUP_SIZES:
        if columns % of == 0:
            assert found.max_kept[of] == max(
                sum(row[start : start + of]) for row in live for start in range(0, columns, of)
            )
    assert found.max_kept.keys() == {of for of in GROUP_SIZES if columns % of == 0}
    for height in BLOCK_SIDES:
        for width in BLOCK_SIDES:
            if rows % height or columns % width:
                assert (height, width) not in found.zeros_in_blocks
                continue
            starts = [(r, c) for r in range(0, rows, height) for c in range(0, columns, width)]
            whole = sum(not live[r : r + height, c : c + width].any() for r, c in starts)
            assert found.zeros_in_blocks[height, width] == whole * height * width


def test_tiles_positions_and_matrices_add_up():
    """Two matrices of three kernel positions, given in tiles, against each matrix by itself."""
    rows, columns = 128, 192
    live = np.stack([np.stack([strewn(0.6, rows, columns), blocks(4, 2, 0.5, rows, columns)]) for _ in range(3)], 2)
    live[1, 7] = False
    scan = StructureScan("conv2d", 2, rows, 3, columns)
    for matrix in range(2):
        for row in (0, 64):
            for column in (0, 128):
                stop = 128 if column == 0 else columns
                tile = np.ascontiguousarray(live[matrix, row : row + 64, :, column:stop])
                scan.add(tile, matrix, row, column)
    apart = [structure(live[matrix, :, position]) for matrix in range(2) for position in range(3)]
    found = scan.structure
    assert found.weights == live.size and found.zeros == live.size - live.sum()
    assert found.zeros_in_blocks == {
        side: sum(part.zeros_in_blocks[side] for part in apart) for side in found.zeros_in_blocks
    }
    assert found.max_kept == {of: max(part.max_kept[of] for part in apart) for of in found.max_kept}
    for of, most in found.max_kept.items():
        assert found.full_groups[of] == sum(part.full_groups[of] for part in apart if part.max_kept[of] == most)
    assert (found.rows, found.zero_rows, found.columns, found.zero_columns) == (256, 1, 384, 0)
    assert found.zeros_in_lines == 3 * columns


@pytest.mark.parametrize(
    "live, held, missed",
    [
        (n_of_m(2, 4), ["2:4", "3:4", "4:8", "16:32"], ["1:4", "1:2", "4x1", "channel"]),
        (n_of_m(1, 4), ["1:4", "2:4", "1:2"], ["1:8"]),
        (blocks(8, 2), ["8x2", "4x1", "1x2"], ["8x4", "16x2", "2:4"]),
        (blocks(1, 128), ["channel", "channel:out", "1x64"], ["channel:in", "2x1"]),
        (blocks(128, 1), ["channel:in", "64x1"], ["channel", "1x2"]),
        (np.ones((8, 8), dtype=bool), [], ["2:4", "4x1", "channel", "channel:in"]),
        (np.zeros((6, 6), dtype=bool), ["channel", "1:2"], ["2:4", "4x1"]),  # neither divides 6
    ],
)
def test_patterns_hold_or_do_not(live, held, missed):
    found = structure(live)
    assert [pattern for pattern in held + missed if found.has_pattern(pattern)] == held


@pytest.mark.parametrize("pattern", ["3:6", "3x1", "128x1", "unstructured", "2;4"])
def test_patterns_that_zeros_cannot_tell_are_refused(pattern):
    with pytest.raises(ValueError, match=f'pattern "{pattern}"'):
        detectable_pattern(pattern)
