"""What the owner of the tables can do to the audit log, and what users then see of it."""

from collections.abc import Awaitable, Callable, Mapping

import asyncpg
from kimberly.users.v1 import users_pb2 as pb

from server import audit
from server.caller import Caller
from server.database import Database
from server.users import chain
from tests.conftest import bearer
from tests.users.conftest import Users

EVENTS = 20
_TABLES = ("audit_events", "audit_links", "audit_heads", "audit_checkpoints")


async def act(database: Database, caller: Caller, count: int = 1, first: int = 0) -> None:
    """Do things, each in a transaction of its own."""
    for number in range(first, first + count):
        async with database.transaction(caller) as connection:
            await audit.record(connection, caller, "memory.create", f"mem_{number}")


async def verify(users: Users, caller: Caller) -> pb.VerifyAuditLogResponse:
    return await users.VerifyAuditLog(pb.VerifyAuditLogRequest(), metadata=bearer(caller))


Tampering = Callable[[asyncpg.Connection, Caller], Awaitable[object]]


async def tampered(owner_url: str, caller: Caller, *tamperings: Tampering) -> None:
    """Do something to the tables as their owner, whom row-level security does not stop."""
    connection = await asyncpg.connect(owner_url)
    for table in _TABLES:
        await connection.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
    for tampering in tamperings:
        await tampering(connection, caller)
    for table in _TABLES:
        await connection.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    await connection.close()


def at(position: int) -> str:
    """Return a query for the event at a place of the chain of tenant $1."""
    return f"(SELECT event_id FROM audit_links WHERE tenant_id = $1 AND position = {position})"


def statement(sql: str) -> Tampering:
    async def run(connection: asyncpg.Connection, caller: Caller) -> None:
        assert await connection.execute(sql, caller.tenant_id) not in ("UPDATE 0", "DELETE 0")

    return run


async def insert_behind_the_chain(connection: asyncpg.Connection, caller: Caller) -> None:
    await connection.execute(
        f"""
        INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource, xid)
        SELECT uuidv7(), tenant_id, user_id, actor, action, 'mem_forged', xid
          FROM audit_events WHERE id = {at(9)}
        """,
        caller.tenant_id,
    )


async def insert_ahead_of_time(connection: asyncpg.Connection, caller: Caller) -> None:
    await connection.execute(
        f"""
        INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource, xid)
        SELECT uuidv7(), tenant_id, user_id, actor, action, 'mem_forged', '999999999'
          FROM audit_events WHERE id = {at(9)}
        """,
        caller.tenant_id,
    )


def swap(position: int) -> Tampering:
    """Let two neighbours change places."""

    async def run(connection: asyncpg.Connection, caller: Caller) -> None:
        tenant = caller.tenant_id
        here = await connection.fetchval(f"SELECT {at(position)}", tenant)
        there = await connection.fetchval(f"SELECT {at(position + 1)}", tenant)
        point = "UPDATE audit_links SET event_id = $3 WHERE tenant_id = $1 AND position = $2"
        # By way of an event that is neither: no event may have two places, not even for a moment.
        await connection.execute(point, tenant, position, tenant)
        await connection.execute(point, tenant, position + 1, here)
        await connection.execute(point, tenant, position, there)

    return run


async def rehash(connection: asyncpg.Connection, caller: Caller) -> None:
    """Compute all links anew, as somebody who knows the code and forgets the head would."""
    rows = await connection.fetch(
        """
        SELECT event.* FROM audit_links AS link JOIN audit_events AS event ON event.id = event_id
         WHERE link.tenant_id = $1 ORDER BY link.position
        """,
        caller.tenant_id,
    )
    links, _ = chain.extend({}, [chain.Event(**row) for row in rows])
    await connection.executemany(
        "UPDATE audit_links SET hash = $3 WHERE tenant_id = $1 AND position = $2",
        [(link.tenant_id, link.position, link.hash) for link in links],
    )


def edit(assignment: str) -> Tampering:
    return statement(f"UPDATE audit_events SET {assignment} WHERE id = {at(8)}")


def delete(what: str, where: str) -> Tampering:
    return statement(f"DELETE FROM {what} WHERE tenant_id = $1 AND {where}")


async def swap_tenants(connection: asyncpg.Connection, caller: Caller) -> None:
    """Let an event change places with one of another tenant, the newest."""
    here, there = await connection.fetchrow(
        """
        SELECT ours.event_id, theirs.event_id
          FROM audit_links AS ours, audit_links AS theirs
         WHERE ours.tenant_id = $1 AND theirs.tenant_id <> $1
           AND ours.position = 8 AND theirs.position = 8
         ORDER BY theirs.tenant_id DESC
         LIMIT 1
        """,
        caller.tenant_id,
    )
    await connection.execute(
        """
        UPDATE audit_events AS event
           SET tenant_id = other.tenant_id, user_id = other.user_id
          FROM audit_events AS other
         WHERE (event.id, other.id) IN (($1, $2), ($2, $1))
        """,
        here,
        there,
    )


async def exchange_places_in_time(connection: asyncpg.Connection, caller: Caller) -> None:
    """Let two neighbours have happened in the other order."""
    await connection.execute(
        f"""
        UPDATE audit_events AS event
           SET xid = other.xid
          FROM audit_events AS other
         WHERE (event.id, other.id) IN (({at(8)}, {at(9)}), ({at(9)}, {at(8)}))
        """,
        caller.tenant_id,
    )


async def cover_up(connection: asyncpg.Connection, caller: Caller) -> None:
    """Make links and heads of all tenants agree with the events, as who knows the code would."""
    rows = await connection.fetch("SELECT * FROM audit_events ORDER BY xid, id")
    links, heads = chain.extend({}, [chain.Event(**row) for row in rows])
    await connection.execute("DELETE FROM audit_links; DELETE FROM audit_heads")
    await connection.executemany(
        "INSERT INTO audit_links (tenant_id, position, event_id, hash) VALUES ($1, $2, $3, $4)",
        [(link.tenant_id, link.position, link.event_id, link.hash) for link in links],
    )
    await connection.executemany(
        "INSERT INTO audit_heads (tenant_id, position, hash) VALUES ($1, $2, $3)",
        [(tenant_id, head.position, head.hash) for tenant_id, head in heads.items()],
    )


_EDIT = edit("resource = 'mem_other'")
_DELETE = statement(f"DELETE FROM audit_events WHERE id = {at(8)}")
_CUT = statement(
    "DELETE FROM audit_events WHERE id IN"
    " (SELECT event_id FROM audit_links WHERE tenant_id = $1 AND position > 12)"
)

CARELESS: Mapping[str, tuple[Tampering, ...]] = {
    "edit": (_EDIT,),
    "delete": (_DELETE, delete("audit_links", "position = 8")),
    "insert": (insert_behind_the_chain,),
    "reorder": (swap(8),),
    "cut the tail": (_CUT, delete("audit_links", "position > 12")),
    "rehash from the middle": (_EDIT, rehash),
    "swap tenants": (swap_tenants,),
}
"""The seven ways to tamper, by somebody who forgets something."""

THOROUGH: Mapping[str, tuple[Tampering, ...]] = {
    "edit": (_EDIT, cover_up),
    "delete": (_DELETE, cover_up),
    "insert": (insert_behind_the_chain, cover_up),
    "reorder": (exchange_places_in_time, cover_up),
    "cut the tail": (_CUT, cover_up),
    "rehash from the middle": (edit("actor = 'usr_other'"), cover_up),
    "swap tenants": (swap_tenants, cover_up),
}
"""The same by somebody who leaves events, links and heads in agreement."""
