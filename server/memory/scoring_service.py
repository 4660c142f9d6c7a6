"""Serves kimberly.scoring.v1.ScoringService: feeds scoring workers, stores what they find."""

from collections import deque
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.scoring.v1 import scoring_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids, tracing
from server.errors import InvalidArgument
from server.memory.columns import Floats, ScoreColumns
from server.memory.score_batches import Batch
from server.memory.scoring_store import ScoringStore
from server.memory.shards import Cursor, Shard
from server.memory.tallies import Tally
from server.memory.tidying import Tidying

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LARGEST_WINDOW = 16
_LARGEST_BATCH = 65_536


class ScoringService(rpc.ScoringServiceServicer):
    """Serves scoring workers."""

    def __init__(self, store: ScoringStore, tidying: Tidying) -> None:
        self._store = store
        self._tidying = tidying

    async def PlanMeditation(
        self, request: pb.PlanMeditationRequest, context: Context
    ) -> pb.PlanMeditationResponse:
        job_id = ids.parse(ids.JOB, request.job_id, "job_id")
        meditation_id, shards = await self._store.plan_all(job_id, full_run=request.full)
        return pb.PlanMeditationResponse(
            meditation_id=ids.show(ids.MEDITATION, meditation_id), shards=shards
        )

    async def Score(
        self, request_iterator: AsyncIterator[pb.ScoreRequest], context: Context
    ) -> AsyncIterator[pb.ScoreResponse]:
        opening = _checked(await _next(request_iterator, "open"))
        shard = await self._open(opening)
        tally = Tally() if shard.dry_run else None
        ahead: deque[Batch] = deque()
        read_to = stored_to = shard.cursor
        sequence, more = 0, not shard.done
        while more or ahead:
            while more and len(ahead) < opening.window:
                batch = await self._store.read(shard, read_to, opening.batch_size)
                if batch is None:
                    more = False
                    break
                ahead.append(batch)
                read_to = batch.end
                sequence += 1
                yield pb.ScoreResponse(batch=batch_to(batch, shard, sequence))
            if ahead:
                answer = await _next(request_iterator, "scores")
                scores = _scores(answer.scores, sequence - len(ahead) + 1, ahead[0])
                batch = ahead.popleft()
                if tally is not None:
                    tally.add(batch, scores, full_run=shard.full_run)
                else:
                    with tracing.span("store batch", {"kimberly.memories": len(batch.rows)}):
                        await self._store.apply(shard, batch, scores)
                    stored_to = batch.end
        yield pb.ScoreResponse(done=_done(await self._finish(shard, stored_to, tally)))

    async def _finish(self, shard: Shard, cursor: Cursor, tally: Tally | None) -> Shard:
        """Tidy up after a shard is scored, and return it with what was done."""
        if shard.done:
            return shard
        if tally is None:
            await self._tidying.tidy(shard)
        else:
            await self._tidying.foretell(shard, tally)
        return await self._store.finish(shard, cursor, tally)

    async def _open(self, opening: pb.Open) -> Shard:
        meditation_id = ids.parse(ids.MEDITATION, opening.meditation_id, "open.meditation_id")
        return await self._store.open_shard(meditation_id, opening.shard, opening.lease_token)


def batch_to(batch: Batch, shard: Shard, sequence: int) -> pb.Batch:
    """Return a batch as the contract has it: arrays of little-endian numbers."""
    rows = batch.rows
    as_of_time = Timestamp()
    as_of_time.FromDatetime(shard.as_of)
    return pb.Batch(
        sequence=sequence,
        size=len(rows),
        as_of_time=as_of_time,
        days_since_last_seen=rows.days_since_last_seen(shard.as_of).astype("<f4").tobytes(),
        use_count=rows.column("use_count", "<i4").tobytes(),
        retrieved_count=rows.column("retrieved_count", "<i4").tobytes(),
        useful_count=rows.column("useful_count", "<i4").tobytes(),
        feedback=rows.column("feedback", "<f4").tobytes(),
        sentiment=rows.column("sentiment", "<f4").tobytes(),
        goal_match=batch.goal_match.astype("<f4").tobytes(),
        weights=batch.weights.astype("<f4").tobytes(),
        texts=batch.texts,
        text_index=batch.text_index.astype("<i4").tobytes(),
    )


def _done(shard: Shard) -> pb.Done:
    return pb.Done(scored=shard.scored, processed=shard.processed, archived=shard.archived)


async def _next(requests: AsyncIterator[pb.ScoreRequest], expected: str) -> pb.ScoreRequest:
    async for request in requests:
        if request.WhichOneof("message") == expected:
            return request
        break
    raise InvalidArgument("message", f"must be {expected} here")


def _checked(request: pb.ScoreRequest) -> pb.Open:
    opening = request.open
    if opening.lease_token < 1:
        raise InvalidArgument("open.lease_token", "must be the token of a lease")
    if not 1 <= opening.window <= _LARGEST_WINDOW:
        raise InvalidArgument("open.window", f"must be 1 to {_LARGEST_WINDOW}")
    if not 1 <= opening.batch_size <= _LARGEST_BATCH:
        raise InvalidArgument("open.batch_size", f"must be 1 to {_LARGEST_BATCH}")
    return opening


def _scores(scores: pb.Scores, sequence: int, batch: Batch) -> ScoreColumns:
    """Read the scores of a batch.

    Raises:
        InvalidArgument: They are of another batch, or of another size, or out of range.
    """
    if scores.sequence != sequence:
        raise InvalidArgument("scores.sequence", f"must be {sequence}: batches go in order")
    if scores.scorer_version < 1:
        raise InvalidArgument("scores.scorer_version", "must be 1 or more")
    columns = ScoreColumns(
        scores.scorer_version,
        _floats(scores.score, "score"),
        _floats(scores.relevance_to_goals, "relevance_to_goals"),
        _floats(scores.emotional_weight, "emotional_weight"),
        _floats(scores.predictive_value, "predictive_value"),
        _floats(scores.recency_frequency, "recency_frequency"),
        _floats(scores.sentiment, "sentiment"),
    )
    if not columns.is_sound(len(batch.rows)):
        raise InvalidArgument("scores", "must be float32 of 0 to 1, one for each memory")
    return columns


def _floats(data: bytes, field: str) -> Floats:
    if len(data) % 4:
        raise InvalidArgument(f"scores.{field}", "must be float32 values")
    return np.frombuffer(data, "<f4")
