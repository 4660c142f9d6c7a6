"""Agents of users, for tests that have no AgentService at hand."""

from __future__ import annotations

from server import ids
from server.access import Scope
from server.caller import ActingAgent, Caller
from server.database import Database, SystemDatabase
from tests.deciding import write_decision

READ_WRITE = f"{Scope.MEMORY_READ} {Scope.MEMORY_WRITE}"
EVERYTHING = f"{READ_WRITE} {Scope.MEMORY_SENSITIVE}"


async def let_agents(database: Database, caller: Caller, *, granted: bool) -> None:
    """Have a user consent to agents, or withdraw that."""
    user = Caller(caller.tenant_id, caller.user_id)
    await write_decision(database, user, "memory.agent_access", granted=granted)


async def new_agent(
    system: SystemDatabase,
    caller: Caller,
    *,
    kind: str = "external",
    scopes: str = READ_WRITE,
    sees_sensitive: bool = False,
) -> Caller:
    """Return a user for whom a new agent acts."""
    agent = ActingAgent(ids.new_id(), sees_sensitive)
    async with system.transaction() as connection:
        await connection.execute(
            """
            INSERT INTO agents (tenant_id, user_id, id, name, kind, scopes, created_at)
            VALUES ($1, $2, $3, 'a helper', $4, $5, now())
            """,
            caller.tenant_id,
            caller.user_id,
            agent.id,
            kind,
            scopes.split(),
        )
    return Caller(caller.tenant_id, caller.user_id, agent)
