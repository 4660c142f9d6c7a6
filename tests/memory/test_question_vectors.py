"""Questions that bring no vector, where the operator gave the mesh models for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import numpy as np
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.database import Database
from server.embedding_models import Embedder, Floats, load_embedders
from server.memory.answers import Answers
from server.memory.embedding_search import EmbeddingSearch
from server.memory.question_vectors import MOST_REMEMBERED, QuestionVectors
from server.memory.retrieval import Retrieval
from server.memory.search_store import SearchStore
from server.memory.sensitive import Opener
from server.memory.shared_store import SharedStore
from server.memory.short_term import ShortTermStore
from tests.conftest import FakeClock, bearer, data_keys_of, new_caller
from tests.deciding import write_decision
from tests.memory.calls import Stub, create
from tests.memory.embedding_calls import choose
from tests.memory.meanings import ask, of, texts, upload
from tests.shipped_models import NARROW, WIDE

CAT, BANK = "Our cat sleeps on its sofa.", "Their bank raised all interest rates."
ABOUT_THE_CAT = "a kitten napping next to a couch"


@pytest.fixture(scope="module")
def embedders(shipped_models: Path) -> Mapping[str, Embedder]:
    return load_embedders(shipped_models)


@pytest.fixture
def retrieval(
    database: Database,
    short_term: ShortTermStore,
    clock: FakeClock,
    embedders: Mapping[str, Embedder],
) -> Retrieval:
    return Retrieval(
        SearchStore(database),
        EmbeddingSearch(database),
        short_term,
        SharedStore(database),
        Opener(data_keys_of(database)),
        clock,
        vectors=QuestionVectors(embedders),
    )


@pytest_asyncio.fixture
async def caller(database: Database, memories: Stub, embedders: Mapping[str, Embedder]) -> Caller:
    """A user of a local model, whose memories have the vectors that it makes."""
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    await choose(database, caller, NARROW)
    for text in (CAT, BANK):
        memory = await create(memories, caller, text)
        (vector,) = embedders[NARROW].embed([text])
        await upload(memories, caller, of(memory, vector.tolist(), NARROW))
    return caller


async def test_question_finds_what_says_the_same_in_other_words(
    memories: Stub, caller: Caller
) -> None:
    answer = await ask(memories, caller, ABOUT_THE_CAT)
    assert (answer.semantic_model, answer.semantic_late) == (NARROW, False)
    best = answer.matches[0]
    assert (best.memory.content, best.lexical, best.semantic) == (CAT, 0, 1)
    assert best.reason == "is close in meaning"


async def test_vector_of_the_question_comes_first(memories: Stub, caller: Caller) -> None:
    answer = await ask(memories, caller, ABOUT_THE_CAT, (1, 0), model="another")
    assert (answer.semantic_model, texts(answer)) == ("", [])


@pytest.mark.parametrize(
    "asked",
    [
        pb.QueryMemoriesRequest(query=""),
        pb.QueryMemoriesRequest(query=ABOUT_THE_CAT, tiers=[pb.TIER_SHORT_TERM]),
    ],
    ids=["nothing is asked", "the short term has no vectors"],
)
async def test_without_a_meaning_the_words_decide(
    memories: Stub, caller: Caller, asked: pb.QueryMemoriesRequest
) -> None:
    answer = await memories.QueryMemories(asked, metadata=bearer(caller))
    assert (answer.semantic_model, answer.semantic_late, texts(answer)) == ("", False, [])


@pytest.mark.parametrize("model", ["", WIDE, "unheard of"])
async def test_without_vectors_of_the_chosen_model_the_words_decide(
    memories: Stub, caller: Caller, database: Database, model: str
) -> None:
    await choose(database, caller, model)
    answer = await ask(memories, caller, "the bank, or a kitten napping")
    assert (answer.semantic_model, answer.semantic_late, texts(answer)) == ("", False, [BANK])


async def test_vectors_of_another_length_under_the_name_are_not_compared(
    memories: Stub, database: Database
) -> None:
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    await choose(database, caller, NARROW)
    await upload(memories, caller, of(await create(memories, caller, CAT), (1, 0), NARROW))
    answer = await ask(memories, caller, "the cat")
    assert (answer.semantic_model, answer.semantic_late, texts(answer)) == ("", False, [CAT])


async def test_consent_that_is_withdrawn_counts_for_answers_that_are_kept_too(
    memories: Stub, caller: Caller, database: Database, answers: Answers
) -> None:
    for _ in range(2):
        assert texts(await ask(memories, caller, ABOUT_THE_CAT))[0] == CAT
        await answers.flush()
    await write_decision(database, caller, "memory.embed", granted=False)
    answer = await ask(memories, caller, ABOUT_THE_CAT)
    assert (answer.semantic_model, answer.semantic_late, texts(answer)) == ("", False, [])


@pytest.mark.parametrize("patience_seconds", [0.5])
async def test_late_vectors_leave_the_answer_to_the_words(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    async with owner.transaction():
        await owner.execute("LOCK TABLE embeddings")
        answer = await ask(memories, caller, "the bank, or a kitten napping")
    assert (answer.semantic_model, answer.semantic_late, texts(answer)) == ("", True, [BANK])


@dataclass(slots=True)
class Counting:
    """A model that counts what it is asked."""

    asked: list[str] = field(default_factory=list)
    dimension: int = 2

    def embed(self, texts: Sequence[str]) -> Floats:
        self.asked += texts
        return np.array([[1, 0]] * len(texts), np.float32)


async def test_what_the_model_knows_nothing_of_has_no_vector(
    embedders: Mapping[str, Embedder],
) -> None:
    vectors = QuestionVectors(embedders)
    assert await vectors.of(NARROW, "") is None
    assert await vectors.of(NARROW, "cat")


async def test_the_last_questions_are_remembered_and_no_more() -> None:
    model = Counting()
    vectors = QuestionVectors({"m": model})
    for number in range(MOST_REMEMBERED + 1):
        assert await vectors.of("m", f"question {number}")
    await vectors.of("m", f"question {MOST_REMEMBERED}")
    assert len(model.asked) == MOST_REMEMBERED + 1
    await vectors.of("m", "question 0")
    assert model.asked[-1] == "question 0"
    assert len(model.asked) == MOST_REMEMBERED + 2
