"""Every method and every caller: who is not named is denied, who is named is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from local import envoy
from local.mesh import Mesh
from server.access import EDGE, METHODS, PROCESSES, ROLES, WORKER, Access, Scope, methods_of
from server.auth.api_keys import GRANTABLE
from tests.abuse.callers import CALLERS, PEOPLE, Caller, Scene
from tests.abuse.cells import NO_TOKEN, open_methods, rows
from tests.abuse.doors import Doors
from tests.mesh import User, bearer, sign_up

IDENTITIES = (EDGE, WORKER, *PROCESSES)


@pytest.fixture(scope="module")
def judged(pytestconfig: pytest.Config) -> Iterator[list[bool]]:
    """The cells that were looked at, and whether each was open; counted at the end."""
    cells: list[bool] = []
    yield cells
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stdout.write(f"\n{len(cells)} cells judged, {sum(cells)} of them open ")


def count(judged: list[bool], inside: set[str]) -> None:
    judged.extend(method in inside for method in METHODS)


# --- through the edge --------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module")
async def scene(mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel) -> Scene:
    """A tenant into which others are asked."""
    return Scene(mesh, http, channel, await sign_up(http, channel))


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)
async def test_the_edge_opens_to_a_caller_what_the_table_says(
    scene: Scene, caller: Caller, judged: list[bool]
) -> None:
    inside = await open_methods(scene.channel, await caller.become(scene))
    count(judged, inside)
    assert inside == rows(Access.ANYONE) | caller.opened


def test_every_role_and_every_scope_is_a_column() -> None:
    columns = {caller.name for caller in CALLERS}
    assert len(columns) == len(CALLERS)
    scopes = {scope for scope in Scope if scope is not Scope.USER}
    assert {f"agent for {scope}" for scope in scopes} <= columns
    assert {f"key for {scope}" for scope in scopes & GRANTABLE} <= columns
    # Whoever signs up owns a tenant; the others are asked in.
    assert {caller.name for caller in PEOPLE} >= {"user", "admin", "auditor", "member"}


# --- past the edge -----------------------------------------------------------------------------


def open_to(process: str, identity: str, *, with_token: bool) -> set[str]:
    """Return what server.access opens at a sidecar."""

    def lets_in(access: Access) -> bool:
        match access:
            case Access.USER | Access.AUDITOR | Access.ADMIN:
                return with_token and identity == EDGE
            case Access.WORKER:
                return identity == WORKER
            case Access.ANYONE | Access.WORKLOAD:
                return True

    return {method for method, access in methods_of(process).items() if lets_in(access)}


@pytest.mark.parametrize("with_token", [False, True], ids=["no token", "token"])
@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("process", PROCESSES)
async def test_a_sidecar_lets_in_whom_the_table_names(
    doors: Doors, bob: User, process: str, identity: str, with_token: bool, judged: list[bool]
) -> None:
    channel = await doors.sidecar(process, identity)
    inside = await open_methods(channel, bearer(bob.token) if with_token else ())
    count(judged, inside)
    assert inside == open_to(process, identity, with_token=with_token)


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_service_asks_again(
    doors: Doors, bob: User, process: str, judged: list[bool]
) -> None:
    channel, served = await doors.service(process), set(methods_of(process))
    anyone = rows(*NO_TOKEN) & served
    for metadata, expected in (
        ((), anyone),
        (bearer(bob.token), anyone | rows(*ROLES) & served),
    ):
        inside = await open_methods(channel, metadata)
        count(judged, inside)
        assert inside == expected


# --- what is new -------------------------------------------------------------------------------


def test_a_new_method_without_a_row_is_in_no_build() -> None:
    contract = envoy.descriptor_set()
    assert {method.path for method in envoy.methods_of_contract(contract)} == METHODS.keys()
    new = FileDescriptorProto(package="kimberly.memory.v2")
    new.service.add(name="MemoryService").method.add(name="PurgeMemories")
    contract.file.append(new)
    with pytest.raises(LookupError, match="PurgeMemories"):
        envoy.methods_of_contract(contract)
