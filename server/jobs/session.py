"""One worker's stream: what it may still be sent, and what it holds."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable

from kimberly.jobs.v1 import jobs_pb2 as pb

from server import ids
from server.errors import InvalidArgument, LeaseLost
from server.jobs.model import Beat, Held, Lease, Outcome
from server.jobs.queue import Queue
from server.jobs.requests import MOST_JOBS, beats_from, credit_from, outcomes_from

_UNREAD = 64
"""Messages that wait to be dealt with; more wait in the worker's flow control."""
_LEASED_AT_ONCE = 500


class Session:
    """Keeps the state of one stream between its turns.

    A turn deals with everything that has arrived since the last: the slower the database, the
    more outcomes share one statement.
    """

    def __init__(
        self, queue: Queue, worker_id: str, kinds: Iterable[str], lease_seconds: float
    ) -> None:
        self._queue = queue
        self._worker_id = worker_id
        self._kinds = list(kinds)
        self._lease_seconds = lease_seconds
        self._heard_at = asyncio.get_running_loop().time()
        self._unread: asyncio.Queue[pb.WorkRequest] = asyncio.Queue(_UNREAD)
        self._credit = 0
        self._leases: set[Held] = set()
        self._outcomes: list[Outcome] = []
        self._beats: list[Beat] = []
        self._cancelled: set[Held] = set()
        self._failure: Exception | None = None
        self._has_all = False
        self._is_draining = False
        self._is_told = False
        self.called = asyncio.Event()
        """Set when a turn has something to do."""

    @property
    def is_holding(self) -> bool:
        """Whether the worker has leases."""
        return bool(self._leases)

    async def read(self, requests: AsyncIterator[pb.WorkRequest]) -> None:
        """Take in what the worker sends, until it closes its side or the stream breaks."""
        try:
            async for request in requests:
                self._heard_at = asyncio.get_running_loop().time()
                await self._unread.put(request)
                self.called.set()
            self._has_all = True
        except Exception as error:  # noqa: BLE001 - raised again by the turn, in the call's own task
            self._failure = error
        self.called.set()

    async def listen(self) -> None:
        """Wait until a turn has something to do.

        Raises:
            LeaseLost: The worker missed its heartbeats for as long as a lease lives.
        """
        try:
            async with asyncio.timeout_at(self._heard_at + self._lease_seconds):
                await self.called.wait()
        except TimeoutError:
            raise LeaseLost from None

    def hear_cancellation(self, held: Held) -> None:
        """Have the next turn tell the worker, if it is this one, that a job is not wanted."""
        if held in self._leases:
            self._cancelled.add(held)
            self.called.set()

    def drain(self) -> None:
        """Lease no more; the next turn tells the worker to finish."""
        self._is_draining = True
        self.called.set()

    async def turn(self) -> tuple[list[pb.WorkResponse], bool]:
        """Deal with everything that has arrived.

        Returns:
            What to send, and whether the worker has closed its side and nothing is left to do.
        """
        self.called.clear()
        # Looked at before the messages are: afterwards there may be more of them.
        has_all, failure = self._has_all, self._failure
        self._take_in()
        is_leasing = not (has_all or failure or self._is_draining)
        # Both at once: neither looks at what the other writes, and each waits for a disk.
        outcomes = await asyncio.gather(
            self._write(), self._lease() if is_leasing else _nothing(), return_exceptions=True
        )
        responses: list[pb.WorkResponse] = []
        for outcome in (*outcomes, failure or []):
            if isinstance(outcome, BaseException):
                raise outcome
            responses += outcome
        if has_all:
            await self._give_back()
        elif self._is_draining:
            responses += self._drain()
        return responses, has_all

    async def _write(self) -> list[pb.WorkResponse]:
        return [*await self._settle(), *await self._extend(), *self._cancel()]

    def _take_in(self) -> None:
        while not self._unread.empty():
            request = self._unread.get_nowait()
            match request.WhichOneof("message"):
                case "credit":
                    self._add_credit(credit_from(request.credit))
                case "heartbeat":
                    self._beats += beats_from(request.heartbeat)
                case "settle":
                    self._outcomes += outcomes_from(request.settle)
                case _:
                    raise InvalidArgument("message", "must be credit, heartbeat or settle")

    def _add_credit(self, jobs: int) -> None:
        self._credit += jobs
        if self._credit + len(self._leases) > 2 * MOST_JOBS:
            raise InvalidArgument("credit.jobs", f"is room for more than {MOST_JOBS} jobs")

    async def _settle(self) -> list[pb.WorkResponse]:
        if not self._outcomes:
            return []
        outcomes, self._outcomes = self._outcomes, []
        held = {outcome.held for outcome in outcomes}
        standing = await self._queue.settle(self._worker_id, outcomes)
        self._leases -= held
        self._beats = [beat for beat in self._beats if beat.held not in held]
        if self._credit and self._queue.is_limited(self._kinds):
            # There may be room now, where there was none.
            self.called.set()
        settled = [pb.WorkResponse(settled=pb.Settled(job_ids=_shown(standing)))]
        return [*(settled if standing else []), *_lost(held - standing)]

    async def _extend(self) -> list[pb.WorkResponse]:
        if not self._beats:
            return []
        beats, self._beats = self._beats, []
        extended = await self._queue.extend(self._worker_id, beats)
        # A worker that comes back on a new stream brings its leases with it.
        self._leases |= {beat.held for beat in beats}
        self._leases -= extended.lost
        self._cancelled |= extended.cancelled
        return _lost(extended.lost)

    def _cancel(self) -> list[pb.WorkResponse]:
        held, self._cancelled = self._cancelled & self._leases, set()
        return [pb.WorkResponse(cancel=pb.Cancel(job_ids=_shown(held)))] if held else []

    def _drain(self) -> list[pb.WorkResponse]:
        if self._is_told:
            return []
        self._is_told = True
        return [pb.WorkResponse(drain=pb.Drain())]

    async def _lease(self) -> list[pb.WorkResponse]:
        limit = min(self._credit, _LEASED_AT_ONCE)
        if not limit:
            return []
        leases = await self._queue.lease(self._worker_id, self._kinds, limit)
        if not leases:
            return []
        self._credit -= len(leases)
        self._leases |= {lease.held for lease in leases}
        if self._credit:
            # There may be more: whoever has many waiting gets only some of them at a time.
            self.called.set()
        return [pb.WorkResponse(leased=pb.Leased(leases=map(lease_to, leases)))]

    async def _give_back(self) -> None:
        if self._leases:
            await self._queue.release(self._worker_id, list(self._leases))


def lease_to(lease: Lease) -> pb.Lease:
    """Return a lease as the contract has it."""
    return pb.Lease(
        job_id=ids.show(ids.JOB, lease.held.job_id),
        lease_token=lease.held.token,
        kind=lease.kind,
        payload_json=lease.payload_json,
        attempt=lease.attempt,
        traceparent=lease.traceparent,
    )


async def _nothing() -> list[pb.WorkResponse]:
    return []


def _shown(held: Iterable[Held]) -> list[str]:
    return [ids.show(ids.JOB, lease.job_id) for lease in held]


def _lost(held: Collection[Held]) -> list[pb.WorkResponse]:
    return [pb.WorkResponse(lease_lost=pb.LeaseLost(job_ids=_shown(held)))] if held else []
