"""Meditation: plans the nightly run, and scores its shards."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import grpc
import numpy as np
import structlog
from kimberly.client import reason_of
from kimberly.scoring.v1 import scoring_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import tracing
from workers import scoring
from workers.sentiment import sentiments
from workers.stream import Task

log = structlog.get_logger()

PLAN: Final = "meditation.plan"
SHARD: Final = "meditation.shard"

WINDOW = 2
BATCH_SIZE = 16_384

_PLAN_SECONDS = 30.0
_STREAM_SECONDS = 900.0
_TRIES = 10
_LONGEST_PAUSE_SECONDS = 3.0
_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
}


class Meditation:
    """Handlers of the jobs of a meditation."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        window: int = WINDOW,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Prepare to score by ScoringService, which the channel leads to."""
        self._stub = rpc.ScoringServiceStub(channel)
        self._metadata = metadata
        self._window = window
        self._batch_size = batch_size

    async def plan(self, task: Task) -> Mapping[str, Any]:
        """Start the run of all users: the job "meditation.plan".

        With "full" in its payload every score is stored, not only those that moved.
        """
        request = pb.PlanMeditationRequest(
            job_id=task.job_id, full=bool(task.payload.get("full", False))
        )
        run = await self._stub.PlanMeditation(
            request, timeout=_PLAN_SECONDS, metadata=self._metadata
        )
        return {"meditation_id": run.meditation_id, "shards": run.shards}

    async def score_shard(self, task: Task) -> Mapping[str, Any]:
        """Score one shard to its end: the job "meditation.shard".

        A stream that breaks is opened again: the server knows how far the shard is. Only when
        several in a row get nowhere has the attempt failed.
        """
        failures = 0
        while True:
            progress = _Progress()
            try:
                return _told(await self._stream(task, progress))
            except grpc.aio.AioRpcError as error:
                failures = 1 if progress.batches else failures + 1
                if not _is_passing(error) or failures >= _TRIES:
                    raise
                log.info("scoring interrupted", job=task.job_id, code=error.code().name)
            pause = min(0.1 * 2.0**failures, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads retries

    async def _stream(self, task: Task, progress: "_Progress") -> pb.Done:
        """Score what a stream brings and return what came of the shard."""
        # grpc.aio never ends a call that nobody looks at any more (grpc#43462).
        call = self._stub.Score(  # type: ignore[call-arg] # written by hand, no iterator
            timeout=_STREAM_SECONDS, metadata=self._metadata
        )
        try:
            await call.write(pb.ScoreRequest(open=self._open(task)))
            while isinstance(response := await call.read(), pb.ScoreResponse):
                if response.WhichOneof("message") == "done":
                    return response.done
                with tracing.span("score batch", {"kimberly.memories": response.batch.size}):
                    # NumPy and VADER in a thread: the loop has heartbeats to send.
                    scores = await asyncio.to_thread(score_batch, response.batch)
                    # If the call has ended meanwhile, the next read says how.
                    with suppress(asyncio.InvalidStateError):
                        await call.write(pb.ScoreRequest(scores=scores))
                progress.batches += 1
        finally:
            call.cancel()
        raise ShardUnfinished

    def _open(self, task: Task) -> pb.Open:
        return pb.Open(
            meditation_id=task.payload["meditation_id"],
            shard=task.payload["shard"],
            lease_token=task.lease_token,
            window=self._window,
            batch_size=self._batch_size,
        )


def _told(done: pb.Done) -> Mapping[str, Any]:
    return {"scored": done.scored, "processed": done.processed, "archived": done.archived}


class ShardUnfinished(Exception):
    """The server closed the stream without a word."""


def _is_passing(error: grpc.aio.AioRpcError) -> bool:
    """Tell a broken stream from a refusal: INTERNAL without a reason is a peer that was killed."""
    broke = error.code() is grpc.StatusCode.INTERNAL and not reason_of(error)
    return broke or error.code() in _PASSING


class _Progress:
    """How many batches a stream got through."""

    batches = 0


def score_batch(batch: pb.Batch) -> pb.Scores:
    """Score a batch and find the sentiment of its texts."""
    sentiment = np.frombuffer(batch.sentiment, "<f4").copy()
    sentiment[np.frombuffer(batch.text_index, "<i4")] = sentiments(batch.texts)
    signals = scoring.Signals(
        days_since_last_seen=np.frombuffer(batch.days_since_last_seen, "<f4"),
        use_count=np.frombuffer(batch.use_count, "<i4"),
        retrieved_count=np.frombuffer(batch.retrieved_count, "<i4"),
        useful_count=np.frombuffer(batch.useful_count, "<i4"),
        feedback=np.frombuffer(batch.feedback, "<f4"),
        sentiment=sentiment,
        goal_match=np.frombuffer(batch.goal_match, "<f4"),
        weights=np.frombuffer(batch.weights, "<f4").reshape(batch.size, 4),
    )
    found = scoring.score(signals)
    return pb.Scores(
        sequence=batch.sequence,
        scorer_version=scoring.VERSION,
        score=found.score.tobytes(),
        relevance_to_goals=found.relevance_to_goals.tobytes(),
        emotional_weight=found.emotional_weight.tobytes(),
        predictive_value=found.predictive_value.tobytes(),
        recency_frequency=found.recency_frequency.tobytes(),
        sentiment=sentiment.tobytes(),
    )
