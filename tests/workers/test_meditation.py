"""Meditation from end to end: queue, worker stream, scoring stream, Postgres."""

from __future__ import annotations

import asyncio
import json
import math
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import numpy as np
import pytest

from server import ids
from server.caller import Caller
from server.database import Database
from server.enqueue import enqueue
from server.memory.meditation_store import Meditation as Run
from server.memory.meditation_store import MeditationState, MeditationStore
from server.memory.scoring_store import ScoringStore
from server.preferences import PRESETS, USUAL_WEIGHTS
from tests.conftest import as_worker, new_caller
from tests.deciding import write_weights
from tests.remembering import remember
from tests.workers.conftest import Mesh, let_lapse, meditating, until
from tests.workers.test_scoring import Memory, reference
from workers.meditation import Meditation
from workers.sentiment import sentiments
from workers.stream import Task


async def chooses(
    owner: asyncpg.Connection, caller: Caller, preset: str, weights: tuple[float, ...]
) -> Caller:
    """Choose scoring weights, past the user service."""
    await write_weights(owner, caller, weights, preset)
    return caller


async def finished(meditations: MeditationStore, caller: Caller, run_id: UUID) -> Run:
    """Return a run when it has ended."""
    async with asyncio.timeout(60):
        while True:
            run = await meditations.get(caller, run_id)
            if run.state is MeditationState.SUCCEEDED:
                return run


@pytest.fixture
def meditations(database: Database) -> MeditationStore:
    return MeditationStore(database)


async def test_run_that_a_user_asked_for_scores_their_memories(
    mesh: Mesh,
    database: Database,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    texts = ["I love this wonderful city!", "The train leaves at nine.", "I hate this disaster."]
    await remember(database, caller, *texts)
    await owner.execute("UPDATE memory_scores SET last_seen_at = now(), use_count = 5")
    async with mesh.working(meditating(batch_size=2)) as (worker, running):
        run = await meditations.start(caller, "")
        run = await finished(meditations, caller, run.id)
        worker.drain()
        await running
    assert (run.scored, run.scorer_version) == (3, 1)
    rows = await owner.fetch("SELECT score, sentiment FROM memory_scores ORDER BY memory_id")
    expected = [
        0.4 * 0.5 + 0.3 * float(felt) + 0.2 * 0.5 + 0.1 * (1 + 0.5) / 2
        for felt in sentiments(texts)
    ]
    assert [row["sentiment"] for row in rows] == [float(felt) for felt in sentiments(texts)]
    # The age of some milliseconds moves the score in its sixth place.
    assert np.allclose([row["score"] for row in rows], expected, rtol=0, atol=1e-5)
    assert run.mean_score is not None
    assert math.isclose(run.mean_score, sum(row["score"] for row in rows) / 3, rel_tol=1e-6)
    result = await owner.fetchval("SELECT result FROM jobs")
    assert json.loads(result) == {"scored": 3, "processed": 3, "archived": 0}


async def test_every_user_is_scored_by_their_own_weights(
    mesh: Mesh, database: Database, owner: asyncpg.Connection
) -> None:
    chosen = {
        await chooses(owner, await new_caller(database), preset, weights): weights
        for preset, weights in [
            ("custom", (0.1, 0.2, 0.3, 0.4)),
            ("custom", (0.0, 0.0, 1.0, 0.0)),
            *((preset.value, weights) for preset, weights in PRESETS.items()),
        ]
    }
    stranger = await new_caller(database)
    for caller in (*chosen, stranger):
        await remember(database, caller, "I love this!", "It rains.", "I hate this.")
    await owner.execute(
        """
        UPDATE memory_scores
           SET last_seen_at = '2029-12-01'::timestamptz - random() * '30 d'::interval,
               use_count = random() * 10, retrieved_count = 5, useful_count = random() * 5
        """
    )
    meditation_id, _ = await ScoringStore(mesh.database, shards=3).plan_all(ids.new_id())
    await owner.execute("UPDATE meditations SET as_of = '2030-01-01'")
    # Batches of 5 memories end in the middle of users, who have 3.
    async with mesh.working(meditating(batch_size=5)):
        await until(
            lambda: owner.fetchval(
                "SELECT state = 'succeeded' FROM meditations WHERE id = $1", meditation_id
            )
        )
    rows = await owner.fetch(
        """
        SELECT extract(epoch FROM '2030-01-01'::timestamptz - last_seen_at)::float8 / 86400 AS days,
               use_count, retrieved_count, useful_count, sentiment, score, user_id
          FROM memory_scores
        """
    )
    weights_of = {caller.user_id: weights for caller, weights in chosen.items()}
    for row in rows:
        memory = Memory(
            days=row["days"],
            use_count=row["use_count"],
            retrieved=row["retrieved_count"],
            useful=row["useful_count"],
            feedback=math.nan,
            sentiment=row["sentiment"],
            goal_match=math.nan,
            weights=weights_of.get(row["user_id"], USUAL_WEIGHTS),
        )
        assert row["score"] == pytest.approx(reference(memory)[0], abs=1e-6)
    assert len(rows) == 3 * (len(chosen) + 1)


async def test_nightly_run_scores_everybody(
    mesh: Mesh, database: Database, owner: asyncpg.Connection
) -> None:
    for n in range(10):
        await remember(database, await new_caller(database), *(f"text {n}" for n in range(n + 1)))
    async with mesh.database.transaction() as connection:
        await enqueue(connection, kind="meditation.plan", payload={})
    async with mesh.working(meditating(batch_size=4)) as (worker, running):
        await until(
            lambda: owner.fetchval("SELECT true FROM meditations WHERE state = 'succeeded'")
        )
        worker.drain()
        await running
    assert await owner.fetchval("SELECT count(*) FROM memory_scores WHERE score > 0") == 55
    assert await owner.fetchval("SELECT sum(scored) FROM meditation_shards") == 55
    assert await owner.fetchval("SELECT count(*) FROM jobs WHERE state <> 'succeeded'") == 0


async def test_killed_worker_leaves_a_shard_that_another_resumes(
    mesh: Mesh,
    database: Database,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(200)))
    run = await meditations.start(caller, "")
    async with mesh.working(meditating(batch_size=1)):
        await until(lambda: owner.fetchval("SELECT scored FROM meditation_shards"))
    scored = await owner.fetchval("SELECT scored FROM meditation_shards")
    assert 0 < scored < 200
    await let_lapse(owner)
    async with mesh.working(meditating(batch_size=50)):
        run = await finished(meditations, caller, run.id)
    assert run.scored == 200
    assert await owner.fetchval("SELECT count(*) FROM memory_scores WHERE score > 0") == 200


async def test_scoring_goes_on_when_the_service_comes_back(
    mesh: Mesh,
    database: Database,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(200)))
    run = await meditations.start(caller, "")
    async with mesh.working(meditating(batch_size=1)):
        await until(lambda: owner.fetchval("SELECT scored FROM meditation_shards"))
        await mesh.break_down()
        await mesh.start()
        run = await finished(meditations, caller, run.id)
    assert run.scored == 200


async def test_zombie_fails_and_stores_nothing(
    mesh: Mesh,
    database: Database,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "a")
    run = await meditations.start(caller, "")
    await owner.execute("UPDATE meditation_shards SET fence = 1000")
    async with mesh.channel() as channel:
        meditation = Meditation(channel, metadata=as_worker())
        payload = {"meditation_id": f"med_{run.id.hex}", "shard": 0}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await meditation.score_shard(Task("job_0", 999, "meditation.shard", payload, 1))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert await owner.fetchval("SELECT score FROM memory_scores") is None


async def test_same_inputs_give_bit_equal_scores_on_any_number_of_workers(
    mesh: Mesh, database: Database, owner: asyncpg.Connection
) -> None:
    for _ in range(6):
        await remember(database, await new_caller(database), *(f"good text {n}" for n in range(7)))
    await owner.execute(
        "UPDATE memory_scores SET last_seen_at = now() - random() * '90 d'::interval"
    )
    found: list[list[Any]] = []
    for size in (1, 5):
        await ScoringStore(mesh.database, shards=3).plan_all(ids.new_id(), full_run=True)
        await owner.execute("UPDATE meditations SET as_of = '2030-01-01'")
        async with mesh.working(meditating(size)), mesh.working(meditating(size + 1)):
            await until(
                lambda: owner.fetchval("SELECT bool_and(state = 'succeeded') FROM meditations")
            )
        rows = await owner.fetch(
            """
            SELECT memory_id, score, sentiment, recency_frequency, scored_at
              FROM memory_scores
             ORDER BY memory_id
            """
        )
        found.append([tuple(row) for row in rows])
    assert len(found[0]) == 42
    assert found[0] == found[1]


async def test_scores_after_a_crash_are_bit_equal_to_those_of_an_undisturbed_run(
    mesh: Mesh, database: Database, owner: asyncpg.Connection
) -> None:
    for _ in range(6):
        await remember(database, await new_caller(database), *(f"bad text {n}" for n in range(20)))
    await owner.execute(
        "UPDATE memory_scores SET last_seen_at = now() - random() * '90 d'::interval"
    )
    found: list[list[Any]] = []
    for is_killed in (False, True):
        await ScoringStore(mesh.database, shards=3).plan_all(ids.new_id(), full_run=True)
        await owner.execute("UPDATE meditations SET as_of = '2030-01-01'")
        if is_killed:
            begun = """
                SELECT sum(scored) > 3
                  FROM meditation_shards
                  JOIN meditations ON id = meditation_id AND state = 'running'
            """
            async with mesh.working(meditating(batch_size=1)):
                await until(partial(owner.fetchval, begun))
            await let_lapse(owner)
        async with mesh.working(meditating(batch_size=7)):
            await until(
                lambda: owner.fetchval("SELECT bool_and(state = 'succeeded') FROM meditations")
            )
        rows = await owner.fetch(
            """
            SELECT memory_id, score, relevance_to_goals, emotional_weight, predictive_value,
                   recency_frequency, sentiment, scored_at
              FROM memory_scores
             ORDER BY memory_id
            """
        )
        found.append([tuple(row) for row in rows])
    assert found[0] == found[1]
    assert await owner.fetchval("SELECT sum(scored) FROM meditation_shards") == 240
