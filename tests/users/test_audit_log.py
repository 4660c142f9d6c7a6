"""The audit log: its list, its chain, and everything that can be done to it."""

import asyncio
import contextlib

import asyncpg
import grpc
import pytest
from kimberly.users.v1 import users_pb2 as pb

from server import audit
from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.users import chain
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.checkpoint_archive import CheckpointArchive
from tests.conftest import Urls, bearer, new_caller
from tests.users.conftest import Users
from tests.users.tampering import (
    EVENTS,
    Tampering,
    act,
    at,
    edit,
    insert_ahead_of_time,
    insert_behind_the_chain,
    rehash,
    statement,
    swap,
    tampered,
    verify,
)


async def listed(users: Users, caller: Caller, page_size: int) -> list[pb.AuditEvent]:
    """Return the whole list, read in pages."""
    events: list[pb.AuditEvent] = []
    request = pb.ListAuditEventsRequest(page_size=page_size)
    while True:
        page = await users.ListAuditEvents(request, metadata=bearer(caller))
        assert len(page.events) <= page_size
        events.extend(page.events)
        if not page.next_page_token:
            return events
        request.page_token = page.next_page_token


async def test_events_are_listed_newest_first_in_pages_of_any_size(
    users: Users, database: Database, caller: Caller
) -> None:
    await act(database, caller, EVENTS)
    await act(database, await new_caller(database), 3)
    newest_first = [f"mem_{number}" for number in reversed(range(EVENTS))]
    for page_size in (1, 7, 19, 20, 21, 100):
        events = await listed(users, caller, page_size)
        assert [event.resource for event in events] == newest_first
    assert {event.action for event in events} == {"memory.create"}
    assert {event.actor for event in events} == {f"usr_{caller.user_id.hex}"}
    assert all(event.id.startswith("aud_") for event in events)


async def test_pages_stay_whole_while_others_write(
    users: Users, database: Database, caller: Caller
) -> None:
    await act(database, caller, 4)
    request = pb.ListAuditEventsRequest(page_size=2)
    first = await users.ListAuditEvents(request, metadata=bearer(caller))
    await act(database, caller, 4, first=4)
    request.page_token = first.next_page_token
    second = await users.ListAuditEvents(request, metadata=bearer(caller))
    assert [event.resource for event in second.events] == ["mem_1", "mem_0"]


async def test_a_page_token_of_another_user_is_refused(
    users: Users, database: Database, caller: Caller
) -> None:
    await act(database, caller, 2)
    request = pb.ListAuditEventsRequest(page_size=1)
    page = await users.ListAuditEvents(request, metadata=bearer(caller))
    request.page_token = page.next_page_token
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await users.ListAuditEvents(request, metadata=bearer(await new_caller(database)))


async def test_a_chained_event_shows_its_place(
    users: Users, database: Database, caller: Caller, audit_log: AuditLog
) -> None:
    await act(database, caller, 2)
    await audit_log.seal()
    await act(database, caller, 1, first=2)
    events = await listed(users, caller, 10)
    assert not events[0].HasField("chain_position")
    assert [event.chain_position for event in events[1:]] == [2, 1]


async def test_an_empty_log_is_intact(users: Users, caller: Caller) -> None:
    assert await verify(users, caller) == pb.VerifyAuditLogResponse(
        intact=True, checkpoint_comparison=pb.CHECKPOINT_COMPARISON_NONE
    )


async def test_an_untouched_log_is_intact_and_its_head_moves(
    users: Users, database: Database, caller: Caller
) -> None:
    heads = set()
    for round_ in range(1, 4):
        await act(database, caller, EVENTS)
        found = await verify(users, caller)
        assert found.intact, found
        assert found.verified_events == round_ * EVENTS
        heads.add(found.head_hash)
    assert len(heads) == 3
    assert all(len(bytes.fromhex(head)) == 32 for head in heads)


async def test_tenants_have_chains_of_their_own(users: Users, database: Database) -> None:
    callers = [await new_caller(database) for _ in range(3)]
    for number in range(5):
        for caller in callers:
            await act(database, caller, first=number)
    found = [await verify(users, caller) for caller in callers]
    assert [each.verified_events for each in found] == [5, 5, 5]
    assert len({each.head_hash for each in found}) == 3


async def test_an_event_waits_for_older_transactions_and_then_follows_them(
    users: Users, database: Database, caller: Caller
) -> None:
    async with database.transaction(caller) as slow:
        await audit.record(slow, caller, "memory.create", "mem_slow")
        await act(database, caller)
        waiting = await verify(users, caller)
        assert (waiting.intact, waiting.verified_events) == (True, 0)
    assert (await verify(users, caller)).verified_events == 2
    events = await listed(users, caller, 10)
    assert {event.resource: event.chain_position for event in events} == {
        "mem_slow": 1,
        "mem_0": 2,
    }


async def test_an_event_that_is_rolled_back_leaves_no_gap(
    users: Users, database: Database, caller: Caller
) -> None:
    await act(database, caller)
    with contextlib.suppress(ZeroDivisionError):
        async with database.transaction(caller) as connection:
            await audit.record(connection, caller, "memory.create", "mem_never")
            raise ZeroDivisionError
    await act(database, caller, first=1)
    found = await verify(users, caller)
    assert (found.intact, found.verified_events) == (True, 2)


async def test_sealers_and_writers_at_once_make_one_chain(
    users: Users, database: Database, audit_log: AuditLog
) -> None:
    callers = [await new_caller(database) for _ in range(3)]
    await asyncio.gather(
        *(act(database, caller, 10) for caller in callers for _ in range(2)),
        *(audit_log.seal() for _ in range(5)),
    )
    for caller in callers:
        found = await verify(users, caller)
        assert (found.intact, found.verified_events) == (True, 20)


async def test_writers_of_one_tenant_do_not_wait_for_each_other(
    database: Database, caller: Caller
) -> None:
    together = asyncio.Barrier(5)

    async def write() -> None:
        async with database.transaction(caller) as connection:
            await audit.record(connection, caller, "memory.create", "mem_0")
            async with asyncio.timeout(30):
                await together.wait()

    await asyncio.gather(*(write() for _ in range(5)))


async def chained(users: Users, caller: Caller) -> None:
    """Wait until the newest event has its place."""
    while not (await listed(users, caller, 100))[0].HasField("chain_position"):
        pass


async def terminate(urls: Urls, application_name: str) -> None:
    """End the connections of an application, as a restart of PostgreSQL would."""
    connection = await asyncpg.connect(urls.superuser)
    await connection.execute(
        """
        SELECT pg_terminate_backend(pid, 5000)
          FROM pg_stat_activity
         WHERE application_name = $1 AND datname = current_database()
        """,
        application_name,
    )
    await connection.close()


async def test_the_sealer_goes_on_when_the_database_comes_back(
    users: Users, urls: Urls, database: Database, caller: Caller, archive: CheckpointArchive
) -> None:
    pool = await open_pool(urls.system, size=1, name="sealer")
    sealing = AuditLog(AuditStore(SystemDatabase(pool)), archive, seal_seconds=0.001)
    await act(database, caller)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(sealing.run())
        await chained(users, caller)
        await terminate(urls, "sealer")
        await act(database, caller, first=1)
        await chained(users, caller)
        running.cancel()
    await pool.close()


async def test_services_can_neither_change_nor_remove_nor_back_date_an_event(
    urls: Urls, database: Database, caller: Caller
) -> None:
    await act(database, caller)
    for url in (urls.application, urls.system):
        connection = await asyncpg.connect(url)
        for forbidden in (
            "UPDATE audit_events SET action = 'x'",
            "DELETE FROM audit_events",
            "TRUNCATE audit_events",
            "UPDATE audit_links SET position = 2",
            "DELETE FROM audit_links",
            "TRUNCATE audit_links",
            "DELETE FROM audit_heads",
            """
            INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource, xid)
            VALUES (uuidv7(), uuidv7(), uuidv7(), '', '', '', '3')
            """,
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(forbidden)
        await connection.close()


# --- tampering as the owner of the tables, the most powerful role the mesh knows --------------


async def move_the_end_into_another_tenant(connection: asyncpg.Connection, caller: Caller) -> None:
    await connection.execute(
        "UPDATE audit_links SET tenant_id = uuidv7() WHERE tenant_id = $1 AND position > 12",
        caller.tenant_id,
    )


TAMPERINGS: dict[str, tuple[tuple[Tampering, ...], int, str]] = {
    "edit the actor": ((edit("actor = 'usr_other'"),), 8, chain.EVENT_EDITED),
    "edit the action": ((edit("action = 'memory.get'"),), 8, chain.EVENT_EDITED),
    "edit the resource": ((edit("resource = 'mem_other'"),), 8, chain.EVENT_EDITED),
    "edit the user": ((edit("user_id = uuidv7()"),), 8, chain.EVENT_EDITED),
    "edit the time": (
        (edit("event_time = event_time + interval '1 microsecond'"),),
        8,
        chain.EVENT_EDITED,
    ),
    "edit the tenant": ((edit("tenant_id = uuidv7()"),), 8, chain.EVENT_EDITED),
    "move text between fields": (
        (edit("actor = actor || 'm', action = 'emory.create'"),),
        8,
        chain.EVENT_EDITED,
    ),
    "edit the place in time": ((edit("xid = '3'"),), 8, chain.REORDERED),
    "edit a hash": (
        (
            statement(
                "UPDATE audit_links SET hash = sha256(hash) WHERE tenant_id = $1 AND position = 8"
            ),
        ),
        8,
        chain.EVENT_EDITED,
    ),
    "delete an event": (
        (statement(f"DELETE FROM audit_events WHERE id = {at(8)}"),),
        8,
        chain.EVENT_DELETED,
    ),
    "delete an event and its link": (
        (
            statement(f"DELETE FROM audit_events WHERE id = {at(8)}"),
            statement("DELETE FROM audit_links WHERE tenant_id = $1 AND position = 8"),
        ),
        8,
        chain.LINK_MISSING,
    ),
    "delete the first event and its link": (
        (
            statement(f"DELETE FROM audit_events WHERE id = {at(1)}"),
            statement("DELETE FROM audit_links WHERE tenant_id = $1 AND position = 1"),
        ),
        1,
        chain.LINK_MISSING,
    ),
    "insert an event": ((insert_behind_the_chain,), 10, chain.EVENT_INSERTED),
    "insert an event of the future": ((insert_ahead_of_time,), EVENTS + 1, chain.EVENT_INSERTED),
    "swap two events": ((swap(3),), 3, chain.REORDERED),
    "swap two events across a page": ((swap(7),), 7, chain.REORDERED),
    "cut the end off": (
        (
            statement(
                "DELETE FROM audit_events WHERE id IN"
                " (SELECT event_id FROM audit_links WHERE tenant_id = $1 AND position > 12)"
            ),
            statement("DELETE FROM audit_links WHERE tenant_id = $1 AND position > 12"),
        ),
        13,
        chain.TAIL_CUT,
    ),
    "cut everything off": (
        (
            statement("DELETE FROM audit_events WHERE tenant_id = $1"),
            statement("DELETE FROM audit_links WHERE tenant_id = $1"),
        ),
        1,
        chain.TAIL_CUT,
    ),
    "move the end into another tenant": ((move_the_end_into_another_tenant,), 13, chain.TAIL_CUT),
    "edit, then compute the chain anew": (
        (edit("resource = 'mem_other'"), rehash),
        EVENTS,
        chain.REHASHED,
    ),
    "forget the head": (
        (statement("DELETE FROM audit_heads WHERE tenant_id = $1"),),
        1,
        chain.TAIL_ADDED,
    ),
}


async def test_tampering_is_detected_and_located(
    users: Users, urls: Urls, database: Database
) -> None:
    """Each in a tenant of its own, so that they do not hide each other."""
    for name, (tamperings, position, problem) in TAMPERINGS.items():
        caller = await new_caller(database)
        await act(database, caller, EVENTS)
        assert (await verify(users, caller)).intact, name
        await tampered(urls.owner, caller, *tamperings)
        found = await verify(users, caller)
        assert not found.intact, name
        assert (found.first_broken_position, found.problem) == (position, problem), name
        assert found.verified_events == position - 1, name


async def test_tampering_with_one_tenant_leaves_the_others_intact(
    users: Users, urls: Urls, database: Database
) -> None:
    victim, other = await new_caller(database), await new_caller(database)
    for caller in (victim, other):
        await act(database, caller, EVENTS)
        await verify(users, caller)
    await tampered(urls.owner, victim, edit("resource = 'mem_other'"))
    assert not (await verify(users, victim)).intact
    assert (await verify(users, other)).intact
