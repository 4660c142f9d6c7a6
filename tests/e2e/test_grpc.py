"""What is particular to gRPC: the generated stubs, streams, deadlines, gRPC-Web."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from kimberly.auth.v1 import auth_pb2
from kimberly.client import Client, connect, reason_of
from kimberly.jobs.v1 import jobs_pb2
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.mesh import GRANT, PASSWORD, User, address_of
from tests.refusals import read, refusal_of

GET_USER = "/kimberly.users.v1.UserService/GetUser"
GET_MEMORY = "/kimberly.memory.v1.MemoryService/GetMemory"
NEVER = 60.0
A_MOMENT = 0.3


@pytest_asyncio.fixture
async def client(mesh: Mesh, user: User) -> AsyncIterator[Client]:
    """The client that we ship, logged in."""
    async with connect(address_of(mesh), mesh.ca) as client:
        await client.log_in(user.email, PASSWORD)
        yield client


# --- the client --------------------------------------------------------------------------------


async def test_the_client_signs_up_and_calls_every_service(mesh: Mesh) -> None:
    async with connect(address_of(mesh), mesh.ca) as client:
        email = f"client-{time.time_ns()}@example.com"
        signed_up = await client.sign_up(email, PASSWORD)
        await client.users.RecordConsent(GRANT)
        memory = pb.Memory(content="Ann sails")
        await client.memory.CreateMemory(pb.CreateMemoryRequest(memory=memory))
        assert (await client.users.GetUser(users.GetUserRequest())).user.id == signed_up.user_id
        assert not (await client.jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs
        assert (await client.auth.GetJwks(auth_pb2.GetJwksRequest())).keys


async def test_the_client_tells_the_reason_of_a_refusal(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.memory.GetMemory(pb.GetMemoryRequest(id="nonsense"))
    assert reason_of(refused.value) == "FIELD_INVALID"


async def test_a_client_that_trusts_another_authority_does_not_connect(mesh: Mesh) -> None:
    async with grpc.aio.secure_channel(
        address_of(mesh), grpc.ssl_channel_credentials()
    ) as suspicious:
        refusal = await refusal_of(suspicious.unary_unary(GET_USER, bytes, bytes)(b"", timeout=5))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE


# --- streams and deadlines ---------------------------------------------------------------------


async def test_a_chunk_stays_stored_when_its_stream_breaks(client: Client) -> None:
    async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        yield pb.ImportMemoriesRequest(memories=[pb.Memory(content="first")])
        yield pb.ImportMemoriesRequest(memories=[pb.Memory(content="a")] * 1001)

    refusal = await refusal_of(client.memory.ImportMemories(chunks()))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("memories",))
    listed = await client.memory.ListMemories(pb.ListMemoriesRequest())
    assert [memory.content for memory in listed.memories] == ["first"]


async def test_a_stream_that_falls_silent_ends_at_the_deadline(client: Client) -> None:
    async def silence() -> AsyncIterator[pb.ImportMemoriesRequest]:
        yield pb.ImportMemoriesRequest()
        await asyncio.sleep(NEVER)

    started = time.monotonic()
    refusal = await refusal_of(client.memory.ImportMemories(silence(), timeout=A_MOMENT))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < NEVER / 2


async def test_a_deadline_that_is_over_before_the_answer_is_kept(client: Client) -> None:
    call = client.memory.ListMemories(pb.ListMemoriesRequest(), timeout=1e-6)
    assert (await refusal_of(call)).code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_edge_ends_a_call_at_the_deadline_that_it_was_told(
    http: httpx.AsyncClient, user: User
) -> None:
    # Half a message: without the deadline, the service would wait ten seconds for the rest.
    headers = {
        "authorization": f"Bearer {user.token}",
        "content-type": "application/grpc-web+proto",
        "grpc-timeout": "200m",
    }

    async def call() -> httpx.Response:
        return await http.post(GET_USER, content=b"\0\0\0\0\5ab", headers=headers)

    started = time.monotonic()
    # Edge, sidecar and service all keep it, and any of them may be the first.
    answers = await asyncio.gather(*(call() for _ in range(20)))
    assert time.monotonic() - started < 9
    deadline = str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    for answer in answers:
        assert (answer.status_code, answer.headers["grpc-status"]) == (200, deadline)
        assert answer.headers["grpc-message"]


# --- gRPC-Web ----------------------------------------------------------------------------------


async def web(http: httpx.AsyncClient, user: User, method: str, request: Message) -> httpx.Response:
    """Call a unary method as a browser does."""
    data = request.SerializeToString()
    headers = {
        "authorization": f"Bearer {user.token}",
        "content-type": "application/grpc-web+proto",
        "x-grpc-web": "1",
    }
    frame = b"\0" + len(data).to_bytes(4, "big") + data
    return await http.post(method, content=frame, headers=headers)


async def test_a_browser_calls_with_grpc_web(http: httpx.AsyncClient, user: User) -> None:
    response = await web(http, user, GET_USER, users.GetUserRequest())
    assert response.headers["content-type"] == "application/grpc-web+proto"
    size = int.from_bytes(response.content[1:5], "big")
    answer = users.GetUserResponse.FromString(response.content[5 : 5 + size])
    assert answer.user.id == user.id
    assert b"grpc-status:0" in response.content[5 + size :]


async def test_a_browser_is_told_why_it_is_refused(http: httpx.AsyncClient, user: User) -> None:
    response = await web(http, user, GET_MEMORY, pb.GetMemoryRequest(id="nonsense"))
    assert (response.status_code, response.headers["grpc-status"]) == (200, "3")
    assert response.headers["grpc-status-details-bin"]


# --- messages ----------------------------------------------------------------------------------


async def test_a_refusal_comes_with_reason_and_field_in_its_trailers(user: User) -> None:
    call = user.grpc.channel.unary_unary(GET_MEMORY, bytes, bytes)
    request = pb.GetMemoryRequest(id="nonsense").SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(request, metadata=user.grpc.metadata)
    refusal = read(refused.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refusal.fields == ("id",)
