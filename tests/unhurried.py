"""`python -m tests.unhurried`: the server, and nobody is refused because a machine is busy.

Services in the process of a test are as patient: `tests/conftest.py`.
"""

from __future__ import annotations

import runpy
import sys
from typing import Final

import pytest

from server import cache
from server import database as pools

PATIENT_SECONDS: Final = 30.0
"""Longer than a machine that runs the tests stands still."""
LEG_SECONDS: Final = 5.0
"""So long does a query of a mesh wait for a part of its answer: some test waits for all of it."""


def unhurry(patch: pytest.MonkeyPatch, *limits: str) -> None:
    """Have a process wait for its stores as long as a busy machine may take.

    Args:
        patch: What takes it back.
        limits: Further ones, by their full names. To name one is to import its module.
    """
    patch.setattr(cache, "_PATIENCE_SECONDS", PATIENT_SECONDS)
    patch.setattr(pools, "ACQUIRE_SECONDS", PATIENT_SECONDS)
    for setting in ("lock_timeout", "statement_timeout"):
        patch.setitem(pools._SETTINGS, setting, f"{PATIENT_SECONDS:.0f}s")
    for limit in limits:
        patch.setattr(limit, PATIENT_SECONDS)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        if sys.argv[1] == "memory":
            unhurry(patch, "server.memory.objects._PATIENCE_SECONDS")
            patch.setattr("server.memory.legs.PATIENCE_SECONDS", LEG_SECONDS)
        else:
            unhurry(patch)
        runpy.run_module("server", run_name="__main__", alter_sys=True)
