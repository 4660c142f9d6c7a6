"""What becomes of memories in Postgres: archived, restored, protected, rated; their versions."""

from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg
from pgvector import SparseVector

from server import audit, consent, ids
from server.caller import Caller
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding
from server.errors import AlreadyExists
from server.memory.conversation import Surroundings, Turn
from server.memory.model import Memory
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from
from server.memory.store import fetch_memory
from server.memory.writing import (
    Standing,
    begin_writing,
    lock_memory,
    standing_of,
    touch,
    within_quota,
)

USUAL_GRACE: Final = timedelta(days=30)
"""How long an archived memory can be restored unless the user chose otherwise."""


class LifecycleStore:
    """Moves memories of one user at a time between their states, in the order of MemoryStore.

    Every method is one transaction. Archiving needs no consent: it takes away.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def archive(
        self,
        caller: Caller,
        memory_id: UUID,
        expected_version: int | None,
        now: datetime,
        *,
        grace: timedelta | None = None,
    ) -> Memory:
        """Put a memory away. One that is archived stays as it is, unless a grace period is given.

        Args:
            caller: Whose memory it is.
            memory_id: Its id.
            expected_version: Refuse any other; None for none.
            now: When it is archived.
            grace: After how long it is deleted for good; None: as the user's settings say.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
        """
        async with self._database.transaction(caller) as connection:
            standing = await standing_of(connection, caller, memory_id)
            around = await Surroundings.of(connection, caller, standing.places, standing.language)
            current = await lock_memory(connection, caller, memory_id, expected_version)
            if current["archived_at"] is None or grace is not None:
                await around.without(memory_id).refresh(connection, caller, standing.places)
                until = now + (grace or await _usual_grace(connection, caller))
                await _archive(connection, caller, memory_id, now, until)
                action = "memory.archive" if grace is None else "memory.delete_later"
                await audit.record(connection, caller, action, ids.show(ids.MEMORY, memory_id))
            return await fetch_memory(connection, caller, memory_id)

    async def restore(
        self, caller: Caller, memory_id: UUID, expected_version: int | None, now: datetime
    ) -> Memory:
        """Bring a memory back; one that is active stays as it is.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            AlreadyExists: The same text was stored again meanwhile.
            ConsentMissing: The user has not consented to memory.store, or it is sensitive and they
                have not consented to memory.sensitive.
            QuotaExceeded: There is no room for it any more.
        """
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection)
            standing = await standing_of(connection, caller, memory_id)
            around = await Surroundings.of(connection, caller, standing.places, writing.language)
            current = await lock_memory(connection, caller, memory_id, expected_version)
            if current["archived_at"] is not None:
                terms = None
                if current["sensitive"]:
                    await consent.require(connection, consent.MEMORY_SENSITIVE)
                else:
                    terms = await _rejoin(connection, caller, memory_id, standing, around, current)
                await _restore(connection, caller, memory_id, terms, now)
                await audit.record(
                    connection, caller, "memory.restore", ids.show(ids.MEMORY, memory_id)
                )
                if terms is not None and writing.wants_vectors:
                    await ask_for_embedding(connection, caller)
            return await fetch_memory(connection, caller, memory_id)

    async def protect(
        self,
        caller: Caller,
        memory_id: UUID,
        expected_version: int | None,
        now: datetime,
        *,
        protected: bool,
    ) -> Memory:
        """Protect a memory from being archived by the machine, or no longer do.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await begin_writing(connection)
            current = await lock_memory(connection, caller, memory_id, expected_version)
            if current["protected"] != protected:
                await connection.execute(
                    """
                    UPDATE memories
                       SET protected = $4, version = version + 1, updated_at = $5
                     WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                    """,
                    caller.tenant_id,
                    caller.user_id,
                    memory_id,
                    protected,
                    now,
                )
                action = "memory.protect" if protected else "memory.unprotect"
                await audit.record(connection, caller, action, ids.show(ids.MEMORY, memory_id))
            return await fetch_memory(connection, caller, memory_id)

    async def rate(
        self,
        caller: Caller,
        memory_id: UUID,
        opinion: float | None,
        now: datetime,
        *,
        useful: bool,
    ) -> Memory:
        """Note what a memory is worth to its user, and whether retrieving it helped.

        Args:
            caller: Whose memory it is.
            memory_id: Its id.
            opinion: 0 to 1; None leaves what was said before.
            now: When it is said.
            useful: Whether an answer that held the memory was helped by it.

        Raises:
            NotFound: There is none, or it is not the caller's.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await begin_writing(connection)
            await lock_memory(connection, caller, memory_id, None)
            await connection.execute(
                """
                UPDATE memory_scores
                   SET feedback = coalesce($4, feedback), useful_count = useful_count + $5,
                       last_seen_at = greatest(last_seen_at, $6)
                 WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
                opinion,
                int(useful),
                now,
            )
            await touch(connection, caller)
            await audit.record(
                connection, caller, "memory.feedback", ids.show(ids.MEMORY, memory_id)
            )
            return await fetch_memory(connection, caller, memory_id)

    async def versions(
        self, caller: Caller, memory_id: UUID, *, before: int | None, limit: int
    ) -> list[Memory]:
        """Return a memory as it is and as it was, newest version first, without its score.

        Args:
            caller: Whose memory it is.
            memory_id: Its id.
            before: Only versions below this one; None for all.
            limit: How many at most.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            newest = await fetch_memory(connection, caller, memory_id)
            rows = await connection.fetch(
                f"""
                SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
                  FROM (
                        SELECT memory.tenant_id, memory.user_id, memory.id, old.tier, old.content,
                               old.tags, old.channels, memory.source, memory.session_id,
                               memory.session_position, old.speaker, old.occurred_at,
                               old.size_bytes, old.content_hash, old.version, memory.created_at,
                               old.updated_at, old.scope, old.protected, old.sensitive,
                               old.sealed, memory.created_by,
                               memory.consent_version, old.archived_at, NULL AS delete_after,
                               scores.last_seen_at, scores.use_count, scores.feedback,
                               NULL AS score, NULL AS relevance_to_goals,
                               NULL AS emotional_weight, NULL AS predictive_value,
                               NULL AS recency_frequency, NULL AS scorer_version,
                               NULL AS scored_at
                          FROM memory_versions AS old
                          JOIN memories AS memory
                            ON memory.user_id = old.user_id AND memory.id = old.memory_id
                          JOIN memory_scores AS scores
                            ON scores.user_id = old.user_id AND scores.memory_id = old.memory_id
                         WHERE old.tenant_id = $1 AND old.user_id = $2 AND old.memory_id = $3
                           AND ($4::bigint IS NULL OR old.version < $4)
                         ORDER BY old.version DESC
                         LIMIT $5
                       ) AS version
                 ORDER BY version DESC
                """,  # noqa: S608 - constants
                caller.tenant_id,
                caller.user_id,
                memory_id,
                before,
                limit,
            )
        older = [memory_from(row) for row in rows]
        return [newest, *older][:limit] if before is None else older


async def _usual_grace(connection: Connection, caller: Caller) -> timedelta:
    days = await connection.fetchval(
        "SELECT archive_grace_days FROM settings WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
    )
    return USUAL_GRACE if days is None else timedelta(days=days)


async def _archive(
    connection: Connection, caller: Caller, memory_id: UUID, now: datetime, until: datetime
) -> None:
    await connection.execute(
        """
        UPDATE memories
           SET archived_at = coalesce(archived_at, $4), archived_by = 'user', delete_after = $5,
               archived_in = NULL, restored = false, version = version + 1, updated_at = $4
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
        now,
        until,
    )


async def _rejoin(
    connection: Connection,
    caller: Caller,
    memory_id: UUID,
    standing: Standing,
    around: Surroundings,
    current: asyncpg.Record,
) -> SparseVector:
    """Give the turns around a memory its words again, and return its terms."""
    if standing.place:
        around = around.including(Turn(memory_id, standing.place, current["content"]))
    await around.refresh(connection, caller, standing.places)
    return around.terms(current["content"], standing.place)


async def _restore(
    connection: Connection,
    caller: Caller,
    memory_id: UUID,
    terms: SparseVector | None,
    now: datetime,
) -> None:
    """Bring a memory back, with new terms; None: with those it had."""
    try:
        with within_quota():
            await connection.execute(
                """
                UPDATE memories
                   SET archived_at = NULL, archived_by = NULL, delete_after = NULL,
                       archived_in = NULL, restored = true, terms = coalesce($4, terms),
                       version = version + 1, updated_at = $5
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
                terms,
                now,
            )
    except asyncpg.UniqueViolationError as error:
        raise AlreadyExists("the same content was stored again meanwhile") from error
