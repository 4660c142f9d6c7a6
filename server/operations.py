"""What an operator does to the mesh at once: migrations, keys, plans."""

from contextlib import AsyncExitStack
from datetime import datetime
from urllib.parse import urlsplit

import asyncpg

from server import audit, ids
from server.auth.endings import ConsentEndings
from server.auth.key_store import KeyStore
from server.auth.keyring import Keyring
from server.billing.store import BillingStore
from server.enqueue import enqueue
from server.jobs.own_schedules import OwnSchedule, OwnSchedules
from server.migrate import migrate, read_migrations
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore
from server.processes.parts import open_blobs, open_databases, open_kms, patience
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM, Role, provision
from server.settings import MigrationSettings, ProvisionSettings, Settings
from server.users.audit_keys import AuditKeys
from server.users.checkpoint_store import CheckpointStore
from server.users.consent_store import ConsentStore
from server.users.withdrawal_archive import WithdrawalArchive

REWRAP = "keys.rewrap"
"""The job that wraps data keys by the newest master key."""


async def migrate_database(settings: MigrationSettings) -> int:
    """Apply the migrations that are waiting and return how many that were."""
    connection = await asyncpg.connect(settings.owner_database_url.get_secret_value())
    try:
        return await migrate(connection, read_migrations())
    finally:
        await connection.close()


async def provision_database(settings: ProvisionSettings) -> str:
    """Make roles, database and extensions, and return the name of the database.

    Raises:
        WrongRole: A URL names another role than the migrations know.
    """
    owner_url = settings.owner_database_url.get_secret_value()
    roles = [
        Role.of_url(owner_url, OWNER),
        Role.of_url(settings.database_url.get_secret_value(), APPLICATION),
        Role.of_url(settings.system_database_url.get_secret_value(), SYSTEM),
    ]
    if settings.backup_database_url:
        roles.append(Role.of_url(settings.backup_database_url.get_secret_value(), BACKUP))
    database = urlsplit(owner_url).path.lstrip("/")
    await provision(settings.superuser_database_url.get_secret_value(), database, roles)
    return database


async def rotate_signing_key(settings: Settings) -> str:
    """Publish a new signing key and return its id. It signs once every verifier knows it."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "rotate-signing-key"))
        keyring = Keyring(
            KeyStore(system),
            await open_kms(settings, stack),
            access_token_seconds=settings.access_token_seconds,
        )
        key = await keyring.rotate()
        return key.kid


async def withdraw_signing_key(settings: Settings, kid: str) -> str:
    """Withdraw a signing key at once and return the id of the one that signs from now on.

    Raises:
        NotFound: There is no such key.
    """
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(
            open_databases(settings, "withdraw-signing-key")
        )
        keyring = Keyring(
            KeyStore(system),
            await open_kms(settings, stack),
            access_token_seconds=settings.access_token_seconds,
        )
        key = await keyring.withdraw(kid)
        return key.kid


async def rotate_audit_key(settings: Settings) -> str:
    """Have a new key sign checkpoints of the audit log, and return its id."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "rotate-audit-key"))
        return await AuditKeys(CheckpointStore(system), await open_kms(settings, stack)).rotate()


async def rotate_data_keys(settings: Settings) -> str:
    """Enqueue the job that wraps data keys by the newest master key, and return its id."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "rotate-data-keys"))
        async with system.transaction() as connection:
            job_id = await enqueue(connection, kind=REWRAP, payload={})
    return ids.show(ids.JOB, job_id)


async def list_schedules(settings: Settings) -> list[OwnSchedule]:
    """Return the mesh's own schedules."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "schedules"))
        return await OwnSchedules(system).all()


async def pause_schedule(settings: Settings, name: str) -> None:
    """Have one of the mesh's own schedules make no jobs.

    Raises:
        NotFound: There is none of this name.
    """
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "schedules"))
        await OwnSchedules(system).pause(name)


async def resume_schedule(settings: Settings, name: str) -> datetime:
    """Have it make jobs again, and return when it does so next.

    Raises:
        NotFound: There is none of this name.
    """
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "schedules"))
        return await OwnSchedules(system).resume(name)


async def run_schedule(settings: Settings, name: str) -> str:
    """Have it make a job now, and return the id of that.

    Raises:
        NotFound: There is none of this name.
    """
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "schedules"))
        return ids.show(ids.JOB, await OwnSchedules(system).run(name))


async def set_plan(settings: Settings, user_id: str, plan: str) -> str:
    """Give a user a plan whose payment is settled, and return the one that they have now."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "set-plan"))
        store = BillingStore(system)
        caller = await store.find(ids.parse(ids.USER, user_id, "user"))
        return (await store.settle(caller, plan, actor=audit.SYSTEM)).plan


async def erase_again(settings: Settings) -> tuple[int, int]:
    """Withdraw anew what S3 knows of and begin every erasure again; return how many of either."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(open_databases(settings, "erase-again"))
        audit_keys = AuditKeys(CheckpointStore(system), await open_kms(settings, stack))
        blobs, signer, known = open_blobs(settings), audit_keys.signer, audit_keys.known
        consents = ConsentStore(system, ConsentEndings())
        withdrawn = await WithdrawalArchive(consents, blobs, signer, known).withdraw_again()
        erasures = ErasureStore(system, patience(settings))
        return withdrawn, await ErasureArchive(erasures, blobs, signer, known).erase_again()
