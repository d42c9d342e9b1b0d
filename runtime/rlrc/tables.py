"""Tables on the terminal, never truncated."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table

_WIDE = 100_000
_WORD = 24  # characters; longer words are folded, shorter ones (such as numbers) are not


def print_table(table: Table, console: Console) -> None:
    """Prints a table as wide as its cells; on a terminal, cells wrap between words.

    On a terminal too narrow for the words, lines wrap.
    """
    wide = console.options.update_width(_WIDE)
    for column in table.columns:
        words = max(Measurement.get(console, wide, cell).minimum for cell in (column.header, *column.cells))
        column.overflow, column.min_width = "fold", min(words, _WORD)
    width = console.width if console.is_terminal else Measurement.get(console, wide, table).maximum
    segments = console.render(table, console.options.update_width(width))
    console.print(Segments(segments), soft_wrap=True, end="")


def plain_console(stderr: bool = False) -> Console:
    """Prints text as it is: rich would read brackets in names and paths as its markup."""
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


def print_rows(rows: Mapping[str, str], console: Console) -> None:
    """Prints a two-column table: bold names, and their values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(table, console)
