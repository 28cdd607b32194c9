"""InputNorms and GramMatrix: sums over tokens compared with float64, tokens that are left out, and errors."""

import pytest
import torch

from hf_sparse.statistics import GramMatrix, InputNorms, inputs


def tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(kind, x_TI):
    x = x_TI.double()
    return x.square().sum(0) if kind is InputNorms else x.t() @ x


def sums(stat):
    return stat.total if isinstance(stat, InputNorms) else stat.matrix()


def test_by_hand():
    """Two tokens (1, -2) and (3, 1): squares 10 and 5, product -2 + 3."""
    x = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
    norms, gram = InputNorms(2), GramMatrix(2)
    for stat in (norms, gram):
        stat.observe(x)
        assert stat.count == 2 and stat.norms.tolist() == pytest.approx([10**0.5, 5**0.5])
    assert norms.total.tolist() == [10, 5] and gram.matrix().tolist() == [[10, 1], [1, 5]]


@pytest.mark.parametrize("block, chunk", [(2, 8), (5, 64), (128, 2**18)])
@pytest.mark.parametrize("columns", [1, 7, 24])
@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_sums_do_not_depend_on_block_and_chunk_sizes(kind, columns, block, chunk, monkeypatch):
    monkeypatch.setattr(inputs, "_DIAGONAL_BLOCK", block)
    monkeypatch.setattr(inputs, "_CHUNK", chunk)
    stat, x = kind(columns), tokens(3, 11, columns)
    stat.observe(x)
    assert torch.allclose(sums(stat).double(), expected(kind, x.view(33, columns)), rtol=1e-5, atol=1e-5)


def test_only_the_lower_triangle_of_a_gram_matrix_is_defined():
    stat = GramMatrix(300)
    stat.observe(tokens(40, 300))
    matrix = stat.matrix()
    assert torch.equal(matrix, matrix.t()) and not stat.total[:100, 200:].any()
    stat.total.copy_(matrix.tril() + 7 * torch.ones(300, 300).triu(1))
    assert torch.equal(stat.matrix(), matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_every_dtype_is_summed_in_float32(kind, dtype):
    """4096 equal tokens: a sum in bfloat16 would stop growing at 256 times their value."""
    stat = kind(3)
    stat.observe(torch.full((4096, 3), 1.5, dtype=dtype))
    assert stat.total.dtype == torch.float32 and torch.equal(sums(stat).unique(), torch.tensor([4096 * 2.25]))


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_any_memory_layout_and_batches_without_tokens(kind):
    stat, x = kind(6), tokens(6, 4, 5)
    stat.observe(x.permute(2, 1, 0))
    stat.observe(torch.zeros(2, 0, 6))
    stat.observe(tokens(2, 6), torch.tensor([False, False]))
    stat.observe(tokens(6, seed=1))
    whole = torch.cat([x.permute(2, 1, 0).reshape(20, 6), tokens(1, 6, seed=1)])
    assert stat.count == 21 and torch.allclose(sums(stat).double(), expected(kind, whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_non_finite_inputs_raise_and_add_nothing(kind, bad):
    stat, x = kind(3), tokens(2, 4, 3)
    stat.observe(x)
    before = stat.total.clone()
    broken = x.clone()
    broken[1, 2, 1] = bad
    with pytest.raises(ValueError, match=r"must be finite, but 1 of 3 \(input 1 first\)"):
        stat.observe(broken)
    assert torch.equal(stat.total, before) and stat.count == 8
    stat.observe(broken, torch.tensor([[True] * 4, [True, True, False, True]]))  # padding may hold anything
    assert stat.count == 15 and torch.isfinite(stat.total).all()


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_wrong_shapes_and_dtypes_raise(kind):
    stat = kind(3)
    with pytest.raises(ValueError, match=r"of shape \(\.\.\., 3\), but are torch.float32 \(2, 4\)"):
        stat.observe(torch.ones(2, 4))
    with pytest.raises(ValueError, match="floating point"):
        stat.observe(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keep must be bool, of shape \(2,\), but is torch.int64 \(2,\).*\.bool\(\)"):
        stat.observe(torch.ones(2, 3), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="keep must be bool"):
        stat.observe(torch.ones(2, 5, 3), torch.ones(2, dtype=torch.bool))
    assert not stat.count and not stat.total.any()


def test_inputs_are_not_modified_and_no_graph_is_kept():
    x = tokens(5, 4).requires_grad_()
    before = x.detach().clone()
    for stat in (InputNorms(4), GramMatrix(4)):
        stat.observe(x)
        assert not stat.total.requires_grad
    assert torch.equal(x.detach(), before)
