"""Kills parts of a running mesh, and sees when they are back."""

import asyncio
import hashlib
import os
import random
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import grpc
import httpx
import psutil
from kimberly.auth.v1 import auth_pb2
from kimberly.client import Client
from kimberly.jobs.v1 import jobs_pb2
from kimberly.memory.v1 import memory_pb2 as pb

from local.mesh import Mesh
from server import ids
from tests.faults.driver import Driver, User
from tests.faults.reach import as_superuser, until

BACKEND: Final = "postgres backend"
KINDS: Final = (
    *("memory", "auth", "jobs"),
    *("memory-sidecar", "auth-sidecar", "jobs-sidecar"),
    *("worker", "worker-sidecar"),
    *("edge", "valkey", "s3", "postgres"),
    BACKEND,
)
WORKERS: Final = ("worker-1", "worker-2")

_STREAK = 3
"""So many creates and gets in a row tell that the service is back, not that it is about to go."""
_RECOVERY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """When a mesh was back, in seconds after the fault."""

    service_seconds: float
    whole_seconds: float


class Chaos:
    """Kills by SIGKILL only: nothing gets to say good-bye."""

    def __init__(
        self, mesh: Mesh, driver: Driver, judged: User, other: User, chance: random.Random
    ) -> None:
        """Prepare to kill.

        Args:
            mesh: What is hurt.
            driver: Writes down the creates and gets by which recovery is measured.
            judged: Makes them.
            other: Makes the other calls; what it stores is not judged.
            chance: Chooses which of several.
        """
        self._mesh = mesh
        self._driver = driver
        self._judged = judged
        self._other = other
        self._chance = chance

    async def kill(self, kind: str) -> Recovery:
        """Kill something of this kind and wait until the mesh has healed by itself."""
        name = self._name(kind)
        restarts = self._mesh.process(name).restarts
        pid = await self._pid(kind, name)
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        service, whole = await asyncio.gather(
            self._service_back(started),
            self._whole(name, restarts + (kind != BACKEND), started),
        )
        return Recovery(service, max(service, whole))

    def _name(self, kind: str) -> str:
        if kind == BACKEND:
            return "postgres"
        return kind.replace("worker", self._chance.choice(WORKERS)) if "worker" in kind else kind

    async def _pid(self, kind: str, name: str) -> int:
        if kind == BACKEND:
            async with as_superuser(self._mesh) as superuser:
                backends = await superuser.fetch(
                    """
                    SELECT pid
                      FROM pg_stat_activity
                     WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
                     ORDER BY pid
                    """
                )
            return int(self._chance.choice(backends)["pid"])
        pid = self._mesh.process(name).pid
        assert pid is not None, f"{name} does not run"
        return pid

    async def _service_back(self, started: float) -> float:
        """Return when the first of several creates and gets in a row succeeded."""
        streak, since = 0, 0.0
        while streak < _STREAK:
            assert time.monotonic() < started + _RECOVERY_SECONDS, "the service did not come back"
            if await self._driver.create(self._judged) and await self._is_read():
                since = since if streak else time.monotonic() - started
                streak += 1
            else:
                streak = 0
        return since

    async def _is_read(self) -> bool:
        memory_id, _ = self._judged.stored[-1]
        return await passes(
            lambda: self._judged.client.memory.GetMemory(
                pb.GetMemoryRequest(id=memory_id), timeout=3
            )
        )

    async def _whole(self, name: str, restarts: int, started: float) -> float:
        """Return when everything was ready again and what was killed did its own work."""

        async def is_ready() -> bool:
            return self._mesh.process(name).restarts >= restarts and self._mesh.is_ready

        async def works() -> bool:
            return await own_work(name)(self._other.client)

        await until(is_ready, _RECOVERY_SECONDS)
        await until(works, _RECOVERY_SECONDS, pause=0.1)
        return time.monotonic() - started


def own_work(name: str) -> Callable[[Client], Awaitable[bool]]:
    """Return a use of a process that cannot succeed without it, and no other part before it."""
    process = name.removesuffix("-sidecar")
    if process in WORKERS:
        return meditates
    return {"auth": logs_in, "jobs": lists_jobs, "s3": attaches, "valkey": keeps_for_short}.get(
        process, stores
    )


async def stores(client: Client) -> bool:
    """Create a long-term memory."""
    return await _creates(client, pb.TIER_LONG_TERM)


async def keeps_for_short(client: Client) -> bool:
    """Create a short-term memory."""
    return await _creates(client, pb.TIER_SHORT_TERM)


async def _creates(client: Client, tier: pb.Tier.ValueType) -> bool:
    memory = pb.Memory(content=f"probe {uuid.uuid4().hex}", tier=tier)
    request = pb.CreateMemoryRequest(memory=memory, request_id=uuid.uuid4().hex)
    return await passes(lambda: client.memory.CreateMemory(request, timeout=3))


async def logs_in(client: Client) -> bool:
    """Ask auth to look at a password: it is wrong, and only auth can tell."""
    request = auth_pb2.LogInRequest(email="nobody@example.com", password="not the password")
    try:
        await client.auth.LogIn(request, timeout=3)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


async def lists_jobs(client: Client) -> bool:
    """List jobs."""
    return await passes(lambda: client.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=3))


async def attaches(client: Client) -> bool:
    """Upload a file and read it back."""
    content = uuid.uuid4().bytes
    memory = pb.Memory(content=f"with a file {content.hex()}")
    try:
        created = await client.memory.CreateMemory(pb.CreateMemoryRequest(memory=memory), timeout=3)
        announced = await client.memory.CreateAttachment(
            pb.CreateAttachmentRequest(
                memory_id=created.memory.id,
                file_name="file",
                content_type="application/octet-stream",
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            ),
            timeout=3,
        )
        async with httpx.AsyncClient() as http:
            headers = {"content-type": "application/octet-stream"}
            await http.put(announced.upload_url, content=content, headers=headers)
            done = await client.memory.CompleteAttachment(
                pb.CompleteAttachmentRequest(id=announced.attachment.id), timeout=3
            )
            found = await client.memory.GetAttachment(
                pb.GetAttachmentRequest(id=done.attachment.id), timeout=3
            )
            return (await http.get(found.download_url)).content == content
    except (grpc.aio.AioRpcError, httpx.HTTPError):
        return False


async def meditates(client: Client) -> bool:
    """Meditate to the end."""
    try:
        await stores(client)
        run = (await client.memory.Meditate(pb.MeditateRequest(), timeout=3)).meditation
        async with asyncio.timeout(20):
            while run.state != pb.MEDITATION_STATE_SUCCEEDED:
                await asyncio.sleep(0.05)
                request = pb.GetMeditationRequest(id=run.id)
                run = (await client.memory.GetMeditation(request, timeout=3)).meditation
    except (grpc.aio.AioRpcError, TimeoutError):
        return False
    return True


async def passes(call: Callable[[], Awaitable[object]]) -> bool:
    """Tell whether a call succeeds."""
    try:
        await call()
    except grpc.aio.AioRpcError:
        return False
    return True


async def scoring_worker(mesh: Mesh, run: UUID) -> str | None:
    """Return the worker that has the lease of a run's only shard; None while nobody has."""
    async with as_superuser(mesh) as superuser:
        worker_id = await superuser.fetchval(
            """
            SELECT worker_id FROM jobs
             WHERE state = 'running' AND payload ->> 'meditation_id' = $1
            """,
            ids.show(ids.MEDITATION, run),
        )
    logs = {worker: mesh.layout.logs / f"{worker}.log" for worker in WORKERS}
    # A worker says who it is when its stream opens; the id is that of one process.
    return next(
        (name for name, log in logs.items() if worker_id and worker_id in log.read_text()), None
    )


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]
