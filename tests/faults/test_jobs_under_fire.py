"""Workers, the jobs service and Postgres are killed while jobs are done; zombies come back late."""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import psutil
import pytest
import pytest_asyncio

from local.fleet import Commands
from local.layout import CHECKOUT, Layout
from local.mesh import Mesh, in_background
from local.processes import State
from tests.faults.chaos import BACKEND
from tests.faults.conftest import COMMANDS, LEASE_SECONDS
from tests.faults.figures import Figures
from tests.faults.jobs import Tally, Work
from tests.faults.reach import as_superuser, until

KILLS = int(os.environ.get("KILLS", "20"))
JOBS = 10_000
ZOMBIES = 100
UNFENCED = 20
AT_ONCE = 10
"""Zombies that are stopped beside each other, a lease each."""
WORKERS = tuple(f"worker-{number}" for number in range(1, 5))
TARGETS = (*WORKERS, "jobs", "memory", "jobs-sidecar", "worker-1-sidecar", "postgres", BACKEND)
BACK_SECONDS = 60.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A durable mesh whose four workers do one kind of job."""
    with busy_mesh(COMMANDS.service) as running:
        yield running


@contextmanager
def busy_mesh(service: tuple[str, ...]) -> Iterator[Mesh]:
    commands = Commands(service=service, worker=(sys.executable, "-m", "tests.faults.busy_worker"))
    with TemporaryDirectory(prefix="kimberly-faults-") as state:
        Path(state).chmod(0o755)
        with in_background(
            # What is killed on purpose, and often, is to come back at once.
            Mesh(Layout(Path(state)), workers=4, commands=commands, longest_pause_seconds=0.2)
        ) as running:
            yield running


@pytest_asyncio.fixture(scope="module")
async def work(mesh: Mesh) -> Work:
    work = Work(mesh)
    await work.count()
    return work


async def pid_of(mesh: Mesh, target: str) -> int:
    if target != BACKEND:
        pid = mesh.process(target).pid
        assert pid is not None
        return pid
    async with as_superuser(mesh) as superuser:
        found: int = await superuser.fetchval(
            """
            SELECT pid FROM pg_stat_activity
             WHERE application_name LIKE 'jobs%' AND pid <> pg_backend_pid()
             ORDER BY random() LIMIT 1
            """
        )
    return found


async def kill(
    mesh: Mesh, work: Work, target: str, tasks: asyncio.TaskGroup
) -> tuple[float, asyncio.Task[float]]:
    """Kill something; return after how many seconds a new job is done, and all before it are.

    The latter is seen meanwhile: the next kill does not wait until the leases of the dead lapse.
    """
    process = mesh.process("postgres" if target == BACKEND else target)

    async def lives() -> bool:
        return process.state is State.READY and process.pid is not None

    await until(lives, BACK_SECONDS)
    pid, started = await pid_of(mesh, target), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until(work.makes_one, BACK_SECONDS)
    newest = await work.newest()
    service_seconds = await work.ends(newest, BACK_SECONDS) - started
    return service_seconds, tasks.create_task(ended(work, newest, started))


async def ended(work: Work, newest: UUID, started: float) -> float:
    """Return how many seconds after a moment a job and all before it had ended."""
    return await work.all_end(newest, BACK_SECONDS) - started


@pytest.mark.timeout(300 + 5 * KILLS)
async def test_every_job_is_done_and_settled_once_whatever_is_killed(
    mesh: Mesh, work: Work, figures: Figures
) -> None:
    chance = random.Random(figures.seed)
    targets = [TARGETS[number % len(TARGETS)] for number in range(KILLS)]
    chance.shuffle(targets)
    recoveries = []
    async with asyncio.TaskGroup() as tasks:
        for number, target in enumerate(targets):
            await work.make(JOBS * (number + 1) // KILLS - JOBS * number // KILLS)
            await asyncio.sleep(chance.uniform(0, 0.3))
            recoveries.append((target, *await kill(mesh, work, target, tasks)))
    for target, service_seconds, whole in recoveries:
        figures.inject(
            f"SIGKILL {target}, doing jobs",
            service_seconds=service_seconds,
            whole_seconds=whole.result(),
        )
    tally = await work.tally()
    figures.operations += tally.made
    figures.lost += tally.made - tally.done
    figures.duplicated += tally.settled_twice
    assert tally.made == tally.done
    assert tally.made >= JOBS + KILLS
    assert (tally.settled_twice, tally.by_old_lease) == (0, 0)
    figures.guards.append(f"jobs: {KILLS} kills over {JOBS} jobs, each settled once")


@pytest.mark.timeout(600)
async def test_zombies_settle_nothing_after_their_leases_have_passed_on(
    mesh: Mesh, work: Work, figures: Figures
) -> None:
    settled, refused, tally = await after_zombies(mesh, work, figures, ZOMBIES)
    assert (settled, refused) == (0, ZOMBIES)
    assert tally.made == tally.done
    assert (tally.settled_twice, tally.by_old_lease) == (0, 0)
    figures.guards.append(f"zombie settlements refused: {refused}/{ZOMBIES}")


@pytest.mark.timeout(300)
async def test_without_fencing_the_same_zombies_settle_what_others_have_done(
    figures: Figures,
) -> None:
    """The same mesh, the same zombies and the same count; only the comparison is not there."""
    unfenced = (*COMMANDS.service[:-1], "tests.faults.unfenced_service")
    with busy_mesh(unfenced) as mesh:
        work = Work(mesh)
        await work.count()
        settled, refused, tally = await after_zombies(mesh, work, figures, UNFENCED)
    assert (settled, refused) == (UNFENCED, 0)
    assert tally.settled_twice + tally.by_old_lease > 0
    figures.guards.append(
        f"zombie settlements, no fencing: {settled}/{UNFENCED} stand,"
        f" {tally.settled_twice} jobs settled twice, {tally.by_old_lease} by an old lease"
    )


async def after_zombies(
    mesh: Mesh, work: Work, figures: Figures, count: int
) -> tuple[int, int, Tally]:
    """Have so many workers stop with a lease in hand, and settle once it has passed on.

    Returns:
        How many of these settlements stand, how many were refused, and what became of all jobs.
    """
    told = []
    for _ in range(count // AT_ONCE):
        told += await asyncio.gather(*(zombie(mesh, work, figures) for _ in range(AT_ONCE)))
    await work.all_end(await work.newest(), BACK_SECONDS)
    settled, refused = (sum(each[how] for each in told) for how in ("settled", "lost"))
    return settled, refused, await work.tally()


async def zombie(mesh: Mesh, work: Work, figures: Figures) -> dict[str, int]:
    """Have a lease pass on while its worker is stopped; return what it was told afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.zombie_worker"),
        *(str(mesh.layout.outbound_socket(WORKERS[0])), "1"),
        stdout=asyncio.subprocess.PIPE,
        cwd=CHECKOUT,
    )
    assert process.stdout
    # Others take most of what there is: it gets its share in turns.
    feeding = asyncio.create_task(feed(work))
    assert await process.stdout.readline() == b"1\n"
    feeding.cancel()
    await until(lambda: is_stopped(process.pid), 10)
    await asyncio.sleep(1.5 * LEASE_SECONDS)
    os.kill(process.pid, signal.SIGCONT)
    told: dict[str, int] = json.loads(await process.stdout.readline())
    await process.wait()
    figures.inject("SIGSTOP past its lease")
    return told


async def is_stopped(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


async def feed(work: Work) -> None:
    while True:
        await work.make(50)
        await asyncio.sleep(0.2)
