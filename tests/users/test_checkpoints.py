"""Signed checkpoints: what they tell of a database whose owner covers everything up."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from joserfc import jws
from joserfc.errors import BadSignatureError
from joserfc.jwk import ECKey
from kimberly.users.v1 import users_pb2 as pb

from server import audit, ids
from server.blobs import Blobs
from server.caller import Caller
from server.database import Database
from server.errors import StoreUnavailable
from server.kms import UnwrapFailed
from server.kms.local import LocalKms
from server.users import checkpoints
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.chain import Head
from server.users.checkpoint_archive import CheckpointArchive, Comparison
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from tests.conftest import FakeClock, Urls, new_caller
from tests.kms.key_files import key_file
from tests.signing import sign_all
from tests.users.conftest import Users
from tests.users.tampering import (
    CARELESS,
    EVENTS,
    THOROUGH,
    act,
    cover_up,
    delete,
    edit,
    statement,
    tampered,
    verify,
)

FIRST = 5
"""Place of the first of two checkpoints; the other one is of the last event."""


@dataclass(frozen=True, slots=True)
class Signing:
    """Acts, and signs what came of it."""

    database: Database
    audit_log: AuditLog
    checkpointer: Checkpointer

    async def __call__(self, caller: Caller, *positions: int) -> None:
        """Let the caller act, with a checkpoint at each of the places."""
        for since, position in zip((0, *positions), positions, strict=False):
            await act(self.database, caller, position - since, first=since)
            await self.audit_log.seal()
            assert await sign_all(self.checkpointer) == 1


@pytest.fixture
def signing(database: Database, audit_log: AuditLog, checkpointer: Checkpointer) -> Signing:
    return Signing(database, audit_log, checkpointer)


@pytest_asyncio.fixture
async def other(database: Database, audit_log: AuditLog) -> Caller:
    """Somebody of another tenant, without a checkpoint."""
    somebody = await new_caller(database)
    await act(database, somebody, EVENTS)
    await audit_log.seal()
    return somebody


def object_of(caller: Caller, position: int) -> str:
    return checkpoints.object_key(caller.tenant_id, position)


# --- the seven tamperings ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CARELESS)
async def test_careless_tampering_is_detected_without_checkpoints(
    name: str, users: Users, urls: Urls, database: Database, caller: Caller, other: Caller
) -> None:
    await act(database, caller, EVENTS)
    assert (await verify(users, caller)).intact
    await tampered(urls.owner, caller, *CARELESS[name])
    assert not (await verify(users, caller)).intact


@pytest.mark.parametrize("name", THOROUGH)
async def test_thorough_tampering_is_detected_by_nothing_but_checkpoints(
    name: str, users: Users, urls: Urls, database: Database, caller: Caller, signing: Signing
) -> None:
    await signing(caller, FIRST, EVENTS)
    unsigned = await new_caller(database)
    await act(database, unsigned, EVENTS)
    await signing.audit_log.seal()

    await tampered(urls.owner, unsigned, *THOROUGH[name])
    unnoticed = await verify(users, unsigned)
    assert unnoticed.intact, "what the checkpoints are for is not thorough enough"
    assert unnoticed.checkpoint_comparison == pb.CHECKPOINT_COMPARISON_NONE

    await tampered(urls.owner, caller, *THOROUGH[name])
    found = await verify(users, caller)
    assert (found.intact, found.first_broken_position) == (False, FIRST + 1)
    assert found.problem in (checkpoints.is_rewritten(EVENTS), checkpoints.is_cut(EVENTS))
    assert found.verified_events == FIRST


@pytest.mark.parametrize("name", CARELESS)
async def test_careless_tampering_is_located_as_well_with_checkpoints(
    name: str, users: Users, urls: Urls, caller: Caller, other: Caller, signing: Signing
) -> None:
    await act(signing.database, caller, FIRST)
    await signing.audit_log.seal()
    await sign_all(signing.checkpointer)
    await act(signing.database, caller, EVENTS - FIRST, first=FIRST)
    await signing.audit_log.seal()
    await sign_all(signing.checkpointer)
    await tampered(urls.owner, caller, *CARELESS[name])
    places = {"insert": 10, "cut the tail": 13, "rehash from the middle": FIRST + 1}
    assert (await verify(users, caller)).first_broken_position == places.get(name, 8)


async def test_a_total_rewrite_goes_unnoticed_without_checkpoints_only(
    users: Users, urls: Urls, database: Database, caller: Caller, signing: Signing
) -> None:
    everything = (
        edit("resource = 'mem_other'"),
        statement("UPDATE audit_events SET actor = 'usr_other' WHERE tenant_id = $1"),
        cover_up,
    )
    await act(database, caller, EVENTS)
    await verify(users, caller)
    await tampered(urls.owner, caller, *everything)
    assert (await verify(users, caller)).intact
    signed = await new_caller(database)
    await act(database, signed, EVENTS)
    await signing.audit_log.seal()
    assert await sign_all(signing.checkpointer) == 2
    await tampered(urls.owner, signed, *everything)
    found = await verify(users, signed)
    assert (found.intact, found.first_broken_position) == (False, 1)
    assert found.problem == checkpoints.is_rewritten(EVENTS)


# --- what is signed ----------------------------------------------------------------------------


async def test_a_checkpoint_is_verifiable_by_anyone(
    users: Users, caller: Caller, signing: Signing, clock: FakeClock, blobs: Blobs
) -> None:
    await signing(caller, EVENTS)
    found = await verify(users, caller)
    newest = found.newest_checkpoint
    assert found.checkpoint_comparison == pb.CHECKPOINT_COMPARISON_COMPARED
    assert (newest.position, newest.hash) == (EVENTS, found.head_hash)
    assert newest.sign_time.ToDatetime(clock.now.tzinfo) == clock.now
    (published,) = found.keys
    key = ECKey.import_key(json.loads(published.public_jwk))
    assert key.thumbprint() == published.key_id == newest.key_id
    assert not key.is_private
    signed = jws.deserialize_compact(newest.signed, key, algorithms=["ES256"])
    assert json.loads(signed.payload) == {
        "tenant": ids.show(ids.TENANT, caller.tenant_id),
        "position": EVENTS,
        "hash": found.head_hash,
        "time": clock.now.isoformat(),
    }
    assert await blobs.get_small(object_of(caller, EVENTS), longest=4096) == newest.signed.encode()
    forged = newest.signed[:-8] + ("A" * 8 if newest.signed[-8:] != "A" * 8 else "B" * 8)
    with pytest.raises(BadSignatureError):
        jws.deserialize_compact(forged, key, algorithms=["ES256"])


async def test_only_what_moved_is_signed(
    database: Database, caller: Caller, audit_log: AuditLog, checkpointer: Checkpointer
) -> None:
    callers = [caller, *[await new_caller(database) for _ in range(19)]]
    for each in callers:
        await act(database, each)
    await audit_log.seal()
    assert await sign_all(checkpointer) == len(callers)
    assert await sign_all(checkpointer) == 0
    await act(database, callers[7])
    await audit_log.seal()
    assert await sign_all(checkpointer) == 1


async def test_checkpointers_at_once_write_each_object_once(
    users: Users,
    database: Database,
    caller: Caller,
    audit_log: AuditLog,
    checkpointer: Checkpointer,
) -> None:
    await act(database, caller, EVENTS)
    await audit_log.seal()
    signed = await asyncio.gather(*(sign_all(checkpointer) for _ in range(5)))
    assert sum(signed) == 1
    found = await verify(users, caller)
    assert found.intact
    assert [each.position for each in found.checkpoints] == [EVENTS]


async def test_a_verification_beside_writers_and_signers_raises_no_false_alarm(
    users: Users, database: Database, caller: Caller, signing: Signing
) -> None:
    async with database.transaction(caller) as connection:
        # So many that others get something done while they are walked.
        await audit.record_all(connection, caller, "memory.create", ["mem_0"] * 700)

    async def write() -> None:
        for number in range(10):
            await act(database, caller, first=number)
            await signing.audit_log.seal()
            await sign_all(signing.checkpointer)

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(write())
        while not writing.done():
            found = await verify(users, caller)
            assert found.intact, found


async def test_a_checkpoint_that_was_written_and_not_noted_is_noted_later(
    urls: Urls, caller: Caller, signing: Signing, checkpoint_store: CheckpointStore
) -> None:
    await signing(caller, EVENTS)
    await tampered(
        urls.owner, caller, statement("DELETE FROM audit_checkpoints WHERE tenant_id = $1")
    )
    assert await sign_all(signing.checkpointer) == 0
    noted = await checkpoint_store.recorded(caller.tenant_id)
    assert noted
    assert noted.position == EVENTS


async def test_a_rewritten_log_gets_no_further_checkpoint(
    users: Users,
    urls: Urls,
    database: Database,
    caller: Caller,
    signing: Signing,
    checkpointer: Checkpointer,
) -> None:
    await signing(caller, EVENTS)
    await tampered(
        urls.owner,
        caller,
        *THOROUGH["edit"],
        # So that the signer would find no checkpoint if it asked nobody but the database.
        statement("DELETE FROM audit_checkpoints WHERE tenant_id = $1"),
    )
    await act(database, caller, 5, first=EVENTS)
    await signing.audit_log.seal()
    assert await sign_all(checkpointer) == 0
    found = await verify(users, caller)
    assert (found.intact, found.first_broken_position) == (False, 1)
    assert found.newest_checkpoint.position == EVENTS


# --- tampering with the checkpoints themselves -------------------------------------------------


async def test_a_removed_checkpoint_is_missed(
    users: Users, caller: Caller, signing: Signing, blobs: Blobs
) -> None:
    await signing(caller, FIRST, EVENTS)
    await blobs.erase(object_of(caller, EVENTS))
    found = await verify(users, caller)
    assert (found.intact, found.first_broken_position) == (False, FIRST + 1)
    assert found.problem == checkpoints.is_missing(EVENTS)
    await act(signing.database, caller, first=EVENTS)
    await signing.audit_log.seal()
    assert await sign_all(signing.checkpointer) == 0


Forge = Callable[[Caller, Caller, Blobs, FakeClock], Awaitable[bytes]]


async def by_another_key(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    key = ECKey.generate_key("P-256")
    head = Head(EVENTS, bytes(32))
    return checkpoints.sign(caller.tenant_id, head, clock.now, key).token.encode()


async def of_another_tenant(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    return await blobs.get_small(object_of(other, EVENTS), longest=4096) or b""


async def of_another_place(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    return await blobs.get_small(object_of(caller, FIRST), longest=4096) or b""


async def changed(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    genuine = await blobs.get_small(object_of(caller, EVENTS), longest=4096) or b""
    header, _, signature = genuine.split(b".")
    return b".".join((header, b"e30", signature))


async def unsigned(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    genuine = await blobs.get_small(object_of(caller, EVENTS), longest=4096) or b""
    return b"eyJhbGciOiJub25lIn0." + genuine.split(b".")[1] + b"."


async def empty(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    return b""


async def noise(caller: Caller, other: Caller, blobs: Blobs, clock: FakeClock) -> bytes:
    return bytes(range(256)) * 100


@pytest.mark.parametrize(
    "forge",
    [by_another_key, of_another_tenant, of_another_place, changed, unsigned, empty, noise],
)
async def test_a_forged_checkpoint_is_not_believed(
    forge: Forge,
    users: Users,
    database: Database,
    caller: Caller,
    signing: Signing,
    blobs: Blobs,
    clock: FakeClock,
) -> None:
    other = await new_caller(database)
    await signing(other, EVENTS)
    await signing(caller, FIRST, EVENTS)
    forged = await forge(caller, other, blobs, clock)
    await blobs.put(object_of(caller, EVENTS), forged, "application/jose")
    found = await verify(users, caller)
    assert (found.intact, found.first_broken_position) == (False, FIRST + 1)
    assert found.problem == checkpoints.is_forged(EVENTS)
    assert [each.position for each in found.checkpoints] == [FIRST]
    assert (await verify(users, other)).intact


async def test_a_token_of_the_right_key_that_is_no_checkpoint_is_not_believed(
    caller: Caller, clock: FakeClock
) -> None:
    key = ECKey.generate_key("P-256")
    genuine = checkpoints.sign(caller.tenant_id, Head(1, bytes(32)), clock.now, key)
    keys = {key.thumbprint(): key}
    assert checkpoints.read(genuine.token, keys) == genuine
    payload = jws.extract_compact(genuine.token.encode()).payload
    header = {"alg": "ES256", "kid": key.thumbprint(), "typ": "at+jwt"}
    other = jws.serialize_compact(header, payload, key, algorithms=["ES256"])
    with pytest.raises(checkpoints.CheckpointForged):
        checkpoints.read(other, keys)


async def test_a_key_that_the_owner_adds_or_swaps_is_not_believed(
    users: Users,
    urls: Urls,
    caller: Caller,
    signing: Signing,
    blobs: Blobs,
    clock: FakeClock,
    tmp_path: Path,
    checkpoint_store: CheckpointStore,
) -> None:
    await signing(caller, EVENTS)
    foreign = LocalKms(key_file(tmp_path / "foreign.key", bytes(32)))
    clock.advance(days=1)
    await AuditKeys(checkpoint_store, foreign, clock=clock).rotate()
    genuine = await verify(users, caller)
    assert genuine.intact
    assert len(genuine.keys) == 1
    await act(signing.database, caller, first=EVENTS)
    await signing.audit_log.seal()
    assert await sign_all(signing.checkpointer) == 1
    assert (await verify(users, caller)).newest_checkpoint.key_id == genuine.keys[0].key_id
    owner = await asyncpg.connect(urls.owner)
    await owner.execute("DELETE FROM audit_keys WHERE key_id = $1", genuine.keys[0].key_id)
    await owner.close()
    found = await verify(users, caller)
    assert (found.intact, found.problem) == (False, checkpoints.is_forged(EVENTS))
    with pytest.raises(UnwrapFailed):
        await sign_all(signing.checkpointer)


async def test_an_existing_checkpoint_is_never_written_over(
    caller: Caller, signing: Signing, archive: CheckpointArchive, blobs: Blobs, clock: FakeClock
) -> None:
    await signing(caller, EVENTS)
    before = await blobs.get_small(object_of(caller, EVENTS), longest=4096)
    key = ECKey.generate_key("P-256")
    other = checkpoints.sign(caller.tenant_id, Head(EVENTS, bytes(32)), clock.now, key)
    assert not await archive.put(other)
    assert await blobs.get_small(object_of(caller, EVENTS), longest=4096) == before


async def test_services_can_neither_remove_nor_replace_what_checkpoints_rest_on(
    urls: Urls, caller: Caller, signing: Signing
) -> None:
    await signing(caller, EVENTS)
    for url in (urls.application, urls.system):
        connection = await asyncpg.connect(url)
        for forbidden in (
            "DELETE FROM audit_keys",
            "TRUNCATE audit_keys",
            "UPDATE audit_keys SET key_id = 'other'",
            "DELETE FROM audit_checkpoints",
            "TRUNCATE audit_checkpoints",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(forbidden)
        await connection.close()
    connection = await asyncpg.connect(urls.application)
    for table in ("audit_keys", "audit_checkpoints"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(f"SELECT FROM {table}")
    await connection.close()


# --- keys --------------------------------------------------------------------------------------


async def test_old_checkpoints_stay_verifiable_when_the_key_is_rotated(
    users: Users, caller: Caller, signing: Signing, audit_keys: AuditKeys, clock: FakeClock
) -> None:
    await signing(caller, FIRST)
    clock.advance(days=30)
    rotated = await audit_keys.rotate()
    await act(signing.database, caller, EVENTS - FIRST, first=FIRST)
    await signing.audit_log.seal()
    assert await sign_all(signing.checkpointer) == 1
    found = await verify(users, caller)
    assert found.intact
    old, new = found.checkpoints
    assert (old.position, new.position) == (FIRST, EVENTS)
    assert new.key_id == rotated != old.key_id
    assert [key.key_id for key in found.keys] == [old.key_id, rotated]


async def test_keys_outlive_the_master_key_that_wrapped_them(
    caller: Caller, signing: Signing, checkpoint_store: CheckpointStore, master_key: Path
) -> None:
    await signing(caller, FIRST)
    old, new = bytes(range(32)), bytes(reversed(range(32)))
    key_file(master_key, old, new)
    await sign_all(signing.checkpointer)
    key_file(master_key, new)
    (known,) = await AuditKeys(checkpoint_store, LocalKms(master_key)).known()
    (stored,) = await checkpoint_store.list_keys()
    assert known == stored.key_id


async def test_processes_that_start_at_once_make_one_key(
    checkpoint_store: CheckpointStore, master_key: Path, clock: FakeClock
) -> None:
    processes = [AuditKeys(checkpoint_store, LocalKms(master_key), clock=clock) for _ in range(5)]
    signers = await asyncio.gather(*(process.signer() for process in processes))
    assert len({signer.thumbprint() for signer in signers}) == 1
    assert len(await checkpoint_store.list_keys()) == 1


# --- S3 away -----------------------------------------------------------------------------------


@pytest.fixture
def unreachable() -> Blobs:
    """A bucket behind a port on which nobody listens."""
    return Blobs.open(
        endpoint="127.0.0.1:1",
        access_key="a",
        secret_key="s",
        region="us-east-1",
        secure=False,
        bucket="kimberly",
    )


async def test_with_s3_away_the_log_is_sealed_and_checkpoints_follow_later(
    unreachable: Blobs,
    caller: Caller,
    signing: Signing,
    audit_keys: AuditKeys,
    checkpoint_store: CheckpointStore,
    audit_log: AuditLog,
) -> None:
    await signing(caller, FIRST)
    away = CheckpointArchive(unreachable, checkpoint_store, audit_keys)
    halted = Checkpointer(checkpoint_store, away, audit_keys)
    blind = AuditLog(AuditStore(signing.checkpointer._store._database), away, seal_seconds=1)
    await act(signing.database, caller, EVENTS - FIRST, first=FIRST)
    await blind.seal()
    with pytest.raises(StoreUnavailable):
        await sign_all(halted)
    found = await blind.verify(caller.tenant_id)
    assert (found.verified_events, found.broken) == (EVENTS, None)
    assert found.testimony.comparison is Comparison.UNREACHABLE
    assert found.testimony.recorded
    assert found.testimony.recorded.position == FIRST
    assert await sign_all(signing.checkpointer) == 1
    later = await audit_log.verify(caller.tenant_id)
    assert later.testimony.comparison is Comparison.COMPARED
    assert [each.position for each in later.testimony.checkpoints] == [FIRST, EVENTS]


# --- which of many are read --------------------------------------------------------------------


def test_few_of_many_checkpoints_are_read_and_the_newest_always() -> None:
    assert checkpoints.spread([]) == ()
    assert checkpoints.spread([3]) == [3]
    assert checkpoints.spread([3, 9]) == [3, 9]
    many = list(range(1, 100_001))
    chosen = checkpoints.spread(many)
    assert (chosen[0], chosen[-1], chosen[-2]) == (1, 100_000, 99_999)
    assert chosen == sorted(chosen)
    assert len(chosen) <= 18


async def test_an_older_checkpoint_counts_though_the_newest_agrees(
    users: Users,
    urls: Urls,
    caller: Caller,
    signing: Signing,
    audit_keys: AuditKeys,
    archive: CheckpointArchive,
    clock: FakeClock,
) -> None:
    """As if somebody had got to sign what they rewrote."""
    await signing(caller, FIRST)
    await act(signing.database, caller, EVENTS - FIRST, first=FIRST)
    await signing.audit_log.seal()
    await tampered(
        urls.owner,
        caller,
        statement("UPDATE audit_events SET actor = 'usr_other' WHERE tenant_id = $1"),
        cover_up,
    )
    owner = await asyncpg.connect(urls.superuser)
    hash_ = await owner.fetchval(
        "SELECT hash FROM audit_heads WHERE tenant_id = $1", caller.tenant_id
    )
    await owner.close()
    forged = checkpoints.sign(
        caller.tenant_id, Head(EVENTS, hash_), clock.now, await audit_keys.signer()
    )
    assert await archive.put(forged)
    found = await verify(users, caller)
    assert (found.intact, found.problem) == (False, checkpoints.is_rewritten(FIRST))


async def test_a_head_that_was_moved_back_is_noticed(
    users: Users, urls: Urls, caller: Caller, signing: Signing
) -> None:
    await signing(caller, EVENTS)
    await tampered(urls.owner, caller, delete("audit_events", "true"), cover_up)
    found = await verify(users, caller)
    assert (found.intact, found.first_broken_position) == (False, 1)
    assert found.problem == checkpoints.is_cut(EVENTS)
