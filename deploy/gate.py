"""Watches the alerts that would wake somebody, for a while after a release."""

import time
from typing import Any, Final

import httpx

PAGES: Final = 'ALERTS{alertstate="firing",severity="page"}'
"""Multi-window burn rates of the SLOs and whatever else pages (observability/)."""


class Refused(Exception):
    """The release must not go on."""


def watch(prometheus: str, *, seconds: float, every_seconds: float = 15.0) -> int:
    """Look at the alerts again and again and return how often.

    Raises:
        Refused: One fires, or nobody can tell: no news is no good news.
    """
    deadline, looked = time.monotonic() + seconds, 0
    with httpx.Client(base_url=prometheus, timeout=10) as client:
        while True:
            firing = _firing(client)
            if firing:
                raise Refused(f"firing: {', '.join(sorted(firing))}")
            looked += 1
            if time.monotonic() >= deadline:
                return looked
            time.sleep(every_seconds)


def _firing(client: httpx.Client) -> set[str]:
    try:
        answer = client.get("/api/v1/query", params={"query": PAGES})
        answer.raise_for_status()
        result: list[Any] = answer.json()["data"]["result"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise Refused(f"Prometheus does not tell: {error!r}") from error
    return {each["metric"]["alertname"] for each in result}
