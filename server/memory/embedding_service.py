"""Serves kimberly.embedding.v1.EmbeddingService: feeds embedding workers, keeps their vectors."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc
import numpy as np
from kimberly.embedding.v1 import embedding_pb2 as pb
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from server import ids
from server.errors import ConsentMissing, InvalidArgument, QuotaExceeded, StateConflict
from server.memory.embedding_jobs import START, Bound, EmbeddingJob, EmbeddingJobs, Finish, Gap
from server.memory.embedding_store import EmbeddingStore
from server.memory.embeddings import Floats, Upload, read_embedding

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LARGEST_BATCH = 256


@dataclass(slots=True)
class _Work:
    """What a stream is about."""

    job: EmbeddingJob
    hopeless: set[Gap] = field(default_factory=set)
    """What its model knows nothing of."""
    finish: Finish = field(default_factory=Finish)

    @property
    def stopped(self) -> str:
        """Why it left something undone, in words; empty: it did not."""
        rest = self.finish.rest
        if rest is None:
            return ""
        return (
            f"{_WHY[rest.bound]}: it goes on {rest.resumes_at:%Y-%m-%d}, or as soon as there is a "
            f"larger plan; texts without a vector until then: {rest.texts}"
        )


_WHY: Final[Mapping[Bound, str]] = {
    Bound.MADE_IN_MONTH: "what the plan gives of embeddings in a month is used up",
    Bound.KEPT: "the plan keeps no more vectors",
}


class EmbeddingService(rpc.EmbeddingServiceServicer):
    """Serves embedding workers."""

    def __init__(self, jobs: EmbeddingJobs, embeddings: EmbeddingStore) -> None:
        self._jobs = jobs
        self._embeddings = embeddings

    async def Embed(
        self, request_iterator: AsyncIterator[pb.EmbedRequest], context: Context
    ) -> AsyncIterator[pb.EmbedResponse]:
        opening = _checked(await _next(request_iterator, "open"))
        job = await self._jobs.open(
            ids.parse(ids.JOB, opening.job_id, "open.job_id"), opening.lease_token
        )
        work = _Work(job)
        kept = sequence = 0
        async for batch in self._missing(work, opening.batch_size):
            sequence += 1
            yield pb.EmbedResponse(batch=_batch_to(batch, sequence, opening.models))
            answer = await _next(request_iterator, "vectors")
            gaps = [gap for gap, _ in batch]
            vectors = _vectors(answer.vectors, sequence, len(gaps))
            known = [bool(vector.any()) for vector in vectors]
            work.hopeless.update(
                gap for gap, is_known in zip(gaps, known, strict=True) if not is_known
            )
            uploads = [
                _upload(gap, vector)
                for gap, vector, is_known in zip(gaps, vectors, known, strict=True)
                if is_known
            ]
            kept += await self._keep(job, uploads)
        yield pb.EmbedResponse(done=pb.Done(kept=kept, stopped=work.stopped))

    async def _missing(self, work: "_Work", limit: int) -> AsyncIterator[list[tuple[Gap, str]]]:
        """Go through what lacks a vector, again and again until there is no more to do now."""
        cursor = START
        while True:
            found = await self._jobs.read(work.job, cursor, limit)
            if batch := [item for item in found if item[0] not in work.hopeless]:
                yield batch
            if found:
                cursor = found[-1][0].memory_id
                continue
            finish = await self._jobs.finish(work.job, work.hopeless)
            if finish.is_done:
                work.finish = finish
                return
            cursor = START

    async def _keep(self, job: EmbeddingJob, uploads: Sequence[Upload]) -> int:
        """Keep vectors and return how many; those of texts that changed meanwhile are dropped."""
        if not uploads:
            return 0
        try:
            refused = await self._embeddings.keep(job.caller, uploads, job)
        except ConsentMissing:
            # Withdrawn just now: nothing is missing any more.
            return 0
        except QuotaExceeded:
            # Others were uploaded meanwhile; the next look finds how much room they left.
            return 0
        return len(uploads) - len(refused)


async def _next(requests: AsyncIterator[pb.EmbedRequest], expected: str) -> pb.EmbedRequest:
    async for request in requests:
        if request.WhichOneof("message") == expected:
            return request
        break
    raise InvalidArgument("message", f"must be {expected} here")


def _checked(request: pb.EmbedRequest) -> pb.Open:
    opening = request.open
    if opening.lease_token < 1:
        raise InvalidArgument("open.lease_token", "must be the token of a lease")
    if not 1 <= opening.batch_size <= _LARGEST_BATCH:
        raise InvalidArgument("open.batch_size", f"must be 1 to {_LARGEST_BATCH}")
    return opening


def _batch_to(batch: Sequence[tuple[Gap, str]], sequence: int, models: Sequence[str]) -> pb.Batch:
    """Return a batch for a worker that has these models.

    Raises:
        StateConflict: The one that the user chose is not among them.
    """
    model = batch[0][0].model
    if model not in models:
        raise StateConflict(
            f"the worker has no model {model!r}, only {', '.join(sorted(models)) or 'none'}; "
            "choose one of these with PATCH /v1/user/settings, or give the model to every worker"
        )
    return pb.Batch(sequence=sequence, model=model, texts=[text for _, text in batch])


def _vectors(vectors: pb.Vectors, sequence: int, size: int) -> Floats:
    """Read the vectors of a batch.

    Raises:
        InvalidArgument: They are of another batch, or not as many as its texts.
    """
    if vectors.sequence != sequence:
        raise InvalidArgument("vectors.sequence", f"must be {sequence}: batches go in order")
    if not vectors.values or len(vectors.values) % (4 * size):
        raise InvalidArgument("vectors.values", "must be float32[texts][dimension]")
    return np.frombuffer(vectors.values, "<f4").reshape(size, -1)


def _upload(gap: Gap, vector: Floats) -> Upload:
    embedding = read_embedding(gap.model, vector.tolist(), "vectors")
    return Upload(gap.memory_id, embedding, gap.content_hash)
