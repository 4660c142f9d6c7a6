"""What a statement meets that forgot its WHERE: in every table, with and without the second wall.

The tables are read from the migrations: a new one is covered as soon as it is there. Statements
run as the application role, which for these tests may do anything to the table: what it is not
granted besides is a third wall, and not the one that is tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio

from server.caller import Caller
from server.database import Database
from tests.conftest import Urls
from tests.database.rows import (
    ALL_TABLES,
    TENANT_TABLES,
    Table,
    insert,
    populate,
    table,
    three,
)

SELECT: Final = "SELECT {owners} FROM {name}"
UPDATE: Final = "UPDATE {name} SET tenant_id = tenant_id RETURNING {owners}"
DELETE: Final = "DELETE FROM {name} RETURNING {owners}"
STATEMENTS: Final = (SELECT, UPDATE, DELETE)
WALL: Final = "row-level security"
BEHIND_WALLS: Final = frozenset(
    {
        "accounts",
        "api_key_secrets",
        "api_keys",
        "audit_checkpoints",
        "audit_heads",
        "ended_grants",
        "invitations",
        "mailed_tokens",
        "sessions",
    }
)
"""Tables of which the application role sees nothing at all."""
WITHOUT_OWNER: Final[Mapping[str, str]] = {
    "audit_cursor": "how far the chain of all tenants is: a number and an id",
    "audit_keys": "keys of the mesh, wrapped",
    "backup_runs": "backups of everybody, as numbers",
    "log_in_attempts": "how often somebody guessed, at emails with or without an account",
    "mails": "who is to be written to, with or without an account",
    "plans": "a price list, open to all",
    "schedules": "when work of the mesh is due",
    "sign_ups": "who wants an account and has none, or has one already",
    "signing_keys": "keys of the mesh, wrapped",
}
BY_REFERENCE: Final = frozenset({"meditation_shards", "refresh_tokens", "tenants"})
"""Tables whose rows are somebody's by what they refer to."""
GRANTED: Final = frozenset({"plans"})
"""Those of WITHOUT_OWNER that the application role may read."""

Owners = set[tuple[UUID, ...]]


@dataclass(frozen=True, slots=True)
class Population:
    """Rows of three users in every table."""

    owner: asyncpg.Connection
    mine: Caller
    colleague: Caller
    stranger: Caller

    def owners(self, described: Table) -> Owners:
        """Return whose rows are in a table."""
        return {described.of(each) for each in (self.mine, self.colleague, self.stranger)}

    def visible(self, described: Table) -> Owners:
        """Return whose rows the second wall lets through."""
        return set() if described.name in BEHIND_WALLS else {described.of(self.mine)}


@pytest_asyncio.fixture
async def population(owner: asyncpg.Connection) -> Population:
    everybody = three()
    await populate(owner, everybody)
    return Population(owner, *everybody)


@contextlib.asynccontextmanager
async def as_application(
    population: Population, name: str, *, walled: bool = True
) -> AsyncIterator[asyncpg.Connection]:
    """Enter a user as the application role, to which one table is open; then undo everything."""
    connection, mine = population.owner, population.mine
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"GRANT ALL ON {name} TO kimberly_app")
        if not walled:
            await connection.execute(f"ALTER TABLE {name} DISABLE ROW LEVEL SECURITY")
        # As a replica: what triggers and foreign keys do is not what is looked at.
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute("SELECT enter($1, $2)", mine.tenant_id, mine.user_id)
        await connection.execute("SET LOCAL ROLE kimberly_app")
        yield connection
    finally:
        await transaction.rollback()


async def met(population: Population, described: Table, statement: str, *, walled: bool) -> Owners:
    """Return whose rows a statement meets."""
    sql = statement.format(name=described.name, owners=described.owners)
    async with as_application(population, described.name, walled=walled) as connection:
        try:
            return {tuple(row) for row in await connection.fetch(sql)}
        except asyncpg.InsufficientPrivilegeError:
            return set()


async def test_every_table_is_somebodys_or_has_a_reason_not_to_be(
    owner: asyncpg.Connection,
) -> None:
    rows = await owner.fetch(
        """
        SELECT class.relname AS name,
               EXISTS (SELECT FROM pg_attribute AS attribute
                        WHERE attribute.attrelid = class.oid
                          AND attribute.attname = 'tenant_id') AS is_tenants,
               class.relrowsecurity AND class.relforcerowsecurity AS is_walled
          FROM pg_class AS class
         WHERE class.relnamespace = 'public'::regnamespace AND class.relkind IN ('r', 'p')
        """
    )
    there = {row["name"] for row in rows}
    assert there - {"migrations"} == set(ALL_TABLES)
    assert {row["name"] for row in rows if row["is_tenants"]} == set(TENANT_TABLES)
    others = set(ALL_TABLES) - set(TENANT_TABLES)
    assert others == WITHOUT_OWNER.keys() | BY_REFERENCE
    assert {*TENANT_TABLES, *BY_REFERENCE} <= {row["name"] for row in rows if row["is_walled"]}


# --- without a WHERE ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENANT_TABLES)
async def test_row_level_security_alone_keeps_a_statement_to_its_users_rows(
    population: Population, name: str
) -> None:
    described = await table(population.owner, name)
    visible = population.visible(described)
    for statement in STATEMENTS:
        seen = await met(population, described, statement, walled=True)
        # What may never change may not change here either.
        assert seen == visible or (statement.startswith("UPDATE") and not seen), statement
        # With both walls down, the very same statement meets everybody's.
        leaked = await met(population, described, statement, walled=False)
        assert leaked == population.owners(described), statement
        assert leaked - visible


@pytest.mark.parametrize("name", TENANT_TABLES)
async def test_the_application_itself_sees_its_users_rows_and_no_more(
    population: Population, database: Database, name: str
) -> None:
    described = await table(population.owner, name)
    sql = SELECT.format(name=name, owners=described.owners)
    for read in (in_transaction, in_one_trip):
        try:
            seen = {tuple(row) for row in await read(database, population.mine, sql)}
        except asyncpg.InsufficientPrivilegeError:
            seen = set()
        assert seen == population.visible(described)


async def in_transaction(database: Database, caller: Caller, sql: str) -> list[Any]:
    async with database.transaction(caller) as connection:
        return list(await connection.fetch(sql))


async def in_one_trip(database: Database, caller: Caller, sql: str) -> list[Any]:
    return await database.fetch(caller, sql)


@pytest.mark.parametrize("name", sorted(BY_REFERENCE))
async def test_what_is_somebodys_by_reference_is_behind_the_wall_too(
    population: Population, name: str
) -> None:
    await refer(population)
    sql = f"SELECT * FROM {name}"
    async with as_application(population, name) as connection:
        seen = await connection.fetch(sql)
    async with as_application(population, name, walled=False) as connection:
        assert len(await connection.fetch(sql)) == 3
    # The shards of a run can be read by its user, everything else by nobody.
    assert len(seen) == (name == "meditation_shards")


async def refer(population: Population) -> None:
    """Put a row for each user into the tables that refer to them."""
    await population.owner.execute(
        """
        INSERT INTO meditation_shards (meditation_id, shard) SELECT id, 0 FROM meditations;
        INSERT INTO refresh_tokens (hash, session_id, generation)
        SELECT sha256(id::text::bytea), id, 1 FROM sessions;
        INSERT INTO tenants (id, created_at) SELECT uuidv7(), now() FROM users;
        """
    )


@pytest.mark.parametrize("name", sorted(WITHOUT_OWNER))
async def test_what_is_nobodys_is_not_for_the_application(
    owner: asyncpg.Connection, name: str
) -> None:
    granted = await owner.fetch(
        """
        SELECT privilege_type AS right
          FROM information_schema.role_table_grants
         WHERE grantee IN ('kimberly_app', 'PUBLIC') AND table_name = $1
        """,
        name,
    )
    assert [row["right"] for row in granted] == (["SELECT"] if name in GRANTED else [])


# --- rows for others ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENANT_TABLES)
async def test_nobody_writes_a_row_for_another(population: Population, name: str) -> None:
    described = await table(population.owner, name)
    others = {described.of(each): each for each in (population.colleague, population.stranger)}
    for owners in others.keys() - population.visible(described):
        for row in described.rows(others[owners]):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match=WALL):
                async with as_application(population, name) as connection:
                    await insert(connection, name, row)
        await give_away(population, described, owners)


async def give_away(population: Population, described: Table, to: tuple[UUID, ...]) -> None:
    """Try to make a user's rows another's."""
    columns = zip(described.owners.split(", "), to, strict=True)
    changes = ", ".join(f"{column} = '{value}'" for column, value in columns)
    sql = f"UPDATE {described.name} SET {changes}"
    async with as_application(population, described.name) as connection:
        if described.name in BEHIND_WALLS:
            assert await connection.execute(sql) == "UPDATE 0"
            return
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=WALL):
            await connection.execute(sql)


# --- what a tenant is shown --------------------------------------------------------------------

SHOWN: Final = "SELECT user_id, scope, archived_at FROM shown_memories"
HOME: Final = "SELECT * FROM own_home"
VIEWS: Final = frozenset({"own_home", "shown_memories"})


async def test_no_other_view_and_no_function_has_more_rights_than_who_asks(
    owner: asyncpg.Connection,
) -> None:
    views = await owner.fetch(
        """
        SELECT relname AS name
          FROM pg_class
         WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'm')
           AND pg_get_userbyid(relowner) = 'kimberly_owner'
        """
    )
    functions = await owner.fetch(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef"
    )
    assert {view["name"] for view in views} == VIEWS
    assert not functions


async def test_the_tenant_is_shown_what_is_shared_there_and_in_use_and_no_more(
    population: Population, database: Database
) -> None:
    rows = await in_transaction(database, population.mine, SHOWN)
    members = (population.mine.user_id, population.colleague.user_id)
    assert {tuple(row) for row in rows} == {
        (member, scope, None) for member in members for scope in ("shared", "public")
    }
    await population.owner.execute(
        "UPDATE consents SET granted = false WHERE user_id = $1", population.colleague.user_id
    )
    left = await in_transaction(database, population.mine, SHOWN)
    assert {row["user_id"] for row in left} == {population.mine.user_id}


async def test_what_is_shown_to_the_tenant_is_not_its_to_change(population: Population) -> None:
    for statement in (
        "UPDATE shown_memories SET content = 'mine'",
        "DELETE FROM shown_memories",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
            async with as_application(population, "memories") as connection:
                await connection.execute(statement)
        # Whatever it is granted, the view's own rights are to look.
        async with as_application(population, "shown_memories") as connection:
            assert (await connection.execute(statement)).endswith(" 0")


async def test_nobody_is_shown_nothing(urls: Urls, population: Population) -> None:
    connection = await asyncpg.connect(urls.application)
    try:
        assert not await connection.fetch(SHOWN)
        assert not await connection.fetch(HOME)
    finally:
        await connection.close()


async def test_of_a_home_the_same_account_alone_is_shown_and_only_what_it_is_called(
    population: Population, database: Database
) -> None:
    mine, stranger = population.mine, population.stranger
    await population.owner.execute(
        "UPDATE users SET email = NULL, home_id = $2 WHERE id = $1", mine.user_id, stranger.user_id
    )
    email = "SELECT email FROM users WHERE id = $1"
    shown = [dict(row) for row in await in_transaction(database, mine, HOME)]
    assert shown == [{"email": await population.owner.fetchval(email, stranger.user_id)}]
    # Neither the home itself is shown anything, nor who is of the tenants that it belongs to.
    for other in (stranger, population.colleague, Caller(stranger.tenant_id, mine.user_id)):
        assert not await in_transaction(database, other, HOME)
    for role in ("kimberly_app", "kimberly_system"):
        may_write = "SELECT has_table_privilege($1, 'own_home', 'INSERT, UPDATE, DELETE')"
        assert not await population.owner.fetchval(may_write, role)
