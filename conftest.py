"""Fixtures of the tests and of the doctests in the package."""

import pytest


@pytest.fixture(autouse=True)
def registries():
    """Removes the methods that a test registers, so that no other test sees them."""
    from hf_sparse.allocations import ALLOCATIONS
    from hf_sparse.criteria import CRITERIA
    from hf_sparse.patterns.base import PATTERNS
    from hf_sparse.schedulers import CURVES, SCHEDULERS
    from hf_sparse.solvers import SOLVERS

    families = [ALLOCATIONS, CRITERIA, CURVES, PATTERNS, SCHEDULERS, SOLVERS]
    members = [dict(family._members) for family in families]
    yield
    for family, before in zip(families, members, strict=True):
        family._members = before
