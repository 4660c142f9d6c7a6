"""A job that kills every worker that takes it, while the same workers do the jobs of others."""

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import pytest

from local.mesh import Mesh
from local.postgres import SYSTEM
from local.processes import State
from server.database import SystemDatabase, open_pool
from server.enqueue import USUAL_ATTEMPTS, NewJob, enqueue_all
from tests.faults.conftest import COMMANDS, LEASE_SECONDS
from tests.faults.figures import Figures, percentile
from tests.faults.jobs import KIND, POISON, Work
from tests.faults.reach import as_superuser, until
from tests.faults.test_jobs_under_fire import WORKERS, busy_mesh

ATTEMPTS = USUAL_ATTEMPTS
COMPANIONS = 5
"""Jobs of others that are leased together with the poison."""
USUAL_SECONDS = 30.0
EVERY_SECONDS = 0.05
JOBS_AT_ONCE = 6
NOTICEABLE_SECONDS = 0.05
"""A worker that starts beside takes a part of the processors."""
DEVIATIONS = 3.0
"""Standard deviations beyond which a share is no chance."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A mesh whose four workers do the jobs of others, and take poison."""
    with busy_mesh(COMMANDS.service) as running:
        yield running


@asynccontextmanager
async def fed(mesh: Mesh) -> AsyncIterator[SystemDatabase]:
    """Have jobs made at a steady pace until the context ends."""
    url = mesh.stores.dsn(SYSTEM)
    async with await open_pool(url, size=2, name="faults") as pool:
        database = SystemDatabase(pool)
        feeding = asyncio.create_task(feed(database))
        try:
            yield database
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])


async def feed(database: SystemDatabase) -> None:
    jobs = [NewJob(KIND)] * JOBS_AT_ONCE
    while True:
        async with database.transaction() as connection:
            await enqueue_all(connection, jobs)
        await asyncio.sleep(EVERY_SECONDS)


async def seconds_until_done(
    mesh: Mesh, after: UUID, upto: UUID, without: Sequence[UUID] = ()
) -> list[float]:
    """Return how long each job of a stretch took until it was done, by Postgres's clock."""
    async with as_superuser(mesh) as superuser:
        rows = await superuser.fetch(
            """
            SELECT date_part('epoch', finished_at - created_at) AS seconds
              FROM jobs
             WHERE kind = $1 AND state = 'succeeded' AND id > $2 AND id <= $3 AND id <> ALL ($4)
            """,
            KIND,
            after,
            upto,
            list(without),
        )
    return [row["seconds"] for row in rows]


async def attempts_of(mesh: Mesh, job_ids: Sequence[UUID]) -> list[int]:
    """Return at which attempts jobs were done, or given up."""
    async with as_superuser(mesh) as superuser:
        rows = await superuser.fetch(
            "SELECT attempt FROM jobs WHERE id = ANY ($1) ORDER BY attempt", list(job_ids)
        )
    return [row["attempt"] for row in rows]


async def hit(mesh: Mesh) -> int:
    """Return how many jobs of others lost a worker."""
    async with as_superuser(mesh) as superuser:
        count: int = await superuser.fetchval(
            "SELECT count(*) FROM jobs WHERE kind = $1 AND attempt > 1", KIND
        )
    return count


def restarts(mesh: Mesh) -> int:
    return sum(mesh.process(name).restarts for name in WORKERS)


@pytest.mark.timeout(300)
async def test_poison_dies_at_its_last_attempt_and_others_are_done_as_soon_as_ever(
    mesh: Mesh, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Work(mesh)
    await work.count()
    await work.make(1)
    await work.all_end(await work.newest(), 60)
    warm, born = await work.newest(), restarts(mesh)

    async with fed(mesh) as database:
        await asyncio.sleep(USUAL_SECONDS)
        before_it = await work.newest()
        async with database.transaction() as connection:
            poison, *companions = await enqueue_all(
                connection, [NewJob(POISON), *[NewJob(KIND)] * COMPANIONS]
            )

        async def is_given_up() -> bool:
            async with as_superuser(mesh) as superuser:
                state = await superuser.fetchval("SELECT state FROM jobs WHERE id = $1", poison)
            return bool(state == "dead")

        await until(is_given_up, 4 * ATTEMPTS * LEASE_SECONDS, pause=0.1)
        last = await work.newest()
    await work.all_end(await work.newest(), 60)
    usual = await seconds_until_done(mesh, warm, before_it)
    meanwhile = await seconds_until_done(mesh, before_it, last, without=companions)
    beside = await attempts_of(mesh, companions)
    bystanders = await hit(mesh)

    async def are_back() -> bool:
        return all(mesh.process(name).state is State.READY for name in WORKERS)

    await until(are_back, 60)
    async with as_superuser(mesh) as superuser:
        end = await superuser.fetchrow(
            "SELECT state, attempt, error FROM jobs WHERE id = $1", poison
        )
    tally = await work.tally()
    figures.operations += tally.made
    figures.lost += tally.made - tally.done
    figures.duplicated += tally.settled_twice
    for _ in range(restarts(mesh) - born):
        figures.inject("a job kills its worker")
    p99 = [1000 * percentile(each, 0.99) for each in (usual, meanwhile)]
    figures.guards.append(
        f"poison: {restarts(mesh) - born} workers killed by {ATTEMPTS} attempts, then dead;"
        f" others' p99 enqueued to done {p99[0]:.0f} ms before ({len(usual)} jobs),"
        f" {p99[1]:.0f} ms during ({len(meanwhile)}); {bystanders} jobs lost a worker with it;"
        f" those leased together with it were done at attempts {beside}"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{figures.guards[-1]}, slowest {max(meanwhile):.2f} s ")
    assert tuple(end) == ("dead", ATTEMPTS, "the worker stopped answering")
    assert restarts(mesh) - born == ATTEMPTS
    # None was given up because it was always leased with the poison, and so died with it.
    assert (tally.made, tally.settled_twice, tally.by_old_lease) == (tally.done, 0, 0)
    assert beside[-1] > 1
    # As many as ever take longer than the usual 99th percentile: a hundredth, but for chance.
    limit = percentile(usual, 0.99) + NOTICEABLE_SECONDS
    slow = sum(seconds > limit for seconds in meanwhile)
    expected = 0.01 * len(meanwhile)
    assert slow <= expected + DEVIATIONS * math.sqrt(expected)
