"""Many memories at once into Postgres, and how far an import came."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from pgvector import SparseVector

from server import audit, ids
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding
from server.errors import InvalidArgument, NotFound, QuotaExceeded
from server.memory.conversation import Surroundings, place_of
from server.memory.model import Draft, Tier
from server.memory.pacing import paced
from server.memory.sensitive import Sealing, begin_sealing
from server.memory.writing import Writing, begin_writing, within_quota
from server.preferences import Language

_NOWHERE: Final = -1
"""What stands for the position of what is no turn, as in the index."""

_Key = tuple[Tier, bytes, str, int]
"""Tier, content hash, session and position: no two active memories of a user have the same."""


class Outcome(enum.Enum):
    """What became of a memory of an import."""

    CREATED = enum.auto()
    EXISTING = enum.auto()
    REFUSED = enum.auto()
    SKIPPED = enum.auto()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an import."""

    drafts: Sequence[Draft | None]
    """None: it was refused for what it is."""
    first_index: int = 0
    """Place of the first one in the whole import."""
    request_id: str = ""
    """Empty: the import cannot be resumed."""
    made: "Made | None" = None
    """Terms of the drafts that were not refused, if there was time to make them before."""


@dataclass(frozen=True, slots=True)
class Made:
    """Terms of drafts, as far as these themselves tell: of turns, without those stored before."""

    language: Language
    terms: Sequence[SparseVector]


async def make_terms(drafts: Sequence[Draft], language: Language) -> Made:
    """Make the terms of drafts ahead of the transaction that stores them."""
    return Made(language, await Surroundings((), language, drafts).terms_of(drafts))


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a chunk; each list has an element for each draft."""

    outcomes: Sequence[Outcome]
    memory_ids: Sequence[UUID | None]
    """None for what was refused or skipped, and for what exists unless ids were asked for."""
    language: Language
    """What the texts were read in."""
    without_room: Mapping[int, QuotaExceeded] = field(default_factory=dict)
    """Which drafts did not fit, by their places in the chunk."""

    def count(self, outcome: Outcome) -> int:
        """Return how many had this outcome."""
        return sum(each is outcome for each in self.outcomes)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import came."""

    request_id: str
    next_index: int
    created: int
    existing: int
    refused: int
    updated_at: datetime


class ImportStore:
    """Stores chunks of one user at a time, each in a transaction."""

    def __init__(self, database: Database, keys: DataKeys) -> None:
        self._database = database
        self._keys = keys

    async def store(
        self, caller: Caller, chunk: Chunk, now: datetime, *, find_existing: bool = False
    ) -> Stored:
        """Store what is new, has room and was not dealt with before.

        Text that is there already stays as it is.

        Args:
            caller: Whose memories they are.
            chunk: The memories.
            now: When they are stored.
            find_existing: Whether to return ids of what exists.

        Raises:
            ConsentMissing: The user has not consented to memory.store, or something is sensitive
                and they have not consented to memory.sensitive.
            InvalidArgument: Something before this chunk is missing.
            ContentUnreadable: Something is sensitive, and the user's key cannot be unwrapped.
            StoreUnavailable: Something is sensitive, and the key manager does not answer.
        """
        has_sensitive = any(draft.is_sensitive for draft in chunk.drafts if draft)
        if has_sensitive:
            await self._keys.prepare(caller)
        async with self._database.transaction(caller) as connection:
            writing, sealing = await begin_writing(connection), None
            if has_sensitive:
                sealing = await begin_sealing(connection, caller, self._keys, writing.language)
            skipped = await _skipped(connection, caller, chunk, now) if chunk.request_id else 0
            wanted = {
                place: sealing.recognised(draft) if sealing else draft
                for place, draft in enumerate(chunk.drafts)
                if draft and place >= skipped
            }
            memory_ids, without_room = await _insert_what_fits(
                connection, caller, wanted, writing, now, chunk.made, sealing
            )
            outcomes = [_outcome(place, skipped, memory_ids) for place in range(len(chunk.drafts))]
            if find_existing:
                existing = {place: wanted[place] for place, new in memory_ids.items() if not new}
                memory_ids |= await find_same(connection, caller, existing)
            found = [memory_ids.get(place) for place in range(len(chunk.drafts))]
            stored = Stored(outcomes, found, writing.language, without_room)
            if chunk.request_id:
                await _move_on(connection, caller, chunk, stored)
            if writing.wants_vectors and stored.count(Outcome.CREATED):
                await ask_for_embedding(connection, caller)
        return stored

    async def progress(self, caller: Caller, request_id: str) -> Progress:
        """Return how far an import came.

        Raises:
            NotFound: Nothing was ever imported under this id.
        """
        rows = await self._database.fetch(
            caller,
            """
            SELECT request_id, next_index, created, existing, refused, updated_at
              FROM imports
             WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id AND request_id = $3
            """,
            request_id,
        )
        if not rows:
            raise NotFound("import")
        return Progress(**rows[0])


async def insert_all(
    connection: Connection,
    caller: Caller,
    drafts: Sequence[Draft],
    writing: Writing,
    now: datetime,
    made: Made | None = None,
    sealing: Sealing | None = None,
) -> list[UUID | None]:
    """Insert memories and note it in the audit log.

    Args:
        connection: A transaction.
        caller: Whose memories they are.
        drafts: The memories.
        writing: Under which conditions they are written.
        now: When.
        made: Terms of these very drafts, if they are made already.
        sealing: How the content of sensitive ones is kept, which then are recognised; None: there
            are none.

    Returns:
        The id of each, or None where its text is there already.

    Raises:
        QuotaExceeded: They do not fit into their tiers.
    """
    places = [place for draft in drafts if (place := place_of(draft))]
    around = await Surroundings.of(connection, caller, places, writing.language)
    around = around.with_drafts(drafts)
    await around.refresh(connection, caller, places)
    new_ids = [ids.new_id() for _ in drafts]
    derived = (
        await _terms(around, drafts, made, writing.language, sealing),
        _sealed(drafts, new_ids, sealing),
    )
    with within_quota():
        created = await _insert(connection, caller, drafts, new_ids, derived, writing, now)
    kept = [new_id if new_id in created else None for new_id in new_ids]
    names = [ids.show(ids.MEMORY, new_id) for new_id in kept if new_id]
    await audit.record_all(connection, caller, "memory.create", names)
    return kept


async def _insert(
    connection: Connection,
    caller: Caller,
    drafts: Sequence[Draft],
    new_ids: Sequence[UUID],
    derived: tuple[Sequence[SparseVector], Sequence[bytes | None]],
    writing: Writing,
    now: datetime,
) -> set[UUID]:
    """Insert memories with what follows from their texts, and return the ids of those new.

    In order of their hashes, so that of two who store the same texts none waits for the other in
    a circle.
    """
    terms, sealed = derived
    rows = await connection.fetch(
        """
        WITH created AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source,
                                  session_id, session_position, speaker, occurred_at,
                                  size_bytes, content_hash, created_at, updated_at, terms,
                                  channels, scope, protected, consent_version, sensitive,
                                  sealed)
            SELECT $1, $2, draft.id, draft.tier, draft.content,
                   draft.tags::text[], draft.source, draft.session_id,
                   draft.session_position, draft.speaker, draft.occurred_at,
                   draft.size_bytes, draft.content_hash, $3, $3, draft.terms,
                   draft.channels::text[], draft.scope, draft.protected, $4,
                   draft.sealed IS NOT NULL, draft.sealed
              FROM unnest($5::uuid[], $6::text[], $7::text[], $8::text[], $9::text[],
                          $10::text[], $11::integer[], $12::text[], $13::timestamptz[],
                          $14::integer[], $15::bytea[], $16::sparsevec[], $17::text[],
                          $18::text[], $19::boolean[], $20::bytea[])
                AS draft (id, tier, content, tags, source, session_id, session_position,
                          speaker, occurred_at, size_bytes, content_hash, terms, channels,
                          scope, protected, sealed)
             ORDER BY draft.content_hash
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
        new_ids,
        [draft.tier for draft in drafts],
        ["" if draft.is_sensitive else draft.content for draft in drafts],
        [_array(draft.tags) for draft in drafts],
        [draft.source for draft in drafts],
        [draft.session_id for draft in drafts],
        [draft.session_position for draft in drafts],
        [draft.speaker for draft in drafts],
        [draft.occurred_at or now for draft in drafts],
        [draft.size_bytes for draft in drafts],
        [draft.content_hash for draft in drafts],
        terms,
        [_array(draft.channels) for draft in drafts],
        [draft.scope for draft in drafts],
        [draft.is_protected for draft in drafts],
        sealed,
    )
    return {row["memory_id"] for row in rows}


def _array(labels: Sequence[str]) -> str:
    """Return labels as Postgres writes arrays: arrays of arrays must not differ in length."""
    if not labels:
        return "{}"
    escaped = (label.replace("\\", "\\\\").replace('"', '\\"') for label in labels)
    return "{" + ",".join(f'"{label}"' for label in escaped) + "}"


async def _terms(
    around: Surroundings,
    drafts: Sequence[Draft],
    made: Made | None,
    language: Language,
    sealing: Sealing | None,
) -> list[SparseVector]:
    if made is None or made.language is not language:
        terms = await around.terms_of(drafts)
    else:
        terms = [
            around.terms(draft.content, place_of(draft))
            if around.reach(draft)
            else made.terms[place]
            async for place, draft in paced(drafts)
        ]
    if sealing is None:
        return terms
    return [
        sealing.terms_of(draft.content) if draft.is_sensitive else terms[place]
        async for place, draft in paced(drafts)
    ]


def _sealed(
    drafts: Sequence[Draft], new_ids: Sequence[UUID], sealing: Sealing | None
) -> list[bytes | None]:
    if sealing is None:
        return [None] * len(drafts)
    return [
        sealing.seal(new_id, draft.content) if draft.is_sensitive else None
        for draft, new_id in zip(drafts, new_ids, strict=True)
    ]


def not_fitting(drafts: Mapping[int, Draft], room: int) -> list[int]:
    """Return the places of the drafts that are too large for what those before them left.

    The same text counts once.
    """
    fitting: set[_Key] = set()
    places = []
    for place, draft in drafts.items():
        key = _key(draft)
        if key in fitting:
            continue
        if draft.size_bytes > room:
            places.append(place)
        else:
            room -= draft.size_bytes
            fitting.add(key)
    return places


def _key(draft: Draft) -> _Key:
    position = _NOWHERE if draft.session_position is None else draft.session_position
    return draft.tier, draft.content_hash, draft.session_id, position


def _outcome(place: int, skipped: int, memory_ids: Mapping[int, UUID | None]) -> Outcome:
    if place < skipped:
        return Outcome.SKIPPED
    if place not in memory_ids:
        return Outcome.REFUSED
    return Outcome.CREATED if memory_ids[place] else Outcome.EXISTING


async def _skipped(connection: Connection, caller: Caller, chunk: Chunk, now: datetime) -> int:
    """Lock the import and return how many of the chunk have been dealt with already."""
    next_index: int = await connection.fetchval(
        """
        INSERT INTO imports (tenant_id, user_id, request_id, updated_at)
        VALUES ($1, $2, $3, $4)
            ON CONFLICT (user_id, request_id) DO UPDATE SET updated_at = excluded.updated_at
        RETURNING next_index
        """,
        caller.tenant_id,
        caller.user_id,
        chunk.request_id,
        now,
    )
    if chunk.first_index > next_index:
        raise InvalidArgument(
            "first_index", f"must be at most {next_index}: what stands before it was not sent"
        )
    return min(next_index - chunk.first_index, len(chunk.drafts))


async def _move_on(connection: Connection, caller: Caller, chunk: Chunk, stored: Stored) -> None:
    """Note that a chunk has been dealt with."""
    await connection.execute(
        """
        UPDATE imports
           SET next_index = next_index + $4 + $5 + $6, created = created + $4,
               existing = existing + $5, refused = refused + $6
         WHERE tenant_id = $1 AND user_id = $2 AND request_id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        chunk.request_id,
        stored.count(Outcome.CREATED),
        stored.count(Outcome.EXISTING),
        stored.count(Outcome.REFUSED),
    )


async def _insert_what_fits(
    connection: Connection,
    caller: Caller,
    wanted: Mapping[int, Draft],
    writing: Writing,
    now: datetime,
    made: Made | None,
    sealing: Sealing | None,
) -> tuple[dict[int, UUID | None], dict[int, QuotaExceeded]]:
    """Insert memories and leave out what is too much: of several that which comes last.

    Returns:
        By place: the ids of what was inserted, None for what exists; and what had no room.
    """
    without_room: dict[int, QuotaExceeded] = {}
    await connection.execute("SAVEPOINT chunk")
    while True:
        fitting = {place: draft for place, draft in wanted.items() if place not in without_room}
        # A turn that is left out adds nothing to the others: their terms are made anew.
        still_right = made if made and len(made.terms) == len(fitting) else None
        drafts = list(fitting.values())
        try:
            kept = await insert_all(connection, caller, drafts, writing, now, still_right, sealing)
        except QuotaExceeded as full:
            await connection.execute("ROLLBACK TO SAVEPOINT chunk")
            places = await _too_much(connection, caller, fitting, full)
            without_room |= dict.fromkeys(places, full)
        else:
            return dict(zip(fitting, kept, strict=True)), without_room


async def _too_much(
    connection: Connection, caller: Caller, wanted: Mapping[int, Draft], full: QuotaExceeded
) -> list[int]:
    tier = Tier(full.subject)
    candidates = {place: draft for place, draft in wanted.items() if draft.tier is tier}
    existing = await find_same(connection, caller, candidates)
    new = {place: draft for place, draft in candidates.items() if place not in existing}
    # If everything seems to fit, somebody else wrote in between: then nothing is tried again.
    return not_fitting(new, full.room) or list(new)


async def find_same(
    connection: Connection, caller: Caller, drafts: Mapping[int, Draft]
) -> dict[int, UUID]:
    """Return the ids of active memories with the same text at the same place."""
    keys = [_key(draft) for draft in drafts.values()]
    rows = await connection.fetch(
        """
        SELECT draft.place, memory.id
          FROM unnest($3::integer[], $4::text[], $5::bytea[], $6::text[], $7::integer[])
               AS draft (place, tier, content_hash, session_id, position)
          JOIN memories AS memory
            ON memory.tenant_id = $1 AND memory.user_id = $2 AND memory.tier = draft.tier
           AND memory.content_hash = draft.content_hash
           AND memory.session_id = draft.session_id
           AND coalesce(memory.session_position, -1) = draft.position
           AND memory.archived_at IS NULL
        """,
        caller.tenant_id,
        caller.user_id,
        list(drafts),
        [tier for tier, _, _, _ in keys],
        [content_hash for _, content_hash, _, _ in keys],
        [session_id for _, _, session_id, _ in keys],
        [position for _, _, _, position in keys],
    )
    return {row["place"]: row["id"] for row in rows}
