"""The billing service of one test, behind the real chain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeAlias

import pytest
import pytest_asyncio
from kimberly.billing.v1 import billing_pb2_grpc as rpc

from server.billing.payments import ManualPayments
from server.billing.service import BillingService
from server.billing.store import BillingStore
from server.database import SystemDatabase
from tests.conftest import Serve

Billing: TypeAlias = "rpc.BillingServiceAsyncStub"


@pytest.fixture
def store(system_database: SystemDatabase) -> BillingStore:
    """Plans, subscriptions and usage."""
    return BillingStore(system_database)


@pytest_asyncio.fixture
async def billing(serve: Serve, store: BillingStore) -> AsyncIterator[Billing]:
    """A stub of the billing service."""
    service = BillingService(store, ManualPayments(store))
    channel = await serve(lambda server: rpc.add_BillingServiceServicer_to_server(service, server))
    yield rpc.BillingServiceStub(channel)
