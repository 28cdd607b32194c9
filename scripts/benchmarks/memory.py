"""What the process holds and held at most, as Linux counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def resident(field: str = "VmRSS") -> int:
    """Bytes: held now, or with "VmHWM" the most since `restart_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def restart_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Memory that is free but still held would hide what is needed."""
    ctypes.CDLL(None).malloc_trim(0)


def extra_bytes(work: Callable[[], object]) -> int:
    """What `work` needs at its peak beyond what the process holds already."""
    give_back()
    restart_peak()
    before = resident()
    work()
    return max(0, resident("VmHWM") - before)
