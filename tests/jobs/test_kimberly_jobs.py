"""`kimberly jobs`: what users see of their jobs at the command line, and do with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest_asyncio
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.enqueue import enqueue
from server.jobs.model import Beat, Completed, Failed
from server.jobs.queue import Queue
from server.jobs.schedule_store import ScheduleStore
from server.jobs.service import JobService
from server.jobs.store import JobStore
from server.jobs.watching import JobFeed
from server.processes.kinds import KINDS
from tests.commands import Command, Ended, command_of, token_of
from tests.conftest import Serve, new_caller


@pytest_asyncio.fixture
async def kimberly(
    serve: Serve, database: Database, system_database: SystemDatabase, tmp_path: Path
) -> AsyncIterator[Command]:
    """The command against a service whose watches end soon, so that it must open others."""
    store = JobStore(database, system_database, KINDS)
    feed = JobFeed(store, session_seconds=0.5, poll_seconds=0.01)
    service = JobService(store, feed, ScheduleStore(database, system_database, KINDS), KINDS)
    running = asyncio.create_task(feed.run())
    yield await command_of(
        serve, tmp_path, lambda server: rpc.add_JobServiceServicer_to_server(service, server)
    )
    running.cancel()
    await asyncio.wait([running])


async def make(database: Database, caller: Caller) -> str:
    async with database.transaction(caller) as connection:
        job_id = await enqueue(connection, kind="test", payload={}, caller=caller, max_attempts=1)
    return ids.show(ids.JOB, job_id)


def shown(ended: Ended) -> list[dict[str, object]]:
    assert ended.status == 0, ended.error
    return [json.loads(line) for line in ended.output.splitlines()]


async def test_jobs_are_listed_by_state_and_one_is_shown_with_its_error(
    kimberly: Command, database: Database, caller: Caller, queue: Queue
) -> None:
    me = token_of(caller)
    job_ids = [await make(database, caller) for _ in range(3)]
    (lease,) = await queue.lease("w", ["test"], 1)
    await queue.settle("w", [Failed(lease.held, "no [luck]")])
    dead = ids.show(ids.JOB, lease.held.job_id)
    listed = shown(await kimberly("jobs", "list", "--json", token=me))
    assert [job["id"] for job in listed] == job_ids[::-1]
    listed = shown(await kimberly("jobs", "list", "--state", "dead", "--json", token=me))
    assert [job["id"] for job in listed] == [dead]
    table = await kimberly("jobs", "list", token=me)
    assert all(job_id in table.output for job_id in job_ids)
    one = await kimberly("jobs", "show", dead, token=me)
    assert one.status == 0
    for told in ("dead", "no [luck]", "1 of 1"):
        assert told in one.output


async def test_dead_job_is_retried_and_a_waiting_one_cancelled(
    kimberly: Command, database: Database, caller: Caller, queue: Queue
) -> None:
    me, job_id = token_of(caller), await make(database, caller)
    (lease,) = await queue.lease("w", ["test"], 1)
    await queue.settle("w", [Failed(lease.held, "no luck")])
    retried = await kimberly("jobs", "retry", job_id, token=me)
    assert retried.status == 0
    assert "waiting" in retried.output
    cancelled = await kimberly("jobs", "cancel", job_id, token=me)
    assert cancelled.status == 0
    assert "cancelled" in cancelled.output


async def test_job_is_asked_for_and_told_what_it_is_to_know(
    kimberly: Command, caller: Caller, owner: asyncpg.Connection
) -> None:
    me = token_of(caller)
    told = ("--payload", '{"dry_run": true}')
    asked = await kimberly("jobs", "ask", "meditation.run", *told, token=me)
    assert asked.status == 0, asked.error
    assert "waiting" in asked.output
    assert await owner.fetchval("SELECT dry_run FROM meditations") is True
    refused = await kimberly("jobs", "ask", "user.export", *told, token=me)
    assert (refused.status, "payload_json.dry_run" in refused.error) == (2, True)


async def test_watch_ends_as_the_job_does_however_many_streams_that_takes(
    kimberly: Command, database: Database, caller: Caller, queue: Queue
) -> None:
    me = token_of(caller)
    for outcome, status in ((Completed, 0), (Failed, 1)):
        job_id = await make(database, caller)
        (lease,) = await queue.lease("w", ["test"], 1)
        watching = asyncio.create_task(kimberly("jobs", "watch", job_id, token=me))
        for progress in (0.25, 0.5, 0.75):
            await asyncio.sleep(0.4)
            await queue.extend("w", [Beat(lease.held, progress)])
        assert not watching.done()
        await queue.settle("w", [outcome(lease.held, '{"n": 7}')])
        ended = await watching
        assert ended.status == status, ended.error
        assert '{"n": 7}' in ended.output


async def test_what_cannot_be_told_ends_with_two(
    kimberly: Command, database: Database, caller: Caller
) -> None:
    job_id = await make(database, caller)
    stranger = token_of(await new_caller(database))
    for arguments in (
        *(("jobs", verb, job_id) for verb in ("show", "watch", "retry", "cancel")),
        ("jobs", "show", "nonsense"),
        ("jobs", "list", "--state", "asleep"),
    ):
        ended = await kimberly(*arguments, token=stranger)
        assert (ended.status, ended.output) == (2, ""), arguments
        assert "Traceback" not in ended.error
