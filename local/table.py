"""The table of a mesh's processes, as `up` and `status` show it."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimberly.cli import figures
from kimberly.cli.status import metrics_of
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
            figures.ago(process["started_at"], now),
            str(process["restarts"] or ""),
            megabytes(resident_bytes(pid)) if pid else "",
            process["address"],
        )
    return table


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


def figure_table(mesh: Mapping[str, Any], *, now: float) -> Table:
    """Return what the processes in `mesh` measure, summed up."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    told = figures.told_by_processes(metrics_of(mesh))
    for title, text in figures.summed_up(told, now=now).items():
        table.add_row(title, text)
    return table
