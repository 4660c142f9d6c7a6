"""Whatever happens in whatever order: what is gone, foreign or without consent is never found."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.deciding import write_decision
from tests.memory.meanings import ask, of, upload
from tests.refusals import refusal_of

WORDS = ["boat", "harbour", "cello", "garden", "letter"]
TIERS = [pb.TIER_LONG_TERM, pb.TIER_PERMANENT, pb.TIER_SHORT_TERM]
STEPS = 80


@dataclass(slots=True)
class Person:
    """What a user should find."""

    caller: Caller
    texts: dict[str, str] = field(default_factory=dict)
    durable: set[str] = field(default_factory=set)
    vectors: dict[str, list[float]] = field(default_factory=dict)
    consents: dict[str, bool] = field(
        default_factory=lambda: {"memory.store": True, "memory.embed": True}
    )


class Story:
    """A random course of events, and what must be true of every query in it."""

    def __init__(self, memories: rpc.MemoryServiceAsyncStub, database: Database, seed: int) -> None:
        self._memories = memories
        self._database = database
        self._dice = random.Random(seed)
        self._written = 0

    async def happen(self, person: Person) -> None:
        """Let one thing happen to a user."""
        events = [self._create, self._create, self._change, self._delete, self._embed, self._decide]
        await self._dice.choice(events)(person)

    async def look(self, person: Person) -> None:
        """Ask by words, with and without a vector, and check what comes back."""
        words = " ".join(self._dice.sample(WORDS, 2))
        if not person.consents["memory.store"]:
            refusal = await refusal_of(ask(self._memories, person.caller, words))
            assert refusal.reason == "CONSENT_MISSING"
            return
        self._check(person, await ask(self._memories, person.caller, words, top_k=100))
        call = ask(self._memories, person.caller, words, self._direction(), top_k=100)
        if not person.consents["memory.embed"]:
            assert (await refusal_of(call)).reason == "CONSENT_MISSING"
            return
        answer = await call
        self._check(person, answer)
        assert set(person.vectors) <= {match.memory.id for match in answer.matches}

    def _check(self, person: Person, answer: pb.QueryMemoriesResponse) -> None:
        for match in answer.matches:
            assert person.texts.get(match.memory.id) == match.memory.content

    async def _create(self, person: Person) -> None:
        tier = self._dice.choice(TIERS)
        memory = pb.Memory(content=self._text(), tier=tier)
        if self._dice.random() < 0.5:
            memory.session_id, memory.session_position = "talk", self._dice.randrange(8)
        call = self._memories.CreateMemory(
            pb.CreateMemoryRequest(memory=memory), metadata=bearer(person.caller)
        )
        if not person.consents["memory.store"]:
            await refusal_of(call)
            return
        memory = (await call).memory
        person.texts[memory.id] = memory.content
        if tier != pb.TIER_SHORT_TERM:
            person.durable.add(memory.id)

    async def _change(self, person: Person) -> None:
        if not person.texts or not person.consents["memory.store"]:
            return
        memory = pb.Memory(id=self._dice.choice(sorted(person.texts)), content=self._text())
        await self._memories.UpdateMemory(
            pb.UpdateMemoryRequest(memory=memory, update_mask=FieldMask(paths=["content"])),
            metadata=bearer(person.caller),
        )
        person.texts[memory.id] = memory.content
        person.vectors.pop(memory.id, None)

    async def _delete(self, person: Person) -> None:
        if not person.texts:
            return
        doomed = self._dice.choice(sorted(person.texts))
        await self._memories.DeleteMemory(
            pb.DeleteMemoryRequest(id=doomed), metadata=bearer(person.caller)
        )
        del person.texts[doomed]
        person.durable.discard(doomed)
        person.vectors.pop(doomed, None)

    async def _embed(self, person: Person) -> None:
        if not person.durable:
            return
        memory = pb.Memory(id=self._dice.choice(sorted(person.durable)))
        call = upload(self._memories, person.caller, of(memory, values := self._direction()))
        if not all(person.consents.values()):
            await refusal_of(call)
            return
        assert (await call).stored == 1
        person.vectors[memory.id] = values

    async def _decide(self, person: Person) -> None:
        purpose = self._dice.choice(sorted(person.consents))
        # More often yes than no: a user without consent has nothing to find.
        person.consents[purpose] = granted = self._dice.random() < 0.7
        await write_decision(self._database, person.caller, purpose, granted=granted)

    def _text(self) -> str:
        self._written += 1
        return " ".join([*self._dice.sample(WORDS, 2), f"number{self._written}"])

    def _direction(self) -> list[float]:
        return [self._dice.gauss(0, 1) for _ in range(64)]


class Found:
    """The same with all vectors scanned, and with nearly all of them in the graph."""

    @pytest.mark.parametrize("seed", range(3))
    async def test_only_what_the_user_has_and_agrees_to_is_ever_found(
        self, memories: rpc.MemoryServiceAsyncStub, database: Database, seed: int
    ) -> None:
        story = Story(memories, database, seed)
        people = [Person(await new_caller(database)) for _ in range(2)]
        for person in people:
            await write_decision(database, person.caller, "memory.embed", granted=True)
        for _ in range(STEPS):
            for person in people:
                await story.happen(person)
                await story.look(person)


class TestScan(Found):
    @pytest.fixture
    def scanned(self) -> int:
        return 5_000


class TestGraph(Found):
    @pytest.fixture
    def scanned(self) -> int:
        return 1
