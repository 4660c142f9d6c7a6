"""Certificates change under steady traffic: no call fails, and who must be out is, in time."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.client import connect
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from local.envoy import SidecarLimits
from local.layout import CHECKOUT, Layout
from local.mesh import Mesh, in_background
from local.rotation import Step
from tests.abuse.doors import Doors
from tests.faults.reach import signed_up, until

LOOPS = 3
ROTATIONS = 20
AUTHORITIES = 3
CALLS_BETWEEN = 60
"""Of all loops, between one change of certificates and the next."""
EVERY_SECONDS = 0.01
RECONNECT_EVERY = 20
CONNECTION_SECONDS = 5
"""How long a connection to a sidecar lives; instead of 15 minutes."""
DRAIN_SECONDS = 5.0
"""How long Envoy lets a connection finish that has lived so long."""
GET_JWKS = "/kimberly.auth.v1.AuthService/GetJwks"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """A mesh of its own, whose sidecars often shake hands."""
    limits = SidecarLimits(connection_seconds=CONNECTION_SECONDS)
    with tempfile.TemporaryDirectory(prefix="kimberly-faults-") as state:
        Path(state).chmod(0o755)
        mesh = Mesh(Layout(Path(state)), workers=1, durable=False, sidecar_limits=limits)
        with in_background(mesh):
            yield mesh


def command(mesh: Mesh, *arguments: str) -> str:
    """Run a command as the operator of the mesh would, and return what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "local", *arguments],
        env=os.environ | {"KIMBERLY_STATE": str(mesh.layout.state)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout.strip()


@dataclass
class Traffic:
    """Calls to every service over both transports, and what became of them."""

    mesh: Mesh
    token: str
    calls: int = 0
    failed: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Call, and now and then connect anew by what is trusted then."""
        while True:
            trust = ssl.create_default_context(cafile=self.mesh.ca)
            async with (
                httpx.AsyncClient(base_url=self.mesh.edge, verify=trust) as http,
                connect(self.mesh.edge.removeprefix("https://"), self.mesh.ca) as client,
            ):
                metadata = (("authorization", f"Bearer {self.token}"),)
                for _ in range(RECONNECT_EVERY):
                    said: dict[str, Any] = {"metadata": metadata, "timeout": 5}
                    listed, done = memory.ListMemoriesRequest(), jobs.ListJobsRequest()
                    await self._count(client.users.GetUser(users.GetUserRequest(), **said))
                    await self._count(client.memory.ListMemories(listed, **said))
                    await self._count(client.jobs.ListJobs(done, **said))
                    for path in ("/v1/user", "/v1/memories", "/v1/jobs"):
                        await self._count(self._get(http, path))
                    await asyncio.sleep(EVERY_SECONDS)

    async def _get(self, http: httpx.AsyncClient, path: str) -> None:
        headers = {"authorization": f"Bearer {self.token}"}
        (await http.get(path, headers=headers)).raise_for_status()

    async def _count(self, call: Awaitable[object]) -> None:
        self.calls += 1
        try:
            await call
        except (grpc.aio.AioRpcError, httpx.HTTPError) as error:
            self.failed.append(repr(error))


@asynccontextmanager
async def traffic(mesh: Mesh) -> AsyncIterator[list[Traffic]]:
    """Keep calling until the context ends."""
    async with signed_up(mesh, "traffic") as user:
        token = user.client.access_token
        loops = [Traffic(mesh, token) for _ in range(LOOPS)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each.run()) for each in loops]
            yield loops
            for task in tasks:
                task.cancel()


async def called(loops: list[Traffic]) -> None:
    """Wait until there were some more calls."""
    before = sum(each.calls for each in loops)

    async def enough() -> bool:
        return sum(each.calls for each in loops) >= before + CALLS_BETWEEN

    await until(enough, 60)


async def handshakes(mesh: Mesh) -> int:
    """Return how many connections sidecars have taken."""
    counts = []
    for process in ("auth", "memory", "jobs"):
        transport = httpx.AsyncHTTPTransport(uds=str(mesh.layout.admin_socket(process)))
        async with httpx.AsyncClient(transport=transport, base_url="http://envoy") as admin:
            stats = (await admin.get("/stats?filter=^listener.127.*.ssl.handshake$")).text
        counts.append(sum(int(line.rpartition(" ")[2]) for line in stats.splitlines()))
    return sum(counts)


@pytest.mark.timeout(240)
async def test_new_certificates_for_everybody_fail_no_call(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    async with traffic(mesh) as loops:
        await called(loops)
        before = await handshakes(mesh)
        for _ in range(ROTATIONS):
            said = await asyncio.to_thread(command, mesh, "rotate-certificates")
            assert said == "5 Envoys show new certificates."
            await called(loops)
        shaken = await handshakes(mesh) - before
    calls, failed = sum(each.calls for each in loops), [each.failed for each in loops]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{calls} calls over {ROTATIONS} rotations of all certificates, with {shaken} "
            f"handshakes between Envoys: {sum(map(len, failed))} failed "
        )
    assert shaken > ROTATIONS
    assert failed == [[]] * LOOPS


@pytest.mark.timeout(240)
async def test_another_authority_fails_no_call_and_who_has_a_certificate_of_the_old_one_is_out(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    async with AsyncExitStack() as stack, traffic(mesh) as loops:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kimberly-"))
        doors = Doors(mesh, Path(directory), stack)
        await called(loops)
        out_after = [await take_over(mesh, doors, loops) for _ in range(AUTHORITIES)]
    calls, failed = sum(each.calls for each in loops), [each.failed for each in loops]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{calls} calls over {AUTHORITIES} changes of the authority: "
            f"{sum(map(len, failed))} failed; connections of the old one were out after "
            f"{', '.join(f'{seconds:.1f} s' for seconds in out_after)}, where connections live "
            f"{CONNECTION_SECONDS} s "
        )
    assert failed == [[]] * LOOPS


async def take_over(mesh: Mesh, doors: Doors, loops: list[Traffic]) -> float:
    """Let another authority take over; return after how long a workload of the old one was out."""
    old = await doors.holder("auth", doors.workload("memory"))
    for step in Step:
        assert await is_let_in(old)
        await asyncio.to_thread(command, mesh, "rotate-authority", step)
        changed = time.monotonic()
        if step is not Step.WITHDRAW:
            await called(loops)

    async def is_out() -> bool:
        return not await is_let_in(old)

    await until(is_out, CONNECTION_SECONDS + DRAIN_SECONDS, pause=0.1)
    out_after = time.monotonic() - changed
    await called(loops)
    assert await is_let_in(await doors.holder("auth", doors.workload("memory")))
    return out_after


async def is_let_in(channel: grpc.aio.Channel) -> bool:
    """Tell whether a workload is served that needs no token."""
    call = channel.unary_unary(GET_JWKS, auth.GetJwksRequest.SerializeToString, bytes)
    try:
        await call(auth.GetJwksRequest(), timeout=5)
    except grpc.aio.AioRpcError:
        return False
    return True
