"""What is wrong with a backup is named: every byte, every part, and the wrong key."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr
from pyrage import x25519

from local.postgres import BACKUP, SUPERUSER, SYSTEM
from local.servers import BUCKET
from server.backup.creating import Creator, Source, new_name
from server.backup.failures import BackupFailed
from server.backup.manifest import Manifest, Part
from server.backup.postgres import Programs
from server.backup.repository import Damaged
from server.backup.restoring import NotEmpty
from server.backup.run_store import RunStore
from server.backup.sealing import KeyRefused, Sealer
from server.backup.signing import ManifestForged, Signer, Unsigned
from server.backup.verifying import ScratchRefused
from server.blobs import Blobs
from server.clock import utc_now
from server.database import SystemDatabase
from server.errors import NotFound
from server.privacy import words
from server.processes.backups import create_backup
from server.signed_words import WordForged
from server.users import checkpoints
from tests.backup.conftest import RESTORED, NewMesh, Rig, Story
from tests.conftest import DATABASE, open_bucket

Choose = Callable[[list[str]], str]


def part_of(stream: str) -> Choose:
    return lambda keys: next(key for key in keys if f"/{stream}/" in key)


def an_object(keys: list[str]) -> str:
    return next(key for key in keys if key.startswith("objects/"))


PLACES = {
    "dump": part_of("database"),
    "catalogue": part_of("catalogue"),
    "checkpoints": part_of("checkpoints"),
    "references": part_of("references"),
    "object": an_object,
}


async def flip(blobs: Blobs, key: str) -> None:
    """Change one bit of one byte in the middle."""
    data = bytearray(await blobs.get_small(key, longest=2**30) or b"")
    data[len(data) // 2] ^= 1
    await blobs.put(key, bytes(data), "application/octet-stream")


@pytest.mark.parametrize("places", [["dump", "object", "references"], ["catalogue", "checkpoints"]])
async def test_a_flipped_byte_and_a_missing_part_are_reported_and_named(
    rig: Rig, story: Story, places: list[str]
) -> None:
    await rig.create()
    keys = [PLACES[place](await keys_of(rig)) for place in places]
    whole = {key: await rig.blobs.get_small(key, longest=2**30) or b"" for key in keys}
    for key in keys:
        await flip(rig.blobs, key)
    with pytest.raises(BackupFailed) as flipped:
        await rig.verify()
    for key in keys:
        await rig.blobs.remove_version(key, None)
    with pytest.raises(BackupFailed) as missing:
        await rig.verify()
    for key in keys:
        assert f"{key} is not what was written" in str(flipped.value)
        assert f"{key} is missing" in str(missing.value)
    for key, data in whole.items():
        await rig.blobs.put(key, data, "application/octet-stream")
    assert (await rig.verify())["problems"] == []


async def test_all_that_is_wrong_is_in_the_report_and_in_the_gauges(
    rig: Rig, story: Story, owner: asyncpg.Connection, system_database: SystemDatabase
) -> None:
    runs = RunStore(system_database)
    assert await runs.gauges() == {}
    backup = await rig.create()
    await rig.verify()
    good = await runs.gauges()
    assert good["backup_verify_ok"] == 1
    assert good["backup_last_bytes"] > 0
    keys = await rig.blobs.list_keys("")
    for name in ("dump", "object"):
        await flip(rig.blobs, PLACES[name](keys))
    with pytest.raises(BackupFailed):
        await rig.verify()
    bad = await runs.gauges()
    assert bad == {**good, "backup_verify_ok": 0}
    report = await owner.fetchval(
        "SELECT report ->> 'problem_count' FROM backup_runs"
        " WHERE kind = 'verify' AND backup = $1 AND outcome = 'failed'",
        backup,
    )
    assert report == "2"


async def test_rows_that_changed_on_their_way_are_reported(rig: Rig, story: Story) -> None:
    backup = await rig.create()
    manifest, _ = await rig.repository.manifest(backup)
    text = manifest.encode().decode()
    memories = manifest.tables["memories"]
    for was, becomes, said in (
        (memories.digest, "0" * 64, "table memories has other rows than it had"),
        ('"memories"', '"recollections"', "table recollections is missing"),
    ):
        changed = text.replace(was, becomes).encode()
        await rig.blobs.put(f"backups/{backup}/manifest.json", changed, "application/json")
        # Signed as well: what is compared are the tables.
        signature = rig.signer.sign(changed)
        await rig.blobs.put(f"backups/{backup}/manifest.sig", signature, "application/json")
        with pytest.raises(BackupFailed, match=said):
            await rig.verify()


async def test_a_manifest_that_was_changed_is_refused_though_all_digests_fit(
    rig: Rig, story: Story, new_mesh: NewMesh, system_database: SystemDatabase
) -> None:
    """Somebody who may write to the bucket puts another part there, sealed for whom it is to be."""
    backup = await rig.create()
    manifest, _ = await rig.repository.manifest(backup)
    forged = await Sealer([rig.recipient]).seal(b"")
    number = len(manifest.streams["checkpoints"]) - 1
    key = f"backups/{backup}/checkpoints/{number:06}"
    assert key in await keys_of(rig)
    await rig.blobs.put(key, forged, "application/octet-stream")
    part = Part(len(forged), hashlib.sha256(forged).hexdigest())
    streams = {**manifest.streams, "checkpoints": (*manifest.streams["checkpoints"][:-1], part)}
    changed = dataclasses.replace(manifest, streams=streams).encode()
    await rig.blobs.put(f"backups/{backup}/manifest.json", changed, "application/json")
    assert await rig.repository.damages(Manifest.decode(changed)) == []
    for unsigned in (False, True):
        with pytest.raises(ManifestForged, match=f"the manifest of {backup} is not what any of"):
            await rig.verify(unsigned=unsigned)
        with pytest.raises(ManifestForged):
            await new_mesh.restore(unsigned=unsigned)
    assert (await RunStore(system_database).gauges())["backup_verify_ok"] == 0
    assert await new_mesh.blobs.list_keys("") == []
    # Whoever signs it with a key of their own gains nothing, nor who moves another's signature.
    for signature in (Signer(another_key()).sign(changed), await signature_of(rig)):
        await rig.blobs.put(f"backups/{backup}/manifest.sig", signature, "application/octet-stream")
        with pytest.raises(ManifestForged):
            await rig.verify(backup)


def another_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


async def signature_of(rig: Rig) -> bytes:
    """Return the signature of one more backup."""
    key = f"backups/{await rig.create()}/manifest.sig"
    return await rig.blobs.get_small(key, longest=1024) or b""


async def test_a_backup_without_a_signature_is_taken_only_if_that_is_said(
    rig: Rig, story: Story, new_mesh: NewMesh
) -> None:
    backup = await rig.create()
    await rig.blobs.remove_version(f"backups/{backup}/manifest.sig", None)
    with pytest.raises(Unsigned, match="say --unsigned"):
        await new_mesh.restore()
    assert (await new_mesh.restore(unsigned=True)).manifest.id == backup
    with pytest.raises(Unsigned):
        await rig.verify()
    assert (await rig.verify(unsigned=True))["problems"] == []


async def test_whoever_signed_before_a_rotation_still_counts(rig: Rig, story: Story) -> None:
    await rig.create()
    both = f"{Signer(another_key()).public} {rig.signer.public}"
    assert (await rig.verify(backup_signers=both))["problems"] == []
    for nobody in ("", "not base64", rig.signer.public[:-8]):
        with pytest.raises(KeyRefused):
            await rig.verify(backup_signers=nobody)


async def test_another_key_opens_nothing(rig: Rig, story: Story, tmp_path: Path) -> None:
    await rig.create()
    other = tmp_path / "other.key"
    other.write_text(str(x25519.Identity.generate()))
    other.chmod(0o600)
    with pytest.raises(BackupFailed, match="no key opens it"):
        await rig.verify(backup_identity_file=other)


async def test_nothing_of_what_was_said_is_readable_in_the_bucket(rig: Rig, story: Story) -> None:
    await rig.create()
    whole = b"".join(
        [await rig.blobs.get_small(key, longest=2**30) or b"" for key in await keys_of(rig)]
    )
    assert b"what was said" not in whole
    for caller in story.everybody:
        assert caller.user_id.hex.encode() not in whole
    for data in story.objects.values():
        assert data not in whole


async def keys_of(rig: Rig) -> list[str]:
    return await rig.blobs.list_keys("")


async def test_an_object_that_is_lost_makes_the_backup_fail_and_one_that_was_deleted_does_not(
    rig: Rig, story: Story, owner: asyncpg.Connection, new_mesh: NewMesh
) -> None:
    lost = min(story.objects)
    await story.blobs.erase(lost)
    with pytest.raises(BackupFailed, match="1 objects were missing"):
        await rig.create()
    await story.blobs.put(lost, story.objects[lost], "image/png")
    await owner.execute("UPDATE attachments SET version_id = NULL")
    # The object of a new row is gone, and the row goes while the backup is made.
    await story.remember(story.mine, "soon forgotten")
    deleted = list(story.objects)[-1]
    await story.blobs.erase(deleted)

    async def delete() -> None:
        connection = await asyncpg.connect(rig.stores.dsn(SUPERUSER, DATABASE))
        await connection.execute(
            "DELETE FROM attachments WHERE id = $1::text::uuid", deleted.rsplit("/", 1)[1]
        )
        await connection.close()

    def progress(reached: float) -> None:
        # The dump is made, and nothing copied yet. In a thread: no callback may wait.
        if reached == 0.5:
            thread = threading.Thread(target=lambda: asyncio.run(delete()))
            thread.start()
            thread.join()

    created = await creator_of(rig).create(new_name(utc_now()), progress)
    assert (created.manifest.gone, created.manifest.lost) == (1, 0)
    report = await rig.verify()
    assert (report["objects"], report["problems"]) == (15, [])
    await rig.elsewhere.postgres.provision(RESTORED)
    restored = await new_mesh.restore()
    assert restored.objects.restored == 15
    copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
    assert await copy.fetchval("SELECT count(*) FROM attachments") == 15
    await copy.close()


def creator_of(rig: Rig) -> Creator:
    source = Source(
        rig.stores.dsn(BACKUP, DATABASE),
        rig.stores.dsn(SYSTEM, DATABASE),
        open_bucket(rig.stores, BUCKET),
        Programs(rig.programs),
        checkpoints.object_key,
        (words.DIRECTORY,),
    )
    return Creator(source, rig.repository, Sealer([rig.recipient]), rig.signer)


async def test_a_restore_goes_on_until_it_is_done_and_then_never_again(
    rig: Rig, story: Story, new_mesh: NewMesh
) -> None:
    backup = await rig.create()
    key = an_object(await keys_of(rig))
    whole = await rig.blobs.get_small(key, longest=2**30) or b""
    await rig.blobs.remove_version(key, None)
    with pytest.raises(BackupFailed, match=f"{key} is missing"):
        await new_mesh.restore()
    assert len(await new_mesh.blobs.list_keys("attachments/")) == 14
    await rig.blobs.put(key, whole, "application/octet-stream")
    assert (await new_mesh.restore()).objects.restored == 15
    with pytest.raises(NotEmpty):
        await new_mesh.restore(backup)


async def test_a_bucket_with_anything_in_it_is_not_restored_into(
    rig: Rig, story: Story, new_mesh: NewMesh
) -> None:
    await rig.create()
    await new_mesh.blobs.put("audit/somebody/1.jws", b"signed", "text/plain")
    with pytest.raises(NotEmpty):
        await new_mesh.restore()


async def test_a_word_that_is_not_to_be_believed_stops_the_restore(
    rig: Rig, story: Story, new_mesh: NewMesh
) -> None:
    await rig.create()
    key = f"{words.DIRECTORY}{story.mine.user_id.hex}.jws"
    await rig.blobs.put(key, b"said by anybody", "text/plain")
    with pytest.raises(WordForged, match=key):
        await new_mesh.restore()
    await rig.blobs.remove_version(key, None)
    await new_mesh.blobs.erase(key)
    restored = await new_mesh.restore()
    assert (restored.erased, restored.objects.restored) == (0, 15)


async def test_the_server_that_is_backed_up_is_no_scratch_server(rig: Rig, story: Story) -> None:
    await rig.create()
    with pytest.raises(ScratchRefused):
        await rig.verify(scratch_database_url=rig.stores.dsn("postgres", "postgres"))


async def test_a_point_is_a_backup_or_the_newest_one_by_then(rig: Rig, story: Story) -> None:
    first, second = await rig.create(), await rig.create()
    marks = [(await rig.repository.manifest(name))[0].mark for name in (first, second)]
    assert (await rig.verify(first))["backup"] == first
    assert (await rig.verify(marks[1].isoformat()))["backup"] == second
    between = marks[0] + (marks[1] - marks[0]) / 2
    assert (await rig.verify(between.isoformat()))["backup"] == first
    for nonsense in ("yesterday", "2020-01-01T00:00:00Z", between.replace(tzinfo=None).isoformat()):
        with pytest.raises(NotFound):
            await rig.verify(nonsense)


async def test_a_restore_goes_to_the_point_that_was_named(
    rig: Rig, story: Story, new_mesh: NewMesh
) -> None:
    first = await rig.create()
    later = "what the point does not know yet"
    await story.remember(story.mine, later)
    second = await rig.create()
    marks = [(await rig.repository.manifest(name))[0].mark for name in (first, second)]
    restored = await new_mesh.restore((marks[0] + (marks[1] - marks[0]) / 2).isoformat())
    assert restored.manifest.id == first
    copy = await asyncpg.connect(rig.elsewhere.dsn(SUPERUSER, RESTORED))
    try:
        contents = [row["content"] for row in await copy.fetch("SELECT content FROM memories")]
    finally:
        await copy.close()
    assert len(contents) == 15
    assert later not in contents


async def test_a_recipient_that_is_no_key_makes_no_backup(rig: Rig) -> None:
    for nobody in ("", "age1nobody"):
        with pytest.raises(KeyRefused):
            await create_backup(rig.making(backup_recipients=nobody))
    with pytest.raises(KeyRefused):
        await create_backup(rig.making(backup_signing_key=SecretStr("")))
    assert await keys_of(rig) == []


async def test_what_is_not_what_the_database_says_is_not_stored(rig: Rig) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"something else"

    with pytest.raises(Damaged):
        await rig.repository.write_object("0" * 64, 14, chunks(), Sealer([rig.recipient]))
    assert await keys_of(rig) == []
