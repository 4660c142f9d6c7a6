"""`python -m tests.unhurried`: the server, and nobody is refused because a machine is busy.

Services in the process of a test are as patient: `tests/conftest.py`.
"""

from __future__ import annotations

import runpy
from typing import Final

import pytest

from server import cache
from server import database as pools
from server.jobs import queue
from server.kms import vault
from server.memory import legs, objects
from server.users import checkpoint_archive

PATIENT_SECONDS: Final = 30.0
"""Longer than a machine that runs the tests stands still."""
LEG_SECONDS: Final = 5.0
"""So long does a query of a mesh wait for a part of its answer: some test waits for all of it."""


def unhurry(patch: pytest.MonkeyPatch) -> None:
    """Have services wait for their stores as long as a busy machine may take."""
    for module, limit in (
        (cache, "_PATIENCE_SECONDS"),
        (pools, "ACQUIRE_SECONDS"),
        (queue, "ACQUIRE_SECONDS"),
        (objects, "_PATIENCE_SECONDS"),
        (checkpoint_archive, "_READ_SECONDS"),
        (vault, "_TRY_SECONDS"),
        (vault, "_ALL_TRIES_SECONDS"),
    ):
        patch.setattr(module, limit, PATIENT_SECONDS)
    for setting in ("lock_timeout", "statement_timeout"):
        patch.setitem(pools._SETTINGS, setting, f"{PATIENT_SECONDS:.0f}s")


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        unhurry(patch)
        patch.setattr(legs, "PATIENCE_SECONDS", LEG_SECONDS)
        runpy.run_module("server", run_name="__main__", alter_sys=True)
