"""Watching changes: one look at the audit log for everybody who watches."""

import asyncio
import random
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn
from uuid import UUID

import structlog
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids, paging, tracing
from server.caller import Caller
from server.errors import (
    ConsentMissing,
    InvalidArgument,
    Problem,
    QuotaExceeded,
    ReaderTooSlow,
    StoreUnavailable,
)
from server.memory.change_store import Asked, ChangeKind, ChangeStore, Cursor, MemoryEvent, News
from server.memory.messages import memory_to, timestamp
from server.memory.model import Memory

log = structlog.get_logger()

WAITING: Final = 1_000
"""Changes that wait for one reader; more stay in the log."""

_STREAM: Final = "kimberly.memory.v1.MemoryService/WatchMemories"
_SENT_AT_ONCE: Final = 50
STREAMS: Final = 16
"""Of one user, in one process."""
_CURSOR: Final = struct.Struct(">Q16s")
_KINDS_TO_PROTO: Final = {
    ChangeKind.CREATED: pb.CHANGE_KIND_CREATED,
    ChangeKind.UPDATED: pb.CHANGE_KIND_UPDATED,
    ChangeKind.DELETED: pb.CHANGE_KIND_DELETED,
    ChangeKind.ARCHIVED: pb.CHANGE_KIND_ARCHIVED,
    ChangeKind.RESTORED: pb.CHANGE_KIND_RESTORED,
}

ReadMemories = Callable[[Caller, Sequence[UUID]], Awaitable[Mapping[UUID, Memory]]]


class Watch:
    """What waits for one reader, and how far it was fetched from the log."""

    def __init__(self, caller: Caller, after: Cursor | None) -> None:
        self.caller = caller
        self.fetched = after
        """None: nothing has been looked for yet, and what is there already does not count."""
        self.is_caught_up = False
        """Whether nothing was left in the log at the last look."""
        self.ending: pb.WatchEndReason.ValueType | None = None
        self.failure: Problem | None = None
        self.called = asyncio.Event()
        """Set when the reader has something to do."""
        self._waiting: deque[MemoryEvent] = deque()
        self._taken_at = asyncio.get_running_loop().time()

    @property
    def room(self) -> int:
        """How many more changes may wait."""
        return WAITING - len(self._waiting)

    def is_stuck(self, patience_seconds: float) -> bool:
        """Tell whether there is no room, and was none for so long."""
        now = asyncio.get_running_loop().time()
        return not self.room and now - self._taken_at > patience_seconds

    def give(self, news: News, asked: int) -> None:
        """Take in what was found when so many changes were asked for."""
        if not self._waiting:
            self._taken_at = asyncio.get_running_loop().time()
        was_caught_up, self.is_caught_up = self.is_caught_up, len(news.events) < asked
        if self.is_caught_up:
            self.fetched = news.horizon
        elif news.events:
            self.fetched = news.events[-1].cursor
        self._waiting.extend(news.events)
        if news.events or self.is_caught_up > was_caught_up:
            self.called.set()

    def take(self) -> list[MemoryEvent]:
        """Return some of what waits, in order."""
        self._taken_at = asyncio.get_running_loop().time()
        taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), _SENT_AT_ONCE))]
        if self._waiting:
            self.called.set()
        return taken

    def caught_up(self) -> Cursor | None:
        """Return how far everything has been taken; None as long as something is left."""
        return self.fetched if self.is_caught_up and not self._waiting else None

    def check(self) -> None:
        """Raise what is wrong with the stream, if anything is."""
        if self.failure:
            raise self.failure

    def fail(self, problem: Problem) -> None:
        """End the stream with an error, as soon as its reader takes something."""
        self.failure = problem
        self._waiting.clear()
        self.called.set()

    def end(self, reason: pb.WatchEndReason.ValueType) -> None:
        """End the stream in good order."""
        self.ending = reason
        self.called.set()


class Feed:
    """Looks for changes while anybody watches. `run` must be running."""

    def __init__(
        self, changes: ChangeStore, *, poll_seconds: float = 0.3, patience_seconds: float = 10.0
    ) -> None:
        """Watch the log.

        Args:
            changes: Where the changes are.
            poll_seconds: Time between two looks.
            patience_seconds: How long a reader may take nothing while WAITING changes wait.
        """
        self._changes = changes
        self._poll_seconds = poll_seconds
        self._patience_seconds = patience_seconds
        self._watches: dict[Watch, None] = {}
        self._opened = asyncio.Event()
        self._is_draining = False

    async def run(self) -> NoReturn:
        """Look again and again."""
        while True:
            if not self._watches:
                await self._opened.wait()
            self._opened.clear()
            if not await self._look():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_seconds):
                        await self._opened.wait()

    def drain(self) -> None:
        """Ask every reader to connect anew."""
        self._is_draining = True
        for watch in self._watches:
            watch.end(pb.WATCH_END_REASON_DRAIN)

    @contextmanager
    def watched(self, caller: Caller, after: Cursor | None) -> Iterator[Watch]:
        """Look for a user's changes, too.

        Raises:
            QuotaExceeded: The user watches by too many streams already.
        """
        own = sum(watch.caller == caller for watch in self._watches)
        if own >= STREAMS:
            raise QuotaExceeded("watches", own, STREAMS, "close one of them", "streams")
        watch = Watch(caller, after)
        self._watches[watch] = None
        self._opened.set()
        if self._is_draining:
            watch.end(pb.WATCH_END_REASON_DRAIN)
        try:
            yield watch
        finally:
            self._watches.pop(watch, None)

    async def _look(self) -> bool:
        """Give everybody the news, and return whether somebody may have left some in the log."""
        for watch in [one for one in self._watches if one.is_stuck(self._patience_seconds)]:
            self._give_up(watch, ReaderTooSlow())
        asking = {watch: Asked(watch.caller, watch.fetched, watch.room) for watch in self._watches}
        if not asking:
            return False
        try:
            answers = await self._changes.news(list(asking.values()))
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("changes out of reach", error=repr(error))
            for watch in asking:
                self._give_up(watch, StoreUnavailable("the database"))
            return False
        for (watch, asked), news in zip(asking.items(), answers, strict=True):
            self._tell(watch, asked, news)
        return any(watch.room and not watch.is_caught_up for watch in self._watches)

    def _tell(self, watch: Watch, asked: Asked, news: News) -> None:
        if news.lacks:
            self._give_up(watch, ConsentMissing(news.lacks))
        elif asked.after and asked.after.xid > news.horizon.xid:
            self._give_up(watch, InvalidArgument("cursor", "lies behind the end of the log"))
        elif news.is_lost:
            self._give_up(watch, InvalidArgument("cursor", "is of changes that a restore undid"))
        else:
            watch.give(news, asked.limit)

    def _give_up(self, watch: Watch, problem: Problem) -> None:
        # It may have gone while the answer was on its way.
        if self._watches.pop(watch, self) is not self:
            watch.fail(problem)


class Watcher:
    """Makes streams of messages of what a feed finds."""

    def __init__(
        self,
        feed: Feed,
        read: ReadMemories,
        *,
        session_seconds: float,
        heartbeat_seconds: float = 10.0,
    ) -> None:
        """Serve readers.

        Args:
            feed: Finds the changes; run elsewhere.
            read: Reads memories as they are now; leaves out those that are gone.
            session_seconds: After how long a reader is asked to connect anew: before the deadline
                of streams, and well before a token that is no longer good would matter.
            heartbeat_seconds: Longest silence.
        """
        self._feed = feed
        self._read = read
        self._session_seconds = session_seconds
        self._heartbeat_seconds = heartbeat_seconds

    async def stream(
        self, caller: Caller, request: pb.WatchMemoriesRequest
    ) -> AsyncIterator[pb.WatchMemoriesResponse]:
        """Send changes until the stream is old, the server drains or something is wrong.

        Raises:
            InvalidArgument: The cursor is none of this user.
            QuotaExceeded: The user watches by too many streams already.
            ConsentMissing: The user does not, or no longer, consent to memory.store, or an agent
                watches and they do not consent to memory.agent_access.
            ReaderTooSlow: The reader took nothing while changes waited.
            StoreUnavailable: The log does not answer.
        """
        place = _cursor_from(request.cursor, caller)
        opening = tracing.began(_STREAM, {"rpc.system": "grpc"})
        with self._feed.watched(caller, place) as watch, self._aging(watch):
            is_due = True
            while not watch.ending:
                is_due |= not await self._is_called(watch)
                events, taken_at = watch.take(), time.perf_counter()
                is_read = request.include_memories or caller.agent is not None
                memories = await self._memories(caller, events) if is_read else {}
                for event in _visible(caller, events, memories):
                    watch.check()
                    place = event.cursor
                    shown = memories if request.include_memories else {}
                    yield _response(caller, place, change=_change(event, shown))
                _trace(opening, events, time.perf_counter() - taken_at)
                if is_due and (reached := watch.caught_up()):
                    place, is_due = reached, False
                    yield _response(caller, place, caught_up=pb.CaughtUp())
            yield _response(caller, place, end=pb.WatchEnd(reason=watch.ending))

    @contextmanager
    def _aging(self, watch: Watch) -> Iterator[None]:
        """End a stream when it is old: not all of them at the same time."""
        lifetime = self._session_seconds * random.uniform(0.8, 1)  # noqa: S311 - no secret
        loop = asyncio.get_running_loop()
        end = loop.call_later(lifetime, watch.end, pb.WATCH_END_REASON_AGE)
        try:
            yield
        finally:
            end.cancel()

    async def _is_called(self, watch: Watch) -> bool:
        """Wait until there is something to do, and return False if it was silent for too long."""
        try:
            async with asyncio.timeout(self._heartbeat_seconds):
                await watch.called.wait()
        except TimeoutError:
            return False
        finally:
            watch.called.clear()
            watch.check()
        return True

    async def _memories(
        self, caller: Caller, events: Sequence[MemoryEvent]
    ) -> Mapping[UUID, Memory]:
        changed = {event.memory_id for event in events if event.kind is not ChangeKind.DELETED}
        return await self._read(caller, sorted(changed)) if changed else {}


def _visible(
    caller: Caller, events: Sequence[MemoryEvent], memories: Mapping[UUID, Memory]
) -> Sequence[MemoryEvent]:
    """Return the events without those of memories that an agent does not see."""
    if caller.agent is None:
        return events
    return [
        event for event in events if event.kind is ChangeKind.DELETED or event.memory_id in memories
    ]


def _trace(opening: str, events: Sequence[MemoryEvent], seconds: float) -> None:
    """Note a span of changes that were taken together, until the reader had room for the last."""
    if events:
        count: tracing.Attributes = {"messaging.batch.message_count": len(events)}
        tracing.batch_has_been("watch batch", seconds, (opening,), count)


def _response(caller: Caller, place: Cursor | None, **message: Any) -> pb.WatchMemoriesResponse:
    cursor = cursor_to(place, caller) if place else ""
    return pb.WatchMemoriesResponse(cursor=cursor, **message)


def _change(event: MemoryEvent, memories: Mapping[UUID, Memory]) -> pb.MemoryChange:
    memory = memories.get(event.memory_id)
    return pb.MemoryChange(
        kind=_KINDS_TO_PROTO[event.kind],
        memory_id=ids.show(ids.MEMORY, event.memory_id),
        change_time=timestamp(event.happened_at),
        memory=memory_to(memory) if memory else None,
    )


def cursor_to(place: Cursor, caller: Caller) -> str:
    """Return a place in a user's changes as the contract shows it."""
    packed = _CURSOR.pack(place.xid, place.event_id.bytes)
    return paging.seal(packed, "WatchMemories", caller)


def _cursor_from(token: str, caller: Caller) -> Cursor | None:
    if not token:
        return None
    packed = paging.unseal(token, "WatchMemories", caller)
    if packed is None:
        raise InvalidArgument("cursor", "is not a cursor of this user's changes")
    xid, event_id = _CURSOR.unpack(packed)
    return Cursor(xid, UUID(bytes=event_id))
