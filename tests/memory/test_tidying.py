"""After scoring: what a quota has no room for is archived, and can be brought back."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.errors import LeaseLost
from server.memory.meditation_store import Meditation, MeditationStore
from server.memory.scoring_store import ScoringStore
from server.memory.tidying import Tidying
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import withdraw, write_settings
from tests.memory.calls import Stub, archive, create, restore
from tests.memory.scoring_calls import scoring_stream
from tests.refusals import refusal_of

SIZE = 10
"""Of every memory, in bytes."""


def text(n: int) -> str:
    return f"{n:0{SIZE}}"


async def quota(owner: asyncpg.Connection, caller: Caller, memories: int) -> None:
    """Let a user choose quotas for so many memories."""
    size = memories * SIZE
    await write_settings(owner, caller, long_term_bytes=size, permanent_bytes=size)


async def score(owner: asyncpg.Connection, caller: Caller, scores: dict[int, float]) -> None:
    """Give memories their scores, past the scorer."""
    for n, value in scores.items():
        await owner.execute(
            """
            UPDATE memory_scores SET score = $3
             WHERE user_id = $1 AND memory_id = (SELECT id FROM memories
                                                  WHERE user_id = $1 AND content = $2)
            """,
            caller.user_id,
            text(n),
            value,
        )


async def active(owner: asyncpg.Connection, caller: Caller) -> list[int]:
    rows = await owner.fetch(
        "SELECT content FROM memories WHERE user_id = $1 AND archived_at IS NULL", caller.user_id
    )
    return sorted(int(row["content"]) for row in rows)


async def many(memories: Stub, caller: Caller, count: int, **fields: Any) -> list[pb.Memory]:
    return [await create(memories, caller, text(n), **fields) for n in range(count)]


@pytest_asyncio.fixture
async def run(meditations: MeditationStore, caller: Caller) -> Meditation:
    """A meditation of the user that is under way."""
    return await meditations.start(caller, "")


async def tidied(
    tidying: Tidying, scoring_store: ScoringStore, run: Meditation, fence: int = 1
) -> int:
    """Tidy up after the one shard of a run, end it, and return how many it archived."""
    shard = await scoring_store.open_shard(run.id, 0, fence)
    await tidying.tidy(shard)
    return (await scoring_store.finish(shard, shard.cursor)).archived


async def undo(memories: Stub, caller: Caller, run: Meditation) -> pb.UndoMeditationResponse:
    request = pb.UndoMeditationRequest(id=ids.show(ids.MEDITATION, run.id))
    return await memories.UndoMeditation(request, metadata=bearer(caller))


# --- what is archived


async def test_lowest_scores_go_first_and_of_equal_ones_the_oldest(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    for n in range(8):
        await create(memories, caller, text(n))
        clock.advance(seconds=1)
    await score(owner, caller, {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.2, 4: 0.5, 5: 0.5, 6: 0.8, 7: 0.9})
    await quota(owner, caller, 4)
    assert await tidied(tidying, scoring_store, run) == 4
    assert await active(owner, caller) == [0, 5, 6, 7]
    events = await owner.fetch(
        "SELECT actor, user_id FROM audit_events WHERE action = 'memory.archive'"
    )
    assert [tuple(event) for event in events] == [("system", caller.user_id)] * 4


@pytest.mark.parametrize("tier", [pb.TIER_LONG_TERM, pb.TIER_PERMANENT])
async def test_protected_restored_and_unscored_memories_are_kept(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
    tier: pb.Tier.ValueType,
) -> None:
    kept = await many(memories, caller, 6, tier=tier)
    await memories.ProtectMemory(
        pb.ProtectMemoryRequest(id=kept[0].id, protected=True), metadata=bearer(caller)
    )
    await archive(memories, caller, kept[1])
    await restore(memories, caller, kept[1])
    await score(owner, caller, {0: 0, 1: 0, 3: 0.5, 4: 0.6, 5: 0.7})
    await quota(owner, caller, 1)
    assert await tidied(tidying, scoring_store, run) == 3
    assert await active(owner, caller) == [0, 1, 2]


async def test_who_is_within_the_quota_loses_nothing(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await many(memories, caller, 3)
    await score(owner, caller, {0: 0, 1: 0, 2: 0})
    await quota(owner, caller, 3)
    assert await tidied(tidying, scoring_store, run) == 0
    assert await active(owner, caller) == [0, 1, 2]


@pytest.mark.parametrize("most_a_day", [3])
async def test_no_more_are_archived_than_a_day_allows(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    await many(memories, caller, 8)
    await score(owner, caller, {n: n / 10 for n in range(8)})
    await quota(owner, caller, 1)
    archived = []
    for hours in (0, 1, 24, 1):
        clock.advance(hours=hours)
        run = await meditations.start(caller, "")
        archived.append(await tidied(tidying, scoring_store, run))
    assert archived == [3, 0, 3, 0]
    assert await active(owner, caller) == [6, 7]


async def test_withdrawn_consent_leaves_everything_where_it_is(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await many(memories, caller, 3)
    await score(owner, caller, {0: 0, 1: 0, 2: 0})
    await quota(owner, caller, 1)
    await withdraw(database, caller)
    assert await tidied(tidying, scoring_store, run) == 0
    assert await active(owner, caller) == [0, 1, 2]


async def test_nightly_run_tidies_up_of_everybody_each_in_one_shard(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    callers = [await new_caller(database) for _ in range(6)]
    for caller in callers:
        await many(memories, caller, 3)
        await score(owner, caller, {0: 0.1, 1: 0.2, 2: 0.3})
        await quota(owner, caller, 1)
    meditation_id, shards = await scoring_store.plan_all(ids.new_id())
    archived = []
    for number in range(shards):
        shard = await scoring_store.open_shard(meditation_id, number, 1)
        await tidying.tidy(shard)
        archived.append((await scoring_store.finish(shard, shard.cursor)).archived)
    assert sum(archived) == 12
    assert sum(count > 0 for count in archived) > 1
    assert [await active(owner, caller) for caller in callers] == [[2]] * 6


async def test_run_promotes_and_deletes_what_is_due_of_its_user_only(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    meditations: MeditationStore,
    run: Meditation,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    other = await new_caller(database)
    for whose in (caller, other):
        await archive(memories, whose, await create(memories, whose, text(0)))
        await create(memories, whose, text(1), tier=pb.TIER_SHORT_TERM, protected=True)
    await owner.execute("UPDATE memories SET delete_after = $1", clock.now - dt.timedelta(hours=1))
    assert await tidied(tidying, scoring_store, run) == 0
    done = await meditations.get(caller, run.id)
    assert (done.promoted, done.deleted) == (1, 1)
    assert await active(owner, caller) == [1]
    assert await active(owner, other) == []
    assert await owner.fetchval("SELECT count(*) FROM memories WHERE user_id = $1", other.user_id)


async def test_nightly_run_tells_each_user_what_it_did_to_their_memories(
    memories: Stub,
    tidying: Tidying,
    system_database: SystemDatabase,
    database: Database,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    many_of, few_of, stranger = [await new_caller(database) for _ in range(3)]
    for whose, promoted, deleted in ((many_of, 3, 2), (few_of, 1, 0)):
        for number in range(deleted):
            await archive(memories, whose, await create(memories, whose, text(number)))
        for number in range(promoted):
            new = text(10 + number)
            await create(memories, whose, new, tier=pb.TIER_SHORT_TERM, protected=True)
    await owner.execute("UPDATE memories SET delete_after = $1", clock.now - dt.timedelta(hours=1))
    await create(memories, stranger, text(0))
    store = ScoringStore(system_database, 1)
    meditation_id, _ = await store.plan_all(ids.new_id())
    for attempt in (1, 2):
        # Taken up again it has nothing left to do, and tells nothing twice.
        shard = await store.open_shard(meditation_id, 0, attempt)
        await tidying.tidy(shard)
    await store.finish(shard, shard.cursor)

    async def told(whose: Caller) -> list[tuple[bool, int, int, int]]:
        request = pb.ListMeditationsRequest()
        runs = (await memories.ListMeditations(request, metadata=bearer(whose))).meditations
        return [(run.nightly, run.archived, run.promoted, run.deleted) for run in runs]

    assert await told(many_of) == [(True, 0, 3, 2)]
    assert await told(few_of) == [(True, 0, 1, 0)]
    assert await told(stranger) == []


# --- under the fence, and at once


async def test_zombie_archives_nothing(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await many(memories, caller, 2)
    await score(owner, caller, {0: 0, 1: 0})
    await quota(owner, caller, 1)
    zombie = await scoring_store.open_shard(run.id, 0, 1)
    await scoring_store.open_shard(run.id, 0, 2)
    with pytest.raises(LeaseLost):
        await tidying.tidy(zombie)
    assert await active(owner, caller) == [0, 1]


async def test_two_runs_at_once_archive_what_one_would(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    system_database: SystemDatabase,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await many(memories, caller, 10)
    await score(owner, caller, {n: n / 10 for n in range(10)})
    await quota(owner, caller, 4)
    nightly, _ = await ScoringStore(system_database, 1).plan_all(ids.new_id())
    shards = [await scoring_store.open_shard(one, 0, 1) for one in (run.id, nightly)]
    await asyncio.gather(*(tidying.tidy(shard) for shard in shards))
    assert await active(owner, caller) == [6, 7, 8, 9]
    assert await owner.fetchval("SELECT sum(archived)::int FROM meditation_shards") == 6


# --- undone


async def contents(owner: asyncpg.Connection) -> dict[str, Any]:
    rows = await owner.fetch(
        """
        SELECT content, tier, tags, terms::text, archived_at, delete_after, size_bytes, protected
          FROM memories
        """
    )
    return {row["content"]: tuple(row) for row in rows}


async def usage(owner: asyncpg.Connection) -> tuple[Any, ...]:
    row = await owner.fetchrow(
        "SELECT long_term_bytes, long_term_count, archived_bytes, archived_count FROM memory_usage"
    )
    return tuple(row)


async def test_undo_restores_exactly_what_the_run_archived(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    turns = [
        await create(memories, caller, text(n), session_id="talk", session_position=n)
        for n in range(12)
    ]
    await archive(memories, caller, turns[11])
    await score(owner, caller, {n: n / 20 for n in range(12)})
    before, used = await contents(owner), await usage(owner)
    await quota(owner, caller, 3)
    run = await meditations.start(caller, "")
    assert await tidied(tidying, scoring_store, run) == 8
    assert await active(owner, caller) == [8, 9, 10]
    undone = await undo(memories, caller, run)
    assert (undone.restored, undone.kept_archived) == (8, 0)
    assert undone.meditation.HasField("undo_time")
    # Terms of the turns around them too; and that they are over the quota again.
    assert await contents(owner) == before
    assert await usage(owner) == used
    again = await undo(memories, caller, run)
    assert (again.restored, again.meditation) == (0, undone.meditation)
    events = await owner.fetch(
        "SELECT action, count(*) AS n FROM audit_events WHERE action ~ 'undo|restore' GROUP BY 1"
    )
    assert dict(map(tuple, events)) == {"memory.restore": 8, "meditation.undo": 1}
    # They count as restored by their user: the machine leaves them alone.
    assert await tidied(tidying, scoring_store, await meditations.start(caller, "")) == 3


async def test_undo_leaves_what_others_had_a_say_in(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    kept = await many(memories, caller, 5)
    await score(owner, caller, {n: n / 10 for n in range(5)})
    await quota(owner, caller, 1)
    assert await tidied(tidying, scoring_store, run) == 4
    await quota(owner, caller, 10)
    await restore(memories, caller, kept[0])
    await archive(memories, caller, kept[0])
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=kept[1].id), metadata=bearer(caller))
    await create(memories, caller, text(2))
    undone = await undo(memories, caller, run)
    assert (undone.restored, undone.kept_archived) == (1, 1)
    assert await active(owner, caller) == [2, 3, 4]


async def test_user_undoes_their_part_of_a_nightly_run_and_sees_no_more_of_it(
    memories: Stub,
    tidying: Tidying,
    system_database: SystemDatabase,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    mine, theirs, stranger = [await new_caller(database) for _ in range(3)]
    for whose in (mine, theirs):
        await many(memories, whose, 4)
        await score(owner, whose, {n: n / 10 for n in range(4)})
        await quota(owner, whose, 1)
    store = ScoringStore(system_database, 1)
    meditation_id, _ = await store.plan_all(ids.new_id())
    shard = await store.open_shard(meditation_id, 0, 1)
    await tidying.tidy(shard)
    await store.finish(shard, shard.cursor)
    listed = await memories.ListMeditations(pb.ListMeditationsRequest(), metadata=bearer(mine))
    (shown,) = listed.meditations
    assert (shown.nightly, shown.archived, shown.processed, shown.total) == (True, 3, 0, 0)
    request = pb.UndoMeditationRequest(id=shown.id)
    undone = await memories.UndoMeditation(request, metadata=bearer(mine))
    assert undone.restored == 3
    assert await active(owner, mine) == [0, 1, 2, 3]
    assert await active(owner, theirs) == [3]
    for attempt in (
        memories.UndoMeditation(request, metadata=bearer(stranger)),
        memories.GetMeditation(pb.GetMeditationRequest(id=shown.id), metadata=bearer(stranger)),
    ):
        assert (await refusal_of(attempt)).reason == "RESOURCE_NOT_FOUND"


async def test_run_that_is_under_way_cannot_be_undone(
    memories: Stub, run: Meditation, caller: Caller
) -> None:
    assert (await refusal_of(undo(memories, caller, run))).reason == "STATE_CONFLICT"


async def test_undo_needs_consent(
    memories: Stub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await many(memories, caller, 2)
    await score(owner, caller, {0: 0, 1: 1})
    await quota(owner, caller, 1)
    await tidied(tidying, scoring_store, run)
    await withdraw(database, caller)
    assert (await refusal_of(undo(memories, caller, run))).reason == "CONSENT_MISSING"
    assert await active(owner, caller) == [1]


async def test_crash_while_tidying_loses_and_repeats_nothing(
    memories: Stub,
    scoring: rpc.ScoringServiceAsyncStub,
    tidying: Tidying,
    scoring_store: ScoringStore,
    run: Meditation,
    caller: Caller,
    owner: asyncpg.Connection,
    meditations: MeditationStore,
) -> None:
    await many(memories, caller, 6)
    await score(owner, caller, dict.fromkeys(range(6), 0.5))
    await quota(owner, caller, 2)
    # It archives everything and dies before it can say so.
    await tidying.tidy(await scoring_store.open_shard(run.id, 0, 1))
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, token=2, size=100)
        await stream.score_all()
    done = await meditations.get(caller, run.id)
    assert (done.processed, done.archived) == (6, 4)
    assert await active(owner, caller) == [4, 5]
    assert await _archived_in(owner) == {run.id: 4}


async def _archived_in(owner: asyncpg.Connection) -> dict[UUID, int]:
    rows = await owner.fetch(
        "SELECT archived_in, count(*) FROM memories WHERE archived_in IS NOT NULL GROUP BY 1"
    )
    return dict(map(tuple, rows))
