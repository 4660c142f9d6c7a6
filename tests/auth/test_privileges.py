"""What the database itself keeps from the services."""

import asyncpg
import pytest

from server.caller import Caller
from server.database import Database
from tests.auth.conftest import Auth, sign_up
from tests.conftest import Urls


async def test_the_application_role_cannot_read_how_people_log_in(urls: Urls) -> None:
    connection = await asyncpg.connect(urls.application)
    for table in ("tenants", "accounts", "sessions", "refresh_tokens", "signing_keys"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(f"SELECT FROM {table}")
    await connection.close()


async def test_the_system_role_cannot_bring_a_private_key_back(urls: Urls) -> None:
    connection = await asyncpg.connect(urls.system)
    for forbidden in (
        "DELETE FROM signing_keys",
        "UPDATE signing_keys SET kid = 'other'",
        "UPDATE signing_keys SET public_jwk = '{}'",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(forbidden)
    await connection.close()


async def test_row_level_security_alone_shows_users_nobody_but_themselves(
    auth: Auth, database: Database, owner: asyncpg.Connection
) -> None:
    for name in ("ada", "bob"):
        await sign_up(auth, f"{name}@example.com")
    row = await owner.fetchrow("SELECT tenant_id, id FROM users WHERE email = 'bob@example.com'")
    async with database.transaction(Caller(row["tenant_id"], row["id"])) as connection:
        emails = await connection.fetch("SELECT email FROM users")
        events = await connection.fetch("SELECT user_id FROM audit_events")
    assert [each["email"] for each in emails] == ["bob@example.com"]
    assert {each["user_id"] for each in events} == {row["id"]}


async def test_every_table_with_a_tenant_forces_row_level_security(
    owner: asyncpg.Connection,
) -> None:
    unprotected = await owner.fetch(
        """
        SELECT class.relname
          FROM pg_class AS class
          JOIN pg_attribute AS attribute
            ON attribute.attrelid = class.oid AND attribute.attname = 'tenant_id'
         WHERE class.relnamespace = 'public'::regnamespace AND class.relkind IN ('r', 'p')
           AND NOT (class.relrowsecurity AND class.relforcerowsecurity)
        """
    )
    assert not unprotected
