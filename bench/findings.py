"""What came out of the retrieval benchmark, for eyes and for the README."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.judging import DEPTH, Judgement
from bench.load import TOP_K, Load
from bench.measure import Latency
from bench.spending import CLIENT
from bench.table import markdown

_RANKED = (
    "",
    "R@1",
    "R@5",
    "R@10",
    "R@20",
    "hit@1",
    "MRR",
    "session hit@5",
    f"p50 / p99 of top {DEPTH}",
)
_PRESSED = ("", "memories of others", "clients", f"p50 / p99 of top {TOP_K}", "queries/s")
_PARTS = {
    "client": CLIENT,
    "edge": "edge",
    "sidecar": "memory-sidecar",
    "service": "memory",
    "PostgreSQL": "postgres",
    "Valkey": "valkey",
}
_SPENT = ("CPU ms a query", "memories of others", "clients", *_PARTS, "all else")


@dataclass(frozen=True, slots=True)
class Ranked:
    """How well somebody found what was asked for."""

    who: str
    judgement: Judgement
    latency: Latency | None
    """None: some questions were asked before, and a cache may have known them."""

    def cells(self) -> list[str]:
        """Return the row of the table."""
        figures = [f"{figure:.3f}" for figure in astuple(self.judgement)]
        return [self.who, *figures, str(self.latency or "")]


@dataclass(frozen=True, slots=True)
class Pressed:
    """How fast the mesh answered, one client or many."""

    who: str
    others: int
    load: Load

    def cells(self) -> list[str]:
        """Return the row of the table."""
        load = self.load
        return [*self._beginning(), str(load.latency), f"{load.per_second:.0f}"]

    def spent(self) -> list[str]:
        """Return the row of the table of what that cost, the profile."""
        spent = self.load.cpu_milliseconds
        parts = {name: spent.get(name, 0.0) for name in _PARTS.values()}
        rest = sum(spent.values()) - sum(parts.values())
        return [*self._beginning(), *(f"{one:.2f}" for one in (*parts.values(), rest))]

    def _beginning(self) -> list[str]:
        return [self.who, f"{self.others:,}".replace(",", " "), f"{self.load.clients}"]


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that one run measured."""

    ranked: Sequence[Ranked] = ()
    pressed: Sequence[Pressed] = ()

    def __add__(self, more: "Findings") -> "Findings":
        """Return both."""
        return Findings([*self.ranked, *more.ranked], [*self.pressed, *more.pressed])

    def for_eyes(self) -> list[Table]:
        """Return tables for a terminal."""
        return [
            _table(_RANKED, (row.cells() for row in self.ranked)),
            _table(_PRESSED, (row.cells() for row in self.pressed)),
            _table(_SPENT, (row.spent() for row in self.pressed)),
        ]

    def for_readme(self) -> str:
        """Return tables in Markdown."""
        return "\n\n".join(
            (
                markdown(_RANKED, (row.cells() for row in self.ranked)),
                markdown(_PRESSED, (row.cells() for row in self.pressed)),
                markdown(_SPENT, (row.spent() for row in self.pressed)),
            )
        )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(head[0], min_width=10)
    for name in head[1:]:
        table.add_column(name, justify="right", min_width=min(5, len(name)))
    for row in rows:
        table.add_row(*row)
    return table
