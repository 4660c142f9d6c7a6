"""Promotion: short-term memories move to Postgres, under their ids and with all they were.

The order of effects: PostgreSQL commits the memory, with the note that it has left the short term;
then its copy in Redis goes. A crash between the two leaves a copy that counts no more. The other
order would lose what was kept.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final
from uuid import UUID

from server import audit, ids
from server.caller import Caller
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding
from server.errors import AlreadyExists, EtagMismatch, QuotaExceeded
from server.memory.conversation import Place, Surroundings, place_of
from server.memory.earning import fresh_score, has_earned
from server.memory.model import Change, Draft, Filter, Memory, Tier
from server.memory.short_term import ShortTermStore, refuse_sensitive
from server.memory.short_term_bodies import Kept, changed
from server.memory.short_term_exits import begin_leaving, leave
from server.memory.store import fetch_memory
from server.memory.writing import Writing, begin_writing, within_quota
from server.preferences import ScoringWeights, preferences

PAGE: Final = 100
"""How many memories move in one transaction."""

_SHORT_TERM: Final = Filter(tiers=frozenset({Tier.SHORT_TERM}))
_TO_LONG_TERM: Final = Change(tier=Tier.LONG_TERM)

Worth = Callable[[Kept, ScoringWeights], bool]
"""Tells whether a memory is worth keeping."""


Also = Callable[[Connection, int], Awaitable[None]]
"""What else a transaction does, given how many memories move in it."""


class Promotion:
    """Moves memories of one user at a time from the short term to a durable tier.

    Locks in one order: short-term writers, then as MemoryStore does.
    """

    def __init__(self, database: Database, short_term: ShortTermStore) -> None:
        self._database = database
        self._short_term = short_term

    async def promote(
        self, caller: Caller, memory_id: UUID, change: Change, now: datetime
    ) -> Memory:
        """Move a memory to the tier that a change names, and make the rest of the change.

        Raises:
            NotFound: There is none in the short term, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            AlreadyExists: That tier has the same text at the same place.
            ConsentMissing: The user has not consented to memory.store.
            QuotaExceeded: It does not fit into its new tier.
            InvalidArgument: It would become sensitive at the same time.
            StoreUnavailable: Redis does not answer.
        """
        refuse_sensitive(change.is_sensitive)
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection)
            await begin_leaving(connection, caller)
            kept = await self._short_term.current(connection, caller, memory_id)
            if change.expected_version not in (None, kept.memory.version):
                raise EtagMismatch
            new = changed(kept.memory, change, now)
            if not await self._insert(connection, caller, {kept.memory.id: (kept, new)}, writing):
                raise AlreadyExists("another memory of this tier and place has the same content")
            await leave(connection, caller, [memory_id])
            await _record(connection, caller, [memory_id], None)
            if writing.wants_vectors:
                await ask_for_embedding(connection, caller)
            promoted = await fetch_memory(connection, caller, memory_id)
        await self._short_term.remove(caller, [memory_id])
        return promoted

    async def promote_worthy(
        self,
        caller: Caller,
        memory_ids: Sequence[UUID],
        worth: Worth,
        now: datetime,
        *,
        actor: str | None = None,
        also: Also | None = None,
    ) -> int:
        """Move those of some memories that are worth it to the long term, in one transaction.

        One whose text the long term has at the same place leaves too, and counts there as seen.

        Args:
            caller: Whose memories they are.
            memory_ids: At most `PAGE`.
            worth: Which of them to move, by the user's weights.
            now: When they move.
            actor: Who moves them; None: the caller.
            also: What else to do in the transaction if some move.

        Returns:
            How many left.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            QuotaExceeded: They do not fit into the long term.
            StoreUnavailable: A store does not answer.
        """
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection)
            await begin_leaving(connection, caller)
            weights = (await preferences(connection, caller)).scoring_weights
            there = await self._short_term.some(connection, caller, memory_ids)
            moves = {
                kept.memory.id: (kept, changed(kept.memory, _TO_LONG_TERM, now))
                for kept in there
                if worth(kept, weights)
            }
            if not moves:
                return 0
            moved = await self._insert(connection, caller, moves, writing)
            await _see_again(
                connection, caller, [move for key, move in moves.items() if key not in moved]
            )
            await leave(connection, caller, list(moves))
            await _record(connection, caller, moved, actor)
            if also:
                await also(connection, len(moves))
            if writing.wants_vectors:
                await ask_for_embedding(connection, caller)
        await self._short_term.remove(caller, list(moves))
        return len(moves)

    async def promote_earned(self, caller: Caller, now: datetime) -> int:
        """Move what has earned it to the long term, the best first, and return how many that were.

        What does not fit stays until it expires.

        Raises:
            ConsentMissing: Something has, and the user has not consented to memory.store.
            StoreUnavailable: A store does not answer.
        """
        earned = await self._earned(caller)
        promoted = 0
        for start in range(0, len(earned), PAGE):
            page = earned[start : start + PAGE]
            try:
                promoted += await self._promote_all(caller, page, now)
            except QuotaExceeded as refusal:
                fitting = _fitting(page, refusal.room)
                # Not even those, if others wrote meanwhile: then another night.
                with suppress(QuotaExceeded):
                    promoted += await self._promote_all(caller, fitting, now)
                break
        return promoted

    async def count_earned(self, caller: Caller) -> int:
        """Return how many memories have earned it.

        Raises:
            StoreUnavailable: A store does not answer.
        """
        return len(await self._earned(caller))

    async def _earned(self, caller: Caller) -> list[Memory]:
        """Return what has earned it, the best first."""
        memories = await self._short_term.find(caller, _SHORT_TERM, before=None)
        async with self._database.transaction(caller) as connection:
            weights = (await preferences(connection, caller)).scoring_weights
            there = await self._short_term.some(connection, caller, [one.id for one in memories])
        earned = [kept for kept in there if has_earned(kept, weights)]
        earned.sort(key=lambda kept: -fresh_score(kept, weights))
        return [kept.memory for kept in earned]

    async def _promote_all(self, caller: Caller, memories: Sequence[Memory], now: datetime) -> int:
        memory_ids = [memory.id for memory in memories]
        return await self.promote_worthy(caller, memory_ids, has_earned, now, actor=audit.SYSTEM)

    async def _insert(
        self,
        connection: Connection,
        caller: Caller,
        moves: Mapping[UUID, tuple[Kept, Memory]],
        writing: Writing,
    ) -> list[UUID]:
        """Insert memories with all they were; return the ids, without those that stood there."""
        new = [memory for _, memory in moves.values()]
        inserted = await _insert_memories(connection, caller, new, writing)
        kept = [one for memory_id, (one, _) in moves.items() if memory_id in inserted]
        await _insert_scores(connection, caller, kept)
        past = await self._short_term.past(caller, [one.memory for one in kept])
        versions = [was for one in kept for was in (*past[one.memory.id], one.memory)]
        await _insert_versions(connection, caller, versions)
        return list(inserted)


def _fitting(memories: Iterable[Memory], room_bytes: int) -> list[Memory]:
    """Return the first of some memories that have room, and smaller ones behind them."""
    fitting = []
    for memory in memories:
        if memory.size_bytes <= room_bytes:
            room_bytes -= memory.size_bytes
            fitting.append(memory)
    return fitting


async def _insert_memories(
    connection: Connection, caller: Caller, memories: Sequence[Memory], writing: Writing
) -> set[UUID]:
    drafts = {memory.id: _draft_of(memory) for memory in memories}
    at = {memory_id: place_of(draft) for memory_id, draft in drafts.items()}
    places: list[Place] = [place for place in at.values() if place]
    around = await Surroundings.of(connection, caller, places, writing.language)
    around = around.with_drafts(drafts.values())
    await around.refresh(connection, caller, places)
    with within_quota():
        rows = await connection.fetch(
            """
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, channels, source,
                                  session_id, session_position, speaker, occurred_at, size_bytes,
                                  content_hash, version, created_at, updated_at, scope, protected,
                                  created_by, consent_version, terms)
            SELECT $1, $2, moved.id, moved.tier, moved.content,
                   ARRAY(SELECT json_array_elements_text(moved.tags)),
                   ARRAY(SELECT json_array_elements_text(moved.channels)),
                   moved.source, moved.session_id, moved.session_position, moved.speaker,
                   moved.occurred_at, moved.size_bytes, moved.content_hash, moved.version,
                   moved.created_at, moved.updated_at, moved.scope, moved.protected,
                   moved.created_by, $3, moved.terms
              FROM unnest($4::uuid[], $5::text[], $6::text[], $7::json[], $8::json[], $9::text[],
                          $10::text[], $11::integer[], $12::text[], $13::timestamptz[],
                          $14::integer[], $15::bytea[], $16::bigint[], $17::timestamptz[],
                          $18::timestamptz[], $19::text[], $20::boolean[], $21::text[],
                          $22::sparsevec[])
                AS moved (id, tier, content, tags, channels, source, session_id, session_position,
                          speaker, occurred_at, size_bytes, content_hash, version, created_at,
                          updated_at, scope, protected, created_by, terms)
            ON CONFLICT DO NOTHING
            RETURNING id
            """,
            caller.tenant_id,
            caller.user_id,
            writing.consent_version,
            [memory.id for memory in memories],
            [memory.tier for memory in memories],
            [memory.content for memory in memories],
            [json.dumps(memory.tags) for memory in memories],
            [json.dumps(memory.channels) for memory in memories],
            [memory.source for memory in memories],
            [memory.session_id for memory in memories],
            [memory.session_position for memory in memories],
            [memory.speaker for memory in memories],
            [memory.occurred_at for memory in memories],
            [memory.size_bytes for memory in memories],
            [memory.content_hash for memory in memories],
            [memory.version for memory in memories],
            [memory.created_at for memory in memories],
            [memory.updated_at for memory in memories],
            [memory.scope for memory in memories],
            [memory.is_protected for memory in memories],
            [memory.created_by for memory in memories],
            [around.terms(memory.content, at[memory.id]) for memory in memories],
        )
    return {row["id"] for row in rows}


async def _insert_scores(connection: Connection, caller: Caller, kept: Sequence[Kept]) -> None:
    await connection.execute(
        """
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at, use_count,
                                   feedback, useful_count, retrieved_count)
        SELECT $1, $2, moved.*
          FROM unnest($3::uuid[], $4::timestamptz[], $5::integer[], $6::real[], $7::integer[],
                      $8::integer[]) AS moved
        """,
        caller.tenant_id,
        caller.user_id,
        [one.memory.id for one in kept],
        [one.memory.last_seen_at for one in kept],
        [one.memory.use_count for one in kept],
        [one.memory.feedback for one in kept],
        [one.useful_count for one in kept],
        [one.retrieved_count for one in kept],
    )


async def _insert_versions(
    connection: Connection, caller: Caller, versions: Sequence[Memory]
) -> None:
    await connection.execute(
        """
        INSERT INTO memory_versions (tenant_id, user_id, memory_id, version, tier, content, tags,
                                     channels, scope, sensitive, protected, speaker, occurred_at,
                                     size_bytes, content_hash, updated_at)
        SELECT $1, $2, was.memory_id, was.version, was.tier, was.content,
               ARRAY(SELECT json_array_elements_text(was.tags)),
               ARRAY(SELECT json_array_elements_text(was.channels)), was.scope, false,
               was.protected, was.speaker, was.occurred_at, was.size_bytes, was.content_hash,
               was.updated_at
          FROM unnest($3::uuid[], $4::bigint[], $5::text[], $6::text[], $7::json[], $8::json[],
                      $9::text[], $10::boolean[], $11::text[], $12::timestamptz[],
                      $13::integer[], $14::bytea[], $15::timestamptz[])
            AS was (memory_id, version, tier, content, tags, channels, scope, protected, speaker,
                    occurred_at, size_bytes, content_hash, updated_at)
        """,
        caller.tenant_id,
        caller.user_id,
        [was.id for was in versions],
        [was.version for was in versions],
        [was.tier for was in versions],
        [was.content for was in versions],
        [json.dumps(was.tags) for was in versions],
        [json.dumps(was.channels) for was in versions],
        [was.scope for was in versions],
        [was.is_protected for was in versions],
        [was.speaker for was in versions],
        [was.occurred_at for was in versions],
        [was.size_bytes for was in versions],
        [was.content_hash for was in versions],
        [was.updated_at for was in versions],
    )


async def _see_again(
    connection: Connection, caller: Caller, moves: Sequence[tuple[Kept, Memory]]
) -> None:
    """Count the durable memories with the same texts at the same places as seen.

    Args:
        connection: The transaction.
        caller: Whose memories they are.
        moves: What each memory was in the short term, and would have been in its new tier.
    """
    repeated = [new for _, new in moves]
    rows = await connection.fetch(
        """
        UPDATE memory_scores AS scores
           SET use_count = scores.use_count + 1 + said.use_count,
               last_seen_at = greatest(scores.last_seen_at, said.last_seen_at),
               feedback = coalesce(said.feedback, scores.feedback),
               useful_count = scores.useful_count + said.useful_count,
               retrieved_count = scores.retrieved_count + said.retrieved_count
          FROM unnest($3::text[], $4::bytea[], $5::text[], $6::integer[], $7::integer[],
                      $8::timestamptz[], $9::real[], $10::integer[], $11::integer[])
               AS said (tier, content_hash, session_id, session_position, use_count,
                        last_seen_at, feedback, useful_count, retrieved_count)
          JOIN memories AS memory
            ON memory.tenant_id = $1 AND memory.user_id = $2 AND memory.tier = said.tier
           AND memory.content_hash = said.content_hash AND memory.session_id = said.session_id
           AND coalesce(memory.session_position, -1) = coalesce(said.session_position, -1)
           AND memory.archived_at IS NULL
         WHERE scores.tenant_id = $1 AND scores.user_id = $2 AND scores.memory_id = memory.id
        RETURNING scores.memory_id
        """,
        caller.tenant_id,
        caller.user_id,
        [memory.tier for memory in repeated],
        [memory.content_hash for memory in repeated],
        [memory.session_id for memory in repeated],
        [memory.session_position for memory in repeated],
        [memory.use_count for memory in repeated],
        [memory.last_seen_at for memory in repeated],
        [memory.feedback for memory in repeated],
        [kept.useful_count for kept, _ in moves],
        [kept.retrieved_count for kept, _ in moves],
    )
    names = [ids.show(ids.MEMORY, row["memory_id"]) for row in rows]
    await audit.record_all(connection, caller, "memory.see", names)


async def _record(
    connection: Connection, caller: Caller, memory_ids: Iterable[UUID], actor: str | None
) -> None:
    names = [ids.show(ids.MEMORY, memory_id) for memory_id in memory_ids]
    await audit.record_all(connection, caller, "memory.promote", names, actor=actor)


def _draft_of(memory: Memory) -> Draft:
    return Draft(
        tier=memory.tier,
        content=memory.content,
        tags=memory.tags,
        source=memory.source,
        session_id=memory.session_id,
        session_position=memory.session_position,
        speaker=memory.speaker,
        occurred_at=memory.occurred_at,
        channels=memory.channels,
        scope=memory.scope,
        is_protected=memory.is_protected,
    )
