"""What the queue tells Prometheus of jobs."""

from __future__ import annotations

import asyncpg
from prometheus_client import REGISTRY

from server.database import SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue_all
from server.jobs.metrics import JobReadings
from server.jobs.model import Completed, Failed, Stopped
from server.jobs.queue import PLANS_OF_QUEUE, Queue
from tests.conftest import Urls


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def enqueue(database: SystemDatabase, kind: str, number: int, attempts: int = 1) -> None:
    async with database.transaction() as connection:
        await enqueue_all(connection, [NewJob(kind, max_attempts=attempts)] * number)


async def test_waiting_running_and_dead_jobs_are_counted_by_kind(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    readings = JobReadings(system_database)
    await enqueue(system_database, "metrics.one", 4)
    await enqueue(system_database, "metrics.other", 1)
    await owner.execute("UPDATE jobs SET run_at = now() - interval '90 s'")
    held = [lease.held for lease in await queue.lease("a", ["metrics.one"], 2)]
    await queue.settle("a", [Failed(held[0], "broken")])
    await readings.waiting()
    await readings.standing()
    one = {"kind": "metrics.one"}
    assert [value(f"jobs_{state}", **one) for state in ("waiting", "running", "dead")] == [2, 1, 1]
    assert value("jobs_waiting", kind="metrics.other") == 1
    assert 90 <= value("jobs_oldest_waiting_seconds", **one) < 120
    await owner.execute("DELETE FROM jobs")
    await readings.waiting()
    await readings.standing()
    # None is a number too: a series that ends tells nothing.
    assert [value(f"jobs_{state}", **one) for state in ("waiting", "running", "dead")] == [0, 0, 0]
    assert REGISTRY.get_sample_value("jobs_waiting", one) == 0


async def test_attempts_are_counted_as_they_ended(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await enqueue(system_database, "metrics.ends", 3, attempts=2)
    await owner.execute("UPDATE jobs SET run_at = now() - interval '10 s'")
    first, second, third = [lease.held for lease in await queue.lease("a", ["metrics.ends"], 3)]
    await owner.execute("UPDATE jobs SET cancelled_at = now() WHERE id = $1", third.job_id)
    failures = value("worker_failures_total", reason="handler")
    await queue.settle("a", [Completed(first, None), Failed(second, ""), Stopped(third)])
    # What is settled twice is counted once.
    await queue.settle("a", [Completed(first, None)])
    ended = {
        outcome: value("jobs_finished_total", kind="metrics.ends", outcome=outcome)
        for outcome in ("succeeded", "failed", "cancelled", "dead")
    }
    assert ended == {"succeeded": 1, "failed": 1, "cancelled": 1, "dead": 0}
    assert value("worker_failures_total", reason="handler") == failures + 1
    assert value("jobs_start_delay_seconds_count", kind="metrics.ends") == 3
    assert value("jobs_start_delay_seconds_sum", kind="metrics.ends") >= 30
    assert value("job_seconds_count", kind="metrics.ends") == 1


async def test_counting_what_waits_reads_no_job_that_ended(
    urls: Urls, owner: asyncpg.Connection
) -> None:
    await owner.execute(
        """
        INSERT INTO jobs (id, kind, max_attempts, payload, state, finished_at)
        SELECT uuidv7(), 'metrics.' || number % 10, 1, '{}',
               CASE WHEN number % 1000 = 0 THEN 'waiting' ELSE 'succeeded' END,
               CASE WHEN number % 1000 > 0 THEN now() END
          FROM generate_series(1, 50000) AS number
        """
    )
    await owner.execute("VACUUM ANALYZE jobs")
    # What this connection read itself is told now, not while the others are looked at.
    await owner.execute("SELECT pg_stat_force_next_flush()")
    async with await open_pool(urls.system, size=1, name="test", settings=PLANS_OF_QUEUE) as pool:
        readings = JobReadings(SystemDatabase(pool))
        before = await pages_read(owner)
        await readings.waiting()
        await readings.standing()
        await pool.execute("SELECT pg_stat_force_next_flush()")
        assert await pages_read(owner) - before < 200


async def pages_read(owner: asyncpg.Connection) -> int:
    """Return how many pages of the table of jobs itself were looked at so far."""
    pages: int = await owner.fetchval(
        """
        SELECT heap_blks_read + heap_blks_hit FROM pg_statio_user_tables WHERE relname = 'jobs'
        """
    )
    return pages
