"""Watching jobs: one look at the table for everybody who watches."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NoReturn
from uuid import UUID

import structlog
from kimberly.jobs.v1 import jobs_pb2 as pb

from server.caller import Caller
from server.errors import NotFound, Problem, QuotaExceeded, StoreUnavailable
from server.jobs.messages import job_to
from server.jobs.model import Job
from server.jobs.store import JobStore

log = structlog.get_logger()

STREAMS: Final = 16
"""Of one user, in one process."""


class Watch:
    """What one reader has yet to see of a job. However slow the reader is, that is one state."""

    def __init__(self, caller: Caller, seen: Job) -> None:
        self.caller = caller
        self.job = seen
        """As it was at the last look."""
        self.is_over = False
        """Whether the reader is to open another stream."""
        self.failure: Problem | None = None
        self.called = asyncio.Event()
        """Set when the reader has something to do."""

    def give(self, job: Job | None) -> None:
        """Take in what was found."""
        if job is None:
            self.fail(NotFound("job"))
        elif job != self.job:
            self.job = job
            self.called.set()

    def end(self) -> None:
        """End the stream in good order."""
        self.is_over = True
        self.called.set()

    def fail(self, problem: Problem) -> None:
        """End the stream with an error."""
        self.failure = problem
        self.called.set()


class JobFeed:
    """Looks at jobs while anybody watches. `run` must be running."""

    def __init__(
        self,
        store: JobStore,
        *,
        session_seconds: float,
        poll_seconds: float = 0.25,
        heartbeat_seconds: float = 20.0,
    ) -> None:
        """Watch the table.

        Args:
            store: Where the jobs are.
            session_seconds: After how long a reader is asked to connect anew: before the deadline
                of streams, and well before a token that is no longer good would matter.
            poll_seconds: Time between two looks.
            heartbeat_seconds: Longest silence: a third of what the edge takes for an idle stream.
        """
        self._store = store
        self._session_seconds = session_seconds
        self._poll_seconds = poll_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._watches: set[Watch] = set()
        self._opened = asyncio.Event()
        self._is_draining = False

    async def run(self) -> NoReturn:
        """Look again and again."""
        while True:
            if not self._watches:
                self._opened.clear()
                await self._opened.wait()
            await self._look()
            await asyncio.sleep(self._poll_seconds)

    def drain(self) -> None:
        """Ask every reader to connect anew."""
        self._is_draining = True
        for watch in self._watches:
            watch.end()

    async def stream(self, caller: Caller, job_id: UUID) -> AsyncIterator[pb.WatchJobResponse]:
        """Send a job as it is, whenever it has changed and after silence; then why that ends.

        Raises:
            NotFound: There is no such job, or none any more, or it is not the caller's.
            QuotaExceeded: The user watches by too many streams already.
            StoreUnavailable: The database does not answer.
        """
        with self._watched(caller, await self._store.get(caller, job_id)) as watch:
            shown: Job | None = None
            while not watch.is_over and not (shown and shown.state.is_final):
                if watch.failure:
                    raise watch.failure
                if shown != watch.job or not await self._is_called(watch):
                    shown = watch.job
                    yield pb.WatchJobResponse(job=job_to(shown))
        is_final = shown is not None and shown.state.is_final
        reason = _FINISHED if is_final else _RECONNECT
        yield pb.WatchJobResponse(end=pb.WatchJobEnd(reason=reason))

    @contextmanager
    def _watched(self, caller: Caller, job: Job) -> Iterator[Watch]:
        own = sum(watch.caller == caller for watch in self._watches)
        if own >= STREAMS:
            raise QuotaExceeded("watches", own, STREAMS, "close one of them", "streams")
        watch = Watch(caller, job)
        self._watches.add(watch)
        self._opened.set()
        lifetime = self._session_seconds * random.uniform(0.8, 1)  # noqa: S311 - no secret
        age = asyncio.get_running_loop().call_later(lifetime, watch.end)
        if self._is_draining:
            watch.end()
        try:
            yield watch
        finally:
            age.cancel()
            self._watches.discard(watch)

    async def _is_called(self, watch: Watch) -> bool:
        """Wait until there is something to do, and return False if it was silent for too long."""
        try:
            async with asyncio.timeout(self._heartbeat_seconds):
                await watch.called.wait()
        except TimeoutError:
            return False
        watch.called.clear()
        return True

    async def _look(self) -> None:
        watches = list(self._watches)
        try:
            jobs: Mapping[UUID, Job] = await self._store.some({one.job.id for one in watches})
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("watched jobs out of reach", error=repr(error))
            for watch in watches:
                watch.fail(StoreUnavailable("the database"))
            return
        for watch in watches:
            watch.give(jobs.get(watch.job.id))


_FINISHED: Final = pb.WATCH_JOB_END_REASON_FINISHED
_RECONNECT: Final = pb.WATCH_JOB_END_REASON_RECONNECT
