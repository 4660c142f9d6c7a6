"""What is read off the stores for Prometheus."""

import math

import asyncpg
from prometheus_client import REGISTRY

from server.backup.metrics import BackupReadings
from server.backup.run_store import RunStore
from server.billing.metrics import BillingReadings
from server.cache import KEY_PREFIX, Redis
from server.database import SystemDatabase
from server.ids import new_id
from server.memory.metrics import ShortTermReading


async def use(owner: asyncpg.Connection, *, plan: str | None, months_ago: int = 0) -> None:
    """Have a new user use something."""
    tenant, user = new_id(), new_id()
    await owner.execute("SET session_replication_role = replica")
    await owner.execute(
        """
        INSERT INTO usage_by_month (tenant_id, user_id, month, writes, queries, bytes, jobs)
        VALUES ($1, $2, (date_trunc('month', now() AT TIME ZONE 'UTC')
                         - make_interval(months => $3))::date, 2, 30, 400, 5000)
        """,
        tenant,
        user,
        months_ago,
    )
    if plan:
        await owner.execute(
            "INSERT INTO subscriptions (tenant_id, user_id, plan) VALUES ($1, $2, $3)",
            tenant,
            user,
            plan,
        )


def told(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_users_and_what_they_use_are_told_by_plan(
    owner: asyncpg.Connection, system_database: SystemDatabase
) -> None:
    readings = BillingReadings(system_database)
    await use(owner, plan=None)
    await use(owner, plan="free")
    await use(owner, plan="free", months_ago=1)
    await readings.plans()
    assert told("billing_users", plan="free") == 2
    assert told("billing_usage", plan="free", meter="queries") == 60
    assert told("billing_users", plan="premium") == 0
    await use(owner, plan="premium")
    await readings.plans()
    assert told("billing_users", plan="premium") == 1
    assert told("billing_usage", plan="premium", meter="jobs") == 5000


async def test_what_the_short_term_tier_holds_is_told(redis: Redis) -> None:
    reading = ShortTermReading(redis)
    await reading.held()
    before = told("memory_bytes", tier="short_term")
    assert before is not None
    await redis.set(f"{KEY_PREFIX}readings", b"x" * 4_000_000, ex=60)
    await reading.held()
    after = told("memory_bytes", tier="short_term")
    assert after is not None
    # Not to the byte: connections of other tests may just have ended.
    assert after >= before + 3_000_000
    await redis.delete(f"{KEY_PREFIX}readings")


async def run(owner: asyncpg.Connection, kind: str, outcome: str, report: str = "{}") -> None:
    """Have a backup, or a verification, have ended."""
    await owner.execute(
        """
        INSERT INTO backup_runs (id, kind, finished_at, outcome, bytes, report)
        VALUES ($1, $2, '2026-05-04T12:00:00Z', $3, 7, $4::text::jsonb)
        """,
        new_id(),
        kind,
        outcome,
        report,
    )


async def test_backups_are_told_of_and_none_is_no_damaged_one(
    owner: asyncpg.Connection, system_database: SystemDatabase
) -> None:
    readings = BackupReadings(RunStore(system_database))
    await readings.newest()
    assert told("backup_last_success_timestamp_seconds") == 0
    assert told("backup_verify_last_success_timestamp_seconds") == 0
    ok = told("backup_verify_ok")
    assert ok is not None
    assert math.isnan(ok)
    await run(owner, "create", "succeeded", '{"mark": "2026-05-04T11:00:00Z"}')
    await run(owner, "verify", "succeeded")
    await readings.newest()
    assert told("backup_last_success_timestamp_seconds") == 1777892400
    assert told("backup_last_bytes") == 7
    assert told("backup_verify_last_success_timestamp_seconds") == 1777896000
    assert told("backup_verify_ok") == 1
    await run(owner, "verify", "failed")
    await readings.newest()
    assert told("backup_verify_ok") == 0
