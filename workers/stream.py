"""The loop of a worker: lease, work, settle, on a stream that is opened again when it breaks.

A lease outlives the stream it came on. The work goes on, the next stream carries its heartbeats;
only when no heartbeat could be sent for as long as a lease lives is the work stopped, for by then
it may be another worker's. A heartbeat that was sent and got lost is not noticed here: what the
work writes is fenced by the lease token all the while.
"""

import asyncio
import json
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import Any, Final, NamedTuple

import grpc
import structlog
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc
from opentelemetry.trace import SpanKind

from server import tracing
from workers import metrics

log = structlog.get_logger()

_MOST_CREDIT: Final = 1000
_MOST_IN_MESSAGE: Final = 1000
_MOST_HELD: Final = 2000
"""Leases and credit together, more of which the service does not take."""
_STREAM_SECONDS: Final = 900.0
_LONGEST_PAUSE_SECONDS: Final = 2.0
_WATCH_SECONDS: Final = 0.25
_PROGRESS_SECONDS: Final = 1.0
_JOB: Final = "job_"
_DIGITS: Final = 32
"""Of an id, after that."""
_NOTHING: Final = "{}"
_LONGEST_RESULT: Final = 64 * 1024
_NUL: Final = "\\u0000"
"""As JSON has it."""
_BACKSLASH: Final = "\\\\"
_BROKEN = (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError)


def _nobody_listens(progress: float) -> None:
    """Report to nobody."""


class Task(NamedTuple):
    """A leased job, as its handler sees it.

    A tuple, as what leads to it is: thousands a second are made.
    """

    job_id: str
    lease_token: int
    """Fences whatever the job writes."""
    kind: str
    payload: Mapping[str, Any]
    attempt: int
    report: Callable[[float], None] = _nobody_listens
    """Tells how far the job is, 0 to 1: for people, so soon rather than at once."""


Handler = Callable[[Task], Awaitable[Mapping[str, Any]]]
"""Does a job and returns its result. Whatever it raises fails the attempt."""


class _Lease(NamedTuple):
    """The right to do a job."""

    job_id: str
    token: int
    kind: str
    payload_json: str
    attempt: int
    traceparent: str


@dataclass(slots=True)
class _Held:
    """A lease that is ours, until it is settled or lost."""

    token: int
    expires_at: float
    """By the clock of the event loop."""
    work: asyncio.Task[None] | None = None
    progress: float = 0.0
    is_cancelled: bool = False
    """The job is not wanted any more."""
    outcome: pb.Outcome | None = None
    sent_on: "_Session | None" = None
    """The stream that carried the outcome."""


_DONE: Final = pb.Outcome(completed=pb.Completed())
"""Of all jobs without a result: it names none, columns do."""


@dataclass(slots=True, eq=False)
class _Session:
    """One stream."""

    call: Any
    lease_seconds: float
    heartbeat_seconds: float
    in_columns: bool
    """Whether the server understands outcomes in columns."""
    credit: int = 0
    """Granted and not yet used."""
    settling: int = 0
    """Leases that are still ours and whose outcomes it carried."""
    is_draining: bool = False
    """The server asked us to finish and to connect again."""
    beat_at: float = 0.0
    """When the next heartbeat is due, by the clock of the event loop."""
    progress_at: float = 0.0
    """When progress may be told the next time."""


class Worker:
    """Does jobs until it is drained."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        handlers: Mapping[str, Handler],
        *,
        concurrency: int,
        drain_seconds: float,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Prepare to work.

        Args:
            channel: Leads to WorkerService, by way of the sidecar.
            handlers: What does a job, by its kind.
            concurrency: How many jobs are done at once.
            drain_seconds: How long a drained worker goes on before it hands back what it holds.
            metadata: Sent with every stream; in the mesh the sidecar adds what is needed.
        """
        self._stub = rpc.WorkerServiceStub(channel)
        self._handlers = dict(handlers)
        self._concurrency = concurrency
        self._drain_seconds = drain_seconds
        self._metadata = metadata
        # Random for each process: a worker that comes back under an old name adopts nothing.
        self._id = uuid.uuid4().hex
        self._held: dict[str, _Held] = {}
        self._ready: dict[str, _Held] = {}
        """Leases whose outcomes the stream at hand has not carried; some may be lost by now."""
        self._taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        """Seconds that handlers took, by kind and how they ended, which are yet to be observed."""
        self._called = asyncio.Event()
        self._drained = asyncio.Event()
        self._give_up_at: float | None = None
        self._has_progress = False

    def drain(self) -> None:
        """Take no more jobs; `run` returns when those at hand are done or handed back."""
        if self._give_up_at is None:
            self._give_up_at = _now() + self._drain_seconds
        self._drained.set()
        self._called.set()

    async def run(self) -> None:
        """Work until drained."""
        async with asyncio.TaskGroup() as self._tasks:
            watch = self._tasks.create_task(self._stop_lapsed())
            try:
                await self._stream_again_and_again()
            finally:
                watch.cancel()
                self._forget(list(self._held))

    async def _stream_again_and_again(self) -> None:
        failures = 0
        while not self._is_finished():
            try:
                await self._stream()
                failures = 0
            except _BROKEN as error:
                failures += 1
                metrics.RECONNECTS.inc()
                log.info("stream broke", error=_brief(error), failures=failures)
            if not self._is_finished():
                await asyncio.sleep(_pause_seconds(failures, random.random()))  # noqa: S311 - no secret

    def _is_finished(self) -> bool:
        if self._give_up_at is None:
            return False
        return not self._held or _now() >= self._give_up_at

    async def _stream(self) -> None:
        """Open a stream and serve it to its end."""
        # grpc.aio never ends a call that nobody looks at any more (grpc#43462).
        call = self._stub.Work(  # type: ignore[call-arg] # written by hand, no iterator
            timeout=_STREAM_SECONDS, metadata=self._metadata
        )
        try:
            hello = pb.Hello(worker_id=self._id, kinds=sorted(self._handlers), columns=True)
            await call.write(pb.WorkRequest(hello=hello))
            response = await call.read()
            if not isinstance(response, pb.WorkResponse):
                return
            welcome = response.welcome
            session = _Session(
                call,
                welcome.lease_duration.ToTimedelta().total_seconds(),
                welcome.heartbeat_interval.ToTimedelta().total_seconds(),
                welcome.columns,
            )
            self._ready = {
                job_id: held for job_id, held in self._held.items() if held.outcome is not None
            }
            log.info("stream open", worker=self._id, lease_seconds=session.lease_seconds)
            sender = self._tasks.create_task(self._send(session))
            try:
                await self._receive(session)
            finally:
                sender.cancel()
        finally:
            call.cancel()

    # --- what is received

    async def _receive(self, session: _Session) -> None:
        while isinstance(response := await session.call.read(), pb.WorkResponse):
            match response.WhichOneof("message"):
                case "leased":
                    self._start(session, _leases(response.leased))
                case "settled":
                    self._forget(response.settled.job_ids)
                    self._forget(_shown(response.settled.job_id_column))
                case "lease_lost":
                    log.warning("leases lost", jobs=list(response.lease_lost.job_ids))
                    self._forget(response.lease_lost.job_ids)
                case "cancel":
                    self._cancel(response.cancel.job_ids)
                case "drain":
                    session.is_draining = True
            self._called.set()

    def _start(self, session: _Session, leases: Collection[_Lease]) -> None:
        session.credit -= len(leases)
        if self._give_up_at is not None:
            # Not begun: the server gives them to another when we close the stream.
            return
        expires_at = _now() + session.lease_seconds
        self._forget(lease.job_id for lease in leases)
        for lease in leases:
            held = self._held[lease.job_id] = _Held(lease.token, expires_at)
            held.work = self._tasks.create_task(self._work(held, lease))

    async def _work(self, held: _Held, lease: _Lease) -> None:
        started = time.perf_counter()
        try:
            outcome = _completed(lease, await self._result(held, lease))
        except asyncio.CancelledError:
            if not held.is_cancelled:
                raise
            outcome = _outcome(lease, stopped=pb.Stopped())
        except Exception as error:
            log.warning("job failed", job=lease.job_id, kind=lease.kind, exc_info=error)
            outcome = _outcome(lease, failed=pb.Failed(error=_brief(error)))
        how = "completed" if outcome is _DONE else str(outcome.WhichOneof("result"))
        self._taken[lease.kind, how].append(time.perf_counter() - started)
        held.outcome = outcome
        self._ready[lease.job_id] = held
        self._called.set()

    async def _result(self, held: _Held, lease: _Lease) -> Mapping[str, Any]:
        task = Task(
            lease.job_id,
            lease.token,
            lease.kind,
            {} if lease.payload_json == _NOTHING else json.loads(lease.payload_json),
            lease.attempt,
            partial(self._report, held),
        )
        handler = self._handlers[lease.kind]
        if not lease.traceparent and not tracing.has_begun():
            # To say what a span would hold costs more than a small job.
            return await handler(task)
        with tracing.continued(
            f"job {lease.kind}",
            lease.traceparent,
            {"kimberly.job": lease.job_id, "kimberly.attempt": lease.attempt},
            kind=SpanKind.CONSUMER,
        ):
            return await handler(task)

    def _report(self, held: _Held, progress: float) -> None:
        held.progress = min(max(progress, 0.0), 1.0)
        self._has_progress = True
        self._called.set()

    def _cancel(self, job_ids: Iterable[str]) -> None:
        """Stop work that is not wanted any more; its leases are ours until that is settled."""
        for job_id in job_ids:
            held = self._held.get(job_id)
            if held is not None and held.work is not None and held.outcome is None:
                log.info("job cancelled", job=job_id)
                held.is_cancelled = True
                held.work.cancel()

    def _forget(self, job_ids: Iterable[str]) -> None:
        """Drop leases that are settled or no longer ours, and stop their work."""
        for job_id in job_ids:
            held = self._held.pop(job_id, None)
            if held is None:
                continue
            if held.sent_on is not None:
                held.sent_on.settling -= 1
            elif held.work is not None and held.outcome is None:
                held.work.cancel()

    async def _stop_lapsed(self) -> None:
        """Stop work whose lease has had no heartbeat for as long as it lives."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            lapsed = [job_id for job_id, held in self._held.items() if held.expires_at <= _now()]
            if lapsed:
                log.warning("leases lapsed", jobs=lapsed)
                self._forget(lapsed)
                self._called.set()

    # --- what is sent

    async def _send(self, session: _Session) -> None:
        """Send outcomes, credit and heartbeats until everything is said."""
        try:
            while True:
                self._called.clear()
                await self._settle(session)
                if self._has_nothing_more(session):
                    await session.call.done_writing()
                    return
                await self._grant(session)
                if self._next_beat(session) <= _now():
                    await self._beat(session)
                await self._wait(self._next_beat(session))
        except _BROKEN:
            # The receiving side learns of it too, and says so.
            return

    async def _settle(self, session: _Session) -> None:
        self._observe()
        ready, self._ready = self._ready, {}
        ours = {job_id: held for job_id, held in ready.items() if self._held.get(job_id) is held}
        if not ours:
            return
        for held in ours.values():
            held.sent_on = session
        session.settling += len(ours)
        for some in _messages_of(ours):
            await session.call.write(
                pb.WorkRequest(settle=_settle(some, in_columns=session.in_columns))
            )

    def _observe(self) -> None:
        for (kind, how), seconds in self._taken.items():
            metrics.observe_jobs(kind, how, seconds)
        self._taken.clear()

    def _has_nothing_more(self, session: _Session) -> bool:
        """Tell whether we are to stop, and all is said or the time for it is over."""
        if self._give_up_at is None and not session.is_draining:
            return False
        if all(held.sent_on is session for held in self._held.values()):
            return True
        if self._give_up_at is None or _now() < self._give_up_at:
            return False
        # Handed back: closing the stream in good order gives leases to others at once.
        self._forget([job for job, held in self._held.items() if held.sent_on is not session])
        return True

    async def _grant(self, session: _Session) -> None:
        if session.is_draining or self._give_up_at is not None:
            return
        # What is said but not yet settled leaves room for others: they come while it is written.
        working = len(self._held) - session.settling
        room = min(
            self._concurrency - working - session.credit,
            _MOST_HELD - len(self._held) - session.credit,
            _MOST_CREDIT,
        )
        if room > 0:
            session.credit += room
            await session.call.write(pb.WorkRequest(credit=pb.Credit(jobs=room)))

    def _next_beat(self, session: _Session) -> float:
        """Return when a heartbeat is due: it also tells progress, which need not wait so long."""
        if self._has_progress:
            return min(session.beat_at, session.progress_at)
        return session.beat_at

    async def _beat(self, session: _Session) -> None:
        self._has_progress = False
        session.beat_at = _now() + session.heartbeat_seconds
        session.progress_at = _now() + _PROGRESS_SECONDS
        beating = {
            job_id: held for job_id, held in self._held.items() if held.sent_on is not session
        }
        # One without leases, too: it says that we are here.
        for some in list(_messages_of(beating)) or [{}]:
            leases = [
                pb.LeaseProgress(job_id=job_id, lease_token=held.token, progress=held.progress)
                for job_id, held in some.items()
            ]
            sent_at = _now()
            await session.call.write(pb.WorkRequest(heartbeat=pb.Heartbeat(leases=leases)))
            for held in some.values():
                held.expires_at = sent_at + session.lease_seconds

    async def _wait(self, until: float) -> None:
        if self._give_up_at is not None:
            until = min(until, self._give_up_at)
        try:
            async with asyncio.timeout_at(until):
                await self._called.wait()
        except TimeoutError:
            pass


def _leases(leased: pb.Leased) -> list[_Lease]:
    if not leased.HasField("columns"):
        return [
            _Lease(
                lease.job_id,
                lease.lease_token,
                lease.kind,
                lease.payload_json,
                lease.attempt,
                lease.traceparent,
            )
            for lease in leased.leases
        ]
    columns = leased.columns
    return list(
        map(
            _Lease,
            _shown(columns.leases.job_ids),
            columns.leases.lease_tokens,
            columns.kinds,
            columns.payloads_json,
            columns.attempts,
            columns.traceparents or repeat(""),
        )
    )


def _messages_of(leases: Mapping[str, _Held]) -> Iterator[dict[str, _Held]]:
    """Cut leases into as many as the service takes in one message.

    After a stream broke there may be more: those that it carried the outcomes of, and others.
    """
    rest = iter(leases.items())
    while some := dict(islice(rest, _MOST_IN_MESSAGE)):
        yield some


def _completed(lease: _Lease, result: Mapping[str, Any]) -> pb.Outcome:
    """Return that a job is done.

    Raises:
        ValueError: The service does not take the result: the attempt has failed. Said all the
            same, it would end the stream, on which others' outcomes are said.
    """
    if not result:
        return _DONE
    text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    if len(text.encode()) > _LONGEST_RESULT or _NUL in text.replace(_BACKSLASH, ""):
        raise ValueError
    return _outcome(lease, completed=pb.Completed(result_json=text))


def _outcome(lease: _Lease, **result: Any) -> pb.Outcome:
    return pb.Outcome(job_id=lease.job_id, lease_token=lease.token, **result)


def _settle(ready: Mapping[str, _Held], *, in_columns: bool) -> pb.Settle:
    done = {job_id: held for job_id, held in ready.items() if held.outcome is _DONE}
    outcomes = [
        held.outcome for held in ready.values() if held.outcome and held.outcome is not _DONE
    ]
    if in_columns:
        column = bytes.fromhex("".join(done).replace(_JOB, ""))
        tokens = [held.token for held in done.values()]
        return pb.Settle(
            outcomes=outcomes, done=pb.LeaseColumns(job_ids=column, lease_tokens=tokens)
        )
    outcomes += [
        pb.Outcome(job_id=job_id, lease_token=held.token, completed=pb.Completed())
        for job_id, held in done.items()
    ]
    return pb.Settle(outcomes=outcomes)


def _shown(column: bytes) -> list[str]:
    digits = column.hex()
    return [_JOB + digits[start : start + _DIGITS] for start in range(0, len(digits), _DIGITS)]


def _pause_seconds(failures: int, chance: float) -> float:
    """Return how long to wait before the next stream: by chance, longer after each failure."""
    return min(0.1 * 2.0 ** min(failures, 10), _LONGEST_PAUSE_SECONDS) * chance


def _brief(error: BaseException) -> str:
    """Say what went wrong without what it was about: the user may read it, logs are kept."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return type(error).__name__


def _now() -> float:
    return asyncio.get_running_loop().time()
