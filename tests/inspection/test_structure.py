"""Detects structure that was put there, counts as plain loops do, and detects none among random zeros."""

import numpy as np
import pytest

from hf_sparse.inspection.structure import BLOCK_SIDES, GROUP_SIZES, StructureScan, detectable_pattern


def structure(nonzero, layout="linear"):
    """Of one matrix (R, C), True where not zero."""
    scan = StructureScan(layout, 1, nonzero.shape[0], 1, nonzero.shape[1])
    if nonzero.size:
        scan.add(np.ascontiguousarray(nonzero[:, None, :]), 0, 0, 0)
    return scan.structure


def n_of_m(keep, of, rows=64, columns=128):
    """Each group keeps `keep` entries at random places."""
    order = np.random.default_rng(0).random((rows, columns // of, of)).argsort(axis=2)
    return (order < keep).reshape(rows, columns)


def blocks(height, width, share=0.5, rows=128, columns=128):
    nonzero = np.random.default_rng(0).random((rows // height, columns // width)) >= share
    return nonzero.repeat(height, axis=0).repeat(width, axis=1)


def random_zeros(share, rows=128, columns=128):
    return np.random.default_rng(0).random((rows, columns)) >= share


@pytest.mark.parametrize("keep, of", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 16), (8, 32)])
def test_n_of_m_is_detected_without_what_follows_from_it(keep, of):
    result = structure(n_of_m(keep, of))
    assert result.n_of_m == (f"{keep}:{of}",) and str(result) == f"{keep}:{of}"
    assert result.block is None


def test_one_group_too_full_is_no_n_of_m():
    nonzero = n_of_m(2, 4)
    nonzero[3, 8:12] = True, True, True, False
    result = structure(nonzero)
    assert result.n_of_m == () and (result.max_kept[4], result.full_groups[4]) == (3, 1)


def test_n_of_m_runs_along_the_inputs_only():
    assert structure(n_of_m(2, 4, 128, 128).T).n_of_m == ()


@pytest.mark.parametrize("height, width", [(4, 1), (1, 4), (2, 2), (4, 4), (1, 16), (16, 16), (32, 8)])
def test_blocks_are_detected_at_their_full_size(height, width):
    nonzero = blocks(height, width)
    assert structure(nonzero).block == f"{height}x{width}"
    # A kept weight that is zero by chance changes nothing, zeros at 5 % of the other places do.
    nonzero[tuple(np.argwhere(nonzero)[0])] = False
    assert structure(nonzero).block == f"{height}x{width}"
    assert structure(nonzero & random_zeros(0.05)).block is None


def test_rows_and_columns_are_not_reported_as_blocks():
    nonzero = np.ones((64, 32), dtype=bool)
    nonzero[5:21] = False
    assert str(structure(nonzero)) == "16 of 64 rows zero"
    nonzero[:, 3] = False
    assert str(structure(nonzero)) == "16 of 64 rows zero, 1 of 32 columns zero"
    assert structure(nonzero).zeros_in_lines == structure(nonzero).zeros == 16 * 32 + 64 - 16


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_random_zeros_have_no_structure(share):
    result = structure(random_zeros(share, 512, 512))
    assert (result.n_of_m, result.block) == ((), None)


def test_the_extremes():
    assert str(structure(np.ones((8, 8), dtype=bool))) == ""
    assert str(structure(np.zeros((8, 8), dtype=bool))) == "all zero"
    assert str(structure(np.ones((0, 8), dtype=bool))) == ""


@pytest.mark.parametrize("rows, columns", [(48, 24), (7, 13), (64, 64)])
def test_counts_are_those_of_plain_loops(rows, columns):
    nonzero = blocks(1, 1, 0.7, rows, columns) & random_zeros(0.2, rows, columns)
    result = structure(nonzero)
    for of in GROUP_SIZES:
        if columns % of == 0:
            assert result.max_kept[of] == max(
                sum(row[start : start + of]) for row in nonzero for start in range(0, columns, of)
            )
    assert result.max_kept.keys() == {of for of in GROUP_SIZES if columns % of == 0}
    for height in BLOCK_SIDES:
        for width in BLOCK_SIDES:
            if rows % height or columns % width:
                assert (height, width) not in result.zeros_in_blocks
                continue
            starts = [(r, c) for r in range(0, rows, height) for c in range(0, columns, width)]
            whole = sum(not nonzero[r : r + height, c : c + width].any() for r, c in starts)
            assert result.zeros_in_blocks[height, width] == whole * height * width


def test_tiles_positions_and_matrices_add_up():
    """Two matrices of three kernel positions, given in tiles, against each matrix by itself."""
    rows, columns = 128, 192
    nonzero = np.stack(
        [np.stack([random_zeros(0.6, rows, columns), blocks(4, 2, 0.5, rows, columns)]) for _ in range(3)], 2
    )
    nonzero[1, 7] = False
    scan = StructureScan("conv2d", 2, rows, 3, columns)
    for matrix in range(2):
        for row in (0, 64):
            for column in (0, 128):
                stop = 128 if column == 0 else columns
                tile = np.ascontiguousarray(nonzero[matrix, row : row + 64, :, column:stop])
                scan.add(tile, matrix, row, column)
    apart = [structure(nonzero[matrix, :, position]) for matrix in range(2) for position in range(3)]
    result = scan.structure
    assert result.weights == nonzero.size and result.zeros == nonzero.size - nonzero.sum()
    assert result.zeros_in_blocks == {
        side: sum(part.zeros_in_blocks[side] for part in apart) for side in result.zeros_in_blocks
    }
    assert result.max_kept == {of: max(part.max_kept[of] for part in apart) for of in result.max_kept}
    for of, most in result.max_kept.items():
        assert result.full_groups[of] == sum(part.full_groups[of] for part in apart if part.max_kept[of] == most)
    assert (result.rows, result.zero_rows, result.columns, result.zero_columns) == (256, 1, 384, 0)
    assert result.zeros_in_lines == 3 * columns


@pytest.mark.parametrize(
    "nonzero, present, absent",
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
def test_has_pattern(nonzero, present, absent):
    result = structure(nonzero)
    assert [pattern for pattern in present + absent if result.has_pattern(pattern)] == present


@pytest.mark.parametrize("pattern", ["3:6", "3x1", "128x1", "unstructured", "2;4"])
def test_undetectable_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=f'pattern "{pattern}"'):
        detectable_pattern(pattern)
