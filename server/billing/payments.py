"""Who settles payments: an interface, and the provider that needs no paid service."""

from typing import Protocol

from server.billing.plans import Subscription
from server.billing.store import BillingStore
from server.caller import Caller


class PaymentProvider(Protocol):
    """Has a user pay for a plan."""

    async def charge(self, caller: Caller, plan: str) -> Subscription:
        """Ask for the payment, and return the subscription as it is then: settled, or waiting."""


class ManualPayments:
    """Waits for an operator, who was paid somehow: `python -m server set-plan`."""

    def __init__(self, store: BillingStore) -> None:
        self._store = store

    async def charge(self, caller: Caller, plan: str) -> Subscription:
        """Note what was asked for."""
        return await self._store.request(caller, plan)
