"""Sensitive memories are in no index, unless their user wants that."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.maintenance.v1 import maintenance_pb2 as maintenance_pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as maintenance_rpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as scoring_rpc
from kimberly.users.v1 import users_pb2

from server import ids
from server.cache import Redis
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.answers import Answers
from server.memory.meditation_store import MeditationStore
from tests.conftest import FakeClock, as_worker, bearer, data_keys_of
from tests.deciding import write_decision
from tests.memory.calls import Stub, archive, change, create, delete, restore, values_in
from tests.memory.meanings import ask, of, texts, upload
from tests.memory.scoring_calls import scoring_stream
from tests.memory.sensitive.secret import AGAIN, SECRET, assert_no_trace, keep, listed
from tests.memory.streams import imported
from tests.memory.test_conversation import turn
from tests.users.conftest import Users


async def test_no_vector_is_taken_for_it(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await write_decision(database, caller, "memory.embed", granted=True)
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
async def index(users: Users, maintenance_channel: grpc.aio.Channel, clock: FakeClock) -> Index:
    return Index(users, maintenance_rpc.MaintenanceServiceStub(maintenance_channel), clock)


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
