"""Goals in Postgres."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from server import audit, consent, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.errors import EtagMismatch, NotFound, QuotaExceeded
from server.memory.goals import MOST, Goal, GoalChange, Goals
from server.preferences import Language

_COLUMNS: Final = "id, content, active, version, created_at, updated_at"
_LAST: Final = UUID(int=2**128 - 1)


class GoalStore:
    """Keeps goals of one user at a time. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, caller: Caller, content: str, request_id: str, now: datetime, *, is_active: bool
    ) -> Goal:
        """Keep a goal.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            QuotaExceeded: The user has as many as there may be.
            RequestIdReused: The request id stands for other contents.
            NotFound: The goal that an earlier request made is deleted.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            goal_id = ids.new_id()
            if request_id:
                contents = repr((content, is_active)).encode()
                first_id = await requests.claim(
                    connection, caller, "CreateGoal", request_id, contents, goal_id
                )
                if first_id != goal_id:
                    return await _get(connection, caller, first_id)
            await _check_room(connection, caller)
            await connection.execute(
                """
                INSERT INTO goals (tenant_id, user_id, id, content, active, created_at, updated_at)
                VALUES ($1, $2, $3, $4, $5, $6, $6)
                """,
                caller.tenant_id,
                caller.user_id,
                goal_id,
                content,
                is_active,
                now,
            )
            await audit.record(connection, caller, "goal.create", ids.show(ids.GOAL, goal_id))
            return await _get(connection, caller, goal_id)

    async def get(self, caller: Caller, goal_id: UUID) -> Goal:
        """Return a goal.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, goal_id)

    async def page(
        self, caller: Caller, *, active_only: bool, before: UUID | None, limit: int
    ) -> Sequence[Goal]:
        """Return the newest goals, or the newest before one of them."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS}
                  FROM goals
                 WHERE tenant_id = $1 AND user_id = $2 AND id < $3 AND (active OR NOT $4)
                 ORDER BY id DESC
                 LIMIT $5
                """,  # noqa: S608 - constants
                caller.tenant_id,
                caller.user_id,
                before or _LAST,
                active_only,
                limit,
            )
        return [_goal(row) for row in rows]

    async def update(
        self, caller: Caller, goal_id: UUID, change: GoalChange, now: datetime
    ) -> Goal:
        """Change a goal.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            changed = await connection.fetchrow(
                f"""
                UPDATE goals
                   SET content = coalesce($4, content), active = coalesce($5, active),
                       version = version + 1, updated_at = $6
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                   AND version = coalesce($7, version)
                RETURNING {_COLUMNS}
                """,  # noqa: S608 - constants
                caller.tenant_id,
                caller.user_id,
                goal_id,
                change.content,
                change.is_active,
                now,
                change.expected_version,
            )
            if changed is None:
                await _get(connection, caller, goal_id)
                raise EtagMismatch
            await audit.record(connection, caller, "goal.update", ids.show(ids.GOAL, goal_id))
        return _goal(changed)

    async def delete(self, caller: Caller, goal_id: UUID) -> None:
        """Delete a goal. It needs no consent: it takes away.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            status = await connection.execute(
                "DELETE FROM goals WHERE tenant_id = $1 AND user_id = $2 AND id = $3",
                caller.tenant_id,
                caller.user_id,
                goal_id,
            )
            if status == "DELETE 0":
                raise NotFound("goal")
            await audit.record(connection, caller, "goal.delete", ids.show(ids.GOAL, goal_id))


async def goals_of_users(
    connection: Connection, users: Sequence[tuple[UUID, UUID]]
) -> dict[UUID, Goals]:
    """Return the active goals of those of some users who have any.

    Args:
        connection: A transaction of the system role.
        users: Tenant and user of each.
    """
    rows = await connection.fetch(
        """
        SELECT goal.user_id, array_agg(goal.content) AS contents,
               coalesce(min(chosen.language), 'english') AS language
          FROM goals AS goal
          LEFT JOIN settings AS chosen
            ON chosen.tenant_id = goal.tenant_id AND chosen.user_id = goal.user_id
         WHERE goal.active AND goal.user_id = ANY ($2::uuid[])
           AND ((goal.tenant_id, goal.user_id) IN (SELECT tenant_id, user_id
                                                     FROM unnest($1::uuid[], $2::uuid[])
                                                          AS asked (tenant_id, user_id))) IS TRUE
         GROUP BY goal.user_id
        """,
        [tenant_id for tenant_id, _ in users],
        [user_id for _, user_id in users],
    )
    return {row["user_id"]: Goals.read(row["contents"], Language(row["language"])) for row in rows}


async def _check_room(connection: Connection, caller: Caller) -> None:
    """Refuse one more goal than there may be, whoever else adds one at the same time."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"goals/{caller.user_id}"
    )
    there = await connection.fetchval(
        "SELECT count(*) FROM goals WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
    )
    if there >= MOST:
        raise QuotaExceeded("goals", there, MOST, "delete those that are reached", "goals")


async def _get(connection: Connection, caller: Caller, goal_id: UUID) -> Goal:
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM goals WHERE tenant_id = $1 AND user_id = $2 AND id = $3",  # noqa: S608 - constants
        caller.tenant_id,
        caller.user_id,
        goal_id,
    )
    if row is None:
        raise NotFound("goal")
    return _goal(row)


def _goal(row: Mapping[str, Any]) -> Goal:
    return Goal(
        row["id"],
        row["content"],
        row["active"],
        row["version"],
        row["created_at"],
        row["updated_at"],
    )
