"""Bounds on the time and memory that damaged or crafted files may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


SECONDS, MEGABYTES = 1, 100


class Usage:
    """The processor time of this process, and its peak memory, since the object was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now the current size
        self._memory, self._start = self._peak(), time.process_time()

    @staticmethod
    def _peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def excess(self) -> str | None:
        """What was used, if that is more than allowed."""
        seconds, megabytes = time.process_time() - self._start, self._peak() - self._memory
        return f"{seconds:.1f} s, {megabytes:.0f} MB" if seconds > SECONDS or megabytes > MEGABYTES else None


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if the block uses more than allowed."""
    usage = Usage()
    yield
    excess = usage.excess()
    assert excess is None, excess
