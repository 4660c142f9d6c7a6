"""One worker's stream: what it may still be sent, and what it holds."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence, Set
from typing import Any

from kimberly.jobs.v1 import jobs_pb2 as pb

from server import ids
from server.errors import InvalidArgument, LeaseLost
from server.jobs.batch_traces import BatchTraces
from server.jobs.model import Beat, Held, Lease, Outcome
from server.jobs.queue import Queue
from server.jobs.requests import MOST_JOBS, beats_from, credit_from, outcomes_from

_UNREAD = 64
"""Messages that wait to be dealt with; more wait in the worker's flow control."""
_LEASED_AT_ONCE = 500
_WORTH_ANOTHER = 250
"""Jobs that there must be room for, so that a lease begins before the last one has ended."""
_SURELY_CLOSED_SECONDS = 0.1


class Session:
    """Keeps the state of one stream between its turns.

    Settling, leasing and heartbeats go on beside the turns and beside each other: none looks at
    what the others write, and each waits for a disk. What arrives meanwhile is written together:
    the slower the database, the more outcomes share one statement. However slow that is, leases
    are kept alive.
    """

    def __init__(
        self,
        queue: Queue,
        worker_id: str,
        kinds: Iterable[str],
        lease_seconds: float,
        tasks: asyncio.TaskGroup,
        *,
        in_columns: bool = False,
    ) -> None:
        self._queue = queue
        self._in_columns = in_columns
        self._tasks = tasks
        self._worker_id = worker_id
        self._kinds = list(kinds)
        self._lease_seconds = lease_seconds
        self._heard_at = asyncio.get_running_loop().time()
        self._unread: asyncio.Queue[pb.WorkRequest] = asyncio.Queue(_UNREAD)
        self._credit = 0
        self._leases: set[Held] = set()
        self._traces = BatchTraces()
        self._outcomes: list[Outcome] = []
        self._beats: list[Beat] = []
        self._cancelled: set[Held] = set()
        self._settling: asyncio.Task[None] | None = None
        self._extending: asyncio.Task[None] | None = None
        self._ending: set[Held] = set()
        """What is being settled."""
        self._leasing: list[asyncio.Task[None]] = []
        self._asked = 0
        """Credit that leases under way may use up."""
        self._is_backlog = False
        """Whether the last lease found as many jobs as it asked for."""
        self._responses: list[pb.WorkResponse] = []
        self._read_failure: Exception | None = None
        self._store_failure: Exception | None = None
        self._may_have_more = False
        """Whether a lease that begins now may find what the last one did not."""
        self._has_all = False
        self._is_draining = False
        self._is_told = False
        self._called = asyncio.Event()
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
                self._called.set()
            self._has_all = True
        except Exception as error:  # noqa: BLE001 - raised again by the turn, in the call's own task
            self._read_failure = error
        self._called.set()

    async def listen(self) -> None:
        """Wait until a turn has something to do.

        Raises:
            LeaseLost: The worker missed its heartbeats for as long as a lease lives.
        """
        try:
            async with asyncio.timeout_at(self._heard_at + self._lease_seconds):
                await self._called.wait()
        except TimeoutError:
            raise LeaseLost from None

    def hear_bell(self) -> None:
        """Have the next turn look for jobs."""
        self._may_have_more = True
        self._called.set()

    def hear_cancellation(self, held: Held) -> None:
        """Have the next turn tell the worker, if it is this one, that a job is not wanted."""
        if held in self._leases:
            self._cancelled.add(held)
            self._called.set()

    def drain(self) -> None:
        """Lease no more; a turn tells the worker to finish."""
        self._is_draining = True
        self._called.set()

    async def turn(self) -> tuple[list[pb.WorkResponse], bool]:
        """Deal with everything that has arrived, and collect what came of what did before.

        Returns:
            What to send, and whether the worker has closed its side and nothing is left to do.
        """
        self._called.clear()
        # Looked at before the messages are: afterwards there may be more of them.
        has_all, failure = self._has_all, self._read_failure
        self._take_in()
        if has_all or failure:
            await self._finish()
        if failure := failure or self._store_failure:
            raise failure
        if has_all:
            await self._give_back()
            return [each for each in self._collect() if not each.HasField("leased")], True
        self._begin()
        return self._collect(), False

    def close(self) -> None:
        """Stop what goes on."""
        for task in self._under_way():
            task.cancel()

    def _under_way(self) -> list[asyncio.Task[None]]:
        tasks = (self._settling, self._extending, *self._leasing)
        return [task for task in tasks if task and not task.done()]

    def _begin(self) -> None:
        """Begin to write and to lease, where there is a reason to and it does not go on yet."""
        if self._beats and _is_over(self._extending):
            self._extending = self._tasks.create_task(self._answer_with(self._extend()))
        # Not beside heartbeats that came before: two statements that change the same jobs may wait
        # for each other.
        if self._outcomes and _is_over(self._settling) and _is_over(self._extending):
            self._settling = self._tasks.create_task(self._answer_with(self._settle()))
        self._leasing = [task for task in self._leasing if not task.done()]
        if not self._is_draining:
            while self._may_lease():
                self._begin_to_lease()
        elif not self._leasing:
            # Not before: what is leased now is still to be sent.
            self._drain()

    def _may_lease(self) -> bool:
        room = self._credit - self._asked
        if not self._leasing:
            return self._may_have_more and room > 0
        # Two pass over each other's jobs. It is worth it where one would leave the database idle
        # while it is on its way: each finds so many that it takes a while.
        return self._is_backlog and len(self._leasing) == 1 and room >= _WORTH_ANOTHER

    def _begin_to_lease(self) -> None:
        limit = min(self._credit - self._asked, _LEASED_AT_ONCE)
        self._asked += limit
        self._may_have_more = False
        self._leasing.append(self._tasks.create_task(self._answer_with(self._lease(limit))))

    async def _answer_with(self, work: Coroutine[Any, Any, list[pb.WorkResponse]]) -> None:
        """Have a turn send what comes of this, or fail as it did."""
        try:
            # Apart: `+=` would add to what was there before the wait.
            responses = await work
            self._responses += responses
        except Exception as error:  # noqa: BLE001 - raised again by the turn, in the call's own task
            self._store_failure = error
        self._called.set()

    def _collect(self) -> list[pb.WorkResponse]:
        responses, self._responses = self._responses + self._cancel(), []
        return responses

    async def _finish(self) -> None:
        """Wait for what goes on, then write the rest."""
        if under_way := self._under_way():
            await asyncio.wait(under_way)
        if not self._store_failure:
            await self._answer_with(self._write())

    async def _write(self) -> list[pb.WorkResponse]:
        return [*await self._settle(), *await self._extend()]

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
        self._may_have_more = True

    async def _settle(self) -> list[pb.WorkResponse]:
        if not self._outcomes:
            return []
        outcomes, self._outcomes = self._outcomes, []
        held = self._ending = {outcome.held for outcome in outcomes}
        started = time.perf_counter()
        standing = await self._queue.settle(self._worker_id, outcomes)
        self._traces.settled(held, time.perf_counter() - started)
        self._ending = set()
        self._leases -= held
        self._beats = [beat for beat in self._beats if beat.held not in held]
        if self._queue.is_limited(self._kinds):
            # There may be room now, where there was none.
            self._may_have_more = True
        told = self._without_heirs(standing)
        settled = [pb.WorkResponse(settled=self._settled(told))] if told else []
        return [*settled, *_lost(self._without_heirs(held - standing))]

    def _without_heirs(self, leases: Set[Held]) -> Set[Held]:
        """Leave out leases whose jobs the worker holds anew: it is told of jobs, not of leases."""
        anew = {held.job_id for held in self._leases} if leases else set()
        return {held for held in leases if held.job_id not in anew}

    def _settled(self, held: Collection[Held]) -> pb.Settled:
        if self._in_columns:
            return pb.Settled(job_id_column=ids.packed(lease.job_id for lease in held))
        return pb.Settled(job_ids=_shown(held))

    async def _extend(self) -> list[pb.WorkResponse]:
        if not self._beats:
            return []
        beats = [beat for beat in self._beats if beat.held not in self._ending]
        self._beats = []
        extended = await self._queue.extend(self._worker_id, beats)
        # A worker that comes back on a new stream brings its leases with it.
        self._leases |= {beat.held for beat in beats}
        self._leases -= extended.lost
        self._cancelled |= extended.cancelled
        return _lost(self._without_heirs(extended.lost))

    def _cancel(self) -> list[pb.WorkResponse]:
        held, self._cancelled = self._cancelled & self._leases, set()
        return [pb.WorkResponse(cancel=pb.Cancel(job_ids=_shown(held)))] if held else []

    def _drain(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._responses.append(pb.WorkResponse(drain=pb.Drain()))

    async def _lease(self, limit: int) -> list[pb.WorkResponse]:
        started = time.perf_counter()
        leases = await self._queue.lease(self._worker_id, self._kinds, limit)
        self._asked -= limit
        self._credit -= len(leases)
        self._is_backlog = len(leases) == limit
        if not leases:
            return []
        self._leases |= {lease.held for lease in leases}
        self._traces.leased(leases, time.perf_counter() - started)
        # Whoever has many waiting gets only some of them at a time.
        self._may_have_more = True
        return [pb.WorkResponse(leased=self._leased(leases))]

    def _leased(self, leases: Sequence[Lease]) -> pb.Leased:
        if self._in_columns:
            return pb.Leased(columns=columns_to(leases))
        return pb.Leased(leases=map(lease_to, leases))

    async def _give_back(self) -> None:
        if self._leases:
            # A stream that breaks looks closed at first; then its call, which waits here, is
            # cancelled. What a worker died of is not handed back: it costs its job an attempt.
            await asyncio.sleep(_SURELY_CLOSED_SECONDS)
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


def columns_to(leases: Sequence[Lease]) -> pb.LeasedColumns:
    """Return leases as the contract has them for those who take them in columns."""
    held, kinds, payloads, attempts, traceparents = zip(*leases, strict=True)
    job_ids, tokens = zip(*held, strict=True)
    return pb.LeasedColumns(
        leases=pb.LeaseColumns(job_ids=ids.packed(job_ids), lease_tokens=tokens),
        kinds=kinds,
        payloads_json=payloads,
        attempts=attempts,
        traceparents=traceparents if any(traceparents) else (),
    )


def _is_over(task: asyncio.Task[None] | None) -> bool:
    return task is None or task.done()


def _shown(held: Iterable[Held]) -> list[str]:
    return [ids.show(ids.JOB, lease.job_id) for lease in held]


def _lost(held: Collection[Held]) -> list[pb.WorkResponse]:
    return [pb.WorkResponse(lease_lost=pb.LeaseLost(job_ids=_shown(held)))] if held else []
