"""The real stores: who may do what with them, and what survives."""

import io
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest
from minio import Minio
from minio.error import S3Error
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError

from local import postgres
from local.layout import Layout
from local.ports import Ports, open_ports
from local.postgres import APPLICATION, OWNER, SUPERUSER, SYSTEM, Home, PostgreSQL, find_home
from local.processes import installed, supervise
from local.servers import ROLES, Stores

ONCE = Retry(NoBackoff(), 0)
AS_ROOT = os.geteuid() == 0


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory that other users can reach, unlike those of pytest."""
    with TemporaryDirectory(prefix="kimberly-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def s3(stores: Stores, secret: str | None = None) -> Minio:
    key = stores.s3.key
    return Minio(stores.s3.endpoint, key.access_key, secret or key.secret_key, secure=False)


async def test_roles_of_the_services_own_nothing_and_pass_no_row_security(stores: Stores) -> None:
    connection = await asyncpg.connect(stores.dsn(SUPERUSER))
    rows = await connection.fetch(
        """
        SELECT rolname FROM pg_roles
         WHERE rolname = ANY($1) AND rolcanlogin
           AND NOT (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication)
        """,
        [OWNER, APPLICATION, SYSTEM],
    )
    owner = await connection.fetchval(
        "SELECT datdba::regrole::text FROM pg_database WHERE datname = 'kimberly'"
    )
    await connection.close()
    assert {row["rolname"] for row in rows} == {OWNER, APPLICATION, SYSTEM}
    assert owner == OWNER


@pytest.mark.parametrize("role", [APPLICATION, SYSTEM])
async def test_roles_of_the_services_cannot_make_tables(stores: Stores, role: str) -> None:
    connection = await asyncpg.connect(stores.dsn(role))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("CREATE TABLE mine (x int)")
    await connection.close()


async def test_database_has_vectors_statistics_and_checksums(stores: Stores) -> None:
    connection = await asyncpg.connect(stores.dsn(SUPERUSER))
    extensions = {row["extname"] for row in await connection.fetch("SELECT * FROM pg_extension")}
    assert {"vector", "pg_stat_statements"} <= extensions
    assert await connection.fetchval("SHOW data_checksums") == "on"
    assert await connection.fetchval("SELECT upper('é')") == "É"
    assert await connection.fetchval("SELECT '[3,4]'::vector <-> '[0,0]'") == 5
    await connection.close()


async def test_wrong_password_is_refused_even_on_the_socket(stores: Stores) -> None:
    wrong = stores.dsn(OWNER).replace(stores.postgres.passwords[OWNER], "wrong")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(wrong)


PROVISIONED = """
    SELECT 'role' AS kind, rolname::text AS name,
           concat(rolsuper, rolcanlogin, rolbypassrls, rolcreaterole, rolcreatedb) AS what
      FROM pg_roles
     UNION ALL
    SELECT 'database', datname::text, datacl::text FROM pg_database
     UNION ALL
    SELECT 'schema', nspname::text, nspacl::text FROM pg_namespace WHERE nspname = 'public'
     UNION ALL
    SELECT 'extension', extname::text, extversion FROM pg_extension
     ORDER BY 1, 2
"""


async def test_provisioning_again_changes_nothing(stores: Stores) -> None:
    connection = await asyncpg.connect(stores.dsn(OWNER))
    try:
        before = await connection.fetch(PROVISIONED)
        await stores.postgres.provision()
        assert await connection.fetch(PROVISIONED) == before
    finally:
        await connection.close()
    # The passwords are still those of the secrets directory.
    await (await asyncpg.connect(stores.dsn(OWNER))).close()


async def test_valkey_lets_services_use_their_own_keys_only(redis: Redis, stores: Stores) -> None:
    await redis.set("mesh:mine", 1)
    with pytest.raises(NoPermissionError):
        await redis.set("other:key", 1)
    with pytest.raises(NoPermissionError):
        await redis.flushall()
    async with Redis(port=stores.valkey.port, retry=ONCE) as stranger:
        with pytest.raises(AuthenticationError):
            await stranger.get("mesh:mine")


def test_s3_refuses_a_wrong_key_and_an_unknown_bucket(stores: Stores) -> None:
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        s3(stores, secret="wrong").list_buckets()
    with pytest.raises(S3Error, match="NoSuchBucket"):
        s3(stores).put_object("other", "x", io.BytesIO(b"x"), 1)


def test_stores_listen_on_the_loopback_interface_only(stores: Stores) -> None:
    for process in stores.processes.values():
        assert process.pid is not None
        hosts = listening_hosts(process.pid)
        assert hosts, process.name
        assert hosts == {"127.0.0.1"}, process.name


def listening_hosts(pid: int) -> set[str]:
    """Return the addresses on which a process accepts TCP connections."""
    held = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    hosts = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                raw = bytes.fromhex(fields[1].split(":")[0])
                hosts.add(socket.inet_ntoa(raw[::-1]) if table == "tcp" else "::")
    return hosts


def test_secrets_are_for_their_user_only(stores: Stores) -> None:
    directory = stores.layout.secrets
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


# --- places ------------------------------------------------------------------------------------


def some_postgres(home: Home, ports: Ports, directory: Path) -> PostgreSQL:
    return PostgreSQL(
        home=home,
        port=ports.claim("postgres"),
        sockets=directory / "sockets",
        log=directory / "postgres.log",
        passwords=dict.fromkeys(ROLES, "a" * 48),
        durable=False,
    )


@pytest.fixture
async def server(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[PostgreSQL, Path]]:
    """PostgreSQL of a checkout that only root can enter, and the directory that says so."""
    closed = state / "closed"
    closed.mkdir(mode=0o700)
    for name in (postgres.PACKAGE, postgres.LIBRARIES):
        (closed / name).symlink_to(installed(postgres.PACKAGE).with_name(name))
    monkeypatch.setattr(postgres, "installed", lambda package: closed / package)
    layout = Layout(closed / "checkout" / ".mesh")
    layout.state.mkdir(parents=True)
    with open_ports(layout.state / "ports.json") as ports:
        yield some_postgres(find_home(layout), ports, state), closed
    shutil.rmtree(find_home(layout).directory)


@pytest.mark.skipif(not AS_ROOT, reason="only root needs another user for PostgreSQL")
async def test_closed_checkout_of_root_stays_closed_and_still_has_a_database(
    server: tuple[PostgreSQL, Path], tmp_path: Path
) -> None:
    running, closed = server
    running.prepare()
    async with supervise(tmp_path / "children") as supervisor:
        await supervisor.start(running.program(), stage=0).wait_ready()
        await running.provision()
        await running.provision("another")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not running.home.data.is_relative_to(closed)
    assert not running.home.install.is_relative_to(closed)
    layout = Layout(closed / "checkout" / ".mesh")
    assert find_home(layout) == running.home, "found again by the next start"


def test_lock_of_a_program_that_is_no_postgres_is_removed(tmp_path: Path) -> None:
    home = Home(install=tmp_path, directory=tmp_path, user=None)
    home.data.mkdir()
    with open_ports(tmp_path / "ports.json") as ports:
        server = some_postgres(home, ports, tmp_path)
    server.sockets.mkdir(mode=0o700)
    locks = (home.data / "postmaster.pid", server.lock)
    with subprocess.Popen(("sleep", "60"), cwd=home.data) as lives_in_the_data_directory:
        for pid, kept in ((os.getpid(), False), (lives_in_the_data_directory.pid, True)):
            for lock in locks:
                lock.write_text(f"{pid}\n{home.data}\n")
            server.prepare()
            assert [lock.exists() for lock in locks] == [kept, kept]
        lives_in_the_data_directory.kill()
