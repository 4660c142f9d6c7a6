"""An agent through the edge: its key, what it may, a task that a worker does, and what is told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from authlib.integrations.httpx_client import AsyncOAuth2Client
from kimberly.agents.v1 import agents_pb2 as agents
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.mesh import User, acting, eventually
from tests.refusals import Refusal
from tests.transports import Refused

SCOPES = ["memory.read", "memory.write"]
SAID = (
    "We should plan the move to Lisbon.",
    "The flat near the river in Lisbon is free from May.",
    "I had soup for lunch.",
    "The movers to Lisbon come in May and cost 900 euros.",
)


@pytest_asyncio.fixture
async def hired(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, user: User
) -> tuple[User, agents.RegisterAgentResponse]:
    """The user's agent, as who calls and as it was registered."""
    await let_agents(user, granted=True)
    return await acting(http, channel, user, SCOPES, agents.AGENT_KIND_SUMMARIZE_SESSION)


async def let_agents(user: User, *, granted: bool) -> None:
    purpose = users.CONSENT_PURPOSE_MEMORY_AGENT_ACCESS
    await user.rest(users.RecordConsentRequest(purpose=purpose, granted=granted))


async def refusal_of(call: Awaitable[Any]) -> Refusal:
    with pytest.raises(Refused) as caught:
        await call
    return caught.value.refusal


async def test_a_task_summarises_a_conversation_and_all_of_it_is_told(
    user: User, hired: tuple[User, agents.RegisterAgentResponse]
) -> None:
    agent = hired[1].agent
    turns = [pb.SessionTurn(content=content, speaker="Ann") for content in SAID]
    await user.rest(pb.AppendToSessionRequest(session_id="the move", turns=turns))
    asked = agents.SummarizeSession(session_id="the move", sentences=2)
    request = agents.RunAgentTaskRequest(agent_id=agent.id, summarize_session=asked)
    task = (await user.rest(request)).task

    async def look() -> Any:
        return (await user.rest(agents.GetAgentTaskRequest(id=task.id))).task

    done = await eventually(look, lambda seen: seen.HasField("finish_time"))
    assert done.state == jobs.JOB_STATE_SUCCEEDED, done
    assert done.summary.turns == len(SAID)
    summary = (await user.rest(pb.GetMemoryRequest(id=done.summary.memory_id))).memory
    assert (summary.author, summary.source) == (pb.AUTHOR_AGENT, pb.SOURCE_AGENT)
    assert summary.content.splitlines() == [SAID[1], SAID[3]]
    log = (await user.rest(users.ListAuditEventsRequest(page_size=100))).events
    told = [(each.action, each.resource) for each in log if each.actor == agent.id]
    assert ("memory.create", summary.id) in told
    assert len([each for each in told if each[0] == "memory.read"]) == len(SAID)


async def test_a_withdrawn_consent_and_a_disabled_agent_hold_at_once(
    user: User, hired: tuple[User, agents.RegisterAgentResponse]
) -> None:
    agent, made = hired
    kept = (await user.rest(pb.CreateMemoryRequest(memory=pb.Memory(content="tea")))).memory
    for call in agent.transports.values():
        assert (await call(pb.GetMemoryRequest(id=kept.id))).memory.content == "tea"
    await let_agents(user, granted=False)
    for call in agent.transports.values():
        refusal = await refusal_of(call(pb.GetMemoryRequest(id=kept.id)))
        # The database says so at once; within seconds the token is refused before it is asked.
        assert refusal.reason in {"CONSENT_MISSING", "TOKEN_INVALID"}
    await let_agents(user, granted=True)
    await user.rest(agents.DisableAgentRequest(id=made.agent.id))
    for call in agent.transports.values():
        refusal = await refusal_of(call(pb.GetMemoryRequest(id=kept.id)))
        assert refusal.reason == "TOKEN_INVALID"


async def test_a_stream_ends_with_the_agent_that_watches(
    user: User, hired: tuple[User, agents.RegisterAgentResponse]
) -> None:
    agent, made = hired
    stream = agent.grpc.stream(pb.WatchMemoriesRequest())
    await anext(stream)
    await user.rest(agents.DeleteAgentRequest(id=made.agent.id))

    async def rest() -> None:
        async for _ in stream:
            pass

    async with asyncio.timeout(30):
        assert (await refusal_of(rest())).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_standard_client_gets_tokens_by_the_agents_id_and_key(
    mesh: Mesh, trust: ssl.SSLContext, hired: tuple[User, agents.RegisterAgentResponse]
) -> None:
    made = hired[1]
    options = {"client_id": made.agent.id, "client_secret": made.key}
    async with AsyncOAuth2Client(verify=trust, **options) as session:
        token = await session.fetch_token(f"{mesh.edge}/v1/oauth/token", scope="memory.read")
        assert token["scope"] == "memory.read"
        assert (await session.get(f"{mesh.edge}/v1/memories")).status_code == 200
        assert (await session.get(f"{mesh.edge}/v1/agents")).status_code == 403
