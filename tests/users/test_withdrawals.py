"""What was withdrawn is kept where no backup takes it back, before anybody is told that it was."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import pytest
import pytest_asyncio
from joserfc.jwk import ECKey
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc

from server.auth.endings import ConsentEndings
from server.blobs import Blobs
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.errors import StoreUnavailable
from server.signed_words import LONGEST_BYTES, WordForged
from server.users import withdrawals as words
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.consent_store import ConsentStore
from server.users.service import UserService
from server.users.store import UserStore
from server.users.tenant_audits import TenantAudits
from server.users.withdrawal_archive import WithdrawalArchive
from server.users.withdrawals import Withdrawal
from tests.conftest import FakeClock, Serve, bearer, new_caller
from tests.refusals import refusal_of
from tests.users.conftest import Users
from tests.users.test_account import decide, named
from tests.users.test_checkpoints import unreachable as unreachable

STORE = "memory.store"
Row = tuple[str, int, bool]


@pytest_asyncio.fixture
async def ada(owner: asyncpg.Connection, database: Database, blobs: Blobs) -> Caller:
    """Somebody who consented, in a bucket that has no words yet."""
    # Tests share the bucket, and not the keys that words are signed with.
    for key in await blobs.list_keys(f"{words.KIND}/"):
        await blobs.erase(key)
    return await named(owner, await new_caller(database), "ada@example.com")


async def withdraw(users: Users, caller: Caller) -> pb.Consent:
    answer = await users.RecordConsent(decide(granted=False), metadata=bearer(caller))
    return answer.consent


async def history(owner: asyncpg.Connection) -> list[Row]:
    rows = await owner.fetch("SELECT purpose, version, granted FROM consents ORDER BY version")
    return [tuple(row) for row in rows]


async def forget_after(owner: asyncpg.Connection, version: int) -> None:
    """Take the consents back to where a backup had them."""
    await owner.execute("DELETE FROM consents WHERE version > $1", version)


async def test_the_word_is_there_when_the_withdrawal_is_acknowledged(
    users: Users, ada: Caller, blobs: Blobs, audit_keys: AuditKeys, owner: asyncpg.Connection
) -> None:
    withdrawn = await withdraw(users, ada)
    (key,) = await blobs.list_keys(f"{words.KIND}/{ada.tenant_id.hex}/{ada.user_id.hex}/")
    word = words.read_word(
        await blobs.get_small(key, longest=LONGEST_BYTES), await audit_keys.known()
    )
    assert (word.caller, word.purpose, word.version) == (ada, STORE, withdrawn.version)
    assert await owner.fetchval("SELECT archived_at FROM consents WHERE NOT granted")


async def test_what_was_granted_leaves_no_word(users: Users, ada: Caller, blobs: Blobs) -> None:
    await users.RecordConsent(decide(granted=True), metadata=bearer(ada))
    assert not await blobs.list_keys(f"{words.KIND}/")


async def test_with_a_bucket_away_the_withdrawal_holds_and_is_not_acknowledged(
    serve: Serve,
    ada: Caller,
    blobs: Blobs,
    unreachable: Blobs,
    database: Database,
    system_database: SystemDatabase,
    consents: ConsentStore,
    withdrawals: WithdrawalArchive,
    audit_keys: AuditKeys,
    audit_log: AuditLog,
    owner: asyncpg.Connection,
) -> None:
    away = WithdrawalArchive(
        consents, blobs, audit_keys.signer, audit_keys.known, copies=[unreachable]
    )
    service = UserService(
        UserStore(database), consents, away, TenantAudits(system_database), audit_log
    )
    channel = await serve(lambda server: rpc.add_UserServiceServicer_to_server(service, server))
    request = decide(granted=False)
    refusal = await refusal_of(
        rpc.UserServiceStub(channel).RecordConsent(request, metadata=bearer(ada))
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
    assert "the consent is withdrawn" in refusal.message
    assert await history(owner) == [(STORE, 1, True), (STORE, 2, False)]
    with pytest.raises(StoreUnavailable):
        await away.archive()
    # As soon as every bucket answers, the word is there, whoever writes it.
    await withdrawals.archive()
    assert await consents.unarchived(10) == []


async def test_what_was_withdrawn_since_is_withdrawn_again_and_once(
    users: Users, ada: Caller, withdrawals: WithdrawalArchive, owner: asyncpg.Connection
) -> None:
    await withdraw(users, ada)
    await forget_after(owner, 1)
    assert await withdrawals.withdraw_again() == 1
    assert await history(owner) == [(STORE, 1, True), (STORE, 2, False)]
    assert await withdrawals.withdraw_again() == 0
    told = await owner.fetchrow(
        "SELECT actor, resource FROM audit_events ORDER BY xid DESC, id DESC LIMIT 1"
    )
    assert tuple(told) == ("system", STORE)


async def test_what_was_granted_again_and_lost_is_withdrawn_which_is_the_safe_side(
    users: Users, ada: Caller, withdrawals: WithdrawalArchive, owner: asyncpg.Connection
) -> None:
    mine = bearer(ada)
    await withdraw(users, ada)
    await users.RecordConsent(decide(granted=True), metadata=mine)
    await forget_after(owner, 1)
    assert await withdrawals.withdraw_again() == 1
    assert await history(owner) == [(STORE, 1, True), (STORE, 2, False)]
    # The user may grant it once more, and that stands whatever is restored later.
    await users.RecordConsent(decide(granted=True), metadata=mine)
    assert await withdrawals.withdraw_again() == 0
    assert (await history(owner))[-1] == (STORE, 3, True)


async def test_a_grant_that_the_backup_has_outlives_the_withdrawals_before_it(
    users: Users, ada: Caller, withdrawals: WithdrawalArchive, owner: asyncpg.Connection
) -> None:
    await withdraw(users, ada)
    await users.RecordConsent(decide(granted=True), metadata=bearer(ada))
    assert await withdrawals.withdraw_again() == 0
    assert (await history(owner))[-1] == (STORE, 3, True)


async def test_withdrawals_come_back_in_their_order_beyond_all_that_is_decided_next(
    users: Users, ada: Caller, withdrawals: WithdrawalArchive, owner: asyncpg.Connection
) -> None:
    mine = bearer(ada)
    for granted in (False, True, False, True):
        await users.RecordConsent(decide(granted=granted), metadata=mine)
    await forget_after(owner, 0)
    assert await withdrawals.withdraw_again() == 2
    assert await history(owner) == [(STORE, 2, False), (STORE, 4, False)]
    granted_anew = await users.RecordConsent(decide(granted=True), metadata=mine)
    assert granted_anew.consent.version == 5
    assert await withdrawals.withdraw_again() == 0


async def test_who_signed_up_after_the_backup_has_nothing_to_withdraw(
    users: Users, ada: Caller, withdrawals: WithdrawalArchive, owner: asyncpg.Connection
) -> None:
    await withdraw(users, ada)
    await owner.execute("DELETE FROM consents")
    await owner.execute("DELETE FROM users")
    assert await withdrawals.withdraw_again() == 0
    assert await history(owner) == []


async def test_what_no_key_of_the_mesh_signed_withdraws_nothing_and_is_named(
    ada: Caller,
    blobs: Blobs,
    withdrawals: WithdrawalArchive,
    audit_keys: AuditKeys,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    forged = Withdrawal(ada, STORE, 7, clock.now)
    word = words.sign_word(forged, ECKey.generate_key("P-256"))
    await blobs.put(words.object_key(forged), word.encode(), "application/jose")
    with pytest.raises(WordForged, match=words.object_key(forged)):
        await withdrawals.withdraw_again()
    # Nor does one that was put in another's place.
    moved = words.sign_word(Withdrawal(ada, STORE, 9, clock.now), await audit_keys.signer())
    await blobs.put(words.object_key(forged), moved.encode(), "application/jose")
    with pytest.raises(WordForged, match=words.object_key(forged)):
        await withdrawals.withdraw_again()
    assert await history(owner) == [(STORE, 1, True)]


async def test_of_who_is_erased_nothing_is_archived(
    users: Users,
    ada: Caller,
    system_database: SystemDatabase,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    consents = ConsentStore(system_database, ConsentEndings(), clock=clock)
    await consents.record(ada, STORE, granted=False, session_id=ada.user_id)
    assert len(await consents.unarchived(10)) == 1
    await owner.execute(
        "INSERT INTO erasures (id, tenant_id, user_id, receipt_id)"
        " VALUES (uuidv7(), $1, $2, uuidv7())",
        ada.tenant_id,
        ada.user_id,
    )
    assert await consents.unarchived(10) == []


async def test_ten_withdrawals_at_once_are_all_acknowledged_and_archived(
    users: Users, ada: Caller, consents: ConsentStore, blobs: Blobs
) -> None:
    made = await asyncio.gather(*(withdraw(users, ada) for _ in range(10)))
    assert sorted(each.version for each in made) == list(range(2, 12))
    assert len(await blobs.list_keys(f"{words.KIND}/")) == 10
    assert await consents.unarchived(10) == []
