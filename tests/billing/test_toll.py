"""Rate limits that processes share, and counts that no call waits for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from kimberly.billing.v1 import billing_pb2 as pb
from kimberly.billing.v1 import billing_pb2_grpc as rpc

from server import ids
from server.billing.payments import ManualPayments
from server.billing.service import BillingService
from server.billing.store import BillingStore
from server.billing.toll import Toll
from server.cache import Redis, open_cache, prefix_of
from server.caller import Caller
from server.database import Database
from server.errors import RateLimited
from server.rpc.interceptors import chain
from server.rpc.serving import Server
from tests.conftest import WORKER_ID, PlainTokens, bearer, new_caller

CREATE = "/kimberly.memory.v1.MemoryService/CreateMemory"
QUERY = "/kimberly.memory.v1.MemoryService/QueryMemories"
SLOW = 0.01
"""Times the free plan: 2 calls a second, 20 at once."""
LONGEST_WAIT = 0.5
BURST, PER_SECOND = 20, 2
TENANTS_BURST, TENANTS_PER_SECOND = 200, 20


def write(toll: Toll, caller: Caller, changes: int = 1) -> None:
    """Count a call of a hundred bytes that changes something."""
    count = toll.meter(caller, CREATE, lambda: 100)
    assert count
    count(changes, 0)


def process(redis: Redis, store: BillingStore, scale: float = SLOW) -> Toll:
    """Return the toll of a process in which no second passes.

    What it has at hand does not lapse then, however slow the machine is.
    """
    return Toll(redis, store, scale=scale, seconds=lambda: 0.0)


class Flow:
    """What flows into a bucket by Valkey's clock, which no test moves."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def at_most(self, burst: float, per_second: float) -> float:
        """Return how many calls a bucket can have given since then."""
        return burst + per_second * (time.monotonic() - self._since)


async def admitted(toll: Toll, caller: Caller, attempts: int) -> int:
    """Return how many of some calls pass."""
    waits = list[float]()
    for _ in range(attempts):
        try:
            await toll.admit(caller)
        except RateLimited as refused:
            waits.append(refused.retry_after.total_seconds())
    assert all(0 < wait <= LONGEST_WAIT for wait in waits)
    return attempts - len(waits)


async def test_a_burst_passes_and_then_no_more_than_the_rate(
    redis: Redis, store: BillingStore, caller: Caller
) -> None:
    toll, flow = process(redis, store), Flow()
    first = await admitted(toll, caller, 60)
    assert BURST <= first <= flow.at_most(BURST, PER_SECOND)
    await asyncio.sleep(1.05)
    later = await admitted(toll, caller, 20)
    assert PER_SECOND <= later <= flow.at_most(BURST, PER_SECOND) - first


async def test_all_processes_share_a_bucket_and_a_restart_fills_none(
    redis: Redis, store: BillingStore, database: Database, caller: Caller
) -> None:
    tolls, flow = [process(redis, store) for _ in range(3)], Flow()
    counts = await asyncio.gather(*(admitted(toll, caller, 40) for toll in tolls))
    assert BURST <= sum(counts) <= flow.at_most(BURST, PER_SECOND)
    restarted = await admitted(process(redis, store), caller, 10)
    assert sum(counts) + restarted <= flow.at_most(BURST, PER_SECOND)
    # Another user has a bucket of their own.
    assert await admitted(tolls[0], await new_caller(database), 10) == 10


async def test_a_larger_plan_admits_more(redis: Redis, store: BillingStore, caller: Caller) -> None:
    await store.settle(caller, "premium")
    flow = Flow()
    count = await admitted(process(redis, store), caller, 200)
    assert 5 * BURST <= count <= flow.at_most(5 * BURST, 10 * PER_SECOND)


async def test_who_changes_much_in_one_call_waits_afterwards_and_not_for_ever(
    redis: Redis, store: BillingStore, database: Database, caller: Caller
) -> None:
    toll, flow = process(redis, store), Flow()
    write(toll, caller, 500)
    await toll.flush()
    # The call itself pays for the first hundred.
    left = BURST - 4
    assert left <= await admitted(toll, caller, 60) <= flow.at_most(left, PER_SECOND)
    other, flow = await new_caller(database), Flow()
    write(toll, other, 100_000)
    await toll.flush()
    with pytest.raises(RateLimited) as refused:
        await toll.admit(other)
    # No longer than the bucket takes to fill, and until the first call after that.
    longest = (BURST + 1) / PER_SECOND
    wait = refused.value.retry_after.total_seconds()
    assert longest - flow.at_most(0, 1) <= wait <= longest


# --- tenants -----------------------------------------------------------------------------------


def colleague(caller: Caller) -> Caller:
    """Return somebody else of the same tenant."""
    return Caller(caller.tenant_id, ids.new_id())


async def until_refused(toll: Toll, whose: Callable[[], Caller]) -> None:
    """Call, less often in a row for one user than they may by themselves."""
    for _ in range(100):
        caller = whose()
        for _ in range(BURST // 2):
            await toll.admit(caller)


async def use_up(toll: Toll, caller: Caller) -> None:
    """Have colleagues call until they are refused."""
    await until_refused(toll, lambda: colleague(caller))


async def test_users_of_a_tenant_share_a_bucket_and_others_have_their_own(
    redis: Redis, store: BillingStore, database: Database, caller: Caller
) -> None:
    tolls, flow = [process(redis, store) for _ in range(2)], Flow()
    everybody = [caller, *(colleague(caller) for _ in range(14))]
    # Each could make 20 calls, but all of them together 200.
    counts = [await admitted(tolls[n % 2], user, 20) for n, user in enumerate(everybody)]
    most = flow.at_most(TENANTS_BURST, TENANTS_PER_SECOND)
    assert TENANTS_BURST <= sum(counts) <= most
    assert counts[0] == 20
    for toll in (*tolls, process(redis, store)):
        with pytest.raises(RateLimited, match="too many calls of this tenant") as refused:
            await use_up(toll, caller)
        assert 0 < refused.value.retry_after.total_seconds() <= LONGEST_WAIT
    assert await admitted(tolls[0], await new_caller(database), 20) == 20


async def test_who_is_refused_for_the_tenant_keeps_the_calls_of_their_own(
    redis: Redis, store: BillingStore, caller: Caller
) -> None:
    toll = process(redis, store)
    with pytest.raises(RateLimited):
        await use_up(toll, caller)
    patient = colleague(caller)
    passed = await admitted(toll, patient, 30)
    key = f"{prefix_of(patient)}calls"
    # What was let through flowed in meanwhile; what was refused took nothing out.
    assert await redis.pttl(key) <= passed * 1000 / PER_SECOND


async def test_who_calls_too_often_is_told_that_it_is_they(
    redis: Redis, store: BillingStore, caller: Caller
) -> None:
    toll = process(redis, store)
    await admitted(toll, caller, BURST)
    with pytest.raises(RateLimited, match="too many calls of this user"):
        await until_refused(toll, lambda: caller)


async def test_a_tenant_has_the_best_that_a_plan_of_its_users_gives(
    store: BillingStore, caller: Caller
) -> None:
    free, premium = [(await store.rates_of(each)).tenant for each in (caller, colleague(caller))]
    assert free == premium
    await store.settle(colleague(caller), "premium")
    rates = await store.rates_of(caller)
    assert rates.tenant.burst > free.burst
    usual = {plan.name: plan.rate for plan in await store.plans()}
    assert rates.own == usual["free"]


@pytest.mark.parametrize("name", ["free", "premium"])
async def test_a_tenant_may_call_far_more_often_than_a_user(store: BillingStore, name: str) -> None:
    plan = next(each for each in await store.plans() if each.name == name)
    assert plan.tenant_rate.calls_per_second >= 10 * plan.rate.calls_per_second
    assert plan.tenant_rate.burst >= 10 * plan.rate.burst


async def test_calls_that_are_fetched_at_the_same_time_are_not_lost(
    redis: Redis, store: BillingStore, caller: Caller
) -> None:
    toll = process(redis, store, scale=1.0)
    crowd = [colleague(caller) for _ in range(50)]
    await asyncio.gather(*(toll.admit(user) for user in crowd))
    taken = sum([await redis.pttl(key) async for key in redis.scan_iter("mesh:*:calls")])
    await asyncio.gather(*(toll.admit(user) for user in crowd for _ in range(10)))
    after = sum([await redis.pttl(key) async for key in redis.scan_iter("mesh:*:calls")])
    # The second time nobody had to ask Valkey.
    assert after <= taken


# --- what is kept ------------------------------------------------------------------------------


async def test_the_bucket_goes_by_itself_and_with_its_user(
    redis: Redis, store: BillingStore, caller: Caller
) -> None:
    await admitted(Toll(redis, store, scale=SLOW), caller, 10)
    (key,) = [each async for each in redis.scan_iter(f"{prefix_of(caller)}*")]
    assert 0 < await redis.pttl(key) <= 10_000


async def test_without_valkey_nobody_is_refused(store: BillingStore, caller: Caller) -> None:
    away = open_cache("redis://127.0.0.1:1/0")
    toll = Toll(away, store, scale=SLOW)
    assert await admitted(toll, caller, 50) == 50
    await away.aclose()


async def test_what_calls_use_is_counted_and_written_a_moment_later(
    redis: Redis, store: BillingStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    toll = Toll(redis, store, clock=lambda: datetime(2026, 5, 31, 23, 59, tzinfo=UTC))
    for _ in range(3):
        write(toll, caller)
    toll.note(caller, QUERY)
    for unmetered in (CREATE, "/kimberly.users.v1.UserService/GetUser"):
        toll.note(caller, unmetered)
    await toll.flush()
    await toll.flush()
    (month,) = await store.used(caller)
    used = month.used
    assert (str(month.month), used.writes, used.queries, used.bytes) == ("2026-05-01", 3, 1, 300)


async def test_counts_that_cannot_be_written_wait(
    redis: Redis, store: BillingStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    toll = Toll(redis, store)
    write(toll, caller)
    await owner.execute("ALTER TABLE usage_by_month RENAME TO gone")
    try:
        await toll.flush()
    finally:
        await owner.execute("ALTER TABLE gone RENAME TO usage_by_month")
    write(toll, caller)
    await toll.flush()
    (month,) = await store.used(caller)
    assert (month.used.writes, month.used.bytes) == (2, 200)


async def test_who_calls_too_often_is_told_when_to_come_back(
    redis: Redis, store: BillingStore, caller: Caller, tmp_path: Path
) -> None:
    os.chmod(tmp_path, 0o700)  # noqa: PTH101 - as a service's directory must be
    toll = Toll(redis, store, scale=SLOW)
    layers = chain(PlainTokens(), worker_id=WORKER_ID, unary_seconds=5, stream_seconds=5, gate=toll)
    server = Server(tmp_path / "s", layers, services=())
    service: Any = BillingService(store, ManualPayments(store))
    rpc.add_BillingServiceServicer_to_server(service, server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        stub = rpc.BillingServiceStub(channel)
        request, mine = pb.GetSubscriptionRequest(), bearer(caller)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.gather(*(stub.GetSubscription(request, metadata=mine) for _ in range(30)))
    await server.grpc.stop(None)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing: Any = caught.value.trailing_metadata()
    status = status_pb2.Status.FromString(dict(trailing)["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert 0 < retry.retry_delay.ToMilliseconds() <= 500
