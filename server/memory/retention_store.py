"""What time does to memories in Postgres: unseen ones are archived, archived ones deleted."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.memory.conversation import Place, Surroundings
from server.memory.lifecycle_store import USUAL_GRACE
from server.memory.objects import Kind, ObjectName, doom
from server.preferences import Language

REQUESTS_KNOWN: Final = timedelta(days=7)
"""How long a request id is known again."""

_NOBODY: Final[Mapping[Caller, int]] = MappingProxyType({})


class RetentionStore:
    """Keeps house over the memories of all users. Every method is one transaction."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def archive_unseen(self, now: datetime, limit: int) -> int:
        """Archive long-term memories that were not seen for as long as their user chose.

        Protected memories stay, and those that the user restored. One call does the memories of
        one user.

        Returns:
            How many were archived, at most `limit`; 0 when none is left.
        """
        async with self._database.transaction() as connection:
            unseen = await _unseen(connection, now, limit)
            if not unseen:
                return 0
            first = unseen[0]
            caller = Caller(first["tenant_id"], first["user_id"])
            days = first["archive_grace_days"]
            archived = await archive_all(
                connection,
                caller,
                [row["id"] for row in unseen],
                Language(first["language"]),
                now,
                USUAL_GRACE if days is None else timedelta(days=days),
            )
            return len(archived)

    async def delete_due(
        self,
        now: datetime,
        limit: int,
        whose: Caller | None = None,
        *,
        meditation_id: UUID | None = None,
    ) -> int:
        """Delete for good what is archived and past its grace period, the longest due first.

        Versions, scores, vectors and the rows of attachments go with it; the objects of the
        attachments are noted as doomed. No neighbour has words of an archived turn, so that no
        conversation is touched. Several sweepers at once take different memories.

        Args:
            now: What is due by then.
            limit: How many at most.
            whose: Only this user's; None: everybody's.
            meditation_id: The nightly run that does it, which tells each user of their own.

        Returns:
            How many were deleted, at most `limit`.
        """
        async with self._database.transaction() as connection:
            due = await connection.fetch(
                """
                SELECT tenant_id, user_id, id
                  FROM memories
                 WHERE archived_at IS NOT NULL AND delete_after <= $1
                   AND ($4::uuid IS NULL OR (tenant_id = $3 AND user_id = $4))
                 ORDER BY delete_after, user_id, id
                 LIMIT $2
                   FOR UPDATE SKIP LOCKED
                """,
                now,
                limit,
                whose.tenant_id if whose else None,
                whose.user_id if whose else None,
            )
            await _doom_attachments(connection, due)
            await connection.execute(
                """
                DELETE FROM memories
                 USING unnest($1::uuid[], $2::uuid[]) AS due (user_id, id)
                 WHERE memories.user_id = due.user_id AND memories.id = due.id
                """,
                [row["user_id"] for row in due],
                [row["id"] for row in due],
            )
            by_user = _by_user(due)
            for caller, memory_ids in by_user.items():
                await _record(connection, caller, "memory.delete", memory_ids)
            if meditation_id:
                deleted = {caller: len(memory_ids) for caller, memory_ids in by_user.items()}
                await tell_users(connection, meditation_id, deleted=deleted)
        return len(due)

    async def count_due(self, now: datetime, caller: Caller) -> int:
        """Return how many memories of a user `delete_due` would delete."""
        async with self._database.transaction() as connection:
            due: int = await connection.fetchval(
                """
                SELECT count(*)
                  FROM memories
                 WHERE tenant_id = $1 AND user_id = $2
                   AND archived_at IS NOT NULL AND delete_after <= $3
                """,
                caller.tenant_id,
                caller.user_id,
                now,
            )
        return due

    async def forget_requests(self, now: datetime) -> int:
        """Forget which requests were made longer ago than a retry takes, and return how many."""
        async with self._database.transaction() as connection:
            status = await connection.execute(
                "DELETE FROM requests WHERE created_at < $1", now - REQUESTS_KNOWN
            )
        return int(status.removeprefix("DELETE "))


async def tell_users(
    connection: Connection,
    meditation_id: UUID,
    *,
    archived: Mapping[Caller, int] = _NOBODY,
    promoted: Mapping[Caller, int] = _NOBODY,
    deleted: Mapping[Caller, int] = _NOBODY,
) -> None:
    """Add to what a run tells users that it did to their memories."""
    users = sorted({*archived, *promoted, *deleted}, key=lambda caller: caller.user_id)
    await connection.execute(
        """
        INSERT INTO meditation_users AS mine
               (tenant_id, user_id, meditation_id, archived, promoted, deleted)
        SELECT tenant_id, user_id, $1, archived, promoted, deleted
          FROM unnest($2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[])
               AS done (tenant_id, user_id, archived, promoted, deleted)
            ON CONFLICT (user_id, meditation_id) DO UPDATE
           SET archived = mine.archived + excluded.archived,
               promoted = mine.promoted + excluded.promoted,
               deleted = mine.deleted + excluded.deleted
        """,
        meditation_id,
        [caller.tenant_id for caller in users],
        [caller.user_id for caller in users],
        *([done.get(caller, 0) for caller in users] for done in (archived, promoted, deleted)),
    )


async def archive_all(
    connection: Connection,
    caller: Caller,
    memory_ids: Sequence[UUID],
    language: Language,
    now: datetime,
    grace: timedelta,
    *,
    meditation_id: UUID | None = None,
) -> list[UUID]:
    """Put away those of a user's memories that are still active and not protected.

    Locks in the order of MemoryStore: conversations, memories, neighbours, usage.

    Args:
        connection: A transaction of the system role.
        caller: Whose memories they are.
        memory_ids: Which.
        language: What their words are read in.
        now: When they are archived.
        grace: After how long they are deleted for good.
        meditation_id: The run that does it, which can be undone.

    Returns:
        Those that were archived.
    """
    places = await _places_of(connection, caller, memory_ids)
    around = await Surroundings.of(connection, caller, places, language)
    archived = await _lock_active(connection, caller, memory_ids)
    await around.without(*archived).refresh(connection, caller, places)
    await connection.execute(
        """
        UPDATE memories
           SET archived_at = $4, archived_by = 'system', delete_after = $5,
               archived_in = $6, version = version + 1, updated_at = $4
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3)
        """,
        caller.tenant_id,
        caller.user_id,
        archived,
        now,
        now + grace,
        meditation_id,
    )
    await _record(connection, caller, "memory.archive", archived)
    return archived


async def _places_of(
    connection: Connection, caller: Caller, memory_ids: Sequence[UUID]
) -> list[Place]:
    """Return where those of the memories stand that are turns of a conversation."""
    rows = await connection.fetch(
        """
        SELECT session_id, session_position
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3)
           AND session_position IS NOT NULL
        """,
        caller.tenant_id,
        caller.user_id,
        memory_ids,
    )
    return [Place(row["session_id"], row["session_position"]) for row in rows]


async def _lock_active(
    connection: Connection, caller: Caller, memory_ids: Sequence[UUID]
) -> list[UUID]:
    """Lock those of the memories that the mesh may archive, and return their ids."""
    rows = await connection.fetch(
        """
        SELECT id
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3)
           AND archived_at IS NULL AND NOT protected AND NOT restored
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        memory_ids,
    )
    return [row["id"] for row in rows]


async def _unseen(connection: Connection, now: datetime, limit: int) -> list[asyncpg.Record]:
    """Return memories of the first user who has some that were not seen for too long."""
    rows: list[asyncpg.Record] = await connection.fetch(
        """
        SELECT chosen.tenant_id, chosen.user_id, chosen.language, chosen.archive_grace_days,
               unseen.id
          FROM settings AS chosen
          CROSS JOIN LATERAL (
               SELECT memory.id
                 FROM memories AS memory
                 JOIN memory_scores AS scores
                   ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
                WHERE memory.tenant_id = chosen.tenant_id AND memory.user_id = chosen.user_id
                  AND memory.tier = 'long_term' AND memory.archived_at IS NULL
                  AND NOT memory.protected AND NOT memory.restored
                  AND scores.last_seen_at
                      < $1::timestamptz - make_interval(days => chosen.long_term_days)
                ORDER BY memory.id
                LIMIT $2
               ) AS unseen
         WHERE chosen.long_term_days IS NOT NULL
         ORDER BY chosen.user_id
         LIMIT $2
        """,
        now,
        limit,
    )
    return [row for row in rows if row["user_id"] == rows[0]["user_id"]]


async def _doom_attachments(connection: Connection, due: Sequence[asyncpg.Record]) -> None:
    rows = await connection.fetch(
        """
        SELECT attachment.tenant_id, attachment.user_id, attachment.id
          FROM attachments AS attachment
          JOIN unnest($1::uuid[], $2::uuid[]) AS due (user_id, id)
            ON attachment.user_id = due.user_id AND attachment.memory_id = due.id
        """,
        [row["user_id"] for row in due],
        [row["id"] for row in due],
    )
    owners = [(Caller(row["tenant_id"], row["user_id"]), row["id"]) for row in rows]
    await doom(connection, [ObjectName(Kind.ATTACHMENT, owner, each) for owner, each in owners])


def _by_user(rows: Sequence[asyncpg.Record]) -> dict[Caller, list[UUID]]:
    found: dict[Caller, list[UUID]] = {}
    for row in rows:
        found.setdefault(Caller(row["tenant_id"], row["user_id"]), []).append(row["id"])
    return found


async def _record(
    connection: Connection, caller: Caller, action: str, memory_ids: Sequence[UUID]
) -> None:
    names = [ids.show(ids.MEMORY, memory_id) for memory_id in memory_ids]
    await audit.record_all(connection, caller, action, names, actor=audit.SYSTEM)
