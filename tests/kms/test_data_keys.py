"""One data key a user: wrapped, made once, and shredded for good."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import asyncpg
import pytest
import structlog

from server import ids
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase
from server.errors import ContentUnreadable, StoreUnavailable
from server.kms.vault import VaultKms
from server.memory.sealing import binding, seal, unseal
from tests.conftest import new_caller
from tests.kms.conftest import Master
from tests.kms.vault_server import VaultServer


class Stopwatch:
    """Monotonic seconds that stand still until a test adds some."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def key_of(keys: DataKeys, database: Database, caller: Caller) -> bytes:
    async with database.transaction(caller) as connection:
        return await keys.key_of(connection, caller)


async def shred(keys: DataKeys, system: SystemDatabase, caller: Caller) -> None:
    async with system.transaction() as connection:
        await keys.shred(connection, caller)


async def test_user_has_one_key_and_every_process_finds_it(
    master: Master, database: Database, caller: Caller
) -> None:
    key = await key_of(DataKeys(database, master.kms), database, caller)
    assert len(key) == 32
    other_process = DataKeys(database, master.kms)
    assert await key_of(other_process, database, caller) == key
    assert await other_process.existing_key_of(caller) == key


async def test_two_users_have_two_keys(
    master: Master, database: Database, owner: asyncpg.Connection
) -> None:
    keys = DataKeys(database, master.kms)
    ada, bob = await new_caller(database), await new_caller(database)
    assert await key_of(keys, database, ada) != await key_of(keys, database, bob)
    rows = await owner.fetch("SELECT user_id, kms_version FROM user_keys")
    assert {row["user_id"] for row in rows} == {ada.user_id, bob.user_id}
    assert {row["kms_version"] for row in rows} == {await master.kms.newest_version()}


async def test_database_holds_no_key_in_the_clear(
    master: Master, database: Database, caller: Caller, owner: asyncpg.Connection
) -> None:
    key = await key_of(DataKeys(database, master.kms), database, caller)
    row = await owner.fetchrow("SELECT wrapped, user_keys::text AS whole FROM user_keys")
    assert key not in row["wrapped"]
    assert key.hex() not in row["whole"]


async def test_those_who_make_a_key_at_once_end_with_one(
    master: Master, database: Database, caller: Caller, owner: asyncpg.Connection
) -> None:
    together = asyncio.Barrier(8)

    async def make(number: int) -> bytes:
        process = DataKeys(database, master.kms)
        if number % 2:
            await together.wait()
            await process.prepare(caller)
            return await process.existing_key_of(caller)
        async with database.transaction(caller) as connection:
            await together.wait()
            return await process.key_of(connection, caller)

    assert len(set(await asyncio.gather(*map(make, range(8))))) == 1
    assert await owner.fetchval("SELECT count(*) FROM user_keys") == 1


async def test_key_of_a_transaction_that_fails_is_nobodys(
    master: Master, database: Database, caller: Caller, owner: asyncpg.Connection
) -> None:
    keys = DataKeys(database, master.kms)
    lost = b""
    with suppress(RuntimeError):
        async with database.transaction(caller) as connection:
            lost = await keys.key_of(connection, caller)
            raise RuntimeError
    assert lost
    assert await owner.fetchval("SELECT count(*) FROM user_keys") == 0
    assert await key_of(keys, database, caller) != lost


async def test_reading_makes_no_key(
    master: Master, database: Database, caller: Caller, owner: asyncpg.Connection
) -> None:
    with pytest.raises(ContentUnreadable):
        await DataKeys(database, master.kms).existing_key_of(caller)
    assert await owner.fetchval("SELECT count(*) FROM user_keys") == 0


async def test_prepared_key_needs_no_key_manager_in_the_transaction_for_a_minute(
    vault: VaultKms, vault_server: VaultServer, database: Database, caller: Caller
) -> None:
    stopwatch = Stopwatch()
    keys = DataKeys(database, vault, stopwatch)
    await keys.prepare(caller)
    vault_server.failures.extend([(503, b"")] * 100)
    stopwatch.now += 59
    key = await key_of(keys, database, caller)
    stopwatch.now += 1
    with pytest.raises(StoreUnavailable):
        await key_of(keys, database, caller)
    vault_server.failures.clear()
    assert await key_of(keys, database, caller) == key


async def test_a_thousand_keys_are_remembered_and_no_more(
    vault: VaultKms, vault_server: VaultServer, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.data_keys._REMEMBERED_KEYS", 2)
    keys = DataKeys(database, vault)
    crowd = [await new_caller(database) for _ in range(3)]
    for caller in crowd:
        await keys.prepare(caller)
    asked = len(vault_server.seen)
    for caller in crowd[1:]:
        await keys.prepare(caller)
    assert len(vault_server.seen) == asked
    await keys.prepare(crowd[0])
    assert len(vault_server.seen) == asked + 1


async def test_shredded_content_opens_with_nothing_that_is_left(
    master: Master,
    database: Database,
    system_database: SystemDatabase,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    keys, other_process = DataKeys(database, master.kms), DataKeys(database, master.kms)
    bound_to = binding(caller, ids.new_id())
    sealed = seal(await key_of(keys, database, caller), "PIN 4711", bound_to)
    assert unseal(await other_process.existing_key_of(caller), sealed, bound_to) == "PIN 4711"
    await shred(keys, system_database, caller)
    assert await owner.fetchval("SELECT count(*) FROM user_keys") == 0
    for process in (keys, other_process):  # one that knows of it, one that remembers the key
        with pytest.raises(ContentUnreadable):
            await process.existing_key_of(caller)
    again = await key_of(other_process, database, caller)
    for process in (keys, other_process):
        assert await process.existing_key_of(caller) == again
    with pytest.raises(ContentUnreadable):
        unseal(again, sealed, bound_to)


async def test_shredding_one_user_leaves_others_alone(
    master: Master, database: Database, system_database: SystemDatabase
) -> None:
    keys = DataKeys(database, master.kms)
    ada, bob = await new_caller(database), await new_caller(database)
    key = await key_of(keys, database, bob)
    await key_of(keys, database, ada)
    await shred(keys, system_database, ada)
    assert await keys.existing_key_of(bob) == key


async def test_shredding_that_is_rolled_back_shreds_nothing(
    master: Master, database: Database, system_database: SystemDatabase, caller: Caller
) -> None:
    keys = DataKeys(database, master.kms)
    key = await key_of(keys, database, caller)
    with suppress(RuntimeError):
        async with system_database.transaction() as connection:
            await keys.shred(connection, caller)
            raise RuntimeError
    assert await keys.existing_key_of(caller) == key


async def test_copy_of_the_database_opens_until_the_master_key_that_wrapped_it_is_destroyed(
    master: Master,
    database: Database,
    system_database: SystemDatabase,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await key_of(DataKeys(database, master.kms), database, caller)
    backup = await owner.fetch("SELECT * FROM user_keys")
    await shred(DataKeys(database, master.kms), system_database, caller)

    async def restored() -> bytes:
        await owner.executemany(
            "INSERT INTO user_keys VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
            [tuple(row) for row in backup],
        )
        return await DataKeys(database, master.kms).existing_key_of(caller)

    assert await restored()
    master.rotate()
    master.destroy_oldest()
    with structlog.testing.capture_logs() as logs, pytest.raises(ContentUnreadable):
        await restored()
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "data key not unwrapped"
    ]


async def test_key_that_was_moved_to_another_user_does_not_unwrap(
    master: Master, database: Database, owner: asyncpg.Connection
) -> None:
    ada, bob = await new_caller(database), await new_caller(database)
    await key_of(DataKeys(database, master.kms), database, ada)
    await owner.execute(
        "UPDATE user_keys SET user_id = $1, tenant_id = $2", bob.user_id, bob.tenant_id
    )
    with pytest.raises(ContentUnreadable):
        await DataKeys(database, master.kms).existing_key_of(bob)
    with pytest.raises(ContentUnreadable):
        await key_of(DataKeys(database, master.kms), database, bob)


async def test_user_sees_no_key_but_their_own_and_changes_none(
    master: Master, database: Database, caller: Caller
) -> None:
    other = await new_caller(database)
    await key_of(DataKeys(database, master.kms), database, other)
    assert not await database.fetch(caller, "SELECT user_id FROM user_keys")
    for statement in (
        "UPDATE user_keys SET wrapped = 'x'",
        "DELETE FROM user_keys",
        "SELECT FROM user_keys FOR UPDATE",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with database.transaction(other) as connection:
                await connection.execute(statement)


async def test_system_cannot_give_a_user_a_key_of_its_choice(
    master: Master, database: Database, system_database: SystemDatabase, caller: Caller
) -> None:
    await key_of(DataKeys(database, master.kms), database, caller)
    for statement in (
        "INSERT INTO user_keys SELECT * FROM user_keys",
        "UPDATE user_keys SET user_id = tenant_id",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with system_database.transaction() as connection:
                await connection.execute(statement)


async def test_no_key_shows_in_what_is_logged_or_printed(
    master: Master, database: Database, caller: Caller
) -> None:
    keys = DataKeys(database, master.kms)
    with structlog.testing.capture_logs() as logs:
        key = await key_of(keys, database, caller)
    assert repr(key) not in repr(logs) + repr(vars(keys)) + repr(vars(vars(keys)["_remembered"]))
