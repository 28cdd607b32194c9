"""Ranks that are started once per session."""

import pytest
from launch import Ranks


def _ranks(world, tmp_path_factory):
    ranks = Ranks(world, tmp_path_factory.mktemp(f"ranks{world}") / "scenarios")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two ranks."""
    yield from _ranks(2, tmp_path_factory)


@pytest.fixture(scope="session")
def ranks4(tmp_path_factory):
    yield from _ranks(4, tmp_path_factory)
