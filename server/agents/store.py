"""Agents in Postgres, as the system role, which alone sees their keys."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import asyncpg

from server import audit, ids, requests
from server.agents.model import MOST_AGENTS, Agent, AgentKind
from server.caller import ActingAgent, Caller
from server.database import Connection, SystemDatabase
from server.errors import NotFound, QuotaExceeded

_AGENT: Final = """
    SELECT agent.id, agent.name, agent.kind, agent.scopes, agent.created_at, agent.disabled_at,
           agent.deleted_at, key.prefix AS key_prefix, key.expires_at AS key_expires_at,
           key.last_used_at
      FROM agents AS agent
      LEFT JOIN api_keys AS key ON key.agent_id = agent.id AND key.revoked_at IS NULL
     WHERE agent.tenant_id = $1 AND agent.user_id = $2
"""


class Keys(Protocol):
    """Makes the keys of agents and ends them, inside the transaction of a change."""

    async def hold_grant(self, connection: Connection, caller: Caller, grant_id: UUID) -> None:
        """Make sure that what a call was made with has not ended, or raise Unauthenticated."""

    async def create(
        self,
        connection: Connection,
        caller: Caller,
        agent: ActingAgent,
        name: str,
        scopes: Sequence[str],
        now: datetime,
        expires_at: datetime | None,
    ) -> str:
        """Make the key of a new agent and return it."""

    async def rotate(
        self,
        connection: Connection,
        caller: Caller,
        agent: ActingAgent,
        now: datetime,
        overlap: timedelta,
        expires_at: datetime | None,
    ) -> str:
        """Make another key and return it."""

    async def pause(self, connection: Connection, caller: Caller, agent: ActingAgent) -> None:
        """Have the access tokens refused that are out."""

    async def revoke(
        self, connection: Connection, caller: Caller, agent: ActingAgent, now: datetime
    ) -> None:
        """End the key."""


class AgentStore:
    """The agents of one user at a time."""

    def __init__(self, database: SystemDatabase, keys: Keys) -> None:
        self._database = database
        self._keys = keys

    async def register(
        self,
        caller: Caller,
        agent: Agent,
        key_expires_at: datetime | None,
        request_id: str,
        contents: bytes,
        grant_id: UUID,
    ) -> tuple[Agent, str]:
        """Keep a new agent with its key.

        Args:
            caller: Whose it is.
            agent: The agent.
            key_expires_at: When its key ends; None: after the usual time.
            request_id: Chosen by the client; empty for none.
            contents: The request, to recognise a retry by.
            grant_id: What the call was made with.

        Returns:
            The agent and its key; the one that an earlier request of the same id made has none.

        Raises:
            InvalidArgument: The key would have ended already, or live for too long.
            QuotaExceeded: The user has as many agents as one may have.
            RequestIdReused: The earlier request had other contents.
            Unauthenticated: The grant has ended.
        """
        async with self._database.transaction() as connection:
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "RegisterAgent", request_id, contents, agent.id
                )
                if first_id != agent.id:
                    return await _get(connection, caller, first_id), ""
            await self._keys.hold_grant(connection, caller, grant_id)
            await _check_room(connection, caller)
            await _insert(connection, caller, agent)
            key = await self._keys.create(
                connection,
                caller,
                ActingAgent(agent.id),
                agent.name,
                agent.scopes,
                agent.created_at,
                key_expires_at,
            )
            await _record(connection, caller, agent.id, "agent.register")
            return await _get(connection, caller, agent.id), key

    async def get(self, caller: Caller, agent_id: UUID) -> Agent:
        """Return an agent, deleted or not.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction() as connection:
            return await _get(connection, caller, agent_id)

    async def list_agents(self, caller: Caller) -> list[Agent]:
        """Return the agents that are not deleted, the newest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"{_AGENT} AND agent.deleted_at IS NULL ORDER BY agent.id DESC",
                caller.tenant_id,
                caller.user_id,
            )
        return [_agent(row) for row in rows]

    async def disable(self, caller: Caller, agent_id: UUID, now: datetime) -> Agent:
        """Keep an agent from acting, and have its access tokens refused.

        Raises:
            NotFound: There is none that is not deleted, or it is not the caller's.
        """
        async with self._database.transaction() as connection:
            await _lock(connection, caller, agent_id)
            await connection.execute(
                """
                UPDATE agents
                   SET disabled_at = coalesce(disabled_at, $4)
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                agent_id,
                now,
            )
            await self._keys.pause(connection, caller, ActingAgent(agent_id))
            await _record(connection, caller, agent_id, "agent.disable")
            return await _get(connection, caller, agent_id)

    async def enable(self, caller: Caller, agent_id: UUID) -> Agent:
        """Let an agent act again.

        Raises:
            NotFound: There is none that is not deleted, or it is not the caller's.
        """
        async with self._database.transaction() as connection:
            await _lock(connection, caller, agent_id)
            await connection.execute(
                """
                UPDATE agents
                   SET disabled_at = NULL
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                agent_id,
            )
            await _record(connection, caller, agent_id, "agent.enable")
            return await _get(connection, caller, agent_id)

    async def delete(self, caller: Caller, agent_id: UUID, now: datetime) -> None:
        """End an agent and its key.

        Raises:
            NotFound: There is none that is not deleted, or it is not the caller's.
        """
        async with self._database.transaction() as connection:
            await _lock(connection, caller, agent_id)
            await self._keys.revoke(connection, caller, ActingAgent(agent_id), now)
            await connection.execute(
                """
                UPDATE agents
                   SET deleted_at = $4
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                agent_id,
                now,
            )
            await _record(connection, caller, agent_id, "agent.delete")

    async def rotate(
        self,
        caller: Caller,
        agent_id: UUID,
        now: datetime,
        overlap: timedelta,
        key_expires_at: datetime | None,
        grant_id: UUID,
    ) -> tuple[Agent, str]:
        """Give an agent another key, by a call made with a grant, and return both.

        Raises:
            InvalidArgument: The old key would stay for too long, or the new one.
            NotFound: There is none that is not deleted, or it is not the caller's.
            Unauthenticated: The grant has ended.
        """
        async with self._database.transaction() as connection:
            await self._keys.hold_grant(connection, caller, grant_id)
            await _lock(connection, caller, agent_id)
            key = await self._keys.rotate(
                connection, caller, ActingAgent(agent_id), now, overlap, key_expires_at
            )
            await _record(connection, caller, agent_id, "agent.rotate_key")
            return await _get(connection, caller, agent_id), key


async def _get(connection: Connection, caller: Caller, agent_id: UUID) -> Agent:
    row = await connection.fetchrow(
        f"{_AGENT} AND agent.id = $3", caller.tenant_id, caller.user_id, agent_id
    )
    if row is None:
        raise NotFound("agent")
    return _agent(row)


async def _lock(connection: Connection, caller: Caller, agent_id: UUID) -> None:
    found = await connection.fetchval(
        """
        SELECT id
          FROM agents
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3 AND deleted_at IS NULL
           FOR NO KEY UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        agent_id,
    )
    if found is None:
        raise NotFound("agent")


async def _check_room(connection: Connection, caller: Caller) -> None:
    """Let agents of one user be made one after the other, and count them."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"agents/{caller.user_id}"
    )
    used = await connection.fetchval(
        """
        SELECT count(*)
          FROM agents
         WHERE tenant_id = $1 AND user_id = $2 AND deleted_at IS NULL
        """,
        caller.tenant_id,
        caller.user_id,
    )
    if used >= MOST_AGENTS:
        raise QuotaExceeded("agents", used, MOST_AGENTS, "delete one of them", "agents")


async def _insert(connection: Connection, caller: Caller, agent: Agent) -> None:
    await connection.execute(
        """
        INSERT INTO agents (tenant_id, user_id, id, name, kind, scopes, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        caller.tenant_id,
        caller.user_id,
        agent.id,
        agent.name,
        agent.kind.value,
        list(agent.scopes),
        agent.created_at,
    )


async def _record(connection: Connection, caller: Caller, agent_id: UUID, action: str) -> None:
    await audit.record(connection, caller, action, ids.show(ids.AGENT, agent_id))


def _agent(row: asyncpg.Record) -> Agent:
    return Agent(
        id=row["id"],
        name=row["name"],
        kind=AgentKind(row["kind"]),
        scopes=row["scopes"],
        created_at=row["created_at"],
        disabled_at=row["disabled_at"],
        deleted_at=row["deleted_at"],
        key_prefix=row["key_prefix"] or "",
        key_expires_at=row["key_expires_at"],
        last_used_at=row["last_used_at"],
    )
