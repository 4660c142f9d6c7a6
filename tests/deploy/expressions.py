"""What PromQL expressions of ours read."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import promql_parser
import yaml

from deploy import dashboards, slos

VARIABLES: Final = {"$__rate_interval": "5m", "$core_hour": "0.01", "$gb_month": "0.03"}
"""What Grafana puts in."""
_OPERATORS: Final = {
    "MatchOp.Equal": "=",
    "MatchOp.NotEqual": "!=",
    "MatchOp.Re": "=~",
    "MatchOp.NotRe": "!~",
}


@dataclass(frozen=True, slots=True)
class Read:
    """A selector: which series an expression reads."""

    metric: str
    """A name, or a regular expression of names."""
    labels: tuple[tuple[str, str, str], ...]
    """Name, operator and value of each matcher."""

    @property
    def selector(self) -> str:
        """As Prometheus would write it."""
        matchers = [
            f'{name}{_OPERATORS[operator]}"{value}"' for name, operator, value in self.labels
        ]
        return "{" + ",".join([f'__name__=~"{self.metric}"', *matchers]) + "}"


def rules() -> Iterator[dict[str, Any]]:
    """Yield every rule of ours."""
    for file in sorted(slos.RULES.glob("*.yaml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> list[dict[str, Any]]:
    """Return the rules that alert."""
    return [rule for rule in rules() if "alert" in rule]


def recorded() -> set[str]:
    """Return the names of what rules record."""
    return {rule["record"] for rule in rules() if "record" in rule}


def of_dashboards() -> Iterator[str]:
    """Yield every expression of the committed dashboards, as Prometheus would get it."""
    for file in sorted(dashboards.DASHBOARDS.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield filled(target["expr"])


def filled(expression: str) -> str:
    """Return an expression with the variables of Grafana filled in."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def read_by(expression: str) -> Iterator[Read]:
    """Yield every selector of an expression.

    Raises:
        ValueError: It is no expression.
    """
    found: list[Read] = []

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(_read(node))
        return True

    promql_parser.walk(promql_parser.parse(expression), look)
    yield from found


def everything_read() -> set[Read]:
    """Return every selector of rules and dashboards."""
    expressions = [*(rule["expr"] for rule in rules()), *of_dashboards()]
    return {read for each in expressions for read in read_by(each)}


def _read(node: Any) -> Read:
    matchers = [(each.name, str(each.op), each.value) for each in node.matchers.matchers]
    named = [value for name, _, value in matchers if name == "__name__"]
    labels = tuple(sorted(each for each in matchers if each[0] != "__name__"))
    return Read(node.name or named[0], labels)


def has_name(read: Read, names: set[str]) -> bool:
    """Tell whether there are series that a selector could read, by their names."""
    return any(re.fullmatch(read.metric, name) for name in names)
