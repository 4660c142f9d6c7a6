"""docs/telemetry.md lists what is measured: everything, and nothing that is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from local.layout import CHECKOUT
from server.backup.run_store import GAUGES

KIND = re.compile(r"\w*(Counter|Gauge|Histogram)")
"""Prometheus's own kinds, and ours that are made of them."""


def measured() -> set[str]:
    """Return the names of all metrics as Prometheus reads them."""
    files = [*CHECKOUT.glob("server/**/metrics.py"), CHECKOUT / "workers" / "metrics.py"]
    return {name for file in files for name in names_in(file)} | GAUGES.keys()


def names_in(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            match node.func.id, node.args:
                case str(made_by), [ast.Constant(value=str(name)), *_]:
                    if kind := KIND.fullmatch(made_by):
                        yield f"{name}_total" if kind[1] == "Counter" else name


def documented() -> set[str]:
    """Return the names in the second column of the table."""
    text = (CHECKOUT / "docs" / "telemetry.md").read_text()
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_metric_is_in_the_table_and_nothing_else() -> None:
    assert len(measured()) > 40
    assert documented() == measured()
