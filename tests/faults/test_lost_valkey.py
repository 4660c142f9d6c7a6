"""Valkey dies, stays away, and comes back with nothing: only short-term memories go with it."""

import os
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from kimberly.client import Client
from kimberly.memory.v1 import memory_pb2 as pb

from local.mesh import Mesh
from tests.faults.chaos import keeps_for_short
from tests.faults.checker import SLACK_SECONDS
from tests.faults.figures import Figures
from tests.faults.reach import signed_up, until

DEADLINE_SECONDS = 4.0
CALLS = 10

Call = Callable[[], Awaitable[object]]


@asynccontextmanager
async def away(mesh: Mesh) -> AsyncIterator[None]:
    """Kill Valkey, lose all that it kept, and let it not start until the context ends."""
    valkey = mesh.stores.valkey
    pid = mesh.process("valkey").pid
    assert pid is not None
    # Without its access list it does not start, however often the supervisor tries.
    hidden = valkey.acl.with_suffix(".hidden")
    valkey.acl.rename(hidden)
    try:
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(valkey.data / "appendonlydir")
        yield
    finally:
        hidden.rename(valkey.acl)


async def create(client: Client, tier: pb.Tier.ValueType) -> str:
    memory = pb.Memory(content=f"memory {uuid.uuid4().hex}", tier=tier)
    request = pb.CreateMemoryRequest(memory=memory, request_id=uuid.uuid4().hex)
    answer = await client.memory.CreateMemory(request, timeout=DEADLINE_SECONDS)
    return str(answer.memory.id)


async def get(client: Client, memory_id: str) -> str:
    request = pb.GetMemoryRequest(id=memory_id)
    return str((await client.memory.GetMemory(request, timeout=DEADLINE_SECONDS)).memory.id)


async def query(client: Client, *tiers: pb.Tier.ValueType) -> None:
    request = pb.QueryMemoriesRequest(query="memory", tiers=tiers)
    await client.memory.QueryMemories(request, timeout=DEADLINE_SECONDS)


async def code_of(call: Call, figures: Figures) -> str:
    """Return how a call ends; count it if that is after its deadline."""
    started = time.monotonic()
    try:
        await call()
        code = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        code = error.code()
    figures.operations += 1
    figures.overdue += time.monotonic() - started > DEADLINE_SECONDS + SLACK_SECONDS
    return str(code.name)


@pytest.mark.timeout(120)
async def test_lost_valkey_takes_only_the_short_term_with_it(mesh: Mesh, figures: Figures) -> None:
    async with signed_up(mesh, "vera") as user:
        client = user.client
        long = [await create(client, pb.TIER_LONG_TERM) for _ in range(CALLS)]
        short = [await create(client, pb.TIER_SHORT_TERM) for _ in range(CALLS)]

        async with away(mesh):
            during: dict[str, Call] = {
                "create short": lambda: create(client, pb.TIER_SHORT_TERM),
                "get short": lambda: get(client, short[0]),
                "query short": lambda: query(client, pb.TIER_SHORT_TERM),
                "list all": lambda: client.memory.ListMemories(
                    pb.ListMemoriesRequest(), timeout=DEADLINE_SECONDS
                ),
                "create long": lambda: create(client, pb.TIER_LONG_TERM),
                "get long": lambda: get(client, long[0]),
                "query long": lambda: query(client, pb.TIER_LONG_TERM),
                # It says that short-term memories are missing, and answers from the rest.
                "query all, the long": lambda: query(client),
            }
            answers = {
                name: {await code_of(call, figures) for _ in range(CALLS)}
                for name, call in during.items()
            }
        back_at = time.monotonic()
        await until(lambda: keeps_for_short(client), 30)
        figures.inject("SIGKILL valkey, AOF removed", service_seconds=time.monotonic() - back_at)

        assert answers == {
            name: {"OK" if name.endswith("long") else "UNAVAILABLE"} for name in during
        }
        assert figures.overdue == 0
        assert [await get(client, memory_id) for memory_id in long] == long
        figures.memories += len(long)
        lost = {await code_of(lambda kept=kept: get(client, kept), figures) for kept in short}  # type: ignore[misc]
        assert lost == {"NOT_FOUND"}, "the short term survived: its loss was not real"
