"""Memories in Postgres: the long-term and the permanent tier."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from server import audit, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.errors import AlreadyExists, EtagMismatch, InvalidArgument, NotFound, StateConflict
from server.memory.conversation import Surroundings, place_of
from server.memory.model import Change, Draft, Memory, Tier, hash_of, size_of
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from
from server.memory.writing import (
    Writing,
    begin_writing,
    lock_memory,
    standing_of,
    within_quota,
)


class MemoryStore:
    """Keeps memories of one user at a time. Every method is one transaction.

    All of them lock in one order, so that none waits for another in a circle: the conversation,
    the memory, the turns around it, then what hangs on the memory, and the user's usage last.
    """

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
            QuotaExceeded: It does not fit into its tier.
            RequestIdReused: The request id stands for other contents.
        """
        memory_id = ids.new_id()
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection, caller)
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "CreateMemory", request_id, repr(draft).encode(), memory_id
                )
                if first_id != memory_id:
                    return await fetch_memory(connection, caller, first_id), False
            memory = await _insert(connection, caller, memory_id, draft, writing, now)
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
            QuotaExceeded: They do not fit into their tiers.
        """
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection, caller)
            created = await _insert_all(connection, caller, drafts, writing, now)
            await audit.record_all(
                connection, caller, "memory.create", [ids.show(ids.MEMORY, new) for new in created]
            )
            return len(created)

    async def get(self, caller: Caller, memory_id: UUID) -> Memory:
        """Return a memory, archived or not.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        rows = await self._database.fetch(
            caller,
            f"""
            SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
              FROM memories AS memory
              JOIN memory_scores AS scores
                ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
             WHERE memory.tenant_id = caller.tenant_id AND memory.user_id = caller.user_id
               AND memory.id = $3
            """,  # noqa: S608 - constants
            memory_id,
        )
        if not rows:
            raise NotFound("memory")
        return memory_from(rows[0])

    async def update(
        self, caller: Caller, memory_id: UUID, change: Change, now: datetime
    ) -> Memory:
        """Change some fields of a memory, its tier among them.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            StateConflict: It is archived.
            AlreadyExists: Another memory of the same tier and place has the new text.
            InvalidArgument: It would become a short-term memory.
            ConsentMissing: The user has not consented to memory.store.
            QuotaExceeded: It does not fit into its tier any more.
        """
        if change.tier is Tier.SHORT_TERM:
            raise InvalidArgument(
                "memory.tier", "a durable memory does not become short-term; archive or delete it"
            )
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection, caller)
            await _update(connection, caller, memory_id, change, writing, now)
            await audit.record(connection, caller, "memory.update", ids.show(ids.MEMORY, memory_id))
            return await fetch_memory(connection, caller, memory_id)

    async def delete(self, caller: Caller, memory_id: UUID) -> list[UUID]:
        """Delete a memory and everything that hangs on it, for good.

        Returns:
            Ids of its attachments, whose objects are still to be removed.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            standing = await standing_of(connection, caller, memory_id)
            around = await Surroundings.of(connection, caller, standing.places, standing.language)
            await around.without(memory_id).refresh(connection, caller, standing.places)
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
            await audit.record(connection, caller, "memory.delete", ids.show(ids.MEMORY, memory_id))
        return [row["id"] for row in attachments]


async def fetch_memory(connection: Connection, caller: Caller, memory_id: UUID) -> Memory:
    """Return a memory as the running transaction sees it.

    Raises:
        NotFound: There is none, or it is not the caller's.
    """
    row = await connection.fetchrow(
        f"""
        SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
          FROM memories AS memory
          JOIN memory_scores AS scores
            ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
         WHERE memory.tenant_id = $1 AND memory.user_id = $2 AND memory.id = $3
        """,  # noqa: S608 - constants
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )
    if row is None:
        raise NotFound("memory")
    return memory_from(row)


async def _insert(
    connection: Connection,
    caller: Caller,
    memory_id: UUID,
    draft: Draft,
    writing: Writing,
    now: datetime,
) -> Memory | None:
    """Insert a memory; None if its text is there already."""
    place = place_of(draft)
    places = [place] if place else []
    around = await Surroundings.of(connection, caller, places, writing.language)
    around = around.with_drafts([draft])
    await around.refresh(connection, caller, places)
    with within_quota():
        row = await connection.fetchrow(
            """
            WITH created AS (
                INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source,
                                      session_id, session_position, speaker, occurred_at,
                                      size_bytes, content_hash, created_at, updated_at, terms,
                                      channels, scope, protected, consent_version)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $14, $15,
                        $16, $17, $18, $19)
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
            list(draft.channels),
            draft.scope,
            draft.is_protected,
            writing.consent_version,
        )
    return new_memory(memory_id, draft, writing.consent_version, now) if row else None


def new_memory(memory_id: UUID, draft: Draft, consent_version: int, now: datetime) -> Memory:
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
        channels=draft.channels,
        scope=draft.scope,
        is_protected=draft.is_protected,
        consent_version=consent_version,
    )


async def _see_again(connection: Connection, caller: Caller, draft: Draft, now: datetime) -> Memory:
    """Count the memory with the same text as seen, and return it."""
    memory_id = await connection.fetchval(
        """
        UPDATE memory_scores
           SET use_count = use_count + 1, last_seen_at = greatest(last_seen_at, $7)
         WHERE tenant_id = $1 AND user_id = $2
           AND memory_id = (
               SELECT id
                 FROM memories
                WHERE tenant_id = $1 AND user_id = $2 AND tier = $3 AND content_hash = $4
                  AND session_id = $5 AND coalesce(session_position, -1) = $6
                  AND archived_at IS NULL
               )
        RETURNING memory_id
        """,
        caller.tenant_id,
        caller.user_id,
        draft.tier,
        draft.content_hash,
        draft.session_id,
        -1 if draft.session_position is None else draft.session_position,
        now,
    )
    if memory_id is None:  # it was deleted between the two statements
        raise EtagMismatch
    return await fetch_memory(connection, caller, memory_id)


async def _insert_all(
    connection: Connection,
    caller: Caller,
    drafts: Sequence[Draft],
    writing: Writing,
    now: datetime,
) -> list[UUID]:
    """Insert memories, leave out those whose text is there already, return the new ids."""
    places = [place for draft in drafts if (place := place_of(draft))]
    around = await Surroundings.of(connection, caller, places, writing.language)
    around = around.with_drafts(drafts)
    await around.refresh(connection, caller, places)
    with within_quota():
        rows = await connection.fetch(
            """
            WITH created AS (
                INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source,
                                      session_id, session_position, speaker, occurred_at,
                                      size_bytes, content_hash, created_at, updated_at, terms,
                                      channels, scope, protected, consent_version)
                SELECT $1, $2, draft.id, draft.tier, draft.content,
                       string_to_array(draft.tags, E'\\x1f'), draft.source, draft.session_id,
                       draft.session_position, draft.speaker, draft.occurred_at,
                       draft.size_bytes, draft.content_hash, $3, $3, draft.terms,
                       string_to_array(draft.channels, E'\\x1f'), draft.scope, draft.protected, $4
                  FROM unnest($5::uuid[], $6::text[], $7::text[], $8::text[], $9::text[],
                              $10::text[], $11::integer[], $12::text[], $13::timestamptz[],
                              $14::integer[], $15::bytea[], $16::sparsevec[], $17::text[],
                              $18::text[], $19::boolean[])
                    AS draft (id, tier, content, tags, source, session_id, session_position,
                              speaker, occurred_at, size_bytes, content_hash, terms, channels,
                              scope, protected)
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
            writing.consent_version,
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
            ["\x1f".join(draft.channels) for draft in drafts],
            [draft.scope for draft in drafts],
            [draft.is_protected for draft in drafts],
        )
    return [row["memory_id"] for row in rows]


async def _update(
    connection: Connection,
    caller: Caller,
    memory_id: UUID,
    change: Change,
    writing: Writing,
    now: datetime,
) -> None:
    standing = await standing_of(connection, caller, memory_id)
    around = await Surroundings.of(connection, caller, standing.places, writing.language)
    current = await lock_memory(connection, caller, memory_id, change.expected_version)
    if current["archived_at"] is not None:
        raise StateConflict("the memory is archived; restore it first")
    content = current["content"] if change.content is None else change.content
    tags = tuple(current["tags"]) if change.tags is None else change.tags
    around = around.with_text(memory_id, content)
    if content != current["content"]:
        await around.refresh(connection, caller, standing.places)
        await _forget_text(connection, caller, memory_id)
    try:
        with within_quota():
            await connection.execute(
                """
                UPDATE memories
                   SET content = $4, tags = $5, speaker = coalesce($6, speaker),
                       occurred_at = coalesce($7, occurred_at), size_bytes = $8,
                       content_hash = $9, terms = $10, version = version + 1, updated_at = $11,
                       channels = coalesce($12, channels), scope = coalesce($13, scope),
                       tier = coalesce($14, tier), consent_version = $15
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
                around.terms(content, standing.place),
                now,
                None if change.channels is None else list(change.channels),
                change.scope,
                change.tier,
                writing.consent_version,
            )
    except asyncpg.UniqueViolationError as error:
        raise AlreadyExists("another memory of this tier and place has the same content") from error


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
