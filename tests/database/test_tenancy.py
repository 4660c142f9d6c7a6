"""The database is a second wall: what a statement forgets to say, row-level security says."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest

from server.caller import Caller
from server.database import Database, open_pool
from server.errors import StoreUnavailable
from tests.conftest import Urls, new_caller

EVERYONE = "SELECT user_id FROM consents"
"""A statement that forgot its WHERE."""


async def test_every_tenant_table_forces_row_level_security(owner: asyncpg.Connection) -> None:
    unprotected = await owner.fetch(
        """
        SELECT class.relname
          FROM pg_class AS class
          JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid
         WHERE class.relnamespace = 'public'::regnamespace AND class.relkind = 'r'
           AND attribute.attname = 'tenant_id'
           AND NOT (class.relrowsecurity AND class.relforcerowsecurity)
        """
    )
    assert not unprotected


async def test_service_roles_own_nothing_and_bypass_nothing(owner: asyncpg.Connection) -> None:
    powers = await owner.fetch(
        """
        SELECT rolname
          FROM pg_roles
         WHERE rolname IN ('kimberly_app', 'kimberly_system', 'kimberly_owner')
           AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb)
        """
    )
    owned = await owner.fetch(
        """
        SELECT relname FROM pg_class
         WHERE relowner IN ('kimberly_app'::regrole, 'kimberly_system'::regrole)
           AND relpersistence <> 't'  -- a batch of scores lasts as long as its connection
        """
    )
    assert not powers
    assert not owned


async def test_statement_without_a_where_sees_only_its_users_rows(
    database: Database, owner: asyncpg.Connection
) -> None:
    mine, _ = await new_caller(database), await new_caller(database)
    async with database.transaction(mine) as connection:
        in_transaction = await connection.fetch(EVERYONE)
    in_one_trip = await database.fetch(mine, EVERYONE)
    assert len(await owner.fetch(EVERYONE)) == 2, "without the wall both would be seen"
    for rows in (in_transaction, in_one_trip):
        assert [row["user_id"] for row in rows] == [mine.user_id]


async def test_same_user_id_in_another_tenant_sees_nothing(database: Database) -> None:
    mine = await new_caller(database)
    impostor = Caller(tenant_id=(await new_caller(database)).tenant_id, user_id=mine.user_id)
    assert not await database.fetch(impostor, EVERYONE)


async def test_nobody_sees_nothing_and_writes_nothing(urls: Urls, database: Database) -> None:
    mine = await new_caller(database)
    pool = await open_pool(urls.application, size=1, name="nobody")
    try:
        await Database(pool).fetch(mine, EVERYONE)
        async with pool.acquire() as connection:  # the very connection that `mine` just used
            assert not await connection.fetch(EVERYONE)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(
                    """
                    INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
                    VALUES ($1, $2, 'memory.store', 2, true)
                    """,
                    mine.tenant_id,
                    mine.user_id,
                )
    finally:
        await pool.close()


async def test_row_for_another_user_is_refused(database: Database) -> None:
    mine, other = await new_caller(database), await new_caller(database)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with database.transaction(mine) as connection:
            await connection.execute(
                """
                INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
                VALUES ($1, $2, 'memory.store', 2, true)
                """,
                other.tenant_id,
                other.user_id,
            )


async def test_a_thousand_interleaved_users_on_four_connections_never_meet(urls: Urls) -> None:
    pool = await open_pool(urls.application, size=4, name="crowd")
    crowd = Database(pool)
    try:
        callers = [await new_caller(crowd) for _ in range(100)]

        async def look(number: int) -> bool:
            caller = callers[number % len(callers)]
            if number % 2:
                rows = await crowd.fetch(caller, EVERYONE)
            else:
                async with crowd.transaction(caller) as connection:
                    rows = await connection.fetch(EVERYONE)
            return [row["user_id"] for row in rows] == [caller.user_id]

        assert all(await asyncio.gather(*(look(number) for number in range(1000))))
    finally:
        await pool.close()


async def test_abandoned_transaction_leaves_neither_rows_nor_a_user(
    database: Database, owner: asyncpg.Connection
) -> None:
    caller = await new_caller(database)
    inside = asyncio.Event()

    async def work() -> None:
        async with database.transaction(caller) as connection:
            await connection.execute(
                """
                INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
                VALUES ($1, $2, 'memory.store', 2, false)
                """,
                caller.tenant_id,
                caller.user_id,
            )
            await connection.execute("SELECT pg_advisory_xact_lock(4711)")
            inside.set()
            await connection.execute("SELECT pg_sleep(60)")

    task = asyncio.create_task(work())
    async with asyncio.timeout(60):
        await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await owner.fetchval("SELECT pg_try_advisory_lock(4711)")
    assert len(await database.fetch(caller, EVERYONE)) == 1


async def test_database_that_went_away_is_unavailable_and_comes_back(
    database: Database, owner: asyncpg.Connection
) -> None:
    caller = await new_caller(database)
    await owner.execute(
        """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE usename = 'kimberly_app' AND pid <> pg_backend_pid()
        """
    )
    # Each connection of the pool learns of its end when it is used, and then makes room.
    answers: list[int] = []
    while not answers:
        with contextlib.suppress(StoreUnavailable):
            answers.append(len(await database.fetch(caller, EVERYONE)))
    assert answers == [1]
