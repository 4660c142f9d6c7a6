"""A PostgreSQL server that knows nothing of us becomes one that can be migrated."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from server.migrate import migrate, read_migrations
from server.provision import APPLICATION, SYSTEM, Role, WrongRole, provision
from tests.conftest import Urls

CHECKOUT = Path(__file__).parent.parent.parent


def of_another_database(url: str, database: str) -> str:
    return urlsplit(url)._replace(path=f"/{database}").geturl()


def run(urls: Urls, **changes: str) -> subprocess.CompletedProcess[str]:
    told = {
        "KIMBERLY_SUPERUSER_DATABASE_URL": urls.superuser,
        "KIMBERLY_OWNER_DATABASE_URL": urls.owner,
        "KIMBERLY_DATABASE_URL": urls.application,
        "KIMBERLY_SYSTEM_DATABASE_URL": urls.system,
    }
    return subprocess.run(
        [sys.executable, "-m", "server", "provision"],
        cwd=CHECKOUT,
        env={"PATH": os.defpath, "PYTHONPATH": ".:client", **told, **changes},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_command_makes_what_the_urls_name_and_may_be_run_again(migrated: Urls) -> None:
    fresh = Urls(*(of_another_database(url, "command") for url in dataclasses.astuple(migrated)))
    for _ in range(2):
        done = run(fresh)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "command is ready to be migrated\n"


def test_a_url_with_another_role_is_refused_without_telling_its_password(migrated: Urls) -> None:
    done = run(migrated, KIMBERLY_DATABASE_URL="postgresql://somebody:secret@/test")
    assert done.returncode == 78
    assert APPLICATION in done.stderr
    assert "secret" not in done.stderr


def test_a_password_may_hold_any_character() -> None:
    role = Role.of_url("postgresql://kimberly_app:a%27%40@/test", APPLICATION)
    assert role.password == "a'@"
    with pytest.raises(WrongRole):
        Role.of_url("postgresql://kimberly_app@/test", APPLICATION)


async def test_the_administrator_of_a_managed_server_can_do_all_but_extensions(
    migrated: Urls,
) -> None:
    """Those are the provider's to permit; here a superuser makes the one that is needed."""
    names = ["managed_owner", "managed_app", "managed_system"]
    roles = [Role(name, "a'password") for name in names]
    connection = await asyncpg.connect(migrated.superuser)
    try:
        await connection.execute(
            "CREATE ROLE administrator LOGIN CREATEROLE CREATEDB PASSWORD 'administrator'"
        )
    finally:
        await connection.close()
    url = urlsplit(migrated.superuser)
    place = url.netloc.rpartition("@")[2]
    administrator = url._replace(netloc=f"administrator:administrator@{place}").geturl()
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="vector"):
        await provision(administrator, "managed", roles)
    connection = await asyncpg.connect(migrated.superuser, database="managed")
    try:
        await connection.execute("CREATE EXTENSION vector")
    finally:
        await connection.close()
    await provision(administrator, "managed", roles)
    owner = await asyncpg.connect(
        administrator, database="managed", user="managed_owner", password="a'password"
    )
    try:
        assert (
            await owner.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'vector'") == 1
        )
        await owner.execute("CREATE TABLE mine (id integer)")
    finally:
        await owner.close()


async def test_a_role_that_became_mighty_is_weak_again(
    migrated: Urls, owner: asyncpg.Connection
) -> None:
    await owner.execute(f"ALTER ROLE {SYSTEM} BYPASSRLS")
    assert run(migrated).returncode == 0
    assert not await owner.fetchval("SELECT rolbypassrls FROM pg_roles WHERE rolname = $1", SYSTEM)


async def test_what_was_provisioned_can_be_migrated(migrated: Urls) -> None:
    fresh = Urls(*(of_another_database(url, "unborn") for url in dataclasses.astuple(migrated)))
    assert run(fresh).returncode == 0
    connection = await asyncpg.connect(fresh.owner)
    try:
        assert await migrate(connection, read_migrations()) > 0
    finally:
        await connection.close()
