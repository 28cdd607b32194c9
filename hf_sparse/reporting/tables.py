"""Tables in plain text, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """A table whose form is chosen when it is shown: plain text, HTML, or drawn on a console.

    Args:
        header: the name of each column.
        rows: the cells of each row, totals last.
        text_columns: number of leading columns that are aligned left; the others are aligned right.
        totals: number of rows at the end that are totals.

    Example:
        >>> table = Table(("layer", "zeros"), (("a.weight", "8"), ("all", "8")), text_columns=1, totals=1)
        >>> print(table)
        layer     zeros
        a.weight      8
        all           8
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int
    totals: int = 0

    def __str__(self) -> str:
        return format_table([self.header, *self.rows], self.text_columns)

    def to_html(self) -> str:
        """Returns the table as HTML that follows the colours of the page that shows it."""
        first_total = len(self.rows) - self.totals
        head = self._html_row(self.header, "th")
        body = "".join(self._html_row(row, "td", bold=index >= first_total) for index, row in enumerate(self.rows))
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def _html_row(self, cells: Sequence[str], tag: str, bold: bool = False) -> str:
        row = ""
        for column, cell in enumerate(cells):
            align, content = "left" if column < self.text_columns else "right", escape(cell)
            row += f'<{tag} style="text-align: {align}">{f"<b>{content}</b>" if bold else content}</{tag}>'
        return f"<tr>{row}</tr>"


def format_sparsity(zeros: int, weights: int) -> tuple[str, str, str]:
    """Formats the number of zeros, the number of weights and the sparsity, zeros / weights, as three table cells.

    Example:
        >>> format_sparsity(1_500, 2_000)
        ('1,500', '2,000', '75.00%')
    """
    sparsity = zeros / weights if weights else 0.0
    return f"{zeros:,}", f"{weights:,}", f"{sparsity:.2%}"


def format_table(rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Formats rows as a plain-text table.

    Args:
        rows: the cells of each row; all rows have the same length.
        text_columns: number of leading columns that are aligned left; the others are aligned right.

    Example:
        >>> print(format_table([("layer", "zeros"), ("a.weight", "8")], text_columns=1))
        layer     zeros
        a.weight      8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def format_markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """Formats rows as a Markdown table. The cells are inserted as they are: escape them first.

    Args:
        header: the name of each column.
        rows: the cells of each row.
        text_columns: number of leading columns that are aligned left; the others are aligned right.

    Example:
        >>> print(format_markdown_table(("of", "zeros"), [("all", "8")], text_columns=1))
        | of | zeros |
        |---|--:|
        | all | 8 |
    """
    rule = "|" + "---|" * text_columns + "--:|" * (len(header) - text_columns)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def without_empty_columns(rows: Sequence[Sequence[str]], empty: str = "") -> list[tuple[str, ...]]:
    """Returns rows without the columns that have no cell below the header, the first row. A header alone stays.

    Args:
        rows: the cells of each row; all rows have the same length.
        empty: what stands in a cell without a value.

    Example:
        >>> without_empty_columns([("layer", "error", "note"), ("a", "", "empty"), ("b", "", "")])
        [('layer', 'note'), ('a', 'empty'), ('b', '')]
        >>> without_empty_columns([("layer", "note")])
        [('layer', 'note')]
    """
    if len(rows) < 2:
        return [tuple(row) for row in rows]
    columns = [column for column in zip(*rows, strict=True) if any(cell not in ("", empty) for cell in column[1:])]
    return list(zip(*columns, strict=True))
