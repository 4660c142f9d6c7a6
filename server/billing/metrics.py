"""What the billing slice measures."""

from typing import Final

from prometheus_client import Gauge

from server.billing.plans import METERED, SHARES
from server.database import SystemDatabase
from server.metrics import set_all

USERS_NEAR_LIMIT: Final = Gauge(
    "billing_usage_users",
    "Users at that percentage of what their plan gives a month.",
    ["meter", "threshold"],
)


USERS: Final = Gauge("billing_users", "Users who used something this month.", ["plan"])
USAGE: Final = Gauge("billing_usage", "What they used this month, all together.", ["plan", "meter"])


class BillingReadings:
    """Reads gauges out of Postgres."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def usage(self) -> None:
        """Count who has used up most of this month's share."""
        (row,) = await self._database.fetch_alone(_NEAR_LIMIT)
        set_all(
            USERS_NEAR_LIMIT,
            {(meter, str(share)): row[f"{meter}_{share}"] for meter in METERED for share in SHARES},
        )

    async def plans(self) -> None:
        """Add up what the users of each plan used this month."""
        rows = await self._database.fetch_alone(_BY_PLAN)
        set_all(USERS, {(row["plan"],): row["users"] for row in rows})
        set_all(
            USAGE, {(row["plan"], meter): float(row[meter]) for row in rows for meter in METERED}
        )


_COUNTS: Final = ", ".join(
    f"count(*) FILTER (WHERE used.{meter} * 100 >= plan.{meter}_per_month * {share})"
    f" AS {meter}_{share}"
    for meter in METERED
    for share in SHARES
)
_NEAR_LIMIT: Final = f"""
    SELECT {_COUNTS}
      FROM usage_by_month AS used
      LEFT JOIN subscriptions AS chosen USING (tenant_id, user_id)
      JOIN plans AS plan ON plan.name = coalesce(chosen.plan, 'free')
     WHERE used.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
"""  # noqa: S608 - constants
_SUMS: Final = ", ".join(f"coalesce(sum(used.{meter}), 0) AS {meter}" for meter in METERED)
_BY_PLAN: Final = f"""
    SELECT plan.name AS plan, count(used.user_id) AS users, {_SUMS}
      FROM plans AS plan
      LEFT JOIN (usage_by_month AS used
                 LEFT JOIN subscriptions AS chosen USING (tenant_id, user_id))
        ON plan.name = coalesce(chosen.plan, 'free')
       AND used.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
     GROUP BY plan.name
"""  # noqa: S608 - constants
