"""The user's language acts: on what is stored, on queries, and, by a job, on what is there."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.maintenance.v1 import maintenance_pb2 as maintenance_pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as maintenance_rpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc
from kimberly.users.v1 import users_pb2

from local.postgres import OWNER, SUPERUSER
from local.servers import Stores
from server import ids
from server.caller import Caller
from server.database import Database
from server.migrate import migrate, read_migrations
from server.preferences import Language
from tests.conftest import FakeClock, as_worker, bearer, new_caller
from tests.memory.streams import in_chunks
from tests.memory.test_conversation import assert_terms_are_right, turn
from tests.refusals import refusal_of
from tests.users import conftest as of_users
from tests.users.conftest import Users
from tests.workers import conftest as of_workers
from tests.workers.conftest import Mesh, let_lapse, until
from workers.reindexing import REINDEX, Reindexing
from workers.stream import Handler

mesh = of_workers.mesh
socket = of_workers.socket
# The user service, and what it is made of.
users = of_users.users
audit_log = of_users.audit_log
consents = of_users.consents
withdrawals = of_users.withdrawals
archive = of_users.archive
audit_keys = of_users.audit_keys
checkpoint_store = of_users.checkpoint_store

HOUSES = "Die Häuser am Fluss sind bunt."
HOUSE = "Wem gehört das Haus?"
WORDS = ["Haus", "Häuser", "Katzen", "Gärten", "gegangen", "Brief", "Flüsse", "und", "nicht"]


class House:
    """What a user does who chooses a language, and what becomes of it."""

    def __init__(
        self,
        memories: rpc.MemoryServiceAsyncStub,
        users: Users,
        channel: grpc.aio.Channel,
        owner: asyncpg.Connection,
        clock: FakeClock,
    ) -> None:
        self.memories = memories
        self.users = users
        self.channel = channel
        self.maintenance = maintenance_rpc.MaintenanceServiceStub(channel)
        self.owner = owner
        self.clock = clock

    async def keep(self, caller: Caller, *texts: str) -> None:
        for text in texts:
            request = pb.CreateMemoryRequest(memory=pb.Memory(content=text))
            await self.memories.CreateMemory(request, metadata=bearer(caller))

    async def ask(self, caller: Caller, query: str) -> list[pb.Match]:
        """Ask when everybody has heard of the language."""
        self.clock.advance(seconds=61)
        request = pb.QueryMemoriesRequest(query=query)
        answer = await self.memories.QueryMemories(request, metadata=bearer(caller))
        return list(answer.matches)

    async def choose(self, caller: Caller, language: Language) -> None:
        await self.users.UpdateSettings(
            users_pb2.UpdateSettingsRequest(
                settings=users_pb2.Settings(
                    language=users_pb2.Language.Value(f"LANGUAGE_{language.name}")
                ),
                update_mask=FieldMask(paths=["language"]),
            ),
            metadata=bearer(caller),
        )

    async def page(
        self, caller: Caller, version: int, *, size: int = 100, token: str = ""
    ) -> maintenance_pb.ReindexMemoriesResponse:
        return await self.maintenance.ReindexMemories(
            maintenance_pb.ReindexMemoriesRequest(
                tenant_id=ids.show(ids.TENANT, caller.tenant_id),
                user_id=ids.show(ids.USER, caller.user_id),
                settings_version=version,
                page_size=size,
                page_token=token,
            ),
            metadata=as_worker(),
        )

    def handlers(self, page_size: int = 3) -> Mapping[str, Handler]:
        reindexing = Reindexing(self.channel, metadata=as_worker(), page_size=page_size)
        return {REINDEX: reindexing.reindex}

    async def jobs(self) -> list[str]:
        rows = await self.owner.fetch("SELECT state FROM jobs WHERE kind = $1", REINDEX)
        return [row["state"] for row in rows]

    async def are_done(self) -> bool:
        return set(await self.jobs()) == {"succeeded"}


@pytest_asyncio.fixture
async def house(
    memories: rpc.MemoryServiceAsyncStub,
    users: Users,
    maintenance_channel: grpc.aio.Channel,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> House:
    return House(memories, users, maintenance_channel, owner, clock)


# --- what is stored and asked from now on


async def test_german_user_finds_houses_by_the_house(house: House, caller: Caller) -> None:
    await house.choose(caller, Language.GERMAN)
    await house.keep(caller, HOUSES, "Die Katze schläft.")
    (match,) = await house.ask(caller, HOUSE)
    assert match.memory.content == HOUSES
    assert match.reason == "shares haus"


@pytest.mark.parametrize(
    ("language", "text", "query"),
    [
        (Language.ENGLISH, "Three boats lay in the harbour.", "Whose boat is it?"),
        (Language.FRENCH, "Les chevaux boivent l’eau.", "Où est le cheval, et l'eau ?"),
        (Language.SPANISH, "Los niños juegan.", "¿Dónde está el niño?"),
        (Language.ITALIAN, "I gatti bevono l'acqua.", "Dov'è il gatto?"),
        (Language.PORTUGUESE, "As casas brancas.", "Onde é que fica a casa?"),
        (Language.SIMPLE, "Hyvää päivää", "päivää"),
    ],
)
async def test_every_language_finds_a_word_in_its_other_form(
    house: House, caller: Caller, language: Language, text: str, query: str
) -> None:
    await house.choose(caller, language)
    await house.keep(caller, text)
    assert [match.memory.content for match in await house.ask(caller, query)] == [text]


@pytest.mark.parametrize("language", [Language.GERMAN, Language.SIMPLE])
async def test_any_text_is_a_legal_query(house: House, caller: Caller, language: Language) -> None:
    await house.choose(caller, language)
    await house.keep(caller, HOUSES, "私は東京に住んでいます🎂")
    for query, finds in [
        ("der die und das", language is Language.SIMPLE),
        ('"Häuser" AND -bunt OR (fluss* NEAR/3 am) ~2', True),
        ("'; DROP TABLE memories; --", False),
        ("Häuser " + " ".join(f"wort{number}" for number in range(7_000)), True),
        ("ha\u0308user", language is Language.SIMPLE or language is Language.GERMAN),
        ("東京", True),
        ("🎂", True),
        ("👍👍👍", False),
        ("\u200d\ufe0f \t\n", False),
    ]:
        assert bool(await house.ask(caller, query)) is finds, query


# --- what is there already


async def test_change_of_the_language_reads_everything_anew(
    house: House, caller: Caller, mesh: Mesh, database: Database
) -> None:
    other = await new_caller(database)
    await house.keep(other, HOUSES)
    await house.keep(caller, HOUSES)
    talk = [turn(place, f"Die Gärten, Tag {place}") for place in range(9)]
    await house.memories.ImportMemories(in_chunks(talk, 9), metadata=bearer(caller))
    assert not await house.ask(caller, HOUSE)
    await house.choose(caller, Language.GERMAN)
    async with mesh.working(house.handlers()):
        await until(house.are_done)
    (match,) = await house.ask(caller, HOUSE)
    assert match.memory.content == HOUSES
    assert match.memory.etag
    assert len(await house.ask(caller, "Garten")) == 9
    assert not await house.ask(other, HOUSE)
    await house.owner.execute("DELETE FROM memories WHERE session_position IS NULL")
    await assert_terms_are_right(house.owner, Language.GERMAN, at_least=9)


async def test_queries_answer_while_memories_are_read_anew(house: House, caller: Caller) -> None:
    await house.keep(caller, "Häuser, erstens", "Häuser, zweitens", "Häuser, drittens")
    await house.choose(caller, Language.GERMAN)
    page = await house.page(caller, 1, size=2)
    assert page.reindexed == 2
    assert len(await house.ask(caller, "Haus")) == 2
    page = await house.page(caller, 1, size=2, token=page.next_page_token)
    assert (page.reindexed, len(await house.ask(caller, "Haus"))) == (1, 3)
    page = await house.page(caller, 1, size=2, token=page.next_page_token)
    assert (page.reindexed, page.next_page_token) == (0, "")


async def test_long_texts_make_short_pages(house: House, caller: Caller) -> None:
    await house.keep(caller, *(f"{number} {'wort ' * 13_000}" for number in range(6)))
    await house.choose(caller, Language.GERMAN)
    page = await house.page(caller, 1)
    assert 1 < page.reindexed < 6
    assert (await house.page(caller, 1, token=page.next_page_token)).reindexed > 0


async def test_only_the_job_of_the_last_change_reads_anything(
    house: House, caller: Caller, mesh: Mesh
) -> None:
    await house.keep(caller, HOUSES)
    await house.choose(caller, Language.FRENCH)
    await house.choose(caller, Language.GERMAN)
    assert (await house.page(caller, 1)).reindexed == 0
    async with mesh.working(house.handlers()):
        await until(house.are_done)
    counts = await house.owner.fetch("SELECT result FROM jobs ORDER BY id")
    assert [row["result"] for row in counts] == ['{"reindexed": 0}', '{"reindexed": 1}']
    assert await house.ask(caller, HOUSE)


async def test_a_choice_that_changes_nothing_asks_for_nothing(house: House, caller: Caller) -> None:
    await house.choose(caller, Language.ENGLISH)
    await house.choose(caller, Language.GERMAN)
    await house.choose(caller, Language.GERMAN)
    assert await house.jobs() == ["waiting"]


async def test_what_a_killed_worker_began_is_done_by_the_next(
    house: House, caller: Caller, mesh: Mesh
) -> None:
    await house.keep(caller, *(f"Häuser, Nummer {number}" for number in range(40)))
    await house.choose(caller, Language.GERMAN)
    before = await terms(house.owner)

    async def has_begun() -> bool:
        return await terms(house.owner) != before

    async with mesh.working(house.handlers(page_size=1)):
        await until(has_begun)
    assert await house.jobs() == ["running"]
    await let_lapse(house.owner)
    async with mesh.working(house.handlers()):
        await until(house.are_done)
    after = await terms(house.owner)
    assert all(after[memory_id] != before[memory_id] for memory_id in before)


async def terms(owner: asyncpg.Connection) -> dict[UUID, str]:
    rows = await owner.fetch("SELECT id, terms::text FROM memories")
    return {row["id"]: row["terms"] for row in rows}


async def test_who_chose_before_languages_acted_gets_a_job_by_the_migration(
    stores: Stores, caller: Caller
) -> None:
    await stores.postgres.provision("older")
    migrations = read_migrations()
    before = next(n for n, one in enumerate(migrations) if one.name == "0012_reindexing.sql")
    connection = await asyncpg.connect(stores.postgres.dsn(OWNER, "older"))
    superuser = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, "older"))
    await migrate(connection, migrations[:before])
    for language, user_id in (("german", caller.user_id), ("english", ids.new_id())):
        await superuser.execute(
            """
            INSERT INTO settings (tenant_id, user_id, language, scoring_preset,
                                  relevance_to_goals, emotional_weight, predictive_value,
                                  recency_frequency, version)
            VALUES ($1, $2, $3, 'balanced', 0.4, 0.3, 0.2, 0.1, 7)
            """,
            caller.tenant_id,
            user_id,
            language,
        )
    await migrate(connection, migrations)
    await connection.close()
    (job,) = await superuser.fetch("SELECT user_id, kind, payload FROM jobs")
    versions = await superuser.fetch("SELECT language_version FROM settings ORDER BY language")
    await superuser.close()
    assert (job["user_id"], job["kind"]) == (caller.user_id, REINDEX)
    assert json.loads(job["payload"]) == {
        "tenant_id": ids.show(ids.TENANT, caller.tenant_id),
        "user_id": ids.show(ids.USER, caller.user_id),
        "settings_version": 7,
    }
    assert [row["language_version"] for row in versions] == [0, 7]


async def test_sealed_texts_have_no_terms_and_versions_stay(house: House, caller: Caller) -> None:
    await house.keep(caller, HOUSES, "Noch mehr Häuser")
    await house.owner.execute(
        """
        UPDATE memories
           SET sensitive = true, sealed = 'x', content = '', terms = '{1:1}/1000000000'
         WHERE content = $1
        """,
        HOUSES,
    )
    await house.choose(caller, Language.GERMAN)
    assert (await house.page(caller, 1)).reindexed == 2
    rows = await house.owner.fetch("SELECT version, content, terms::text FROM memories")
    assert {row["version"] for row in rows} == {1}
    assert [row["terms"] for row in rows if not row["content"]] == ["{}/1000000000"]


# --- at the same time


async def test_change_of_the_language_waits_for_who_writes_in_the_old_one(
    house: House, caller: Caller, mesh: Mesh, owner: asyncpg.Connection
) -> None:
    async def wait(number: int) -> bool:
        waiting = await owner.fetchval(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        )
        return bool(waiting == number)

    async with owner.transaction():
        await owner.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{caller.user_id}talk"
        )
        request = pb.CreateMemoryRequest(memory=turn(0, HOUSES))
        metadata = bearer(caller)
        writing = asyncio.ensure_future(house.memories.CreateMemory(request, metadata=metadata))
        await until(lambda: wait(1))
        changing = asyncio.ensure_future(house.choose(caller, Language.GERMAN))
        await until(lambda: wait(2))
        late = asyncio.ensure_future(house.keep(caller, "Ein anderes Haus"))
        await until(lambda: wait(3))
        assert not writing.done()
        assert not changing.done()
    await asyncio.gather(writing, changing, late)
    async with mesh.working(house.handlers()):
        await until(house.are_done)
    assert len(await house.ask(caller, "Häuser")) == 2


@pytest.mark.parametrize("seed", range(2))
async def test_writes_beside_the_reading_end_up_right(
    house: House, caller: Caller, mesh: Mesh, seed: int
) -> None:
    dice = random.Random(seed)
    metadata = bearer(caller)
    start = [turn(n % 12, f"{dice.choice(WORDS)} anfang{n}") for n in range(40)]
    await house.memories.ImportMemories(in_chunks(start, 40), metadata=metadata)
    stored = [f"mem_{memory_id.hex}" for memory_id in await terms(house.owner)]
    dice.shuffle(stored)

    async def write(number: int) -> None:
        text = f"{dice.choice(WORDS)} {dice.choice(WORDS)} nummer{number}"
        match number % 3:
            case 0:
                draft = turn(dice.randrange(12), text)
                create = pb.CreateMemoryRequest(memory=draft)
                await house.memories.CreateMemory(create, metadata=metadata)
            case 1:
                changed = pb.Memory(id=stored.pop(), content=text)
                update = pb.UpdateMemoryRequest(
                    memory=changed, update_mask=FieldMask(paths=["content"])
                )
                await house.memories.UpdateMemory(update, metadata=metadata)
            case 2:
                delete = pb.DeleteMemoryRequest(id=stored.pop())
                await house.memories.DeleteMemory(delete, metadata=metadata)

    async with mesh.working(house.handlers(page_size=2)):
        for number, language in enumerate([Language.FRENCH, Language.GERMAN]):
            choice = house.choose(caller, language)
            numbers = range(15 * number, 15 * (number + 1))
            await asyncio.gather(choice, *(write(n) for n in numbers))
        await until(house.are_done)
    await assert_terms_are_right(house.owner, Language.GERMAN)


# --- who may, and how


async def test_users_may_not_reindex(house: House, caller: Caller) -> None:
    call = house.maintenance.ReindexMemories(
        maintenance_pb.ReindexMemoriesRequest(), metadata=bearer(caller)
    )
    assert (await refusal_of(call)).code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant_id", "usr_0198c0f3a5e07c3a9f0c5a1b2c3d4e5f"),
        ("user_id", ""),
        ("page_size", -1),
        ("page_size", 1001),
        ("page_token", "garbage"),
    ],
)
async def test_page_that_cannot_exist_is_refused_by_field(
    house: House, caller: Caller, field: str, value: str | int
) -> None:
    request = maintenance_pb.ReindexMemoriesRequest(
        tenant_id=ids.show(ids.TENANT, caller.tenant_id),
        user_id=ids.show(ids.USER, caller.user_id),
        settings_version=1,
    )
    setattr(request, field, value)
    refusal = await refusal_of(house.maintenance.ReindexMemories(request, metadata=as_worker()))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))
