"""Backups: made, verified and restored by processes of their own, which come and go.

They are jobs of the mesh: whoever looks at the queue sees one run, how far it is, and how it ended.
Workers do not do them: these have no password of any store.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID

import structlog

from server.auth.endings import ConsentEndings
from server.backup import verifying
from server.backup.creating import CHECKPOINTS, Creator, Progress, Source, new_name
from server.backup.failures import BackupFailed
from server.backup.manifest import Manifest
from server.backup.postgres import Programs, connect
from server.backup.repository import Repository
from server.backup.restoring import (
    NotEmpty,
    Objects,
    Restorer,
    adopt,
    choose,
    has_tables,
    is_empty,
    load,
)
from server.backup.retention import Retention, outdated
from server.backup.run_store import Finished, RunStore
from server.backup.sealing import Sealer, Unsealer
from server.backup.signing import Signer, Signers
from server.backup.verifying import Report, Scratch, Verifier
from server.blobs import Blobs
from server.caller import Caller
from server.clock import utc_now
from server.data_keys import DataKeys
from server.database import SystemDatabase, open_pool
from server.kms import Kms
from server.kms.private_files import read_private
from server.memory.objects import Kind as ObjectKind
from server.migrate import migrate, read_migrations
from server.privacy import words
from server.privacy.erasing import Eraser
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore
from server.processes.alone import alone, as_job, said
from server.processes.parts import (
    open_backup_bucket,
    open_blobs,
    open_databases,
    open_kms,
    open_redis,
    patience,
)
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM, Role, provision
from server.settings import (
    BackupBucketSettings,
    BackupSettings,
    OpenBackupSettings,
    RestoreSettings,
    VerificationSettings,
)
from server.signed_words import LONGEST_BYTES
from server.users import audit_log, checkpoints, withdrawals
from server.users.audit_keys import AuditKeys
from server.users.audit_store import AuditStore
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpoints import CheckpointForged, Witness
from server.users.consent_store import ConsentStore
from server.users.withdrawal_archive import WithdrawalArchive

log = structlog.get_logger()

_AT_A_TIME: Final = 1000
_WORDS: Final = (words.DIRECTORY, f"{withdrawals.KIND}/")
"""What the keys of words begin with that no backup may take back."""


# --- create --------------------------------------------------------------------------------------


async def create_backup(settings: BackupSettings) -> Mapping[str, Any]:
    """Make a backup, remove those whose time is over, and return what it consists of.

    Raises:
        Busy: Another process makes one.
        BackupFailed: Objects were missing: what was there is in the backup. Or the replica stays
            behind: there is none.
    """
    sealer = Sealer(settings.backup_recipients.split())
    signer = Signer(settings.backup_signing_key.get_secret_value())
    bucket = open_backup_bucket(settings)
    repository = Repository(bucket)
    source = Source(
        settings.backup_database_url.get_secret_value(),
        settings.system_database_url.get_secret_value(),
        open_blobs(settings),
        Programs(settings.postgres_programs),
        checkpoints.object_key,
        _WORDS,
    )
    creator = Creator(source, repository, sealer, signer)
    retention = Retention(settings.backup_days, settings.backup_weekly_days)
    system_url = settings.system_database_url.get_secret_value()

    async with alone("create", system_url) as system:

        async def work(progress: Progress) -> dict[str, Any]:
            await bucket.ensure()
            await repository.remove_unfinished()
            await creator.copy_words(bucket)
            backup = new_name(utc_now())
            runs = RunStore(system)
            run_id = await runs.begin("create")
            await runs.name(run_id, backup)
            try:
                created = await creator.create(backup, progress)
            except BaseException as error:
                await runs.finish(run_id, Finished("failed", {"error": said(error)}))
                raise
            report = {
                **_summary(created.manifest),
                "removed": await _prune(repository, retention),
            }
            ended = Finished(
                "failed" if created.manifest.lost else "succeeded",
                report,
                created.manifest.new_bytes,
                created.digest,
            )
            await runs.finish(run_id, ended)
            if created.manifest.lost:
                raise BackupFailed(f"{created.manifest.lost} objects were missing; see the log")
            return report

        return await as_job(system, "backup.create", settings.lease_seconds, work)


async def list_backups(settings: BackupBucketSettings) -> Sequence[Manifest]:
    """Return the backups that there are, the oldest first."""
    repository = Repository(open_backup_bucket(settings))
    return [(await repository.manifest(name))[0] for name in await repository.ids()]


async def _prune(repository: Repository, retention: Retention) -> Mapping[str, int]:
    """Remove backups whose time is over, and what only they referred to."""
    marks = {name: (await repository.manifest(name))[0].mark for name in await repository.ids()}
    old = outdated(marks, retention, utc_now())
    for name in sorted(old):
        await repository.remove(name)
    return {"backups": len(old), "objects": await repository.remove_unreferred()}


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "backup": manifest.id,
        "mark": manifest.mark.isoformat(),
        "seconds": round((manifest.finished_at - manifest.mark).total_seconds(), 3),
        "rows": manifest.rows,
        "objects": manifest.objects,
        "gone": manifest.gone,
        "lost": manifest.lost,
        "new_bytes": manifest.new_bytes,
    }


# --- verify --------------------------------------------------------------------------------------


async def verify_backup(
    settings: VerificationSettings, point: str, *, unsigned: bool = False
) -> Mapping[str, Any]:
    """Restore a backup into the scratch server, compare it, and return what was looked at.

    Raises:
        Busy: Another process verifies.
        NotFound: There is no such backup.
        ManifestForged: It is not signed, unless that is asked for, or by somebody else.
        BackupFailed: The backup is not what it should be.
    """
    unsealer, signers = _unsealer(settings), Signers(settings.backup_signers.split())
    repository = Repository(open_backup_bucket(settings))
    system_url = settings.system_database_url.get_secret_value()
    scratch_url = settings.scratch_database_url.get_secret_value()
    await verifying.refuse_same_server(scratch_url, system_url)
    async with AsyncExitStack() as stack:
        kms = await open_kms(settings, stack)
        system = await stack.enter_async_context(alone("verify", system_url))
        verifier = Verifier(
            repository,
            unsealer,
            Programs(settings.postgres_programs),
            scratch_url=scratch_url,
            provision=_provision_scratch,
            check_log=lambda scratch, signed: _check_logs(scratch, signed, kms),
            checkpoints=CHECKPOINTS,
        )

        async def work(progress: Progress) -> dict[str, Any]:
            runs = RunStore(system)
            run_id = await runs.begin("verify")
            try:
                backup = await choose(repository, point)
                await runs.name(run_id, backup)
                manifest, digest = await repository.signed_manifest(
                    backup, signers, unsigned=unsigned
                )
                report = await verifier.verify(manifest, progress)
            except BaseException as error:
                await runs.finish(run_id, Finished("failed", {"error": said(error)}))
                raise
            ended = Finished(
                "succeeded" if report.is_good else "failed",
                report.fields(),
                report.object_bytes,
                digest,
            )
            await runs.finish(run_id, ended)
            return _told(report)

        return await as_job(system, "backup.verify", settings.lease_seconds, work)


def _told(report: Report) -> dict[str, Any]:
    """Return a report whose backup is good.

    Raises:
        BackupFailed: It is not.
    """
    if not report.is_good:
        lines = [f"backup {report.backup} is damaged:", *report.fields()["problems"]]
        raise BackupFailed("\n  ".join(lines))
    return report.fields()


async def _provision_scratch(superuser_url: str, name: str) -> Scratch:
    """Make the roles and a database, with passwords that nobody will know."""
    passwords = {role: secrets.token_hex(16) for role in (OWNER, APPLICATION, SYSTEM, BACKUP)}
    await provision(superuser_url, name, [Role(*each) for each in passwords.items()])

    def url(user: str | None = None) -> str:
        parts = urlsplit(superuser_url)
        netloc = parts.netloc
        if user:
            netloc = f"{user}:{passwords[user]}@{netloc.rpartition('@')[2]}"
        return parts._replace(netloc=netloc, path=f"/{name}").geturl()

    return Scratch(url(), url(OWNER), url(SYSTEM))


async def _check_logs(
    scratch: Scratch, signed: Sequence[Mapping[str, Any]], kms: Kms
) -> tuple[int, list[str]]:
    """Verify the audit log of every tenant, and compare it with what was signed."""
    tokens = {UUID(each["tenant_id"]): each for each in signed}
    events, problems = 0, list[str]()
    async with await open_pool(scratch.system_url, size=2, name="verify") as pool:
        system = SystemDatabase(pool)
        store, known = AuditStore(system), CheckpointStore(system)
        keys = await AuditKeys(known, kms).known()
        async with system.transaction() as connection:
            rows = await connection.fetch("SELECT tenant_id FROM audit_heads ORDER BY tenant_id")
        for tenant_id in sorted({UUID(int=row["tenant_id"].int) for row in rows} | tokens.keys()):
            end = await store.end(tenant_id)
            reached, broken = await audit_log.examine(store, tenant_id, end)
            if broken is None and tenant_id in tokens:
                witness = _witness(tokens[tenant_id], keys)
                hashes = await known.hashes(tenant_id, [witness.position])
                broken = checkpoints.compare([witness], hashes, reached.position)
            events += reached.position
            if broken:
                problems.append(f"audit log {tenant_id.hex}: {broken.position}: {broken.problem}")
    return events, problems


def _witness(signed: Mapping[str, Any], keys: Mapping[str, Any]) -> Witness:
    position = int(signed["position"])
    try:
        checkpoint = checkpoints.read(signed["token"], keys)
    except CheckpointForged:
        problem = checkpoints.is_forged if signed["token"] else checkpoints.is_missing
        return Witness(position, None, problem(position))
    return Witness(position, checkpoint)


# --- restore -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restored:
    """What a new mesh has been given."""

    manifest: Manifest
    erased: int
    withdrawn: int
    """Consents that the backup has as granted."""
    objects: Objects


async def restore_backup(
    settings: RestoreSettings, point: str, *, unsigned: bool = False
) -> Restored:
    """Bring up a new mesh: fill its empty database and bucket, and erase whoever was erased.

    What was withdrawn since is withdrawn again, whether or not it was granted once more after that.

    It may be done again, until it was done to the end.

    Raises:
        NotFound: There is no such backup.
        ManifestForged: It is not signed, unless that is asked for, or by somebody else.
        NotEmpty: There is a mesh already.
        WordForged: Somebody is said to be erased, or to have withdrawn a consent, and it is not to
            be believed.
        BackupFailed: Objects of the backup are damaged. All others are there.
    """
    unsealer, bucket = _unsealer(settings), open_backup_bucket(settings)
    repository, signers = Repository(bucket), Signers(settings.backup_signers.split())
    backup = await choose(repository, point)
    manifest, digest = await repository.signed_manifest(backup, signers, unsigned=unsigned)
    blobs = open_blobs(settings)
    owner_url = settings.owner_database_url.get_secret_value()
    await _fill(settings, repository, unsealer, manifest)
    restorer = Restorer(repository, unsealer, blobs, checkpoints.object_key)
    async with connect(owner_url) as connection:
        await migrate(connection, read_migrations())
        await adopt(connection, restorer.gone(manifest))
    async with AsyncExitStack() as stack:
        database, system = await stack.enter_async_context(open_databases(settings, "restore"))
        kms = await open_kms(settings, stack)
        store = ErasureStore(system, patience(settings))
        eraser = Eraser(
            system,
            store,
            DataKeys(database, kms),
            blobs,
            open_redis(settings, stack),
            object_kinds=(*ObjectKind, withdrawals.KIND),
        )
        keys = AuditKeys(CheckpointStore(system), kms)
        archive = ErasureArchive(store, blobs, keys.signer, keys.known)
        consents = ConsentStore(system, ConsentEndings())
        withdrawn = WithdrawalArchive(consents, blobs, keys.signer, keys.known)
        await blobs.keep_versions()
        await _bring_words(bucket, blobs)
        withdrawn_again = await withdrawn.withdraw_again()
        await archive.erase_again()
        erased = await _erase(system, eraser)
        objects = await restorer.objects(manifest, {caller.user_id for caller in erased})
        await restorer.checkpoints(manifest)
        if objects.damages:
            raise BackupFailed("\n  ".join(["objects are damaged:", *objects.damages]))
        done = Finished("succeeded", _summary(manifest), manifest.new_bytes, digest)
        await RunStore(system).finish_restore(manifest.id, done)
    return Restored(manifest, len(erased), withdrawn_again, objects)


async def _fill(
    settings: RestoreSettings, repository: Repository, unsealer: Unsealer, manifest: Manifest
) -> None:
    """Fill the database, unless an earlier try has filled it from this very backup.

    Raises:
        NotEmpty: There is a mesh already.
    """
    owner_url = settings.owner_database_url.get_secret_value()
    programs = Programs(settings.postgres_programs)
    async with connect(owner_url) as connection:
        is_filled = await has_tables(connection)
    if is_filled:
        async with open_databases(settings, "restore") as (_, system):
            if await RunStore(system).is_restoring(manifest.id):
                return
    if not await is_empty(owner_url, open_blobs(settings)):
        raise NotEmpty(
            "the database or the bucket is not empty: restore into new ones, "
            "made by `python -m server provision` and not migrated"
        )
    await load(repository, unsealer, manifest, programs, owner_url)


async def _bring_words(bucket: Blobs, blobs: Blobs) -> None:
    """Bring the words of what no backup may take back to where the mesh keeps them."""
    for directory in _WORDS:
        async for page in bucket.pages(directory):
            for key in page:
                word = await bucket.get_small(key, longest=LONGEST_BYTES)
                await blobs.put_new(key, word or b"")


async def _erase(system: SystemDatabase, eraser: Eraser) -> list[Caller]:
    """Erase everybody who is to be erased, to the end, and return who that is."""
    async with system.transaction() as connection:
        rows = await connection.fetch("SELECT tenant_id, user_id FROM erasures ORDER BY id")
    erased = [Caller(UUID(int=tenant.int), UUID(int=user.int)) for tenant, user in rows]
    for caller in erased:
        while not (await eraser.erase(caller, _AT_A_TIME)).is_done:
            pass
    return erased


def _unsealer(settings: OpenBackupSettings) -> Unsealer:
    path = settings.backup_identity_file
    return Unsealer(read_private(path, "KIMBERLY_BACKUP_IDENTITY_FILE").decode("ascii", "replace"))
