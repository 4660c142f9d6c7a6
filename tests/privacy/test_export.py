"""Exports: what is in them, whose they are, and how long they stay."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import zipfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
from kimberly.privacy.v1 import privacy_pb2 as pb

from server import ids
from server.blobs import Blobs
from server.caller import Caller
from server.database import SystemDatabase
from server.privacy.dumping import DUMPS, ELSEWHERE, LEFT_OUT
from server.privacy.erasing import erasable_tables
from server.privacy.exports import object_key
from server.privacy.zipping import zip_upload
from tests.conftest import bearer
from tests.privacy.conftest import Everything, Privacy
from tests.refusals import refusal_of
from workers.exporting import Exporting, ExportNotDue
from workers.stream import Task


async def ask(privacy: Privacy, caller: Caller, request_id: str = "") -> pb.Export:
    request = pb.CreateExportRequest(request_id=request_id)
    return (await privacy.CreateExport(request, metadata=bearer(caller))).export


async def get(privacy: Privacy, caller: Caller, export_id: str) -> pb.GetExportResponse:
    return await privacy.GetExport(pb.GetExportRequest(id=export_id), metadata=bearer(caller))


def task_of(caller: Caller, export: pb.Export, kind: str = "user.export") -> Task:
    payload = {
        "tenant_id": ids.show(ids.TENANT, caller.tenant_id),
        "user_id": ids.show(ids.USER, caller.user_id),
        "export_id": export.id,
    }
    return Task(job_id=export.job_id, lease_token=1, kind=kind, payload=payload, attempt=1)


async def download(url: str) -> bytes:
    async with httpx.AsyncClient(trust_env=False) as http:
        return (await http.get(url)).raise_for_status().content


async def unpacked(privacy: Privacy, caller: Caller, export: pb.Export) -> dict[str, bytes]:
    """Download an export, and return its files."""
    told = await get(privacy, caller, export.id)
    data = await download(told.download_url)
    assert len(data) == told.export.size_bytes
    assert hashlib.sha256(data).hexdigest() == told.export.sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


async def test_every_table_is_in_an_export_or_has_a_reason_not_to_be(
    system_database: SystemDatabase,
) -> None:
    async with system_database.transaction() as connection:
        tables = {*await erasable_tables(connection), "audit_events", "erasures"}
    groups: list[Mapping[str, object]] = [DUMPS, ELSEWHERE, LEFT_OUT]
    assert tables == {name for group in groups for name in group}
    assert len(tables) == sum(map(len, groups))


async def test_the_rows_of_a_user_are_there_and_nobody_elses(
    privacy: Privacy, exporting: Exporting, everything: Everything, owner: asyncpg.Connection
) -> None:
    mine = everything.mine
    # Objects of made-up rows there are none: what is gone is an empty file.
    export = await ask(privacy, mine)
    assert export.state == pb.EXPORT_STATE_PENDING
    await exporting.export(task_of(mine, export))
    files = await unpacked(privacy, mine, export)
    for table, dump in DUMPS.items():
        column = dump.owner_column
        count = await owner.fetchval(
            f"SELECT count(*) FROM {table} WHERE {column} = $1", mine.user_id
        )
        # What was done since is not in it.
        least = 1 if table in {"audit_events", "jobs"} else count
        assert least <= len(lines(files[f"{table}.jsonl"])) <= count, table
    manifest = json.loads(files.pop("manifest.json"))
    assert {each["name"] for each in manifest["files"]} == files.keys()
    for each in manifest["files"]:
        data = files[each["name"]]
        assert (each["sizeBytes"], each["sha256"]) == (
            len(data),
            hashlib.sha256(data).hexdigest(),
        )
    everything_written = b"".join(files.values()).decode()
    for other in (everything.colleague, everything.stranger):
        assert other.user_id.hex not in everything_written
        assert str(other.user_id) not in everything_written
    assert "argon2" not in everything_written


async def test_many_rows_are_each_there_once(
    privacy: Privacy, exporting: Exporting, caller: Caller, owner: asyncpg.Connection
) -> None:
    await owner.execute(
        """
        INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource)
        SELECT uuidv7(), $1, $2, 'me', 'some', n::text FROM generate_series(1, 2500) AS n
        """,
        caller.tenant_id,
        caller.user_id,
    )
    export = await ask(privacy, caller)
    await exporting.export(task_of(caller, export))
    events = lines((await unpacked(privacy, caller, export))["audit_events.jsonl"])
    numbers = [event["resource"] for event in events if event["action"] == "some"]
    assert numbers == [str(n) for n in range(1, 2501)]


async def test_what_is_anothers_is_not_there_and_a_url_is_told_to_the_audit_log(
    privacy: Privacy, exporting: Exporting, everything: Everything, owner: asyncpg.Connection
) -> None:
    mine = everything.mine
    export = await ask(privacy, mine)
    for other in (everything.colleague, everything.stranger):
        refusal = await refusal_of(get(privacy, other, export.id))
        assert refusal.code is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError):
            await exporting.export(task_of(other, export))
    await exporting.export(task_of(mine, export))
    count = "SELECT count(*) FROM audit_events WHERE action = 'export.download'"
    before = await owner.fetchval(count)
    assert (await get(privacy, mine, export.id)).download_url
    assert await owner.fetchval(count) == before + 1
    refusal = await refusal_of(get(privacy, everything.colleague, export.id))
    assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_one_is_made_at_a_time_and_five_a_day(
    privacy: Privacy, exporting: Exporting, caller: Caller, owner: asyncpg.Connection
) -> None:
    same = await asyncio.gather(*(ask(privacy, caller) for _ in range(4)))
    assert len({export.id for export in same}) == 1
    first = await ask(privacy, caller, "a request")
    assert first.id == same[0].id
    for number in range(5):
        export = await ask(privacy, caller)
        await exporting.export(task_of(caller, export))
        await owner.execute(
            "UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE state = 'waiting'"
        )
        assert (export.id == first.id) == (number == 0)
    assert (await ask(privacy, caller, "a request")).id == first.id
    refusal = await refusal_of(ask(privacy, caller))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "RATE_LIMITED",
    )


async def test_an_export_whose_job_is_given_up_has_failed_and_another_can_be_asked_for(
    privacy: Privacy, caller: Caller, owner: asyncpg.Connection
) -> None:
    export = await ask(privacy, caller)
    await owner.execute("UPDATE jobs SET state = 'dead', finished_at = now()")
    told = await get(privacy, caller, export.id)
    assert told.export.state == pb.EXPORT_STATE_FAILED
    assert not told.download_url
    assert (await ask(privacy, caller)).id != export.id


async def test_written_twice_the_first_one_stays(
    privacy: Privacy, exporting: Exporting, caller: Caller, blobs: Blobs
) -> None:
    await blobs.keep_versions()
    export = await ask(privacy, caller)
    tasks = [exporting.export(task_of(caller, export)) for _ in range(2)]
    await asyncio.gather(*tasks)
    await exporting.export(task_of(caller, export))
    assert await unpacked(privacy, caller, export)


async def test_an_export_goes_when_its_time_is_over_and_not_before(
    privacy: Privacy,
    exporting: Exporting,
    caller: Caller,
    blobs: Blobs,
    owner: asyncpg.Connection,
) -> None:
    export = await ask(privacy, caller)
    await exporting.export(task_of(caller, export))
    expiry = task_of(caller, export, "exports.expire")
    delay = await owner.fetchval(
        "SELECT run_at - now() FROM jobs WHERE kind = 'exports.expire' AND user_id = $1",
        caller.user_id,
    )
    assert 6.9 < delay.total_seconds() / 86_400 <= 7
    with pytest.raises(ExportNotDue):
        await exporting.expire(expiry)
    url = (await get(privacy, caller, export.id)).download_url
    await owner.execute(
        """
        UPDATE exports
           SET finished_at = finished_at - interval '8 days',
               expires_at = expires_at - interval '8 days'
        """
    )
    refusal = await refusal_of(get(privacy, caller, export.id))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    await exporting.expire(expiry)
    await exporting.expire(expiry)
    with pytest.raises(httpx.HTTPStatusError):
        await download(url)
    key = object_key(caller, ids.parse(ids.EXPORT, export.id, "id"))
    assert not (await blobs.versions(token="", limit=10, prefix=key)).versions


async def test_what_is_larger_than_a_part_is_written_in_parts(blobs: Blobs) -> None:
    chunk = os.urandom(1024 * 1024)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield chunk

    key = f"exports/{ids.new_id().hex}"
    async with zip_upload(blobs, key) as upload:
        most = 0
        async for _ in upload.add("large", chunks()):
            most = max(most, len(upload._sink.waiting))
        archive = await upload.finish()
    # A part, and what was compressed since: nothing grows with the archive.
    assert most < 9 * 1024 * 1024
    assert archive.size_bytes > 20 * len(chunk)
    data = b"".join([each async for each in blobs.chunks(key, archive.version_id)])
    assert hashlib.sha256(data).digest() == archive.sha256
    with zipfile.ZipFile(io.BytesIO(data)) as written:
        assert written.read("large") == chunk * 20


async def test_an_archive_that_fails_leaves_nothing(blobs: Blobs) -> None:
    key = f"exports/{ids.new_id().hex}"

    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise ZeroDivisionError

    async def write() -> None:
        async with zip_upload(blobs, key) as upload:
            async for _ in upload.add("broken", broken()):
                pass

    with pytest.raises(ZeroDivisionError):
        await write()
    assert not await blobs.unfinished(key)
    assert not (await blobs.versions(token="", limit=10, prefix=key)).versions
