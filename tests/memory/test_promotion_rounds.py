"""Every night: what has earned it is promoted for every user, by a worker."""

from __future__ import annotations

import asyncpg
import grpc
from kimberly.maintenance.v1 import maintenance_pb2 as maintenance
from kimberly.maintenance.v1 import maintenance_pb2_grpc as maintenance_rpc
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.database import Database
from server.memory.promotion import Promotion
from tests.conftest import FakeClock, as_worker, bearer, new_caller
from tests.deciding import withdraw, write_settings
from tests.memory.calls import Stub, create, delete, get, keep, listed, rate
from tests.refusals import refusal_of
from workers.promotion import PROMOTE, Promoting
from workers.stream import Task

SHORT, LONG = pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM
TASK = Task("job_1", 1, PROMOTE, {}, 1)


async def run(channel: grpc.aio.Channel) -> int:
    promoting = Promoting(channel, metadata=as_worker(), page_size=50)
    return int((await promoting.promote(TASK))["promoted"])


async def test_nightly_run_promotes_what_has_earned_it_of_every_user(
    memories: Stub,
    maintenance_channel: grpc.aio.Channel,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    callers = [await new_caller(database) for _ in range(7)]
    for caller in callers:
        good = await keep(memories, caller, "good")
        await keep(memories, caller, "dull")
        await rate(memories, caller, good, thumbs_up=True)
    assert await run(maintenance_channel) == 7
    for caller in callers:
        assert await listed(memories, caller) == [("dull", SHORT), ("good", LONG)]
    assert await run(maintenance_channel) == 0
    actors = await owner.fetch("SELECT actor FROM audit_events WHERE action = 'memory.promote'")
    assert [row["actor"] for row in actors] == ["system"] * 7


async def test_user_who_withdrew_consent_is_passed_over(
    memories: Stub,
    maintenance_channel: grpc.aio.Channel,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    other = await new_caller(database)
    for whose in (caller, other):
        await rate(memories, whose, await keep(memories, whose, "good"), thumbs_up=True)
    await withdraw(database, caller)
    assert await run(maintenance_channel) == 1
    assert await listed(memories, caller) == [("good", SHORT)]
    assert await listed(memories, other) == [("good", LONG)]


async def test_the_best_are_promoted_as_long_as_there_is_room(
    memories: Stub, maintenance_channel: grpc.aio.Channel, caller: Caller, owner: asyncpg.Connection
) -> None:
    # Long-term memories may overrun by a fifth.
    await write_settings(owner, caller, long_term_bytes=100)
    for content, rating in (("a" * 50, 4), ("b" * 50, 5), ("c" * 60, 4), ("d" * 10, 4)):
        await rate(memories, caller, await keep(memories, caller, content), rating=rating)
    assert await run(maintenance_channel) == 3
    kept = {content[0] for content, tier in await listed(memories, caller) if tier == LONG}
    assert kept in ({"a", "b", "d"}, {"b", "c", "d"})


async def test_text_that_the_long_term_has_counts_there_as_seen(
    memories: Stub, maintenance_channel: grpc.aio.Channel, caller: Caller
) -> None:
    durable = await create(memories, caller, "tea")
    short = await keep(memories, caller, "tea")
    await rate(memories, caller, short, rating=5)
    assert await run(maintenance_channel) == 1
    assert await listed(memories, caller) == [("tea", LONG)]
    seen = await get(memories, caller, durable)
    assert (seen.use_count, seen.feedback) == (1, 1)


async def test_exits_are_forgotten_when_no_copy_can_be_left(
    memories: Stub, maintenance_channel: grpc.aio.Channel, caller: Caller, owner: asyncpg.Connection
) -> None:
    for content in ("old", "new"):
        await delete(memories, caller, await keep(memories, caller, content))
    await owner.execute(
        """
        UPDATE short_term_exits SET left_at = now() - interval '8 days 1 minute'
         WHERE memory_id = (SELECT min(memory_id::text)::uuid FROM short_term_exits)
        """
    )
    await run(maintenance_channel)
    assert await owner.fetchval("SELECT count(*) FROM short_term_exits") == 1


async def test_only_workers_may_promote_for_others(
    maintenance_channel: grpc.aio.Channel, caller: Caller
) -> None:
    stub = maintenance_rpc.MaintenanceServiceStub(maintenance_channel)
    request = maintenance.PromoteShortTermRequest()
    for metadata in (bearer(caller), ()):
        refused = await refusal_of(stub.PromoteShortTerm(request, metadata=metadata))
        assert refused.code in (
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.UNAUTHENTICATED,
        )
    refused = await refusal_of(
        stub.PromoteShortTerm(
            maintenance.PromoteShortTermRequest(page_token="x"), metadata=as_worker()
        )
    )
    assert refused.reason == "PAGE_TOKEN_INVALID"


async def test_more_than_one_page_is_promoted_in_one_go(
    memories: Stub, caller: Caller, promotion: Promotion, clock: FakeClock
) -> None:
    for number in range(120):
        await keep(memories, caller, f"tea {number}", protected=True)
    assert await promotion.promote_earned(caller, clock()) == 120
    assert await promotion.promote_earned(caller, clock()) == 0
