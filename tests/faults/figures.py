"""What a fault run found, in the numbers that a reader trusts: never only "tests pass"."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Recoveries:
    """How long it took after each fault of one kind."""

    injected: int = 0
    service_seconds: list[float] = field(default_factory=list)
    """Until a memory could be created and read through the edge."""
    whole_seconds: list[float] = field(default_factory=list)
    """Until all processes were ready and what had been killed did its own work again."""


@dataclass(slots=True)
class Figures:
    """Everything that the tests of one session counted."""

    seed: int
    faults: defaultdict[str, Recoveries] = field(default_factory=lambda: defaultdict(Recoveries))
    operations: int = 0
    memories: int = 0
    """Acknowledged memories that were looked for in Postgres."""
    scores: int = 0
    """Scores of meditations that were interrupted."""
    lost: int = 0
    duplicated: int = 0
    unresolved: int = 0
    overdue: int = 0
    """Calls that did not end by their deadline."""
    guards: list[str] = field(default_factory=list)
    """What happens with a guard, and without it."""

    def inject(
        self, kind: str, *, service_seconds: float | None = None, whole_seconds: float | None = None
    ) -> None:
        """Count a fault and how long the mesh took to recover, where that was measured."""
        recoveries = self.faults[kind]
        recoveries.injected += 1
        if service_seconds is not None:
            recoveries.service_seconds.append(service_seconds)
        if whole_seconds is not None:
            recoveries.whole_seconds.append(whole_seconds)

    def show(self, console: Console) -> None:
        """Print one table."""
        table = Table(title=f"Faults, seed {self.seed}", title_justify="left")
        table.add_column("fault")
        for heading in ("injected", "service p50", "p99", "whole p50", "p99"):
            table.add_column(heading, justify="right")
        for kind, recoveries in self.faults.items():
            table.add_row(kind, *_cells([recoveries]))
        table.add_section()
        table.add_row("all", *_cells(list(self.faults.values())), style="bold")
        table.add_section()
        for name in ("operations", "memories", "scores"):
            table.add_row(f"{name} judged", str(getattr(self, name)))
        for name in ("lost", "duplicated", "unresolved", "overdue"):
            count = getattr(self, name)
            table.add_row(name, str(count), style="bold red" if count else "bold green")
        console.print(table)
        for guard in self.guards:
            console.print(f"  {guard}")


def _cells(recoveries: Sequence[Recoveries]) -> list[str]:
    service = [seconds for each in recoveries for seconds in each.service_seconds]
    whole = [seconds for each in recoveries for seconds in each.whole_seconds]
    return [
        str(sum(each.injected for each in recoveries)),
        *(_shown(values, part) for values in (service, whole) for part in (0.5, 0.99)),
    ]


def _shown(seconds: Sequence[float], part: float) -> str:
    return f"{percentile(seconds, part):.2f} s" if seconds else "-"


def percentile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that at least this part of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
