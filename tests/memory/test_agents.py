"""Agents and memories: what the user allows, no longer than that, and all of it told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any, Final

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.access import SCOPES, Scope
from server.cache import Redis
from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.errors import ConsentMissing
from server.memory.answers import Answers
from tests.abuse.meanings import FIELDS, METHODS, Means, put, request_of
from tests.acting import EVERYTHING, READ_WRITE, let_agents, new_agent
from tests.conftest import Urls, bearer, new_caller
from tests.deciding import write_decision
from tests.memory.calls import Stub, create, values_in
from tests.refusals import refusal_of

SERVICE: Final = "/kimberly.memory.v1.MemoryService/"
OPEN: Final = sorted(method.removeprefix(SERVICE) for method in SCOPES if SERVICE in method)
"""The methods that agents may call, given the scope."""
SECRET: Final = "the diagnosis"


@pytest_asyncio.fixture
async def user(database: Database) -> Caller:
    """A user who lets agents act."""
    user = await new_caller(database)
    await let_agents(database, user, granted=True)
    return user


@pytest_asyncio.fixture
async def agent(system_database: SystemDatabase, user: Caller) -> Caller:
    return await new_agent(system_database, user)


def by(agent: Caller, scope: str = READ_WRITE) -> Any:
    return bearer(agent, scope=scope)


async def events_of(owner: asyncpg.Connection, agent: Caller) -> list[tuple[str, str]]:
    rows = await owner.fetch(
        "SELECT action, resource FROM audit_events WHERE actor = $1 ORDER BY id", agent.actor
    )
    return [tuple(row) for row in rows]


def filled(method: str) -> Any:
    """Return a request with nothing wrong but that there is no such thing."""
    request: Any = request_of(METHODS[method])
    for path, meaning in FIELDS.get(method, {}).items():
        if isinstance(meaning.value, str) and len(meaning.value) == 3:
            put(request, path, ids.show(meaning.value, ids.new_id()))
        elif meaning in {Means.SESSION, Means.TRANSCRIPT, Means.IMPORT, Means.FILTER}:
            put(request, path, "a name")
    return request


def calling(memories: Any, method: str, metadata: Any) -> Callable[[], Awaitable[object]]:
    """Return how to call a method of any kind, to its first answer."""

    async def call() -> object:
        contract, request = METHODS[method], filled(method)

        async def requests() -> Any:
            yield request

        given = requests() if contract.client_streaming else request
        answer = getattr(memories, method)(given, metadata=metadata, timeout=10)
        if contract.server_streaming:
            return await anext(aiter(answer))
        return await answer

    return call


@pytest.mark.parametrize("method", OPEN)
async def test_without_the_consent_no_method_does_anything_for_an_agent(
    memories: Any, database: Database, agent: Caller, owner: asyncpg.Connection, method: str
) -> None:
    await let_agents(database, agent, granted=False)
    refusal = await refusal_of(calling(memories, method, by(agent))())
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION, refusal
    assert refusal.reason == "CONSENT_MISSING"
    assert "memory.agent_access" in refusal.message
    assert await events_of(owner, agent) == []


@pytest.mark.parametrize("method", OPEN)
async def test_without_the_scope_no_method_is_open_to_an_agent(
    memories: Any, agent: Caller, method: str
) -> None:
    needed = SCOPES[f"{SERVICE}{method}"]
    others = " ".join(scope for scope in Scope if scope not in {needed, Scope.USER})
    refusal = await refusal_of(calling(memories, method, by(agent, others))())
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED
    assert refusal.reason == "SCOPE_MISSING"


@pytest.mark.parametrize("state", ["disabled_at", "deleted_at"])
async def test_an_agent_that_is_disabled_or_gone_is_refused_at_once(
    memories: Stub, agent: Caller, owner: asyncpg.Connection, state: str
) -> None:
    assert agent.agent
    await owner.execute(f"UPDATE agents SET {state} = now() WHERE id = $1", agent.agent.id)
    request = pb.ListMemoriesRequest()
    refusal = await refusal_of(memories.ListMemories(request, metadata=by(agent)))
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


async def test_another_users_agent_acts_for_nobody_else(
    memories: Stub, agent: Caller, database: Database
) -> None:
    other = await new_caller(database)
    await let_agents(database, other, granted=True)
    posing = Caller(other.tenant_id, other.user_id, agent.agent)
    refusal = await refusal_of(memories.ListMemories(pb.ListMemoriesRequest(), metadata=by(posing)))
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_withdrawal_ends_what_an_agent_may_with_its_next_call(
    memories: Stub, database: Database, user: Caller, agent: Caller
) -> None:
    kept = await create(memories, user, "the cat is called Mia")
    request = pb.GetMemoryRequest(id=kept.id)
    assert (await memories.GetMemory(request, metadata=by(agent))).memory.content == kept.content
    await let_agents(database, user, granted=False)
    refusal = await refusal_of(memories.GetMemory(request, metadata=by(agent)))
    assert refusal.reason == "CONSENT_MISSING"
    assert (await memories.GetMemory(request, metadata=bearer(user))).memory.id == kept.id


async def test_whoever_comes_next_on_the_connection_is_not_taken_for_the_agent(
    urls: Urls, database: Database, user: Caller, agent: Caller
) -> None:
    pool = await open_pool(urls.application, size=1, name="test")
    narrow = Database(pool)
    for granted in (True, False):
        await let_agents(database, user, granted=granted)
        with nullcontext() if granted else pytest.raises(ConsentMissing):
            async with narrow.transaction(agent) as connection:
                assert await connection.fetchval("SELECT acting_agent()")
        async with narrow.transaction(user) as connection:
            assert await connection.fetchval("SELECT acting_agent()") is None
            assert not await connection.fetchval("SELECT hides_sensitive()")
    await pool.close()


# --- what is told --------------------------------------------------------------------------


async def test_what_an_agent_keeps_is_made_by_it(
    memories: Stub, user: Caller, agent: Caller, owner: asyncpg.Connection
) -> None:
    for tier in (pb.TIER_LONG_TERM, pb.TIER_PERMANENT, pb.TIER_SHORT_TERM):
        request = pb.CreateMemoryRequest(memory=pb.Memory(content=f"tea, {tier}", tier=tier))
        made = (await memories.CreateMemory(request, metadata=by(agent))).memory
        assert made.author == pb.AUTHOR_AGENT
        shown = pb.GetMemoryRequest(id=made.id)
        read = (await memories.GetMemory(shown, metadata=bearer(user))).memory
        assert read.author == pb.AUTHOR_AGENT
        assert (await events_of(owner, agent))[-1] == ("memory.create", made.id)
    mine = await create(memories, user, "coffee")
    assert mine.author == pb.AUTHOR_USER


Read = Callable[[Any, Caller, pb.Memory], Awaitable[Any]]


async def get(memories: Any, agent: Caller, memory: pb.Memory) -> Any:
    return await memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=by(agent))


async def list_(memories: Any, agent: Caller, _: pb.Memory) -> Any:
    return await memories.ListMemories(pb.ListMemoriesRequest(), metadata=by(agent))


async def versions(memories: Any, agent: Caller, memory: pb.Memory) -> Any:
    request = pb.ListMemoryVersionsRequest(id=memory.id)
    return await memories.ListMemoryVersions(request, metadata=by(agent))


async def query(memories: Any, agent: Caller, _: pb.Memory) -> Any:
    return await memories.QueryMemories(pb.QueryMemoriesRequest(query="cat"), metadata=by(agent))


async def export(memories: Any, agent: Caller, _: pb.Memory) -> Any:
    stream = memories.ExportMemories(pb.ExportMemoriesRequest(), metadata=by(agent))
    return [part async for part in stream]


@pytest.mark.parametrize("tier", [pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM])
@pytest.mark.parametrize("read", [get, list_, versions, query, export])
async def test_whatever_an_agent_reads_has_its_name_in_the_log(
    memories: Stub,
    user: Caller,
    agent: Caller,
    owner: asyncpg.Connection,
    read: Read,
    tier: pb.Tier.ValueType,
) -> None:
    kept = await create(memories, user, "the cat is called Mia", tier=tier)
    assert kept.id in str(await read(memories, agent, kept))
    told = await events_of(owner, agent)
    assert ("memory.read", kept.id) in told
    row = await owner.fetchrow("SELECT * FROM audit_events WHERE action = 'memory.read'")
    assert row is not None
    assert (row["tenant_id"], row["user_id"]) == (user.tenant_id, user.user_id)


async def test_files_that_an_agent_finds_are_told(
    memories: Any, user: Caller, agent: Caller, owner: asyncpg.Connection
) -> None:
    kept = await create(memories, user, "a scan")
    attachment = await attach(memories, user, kept)
    listing = pb.ListAttachmentsRequest(memory_id=kept.id)
    (listed,) = (await memories.ListAttachments(listing, metadata=by(agent))).attachments
    assert listed.id == attachment
    await memories.GetAttachment(pb.GetAttachmentRequest(id=attachment), metadata=by(agent))
    assert await events_of(owner, agent) == [
        ("memory.read", kept.id),
        ("attachment.read", attachment),
    ]


async def next_change(stream: AsyncIterator[pb.WatchMemoriesResponse]) -> pb.MemoryChange:
    """Read the next change; marks that nothing is left may come before it."""
    async with asyncio.timeout(30):
        while not (heard := await anext(stream)).HasField("change"):
            pass
    return heard.change


async def test_a_watching_agent_is_told_and_heard(
    memories: Stub, user: Caller, agent: Caller, owner: asyncpg.Connection, database: Database
) -> None:
    request = pb.WatchMemoriesRequest(include_memories=True)
    stream = aiter(memories.WatchMemories(request, metadata=by(agent), timeout=60))
    assert (await anext(stream)).HasField("caught_up")
    kept = await create(memories, user, "the cat is called Mia")
    assert (await next_change(stream)).memory.content == kept.content
    assert ("memory.read", kept.id) in await events_of(owner, agent)
    await let_agents(database, user, granted=False)

    async def rest() -> list[pb.WatchMemoriesResponse]:
        return [response async for response in stream]

    assert (await refusal_of(rest())).reason == "CONSENT_MISSING"


async def test_what_the_user_reads_is_not_told(
    memories: Stub, user: Caller, owner: asyncpg.Connection
) -> None:
    kept = await create(memories, user, "the cat is called Mia")
    await memories.GetMemory(pb.GetMemoryRequest(id=kept.id), metadata=bearer(user))
    told = await owner.fetchval("SELECT count(*) FROM audit_events WHERE action = 'memory.read'")
    assert told == 0


# --- what is sensitive ---------------------------------------------------------------------


@pytest_asyncio.fixture
async def secret(memories: Stub, database: Database, user: Caller) -> pb.Memory:
    await write_decision(database, user, "memory.sensitive", granted=True)
    return await create(memories, user, SECRET, sensitive=True)


async def attach(memories: Any, user: Caller, memory: pb.Memory) -> str:
    request = pb.CreateAttachmentRequest(
        memory_id=memory.id,
        file_name="scan.txt",
        content_type="text/plain",
        size_bytes=1,
        sha256="0" * 64,
    )
    announced = await memories.CreateAttachment(request, metadata=bearer(user))
    return str(announced.attachment.id)


async def test_to_an_agent_without_the_scope_what_is_sensitive_is_not_there(
    memories: Any, user: Caller, agent: Caller, secret: pb.Memory
) -> None:
    attachment = await attach(memories, user, secret)
    calls = [
        memories.GetMemory(pb.GetMemoryRequest(id=secret.id), metadata=by(agent)),
        versions(memories, agent, secret),
        memories.DeleteMemory(pb.DeleteMemoryRequest(id=secret.id), metadata=by(agent)),
        memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=secret.id), metadata=by(agent)),
        memories.GetAttachment(pb.GetAttachmentRequest(id=attachment), metadata=by(agent)),
    ]
    for call in calls:
        assert (await refusal_of(call)).reason == "RESOURCE_NOT_FOUND"
    for read in (list_, query, export):
        assert SECRET not in str(await read(memories, agent, secret))
    shown = pb.GetMemoryRequest(id=secret.id)
    assert (await memories.GetMemory(shown, metadata=bearer(user))).memory.content == SECRET


async def test_an_agent_with_the_scope_sees_it_and_that_is_told(
    memories: Any,
    system_database: SystemDatabase,
    user: Caller,
    secret: pb.Memory,
    owner: asyncpg.Connection,
) -> None:
    agent = await new_agent(system_database, user, scopes=EVERYTHING, sees_sensitive=True)
    shown = pb.GetMemoryRequest(id=secret.id)
    read = await memories.GetMemory(shown, metadata=by(agent, EVERYTHING))
    assert read.memory.content == SECRET
    assert await events_of(owner, agent) == [("memory.read", secret.id)]


async def test_an_agent_without_the_scope_makes_nothing_sensitive(
    memories: Any, agent: Caller, secret: pb.Memory
) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="another", sensitive=True))
    refusal = await refusal_of(memories.CreateMemory(request, metadata=by(agent)))
    assert refusal.reason == "SCOPE_MISSING"
    assert "memory.sensitive" in refusal.message


async def test_a_watching_agent_does_not_hear_of_what_it_does_not_see(
    memories: Stub, user: Caller, agent: Caller, secret: pb.Memory
) -> None:
    stream = aiter(memories.WatchMemories(pb.WatchMemoriesRequest(), metadata=by(agent)))
    assert (await anext(stream)).HasField("caught_up")
    await create(memories, user, "another", sensitive=True)
    plain = await create(memories, user, "plain")
    assert (await next_change(stream)).memory_id == plain.id


async def test_what_others_share_is_for_people_and_what_is_public_for_agents_too(
    memories: Any, database: Database, user: Caller, agent: Caller
) -> None:
    colleague = Caller(user.tenant_id, ids.new_id())
    await write_decision(database, colleague, "memory.store", granted=True)
    shared = await create(memories, colleague, "shared tea", scope=pb.SCOPE_SHARED)
    public = await create(memories, colleague, "public tea", scope=pb.SCOPE_PUBLIC)
    request = pb.ListMemoriesRequest(shared=True)
    to_user = await memories.ListMemories(request, metadata=bearer(user))
    assert {memory.id for memory in to_user.memories} == {shared.id, public.id}
    to_agent = await memories.ListMemories(request, metadata=by(agent))
    assert {memory.id for memory in to_agent.memories} == {public.id}
    asked = pb.GetMemoryRequest(id=shared.id)
    refusal = await refusal_of(memories.GetMemory(asked, metadata=by(agent)))
    assert refusal.reason == "RESOURCE_NOT_FOUND"


async def test_the_answer_to_an_agent_is_not_kept_for_its_user(
    memories: Any, user: Caller, agent: Caller, answers: Answers, redis: Redis
) -> None:
    await create(memories, user, "the cat is called Mia")
    question = pb.QueryMemoriesRequest(query="cat")
    await memories.QueryMemories(question, metadata=by(agent))
    await answers.flush()
    assert b"Mia" not in await values_in(redis, user)
    await memories.QueryMemories(question, metadata=bearer(user))
    await answers.flush()
    assert b"Mia" in await values_in(redis, user)
