"""Clients that open much and mean nothing are cut off; everybody else is served."""

from __future__ import annotations

import asyncio
import gzip
from functools import partial

import grpc
import httpx
import pytest

from local.envoy import EdgeLimits
from local.mesh import Mesh
from server.access import EDGE, PROCESSES, REFLECTION
from server.rpc.interceptors import STREAMS
from tests.abuse.wire import Wire
from tests.mesh import User, bearer, eventually

LOG_IN = "/kimberly.auth.v1.AuthService/LogIn"
GET_USER = "/kimberly.users.v1.UserService/GetUser"
GET_MEMORY = "/kimberly.memory.v1.MemoryService/GetMemory"
WATCH_MEMORIES = "/kimberly.memory.v1.MemoryService/WatchMemories"
IMPORT_MEMORIES = "/kimberly.memory.v1.MemoryService/ImportMemories"
REFLECT = f"/{REFLECTION}/ServerReflectionInfo"
CONNECTIONS = 25
"""With as many calls as each may carry, more than circuit breakers let be at once."""
LOOKS = 20
STREAM_SECONDS = 20.0
"""Streams that say nothing are ended after three times as long."""
RESETS = 1000
FLOODS = 8
BOMB_BYTES = 64 << 20


async def test_a_client_that_resets_what_it_opens_is_cut_off(
    mesh: Mesh, wire: Wire, bob: User
) -> None:
    # CVE-2023-44487. Of 500 streams half must have lived for a second.
    before = await cut_off(mesh, EDGE)
    await wire.rapid_resets("/v1/user", bearer(bob.token), RESETS)
    assert await cut_off(mesh, EDGE) > before


async def test_the_calls_of_others_are_answered_while_a_client_resets_its_own(
    mesh: Mesh, wire: Wire, ann: User, bob: User
) -> None:
    # All calls share the edge's connections to a sidecar, and the resets come there, too: 2 000,
    # of which nghttp2 would take 1 000 at once and 33 a second.
    before = await cut_off(mesh, "auth")
    async with asyncio.TaskGroup() as tasks:
        floods = tasks.create_task(flood(wire, bob))
        statuses = set()
        while not floods.done():
            statuses.add((await ann.rest.raw("GET", "/v1/user")).status_code)
    assert statuses == {httpx.codes.OK}
    assert await cut_off(mesh, "auth") == before


async def flood(wire: Wire, user: User) -> None:
    for _ in range(FLOODS):
        await wire.rapid_resets("/v1/user", bearer(user.token), RESETS)


async def cut_off(mesh: Mesh, process: str) -> int:
    """Return how often an Envoy has ended a connection because of resets or broken HTTP/2."""
    return await counted(
        mesh, process, "downstream_(rq_too_many_premature_resets|cx_protocol_error)"
    )


async def counted(mesh: Mesh, process: str, names: str) -> int:
    """Return the sum of what an Envoy counts under names that match."""
    transport = httpx.AsyncHTTPTransport(uds=str(mesh.layout.admin_socket(process)))
    async with httpx.AsyncClient(transport=transport, base_url="http://envoy") as admin:
        stats = await admin.get("/stats", params={"filter": names})
    return sum(int(stat.rpartition(" ")[2]) for stat in stats.text.splitlines())


@pytest.mark.parametrize("method", [LOG_IN, GET_USER, GET_MEMORY, WATCH_MEMORIES])
async def test_the_calls_of_others_are_answered_while_thousands_of_one_client_never_end(
    wire: Wire, ann: User, bob: User, method: str
) -> None:
    streams = EdgeLimits().streams_per_connection
    async with wire.unfinished(method, bearer(bob.token), CONNECTIONS, streams):
        assert await served(ann) == {httpx.codes.OK}


@pytest.mark.parametrize("method", [IMPORT_MEMORIES, REFLECT])
async def test_a_user_who_opens_thousands_of_streams_keeps_a_few_and_others_are_served(
    mesh: Mesh, wire: Wire, ann: User, bob: User, method: str
) -> None:
    async def in_the_mesh() -> int:
        return await counted(mesh, EDGE, r"cluster\.(auth|memory)\.upstream_rq_active")

    streams = EdgeLimits().streams_per_connection
    async with wire.unfinished(method, bearer(bob.token), CONNECTIONS, streams):
        await eventually(in_the_mesh, lambda calls: calls == STREAMS, STREAM_SECONDS)
        # Refusing thousands may have kept a service from saying that it is well.
        await eventually(
            partial(served, ann), lambda seen: seen == {httpx.codes.OK}, STREAM_SECONDS
        )


async def served(user: User) -> set[int]:
    """Return how two processes answer calls of a user."""
    paths = ["/v1/user", "/v1/memories?pageSize=1"] * LOOKS
    return {(await user.rest.raw("GET", path)).status_code for path in paths}


async def test_a_message_that_unpacks_to_much_is_refused_and_the_processes_live(
    mesh: Mesh, bob: User
) -> None:
    pids = {name: mesh.process(name).pid for name in PROCESSES}
    bomb = gzip.compress(bytes(BOMB_BYTES))
    assert len(bomb) < BOMB_BYTES // 500
    headers = {"content-type": "application/grpc-web+proto", "grpc-encoding": "gzip"}
    # Compressed, and then as long as it says.
    frame = b"\1" + len(bomb).to_bytes(4) + bomb
    answer = await bob.rest.raw("POST", GET_USER, content=frame, headers=headers)
    assert answer.headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert (await bob.rest.raw("GET", "/v1/user")).status_code == httpx.codes.OK
    assert {name: mesh.process(name).pid for name in PROCESSES} == pids
