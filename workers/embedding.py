"""Embedding: gives a user's memories the vectors that a local model makes of them."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import grpc
from kimberly.embedding.v1 import embedding_pb2 as pb
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from server.embedding_models import Embedder
from workers.stream import Task

EMBED: Final = "embedding.batch"
FORMER_EMBED: Final = "memories.embed"
"""What the kind was called; for one release, jobs of that name may still be made."""

BATCH_SIZE = 256

_STREAM_SECONDS = 900.0


class Embedding:
    """Handler of the jobs that make vectors."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        embedders: Mapping[str, Embedder],
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Prepare to embed for EmbeddingService, which the channel leads to.

        Args:
            channel: Leads to the service, by way of the sidecar.
            embedders: The models at hand, by name.
            metadata: Sent with every stream; in the mesh the sidecar adds what is needed.
            batch_size: How many texts are embedded at once.
        """
        self._stub = rpc.EmbeddingServiceStub(channel)
        self._embedders = embedders
        self._metadata = metadata
        self._batch_size = batch_size

    async def embed(self, task: Task) -> Mapping[str, Any]:
        """Make the vectors that a user's memories lack: the job "embedding.batch".

        What a stream kept stays when it breaks: the next attempt goes on from there.
        """
        # grpc.aio never ends a call that nobody looks at any more (grpc#43462).
        call = self._stub.Embed(  # type: ignore[call-arg] # written by hand, no iterator
            timeout=_STREAM_SECONDS, metadata=self._metadata
        )
        try:
            await call.write(pb.EmbedRequest(open=self._open(task)))
            while isinstance(response := await call.read(), pb.EmbedResponse):
                if response.WhichOneof("message") == "done":
                    return _result(response.done)
                # In a thread: the loop has heartbeats to send.
                vectors = await asyncio.to_thread(self._vectors, response.batch)
                # If the call has ended meanwhile, the next read says how.
                with suppress(asyncio.InvalidStateError):
                    await call.write(pb.EmbedRequest(vectors=vectors))
        finally:
            call.cancel()
        raise EmbeddingUnfinished

    def _open(self, task: Task) -> pb.Open:
        return pb.Open(
            job_id=task.job_id,
            lease_token=task.lease_token,
            models=sorted(self._embedders),
            batch_size=self._batch_size,
        )

    def _vectors(self, batch: pb.Batch) -> pb.Vectors:
        values = self._embedders[batch.model].embed(batch.texts)
        return pb.Vectors(sequence=batch.sequence, values=values.astype("<f4").tobytes())


def _result(done: pb.Done) -> Mapping[str, Any]:
    stopped = {"stopped": done.stopped} if done.stopped else {}
    return {"kept": done.kept, **stopped}


class EmbeddingUnfinished(Exception):
    """The server closed the stream without a word."""
