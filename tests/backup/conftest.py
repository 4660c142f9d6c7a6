"""A mesh to back up, a bucket for its backups, and another machine's stores to restore into."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from minio import Minio
from pydantic import SecretStr
from pyrage import x25519

from local.layout import Layout
from local.postgres import APPLICATION, BACKUP, OWNER, SUPERUSER, SYSTEM
from local.servers import BUCKET, Stores
from server import audit, ids
from server.backup.repository import Repository
from server.backup.signing import Signer
from server.blobs import Blobs
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.kms.local import LocalKms
from server.processes.backups import Restored, create_backup, restore_backup, verify_backup
from server.settings import (
    BackupBucketSettings,
    BackupSettings,
    RestoreSettings,
    VerificationSettings,
)
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from tests.conftest import DATABASE, data_keys_of, open_bucket
from tests.database.rows import insert, table, three
from tests.signing import sign_all

RESTORED = "restored"


@pytest_asyncio.fixture(scope="session")
async def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stores]:
    """The stores of another machine."""
    async with Stores(Layout(tmp_path_factory.mktemp("elsewhere")), durable=False) as running:
        yield running


def new_bucket(stores: Stores, prefix: str) -> str:
    """Make a bucket of its own for one test."""
    name = f"{prefix}-{secrets.token_hex(6)}"
    s3 = stores.s3
    Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False).make_bucket(name)
    return name


@dataclass(frozen=True, slots=True)
class Rig:
    """Who makes, verifies and restores backups of one test."""

    stores: Stores
    elsewhere: Stores
    bucket: str
    identity: Path
    recipient: str
    signing_key: str
    programs: Path
    master_key: Path

    @property
    def blobs(self) -> Blobs:
        """The bucket of backups. It is on another machine than the mesh."""
        return open_bucket(self.elsewhere, self.bucket)

    @property
    def repository(self) -> Repository:
        return Repository(self.blobs)

    @property
    def signer(self) -> Signer:
        return Signer(self.signing_key)

    def _bucket(self) -> dict[str, Any]:
        s3 = self.elsewhere.s3
        return {
            "backup_s3_endpoint": s3.endpoint,
            "backup_s3_access_key": SecretStr(s3.access_key),
            "backup_s3_secret_key": SecretStr(s3.secret_key),
            "backup_s3_bucket": self.bucket,
            "backup_s3_secure": False,
        }

    def listing(self) -> BackupBucketSettings:
        return BackupBucketSettings(**self._bucket())

    def making(self, **changes: Any) -> BackupSettings:
        s3 = self.stores.s3
        told = {
            **self._bucket(),
            "backup_database_url": SecretStr(self.stores.dsn(BACKUP, DATABASE)),
            "system_database_url": SecretStr(self.stores.dsn(SYSTEM, DATABASE)),
            "s3_endpoint": s3.endpoint,
            "s3_access_key": SecretStr(s3.access_key),
            "s3_secret_key": SecretStr(s3.secret_key),
            "s3_bucket": BUCKET,
            "s3_secure": False,
            "backup_recipients": self.recipient,
            "backup_signing_key": SecretStr(self.signing_key),
            "postgres_programs": self.programs,
            "lease_seconds": 3.0,
        }
        return BackupSettings(**told | changes)

    def opening(self) -> dict[str, Any]:
        return {
            **self._bucket(),
            "backup_identity_file": self.identity,
            "backup_signers": self.signer.public,
            "postgres_programs": self.programs,
        }

    def verifying(self, **changes: Any) -> VerificationSettings:
        told = {
            **self.opening(),
            "system_database_url": SecretStr(self.stores.dsn(SYSTEM, DATABASE)),
            "scratch_database_url": SecretStr(self.elsewhere.dsn(SUPERUSER, "postgres")),
            "master_key_file": self.master_key,
            "lease_seconds": 3.0,
        }
        return VerificationSettings(**told | changes)

    async def create(self, **changes: Any) -> str:
        """Make a backup and return its name."""
        return str((await create_backup(self.making(**changes)))["backup"])

    async def verify(
        self, point: str = "", *, unsigned: bool = False, **changes: Any
    ) -> dict[str, Any]:
        return dict(await verify_backup(self.verifying(**changes), point, unsigned=unsigned))


@pytest.fixture
def rig(stores: Stores, elsewhere: Stores, tmp_path: Path, master_key: Path) -> Rig:
    """A bucket and a key of this test."""
    identity = x25519.Identity.generate()
    file = tmp_path / "backup.key"
    file.write_text(f"# created: some day\n{identity}\n")
    file.chmod(0o600)
    return Rig(
        stores=stores,
        elsewhere=elsewhere,
        bucket=new_bucket(elsewhere, "backups"),
        identity=file,
        recipient=str(identity.to_public()),
        signing_key=base64.b64encode(secrets.token_bytes(32)).decode(),
        programs=stores.postgres.home.install / "bin",
        master_key=master_key,
    )


@dataclass(frozen=True, slots=True)
class NewMesh:
    """Stores that a backup was restored into, or is about to be."""

    rig: Rig
    settings: RestoreSettings
    bucket: str

    async def restore(self, point: str = "", *, unsigned: bool = False) -> Restored:
        return await restore_backup(self.settings, point, unsigned=unsigned)

    @property
    def blobs(self) -> Blobs:
        return open_bucket(self.rig.elsewhere, self.bucket)


@pytest_asyncio.fixture
async def new_mesh(rig: Rig, master_key: Path) -> NewMesh:
    """An empty database and an empty bucket on another machine."""
    await provisioned(rig.elsewhere)
    return describe(rig, master_key)


async def provisioned(elsewhere: Stores) -> None:
    """Make an empty database, in place of the one before, with the roles' own passwords."""
    connection = await asyncpg.connect(elsewhere.dsn(SUPERUSER, "postgres"))
    try:
        await connection.execute(f"DROP DATABASE IF EXISTS {RESTORED} WITH (FORCE)")
    finally:
        await connection.close()
    await elsewhere.postgres.provision(RESTORED)


def describe(rig: Rig, master_key: Path) -> NewMesh:
    elsewhere, bucket = rig.elsewhere, new_bucket(rig.elsewhere, "mesh")
    s3 = elsewhere.s3
    settings = RestoreSettings(
        **rig.opening(),
        owner_database_url=SecretStr(elsewhere.dsn(OWNER, RESTORED)),
        database_url=SecretStr(elsewhere.dsn(APPLICATION, RESTORED)),
        system_database_url=SecretStr(elsewhere.dsn(SYSTEM, RESTORED)),
        redis_url=SecretStr(elsewhere.valkey.url),
        s3_endpoint=s3.endpoint,
        s3_access_key=SecretStr(s3.access_key),
        s3_secret_key=SecretStr(s3.secret_key),
        s3_bucket=bucket,
        s3_secure=False,
        listen_socket=Path("/nowhere"),
        outbound_socket=Path("/nowhere"),
        master_key_file=master_key,
        token_issuer="https://auth.test",
        trust_domain="kimberly.local",
        namespace="test",
    )
    return NewMesh(rig, settings, bucket)


class Story:
    """Three users who have something everywhere, made with the same constraints as any data."""

    def __init__(self, owner: asyncpg.Connection, blobs: Blobs, database: Database) -> None:
        self.owner = owner
        self.blobs = blobs
        self.database = database
        self.everybody = self.mine, self.colleague, self.stranger = three()
        self.objects: dict[str, bytes] = {}

    async def make(self) -> None:
        for tenant_id in {each.tenant_id for each in self.everybody}:
            await self.owner.execute(
                "INSERT INTO tenants (id, created_at) VALUES ($1, now())", tenant_id
            )
        for caller in self.everybody:
            await self._join(caller)
            for number in range(5):
                await self.remember(caller, f"what was said, and is number {number}")

    async def _join(self, caller: Caller) -> None:
        for name in ("users", "accounts", "consents", "settings", "user_schedules", "sessions"):
            described = await table(self.owner, name)
            for row in described.rows(caller):
                if name == "users":
                    row["email"] = f"{caller.user_id.hex}@example.com"
                await insert(self.owner, name, row)
        keys = data_keys_of(self.database)
        await keys.prepare(caller)
        await self.owner.execute(
            "INSERT INTO embedding_models (tenant_id, user_id, model, dimension)"
            " VALUES ($1, $2, 'toy', 64)",
            caller.tenant_id,
            caller.user_id,
        )

    async def remember(self, caller: Caller, text: str) -> UUID:
        """Keep a memory with its vector, an attachment and its event, in one transaction."""
        memory_id, data = ids.new_id(), text.encode()
        vector = [1.0, *[0.0] * 63]
        vector[1 + len(self.objects) % 63] = 1.0
        async with self.owner.transaction():
            await self.owner.execute(
                """
                INSERT INTO memories (tenant_id, user_id, id, tier, content, source, occurred_at,
                                      size_bytes, content_hash, created_at, updated_at, terms)
                VALUES ($1, $2, $3, 'long_term', $4, 'chat', now(), $5, $6, now(), now(),
                        '{1:0.5}/1000000000')
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
                text,
                len(data),
                hashlib.sha256(data).digest(),
            )
            await self.owner.execute(
                """
                INSERT INTO embeddings (tenant_id, user_id, model, memory_id, dimension, in_graph,
                                        content_hash, vector)
                VALUES ($1, $2, 'toy', $3, 64, true, $4, l2_normalize($5::text::halfvec))
                """,
                caller.tenant_id,
                caller.user_id,
                memory_id,
                hashlib.sha256(data).digest(),
                str(vector),
            )
            await audit.record(self.owner, caller, "memory.create", ids.show(ids.MEMORY, memory_id))
            await self._attach(caller, memory_id, secrets.token_bytes(1000))
        return memory_id

    async def _attach(self, caller: Caller, memory_id: UUID, data: bytes) -> None:
        """Put an object, and name it."""
        attachment_id = ids.new_id()
        key = f"attachments/{caller.tenant_id.hex}/{caller.user_id.hex}/{attachment_id.hex}"
        version = await self.blobs.put(key, data, "image/png")
        self.objects[key] = data
        await self.owner.execute(
            """
            INSERT INTO attachments (tenant_id, user_id, id, memory_id, file_name, content_type,
                                     size_bytes, sha256, state, created_at, version_id)
            VALUES ($1, $2, $3, $4, 'a.png', 'image/png', $5, $6, 'complete', now(), $7)
            """,
            caller.tenant_id,
            caller.user_id,
            attachment_id,
            memory_id,
            len(data),
            hashlib.sha256(data).digest(),
            version,
        )


@dataclass(frozen=True, slots=True)
class Signing:
    """Seals and signs the audit log of a database."""

    log: AuditLog
    checkpointer: Checkpointer

    async def sign(self) -> None:
        await self.log.seal()
        await sign_all(self.checkpointer)


def signing_of(system: SystemDatabase, blobs: Blobs, master_key: Path) -> Signing:
    known = CheckpointStore(system)
    keys = AuditKeys(known, LocalKms(master_key))
    archive = CheckpointArchive(blobs, known, keys)
    log = AuditLog(AuditStore(system), archive, seal_seconds=1)
    return Signing(log, Checkpointer(known, archive, keys))


@pytest.fixture
def signing(system_database: SystemDatabase, blobs: Blobs, master_key: Path) -> Signing:
    return signing_of(system_database, blobs, master_key)


@pytest_asyncio.fixture
async def story(
    owner: asyncpg.Connection, blobs: Blobs, database: Database, signing: Signing
) -> Story:
    """Three users, and their audit log sealed and signed."""
    await blobs.keep_versions()
    # Tests share the bucket, and not the keys that words are signed with.
    for directory in ("erasures/", "withdrawals/"):
        for key in await blobs.list_keys(directory):
            await blobs.erase(key)
    told = Story(owner, blobs, database)
    await told.make()
    await signing.sign()
    return told
