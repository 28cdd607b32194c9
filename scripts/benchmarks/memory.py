"""Current and peak resident memory of the process, from Linux."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def resident(field: str = "VmRSS") -> int:
    """Returns the resident memory in bytes, with "VmHWM" its peak since `restart_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def restart_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Returns free memory to the system: it would hide part of the memory that is needed."""
    ctypes.CDLL(None).malloc_trim(0)


def extra_bytes(work: Callable[[], object]) -> int:
    """Returns the peak memory of `work` beyond the current memory of the process."""
    give_back()
    restart_peak()
    before = resident()
    work()
    return max(0, resident("VmHWM") - before)
