"""Sensitive memories need a consent of their own, and the tier that can seal them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.database import Database
from tests.conftest import new_caller
from tests.deciding import write_decision
from tests.memory.calls import Stub, archive, change, create, delete, get, restore, versions
from tests.memory.sensitive.secret import AGAIN, SECRET, keep, whole_database
from tests.memory.streams import imported
from tests.refusals import refusal_of


async def without_consent(
    memories: Stub, caller: Caller, kept: pb.Memory
) -> list[Awaitable[object]]:
    plain = await create(memories, caller, "tea at four")
    return [
        keep(memories, caller, "another secret"),
        imported(memories, caller, [pb.Memory(content="another secret", sensitive=True)]),
        change(memories, caller, plain, sensitive=True),
        change(memories, caller, kept, content="another secret"),
        change(memories, caller, kept, tags=["another"]),
    ]


async def test_writing_needs_consent_and_a_withdrawal_acts_at_once(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    kept, put_away = await keep(memories, caller), await keep(memories, caller, AGAIN)
    await archive(memories, caller, put_away)
    await write_decision(database, caller, "memory.sensitive", granted=False)
    for call in [
        *await without_consent(memories, caller, kept),
        restore(memories, caller, put_away),
    ]:
        refusal = await refusal_of(call)
        assert refusal.reason == "CONSENT_MISSING"
        assert "memory.sensitive" in refusal.message
    assert "another secret" not in await whole_database(owner)
    assert await owner.fetchval("SELECT count(*) FROM memories") == 3
    # Reading, putting away, unmarking and deleting go on.
    assert (await get(memories, caller, kept)).content == SECRET
    assert [was.content for was in await versions(memories, caller, kept)] == [SECRET]
    assert (await change(memories, caller, kept, sensitive=False)).content == SECRET
    await archive(memories, caller, kept)
    await delete(memories, caller, put_away)
    await write_decision(database, caller, "memory.sensitive", granted=True)
    assert (await keep(memories, caller)).sensitive


async def test_who_never_consented_keeps_nothing_sensitive(
    memories: Stub, database: Database, owner: asyncpg.Connection
) -> None:
    caller = await new_caller(database)
    assert (await refusal_of(keep(memories, caller))).reason == "CONSENT_MISSING"
    assert await owner.fetchval("SELECT count(*) FROM memories") == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tier": pb.TIER_SHORT_TERM}, "memory.sensitive"),
        ({"scope": pb.SCOPE_SHARED}, "memory.scope"),
        ({"scope": pb.SCOPE_PUBLIC}, "memory.scope"),
    ],
)
async def test_what_is_sensitive_is_durable_and_private(
    memories: Stub, caller: Caller, fields: dict[str, Any], field: str
) -> None:
    refusal = await refusal_of(keep(memories, caller, **fields))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def test_neither_of_the_two_is_changed_alone(memories: Stub, caller: Caller) -> None:
    kept = await keep(memories, caller)
    shared = await create(memories, caller, "tea at four", scope=pb.SCOPE_SHARED)
    for call in (
        change(memories, caller, kept, scope=pb.SCOPE_SHARED),
        change(memories, caller, shared, sensitive=True),
    ):
        assert (await refusal_of(call)).fields == ("memory.scope",)
    both = await change(memories, caller, shared, sensitive=True, scope=pb.SCOPE_PRIVATE)
    assert (both.sensitive, both.scope) == (True, pb.SCOPE_PRIVATE)
    both = await change(memories, caller, kept, sensitive=False, scope=pb.SCOPE_SHARED)
    assert (both.sensitive, both.scope) == (False, pb.SCOPE_SHARED)


async def test_short_term_memory_is_moved_before_it_is_marked(
    memories: Stub, caller: Caller
) -> None:
    memory = await create(memories, caller, SECRET, tier=pb.TIER_SHORT_TERM)
    for fields in ({}, {"tier": pb.TIER_LONG_TERM}):
        refusal = await refusal_of(change(memories, caller, memory, sensitive=True, **fields))
        assert refusal.reason == "STATE_CONFLICT"
    assert (await change(memories, caller, memory, sensitive=False)).version == 2
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    assert (await change(memories, caller, memory, sensitive=True)).sensitive
    missing = pb.Memory(id=ids.show(ids.MEMORY, ids.new_id()))
    refusal = await refusal_of(change(memories, caller, missing, sensitive=True))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
