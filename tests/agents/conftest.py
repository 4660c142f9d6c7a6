"""AgentService beside the auth service that its keys are exchanged at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.agents.v1 import agents_pb2_grpc as rpc
from kimberly.auth.v1 import auth_pb2 as auth_pb

from server import ids
from server.agents.service import AgentService
from server.agents.store import AgentStore
from server.agents.task_store import TaskStore
from server.auth.agent_keys import AgentKeys
from server.caller import Caller, Credentials
from server.database import Database, SystemDatabase
from server.grants import EndedGrants
from server.jobs.store import JobStore
from server.processes.kinds import KINDS
from server.tokens import TokenVerifier
from tests.acting import let_agents
from tests.auth import conftest as of_auth
from tests.auth.conftest import Auth, sign_up
from tests.conftest import FakeClock, Serve, bearer

# The auth service and what it is made of.
hasher, hashing, kms = of_auth.hasher, of_auth.hashing, of_auth.kms
key_store, keyring, mint, issuer = (
    of_auth.key_store,
    of_auth.keyring,
    of_auth.mint,
    of_auth.issuer,
)
mails, service, channel = of_auth.mails, of_auth.service, of_auth.channel
auth, ended, verifier = of_auth.auth, of_auth.ended, of_auth.verifier
erasures, members, memberships = of_auth.erasures, of_auth.members, of_auth.memberships


@pytest_asyncio.fixture
async def agents(
    serve: Serve, database: Database, system_database: SystemDatabase, clock: FakeClock
) -> Any:
    """A stub of the agent service."""
    service = AgentService(
        AgentStore(system_database, AgentKeys()),
        TaskStore(database),
        JobStore(database, system_database, KINDS).cancel,
        clock=clock,
    )
    channel: grpc.aio.Channel = await serve(
        lambda server: rpc.add_AgentServiceServicer_to_server(service, server)
    )
    return rpc.AgentServiceStub(channel)


@dataclass(frozen=True, slots=True)
class Desk:
    """What a test does with agents of one user, as that user."""

    agents: Any
    auth: Auth
    verifier: TokenVerifier
    ended: EndedGrants
    user: Caller

    async def call(self, method: str, request: Any) -> Any:
        """Call AgentService."""
        return await getattr(self.agents, method)(request, metadata=bearer(self.user))

    async def register(self, **fields: Any) -> pb.RegisterAgentResponse:
        """Register an agent."""
        given: dict[str, Any] = {
            "name": "a helper",
            "kind": pb.AGENT_KIND_SUMMARIZE_SESSION,
            "scopes": ["memory.read", "memory.write"],
        } | fields
        answer: pb.RegisterAgentResponse = await self.call(
            "RegisterAgent", pb.RegisterAgentRequest(**given)
        )
        return answer

    async def run(self, agent: pb.Agent, **fields: Any) -> pb.AgentTask:
        """Give an agent a task."""
        request = pb.RunAgentTaskRequest(
            agent_id=agent.id,
            summarize_session=pb.SummarizeSession(session_id="a talk"),
            **fields,
        )
        return (await self.call("RunAgentTask", request)).task  # type: ignore[no-any-return]

    async def token(self, key: str, scopes: list[str] | None = None) -> str:
        """Exchange an agent's key."""
        request = auth_pb.ExchangeTokenRequest(api_key=key, scopes=scopes or [])
        return (await self.auth.ExchangeToken(request)).access_token

    async def read(self, token: str) -> Credentials:
        """Return what a token says, to who knows what ended."""
        await self.ended.refresh()
        return await self.verifier.verify(token)


@pytest_asyncio.fixture
async def desk(
    agents: Any, auth: Auth, verifier: TokenVerifier, ended: EndedGrants, database: Database
) -> Desk:
    """The desk of a user who lets agents act."""
    return await desk_of(agents, auth, verifier, ended, database, "ada@example.com")


async def desk_of(
    agents: Any,
    auth: Auth,
    verifier: TokenVerifier,
    ended: EndedGrants,
    database: Database,
    email: str,
) -> Desk:
    """Return the desk of somebody who signs up."""
    tokens = await sign_up(auth, email)
    user = (await verifier.verify(tokens.access_token)).caller
    await let_agents(database, user, granted=True)
    return Desk(agents, auth, verifier, ended, user)


def uuid_of(agent: pb.Agent) -> Any:
    """Return the id of an agent as tables have it."""
    return ids.parse(ids.AGENT, agent.id, "id")
