"""Threads in turns: trainings that take one step each, one after the other, so that their times can be compared."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import TrainerCallback


class Turns:
    """Lets one of several threads run at a time.

    Args:
        count: the number of threads; they are numbered from 0, and 0 runs first.
    """

    def __init__(self, count: int):
        self._condition = threading.Condition()
        self._waiting = list(range(count))  # whose turn it is comes first
        self._failed = False

    def enter(self, thread: int) -> None:
        """Waits for the first turn of a thread."""
        with self._condition:
            self._condition.wait_for(lambda: self._failed or self._waiting[0] == thread)
            if self._failed:
                raise RuntimeError("another thread failed")

    def switch(self, thread: int) -> None:
        """Lets the others have their turns, and returns when it is the thread's turn again."""
        with self._condition:
            self._waiting.append(self._waiting.pop(0))
            self._condition.notify_all()
        self.enter(thread)

    def leave(self, thread: int, failed: bool) -> None:
        """Ends the turns of a thread; those of all if it failed."""
        with self._condition:
            self._waiting.remove(thread)
            self._failed |= failed
            self._condition.notify_all()


def run_in_turns(works: Sequence[Callable[[Callable[[], None]], Any]]) -> None:
    """Calls functions in threads of their own; each gets a function that it calls between two of its steps."""
    turns = Turns(len(works))

    def run(thread: int) -> None:
        failed = True
        try:
            turns.enter(thread)
            works[thread](lambda: turns.switch(thread))
            failed = False
        finally:
            turns.leave(thread, failed)

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(run, thread) for thread in range(len(works))]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next((error for error in errors if "another thread" not in str(error)), errors[0])


class StepTimes(TrainerCallback):
    """Measures the steps of a training from the forward to the end of the optimizer step, without loading of data.

    Attributes:
        seconds: of each step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.switch: Callable[[], None] = lambda: None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.switch()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def quartiles(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and, around it, the first and third quartile."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, low, high
