"""Alerts: each fires and is quiet in a test of promtool's, and leads to text one can follow."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deploy import tools
from deploy.slos import OBSERVABILITY, RULES, RUNBOOKS
from local.layout import CHECKOUT
from tests.deploy import expressions
from tests.needs import needs_prometheus

PROMTOOL = tools.PROMETHEUS / "promtool"
TESTS = sorted((OBSERVABILITY / "tests").glob("*.yaml"))
TEXT = (CHECKOUT / "docs" / "runbooks.md").read_text()
SECTIONS: Final[dict[str, str]] = dict(re.findall(r"(?ms)^## (\w+)\n(.*?)(?=^#|\Z)", TEXT))
SEVERITIES = {"page", "ticket", "notice"}


def by_hand() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expectations() -> Iterator[tuple[str, bool]]:
    """Yield each alert that a test looks at, and whether it is to fire."""
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for each in test["promql_expr_test"]:
                name = re.search(r'alertname="(\w+)"', each["expr"])
                assert name is not None, each
                yield name[1], bool(each["exp_samples"])


def verdict(file: Path) -> tuple[int, str]:
    """Return the status of promtool for a file of tests, and what it says."""
    command = [str(PROMTOOL), "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


# --- promtool ----------------------------------------------------------------------------------


@needs_prometheus
def test_alerts_fire_and_are_quiet_when_they_should_be() -> None:
    for status, said in map(verdict, TESTS):
        assert status == 0, said


@pytest.mark.parametrize("fires", [True, False])
def test_no_alert_is_left_out_of_those_tests(fires: bool) -> None:
    looked_at = {name for name, expected in expectations() if expected is fires}
    assert looked_at == {rule["alert"] for rule in by_hand()}


@needs_prometheus
def test_an_alert_that_never_fires_would_be_noticed(tmp_path: Path) -> None:
    """Every expectation of an alert fails when no rule fires: nothing else makes them hold."""
    rules = yaml.safe_load((RULES / "alerts.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = f"({rule['expr']}) and on () vector(1) < 0"
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "alerts.yaml").write_text(yaml.safe_dump(rules))
    shutil.copytree(OBSERVABILITY / "tests", tmp_path / "tests")
    done = [verdict(file) for file in sorted((tmp_path / "tests").iterdir())]
    failed = sum(said.count("got: nil") for _, said in done)
    assert failed == sum(fires for _, fires in expectations())


# --- what an alert says ------------------------------------------------------------------------


@pytest.mark.parametrize("alert", expressions.alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_urgent_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["annotations"]["summary"].endswith(".")
    name = alert["alert"]
    assert alert["annotations"]["runbook_url"] == f"{RUNBOOKS}#{name.lower()}"
    assert name in SECTIONS


def test_every_section_is_about_an_alert() -> None:
    assert SECTIONS.keys() == {alert["alert"] for alert in expressions.alerts()}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_says_what_to_look_at_what_to_do_and_when_it_is_over(name: str) -> None:
    for part in ("Means", "Look", "Do", "Over"):
        assert f"**{part}**" in SECTIONS[name]


# --- statements of the runbooks ----------------------------------------------------------------


def statements() -> list[str]:
    blocks = re.findall(r"(?ms)^```sql\n(.*?)^```", TEXT)
    return [each.strip() for block in blocks for each in block.split(";") if each.strip()]


@pytest.mark.parametrize("statement", statements())
async def test_a_statement_of_the_runbooks_is_one_of_our_schema(statement: str, owner: Any) -> None:
    async with owner.transaction(readonly=True):
        await owner.fetch(statement)
