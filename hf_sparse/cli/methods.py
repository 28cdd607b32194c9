"""The command `methods`: tables of the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


if TYPE_CHECKING:
    from .catalogue import MethodFamily  # imports torch


def print_catalogue(families: list[MethodFamily]) -> None:
    """Prints one table per family, as wide as the terminal: of each method its summary, options and paper."""
    console = Console()
    for family in families:
        # Text, for summaries contain brackets, which strings would take for markup.
        title = Text.assemble((family.name, "bold"), f"\n{family.summary}")
        if family.options:
            title.append("\n" + ", ".join(map(str, family.options)), style="cyan")
        table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="", show_header=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for method in family.methods:
            lines = [Text(method.summary)] if method.summary else []
            lines += [Text(", ".join(map(str, method.options)), style="cyan")] if method.options else []
            lines += [Text(method.paper, style="dim")] if method.paper else []
            table.add_row(Text(method.name), Group(*lines))
        console.print(table)
