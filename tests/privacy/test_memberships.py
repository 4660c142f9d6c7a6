"""The end of an account that belongs to several tenants, and of what it had in one of them."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest
import pytest_asyncio
from joserfc import jws
from joserfc.jwk import ECKey
from kimberly.privacy.v1 import privacy_pb2 as pb

from server import audit, ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.erased import ErasedUsers
from server.errors import AccountErased
from server.privacy import words
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore
from tests.privacy.conftest import Everything, Privacy, task_of, until_waiting
from tests.privacy.test_erasure import TOLD, ask, get
from tests.refusals import refusal_of
from workers.erasure import Erasing


async def link(everything: Everything) -> None:
    """Have the stranger be whom the first of the three is in the other tenant."""
    away, home = everything.stranger.user_id, everything.mine.user_id
    await everything.owner.execute(
        "UPDATE users SET email = NULL, home_id = $2 WHERE id = $1", away, home
    )
    await everything.owner.execute("DELETE FROM accounts WHERE user_id = $1", away)


@pytest_asyncio.fixture
async def account(everything: Everything) -> Everything:
    """Two users of one account, and a colleague of the one who is at home."""
    await link(everything)
    return everything


async def jobs_of(account: Everything) -> set[str]:
    """Return whom jobs erase."""
    rows = await account.owner.fetch("SELECT payload FROM jobs WHERE kind = 'user.erase'")
    return {json.loads(row["payload"])["user_id"] for row in rows}


def shown(*callers: Caller) -> set[str]:
    return {ids.show(ids.USER, caller.user_id) for caller in callers}


async def test_with_an_account_all_that_it_has_in_other_tenants_is_erased(
    privacy: Privacy, archive: ErasureArchive, erasing: Erasing, account: Everything
) -> None:
    both = account.mine, account.stranger
    before = await account.of(account.colleague)
    erasure = await ask(privacy, account.mine)
    (receipt_id,) = erasure.membership_receipt_ids
    assert await jobs_of(account) == shown(*both)
    await archive.archive()
    for caller in both:
        await erasing.erase(task_of(caller))
        assert set(await account.of(caller)) <= TOLD
    assert await account.of(account.colleague) == before
    assert (await get(privacy, erasure.receipt_id)).state == pb.ERASURE_STATE_ERASED
    # Each has a receipt of its own, which anybody can verify.
    told = await get(privacy, receipt_id)
    assert (told.state, {told.user_id}) == (pb.ERASURE_STATE_ERASED, shown(account.stranger))
    key = ECKey.import_key(json.loads(told.receipt_key))
    signed = jws.deserialize_compact(told.receipt, key, algorithms=["ES256"])
    assert json.loads(signed.payload)["userId"] == told.user_id
    # Asked again, it answers the same.
    again = await ask(privacy, account.mine)
    assert list(again.membership_receipt_ids) == [receipt_id]


async def test_with_what_it_has_in_one_tenant_nothing_else_of_an_account_is_erased(
    privacy: Privacy, archive: ErasureArchive, erasing: Erasing, account: Everything
) -> None:
    others = account.mine, account.colleague
    before = [await account.of(other) for other in others]
    # That the account belonged there is all that goes.
    before[0]["users"] -= 1
    erasure = await ask(privacy, account.stranger)
    assert not erasure.membership_receipt_ids
    assert await jobs_of(account) == shown(account.stranger)
    await archive.archive()
    await erasing.erase(task_of(account.stranger))
    assert set(await account.of(account.stranger)) <= TOLD
    assert [await account.of(other) for other in others] == before


async def test_once_an_account_is_erased_nobody_writes_in_any_of_its_tenants(
    privacy: Privacy, database: Database, system_database: SystemDatabase, account: Everything
) -> None:
    erased = ErasedUsers(system_database)
    await ask(privacy, account.mine)
    await erased.refresh()
    for caller in (account.mine, account.stranger):
        assert caller.user_id in erased
        assert "sessions" not in await account.of(caller)
        with pytest.raises(AccountErased):
            async with database.transaction(caller) as connection:
                await audit.record(connection, caller, "memory.create", "mem_x")
    assert account.colleague.user_id not in erased


async def test_an_erasure_waits_for_who_writes_in_another_tenant(
    database: Database, erasures: ErasureStore, account: Everything, owner: asyncpg.Connection
) -> None:
    writing = database.transaction(account.stranger)
    connection = await writing.__aenter__()
    await audit.record(connection, account.stranger, "memory.create", "mem_1")
    begun = asyncio.create_task(erasures.begin(account.mine))
    await until_waiting(owner, 1)
    await writing.__aexit__(None, None, None)
    assert len((await begun).membership_receipt_ids) == 1


async def test_guesses_of_the_password_count_in_all_tenants_together(
    privacy: Privacy, account: Everything
) -> None:
    for caller in (account.mine, account.stranger, account.mine, account.stranger, account.mine):
        refusal = await refusal_of(ask(privacy, caller, "another horse"))
        assert refusal.reason == "PROOF_INVALID"
    for caller in (account.mine, account.stranger):
        refusal = await refusal_of(ask(privacy, caller))
        assert refusal.reason == "RATE_LIMITED"
    await ask(privacy, account.colleague)


@pytest.mark.parametrize("lost", [False, True], ids=["both words", "the home's word alone"])
async def test_a_restored_backup_is_erased_again_in_all_tenants(
    owner: asyncpg.Connection,
    emptying: str,
    privacy: Privacy,
    archive: ErasureArchive,
    erasing: Erasing,
    erasures: ErasureStore,
    account: Everything,
    lost: bool,
) -> None:
    both = account.mine, account.stranger
    erasure = await ask(privacy, account.mine)
    (receipt_id,) = erasure.membership_receipt_ids
    await archive.archive()
    if lost:
        # The database went before it was archived that the other one is erased, too.
        membership = await erasures.find_of(account.stranger)
        assert membership
        await account.blobs.erase(words.object_key(membership))
    keys = await owner.fetchval("SELECT jsonb_agg(to_jsonb(audit_keys)) FROM audit_keys")
    await owner.execute(emptying)
    await owner.execute("SET session_replication_role = origin")
    await owner.execute(
        "INSERT INTO audit_keys SELECT * FROM jsonb_populate_recordset(null::audit_keys, $1)", keys
    )
    await account.make()
    await link(account)
    before = await account.of(account.colleague)
    assert await archive.erase_again() == 2 - lost
    assert await jobs_of(account) == shown(*both)
    await archive.archive()
    for caller in both:
        await erasing.erase(task_of(caller))
        assert set(await account.of(caller)) <= TOLD
    assert await account.of(account.colleague) == before
    assert (await get(privacy, erasure.receipt_id)).state == pb.ERASURE_STATE_ERASED
    if not lost:
        # The user has the receipts of before.
        assert (await get(privacy, receipt_id)).state == pb.ERASURE_STATE_ERASED
