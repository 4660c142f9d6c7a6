"""Erasing users: who may ask, what stops at once, what is left, and what is not touched."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import asyncpg
import grpc
import pytest
from joserfc import jws
from joserfc.jwk import ECKey
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from server import audit, ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.enqueue import enqueue
from server.erased import ErasedUsers
from server.errors import AccountErased, StoreUnavailable
from server.memory.objects import Kind
from server.privacy import words
from server.privacy.erasing import Eraser, erasable_tables
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore
from server.signed_words import WordForged
from tests.conftest import Urls, as_worker, bearer
from tests.database.rows import TENANT_TABLES
from tests.privacy.conftest import PASSWORD, Everything, Privacy, task_of, until_waiting
from tests.refusals import refusal_of
from workers.erasure import Erasing

TOLD = {"audit_events", "erasures", "jobs"}
"""Who was erased is still told there: by ids, and by the job that did it."""


async def ask(privacy: Privacy, caller: Caller, password: str = PASSWORD) -> pb.Erasure:
    request = pb.CreateErasureRequest(password=password)
    return (await privacy.CreateErasure(request, metadata=bearer(caller))).erasure


async def get(privacy: Privacy, receipt_id: str) -> pb.Erasure:
    request = pb.GetErasureReceiptRequest(receipt_id=receipt_id)
    return (await privacy.GetErasureReceipt(request)).erasure


# --- nothing is left


async def test_every_table_is_erased_or_has_a_reason_not_to_be(
    system_database: SystemDatabase,
) -> None:
    async with system_database.transaction() as connection:
        erased = set(await erasable_tables(connection))
    # What belongs to a tenant and to no user, and what tells of users by their ids alone.
    of_tenants = {"audit_checkpoints", "audit_heads", "audit_links"}
    assert set(TENANT_TABLES) - erased == {"audit_events", "erasures", *of_tenants}


async def test_nothing_is_left_of_the_erased_and_everything_of_the_others(
    privacy: Privacy, archive: ErasureArchive, erasing: Erasing, everything: Everything
) -> None:
    others = everything.colleague, everything.stranger
    before = [await everything.of(other) for other in others]
    mine = await everything.of(everything.mine)
    assert {"memories", "user_keys", "embeddings", "objects", "uploads", "keys"} <= mine.keys()
    erasure = await ask(privacy, everything.mine)
    await archive.archive()
    await erasing.erase(task_of(everything.mine))
    assert set(await everything.of(everything.mine)) <= TOLD
    assert [await everything.of(other) for other in others] == before
    told = await get(privacy, erasure.receipt_id)
    assert told.state == pb.ERASURE_STATE_ERASED
    removed = {each.place: each.count for each in told.removed}
    assert removed["postgres/memories"] == mine["memories"]
    assert removed["objects/attachments"] == 6
    assert removed["valkey"] == mine["keys"]
    assert removed["uploads"] == 1


async def test_a_round_that_finds_something_is_not_the_last(
    privacy: Privacy, archive: ErasureArchive, eraser: Eraser, everything: Everything
) -> None:
    mine = everything.mine
    erasure = await ask(privacy, mine)
    await archive.archive()
    while not (await eraser.erase(mine, 1000)).rounds:
        pass
    # Somebody had the URL of an upload.
    await everything.put_object(mine, Kind.ATTACHMENT)
    assert (await get(privacy, erasure.receipt_id)).state == pb.ERASURE_STATE_ERASING
    while not (await eraser.erase(mine, 1000)).is_done:
        pass
    told = await get(privacy, erasure.receipt_id)
    assert (told.state, told.rounds >= 3) == (pb.ERASURE_STATE_ERASED, True)
    assert set(await everything.of(mine)) <= TOLD


async def test_it_is_confirmed_once_what_was_allowed_before_has_lapsed(
    owner: asyncpg.Connection,
    privacy: Privacy,
    archive: ErasureArchive,
    erasing: Erasing,
    everything: Everything,
) -> None:
    mine = everything.mine
    erasure = await ask(privacy, mine)
    await archive.archive()
    await erasing.erase(task_of(mine))
    # A worker that died as it was about to say that it is done does nothing that is too early.
    await erasing.erase(task_of(mine))
    assert (await get(privacy, erasure.receipt_id)).state == pb.ERASURE_STATE_ERASED
    due = await owner.fetch("SELECT run_at - now() AS delay FROM jobs WHERE kind = 'user.erase'")
    assert max(row["delay"] for row in due) > timedelta(minutes=59)
    await everything.put_object(mine, Kind.ATTACHMENT)
    await owner.execute("UPDATE erasures SET confirm_after = now()")
    await erasing.erase(task_of(mine))
    told = await get(privacy, erasure.receipt_id)
    assert told.state == pb.ERASURE_STATE_CONFIRMED
    assert {each.place: each.count for each in told.removed}["objects/attachments"] == 8
    assert set(await everything.of(mine)) <= TOLD


async def test_nothing_is_removed_before_s3_knows_whom_a_restored_backup_must_not_bring_back(
    privacy: Privacy, eraser: Eraser, archive: ErasureArchive, everything: Everything
) -> None:
    await ask(privacy, everything.mine)
    with pytest.raises(StoreUnavailable):
        await eraser.erase(everything.mine, 100)
    await archive.archive()
    await eraser.erase(everything.mine, 100)


async def test_a_restored_backup_is_erased_again(
    owner: asyncpg.Connection,
    emptying: str,
    privacy: Privacy,
    archive: ErasureArchive,
    erasing: Erasing,
    everything: Everything,
) -> None:
    erasure = await ask(privacy, everything.mine)
    await archive.archive()
    await erasing.erase(task_of(everything.mine))
    keys = await owner.fetchval("SELECT jsonb_agg(to_jsonb(audit_keys)) FROM audit_keys")
    # The database is as it was before; S3 is not.
    await owner.execute(emptying)
    await owner.execute("SET session_replication_role = origin")
    await owner.execute(
        "INSERT INTO audit_keys SELECT * FROM jsonb_populate_recordset(null::audit_keys, $1)", keys
    )
    await everything.make()
    assert "memories" in await everything.of(everything.mine)
    others = [await everything.of(o) for o in (everything.colleague, everything.stranger)]
    assert await archive.erase_again() >= 1
    await erasing.erase(task_of(everything.mine))
    assert set(await everything.of(everything.mine)) <= TOLD
    assert (await get(privacy, erasure.receipt_id)).state == pb.ERASURE_STATE_ERASED
    assert [await everything.of(o) for o in (everything.colleague, everything.stranger)] == others


async def test_a_word_that_this_mesh_did_not_sign_erases_nobody(
    archive: ErasureArchive,
    privacy: Privacy,
    erasures: ErasureStore,
    everything: Everything,
) -> None:
    await ask(privacy, everything.stranger)
    await ask(privacy, everything.mine)
    await archive.archive()
    erasure = await erasures.find_of(everything.stranger)
    assert erasure
    key = ECKey.generate_key("P-256")
    word = words.sign_word(erasure, key)
    with pytest.raises(WordForged):
        words.read_word(word.encode(), {})
    assert words.read_word(word.encode(), {key.thumbprint(): key}).caller == everything.stranger
    receipt = words.sign_receipt(erasure, key)
    with pytest.raises(WordForged):
        words.read_word(receipt.encode(), {key.thumbprint(): key})
    path = words.object_key(erasure)
    await everything.blobs.put(path, word.encode(), "application/jose")
    await everything.owner.execute("DELETE FROM erasures")
    with pytest.raises(WordForged, match=path):
        await archive.erase_again()
    # It stands in the way of none that is to be believed.
    assert await erasures.find_of(everything.mine)
    assert await erasures.find_of(everything.stranger) is None


# --- who may ask


async def test_who_does_not_know_the_password_erases_nobody(
    privacy: Privacy, everything: Everything
) -> None:
    mine = everything.mine
    for _ in range(5):
        refusal = await refusal_of(ask(privacy, mine, "another horse"))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "PROOF_INVALID",
        )
    # Not even who knows it, now: somebody is guessing.
    refusal = await refusal_of(ask(privacy, mine))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "RATE_LIMITED",
    )
    await ask(privacy, everything.colleague)
    await everything.owner.execute("DELETE FROM audit_events WHERE action = 'user.prove'")
    assert (await ask(privacy, mine)).state == pb.ERASURE_STATE_ERASING


async def test_of_many_guesses_at_once_no_more_than_five_are_looked_at(
    privacy: Privacy, everything: Everything
) -> None:
    guesses = [refusal_of(ask(privacy, everything.mine, f"guess {n}")) for n in range(12)]
    reasons = [refusal.reason for refusal in await asyncio.gather(*guesses)]
    assert sorted(reasons) == ["PROOF_INVALID"] * 5 + ["RATE_LIMITED"] * 7


async def test_without_a_token_nobody_asks_and_only_workers_erase(
    privacy: Privacy, work: grpc.aio.Channel, everything: Everything
) -> None:
    request = pb.CreateErasureRequest(password=PASSWORD)
    refusal = await refusal_of(privacy.CreateErasure(request))
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
    stub = rpc.PrivacyWorkServiceStub(work)
    erase = pb.EraseUserRequest(**task_of(everything.mine).payload)
    for metadata in ((), bearer(everything.mine)):
        refusal = await refusal_of(stub.EraseUser(erase, metadata=metadata))
        assert refusal.code is grpc.StatusCode.PERMISSION_DENIED
    # And nobody whom nobody asked for.
    refusal = await refusal_of(stub.EraseUser(erase, metadata=as_worker()))
    assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_asked_twice_it_is_one_erasure(privacy: Privacy, everything: Everything) -> None:
    asked = [ask(privacy, everything.mine) for _ in range(4)]
    assert len({erasure.id for erasure in await asyncio.gather(*asked)}) == 1
    assert (await ask(privacy, everything.mine, "forgotten")).id


async def test_a_receipt_is_read_by_who_knows_its_id_and_an_erasure_by_its_user_only(
    privacy: Privacy, everything: Everything
) -> None:
    one = await ask(privacy, everything.mine)
    other = await ask(privacy, everything.colleague)
    bits = int(one.receipt_id[4:], 16) ^ int(other.receipt_id[4:], 16)
    # Nothing of time is in them: the first half differs as much as the second.
    assert (bits >> 64).bit_count() > 8
    wrong = ids.show(ids.RECEIPT, ids.new_id())
    assert (await refusal_of(get(privacy, wrong))).code is grpc.StatusCode.NOT_FOUND
    refusal = await refusal_of(get(privacy, one.id))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("receipt_id",))
    request = pb.GetErasureRequest(id=one.id)
    mine = await privacy.GetErasure(request, metadata=bearer(everything.mine))
    assert mine.erasure == one
    for not_mine in (everything.colleague, everything.stranger):
        refusal = await refusal_of(privacy.GetErasure(request, metadata=bearer(not_mine)))
        assert refusal.code is grpc.StatusCode.NOT_FOUND


# --- what stops at once


async def test_once_it_is_asked_for_the_user_writes_nothing_and_nobody_logs_in(
    privacy: Privacy, database: Database, system_database: SystemDatabase, everything: Everything
) -> None:
    mine = everything.mine
    await ask(privacy, mine)
    left = await everything.of(mine)
    assert not {"accounts", "sessions"} & left.keys()
    assert not await everything.owner.fetchval(
        """
        SELECT count(*) FROM (SELECT DISTINCT ON (purpose) granted FROM consents
                               WHERE user_id = $1 ORDER BY purpose, version DESC) AS last
         WHERE granted
        """,
        mine.user_id,
    )
    with pytest.raises(AccountErased):
        async with database.transaction(mine) as connection:
            await audit.record(connection, mine, "memory.create", "mem_x")
    with pytest.raises(AccountErased):
        async with database.transaction(mine) as connection:
            await enqueue(connection, kind="any", payload={}, caller=mine)
    with pytest.raises(AccountErased):
        async with system_database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO sessions (tenant_id, user_id, id, started_at, expires_at)
                VALUES ($1, $2, $3, now(), 'infinity')
                """,
                mine.tenant_id,
                mine.user_id,
                ids.new_id(),
            )
    async with database.transaction(everything.colleague) as connection:
        await audit.record(connection, everything.colleague, "memory.create", "mem_x")


async def test_an_erasure_waits_for_who_writes_and_who_comes_then_is_refused(
    database: Database, erasures: ErasureStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    writing = database.transaction(caller)
    connection = await writing.__aenter__()
    await audit.record(connection, caller, "memory.create", "mem_1")
    begun = asyncio.create_task(erasures.begin(caller))
    await until_waiting(owner, 1)

    async def late() -> None:
        async with database.transaction(caller) as other:
            await audit.record(other, caller, "memory.create", "mem_2")

    waiting = asyncio.create_task(late())
    await until_waiting(owner, 2)
    await writing.__aexit__(None, None, None)
    await begun
    with pytest.raises(AccountErased):
        await waiting


async def test_without_the_lock_who_wrote_meanwhile_comes_after_the_erasure(
    database: Database, erasures: ErasureStore, owner: asyncpg.Connection, caller: Caller
) -> None:
    """The guard is worth something: take the lock away, and a row is written too late."""
    definition = await owner.fetchval(
        "SELECT pg_get_functiondef('refuse_insert_by_erased'::regproc)"
    )
    open_door = definition.replace(
        "PERFORM pg_advisory_xact_lock_shared(erasure_lock(current_user_id()));", "NULL;"
    )
    assert open_door != definition
    await owner.execute(open_door)
    try:
        async with database.transaction(caller) as connection:
            await audit.record(connection, caller, "memory.create", "mem_1")
            await asyncio.wait_for(erasures.begin(caller), 10)
            before = await owner.fetchval("SELECT count(*) FROM audit_events")
        assert await owner.fetchval("SELECT count(*) FROM audit_events") == before + 1
    finally:
        await owner.execute(definition)


async def test_who_was_erased_is_known_as_long_as_their_tokens_may_be_out(
    system_database: SystemDatabase, privacy: Privacy, everything: Everything
) -> None:
    erased = ErasedUsers(system_database)
    await ask(privacy, everything.mine)
    await erased.refresh()
    assert everything.mine.user_id in erased
    assert everything.colleague.user_id not in erased
    await everything.owner.execute(
        "UPDATE erasures SET requested_at = requested_at - interval '2 hours'"
    )
    await erased.refresh()
    assert everything.mine.user_id not in erased


# --- the receipt


async def test_the_receipt_says_what_was_removed_and_anybody_can_verify_it(
    privacy: Privacy, archive: ErasureArchive, erasing: Erasing, everything: Everything
) -> None:
    erasure = await ask(privacy, everything.mine)
    assert erasure.receipt == ""
    await archive.archive()
    await erasing.erase(task_of(everything.mine))
    told = await get(privacy, erasure.receipt_id)
    key = ECKey.import_key(json.loads(told.receipt_key))
    signed = jws.deserialize_compact(told.receipt, key, algorithms=["ES256"])
    says = json.loads(signed.payload)
    assert says["userId"] == ids.show(ids.USER, everything.mine.user_id)
    assert says["removed"] == {each.place: each.count for each in told.removed}
    assert (says["left"], says["state"]) == (0, "erased")
    # It holds no text: nothing but ids, times and counts.
    assert set(says) == {
        *("id", "tenantId", "userId", "createTime", "state"),
        *("eraseTime", "confirmTime", "removed", "rounds", "left"),
    }


# --- what new tables need


async def test_what_knows_a_user_by_their_email_alone_is_erased_too(
    urls: Urls,
    privacy: Privacy,
    archive: ErasureArchive,
    erasing: Erasing,
    everything: Everything,
) -> None:
    tables_owner = await asyncpg.connect(urls.owner)
    try:
        await tables_owner.execute(
            """
            CREATE TABLE letters (email text);
            GRANT SELECT, DELETE ON letters TO kimberly_system;
            """
        )
        await everything.owner.execute("INSERT INTO letters SELECT email FROM users")
        await ask(privacy, everything.mine)
        await archive.archive()
        await erasing.erase(task_of(everything.mine))
        left = await everything.owner.fetch("SELECT email FROM letters ORDER BY email")
        users = await everything.owner.fetch("SELECT email FROM users ORDER BY email")
        assert left == users
        assert len(left) == 2
    finally:
        await tables_owner.execute("DROP TABLE IF EXISTS letters")
        await tables_owner.close()


async def test_a_table_that_no_migration_makes_erasable_stops_an_erasure_loudly(
    urls: Urls,
    privacy: Privacy,
    archive: ErasureArchive,
    erasing: Erasing,
    everything: Everything,
) -> None:
    tables_owner = await asyncpg.connect(urls.owner)
    try:
        await tables_owner.execute(
            """
            CREATE TABLE forgotten (tenant_id uuid, user_id uuid);
            ALTER TABLE forgotten ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
            """
        )
        mine = everything.mine
        insert = "INSERT INTO forgotten VALUES ($1, $2)"
        for caller in (mine, everything.stranger):
            await everything.owner.execute(insert, caller.tenant_id, caller.user_id)
        erasure = await ask(privacy, mine)
        await archive.archive()
        with pytest.raises(grpc.aio.AioRpcError):
            await erasing.erase(task_of(mine))
        assert (await get(privacy, erasure.receipt_id)).state == pb.ERASURE_STATE_ERASING
        await tables_owner.execute("SELECT make_erasable('forgotten')")
        await erasing.erase(task_of(mine))
        assert set(await everything.of(mine)) <= TOLD
        assert "forgotten" in await everything.of(everything.stranger)
    finally:
        await tables_owner.execute("DROP TABLE IF EXISTS forgotten")
        await tables_owner.close()
