"""Answers to queries, kept in Redis until something is written, or for a minute.

Only questions that come again are looked for and kept: most questions are asked once, and a look
costs them a fifth of what the answer does.

Under mesh:{tenant}:{user}: there are

* answers           a hash: the answer to each question that was asked lately, and `forgotten`,
                    which changes whenever all of them are dropped
* shorts-version    what the short-term tier counts its writes in

An answer tells what it was made of. It stands for as long as the data, the settings and the short
term are at the versions it names, at most a minute: freshness moves on, and so do the scores that
a meditation gives. The hash goes as a whole a minute after its first answer came, so that no text
stays for longer than that.
"""

import asyncio
import struct
from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import uuid4

import structlog

from server.cache import Redis, RedisError, prefix_of
from server.caller import Caller
from server.memory.search_store import Versions

LIFETIME: Final = timedelta(seconds=60)
MOST_ANSWERS: Final = 64
"""How many answers of one user are kept; more are not until those have gone."""
LARGEST_ANSWER: Final = 64 * 1024
_MOST_WAITING: Final = 1_000
_MOST_REMEMBERED: Final = 10_000
"""How many questions are remembered to have been asked, as digests."""
_PATIENCE_SECONDS: Final = 0.5
"""Longer than this nobody waits for an answer that is soon found anew."""
_HEAD: Final = struct.Struct(">qqqq")
"""Of an answer: the versions of data, settings and short term; milliseconds since 1970 at which
it ends. The answer follows."""

# One command: a pipeline of three takes twice as long, and every question waits for it.
_LOOK: Final = """
local found = redis.call('HMGET', KEYS[1], ARGV[1], 'forgotten')
return {found[1], found[2], redis.call('HLEN', KEYS[1]), redis.call('GET', KEYS[2])}
"""
# Whoever looked before the answers were dropped may have read what is deleted since.
_KEEP: Final = """
if (redis.call('HGET', KEYS[1], 'forgotten') or '') ~= ARGV[1] then return 0 end
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[4])
return redis.call('PEXPIRE', KEYS[1], ARGV[5], 'NX')
"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that is kept."""

    versions: Versions
    short_term: int
    ends_at: int
    """Milliseconds since 1970."""
    body: bytes

    @classmethod
    def read(cls, value: bytes) -> "Kept":
        """Return the answer that `write` wrote."""
        data, settings, short_term, ends_at = _HEAD.unpack_from(value)
        return cls(Versions(data, settings), short_term, ends_at, value[_HEAD.size :])

    def write(self) -> bytes:
        """Return the answer as Redis keeps it."""
        return _HEAD.pack(*self.versions, self.short_term, self.ends_at) + self.body


@dataclass(frozen=True, slots=True)
class Look:
    """What a look for an answer found; with it the answer is kept that was missing."""

    key: str
    question: bytes
    kept: Kept | None
    short_term: int
    """The version of the short-term tier before the question was answered."""
    forgotten: bytes
    has_room: bool

    def standing(self, now: datetime) -> Kept | None:
        """Return the answer that is kept, if it stands as far as Redis can tell."""
        kept = self.kept
        if kept and kept.short_term == self.short_term and _milliseconds(now) < kept.ends_at:
            return kept
        return None


class Answers:
    """Keeps answers of one user at a time. Without Redis there are none, and nothing fails."""

    def __init__(self, redis: Redis, *, from_the_first: bool = False) -> None:
        """Prepare to keep answers in Redis.

        Args:
            redis: Where.
            from_the_first: Look for every question, not only for those that come again.
        """
        self._redis = redis
        self._from_the_first = from_the_first
        self._look_script = redis.register_script(_LOOK)
        self._keep_script = redis.register_script(_KEEP)
        self._waiting: deque[tuple[Look, Kept]] = deque()
        self._has_work = asyncio.Event()
        self._asked: OrderedDict[tuple[Caller, bytes], None] = OrderedDict()

    def comes_again(self, caller: Caller, question: bytes) -> bool:
        """Tell whether a question was asked lately, and remember that it is asked now."""
        known = self._from_the_first or (caller, question) in self._asked
        self._asked[caller, question] = None
        self._asked.move_to_end((caller, question))
        if len(self._asked) > _MOST_REMEMBERED:
            self._asked.popitem(last=False)
        return known

    async def look(self, caller: Caller, question: bytes, until: float) -> Look | None:
        """Look for the answer to a question; None: Redis is out of reach.

        Args:
            caller: Who asks.
            question: A digest of all that was asked.
            until: When the legs of a query are given up, by the clock of the event loop.
        """
        key = _key(caller, "answers")
        try:
            async with asyncio.timeout(_patience(until)):
                value, forgotten, size, short_term = await self._look_script(
                    keys=[key, _key(caller, "shorts-version")], args=[question]
                )
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("answers out of reach", error=repr(error))
            return None
        kept = Kept.read(value) if value else None
        has_room = kept is not None or size < MOST_ANSWERS
        return Look(key, question, kept, int(short_term or 0), forgotten or b"", has_room)

    def keep(
        self,
        look: Look,
        body: bytes,
        versions: Versions,
        now: datetime,
        expires_at: datetime | None,
    ) -> None:
        """Have an answer kept soon, unless it is too large or there are too many.

        Args:
            look: The look that did not find it, from before the question was answered.
            body: The answer.
            versions: What it was made of.
            now: When the question was asked.
            expires_at: When something that it was made of expires; None: nothing does.
        """
        if not look.has_room or len(body) > LARGEST_ANSWER:
            return
        if len(self._waiting) >= _MOST_WAITING:
            log.warning("answers are not kept: too many wait for Redis")
            return
        ends_at = min(now + LIFETIME, expires_at or datetime.max.replace(tzinfo=now.tzinfo))
        self._waiting.append((look, Kept(versions, look.short_term, _milliseconds(ends_at), body)))
        self._has_work.set()

    async def flush(self) -> None:
        """Write the answers that wait to be kept. What Redis does not take is dropped."""
        while self._waiting:
            look, kept = self._waiting.popleft()
            try:
                await self._keep_script(
                    keys=[look.key],
                    args=[
                        look.forgotten,
                        MOST_ANSWERS,
                        look.question,
                        kept.write(),
                        int(LIFETIME.total_seconds() * 1000),
                    ],
                )
            except RedisError as error:
                log.warning("answer not kept", error=repr(error))

    async def run(self) -> None:
        """Write answers as they come, until cancelled."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            await self.flush()

    async def forget(self, caller: Caller) -> None:
        """Drop all answers to the caller, those under way included.

        If Redis is out of reach they go by themselves, within a minute of the first one.
        """
        key = _key(caller, "answers")
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.delete(key)
                pipeline.hset(key, "forgotten", uuid4().hex)
                pipeline.pexpire(key, LIFETIME)
                await pipeline.execute()
        except RedisError as error:
            log.warning("answers not forgotten", error=repr(error))


def _patience(until: float) -> float:
    """Return how long to wait for an answer: the legs that find one anew need time too."""
    return min(_PATIENCE_SECONDS, (until - asyncio.get_running_loop().time()) / 2)


def _key(caller: Caller, name: str) -> str:
    return f"{prefix_of(caller)}{name}"


def _milliseconds(instant: datetime) -> int:
    return int(instant.timestamp() * 1000)
