"""What a batch tells scoring workers of each memory."""

from __future__ import annotations

import asyncpg
import numpy as np
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.meditation_store import MeditationStore
from server.memory.scoring_store import ScoringStore
from tests.conftest import new_caller
from tests.deciding import write_weights
from tests.memory.scoring_calls import (
    scoring_stream,
)
from tests.remembering import remember


async def test_batch_holds_what_is_known_of_each_memory(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "a", "b")
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
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    callers = sorted([await new_caller(database) for _ in range(4)], key=lambda one: one.user_id)
    for caller in callers:
        await remember(database, caller, "a", "b")
    own = (0.0, 0.25, 0.25, 0.5)
    await write_weights(owner, callers[1], own)
    await write_weights(owner, callers[3], own[::-1])
    # Weights of the same user in another tenant are somebody else's.
    await write_weights(owner, Caller(ids.new_id(), callers[2].user_id), own)
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
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, caller, "a")
    run = await meditations.start(caller, "")
    await owner.execute("UPDATE memory_scores SET last_seen_at = now() + interval '1 h'")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        batch = await stream.batch()
    assert np.frombuffer(batch.days_since_last_seen, "<f4").tolist() == [0]


async def test_long_texts_make_short_batches(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
) -> None:
    await remember(database, caller, *(f"{n} " + "x" * 60_000 for n in range(40)))
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
    database: Database,
    caller: Caller,
) -> None:
    await remember(database, caller, *(f"text {n}" for n in range(6)))
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
