"""Callers without a token are counted by where they call from, whichever process they reach."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server.access import METHODS, Access
from server.cache import KEY_PREFIX, Redis, open_cache
from server.rpc.interceptors import chain
from server.rpc.serving import Server
from server.turnstile import DEAR, LIMITS, Turnstile
from tests.conftest import EDGE_ID, WORKER_ID, PlainTokens, as_worker, through_edge

LOG_IN = "/kimberly.auth.v1.AuthService/LogIn"
SIGN_UP = "/kimberly.auth.v1.AuthService/SignUp"
REFRESH = "/kimberly.auth.v1.AuthService/RefreshToken"
ATTEMPTS = 40
SLOW = 0.1
"""Ten log-ins, and one more every ten seconds."""
BURST, APART_SECONDS = 10, 10
PATIENCE_SECONDS = 30


@pytest.fixture
def home() -> str:
    """An address of which nobody has called."""
    return ".".join(["10", *(str(byte) for byte in secrets.token_bytes(3))])


@pytest.fixture
def most() -> Callable[[], float]:
    """Return how many log-ins a bucket can have let in since the test began."""
    began = time.monotonic()
    return lambda: BURST + (time.monotonic() - began) / APART_SECONDS


class Nothing(grpc.GenericRpcHandler):  # type: ignore[type-arg] # generic in the stubs only
    """Answers every method with nothing."""

    def service(self, details: Any) -> Any:
        async def answer(request: Any, context: Any) -> bytes:
            return b""

        return grpc.unary_unary_rpc_method_handler(answer, _Raw, bytes)


class _Raw(bytes):
    """Bytes that know their size, as messages do."""

    def ByteSize(self) -> int:
        return len(self)


@asynccontextmanager
async def serving(parent: Path, turnstile: Turnstile) -> AsyncIterator[grpc.aio.Channel]:
    directory = Path(mkdtemp(dir=parent))
    layers = chain(
        PlainTokens(),
        worker_id=WORKER_ID,
        edge_id=EDGE_ID,
        unary_seconds=PATIENCE_SECONDS,
        stream_seconds=PATIENCE_SECONDS,
        turnstile=turnstile,
    )
    server = Server(directory / "s", layers, services=())
    server.grpc.add_generic_rpc_handlers((Nothing(),))
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{directory / 's'}") as channel:
        yield channel
    await server.grpc.stop(None)


async def admitted(
    channel: grpc.aio.Channel, *said: tuple[tuple[str, str], ...], method: str = LOG_IN
) -> int:
    """Return how many of some calls pass that say this or that of themselves."""
    call = channel.unary_unary(method, bytes, bytes)
    sent = [
        call(b"", metadata=said[n % len(said)], timeout=PATIENCE_SECONDS) for n in range(ATTEMPTS)
    ]
    answers = await asyncio.gather(*sent, return_exceptions=True)
    refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
    assert {each.code() for each in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    return len(answers) - len(refused)


async def test_processes_share_the_bucket_of_an_address_and_a_restart_fills_none(
    redis: Redis, tmp_path: Path, home: str, most: Callable[[], float]
) -> None:
    here = through_edge(home)
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(serving(tmp_path, Turnstile(redis, scale=SLOW)))
            for _ in range(2)
        ]
        counts = await asyncio.gather(*(admitted(channel, here) for channel in channels))
        assert BURST <= sum(counts) <= most()
    async with serving(tmp_path, Turnstile(redis, scale=SLOW)) as channel:
        assert sum(counts) + await admitted(channel, here) <= most()
        assert BURST <= await admitted(channel, through_edge("192.0.2.2")) <= most()


async def test_what_is_dear_is_counted_together_and_apart_from_what_is_cheap(
    redis: Redis, tmp_path: Path, home: str, most: Callable[[], float]
) -> None:
    here = through_edge(home)
    async with serving(tmp_path, Turnstile(redis, scale=SLOW)) as channel:
        count = await admitted(channel, here)
        assert BURST <= count <= most()
        assert count + await admitted(channel, here, method=SIGN_UP) <= most()
        assert await admitted(channel, here, method=REFRESH) == ATTEMPTS


async def test_a_customer_of_ipv6_is_one_place_however_many_addresses_they_have(
    redis: Redis, tmp_path: Path, most: Callable[[], float]
) -> None:
    site = f"2001:db8:{secrets.token_hex(2)}"
    addresses = [through_edge(f"{site}:2::{number:x}") for number in range(1, ATTEMPTS)]
    async with serving(tmp_path, Turnstile(redis, scale=SLOW)) as channel:
        assert BURST <= await admitted(channel, *addresses) <= most()
        assert BURST <= await admitted(channel, through_edge(f"{site}:3::1")) <= most()


async def test_only_the_edge_says_where_a_call_comes_from(
    redis: Redis, tmp_path: Path, home: str, most: Callable[[], float]
) -> None:
    # Else a peer could use up somebody's bucket. Peers themselves are not counted.
    said = (*as_worker(), ("x-forwarded-for", home))
    claimed = [through_edge(f"192.0.2.{number}, {home}") for number in range(ATTEMPTS)]
    async with serving(tmp_path, Turnstile(redis, scale=SLOW)) as channel:
        assert await admitted(channel, said) == ATTEMPTS
        assert BURST <= await admitted(channel, *claimed) <= most()


async def test_who_is_refused_is_told_when_to_come_back(
    redis: Redis, tmp_path: Path, home: str
) -> None:
    began = time.monotonic()
    async with serving(tmp_path, Turnstile(redis, scale=SLOW)) as channel:
        await admitted(channel, through_edge(home))
        call = channel.unary_unary(LOG_IN, bytes, bytes)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", metadata=through_edge(home), timeout=PATIENCE_SECONDS)
    trailing: Any = dict(cast("Any", caught.value.trailing_metadata()))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "RATE_LIMITED"
    assert status.details[1].Unpack(retry)
    delay = retry.retry_delay.ToTimedelta().total_seconds()
    assert APART_SECONDS - (time.monotonic() - began) <= delay <= APART_SECONDS
    assert trailing["retry-after"] == f"{math.ceil(delay)}"


async def test_without_valkey_nobody_is_refused(tmp_path: Path, home: str) -> None:
    away = open_cache("redis://127.0.0.1:1/0")
    async with serving(tmp_path, Turnstile(away, scale=SLOW)) as channel:
        assert await admitted(channel, through_edge(home)) == ATTEMPTS
    await away.aclose()


async def test_the_bucket_of_an_address_goes_by_itself(
    redis: Redis, tmp_path: Path, home: str
) -> None:
    async with serving(tmp_path, Turnstile(redis)) as channel:
        await admitted(channel, through_edge(home))
    (key,) = [each async for each in redis.scan_iter(f"{KEY_PREFIX}places:*{home}*")]
    assert 0 < await redis.pttl(key) <= ATTEMPTS / DEAR.rate.calls_per_second * 1000


def test_what_is_dear_is_open_to_anyone() -> None:
    assert {METHODS[method] for method in LIMITS} == {Access.ANYONE}
