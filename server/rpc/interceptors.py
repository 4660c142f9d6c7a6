"""The chain around every call: log, errors, deadline, place, caller, access. Its order has reasons.

1.  trace     outermost: whatever is logged or asked of a store has its place in it
2.  log       and metrics, so that refused and failed calls are counted with their final status
3.  errors    turns everything below into a status; nothing raised further in escapes it
4.  deadline  bounds all the work below, the look-up of keys included
5.  place     where the call comes from, before anything is refused by that
6.  caller    who is calling, before anyone asks whether they may
7.  access    a method without a row is denied to everybody
8.  erased    whoever asked to be erased may do nothing that they might have done before
9.  kept      a stream lasts no longer than the session or key that its token descends from
10. streams   a user has a few open: each keeps a place among the calls that Envoys let be
11. limits    last: what is refused for another reason counts against none
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Final, Protocol, assert_never
from uuid import UUID

import grpc
import structlog
from opentelemetry.trace import SpanKind

from server import metrics, tracing
from server.access import METHODS, OPEN_TO_ERASED, ROLES, Access, Scope, scope_of
from server.caller import (
    Caller,
    Credentials,
    current_caller,
    current_credentials,
    set_credentials,
)
from server.errors import (
    AccountErased,
    DeadlineExceeded,
    PermissionDenied,
    Problem,
    QuotaExceeded,
    ScopeMissing,
    Unauthenticated,
)
from server.metering import Count, open_ledger
from server.places import current_place, set_address
from server.rpc.around import Call, Layer
from server.rpc.status import Internal, code_of, metadata_of

log = structlog.get_logger()

_BEARER = "Bearer "
_AS_IT_IS: AbstractAsyncContextManager[None] = nullcontext()
"""Costs a call next to nothing, and may be entered by many."""
STREAMS: Final = 32
"""Of one user, in one process."""
_LOOK_SECONDS = 1.0
"""How often a stream is asked whether it may go on."""
_URI_IN_XFCC = re.compile(r'(?:^|;)URI="?([^;,"]+)"?')


class Verifier(Protocol):
    """Verifies access tokens."""

    async def verify(self, token: str) -> Credentials:
        """Return what the token says, or raise Unauthenticated."""


class Gate(Protocol):
    """Admits calls of users, and counts them."""

    async def admit(self, caller: Caller) -> None:
        """Let a call pass, or raise RateLimited."""

    def meter(self, caller: Caller, method: str, received: Callable[[], int]) -> Count | None:
        """Return what counts the changes of a call; None: they count as nothing.

        Args:
            caller: Whose call it is.
            method: Its full name.
            received: Returns how many bytes of it have come.
        """

    def note(self, caller: Caller, method: str) -> None:
        """Count a call that was served."""


class Turnstile(Protocol):
    """Admits calls that carry no token."""

    async def admit(self, place: str, method: str) -> None:
        """Let a call from a place pass, or raise RateLimited."""


def chain(
    verifier: Verifier,
    *,
    worker_id: str,
    unary_seconds: float,
    stream_seconds: float,
    edge_id: str = "",
    erased: Container[UUID] = (),
    ended: Container[UUID] = (),
    gate: Gate | None = None,
    turnstile: Turnstile | None = None,
) -> Sequence[Layer]:
    """Return the layers of every server, outermost first.

    Args:
        verifier: Verifies access tokens.
        worker_id: SPIFFE id of workers.
        unary_seconds: Longest time of a unary call.
        stream_seconds: Longest time of a call that streams.
        edge_id: SPIFFE id of the edge, whose word on where a call comes from is believed.
        erased: Users whose tokens open nothing any more.
        ended: Sessions and API keys that have ended, with the streams that they opened.
        gate: Admits calls of users and counts them; None admits all.
        turnstile: Admits calls that carry no token; None admits all.
    """
    traces = (traced,) if tracing.has_begun() else ()
    strangers = (_Strangers(turnstile).admitted,) if turnstile else ()
    users = (_Toll(gate).paid,) if gate else ()
    return (
        *traces,
        logged,
        answered,
        _Deadline(unary_seconds, stream_seconds).bounded,
        _Place(edge_id).located,
        _Caller(verifier).identified,
        _Access(worker_id).allowed,
        _Erased(erased).refused,
        _Kept(ended).kept,
        _Streams().counted,
        *strangers,
        *users,
    )


@asynccontextmanager
async def traced(call: Call) -> AsyncIterator[None]:
    """Go on with the trace that the call is part of. Here none begins: the edge chooses."""
    parent = call.metadata.get(tracing.TRACEPARENT)
    if not isinstance(parent, str) or not tracing.is_kept(parent):
        yield
        return
    name, attributes = call.method.removeprefix("/"), {"rpc.system": "grpc"}
    if call.streams:
        tracing.opened(name, parent, attributes)
        yield
        return
    with tracing.continued(name, parent, attributes, kind=SpanKind.SERVER):
        yield


@asynccontextmanager
async def logged(call: Call) -> AsyncIterator[None]:
    """Log how the call ended, under the request id that the edge gave it; and count it."""
    started = time.perf_counter()
    metrics.RPCS_IN_FLIGHT.inc()
    code = ""
    with structlog.contextvars.bound_contextvars(
        method=call.method, request_id=call.metadata.get("x-request-id")
    ):
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            # The client went away, and nobody set a status.
            code = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            seconds = time.perf_counter() - started
            code = code or _code_name(call.context)
            metrics.RPCS_IN_FLIGHT.dec()
            metrics.rpc_seconds(call.method, code).observe(seconds)
            log.debug("call", status=code, milliseconds=round(seconds * 1000, 2))


def _code_name(context: Any) -> str:
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else grpc.StatusCode.OK.name


@asynccontextmanager
async def answered(call: Call) -> AsyncIterator[None]:
    """Turn what was raised into a status. The unforeseen is logged whole and told as INTERNAL."""
    try:
        yield
    except Problem as problem:
        await _abort(call, problem)
    except TimeoutError:
        await _abort(call, DeadlineExceeded())
    except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
        raise
    except Exception:
        log.exception("unforeseen failure")
        await _abort(call, Internal())


async def _abort(call: Call, problem: Problem) -> None:
    log.info("call refused", reason=problem.reason, code=code_of(problem).name)
    await call.context.abort(code_of(problem), problem.message, metadata_of(problem))


class _Deadline:
    """Bounds a call by its client's deadline, and by ours where that is longer or absent."""

    def __init__(self, unary_seconds: float, stream_seconds: float) -> None:
        self._unary_seconds = unary_seconds
        self._stream_seconds = stream_seconds

    @asynccontextmanager
    async def bounded(self, call: Call) -> AsyncIterator[None]:
        longest = self._stream_seconds if call.streams else self._unary_seconds
        remaining = call.context.time_remaining()
        async with asyncio.timeout(longest if remaining is None else min(longest, remaining)):
            yield


class _Place:
    """Finds out where a call comes from. A peer that is not the edge has no say in that."""

    def __init__(self, edge_id: str) -> None:
        self._edge_id = edge_id

    async def located(self, call: Call) -> None:
        header = call.metadata.get("x-forwarded-for")
        is_believed = isinstance(header, str) and workload_id(call) == self._edge_id
        # The edge appends what it saw itself.
        set_address(str(header).rpartition(",")[2].strip() if is_believed else "")


class _Caller:
    """Finds out who is calling from the access token. The sidecar verified it too: we ask again."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def identified(self, call: Call) -> None:
        header = call.metadata.get("authorization")
        if METHODS.get(call.method) in ROLES and isinstance(header, str):
            if not header.startswith(_BEARER):
                raise Unauthenticated("the authorization header must be a Bearer token")
            set_credentials(await self._verifier.verify(header.removeprefix(_BEARER)))
        else:
            set_credentials(None)


class _Access:
    """Lets pass who may call the method."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    async def allowed(self, call: Call) -> None:
        access = METHODS.get(call.method)
        match access:
            case None:
                raise PermissionDenied
            case Access.ANYONE | Access.WORKLOAD:
                pass
            case Access.USER | Access.AUDITOR | Access.ADMIN:
                _check_user(call.method, access)
            case Access.WORKER:
                if workload_id(call) != self._worker_id:
                    raise PermissionDenied
            case _:
                assert_never(access)


def _check_user(method: str, access: Access) -> None:
    credentials = current_credentials()
    if credentials.role not in ROLES[access]:
        raise PermissionDenied
    scopes = credentials.scopes
    if Scope.USER not in scopes and scope_of(method) not in scopes:
        raise ScopeMissing(scope_of(method))


class _Erased:
    """Refuses users who asked to be erased, although their tokens have not expired."""

    def __init__(self, users: Container[UUID]) -> None:
        self._users = users

    async def refused(self, call: Call) -> None:
        is_closed = METHODS.get(call.method) in ROLES and call.method not in OPEN_TO_ERASED
        if is_closed and current_caller().user_id in self._users:
            raise AccountErased


class _Strangers:
    """Has calls from outside admitted that carry no token."""

    def __init__(self, turnstile: Turnstile) -> None:
        self._turnstile = turnstile

    async def admitted(self, call: Call) -> None:
        if METHODS.get(call.method) is Access.ANYONE and (place := current_place()):
            await self._turnstile.admit(place, call.method)


class _Kept:
    """Ends streams whose session or key has ended: tokens are verified when a call begins."""

    def __init__(self, ended: Container[UUID]) -> None:
        self._ended = ended

    def kept(self, call: Call) -> AbstractAsyncContextManager[None]:
        is_users = call.streams and METHODS.get(call.method) in ROLES
        return self._kept() if is_users else _AS_IT_IS

    @asynccontextmanager
    async def _kept(self) -> AsyncIterator[None]:
        async with asyncio.timeout(None) as limit:
            look = _Look(self._ended, current_credentials().grant_id, limit)
            try:
                yield
            except asyncio.CancelledError:
                if look.has_ended:
                    raise Unauthenticated("what the stream was opened with has ended") from None
                raise
            finally:
                look.stop()


class _Streams:
    """Bounds how many streams a user has open here, whatever they are of."""

    def __init__(self) -> None:
        self._open: Counter[Caller] = Counter()

    def counted(self, call: Call) -> AbstractAsyncContextManager[None]:
        is_users = call.streams and METHODS.get(call.method) in ROLES
        return self._counted(current_caller()) if is_users else _AS_IT_IS

    @asynccontextmanager
    async def _counted(self, caller: Caller) -> AsyncIterator[None]:
        if self._open[caller] >= STREAMS:
            raise QuotaExceeded("streams", STREAMS, STREAMS, "close one of them", "streams")
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


class _Look:
    """Looks again and again whether a grant has ended, and then stops the task that it is for."""

    def __init__(self, ended: Container[UUID], grant_id: UUID, limit: asyncio.Timeout) -> None:
        self._ended = ended
        self._grant_id = grant_id
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self.has_ended = False
        self._next = self._loop.call_later(_LOOK_SECONDS, self._look)

    def stop(self) -> None:
        """Look no more."""
        self._next.cancel()

    def _look(self) -> None:
        if self._grant_id in self._ended:
            self.has_ended = True
            self._limit.reschedule(self._loop.time())
        else:
            self._next = self._loop.call_later(_LOOK_SECONDS, self._look)


class _Toll:
    """Has calls of users admitted and counted: what they changed, and that they were served."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @asynccontextmanager
    async def paid(self, call: Call) -> AsyncIterator[None]:
        if METHODS.get(call.method) not in ROLES:
            yield
            return
        caller = current_caller()
        await self._gate.admit(caller)
        open_ledger(self._gate.meter(caller, call.method, lambda: call.received_bytes))
        yield
        self._gate.note(caller, call.method)


def workload_id(call: Call) -> str | None:
    """Return the SPIFFE id of the workload at the other end of the mTLS connection.

    Only our own sidecar can write the header: it removes what it receives, and nothing else
    reaches the socket that we listen on.
    """
    header = call.metadata.get("x-forwarded-client-cert")
    found = _URI_IN_XFCC.search(header) if isinstance(header, str) else None
    return found.group(1) if found else None
