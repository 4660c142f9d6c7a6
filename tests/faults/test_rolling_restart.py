"""Two edges, two of every service and four workers: all are restarted in turn, some are killed.

What is tried again by itself, and only because the first try provably was not looked at:

* Within the mesh an Envoy asks another replica when it cannot connect, when its stream was
  refused, or when the connection ended before the request was sent (`safe_retry` in envoy/).
* Outside, gRPC sends once more what an edge refused as it drained: GOAWAY names the last stream
  that the edge looked at, and this one came after it. No setting of a client asks for that; it can
  be switched off, and here a client that has done so calls beside the usual one and is counted.
* The client of REST tries nothing again, nor does any test.
"""

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from uuid import UUID

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users
from prometheus_client.parser import text_string_to_metric_families

from deploy.drain import drain
from local.fleet import EDGE_LIMITS, Commands
from local.layout import Layout
from local.mesh import Mesh, in_background
from local.processes import State
from tests.faults.balancer import Balancer
from tests.faults.conftest import COMMANDS, LEASE_SECONDS
from tests.faults.figures import Figures
from tests.faults.jobs import KIND, Work
from tests.faults.reach import as_superuser, signed_up, until
from tests.mesh import bearer
from tests.transports import Grpc, Refused, Rest, Transport

SERVICES = ("auth", "auth-2", "memory", "memory-2", "jobs", "jobs-2")
REPLICAS = ("jobs", "jobs-2")
WORKERS = tuple(f"worker-{number}" for number in range(1, 5))
LOOPS = 3
"""Of each transport."""
NOTHING_TWICE = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
"""Options of a channel that also sends once what nobody has looked at; connections are its own."""
STREAMS = 3
"""Of memories over gRPC, and of a job over each transport."""
EVERY_SECONDS = 0.02
QUIET_SECONDS = 0.5
IDLE_SECONDS = 25
"""After so long the edge cuts a silent stream: sooner than usual, for a test waits longer."""
JOBS_AT_ONCE = 5
SHARED_JOBS = 4000
BACK_SECONDS = 60.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A durable mesh with two of every service and edge, whose workers do one kind of job."""
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
            edge_limits=replace(EDGE_LIMITS, stream_idle_seconds=IDLE_SECONDS),
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
    broken: Counter[str] = field(default_factory=Counter)
    """What streams broke of that did not end."""
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
            except (Refused, httpx.HTTPError) as error:
                self.broken[repr(error)] += 1

    async def watch_job(self, transport: Transport, job_id: str) -> None:
        """Watch a job that no worker does."""
        while True:
            try:
                async for response in transport.stream(jobs.WatchJobRequest(id=job_id)):
                    if response.HasField("end"):
                        self.ended[jobs.WatchJobEndReason.Name(response.end.reason)] += 1
            except (Refused, httpx.HTTPError) as error:
                self.broken[repr(error)] += 1


@asynccontextmanager
async def traffic(
    mesh: Mesh, work: Work, balancer: Balancer
) -> AsyncIterator[tuple[Traffic, Traffic]]:
    """Call, watch and have jobs done until the context ends.

    Yields:
        What becomes of the calls of usual clients, and of those of one that sends nothing twice.
    """
    trust = ssl.create_default_context(cafile=mesh.ca)
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    # A watched job that does not change is silent for long; calls end by the limit of the edge.
    silence = httpx.Timeout(15, read=None)
    # What fails is to be seen: no client tries again what may have been looked at.
    async with (
        signed_up(mesh, "traffic") as user,
        balancer.listening() as address,
        httpx.AsyncClient(base_url=f"https://{address}", verify=trust, timeout=silence) as http,
        grpc.aio.secure_channel(address, credentials) as channel,
        grpc.aio.secure_channel(address, credentials, options=NOTHING_TWICE) as strict,
    ):
        token = user.client.access_token
        transports: tuple[Transport, ...] = (Grpc(channel, bearer(token)), Rest(http, token))
        asked = jobs.CreateJobRequest(kind="user.export")
        job_id = (await user.client.jobs.CreateJob(asked)).job.id
        steady, once = Traffic(), Traffic()
        async with asyncio.TaskGroup() as group:
            watches = [group.create_task(steady.watch_memories(transports[0]))]
            watches += [group.create_task(steady.watch_job(each, job_id)) for each in transports]
            await steady.watching.wait()
            feeding = group.create_task(feed(work))
            for number, each in itertools.product(range(LOOPS), transports):
                group.create_task(steady.call(each, f"{type(each).__name__}{number}"))
            for number in range(LOOPS):
                group.create_task(once.call(Grpc(strict, bearer(token)), f"once{number}"))
            yield steady, once
            steady.stopping.set()
            once.stopping.set()
            feeding.cancel()
            await until(lambda: is_all_told(steady, once), BACK_SECONDS)
            for watch in watches:
                watch.cancel()


async def is_all_told(steady: Traffic, once: Traffic) -> bool:
    return {*steady.stored, *once.stored} <= set(steady.told)


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


async def restart_edge(mesh: Mesh, balancer: Balancer, name: str) -> None:
    """Stop an edge as its pod is stopped: it gets nothing new, drains, ends; and comes back."""
    before = mesh.process(name).restarts
    balancer.serving.discard(name)
    assert drain(mesh.layout.admin_socket(name)) == httpx.codes.OK
    seen = await calls_of(mesh, name)

    async def is_quiet() -> bool:
        """Whether nobody has called for a while."""
        nonlocal seen
        await asyncio.sleep(QUIET_SECONDS)
        last, seen = seen, await calls_of(mesh, name)
        return last == seen

    await until(is_quiet, BACK_SECONDS)
    await stop(mesh, name, signal.SIGTERM)

    async def is_back() -> bool:
        return mesh.process(name).restarts > before

    await until(is_back, BACK_SECONDS)
    await until(lambda: is_whole(mesh), BACK_SECONDS)
    balancer.serving.add(name)


async def calls_of(mesh: Mesh, name: str) -> str:
    """Return how many calls from outside an edge has taken, as it says it."""
    transport = httpx.AsyncHTTPTransport(uds=str(mesh.layout.admin_socket(name)))
    async with httpx.AsyncClient(transport=transport, base_url="http://envoy") as client:
        stats = await client.get("/stats", params={"filter": r"^http\.edge\.downstream_rq_total$"})
    assert stats.text.startswith("http.edge."), stats.text
    return stats.text


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
    balancer = Balancer(mesh.edges)
    async with traffic(mesh, work, balancer) as (steady, once):
        for name in (*SERVICES, *WORKERS):
            await restart(mesh, name)
        assert not steady.broken
        # No connection from outside has ended yet, and so there was nothing to send again.
        assert once.failed == []
        for name in mesh.edges:
            await restart_edge(mesh, balancer, name)
    seconds = time.monotonic() - started
    await work.all_end(await work.newest(), BACK_SECONDS)
    tally = await work.tally()
    again = await taken_again(mesh)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(steady.seconds)} calls over {2 * len((*SERVICES, *WORKERS))} restarts and "
            f"{len(mesh.edges)} of edges in "
            f"{seconds:.0f} s: {len(steady.failed)} failed, p99 "
            f"{1000 * quantiles(steady.seconds, n=100)[98]:.0f} ms, slowest "
            f"{1000 * max(steady.seconds):.0f} ms; {tally.done} of {tally.made} jobs done, "
            f"{tally.settled_twice} settled twice, {again} leased again; "
            f"{len(steady.stored)} memories told by streams that ended {dict(steady.ended)} "
            f"and, with an edge, broke {dict(steady.broken)}; "
            f"with nothing sent twice by gRPC {len(once.failed)} of {len(once.seconds)} failed, "
            f"all with an edge: {dict(Counter(once.failed))} "
        )
    assert steady.failed == []
    # What such a client was refused was not looked at: below, nothing of it is stored.
    assert all("UNAVAILABLE" in refused for refused in once.failed)
    # One call of each of its loops may be under way as an edge begins to drain.
    assert len(once.failed) <= LOOPS * len(mesh.edges)
    assert set(steady.ended) == {"WATCH_END_REASON_DRAIN", "WATCH_JOB_END_REASON_RECONNECT"}
    # A stream outlasts any drain: the edge that has it ends it, and a client goes on elsewhere.
    assert steady.broken.total() <= STREAMS * len(mesh.edges)
    assert steady.told == Counter([*steady.stored, *once.stored])
    assert (tally.made, tally.settled_twice, tally.by_old_lease) == (tally.done, 0, 0)
    assert again == 0


@pytest.mark.timeout(120)
async def test_watch_of_a_job_that_stands_still_outlasts_the_patience_of_the_edge(
    mesh: Mesh,
) -> None:
    await until(lambda: is_whole(mesh), BACK_SECONDS)
    trust = ssl.create_default_context(cafile=mesh.ca)
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    silence = httpx.Timeout(15, read=None)
    async with (
        signed_up(mesh, "patient") as user,
        httpx.AsyncClient(base_url=mesh.edge, verify=trust, timeout=silence) as http,
        grpc.aio.secure_channel(mesh.edge.removeprefix("https://"), credentials) as channel,
    ):
        token = user.client.access_token
        transports: tuple[Transport, ...] = (Grpc(channel, bearer(token)), Rest(http, token))
        asked = jobs.CreateJobRequest(kind="user.export")
        job_id = (await user.client.jobs.CreateJob(asked)).job.id
        shown: Counter[str] = Counter()

        async def watch(transport: Transport) -> None:
            async for response in transport.stream(jobs.WatchJobRequest(id=job_id)):
                shown[f"{type(transport).__name__} {response.WhichOneof('message')}"] += 1

        watching = [asyncio.create_task(watch(transport)) for transport in transports]
        over, _ = await asyncio.wait(watching, timeout=IDLE_SECONDS + 5)
        assert not over
        assert shown == {"Grpc job": 2, "Rest job": 2}
        for each in watching:
            each.cancel()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*REPLICAS, *WORKERS])
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


@pytest.mark.timeout(300)
async def test_every_worker_and_both_replicas_do_their_part_of_the_jobs(
    mesh: Mesh, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    await until(lambda: is_whole(mesh), BACK_SECONDS)

    async def all_serve() -> bool:
        """Whether each replica has workers: which of both a new stream goes to is chance."""
        streams = [await measured(mesh, name, "workers_connected") for name in REPLICAS]
        if sum(streams) == len(WORKERS) and not all(streams):
            await restart(mesh, WORKERS[0])
        return sum(streams) == len(WORKERS) and all(streams)

    await until(all_serve, 5 * BACK_SECONDS, pause=0.2)
    await work.make(1)
    oldest = await work.newest()
    await work.all_end(oldest, BACK_SECONDS)
    before = [await measured(mesh, name, "jobs_finished_total") for name in REPLICAS]
    await work.make(SHARED_JOBS)
    await work.all_end(await work.newest(), BACK_SECONDS)
    by_replica = [
        int(await measured(mesh, name, "jobs_finished_total") - finished)
        for name, finished in zip(REPLICAS, before, strict=True)
    ]
    by_worker = await done_by_worker(mesh, oldest)
    with capsys.disabled():
        sys.stdout.write(f"\n{SHARED_JOBS} jobs: by worker {by_worker}, by replica {by_replica} ")
    assert sum(by_replica) == sum(by_worker) == SHARED_JOBS
    # An even part would be a quarter; a replica that has one worker of four does a quarter, too.
    assert len(by_worker) == len(WORKERS)
    assert min(*by_worker, *by_replica) >= SHARED_JOBS // 8


async def measured(mesh: Mesh, name: str, sample: str) -> float:
    """Return what a process measures, the sum of all its series."""
    (url, _) = mesh.describe()["metrics"][name]
    async with httpx.AsyncClient() as client:
        text = (await client.get(url)).text
    families = text_string_to_metric_families(text)
    return sum(each.value for family in families for each in family.samples if each.name == sample)


async def done_by_worker(mesh: Mesh, oldest: UUID) -> list[int]:
    """Return how many of the jobs that are newer each worker has done."""
    async with as_superuser(mesh) as superuser:
        rows = await superuser.fetch(
            """
            SELECT count(*) AS jobs
              FROM jobs
             WHERE kind = $1 AND id > $2
             GROUP BY result -> 'worker'
            """,
            KIND,
            oldest,
        )
    return [row["jobs"] for row in rows]


async def has_running(mesh: Mesh) -> bool:
    """Tell whether jobs are being done at this moment."""
    async with as_superuser(mesh) as superuser:
        return bool(
            await superuser.fetchval(
                "SELECT EXISTS (SELECT FROM jobs WHERE kind = $1 AND state = 'running')", KIND
            )
        )
