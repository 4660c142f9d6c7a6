"""One figure a row, for eyes and for the README."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

Markdown = Annotated[bool, typer.Option(help="Print the table as the README has it.")]
"""A flag of every command that prints one."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, and what to hold it against."""

    what: str
    value: str
    beside: str = ""

    def __str__(self) -> str:
        """Return the figure for a line of text."""
        return f"{self.what}: {self.value}"


def show(rows: Iterable[Row], *, markdown: bool) -> None:
    """Print the rows for eyes, or for the README."""
    print(_for_readme(rows)) if markdown else Console().print(_for_eyes(rows))


def _for_eyes(rows: Iterable[Row]) -> Table:
    table = Table("what", "measured", "beside it")
    for row in rows:
        table.add_row(row.what, row.value, row.beside)
    return table


def _for_readme(rows: Iterable[Row]) -> str:
    lines = [f"| {row.what} | {row.value} | {row.beside} |" for row in rows]
    return "\n".join(["| what | measured | beside it |", "|---|---|---|", *lines])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of names and figures in Markdown."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))
