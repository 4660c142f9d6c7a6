"""The stream that feeds scoring workers: what they get, and what is stored of what they find."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2
from kimberly.memory.v1 import memory_pb2_grpc as memory_rpc
from kimberly.scoring.v1 import scoring_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.errors import ConsentMissing, NotFound
from server.memory.import_store import Chunk, ImportStore
from server.memory.meditation_store import MeditationState, MeditationStore
from server.memory.model import Draft, Source, Tier
from server.memory.scoring_service import ScoringService
from server.memory.scoring_store import ScoringStore
from server.memory.store import MemoryStore
from tests.conftest import FakeClock, Serve, as_worker, bearer, data_keys_of, new_caller
from tests.refusals import refusal_of

SHARDS = 4


@pytest.fixture
def meditations(database: Database) -> MeditationStore:
    return MeditationStore(database)


@pytest.fixture
def scoring_store(system_database: SystemDatabase) -> ScoringStore:
    return ScoringStore(system_database, SHARDS)


@pytest_asyncio.fixture
async def scoring(serve: Serve, scoring_store: ScoringStore) -> rpc.ScoringServiceAsyncStub:
    service = ScoringService(scoring_store)
    channel = await serve(lambda server: rpc.add_ScoringServiceServicer_to_server(service, server))
    return rpc.ScoringServiceStub(channel)


class Stream:
    """A worker's end of a scoring stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def open(
        self, meditation_id: UUID, *, token: int = 1, shard: int = 0, window: int = 1, size: int = 2
    ) -> None:
        opening = pb.Open(
            meditation_id=ids.show(ids.MEDITATION, meditation_id),
            shard=shard,
            lease_token=token,
            window=window,
            batch_size=size,
        )
        await self.call.write(pb.ScoreRequest(open=opening))

    async def batch(self) -> pb.Batch:
        response = await self.call.read()
        assert isinstance(response, pb.ScoreResponse), response
        assert response.WhichOneof("message") == "batch"
        return response.batch

    async def answer(self, batch: pb.Batch, value: float = 0.5, **others: Any) -> None:
        scores = scores_of(batch, value)
        scores.MergeFrom(pb.Scores(**others))
        await self.call.write(pb.ScoreRequest(scores=scores))

    async def done(self) -> int:
        response = await self.call.read()
        assert isinstance(response, pb.ScoreResponse), response
        assert response.WhichOneof("message") == "done"
        assert not isinstance(await self.call.read(), pb.ScoreResponse)
        return response.done.scored

    async def score_all(self, value: float = 0.5) -> list[pb.Batch]:
        """Answer every batch until the shard is done."""
        batches: list[pb.Batch] = []
        while True:
            response = await self.call.read()
            assert isinstance(response, pb.ScoreResponse), response
            if response.WhichOneof("message") == "done":
                return batches
            batches.append(response.batch)
            await self.answer(response.batch, value)


def scores_of(batch: pb.Batch, value: float) -> pb.Scores:
    column = np.full(batch.size, value, "<f4").tobytes()
    sentiment = np.frombuffer(batch.sentiment, "<f4").copy()
    sentiment[np.frombuffer(batch.text_index, "<i4")] = 0.25
    return pb.Scores(
        sequence=batch.sequence,
        scorer_version=1,
        score=column,
        relevance_to_goals=column,
        emotional_weight=column,
        predictive_value=column,
        recency_frequency=column,
        sentiment=sentiment.tobytes(),
    )


@asynccontextmanager
async def scoring_stream(stub: rpc.ScoringServiceAsyncStub) -> AsyncIterator[Stream]:
    call = stub.Score(timeout=20, metadata=as_worker())  # type: ignore[call-arg]
    try:
        yield Stream(call)
    finally:
        call.cancel()


async def refusal_of_stream(stream: Stream) -> tuple[str, tuple[str, ...]]:
    async def hear_all() -> None:
        while isinstance(await stream.call.read(), pb.ScoreResponse):
            pass

    refusal = await refusal_of(hear_all())
    return refusal.reason, refusal.fields


async def remember(store: MemoryStore, caller: Caller, *texts: str) -> None:
    drafts = [Draft(Tier.LONG_TERM, text, (), Source.CHAT, "", None, "", None) for text in texts]
    await ImportStore(store._database, data_keys_of(store._database)).store(
        caller, Chunk(drafts), FakeClock()()
    )


async def choose(owner: asyncpg.Connection, caller: Caller, weights: tuple[float, ...]) -> None:
    await owner.execute(
        """
        INSERT INTO settings (tenant_id, user_id, language, scoring_preset, relevance_to_goals,
                              emotional_weight, predictive_value, recency_frequency, version)
        VALUES ($1, $2, 'english', 'custom', $3, $4, $5, $6, 1)
        """,
        caller.tenant_id,
        caller.user_id,
        *weights,
    )


async def scores(owner: asyncpg.Connection, caller: Caller) -> list[tuple[Any, ...]]:
    rows = await owner.fetch(
        """
        SELECT content, score, sentiment, scorer_version
          FROM memory_scores AS scores
          JOIN memories AS memory ON memory.user_id = scores.user_id AND memory.id = memory_id
         WHERE scores.user_id = $1
         ORDER BY memory.id
        """,
        caller.user_id,
    )
    return [tuple(row) for row in rows]


# --- runs


async def test_run_of_a_user_scores_everything_and_ends(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, *(f"text {n}" for n in range(5)))
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
    store: MemoryStore,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    callers = [await new_caller(database) for _ in range(12)]
    for caller in callers:
        await remember(store, caller, "one", "two", "three")
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


async def withdraw(database: Database, caller: Caller) -> None:
    async with database.transaction(caller) as connection:
        await connection.execute(
            """
            INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
            VALUES ($1, $2, 'memory.store', 2, false)
            """,
            caller.tenant_id,
            caller.user_id,
        )


async def test_memories_of_a_user_who_withdrew_are_not_sent(
    scoring_store: ScoringStore, store: MemoryStore, database: Database, caller: Caller
) -> None:
    await remember(store, caller, "secret")
    await withdraw(database, caller)
    meditation_id, shards = await scoring_store.plan_all(ids.new_id())
    for n in range(shards):
        shard = await scoring_store.open_shard(meditation_id, n, 1)
        assert await scoring_store.read(shard, shard.cursor, 10) is None


async def test_withdrawal_stops_a_batch_that_is_out(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, "secret")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
        await withdraw(database, caller)
        await stream.answer(batch)
        assert await stream.done() == 0
    assert await scores(owner, caller) == [("secret", None, None, None)]


# --- what a batch holds


async def test_batch_holds_what_is_known_of_each_memory(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, "a", "b")
    await owner.execute(
        """
        UPDATE memory_scores
           SET use_count = 7, retrieved_count = 5, useful_count = 3, feedback = 0.8,
               sentiment = 0.125
         WHERE memory_id = (SELECT id FROM memories WHERE content = 'b')
        """
    )
    run = await meditations.start(caller, "")
    await owner.execute(
        "UPDATE memory_scores SET last_seen_at = as_of - interval '36 h' FROM meditations"
    )
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
    nan = np.float32("nan")
    expected = {
        "days_since_last_seen": ("<f4", [1.5, 1.5]),
        "use_count": ("<i4", [0, 7]),
        "retrieved_count": ("<i4", [0, 5]),
        "useful_count": ("<i4", [0, 3]),
        "feedback": ("<f4", [nan, 0.8]),
        "sentiment": ("<f4", [nan, 0.125]),
        "goal_match": ("<f4", [nan, nan]),
        "weights": ("<f4", [0.4, 0.3, 0.2, 0.1] * 2),
        "text_index": ("<i4", [0]),
    }
    for name, (kind, values) in expected.items():
        np.testing.assert_array_equal(
            np.frombuffer(getattr(batch, name), kind), np.array(values, kind), name
        )
    assert list(batch.texts) == ["a"]
    assert batch.as_of_time.ToMicroseconds() == round(run.as_of.timestamp() * 1e6)


async def test_batch_holds_the_weights_of_each_memory_s_user(
    scoring: rpc.ScoringServiceAsyncStub,
    store: MemoryStore,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    callers = sorted([await new_caller(database) for _ in range(4)], key=lambda one: one.user_id)
    for caller in callers:
        await remember(store, caller, "a", "b")
    own = (0.0, 0.25, 0.25, 0.5)
    await choose(owner, callers[1], own)
    await choose(owner, callers[3], own[::-1])
    # Weights of the same user in another tenant are somebody else's.
    await choose(owner, Caller(ids.new_id(), callers[2].user_id), own)
    meditation_id, _ = await ScoringStore(system_database, shards=1).plan_all(ids.new_id())
    async with scoring_stream(scoring) as stream:
        await stream.open(meditation_id, size=100)
        batch = await stream.batch()
    usual = (0.4, 0.3, 0.2, 0.1)
    expected = np.repeat(np.array([usual, own, usual, own[::-1]], "<f4"), 2, axis=0)
    np.testing.assert_array_equal(np.frombuffer(batch.weights, "<f4").reshape(-1, 4), expected)


async def test_memory_seen_after_the_run_began_is_not_younger_than_nothing(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, "a")
    run = await meditations.start(caller, "")
    await owner.execute("UPDATE memory_scores SET last_seen_at = now() + interval '1 h'")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
    assert np.frombuffer(batch.days_since_last_seen, "<f4").tolist() == [0]


async def test_long_texts_make_short_batches(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
) -> None:
    await remember(store, caller, *(f"{n} " + "x" * 60_000 for n in range(40)))
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, size=65_536, window=2)
        batches = await stream.score_all()
    assert [batch.size for batch in batches] == [17, 17, 6]
    assert [text.split()[0] for batch in batches for text in batch.texts] == [
        str(n) for n in range(40)
    ]


async def test_no_more_batches_come_ahead_than_the_window(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
) -> None:
    await remember(store, caller, *(f"text {n}" for n in range(6)))
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, window=2)
        ahead = [await stream.batch(), await stream.batch()]
        await stream.answer(ahead[0])
        last = await stream.batch()
        assert [batch.sequence for batch in (*ahead, last)] == [1, 2, 3]
        await stream.answer(ahead[1])
        await stream.answer(last)
        assert await stream.done() == 6


# --- once, whatever crashes


async def test_interrupted_shard_goes_on_at_its_cursor(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, *(f"text {n}" for n in range(6)))
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as dying:
        await dying.open(run.id, window=1)
        await dying.answer(await dying.batch(), 0.25)
        # This batch was read and never answered; the one before is stored, or it had not come.
        await dying.batch()
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, token=2)
        batches = await stream.score_all(0.75)
    assert [batch.size for batch in batches] == [2, 2]
    assert [row[1] for row in await scores(owner, caller)] == [0.25] * 2 + [0.75] * 4
    assert (await meditations.get(caller, run.id)).scored == 6


async def test_scores_of_a_zombie_are_refused(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, "a", "b")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as zombie, scoring_stream(scoring) as stream:
        await zombie.open(run.id, token=1)
        late = await zombie.batch()
        await stream.open(run.id, token=2)
        batch = await stream.batch()
        await zombie.answer(late, 0.25)
        assert await refusal_of_stream(zombie) == ("LEASE_LOST", ())
        assert [row[1] for row in await scores(owner, caller)] == [None, None]
        await stream.answer(batch, 0.75)
        assert await stream.done() == 2
    assert [row[1] for row in await scores(owner, caller)] == [0.75, 0.75]


async def test_zombie_cannot_open_a_shard_again(
    scoring: rpc.ScoringServiceAsyncStub, meditations: MeditationStore, caller: Caller
) -> None:
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, token=5)
        await stream.done()
    async with scoring_stream(scoring) as zombie:
        await zombie.open(run.id, token=4)
        assert await refusal_of_stream(zombie) == ("LEASE_LOST", ())


async def test_batch_counts_once_when_two_streams_of_one_lease_answer_it(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
) -> None:
    await remember(store, caller, "a", "b", "c")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as first, scoring_stream(scoring) as second:
        await first.open(run.id)
        await second.open(run.id)
        same = [await first.batch(), await second.batch()]
        await first.answer(same[0])
        last = await first.batch()
        await second.answer(same[1])
        assert await refusal_of_stream(second) == ("LEASE_LOST", ())
        await first.answer(last)
        assert await first.done() == 3
    assert (await meditations.get(caller, run.id)).scored == 3


async def test_finished_shard_is_done_at_once(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
) -> None:
    await remember(store, caller, "a")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        await stream.score_all()
    async with scoring_stream(scoring) as again:
        await again.open(run.id, token=2)
        assert await again.done() == 1


# --- what changes meanwhile


async def test_memory_deleted_while_its_batch_is_out_stays_deleted(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    memories: memory_rpc.MemoryServiceAsyncStub,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    kept, removed = [
        (
            await memories.CreateMemory(
                memory_pb2.CreateMemoryRequest(memory=memory_pb2.Memory(content=text)),
                metadata=bearer(caller),
            )
        ).memory
        for text in ("kept", "removed")
    ]
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
        await memories.DeleteMemory(
            memory_pb2.DeleteMemoryRequest(id=removed.id), metadata=bearer(caller)
        )
        await stream.answer(batch)
        assert await stream.done() == 1
    assert [row[:2] for row in await scores(owner, caller)] == [(kept.content, 0.5)]
    assert (await meditations.get(caller, run.id)).mean_score == 0.5


async def test_sentiment_of_a_text_that_changed_meanwhile_is_not_stored(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    memories: memory_rpc.MemoryServiceAsyncStub,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    created = await memories.CreateMemory(
        memory_pb2.CreateMemoryRequest(memory=memory_pb2.Memory(content="before")),
        metadata=bearer(caller),
    )
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
        assert list(batch.texts) == ["before"]
        await memories.UpdateMemory(
            memory_pb2.UpdateMemoryRequest(
                memory=memory_pb2.Memory(id=created.memory.id, content="after"),
                update_mask=FieldMask(paths=["content"]),
            ),
            metadata=bearer(caller),
        )
        await stream.answer(batch)
        assert await stream.done() == 0
    assert await scores(owner, caller) == [("after", None, None, None)]


async def test_write_that_waited_for_a_change_of_the_text_sees_it(
    scoring_store: ScoringStore,
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(store, caller, "before")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
        change = owner.transaction()
        await change.start()
        await owner.execute("UPDATE memories SET content = 'after'")
        await owner.execute(
            "UPDATE memory_scores SET sentiment = NULL, text_version = text_version + 1"
        )
        await stream.answer(batch)
        async with asyncio.timeout(10):
            is_waiting = False
            while not is_waiting:
                is_waiting = await owner.fetchval("SELECT true FROM pg_locks WHERE NOT granted")
        await change.commit()
        assert await stream.done() == 0
    assert await scores(owner, caller) == [("after", None, None, None)]


# --- refusals


@pytest.mark.parametrize(
    ("others", "field"),
    [
        ({"sequence": 2}, "scores.sequence"),
        ({"score": b"\0" * 4}, "scores"),
        ({"score": b"\0" * 7}, "scores.score"),
        ({"score": np.array([0.5, 1.5], "<f4").tobytes()}, "scores"),
        ({"score": np.array([0.5, np.nan], "<f4").tobytes()}, "scores"),
        ({"relevance_to_goals": np.array([0.5, -0.5], "<f4").tobytes()}, "scores"),
        ({"sentiment": np.array([0.5, np.inf], "<f4").tobytes()}, "scores"),
    ],
)
async def test_scores_that_make_no_sense_are_refused(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    store: MemoryStore,
    caller: Caller,
    owner: asyncpg.Connection,
    others: dict[str, Any],
    field: str,
) -> None:
    await remember(store, caller, "a", "b")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        await stream.answer(await stream.batch(), **others)
        assert await refusal_of_stream(stream) == ("FIELD_INVALID", (field,))
    assert [row[1] for row in await scores(owner, caller)] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"token": 0}, "open.lease_token"),
        ({"window": 0}, "open.window"),
        ({"window": 17}, "open.window"),
        ({"size": 0}, "open.batch_size"),
        ({"size": 65_537}, "open.batch_size"),
    ],
)
async def test_opening_that_makes_no_sense_is_refused(
    scoring: rpc.ScoringServiceAsyncStub, arguments: dict[str, int], field: str
) -> None:
    async with scoring_stream(scoring) as stream:
        await stream.open(ids.new_id(), **arguments)
        assert await refusal_of_stream(stream) == ("FIELD_INVALID", (field,))


async def test_shard_that_is_none_is_not_found(
    scoring: rpc.ScoringServiceAsyncStub, meditations: MeditationStore, caller: Caller
) -> None:
    run = await meditations.start(caller, "")
    for meditation_id, shard in ((run.id, 1), (run.id, -1), (ids.new_id(), 0)):
        async with scoring_stream(scoring) as stream:
            await stream.open(meditation_id, shard=shard)
            assert await refusal_of_stream(stream) == ("RESOURCE_NOT_FOUND", ())


async def test_users_may_not_score(scoring: rpc.ScoringServiceAsyncStub, caller: Caller) -> None:
    refusal = await refusal_of(
        scoring.PlanMeditation(
            pb.PlanMeditationRequest(job_id=ids.show(ids.JOB, ids.new_id())),
            metadata=bearer(caller),
        )
    )
    assert refusal.code == grpc.StatusCode.PERMISSION_DENIED
