"""The drill: a backup under load, everything gone, a new mesh out of the bucket."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
import os
import secrets
import shutil
import ssl
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
from server.access import EDGE, PROCESSES
from server.backup.signing import Signer
from server.blobs import Blobs
from tests.conftest import open_bucket
from tests.mesh import PASSWORD, User, address_of, bearer, eventually, sign_up
from tests.transports import Grpc, Refused

BUCKET = "backups"
WRITERS = 4
LOAD_SECONDS = float(os.environ.get("LOAD_SECONDS", "3"))
"""How long there is load before the backup begins, and after it ended."""


@dataclass(slots=True)
class Written:
    """What was acknowledged, and when by the clock of this machine."""

    memories: dict[str, str] = field(default_factory=dict)
    at: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Of each user, one: its id, and what it holds."""

    def before(self, mark: float) -> set[str]:
        return {memory_id for memory_id, then in self.at.items() if then < mark}


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
    """Write until told to stop; what was not answered was not acknowledged."""
    while not stopping.is_set():
        text = f"{user.id} said {secrets.token_hex(8)}"
        answer = await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content=text)))
        written.at[answer.memory.id] = time.time()
        written.memories[answer.memory.id] = text


async def attach(user: User, memory_id: str, data: bytes, written: Written) -> None:
    """Keep a file with a memory."""
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


async def all_memories(user: Grpc) -> dict[str, str]:
    """List everything a user has."""
    found: dict[str, str] = {}
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
    last_word: float
    backup_seconds: float
    verify_seconds: float


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
                await asyncio.sleep(LOAD_SECONDS)
                for user in (*everybody, erased):
                    mine = next(m for m, text in written.memories.items() if user.id in text)
                    await attach(user, mine, secrets.token_bytes(200_000), written)
                begun = time.monotonic()
                status, said, complained = await server(told, "backup", "create")
                backup_seconds = time.monotonic() - begun
                assert status == 0, complained
                await asyncio.sleep(LOAD_SECONDS)
                stopping.set()
            mark = dt.datetime.fromisoformat(json.loads(said)["mark"]).timestamp()
            begun = time.monotonic()
            status, said, complained = await server(told, "backup", "verify")
            verify_seconds = time.monotonic() - begun
            assert status == 0, complained
            await assert_damage_is_named(vault, told)
            await erase(erased, vault)
    last_word = max(written.at.values())
    return Lived(written, everybody, erased, mark, last_word, backup_seconds, verify_seconds)


async def restore(state: Path, vault: Vault, master_key: str) -> str:
    """Fill new stores from the bucket."""
    async with Stores(Layout(state), durable=True) as stores:
        stores.secrets.put(MASTER_KEY, master_key)
        status, said, complained = await server(told_of(stores, vault), "backup", "restore")
        assert status == 0, complained
        return said


async def assert_all_is_there(mesh: Mesh, lived: Lived) -> None:
    """Compare what users find with what they were told."""
    expected = lived.written.before(lived.mark)
    async with reaching(mesh) as (_, channel):
        found: dict[str, str] = {}
        for user in lived.everybody:
            caller = await logged_in(channel, user)
            found |= await all_memories(caller)
            file_id, data = lived.written.files[user.id]
            attachment = await caller(pb.GetAttachmentRequest(id=file_id))
            async with httpx.AsyncClient(trust_env=False) as http:
                assert (await http.get(attachment.download_url)).content == data
            intact = await caller(users.VerifyAuditLogRequest())
            assert intact.intact, intact
            await caller(pb.CreateMemoryRequest(memory=pb.Memory(content="and life goes on")))
            assert (await caller(users.VerifyAuditLogRequest())).intact
        kept = {m for m in expected if lived.erased.id not in lived.written.memories[m]}
        assert kept
        assert {m: found.get(m) for m in kept} == {m: lived.written.memories[m] for m in kept}
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
        async with Mesh(Layout(tmp_path / "new"), workers=1, durable=True) as mesh:
            await mesh.wait_ready()
            rto = time.monotonic() - begun
            await assert_all_is_there(mesh, lived)
    expected = lived.written.before(lived.mark)
    sys.stdout.write(
        f"\n{said.strip()}"
        f"\nacknowledged before the mark: {len(expected)} memories, all there but those of the "
        f"user who was erased since"
        f"\nacknowledged after it, and lost: {len(lived.written.at) - len(expected)}"
        f"\nRPO {lived.last_word - lived.mark:.1f} s (the age of the backup)   RTO {rto:.1f} s   "
        f"backup {lived.backup_seconds:.1f} s   verification {lived.verify_seconds:.1f} s\n"
    )
