"""Dashboards: each expression is one, and none tells of a single user."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from deploy import dashboards, tools
from tests.deploy import expressions
from tests.needs import needs_prometheus

PROMTOOL = tools.PROMETHEUS / "promtool"
FILES = sorted(dashboards.DASHBOARDS.glob("*.json"))
NAMES = {"overview", "memory", "meditation", "jobs", "mesh", "cost"}


def panels(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["panels"])


def test_there_is_a_dashboard_for_each_part() -> None:
    assert {file.stem for file in FILES} == NAMES
    assert len({json.loads(file.read_text())["uid"] for file in FILES}) == len(NAMES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_panels_have_places_of_their_own_and_know_where_to_ask(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(file):
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in panels(file)}) == len(panels(file))


def test_every_expression_is_one() -> None:
    for expression in expressions.of_dashboards():
        promql_parser.parse(expression)


@needs_prometheus
def test_prometheus_itself_takes_every_expression(tmp_path: Path) -> None:
    """As a rule that records it: functions and types are looked at too."""
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions.of_dashboards())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        [PROMTOOL, "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_a_wrong_expression_would_be_noticed() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum(rate(up[5m])")


def test_nothing_asks_for_a_single_user() -> None:
    labels = {name for read in expressions.everything_read() for name, _, _ in read.labels}
    grouped = re.findall(r"by \(([^)]*)\)", " ".join(expressions.of_dashboards()))
    assert not {"user", "user_id", "tenant", "tenant_id", "email"} & {*labels, *grouped}
