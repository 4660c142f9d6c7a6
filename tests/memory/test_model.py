"""Whatever users do, at once and one after the other, the service is what a plain model is."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast
from uuid import UUID

import asyncpg
import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.retention_store import RetentionStore
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import write_decision, write_settings
from tests.memory.acts import Act, acts, changing, creating, drafts, people
from tests.memory.calls import Stub
from tests.memory.model_of_memories import (
    FREE,
    Answer,
    Person,
    Seen,
    Told,
    explain,
    ids_in,
    method_of,
    unexplained,
)
from tests.refusals import read

STEPS = int(os.environ.get("MODEL_STEPS", "1000"))
"""How many steps are taken; one of three is two to four calls at once."""
SEED = int(os.environ.get("MODEL_SEED", "0"))
"""What the stories follow from, as far as calls at once follow from anything."""
STORIES = 10
STEPS_A_STORY = 40
T = TypeVar("T")

IDENTITY = {"tier", "content", "session_id", "session_position"}
NOWHERE = ids.show(ids.MEMORY, UUID(int=0))


@dataclass
class World:
    """What the stories happen to."""

    memories: Stub
    database: Database
    retention: RetentionStore
    owner: asyncpg.Connection
    clock: FakeClock
    loop: asyncio.AbstractEventLoop
    steps: int = 0

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Do something on the loop of the stores; the story is told on another thread."""
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(30)


class Story(RuleBasedStateMachine):
    """Four users of three tenants."""

    world: World
    is_settled = False
    """Whether all answers so far were explained."""

    @initialize()
    def begin(self) -> None:
        self.people = self.world.run(self._strangers_and_a_colleague())
        self.creations: list[Act] = []
        self.is_settled = True

    @rule(act=acts)
    def act(self, act: Act) -> None:
        self._do([act])

    @rule(acts=st.lists(acts, min_size=2, max_size=4))
    def act_at_once(self, acts: list[Act]) -> None:
        self._do(acts)

    @rule(changes=st.lists(changing, min_size=2, max_size=4))
    def change_one_memory_at_once(self, changes: list[Act]) -> None:
        first = changes[0]
        self._do([replace(each, who=first.who, back=first.back) for each in changes])

    @rule(
        changes=st.lists(changing, min_size=1, max_size=2),
        others=st.lists(drafts, max_size=1),
    )
    def say_again_and_change_at_once(
        self, changes: list[Act], others: list[dict[str, Any]]
    ) -> None:
        who = changes[0].who
        person = self.people[who]
        back = changes[0].back % max(len(person.ever), 1)
        memory = person.memories.get(person.ever[-1 - back]) if person.ever else None
        if memory is None:
            return
        same = {key.name: value for key, value in memory.ListFields() if key.name in IDENTITY}
        again = (
            Act(who, "BatchCreateMemories", {"memories": [*others, same]})
            if others
            else Act(who, "CreateMemory", {"memory": same})
        )
        self._do([again, *(replace(each, who=who, back=back) for each in changes)])

    @rule(act=creating, times=st.integers(2, 4))
    def create_at_once(self, act: Act, times: int) -> None:
        self._do([act] * times)

    @rule(back=st.integers(0, 3))
    def create_again(self, back: int) -> None:
        if self.creations:
            self._do([self.creations[-1 - back % len(self.creations)]])

    @rule(who=people)
    def change_mind(self, who: int) -> None:
        self.world.steps += 1
        person = self.people[who]
        person.is_consenting = not person.is_consenting
        person.consent_version += 1
        self.world.run(
            write_decision(
                self.world.database, person.caller, "memory.store", granted=person.is_consenting
            )
        )

    @rule(
        who=people,
        long_term=st.none() | st.sampled_from([0, 50, 110]),
        permanent=st.none() | st.sampled_from([0, 50, 110]),
        unseen_days=st.none() | st.sampled_from([1, 30]),
        grace_days=st.none() | st.sampled_from([1, 7]),
    )
    def choose(
        self,
        who: int,
        long_term: int | None,
        permanent: int | None,
        unseen_days: int | None,
        grace_days: int | None,
    ) -> None:
        self.world.steps += 1
        person = self.people[who]
        for tier, chosen in ((pb.TIER_LONG_TERM, long_term), (pb.TIER_PERMANENT, permanent)):
            person.limits[tier] = FREE[tier] if chosen is None else chosen
        person.unseen_days = unseen_days
        person.grace_days = 30 if grace_days is None else grace_days
        self.world.run(self._choose(person, long_term, permanent, unseen_days, grace_days))

    @rule(days=st.sampled_from([0.5, 1.5, 8, 41]))
    def wait(self, days: float) -> None:
        self.world.steps += 1
        self.world.clock.advance(days=days)
        self.world.run(self._keep_house())
        for person in self.people:
            person.pass_time(self.world.clock.now)

    def teardown(self) -> None:
        if self.is_settled:
            self.world.run(self._look_at_everything())

    def _do(self, acts: Sequence[Act]) -> None:
        self.is_settled = False
        self.world.steps += 1
        self.world.clock.advance(seconds=1)
        self.creations += [act for act in acts if act.creates]
        calls = [(act.who, self._request(act)) for act in acts]
        callers = [self.people[who].caller for who, _ in calls]
        answers = self.world.run(self._at_once(callers, [request for _, request in calls]))
        for who in {who for who, _ in calls}:
            told = [
                (request, answer)
                for (caller, request), answer in zip(calls, answers, strict=True)
                if caller == who
            ]
            self._understand(who, told)
        self.is_settled = True

    def _request(self, act: Act) -> Message:
        whose = self.people[act.who if act.whose is None else act.whose]
        memory_id = whose.ever[-1 - act.back % len(whose.ever)] if whose.ever else NOWHERE
        kept = whose.memories.get(memory_id)
        return act.request(memory_id, kept.version if kept else 1)

    def _understand(self, who: int, told: Sequence[Told]) -> None:
        """Find out what a person has after calls."""
        person, now = self.people[who], self.world.clock.now
        touched = {memory_id for each in told for memory_id in ids_in(*each)}
        others = {memory_id for other in self.people for memory_id in other.ever} - {*person.ever}
        seen = self.world.run(self._seen(person, touched - others))
        then = explain(person, told, now, seen)
        if then is None:
            raise AssertionError(unexplained(person, told, now, seen))
        self.people[who] = then

    async def _strangers_and_a_colleague(self) -> list[Person]:
        callers = [await new_caller(self.world.database) for _ in range(3)]
        colleague = Caller(callers[0].tenant_id, ids.new_id())
        await write_decision(self.world.database, colleague, "memory.store", granted=True)
        return [Person(caller) for caller in (callers[0], colleague, *callers[1:])]

    async def _choose(self, person: Person, *chosen: int | None) -> None:
        columns = ("long_term_bytes", "permanent_bytes", "long_term_days", "archive_grace_days")
        named = dict(zip(columns, chosen, strict=True))
        await write_settings(self.world.owner, person.caller, **named)

    async def _keep_house(self) -> None:
        """Let two sweepers at once do what is due."""
        retention, now = self.world.retention, self.world.clock.now
        for sweep in (retention.archive_unseen, retention.delete_due):
            while any(await asyncio.gather(sweep(now, 2), sweep(now, 2))):
                pass

    # --- calls

    async def _at_once(
        self, callers: Sequence[Caller], requests: Sequence[Message]
    ) -> list[Answer]:
        return list(await asyncio.gather(*map(self._call, callers, requests)))

    async def _call(self, caller: Caller, request: Message) -> Answer:
        try:
            method = getattr(self.world.memories, method_of(request))
            return cast("Message", await method(request, metadata=bearer(caller)))
        except grpc.aio.AioRpcError as error:
            refusal = read(error)
            return refusal.reason or f"{refusal.code}: {refusal.message}"

    async def _list(self, person: Person, **fields: Any) -> list[pb.Memory]:
        request = pb.ListMemoriesRequest(page_size=3, **fields)
        listed: list[pb.Memory] = []
        while True:
            page = await self.world.memories.ListMemories(request, metadata=bearer(person.caller))
            listed += page.memories
            request.page_token = page.next_page_token
            if not request.page_token:
                return listed

    async def _versions(self, person: Person, memory_id: str) -> list[pb.Memory] | str:
        request = pb.ListMemoryVersionsRequest(id=memory_id, page_size=3)
        listed: list[pb.Memory] = []
        while True:
            answer: Any = await self._call(person.caller, request)
            if isinstance(answer, str):
                return answer
            listed += answer.versions
            request.page_token = answer.next_page_token
            if not request.page_token:
                return listed

    async def _events(self, person: Person) -> Counter[tuple[str, str, str]]:
        rows = await self.world.owner.fetch(
            """
            SELECT actor, action, resource, count(*)
              FROM audit_events
             WHERE tenant_id = $1 AND user_id = $2
             GROUP BY actor, action, resource
            """,
            person.caller.tenant_id,
            person.caller.user_id,
        )
        return Counter(
            {(actor, action, resource): count for actor, action, resource, count in rows}
        )

    # --- looking

    async def _seen(self, person: Person, memory_ids: Iterable[str]) -> Seen:
        requests = [pb.GetMemoryRequest(id=memory_id) for memory_id in memory_ids]
        usage, *memories = await asyncio.gather(
            *(self._call(person.caller, each) for each in (pb.GetUsageRequest(), *requests))
        )
        found = zip((request.id for request in requests), memories, strict=True)
        return Seen(await self._events(person), usage, dict(found))

    async def _look_at_everything(self) -> None:
        for person in self.people:
            assert await self._seen(person, person.ever) == person.looks(person.ever)
            assert await self._helped(person) == person.helped
            await self._look_at_lists(person)
            await self._look_at_others(person)
        users = [person.caller.user_id for person in self.people]
        assert await self.world.owner.fetch(_WRONG_SUMS, users) == []

    async def _look_at_lists(self, person: Person) -> None:
        assert await self._list(person) == person.active()
        assert await self._list(person, state=pb.MEMORY_STATE_ARCHIVED) == person.archived()
        for memory_id in person.ever:
            kept = memory_id in person.memories
            expected = person.history(memory_id) if kept else "RESOURCE_NOT_FOUND"
            assert await self._versions(person, memory_id) == expected

    async def _look_at_others(self, person: Person) -> None:
        """See that a person sees of others what these show, and nothing else."""
        others = [other for other in self.people if other is not person]
        shown = {
            memory.id: memory
            for other in others
            if other.caller.tenant_id == person.caller.tenant_id
            for memory in other.shown()
        }
        listed = await self._list(person, shared=True)
        assert listed == sorted(shown.values(), key=lambda memory: memory.id, reverse=True)
        for memory_id in [each for other in others for each in other.ever]:
            answer = await self._call(person.caller, pb.GetMemoryRequest(id=memory_id))
            if memory_id in shown:
                assert answer == pb.GetMemoryResponse(memory=shown[memory_id])
            else:
                assert answer == "RESOURCE_NOT_FOUND"
        for memory_id in shown:
            assert await self._versions(person, memory_id) == "RESOURCE_NOT_FOUND"

    async def _helped(self, person: Person) -> Counter[str]:
        rows = await self.world.owner.fetch(
            """
            SELECT memory_id, useful_count
              FROM memory_scores
             WHERE tenant_id = $1 AND user_id = $2 AND useful_count > 0
            """,
            person.caller.tenant_id,
            person.caller.user_id,
        )
        return Counter(
            {ids.show(ids.MEMORY, row["memory_id"]): row["useful_count"] for row in rows}
        )


_WRONG_SUMS = """
    SELECT usage.*, real.*
      FROM memory_usage AS usage
      CROSS JOIN LATERAL (
           SELECT coalesce(sum(size) FILTER (WHERE is_active AND tier = 'long_term'), 0),
                  coalesce(sum(size) FILTER (WHERE is_active AND tier = 'permanent'), 0),
                  coalesce(sum(size) FILTER (WHERE NOT is_active), 0),
                  count(*) FILTER (WHERE is_active AND tier = 'long_term'),
                  count(*) FILTER (WHERE is_active AND tier = 'permanent'),
                  count(*) FILTER (WHERE NOT is_active)
             FROM (
                   SELECT tier, archived_at IS NULL AS is_active,
                          octet_length(content) + octet_length(array_to_string(tags, '')) AS size
                     FROM memories
                    WHERE tenant_id = usage.tenant_id AND user_id = usage.user_id
                  ) AS memory
           ) AS real (a, b, c, d, e, f)
     WHERE user_id = ANY ($1)
       AND (long_term_bytes, permanent_bytes, archived_bytes,
            long_term_count, permanent_count, archived_count)
           IS DISTINCT FROM (a, b, c, d, e, f)
"""
"""Users whose usage is not the sum of what they keep."""


@pytest.mark.timeout(3_600)
async def test_whatever_users_do_the_service_answers_and_keeps_what_the_model_does(
    memories: Stub,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    loop = asyncio.get_running_loop()
    world = World(memories, database, RetentionStore(system_database), owner, clock, loop)
    story = type("StoryOfThisTest", (Story,), {"world": world})
    how = settings(
        max_examples=STORIES,
        stateful_step_count=STEPS_A_STORY,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    for number in itertools.count(SEED):
        try:
            await asyncio.to_thread(run_state_machine_as_test, seed(number)(story), settings=how)
        except BaseException as error:
            error.add_note(f"after {world.steps} steps; once more: MODEL_SEED={number}")
            raise
        if world.steps >= STEPS:
            return
