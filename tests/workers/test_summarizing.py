"""An agent that summarises, end to end: a task, the queue, a worker, a memory, the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.agents.v1 import agents_pb2_grpc as rpc
from kimberly.jobs.v1 import jobs_pb2 as jobs

from server import ids
from server.access import Scope
from server.cache import Redis
from server.caller import Caller
from server.clock import utc_now
from server.database import Database, SystemDatabase
from server.memory.agent_jobs import _PAGE
from server.memory.model import Draft, Source, Tier
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from tests.acting import EVERYTHING, READ_WRITE, let_agents, new_agent
from tests.conftest import as_worker, bearer, data_keys_of, new_caller
from tests.deciding import write_decision
from tests.refusals import refusal_of
from tests.workers.conftest import Mesh, let_lapse, until
from workers.digest import Digest
from workers.stream import Handler
from workers.summarizing import SUMMARIZE, Summarizing

SAID = (
    "Shall we talk about the move to Lisbon?",
    "The flat near the river in Lisbon is free from May.",
    "My cat likes tuna.",
    "The movers to Lisbon cost 900 euros, and they come in May.",
)
LATER = (
    "The movers to Lisbon come in June, and the flat near the river in Lisbon is free from June."
)
"""Of all that is said this is chosen first."""
SECRET = "The doctor in Lisbon has my diagnosis, and the flat in Lisbon is near."


def turn(position: int, content: str, **fields: Any) -> Draft:
    tier = fields.pop("tier", Tier.LONG_TERM)
    return Draft(tier, content, (), Source.CHAT, "move", position, "Ann", None, **fields)


@pytest.fixture
def memories(database: Database) -> MemoryStore:
    return MemoryStore(database, data_keys_of(database))


@pytest_asyncio.fixture
async def user(database: Database, memories: MemoryStore) -> Caller:
    user = await new_caller(database)
    await let_agents(database, user, granted=True)
    for position, content in enumerate(SAID):
        await memories.create(user, turn(position, content), "", utc_now())
    return user


@pytest_asyncio.fixture
async def agent(system_database: SystemDatabase, user: Caller) -> Caller:
    return await new_agent(system_database, user, kind="summarize_session")


@pytest_asyncio.fixture
async def agents(mesh: Mesh) -> AsyncIterator[Any]:
    async with mesh.channel() as channel:
        yield rpc.AgentServiceStub(channel)


@pytest_asyncio.fixture
async def work(mesh: Mesh) -> AsyncIterator[Any]:
    async with mesh.channel() as channel:
        yield rpc.AgentWorkServiceStub(channel)


def id_of(agent: Caller) -> str:
    assert agent.agent
    return ids.show(ids.AGENT, agent.agent.id)


async def run(agents: Any, agent: Caller, sentences: int = 2, **fields: Any) -> pb.AgentTask:
    request = pb.RunAgentTaskRequest(
        agent_id=id_of(agent),
        summarize_session=pb.SummarizeSession(session_id="move", sentences=sentences),
        **fields,
    )
    user = Caller(agent.tenant_id, agent.user_id)
    task: pb.AgentTask = (await agents.RunAgentTask(request, metadata=bearer(user))).task
    return task


async def look(agents: Any, agent: Caller, task: pb.AgentTask) -> pb.AgentTask:
    user = Caller(agent.tenant_id, agent.user_id)
    request = pb.GetAgentTaskRequest(id=task.id)
    found: pb.AgentTask = (await agents.GetAgentTask(request, metadata=bearer(user))).task
    return found


async def ended(agents: Any, agent: Caller, task: pb.AgentTask) -> pb.AgentTask:
    async with asyncio.timeout(60):
        while not (found := await look(agents, agent, task)).HasField("finish_time"):
            pass
    return found


def summarizing(channel: grpc.aio.Channel) -> Mapping[str, Handler]:
    return {SUMMARIZE: Summarizing(channel, metadata=as_worker()).summarize}


async def summaries(owner: asyncpg.Connection, user: Caller) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await owner.fetch(
        "SELECT * FROM memories WHERE user_id = $1 AND tags = '{summary}'", user.user_id
    )
    return rows


async def test_a_task_leaves_a_summary_that_the_agent_made(
    mesh: Mesh, agents: Any, agent: Caller, owner: asyncpg.Connection
) -> None:
    async with mesh.working(summarizing):
        task = await ended(agents, agent, await run(agents, agent))
    assert task.state == jobs.JOB_STATE_SUCCEEDED, task
    assert task.progress == 1
    assert (task.summary.turns, task.summary.sentences) == (len(SAID), 2)
    (kept,) = await summaries(owner, agent)
    assert ids.show(ids.MEMORY, kept["id"]) == task.summary.memory_id
    assert kept["content"].splitlines() == [SAID[1], SAID[3]]
    assert (kept["tier"], kept["source"], kept["created_by"]) == ("long_term", "agent", "agent")
    assert (kept["session_id"], kept["session_position"]) == ("move", None)


async def test_every_turn_that_the_agent_read_is_told(
    mesh: Mesh, agents: Any, agent: Caller, owner: asyncpg.Connection
) -> None:
    async with mesh.working(summarizing):
        task = await ended(agents, agent, await run(agents, agent))
    rows = await owner.fetch(
        "SELECT action, resource FROM audit_events WHERE actor = $1", id_of(agent)
    )
    told = [tuple(row) for row in rows]
    turns = await owner.fetch("SELECT id FROM memories WHERE session_position IS NOT NULL")
    read = {("memory.read", ids.show(ids.MEMORY, row["id"])) for row in turns}
    assert len(told) == len(read) + 1
    assert set(told) == {*read, ("memory.create", task.summary.memory_id)}


async def test_turns_of_both_stores_are_read_each_once_and_in_their_order(
    mesh: Mesh,
    work: Any,
    agents: Any,
    agent: Caller,
    user: Caller,
    memories: MemoryStore,
    redis: Redis,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    short_term = ShortTermStore(redis, database, timedelta(days=1))
    said = list(SAID)
    for position in range(len(SAID), _PAGE + 20):
        content = f"Something about Lisbon, number {position}."
        said.append(content)
        if position % 3 == 0:
            draft = turn(position, content, tier=Tier.SHORT_TERM)
            await short_term.create(user, draft, "", utc_now())
        else:
            await memories.create(user, turn(position, content), "", utc_now())
    task = await run(agents, agent)
    request = await leased(owner, task)
    read: list[str] = []
    while True:
        page = await work.ReadSession(request, metadata=as_worker())
        read += [each.content for each in page.turns]
        if not request.page_token:
            assert page.total_turns == len(said)
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert read == said
    assert len(read) > _PAGE


async def leased(
    owner: asyncpg.Connection, task: pb.AgentTask, token: int = 7
) -> pb.ReadSessionRequest:
    """Put a task under a lease, as a worker would have it."""
    await owner.execute(
        """
        UPDATE jobs
           SET state = 'running', worker_id = 'a worker of this test', lease_token = $2,
               lease_expires_at = now() + interval '1 minute'
         WHERE id = $1
        """,
        ids.parse(ids.JOB, task.id, "id"),
        token,
    )
    return pb.ReadSessionRequest(job_id=task.id, lease_token=token)


async def test_whose_lease_it_is_not_gets_nothing(
    work: Any, agents: Any, agent: Caller, owner: asyncpg.Connection
) -> None:
    request = await leased(owner, await run(agents, agent))
    request.lease_token += 1
    keeping = pb.KeepSummaryRequest(
        job_id=request.job_id, lease_token=request.lease_token, content="mine"
    )
    for call in (
        work.ReadSession(request, metadata=as_worker()),
        work.KeepSummary(keeping, metadata=as_worker()),
    ):
        assert (await refusal_of(call)).reason == "LEASE_LOST"
    request.job_id = ids.show(ids.JOB, ids.new_id())
    refusal = await refusal_of(work.ReadSession(request, metadata=as_worker()))
    assert refusal.reason == "RESOURCE_NOT_FOUND"
    refusal = await refusal_of(work.ReadSession(request, metadata=bearer(agent)))
    assert refusal.reason == "METHOD_NOT_ALLOWED"


async def test_a_withdrawal_holds_for_a_task_under_way(
    work: Any, agents: Any, agent: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    request = await leased(owner, await run(agents, agent))
    assert (await work.ReadSession(request, metadata=as_worker())).turns
    await let_agents(database, agent, granted=False)
    keeping = pb.KeepSummaryRequest(
        job_id=request.job_id, lease_token=request.lease_token, content="what was read"
    )
    for call in (
        work.ReadSession(request, metadata=as_worker()),
        work.KeepSummary(keeping, metadata=as_worker()),
    ):
        assert (await refusal_of(call)).reason == "CONSENT_MISSING"
    assert not await summaries(owner, agent)


@pytest.mark.parametrize("lacking", [Scope.MEMORY_READ, Scope.MEMORY_WRITE])
async def test_a_task_does_no_more_than_its_agent_may(
    work: Any,
    agents: Any,
    user: Caller,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    lacking: Scope,
) -> None:
    scopes = READ_WRITE.replace(lacking, "").strip()
    agent = await new_agent(system_database, user, kind="summarize_session", scopes=scopes)
    assert (await refusal_of(run(agents, agent))).reason == "SCOPE_MISSING"
    # A job that came about otherwise.
    whole = await new_agent(system_database, user, kind="summarize_session")
    request = await leased(owner, await run(agents, whole))
    assert whole.agent
    await owner.execute(
        "UPDATE agents SET scopes = $2 WHERE id = $1", whole.agent.id, scopes.split()
    )
    keeping = pb.KeepSummaryRequest(
        job_id=request.job_id, lease_token=request.lease_token, content="mine"
    )
    call: Callable[[], Any] = {
        Scope.MEMORY_READ: lambda: work.ReadSession(request, metadata=as_worker()),
        Scope.MEMORY_WRITE: lambda: work.KeepSummary(keeping, metadata=as_worker()),
    }[lacking]
    assert (await refusal_of(call())).reason == "SCOPE_MISSING"


async def test_a_worker_that_is_killed_half_way_leaves_one_summary(
    mesh: Mesh, agents: Any, agent: Caller, owner: asyncpg.Connection, memories: MemoryStore
) -> None:
    kept = asyncio.Event()

    def dying(channel: grpc.aio.Channel) -> Mapping[str, Handler]:
        handler = summarizing(channel)[SUMMARIZE]

        async def die(task: Any) -> Mapping[str, Any]:
            await handler(task)
            kept.set()
            await asyncio.Event().wait()
            raise AssertionError

        return {SUMMARIZE: die}

    task = await run(agents, agent)
    async with mesh.working(dying):
        await asyncio.wait_for(kept.wait(), 60)
    await let_lapse(owner)
    (first,) = await summaries(owner, agent)
    # Meanwhile the conversation goes on: the second attempt would choose otherwise.
    user = Caller(agent.tenant_id, agent.user_id)
    await memories.create(user, turn(9, LATER), "", utc_now())
    assert LATER in chosen(*SAID, LATER)
    async with mesh.working(summarizing):
        task = await ended(agents, agent, task)
    assert task.state == jobs.JOB_STATE_SUCCEEDED, task
    assert task.summary.memory_id == ids.show(ids.MEMORY, first["id"])
    assert len(await summaries(owner, agent)) == 1
    attempts = await owner.fetchval("SELECT attempt FROM jobs")
    assert attempts == 2


def chosen(*said: str) -> list[str]:
    digest = Digest()
    for content in said:
        digest.add(content)
    return [sentence.text for sentence in digest.choose(2)]


async def test_a_task_that_runs_can_be_cancelled(
    mesh: Mesh, agents: Any, agent: Caller, owner: asyncpg.Connection
) -> None:
    begun = asyncio.Event()

    async def endless(_: Any) -> Mapping[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with mesh.working({SUMMARIZE: endless}):
        task = await run(agents, agent)
        await asyncio.wait_for(begun.wait(), 60)
        request = pb.CancelAgentTaskRequest(id=task.id)
        user = Caller(agent.tenant_id, agent.user_id)
        await agents.CancelAgentTask(request, metadata=bearer(user))
        task = await ended(agents, agent, task)
    assert task.state == jobs.JOB_STATE_CANCELLED
    assert not await summaries(owner, agent)


async def test_what_is_sensitive_is_quoted_only_by_who_may_and_stays_so(
    mesh: Mesh,
    agents: Any,
    agent: Caller,
    user: Caller,
    memories: MemoryStore,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    await write_decision(database, user, "memory.sensitive", granted=True)
    await memories.create(user, turn(8, SECRET, is_sensitive=True), "", utc_now())
    seeing = await new_agent(
        system_database, user, kind="summarize_session", scopes=EVERYTHING, sees_sensitive=True
    )
    async with mesh.working(summarizing):
        blind = await ended(agents, agent, await run(agents, agent, 20))
        open_ = await ended(agents, seeing, await run(agents, seeing, 20))
    assert blind.summary.turns == len(SAID)
    assert open_.summary.turns == len(SAID) + 1
    kept = {ids.show(ids.MEMORY, row["id"]): row for row in await summaries(owner, user)}
    assert not kept[blind.summary.memory_id]["sensitive"]
    assert SECRET not in kept[blind.summary.memory_id]["content"]
    assert kept[open_.summary.memory_id]["sensitive"]
    assert kept[open_.summary.memory_id]["content"] == ""


async def test_where_nothing_was_said_the_task_fails_and_says_so(
    mesh: Mesh, agents: Any, agent: Caller, owner: asyncpg.Connection
) -> None:
    await owner.execute("DELETE FROM memories")
    async with mesh.working(summarizing):
        task = await run(agents, agent)

        async def failed() -> bool:
            return bool((await look(agents, agent, task)).error)

        await until(failed)
    assert "NothingSaid" in (await look(agents, agent, task)).error
