"""Conversations: their turns are short-term memories until the conversation ends."""

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from server import audit, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.errors import NotFound
from server.memory.collection import Collection
from server.memory.earning import has_earned
from server.memory.insertion import new_memory
from server.memory.model import Draft, Filter, Memory, Tier
from server.memory.promotion import PAGE, Promotion, Worth
from server.memory.search_store import SearchStore
from server.memory.short_term import ShortTermStore, successors
from server.memory.short_term_bodies import request_key
from server.memory.short_term_exits import begin_leaving, leave
from server.memory.store import first_of
from server.memory.transcripts import Transcripts, Turn

MOST_TURNS: Final = 100
"""How many turns can be appended at once."""

_PAGE: Final = 500
"""How many durable turns are read at once."""


class Keep(enum.Enum):
    """Which turns outlive their conversation."""

    EARNED = "earned"
    """Those whose score earns it."""
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of the turns of a conversation, over all its ends."""

    promoted: int
    dropped: int
    ended_at: datetime


class Sessions:
    """The conversations of one user at a time."""

    def __init__(
        self,
        database: Database,
        short_term: ShortTermStore,
        promotion: Promotion,
        collection: Collection,
        search: SearchStore,
        transcripts: Transcripts,
    ) -> None:
        self._database = database
        self._short_term = short_term
        self._promotion = promotion
        self._collection = collection
        self._search = search
        self._transcripts = transcripts

    async def append(
        self,
        caller: Caller,
        session_id: str,
        drafts: Sequence[Draft],
        request_id: str,
        now: datetime,
    ) -> list[Memory]:
        """Keep turns in the short term, at the next places of their conversation, all or none.

        Places go on after the highest one that Redis or Postgres knows. A retry under the same
        request id returns those of the turns that are still there.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            QuotaExceeded: They do not fit.
            InvalidArgument: The conversation has no places left.
            RequestIdReused: The request id stands for other contents.
            NotFound: It is a retry, and none of the turns is there any more.
            StoreUnavailable: Redis does not answer, or is full.
        """
        first_id = first_of(ids.new_id())
        contents = repr((session_id, drafts)).encode()
        async with self._short_term.writing(caller) as (connection, writing, room):
            made_id = first_id
            if request_id:
                made_id = await requests.claim(
                    connection, caller, "AppendToSession", request_id, contents, first_id
                )
            if made_id == first_id:
                turns = await self._short_term.append(
                    connection,
                    caller,
                    [
                        new_memory(caller, turn_id, draft, writing.consent_version, now)
                        for turn_id, draft in zip(
                            successors(first_id, len(drafts)), drafts, strict=True
                        )
                    ],
                    room,
                    least=await _next_position(connection, caller, session_id),
                    request=request_key(request_id, contents),
                )
                if not turns:
                    raise NotFound("session turn")
                await _note_turns(connection, caller, request_id, first_id, turns)
                return turns
        return await self._made(caller, successors(made_id, len(drafts)))

    async def end(
        self,
        caller: Caller,
        session_id: str,
        keep: Keep,
        now: datetime,
        *,
        write_transcript: bool = False,
    ) -> Ended:
        """Promote what is worth keeping of a conversation to the long term, and drop the rest.

        May be repeated: it goes on from what is left, and its counts are those of all ends. A
        conversation that ended can be taken up again.

        Raises:
            NotFound: Nothing is known of the conversation.
            ConsentMissing: Something is to be kept or written down, and the user has not
                consented to memory.store.
            QuotaExceeded: What is to be kept does not fit into the long term. What is left stays
                for the next try.
            StoreUnavailable: A store does not answer.
        """
        which = Filter(tiers=frozenset({Tier.SHORT_TERM}), session_id=session_id)
        turns = (await self._short_term.find(caller, which, before=None))[::-1]
        if not turns and (ended := await self._ended(caller, session_id)):
            return ended
        turn_ids = [turn.id for turn in turns]
        following = max((turn.session_position or 0 for turn in turns), default=-1) + 1

        async def count(connection: Connection, promoted: int) -> None:
            await _count(connection, caller, session_id, following, promoted=promoted)

        if keep is not Keep.NONE:
            for start in range(0, len(turns), PAGE):
                page = turn_ids[start : start + PAGE]
                await self._promotion.promote_worthy(caller, page, _WORTH[keep], now, also=count)
        if write_transcript:
            await self._write_down(caller, session_id, now)
        async with self._database.transaction(caller) as connection:
            await begin_leaving(connection, caller)
            rest = await self._short_term.some(connection, caller, turn_ids)
            dropped = [kept.memory.id for kept in rest]
            await leave(connection, caller, dropped)
            await _note_dropped(connection, caller, session_id, dropped)
            row = await _count(
                connection, caller, session_id, following, dropped=len(dropped), ended_at=now
            )
        await self._short_term.remove(caller, dropped)
        return Ended(row["promoted"], row["dropped"], row["ended_at"])

    async def _write_down(self, caller: Caller, session_id: str, now: datetime) -> None:
        """Write the transcript of all turns that are kept, in whatever tier, but sensitive ones."""
        which = Filter(session_id=session_id)
        said = {one.id: one for one in await self._short_term.find(caller, which, before=None)}
        before: UUID | None = None
        while page := await self._search.page(caller, which, before=before, limit=_PAGE):
            said |= {memory.id: memory for memory in page}
            before = page[-1].id
        turns = [
            Turn(memory.session_position, memory.speaker, memory.content, memory.occurred_at)
            for memory in said.values()
            if memory.session_position is not None and not memory.is_sensitive
        ]
        turns.sort(key=lambda turn: (turn.position, turn.occurred_at))
        await self._transcripts.write(caller, session_id, turns, now)

    async def _ended(self, caller: Caller, session_id: str) -> Ended | None:
        """Return what became of a conversation whose end is complete.

        Raises:
            NotFound: Nothing is known of the conversation.
        """
        async with self._database.transaction(caller) as connection:
            if not await _next_position(connection, caller, session_id):
                raise NotFound("session")
            row = await connection.fetchrow(
                """
                SELECT promoted, dropped, ended_at
                  FROM ended_sessions
                 WHERE tenant_id = $1 AND user_id = $2 AND session_id = $3
                   AND ended_at IS NOT NULL
                """,
                caller.tenant_id,
                caller.user_id,
                session_id,
            )
        return Ended(**row) if row else None

    async def _made(self, caller: Caller, turn_ids: Sequence[UUID]) -> list[Memory]:
        there = await self._collection.some(caller, turn_ids)
        if not there:
            raise NotFound("session turn")
        return [there[turn_id] for turn_id in turn_ids if turn_id in there]


_WORTH: Final[Mapping[Keep, Worth]] = {
    Keep.EARNED: has_earned,
    Keep.ALL: lambda _kept, _weights: True,
}


async def _next_position(connection: Connection, caller: Caller, session_id: str) -> int:
    """Return the first place of a conversation that is free as far as Postgres knows."""
    position: int = await connection.fetchval(
        """
        SELECT greatest(
               (SELECT max(session_position)::bigint + 1
                  FROM memories
                 WHERE tenant_id = $1 AND user_id = $2 AND session_id = $3 AND session_id <> ''),
               (SELECT next_position
                  FROM ended_sessions
                 WHERE tenant_id = $1 AND user_id = $2 AND session_id = $3),
               0)
        """,
        caller.tenant_id,
        caller.user_id,
        session_id,
    )
    return position


async def _note_turns(
    connection: Connection,
    caller: Caller,
    request_id: str,
    first_id: UUID,
    turns: Sequence[Memory],
) -> None:
    """Tell the audit log of turns, and let the request id stand for those of an earlier try."""
    if request_id and turns[0].id != first_id:
        made_id = first_of(turns[0].id)
        await requests.redirect(connection, caller, "AppendToSession", request_id, made_id)
    names = [ids.show(ids.MEMORY, turn.id) for turn in turns]
    await audit.record_all(connection, caller, "memory.create", names)


async def _note_dropped(
    connection: Connection, caller: Caller, session_id: str, dropped: Sequence[UUID]
) -> None:
    names = [ids.show(ids.MEMORY, memory_id) for memory_id in dropped]
    await audit.record_all(connection, caller, "memory.delete", names)
    # The name of a conversation is the user's own words: the log, which forgets nothing, has
    # its hash.
    name = hashlib.sha256(session_id.encode()).hexdigest()
    await audit.record(connection, caller, "session.end", f"session/{name}")


async def _count(
    connection: Connection,
    caller: Caller,
    session_id: str,
    following: int,
    *,
    promoted: int = 0,
    dropped: int = 0,
    ended_at: datetime | None = None,
) -> Mapping[str, Any]:
    """Add to what became of a conversation, and return all of it.

    Without an instant it is about to end, and not complete until there is one.
    """
    row: Mapping[str, Any] = await connection.fetchrow(
        """
        INSERT INTO ended_sessions AS session
               (tenant_id, user_id, session_id, next_position, promoted, dropped, ended_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
            ON CONFLICT (user_id, tenant_id, session_id) DO UPDATE
           SET next_position = greatest(session.next_position, $4),
               promoted = session.promoted + $5, dropped = session.dropped + $6,
               ended_at = $7
        RETURNING promoted, dropped, ended_at
        """,
        caller.tenant_id,
        caller.user_id,
        session_id,
        following,
        promoted,
        dropped,
        ended_at,
    )
    return row
