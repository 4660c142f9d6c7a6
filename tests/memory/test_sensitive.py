"""Sensitive memories: open to their user, sealed to everything else, gone with their key."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
import structlog
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.maintenance.v1 import maintenance_pb2 as maintenance_pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as maintenance_rpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as scoring_rpc
from kimberly.users.v1 import users_pb2

from server import ids
from server.blobs import Blobs
from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase
from server.kms.local import LocalKms
from server.memory import insertion, messages, words
from server.memory import store as store_module
from server.memory.answers import Answers
from server.memory.conversation import NO_TERMS, Surroundings
from server.memory.meditation_store import MeditationStore
from server.memory.model import Draft, Source, Tier
from server.memory.sensitive import Opener
from server.memory.store import MemoryStore
from server.preferences import Language
from tests.conftest import (
    FakeClock,
    Serve,
    as_worker,
    bearer,
    data_keys_of,
    new_caller,
)
from tests.kms import conftest as of_kms
from tests.kms.conftest import Master
from tests.maintenance import maintenance_service
from tests.memory.calls import Stub, archive, change, create, restore
from tests.memory.meanings import ask, decide, of, texts, upload
from tests.memory.scoring_calls import scoring_stream
from tests.memory.test_answers import values_in
from tests.memory.test_batch import create_all
from tests.memory.test_conversation import turn
from tests.memory.test_export import export
from tests.memory.test_import import imported
from tests.memory.test_sessions import append, transcript, write_down
from tests.memory.test_versions import versions
from tests.memory.test_watch import caught_up, changes, watching
from tests.refusals import refusal_of
from tests.users import conftest as of_users
from tests.users.conftest import Users

# The user service and both key managers, and what they are made of.
users = of_users.users
audit_log = of_users.audit_log
archive_of_checkpoints = of_users.archive
audit_keys = of_users.audit_keys
checkpoint_store = of_users.checkpoint_store
master = of_kms.master
vault = of_kms.vault
vault_server = of_kms.vault_server
token_file = of_kms.token_file

SECRET = "Diagnosed with psoriasis"
AGAIN = "Cured of psoriasis, says Dr. Quill"


@pytest.fixture(name="archive")
def _archive(archive_of_checkpoints: object) -> object:
    return archive_of_checkpoints


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store and memory.sensitive."""
    caller = await new_caller(database)
    await decide(database, caller, "memory.sensitive", granted=True)
    return caller


async def keep(memories: Stub, caller: Caller, content: str = SECRET, **fields: Any) -> pb.Memory:
    return await create(memories, caller, content, sensitive=True, **fields)


async def get(memories: Stub, caller: Caller, memory: pb.Memory) -> pb.Memory:
    request = pb.GetMemoryRequest(id=memory.id)
    return (await memories.GetMemory(request, metadata=bearer(caller))).memory


async def listed(memories: Stub, caller: Caller) -> list[pb.Memory]:
    request = pb.ListMemoriesRequest(page_size=1000)
    return list((await memories.ListMemories(request, metadata=bearer(caller))).memories)


async def delete(memories: Stub, caller: Caller, memory: pb.Memory) -> None:
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))


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


# --- kept and read


async def test_sensitive_memory_is_open_to_its_user(memories: Stub, caller: Caller) -> None:
    kept = await keep(memories, caller, tags=["health"])
    assert (kept.content, kept.sensitive, kept.content_hash) == (SECRET, True, "")
    assert kept.size_bytes == len(SECRET) + len("health")
    assert await get(memories, caller, kept) == kept
    assert await listed(memories, caller) == [kept]
    changed = await change(memories, caller, kept, content=AGAIN)
    assert (changed.content, changed.sensitive, changed.content_hash) == (AGAIN, True, "")
    assert changed.size_bytes == len(AGAIN) + len("health")
    retagged = await change(memories, caller, kept, tags=["skin"])
    assert (retagged.content, list(retagged.tags)) == (AGAIN, ["skin"])
    assert [version.content for version in await versions(memories, caller, kept)] == [
        AGAIN,
        AGAIN,
        SECRET,
    ]


async def test_no_store_and_no_log_has_a_trace_of_it(
    memories: Stub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
    redis: Redis,
    answers: Answers,
) -> None:
    await decide(database, caller, "memory.embed", granted=True)
    with structlog.testing.capture_logs() as logs:
        request = pb.CreateMemoryRequest(
            memory=pb.Memory(
                content=SECRET,
                sensitive=True,
                session_id="visit",
                session_position=0,
                speaker="Ann",
            ),
            request_id="once",
        )
        for _ in range(2):
            answer = await memories.CreateMemory(request, metadata=bearer(caller))
        kept = answer.memory
        await keep(memories, caller, session_id="visit", session_position=0)
        await create(memories, caller, "How are you?", session_id="visit", session_position=1)
        await change(memories, caller, kept, content=AGAIN)
        await archive(memories, caller, kept)
        await restore(memories, caller, kept)
        await imported(memories, caller, [pb.Memory(content=SECRET, sensitive=True)])
        await upload(memories, caller, of(kept, (1, 0)))
        assert texts(await ask(memories, caller, SECRET)) == []
        await answers.flush()
        assert len(await export(memories, caller)) == 2
        assert {memory.content for memory in await listed(memories, caller)} == {
            AGAIN,
            SECRET,
            "How are you?",
        }
    await assert_no_trace(owner, redis, caller)
    assert not [trace for trace in (SECRET, AGAIN) if trace in repr(logs)]
    assert await owner.fetchval("SELECT count(*) FROM memories WHERE sealed IS NOT NULL") == 2


async def test_plain_memory_would_be_found_by_each_of_these_traces(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await create(memories, caller, SECRET)
    stored = await whole_database(owner)
    missing = [trace for trace in traces(SECRET) if trace not in stored]
    assert missing == [SECRET.encode().hex()], "the search for traces finds nothing"


async def test_same_text_is_one_memory_and_a_plain_one_is_another(
    memories: Stub, caller: Caller
) -> None:
    kept = await keep(memories, caller)
    again = await keep(memories, caller)
    assert (again.id, again.use_count, again.content) == (kept.id, 1, SECRET)
    assert (await create(memories, caller, SECRET)).id != kept.id
    refusal = await refusal_of(
        change(memories, caller, await keep(memories, caller, AGAIN), content=SECRET)
    )
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS


async def test_retry_is_known_by_its_request_id_and_not_by_a_plain_hash(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    async def send(content: str) -> pb.CreateMemoryResponse:
        request = pb.CreateMemoryRequest(
            memory=pb.Memory(content=content, sensitive=True), request_id="once"
        )
        return await memories.CreateMemory(request, metadata=bearer(caller))

    first, second = await send(SECRET), await send(SECRET)
    told = messages.draft_from(pb.Memory(content=SECRET, sensitive=True), "memory")
    guess = hashlib.sha256(repr(told).encode()).digest()
    assert await owner.fetchval("SELECT fingerprint FROM requests") != guess
    assert (first.created, second.created) == (True, False)
    assert first.memory == second.memory
    assert (await refusal_of(send(AGAIN))).reason == "REQUEST_ID_REUSED"


async def test_states_and_opinions_change_and_the_text_stays_open(
    memories: Stub, caller: Caller, database: Database
) -> None:
    kept, metadata = await keep(memories, caller), bearer(caller)
    protected = await memories.ProtectMemory(
        pb.ProtectMemoryRequest(id=kept.id, protected=True), metadata=metadata
    )
    rated = await memories.GiveFeedback(
        pb.GiveFeedbackRequest(id=kept.id, rating=5), metadata=metadata
    )
    moved = await change(memories, caller, kept, tier=pb.TIER_PERMANENT)
    archived = await archive(memories, caller, kept)
    restored = await restore(memories, caller, kept)
    told = [protected.memory, rated.memory, moved, archived, restored]
    assert {(memory.content, memory.sensitive) for memory in told} == {(SECRET, True)}
    assert {was.content for was in await versions(memories, caller, kept)} == {SECRET}


async def test_import_and_export_keep_what_is_sensitive(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    told = [
        pb.Memory(content="tea at four"),
        pb.Memory(content=SECRET, sensitive=True, tags=["health"]),
        pb.Memory(content=AGAIN, sensitive=True),
        pb.Memory(content=SECRET, sensitive=True, scope=pb.SCOPE_SHARED),
    ]
    for outcome in (pb.IMPORT_RESULT_CREATED, pb.IMPORT_RESULT_EXISTING):
        answer = await imported(memories, caller, told, 2)
        assert list(answer.results) == [outcome] * 3 + [pb.IMPORT_RESULT_REFUSED]
        assert [refusal.field for refusal in answer.refusals] == ["memories[1].scope"]
    assert await owner.fetchval("SELECT count(*) FROM memories WHERE sealed IS NULL") == 1
    exported, end = await export(memories, caller)
    assert [(memory.content, memory.sensitive) for memory in exported] == [
        ("tea at four", False),
        (SECRET, True),
        (AGAIN, True),
    ]
    lines = "".join(f"{memory.id} {memory.content_hash}\n" for memory in exported)
    assert end.sha256 == hashlib.sha256(lines.encode()).hexdigest()


async def test_who_watches_sees_it(memories: Stub, caller: Caller) -> None:
    async with watching(memories, caller, include_memories=True) as stream:
        await caught_up(stream)
        kept = await keep(memories, caller)
        (created,) = await changes(stream, 1)
        await change(memories, caller, kept, content=AGAIN)
        (updated,) = await changes(stream, 1)
    assert [told.change.memory.content for told in (created, updated)] == [SECRET, AGAIN]


async def test_others_see_nothing_of_it(memories: Stub, caller: Caller, database: Database) -> None:
    kept = await keep(memories, caller)
    other = Caller(caller.tenant_id, (await new_caller(database)).user_id)
    await decide(database, other, "memory.store", granted=True)
    refusal = await refusal_of(get(memories, other, kept))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    request = pb.ListMemoriesRequest(shared=True)
    assert not (await memories.ListMemories(request, metadata=bearer(other))).memories


async def test_both_key_managers_serve(
    master: Master, database: Database, caller: Caller, clock: FakeClock
) -> None:
    draft = Draft(Tier.LONG_TERM, SECRET, (), Source.CHAT, "", None, "", None, is_sensitive=True)
    keys = DataKeys(database, master.kms)
    store = MemoryStore(database, keys)
    kept, _ = await store.create(caller, draft, "", clock())
    sealed = await store.get(caller, kept.id)
    assert (sealed.content, SECRET.encode() in (sealed.sealed or b"")) == ("", False)
    for process in (keys, DataKeys(database, master.kms)):
        assert (await Opener(process).opened_one(caller, sealed)).content == SECRET


class CountingKeys(DataKeys):
    """Counts how often somebody asks for a key to read with."""

    asked = 0

    async def existing_key_of(self, caller: Caller) -> bytes:
        self.asked += 1
        return await super().existing_key_of(caller)


async def test_one_look_at_the_key_opens_many_and_plain_ones_need_none(
    memories: Stub,
    store: MemoryStore,
    caller: Caller,
    database: Database,
    master_key: Path,
) -> None:
    plain = await create(memories, caller, "tea at four")
    kept = await keep(memories, caller)
    keys = CountingKeys(database, LocalKms(master_key))
    opener = Opener(keys)
    one = await store.get(caller, ids.parse(ids.MEMORY, plain.id, "id"))
    secret = await store.get(caller, ids.parse(ids.MEMORY, kept.id, "id"))
    assert await opener.opened(caller, [one] * 100) == [one] * 100
    assert keys.asked == 0
    opened = await opener.opened(caller, [one] * 50 + [secret] + [one] * 50 + [secret])
    assert [memory.content for memory in opened].count(SECRET) == 2
    assert keys.asked == 1


# --- who may


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
    await decide(database, caller, "memory.sensitive", granted=False)
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
    await decide(database, caller, "memory.sensitive", granted=True)
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


# --- damage, and the end of the key


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
    await decide(database, other, "memory.sensitive", granted=True)
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


# --- marked later, and no longer


async def test_marking_later_takes_along_all_that_was_known_of_it(
    memories: Stub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
    redis: Redis,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "_VERSIONS_AT_ONCE", 2)
    await decide(database, caller, "memory.embed", granted=True)
    request = pb.CreateMemoryRequest(
        memory=pb.Memory(content=SECRET, session_id="visit", session_position=1),
        request_id="once",
    )
    kept = (await memories.CreateMemory(request, metadata=bearer(caller))).memory
    await create(memories, caller, "How are you?", session_id="visit", session_position=0)
    for tags in (["a"], ["b"], ["c"], ["d"]):
        await change(memories, caller, kept, tags=tags)
    await change(memories, caller, kept, content=AGAIN)
    await upload(memories, caller, of(kept, (1, 0)))
    await owner.execute("UPDATE memory_scores SET sentiment = 0.1")
    assert texts(await ask(memories, caller, "psoriasis"))
    await answers.flush()
    marked = await change(memories, caller, kept, sensitive=True)
    assert (marked.content, marked.sensitive, marked.content_hash) == (AGAIN, True, "")
    await assert_no_trace(owner, redis, caller)
    assert texts(await ask(memories, caller, "psoriasis")) == []
    assert [was.content for was in await versions(memories, caller, kept)] == [
        AGAIN,
        AGAIN,
        *[SECRET] * 5,
    ]
    assert await owner.fetchval("SELECT count(*) FROM embeddings") == 0
    row = await owner.fetchrow(
        "SELECT sentiment, text_version FROM memory_scores ORDER BY memory_id LIMIT 1"
    )
    assert tuple(row) == (None, 7)
    refusal = await refusal_of(memories.CreateMemory(request, metadata=bearer(caller)))
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_turn_of_a_conversation_that_is_marked_is_no_longer_told_by_its_request(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    """One may try out what the short turns of a request said."""
    turns = [pb.SessionTurn(content=content) for content in ("Well?", SECRET)]
    request = pb.AppendToSessionRequest(session_id="visit", turns=turns, request_id="once")
    answer = await memories.AppendToSession(request, metadata=bearer(caller))
    fingerprint = await owner.fetchval("SELECT fingerprint FROM requests")
    _, memory = answer.memories
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    assert await owner.fetchval("SELECT fingerprint FROM requests") == fingerprint
    await change(memories, caller, memory, sensitive=True)
    assert await owner.fetchval("SELECT fingerprint FROM requests") != fingerprint


async def test_copy_that_the_short_term_kept_goes(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    memory = await create(memories, caller, SECRET, tier=pb.TIER_SHORT_TERM)
    user = f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:"
    expiries: Any = await redis.zrange(f"{user}shorts", 0, -1, withscores=True)
    (key,) = [key async for key in redis.scan_iter(f"{user}short:*")]
    copy: Any = await redis.hgetall(key)
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    await redis.hset(key, mapping=copy)
    await redis.zadd(f"{user}shorts", dict(expiries))
    assert b"soriasis" in await values_in(redis, caller)
    await change(memories, caller, memory, sensitive=True)
    assert b"soriasis" not in await values_in(redis, caller)


async def test_batch_that_made_a_marked_memory_tells_no_longer_what_it_said(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    plain = await create_all(memories, caller, "tea at four", SECRET, request_id="plain")
    sealed = pb.Memory(content=AGAIN, sensitive=True)
    assert (await create_all(memories, caller, sealed, request_id="sealed"))[0].memory.sensitive
    again = await create_all(memories, caller, sealed, request_id="sealed")
    assert [(result.memory.content, result.created) for result in again] == [(AGAIN, False)]
    claims = "SELECT request_id, fingerprint FROM requests WHERE method = 'BatchCreateMemories'"
    before = dict(tuple(row) for row in await owner.fetch(claims))
    await change(memories, caller, plain[1].memory, sensitive=True)
    after = dict(tuple(row) for row in await owner.fetch(claims))
    assert [name for name in before if before[name] != after[name]] == ["plain"]
    assert SECRET not in await whole_database(owner)


async def test_transcript_leaves_it_out(memories: Stub, caller: Caller) -> None:
    first, second = await append(memories, caller, "How are you?", SECRET)
    await change(memories, caller, second, tier=pb.TIER_LONG_TERM)
    await change(memories, caller, second, sensitive=True)
    await write_down(memories, caller)
    assert await transcript(memories, caller) == [(0, first.content)]


async def test_unmarked_memory_is_plain_again_and_its_past_stays_sealed(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    kept = await keep(memories, caller, session_id="visit", session_position=1)
    await create(memories, caller, "How are you?", session_id="visit", session_position=0)
    await change(memories, caller, kept, content=AGAIN)
    plain = await change(memories, caller, kept, sensitive=False)
    assert (plain.content, plain.sensitive) == (AGAIN, False)
    assert plain.content_hash == hashlib.sha256(AGAIN.encode()).hexdigest()
    found = texts(await ask(memories, caller, "psoriasis"))
    assert found == [AGAIN, "How are you?"], "its neighbour is found by its words again"
    stored = await whole_database(owner)
    assert AGAIN in stored
    assert SECRET not in stored
    told = await versions(memories, caller, kept)
    assert [(was.content, was.sensitive) for was in told] == [
        (AGAIN, False),
        (AGAIN, True),
        (SECRET, True),
    ]


async def test_marking_and_rewriting_at_once_end_sealed(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    for number in range(10):
        memory = await create(memories, caller, f"{SECRET} {number}")
        await asyncio.gather(
            change(memories, caller, memory, sensitive=True),
            change(memories, caller, memory, content=f"{AGAIN} {number}"),
            change(memories, caller, memory, tags=["health"]),
        )
        ended = await get(memories, caller, memory)
        assert (ended.content, ended.sensitive) == (f"{AGAIN} {number}", True)
    stored = await whole_database(owner)
    assert SECRET not in stored
    assert AGAIN not in stored


async def test_vector_that_is_being_kept_goes_when_its_memory_is_marked(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await decide(database, caller, "memory.embed", granted=True)
    memory = await create(memories, caller, SECRET)
    await upload(memories, caller, of(await create(memories, caller, "tea"), (0, 1)))
    async with owner.transaction():
        await owner.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('embeddings ' || $1, 0))",
            str(caller.user_id),
        )
        marking = asyncio.create_task(change(memories, caller, memory, sensitive=True))
        await owner.execute(
            """
            INSERT INTO embeddings (tenant_id, user_id, model, memory_id, dimension, in_graph,
                                    content_hash, vector)
            SELECT tenant_id, user_id, 'tiny', id, 2, false, content_hash, '[1,0]'
              FROM memories WHERE content = $1
            """,
            SECRET,
        )
        await asyncio.sleep(0.1)
        assert not marking.done()
    assert (await marking).sensitive
    assert await owner.fetchval("SELECT count(*) FROM embeddings") == 1


# --- never in an index, unless its user wants that


async def test_no_vector_is_taken_for_it(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await decide(database, caller, "memory.embed", granted=True)
    kept = await keep(memories, caller)
    answer = await upload(memories, caller, of(kept, (1, 0)))
    assert (answer.stored, [refusal.field for refusal in answer.refusals]) == (
        0,
        ["embeddings[0].memory_id"],
    )
    assert "sensitive" in answer.refusals[0].message
    assert await owner.fetchval("SELECT count(*) FROM embeddings") == 0


async def test_meditation_scores_it_unread(
    memories: Stub,
    caller: Caller,
    scoring: scoring_rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    owner: asyncpg.Connection,
) -> None:
    await keep(memories, caller)
    await create(memories, caller, "tea at four")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, size=10)
        (batch,) = await stream.score_all()
    assert (batch.size, list(batch.texts)) == (2, ["tea at four"])
    rows = await owner.fetch("SELECT score, sentiment FROM memory_scores ORDER BY memory_id")
    assert [tuple(row) for row in rows] == [(0.5, None), (0.5, 0.25)]


TALK = [turn(n, text) for n, text in enumerate(["How are you?", SECRET, "Poor you.", "And now?"])]


@pytest.mark.parametrize("how", ["one by one", "imported", "in chunks"])
async def test_its_words_lead_to_no_turn_beside_it(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, redis: Redis, how: str
) -> None:
    talk = [pb.Memory.FromString(said.SerializeToString()) for said in TALK]
    talk[1].sensitive = True
    if how == "one by one":
        for said in talk:
            await memories.CreateMemory(
                pb.CreateMemoryRequest(memory=said), metadata=bearer(caller)
            )
    else:
        await imported(memories, caller, talk, 1 if how == "in chunks" else 100)
    assert texts(await ask(memories, caller, "psoriasis")) == []
    await assert_no_trace(owner, redis, caller)
    # The turns around it change, go and come back: still nothing.
    first, secret, third, _ = sorted(
        await listed(memories, caller), key=lambda memory: memory.session_position
    )
    await change(memories, caller, first, content="How is it?")
    await archive(memories, caller, third)
    await archive(memories, caller, secret)
    await restore(memories, caller, third)
    await restore(memories, caller, secret)
    await delete(memories, caller, first)
    assert texts(await ask(memories, caller, "psoriasis")) == []
    await assert_no_trace(owner, redis, caller)
    found = texts(await ask(memories, caller, "poor"))
    assert sorted(found) == ["And now?", "Poor you."], "a turn beside it leads to it"


class Index:
    """What a user does who chooses to have sensitive memories found, and the job that follows."""

    def __init__(
        self,
        users: Users,
        maintenance: maintenance_rpc.MaintenanceServiceAsyncStub,
        clock: FakeClock,
    ) -> None:
        self._users = users
        self._maintenance = maintenance
        self._clock = clock

    async def choose(self, caller: Caller, *, index_sensitive: bool) -> users_pb2.Settings:
        answer = await self._users.UpdateSettings(
            users_pb2.UpdateSettingsRequest(
                settings=users_pb2.Settings(index_sensitive=index_sensitive),
                update_mask=FieldMask(paths=["index_sensitive"]),
            ),
            metadata=bearer(caller),
        )
        self._clock.advance(seconds=61)
        return answer.settings

    async def work(self, caller: Caller, version: int) -> int:
        """Do what the job of a version of the settings does, in small pages."""
        request = maintenance_pb.ReindexMemoriesRequest(
            tenant_id=ids.show(ids.TENANT, caller.tenant_id),
            user_id=ids.show(ids.USER, caller.user_id),
            settings_version=version,
            page_size=2,
        )
        reindexed = 0
        while True:
            page = await self._maintenance.ReindexMemories(request, metadata=as_worker())
            reindexed += page.reindexed
            if not page.next_page_token:
                self._clock.advance(seconds=61)
                return reindexed
            request.page_token = page.next_page_token


@pytest_asyncio.fixture
async def index(
    users: Users,
    serve: Serve,
    database: Database,
    system_database: SystemDatabase,
    blobs: Blobs,
    redis: Redis,
    clock: FakeClock,
    master_key: Path,
) -> Index:
    service = maintenance_service(
        database,
        system_database,
        LocalKms(master_key),
        blobs,
        redis,
        clock,
    )
    channel = await serve(
        lambda server: maintenance_rpc.add_MaintenanceServiceServicer_to_server(service, server)
    )
    return Index(users, maintenance_rpc.MaintenanceServiceStub(channel), clock)


async def test_user_chooses_whether_queries_find_it(
    memories: Stub,
    caller: Caller,
    index: Index,
    owner: asyncpg.Connection,
    redis: Redis,
    answers: Answers,
) -> None:
    await imported(memories, caller, TALK)
    _, secret, *_ = sorted(await listed(memories, caller), key=lambda m: m.session_position)
    await change(memories, caller, secret, sensitive=True)
    before = await keep(memories, caller, "A rash, then psoriasis", tags=["health"])
    chosen = await index.choose(caller, index_sensitive=True)
    assert chosen.index_sensitive
    assert await index.work(caller, 1) == 5
    after = await keep(memories, caller, AGAIN)
    (imported_later,) = (
        await memories.ImportMemories(
            _one_chunk(pb.Memory(content="Psoriasis, imported", sensitive=True)),
            metadata=bearer(caller),
        )
    ).memory_ids
    answer = await ask(memories, caller, "psoriasis")
    assert {match.memory.id for match in answer.matches} == {
        secret.id,
        before.id,
        after.id,
        imported_later,
    }, "found, and no turn beside it"
    assert {match.reason for match in answer.matches} == {"shares psoriasis"}
    assert SECRET in texts(answer)
    await answers.flush()
    assert b"soriasis" not in await values_in(redis, caller)
    # They go on being found as they change and come back.
    await change(memories, caller, after, content="Psoriasis is back")
    await archive(memories, caller, before)
    await restore(memories, caller, before)
    assert len((await ask(memories, caller, "psoriasis")).matches) == 4
    assert texts(await ask(memories, caller, "quill")) == []
    # And no more once that is not wanted.
    await archive(memories, caller, before)
    await index.choose(caller, index_sensitive=False)
    assert await index.work(caller, 2) == 7
    await restore(memories, caller, before)
    assert texts(await ask(memories, caller, "psoriasis")) == []
    await assert_no_trace(owner, redis, caller)


async def _one_chunk(memory: pb.Memory) -> AsyncIterator[pb.ImportMemoriesRequest]:
    yield pb.ImportMemoriesRequest(memories=[memory], return_ids=True)


async def test_job_passes_over_what_does_not_open(
    memories: Stub, caller: Caller, index: Index, owner: asyncpg.Connection
) -> None:
    damaged, kept = await keep(memories, caller), await keep(memories, caller, AGAIN)
    await owner.execute(
        "UPDATE memories SET sealed = 'x' WHERE id = $1", ids.parse(ids.MEMORY, damaged.id, "id")
    )
    await index.choose(caller, index_sensitive=True)
    assert await index.work(caller, 1) == 2
    assert texts(await ask(memories, caller, "psoriasis")) == [kept.content]


async def test_job_of_a_user_whose_key_is_gone_ends(
    memories: Stub,
    caller: Caller,
    index: Index,
    database: Database,
    system_database: SystemDatabase,
) -> None:
    await keep(memories, caller)
    async with system_database.transaction() as connection:
        await data_keys_of(database).shred(connection, caller)
    await index.choose(caller, index_sensitive=True)
    assert await index.work(caller, 1) == 1
    assert texts(await ask(memories, caller, "psoriasis")) == []


# --- what the code and the database refuse by themselves


def draft() -> Draft:
    return Draft(Tier.LONG_TERM, SECRET, (), Source.CHAT, "", None, "", None, is_sensitive=True)


def test_plain_hash_of_a_sensitive_draft_is_not_to_be_had() -> None:
    with pytest.raises(RuntimeError):
        draft().content_hash  # noqa: B018
    assert replace(draft(), keyed_hash=b"keyed").content_hash == b"keyed"


def test_drafts_have_no_terms_of_a_sensitive_one_unless_asked_for_by_name() -> None:
    drafts = [replace(draft(), session_id="visit", session_position=place) for place in (0, 1)]
    around = Surroundings((), Language.ENGLISH, drafts)
    assert {terms.to_binary() for terms in around.terms_of(drafts)} == {NO_TERMS.to_binary()}


def test_sealed_memory_is_not_shown() -> None:
    memory = insertion.new_memory(
        Caller(ids.new_id(), ids.new_id()),
        ids.new_id(),
        replace(draft(), keyed_hash=b""),
        1,
        datetime(2026, 5, 4, tzinfo=UTC),
    )
    assert messages.memory_to(memory).content == SECRET
    with pytest.raises(RuntimeError):
        messages.memory_to(replace(memory, content="", sealed=b"sealed"))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE memories SET sealed = NULL, content = 'plain'",
        "UPDATE memories SET content = 'plain'",
        "UPDATE memories SET sensitive = false",
        "UPDATE memories SET scope = 'shared'",
        "UPDATE memory_versions SET sealed = NULL",
        "UPDATE memory_versions SET content = 'plain'",
        "UPDATE memory_versions SET sensitive = false",
    ],
)
async def test_database_refuses_to_keep_it_in_the_clear(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, statement: str
) -> None:
    await change(memories, caller, await keep(memories, caller), content=AGAIN)
    with pytest.raises(asyncpg.CheckViolationError):
        await owner.execute(statement)


async def test_history_can_be_sealed_and_not_be_rewritten(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await change(memories, caller, await keep(memories, caller), content=AGAIN)
    await change(memories, caller, await create(memories, caller, "tea"), content="coffee")
    before = await owner.fetch("SELECT * FROM memory_versions ORDER BY memory_id")
    async with database.transaction(caller) as connection:
        status = await connection.execute(
            "UPDATE memory_versions SET sealed = 'other' WHERE sealed IS NOT NULL"
        )
    assert status == "UPDATE 0"
    for statement in (
        "UPDATE memory_versions SET content = 'rum' WHERE sealed IS NULL",
        "UPDATE memory_versions SET speaker = 'Ann'",
        "DELETE FROM memory_versions",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with database.transaction(caller) as connection:
                await connection.execute(statement)
    assert await owner.fetch("SELECT * FROM memory_versions ORDER BY memory_id") == before
