"""Undoing a meditation: what it archived of a user's comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, consent, ids
from server.caller import Caller
from server.database import Connection, SystemDatabase, enter
from server.embedding_requests import ask_for_embedding
from server.errors import AlreadyExists, StateConflict
from server.memory.conversation import Place, Surroundings, Turn, store_terms
from server.memory.meditation_store import Meditation, MeditationState, meditation_of
from server.memory.writing import Writing, begin_writing

_PAGE: Final = 200
_FIRST: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Undone:
    """What became of it."""

    meditation: Meditation
    restored: int
    kept_archived: int
    """They cannot come back: their text is there again, or may not be kept any more."""


class Undoing:
    """Acts as the system role, which gives back what it took whatever the quota says.

    Every page is one transaction, in the order of MemoryStore. What comes back counts as restored
    by its user: the machine never archives it again.
    """

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def undo(self, caller: Caller, meditation_id: UUID, now: datetime) -> Undone:
        """Bring back what a run archived. Repeated, it finds nothing more to bring back.

        Raises:
            NotFound: There is no such run.
            StateConflict: It is still running.
            ConsentMissing: The user has not consented to memory.store.
            AlreadyExists: The same text was stored again at this moment.
        """
        async with self._database.transaction() as connection:
            await enter(connection, caller)
            run = await meditation_of(connection, caller, meditation_id)
        if run.state is MeditationState.RUNNING:
            raise StateConflict("the meditation is still running")
        restored, after = 0, _FIRST
        while page := await self._restore_page(caller, meditation_id, after, now):
            restored, after = restored + page[0], page[1]
        async with self._database.transaction() as connection:
            await _note(connection, caller, meditation_id, now)
            kept = await _left(connection, caller, meditation_id)
            run = await meditation_of(connection, caller, meditation_id)
        return Undone(run, restored, kept)

    async def _restore_page(
        self, caller: Caller, meditation_id: UUID, after: UUID, now: datetime
    ) -> tuple[int, UUID] | None:
        """Restore the next memories; return how many, and the last that was looked at."""
        async with self._database.transaction() as connection:
            await enter(connection, caller)
            writing = await begin_writing(connection)
            rows = await _archived(connection, caller, meditation_id, after)
            if not rows:
                return None
            restored = await _restore(connection, caller, rows, writing, now)
            names = [ids.show(ids.MEMORY, memory_id) for memory_id in restored]
            await audit.record_all(connection, caller, "memory.restore", names)
            if restored and writing.wants_vectors:
                await ask_for_embedding(connection, caller)
        return len(restored), rows[-1]["id"]


async def _archived(
    connection: Connection, caller: Caller, meditation_id: UUID, after: UUID
) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await connection.fetch(
        """
        SELECT id, content, session_id, session_position
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND archived_in = $3 AND id > $4
         ORDER BY id
         LIMIT $5
        """,
        caller.tenant_id,
        caller.user_id,
        meditation_id,
        after,
        _PAGE,
    )
    return rows


async def _restore(
    connection: Connection,
    caller: Caller,
    rows: Sequence[asyncpg.Record],
    writing: Writing,
    now: datetime,
) -> list[UUID]:
    """Bring back those memories that can, with the words of the turns around them."""
    place_of = {
        row["id"]: Place(row["session_id"], row["session_position"])
        for row in rows
        if row["session_position"] is not None
    }
    around = await Surroundings.of(connection, caller, place_of.values(), writing.language)
    free = {
        row["id"]: row["is_sensitive"] for row in await _lock_free(connection, caller, list(rows))
    }
    plain = {row["id"]: row["content"] for row in rows if free.get(row["id"]) is False}
    turns = [Turn(one, place_of[one], plain[one]) for one in plain if one in place_of]
    around = around.including(*turns)
    await around.refresh(connection, caller, [turn.place for turn in turns])
    terms = {one: around.terms(text, place_of.get(one)) for one, text in plain.items()}
    await store_terms(connection, caller, terms)
    try:
        await connection.execute(
            """
            UPDATE memories
               SET archived_at = NULL, archived_by = NULL, delete_after = NULL,
                   archived_in = NULL, restored = true, version = version + 1, updated_at = $4
             WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3)
            """,
            caller.tenant_id,
            caller.user_id,
            list(free),
            now,
        )
    except asyncpg.UniqueViolationError as error:
        raise AlreadyExists("the same content is being stored again; try again") from error
    return list(free)


async def _lock_free(
    connection: Connection, caller: Caller, rows: Sequence[asyncpg.Record]
) -> list[asyncpg.Record]:
    """Lock those memories that are still archived and that nothing keeps from coming back."""
    locked: list[asyncpg.Record] = await connection.fetch(
        """
        SELECT id, sensitive AS is_sensitive
          FROM memories AS memory
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3) AND archived_in IS NOT NULL
           AND (NOT sensitive OR consented($4))
           AND NOT EXISTS (
               SELECT FROM memories AS again
                WHERE again.user_id = memory.user_id AND again.tier = memory.tier
                  AND again.content_hash = memory.content_hash
                  AND again.session_id = memory.session_id
                  AND coalesce(again.session_position, -1) = coalesce(memory.session_position, -1)
                  AND again.archived_at IS NULL)
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        [row["id"] for row in rows],
        consent.MEMORY_SENSITIVE,
    )
    return locked


async def _note(connection: Connection, caller: Caller, meditation_id: UUID, now: datetime) -> None:
    """Note that a run was undone, and tell the audit log the first time."""
    first = await connection.fetchval(
        """
        INSERT INTO meditation_users AS mine (tenant_id, user_id, meditation_id, undone_at)
        VALUES ($1, $2, $3, $4)
            ON CONFLICT (user_id, meditation_id) DO UPDATE
           SET undone_at = excluded.undone_at
         WHERE mine.undone_at IS NULL
        RETURNING true
        """,
        caller.tenant_id,
        caller.user_id,
        meditation_id,
        now,
    )
    if first:
        await audit.record(
            connection, caller, "meditation.undo", ids.show(ids.MEDITATION, meditation_id)
        )


async def _left(connection: Connection, caller: Caller, meditation_id: UUID) -> int:
    left: int = await connection.fetchval(
        """
        SELECT count(*)
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND archived_in = $3
        """,
        caller.tenant_id,
        caller.user_id,
        meditation_id,
    )
    return left
