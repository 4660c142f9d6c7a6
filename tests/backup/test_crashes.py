"""Backups that end half-way, and two at once."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import signal
import sys
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from server.backup.failures import Busy, Unwanted
from server.backup.repository import PART_BYTES
from server.processes.backups import list_backups
from tests.backup.conftest import Rig, Story
from tests.mesh import eventually

CHECKOUT = Path(__file__).parent.parent.parent


def environment(rig: Rig) -> dict[str, str]:
    """What the command is told, as a pod tells it."""
    told = {
        name: value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
        for name, value in rig.making()
    }
    return {
        "PATH": os.defpath,
        "PYTHONPATH": ".:client",
        **{f"KIMBERLY_{name.upper()}": value for name, value in told.items()},
    }


async def started(rig: Rig) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "server",
        "backup",
        "create",
        cwd=CHECKOUT,
        env=environment(rig),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_a_backup_that_is_killed_is_none_and_the_next_one_clears_it_away(
    rig: Rig, story: Story, owner: asyncpg.Connection
) -> None:
    # Bytes that nothing makes smaller: a dump of two parts.
    await owner.execute("CREATE TABLE large AS SELECT 0 AS number, ''::bytea AS bytes LIMIT 0")
    try:
        for number in range(2):
            await owner.execute(
                "INSERT INTO large VALUES ($1, $2)", number, secrets.token_bytes(PART_BYTES // 2)
            )
        process = await started(rig)

        async def parts() -> list[str]:
            return [key for key in await rig.blobs.list_keys("backups/") if "/database/" in key]

        await eventually(parts, bool, seconds=60)
        process.send_signal(signal.SIGKILL)
        await process.communicate()
        assert await list_backups(rig.listing()) == []
        left = await rig.blobs.list_keys("backups/")
        assert left

        backup = await rig.create()
        assert [each.id for each in await list_backups(rig.listing())] == [backup]
        keys = await rig.blobs.list_keys("backups/")
        assert {key.split("/")[1] for key in keys} == {backup}
        assert len([key for key in keys if "/database/" in key]) == 2
        runs = await owner.fetch("SELECT outcome FROM backup_runs ORDER BY id")
        assert [run["outcome"] for run in runs] == ["lost", "succeeded"]
        jobs = await owner.fetch("SELECT state FROM jobs WHERE kind = 'backup.create' ORDER BY id")
        assert [job["state"] for job in jobs] == ["dead", "succeeded"]
        assert (await rig.verify())["problems"] == []
    finally:
        await owner.execute("DROP TABLE large")


async def test_of_two_at_once_one_is_told_so(rig: Rig, story: Story) -> None:
    results = await asyncio.gather(rig.create(), rig.create(), return_exceptions=True)
    assert [type(each) for each in results if not isinstance(each, str)] == [Busy]
    assert len(await list_backups(rig.listing())) == 1


async def test_the_next_backup_copies_only_what_is_new(rig: Rig, story: Story) -> None:
    first = await rig.create()
    objects = await rig.blobs.list_keys("objects/")
    await story.remember(story.mine, "one more")
    second = await rig.create()
    assert len(await rig.blobs.list_keys("objects/")) == len(objects) + 1
    manifests = [(await rig.repository.manifest(name))[0] for name in (first, second)]
    assert [each.objects for each in manifests] == [15, 16]


async def test_what_no_backup_names_any_more_is_removed(
    rig: Rig, story: Story, owner: asyncpg.Connection
) -> None:
    old = await rig.create()
    key = min(story.objects)
    await story.blobs.erase(key)
    await owner.execute("DELETE FROM attachments WHERE id = $1::text::uuid", key.rsplit("/", 1)[1])
    await rig.create()
    assert len(await rig.blobs.list_keys("objects/")) == 15
    # A year later, for the first of them.
    manifest, _ = await rig.repository.manifest(old)
    long_ago = dataclasses.replace(manifest, mark=manifest.mark - timedelta(days=365))
    await rig.repository.commit(long_ago, rig.signer)
    await rig.create()
    assert old not in [each.id for each in await list_backups(rig.listing())]
    assert not [key for key in await rig.blobs.list_keys("backups/") if old in key]
    assert len(await rig.blobs.list_keys("objects/")) == 14
    assert (await rig.verify())["problems"] == []


async def test_a_backup_that_somebody_cancels_stops(
    rig: Rig, story: Story, owner: asyncpg.Connection
) -> None:
    await owner.execute("CREATE TABLE large AS SELECT 0 AS number, ''::bytea AS bytes LIMIT 0")
    await owner.execute("BEGIN; LOCK TABLE large IN ACCESS EXCLUSIVE MODE")
    try:
        running = asyncio.create_task(rig.create())
        second = await asyncpg.connect(rig.stores.dsn("postgres", "test"))

        async def cancelled() -> int | None:
            found: int | None = await second.fetchval(
                "UPDATE jobs SET cancelled_at = now()"
                " WHERE kind = 'backup.create' AND state = 'running' RETURNING 1"
            )
            return found

        await eventually(cancelled, bool)
        with pytest.raises(Unwanted):
            await running
        assert await second.fetchval("SELECT state FROM jobs WHERE kind = 'backup.create'") == (
            "cancelled"
        )
        await second.close()
    finally:
        await owner.execute("ROLLBACK; DROP TABLE IF EXISTS large")
    assert await list_backups(rig.listing()) == []
