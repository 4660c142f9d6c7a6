"""Serves kimberly.billing.v1.BillingService: parse, act, answer."""

from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.billing.v1 import billing_pb2 as pb
from kimberly.billing.v1 import billing_pb2_grpc as rpc

from server.billing.payments import PaymentProvider
from server.billing.plans import Plan, Subscription, Usage
from server.billing.store import BillingStore
from server.caller import current_caller
from server.errors import InvalidArgument

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class BillingService(rpc.BillingServiceServicer):
    """Serves the signed-in user's subscription."""

    def __init__(self, store: BillingStore, payments: PaymentProvider) -> None:
        self._store = store
        self._payments = payments

    async def ListPlans(
        self, request: pb.ListPlansRequest, context: Context
    ) -> pb.ListPlansResponse:
        """Return the plans."""
        return pb.ListPlansResponse(plans=map(_plan, await self._store.plans()))

    async def GetSubscription(
        self, request: pb.GetSubscriptionRequest, context: Context
    ) -> pb.GetSubscriptionResponse:
        """Return the caller's subscription."""
        found = await self._store.subscription(current_caller())
        return pb.GetSubscriptionResponse(subscription=_subscription(found))

    async def ChangeSubscription(
        self, request: pb.ChangeSubscriptionRequest, context: Context
    ) -> pb.ChangeSubscriptionResponse:
        """Change the caller's plan, or ask for the payment first."""
        caller = current_caller()
        prices = {plan.name: plan.price_cents for plan in await self._store.plans()}
        if request.plan not in prices:
            raise InvalidArgument("plan", f"must be one of {', '.join(prices)}")
        current = await self._store.subscription(caller)
        if prices[request.plan] > prices[current.plan]:
            changed = await self._payments.charge(caller, request.plan)
        else:
            changed = await self._store.settle(caller, request.plan)
        return pb.ChangeSubscriptionResponse(subscription=_subscription(changed))

    async def ListUsage(
        self, request: pb.ListUsageRequest, context: Context
    ) -> pb.ListUsageResponse:
        """Return what the caller used."""
        months = await self._store.used(current_caller())
        return pb.ListUsageResponse(
            months=(
                pb.UsedInMonth(month=f"{each.month:%Y-%m}", used=_usage(each.used))
                for each in months
            )
        )


def _plan(plan: Plan) -> pb.Plan:
    return pb.Plan(
        name=plan.name,
        short_term_bytes=plan.short_term_bytes,
        long_term_bytes=plan.long_term_bytes,
        permanent_bytes=plan.permanent_bytes,
        vectors=plan.vectors,
        calls_per_second=round(plan.rate.calls_per_second),
        burst=plan.rate.burst,
        tenant_calls_per_second=round(plan.tenant_rate.calls_per_second),
        tenant_burst=plan.tenant_rate.burst,
        monthly=_usage(plan.monthly),
        price_cents=plan.price_cents,
    )


def _subscription(subscription: Subscription) -> pb.Subscription:
    shown = pb.Subscription(
        plan=subscription.plan, requested_plan=subscription.requested_plan or ""
    )
    if subscription.requested_at:
        timestamp = Timestamp()
        timestamp.FromDatetime(subscription.requested_at)
        shown.request_time.CopyFrom(timestamp)
    return shown


def _usage(usage: Usage) -> pb.MonthlyUsage:
    return pb.MonthlyUsage(
        writes=usage.writes,
        queries=usage.queries,
        bytes=usage.bytes,
        jobs=usage.jobs,
        embeddings=usage.embeddings,
    )
