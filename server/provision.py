"""What the database needs before its first migration: roles, the database itself, extensions.

Everything else is the owner's to make. Doing it again changes nothing but passwords that changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

import asyncpg
import structlog

log = structlog.get_logger()

OWNER: Final = "kimberly_owner"
APPLICATION: Final = "kimberly_app"
SYSTEM: Final = "kimberly_system"
BACKUP: Final = "kimberly_backup"
_MAINTENANCE: Final = "postgres"
"""The database to stand in while another one is made."""


class WrongRole(Exception):
    """A URL names another role than the migrations know."""


@dataclass(frozen=True, slots=True)
class Role:
    """A role that may log in and nothing more, but for the one that backups are made as."""

    name: str
    password: str

    @property
    def reads_everything(self) -> bool:
        """Whether it sees the rows of all users, in tables that are still to come as well."""
        return self.name == BACKUP

    @classmethod
    def of_url(cls, url: str, expected: str) -> "Role":
        """Return the role that a URL connects as.

        Raises:
            WrongRole: It is another one than expected.
        """
        parts = urlsplit(url)
        if parts.username != expected or parts.password is None:
            raise WrongRole(f"a database URL must name {expected} and its password")
        return cls(expected, unquote(parts.password))


async def provision(administrator_url: str, database: str, roles: Sequence[Role]) -> None:
    """Make the roles, the database and its extensions.

    Args:
        administrator_url: Of any database of the server, as a superuser, or as the administrator
            of a managed PostgreSQL who may make roles, databases and the extension `vector`.
        database: Name of the database; the first role owns it.
        roles: Its owner, then those that may connect.
    """
    connection = await asyncpg.connect(administrator_url, database=_MAINTENANCE)
    try:
        for role in roles:
            await _ensure_role(connection, role)
        await _ensure_database(connection, database, roles)
    finally:
        await connection.close()
    connection = await asyncpg.connect(administrator_url, database=database)
    try:
        await _open_schema(connection, roles)
        await _ensure_extensions(connection)
    finally:
        await connection.close()


async def _ensure_role(connection: asyncpg.Connection, role: Role) -> None:
    known = await connection.fetchrow(
        """
        SELECT rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication
               OR rolbypassrls <> $2 AS is_wrong
          FROM pg_roles
         WHERE rolname = $1
        """,
        role.name,
        role.reads_everything,
    )
    verb = "CREATE" if known is None else "ALTER"
    # To name an attribute of a role that exists takes a superuser, even one that it lacks already.
    seeing = "BYPASSRLS" if role.reads_everything else "NOBYPASSRLS"
    weak = f"NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION {seeing}"
    attributes = weak if known is None or known["is_wrong"] else ""
    await _execute(
        connection, f"{verb} ROLE %I LOGIN {attributes} PASSWORD %L", role.name, role.password
    )
    if role.reads_everything:
        await _execute(connection, "GRANT pg_read_all_data TO %I", role.name)


async def _ensure_database(
    connection: asyncpg.Connection, database: str, roles: Sequence[Role]
) -> None:
    owner, *others = roles
    # An administrator that is no superuser must be able to act as the owner.
    await _execute(connection, "GRANT %I TO CURRENT_USER", owner.name)
    if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", database):
        await _execute(connection, "CREATE DATABASE %I OWNER %I", database, owner.name)
    await _execute(connection, "REVOKE ALL ON DATABASE %I FROM PUBLIC", database)
    for role in others:
        # Scores of a batch are copied into a temporary table, which the memories take them from.
        may = "CONNECT, TEMPORARY" if role.name == SYSTEM else "CONNECT"
        await _execute(connection, f"GRANT {may} ON DATABASE %I TO %I", database, role.name)


async def _open_schema(connection: asyncpg.Connection, roles: Sequence[Role]) -> None:
    owner, *others = roles
    await _execute(connection, "ALTER SCHEMA public OWNER TO %I", owner.name)
    await connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    for role in others:
        await _execute(connection, "GRANT USAGE ON SCHEMA public TO %I", role.name)


async def _ensure_extensions(connection: asyncpg.Connection) -> None:
    await connection.execute("SET client_min_messages = warning")
    await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    except asyncpg.InsufficientPrivilegeError:
        # Nothing of ours asks it: it is for people who look for slow statements.
        log.warning("no pg_stat_statements: the administrator may not make it")


async def _execute(connection: asyncpg.Connection, statement: str, *values: str) -> None:
    """Run a statement that takes no parameters, with names and texts quoted by the server."""
    quoted = await connection.fetchval(
        "SELECT format($1, VARIADIC $2::text[])", statement, list(values)
    )
    await connection.execute(quoted)
