"""Dashboards (observability/dashboards.yaml) as the JSON that Grafana loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from deploy.slos import OBSERVABILITY

DESCRIBED: Final = OBSERVABILITY / "dashboards.yaml"
DASHBOARDS: Final = OBSERVABILITY / "dashboards"
_COLUMNS: Final = 24
_HEIGHT: Final = 8
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}

Described = Mapping[str, Any]


def read(path: Path) -> tuple[Described, ...]:
    """Return the described dashboards of a file."""
    return tuple(yaml.safe_load(path.read_text())["dashboards"])


def expressions(dashboard: Described) -> Iterator[str]:
    """Yield every expression of a described dashboard."""
    for row in dashboard["rows"]:
        for panel in row["panels"]:
            yield from panel["series"].values()


def document(dashboard: Described) -> str:
    """Return a described dashboard as Grafana takes it."""
    body = {
        "uid": f"kimberly-{dashboard['name']}",
        "title": f"Kimberly / {dashboard['title']}",
        "description": dashboard["about"],
        "tags": ["kimberly"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "utc",
        "links": [{"type": "dashboards", "tags": ["kimberly"], "title": "Kimberly"}],
        "templating": {"list": list(_variables(dashboard.get("variables", {})))},
        "panels": list(_panels(dashboard["rows"])),
    }
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def _variables(described: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    for name, each in described.items():
        value = each["value"]
        yield {
            "name": name,
            "label": each["title"],
            "type": "textbox",
            "query": value,
            "current": {"text": value, "value": value},
        }


def _panels(rows: list[Described]) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row["title"], "gridPos": place, "panels": []}
        width = _COLUMNS // len(row["panels"])
        for column, panel in enumerate(row["panels"]):
            number += 1
            place = {"x": column * width, "y": top + 1, "w": width, "h": _HEIGHT}
            yield _panel(panel) | {"id": number, "gridPos": place}
        top += 1 + _HEIGHT


def _panel(panel: Described) -> dict[str, Any]:
    return {
        "type": panel.get("kind", "timeseries"),
        "title": panel["title"],
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.get("unit", "short")}, "overrides": []},
        "options": {},
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": _SOURCE,
                "range": True,
                "expr": expression,
                "legendFormat": legend,
            }
            for at, (legend, expression) in enumerate(panel["series"].items())
        ],
    }
