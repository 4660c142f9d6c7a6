"""What observability/ holds that is made of something else there, and whether it still is."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy import dashboards, slos
from local.layout import CHECKOUT


def generated() -> Mapping[Path, str]:
    """Return every generated file with the text that it should have."""
    described = dashboards.read(dashboards.DESCRIBED)
    return {slos.RULES / "slos.yaml": slos.rules(slos.read(slos.SLOS))} | {
        dashboards.DASHBOARDS / f"{each['name']}.json": dashboards.document(each)
        for each in described
    }


def write() -> None:
    """Write every generated file, and remove dashboards that nobody describes any more."""
    files = generated()
    dashboards.DASHBOARDS.mkdir(exist_ok=True)
    for path in set(dashboards.DASHBOARDS.iterdir()) - files.keys():
        path.unlink()
    for path, text in files.items():
        path.write_text(text)


def drifted() -> Iterator[str]:
    """Yield what is no longer what it was made of."""
    files = generated()
    for path in sorted({*files, *dashboards.DASHBOARDS.iterdir()}):
        if not path.exists() or path.read_text() != files.get(path):
            yield f"{path.relative_to(CHECKOUT)} is out of date: python -m deploy observe"
