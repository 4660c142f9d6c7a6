"""One figure a row, for eyes and for the README."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, and what to hold it against."""

    what: str
    value: str
    beside: str = ""

    def __str__(self) -> str:
        """Return the figure for a line of text."""
        return f"{self.what}: {self.value}"


def for_eyes(rows: Iterable[Row]) -> Table:
    """Return the rows as a table for a terminal."""
    table = Table("what", "measured", "beside it")
    for row in rows:
        table.add_row(row.what, row.value, row.beside)
    return table


def for_readme(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"| {row.what} | {row.value} | {row.beside} |" for row in rows]
    return "\n".join(["| what | measured | beside it |", "|---|---|---|", *lines])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of names and figures in Markdown."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))
