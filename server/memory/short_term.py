"""Memories in Redis: the short-term tier.

Keys, all under mesh:{tenant}:{user}: and all with a time to live:

* short:<id>       a hash: `body` (JSON of what never changes by itself), `version`, `used`, `seen`,
                   `feedback`, `useful`, `retrieved`, and the `place` that identical content would
                   have
* past:<id>        a list of the bodies before the present one, each after its size
* text:<place>     the id of the memory with that text at that place, which is kept once
* shorts           a sorted set of ids by expiry, to list by
* short-sizes      a hash: the sizes of memories and of what they were, and the sums of both
* session:<hash>   the next position in a conversation
* append:<hash>    the first id that a request to append made
* create:<hash>    what a request to create did: created:<id> or seen:<id>
* shorts-version   another number after every write, for whoever keeps answers

What Redis may lose, and what that means. With appendfsync everysec a crash takes at most the
newest second of writes, FLUSHALL and a lost disk take everything, and one that is full takes
nothing new: it refuses whole scripts. Only short-term memories go with it. A memory is long-term
or permanent, and acknowledged as such, once PostgreSQL has committed it; only then does its copy
here go, and PostgreSQL remembers that it has left (short_term_exits). So a copy that stays, or
comes back because Redis forgot the deletion, counts no more: reads look there, and remove it.
Positions of a conversation go on after the highest one that PostgreSQL knows.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, cast
from uuid import UUID

import structlog

from server import audit, ids, requests
from server.cache import KEY_PREFIX, Redis, out_of_reach, prefix_of
from server.caller import Caller
from server.database import Connection, Database
from server.errors import (
    AlreadyExists,
    EtagMismatch,
    InvalidArgument,
    NotFound,
    StateConflict,
    StoreUnavailable,
)
from server.memory import ranking, short_term_scripts
from server.memory.insertion import new_memory
from server.memory.model import Change, Draft, Filter, Found, Memory, Tier
from server.memory.short_term_bodies import (
    Kept,
    body_of,
    changed,
    kept_from,
    milliseconds,
    open_body_of,
    past_from,
    past_of,
    place_of,
    request_key,
    session_key,
)
from server.memory.short_term_cache import Snapshot, Snapshots
from server.memory.short_term_exits import (
    begin_leaving,
    begin_writing_short_term,
    leave,
    left,
    left_by_now,
)
from server.memory.short_term_room import Room, note_usage, room_of
from server.memory.store import fetch_memory
from server.memory.writing import Writing, begin_writing
from server.preferences import Language

log = structlog.get_logger()

_TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the words of a question brought."""

    found: Sequence[Found]
    """Best first."""
    left_by: int = 0
    """The data version at which all is durable that may have left shortly before this look; 0:
    nothing has."""


class ShortTermStore:
    """Keeps short-term memories of one user at a time.

    Every write is audited: the event is committed after Redis took the write, and a write whose
    event cannot be committed is not acknowledged and goes by itself.
    """

    def __init__(self, redis: Redis, database: Database, lifetime: timedelta) -> None:
        """Keep memories for `lifetime`, unless their user chose another one."""
        self._redis = redis
        self._database = database
        self._lifetime = lifetime
        self._snapshots = Snapshots()
        self._create = redis.register_script(short_term_scripts.CREATE)
        self._append = redis.register_script(short_term_scripts.APPEND)
        self._update = redis.register_script(short_term_scripts.UPDATE)
        self._rate = redis.register_script(short_term_scripts.RATE)
        self._count = redis.register_script(short_term_scripts.COUNT)
        self._remove = redis.register_script(short_term_scripts.REMOVE)
        self._some = redis.register_script(short_term_scripts.SOME)
        self._all = redis.register_script(short_term_scripts.ALL)
        self._usage = redis.register_script(short_term_scripts.USAGE)

    async def create(
        self, caller: Caller, draft: Draft, request_id: str, now: datetime
    ) -> tuple[Memory, bool]:
        """Store a memory, or count the one with the same text as seen again.

        Returns:
            The memory, and whether it was created.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            QuotaExceeded: It does not fit.
            RequestIdReused: The request id stands for other contents.
            NotFound: An earlier call under the request id made a memory that has expired.
            InvalidArgument: It is sensitive.
            StoreUnavailable: Redis does not answer, or is full.
        """
        refuse_sensitive(draft.is_sensitive)
        async with self.writing(caller) as (connection, writing, room):
            memory = new_memory(caller, ids.new_id(), draft, writing.consent_version, now)
            contents = repr(draft).encode()
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "CreateMemory", request_id, contents, memory.id
                )
                if first_id != memory.id:
                    return await self._made(connection, caller, first_id), False
            request = request_key(request_id, contents)
            kept, created = await self._put(connection, caller, memory, room, request)
            if request_id and kept.id != memory.id:
                await requests.redirect(connection, caller, "CreateMemory", request_id, kept.id)
            action = "memory.create" if created else "memory.see"
            await audit.record(connection, caller, action, ids.show(ids.MEMORY, kept.id))
        return kept, created

    async def get(self, caller: Caller, memory_id: UUID) -> Memory:
        """Return a memory.

        Raises:
            NotFound: There is none, it has expired or left, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        there = await self._still_here(caller, await self._read(caller, [memory_id]))
        if not there:
            raise NotFound("memory")
        return there[0].memory

    async def find(self, caller: Caller, which: Filter, *, before: UUID | None) -> list[Memory]:
        """Return all memories with ids below `before`, highest first.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        if Tier.SHORT_TERM not in which.tiers or which.archived:
            return []
        snapshot = await self._snapshot(caller)
        found = [
            memory
            for memory in _living(snapshot)
            if _passes(memory, which) and (before is None or memory.id < before)
        ]
        gone = await self._gone(caller, [memory.id for memory in found])
        there = (memory for memory in found if memory.id not in gone)
        return sorted(there, key=lambda memory: memory.id, reverse=True)

    async def update(
        self, caller: Caller, memory_id: UUID, change: Change, now: datetime
    ) -> Memory:
        """Change some fields of a memory, all but its tier; what it was stays readable.

        What memories were has as much room as they have themselves: what is beyond it goes, the
        oldest first.

        Raises:
            NotFound: There is none, it has expired or left, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            AlreadyExists: Another short-term memory has the new text.
            QuotaExceeded: It does not fit any more.
            ConsentMissing: The user has not consented to memory.store.
            InvalidArgument: It would become sensitive.
            StoreUnavailable: Redis does not answer, or is full.
        """
        refuse_sensitive(change.is_sensitive)
        async with self.writing(caller) as (connection, _, room):
            for _ in range(_TRIES):
                current = (await self.current(connection, caller, memory_id)).memory
                if change.expected_version not in (None, current.version):
                    raise EtagMismatch
                kept = await self._replace(
                    connection, caller, current, changed(current, change, now), room
                )
                if kept:
                    break
            else:
                raise EtagMismatch
            await audit.record(connection, caller, "memory.update", ids.show(ids.MEMORY, memory_id))
        return kept

    async def rate(
        self,
        caller: Caller,
        memory_id: UUID,
        opinion: float | None,
        now: datetime,
        *,
        useful: bool,
    ) -> Memory:
        """Note what a memory is worth to its user, as LifecycleStore.rate does.

        Raises:
            NotFound: There is none, it has expired or left, or it is not the caller's.
            ConsentMissing: The user has not consented to memory.store.
            StoreUnavailable: Redis does not answer, or is full.
        """
        async with self.writing(caller) as (connection, _, _):
            await self.current(connection, caller, memory_id)
            said = "" if opinion is None else str(opinion)
            entry = await self._run(
                self._rate, caller, memory_id.hex, said, int(useful), milliseconds(now)
            )
            if entry is None:
                raise NotFound("memory")
            await audit.record(
                connection, caller, "memory.feedback", ids.show(ids.MEMORY, memory_id)
            )
        return kept_from(entry).memory

    async def count(self, retrieved: Sequence[tuple[Caller, UUID, int]]) -> list[bool]:
        """Add to how often queries returned memories, in one round trip.

        Args:
            retrieved: Whose memory, its id, and how many times more.

        Returns:
            Which of them are here.

        Raises:
            StoreUnavailable: Redis does not answer, or is full.
        """
        with out_of_reach():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for caller, memory_id, times in retrieved:
                    await self._count(
                        keys=[prefix_of(caller)], args=[memory_id.hex, times], client=pipeline
                    )
                return list(map(bool, await pipeline.execute()))

    async def versions(
        self, caller: Caller, memory_id: UUID, *, before: int | None, limit: int
    ) -> list[Memory]:
        """Return a memory as it is and as it was, newest version first.

        Args:
            caller: Whose memory it is.
            memory_id: Its id.
            before: Only versions below this one; None for all.
            limit: How many at most.

        Raises:
            NotFound: There is none, it has expired or left, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        newest = await self.get(caller, memory_id)
        past = (await self.past(caller, [newest]))[memory_id]
        all_of_them = [newest, *reversed(past)]
        below = [was for was in all_of_them if before is None or was.version < before]
        return below[:limit]

    async def delete(self, caller: Caller, memory_id: UUID) -> None:
        """Delete a memory with what it was.

        Raises:
            NotFound: There is none, it has expired or left, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        async with self._database.transaction(caller) as connection:
            await begin_leaving(connection, caller)
            await self.current(connection, caller, memory_id)
            await leave(connection, caller, [memory_id])
            await audit.record(connection, caller, "memory.delete", ids.show(ids.MEMORY, memory_id))
        await self.remove(caller, [memory_id])

    async def refuse(self, caller: Caller, memory_id: UUID, what: str) -> NoReturn:
        """Say that a short-term memory cannot be treated like a durable one, if there is one.

        Raises:
            StateConflict: There is one.
            NotFound: There is none, it has expired or left, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        await self.get(caller, memory_id)
        raise StateConflict(
            f"a short-term memory cannot be {what}; update its tier to long-term first"
        )

    async def query(
        self,
        caller: Caller,
        terms: Mapping[int, float],
        which: Filter,
        limit: int,
        language: Language = Language.ENGLISH,
    ) -> Remembered:
        """Return the memories that the weighted terms match best, best first.

        A turn is matched together with the turns around it, as in Postgres.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        if Tier.SHORT_TERM not in which.tiers or not terms:
            return Remembered(())
        before = self._snapshots.find(caller)
        snapshot = await self._snapshot(caller)
        terms_of = await snapshot.terms(language)
        scored = (
            (ranking.score(terms, terms_of[memory.id]), memory)
            for memory in _living(snapshot)
            if _passes(memory, which)
        )
        matching = [Found(memory, lexical) for lexical, memory in scored if lexical > 0]
        matching.sort(key=lambda found: (-found.lexical, found.memory.id))
        del matching[limit:]
        has_changed = snapshot is not before and bool(snapshot.version)
        if not (matching or has_changed):
            return Remembered(())
        gone, version = await self._gone_by(caller, [found.memory.id for found in matching])
        there = [found for found in matching if found.memory.id not in gone]
        return Remembered(there, version if gone or has_changed else 0)

    async def usage(self, caller: Caller) -> tuple[int, int]:
        """Return how many bytes of memories are kept, and how many memories.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        used_bytes, count = await self._run(self._usage, caller)
        return used_bytes, count

    # --- what sessions and promotions are made of

    @asynccontextmanager
    async def writing(self, caller: Caller) -> AsyncIterator[tuple[Connection, Writing, Room]]:
        """Open a transaction during which no memory of the user's leaves.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            StoreUnavailable: Others take too long.
        """
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection)
            await begin_writing_short_term(connection, caller)
            yield connection, writing, await room_of(connection, caller, self._lifetime)

    async def current(self, connection: Connection, caller: Caller, memory_id: UUID) -> Kept:
        """Return a memory as it stands while the transaction lets none leave.

        Raises:
            NotFound: There is none, it has expired or left, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        there = await self.some(connection, caller, [memory_id])
        if not there:
            raise NotFound("memory")
        return there[0]

    async def some(
        self, connection: Connection, caller: Caller, memory_ids: Sequence[UUID]
    ) -> list[Kept]:
        """Return those of the memories that are there and have not left.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        kept = await self._read(caller, memory_ids)
        gone = await left(connection, caller, [one.memory.id for one in kept])
        return [one for one in kept if one.memory.id not in gone]

    async def past(self, caller: Caller, memories: Sequence[Memory]) -> dict[UUID, list[Memory]]:
        """Return what each of some memories was, oldest version first.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        prefix = f"{prefix_of(caller)}past:"
        with out_of_reach():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for memory in memories:
                    pipeline.lrange(f"{prefix}{memory.id.hex}", 0, -1)
                answers = await pipeline.execute()
        return {
            memory.id: [past_from(memory, past) for past in answer]
            for memory, answer in zip(memories, answers, strict=True)
        }

    async def append(
        self,
        connection: Connection,
        caller: Caller,
        turns: Sequence[Memory],
        room: Room,
        *,
        least: int,
        request: str,
    ) -> list[Memory]:
        """Keep turns at the next free places of their conversation, all or none.

        Args:
            connection: A transaction that lets none of the user's memories leave.
            caller: Whose conversation it is.
            turns: At least one, of one conversation, without their places.
            room: How much the user may keep, and for how long.
            least: The first place that may be free.
            request: The same for every try of a request, so that none is kept twice; empty for
                none.

        Returns:
            The turns at their places: those of an earlier try, if there was one.

        Raises:
            QuotaExceeded: They do not fit.
            InvalidArgument: The conversation has no places left.
            StoreUnavailable: Redis does not answer, or is full.
        """
        outcome, used_bytes, *made = await self._run(
            self._append,
            caller,
            milliseconds(turns[0].last_seen_at),
            room.limit_bytes,
            room.milliseconds,
            session_key(turns[0].session_id),
            least,
            request,
            *_fields_of(turns),
        )
        match outcome:
            case b"full":
                raise room.refusal(used_bytes)
            case b"far":
                raise InvalidArgument("session_id", "has no positions left")
            case b"repeated":
                first = UUID(made[0].decode())
                earlier = await self.some(connection, caller, successors(first, len(turns)))
                return [kept.memory for kept in earlier]
        added = sum(turn.size_bytes for turn in turns)
        await note_usage(connection, caller, used_bytes, added, room)
        return [kept_from(entry).memory for entry in made[0]]

    async def remove(self, caller: Caller, memory_ids: Sequence[UUID]) -> None:
        """Remove the copies of memories that have left.

        If Redis does not answer they stay, and the next look at them removes them.
        """
        if memory_ids:
            with suppress(StoreUnavailable):
                await self._run(self._remove, caller, *(one.hex for one in memory_ids))

    async def owners(self, cursor: int, count: int) -> tuple[int, list[Caller]]:
        """Return users who have short-term memories, some of them twice.

        Args:
            cursor: 0 to begin with, then what the call before returned.
            count: How many keys to look at, more or less.

        Returns:
            The next cursor, 0 at the end, and the users.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        with out_of_reach():
            cursor, keys = await self._redis.scan(cursor, f"{KEY_PREFIX}*:shorts", count)
        names = [cast("bytes", key).decode().removeprefix(KEY_PREFIX).split(":") for key in keys]
        return cursor, [Caller(UUID(tenant), UUID(user)) for tenant, user, _ in names]

    # --- one step each

    async def _put(
        self, connection: Connection, caller: Caller, memory: Memory, room: Room, request: str
    ) -> tuple[Memory, bool]:
        """Keep a memory, or count the one with the same text at its place as seen.

        Returns:
            The memory, and whether it is new. Both are what an earlier try of the request did.
        """
        position = memory.session_position
        while True:
            outcome, used_bytes, *entry = await self._run(
                self._create,
                caller,
                memory.id.hex,
                body_of(memory),
                milliseconds(memory.last_seen_at),
                place_of(memory),
                memory.size_bytes,
                room.limit_bytes,
                room.milliseconds,
                "" if position is None else session_key(memory.session_id),
                -1 if position is None else position,
                request,
            )
            if outcome == b"full":
                raise room.refusal(used_bytes)
            kept = kept_from(*entry).memory
            is_new = outcome == b"created"
            if is_new:
                await note_usage(connection, caller, used_bytes, kept.size_bytes, room)
            if kept.id == memory.id or not await left(connection, caller, [kept.id]):
                return kept, is_new
            # Redis was not there when it left, or came back from before that.
            await self._run(self._remove, caller, kept.id.hex)

    async def _made(self, connection: Connection, caller: Caller, memory_id: UUID) -> Memory:
        """Return a memory that an earlier call made, wherever it is now."""
        try:
            return (await self.current(connection, caller, memory_id)).memory
        except NotFound:
            return await fetch_memory(connection, caller, memory_id)

    async def _replace(
        self, connection: Connection, caller: Caller, current: Memory, new: Memory, room: Room
    ) -> Memory | None:
        """Change a memory; None if it has changed since it was read."""
        outcome, used_bytes, *entry = await self._run(
            self._update,
            caller,
            current.id.hex,
            str(current.version),
            body_of(new),
            place_of(new),
            new.size_bytes,
            room.limit_bytes,
            past_of(current),
        )
        match outcome:
            case b"missing":
                raise NotFound("memory")
            case b"stale":
                return None
            case b"taken":
                raise AlreadyExists("another short-term memory has the same content")
            case b"full":
                raise room.refusal(used_bytes)
        added = new.size_bytes - current.size_bytes
        await note_usage(connection, caller, used_bytes, added, room)
        return kept_from(*entry).memory

    async def _read(self, caller: Caller, memory_ids: Sequence[UUID]) -> list[Kept]:
        if not memory_ids:
            return []
        entries = await self._run(self._some, caller, *(one.hex for one in memory_ids))
        return [kept_from(entry) for entry in entries if entry]

    async def _snapshot(self, caller: Caller) -> Snapshot:
        before = self._snapshots.find(caller)
        answer = await self._run(self._all, caller, before.version if before else b"")
        if answer is None and before:
            return before
        version, entries = answer
        snapshot = Snapshot(version, entries, before)
        # Without a version nothing was written yet that tells of itself.
        if version:
            self._snapshots.keep(caller, snapshot)
        return snapshot

    async def _still_here(self, caller: Caller, kept: Sequence[Kept]) -> list[Kept]:
        gone = await self._gone(caller, [one.memory.id for one in kept])
        return [one for one in kept if one.memory.id not in gone]

    async def _gone(self, caller: Caller, memory_ids: Sequence[UUID]) -> set[UUID]:
        """Return which of the memories have left, and remove what is still here of them."""
        return (await self._gone_by(caller, memory_ids))[0] if memory_ids else set()

    async def _gone_by(self, caller: Caller, memory_ids: Sequence[UUID]) -> tuple[set[UUID], int]:
        """Do as `_gone` does, and return the data version of that instant too."""
        gone, version = await left_by_now(self._database, caller, memory_ids)
        if gone:
            log.info("copies of memories that left", count=len(gone))
            await self.remove(caller, sorted(gone))
        return gone, version

    async def _run(self, script: Any, caller: Caller, *arguments: object) -> Any:
        with out_of_reach():
            return await script(keys=[prefix_of(caller)], args=list(arguments))


def refuse_sensitive(is_sensitive: bool | None) -> None:  # noqa: FBT001 - what a draft says
    """Refuse what is to be encrypted: Redis keeps texts as they are.

    Raises:
        InvalidArgument: It is sensitive.
    """
    if is_sensitive:
        raise InvalidArgument(
            "memory.sensitive", "cannot be kept in the short term, where nothing is encrypted"
        )


def _fields_of(turns: Sequence[Memory]) -> Iterator[str | int]:
    """Yield what the script that appends is told of each turn, one after the other."""
    for turn in turns:
        yield from (turn.id.hex, open_body_of(turn), turn.content_hash.hex(), turn.size_bytes)


def successors(first: UUID, count: int) -> list[UUID]:
    """Return the ids of turns that were made together, in their order.

    A retry that knows the first one knows all of them.
    """
    return [UUID(int=first.int + place) for place in range(count)]


def _living(snapshot: Snapshot) -> list[Memory]:
    now = datetime.now(UTC)
    return [one for one in snapshot.memories if one.expires_at is None or now < one.expires_at]


def _passes(memory: Memory, which: Filter) -> bool:
    same_session = which.session_id in ("", memory.session_id)
    late_enough = which.occurred_after is None or which.occurred_after <= memory.occurred_at
    early_enough = which.occurred_before is None or memory.occurred_at < which.occurred_before
    tagged = not which.tags or set(which.tags) <= set(memory.tags)
    return same_session and late_enough and early_enough and tagged
