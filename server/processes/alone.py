"""One process at a time that does a job of the mesh itself, with passwords that no worker has."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog

from server.backup.failures import Busy, Unwanted
from server.backup.postgres import connect
from server.backup.run_store import Kind
from server.database import SystemDatabase, open_pool
from server.enqueue import enqueue
from server.errors import StoreUnavailable
from server.jobs.model import Beat, Completed, Failed, Held, Lease, Stopped
from server.jobs.queue import Queue

log = structlog.get_logger()

Work = Callable[[Callable[[float], None]], Awaitable[dict[str, Any]]]
"""Does the work, says how far it is, 0 to 1, and returns the job's result."""

_LOCKS: Final[Mapping[Kind, int]] = {"create": 0x6B696D75, "verify": 0x6B696D76}
"""Any numbers that nothing else locks."""
_BEATS_A_LEASE: Final = 3
_LEASES_WAITED: Final = 3


@asynccontextmanager
async def alone(kind: Kind, url: str) -> AsyncIterator[SystemDatabase]:
    """Open the database for one process that does this; however it ends, the next one may.

    Raises:
        Busy: Another process does it.
    """
    async with connect(url) as connection, await open_pool(url, size=3, name=kind) as pool:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCKS[kind]):
            raise Busy(f"another process is at it: {kind}")
        yield SystemDatabase(pool)


async def as_job(
    system: SystemDatabase, kind: str, lease_seconds: float, work: Work
) -> dict[str, Any]:
    """Do work as a job of the mesh, and return its result.

    Raises:
        Busy: The job of a process that died is not given back yet.
        Unwanted: Somebody asked for the end of the job.
    """
    worker, queue = f"{kind}/{secrets.token_hex(8)}", Queue(system, lease_seconds)
    held = (await _lease(system, queue, worker, kind, lease_seconds)).held
    reached = [0.0]
    task = asyncio.ensure_future(work(lambda part: reached.__setitem__(0, part)))
    try:
        while not task.done():
            await asyncio.wait([task], timeout=lease_seconds / _BEATS_A_LEASE)
            if not task.done() and not await _beat(queue, worker, held, reached[0]):
                task.cancel()
        result = await task
    except asyncio.CancelledError:
        await queue.settle(worker, [Stopped(held)])
        raise Unwanted(f"the job {kind} was cancelled") from None
    except Exception as error:
        await queue.settle(worker, [Failed(held, said(error))])
        raise
    await queue.settle(worker, [Completed(held, json.dumps(result))])
    return result


async def _lease(
    system: SystemDatabase, queue: Queue, worker: str, kind: str, lease_seconds: float
) -> Lease:
    """Make the job, unless it waits already, and lease it."""
    for _ in range(_LEASES_WAITED * max(1, round(lease_seconds))):
        await queue.reclaim()
        async with system.transaction() as connection:
            # Once: what was not done is asked for again, by the clock or by somebody.
            await enqueue(connection, kind=kind, payload={}, unique_key=kind, max_attempts=1)
        if leases := await queue.lease(worker, [kind], 1):
            return leases[0]
        await asyncio.sleep(1)
    raise Busy(f"the job {kind} is leased by a process that does not end")


async def _beat(queue: Queue, worker: str, held: Held, reached: float) -> bool:
    """Keep the lease, and tell whether the work is still wanted."""
    try:
        extended = await queue.extend(worker, [Beat(held, reached)])
    except (StoreUnavailable, TimeoutError) as error:
        log.warning("lease not extended", error=repr(error))
        return True
    # A lease that lapsed while the database was away is of no account: the lock is held.
    return held not in extended.cancelled


def said(error: BaseException) -> str:
    """Return what an error says; of several that came at once, what each does."""
    if isinstance(error, ExceptionGroup):
        return "; ".join(said(each) for each in error.exceptions)
    return str(error) or type(error).__name__
