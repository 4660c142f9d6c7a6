"""A secret, what is done with it, and what would tell of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import asyncpg
from kimberly.memory.v1 import memory_pb2 as pb

from server.cache import Redis
from server.caller import Caller
from server.memory import words
from server.preferences import Language
from tests.conftest import bearer
from tests.memory.calls import Stub, create, values_in

SECRET = "Diagnosed with psoriasis"
AGAIN = "Cured of psoriasis, says Dr. Quill"


async def keep(memories: Stub, caller: Caller, content: str = SECRET, **fields: Any) -> pb.Memory:
    return await create(memories, caller, content, sensitive=True, **fields)


async def listed(memories: Stub, caller: Caller) -> list[pb.Memory]:
    request = pb.ListMemoriesRequest(page_size=1000)
    return list((await memories.ListMemories(request, metadata=bearer(caller))).memories)


async def whole_database(owner: asyncpg.Connection) -> str:
    """Return every row of every table; bytes are in hexadecimal."""
    tables = await owner.fetch(
        "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    )
    rows = [
        f"{table['name']} {row['text']}"
        for table in tables
        for row in await owner.fetch(f'SELECT "row"::text AS text FROM "{table["name"]}" AS "row"')
    ]
    return "\n".join(rows)


def traces(content: str) -> Iterable[str]:
    """Return what would tell of a text: itself, its words, its plain hash, its terms."""
    yield content
    yield content.encode().hex()
    yield hashlib.sha256(content.encode()).hexdigest()
    yield from (word for word in content.split() if len(word) > 4)
    yield from (f"{term + 1}:" for term in words.terms(content, Language.ENGLISH))


async def assert_no_trace(owner: asyncpg.Connection, redis: Redis, caller: Caller) -> None:
    stored, cached = await whole_database(owner), await values_in(redis, caller)
    for content in (SECRET, AGAIN):
        for trace in traces(content):
            assert trace not in stored, next(row for row in stored.split("\n") if trace in row)
            assert trace.encode() not in cached
