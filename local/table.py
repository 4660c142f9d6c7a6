"""The table of a mesh's processes, as `up` and `status` show it."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

STYLES = {"ready": "green", "failed": "bold red", "restarting": "yellow", "starting": "cyan"}


def process_table(mesh: Mapping[str, Any], *, now: float) -> Table:
    """Return the table of the processes in `mesh`, which is the content of mesh.json."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for title, side in (
        ("process", "left"),
        ("state", "left"),
        ("pid", "right"),
        ("uptime", "right"),
        ("restarts", "right"),
        ("RSS", "right"),
        ("address", "left"),
    ):
        table.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
    for name, process in mesh["processes"].items():
        state, pid = process["state"], process["pid"]
        table.add_row(
            name,
            f"[{STYLES.get(state, 'default')}]{state}[/]",
            str(pid or ""),
            uptime(process["started_at"], now),
            str(process["restarts"] or ""),
            megabytes(resident_bytes(pid)) if pid else "",
            process["address"],
        )
    return table


def uptime(started_at: float | None, now: float) -> str:
    """Return how long something has run, such as 4 s, 12 min or 3 h."""
    if started_at is None:
        return ""
    seconds = int(now - started_at)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def megabytes(count: int) -> str:
    """Return a number of bytes in MB."""
    return f"{count / 1e6:.0f} MB"


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children; 0 if it is gone.

    Of the children only what is theirs alone: PostgreSQL's share their buffers with each other.
    """
    children = 0
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            children += _status_bytes(int(child), "RssAnon")
    return _status_bytes(pid, "VmRSS") + children


def _status_bytes(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def table_now(mesh: Mapping[str, Any]) -> Table:
    """Return the table as of now."""
    return process_table(mesh, now=time.time())
