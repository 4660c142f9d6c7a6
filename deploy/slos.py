"""Promises (observability/slos.yaml) as rules of Prometheus: burn rates, over two windows each.

An alert compares how fast a budget of 30 days burns over a long window, so that few bad events do
not count, and over a short one, so that it ends soon after the trouble does. Windows and factors
are those of the SRE workbook, chapter 5: 14.4 spends 2 % of the budget in an hour.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import yaml

from local.layout import CHECKOUT

OBSERVABILITY: Final = CHECKOUT / "observability"
SLOS: Final = OBSERVABILITY / "slos.yaml"
RULES: Final = OBSERVABILITY / "rules"
RUNBOOKS: Final = "https://github.com/kimberly/kimberly/blob/main/docs/runbooks.md"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two windows, and how many times too fast a budget must burn over both."""

    severity: str
    short: str
    long: str
    factor: Decimal


PAIRS: Final = (
    Pair("page", "5m", "1h", Decimal("14.4")),
    Pair("page", "30m", "6h", Decimal(6)),
    Pair("ticket", "2h", "1d", Decimal(3)),
    Pair("ticket", "6h", "3d", Decimal(1)),
)


@dataclass(frozen=True, slots=True)
class Slo:
    """One promise."""

    name: str
    promise: str
    objective: Decimal
    bad: str = ""
    all: str = ""
    bad_while: str = ""
    pages: bool = True

    @property
    def budget(self) -> Decimal:
        """Which share of all events may be bad."""
        return 1 - self.objective / 100

    @property
    def alert(self) -> str:
        """The name of its alerts, such as QueryErrorsBudgetBurns."""
        return "".join(word.title() for word in self.name.split("-")) + "BudgetBurns"

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of windows that are looked at."""
        return tuple(pair for pair in PAIRS if self.pages or pair.severity != "page")

    def error_ratio(self, window: str) -> str:
        """Return what share of a window was bad, as an expression."""
        if self.bad_while:
            return f'avg_over_time(slo:sli_bad:bool{{slo="{self.name}"}}[{window}])'
        bad, every = (each.replace("$window", window) for each in (self.bad, self.all))
        # Without a bad event there is no series of them yet; without any there is no ratio.
        return f"({bad} or 0 * {every}) / ({every} > 0)"


def read(path: Path) -> tuple[Slo, ...]:
    """Return the promises of a file.

    Raises:
        ValueError: An alert could never fire: nothing but errors would not burn fast enough.
    """
    slos = tuple(
        Slo(**{**each, "objective": Decimal(str(each["objective"]))})
        for each in yaml.safe_load(path.read_text())["slos"]
    )
    for slo in slos:
        if any(pair.factor * slo.budget >= 1 for pair in slo.pairs):
            raise ValueError(
                f"{slo.name}: an objective of {slo.objective} % leaves nothing to alert"
            )
    return slos


def rules(slos: tuple[Slo, ...]) -> str:
    """Return the file of rules."""
    groups = [{"name": f"slo:{slo.name}", "rules": list(_rules_of(slo))} for slo in slos]
    text: str = yaml.safe_dump({"groups": groups}, sort_keys=False, width=10_000)
    return f"# Generated from {SLOS.name} by python -m deploy observe.\n{text}"


def _rules_of(slo: Slo) -> Iterator[dict[str, Any]]:
    if slo.bad_while:
        yield _record("slo:sli_bad:bool", slo, slo.bad_while)
    for window in sorted({w for pair in PAIRS for w in (pair.short, pair.long)}, key=_minutes):
        yield _record(f"slo:sli_error:ratio_rate{window}", slo, slo.error_ratio(window))
    spent = f'avg_over_time(slo:sli_error:ratio_rate5m{{slo="{slo.name}"}}[30d]) / {slo.budget}'
    yield _record("slo:budget_left:ratio", slo, f"1 - {spent}")
    for pair in slo.pairs:
        yield _alert(slo, pair)


def _record(name: str, slo: Slo, expression: str) -> dict[str, Any]:
    return {"record": name, "expr": expression, "labels": {"slo": slo.name}}


def _alert(slo: Slo, pair: Pair) -> dict[str, Any]:
    burning = " and ".join(
        f'slo:sli_error:ratio_rate{window}{{slo="{slo.name}"}} > {pair.factor} * {slo.budget}'
        for window in (pair.short, pair.long)
    )
    return {
        "alert": slo.alert,
        "expr": burning,
        "labels": {"severity": pair.severity, "windows": f"{pair.short}/{pair.long}"},
        "annotations": {
            "summary": f"The budget burns {pair.factor} times too fast: {slo.promise}",
            "description": "{{ $value | humanizePercentage }} of the last "
            f"{pair.short} was bad; {(slo.budget * 100).normalize():f} % may be.",
            "runbook_url": f"{RUNBOOKS}#{slo.alert.lower()}",
        },
    }


def _minutes(window: str) -> int:
    return int(window[:-1]) * {"m": 1, "h": 60, "d": 1440}[window[-1]]
