"""Signing keys change under steady traffic: no call fails, and a withdrawn key is dead in 30 s."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from joserfc import jws
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.client import Client, connect
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.faults.conftest import running_mesh
from tests.faults.reach import signed_up, until

PROMISED_SECONDS = 30.0
LOOPS = 4
EVERY_SECONDS = 0.02
REFRESH_EVERY_SECONDS = 2.0
UNTIL_NEW_KEY_SECONDS = 90.0
PASSWORD = "correct horse battery staple"


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """A mesh of its own: a withdrawn key logs out whoever else has a token of it."""
    with running_mesh(request.session) as running:
        yield running


def command(mesh: Mesh, *arguments: str) -> str:
    """Run a command of the server as its operator would, and return what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        env=dict(mesh.process("auth").program.environment),
        cwd=mesh.process("auth").program.directory,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return ended.stdout.splitlines()[-1]


def kid_of(token: str) -> str:
    return str(jws.extract_compact(token.encode()).headers()["kid"])


@dataclass
class Traffic:
    """Calls to every service, one after the other, and what became of them."""

    client: Client
    tokens: auth.Tokens
    by_key: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    async def run(self) -> None:
        refreshed_at = time.monotonic()
        while True:
            if time.monotonic() - refreshed_at > REFRESH_EVERY_SECONDS:
                request = auth.RefreshTokenRequest(refresh_token=self.tokens.refresh_token)
                self.tokens = (await self.client.auth.RefreshToken(request, timeout=5)).tokens
                refreshed_at = time.monotonic()
            try:
                await everything(self.client, self.tokens.access_token)
            except grpc.aio.AioRpcError as error:
                self.failed.append(str(error))
            self.by_key[kid_of(self.tokens.access_token)] += 3
            await asyncio.sleep(EVERY_SECONDS)


async def everything(client: Client, token: str) -> None:
    """Call every service with a token."""
    metadata = (("authorization", f"Bearer {token}"),)
    await client.users.GetUser(users.GetUserRequest(), metadata=metadata, timeout=5)
    await client.memory.ListMemories(memory.ListMemoriesRequest(), metadata=metadata, timeout=5)
    await client.jobs.ListJobs(jobs.ListJobsRequest(), metadata=metadata, timeout=5)


@asynccontextmanager
async def traffic(mesh: Mesh) -> AsyncIterator[list[Traffic]]:
    """Keep calling until the context ends."""
    async with signed_up(mesh, "keys") as user:
        email = (await user.client.users.GetUser(users.GetUserRequest(), timeout=5)).user.email
        login = auth.LogInRequest(email=email, password=PASSWORD)
        # Not the client's own tokens, which it keeps fresh by itself.
        async with connect(mesh.edge.removeprefix("https://"), mesh.ca) as client:
            loops = [
                Traffic(client, (await client.auth.LogIn(login, timeout=5)).tokens)
                for _ in range(LOOPS)
            ]
            tasks = [asyncio.create_task(each.run()) for each in loops]
            yield loops
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.timeout(240)
async def test_a_rotation_fails_no_call_and_a_withdrawn_key_is_refused_within_30_s(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    async with traffic(mesh) as loops:
        old_token = loops[0].tokens.access_token
        old = kid_of(old_token)
        published = time.monotonic()
        new = (await asyncio.to_thread(command, mesh, "rotate-signing-key")).split()[-1]

        async def everybody_is_over() -> bool:
            return all(each.by_key[new] > 100 for each in loops)

        await until(everybody_is_over, UNTIL_NEW_KEY_SECONDS)
        took_over = time.monotonic() - published
        # The old key's tokens are good for as long as they live.
        await everything(loops[0].client, old_token)

        withdrawn = time.monotonic()
        said = await asyncio.to_thread(command, mesh, "withdraw-signing-key", old)
        assert said == f"withdrawn; {new} signs"

        async def is_refused() -> bool:
            answers = [
                await asyncio.gather(everything(loops[0].client, old_token), return_exceptions=True)
                for _ in range(3)
            ]
            return all(isinstance(answer[0], grpc.aio.AioRpcError) for answer in answers)

        await until(is_refused, PROMISED_SECONDS + 10, pause=0.2)
        refused = time.monotonic() - withdrawn
        await asyncio.sleep(3)
    calls = sum(sum(each.by_key.values()) for each in loops)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{calls} calls over a rotation, {sum(len(each.failed) for each in loops)} failed; "
            f"everybody on the new key after {took_over:.0f} s; "
            f"the withdrawn one refused after {refused:.1f} s "
        )
    assert [each.failed for each in loops] == [[]] * LOOPS
    assert refused < PROMISED_SECONDS
