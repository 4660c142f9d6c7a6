"""Memories in Redis: the short-term tier.

Keys, all under mesh:{tenant}:{user}: and all with a time to live:

* short:<id>       a hash: `body` (JSON of what never changes by itself), `version`, `used`, `seen`
* text:<place>     the id of the memory with that text, so that the same text is kept once
* shorts           a sorted set of ids by expiry, to list by

An index entry whose memory has expired is skipped and swept; what Redis loses in a crash is at
most the newest second (appendfsync everysec).
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from uuid import UUID

from server import audit, consent, ids, requests
from server.cache import KEY_PREFIX, Redis, out_of_reach
from server.caller import Caller
from server.database import Database
from server.errors import AlreadyExists, EtagMismatch, NotFound
from server.memory import ranking
from server.memory.model import Change, Draft, Filter, Found, Memory, Source, Tier, hash_of, size_of
from server.memory.store import new_memory
from server.memory.writing import begin_writing

# Each script is one atomic step; the keys of a call all belong to one user. Expiry goes by the
# clock of Redis, as Redis itself does.
_CREATE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiry = now + ARGV[4]
local first = redis.call('GET', KEYS[2])
if first and redis.call('EXISTS', ARGV[5] .. first) == 1 then
    redis.call('HINCRBY', ARGV[5] .. first, 'used', 1)
    redis.call('HSET', ARGV[5] .. first, 'seen', ARGV[3])
    return first
end
redis.call('HSET', KEYS[1], 'body', ARGV[2], 'version', 1, 'used', 0, 'seen', ARGV[3])
redis.call('PEXPIREAT', KEYS[1], expiry)
redis.call('SET', KEYS[2], ARGV[1], 'PXAT', expiry)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
redis.call('ZADD', KEYS[3], expiry, ARGV[1])
redis.call('PEXPIREAT', KEYS[3], expiry)
return ARGV[1]
"""
_UPDATE: Final = """
local version = redis.call('HGET', KEYS[1], 'version')
if not version then return 'missing' end
if ARGV[2] ~= '' and ARGV[2] ~= version then return 'stale' end
if KEYS[2] ~= KEYS[3] then
    local taken = redis.call('GET', KEYS[3])
    if taken and taken ~= ARGV[1] and redis.call('EXISTS', ARGV[4] .. taken) == 1 then
        return 'taken'
    end
    redis.call('DEL', KEYS[2])
    redis.call('SET', KEYS[3], ARGV[1], 'PXAT', redis.call('PEXPIRETIME', KEYS[1]))
end
redis.call('HSET', KEYS[1], 'body', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'version', 1)
return 'changed'
"""
_DELETE: Final = """
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[1])
"""


class ShortTermStore:
    """Keeps short-term memories of one user at a time.

    Every write is audited: the event is committed after Redis took the write, and a write whose
    event cannot be committed is not acknowledged and goes by itself.
    """

    def __init__(self, redis: Redis, database: Database, lifetime: timedelta) -> None:
        self._redis = redis
        self._database = database
        self._lifetime = lifetime
        self._create_script = redis.register_script(_CREATE)
        self._update_script = redis.register_script(_UPDATE)
        self._delete_script = redis.register_script(_DELETE)

    async def create(
        self, caller: Caller, draft: Draft, request_id: str, now: datetime
    ) -> tuple[Memory, bool]:
        """Store a memory, or count the one with the same text as seen again.

        Returns:
            The memory, and whether it was created.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            RequestIdReused: The request id stands for other contents.
            NotFound: An earlier call under the request id made a memory that has expired.
            StoreUnavailable: Redis does not answer, or is full.
        """
        keys = _Keys(caller)
        async with self._database.transaction(caller) as connection:
            writing = await begin_writing(connection, caller)
            memory = new_memory(ids.new_id(), draft, writing.consent_version, now)
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "CreateMemory", request_id, repr(draft).encode(), memory.id
                )
                if first_id != memory.id:
                    return await self.get(caller, first_id), False
            with out_of_reach():
                kept: bytes = await self._create_script(
                    keys=[keys.memory(memory.id), keys.text(memory), keys.index],
                    args=[
                        memory.id.hex,
                        _body(memory),
                        _milliseconds(now),
                        int(self._lifetime.total_seconds() * 1000),
                        keys.memories,
                    ],
                )
            kept_id = UUID(kept.decode())
            created = kept_id == memory.id
            if request_id and not created:
                await requests.redirect(connection, caller, "CreateMemory", request_id, kept_id)
            action = "memory.create" if created else "memory.see"
            await audit.record(connection, caller, action, ids.show(ids.MEMORY, kept_id))
        return await self.get(caller, kept_id), created

    async def get(self, caller: Caller, memory_id: UUID) -> Memory:
        """Return a memory.

        Raises:
            NotFound: There is none, it has expired, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        (memory,) = await self._read(caller, [memory_id])
        if memory is None:
            raise NotFound("memory")
        return memory

    async def find(self, caller: Caller, which: Filter, *, before: UUID | None) -> list[Memory]:
        """Return all memories with ids below `before`, highest first.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        if Tier.SHORT_TERM not in which.tiers:
            return []
        with out_of_reach():
            members = cast("list[bytes]", await self._redis.zrange(_Keys(caller).index, 0, -1))
        wanted = sorted((UUID(member.decode()) for member in members), reverse=True)
        memories = await self._read(caller, [i for i in wanted if before is None or i < before])
        return [memory for memory in memories if memory and _passes(memory, which)]

    async def update(
        self, caller: Caller, memory_id: UUID, change: Change, now: datetime
    ) -> Memory:
        """Change some fields of a memory.

        Raises:
            NotFound: There is none, it has expired, or it is not the caller's.
            EtagMismatch: It is no longer at the expected version.
            AlreadyExists: Another short-term memory has the new text.
            ConsentMissing: The user has not consented to memory.store.
            StoreUnavailable: Redis does not answer.
        """
        keys = _Keys(caller)
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            current = await self.get(caller, memory_id)
            changed = _changed(current, change, now)
            with out_of_reach():
                outcome: bytes = await self._update_script(
                    keys=[keys.memory(memory_id), keys.text(current), keys.text(changed)],
                    args=[
                        memory_id.hex,
                        # Without an etag, the version just read: the body is written whole.
                        str(change.expected_version or current.version),
                        _body(changed),
                        keys.memories,
                    ],
                )
            _raise_for(outcome)
            await audit.record(connection, caller, "memory.update", ids.show(ids.MEMORY, memory_id))
        return await self.get(caller, memory_id)

    async def delete(self, caller: Caller, memory_id: UUID) -> None:
        """Delete a memory.

        Raises:
            NotFound: There is none, it has expired, or it is not the caller's.
            StoreUnavailable: Redis does not answer.
        """
        keys = _Keys(caller)
        async with self._database.transaction(caller) as connection:
            current = await self.get(caller, memory_id)
            await audit.record(connection, caller, "memory.delete", ids.show(ids.MEMORY, memory_id))
            with out_of_reach():
                await self._delete_script(
                    keys=[keys.memory(memory_id), keys.text(current), keys.index],
                    args=[memory_id.hex],
                )

    async def query(
        self, caller: Caller, terms: Mapping[int, float], which: Filter, limit: int
    ) -> list[Found]:
        """Return the memories that the weighted terms match best, best first.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        memories = await self.find(caller, which, before=None)
        scored = (Found(m, ranking.score(terms, ranking.weights(m.content))) for m in memories)
        matching = [found for found in scored if found.lexical > 0]
        return sorted(matching, key=lambda found: -found.lexical)[:limit]

    async def _read(self, caller: Caller, memory_ids: list[UUID]) -> list[Memory | None]:
        """Read memories in one round trip; None for each that is not there."""
        if not memory_ids:
            return []
        keys = _Keys(caller)
        with out_of_reach():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for memory_id in memory_ids:
                    pipeline.hgetall(keys.memory(memory_id))
                    pipeline.pexpiretime(keys.memory(memory_id))
                answers = await pipeline.execute()
        pairs = zip(memory_ids, answers[::2], answers[1::2], strict=True)
        return [_memory(i, fields, expiry) if fields else None for i, fields, expiry in pairs]


class _Keys:
    """The keys of one user."""

    __slots__ = ("_user", "index", "memories")

    def __init__(self, caller: Caller) -> None:
        self._user = f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:"
        self.index = f"{self._user}shorts"
        self.memories = f"{self._user}short:"

    def memory(self, memory_id: UUID) -> str:
        return f"{self.memories}{memory_id.hex}"

    def text(self, memory: Memory) -> str:
        place = f"{memory.content_hash.hex()}|{memory.session_position}|{memory.session_id}"
        return f"{self._user}text:{hashlib.sha256(place.encode()).hexdigest()}"


def _passes(memory: Memory, which: Filter) -> bool:
    same_session = which.session_id in ("", memory.session_id)
    late_enough = which.occurred_after is None or which.occurred_after <= memory.occurred_at
    early_enough = which.occurred_before is None or memory.occurred_at < which.occurred_before
    return same_session and late_enough and early_enough and set(which.tags) <= set(memory.tags)


def _changed(memory: Memory, change: Change, now: datetime) -> Memory:
    content = memory.content if change.content is None else change.content
    tags = memory.tags if change.tags is None else change.tags
    return Memory(
        id=memory.id,
        tier=memory.tier,
        content=content,
        tags=tags,
        source=memory.source,
        session_id=memory.session_id,
        session_position=memory.session_position,
        speaker=memory.speaker if change.speaker is None else change.speaker,
        occurred_at=change.occurred_at or memory.occurred_at,
        size_bytes=size_of(content, tags),
        content_hash=hash_of(content),
        version=memory.version + 1,
        created_at=memory.created_at,
        updated_at=now,
        last_seen_at=memory.last_seen_at,
        use_count=memory.use_count,
        expires_at=memory.expires_at,
    )


def _raise_for(outcome: bytes) -> None:
    match outcome:
        case b"missing":
            raise NotFound("memory")
        case b"stale":
            raise EtagMismatch
        case b"taken":
            raise AlreadyExists("another short-term memory has the same content")


def _body(memory: Memory) -> bytes:
    return json.dumps(
        {
            "content": memory.content,
            "tags": memory.tags,
            "source": memory.source,
            "session_id": memory.session_id,
            "session_position": memory.session_position,
            "speaker": memory.speaker,
            "occurred_at": memory.occurred_at.isoformat(),
            "created_at": memory.created_at.isoformat(),
            "updated_at": memory.updated_at.isoformat(),
        }
    ).encode()


def _memory(memory_id: UUID, fields: Mapping[bytes, bytes], expiry: int) -> Memory:
    body: dict[str, Any] = json.loads(fields[b"body"])
    tags = tuple(body["tags"])
    return Memory(
        id=memory_id,
        tier=Tier.SHORT_TERM,
        content=body["content"],
        tags=tags,
        source=Source(body["source"]),
        session_id=body["session_id"],
        session_position=body["session_position"],
        speaker=body["speaker"],
        occurred_at=datetime.fromisoformat(body["occurred_at"]),
        size_bytes=size_of(body["content"], tags),
        content_hash=hash_of(body["content"]),
        version=int(fields[b"version"]),
        created_at=datetime.fromisoformat(body["created_at"]),
        updated_at=datetime.fromisoformat(body["updated_at"]),
        last_seen_at=_instant(int(fields[b"seen"])),
        use_count=int(fields[b"used"]),
        expires_at=_instant(expiry),
    )


def _milliseconds(instant: datetime) -> int:
    return int(instant.timestamp() * 1000)


def _instant(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
