"""Vectors of memories, for tests: uploaded, asked by, found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from tests.conftest import bearer

MODEL = "tiny"


def of(memory: pb.Memory, values: Iterable[float], model: str = MODEL) -> pb.Embedding:
    """Return a vector of a memory as it is uploaded."""
    return pb.Embedding(memory_id=memory.id, model=model, values=values)


async def upload(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, *embeddings: pb.Embedding
) -> pb.UploadEmbeddingsResponse:
    """Upload vectors."""
    request = pb.UploadEmbeddingsRequest(embeddings=embeddings)
    return await memories.UploadEmbeddings(request, metadata=bearer(caller))


async def ask(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    query: str = "",
    values: Sequence[float] = (),
    *,
    model: str = MODEL,
    **bounds: object,
) -> pb.QueryMemoriesResponse:
    """Ask by words, and by a vector if there is one."""
    request = pb.QueryMemoriesRequest(query=query, **bounds)  # type: ignore[arg-type]
    if values:
        request.embedding.CopyFrom(pb.QueryEmbedding(model=model, values=values))
    return await memories.QueryMemories(request, metadata=bearer(caller))


def texts(answer: pb.QueryMemoriesResponse) -> list[str]:
    """Return what was found, best first."""
    return [match.memory.content for match in answer.matches]
