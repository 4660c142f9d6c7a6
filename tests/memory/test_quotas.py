"""What a user may keep: exact, whoever writes."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from tests.conftest import bearer
from tests.deciding import write_settings
from tests.memory.calls import Stub, archive, change, create, restore
from tests.refusals import read, refusal_of

KIB = 1024

pytestmark = pytest.mark.usefixtures("plans")


async def limit(owner: asyncpg.Connection, **quotas: int) -> None:
    """Shrink the free plan, so that a test need not write megabytes."""
    for name, size in quotas.items():
        await owner.execute(f"UPDATE plans SET {name}_bytes = $1 WHERE name = 'free'", size)


async def usage(memories: Stub, caller: Caller) -> pb.GetUsageResponse:
    return await memories.GetUsage(pb.GetUsageRequest(), metadata=bearer(caller))


async def used(memories: Stub, caller: Caller) -> dict[int, tuple[int, int]]:
    """Return bytes and number by tier; archived ones as tier 0."""
    answer = await usage(memories, caller)
    tiers = {tier.tier: (tier.used_bytes, tier.count) for tier in answer.tiers}
    return {
        pb.TIER_UNSPECIFIED: (answer.archived_bytes, answer.archived_count),
        pb.TIER_LONG_TERM: tiers[pb.TIER_LONG_TERM],
        pb.TIER_PERMANENT: tiers[pb.TIER_PERMANENT],
    }


async def test_new_user_keeps_nothing_and_has_the_free_plan(memories: Stub, caller: Caller) -> None:
    answer = await usage(memories, caller)
    assert answer.plan == "free"
    assert {tier.tier: (tier.used_bytes, tier.limit_bytes) for tier in answer.tiers} == {
        pb.TIER_SHORT_TERM: (0, 512 * KIB),
        pb.TIER_LONG_TERM: (0, 2 * KIB * KIB),
        pb.TIER_PERMANENT: (0, 10 * KIB * KIB),
    }


async def test_usage_follows_every_change(memories: Stub, caller: Caller) -> None:
    memory = await create(memories, caller, "żółw", tags=["ab"])
    assert (await used(memories, caller))[pb.TIER_LONG_TERM] == (9, 1)
    await create(memories, caller, "żółw", tags=["ab"])
    assert (await used(memories, caller))[pb.TIER_LONG_TERM] == (9, 1)
    await change(memories, caller, memory, content="12345")
    assert (await used(memories, caller))[pb.TIER_LONG_TERM] == (7, 1)
    await change(memories, caller, memory, tier=pb.TIER_PERMANENT)
    assert await used(memories, caller) == {0: (0, 0), 2: (0, 0), 3: (7, 1)}
    await archive(memories, caller, memory)
    assert await used(memories, caller) == {0: (7, 1), 2: (0, 0), 3: (0, 0)}
    await restore(memories, caller, memory)
    assert await used(memories, caller) == {0: (0, 0), 2: (0, 0), 3: (7, 1)}
    await archive(memories, caller, memory)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert await used(memories, caller) == {0: (0, 0), 2: (0, 0), 3: (0, 0)}


async def test_permanent_memory_that_does_not_fit_is_refused_with_used_limit_and_advice(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, permanent=100)
    await create(memories, caller, "x" * 90, tier=pb.TIER_PERMANENT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(memories, caller, "y" * 11, tier=pb.TIER_PERMANENT)
    refusal = read(caught.value)
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    failure = quota_failure(caught.value)
    assert failure.violations[0].subject == "permanent"
    assert "90 of 100 bytes" in failure.violations[0].description
    assert "delete or archive" in failure.violations[0].description
    await create(memories, caller, "z" * 10, tier=pb.TIER_PERMANENT)


def quota_failure(error: grpc.aio.AioRpcError) -> error_details_pb2.QuotaFailure:
    failure = error_details_pb2.QuotaFailure()
    for key, value in cast("Any", error.trailing_metadata() or ()):
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(failure):
                    return failure
    raise AssertionError("no QuotaFailure")


async def test_long_term_memories_may_overrun_by_a_fifth(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, long_term=100)
    await create(memories, caller, "x" * 100)
    await create(memories, caller, "y" * 20)
    refusal = await refusal_of(create(memories, caller, "z"))
    assert refusal.reason == "QUOTA_EXCEEDED"


async def test_change_move_and_restore_are_held_to_the_quota_too(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, permanent=100)
    kept = await create(memories, caller, "x" * 80, tier=pb.TIER_PERMANENT)
    away = await archive(memories, caller, kept)
    full = await create(memories, caller, "y" * 60, tier=pb.TIER_PERMANENT)
    other = await create(memories, caller, "z" * 60)
    for attempt in (
        change(memories, caller, full, content="w" * 101),
        change(memories, caller, other, tier=pb.TIER_PERMANENT),
        restore(memories, caller, away),
    ):
        assert (await refusal_of(attempt)).reason == "QUOTA_EXCEEDED"
    assert await used(memories, caller) == {0: (80, 1), 2: (60, 1), 3: (60, 1)}


async def test_over_quota_a_memory_can_still_shrink_and_go(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "x" * 80, tier=pb.TIER_PERMANENT)
    await limit(owner, permanent=10)
    await change(memories, caller, memory, content="y" * 70)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))


async def test_fifty_writers_at_once_fill_a_quota_to_the_byte(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, permanent=200)
    answers = await asyncio.gather(
        *(create(memories, caller, f"{n:010}", tier=pb.TIER_PERMANENT) for n in range(50)),
        return_exceptions=True,
    )
    kept = [answer for answer in answers if isinstance(answer, pb.Memory)]
    refused = [read(e).reason for e in answers if isinstance(e, grpc.aio.AioRpcError)]
    assert len(kept) == 20
    assert refused == ["QUOTA_EXCEEDED"] * 30
    assert (await used(memories, caller))[pb.TIER_PERMANENT] == (200, 20)


async def test_fifty_identical_creates_store_one_memory(memories: Stub, caller: Caller) -> None:
    kept = await asyncio.gather(*(create(memories, caller, "the same") for _ in range(50)))
    assert len({memory.id for memory in kept}) == 1
    assert (await used(memories, caller))[pb.TIER_LONG_TERM] == (8, 1)


async def test_thresholds_are_recorded_once_each_when_they_are_crossed(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, permanent=100)
    recorded = []
    for letter, size in zip("abcd", (79, 1, 19, 1), strict=True):
        await create(memories, caller, letter * size, tier=pb.TIER_PERMANENT)
        rows = await owner.fetch(
            "SELECT resource FROM audit_events WHERE action = 'quota.threshold' ORDER BY id"
        )
        recorded.append([row["resource"] for row in rows])
    assert recorded == [
        [],
        ["usage/permanent/80"],
        ["usage/permanent/80"],
        ["usage/permanent/80", "usage/permanent/100"],
    ]


async def test_user_may_lower_a_quota_but_not_raise_it(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    for chosen, effective in ((5_000, 5_000), (10**12, 2 * KIB * KIB)):
        await owner.execute("DELETE FROM settings")
        await write_settings(owner, caller, long_term_bytes=chosen)
        tiers = {tier.tier: tier for tier in (await usage(memories, caller)).tiers}
        assert tiers[pb.TIER_LONG_TERM].limit_bytes == effective
