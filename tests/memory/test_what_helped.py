"""From a query to the score: what retrieving a memory was good for is learnt by the next run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.database import SystemDatabase
from server.memory.answers import Answers
from server.memory.retrieval_counts import RetrievalCounts
from server.memory.short_term import ShortTermStore
from tests.conftest import FakeClock, bearer
from tests.memory.calls import Stub, create
from tests.memory.meanings import ask, texts
from tests.workers import conftest as of_workers
from tests.workers.conftest import Mesh, meditating, until

mesh = of_workers.mesh
socket = of_workers.socket

HELPED, IN_VAIN, NEVER = (
    "the harbour opens at 7",
    "the harbour opens at 8",
    "the library opens at 9",
)
"""They differ in nothing that a score is made of but in what became of them."""


@pytest_asyncio.fixture
async def counts(
    system_database: SystemDatabase, short_term: ShortTermStore
) -> AsyncIterator[RetrievalCounts]:
    """Written by themselves, as in the process that answers queries."""
    counts = RetrievalCounts(system_database, short_term, every_seconds=0.01)
    running = asyncio.create_task(counts.run())
    yield counts
    running.cancel()
    await asyncio.wait([running])


class Learning:
    """A user who asks and says what helped, and the runs that learn from it."""

    def __init__(self, memories: Stub, mesh: Mesh, caller: Caller) -> None:
        self._memories = memories
        self._mesh = mesh
        self._caller = caller

    async def scores(self) -> dict[str, pb.Score]:
        """Meditate, and return the score of each memory by its text."""
        answer = await self._memories.Meditate(pb.MeditateRequest(), metadata=bearer(self._caller))

        async def is_over() -> bool:
            request = pb.GetMeditationRequest(id=answer.meditation.id)
            run = await self._memories.GetMeditation(request, metadata=bearer(self._caller))
            return run.meditation.state == pb.MEDITATION_STATE_SUCCEEDED

        async with self._mesh.working(meditating()):
            await until(is_over)
        page = await self._memories.ListMemories(
            pb.ListMemoriesRequest(), metadata=bearer(self._caller)
        )
        return {memory.content: memory.score for memory in page.memories}

    async def say_useful(self, memory: pb.Memory) -> None:
        request = pb.GiveFeedbackRequest(id=memory.id, useful=True)
        await self._memories.GiveFeedback(request, metadata=bearer(self._caller))


async def test_what_was_retrieved_and_helped_is_worth_more_than_what_never_was(
    memories: Stub,
    mesh: Mesh,
    caller: Caller,
    answers: Answers,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    clock.now = datetime.now(UTC)
    learning = Learning(memories, mesh, caller)
    kept = {text: await create(memories, caller, text) for text in (HELPED, IN_VAIN, NEVER)}
    before = await learning.scores()
    assert len({score.value for score in before.values()}) == 1
    assert before[HELPED].predictive_value == pytest.approx(0.5, abs=1e-3)
    for _ in range(3):
        assert set(texts(await ask(memories, caller, "harbour"))) == {HELPED, IN_VAIN}
        await answers.flush()
        await learning.say_useful(kept[HELPED])

    async def is_counted() -> bool:
        counted: int = await owner.fetchval("SELECT sum(retrieved_count) FROM memory_scores")
        return counted == 6

    await until(is_counted)
    after = await learning.scores()
    # (useful + 1) / (retrieved + 2), of what was seen today.
    for text, value in ((HELPED, 4 / 5), (NEVER, 1 / 2), (IN_VAIN, 1 / 5)):
        assert after[text].predictive_value == pytest.approx(value, abs=1e-3), text
    # All else that a score is made of is as it was: the difference is what was learnt.
    assert after[HELPED].value - after[NEVER].value == pytest.approx(
        0.2 * (4 / 5 - 1 / 2), abs=1e-3
    )
    assert after[NEVER].value - after[IN_VAIN].value == pytest.approx(0.2 * 0.3, abs=1e-3)
    best, *_ = (await ask(memories, caller, "opens")).matches
    assert (best.memory.content, best.memory_score) == (HELPED, after[HELPED].value)
