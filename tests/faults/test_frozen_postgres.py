"""PostgreSQL that neither answers nor hangs up: nobody waits for it longer than they said."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import grpc
import pytest
from kimberly.auth.v1 import auth_pb2
from kimberly.client import Client
from kimberly.jobs.v1 import jobs_pb2
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2

from local.mesh import Mesh
from tests.faults.chaos import family, stores
from tests.faults.checker import SLACK_SECONDS
from tests.faults.driver import Driver
from tests.faults.figures import Figures
from tests.faults.history import History
from tests.faults.reach import signed_up, until
from tests.faults.test_kills import judged

FROZEN_SECONDS = 5.0
DEADLINE_SECONDS = 2.0
HEALTHY_SECONDS = 5.0
STORED_BEFORE = 20


@asynccontextmanager
async def frozen(mesh: Mesh) -> AsyncIterator[None]:
    """Stop all processes of PostgreSQL until the context ends."""
    postmaster = mesh.process("postgres").pid
    assert postmaster is not None
    # The postmaster first: it starts no more backends then.
    os.kill(postmaster, signal.SIGSTOP)
    processes = family(postmaster)
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def calls_on(client: Client) -> list[Awaitable[object]]:
    """Return calls of every service that need PostgreSQL, each with a deadline."""
    limit = DEADLINE_SECONDS
    memory = pb.Memory(content="cold")
    return [
        client.auth.LogIn(auth_pb2.LogInRequest(email="a@b.example", password="p"), timeout=limit),
        client.users.GetUser(users_pb2.GetUserRequest(), timeout=limit),
        client.users.VerifyAuditLog(users_pb2.VerifyAuditLogRequest(), timeout=limit),
        client.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=limit),
        client.memory.ListMemories(pb.ListMemoriesRequest(), timeout=limit),
        client.memory.Meditate(pb.MeditateRequest(), timeout=limit),
        # More than there are connections.
        *(
            client.memory.CreateMemory(pb.CreateMemoryRequest(memory=memory), timeout=limit)
            for _ in range(40)
        ),
    ]


async def ending(call: Awaitable[object]) -> tuple[str, float]:
    """Return how a call ended, and after how many seconds."""
    started = time.monotonic()
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, time.monotonic() - started
    return "OK", time.monotonic() - started


@pytest.mark.timeout(120)
async def test_every_call_ends_by_its_deadline_while_postgres_is_frozen(
    mesh: Mesh, figures: Figures
) -> None:
    history = History()
    async with signed_up(mesh, "cold") as user, signed_up(mesh, "other") as other:
        driver = Driver([user], history, random.Random(figures.seed))

        async def serves() -> bool:
            return await stores(other.client)

        async def is_under_way() -> bool:
            return len(user.stored) >= STORED_BEFORE

        async with driver.driving():
            await until(is_under_way, 30)
            async with frozen(mesh), asyncio.TaskGroup() as group:
                calls = [group.create_task(ending(call)) for call in calls_on(other.client)]
                await asyncio.sleep(FROZEN_SECONDS)
            thawed_at = time.monotonic()
            await until(serves, HEALTHY_SECONDS)
            healthy_seconds = time.monotonic() - thawed_at
        figures.inject("SIGSTOP postgres for 5 s", service_seconds=healthy_seconds)
        during = [op for op in history.ops if thawed_at - FROZEN_SECONDS < op.end < thawed_at]
        assert any(op.code != "OK" for op in during), "the freeze was not felt"
        codes = {code for code, _ in (call.result() for call in calls)}
        late = [
            seconds
            for _, seconds in (call.result() for call in calls)
            if seconds > DEADLINE_SECONDS + SLACK_SECONDS
        ]
        figures.operations += len(calls)
        figures.overdue += len(late)
        assert codes <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
        assert late == []
        verdict = await judged(mesh, history, [user], figures)
        assert verdict.problems == {}
        assert healthy_seconds <= HEALTHY_SECONDS
