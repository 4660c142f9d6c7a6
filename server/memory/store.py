"""Memories in Postgres: the long-term and the permanent tier."""

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final
from uuid import UUID

import asyncpg
from pgvector import SparseVector

from server import audit, ids, requests
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding
from server.errors import AlreadyExists, InvalidArgument, NotFound, StateConflict
from server.memory.attachment_store import doom_objects
from server.memory.conversation import Surroundings, Turn, place_of
from server.memory.embedding_store import hold_vectors
from server.memory.insertion import AtOnce, Insertion, insert, new_memory
from server.memory.model import Change, Draft, Memory, Scope, Tier, hash_of, size_of
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from
from server.memory.sensitive import Sealing, begin_sealing
from server.memory.writing import (
    Overtaken,
    Standing,
    Writing,
    begin_writing,
    lock_memory,
    standing_of,
    touch,
    until_settled,
    within_quota,
)

_MADE_TOGETHER: Final = (1 << 7) - 1
"""Ids that are made together differ there, and nowhere else."""

_VERSIONS_AT_ONCE: Final = 50
"""How many versions of a memory are sealed in one statement."""


class _IsSensitive(Exception):
    """The memory is, which nobody knew before: its user's key is needed."""


class MemoryStore:
    """Keeps memories of one user at a time. Every method is one transaction.

    All of them lock in one order, so that none waits for another in a circle: the conversation,
    the memory, the turns around it, then what hangs on the memory, and the user's usage last.
    What they return of a sensitive memory that was there before is sealed.
    """

    def __init__(self, database: Database, keys: DataKeys) -> None:
        self._database = database
        self._keys = keys
        self._at_once = AtOnce(database)

    async def create(
        self, caller: Caller, draft: Draft, request_id: str, now: datetime
    ) -> tuple[Memory, bool]:
        """Store a memory, or count the one with the same text as seen again.

        Returns:
            The memory, and whether it was created.

        Raises:
            ConsentMissing: The user has not consented to memory.store, or it is sensitive and they
                have not consented to memory.sensitive.
            QuotaExceeded: It does not fit into its tier.
            RequestIdReused: The request id stands for other contents.
            ContentUnreadable: It is sensitive, and the user's key cannot be unwrapped.
            StoreUnavailable: It is sensitive, and the key manager does not answer,
                or others keep changing what has the same text.
        """
        new = await self._at_once.create(caller, draft, request_id, now)
        if new is not None:
            return new, True
        return await until_settled(partial(self._create, caller, draft, request_id, now))

    async def _create(
        self, caller: Caller, draft: Draft, request_id: str, now: datetime
    ) -> tuple[Memory, bool]:
        memory_id = ids.new_id()
        if draft.is_sensitive:
            await self._keys.prepare(caller)
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection)
            self._at_once.learn(caller, writing.language)
            sealing, contents = None, repr(draft).encode()
            if draft.is_sensitive:
                sealing = await begin_sealing(connection, caller, self._keys, writing.language)
                draft, contents = sealing.recognised(draft), sealing.hash_of(repr(draft))
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "CreateMemory", request_id, contents, memory_id
                )
                if first_id != memory_id:
                    return await fetch_memory(connection, caller, first_id), False
            memory = await _insert(connection, caller, memory_id, draft, writing, now, sealing)
            created = memory is not None
            if memory is None:
                memory = await _see_again(connection, caller, draft, now)
                if request_id:
                    await requests.redirect(
                        connection, caller, "CreateMemory", request_id, memory.id
                    )
            action = "memory.create" if created else "memory.see"
            await audit.record(connection, caller, action, ids.show(ids.MEMORY, memory.id))
            if created and not memory.is_sensitive and writing.wants_vectors:
                await ask_for_embedding(connection, caller)
            return memory, created

    async def made(self, caller: Caller, request_id: str) -> Memory:
        """Return the memory that an earlier `create` under a request id made.

        Raises:
            NotFound: There is none, or it is gone since.
        """
        async with self._database.transaction(caller) as connection:
            memory_id = await requests.made(connection, caller, "CreateMemory", request_id)
            if memory_id is None:
                raise NotFound("memory")
            return await fetch_memory(connection, caller, memory_id)

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
        """Change some fields of a memory, its tier and whether it is sensitive among them.

        One that is marked as sensitive is sealed with all it was before.

        Raises:
            NotFound: There is none, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            StateConflict: It is archived.
            AlreadyExists: Another memory of the same tier and place has the new text.
            InvalidArgument: It would become a short-term memory, or be both sensitive and shared.
            ConsentMissing: The user has not consented to memory.store, or it stays or becomes
                sensitive and they have not consented to memory.sensitive.
            QuotaExceeded: It does not fit into its tier any more.
            ContentUnreadable: It is sensitive and does not open.
            StoreUnavailable: It is sensitive, and the key manager does not answer.
        """
        if change.tier is Tier.SHORT_TERM:
            raise InvalidArgument(
                "memory.tier", "a durable memory does not become short-term; archive or delete it"
            )
        try:
            return await self._update(
                caller, memory_id, change, now, with_key=bool(change.is_sensitive)
            )
        except _IsSensitive:
            return await self._update(caller, memory_id, change, now, with_key=True)

    async def _update(
        self, caller: Caller, memory_id: UUID, change: Change, now: datetime, *, with_key: bool
    ) -> Memory:
        if with_key:
            await self._keys.prepare(caller)
        async with self._database.transaction(caller) as connection:
            writing, sealing = await begin_writing(connection), None
            if with_key:
                sealing = await begin_sealing(
                    connection,
                    caller,
                    self._keys,
                    writing.language,
                    needs_consent=change.is_sensitive is not False,
                )
            if change.is_sensitive:
                await hold_vectors(connection, caller)
            lacks_vector = await _update(
                connection, caller, memory_id, change, writing, now, sealing
            )
            await audit.record(connection, caller, "memory.update", ids.show(ids.MEMORY, memory_id))
            if lacks_vector and writing.wants_vectors:
                await ask_for_embedding(connection, caller)
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
            await doom_objects(connection, caller, [row["id"] for row in attachments])
            deleted = await connection.fetchval(
                """
                DELETE FROM memories
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                RETURNING id
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
            )
            if deleted is None:  # somebody was faster: the deletion is theirs to tell
                raise NotFound("memory")
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
    sealing: Sealing | None,
) -> Memory | None:
    """Insert a memory; None if its text is there already.

    Args:
        connection: A transaction.
        caller: Whose memory it is.
        memory_id: Its id.
        draft: The memory.
        writing: Under which conditions it is written.
        now: When.
        sealing: How its content is kept if it is sensitive; None: in the clear.
    """
    place = place_of(draft)
    places = [place] if place else []
    around = await Surroundings.of(connection, caller, places, writing.language)
    around = around.with_drafts([draft])
    await around.refresh(connection, caller, places)
    terms = sealing.terms_of(draft.content) if sealing else around.terms(draft.content, place)
    sealed = sealing.seal(memory_id, draft.content) if sealing else None
    insertion = Insertion(memory_id, draft, terms, now, writing.consent_version, sealed)
    if not await insert(connection, caller, insertion):
        return None
    return new_memory(caller, memory_id, draft, writing.consent_version, now)


def first_of(memory_id: UUID) -> UUID:
    """Return the first id of those that are made together with one.

    The request that makes several turns is known by it.
    """
    return UUID(int=memory_id.int & ~_MADE_TOGETHER)


async def _see_again(connection: Connection, caller: Caller, draft: Draft, now: datetime) -> Memory:
    """Count the memory with the same text as seen, and return it."""
    memory_id = await connection.fetchval(
        """
        WITH same AS MATERIALIZED (
            SELECT id
              FROM memories
             WHERE tenant_id = $1 AND user_id = $2 AND tier = $3 AND content_hash = $4
               AND session_id = $5 AND coalesce(session_position, -1) = $6
               AND archived_at IS NULL
               FOR NO KEY UPDATE
        )
        UPDATE memory_scores
           SET use_count = use_count + 1, last_seen_at = greatest(last_seen_at, $7)
         WHERE tenant_id = $1 AND user_id = $2 AND memory_id = (SELECT id FROM same)
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
    if memory_id is None:  # it went, or changed, after the insert had met it
        raise Overtaken
    await touch(connection, caller)
    return await fetch_memory(connection, caller, memory_id)


@dataclass(frozen=True, slots=True)
class _Text:
    """What a memory says, or is to say."""

    content: str
    is_sensitive: bool


async def _update(
    connection: Connection,
    caller: Caller,
    memory_id: UUID,
    change: Change,
    writing: Writing,
    now: datetime,
    sealing: Sealing | None,
) -> bool:
    """Change a memory, and return whether a model has not seen yet what it says, and may.

    Raises:
        _IsSensitive: It is, and there is nothing to open it with.
    """
    standing = await standing_of(connection, caller, memory_id)
    around = await Surroundings.of(connection, caller, standing.places, writing.language)
    current = await lock_memory(connection, caller, memory_id, change.expected_version)
    if current["archived_at"] is not None:
        raise StateConflict("the memory is archived; restore it first")
    old = _read(memory_id, current, sealing)
    new = _changed(old, current, change)
    around = _retold(around, memory_id, standing, old, new)
    if new != old:
        await around.refresh(connection, caller, standing.places)
        await _forget_text(connection, caller, memory_id)
    elif change.tags is not None:
        await _forget_match(connection, caller, memory_id)
    tags = tuple(current["tags"]) if change.tags is None else change.tags
    if sealing and new.is_sensitive:
        body = _sealed_body(memory_id, new.content, tags, sealing)
    else:
        body = _plain_body(new.content, tags, around.terms(new.content, standing.place))
    await _rewrite(connection, caller, memory_id, change, body, writing, now)
    if sealing and new.is_sensitive and not old.is_sensitive:
        await _seal_versions(connection, memory_id, sealing)
        await requests.forget(connection, caller, [memory_id, first_of(memory_id)])
    return new != old and not new.is_sensitive


def _read(memory_id: UUID, current: asyncpg.Record, sealing: Sealing | None) -> _Text:
    """Return what a memory says."""
    if current["sealed"] is None:
        return _Text(current["content"], is_sensitive=False)
    if sealing is None:
        raise _IsSensitive
    return _Text(sealing.open(memory_id, current["sealed"]), is_sensitive=True)


def _changed(old: _Text, current: asyncpg.Record, change: Change) -> _Text:
    """Return what a memory is to say."""
    is_sensitive = old.is_sensitive if change.is_sensitive is None else change.is_sensitive
    if is_sensitive and Scope(change.scope or current["scope"]) is not Scope.PRIVATE:
        raise InvalidArgument("memory.scope", "must be private: the memory is sensitive")
    return _Text(old.content if change.content is None else change.content, is_sensitive)


def _retold(
    around: Surroundings, memory_id: UUID, standing: Standing, old: _Text, new: _Text
) -> Surroundings:
    """Return the surroundings once a memory says something else: sensitive ones stand alone."""
    if new.is_sensitive:
        return around.without(memory_id)
    if old.is_sensitive and standing.place:
        return around.including(Turn(memory_id, standing.place, new.content))
    return around.with_text(memory_id, new.content)


@dataclass(frozen=True, slots=True)
class _Body:
    """What a row holds of a text, and of the tags."""

    content: str
    sealed: bytes | None
    content_hash: bytes
    terms: SparseVector
    tags: tuple[str, ...]
    size_bytes: int


def _plain_body(content: str, tags: tuple[str, ...], terms: SparseVector) -> _Body:
    return _Body(content, None, hash_of(content), terms, tags, size_of(content, tags))


def _sealed_body(memory_id: UUID, content: str, tags: tuple[str, ...], sealing: Sealing) -> _Body:
    return _Body(
        "",
        sealing.seal(memory_id, content),
        sealing.hash_of(content),
        sealing.terms_of(content),
        tags,
        size_of(content, tags),
    )


async def _rewrite(
    connection: Connection,
    caller: Caller,
    memory_id: UUID,
    change: Change,
    body: _Body,
    writing: Writing,
    now: datetime,
) -> None:
    """Write the next version of a memory."""
    try:
        with within_quota():
            await connection.execute(
                """
                UPDATE memories
                   SET content = $4, tags = $5, speaker = coalesce($6, speaker),
                       occurred_at = coalesce($7, occurred_at), size_bytes = $8,
                       content_hash = $9, terms = $10, version = version + 1, updated_at = $11,
                       channels = coalesce($12, channels), scope = coalesce($13, scope),
                       tier = coalesce($14, tier), consent_version = $15, sensitive = $16,
                       sealed = $17
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
                body.content,
                list(body.tags),
                change.speaker,
                change.occurred_at,
                body.size_bytes,
                body.content_hash,
                body.terms,
                now,
                None if change.channels is None else list(change.channels),
                change.scope,
                change.tier,
                writing.consent_version,
                body.sealed is not None,
                body.sealed,
            )
    except asyncpg.UniqueViolationError as error:
        raise AlreadyExists("another memory of this tier and place has the same content") from error


async def _seal_versions(connection: Connection, memory_id: UUID, sealing: Sealing) -> None:
    """Seal what a memory was before it was marked as sensitive."""
    caller, done = sealing.caller, 0
    while versions := await connection.fetch(
        """
        SELECT version, content
          FROM memory_versions
         WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3 AND version > $4
           AND sealed IS NULL
         ORDER BY version
         LIMIT $5
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
        done,
        _VERSIONS_AT_ONCE,
    ):
        await connection.execute(
            """
            UPDATE memory_versions AS old
               SET content = '', sealed = new.sealed, content_hash = new.content_hash,
                   sensitive = true
              FROM unnest($4::bigint[], $5::bytea[], $6::bytea[])
                   AS new (version, sealed, content_hash)
             WHERE old.tenant_id = $1 AND old.user_id = $2 AND old.memory_id = $3
               AND old.version = new.version
            """,
            caller.tenant_id,
            caller.user_id,
            memory_id,
            [row["version"] for row in versions],
            [sealing.seal(memory_id, row["content"]) for row in versions],
            [sealing.hash_of(row["content"]) for row in versions],
        )
        done = versions[-1]["version"]


async def _forget_text(connection: Connection, caller: Caller, memory_id: UUID) -> None:
    """Drop what models and a meditation made of a text that is no more."""
    await connection.execute(
        """
        WITH dropped AS (
            DELETE FROM embeddings WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
        )
        UPDATE memory_scores
           SET sentiment = NULL, goals_key = NULL, text_version = text_version + 1
         WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )


async def _forget_match(connection: Connection, caller: Caller, memory_id: UUID) -> None:
    """Drop how tags that are no more matched the user's goals; what is in flight meets no row."""
    await connection.execute(
        """
        UPDATE memory_scores
           SET goals_key = NULL, text_version = text_version + 1
         WHERE tenant_id = $1 AND user_id = $2 AND memory_id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )
