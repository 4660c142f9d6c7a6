"""Sensitive memories are open to their user, and sealed to everything else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import asyncpg
import grpc
import structlog
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.cache import Redis
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Database
from server.kms.local import LocalKms
from server.memory import messages
from server.memory.answers import Answers
from server.memory.model import Draft, Source, Tier
from server.memory.sensitive import Opener
from server.memory.store import MemoryStore
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import write_decision
from tests.kms.conftest import Master
from tests.memory.calls import Stub, archive, change, create, get, restore, versions
from tests.memory.meanings import ask, of, texts, upload
from tests.memory.sensitive.secret import (
    AGAIN,
    SECRET,
    assert_no_trace,
    keep,
    listed,
    traces,
    whole_database,
)
from tests.memory.streams import caught_up, changes, export, imported, watching
from tests.refusals import refusal_of


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
    await write_decision(database, caller, "memory.embed", granted=True)
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
    await write_decision(database, other, "memory.store", granted=True)
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
