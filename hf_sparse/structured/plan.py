"""What a smaller model of the same class can leave out, and what must stay: decided from zeros alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeChange:
    """A config field that gets smaller, or a list of blocks that gets shorter.

    Args:
        field: name of the config field.
        before, after: its values.
        detail: what is removed, in words.
    """

    field: str
    before: int
    after: int
    detail: str

    def __str__(self) -> str:
        return f"{self.field} {self.before:,} -> {self.after:,}: {self.detail}"


@dataclass(frozen=True)
class ShrinkPlan:
    """What `shrink` does to a model. Its text is for people.

    Args:
        model_class: name of the class of the model, which does not change.
        changes: the config fields that get smaller.
        kept: what is zero but stays, each with the reason and, where there is one, the remedy.
        layers: name of each list of blocks from which blocks are removed -> the numbers of those that stay.
        parameters: number of parameters before and after.
        num_bytes: size of the weights before and after, in bytes: that of the file, but for its header.

    Example:
        >>> change = SizeChange("intermediate_size", 1536, 768, "768 to 1,000 of 1,536 neurons are zero")
        >>> print(ShrinkPlan("BertModel", (change,), (), {}, (22_700_000, 19_100_000), (90_800_000, 76_400_000)))
        BertModel: 22,700,000 -> 19,100,000 parameters (84.1 %), 90.8 -> 76.4 MB
        removed:
          intermediate_size 1,536 -> 768: 768 to 1,000 of 1,536 neurons are zero
    """

    model_class: str
    changes: tuple[SizeChange, ...]
    kept: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]
    parameters: tuple[int, int]
    num_bytes: tuple[int, int]

    def __str__(self) -> str:
        before, after = self.parameters
        megabytes = " -> ".join(f"{num_bytes / 1e6:,.1f}" for num_bytes in self.num_bytes)
        share = f" ({100 * after / before:.1f} %)" if before else ""
        lines = [f"{self.model_class}: {before:,} -> {after:,} parameters{share}, {megabytes} MB"]
        lines += ["removed:", *(f"  {change}" for change in self.changes)] if self.changes else ["nothing is removed."]
        if self.kept:
            lines += ["zero, but kept:", *(f"  {reason}" for reason in self.kept)]
        return "\n".join(lines)
