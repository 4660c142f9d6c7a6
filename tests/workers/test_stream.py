"""The loop of a worker against the real queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import pytest
from kimberly.jobs.v1 import jobs_pb2 as pb

from server import ids
from server.cache import Redis
from server.enqueue import NewJob, enqueue_all
from server.jobs.doorbell import Doorbell
from server.jobs.worker_service import WorkerService
from tests.conftest import Urls
from tests.faults.figures import percentile
from tests.workers.conftest import Mesh, lapse_soon, let_lapse, until
from workers import stream
from workers.stream import Handler, Task


async def enqueue(mesh: Mesh, *kinds: str, max_attempts: int = 5) -> list[UUID]:
    async with mesh.database.transaction() as connection:
        return await enqueue_all(
            connection,
            [NewJob(kind, {"n": n}, max_attempts=max_attempts) for n, kind in enumerate(kinds)],
        )


SAMPLES = 300
"""Of so many, the 99th percentile is the third from the end."""
often_heard = pytest.mark.parametrize("mesh", [6.0], indirect=True)
"""For tests that wait for heartbeats: they come every two seconds, and no lease lapses."""
COUNTED = "SELECT count(*) FILTER (WHERE kind = 'count' AND state = 'succeeded') = 50 FROM jobs"


class Handled:
    """Handlers that a test holds the reins of."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.stopped = asyncio.Event()
        self.tasks: list[Task] = []

    async def wait(self, task: Task) -> Mapping[str, Any]:
        self.tasks.append(task)
        self.started.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.stopped.set()
            raise
        return {"waited": True}

    async def count(self, task: Task) -> Mapping[str, Any]:
        self.tasks.append(task)
        return {"n": task.payload["n"]}

    async def fail(self, task: Task) -> Mapping[str, Any]:
        self.tasks.append(task)
        self.started.set()
        raise ZeroDivisionError("what it was about")

    @property
    def all(self) -> dict[str, Handler]:
        return {"wait": self.wait, "count": self.count, "fail": self.fail}


@pytest.fixture
def handled() -> Handled:
    return Handled()


async def states(owner: asyncpg.Connection) -> list[tuple[str, int]]:
    rows = await owner.fetch("SELECT state, attempt FROM jobs ORDER BY id")
    return [tuple(row) for row in rows]


async def test_worker_does_jobs_and_settles_them(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, *["count"] * 50)
    async with mesh.working(handled.all) as (worker, running):
        await enqueue(mesh, "wait")
        await asyncio.wait_for(handled.started.wait(), 30)
        # Kinds take turns: the last job came before some of the others.
        await until(lambda: owner.fetchval(COUNTED))
        worker.drain()
        handled.go_on.set()
        await running
    assert await states(owner) == [("succeeded", 1)] * 51
    results = await owner.fetch("SELECT result->>'n' AS n FROM jobs WHERE kind = 'count'")
    assert sorted(int(row["n"]) for row in results) == list(range(50))


class Former(WorkerService):
    """The service of the release that knew no columns."""

    async def Work(
        self, request_iterator: AsyncIterator[pb.WorkRequest], context: Any
    ) -> AsyncIterator[pb.WorkResponse]:
        async def known() -> AsyncIterator[pb.WorkRequest]:
            async for request in request_iterator:
                if request.HasField("hello"):
                    request.hello.ClearField("columns")
                assert not request.settle.HasField("done")
                yield request

        async for response in super().Work(known(), context):
            if response.HasField("welcome"):
                response.welcome.ClearField("columns")
            yield response


class Overheard(WorkerService):
    """A service that notes what it settles, and may keep that from the worker."""

    is_mute = True
    settled = 0

    async def Work(
        self, request_iterator: AsyncIterator[pb.WorkRequest], context: Any
    ) -> AsyncIterator[pb.WorkResponse]:
        async for response in super().Work(request_iterator, context):
            if response.HasField("settled"):
                self.settled += len(response.settled.job_id_column) // ids.BYTES
            if not (self.is_mute and response.HasField("settled")):
                yield response


def lease_for_long(mesh: Mesh) -> None:
    """Let no lease lapse, however busy the machine is."""
    mesh.queue._lease_seconds = mesh.service._lease_seconds = 60


async def test_all_that_a_worker_did_not_hear_of_is_told_again_on_the_next_stream(
    mesh: Mesh, urls: Urls, owner: asyncpg.Connection
) -> None:
    """That may be more than the service takes in one message."""

    async def do_nothing(_task: Task) -> Mapping[str, Any]:
        return {}

    await mesh.break_down()
    service = Overheard(mesh.queue, Doorbell(urls.system), lease_seconds=60, session_seconds=600)
    mesh.service = service
    lease_for_long(mesh)
    serving = asyncio.create_task(service.run())
    await mesh.start()

    async def settled(jobs: int) -> bool:
        return service.settled == jobs

    await enqueue(mesh, *["nothing"] * 1500)
    async with mesh.working({"nothing": do_nothing}, concurrency=1000):
        await until(lambda: settled(1500))
        await mesh.break_down()
        service.is_mute = False
        await mesh.start()
        await until(lambda: settled(3000))
    assert await states(owner) == [("succeeded", 1)] * 1500
    serving.cancel()
    await asyncio.wait([serving])


@pytest.mark.parametrize(
    "result", [{"n": float("nan")}, {"n": "\0"}, {"n": "\ud800"}, {"n": "x" * 70_000}, {"n": {1}}]
)
async def test_result_that_the_service_does_not_take_fails_its_own_job_only(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection, result: Mapping[str, Any]
) -> None:
    async def odd(task: Task) -> Mapping[str, Any]:
        return result

    lease_for_long(mesh)
    await enqueue(mesh, "odd", *["count"] * 5, max_attempts=1)
    async with mesh.working({**handled.all, "odd": odd}):
        await until(lambda: owner.fetchval("SELECT bool_and(finished_at IS NOT NULL) FROM jobs"))
    rows = await owner.fetch("SELECT kind, state, count(*) FROM jobs GROUP BY kind, state")
    assert sorted(map(tuple, rows)) == [("count", "succeeded", 5), ("odd", "dead", 1)]
    error = await owner.fetchval("SELECT error FROM jobs WHERE kind = 'odd'")
    assert error in {"ValueError", "TypeError", "UnicodeEncodeError"}


async def test_result_with_any_other_character_is_taken(
    mesh: Mesh, owner: asyncpg.Connection
) -> None:
    text = "\\u0000 ü 😀 \x01"

    async def odd(task: Task) -> Mapping[str, Any]:
        return {"text": text}

    lease_for_long(mesh)
    await enqueue(mesh, "odd", max_attempts=1)
    async with mesh.working({"odd": odd}):
        await until(lambda: owner.fetchval("SELECT bool_and(finished_at IS NOT NULL) FROM jobs"))
    assert await owner.fetchval("SELECT result ->> 'text' FROM jobs") == text


async def test_worker_works_for_a_server_that_knows_no_columns(
    mesh: Mesh, handled: Handled, urls: Urls, owner: asyncpg.Connection
) -> None:
    async def do_nothing(_task: Task) -> Mapping[str, Any]:
        return {}

    await mesh.break_down()
    mesh.service = Former(
        mesh.queue, Doorbell(urls.system), lease_seconds=mesh.lease_seconds, session_seconds=600
    )
    serving = asyncio.create_task(mesh.service.run())
    await mesh.start()
    await enqueue(mesh, *["count", "nothing"] * 20)
    async with mesh.working({**handled.all, "nothing": do_nothing}) as (worker, running):
        await until(
            lambda: owner.fetchval("SELECT bool_and(state = 'succeeded' AND attempt = 1) FROM jobs")
        )
        worker.drain()
        await running
    results = await owner.fetch("SELECT kind, count(result) AS jobs FROM jobs GROUP BY kind")
    assert {row["kind"]: row["jobs"] for row in results} == {"count": 20, "nothing": 0}
    serving.cancel()
    await asyncio.wait([serving])


async def test_drained_worker_finishes_what_it_holds(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait", "wait")
    async with mesh.working(handled.all, concurrency=1) as (worker, running):
        await asyncio.wait_for(handled.started.wait(), 30)
        worker.drain()
        handled.go_on.set()
        await running
    assert sorted(await states(owner)) == [("succeeded", 1), ("waiting", 0)]


async def test_drained_worker_hands_back_what_takes_too_long(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait")
    async with mesh.working(handled.all, drain_seconds=0) as (worker, running):
        await asyncio.wait_for(handled.started.wait(), 30)
        worker.drain()
        await running
    assert handled.stopped.is_set()
    assert await states(owner) == [("waiting", 0)]


async def test_idle_worker_drains_at_once(mesh: Mesh, handled: Handled) -> None:
    async with mesh.working(handled.all) as (worker, running):
        worker.drain()
        await asyncio.wait_for(running, 30)


async def test_worker_drains_while_no_service_answers(mesh: Mesh, handled: Handled) -> None:
    await mesh.break_down()
    async with mesh.working(handled.all) as (worker, running):
        worker.drain()
        await asyncio.wait_for(running, 30)


async def test_failing_job_is_reported_without_what_it_was_about(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "fail", max_attempts=1)
    await enqueue(mesh, "count")
    async with mesh.working(handled.all) as (worker, running):
        await asyncio.wait_for(handled.started.wait(), 30)
        worker.drain()
        await running
    row = await owner.fetchrow("SELECT state, error FROM jobs WHERE kind = 'fail'")
    assert tuple(row) == ("dead", "ZeroDivisionError")


async def test_no_more_jobs_run_at_once_than_there_is_room_for(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, *["wait"] * 3)
    async with mesh.working(handled.all, concurrency=2):
        await asyncio.wait_for(handled.started.wait(), 30)
        await enqueue(mesh, "count")
        async with mesh.working({"count": handled.count}) as (other, done):
            await until(lambda: owner.fetchval("SELECT true FROM jobs WHERE state = 'succeeded'"))
            other.drain()
            await done
        assert [task.kind for task in handled.tasks].count("wait") == 2


async def test_work_goes_on_over_a_broken_stream(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait")
    async with mesh.working(handled.all) as (worker, running):
        await asyncio.wait_for(handled.started.wait(), 30)
        await mesh.break_down()
        handled.go_on.set()
        await mesh.start()
        worker.drain()
        await running
    assert await states(owner) == [("succeeded", 1)]
    assert len(handled.tasks) == 1


@pytest.mark.parametrize("mesh", [4.0], indirect=True)
async def test_heartbeats_keep_a_long_job_alive_while_a_thread_computes(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    def compute() -> None:
        until = time.perf_counter() + 1.5 * mesh.lease_seconds
        while time.perf_counter() < until:
            sum(range(1000))

    async def long(task: Task) -> Mapping[str, Any]:
        handled.tasks.append(task)
        handled.started.set()
        await asyncio.to_thread(compute)
        return {}

    await enqueue(mesh, "long")
    async with mesh.working({"long": long}, drain_seconds=60) as (worker, running):
        await asyncio.wait_for(handled.started.wait(), 30)
        worker.drain()
        await running
    assert await states(owner) == [("succeeded", 1)]


@lapse_soon
async def test_worker_whose_heartbeats_do_not_get_through_stops_the_work(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait")
    async with mesh.working(handled.all):
        await asyncio.wait_for(handled.started.wait(), 30)
        await mesh.break_down()
        await asyncio.wait_for(handled.stopped.wait(), 30)


async def test_job_of_a_killed_worker_is_done_by_another(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait")
    async with mesh.working(handled.all):
        await asyncio.wait_for(handled.started.wait(), 30)
    await let_lapse(owner)
    handled.go_on.set()
    handled.started.clear()
    async with mesh.working(handled.all) as (worker, running):
        await asyncio.wait_for(handled.started.wait(), 30)
        worker.drain()
        await running
    assert await states(owner) == [("succeeded", 2)]
    assert handled.tasks[0].lease_token < handled.tasks[1].lease_token


@often_heard
async def test_worker_stops_work_that_passed_to_another(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait")
    async with mesh.working(handled.all):
        await asyncio.wait_for(handled.started.wait(), 30)
        await owner.execute("UPDATE jobs SET lease_token = lease_token + 1000")
        await asyncio.wait_for(handled.stopped.wait(), 30)
    assert (await states(owner))[0][0] == "running"


async def test_worker_returns_after_the_service_asked_it_to_connect_again(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    async with mesh.working(handled.all) as (worker, running):
        await enqueue(mesh, "wait")
        await asyncio.wait_for(handled.started.wait(), 30)
        mesh.service.drain()
        handled.go_on.set()
        await until(lambda: owner.fetchval("SELECT true FROM jobs WHERE state = 'succeeded'"))
        mesh.service._is_draining = False
        handled.started.clear()
        await enqueue(mesh, "wait")
        await asyncio.wait_for(handled.started.wait(), 30)
        worker.drain()
        await running


WORKERS = 50
Pause = Callable[[int, float], float]


class Waited(NamedTuple):
    """The last pause of a worker."""

    until: float
    seconds: float
    failures: int


async def pauses(mesh: Mesh, handlers: Mapping[str, Handler], pause_seconds: Pause) -> list[float]:
    """Return how long each of many workers waited last when the service was away from all at once.

    In order. What a worker waits is what sets it apart from the others: how close together they
    arrive tells as much of the machine.
    """
    loop, came = asyncio.get_running_loop(), list[float]()
    waited: dict[asyncio.Task[None] | None, Waited] = {}

    def noted(failures: int, chance: float) -> float:
        pause = pause_seconds(failures, chance)
        waited[asyncio.current_task()] = Waited(loop.time() + pause, pause, failures)
        return pause

    async def have_failed_often() -> bool:
        """Tell whether everybody waits as long as it gets."""
        return len(waited) == WORKERS and min(each.failures for each in waited.values()) >= 5

    async with contextlib.AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(stream, "_pause_seconds", noted)
        for _ in range(WORKERS):
            await stack.enter_async_context(mesh.working(handlers))
        await until(lambda: connected(mesh, WORKERS))
        await mesh.break_down()
        await until(have_failed_often)
        await mesh.start()
        while len(came) < WORKERS:
            came += [loop.time()] * (len(mesh.service._sessions) - len(came))
            await asyncio.sleep(0.002)
    over = sorted(each.until for each in waited.values())
    # Nobody comes before the pause is over.
    assert all(early <= late for early, late in zip(over, came, strict=True))
    return sorted(each.seconds for each in waited.values())


async def connected(mesh: Mesh, workers: int) -> bool:
    return len(mesh.service._sessions) == workers


def most_within(seconds: float, moments: list[float]) -> int:
    """Return how many of some moments, in order, lie as close together as that."""
    return max(sum(first <= moment < first + seconds for moment in moments) for first in moments)


async def test_workers_that_lost_their_service_do_not_all_come_back_at_one_instant(
    mesh: Mesh, handled: Handled
) -> None:
    waited = await pauses(mesh, handled.all, stream._pause_seconds)
    # Over two seconds: in a twentieth of them comes a twentieth of them, give or take.
    assert waited[-1] - waited[0] > 1
    assert most_within(0.1, waited) < WORKERS // 3


async def test_without_chance_they_would(mesh: Mesh, handled: Handled) -> None:
    without_chance = partial(_without_chance, stream._pause_seconds)
    assert most_within(0.1, await pauses(mesh, handled.all, without_chance)) == WORKERS


def _without_chance(pause: Pause, failures: int, _chance: float) -> float:
    return pause(failures, 1)


# --- cancelling, progress, poison ---------------------------------------------------------------


async def cancel(mesh: Mesh, job_id: UUID) -> None:
    """Ask for the end of a running job, as JobStore does."""
    async with mesh.database.transaction() as connection:
        await connection.execute(
            """
            UPDATE jobs SET cancelled_at = now()
             WHERE id = $1 AND state = 'running'
            RETURNING pg_notify('jobs_cancelled', id || '/' || lease_token)
            """,
            job_id,
        )


async def test_worker_is_told_that_its_job_is_cancelled_and_stops(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    cancelled, other = await enqueue(mesh, "wait", "wait")
    async with mesh.working(handled.all) as (worker, running):
        await until(lambda: owner.fetchval("SELECT count(*) = 2 FROM jobs WHERE attempt = 1"))
        await asyncio.wait_for(handled.started.wait(), 30)
        await cancel(mesh, cancelled)
        await asyncio.wait_for(handled.stopped.wait(), 30)
        await until(lambda: owner.fetchval("SELECT true FROM jobs WHERE state = 'cancelled'"))
        worker.drain()
        handled.go_on.set()
        await running
    rows = await owner.fetch("SELECT id, state FROM jobs")
    assert {row["id"]: row["state"] for row in rows} == {cancelled: "cancelled", other: "succeeded"}


@often_heard
async def test_heartbeat_tells_of_a_cancellation_that_was_not_heard(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    await enqueue(mesh, "wait")
    async with mesh.working(handled.all):
        await asyncio.wait_for(handled.started.wait(), 30)
        await owner.execute("UPDATE jobs SET cancelled_at = now()")
        await asyncio.wait_for(handled.stopped.wait(), 30)
        await until(lambda: owner.fetchval("SELECT true FROM jobs WHERE state = 'cancelled'"))


async def test_result_of_a_handler_that_will_not_stop_does_not_stand(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    async def stubborn(task: Task) -> Mapping[str, Any]:
        handled.started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await handled.go_on.wait()
        return {"done": True}

    (job_id,) = await enqueue(mesh, "stubborn")
    async with mesh.working({"stubborn": stubborn}):
        await asyncio.wait_for(handled.started.wait(), 30)
        await cancel(mesh, job_id)
        await until(lambda: owner.fetchval("SELECT true FROM jobs WHERE state = 'cancelled'"))
    assert await owner.fetchval("SELECT result FROM jobs") is None


async def test_progress_is_seen_while_the_job_runs(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    async def half(task: Task) -> Mapping[str, Any]:
        task.report(0.5)
        await handled.go_on.wait()
        task.report(2.0)
        return {}

    await enqueue(mesh, "half")
    async with mesh.working({"half": half}) as (worker, running):
        await until(lambda: owner.fetchval("SELECT progress = 0.5 FROM jobs"))
        handled.go_on.set()
        worker.drain()
        await running
    assert await owner.fetchval("SELECT progress = 1 FROM jobs")


async def test_kind_that_always_fails_holds_up_no_other(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    """With room for one job at a time; what fails is there first, and has most of the jobs."""
    await enqueue(mesh, *["fail"] * 200, max_attempts=2)
    async with mesh.working(handled.all, concurrency=1):
        await asyncio.wait_for(handled.started.wait(), 30)
        await enqueue(mesh, *["count"] * 50)
        await until(lambda: owner.fetchval(COUNTED))
        assert await owner.fetchval("SELECT count(*) FROM jobs WHERE kind = 'fail' AND due") >= 100
    # Kinds took turns: a job that failed and a job that was done, one after the other.
    began = [task.kind for task in handled.tasks]
    amid = began[began.index("count") :][: 2 * 50]
    assert 30 <= amid.count("fail") <= 70


@pytest.mark.alone
@lapse_soon
async def test_poison_job_is_given_up_and_others_do_not_notice(
    mesh: Mesh, handled: Handled, owner: asyncpg.Connection
) -> None:
    """Whoever takes the poison dies of it; beside, somebody else works all the while."""

    async def wait(owner: asyncpg.Connection) -> float:
        started = time.perf_counter()
        (job_id,) = await enqueue(mesh, "count")
        done = "SELECT true FROM jobs WHERE id = $1 AND state = 'succeeded'"
        await until(lambda: owner.fetchval(done, job_id))
        return time.perf_counter() - started

    async with mesh.working({"count": handled.count}):
        usual = [await wait(owner) for _ in range(SAMPLES)]
        meanwhile: list[float] = []
        poisons = 0
        while len(meanwhile) < SAMPLES:
            await enqueue(mesh, "wait", max_attempts=3)
            poisons += 1
            for attempt in (1, 2, 3):
                handled.started.clear()
                async with mesh.working({"wait": handled.wait}):
                    while not handled.started.is_set():
                        meanwhile.append(await wait(owner))
                # Left: it was killed, and nobody handed anything back.
                done = len(usual) + len(meanwhile) + 3 * (poisons - 1)
                assert len(handled.tasks) - done == attempt
            while await owner.fetchval("SELECT count(*) FROM jobs WHERE state = 'dead'") < poisons:
                meanwhile.append(await wait(owner))
    dead = await owner.fetch("SELECT state, attempt, error FROM jobs WHERE kind = 'wait'")
    assert list(map(tuple, dead)) == [("dead", 3, "the worker stopped answering")] * poisons
    # A lease of the poison lasts a second: whoever waited for one of its nine would be seen, and a
    # machine that stands still for a moment is not.
    assert percentile(meanwhile, 0.99) < percentile(usual, 0.99) * 2 + 0.4


@lapse_soon
async def test_two_replicas_and_four_workers_go_on_whichever_of_them_dies(
    mesh: Mesh,
    urls: Urls,
    handled: Handled,
    owner: asyncpg.Connection,
    redis: Redis,
    socket: Path,
) -> None:
    beside = socket.with_name("replica")
    replica = Mesh(mesh.database, mesh.users, redis, urls, beside, lease_seconds=mesh.lease_seconds)
    sweeping = asyncio.create_task(replica.service.run())
    await replica.start()

    async def some_done(more: int) -> None:
        done = "SELECT count(*) >= $1 FROM jobs WHERE state = 'succeeded'"
        await until(lambda: owner.fetchval(done, more))

    async with contextlib.AsyncExitStack() as survivors:
        for home in (mesh, replica):
            await survivors.enter_async_context(home.working({"count": handled.count}))
        dying = [home.working({"count": handled.count}) for home in (mesh, replica)]
        for each in dying:
            await each.__aenter__()
        await enqueue(mesh, *["count"] * 100)
        await some_done(20)
        for number, each in enumerate(dying):
            await each.__aexit__(None, None, None)
            await enqueue(mesh, *["count"] * 100)
            await some_done(120 + 100 * number)
        await replica.break_down()
        await enqueue(mesh, *["count"] * 100)
        # All of them, once the leases of the dead have lapsed.
        await some_done(400)
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert await owner.fetchval("SELECT count(*) FROM jobs WHERE state <> 'succeeded'") == 0
