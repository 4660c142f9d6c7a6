"""A worker that is stopped past its lease and then goes on: nothing that it does late counts."""

import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from local.mesh import Mesh
from tests.faults.chaos import scoring_worker
from tests.faults.conftest import LEASE_SECONDS
from tests.faults.figures import Figures
from tests.faults.meditations import SIZE, Library, Scores
from tests.faults.reach import until

ZOMBIES = 2
RUN_SECONDS = 90.0


@asynccontextmanager
async def asleep(mesh: Mesh, name: str) -> AsyncIterator[Callable[[], float]]:
    """Stop a process until the context ends; yields how long that was so far."""
    pid = mesh.process(name).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        yield lambda: time.monotonic() - stopped_at
    finally:
        os.kill(pid, signal.SIGCONT)
    assert mesh.process(name).pid == pid


class Lines:
    """What a log got since this was made."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._start = log.stat().st_size

    def events(self) -> list[dict[str, object]]:
        with self._log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


async def refusals(logs: Sequence[Lines]) -> list[str]:
    """Return where a zombie was refused, or noticed by itself that its lease is lost."""
    return [
        f"{event['service']}: {event['event']} {event.get('reason', '')}".strip()
        for log in logs
        for event in log.events()
        if event.get("reason") == "LEASE_LOST" or event["event"] in {"leases lost", "leases lapsed"}
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stopped", ["worker", "worker-sidecar"])
async def test_zombie_writes_nothing_after_another_has_taken_over(
    mesh: Mesh, library: Library, undisturbed: Scores, figures: Figures, stopped: str
) -> None:
    """A stopped worker sees its lapsed lease itself; behind a stopped sidecar it works on."""
    for _ in range(ZOMBIES):
        await library.forget_scores()
        run = await library.meditate()
        await library.reaches(run, SIZE // 5)
        name = await until(partial(scoring_worker, mesh, run), 10)
        logs = [Lines(mesh.layout.logs / f"{log}.log") for log in ("memory", name)]
        async with asleep(mesh, stopped.replace("worker", name)) as seconds:
            first = await library.place(run)
            taken = await library.moves_on(run, first.scored, beyond_fence=first.fence)
            figures.inject(f"SIGSTOP {stopped} past its lease", service_seconds=seconds())
        assert 0 < first.scored < taken.scored < SIZE, "the zombie was not late"
        done = await library.ends(run, RUN_SECONDS)
        noticed = await until(partial(refusals, logs), 2 * LEASE_SECONDS)
        assert done.scored == SIZE
        assert set(await library.times_scored()) == {1}
        assert await library.scores() == undisturbed
        assert (await library.place(run)).fence == taken.fence
        figures.scores += SIZE
        figures.guards.append(f"zombie, stopped {stopped}: {', '.join(noticed)}")
