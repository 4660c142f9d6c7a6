"""Clients that open much and mean nothing are cut off; everybody else is served."""

from __future__ import annotations

import gzip

import grpc
import httpx

from local.mesh import Mesh
from server.access import EDGE, PROCESSES
from tests.abuse.wire import Wire
from tests.mesh import User, bearer

GET_USER = "/kimberly.users.v1.UserService/GetUser"
RESETS = 1000
BOMB_BYTES = 64 << 20


async def test_a_client_that_resets_what_it_opens_is_cut_off(
    mesh: Mesh, wire: Wire, bob: User
) -> None:
    # CVE-2023-44487. Of 500 streams half must have lived for a second.
    before = await cut_off(mesh)
    await wire.rapid_resets("/v1/user", bearer(bob.token), RESETS)
    assert await cut_off(mesh) == before + 1
    assert (await bob.rest.raw("GET", "/v1/user")).status_code == httpx.codes.OK


async def cut_off(mesh: Mesh) -> int:
    """Return how many connections the edge has ended because of resets."""
    transport = httpx.AsyncHTTPTransport(uds=str(mesh.layout.admin_socket(EDGE)))
    async with httpx.AsyncClient(transport=transport, base_url="http://envoy") as admin:
        stats = await admin.get("/stats?filter=downstream_rq_too_many_premature_resets")
    return sum(int(stat.rpartition(" ")[2]) for stat in stats.text.splitlines())


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
