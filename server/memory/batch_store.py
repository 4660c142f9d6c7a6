"""A batch of memories in Postgres: all of them, or none."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Final
from uuid import UUID

from server import audit, ids, requests
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding
from server.errors import NotFound
from server.memory.conversation import Surroundings, place_of
from server.memory.import_store import find_same, insert_all
from server.memory.model import Draft, Memory
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from
from server.memory.sensitive import begin_sealing
from server.memory.writing import Overtaken, Writing, begin_writing, touch, until_settled

_METHOD: Final = "BatchCreateMemories"


class BatchStore:
    """Stores batches of one user at a time, each in a transaction."""

    def __init__(self, database: Database, keys: DataKeys) -> None:
        self._database = database
        self._keys = keys

    async def create(
        self, caller: Caller, drafts: Sequence[Draft], request_id: str, now: datetime
    ) -> list[tuple[Memory, bool]]:
        """Store memories, or count those with the same text as seen again.

        Returns:
            Each memory in the order of the drafts, and whether it was created. What is sensitive
            is sealed.

        Raises:
            ConsentMissing: The user has not consented to memory.store, or something is sensitive
                and they have not consented to memory.sensitive.
            QuotaExceeded: They do not all fit into their tiers.
            RequestIdReused: The request id stands for other contents.
            NotFound: What an earlier call under the request id made is no longer there.
            ContentUnreadable: Something is sensitive, and the user's key cannot be unwrapped.
            StoreUnavailable: Something is sensitive, and the key manager does not answer,
                or others keep changing what has the same text.
        """
        return await until_settled(partial(self._create, caller, drafts, request_id, now))

    async def _create(
        self, caller: Caller, drafts: Sequence[Draft], request_id: str, now: datetime
    ) -> list[tuple[Memory, bool]]:
        has_sensitive = any(draft.is_sensitive for draft in drafts)
        if has_sensitive:
            await self._keys.prepare(caller)
        async with self._database.transaction(caller) as connection:
            writing, sealing = await begin_writing(connection), None
            if has_sensitive:
                sealing = await begin_sealing(connection, caller, self._keys, writing.language)
                drafts = [sealing.recognised(draft) for draft in drafts]
            if request_id:
                told = repr(drafts)
                contents = sealing.hash_of(told) if sealing else told.encode()
                batch_id = ids.new_id()
                first_id = await requests.claim(
                    connection, caller, _METHOD, request_id, contents, batch_id
                )
                if first_id != batch_id:
                    made = await requests.parts(connection, caller, _METHOD, request_id)
                    found = await _fetch(connection, caller, made)
                    return [(found[memory_id], False) for memory_id in made]
            held = await _hold_same(connection, caller, drafts, writing)
            created = await insert_all(connection, caller, drafts, writing, now, sealing=sealing)
            seen = await _see_again(connection, caller, drafts, created, now)
            if not {*seen.values()} <= {*held, *filter(None, created)}:
                raise Overtaken
            kept = [new or seen[place] for place, new in enumerate(created)]
            if request_id:
                await requests.claim_parts(connection, caller, _METHOD, request_id, kept)
            if writing.wants_vectors:
                await ask_for_embedding(connection, caller)
            found = await _fetch(connection, caller, kept)
        return [
            (found[memory_id], new is not None)
            for memory_id, new in zip(kept, created, strict=True)
        ]


async def _fetch(
    connection: Connection, caller: Caller, memory_ids: Sequence[UUID]
) -> dict[UUID, Memory]:
    """Return memories as the running transaction sees them.

    Raises:
        NotFound: One is not there.
    """
    rows = await connection.fetch(
        f"""
        SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
          FROM memories AS memory
          JOIN memory_scores AS scores
            ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
         WHERE memory.tenant_id = $1 AND memory.user_id = $2 AND memory.id = ANY ($3)
        """,  # noqa: S608 - constants
        caller.tenant_id,
        caller.user_id,
        memory_ids,
    )
    found = {row["id"]: memory_from(row) for row in rows}
    if not found.keys() >= set(memory_ids):
        raise NotFound("memory")
    return found


async def _hold_same(
    connection: Connection, caller: Caller, drafts: Sequence[Draft], writing: Writing
) -> set[UUID]:
    """Lock what is there already, ahead of the usage, in the order of MemoryStore."""
    same = await find_same(connection, caller, dict(enumerate(drafts)))
    if not same:
        return set()
    places = [place for draft in drafts if (place := place_of(draft))]
    await Surroundings.of(connection, caller, places, writing.language)
    rows = await connection.fetch(
        """
        SELECT id
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3)
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        list(same.values()),
    )
    return {row["id"] for row in rows}


async def _see_again(
    connection: Connection,
    caller: Caller,
    drafts: Sequence[Draft],
    created: Sequence[UUID | None],
    now: datetime,
) -> dict[int, UUID]:
    """Count the memories with the same text as seen, and return them by the drafts' places."""
    wanted = {place: drafts[place] for place, new in enumerate(created) if new is None}
    seen = await find_same(connection, caller, wanted)
    if len(seen) < len(wanted):
        raise Overtaken
    times = Counter(seen.values())
    await connection.execute(
        """
        UPDATE memory_scores AS scores
           SET use_count = use_count + seen.times, last_seen_at = greatest(last_seen_at, $5)
          FROM (
                SELECT memory_id, times
                  FROM memory_scores
                  JOIN unnest($3::uuid[], $4::integer[]) AS again (id, times) ON id = memory_id
                 WHERE tenant_id = $1 AND user_id = $2
                 ORDER BY memory_id
                   FOR NO KEY UPDATE OF memory_scores
               ) AS seen
         WHERE scores.tenant_id = $1 AND scores.user_id = $2
           AND scores.memory_id = seen.memory_id
        """,
        caller.tenant_id,
        caller.user_id,
        list(times),
        list(times.values()),
        now,
    )
    names = [ids.show(ids.MEMORY, memory_id) for memory_id in seen.values()]
    await audit.record_all(connection, caller, "memory.see", names)
    if seen:
        await touch(connection, caller)
    return seen
