"""How tests of scoring call, and look at what became of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
from kimberly.scoring.v1 import scoring_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from tests.conftest import as_worker
from tests.refusals import refusal_of

SHARDS = 4
"""Of runs of all users."""


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

    async def score_all(self, value: float = 0.5, *, echo_goals: bool = False) -> list[pb.Batch]:
        """Answer every batch until the shard is done.

        Args:
            value: Every score, and every part of it.
            echo_goals: Say of relevance to goals what the batch does, as the scorer would.
        """
        batches: list[pb.Batch] = []
        while True:
            response = await self.call.read()
            assert isinstance(response, pb.ScoreResponse), response
            if response.WhichOneof("message") == "done":
                return batches
            batch = response.batch
            batches.append(batch)
            match = np.nan_to_num(np.frombuffer(batch.goal_match, "<f4"), nan=0.5)
            others = {"relevance_to_goals": match.tobytes()} if echo_goals else {}
            await self.answer(batch, value, **others)


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
