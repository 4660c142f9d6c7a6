"""Killed or cut off around every commit and every write of an erasure: the next goes on."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import asyncpg
import pytest

from local.layout import CHECKOUT
from local.servers import BUCKET, Stores
from server.blobs import Blobs
from server.cache import Redis
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore
from server.privacy.erasures import ErasureState
from tests.conftest import Urls
from tests.crashes.faults import Fault, Kind
from tests.database.rows import three
from tests.privacy.conftest import Everything, task_of
from tests.privacy.test_erasure import TOLD
from workers.erasure import Erasing

DIES = -9


async def run(told: Mapping[str, str], fault: Fault) -> int | None:
    """Run a victim and return how it ended."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.privacy.victim"),
        stdin=PIPE,
        cwd=CHECKOUT,
    )
    await process.communicate(json.dumps({**told, "fault": json.dumps(asdict(fault))}).encode())
    return process.returncode


POINTS = [
    *(("commit", number) for number in (1, 2, 14, 27, 30, 33)),
    *(("s3 delete", number) for number in (1, 8, 12)),
    ("s3 abort", 1),
    ("redis UNLINK", 1),
]
"""What a round changes, and at which pass of it the process dies."""


@pytest.mark.timeout(300)
async def test_whatever_dies_nothing_is_left_in_the_end_and_nothing_else_is_gone(
    stores: Stores,
    urls: Urls,
    master_key: Path,
    blobs: Blobs,
    redis: Redis,
    owner: asyncpg.Connection,
    erasures: ErasureStore,
    archive: ErasureArchive,
    erasing: Erasing,
) -> None:
    await blobs.keep_versions()
    told = {
        "url": urls.application,
        "system_url": urls.system,
        "redis_url": stores.valkey.url,
        "s3_endpoint": stores.s3.endpoint,
        "s3_access_key": stores.s3.access_key,
        "s3_secret_key": stores.s3.secret_key,
        "s3_bucket": BUCKET,
        "master_key": str(master_key),
    }
    faults = [Fault(kind, *at) for at in POINTS for kind in (Kind.KILLED_BEFORE, Kind.KILLED_AFTER)]
    for fault in faults:
        everything = Everything(owner, blobs, redis, three())
        await everything.make()
        mine = everything.mine
        others = everything.colleague, everything.stranger
        had, theirs = await everything.of(mine), [await everything.of(each) for each in others]
        await erasures.begin(mine)
        await archive.archive()
        whom = {"tenant_id": str(mine.tenant_id), "user_id": str(mine.user_id)}
        assert await run({**told, **whom}, fault) == DIES, fault
        await erasing.erase(task_of(mine))
        assert set(await everything.of(mine)) <= TOLD, fault
        assert [await everything.of(each) for each in others] == theirs, fault
        erasure = await erasures.find_of(mine)
        assert erasure
        assert erasure.state is ErasureState.ERASED
        # Rows are counted in the transaction that removes them: each once, whatever died.
        assert erasure.removed["postgres/memories"] == had["memories"], fault
