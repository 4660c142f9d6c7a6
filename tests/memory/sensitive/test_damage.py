"""What does not open is told by name and harms no other; without its key nothing opens."""

from __future__ import annotations

from collections.abc import Awaitable

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from tests.conftest import data_keys_of, new_caller
from tests.deciding import write_decision
from tests.memory.calls import Stub, change, delete, get, versions
from tests.memory.sensitive.secret import AGAIN, SECRET, keep, listed, whole_database
from tests.memory.streams import export
from tests.refusals import refusal_of


async def assert_unreadable(call: Awaitable[object], memory: pb.Memory) -> None:
    refusal = await refusal_of(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "CONTENT_UNREADABLE")
    assert memory.id in refusal.message


@pytest.mark.parametrize("byte", [0, 1, 20, -1])
async def test_damaged_text_is_told_by_name_and_harms_no_other(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, byte: int
) -> None:
    kept, other = await keep(memories, caller), await keep(memories, caller, AGAIN)
    key = ids.parse(ids.MEMORY, kept.id, "id")
    sealed = bytearray(await owner.fetchval("SELECT sealed FROM memories WHERE id = $1", key))
    sealed[byte] ^= 1
    await owner.execute("UPDATE memories SET sealed = $2 WHERE id = $1", key, bytes(sealed))
    for call in (
        get(memories, caller, kept),
        listed(memories, caller),
        change(memories, caller, kept, tags=["new"]),
        versions(memories, caller, kept),
        export(memories, caller),
    ):
        await assert_unreadable(call, kept)
    assert (await get(memories, caller, other)).content == AGAIN
    await delete(memories, caller, kept)
    assert await listed(memories, caller) == [other]


async def test_text_of_another_memory_does_not_open(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    one, other = await keep(memories, caller), await keep(memories, caller, AGAIN)
    await owner.execute(
        "UPDATE memories SET sealed = (SELECT sealed FROM memories AS a WHERE a.id <> memories.id)"
    )
    for memory in (one, other):
        await assert_unreadable(get(memories, caller, memory), memory)


async def test_text_of_another_user_does_not_open(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    other = await new_caller(database)
    await write_decision(database, other, "memory.sensitive", granted=True)
    kept, theirs = await keep(memories, caller), await keep(memories, other)
    key = ids.parse(ids.MEMORY, theirs.id, "id")
    await owner.execute(
        """
        UPDATE memories SET sealed = (SELECT sealed FROM memories WHERE id = $1)
        WHERE user_id = $2
        """,
        key,
        caller.user_id,
    )
    await assert_unreadable(get(memories, caller, kept), kept)
    assert (await get(memories, other, theirs)).content == SECRET


async def test_nothing_opens_after_the_key_is_shredded(
    memories: Stub,
    caller: Caller,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    kept = await keep(memories, caller)
    await change(memories, caller, kept, tags=["health"])
    async with system_database.transaction() as connection:
        await data_keys_of(database).shred(connection, caller)
    for call in (get(memories, caller, kept), listed(memories, caller)):
        await assert_unreadable(call, kept)
    # What is written with a new key opens; the old does not, by this key either.
    new = await keep(memories, caller, AGAIN)
    assert (await get(memories, caller, new)).content == AGAIN
    for call in (get(memories, caller, kept), versions(memories, caller, kept)):
        await assert_unreadable(call, kept)
    assert SECRET not in await whole_database(owner)
