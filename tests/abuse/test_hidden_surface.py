"""What is not in the table is not there: for nobody, at no door."""

from __future__ import annotations

import grpc
import httpx
import pytest

from server.access import EDGE, METHODS, PROCESSES, PUBLIC, WORKER
from tests.abuse.doors import Doors
from tests.mesh import User, bearer
from tests.refusals import refusal_of
from tests.transports import Metadata, path_of, public_methods

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HIDDEN = (
    # Services that gRPC servers often have.
    "/grpc.channelz.v1.Channelz/GetTopChannels",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/grpc.health.v1.Health/Watch",
    "/grpc.health.v1.Health/List",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/envoy.admin.v3.Admin/Quit",
    # Methods that ours might get one day.
    "/kimberly.memory.v1.MemoryService/PurgeMemories",
    "/kimberly.users.v1.UserService/DeleteUser",
    "/kimberly.auth.v1.AuthService/RotateKeys",
    "/kimberly.jobs.v1.WorkerService/Purge",
    # Names that are nearly ours.
    "/kimberly.memory.v1.MemoryService/getmemory",
    "/KIMBERLY.memory.v1.MemoryService/GetMemory",
    "/kimberly.memory.v1.MemoryService/GetMemory/",
    "/kimberly.memory.v1.MemoryService/GetMemory%00",
    "/kimberly.memory.v1.MemoryService//GetMemory.",
    "/kimberly.memory.v2.MemoryService/GetMemory",
    "/kimberly.jobs.v1.WorkerService;v=1/Work",
    "/MemoryService/GetMemory",
    "/",
)
NOT_THERE = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
    # Envoy on a path that it takes for no path at all.
    grpc.StatusCode.INTERNAL,
}


async def code_of(
    channel: grpc.aio.Channel, method: str, metadata: Metadata = ()
) -> grpc.StatusCode:
    call = channel.unary_unary(method, bytes, bytes)(b"", metadata=metadata, timeout=30)
    return (await refusal_of(call)).code


@pytest.mark.parametrize("method", HIDDEN)
async def test_a_hidden_method_is_not_there_for_users(
    channel: grpc.aio.Channel, bob: User, method: str
) -> None:
    assert await code_of(channel, method) in NOT_THERE
    assert await code_of(channel, method, bearer(bob.token)) in NOT_THERE


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("method", HIDDEN)
async def test_a_hidden_method_is_not_there_for_workloads(
    doors: Doors, bob: User, method: str, process: str
) -> None:
    for identity in (EDGE, WORKER, "memory"):
        channel = await doors.sidecar(process, identity)
        assert await code_of(channel, method, bearer(bob.token)) in NOT_THERE


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_service_denies_what_has_no_row(doors: Doors, bob: User, process: str) -> None:
    channel = await doors.service(process)
    for method in HIDDEN:
        assert await code_of(channel, method, bearer(bob.token)) in NOT_THERE, method


async def test_the_health_of_services_is_not_for_users(
    channel: grpc.aio.Channel, bob: User
) -> None:
    health = "/grpc.health.v1.Health/Check"
    assert await code_of(channel, health) is grpc.StatusCode.UNAUTHENTICATED
    assert await code_of(channel, health, bearer(bob.token)) is grpc.StatusCode.PERMISSION_DENIED


async def test_reflection_is_not_for_strangers(channel: grpc.aio.Channel) -> None:
    assert await code_of(channel, REFLECTION) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", METHODS)
async def test_no_method_has_a_rest_form_beside_its_own(
    http: httpx.AsyncClient, bob: User, method: str
) -> None:
    for headers in ({}, dict(bearer(bob.token))):
        response = await http.post(method, json={}, headers=headers)
        assert response.status_code in {401, 404}, response.text


def test_what_has_a_rest_form_is_what_users_may_call() -> None:
    # Health and reflection have no place in the contract.
    rows = {method for method, access in METHODS.items() if access in PUBLIC}
    assert {path_of(method) for method in public_methods()} == rows - {REFLECTION}


@pytest.mark.parametrize(
    "path",
    [
        "/stats",
        "/config_dump",
        "/certs",
        "/quitquitquit",
        "/metrics",
        "/debug/pprof",
        "/ready",
        "/server_info",
        "/v1/internal",
        "/v1/admin",
        "/.env",
        "/favicon.ico",
    ],
)
async def test_the_edge_shows_nothing_of_itself(
    http: httpx.AsyncClient, bob: User, path: str
) -> None:
    assert (await http.get(path)).status_code in {401, 404}
    assert (await bob.rest.raw("GET", path)).status_code == httpx.codes.NOT_FOUND
