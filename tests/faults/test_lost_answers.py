"""Killed or cut off between COMMIT and the answer: what was not answered is asked for again."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc
from structlog.testing import capture_logs

from local.servers import Stores
from server import ids
from server.database import Database, SystemDatabase
from server.enqueue import NewJob, enqueue_all
from tests.conftest import Urls, as_worker, bearer, new_caller
from tests.crashes.faults import COMMIT, Fault, Kind
from tests.crashes.victim import Victim, served
from tests.faults.conftest import LEASE_SECONDS
from tests.faults.figures import Figures
from tests.faults.jobs import KIND, Tally, count_no_more, count_outcomes, tally_of
from workers.stream import Task, Worker

TIMES: Final = 10
"""Each kind of fault, at each settlement of a story that is chosen by chance, and each enqueue."""
LEASES: Final = 3
"""A lease whose answer was lost lapses before its jobs are leased again: that takes a while."""
UNFENCED: Final = 3
JOBS: Final = 20
AT_ONCE: Final = 4
DRAIN_SECONDS: Final = 30.0
DO_ALL: Final = "UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE state = 'waiting'"
FATAL: Final = {Kind.KILLED_BEFORE, Kind.KILLED_AFTER}
TROUBLE: Final = {"leases lost", "leases lapsed"}
COMMITTED: Final = {Kind.KILLED_AFTER, Kind.UNANSWERED}


@dataclass(slots=True)
class Story:
    """Some jobs that a worker does, while the service dies or is cut off in the middle."""

    victim: Victim
    database: SystemDatabase
    owner: asyncpg.Connection
    handled: Counter[str] = field(default_factory=Counter)
    """How often each job was done."""
    told: list[str] = field(default_factory=list)
    """What the worker said of leases that were no longer its own."""

    async def survive(self, fault: Fault) -> float:
        """Have jobs done with a fault in between; return how many seconds that took."""
        deaths, started = len(self.victim.recovery_seconds), time.monotonic()
        await self.victim.arm(fault)
        async with self.database.transaction() as connection:
            await enqueue_all(connection, [NewJob(KIND)] * JOBS)
        with capture_logs() as said:
            async with self._working() as (worker, running):
                while await self._left():
                    await self.victim.revive()
                worker.drain()
                while not running.done():
                    await self.victim.revive()
        self.told += [each["event"] for each in said if each["event"] in TROUBLE]
        died, passed = len(self.victim.recovery_seconds) - deaths, await self.victim.arm(None)
        assert died == (fault.kind in FATAL), f"{fault}: died {died} times"
        assert fault.kind in FATAL or passed.happened, f"{fault} did not happen"
        before = 0 if died else fault.number
        assert passed.passes[fault.point] > before, f"{fault}: nobody asked again"
        return time.monotonic() - started

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
        worker = Worker(
            self.victim.channel,
            {KIND: self._do},
            concurrency=AT_ONCE,
            drain_seconds=DRAIN_SECONDS,
            metadata=as_worker(),
        )
        running = asyncio.create_task(worker.run())
        try:
            yield worker, running
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _do(self, task: Task) -> Mapping[str, Any]:
        self.handled[task.job_id] += 1
        await asyncio.sleep(random.uniform(0, 0.02))
        return {"token": task.lease_token}

    async def _left(self) -> int:
        left: int = await self.owner.fetchval(
            "SELECT count(*) FROM jobs WHERE kind = $1 AND state <> 'succeeded'", KIND
        )
        return left


@pytest_asyncio.fixture
async def counted(owner: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """A database that counts outcomes as they commit."""
    await count_outcomes(owner)
    yield owner
    await count_no_more(owner)


@dataclass(slots=True)
class Serving:
    """Begins the jobs service of a test."""

    stores: Stores
    urls: Urls
    master_key: Path
    stack: AsyncExitStack

    async def __call__(self, *without: str) -> Victim:
        """Return a service that lacks some guards."""
        return await self.stack.enter_async_context(
            served(
                self.stores,
                self.urls,
                self.master_key,
                without=without,
                module="tests.faults.served_jobs",
                LEASE_SECONDS=str(LEASE_SECONDS),
            )
        )


@pytest_asyncio.fixture
async def serving(stores: Stores, urls: Urls, master_key: Path) -> AsyncIterator[Serving]:
    async with AsyncExitStack() as stack:
        yield Serving(stores, urls, master_key, stack)


def count(figures: Figures, fault: Fault, victim: Victim, seconds: float) -> None:
    """Count a fault, and how long it took until the service was back and all was settled."""
    service = victim.recovery_seconds[-1] if fault.kind in FATAL else None
    figures.inject(f"{fault.kind} {fault.point}", service_seconds=service, whole_seconds=seconds)


def add(figures: Figures, tally: Tally) -> None:
    figures.operations += tally.made
    figures.lost += tally.made - tally.done
    figures.duplicated += tally.settled_twice


@pytest.mark.timeout(600)
async def test_settlement_that_was_committed_and_not_answered_is_made_again_and_counts_once(
    serving: Serving,
    system_database: SystemDatabase,
    counted: asyncpg.Connection,
    figures: Figures,
) -> None:
    chance = random.Random(figures.seed)
    story = Story(await serving(), system_database, counted)
    for kind in list(Kind) * TIMES:
        fault = Fault(kind, "settle", chance.randint(1, 3))
        count(figures, fault, story.victim, await story.survive(fault))
    tally = await tally_of(counted)
    add(figures, tally)
    assert tally == Tally(made=4 * TIMES * JOBS, done=tally.made, settled_twice=0, by_old_lease=0)
    # The work itself outlived the service, and the worker was told that what it did stands.
    assert set(story.handled.values()) == {1}
    assert story.told == []
    figures.guards.append(
        f"settlements committed and not answered: {2 * TIMES}, made again, each job settled once"
    )


@pytest.mark.timeout(300)
async def test_without_fencing_a_settlement_that_is_made_again_counts_twice(
    serving: Serving,
    system_database: SystemDatabase,
    counted: asyncpg.Connection,
    figures: Figures,
) -> None:
    story = Story(await serving("fencing"), system_database, counted)
    twice = []
    for _ in range(UNFENCED):
        before = (await tally_of(counted)).settled_twice
        await story.survive(Fault(Kind.KILLED_AFTER, "settle", 1))
        twice.append((await tally_of(counted)).settled_twice - before)
    assert min(twice) > 0
    figures.guards.append(
        f"settlements committed and not answered, no fencing: {sum(twice)} jobs settled twice"
        f" in {len(twice)}/{UNFENCED} cases"
    )


@pytest.mark.timeout(300)
async def test_jobs_whose_lease_was_not_answered_are_done_once_when_it_has_lapsed(
    serving: Serving,
    system_database: SystemDatabase,
    counted: asyncpg.Connection,
    figures: Figures,
) -> None:
    story = Story(await serving(), system_database, counted)
    for kind in sorted(COMMITTED) * LEASES:
        fault = Fault(kind, "lease", 1)
        count(figures, fault, story.victim, await story.survive(fault))
    tally = await tally_of(counted)
    add(figures, tally)
    assert tally == Tally(made=2 * LEASES * JOBS, done=tally.made, settled_twice=0, by_old_lease=0)
    assert set(story.handled.values()) == {1}
    leased_twice = await counted.fetchval("SELECT count(*) FROM jobs WHERE attempt = 2")
    assert leased_twice >= 2 * LEASES


@pytest.mark.timeout(600)
async def test_job_whose_creation_was_committed_and_not_answered_is_there_once(
    serving: Serving, database: Database, owner: asyncpg.Connection, figures: Figures
) -> None:
    victim = await serving()
    stub: rpc.JobServiceAsyncStub = rpc.JobServiceStub(victim.channel)
    asked = pb.CreateJobRequest(kind="user.export", request_id="once")
    for kind in list(Kind) * TIMES:
        fault, caller = Fault(kind, COMMIT, 1), await new_caller(database)
        await victim.arm(fault)
        started, tries, answer = time.monotonic(), 0, None
        while answer is None:
            tries += 1
            try:
                answer = await stub.CreateJob(asked, metadata=bearer(caller), timeout=5)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                # Done meanwhile: it does not take its being under way to find it again.
                await owner.execute(DO_ALL)
                await victim.revive()
        count(figures, fault, victim, time.monotonic() - started)
        made = await owner.fetch("SELECT id FROM jobs WHERE user_id = $1", caller.user_id)
        assert [ids.show(ids.JOB, row["id"]) for row in made] == [answer.job.id]
        assert tries > 1, f"{fault} did not happen"
    figures.operations += 4 * TIMES
