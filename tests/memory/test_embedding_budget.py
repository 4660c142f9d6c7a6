"""What a local model may do for a user in a month: counted, bounded, and told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import pytest_asyncio
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from server.billing.plans import Usage
from server.billing.store import BillingStore
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.jobs.queue import Queue
from tests.memory.embedding_calls import lease, states, streaming, vectors, work
from tests.remembering import remember

TEXTS = ("one", "two", "three", "four", "five")


@pytest_asyncio.fixture(autouse=True)
async def plans(owner: asyncpg.Connection) -> AsyncIterator[None]:
    """Three embeddings a month for who pays nothing, and four for who pays."""
    budgets = await owner.fetch("SELECT name, embeddings_per_month FROM plans")
    await owner.execute(
        "UPDATE plans SET embeddings_per_month = CASE name WHEN 'free' THEN 3 ELSE 4 END"
    )
    yield
    await owner.executemany(
        "UPDATE plans SET embeddings_per_month = $2 WHERE name = $1",
        [tuple(row) for row in budgets],
    )


@pytest.fixture
def billing(system_database: SystemDatabase) -> BillingStore:
    return BillingStore(system_database)


async def used(billing: BillingStore, caller: Caller) -> list[Usage]:
    return [each.used for each in await billing.used(caller)]


def next_month() -> datetime:
    """Return its first instant, by another reckoning than the database's."""
    today = datetime.now(UTC)
    in_next = today.replace(day=1) + timedelta(days=32)
    return in_next.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


async def test_job_stops_where_the_budget_does_and_says_why(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
    billing: BillingStore,
) -> None:
    await remember(database, chooser, *TEXTS)
    batches, done = await work(embedding, queue)
    assert batches == [["one", "two"], ["three"]]
    assert done.kept == 3
    assert done.stopped == (
        "what the plan gives of embeddings in a month is used up: it goes on "
        f"{next_month():%Y-%m-%d}, or as soon as there is a larger plan; "
        "texts without a vector until then: 2"
    )
    assert sorted(await vectors(owner)) == ["one", "three", "two"]
    assert await used(billing, chooser) == [Usage(embeddings=3)]
    told = await owner.fetch(
        "SELECT actor FROM audit_events WHERE resource = 'usage/embeddings/100'"
    )
    assert [event["actor"] for event in told] == ["system"]


async def test_what_is_written_meanwhile_makes_no_further_jobs_and_the_next_month_goes_on(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
    billing: BillingStore,
) -> None:
    await remember(database, chooser, *TEXTS)
    await work(embedding, queue)
    await remember(database, chooser, "six")
    assert await states(owner) == ["succeeded", "waiting"]
    run_at = await owner.fetchval("SELECT run_at FROM jobs WHERE state = 'waiting'")
    assert run_at == next_month()
    assert not await queue.lease("worker", ["embedding.batch"], 1)

    await owner.execute(
        """
        UPDATE usage_by_month SET month = month - interval '1 month';
        UPDATE jobs SET run_at = run_at - interval '1 month' WHERE state = 'waiting'
        """
    )
    await queue.admit()
    batches, done = await work(embedding, queue)
    assert (batches, done.stopped) == ([["four", "five"], ["six"]], "")
    assert await used(billing, chooser) == [Usage(embeddings=3), Usage(embeddings=3)]
    assert await states(owner) == ["succeeded", "succeeded"]


async def test_larger_plan_goes_on_at_once_as_far_as_it_reaches(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    billing: BillingStore,
) -> None:
    await remember(database, chooser, *TEXTS)
    await work(embedding, queue)
    await billing.request(chooser, "premium")
    assert not await queue.lease("worker", ["embedding.batch"], 1)
    await billing.settle(chooser, "premium")
    batches, done = await work(embedding, queue)
    assert (batches, bool(done.stopped)) == ([["four"]], True)
    assert await used(billing, chooser) == [Usage(embeddings=4)]
    budgets = {plan.name: plan.monthly.embeddings for plan in await billing.plans()}
    assert budgets[(await billing.subscription(chooser)).plan] == 4


async def test_budget_that_just_suffices_ends_the_job_without_a_word(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, *TEXTS[:3])
    _, done = await work(embedding, queue)
    assert (done.kept, done.stopped) == (3, "")
    assert await states(owner) == ["succeeded"]


async def test_nothing_counts_of_a_batch_that_was_not_kept(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
    billing: BillingStore,
) -> None:
    await remember(database, chooser, *TEXTS[:2])
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held)
        batch = await stream.batch()
        # The lease passes to another worker before the answer comes.
        await owner.execute("UPDATE jobs SET lease_token = lease_token + 1")
        await stream.answer(batch)
        assert (await stream.refused()).reason == "LEASE_LOST"
    assert await used(billing, chooser) == []


async def test_other_users_and_their_own_columns_are_out_of_reach(
    chooser: Caller, database: Database
) -> None:
    for statement in (
        """
        INSERT INTO usage_by_month (tenant_id, user_id, month, embeddings)
        VALUES ($1, uuidv7(), this_month(), 1)
        """,
        """
        INSERT INTO usage_by_month (tenant_id, user_id, month, writes)
        VALUES ($1, current_user_id(), this_month(), 1)
        """,
        "UPDATE usage_by_month SET queries = 0 WHERE tenant_id = $1",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with database.transaction(chooser) as connection:
                await connection.execute(statement, chooser.tenant_id)
