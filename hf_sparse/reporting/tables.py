"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def figures(zeros: int, weights: int) -> tuple[str, str, str]:
    """Zeros, weights and the share of the one in the other, as they are printed."""
    share = zeros / weights if weights else 0.0
    return f"{zeros:,}", f"{weights:,}", f"{share:.2%}"


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows in aligned columns, the first `left` of them to the left and the others to the right.

    Example:
        >>> print(table([("layer", "zeros"), ("a.weight", "8")], left=1))
        layer     zeros
        a.weight      8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (zip(row, widths, strict=True) for row in rows)
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)
