"""Plans, subscriptions and usage in Postgres, as the system role."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Final
from uuid import UUID

from server import audit, ids
from server.billing.plans import Plan, Rates, Subscription, Usage, UsedInMonth, crossed
from server.buckets import Rate
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.embedding_requests import hasten_embedding
from server.errors import InvalidArgument, NotFound

FREE: Final = "free"
"""The plan of who never chose one."""

_MONTHS_SHOWN: Final = 24
_PLAN: Final = """
    plan.name, plan.short_term_bytes, plan.long_term_bytes, plan.permanent_bytes, plan.vectors,
    plan.price_cents, plan.calls_per_second, plan.burst, plan.tenant_calls_per_second,
    plan.tenant_burst, plan.writes_per_month, plan.queries_per_month, plan.bytes_per_month,
    plan.jobs_per_month, plan.embeddings_per_month
"""

Used = Mapping[tuple[Caller, date], Usage]
"""What users used, by user and first day of the month."""


class BillingStore:
    """Reads plans, changes subscriptions, and adds up usage."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def plans(self) -> Sequence[Plan]:
        """Return all plans, the cheapest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"SELECT {_PLAN} FROM plans AS plan ORDER BY price_cents, name"  # noqa: S608 - constants
            )
        return [_plan(row) for row in rows]

    async def rates_of(self, caller: Caller) -> Rates:
        """Return how fast a user may call, and all users of their tenant together.

        A tenant has the best that a plan of somebody in it gives: nobody gets less than they pay
        for because of who else is there.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT own.calls_per_second, own.burst,
                       max(held.tenant_calls_per_second) AS tenant_calls_per_second,
                       max(held.tenant_burst) AS tenant_burst
                  FROM plans AS own
                  JOIN plans AS held
                    ON held.name = own.name
                    OR held.name IN (SELECT plan FROM subscriptions WHERE tenant_id = $1)
                 WHERE own.name = coalesce((SELECT plan FROM subscriptions
                                             WHERE tenant_id = $1 AND user_id = $2), $3)
                 GROUP BY own.name
                """,
                caller.tenant_id,
                caller.user_id,
                FREE,
            )
        return Rates(
            Rate(row["calls_per_second"], row["burst"]),
            Rate(row["tenant_calls_per_second"], row["tenant_burst"]),
        )

    async def find(self, user_id: UUID) -> Caller:
        """Return a user, with their tenant.

        Raises:
            NotFound: There is none.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "SELECT tenant_id, id AS user_id FROM users WHERE id = $1", user_id
            )
        if row is None:
            raise NotFound("user")
        return Caller(**row)

    async def subscription(self, caller: Caller) -> Subscription:
        """Return the subscription of a user."""
        async with self._database.transaction() as connection:
            return await _subscription(connection, caller)

    async def request(self, caller: Caller, plan: str) -> Subscription:
        """Note which plan a user asked for; the one that they have takes that back.

        Raises:
            InvalidArgument: There is no such plan.
            AccountErased: The user is to be erased.
        """
        return await self._set(caller, plan, is_settled=False)

    async def settle(self, caller: Caller, plan: str, *, actor: str | None = None) -> Subscription:
        """Give a user a plan from now on.

        Raises:
            InvalidArgument: There is no such plan.
            AccountErased: The user is to be erased.
        """
        return await self._set(caller, plan, is_settled=True, actor=actor)

    async def _set(
        self, caller: Caller, plan: str, *, is_settled: bool, actor: str | None = None
    ) -> Subscription:
        action = "subscription.change" if is_settled else "subscription.request"
        async with self._database.transaction() as connection:
            await connection.execute(
                "SELECT refuse_erased($1, $2)", caller.tenant_id, caller.user_id
            )
            if not await connection.fetchval("SELECT true FROM plans WHERE name = $1", plan):
                raise InvalidArgument("plan", "must be the name of a plan")
            await connection.execute(
                """
                INSERT INTO subscriptions AS subscription
                       (tenant_id, user_id, plan, requested_plan, requested_at)
                VALUES ($1, $2, CASE WHEN $4 THEN $3 ELSE $5 END,
                        CASE WHEN NOT $4 AND $3 <> $5 THEN $3 END,
                        CASE WHEN NOT $4 AND $3 <> $5 THEN now() END)
                    ON CONFLICT (user_id, tenant_id) DO UPDATE
                   SET plan = CASE WHEN $4 THEN $3 ELSE subscription.plan END,
                       requested_plan = CASE WHEN NOT $4 AND $3 <> subscription.plan THEN $3 END,
                       requested_at = CASE WHEN NOT $4 AND $3 <> subscription.plan THEN now() END
                """,
                caller.tenant_id,
                caller.user_id,
                plan,
                is_settled,
                FREE,
            )
            user_id = ids.show(ids.USER, caller.user_id)
            await audit.record_all(connection, caller, action, [f"{user_id}/{plan}"], actor=actor)
            if is_settled:
                await hasten_embedding(connection, caller)
            return await _subscription(connection, caller)

    async def used(self, caller: Caller) -> Sequence[UsedInMonth]:
        """Return what a user used, the latest month first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT month, writes, queries, bytes, jobs, embeddings
                  FROM usage_by_month
                 WHERE tenant_id = $1 AND user_id = $2
                 ORDER BY month DESC
                 LIMIT $3
                """,
                caller.tenant_id,
                caller.user_id,
                _MONTHS_SHOWN,
            )
        return [UsedInMonth(month, Usage(*used)) for month, *used in rows]

    async def add(self, used: Used) -> None:
        """Add what was used, and tell the audit log of shares of the plan that are reached now.

        Who is erased uses nothing.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                WITH added AS (
                    INSERT INTO usage_by_month AS usage
                           (tenant_id, user_id, month, writes, queries, bytes, jobs)
                    SELECT tenant_id, user_id, month, writes, queries, bytes, jobs
                      FROM unnest($1::uuid[], $2::uuid[], $3::date[], $4::bigint[], $5::bigint[],
                                  $6::bigint[], $7::bigint[])
                           AS noted (tenant_id, user_id, month, writes, queries, bytes, jobs)
                     WHERE NOT is_erased(tenant_id, user_id)
                     -- Processes that add at the same time wait for each other in one order.
                     ORDER BY user_id, tenant_id, month
                        ON CONFLICT (user_id, tenant_id, month) DO UPDATE
                       SET writes = usage.writes + excluded.writes,
                           queries = usage.queries + excluded.queries,
                           bytes = usage.bytes + excluded.bytes,
                           jobs = usage.jobs + excluded.jobs
                    RETURNING tenant_id, user_id,
                              ARRAY[coalesce(old.writes, 0), coalesce(old.queries, 0),
                                    coalesce(old.bytes, 0), coalesce(old.jobs, 0)] AS before,
                              ARRAY[new.writes, new.queries, new.bytes, new.jobs] AS now
                )
                SELECT tenant_id, user_id, before, now, {_PLAN}
                  FROM added
                  LEFT JOIN subscriptions USING (tenant_id, user_id)
                  JOIN plans AS plan ON plan.name = coalesce(subscriptions.plan, $8)
                """,  # noqa: S608 - constants
                *_columns(used),
                FREE,
            )
            for row in rows:
                reached = crossed(Usage(*row["before"]), Usage(*row["now"]), _plan(row).monthly)
                await audit.record_all(
                    connection,
                    Caller(row["tenant_id"], row["user_id"]),
                    "quota.threshold",
                    list(reached),
                    actor=audit.SYSTEM,
                )


def _columns(used: Used) -> list[list[Any]]:
    return [
        [caller.tenant_id for caller, _ in used],
        [caller.user_id for caller, _ in used],
        [month for _, month in used],
        [usage.writes for usage in used.values()],
        [usage.queries for usage in used.values()],
        [usage.bytes for usage in used.values()],
        [usage.jobs for usage in used.values()],
    ]


async def _subscription(connection: Connection, caller: Caller) -> Subscription:
    row = await connection.fetchrow(
        """
        SELECT plan, requested_plan, requested_at
          FROM subscriptions
         WHERE tenant_id = $1 AND user_id = $2
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return Subscription(**row) if row else Subscription(FREE, None, None)


def _plan(row: Mapping[str, Any]) -> Plan:
    return Plan(
        name=row["name"],
        short_term_bytes=row["short_term_bytes"],
        long_term_bytes=row["long_term_bytes"],
        permanent_bytes=row["permanent_bytes"],
        vectors=row["vectors"],
        price_cents=row["price_cents"],
        rate=Rate(row["calls_per_second"], row["burst"]),
        tenant_rate=Rate(row["tenant_calls_per_second"], row["tenant_burst"]),
        monthly=Usage(
            row["writes_per_month"],
            row["queries_per_month"],
            row["bytes_per_month"],
            row["jobs_per_month"],
            row["embeddings_per_month"],
        ),
    )
