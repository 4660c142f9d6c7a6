"""The drill: a backup under load, everything gone, a new mesh out of the bucket."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
import os
import random
import secrets
import shutil
import ssl
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users
from minio import Minio
from pyrage import x25519

from local.fleet import MASTER_KEY, Commands, Fleet
from local.layout import CHECKOUT, Layout
from local.mesh import Mesh
from local.postgres import BACKUP, OWNER, SUPERUSER, SYSTEM
from local.servers import Stores
from server import ids
from server.access import EDGE, PROCESSES
from server.backup.manifest import Table
from server.backup.postgres import Programs, connect
from server.backup.repository import Repository
from server.backup.restoring import Restorer, adopt, load
from server.backup.sealing import Unsealer
from server.backup.signing import Signer
from server.backup.snapshot import _digest_table, digest_tables
from server.blobs import Blobs
from server.processes.backups import _provision_scratch
from server.users import checkpoints
from tests.conftest import open_bucket
from tests.mesh import PASSWORD, User, address_of, bearer, eventually, sign_up
from tests.transports import Grpc, Refused

BUCKET = "backups"
WRITERS = 4
LOAD_SECONDS = float(os.environ.get("LOAD_SECONDS", "3"))
"""How long there is load before the backup begins, and after it ended."""
OF_A_RESTORE = {"backup_runs": "kind = 'create'", "jobs": "kind = 'user.erase'"}
"""Rows in which a restore notes that the backup, under way in its own eyes, has ended, and that who
was erased is to be erased once more."""


@dataclass(frozen=True, slots=True)
class Write:
    """A write that was acknowledged: when by the clock of this machine, and what is so since."""

    at: float
    state: str | None
    """None: it is gone."""


@dataclass(slots=True)
class Written:
    """What was acknowledged."""

    things: dict[str, list[Write]] = field(default_factory=dict)
    """The writes of each memory, by its id, and of the settings of each user, by theirs. Whoever
    writes a thing is alone with it, and waits for the answer."""
    kinds: dict[str, list[float]] = field(default_factory=dict)
    """When each kind of write was acknowledged."""
    owners: dict[str, str] = field(default_factory=dict)
    """The user of each thing."""
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Of each user, one: its id, and what it holds."""

    def note(self, kind: str, owner: str, thing: str, state: str | None) -> None:
        now = time.time()
        self.things.setdefault(thing, []).append(Write(now, state))
        self.kinds.setdefault(kind, []).append(now)
        self.owners[thing] = owner

    def allowed(self, mark: float) -> dict[str, list[str | None]]:
        """Return, of what was written before a mark, the states in which it may be found.

        The last that was acknowledged by then; or a later one, which the snapshot caught.
        """
        found = {}
        for thing, writes in self.things.items():
            settled = sum(write.at < mark for write in writes)
            if settled:
                found[thing] = [write.state for write in writes[settled - 1 :]]
        return found

    def count(self, mark: float) -> str:
        """Say how many writes of which kind were acknowledged before a mark, and after it."""
        return ", ".join(
            f"{sum(at < mark for at in every)} {kind} (after it: {sum(at >= mark for at in every)})"
            for kind, every in self.kinds.items()
        )

    @property
    def last_word(self) -> float:
        return max(at for every in self.kinds.values() for at in every)


def new_signing_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


@dataclass(frozen=True, slots=True)
class Vault:
    """Another machine: it holds the backups, and has a server to verify them with."""

    stores: Stores
    identity: Path
    recipient: str
    signing_key: str

    @property
    def blobs(self) -> Blobs:
        return open_bucket(self.stores, BUCKET)

    def told(self) -> dict[str, str]:
        s3 = self.stores.s3
        return {
            "KIMBERLY_BACKUP_S3_ENDPOINT": s3.endpoint,
            "KIMBERLY_BACKUP_S3_ACCESS_KEY": s3.access_key,
            "KIMBERLY_BACKUP_S3_SECRET_KEY": s3.secret_key,
            "KIMBERLY_BACKUP_S3_BUCKET": BUCKET,
            "KIMBERLY_BACKUP_S3_SECURE": "false",
        }


async def server(told: Mapping[str, str], *arguments: str) -> tuple[int, str, str]:
    """Run one of the server's commands, and return how it ended and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "server",
        *arguments,
        cwd=CHECKOUT,
        env={"PATH": os.defpath, "PYTHONPATH": ".:client", **told},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await process.communicate()
    return process.returncode or 0, said.decode(), complained.decode()


def told_of(stores: Stores, vault: Vault) -> dict[str, str]:
    """Return what the commands are told of a mesh whose stores these are."""
    ports = dict.fromkeys([EDGE, *PROCESSES], 1)
    fleet = Fleet(stores.layout, stores, ports, (), Commands())
    return {
        **fleet._store_settings(),
        **fleet._mesh_settings("auth"),
        **vault.told(),
        "KIMBERLY_BACKUP_DATABASE_URL": stores.dsn(BACKUP),
        "KIMBERLY_OWNER_DATABASE_URL": stores.dsn(OWNER),
        "KIMBERLY_SYSTEM_DATABASE_URL": stores.dsn(SYSTEM),
        "KIMBERLY_SCRATCH_DATABASE_URL": vault.stores.dsn(SUPERUSER, "postgres"),
        "KIMBERLY_BACKUP_RECIPIENTS": vault.recipient,
        "KIMBERLY_BACKUP_IDENTITY_FILE": str(vault.identity),
        "KIMBERLY_BACKUP_SIGNING_KEY": vault.signing_key,
        "KIMBERLY_BACKUP_SIGNERS": Signer(vault.signing_key).public,
        "KIMBERLY_POSTGRES_PROGRAMS": str(stores.postgres.home.install / "bin"),
    }


@asynccontextmanager
async def reaching(mesh: Mesh) -> AsyncIterator[tuple[httpx.AsyncClient, grpc.aio.Channel]]:
    """Open both ways to the edge."""
    trust = ssl.create_default_context(cafile=mesh.ca)
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    async with (
        httpx.AsyncClient(base_url=mesh.edge, verify=trust, timeout=15) as http,
        grpc.aio.secure_channel(address_of(mesh), credentials) as channel,
    ):
        yield http, channel


async def write(user: User, written: Written, stopping: asyncio.Event) -> None:
    """Create, change and delete until told to stop; what was not answered was not acknowledged."""
    mine: list[str] = []
    while not stopping.is_set():
        text = f"{user.id} said {secrets.token_hex(8)}"
        kind = random.choices(("created", "changed", "deleted"), (5, 3, 2))[0]
        if kind == "created" or not mine:
            answer = await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content=text)))
            mine.append(answer.memory.id)
            written.note("created", user.id, answer.memory.id, text)
        elif kind == "changed":
            request = pb.UpdateMemoryRequest(memory=pb.Memory(id=mine[-1], content=text))
            request.update_mask.paths.append("content")
            await user.grpc(request)
            written.note(kind, user.id, mine[-1], text)
        else:
            gone = mine.pop(random.randrange(len(mine)))
            await user.grpc(pb.DeleteMemoryRequest(id=gone))
            written.note(kind, user.id, gone, None)


async def choose(user: User, written: Written, stopping: asyncio.Event) -> None:
    """Change one's settings until told to stop."""
    while not stopping.is_set():
        quotas = users.Quotas(permanent_bytes=random.randint(2**20, 2**22))
        request = users.UpdateSettingsRequest(settings=users.Settings(quotas=quotas))
        request.update_mask.paths.append("quotas.permanent_bytes")
        await user.grpc(request)
        written.note("settings chosen", user.id, user.id, str(quotas.permanent_bytes))


async def attach(user: User, written: Written) -> None:
    """Keep a file with a memory that nobody changes."""
    memory = pb.Memory(content=f"{user.id} has a file")
    memory_id = (await user.grpc(pb.CreateMemoryRequest(memory=memory))).memory.id
    data = secrets.token_bytes(200_000)
    announced = await user.grpc(
        pb.CreateAttachmentRequest(
            memory_id=memory_id,
            file_name="a.bin",
            content_type="text/plain",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    )
    async with httpx.AsyncClient(trust_env=False) as http:
        (await http.put(announced.upload_url, content=data)).raise_for_status()
    kept = await user.grpc(pb.CompleteAttachmentRequest(id=announced.attachment.id))
    written.files[user.id] = kept.attachment.id, data


async def all_of(user_id: str, user: Grpc) -> dict[str, str]:
    """Return everything that a user has, and what they chose."""
    settings = (await user(users.GetSettingsRequest())).settings
    found = {user_id: str(settings.quotas.permanent_bytes)}
    token = ""
    while True:
        page = await user(pb.ListMemoriesRequest(page_size=100, page_token=token))
        found |= {memory.id: memory.content for memory in page.memories}
        token = page.next_page_token
        if not token:
            return found


async def assert_damage_is_named(vault: Vault, told: Mapping[str, str]) -> None:
    """Flip one byte, then take one part away; each is reported by name."""
    keys = await vault.blobs.list_keys("")
    for key in (
        next(key for key in keys if "/database/" in key),
        next(key for key in keys if key.startswith("objects/")),
    ):
        whole = await vault.blobs.get_small(key, longest=2**30) or b""
        flipped = bytearray(whole)
        flipped[len(flipped) // 2] ^= 1
        await vault.blobs.put(key, bytes(flipped), "application/octet-stream")
        status, _, said = await server(told, "backup", "verify")
        assert (status, f"{key} is not what was written" in said) == (1, True), said
        await vault.blobs.remove_version(key, None)
        status, _, said = await server(told, "backup", "verify")
        assert (status, f"{key} is missing" in said) == (1, True), said
        await vault.blobs.put(key, whole, "application/octet-stream")


async def erase(user: User, vault: Vault) -> None:
    """Erase a user, and wait until the bucket of backups knows."""
    await user.grpc(privacy.CreateErasureRequest(password=PASSWORD))
    await eventually(lambda: vault.blobs.list_keys("erasures/"), bool, seconds=30)


async def logged_in(channel: grpc.aio.Channel, user: User) -> Grpc:
    answer = await Grpc(channel)(auth.LogInRequest(email=user.email, password=PASSWORD))
    return Grpc(channel, bearer(answer.tokens.access_token))


@dataclass(frozen=True, slots=True)
class Lived:
    """What is left of a mesh that is no more: its backup, and what people know."""

    written: Written
    everybody: Sequence[User]
    erased: User
    mark: float
    verified: Mapping[str, Any]
    """What the verification compared."""
    backup_seconds: float


async def live(state: Path, vault: Vault) -> Lived:
    """Run a mesh, back it up under load, verify that, and erase somebody."""
    command = ("env", *(f"{name}={value}" for name, value in vault.told().items()))
    commands = Commands(service=(*command, sys.executable, "-m", "server"))
    written = Written()
    async with Mesh(Layout(state), workers=1, durable=True, commands=commands) as mesh:
        await mesh.wait_ready()
        async with reaching(mesh) as (http, channel):
            everybody = [await sign_up(http, channel) for _ in range(2)]
            erased = await sign_up(http, channel)
            stopping = asyncio.Event()
            told = told_of(mesh.stores, vault)
            async with asyncio.TaskGroup() as group:
                for user in (*everybody, erased):
                    for _ in range(WRITERS):
                        group.create_task(write(user, written, stopping))
                    group.create_task(choose(user, written, stopping))
                await asyncio.sleep(LOAD_SECONDS)
                for user in (*everybody, erased):
                    await attach(user, written)
                begun = time.monotonic()
                status, said, complained = await server(told, "backup", "create")
                backup_seconds = time.monotonic() - begun
                assert status == 0, complained
                await asyncio.sleep(LOAD_SECONDS)
                stopping.set()
            mark = dt.datetime.fromisoformat(json.loads(said)["mark"]).timestamp()
            status, said, complained = await server(told, "backup", "verify")
            assert status == 0, complained
            verified = json.loads(said)
            await assert_damage_is_named(vault, told)
            await erase(erased, vault)
    return Lived(written, everybody, erased, mark, verified, backup_seconds)


async def restore(state: Path, vault: Vault, master_key: str) -> str:
    """Fill new stores from the bucket."""
    async with Stores(Layout(state), durable=True) as stores:
        stores.secrets.put(MASTER_KEY, master_key)
        status, said, complained = await server(told_of(stores, vault), "backup", "restore")
        assert status == 0, complained
        return said


async def compare(state: Path, vault: Vault, erased: User) -> str:
    """Compare what was restored, row for row, with the backup; say how many tables are equal.

    Beside it the dump is restored by itself, whose digests are those of the manifest. It then
    becomes that of a new mesh, as what was restored did, and of both that is left out which was of
    who was erased since.
    """
    repository = Repository(vault.blobs)
    (name,) = await repository.ids()
    manifest, _ = await repository.manifest(name)
    unsealer = Unsealer(vault.identity.read_text())
    programs = Programs(vault.stores.postgres.home.install / "bin")
    scratch = await _provision_scratch(vault.stores.dsn(SUPERUSER, "postgres"), "beside")
    await load(repository, unsealer, manifest, programs, scratch.owner_url)
    async with (
        Stores(Layout(state), durable=True) as stores,
        connect(scratch.superuser_url) as beside,
        connect(stores.dsn(SUPERUSER)) as new,
    ):
        async with beside.transaction():
            assert await digest_tables(beside) == manifest.tables
        restorer = Restorer(repository, unsealer, vault.blobs, checkpoints.object_key)
        await adopt(beside, restorer.gone(manifest))
        expected, found = [await digests_without(erased, each) for each in (beside, new)]
    assert {name for name in expected if found.get(name) != expected[name]} == set()
    assert found.keys() == expected.keys() == manifest.tables.keys()
    return f"{len(found)} tables, {sum(table.rows for table in found.values())} rows"


async def digests_without(erased: User, connection: asyncpg.Connection) -> Mapping[str, Table]:
    """Return the digest of each table, without somebody's rows and a restore's own."""
    tenant = ids.parse(ids.TENANT, erased.tenant_id, "tenant")
    left_out = OF_A_RESTORE | {"mails": f"email = '{erased.email}'"}
    rows = await connection.fetch(
        """
        SELECT relname, bool_or(attname = 'tenant_id') AS of_tenants
          FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
         WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
         GROUP BY relname
        """
    )
    digests = {}
    async with connection.transaction():
        await connection.execute("SET LOCAL timezone = 'UTC'; SET LOCAL extra_float_digits = 3")
        for name, of_tenants in rows:
            gone = [f"tenant_id = '{tenant}'"] if of_tenants else []
            gone += [left_out[name]] if name in left_out else []
            kept = " AND ".join(f"({each}) IS NOT TRUE" for each in gone) or "true"
            digests[name] = await _digest_table(connection, f"(SELECT * FROM {name} WHERE {kept})")
    return digests


async def assert_all_is_there(mesh: Mesh, lived: Lived) -> None:
    """Compare what users find with what they were told."""
    written = lived.written
    async with reaching(mesh) as (_, channel):
        found: dict[str, str] = {}
        for user in lived.everybody:
            caller = await logged_in(channel, user)
            found |= await all_of(user.id, caller)
            file_id, data = written.files[user.id]
            attachment = await caller(pb.GetAttachmentRequest(id=file_id))
            async with httpx.AsyncClient(trust_env=False) as http:
                assert (await http.get(attachment.download_url)).content == data
            intact = await caller(users.VerifyAuditLogRequest())
            assert intact.intact, intact
            await caller(pb.CreateMemoryRequest(memory=pb.Memory(content="and life goes on")))
            assert (await caller(users.VerifyAuditLogRequest())).intact
        allowed = {
            thing: states
            for thing, states in written.allowed(lived.mark).items()
            if written.owners[thing] != lived.erased.id
        }
        assert any(states[0] is None for states in allowed.values())
        wrong = {t: (found.get(t), s) for t, s in allowed.items() if found.get(t) not in s}
        assert wrong == {}
        with pytest.raises(Refused) as refused:
            await logged_in(channel, lived.erased)
        assert refused.value.refusal.code is grpc.StatusCode.UNAUTHENTICATED


def write_key(directory: Path, identity: x25519.Identity) -> Path:
    directory.chmod(0o755)
    key = directory / "backup.key"
    key.write_text(str(identity))
    key.chmod(0o600)
    return key


@pytest.mark.timeout(600)
async def test_a_mesh_that_is_gone_comes_back_from_its_backup(tmp_path: Path) -> None:
    identity = x25519.Identity.generate()
    key = write_key(tmp_path, identity)
    async with Stores(Layout(tmp_path / "vault"), durable=True) as stores:
        s3 = stores.s3
        Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False).make_bucket(BUCKET)
        vault = Vault(stores, key, str(identity.to_public()), new_signing_key())
        lived = await live(tmp_path / "old", vault)
        # All that is left: the bucket, the key that opens it, and the master key, kept elsewhere.
        master_key = (Layout(tmp_path / "old").secrets / MASTER_KEY).read_text()
        shutil.rmtree(tmp_path / "old")
        begun = time.monotonic()
        said = await restore(tmp_path / "new", vault, master_key)
        restore_seconds = time.monotonic() - begun
        equal = await compare(tmp_path / "new", vault, lived.erased)
        begun = time.monotonic()
        async with Mesh(Layout(tmp_path / "new"), workers=1, durable=True) as mesh:
            await mesh.wait_ready()
            rto = restore_seconds + time.monotonic() - begun
            await assert_all_is_there(mesh, lived)
    written, verified = lived.written, lived.verified
    sys.stdout.write(
        f"\n{said.strip()}"
        f"\nacknowledged before the mark, all of it there but what was of the user who was erased "
        f"since: {written.count(lived.mark)}"
        f"\ndigests equal: of the manifest and the dump {verified['tables']} tables, "
        f"{verified['rows']} rows; of the dump and the restored mesh, without who was erased: "
        f"{equal}"
        f"\nRPO {written.last_word - lived.mark:.1f} s (the age of the backup)   RTO {rto:.1f} s   "
        f"backup {lived.backup_seconds:.1f} s   verification {verified['seconds']:.1f} s\n"
    )
