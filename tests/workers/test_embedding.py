"""Local embeddings from end to end: settings, queue, worker stream, a shipped model, Postgres."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.embedding_models import Embedder, Floats, load_embedders
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embedding_store import EmbeddingStore
from server.memory.embeddings import read_embedding
from server.memory.model import Change, Filter
from server.memory.store import MemoryStore
from tests.conftest import FakeClock, as_worker, data_keys_of, new_caller
from tests.memory.embedding_calls import choose, consent
from tests.remembering import remember
from tests.shipped_models import NARROW, WIDE
from tests.workers.conftest import Mesh, let_lapse, until
from workers.embedding import EMBED, Embedding
from workers.stream import Handler

TALK = (
    "The cat sleeps on the sofa.",
    "The central bank raised its interest rates.",
    "We planted tomatoes behind the house.",
)
ABOUT = {
    TALK[0]: "a kitten napping on the couch",
    TALK[1]: "mortgages and monetary policy",
    TALK[2]: "growing vegetables in the garden",
}
"""What somebody asks who looks for each, in other words."""


@pytest.fixture(scope="module")
def embedders(shipped_models: Path) -> Mapping[str, Embedder]:
    return load_embedders(shipped_models)


@dataclass(slots=True)
class Gate:
    """A model that stops before a batch until it is let go, and notes what it was asked."""

    model: Embedder
    stops_at: int
    """Which batch, from 1."""
    asked: list[str] = field(default_factory=list)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    _batches: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def dimension(self) -> int:
        return self.model.dimension

    def embed(self, texts: Sequence[str]) -> Floats:
        self._batches += 1
        if self._batches == self.stops_at:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self.opened.wait(30)
        self.asked += texts
        return self.model.embed(texts)


def embedding(
    embedders: Mapping[str, Embedder], batch_size: int = 256
) -> Callable[[Any], Mapping[str, Handler]]:
    """Return what makes the handlers of a worker with these models."""

    def handlers(channel: Any) -> Mapping[str, Handler]:
        made = Embedding(channel, embedders, metadata=as_worker(), batch_size=batch_size)
        return {EMBED: made.embed}

    return handlers


@pytest_asyncio.fixture
async def caller(database: Database, system_database: SystemDatabase) -> Caller:
    """A user who consented to vectors and remembers the talk."""
    caller = await new_caller(database)
    await consent(system_database, caller, granted=True)
    await remember(database, caller, *TALK)
    return caller


async def idle(owner: asyncpg.Connection) -> None:
    """Return when no job is left to do."""
    unfinished = "SELECT NOT EXISTS (SELECT FROM jobs WHERE state IN ('waiting', 'running'))"
    await until(lambda: owner.fetchval(unfinished))


async def found(
    database: Database, caller: Caller, model: str, embedder: Embedder, query: str
) -> list[str]:
    """Ask by a vector that the client made with the model, and return what is found."""
    (values,) = embedder.embed([query])
    vector = read_embedding(model, values.tolist(), "embedding")
    near = await EmbeddingSearch(database).nearest(caller, vector, Filter(), 10)
    rows = await database.fetch(caller, "SELECT id, content FROM memories WHERE $3", True)
    contents = {row["id"]: row["content"] for row in rows}
    best = sorted(near.candidates, key=lambda candidate: candidate.amount, reverse=True)
    return [contents[candidate.id] for candidate in best]


async def counts(owner: asyncpg.Connection) -> dict[str, int]:
    rows = await owner.fetch("SELECT model, count(*) AS n FROM embeddings GROUP BY model")
    return {row["model"]: row["n"] for row in rows}


async def test_memories_are_found_by_meaning_once_a_user_chose_a_model(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    stranger = await new_caller(database)
    await remember(database, stranger, *TALK)
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0
    async with mesh.working(embedding(embedders)):
        await choose(database, caller, WIDE)
        await idle(owner)
    for text, query in ABOUT.items():
        answer = await found(database, caller, WIDE, embedders[WIDE], query)
        assert answer[0] == text
        assert sorted(answer) == sorted(TALK)
    assert await owner.fetchval("SELECT result FROM jobs") == '{"kept": 3}'
    assert await counts(owner) == {WIDE: 3}


async def test_result_says_that_the_month_is_used_up(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    budget = "UPDATE plans SET embeddings_per_month = $1 WHERE name = 'free'"
    before = await owner.fetchval("SELECT embeddings_per_month FROM plans WHERE name = 'free'")
    await owner.execute(budget, 2)
    try:
        async with mesh.working(embedding(embedders)):
            await choose(database, caller, WIDE)

            async def is_done() -> bool:
                return bool(await owner.fetchval("SELECT true FROM jobs WHERE state = 'succeeded'"))

            await until(is_done)
    finally:
        await owner.execute(budget, before)
    result = json.loads(await owner.fetchval("SELECT result FROM jobs WHERE state = 'succeeded'"))
    assert result["kept"] == 2
    assert "used up" in result["stopped"]
    assert await counts(owner) == {WIDE: 2}


async def test_what_is_written_later_follows_and_a_new_text_has_a_new_vector(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    async with mesh.working(embedding(embedders)):
        await choose(database, caller, WIDE)
        await idle(owner)
        await remember(database, caller, "The train to Lund was late.")
        await idle(owner)
        memory_id = await owner.fetchval("SELECT id FROM memories WHERE content = $1", TALK[0])
        await MemoryStore(database, data_keys_of(database)).update(
            caller, memory_id, Change(content="The stock market fell."), FakeClock()()
        )
        await idle(owner)
    assert await counts(owner) == {WIDE: 4}
    ask = [ABOUT[TALK[0]], "delayed railway", "shares lost value"]
    best = [(await found(database, caller, WIDE, embedders[WIDE], each))[0] for each in ask]
    assert best[0] != TALK[0]
    assert best[1:] == ["The train to Lund was late.", "The stock market fell."]


async def test_the_old_model_answers_while_another_one_takes_over(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    async with mesh.working(embedding(embedders)):
        await choose(database, caller, WIDE)
        await idle(owner)

    async def finds(model: str) -> list[str]:
        answers = [
            await found(database, caller, model, embedders[model], ask) for ask in ABOUT.values()
        ]
        return [answer[0] for answer in answers if answer]

    gate = Gate(embedders[NARROW], stops_at=2)
    async with mesh.working(embedding({NARROW: gate}, batch_size=1)):
        await choose(database, caller, NARROW)
        await gate.reached.wait()
        assert await counts(owner) == {WIDE: 3, NARROW: 1}
        assert await finds(WIDE) == list(TALK)
        gate.opened.set()
        await idle(owner)
    assert await counts(owner) == {WIDE: 3, NARROW: 3}
    assert await finds(WIDE) == await finds(NARROW) == list(TALK)
    assert await EmbeddingStore(database).delete(caller, WIDE) == 3
    assert await counts(owner) == {NARROW: 3}
    assert (await finds(WIDE), await finds(NARROW)) == ([], list(TALK))


async def test_vectors_of_the_chosen_model_that_were_dropped_are_made_anew(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    async with mesh.working(embedding(embedders)):
        await choose(database, caller, WIDE)
        await idle(owner)
        await EmbeddingStore(database).delete(caller, WIDE)
        await idle(owner)
    assert await counts(owner) == {WIDE: 3}
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 2


async def test_withdrawn_consent_stops_a_job_in_flight_and_consent_takes_it_up_again(
    mesh: Mesh,
    database: Database,
    system_database: SystemDatabase,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    gate = Gate(embedders[WIDE], stops_at=2)
    async with mesh.working(embedding({WIDE: gate}, batch_size=1)):
        await choose(database, caller, WIDE)
        await gate.reached.wait()
        await consent(system_database, caller, granted=False)
        gate.opened.set()
        await idle(owner)
        assert await counts(owner) == {WIDE: 1}
        assert gate.asked == list(TALK[:2])
        await consent(system_database, caller, granted=True)
        await idle(owner)
    assert await counts(owner) == {WIDE: 3}
    rows = await owner.fetch("SELECT state, result FROM jobs ORDER BY id")
    assert [tuple(row) for row in rows] == [
        ("succeeded", '{"kept": 1}'),
        ("succeeded", '{"kept": 2}'),
    ]


async def test_another_worker_goes_on_where_one_was_killed(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    await remember(database, caller, *(f"Turn {number}" for number in range(20)))
    killed, heir = Gate(embedders[WIDE], stops_at=3), Gate(embedders[WIDE], stops_at=0)
    async with mesh.working(embedding({WIDE: killed}, batch_size=4)):
        await choose(database, caller, WIDE)
        await killed.reached.wait()
        assert await counts(owner) == {WIDE: 8}
    await let_lapse(owner)
    async with mesh.working(embedding({WIDE: heir}, batch_size=4)):
        await idle(owner)
    killed.opened.set()
    assert await counts(owner) == {WIDE: 23}
    assert len(heir.asked) == len(set(heir.asked)) == 23 - 8
    audited = await owner.fetch("SELECT resource FROM audit_events WHERE action = 'memory.embed'")
    assert len({event["resource"] for event in audited}) == len(audited) == 23
    assert await owner.fetchval("SELECT attempt FROM jobs") == 2


async def test_a_stream_that_breaks_fails_the_attempt_and_the_next_one_goes_on(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    gate = Gate(embedders[WIDE], stops_at=2)
    async with mesh.working(embedding({WIDE: gate}, batch_size=1)):
        await choose(database, caller, WIDE)
        await gate.reached.wait()
        await mesh.break_down()
        gate.opened.set()
        await mesh.start()
        await idle(owner)
    assert await counts(owner) == {WIDE: 3}
    assert await owner.fetchval("SELECT state FROM jobs") == "succeeded"


async def test_a_model_that_no_worker_has_is_named_in_the_job(
    mesh: Mesh,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    embedders: Mapping[str, Embedder],
) -> None:
    async with mesh.working(embedding({NARROW: embedders[NARROW]})):
        await choose(database, caller, "nobody's")
        await until(lambda: owner.fetchval("SELECT error <> '' FROM jobs"))
        error = await owner.fetchval("SELECT error FROM jobs")
        assert error.startswith('FAILED_PRECONDITION: the worker has no model "nobody\'s", only')
        # The job waits to be tried again, and takes the choice as it is then.
        await choose(database, caller, NARROW)
        await idle(owner)
    assert await counts(owner) == {NARROW: 3}
