"""A turn is found by the words around it, whatever happens to the turns around it."""

from __future__ import annotations

import random

import asyncpg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.memory import ranking
from server.memory.conversation import REACH
from server.preferences import Language
from tests.conftest import bearer
from tests.deciding import write_settings
from tests.memory.streams import in_chunks

WORDS = ["boat", "harbour", "cello", "recital", "garden", "hazelnut", "letter", "winter", "rope"]


def turn(position: int, text: str, session: str = "talk") -> pb.Memory:
    return pb.Memory(content=text, session_id=session, session_position=position)


async def test_answer_without_a_word_of_the_question_is_found_next_to_it(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    talk = [
        turn(0, "Have you chosen a name for the wooden boat?"),
        turn(1, "Marmalade, because of the colour."),
        turn(2, "How lovely."),
        turn(9, "See you on Monday."),
        turn(1, "Nothing of the kind.", session="elsewhere"),
    ]
    await memories.ImportMemories(in_chunks(talk, 2), metadata=bearer(caller))
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="What is the name of the boat?"), metadata=bearer(caller)
    )
    found = [match.memory.content for match in answer.matches]
    assert found[:2] == [talk[0].content, talk[1].content]
    assert set(found) == {talk[0].content, talk[1].content, talk[2].content}
    assert answer.matches[1].reason == "was said next to turns that share words with the query"


async def test_turn_of_someone_whom_the_question_names_comes_first(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for speaker in ("Ann", "Ben", "Cem"):
        memory = pb.Memory(content=f"I like sailing {speaker[0] * 3}", speaker=speaker)
        await memories.CreateMemory(pb.CreateMemoryRequest(memory=memory), metadata=bearer(caller))
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="Does Ben's boat go sailing?"), metadata=bearer(caller)
    )
    assert answer.matches[0].memory.speaker == "Ben"


async def test_weights_that_the_user_chose_decide_the_order(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await write_settings(owner, caller, speaker=0)
    for speaker, text in (("Ann", "Sailing, sailing!"), ("Ben", "I like sailing on warm days")):
        await memories.CreateMemory(
            pb.CreateMemoryRequest(memory=pb.Memory(content=text, speaker=speaker)),
            metadata=bearer(caller),
        )
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="Does Ben go sailing?"), metadata=bearer(caller)
    )
    assert [match.memory.speaker for match in answer.matches] == ["Ann", "Ben"]
    assert answer.matches[0].score == pytest.approx(1 + 0.1 + 0.05 * 0.5 + 0.05, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
async def test_terms_are_those_of_the_turns_that_stand_there_now(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection, seed: int
) -> None:
    dice = random.Random(seed)
    metadata = bearer(caller)
    stored: list[str] = []
    for number in range(60):
        text = " ".join([*dice.sample(WORDS, 3), f"number{number}"])
        match dice.choice(["create", "create", "import", "update", "delete"]):
            case "create":
                draft = turn(dice.randrange(12), text)
                answer = await memories.CreateMemory(
                    pb.CreateMemoryRequest(memory=draft), metadata=metadata
                )
                stored.append(answer.memory.id)
            case "import":
                start = dice.randrange(10)
                batch = [turn(start + n, f"{text} {n}") for n in range(dice.randrange(1, 6))]
                dice.shuffle(batch)
                await memories.ImportMemories(in_chunks(batch, 3), metadata=metadata)
            case "update" if stored:
                changed = pb.Memory(id=dice.choice(stored), content=text)
                await memories.UpdateMemory(
                    pb.UpdateMemoryRequest(
                        memory=changed, update_mask=FieldMask(paths=["content"])
                    ),
                    metadata=metadata,
                )
            case "delete" if stored:
                doomed = stored.pop(dice.randrange(len(stored)))
                await memories.DeleteMemory(pb.DeleteMemoryRequest(id=doomed), metadata=metadata)
    await assert_terms_are_right(owner)


async def assert_terms_are_right(
    owner: asyncpg.Connection, language: Language = Language.ENGLISH, *, at_least: int = 11
) -> None:
    rows = await owner.fetch("SELECT content, session_position, terms::text FROM memories")
    assert len(rows) >= at_least
    for row in rows:
        sides = [
            (abs(other["session_position"] - row["session_position"]), other["content"])
            for other in rows
            if 0 < abs(other["session_position"] - row["session_position"]) <= REACH
        ]
        expected = ranking.weights(row["content"], sides, language)
        body = row["terms"][1 : row["terms"].index("}")]
        pairs = (pair.split(":") for pair in body.split(","))
        found = {int(index) - 1: float(weight) for index, weight in pairs}
        assert found == pytest.approx(expected, abs=1e-5)
