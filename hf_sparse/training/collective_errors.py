"""Errors that all ranks raise together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..distributed import get_communicator


@contextmanager
def raise_on_all_ranks(*types: type[Exception]) -> Iterator[None]:
    """Runs the block on every rank and, if one rank raises an error of `types` in it, raises on all ranks, so that no
    rank waits for one that has stopped. Ranks without an error of their own raise a ValueError.

    Example:
        >>> with raise_on_all_ranks(OSError):
        ...     raise FileNotFoundError("a.txt")
        Traceback (most recent call last):
            ...
        FileNotFoundError: a.txt
    """
    error = None
    try:
        yield
    except types as caught:
        error = caught
    get_communicator().raise_together(error)
