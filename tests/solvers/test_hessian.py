"""The factor of a Gram matrix: its definition, dampening, and refused inputs."""

import logging

import pytest
import torch

from hf_sparse.solvers import HessianFactor
from hf_sparse.statistics import GramMatrix


def gram_of(tokens, columns, seed=0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.t() @ x


def damped(gram, share):
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("dampening", [0, 0.01, 1])
@pytest.mark.parametrize("columns", [1, 2, 9, 40])
def test_the_factor_is_upper_triangular_and_of_the_damped_matrix(columns, dampening):
    gram = gram_of(60, columns)
    factor = HessianFactor(gram, dampening)
    upper = factor.upper_CC
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all() and factor.dampening == dampening
    assert torch.allclose(upper @ upper.t(), damped(gram, dampening), rtol=1e-12, atol=1e-10)


def test_its_inverse_is_the_papers_factor():
    """The paper takes the upper Cholesky factor of the inverse; so is every block on the diagonal."""
    gram = gram_of(60, 12)
    papers = torch.linalg.cholesky(torch.linalg.inv(gram)).t()
    upper = HessianFactor(gram, 0).upper_CC
    assert torch.allclose(torch.linalg.inv(upper), papers, rtol=1e-9, atol=1e-12)
    assert torch.allclose(torch.linalg.inv(upper[4:9, 4:9]), papers[4:9, 4:9], rtol=1e-9, atol=1e-12)


def test_only_the_lower_triangle_is_read():
    gram = gram_of(60, 9)
    spoilt = gram.tril() + torch.full_like(gram, float("nan")).triu(1).nan_to_num(7.0)
    assert torch.equal(HessianFactor(spoilt).upper_CC, HessianFactor(gram).upper_CC)


def test_a_gram_and_its_matrix_have_the_same_factor():
    stat = GramMatrix(200)
    stat.observe(torch.randn(300, 200, generator=torch.Generator().manual_seed(1)))
    before = stat.total.clone()
    assert torch.equal(HessianFactor(stat).upper_CC, HessianFactor(stat.matrix()).upper_CC)
    assert HessianFactor(stat).upper_CC.dtype == torch.float32 and torch.equal(stat.total, before)


def test_the_row_and_column_of_a_dead_input_are_those_of_the_identity():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, [1, 4]] = 0
    gram = x.t() @ x
    factor = HessianFactor(gram)
    assert factor.dead_C.tolist() == [False, True, False, False, True, False]
    alive = ~factor.dead_C
    for dead in (1, 4):
        row = torch.zeros(6, dtype=torch.float64)
        row[dead] = 1
        assert torch.equal(factor.upper_CC[dead], row) and torch.equal(factor.upper_CC[:, dead], row)
    # the dampening is a share of the mean over live inputs
    rest = HessianFactor(gram[alive][:, alive]).upper_CC
    assert torch.allclose(factor.upper_CC[alive][:, alive], rest, rtol=1e-12)


def test_only_dead_inputs():
    factor = HessianFactor(torch.zeros(3, 3))
    assert factor.dead_C.all() and torch.equal(factor.upper_CC, torch.eye(3))


def test_fewer_tokens_than_inputs_need_dampening():
    gram = gram_of(5, 20)
    assert torch.isfinite(HessianFactor(gram).upper_CC).all()
    with pytest.raises(ValueError, match="not positive definite with `dampening` 0: it is rank deficient"):
        HessianFactor(gram.float() - 1e-4 * torch.eye(20), 0)


def test_too_little_dampening_is_raised_and_logged(caplog):
    """An eigenvalue of -0.05 times the mean of the diagonal, as no exact sum has."""
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
    gram[1, 0] = gram[0, 1] = 1.05
    with caplog.at_level(logging.WARNING):
        factor = HessianFactor(gram)
    assert factor.dampening == pytest.approx(0.1) and "`dampening` 0.01 leaves a Gram matrix indefinite" in caplog.text
    assert torch.allclose(factor.upper_CC @ factor.upper_CC.t(), damped(gram, 0.1), atol=1e-6)
    gram[1, 0] = gram[0, 1] = 5
    with pytest.raises(ValueError, match="not positive definite with `dampening` 1"):
        HessianFactor(gram)


def test_invalid_matrices_are_refused():
    gram = gram_of(30, 4).float()
    for bad in (float("nan"), float("inf")):
        broken = gram.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="must be finite"):
            HessianFactor(broken)
    with pytest.raises(ValueError, match="no token was observed"):
        HessianFactor(GramMatrix(3))
    with pytest.raises(ValueError, match="must be square, in float32 or float64"):
        HessianFactor(torch.ones(2, 3))
    with pytest.raises(ValueError, match="must be square, in float32 or float64"):
        HessianFactor(torch.eye(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="`dampening` is -0.1: it must be from 0 to 1"):
        HessianFactor(gram, -0.1)
    with pytest.raises(ValueError, match="the diagonal of a Gram matrix must not be negative"):
        HessianFactor(torch.diag(torch.tensor([1.0, -1.0])))
