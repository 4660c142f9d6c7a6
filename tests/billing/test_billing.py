"""Plans, subscriptions, and usage that is counted."""

from __future__ import annotations

import asyncio
from datetime import date

import asyncpg
import pytest
from kimberly.billing.v1 import billing_pb2 as pb

from server.billing.plans import Usage, crossed
from server.billing.store import BillingStore
from server.caller import Caller
from server.database import Database
from server.errors import AccountErased
from tests.billing.conftest import Billing
from tests.conftest import bearer, new_caller
from tests.refusals import refusal_of

MAY = date(2026, 5, 1)


async def change(billing: Billing, caller: Caller, plan: str) -> pb.Subscription:
    request = pb.ChangeSubscriptionRequest(plan=plan)
    return (await billing.ChangeSubscription(request, metadata=bearer(caller))).subscription


async def subscription(billing: Billing, caller: Caller) -> pb.Subscription:
    request = pb.GetSubscriptionRequest()
    return (await billing.GetSubscription(request, metadata=bearer(caller))).subscription


async def test_there_are_two_plans_and_who_never_chose_has_the_free_one(
    billing: Billing, caller: Caller
) -> None:
    plans = (await billing.ListPlans(pb.ListPlansRequest(), metadata=bearer(caller))).plans
    assert [(plan.name, plan.price_cents) for plan in plans] == [("free", 0), ("premium", 900)]
    assert plans[0].calls_per_second < plans[1].calls_per_second
    assert (await subscription(billing, caller)).plan == "free"


async def test_a_dearer_plan_comes_when_it_is_paid_for_and_a_cheaper_one_at_once(
    billing: Billing, store: BillingStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    asked = await change(billing, caller, "premium")
    assert (asked.plan, asked.requested_plan) == ("free", "premium")
    assert asked.HasField("request_time")
    await store.settle(caller, "premium", actor="system")
    paid = await subscription(billing, caller)
    assert (paid.plan, paid.requested_plan) == ("premium", "")
    back = await change(billing, caller, "free")
    assert (back.plan, back.requested_plan) == ("free", "")
    events = await owner.fetch(
        "SELECT action, actor = 'system' AS by_us FROM audit_events ORDER BY id"
    )
    assert [tuple(event) for event in events] == [
        ("subscription.request", False),
        ("subscription.change", True),
        ("subscription.change", False),
    ]


async def test_who_thinks_better_of_it_takes_back_what_they_asked_for(
    billing: Billing, caller: Caller
) -> None:
    await change(billing, caller, "premium")
    await change(billing, caller, "free")
    assert await subscription(billing, caller) == pb.Subscription(plan="free")


async def test_a_plan_that_there_is_not_is_refused(billing: Billing, caller: Caller) -> None:
    for plan in ("", "golden", "free'--"):
        refusal = await refusal_of(change(billing, caller, plan))
        assert refusal.fields == ("plan",)


async def test_what_is_used_adds_up_by_month_and_is_ones_own(
    billing: Billing, store: BillingStore, database: Database, caller: Caller
) -> None:
    other = await new_caller(database)
    used = Usage(writes=2, queries=1, bytes=100)
    await asyncio.gather(
        *(store.add({(caller, MAY): used, (other, MAY): Usage(jobs=1)}) for _ in range(10))
    )
    await store.add({(caller, date(2026, 6, 1)): Usage(queries=3)})
    answer = await billing.ListUsage(pb.ListUsageRequest(), metadata=bearer(caller))
    assert [(each.month, each.used) for each in answer.months] == [
        ("2026-06", pb.MonthlyUsage(queries=3)),
        ("2026-05", pb.MonthlyUsage(writes=20, queries=10, bytes=1000)),
    ]
    others = await billing.ListUsage(pb.ListUsageRequest(), metadata=bearer(other))
    assert [each.used for each in others.months] == [pb.MonthlyUsage(jobs=10)]


async def test_the_audit_log_is_told_once_of_each_share_of_a_plan(
    store: BillingStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    for _ in range(12):
        await store.add({(caller, MAY): Usage(jobs=100)})
    events = await owner.fetch(
        "SELECT resource FROM audit_events WHERE action = 'quota.threshold' ORDER BY id"
    )
    assert [event["resource"] for event in events] == ["usage/jobs/80", "usage/jobs/100"]


def test_both_shares_can_be_crossed_at_once() -> None:
    limits = Usage(10, 10, 10, 10)
    assert list(crossed(Usage(), Usage(writes=10), limits)) == [
        "usage/writes/80",
        "usage/writes/100",
    ]
    assert list(crossed(Usage(writes=8), Usage(writes=9), limits)) == []


async def test_who_is_erased_uses_nothing_and_buys_nothing(
    store: BillingStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    await owner.execute(
        """
        INSERT INTO erasures (id, tenant_id, user_id, receipt_id)
        VALUES (uuidv7(), $1, $2, uuidv4())
        """,
        caller.tenant_id,
        caller.user_id,
    )
    await store.add({(caller, MAY): Usage(jobs=1)})
    assert not await owner.fetchval("SELECT count(*) FROM usage_by_month")
    with pytest.raises(AccountErased):
        await store.settle(caller, "premium")
