"""What the memory process tells Prometheus of what is kept."""

from __future__ import annotations

import asyncpg
import pytest
from prometheus_client import REGISTRY

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.meditation_store import MeditationStore
from server.memory.metrics import MemoryReadings
from tests.conftest import new_caller
from tests.memory.calls import Stub, archive, create
from tests.refusals import refusal_of

pytestmark = pytest.mark.usefixtures("plans")


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_users_are_counted_at_each_share_of_a_quota(
    memories: Stub, caller: Caller, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await owner.execute("UPDATE plans SET long_term_bytes = 100 WHERE name = 'free'")
    readings = MemoryReadings(system_database)

    async def near() -> list[float]:
        await readings.usage()
        return [
            value("memory_quota_usage_users", tier="long_term", threshold=share)
            for share in ("80", "100")
        ]

    await create(memories, caller, "a" * 79)
    assert await near() == [0, 0]
    await create(memories, caller, "b")
    assert await near() == [1, 0]
    await create(memories, caller, "c" * 20)
    assert await near() == [1, 1]
    refused = value("memory_quota_refusals_total", tier="long_term")
    assert (await refusal_of(create(memories, caller, "d" * 80))).reason == "QUOTA_EXCEEDED"
    assert value("memory_quota_refusals_total", tier="long_term") == refused + 1


async def test_memories_are_counted_by_tier_and_by_what_became_of_them(
    memories: Stub, caller: Caller, system_database: SystemDatabase
) -> None:
    changed = {
        change: value("memory_items_changed_total", change=change)
        for change in ("created", "archived")
    }
    for content in ("one", "two", "three"):
        memory = await create(memories, caller, content)
    await archive(memories, caller, memory)
    await MemoryReadings(system_database).usage()
    assert value("memory_items", tier="long_term", state="active") == 2
    assert value("memory_items", tier="archived", state="archived") == 1
    assert value("memory_bytes", tier="long_term") == len("onetwo")
    assert value("memory_items_changed_total", change="created") == changed["created"] + 3
    assert value("memory_items_changed_total", change="archived") == changed["archived"] + 1


async def test_the_last_meditation_of_all_users_is_told(
    system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    readings = MemoryReadings(system_database)
    await readings.meditations()
    assert value("memory_meditation_last_success_timestamp_seconds") == 0
    await owner.execute(
        """
        INSERT INTO meditations (id, shards, state, created_at, finished_at)
        VALUES (uuidv7(), 1, 'succeeded', to_timestamp(1000), to_timestamp(1090))
        """
    )
    await readings.meditations()
    assert value("memory_meditation_last_success_timestamp_seconds") == 1090
    assert value("memory_meditation_last_duration_seconds") == 90
    assert value("memory_meditation_running") == 0


async def test_meditations_that_no_job_goes_on_with_are_counted_by_what_became_of_theirs(
    meditations: MeditationStore,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    readings = MemoryReadings(system_database)

    async def interrupted() -> list[float]:
        await readings.interrupted()
        name = "memory_meditation_interrupted"
        return [value(name, outcome=outcome) for outcome in ("failed", "cancelled")]

    callers = [await new_caller(database) for _ in range(3)]
    for each in callers:
        await meditations.start(each, "")
    assert await interrupted() == [0, 0]
    failed, cancelled, _ = callers
    for caller, state in ((failed, "dead"), (cancelled, "cancelled")):
        await owner.execute(
            "UPDATE jobs SET state = $2, finished_at = now() WHERE user_id = $1",
            caller.user_id,
            state,
        )
    assert await interrupted() == [1, 1]
    # Whoever asks again has it taken up again.
    await meditations.start(failed, "")
    assert await interrupted() == [0, 1]
