"""A query whose deadline is short, through edge and sidecar, while vectors are out of reach."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import json_format
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from local.postgres import SUPERUSER
from tests.in_time import first_in_time
from tests.mesh import User, bearer

pytestmark = pytest.mark.alone
DEADLINE_SECONDS = 0.5
ASKED = pb.QueryMemoriesRequest(
    query="olive", embedding=pb.QueryEmbedding(model="tiny", values=[1, 0])
)


@pytest_asyncio.fixture
async def grower(user: User) -> User:
    """A user with a memory that has a vector."""
    await user.grpc(
        users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_EMBED, granted=True)
    )
    created = await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="olive tree")))
    vector = pb.Embedding(memory_id=created.memory.id, model="tiny", values=[1, 0])
    await user.grpc(pb.UploadEmbeddingsRequest(embeddings=[vector]))
    return user


@pytest_asyncio.fixture
async def vectors_out_of_reach(mesh: Mesh, grower: User) -> AsyncIterator[None]:
    """Somebody holds the table of vectors, and lets nobody read it."""
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE embeddings")
            yield
    finally:
        await connection.close()


def assert_by_words_alone(answer: pb.QueryMemoriesResponse) -> None:
    assert answer.semantic_late
    assert [(match.memory.content, match.semantic) for match in answer.matches] == [
        ("olive tree", 0)
    ]


async def test_grpc_call_is_answered_by_words_within_its_deadline(
    channel: grpc.aio.Channel, grower: User, vectors_out_of_reach: None
) -> None:
    del vectors_out_of_reach
    stub: rpc.MemoryServiceAsyncStub = rpc.MemoryServiceStub(channel)

    async def ask() -> pb.QueryMemoriesResponse:
        return await stub.QueryMemories(
            ASKED, metadata=bearer(grower.token), timeout=DEADLINE_SECONDS
        )

    assert_by_words_alone(await first_in_time(DEADLINE_SECONDS, ask))


async def test_rest_call_is_answered_by_words_within_its_grpc_timeout(
    http: httpx.AsyncClient, grower: User, vectors_out_of_reach: None
) -> None:
    del vectors_out_of_reach
    headers = {
        "authorization": f"Bearer {grower.token}",
        "grpc-timeout": f"{DEADLINE_SECONDS * 1000:.0f}m",
    }
    question = json_format.MessageToDict(ASKED)

    async def ask() -> httpx.Response:
        return await http.post("/v1/memories:query", json=question, headers=headers)

    response = await first_in_time(DEADLINE_SECONDS, ask)
    assert response.status_code == httpx.codes.OK, response.text
    assert_by_words_alone(json_format.Parse(response.text, pb.QueryMemoriesResponse()))


async def test_all_take_part_once_nobody_holds_them(grower: User) -> None:
    answer = await grower.grpc(ASKED)
    assert (answer.semantic_late, answer.matches[0].semantic) == (False, 1)
