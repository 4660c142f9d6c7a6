"""The chain around every call: log, errors, deadline, caller, access. Its order has reasons.

1. log        outermost, so that refused and failed calls are counted with their final status
2. errors     turns everything below into a status; nothing raised further in escapes it
3. deadline   bounds all the work below, the look-up of keys included
4. caller     who is calling, before anyone asks whether they may
5. access     a method without a row is denied to everybody
6. erased     whoever asked to be erased may do nothing that they might have done before
7. kept       a stream lasts no longer than the session or key that its token descends from
8. toll       last: what is refused for another reason counts against no limit
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Protocol, assert_never
from uuid import UUID

import grpc
import structlog

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
    ScopeMissing,
    Unauthenticated,
)
from server.rpc.around import Call, Layer
from server.rpc.status import STATUS_METADATA_KEY, Internal, code_of, to_status

log = structlog.get_logger()

_BEARER = "Bearer "
_AS_IT_IS: AbstractAsyncContextManager[None] = nullcontext()
"""Costs a call next to nothing, and may be entered by many."""
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

    def note(self, caller: Caller, method: str, received_bytes: int) -> None:
        """Count a call that was served."""


def chain(
    verifier: Verifier,
    *,
    worker_id: str,
    unary_seconds: float,
    stream_seconds: float,
    erased: Container[UUID] = (),
    ended: Container[UUID] = (),
    gate: Gate | None = None,
) -> Sequence[Layer]:
    """Return the layers of every server, outermost first.

    Args:
        verifier: Verifies access tokens.
        worker_id: SPIFFE id of workers.
        unary_seconds: Longest time of a unary call.
        stream_seconds: Longest time of a call that streams.
        erased: Users whose tokens open nothing any more.
        ended: Sessions and API keys that have ended, with the streams that they opened.
        gate: Admits calls of users and counts them; None admits all.
    """
    layers: tuple[Layer, ...] = (
        logged,
        answered,
        _Deadline(unary_seconds, stream_seconds).bounded,
        _Caller(verifier).identified,
        _Access(worker_id).allowed,
        _Erased(erased).refused,
        _Kept(ended).kept,
    )
    return layers if gate is None else (*layers, _Toll(gate).paid)


@asynccontextmanager
async def logged(call: Call) -> AsyncIterator[None]:
    """Log how the call ended, under the request id that the edge gave it."""
    started = time.perf_counter()
    with structlog.contextvars.bound_contextvars(
        method=call.method, request_id=call.metadata.get("x-request-id")
    ):
        try:
            yield
        finally:
            milliseconds = round((time.perf_counter() - started) * 1000, 2)
            log.debug("call", status=_code_name(call.context), milliseconds=milliseconds)


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
    status = to_status(problem)
    log.info("call refused", reason=problem.reason, code=code_of(problem).name)
    await call.context.abort(
        code_of(problem),
        problem.message,
        ((STATUS_METADATA_KEY, status.SerializeToString()),),
    )


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
    """Has calls of users admitted, and counts those that were served."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @asynccontextmanager
    async def paid(self, call: Call) -> AsyncIterator[None]:
        if METHODS.get(call.method) not in ROLES:
            yield
            return
        caller = current_caller()
        await self._gate.admit(caller)
        yield
        self._gate.note(caller, call.method, call.received_bytes)


def workload_id(call: Call) -> str | None:
    """Return the SPIFFE id of the workload at the other end of the mTLS connection.

    Only our own sidecar can write the header: it removes what it receives, and nothing else
    reaches the socket that we listen on.
    """
    header = call.metadata.get("x-forwarded-client-cert")
    found = _URI_IN_XFCC.search(header) if isinstance(header, str) else None
    return found.group(1) if found else None
