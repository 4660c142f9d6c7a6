"""Two of every service and four workers: all are restarted in turn, and some are killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from local.fleet import Commands
from local.layout import Layout
from local.mesh import Mesh, in_background
from local.processes import State
from tests.faults.conftest import COMMANDS, LEASE_SECONDS
from tests.faults.figures import Figures
from tests.faults.jobs import KIND, Work
from tests.faults.reach import as_superuser, signed_up, until
from tests.mesh import bearer
from tests.transports import Grpc, Refused, Rest, Transport

SERVICES = ("auth", "auth-2", "memory", "memory-2", "jobs", "jobs-2")
WORKERS = tuple(f"worker-{number}" for number in range(1, 5))
LOOPS = 3
"""Of each transport."""
EVERY_SECONDS = 0.02
JOBS_AT_ONCE = 5
BACK_SECONDS = 60.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A durable mesh with two replicas of every service, whose workers do one kind of job."""
    commands = Commands(
        service=COMMANDS.service, worker=(sys.executable, "-m", "tests.faults.busy_worker")
    )
    with TemporaryDirectory(prefix="kimberly-faults-") as state:
        Path(state).chmod(0o755)
        described = Mesh(
            Layout(Path(state)),
            workers=len(WORKERS),
            replicas=2,
            commands=commands,
            # What is stopped on purpose, and often, is to come back at once.
            longest_pause_seconds=0.2,
        )
        with in_background(described) as running:
            yield running


@pytest_asyncio.fixture(scope="module")
async def work(mesh: Mesh) -> Work:
    work = Work(mesh)
    await work.count()
    return work


@dataclass
class Traffic:
    """Calls to every service, none of which is made a second time, and what became of them."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    """Contents of memories whose creation was acknowledged."""
    told: Counter[str] = field(default_factory=Counter)
    """Contents of memories whose creation was watched, and how often it was told."""
    ended: Counter[str] = field(default_factory=Counter)
    """Why streams ended."""
    watching: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, transport: Transport, name: str) -> None:
        """Read and write again and again."""
        for number in itertools.count():
            if self.stopping.is_set():
                return
            content = f"tide and kelp {name} {number}"
            written = memory.CreateMemoryRequest(memory=memory.Memory(content=content))
            if await self._counted(transport, written):
                self.stored.append(content)
            await self._counted(transport, memory.ListMemoriesRequest(page_size=5))
            await self._counted(transport, memory.QueryMemoriesRequest(query="kelp", top_k=3))
            await self._counted(transport, users.GetUserRequest())
            await self._counted(transport, jobs.ListJobsRequest(page_size=5))
            await asyncio.sleep(EVERY_SECONDS)

    async def _counted(self, transport: Transport, request: Message) -> bool:
        started = time.monotonic()
        try:
            await transport(request)
        except (Refused, httpx.HTTPError) as error:
            self.failed.append(f"{type(transport).__name__} {type(request).__name__}: {error!r}")
            return False
        finally:
            self.seconds.append(time.monotonic() - started)
        return True

    async def watch_memories(self, transport: Transport) -> None:
        """Watch the memories, from where the last stream ended."""
        cursor = ""
        while True:
            request = memory.WatchMemoriesRequest(cursor=cursor, include_memories=True)
            try:
                async for response in transport.stream(request):
                    cursor = response.cursor or cursor
                    self.watching.set()
                    if response.HasField("change"):
                        self.told[response.change.memory.content] += 1
                    if response.HasField("end"):
                        self.ended[memory.WatchEndReason.Name(response.end.reason)] += 1
            except Refused as error:
                self.ended[repr(error)] += 1

    async def watch_job(self, transport: Transport, job_id: str) -> None:
        """Watch a job that no worker does."""
        while True:
            try:
                async for response in transport.stream(jobs.WatchJobRequest(id=job_id)):
                    if response.HasField("end"):
                        self.ended[jobs.WatchJobEndReason.Name(response.end.reason)] += 1
            except Refused as error:
                self.ended[repr(error)] += 1


@asynccontextmanager
async def traffic(mesh: Mesh, work: Work) -> AsyncIterator[Traffic]:
    """Call, watch and have jobs done until the context ends."""
    trust = ssl.create_default_context(cafile=mesh.ca)
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    address = mesh.edge.removeprefix("https://")
    # A watched job that does not change is silent; calls end by the limit of the edge.
    silence = httpx.Timeout(15, read=None)
    # What fails is to be seen: neither client tries again.
    once = (("grpc.enable_retries", 0),)
    async with (
        signed_up(mesh, "traffic") as user,
        httpx.AsyncClient(base_url=mesh.edge, verify=trust, timeout=silence) as http,
        grpc.aio.secure_channel(address, credentials, once) as channel,
    ):
        token = user.client.access_token
        transports: tuple[Transport, ...] = (Grpc(channel, bearer(token)), Rest(http, token))
        asked = jobs.CreateJobRequest(kind="user.export")
        job_id = (await user.client.jobs.CreateJob(asked)).job.id
        steady = Traffic()
        async with asyncio.TaskGroup() as group:
            watches = [group.create_task(steady.watch_memories(transports[0]))]
            watches += [group.create_task(steady.watch_job(each, job_id)) for each in transports]
            await steady.watching.wait()
            feeding = group.create_task(feed(work))
            for number, each in itertools.product(range(LOOPS), transports):
                group.create_task(steady.call(each, f"{type(each).__name__}{number}"))
            yield steady
            steady.stopping.set()
            feeding.cancel()
            await until(lambda: is_all_told(steady), BACK_SECONDS)
            for watch in watches:
                watch.cancel()


async def is_all_told(steady: Traffic) -> bool:
    return set(steady.stored) <= set(steady.told)


async def feed(work: Work) -> None:
    while True:
        await work.make(JOBS_AT_ONCE)
        await asyncio.sleep(0.1)


async def restart(mesh: Mesh, name: str) -> None:
    """Stop a process as its pod is stopped, its sidecar after it, and wait until both are back."""
    before = {each: mesh.process(each).restarts for each in (name, f"{name}-sidecar")}
    for each in before:
        await stop(mesh, each, signal.SIGTERM)

    async def is_back() -> bool:
        return all(mesh.process(each).restarts > count for each, count in before.items())

    await until(is_back, BACK_SECONDS)
    await until(lambda: is_whole(mesh), BACK_SECONDS)


async def stop(mesh: Mesh, name: str, number: signal.Signals) -> None:
    """Send a process a signal that ends it, and wait until it has ended."""
    pid = mesh.process(name).pid
    assert pid is not None, f"{name} does not run"
    os.kill(pid, number)

    async def has_ended() -> bool:
        return mesh.process(name).pid != pid

    await until(has_ended, BACK_SECONDS)


async def is_whole(mesh: Mesh) -> bool:
    """Tell whether everything is ready, and every Envoy sees every peer well."""
    return mesh.is_ready and all(
        [await sees_all(path) for path in mesh.layout.sockets.glob("*.admin")]
    )


async def sees_all(admin: Path) -> bool:
    transport = httpx.AsyncHTTPTransport(uds=str(admin))
    async with httpx.AsyncClient(transport=transport, base_url="http://envoy") as client:
        return "failed_active_hc" not in (await client.get("/clusters")).text


async def taken_again(mesh: Mesh) -> int:
    """Return how many jobs were leased more than once."""
    async with as_superuser(mesh) as superuser:
        count: int = await superuser.fetchval(
            "SELECT count(*) FROM jobs WHERE kind = $1 AND attempt > 1", KIND
        )
    return count


@pytest.mark.timeout(400)
async def test_a_restart_of_everything_in_turn_fails_no_call_and_no_job(
    mesh: Mesh, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    async with traffic(mesh, work) as steady:
        for name in (*SERVICES, *WORKERS):
            await restart(mesh, name)
    seconds = time.monotonic() - started
    await work.all_end(await work.newest(), BACK_SECONDS)
    tally = await work.tally()
    again = await taken_again(mesh)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(steady.seconds)} calls over {2 * len((*SERVICES, *WORKERS))} restarts in "
            f"{seconds:.0f} s: {len(steady.failed)} failed, p99 "
            f"{1000 * quantiles(steady.seconds, n=100)[98]:.0f} ms, slowest "
            f"{1000 * max(steady.seconds):.0f} ms; {tally.done} of {tally.made} jobs done, "
            f"{tally.settled_twice} settled twice, {again} leased again; "
            f"{len(steady.stored)} memories told by streams that ended {dict(steady.ended)} "
        )
    assert steady.failed == []
    assert set(steady.ended) == {"WATCH_END_REASON_DRAIN", "WATCH_JOB_END_REASON_RECONNECT"}
    assert steady.told == Counter(steady.stored)
    assert (tally.made, tally.settled_twice, tally.by_old_lease) == (tally.done, 0, 0)
    assert again == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["jobs", "jobs-2", *WORKERS])
async def test_jobs_go_on_while_one_that_was_killed_is_away(
    mesh: Mesh, work: Work, figures: Figures, name: str
) -> None:
    await until(lambda: is_whole(mesh), BACK_SECONDS)
    feeding = asyncio.create_task(feed(work))
    await until(lambda: has_running(mesh), BACK_SECONDS)
    killed = time.monotonic()
    await stop(mesh, name, signal.SIGKILL)
    await work.make(1)
    service_seconds = await work.ends(await work.newest(), BACK_SECONDS) - killed
    was_away = mesh.process(name).state is not State.READY
    feeding.cancel()
    whole_seconds = await work.all_end(await work.newest(), BACK_SECONDS) - killed
    figures.inject(
        f"SIGKILL one {name.partition('-')[0]} of several",
        service_seconds=service_seconds,
        whole_seconds=whole_seconds,
    )
    tally = await work.tally()
    assert was_away
    assert whole_seconds < 2 * LEASE_SECONDS
    assert (tally.made, tally.settled_twice, tally.by_old_lease) == (tally.done, 0, 0)


async def has_running(mesh: Mesh) -> bool:
    """Tell whether jobs are being done at this moment."""
    async with as_superuser(mesh) as superuser:
        return bool(
            await superuser.fetchval(
                "SELECT EXISTS (SELECT FROM jobs WHERE kind = $1 AND state = 'running')", KIND
            )
        )
