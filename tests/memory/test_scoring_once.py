"""Every memory is scored once, whatever crashes and whatever changes meanwhile."""

from __future__ import annotations

import asyncio

import asyncpg
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2
from kimberly.memory.v1 import memory_pb2_grpc as memory_rpc
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from server.memory.meditation_store import MeditationStore
from server.memory.scoring_store import ScoringStore
from tests.conftest import bearer
from tests.memory.scoring_calls import (
    refusal_of_stream,
    scores,
    scoring_stream,
)
from tests.remembering import remember


async def test_interrupted_shard_goes_on_at_its_cursor(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(6)))
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
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "a", "b")
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
    database: Database,
    caller: Caller,
) -> None:
    await remember(database, caller, "a", "b", "c")
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
    database: Database,
    caller: Caller,
) -> None:
    await remember(database, caller, "a")
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
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "before")
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
        async with asyncio.timeout(30):
            is_waiting = False
            while not is_waiting:
                is_waiting = await owner.fetchval("SELECT true FROM pg_locks WHERE NOT granted")
        await change.commit()
        assert await stream.done() == 0
    assert await scores(owner, caller) == [("after", None, None, None)]
