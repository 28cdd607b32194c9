"""The pruning schedule: at which optimizer steps a prune step takes place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PruningSchedule:
    """Prune steps after the optimizer steps start, start + every, start + 2·every, ... < end, and at end.

    A schedule has no state: a resumed run with the same schedule prunes at the same optimizer steps.

    Args:
        start: optimizer step of the first prune step; optimizer steps count from 1.
        end: optimizer step of the last prune step, which reaches the target.
        every: number of optimizer steps between two prune steps.
        rewind: optimizer step whose weights or learning rate training restarts from after the last prune step; 0 is
            the start of training, None means that it does not restart.

    Raises:
        ValueError: start < 1, start > end, every < 1, or rewind is not before end.

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
    rewind: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end:
            raise ValueError(
                f"`prune_start` is step {self.start} and `prune_end` is step {self.end}: "
                "they must satisfy `1 <= prune_start <= prune_end`."
            )
        if self.every < 1:
            raise ValueError(f"`prune_every` is {self.every} steps: it must be at least 1.")
        if self.rewind is not None and not 0 <= self.rewind < self.end:
            raise ValueError(
                f"`rewind` is step {self.rewind} and `prune_end` is step {self.end}: training can only restart from a "
                "step before `prune_end`. Lower `rewind`."
            )

    @classmethod
    def from_fractions(
        cls, start: float, end: float, every: float, max_steps: int, rewind: float | None = None
    ) -> PruningSchedule:
        """Creates a schedule from the options `prune_start`, `prune_end`, `prune_every` and `rewind`.

        A value below 1 is a fraction of `max_steps`, as for `warmup_steps` of transformers; a value of 1 or more is a
        number of optimizer steps. Fractions are rounded to the nearest step, but at least to 1; that of `rewind` may
        be 0.

        Args:
            start, end, every: as for the class, in steps or as a fraction.
            max_steps: number of optimizer steps of the training.
            rewind: as for the class, in steps or as a fraction.

        Raises:
            ValueError: `start` or `end` is after the last step, `start` is after `end`, or no step is left after
                `end` to train from `rewind` on.

        Example:
            >>> PruningSchedule.from_fractions(0.1, 0.5, 0.02, max_steps=200)
            PruningSchedule(start=20, end=100, every=4, rewind=None)
        """

        def to_steps(value: float) -> int:
            return max(1, round(value * max_steps) if value < 1 else int(value))

        steps = {"start": to_steps(start), "end": to_steps(end)}
        for name, step in steps.items():
            if step > max_steps:
                raise ValueError(
                    f"`prune_{name}` is step {step}, but training has {max_steps} optimizer steps, so the target "
                    f"would never be reached. Lower `prune_{name}`, give it as a fraction below 1, or train longer."
                )
        if rewind is None:
            return cls(start=steps["start"], end=steps["end"], every=to_steps(every))
        if steps["end"] == max_steps:
            raise ValueError(
                f"`rewind` restarts training after `prune_end`, step {max_steps}, which is the last step: lower "
                "`prune_end`, or train longer."
            )
        rewind_step = round(rewind * max_steps) if rewind < 1 else int(rewind)
        return cls(start=steps["start"], end=steps["end"], every=to_steps(every), rewind=rewind_step)

    @property
    def total(self) -> int:
        """The number of prune steps."""
        return -(-(self.end - self.start) // self.every) + 1

    def prune_step(self, step: int) -> int | None:
        """Returns the number (1 to `total`) of the prune step that follows optimizer step `step`; None without one."""
        if step == self.end:
            return self.total
        if self.start <= step < self.end and (step - self.start) % self.every == 0:
            return (step - self.start) // self.every + 1
        return None

    def done(self, step: int) -> int:
        """Returns the number of prune steps up to and including the one after optimizer step `step`."""
        if step >= self.end:
            return self.total
        return 0 if step < self.start else (step - self.start) // self.every + 1
