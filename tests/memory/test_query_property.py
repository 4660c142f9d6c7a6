"""Whatever users do, at once and in whichever order, queries find just what may be found."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import asyncpg
import grpc
import pytest_asyncio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from server.memory.answers import Answers
from server.memory.meditation_store import MeditationStore
from server.memory.metrics import CACHE
from server.memory.scoring_store import ScoringStore
from server.memory.tidying import Tidying
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import write_decision
from tests.memory.calls import Stub, archive, change, create, restore
from tests.memory.meanings import ask, of, upload
from tests.memory.model_of_queries import Kept, Person, Question, is_explained, subsets
from tests.memory.test_tidying import quota, tidied
from tests.refusals import read

EXAMPLES = int(os.environ.get("QUERY_EXAMPLES", "20"))
"""How many stories are told; a night is well spent on ten thousand."""
STEPS = 30
WORDS = ("apple", "boat", "cello", "desert")
QUESTIONS = (("apple",), ("boat", "cello"))
VECTORS = ((1.0, 0.0), (-0.6, 0.8))
AGAIN = 4
"""So many times a question is asked while others write: before, meanwhile and after."""
PURPOSES = ("memory.store", "memory.embed", "memory.sensitive")
T = TypeVar("T")


@pytest_asyncio.fixture
async def answers(redis: Redis) -> AsyncIterator[Answers]:
    """Kept as they are in production: for questions that come again, as soon as Redis takes it."""
    answers = Answers(redis)
    running = asyncio.create_task(answers.run())
    yield answers
    running.cancel()
    await asyncio.wait([running])


@dataclass(frozen=True)
class World:
    """What the story happens to."""

    memories: Stub
    answers: Answers
    database: Database
    redis: Redis
    owner: asyncpg.Connection
    meditations: MeditationStore
    scoring: ScoringStore
    tidying: Tidying
    clock: FakeClock
    loop: asyncio.AbstractEventLoop

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Do something on the loop of the stores; the story is told on another thread."""
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(30)


@dataclass(frozen=True)
class Act:
    """Something that a user does, as a story tells it; what it is about turns out then."""

    what: str
    who: int
    place: int
    """Of the memory that it is about, among those that the user has."""
    words: list[str]
    tier: pb.Tier.ValueType
    position: int | None
    scope: pb.Scope.ValueType
    is_sensitive: bool
    vector: tuple[float, ...]
    purpose: str


Call = Callable[[], Awaitable[Any]]
Then = Callable[[Person, Any], Person]


@dataclass(frozen=True)
class Deed:
    """Something that a user does, and what is so when it is done."""

    who: int
    about: str
    """Nothing else is done about it at once."""
    call: Call
    then: Then
    needs: tuple[str, ...] = ()
    """The purposes that the user must agree to."""

    def is_possible(self, person: Person) -> bool:
        return person.agrees(self.needs)


people = st.integers(0, 2)
asked = st.builds(Question, people, st.sampled_from(QUESTIONS), st.booleans(), st.booleans())
DEEDS = ("create", "create", "reword", "put_away", "delete", "mark", "show", "promote", "rate")
acts = st.builds(
    Act,
    st.sampled_from((*DEEDS, "embed", "decide", "choose")),
    people,
    st.integers(0, 1_000),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=2, unique=True),
    st.sampled_from([pb.TIER_LONG_TERM, pb.TIER_PERMANENT, pb.TIER_SHORT_TERM]),
    st.none() | st.integers(0, 7),
    st.sampled_from([pb.SCOPE_PRIVATE, pb.SCOPE_SHARED, pb.SCOPE_PUBLIC]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from(VECTORS),
    st.sampled_from(PURPOSES),
)


class Story(RuleBasedStateMachine):
    """Two colleagues and a stranger who write, show, decide and ask."""

    world: World

    @initialize()
    def begin(self) -> None:
        self.world.clock.now = datetime.now(UTC)
        self.people = self.world.run(self._people())
        self.written = 0
        self.runs: dict[int, Any] = {}
        for who in range(3):
            for tier, words in (
                (pb.TIER_LONG_TERM, ["apple", "boat"]),
                (pb.TIER_SHORT_TERM, ["apple"]),
                (pb.TIER_PERMANENT, ["cello"]),
            ):
                self._do([self._create(_plain(who, words, tier))], [])
            self._do([self._embed(_plain(who, [], pb.TIER_PERMANENT))], [])
            self._ask_all(who)

    async def _people(self) -> list[Person]:
        first, stranger = [await new_caller(self.world.database) for _ in range(2)]
        callers = [first, Caller(first.tenant_id, ids.new_id()), stranger]
        await write_decision(self.world.database, callers[1], "memory.store", granted=True)
        for caller in callers:
            for purpose in PURPOSES[1:]:
                await write_decision(self.world.database, caller, purpose, granted=True)
        return [Person(caller, dict.fromkeys(PURPOSES, True)) for caller in callers]

    # --- what happens

    @rule(act=acts)
    def act(self, act: Act) -> None:
        self._do([self._deed(act)], [])

    @rule(question=asked)
    def ask(self, question: Question) -> None:
        """Ask what was asked before: the answer may be one that is kept, and is kept from now."""
        self._do([], [question])

    @rule(
        told=st.lists(acts, min_size=1, max_size=3),
        questions=st.lists(asked, min_size=1, max_size=3),
    )
    def act_and_ask_at_once(self, told: list[Act], questions: list[Question]) -> None:
        self._do([self._deed(act) for act in told], questions)
        # What was found while others wrote may have been kept, and must not be told any more.
        for question in questions:
            self._do([], [question])

    @rule(seconds=st.sampled_from([1, 45, 61]))
    def wait(self, seconds: float) -> None:
        self.world.clock.advance(seconds=seconds)

    @rule()
    def outlive_the_short_term(self) -> None:
        """Ask shortly before and after: what was answered before must not outlive it."""
        fleeting = self._fleeting()
        for seconds_left in (5, 0) if fleeting else ():
            self.world.clock.now = max(fleeting) - timedelta(seconds=seconds_left)
            for who in range(3):
                self._ask_all(who)

    @rule(who=people, question=asked)
    def tidy_up_and_ask_at_once(self, who: int, question: Question) -> None:
        """Have a meditation archive all that may be: nobody has room for anything."""
        if self.people[who].agrees(["memory.store"]):
            self.runs[who] = self.world.run(self._begin_run(who))
            self._ask_all(who)
            self._move_many(who, partial(self._tidy, who), [question])

    @rule(who=people, question=asked)
    def undo_and_ask_at_once(self, who: int, question: Question) -> None:
        if who in self.runs and self.people[who].agrees(PURPOSES):
            self._ask_all(who)
            self._move_many(who, partial(self._undo, who), [question])

    @rule(question=asked)
    def compare(self, question: Question) -> None:
        """Compare the answer that is kept with one that is found anew."""
        whose = self.people[question.who]
        if whose.agrees(question.purposes):
            self.ask(question)
            kept = self.world.run(self._ask(question))
            self.world.run(self._forget(whose.caller))
            assert apart_from_drift(kept) == apart_from_drift(self.world.run(self._ask(question)))

    # --- how it happens

    def _do(self, deeds: Sequence[Deed | None], questions: Sequence[Question]) -> None:
        """Do all at once, and see whether each outcome is one that may be."""
        distinct = {deed.about: deed for deed in deeds if deed}
        started = list(distinct.values())
        calls: list[Call] = [
            *(deed.call for deed in started),
            *(partial(self._asked, question, AGAIN if started else 1) for question in questions),
        ]
        outcomes = self.world.run(_settled(calls))
        done = [
            (deed, outcome)
            for deed, outcome in zip(started, outcomes, strict=False)
            if outcome != "CONSENT_MISSING"
        ]
        possible = [_after(self.people, some) for some in subsets(done)]
        for deed, outcome in zip(started, outcomes, strict=False):
            is_done = outcome != "CONSENT_MISSING"
            assert is_done in {deed.is_possible(state[deed.who]) for state in possible}, deed.about
        self._judge(questions, outcomes[len(started) :], possible, distinct)
        self.people = _after(self.people, done)
        self.world.run(self.world.answers.flush())

    def _move_many(self, who: int, work: Call, questions: Sequence[Question]) -> None:
        """Do what archives or restores many of a user's memories, and ask at once."""
        calls: list[Call] = [work, *(partial(self._asked, one, AGAIN) for one in questions)]
        outcomes = self.world.run(_settled(calls))
        assert not isinstance(outcomes[0], str), outcomes[0]
        before, after = self.people, list(self.people)
        after[who] = self.world.run(self._looked_up(before[who]))
        self._judge(questions, outcomes[1:], [before, after], before[who].kept)
        self.people = after
        self.world.run(self.world.answers.flush())
        self._ask_all(who)

    def _judge(
        self,
        questions: Sequence[Question],
        outcomes: Sequence[Any],
        possible: Sequence[Sequence[Person]],
        touched: Collection[str],
    ) -> None:
        for question, answers in zip(questions, outcomes, strict=True):
            expected = [question.answer(state, self.world.clock.now) for state in possible]
            for answer in answers:
                found = None
                if answer != "CONSENT_MISSING":
                    found = {match.memory.id: match.memory.content for match in answer.matches}
                assert is_explained(found, expected, touched), (question, found, expected)

    def _ask_all(self, who: int) -> None:
        """Ask everything twice: only what comes again is kept."""
        for words, by_meaning in zip(QUESTIONS, (True, False), strict=True):
            for with_shared in (True, False, False):
                self._do([], [Question(who, words, by_meaning, with_shared)])

    # --- deeds

    def _deed(self, act: Act) -> Deed | None:
        deed: Deed | None = getattr(self, f"_{act.what}")(act)
        return deed

    def _create(self, act: Act) -> Deed:
        self.written += 1
        is_short = act.tier == pb.TIER_SHORT_TERM
        fields: dict[str, Any] = {"tier": act.tier, "sensitive": act.is_sensitive and not is_short}
        if act.position is not None and not is_short:
            fields |= {"session_id": "talk", "session_position": act.position}
        if not is_short and not act.is_sensitive:
            fields["scope"] = act.scope
        text = " ".join([*act.words, f"n{self.written}"])
        needs = ("memory.store", "memory.sensitive") if fields["sensitive"] else ("memory.store",)
        return self._deed_of(
            act,
            text,
            lambda stub, caller: create(stub, caller, text, **fields),
            lambda person, made: person.having(Kept(made)),
            needs,
        )

    def _reword(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: not kept.is_archived)
        self.written += 1
        text = " ".join([*act.words, f"n{self.written}"])
        return None if kept is None else self._changing(act, kept, content=text)

    def _mark(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: kept.is_found and not (kept.is_short or kept.is_shown))
        return None if kept is None else self._changing(act, kept, sensitive=True)

    def _show(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: kept.is_found and not kept.is_short)
        return None if kept is None else self._changing(act, kept, scope=act.scope)

    def _promote(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: kept.is_short)
        return None if kept is None else self._changing(act, kept, tier=pb.TIER_LONG_TERM)

    def _changing(self, act: Act, kept: Kept, **fields: Any) -> Deed:
        keeps_vector = not {"content", "sensitive"} & fields.keys() and kept.has_vector
        is_sensitive = kept.memory.sensitive or "sensitive" in fields
        return self._deed_of(
            act,
            kept.id,
            lambda stub, caller: change(stub, caller, kept.memory, **fields),
            lambda person, now: person.having(Kept(now, has_vector=keeps_vector)),
            ("memory.store", "memory.sensitive") if is_sensitive else ("memory.store",),
        )

    def _put_away(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: not kept.is_short)
        if kept is None:
            return None
        move = restore if kept.is_archived else archive
        needs = ["memory.store"] if kept.is_archived else []
        if kept.is_archived and kept.memory.sensitive:
            needs.append("memory.sensitive")
        moved = replace(kept, is_archived=not kept.is_archived)
        return self._deed_of(
            act,
            kept.id,
            lambda stub, caller: move(stub, caller, kept.memory),
            lambda person, now: person.having(replace(moved, memory=now)),
            tuple(needs),
        )

    def _delete(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: True)
        if kept is None:
            return None
        request = pb.DeleteMemoryRequest(id=kept.id)
        return self._deed_of(
            act,
            kept.id,
            lambda stub, caller: stub.DeleteMemory(request, metadata=bearer(caller)),
            lambda person, _: person.without(request.id),
        )

    def _rate(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: True)
        if kept is None:
            return None
        request = pb.GiveFeedbackRequest(id=kept.id, rating=1, useful=True)
        return self._deed_of(
            act,
            kept.id,
            lambda stub, caller: stub.GiveFeedback(request, metadata=bearer(caller)),
            lambda person, _: person,
            ("memory.store",),
        )

    def _embed(self, act: Act) -> Deed | None:
        kept = self._one(act, lambda kept: not (kept.is_short or kept.memory.sensitive))
        if kept is None:
            return None
        vector, embedded = of(kept.memory, act.vector), replace(kept, has_vector=True)
        return self._deed_of(
            act,
            kept.id,
            lambda stub, caller: upload(stub, caller, vector),
            lambda person, _: person.having(embedded),
            ("memory.store", "memory.embed"),
        )

    def _decide(self, act: Act) -> Deed:
        granted = not self.people[act.who].consents[act.purpose]
        return self._deed_of(
            act,
            f"{act.who} {act.purpose}",
            lambda _, caller: write_decision(
                self.world.database, caller, act.purpose, granted=granted
            ),
            lambda person, _: person.deciding(act.purpose, granted=granted),
        )

    def _choose(self, act: Act) -> Deed:
        """Choose how answers are ranked."""
        return self._deed_of(
            act,
            f"{act.who} settings",
            lambda _, caller: choose(self.world.database, caller, act.place / 1_000),
            lambda person, _: person,
        )

    def _deed_of(
        self,
        act: Act,
        about: str,
        call: Callable[[Stub, Caller], Awaitable[Any]],
        then: Then,
        needs: tuple[str, ...] = (),
    ) -> Deed:
        caller = self.people[act.who].caller
        return Deed(act.who, about, lambda: call(self.world.memories, caller), then, needs)

    def _one(self, act: Act, fits: Callable[[Kept], bool]) -> Kept | None:
        now = self.world.clock.now
        kept = self.people[act.who].kept.values()
        there = [one for one in kept if one.lasts(now) and fits(one)]
        return there[act.place % len(there)] if there else None

    def _fleeting(self) -> list[datetime]:
        """Return when short-term memories expire that live for more than a few seconds."""
        ends = [
            kept.memory.expire_time.ToDatetime(UTC)
            for person in self.people
            for kept in person.kept.values()
            if kept.is_short
        ]
        return [end for end in ends if end > self.world.clock.now + timedelta(seconds=5)]

    # --- meditations

    async def _begin_run(self, who: int) -> Any:
        """Give every memory a score, as a run does; what was answered before does not know it."""
        caller = self.people[who].caller
        await self.world.owner.execute(
            "UPDATE memory_scores SET score = 0.5 WHERE user_id = $1 AND score IS NULL",
            caller.user_id,
        )
        await self._forget(caller)
        return await self.world.meditations.start(caller, "")

    async def _tidy(self, who: int) -> None:
        caller = self.people[who].caller
        await quota(self.world.owner, caller, 0)
        await tidied(self.world.tidying, self.world.scoring, self.runs[who])
        await self.world.owner.execute(
            "UPDATE settings SET long_term_bytes = NULL, permanent_bytes = NULL WHERE user_id = $1",
            caller.user_id,
        )

    async def _undo(self, who: int) -> None:
        request = pb.UndoMeditationRequest(id=ids.show(ids.MEDITATION, self.runs.pop(who).id))
        caller = self.people[who].caller
        await self.world.memories.UndoMeditation(request, metadata=bearer(caller))

    async def _looked_up(self, person: Person) -> Person:
        """Return a person with what is there, and what of it is archived, as lists tell it."""
        then = person
        there: dict[str, Kept] = {}
        for state in (pb.MEMORY_STATE_ACTIVE, pb.MEMORY_STATE_ARCHIVED):
            page = await self.world.memories.ListMemories(
                pb.ListMemoriesRequest(page_size=1000, state=state), metadata=bearer(person.caller)
            )
            for memory in page.memories:
                was = person.kept[memory.id]
                is_archived = state == pb.MEMORY_STATE_ARCHIVED
                there[memory.id] = replace(was, memory=memory, is_archived=is_archived)
        for memory_id, kept in person.kept.items():
            if memory_id not in there and not kept.is_short:
                then = then.without(memory_id)
        return then.having(*there.values())

    # --- queries

    async def _ask(self, question: Question) -> pb.QueryMemoriesResponse:
        return await ask(
            self.world.memories,
            self.people[question.who].caller,
            " ".join(question.words),
            VECTORS[0] if question.by_meaning else (),
            top_k=100,
            include_shared=question.with_shared,
        )

    async def _asked(self, question: Question, times: int) -> list[Any]:
        """Ask one time after the other, and return what each came to."""
        return [await _reason_or_result(partial(self._ask, question)) for _ in range(times)]

    async def _forget(self, caller: Caller) -> None:
        """Have the next question answered anew."""
        await self.world.redis.delete(
            f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:answers"
        )


def _plain(who: int, words: list[str], tier: pb.Tier.ValueType) -> Act:
    scope, vector = pb.SCOPE_PRIVATE, VECTORS[0]
    return Act("", who, 2, words, tier, None, scope, False, vector, "")


def _after(people: Sequence[Person], done: Sequence[tuple[Deed, Any]]) -> list[Person]:
    then = list(people)
    for deed, outcome in done:
        then[deed.who] = deed.then(then[deed.who], outcome)
    return then


async def _settled(calls: Sequence[Call]) -> list[Any]:
    """Do all at once, and return what each came to: its result or the reason of its refusal."""
    return list(await asyncio.gather(*map(_reason_or_result, calls)))


async def _reason_or_result(call: Call) -> Any:
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        refusal = read(error)
        if refusal.reason != "CONSENT_MISSING":
            raise
        return refusal.reason


async def choose(database: Database, caller: Caller, semantic: float) -> None:
    """Choose what the meaning counts in the ranking."""
    async with database.transaction(caller) as connection:
        await connection.execute(
            """
            INSERT INTO settings (tenant_id, user_id, language, scoring_preset, relevance_to_goals,
                                  emotional_weight, predictive_value, recency_frequency, semantic,
                                  version)
            VALUES ($1, $2, 'english', 'balanced', 0.4, 0.3, 0.2, 0.1, $3, 1)
                ON CONFLICT (user_id, tenant_id) DO UPDATE
               SET semantic = $3, version = settings.version + 1
            """,
            caller.tenant_id,
            caller.user_id,
            semantic,
        )


def apart_from_drift(answer: pb.QueryMemoriesResponse) -> list[tuple[object, ...]]:
    """Return an answer without what becomes a little less with every second: its freshness."""
    return [
        (match.memory.SerializeToString(), match.lexical, match.semantic, match.reason)
        for match in answer.matches
    ]


async def test_queries_find_what_is_there_whether_answers_are_kept_or_not(
    memories: Stub,
    answers: Answers,
    database: Database,
    redis: Redis,
    owner: asyncpg.Connection,
    meditations: MeditationStore,
    scoring_store: ScoringStore,
    tidying: Tidying,
    clock: FakeClock,
) -> None:
    loop = asyncio.get_running_loop()
    world = World(
        memories,
        answers,
        database,
        redis,
        owner,
        meditations,
        scoring_store,
        tidying,
        clock,
        loop,
    )
    story = type("StoryOfThisTest", (Story,), {"world": world})
    how = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        database=None,
        derandomize="QUERY_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        # What was done at once does not come again as it was: a story is told once, and as long.
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    hits = CACHE.labels("hit")._value.get()
    await asyncio.to_thread(run_state_machine_as_test, story, settings=how)
    assert CACHE.labels("hit")._value.get() - hits > EXAMPLES
