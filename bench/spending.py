"""What CPU a running mesh spends, process by process: the profile behind a latency."""

import os
from collections import Counter

import psutil

from local.mesh import Mesh

CLIENT = "client"
"""The process that measures; it is not of the mesh, but its time is in every latency."""


def cpu_seconds(mesh: Mesh) -> Counter[str]:
    """Return the CPU time since the start of every process by name, children with their parent."""
    name_of = {process.pid: name for name, process in mesh.processes.items() if process.pid}
    name_of[os.getpid()] = CLIENT
    spent: Counter[str] = Counter()
    for process in psutil.process_iter(["ppid", "cpu_times"]):
        name = name_of.get(process.pid) or name_of.get(process.info["ppid"])
        if name and process.info["cpu_times"]:
            spent[name] += process.info["cpu_times"].user + process.info["cpu_times"].system
    return spent
