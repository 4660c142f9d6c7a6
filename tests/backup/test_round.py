"""A backup is made, verified and restored, and the new mesh goes on where the old one was."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from local.postgres import APPLICATION, SUPERUSER, SYSTEM
from server.auth.endings import ConsentEndings
from server.backup.manifest import Table
from server.backup.snapshot import digest_tables
from server.consent import MEMORY_STORE
from server.database import Database, SystemDatabase, open_pool
from server.errors import ContentUnreadable, InvalidArgument
from server.kms.local import LocalKms
from server.memory.change_store import Asked, ChangeStore, Cursor
from server.memory.watching import Feed
from server.privacy import words
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore, Patience
from server.processes.backups import list_backups
from server.users import withdrawals
from server.users.audit_keys import AuditKeys
from server.users.checkpoint_store import CheckpointStore
from server.users.consent_store import ConsentStore
from server.users.withdrawal_archive import WithdrawalArchive
from tests.backup.conftest import RESTORED, NewMesh, Rig, Story, signing_of
from tests.conftest import data_keys_of
from tests.deciding import decide

CHANGED = {"attachments", "backup_runs", "sessions"}
"""Tables that a restore changes: versions of objects, how the backup ended, who is logged in."""
NOW = Patience(settle=timedelta(), confirm=timedelta(hours=1))


async def digests(connection: asyncpg.Connection) -> Mapping[str, Table]:
    async with connection.transaction():
        return await digest_tables(connection)


async def test_what_was_backed_up_is_verified_and_restored(
    rig: Rig, story: Story, owner: asyncpg.Connection, new_mesh: NewMesh
) -> None:
    backup = await rig.create()
    assert [each.id for each in await list_backups(rig.listing())] == [backup]

    report = await rig.verify()
    assert report["problems"] == []
    assert report["backup"] == backup
    assert (report["objects"], report["object_bytes"]) == (15, 15_000)
    assert report["probes"] == 3
    assert report["events"] == 15

    before = await digests(owner)
    await rig.elsewhere.postgres.provision(RESTORED)
    restored = await new_mesh.restore()
    assert restored.manifest.id == backup
    copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
    try:
        after = await digests(copy)
        assert await copy.fetchval("SELECT count(*) FROM sessions") == 0
        assert await copy.fetchval(
            "SELECT bool_and(relforcerowsecurity) FROM pg_class WHERE relname = ANY ($1)",
            ["attachments", "sessions", "memories"],
        )
    finally:
        await copy.close()
    unchanged = before.keys() - CHANGED - {"jobs"}
    assert {name: after[name] for name in unchanged} == {n: before[n] for n in unchanged}
    for key, data in story.objects.items():
        assert await new_mesh.blobs.get_small(key, longest=2000) == data


async def test_the_log_and_the_feed_go_on_after_a_restore(
    rig: Rig,
    story: Story,
    new_mesh: NewMesh,
    system_database: SystemDatabase,
    master_key: Path,
) -> None:
    mine = story.mine
    changes = ChangeStore(system_database)
    seen = (await changes.news([Asked(mine, Cursor(0), 100)]))[0]
    await rig.create()
    # What comes after the mark is lost, and somebody has seen it.
    await story.remember(mine, "after the backup")
    lost = (await changes.news([Asked(mine, seen.events[-1].cursor, 100)]))[0].events
    assert len(lost) == 1

    await new_mesh.restore()
    url = rig.elsewhere.dsn(SYSTEM, RESTORED)
    async with await open_pool(url, size=3, name="test") as pool:
        system = SystemDatabase(pool)
        copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
        application = await open_pool(rig.elsewhere.dsn(APPLICATION, RESTORED), size=2, name="test")
        try:
            going_on = Story(copy, new_mesh.blobs, Database(application))
            await going_on.remember(mine, "in the new mesh")
        finally:
            await application.close()
            await copy.close()
        signing = signing_of(system, new_mesh.blobs, master_key)
        await signing.sign()
        verified = await signing.log.verify(mine.tenant_id)
        assert verified.broken is None
        assert verified.verified_events == 11
        assert verified.testimony.comparison.value == "compared"

        feed = ChangeStore(system)
        news, gone = await feed.news(
            [Asked(mine, seen.events[-1].cursor, 100), Asked(mine, lost[0].cursor, 100)]
        )
        assert [event.kind.name for event in news.events] == ["CREATED"]
        assert not news.is_lost
        # Its reader believes in a memory that there never was.
        assert gone.is_lost
        watching = Feed(feed)
        looking = asyncio.create_task(watching.run())
        with watching.watched(mine, lost[0].cursor) as watch:
            async with asyncio.timeout(60):
                await watch.called.wait()
            with pytest.raises(InvalidArgument, match="a restore undid"):
                watch.check()
        looking.cancel()
        await asyncio.wait([looking])


async def test_transactions_are_numbered_above_all_that_were(
    rig: Rig, story: Story, new_mesh: NewMesh
) -> None:
    await rig.create()
    await new_mesh.restore()
    copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
    try:
        number = await copy.fetchval("SELECT transaction_number()")
        newest = await copy.fetchval("SELECT max(xid::text::bigint) FROM audit_events")
        assert 0 < newest < 2**32 < number
    finally:
        await copy.close()


async def test_who_is_erased_after_the_backup_stays_erased(
    rig: Rig,
    story: Story,
    system_database: SystemDatabase,
    database: Database,
    new_mesh: NewMesh,
    master_key: Path,
) -> None:
    await rig.create()
    store = ErasureStore(system_database, NOW)
    audit_keys = AuditKeys(CheckpointStore(system_database), LocalKms(master_key))
    archive = ErasureArchive(
        store, story.blobs, audit_keys.signer, audit_keys.known, copies=[rig.blobs]
    )
    await store.begin(story.mine)
    await archive.archive()

    restored = await new_mesh.restore()
    assert restored.erased == 1
    assert restored.objects.left_out == 5
    copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
    try:
        for name in ("memories", "embeddings", "attachments", "user_keys", "settings"):
            owners = await copy.fetch(f"SELECT DISTINCT user_id FROM {name}")
            assert {each["user_id"] for each in owners} == {
                story.colleague.user_id,
                story.stranger.user_id,
            }
        assert await copy.fetchval("SELECT state FROM erasures") == "erased"
    finally:
        await copy.close()
    theirs = [key for key in await new_mesh.blobs.list_keys("") if story.mine.user_id.hex in key]
    assert theirs == [f"{words.DIRECTORY}{story.mine.user_id.hex}.jws"]
    # The key came back with the dump, and is shredded: what it sealed opens no more.
    url = rig.elsewhere.dsn(APPLICATION, RESTORED)
    async with await open_pool(url, size=2, name="test") as pool:
        keys = data_keys_of(Database(pool))
        with pytest.raises(ContentUnreadable):
            await keys.existing_key_of(story.mine)
        assert len(await keys.existing_key_of(story.colleague)) == 32


async def test_what_is_withdrawn_after_the_backup_stays_withdrawn(
    rig: Rig,
    story: Story,
    system_database: SystemDatabase,
    new_mesh: NewMesh,
    master_key: Path,
) -> None:
    await rig.create()
    audit_keys = AuditKeys(CheckpointStore(system_database), LocalKms(master_key))
    consents = ConsentStore(system_database, ConsentEndings())
    archive = WithdrawalArchive(
        consents, story.blobs, audit_keys.signer, audit_keys.known, copies=[rig.blobs]
    )
    for caller, decisions in (
        (story.mine, (False,)),
        # What was granted again is not known to the bucket: the user is asked anew.
        (story.colleague, (False, True)),
    ):
        for granted in decisions:
            await decide(system_database, caller, MEMORY_STORE, granted=granted)
    await archive.archive()

    restored = await new_mesh.restore()
    assert restored.withdrawn == 2
    copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
    try:
        rows = await copy.fetch(
            """
            SELECT DISTINCT ON (user_id) user_id, granted
              FROM consents
             WHERE purpose = $1
             ORDER BY user_id, version DESC
            """,
            MEMORY_STORE,
        )
    finally:
        await copy.close()
    assert {row["user_id"]: row["granted"] for row in rows} == {
        story.mine.user_id: False,
        story.colleague.user_id: False,
        story.stranger.user_id: True,
    }
    # The new mesh has the words, too: it may be restored itself.
    kept = await new_mesh.blobs.list_keys(f"{withdrawals.KIND}/")
    assert len([key for key in kept if story.mine.user_id.hex in key]) == 1


async def test_the_next_backup_tells_its_bucket_what_services_could_not(
    rig: Rig,
    story: Story,
    system_database: SystemDatabase,
    new_mesh: NewMesh,
    master_key: Path,
) -> None:
    await rig.create()
    audit_keys = AuditKeys(CheckpointStore(system_database), LocalKms(master_key))
    consents = ConsentStore(system_database, ConsentEndings())
    archive = WithdrawalArchive(consents, story.blobs, audit_keys.signer, audit_keys.known)
    await decide(system_database, story.mine, MEMORY_STORE, granted=False)
    await archive.archive()
    first = (await list_backups(rig.listing()))[0].id
    await rig.create()
    assert (await new_mesh.restore(first)).withdrawn == 1
