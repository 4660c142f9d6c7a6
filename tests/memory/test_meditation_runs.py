"""Runs of one user and of all: begun, cut into shards, ended."""

from __future__ import annotations

import asyncio
from uuid import UUID

import asyncpg
import pytest
from kimberly.scoring.v1 import scoring_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database
from server.errors import ConsentMissing, NotFound
from server.memory.meditation_store import MeditationState, MeditationStore
from server.memory.scoring_store import ScoringStore
from tests.conftest import as_worker, new_caller
from tests.deciding import withdraw
from tests.memory.scoring_calls import (
    SHARDS,
    scores,
    scoring_stream,
)
from tests.remembering import remember


async def test_run_of_a_user_scores_everything_and_ends(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(5)))
    run = await meditations.start(caller, "")
    assert (run.state, run.shards, run.scored) == (MeditationState.RUNNING, 1, 0)
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batches = await stream.score_all(0.75)
    assert [batch.size for batch in batches] == [2, 2, 1]
    assert await scores(owner, caller) == [(f"text {n}", 0.75, 0.25, 1) for n in range(5)]
    run = await meditations.get(caller, run.id)
    assert (run.state, run.shards_done, run.scored) == (MeditationState.SUCCEEDED, 1, 5)
    assert (run.mean_score, run.scorer_version) == (0.75, 1)
    assert run.finished_at is not None
    assert run.duration == run.finished_at - run.created_at


async def test_run_of_a_user_without_memories_ends(
    scoring: rpc.ScoringServiceAsyncStub, meditations: MeditationStore, caller: Caller
) -> None:
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        assert await stream.done() == 0
    run = await meditations.get(caller, run.id)
    assert (run.state, run.mean_score) == (MeditationState.SUCCEEDED, None)


async def test_start_enqueues_one_job_and_writes_one_audit_event(
    meditations: MeditationStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    run = await meditations.start(caller, "r1")
    assert (await meditations.start(caller, "r1")).id == run.id
    assert (await meditations.start(caller, "r2")).id == run.id
    jobs = await owner.fetch("SELECT kind, user_id, payload FROM jobs")
    name = ids.show(ids.MEDITATION, run.id)
    assert [tuple(job) for job in jobs] == [
        ("meditation.shard", caller.user_id, f'{{"shard": 0, "meditation_id": "{name}"}}')
    ]
    events = await owner.fetch("SELECT action, resource FROM audit_events")
    assert [tuple(event) for event in events] == [("meditation.start", name)]


async def test_request_id_returns_its_run_after_the_run_has_ended(
    scoring: rpc.ScoringServiceAsyncStub, meditations: MeditationStore, caller: Caller
) -> None:
    run = await meditations.start(caller, "r1")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        await stream.done()
    assert (await meditations.start(caller, "r1")).id == run.id
    assert (await meditations.start(caller, "r2")).id != run.id


async def test_concurrent_starts_make_one_run(
    meditations: MeditationStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    start = asyncio.Barrier(8)

    async def attempt(n: int) -> UUID:
        await start.wait()
        return (await meditations.start(caller, f"r{n}")).id

    assert len(set(await asyncio.gather(*(attempt(n) for n in range(8))))) == 1
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 1


async def test_starting_again_revives_a_shard_whose_job_was_given_up(
    meditations: MeditationStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    run = await meditations.start(caller, "")
    await owner.execute("UPDATE jobs SET state = 'dead', finished_at = now()")
    assert (await meditations.start(caller, "")).id == run.id
    assert await owner.fetchval("SELECT count(*) FROM jobs WHERE state = 'waiting'") == 1


async def test_meditation_needs_consent(
    meditations: MeditationStore, database: Database, owner: asyncpg.Connection
) -> None:
    with pytest.raises(ConsentMissing):
        await meditations.start(await new_caller(database, consenting=False), "")
    assert await owner.fetchval("SELECT count(*) FROM meditations") == 0


async def test_run_of_another_looks_like_none(
    meditations: MeditationStore, scoring_store: ScoringStore, database: Database, caller: Caller
) -> None:
    theirs = (await meditations.start(await new_caller(database), "")).id
    of_all, _ = await scoring_store.plan_all(ids.new_id())
    for meditation_id in (theirs, of_all, ids.new_id()):
        with pytest.raises(NotFound, match="no such meditation"):
            await meditations.get(caller, meditation_id)


async def test_application_role_cannot_move_a_run(
    meditations: MeditationStore, database: Database, caller: Caller
) -> None:
    await meditations.start(caller, "")
    for statement in (
        "UPDATE meditation_shards SET done = true",
        "UPDATE meditations SET state = 'succeeded', finished_at = now()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with database.transaction(caller) as connection:
                await connection.execute(statement)


# --- all users


async def test_run_of_all_users_scores_each_memory_in_one_shard(
    scoring: rpc.ScoringServiceAsyncStub,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    callers = [await new_caller(database) for _ in range(12)]
    for caller in callers:
        await remember(database, caller, "one", "two", "three")
    plan = await scoring.PlanMeditation(
        pb.PlanMeditationRequest(job_id=ids.show(ids.JOB, ids.new_id())), metadata=as_worker()
    )
    assert plan.shards == SHARDS
    meditation_id = ids.parse(ids.MEDITATION, plan.meditation_id, "id")
    sizes = []
    for shard in range(SHARDS):
        async with scoring_stream(scoring) as stream:
            await stream.open(meditation_id, shard=shard, size=5)
            sizes.append(sum(batch.size for batch in await stream.score_all()))
    assert sum(sizes) == 36
    assert sum(size > 0 for size in sizes) > 1
    assert await owner.fetchval("SELECT count(*) FROM memory_scores WHERE score = 0.5") == 36
    assert await owner.fetchval("SELECT state FROM meditations") == "succeeded"


async def test_last_shards_that_end_at_once_end_the_run(
    scoring_store: ScoringStore, owner: asyncpg.Connection
) -> None:
    meditation_id, shards = await scoring_store.plan_all(ids.new_id())
    opened = [await scoring_store.open_shard(meditation_id, n, 1) for n in range(shards)]
    start = asyncio.Barrier(shards)

    async def finish(n: int) -> None:
        await start.wait()
        await scoring_store.finish(opened[n], opened[n].cursor)

    await asyncio.gather(*(finish(n) for n in range(shards)))
    assert await owner.fetchval("SELECT state FROM meditations") == "succeeded"


async def test_planning_again_under_the_same_job_returns_the_same_run(
    scoring_store: ScoringStore, owner: asyncpg.Connection
) -> None:
    job_id = ids.new_id()
    first = await scoring_store.plan_all(job_id)
    await owner.execute("UPDATE meditations SET state = 'succeeded', finished_at = now()")
    assert await scoring_store.plan_all(job_id) == first
    assert await scoring_store.plan_all(ids.new_id()) != first
    assert await owner.fetchval("SELECT count(*) FROM meditations") == 2


async def test_concurrent_plans_make_one_run(
    scoring_store: ScoringStore, owner: asyncpg.Connection
) -> None:
    start = asyncio.Barrier(4)

    async def plan() -> tuple[UUID, int]:
        await start.wait()
        return await scoring_store.plan_all(ids.new_id())

    assert len(set(await asyncio.gather(*(plan() for _ in range(4))))) == 1
    assert await owner.fetchval("SELECT count(*) FROM jobs") == SHARDS


async def test_memories_of_a_user_who_withdrew_are_not_sent(
    scoring_store: ScoringStore, database: Database, caller: Caller
) -> None:
    await remember(database, caller, "secret")
    await withdraw(database, caller)
    meditation_id, shards = await scoring_store.plan_all(ids.new_id())
    for n in range(shards):
        shard = await scoring_store.open_shard(meditation_id, n, 1)
        assert await scoring_store.read(shard, shard.cursor, 10) is None


async def test_withdrawal_stops_a_batch_that_is_out(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "secret")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
        await withdraw(database, caller)
        await stream.answer(batch)
        assert await stream.done() == 0
    assert await scores(owner, caller) == [("secret", None, None, None)]
