"""Watches the alerts that would wake somebody, for a while after a release."""

import time
from collections.abc import Mapping
from typing import Any, Final

import httpx
import yaml

from deploy.slos import RULES

Alert = tuple[str, str]
"""Its name, and the windows that it looks at if it is one of a budget."""

PAGES: Final = 'ALERTS{alertstate="firing",severity="page"}'
"""Multi-window burn rates of the SLOs and whatever else pages (observability/)."""


class Refused(Exception):
    """The release must not go on."""


def watch(prometheus: str, *, seconds: float, every_seconds: float = 15.0) -> int:
    """Look at the alerts again and again and return how often.

    Raises:
        Refused: One fires, or nobody can tell: no news is no good news. Nor is it at the end when
            Prometheus lacks an alert of ours, or cannot evaluate it.
    """
    deadline, looked = time.monotonic() + seconds, 0
    with httpx.Client(base_url=prometheus, timeout=10) as client:
        while True:
            if firing := _firing(client):
                raise Refused(f"firing: {', '.join(sorted(firing))}")
            blind = paging() - _evaluated(client)
            looked += not blind
            if time.monotonic() >= deadline:
                break
            time.sleep(every_seconds)
    if blind:
        raise Refused(f"not watched: {', '.join(sorted({name for name, _ in blind}))}")
    return looked


def paging() -> set[Alert]:
    """Return every alert of observability/rules that wakes somebody."""
    files = [yaml.safe_load(file.read_text()) for file in RULES.glob("*.yaml")]
    rules = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return {_alert(rule["alert"], rule) for rule in rules if _pages(rule)}


def _pages(rule: Mapping[str, Any]) -> bool:
    return "alert" in rule and rule["labels"]["severity"] == "page"


def _alert(name: str, rule: Mapping[str, Any]) -> Alert:
    return name, rule["labels"].get("windows", "")


def _evaluated(client: httpx.Client) -> set[Alert]:
    groups = _ask(client, "/api/v1/rules", {"type": "alert"}, "groups")
    rules = [rule for group in groups for rule in group["rules"]]
    return {_alert(rule["name"], rule) for rule in rules if rule["health"] == "ok"}


def _firing(client: httpx.Client) -> set[str]:
    result = _ask(client, "/api/v1/query", {"query": PAGES}, "result")
    return {each["metric"]["alertname"] for each in result}


def _ask(client: httpx.Client, path: str, about: Mapping[str, str], wanted: str) -> list[Any]:
    try:
        answer = client.get(path, params=about)
        answer.raise_for_status()
        told: list[Any] = answer.json()["data"][wanted]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise Refused(f"Prometheus does not tell: {error!r}") from error
    return told
