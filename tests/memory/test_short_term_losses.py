"""What Redis may lose, and what goes with it: only short-term memories, and never half of one.

On a Valkey of its own: the others would miss what these tests take away.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import grpc
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb
from redis.asyncio import Redis as Client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from local.ports import open_ports
from local.processes import Process, supervise
from local.servers import STAGE, Valkey
from server.cache import Redis, open_cache
from server.caller import Caller
from server.database import Database
from tests.conftest import bearer
from tests.deciding import write_decision
from tests.memory.calls import Stub, change, create, keep, listed, short_term_used
from tests.memory.meanings import of, upload
from tests.refusals import Refusal, refusal_of

SHORT, LONG = pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM


@dataclass(frozen=True, slots=True)
class Doomed:
    """A Valkey that a test may hurt."""

    valkey: Valkey
    process: Process
    operator: Client
    """May do what services may not."""

    async def kill(self) -> None:
        """Kill it, and return when that is known."""
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while self.process.pid == pid:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture(scope="module")
async def doomed() -> AsyncIterator[Doomed]:
    directory = Path(mkdtemp(prefix="kimberly-"))
    password = secrets.token_hex(16)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        ports = stack.enter_context(open_ports(directory / "ports.json"))
        valkey = Valkey(
            data=directory / "data",
            port=ports.claim("valkey"),
            socket=directory / "valkey.sock",
            acl=directory / "valkey.acl",
            log=directory / "valkey.log",
            password=password,
            durable=True,
        )
        valkey.prepare()
        with valkey.acl.open("a") as acl:
            acl.write(f"user operator on >{password} ~* +@all\n")
        supervisor = await stack.enter_async_context(supervise(directory / "processes.json"))
        process = supervisor.start(valkey.program(), stage=STAGE)
        await process.wait_ready()
        operator = Client(
            unix_socket_path=str(valkey.socket),
            username="operator",
            password=password,
            retry=Retry(NoBackoff(), 0),
        )
        stack.push_async_callback(operator.aclose)
        yield Doomed(valkey, process, operator)


@pytest_asyncio.fixture
async def redis(doomed: Doomed) -> AsyncIterator[Redis]:
    """In place of the one that all other tests use."""
    await doomed.process.wait_ready()
    client = open_cache(doomed.valkey.url)
    yield client
    await client.aclose()


async def say(memories: Stub, caller: Caller, *said: str, request_id: str = "") -> list[pb.Memory]:
    turns = [pb.SessionTurn(content=text) for text in said]
    request = pb.AppendToSessionRequest(session_id="s", turns=turns, request_id=request_id)
    return list((await memories.AppendToSession(request, metadata=bearer(caller))).memories)


async def end(memories: Stub, caller: Caller) -> pb.EndSessionResponse:
    request = pb.EndSessionRequest(session_id="s", keep=pb.SESSION_KEEP_ALL)
    return await memories.EndSession(request, metadata=bearer(caller))


async def found(memories: Stub, caller: Caller, *tiers: pb.Tier.ValueType) -> list[str]:
    request = pb.QueryMemoriesRequest(query="kiwi", tiers=tiers)
    answer = await memories.QueryMemories(request, metadata=bearer(caller))
    return sorted(match.memory.content for match in answer.matches)


async def fsynced(doomed: Doomed) -> None:
    """Return when what was written so far outlives a crash."""
    operator: Any = doomed.operator
    (here, _) = await operator.execute_command("WAITAOF", 1, 0, 60_000)
    assert here == 1


# --- it crashes


async def test_what_is_a_second_old_outlives_a_crash(
    memories: Stub, caller: Caller, doomed: Doomed
) -> None:
    memory = await keep(memories, caller, "kiwi", tags=["a"])
    await change(memories, caller, memory, content="kiwis")
    turns = await say(memories, caller, "one", "two")
    before = await listed(memories, caller), await short_term_used(memories, caller)
    await fsynced(doomed)
    await doomed.kill()
    await doomed.process.wait_ready()
    assert (await listed(memories, caller), await short_term_used(memories, caller)) == before
    assert await found(memories, caller) == ["kiwis"]
    told = await memories.ListMemoryVersions(
        pb.ListMemoryVersionsRequest(id=memory.id), metadata=bearer(caller)
    )
    assert [was.content for was in told.versions] == ["kiwis", "kiwi"]
    (third,) = await say(memories, caller, "three")
    assert [turn.session_position for turn in (*turns, third)] == [0, 1, 2]


async def test_crash_in_the_middle_of_an_end_leaves_nothing_twice_and_nothing_out(
    memories: Stub, caller: Caller, doomed: Doomed, database: Database
) -> None:
    """Postgres has committed the turns; Redis dies before their copies go."""
    await say(memories, caller, "one", "two", "three")
    await fsynced(doomed)
    async with database.transaction(caller) as connection:
        # The end waits for this transaction, and meets no Redis when it may go on.
        await connection.execute("LOCK TABLE ended_sessions IN EXCLUSIVE MODE")
        ending = await started(end(memories, caller), connection)
        await doomed.kill()
    await settled(ending)
    await doomed.process.wait_ready()
    answer = await end(memories, caller)
    assert (answer.promoted, answer.dropped) == (3, 0)
    assert await listed(memories, caller) == [("three", LONG), ("two", LONG), ("one", LONG)]
    assert await short_term_used(memories, caller) == (0, 0)


async def started(call: Awaitable[Any], connection: Any) -> Any:
    """Start a call and return when it waits for a lock."""
    task = asyncio.ensure_future(call)
    async with asyncio.timeout(30):
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await connection.execute("SELECT pg_sleep(0.01)")
    return task


async def settled(call: Awaitable[Any]) -> None:
    """Wait for a call that may fail for want of Redis."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - it may also succeed


# --- it forgets


async def test_flushall_takes_only_the_short_term(
    memories: Stub, caller: Caller, doomed: Doomed
) -> None:
    await create(memories, caller, "kiwi jam")
    moved = await keep(memories, caller, "kiwi pie")
    await change(memories, caller, moved, tier=pb.TIER_PERMANENT)
    await say(memories, caller, "kiwi one", "kiwi two")
    await end(memories, caller)
    lost = await keep(memories, caller, "kiwi")
    await say(memories, caller, "kiwi three", request_id="r")
    durable = ["kiwi jam", "kiwi one", "kiwi pie", "kiwi two"]
    assert len(await found(memories, caller)) == 6
    await doomed.operator.flushall()
    assert await found(memories, caller) == durable
    assert sorted(content for content, _ in await listed(memories, caller)) == durable
    assert await short_term_used(memories, caller) == (0, 0)
    gone = memories.GetMemory(pb.GetMemoryRequest(id=lost.id), metadata=bearer(caller))
    assert (await refusal_of(gone)).code is grpc.StatusCode.NOT_FOUND
    # A retry does not pretend that what it made is there.
    refused = await refusal_of(say(memories, caller, "kiwi three", request_id="r"))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    (turn,) = await say(memories, caller, "kiwi four")
    assert turn.session_position == 2
    assert len(await found(memories, caller)) == 5


# --- it is full


async def test_full_store_refuses_whole_writes_and_lets_go_of_what_is_deleted(
    memories: Stub, caller: Caller, doomed: Doomed
) -> None:
    memory = await keep(memories, caller, "kiwi")
    await say(memories, caller, "kiwi one", "kiwi two")
    before = await listed(memories, caller), await short_term_used(memories, caller)
    keys = await state(doomed)
    await doomed.operator.config_set("maxmemory", 1)
    try:
        for call in (
            keep(memories, caller, "kiwi jam"),
            keep(memories, caller, "kiwi"),
            change(memories, caller, memory, content="kiwi pie"),
            say(memories, caller, "kiwi three", "kiwi four"),
            memories.GiveFeedback(
                pb.GiveFeedbackRequest(id=memory.id, useful=True), metadata=bearer(caller)
            ),
        ):
            assert_unavailable(await refusal_of(call))
        assert await state(doomed) == keys
        assert (await listed(memories, caller), await short_term_used(memories, caller)) == before
        assert len(await found(memories, caller)) == 3
        await create(memories, caller, "kiwi tea")
        request = pb.DeleteMemoryRequest(id=memory.id)
        await memories.DeleteMemory(request, metadata=bearer(caller))
        assert (await end(memories, caller)).promoted == 2
        assert await short_term_used(memories, caller) == (0, 0)
    finally:
        await doomed.operator.config_set("maxmemory", "256mb")
    assert (await keep(memories, caller, "kiwi")).tier == SHORT


async def state(doomed: Doomed) -> dict[bytes, bytes | None]:
    """Return all that Redis holds, apart from answers, which go by themselves."""
    names = [name async for name in doomed.operator.scan_iter("*") if b":answers" not in name]
    return {name: await doomed.operator.dump(name) for name in names}


def assert_unavailable(refused: Refusal) -> None:
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "STORE_UNAVAILABLE",
    )


# --- it is away


async def test_without_redis_durable_memories_are_written_read_found_and_listed(
    memories: Stub, caller: Caller, doomed: Doomed, database: Database
) -> None:
    short = await keep(memories, caller, "kiwi")
    durable = await create(memories, caller, "kiwi jam")
    hidden = doomed.valkey.acl.with_suffix(".hidden")
    # Without its access list it does not start, however often the supervisor tries.
    doomed.valkey.acl.rename(hidden)
    try:
        await doomed.kill()
        await create(memories, caller, "kiwi tea")
        await change(memories, caller, durable, content="kiwi pie")
        got = await memories.GetMemory(pb.GetMemoryRequest(id=durable.id), metadata=bearer(caller))
        assert got.memory.content == "kiwi pie"
        assert await found(memories, caller, LONG) == ["kiwi pie", "kiwi tea"]
        everything = pb.QueryMemoriesRequest(query="kiwi")
        answer = await memories.QueryMemories(everything, metadata=bearer(caller))
        assert answer.short_term_late
        assert len(answer.matches) == 2
        assert await listed(memories, caller, tier=LONG) == [("kiwi tea", LONG), ("kiwi pie", LONG)]
        for call in (
            keep(memories, caller, "kiwi two"),
            change(memories, caller, short, content="kiwi two"),
            change(memories, caller, short, tier=LONG),
            memories.GetMemory(pb.GetMemoryRequest(id=short.id), metadata=bearer(caller)),
            say(memories, caller, "kiwi one"),
            end(memories, caller),
            found(memories, caller, SHORT),
            listed(memories, caller),
            short_term_used(memories, caller),
        ):
            assert_unavailable(await refusal_of(call))
    finally:
        hidden.rename(doomed.valkey.acl)
    await doomed.process.wait_ready()
    assert (await keep(memories, caller, "kiwi again")).tier == SHORT
    answer = await memories.QueryMemories(everything, metadata=bearer(caller))
    assert not answer.short_term_late
    assert "kiwi again" in {match.memory.content for match in answer.matches}


@pytest.mark.parametrize("patience_seconds", [4.0])
async def test_redis_that_hangs_leaves_the_other_legs_their_time(
    memories: Stub, caller: Caller, doomed: Doomed, database: Database
) -> None:
    await write_decision(database, caller, "memory.embed", granted=True)
    await upload(memories, caller, of(await create(memories, caller, "kiwi jam"), (1, 0)))
    await keep(memories, caller, "kiwi")
    pid = doomed.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        # An answer that is kept is looked for first, and that takes as long as it may.
        request = pb.QueryMemoriesRequest(
            query="kiwi", embedding=pb.QueryEmbedding(model="tiny", values=[1, 0])
        )
        answer = await memories.QueryMemories(request, metadata=bearer(caller))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (answer.short_term_late, answer.semantic_late) == (True, False)
    assert [(match.memory.content, match.semantic) for match in answer.matches] == [("kiwi jam", 1)]
