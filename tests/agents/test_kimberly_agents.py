"""`kimberly agents`: from registering one to its end, at the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2_grpc as rpc
from kimberly.jobs.v1 import jobs_pb2_grpc as jobs_rpc

from server import ids
from server.agents.service import AgentService
from server.agents.store import AgentStore
from server.agents.task_store import TaskStore
from server.auth.agent_keys import AgentKeys
from server.database import Database, SystemDatabase
from server.jobs.model import Completed, Failed
from server.jobs.queue import Queue
from server.jobs.schedule_store import ScheduleStore
from server.jobs.service import JobService
from server.jobs.store import JobStore
from server.jobs.watching import JobFeed
from server.processes.kinds import KINDS
from tests.agents.conftest import Desk
from tests.commands import Command, Ended, command_of, token_of
from tests.conftest import Serve

SUMMARY = f'{{"memory_id": "mem_{"0" * 32}", "turns": 9, "sentences": 2}}'


@pytest_asyncio.fixture
async def kimberly(
    serve: Serve, database: Database, system_database: SystemDatabase, tmp_path: Path
) -> AsyncIterator[Command]:
    store = JobStore(database, system_database, KINDS)
    feed = JobFeed(store, session_seconds=30, poll_seconds=0.01)
    agents = AgentService(
        AgentStore(system_database, AgentKeys()), TaskStore(database), store.cancel
    )
    jobs = JobService(store, feed, ScheduleStore(database, system_database, KINDS), KINDS)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_AgentServiceServicer_to_server(agents, server)
        jobs_rpc.add_JobServiceServicer_to_server(jobs, server)

    running = asyncio.create_task(feed.run())
    yield await command_of(serve, tmp_path, register)
    running.cancel()
    await asyncio.wait([running])


def lines(ended: Ended) -> list[dict[str, object]]:
    assert ended.status == 0, ended.error
    return [json.loads(line) for line in ended.output.splitlines()]


async def test_an_agent_is_registered_given_a_task_watched_and_ended(
    kimberly: Command, desk: Desk, system_database: SystemDatabase
) -> None:
    me, queue = token_of(desk.user), Queue(system_database, 30)
    made = await kimberly("agents", "register", "the tidy one", token=me)
    assert made.status == 0, made.error
    assert await desk.token(made.output.strip())
    (agent,) = lines(await kimberly("agents", "list", "--json", token=me))
    agent_id = str(agent["id"])
    assert agent_id in made.error
    run = ("agents", "run", agent_id, "--session", "a talk")
    for outcome, status, told in (
        (Completed, 0, "mem_"),
        (Failed, 1, "dead"),
    ):
        asked = asyncio.create_task(kimberly(*run, "--watch", token=me))
        async with asyncio.timeout(60):
            while not (leases := await queue.lease("w", ["agents.summarize_session"], 1)):
                pass
        for attempt in range(3 if outcome is Failed else 1):
            await queue.settle("w", [outcome(leases[0].held, SUMMARY)])
            if outcome is Failed and attempt < 2:
                await at_once(system_database)
                leases = await queue.lease("w", ["agents.summarize_session"], 1)
        ended = await asked
        assert ended.status == status, ended.error
        assert told in ended.output
    waiting = (await kimberly(*run, token=me)).output.strip()
    listed = lines(await kimberly("agents", "tasks", agent_id, "--json", token=me))
    assert [task["state"] for task in listed] == [
        *("JOB_STATE_WAITING", "JOB_STATE_DEAD", "JOB_STATE_SUCCEEDED"),
    ]
    assert (await kimberly("agents", "cancel", waiting, token=me)).status == 0
    rotated = await kimberly("agents", "rotate-key", agent_id, token=me)
    assert await desk.token(rotated.output.strip())
    for verb, state in (("disable", "disabled"), ("enable", "enabled")):
        assert state in (await kimberly("agents", verb, agent_id, token=me)).output
    assert (await kimberly("agents", "delete", agent_id, token=me)).status == 0
    assert lines(await kimberly("agents", "list", "--json", token=me)) == []


async def at_once(system_database: SystemDatabase) -> None:
    """Let what waits for another attempt be due."""
    async with system_database.transaction() as connection:
        await connection.execute("UPDATE jobs SET run_at = now(), due = true WHERE NOT due")


async def test_what_cannot_be_told_ends_with_two(kimberly: Command, desk: Desk) -> None:
    me, nobody = token_of(desk.user), ids.show(ids.AGENT, ids.new_id())
    for arguments in (
        ("agents", "run", nobody, "--session", "a talk"),
        ("agents", "tasks", nobody),
        ("agents", "disable", nobody),
        ("agents", "watch", ids.show(ids.JOB, ids.new_id())),
        ("agents", "register", "one", "--kind", "god"),
        ("agents", "register", "one", "--scope", "user"),
    ):
        ended = await kimberly(*arguments, token=me)
        assert (ended.status, ended.output) == (2, ""), arguments
        assert "Traceback" not in ended.error
