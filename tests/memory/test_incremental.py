"""A run stores what moved; a dry run stores nothing and says what it would."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from server.memory.meditation_store import Meditation, MeditationStore
from server.memory.score_batches import MOVED
from tests.conftest import bearer
from tests.deciding import write_weights
from tests.memory.calls import Stub, create
from tests.memory.scoring_calls import scoring_stream
from tests.remembering import remember


async def meditate(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    caller: Caller,
    value: float,
    **kind: bool,
) -> Meditation:
    """Run a meditation whose scorer gives everything one score."""
    run = await meditations.start(caller, "", **kind)
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, size=2)
        await stream.score_all(value, echo_goals=True)
    return await meditations.get(caller, run.id)


async def everything(owner: asyncpg.Connection) -> list[Any]:
    """Return all that a run might change."""
    tables = ("memories", "memory_scores", "memory_versions", "memory_usage", "audit_events")
    return [
        tuple(row)
        for table in tables
        for row in await owner.fetch(f"SELECT * FROM {table} ORDER BY 1, 2, 3")
    ]


async def test_run_stores_only_scores_that_moved(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(5)))
    first = await meditate(scoring, meditations, caller, 0.5)
    assert (first.total, first.processed, first.scored, first.full_run) == (5, 5, 5, False)
    near = await meditate(scoring, meditations, caller, 0.5 + MOVED * 0.9)
    assert (near.processed, near.scored) == (5, 0)
    assert near.mean_score == pytest.approx(0.5 + MOVED * 0.9)
    moved = await meditate(scoring, meditations, caller, 0.5 + MOVED * 1.1)
    assert (moved.processed, moved.scored) == (5, 5)
    kept = await owner.fetch("SELECT DISTINCT score, scored_at FROM memory_scores")
    assert [row["scored_at"] for row in kept] == [moved.as_of]


async def test_full_run_stores_every_score(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "a", "b", "c")
    await meditate(scoring, meditations, caller, 0.5)
    again = await meditate(scoring, meditations, caller, 0.5, full_run=True)
    assert (again.processed, again.scored, again.full_run) == (3, 3, True)
    assert await owner.fetchval("SELECT min(scored_at) FROM memory_scores") == again.as_of


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE memory_scores SET score = NULL, scored_at = NULL",
        "UPDATE memory_scores SET scorer_version = 2",
        "UPDATE memory_scores SET sentiment = NULL",
        "UPDATE memory_scores SET goals_key = 7",
    ],
)
async def test_what_was_learned_is_stored_though_the_score_stays(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    change: str,
) -> None:
    await remember(database, caller, "changed", "as it was")
    await meditate(scoring, meditations, caller, 0.5)
    await owner.execute(
        f"{change} WHERE memory_id = (SELECT id FROM memories WHERE content = 'changed')"
    )
    run = await meditate(scoring, meditations, caller, 0.5)
    assert (run.processed, run.scored) == (2, 1)
    rows = await owner.fetch(
        "SELECT score, scorer_version, sentiment, goals_key FROM memory_scores"
    )
    assert [tuple(row) for row in rows] == [(0.5, 1, 0.25, None)] * 2


async def test_dry_run_tells_and_changes_nothing(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    for n in range(4):
        await create(memories, caller, f"text {n}")
    await write_weights(owner, caller, (0.4, 0.3, 0.2, 0.1))
    size = await owner.fetchval("SELECT sum(size_bytes) FROM memories")
    await owner.execute("UPDATE settings SET long_term_bytes = $1", size - 1)
    before = await everything(owner)
    told = await meditate(scoring, meditations, caller, 0.75, dry_run=True)
    after = await everything(owner)
    assert (told.dry_run, told.processed, told.scored, told.archived) == (True, 4, 4, 1)
    assert told.mean_score == 0.75
    # But for the event that it was asked for.
    assert len(after) == len(before) + 1
    assert [row for row in after if "meditation.start" not in row] == before
    assert not await owner.fetchval("SELECT count(*) FROM meditation_users")


async def test_dry_run_foretells_the_run_that_follows(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    for n in range(10):
        await create(memories, caller, f"text {n}")
    await write_weights(owner, caller, (0.4, 0.3, 0.2, 0.1))
    await owner.execute("UPDATE settings SET long_term_bytes = 30")
    told = await meditate(scoring, meditations, caller, 0.5, dry_run=True)
    done = await meditate(scoring, meditations, caller, 0.5)
    assert (told.processed, told.scored, told.archived, told.promoted, told.deleted) == (
        *(done.processed, done.scored, done.archived, done.promoted, done.deleted),
    )
    assert done.archived == 5


async def test_dry_run_and_run_go_on_beside_each_other(
    meditations: MeditationStore, caller: Caller, memories: Stub
) -> None:
    dry = await meditations.start(caller, "", dry_run=True)
    real = await meditations.start(caller, "")
    assert dry.id != real.id
    assert (await meditations.start(caller, "", dry_run=True)).id == dry.id
    assert (await meditations.start(caller, "")).id == real.id
    request = pb.ListMeditationsRequest(page_size=1)
    first = await memories.ListMeditations(request, metadata=bearer(caller))
    request.page_token = first.next_page_token
    second = await memories.ListMeditations(request, metadata=bearer(caller))
    assert [run.dry_run for page in (first, second) for run in page.meditations] == [False, True]
    assert not second.next_page_token


async def test_dry_run_begins_anew_after_a_crash(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(6)))
    run = await meditations.start(caller, "", dry_run=True)
    async with scoring_stream(scoring) as dying:
        await dying.open(run.id, size=2)
        await dying.answer(await dying.batch())
        await dying.batch()
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, token=2, size=2)
        assert sum(batch.size for batch in await stream.score_all()) == 6
    assert (await meditations.get(caller, run.id)).processed == 6
