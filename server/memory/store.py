"""Memories in Postgres: the long-term and the permanent tier."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from server import audit, consent, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.errors import AlreadyExists, EtagMismatch, NotFound
from server.memory.conversation import Place, Surroundings, place_of
from server.memory.model import (
    Change,
    Draft,
    Memory,
    hash_of,
    size_of,
)
from server.memory.rows import memory_from


class MemoryStore:
    """Keeps memories of one user at a time. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, caller: Caller, draft: Draft, request_id: str, now: datetime
    ) -> tuple[Memory, bool]:
        """Store a memory, or count the one with the same text as seen again.

        Returns:
            The memory, and whether it was created.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            RequestIdReused: The request id stands for other contents.
        """
        memory_id = ids.new_id()
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "CreateMemory", request_id, repr(draft).encode(), memory_id
                )
                if first_id != memory_id:
                    return await _get(connection, caller, first_id), False
            memory = await _insert(connection, caller, memory_id, draft, now)
            created = memory is not None
            if memory is None:
                memory = await _see_again(connection, caller, draft, now)
                if request_id:
                    await requests.redirect(
                        connection, caller, "CreateMemory", request_id, memory.id
                    )
            action = "memory.create" if created else "memory.see"
            await audit.record(connection, caller, action, ids.show(ids.MEMORY, memory.id))
            return memory, created

    async def create_all(self, caller: Caller, drafts: Sequence[Draft], now: datetime) -> int:
        """Store many memories in one transaction and return how many were new.

        Text that is there already stays as it is.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            created = await _insert_all(connection, caller, drafts, now)
            await audit.record_all(
                connection, caller, "memory.create", [ids.show(ids.MEMORY, new) for new in created]
            )
            return len(created)

    async def get(self, caller: Caller, memory_id: UUID) -> Memory:
        """Return a memory.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        rows = await self._database.fetch(
            caller,
            """
            SELECT id, tier, content, tags, source, session_id, session_position, speaker,
                   occurred_at, size_bytes, content_hash, version, created_at, updated_at,
                   last_seen_at, use_count, score, relevance_to_goals, emotional_weight,
                   predictive_value, recency_frequency, scorer_version, scored_at
              FROM memories AS memory
              JOIN memory_scores AS scores
                ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
             WHERE memory.tenant_id = caller.tenant_id AND memory.user_id = caller.user_id
               AND memory.id = $3
            """,
            memory_id,
        )
        if not rows:
            raise NotFound("memory")
        return memory_from(rows[0])

    async def update(
        self, caller: Caller, memory_id: UUID, change: Change, now: datetime
    ) -> Memory:
        """Change some fields of a memory.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            AlreadyExists: Another memory of the same tier and place has the new text.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            await _update(connection, caller, memory_id, change, now)
            await audit.record(connection, caller, "memory.update", ids.show(ids.MEMORY, memory_id))
            return await _get(connection, caller, memory_id)

    async def delete(self, caller: Caller, memory_id: UUID) -> list[UUID]:
        """Delete a memory and everything that hangs on it.

        Returns:
            Ids of its attachments, whose objects are still to be removed.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            doomed = await connection.fetchrow(
                """
                SELECT session_id, session_position
                  FROM memories
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                   FOR UPDATE
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
            )
            if doomed is None:
                raise NotFound("memory")
            place = _place(doomed)
            around = await Surroundings.of(connection, caller, [place] if place else [])
            attachments = await connection.fetch(
                """
                DELETE FROM attachments
                 WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
                RETURNING id
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
            )
            await connection.execute(
                """
                DELETE FROM memories
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
            )
            if place:
                await around.without(memory_id).refresh(connection, caller, [place])
            await audit.record(connection, caller, "memory.delete", ids.show(ids.MEMORY, memory_id))
        return [row["id"] for row in attachments]


async def _get(connection: Connection, caller: Caller, memory_id: UUID) -> Memory:
    row = await connection.fetchrow(
        """
        SELECT id, tier, content, tags, source, session_id, session_position, speaker,
               occurred_at, size_bytes, content_hash, version, created_at, updated_at,
               last_seen_at, use_count, score, relevance_to_goals, emotional_weight,
               predictive_value, recency_frequency, scorer_version, scored_at
          FROM memories AS memory
          JOIN memory_scores AS scores
            ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
         WHERE memory.tenant_id = $1 AND memory.user_id = $2 AND memory.id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )
    if row is None:
        raise NotFound("memory")
    return memory_from(row)


async def _insert(
    connection: Connection, caller: Caller, memory_id: UUID, draft: Draft, now: datetime
) -> Memory | None:
    """Insert a memory; None if its text is there already."""
    place = place_of(draft)
    around = await Surroundings.of(connection, caller, [place] if place else [])
    around = around.with_drafts([draft])
    row = await connection.fetchrow(
        """
        WITH created AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                                  session_position, speaker, occurred_at, size_bytes,
                                  content_hash, created_at, updated_at, terms)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $14, $15)
            ON CONFLICT DO NOTHING
            RETURNING id
        )
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
        SELECT $1, $2, id, $14 FROM created
        RETURNING memory_id
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
        draft.tier,
        draft.content,
        list(draft.tags),
        draft.source,
        draft.session_id,
        draft.session_position,
        draft.speaker,
        draft.occurred_at or now,
        draft.size_bytes,
        draft.content_hash,
        now,
        around.terms(draft.content, place),
    )
    if row is None:
        return None
    if place:
        await around.refresh(connection, caller, [place])
    return new_memory(memory_id, draft, now)


def new_memory(memory_id: UUID, draft: Draft, now: datetime) -> Memory:
    """Return the memory that a draft becomes."""
    return Memory(
        id=memory_id,
        tier=draft.tier,
        content=draft.content,
        tags=draft.tags,
        source=draft.source,
        session_id=draft.session_id,
        session_position=draft.session_position,
        speaker=draft.speaker,
        occurred_at=draft.occurred_at or now,
        size_bytes=draft.size_bytes,
        content_hash=draft.content_hash,
        version=1,
        created_at=now,
        updated_at=now,
        last_seen_at=now,
        use_count=0,
    )


async def _see_again(connection: Connection, caller: Caller, draft: Draft, now: datetime) -> Memory:
    """Count the memory with the same text as seen, and return it."""
    memory_id = await connection.fetchval(
        """
        UPDATE memory_scores
           SET use_count = use_count + 1, last_seen_at = greatest(last_seen_at, $8)
         WHERE tenant_id = $1 AND user_id = $2
           AND memory_id = (
               SELECT id
                 FROM memories
                WHERE tenant_id = $3 AND user_id = $2 AND tier = $4 AND content_hash = $5
                  AND session_id = $6 AND coalesce(session_position, -1) = $7
               )
        RETURNING memory_id
        """,
        caller.tenant_id,
        caller.user_id,
        caller.tenant_id,
        draft.tier,
        draft.content_hash,
        draft.session_id,
        -1 if draft.session_position is None else draft.session_position,
        now,
    )
    if memory_id is None:  # it was deleted between the two statements
        raise EtagMismatch
    return await _get(connection, caller, memory_id)


async def _insert_all(
    connection: Connection, caller: Caller, drafts: Sequence[Draft], now: datetime
) -> list[UUID]:
    """Insert memories, leave out those whose text is there already, return the new ids."""
    places = [place for draft in drafts if (place := place_of(draft))]
    around = await Surroundings.of(connection, caller, places)
    around = around.with_drafts(drafts)
    rows = await connection.fetch(
        """
        WITH created AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                                  session_position, speaker, occurred_at, size_bytes,
                                  content_hash, created_at, updated_at, terms)
            SELECT $1, $2, draft.id, draft.tier, draft.content,
                   string_to_array(draft.tags, E'\\x1f'), draft.source, draft.session_id,
                   draft.session_position, draft.speaker, draft.occurred_at, draft.size_bytes,
                   draft.content_hash, $3, $3, draft.terms
              FROM unnest($4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
                          $10::integer[], $11::text[], $12::timestamptz[], $13::integer[],
                          $14::bytea[], $15::sparsevec[])
                AS draft (id, tier, content, tags, source, session_id, session_position, speaker,
                          occurred_at, size_bytes, content_hash, terms)
            ON CONFLICT DO NOTHING
            RETURNING id
        )
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
        SELECT $1, $2, id, $3 FROM created
        RETURNING memory_id
        """,
        caller.tenant_id,
        caller.user_id,
        now,
        [ids.new_id() for _ in drafts],
        [draft.tier for draft in drafts],
        [draft.content for draft in drafts],
        ["\x1f".join(draft.tags) for draft in drafts],
        [draft.source for draft in drafts],
        [draft.session_id for draft in drafts],
        [draft.session_position for draft in drafts],
        [draft.speaker for draft in drafts],
        [draft.occurred_at or now for draft in drafts],
        [draft.size_bytes for draft in drafts],
        [draft.content_hash for draft in drafts],
        [around.terms(draft.content, place_of(draft)) for draft in drafts],
    )
    await around.refresh(connection, caller, places)
    return [row["memory_id"] for row in rows]


async def _update(
    connection: Connection, caller: Caller, memory_id: UUID, change: Change, now: datetime
) -> None:
    current = await connection.fetchrow(
        """
        SELECT content, tags, version, session_id, session_position
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
           FOR UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )
    if current is None:
        raise NotFound("memory")
    if change.expected_version not in (None, current["version"]):
        raise EtagMismatch
    content = current["content"] if change.content is None else change.content
    tags = tuple(current["tags"]) if change.tags is None else change.tags
    place = _place(current)
    around = await Surroundings.of(connection, caller, [place] if place else [])
    around = around.with_text(memory_id, content)
    try:
        await connection.execute(
            """
            UPDATE memories
               SET content = $4, tags = $5, speaker = coalesce($6, speaker),
                   occurred_at = coalesce($7, occurred_at), size_bytes = $8, content_hash = $9,
                   terms = $10, version = version + 1, updated_at = $11
             WHERE tenant_id = $1 AND user_id = $2 AND id = $3
            """,
            caller.tenant_id,
            caller.user_id,
            memory_id,
            content,
            list(tags),
            change.speaker,
            change.occurred_at,
            size_of(content, tags),
            hash_of(content),
            around.terms(content, place),
            now,
        )
    except asyncpg.UniqueViolationError as error:
        raise AlreadyExists("another memory of this tier and place has the same content") from error
    if content != current["content"]:
        if place:
            await around.refresh(connection, caller, [place])
        await _forget_text(connection, caller, memory_id)


async def _forget_text(connection: Connection, caller: Caller, memory_id: UUID) -> None:
    """Drop what models and a meditation made of a text that is no more."""
    await connection.execute(
        """
        WITH dropped AS (
            DELETE FROM embeddings WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
        )
        UPDATE memory_scores
           SET sentiment = NULL, text_version = text_version + 1
         WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )


def _place(row: asyncpg.Record) -> Place | None:
    if row["session_position"] is None:
        return None
    return Place(row["session_id"], row["session_position"])
