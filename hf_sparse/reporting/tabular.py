"""Results that are shown as tables: as plain text, in notebooks and on consoles."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from html import escape

from .tables import Table


class Tabular(ABC):
    """A result that `str` formats as plain text, notebooks show as HTML, and `console_text` draws for terminals."""

    @abstractmethod
    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        """Returns the tables and sentences that show the result, in their order.

        Args:
            all_layers: True for a row per layer, False for rows per kind of layer and per block. None: a row per
                layer unless there are many.
        """

    def format(self, all_layers: bool | None = None) -> str:
        """Returns the tables as plain text; `all_layers` as for `tables`."""
        text = ""
        after_table = False
        for part in self.tables(all_layers):
            is_table = isinstance(part, Table)
            text += "" if not text else "\n\n" if is_table or after_table else "\n"
            text, after_table = text + str(part), is_table
        return text

    def __str__(self) -> str:
        return self.format()

    def _repr_html_(self) -> str:
        """The form in notebooks."""
        return "".join(part.to_html() if isinstance(part, Table) else _html_lines(part) for part in self.tables())


def _html_lines(text: str) -> str:
    return f"<div>{escape(text).replace(chr(10), '<br>')}</div>"


def console_text(result: Tabular, all_layers: bool | None = None, width: int | None = None) -> str:
    """Returns a result as the console shows it: drawn by rich in its width if it is a terminal, else plain text.

    Args:
        all_layers: as for `Tabular.tables`.
        width: draw for a terminal of this many columns, whatever the console is.
    """
    if width is None and not sys.stdout.isatty():
        return result.format(all_layers)
    from rich.console import Console  # imported where it is used: training on many processes does not need it

    console = Console(width=width, force_terminal=True if width else None)
    with console.capture() as capture:
        for part in result.tables(all_layers):
            shown = part if isinstance(part, str) else _rich_table(_fit(part, console.width))
            console.print(shown, markup=False, highlight=False)
    return capture.get().rstrip()


def _fit(table: Table, width: int) -> Table:
    """Leaves out columns of texts, such as shapes, from the last to the second, until a table fits into a width."""
    lines = [table.header, *table.rows]
    while table.text_columns > 1 and sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) > width + 2:
        last = table.text_columns - 1
        header, *rows = ((*line[:last], *line[last + 1 :]) for line in lines)
        table, lines = Table(header, tuple(rows), last, table.totals), [header, *rows]
    return table


def _rich_table(table: Table) -> object:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    for column, name in enumerate(table.header):
        is_text = column < table.text_columns
        drawn.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    first_total = len(table.rows) - table.totals
    for index, row in enumerate(table.rows):
        if index == first_total:
            drawn.add_section()
        drawn.add_row(*map(Text, row), style="bold" if index >= first_total else None)
    return drawn
