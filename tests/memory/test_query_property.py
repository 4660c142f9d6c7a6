"""Whatever two users do and in which order, queries find just what is there and may be found."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kimberly.memory.v1 import memory_pb2 as pb

from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from server.memory.answers import Answers
from tests.conftest import FakeClock, bearer, new_caller
from tests.memory.calls import Stub, archive, change, create, restore
from tests.memory.meanings import ask, decide, of, upload
from tests.refusals import refusal_of

EXAMPLES = int(os.environ.get("QUERY_EXAMPLES", "80"))
"""How many stories are told; a night is well spent on ten thousand."""
STEPS = 40
WORDS = ("apple", "boat", "cello", "desert")
QUESTIONS = (["apple"], ["boat", "cello"])
VECTORS = ((1.0, 0.0), (-0.6, 0.8))
T = TypeVar("T")


@dataclass
class Kept:
    """A memory as it should be."""

    memory: pb.Memory
    is_archived: bool = False
    has_vector: bool = False

    @property
    def is_short(self) -> bool:
        return self.memory.tier == pb.TIER_SHORT_TERM


@dataclass
class Person:
    """What a user has and agrees to."""

    caller: Caller
    consents: dict[str, bool]
    kept: dict[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """What the story happens to."""

    memories: Stub
    answers: Answers
    database: Database
    redis: Redis
    clock: FakeClock
    loop: asyncio.AbstractEventLoop

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Do something on the loop of the stores; the story is told on another thread."""
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(30)


people = st.integers(0, 1)
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=2, unique=True)
tiers = st.sampled_from([pb.TIER_LONG_TERM, pb.TIER_PERMANENT, pb.TIER_SHORT_TERM])
questions = st.sampled_from(QUESTIONS)
which = st.integers(0, 1_000)


class Story(RuleBasedStateMachine):
    """Two users who write, decide and ask."""

    world: World

    @initialize()
    def begin(self) -> None:
        self.world.clock.now = datetime.now(UTC)
        self.people = [self.world.run(self._person()) for _ in range(2)]
        self.written = 0
        for person in range(2):
            self.create(person, ["apple", "boat"], pb.TIER_LONG_TERM)
            self.create(person, ["apple"], pb.TIER_SHORT_TERM)
            self.create(person, ["cello"], pb.TIER_PERMANENT)
            self.embed(person, 2, VECTORS[0])
            self.ask(person, QUESTIONS[0], by_meaning=False)
            self.ask(person, QUESTIONS[1], by_meaning=True)

    async def _person(self) -> Person:
        caller = await new_caller(self.world.database)
        await decide(self.world.database, caller, "memory.embed", granted=True)
        return Person(caller, {"memory.store": True, "memory.embed": True})

    @rule(person=people, words=words, tier=tiers)
    def create(self, person: int, words: list[str], tier: pb.Tier.ValueType) -> None:
        whose = self.people[person]
        self.written += 1
        call = create(
            self.world.memories, whose.caller, " ".join([*words, f"n{self.written}"]), tier=tier
        )
        if not whose.consents["memory.store"]:
            self._is_refused(call)
            return
        memory = self.world.run(call)
        whose.kept[memory.id] = Kept(memory)

    @rule(person=people, words=words, place=which)
    def change(self, person: int, words: list[str], place: int) -> None:
        kept = self._one(person, place)
        if kept is None or kept.is_archived or not self.people[person].consents["memory.store"]:
            return
        self.written += 1
        text = " ".join([*words, f"n{self.written}"])
        call = change(self.world.memories, self.people[person].caller, kept.memory, content=text)
        kept.memory = self.world.run(call)
        kept.has_vector = False

    @rule(person=people, place=which)
    def archive_or_restore(self, person: int, place: int) -> None:
        kept = self._one(person, place)
        if kept is None or kept.is_short:
            return
        if kept.is_archived and not self.people[person].consents["memory.store"]:
            return
        move = restore if kept.is_archived else archive
        self.world.run(move(self.world.memories, self.people[person].caller, kept.memory))
        kept.is_archived = not kept.is_archived

    @rule(person=people, place=which)
    def delete(self, person: int, place: int) -> None:
        kept = self._one(person, place)
        if kept:
            whose = self.people[person]
            request = pb.DeleteMemoryRequest(id=kept.memory.id)
            self.world.run(self._call("DeleteMemory", whose, request))
            del whose.kept[kept.memory.id]

    @rule(person=people, place=which, rating=st.integers(1, 5))
    def rate(self, person: int, place: int, rating: int) -> None:
        kept = self._one(person, place)
        if kept and self.people[person].consents["memory.store"]:
            request = pb.GiveFeedbackRequest(id=kept.memory.id, rating=rating, useful=True)
            self.world.run(self._call("GiveFeedback", self.people[person], request))

    @rule(person=people, place=which, vector=st.sampled_from(VECTORS))
    def embed(self, person: int, place: int, vector: tuple[float, ...]) -> None:
        kept, whose = self._one(person, place), self.people[person]
        if kept is None or kept.is_short:
            return
        call = upload(self.world.memories, whose.caller, of(kept.memory, vector))
        if not all(whose.consents.values()):
            self._is_refused(call)
            return
        assert self.world.run(call).stored == 1
        kept.has_vector = True

    @rule(person=people, purpose=st.sampled_from(["memory.store", "memory.embed"]))
    def change_mind(self, person: int, purpose: str) -> None:
        whose = self.people[person]
        granted = whose.consents[purpose] = not whose.consents[purpose]
        self.world.run(decide(self.world.database, whose.caller, purpose, granted=granted))

    @rule(seconds=st.sampled_from([1, 45, 61]))
    def wait(self, seconds: float) -> None:
        self.world.clock.advance(seconds=seconds)

    @precondition(lambda self: self._fleeting())
    @rule()
    def outlive_the_short_term(self) -> None:
        """Ask shortly before and after: what was answered before must not outlive it."""
        last = max(self._fleeting())
        for seconds_left in (5, 0):
            self.world.clock.now = last - timedelta(seconds=seconds_left)
            for person in range(2):
                self.ask(person, QUESTIONS[0], by_meaning=False)

    @rule(person=people, words=questions, by_meaning=st.booleans())
    def ask(self, person: int, words: list[str], by_meaning: bool) -> None:
        """Ask what was asked before: the answer may be one that is kept, and is kept from now."""
        whose, vector = self.people[person], VECTORS[0] if by_meaning else ()
        needed = ["memory.store", "memory.embed"] if by_meaning else ["memory.store"]
        if not all(whose.consents[purpose] for purpose in needed):
            self._is_refused(self._ask(whose, words, vector))
            return
        answer = self.world.run(self._ask(whose, words, vector))
        found = {match.memory.id: match.memory.content for match in answer.matches}
        assert found == self._expected(whose, words, by_meaning=by_meaning)
        self.world.run(self.world.answers.flush())

    @rule(person=people, words=questions, by_meaning=st.booleans())
    def compare(self, person: int, words: list[str], by_meaning: bool) -> None:
        """Compare the answer that is kept with one that is found anew."""
        whose, vector = self.people[person], VECTORS[0] if by_meaning else ()
        if all(whose.consents.values()):
            self.ask(person, words, by_meaning)
            kept = self.world.run(self._ask(whose, words, vector))
            self.world.run(self._forget(whose))
            assert apart_from_drift(kept) == apart_from_drift(
                self.world.run(self._ask(whose, words, vector))
            )

    def _expected(self, whose: Person, words: list[str], *, by_meaning: bool) -> dict[str, str]:
        return {
            kept.memory.id: kept.memory.content
            for kept in whose.kept.values()
            if not kept.is_archived
            and self._lasts(kept)
            and (set(words) & set(kept.memory.content.split()) or (by_meaning and kept.has_vector))
        }

    def _lasts(self, kept: Kept) -> bool:
        return not kept.is_short or kept.memory.expire_time.ToDatetime(UTC) > self.world.clock.now

    def _one(self, person: int, place: int) -> Kept | None:
        there = [kept for kept in self.people[person].kept.values() if self._lasts(kept)]
        return there[place % len(there)] if there else None

    def _fleeting(self) -> list[datetime]:
        """Return when short-term memories expire that live for more than a few seconds."""
        ends = [
            kept.memory.expire_time.ToDatetime(UTC)
            for person in self.people
            for kept in person.kept.values()
            if kept.is_short
        ]
        return [end for end in ends if end > self.world.clock.now + timedelta(seconds=5)]

    def _is_refused(self, call: Coroutine[Any, Any, object]) -> None:
        assert self.world.run(refusal_of(call)).reason == "CONSENT_MISSING"

    async def _ask(
        self, whose: Person, words: list[str], vector: tuple[float, ...]
    ) -> pb.QueryMemoriesResponse:
        return await ask(self.world.memories, whose.caller, " ".join(words), vector, top_k=100)

    async def _call(self, method: str, whose: Person, request: Any) -> None:
        await getattr(self.world.memories, method)(request, metadata=bearer(whose.caller))

    async def _forget(self, whose: Person) -> None:
        """Have the next question answered anew."""
        caller = whose.caller
        await self.world.redis.delete(
            f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:answers"
        )


def apart_from_drift(answer: pb.QueryMemoriesResponse) -> list[tuple[object, ...]]:
    """Return an answer without what becomes a little less with every second: its freshness."""
    return [
        (match.memory.SerializeToString(), match.lexical, match.semantic, match.reason)
        for match in answer.matches
    ]


async def test_queries_find_what_is_there_whether_answers_are_kept_or_not(
    memories: Stub, answers: Answers, database: Database, redis: Redis, clock: FakeClock
) -> None:
    loop = asyncio.get_running_loop()
    world = World(memories, answers, database, redis, clock, loop)
    story = type("StoryOfThisTest", (Story,), {"world": world})
    how = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize="QUERY_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    await asyncio.to_thread(run_state_machine_as_test, story, settings=how)
