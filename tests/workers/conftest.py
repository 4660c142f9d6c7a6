"""A jobs service that a test can stop and start, and workers that it can let go."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2_grpc
from kimberly.embedding.v1 import embedding_pb2_grpc
from kimberly.jobs.v1 import jobs_pb2_grpc
from kimberly.scoring.v1 import scoring_pb2_grpc

from server.agents.service import AgentService
from server.agents.store import AgentStore
from server.agents.task_store import TaskStore
from server.auth.agent_keys import AgentKeys
from server.cache import Redis
from server.clock import utc_now
from server.database import Database, SystemDatabase
from server.jobs.doorbell import Doorbell
from server.jobs.queue import Queue
from server.jobs.store import JobStore
from server.jobs.worker_service import WorkerService
from server.memory.agent_jobs import AgentJobs
from server.memory.agent_reads import AgentReads
from server.memory.agent_work_service import AgentWorkService
from server.memory.embedding_jobs import EmbeddingJobs
from server.memory.embedding_service import EmbeddingService
from server.memory.embedding_store import EmbeddingStore
from server.memory.scoring_service import ScoringService
from server.memory.scoring_store import ScoringStore
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.processes.kinds import KINDS
from server.rpc.interceptors import chain
from server.rpc.serving import Server
from tests.conftest import WORKER_ID, PlainTokens, Urls, as_worker, data_keys_of
from tests.maintenance import tidying_of
from tests.unhurried import PATIENT_SECONDS
from workers.meditation import Meditation
from workers.stream import Handler, Worker

LEASE_SECONDS = 30.0
"""Longer than a busy machine stands still: no lease lapses where a test does not want it."""
lapse_soon = pytest.mark.parametrize("mesh", [1.0], indirect=True)
"""For tests that wait until leases lapse. Theirs may also lapse under who still works."""


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    """Return when something that tells nobody, such as a row, is as it should be."""
    async with asyncio.timeout(60):
        while True:
            if await condition():
                return
            # What is waited for needs the processor too.
            await asyncio.sleep(0.005)


async def let_lapse(owner: asyncpg.Connection) -> None:
    """Have the leases of a worker that was killed be over, for the next sweep to find."""
    await owner.execute("UPDATE jobs SET lease_expires_at = now() WHERE state = 'running'")


class Mesh:
    """Worker, scoring and embedding service on one Unix socket."""

    def __init__(
        self,
        database: SystemDatabase,
        users: Database,
        redis: Redis,
        urls: Urls,
        socket: Path,
        *,
        lease_seconds: float,
    ) -> None:
        self.database = database
        self.users = users
        self.lease_seconds = lease_seconds
        self.queue = Queue(database, lease_seconds)
        self.doorbell = Doorbell(urls.system)
        self.service = WorkerService(
            self.queue,
            self.doorbell,
            lease_seconds=lease_seconds,
            session_seconds=600,
        )
        self.scoring = ScoringService(
            ScoringStore(database, shards=3), tidying_of(users, database, redis, utc_now)
        )
        self.embedding = EmbeddingService(EmbeddingJobs(users, database), EmbeddingStore(users))
        self.agents = AgentService(
            AgentStore(database, AgentKeys()),
            TaskStore(users),
            JobStore(users, database, KINDS).cancel,
        )
        self.agent_work = AgentWorkService(
            AgentJobs(users, database),
            MemoryStore(users, data_keys_of(users)),
            ShortTermStore(redis, users, timedelta(days=1)),
            Opener(data_keys_of(users)),
            AgentReads(users),
            utc_now,
        )
        self._socket = socket
        self._server: Server | None = None

    async def start(self) -> None:
        layers = chain(
            PlainTokens(), worker_id=WORKER_ID, unary_seconds=PATIENT_SECONDS, stream_seconds=60
        )
        self._server = Server(self._socket, layers, services=())
        jobs_pb2_grpc.add_WorkerServiceServicer_to_server(self.service, self._server.grpc)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(self.scoring, self._server.grpc)
        agents_pb2_grpc.add_AgentServiceServicer_to_server(self.agents, self._server.grpc)
        agents_pb2_grpc.add_AgentWorkServiceServicer_to_server(self.agent_work, self._server.grpc)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(self.embedding, self._server.grpc)
        await self._server.start()

    async def break_down(self) -> None:
        """Stop at once; streams break."""
        if self._server is not None:
            await self._server.grpc.stop(None)
            self._server = None

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        options = (
            ("grpc.initial_reconnect_backoff_ms", 20),
            ("grpc.min_reconnect_backoff_ms", 20),
            ("grpc.max_reconnect_backoff_ms", 100),
            ("grpc.use_local_subchannel_pool", 1),
        )
        async with grpc.aio.insecure_channel(f"unix:{self._socket}", options=options) as channel:
            yield channel

    @asynccontextmanager
    async def working(
        self,
        handlers: Mapping[str, Handler] | Callable[[grpc.aio.Channel], Mapping[str, Handler]],
        *,
        concurrency: int = 4,
        drain_seconds: float = 5,
    ) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
        """Run a worker; leaving the block kills it: it settles and hands back nothing."""
        async with self.channel() as channel:
            worker = Worker(
                channel,
                handlers(channel) if callable(handlers) else handlers,
                concurrency=concurrency,
                drain_seconds=drain_seconds,
                metadata=as_worker(),
            )
            running = asyncio.create_task(worker.run())
            try:
                yield worker, running
            finally:
                running.cancel()
                await asyncio.wait([running])
        if not running.cancelled() and (error := running.exception()):
            raise error


def meditating(batch_size: int = 100) -> Callable[[grpc.aio.Channel], Mapping[str, Handler]]:
    """Return what makes the handlers of a meditation."""

    def handlers(channel: grpc.aio.Channel) -> Mapping[str, Handler]:
        meditation = Meditation(channel, metadata=as_worker(), batch_size=batch_size)
        return {"meditation.plan": meditation.plan, "meditation.shard": meditation.score_shard}

    return handlers


@pytest.fixture
def socket() -> Iterator[Path]:
    directory = Path(mkdtemp(prefix="kimberly-"))
    yield directory / "mesh"
    shutil.rmtree(directory)


@pytest_asyncio.fixture
async def mesh(
    request: pytest.FixtureRequest,
    system_database: SystemDatabase,
    database: Database,
    redis: Redis,
    urls: Urls,
    socket: Path,
) -> AsyncIterator[Mesh]:
    lease_seconds = getattr(request, "param", LEASE_SECONDS)
    mesh = Mesh(system_database, database, redis, urls, socket, lease_seconds=lease_seconds)
    listening = asyncio.Event()
    with mesh.doorbell.heard_by(listening.set):
        running = asyncio.create_task(mesh.service.run())
        # What is cancelled earlier is learnt by the next heartbeat, and that is far away.
        await listening.wait()
    await mesh.start()
    yield mesh
    await mesh.break_down()
    running.cancel()
    await asyncio.wait([running])
