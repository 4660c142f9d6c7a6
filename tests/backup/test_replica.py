"""Backups read from a replica: they hold what was acknowledged, however far behind it was."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from pydantic import SecretStr

from local.layout import Layout
from local.ports import Ports
from local.postgres import APPLICATION, BACKUP, OWNER, SUPERUSER, SYSTEM, Home, PostgreSQL
from local.private import make_private
from local.processes import supervise
from local.servers import BUCKET, Stores
from server.backup import snapshot
from server.backup.failures import BackupFailed
from server.backup.snapshot import Named, Snapshot, digest_tables
from server.database import Database, open_pool
from server.migrate import migrate, read_migrations
from tests.backup.conftest import Rig, Story
from tests.conftest import DATABASE, open_bucket


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def primary(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stores]:
    """A mesh whose database can be followed: those of other tests write no log to follow."""
    async with Stores(Layout(tmp_path_factory.mktemp("primary")), durable=True) as running:
        await running.postgres.provision(DATABASE)
        async with connected(running.dsn(OWNER, DATABASE)) as owner:
            await migrate(owner, read_migrations())
        yield running


@dataclasses.dataclass(frozen=True)
class Replica:
    """A server that follows the primary, unless it is told to wait."""

    server: PostgreSQL

    def url(self, role: str) -> str:
        return self.server.dsn(role, DATABASE)

    async def tell(self, statement: str) -> Any:
        async with connected(self.url(SUPERUSER)) as connection:
            return await connection.fetchval(statement)

    async def until(self, condition: str) -> None:
        async with asyncio.timeout(30):
            while True:
                if await self.tell(condition):
                    return
                await asyncio.sleep(0.02)

    async def pause(self) -> None:
        await self.tell("SELECT pg_wal_replay_pause()")
        await self.until("SELECT pg_get_wal_replay_pause_state() = 'paused'")

    async def resume(self) -> None:
        await self.tell("SELECT pg_wal_replay_resume()")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def replica(
    primary: Stores, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replica]:
    directory = tmp_path_factory.mktemp("replica")
    of = primary.postgres
    home = Home(of.home.install, of.home.directory / "replica", of.home.user)
    with ExitStack() as claims:
        port = Ports(directory / "ports.json", claims).claim("replica")
        server = dataclasses.replace(of, home=home, port=port, log=directory / "log")
        make_private(home.directory, home.user)
        await copy(of, home)
        async with supervise(directory / "processes.json") as supervisor:
            await supervisor.start(server.program(), stage=0).wait_ready()
            yield Replica(server)


async def copy(of: PostgreSQL, home: Home) -> None:
    """Make a data directory that follows a server."""
    source = ("--dbname", of.dsn(SUPERUSER, "postgres"), "--checkpoint=fast", "--no-sync")
    command = home.command(
        "pg_basebackup", "--write-recovery-conf", *source, "--pgdata", str(home.data)
    )
    done = await asyncio.create_subprocess_exec(
        *command, cwd=home.directory, env={"PATH": os.defpath}
    )
    assert await done.wait() == 0
    with (home.data / "postgresql.auto.conf").open("a") as settings:
        settings.write("hot_standby_feedback = on\n")


@pytest_asyncio.fixture
async def written(primary: Stores) -> AsyncIterator[Story]:
    """Whoever writes to the primary."""
    async with (
        connected(primary.dsn(SUPERUSER, DATABASE)) as owner,
        await open_pool(primary.dsn(APPLICATION, DATABASE), size=2, name="test") as pool,
    ):
        blobs = open_bucket(primary, BUCKET)
        await blobs.keep_versions()
        yield Story(owner, blobs, Database(pool))


@pytest.fixture
def of_replica(rig: Rig, primary: Stores, replica: Replica) -> Rig:
    """Backs the primary up, by way of its replica."""
    return FromReplica(**{**_fields(rig), "stores": primary, "replica": replica})


def _fields(rig: Rig) -> dict[str, Any]:
    return {each.name: getattr(rig, each.name) for each in dataclasses.fields(rig)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FromReplica(Rig):
    replica: Replica

    def making(self, **changes: Any) -> Any:
        url = SecretStr(self.replica.url(BACKUP))
        return Rig.making(self, **{"backup_database_url": url, **changes})


async def test_a_backup_waits_for_what_its_replica_has_yet_to_learn(
    of_replica: Rig, replica: Replica, written: Story
) -> None:
    await replica.pause()
    await written.make()
    async with asyncio.TaskGroup() as group:
        making = group.create_task(of_replica.create())
        await replica.until(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'backup'"
            " AND query LIKE '%pg_last_wal_replay_lsn() >=%')"
        )
        assert not making.done()
        await replica.resume()
    async with written.owner.transaction():
        now = await digest_tables(written.owner)
    manifest, _ = await of_replica.repository.manifest(making.result())
    assert manifest.tables["memories"] == now["memories"]
    assert (manifest.tables["memories"].rows, manifest.objects, manifest.lost) == (15, 15, 0)
    report = await of_replica.verify()
    assert (report["problems"], report["objects"], report["probes"]) == ([], 15, 3)


async def test_a_replica_that_stays_behind_is_no_source(
    of_replica: Rig, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_CATCH_UP_SECONDS", 0.3)
    await replica.pause()
    try:
        with pytest.raises(BackupFailed, match="behind the database"):
            await of_replica.create()
    finally:
        await replica.resume()
    assert await of_replica.repository.ids() == []


async def test_whether_an_object_was_meant_to_go_is_asked_where_it_went(
    primary: Stores, replica: Replica, written: Story
) -> None:
    """The replica would name it lost."""
    await written.make()
    row = await written.owner.fetchrow("SELECT * FROM attachments LIMIT 1")
    async with Snapshot.open(replica.url(BACKUP), primary.dsn(SYSTEM, DATABASE)) as held:
        named = Named(
            "attachments",
            UUID(int=row["tenant_id"].int),
            UUID(int=row["user_id"].int),
            UUID(int=row["id"].int),
            row["version_id"],
            row["size_bytes"],
            row["sha256"].hex(),
        )
        await replica.pause()
        try:
            assert await held.names(named)
            await written.owner.execute("DELETE FROM attachments WHERE id = $1", row["id"])
            assert not await held.names(named)
        finally:
            await replica.resume()
