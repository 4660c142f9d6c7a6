"""The jobs service of one test, behind the real chain, and a worker's end of its stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.jobs.doorbell import Doorbell
from server.jobs.queue import Queue
from server.jobs.worker_service import WorkerService
from tests.conftest import Serve, Urls, as_worker

LEASE_SECONDS = 30.0


@pytest.fixture
def queue(system_database: SystemDatabase) -> Queue:
    return Queue(system_database, LEASE_SECONDS)


@pytest_asyncio.fixture
async def worker_service(queue: Queue, urls: Urls) -> AsyncIterator[WorkerService]:
    """A service that only its doorbell wakes: nothing is found by polling."""
    service = WorkerService(
        queue,
        Doorbell(urls.system, poll_seconds=3600),
        lease_seconds=LEASE_SECONDS,
        session_seconds=600,
    )
    running = asyncio.create_task(service.run())
    await asyncio.sleep(0)
    yield service
    running.cancel()
    await asyncio.wait([running])


@pytest_asyncio.fixture
async def workers(serve: Serve, worker_service: WorkerService) -> rpc.WorkerServiceAsyncStub:
    """A stub of the worker service."""
    channel = await serve(
        lambda server: rpc.add_WorkerServiceServicer_to_server(worker_service, server)
    )
    return rpc.WorkerServiceStub(channel)


async def want_vectors(database: Database, caller: Caller) -> None:
    """Have a user be one whose memories get vectors: they may ask for the job that makes them."""
    async with database.transaction(caller) as connection:
        await connection.execute(
            """
            INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
            VALUES ($1, $2, 'memory.embed', 1, true)
            """,
            caller.tenant_id,
            caller.user_id,
        )
        await connection.execute(
            """
            INSERT INTO settings (tenant_id, user_id, language, scoring_preset,
                                  relevance_to_goals, emotional_weight, predictive_value,
                                  recency_frequency, embedding_model, version)
            VALUES ($1, $2, 'english', 'balanced', 0.4, 0.3, 0.2, 0.1, 'small', 1)
            """,
            caller.tenant_id,
            caller.user_id,
        )


class Stream:
    """A worker's end of the stream, one message at a time."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def say(self, **message: Any) -> None:
        await self.call.write(pb.WorkRequest(**message))

    async def hear(self, expected: str) -> Any:
        response = await self.call.read()
        assert isinstance(response, pb.WorkResponse), response
        assert response.WhichOneof("message") == expected, response
        return getattr(response, expected)

    async def lease(self, jobs: int = 1) -> pb.Lease:
        """Grant credit and return the first lease that comes."""
        await self.say(credit=pb.Credit(jobs=jobs))
        leased = await self.hear("leased")
        lease: pb.Lease = leased.leases[0]
        return lease

    async def settle(self, *outcomes: pb.Outcome) -> None:
        await self.say(settle=pb.Settle(outcomes=outcomes))

    async def close(self) -> None:
        """Close our side and wait for the server's."""
        await self.call.done_writing()
        while isinstance(await self.call.read(), pb.WorkResponse):
            pass


@asynccontextmanager
async def working(
    stub: rpc.WorkerServiceAsyncStub,
    *kinds: str,
    worker_id: str = "w" * 32,
    in_columns: bool = False,
) -> AsyncIterator[Stream]:
    """Open a stream as a worker."""
    call = stub.Work(timeout=20, metadata=as_worker())  # type: ignore[call-arg]
    try:
        stream = Stream(call)
        await stream.say(
            hello=pb.Hello(worker_id=worker_id, kinds=kinds or ("test",), columns=in_columns)
        )
        await stream.hear("welcome")
        yield stream
    finally:
        call.cancel()


def completed(lease: pb.Lease, result_json: str = "") -> pb.Outcome:
    return pb.Outcome(
        job_id=lease.job_id,
        lease_token=lease.lease_token,
        completed=pb.Completed(result_json=result_json),
    )


def failed(lease: pb.Lease, error: str = "it broke") -> pb.Outcome:
    return pb.Outcome(
        job_id=lease.job_id, lease_token=lease.lease_token, failed=pb.Failed(error=error)
    )
