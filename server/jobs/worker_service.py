"""Serves kimberly.jobs.v1.WorkerService: hands jobs to workers."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server.errors import InvalidArgument, StoreUnavailable
from server.jobs import metrics
from server.jobs.doorbell import Doorbell
from server.jobs.queue import Queue
from server.jobs.requests import hello_from
from server.jobs.session import Session

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

log = structlog.get_logger()

_HEARTBEATS_A_LEASE = 3
_SWEEPS_A_LEASE = 15
_ADMIT_SECONDS = 0.25


class WorkerService(rpc.WorkerServiceServicer):
    """Serves streams of leases. `run` must be running: it owns the tasks of the streams."""

    def __init__(
        self, queue: Queue, doorbell: Doorbell, *, lease_seconds: float, session_seconds: float
    ) -> None:
        """Serve a queue.

        Args:
            queue: Where the jobs are.
            doorbell: Says when there may be more of them; run here.
            lease_seconds: How long a lease lives without a heartbeat, as the queue has it.
            session_seconds: After how long a worker is asked to connect anew: well before the
                deadline of streams, so that replicas share workers and no stream is cut.
        """
        self._queue = queue
        self._doorbell = doorbell
        self._lease_seconds = lease_seconds
        self._session_seconds = session_seconds
        self._sessions: set[Session] = set()
        self._is_draining = False
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Keep the queue, ring the doorbell and read the streams until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._doorbell.run())
                self._tasks.create_task(self._sweep())
                self._tasks.create_task(self._admit())
        finally:
            self._tasks = None

    def drain(self) -> None:
        """Lease no more, and ask every worker to finish what it holds and to close its stream."""
        self._is_draining = True
        for session in self._sessions:
            session.drain()

    async def Work(
        self, request_iterator: AsyncIterator[pb.WorkRequest], context: Context
    ) -> AsyncIterator[pb.WorkResponse]:
        if self._tasks is None:
            raise StoreUnavailable("the queue")
        hello = hello_from(await _first(request_iterator))
        metrics.expect(hello.kinds)
        session = Session(
            self._queue,
            hello.worker_id,
            hello.kinds,
            self._lease_seconds,
            self._tasks,
            in_columns=hello.columns,
        )
        with self._open(session, self._tasks, request_iterator):
            yield pb.WorkResponse(welcome=self._welcome())
            is_finished = False
            while not is_finished:
                await session.listen()
                responses, is_finished = await session.turn()
                for response in responses:
                    yield response

    @contextmanager
    def _open(
        self,
        session: Session,
        tasks: asyncio.TaskGroup,
        requests: AsyncIterator[pb.WorkRequest],
    ) -> Iterator[None]:
        """Let requests, doorbell, drain and age reach the session."""
        reader = tasks.create_task(session.read(requests))
        lifetime = self._session_seconds * random.uniform(0.8, 1)  # noqa: S311 - no secret
        end = asyncio.get_running_loop().call_later(lifetime, session.drain)
        self._sessions.add(session)
        metrics.WORKERS.inc()
        if self._is_draining:
            session.drain()
        try:
            with (
                self._doorbell.heard_by(session.hear_bell),
                self._doorbell.cancellations_heard_by(session.hear_cancellation),
            ):
                yield
        except BaseException:
            if session.is_holding:
                metrics.FAILURES.labels("disconnected").inc()
            raise
        finally:
            metrics.WORKERS.dec()
            self._sessions.discard(session)
            end.cancel()
            reader.cancel()
            session.close()

    def _welcome(self) -> pb.Welcome:
        return pb.Welcome(
            lease_duration=_duration(self._lease_seconds),
            heartbeat_interval=_duration(self._lease_seconds / _HEARTBEATS_A_LEASE),
            columns=True,
        )

    async def _sweep(self) -> None:
        while True:
            try:
                if reclaimed := await self._queue.reclaim():
                    log.info("leases lapsed", jobs=reclaimed)
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("lapsed leases out of reach", error=repr(error))
            await asyncio.sleep(self._lease_seconds / _SWEEPS_A_LEASE)

    async def _admit(self) -> None:
        while True:
            try:
                while await self._queue.admit():
                    pass
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("delayed jobs out of reach", error=repr(error))
            await asyncio.sleep(_ADMIT_SECONDS)


async def _first(requests: AsyncIterator[pb.WorkRequest]) -> pb.WorkRequest:
    async for request in requests:
        return request
    raise InvalidArgument("message", "must be hello at first")


def _duration(seconds: float) -> Duration:
    return Duration(nanos=round(seconds % 1 * 1e9), seconds=int(seconds))
