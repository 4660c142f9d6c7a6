"""Erases a user to the end, in a process that is killed: `python -m tests.privacy.victim`.

It is told what it needs as JSON, on its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from uuid import UUID

from server.blobs import Blobs
from server.cache import open_cache
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase, open_pool
from server.kms.local import LocalKms
from server.memory.objects import Kind
from server.privacy.erasing import Eraser
from server.privacy.erasure_store import ErasureStore
from tests.crashes import faults
from tests.crashes.faults import POINTS, Fault
from tests.privacy.conftest import HURRIED


async def main(told: dict[str, str]) -> None:
    """Erase."""
    fault = json.loads(told["fault"])
    POINTS.arm(
        Fault(faults.Kind(fault["kind"]), fault["point"], fault["number"]) if fault else None
    )
    system = SystemDatabase(await open_pool(told["system_url"], size=2, name="erasing"))
    # What ends in -system has no crash points: this one is for keys, and commits nothing here.
    database = Database(await open_pool(told["url"], size=1, name="none-system"))
    blobs = Blobs.open(
        endpoint=told["s3_endpoint"],
        access_key=told["s3_access_key"],
        secret_key=told["s3_secret_key"],
        region="us-east-1",
        secure=False,
        bucket=told["s3_bucket"],
    )
    eraser = Eraser(
        system,
        ErasureStore(system, HURRIED),
        DataKeys(database, LocalKms(Path(told["master_key"]))),
        blobs,
        open_cache(told["redis_url"]),
        object_kinds=tuple(Kind),
    )
    caller = Caller(UUID(told["tenant_id"]), UUID(told["user_id"]))
    while not (await eraser.erase(caller, 1000)).is_done:
        pass


if __name__ == "__main__":
    faults.watch_stores()
    asyncio.run(main(json.loads(sys.stdin.read())))
