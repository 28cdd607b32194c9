"""At which optimizer steps a prune step happens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PruningSchedule:
    """Prune steps after the optimizer steps start, start + every, ..., and always one at `end`.

    It is a value: the answer depends on the step asked about and on nothing that happened before, so a resumed run
    asks the same questions and gets the same answers.

    Args:
        start: the optimizer step (the first is 1) after which the first prune step happens.
        end: the one of the last prune step, at which the target is reached.
        every: optimizer steps between two prune steps.

    Raises:
        ValueError: not 1 <= start <= end, or every < 1.

    Example:
        >>> schedule = PruningSchedule(start=2, end=9, every=3)
        >>> [(step, schedule.prune_step(step)) for step in range(1, 11) if schedule.prune_step(step)]
        [(2, 1), (5, 2), (8, 3), (9, 4)]
        >>> schedule.total
        4
    """

    start: int
    end: int
    every: int

    def __post_init__(self):
        if not 1 <= self.start <= self.end:
            raise ValueError(
                f"prune_start is step {self.start} and prune_end is step {self.end}: "
                "1 <= prune_start <= prune_end is needed."
            )
        if self.every < 1:
            raise ValueError(f"prune_every is {self.every} steps: it must be at least 1.")

    @classmethod
    def from_fractions(cls, start: float, end: float, every: float, max_steps: int) -> PruningSchedule:
        """Turn settings into steps: a value below 1 is a fraction of `max_steps`, as for `warmup_steps`; 1 or more
        is a number of steps. 0 as a start or end means the first step. A fraction never falls below one step.

        Raises:
            ValueError: pruning would start or end after the last step, or end before it starts.

        Example:
            >>> PruningSchedule.from_fractions(0.1, 0.5, 0.02, max_steps=200)
            PruningSchedule(start=20, end=100, every=4)
        """
        steps = {name: _to_steps(value, max_steps) for name, value in (("start", start), ("end", end))}
        for name, step in steps.items():
            if step > max_steps:
                raise ValueError(
                    f"prune_{name} is step {step}, but training has {max_steps} optimizer steps, so the target would "
                    f"never be reached. Lower prune_{name}, give it as a fraction below 1, or train longer."
                )
        return cls(start=steps["start"], end=steps["end"], every=_to_steps(every, max_steps))

    @property
    def total(self) -> int:
        """The number of prune steps."""
        return -(-(self.end - self.start) // self.every) + 1

    def prune_step(self, step: int) -> int | None:
        """Which prune step (1..total) happens after optimizer step `step` (the first is 1), or None."""
        if step == self.end:
            return self.total
        if self.start <= step < self.end and (step - self.start) % self.every == 0:
            return (step - self.start) // self.every + 1
        return None

    def done(self, step: int) -> int:
        """How many prune steps have happened once optimizer step `step` is over."""
        if step >= self.end:
            return self.total
        return 0 if step < self.start else (step - self.start) // self.every + 1


def _to_steps(value: float, max_steps: int) -> int:
    return max(1, round(value * max_steps) if value < 1 else int(value))
