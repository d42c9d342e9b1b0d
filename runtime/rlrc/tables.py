"""Tables for people, never truncated whatever the width of the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table

_WIDE = 100_000
_WORD = 24  # characters; longer words are folded, shorter ones (numbers among them) stay whole


def print_table(table: Table, console: Console) -> None:
    """Without a terminal a table is as wide as its cells. In a terminal cells are wrapped between words.

    A terminal too narrow for the words wraps the lines.
    """
    wide = console.options.update_width(_WIDE)
    for column in table.columns:
        words = max(Measurement.get(console, wide, cell).minimum for cell in (column.header, *column.cells))
        column.overflow, column.min_width = "fold", min(words, _WORD)
    width = console.width if console.is_terminal else Measurement.get(console, wide, table).maximum
    segments = console.render(table, console.options.update_width(width))
    console.print(Segments(segments), soft_wrap=True, end="")


def plain_console(stderr: bool = False) -> Console:
    """Prints what it is given: names and paths may hold brackets, which rich would take for its markup."""
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


def print_rows(rows: Mapping[str, str], console: Console) -> None:
    """Headings and what there is to say under each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(table, console)
