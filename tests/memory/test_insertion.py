"""A memory that is new and stands alone is stored by one statement; everything else is not."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import asyncpg
import pytest

from server import ids
from server.caller import Caller
from server.database import Connection, Database
from server.errors import ConsentMissing, NotFound, QuotaExceeded
from server.memory.insertion import AtOnce
from server.memory.model import Draft, Source, Tier
from server.memory.store import MemoryStore
from server.preferences import Language
from tests.conftest import FakeClock, data_keys_of, new_caller
from tests.deciding import write_decision, write_settings


class OneStatementOnly(Database):
    """A database that refuses transactions of several statements."""

    def transaction(
        self, caller: Caller, *, in_index_order: bool = False
    ) -> AbstractAsyncContextManager[Connection]:
        raise AssertionError("one statement was to do")


@pytest.fixture
def at_once(database: Database) -> AtOnce:
    return AtOnce(database)


def draft(content: str = "Ann plays the oboe", **fields: object) -> Draft:
    usual: dict[str, object] = {
        "tier": Tier.LONG_TERM,
        "tags": ("music",),
        "source": Source.CHAT,
        "session_id": "",
        "session_position": None,
        "speaker": "Ann",
        "occurred_at": None,
    }
    return Draft(content=content, **{**usual, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("request_id", ["", "r"])
async def test_one_statement_stores_what_a_transaction_would(
    database: Database,
    caller: Caller,
    clock: FakeClock,
    owner: asyncpg.Connection,
    request_id: str,
) -> None:
    quick = OneStatementOnly(database._pool)
    memory, created = await MemoryStore(quick, data_keys_of(quick)).create(
        caller, draft(), request_id, clock()
    )
    assert created
    store = MemoryStore(database, data_keys_of(database))
    assert await store.get(caller, memory.id) == memory
    event = await owner.fetchrow("SELECT action, resource, user_id FROM audit_events")
    assert tuple(event) == ("memory.create", ids.show(ids.MEMORY, memory.id), caller.user_id)
    assert await owner.fetchval("SELECT long_term_bytes FROM memory_usage") == memory.size_bytes
    requests = await owner.fetch("SELECT request_id, resource_id FROM requests")
    assert [tuple(row) for row in requests] == [("r", memory.id)] * bool(request_id)
    if request_id:
        assert await store.create(caller, draft(), request_id, clock()) == (memory, False)


@pytest.mark.parametrize(
    "special",
    [
        draft(session_id="s", session_position=0),
        draft(is_sensitive=True),
    ],
    ids=["turn", "sensitive"],
)
async def test_turns_and_sensitive_memories_are_left_to_the_transaction(
    at_once: AtOnce, caller: Caller, clock: FakeClock, special: Draft
) -> None:
    assert await at_once.create(caller, special, "", clock()) is None


async def test_known_text_and_known_requests_are_left_to_the_transaction(
    at_once: AtOnce, caller: Caller, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    assert await at_once.create(caller, draft("one"), "r", clock())
    assert await at_once.create(caller, draft("one"), "", clock()) is None
    assert await at_once.create(caller, draft("one"), "q", clock()) is None
    assert await at_once.create(caller, draft("two"), "r", clock()) is None
    assert await owner.fetchval("SELECT count(*) FROM memories") == 1
    assert await owner.fetchval("SELECT count(*) FROM requests") == 1
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 1


async def test_without_consent_nothing_is_stored(
    at_once: AtOnce, database: Database, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    stranger = await new_caller(database, consenting=False)
    assert await at_once.create(stranger, draft(), "r", clock()) is None
    with pytest.raises(ConsentMissing):
        await MemoryStore(database, data_keys_of(database)).create(stranger, draft(), "r", clock())
    for table in ("memories", "requests", "audit_events", "memory_usage"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_what_does_not_fit_is_refused_and_leaves_nothing(
    at_once: AtOnce, caller: Caller, clock: FakeClock, owner: asyncpg.Connection, plans: None
) -> None:
    await owner.execute("UPDATE plans SET permanent_bytes = 5 WHERE name = 'free'")
    with pytest.raises(QuotaExceeded):
        await at_once.create(caller, draft(tier=Tier.PERMANENT), "r", clock())
    for table in ("memories", "requests", "audit_events", "memory_usage"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_language_is_learned_from_the_first_transaction(
    at_once: AtOnce, caller: Caller, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await write_settings(owner, caller, language="german")
    assert await at_once.create(caller, draft("Häuser"), "", clock()) is None
    at_once.learn(caller, Language.GERMAN)
    assert await at_once.create(caller, draft("Häuser"), "", clock())


async def test_users_who_want_vectors_are_left_to_the_transaction(
    at_once: AtOnce, database: Database, caller: Caller, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await write_settings(owner, caller, embedding_model="a model")
    await write_decision(database, caller, "memory.embed", granted=True)
    assert await at_once.create(caller, draft(), "", clock()) is None


async def test_memory_belongs_to_nobody_else(
    at_once: AtOnce, database: Database, caller: Caller, clock: FakeClock
) -> None:
    memory = await at_once.create(caller, draft(), "", clock())
    assert memory
    with pytest.raises(NotFound):
        await MemoryStore(database, data_keys_of(database)).get(
            await new_caller(database), memory.id
        )
