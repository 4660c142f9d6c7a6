"""Whoever calls too often is told so at every door, and a restart helps nobody."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import json_format
from google.rpc import status_pb2

from local.mesh import Mesh
from local.postgres import SUPERUSER
from server import ids
from server.access import EDGE
from server.turnstile import DEAR
from tests.abuse.doors import Doors
from tests.mesh import User, bearer, eventually, join, sign_up
from tests.transports import Metadata

LOG_IN = "/kimberly.auth.v1.AuthService/LogIn"
SIGN_UP = "/kimberly.auth.v1.AuthService/SignUp"
GET_JWKS = "/kimberly.auth.v1.AuthService/GetJwks"
GET_USER = "/kimberly.users.v1.UserService/GetUser"
OF_AUTH = "/.well-known/openid-configuration"
LIST_MEMORIES = "/kimberly.memory.v1.MemoryService/ListMemories"
MALFORMED = b"\xff\xff\xff"
"""Is counted, and costs nothing else."""
SCALE = 50
"""Of limits in a local mesh."""
LOG_INS = DEAR.rate.burst * SCALE
TENANTS = 20 * SCALE
"""Calls that a crowd may make at once."""
AT_ONCE = 100
KEEPERS = 4
LIMITED = {grpc.StatusCode.RESOURCE_EXHAUSTED}

Codes = Counter[grpc.StatusCode]


async def flood(
    channel: grpc.aio.Channel, method: str, calls: int, *said: Metadata, at_once: int = AT_ONCE
) -> Codes:
    """Call often, saying this and that, and return what was answered."""
    call = channel.unary_unary(method, bytes, bytes)
    metadata = itertools.cycle(said or [()])
    codes = Codes()

    async def one() -> None:
        try:
            await call(MALFORMED, metadata=next(metadata), timeout=30)
        except grpc.aio.AioRpcError as error:
            codes[error.code()] += 1

    for _ in range(calls // at_once):
        await asyncio.gather(*(one() for _ in range(at_once)))
    return codes


def flowed_in(since: float) -> float:
    """Return how many calls a bucket has got back at most, with those that were under way."""
    return (time.monotonic() - since) * SCALE + AT_ONCE


def said_to_come_from(address: str) -> Metadata:
    """Return what the edge says of a call."""
    return (("x-forwarded-for", address),)


async def use_up(channel: grpc.aio.Channel, method: str, metadata: Metadata) -> None:
    """Empty a bucket: call until somebody is refused, for on a slow machine much flows in."""
    async with asyncio.timeout(60):
        while not (await flood(channel, method, AT_ONCE, metadata)).keys() & LIMITED:
            pass


@asynccontextmanager
async def kept_empty(
    channel: grpc.aio.Channel, method: str, metadata: Metadata
) -> AsyncIterator[None]:
    """Empty a bucket, and keep taking what flows in."""
    await use_up(channel, method, metadata)

    async def keep() -> None:
        # A few at a time: many times as fast as they flow in, and little beside all else.
        while True:
            await flood(channel, method, KEEPERS, metadata, at_once=KEEPERS)

    keeping = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


@asynccontextmanager
async def no_log_ins_left(doors: Doors, address: str) -> AsyncIterator[None]:
    """Have the edge say that too many log-ins come from an address."""
    channel = await doors.sidecar("auth", EDGE)
    async with kept_empty(channel, LOG_IN, said_to_come_from(address)):
        yield


async def expect_limited(channel: grpc.aio.Channel, method: str, metadata: Metadata = ()) -> None:
    """Expect a refusal that says when to come back."""

    async def ask() -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(method, bytes, bytes)(
                MALFORMED, metadata=metadata, timeout=30
            )
        return caught.value

    # A call or two may flow in meanwhile.
    error = await eventually(ask, lambda error: error.code() in LIMITED)
    trailing: Any = dict(cast("Any", error.trailing_metadata()))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    expect_retry(json_format.MessageToDict(status)["details"], trailing["retry-after"])


def expect_retry(details: list[dict[str, Any]], after: str) -> None:
    """Expect the delay in both of its forms: the header in whole seconds, never too early."""
    assert details[0]["reason"] == "RATE_LIMITED"
    delay = float(details[1]["retryDelay"].removesuffix("s"))
    assert 0 < delay <= int(after) < delay + 1 + (delay < 1)


def is_limited(response: httpx.Response) -> bool:
    return response.status_code == httpx.codes.TOO_MANY_REQUESTS


async def log_in(address: str, mesh: Mesh, trust: ssl.SSLContext, **headers: str) -> httpx.Response:
    """Log in over REST from an address of this machine."""
    transport = httpx.AsyncHTTPTransport(verify=trust, local_address=address)
    async with httpx.AsyncClient(base_url=mesh.edge, transport=transport, timeout=15) as client:
        body = {"email": "nobody@example.com", "password": "not the password"}
        return await client.post("/v1/login", json=body, headers=headers)


# --- by address --------------------------------------------------------------------------------


async def test_strangers_who_call_too_often_are_refused_on_both_transports_by_their_address(
    mesh: Mesh, trust: ssl.SSLContext, doors: Doors
) -> None:
    here, elsewhere = "127.0.0.21", "127.0.0.22"
    async with no_log_ins_left(doors, here):
        refused = await eventually(lambda: log_in(here, mesh, trust), is_limited)
        assert refused.json()["code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        expect_retry(refused.json()["details"], refused.headers["retry-after"])
        await expect_limited(await doors.edge(here), LOG_IN)
        # Signing up is counted with logging in; what is cheap is not.
        await expect_limited(await doors.edge(here), SIGN_UP)
        cheap = await flood(await doors.edge(here), GET_JWKS, AT_ONCE)
        assert cheap.keys() == {grpc.StatusCode.INVALID_ARGUMENT}
        assert (await log_in(elsewhere, mesh, trust)).status_code == httpx.codes.UNAUTHORIZED


async def test_no_header_gives_a_stranger_another_bucket(doors: Doors) -> None:
    names = ("x-forwarded-for", "x-real-ip", "forwarded", "x-envoy-external-address")
    claims = [tuple((name, f"198.51.100.{number}") for name in names) for number in range(256)]
    channel, began = await doors.edge("127.0.0.23"), time.monotonic()
    codes = await flood(channel, LOG_IN, LOG_INS + 1500, *claims)
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] >= 1500 - flowed_in(began)


async def test_a_customer_of_ipv6_has_one_bucket(doors: Doors) -> None:
    site = f"2001:db8:{secrets.token_hex(2)}"
    channel = await doors.sidecar("auth", EDGE)
    async with no_log_ins_left(doors, f"{site}:1::1"):
        await expect_limited(channel, LOG_IN, said_to_come_from(f"{site}:1:ffff::2"))
        neighbour = await flood(channel, LOG_IN, AT_ONCE, said_to_come_from(f"{site}:2::1"))
    assert neighbour.keys() == {grpc.StatusCode.INVALID_ARGUMENT}


async def test_a_peer_cannot_use_up_the_bucket_of_somebody_else(doors: Doors) -> None:
    address = "203.0.113.9"
    channel = await doors.sidecar("auth", "memory")
    codes = await flood(channel, LOG_IN, LOG_INS + 500, said_to_come_from(address))
    assert codes.keys() == {grpc.StatusCode.INVALID_ARGUMENT}
    edge = await doors.sidecar("auth", EDGE)
    assert (await flood(edge, LOG_IN, AT_ONCE, said_to_come_from(address))).keys() == codes.keys()


async def test_a_restart_fills_no_bucket(mesh: Mesh, doors: Doors) -> None:
    channel, said = await doors.sidecar("auth", EDGE), said_to_come_from("203.0.113.10")
    await use_up(channel, LOG_IN, said)
    emptied = time.monotonic()
    await restart_auth(mesh)
    codes = await flood(channel, LOG_IN, 2000, said)
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] >= 2000 - flowed_in(emptied), codes


async def restart_auth(mesh: Mesh) -> None:
    """Kill auth and wait until it serves again, and the edge has seen that."""
    process = mesh.process("auth")
    restarts = process.restarts
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)

    async def is_back() -> bool:
        return process.restarts > restarts and mesh.is_ready

    await eventually(is_back, bool)
    trust = ssl.create_default_context(cafile=mesh.ca)
    async with httpx.AsyncClient(base_url=mesh.edge, verify=trust, timeout=15) as client:

        async def is_served() -> bool:
            return (await client.get(OF_AUTH)).status_code == httpx.codes.OK

        await eventually(is_served, bool)


# --- by user -----------------------------------------------------------------------------------


Subscribe = Callable[[User], Awaitable[None]]


@asynccontextmanager
async def plan(mesh: Mesh, name: str, **rates: int) -> AsyncIterator[Subscribe]:
    """Make a plan, and return what gives it to users.

    None of them may have called yet: processes remember for a minute which plan they have.
    """
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    await connection.execute(
        """
        INSERT INTO plans
        SELECT (jsonb_populate_record(plan, $1)).*
          FROM plans AS plan
         WHERE name = 'free'
            ON CONFLICT DO NOTHING
        """,
        json.dumps({"name": name, **rates}),
    )

    async def subscribe(user: User) -> None:
        await connection.execute(
            "INSERT INTO subscriptions (tenant_id, user_id, plan) VALUES ($1, $2, $3)",
            ids.parse(ids.TENANT, user.tenant_id, "tenant"),
            ids.parse(ids.USER, user.id, "user"),
            name,
        )

    yield subscribe
    # The mesh is everybody's, and its plans are listed.
    await connection.execute("DELETE FROM subscriptions WHERE plan = $1", name)
    await connection.execute("DELETE FROM plans WHERE name = $1", name)
    await connection.close()


@pytest_asyncio.fixture
async def slow(
    mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel
) -> AsyncIterator[User]:
    """Somebody whose plan is worth a call a second, and twenty at once."""
    user = await sign_up(http, channel, consenting=False)
    async with plan(mesh, "slow", calls_per_second=1, burst=20) as subscribe:
        await subscribe(user)
        yield user


async def test_a_user_who_calls_too_often_is_refused_by_every_service_on_both_transports(
    slow: User, bob: User, channel: grpc.aio.Channel
) -> None:
    async with kept_empty(channel, GET_USER, bearer(slow.token)):
        for method in (GET_USER, LIST_MEMORIES):
            await expect_limited(channel, method, bearer(slow.token))
        refused = await eventually(lambda: slow.rest.raw("GET", "/v1/user"), is_limited)
        expect_retry(refused.json()["details"], refused.headers["retry-after"])
        assert (await bob.rest.raw("GET", "/v1/user")).status_code == httpx.codes.OK


async def test_a_restart_fills_no_bucket_of_a_user(
    mesh: Mesh, slow: User, channel: grpc.aio.Channel
) -> None:
    await use_up(channel, GET_USER, bearer(slow.token))
    emptied = time.monotonic()
    await restart_auth(mesh)
    codes = await flood(channel, GET_USER, 1000, bearer(slow.token))
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] >= 1000 - flowed_in(emptied), codes


# --- by tenant ---------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def crowd(
    mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel
) -> AsyncIterator[list[User]]:
    """Three users of a tenant that may make a call a second, and twenty at once."""
    users = [await sign_up(http, channel, consenting=False)]
    async with plan(mesh, "crowded", tenant_calls_per_second=1, tenant_burst=20) as subscribe:
        await subscribe(users[0])
        for _ in range(2):
            users.append(await join(mesh, http, channel, users[0], consenting=False))
            await subscribe(users[-1])
        yield users


async def test_users_of_a_tenant_who_call_too_often_together_are_refused_and_no_others(
    mesh: Mesh, doors: Doors, crowd: list[User], bob: User, channel: grpc.aio.Channel
) -> None:
    claims = [
        (*bearer(user.token), ("x-forwarded-for", f"198.51.100.{number}"))
        for number, user in enumerate(crowd)
    ]
    began = time.monotonic()
    codes = await flood(channel, GET_USER, 2000, *claims)
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] >= 2000 - TENANTS - flowed_in(began), codes
    assert grpc.StatusCode.UNAVAILABLE not in codes
    async with kept_empty(channel, GET_USER, bearer(crowd[0].token)):
        for user in crowd:
            for method in (GET_USER, LIST_MEMORIES):
                await expect_limited(channel, method, bearer(user.token))
            refused = await eventually(partial(user.rest.raw, "GET", "/v1/user"), is_limited)
            assert "of this tenant" in refused.json()["message"]
            expect_retry(refused.json()["details"], refused.headers["retry-after"])
        # Past the edge there is no other bucket.
        sidecar = await doors.sidecar("auth", EDGE)
        await expect_limited(sidecar, GET_USER, bearer(crowd[1].token))
        assert (await bob.rest.raw("GET", "/v1/user")).status_code == httpx.codes.OK
    emptied = time.monotonic()
    await restart_auth(mesh)
    codes = await flood(channel, GET_USER, 1000, *claims)
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] >= 1000 - flowed_in(emptied), codes
