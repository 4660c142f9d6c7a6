"""SIGKILL in the middle of a meditation: it ends, and every memory is scored once, as ever."""

import os
import signal
import time
from uuid import UUID

import pytest

from local.mesh import Mesh
from tests.faults.chaos import scoring_worker
from tests.faults.figures import Figures
from tests.faults.meditations import SIZE, Library, Scores
from tests.faults.reach import until
from tests.faults.small_batches import BATCH_SIZE
from workers.meditation import WINDOW

RUN_SECONDS = 90.0
TRIES = 3
"""A run that ended before its kill is run again."""


async def victim(mesh: Mesh, kind: str, run: UUID) -> int:
    """Return the process to kill; of the workers the one that scores."""
    name = await until(lambda: scoring_worker(mesh, run), 10) if kind == "worker" else kind
    pid = mesh.process(name).pid
    assert pid is not None, f"{name} does not run"
    return pid


async def run_under_fire(
    mesh: Mesh, library: Library, figures: Figures, kinds: tuple[str, ...]
) -> tuple[UUID, bool]:
    """Run once; return the run, and whether every kill hit it between beginning and end."""
    await library.forget_scores()
    run = await library.meditate()
    for number, kind in enumerate(kinds, start=1):
        before = await library.reaches(run, SIZE * number // (len(kinds) + 2))
        os.kill(await victim(mesh, kind, run), signal.SIGKILL)
        killed_at = time.monotonic()
        after = await library.place(run)
        if not (0 < before.scored <= after.scored < SIZE and not after.done):
            return run, False
        # What the dead had sent may still be stored: only more than that is a recovery.
        await library.moves_on(run, after.scored + WINDOW * BATCH_SIZE)
        figures.inject(f"SIGKILL {kind}, scoring", service_seconds=time.monotonic() - killed_at)
    return run, True


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kinds",
    [
        ("worker",),
        ("memory",),
        ("memory-sidecar",),
        ("postgres",),
        ("memory", "worker", "postgres", "memory-sidecar"),
    ],
    ids="-then-".join,
)
async def test_killed_meditation_ends_and_scores_every_memory_once(
    mesh: Mesh,
    library: Library,
    undisturbed: Scores,
    figures: Figures,
    kinds: tuple[str, ...],
) -> None:
    for _ in range(TRIES):
        run, was_hit = await run_under_fire(mesh, library, figures, kinds)
        done = await library.ends(run, RUN_SECONDS)
        if was_hit:
            break
    else:
        pytest.fail(f"no kill hit the run in {TRIES} tries")
    assert done.scored == SIZE
    times = await library.times_scored()
    figures.scores += len(times)
    figures.lost += sum(each == 0 for each in times)
    figures.duplicated += sum(each > 1 for each in times)
    assert (len(times), set(times)) == (SIZE, {1})
    # To the bit, the instant of scoring included: all runs have the same `as_of`.
    assert await library.scores() == undisturbed
    # A worker that lives goes on where it was; only a dead one costs an attempt.
    assert await until(lambda: library.attempts(run), 20) == 1 + kinds.count("worker")
