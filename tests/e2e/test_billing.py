"""What a user does over either transport is counted once, and shown over both."""

from __future__ import annotations

from typing import Any

from kimberly.billing.v1 import billing_pb2 as billing
from kimberly.memory.v1 import memory_pb2 as pb

from tests.mesh import User, eventually


async def test_calls_over_both_transports_are_counted_together(user: User) -> None:
    for name, transport in user.transports.items():
        await transport(pb.CreateMemoryRequest(memory=pb.Memory(content=f"over {name}")))
        await transport(pb.QueryMemoriesRequest(query="over"))

    async def used() -> Any:
        answers = [await call(billing.ListUsageRequest()) for call in user.transports.values()]
        return answers[-1].months

    months = await eventually(used, lambda seen: seen and seen[0].used.queries == 2)
    assert (len(months), months[0].used.writes, months[0].used.jobs) == (1, 2, 0)
    assert months[0].used.bytes > 20


async def test_a_plan_is_asked_for_over_either_transport(user: User) -> None:
    for transport in user.transports.values():
        plans = (await transport(billing.ListPlansRequest())).plans
        assert [plan.name for plan in plans] == ["free", "premium"]
        request = billing.ChangeSubscriptionRequest(plan="premium")
        asked = (await transport(request)).subscription
        assert (asked.plan, asked.requested_plan) == ("free", "premium")
