"""What the mesh costs by standing there: time to start, memory of every process."""

import time
from pathlib import Path

import psutil

from bench.table import Row
from local.layout import Layout
from local.mesh import Mesh

_MIB = 1024 * 1024


async def start_up(state: Path) -> list[Row]:
    """Start a mesh from nothing, stop it, and start it again with its data."""
    rows = []
    for which in ("first", "second"):
        began = time.perf_counter()
        async with Mesh(Layout(state)) as mesh:
            await mesh.wait_ready()
            seconds = time.perf_counter() - began
            goal = "goal: 10 s" if which == "second" else "initdb and migrations included"
            rows.append(Row(f"mesh ready, {which} start", f"{seconds:.1f} s", goal))
    return rows


def resident(mesh: Mesh) -> list[Row]:
    """Return the proportional set size of every process, children included."""
    sizes = {name: _pss(process.pid) for name, process in mesh.processes.items() if process.pid}
    rows = [Row(f"memory of {name}", f"{size / _MIB:.0f} MiB") for name, size in sizes.items()]
    total = sum(sizes.values())
    return [*rows, Row("memory of the whole mesh", f"{total / _MIB:.0f} MiB", "shared pages once")]


def _pss(pid: int) -> int:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(int(member.memory_full_info().pss) for member in family)
