"""Bounds of what reading a file may cost, however it was damaged or crafted."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager


SECONDS, MEGABYTES = 1, 100


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where the block takes more processor time, or raises the peak memory of the process by more."""
    before, start = _peak_megabytes(), time.process_time()
    yield
    seconds, megabytes = time.process_time() - start, _peak_megabytes() - before
    assert seconds < SECONDS and megabytes < MEGABYTES, f"{seconds:.1f} s, {megabytes:.0f} MB"


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
