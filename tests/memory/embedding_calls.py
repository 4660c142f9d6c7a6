"""How tests of embedding jobs choose, work, and look at what became of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import numpy as np
from kimberly.embedding.v1 import embedding_pb2 as pb
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.jobs.model import Completed, Held, Lease
from server.jobs.queue import Queue
from server.users.store import SettingsChange, UserStore
from tests.conftest import as_worker
from tests.deciding import decide
from tests.refusals import Refusal, refusal_of

MODEL = "local"
WORKER = "worker"


async def choose(database: Database, caller: Caller, model: str = MODEL) -> None:
    """Choose a model, or none by an empty name."""
    change = SettingsChange(
        language=None, scoring=None, retrieval={}, embedding_model=model, expected_version=None
    )
    await UserStore(database).update_settings(caller, change)


async def consent(system_database: SystemDatabase, caller: Caller, *, granted: bool = True) -> None:
    await decide(system_database, caller, "memory.embed", granted=granted)


async def lease(queue: Queue, kind: str = "embedding.batch") -> Lease:
    """Lease the one job that is due."""
    (leased,) = await queue.lease(WORKER, [kind], 1)
    return leased


async def settle(queue: Queue, held: Held) -> None:
    """Settle a job as done."""
    assert await queue.settle(WORKER, [Completed(held, None)]) == {held}


async def states(owner: asyncpg.Connection) -> list[str]:
    """Return the states of all embedding jobs, the oldest first."""
    rows = await owner.fetch("SELECT state FROM jobs WHERE kind = 'embedding.batch' ORDER BY id")
    return [row["state"] for row in rows]


async def vectors(owner: asyncpg.Connection) -> dict[str, str]:
    """Return the text of each vector, and its model."""
    rows = await owner.fetch(
        """
        SELECT content, model
          FROM embeddings AS embedding
          JOIN memories AS memory
            ON memory.id = memory_id AND memory.content_hash = embedding.content_hash
        """
    )
    return {row["content"]: row["model"] for row in rows}


class Stream:
    """A worker's end of a stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def open(self, held: Held, *models: str, size: int = 2) -> None:
        opening = pb.Open(
            job_id=ids.show(ids.JOB, held.job_id),
            lease_token=held.token,
            models=models or [MODEL],
            batch_size=size,
        )
        await self.call.write(pb.EmbedRequest(open=opening))

    async def batch(self) -> pb.Batch:
        response = await self.call.read()
        assert isinstance(response, pb.EmbedResponse), response
        assert response.WhichOneof("message") == "batch"
        return response.batch

    async def answer(self, batch: pb.Batch, values: bytes | None = None) -> None:
        if values is None:
            values = np.ones((len(batch.texts), 3), "<f4").tobytes()
        answer = pb.Vectors(sequence=batch.sequence, values=values)
        await self.call.write(pb.EmbedRequest(vectors=answer))

    async def done(self) -> int:
        response = await self.call.read()
        assert isinstance(response, pb.EmbedResponse), response
        assert response.WhichOneof("message") == "done"
        assert not isinstance(await self.call.read(), pb.EmbedResponse)
        return response.done.kept

    async def to_the_end(self) -> tuple[list[list[str]], pb.Done]:
        """Answer every batch until nothing is missing; return their texts, and the last word."""
        texts: list[list[str]] = []
        while True:
            response = await self.call.read()
            assert isinstance(response, pb.EmbedResponse), response
            if response.WhichOneof("message") == "done":
                return texts, response.done
            texts.append(list(response.batch.texts))
            await self.answer(response.batch)

    async def embed_all(self) -> list[list[str]]:
        """Answer every batch until nothing is missing, and return their texts."""
        texts, _ = await self.to_the_end()
        return texts

    async def refused(self) -> Refusal:
        """Return what the error says that ends the stream."""
        return await refusal_of(self.call.read())


@asynccontextmanager
async def streaming(embedding: rpc.EmbeddingServiceAsyncStub) -> AsyncIterator[Stream]:
    call = embedding.Embed(metadata=as_worker())  # type: ignore[call-arg] # written by hand
    try:
        yield Stream(call)
    finally:
        call.cancel()


async def work(
    embedding: rpc.EmbeddingServiceAsyncStub, queue: Queue, *, size: int = 2
) -> tuple[list[list[str]], pb.Done]:
    """Do the job that is due as a worker does, and return the batches and the last word."""
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held, size=size)
        batches, done = await stream.to_the_end()
    await settle(queue, held)
    return batches, done
