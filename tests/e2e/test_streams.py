"""Streams through the whole mesh: as lines of JSON over REST, and resumed over gRPC."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from tests.mesh import User
from tests.transports import refusal_in

EXPORT = "/v1/memories:export"
WATCH = "/v1/memories:watch"


async def lines_of(user: User, path: str, *, count: int = 0, **params: str) -> list[Any]:
    """Read a stream over REST: so many lines, or all."""
    headers = {"authorization": f"Bearer {user.token}"}
    lines = []
    async with user.rest.http.stream("GET", path, params=params, headers=headers) as response:
        assert response.status_code == httpx.codes.OK, await response.aread()
        async for line in response.aiter_lines():
            lines.append(json.loads(line))
            if len(lines) == count:
                break
    return lines


async def keep(user: User, *texts: str) -> list[str]:
    """Store texts and return their ids."""
    return [
        (await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content=text)))).memory.id
        for text in texts
    ]


async def test_an_export_over_rest_is_a_memory_a_line_and_an_end(user: User) -> None:
    kept = await keep(user, "one", "zwei\n2", "три")
    *memories, last = await lines_of(user, EXPORT)
    assert [line["memory"]["id"] for line in memories] == kept
    assert [line["memory"]["content"] for line in memories] == ["one", "zwei\n2", "три"]
    assert last["end"]["count"] == "3"


async def test_watching_over_rest_goes_on_where_the_export_began(user: User) -> None:
    *_, last = await lines_of(user, EXPORT)
    (kept,) = await keep(user, "later")
    cursor = last["end"]["cursor"]
    told, mark = await lines_of(user, WATCH, count=2, cursor=cursor, includeMemories="true")
    assert told["change"]["kind"] == "CHANGE_KIND_CREATED"
    assert told["change"]["memory"]["id"] == told["change"]["memoryId"] == kept
    assert "caughtUp" in mark


async def test_a_stream_that_cannot_begin_is_refused_as_every_call_is(user: User) -> None:
    response = await user.rest.raw("GET", WATCH, params={"cursor": "rubbish"})
    assert response.status_code == httpx.codes.BAD_REQUEST
    refusal = refusal_in(response)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("cursor",))
    stranger = await user.rest.http.get(EXPORT)
    assert stranger.status_code == httpx.codes.UNAUTHORIZED


async def test_an_import_is_resumed_through_the_edge(user: User) -> None:
    turns = [pb.Memory(content=f"{n}", session_id="s", session_position=n) for n in range(2_500)]

    async def chunks(start: int, end: int) -> AsyncIterator[pb.ImportMemoriesRequest]:
        for first in range(start, end, 500):
            yield pb.ImportMemoriesRequest(
                first_index=first, memories=turns[first : first + 500], request_id="once"
            )

    stub = rpc.MemoryServiceStub(user.grpc.channel)
    await stub.ImportMemories(chunks(0, 1_000), metadata=user.grpc.metadata)
    for call in user.transports.values():
        answer = await call(pb.GetImportRequest(request_id="once"))
        assert answer.progress.next_index == 1_000
    rest = await stub.ImportMemories(chunks(0, 2_500), metadata=user.grpc.metadata)
    assert (rest.created, rest.skipped, rest.next_index) == (1_500, 1_000, 2_500)
